# SPDX-License-Identifier: GPL-2.0-only
"""``bcachectl list``: everything of bcache that is here."""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
from typing import Annotated, Any

import typer

from bcachectl import control, describe, discovery
from bcachectl.commands.options import Json, complete_device, json_line, print_json
from bcachectl.discovery import BlockNode, Probe
from bcachectl.errors import BcachectlError
from bcachectl.snapshot import VolumeSnapshot
from bcachectl.tailfile import left_behind
from bcachectl.units import format_uuid
from bcachectl.views import listing, table

DevicesOption = Annotated[list[str] | None, typer.Argument(
    metavar="DEVICE", autocompletion=complete_device, show_default=False,
    help="Image files, or devices, to look at besides those that are found.")]
WatchOption = Annotated[bool, typer.Option("--watch", help="Go on, and print what comes, changes and goes.")]


def list_devices(devices: DevicesOption = None, watch: WatchOption = False, as_json: Json = False) -> int:
    """List the bcache devices, sets, volumes, engines and kernel devices that are here.

    Block devices are found through sysfs and read; DEVICEs are read as well. One that cannot be read is listed with the
    reason; if it was named, the exit status is 1.
    """
    engines = _engines()
    kernel_sets = _kernel_sets()
    named = [discovery.named(path) for path in devices or ()]
    found = [node for node in discovery.enumerate_devices() if all(node.path != other.path for other in named)]
    # Image files that an engine runs are nowhere in sysfs.
    known = {os.path.realpath(node.path) for node in (*found, *named)}
    found += [discovery.named(path) for path in _files_of(engines) if os.path.realpath(path) not in known]
    probes = [discovery.probe(node) for node in (*found, *named)]
    body: dict[str, Any] = {
        "devices": [_describe(probe) for probe in probes if probe.superblock is not None],
        "kernel_devices": [_node(node) for node in found if node.kind == "bcache"],
        "kernel_sets": kernel_sets,
        "kernel_alone": [_volume(alone.volumes()[0]) | {"story": alone.story} for alone in control.alone()],
        "engines": engines,
        "unreadable": [{**_node(probe.node), "problem": probe.problem} for probe in probes
                       if probe.superblock is None and probe.problem is not None],
        "others": [_node(probe.node) for probe in probes[len(found):]
                   if probe.superblock is None and probe.problem is None],
    }
    if as_json and watch:
        json_line("list", body)
    elif as_json:
        print_json("list", body)
    else:
        width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
        lines = list(listing.lines(body, color=table.wants_color(sys.stdout, os.environ), width=width))
        print("\n".join(lines))
    if watch:
        _watch(as_json)
    is_named_bad = any(probe.superblock is None and probe.problem is not None for probe in probes[len(found):])
    return 1 if is_named_bad else 0


def _watch(as_json: bool) -> None:
    with contextlib.suppress(KeyboardInterrupt):
        _print_events(as_json)


def _print_events(as_json: bool) -> None:
    sys.stdout.flush()
    for action, node in discovery.watch():
        probe = Probe(node) if action == "remove" else discovery.probe(node)
        shown = _node(node) if probe.superblock is None else _describe(probe)
        if as_json:
            json_line("event", {"action": action, "device": shown | {"problem": probe.problem}})
        else:
            print(listing.event(action, shown, probe.problem))
        sys.stdout.flush()


def _node(node: BlockNode) -> dict[str, Any]:
    return {"device": node.path, "kind": node.kind, "size_bytes": node.size_bytes, "file": node.file,
            "name": node.name, "read_only": node.read_only, "holders": list(node.holders)}


def _describe(probe: Probe) -> dict[str, Any]:
    sb = probe.superblock
    assert sb is not None
    record = _node(probe.node) | {
        "role": describe.role(sb), "uuid": format_uuid(sb.uuid), "set_uuid": format_uuid(sb.set_uuid),
        "label": sb.label_text, "version": sb.version, "problem": probe.problem}
    if sb.is_backing:
        return record | {"state": describe.state_text(sb.state), "cache_mode": describe.mode_text(sb),
                         "data_offset_sectors": sb.data_offset}
    return record | {"state": "ordered" if sb.cache_sync else "new", "left_behind": left_behind(sb.set_uuid),
                     "bucket_size_bytes": sb.bucket_size << 9,
                     "nbuckets": sb.nbuckets, "replacement": describe.replacement_text(sb)}


def _volume(volume: VolumeSnapshot) -> dict[str, Any]:
    return {"volume": volume.name, "uuid": volume.uuid, "label": volume.label, "kind": volume.kind,
            "size_bytes": volume.size_bytes, "state": volume.state, "cache_mode": volume.mode,
            "backing": volume.backing_path, "device": volume.device_path}


def _kernel_sets() -> list[dict[str, Any]]:
    return [{"set_uuid": live.uuid, "cache": live.cache_path, "volumes": [_volume(volume) for volume in live.volumes()]}
            for live in control.running(control.KERNEL)]


def _files_of(engines: list[dict[str, Any]]) -> list[str]:
    paths = [path for engine in engines
             for path in (engine["cache"], *(volume["backing"] for volume in engine["volumes"])) if path is not None]
    return list(dict.fromkeys(path for path in paths if os.path.exists(path)))


def _engines() -> list[dict[str, Any]]:
    found = []
    for engine in control.engines():
        record: dict[str, Any] = {"set_uuid": engine.uuid, "pid": engine.pid, "cache": None, "volumes": []}
        try:
            snapshot = engine.snapshot(0)
            places = engine.places()
            record["cache"] = snapshot.cache_path
            record["volumes"] = [_volume(volume) | {"device": places.get(volume.name, {}).get("device")}
                                 for volume in snapshot.volumes]
        except BcachectlError:
            # It is there, and ends or is busy: a line of its own all the same.
            record["volumes"] = []
        finally:
            engine.close()
        found.append(record)
    return found
