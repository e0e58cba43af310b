# SPDX-License-Identifier: GPL-2.0-only
"""The disasters of docs/recovery.md as devices in a directory: nvme0n1p3 is the cache, sdb its backing device.

Each function makes the devices and returns the sectors that cannot be read, by the name of the device.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from bcachectl.ondisk.bkey import INODE_SHIFT, ptr_sector
from bcachectl.ondisk.magic import INVALID_UUID
from bcachectl.ondisk.superblock import BdevState
from tests.fsck.full_journal import fill_journal
from tests.fsck.image import Image
from tests.fsck.test_damage import check, live

Golden = Callable[..., Path]
Bad = dict[str, set[int]]

CACHE, BACKING = "nvme0n1p3", "sdb"
DETACHED_S = 1_795_500_000


def load(golden: Golden, name: str = "dirty_crash") -> Image:
    story = golden(name)
    return Image((story / "cache.img").read_bytes(), [(story / "back0.img").read_bytes()])


def save(image: Image, directory: Path) -> None:
    (directory / CACHE).write_bytes(image.cache.content())
    (directory / BACKING).write_bytes(image.backings[0].content())


def dead_sectors(golden: Golden, directory: Path) -> Bad:
    """A sector of the priorities, and two places with dirty data."""
    image = load(golden)
    save(image, directory)
    extents = live(check(Image(image.cache.base, [])))
    extents = extents.take(extents.dirty)
    first, second = (ptr_sector(int(extents.ptr[row])) for row in (40, 300))
    prio = image.walk.geometry.sector_of(image.walk.prio_buckets[0])
    return {CACHE: {*range(prio, prio + 8), *range(first, first + 8), *range(second, second + 16)}}


def bad_priorities(golden: Golden, directory: Path) -> Bad:
    """The prio set reads as zeros, as after a discard of its bucket."""
    image = load(golden)
    image.cache.put(image.bucket(image.walk.prio_buckets[0]), bytes(image.walk.geometry.meta_bytes))
    save(image, directory)
    return {}


def full_journal(golden: Golden, directory: Path) -> Bad:
    """Every block of the journal is in use."""
    image = load(golden)
    fill_journal(image)
    save(image, directory)
    return {}


def unclean_detach(golden: Golden, directory: Path) -> Bad:
    """Slot 0 was retired with dirty data, and the device attached again, in slot 1."""
    image = load(golden)
    entry = image.cache.get(image.uuid_at, 128)
    image.uuid(1, 0, "128s", entry)
    image.uuid(1, 48, "II", DETACHED_S + 60, DETACHED_S + 60)
    image.uuid(0, 0, "16s", INVALID_UUID)
    image.uuid(0, 56, "I", DETACHED_S)
    flags = int.from_bytes(image.backings[0].get(4096 + 104, 8), "little") & ~(3 << 61) | BdevState.CLEAN << 61
    image.sb(104, "Q", flags, device=image.backings[0])
    save(image, directory)
    assert int(live(check(image)).start.max()) >> INODE_SHIFT == 0
    return {}


def wrong_device(golden: Golden, directory: Path) -> Bad:
    """sdc belongs to another set, and sdd is a copy of sdb."""
    image = load(golden)
    save(image, directory)
    (directory / "sdc").write_bytes((golden("two_backing") / "back1.img").read_bytes())
    (directory / "sdd").write_bytes(image.backings[0].content())
    return {}


def dead_cache(golden: Golden, directory: Path) -> Bad:
    """The backing device is dirty, and its cache is gone."""
    save(load(golden), directory)
    (directory / CACHE).unlink()
    return {}


DISASTERS: dict[str, Callable[[Golden, Path], Bad]] = {
    "dead sectors": dead_sectors, "bad priorities": bad_priorities, "full journal": full_journal,
    "unclean detach": unclean_detach, "wrong device": wrong_device, "dead cache": dead_cache}
