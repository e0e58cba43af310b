# SPDX-License-Identifier: GPL-2.0-only
"""``bcachectl attach``: give a backing device that waits, or runs uncached, to a set that runs."""

from __future__ import annotations

import os
from typing import Annotated

import typer

from bcachectl import discovery
from bcachectl.commands.options import DryRun, Json, Kernel, VolumeArgument, complete_set, driver, print_json
from bcachectl.commands.waiting import wait_for
from bcachectl.control import KERNEL, LiveSet, find_set, looks_like_uuid, parse_set_uuid, running
from bcachectl.errors import WrongState
from bcachectl.sysfs.live import find_cached
from bcachectl.sysfs.tree import Sysfs


def attach(
    volume: VolumeArgument,
    target: Annotated[str, typer.Argument(metavar="SET", autocompletion=complete_set, show_default=False,
                                          help="The set's uuid, a unique prefix of it, or a DEVICE of it.")],
    kernel: Kernel = None,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Attach a volume to a set; a backing DEVICE that the set's engine has not open yet is opened.

    To a set of the kernel's only a backing device can be attached that is registered.
    """
    live = _find_set(target, driver(kernel))
    if live.source == KERNEL:
        _check_blocks(volume, live)
    if dry_run:
        print(f"would ask the {live.source} of set {live.uuid} to attach {volume}; it would write the backing device's "
              "superblock (byte 4096, 4096 bytes) and, for a new slot, the uuid array and a journal entry")
        return
    # The engine may run in another directory.
    named = os.path.abspath(volume) if os.path.exists(volume) else volume
    job = live.start("attach", volume=named, set=live.uuid)
    wait_for(live, job, f"attaching {volume}")
    if as_json:
        print_json("attach", {"volume": job.result, "set": live.uuid})
    else:
        print(f"{volume} is attached to set {live.uuid} as {job.result}")


def _find_set(text: str, source: str | None) -> LiveSet:
    # A uuid is checked for typing mistakes first; then it has to run.
    if not looks_like_uuid(text):
        return find_set(text, source)
    uuid = parse_set_uuid(text)
    sets = running(source)
    found = [live for live in sets if live.uuid == uuid]
    for live in sets:
        if live not in found:
            live.close()
    if not found:
        there = ", ".join(live.uuid for live in sets) or "none"
        raise WrongState(f"no running set has the uuid {uuid} (sets that run: {there})")
    return found[0]


def _check_blocks(volume: str, live: LiveSet) -> None:
    # What the kernel answers with EINVAL and a line in its log (super.c, bch_cached_dev_attach).
    sysfs = Sysfs()
    node = find_cached(sysfs, volume)
    sb = discovery.probe(discovery.named(sysfs.device_path(node.disk or ""))).superblock
    block_bytes = live.snapshot(0).block_bytes
    if sb is not None and sb.block_size << 9 < block_bytes:
        raise WrongState(f"{volume}: has blocks of {sb.block_size << 9} bytes, the set of {block_bytes}; a backing "
                         "device needs blocks at least as large as the set's")
