# SPDX-License-Identifier: GPL-2.0-only
"""`World`: the real `CacheSet` on simulated disks, in simulated time, watched by an `Oracle`.

1. `World` makes (or is given) the bytes of a cache device and of its backing devices: `Setup` says of what shape.
2. `World.up` is what a start of the engine is: superblock, recovery, attach.
3. A *story* is a coroutine that runs inside the engine's own scheduler and asks for things:
   ``await w.write(0, 8, 16, fua=True)``.  The world lets time pass: it takes the Ios that `Sched.run` returns, gives
   each a latency, and answers the one that is due next.  Everything follows from the seed.
4. Before each answer is a *point*: power may fail there.  `World.on_point` is called with its number, and
   `World.revive` makes the world that comes up after it: what each disk drew of its unflushed writes, and an oracle
   that knows what may be left.  The world it came from is untouched, so one run of a story serves all its points.
5. `World.verify` reads everything back.

A failure carries the seed, the story and the number of the point: see `SimFailure`.
"""

from __future__ import annotations

import heapq
import random
import uuid
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any

from bcachectl.engine.bdev import Bdev
from bcachectl.engine.cached_dev import CachedDev
from bcachectl.engine.front import (
    NOT_NOW,
    REQ_DISCARD,
    REQ_FLUSH,
    REQ_FUA,
    REQ_PREFLUSH,
    REQ_READ,
    REQ_SYNC,
    REQ_WRITE,
    REQ_WRITE_ZEROES,
    Request,
    Volume,
)
from bcachectl.engine.sched import NS_PER_MS, NS_PER_S, OP_NAMES, WRITE, Io, Sched, Task, WaitQueue
from bcachectl.engine.tail import TAIL_BYTES, Tail
from bcachectl.engine.write_group import commit_later, serve_placed
from bcachectl.ondisk.magic import BCACHE_MAGIC
from bcachectl.ondisk.superblock import (
    SB_BYTES,
    SB_SECTOR,
    BdevState,
    CacheMode,
    Superblock,
    decode_superblock,
    encode_superblock,
)
from tests.sim.disk import SECTOR, SimDisk
from tests.sim.oracle import BASE, ZEROS, Oracle, Write, stamps

FLASH = 100
"""Volumes of the oracle: backing devices are 0, 1 ...; flash-only volumes are numbered from here."""

IDLE_LIMIT_S = 3600
"""Simulated seconds without an Io and without a request answered after which a world counts as stuck."""

EARLY = "answered early"
"""`Io.what` of the disk's share of an Io that a mutation answered at once."""

SLICE_NS = 10_000
"""What a turn costs that a task has yielded to others."""

STEP_LIMIT = 400_000


class SimFailure(AssertionError):
    """A run that went wrong; its text says how to repeat it."""


@dataclass(frozen=True)
class Backing:
    """A backing device of a `Setup`."""

    data_sectors: int = 2048
    mode: str = "writeback"
    member: bool = True
    """Formatted together with the cache, so that it attaches by itself."""
    data_offset: int = 16
    raid_stripe_sectors: int = 0
    """A raid for which parts of a stripe of this size are expensive; 0 for none."""


@dataclass(frozen=True)
class Setup:
    """The shape of a set: 4 KiB buckets of 512-byte blocks by default, so that a node holds about 160 keys."""

    nbuckets: int = 600
    bucket_sectors: int = 8
    block_sectors: int = 1
    backings: tuple[Backing, ...] = (Backing(),)
    settles: bool = True
    atomic_sectors: int = 1
    discard: bool = False
    replacement: int = 0
    sluggish: bool = False
    """Some Ios take half a second: whatever overlaps can overlap for long."""
    options: dict[str, Any] = field(default_factory=dict)


def _uuid(tag: str) -> bytes:
    return uuid.uuid5(uuid.NAMESPACE_URL, f"sim:{tag}").bytes


def format_cache(setup: Setup, set_uuid: bytes) -> bytearray:
    """A cache device as `bcachectl format` leaves it."""
    image = bytearray(setup.nbuckets * setup.bucket_sectors * SECTOR)
    sb = Superblock(
        csum=0, offset=SB_SECTOR, version=0, magic=BCACHE_MAGIC, uuid=_uuid(f"cache{set_uuid.hex()}"),
        set_uuid=set_uuid, label=bytes(32), flags=0, seq=0, feature_compat=0, feature_incompat=0, feature_ro_compat=0,
        nbuckets=setup.nbuckets, data_offset=0, block_size=setup.block_sectors,
        bucket_size_raw=setup.bucket_sectors, nr_in_set=1, nr_this_dev=0, last_mount=0,
        first_bucket=23 // setup.bucket_sectors + 1, keys=0, d=(), obso_bucket_size_hi=0)
    if setup.discard:
        sb = sb.with_discard(True)
    if setup.replacement:
        sb = sb.with_replacement(setup.replacement)
    image[SB_SECTOR * SECTOR:SB_SECTOR * SECTOR + SB_BYTES] = encode_superblock(sb)
    return image


def format_backing(setup: Setup, number: int, set_uuid: bytes) -> bytearray:
    """A backing device whose every sector is stamped with the initial serial."""
    backing = setup.backings[number]
    image = bytearray(backing.data_offset * SECTOR)
    sb = Superblock(
        csum=0, offset=SB_SECTOR, version=1 if backing.data_offset == 16 else 4, magic=BCACHE_MAGIC,
        uuid=_uuid(f"backing{number}{set_uuid.hex()}"), set_uuid=set_uuid if backing.member else bytes(16),
        label=bytes(32), flags=0, seq=0, feature_compat=0, feature_incompat=0, feature_ro_compat=0, nbuckets=0,
        data_offset=backing.data_offset, block_size=setup.block_sectors, bucket_size_raw=0, nr_in_set=0, nr_this_dev=0,
        last_mount=0, first_bucket=0, keys=0, d=(), obso_bucket_size_hi=0)
    sb = sb.with_cache_mode(CacheMode[backing.mode.upper()])
    image[SB_SECTOR * SECTOR:SB_SECTOR * SECTOR + SB_BYTES] = encode_superblock(sb)
    return image + stamps(number, 0, backing.data_sectors, BASE)


def cache_set(sched: Sched, cache: Bdev, entropy: random.Random, options: dict[str, Any], tail: Tail) -> Any:
    """The engine under test, with its expensive checks on."""
    from bcachectl.engine.cache_set import CacheSet, Options
    return CacheSet(sched, cache, entropy=entropy, options=Options(debug_checks=True, **options), tail=tail)


class _Pending:
    # What a story waits for: one request that is out.
    __slots__ = ("done", "queue")

    def __init__(self, sched: Sched) -> None:
        self.done = False
        self.queue = WaitQueue(sched, "request")


class World:
    """One life of the engine, from power on to power off."""

    def __init__(self, setup: Setup, seed: str, *, images: list[bytearray] | None = None, oracle: Oracle | None = None,
                 wall_s: int = 1_700_000_000, engine: Callable[..., Any] | None = None,
                 read_only: bool = False, tail: bytearray | None = None) -> None:
        self.setup = setup
        self.read_only = read_only
        self.engine = engine or cache_set
        self.seed = seed
        self.random = random.Random(f"world/{seed}")
        self.set_uuid = _uuid("set")
        if images is None:
            images = [format_cache(setup, self.set_uuid)]
            images += [format_backing(setup, number, self.set_uuid) for number in range(len(setup.backings))]
        self.disks = [SimDisk("cache" if index == 0 else f"backing{index - 1}", len(image) // SECTOR,
                              seed=seed, image=image, atomic_sectors=setup.atomic_sectors)
                      for index, image in enumerate(images)]
        for disk in self.disks:
            disk.is_sluggish = setup.sluggish
        self.sched = Sched(wall_base_s=wall_s)
        stripes = [0, *(backing.raid_stripe_sectors for backing in setup.backings)]
        self.bdevs = [Bdev(self.sched, index, disk.name, size_sectors=disk.size_sectors,
                           atomic_sectors=setup.atomic_sectors, can_discard=setup.discard,
                           optimal_io_sectors=stripes[index], partial_stripes_expensive=stripes[index] > 0)
                      for index, disk in enumerate(self.disks)]
        self.tail = Tail(memoryview(tail or bytearray(TAIL_BYTES)), set_uuid=self.set_uuid, boot_id=bytes(16))
        self.oracle = oracle or Oracle()
        if oracle is None:
            for number, backing in enumerate(setup.backings):
                self.oracle.add_volume(number, backing.data_sectors, initial=BASE, settles=setup.settles)
        self.cset = self.engine(self.sched, self.bdevs[0], random.Random(f"entropy/{seed}"),
                                setup.options | ({"read_only": True} if read_only else {}), self.tail)
        self.volumes: dict[int, Volume] = {}
        self.flash: dict[int, bytes] = {}
        self.vanishing: set[int] = set()
        self.quick_writes = 0
        self.placed_writes = 0
        self.exported_writes = 0
        self.quick_random = random.Random(f"quick/{seed}")
        self.group_random = random.Random(f"group/{seed}")
        self.is_calm = True
        self.on_point: Callable[[int], None] | None = None
        self.on_io: Callable[[Io], None] | None = None
        self.mutate: Callable[[Io], bool] | None = None
        self.delay: Callable[[Io], int | None] | None = None
        self.points = 0
        self.steps = 0
        self._due: list[tuple[int, int, Io]] = []
        self._serial = 0
        self._last_progress_ns = 0

    # -- time

    def run(self, coro: Coroutine[Any, Any, Any], name: str = "story") -> Any:
        """Let the world turn until a coroutine has finished; its result."""
        task: Task[Any] = self.sched.spawn(coro, name)
        task.observed = True
        self._turn([])
        while not task.done:
            self.step()
        if task.error is not None:
            raise task.error
        return task.result

    def step(self) -> None:
        """Let the next thing happen: an answer, or a timer."""
        self.steps += 1
        if self.steps > STEP_LIMIT:
            raise SimFailure(f"no end after {self.steps} steps")
        timer_ns = self.sched.next_timer_ns()
        if self._due and (timer_ns is None or self._due[0][0] <= timer_ns):
            if self.on_point is not None:
                self.points += 1
                self.on_point(self.points)
            due_ns, _serial, io = heapq.heappop(self._due)
            self.disks[io.device].finish(io)
            self._last_progress_ns = due_ns
            self._turn([io] if io.what != EARLY else [], max(due_ns, self.sched.now_ns))
        elif timer_ns is not None:
            if timer_ns - self._last_progress_ns > IDLE_LIMIT_S * NS_PER_S:
                raise SimFailure(f"stuck: nothing but timers for an hour, at {timer_ns} ns")
            # What ends a slice goes on after the others had their turn: a little later, so that Ios come in between.
            self._turn([], timer_ns if timer_ns > self.sched.now_ns else self.sched.now_ns + SLICE_NS)
        else:
            raise SimFailure(f"deadlock: no Io and no timer, {len(self.oracle.reads)} reads in flight")

    def _turn(self, completions: list[Io], now_ns: int | None = None) -> None:
        now_ns = self.sched.now_ns if now_ns is None else now_ns
        while True:
            ios, completions = self.sched.run(now_ns, completions), []
            for io in ios:
                disk = self.disks[io.device]
                if self.on_io is not None:
                    self.on_io(io)
                if self.mutate is not None and self.mutate(io):
                    # A mutation: the engine goes on as if the Io were done, the disk still has it to do.
                    completions.append(io)
                    io = Io(io.op, io.device, io.sector, io.nsectors, io.buf and bytes(io.joined()), io.flags, EARLY)
                disk.begin(io)
                self._serial += 1
                latency_ns = disk.latency_ns()
                if self.delay is not None:
                    latency_ns = self.delay(io) or latency_ns
                heapq.heappush(self._due, (now_ns + latency_ns, self._serial, io))
            answered, self.cset.front.completed[:] = list(self.cset.front.completed), []
            if not answered and not completions:
                return
            self._last_progress_ns = now_ns
            for request in answered:
                assert not request.tag.done, "a request was answered twice"
                request.tag.done = True
                request.tag.queue.wake_all()

    async def sleep(self, milliseconds: int) -> None:
        """Wait in simulated time."""
        await self.sched.sleep_until(self.sched.now_ns + milliseconds * NS_PER_MS)

    async def together(self, *coros: Coroutine[Any, Any, Any]) -> list[Any]:
        """Run coroutines side by side and wait for all."""
        tasks = [self.sched.spawn(coro, "together") for coro in coros]
        for task in tasks:
            task.observed = True
        return [await task for task in tasks]

    # -- the engine's life

    async def up(self) -> None:
        """Start the set and register every backing device."""
        await self.cset.start()
        for number in range(len(self.setup.backings)):
            await self.register(number)
        self.find_flash()

    async def register(self, number: int) -> None:
        """Give a backing device to the engine; a read-only one does not take a device that was never attached."""
        self.volumes[number] = await self.cset.register_backing(self.bdevs[1 + number])

    def find_flash(self) -> None:
        """Look up the flash-only volumes that came up with the set."""
        for number, its_uuid in self.flash.items():
            found = [volume for volume in self.cset.volumes if volume.uuid == its_uuid]
            if found:
                self.volumes[number] = found[0]
            else:
                assert number in self.vanishing, f"flash-only volume {its_uuid.hex()} is gone"

    async def flash_create(self, number: int, sectors: int) -> None:
        """Create a flash-only volume and start to judge it."""
        before = {volume.uuid for volume in self.cset.volumes}
        await self.cset.volume_create(sectors * SECTOR)
        fresh = [volume for volume in self.cset.volumes if volume.uuid not in before]
        assert len(fresh) == 1, fresh
        self.volumes[number] = fresh[0]
        self.flash[number] = fresh[0].uuid
        self.oracle.add_volume(number, sectors, initial=ZEROS, settles=True)

    async def flash_remove(self, number: int) -> None:
        """Remove it; from now on it may be there or not, and if it is, with holes."""
        self.vanishing.add(number)
        self.oracle.end_write(self.oracle.begin_write(number, 0, self.oracle.sizes[number], discard=True))
        await self.cset.volume_remove(self.volumes.pop(number).name)

    async def tune(self, target: str, name: str, text: str) -> None:
        """Set a tunable."""
        await self.cset.tunables.set(target, name, text)

    def superblock(self, number: int) -> Superblock:
        """The superblock of a backing device as it can be read now."""
        return decode_superblock(bytes(self.disks[1 + number].now[SB_SECTOR * SECTOR:SB_SECTOR * SECTOR + SB_BYTES]))

    # -- requests

    async def _ask(self, volume: int, op: int, sector: int, nsectors: int, buf: Any, flags: int, stream: int) -> int:
        pending = _Pending(self.sched)
        request = Request(op, sector, nsectors, buf, flags, stream, pending)
        self.volumes[volume].submit(request)
        while not pending.done:
            await pending.queue.wait()
        if request.error and self.is_calm:
            raise SimFailure(f"volume {volume} {sector}+{nsectors}: request {op} failed with errno {request.error}")
        return request.error

    async def write(self, volume: int, sector: int, nsectors: int, *, fua: bool = False, preflush: bool = False,
                    sync: bool = False, stream: int = 0, flags: int = 0, quick: bool | None = None) -> int:
        """Write stamped data; the errno.  Some plain writes go the short way of an export, `Volume.batch`."""
        if quick is None:
            quick = not (fua or preflush or flags) and self.quick_random.random() < 0.4
        if quick:
            return (await self.write_batch(volume, [(sector, nsectors)], stream=stream))[0]
        flush = self.oracle.begin_flush(volume) if preflush else None
        write = self.oracle.begin_write(volume, sector, sector + nsectors, fua=fua)
        flags |= (REQ_FUA if fua else 0) | (REQ_PREFLUSH if preflush else 0) | (REQ_SYNC if sync else 0)
        data = stamps(volume, sector, sector + nsectors, write.value)
        error = await self._ask(volume, REQ_WRITE, sector, nsectors, data, flags, stream)
        self.oracle.end_write(write, error=error)
        if flush is not None:
            self.oracle.end_flush(flush, error=error)
        return error

    async def write_batch(self, volume: int, writes: list[tuple[int, int]], *, stream: int = 0) -> list[int]:
        """Offer plain writes (sector, nsectors) to the volume's batch, as an export does; what it declines goes the way
        of all requests.  The errno of each.
        """
        way = self.group_random.random()
        if way < 0.3:
            return await self.write_group(volume, writes, stream=stream)
        begun = [self.oracle.begin_write(volume, sector, sector + nsectors) for sector, nsectors in writes]
        datas = [stamps(volume, write.start, write.end, write.value) for write in begun]
        if way < 0.55:
            return await self._write_placed(volume, begun, datas, stream)
        is_done = self._write_quickly(volume, writes, datas, stream)

        async def slowly(index: int) -> int:
            error = await self._ask(volume, REQ_WRITE, *writes[index], datas[index], 0, stream)
            self.oracle.end_write(begun[index], error=error)
            return error

        for write, done in zip(begun, is_done, strict=True):
            if done:
                self.oracle.end_write(write)
        rest = [index for index, done in enumerate(is_done) if not done]
        errors = dict(zip(rest, await self.together(*[slowly(index) for index in rest]), strict=True))
        return [errors.get(index, 0) for index in range(len(writes))]

    async def write_placed(self, volume: int, writes: list[tuple[int, int]], *, stream: int = 0) -> list[int]:
        """Plain writes (sector, nsectors) that the batch places and the engine writes; the errno of each."""
        begun = [self.oracle.begin_write(volume, sector, sector + nsectors) for sector, nsectors in writes]
        datas = [stamps(volume, write.start, write.end, write.value) for write in begun]
        return await self._write_placed(volume, begun, datas, stream)

    async def _write_placed(self, volume: int, begun: list[Write], datas: list[bytes], stream: int) -> list[int]:
        # What the batch places is written by the engine, from one piece of memory; the rest goes one by one.
        batch = self.volumes[volume].batch
        writes = [(write.start, write.end - write.start) for write in begun]
        places = [NOT_NOW] * len(writes) if batch is None else batch.place(writes, stream)
        placed = [index for index, place in enumerate(places) if place != NOT_NOW]
        asks: list[Coroutine[Any, Any, list[int]]] = []
        if batch is not None and placed:
            request = Request(REQ_WRITE, 0, 0, b"".join(datas[index] for index in placed), 0, stream,
                              _Pending(self.sched))
            serve_placed(batch.dev, request)
            self.placed_writes += len(placed)

            async def together() -> list[int]:
                while not request.tag.done:
                    await request.tag.queue.wait()
                if request.error and self.is_calm:
                    raise SimFailure(f"volume {volume}: placed writes failed with errno {request.error}")
                for index in placed:
                    self.oracle.end_write(begun[index], error=request.error)
                return [request.error] * len(placed)

            asks.append(together())

        async def slowly(index: int) -> list[int]:
            error = await self._ask(volume, REQ_WRITE, *writes[index], datas[index], 0, stream)
            self.oracle.end_write(begun[index], error=error)
            return [error]

        rest = [index for index in range(len(writes)) if index not in placed]
        asks += [slowly(index) for index in rest]
        errors = [error for some in await self.together(*asks) for error in some]
        return [error for _, error in sorted(zip(placed + rest, errors, strict=True))]

    async def write_group(self, volume: int, writes: list[tuple[int, int]], *, stream: int = 0) -> list[int]:
        """Writes that an export submits together (`Volume.submit_all`); the errno of each."""
        begun = [self.oracle.begin_write(volume, sector, sector + nsectors) for sector, nsectors in writes]
        requests = [Request(REQ_WRITE, write.start, write.end - write.start,
                            stamps(volume, write.start, write.end, write.value), 0, stream,
                            _Pending(self.sched)) for write in begun]
        self.volumes[volume].submit_all(requests)

        async def one(request: Request, write: Write) -> int:
            while not request.tag.done:
                await request.tag.queue.wait()
            self.oracle.end_write(write, error=request.error)
            if request.error and self.is_calm:
                raise SimFailure(f"volume {volume}: write of {write.start} failed with errno {request.error}")
            return request.error

        return await self.together(*[one(*pair) for pair in zip(requests, begun, strict=True)])

    async def write_exported(self, volume: int, writes: list[tuple[int, int]], *, stream: int = 0) -> list[int]:
        """Writes whose data an export writes itself, as that of a ublk device does; the errno of each."""
        dev = self.volumes[volume]
        assert isinstance(dev, CachedDev)
        exported = dev.exported
        begun = [self.oracle.begin_write(volume, sector, sector + nsectors) for sector, nsectors in writes]
        datas = [stamps(volume, write.start, write.end, write.value) for write in begun]
        places = dev.batch.place(writes, stream)
        taken = [index for index, place in enumerate(places) if place != NOT_NOW]
        request = Request(REQ_WRITE, 0, 0, None, 0, stream, _Pending(self.sched))

        async def one(index: int) -> int:
            error = await self._ask(volume, REQ_WRITE, *writes[index], datas[index], 0, stream)
            self.oracle.end_write(begun[index], error=error)
            return error

        async def together() -> list[int]:
            placed, began_ns = exported.begin(), self.sched.now_ns
            dev.batch.settle()
            ios = [self.cset.cache.write(places[index] // SECTOR, datas[index], 0, "data of an export")
                   for index in taken]
            errors = [await io for io in ios]
            error = max(errors)
            if error:
                exported.failed(placed, error)
            elif not exported.written(placed, self.sched.now_ns - began_ns):
                commit_later(dev, placed, request)
                while not request.tag.done:
                    await request.tag.queue.wait()
                error = request.error
            if error:
                return await self.together(*[one(index) for index in taken])    # each begins anew
            self.exported_writes += len(taken)
            for index in taken:
                self.oracle.end_write(begun[index])
            return [0] * len(taken)

        rest = [index for index in range(len(writes)) if index not in taken]
        asks: list[Coroutine[Any, Any, Any]] = [one(index) for index in rest]
        if taken:
            asks.append(together())
        found = await self.together(*asks)
        errors = [*found[:len(rest)], *(found[-1] if taken else [])]
        return [error for _, error in sorted(zip(rest + taken, errors, strict=True))]

    def _write_quickly(self, volume: int, writes: list[tuple[int, int]], datas: list[bytes], stream: int) -> list[bool]:
        batch = self.volumes[volume].batch
        if batch is None:
            return [False] * len(writes)
        places = batch.place(writes, stream)
        failed = False
        for place, data in zip(places, datas, strict=True):
            if place != NOT_NOW:
                io = Io(WRITE, 0, place // SECTOR, len(data) // SECTOR, data, 0, "data of a batch")
                failed = bool(self._write_now(io)) or failed
        if failed:
            batch.abandon()
            return [False] * len(writes)
        batch.commit(0)
        self.quick_writes += sum(place != NOT_NOW for place in places)
        return [place != NOT_NOW for place in places]

    def _write_now(self, io: Io) -> int:
        # An Io that the export performs itself: answered before anything else happens, unless a mutation lets the disk
        # take its time.
        disk = self.disks[io.device]
        if self.on_io is not None:
            self.on_io(io)
        late = self.mutate is not None and self.mutate(io)
        if late:
            io = Io(io.op, io.device, io.sector, io.nsectors, io.buf, io.flags, EARLY)
        disk.begin(io)
        if late:
            self._serial += 1
            heapq.heappush(self._due, (self.sched.now_ns + disk.latency_ns(), self._serial, io))
            return 0
        disk.finish(io)
        return io.error

    async def zeroes(self, volume: int, sector: int, nsectors: int, *, fua: bool = False) -> int:
        """Write zeros."""
        write = self.oracle.begin_write(volume, sector, sector + nsectors, zeros=True, fua=fua)
        error = await self._ask(volume, REQ_WRITE_ZEROES, sector, nsectors, None, REQ_FUA if fua else 0, 0)
        self.oracle.end_write(write, error=error)
        return error

    async def discard(self, volume: int, sector: int, nsectors: int) -> int:
        """Discard; afterwards anything may be read until it is written."""
        write = self.oracle.begin_write(volume, sector, sector + nsectors, discard=True)
        error = await self._ask(volume, REQ_DISCARD, sector, nsectors, None, 0, 0)
        self.oracle.end_write(write, error=error)
        return error

    async def flush(self, volume: int) -> int:
        """A flush without data."""
        flush = self.oracle.begin_flush(volume)
        error = await self._ask(volume, REQ_FLUSH, 0, 0, None, 0, 0)
        self.oracle.end_flush(flush, error=error)
        return error

    async def read(self, volume: int, sector: int, nsectors: int, *, stream: int = 0, flags: int = 0,
                   nowait: bool | None = None) -> int:
        """Read and judge.  Some reads go the short way of an export, `Volume.read_nowait`."""
        read = self.oracle.begin_read(volume, sector, sector + nsectors)
        if nowait is None:
            nowait = self.random.random() < 0.3
        if nowait:
            byte = self.volumes[volume].read_nowait(sector, nsectors)
            if byte != NOT_NOW:
                self.oracle.end_read(read, self.disks[0].now[byte:byte + nsectors * SECTOR])
                return 0
        buf = bytearray(nsectors * SECTOR)
        error = await self._ask(volume, REQ_READ, sector, nsectors, buf, flags, stream)
        self.oracle.end_read(read, buf, error=error)
        return error

    # -- judging

    async def verify(self, *, twice: bool = False, everything: bool = False, chunk: int = 64, limit: int = 24) -> None:
        """Read back what writes touched (or every sector), and let the oracle judge.

        Where more than ``limit`` chunks were touched, those that the last crash left open and some others.
        """
        for volume in sorted(self.volumes):
            size = self.oracle.sizes[volume]
            wanted = set(range(0, size, chunk))
            if not everything:
                touched = {sector // chunk * chunk for number, sector in self.oracle.held if number == volume}
                wanted = {sector // chunk * chunk for (number, sector), held in self.oracle.held.items()
                          if number == volume and len(held) > 1}
                wanted.add(self.random.randrange(0, size) // chunk * chunk)
                rest = sorted(touched - wanted)
                wanted.update(self.random.sample(rest, min(len(rest), max(6, limit - len(wanted)))))
            for _ in range(2 if twice else 1):
                for start in sorted(wanted):
                    await self.read(volume, start, min(chunk, size - start), stream=start & 0xffff)

    def check_backings_alone(self, what: str, *, images: list[bytearray] | None = None) -> None:
        """A backing device whose superblock says clean, or none, must do without its cache: judge its bytes."""
        images = images or [disk.durable for disk in self.disks]
        for number, backing in enumerate(self.setup.backings):
            image = memoryview(images[1 + number])
            sb = decode_superblock(bytes(image[SB_SECTOR * SECTOR:SB_SECTOR * SECTOR + SB_BYTES]))
            if sb.state in (BdevState.NONE, BdevState.CLEAN):
                offset = backing.data_offset
                for volume, sector in list(self.oracle.held):
                    if volume == number:
                        at = (offset + sector) * SECTOR
                        self.oracle.check_image(volume, sector, image[at:at + SECTOR],
                                                f"{what}: backing device in state {sb.state.name}")

    def revive(self, seed: str, *, images: list[bytearray] | None = None, read_only: bool = False) -> World:
        """The world that comes up on ``images``; without them on all that was ever answered, as after a clean stop."""
        crashed = images is not None
        if images is None:
            assert all(disk.quiet for disk in self.disks), "Ios in flight after a stop"
            images = [bytearray(disk.now) for disk in self.disks]
        world = World(self.setup, seed, images=images, oracle=self.oracle.after_crash() if crashed else self.oracle,
                      wall_s=self.sched.wall_s + 10, engine=self.engine, read_only=read_only)
        return self._as_here(world)

    def kill(self, seed: str, chooser: random.Random, *, read_only: bool = False) -> World:
        """The world that comes up after the engine was killed now, and nothing else happened."""
        disks = [disk.outlive(chooser, seed) for disk in self.disks]
        world = World(self.setup, seed, images=[disk.durable for disk in disks], oracle=self.oracle.after_kill(),
                      wall_s=self.sched.wall_s + 10, engine=self.engine, read_only=read_only,
                      tail=bytearray(self.tail.memory))
        world.disks = disks
        return self._as_here(world)

    def _as_here(self, world: World) -> World:
        world.flash, world.vanishing = dict(self.flash), set(self.vanishing)
        world.mutate = self.mutate
        return world

    def survivors(self, chooser: random.Random) -> list[bytearray]:
        """What each disk holds if power fails now."""
        return [disk.survive(chooser) for disk in self.disks]

    def flying(self) -> str:
        """The Ios in flight, for messages."""
        return ", ".join(f"{OP_NAMES[io.op]} {io.what}@{disk.name}:{io.sector}+{io.nsectors}"
                         for disk in self.disks for io in (held.io for held in disk.flying.values()))


Story = Callable[[World], Awaitable[None]]
