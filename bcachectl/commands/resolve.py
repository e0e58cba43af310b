# SPDX-License-Identifier: GPL-2.0-only
"""``bcachectl resolve``: a backing device and its cache disagree; what each way out loses, and taking one."""

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
from bcachectl.commands import forget as forget_command
from bcachectl.commands.options import Backup, DryRun, Force, Json, VolumeArgument, complete_device, print_json
from bcachectl.errors import BcachectlError, Refused, UsageError, WrongState
from bcachectl.fsck import forget, resolve
from bcachectl.fsck.check import Check
from bcachectl.fsck.check_backing import Backing
from bcachectl.fsck.resolve import KEEP_DIRTY, USE_ALONE, Choice, Verdict
from bcachectl.fsck.writeback import find_dirty, source, writes
from bcachectl.fsck.writeback_target import superblock_of
from bcachectl.ondisk.bkey import PTR_OFFSET
from bcachectl.ondisk.superblock import SB_BYTES, SB_SECTOR, Superblock
from bcachectl.units import counted, format_sectors, format_uuid
from bcachectl.writeplan import Plan, Write

HAZARD_DIRTY = "dirty"
HAZARD_INCONSISTENT = "inconsistent"
HAZARDS = (HAZARD_DIRTY, HAZARD_INCONSISTENT)
COPY_LIMIT_SECTORS = 1 << 20
"""How much dirty data is copied with an undo file, which is kept in memory: 512 MiB."""
RANGES_SHOWN = 8

CacheOption = Annotated[str | None, typer.Option(
    "--cache", metavar="DEVICE", show_default=False, autocompletion=complete_device,
    help="The cache device of the set, if there still is one: then the losses are known.")]
AloneOption = Annotated[bool, typer.Option(
    "--use-backing-alone", help="Go on with what the backing device holds; what only the cache has is lost.")]
KeepOption = Annotated[bool, typer.Option(
    "--keep-dirty", help="Go on with the cache's dirty data; what was written there without the cache is lost.")]
ExportOption = Annotated[Path | None, typer.Option(
    "--export", metavar="FILE", show_default=False,
    help="With --use-backing-alone and --cache: first put the dirty data into this sparse file, and into FILE.map "
         "where there is any.")]


class Subject(NamedTuple):
    """The devices, what they say, and the verdict."""

    backing: BlockDevice
    superblock: Superblock
    cache: BlockDevice | None
    check: Check | None
    verdict: Verdict


def resolve_volume(volume: VolumeArgument, cache: CacheOption = None, use_backing_alone: AloneOption = False,
                   keep_dirty: KeepOption = False, export: ExportOption = None, backup: Backup = None,
                   force: Force = None, dry_run: DryRun = False, as_json: Json = False) -> int:
    """Tell why a backing device does not come up, or is `inconsistent`, and what each way out loses; take one.

    Without --use-backing-alone or --keep-dirty nothing is written. A way that loses data asks on a terminal, and wants
    the hazard named elsewhere; an undo file is kept. VOLUME is the backing DEVICE, of a set that does not run; with
    --cache it may be the uuid, label or bcacheN of one that is not here.
    """
    hazards = frozenset(force or ())
    if hazards - set(HAZARDS):
        raise UsageError(f"--force={min(hazards - set(HAZARDS))} overrides nothing here; it takes {HAZARDS[0]} or "
                         f"{HAZARDS[1]}")
    option = _option(use_backing_alone, keep_dirty)
    if export is not None and (option != USE_ALONE or cache is None):
        raise UsageError("--export saves what --use-backing-alone gives up, from the --cache; give both")
    if cache is not None and not os.path.exists(volume):
        return _report_absent(volume, cache, option, as_json)
    _check_runs(volume)
    with ExitStack() as stack:
        subject = _open(stack, volume, cache, write=bool(option) and not dry_run, show=not as_json)
        if not option:
            _report(subject, as_json)
            return 0
        choice = subject.verdict.choice(option)
        if choice is None:
            offered = [f"--{each.option}" for each in subject.verdict.choices if each.option]
            raise WrongState(f"{volume}: --{option} makes no sense here: {subject.verdict.story[:1].lower()}"
                             f"{subject.verdict.story[1:].rstrip('.')}; choices: {', '.join(offered) or 'none needed'}")
        if export is not None and not len(subject.verdict.dirty.start):
            raise UsageError(f"{cache}: has no dirty data of {volume}, so there is nothing to --export")
        if not dry_run:
            _confirm(subject, choice, hazards, export, may_ask=not as_json)
        plan = _plan(subject, option, export, dry_run)
        undo = backup or writeplan.undo_path("resolve", [subject.backing.path], now_s=int(time.time()))
        if not dry_run:
            devices = {device.path: device for device in (subject.backing, subject.cache) if device is not None}
            writeplan.apply_with_undo(plan, devices, undo)
    _done(plan, subject, choice, undo, export, dry_run, as_json)
    return 0


def _report_absent(volume: str, cache: str, option: str, as_json: bool) -> int:
    if option:
        raise UsageError(f"{volume}: --{option} is about a backing device; name that")
    with open_device(cache) as device:
        check = forget_command.examine(device, show=not as_json and sys.stderr.isatty())
        slot = forget.find_slot(check, cache, volume)
        verdict = resolve.absent(check, slot, cache)
    if as_json:
        print_json("resolve", {"device": None, "uuid": format_uuid(check.walk.uuids[slot].uuid),
                               "state": verdict.state, "story": verdict.story, "slot": slot,
                               "choices": [_choice_json(each) for each in verdict.choices]})
    else:
        _print_verdict(f"{check.volume_name(slot)} of {cache}, state {verdict.state}", verdict)
    return 0


def _option(use_backing_alone: bool, keep_dirty: bool) -> str:
    if use_backing_alone and keep_dirty:
        raise UsageError("--use-backing-alone and --keep-dirty exclude each other; give one of them")
    return USE_ALONE if use_backing_alone else KEEP_DIRTY if keep_dirty else ""


def _check_runs(volume: str) -> None:
    if os.path.exists(volume):
        return
    try:
        found = control.find_volume(volume)
    except WrongState as error:
        raise WrongState(f"{volume}: is no volume that runs; name its backing DEVICE") from error
    uuid, source = found.live.uuid, found.live.source
    found.live.close()
    who, stop = (("an engine", f"bcachectl engine stop {uuid[:8]}") if source == control.ENGINE else
                 ("the kernel", f"bcachectl stop {found.target or uuid[:8]}"))
    raise WrongState(f"{volume}: is run by {who}, which has its data; stop that first (`{stop}`), "
                     "then name the backing DEVICE")


def _open(stack: ExitStack, volume: str, cache: str | None, *, write: bool, show: bool) -> Subject:
    names = [volume] if cache is None else [volume, cache]
    if write:
        opened = stack.enter_context(claim(names, write=True))
    else:
        opened = {name: stack.enter_context(open_device(name)) for name in names}
        for name in names:
            for user in discovery.users_of(name):
                print(f"bcachectl: {name}: is in use ({user}); what is found may be work under way", file=sys.stderr)
    device = opened[volume]
    member = Backing(volume, lambda sector, count: device.read(sector << 9, count << 9), device.size_bytes >> 9,
                     has_data=all(each.image is None for each in opened.values()))
    sb = superblock_of(member, may_fail_csum=True)
    check = None if cache is None else forget_command.examine(opened[cache], show=show and sys.stderr.isatty())
    if not resolve.is_sound(member):
        sb = resolve.likely(sb, member, check)
        print(f"bcachectl: {volume}: its superblock fails its checksum; its state is taken to be "
              f"{sb.state.word}", file=sys.stderr)
    verdict = resolve.judge(sb, member, check, cache or "")
    return Subject(device, sb, None if cache is None else opened[cache], check, verdict)


def _confirm(subject: Subject, choice: Choice, hazards: frozenset[str], export: Path | None, *, may_ask: bool) -> None:
    # What is saved in an export is not lost.
    hazard = HAZARD_INCONSISTENT if choice.option == KEEP_DIRTY else HAZARD_DIRTY
    if choice.loss.sectors == 0 or hazard in hazards or export is not None:
        return
    if not may_ask or not sys.stdin.isatty():
        raise Refused(f"{subject.backing.path}: --{choice.option} loses {choice.loss.text}", hazard=hazard)
    _report(subject, as_json=False)
    if not typer.confirm(f"--{choice.option} loses {choice.loss.text}. Do it?"):
        raise Refused(f"{subject.backing.path}: not confirmed, so nothing was changed")


def _plan(subject: Subject, option: str, export: Path | None, dry_run: bool) -> Plan:
    verdict, backing, cache = subject.verdict, subject.backing, subject.cache
    raw = backing.read(SB_SECTOR << 9, SB_BYTES)
    steps: list[tuple[Write, ...]] = []
    if option == KEEP_DIRTY and not verdict.copies:
        assert subject.check is not None and subject.check.walk.superblock is not None
        data = resolve.dirty_again(subject.superblock, raw, subject.check.walk.superblock.set_uuid)
        return Plan("resolve", ((Write(backing.path, SB_SECTOR << 9, SB_BYTES, "superblock, state dirty", data),),))
    if option == KEEP_DIRTY:
        steps.append(_copies(subject))
    alone = Write(backing.path, SB_SECTOR << 9, SB_BYTES, "superblock, state no cache",
                  resolve.alone(subject.superblock, raw))
    # The data is there before the state says that nothing else is needed; the cache forgets last.  In between the
    # kernel would retire the slot of such a device itself (super.c, bch_cached_dev_attach).
    steps.append((alone,))
    if verdict.slot is not None:
        assert subject.check is not None and cache is not None
        if export is not None and len(verdict.dirty.start) and not dry_run:
            _export(subject, verdict.slot, export)
        steps += forget_command.as_writes(
            forget.plan_forget(subject.check, verdict.slot, now_s=int(time.time())), cache.path)
    return Plan("resolve", tuple(steps))


def _export(subject: Subject, slot: int, export: Path) -> None:
    assert subject.check is not None and subject.cache is not None
    saved = forget_command.export_dirty(subject.check, subject.cache, slot, export, 1, is_forced=False,
                                        show=sys.stderr.isatty())
    if not saved.is_whole:
        raise Refused(f"{subject.cache.path}: {format_sectors(saved.lost_sectors)} of the dirty data cannot be read, "
                      f"{export} has the rest; the same without --export gives the rest up")


def _copies(subject: Subject) -> tuple[Write, ...]:
    # The dirty data by its place on the backing device.
    verdict, cache, backing = subject.verdict, subject.cache, subject.backing
    assert subject.check is not None and cache is not None and verdict.slot is not None
    sectors = int(verdict.dirty.size.sum())
    if sectors > COPY_LIMIT_SECTORS:
        raise Refused(f"{backing.path}: {format_sectors(sectors)} are more than an undo file should hold; `bcachectl "
                      f"writeback --slot {verdict.slot} --to {backing.path} {cache.path}` copies them without one, "
                      "then --use-backing-alone settles the state")
    own = source(find_dirty(subject.check), verdict.slot, first_sector=subject.superblock.data_offset,
                 end_sector=backing.size_bytes >> 9)
    if len(own.misplaced.start) or len(own.lost.start) or len(own.unknown.start):
        raise Refused(f"{backing.path}: not all of the dirty data has a place there or can be found; `bcachectl "
                      f"writeback --slot {verdict.slot} --to {backing.path} {cache.path}` tells more")
    found: list[Write] = []
    for start, pieces in writes(own.extents):
        data = bytearray()
        for first, last, sector in zip(pieces.start.tolist(), pieces.end.tolist(),
                                       PTR_OFFSET.get(pieces.ptr).tolist(), strict=True):
            data += cache.read(sector << 9, (last - first) << 9)
        found.append(Write(backing.path, start << 9, len(data), "dirty data", bytes(data)))
    return tuple(found)


def _report(subject: Subject, as_json: bool) -> None:
    verdict, sb = subject.verdict, subject.superblock
    if as_json:
        print_json("resolve", _as_json(subject))
        return
    of_set = f" of set {format_uuid(sb.set_uuid)}" if any(sb.set_uuid) else ""
    _print_verdict(f"{subject.backing.path}: backing device{of_set}, state {verdict.state}", verdict)
    for slot, sectors in (resolve.ownerless(subject.check) if subject.check is not None else {}).items():
        print(f"\nSlot {slot} of the set has {format_sectors(sectors)} of dirty data that nobody owns; `bcachectl "
              "writeback --orphans` tells whose they may be.")
    if subject.cache is None and verdict.choices:
        for path in _caches(sb.set_uuid):
            print(f"\nA cache device of this set is here: {path}; --cache {path} tells what it has.")


def _print_verdict(title: str, verdict: Verdict) -> None:
    print(title)
    print(f"  {verdict.story}")
    if not verdict.choices:
        print("  There is nothing to resolve.")
    for choice in verdict.choices:
        print()
        print(f"{f'--{choice.option}: ' if choice.option else ''}{choice.does}")
        print(f"  loses {choice.loss.text}")
        for start, end in choice.loss.ranges[:RANGES_SHOWN]:
            print(f"    bytes {start} to {end}")
        if len(choice.loss.ranges) > RANGES_SHOWN:
            print(f"    and {counted(len(choice.loss.ranges) - RANGES_SHOWN, 'more range')}; --json lists them")


def _caches(set_uuid: bytes) -> list[str]:
    try:
        probes = [discovery.probe(node) for node in discovery.enumerate_devices()]
    except BcachectlError:
        return []
    return [probe.node.path for probe in probes if probe.superblock is not None and probe.superblock.is_cache
            and probe.superblock.set_uuid == set_uuid]


def _as_json(subject: Subject) -> dict[str, Any]:
    verdict, sb = subject.verdict, subject.superblock
    return {"device": subject.backing.path, "uuid": format_uuid(sb.uuid),
            "set": format_uuid(sb.set_uuid) if any(sb.set_uuid) else None, "state": verdict.state,
            "story": verdict.story, "slot": verdict.slot,
            "ownerless_bytes": {str(slot): sectors << 9 for slot, sectors in (
                resolve.ownerless(subject.check) if subject.check is not None else {}).items()},
            "choices": [_choice_json(each) for each in verdict.choices]}


def _choice_json(choice: Choice) -> dict[str, Any]:
    return {"option": f"--{choice.option}" if choice.option else None, "does": choice.does,
            "loses": choice.loss.text,
            "lost_bytes": None if choice.loss.sectors is None else choice.loss.sectors << 9,
            "lost_ranges_bytes": [list(each) for each in choice.loss.ranges]}


def _done(plan: Plan, subject: Subject, choice: Choice, undo: Path, export: Path | None, dry_run: bool,
          as_json: bool) -> None:
    if as_json:
        print_json("resolve", {"device": subject.backing.path, "chosen": _choice_json(choice),
                               "export": None if export is None else str(export),
                               **(writeplan.describe_json(plan) if dry_run else
                                  {"dry_run": False, "undo_file": str(undo)})})
        return
    if dry_run:
        if export is not None and choice.loss.sectors:
            print(f"{export}: write {choice.loss.sectors << 9} bytes of dirty data, and {export}.map")
        print("\n".join(writeplan.describe(plan)))
        return
    whats = [write.what for write in plan.writes if write.device == subject.backing.path]
    lost = choice.loss.text
    if export is not None and choice.loss.sectors:
        lost = f"nothing, what only the cache had is in {export}, and {export}.map says where"
    print(f"{subject.backing.path}: {whats[-1]}; lost: {lost}.")
    print(f"`bcachectl undo {undo}` takes it back, as long as neither was used since.")
