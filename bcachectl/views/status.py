# SPDX-License-Identifier: GPL-2.0-only
"""One page about a set or one of its volumes: is my data safe, where is it, and does the cache help?

`status_page` answers in that order: alerts first, then the cache, then each volume with its dirty data and its hit
ratios in every window that the kernel keeps.  Plain text; colours only where something is wrong.
"""

from __future__ import annotations

from rich.text import Text

from bcachectl.snapshot import AbsentSnapshot, SetSnapshot, VolumeSnapshot, WindowSnapshot
from bcachectl.units import counted, format_sectors, format_size
from bcachectl.views.panels import LABEL, bucket_share, format_duration, gc_took, verdict

_LABEL_WIDTH = 12
_WINDOW_NAMES = {"total": "total", "five_minute": "5 min", "hour": "hour", "day": "day"}


def status_page(snapshot: SetSnapshot, *, only_volume: str = "") -> Text:
    """The page; with ``only_volume`` the other volumes are left out."""
    lines = [_row("Set", snapshot.uuid), _row("", _runner(snapshot))]
    lines += [Text(" " * _LABEL_WIDTH) + line for line in verdict(snapshot, lines=8)]
    lines += _cache(snapshot)
    for volume in snapshot.volumes:
        if only_volume in ("", volume.name):
            lines.append(Text())
            lines += _volume(volume)
    if not snapshot.volumes:
        lines.append(_row("Volumes", "none: no backing device is attached"))
    if not only_volume:
        lines += [line for device in snapshot.absent for line in _absent(device)]
    return Text("\n").join(lines)


def _runner(snapshot: SetSnapshot) -> str:
    if snapshot.source == "offline":
        return "does not run; read from the device"
    runner = "the kernel" if snapshot.source == "kernel" else f"engine {snapshot.version}, pid {snapshot.pid}"
    uptime = "" if snapshot.uptime_ns is None else f", up {format_duration(snapshot.uptime_ns)}"
    return f"run by {runner}{uptime}{', read-only' if snapshot.read_only else ''}"


def _cache(snapshot: SetSnapshot) -> list[Text]:
    allocator = snapshot.allocator
    total = allocator.nbuckets
    discard = "discard " + ("-" if allocator.discard is None else "on" if allocator.discard else "off")
    lines = [
        _row("Cache", snapshot.cache_path),
        _row("", f"{format_size(snapshot.cache_bytes)} = {total} buckets of {format_size(snapshot.bucket_bytes)}, "
                 f"block {format_size(snapshot.block_bytes)}, {allocator.replacement}, {discard}"),
        _row("Buckets", ", ".join(f"{name} {bucket_share(allocator, name)}"
                                  for name in ("clean", "dirty", "metadata", "free", "unused"))),
    ]
    if allocator.in_use_percent is not None:
        lines.append(_row("", f"in use {allocator.in_use_percent} %"))
    if snapshot.written_sectors is not None:
        lines.append(_row("Written", f"data {format_sectors(snapshot.written_sectors)}, btree "
                                     f"{format_sectors(snapshot.btree_written_sectors or 0)}, metadata "
                                     f"{format_sectors(snapshot.metadata_written_sectors or 0)} since the start"))
    if snapshot.journal is not None:
        journal = snapshot.journal
        if journal.njournal is not None and journal.free_buckets is not None:
            text = f"{journal.njournal - journal.free_buckets} of {journal.njournal} buckets"
        else:
            text = f"{counted(journal.pins, 'open entry')}, written within {journal.delay_ms} ms"
        lines.append(_row("Journal", text))
    gc = snapshot.gc
    if gc is not None and gc.running is None:
        last = "never ran" if gc.last_end_ns is None else (
            f"last {format_duration(max(0, snapshot.t_ns - gc.last_end_ns))} ago{gc_took(gc)}")
        lines.append(_row("GC", last))
    elif gc is not None:
        lines.append(_row("GC", f"{'running' if gc.running else 'idle'}, {counted(gc.runs, 'run')}"))
    return lines


def _volume(volume: VolumeSnapshot) -> list[Text]:
    kind = "flash-only volume" if volume.kind == "flash" else f"cached device on {volume.backing_path or 'unknown'}"
    label = f", label {volume.label}" if volume.label else ""
    lines = [_row(volume.name, f"{format_size(volume.size_bytes)}, {kind}{label}"),
             _row("", f"uuid {volume.uuid or '-'}")]
    if volume.kind == "cached":
        style = {"dirty": "yellow", "inconsistent": "bold red"}.get(volume.state, "")
        state = _row("", "state ")
        state.append(volume.state, style)
        state.append(f", mode {volume.mode}")
        state.append(f", {format_sectors(volume.dirty_sectors)} exist only in the cache" if volume.dirty_sectors
                     else ", nothing dirty any more, and not yet marked clean" if volume.has_dirty
                     else ", nothing dirty")
        lines.append(state)
    else:
        lines.append(_row("", f"{format_sectors(volume.dirty_sectors)} used, all of it only in the cache"))
    writeback = volume.writeback
    if writeback is not None and volume.attached:
        doing = "detaching" if writeback.detaching else "runs" if writeback.running else "paused"
        lines.append(_row("", f"writeback {doing}: {writeback.percent} % of the cache "
                              f"({format_sectors(writeback.target_sectors)}) may stay dirty"))
        line = f"  rate {format_sectors(writeback.rate_sectors)}/s"
        if writeback.in_flight is not None:
            line += f", {writeback.in_flight} in flight, {format_sectors(writeback.written_sectors)} written back"
        lines.append(_row("", line))
    windows = [_window(window) for window in volume.windows if window.hits + window.misses]
    if windows:
        lines.append(_row("", "hits " + ", ".join(windows)))
    for window in volume.windows:
        if window.name == "total" and window.bypassed_sectors:
            lines.append(_row("", f"bypassed {format_sectors(window.bypassed_sectors)}"))
    requests = volume.requests
    if requests is not None:
        lines.append(_row("", f"requests: {counted(requests.reads, 'read')} ({format_sectors(requests.read_sectors)}), "
                              f"{counted(requests.writes, 'write')} ({format_sectors(requests.written_sectors)})"))
        more = [counted(count, what) for count, what in ((requests.flushes, "flush"), (requests.errors, "error"))
                if count is not None]
        if more:
            lines.append(_row("", f"  {', '.join(more)}"))
    return lines


def _absent(device: AbsentSnapshot) -> list[Text]:
    label = f", label {device.label}" if device.label else ""
    return [Text(), _row("Absent", f"backing device {device.uuid}{label}"),
            _row("", f"{format_sectors(device.dirty_sectors)} of its data exist only in the cache"),
            _row("", "It is not here. Nothing is lost: the cache keeps the data for it."),
            _row("", "`bcachectl attach` brings it back; of one that died, `bcachectl"),
            _row("", "forget-backing --export` saves the data, once the set has stopped.")]


def _window(window: WindowSnapshot) -> str:
    return (f"{_WINDOW_NAMES.get(window.name, window.name)} {window.hit_ratio_percent} % "
            f"of {window.hits + window.misses}")


def _row(label: str, text: str) -> Text:
    return Text.assemble((f"{label:<{_LABEL_WIDTH}}", LABEL), text)
