# SPDX-License-Identifier: GPL-2.0-only
"""Every screen fits its size exactly and says what must be said; alerts come before all else."""

from __future__ import annotations

import dataclasses
from io import StringIO

import pytest
from rich.console import Console

from bcachectl.snapshot import FifoSnapshot, GenSnapshot, MapSnapshot, SetSnapshot
from bcachectl.views.alerts import Alert, alerts, why_stalled
from bcachectl.views.charts import bar, bucket_map, column_chart, histogram, sparkline
from bcachectl.views.history import History
from bcachectl.views.monitor import map_size, page, screen
from bcachectl.views.panels import format_duration, percent
from bcachectl.views.status import status_page
from bcachectl.views.terminal import has_color
from tests.unit.views.samples import sample_history, sample_map, sample_snapshot, sample_volume

SIZES = [(80, 24), (80, 50), (120, 30), (130, 40), (200, 60), (250, 90), (40, 24), (80, 10)]


def shown(snapshot: SetSnapshot, history: History, width: int, height: int) -> list[str]:
    drawn = screen(snapshot, history, width=width, height=height)
    assert all(line.cell_len <= width for line in drawn.lines)
    lines = drawn.plain.split("\n")
    assert len(lines) == height
    console = Console(file=StringIO(), width=width, height=height, force_terminal=True, color_system="truecolor")
    with console.capture() as capture:
        console.print(drawn)
    assert capture.get().count("\n") == height - 1
    return lines


@pytest.mark.parametrize(("width", "height"), SIZES)
@pytest.mark.parametrize("has_history", [False, True])
def test_a_screen_fits(width: int, height: int, has_history: bool) -> None:
    columns, rows = map_size(width=width, height=height)
    snapshot = sample_snapshot(columns * rows)
    shown(snapshot, sample_history(snapshot) if has_history else History(), width, height)


@pytest.mark.parametrize(("width", "height"), [(80, 24), (200, 60)])
def test_states_are_letters_where_there_are_no_colours(width: int, height: int) -> None:
    columns, rows = map_size(width=width, height=height)
    snapshot = sample_snapshot(columns * rows)
    history = sample_history(snapshot)
    plain, coloured = (screen(snapshot, history, width=width, height=height, letters=letters).plain
                       for letters in (True, False))
    assert "D=dirty" in plain or "D dirty" in plain
    assert "D=dirty" not in coloured
    assert snapshot.map is not None
    assert bucket_map(snapshot.map, width=columns - 4 * (width > 80), rows=1, letters=True)[0].plain[:40] in plain
    assert "J=journal" in plain or "J reserved" in plain
    for environment, is_told in (({}, True), ({"NO_COLOR": "1"}, False), ({"TERM": "dumb"}, False)):
        console = Console(file=StringIO(), force_terminal=True, _environ={"TERM": "xterm-256color", **environment})
        assert has_color(console) is is_told


@pytest.mark.parametrize(("width", "height"), [(80, 24), (200, 60)])
def test_everything_is_there(width: int, height: int) -> None:
    columns, rows = map_size(width=width, height=height)
    snapshot = sample_snapshot(columns * rows)
    text = "\n".join(shown(snapshot, sample_history(snapshot), width, height))
    for word in ("BTREE", "PRIO", "MOVINGGC", "NONE", "free_inc", "127/127", "9/15", "5/63", "headroom 91 of 96",
                 "age 12..1212", "prio writes 84", "3 runs", "5/64 buckets", "depth 1", "bcache0", "bcache2",
                 "1.2 GiB dirty", "wb <= 4 MiB/s", "reads", "hits", "clean 70%", "dirty 18%", "bcache_alloc",
                 "no alert", "2.4 GiB exist only in the cache"):
        assert word in text, word


def test_what_an_offline_look_does_not_know_is_left_out() -> None:
    full = sample_snapshot(320)
    still = dataclasses.replace(
        full, source="offline", pid=None, uptime_ns=None, gc=None,
        allocator=dataclasses.replace(full.allocator, reserves=(), free_inc=None, counters=None, waiting_tasks=None,
                                      prio=None, gens=None, in_use_percent=None))
    for width, height in SIZES:
        shown(still, History(), width, height)
    text = page(still, History(), width=80).plain
    assert "still picture" in text
    for word in ("Lists", "GC", "Gens", "Prios", "Requests"):
        assert not any(line.startswith(word) for line in text.split("\n")), word


def test_a_page_is_plain_and_tells_states_by_letters() -> None:
    snapshot = sample_snapshot(80 * 8)
    drawn = page(snapshot, sample_history(snapshot), width=80)
    assert not drawn.spans
    lines = drawn.plain.split("\n")
    assert sum(1 for line in lines if len(line) == 80 and set(line) <= set(".focDMJ")) == 8
    assert not any(line.endswith(" ") for line in lines)


def alerted(**changes: object) -> list[Alert]:
    return alerts(sample_snapshot(**changes))  # type: ignore[arg-type]


def test_nothing_to_worry_about() -> None:
    assert alerted() == []


def test_the_worst_comes_first() -> None:
    found = alerted(failed="journal io error 5", cache_io_errors=3,
                    volumes=(sample_volume(state="inconsistent"), sample_volume("bcache1", io_disabled=True)))
    assert [alert.level for alert in found] == ["bad", "bad", "bad", "warn"]
    assert "journal io error 5" in found[0].text


def test_each_limit_has_its_alert() -> None:
    snapshot = sample_snapshot()
    allocator, journal = snapshot.allocator, snapshot.journal
    assert journal is not None
    full = GenSnapshot(histogram=(1,), max=90, need_gc=90)
    for changes, word in (
        ({"allocator": dataclasses.replace(allocator, in_use_percent=96)}, "bypasses the cache"),
        ({"allocator": dataclasses.replace(allocator, gens=full)}, "6 reuses from the gen guard"),
        ({"allocator": dataclasses.replace(allocator, waiting_tasks=2)}, "2 tasks wait for a free bucket"),
        ({"allocator": dataclasses.replace(allocator, invalidate_needs_gc=True)}, "before a gc has run"),
        ({"journal": dataclasses.replace(journal, is_full=True)}, "the journal is full"),
        ({"journal": dataclasses.replace(journal, free_buckets=2)}, "the journal is 96 % full"),
        ({"damages": 2}, "2 structures are damaged"),
        ({"volumes": (sample_volume(backing_io_errors=4),)}, "4 I/O errors of its backing device"),
    ):
        found = alerts(dataclasses.replace(snapshot, **changes))  # type: ignore[arg-type]
        assert len(found) == 1, found
        assert word in found[0].text


def test_paused_writeback_with_dirty_data_is_an_alert() -> None:
    volume = sample_volume()
    assert volume.writeback is not None
    paused = dataclasses.replace(volume, writeback=dataclasses.replace(volume.writeback, running=False))
    assert "writeback is paused" in alerted(volumes=(paused,))[0].text
    assert "paused" in why_stalled(sample_snapshot(), paused)
    assert "in flight" in why_stalled(sample_snapshot(), volume)
    assert "has failed" in why_stalled(sample_snapshot(failed="x"), volume)


def test_rates_need_two_snapshots_and_counters_that_grow() -> None:
    history = History()
    first = sample_snapshot()
    history.add(first)
    assert history.newest is None
    counters = first.allocator.counters
    assert counters is not None
    later = dataclasses.replace(first, t_ns=first.t_ns + 2_000_000_000, allocator=dataclasses.replace(
        first.allocator, counters=dataclasses.replace(counters, allocations=counters.allocations + 10)))
    history.add(later)
    assert history.newest is not None
    assert history.newest.allocations == 5.0
    assert history.newest.hit_ratio_percent is None
    history.add(dataclasses.replace(first, t_ns=later.t_ns + 1))
    assert len(history.samples) == 1


def test_a_status_page() -> None:
    snapshot = sample_snapshot()
    text = status_page(snapshot).plain
    for word in (snapshot.uuid, "pid 4711", "bcache0", "bcache1", "flash-only volume", "state dirty, mode writeback",
                 "1.2 GiB exist only in the cache", "total 87 % of 100000", "bypassed 512 MiB", "lru"):
        assert word in text, word
    assert max(map(len, text.split("\n"))) <= 80
    only = status_page(snapshot, only_volume="bcache1").plain
    assert "bcache1" in only
    assert "bcache0" not in only


@pytest.mark.parametrize(("used", "size", "text"), [
    (0, 10, "····"), (10, 10, "████"), (5, 10, "██··"), (1, 1000, "▏···"), (3, 0, "▏···"), (99, 10, "████")])
def test_bars(used: int, size: int, text: str) -> None:
    assert bar(used, size, 4).plain == text


def test_sparklines() -> None:
    assert sparkline([0.0, 1.0, None, 8.0], 6).plain == "  ▁▂ █"
    assert sparkline([50.0], 2, top=100.0).plain == " ▅"
    assert histogram([1000, 0, 1], 3).plain == "█·▂"
    assert [line.plain for line in column_chart([0.0, 1.0, 2.0], 3, 2)] == ["  █", " ██"]


def test_a_map_in_colours_and_in_letters() -> None:
    buckets = MapSnapshot(states="uucdr", fills=(0, 0, 100, 30, 100), buckets_per_cell=1.0)
    colours = bucket_map(buckets, width=3, rows=2, letters=False)
    assert [line.plain for line in colours] == ["··█", "▒█"]
    assert [line.plain for line in bucket_map(buckets, width=3, rows=2, letters=True)] == ["..c", "DJ"]
    assert len(bucket_map(sample_map(100), width=10, rows=3, letters=False)) == 3


@pytest.mark.parametrize(("count", "whole", "text"), [
    (0, 10, "0 %"), (1, 10000, "<1 %"), (9999, 10000, "99 %"), (10, 10, "100 %"), (1, 3, "33 %"), (0, 0, "0 %")])
def test_percent_never_hides_anything(count: int, whole: int, text: str) -> None:
    assert percent(count, whole) == text


@pytest.mark.parametrize(("seconds", "text"), [
    (0, "0.0 s"), (9.94, "9.9 s"), (59.4, "59 s"), (61, "1:01"), (3661, "1:01:01"), (86400 * 3, "3 d")])
def test_durations(seconds: float, text: str) -> None:
    assert format_duration(int(seconds * 1e9)) == text


def test_an_empty_list_is_red() -> None:
    snapshot = sample_snapshot()
    empty = dataclasses.replace(snapshot.allocator, reserves=(FifoSnapshot("NONE", 0, 15),), free_inc=None)
    drawn = screen(dataclasses.replace(snapshot, allocator=empty), History(), width=80, height=24)
    line = next(line for line in drawn.lines if "0/15" in line.plain)
    assert any("red" in str(span.style) for span in line.spans)
