# SPDX-License-Identifier: GPL-2.0-only
"""``bcachectl forget-backing``: a dead backing device's data off the cache, after it was put into a file."""

from __future__ import annotations

import os
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer

from bcachectl import control, discovery, writeplan
from bcachectl.blockdev import BlockDevice, open_device
from bcachectl.claim import claim
from bcachectl.commands import fsck_report, writeback_copy
from bcachectl.commands.options import Backup, DryRun, Force, Json, complete_set, print_json
from bcachectl.errors import Refused, UsageError, WrongState
from bcachectl.fsck import forget
from bcachectl.fsck.check import Check
from bcachectl.fsck.forget import Held
from bcachectl.fsck.repair import RepairWrite
from bcachectl.fsck.rescue import open_check
from bcachectl.fsck.rescue_map import Owner
from bcachectl.fsck.writeback import Dirty, find_dirty, sectors_of, source
from bcachectl.ondisk.bkey import INODE_SHIFT
from bcachectl.ondisk.magic import INVALID_UUID
from bcachectl.units import format_sectors, format_uuid
from bcachectl.writeplan import Plan, Write

HAZARD_PRESENT = "present"
HAZARD_OVERWRITE = "overwrite"
HAZARDS = (HAZARD_PRESENT, HAZARD_OVERWRITE)

SetArgument = Annotated[str, typer.Argument(
    metavar="SET", autocompletion=complete_set, show_default=False,
    help="The cache device of a set that does not run, or the set's uuid or a unique prefix of it.")]
UuidArgument = Annotated[str, typer.Argument(
    metavar="UUID", show_default=False,
    help="The backing device: its uuid, its label, bcacheN, or a slot's number as `writeback --orphans` shows it.")]
ExportOption = Annotated[Path | None, typer.Option(
    "--export", metavar="FILE", show_default=False,
    help="First put the dirty data into this sparse file, each sector where it belongs on the backing device, and into "
         "FILE.map where there is any: `ddrescue -m FILE.map FILE DEVICE` writes it to a device.")]
AcceptOption = Annotated[bool, typer.Option("--accept-loss", help="Give dirty data up that is not in an export.")]
RetriesOption = Annotated[int, typer.Option("--retries", metavar="N", min=0,
                                            help="How often sectors that could not be read are tried again.")]


class Exported(NamedTuple):
    """What an export brought: sectors copied now or earlier, and those that are lost."""

    copied_sectors: int
    lost_sectors: int
    is_whole: bool


def forget_backing(set_or_cache: SetArgument, uuid: UuidArgument, export: ExportOption = None,
                   accept_loss: AcceptOption = False, retries: RetriesOption = 1, backup: Backup = None,
                   force: Force = None, dry_run: DryRun = False, as_json: Json = False) -> int:
    """Make a set that does not run forget a backing device that is gone: its slot is retired, its data is dropped.

    For a device that died with dirty data in the cache, which would block the cache's space for ever. The dirty data
    goes into a file first (--export), unless --accept-loss gives it up. An undo file is kept, and `bcachectl undo`
    takes it back as long as the set has not run since.
    """
    hazards = frozenset(force or ())
    if hazards - set(HAZARDS):
        raise UsageError(f"--force={min(hazards - set(HAZARDS))} overrides nothing here; it takes {HAZARDS[0]} or "
                         f"{HAZARDS[1]}")
    cache = find_cache(set_or_cache)
    with ExitStack() as stack:
        device = stack.enter_context(claim([cache], write=not dry_run))[cache]
        check = examine(device, show=sys.stderr.isatty() and not as_json)
        slot = _slot(check, cache, uuid)
        held = forget.held(check, slot)
        _check_present(check, slot, cache, is_forced=HAZARD_PRESENT in hazards)
        if held.dirty_sectors and export is None and not accept_loss:
            raise Refused(f"{cache}: {format_sectors(held.dirty_sectors)} of {check.volume_name(slot)} exist nowhere "
                          "else; --export FILE saves them first, --accept-loss gives them up")
        exported = None
        if export is not None and held.dirty_sectors and not dry_run:
            exported = export_dirty(check, device, slot, export, retries, is_forced=HAZARD_OVERWRITE in hazards,
                                    show=not as_json)
            if not exported.is_whole and not accept_loss:
                raise Refused(f"{cache}: {format_sectors(exported.lost_sectors)} of the dirty data cannot be read, "
                              f"{export} has the rest; --retries tries longer, --accept-loss goes on without")
        entry_uuid = check.walk.uuids[slot].uuid
        name = check.volume_name(slot)
        now_s = int(time.time())
        plan = Plan("forget-backing", as_writes(forget.plan_forget(check, slot, now_s=now_s), cache))
        undo = backup or writeplan.undo_path("forget-backing", [cache], now_s=now_s)
        if not dry_run:
            writeplan.apply_with_undo(plan, {cache: device}, undo)
    _report(plan, undo, name, entry_uuid, held, exported, export, dry_run, as_json)
    return 0


def find_cache(text: str) -> str:
    """The cache device that is named, by itself or by its set's uuid; WrongState if an engine runs the set."""
    if os.path.exists(text):
        _refuse_running(text)
        return text
    wanted = control.parse_set_uuid(text) if len(text.replace("-", "")) == 32 else text.lower()
    probes = [discovery.probe(node) for node in discovery.enumerate_devices()]
    found = [probe for probe in probes if probe.superblock is not None and probe.superblock.is_cache
             and format_uuid(probe.superblock.set_uuid).startswith(wanted)]
    if len(wanted) < 8 or len(found) != 1:
        raise WrongState(f"{text}: {'several cache devices have' if len(found) > 1 else 'no cache device here has'} "
                         "this set uuid; name the cache device itself")
    _refuse_running(found[0].node.path)
    return found[0].node.path


def _refuse_running(path: str) -> None:
    # An engine holds the file's lock as well; this says what to do.
    for engine in control.engines():
        try:
            snapshot = engine.snapshot(0)
            if snapshot.cache_path is not None and control.is_same_file(snapshot.cache_path, path):
                raise WrongState(f"{path}: its set is run by an engine (pid {engine.pid}); `bcachectl detach` gives a "
                                 "device up that is there, for one that is gone stop the engine first "
                                 f"(`bcachectl engine stop {engine.uuid[:8]}`)")
        finally:
            engine.close()


def examine(device: BlockDevice, *, show: bool) -> Check:
    """The checked set on a cache device that has run and is not damaged."""
    def read(sector: int, count: int) -> bytes:
        return device.read(sector << 9, count << 9)

    with fsck_report.told(read, show=show) as looking:
        check = open_check(read, device.size_bytes >> 9, fd=device.plain_fd, looking=looking)
    fsck_report.watch(check, show=show)
    sb = check.walk.superblock
    if sb is not None and sb.is_backing:
        raise UsageError(f"{device.path}: is a backing device of set {format_uuid(sb.set_uuid)}; name the cache device")
    forget.refuse_damaged(check, device.path)
    if sb is None or not sb.cache_sync:
        raise WrongState(f"{device.path}: its set never ran, so it knows no backing device")
    return check


def _slot(check: Check, cache: str, uuid: str) -> int:
    slot = forget.find_slot(check, cache, uuid)
    entry = check.walk.uuids[slot]
    if entry.is_flash_only and not entry.is_retired:
        raise WrongState(f"{uuid}: is a flash-only volume, which has no backing device; `bcachectl volume remove` "
                         "removes it while an engine runs the set")
    return slot


def _check_present(check: Check, slot: int, cache: str, *, is_forced: bool) -> None:
    # A device that is here can take its data itself.
    uuid = check.walk.uuids[slot].uuid
    for probe in map(discovery.probe, discovery.enumerate_devices()):
        sb = probe.superblock
        if sb is not None and sb.is_backing and sb.uuid == uuid and not is_forced:
            raise Refused(f"{probe.node.path}: is the backing device that is to be forgotten, and it is here; "
                          f"`bcachectl writeback {cache} {probe.node.path}` gives it its data", hazard=HAZARD_PRESENT)


def export_dirty(check: Check, device: BlockDevice, slot: int, file: Path, retries: int, *, is_forced: bool,
                 show: bool) -> Exported:
    """Put the dirty data of a slot into a sparse file, durably, with its map beside it."""
    map_file = file.with_name(f"{file.name}.map")
    if file.exists() and os.path.samefile(file, device.path):
        raise UsageError(f"{file}: is the cache device itself; name a new file")
    if file.exists() and not file.is_file():
        raise Refused(f"{file}: is no plain file; `bcachectl writeback --slot {slot} --to {file} {device.path}` writes "
                      "to a device")
    if file.exists() and not map_file.exists() and not is_forced:
        raise Refused(f"{file}: exists already, and no {map_file.name} says that it is an export", hazard="overwrite")
    dirty: Dirty = find_dirty(check)
    end_sector = int(dirty.by_inode[slot].end.max()) - (slot << INODE_SHIFT)
    is_new = not file.exists()
    if is_new:
        map_file.unlink(missing_ok=True)
    assert check.walk.superblock is not None and check.walk.newest is not None
    entry = check.walk.uuids[slot]
    owner = Owner(check.walk.superblock.set_uuid, slot.to_bytes(16, "big") if entry.is_retired else entry.uuid,
                  check.walk.newest.seq)
    own = source(dirty, slot, first_sector=0, end_sector=end_sector)
    with ExitStack() as stack:
        stack.enter_context(writeback_copy.new_file(file, map_file, is_new=is_new))
        with file.open("ab") as raw:
            raw.truncate(max(end_sector << 9, raw.tell()))
        target = stack.enter_context(open_device(str(file), write=True, exclusive=True, direct=False))
        careful = stack.enter_context(open_device(device.path, direct=True)) if device.is_block else device
        cache = writeback_copy.cache_of(device, careful)
        copy = writeback_copy.prepare(cache, target, own, owner, map_file, retries, end_sector=end_sector)
        writeback_copy.run(copy, target, map_file, show=show)
    lost = sectors_of(copy.lost)
    return Exported(copy.copied_sectors + copy.skipped_sectors, lost, not lost and not len(copy.unknown.start))


def as_writes(steps: tuple[tuple[RepairWrite, ...], ...], cache: str) -> tuple[tuple[Write, ...], ...]:
    """The steps of a repair as those of a plan."""
    return tuple(tuple(Write(write.device or cache, write.offset_bytes, len(write.data), write.what, write.data)
                       for write in step) for step in steps)


def _report(plan: Plan, undo: Path, name: str, uuid: bytes, held: Held, exported: Exported | None,
            export: Path | None, dry_run: bool, as_json: bool) -> None:
    if as_json:
        body: dict[str, Any] = {
            "volume": name, "uuid": format_uuid(uuid), "dirty_bytes": held.dirty_sectors << 9,
            "clean_bytes": held.clean_sectors << 9,
            "export": None if exported is None else {
                "file": str(export), "map": f"{export}.map", "copied_bytes": exported.copied_sectors << 9,
                "lost_bytes": exported.lost_sectors << 9}}
        print_json("forget-backing", body | (writeplan.describe_json(plan) if dry_run else
                                             {"dry_run": False, "undo_file": str(undo)}))
        return
    if dry_run:
        if export is not None and held.dirty_sectors:
            print(f"{export}: write {held.dirty_sectors << 9} bytes of dirty data, and {export}.map")
        print("\n".join(writeplan.describe(plan)))
        return
    if exported is not None:
        print(f"{export}: {format_sectors(exported.copied_sectors)} of dirty data, by its place on the backing device; "
              f"{format_sectors(exported.lost_sectors)} lost. {export}.map lists where there is any.")
    given_up = "" if exported is not None or not held.dirty_sectors else " given up"
    known = "" if uuid in (bytes(16), INVALID_UUID) else f" ({format_uuid(uuid)})"
    print(f"{name}{known} is forgotten: {format_sectors(held.dirty_sectors)} dirty{given_up}, "
          f"{format_sectors(held.clean_sectors)} clean dropped.")
    print(f"`bcachectl undo {undo}` takes it back, as long as the set has not run.")
