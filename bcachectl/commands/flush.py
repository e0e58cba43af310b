# SPDX-License-Identifier: GPL-2.0-only
"""``bcachectl flush``: write all dirty data of a volume back to its backing device now, and wait for it."""

from __future__ import annotations

from bcachectl.commands.options import DryRun, Json, VolumeArgument, print_json
from bcachectl.commands.waiting import wait_for
from bcachectl.control import find_volume
from bcachectl.units import format_sectors


def flush(volume: VolumeArgument, dry_run: DryRun = False, as_json: Json = False) -> None:
    """Write a volume's dirty data back now and wait for it."""
    live, name = find_volume(volume)
    before = next(one for one in live.snapshot(0).volumes if one.name == name)
    if dry_run:
        print(f"would ask the {live.source} of set {live.uuid} to write {format_sectors(before.dirty_sectors)} of "
              f"{name} back")
        return
    wait_for(live, live.start("flush", volume=name), f"flushing {name}", volume=name, as_json=as_json)
    after = next(one for one in live.snapshot(0).volumes if one.name == name)
    live.close()
    if as_json:
        print_json("flush", {"volume": name, "state": after.state, "written_bytes": before.dirty_sectors * 512})
    else:
        print(f"{name} is {after.state}; {format_sectors(before.dirty_sectors)} were dirty")
