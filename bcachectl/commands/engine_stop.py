# SPDX-License-Identifier: GPL-2.0-only
"""``bcachectl engine stop``: the engine of a set ends in good order."""

from __future__ import annotations

import os
from typing import Annotated

import typer

from bcachectl import discovery
from bcachectl.commands.options import DryRun, Json, complete_set, print_json
from bcachectl.control import ENGINE, LiveSet, engines, find_set, looks_like_uuid, parse_set_uuid, socket_dirs
from bcachectl.engine.export.host import settle
from bcachectl.engine.export.loopdev import clean_all_stale
from bcachectl.engine.export.ublk_control import UblkControl, delete_dead, is_available, left_over
from bcachectl.errors import WrongState
from bcachectl.tailfile import left_behind
from bcachectl.units import format_uuid, parse_uuid

STOP_TIMEOUT_S = 600.0
"""How long an orderly stop may take: all dirty btree nodes and the journal are written."""


def engine_stop(
    target: Annotated[str | None, typer.Argument(metavar="SET", autocompletion=complete_set, show_default=False,
                                                 help="The set to stop; by default the only one that runs.")] = None,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Stop an engine in good order, as SIGTERM does.

    What an engine that was killed left behind is removed first: dead mounts and their loop devices, and the ublk
    devices of SET, a whole UUID or a device of the set. Requests that wait on such a ublk device fail; 'engine run
    --recover' would serve them. What was answered, and is only in memory yet, is written to the cache device.
    """
    if target is not None and clear_up(target, dry_run=dry_run):
        return
    if not dry_run and os.geteuid() == 0:
        left = clean_all_stale(socket_dirs())
        if left and target is None and not engines():
            print("\n".join(f"removed {path}, left by an engine that was killed" for path in left))
            return
    stop_engine(find_set(target, ENGINE), dry_run=dry_run, as_json=as_json)


def clear_up(target: str, *, dry_run: bool) -> bool:
    """Remove the ublk devices that a killed engine of this set left, and have written what it left in memory; False if
    there is nothing of that, or an engine runs it.
    """
    uuid = _set_uuid(target)
    if uuid is None or any(engine.uuid == format_uuid(uuid) for engine in engines()):
        return False
    has_removed = is_available() and _remove_devices(uuid, dry_run=dry_run)
    return _settle_tail(uuid, target, dry_run=dry_run) or has_removed


def _settle_tail(uuid: bytes, target: str, *, dry_run: bool) -> bool:
    left = left_behind(uuid)
    if left is None:
        return False
    paths = [target] if os.path.exists(target) else []
    nodes = [discovery.named(path) for path in paths] + discovery.enumerate_devices()
    caches = [node.path for node in nodes if (sb := discovery.probe(node).superblock) is not None
              and sb.is_cache and sb.set_uuid == uuid]
    if not caches:
        raise WrongState(f"{left}; name the cache device of the set, to which they belong")
    if dry_run:
        print(f"would write to {caches[0]} what the killed engine had answered and not written there")
        return True
    count = settle(caches[0])
    print(f"wrote to {caches[0]} what the killed engine had answered and not written there: {count:,} "
          f"{'key' if count == 1 else 'keys'}")
    return True


def _remove_devices(uuid: bytes, *, dry_run: bool) -> bool:
    control = UblkControl()
    try:
        left = left_over(control, uuid)
        for info in left:
            device = f"/dev/ublkb{info.dev_id}"
            users = [user for path in (device, *_partitions(device)) for user in discovery.users_of(path)]
            if users:
                raise WrongState(f"{device}: {', '.join(users)}; take it back with 'bcachectl engine run --recover', "
                                 "or unmount it")
            if dry_run:
                print(f"would remove {device}, left by an engine that was killed")
                continue
            control.stop(info.dev_id)
            control.delete(info.dev_id)
            print(f"removed {device}, left by an engine that was killed")
        if not dry_run:
            delete_dead(control, uuid)
    finally:
        control.close()
    return bool(left)


def _partitions(device: str) -> list[str]:
    name = os.path.basename(device)
    return [f"/dev/{entry}" for entry in sorted(os.listdir(f"/sys/block/{name}")) if entry.startswith(f"{name}p")]


def _set_uuid(target: str) -> bytes | None:
    # Of a whole uuid, or of a device of the set.
    if looks_like_uuid(target):
        return parse_uuid(parse_set_uuid(target))
    superblock = discovery.probe(discovery.named(target)).superblock if os.path.exists(target) else None
    return None if superblock is None else superblock.set_uuid


def stop_engine(live: LiveSet, *, dry_run: bool, as_json: bool) -> None:
    """Ask the engine to stop and wait until it is gone."""
    if dry_run:
        print(f"would ask the {live.source} of set {live.uuid} to stop; it would write what is journaled and not yet "
              "in the btree")
        return
    job = live.start("stop")
    job.wait(STOP_TIMEOUT_S)
    if not live.wait_end(STOP_TIMEOUT_S):
        raise WrongState(f"the engine of set {live.uuid} has not ended within {STOP_TIMEOUT_S:.0f} s")
    if as_json:
        print_json("stop", {"set": live.uuid})
    else:
        print(f"set {live.uuid} has stopped")
