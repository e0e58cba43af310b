# SPDX-License-Identifier: GPL-2.0-only
"""``bcachectl detach``: take a volume's backing device out of its set, after all its dirty data is written back."""

from __future__ import annotations

from typing import Annotated

import typer

from bcachectl.commands.options import DryRun, Json, Kernel, VolumeArgument, driver, print_json
from bcachectl.commands.waiting import wait_for
from bcachectl.control import find_volume
from bcachectl.errors import WrongState
from bcachectl.units import format_sectors

START_S = 0.5
"""How long a refusal may take to come back when nobody wants to wait for the rest."""


def detach(
    volume: VolumeArgument,
    wait: Annotated[bool, typer.Option("--wait", help="Return when it is done, and show how far it is.")] = False,
    kernel: Kernel = None,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Detach a volume from its set: write its dirty data back, then run it uncached."""
    live, name = find_volume(volume, driver(kernel))
    before = next(one for one in live.volumes() if one.name == name)
    if not before.attached:
        raise WrongState(f"{name} is not attached to a set")
    if dry_run:
        print(f"would ask the {live.source} of set {live.uuid} to detach {name}: write "
              f"{format_sectors(before.dirty_sectors)} of dirty data back, then its superblock and the uuid array")
        return
    job = live.start("detach", volume=name)
    is_done = job.wait(START_S)
    if wait and not is_done:
        wait_for(live, job, f"detaching {name}", volume=name, as_json=as_json)
        is_done = True
    if as_json:
        print_json("detach", {"volume": name, "is_done": is_done, "dirty_bytes": (before.dirty_sectors or 0) * 512})
    elif is_done:
        print(f"{name} is detached; its backing device holds all its data")
    else:
        print(f"{name} is being detached: {format_sectors(before.dirty_sectors)} of dirty data are written back first "
              f"(`bcachectl detach --wait` shows how far it is)")
