# SPDX-License-Identifier: GPL-2.0-only
"""``bcachectl attach``: give a backing device that waits, or runs uncached, to a set that runs."""

from __future__ import annotations

import os
from typing import Annotated

import typer

from bcachectl.commands.options import DryRun, Json, VolumeArgument, complete_set, print_json
from bcachectl.commands.waiting import wait_for
from bcachectl.control import LiveSet, engines, find_set, looks_like_uuid, parse_set_uuid
from bcachectl.errors import WrongState


def attach(
    volume: VolumeArgument,
    target: Annotated[str, typer.Argument(metavar="SET", autocompletion=complete_set, show_default=False,
                                          help="The set's uuid, a unique prefix of it, or a DEVICE of it.")],
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Attach a volume to a set; a backing DEVICE that the set's engine has not open yet is opened."""
    live = _find_set(target)
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


def _find_set(text: str) -> LiveSet:
    # A uuid is checked for typing mistakes first; then it has to run.
    if not looks_like_uuid(text):
        return find_set(text)
    uuid = parse_set_uuid(text)
    running = engines()
    found = [engine for engine in running if engine.uuid == uuid]
    for engine in running:
        if engine not in found:
            engine.close()
    if not found:
        there = ", ".join(engine.uuid for engine in running) or "none"
        raise WrongState(f"no running set has the uuid {uuid} (sets that run: {there})")
    return found[0]
