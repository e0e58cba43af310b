# SPDX-License-Identifier: GPL-2.0-only
"""`Writeback`: copies dirty data to the backing device, at a rate that `Rate` controls.

One round:

1. Up to `KEYBUF_KEYS` dirty extents are collected, in the order of the backing device, from where the last round ended.
2. They are read from the cache and written to the backing device, neighbours together, at most `IN_FLIGHT` at once.
3. The backing device is flushed.
4. Each extent that still is what was copied becomes clean (`Btree.replace`), in memory; it is not journaled.

The kernel leaves out step 3: then a power loss of the backing device can lose data that was acknowledged as durable
and is no longer dirty.

When nothing is dirty any more the backing superblock becomes CLEAN, and a detach that waits for it goes on.

Kernel: writeback.c, bch_writeback_thread, read_dirty, refill_dirty, __update_writeback_rate; util.c, bch_next_delay.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

import numpy as np

from bcachectl.engine.buckets import PTR_SECTOR_MASK
from bcachectl.engine.gc import LEAF_COST_KEYS
from bcachectl.engine.node import DIRTY, HAS_PTR, Extent, Node
from bcachectl.engine.sched import NS_PER_S, WaitQueue
from bcachectl.errors import Corrupt

if TYPE_CHECKING:
    from bcachectl.engine.cached_dev import CachedDev
    from bcachectl.engine.stripes import Stripes

KEYBUF_KEYS = 500
IN_FLIGHT = 64
GROUP_KEYS = 5
GROUP_SECTORS = 5000
RATE_MAX = 1_000_000_000
RATE_IDLE = (1 << 31) - 1
SHARE_SHIFT = 14
RETRY_NS = NS_PER_S // 4


def quotient(value: int, divisor: int) -> int:
    """Division that truncates towards zero, as the kernel's div_s64 does."""
    return value // divisor if value >= 0 else -(-value // divisor)


class Rate:
    """The rate limiter and its proportional-integral controller; all amounts in sectors, the rate in sectors per
    second.
    """

    __slots__ = (
        "rate",
        "next_ns",
        "target",
        "proportional",
        "integral",
        "integral_scaled",
        "change",
        "writeback_rate_minimum",
        "writeback_rate_p_term_inverse",
        "writeback_rate_i_term_inverse",
        "writeback_rate_fp_term_low",
        "writeback_rate_fp_term_mid",
        "writeback_rate_fp_term_high",
        "writeback_rate_update_seconds",
        "writeback_consider_fragment",
    )

    def __init__(self) -> None:
        self.rate = 1024
        self.next_ns = 0
        self.target = 0
        self.proportional = 0
        self.integral = 0
        self.integral_scaled = 0
        self.change = 0
        self.writeback_rate_minimum = 8
        self.writeback_rate_p_term_inverse = 40
        self.writeback_rate_i_term_inverse = 10000
        self.writeback_rate_fp_term_low = 1
        self.writeback_rate_fp_term_mid = 10
        self.writeback_rate_fp_term_high = 1000
        self.writeback_rate_update_seconds = 5
        self.writeback_consider_fragment = True

    def delay_ns(self, done_sectors: int, now_ns: int) -> int:
        """How long to wait after ``done_sectors`` (util.c, bch_next_delay)."""
        self.next_ns += done_sectors * NS_PER_S // self.rate
        self.next_ns = min(self.next_ns, now_ns + 5 * NS_PER_S // 2)
        self.next_ns = max(self.next_ns, now_ns - 2 * NS_PER_S)
        return max(0, self.next_ns - now_ns)

    def update(
        self, *, dirty: int, target: int, now_ns: int, nbuckets: int, avail_nbuckets: int, in_use: int, bucket_size: int
    ) -> None:
        """One step of the controller (writeback.c, __update_writeback_rate)."""
        error = dirty - target
        proportional = quotient(error, self.writeback_rate_p_term_inverse)
        used = nbuckets - avail_nbuckets
        if self.writeback_consider_fragment and in_use > 50 and dirty > 0 and used > 0:
            fragment = used * bucket_size // dirty
            if in_use <= 57:
                term = self.writeback_rate_fp_term_low * (in_use - 50)
            elif in_use <= 64:
                term = self.writeback_rate_fp_term_mid * (in_use - 57)
            else:
                term = self.writeback_rate_fp_term_high * (in_use - 64)
            fps = dirty // used * term
            if fragment > 3 and fps > proportional:
                proportional = fps
        if (error < 0 and self.integral > 0) or (error > 0 and now_ns < self.next_ns + NS_PER_S // 1000):
            self.integral += error * self.writeback_rate_update_seconds
        self.integral_scaled = quotient(self.integral, self.writeback_rate_i_term_inverse)
        rate = min(max(proportional + self.integral_scaled, self.writeback_rate_minimum), RATE_MAX)
        self.proportional, self.target, self.change = proportional, target, rate - self.rate
        self.rate = rate


class Writeback:
    """The writeback of one cached device."""

    __slots__ = (
        "dev",
        "rate",
        "queue",
        "settled",
        "position",
        "waiting",
        "in_flight",
        "writeback_running",
        "writeback_percent",
        "writeback_delay",
        "writeback_metadata",
        "keys_done",
        "keys_failed",
        "sectors_done",
        "at_full_speed",
        "idle_rounds",
        "stopping",
        "rounds",
    )

    def __init__(self, dev: CachedDev) -> None:
        self.dev = dev
        self.rate = Rate()
        self.queue = WaitQueue(dev.cset.sched, "writeback")
        self.settled = WaitQueue(dev.cset.sched, "writeback settled")
        self.position = dev.base
        self.waiting: deque[Extent] = deque()
        self.in_flight: list[Extent] = []
        self.writeback_running = True
        self.writeback_percent = 10
        self.writeback_delay = 30
        self.writeback_metadata = True
        self.keys_done = 0
        self.keys_failed = 0
        self.sectors_done = 0
        self.idle_rounds = 0
        self.at_full_speed = False
        self.stopping = False
        self.rounds = 0

    # What requests ask.

    def wake(self) -> None:
        """Dirty data, a tunable or the state changed: look again."""
        self.queue.wake_all()

    def overlaps(self, start: int, end: int) -> bool:
        """Whether something in [start, end) is being written back now."""
        for here in self.in_flight:
            if here.start < end and start < here.end:
                return True
        return False

    async def settle(self, start: int, end: int) -> None:
        """Wait until nothing in [start, end) is being written back."""
        while self.overlaps(start, end):
            await self.settled.wait()

    def reset(self) -> None:
        """Begin anew with a slot that was just attached; what was tuned stays."""
        self.position = self.dev.base
        self.waiting.clear()
        self.stopping = False

    def note_request(self) -> None:
        """A request came in: the device is not idle any more (request.c, cached_dev_submit_bio)."""
        self.idle_rounds = 0
        if self.at_full_speed:
            self.at_full_speed = False
            self.rate.rate = 1
            self.queue.wake_all()

    # The thread.

    @property
    def _wanted(self) -> bool:
        # A detach and a flush write back even while writeback is paused; without that they would wait for ever.
        return self.writeback_running or self.dev.detaching or self.dev.flushing > 0

    @property
    def _ended(self) -> bool:
        cset = self.dev.cset
        return self.stopping or cset.stopping or cset.io_disabled or self.dev.io_disable or not self.dev.attached

    async def run(self) -> None:
        """Write back until the device is detached or the set stops (writeback.c, bch_writeback_thread)."""
        try:
            await self._run()
        except Corrupt as bad:
            # All that was copied has arrived; only the map could not be told.
            self.in_flight.clear()
            self.settled.wake_all()
            self.dev.cset.fail(str(bad))

    async def _run(self) -> None:
        dev = self.dev
        sched = dev.cset.sched
        while not self._ended:
            if dev.detaching and not dev.has_dirty and not dev.dirty_writers:
                await dev.finish_detach()
                continue
            if not dev.has_dirty or not self._wanted:
                await self.queue.wait()
                continue
            full = await self._refill()
            if self._ended:
                return
            if full and not self.waiting:
                if not dev.dirty_sectors and not dev.dirty_writers:
                    await dev.become_clean()
                else:
                    # A write has its data in the cache but not its key in the map yet.
                    await self.queue.wait(deadline_ns=sched.now_ns + NS_PER_S // 10)
                continue
            failed = await self._write_out()
            if failed and not dev.cset.io_disabled:
                await self.queue.wait(deadline_ns=sched.now_ns + RETRY_NS)
            elif full and not dev.detaching and not self._ended and dev.dirty_sectors:
                self.rounds += 1
                await self._pause()

    async def _pause(self) -> None:
        # Between two passes: writeback_delay seconds, unless a detach or a tunable cuts it short.
        deadline = self.dev.cset.sched.now_ns + self.writeback_delay * NS_PER_S
        while (
            not self._ended
            and not self.dev.detaching
            and self.dev.cset.sched.now_ns < deadline
            and self.writeback_delay
            and self.dev.flushing == 0
        ):
            await self.queue.wait(deadline_ns=deadline)

    async def _refill(self) -> bool:
        # Collects dirty extents from `position` on, wrapping once; True if the whole device was covered.
        dev = self.dev
        taken: set[int] = set()
        if dev.stripes is not None:
            await self._refill_full_stripes(dev.stripes, taken)
        start = position = self.position
        wrapped = False
        looked_at = 0
        while len(self.waiting) < KEYBUF_KEYS and not self._ended:
            stop = start if wrapped else dev.limit
            if position >= stop:
                if wrapped or start == dev.base:
                    self.position = dev.base
                    return True
                wrapped, position = True, dev.base
                continue
            if looked_at >= dev.cset.options.slice_keys:
                looked_at = 0
                await dev.cset.sched.yield_now()
                continue
            leaf = await dev.cset.btree.leaf(position)
            looked_at += len(leaf.ends) + LEAF_COST_KEYS
            position = self._collect(leaf, position, min(stop, leaf.end), taken)
        self.position = position
        return False

    async def _refill_full_stripes(self, stripes: Stripes, taken: set[int]) -> None:
        # First what costs a raid no read (writeback.c, refill_full_stripes).
        dev = self.dev
        for start, end in stripes.full_from(self.position):
            position = start
            while position < end:
                if len(self.waiting) >= KEYBUF_KEYS or self._ended:
                    return
                leaf = await dev.cset.btree.leaf(position)
                position = self._collect(leaf, position, min(end, leaf.end), taken)

    def _collect(self, leaf: Node, position: int, stop: int, taken: set[int]) -> int:
        # Puts dirty extents of a leaf in [position, stop) on `waiting`; where to go on.  What starts at a position in
        # ``taken`` is there already.
        dev = self.dev
        first = leaf.first_index(position)
        dirty = first + np.flatnonzero(np.array(leaf.meta[first:], np.uint32) & np.uint32(DIRTY))
        for index in dirty.tolist():
            if len(self.waiting) >= KEYBUF_KEYS:
                return position
            extent = leaf.extent(index)
            if extent.start >= stop:
                break
            # A write under way has newer data for the backing device, and its key is not in the map yet.  What changes
            # from now on is noticed before it is copied (`_is_current`).
            if not dev.cset.buckets.is_stale(extent.ptr):
                if extent.start not in taken and not dev.ranges.writing(extent.start - dev.base, extent.end - dev.base):
                    self.waiting.append(extent)
                    taken.add(extent.start)
                position = extent.end
        return stop

    async def _write_out(self) -> bool:
        # Copies all that is waiting; True if something could not be copied and should be tried again later.
        failed = False
        dev = self.dev
        buckets = dev.cset.buckets
        copied = False
        while self.waiting and not self._ended and self._wanted:
            # What is in the map may be in memory only.  If the backing device had it and the cache, after a crash, an
            # older clean copy, a client would read the old data now and the new data later.
            if not await dev.cset.journal.wait_for_keys():
                break
            groups: list[list[Extent]] = []
            count = delay = 0
            while self.waiting and count < IN_FLIGHT and not delay:
                # Its leaf may have left memory since it was collected, and the set may stop while we wait.
                await dev.cset.btree.leaf(self.waiting[0].start)
                if self._ended:
                    break
                group = self._next_group()
                if group:
                    groups.append(group)
                    count += len(group)
                    delay = self._delay_ns(group)
            batch = [extent for group in groups for extent in group]
            tasks = [dev.cset.sched.spawn(self._copy(group), "write back") for group in groups]
            deadline = dev.cset.sched.now_ns + delay
            done: list[Extent] = []
            for task in tasks:
                done += await task
            failed = len(done) < len(batch) or failed
            if done and dev.count_backing_error(await dev.backing.flush()):
                failed, done = True, []
            await self._clean(done, len(batch) - len(done))
            for extent in batch:
                self.in_flight.remove(extent)
                buckets.unpin(buckets.bucket_of(extent.ptr))
            copied = copied or bool(batch)
            self.settled.wake_all()
            await self._pace(deadline)
        return failed or not copied

    def _next_group(self) -> list[Extent]:
        # Neighbours on the backing device, to be written in one go (writeback.c, read_dirty); empty if what was first
        # is not to be copied now.
        group: list[Extent] = []
        sectors = 0
        while self.waiting and len(group) < GROUP_KEYS and sectors < GROUP_SECTORS:
            extent = self.waiting[0]
            if group and (extent.start != group[-1].end or self.dev.cset.btree.leaf_nowait(extent.start) is None):
                break
            self.waiting.popleft()
            if not self._is_current(extent):
                break
            group.append(extent)
            sectors += extent.end - extent.start
        for extent in group:
            self.in_flight.append(extent)
            self.dev.cset.buckets.pin_at[self.dev.cset.buckets.bucket_of(extent.ptr)] += 1
        return group

    def _is_current(self, extent: Extent) -> bool:
        # Whether the map still says what it said when the extent was collected, and no write under way is about to
        # change that.  Later writes see the extent in `in_flight`.  One that is not current is found again in the
        # next pass.
        dev = self.dev
        if dev.ranges.writing(extent.start - dev.base, extent.end - dev.base):
            return False
        leaf = dev.cset.btree.leaf_nowait(extent.start)
        if leaf is None:
            return False
        index = leaf.first_index(extent.start)
        return index < len(leaf.ends) and leaf.extent(index) == extent

    async def _copy(self, group: list[Extent]) -> list[Extent]:
        # Reads a group from the cache and writes it to the backing device; returns what arrived there.
        dev = self.dev
        cset = dev.cset
        buffers = [bytearray((extent.end - extent.start) << 9) for extent in group]
        reads = [
            cset.cache.read((extent.ptr >> 8) & PTR_SECTOR_MASK, buf, "writeback")
            for extent, buf in zip(group, buffers, strict=True)
        ]
        good = []
        for extent, buf, io in zip(group, buffers, reads, strict=True):
            error = await io
            if error:
                cset.count_io_error(error, "reading dirty data from the cache")
            elif not cset.buckets.is_stale(extent.ptr):
                good.append((extent, buf))
        writes = [(extent, dev.backing.write(extent.start - dev.base, buf, 0, "writeback")) for extent, buf in good]
        return [extent for extent, io in writes if not dev.count_backing_error(await io)]

    async def _clean(self, done: list[Extent], failed: int) -> None:
        self.keys_failed += failed
        for extent in done:
            replaced = await self.dev.cset.btree.replace(extent, Extent(extent.start, extent.end, HAS_PTR, extent.ptr))
            self.sectors_done += replaced
            if replaced:
                self.keys_done += 1
            else:
                self.keys_failed += 1

    def _delay_ns(self, group: list[Extent]) -> int:
        # How long the rate limiter wants to wait after a group.
        if self.dev.detaching or not self.writeback_percent or self.dev.flushing:
            return 0
        return self.rate.delay_ns(sum(extent.end - extent.start for extent in group), self.dev.cset.sched.now_ns)

    async def _pace(self, deadline_ns: int) -> None:
        # Waits as the rate limiter said, unless there is a reason to hurry.
        dev = self.dev
        while (
            dev.cset.sched.now_ns < deadline_ns
            and not (self._ended or dev.detaching or dev.flushing)
            and self.rate.rate != RATE_IDLE
        ):
            await self.queue.wait(deadline_ns=deadline_ns)

    # The controller.

    async def run_controller(self) -> None:
        """Adjust the rate every writeback_rate_update_seconds while there is something to adjust."""
        dev = self.dev
        sched = dev.cset.sched
        while not self._ended:
            if not dev.has_dirty or not self.writeback_percent:
                await self.queue.wait()
                continue
            deadline = sched.now_ns + self.rate.writeback_rate_update_seconds * NS_PER_S
            while sched.now_ns < deadline and not self._ended:
                await self.queue.wait(deadline_ns=deadline)
            if not self._ended and dev.has_dirty and self.writeback_percent and not self._go_idle():
                self.update_rate()

    def _go_idle(self) -> bool:
        # Nobody uses the set: write back at full speed (writeback.c, idle_counter_exceeded, set_at_max_writeback_rate).
        cset = self.dev.cset
        self.idle_rounds += 1
        count = max(1, len(cset.cached_devices()))
        if (
            not cset.idle_max_writeback_rate
            or cset.gc.running
            or any(dev.writeback.idle_rounds < count * 6 for dev in cset.cached_devices())
        ):
            return False
        for dev in cset.cached_devices():
            dev.writeback.rate.rate = RATE_IDLE
            dev.writeback.at_full_speed = True
            dev.writeback.rate.change = 0
            dev.writeback.queue.wake_all()
        return True

    def update_rate(self) -> None:
        """Feed the controller with this device's share of the target."""
        dev = self.dev
        cset = dev.cset
        buckets = cset.buckets
        self.rate.update(
            dirty=dev.dirty_sectors,
            target=self.target_sectors(),
            now_ns=cset.sched.now_ns,
            nbuckets=buckets.nbuckets,
            avail_nbuckets=buckets.avail_nbuckets,
            in_use=buckets.in_use_percent,
            bucket_size=cset.geometry.bucket_size_sectors,
        )

    def target_sectors(self) -> int:
        """How much may stay dirty: writeback_percent of the cache, shared by size (writeback.c, __calc_target_rate)."""
        cset = self.dev.cset
        cache_sectors = cset.buckets.nbuckets * cset.geometry.bucket_size_sectors - cset.flash_dirty_sectors()
        total = sum(dev.backing.size_sectors for dev in cset.cached_devices()) or 1
        share = max(1, (self.dev.backing.size_sectors << SHARE_SHIFT) // total)
        return (cache_sectors * self.writeback_percent // 100 * share) >> SHARE_SHIFT
