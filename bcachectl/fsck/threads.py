# SPDX-License-Identifier: GPL-2.0-only
"""`in_order`: one kind of work on many items by several threads, the results in the order of the items.

Python runs in one thread at a time, so this pays where the work is reading, checksums and compiled code, which let the
others run.  The caller is one of the threads: whenever the result that is next is not there yet, it takes an item
itself, and only when none is left does it wait.  So what it does with the results goes on beside the work as well.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")


def in_order(work: Callable[[T], R], items: Sequence[T], threads: int) -> Generator[R, None, None]:
    """``work`` of each item, in the order of the items; an exception comes where its result would, or earlier."""
    if threads < 2 or len(items) < 2:
        yield from map(work, items)
        return
    done: dict[int, R] = {}
    todo = iter(range(len(items)))      # Whoever takes the next number has that item.

    def take_items() -> None:
        for index in todo:
            done[index] = work(items[index])

    with ThreadPoolExecutor(threads - 1) as pool:
        helpers = [pool.submit(take_items) for _ in range(threads - 1)]
        try:
            for index in range(len(items)):
                while index not in done:
                    mine = next(todo, None)
                    if mine is not None:
                        done[mine] = work(items[mine])
                        continue
                    for helper in helpers:
                        helper.result()
                yield done.pop(index)
        finally:
            # Where the results are not wanted any more, nobody begins another item.
            for _index in todo:
                pass
