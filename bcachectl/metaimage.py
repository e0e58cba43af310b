# SPDX-License-Identifier: GPL-2.0-only
"""The file of a metadata image: the sectors of a device that were worth keeping, compressed, and all others as holes.

`Writer` makes one front to back, `MetaImage` reads one as if it were the device.  What is worth keeping is decided in
`fsck.collect`; nothing here knows bcache.  What holds:

* A sector is in a chunk, or recorded as unreadable, or a hole.  A hole reads as zeros; an unreadable sector fails with
  EIO, as it did on the device.
* The same sectors make the same bytes.
* A file that is cut short or damaged is refused with one sentence: the footer, which is written last, holds checksums
  of the header and of the index, and each row of the index that of its chunk.

docs/format.md has the layout.
"""

from __future__ import annotations

import errno
import json
import mmap
import os
import struct
import zlib
from bisect import bisect_right
from collections import OrderedDict
from typing import Any, BinaryIO, NamedTuple

from bcachectl.errors import DeviceError

MAGIC = b"bcachimg"
END_MAGIC = b"bcachend"
VERSION = 1
CHUNK_SECTORS = 512
"""A chunk holds no more than this, so that reading one node does not take the time of many."""
HEADER_MAX_BYTES = 1 << 20
INDEX_MAX_BYTES = 64 << 20
CHUNKS_KEPT = 64
LEVEL = 6

_HEAD = struct.Struct("<8sII")           # magic, version, bytes of the JSON behind it
_ROW = struct.Struct("<QQIII4x")         # sector, offset, sectors, bytes (0: unreadable), CRC-32 of the bytes
_FOOT = struct.Struct("<QQII8s")         # offset and bytes of the index, CRC-32 of header and of index, magic


class _Row(NamedTuple):
    sector: int
    offset_bytes: int
    nsectors: int
    length_bytes: int
    csum: int


class Writer:
    """Writes an image to a file that is open for writing; sectors come in ascending order."""

    def __init__(self, file: BinaryIO, header: dict[str, Any]) -> None:
        self.file = file
        raw = json.dumps(header, sort_keys=True, separators=(",", ":")).encode()
        self._header = _HEAD.pack(MAGIC, VERSION, len(raw)) + raw
        self._rows: list[_Row] = []
        self._offset_bytes = len(self._header)
        self._start = 0
        self._pending = bytearray()
        self.stored_sectors = 0
        self.unreadable_sectors = 0
        file.write(self._header)

    def add(self, sector: int, data: bytes | bytearray | memoryview) -> None:
        """Keep whole sectors."""
        assert len(data) % 512 == 0
        if self._pending and self._start + (len(self._pending) >> 9) != sector:
            self._flush()
        if not self._pending:
            self._start = sector
        self._pending += data
        while len(self._pending) >> 9 >= CHUNK_SECTORS:
            self._put(self._start, self._pending[:CHUNK_SECTORS << 9])
            del self._pending[:CHUNK_SECTORS << 9]
            self._start += CHUNK_SECTORS

    def add_unreadable(self, sector: int, nsectors: int) -> None:
        """Record sectors that could not be read."""
        self._flush()
        self._append(_Row(sector, 0, nsectors, 0, 0))
        self.unreadable_sectors += nsectors

    def finish(self) -> int:
        """Write the index and the footer; the length of the whole file."""
        self._flush()
        index = zlib.compress(b"".join(_ROW.pack(*row) for row in self._rows), LEVEL)
        self.file.write(index)
        self.file.write(_FOOT.pack(self._offset_bytes, len(index), zlib.crc32(self._header), zlib.crc32(index),
                                   END_MAGIC))
        return self._offset_bytes + len(index) + _FOOT.size

    def _flush(self) -> None:
        if self._pending:
            self._put(self._start, self._pending)
            self._pending = bytearray()

    def _put(self, sector: int, data: bytearray) -> None:
        if not any(data):
            return
        packed = zlib.compress(data, LEVEL)
        self._append(_Row(sector, self._offset_bytes, len(data) >> 9, len(packed), zlib.crc32(packed)))
        self.file.write(packed)
        self._offset_bytes += len(packed)
        self.stored_sectors += len(data) >> 9

    def _append(self, row: _Row) -> None:
        assert not self._rows or self._rows[-1].sector + self._rows[-1].nsectors <= row.sector
        self._rows.append(row)


class MetaImage:
    """An image that is read; ``fd`` stays the caller's."""

    def __init__(self, path: str, fd: int) -> None:
        """Read header and index; DeviceError if the file is damaged, cut short, or of a version not known here."""
        self.path = path
        self.fd = fd
        self._rows: list[_Row] = []
        self._chunks: OrderedDict[int, bytes] = OrderedDict()
        try:
            self.header = self._read_header()
            self.size_sectors = int(self.header["size_sectors"])
            self.logical_block_bytes = int(self.header["logical_block_bytes"])
            self.is_anonymous = bool(self.header["anonymous"])
            self._rows = self._read_index()
        except (ValueError, KeyError, TypeError, struct.error, zlib.error, OverflowError, RecursionError) as error:
            raise self._bad("is damaged or cut short") from error
        self._starts = [row.sector for row in self._rows]

    def _bad(self, what: str) -> DeviceError:
        return DeviceError(f"{self.path}: is a metadata image of bcachectl, and {what}; get the file once more",
                           errno=errno.EIO)

    def _pread(self, offset_bytes: int, length_bytes: int) -> bytes:
        data = os.pread(self.fd, length_bytes, offset_bytes)
        if len(data) != length_bytes:
            raise ValueError("the file ends early")
        return data

    def _read_header(self) -> dict[str, Any]:
        magic, version, length_bytes = _HEAD.unpack(self._pread(0, _HEAD.size))
        if version != VERSION:
            raise DeviceError(f"{self.path}: is a metadata image of format {version}; this bcachectl knows {VERSION}",
                              errno=errno.EINVAL)
        assert magic == MAGIC
        if length_bytes > HEADER_MAX_BYTES:
            raise ValueError("header too long")
        raw = self._pread(0, _HEAD.size + length_bytes)
        size_bytes = os.fstat(self.fd).st_size
        offset_bytes, index_bytes, header_csum, self._index_csum, end = _FOOT.unpack(
            self._pread(max(size_bytes - _FOOT.size, 0), _FOOT.size))
        if end != END_MAGIC or offset_bytes + index_bytes + _FOOT.size != size_bytes:
            raise ValueError("no footer")
        if zlib.crc32(raw) != header_csum or not len(raw) <= offset_bytes <= size_bytes:
            raise ValueError("header")
        self._index = (offset_bytes, index_bytes)
        header: dict[str, Any] = json.loads(raw[_HEAD.size:])
        return header

    def _read_index(self) -> list[_Row]:
        packed = self._pread(*self._index)
        if zlib.crc32(packed) != self._index_csum:
            raise ValueError("index")
        inflate = zlib.decompressobj()
        raw = inflate.decompress(packed, INDEX_MAX_BYTES)
        if inflate.unconsumed_tail or not inflate.eof:
            raise ValueError("index too long")
        rows = [_Row(*fields) for fields in _ROW.iter_unpack(raw)]
        at = 0
        for row in rows:
            is_chunk = row.length_bytes > 0
            if row.sector < at or not row.nsectors or (is_chunk and row.nsectors > CHUNK_SECTORS):
                raise ValueError("a row of the index")
            if is_chunk and row.offset_bytes + row.length_bytes > self._index[0]:
                raise ValueError("a chunk's place")
            at = row.sector + row.nsectors
        if at > self.size_sectors or not 512 <= self.logical_block_bytes <= 1 << 20:
            raise ValueError("size")
        return rows

    def read_into(self, offset_bytes: int, buf: memoryview) -> None:
        """Fill ``buf``; OSError with EIO where the device could not be read, or where a chunk is damaged."""
        end_bytes = offset_bytes + len(buf)
        buf[:] = bytes(len(buf))
        number = max(bisect_right(self._starts, offset_bytes >> 9) - 1, 0)
        for index in range(number, len(self._rows)):
            row = self._rows[index]
            start, end = row.sector << 9, (row.sector + row.nsectors) << 9
            if start >= end_bytes:
                break
            if end > offset_bytes:
                data = self._chunk(row)
                first, last = max(start, offset_bytes), min(end, end_bytes)
                buf[first - offset_bytes:last - offset_bytes] = data[first - start:last - start]

    def runs(self) -> list[tuple[int, int, bool]]:
        """(first sector, number of sectors, readable) of all that is no hole, in order."""
        return [(row.sector, row.nsectors, row.length_bytes > 0) for row in self._rows]

    def _chunk(self, row: _Row) -> bytes:
        if not row.length_bytes:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        if row.sector in self._chunks:
            self._chunks.move_to_end(row.sector)
            return self._chunks[row.sector]
        packed = os.pread(self.fd, row.length_bytes, row.offset_bytes)
        data = b""
        if zlib.crc32(packed) == row.csum:
            data = zlib.decompressobj().decompress(packed, (row.nsectors << 9) + 1)
        if len(data) != row.nsectors << 9:
            raise OSError(errno.EIO, "a chunk of the metadata image is damaged; get the file once more")
        self._chunks[row.sector] = data
        if len(self._chunks) > CHUNKS_KEPT:
            self._chunks.popitem(last=False)
        return data


def open_image(path: str, fd: int) -> MetaImage | None:
    """The image in an open file, or None if the file is something else."""
    # A whole page of aligned memory, because the file may be open for direct I/O.
    with mmap.mmap(-1, mmap.PAGESIZE) as page:
        os.preadv(fd, [page], 0)
        return MetaImage(path, fd) if page[:len(MAGIC)] == MAGIC else None
