# SPDX-License-Identifier: GPL-2.0-only
"""`BlockDevice`: a real device or an image file, opened with the care that writing to someone's disk asks for.

`open_device` is the only place that opens a device.  It refuses, in one sentence each, what can never be right: a
missing path, a directory, a character device, an empty file, a device that someone else holds.  Who holds it:

* a block device is claimed with O_EXCL, which the kernel gives to one holder (a mount, md, dm, bcache, or us);
* an image file is locked with flock: LOCK_EX by the one who writes, LOCK_SH by an engine that only reads.  Commands
  that look at a file open it without ``exclusive`` and take no lock.

A file that is a metadata image (`bcachectl.metaimage`) is read as the device that it was made of.  It holds no data, so
it is refused wherever something is to be written or a set is to be run.

Offsets and lengths are bytes.  Every failure is a `DeviceError` with the errno; the engine's own Ios go to ``fd``
directly (`bcachectl.engine.io`) or to the methods `read_into`, `write_from` and so on, which raise OSError instead.
With O_DIRECT, buffers that are not aligned are copied through an aligned one here.  What "aligned" is says a block
device's logical block, and for a file its file system: a file that takes only whole 4 KiB is a device of such blocks.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import stat
import struct
from contextlib import suppress
from types import TracebackType

from bcachectl import metaimage
from bcachectl.errors import DeviceError

Buffer = bytes | bytearray | memoryview
"""What a write takes its bytes from."""

_BLKROGET, _BLKSSZGET, _BLKIOOPT, _BLKGETSIZE64 = 0x125E, 0x1268, 0x1279, 0x80081272
_BLKDISCARD, _BLKZEROOUT = 0x1277, 0x127F
_KEEP_SIZE, _PUNCH_HOLE = 1, 2
_NOT_SUPPORTED = (errno.EOPNOTSUPP, errno.ENOTTY, errno.ENOSYS)

_ZERO_CHUNK_BYTES = 1 << 20
"""How much `BlockDevice.zero` writes at a time where the device knows no quicker way."""

_FILE_BLOCK_BYTES = 512
"""Logical block of an image file: what tears at power loss is whatever the file system under it does with a sector."""
_MAX_ALIGN_BYTES = 4096
"""More than this no file system asks of direct I/O, and no logical block of bcache could be as large."""

_AT_EMPTY_PATH, _STATX_DIOALIGN = 0x1000, 0x2000
_STATX_BYTES, _STATX_DIO_AT = 256, 152      # struct statx: mask u32 ... | memory alignment u32 | offset alignment u32

_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
_libc.statx.argtypes = (ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_uint, ctypes.c_char_p)


def _fallocate(fd: int, mode: int, offset_bytes: int, length_bytes: int) -> None:
    # os.posix_fallocate has no mode.  EINTR is retried as the os module does.
    while _libc.fallocate(fd, mode | _KEEP_SIZE, offset_bytes, length_bytes):
        code = ctypes.get_errno()
        if code != errno.EINTR:
            raise OSError(code, os.strerror(code))


class BlockDevice:
    """An open device; made by `open_device`.

    ``can_discard``: it takes a discard.  ``can_zero``: it zeroes a range without being sent the zeros.
    ``nowait_flag``: what preadv is given to read only what is in memory; 0 where the file system (tmpfs) has no such
    thing, and a read of it is taken for quick.  ``image``: what the file holds if it is a metadata image.
    """

    __slots__ = ("path", "fd", "size_bytes", "logical_block_bytes", "optimal_io_bytes",
                 "partial_stripes_expensive", "is_block", "can_discard",
                 "can_zero", "read_only", "direct", "device_number", "nowait_flag", "image")

    def __init__(self, path: str, fd: int, *, read_only: bool, direct: bool) -> None:
        status = os.fstat(fd)
        self.path = path
        self.fd = fd
        self.read_only = read_only
        self.direct = direct
        self.is_block = stat.S_ISBLK(status.st_mode)
        self.device_number = status.st_rdev if self.is_block else 0
        self.nowait_flag = _nowait_flag(fd)
        if self.is_block:
            self.size_bytes = _ioctl_number(fd, _BLKGETSIZE64, "Q")
            self.logical_block_bytes = _ioctl_number(fd, _BLKSSZGET, "i")
            self.optimal_io_bytes = _ioctl_number(fd, _BLKIOOPT, "I")
            self.partial_stripes_expensive = is_parity_raid(status.st_rdev)
            self.can_discard = not read_only and _queue_limit(status.st_rdev, "discard_max_bytes") > 0
            self.can_zero = not read_only and _queue_limit(status.st_rdev, "write_zeroes_max_bytes") > 0
        else:
            self.size_bytes = status.st_size
            self.logical_block_bytes = _direct_align_bytes(fd) if direct else _FILE_BLOCK_BYTES
            self.optimal_io_bytes = 0
            self.partial_stripes_expensive = False
            self.can_discard = self.can_zero = not read_only
        self.image = None if self.is_block else metaimage.open_image(path, fd)
        if self.image is not None:
            self.size_bytes = self.image.size_sectors << 9
            self.logical_block_bytes = self.image.logical_block_bytes

    def __enter__(self) -> BlockDevice:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 traceback: TracebackType | None) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<BlockDevice {self.path} fd {self.fd}>"

    def close(self) -> None:
        """Close the descriptor, and with it give up the claim or the lock; a second call does nothing."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    @property
    def plain_fd(self) -> int:
        """Where pread into any memory gives what `read` does; -1 if it does not."""
        return self.fd if self.image is None and not self.direct else -1

    # The methods for commands: DeviceError on failure.

    def read(self, offset_bytes: int, nbytes: int) -> bytes:
        """Exactly ``nbytes``; DeviceError if the range leaves the device or cannot be read."""
        self._check_range("read", offset_bytes, nbytes)
        try:
            if self.image is None and not self.direct:
                # As a rule all of it comes at once, and is not copied again.
                data = os.pread(self.fd, nbytes, offset_bytes)
                if len(data) == nbytes:
                    return data
            buf = bytearray(nbytes)
            self.read_into(offset_bytes, memoryview(buf))
        except OSError as error:
            raise self._failed("read", offset_bytes, error) from error
        return bytes(buf)

    def announce(self, offset_bytes: int, nbytes: int) -> None:
        """A read of these bytes will follow: what it brings into the page cache may begin now.  Whether it can be read
        is said by the read.
        """
        if self.image is None and not self.direct:
            with suppress(OSError):
                os.posix_fadvise(self.fd, offset_bytes, nbytes, os.POSIX_FADV_WILLNEED)

    def write(self, offset_bytes: int, data: Buffer) -> None:
        """Write all of ``data``; durable only after `flush`."""
        self._check_range("write", offset_bytes, len(data))
        try:
            self.write_from(offset_bytes, data)
        except OSError as error:
            raise self._failed("write", offset_bytes, error) from error

    def flush(self) -> None:
        """Make everything written so far durable."""
        try:
            self.sync()
        except OSError as error:
            raise self._failed("flush", 0, error) from error

    def discard(self, offset_bytes: int, length_bytes: int) -> None:
        """Tell the device that the range is not needed: BLKDISCARD, or a hole punched into a file."""
        self._check_range("discard", offset_bytes, length_bytes)
        try:
            self.trim(offset_bytes, length_bytes)
        except OSError as error:
            raise self._failed("discard", offset_bytes, error) from error

    def zero(self, offset_bytes: int, length_bytes: int) -> None:
        """Make the range read as zeros."""
        self._check_range("zero", offset_bytes, length_bytes)
        try:
            self.write_zeroes(offset_bytes, length_bytes)
        except OSError as error:
            raise self._failed("zero", offset_bytes, error) from error

    # The methods for the engine's backends: OSError on failure.

    def read_into(self, offset_bytes: int, buf: memoryview) -> None:
        """Fill ``buf``; the end of a file that shrank is EIO."""
        if self.image is not None:
            self.image.read_into(offset_bytes, buf)
        elif self.direct and not self._is_aligned(offset_bytes, buf):
            mask = self.logical_block_bytes - 1
            start, end = offset_bytes & ~mask, (offset_bytes + len(buf) + mask) & ~mask
            with mmap.mmap(-1, end - start) as bounce:
                with memoryview(bounce) as view:
                    self._read_aligned(start, view)
                    buf[:] = view[offset_bytes - start:][:len(buf)]
        else:
            self._read_aligned(offset_bytes, buf)

    def write_from(self, offset_bytes: int, data: Buffer) -> None:
        """Write all of ``data`` into the device's (or the page) cache."""
        if self.read_only:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        view = memoryview(data).cast("B")
        if self.direct and not self._is_aligned(offset_bytes, view):
            if (offset_bytes | len(view)) & (self.logical_block_bytes - 1):
                raise OSError(errno.EINVAL, f"not a multiple of the logical block of {self.logical_block_bytes} bytes")
            with mmap.mmap(-1, max(len(view), 1)) as bounce:
                bounce[:] = view
                with memoryview(bounce) as aligned:
                    self._write_aligned(offset_bytes, aligned)
        else:
            self._write_aligned(offset_bytes, view)

    def sync(self) -> None:
        """fdatasync."""
        os.fdatasync(self.fd)

    def trim(self, offset_bytes: int, length_bytes: int) -> None:
        """Discard; a device that turns out not to know it raises EOPNOTSUPP and loses ``can_discard``."""
        if self.read_only:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        if not self.can_discard:
            raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))
        try:
            if self.is_block:
                fcntl.ioctl(self.fd, _BLKDISCARD, struct.pack("QQ", offset_bytes, length_bytes))
            else:
                _fallocate(self.fd, _PUNCH_HOLE, offset_bytes, length_bytes)
        except OSError as error:
            if error.errno not in _NOT_SUPPORTED:
                raise
            self.can_discard = False
            raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP)) from error

    def write_zeroes(self, offset_bytes: int, length_bytes: int) -> None:
        """Zeros by BLKZEROOUT, by a hole in a file, by plain writes where neither is known.

        A hole and not allocated zeros: an image stays sparse, and a client's fstrim gives space back.
        """
        if self.read_only:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        try:
            if self.is_block:
                fcntl.ioctl(self.fd, _BLKZEROOUT, struct.pack("QQ", offset_bytes, length_bytes))
            else:
                _fallocate(self.fd, _PUNCH_HOLE, offset_bytes, length_bytes)
            return
        except OSError as error:
            if error.errno not in _NOT_SUPPORTED:
                raise
        zeros = memoryview(bytes(min(_ZERO_CHUNK_BYTES, length_bytes)))
        end = offset_bytes + length_bytes
        while offset_bytes < end:
            piece = zeros[:end - offset_bytes]
            self.write_from(offset_bytes, piece)
            offset_bytes += len(piece)

    def _read_aligned(self, offset_bytes: int, buf: memoryview) -> None:
        done = 0
        while done < len(buf):
            got = os.preadv(self.fd, [buf[done:]], offset_bytes + done)
            if got == 0:
                raise OSError(errno.EIO, "the device ends inside the range")
            done += got

    def _write_aligned(self, offset_bytes: int, buf: memoryview) -> None:
        done = 0
        while done < len(buf):
            done += os.pwritev(self.fd, [buf[done:]], offset_bytes + done)

    def _is_aligned(self, offset_bytes: int, buf: memoryview) -> bool:
        mask = self.logical_block_bytes - 1
        if (offset_bytes | len(buf)) & mask:
            return False
        # Only writable memory has an address that ctypes tells; the rest is copied.
        if not len(buf):
            return True
        return not buf.readonly and not ctypes.addressof(ctypes.c_char.from_buffer(buf)) & mask

    def _check_range(self, verb: str, offset_bytes: int, nbytes: int) -> None:
        if offset_bytes < 0 or nbytes < 0 or offset_bytes + nbytes > self.size_bytes:
            raise DeviceError(f"{self.path}: cannot {verb} {nbytes} bytes at byte {offset_bytes}: "
                              f"the device ends at byte {self.size_bytes}", errno=errno.EINVAL)

    def _failed(self, verb: str, offset_bytes: int, error: OSError) -> DeviceError:
        code = error.errno or errno.EIO
        return DeviceError(f"{self.path}: {verb} at byte {offset_bytes} failed: {error.strerror}", errno=code)


def open_device(path: str, *, write: bool = False, exclusive: bool = False, direct: bool | None = None) -> BlockDevice:
    """Open a block device or an image file.

    ``exclusive`` claims it (see the module's text).  ``direct`` asks for O_DIRECT; None means O_DIRECT for a block
    device that is opened for writing and claimed, which is how the engine opens one, and the page cache otherwise.
    Raises `DeviceError` that names the path and says what is wrong.
    """
    path = os.fspath(path)
    try:
        status = os.stat(path)
    except OSError as error:
        raise _not_opened(path, error) from error
    is_block = stat.S_ISBLK(status.st_mode)
    if stat.S_ISDIR(status.st_mode):
        raise DeviceError(f"{path}: is a directory; name a block device or an image file", errno=errno.EISDIR)
    if not is_block and not stat.S_ISREG(status.st_mode):
        kind = "a character device" if stat.S_ISCHR(status.st_mode) else "neither a block device nor a plain file"
        raise DeviceError(f"{path}: is {kind}; name a block device or an image file", errno=errno.ENOTBLK)
    use_direct = is_block and write and exclusive if direct is None else direct
    flags = os.O_RDWR if write else os.O_RDONLY
    flags |= os.O_EXCL if is_block and exclusive else 0
    flags |= os.O_DIRECT if use_direct else 0
    try:
        fd = os.open(path, flags)
    except OSError as error:
        raise _not_opened(path, error) from error
    try:
        if exclusive and not is_block:
            _lock_file(path, fd, write=write)
        device = BlockDevice(path, fd, read_only=not write, direct=use_direct)
        if write and is_block and _ioctl_number(fd, _BLKROGET, "i"):
            raise DeviceError(f"{path}: is a read-only device", errno=errno.EROFS)
        if device.image is not None and (write or exclusive):
            raise DeviceError(f"{path}: is a metadata image, which holds no data and is only looked at; "
                              "`bcachectl image extract` makes a device of it that can be written", errno=errno.EROFS)
        if device.size_bytes < _FILE_BLOCK_BYTES:
            raise DeviceError(f"{path}: is empty (0 sectors)", errno=errno.ENODATA)
    except OSError as error:
        os.close(fd)
        raise _not_opened(path, error) from error
    except DeviceError:
        os.close(fd)
        raise
    return device


def _not_opened(path: str, error: OSError) -> DeviceError:
    code = error.errno or errno.EIO
    why = {
        errno.ENOENT: "no such file or device",
        errno.EACCES: "permission denied; root, or the group that owns the device, may open it",
        errno.EPERM: "permission denied; root, or the group that owns the device, may open it",
        errno.EBUSY: "is in use (mounted, or held by the kernel or another program)",
        errno.EROFS: "is read-only",
        errno.ENXIO: "no such device (its driver has no device behind this node)",
        errno.ENOMEDIUM: "has no medium",
        errno.EINVAL: "does not take direct I/O, as some file systems do not",
    }.get(code, error.strerror)
    return DeviceError(f"{path}: {why}", errno=code)


def _lock_file(path: str, fd: int, *, write: bool) -> None:
    try:
        fcntl.flock(fd, (fcntl.LOCK_EX if write else fcntl.LOCK_SH) | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise DeviceError(f"{path}: is in use by another engine or command; stop it first",
                          errno=errno.EBUSY) from error


def _ioctl_number(fd: int, request: int, kind: str) -> int:
    raw = fcntl.ioctl(fd, request, bytes(struct.calcsize(kind)))
    value: int = struct.unpack(kind, raw)[0]
    return value


def _direct_align_bytes(fd: int) -> int:
    # What offsets, lengths and memory must be multiples of in direct I/O on a plain file.  OSError EINVAL if there is
    # none.  Kernels before 6.1, and some file systems, do not tell; then the smallest read that succeeds does.
    buf = ctypes.create_string_buffer(_STATX_BYTES)
    if not _libc.statx(fd, b"", _AT_EMPTY_PATH, _STATX_DIOALIGN, buf):
        mask: int = struct.unpack_from("=I", buf)[0]
        memory_bytes: int
        offset_bytes: int
        memory_bytes, offset_bytes = struct.unpack_from("=II", buf, _STATX_DIO_AT)
        if mask & _STATX_DIOALIGN:
            if not 0 < offset_bytes <= _MAX_ALIGN_BYTES or memory_bytes > _MAX_ALIGN_BYTES:
                raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
            return max(memory_bytes, offset_bytes, _FILE_BLOCK_BYTES)
    nbytes = _FILE_BLOCK_BYTES
    with mmap.mmap(-1, 2 * _MAX_ALIGN_BYTES) as memory, memoryview(memory) as view:
        while True:
            try:
                os.preadv(fd, [view[nbytes:2 * nbytes]], nbytes)
                return nbytes
            except OSError as error:
                if error.errno != errno.EINVAL or nbytes == _MAX_ALIGN_BYTES:
                    raise
            nbytes *= 2


def _nowait_flag(fd: int) -> int:
    try:
        os.preadv(fd, [bytearray(1)], 0, os.RWF_NOWAIT)
    except OSError as error:
        return 0 if error.errno == errno.EOPNOTSUPP else os.RWF_NOWAIT
    return os.RWF_NOWAIT


def is_parity_raid(device_number: int, *, sys: str = "/sys") -> bool:
    """Whether a part of a stripe costs a read before it can be written: md of level 4, 5 or 6, or a device on one.

    The kernel keeps this as a limit of the queue (raid5.c, raid5_set_limits) that sysfs does not show.
    """
    where = os.path.realpath(f"{sys}/dev/block/{os.major(device_number)}:{os.minor(device_number)}")
    for disk in (where, os.path.dirname(where)):        # a partition's disk is the directory above
        if _line(f"{disk}/md/level") in ("raid4", "raid5", "raid6"):
            return True
        for name in os.listdir(f"{disk}/slaves") if os.path.isdir(f"{disk}/slaves") else ():
            major, _, minor = _line(f"{disk}/slaves/{name}/dev").partition(":")
            if minor and is_parity_raid(os.makedev(int(major), int(minor)), sys=sys):
                return True
    return False


def _line(path: str) -> str:
    # What a file of sysfs says; nothing if there is none.
    try:
        with open(path, encoding="ascii") as file:
            return file.read().strip()
    except OSError:
        return ""


def _queue_limit(device_number: int, name: str) -> int:
    # A partition has no queue of its own; its disk is the directory above.
    where = f"/sys/dev/block/{os.major(device_number)}:{os.minor(device_number)}"
    for queue in (f"{where}/queue", f"{where}/../queue"):
        try:
            with open(f"{queue}/{name}", encoding="ascii") as file:
                return int(file.read())
        except OSError:
            continue
    return 0
