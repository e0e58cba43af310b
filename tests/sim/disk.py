# SPDX-License-Identifier: GPL-2.0-only
"""`SimDisk`: a disk with a volatile cache, faults on demand and power that fails.

What can go wrong, in prose, before any code.  The atomic unit is the logical block (512 bytes or more): the largest
aligned piece that power loss never tears.

Completion
    Ios are answered in any order: each gets a latency of its own from the seed, now and then a very long one.  A write
    takes its bytes when it is submitted, and its buffer must still hold them when it is answered; a change in between
    is a bug of the engine and fails the run.  A read sees what was answered before it is answered itself.

The volatile cache
    A write that was answered is *pending*: it can be read back, and it is not durable.  What makes it durable is

    * a FLUSH, or a write with PREFLUSH, that is submitted after the write was answered, when *that* is answered;
    * FUA on the write itself, which is then durable when it is answered.  It says nothing about earlier writes.

Power loss (`SimDisk.survive`)
    Durable bytes stay.  Every pending write is kept, dropped, or torn: each atomic unit of it individually old or
    new.  A pending unit that was overwritten by another pending write may come back as either or as what was
    durable before.  A write that was submitted and not answered may also be there wholly, partly or not at all, in any
    order with the others; if any unit of one with PREFLUSH is there, then everything it had to flush is there too.
    A FLUSH that was not answered did nothing or everything.  Each disk draws for itself, independent of the others.

A killed engine (`SimDisk.outlive`)
    What was answered stays as it is, the volatile cache too.  What was submitted and not answered happens wholly,
    partly or not at all, before the next engine begins.

Discard
    A discarded range reads as zeros or as before, by chance and by unit, and is like a pending write of that until
    it is flushed.  WRITE_ZEROES is a write of zeros.

Errors
    An Io can be told to fail with an errno (EIO unless said otherwise): the n-th Io of the disk, every Io that touches
    a bad sector, or all of them from the n-th on (the disk is gone).  A failed read leaves its buffer scrambled.  A
    failed write may have written any units of itself, and counts as pending.  A failed flush flushed nothing; a write
    with PREFLUSH fails in its flush, and then nothing of it is written, or after it.
"""

from __future__ import annotations

import random
from errno import EIO

from bcachectl.engine.sched import DISCARD, FLUSH, FUA, PREFLUSH, READ, WRITE, WRITE_ZEROES, Io

SECTOR = 512

STYLES = ("drop", "keep", "lose_one", "keep_one", "whole", "torn")
"""How a power loss treats what was not flushed: all lost, all kept, all but one, only one, by write, by unit."""


class SimError(AssertionError):
    """The engine misused a disk."""


class _Held:
    # One Io that was begun: what it writes, and which answered writes it makes durable (None: it flushes nothing).
    __slots__ = ("io", "sector", "data", "serial", "flushes")

    def __init__(self, io: Io, data: bytes, serial: int, flushes: list[_Held] | None) -> None:
        self.io = io
        self.sector = io.sector
        self.data = data
        self.serial = serial
        self.flushes = flushes


class SimDisk:
    """One disk: `begin` when the engine submits an Io, `finish` when it is to be answered, `survive` at power loss."""

    def __init__(self, name: str, size_sectors: int, *, seed: str, image: bytearray | None = None,
                 atomic_sectors: int = 1) -> None:
        self.name = name
        self.size_sectors = size_sectors
        self.atomic_sectors = atomic_sectors
        self.random = random.Random(f"disk/{name}/{seed}")
        self.durable = bytearray(size_sectors * SECTOR) if image is None else image
        assert len(self.durable) == size_sectors * SECTOR
        self.now = bytearray(self.durable)
        self.pending: list[_Held] = []
        self.flying: dict[int, _Held] = {}
        self.serial = 0
        self.fail_ios: dict[int, int] = {}
        self.bad_sectors: set[int] = set()
        self.gone_from: int | None = None
        self.failed: list[Io] = []
        self.is_sluggish = False

    # -- life of an Io

    def begin(self, io: Io) -> int:
        """Take an Io; the number of it on this disk, counted from 1."""
        self.serial += 1
        data = b""
        if io.op == WRITE:
            data = bytes(io.joined())
        elif io.op == WRITE_ZEROES:
            data = bytes(io.nsectors * SECTOR)
        elif io.op == DISCARD:
            data = self._discarded(io)
        flushes = list(self.pending) if io.op == FLUSH or io.flags & PREFLUSH else None
        if io.sector + io.nsectors > self.size_sectors:
            raise SimError(f"{io} beyond the end of {self.name}")
        if io.op != FLUSH and (io.sector % self.atomic_sectors or io.nsectors % self.atomic_sectors):
            raise SimError(f"{io} is not aligned to the logical block of {self.name}")
        self.flying[id(io)] = _Held(io, data, self.serial, flushes)
        return self.serial

    def latency_ns(self) -> int:
        """How long the Io just begun will take; too short for congestion (2 ms), unless sluggish."""
        chance = self.random.random()
        if self.is_sluggish and chance < 0.06:
            return self.random.randrange(5_000_000, 600_000_000)
        if chance < 0.03:
            return self.random.randrange(400_000, 1_900_000)
        return self.random.randrange(20_000, 60_000 if chance < 0.7 else 400_000)

    def finish(self, io: Io) -> None:
        """Answer an Io: sets its ``error``, fills the buffer of a read."""
        held = self.flying.pop(id(io))
        io.error = self._fault(held)
        if io.error:
            self.failed.append(io)
            self._finish_failed(held)
            return
        if held.flushes is not None:
            self._make_durable(held.flushes)
        if io.op == READ:
            io.buf[:] = self.now[io.sector * SECTOR:(io.sector + io.nsectors) * SECTOR]
        elif io.op != FLUSH:
            if io.op == WRITE and bytes(io.joined()) != held.data:
                raise SimError(f"the buffer of {io} changed while it was written")
            start = io.sector * SECTOR
            self.now[start:start + len(held.data)] = held.data
            if io.flags & FUA:
                self.durable[start:start + len(held.data)] = held.data
                self._forget_below(held)
            else:
                self.pending.append(held)

    def _finish_failed(self, held: _Held) -> None:
        io = held.io
        if io.op == READ:
            io.buf[:] = b"\xde\xad" * (len(io.buf) // 2)
        elif io.op != FLUSH:
            if held.flushes is not None:
                if self.random.random() < 0.5:
                    return
                self._make_durable(held.flushes)
            image = memoryview(self.now)
            data = bytearray(image[io.sector * SECTOR:(io.sector + io.nsectors) * SECTOR])
            self._tear(data, held.data)
            image[io.sector * SECTOR:(io.sector + io.nsectors) * SECTOR] = data
            held.data = bytes(data)
            self.pending.append(held)

    def _fault(self, held: _Held) -> int:
        if self.gone_from is not None and held.serial >= self.gone_from:
            return EIO
        if held.serial in self.fail_ios:
            return self.fail_ios[held.serial]
        io = held.io
        if self.bad_sectors and io.op in (READ, WRITE, WRITE_ZEROES):
            if any(sector in self.bad_sectors for sector in range(io.sector, io.sector + io.nsectors)):
                return EIO
        return 0

    def _discarded(self, io: Io) -> bytes:
        data = bytearray(self.now[io.sector * SECTOR:(io.sector + io.nsectors) * SECTOR])
        choice = self.random.randrange(3)
        if choice == 0:
            return bytes(len(data))
        if choice == 1:
            self._tear(data, bytes(len(data)))
        return bytes(data)

    def _tear(self, old: bytearray, new: bytes) -> None:
        unit = self.atomic_sectors * SECTOR
        for start in range(0, len(new), unit):
            if self.random.random() < 0.5:
                old[start:start + unit] = new[start:start + unit]

    def _make_durable(self, flushed: list[_Held]) -> None:
        gone = {id(held) for held in flushed}
        for held in self.pending:
            if id(held) in gone:
                self.durable[held.sector * SECTOR:held.sector * SECTOR + len(held.data)] = held.data
        self.pending = [held for held in self.pending if id(held) not in gone]

    def _forget_below(self, held: _Held) -> None:
        # What was answered before a FUA write of the same place began cannot come back over it.
        end = held.sector + len(held.data) // SECTOR
        for older in self.pending:
            older_end = older.sector + len(older.data) // SECTOR
            low, high = max(held.sector, older.sector), min(end, older_end)
            if low < high and older.serial < held.serial:
                data = bytearray(older.data)
                data[(low - older.sector) * SECTOR:(high - older.sector) * SECTOR] = \
                    held.data[(low - held.sector) * SECTOR:(high - held.sector) * SECTOR]
                older.data = bytes(data)

    # -- power

    def survive(self, chooser: random.Random, style: str | None = None) -> bytearray:
        """What is on the platters after power failed now; drawn with ``chooser``, in one of `STYLES`."""
        style = style or chooser.choice(STYLES)
        image = bytearray(self.durable)
        pending = list(self.pending)
        flying = [held for held in self.flying.values() if held.io.op != READ]
        chooser.shuffle(flying)
        begun: list[_Held] = []
        for held in flying:
            happens = style == "keep" or (style != "drop" and chooser.random() < 0.5)
            if held.flushes is not None and happens:
                done = {id(flushed) for flushed in held.flushes}
                for flushed in pending:
                    if id(flushed) in done:
                        image[flushed.sector * SECTOR:flushed.sector * SECTOR + len(flushed.data)] = flushed.data
                pending = [other for other in pending if id(other) not in done]
            if held.data and happens:
                begun.append(held)
        candidates = pending + begun
        special = chooser.randrange(len(candidates)) if candidates else -1
        unit = self.atomic_sectors * SECTOR
        for index, held in enumerate(candidates):
            start = held.sector * SECTOR
            if style == "lose_one" and index == special:
                mode = chooser.choice(("drop", "torn", "prefix", "suffix"))
            elif style == "lose_one" or (style == "keep_one" and index == special):
                mode = "keep"
            elif style == "keep_one":
                mode = "drop"
            elif style == "whole":
                mode = chooser.choice(("keep", "drop"))
            elif style == "torn":
                mode = chooser.choice(("torn", "torn", "prefix", "suffix", "keep", "drop"))
            else:
                mode = style
            if mode == "drop":
                continue
            cut = chooser.randrange(0, len(held.data) + unit, unit)
            for at in range(0, len(held.data), unit):
                if mode == "keep" or (mode == "torn" and chooser.random() < 0.5) or (mode == "prefix" and at < cut) or \
                        (mode == "suffix" and at >= cut):
                    image[start + at:start + at + unit] = held.data[at:at + unit]
        return image

    # -- a killed engine

    def outlive(self, chooser: random.Random, seed: str) -> SimDisk:
        """This disk for the engine that comes after one that is killed now."""
        after = SimDisk(self.name, self.size_sectors, seed=seed, image=bytearray(self.durable),
                        atomic_sectors=self.atomic_sectors)
        after.now, after.serial, after.is_sluggish = bytearray(self.now), self.serial, self.is_sluggish
        copies = {id(held): _Held(held.io, held.data, held.serial, None) for held in self.pending}
        after.pending = list(copies.values())
        flying = [held for held in self.flying.values() if held.io.op != READ]
        chooser.shuffle(flying)
        for held in flying:
            fate = chooser.random()
            if fate < 0.4:
                continue
            if held.flushes is not None:
                after._make_durable([copies[id(flushed)] for flushed in held.flushes if id(flushed) in copies])
            if not held.data:
                continue
            start = held.sector * SECTOR
            data = bytearray(self.now[start:start + len(held.data)])
            is_whole = fate < 0.8
            if is_whole:
                data[:] = held.data
            else:
                after._tear(data, held.data)
            after.now[start:start + len(data)] = data
            landed = _Held(held.io, bytes(data), held.serial, None)
            if is_whole and held.io.flags & FUA:
                after.durable[start:start + len(data)] = data
                after._forget_below(landed)
            else:
                after.pending.append(landed)
        return after

    @property
    def quiet(self) -> bool:
        """Nothing is in flight."""
        return not self.flying
