# SPDX-License-Identifier: GPL-2.0-only
"""``bcachectl where``: which copy of a volume's sectors is the valid one, and where it lies."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from typing import Annotated, Any, NamedTuple

import typer

from bcachectl import control, offline
from bcachectl.blockdev import open_device
from bcachectl.commands.options import Json, VolumeArgument, print_json
from bcachectl.errors import UsageError, WrongState
from bcachectl.fsck.live import lookup
from bcachectl.fsck.walk import Walk
from bcachectl.offline import Slot
from bcachectl.ondisk.bkey import INODE_SHIFT, SECTOR_MASK, ptr_gen, ptr_sector
from bcachectl.ondisk.superblock import BDEV_DATA_START_DEFAULT
from bcachectl.units import format_uuid
from bcachectl.views import table

SectorArgument = Annotated[int, typer.Argument(metavar="SECTOR", min=0, show_default=False,
                                               help="First sector on the volume, of 512 bytes.")]
CountArgument = Annotated[int, typer.Argument(metavar="COUNT", min=1, help="Number of sectors.")]
CacheOption = Annotated[str | None, typer.Option(
    "--cache", metavar="DEVICE", show_default=False,
    help="The cache device of the volume's set, which does not run. Without it the one that runs is asked.")]

OffsetOption = Annotated[int | None, typer.Option(
    "--data-offset", metavar="SECTORS", min=BDEV_DATA_START_DEFAULT, show_default=False,
    help="With --cache, for a VOLUME that is not named by its backing DEVICE: where its data starts. Default: 16.")]

ANSWER_TIMEOUT_S = 30.0


class Volume(NamedTuple):
    """A volume as the keys know it; ``size_sectors`` is None where only its backing device would tell."""

    slot: Slot
    data_offset: int
    size_sectors: int | None


def where(volume: VolumeArgument, sector: SectorArgument, count: CountArgument = 1, cache: CacheOption = None,
          data_offset: OffsetOption = None, as_json: Json = False) -> int:
    """Tell for each of COUNT sectors of a VOLUME whether the cache or the backing device has the valid copy.

    An engine is asked; of a set that the kernel runs, or nobody, the cache device is read. Name that of a set that does
    not run with --cache.
    """
    status = 0
    if cache is None:
        found, status = _ask(volume, sector, count)
    else:
        found, status = _read_cache(cache, volume, sector, count, data_offset)
    if as_json:
        print_json("where", found)
    else:
        rows = ((piece["start"], piece["end"], piece["state"], piece["device"], piece["device_sector"],
                 piece.get("bucket"), piece.get("gen"), piece.get("prio"), piece.get("key"))
                for piece in found["pieces"])
        lines = table.table(("START", "END", "STATE", "ON", "AT_SECTOR", "BUCKET", "GEN", "PRIO", "KEY"), rows,
                            color=table.wants_color(sys.stdout, os.environ))
        print("\n".join(lines))
    return status


def _ask(volume: str, sector: int, count: int) -> tuple[dict[str, Any], int]:
    # The kernel does not tell, but its device does: the journal is read as well, so what was flushed is found.
    try:
        found = control.find_volume(volume)
    except WrongState as error:
        raise WrongState(f"{error}; name the cache device of a set that does not run with --cache") from error
    if found.live.source == control.KERNEL:
        here = next(one for one in found.live.volumes() if one.name == found.target)
        if here.backing_path is None or not found.live.uuid:
            raise WrongState(f"{volume}: the kernel does not tell where its sectors are; name the cache device with "
                             "--cache, and the volume by its uuid")
        print(f"bcachectl: {found.live.cache_path}: is read while the kernel runs its set; what was cached since the "
              "last journal entry is missing", file=sys.stderr)
        return _read_cache(found.live.cache_path, here.backing_path, sector, count, None)
    try:
        job = found.live.start("where", volume=found.target, sector=sector, count=count)
        if not job.wait(ANSWER_TIMEOUT_S):
            raise WrongState(f"the set {found.live.uuid} has not answered for {ANSWER_TIMEOUT_S:.0f} s")
        answer: dict[str, Any] = job.result
        return answer, 0
    finally:
        found.live.close()


def _read_cache(cache: str, volume: str, sector: int, count: int,
                data_offset: int | None) -> tuple[dict[str, Any], int]:
    with offline.walk_cache(cache) as walked:
        serious = [damage for damage in walked.damages if not damage.is_harmless]
        for damage in serious:
            print(f"bcachectl: {cache}: {damage}", file=sys.stderr)
        found = _find_volume(walked.walk, cache, volume, data_offset)
        if found.size_sectors is not None and sector + count > found.size_sectors:
            raise UsageError(f"{volume}: has {found.size_sectors} sectors; {sector}+{count} is behind its end")
        pieces = list(_pieces(walked.walk, found, start=sector, end=sector + count))
    return {"volume": found.slot.name, "uuid": format_uuid(found.slot.entry.uuid), "pieces": pieces}, int(bool(serious))


def _find_volume(walk: Walk, cache: str, volume: str, data_offset: int | None) -> Volume:
    assert walk.superblock is not None
    if not os.path.exists(volume):
        slot = offline.find_slot(walk, cache, volume)
        is_flash = slot.entry.is_flash_only
        if is_flash:
            return Volume(slot, 0, slot.entry.sectors)
        return Volume(slot, BDEV_DATA_START_DEFAULT if data_offset is None else data_offset, None)
    if data_offset is not None:
        raise UsageError(f"{volume}: tells its data offset itself; leave --data-offset out")
    with open_device(volume) as device:
        found = offline.read_superblock(device)
        offline.require_magic(device, found)
        sb = found.superblock
        if not sb.is_backing:
            raise UsageError(f"{volume}: is not a backing device; name a volume by uuid, label or bcacheN, "
                             "or its backing device")
        if sb.set_uuid != walk.superblock.set_uuid:
            raise WrongState(f"{volume}: belongs to set {format_uuid(sb.set_uuid)}, {cache} to set "
                             f"{format_uuid(walk.superblock.set_uuid)}")
        slot = offline.find_slot(walk, cache, format_uuid(sb.uuid))
        return Volume(slot, sb.data_offset, (device.size_bytes >> 9) - sb.data_offset)


def _pieces(walk: Walk, volume: Volume, *, start: int, end: int) -> Iterator[dict[str, Any]]:
    base = (volume.slot.inode << INODE_SHIFT) + volume.data_offset
    found = lookup(walk, start=base + start, end=base + end)
    at = start
    for row in range(len(found.start)):
        key_start, key_end, ptr = int(found.start[row]), int(found.end[row]), int(found.ptr[row])
        piece_start, piece_end = max(key_start - base, start), min(key_end - base, end)
        if piece_start > at:
            yield _elsewhere(volume, at, piece_start)
        at = piece_end
        bucket = walk.geometry.bucket_of(ptr_sector(ptr))
        yield {"start": piece_start, "end": piece_end, "state": "dirty" if found.dirty[row] else "clean",
               "device": "cache", "device_sector": ptr_sector(ptr) + base + piece_start - key_start, "bucket": bucket,
               "gen": ptr_gen(ptr), "prio": int(walk.prios[bucket]),
               "key": f"{volume.slot.inode}:{key_start & SECTOR_MASK} len {key_end - key_start}"}
    if at < end:
        yield _elsewhere(volume, at, end)


def _elsewhere(volume: Volume, start: int, end: int) -> dict[str, Any]:
    # What the cache does not have: the backing device does, and a flash-only volume reads zeros.
    if volume.slot.entry.is_flash_only:
        return {"start": start, "end": end, "state": "hole", "device": "zeros", "device_sector": None}
    return {"start": start, "end": end, "state": "uncached", "device": "backing",
            "device_sector": start + volume.data_offset}
