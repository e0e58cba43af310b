# SPDX-License-Identifier: GPL-2.0-only
"""`start_group` and `serve_placed`: plain writes in writeback mode that came together, served by one task.

Like a `WriteBatch`, but the data is written by Ios of the engine, as devices need it, so other things run before the
keys are made:

1. `start_group` has the batch place what need not wait for anything before its data is written.  From then on those
   writes are in flight for everyone else: `Ranges.writes` has them, `CachedDev.dirty_writers` counts the group, and
   each extent's bucket is pinned and marked dirty.
2. The data is written, all of it at once, and awaited.
3. `insert_keys` puts the keys into the journal and into their leaves, as for any other write, and waits once for the
   entry if one of the requests wants that.
4. The requests go back.  One whose data could not be written gets the error, and no key.

`serve_placed` is for an export that has called the batch itself, and has gathered the data of all that was placed in
one piece of memory: it is one request then, and what lies side by side on the cache device is one Io.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from bcachectl.engine.buckets import PTR_SECTOR_MASK
from bcachectl.engine.front import NOT_NOW, REQ_STABLE, REQ_SYNC, REQ_WRITE, Request
from bcachectl.engine.node import DIRTY, HAS_PTR, Extent
from bcachectl.engine.request import EIO, insert_keys, is_durable
from bcachectl.engine.sched import Io
from bcachectl.errors import Corrupt

if TYPE_CHECKING:
    from bcachectl.engine.cached_dev import CachedDev

MAX_GROUP_SECTORS = 128
"""A longer write is a request of its own."""


class Placed(NamedTuple):
    """A write of a group: its key, and its claim in `Ranges.writes`."""

    request: Request
    extent: Extent
    claim: tuple[int, int]


def is_plain(request: Request) -> bool:
    """Whether a request is one that a group may take."""
    return (
        request.op == REQ_WRITE
        and not request.flags & ~(REQ_STABLE | REQ_SYNC)
        and 0 < request.nsectors <= MAX_GROUP_SECTORS
    )


def start_group(dev: CachedDev, requests: list[Request]) -> list[Request]:
    """Begin to serve the plain writes among ``requests``; returns those that are to be submitted one by one."""
    plain = [request for request in requests if is_plain(request)]
    if not plain:
        return requests
    places = dev.batch.place([(request.sector, request.nsectors) for request in plain], plain[0].stream)
    extents = iter(dev.batch.hand_over())
    group: list[Placed] = []
    for request, place in zip(plain, places, strict=True):
        if place != NOT_NOW:
            start, end, ptr = next(extents)
            group.append(Placed(request, Extent(start, end, HAS_PTR | DIRTY, ptr), (start - dev.base, end - dev.base)))
    if not group:
        return requests
    dev.ranges.writes.extend(placed.claim for placed in group)
    dev.dirty_writers += 1
    dev.cset.requests_in_flight += len(group)
    dev.cset.sched.spawn(_serve(dev, group), "group of writes")
    taken = {id(placed.request) for placed in group}
    return [request for request in requests if id(request) not in taken]


def serve_placed(dev: CachedDev, request: Request, placed: list[tuple[int, int, int]]) -> None:
    """Serve what the device's batch has handed over: ``request.buf`` has the data of all of it, in that order.

    The request comes back when all keys are in the map; with an error if any of the data has none.
    """
    extents = [Extent(start, end, HAS_PTR | DIRTY, ptr) for start, end, ptr in placed]
    dev.ranges.writes.extend([(extent.start - dev.base, extent.end - dev.base) for extent in extents])
    dev.dirty_writers += 1
    dev.cset.requests_in_flight += 1
    dev.cset.sched.spawn(_serve_placed(dev, request, extents), "placed writes")


async def _serve_placed(dev: CachedDev, request: Request, extents: list[Extent]) -> None:
    cset, data = dev.cset, memoryview(request.buf)
    ios: list[tuple[int, int, Io]] = []         # the first extent of each, the one behind its last
    first = at = first_at = 0
    for index, extent in enumerate(extents):
        at += (extent.end - extent.start) << 9
        follows = index + 1 < len(extents) and extents[index + 1].ptr == extent.ptr + ((extent.end - extent.start) << 8)
        if not follows:
            sector = (extents[first].ptr >> 8) & PTR_SECTOR_MASK
            io = cset.cache.write(sector, data[first_at:at], 0, "data of placed writes")
            ios.append((first, index + 1, io))
            first, first_at = index + 1, at
    written: list[Extent] = []
    for first, end, io in ios:
        error = await io
        cset.congestion.account(cset.sched.now_ns - io.start_ns, is_write=True)
        if error:
            cset.count_io_error(error, "writing data to the cache")
            for extent in extents[first:end]:
                cset.buckets.unpin(cset.buckets.bucket_of(extent.ptr))
        else:
            written += extents[first:end]
    ok = len(written) == len(extents)
    try:
        if written:
            ok = await insert_keys(cset, written, durable=False) and ok
    except Corrupt as bad:
        cset.fail(str(bad))
        ok = False
    for extent in extents:
        dev.ranges.writes.remove((extent.start - dev.base, extent.end - dev.base))
    dev.ranges.queue.wake_all()
    dev.dirty_writers -= 1
    if dev.detaching:
        dev.writeback.wake()
    # Not `CachedDev.finish`: it would write all of the data once more, in one piece, where the first of it belongs.
    dev.give_back(request, 0 if ok else EIO)


async def _serve(dev: CachedDev, group: list[Placed]) -> None:
    cset = dev.cset
    ios = [
        cset.cache.write((extent.ptr >> 8) & PTR_SECTOR_MASK, request.buf, 0, "data of a group")
        for request, extent, _claim in group
    ]
    extents: list[Extent] = []
    errors: list[int] = []
    for (_request, extent, _claim), io in zip(group, ios, strict=True):
        error = await io
        cset.congestion.account(cset.sched.now_ns - io.start_ns, is_write=True)
        if error:
            cset.count_io_error(error, "writing data to the cache")
            cset.buckets.unpin(cset.buckets.bucket_of(extent.ptr))
        else:
            extents.append(extent)
        errors.append(EIO if error else 0)
    ok = True
    try:
        if extents:
            ok = await insert_keys(cset, extents, durable=any(is_durable(placed.request) for placed in group))
    except Corrupt as bad:
        cset.fail(str(bad))
        ok = False
    for placed in group:
        dev.ranges.leave(placed.claim)
    dev.dirty_writers -= 1
    if dev.detaching:
        dev.writeback.wake()
    for placed, error in zip(group, errors, strict=True):
        dev.finish(placed.request, error or (0 if ok else EIO))
