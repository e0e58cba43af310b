# SPDX-License-Identifier: GPL-2.0-only
"""The request path: what happens to a read, a write, a flush and a discard of a cached device.

Which way a request goes is decided in one place, `mode_for`, by the table `MODES`, the bypass rules and the writeback
rules.

=============  ====================================================================================================
read           hits from the cache, gaps from the backing device; one gap is kept for the cache unless the read bypasses
bypass write   to the backing device; the range is invalidated in the cache (a journaled hole)
through write  to the backing device and to the cache, side by side; the key is clean
back write     to the cache only; the key is dirty, and the backing superblock says so before it is answered
=============  ====================================================================================================

Orders that matter:

* Data is written before its key is journaled, and the key is journaled before it is inserted.
* A hit's gen is looked at again after the data was read: if its bucket was reused meanwhile the lookup is repeated.
* Writes of one device that overlap take turns, and a write cancels every fill under way that it overlaps; a fill does
  not begin while a write to its range is in flight.  So data older than the last write never gets into the cache.
  (The kernel uses check keys for this, which do not see a bypassed write that is in flight: a stale fill can survive
  there.)
* A write over a key that is being written back goes to the cache as dirty data, so that the older data cannot
  overtake it; one that is too large for that (`has_share`) waits until the older data has arrived.

Kernel: request.c, cached_dev_submit_bio and bch_data_insert; writeback.h, should_writeback.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from bcachectl.engine.buckets import INITIAL_PRIO, PTR_SECTOR_MASK
from bcachectl.engine.front import (
    EXTENT_CLEAN,
    EXTENT_DIRTY,
    EXTENT_HOLE,
    REQ_DISCARD,
    REQ_FUA,
    REQ_META,
    REQ_PREFLUSH,
    REQ_RAHEAD,
    REQ_READ,
    REQ_SYNC,
    REQ_WRITE_ZEROES,
    Request,
)
from bcachectl.engine.node import DIRTY, FLAGS, HAS_PTR, Extent
from bcachectl.engine.sched import FUA, PREFLUSH, Io, WaitQueue
from bcachectl.errors import Corrupt
from bcachectl.ondisk.bkey import pack_dirty_keys, pack_key
from bcachectl.ondisk.superblock import CacheMode

if TYPE_CHECKING:
    from bcachectl.engine.cache_set import CacheSet
    from bcachectl.engine.cached_dev import CachedDev
    from bcachectl.engine.write_batch import Placed

CUTOFF_CACHE_ADD = 95
"""With more of the cache in use than this percentage nothing is added (request.c)."""
HOLE_SECTORS_MAX = 1 << 15
WRITEBACK_SHARE_SHIFT = 3
"""No more than 1/8 of the cache is kept back by requests that are under way at one time."""
FILL_SECTORS_MAX = 2048
"""The largest part of a read miss that is kept for the cache (request.c, cached_dev_cache_miss)."""

EIO = 5
EOPNOTSUPP = 95

BYPASS, THROUGH, BACK = range(3)
"""Ways of a write; a read knows BYPASS (no fill) and THROUGH (fill)."""

MODES: dict[CacheMode, tuple[int, int]] = {
    CacheMode.WRITETHROUGH: (THROUGH, THROUGH),
    CacheMode.WRITEBACK: (THROUGH, BACK),
    CacheMode.WRITEAROUND: (THROUGH, BYPASS),
    CacheMode.NONE: (BYPASS, BYPASS),
}
"""Cache mode -> (way of reads, way of writes), before the bypass rules."""


class Fill:
    """A read miss on its way into the cache; a write that overlaps it cancels it."""

    __slots__ = ("start", "end", "cancelled")

    def __init__(self, start: int, end: int) -> None:
        self.start = start
        self.end = end
        self.cancelled = False


class Ranges:
    """What is in flight on one device: writes, which exclude each other where they overlap, and fills.

    Ranges are sectors of the backing device, so they hold across an attach and a detach.  ``groups`` are writes that
    began together (`bcachectl.engine.write_group`).
    """

    __slots__ = ("writes", "groups", "fills", "queue")

    def __init__(self, queue: WaitQueue) -> None:
        self.writes: list[tuple[int, int]] = []
        self.groups: list[Placed] = []
        self.fills: list[Fill] = []
        self.queue = queue

    async def enter(self, start: int, end: int) -> tuple[int, int]:
        """Begin a write: wait for overlapping ones, cancel overlapping fills."""
        while self.writing(start, end):
            await self.queue.wait()
        self.cancel_fills(start, end)
        claim = (start, end)
        self.writes.append(claim)
        return claim

    def writing(self, start: int, end: int) -> bool:
        """Whether a write to any of [start, end) is in flight."""
        for low, high in self.writes:
            if low < end and start < high:
                return True
        for group in self.groups:
            if group.overlaps(start, end):
                return True
        return False

    def cancel_fills(self, start: int, end: int) -> None:
        """A write of [start, end) begins: older data of it must not get into the cache any more."""
        for fill in self.fills:
            if fill.start < end and start < fill.end:
                fill.cancelled = True

    def leave(self, claim: tuple[int, int]) -> None:
        """End a write."""
        self.writes.remove(claim)
        self.queue.wake_all()

    def begin_fill(self, start: int, end: int) -> Fill | None:
        """Begin a fill, unless something in flight overlaps it."""
        if self.writing(start, end):
            return None
        if any(fill.start < end and start < fill.end for fill in self.fills):
            return None
        fill = Fill(start, end)
        self.fills.append(fill)
        return fill

    def end_fill(self, fill: Fill | None) -> None:
        """End a fill, if it is one."""
        if fill is not None:
            self.fills.remove(fill)


class NewData(NamedTuple):
    """What `insert_data` needs to know besides the data."""

    dirty: bool
    stream: int
    flash: bool
    durable: bool


# Deciding.


def should_bypass(dev: CachedDev, request: Request, sector: int) -> bool:
    """Whether a request leaves the cache alone (request.c, check_should_bypass); ``sector`` is the backing device's."""
    cset = dev.cset
    way = MODES[dev.cache_mode][request.op != REQ_READ]
    mask = dev.block_mask
    if (
        dev.detaching
        or request.op in (REQ_DISCARD, REQ_WRITE_ZEROES)
        or cset.buckets.in_use_percent > CUTOFF_CACHE_ADD
        or way == BYPASS
        or (request.flags & (REQ_RAHEAD | REQ_META) == REQ_RAHEAD and dev.readahead_cache_policy != "all")
        or (sector | request.nsectors) & mask
    ):
        dev.stats.bypassed_sectors += request.nsectors
        if cset.buckets.in_use_percent > CUTOFF_CACHE_ADD and not dev.has_dirty:
            # Clean and yet full: what is in use may just not have been looked at for long.
            cset.gc.force()
        return True
    congested = cset.congestion.limit_sectors()
    if not congested and not dev.sequential_cutoff:
        cset.alloc.rescale(request.nsectors)
        return False
    run = dev.streams.note(sector, request.nsectors, stream=request.stream, now_ns=cset.sched.now_ns)
    if (dev.sequential_cutoff and run >= dev.sequential_cutoff >> 9) or (congested and run >= congested):
        dev.stats.bypassed_sectors += request.nsectors
        return True
    cset.alloc.rescale(request.nsectors)
    return False


def should_writeback(dev: CachedDev, request: Request, sector: int, *, bypass: bool) -> bool:
    """Whether a write stays in the cache as dirty data (writeback.h, should_writeback); ``sector`` is the backing
    device's.
    """
    in_use = dev.cset.buckets.in_use_percent
    if dev.cache_mode != CacheMode.WRITEBACK or dev.detaching or in_use > dev.cset.cutoff_writeback_sync:
        return False
    if request.op in (REQ_DISCARD, REQ_WRITE_ZEROES) or not has_share(dev.cset, request.nsectors):
        return False
    if dev.stripes is not None and dev.stripes.is_dirty(dev.base + sector, dev.base + sector + request.nsectors):
        return True
    if bypass:
        return False
    # Who sets FUA or flushes waits for the write, as REQ_SYNC says it.
    return bool(request.flags & (REQ_SYNC | REQ_META | REQ_FUA | REQ_PREFLUSH)) or in_use <= dev.cset.cutoff_writeback


def has_share(cset: CacheSet, nsectors: int) -> bool:
    """Whether ``nsectors`` more can be kept back.

    Nothing of a write is written back before all of it has room.  So what is under way together must find room in what
    is free, without anything being written back: else all of it might wait for ever.
    """
    buckets = cset.buckets
    return cset.back_sectors + nsectors <= buckets.nbuckets << buckets.bucket_shift >> WRITEBACK_SHARE_SHIFT


def mode_for(dev: CachedDev, request: Request, sector: int, *, overlaps_writeback: bool = False) -> int:
    """The way of a request: the only place that decides."""
    bypass = should_bypass(dev, request, sector)
    if request.op == REQ_READ:
        return BYPASS if bypass else THROUGH
    if overlaps_writeback or should_writeback(dev, request, sector, bypass=bypass):
        return BACK
    return BYPASS if bypass else THROUGH


# Inserting.


async def insert_keys(cset: CacheSet, extents: list[Extent], *, durable: bool) -> bool:
    """Journal the extents and put them in the btree; False if the set failed (request.c, bch_data_insert_keys).

    Drops the pins that the sector allocator put on their buckets.  With ``durable`` the journal entry is awaited.
    """
    per_entry = max(1, cset.journal.request_max_bytes // 24)
    ok = True
    last_seq = 0
    for first in range(0, len(extents), per_entry):
        part = extents[first : first + per_entry]
        raw = _keys_of(part)
        pin = cset.journal.add_nowait(raw) if cset.sync else None
        if pin is None:
            pin = await cset.journal.add(raw)
        if pin is None:
            ok = False
        for new in part:
            if ok and not cset.btree.insert_nowait(new, pin):
                ok = await cset.btree.insert(new, pin)
            if new.flags & HAS_PTR:
                cset.buckets.unpin(cset.buckets.bucket_of(new.ptr))
        if pin is not None:
            last_seq = pin.seq
            cset.journal.unpin(pin)
    if ok and durable and last_seq:
        ok = await cset.journal.wait_durable(last_seq)
    return ok


def _keys_of(extents: list[Extent]) -> bytes:
    if all(new.flags == FLAGS for new in extents):
        return pack_dirty_keys([(new.start, new.end, new.ptr) for new in extents])
    return b"".join(
        [
            pack_key(new.end, new.end - new.start, bool(new.flags & DIRTY), new.ptr if new.flags & HAS_PTR else None)
            for new in extents
        ]
    )


async def invalidate(cset: CacheSet, start: int, end: int, *, durable: bool) -> bool:
    """Drop the cached data of [start, end), dirty or not; the caller puts newer data on the backing device."""
    holes = [
        Extent(position, min(position + HOLE_SECTORS_MAX, end), 0, 0)
        for position in range(start, end, HOLE_SECTORS_MAX)
    ]
    cset.gc.note_sectors(end - start)
    return await insert_keys(cset, holes, durable=durable)


async def insert_data(cset: CacheSet, start: int, buf: Any, how: NewData) -> int:
    """Write data to the cache and its keys to journal and btree; returns 0 or an errno (request.c, bch_data_insert).

    Clean data needs no room: what finds none, or meets an error, is invalidated instead.  Dirty data waits for room,
    and an error is the caller's: then no key is inserted for what was written since the last wait."""
    view = memoryview(buf)
    end = start + (len(view) >> 9)
    cset.gc.note_sectors(end - start)
    buckets = cset.buckets
    extents: list[Extent] = []
    ios: list[Io] = []
    position = start
    while position < end:
        piece = cset.sectors.alloc_nowait(position, end - position, write_point=how.stream, flash=how.flash)
        if piece is None and how.dirty:
            # What there is goes into the map first: the data that it replaces may be all there is to make room.
            error = await _insert_written(cset, extents, ios, how)
            if error:
                return error
            extents, ios = [], []
            piece = await cset.sectors.alloc(position, end - position, write_point=how.stream, flash=how.flash)
            if piece is None:
                return EIO
        if piece is None:
            break
        stop = position + piece.nsectors
        if how.dirty:
            # Before the key is in the map: a gc that runs now must not take the bucket for clean.
            buckets.mark_dirty(buckets.bucket_of(piece.ptr))
        extents.append(Extent(position, stop, HAS_PTR | DIRTY if how.dirty else HAS_PTR, piece.ptr))
        ios.append(
            cset.cache.write((piece.ptr >> 8) & PTR_SECTOR_MASK, view[(position - start) << 9 : (stop - start) << 9])
        )
        position = stop
    error = await _insert_written(cset, extents, ios, how)
    if not error and position < end:
        error = 0 if await invalidate(cset, position, end, durable=how.durable) else EIO
    return error


async def _insert_written(cset: CacheSet, extents: list[Extent], ios: list[Io], how: NewData) -> int:
    # Awaits the data of some extents and inserts their keys.
    buckets = cset.buckets
    for index, io in enumerate(ios):
        error = await io
        cset.congestion.account(cset.sched.now_ns - io.start_ns, is_write=True)
        if error:
            cset.count_io_error(error, "writing data to the cache")
            failed = extents[index]
            buckets.unpin(buckets.bucket_of(failed.ptr))
            extents[index] = Extent(failed.start, failed.end, 0, 0)
    if how.dirty and not all(extent.flags for extent in extents):
        for extent in extents:
            if extent.flags:
                buckets.unpin(buckets.bucket_of(extent.ptr))
        return EIO
    return 0 if await insert_keys(cset, extents, durable=how.durable) else EIO


# Reading.


class _Read:
    # One pass over the extents of a read: the Ios under way and what they mean.
    __slots__ = ("base", "hits", "gaps")

    def __init__(self, base: int) -> None:
        # Of the slot that the device had when the read came; it may be detached, and attached again, before it ends.
        self.base = base
        self.hits: list[tuple[Extent, Io, memoryview]] = []
        self.gaps: list[tuple[int, int, Io]] = []


async def read(dev: CachedDev, request: Request) -> None:
    """Serve a read of a cached device (request.c, cached_dev_read, cache_lookup_fn, cached_dev_cache_miss)."""
    cset = dev.cset
    sector = request.sector + dev.data_offset
    start = dev.base + sector
    end = start + request.nsectors
    way = mode_for(dev, request, sector)
    view = memoryview(request.buf)
    # The fill begins before the lookup, which may have to wait for a leaf: a write that comes and goes meanwhile
    # cancels it.
    fill = None
    if way == THROUGH and not cset.stopping and not cset.read_only:
        fill = dev.ranges.begin_fill(sector, sector + request.nsectors)
    try:
        pass_, error = await _read_all(dev, fill, start, end, view)
    except Corrupt:
        dev.ranges.end_fill(fill)
        raise
    if fill is not None and not pass_.gaps:
        dev.ranges.end_fill(fill)
        fill = None
    dev.stats.count_read(hit=not pass_.gaps, bypass=way == BYPASS)
    copy = b""
    if fill is not None and not error and not fill.cancelled:
        # The client gets its buffer back before the cache is written.
        copy = bytes(view[(fill.start - sector) << 9 : (fill.end - sector) << 9])
    dev.finish(request, error)
    if fill is not None and copy:
        try:
            await _fill(dev, fill, start - sector, copy, request.stream)
        except Corrupt as bad:
            # The client has its answer already.
            cset.fail(str(bad))
    dev.ranges.end_fill(fill)


async def _read_all(dev: CachedDev, fill: Fill | None, start: int, end: int, view: memoryview) -> tuple[_Read, int]:
    # Reads every part from where it is, again if a bucket was reused meanwhile; narrows the fill to the first gap.
    base = dev.base
    while True:
        pass_ = _Read(base)
        _start_reads(dev, pass_, start, end, await dev.cset.btree.lookup(start, end), view)
        if fill is not None and pass_.gaps:
            low, high, _io = pass_.gaps[0]
            fill.start, fill.end = low - base, min(high, low + FILL_SECTORS_MAX) - base
        error, raced = await _finish_reads(dev, pass_)
        if error or not raced:
            return pass_, error
        if fill is not None:
            # What the next lookup finds may lie outside of what the fill watched.
            fill.cancelled = True


def _start_reads(
    dev: CachedDev, pass_: _Read, start: int, end: int, extents: list[Extent], view: memoryview
) -> None:
    cset = dev.cset
    position = start
    for extent in extents:
        if extent.start > position:
            _start_gap(dev, pass_, position, extent.start, start, view)
        data = view[(extent.start - start) << 9 : (extent.end - start) << 9]
        cset.buckets.prio_at[cset.buckets.bucket_of(extent.ptr)] = INITIAL_PRIO
        pass_.hits.append((extent, cset.cache.read((extent.ptr >> 8) & PTR_SECTOR_MASK, data), data))
        position = extent.end
    if position < end:
        _start_gap(dev, pass_, position, end, start, view)


def _start_gap(dev: CachedDev, pass_: _Read, low: int, high: int, start: int, view: memoryview) -> None:
    data = view[(low - start) << 9 : (high - start) << 9]
    pass_.gaps.append((low, high, dev.backing.read(low - pass_.base, data)))


async def _finish_reads(dev: CachedDev, pass_: _Read) -> tuple[int, bool]:
    # Waits for all; a clean part that the cache cannot read comes from the backing device.  Returns (errno, raced
    # with a reuse).
    cset = dev.cset
    raced = False
    worst = 0
    for extent, io, data in pass_.hits:
        error = await io
        cset.congestion.account(cset.sched.now_ns - io.start_ns, is_write=False)
        if error:
            cset.count_io_error(error, "reading data from the cache")
            if extent.flags & DIRTY:
                worst = error
            else:
                error = await dev.backing.read(extent.start - pass_.base, data)
                worst = dev.count_backing_error(error) or worst
        elif cset.buckets.is_stale(extent.ptr):
            cset.cache_read_races += 1
            raced = True
    for _low, _high, gap in pass_.gaps:
        worst = dev.count_backing_error(await gap) or worst
    return worst, raced


async def _fill(dev: CachedDev, fill: Fill, base: int, data: bytes, stream: int) -> None:
    # Puts a read miss into the cache; never waits for room.  Not journaled: if it is lost, the next read is a miss
    # again.
    cset = dev.cset
    view = memoryview(data)
    first, end = fill.start + base, fill.end + base
    position = first
    while position < end and not cset.io_disabled:
        piece = cset.sectors.alloc_nowait(position, end - position, write_point=stream, flash=False)
        if piece is None:
            return
        stop = position + piece.nsectors
        part = view[(position - first) << 9 : (stop - first) << 9]
        error = await cset.cache.write((piece.ptr >> 8) & PTR_SECTOR_MASK, part)
        if error:
            cset.count_io_error(error, "filling the cache")
        elif fill.cancelled:
            dev.stats.cache_miss_collisions += 1
        else:
            cset.gc.note_sectors(piece.nsectors)
            new = Extent(position, stop, HAS_PTR, piece.ptr)
            leaf = await cset.btree.leaf_with_room(position)
            while leaf is not None and position < stop and not fill.cancelled:
                # The last look at ``cancelled`` and the insert are one step.
                here = new.cut(position, min(stop, leaf.end))
                cset.btree.insert_into(leaf, here, None)
                position = here.end
                if position < stop:
                    leaf = await cset.btree.leaf_with_room(position)
        cset.buckets.unpin(cset.buckets.bucket_of(piece.ptr))
        if error or fill.cancelled:
            return
        position = stop


# Writing.


async def write(dev: CachedDev, request: Request) -> None:
    """Serve a write, discard or write-zeroes of a cached device (request.c, cached_dev_write)."""
    sector = request.sector + dev.data_offset
    claim = await dev.ranges.enter(sector, sector + request.nsectors)
    try:
        if request.op in (REQ_DISCARD, REQ_WRITE_ZEROES) or not has_share(dev.cset, request.nsectors):
            # It cannot be kept back, so it must not be overtaken by older data on its way to the backing device.
            await dev.writeback.settle(dev.base + sector, dev.base + sector + request.nsectors)
        # Only now: the device may have been detached, or its set have failed, while this request waited its turn.
        cached = dev.attached and not dev.cset.io_disabled
        if cached:
            error = await _write_cached(dev, request, sector)
    finally:
        dev.ranges.leave(claim)
    if cached:
        dev.finish(request, error)
    else:
        await dev.serve_uncached(request)


async def _write_cached(dev: CachedDev, request: Request, sector: int) -> int:
    start = dev.base + sector
    end = start + request.nsectors
    way = mode_for(dev, request, sector, overlaps_writeback=dev.writeback.overlaps(start, end))
    if way == BACK and request.op not in (REQ_DISCARD, REQ_WRITE_ZEROES):
        return await _write_back(dev, request, start)
    if way == THROUGH:
        return await _write_through(dev, request, start)
    return await _write_bypass(dev, request, start, end)


async def _write_back(dev: CachedDev, request: Request, start: int) -> int:
    durable = is_durable(request)
    dev.dirty_writers += 1
    dev.cset.back_sectors += request.nsectors
    try:
        error = await dev.become_dirty()
        if error:
            return error
        flush = dev.backing.flush() if request.flags & REQ_PREFLUSH else None
        error = await insert_data(dev.cset, start, request.buf, NewData(True, request.stream, False, durable))
        if flush is not None:
            error = dev.count_backing_error(await flush) or error
        return error
    finally:
        dev.dirty_writers -= 1
        dev.cset.back_sectors -= request.nsectors
        if dev.detaching:
            dev.writeback.wake()


async def _write_through(dev: CachedDev, request: Request, start: int) -> int:
    new = NewData(False, request.stream, False, is_durable(request))
    there = dev.backing.write(start - dev.base, request.buf, io_flags(request))
    try:
        if await _covers_dirty(dev, start, start + request.nsectors):
            error = dev.count_backing_error(await there) or dev.count_backing_error(await dev.backing.flush())
            return error or await insert_data(dev.cset, start, request.buf, new)
        here = await insert_data(dev.cset, start, request.buf, new)
    except Corrupt:
        # The request will be served again, without the cache.  What is under way must not overtake a write that comes
        # after its answer.
        await there
        raise
    error = dev.count_backing_error(await there)
    if error:
        # The cache may hold what the backing device does not: take it out again.
        await invalidate(dev.cset, start, start + request.nsectors, durable=is_durable(request))
    return error or here


async def _write_bypass(dev: CachedDev, request: Request, start: int, end: int) -> int:
    flags = io_flags(request)
    sector = start - dev.base
    if request.op == REQ_DISCARD:
        there = dev.backing.discard(sector, request.nsectors) if dev.backing.can_discard else None
    elif request.op == REQ_WRITE_ZEROES:
        there = dev.backing.write_zeroes(sector, request.nsectors, flags)
    else:
        there = dev.backing.write(sector, request.buf, flags)
    error = 0
    if there is not None:
        error = await there
        if error == EOPNOTSUPP and request.op == REQ_DISCARD:
            error = 0
        error = dev.count_backing_error(error)
    if not error and request.op != REQ_DISCARD and await _covers_dirty(dev, start, end):
        error = dev.count_backing_error(await dev.backing.flush())
    if error and request.op != REQ_DISCARD:
        # What the cache holds is still the last good data.
        return error
    ok = await invalidate(dev.cset, start, end, durable=is_durable(request))
    return 0 if ok else EIO


async def _covers_dirty(dev: CachedDev, start: int, end: int) -> bool:
    # Whether the range holds dirty data.  Then newer data has to be durable on the backing device before the journal
    # says that the dirty data is obsolete; otherwise a power loss could leave neither, but what was on the backing
    # device before both.
    if not dev.dirty_sectors:
        return False
    return any(extent.flags & DIRTY for extent in await dev.cset.btree.lookup(start, end))


def io_flags(request: Request) -> int:
    return (FUA if request.flags & REQ_FUA else 0) | (PREFLUSH if request.flags & REQ_PREFLUSH else 0)


def is_durable(request: Request) -> bool:
    """Whether the request is answered only when its keys are in the journal on the device."""
    return bool(request.flags & (REQ_FUA | REQ_PREFLUSH))


# Flushing, and questions.


async def flush(dev: CachedDev, request: Request) -> None:
    """Make all that was acknowledged durable on both devices (request.c, cached_dev_nodata)."""
    there = dev.backing.flush()
    ok = await dev.cset.journal.write_meta()
    error = dev.count_backing_error(await there)
    dev.finish(request, error or (0 if ok else EIO))


async def status(cset: CacheSet, request: Request, start: int) -> None:
    """Fill in what the cache holds of a request's range."""
    position = start
    end = start + request.nsectors
    for extent in await cset.btree.lookup(start, end):
        if extent.start > position:
            request.extents.append((extent.start - position, EXTENT_HOLE))
        request.extents.append((extent.end - extent.start, EXTENT_DIRTY if extent.flags & DIRTY else EXTENT_CLEAN))
        position = extent.end
    if position < end:
        request.extents.append((end - position, EXTENT_HOLE))
