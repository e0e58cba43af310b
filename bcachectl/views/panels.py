# SPDX-License-Identifier: GPL-2.0-only
"""The parts of the live view: each takes a snapshot (and the `History`) and gives a few lines of `Text`.

No part knows where it stands on the screen; `bcachectl.views.monitor` puts them together for small screens, large
screens and plain pages.  A part whose data the source does not know gives no lines.  Numbers follow one rule: sizes are
IEC, counts are plain, rates are per second.
"""

from __future__ import annotations

from collections.abc import Iterable

from rich.text import Text

from bcachectl.snapshot import (
    GEN_GUARD,
    MAP_STATES,
    AllocatorSnapshot,
    EventSnapshot,
    GcSnapshot,
    SetSnapshot,
    VolumeSnapshot,
    WritebackSnapshot,
)
from bcachectl.units import counted, format_sectors, format_size
from bcachectl.views.alerts import alerts
from bcachectl.views.charts import STATE_LETTERS, STATE_NAMES, STATE_STYLES, bar, histogram, sparkline
from bcachectl.views.history import History

LABEL = "bold"
_ALERT_STYLES = {"bad": "bold white on red", "warn": "black on yellow"}


def headline(snapshot: SetSnapshot) -> Text:
    """Which set this is, how large, and who runs it."""
    allocator = snapshot.allocator
    line = Text.assemble(("set ", LABEL), snapshot.uuid[:8], "  ", format_size(snapshot.cache_bytes),
                         f" = {allocator.nbuckets} x ", format_size(snapshot.bucket_bytes))
    if snapshot.source == "engine":
        line.append(f"  engine {snapshot.pid}" if snapshot.pid is not None else "  engine")
        if snapshot.uptime_ns is not None:
            line.append(f" up {format_duration(snapshot.uptime_ns)}")
    elif snapshot.source == "kernel":
        line.append("  run by the kernel")
    else:
        line.append("  not running (a still picture)")
    if snapshot.read_only:
        line.append("  read-only")
    line.append(f"  {snapshot.cache_path}", "bright_black")
    return line


def verdict(snapshot: SetSnapshot, *, lines: int) -> list[Text]:
    """The worst alerts, at most ``lines`` of them, or that all is well and where the only copy of data is."""
    found = alerts(snapshot)
    if not found:
        return [Text.assemble(("ok", "bold green"), f"  no alert; {_only_copy(snapshot)}")]
    shown = []
    for index, alert in enumerate(found[:lines]):
        # The number stands in front, where no narrow screen cuts it off.
        number = f" {index + 1} of {len(found)}:" if len(found) > lines else ""
        shown.append(Text.assemble((f" {alert.level} ", _ALERT_STYLES[alert.level]), f"{number} {alert.text}"))
    return shown


def legend(snapshot: SetSnapshot, width: int, *, letters: bool) -> Text:
    """Every state with its share of the buckets, as the key to the map; without those that no bucket is in where there
    is no room for all."""
    line = _legend(snapshot, MAP_STATES, wide=width >= 100, letters=letters)
    if line.cell_len > width:
        there = [state for state in MAP_STATES
                 if not bucket_share(snapshot.allocator, STATE_NAMES[state]).startswith("0 ")]
        line = _legend(snapshot, there, wide=False, letters=letters)
    return line


def _legend(snapshot: SetSnapshot, states: Iterable[str], *, wide: bool, letters: bool) -> Text:
    line = Text()
    for state in states:
        name = STATE_NAMES[state]
        share = bucket_share(snapshot.allocator, name).replace(" %", "%")
        if not wide:
            name = {"metadata": "meta", "reserved": "journal"}.get(name, name)
        mark = STATE_LETTERS[state] if letters else "·" if state == "u" else "█"
        if line:
            line.append("  " if wide else " ")
        line.append(mark, STATE_STYLES[state])
        line.append(f"{' ' if wide else '=' if letters else ''}{name} {share}")
    return line


def lists(allocator: AllocatorSnapshot, width: int, *, columns: int) -> list[Text]:
    """Fill of the four reserves and of free_inc, ``columns`` to a line."""
    fifos = [*allocator.reserves, *([allocator.free_inc] if allocator.free_inc is not None else [])]
    if not fifos:
        return []
    cell_width = width // columns
    digits = max(len(f"{fifo.used}/{fifo.size}") for fifo in fifos)
    name_width = max(len(fifo.name) for fifo in fifos)
    lines: list[Text] = []
    for index, fifo in enumerate(fifos):
        if index % columns == 0:
            lines.append(Text())
        is_worrying = fifo.used == 0 and fifo.name != "free_inc"
        line = lines[-1]
        line.append(f"{fifo.name:<{name_width}} ", "bold red" if is_worrying else "")
        line.append_text(bar(fifo.used, fifo.size, max(2, cell_width - name_width - digits - 4), "cyan"))
        line.append(f" {f'{fifo.used}/{fifo.size}':<{digits}}  ")
    return lines


def allocation(snapshot: SetSnapshot, history: History, width: int) -> list[Text]:
    """What the allocator does: policy, rates, prio writes, and who waits."""
    allocator = snapshot.allocator
    counters = allocator.counters
    first = Text(allocator.replacement)
    if allocator.in_use_percent is not None:
        first.append(f", {allocator.in_use_percent} % in use")
    if counters is None:
        return [first]
    first.append(f", prio writes {counters.prio_writes}{_rate(history, 'prio_writes')}")
    if allocator.prio_blocked:
        first.append(f", held up by {counted(allocator.prio_blocked, 'freed node')}", "yellow")
    if allocator.discard:
        first.append(f", discards {counters.discards}")
    second = Text(f"allocs {counters.allocations}{_rate(history, 'allocations')}, "
                  f"invalidations {counters.invalidations}{_rate(history, 'invalidations')}")
    third = Text()
    if counters.alloc_fails:
        fails = counted(counters.alloc_fails, "time")
        third.append(f"no bucket found {fails}{_rate(history, 'alloc_fails')}", "yellow")
    if allocator.waiting_tasks:
        third.append(", " if third else "")
        wait = "waits" if allocator.waiting_tasks == 1 else "wait"
        third.append(f"{counted(allocator.waiting_tasks, 'task')} {wait}", "bold red")
    if not third:
        return [first, second]
    if second.cell_len + third.cell_len + 2 > width:
        return [first, second, third]
    return [first, Text.assemble(second, ", ", third)]


def gens(snapshot: SetSnapshot, width: int) -> list[Text]:
    """The histogram of gen - last_gc and how far the worst bucket is from the guard."""
    found = snapshot.allocator.gens
    if found is None:
        return []
    style = "red" if found.headroom <= 16 else "yellow" if found.headroom <= 48 else "green"
    tail = f" max {found.max}, headroom {found.headroom} of {GEN_GUARD}"
    line = histogram(found.histogram, max(8, width - len(tail)), style)
    line.append(tail)
    return [line]


def priorities(snapshot: SetSnapshot, width: int) -> list[Text]:
    """Priorities by quantile: 0 is just used, 32768 longest ago."""
    found = snapshot.allocator.prio
    if found is None:
        return []
    if not found.quantiles or not found.sectors_per_quantile:
        return [Text("no data bucket has a priority yet")]
    drawn = sparkline([float(value) for value in found.quantiles], min(len(found.quantiles), width), "blue",
                      top=max(1.0, float(found.quantiles[-1])))
    drawn.append(f" age {found.quantiles[0]}..{found.quantiles[-1]}, mean {found.average}")
    if len(drawn) + 30 < width:
        drawn.append(f", {format_sectors(found.sectors_per_quantile)} a step")
    return [drawn]


def collection(snapshot: SetSnapshot, width: int) -> list[Text]:
    """Garbage collection and moving gc."""
    gc = snapshot.gc
    if gc is None:
        return []
    if gc.running:
        line = Text("running", "bold green")
        line.append("" if gc.progress_percent is None else f" {gc.progress_percent} %")
    elif gc.running is None:
        line = Text("never ran" if gc.last_end_ns is None else "")
    else:
        line = Text("idle")
    if gc.runs is not None:
        line.append(f", {gc.runs} runs")
    if not gc.running and gc.sectors_to_gc is not None:
        line.append(f", next in {format_sectors(max(0, gc.sectors_to_gc))}")
    lines = [line]
    if gc.last_end_ns is not None:
        last = f"last {format_duration(max(0, snapshot.t_ns - gc.last_end_ns))} ago{gc_took(gc)}"
        if not line:
            line.append(last)
        elif line.cell_len + len(last) + 2 <= width:
            line.append(f", {last}")
        else:
            lines.append(Text(last))
    if gc.moving_enabled:
        state = "runs" if gc.moving_running else "on"
        lines.append(Text(f"moving gc {state}, moved {format_sectors(gc.moved_sectors)}"))
    return lines


def journal(snapshot: SetSnapshot, width: int) -> list[Text]:
    """Fill of the journal and its open entries."""
    found = snapshot.journal
    if found is None:
        return []
    if found.njournal is None or found.free_buckets is None:
        known = [(found.pins, "open entries"), (found.reclaimed_buckets, "buckets reclaimed")]
        return [Text(", ".join(f"{number} {what}" for number, what in known if number is not None))]
    used = found.njournal - found.free_buckets
    line = bar(used, found.njournal, max(6, min(24, width - 48)), "red" if found.is_full else "magenta")
    line.append(f" {used}/{found.njournal} buckets, entries {found.last_seq}..{found.seq}, "
                f"{counted(found.pins, 'pin')}")
    if found.is_full:
        line.append("  FULL", "bold red")
    return [line]


def btree(snapshot: SetSnapshot, width: int) -> list[Text]:
    """Depth of the btree and what of it is in memory."""
    found = snapshot.btree
    if found is None:
        return []
    if found.nodes_cached is None:
        line = Text(f"depth {found.depth}, {format_size(found.cache_bytes)} in memory")
        if found.nodes is not None:
            full = "-" if found.used_percent is None else found.used_percent
            line.append(f", {counted(found.nodes, 'node')}, {full} % full at the last gc")
        return [line]
    line = Text(f"depth {found.depth}, {counted(found.nodes_cached, 'node')} in {format_size(found.cache_bytes)}")
    if found.limit_bytes:
        line.append(f" of {format_size(found.limit_bytes)}")
    rest = f"{counted(found.keys_cached, 'key')}, {found.dirty_leaves} to write"
    if line.cell_len + len(rest) + 2 > width:
        return [line, Text(rest)]
    line.append(f", {rest}")
    return [line]


def requests(history: History, width: int, *, more: bool = False) -> list[Text]:
    """Reads, writes, hit ratio, dirty data and writeback over time, with the newest numbers.

    With ``more`` the allocator's work stands beside them, since stalls have their cause there.
    """
    samples = list(history.samples)
    newest = history.newest
    if newest is None:
        return [Text("rates follow with the second look", "bright_black")]
    rows: list[tuple[str, list[float | None], str, float | None, str]] = [
        ("reads", [sample.reads for sample in samples], "green", None,
         f"{newest.reads:.0f}/s {format_size(int(newest.read_bytes))}/s"),
        ("writes", [sample.writes for sample in samples], "yellow", None,
         f"{newest.writes:.0f}/s {format_size(int(newest.written_bytes))}/s"),
        ("hits", [sample.hit_ratio_percent for sample in samples], "cyan", 100.0,
         "no lookups" if newest.hit_ratio_percent is None else f"{newest.hit_ratio_percent:.0f} %"),
        ("dirty", [float(sample.dirty_bytes) for sample in samples], "yellow", None,
         format_size(newest.dirty_bytes)
         + ("" if newest.writeback_bytes is None else f", back {format_size(int(newest.writeback_bytes))}/s")),
    ]
    if more and newest.invalidations is not None and newest.gc_running is not None:
        rows += [
            ("reuse", [sample.invalidations for sample in samples], "blue", None,
             f"{newest.invalidations:.0f} buckets/s invalidated"),
            ("fails", [sample.alloc_fails for sample in samples], "red", None,
             f"{newest.alloc_fails or 0:.0f}/s found no bucket"),
            ("prios", [sample.prio_writes for sample in samples], "magenta", None,
             f"{newest.prio_writes or 0:.1f} prio writes/s"),
            ("gc", [100.0 if sample.gc_running else 0.0 for sample in samples], "magenta", 100.0, "runs of gc"),
        ]
    tail_width = max(22, *(len(row[4]) for row in rows)) if more else max(len(row[4]) for row in rows)
    lines = []
    for name, values, style, top, tail in rows:
        line = Text(f"{name:<7}")
        line.append_text(sparkline(values, max(8, width - tail_width - 9), style, top=top))
        line.append(f"  {tail}")
        lines.append(line)
    return lines


def volumes(snapshot: SetSnapshot, width: int, *, rows: int) -> list[Text]:
    """One line a volume, at most ``rows``."""
    shown = list(snapshot.volumes)
    if not shown:
        return [Text("no volumes: no backing device is attached", "bright_black")]
    left_out = 0
    if len(shown) > rows:
        left_out = len(shown) - rows + 1
        shown = shown[:rows - 1]
    lines = [_volume(volume, width) for volume in shown]
    if left_out:
        lines.append(Text(f"and {left_out} more volumes", "bright_black"))
    return lines


def events(snapshot: SetSnapshot, *, rows: int) -> list[Text]:
    """The last events, newest last; a run of the same event is one line."""
    runs: list[tuple[EventSnapshot, int]] = []
    for event in snapshot.events:
        if runs and runs[-1][0].name == event.name:
            runs[-1] = (event, runs[-1][1] + 1)
        else:
            runs.append((event, 1))
    lines = []
    for event, count in runs[len(runs) - rows if len(runs) > rows else 0:]:
        line = Text(f"{format_duration(max(0, snapshot.t_ns - event.t_ns)):>8} ago  ", "bright_black")
        line.append(event.name, "bold" if "fail" in event.name or "error" in event.name else "")
        line.append(f"  {event.detail}" if event.detail else "")
        line.append(f"  x{count}" if count > 1 else "", "bright_black")
        lines.append(line)
    return lines


def percent(count: int, whole: int) -> str:
    """A share in percent that never shows something as nothing, nor a part as the whole."""
    if count == 0 or whole == 0:
        return "0 %"
    share = 100 * count / whole
    if share < 1:
        return "<1 %"
    return "100 %" if count == whole else f"{min(99, round(share))} %"


def bucket_share(allocator: AllocatorSnapshot, name: str) -> str:
    """The share of the buckets in a state, by its name; ``-`` where the source does not tell."""
    if allocator.counts is not None:
        return percent(getattr(allocator.counts, name), allocator.nbuckets)
    share = getattr(allocator.percents, name, None)
    return "-" if share is None else f"{share} %"


def gc_took(gc: GcSnapshot) -> str:
    """How long the last gc took, or what is known of that."""
    if gc.last_duration_ns is not None:
        return f" took {gc.last_duration_ns / 1e6:.0f} ms over {counted(gc.nodes, 'node')}"
    if gc.average_duration_ns is not None and gc.max_duration_ns is not None:
        return (f", on average {gc.average_duration_ns / 1e6:.0f} ms, at most {gc.max_duration_ns / 1e6:.0f} ms over "
                f"{counted(gc.nodes, 'node')}")
    return ""


def _only_copy(snapshot: SetSnapshot) -> str:
    if not snapshot.volumes:
        return "no volume is here"
    if snapshot.dirty_sectors:
        return f"{format_sectors(snapshot.dirty_sectors)} exist only in the cache"
    flash = [volume.name for volume in snapshot.volumes if volume.dirty_sectors is None]
    return f"nothing dirty but what {', '.join(flash)} may hold" if flash else "nothing dirty"


def format_duration(duration_ns: int) -> str:
    """A duration for people: ``0.3 s``, ``12 s``, ``3:07``, ``5:03:07``, ``12 d``."""
    seconds = duration_ns / 1e9
    if seconds < 10:
        return f"{seconds:.1f} s"
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours >= 48:
        return f"{hours // 24} d"
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _rate(history: History, name: str) -> str:
    newest = history.newest
    if newest is None:
        return ""
    value = getattr(newest, name)
    return f" ({value:.1f}/s)" if 0 < value < 10 else f" ({value:.0f}/s)"


def _volume(volume: VolumeSnapshot, width: int) -> Text:
    style = {"dirty": "yellow", "inconsistent": "bold red", "clean": "green"}.get(volume.state, "")
    size = format_size(volume.size_bytes) if volume.size_bytes else ""
    line = Text.assemble((f"{volume.name:<8} ", LABEL), f"{size:>8} ",
                         f"{volume.mode if volume.kind == 'cached' else 'flash-only':<12} ")
    line.append(f"{volume.state:<5} ", style)
    line.append(f"{format_sectors(volume.dirty_sectors):>9} dirty ", style if volume.dirty_sectors else "bright_black")
    if volume.writeback is not None and volume.attached:
        line.append(_writeback(volume.writeback, dirty_sectors=volume.dirty_sectors or int(volume.has_dirty)))
    if width >= 100:
        for window in volume.windows:
            if window.name == "total" and window.hits + window.misses:
                line.append(f"  hits {window.hit_ratio_percent} %")
                line.append(f", {format_sectors(window.bypassed_sectors)} bypassed")
        if volume.label:
            line.append(f"  {volume.label}")
        if volume.backing_path:
            line.append(f"  {volume.backing_path}", "bright_black")
    return line


def _writeback(writeback: WritebackSnapshot, *, dirty_sectors: int) -> str:
    if writeback.detaching:
        return "detaching"
    if not writeback.running:
        return "wb paused"
    if not dirty_sectors:
        return "wb idle"
    if not writeback.percent:
        return "wb full speed"
    return f"wb <= {format_sectors(writeback.rate_sectors)}/s"
