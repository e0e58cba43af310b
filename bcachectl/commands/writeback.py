# SPDX-License-Identifier: GPL-2.0-only
"""``bcachectl writeback``: dirty data brought to the backing devices without the set running."""

from __future__ import annotations

import os
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer

from bcachectl import discovery
from bcachectl.blockdev import BlockDevice
from bcachectl.claim import claim, refuse_twice
from bcachectl.commands import fsck_files, fsck_report, writeback_copy, writeback_orphans
from bcachectl.commands.options import DryRun, Force, Json, complete_device, print_json
from bcachectl.commands.superblock_options import check_given, parse_bucket_size, parse_set_uuid
from bcachectl.commands.writeback_copy import Cache, open_cache
from bcachectl.errors import BcachectlError, Refused, UsageError, WrongState
from bcachectl.fsck.check import Check
from bcachectl.fsck.check_backing import Backing
from bcachectl.fsck.findings import Finding, Loss
from bcachectl.fsck.rescue import superblock_instead
from bcachectl.fsck.rescue_map import Owner
from bcachectl.fsck.writeback import Copy, Dirty, find_dirty, sectors_of, source, with_all_entries, writes
from bcachectl.fsck.writeback_target import HAZARD_STALE, Member, member
from bcachectl.ondisk.superblock import SB_BYTES, SB_SECTOR
from bcachectl.units import counted, format_sectors, format_uuid, parse_uuid

RANGES_SHOWN = 8
AFTERWARDS = """The cache was only read, so its keys still say dirty. If the set runs again with the
devices as they are now, it writes the same data once more, which is harmless. To use a
device without this cache from now on, `bcachectl resolve DEVICE --use-backing-alone` (and
--cache, if the cache still works) lets it go: the cache's old data would otherwise hide
what is written meanwhile."""

CacheArgument = Annotated[str, typer.Argument(metavar="CACHE", autocompletion=complete_device, show_default=False,
                                              help="The cache device, or a file that holds an image of it.")]
BackingArgument = Annotated[list[str] | None, typer.Argument(
    metavar="BACKING", autocompletion=complete_device, show_default=False,
    help="Backing devices of the set, or their uuids; each gets the dirty data that the set has under its uuid.")]
MapOption = Annotated[Path | None, typer.Option(
    "--map", metavar="FILE", show_default=False,
    help="Keep in FILE how far it is and what is lost, as GNU ddrescue does; the same command then goes on where it "
         "was interrupted. With several devices each has a FILE-UUID of its own.")]
RetriesOption = Annotated[int, typer.Option("--retries", metavar="N", min=0,
                                            help="How often sectors that could not be read are tried again.")]
AcceptOption = Annotated[bool, typer.Option("--accept-loss", help="Mark a device clean although data of it is lost.")]
FilesOption = Annotated[bool, typer.Option("--files", help="Name the files that lost ranges belong to (ext4, xfs).")]
BucketOption = Annotated[str | None, typer.Option("--bucket-size", metavar="SIZE", show_default=False,
                                                  help="Bucket size to go by if the superblock is damaged.")]
SetOption = Annotated[str | None, typer.Option("--set-uuid", metavar="UUID", show_default=False,
                                               help="Set uuid to go by if the superblock is damaged.")]
OrphansOption = Annotated[bool, typer.Option(
    "--orphans", help="List dirty data whose device the set no longer knows, as after a forced detach.")]
SlotOption = Annotated[int | None, typer.Option("--slot", metavar="N", min=0, show_default=False,
                                                help="With --to: the device number whose data is meant.")]
ToOption = Annotated[str | None, typer.Option(
    "--to", metavar="DEVICE", show_default=False, autocompletion=complete_device,
    help="Write the dirty data of an orphaned or any other slot to this device or image; a file that does not exist "
         "is made.")]
OffsetOption = Annotated[int | None, typer.Option(
    "--data-offset", metavar="SECTORS", min=0, show_default=False,
    help="With --to a DEVICE without a bcache superblock: where the data of the former device started. Default: 16.")]


class Part(NamedTuple):
    """A backing device, its part of the dirty data, and where its map is kept."""

    member: Member
    copy: Copy
    map_file: Path | None


def writeback(cache: CacheArgument, backings: BackingArgument = None, map_file: MapOption = None,
              retries: RetriesOption = 1, accept_loss: AcceptOption = False, files: FilesOption = False,
              orphans: OrphansOption = False, slot: SlotOption = None, to: ToOption = None,
              data_offset: OffsetOption = None, bucket_size: BucketOption = None, set_uuid: SetOption = None,
              force: Force = None, dry_run: DryRun = False, as_json: Json = False) -> int:
    """Copy all dirty data of a set that does not run to its backing devices, then mark them clean.

    The cache is only read. What cannot be read there is left out and listed, and then no device that lacks data is
    marked clean unless --accept-loss says so; exit status 3 tells of that. The dirty keys stay on the cache, which is
    harmless: if the set runs again, it writes the same data once more.
    """
    names = [_device_named(word) for word in backings or ()]
    writeback_orphans.check_words(names, orphans=orphans, slot=slot, to=to, data_offset=data_offset)
    hazards = frozenset(force or ())
    allowed = {writeback_orphans.HAZARD_OVERWRITE} if to is not None else {HAZARD_STALE}
    if hazards - allowed:
        raise UsageError(f"--force={min(hazards - allowed)} overrides nothing here; it takes {min(allowed)}")
    refuse_twice([cache, *names, *([to] if to is not None else [])])
    with ExitStack() as stack:
        held = stack.enter_context(open_cache(cache))
        is_copy = not dry_run and not orphans
        opened = stack.enter_context(claim(names, write=is_copy))
        members = [_backing(opened[name]) for name in names]
        check = _examine(held, members, bucket_size, set_uuid, as_json)
        dirty = find_dirty(check)
        if orphans or to is not None:
            order = writeback_orphans.Order(slot, to, data_offset, writeback_orphans.HAZARD_OVERWRITE in hazards,
                                            map_file, retries, accept_loss, dry_run, as_json)
            return writeback_orphans.run(held, check, dirty, members, order)
        parts = [_part(held, check, dirty, each, opened, map_file if len(names) == 1 else _own_map(map_file, each),
                       retries, HAZARD_STALE in hazards) for each in members]
        _check_uuids(parts)
        if dry_run:
            _show_plan(parts, accept_loss, as_json)
            return 0
        for part in parts:
            writeback_copy.run(part.copy, opened[part.member.backing.name], part.map_file, show=not as_json)
        marked = [part for part in parts if accept_loss or not _lacks(part.copy)]
        for part in marked:
            _mark_clean(part.member, opened[part.member.backing.name])
        lines = _lost_files(check, parts) if files else []
        _report(check, dirty, parts, marked, lines, as_json)
        return 0 if len(marked) == len(parts) else Refused.exit_status


def _device_named(word: str) -> str:
    # A path, or the uuid of a backing device that is plugged in.
    if os.path.exists(word):
        return word
    try:
        uuid = parse_uuid(word)
    except UsageError:
        return word
    found = [probe.node.path for probe in map(discovery.probe, discovery.enumerate_devices())
             if probe.superblock is not None and probe.superblock.is_backing and probe.superblock.uuid == uuid]
    if len(found) != 1:
        who = f"{', '.join(found)} all are" if found else "no block device here is"
        raise UsageError(f"{word}: {who} the backing device of that uuid; name the device or the file itself")
    return found[0]


def _backing(device: BlockDevice) -> Backing:
    return Backing(device.path, lambda sector, count: device.read(sector << 9, count << 9), device.size_bytes >> 9)


def _own_map(map_file: Path | None, backing: Backing) -> Path | None:
    if map_file is None:
        return None
    raw = backing.read(SB_SECTOR, SB_BYTES >> 9)
    return map_file.with_name(f"{map_file.name}-{format_uuid(raw[40:56])}")


def _examine(held: Cache, members: list[Backing], bucket_size: str | None, set_uuid: str | None,
             as_json: bool) -> Check:
    sectors, uuid = parse_bucket_size(bucket_size), parse_set_uuid(set_uuid)
    show = sys.stderr.isatty() and not as_json
    with fsck_report.told(held.read, show=show) as looking:
        guess = superblock_instead(looking, held.size_sectors, members, bucket_size=sectors, set_uuid=uuid)
    # Whether the backing devices agree with the cache is what this verb is about to change.
    check = Check(held.read, held.size_sectors, members, instead=guess, judges_backings=False)
    fsck_report.watch(check, show=show)
    sb = check.walk.superblock
    check_given(held.path, held.read, held.size_sectors, sb, bucket_size=sectors, set_uuid=uuid)
    if sb is None:
        raise BcachectlError(f"{held.path}: {check.findings[0].why}; its geometry is not to be found, give "
                             "--bucket-size and --set-uuid")
    if not sb.is_cache:
        raise UsageError(f"{held.path}: is a backing device of set {format_uuid(sb.set_uuid)}; name the cache device "
                         "first")
    if not sb.cache_sync:
        raise WrongState(f"{held.path}: its set never ran, so there is no dirty data on it")
    if check.walk.newest is None:
        raise BcachectlError(f"{held.path}: no journal entry is left, and only the journal knows where the keys are")
    return with_all_entries(check)


def _part(held: Cache, check: Check, dirty: Dirty, backing: Backing, opened: dict[str, BlockDevice],
          map_file: Path | None, retries: int, force_stale: bool) -> Part:
    assert check.walk.superblock is not None and check.walk.newest is not None
    found = member(check.walk, dirty, backing, force_stale=force_stale)
    owner = Owner(check.walk.superblock.set_uuid, found.superblock.uuid, check.walk.newest.seq)
    own = source(dirty, found.inode, first_sector=found.superblock.data_offset, end_sector=backing.size_sectors)
    copy = writeback_copy.prepare(held, opened[backing.name], own, owner, map_file, retries)
    return Part(found, copy, map_file)


def _check_uuids(parts: list[Part]) -> None:
    for number, part in enumerate(parts):
        for other in parts[:number]:
            if other.member.inode == part.member.inode:
                raise Refused(f"{part.member.backing.name}: has the uuid of {other.member.backing.name}; name the one "
                              "that is not the copy")


def _lacks(copy: Copy) -> bool:
    return bool(len(copy.lost.start)) or bool(len(copy.unknown.start))


def _mark_clean(found: Member, device: BlockDevice) -> None:
    if found.is_clean:
        return
    device.write(SB_SECTOR << 9, found.marked_clean())
    device.flush()


def _show_plan(parts: list[Part], accept_loss: bool, as_json: bool) -> None:
    planned: list[dict[str, Any]] = []
    for part in parts:
        name = part.member.backing.name
        planned += [{"device": name, "operation": "write", "offset_bytes": start << 9,
                     "length_bytes": (int(pieces.end[-1]) - start) << 9, "what": "dirty data"}
                    for start, pieces in writes(part.copy.todo)]
    for part in parts:
        if not part.member.is_clean and (accept_loss or not _lacks(part.copy)):
            planned.append({"device": part.member.backing.name, "operation": "write", "offset_bytes": SB_SECTOR << 9,
                            "length_bytes": SB_BYTES, "what": f"superblock, state {part.member.settled_state}"})
    if as_json:
        print_json("writeback", {"dry_run": True, "writes": planned,
                                 "devices": [_part_json(part, False) for part in parts]})
        return
    for each in planned:
        print(f"{each['device']}: write {each['length_bytes']} bytes at byte {each['offset_bytes']}: {each['what']}")
    for part in parts:
        for line in _loss_lines(part):
            print(line)


# Reports.

def _report(check: Check, dirty: Dirty, parts: list[Part], marked: list[Part], files: list[str],
            as_json: bool) -> None:
    given = {part.member.inode for part in parts}
    others = {inode: sectors_of(extents) for inode, extents in dirty.by_inode.items() if inode not in given}
    if as_json:
        assert check.walk.superblock is not None
        body: dict[str, Any] = {
            "dry_run": False, "set": format_uuid(check.walk.superblock.set_uuid),
            "devices": [_part_json(part, part in marked) for part in parts],
            "not_given": [{"volume": check.volume_name(inode), "inode": inode, "dirty_bytes": sectors << 9}
                          for inode, sectors in sorted(others.items())],
            "damage": [{"code": finding.code, "structure": finding.structure, "why": finding.why}
                       for finding in check.findings if finding.severity]}
        print_json("writeback", body | ({"files": files} if files else {}))
        return
    for part in parts:
        copy, name = part.copy, part.member.backing.name
        earlier = f" ({format_sectors(copy.skipped_sectors)} more were there from an earlier run)"
        print(f"{name}: {format_sectors(copy.copied_sectors)} written back{earlier if copy.skipped_sectors else ''}, "
              f"{format_sectors(sectors_of(copy.lost))} lost; "
              f"{part.member.settled_state if part in marked else 'NOT marked clean'}.")
        for line in _loss_lines(part):
            print(line)
    for inode, sectors in sorted(others.items()):
        name = check.volume_name(inode)
        hint = f" (--orphans tells whose they may be, --slot {inode} writes them)" if name.startswith("slot ") else ""
        print(f"{name}: {format_sectors(sectors)} of dirty data stay on the cache{hint}.")
    if files:
        print("\n".join(files))
    if marked:
        print(AFTERWARDS)
    if len(marked) < len(parts):
        print("bcachectl: data is lost or unknown, so not every device is marked clean; --accept-loss does it "
              "nevertheless, --retries tries longer", file=sys.stderr)


def _volume_ranges(part: Part, rows: Any) -> list[tuple[int, int]]:
    # Half-open byte ranges on the volume, which starts behind the superblock of the backing device.
    offset = part.member.superblock.data_offset
    return [((start - offset) << 9, (end - offset) << 9)
            for start, end in zip(rows.start.tolist(), rows.end.tolist(), strict=True)]


def _loss_lines(part: Part) -> list[str]:
    lines: list[str] = []
    for what, rows in (("lost", part.copy.lost), ("unknown, dirty data may have been there:", part.copy.unknown)):
        ranges = _volume_ranges(part, rows)
        lines += [f"  {what} bytes {start} to {end} of the volume" for start, end in ranges[:RANGES_SHOWN]]
        if len(ranges) > RANGES_SHOWN:
            lines.append(f"  and {counted(len(ranges) - RANGES_SHOWN, 'more range')}; --json and the map list them")
    return lines


def _part_json(part: Part, is_marked: bool) -> dict[str, Any]:
    copy = part.copy
    return {"device": part.member.backing.name, "uuid": format_uuid(part.member.superblock.uuid),
            "inode": part.member.inode, "dirty_bytes": sectors_of(copy.source.extents) << 9,
            "copied_bytes": copy.copied_sectors << 9, "earlier_bytes": copy.skipped_sectors << 9,
            "lost_bytes": sectors_of(copy.lost) << 9,
            "lost_ranges_bytes": [list(each) for each in _volume_ranges(part, copy.lost)],
            "unknown_ranges_bytes": [list(each) for each in _volume_ranges(part, copy.unknown)],
            "map": str(part.map_file) if part.map_file is not None else None, "marked_clean": is_marked}


def _lost_files(check: Check, parts: list[Part]) -> list[str]:
    # fsck's own way of naming files, asked about what this run could not save.
    losses = tuple(Loss(part.member.inode, check.volume_name(part.member.inode), sectors_of(part.copy.lost), 0,
                        tuple(_volume_ranges(part, part.copy.lost))) for part in parts)
    asked = Check(check.walk.read, check.walk.size_sectors, [part.member.backing for part in parts])
    asked.walk = check.walk
    asked.findings = [Finding("BTREE_KEYS", "writeback", "lost", losses=losses)]
    return fsck_files.lost_files(asked)
