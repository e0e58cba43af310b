# SPDX-License-Identifier: GPL-2.0-only
"""`Oracle`: which values a sector may have, now and after power failed.

Every write of a story carries a *stamp* in each sector: volume, sector, serial number of the write.  A sector that is
read back thus says which write it comes from, and a sector from the wrong place or with mixed content shows itself.
The serial 0 is the content a backing device had before the story, `ZEROS` is a sector of zeros.

For each sector the oracle keeps the writes that it may still hold, by these rules (``began`` and ``ended`` are the
times of submission and of the answer):

* write y *follows* write x if x ended before y began; else they are concurrent, and either may win;
* a read that begins after y was acknowledged never returns an x that y follows;
* y is durable when it was acknowledged with FUA, or when a flush (or a write with PREFLUSH) that began after y was
  acknowledged has been acknowledged;
* after power loss no x comes back that is followed by a durable y; everything else may, unfinished writes included;
* a write or a flush that failed acknowledges nothing: its data may be there or not;
* when the engine is killed (`Oracle.after_kill`), all that was acknowledged is still there;
* a discard leaves zeros or any value the sector ever had, until it is followed by a write.

After a recovery (`Oracle.after_crash`) a sector has one of the values it may have.  Where the volume only ever wrote
back (``settles``), the first read decides which; later reads and later crashes must agree with it.  In the other
modes the cache and the backing device may each hold another of the allowed values (rule C16 of the specification, and
the same for a writethrough write that was never flushed), so both stay allowed until the sector is written again.
"""

from __future__ import annotations

import struct

SECTOR = 512
ZEROS = -1
ANYTHING = -2
BASE = 0

_STAMP = struct.Struct("<8sIIQQ")
_MAGIC = b"sim-mark"
_REPEAT = SECTOR // _STAMP.size


def stamp(volume: int, sector: int, serial: int) -> bytes:
    """The content of one sector."""
    if serial == ZEROS:
        return bytes(SECTOR)
    return _STAMP.pack(_MAGIC, volume, 0, sector, serial) * _REPEAT


def stamps(volume: int, start: int, end: int, serial: int) -> bytes:
    """The content of the sectors [start, end) of one write."""
    return b"".join([stamp(volume, sector, serial) for sector in range(start, end)])


def unstamp(data: bytes | memoryview, volume: int, sector: int) -> int | str:
    """The serial in a sector, or a sentence about what else is in it."""
    data = bytes(data)
    if data == bytes(SECTOR):
        return ZEROS
    magic, in_volume, _pad, in_sector, serial = _STAMP.unpack_from(data)
    if magic != _MAGIC:
        return f"foreign bytes {data[:16].hex()}"
    if data != data[:_STAMP.size] * _REPEAT:
        return "mixed content within the sector"
    if (in_volume, in_sector) != (volume, sector):
        return f"the data of volume {in_volume} sector {in_sector} write {serial}"
    return int(serial)


class OracleError(AssertionError):
    """A volume returned what it must not."""


class Write:
    """One write, discard or failed attempt, as far as the oracle cares."""

    __slots__ = ("volume", "start", "end", "value", "began", "ended", "acked", "durable", "fua")

    def __init__(self, volume: int, start: int, end: int, value: int, began: int, *, fua: bool = False) -> None:
        self.volume = volume
        self.start = start
        self.end = end
        self.value = value
        self.began = began
        self.ended: int | None = None
        self.acked = False
        self.durable = False
        self.fua = fua


class _Read:
    __slots__ = ("volume", "start", "end", "allowed")

    def __init__(self, volume: int, start: int, end: int, allowed: list[set[int]]) -> None:
        self.volume = volume
        self.start = start
        self.end = end
        self.allowed = allowed


class _Flush:
    __slots__ = ("volume", "began")

    def __init__(self, volume: int, began: int) -> None:
        self.volume = volume
        self.began = began


def _follows(later: Write, earlier: Write) -> bool:
    return earlier.ended is not None and earlier.ended < later.began


class Oracle:
    """Judges every sector of every volume.  A volume is a number; ``initial`` is `BASE` (stamped) or `ZEROS`."""

    def __init__(self) -> None:
        self.clock = 1
        self.serial = 0
        self.sizes: dict[int, int] = {}
        self.initial: dict[int, int] = {}
        self.settles: dict[int, bool] = {}
        self.held: dict[tuple[int, int], list[Write]] = {}
        self.ever: dict[tuple[int, int], set[int]] = {}
        self.undurable: list[Write] = []
        self.reads: list[_Read] = []

    def add_volume(self, volume: int, size_sectors: int, *, initial: int, settles: bool) -> None:
        """Start judging a volume whose sectors all hold ``initial``."""
        self.sizes[volume] = size_sectors
        self.initial[volume] = initial
        self.settles[volume] = settles

    def _tick(self) -> int:
        self.clock += 1
        return self.clock

    def _writes(self, volume: int, sector: int) -> list[Write]:
        key = (volume, sector)
        if key not in self.held:
            base = Write(volume, sector, sector + 1, self.initial[volume], 0)
            base.ended, base.acked, base.durable = 0, True, True
            self.held[key] = [base]
            self.ever[key] = {base.value}
        return self.held[key]

    # -- writes

    def begin_write(self, volume: int, start: int, end: int, *, fua: bool = False, zeros: bool = False,
                    discard: bool = False) -> Write:
        """A write was submitted; its ``value`` is the serial to stamp the data with."""
        self.serial += 1
        value = ANYTHING if discard else ZEROS if zeros else self.serial
        write = Write(volume, start, end, value, self._tick(), fua=fua)
        for sector in range(start, end):
            self._writes(volume, sector).append(write)
            self.ever[volume, sector].add(value)
        for read in self.reads:
            if read.volume == volume:
                for sector in range(max(start, read.start), min(end, read.end)):
                    read.allowed[sector - read.start].add(value)
        return write

    def end_write(self, write: Write, *, error: int = 0) -> None:
        """A write was answered."""
        write.ended = self._tick()
        if error or write.value == ANYTHING:
            return
        write.acked = True
        self.undurable.append(write)
        if write.fua:
            self._make_durable([write])

    def begin_flush(self, volume: int) -> _Flush:
        """A flush, or the PREFLUSH of a write, was submitted."""
        return _Flush(volume, self._tick())

    def end_flush(self, flush: _Flush, *, error: int = 0) -> None:
        """It was answered."""
        self._tick()
        if not error:
            self._make_durable([write for write in self.undurable if write.volume == flush.volume
                                and write.ended is not None and write.ended < flush.began])

    def _make_durable(self, writes: list[Write]) -> None:
        for write in writes:
            write.durable = True
            for sector in range(write.start, write.end):
                held = self.held[write.volume, sector]
                if len(held) > 1:
                    held[:] = [other for other in held if not _follows(write, other)]
        self.undurable = [write for write in self.undurable if not write.durable]

    # -- reads

    def live_values(self, volume: int, sector: int) -> set[int]:
        """What a read that begins now may return."""
        held = self._writes(volume, sector)
        if len(held) == 1:
            return {held[0].value}
        acked = [write for write in held if write.acked]
        return {write.value for write in held if not any(_follows(later, write) for later in acked)}

    def begin_read(self, volume: int, start: int, end: int) -> _Read:
        """A read was submitted."""
        self._tick()
        read = _Read(volume, start, end, [self.live_values(volume, sector) for sector in range(start, end)])
        self.reads.append(read)
        return read

    def end_read(self, read: _Read, data: bytes | bytearray | memoryview, *, error: int = 0) -> None:
        """A read was answered; raises `OracleError` for a value that is not allowed."""
        self._tick()
        self.reads.remove(read)
        if error:
            return
        for index, allowed in enumerate(read.allowed):
            sector = read.start + index
            value = unstamp(data[index * SECTOR:(index + 1) * SECTOR], read.volume, sector)
            if not self._is_allowed(read.volume, sector, value, allowed):
                raise OracleError(f"volume {read.volume} sector {sector} reads {_name(value)}, "
                                  f"allowed: {_names(allowed)}, ever: {_names(self.ever[read.volume, sector])}")
            if self.settles[read.volume]:
                self._settle(read.volume, sector, value)

    def _settle(self, volume: int, sector: int, value: int | str) -> None:
        # Of the values that the last crash left open the one that was read stays.
        held = self.held[volume, sector]
        open_values = [write for write in held if write.ended == 0]
        if len(open_values) > 1 and any(write.value == value for write in open_values):
            held[:] = [write for write in held if write.ended != 0 or write.value in (value, ANYTHING)]

    def _is_allowed(self, volume: int, sector: int, value: int | str, allowed: set[int]) -> bool:
        if value in allowed:
            return True
        return ANYTHING in allowed and (value == ZEROS or value in self.ever[volume, sector])

    # -- power

    def crash_values(self, volume: int, sector: int) -> set[int]:
        """What the sector may hold if power fails now."""
        return {write.value for write in self._writes(volume, sector)}

    def check_image(self, volume: int, start: int, data: bytes | memoryview, what: str) -> None:
        """Raise unless every sector of ``data``, found at ``start`` on the volume after a crash, is allowed."""
        for index in range(len(data) // SECTOR):
            sector = start + index
            value = unstamp(data[index * SECTOR:(index + 1) * SECTOR], volume, sector)
            allowed = self.crash_values(volume, sector)
            if not self._is_allowed(volume, sector, value, allowed):
                raise OracleError(f"{what}: volume {volume} sector {sector} holds {_name(value)}, "
                                  f"allowed: {_names(allowed)}")

    def after_crash(self) -> Oracle:
        """An oracle for the world that comes up after power failed now."""
        after = Oracle()
        after.serial = self.serial
        after.sizes, after.initial, after.settles = dict(self.sizes), dict(self.initial), dict(self.settles)
        for (volume, sector), held in self.held.items():
            bases = []
            for value in sorted({write.value for write in held}):
                base = Write(volume, sector, sector + 1, value, 0)
                base.ended, base.acked, base.durable = 0, True, True
                bases.append(base)
            after.held[volume, sector] = bases
            after.ever[volume, sector] = set(self.ever[volume, sector])
        return after

    def after_kill(self) -> Oracle:
        """An oracle for the world that comes up after the engine was killed now: to clients it was a pause, but for
        what was not answered.
        """
        after = Oracle()
        after.clock, after.serial = self.clock + 1, self.serial
        after.sizes, after.initial, after.settles = dict(self.sizes), dict(self.initial), dict(self.settles)
        copies: dict[int, Write] = {}

        def copy(write: Write) -> Write:
            if id(write) not in copies:
                made = copies[id(write)] = Write(write.volume, write.start, write.end, write.value, write.began,
                                                 fua=write.fua)
                made.ended = after.clock if write.ended is None else write.ended
                made.acked, made.durable = write.acked, write.durable
            return copies[id(write)]

        after.held = {key: [copy(write) for write in held] for key, held in self.held.items()}
        after.ever = {key: set(values) for key, values in self.ever.items()}
        after.undurable = [copy(write) for write in self.undurable]
        return after

    def is_settled(self) -> bool:
        """No read is in flight."""
        return not self.reads


def _name(value: int | str) -> str:
    if isinstance(value, str):
        return value
    return {ZEROS: "zeros", ANYTHING: "anything", BASE: "the initial data"}.get(value, f"write {value}")


def _names(values: set[int]) -> str:
    return ", ".join(_name(value) for value in sorted(values)) or "nothing"
