# SPDX-License-Identifier: GPL-2.0-only
"""Plain tables and lists of fields: columns aligned by blanks, for people and for ``grep`` alike.

Rows are streamed: a dump of a large cache is printed while it is read, so the width of a column is that of its first
`LOOK_AHEAD_ROWS` rows.  Numbers stand right.  Headings are bold on a terminal and plain in a pipe, unless the
environment says otherwise (``NO_COLOR``, ``FORCE_COLOR``); `wants_color` decides, everything else is a pure function.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain, islice
from typing import TextIO

LOOK_AHEAD_ROWS = 2000
GAP = "  "

Cell = str | int | None
"""A number is aligned right; None is shown as ``-``."""


def wants_color(stream: TextIO, environment: Mapping[str, str]) -> bool:
    """Whether to print escape sequences to ``stream``."""
    if environment.get("NO_COLOR"):
        return False
    if environment.get("FORCE_COLOR"):
        return True
    return stream.isatty() and environment.get("TERM", "dumb") != "dumb"


def bold(text: str, color: bool) -> str:
    """``text`` in bold if ``color``."""
    return f"\x1b[1m{text}\x1b[0m" if color and text else text


def table(headings: Sequence[str], rows: Iterable[Sequence[Cell]], *, color: bool = False) -> Iterator[str]:
    """The lines of a table; a table without rows has no lines."""
    every = iter(rows)
    first = list(islice(every, LOOK_AHEAD_ROWS))
    if not first:
        return
    widths = [max(len(heading), *(len(_text(row[column])) for row in first))
              for column, heading in enumerate(headings)]
    is_right = [all(isinstance(row[column], int) or row[column] is None for row in first)
                for column in range(len(headings))]
    yield bold(_join(headings, widths, is_right), color)
    for row in chain(first, every):
        yield _join([_text(cell) for cell in row], widths, is_right)


def fields(pairs: Iterable[tuple[str, Cell]], *, indent: str = "") -> Iterator[str]:
    """Names and values, one pair a line, the values aligned."""
    every = [(name, _text(value)) for name, value in pairs]
    width = max((len(name) for name, _ in every), default=0)
    for name, value in every:
        yield f"{indent}{name.ljust(width)}{GAP}{value}".rstrip()


def _text(cell: Cell) -> str:
    return "-" if cell is None else str(cell)


def _join(cells: Sequence[str], widths: Sequence[int], is_right: Sequence[bool]) -> str:
    return GAP.join(cell.rjust(width) if right else cell.ljust(width)
                    for cell, width, right in zip(cells, widths, is_right, strict=True)).rstrip()
