# SPDX-License-Identifier: GPL-2.0-only
"""`in_order`: every item once, in order, whoever does it."""

from __future__ import annotations

import threading
from contextlib import closing

import pytest

from bcachectl.fsck.threads import in_order


@pytest.mark.parametrize("threads", [1, 2, 3, 8])
@pytest.mark.parametrize("count", [0, 1, 2, 7, 200])
def test_every_item_once_and_in_order(threads: int, count: int) -> None:
    begun: list[int] = []

    def work(item: int) -> int:
        begun.append(item)
        return item * item

    assert list(in_order(work, range(count), threads)) == [item * item for item in range(count)]
    assert sorted(begun) == list(range(count))


def test_the_caller_works_while_another_is_slow() -> None:
    """The thread that has the first item waits until the caller has done all others."""
    rest, done, caller = threading.Event(), [], threading.get_ident()
    taken: list[int] = []

    def work(item: int) -> int:
        taken.append(item)
        if threading.get_ident() != caller:
            assert rest.wait(60)
        elif len(taken) == 1:
            # The caller came first: the other thread has the next one.
            while len(taken) < 2:
                pass
        done.append(item)
        if len(done) == 4:
            rest.set()
        return item

    assert list(in_order(work, range(5), 2)) == list(range(5))


def test_an_exception_comes_out() -> None:
    def work(item: int) -> int:
        if item == 30:
            raise ZeroDivisionError
        return item

    for threads in (1, 2, 3):
        found = []
        with pytest.raises(ZeroDivisionError):
            found.extend(in_order(work, range(40), threads))
        assert found == list(range(len(found)))


def test_results_that_nobody_wants() -> None:
    begun: list[int] = []
    before = threading.active_count()
    with closing(in_order(begun.append, range(1000), 2)) as found:
        assert next(found) is None
    assert threading.active_count() == before
    assert sorted(begun) == list(range(len(begun)))
