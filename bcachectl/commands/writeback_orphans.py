# SPDX-License-Identifier: GPL-2.0-only
"""``bcachectl writeback --orphans`` and ``--to``: dirty data whose device the set no longer knows."""

from __future__ import annotations

import os
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

from bcachectl.blockdev import BlockDevice
from bcachectl.claim import claim
from bcachectl.commands import writeback_copy
from bcachectl.commands.options import print_json
from bcachectl.commands.writeback_copy import Cache
from bcachectl.errors import Refused, UsageError, WrongState
from bcachectl.fsck import rescue_map
from bcachectl.fsck.check import Check
from bcachectl.fsck.check_backing import Backing, read_backing
from bcachectl.fsck.rescue_map import Owner
from bcachectl.fsck.writeback import Copy, Dirty, Source, sectors_of, source, writes
from bcachectl.fsck.writeback_target import Orphan, orphans, superblock_of
from bcachectl.ondisk.bkey import INODE_SHIFT
from bcachectl.ondisk.superblock import BDEV_DATA_START_DEFAULT, BdevState
from bcachectl.units import format_sectors, format_time
from bcachectl.views import table

HAZARD_OVERWRITE = "overwrite"


class Order(NamedTuple):
    """What was asked for; the names are those of the options."""

    slot: int | None
    to: str | None
    data_offset: int | None
    overwrite: bool
    map_file: Path | None
    retries: int
    accept_loss: bool
    dry_run: bool
    as_json: bool


class Place(NamedTuple):
    """Where the data goes: sectors [first_sector, end_sector) of a target, ``shift_sectors`` less than the keys say."""

    first_sector: int
    end_sector: int
    shift_sectors: int


def check_words(names: list[str], *, orphans: bool, slot: int | None, to: str | None,
                data_offset: int | None) -> None:
    """Refuse what makes no sense together."""
    if orphans and to is not None:
        raise UsageError("--orphans lists, --to writes; give one of them")
    if to is None and (slot is not None or data_offset is not None):
        raise UsageError("--slot and --data-offset say more about --to DEVICE; give that too")
    if to is not None and names:
        raise UsageError("--to names the only device that is written; leave BACKING out")
    if not names and not orphans and to is None:
        raise UsageError("name the backing devices after the cache device; --orphans lists data that has none")


def run(held: Cache, check: Check, dirty: Dirty, candidates: list[Backing], order: Order) -> int:
    """List the orphans, or write the data of one slot."""
    found = orphans(check, dirty, candidates)
    if order.to is None:
        _show(found, order.as_json)
        return 0
    inode = _slot(found, dirty, order.slot)
    extents = dirty.by_inode[inode]
    end = int(extents.end.max()) - (inode << INODE_SHIFT)
    entry = check.walk.uuids[inode] if inode < len(check.walk.uuids) else None
    is_flash = entry is not None and not entry.is_retired and entry.is_flash_only
    offset = order.data_offset if order.data_offset is not None else 0 if is_flash else BDEV_DATA_START_DEFAULT
    with ExitStack() as stack:
        is_new = not os.path.exists(order.to)
        stack.enter_context(writeback_copy.new_file(Path(order.to), order.map_file, is_new=is_new))
        if is_new:
            _forget_map(order, _owner(check, inode))
            size_sectors = entry.sectors if entry is not None and is_flash else end - offset
            place = Place(0, max(size_sectors, 1), offset)
            if not order.dry_run:
                with open(order.to, "xb") as file:
                    file.truncate(place.end_sector << 9)
        device = None
        if not (is_new and order.dry_run):
            device = stack.enter_context(claim([order.to], write=not order.dry_run))[order.to]
            if not is_new:
                place = _judge(device, offset, order._replace(
                    overwrite=order.overwrite or _is_resumed(order, _owner(check, inode))))
        own = source(dirty, inode, first_sector=place.first_sector, end_sector=place.end_sector,
                     shift_sectors=place.shift_sectors)
        if len(own.misplaced.start) and not is_new:
            raise Refused(f"{order.to}: has no room for all of it: the data ends at sector "
                          f"{end - place.shift_sectors}, the device at sector {place.end_sector}")
        if device is None:
            _plan(order, own)
            return 0
        return _copy(held, check, device, own, inode, order, is_new=is_new)


def _owner(check: Check, inode: int) -> Owner:
    # The map of a slot: no uuid is known, so its number stands for one.
    assert check.walk.superblock is not None and check.walk.newest is not None
    return Owner(check.walk.superblock.set_uuid, inode.to_bytes(16, "big"), check.walk.newest.seq)


def _forget_map(order: Order, owner: Owner) -> None:
    # The map of an earlier copy, whose file is gone, says nothing about a new one; a map of anything else is refused.
    if _is_resumed(order, owner) and order.map_file is not None and not order.dry_run:
        order.map_file.unlink()


def _is_resumed(order: Order, owner: Owner) -> bool:
    # The map says that what is on the target is this copy's own work.
    if order.map_file is None or not order.map_file.exists():
        return False
    rescue_map.parse(order.map_file.read_text(encoding="utf-8", errors="replace"), str(order.map_file), owner)
    return True


def _slot(found: list[Orphan], dirty: Dirty, wanted: int | None) -> int:
    names = ", ".join(f"{orphan.inode} ({format_sectors(orphan.dirty_sectors)})" for orphan in found) or "none"
    if wanted is None:
        if not found:
            raise UsageError("there are no orphans; --slot N means the dirty data of a device that the set knows")
        if len(found) != 1:
            raise UsageError(f"--slot says whose data is meant; there are these orphans: {names}")
        return found[0].inode
    if wanted not in dirty.by_inode:
        raise WrongState(f"slot {wanted} has no dirty data; there are these orphans: {names}")
    return wanted


def _judge(device: BlockDevice, offset: int, order: Order) -> Place:
    # Where on a device that exists already.
    backing = Backing(device.path, lambda sector, count: device.read(sector << 9, count << 9), device.size_bytes >> 9)
    sb, found = read_backing(backing) if backing.size_sectors > 16 else (None, [])
    if any(finding.code == "BACKING_KIND" for finding in found):
        raise Refused(f"{device.path}: is a cache device; name the former backing device, or a new file")
    if sb is not None:
        sb = superblock_of(backing)
        if order.data_offset is not None:
            raise UsageError(f"{device.path}: tells its data offset itself; leave --data-offset out")
        if sb.state in (BdevState.CLEAN, BdevState.DIRTY) and not order.overwrite:
            raise Refused(f"{device.path}: is attached to a set, which may hold newer data", hazard=HAZARD_OVERWRITE)
        return Place(sb.data_offset, backing.size_sectors, 0)
    if not order.overwrite:
        raise Refused(f"{device.path}: exists and is no bcache backing device, so what it holds would be overwritten",
                      hazard=HAZARD_OVERWRITE)
    return Place(0, backing.size_sectors, offset)


def _plan(order: Order, own: Source) -> None:
    planned = [{"device": order.to, "operation": "write", "offset_bytes": start << 9,
                "length_bytes": (int(pieces.end[-1]) - start) << 9, "what": "dirty data"}
               for start, pieces in writes(own.extents)]
    if order.as_json:
        print_json("writeback", {"dry_run": True, "writes": planned})
        return
    for each in planned:
        print(f"{each['device']}: write {each['length_bytes']} bytes at byte {each['offset_bytes']}: {each['what']}")


def _copy(held: Cache, check: Check, device: BlockDevice, own: Source, inode: int, order: Order, *,
          is_new: bool) -> int:
    assert check.walk.superblock is not None and check.walk.newest is not None
    if order.dry_run:
        _plan(order, own)
        return 0
    owner = _owner(check, inode)
    copy = writeback_copy.prepare(held, device, own, owner, order.map_file, order.retries)
    writeback_copy.run(copy, device, order.map_file, show=not order.as_json)
    lost, unknown = sectors_of(copy.lost), bool(len(copy.unknown.start))
    if order.as_json:
        print_json("writeback", {"dry_run": False, "slot": inode, "device": device.path,
                                 "copied_bytes": copy.copied_sectors << 9, "earlier_bytes": copy.skipped_sectors << 9,
                                 "lost_bytes": lost << 9, "lost_ranges_bytes": _ranges(copy, copy.lost),
                                 "unknown_ranges_bytes": _ranges(copy, copy.unknown)})
    else:
        print(f"{device.path}: {format_sectors(copy.copied_sectors)} of slot {inode} written, {format_sectors(lost)} "
              "lost. The cache was only read.")
        if is_new:
            print("Where the former device had data that was not dirty in the cache, the new image is empty.")
    if (lost or unknown) and not order.accept_loss:
        print("bcachectl: data is lost or unknown; --json lists the ranges", file=sys.stderr)
        return Refused.exit_status
    return 0


def _ranges(copy: Copy, rows: Any) -> list[list[int]]:
    return [[start << 9, end << 9] for start, end in zip(rows.start.tolist(), rows.end.tolist(), strict=True)]


def _show(found: list[Orphan], as_json: bool) -> None:
    if as_json:
        print_json("writeback-orphans", {"orphans": [
            {"slot": orphan.inode, "state": orphan.state, "extents": orphan.extents,
             "dirty_bytes": orphan.dirty_sectors << 9, "end_bytes": orphan.end_sector << 9,
             "label": orphan.entry.label_text if orphan.entry is not None else None,
             "first_registered": format_time(orphan.entry.first_reg if orphan.entry is not None else 0) or None,
             "detached": format_time(orphan.entry.invalidated if orphan.entry is not None else 0) or None,
             "likely_devices": list(orphan.likely)} for orphan in found]})
        return
    if not found:
        print("No orphans: all dirty data belongs to devices that the set knows.")
        return
    rows = ((orphan.inode, orphan.state, format_sectors(orphan.dirty_sectors), orphan.extents,
             format_sectors(orphan.end_sector), format_time(orphan.entry.first_reg if orphan.entry is not None else 0),
             format_time(orphan.entry.invalidated if orphan.entry is not None else 0),
             orphan.entry.label_text if orphan.entry is not None else "", ", ".join(orphan.likely))
            for orphan in found)
    print("\n".join(table.table(("SLOT", "STATE", "DIRTY", "EXTENTS", "NEEDS", "REGISTERED", "DETACHED", "LABEL",
                                 "LIKELY"), rows, color=table.wants_color(sys.stdout, os.environ))))
