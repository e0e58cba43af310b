# SPDX-License-Identifier: GPL-2.0-only
"""The bcache devices of a machine for people: one table a set, then what belongs to none.

On a terminal that is too narrow for a table, what is longest (uuid, label, file) goes on a second line for each device.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterator, Mapping
from typing import Any

from bcachectl.units import format_size
from bcachectl.views.table import Cell, bold, table

NO_SET = str(uuid.UUID(int=0))
DETACHED = "detached"
INDENT = "  "
SHORT_COLUMNS = 7
"""Of `HEADINGS`, those that stay in a table on a narrow terminal."""

HEADINGS = ("DEVICE", "KIND", "ROLE", "SIZE", "STATE", "POLICY", "BUCKET", "LABEL", "UUID", "FILE")


def lines(body: Mapping[str, Any], *, color: bool, width: int | None = None) -> Iterator[str]:
    """The page for the dictionary that ``bcachectl list --json`` prints, for a terminal of ``width`` columns."""
    engines = {engine["set_uuid"]: engine for engine in body["engines"]}
    kernel = {one["set_uuid"]: one for one in body["kernel_sets"]}
    sets = dict.fromkeys([device["set_uuid"] for device in body["devices"]] + list(engines) + list(kernel))
    if not sets:
        yield "no bcache device here"
    for set_uuid in sets:
        members = [device for device in body["devices"] if device["set_uuid"] == set_uuid]
        name = "attached to no set" if set_uuid == NO_SET else f"set {set_uuid}"
        yield bold(f"{name}{_who_runs(engines.get(set_uuid), kernel.get(set_uuid))}", color)
        yield from _indented(_table([_row(device) for device in members], width))
        yield from (f"  {device['device']}: {device['problem']}" for device in members if device["problem"])
        yield from (f"  {device['device']}: {device['left_behind']}; run the engine again, or have them written with "
                    f"'bcachectl engine stop {device['device']}'" for device in members if device.get("left_behind"))
        runners = (engines.get(set_uuid), kernel.get(set_uuid))
        yield from (f"  {_volume(volume)}" for runner in runners if runner is not None for volume in runner["volumes"])
        if not any(device["role"] == "cache" for device in members) and any(device["state"] != DETACHED
                                                                            for device in members):
            yield "  its cache device is not here"
    if body["kernel_alone"]:
        yield bold("run by the kernel without a set", color)
        yield from (f"  {_volume(volume)}: {volume['story']}" for volume in body["kernel_alone"])
    if body["others"]:
        yield bold("no bcache superblock", color)
        yield from (f"  {device['device']}" for device in body["others"])
    if body["unreadable"]:
        yield bold("not readable", color)
        yield from (f"  {device['device']}: {device['problem']}" for device in body["unreadable"])


def event(action: str, device: Mapping[str, Any], problem: str | None) -> str:
    """One line for something that happened to a device."""
    what = f"{device['kind']}, {format_size(device['size_bytes'])}"
    if "role" in device:
        what += f": {device['role']} device of set {device['set_uuid']}, {device['state']}"
    return f"{action} {device['device']} ({what}{'; ' + problem if problem else ''})"


def _row(device: Mapping[str, Any]) -> tuple[Cell, ...]:
    bucket = device.get("bucket_size_bytes")
    return (device["device"], device["kind"] + (f" {device['name']}" if device["name"] else ""), device["role"],
            format_size(device["size_bytes"]), device["state"], device.get("cache_mode", device.get("replacement")),
            None if bucket is None else format_size(bucket), device["label"] or None, device["uuid"], device["file"])


def _table(rows: list[tuple[Cell, ...]], width: int | None) -> Iterator[str]:
    whole = list(table(HEADINGS, rows))
    if width is None or max(map(len, whole), default=0) + len(INDENT) <= width:
        yield from whole
        return
    heading, *short = table(HEADINGS[:SHORT_COLUMNS], [row[:SHORT_COLUMNS] for row in rows])
    yield heading
    for line, row in zip(short, rows, strict=True):
        yield line
        named = dict(zip(HEADINGS, row, strict=True))
        told = [f"{name.lower()} {named[name]}" for name in ("UUID", "LABEL", "FILE") if named[name] is not None]
        yield f"{INDENT}{', '.join(told)}"


def _who_runs(engine: Mapping[str, Any] | None, kernel: Mapping[str, Any] | None) -> str:
    runners = [] if engine is None else [f"an engine (pid {engine['pid']})"]
    runners += [] if kernel is None else ["the kernel"]
    return f", run by {' and '.join(runners)}" if runners else ""


def _volume(volume: Mapping[str, Any]) -> str:
    kind = "flash-only" if volume["kind"] == "flash" else f"{volume['state']}, {volume['cache_mode']}"
    place = f", at {volume['device']}" if volume["device"] else ""
    return f"{volume['volume']}: {format_size(volume['size_bytes'])}, {kind}{place}"


def _indented(rows: Iterator[str]) -> Iterator[str]:
    return (f"{INDENT}{row}" for row in rows)
