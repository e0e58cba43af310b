# SPDX-License-Identifier: GPL-2.0-only
"""``bcachectl fsck``: everything checked, what each finding costs, and the repair with a way back."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from bcachectl import discovery, writeplan
from bcachectl.blockdev import BlockDevice, open_device
from bcachectl.claim import claim, refuse_twice
from bcachectl.commands import fsck_copy, fsck_files, fsck_report
from bcachectl.commands.options import DryRun, Json, complete_device, print_json
from bcachectl.commands.superblock_options import check_given, parse_bucket_size, parse_set_uuid
from bcachectl.errors import EXIT_CANCELLED, BcachectlError, Refused, UsageError
from bcachectl.fsck.check import Check
from bcachectl.fsck.check_backing import Backing, read_backing
from bcachectl.fsck.findings import Severity
from bcachectl.fsck.owners import ASSIGN_FLASH, ASSIGN_NONE
from bcachectl.fsck.repair import BACKING_REPAIRED, Repair, plan_repair
from bcachectl.fsck.rescue import open_check
from bcachectl.tailfile import left_behind
from bcachectl.units import counted, format_uuid, parse_uuid
from bcachectl.writeplan import Plan, Write

EXIT_CORRECTED = 1
EXIT_UNCORRECTED = 4
EXIT_OPERATIONAL = 8
EXIT_USAGE = 16

CacheArgument = Annotated[str, typer.Argument(metavar="CACHE", autocompletion=complete_device, show_default=False,
                                              help="The cache device, or a file that holds an image of it.")]
BackingArgument = Annotated[list[str] | None, typer.Argument(
    metavar="BACKING", autocompletion=complete_device, show_default=False,
    help="Backing devices of the set, to be checked against it.")]
NoOption = Annotated[bool, typer.Option("-n", "--no", help="Only check, write nothing. This is the default, on a "
                                                      "terminal too.")]
PreenOption = Annotated[bool, typer.Option("-p", "--preen", help="Repair what can be repaired without any loss.")]
YesOption = Annotated[bool, typer.Option("-y", "--yes", help="Repair everything that can be repaired.")]
RepairOption = Annotated[bool, typer.Option("--repair", help="Show the plan of a full repair, ask, then repair.")]
OutputOption = Annotated[Path | None, typer.Option(
    "--output", metavar="FILE", show_default=False,
    help="Repair onto a copy of CACHE in FILE; no device is written, and backing devices are only read.")]
BackupOption = Annotated[Path | None, typer.Option(
    "--backup", metavar="FILE", show_default=False,
    help="Where the undo file goes. Default: a new file below your state directory, for root /var/lib/bcachectl.")]
FilesOption = Annotated[bool, typer.Option("--files", help="Name the files that lost ranges belong to (ext4, xfs).")]
BucketOption = Annotated[str | None, typer.Option("--bucket-size", metavar="SIZE", show_default=False,
                                                  help="Bucket size to go by if the superblock is damaged.")]
SetOption = Annotated[str | None, typer.Option("--set-uuid", metavar="UUID", show_default=False,
                                               help="Set uuid to go by if the superblock is damaged.")]
AssignOption = Annotated[list[str] | None, typer.Option(
    "--assign", metavar="SLOT=OWNER", show_default=False,
    help="Whose the data of a slot is that the uuid array has lost: the uuid or a BACKING of the set, none (it is kept "
         "as an orphan), or flash (a flash-only volume). May be given several times.")]


def fsck(cache: CacheArgument, backings: BackingArgument = None, no: NoOption = False, preen: PreenOption = False,
         yes: YesOption = False, repair: RepairOption = False, output: OutputOption = None, backup: BackupOption = None,
         files: FilesOption = False, bucket_size: BucketOption = None, set_uuid: SetOption = None,
         assign: AssignOption = None, dry_run: DryRun = False, as_json: Json = False) -> int:
    """Check a cache set offline: every structure, every key, and every rule between them.

    Nothing is written unless -p, -y or --repair asks for it: without them, on a terminal too, this only reports. Before
    a repair an undo file is kept, and `bcachectl undo` takes the repair back. Exit status as of fsck(8): 0 clean, 1
    corrected, 4 left uncorrected, 8 operational error, 16 usage, 32 interrupted.
    """
    try:
        if sum((no, preen, yes, repair)) > 1:
            raise UsageError("-n, -p, -y and --repair exclude each other; give one of them")
        wants_repair = preen or yes or repair
        if output is not None and not wants_repair:
            raise UsageError("--output says where a repair goes; add -p, -y or --repair")
        if (assign or dry_run) and not wants_repair:
            raise UsageError(f"{'--assign' if assign else '--dry-run'} is about a repair; add -p, -y or --repair")
        sectors, uuid = parse_bucket_size(bucket_size), parse_set_uuid(set_uuid)
        names = list(backings or ())
        refuse_twice([cache, *names])
        if output is not None:
            fsck_copy.check_output(output)
        with ExitStack() as stack:
            if wants_repair and output is None and not dry_run:
                opened = stack.enter_context(claim([cache, *names], write=True))
            else:
                opened = {name: stack.enter_context(open_device(name)) for name in [cache, *names]}
            if output is not None and opened[cache].image is not None:
                raise UsageError(f"{cache}: is a metadata image; repair what `bcachectl image extract` makes of it")
            check = _check(opened, cache, names, sectors, uuid, as_json)
            lines = fsck_files.lost_files(check) if files else []
            if not wants_repair:
                _print(check, None, None, lines, as_json)
                return EXIT_UNCORRECTED if check.worst > Severity.NOTE else 0
            plan = plan_repair(check, safe_only=preen, assign=_assigned(assign or [], opened))
            return _repair(check, plan, opened, cache, lines, ask=repair, output=output, backup=backup,
                           dry_run=dry_run, as_json=as_json)
    except KeyboardInterrupt:
        print("bcachectl: interrupted", file=sys.stderr)
        return EXIT_CANCELLED
    except BcachectlError as error:
        _fail(error)


def _fail(error: BcachectlError) -> NoReturn:
    # fsck(8) has its own numbers for what went wrong.
    print(f"bcachectl: {error}", file=sys.stderr)
    raise typer.Exit(EXIT_USAGE if isinstance(error, UsageError) else EXIT_OPERATIONAL) from error


def _check(opened: dict[str, BlockDevice], cache: str, names: Sequence[str], bucket_size: int | None,
           set_uuid: bytes | None, as_json: bool) -> Check:
    has_data = all(device.image is None for device in opened.values())
    members = [_member(opened[name])._replace(has_data=has_data) for name in names]
    device = _member(opened[cache])
    for name, each in opened.items():
        users = discovery.users_of(name) if each.read_only else []
        if users:
            print(f"bcachectl: {name}: is in use ({', '.join(users)}); what is found may be work under way",
                  file=sys.stderr)
    show = sys.stderr.isatty() and not as_json
    with fsck_report.told(device.read, show=show) as looking:
        check = open_check(device.read, device.size_sectors, members, bucket_size=bucket_size, set_uuid=set_uuid,
                           logical_block_sectors=device.logical_block_sectors, fd=opened[cache].plain_fd,
                           looking=looking)
    fsck_report.watch(check, show=show)
    sb = check.walk.superblock
    check_given(cache, device.read, device.size_sectors, sb, bucket_size=bucket_size, set_uuid=set_uuid)
    left = None if sb is None else left_behind(sb.set_uuid)
    if left is not None:
        print(f"bcachectl: {cache}: {left}; what is found is without them", file=sys.stderr)
    if sb is not None and sb.is_backing:
        raise UsageError(f"{cache}: is a backing device of set {format_uuid(sb.set_uuid)}; name the cache device first")
    return check


def _member(device: BlockDevice) -> Backing:
    return Backing(device.path, lambda sector, count: device.read(sector << 9, count << 9), device.size_bytes >> 9,
                   logical_block_sectors=device.logical_block_bytes >> 9)


def _print(check: Check, repair: Repair | None, undo: Path | None, files: list[str], as_json: bool) -> None:
    if as_json:
        print_json("fsck", fsck_report.as_json(check, repair, undo, files))
    else:
        for line in fsck_report.lines(check, repair, files):
            print(line)


def _assigned(words: Sequence[str], opened: dict[str, BlockDevice]) -> dict[int, bytes]:
    assigned: dict[int, bytes] = {}
    for word in words:
        slot, equals, owner = word.partition("=")
        if not equals or not slot.isdecimal() or int(slot) in assigned:
            raise UsageError(f"--assign {word}: is not SLOT=OWNER, once for each slot")
        if owner in (ASSIGN_NONE.decode(), ASSIGN_FLASH.decode()):
            assigned[int(slot)] = owner.encode()
            continue
        if owner in opened:
            sb, _found = read_backing(_member(opened[owner]))
            if sb is None:
                raise UsageError(f"--assign {word}: {owner} has no superblock of a backing device")
            assigned[int(slot)] = sb.uuid
            continue
        try:
            assigned[int(slot)] = parse_uuid(owner)
        except BcachectlError as error:
            raise UsageError(f"--assign {word}: the owner is a uuid, a backing device that is named too, none or "
                             "flash") from error
    return assigned


def _repair(check: Check, repair: Repair, opened: dict[str, BlockDevice], cache: str, files: list[str], *, ask: bool,
            output: Path | None, backup: Path | None, dry_run: bool, as_json: bool) -> int:
    if output is not None:
        # Backing devices are not copied, so they stay as they are.
        elsewhere = tuple(finding for finding in repair.repaired if finding.code in BACKING_REPAIRED)
        repair = repair._replace(steps=tuple(tuple(write for write in step if not write.device)
                                             for step in repair.steps if any(not write.device for write in step)),
                                 repaired=tuple(finding for finding in repair.repaired if finding not in elsewhere),
                                 left=(*repair.left, *elsewhere))
    plan = _plan(repair, cache if output is None else str(output))
    undo: Path | None = None
    if plan.steps:
        if not as_json:
            _print(check, repair, None, files, as_json)
            print(f"\n{counted(len(plan.writes), 'write of a repair')}:")
            print("\n".join(writeplan.describe(plan)))
        if dry_run:
            if as_json:
                _print(check, repair, None, files, as_json)
            else:
                print("Nothing was written.")
            return EXIT_UNCORRECTED
        if ask:
            if not sys.stdin.isatty():
                raise Refused("--repair asks before it writes, and there is no terminal; give -p or -y")
            these = "this write" if len(plan.writes) == 1 else f"these {len(plan.writes)} writes"
            if not typer.confirm(f"Make {these}?"):
                return EXIT_UNCORRECTED
        undo = _apply(plan, check, opened, cache, output, backup)
    if as_json or not plan.steps:
        _print(check, repair, undo, files, as_json)
    elif undo is not None:
        print(f"Repaired. `bcachectl undo {undo}` takes it back.")
    else:
        print(f"Repaired onto {output}.")
    if repair.left:
        return EXIT_UNCORRECTED | (EXIT_CORRECTED if plan.steps else 0)
    return EXIT_CORRECTED if plan.steps else 0


def _plan(repair: Repair, cache: str) -> Plan:
    return Plan("fsck", tuple(tuple(Write(write.device or cache, write.offset_bytes, len(write.data), write.what,
                                          write.data) for write in step) for step in repair.steps))


def _apply(plan: Plan, check: Check, opened: dict[str, BlockDevice], cache: str, output: Path | None,
           backup: Path | None) -> Path | None:
    if output is None:
        undo = backup or writeplan.undo_path("fsck", opened, now_s=int(time.time()))
        writeplan.apply_with_undo(plan, opened, undo)
        return undo
    fsck_copy.copy_device(opened[cache], check, output)
    try:
        with open_device(str(output), write=True) as device:
            writeplan.apply(plan, {str(output): device})
    except BaseException:
        # Half a repair is none; the device has all of it still.
        output.unlink(missing_ok=True)
        raise
    return None
