# SPDX-License-Identifier: GPL-2.0-only
"""``bcachectl stop``: stop a set in good order.  Backing devices stay attached, and dirty data stays in the cache."""

from __future__ import annotations

from bcachectl.commands.engine_stop import stop_engine
from bcachectl.commands.options import DryRun, Json, Kernel, SetArgument, driver, print_json
from bcachectl.commands.preflight import refuse_users
from bcachectl.commands.waiting import wait_for
from bcachectl.control import KERNEL, LiveSet, find
from bcachectl.errors import WrongState
from bcachectl.snapshot import VolumeSnapshot


def stop(target: SetArgument, kernel: Kernel = None, dry_run: DryRun = False, as_json: Json = False) -> None:
    """Stop a set: its volumes go away, everything journaled is written.

    Of the kernel's driver also one volume alone can be stopped. Devices stay attached, and dirty data stays in the
    cache until the next start; `unregister` takes a set apart instead.
    """
    live, volume = find(target, driver(kernel))
    if live.source == KERNEL:
        stop_kernel(live, volume, dry_run=dry_run, as_json=as_json)
        return
    if volume:
        live.close()
        raise WrongState(f"{volume} is one volume of set {live.uuid}, and an engine runs all or none; stop the set, or "
                         f"`bcachectl detach {volume}`")
    stop_engine(live, dry_run=dry_run, as_json=as_json)


def stop_kernel(live: LiveSet, volume: str, *, dry_run: bool, as_json: bool) -> None:
    """Stop a set of the kernel's, or one volume of it, that nobody uses."""
    affected = [one for one in live.volumes() if volume in ("", one.name)]
    refuse_users(affected)
    if dry_run:
        _show_plan(live, affected, volume)
        return
    what = volume or f"set {live.uuid}"
    job = live.start("volume_stop", volume=volume) if volume else live.start("stop")
    wait_for(live, job, f"stopping {what}", as_json=as_json)
    if as_json:
        print_json("stop", {"set": live.uuid or None, "volume": volume or None})
    else:
        print(f"{what} has stopped")


def _show_plan(live: LiveSet, affected: list[VolumeSnapshot], volume: str) -> None:
    for one in affected:
        if one.kind == "cached":
            dirty = ", which stays dirty" if one.has_dirty else ""
            print(f"would write 1 to stop of {one.name} on {one.backing_path}{dirty}")
    if not volume:
        print(f"would write 1 to stop of set {live.uuid} on {live.cache_path}")
