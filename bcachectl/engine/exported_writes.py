# SPDX-License-Identifier: GPL-2.0-only
"""A group of writes in flight (`bcachectl.engine.write_group`): its begin, its keys, its end; none of it waits.

`ExportedWrites` is for an export that writes the data of a group itself, from the ring into the ring: that is one of
the paths that no task runs for, so this is one of the modules that can be compiled.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from bcachectl.engine.cached_dev import CachedDev
    from bcachectl.engine.write_batch import Placed


def begin(dev: CachedDev, requests: int) -> Placed:
    """What the batch has placed is in flight from now on; ``requests`` will come back."""
    placed = dev.batch.hand_over()
    dev.ranges.groups.append(placed)
    dev.dirty_writers += 1
    dev.cset.requests_in_flight += requests
    return placed


def end(dev: CachedDev, placed: Placed) -> None:
    """It is not any more: its keys are in the map, or there are none."""
    ranges = dev.ranges
    ranges.groups.remove(placed)
    if ranges.queue.parked:
        ranges.queue.wake_all()
    dev.dirty_writers -= 1
    if dev.detaching:
        dev.writeback.wake()


def commit_nowait(dev: CachedDev, placed: Placed) -> bool:
    """Put the keys in journal and map, if nothing has to be waited for; False, and nothing done, if something has."""
    cset = dev.cset
    journal = cset.journal
    if not cset.sync or cset.io_disabled or not placed.find_leaves():
        return False
    pin = journal.add_nowait(placed.pack_keys())
    if pin is None:
        return False
    placed.insert(pin)
    journal.unpin(pin)
    placed.unpin_all()
    return True


class ExportedWrites:
    """Groups of a device whose data an export writes.

    With an error it is as if none of a group's writes had been made: each is to begin anew.
    """

    def __init__(self, dev: CachedDev) -> None:
        self.dev = dev

    def begin(self) -> Placed:
        """`begin`; then the export writes the data."""
        return begin(self.dev, 1)

    def written(self, placed: Placed, duration_ns: int) -> bool:
        """All of the data is written, in ``duration_ns``: make the keys.  False if something has to be waited for, and
        `bcachectl.engine.write_group.commit_later` has to do it.
        """
        dev = self.dev
        cset = dev.cset
        cset.cache.submitted += placed.count
        if cset.congestion.write_threshold_us:
            cset.congestion.account(duration_ns, is_write=True)
        if not commit_nowait(dev, placed):
            return False
        end(dev, placed)
        dev.batch.take_back(placed)
        cset.request_done()
        return True

    def failed(self, placed: Placed, error: int) -> None:
        """The data could not be written."""
        self.dev.cset.count_io_error(error, "writing data to the cache")
        placed.unpin_all()
        self.lost(placed)

    def lost(self, placed: Placed) -> None:
        """Whether the data is written will not be known: no key is made, and the buckets keep their pins."""
        end(self.dev, placed)
        self.dev.cset.request_done()
