# SPDX-License-Identifier: GPL-2.0-only
"""`PrioWriter`: puts the gens and priorities of all buckets on disk, in the order that makes them safe to rely on.

The prio sets form a chain of np buckets, linked first to last and named by the journal's header.  One write (super.c,
bch_prio_write):

1. all gens and priorities are copied at one moment, while no freed btree node waits for its parent (``prio_blocked``);
2. the sets are written last to first into new buckets, each awaited;
3. a journal entry that names the new first set is written and awaited (it flushes the device, so the sets are durable
   before it);
4. only now are the buckets of the old chain freed.

A crash at any point finds one complete chain.  The copy in step 1 closes a window of the kernel's, which takes the
gens of each set when it writes that set: a node freed meanwhile could have its new gen on disk before its parent says
that it is gone."""

from __future__ import annotations

from typing import TYPE_CHECKING

from bcachectl.engine.alloc import NO_BUCKET, Reserve
from bcachectl.errors import errno_text
from bcachectl.ondisk.magic import prio_magic
from bcachectl.ondisk.prio import decode_prio_set, encode_prio_set

if TYPE_CHECKING:
    from bcachectl.engine.cache_set import CacheSet


class PrioWriter:
    """The prio buckets of the cache device: current chain, last journaled chain, and how to write the next."""

    __slots__ = ("cset", "current", "journaled", "seq", "writes", "writing")

    def __init__(self, cset: CacheSet) -> None:
        count = cset.geometry.prio_buckets
        self.cset = cset
        self.current = [0] * count
        self.journaled = [0] * count
        self.seq = 0
        self.writes = 0
        self.writing = False

    async def write(self, *, wait: bool) -> bool:
        """Make all gens durable; False if there are too few free buckets (and not ``wait``) or the set has failed."""
        cset = self.cset
        geometry = cset.geometry
        count = len(self.current)
        taken = await self._take(count, wait=wait)
        if len(taken) < count:
            return False
        cset.events.emit("bcache_prio_write", buckets=count, seq=self.seq + 1)
        self.writing = True
        gens, prios = cset.buckets.gen.copy(), cset.buckets.prio.copy()
        self.seq += 1
        per_set, magic = geometry.prios_per_bucket, prio_magic(cset.sb.set_uuid)
        next_bucket = self.journaled[0]
        for index in range(count - 1, -1, -1):
            part = slice(index * per_set, (index + 1) * per_set)
            raw = encode_prio_set(self.seq, next_bucket, prios[part], gens[part], magic, geometry.meta_bytes)
            bucket = taken[index]
            error = await cset.cache.write(geometry.sector_of(bucket), memoryview(raw), 0, "prio")
            cset.buckets.unpin(bucket)
            self.current[index] = next_bucket = bucket
            if error:
                self.writing = False
                cset.fail(f"writing priorities failed: {errno_text(error)}")
                return False
        cset.meta_sectors_written += geometry.bucket_size_sectors * count
        durable = await cset.journal.write_meta()
        self.writing = False
        if not durable:
            return False
        for index, bucket in enumerate(self.journaled):
            if bucket:
                cset.buckets.free(bucket)
            self.journaled[index] = self.current[index]
        self.writes += 1
        return True

    async def _take(self, count: int, *, wait: bool) -> list[int]:
        # All buckets in one step, or none: half a chain would be given up, and PRIO be left short for the next attempt.
        alloc = self.cset.alloc
        if wait:
            taken = [await alloc.alloc(Reserve.PRIO) for _ in range(count)]
            return taken if NO_BUCKET not in taken else []
        if alloc.available_nowait(Reserve.PRIO) < count:
            return []
        return [alloc.alloc_nowait(Reserve.PRIO) for _ in range(count)]

    async def read(self, first: int) -> None:
        """Load gens and priorities from the chain that starts at bucket ``first`` (super.c, prio_read).

        Raises Corrupt for a bad set, DeviceError-like failure as Corrupt with the errno in its text.
        """
        cset = self.cset
        geometry = cset.geometry
        per_set, magic = geometry.prios_per_bucket, prio_magic(cset.sb.set_uuid)
        raw = bytearray(geometry.meta_bytes)
        bucket = first
        for index in range(len(self.current)):
            cset.check_bucket(bucket, "prio bucket")
            error = await cset.cache.read(geometry.sector_of(bucket), raw, "prio")
            cset.check_io(error, f"prio bucket {bucket}")
            found = decode_prio_set(raw, magic, bucket)
            count = min(per_set, geometry.nbuckets - index * per_set)
            part = slice(index * per_set, index * per_set + count)
            cset.buckets.gen[part] = found.gen[:count]
            cset.buckets.prio[part] = found.prio[:count]
            self.current[index] = self.journaled[index] = bucket
            self.seq = found.seq
            bucket = found.next_bucket
        cset.buckets.last_gc[:] = cset.buckets.gen
