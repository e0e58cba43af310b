# SPDX-License-Identifier: GPL-2.0-only
"""`CacheSet`: wires the parts of a running cache set; its members, its stop and its failure.

Life of a set:

1. `CacheSet.start` reads the superblock and makes the parts; `bcachectl.engine.recovery` brings them up.
2. Backing devices come (`CacheSet.register_backing`) and go (`CacheSet.detach`); flash-only volumes too.
3. `CacheSet.stop` ends it in order: requests, leaves, gens and priorities, journal, backing devices.  There is no mark
   of a clean stop on disk; the next start replays the journal all the same.

A set that fails (`CacheSet.fail`) does no I/O on the cache device from then on.  Each device goes on without its cache
if it has nothing dirty, and is disabled otherwise.

Kernel: super.c.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from bcachectl.engine import checks, recovery, stats, tunables
from bcachectl.engine.alloc import Allocator, Entropy, Reserve
from bcachectl.engine.bdev import Bdev
from bcachectl.engine.buckets import Buckets
from bcachectl.engine.cached_dev import NO_SLOT, CachedDev
from bcachectl.engine.events import Trace
from bcachectl.engine.flash_dev import FlashVolume
from bcachectl.engine.front import Front
from bcachectl.engine.gc import Gc
from bcachectl.engine.journal import Journal
from bcachectl.engine.movinggc import MovingGc
from bcachectl.engine.node import DIRTY
from bcachectl.engine.open_buckets import SectorAllocator
from bcachectl.engine.prios import PrioWriter
from bcachectl.engine.request import invalidate
from bcachectl.engine.sched import FUA, NS_PER_MS, PREFLUSH, Mutex, Sched, Task, WaitQueue
from bcachectl.engine.split import Splitter
from bcachectl.engine.streams import Congestion
from bcachectl.engine.stripes import Stripes
from bcachectl.engine.uuid_array import UuidArray
from bcachectl.errors import Corrupt, DeviceError, Refused, WrongState, errno_text
from bcachectl.ondisk.bkey import INODE_SHIFT
from bcachectl.ondisk.superblock import (
    SB_BYTES,
    SB_SECTOR,
    BdevState,
    Replacement,
    Superblock,
    check_backing_features,
    check_superblock,
    decode_superblock,
    encode_superblock,
)
from bcachectl.ondisk.uuids import UuidEntry
from bcachectl.units import format_uuid

if TYPE_CHECKING:
    from bcachectl.engine.btree import Btree
    from bcachectl.engine.tail import Tail
    from bcachectl.snapshot import SetSnapshot

UUID_FLASH_ONLY = 1
IO_ERROR_SHIFT = 20


@dataclass(slots=True)
class Options:
    """How to run a set."""

    read_only: bool = False
    accept_newer: bool = False
    """Whether a dirty device is taken in that has run later than the set knows."""
    debug_checks: bool = False
    node_cache_bytes: int = 256 << 20
    slice_keys: int = 1 << 12
    """Keys that gc and its like look at before others have their turn; about 0.1 ms."""
    slice_buckets: int = 1 << 17
    """The same for the columns of all buckets."""


class CacheSet:
    """A cache set of one cache device, with its backing devices and flash-only volumes."""

    btree: Btree
    """There once the set is up; recovery makes it."""

    def __init__(self, sched: Sched, cache: Bdev, *, entropy: Entropy, options: Options | None = None,
                 tail: Tail | None = None) -> None:
        """``tail``: where the journal's keys survive this process; what another one has left there is taken over."""
        self.tail = tail
        self.sched = sched
        self.cache = cache
        self.entropy = entropy
        self.options = options or Options()
        self.events = Trace(sched)
        self.front = Front()
        self.congestion = Congestion(sched, entropy)
        self.sb_lock = Mutex(sched, "cache superblock")
        self.attach_lock = Mutex(sched, "attach")
        self.idle = WaitQueue(sched, "requests in flight")
        self.devices: list[CachedDev] = []
        self.flash: list[FlashVolume] = []
        self.uuid_array = UuidArray(self)
        self.dirty_by_inode: dict[int, int] = {}
        self.stripes: dict[int, Stripes] = {}
        self.sync = False
        self.stopping = False
        self.stopped = False
        self.io_disabled = False
        self.running = False
        self.gens_final = False
        self.failed: str | None = None
        self.requests_in_flight = 0
        self.back_sectors = 0
        self.cache_read_races = 0
        self.meta_sectors_written = 0
        self.io_error_count = 0
        self.io_error_counted_at = 0
        self.io_errors_seen = 0
        self.io_error_limit = 8
        self.io_error_halflife = 0
        self.errors = "unregister"
        self.cutoff_writeback = 40
        self.cutoff_writeback_sync = 70
        self.idle_max_writeback_rate = True
        self.accounting = stats.Accounting(self)
        self.summaries = stats.Summaries(self)
        self.tunables = tunables.Tunables(self)
        self.replayed_keys = 0
        self.replayed_entries = 0
        self.inherited_keys = 0             # from the tail of a killed engine
        self._allocator: Task[None] | None = None

    # Start.

    async def start(self) -> None:
        """Read the cache device and run the set.  Raises Corrupt, WrongState or DeviceError with one clear sentence."""
        raw = bytearray(SB_BYTES)
        self.check_io(await self.cache.read(SB_SECTOR, raw, "superblock"), "superblock")
        self.raw = bytes(raw)
        sb = decode_superblock(self.raw)
        if sb.is_backing:
            raise WrongState(f"{self.cache.name} is a backing device; name the set's cache device instead")
        check_superblock(sb, device_sectors=self.cache.size_sectors, logical_block_sectors=self.cache.atomic_sectors)
        if sb.nr_in_set != 1:
            raise WrongState(
                f"{self.cache.name} is one of {sb.nr_in_set} caches of its set; only sets of one cache are supported"
            )
        if sb.geometry.node_blocks < 2 and not self.read_only:
            raise WrongState(
                f"{self.cache.name} has btree nodes of one block, which can never be added to (kernels crash on it)"
            )
        if not sb.cache_sync:
            if self.read_only:
                raise WrongState(f"{self.cache.name} has never been run; it holds nothing to read")
            sb = sb.with_journal_buckets(sb.geometry.njournal_default)
        self.sb = sb
        self.geometry = sb.geometry
        self.buckets = Buckets(self.geometry)
        self.alloc = Allocator(self, self.buckets)
        self.alloc.replacement = sb.replacement or Replacement.LRU
        self.alloc.discard = sb.discard
        self.prios = PrioWriter(self)
        self.journal = Journal(self)
        self.gc = Gc(self)
        self.movinggc = MovingGc(self)
        self.splitter = Splitter(self)
        self.sectors = SectorAllocator(self)
        if sb.cache_sync:
            await recovery.start_existing(self)
        else:
            await recovery.start_new(self)
        self.journal.do_reserve = 1
        self.running = True
        self.sched.spawn(self.accounting.run(), "accounting")
        for slot, entry in enumerate(self.uuids):
            if entry.is_volume:
                self.flash.append(FlashVolume(self, slot, entry))
        self.check_invariants()

    def requests_seen(self) -> int:
        """A number that grows while requests come in, read hits included."""
        every: list[CachedDev | FlashVolume] = [*self.devices, *self.flash]
        return sum(
            volume.stats.read_requests + volume.stats.write_requests + volume.stats.other_requests for volume in every
        )

    def run_allocator(self) -> None:
        """Start the allocator's task."""
        self._allocator = self.sched.spawn(self.alloc.run(), "allocator")

    def run_journal(self) -> None:
        """Start the journal's task."""
        self.sched.spawn(self.journal.run(), "journal")

    def run_late_threads(self) -> None:
        """Start the tasks that need a set that is up."""
        self.sched.spawn(self.gc.run(), "gc")
        self.sched.spawn(self.btree.run_flusher(), "leaf flusher")

    @property
    def uuids(self) -> list[UuidEntry]:
        """The uuid entries; the index is the slot."""
        return self.uuid_array.entries

    # Backing devices.

    async def read_backing(self, backing: Bdev) -> CachedDev:
        """Read and judge a backing device's superblock; it is not part of the set yet."""
        raw = bytearray(SB_BYTES)
        error = await backing.read(SB_SECTOR, raw, "superblock")
        if error:
            raise DeviceError(f"{backing.name}: reading the superblock failed: {errno_text(error)}", errno=error)
        try:
            sb = decode_superblock(raw)
            if sb.is_cache:
                raise WrongState(f"{backing.name} is a cache device; it cannot be a backing device")
            check_superblock(sb, device_sectors=backing.size_sectors, logical_block_sectors=backing.atomic_sectors)
            check_backing_features(sb)
        except Corrupt as bad:
            raise Corrupt(backing.name, str(bad)) from None
        if sb.data_offset >= backing.size_sectors:
            raise Corrupt(backing.name, "the data offset lies beyond the end of the device (truncated?)")
        if backing.size_sectors >= 1 << INODE_SHIFT:
            raise WrongState(f"{backing.name} is larger than 8 PiB, which this version does not support")
        return CachedDev(self, backing, sb, bytes(raw))

    async def register_backing(self, backing: Bdev) -> CachedDev:
        """Take a backing device in: attached if its superblock names this set (super.c, register_bdev).

        Raises WrongState if it belongs to another set, Corrupt or DeviceError if it cannot be read.
        """
        dev = await self.read_backing(backing)
        if dev.sb.set_uuid == self.sb.set_uuid:
            await self.attach_device(dev)
        elif dev.sb.state in (BdevState.CLEAN, BdevState.DIRTY):
            raise WrongState(
                f"{backing.name} belongs to set {format_uuid(dev.sb.set_uuid)} (state {dev.state}), not to set "
                f"{format_uuid(self.sb.set_uuid)}; detach it there first"
            )
        self.devices.append(dev)
        return dev

    async def attach_device(self, dev: CachedDev) -> None:
        """Attach a device to this set (super.c, bch_cached_dev_attach); raises WrongState with the reason."""
        async with self.attach_lock:
            await self._attach_device(dev)

    async def _attach_device(self, dev: CachedDev) -> None:
        name = dev.backing.name
        if dev.attached:
            raise WrongState(f"{name} is already attached")
        if self.stopping or self.io_disabled:
            raise WrongState(f"set {format_uuid(self.sb.set_uuid)} is shutting down")
        if dev.block_size_sectors < self.geometry.block_size_sectors:
            raise WrongState(
                f"{name} has blocks of {dev.block_size_sectors << 9} bytes, smaller than the set's "
                f"{self.geometry.block_bytes}: block size less than set's block size"
            )
        if any(other.attached and other.uuid == dev.uuid for other in self.devices):
            raise WrongState(f"a device with the uuid {format_uuid(dev.uuid)} of {name} is already attached (a copy?)")
        slot = next(
            (
                slot
                for slot, entry in enumerate(self.uuids)
                if bytes(entry.uuid) == dev.uuid and not entry.is_flash_only
            ),
            NO_SLOT,
        )
        if slot != NO_SLOT and dev.sb.state in (BdevState.STALE, BdevState.NONE):
            if self.read_only:
                # What the cache holds of it is out of date; the device is shown as it is, without a cache.
                return
            await self.uuid_array.retire(slot)
            slot = NO_SLOT
        if slot == NO_SLOT and dev.sb.state == BdevState.DIRTY:
            raise WrongState(
                f"couldn't find uuid for {name} in set {format_uuid(self.sb.set_uuid)}: its dirty data is elsewhere"
            )
        if slot != NO_SLOT:
            self._refuse_newer(dev, slot)
            await self._refuse_too_small(dev, slot)
        if slot == NO_SLOT and self.read_only:
            # It was never attached: the cache holds nothing of it.
            return
        if slot == NO_SLOT:
            slot = await self._attach_new(dev)
        elif not self.read_only:
            self.uuids[slot] = replace(self.uuids[slot], last_reg=self._last_reg(dev))
            await self.uuid_array.write()
        dev.start_caching(slot)
        if not self.read_only and not self.io_disabled and dev.has_dirty and dev.sb.state != BdevState.DIRTY:
            await dev.become_dirty()
        if self.io_disabled:
            # It failed while we waited, when this device was none of those that `CacheSet._leave` finds.
            await dev.leave_failed_set()
            raise WrongState(f"set {format_uuid(self.sb.set_uuid)} failed: {self.failed}")
        self.events.emit("bcache_attach", volume=name, slot=slot)

    def _last_reg(self, dev: CachedDev) -> int:
        # Never before what the superblock says or will say: a clock that was set back is no run that is not known of.
        return max(self.sched.wall_s & 0xFFFFFFFF, dev.sb.last_mount, dev.mount_s)

    def _refuse_newer(self, dev: CachedDev, slot: int) -> None:
        # The superblock of a device is written after the uuid array is durable.  So one that tells of a later run was
        # dirty with another state of this set, of which this one is an older copy: docs/decisions/0029.
        is_newer = dev.sb.state == BdevState.DIRTY and 0 < self.uuids[slot].last_reg < dev.sb.last_mount
        if is_newer and not (self.read_only or self.options.accept_newer):
            raise Refused(
                f"{dev.backing.name} is dirty and has run later than the set knows: the cache device may be an older "
                "copy of itself, or the clock was set back; `bcachectl fsck` with both tells more, and `bcachectl "
                "engine run --force=inconsistent` takes it nevertheless"
            )

    async def _refuse_too_small(self, dev: CachedDev, slot: int) -> None:
        # A device that was shrunk or cut off cannot take back all of its dirty data.
        if not self.dirty_by_inode.get(slot):
            return
        limit = (slot << INODE_SHIFT) + dev.backing.size_sectors
        beyond = await self.btree.lookup(limit - 1, (slot + 1) << INODE_SHIFT)
        if any(extent.flags & DIRTY and extent.end > limit for extent in beyond):
            raise WrongState(
                f"{dev.backing.name} is smaller than the dirty data that its cache holds for it (truncated?)"
            )

    async def _attach_new(self, dev: CachedDev) -> int:
        # A new slot, durable in the uuid array and the journal before the backing superblock points here.
        slot = self.uuid_array.free_slot()
        now = self.sched.wall_s & 0xFFFFFFFF
        self.uuids[slot] = replace(
            self.uuids[slot],
            uuid=dev.uuid,
            label=dev.sb.label,
            first_reg=now,
            last_reg=self._last_reg(dev),
            invalidated=0,
            flags=0,
            sectors=0,
        )
        if not await self.uuid_array.write():
            raise WrongState(f"set {format_uuid(self.sb.set_uuid)} failed: {self.failed}")
        error = await dev.set_superblock(lambda sb: replace(sb.with_state(BdevState.CLEAN), set_uuid=self.sb.set_uuid))
        if error:
            raise DeviceError(f"{dev.backing.name}: writing the superblock failed: {errno_text(error)}", errno=error)
        return slot

    def volume(self, name: str) -> CachedDev | FlashVolume:
        """A volume by name, uuid, label or backing device; WrongState if there is none, or two."""
        found = [
            volume
            for volume in self.volumes
            if name in (volume.name, format_uuid(volume.uuid))
            or (volume.label and name == volume.label)
            or (isinstance(volume, CachedDev) and name == volume.backing.name)
        ]
        if len(found) != 1:
            raise WrongState(
                f"{name}: {'no such volume' if not found else 'several volumes of this label'} in set "
                f"{format_uuid(self.sb.set_uuid)}; there are {', '.join(v.name for v in self.volumes) or 'none'}"
            )
        return found[0]

    def cached_volume(self, name: str) -> CachedDev:
        """`volume`, which must be a cached device."""
        found = self.volume(name)
        if not isinstance(found, CachedDev):
            raise WrongState(f"{name} is a flash-only volume; it has no backing device")
        return found

    @property
    def volumes(self) -> list[CachedDev | FlashVolume]:
        """All volumes, in the order of their slots when they were first listed; unnamed ones get their names now."""

        def order(volume: CachedDev | FlashVolume) -> int:
            return volume.slot if volume.slot != NO_SLOT else len(self.uuids)

        every: list[CachedDev | FlashVolume] = [*self.devices, *self.flash]
        named = sorted(
            (volume for volume in every if volume.name), key=lambda volume: int(volume.name.removeprefix("bcache"))
        )
        number = int(named[-1].name.removeprefix("bcache")) + 1 if named else 0
        for volume in sorted((volume for volume in every if not volume.name), key=order):
            volume.name = f"bcache{number}"
            number += 1
            named.append(volume)
        return named

    def cached_devices(self) -> list[CachedDev]:
        """The attached backing devices."""
        return [dev for dev in self.devices if dev.attached]

    async def attach(self, name: str) -> None:
        """Attach a volume that runs without a cache."""
        dev = self.cached_volume(name)
        if dev.sb.state == BdevState.DIRTY and dev.sb.set_uuid != self.sb.set_uuid:
            raise WrongState(f"{dev.backing.name} holds dirty data in another set")
        await self.attach_device(dev)

    async def detach(self, name: str) -> None:
        """Write a volume's dirty data back and cut its tie to the set; returns when that is done."""
        dev = self.cached_volume(name)
        self.refuse_read_only()
        dev.begin_detach()
        while dev.attached and dev.detaching and not self.io_disabled and not dev.io_disable:
            await dev.state_changed.wait()
        if dev.attached:
            dev.detaching = False
            why = self.failed or ("it was disabled after errors" if dev.io_disable else "a superblock was not written")
            raise WrongState(f"{dev.backing.name} could not be detached: {why}")

    async def flush_volume(self, name: str) -> None:
        """Write all dirty data of a volume back, without detaching it; returns when nothing is dirty."""
        dev = self.cached_volume(name)
        self.refuse_read_only()
        dev.flushing += 1
        dev.writeback.wake()
        while dev.attached and dev.has_dirty and not self.io_disabled and not dev.io_disable:
            await dev.state_changed.wait()
        dev.flushing -= 1
        async with dev.sb_lock:
            # The superblock that says CLEAN may still be on its way.
            pass
        if dev.has_dirty:
            raise WrongState(
                f"{dev.backing.name} could not be written back: {self.failed or 'it was disabled after errors'}"
            )

    # Flash-only volumes.

    async def volume_create(self, size_bytes: int) -> FlashVolume:
        """Make a flash-only volume (super.c, bch_flash_dev_create); less than a block is refused."""
        self.refuse_read_only()
        sectors = (size_bytes >> 9) & ~(self.geometry.block_size_sectors - 1)
        if sectors == 0:
            raise Refused(
                f"a volume of {size_bytes} bytes is smaller than a block of {self.geometry.block_bytes} bytes"
            )
        if sectors > self.buckets.nbuckets << self.buckets.bucket_shift:
            raise Refused(f"a volume of {size_bytes} bytes is larger than the cache device")
        slot = self.uuid_array.free_slot()
        now = self.sched.wall_s & 0xFFFFFFFF
        uuid = self.entropy.getrandbits(128).to_bytes(16, "little")
        self.uuids[slot] = replace(
            self.uuids[slot],
            uuid=uuid,
            label=bytes(32),
            first_reg=now,
            last_reg=now,
            invalidated=0,
            flags=UUID_FLASH_ONLY,
            sectors=sectors,
        )
        if not await self.uuid_array.write():
            raise WrongState(f"set {format_uuid(self.sb.set_uuid)} failed: {self.failed}")
        volume = FlashVolume(self, slot, self.uuids[slot])
        self.flash.append(volume)
        return volume

    async def volume_remove(self, name: str) -> None:
        """Delete a flash-only volume and its data; its space is reclaimed (the kernel's stays dirty for ever)."""
        volume = self.volume(name)
        self.refuse_read_only()
        if not isinstance(volume, FlashVolume):
            raise WrongState(f"{name} is not a flash-only volume")
        volume.removed = True
        self.flash.remove(volume)
        # First the data, then the slot: a power loss between leaves an empty volume, not space that nobody owns.
        claim = await volume.ranges.enter(volume.base, volume.base + volume.size_sectors)
        try:
            ok = await invalidate(self, volume.base, volume.base + volume.size_sectors, durable=True)
        except Corrupt as bad:
            self.fail(str(bad))
            ok = False
        volume.ranges.leave(claim)
        if not ok or not await self.uuid_array.retire(volume.slot):
            raise WrongState(f"{name} is not removed, and may be there again at the next start: set "
                             f"{format_uuid(self.sb.set_uuid)} failed: {self.failed}")

    def is_flash(self, slot: int) -> bool:
        """Whether a slot is a flash-only volume's."""
        return slot < len(self.uuids) and self.uuids[slot].is_flash_only

    def is_being_written(self, start: int, end: int) -> bool:
        """Whether a write to the positions [start, end) has begun and is not over."""
        slot = start >> INODE_SHIFT
        for dev in self.devices:
            if dev.slot == slot:
                return dev.ranges.writing(start - dev.base, end - dev.base)
        for volume in self.flash:
            if volume.slot == slot:
                return volume.ranges.writing(start, end)
        # A flash-only volume that is being removed is none of those any more.
        return self.is_flash(slot)

    def flash_dirty_sectors(self) -> int:
        """Sectors that flash-only volumes take."""
        return sum(volume.dirty_sectors for volume in self.flash)

    def refuse_read_only(self) -> None:
        """WrongState if the set runs read-only."""
        if self.read_only:
            raise WrongState("the engine runs read-only")

    # What the parts ask of the whole.

    @property
    def uuid(self) -> bytes:
        """The set's uuid."""
        return self.sb.set_uuid

    @property
    def read_only(self) -> bool:
        """Nothing is written to any device."""
        return self.options.read_only

    def wants_turn(self) -> bool:
        """Whether a task or an Io should not wait until the rim is done with what came for a client: all, but for an
        allocator that would put a bucket on a free list which is still half full.
        """
        ready = self.sched.ready
        if not ready or self.sched.outbox:
            return bool(self.sched.outbox)
        if len(ready) > 1 or ready[0] is not self._allocator:
            return True
        free = self.alloc.free[Reserve.NONE]
        return 2 * len(free) < free.size

    def account_dirty(self, position: int, sectors: int) -> None:
        """Dirty extents came (or went, if negative) at ``position``."""
        slot = position >> INODE_SHIFT
        self.dirty_by_inode[slot] = self.dirty_by_inode.get(slot, 0) + sectors
        if self.stripes and slot in self.stripes:
            self.stripes[slot].note(position, position + abs(sectors), sign=1 if sectors > 0 else -1)

    def metadata_buckets(self) -> list[int]:
        """Journal, prio and uuid buckets that are in use."""
        found = list(self.sb.d) + [bucket for bucket in self.prios.current + self.prios.journaled if bucket]
        return found + [self.uuid_array.bucket] if self.uuid_array.bucket else found

    def writeback_pointers(self) -> list[int]:
        """Pointers of everything that is being written back."""
        return [
            extent.ptr for dev in self.cached_devices() for extent in (*dev.writeback.waiting, *dev.writeback.in_flight)
        ]

    def request_done(self) -> None:
        """A request went back to its client."""
        self.requests_in_flight -= 1
        if not self.requests_in_flight:
            self.idle.wake_all()

    def check_bucket(self, bucket: int, what: str) -> None:
        """Corrupt if a bucket number from disk is none."""
        if not self.geometry.first_bucket <= bucket < self.geometry.nbuckets:
            raise Corrupt(what, f"bucket {bucket} is out of range")

    def check_io(self, error: int, what: str) -> None:
        """DeviceError if an I/O of the start failed."""
        if error:
            raise DeviceError(f"{self.cache.name}: I/O of the {what} failed: {errno_text(error)}", errno=error)

    def count_io_error(self, error: int, what: str) -> None:
        """Count an error of the cache device; at the limit the set fails (io.c, bch_count_io_errors).

        Counted in fixed point: with io_error_halflife set (in units of 88 I/Os), each unit takes 1/128 of it away.
        """
        self.io_errors_seen += 1
        self.events.emit("bcache_io_error", errno=error, what=what)
        decay = self.io_error_halflife
        if decay:
            for _ in range(min((self.cache.submitted - self.io_error_counted_at) // decay, 10_000)):
                self.io_error_count = self.io_error_count * 127 // 128
            self.io_error_counted_at = self.cache.submitted
        self.io_error_count += 1 << IO_ERROR_SHIFT
        if self.io_error_count >> IO_ERROR_SHIFT >= self.io_error_limit:
            self.fail(f"too many IO errors {what}")

    def fail(self, text: str) -> None:
        """Stop using the cache device: what it says or does cannot be relied on (super.c, bch_cache_set_error)."""
        if self.failed is not None:
            return
        self.failed = text
        self.io_disabled = True
        self.events.emit("bcache_set_failed", text=text)
        self.journal.wake_everyone()
        for queue in (self.alloc.alloc_wait, self.alloc.bucket_wait, self.gc.queue, self.gc.done):
            queue.wake_all()
        if hasattr(self, "btree"):
            self.btree.changed.wake_all()
            self.btree.flush_wake.wake_all()
        self.sched.spawn(self._leave(), "set failed")

    async def _leave(self) -> None:
        for dev in self.devices:
            await dev.leave_failed_set()
            dev.writeback.wake()

    # The superblock.

    async def write_superblock(self, change: Callable[[Superblock], Superblock] | None = None) -> None:
        """Apply a change to the superblock as it is when its turn comes, and write it (super.c, bcache_write_super).

        Sectors that the first one vouches for, the list of journal buckets, go first.
        """
        async with self.sb_lock:
            sb = self.sb if change is None else change(self.sb)
            version = 3 if sb.version == 0 else sb.version
            self.sb = replace(sb, version=version, seq=sb.seq + 1, last_mount=self.sched.wall_s & 0xFFFFFFFF)
            raw = encode_superblock(self.sb, self.raw)
            head = self.cache.atomic_sectors << 9
            if raw[head:] != self.raw[head:]:
                error = await self.cache.write(SB_SECTOR + self.cache.atomic_sectors, raw[head:], 0, "superblock")
                if error:
                    self.fail(f"writing the superblock failed: {errno_text(error)}")
                    return
            error = await self.cache.write(SB_SECTOR, raw[:head], PREFLUSH | FUA, "superblock")
            if error:
                self.fail(f"writing the superblock failed: {errno_text(error)}")
                return
            self.raw = raw

    async def set_replacement(self, policy: Replacement) -> None:
        """Change the replacement policy, now and in the superblock."""
        self.alloc.replacement = policy
        await self.write_superblock(lambda sb: sb.with_replacement(policy))

    async def set_discard(self, enabled: bool) -> None:
        """Turn discard on or off, now and in the superblock."""
        self.alloc.discard = enabled
        await self.write_superblock(lambda sb: sb.with_discard(enabled))

    # Running.

    async def run_gc(self) -> None:
        """Run a gc now and wait for it."""
        self.refuse_read_only()
        await self.gc.run_now()

    async def stop(self) -> None:
        """Stop in order: requests end, leaves, priorities and journal are written, both kinds of device flushed."""
        if self.stopped or not self.running:
            self.stopped = True
            return
        while self.requests_in_flight:
            await self.idle.wait()
        self.stopping = True
        for dev in self.devices:
            dev.writeback.stopping = True
            dev.writeback.wake()
        self.gc.wake()
        self.btree.flush_wake.wake_all()
        while self._copies_in_flight():
            await self.sched.sleep_until(self.sched.now_ns + NS_PER_MS)
        if not self.read_only and not self.io_disabled:
            await self.btree.flush_all()
            self.alloc.alloc_wait.wake_all()
            if self._allocator is not None:
                await self._allocator
            if not self.io_disabled and not self.alloc.prio_blocked:
                await self.prios.write(wait=False)
            await self.journal.write_meta()
            self.journal.close()
            for dev in self.devices:
                await dev.backing.flush()
        self.stopped = True
        self.events.emit("bcache_set_stopped")
        self.check_invariants()

    def _copies_in_flight(self) -> bool:
        # gc, moves, fills and writebacks, and leaves that are made anew: none may reach a device that someone else has
        # taken over.
        return (
            self.gc.running
            or bool(self.splitter.making_room)
            or self.movinggc.in_flight > 0
            or any(dev.ranges.fills or dev.writeback.in_flight for dev in self.devices)
        )

    def check_invariants(self) -> None:
        """With ``debug_checks``: assert everything that must hold at rest."""
        if self.options.debug_checks and not self.io_disabled:
            checks.check_set(self)

    def snapshot(self, cells: int = 0) -> SetSnapshot:
        """What the live view shows, with a map of ``cells`` cells."""
        return stats.snapshot(self, cells)
