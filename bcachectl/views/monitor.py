# SPDX-License-Identifier: GPL-2.0-only
"""The live view of a set, composed for the room there is: `screen` for terminals, `page` for everything else.

::

    small, from 80x24                     large, from 130x40
    headline                              headline
    verdict                               verdict
    legend, map                           +- buckets ----------++- free lists -+
    one or two lines for each part        | map                || ...          |
    events                                +- volumes ----------++- gens -------+
                                          +- requests ---------++- gc, journal +
                                          +- events -----------++--------------+

Everything here is a function of a snapshot, a history and a size.  `map_size` says how many cells of the bucket map a
size has room for, so that the source makes exactly those.
"""

from __future__ import annotations

from rich.console import Console, ConsoleOptions, RenderResult
from rich.segment import Segment
from rich.style import Style
from rich.text import Text

from bcachectl.snapshot import GEN_GUARD, SetSnapshot
from bcachectl.units import format_size
from bcachectl.views import panels
from bcachectl.views.charts import bucket_map, column_chart
from bcachectl.views.history import History

LARGE_WIDTH, LARGE_HEIGHT = 130, 40
PAGE_MAP_ROWS = 8
_LABEL_WIDTH = 10
_SIDE_WIDTH = 62
_SMALL_FIXED_LINES = 16
"""Lines of a small screen that are neither map, volumes nor events."""


def map_size(*, width: int, height: int) -> tuple[int, int]:
    """Columns and rows of the bucket map on a screen of this size."""
    if width >= LARGE_WIDTH and height >= LARGE_HEIGHT:
        return width - _SIDE_WIDTH - 3, max(8, (height - 3) * 45 // 100)
    return max(20, width), max(2, min(16, (height - _SMALL_FIXED_LINES) // 2))


class Screen:
    """Lines that are already cut to size; printed as they are, since wrapping thousands of cells takes longer than
    drawing them."""

    def __init__(self, lines: list[Text]) -> None:
        self.lines = lines

    @property
    def plain(self) -> str:
        """The text without styles."""
        return "\n".join(line.plain for line in self.lines)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        # What rich does for styles that overlap takes three times as long; the spans of these lines follow each other.
        styles: dict[object, Style] = {"": Style.null()}
        for index, line in enumerate(self.lines):
            if index:
                yield Segment.line()
            plain, at = line.plain, 0
            for start, end, style in line.spans:
                if style not in styles:
                    styles[style] = console.get_style(style)
                if start > at:
                    yield Segment(plain[at:start])
                yield Segment(plain[max(start, at):end], styles[style])
                at = max(at, end)
            if at < len(plain):
                yield Segment(plain[at:])


def screen(snapshot: SetSnapshot, history: History, *, width: int, height: int, letters: bool = False) -> Screen:
    """The whole screen, exactly ``height`` lines of at most ``width`` cells; with ``letters`` it needs no colours."""
    large = width >= LARGE_WIDTH and height >= LARGE_HEIGHT
    compose = _large if large else _small
    lines = [_cut(line, width) for line in compose(snapshot, history, width, height, letters)[:height]]
    return Screen(lines + [Text()] * (height - len(lines)))


def page(snapshot: SetSnapshot, history: History, *, width: int) -> Text:
    """The same as plain lines without colours, as many as it takes."""
    lines = [panels.headline(snapshot), *panels.verdict(snapshot, lines=8), Text()]
    lines += _parts(snapshot, history, width, letters=True, map_rows=PAGE_MAP_ROWS, volume_rows=99, event_rows=8)
    return Text("\n").join(Text(line.plain.rstrip()) for line in lines)


def _small(snapshot: SetSnapshot, history: History, width: int, height: int, letters: bool) -> list[Text]:
    # A second alert is worth more than a line of the map.
    lines = [panels.headline(snapshot), *panels.verdict(snapshot, lines=2)]
    map_rows = map_size(width=width, height=height)[1]
    room = height - _SMALL_FIXED_LINES - map_rows
    map_rows -= len(lines) - 2
    volume_rows = max(1, min(len(snapshot.volumes), room - 1))
    parts = _parts(snapshot, history, width, letters=letters, map_rows=map_rows, volume_rows=volume_rows,
                   event_rows=max(1, room - volume_rows))
    return lines + parts


def _parts(snapshot: SetSnapshot, history: History, width: int, *, letters: bool, map_rows: int, volume_rows: int,
           event_rows: int) -> list[Text]:
    # Every part as labelled lines, for small screens and pages.
    lines = [panels.legend(snapshot, width, letters=letters)]
    if snapshot.map is not None:
        lines += bucket_map(snapshot.map, width=width, rows=map_rows, letters=letters)
    inner = width - _LABEL_WIDTH
    allocator = snapshot.allocator
    parts: list[tuple[str, list[Text]]] = [
        ("Lists", panels.lists(allocator, inner, columns=3)),
        ("Allocator", panels.allocation(snapshot, history, inner)),
        ("Gens", panels.gens(snapshot, inner)),
        ("Prios", panels.priorities(snapshot, inner)),
        ("GC", panels.collection(snapshot, inner)),
        ("Journal", panels.journal(snapshot, inner)),
        ("Btree", panels.btree(snapshot, inner)),
        ("Volumes", panels.volumes(snapshot, inner, rows=volume_rows)),
        ("Requests", panels.requests(history, inner) if snapshot.source != "offline" else []),
        ("Events", panels.events(snapshot, rows=event_rows)),
    ]
    for label, part in parts:
        for index, line in enumerate(part):
            lines.append(Text.assemble((f"{label if index == 0 else '':<{_LABEL_WIDTH}}", panels.LABEL), line))
    return lines


def _large(snapshot: SetSnapshot, history: History, width: int, height: int, letters: bool) -> list[Text]:
    head = [panels.headline(snapshot), *panels.verdict(snapshot, lines=2)]
    height -= len(head)
    left_width, inner = width - _SIDE_WIDTH - 1, width - _SIDE_WIDTH - 5
    map_columns, map_rows = map_size(width=width, height=height + len(head))
    map_rows = min(map_rows, height - 20)
    buckets = [panels.legend(snapshot, map_columns - 2, letters=letters)]
    title = "Buckets"
    if snapshot.map is not None:
        buckets += bucket_map(snapshot.map, width=map_columns - 2, rows=map_rows, letters=letters)
        per_cell = snapshot.map.buckets_per_cell
        if per_cell > 1:
            title += f", {per_cell:.0f} a cell ({format_size(int(per_cell * snapshot.bucket_bytes))})"
    left = _box(title, buckets, left_width)
    left += _box("Volumes", panels.volumes(snapshot, inner, rows=max(3, min(8, height - len(left) - 18))), left_width)
    left += _box("Over time", panels.requests(history, inner, more=height >= 50), left_width)
    room = height - len(left) - 2
    if room > 0:
        recent = panels.events(snapshot, rows=room)
        left += _box("Events", [*recent, *[Text()] * (room - len(recent))], left_width)
    right = _side(snapshot, history, height)
    rows = []
    for index in range(height):
        line = left[index] if index < len(left) else Text(" " * left_width)
        rows.append(line.append(" ").append_text(right[index] if index < len(right) else Text()))
    return head + rows


def _side(snapshot: SetSnapshot, history: History, height: int) -> list[Text]:
    # The right column: boxes from top to bottom, the histograms drawn taller if there is room.
    inner = _SIDE_WIDTH - 4
    parts: list[tuple[str, list[Text]]] = [
        ("Free lists", panels.lists(snapshot.allocator, inner, columns=1)),
        ("Allocator", panels.allocation(snapshot, history, inner)),
        ("Gens: buckets by gen - last_gc", panels.gens(snapshot, inner)),
        ("Priorities: age by quantile", panels.priorities(snapshot, inner)),
        ("Garbage collection", panels.collection(snapshot, inner)),
        ("Journal", panels.journal(snapshot, inner)),
        ("Btree", panels.btree(snapshot, inner)),
    ]
    parts = [(title, part) for title, part in parts if part]
    spare = height - sum(len(part) + 2 for _title, part in parts)
    if spare >= 6:
        parts = [(title, _taller(snapshot, title, part, inner, min(8, spare // 2))) for title, part in parts]
    lines: list[Text] = []
    for title, part in parts:
        if len(lines) + len(part) + 2 <= height:
            lines += _box(title, part, _SIDE_WIDTH)
    return lines


def _taller(snapshot: SetSnapshot, title: str, part: list[Text], width: int, rows: int) -> list[Text]:
    # The two histograms as columns over several lines, above the line that tells their numbers.
    allocator = snapshot.allocator
    if title.startswith("Gens") and allocator.gens is not None:
        counts = allocator.gens.histogram
        pairs = [sum(counts[index:index + 2]) ** 0.25 for index in range(0, len(counts), 2)]
        axis = Text(f"0{'':─>{len(pairs) - 3}}96", "bright_black")
        last_gc = Text(f"{panels.percent(counts[0], allocator.nbuckets)} of the buckets not reused since the last gc")
        numbers = Text(f"max {allocator.gens.max}, headroom {allocator.gens.headroom} of {GEN_GUARD}")
        return [*column_chart(pairs, width, rows, "green"), axis, numbers, last_gc]
    if title.startswith("Priorities") and allocator.prio is not None and allocator.prio.sectors_per_quantile:
        return [*column_chart([float(value) for value in allocator.prio.quantiles], width, rows, "blue"), *part]
    return part


def _box(title: str, content: list[Text], width: int) -> list[Text]:
    top = Text.assemble("╭─ ", (title, panels.LABEL), " ", "─" * max(0, width - len(title) - 5), "╮")
    lines = [_cut(top, width)]
    for line in content:
        inside = _cut(line, width - 4)
        framed = Text("│ ")
        framed.append_text(inside)
        lines.append(framed.append(" " * (width - 4 - inside.cell_len) + " │"))
    lines.append(Text("╰" + "─" * (width - 2) + "╯"))
    return lines


def _cut(line: Text, width: int) -> Text:
    if line.cell_len > width:
        line = line.copy()
        line.truncate(width, overflow="ellipsis")
    return line

