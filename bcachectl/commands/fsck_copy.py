# SPDX-License-Identifier: GPL-2.0-only
"""``bcachectl fsck --output``: a copy of the cache device to repair, holes as holes.

A sector that cannot be read would be zeros in the copy, and read as if nothing had happened.  So a device whose live
data cannot all be read is not copied: `bcachectl writeback` is the way to save what can be.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from bcachectl.blockdev import BlockDevice
from bcachectl.errors import BcachectlError, DeviceError, Refused
from bcachectl.fsck.check import Check
from bcachectl.fsck.extents import Extents
from bcachectl.fsck.owners import live_extents
from bcachectl.ondisk.bkey import INODE_SHIFT, PTR_OFFSET, SECTOR_MASK
from bcachectl.units import counted, format_sectors

CHUNK_BYTES = 1 << 20
RANGES_SHOWN = 4


def check_output(output: Path) -> None:
    """Refused if the copy would overwrite something."""
    if output.exists():
        raise Refused(f"{output}: exists already; name a new file")


def copy_device(device: BlockDevice, check: Check, output: Path) -> None:
    """Copy a device to a new file, durably; Refused if live data of the check cannot be read, and no file is left."""
    check_output(output)
    bad: list[tuple[int, int]] = []
    try:
        with output.open("xb") as file:
            for offset in range(0, device.size_bytes, CHUNK_BYTES):
                data = _read(device, offset, min(CHUNK_BYTES, device.size_bytes - offset), bad)
                if data.count(0) != len(data):
                    file.seek(offset)
                    file.write(data)
            file.truncate(device.size_bytes)
            file.flush()
            os.fsync(file.fileno())
        hits = _live_hits(check, bad)
    except OSError as error:
        output.unlink(missing_ok=True)
        raise BcachectlError(f"{output}: the copy cannot be written ({error.strerror}); nothing was changed") from error
    except BaseException:
        output.unlink(missing_ok=True)
        raise
    if hits:
        output.unlink()
        more = f" and {counted(len(hits) - RANGES_SHOWN, 'more range')}" if len(hits) > RANGES_SHOWN else ""
        raise Refused(f"{device.path}: a copy would lack data that cannot be read ({'; '.join(hits[:RANGES_SHOWN])}"
                      f"{more}); save what can be read with `bcachectl writeback`")
    if bad:
        count = sum(end - start for start, end in bad)
        print(f"bcachectl: {device.path}: {counted(count, 'sector')} without live data cannot be read, zeros in the "
              f"copy, the first at sector {bad[0][0]}", file=sys.stderr)


def _live_hits(check: Check, bad: list[tuple[int, int]]) -> list[str]:
    # What of the volumes' data lies in the bad sectors, in words.
    if not bad or not check.slots:
        return []
    live = live_extents(check)
    first = PTR_OFFSET.get(live.ptr)
    last = first + live.size
    return [line for start, end in bad for line in _hits(check, live.take((first < end) & (last > start)), start, end)]


def _hits(check: Check, rows: Extents, bad_start: int, bad_end: int) -> list[str]:
    lines: list[str] = []
    for start, size, ptr, is_dirty in zip(rows.start.tolist(), rows.size.tolist(), PTR_OFFSET.get(rows.ptr).tolist(),
                                          rows.dirty.tolist(), strict=True):
        inode = start >> INODE_SHIFT
        begin = (start & SECTOR_MASK) - check.data_offset(inode) + max(bad_start - ptr, 0)
        sectors = min(bad_end, ptr + size) - max(bad_start, ptr)
        kind = "dirty" if is_dirty else "clean"
        lines.append(f"{check.volume_name(inode)} bytes {begin << 9} to {begin + sectors << 9}, "
                     f"{format_sectors(sectors)} {kind}")
    return lines


def _read(device: BlockDevice, offset: int, length: int, bad: list[tuple[int, int]]) -> bytes:
    # Halves until single sectors are left.
    try:
        return device.read(offset, length)
    except DeviceError:
        if length <= 512:
            sector = offset >> 9
            if bad and bad[-1][1] == sector:
                bad[-1] = bad[-1][0], sector + 1
            else:
                bad.append((sector, sector + 1))
            return bytes(length)
    half = length // 1024 * 512 or 512
    return _read(device, offset, half, bad) + _read(device, offset + half, length - half, bad)
