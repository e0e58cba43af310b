# SPDX-License-Identifier: GPL-2.0-only
"""``bcachectl writeback``: the devices of a copy, its progress on a terminal, and its map on disk."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from bcachectl.blockdev import BlockDevice, open_device
from bcachectl.claim import claim
from bcachectl.errors import BcachectlError, DeviceError, Refused
from bcachectl.fsck import rescue_map
from bcachectl.fsck.extents import Extents
from bcachectl.fsck.rescue_map import DONE, Owner, of_status
from bcachectl.fsck.walk import Read
from bcachectl.fsck.writeback import Copy, Source
from bcachectl.ondisk.bkey import PTR_OFFSET
from bcachectl.units import counted

SAVE_S = 5.0
"""How often the map is written: what a kill may cost is to be copied once more."""
SAMPLES, SAMPLE_SECTORS = 256, 8
"""How much of what a map calls done is compared before it is believed."""


class Cache(NamedTuple):
    """The cache device, held so that nobody runs it; ``read_sector`` asks the device for no more than it is asked,
    ``announce`` says what will be read soon.
    """

    path: str
    size_sectors: int
    read: Read
    read_sector: Read
    announce: Callable[[int, int], None]


class Sink:
    """A backing device as the copy sees it: sectors, and nothing but writes."""

    def __init__(self, device: BlockDevice) -> None:
        self.device = device

    def write(self, sector: int, data: memoryview) -> None:
        """Write whole sectors."""
        self.device.write(sector << 9, data)


@contextmanager
def open_cache(path: str) -> Iterator[Cache]:
    """Hold the cache device for reading."""
    with ExitStack() as stack:
        device = stack.enter_context(claim([path], write=False))[path]
        careful = device
        if device.is_block:
            # Through the page cache one bad sector takes those beside it along, which direct I/O reads.
            try:
                careful = stack.enter_context(open_device(path, direct=True))
            except DeviceError:
                pass
        yield cache_of(device, careful)


def cache_of(device: BlockDevice, careful: BlockDevice) -> Cache:
    """The cache device ``device``; ``careful`` is the same one, for single sectors."""
    return Cache(device.path, device.size_bytes >> 9,
                 lambda sector, count: device.read(sector << 9, count << 9),
                 lambda sector, count: careful.read(sector << 9, count << 9),
                 lambda sector, count: device.announce(sector << 9, count << 9))


def prepare(cache: Cache, device: BlockDevice, found: Source, owner: Owner, map_file: Path | None, retries: int, *,
            end_sector: int | None = None) -> Copy:
    """The copy, with what the map of an earlier run says.

    Refused if the device has not got what the map says: it is a copy of the one that was written, or was restored.
    """
    owner = owner._replace(keys=rescue_map.fingerprint(found.extents))
    earlier = None
    if map_file is not None and map_file.exists():
        earlier = rescue_map.parse(map_file.read_text(encoding="utf-8", errors="replace"), str(map_file), owner)
        _refuse_another(cache, device, found, of_status(earlier, DONE), map_file)
    return Copy(cache.read, cache.read_sector, cache.announce, Sink(device), found, owner, earlier=earlier,
                retries=retries, end_sector=device.size_bytes >> 9 if end_sector is None else end_sector)


def _refuse_another(cache: Cache, device: BlockDevice, found: Source, done: Extents, map_file: Path) -> None:
    # Where the keys are doubtful now and were not when the map was made, the device may have newer data than they name;
    # but of another device about all of it would differ.
    rows = rescue_map.within(found.extents, done)
    doubted = rescue_map.within(rows, found.unknown)
    differing, compared = _differing(cache, device, doubted)
    if _differing(cache, device, rescue_map.without(rows, found.unknown))[0] or differing * 2 > compared:
        raise Refused(f"{map_file}: says that data was written to {device.path} which is not there; the map is of "
                      "a copy of it, or the device was restored or used since; name a new file for the map")


def _differing(cache: Cache, device: BlockDevice, done: Extents) -> tuple[int, int]:
    # How many samples differ, of how many, spread evenly.  What the cache cannot read any more says nothing.
    step = -(-len(done.start) // SAMPLES) or 1
    differing = compared = 0
    for start, end, ptr in zip(*(column[::step].tolist() for column in (done.start, done.end, done.ptr)), strict=True):
        count = min(end - start, SAMPLE_SECTORS)
        try:
            data = cache.read(PTR_OFFSET.get(ptr), count)
        except DeviceError:
            continue
        compared += 1
        differing += device.read(start << 9, count << 9) != data
    return differing, compared


def run(copy: Copy, device: BlockDevice, map_file: Path | None, *, show: bool) -> None:
    """Copy, flush the device, and keep the map up to date on the way."""
    save(copy, device, map_file)
    try:
        _copy(copy, device, map_file, show=show and sys.stderr.isatty())
    except DeviceError as error:
        # What was written last may not be there: the map stays as it was when the device was flushed.
        if map_file is None:
            raise
        raise DeviceError(f"{error}; {map_file} says how far it is, and the same command goes on from there",
                          errno=error.errno) from error
    except BaseException:
        save(copy, device, map_file)
        if map_file is not None:
            print(f"bcachectl: {map_file} says how far it is; the same command goes on from there", file=sys.stderr)
        raise
    device.flush()
    save(copy, device, map_file)


@contextmanager
def new_file(path: Path, map_file: Path | None, *, is_new: bool) -> Iterator[None]:
    """What fails inside leaves no new file behind, unless a map says how much of it is there."""
    try:
        yield
    except BaseException:
        if is_new and path.exists() and (map_file is None or not map_file.exists()):
            path.unlink()
            print(f"bcachectl: {path}: is removed again, as no map says how much of it is there", file=sys.stderr)
        raise


def save(copy: Copy, device: BlockDevice, map_file: Path | None) -> None:
    """Write the map, after a flush of what it says is done."""
    if map_file is None:
        return
    device.flush()
    draft = map_file.with_name(map_file.name + ".new")
    try:
        with draft.open("w", encoding="utf-8") as file:
            file.writelines(f"{line}\n" for line in rescue_map.render(copy.rescue_map()))
            file.flush()
            os.fsync(file.fileno())
        draft.replace(map_file)
        directory = os.open(map_file.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)
    except OSError as error:
        draft.unlink(missing_ok=True)
        raise BcachectlError(f"{map_file}: the map cannot be written ({error.strerror}); name another place") from error


def _copy(copy: Copy, device: BlockDevice, map_file: Path | None, *, show: bool) -> None:
    saved_s = time.monotonic()
    with Progress(TextColumn("{task.description}"), BarColumn(), DownloadColumn(binary_units=True),
                  TransferSpeedColumn(), TimeRemainingColumn(), console=Console(stderr=True), transient=True,
                  disable=not show) as bars:
        bar = bars.add_task(device.path, total=None)
        for step in copy.run():
            lost = f", {counted(step.lost_sectors, 'sector')} lost" if step.lost_sectors else ""
            bars.update(bar, description=f"{device.path}{lost}", completed=step.done_sectors << 9,
                        total=step.total_sectors << 9)
            if map_file is not None and time.monotonic() - saved_s >= SAVE_S:
                save(copy, device, map_file)
                saved_s = time.monotonic()
