# SPDX-License-Identifier: GPL-2.0-only
"""``bcachectl flush``: write all dirty data of a volume back to its backing device now, and wait for it."""

from __future__ import annotations

from bcachectl.commands.options import DryRun, Json, Kernel, VolumeArgument, driver, print_json
from bcachectl.commands.waiting import wait_for
from bcachectl.control import KERNEL, find_volume
from bcachectl.units import format_sectors


def flush(volume: VolumeArgument, kernel: Kernel = None, dry_run: DryRun = False, as_json: Json = False) -> None:
    """Write a volume's dirty data back now and wait for it.

    With the kernel's driver, writeback_percent, writeback_delay and writeback_running are changed meanwhile, and
    cache_mode too if dirty data does not get less; all are put back at the end, also when you interrupt it.
    """
    live, name = find_volume(volume, driver(kernel))
    before = next(one for one in live.volumes() if one.name == name)
    if dry_run:
        print(f"would ask the {live.source} of set {live.uuid} to write {format_sectors(before.dirty_sectors)} of "
              f"{name} back"
              + ("; writeback_percent=0, writeback_delay=0 and writeback_running=1 meanwhile"
                 if live.source == KERNEL else ""))
        return
    wait_for(live, live.start("flush", volume=name), f"flushing {name}", volume=name, as_json=as_json)
    after = next(one for one in live.volumes() if one.name == name)
    live.close()
    if as_json:
        print_json("flush", {"volume": name, "state": after.state, "written_bytes": (before.dirty_sectors or 0) * 512})
    else:
        was = f"{format_sectors(before.dirty_sectors)} were dirty" if before.dirty_sectors else "nothing was dirty"
        print(f"{name} is {after.state if after.attached else 'attached to no set'}; {was}")
