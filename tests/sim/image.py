# SPDX-License-Identifier: GPL-2.0-only
"""What the bytes of a cache device must satisfy after power loss or a stop, judged without the engine.

Reads the device as section 14 of the format specification tells a reader to: newest journal entry, prio chain, uuid
array, tree, journal on top; key by key, slow and simple.  Raises `ImageError` for

* J1 J2: a gap between last_seq and seq, last_seq going back;
* I18 I19: a prio chain that is not np readable sets in distinct buckets;
* B1 B2 B3 B4: a node that cannot be read, is reached twice, has keys out of order or beyond its own key;
* I24, and no bucket used for two things: fresh extents that overlap on the cache, or lie in a bucket of metadata;
* pointers out of range, keys staler than 96 generations, inodes without a slot in the array, two live slots alike.
"""

from __future__ import annotations

from bisect import bisect_right
from itertools import pairwise
from typing import NamedTuple

from bcachectl.errors import Corrupt
from bcachectl.fsck.live import leaf_extents
from bcachectl.fsck.records import Damage
from bcachectl.fsck.walk import Walk
from bcachectl.ondisk.bkey import INODE_SHIFT, PTR_CHECK_DEV, Bkey, Ptr, decode_keys, ptr_make, ptr_sector
from bcachectl.ondisk.bset import BSET_HEADER_BYTES, decode_bset_header, decode_node
from bcachectl.ondisk.geometry import Geometry
from bcachectl.ondisk.jset import Jset, walk_journal_bucket
from bcachectl.ondisk.magic import bset_magic, jset_magic, prio_magic
from bcachectl.ondisk.prio import decode_prio_set
from bcachectl.ondisk.superblock import SB_BYTES, SB_SECTOR, Superblock, decode_superblock
from bcachectl.ondisk.uuids import UuidEntry, decode_uuids

SECTOR = 512
Position = tuple[int, int]


class ImageError(AssertionError):
    """A rule that the bytes break."""


class Piece(NamedTuple):
    """Part of an extent as it is left after newer keys were put over it."""

    start: int
    end: int
    key: Bkey
    journaled: bool

    def sector(self) -> int:
        """Where it begins on the cache device."""
        return self.key.ptrs[0].sector + self.start - self.key.start


class Extents:
    """The map of one inode: pieces in order, none overlapping; a newer key goes over older ones."""

    def __init__(self) -> None:
        self.pieces: list[Piece] = []
        self.ends: list[int] = []

    def put(self, key: Bkey, *, journaled: bool = False) -> None:
        """Overlay one key."""
        if key.start == key.end:
            return
        low = bisect_right(self.ends, key.start)
        high = low
        kept: list[Piece] = []
        while high < len(self.pieces) and self.pieces[high].start < key.end:
            old = self.pieces[high]
            if old.start < key.start:
                kept.append(old._replace(end=key.start))
            if old.end > key.end:
                kept.append(old._replace(start=key.end))
            high += 1
        kept.append(Piece(key.start, key.end, key, journaled))
        kept.sort(key=lambda piece: piece.start)
        self.pieces[low:high] = kept
        self.ends[low:high] = [piece.end for piece in kept]

    def find(self, start: int, end: int) -> list[Piece]:
        """The pieces that overlap [start, end)."""
        found = []
        for piece in self.pieces[bisect_right(self.ends, start):]:
            if piece.start >= end:
                break
            found.append(piece)
        return found


def gen_after(newer: int, older: int) -> int:
    """How many generations ``newer`` is ahead, 0 if it is not."""
    distance = (newer - older) & 0xFF
    return 0 if distance > 128 else distance


class Image:
    """A cache device, read."""

    def __init__(self, data: bytes | bytearray, what: str) -> None:
        self.data = memoryview(data)
        self.what = what
        self.sb: Superblock = decode_superblock(bytes(self.data[SB_SECTOR * SECTOR:SB_SECTOR * SECTOR + SB_BYTES]))
        self.geometry: Geometry = self.sb.geometry
        self.maps: dict[int, Extents] = {}
        self.gens: list[int] = []
        self.disk_gens: list[int] = []
        self.prios: list[int] = []
        self.meta: dict[int, str] = {}
        self.nodes: list[tuple[int, int]] = []
        self.entries: list[Jset] = []
        self.uuids: list[UuidEntry] = []
        self.prio_chain: list[int] = []
        self.seen_keys: list[Bkey] = []
        self.all_journal: list[tuple[int, int, Jset]] = []

    @property
    def newest(self) -> Jset:
        """The newest journal entry."""
        return self.entries[-1]

    def rule(self, holds: bool, text: str) -> None:
        """Raise unless a rule holds."""
        if not holds:
            raise ImageError(f"{self.what}: {text}")

    def read(self) -> Image:
        """Read everything and judge it."""
        geometry = self.geometry
        for number in self.sb.d:
            self._claim(number, "journal")
        self._read_journal()
        self._read_prios()
        root = self.newest.btree_root
        self._raise_gens([root])
        self._read_uuids()
        leaves: list[tuple[Position, Position, list[list[Bkey]]]] = []
        self._walk(root, self.newest.btree_level, (0, -1), leaves)
        for _low, _high, sets in leaves:
            for keys in sets:
                for key in keys:
                    self._put(key, journaled=False)
        for entry in self.entries:
            keys = decode_keys(entry.keys)
            self._raise_gens(keys)
            for key in keys:
                self._put(key, journaled=True)
        self._judge_extents()
        self.rule(len(self.gens) == geometry.nbuckets, "gens")
        return self

    def _put(self, key: Bkey, *, journaled: bool) -> None:
        self.seen_keys.append(key)
        self.rule(key.start >= 0, f"key ends before it starts: {key}")
        self.rule(key.inode < self.geometry.nr_uuids, f"key of inode {key.inode}")
        self.maps.setdefault(key.inode, Extents()).put(key, journaled=journaled)

    def _claim(self, bucket: int, use: str) -> None:
        geometry = self.geometry
        self.rule(geometry.first_bucket <= bucket < geometry.nbuckets, f"{use} in bucket {bucket}, out of range")
        self.rule(bucket not in self.meta, f"bucket {bucket} is used for {use} and for {self.meta.get(bucket)}")
        self.meta[bucket] = use

    def _bucket(self, number: int, size_bytes: int | None = None) -> memoryview:
        start = number * self.geometry.bucket_bytes
        return self.data[start:start + (size_bytes or self.geometry.bucket_bytes)]

    def _read_journal(self) -> None:
        magic, block_bytes = jset_magic(self.sb.set_uuid), self.geometry.block_bytes
        found: dict[int, Jset] = {}
        for index, number in enumerate(self.sb.d):
            for offset, entry in walk_journal_bucket(self._bucket(number), magic=magic, block_bytes=block_bytes):
                self.all_journal.append((index, offset, entry))
                self.rule(entry.seq not in found, f"journal entry {entry.seq} twice")
                found[entry.seq] = entry
        self.rule(bool(found), "no journal entries found")
        newest = found[max(found)]
        self.rule(1 <= newest.last_seq <= newest.seq, f"last_seq {newest.last_seq} of entry {newest.seq}")
        for seq in range(newest.last_seq, newest.seq + 1):
            self.rule(seq in found, f"journal entry {seq} missing, replaying {newest.last_seq}-{newest.seq}")
            self.entries.append(found[seq])
        last_seqs = [entry.last_seq for entry in self.entries]
        self.rule(last_seqs == sorted(last_seqs), f"last_seq goes back: {last_seqs}")

    def _read_prios(self) -> None:
        geometry = self.geometry
        number = self.newest.prio_bucket[self.sb.nr_this_dev]
        for _ in range(geometry.prio_buckets):
            self._claim(number, "prios")
            self.prio_chain.append(number)
            found = decode_prio_set(self._bucket(number, geometry.meta_bytes), prio_magic(self.sb.set_uuid), number)
            self.gens += found.gen.tolist()
            self.prios += found.prio.tolist()
            number = found.next_bucket
        del self.gens[geometry.nbuckets:]
        del self.prios[geometry.nbuckets:]
        self.disk_gens = list(self.gens)

    def _read_uuids(self) -> None:
        key = self.newest.uuid_bucket
        bucket = key.ptrs[0].sector // self.geometry.bucket_size_sectors
        self._raise_gens([key])
        self._claim(bucket, "uuids")
        self.uuids = decode_uuids(self._bucket(bucket, key.size * SECTOR))
        live = [entry.uuid for entry in self.uuids if not entry.is_free and not entry.is_retired]
        self.rule(len(live) == len(set(live)), "two slots with the same uuid")

    def _raise_gens(self, keys: list[Bkey]) -> None:
        for key in keys:
            for ptr in key.ptrs:
                if ptr.dev == PTR_CHECK_DEV:
                    continue
                bucket = self._range(key, ptr)
                if gen_after(ptr.gen, self.gens[bucket]):
                    self.gens[bucket] = ptr.gen

    def _range(self, key: Bkey, ptr: Ptr) -> int:
        size = self.geometry.bucket_size_sectors
        bucket = ptr.sector // size
        inside = self.geometry.first_bucket <= bucket < self.geometry.nbuckets and ptr.sector % size + key.size <= size
        self.rule(ptr.dev == 0 and inside, f"pointer out of range: {key}")
        return bucket

    def is_fresh(self, key: Bkey) -> bool:
        """Points to something, and that has not been reused."""
        if not key.ptrs or key.ptrs[0].dev == PTR_CHECK_DEV:
            return False
        ptr = key.ptrs[0]
        return gen_after(self.gens[ptr.sector // self.geometry.bucket_size_sectors], ptr.gen) == 0

    def _walk(self, key: Bkey, level: int, low: Position,
              leaves: list[tuple[Position, Position, list[list[Bkey]]]]) -> None:
        ptr = key.ptrs[0]
        bucket = ptr.sector // self.geometry.bucket_size_sectors
        self._claim(bucket, f"node of level {level}")
        self.nodes.append((bucket, level))
        where = f"bucket {bucket}"
        raw = self.data[ptr.sector * SECTOR:(ptr.sector + key.size) * SECTOR]
        images, _written = decode_node(raw, magic=bset_magic(self.sb.set_uuid), where=where,
                                       seed=ptr_make(ptr.sector, ptr.gen, ptr.dev),
                                       block_bytes=self.geometry.block_bytes,
                                       node_blocks=key.size // self.geometry.block_size_sectors)
        self.rule(bool(images), f"{where}: bad btree header")
        sets = []
        for found in images:
            start = found.block * self.geometry.block_bytes
            header = decode_bset_header(raw, start)
            sets.append(decode_keys(raw[start + BSET_HEADER_BYTES:start + header.set_bytes]))
        for keys in sets:
            self._raise_gens(keys)
            order = [(each.inode, each.end) for each in keys]
            self.rule(order == sorted(order), f"{where}: keys out of order")
        own = (key.inode, key.end)
        if level == 0:
            for each in (each for keys in sets for each in keys if each.size):
                self.rule((each.inode, each.end) <= own, f"{where}: short btree key: {each} beyond {own}")
                self.rule((each.inode, each.start) >= low, f"{where}: {each} begins before {low}")
            leaves.append((low, own, sets))
            return
        children: dict[Position, Bkey] = {}
        for keys in sets:
            for each in keys:
                if (each.inode, each.end) != (0, 0) and self.is_fresh(each):
                    children[each.inode, each.end] = each
        self.rule(bool(children), f"{where}: an interior node without children")
        self.rule(max(children) == own, f"{where}: last child ends at {max(children)}, the node at {own}")
        for position in sorted(children):
            self._walk(children[position], level - 1, low, leaves)
            low = position

    def _judge_extents(self) -> None:
        for key in self.seen_keys:
            for ptr in key.ptrs:
                if ptr.dev != PTR_CHECK_DEV:
                    bucket = self._range(key, ptr)
                    behind = gen_after(self.gens[bucket], ptr.gen)
                    self.rule(behind <= 96, f"key too stale: {key}, bucket gen {self.gens[bucket]}")
        taken: list[tuple[int, int, Piece]] = []
        for inode in sorted(self.maps):
            for piece in self.maps[inode].pieces:
                if self.is_fresh(piece.key):
                    sector = piece.sector()
                    bucket = sector // self.geometry.bucket_size_sectors
                    self.rule(bucket not in self.meta, f"bucket {bucket}, {self.meta.get(bucket)}, holds data: {piece}")
                    taken.append((sector, sector + piece.end - piece.start, piece))
        taken.sort(key=lambda row: row[:2])
        for left, right in pairwise(taken):
            self.rule(left[1] <= right[0], f"extents overlap on the cache: {left[2]} and {right[2]}")

    # -- questions of tests

    def live(self, inode: int) -> list[Piece]:
        """The fresh pieces of an inode, in order."""
        found = self.maps.get(inode)
        return [piece for piece in found.pieces if self.is_fresh(piece.key)] if found else []

    def dirty_sectors(self, inode: int) -> int:
        """Sectors that only the cache has."""
        return sum(piece.end - piece.start for piece in self.live(inode) if piece.key.dirty)


def check_walk(found: Image) -> None:
    """The offline commands' walk of the same bytes finds no damage and the same map."""
    walk = Walk(lambda sector, count: bytes(found.data[sector * SECTOR:(sector + count) * SECTOR]),
                len(found.data) // SECTOR)
    damages = [str(each) for each in walk.structures() if isinstance(each, Damage) and not each.is_harmless]
    found.rule(not damages, f"walk: {damages[:3]}")
    theirs: set[tuple[int, int, bool]] = set()
    for _slot, extents in leaf_extents(walk):
        for start, end, dirty, ptr in zip(extents.start.tolist(), extents.end.tolist(), extents.dirty.tolist(),
                                          extents.ptr.tolist(), strict=True):
            theirs.update((start + at, ptr_sector(ptr) + at, dirty) for at in range(end - start))
    ours = {((inode << INODE_SHIFT) + piece.start + at, piece.sector() + at, piece.key.dirty)
            for inode in found.maps for piece in found.live(inode) for at in range(piece.end - piece.start)}
    found.rule(ours == theirs, f"walk: another map: {sorted(ours ^ theirs)[:4]}")


def check(data: bytes | bytearray, what: str) -> Image | None:
    """Judge the bytes of a cache device; None if it was never run, so that nothing on it counts."""
    try:
        found = Image(data, what)
        return found.read() if found.sb.cache_sync else None
    except Corrupt as error:
        raise ImageError(f"{what}: {error}") from error



