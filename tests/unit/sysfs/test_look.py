# SPDX-License-Identifier: GPL-2.0-only
"""What the kernel's files of real sets are taken for, and what they do not tell."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable

import pytest

from bcachectl.snapshot import BucketPercents, SetSnapshot, from_json, to_json
from bcachectl.sysfs.live import KernelSet
from bcachectl.sysfs.look import parse_priority_stats
from bcachectl.sysfs.tree import Sysfs
from bcachectl.units import format_sectors
from bcachectl.views.alerts import alerts
from bcachectl.views.history import History
from bcachectl.views.monitor import page, screen
from bcachectl.views.status import status_page
from tests.unit.sysfs.fake import GOLDEN, FakeKernel

Fake = Callable[[str], FakeKernel]
STORIES = sorted(path.parent.parent.name for path in GOLDEN.glob("*/facts/sysfs.tsv"))


def snapshot(kernel: FakeKernel) -> SetSnapshot:
    return KernelSet(Sysfs(), kernel.uuid).snapshot(0)


def test_flash_volume(fake: Fake) -> None:
    kernel = fake("flash_volume")
    found = snapshot(kernel)
    assert (found.source, found.uuid, found.cache_path) == ("kernel", kernel.uuid, str(kernel.dev / "vda"))
    assert (found.cache_bytes, found.bucket_bytes, found.block_bytes) == (1024 << 16, 1 << 16, 4096)
    allocator = found.allocator
    assert (allocator.nbuckets, allocator.replacement, allocator.discard) == (1024, "lru", False)
    assert allocator.percents == BucketPercents(unused=85, clean=0, dirty=14, metadata=1)
    assert allocator.prio is not None
    assert (allocator.prio.average, allocator.prio.sectors_per_quantile) == (20, 644)
    assert allocator.prio.quantiles[-1] == 78
    assert found.journal is not None
    assert (found.journal.pins, found.journal.delay_ms, found.journal.reclaimed_buckets) == (5, 100, 4)
    assert found.gc is not None
    assert (found.gc.nodes, found.gc.max_duration_ns) == (1, 1_000_000)
    assert found.gc.last_end_ns == found.t_ns - 3_000_000_000
    cached, flash = found.volumes
    assert (cached.name, cached.kind, cached.slot, cached.state, cached.mode) == (
        "bcache0", "cached", 0, "dirty", "writeback")
    assert (cached.backing_path, cached.device_path) == (str(kernel.dev / "vdb"), str(kernel.dev / "bcache0"))
    assert cached.dirty_sectors is not None
    # 3.6M is at least this much; the next number that prints otherwise is one step further.
    assert format_sectors(cached.dirty_sectors) == "3.6 MiB"
    assert cached.dirty_step_sectors in (204, 205, 206)
    assert cached.writeback is not None
    assert (cached.writeback.running, cached.writeback.percent) == (False, 10)
    assert cached.writeback.target_sectors == 6 << 11
    assert {window.name: window.misses for window in cached.windows} == {
        "total": 0, "five_minute": 76, "hour": 79, "day": 79}
    assert cached.requests is not None
    assert (cached.requests.reads, cached.requests.written_sectors) == (100, 3200)
    assert (flash.name, flash.kind, flash.slot, flash.uuid, flash.dirty_sectors) == ("bcache1", "flash", 1, None, None)


def test_the_kernels_own_hit_ratio_counts_fractions(fake: Fake) -> None:
    # 142 misses and less than one hit in sixteenths, which the kernel calls 3 %: its counters decay.
    kernel = fake("dirty_crash")
    for name, text in (("cache_hits", "0"), ("cache_misses", "142"), ("cache_hit_ratio", "3")):
        (kernel.backing() / "stats_five_minute" / name).write_text(f"{text}\n")
    (volume,) = snapshot(kernel).volumes
    five_minute = next(window for window in volume.windows if window.name == "five_minute")
    assert five_minute.hit_ratio_percent == 3
    assert dataclasses.replace(five_minute, told_percent=None).hit_ratio_percent == 0


def test_what_the_kernel_does_not_tell_is_none(fake: Fake) -> None:
    found = snapshot(fake("deep_crash"))
    assert (found.map, found.pid, found.uptime_ns, found.failed) == (None, None, None, None)
    allocator = found.allocator
    assert (allocator.counts, allocator.gens, allocator.counters, allocator.first_bucket) == (None,) * 4
    assert allocator.reserves == ()
    assert found.gc is not None
    assert (found.gc.running, found.gc.runs, found.gc.sectors_to_gc, found.gc.last_duration_ns) == (None,) * 4
    assert found.journal is not None
    assert (found.journal.seq, found.journal.free_buckets, found.journal.is_full) == (None,) * 3
    assert found.btree is not None
    assert (found.btree.depth, found.btree.nodes_cached, found.btree.keys_cached) == (1, None, None)
    writeback = found.volumes[0].writeback
    assert writeback is not None
    assert (writeback.in_flight, writeback.written_sectors, writeback.detaching) == (None,) * 3
    assert found.volumes[0].requests is not None
    assert found.volumes[0].requests.errors is None


@pytest.mark.parametrize("story", STORIES)
def test_every_kernel_set_travels_as_json_and_is_shown(fake: Fake, story: str) -> None:
    kernel = fake(story)
    first = snapshot(kernel)
    assert from_json(SetSnapshot, json.loads(json.dumps(to_json(first)))) == first
    kernel.sleep(2)
    second = snapshot(kernel)
    history = History()
    for each in (first, second):
        history.add(each)
    assert history.newest is not None
    assert history.newest.writeback_bytes is None
    assert history.newest.invalidations is None
    text = status_page(second).plain
    assert "run by the kernel" in text
    assert "free -" in text
    assert "None" not in text
    for width, height in ((80, 24), (200, 60)):
        drawn = screen(second, history, width=width, height=height)
        assert all(line.cell_len <= width for line in drawn.lines)
        assert "None" not in drawn.plain
    plain = page(second, history, width=80).plain
    assert "run by the kernel" in plain
    assert "None" not in plain
    for unknown in ("Lists", "Gens", "Events"):
        assert not any(line.startswith(unknown) for line in plain.split("\n"))


def test_a_device_that_has_nothing_dirty_any_more_is_not_called_clean(fake: Fake) -> None:
    kernel = fake("dirty_crash")
    (kernel.backing() / "dirty_data").write_text("0.0k\n")
    found = snapshot(kernel)
    assert (found.volumes[0].dirty_sectors, found.volumes[0].has_dirty) == (0, True)
    text = status_page(found).plain
    assert "state dirty, mode writeback, nothing dirty any more, and not yet marked clean" in text


def test_trouble_is_told(fake: Fake) -> None:
    kernel = fake("two_backing")
    (kernel.set / "internal/io_disable").write_text("1\n")
    (kernel.backing() / "io_errors").write_text("3\n")
    texts = " ".join(alert.text for alert in alerts(snapshot(kernel)))
    assert "the kernel has disabled its I/O" in texts
    assert "3 I/O errors of its backing device" in texts


def test_older_and_newer_kernels_have_other_files(fake: Fake) -> None:
    kernel = fake("fifo_discard")
    for path in (kernel.backing() / "backing_dev_uuid", kernel.root / "devices/vda/bcache/discard",
                 kernel.root / "devices/vda/bcache/priority_stats", kernel.backing() / "writeback_rate_debug"):
        path.unlink()
    found = snapshot(kernel)
    assert found.volumes[0].uuid is None
    assert found.allocator.discard is None
    assert (found.allocator.percents, found.allocator.prio) == (None, None)
    assert "discard -" in status_page(found).plain


def test_priority_stats_are_read_with_restraint(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = fake("gen_churn")
    reads: list[float] = []

    def slow(path: str) -> str:
        if path.endswith("priority_stats"):
            reads.append(kernel.now_s)
            kernel.sleep(0.5)
        return kernel.read(path)

    monkeypatch.setattr("bcachectl.sysfs.tree.read_text", slow)
    live = KernelSet(Sysfs(), kernel.uuid)
    for _ in range(60):
        assert live.snapshot(0).allocator.percents is not None
        kernel.sleep(1)
    assert len(reads) == 2
    live.volumes()
    assert len(reads) == 2


def test_priority_stats_of_nothing() -> None:
    text = ("Unused:\t\t99%\nClean:\t\t0%\nDirty:\t\t0%\nMetadata:\t0%\nAverage:\t18446744073709551\n"
            "Sectors per Q:\t0\nQuantiles:\t[0 0]\n")
    percents, prio = parse_priority_stats(text)
    assert percents == BucketPercents(99, 0, 0, 0)
    assert prio is None
    assert parse_priority_stats("rubbish") == parse_priority_stats(None) == (None, None)
