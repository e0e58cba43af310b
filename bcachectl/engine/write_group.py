# SPDX-License-Identifier: GPL-2.0-only
"""Writes that a `WriteBatch` placed and whose data takes its time: a group in flight.

Other things run before the keys are made.  Life of a group:

1. `bcachectl.engine.exported_writes.begin`: the batch hands over what it placed.  From then on the group is in flight
   for everyone else: `Ranges.groups` has it, `CachedDev.dirty_writers` counts it, and each extent's bucket is pinned
   and marked dirty.
2. The data is written, all of it at once: by the engine (`start_group` for requests with memory of their own,
   `serve_placed` for data in one piece), or by an export (`ExportedWrites`).
3. `commit_nowait` puts the keys into journal and leaves, as `WriteBatch.commit` does; where that had to wait,
   `bcachectl.engine.request.insert_keys` does it.  The claims end.
4. The requests go back.

Of a group whose data could not be written as a whole, what was written gets its keys, and the rest none: it begins
anew, or gets the error.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from bcachectl.engine.buckets import PTR_SECTOR_MASK
from bcachectl.engine.exported_writes import begin, commit_nowait, end
from bcachectl.engine.front import NOT_NOW, REQ_SYNC, REQ_WRITE, Request
from bcachectl.engine.node import DIRTY, HAS_PTR, Extent
from bcachectl.engine.request import EIO, insert_keys
from bcachectl.engine.sched import Io
from bcachectl.errors import Corrupt

if TYPE_CHECKING:
    from bcachectl.engine.cached_dev import CachedDev
    from bcachectl.engine.write_batch import Placed

MAX_GROUP_SECTORS = 128
"""A longer write is a request of its own."""


# Keys.


async def commit(dev: CachedDev, placed: Placed) -> bool:
    """Put the keys in journal and map; False if the set failed meanwhile."""
    return commit_nowait(dev, placed) or await _insert(dev, extents_of(placed))


def extents_of(placed: Placed) -> list[Extent]:
    """Its keys, one by one."""
    columns = zip(placed.starts, placed.ends, placed.ptrs, range(placed.count), strict=False)
    return [Extent(start, end, HAS_PTR | DIRTY, ptr) for start, end, ptr, _ in columns]


async def _insert(dev: CachedDev, extents: list[Extent]) -> bool:
    try:
        return not extents or await insert_keys(dev.cset, extents, durable=False)
    except Corrupt as bad:
        dev.cset.fail(str(bad))
        return False


# Data that the engine writes.


def is_plain(request: Request) -> bool:
    """Whether a request is one that a group may take."""
    return (
        request.op == REQ_WRITE
        and not request.flags & ~REQ_SYNC
        and 0 < request.nsectors <= MAX_GROUP_SECTORS
    )


def start_group(dev: CachedDev, requests: list[Request]) -> list[Request]:
    """Begin to serve the plain writes among ``requests``; returns those that are to be submitted one by one."""
    plain = [request for request in requests if is_plain(request)]
    if not plain:
        return requests
    places = dev.batch.place([(request.sector, request.nsectors) for request in plain], plain[0].stream)
    taken = [request for request, place in zip(plain, places, strict=True) if place != NOT_NOW]
    if not taken:
        return requests
    placed = begin(dev, len(taken))
    dev.batch.settle()
    dev.cset.sched.spawn(_serve(dev, placed, taken), "group of writes")
    ids = set(map(id, taken))
    return [request for request in requests if id(request) not in ids]


def serve_placed(dev: CachedDev, request: Request) -> None:
    """Serve what the device's batch has placed: ``request.buf`` has the data of all of it, in that order.

    The request comes back when all keys are in the map; with an error if any of the data has none.
    """
    placed = begin(dev, 1)
    dev.batch.settle()
    dev.cset.sched.spawn(_serve_placed(dev, placed, request), "placed writes")


def runs_of(placed: Placed) -> list[tuple[int, int]]:
    """First and last + 1 of those whose data lies side by side on the cache device."""
    starts, ends, ptrs = placed.starts, placed.ends, placed.ptrs
    runs, first = [], 0
    for index in range(1, placed.count):
        if ptrs[index] != ptrs[index - 1] + ((ends[index - 1] - starts[index - 1]) << 8):
            runs.append((first, index))
            first = index
    return [*runs, (first, placed.count)]


async def _serve(dev: CachedDev, placed: Placed, requests: list[Request]) -> None:
    write = dev.cset.cache.write_parts
    runs = runs_of(placed)
    ios = [
        write((placed.ptrs[first] >> 8) & PTR_SECTOR_MASK, tuple([request.buf for request in requests[first:last]]),
              "data of a group")
        for first, last in runs
    ]
    is_written = await _data_written(dev, runs, ios)
    ok = await _commit_written(dev, placed, is_written)
    end(dev, placed)
    for request, here in zip(requests, is_written, strict=True):
        if here:
            dev.finish(request, 0 if ok else EIO)
        else:
            # What lay beside it may be to blame: it begins anew by itself.
            dev.submit(request)
            dev.cset.request_done()


async def _serve_placed(dev: CachedDev, placed: Placed, request: Request) -> None:
    data, at = memoryview(request.buf), 0
    runs = runs_of(placed)
    ios = []
    for first, last in runs:
        size = sum([placed.ends[index] - placed.starts[index] for index in range(first, last)]) << 9
        sector = (placed.ptrs[first] >> 8) & PTR_SECTOR_MASK
        ios.append(dev.cset.cache.write(sector, data[at:at + size], 0, "data of placed writes"))
        at += size
    is_written = await _data_written(dev, runs, ios)
    ok = await _commit_written(dev, placed, is_written) and all(is_written)
    end(dev, placed)
    # Not `CachedDev.finish`: it would write all of the data once more, in one piece, where the first of it belongs.
    dev.give_back(request, 0 if ok else EIO)


async def _data_written(dev: CachedDev, runs: list[tuple[int, int]], ios: list[Io]) -> list[bool]:
    # Waits for all of the data; which of the writes it succeeded for.
    cset = dev.cset
    found: list[bool] = []
    for (first, last), io in zip(runs, ios, strict=True):
        error = await io
        cset.congestion.account(cset.sched.now_ns - io.start_ns, is_write=True)
        if error:
            cset.count_io_error(error, "writing data to the cache")
        found += [not error] * (last - first)
    return found


async def _commit_written(dev: CachedDev, placed: Placed, is_written: list[bool]) -> bool:
    # `commit` for those whose data is written.
    if all(is_written):
        return await commit(dev, placed)
    extents = list(zip(extents_of(placed), is_written, strict=True))
    for extent, here in extents:
        if not here:
            dev.cset.buckets.unpin(dev.cset.buckets.bucket_of(extent.ptr))
    return await _insert(dev, [extent for extent, here in extents if here])


# Data that an export writes.


def commit_later(dev: CachedDev, placed: Placed, request: Request) -> None:
    """Make the keys of what is written, whatever has to be waited for; the request comes back when they are made."""
    dev.cset.sched.spawn(_commit_later(dev, placed, request), "group of writes")


async def _commit_later(dev: CachedDev, placed: Placed, request: Request) -> None:
    ok = not dev.cset.io_disabled and await commit(dev, placed)
    end(dev, placed)
    dev.give_back(request, 0 if ok else EIO)
