# SPDX-License-Identifier: GPL-2.0-only
"""``bcachectl dump``: one structure of a device, whole."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator
from enum import StrEnum
from itertools import islice
from typing import Annotated, Any

import typer

from bcachectl import describe, offline
from bcachectl.blockdev import open_device
from bcachectl.commands.options import DeviceArgument, Json, print_json, print_json_list
from bcachectl.errors import UsageError
from bcachectl.fsck import extents as extent
from bcachectl.fsck.live import leaf_extents, too_stale
from bcachectl.fsck.records import Damage, JournalEntry
from bcachectl.fsck.walk import Walk
from bcachectl.offline import Walked
from bcachectl.ondisk.bkey import INODE_SHIFT, SECTOR_MASK, decode_keys, ptr_gen, ptr_sector
from bcachectl.ondisk.prio import PrioSet
from bcachectl.units import format_time
from bcachectl.views import superblock, table
from bcachectl.views.table import Cell

LINES_AT_ONCE = 4096


class Structure(StrEnum):
    """What can be dumped."""

    SUPERBLOCK = "superblock"
    UUIDS = "uuids"
    PRIO = "prio"
    JOURNAL = "journal"
    BTREE = "btree"
    EXTENTS = "extents"


class Format(StrEnum):
    """What to print."""

    TABLE = "table"
    KERNEL = "kernel"


StructureArgument = Annotated[Structure, typer.Argument(
    metavar="STRUCTURE", show_default=False,
    help="superblock, uuids, prio (priority and generation of each bucket), journal, btree (each live key) or extents "
         "(what is cached of each volume).")]
FormatOption = Annotated[Format, typer.Option("--format", help="For btree: the text of the kernel's debugfs file.")]


def dump(structure: StructureArgument, device: DeviceArgument, output: FormatOption = Format.TABLE,
         as_json: Json = False) -> int:
    """Print a structure of a DEVICE, as a start of the set would find it: the journal's keys count.

    Damage is reported on stderr, one line each, and the rest is printed. The exit status is then 1.
    """
    if output is Format.KERNEL and as_json:
        raise UsageError("--format=kernel and --json exclude each other; give one of them")
    if output is Format.KERNEL and structure is not Structure.BTREE:
        raise UsageError("--format=kernel is for `dump btree` alone; the kernel has no such text for anything else")
    if structure is Structure.SUPERBLOCK:
        return _dump_superblock(device, as_json)
    with offline.walk_cache(device) as walked:
        if output is Format.KERNEL:
            _print(line for part in _keys(walked) for line in describe.kernel_lines(part))
        elif as_json:
            _print_json(structure, device, walked)
        else:
            headings, rows = _table(structure, walked)
            _print(table.table(headings, rows, color=table.wants_color(sys.stdout, os.environ)))
        serious = [damage for damage in walked.damages if not damage.is_harmless]
        for damage in serious:
            print(f"bcachectl: {device}: {damage}", file=sys.stderr)
        return 1 if serious else 0


def _dump_superblock(device: str, as_json: bool) -> int:
    with open_device(device) as opened:
        found = offline.read_superblock(opened)
        offline.require_magic(opened, found)
        fields = describe.superblock(found.raw, found.superblock)
        if as_json:
            print_json("superblock", {"device": device, "size_bytes": opened.size_bytes, "superblock": fields,
                                      "problem": found.problem})
        else:
            rows = ((name, superblock.plain(value)) for name, value in fields.items() if not name.endswith("_text"))
            _print(table.table(("FIELD", "VALUE"), rows, color=table.wants_color(sys.stdout, os.environ)))
    return 0 if found.problem is None else 1


def _table(structure: Structure, walked: Walked) -> tuple[tuple[str, ...], Iterable[tuple[Cell, ...]]]:
    walk = walked.walk
    match structure:
        case Structure.UUIDS:
            return ("VOLUME", "SLOT", "KIND", "UUID", "LABEL", "SIZE_BYTES", "FIRST_REG", "LAST_REG",
                    "INVALIDATED"), _uuid_rows(walk)
        case Structure.PRIO:
            return ("BUCKET", "PRIO", "GEN_ON_DISK", "GEN"), _prio_rows(walked)
        case Structure.JOURNAL:
            return ("SEQ", "LAST_SEQ", "BUCKET", "OFFSET", "BLOCKS", "KEYS", "LEVEL", "ROOT", "UUIDS", "PRIO",
                    "REPLAY"), _journal_rows(walk)
        case Structure.BTREE:
            return ("INODE", "START", "END", "STATE", "BUCKET", "SECTOR", "GEN", "PRIO"), _key_rows(walked)
        case Structure.EXTENTS:
            return ("VOLUME", "START", "END", "SIZE_BYTES", "STATE", "KEYS"), (
                (run["volume"], run["start"], run["end"], run["size_bytes"], run["state"], run["keys"])
                for run in _runs(walked))
        case _:
            raise AssertionError(structure)


def _print_json(structure: Structure, device: str, walked: Walked) -> None:
    walk = walked.walk
    head: dict[str, Any] = {"device": device}
    items: Iterable[dict[str, Any]]
    match structure:
        case Structure.UUIDS:
            names = {slot.inode: slot.name for slot in offline.volumes(walk)}
            items = ({"volume": names.get(slot), **describe.uuid_entry(slot, entry)}
                     for slot, entry in enumerate(walk.uuids) if not entry.is_free)
            head["slots"] = len(walk.uuids)
        case Structure.PRIO:
            items = ({"bucket": bucket, "prio": prio, "gen_on_disk": on_disk, "gen": gen}
                     for bucket, prio, on_disk, gen in _prio_rows(walked))
            head["prio_buckets"] = walk.prio_buckets
        case Structure.JOURNAL:
            replay = {entry.jset.seq for entry in walk.replay}
            items = ({**describe.journal_entry(entry), "replay": entry.jset.seq in replay,
                      "keys": [describe.key(key) for key in decode_keys(entry.jset.keys)]} for entry in walk.journal)
        case Structure.BTREE:
            head["nodes"] = walked.nodes
            items = (dict(zip(("inode", "start", "end", "state", "bucket", "sector", "gen", "prio"), row, strict=True))
                     for row in _key_rows(walked))
        case _:
            items = _runs(walked)
    print_json_list(str(structure), head, "items", items,
                    lambda: {"damages": [describe.damage(damage) for damage in walked.damages]})


def _uuid_rows(walk: Walk) -> Iterator[tuple[Cell, ...]]:
    names = {slot.inode: slot.name for slot in offline.volumes(walk)}
    for slot, entry in enumerate(walk.uuids):
        if not entry.is_free:
            shown = describe.uuid_entry(slot, entry)
            yield (names.get(slot), slot, shown["kind"], shown["uuid"], shown["label"] or None,
                   shown["size_bytes"] or None, *(format_time(shown[name]) or None
                                                  for name in ("first_reg", "last_reg", "invalidated")))


def _prio_rows(walked: Walked) -> Iterator[tuple[int, int, int, int]]:
    walk, bucket = walked.walk, 0
    for record in walked.records:
        if isinstance(record.value, PrioSet):
            count = min(len(record.value.gen), walk.geometry.nbuckets - bucket)
            rows = zip(range(bucket, bucket + count), record.value.prio.tolist(), record.value.gen.tolist(),
                       walk.gens[bucket:bucket + count].tolist(), strict=False)
            yield from rows
            bucket += count


def _journal_rows(walk: Walk) -> Iterator[tuple[Cell, ...]]:
    replay = {entry.jset.seq for entry in walk.replay}
    for entry in walk.journal:
        jset = entry.jset
        yield (jset.seq, jset.last_seq, entry.index, entry.offset_bytes, jset.blocks, _count_keys(entry),
               jset.btree_level, _bucket(walk, jset.btree_root.ptrs), _bucket(walk, jset.uuid_bucket.ptrs),
               jset.prio_bucket[0], "yes" if jset.seq in replay else "no")


def _count_keys(entry: JournalEntry) -> int:
    return len(decode_keys(entry.jset.keys))


def _bucket(walk: Walk, ptrs: tuple[Any, ...]) -> int | None:
    return walk.geometry.bucket_of(ptrs[0].sector) if ptrs else None


def _keys(walked: Walked) -> Iterator[extent.Extents]:
    # The live keys, leaf by leaf, joined as the kernel joins them in memory.
    walk = walked.walk
    for slot, found in leaf_extents(walk):
        count = int(too_stale(walk, found).sum())
        if count:
            walked.damages.append(Damage("BTREE_PTR_TOO_STALE", "btree", f"key too stale: {count} keys", 0, 0,
                                         slot.start, slot.end))
        yield extent.merge(found, bucket_size_sectors=walk.geometry.bucket_size_sectors)


def _key_rows(walked: Walked) -> Iterator[tuple[Cell, ...]]:
    walk = walked.walk
    for part in _keys(walked):
        for start, end, dirty, ptr in zip(part.start.tolist(), part.end.tolist(), part.dirty.tolist(),
                                          part.ptr.tolist(), strict=True):
            bucket = walk.geometry.bucket_of(ptr_sector(ptr))
            yield (start >> INODE_SHIFT, start & SECTOR_MASK, end & SECTOR_MASK, "dirty" if dirty else "clean", bucket,
                   ptr_sector(ptr), ptr_gen(ptr), int(walk.prios[bucket]))


def _runs(walked: Walked) -> Iterator[dict[str, Any]]:
    # What touches on the volume and is equally dirty is one run, wherever the cache has it.
    names = {slot.inode: slot.name for slot in offline.volumes(walked.walk)}
    start = end = keys = 0
    is_dirty = False
    for part in _keys(walked):
        for next_start, next_end, next_dirty in zip(part.start.tolist(), part.end.tolist(), part.dirty.tolist(),
                                                    strict=True):
            if keys and next_start == end and next_dirty == is_dirty:
                end, keys = next_end, keys + 1
                continue
            if keys:
                yield _run(names, start, end, is_dirty, keys)
            start, end, is_dirty, keys = next_start, next_end, next_dirty, 1
    if keys:
        yield _run(names, start, end, is_dirty, keys)


def _run(names: dict[int, str], start: int, end: int, is_dirty: bool, keys: int) -> dict[str, Any]:
    inode = start >> INODE_SHIFT
    return {"volume": names.get(inode, f"slot {inode}"), "inode": inode, "start": start & SECTOR_MASK,
            "end": end & SECTOR_MASK, "size_bytes": (end - start) << 9, "state": "dirty" if is_dirty else "clean",
            "keys": keys}


def _print(lines: Iterable[str]) -> None:
    # A write for every line would cost more than making it.
    every = iter(lines)
    while batch := list(islice(every, LINES_AT_ONCE)):
        sys.stdout.write("\n".join(batch) + "\n")
