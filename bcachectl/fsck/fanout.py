# SPDX-License-Identifier: GPL-2.0-only
"""`tallies`: leaves tallied by several processes, the results in the order of the leaves.

1. The leaves are dealt out in pieces of `PIECE_LEAVES`, in turn, to the caller and to children made by fork.  The
   caller has other things to do as well: it does two where a child does three.  A child has what the `Tallier` knows
   at that moment, reads the device through the same descriptor, and writes nothing but its pipe.
2. The caller does its own pieces and takes the others from the pipes, in order.  A full pipe holds a child back, so
   little is ever waiting.
3. A child that dies, whatever of, is no finding: its leaves come out as None, like any leaf that is not plain.
4. When the results are not wanted any more the pipes are closed, which ends the children, and each is waited for.

Few leaves, or one processor, and all of it happens in the caller.  A child ends by ``os._exit``: nothing that the
parent has open is flushed or closed twice.
"""

from __future__ import annotations

import fcntl
import marshal
import os
import struct
from collections.abc import Generator, Sequence
from contextlib import suppress

import numpy as np

from bcachectl.fsck.tally import Place, Spread, Tallier, Tally

PIECE_LEAVES = 4
LEAVES_MIN = 128
"""Fewer leaves than this are not worth a fork."""
PROCESSES_MAX = 8
PIPE_BYTES = 1 << 20
"""Wanted; the system may give less."""

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
        # Whose each piece is: 0 is the caller.
        others = list(range(1, processes))
        turn = [*others, 0, *others, 0, *others]
        for number in others:
            pipes.append(_pipe())
            child = os.fork()
            if not child:
                _work(tallier, [piece for at, piece in enumerate(pieces) if turn[at % len(turn)] == number], pipes)
            children.append(child)
            os.close(pipes[-1][1])
            pipes[-1] = (pipes[-1][0], -1)
        for at, piece in enumerate(pieces):
            number = turn[at % len(turn)]
            if not number:
                yield from map(tallier.tally, piece)
            else:
                found = _receive(pipes[number - 1][0])
                yield from found if found is not None else [None] * len(piece)
    finally:
        for reader, writer in pipes:
            os.close(reader)
            if writer >= 0:
                os.close(writer)
        for child in children:
            os.waitpid(child, 0)


def _pipe() -> tuple[int, int]:
    reader, writer = os.pipe()
    with suppress(OSError):
        fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, PIPE_BYTES)
    return reader, writer


def _work(tallier: Tallier, pieces: Sequence[Sequence[Place]], pipes: list[tuple[int, int]]) -> None:
    # The child, to whom the last of the pipes belongs.  It never returns, and what goes wrong in it ends it without a
    # word: the parent does its work.
    try:
        for reader, _writer in pipes:
            os.close(reader)
        for piece in pieces:
            data = marshal.dumps([_packed(tallier.tally(place)) for place in piece])
            _send(pipes[-1][1], _LENGTH.pack(len(data)) + data)
    finally:
        os._exit(0)


def _packed(tally: Tally | None) -> tuple[object, ...] | None:
    if tally is None:
        return None
    dirty = {inode: tuple(spread) for inode, spread in tally.dirty.items()}
    return *tally[:3], dirty, tally.taken.tobytes(), tally.marks.tobytes()


def _unpacked(packed: tuple[int, int, int, dict[int, tuple[int, int, int]], bytes, bytes] | None) -> Tally | None:
    if packed is None:
        return None
    extents, dirty_sectors, clean_sectors, dirty, taken, marks = packed
    return Tally(extents, dirty_sectors, clean_sectors, {inode: Spread(*spread) for inode, spread in dirty.items()},
                 np.frombuffer(taken, np.uint64), np.frombuffer(marks, np.uint64))


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
    return [_unpacked(packed) for packed in marshal.loads(data)]


def _read(reader: int, nbytes: int) -> bytes | None:
    parts = []
    while nbytes:
        part = os.read(reader, nbytes)
        if not part:
            return None
        parts.append(part)
        nbytes -= len(part)
    return b"".join(parts)
