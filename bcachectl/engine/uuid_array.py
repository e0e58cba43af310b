# SPDX-License-Identifier: GPL-2.0-only
"""`UuidArray`: which device or flash-only volume each slot belongs to; a slot's number is the inode of its keys.

The array is written whole, to a new bucket each time, and becomes valid by the journal entry that names that bucket;
its old bucket is found free by the next gc.  It has no checksum.  A slot that was given up is never used again, for
its keys may still be in the tree (super.c, bch_uuid_write, uuid_find_empty).
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from bcachectl.engine.alloc import NO_BUCKET, Reserve
from bcachectl.engine.sched import FUA, Mutex
from bcachectl.errors import Corrupt, WrongState, errno_text
from bcachectl.ondisk.bkey import Bkey, Ptr, pack_key, ptr_make
from bcachectl.ondisk.jset import Jset
from bcachectl.ondisk.magic import INVALID_UUID
from bcachectl.ondisk.uuids import UuidEntry, decode_uuids, encode_uuids
from bcachectl.units import format_uuid

if TYPE_CHECKING:
    from bcachectl.engine.cache_set import CacheSet


class UuidArray:
    """The uuid entries of a running set, and where they are."""

    __slots__ = ("bucket", "cset", "entries", "key", "keyed", "kept_journal_key", "lock")

    def __init__(self, cset: CacheSet) -> None:
        self.cset = cset
        self.lock = Mutex(cset.sched, "uuid array")
        self.entries: list[UuidEntry] = []
        self.key = Bkey(0, 0, 0, False, 0, ())
        self.bucket = 0
        self.keyed: Bkey | None = None              # whose words these are
        self.kept_journal_key = b""

    async def read(self, newest: Jset) -> None:
        """Load the array that a journal entry names; raises Corrupt or WrongState."""
        cset = self.cset
        if newest.version < 1:
            raise WrongState("the set's journal is of version 0 (before 2013); a kernel that runs the set converts it")
        key = newest.uuid_bucket
        if len(key.ptrs) != 1 or key.ptrs[0].dev or not key.size:
            raise Corrupt("uuid array", "bad uuid pointer")
        word = ptr_make(key.ptrs[0].sector, key.ptrs[0].gen)
        if not cset.buckets.in_range(word, key.size):
            raise Corrupt("uuid array", "bad uuid pointer")
        raw = bytearray(key.size << 9)
        cset.check_io(await cset.cache.read(key.ptrs[0].sector, raw, "uuids"), "uuid array")
        cset.buckets.raise_gens(np.array([word], np.uint64))
        self.key = key
        self.bucket = cset.buckets.bucket_of(word)
        self.entries = decode_uuids(raw)

    def journal_key(self) -> bytes:
        """The pointer to the array as the journal's header holds it."""
        key = self.key
        if key is not self.keyed:
            self.keyed = key
            self.kept_journal_key = pack_key(0, key.size, False, ptr_make(key.ptrs[0].sector, key.ptrs[0].gen))
        return self.kept_journal_key

    async def write_bucket(self) -> bool:
        """Write the array into a new bucket, which nothing names yet; False if the set failed."""
        cset = self.cset
        bucket = await cset.alloc.alloc(Reserve.BTREE)
        if bucket == NO_BUCKET:
            return False
        geometry = cset.geometry
        sector = geometry.sector_of(bucket)
        error = await cset.cache.write(sector, encode_uuids(self.entries, geometry.meta_bytes), FUA, "uuids")
        cset.buckets.unpin(bucket)
        if error:
            cset.fail(f"writing the uuid array failed: {errno_text(error)}")
            return False
        cset.meta_sectors_written += geometry.bucket_size_sectors
        self.key = Bkey(0, -geometry.meta_sectors, 0, False, 0, (Ptr(0, sector, cset.buckets.gen_at[bucket]),))
        self.bucket = bucket
        return True

    async def write(self) -> bool:
        """Write the array and journal its place, durably; False if the set failed."""
        async with self.lock:
            return await self.write_bucket() and await self.cset.journal.write_meta()

    async def retire(self, slot: int) -> bool:
        """Give a slot up; it is never used again.  False if the set failed."""
        now = self.cset.sched.wall_s & 0xFFFFFFFF
        self.entries[slot] = replace(self.entries[slot], uuid=INVALID_UUID, invalidated=now, flags=0)
        return await self.write()

    def free_slot(self) -> int:
        """The lowest slot that was never used; WrongState if there is none."""
        for slot, entry in enumerate(self.entries):
            if entry.is_free:
                return slot
        set_uuid = format_uuid(self.cset.sb.set_uuid)
        raise WrongState(f"no room for UUID: all {len(self.entries)} slots of set {set_uuid} have been used")
