# SPDX-License-Identifier: GPL-2.0-only
"""`Overlay`: a copy-on-write file over read-only devices, so that an engine can run without writing to them.

All devices of a set share one file.  It is sparse: as long as the largest device's data, as big as what was written.

::

    byte 0      header, 4096 bytes, little-endian:
                  magic 16 | version u32 | block size u32 (4096) | devices u32 | reserved u32
                  per device, 32 bytes: size u64 | fingerprint u64 | bitmap at byte u64 | data at byte u64
                  from byte 2080 on, per device: when it was changed last, in ns since 1970, u64; 0 of a block device
    bitmaps     one bit per 4 KiB block of the device, least significant first: 1 = the block is in the overlay
    data        block n of a device at data + n * 4096

The fingerprint is the CRC-32 of a device's first 8 KiB, superblock included, when the overlay was made: an overlay over
devices that ran elsewhere since would be a mix of two histories, and is refused.  So is one over a file that was
changed in any way, by the file's own word.  A block device has none: who writes past the superblock of one by hand
gets that mix.

An overlay behaves as a device with a volatile cache.  A block's bit is set in memory when it is written; `sync` makes
the data durable first, then the bits.  So a bit on disk always has its data, whatever power loss takes.
"""

from __future__ import annotations

import errno
import os
import struct
import zlib

from bcachectl.blockdev import BlockDevice, open_device
from bcachectl.errors import DeviceError, WrongState

OVERLAY_BLOCK_BYTES = 4096
"""Granularity of the copy: a smaller write copies the rest of its block from the device."""

MAX_OVERLAY_DEVICES = 64
"""More would not fit the header."""

_MAGIC = b"bcachectl-cow\0\0\0"
_VERSION = 1
_HEADER = struct.Struct("<16sIIII")
_ENTRY = struct.Struct("<QQQQ")
_CHANGED = struct.Struct("<Q")
_CHANGED_BYTES = _HEADER.size + MAX_OVERLAY_DEVICES * _ENTRY.size
_HEADER_BYTES = 4096
_FINGERPRINT_BYTES = 8192
_BITMAP_PAGE_BYTES = 4096


class OverlayDevice:
    """A `bcachectl.engine.io.medium.Medium`: reads from the overlay what is there, the rest from the device."""

    def __init__(self, overlay_fd: int, base: BlockDevice, *, bitmap_bytes: int, data_bytes: int) -> None:
        self.fd = -1
        self.base = base
        self.path = base.path
        self.size_bytes = base.size_bytes
        self.logical_block_bytes = base.logical_block_bytes
        self.optimal_io_bytes = base.optimal_io_bytes
        self.partial_stripes_expensive = base.partial_stripes_expensive
        self.is_block = base.is_block
        self.direct = False
        self.can_discard = False
        self.can_zero = False
        self.read_only = False
        self.nowait_flag = 0
        self._overlay_fd = overlay_fd
        self._bitmap_start = bitmap_bytes
        self._data_start = data_bytes
        self._bits = bytearray(_bitmap_length(base.size_bytes))
        self._dirty_pages: set[int] = set()
        self._is_written = False
        _pread_all(overlay_fd, memoryview(self._bits), bitmap_bytes)

    def read_into(self, offset_bytes: int, buf: memoryview) -> None:
        """Fill ``buf`` from both, run by run."""
        position, end = offset_bytes, offset_bytes + len(buf)
        while position < end:
            block = position // OVERLAY_BLOCK_BYTES
            copied = self._has(block)
            block += 1
            while block * OVERLAY_BLOCK_BYTES < end and self._has(block) == copied:
                block += 1
            run_end = min(end, block * OVERLAY_BLOCK_BYTES)
            piece = buf[position - offset_bytes:run_end - offset_bytes]
            if copied:
                _pread_all(self._overlay_fd, piece, self._data_start + position)
            else:
                self.base.read_into(position, piece)
            position = run_end

    def write_from(self, offset_bytes: int, data: bytes | bytearray | memoryview) -> None:
        """Write to the overlay; blocks that are not there yet and not written in full are copied first."""
        view = memoryview(data).cast("B")
        end = offset_bytes + len(view)
        if end > self.size_bytes:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self._copy_edges(offset_bytes, end)
        _pwrite_all(self._overlay_fd, view, self._data_start + offset_bytes)
        self._mark(offset_bytes, end)

    def sync(self) -> None:
        """The data, then the bits that vouch for it."""
        if not self._is_written:
            return
        os.fdatasync(self._overlay_fd)
        if self._dirty_pages:
            for page in sorted(self._dirty_pages):
                start = page * _BITMAP_PAGE_BYTES
                part = memoryview(self._bits)[start:start + _BITMAP_PAGE_BYTES]
                _pwrite_all(self._overlay_fd, part, self._bitmap_start + start)
            os.fdatasync(self._overlay_fd)
            self._dirty_pages.clear()
        self._is_written = False

    def trim(self, offset_bytes: int, length_bytes: int) -> None:
        """Not supported: the device below keeps its blocks anyway."""
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

    def write_zeroes(self, offset_bytes: int, length_bytes: int) -> None:
        """Zeros, written in full."""
        end = offset_bytes + length_bytes
        zeros = memoryview(bytes(min(length_bytes, 1 << 20)))
        while offset_bytes < end:
            piece = zeros[:end - offset_bytes]
            self.write_from(offset_bytes, piece)
            offset_bytes += len(piece)

    def close(self) -> None:
        """Close the device below; what was not made durable by `sync` is lost, as a device's volatile cache is."""
        self.base.close()

    def _has(self, block: int) -> bool:
        return bool(self._bits[block >> 3] >> (block & 7) & 1)

    def _copy_edges(self, start: int, end: int) -> None:
        first, last = start // OVERLAY_BLOCK_BYTES, (end - 1) // OVERLAY_BLOCK_BYTES
        for block in (first, last) if last != first else (first,):
            block_start = block * OVERLAY_BLOCK_BYTES
            block_end = min(block_start + OVERLAY_BLOCK_BYTES, self.size_bytes)
            if (start > block_start or end < block_end) and not self._has(block):
                buf = bytearray(block_end - block_start)
                self.base.read_into(block_start, memoryview(buf))
                _pwrite_all(self._overlay_fd, memoryview(buf), self._data_start + block_start)

    def _mark(self, start: int, end: int) -> None:
        self._is_written = True
        for block in range(start // OVERLAY_BLOCK_BYTES, (end - 1) // OVERLAY_BLOCK_BYTES + 1):
            if not self._has(block):
                self._bits[block >> 3] |= 1 << (block & 7)
                self._dirty_pages.add((block >> 3) // _BITMAP_PAGE_BYTES)


class Overlay:
    """The overlay file of a list of devices, made or opened again."""

    def __init__(self, path: str, bases: list[BlockDevice]) -> None:
        if len(bases) > MAX_OVERLAY_DEVICES:
            raise WrongState(f"{path}: an overlay takes at most {MAX_OVERLAY_DEVICES} devices")
        for base in bases:
            if not base.read_only:
                raise WrongState(f"{base.path}: must be opened read-only under an overlay")
        self.path = path
        is_new = not os.path.exists(path)
        if is_new:
            with open(path, "xb"):
                pass
        try:
            if os.path.getsize(path) == 0:
                _make(path, bases)
            self._file = open_device(path, write=True, exclusive=True)
        except OSError as error:
            raise DeviceError(f"{path}: cannot make the overlay: {error.strerror}", errno=error.errno or 0) from error
        try:
            self.devices = self._open(bases)
        except WrongState:
            self._file.close()
            raise

    def close(self) -> None:
        """Close the file; the devices are closed by whoever opened them."""
        self._file.close()

    def _open(self, bases: list[BlockDevice]) -> list[OverlayDevice]:
        header = self._file.read(0, _HEADER_BYTES)
        magic, version, block_bytes, count, _ = _HEADER.unpack_from(header)
        if magic != _MAGIC:
            raise WrongState(f"{self.path}: is not an overlay of bcachectl; name a new file")
        if (version, block_bytes) != (_VERSION, OVERLAY_BLOCK_BYTES):
            raise WrongState(f"{self.path}: is an overlay of version {version}; this program knows version {_VERSION}")
        if count != len(bases):
            raise WrongState(f"{self.path}: is an overlay over {count} devices, not {len(bases)}")
        devices = []
        for index, base in enumerate(bases):
            size_bytes, fingerprint, bitmap_bytes, data_bytes = \
                _ENTRY.unpack_from(header, _HEADER.size + index * _ENTRY.size)
            if size_bytes != base.size_bytes or fingerprint != _fingerprint(base):
                raise WrongState(f"{self.path}: was made over another device than {base.path}, or that device was "
                                 "written since; name a new file")
            changed_ns = _CHANGED.unpack_from(header, _CHANGED_BYTES + index * _CHANGED.size)[0]
            if changed_ns and changed_ns != _changed_ns(base):
                raise WrongState(f"{self.path}: {base.path} was changed since (by the file's date), so both "
                                 "together would be a mix; name a new file")
            devices.append(OverlayDevice(self._file.fd, base, bitmap_bytes=bitmap_bytes, data_bytes=data_bytes))
        return devices


def _make(path: str, bases: list[BlockDevice]) -> None:
    # The header is made durable last, in one piece: an overlay half made is an empty file.
    position = _HEADER_BYTES
    entries = b""
    for base in bases:
        data_bytes = position + _bitmap_length(base.size_bytes)
        entries += _ENTRY.pack(base.size_bytes, _fingerprint(base), position, data_bytes)
        position = data_bytes + (base.size_bytes + OVERLAY_BLOCK_BYTES - 1) // OVERLAY_BLOCK_BYTES * OVERLAY_BLOCK_BYTES
    header = (_HEADER.pack(_MAGIC, _VERSION, OVERLAY_BLOCK_BYTES, len(bases), 0) + entries).ljust(_CHANGED_BYTES, b"\0")
    header += b"".join(_CHANGED.pack(_changed_ns(base)) for base in bases)
    new = f"{path}.new"
    with open(new, "wb") as file:
        file.write(header.ljust(_HEADER_BYTES, b"\0"))
        file.truncate(position)
        file.flush()
        os.fsync(file.fileno())
    os.replace(new, path)


def _bitmap_length(size_bytes: int) -> int:
    blocks = (size_bytes + OVERLAY_BLOCK_BYTES - 1) // OVERLAY_BLOCK_BYTES
    return ((blocks + 7) // 8 + _BITMAP_PAGE_BYTES - 1) // _BITMAP_PAGE_BYTES * _BITMAP_PAGE_BYTES


def _fingerprint(base: BlockDevice) -> int:
    return zlib.crc32(base.read(0, min(_FINGERPRINT_BYTES, base.size_bytes)))


def _changed_ns(base: BlockDevice) -> int:
    return 0 if base.is_block else os.fstat(base.fd).st_mtime_ns


def _pread_all(fd: int, buf: memoryview, offset_bytes: int) -> None:
    done = 0
    while done < len(buf):
        got = os.preadv(fd, [buf[done:]], offset_bytes + done)
        if got == 0:
            raise OSError(errno.EIO, "the overlay file is too short")
        done += got


def _pwrite_all(fd: int, data: memoryview, offset_bytes: int) -> None:
    done = 0
    while done < len(data):
        done += os.pwritev(fd, [data[done:]], offset_bytes + done)
