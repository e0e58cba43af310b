# SPDX-License-Identifier: GPL-2.0-only
"""A superblock for people: what it is first, then every field by its name on the device, then the verdict."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from bcachectl.units import format_sectors, format_size, format_time
from bcachectl.views.table import Cell, bold, fields

HIDDEN_IN_VALUES = {"role", "version_text", "magic_good", "csum_expected", "csum_good", "flags_text", "features_text"}
"""Said beside the field they belong to."""


def lines(device: str, superblock: Mapping[str, Any], problem: str | None, *, color: bool) -> Iterator[str]:
    """The whole page for the dictionary that describes a superblock."""
    kind = {"cache": "cache device", "backing": "backing device"}.get(superblock["role"], "device of an unknown kind")
    yield bold(f"{device}: {kind} of set {superblock['set_uuid']}", color)
    yield from fields([(name, _value(name, value, superblock)) for name, value in superblock.items()
                       if name not in HIDDEN_IN_VALUES], indent="  ")
    for sentence in (*superblock["flags_text"], *superblock["features_text"]):
        yield f"  {sentence}"
    yield f"The kernel refuses it: {problem}" if problem else "The kernel takes it."


def plain(value: Any) -> Cell:
    """A field's bare value, for the table of a dump."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return _range(value)
    return str(value) if value != "" else None


def _value(name: str, value: Any, superblock: Mapping[str, Any]) -> Cell:
    if name == "version":
        return f"{value} ({superblock['version_text']})"
    if name == "magic":
        return f"{value} ({'good' if superblock['magic_good'] else 'bad'})"
    if name == "csum":
        return f"{value} ({'good' if superblock['csum_good'] else 'bad, expected ' + superblock['csum_expected']})"
    if name == "offset":
        return f"{value} ({'good' if value == 8 else 'bad, expected 8'})"
    if name.endswith("_sectors"):
        return f"{value} ({format_sectors(value)})"
    if name.endswith("_bytes"):
        return f"{value} ({format_size(value)})"
    if name == "last_mount" and value:
        return f"{value} ({format_time(value)})"
    if name == "journal_buckets":
        return _range(value)
    if isinstance(value, bool):
        return "yes" if value else "no"
    return str(value) if value != "" else "(empty)"


def _range(buckets: list[int]) -> str:
    if not buckets:
        return "none yet"
    if buckets == list(range(buckets[0], buckets[0] + len(buckets))):
        return f"{buckets[0]} to {buckets[-1]}"
    return " ".join(str(bucket) for bucket in buckets)
