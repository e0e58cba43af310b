# SPDX-License-Identifier: GPL-2.0-only
"""The bcache devices of a machine for people: one table a set, then what belongs to none."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from bcachectl.units import format_size
from bcachectl.views.table import Cell, bold, table

HEADINGS = ("DEVICE", "KIND", "ROLE", "SIZE", "STATE", "POLICY", "BUCKET", "LABEL", "UUID", "FILE")


def lines(body: Mapping[str, Any], *, color: bool) -> Iterator[str]:
    """The page for the dictionary that ``bcachectl list --json`` prints."""
    engines = {engine["set_uuid"]: engine for engine in body["engines"]}
    sets = dict.fromkeys([device["set_uuid"] for device in body["devices"]] + list(engines))
    if not sets:
        yield "no bcache device here"
    for set_uuid in sets:
        members = [device for device in body["devices"] if device["set_uuid"] == set_uuid]
        yield bold(f"set {set_uuid}{_who_runs(members, engines.get(set_uuid))}", color)
        yield from _indented(table(HEADINGS, [_row(device) for device in members]))
        yield from (f"  {device['device']}: {device['problem']}" for device in members if device["problem"])
        volumes = engines[set_uuid]["volumes"] if set_uuid in engines else []
        yield from (f"  {volume['volume']}: {format_size(volume['size_bytes'])}, {volume['state']}, "
                    f"{volume['cache_mode']}{', at ' + volume['device'] if volume.get('device') else ''}"
                    for volume in volumes)
        if members and all(device["role"] != "cache" for device in members):
            yield "  its cache device is not here"
    if body["kernel_devices"]:
        yield bold("devices of the kernel's driver", color)
        yield from (f"  {device['device']}: {format_size(device['size_bytes'])}" for device in body["kernel_devices"])
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


def _who_runs(members: list[Mapping[str, Any]], engine: Mapping[str, Any] | None) -> str:
    if engine is not None:
        return f", run by an engine (pid {engine['pid']})"
    if any(holder.startswith("bcache") for device in members for holder in device["holders"]):
        return ", run by the kernel"
    return ""


def _indented(rows: Iterator[str]) -> Iterator[str]:
    return (f"  {row}" for row in rows)
