# SPDX-License-Identifier: GPL-2.0-only
"""`EngineHost`: one running engine, from its devices to its exports; what ``engine run`` and the demo drive.

1. The constructor opens and claims the devices (or puts an overlay over them) and makes the loop.  Nothing is written.
2. `EngineHost.start`, a coroutine of the loop: the set starts, backing devices are registered, tunables are set,
   exports appear.  Then `EngineHost.ready` says where each volume is.
3. `EngineHost.wait_for_stop` is true when a signal or a client of the control socket asks for it.
4. `EngineHost.device_in_use` names what a stop would tear away from under someone.  `EngineHost.stop`: exports end
   first, so that no request comes after; then the set writes what it has to.
5. `EngineHost.close`, whatever happened before: nothing stays mounted, attached or open.

A set that fails keeps serving what it still can; `EngineHost.failed` has the reason, and the exit status tells.  What
went wrong with one volume that came or went later is in ``warnings``, for whoever talks to the user.
"""

from __future__ import annotations

import contextlib
import errno
import gc
import json
import os
import shutil
import time
from dataclasses import dataclass, field
from typing import TextIO
from urllib.parse import quote

from bcachectl.blockdev import BlockDevice, open_device
from bcachectl.control import socket_path
from bcachectl.engine.bdev import Bdev
from bcachectl.engine.cache_set import CacheSet, Options
from bcachectl.engine.cached_dev import CachedDev
from bcachectl.engine.export.control import ControlServer
from bcachectl.engine.export.loopdev import LoopExport, prepare_process
from bcachectl.engine.export.nbd import NbdServer
from bcachectl.engine.export.nbd_direct import DirectReads
from bcachectl.engine.export.ublk import MappedVolume, UblkExport
from bcachectl.engine.export.ublk_control import UblkControl, delete_dead, is_available, left_over, mark_of
from bcachectl.engine.export.ublk_wire import DevInfo
from bcachectl.engine.front import Volume
from bcachectl.engine.io.loop import Loop, make_backend, make_entropy, make_sched
from bcachectl.engine.io.medium import Backend, Medium
from bcachectl.engine.io.overlay import Overlay
from bcachectl.engine.io.uring import RingBackend
from bcachectl.engine.sched import WaitQueue
from bcachectl.engine.tail import Tail
from bcachectl.errors import BcachectlError, Corrupt, DeviceError, Refused, UsageError, WrongState
from bcachectl.ondisk.superblock import (
    SB_BYTES,
    SB_SECTOR,
    BdevState,
    check_backing_features,
    check_superblock,
    decode_superblock,
)
from bcachectl.tailfile import TailFile, read_tail, tail_path
from bcachectl.units import format_uuid

RELEASE_TIMEOUT_S = 20.0
"""How long an engine that takes over waits for the devices of the one before: what that one had under way when it was
killed is finished first."""


@dataclass(frozen=True, slots=True)
class HostOptions:
    """What an engine is started with."""

    cache: str
    backings: tuple[str, ...] = ()
    use_loop: bool = False
    use_ublk: bool = False
    recover: bool = False
    use_nbd: bool = True
    nbd_socket: str | None = None
    read_only: bool = False
    overlay: str | None = None
    accept_newer: bool = False
    direct: bool = False
    """Image files past the page cache, as devices that are written to always are."""
    tunables: tuple[tuple[str, str], ...] = ()
    trace: str | None = None
    debug_checks: bool = False
    io_backend: str = "auto"
    tail: str | None = None
    """A file for the tail, where the set has no ublk device (`bcachectl.engine.tail`); for tests."""
    extra: dict[str, int] = field(default_factory=dict)
    """More fields of `bcachectl.engine.cache_set.Options`, for tests and benchmarks."""


@dataclass(frozen=True, slots=True)
class Ready:
    """Where a volume is to be found."""

    volume: str
    uuid: str
    size_bytes: int
    device: str | None
    uri: str | None


class EngineHost:
    """An engine in this process."""

    def __init__(self, options: HostOptions) -> None:
        self.options = options
        self.wants_stop = False
        self.block_exports: dict[str, LoopExport | UblkExport] = {}
        self.ublk: UblkControl | None = None
        self._left_over: list[DevInfo] = []
        self._has_left_devices = False
        self.nbd: NbdServer | None = None
        self.control: ControlServer | None = None
        self.trace: TextIO | None = None
        self.trace_error: str | None = None
        self.warnings: list[str] = []
        if options.use_loop and os.geteuid():
            raise Refused("a loop device needs root; run the engine as root, or use --export nbd")
        with contextlib.ExitStack() as undo:
            if options.use_ublk:
                self.ublk = UblkControl()
                undo.callback(self.ublk.close)
            self.media: list[Medium] = []
            self._overlay: Overlay | None = None
            self._is_new_overlay = False
            undo.callback(self._close_media)
            self._open_devices()
            self._check_superblocks()
            self._find_left_over()
            self._tail_file: TailFile | None = None
            self.tail = self._open_tail()
            if self._tail_file is not None:
                undo.callback(self._tail_file.close)
            if options.trace is not None:
                self.trace = _open_trace(options.trace)
                undo.callback(self.trace.close)
            self.sched = make_sched()
            self.backend = self._make_backend()
            undo.callback(self.backend.close)
            self.bdevs = [self._bdev(index) for index in range(len(self.media))]
            self.cset = CacheSet(self.sched, self.bdevs[0], entropy=make_entropy(), options=Options(
                read_only=options.read_only, accept_newer=options.accept_newer, debug_checks=options.debug_checks,
                **options.extra), tail=self.tail)
            self.loop = Loop(self.sched, self.backend, self.cset.front)
            undo.pop_all()
        self.stop_wait = WaitQueue(self.sched, "stop")
        self.loop.exports.append(self)
        self.cset.events.recording = self.trace is not None
        self._volumes_seen = -1         # not yet exported
        self._is_failure_seen = False

    # Life

    async def start(self) -> None:
        """Bring the set up and export its volumes; raises what keeps it from that."""
        options = self.options
        if options.use_loop or options.use_ublk:
            prepare_process()
        try:
            await self.cset.start()
        except Corrupt as corrupt:
            raise _naming(options.cache, corrupt) from corrupt
        try:
            await self._start_exports()
        except (BcachectlError, OSError):
            self._leave_taken_over()
            await self.stop()
            raise
        # All that is here now stays.  Otherwise Python's collector of cycles would look at each object of it again
        # whenever enough new ones came, and every request would wait 10 ms for that.
        gc.collect()
        gc.freeze()

    async def _start_exports(self) -> None:
        options = self.options
        uuid = format_uuid(self.cset.uuid)
        self.control = ControlServer(self.cset, self, self.loop, socket_path(uuid))
        self.loop.exports.append(self.control)
        for bdev in self.bdevs[1:]:
            try:
                await self.cset.register_backing(bdev)
            except Corrupt as corrupt:
                raise _naming(bdev.name, corrupt) from corrupt
        for name, text in options.tunables:
            await self._set_tunable(name, text)
        if options.use_nbd:
            path = options.nbd_socket or os.path.join(os.path.dirname(socket_path(uuid)), f"{uuid}.nbd")
            direct_reads = None
            if self.media[0].direct and isinstance(self.backend, RingBackend):
                direct_reads = DirectReads(self.backend, self.media[0].fd, self.cset.buckets, self.cset.congestion)
            self.nbd = NbdServer(self.loop, self.cset.volumes, self.media[0], os.path.abspath(path),
                                 direct_reads=direct_reads,
                                 block_bytes=max(medium.logical_block_bytes for medium in self.media))
        marks = {mark_of(self.cset.uuid, volume.uuid) for volume in self.cset.volumes}
        for info in self._left_over:
            if info.mark not in marks:
                raise WrongState(f"/dev/ublkb{info.dev_id}: belongs to a volume of this set that is not here; name its "
                                 "backing device with --backing")
        for volume in self.cset.volumes:
            await self._start_block_export(volume)
        self._volumes_seen = self._volume_count()

    def ready(self) -> list[Ready]:
        """Where the volumes are."""
        found = []
        for volume in self.cset.volumes:
            export = self.block_exports.get(volume.name)
            uri = None if self.nbd is None else f"nbd+unix:///{volume.name}?socket={quote(self.nbd.path)}"
            found.append(Ready(volume.name, format_uuid(volume.uuid), volume.size_sectors << 9,
                               None if export is None else export.device, uri))
        return found

    def places(self) -> list[dict[str, str | None]]:
        """`ready` for the control socket."""
        return [{"volume": here.volume, "device": here.device, "uri": here.uri} for here in self.ready()]

    async def wait_for_stop(self, *, deadline_ns: int | None = None) -> bool:
        """True if the engine is to stop; False at the deadline, at a warning, and when the set has just failed."""
        if self.loop.signalled:
            self.request_stop()
        if not self.wants_stop:
            await self.stop_wait.wait(deadline_ns=deadline_ns)
        return self.wants_stop

    async def device_in_use(self) -> str | None:
        """A loop or ublk device that is mounted or otherwise claimed."""
        for export in self.block_exports.values():
            if await export.is_in_use():
                return export.device
        return None

    async def stop(self) -> None:
        """End the exports, then the set.  A device that is in use is taken away all the same."""
        for name in list(self.block_exports):
            await self._stop_block_export(name)
        if self.nbd is not None:
            await self.nbd.stop()
            self.nbd = None
        await self.cset.stop()
        if self._tail_file is not None and self.cset.failed is None and not self._has_left_devices:
            # All of it is on the device.
            self._tail_file.remove()

    def close(self) -> None:
        """Give everything back, in whatever state it is."""
        for export in self.block_exports.values():
            with contextlib.suppress(DeviceError):
                export.abort()
        self.block_exports.clear()
        if self.nbd is not None:
            self.nbd.close()
        if self.control is not None:
            self.control.close()
        self.flush()
        self.loop.close()
        self.backend.close()
        if self.ublk is not None:
            self.ublk.close()
        if self.trace is not None:
            self.trace.close()
        self._close_media()
        if self._tail_file is not None:
            self._tail_file.close()

    @property
    def failed(self) -> str | None:
        """Why the set has failed, None while it has not."""
        why: str | None = self.cset.failed
        return why

    # What the loop calls

    def flush(self) -> None:
        """Once a turn: record events, pass signals and failures on, follow volumes that appear and vanish."""
        events = self.cset.events
        if events.recorded and self.trace is not None and not self.trace.closed:
            self._record(self.trace)
        if self.loop.signalled and not self.wants_stop:
            self.request_stop()
        if self.failed is not None and not self._is_failure_seen:
            self._is_failure_seen = True
            self.stop_wait.wake_all()
        if self._volumes_seen >= 0 and self._volumes_seen != self._volume_count():
            self._volumes_seen = self._volume_count()
            if self.nbd is not None:
                self.nbd.volumes = self.cset.volumes
            self.sched.spawn(self._follow_volumes(), "follow volumes")

    # What the control server asks of us

    def open_backing(self, path: str) -> Bdev:
        """Open a device that is to be attached; WrongState under an overlay, whose devices are fixed."""
        if self._overlay is not None:
            raise WrongState(f"{path}: cannot be added to an engine that runs on an overlay")
        device = self._open(path)
        self.media.append(device)
        self.bdevs.append(self._bdev(len(self.media) - 1))
        if self.nbd is not None:
            # Clients who come from now on may ask for no less than this device can do.
            self.nbd.block_bytes = max(self.nbd.block_bytes, device.logical_block_bytes)
        return self.bdevs[-1]

    def close_backing(self, bdev: Bdev) -> None:
        """Close a device that was not registered after all.  Its index stays taken."""
        self.media[bdev.index].close()

    def publish(self, volume: Volume) -> None:
        """Export a volume that has just appeared; `flush` sees that it has."""
        self.flush()

    def request_stop(self) -> None:
        """Stop in good order."""
        self.wants_stop = True
        self.stop_wait.wake_all()

    # Inside

    def _open(self, path: str) -> BlockDevice:
        is_written = not self.options.read_only and self.options.overlay is None
        device = self._open_when_free(path, write=is_written)
        for other in self.media:
            # One that was not registered after all is closed, and one whose node is gone cannot be meant.
            if other.fd >= 0 and os.path.exists(other.path) and os.path.samefile(other.path, path):
                device.close()
                raise UsageError(f"{path}: is named twice")
        return device

    def _open_when_free(self, path: str, *, write: bool) -> BlockDevice:
        deadline_s = time.monotonic() + (RELEASE_TIMEOUT_S if self.options.recover else 0)
        while True:
            try:
                return open_device(path, write=write, exclusive=True, direct=self.options.direct or None)
            except DeviceError as error:
                if error.errno == errno.EINVAL and self.options.direct:
                    raise DeviceError(f"{error}; leave out --direct", errno=error.errno) from error
                if error.errno != errno.EBUSY:
                    raise
                if time.monotonic() > deadline_s:
                    raise Refused(str(error)) from error
            time.sleep(0.02)

    def _make_backend(self) -> Backend:
        options = self.options
        if options.use_nbd and self.media[0].direct and options.io_backend != "sync" and not options.use_ublk:
            # Direct reads of many clients' requests end in the ring, so there is the place to wait for more of them.
            with contextlib.suppress(OSError):
                return make_backend(self.media, waited_in=True)
        try:
            return make_backend(self.media, options.io_backend, waited_in=options.use_ublk)
        except OSError as error:
            if not self.options.use_ublk:
                raise
            raise WrongState(f"a ublk device needs io_uring, which this kernel does not give ({error.strerror}); use "
                             "--export loop or --export nbd") from error

    def _find_left_over(self) -> None:
        # Devices of this set from an engine that was killed.  Whoever uses one waits for an engine that takes it over,
        # and would find what another engine has written meanwhile behind its back.
        options = self.options
        control = self.ublk
        if control is None and not options.read_only and options.overlay is None and is_available():
            control = UblkControl()
        if control is None:
            return
        try:
            delete_dead(control, self._set_uuid)
            self._left_over = left_over(control, self._set_uuid)
        finally:
            if control is not self.ublk:
                control.close()
        remove = f"with 'bcachectl engine stop {format_uuid(self._set_uuid)}'"
        if self._left_over and not options.recover:
            names = ", ".join(f"/dev/ublkb{info.dev_id}" for info in self._left_over)
            raise WrongState(f"{names}: left by an engine of this set that was killed; take it back with --export ublk "
                             f"--recover, or remove it {remove}")
        marks = [info.mark for info in self._left_over]
        for info in self._left_over:
            if marks.count(info.mark) > 1:
                raise WrongState(f"/dev/ublkb{info.dev_id}: is not the only ublk device of its volume; remove all of "
                                 f"this set {remove}")

    def _open_tail(self) -> Tail | None:
        options = self.options
        path = base = options.tail or tail_path(self._set_uuid)
        if options.overlay is not None:
            path = f"{options.overlay}.tail"
        if self._left_over and not os.path.exists(path):
            raise WrongState(f"{path}: is gone, where the killed engine kept the writes that it had answered last; who "
                             f"waits for /dev/ublkb{self._left_over[0].dev_id} might miss them, so it is not taken "
                             f"over; remove it with 'bcachectl engine stop {format_uuid(self._set_uuid)}'")
        if options.read_only:
            return read_tail(path if os.path.exists(path) else base, self._set_uuid)
        if self._is_new_overlay and os.path.exists(base):
            # What the overlay lies over was run by an engine that was killed.
            shutil.copyfile(base, path)
        if not (options.use_ublk or options.tail or os.path.exists(path)):
            return None
        self._tail_file = TailFile(path, self._set_uuid)
        return self._tail_file.tail

    def _open_devices(self) -> None:
        options = self.options
        bases: list[BlockDevice] = []
        for path in (options.cache, *options.backings):
            if any(os.path.exists(path) and os.path.samefile(base.path, path) for base in bases):
                raise UsageError(f"{path}: is named twice")
            bases.append(self._open(path))
            if options.overlay is None:
                self.media.append(bases[-1])
        if options.overlay is not None:
            self._is_new_overlay = not os.path.exists(options.overlay) or not os.path.getsize(options.overlay)
            try:
                self._overlay = Overlay(options.overlay, bases)
            except BaseException:
                for base in bases:
                    base.close()
                raise
            self.media.extend(self._overlay.devices)

    def _check_superblocks(self) -> None:
        # What is plainly wrong is refused before the set starts, since a set that starts writes to its cache device.
        found = []
        for medium in self.media:
            raw = bytearray(SB_BYTES)
            try:
                medium.read_into(SB_SECTOR << 9, memoryview(raw))
                found.append(decode_superblock(raw))
                check_superblock(found[-1], device_sectors=medium.size_bytes >> 9,
                                 logical_block_sectors=medium.logical_block_bytes >> 9)
                check_backing_features(found[-1])
                if found[-1].is_backing and found[-1].data_offset >= medium.size_bytes >> 9:
                    raise Corrupt("superblock", "the data offset lies beyond the end of the device (truncated?)")
            except OSError as error:
                raise DeviceError(f"{medium.path}: cannot read the superblock: {error.strerror}",
                                  errno=error.errno or 0) from error
            except Corrupt as corrupt:
                raise _naming(medium.path, corrupt) from corrupt
        cache, *backings = found
        self._set_uuid = cache.set_uuid
        if cache.is_backing:
            raise WrongState(f"{self.media[0].path}: is a backing device; name the set's cache device as --cache")
        for medium, backing in zip(self.media[1:], backings, strict=True):
            if backing.is_cache:
                raise WrongState(f"{medium.path}: is a cache device; name backing devices as --backing")
            if backing.state in (BdevState.CLEAN, BdevState.DIRTY) and backing.set_uuid != cache.set_uuid:
                raise WrongState(f"{medium.path}: belongs to set {format_uuid(backing.set_uuid)}, and "
                                 f"{self.media[0].path} is the cache of set {format_uuid(cache.set_uuid)}")

    def _close_media(self) -> None:
        for medium in self.media:
            medium.close()
        if self._overlay is not None:
            self._overlay.close()

    def _bdev(self, index: int) -> Bdev:
        medium = self.media[index]
        return Bdev(self.sched, index, os.path.abspath(medium.path), size_sectors=medium.size_bytes >> 9,
                    atomic_sectors=medium.logical_block_bytes >> 9, optimal_io_sectors=medium.optimal_io_bytes >> 9,
                    partial_stripes_expensive=medium.partial_stripes_expensive,
                    can_discard=medium.can_discard, read_only=medium.read_only)

    def _record(self, trace: TextIO) -> None:
        events = self.cset.events
        recorded, events.recorded = events.recorded, []
        try:
            trace.writelines(f"{json.dumps(event)}\n" for event in recorded)
            trace.flush()
        except OSError as error:
            # A full disk under the record is no reason to stop serving.
            self.trace_error = f"{trace.name}: recording has stopped: {error.strerror}"
            events.recording = False
            self.trace = None
            with contextlib.suppress(OSError):
                trace.close()

    def _volume_count(self) -> int:
        # Looked at once a turn, so without making the list of volumes.
        return len(self.cset.devices) + len(self.cset.flash)

    async def _set_tunable(self, name: str, text: str) -> None:
        # A name belongs to the set, or to every volume that has it.
        tunables = self.cset.tunables
        targets = [target for target in ("", *(volume.name for volume in self.cset.volumes))
                   if name in tunables.names(target)]
        if not targets:
            raise UsageError(f"--set {name}: neither the set nor a volume has a tunable of that name")
        for target in targets:
            await tunables.set(target, name, text)

    async def _start_block_export(self, volume: MappedVolume) -> None:
        if self.options.use_ublk:
            await self._start_ublk(volume)
        elif self.options.use_loop:
            await self._start_loop(volume)

    async def _start_ublk(self, volume: MappedVolume) -> None:
        assert self.ublk is not None and isinstance(self.backend, RingBackend), "ublk was opened with a ring"
        below = self.media[volume.backing.index] if isinstance(volume, CachedDev) else None
        mark = mark_of(self.cset.uuid, volume.uuid)
        export = UblkExport(
            self.loop, self.backend, self.ublk, volume, self.media[0], self.cset.buckets,
            mark=mark, stream=len(self.block_exports) + 1,
            block_bytes=max(medium.logical_block_bytes for medium in self.media),
            can_discard=below is None or below.can_discard, can_zero=below is None or below.can_zero)
        self.block_exports[volume.name] = export
        for info in self._left_over:
            if info.mark == mark:
                self._left_over.remove(info)
                await export.recover(info)
                return
        await export.start()

    def _leave_taken_over(self) -> None:
        # This start fails.  Whoever uses a device that was taken over waits for the next one.
        for name, export in list(self.block_exports.items()):
            if isinstance(export, UblkExport) and export.is_taken_over:
                del self.block_exports[name]
                export.abort()
                self._has_left_devices = True

    async def _start_loop(self, volume: Volume) -> None:
        directory = os.path.splitext(socket_path(format_uuid(self.cset.uuid)))[0]
        # A flash-only volume forgets what it held; a cached device passes it on.
        can_zero = not isinstance(volume, CachedDev) or self.media[volume.backing.index].can_zero
        export = LoopExport(self.loop, volume, self.media[0], directory, stream=len(self.block_exports) + 1,
                            can_zero=can_zero)
        self.block_exports[volume.name] = export
        await export.start()

    async def _stop_block_export(self, name: str) -> None:
        export = self.block_exports.pop(name)
        await export.stop(wait=not await export.is_in_use())

    async def _follow_volumes(self) -> None:
        # A volume that cannot be exported, or taken away, is no reason to end: the others are in use.
        names = {volume.name for volume in self.cset.volumes}
        for volume in self.cset.volumes:
            if volume.name not in self.block_exports:
                try:
                    await self._start_block_export(volume)
                except (BcachectlError, OSError) as error:
                    self._warn(f"{volume.name}: has no block device: {error}")
        for name in sorted(self.block_exports):
            if name not in names:
                try:
                    await self._stop_block_export(name)
                except (BcachectlError, OSError) as error:
                    self._warn(f"{name}: its block device was not taken away: {error}")

    def _warn(self, text: str) -> None:
        self.warnings.append(text)
        self.stop_wait.wake_all()


def settle(cache: str) -> int:
    """Have the writes that a killed engine answered put into the journal of its set: start it, and stop it.  How many
    keys there were.
    """
    host = EngineHost(HostOptions(cache=cache, use_nbd=False))

    async def life() -> None:
        await host.start()
        await host.stop()

    try:
        host.loop.run(life())
        if host.failed is not None:
            raise DeviceError(f"{cache}: {host.failed}")
        return host.cset.inherited_keys
    finally:
        host.close()


def _naming(path: str, corrupt: Corrupt) -> Corrupt:
    # The same complaint with the device's name, which ondisk does not know, and with what to do.
    where = corrupt.where if path in str(corrupt) else f"{path}: {corrupt.where}"
    return Corrupt(where, f"{corrupt.why}; `bcachectl fsck` tells more")


def _open_trace(path: str) -> TextIO:
    try:
        return open(path, "w", encoding="utf-8")
    except OSError as error:
        raise DeviceError(f"{path}: cannot record events there: {error.strerror}", errno=error.errno or 0) from error
