# SPDX-License-Identifier: GPL-2.0-only
"""`take_completions`: what a ring has completed, sorted by whom it belongs to.

Every request of a ublk device passes here twice, so it is one of the modules that can be compiled.
"""

from __future__ import annotations

CLIENT_SHIFT = 32
"""user_data is a client's number shifted by this, and his own number of the entry."""


def take_completions(words: memoryview, user_data: memoryview, results: memoryview, head_at: int, tail_at: int,
                     mask: int) -> dict[int, list[tuple[int, int]]]:
    """(number, result) of each completion, in their order, by the client's number.  The ring's head is at the index
    ``head_at`` of ``words``, its tail at ``tail_at``; an entry is two words of ``user_data``, four of ``results``.
    """
    found: dict[int, list[tuple[int, int]]] = {}
    here: list[tuple[int, int]] = []
    head, tail, last = words[head_at], words[tail_at], -1
    while head != tail:
        index = head & mask
        data = user_data[index + index]
        client = data >> 32
        if client != last:
            last = client
            here = found.setdefault(client, [])
        here.append((data & 0xFFFFFFFF, results[4 * index + 2]))
        head = head + 1 & 0xFFFFFFFF
    words[head_at] = head
    return found
