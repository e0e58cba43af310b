# SPDX-License-Identifier: GPL-2.0-only
"""``bcachectl status``: one page about a set or a volume that runs, from the engine or the driver that runs it."""

from __future__ import annotations

import os
from typing import Annotated

import typer
from rich.console import Console

from bcachectl.commands.options import Json, Kernel, complete_target, driver, print_json
from bcachectl.control import find
from bcachectl.errors import WrongState
from bcachectl.snapshot import to_json
from bcachectl.views.status import status_page


def status(
    target: Annotated[str | None, typer.Argument(metavar="SET|VOLUME", autocompletion=complete_target,
                                                 show_default=False,
                                                 help="What to show; by default the only set that runs.")] = None,
    kernel: Kernel = None,
    as_json: Json = False,
) -> None:
    """State, mode, dirty data, hit ratios and buckets by state, as one page."""
    try:
        live, volume = find(target, driver(kernel))
    except WrongState as error:
        if target is None or not os.path.exists(target):
            raise
        raise WrongState(f"{error}; what the device itself tells is in `bcachectl list {target}` and, of a cache "
                         f"device, in `bcachectl monitor --once {target}`") from error
    snapshot = live.snapshot(0)
    live.close()
    if as_json:
        print_json("status", to_json(snapshot))
    else:
        Console(highlight=False, soft_wrap=True).print(status_page(snapshot, only_volume=volume))
