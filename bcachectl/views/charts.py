# SPDX-License-Identifier: GPL-2.0-only
"""Small drawings in text: bars, sparklines, and the map of all buckets.  Each gives a `Text` of an exact width.

Colours carry no meaning of their own: a bucket's state is also told by its letter when colours are off (`bucket_map`
with ``letters``), and a bar always stands beside its numbers.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from rich.text import Span, Text

from bcachectl.snapshot import MAP_STATES, MapSnapshot

STATE_NAMES = dict(zip(MAP_STATES, ("unused", "free", "open", "clean", "dirty", "metadata", "reserved"), strict=True))

STATE_STYLES = {"u": "bright_black", "f": "cyan", "o": "green", "c": "blue", "d": "yellow",
                "m": "magenta", "r": "bold"}
"""One colour a state, told apart by people who confuse red and green as well."""

STATE_LETTERS = {"u": ".", "f": "f", "o": "o", "c": "c", "d": "D", "m": "M", "r": "J"}
"""What stands for a state where there are no colours; the two that must not be lost are capitals."""

_LEVELS = "▁▂▃▄▅▆▇█"
_SHADES = "░▒▓█"
_COLUMN = " ▁▂▃▄▅▆▇█"
_EIGHTHS = " ▏▎▍▌▋▊▉"


def bar(used: float, size: float, width: int, style: str = "") -> Text:
    """``used`` of ``size`` as a bar of ``width`` cells, in steps of an eighth."""
    share = min(max(used / size, 0.0), 1.0) if size else 0.0
    eighths = round(share * width * 8)
    if used and not eighths:
        eighths = 1
    whole, rest = divmod(eighths, 8)
    drawn = "█" * whole + (_EIGHTHS[rest] if rest else "")
    return Text.assemble((drawn, style), ("·" * (width - len(drawn)), "bright_black"))


def sparkline(values: Sequence[float | None], width: int, style: str = "", *, top: float | None = None) -> Text:
    """The newest ``width`` values, newest at the right; ``top`` is the value that fills a cell, by default the largest.

    None is drawn as a blank, zero as the lowest line, so that "nothing happened" and "not known" look different.
    """
    shown = list(values)[-width:]
    known = [value for value in shown if value is not None]
    scale = top if top is not None else max(known, default=0.0)
    cells = [" " if value is None else _level(value, scale) for value in shown]
    return Text(" " * (width - len(cells)) + "".join(cells), style)


def histogram(counts: Sequence[int], width: int, style: str = "") -> Text:
    """Counts as columns, drawn on a scale of roots so that a few stragglers beside thousands stay visible.

    More counts than ``width`` are added up in neighbouring groups; an empty group is a dot.
    """
    groups = [0] * min(width, len(counts))
    for index, count in enumerate(counts):
        groups[index * len(groups) // len(counts)] += count
    top = max(groups, default=0) ** 0.25
    cells = ["·" if not group else _level(float(group) ** 0.25, top) for group in groups]
    return Text("".join(cells), style)


def column_chart(values: Sequence[float], width: int, height: int, style: str = "") -> list[Text]:
    """Values as columns over several lines; each value is as many cells wide as fit, the largest fills the height."""
    cell_width = max(1, width // max(1, len(values)))
    shown = list(values)[:width // cell_width]
    top = max(shown, default=0.0)
    steps = [max(1, round(value / top * height * 8)) if value > 0 and top > 0 else 0 for value in shown]
    lines = []
    for row in range(height - 1, -1, -1):
        cells = [_COLUMN[min(8, max(0, step - row * 8))] for step in steps]
        lines.append(Text("".join(cell * cell_width for cell in cells), style))
    return lines


def bucket_map(buckets: MapSnapshot, *, width: int, rows: int, letters: bool) -> list[Text]:
    """The map as lines of ``width`` cells, at most ``rows`` of them.

    In colour a cell's shade says how full it is; with ``letters`` a cell is the letter of its state.
    """
    lines: list[Text] = []
    for start in range(0, min(len(buckets.states), width * rows), width):
        states = buckets.states[start:start + width]
        if letters:
            lines.append(Text("".join([STATE_LETTERS[state] for state in states])))
            continue
        fills = buckets.fills[start:start + width]
        cells = ["·" if state == "u" else _SHADES[min(fill, 99) // 25]
                 for state, fill in zip(states, fills, strict=True)]
        # Neighbours of one state are one span, made directly: a screen has thousands of cells.
        spans: list[Span] = []
        at = 0
        for state, run in itertools.groupby(states):
            end = at + len(list(run))
            spans.append(Span(at, end, STATE_STYLES[state]))
            at = end
        lines.append(Text("".join(cells), spans=spans))
    return lines


def _level(value: float, scale: float) -> str:
    if value <= 0 or scale <= 0:
        return _LEVELS[0]
    return _LEVELS[max(1, min(len(_LEVELS) - 1, round(value / scale * (len(_LEVELS) - 1))))]
