# SPDX-License-Identifier: GPL-2.0-only
"""`FlashVolume`: a volume that lives on the cache device alone (super.c, flash_dev_run; request.c,
flash_dev_submit_bio).

All its extents are dirty for ever; a gap reads as zeros, and a discard makes a gap.  It has no data offset, its slot
in the uuid array holds its size, and its open buckets are never shared with cached devices."""

from __future__ import annotations

from typing import TYPE_CHECKING

from bcachectl.engine import request as path
from bcachectl.engine.buckets import INITIAL_PRIO, PTR_SECTOR_MASK
from bcachectl.engine.cached_dev import EINVAL, EIO, EROFS, Stats
from bcachectl.engine.front import (
    REQ_DISCARD,
    REQ_FLUSH,
    REQ_READ,
    REQ_STATUS,
    REQ_WRITE_ZEROES,
    Request,
)
from bcachectl.engine.read_batch import ReadBatch, hit_sectors_sum
from bcachectl.engine.request import NewData, Ranges
from bcachectl.engine.sched import WaitQueue
from bcachectl.errors import Corrupt
from bcachectl.ondisk.bkey import INODE_SHIFT
from bcachectl.ondisk.uuids import UuidEntry

if TYPE_CHECKING:
    from bcachectl.engine.cache_set import CacheSet


class FlashVolume:
    """A flash-only volume of a running set."""

    is_flash = True
    data_offset = 0
    batch = None
    exported = None

    def __init__(self, cset: CacheSet, slot: int, entry: UuidEntry) -> None:
        self.cset = cset
        self.slot = slot
        self.base = slot << INODE_SHIFT
        self.uuid = bytes(entry.uuid)
        self.name = ""
        self.size_sectors = entry.sectors
        self.block_size_sectors = cset.geometry.block_size_sectors
        self.stats = Stats()
        self.ranges = Ranges(WaitQueue(cset.sched, "overlapping writes"))
        self.removed = False
        self.reads = ReadBatch(self, cset)

    @property
    def label(self) -> str:
        """The uuid entry's label."""
        return self.cset.uuids[self.slot].label_text

    @property
    def read_only(self) -> bool:
        """Whether writes are refused."""
        return self.cset.read_only or self.cset.sb.is_obso_large_bucket

    @property
    def dirty_sectors(self) -> int:
        """Sectors that the volume takes on the cache device."""
        return self.cset.dirty_by_inode.get(self.slot, 0)

    def read_nowait(self, sector: int, nsectors: int) -> int:
        """Byte on the cache device where the whole read lies in one extent of a leaf in memory; NOT_NOW otherwise."""
        return self.reads.places_of([(sector, nsectors)])[0]

    def reads_nowait(self, reads: list[tuple[int, int]]) -> list[int]:
        """`read_nowait` for each (sector, nsectors)."""
        return self.reads.places_of(reads)

    @property
    def serves_hits(self) -> bool:
        """Whether the map says where data of the volume is."""
        return not self.cset.io_disabled and not self.removed

    def count_hits(self, hits: ReadBatch) -> None:
        """Count reads that needed nothing but a lookup."""
        self.stats.read_requests += hits.hit_count
        self.stats.read_sectors += hit_sectors_sum(hits)
        self.stats.cache_hits += hits.hit_count

    def submit_all(self, requests: list[Request]) -> None:
        """Take requests that came together."""
        for request in requests:
            self.submit(request)

    def submit(self, request: Request) -> None:
        """Take a request; it comes back in ``cset.front``."""
        self.cset.requests_in_flight += 1
        request.start_ns = self.cset.sched.now_ns
        self.cset.sched.spawn(self._serve(request), "request")

    async def _serve(self, request: Request) -> None:
        cset = self.cset
        stats = self.stats
        writes = request.op not in (REQ_READ, REQ_FLUSH, REQ_STATUS)
        error = 0
        if (
            request.sector < 0
            or request.sector + request.nsectors > self.size_sectors
            or (writes and (request.sector | request.nsectors) & (self.block_size_sectors - 1))
        ):
            error = EINVAL
        elif writes and self.read_only:
            error = EROFS
        elif cset.io_disabled or self.removed:
            error = EIO
        if not error:
            if request.op == REQ_READ:
                stats.read_requests += 1
                stats.read_sectors += request.nsectors
            elif writes:
                stats.write_requests += 1
                stats.write_sectors += request.nsectors
            else:
                stats.other_requests += 1
            try:
                error = await self._handle(request)
            except Corrupt as corrupt:
                cset.fail(str(corrupt))
                error = EIO
        if error:
            stats.errors += 1
        cset.request_done()
        cset.front.complete(request, error)

    async def _handle(self, request: Request) -> int:
        cset = self.cset
        start = self.base + request.sector
        end = start + request.nsectors
        durable = path.is_durable(request)
        if request.op == REQ_READ:
            return await self._read(start, end, request)
        if request.op == REQ_FLUSH:
            return 0 if self.read_only or await cset.journal.write_meta() else EIO
        if request.op == REQ_STATUS:
            await path.status(cset, request, start)
            return 0
        claim = await self.ranges.enter(start, end)
        try:
            if self.removed:
                # It was removed while this request waited its turn; nobody would ever free what it writes.
                return EIO
            if request.op in (REQ_DISCARD, REQ_WRITE_ZEROES):
                return 0 if await path.invalidate(cset, start, end, durable=durable) else EIO
            return await path.insert_data(cset, start, request.buf, NewData(True, request.stream, True, durable))
        finally:
            self.ranges.leave(claim)

    async def _read(self, start: int, end: int, request: Request) -> int:
        cset = self.cset
        view = memoryview(request.buf)
        while True:
            ios = []
            position = start
            for extent in [*await cset.btree.lookup(start, end), None]:
                gap_end = end if extent is None else extent.start
                view[(position - start) << 9 : (gap_end - start) << 9] = bytes((gap_end - position) << 9)
                if extent is not None:
                    data = view[(extent.start - start) << 9 : (extent.end - start) << 9]
                    cset.buckets.prio_at[cset.buckets.bucket_of(extent.ptr)] = INITIAL_PRIO
                    ios.append((extent, cset.cache.read((extent.ptr >> 8) & PTR_SECTOR_MASK, data)))
                    position = extent.end
            raced, worst = False, 0
            for extent, io in ios:
                error = await io
                if error:
                    cset.count_io_error(error, "reading a flash-only volume")
                    worst = error
                elif cset.buckets.is_stale(extent.ptr):
                    raced = True
            if worst or not raced:
                self.stats.count_read(hit=bool(ios), bypass=False)
                return worst
            cset.cache_read_races += 1
