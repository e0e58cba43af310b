# SPDX-License-Identifier: GPL-2.0-only
"""What can only be read of a running set, by the names of the kernel's sysfs files: one function a name.

`SET_ATTRIBUTES` has those of the set, its ``internal`` directory and its cache device; `DEVICE_ATTRIBUTES` those of a
cached device, `FLASH_ATTRIBUTES` those of a flash-only volume; `window_attributes` the statistics directories.  Each
gives the text of the file without its last newline, in the kernel's form (sysfs.c, SHOW): sizes by `hprint`, which
rounds down.  Of files that tell of the kernel's own machinery (btree_sort_*, bset_tree_stats) there is no twin.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from bcachectl import census
from bcachectl.engine.buckets import MARK_DIRTY, MARK_METADATA, MARK_RECLAIMABLE
from bcachectl.snapshot import QUANTILES
from bcachectl.units import format_uuid, hprint

if TYPE_CHECKING:
    from bcachectl.engine.cache_set import CacheSet
    from bcachectl.engine.cached_dev import CachedDev
    from bcachectl.engine.flash_dev import FlashVolume

WINDOWS = ("total", "five_minute", "hour", "day")
WINDOW_COUNTERS = ("bypassed", "cache_bypass_hits", "cache_bypass_misses", "cache_hit_ratio", "cache_hits",
                   "cache_miss_collisions", "cache_misses")


def window_attributes() -> list[str]:
    """The names of all files in the statistics directories, ``stats_total/cache_hits`` and so on."""
    return [f"stats_{window}/{counter}" for window in WINDOWS for counter in WINDOW_COUNTERS]


def _average_key_size(cset: CacheSet) -> str:
    # The kernel prints sectors as if they were bytes.
    return hprint(cset.gc.data_sectors // cset.gc.nkeys if cset.gc.nkeys else 0)


def _priority_stats(cset: CacheSet) -> str:
    # sysfs.c, SHOW(__bch_cache), priority_stats.
    buckets = cset.buckets
    count = buckets.nbuckets
    prio = census.prio_snapshot(buckets.prio[buckets.first_bucket:], bucket_size_sectors=1 << buckets.bucket_shift)

    def percent(mask: Any) -> int:
        return int(np.count_nonzero(mask)) * 100 // count

    quantiles = prio.quantiles or (0,) * QUANTILES
    return "\n".join([
        f"Unused:\t\t{percent(buckets.sectors_used == 0)}%",
        f"Clean:\t\t{percent(buckets.mark == MARK_RECLAIMABLE)}%",
        f"Dirty:\t\t{percent(buckets.mark == MARK_DIRTY)}%",
        f"Metadata:\t{percent(buckets.mark == MARK_METADATA)}%",
        f"Average:\t{prio.average}",
        f"Sectors per Q:\t{prio.sectors_per_quantile}",
        f"Quantiles:\t[{' '.join(map(str, quantiles))}]"])


def _feature_incompat(cset: CacheSet) -> str:
    return "[large_bucket]" if cset.sb.feature_incompat & 2 else "large_bucket"


def _writeback_keys(name: str) -> Callable[[CacheSet], str]:
    return lambda cset: str(sum(getattr(dev.writeback, name) for dev in cset.cached_devices()))


def _of_set() -> dict[str, Callable[[CacheSet], str]]:
    return {
        "average_key_size": _average_key_size,
        "block_size": lambda cset: hprint(cset.geometry.block_bytes),
        "bucket_size": lambda cset: hprint(cset.geometry.bucket_bytes),
        "btree_cache_size": lambda cset: hprint(cset.btree.cached_bytes),
        "cache_available_percent": lambda cset: str(100 - cset.buckets.in_use_percent),
        "congested": lambda cset: hprint(cset.congestion.limit_sectors() << 9),
        "tree_depth": lambda cset: str(cset.btree.root.level),
        "active_journal_entries": lambda cset: str(len(cset.journal.pins)),
        "btree_nodes": lambda cset: str(cset.gc.nodes),
        "cache_read_races": lambda cset: str(cset.cache_read_races),
        "reclaimed_journal_buckets": lambda cset: str(cset.journal.reclaims),
        "flush_write": lambda cset: str(cset.journal.flush_writes),
        "writeback_keys_done": _writeback_keys("keys_done"),
        "writeback_keys_failed": _writeback_keys("keys_failed"),
        "feature_compat": lambda cset: "",
        "feature_ro_compat": lambda cset: "",
        "feature_incompat": _feature_incompat,
        "io_disable": lambda cset: str(int(cset.io_disabled)),
        "nbuckets": lambda cset: str(cset.geometry.nbuckets),
        "written": lambda cset: hprint(cset.sectors.sectors_written << 9),
        "btree_written": lambda cset: hprint(cset.btree.sectors_written << 9),
        "metadata_written": lambda cset: hprint(cset.meta_sectors_written << 9),
        "io_errors": lambda cset: str(cset.io_errors_seen),
        "priority_stats": _priority_stats,
    }


SET_ATTRIBUTES = _of_set()
"""Of the set, its ``internal`` directory and its cache device."""


def _rate_debug(dev: CachedDev) -> str:
    # sysfs.c, SHOW(__bch_cached_dev), writeback_rate_debug; all amounts in bytes.
    writeback, rate = dev.writeback, dev.writeback.rate
    runs = writeback.writeback_running and dev.attached
    next_ms = (rate.next_ns - dev.cset.sched.now_ns) // 1_000_000
    target = rate.target or (writeback.target_sectors() if dev.attached else 0)
    return "\n".join([
        f"rate:\t\t{hprint(rate.rate << 9 if runs else 0)}/sec",
        f"dirty:\t\t{hprint(dev.dirty_sectors << 9)}",
        f"target:\t\t{hprint(target << 9)}",
        f"proportional:\t{hprint(rate.proportional << 9)}",
        f"integral:\t{hprint(rate.integral_scaled << 9)}",
        f"change:\t\t{hprint(rate.change << 9)}/sec",
        f"next io:\t{next_ms}ms"])


def _of_device() -> dict[str, Callable[[CachedDev], str]]:
    return {
        "state": lambda dev: dev.state,
        "running": lambda dev: "1",
        "backing_dev_name": lambda dev: dev.backing.name.rpartition("/")[2],
        "backing_dev_uuid": lambda dev: format_uuid(dev.uuid),
        "dirty_data": lambda dev: hprint(dev.dirty_sectors << 9),
        "io_errors": lambda dev: str(dev.io_errors),
        "stripe_size": lambda dev: hprint(dev.stripe_size_sectors << 9),
        "partial_stripes_expensive": lambda dev: str(int(dev.backing.partial_stripes_expensive)),
        "writeback_rate_debug": _rate_debug,
    }


DEVICE_ATTRIBUTES = _of_device()
"""Of a cached device."""


def _of_flash() -> dict[str, Callable[[FlashVolume], str]]:
    return {
        "label": lambda volume: volume.label,
        "size": lambda volume: hprint(volume.size_sectors << 9),
    }


FLASH_ATTRIBUTES = _of_flash()
"""Of a flash-only volume."""
