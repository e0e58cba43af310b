# SPDX-License-Identifier: GPL-2.0-only
"""``bcachectl engine list``: the engines that run here, with what they run."""

from __future__ import annotations

from typing import Any

from bcachectl import control
from bcachectl.commands.options import Json, print_json
from bcachectl.control import EngineSet, engines
from bcachectl.errors import BcachectlError
from bcachectl.tailfile import killed_sets
from bcachectl.units import format_sectors, format_size, format_uuid


def engine_list(as_json: Json = False) -> None:
    """The engines that run here.

    Below them are the sets whose engine was killed and left answered writes in memory.
    """
    described = [_describe(engine) for engine in engines()]
    killed = killed_sets()
    if as_json:
        print_json("engines", {"engines": described, "killed": [
            {"set": format_uuid(uuid), "left_behind": left} for uuid, left in killed]})
        return
    if not described:
        print(control.no_engine())
    for engine in described:
        print(f"set {engine['set']}  pid {engine['pid']}  cache {engine['cache'] or '?'}")
        for volume in engine["volumes"]:
            words = (f"  {volume['volume']:<9} {format_size(volume['size_bytes']):>9}", f"{volume['mode']:<12}",
                     f"{volume['state']:<12}", f"{format_sectors(volume['dirty_bytes'] >> 9)} dirty",
                     volume["backing"] or "")
            print("  ".join(words).rstrip())
            for place in (volume["device"], volume["uri"]):
                if place:
                    print(f"    {place}")
    for uuid, left in killed:
        print(f"set {format_uuid(uuid)}  {left}")


def _describe(engine: EngineSet) -> dict[str, Any]:
    record: dict[str, Any] = {"set": engine.uuid, "pid": engine.pid, "version": engine.version, "socket": engine.path,
                              "cache": None, "failed": None, "volumes": []}
    try:
        snapshot = engine.snapshot(0)
        places = engine.places()
    except BcachectlError:
        # It ended meanwhile, or is too busy to answer; that it is there is worth a line all the same.
        return record
    finally:
        engine.close()
    record["cache"] = snapshot.cache_path
    record["failed"] = snapshot.failed
    record["volumes"] = [{"volume": volume.name, "uuid": volume.uuid, "label": volume.label,
                          "size_bytes": volume.size_bytes,
                          "kind": volume.kind, "mode": volume.mode, "state": volume.state,
                          "dirty_bytes": (volume.dirty_sectors or 0) * 512, "backing": volume.backing_path,
                          **{where: places.get(volume.name, {}).get(where) for where in ("device", "uri")}}
                         for volume in snapshot.volumes]
    return record
