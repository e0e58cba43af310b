# SPDX-License-Identifier: GPL-2.0-only
"""``bcachectl monitor``: the live view of a set that runs, and a still picture of a cache device that does not.

On a terminal the view takes the whole screen until Ctrl-C, or until the engine ends.  Anywhere else it is plain text,
a page a tick; with ``--json`` a line a tick.  Of a set of the kernel's there is what sysfs tells.  A device that
nobody runs is read once, without writing to it.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from typing import Annotated

import typer
from rich.console import Console

from bcachectl.commands.options import JSON_SCHEMA, Json, Kernel, complete_set, driver
from bcachectl.control import LiveSet, find
from bcachectl.errors import WrongState
from bcachectl.snapshot import SetSnapshot, to_json
from bcachectl.views.history import History
from bcachectl.views.monitor import PAGE_MAP_ROWS, page, screen
from bcachectl.views.terminal import LiveView, has_color

JSON_CELLS = 1024
"""Cells of the bucket map in ``--json``."""


def monitor(
    target: Annotated[str | None, typer.Argument(metavar="SET", autocompletion=complete_set, show_default=False,
                                                 help="A set that runs, or a cache device that does not; "
                                                      "by default the only set that runs.")] = None,
    kernel: Kernel = None,
    once: Annotated[bool, typer.Option("--once", help="Show the state once and end.")] = False,
    as_json: Json = False,
    interval: Annotated[float, typer.Option("--interval", min=0.1, max=3600.0, metavar="SECONDS",
                                            help="Time between two looks.")] = 1.0,
) -> None:
    """The live view of the allocator and of everything around it."""
    look, close = _source(target, kernel)
    console = Console(highlight=False, soft_wrap=True)
    try:
        if as_json:
            _print_lines(look, interval, once=once)
        elif console.is_terminal and not once:
            _run_screen(look, console, interval)
        else:
            _print_pages(look, console, interval, once=once)
    except KeyboardInterrupt:
        # The usual way to leave a live view.
        pass
    finally:
        close()


Look = Callable[[int], SetSnapshot]


def _source(target: str | None, kernel: bool | None) -> tuple[Look, Callable[[], None]]:
    # Where snapshots come from: a set that runs, else the device itself.
    try:
        live: LiveSet = find(target, driver(kernel)).live
    except WrongState:
        if target is None or not os.path.exists(target):
            raise
        return _still(target), lambda: None
    return live.snapshot, live.close


def _still(path: str) -> Look:
    # Read the device once; only the size of the map may differ from look to look.
    from bcachectl.blockdev import open_device
    from bcachectl.fsck.still import Still

    with open_device(path) as device:
        still = Still(path, lambda sector, count: device.read(sector << 9, count << 9), device.size_bytes >> 9)
    return still.snapshot


def _run_screen(look: Look, console: Console, interval: float) -> None:
    with LiveView(console) as view:
        while True:
            started = time.monotonic()
            view.show(look(view.cells()))
            time.sleep(max(0.0, started + interval - time.monotonic()))


def _print_pages(look: Look, console: Console, interval: float, *, once: bool) -> None:
    history = History()
    while True:
        width = console.width if console.is_terminal else max(80, console.width)
        snapshot = look(width * PAGE_MAP_ROWS)
        history.add(snapshot)
        if console.is_terminal:
            console.print(screen(snapshot, history, width=width, height=console.height - 1,
                                 letters=not has_color(console)))
            print()
        else:
            print(page(snapshot, history, width=width).plain, flush=True)
        if once or snapshot.source == "offline":
            return
        print(flush=True)
        time.sleep(interval)


def _print_lines(look: Look, interval: float, *, once: bool) -> None:
    while True:
        snapshot = look(JSON_CELLS)
        line = {"schema": JSON_SCHEMA, "kind": "monitor", **to_json(snapshot)}
        print(json.dumps(line, separators=(",", ":")), flush=True)
        if once or snapshot.source == "offline":
            return
        sys.stdout.flush()
        time.sleep(interval)
