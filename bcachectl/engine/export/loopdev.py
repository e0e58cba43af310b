# SPDX-License-Identifier: GPL-2.0-only
"""`LoopExport`: a volume as /dev/loopN, a loop device with direct I/O on a `bcachectl.engine.export.fuse.FuseFile`.

::

    file system -> /dev/loopN -> loop driver -> FUSE file -> this engine -> cache and backing device

Life:

1. `clean_stale` removes what an engine that was killed left behind at the same place: the loop device, the dead mount.
2. `LoopExport.start` makes the directory and the file, mounts, and sets the loop device up.
3. `LoopExport.stop` waits until nobody has the device open (a mounted file system must be unmounted first), detaches,
   unmounts and removes the file.  While a program waits in the kernel for the device, this engine has to answer it,
   so all of it happens in a thread.
4. `LoopExport.abort` does the same by force: whatever waits gets an I/O error.

The logical block is the volume's own, so requests are aligned as they are on the kernel's /dev/bcacheN.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import resource
import struct
from pathlib import Path

from bcachectl.engine.export.buffers import BufferPool
from bcachectl.engine.export.fuse import FuseFile, unmount
from bcachectl.engine.front import Volume
from bcachectl.engine.io.loop import Loop
from bcachectl.engine.io.medium import Medium
from bcachectl.engine.sched import NS_PER_MS
from bcachectl.errors import DeviceError, Refused, WrongState

ATTACH_TRIES = 16
"""Someone else may take the free loop device that we were told; then ask again."""
RELEASE_POLL_NS = 200 * NS_PER_MS
MAX_BLOCK_BYTES = 4096

_LOOP_CLR_FD, _LOOP_CONFIGURE, _LOOP_CTL_GET_FREE = 0x4C01, 0x4C0A, 0x4C82
_FLAG_READ_ONLY, _FLAG_PARTITIONS, _FLAG_DIRECT_IO = 1, 8, 16
_LOOP_CONFIG = struct.Struct("<II5Q4I64s64s32s2Q64x")
_PR_SET_IO_FLUSHER = 57
_MCL_CURRENT, _MCL_FUTURE, _MCL_ONFAULT = 1, 2, 4


class LoopExport:
    """One volume's loop device."""

    def __init__(self, loop: Loop, volume: Volume, cache: Medium, directory: str, *, stream: int,
                 can_zero: bool) -> None:
        """``can_zero``: a range of the volume is zeroed without writing zeros."""
        self.loop = loop
        self.volume = volume
        self.path = os.path.join(directory, volume.name)
        self.file = FuseFile(loop, volume, cache, BufferPool(), self.path, stream=stream, can_zero=can_zero)
        self.device: str | None = None

    async def start(self) -> str:
        """Set everything up; the name of the device, ``/dev/loop3``."""
        if os.geteuid():
            raise Refused("a loop device needs root; run the engine as root, or use --export nbd")
        if not os.path.exists("/dev/loop-control"):
            raise WrongState("/dev/loop-control: not there; load the kernel's loop module, or use --export nbd")
        path = Path(self.path)
        path.parent.mkdir(parents=True, exist_ok=True)
        clean_stale(self.path)
        path.touch(mode=0o600)
        self.file.mount()
        self.device = await self.loop.call_in_thread(
            lambda: attach(self.path, self.volume.block_size_sectors << 9, read_only=self.volume.read_only))
        return self.device

    async def is_in_use(self) -> bool:
        """Whether a mount or another program holds the device exclusively."""
        device = self.device
        return device is not None and await self.loop.call_in_thread(lambda: is_claimed(device))

    async def stop(self, *, wait: bool = True) -> None:
        """Detach and unmount, in good order; the caller has seen that the device is not in use.  Without ``wait``: at
        once, whoever uses it.
        """
        if not wait:
            self.abort()
            return
        device, self.device = self.device, None
        if device is not None:
            await self.loop.call_in_thread(lambda: detach(device, self.path))
            while backing_file(device) == self.path:        # a program that has it open delays the detaching
                await self.loop.sched.sleep_until(self.loop.sched.now_ns + RELEASE_POLL_NS)
        await self.loop.call_in_thread(self.file.unmount)
        self.file.abort()
        self._remove_file()

    def abort(self) -> None:
        """The same at once, whoever uses the device."""
        self.file.abort()
        if self.device is not None:
            detach(self.device, self.path)
            self.device = None
        self.file.unmount()
        self._remove_file()

    def _remove_file(self) -> None:
        # The directory goes with its last file; what cannot be removed now is found by the next start.
        with contextlib.suppress(OSError):
            os.unlink(self.path)
            os.rmdir(os.path.dirname(self.path))


def prepare_process() -> None:
    """Tell the kernel that this process serves a block device: it must not wait for its own dirty pages.

    Neither call is allowed everywhere; without them the engine runs, with less safety when memory is very short.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(_PR_SET_IO_FLUSHER, 1, 0, 0, 0)
    # Under a limit MCL_FUTURE would not lock memory but refuse it.
    if resource.getrlimit(resource.RLIMIT_MEMLOCK)[0] == resource.RLIM_INFINITY:
        libc.mlockall(_MCL_CURRENT | _MCL_FUTURE | _MCL_ONFAULT)


def attach(path: str, block_bytes: int, *, read_only: bool) -> str:
    """Set up a loop device with direct I/O and partitions on a file; its name."""
    flags = _FLAG_DIRECT_IO | _FLAG_PARTITIONS | (_FLAG_READ_ONLY if read_only else 0)
    fd = os.open(path, os.O_RDONLY if read_only else os.O_RDWR)
    try:
        # Before Linux 6.16 the driver takes the size that the inode has, and a FUSE file's has none until it is asked.
        os.fstat(fd)
        config = _LOOP_CONFIG.pack(fd, min(block_bytes, MAX_BLOCK_BYTES), 0, 0, 0, 0, 0, 0, 0, 0, flags,
                                   os.fsencode(path)[-63:], b"", b"", 0, 0)
        for _ in range(ATTACH_TRIES):
            control = os.open("/dev/loop-control", os.O_RDWR)
            try:
                number = fcntl.ioctl(control, _LOOP_CTL_GET_FREE)
            finally:
                os.close(control)
            name = f"/dev/loop{number}"
            device = os.open(name, os.O_RDONLY if read_only else os.O_RDWR)
            try:
                fcntl.ioctl(device, _LOOP_CONFIGURE, config)
                return name
            except OSError as error:
                if error.errno != errno.EBUSY:
                    raise
            finally:
                os.close(device)
    except OSError as error:
        raise DeviceError(f"{path}: no loop device could be set up: {error.strerror}",
                          errno=error.errno or 0) from error
    finally:
        os.close(fd)
    raise WrongState("no loop device is free; detach one (losetup --detach), or use --export nbd")


def detach(device: str, path: str) -> None:
    """Take the loop device off ``path``; nothing happens if it is not, or no longer, on it."""
    if backing_file(device) != path:
        return
    fd = os.open(device, os.O_RDONLY)
    try:
        fcntl.ioctl(fd, _LOOP_CLR_FD)
    except OSError as error:
        if error.errno != errno.ENXIO:
            raise DeviceError(f"{device}: cannot detach: {error.strerror}", errno=error.errno or 0) from error
    finally:
        os.close(fd)


def is_claimed(device: str) -> bool:
    """Whether someone has a device open exclusively.  From a thread: closing it may write back what is cached."""
    try:
        os.close(os.open(device, os.O_RDONLY | os.O_EXCL))
    except OSError as error:
        return error.errno == errno.EBUSY
    return False


def backing_file(device: str) -> str | None:
    """The file under a loop device, None if there is none."""
    try:
        text = Path("/sys/block", os.path.basename(device), "loop/backing_file").read_text(encoding="utf-8")
    except OSError:
        return None
    return text.removesuffix("\n").removesuffix(" (deleted)")


def is_stale(path: str) -> bool:
    """Whether a killed engine's mount lies at ``path``."""
    try:
        os.stat(path)
    except OSError as error:
        return error.errno == errno.ENOTCONN
    return False


def clean_all_stale(directories: list[str]) -> list[str]:
    """Remove what killed engines left below the directories of engines' sockets; the mounts that there were."""
    found = [os.path.join(root, name) for directory in directories for root, _, names in os.walk(directory)
             for name in names]
    stale = [path for path in sorted(found) if is_stale(path)]
    for path in stale:
        clean_stale(path)
        with contextlib.suppress(OSError):
            os.unlink(path)
            os.rmdir(os.path.dirname(path))
    return stale


def clean_stale(path: str) -> None:
    """Remove a killed engine's loop device and mount at ``path``; nothing happens if there is none."""
    if is_stale(path):
        for entry in sorted(Path("/sys/block").glob("loop*")):
            if backing_file(entry.name) == path:
                detach(f"/dev/{entry.name}", path)
        unmount(path)
