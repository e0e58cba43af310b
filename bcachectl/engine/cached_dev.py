# SPDX-License-Identifier: GPL-2.0-only
"""`CachedDev`: a backing device, from its registration to the end of its detach; what `bcachectl.engine.front` calls
a volume.

States of its superblock (BDEV_STATE), and who changes them (the kernel's in super.c and writeback.h)::

    NONE ---- attach ----> CLEAN <--- nothing dirty any more --- DIRTY
      ^                      |  \\--- first write kept back ----->  ^
      |                      |                                     |
      +------- detach -------+   (a detach writes everything back first)

    STALE: it ran without its set; the next attach takes a new slot and forgets what the old one cached.

Two orders that the kernel leaves to chance are kept here: DIRTY is durable before the first dirty write is
acknowledged, and CLEAN is written only after the backing device has flushed all that was written back.

Invariant: ``has_dirty`` is set whenever a dirty extent of the device exists or is about to.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from bcachectl.engine import request as path
from bcachectl.engine.bdev import Bdev
from bcachectl.engine.exported_writes import ExportedWrites
from bcachectl.engine.front import (
    EXTENT_HOLE,
    REQ_DISCARD,
    REQ_FLUSH,
    REQ_READ,
    REQ_STATUS,
    REQ_WRITE_ZEROES,
    Request,
)
from bcachectl.engine.read_batch import ReadBatch, hit_sectors_sum, note_hits
from bcachectl.engine.request import Ranges
from bcachectl.engine.sched import FUA, PREFLUSH, Mutex, WaitQueue
from bcachectl.engine.streams import Streams
from bcachectl.engine.stripes import Stripes, stripe_size_of
from bcachectl.engine.write_batch import WriteBatch
from bcachectl.engine.write_group import start_group
from bcachectl.engine.writeback import Writeback
from bcachectl.errors import Corrupt, WrongState
from bcachectl.ondisk.bkey import INODE_SHIFT
from bcachectl.ondisk.superblock import SB_SECTOR, BdevState, CacheMode, Superblock, encode_superblock

if TYPE_CHECKING:
    from bcachectl.engine.cache_set import CacheSet

EIO = 5
EINVAL = 22
EROFS = 30
NO_SLOT = -1
_DIRTY = BdevState.DIRTY


class Stats:
    """Counters of one volume since it was registered; requests and bytes by direction, hits as caching.md 15 counts
    them.
    """

    __slots__ = (
        "cache_hits",
        "cache_misses",
        "cache_bypass_hits",
        "cache_bypass_misses",
        "cache_miss_collisions",
        "bypassed_sectors",
        "read_requests",
        "write_requests",
        "read_sectors",
        "write_sectors",
        "other_requests",
        "errors",
    )

    def __init__(self) -> None:
        for name in self.__slots__:
            setattr(self, name, 0)

    cache_hits: int
    cache_misses: int
    cache_bypass_hits: int
    cache_bypass_misses: int
    cache_miss_collisions: int
    bypassed_sectors: int
    read_requests: int
    write_requests: int
    read_sectors: int
    write_sectors: int
    other_requests: int
    errors: int

    def count_read(self, *, hit: bool, bypass: bool) -> None:
        """Count a finished read (stats.c, bch_mark_cache_accounting)."""
        if bypass:
            if hit:
                self.cache_bypass_hits += 1
            else:
                self.cache_bypass_misses += 1
        elif hit:
            self.cache_hits += 1
        else:
            self.cache_misses += 1


class CachedDev:
    """A backing device, attached or not.

    ``is_untouched``: nothing at all is written to the backing device.  ``read_only``: writes of clients are refused.
    """

    is_flash = False

    def __init__(self, cset: CacheSet, backing: Bdev, sb: Superblock, raw: bytes) -> None:
        self.cset = cset
        self.backing = backing
        self.sb = sb
        self.raw = raw
        self.is_untouched = cset.read_only or backing.read_only
        self.read_only = self.is_untouched or cset.sb.is_obso_large_bucket
        # Each superblock that is written says when it was read, as the kernel's do (super.c, read_super): that is never
        # later than the uuid array's word for the attach.
        self.mount_s = cset.sched.wall_s & 0xFFFFFFFF
        self.name = ""
        self.slot = NO_SLOT
        self.base = 0
        self.attached = False
        self.detaching = False
        self.io_disable = False
        self.has_dirty = False
        self.dirty_writers = 0
        self.flushing = 0
        self.cache_mode = mode_of(sb)
        self.durable_state: BdevState | None = sb.state
        self.data_offset = sb.data_offset
        self.size_sectors = backing.size_sectors - sb.data_offset
        self.block_size_sectors = max(1, sb.block_size)
        self.block_mask = cset.geometry.block_size_sectors - 1
        self.stats = Stats()
        self.streams = Streams()
        self.ranges = Ranges(WaitQueue(cset.sched, "overlapping writes"))
        self.sb_lock = Mutex(cset.sched, "backing superblock")
        self.state_changed = WaitQueue(cset.sched, "device state")
        self.writeback = Writeback(self)
        self.stripe_size_sectors = stripe_size_of(backing.optimal_io_sectors)
        self.stripes: Stripes | None = None
        self.reads = ReadBatch(self, cset)
        self.batch = WriteBatch(self)
        self.exported = ExportedWrites(self)
        self.sequential_cutoff = 4 << 20
        self.readahead_cache_policy = "all"
        self.stop_when_cache_set_failed = "auto"
        self.io_error_limit = 64
        self.io_errors = 0

    # What it is.

    @property
    def uuid(self) -> bytes:
        """The backing device's uuid."""
        return self.sb.uuid

    @property
    def label(self) -> str:
        """The backing superblock's label."""
        return self.sb.label_text

    @property
    def dirty_sectors(self) -> int:
        """Sectors of dirty extents in the map."""
        return self.cset.dirty_by_inode.get(self.slot, 0)

    @property
    def limit(self) -> int:
        """The position behind everything the device can have."""
        return self.base + self.backing.size_sectors

    @property
    def state(self) -> str:
        """The state in the kernel's words, as its sysfs file says it."""
        return self.sb.state.word

    @property
    def is_known_dirty(self) -> bool:
        """The backing superblock says DIRTY, durably, and will go on saying so while something is dirty."""
        return self.has_dirty and self.durable_state == _DIRTY

    # Requests.

    def read_nowait(self, sector: int, nsectors: int) -> int:
        """Byte on the cache device where the whole read lies in one fresh extent of a leaf in memory; NOT_NOW
        otherwise.
        """
        return self.reads.places_of([(sector, nsectors)])[0]

    def reads_nowait(self, reads: list[tuple[int, int]]) -> list[int]:
        """`read_nowait` for each (sector, nsectors)."""
        return self.reads.places_of(reads)

    @property
    def serves_hits(self) -> bool:
        """Whether the map says where data of the device is."""
        return self.attached and not self.cset.io_disabled and not self.io_disable

    def count_hits(self, hits: ReadBatch) -> None:
        """Count reads that needed nothing but a lookup."""
        cset, stats, writeback = self.cset, self.stats, self.writeback
        count, nsectors = hits.hit_count, hit_sectors_sum(hits)
        stats.read_requests += count
        stats.read_sectors += nsectors
        writeback.idle_rounds = 0
        if writeback.at_full_speed:
            writeback.note_request()
        passed, passed_sectors = count, nsectors
        if not (self.detaching or self.cache_mode == CacheMode.NONE):
            passed = passed_sectors = 0
            cutoff_bytes = self.sequential_cutoff >> 9 << 9
            if cutoff_bytes:
                passed, passed_sectors = note_hits(hits, self.streams, cutoff_bytes, cset.sched.now_ns)
        stats.cache_bypass_hits += passed
        stats.bypassed_sectors += passed_sectors
        stats.cache_hits += count - passed
        cset.alloc.rescale_for_all(nsectors - passed_sectors)

    def submit_all(self, requests: list[Request]) -> None:
        """Take requests that came together; plain writes among them share a task."""
        for request in start_group(self, requests):
            self.submit(request)

    def submit(self, request: Request) -> None:
        """Take a request; it comes back in ``cset.front``."""
        cset = self.cset
        cset.requests_in_flight += 1
        request.start_ns = cset.sched.now_ns
        cset.sched.spawn(self._serve(request), "request")

    async def _serve(self, request: Request) -> None:
        stats = self.stats
        if request.sector + request.nsectors > self.size_sectors or request.sector < 0:
            self.give_back(request, EINVAL)
            return
        if request.op == REQ_READ:
            stats.read_requests += 1
            stats.read_sectors += request.nsectors
        elif request.op in (REQ_FLUSH, REQ_STATUS):
            stats.other_requests += 1
        else:
            stats.write_requests += 1
            stats.write_sectors += request.nsectors
            if self.read_only:
                self.give_back(request, EROFS)
                return
        self.writeback.note_request()
        if self.io_disable:
            self.give_back(request, EIO)
        elif not self.attached:
            await self._pass_through(request)
        else:
            await self._serve_attached(request)

    async def _serve_attached(self, request: Request) -> None:
        if self.cset.io_disabled:
            await self._after_failure(request)
            return
        try:
            await self._handle(request)
        except Corrupt as error:
            self.cset.fail(str(error))
            await self._after_failure(request)

    async def _handle(self, request: Request) -> None:
        if request.op == REQ_READ:
            await path.read(self, request)
        elif request.op == REQ_FLUSH:
            if self.read_only:
                self.give_back(request, 0)
            else:
                await path.flush(self, request)
        elif request.op == REQ_STATUS:
            await path.status(self.cset, request, self.base + self.data_offset + request.sector)
            self.give_back(request, 0)
        else:
            await path.write(self, request)

    def finish(self, request: Request, error: int) -> None:
        """End a request of an attached device; what failed because the set did may yet succeed without the cache."""
        if error and self.cset.io_disabled:
            self.cset.sched.spawn(self._after_failure(request), "request after failure")
        else:
            self.give_back(request, error)

    def give_back(self, request: Request, error: int) -> None:
        """Return a request to its export."""
        if error:
            self.stats.errors += 1
        self.cset.request_done()
        self.cset.front.complete(request, error)

    async def serve_uncached(self, request: Request) -> None:
        """Serve a request that found its device detached, or its set failed, when its turn came."""
        if self.cset.io_disabled:
            await self._after_failure(request)
        else:
            await self._pass_through(request)

    async def _after_failure(self, request: Request) -> None:
        # The set has failed: wait until the device is either without its cache, cleanly, or disabled.
        while self.attached and not self.io_disable:
            await self.state_changed.wait()
        if self.io_disable:
            self.give_back(request, EIO)
        else:
            await self._pass_through(request)

    async def _pass_through(self, request: Request) -> None:
        # Without a cache: the backing device alone (request.c, detached_dev_do_request).  Writes are known to be in
        # flight all the same: an attach may complete meanwhile, and no read miss may then keep what such a write is
        # about to change.
        sector = request.sector + self.data_offset
        backing = self.backing
        if request.op in (REQ_READ, REQ_FLUSH, REQ_STATUS):
            error = 0
            if request.op == REQ_READ:
                error = await backing.read(sector, request.buf)
            elif request.op == REQ_STATUS:
                request.extents.append((request.nsectors, EXTENT_HOLE))
            elif not self.read_only:
                error = await backing.flush()
            self.give_back(request, self.count_backing_error(error))
            return
        claim = await self.ranges.enter(sector, sector + request.nsectors)
        if self.attached:
            # It was attached while we waited.
            self.ranges.leave(claim)
            await self._serve_attached(request)
            return
        flags = path.io_flags(request)
        error = 0
        if request.op == REQ_DISCARD:
            if backing.can_discard:
                await backing.discard(sector, request.nsectors)
        elif request.op == REQ_WRITE_ZEROES:
            error = await backing.write_zeroes(sector, request.nsectors, flags)
        else:
            error = await backing.write(sector, request.buf, flags)
        self.ranges.leave(claim)
        self.give_back(request, self.count_backing_error(error))

    def count_backing_error(self, error: int) -> int:
        """Count an I/O error of the backing device and give it back; too many stop the device (io.c,
        bch_count_backing_io_errors).
        """
        if error:
            self.io_errors += 1
            self.cset.events.emit("bcache_backing_error", volume=self.name, errno=error)
            if self.io_errors >= self.io_error_limit and not self.io_disable:
                self.io_disable = True
                self.cset.events.emit("bcache_device_disabled", volume=self.name)
                self.state_changed.wake_all()
                self.writeback.wake()
        return error

    # The superblock.

    async def write_superblock(self, sb: Superblock) -> int:
        """Put ``sb`` in force and write it, durably; the caller holds ``sb_lock``.  Returns an errno.

        After an error the old one is in force again, and what the disk has is unknown.
        """
        old = self.sb
        self.sb = sb
        self.cache_mode = mode_of(sb)
        self.durable_state = None
        if self.is_untouched:
            return 0
        raw = encode_superblock(replace(sb, last_mount=self.mount_s), self.raw)
        error = await self.backing.write(SB_SECTOR, raw, PREFLUSH | FUA, "backing superblock")
        if self.count_backing_error(error):
            self.sb = old
            self.cache_mode = mode_of(old)
        else:
            self.raw = raw
            self.durable_state = sb.state
        return error

    async def set_superblock(self, change: Callable[[Superblock], Superblock]) -> int:
        """Apply a change to the superblock as it is when its turn comes, and write it; returns an errno."""
        async with self.sb_lock:
            return await self.write_superblock(change(self.sb))

    async def become_dirty(self) -> int:
        """Before dirty data is acknowledged: the superblock says DIRTY, durably (writeback.h, bch_writeback_add)."""
        if self.is_known_dirty:
            return 0
        self.has_dirty = True
        async with self.sb_lock:
            if not self.attached or self.cset.io_disabled:
                return EIO
            if self.durable_state != BdevState.DIRTY:
                error = await self.write_superblock(self.sb.with_state(BdevState.DIRTY))
                if error:
                    return error
        self.has_dirty = True
        self.writeback.wake()
        return 0

    async def become_clean(self) -> None:
        """Nothing is dirty, and the backing device has flushed: the superblock says so."""
        self.has_dirty = False
        async with self.sb_lock:
            # A write may have come in while we waited for the lock.
            if not (self.has_dirty or self.dirty_sectors or self.dirty_writers):
                await self.write_superblock(self.sb.with_state(BdevState.CLEAN))
                self.cset.events.emit("bcache_clean", volume=self.name)
                if self.cset.gc.after_writeback:
                    self.cset.gc.force()
        self.state_changed.wake_all()

    async def set_cache_mode(self, mode: CacheMode) -> int:
        """Change the cache mode and write the superblock; dirty data stays and is written back in time."""
        return await self.set_superblock(lambda sb: sb.with_cache_mode(mode))

    async def set_label(self, label: bytes) -> int:
        """Change the label, at most 32 bytes, in the superblock and in the uuid entry."""
        error = await self.set_superblock(lambda sb: replace(sb, label=label.ljust(32, b"\0")))
        if not error and self.attached:
            entry = self.cset.uuids[self.slot]
            self.cset.uuids[self.slot] = replace(entry, label=label.ljust(32, b"\0"))
            await self.cset.uuid_array.write()
        return error

    # Attach and detach; the slot in the uuid array is the set's business.

    def start_caching(self, slot: int) -> None:
        """Serve requests through the cache from now on, with the keys of ``slot``."""
        cset = self.cset
        self.slot = slot
        self.base = slot << INODE_SHIFT
        self.has_dirty = self.sb.state == BdevState.DIRTY or self.dirty_sectors > 0
        self.writeback.reset()
        self.attached = True
        self.detaching = False
        if self.backing.partial_stripes_expensive and not self.is_untouched:
            self.stripes = cset.stripes[slot] = Stripes(
                self.base, stripe_size_sectors=self.stripe_size_sectors, size_sectors=self.backing.size_sectors
            )
            cset.sched.spawn(self.stripes.count(self), f"count stripes {slot}")
        if not self.is_untouched:
            cset.sched.spawn(self.writeback.run(), f"writeback {slot}")
            cset.sched.spawn(self.writeback.run_controller(), f"writeback rate {slot}")

    def begin_detach(self) -> None:
        """Write everything back, then leave the set (super.c, bch_cached_dev_detach)."""
        if not self.attached:
            raise WrongState(f"{self.backing.name} is not attached to a cache set")
        self.detaching = True
        self.cset.events.emit("bcache_detach_start", volume=self.name, dirty_sectors=self.dirty_sectors)
        self.writeback.wake()

    async def finish_detach(self) -> None:
        """Nothing is dirty: cut the tie, first in the backing superblock, then in the uuid array
        (cached_dev_detach_finish).
        """
        cset = self.cset
        async with self.sb_lock:
            error = await self.backing.flush() or await self.write_superblock(self.sb.with_state(BdevState.CLEAN))
            if not error:
                error = await self.write_superblock(untied(self.sb))
        if error:
            self.detaching = False
            cset.events.emit("bcache_detach_failed", volume=self.name, errno=error)
            self.state_changed.wake_all()
            return
        self.attached = False
        self.stripes = None
        cset.stripes.pop(self.slot, None)
        await cset.uuid_array.retire(self.slot)
        cset.events.emit("bcache_detach_end", volume=self.name)
        self.slot = NO_SLOT
        self.detaching = False
        self.writeback.wake()
        self.state_changed.wake_all()

    async def leave_failed_set(self) -> None:
        """The set failed (super.c, conditional_stop_bcache_device): go on without the cache if nothing is lost by it,
        else stop.
        """
        if (
            self.attached
            and self.stop_when_cache_set_failed == "auto"
            and not self.has_dirty
            and not self.dirty_sectors
        ):
            # From now on the cached data ages: no one may take it for the device's again.
            if not self.is_untouched and await self.set_superblock(untied):
                self.io_disable = True
            else:
                self.attached = False
        elif self.attached:
            self.io_disable = True
        self.state_changed.wake_all()


def untied(sb: Superblock) -> Superblock:
    """The superblock of a device that belongs to no set."""
    return replace(sb.with_state(BdevState.NONE), set_uuid=bytes(16))


def mode_of(sb: Superblock) -> CacheMode:
    """The cache mode; writethrough, which is always safe, if the superblock says something unknown."""
    mode = sb.cache_mode
    return CacheMode.WRITETHROUGH if mode is None else mode
