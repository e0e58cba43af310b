# SPDX-License-Identifier: GPL-2.0-only
"""``bcachectl volume create`` and ``volume remove``: flash-only volumes, which live in the cache alone."""

from __future__ import annotations

from typing import Annotated

import typer

from bcachectl.commands.options import (
    DryRun,
    Force,
    Json,
    Kernel,
    SetArgument,
    VolumeArgument,
    driver,
    print_json,
)
from bcachectl.commands.preflight import refuse_users
from bcachectl.commands.waiting import wait_for
from bcachectl.control import find_set, find_volume
from bcachectl.errors import Refused, WrongState
from bcachectl.units import format_sectors, format_size, parse_size

DATA_HAZARD = "data"


def create(
    target: SetArgument,
    size: Annotated[str, typer.Argument(metavar="SIZE", show_default=False, help="As 512M, 4G or 1TiB.")],
    kernel: Kernel = None,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Make a flash-only volume; it is exported at once."""
    size_bytes = parse_size(size)
    live = find_set(target, driver(kernel))
    if dry_run:
        print(f"would ask the {live.source} of set {live.uuid} for a volume of {format_size(size_bytes)}; it would "
              "write the uuid array and a journal entry")
        return
    job = live.start("volume_create", size=size_bytes)
    wait_for(live, job, "making the volume")
    live.close()
    if as_json:
        print_json("volume create", {"set": live.uuid, "volume": job.result, "size_bytes": size_bytes})
    else:
        print(f"{job.result} is a flash-only volume of {format_size(size_bytes)}")


def remove(volume: VolumeArgument, force: Force = None, kernel: Kernel = None, dry_run: DryRun = False,
           as_json: Json = False) -> None:
    """Remove a flash-only volume; all its data is lost."""
    live, name = find_volume(volume, driver(kernel))
    found = next(one for one in live.volumes() if one.name == name)
    if found.kind != "flash":
        raise WrongState(f"{name} is a cached device, not a flash-only volume; `detach` takes it out of the set")
    refuse_users([found])
    # The kernel does not tell how much of it is in use.
    if found.dirty_sectors != 0 and DATA_HAZARD not in (force or []) and not dry_run:
        held = "may hold" if found.dirty_sectors is None else f"holds {format_sectors(found.dirty_sectors)} of"
        raise Refused(f"{name} {held} data that exists nowhere else", hazard=DATA_HAZARD)
    if dry_run:
        print(f"would ask the {live.source} of set {live.uuid} to remove {name} with its "
              f"{format_sectors(found.dirty_sectors)} of data; it would write the uuid array and journal entries")
        return
    wait_for(live, live.start("volume_remove", volume=name), f"removing {name}")
    live.close()
    if as_json:
        print_json("volume remove", {"set": live.uuid, "volume": name})
    else:
        print(f"{name} is removed")
