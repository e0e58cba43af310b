# SPDX-License-Identifier: GPL-2.0-only
"""`Image`: a set's devices to be damaged: edits on top of bytes that are never copied, checksums set right on demand.

`Image.walk` knows where everything stood before the damage; the edits go by that.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from bcachectl.errors import DeviceError
from bcachectl.fsck.check_backing import Backing
from bcachectl.fsck.records import Damage, JournalEntry, Node
from bcachectl.fsck.walk import Walk
from bcachectl.ondisk.bkey import ptr_make
from bcachectl.ondisk.bset import BSET_HEADER_BYTES
from bcachectl.ondisk.crc64 import crc64, crc64_seeded
from bcachectl.ondisk.jset import JSET_HEADER_BYTES
from bcachectl.ondisk.superblock import judge_csum

SB = 4096
KEPT_MAX = 2
"""Stories that a test module keeps."""
T = TypeVar("T")


def stored(story: Path) -> Image:
    """The devices of a directory, which nobody may change as long as the image is used; not read into memory."""
    return Image(_mapped(story / "cache.img"), [_mapped(path) for path in sorted(story.glob("back*.img"))])


def _mapped(path: Path) -> mmap.mmap:
    with path.open("rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def keep(kept: dict[str, T], name: str, make: Callable[[], T]) -> T:
    """What stands under ``name``, made if it is not there; of what is large, tests keep the last `KEPT_MAX` only."""
    if name not in kept:
        while len(kept) >= KEPT_MAX:
            del kept[next(iter(kept))]
        kept[name] = make()
    return kept[name]


class Device:
    """One device: bytes, edits by sector, sectors that cannot be read, a length that may be cut."""

    def __init__(self, name: str, base: bytes | mmap.mmap) -> None:
        self.name, self.base = name, base
        self.size_sectors = len(base) >> 9
        self.edits: dict[int, bytes] = {}
        self.unreadable: set[int] = set()

    def read(self, sector: int, count: int) -> bytes:
        if sector < 0 or sector + count > self.size_sectors:
            raise DeviceError(f"{self.name}: the device ends at sector {self.size_sectors}", errno=22)
        if self.unreadable and not self.unreadable.isdisjoint(range(sector, sector + count)):
            raise DeviceError(f"{self.name}: read failed", errno=5)
        data = self.base[sector << 9:(sector + count) << 9]
        if not self.edits:
            return data
        touched = ([each for each in self.edits if sector <= each < sector + count] if len(self.edits) < count
                   else [each for each in range(sector, sector + count) if each in self.edits])
        if not touched:
            return data
        buf = bytearray(data)
        for each in touched:
            buf[(each - sector) << 9:(each - sector + 1) << 9] = self.edits[each]
        return bytes(buf)

    def announce(self, sector: int, count: int) -> None:
        """What is not in memory cannot be fetched ahead of time."""

    def get(self, offset: int, length: int) -> bytes:
        first = offset >> 9
        buf = self.read(first, ((offset + length + 511) >> 9) - first)
        return buf[offset - (first << 9):][:length]

    def put(self, offset: int, data: bytes) -> None:
        first, last = offset >> 9, (offset + len(data) + 511) >> 9
        self.unreadable.difference_update(range(first, last))
        buf = bytearray(self.read(first, last - first))
        buf[offset - (first << 9):offset - (first << 9) + len(data)] = data
        for sector in range(first, last):
            self.edits[sector] = bytes(buf[(sector - first) << 9:(sector - first + 1) << 9])

    def flip(self, offset: int, mask: int = 0x5A) -> None:
        self.put(offset, bytes([self.get(offset, 1)[0] ^ mask]))

    def content(self) -> bytes:
        return self.read(0, self.size_sectors)

    def as_backing(self) -> Backing:
        return Backing(self.name, self.read, self.size_sectors)


class Image:
    """A cache device and its backing devices."""

    def __init__(self, cache: bytes | mmap.mmap, backings: Sequence[bytes | mmap.mmap]) -> None:
        self.cache = Device("cache", cache)
        self.backings = [Device(f"back{number}", image) for number, image in enumerate(backings)]
        self.nodes: list[Node] = []
        self.walk = Walk(self.cache.read, self.cache.size_sectors)
        for item in self.walk.structures():
            if not isinstance(item, Damage) and isinstance(item.value, Node):
                self.nodes.append(item.value)

    def fresh(self) -> Image:
        """The same without any edit; what was learned of it is shared."""
        other = Image.__new__(Image)
        other.cache = Device("cache", self.cache.base)
        other.backings = [Device(device.name, device.base) for device in self.backings]
        other.nodes, other.walk = self.nodes, self.walk
        return other

    def as_files(self, directory: Path) -> list[Path]:
        """The devices as files there, the cache first."""
        paths = []
        for device in [self.cache, *self.backings]:
            paths.append(directory / f"{device.name}.img")
            paths[-1].write_bytes(device.content())
        return paths

    # Superblocks.

    def sb(self, offset: int, form: str, *values: object, device: Device | None = None, fix: bool = True) -> None:
        """Pack ``values`` into a superblock at ``offset``."""
        target = device or self.cache
        target.put(SB + offset, struct.pack("<" + form, *values))
        if fix:
            self.fix_sb(target)

    def fix_sb(self, device: Device) -> None:
        device.put(SB, struct.pack("<Q", judge_csum(device.get(SB, 4096))[1]))

    # Journal.

    def bucket(self, number: int) -> int:
        """The byte at which a bucket starts."""
        return self.walk.geometry.sector_of(number) << 9

    def entry_at(self, entry: JournalEntry) -> int:
        """The byte at which a journal entry starts."""
        assert self.walk.superblock is not None
        return self.bucket(self.walk.superblock.d[entry.index]) + entry.offset_bytes

    def jset(self, entry: JournalEntry, offset: int, form: str, *values: object, fix: bool = True) -> None:
        """Pack ``values`` into a journal entry."""
        at = self.entry_at(entry)
        self.cache.put(at + offset, struct.pack("<" + form, *values))
        if fix:
            length = JSET_HEADER_BYTES + struct.unpack("<I", self.cache.get(at + 28, 4))[0] * 8
            self.cache.put(at, struct.pack("<Q", crc64(self.cache.get(at + 8, length - 8))))

    # Prio sets and uuids.

    def prio(self, number: int, offset: int, form: str, *values: object, fix: bool = True) -> None:
        """Pack ``values`` into a prio set."""
        at = self.bucket(self.walk.prio_buckets[number])
        self.cache.put(at + offset, struct.pack("<" + form, *values))
        if fix:
            body = self.cache.get(at + 8, self.walk.geometry.meta_bytes - 8)
            self.cache.put(at, struct.pack("<Q", crc64(body)))

    def bucket_gen(self, bucket: int, change: Callable[[int], int]) -> None:
        """Change the generation of a bucket in its prio set."""
        number, row = divmod(bucket, self.walk.geometry.prios_per_bucket)
        at = self.bucket(self.walk.prio_buckets[number]) + 40 + 3 * row + 2
        self.prio(number, 40 + 3 * row + 2, "B", change(self.cache.get(at, 1)[0]) & 0xFF)

    @property
    def uuid_at(self) -> int:
        """The byte at which the uuid array starts."""
        assert self.walk.newest is not None
        return self.walk.newest.uuid_bucket.ptrs[0].sector << 9

    def uuid(self, slot: int, offset: int, form: str, *values: object) -> None:
        """Pack ``values`` into a uuid entry."""
        self.cache.put(self.uuid_at + slot * 128 + offset, struct.pack("<" + form, *values))

    # Btree.

    def set_at(self, node: Node, number: int) -> int:
        """The byte at which a set of a node starts."""
        return self.bucket(node.bucket) + node.sets[number].block * self.walk.geometry.block_bytes

    def fix_set(self, node: Node, number: int) -> None:
        """Set the checksum of a set right."""
        at = self.set_at(node, number)
        length = BSET_HEADER_BYTES + struct.unpack("<I", self.cache.get(at + 28, 4))[0] * 8
        seed = ptr_make(self.walk.geometry.sector_of(node.bucket), node.gen)
        self.cache.put(at, struct.pack("<Q", crc64_seeded(self.cache.get(at + 8, length - 8), seed)))

    def bset(self, node: Node, number: int, offset: int, form: str, *values: object, fix: bool = True) -> None:
        """Pack ``values`` into the header or the keys of a set."""
        self.cache.put(self.set_at(node, number) + offset, struct.pack("<" + form, *values))
        if fix:
            self.fix_set(node, number)

    def key_at(self, node: Node, number: int, row: int) -> int:
        """Offset of a key within its set; every key before it has its own length."""
        keys = node.sets[number].keys
        return BSET_HEADER_BYTES + int(8 * (2 * row + keys.nptrs[:row].sum()))

    def key(self, node: Node, number: int, row: int, *, pos: tuple[int, int] | None = None, size: int | None = None,
            ptr: int | None = None, high: int | None = None) -> None:
        """Change parts of one key."""
        at = self.set_at(node, number) + self.key_at(node, number, row)
        old_high, old_low = struct.unpack("<QQ", self.cache.get(at, 16))
        new_high = old_high if high is None else high
        new_low = old_low
        if pos is not None:
            new_high, new_low = new_high & ~0xFFFFF | pos[0], pos[1]
        if size is not None:
            new_high = new_high & ~(0xFFFF << 20) | size << 20
        self.cache.put(at, struct.pack("<QQ", new_high, new_low))
        if ptr is not None:
            self.cache.put(at + 16, struct.pack("<Q", ptr))
        self.fix_set(node, number)
