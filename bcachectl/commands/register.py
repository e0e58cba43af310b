# SPDX-License-Identifier: GPL-2.0-only
"""``bcachectl register``: give devices to the kernel's driver, after a look whether it would take them."""

from __future__ import annotations

import os
import time
from typing import Any

from bcachectl import control, discovery
from bcachectl.commands.options import DevicesArgument, DryRun, Json, print_json
from bcachectl.control import is_same_file
from bcachectl.discovery import Probe
from bcachectl.errors import DeviceError, Refused, WrongState
from bcachectl.ondisk.superblock import BdevState, Superblock
from bcachectl.sysfs.tree import Node, Sysfs, attribute
from bcachectl.tailfile import left_behind
from bcachectl.units import format_uuid

APPEAR_S = 10.0
"""How long a volume may take to appear after its set and its backing device are there."""

_POLL_S = 0.1


def register(devices: DevicesArgument, dry_run: DryRun = False, as_json: Json = False) -> None:
    """Give devices to the kernel's driver, which then runs their sets and volumes.

    All are looked at first, and refused with the reason where the kernel would only say that an argument is invalid.
    Cache devices go first. A backing device whose state is clean or dirty waits for its set.
    """
    sysfs = Sysfs()
    sysfs.require_driver()
    probes = [_look(path, sysfs) for path in devices]
    _refuse_lost_data(probes)
    probes.sort(key=lambda probe: _superblock(probe).is_backing)
    if dry_run:
        for probe in probes:
            print(f"would write {probe.node.path} to {sysfs.path('fs/bcache/register')}: {_what(_superblock(probe))}")
        return
    results = [_register(probe, sysfs) for probe in probes]
    if as_json:
        print_json("register", {"devices": results})
    else:
        print("\n".join(map(_line, results)))


def _superblock(probe: Probe) -> Superblock:
    assert probe.superblock is not None
    return probe.superblock


def _look(path: str, sysfs: Sysfs) -> Probe:
    # What the kernel would refuse, or what someone else has.
    node = discovery.named(path)
    if node.kind == "missing":
        raise DeviceError(f"{path}: no such file or directory")
    if node.kind in ("file", "image", "other"):
        raise WrongState(f"{path}: is not a block device, and the kernel registers no other; "
                         f"`losetup --find --show {path}` makes one of a file")
    there = _registered(path, sysfs)
    if there is not None:
        raise WrongState(f"{path}: is registered already, as {there}")
    users = discovery.users_of(path)
    if users:
        raise Refused(f"{path}: is in use ({', '.join(users)}); end that first")
    probe = discovery.probe(node)
    if probe.superblock is None:
        raise WrongState(f"{path}: {probe.problem or 'has no bcache superblock'}; the kernel would refuse it")
    if probe.problem is not None:
        raise WrongState(f"{path}: the kernel would refuse it: {probe.problem}")
    left = left_behind(probe.superblock.set_uuid)
    if left is not None:
        raise Refused(f"{path}: {left}; 'bcachectl engine stop {path}' has them written")
    if probe.superblock.is_cache:
        uuid = format_uuid(probe.superblock.set_uuid)
        for live in control.running():
            live.close()
            if live.uuid == uuid:
                raise WrongState(f"{path}: set {uuid} runs already, from {live.cache_path or 'another device'} "
                                 f"({live.source}); a set has one cache device")
    return probe


def _refuse_lost_data(probes: list[Probe]) -> None:
    # A cache that never ran is started as a new one; dirty data that a backing device speaks of is not on it.
    new = {_superblock(probe).set_uuid: probe.node.path for probe in probes
           if _superblock(probe).is_cache and not _superblock(probe).cache_sync}
    for probe in probes:
        sb = _superblock(probe)
        if sb.is_backing and sb.state == BdevState.DIRTY and sb.set_uuid in new:
            raise Refused(f"{probe.node.path}: is dirty, but {new[sb.set_uuid]}, the cache device of its set, never ran"
                          " and has none of its data; `bcachectl resolve` tells what can be done")


def _register(probe: Probe, sysfs: Sysfs) -> dict[str, Any]:
    path, sb = probe.node.path, _superblock(probe)
    uuid = format_uuid(sb.set_uuid)
    try:
        sysfs.register(os.path.realpath(path))
    except DeviceError:
        # udev may have been quicker.
        if _registered(path, sysfs) is None:
            raise
    record: dict[str, Any] = {"device": path, "role": "backing" if sb.is_backing else "cache", "set_uuid": uuid,
                              "volume": None, "volume_path": None, "state": None, "attached": None}
    if not sb.is_backing:
        return record | {"state": "running" if uuid in sysfs.set_uuids() else "waiting"}
    waits = sb.state in (BdevState.CLEAN, BdevState.DIRTY) and uuid not in sysfs.set_uuids()
    node = _node(path, sysfs)
    deadline_s = time.monotonic() + APPEAR_S
    while node is not None and not waits and time.monotonic() < deadline_s:
        if node.volume is not None and os.path.exists(sysfs.device_path(node.volume)):
            break
        time.sleep(_POLL_S)
        node = _node(path, sysfs)
    if node is None:
        raise WrongState(f"{path}: was registered, and is gone again; the kernel's log tells why")
    return record | {"volume": node.volume, "state": attribute(node.directory, "state"),
                     "volume_path": sysfs.device_path(node.volume) if node.volume else None,
                     "attached": node.set_uuid is not None}


def _node(path: str, sysfs: Sysfs) -> Node | None:
    return next((node for node in sysfs.nodes()
                 if node.disk is not None and is_same_file(path, sysfs.device_path(node.disk))), None)


def _registered(path: str, sysfs: Sysfs) -> str | None:
    # What the kernel runs on a device.
    node = _node(path, sysfs)
    if node is not None:
        return node.volume or "a backing device that waits for its set"
    for uuid in sysfs.set_uuids():
        disk = sysfs.cache_disk(uuid)
        if disk is not None and is_same_file(path, sysfs.device_path(disk)):
            return f"the cache device of set {uuid}"
    return None


def _what(sb: Superblock) -> str:
    uuid = format_uuid(sb.set_uuid)
    if sb.is_cache:
        return f"the cache device of set {uuid}" + ("" if sb.cache_sync else ", which has never run")
    alone = sb.state in (BdevState.NONE, BdevState.STALE)
    return "a backing device without a set, which runs at once" if alone else f"a backing device of set {uuid}"


def _line(result: dict[str, Any]) -> str:
    if result["role"] == "cache":
        if result["state"] == "running":
            return f"{result['device']}: set {result['set_uuid']} runs"
        return f"{result['device']}: is registered; the set {result['set_uuid']} does not run yet"
    if result["volume"] is None:
        return (f"{result['device']}: is registered and waits for its cache set {result['set_uuid']} "
                f"(state {result['state']})")
    cached = f"of set {result['set_uuid']}" if result["attached"] else "without a cache"
    return f"{result['device']}: is {result['volume_path']}, {cached}, state {result['state']}"
