# SPDX-License-Identifier: GPL-2.0-only
"""``bcachectl unregister``: the kernel's driver lets go of a set, or of one backing device."""

from __future__ import annotations

from typing import Annotated

import typer

from bcachectl.commands.options import DryRun, Json, complete_target, print_json
from bcachectl.commands.preflight import refuse_users
from bcachectl.commands.stop import stop_kernel
from bcachectl.commands.waiting import ALL_VOLUMES, wait_for
from bcachectl.control import KERNEL, LiveSet, find
from bcachectl.units import format_sectors


def unregister(
    target: Annotated[str, typer.Argument(metavar="SET|VOLUME", autocompletion=complete_target, show_default=False,
                                          help="A set, or one volume, that the kernel runs.")],
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Take a set apart: all dirty data is written back, every backing device is detached and runs on without a cache.

    Of a VOLUME only its backing device is let go: the volume ends, stays attached to its set, and its dirty data stays
    in the cache. To end a set and keep it together, use `stop`.
    """
    live, volume = find(target, KERNEL)
    if volume:
        stop_kernel(live, volume, dry_run=dry_run, as_json=as_json)
    else:
        _unregister_set(live, dry_run=dry_run, as_json=as_json)


def _unregister_set(live: LiveSet, *, dry_run: bool, as_json: bool) -> None:
    volumes = live.volumes()
    refuse_users(volume for volume in volumes if volume.kind == "flash")
    cached = [volume for volume in volumes if volume.kind == "cached"]
    dirty_sectors = sum(volume.dirty_sectors or 0 for volume in cached)
    if dry_run:
        for volume in volumes:
            effect = ("ends; its data stays on the cache device" if volume.kind == "flash" else
                      f"is detached, after {format_sectors(volume.dirty_sectors)} of dirty data are written back")
            print(f"would write 1 to unregister of set {live.uuid}: {volume.name} {effect}")
        print(f"would write 1 to unregister of set {live.uuid}: {live.cache_path} is let go")
        return
    wait_for(live, live.start("unregister"), f"unregistering set {live.uuid}", volume=ALL_VOLUMES, as_json=as_json)
    names = [volume.name for volume in cached]
    if as_json:
        print_json("unregister", {"set": live.uuid, "detached": names, "dirty_bytes": dirty_sectors * 512})
    else:
        alone = f"; without a cache from now on: {', '.join(names)}" if names else ""
        print(f"the kernel has let go of set {live.uuid}{alone}")
