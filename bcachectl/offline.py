# SPDX-License-Identifier: GPL-2.0-only
"""Devices as the offline verbs read them: opened without a claim, judged with one sentence, walked, never written.

`read_superblock` answers for any bcache device, `walk_cache` for a cache device whose set has run.  Whoever reads a
device that somebody writes to may see it torn; that shows as damage, never as a crash.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from bcachectl import describe
from bcachectl.blockdev import BlockDevice, open_device
from bcachectl.errors import BcachectlError, UsageError, WrongState
from bcachectl.fsck.live import leaf_extents
from bcachectl.fsck.records import Damage, Node, Record
from bcachectl.fsck.walk import Walk
from bcachectl.ondisk.magic import BCACHE_MAGIC
from bcachectl.ondisk.superblock import SB_BYTES, SB_SECTOR, BdevState, Superblock, parse_superblock
from bcachectl.ondisk.uuids import UuidEntry
from bcachectl.units import format_uuid, parse_uuid


class Read(NamedTuple):
    """A device's superblock: its bytes, what they say, and what the kernel would refuse about it (None: nothing)."""

    raw: bytes
    superblock: Superblock
    problem: str | None


class Walked(NamedTuple):
    """A cache device after its walk: ``records`` without the btree's nodes, of which only the shape is kept."""

    walk: Walk
    records: list[Record]
    nodes: list[dict[str, Any]]
    damages: list[Damage]


class Slot(NamedTuple):
    """A volume in the uuid array: its name in the order of the slots, its inode, its entry."""

    name: str
    inode: int
    entry: UuidEntry


def read_superblock(device: BlockDevice) -> Read:
    """The superblock of a bcache device, damaged or not; an error if there is no sign of one."""
    if device.size_bytes < (SB_SECTOR << 9) + SB_BYTES:
        raise BcachectlError(f"{device.path}: is too small for a bcache superblock ({device.size_bytes} bytes); "
                             "was the image cut short?")
    raw = device.read(SB_SECTOR << 9, SB_BYTES)
    problem = describe.judge(raw, device_sectors=device.size_bytes >> 9,
                             logical_block_sectors=device.logical_block_bytes >> 9)
    return Read(raw, parse_superblock(raw), problem)


def require_magic(device: BlockDevice, found: Read) -> None:
    """An error for a device that is not bcache's."""
    if found.superblock.magic != BCACHE_MAGIC:
        raise BcachectlError(f"{device.path}: has no bcache superblock (no magic at byte {(SB_SECTOR << 9) + 24}); "
                             "`bcachectl list` shows the devices that have one")


@contextmanager
def walk_cache(path: str) -> Iterator[Walked]:
    """Open a cache device and walk all of it; it stays open for `bcachectl.fsck.live`."""
    with open_device(path) as device:
        found = read_superblock(device)
        require_magic(device, found)
        sb = found.superblock
        if sb.is_backing:
            raise UsageError(f"{path}: is a backing device of set {format_uuid(sb.set_uuid)}; name the cache device")
        walk = Walk(lambda sector, count: device.read(sector << 9, count << 9), device.size_bytes >> 9)
        records: list[Record] = []
        nodes: list[dict[str, Any]] = []
        damages: list[Damage] = []
        for item in walk.structures():
            if isinstance(item, Damage):
                damages.append(item)
            elif isinstance(item.value, Node):
                nodes.append(describe.node(item.value))
            else:
                records.append(item)
        if walk.superblock is None:
            raise BcachectlError(f"{path}: {damages[-1]}; `bcachectl show` tells more")
        if not walk.superblock.cache_sync:
            raise WrongState(f"{path}: its set never ran, so there is nothing on it but the superblock; "
                             "`bcachectl show` prints that")
        yield Walked(walk, records, nodes, damages)


def only_copy(device: BlockDevice) -> str:
    """What a bcache device has that is nowhere else, in words that follow its name; empty if there is nothing."""
    if device.size_bytes < (SB_SECTOR << 9) + SB_BYTES:
        return ""
    sb = read_superblock(device).superblock
    if sb.magic != BCACHE_MAGIC:
        return ""
    if sb.is_backing:
        return (f"the cache of set {format_uuid(sb.set_uuid)} holds data that this device lacks; write it back first "
                "(`bcachectl writeback`), or detach it" if sb.state is BdevState.DIRTY else "")
    if not sb.cache_sync:
        return ""
    way_out = ("data that its volumes have nowhere else; write it back first (`bcachectl writeback`, after which its "
               "keys still say dirty), or detach them")
    try:
        with walk_cache(device.path) as walked:
            if any(not damage.is_harmless for damage in walked.damages):
                return f"is damaged, and may hold {way_out}"
            is_dirty = any(bool(extents.dirty.any()) for _slot, extents in leaf_extents(walked.walk))
    except BcachectlError:
        return f"is damaged, and may hold {way_out}"
    return f"holds {way_out}" if is_dirty else ""


def volumes(walk: Walk) -> list[Slot]:
    """The volumes that a set has, named in the order of their slots."""
    present = [(inode, entry) for inode, entry in enumerate(walk.uuids) if not entry.is_free and not entry.is_retired]
    return [Slot(f"bcache{number}", inode, entry) for number, (inode, entry) in enumerate(present)]


def find_slot(walk: Walk, path: str, wanted: str) -> Slot:
    """The volume that ``wanted`` names by bcacheN, uuid or label, on the cache device at ``path``."""
    every = volumes(walk)
    by_name = [slot for slot in every if wanted in (slot.name, slot.entry.label_text)]
    if not by_name:
        try:
            raw = parse_uuid(wanted)
        except UsageError:
            raw = b""
        by_name = [slot for slot in every if slot.entry.uuid == raw]
    if len(by_name) == 1:
        return by_name[0]
    names = ", ".join(f"{slot.name} ({format_uuid(slot.entry.uuid)})" for slot in every) or "none"
    trouble = "is the label of several volumes" if by_name else "is no volume"
    raise WrongState(f"{wanted}: {trouble} of the set on {path}; it has: {names}")
