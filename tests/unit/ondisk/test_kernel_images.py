# SPDX-License-Identifier: GPL-2.0-only
"""Every structure of every image, decoded from the bytes that the kernel's driver wrote, and written back alike.

The reader here is the plainest one that can be right: it applies docs/format.md step by step, keeps one element per
sector, and shares nothing with the offline walk or the engine but the codecs.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

from bcachectl.ondisk.bkey import (
    INODE_SHIFT,
    PTR_CHECK_DEV,
    SECTOR_MASK,
    Bkey,
    KeyColumns,
    decode_key_columns,
    decode_keys,
    encode_key_columns,
    ptr_dev,
    ptr_gen,
    ptr_make,
    ptr_sector,
    text,
)
from bcachectl.ondisk.bset import BsetImage, decode_bset_header, decode_node, encode_bset
from bcachectl.ondisk.jset import Jset, walk_journal_bucket
from bcachectl.ondisk.magic import bset_magic, jset_magic, prio_magic
from bcachectl.ondisk.prio import decode_prio_set, encode_prio_set
from bcachectl.ondisk.superblock import (
    SB_BYTES,
    BdevState,
    CacheMode,
    Replacement,
    Superblock,
    check_superblock,
    decode_superblock,
    encode_superblock,
)
from bcachectl.ondisk.uuids import UuidEntry, decode_uuids, encode_uuids
from bcachectl.ondisk.validity import btree_ptr_bad, extents_bad, extents_fatal, gen_after, ptr_problem

RUN = ("attached_clean", "deep_crash", "dirty_crash", "fifo_discard", "flash_volume", "gen_churn", "killed",
       "thrash_crash", "two_backing")
Sector = tuple[int, int, bool]      # sector of the cache, gen, dirty


class Node(NamedTuple):
    """One btree node as read."""

    bucket: int
    seed: int
    level: int
    sets: list[BsetImage]


class Set:
    """A cache image, read in the order of docs/format.md."""

    def __init__(self, image: Path) -> None:
        self.bytes = image.read_bytes()
        self.sb = decode_superblock(self.bytes[4096:4096 + SB_BYTES])
        self.geometry = self.sb.geometry
        self.entries = self._journal()
        self.newest = self.entries[max(self.entries)]
        self.gens = self._prios()
        self.uuids = self._uuids()
        self._mark([self.newest.btree_root, self.newest.uuid_bucket])
        self.nodes = list(self._walk(self.newest.btree_root, self.newest.btree_level))
        for seq in range(self.newest.last_seq, self.newest.seq + 1):
            self._mark(decode_keys(self.entries[seq].keys))

    def bucket(self, number: int) -> memoryview:
        start = number * self.geometry.bucket_bytes
        return memoryview(self.bytes)[start:start + self.geometry.bucket_bytes]

    def _journal(self) -> dict[int, Jset]:
        magic, block_bytes = jset_magic(self.sb.set_uuid), self.geometry.block_bytes
        return {jset.seq: jset for number in self.sb.d
                for _, jset in walk_journal_bucket(self.bucket(number), magic=magic, block_bytes=block_bytes)}

    def _prios(self) -> np.ndarray:
        number, magic, meta_bytes = self.newest.prio_bucket[0], prio_magic(self.sb.set_uuid), self.geometry.meta_bytes
        gens = []
        for _ in range(self.geometry.prio_buckets):
            raw = self.bucket(number)[:meta_bytes]
            prio_set = decode_prio_set(raw, magic, number)
            again = encode_prio_set(seq=prio_set.seq, next_bucket=prio_set.next_bucket, prio=prio_set.prio,
                                    gen=prio_set.gen, magic=magic, meta_bytes=meta_bytes, into=bytearray(raw))
            assert again == raw
            gens.append(prio_set.gen)
            number = prio_set.next_bucket
        return np.concatenate(gens)[:self.geometry.nbuckets]

    def _uuids(self) -> list[UuidEntry]:
        key = self.newest.uuid_bucket
        start = key.ptrs[0].sector * 512
        raw = self.bytes[start:start + key.size * 512]
        entries = decode_uuids(raw)
        assert len(entries) == self.geometry.nr_uuids
        assert encode_uuids(entries, len(raw)) == raw
        return entries

    def _mark(self, keys: list[Bkey]) -> None:
        """Raise the gens of the buckets that ``keys`` point to, as the kernel does before it judges any of them."""
        for key in keys:
            for ptr in key.ptrs:
                if ptr.dev == 0 and not ptr_problem(key, self.geometry):
                    bucket = self.geometry.bucket_of(ptr.sector)
                    if not gen_after(int(self.gens[bucket]), ptr.gen):
                        self.gens[bucket] = ptr.gen

    def _walk(self, key: Bkey, level: int) -> Iterator[Node]:
        ptr = key.ptrs[0]
        bucket, seed = self.geometry.bucket_of(ptr.sector), ptr_make(ptr.sector, ptr.gen, ptr.dev)
        raw = self.bucket(bucket)[:key.size * 512]
        sets, _ = decode_node(raw, magic=bset_magic(self.sb.set_uuid), seed=seed, block_bytes=self.geometry.block_bytes,
                              node_blocks=key.size // self.geometry.block_size_sectors, where=f"bucket {bucket}")
        yield Node(bucket, seed, level, sets)
        keys = [k for s in sets for k in decode_keys(self.raw_keys(raw, s))]
        self._mark(keys)
        if level:
            children = [k for k in keys if not btree_ptr_bad(k, self.geometry, self.gens)]
            for child in sorted(children, key=lambda k: (k.inode, k.end)):
                yield from self._walk(child, level - 1)

    def raw_keys(self, raw: memoryview, image: BsetImage) -> bytes:
        start = image.block * self.geometry.block_bytes
        return bytes(raw[start + 32:start + 32 + 8 * decode_bset_header(raw, start).keys])

    def live_sectors(self) -> dict[tuple[int, int], Sector]:
        """What every cached sector maps to, by inode and sector: the leaves' sets in order, then the journal."""
        owner: dict[tuple[int, int], tuple[int, int, int, bool] | None] = {}
        overlay = [s.keys for node in self.nodes if node.level == 0 for s in node.sets]
        for seq in range(self.newest.last_seq, self.newest.seq + 1):
            raw = self.entries[seq].keys
            overlay.append(decode_key_columns(raw, len(raw) // 8))
        for columns in overlay:
            assert not extents_fatal(columns, self.geometry).any()
            self._put(owner, columns)
        return {at: (sector + at[1] - start, gen, dirty) for at, found in owner.items() if found
                for sector, gen, start, dirty in [found]}

    def _put(self, owner: dict[tuple[int, int], tuple[int, int, int, bool] | None], columns: KeyColumns) -> None:
        bad = extents_bad(columns, self.geometry, self.gens).tolist()
        rows = zip(columns.pos.tolist(), columns.size.tolist(), columns.dirty.tolist(), columns.ptr.tolist(), bad,
                   strict=True)
        for pos, size, dirty, ptr, is_bad in rows:
            inode, end = pos >> INODE_SHIFT, pos & SECTOR_MASK
            found = None if is_bad else (ptr_sector(ptr), ptr_gen(ptr), end - size, dirty)
            for sector in range(end - size, end):
                owner[inode, sector] = found


@pytest.fixture(scope="module")
def _read() -> dict[str, Set]:
    return {}


@pytest.fixture
def read(golden: Callable[..., Path], _read: dict[str, Set]) -> Callable[[str], Set]:
    """``read("killed")``: the set of that story; each image is read once."""

    def give(name: str) -> Set:
        if name not in _read:
            _read[name] = Set(golden(name) / "cache.img")
        return _read[name]

    return give


def superblock_of(image: Path) -> tuple[Superblock, bytes]:
    with image.open("rb") as file:
        file.seek(4096)
        raw = file.read(SB_BYTES)
    return decode_superblock(raw), raw


@pytest.mark.parametrize("name", ["fresh", *RUN])
def test_T1_T25_superblocks(golden: Callable[..., Path], name: str) -> None:
    directory = golden(name)
    shown = (directory / "super.txt").read_text()
    for image in sorted(directory.glob("*.img")):
        sb, raw = superblock_of(image)
        check_superblock(sb, device_sectors=image.stat().st_size // 512)
        assert encode_superblock(sb, raw) == raw
        assert encode_superblock(sb) == raw, "these kernels leave nothing in the padding"
        assert f"{sb.csum:X} [match]" in shown


def test_what_the_superblocks_say(golden: Callable[..., Path]) -> None:
    fresh, _ = superblock_of(golden("fresh") / "cache.img")
    assert (fresh.version, fresh.cache_sync, fresh.keys) == (0, False, 0)
    run, _ = superblock_of(golden("fifo_discard") / "cache.img")
    assert (run.version, run.cache_sync, run.discard, run.replacement) == (3, True, True, Replacement.FIFO)
    assert run.keys == run.geometry.njournal_default
    dirty, _ = superblock_of(golden("dirty_crash") / "back0.img")
    assert (dirty.version, dirty.state, dirty.cache_mode) == (1, BdevState.DIRTY, CacheMode.WRITEBACK)
    clean, _ = superblock_of(golden("attached_clean") / "back0.img")
    assert (clean.state, clean.cache_mode) == (BdevState.CLEAN, CacheMode.WRITETHROUGH)


@pytest.mark.parametrize("name", RUN)
def test_T6_the_journal_has_no_gap(read: Callable[[str], Set], name: str) -> None:
    found = read(name)
    assert all(seq in found.entries for seq in range(found.newest.last_seq, found.newest.seq + 1))
    assert text(found.newest.btree_root).startswith("1048575:")
    assert all(jset.last_seq <= seq for seq, jset in found.entries.items())


@pytest.mark.parametrize("name", RUN)
def test_T5_no_bucket_is_visited_twice(read: Callable[[str], Set], name: str) -> None:
    buckets = [node.bucket for node in read(name).nodes]
    assert len(set(buckets)) == len(buckets)


@pytest.mark.parametrize("name", RUN)
def test_T1_sets_are_written_as_the_kernel_writes_them(read: Callable[[str], Set], name: str) -> None:
    found = read(name)
    magic, block_bytes = bset_magic(found.sb.set_uuid), found.geometry.block_bytes
    for node in found.nodes:
        raw = found.bucket(node.bucket)
        for image in node.sets:
            stream = found.raw_keys(raw, image)
            assert encode_key_columns(*image.keys[:5]) == stream
            again = encode_bset(stream, seq=image.seq, magic=magic, seed=node.seed, block_bytes=block_bytes)
            start = image.block * block_bytes
            assert raw[start:start + 32 + len(stream)] == again[:32 + len(stream)]


@pytest.mark.parametrize("name", RUN)
def test_columns_and_keys_agree(read: Callable[[str], Set], name: str) -> None:
    found = read(name)
    for node in found.nodes:
        for image in node.sets:
            stream = found.raw_keys(found.bucket(node.bucket), image)
            keys = decode_keys(stream)
            assert image.keys.size.tolist() == [k.size for k in keys]
            assert image.keys.dirty.tolist() == [k.dirty for k in keys]
            # Bit 63 is random in check keys, and no part of a decoded pointer.
            pointers = (image.keys.ptr & (1 << 63) - 1).tolist()
            assert pointers == [ptr_make(k.ptrs[0].sector, k.ptrs[0].gen, k.ptrs[0].dev) if k.ptrs else 0 for k in keys]


@pytest.mark.parametrize("name", RUN)
def test_every_leaf_is_sorted(read: Callable[[str], Set], name: str) -> None:
    for node in read(name).nodes:
        for image in node.sets:
            assert (np.diff(image.keys.pos.astype(object)) >= 0).all()


# Stories in which nothing moved between the kernel's dump and the reset; in the rest write-back or gc went on.
STILL = ("attached_clean", "deep_crash", "dirty_crash", "fifo_discard", "flash_volume", "gen_churn", "two_backing")
DUMP_LINE = re.compile(r"(\d+):(\d+) len (\d+) -> \[0:(\d+) gen (\d+)\]( dirty)?")


@pytest.mark.parametrize("name", STILL)
def test_T4_live_keys_equal_the_kernels_dump(read: Callable[[str], Set], golden: Callable[..., Path],
                                             name: str) -> None:
    """What we find is what the kernel held; only clean data filled by reads, never journalled, may be missing."""
    kernels: dict[tuple[int, int], Sector] = {}
    for line in (golden(name) / "facts" / "btree.txt").read_text().splitlines():
        match = DUMP_LINE.fullmatch(line)
        if match:
            inode, start, size, sector, gen = map(int, match.groups()[:5])
            for n in range(size):
                kernels[inode, start + n] = (sector + n, gen, match[6] is not None)
    ours = read(name).live_sectors()
    assert not {at: found for at, found in ours.items() if kernels.get(at) != found}
    missing = {at for at in kernels if at not in ours}
    assert not any(kernels[at][2] for at in missing)
    assert len(missing) < len(kernels) // 30


def test_T4_every_kind_of_key_occurs(read: Callable[[str], Set]) -> None:
    leaves = [image.keys for name in RUN for node in read(name).nodes if node.level == 0 for image in node.sets]
    interior = [image.keys for name in RUN for node in read(name).nodes if node.level > 0 for image in node.sets]
    assert any((columns.pos == 0).any() for columns in interior), "markers of freed nodes"
    assert any(ptr_dev(int(ptr)) == PTR_CHECK_DEV for columns in leaves for ptr in columns.ptr), "check keys"
    assert any((columns.size == 0).any() for columns in leaves), "overwritten remnants"
    assert any(columns.dirty.any() and not columns.dirty.all() for columns in leaves), "clean and dirty extents"
    assert any((columns.nptrs == 0).any() for columns in leaves), "holes"


def test_uuid_slots(read: Callable[[str], Set]) -> None:
    volume = [(e.is_flash_only, e.sectors) for e in read("flash_volume").uuids if not e.is_free]
    assert volume == [(False, 0), (True, 32768)]
    assert [e.label_text for e in read("two_backing").uuids if not e.is_free] == ["vol0", "vol1"]
