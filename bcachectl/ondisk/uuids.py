# SPDX-License-Identifier: GPL-2.0-only
"""The uuid array: which devices the keys of a set belong to (bcache_ondisk.h, uuid_entry; super.c, uuid_read).

The index of a slot is the inode of all keys of that device.  A slot is free while its uuid is zero; a detach retires it
for good by writing `INVALID_UUID` there, so keys of a former device are never taken for another's.  The array fills one
bucket and is written whole, each time to a new one.  It has no checksum.

::

    0              16                       48       52      56         60    64       72        128
    | uuid         | label                  |first   |last   |invalid-  |flags|sectors | padding |
    |              |                        |_reg    |_reg   |ated      |     |        |         |
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from construct import Bytes, Int32ul, Int64ul
from construct import Struct as Layout

from bcachectl.errors import Corrupt
from bcachectl.ondisk.bitmask import Bitmask
from bcachectl.ondisk.bkey import SECTOR_MASK
from bcachectl.ondisk.crc64 import Buffer
from bcachectl.ondisk.geometry import UUID_ENTRY_BYTES
from bcachectl.ondisk.magic import INVALID_UUID
from bcachectl.units import format_label

UUID_ENTRY_V0_BYTES = 64
LABEL_BYTES = 32
PAD_BYTES = 56
UUID_FLASH_ONLY = Bitmask(0, 1)
"""Bit of ``flags``: the slot is a volume that lives on the cache alone."""

LAYOUT = Layout(
    "uuid" / Bytes(16),
    "label" / Bytes(32),
    "first_reg" / Int32ul,        # unix seconds
    "last_reg" / Int32ul,
    "invalidated" / Int32ul,      # time of the detach, else 0
    "flags" / Int32ul,
    "sectors" / Int64ul,          # size of a flash-only volume, else 0
    "pad" / Bytes(56),
)

LAYOUT_V0 = Layout(               # while jset.version was 0
    "uuid" / Bytes(16),
    "label" / Bytes(32),
    "first_reg" / Int32ul,
    "last_reg" / Int32ul,
    "invalidated" / Int32ul,
    "pad" / Bytes(4),
)

_ENTRY = struct.Struct("<16s32s4IQ56s")
_ENTRY_V0 = struct.Struct("<16s32s3I4s")
assert _ENTRY.size == UUID_ENTRY_BYTES
assert _ENTRY_V0.size == UUID_ENTRY_V0_BYTES


@dataclass(frozen=True, slots=True)
class UuidEntry:
    """One slot.  ``label`` is kept with whatever garbage stands behind its end; `label_text` is for people."""

    uuid: bytes = bytes(16)
    label: bytes = bytes(LABEL_BYTES)
    first_reg: int = 0
    last_reg: int = 0
    invalidated: int = 0
    flags: int = 0
    sectors: int = 0
    pad: bytes = bytes(PAD_BYTES)

    @property
    def is_free(self) -> bool:
        """Never used: the next device may take it."""
        return self.uuid == bytes(16)

    @property
    def is_retired(self) -> bool:
        """Used once and never again."""
        return self.uuid == INVALID_UUID

    @property
    def is_flash_only(self) -> bool:
        """A volume without a backing device."""
        return bool(UUID_FLASH_ONLY.get(self.flags))

    @property
    def is_volume(self) -> bool:
        """A flash-only volume of a possible size: the kernel refuses one of 0 sectors (super.c, bcache_device_init),
        and keys have no positions beyond `SECTOR_MASK`."""
        return (self.is_flash_only and not self.is_free and not self.is_retired
                and 0 < self.sectors <= SECTOR_MASK)

    @property
    def label_text(self) -> str:
        """The label up to its first NUL or newline; the kernel stores what follows the newline of a sysfs write too."""
        return format_label(self.label.split(b"\n")[0])


FREE = UuidEntry()
"""A slot that was never used; `decode_uuids` gives this very entry for each of them."""


def decode_uuids(buf: Buffer) -> list[UuidEntry]:
    """All slots of an array, in order."""
    if len(buf) % UUID_ENTRY_BYTES:
        raise Corrupt("uuid array", f"length {len(buf)} is not a multiple of {UUID_ENTRY_BYTES}")
    entries = [FREE] * (len(buf) // UUID_ENTRY_BYTES)
    used = np.frombuffer(buf, "<u8").reshape(len(entries), UUID_ENTRY_BYTES // 8) != 0
    for slot in np.flatnonzero(used.any(axis=1)).tolist():
        entries[slot] = UuidEntry(*_ENTRY.unpack_from(buf, slot * UUID_ENTRY_BYTES))
    return entries


def decode_uuids_v0(buf: Buffer) -> list[UuidEntry]:
    """All slots of an array from the time of jset version 0."""
    if len(buf) % UUID_ENTRY_V0_BYTES:
        raise Corrupt("uuid array", f"length {len(buf)} is not a multiple of {UUID_ENTRY_V0_BYTES}")
    return [UuidEntry(*fields[:5]) for fields in _ENTRY_V0.iter_unpack(buf)]


def encode_uuids(entries: Sequence[UuidEntry], length_bytes: int) -> bytes:
    """The array as it is written: ``length_bytes`` long, the slots behind the last entry free."""
    assert len(entries) * UUID_ENTRY_BYTES <= length_bytes, "more slots than the array has"
    packed = b"".join(
        _ENTRY.pack(e.uuid, e.label, e.first_reg, e.last_reg, e.invalidated, e.flags, e.sectors, e.pad)
        for e in entries)
    return packed.ljust(length_bytes, b"\0")
