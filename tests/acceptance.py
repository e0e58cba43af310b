# SPDX-License-Identifier: GPL-2.0-only
"""The judge of what a volume holds after whoever served it was killed.

The rule: every sector holds what the last write before the last completed flush left there, or what a later write put
there; and no sector is torn.  "Before the flush" is: acknowledged before the flush was sent.  A write that was never
acknowledged is a later write, too.  A write with FUA is settled by its own acknowledgement.

A sector that the kill left open may answer with the one value now and with the other later, until it is written again:
in writethrough the backing device may have the new data while the cache still has the old.  `Acceptance.after_kill`
goes on from a content that was read, and remembers what else was allowed.

`Acceptance` is told of writes (see `tests.stamps` for their tags) and flushes as they are sent and acknowledged, then
judges a content.  Writes that are in flight together must not overlap: then the order of sending is the order that
counts. It knows nothing of caches, and shares no code with the engine.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from tests.stamps import Op, tag

SECTOR_BYTES = 512
_WORDS = SECTOR_BYTES // 8
ZERO_TAG = 0


Stamp = tuple[int, int]
"""What a sector says: the tag of a write and its byte offset; (0, 0) is a sector of zeros."""


@dataclass(slots=True)
class _Write:
    tag: int
    offset_bytes: int
    length_bytes: int
    fua: bool
    acknowledged_at: int | None = None
    zeroes: bool = False

    @property
    def stamp(self) -> Stamp:
        return (self.tag, 0 if self.zeroes else self.offset_bytes)


@dataclass(slots=True)
class _Flush:
    sent_at: int
    is_done: bool = False


class Acceptance:
    """What each sector of one volume may hold.  Starts from zeros, or from ``initial``, a content that was read
    before."""

    def __init__(self, size_bytes: int, initial: bytes | memoryview | None = None) -> None:
        self.size_bytes = size_bytes
        self._clock = 0
        self._writes: list[_Write] = []
        self._flushes: list[_Flush] = []
        self._initial = stamps_of(bytes(size_bytes) if initial is None else initial)
        self._open: dict[int, set[Stamp]] = {}   # sector -> what it may hold as well, from before a kill

    def send_write(self, write_tag: int, offset_bytes: int, length_bytes: int, *, fua: bool = False,
                   zeroes: bool = False) -> int:
        """A write leaves the client; gives the handle to acknowledge it with."""
        assert offset_bytes % SECTOR_BYTES == 0 and length_bytes % SECTOR_BYTES == 0
        self._clock += 1
        self._writes.append(_Write(write_tag, offset_bytes, length_bytes, fua, zeroes=zeroes))
        return len(self._writes) - 1

    def acknowledge_write(self, handle: int) -> None:
        """The server said that a write is done."""
        self._clock += 1
        self._writes[handle].acknowledged_at = self._clock

    def send_flush(self) -> int:
        """A flush leaves the client."""
        self._clock += 1
        self._flushes.append(_Flush(self._clock))
        return len(self._flushes) - 1

    def acknowledge_flush(self, handle: int) -> None:
        """The server said that a flush is done."""
        self._clock += 1
        self._flushes[handle].is_done = True

    def acknowledged_writes(self) -> int:
        """How many writes were acknowledged."""
        return sum(write.acknowledged_at is not None for write in self._writes)

    def completed_flushes(self) -> int:
        """How many flushes were acknowledged."""
        return sum(flush.is_done for flush in self._flushes)

    def settle_all(self) -> None:
        """An orderly stop: as if a flush had covered every acknowledged write."""
        self.acknowledge_flush(self.send_flush())

    def judge(self, content: bytes | memoryview, *, limit: int = 10) -> list[str]:
        """Complaints about a content, at most ``limit`` of them; an empty list is acceptance."""
        found = stamps_of(content)
        if len(found.tags) != len(self._initial.tags):
            return [f"{len(content)} bytes instead of {self.size_bytes}"]
        tags, offsets, later = self._allowed()
        wrong = (found.tags != tags) | (found.offsets != offsets) | (found.torn & ~self._initial.torn)
        complaints = []
        for sector in np.flatnonzero(wrong).tolist():
            here = (int(found.tags[sector]), int(found.offsets[sector]))
            allowed = later.get(sector, set())
            if here not in allowed or found.torn[sector]:
                complaints.append(f"sector {sector}: holds {_name(here)}{' torn' if found.torn[sector] else ''}, but "
                                  f"{_name((int(tags[sector]), int(offsets[sector])))} was settled there"
                                  + "".join(f", or {_name(one)}" for one in sorted(allowed)))
                if len(complaints) == limit:
                    complaints.append("... and perhaps more")
                    break
        return complaints

    def carry_over(self, content: bytes | memoryview) -> Acceptance:
        """The judge of the next run, which begins with ``content``; what was not settled in this one may still appear.

        A cache that served the old data after a crash may later drop it and read the backing device, where the new
        data had arrived before, or the other way round: unflushed writes are the old or the new, and not for ever the
        same.  The kernel's driver is no different.  Only a newer write that is settled ends that.
        """
        following = Acceptance(self.size_bytes, content)
        tags, offsets, later = self._allowed()
        following._open = {sector: {*stamps, (int(tags[sector]), int(offsets[sector]))}
                           for sector, stamps in later.items()}
        return following

    def _allowed(self) -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.uint64], dict[int, set[Stamp]]]:
        # Tag and offset that each sector must hold, and for some sectors others that it may hold.
        covered = max((flush.sent_at for flush in self._flushes if flush.is_done), default=0)
        tags, offsets = self._initial.tags.copy(), self._initial.offsets.copy()
        later = {sector: set(stamps) for sector, stamps in self._open.items()}
        for write in self._writes:
            start, end = write.offset_bytes // SECTOR_BYTES, (write.offset_bytes + write.length_bytes) // SECTOR_BYTES
            at = write.acknowledged_at
            if at is not None and (write.fua or at < covered):
                tags[start:end], offsets[start:end] = write.stamp
                for sector in range(start, end):
                    later.pop(sector, None)
            else:
                for sector in range(start, end):
                    later.setdefault(sector, set()).add(write.stamp)
        return tags, offsets, later


def _name(stamp: Stamp) -> str:
    if stamp == (0, 0):
        return "zeros"
    return f"write {stamp[0] >> 32}:{stamp[0] & 0xFFFFFFFF} of byte {stamp[1]}"


@dataclass(frozen=True)
class Stamps:
    """What the sectors of a content say: tag and offset of the write each, and whether a sector is not of one write."""

    tags: npt.NDArray[np.uint64]
    offsets: npt.NDArray[np.uint64]
    torn: npt.NDArray[np.bool_]


def stamps_of(content: bytes | memoryview) -> Stamps:
    """Read the stamps of a content."""
    words = np.frombuffer(content, dtype="<u8").reshape(-1, _WORDS)
    tags, offsets = words[:, 0].copy(), words[:, 1].copy()
    torn = (words[:, 0::2] != tags[:, None]).any(axis=1) | (words[:, 1::2] != offsets[:, None]).any(axis=1)
    return Stamps(tags, offsets, torn)


def acceptance_of_run(plan: Iterable[Op], *, seed: int, last_acknowledged: int, acceptance: Acceptance) -> Acceptance:
    """For a run that did one thing after the other and noted the number of each acknowledged write, then was killed.

    A flush counts if a write after it was acknowledged; the first write after the last acknowledged one may have been
    under way.  ``acceptance`` is the judge before the run, and is given back.
    """
    flush: int | None = None
    for op in plan:
        if not op.is_read:
            if flush is not None and op.number <= last_acknowledged:
                acceptance.acknowledge_flush(flush)
                flush = None
            handle = acceptance.send_write(tag(seed, op.number), op.offset_bytes, op.length_bytes)
            if op.number > last_acknowledged:
                break
            acceptance.acknowledge_write(handle)
        if op.flush_after:
            # Only the newest flush matters, and it covers all before it.
            flush = acceptance.send_flush()
    return acceptance
