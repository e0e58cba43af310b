# SPDX-License-Identifier: GPL-2.0-only
"""`Geometry`: how a cache device is cut up, and every size that follows from it.

A cache device is an array of buckets of equal size, numbered from sector 0; those below ``first_bucket`` hold the
superblock and are never allocated.  Some sizes depend on the page size of the kernel that runs the set, because the
kernel keeps each such structure in pages of its own memory (bcache.h: meta_bucket_pages, btree_default_blocks).

A reader takes the size of a btree node and of the uuid array from the KEY_SIZE of the pointer to it, never from here;
only the prio sets have no other source.
"""

from __future__ import annotations

from dataclasses import dataclass, field

PAGE_SECTORS = 8
"""Sectors of a 4 KiB page."""

MAX_ORDER_NR_PAGES = 1024
"""The most pages the kernel allocates in one piece on x86-64; bounds prio sets, the uuid array and nodes to 4 MiB."""

MAX_META_BUCKET_SECTORS = 32768
NODE_BYTES_FLOOR = 256 << 10
"""A bucket up to this size is one node; of a larger one a node is a quarter, but no less than this."""

PRIO_SET_HEADER_BYTES = 40
BUCKET_DISK_BYTES = 3
UUID_ENTRY_BYTES = 128
JSET_MAX_PAGES = 8
"""The largest journal entry, in pages (journal.h, JSET_BITS)."""

NJOURNAL_MIN = 2
NJOURNAL_MAX = 256


@dataclass(frozen=True, slots=True)
class Geometry:
    """Sizes of one cache device; everything else is computed from these five numbers."""

    block_size_sectors: int
    bucket_size_sectors: int
    nbuckets: int
    first_bucket: int
    page_sectors: int = PAGE_SECTORS
    block_bytes: int = field(init=False, repr=False, compare=False)
    """Bytes of a block, the unit in which nodes and journal buckets are filled; asked for so often that it is kept."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "block_bytes", self.block_size_sectors << 9)

    @property
    def bucket_bytes(self) -> int:
        """Bytes of a bucket."""
        return self.bucket_size_sectors << 9

    @property
    def bucket_shift(self) -> int:
        """Binary logarithm of the bucket size in sectors."""
        return self.bucket_size_sectors.bit_length() - 1

    @property
    def page_bytes(self) -> int:
        """Bytes of a page of the kernel that this geometry is for."""
        return self.page_sectors << 9

    @property
    def meta_sectors(self) -> int:
        """Sectors that a prio set, and the uuid array, occupies of its bucket."""
        pages = min(self.bucket_size_sectors // self.page_sectors,
                    MAX_META_BUCKET_SECTORS // self.page_sectors, MAX_ORDER_NR_PAGES)
        return pages * self.page_sectors

    @property
    def meta_bytes(self) -> int:
        """Bytes of a prio set or of the uuid array."""
        return self.meta_sectors << 9

    @property
    def node_sectors(self) -> int:
        """KEY_SIZE of a pointer to a new btree node."""
        floor_sectors = NODE_BYTES_FLOOR >> 9
        if self.meta_sectors <= floor_sectors:
            return self.meta_sectors
        pages = max(self.meta_sectors // self.page_sectors // 4, floor_sectors // self.page_sectors)
        return pages * self.page_sectors

    @property
    def node_bytes(self) -> int:
        """Bytes of a new btree node."""
        return self.node_sectors << 9

    @property
    def node_blocks(self) -> int:
        """Blocks of a new btree node."""
        return self.node_sectors // self.block_size_sectors

    @property
    def prios_per_bucket(self) -> int:
        """Buckets that one prio set describes."""
        return (self.meta_bytes - PRIO_SET_HEADER_BYTES) // BUCKET_DISK_BYTES

    @property
    def prio_buckets(self) -> int:
        """Prio sets that describe the whole device; the chain of them is never followed further."""
        return -(-self.nbuckets // self.prios_per_bucket)

    @property
    def nr_uuids(self) -> int:
        """Slots of the uuid array: how many attachments a set can serve in its life."""
        return self.meta_bytes // UUID_ENTRY_BYTES

    @property
    def njournal_default(self) -> int:
        """Journal buckets that are chosen when a set is run for the first time (super.c, run_cache_set)."""
        return min(max(self.nbuckets >> 7, NJOURNAL_MIN), NJOURNAL_MAX)

    @property
    def jset_max_bytes(self) -> int:
        """The largest journal entry."""
        return self.page_bytes * JSET_MAX_PAGES

    def bucket_of(self, sector: int) -> int:
        """The bucket that holds a sector of the cache device."""
        return sector // self.bucket_size_sectors

    def sector_of(self, bucket: int) -> int:
        """The first sector of a bucket."""
        return bucket * self.bucket_size_sectors
