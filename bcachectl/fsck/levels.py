# SPDX-License-Identifier: GPL-2.0-only
"""Whether a btree node stands on the level that it is read at: `is_interior`, `is_leaf`, `root_level`.

No node carries its level: only the journal says the root's, and every other follows from it.  One level too low, and
pointers to nodes are taken for clean extents, with the rest of the tree for free space; the kernel looks at nothing
that would tell (btree.c, bch_btree_node_read_done).  So the keys are asked:

* A pointer to a node is clean, as long as the node, leads to the start of a bucket, and there stands a set of keys
  whose checksum is seeded with that very pointer.  Data never looks like that.
* Keys that are dirty, of other lengths or inside a bucket are extents.

Where too little is there to tell, the level is believed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np

from bcachectl.errors import BcachectlError
from bcachectl.ondisk import validity
from bcachectl.ondisk.bkey import PTR_OFFSET, KeyColumns, Ptr, ptr_make
from bcachectl.ondisk.bset import BSET_HEADER_BYTES, BSET_VERSION, decode_bset_header, decode_node
from bcachectl.ondisk.crc64 import crc64_seeded
from bcachectl.ondisk.geometry import Geometry

Read = Callable[[int, int], bytes]
"""``read(sector, count)``, or DeviceError."""



class Keyed(Protocol):
    """A set of keys, whatever else is known of it."""

    @property
    def keys(self) -> KeyColumns:
        """Its keys."""


LEVELS_LIMIT = 16
TARGETS_ASKED = 32
EXTENTS_MIN = 2
"""So many keys that cannot be pointers to nodes make a leaf; one may be damaged."""


def is_interior(read: Read, sets: Sequence[Keyed], nsectors: int, magic: int, geometry: Geometry) -> bool:
    """Every key points to a node of ``nsectors``, but for one that may be damaged, and where they lead there is one."""
    words, others = _pointers(sets, nsectors, geometry)
    return others < EXTENTS_MIN and any(is_node_at(read, word, nsectors, magic) for word in words[-TARGETS_ASKED:])


def is_leaf(read: Read, sets: Sequence[Keyed], nsectors: int, magic: int, geometry: Geometry) -> bool:
    """Several keys cannot be pointers to nodes of ``nsectors``, and those that can lead to none."""
    words, others = _pointers(sets, nsectors, geometry)
    return others >= EXTENTS_MIN and not any(is_node_at(read, word, nsectors, magic) for word in words[-TARGETS_ASKED:])


def may_be_leaf(read: Read, sets: Sequence[Keyed], nsectors: int, magic: int, geometry: Geometry) -> bool:
    """Some key cannot be a pointer to a node of ``nsectors``, and those that can lead to none; of a node that nothing
    points to, where one key is all that may be left."""
    words, others = _pointers(sets, nsectors, geometry)
    return others > 0 and not any(is_node_at(read, word, nsectors, magic) for word in words[-TARGETS_ASKED:])


def is_node_at(read: Read, word: int, nsectors: int, magic: int) -> bool:
    """A set of keys with a good checksum stands where the raw pointer ``word`` leads."""
    sector = int(PTR_OFFSET.get(word))
    try:
        header = decode_bset_header(read(sector, 1))
        buf = read(sector, nsectors) if header.magic == magic else b""
    except BcachectlError:
        return False
    if header.magic != magic or header.version != BSET_VERSION or header.set_bytes > len(buf):
        return False
    assert header.set_bytes >= BSET_HEADER_BYTES
    return header.csum == crc64_seeded(memoryview(buf)[8:header.set_bytes], word)


def root_level(read: Read, root: Ptr, nsectors: int, magic: int, geometry: Geometry,
               said: int) -> int:
    """The level of the root by what stands below it; ``said`` where that tells nothing."""
    ptr = root
    for level in range(LEVELS_LIMIT):
        try:
            sets, _written = decode_node(
                read(ptr.sector, nsectors), magic=magic, seed=ptr_make(ptr.sector, ptr.gen, ptr.dev),
                block_bytes=geometry.block_bytes, node_blocks=(nsectors << 9) // geometry.block_bytes, where="")
        except BcachectlError:
            return said
        if is_leaf(read, sets, nsectors, magic, geometry):
            return level
        if not is_interior(read, sets, nsectors, magic, geometry):
            return said
        words, _others = _pointers(sets, nsectors, geometry)
        good = next((word for word in reversed(words) if is_node_at(read, word, nsectors, magic)), None)
        if good is None:
            return said
        ptr = Ptr(0, int(PTR_OFFSET.get(good)), good & 0xFF)
    return said


def _pointers(sets: Sequence[Keyed], nsectors: int, geometry: Geometry) -> tuple[list[int], int]:
    # The keys that can be pointers to nodes, the newest last, and how many are none.
    words: list[int] = []
    others = 0
    for image in sets:
        keys = image.keys
        pointing = validity.columns_available(keys) & (keys.size > 0)
        inside = PTR_OFFSET.get(keys.ptr) % np.uint64(geometry.bucket_size_sectors)
        # A pointer to the node itself may have a wrong length.
        has_length = (keys.size == nsectors) | (keys.size == geometry.node_sectors)
        fitting = pointing & has_length & ~keys.dirty & (inside == 0)
        others += int(pointing.sum()) - int(fitting.sum())
        words += keys.ptr[fitting & ~validity.columns_out_of_range(keys, geometry)].tolist()
    return words, others
