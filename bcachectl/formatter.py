# SPDX-License-Identifier: GPL-2.0-only
"""What `bcachectl format` writes, and everything it refuses before.

`plan_format` looks at the devices and makes a `Plan`; nothing is written here.  It refuses, in this order: requests
that contradict themselves, what the kernel would not register or could not run, an existing bcache superblock
(``--force=bcache``), any other signature (``--force=signature``).  Devices in use are refused when they are opened.

Order of the plan, so that a crash between any two writes leaves no device half-valid:

1. the first 8 KiB of each device become zeros: no old superblock is left, and no magic of what was there before;
2. what a reused set uuid could bring back to life: a journal bucket with entries of that set is cleared whole, since
   the kernel starts again at sequence 1, and behind its own new entries it would find the old ones with higher numbers;
3. the superblocks, those of the backing devices first.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from bcachectl.blockdev import BlockDevice
from bcachectl.errors import Corrupt, Refused, UsageError
from bcachectl.ondisk.geometry import PAGE_SECTORS, Geometry
from bcachectl.ondisk.magic import BCACHE_MAGIC, jset_magic
from bcachectl.ondisk.superblock import (
    BDEV,
    BDEV_DATA_START_DEFAULT,
    BDEV_WITH_OFFSET,
    CDEV,
    CDEV_WITH_FEATURES,
    FEATURE_INCOMPAT_LARGE_BUCKET,
    NBUCKETS_MIN_RUN,
    SB_BYTES,
    SB_SECTOR,
    BdevState,
    CacheMode,
    Replacement,
    Superblock,
    check_superblock,
    decode_superblock,
    encode_superblock,
    parse_superblock,
)
from bcachectl.signatures import Signature, ask_blkid, find_signatures
from bcachectl.units import SECTOR_BYTES, format_label, format_size, format_uuid
from bcachectl.writeplan import Plan, Write

HAZARDS = ("bcache", "signature", "dirty")
"""What ``--force`` overrides."""

BUCKET_BYTES_DEFAULT = 512 << 10
FILE_BLOCK_BYTES = 4096
"""Block size for an image file, which has no sectors of its own: good on a disk of either kind (as make-bcache)."""
BUCKET_SIZE_FIELD_MAX = 1 << 15
"""Sectors of the largest bucket that the 16-bit field holds as it is; larger ones are written as a logarithm."""
BUCKET_SECTORS_MAX = 1 << 31
NODE_BLOCKS_MIN = 2
"""A node of one block makes Linux 6.12 corrupt memory when it splits an empty one."""
LABEL_BYTES_MAX = 31
HEAD_BYTES = (SB_SECTOR << 9) + SB_BYTES
_MAGIC_WIPE_BYTES = 512


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What the command line asks for."""

    caches: tuple[str, ...] = ()
    backings: tuple[str, ...] = ()
    bucket_bytes: int = BUCKET_BYTES_DEFAULT
    block_bytes: int | None = None
    data_offset_sectors: int = BDEV_DATA_START_DEFAULT
    set_uuid: bytes | None = None
    uuid: bytes | None = None
    label: str = ""
    cache_mode: CacheMode = CacheMode.WRITETHROUGH
    replacement: Replacement = Replacement.LRU
    discard: bool = False
    force: frozenset[str] = frozenset()


def check_request(request: Request) -> None:
    """Refuse what is wrong whatever the devices are."""
    if not request.caches and not request.backings:
        raise UsageError("no device named; use --cache DEVICE, --backing DEVICE or both")
    if len(request.caches) > 1:
        raise Refused(f"{' and '.join(request.caches)}: a set has one cache device since kernel 5.10, and was never "
                      "mirrored before; join them with md or LVM first, or make two sets")
    unknown = sorted(request.force - set(HAZARDS))
    if unknown:
        raise UsageError(f"--force={unknown[0]} overrides nothing here; it takes bcache, signature or dirty")
    if request.label and len(request.backings) != 1:
        raise UsageError("--label needs exactly one --backing device: a label names one volume")
    label = os.fsencode(request.label)
    if len(label) > LABEL_BYTES_MAX:
        raise UsageError(f"--label takes at most {LABEL_BYTES_MAX} bytes, this one has {len(label)}")
    if format_label(label) != label.decode("utf-8", "replace"):
        raise UsageError(f"--label {format_label(label)}: has a character that cannot be shown; a label is a line of "
                         "UTF-8 text")
    if request.uuid is not None and len(request.caches) + len(request.backings) != 1:
        raise UsageError("--uuid needs exactly one device: no two devices have the same uuid")
    for option, value in (("uuid", request.uuid), ("set-uuid", request.set_uuid)):
        if value == bytes(16):
            raise UsageError(f"--{option} is zero, which stands for no uuid")
    if request.data_offset_sectors < BDEV_DATA_START_DEFAULT:
        raise UsageError(f"--data-offset is {request.data_offset_sectors} sectors; the superblock ends at sector "
                         f"{BDEV_DATA_START_DEFAULT}, so that is the minimum")
    bucket_sectors = request.bucket_bytes // SECTOR_BYTES
    if not _is_power_of_2(request.bucket_bytes) or not PAGE_SECTORS <= bucket_sectors <= BUCKET_SECTORS_MAX:
        raise UsageError(f"--bucket-size is {format_size(request.bucket_bytes)}; it must be a power of two, "
                         "at least 4 KiB")
    block_bytes = request.block_bytes
    if block_bytes is not None:
        if not _is_power_of_2(block_bytes) or not SECTOR_BYTES <= block_bytes <= PAGE_SECTORS * SECTOR_BYTES:
            raise UsageError(f"--block-size is {format_size(block_bytes)}; it must be a power of two from 512 bytes to "
                             "4 KiB, the page size")


def plan_format(request: Request, devices: Mapping[str, BlockDevice],
                new_uuid: Callable[[], bytes]) -> tuple[Plan, dict[str, Superblock]]:
    """The plan and the superblock that each device is given."""
    check_request(request)
    block_sectors = _block_sectors(request, devices)
    set_uuid = request.set_uuid or new_uuid()
    superblocks: dict[str, Superblock] = {}
    for path in request.backings:
        superblocks[path] = _backing(request, devices[path], set_uuid, request.uuid or new_uuid(), block_sectors)
    for path in request.caches:
        superblocks[path] = _cache(request, devices[path], set_uuid, request.uuid or new_uuid(), block_sectors)
    found = {path: _foreign(devices[path], request.force) for path in superblocks}
    clear = [write for path in superblocks for write in _clear_head(devices[path], found[path])]
    if request.discard:
        clear += [Write(path, 0, devices[path].size_bytes, "whole device, if it can", discard=True)
                  for path in request.caches if devices[path].is_block]
    old_journal = [write for path in request.caches if request.set_uuid is not None
                   for write in _clear_journal(devices[path], superblocks[path])]
    last = [(Write(path, SB_SECTOR << 9, SB_BYTES, "superblock", encode_superblock(sb)),)
            for path, sb in superblocks.items()]
    return Plan("format", tuple(step for step in (tuple(clear), tuple(old_journal), *last) if step)), superblocks


def overwritten(plan: Plan, devices: Mapping[str, BlockDevice]) -> bool:
    """Whether the plan overwrites anything but zeros, so that an undo file is worth having."""
    return any(any(devices[write.device].read(write.offset_bytes, write.length_bytes))
               for write in plan.writes if not write.discard)


def report(path: str, sb: Superblock) -> list[str]:
    """What make-bcache prints after it wrote a superblock, with the device's name before."""
    pairs: list[tuple[str, object]] = [("Device", path), ("UUID", format_uuid(sb.uuid)),
                                       ("Set UUID", format_uuid(sb.set_uuid)), ("version", sb.version)]
    if sb.is_cache:
        pairs += [("nbuckets", sb.nbuckets), ("block_size", sb.block_size), ("bucket_size", sb.bucket_size),
                  ("nr_in_set", sb.nr_in_set), ("nr_this_dev", sb.nr_this_dev), ("first_bucket", sb.first_bucket)]
    else:
        pairs += [("block_size", sb.block_size), ("data_offset", sb.data_offset)]
    return [f"{name + ':':<24}{value}" for name, value in pairs]


def _block_sectors(request: Request, devices: Mapping[str, BlockDevice]) -> int:
    # One block size for all devices of a set, no smaller than any device's own.
    largest = max(devices[path].logical_block_bytes for path in (*request.caches, *request.backings))
    if largest > PAGE_SECTORS * SECTOR_BYTES:
        raise Refused(f"a device has logical blocks of {format_size(largest)}; bcache cannot use blocks larger than a "
                      "page of 4 KiB")
    wanted = request.block_bytes
    if wanted is None:
        has_file = any(not devices[path].is_block for path in (*request.caches, *request.backings))
        wanted = max(largest, FILE_BLOCK_BYTES if has_file else 0)
    for path in (*request.caches, *request.backings):
        if wanted < devices[path].logical_block_bytes:
            raise Refused(f"{path}: has logical blocks of {devices[path].logical_block_bytes} bytes, so --block-size "
                          f"{wanted} is too small: the kernel would not register it")
    return wanted // SECTOR_BYTES


def _backing(request: Request, device: BlockDevice, set_uuid: bytes, uuid: bytes, block_sectors: int) -> Superblock:
    offset = request.data_offset_sectors
    if offset % block_sectors:
        raise Refused(f"{device.path}: a data offset of {offset} sectors is no multiple of the block size of "
                      f"{block_sectors} sectors; every request would be out of line")
    if device.size_bytes >> 9 < offset + block_sectors:
        raise Refused(f"{device.path}: has {format_size(device.size_bytes)}, which leaves no room behind a data offset "
                      f"of {offset} sectors")
    sb = Superblock(version=BDEV if offset == BDEV_DATA_START_DEFAULT else BDEV_WITH_OFFSET, uuid=uuid,
                    set_uuid=set_uuid, label=os.fsencode(request.label).ljust(32, b"\0"), data_offset=offset,
                    block_size=block_sectors)
    return _judged(sb.with_cache_mode(request.cache_mode).with_state(BdevState.NONE), device)


def _way_out(device: BlockDevice, block_sectors: int) -> str:
    # The largest buckets that give enough of them; a btree node must have more than one block.
    largest = 1 << ((device.size_bytes >> 9) // NBUCKETS_MIN_RUN).bit_length() >> 1
    least = block_sectors * NODE_BLOCKS_MIN
    if largest < least:
        return f"use a device of at least {least * NBUCKETS_MIN_RUN // 2} KiB"
    return f"use --bucket-size {largest // 2}k or less, or a larger device"


def _cache(request: Request, device: BlockDevice, set_uuid: bytes, uuid: bytes, block_sectors: int) -> Superblock:
    bucket_sectors = request.bucket_bytes // SECTOR_BYTES
    nbuckets = (device.size_bytes >> 9) // bucket_sectors
    if nbuckets < NBUCKETS_MIN_RUN:
        raise Refused(f"{device.path}: has {nbuckets} buckets of {format_size(request.bucket_bytes)}, and the kernel "
                      f"runs no cache of fewer than {NBUCKETS_MIN_RUN}; {_way_out(device, block_sectors)}")
    first_bucket = 23 // bucket_sectors + 1
    geometry = Geometry(block_sectors, bucket_sectors, nbuckets, first_bucket)
    if geometry.node_blocks < NODE_BLOCKS_MIN:
        raise Refused(f"{device.path}: buckets of {format_size(request.bucket_bytes)} with blocks of "
                      f"{format_size(block_sectors * SECTOR_BYTES)} give btree nodes of one block, with which Linux "
                      "6.12 corrupts its memory; use larger buckets or smaller blocks")
    is_large = bucket_sectors > BUCKET_SIZE_FIELD_MAX
    sb = Superblock(version=CDEV_WITH_FEATURES if is_large else CDEV, uuid=uuid, set_uuid=set_uuid, nbuckets=nbuckets,
                    block_size=block_sectors,
                    bucket_size_raw=bucket_sectors.bit_length() - 1 if is_large else bucket_sectors,
                    feature_incompat=FEATURE_INCOMPAT_LARGE_BUCKET if is_large else 0, nr_in_set=1,
                    first_bucket=first_bucket)
    return _judged(sb.with_replacement(request.replacement).with_discard(request.discard), device)


def _judged(sb: Superblock, device: BlockDevice) -> Superblock:
    # The kernel's own checks on the very bytes that are to be written.
    try:
        check_superblock(decode_superblock(encode_superblock(sb)), device_sectors=device.size_bytes >> 9,
                         logical_block_sectors=device.logical_block_bytes >> 9)
    except Corrupt as error:
        raise Refused(f"{device.path}: the kernel would not register it: {error.why}") from error
    return sb


def _foreign(device: BlockDevice, force: frozenset[str]) -> list[Signature]:
    if device.size_bytes >= HEAD_BYTES:
        sb = parse_superblock(device.read(SB_SECTOR << 9, SB_BYTES))
        if sb.magic == BCACHE_MAGIC and "bcache" not in force:
            kind = "backing device" if sb.is_backing else "cache device"
            state = ", with dirty data on its cache" if sb.is_backing and sb.state is BdevState.DIRTY else ""
            raise Refused(f"{device.path}: is a bcache {kind} already, of set {format_uuid(sb.set_uuid)}{state}",
                          hazard="bcache")
    found = find_signatures(device.read, device.size_bytes)
    if found and "signature" not in force:
        names = ", ".join(dict.fromkeys(signature.name for signature in found))
        raise Refused(f"{device.path}: has a signature of {names}, whose data would be lost", hazard="signature")
    if "signature" not in force:
        name = ask_blkid(device.path)
        if name is not None:
            raise Refused(f"{device.path}: blkid finds {name}, whose data would be lost", hazard="signature")
    return found


def _clear_head(device: BlockDevice, found: list[Signature]) -> Iterator[Write]:
    yield Write(device.path, 0, HEAD_BYTES, "start of the device and old superblock", bytes(HEAD_BYTES))
    sectors = dict.fromkeys(signature.offset_bytes // _MAGIC_WIPE_BYTES for signature in found)
    for sector in sectors:
        offset_bytes = sector * _MAGIC_WIPE_BYTES
        block = device.logical_block_bytes
        offset_bytes -= offset_bytes % block
        if offset_bytes >= HEAD_BYTES:
            names = ", ".join(s.name for s in found if s.offset_bytes // _MAGIC_WIPE_BYTES == sector)
            length_bytes = max(block, _MAGIC_WIPE_BYTES)
            yield Write(device.path, offset_bytes, length_bytes, f"magic of {names}", bytes(length_bytes))


def _clear_journal(device: BlockDevice, sb: Superblock) -> Iterator[Write]:
    geometry = sb.geometry
    magic = jset_magic(sb.set_uuid).to_bytes(8, "little")
    for bucket in range(sb.first_bucket, sb.first_bucket + geometry.njournal_default):
        offset_bytes = geometry.sector_of(bucket) << 9
        if _holds(device, offset_bytes, geometry.bucket_bytes, magic):
            yield Write(device.path, offset_bytes, geometry.bucket_bytes, f"old journal entries in bucket {bucket}")


def _holds(device: BlockDevice, offset_bytes: int, length_bytes: int, needle: bytes) -> bool:
    piece = 1 << 20
    return any(needle in device.read(at, min(piece, offset_bytes + length_bytes - at))
               for at in range(offset_bytes, offset_bytes + length_bytes, piece))


def _is_power_of_2(value: int) -> bool:
    return value > 0 and value & (value - 1) == 0
