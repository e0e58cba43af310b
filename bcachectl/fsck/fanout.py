# SPDX-License-Identifier: GPL-2.0-only
"""`tallies`: leaves tallied by several processes, the results in the order of the leaves.

1. The leaves are dealt out in pieces of `PIECE_LEAVES`, in turn, to children made by fork.  A child has what the
   `Tallier` knows at that moment, reads the device through the same descriptor, and writes nothing but its pipe.
2. The parent takes the pieces from the pipes in order.  A full pipe holds a child back, so little is ever waiting.
3. A child that dies, whatever of, is no finding: its leaves come out as None, like any leaf that is not plain.
4. When the results are not wanted any more the pipes are closed, which ends the children, and each is waited for.

Few leaves, or one processor, and all of it happens in the caller.  A child ends by ``os._exit``: nothing that the
parent has open is flushed or closed twice.
"""

from __future__ import annotations

import os
import pickle
import struct
from collections.abc import Generator, Sequence

from bcachectl.fsck.tally import Place, Tallier, Tally

PIECE_LEAVES = 16
LEAVES_MIN = 128
"""Fewer leaves than this are not worth a fork."""
PROCESSES_MAX = 8

_LENGTH = struct.Struct("<Q")


def processors() -> int:
    """How many processes are worth starting on this machine."""
    return min(len(os.sched_getaffinity(0)), PROCESSES_MAX)


def tallies(tallier: Tallier, places: Sequence[Place], processes: int) -> Generator[Tally | None, None, None]:
    """What `Tallier.tally` says about each place, in order, by so many ``processes``."""
    if processes < 2 or len(places) < LEAVES_MIN:
        for place in places:
            yield tallier.tally(place)
        return
    pieces = [places[at:at + PIECE_LEAVES] for at in range(0, len(places), PIECE_LEAVES)]
    pipes: list[tuple[int, int]] = []
    children: list[int] = []
    try:
        for _ in range(processes):
            pipes.append(os.pipe())
        for number in range(processes):
            child = os.fork()
            if not child:
                _work(tallier, pieces[number::processes], pipes, number)
            children.append(child)
        for _reader, writer in pipes:
            os.close(writer)
        pipes = [(reader, -1) for reader, _writer in pipes]
        for number, piece in enumerate(pieces):
            found = _receive(pipes[number % processes][0])
            yield from found if found is not None else [None] * len(piece)
    finally:
        for reader, writer in pipes:
            os.close(reader)
            if writer >= 0:
                os.close(writer)
        for child in children:
            os.waitpid(child, 0)


def _work(tallier: Tallier, pieces: Sequence[Sequence[Place]], pipes: list[tuple[int, int]], number: int) -> None:
    # The child.  It never returns, and what goes wrong in it ends it without a word: the parent does its work.
    try:
        # The other children's pipes too, or the parent would not see one of those end.
        for other, (reader, writer) in enumerate(pipes):
            os.close(reader)
            if other != number:
                os.close(writer)
        for piece in pieces:
            data = pickle.dumps([tallier.tally(place) for place in piece], pickle.HIGHEST_PROTOCOL)
            _send(pipes[number][1], _LENGTH.pack(len(data)) + data)
    finally:
        os._exit(0)


def _send(writer: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(writer, view):]


def _receive(reader: int) -> list[Tally | None] | None:
    # One piece; None if its child is dead.
    head = _read(reader, _LENGTH.size)
    if head is None:
        return None
    data = _read(reader, _LENGTH.unpack(head)[0])
    if data is None:
        return None
    found: list[Tally | None] = pickle.loads(data)
    return found


def _read(reader: int, nbytes: int) -> bytes | None:
    parts = []
    while nbytes:
        part = os.read(reader, nbytes)
        if not part:
            return None
        parts.append(part)
        nbytes -= len(part)
    return b"".join(parts)
