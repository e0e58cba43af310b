# SPDX-License-Identifier: GPL-2.0-only
"""What should worry an administrator, as sentences, worst first: the first line of every view of a running set.

An `Alert` is ``bad`` when data or service is in danger, ``warn`` when something waits or is close to a limit.  No alert
means that nothing is known to be wrong.  The limits are the kernel's own (allocator.md 13.5 and 14, request.c).
"""

from __future__ import annotations

from typing import NamedTuple

from bcachectl.snapshot import SetSnapshot, VolumeSnapshot
from bcachectl.units import counted, format_sectors

BYPASS_ALL_PERCENT = 95
"""Above this in_use everything goes past the cache (request.c, CUTOFF_CACHE_ADD)."""

HEADROOM_WARN = 16
JOURNAL_WARN_PERCENT = 90


class Alert(NamedTuple):
    """One sentence and how bad it is."""

    level: str
    text: str


def alerts(snapshot: SetSnapshot) -> list[Alert]:
    """Everything that is known to be wrong or close to a limit."""
    found: list[Alert] = []
    if snapshot.failed is not None:
        found.append(Alert("bad", f"the set has failed: {snapshot.failed}; caching is off"))
    if snapshot.damages:
        are = "is" if snapshot.damages == 1 else "are"
        found.append(Alert("bad", f"{counted(snapshot.damages, 'structure')} {are} damaged: `bcachectl fsck "
                                  f"{snapshot.cache_path}` tells what that costs"))
    for volume in snapshot.volumes:
        found += _volume_alerts(volume)
    for device in snapshot.absent:
        found.append(Alert("warn", f"{format_sectors(device.dirty_sectors)} in the cache belong to a backing device "
                                   f"that is not here ({device.label or device.uuid}); they are kept for it"))
    if snapshot.cache_io_errors:
        found.append(Alert("warn", f"{counted(snapshot.cache_io_errors, 'I/O error')} of the cache device "
                                   f"{snapshot.cache_path}"))
    found += _allocator_alerts(snapshot)
    # What is only read waits for nothing.
    journal = None if snapshot.read_only else snapshot.journal
    if journal is not None and journal.is_full:
        found.append(Alert("warn", "the journal is full: writes wait until btree nodes are written"))
    elif journal is not None and journal.free_buckets is not None and (journal.njournal or 0) > 8:
        njournal = journal.njournal or 0
        used_percent = 100 * (njournal - journal.free_buckets) // njournal
        if used_percent > JOURNAL_WARN_PERCENT:
            found.append(Alert("warn", f"the journal is {used_percent} % full"))
    return sorted(found, key=lambda alert: alert.level != "bad")


def why_stalled(snapshot: SetSnapshot, volume: VolumeSnapshot) -> str:
    """Why a volume's dirty data does not get less, as far as the snapshot can tell."""
    if snapshot.failed is not None:
        return f"the set has failed ({snapshot.failed})"
    if volume.io_disabled:
        return f"{volume.name} is disabled after I/O errors (io_disable)"
    if volume.backing_io_errors:
        return (f"{counted(volume.backing_io_errors, 'I/O error')} of the backing device "
                f"{volume.backing_path or ''}").rstrip()
    writeback = volume.writeback
    if writeback is None:
        return "no writeback runs for it"
    if not writeback.running and not writeback.detaching:
        return "writeback is paused (writeback_running is 0)"
    if snapshot.writeback_keys_failed:
        return (f"{counted(snapshot.writeback_keys_failed, 'key')} could not be written back so far; the kernel's log "
                "tells of read errors of the cache and write errors of the backing device")
    if writeback.in_flight:
        return f"{counted(writeback.in_flight, 'write')} to the backing device in flight, and slow"
    if writeback.in_flight is None:
        return "the kernel does not tell why; a slow backing device, or a gc, are the usual causes"
    if volume.requests is not None and volume.requests.writes:
        return "nothing is in flight; clients may be writing as fast as it is written back"
    return "nothing is in flight; the cause is not known"


def _volume_alerts(volume: VolumeSnapshot) -> list[Alert]:
    found: list[Alert] = []
    if volume.io_disabled:
        found.append(Alert("bad", f"{volume.name} answers every request with an error (io_disable)"))
    if volume.state == "inconsistent":
        found.append(Alert("bad", f"{volume.name} ran without its dirty data: its contents are inconsistent"))
    if volume.backing_io_errors:
        found.append(Alert("bad", f"{volume.name}: {counted(volume.backing_io_errors, 'I/O error')} of its backing "
                                  f"device {volume.backing_path or ''}".rstrip()))
    writeback = volume.writeback
    if writeback is not None and not writeback.running and volume.dirty_sectors and volume.attached:
        found.append(Alert("warn", f"{volume.name}: writeback is paused with {format_sectors(volume.dirty_sectors)} "
                                   "dirty (writeback_running is 0)"))
    return found


def _allocator_alerts(snapshot: SetSnapshot) -> list[Alert]:
    found: list[Alert] = []
    allocator = snapshot.allocator
    if allocator.in_use_percent is not None and allocator.in_use_percent > BYPASS_ALL_PERCENT:
        found.append(Alert("warn", f"{allocator.in_use_percent} % in use: every request bypasses the cache above "
                                   f"{BYPASS_ALL_PERCENT} %"))
    if allocator.gens is not None and allocator.gens.headroom <= HEADROOM_WARN:
        found.append(Alert("warn", f"a bucket is {counted(allocator.gens.headroom, 'reuse')} from the gen guard: a "
                                   "gc is due"))
    if allocator.waiting_tasks:
        wait = "waits" if allocator.waiting_tasks == 1 else "wait"
        found.append(Alert("warn", f"{counted(allocator.waiting_tasks, 'task')} {wait} for a free bucket"))
    if allocator.invalidate_needs_gc and not (snapshot.gc is not None and snapshot.gc.running):
        found.append(Alert("warn", "nothing can be invalidated before a gc has run"))
    return found
