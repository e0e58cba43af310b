# SPDX-License-Identifier: GPL-2.0-only
"""``bcachectl run``: force a backing device that waits for its cache set to run without it."""

from __future__ import annotations

from bcachectl import discovery
from bcachectl.blockdev import open_device
from bcachectl.commands.options import DeviceArgument, DryRun, Force, Json, print_json
from bcachectl.commands.waiting import wait_for
from bcachectl.control import find_cached_alone
from bcachectl.errors import BcachectlError, Refused
from bcachectl.fsck.still import Still
from bcachectl.sysfs.live import KernelAlone
from bcachectl.units import format_sectors, format_uuid

DIRTY_HAZARD = "dirty"


def run(device: DeviceArgument, force: Force = None, dry_run: DryRun = False, as_json: Json = False) -> None:
    """Run a backing device without the cache set that it waits for.

    If its state is dirty, its newest data is only in the cache and would be lost; that is refused unless
    --force=dirty says so. It is told how much that is, if the cache device is here. Afterwards the state is
    inconsistent, and at the next attach nothing of what a cache has for it is used.
    """
    alone = find_cached_alone(device)
    state = alone.get("", ["state"])["state"]
    set_uuid, cache = _cache_of(alone)
    where = f"; its cache device {cache} is here, `bcachectl register {cache}` gives it to the kernel" if cache else ""
    if state == "dirty" and DIRTY_HAZARD not in (force or []) and not dry_run:
        raise Refused(f"{device}: its newest data is only in the cache of set {set_uuid or 'unknown'}"
                      f"{_how_much(alone, cache)} and would be lost{where}", hazard=DIRTY_HAZARD)
    if dry_run:
        lost = f"; what only its cache has is lost{_how_much(alone, cache)}" if state == "dirty" else ""
        print(f"would write 1 to {alone.node.directory}/running (state {state}){lost}{where}")
        return
    job = alone.start("run")
    wait_for(alone, job, f"starting {device}")
    if as_json:
        print_json("run", {"device": device, "volume": job.result, "state_before": state,
                           "state": alone.get("", ["state"])["state"]})
    else:
        print(f"{device} runs as {job.result} without a cache; its state was {state}")


def _cache_of(alone: KernelAlone) -> tuple[str | None, str | None]:
    # The set that the backing device names in its superblock, and the set's cache device if it is here.
    own = discovery.probe(discovery.named(alone.sysfs.device_path(alone.node.disk or ""))).superblock
    if own is None:
        return None, None
    for node in discovery.enumerate_devices():
        found = discovery.probe(node).superblock
        if found is not None and found.is_cache and found.set_uuid == own.set_uuid:
            return format_uuid(own.set_uuid), node.path
    return format_uuid(own.set_uuid), None


def _how_much(alone: KernelAlone, cache: str | None) -> str:
    # Nothing is said where it cannot be counted.
    if cache is None:
        return ""
    uuid = alone.volumes()[0].uuid
    try:
        with open_device(cache) as device:
            still = Still(cache, lambda sector, count: device.read(sector << 9, count << 9), device.size_bytes >> 9)
    except BcachectlError:
        return ""
    found = [volume for volume in still.snapshot(0).volumes if volume.uuid == uuid]
    return f" ({format_sectors(found[0].dirty_sectors)})" if found else ""
