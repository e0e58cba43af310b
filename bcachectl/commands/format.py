# SPDX-License-Identifier: GPL-2.0-only
"""``bcachectl format``: superblocks that the kernel registers."""

from __future__ import annotations

import time
import uuid as uuids
from enum import StrEnum
from typing import Annotated, Any

import typer

from bcachectl import describe, formatter, offline, writeplan
from bcachectl.blockdev import BlockDevice
from bcachectl.claim import claim
from bcachectl.commands.options import Backup, DryRun, Force, Json, complete_device, print_json
from bcachectl.errors import Refused, UsageError
from bcachectl.ondisk.superblock import CacheMode, Replacement, encode_superblock
from bcachectl.units import SECTOR_BYTES, parse_size, parse_uuid


class Mode(StrEnum):
    """Cache modes by the kernel's words."""

    WRITETHROUGH = "writethrough"
    WRITEBACK = "writeback"
    WRITEAROUND = "writearound"
    NONE = "none"


class Policy(StrEnum):
    """Replacement policies by the kernel's words."""

    LRU = "lru"
    FIFO = "fifo"
    RANDOM = "random"


CacheOption = Annotated[list[str] | None, typer.Option(
    "--cache", "-C", metavar="DEVICE", autocompletion=complete_device, help="The cache device; a set has one.")]
BackingOption = Annotated[list[str] | None, typer.Option(
    "--backing", "--bdev", "-B", metavar="DEVICE...", autocompletion=complete_device, help="Backing devices.")]
BucketOption = Annotated[str, typer.Option("--bucket-size", "--bucket", "-b", metavar="SIZE",
                                           help="Bucket size, a power of two from 4k.")]
BlockOption = Annotated[str | None, typer.Option(
    "--block-size", "--block", "-w", metavar="SIZE", show_default=False,
    help="Block size, 512 to 4k. Default: the largest logical block of the devices; 4k if one is a file.")]
OffsetOption = Annotated[str, typer.Option("--data-offset", "-o", metavar="SECTORS|SIZE",
                                           help="Start of the data on backing devices, in sectors or as a size.")]
SetUuidOption = Annotated[str | None, typer.Option("--set-uuid", "--cset-uuid", metavar="UUID", show_default=False,
                                                   help="Uuid of the set. Default: random.")]
UuidOption = Annotated[str | None, typer.Option("--uuid", metavar="UUID", show_default=False,
                                                help="Uuid of the one device. Default: random.")]
LabelOption = Annotated[str, typer.Option("--label", "-l", metavar="TEXT", show_default=False,
                                          help="Label of the one backing device, up to 31 bytes.")]
ModeOption = Annotated[Mode | None, typer.Option("--cache-mode", show_default=False,
                                                 help="Cache mode of the backing devices. Default: writethrough.")]
WritebackOption = Annotated[bool, typer.Option("--writeback", help="Short for --cache-mode writeback.")]
PolicyOption = Annotated[Policy | None, typer.Option(
    "--replacement", "--cache-replacement-policy", "--cache_replacement_policy", show_default=False,
    help="Which buckets of the cache are used again first. Default: lru.")]
DiscardOption = Annotated[bool, typer.Option(
    "--discard", help="Discard the cache device now, and each bucket before it is used again.")]
WipeOption = Annotated[bool, typer.Option("--wipe-bcache", help="Short for --force=bcache.")]


def format_devices(
    cache: CacheOption = None, backing: BackingOption = None, bucket_size: BucketOption = "512k",
    block_size: BlockOption = None, data_offset: OffsetOption = "16", set_uuid: SetUuidOption = None,
    uuid: UuidOption = None, label: LabelOption = "", cache_mode: ModeOption = None,
    writeback: WritebackOption = False, replacement: PolicyOption = None, discard: DiscardOption = False,
    backup: Backup = None, force: Force = None, wipe_bcache: WipeOption = False, dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Write the superblocks of a cache device, of backing devices, or of both as one set.

    Devices formatted together belong to the same set and attach by themselves when they are registered. Refused: what
    the kernel would refuse, a device in use, and a device that holds anything else: --force=bcache overwrites a bcache
    superblock, with --force=dirty one that vouches for data which is nowhere else, and --force=signature anything
    else's. What is overwritten is kept in an undo file.
    """
    mode = _mode(cache_mode, writeback)
    if not backing and (mode is not None or label or data_offset != "16"):
        raise UsageError("--cache-mode, --writeback, --label and --data-offset belong to --backing devices")
    if not cache and (replacement is not None or discard):
        raise UsageError("--replacement and --discard belong to a --cache device")
    request = formatter.Request(
        caches=tuple(cache or ()), backings=tuple(backing or ()), bucket_bytes=parse_size(bucket_size),
        block_bytes=None if block_size is None else parse_size(block_size),
        data_offset_sectors=_sectors(data_offset),
        set_uuid=None if set_uuid is None else parse_uuid(set_uuid), uuid=None if uuid is None else parse_uuid(uuid),
        label=label, cache_mode=mode or CacheMode.WRITETHROUGH,
        replacement=Replacement[(replacement or Policy.LRU).name], discard=discard,
        force=frozenset(force or ()) | (frozenset(["bcache"]) if wipe_bcache else frozenset()))
    formatter.check_request(request)
    with claim([*request.caches, *request.backings], write=not dry_run) as devices:
        if "bcache" in request.force and "dirty" not in request.force:
            _refuse_dirty(devices)
        plan, superblocks = formatter.plan_format(request, devices, lambda: uuids.uuid4().bytes)
        undo = None
        if not dry_run:
            if formatter.overwritten(plan, devices):
                undo = backup or writeplan.undo_path("format", superblocks, now_s=int(time.time()))
                writeplan.apply_with_undo(plan, devices, undo)
            else:
                writeplan.apply(plan, devices)
    if as_json:
        made = [{"device": path, **describe.superblock(encode_superblock(sb), sb)} for path, sb in superblocks.items()]
        body: dict[str, Any] = {"devices": made, "undo_file": None if undo is None else str(undo)}
        print_json("format", body | (writeplan.describe_json(plan) if dry_run else {"dry_run": False}))
    elif dry_run:
        print("\n".join(writeplan.describe(plan)))
    else:
        for path, sb in superblocks.items():
            print("\n".join(formatter.report(path, sb)))
        if undo is not None:
            print(f"What was overwritten is kept; `bcachectl undo {undo}` takes the format back.")


def _refuse_dirty(devices: dict[str, BlockDevice]) -> None:
    for device in devices.values():
        reason = offline.only_copy(device)
        if reason:
            raise Refused(f"{device.path}: {reason}", hazard="dirty")


def _mode(cache_mode: Mode | None, writeback: bool) -> CacheMode | None:
    if writeback and cache_mode not in (None, Mode.WRITEBACK):
        raise UsageError(f"--writeback and --cache-mode {cache_mode} contradict each other")
    if writeback:
        return CacheMode.WRITEBACK
    return None if cache_mode is None else CacheMode[cache_mode.name]


def _sectors(text: str) -> int:
    # make-bcache takes sectors; a unit makes it bytes.
    if text.isdecimal():
        return int(text)
    size_bytes = parse_size(text)
    if size_bytes % SECTOR_BYTES:
        raise UsageError(f"--data-offset {text} is no whole number of sectors")
    return size_bytes // SECTOR_BYTES
