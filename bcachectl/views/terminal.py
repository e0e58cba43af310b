# SPDX-License-Identifier: GPL-2.0-only
"""`LiveView`: a terminal that shows one set for as long as someone looks, on the alternate screen.

``bcachectl monitor`` and ``engine run --live`` use it alike: ask `LiveView.cells` how large a map there is room for,
take a snapshot with that many cells, `LiveView.show` it, again and again.  The size of the terminal may change between
two looks.
"""

from __future__ import annotations

from types import TracebackType

from rich.console import Console
from rich.live import Live

from bcachectl.snapshot import SetSnapshot
from bcachectl.views.history import History
from bcachectl.views.monitor import map_size, screen


def has_color(console: Console) -> bool:
    """Whether colours can tell anything: not with ``NO_COLOR``, nor on a dumb terminal."""
    return console.color_system is not None and not console.no_color


class LiveView:
    """The alternate screen of a terminal; a context manager that gives the terminal back as it was."""

    def __init__(self, console: Console, history: History | None = None) -> None:
        """``history`` goes on where an earlier view ended."""
        self.console = console
        self.history = history or History()
        self._live = Live(console=console, screen=True, auto_refresh=False, redirect_stdout=False,
                          redirect_stderr=False)

    def __enter__(self) -> LiveView:
        self._live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 traceback: TracebackType | None) -> None:
        self._live.stop()

    def cells(self) -> int:
        """How many cells of the bucket map the terminal has room for now."""
        columns, rows = map_size(width=self.console.width, height=self.console.height)
        return columns * rows

    def show(self, snapshot: SetSnapshot) -> None:
        """Draw the snapshot."""
        self.history.add(snapshot)
        drawn = screen(snapshot, self.history, width=self.console.width, height=self.console.height,
                       letters=not has_color(self.console))
        self._live.update(drawn, refresh=True)
