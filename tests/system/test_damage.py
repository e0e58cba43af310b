# SPDX-License-Identifier: GPL-2.0-only
"""Damaged images and devices in the wrong place: one clear sentence, the right exit status, and not a byte written.

Each kind of damage is done to a copy of an image that a kernel left after a crash, with checksums made right again
where the damage is to what they vouch for.  `bcachectl.errors` says which exit status belongs to what.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from bcachectl.fsck.records import Node, Record
from bcachectl.fsck.walk import Walk
from bcachectl.ondisk.bkey import pack_key, ptr_make
from bcachectl.ondisk.crc64 import crc64
from bcachectl.ondisk.jset import Jset, walk_journal_bucket
from bcachectl.ondisk.magic import jset_magic
from bcachectl.ondisk.superblock import SB_BYTES, Superblock, decode_superblock, encode_superblock
from tests.export.engine import Engine
from tests.require import need_root
from tests.system.sets import digest, mounted, options, run, sentence

FAILED, USAGE, REFUSED, STATE = 1, 2, 3, 4
SB_START = 4096


class Image:
    """A cache image that can be damaged where it hurts."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.sb = decode_superblock(self.read(SB_START, SB_BYTES))
        self.bucket_bytes = self.sb.bucket_size << 9
        magic = jset_magic(self.sb.set_uuid)
        self.entries: list[tuple[int, Jset]] = []
        for bucket in self.sb.d:
            raw = self.read(bucket * self.bucket_bytes, self.bucket_bytes)
            self.entries += [(bucket * self.bucket_bytes + offset, jset) for offset, jset in
                             walk_journal_bucket(raw, magic=magic, block_bytes=self.sb.block_size << 9)]
        self.entries.sort(key=lambda entry: entry[1].seq)
        self.newest_at, self.newest = self.entries[-1]

    def read(self, offset: int, length: int) -> bytes:
        with self.path.open("rb") as file:
            file.seek(offset)
            return file.read(length)

    def patch(self, offset: int, data: bytes) -> None:
        with self.path.open("r+b") as file:
            file.seek(offset)
            file.write(data)

    def flip(self, offset: int) -> None:
        """Turn the bits of one byte."""
        self.patch(offset, bytes([self.read(offset, 1)[0] ^ 0xFF]))

    def patch_newest(self, offset: int, data: bytes) -> None:
        """Change bytes of the newest journal entry and make its checksum right."""
        self.patch(self.newest_at + offset, data)
        raw = self.read(self.newest_at, 240 + len(self.newest.keys))
        self.patch(self.newest_at, crc64(raw[8:]).to_bytes(8, "little"))

    def patch_superblock(self, change: Callable[[Superblock], Superblock]) -> None:
        """Change fields of the superblock and make its checksum right."""
        raw = self.read(SB_START, SB_BYTES)
        self.patch(SB_START, encode_superblock(change(decode_superblock(raw)), raw))

    def start_of(self, sector: int) -> int:
        return sector << 9


def bad_superblock(image: Image) -> None:
    image.flip(SB_START + 80)


def unknown_version(image: Image) -> None:
    image.patch_superblock(lambda sb: replace(sb, version=7))


def unknown_feature(image: Image) -> None:
    image.patch_superblock(lambda sb: replace(sb, version=5, feature_incompat=0x10))


def two_caches(image: Image) -> None:
    image.patch_superblock(lambda sb: replace(sb, nr_in_set=2))


def truncated(image: Image) -> None:
    os.truncate(image.path, image.path.stat().st_size // 2)


def no_journal(image: Image) -> None:
    for offset, _ in image.entries:
        image.flip(offset + 60)


def gap_in_the_journal(image: Image) -> None:
    """An entry that the newest one needs; the walk of its bucket ends there, and later buckets go on."""
    needed = [at for at, jset in image.entries if jset.seq >= image.newest.last_seq]
    first_of_bucket = [at for at in needed if at // image.bucket_bytes != image.newest_at // image.bucket_bytes]
    image.flip((first_of_bucket or needed)[0] + 60)


def newer_entries_out_of_reach(image: Image) -> None:
    """An entry before the newest is damaged: what is left is an older state, and nothing is missing in it."""
    at = image.entries[-2][0]
    if at // image.bucket_bytes != image.newest_at // image.bucket_bytes:
        # The newest stands alone, and gets another one behind it.
        at = image.newest_at
        raw = bytearray(image.read(at, 240 + len(image.newest.keys)))
        raw[16:24] = (image.newest.seq + 1).to_bytes(8, "little")
        raw[:8] = crc64(raw[8:]).to_bytes(8, "little")
        image.patch(at + image.newest.blocks * (image.sb.block_size << 9), bytes(raw))
    image.flip(at + 60)


def bad_prios(image: Image) -> None:
    image.flip(image.newest.prio_bucket[0] * image.bucket_bytes + 100)


def prios_out_of_range(image: Image) -> None:
    image.patch_newest(176, (image.sb.nbuckets + 5).to_bytes(8, "little"))


def bad_btree_root(image: Image) -> None:
    image.flip(image.newest.btree_root.ptrs[0].sector * 512 + 16)


def btree_root_out_of_range(image: Image) -> None:
    key = pack_key(image.newest.btree_root.end, 0, False, ptr_make(image.sb.nbuckets * image.sb.bucket_size * 2, 0))
    image.patch_newest(104, key)


def uuids_out_of_range(image: Image) -> None:
    uuids = image.newest.uuid_bucket
    size = uuids.size
    image.patch_newest(40, pack_key(size, size, False, ptr_make(image.sb.nbuckets * image.sb.bucket_size * 2, 0)))


def uuids_of_nowhere(image: Image) -> None:
    """No pointer at all."""
    image.patch_newest(40, bytes(24))


def bad_leaf(image: Image) -> None:
    """A node below the root, or the root where it is a leaf."""
    walk = Walk(lambda sector, count: image.read(sector << 9, count << 9), image.path.stat().st_size >> 9)
    nodes = [record for record in walk.structures() if isinstance(record, Record) and isinstance(record.value, Node)]
    image.flip(nodes[-1].sector * 512 + 16)


DAMAGES = [
    (bad_superblock, "Bad checksum"),
    (unknown_version, "version"),
    (unknown_feature, "incompatible feature"),
    (two_caches, "one of 2 caches"),
    (truncated, "too small"),
    (no_journal, "no journal entries"),
    (gap_in_the_journal, "missing"),
    (newer_entries_out_of_reach, "cannot be reached"),
    (bad_prios, "prio"),
    (prios_out_of_range, "prio"),
    (bad_btree_root, "btree"),
    (btree_root_out_of_range, "btree"),
    (uuids_out_of_range, "uuid"),
    (uuids_of_nowhere, "uuid"),
    (bad_leaf, "btree"),
]


def refuse(tmp_path: Path, words: list[str], status: int, *expected: str) -> str:
    """Run an engine that must not start; its sentence holds the expected words."""
    with Engine(tmp_path, *words, expect_failure=True) as engine:
        text = sentence(engine.errors)
        print(text)
        assert engine.status == status, text
    for word in expected:
        assert word in text, text
    return text


@pytest.mark.parametrize(("story", "more"), [("dirty_crash", ()), ("deep_crash", ("--read-only",))],
                         ids=["dirty_crash", "deep_crash-read-only"])
@pytest.mark.parametrize(("damage", "why"), DAMAGES, ids=lambda value: getattr(value, "__name__", None))
def test_a_damaged_cache_is_refused(damage: Callable[[Image], None], why: str, story: str, more: tuple[str, ...],
                                    golden: Callable[..., Path], tmp_path: Path) -> None:
    directory = golden(story, writable=True)
    damage(Image(directory / "cache.img"))
    before = [digest(image) for image in sorted(directory.glob("*.img"))]
    refuse(tmp_path, [*options(directory / "cache.img", directory / "back0.img"), *more, "--export", "nbd"],
           STATE if damage is two_caches else FAILED, str(directory / "cache.img"), why,
           *(["`bcachectl fsck` tells more"] if damage not in (two_caches, truncated) else []))
    assert [digest(image) for image in sorted(directory.glob("*.img"))] == before


@pytest.mark.parametrize(("change", "why"), [
    (None, "Bad checksum"),
    (lambda sb: replace(sb, version=7), "version"),
    (lambda sb: replace(sb, version=4, data_offset=1 << 40), "data offset"),
], ids=["checksum", "version", "data-offset"])
def test_a_damaged_backing_device_is_refused(change: Callable[[Superblock], Superblock] | None, why: str,
                                             golden: Callable[..., Path], tmp_path: Path) -> None:
    directory = golden("dirty_crash", writable=True)
    path = directory / "back0.img"
    raw = path.read_bytes()[SB_START:SB_START + SB_BYTES]
    with path.open("r+b") as file:
        file.seek(SB_START)
        file.write(raw[:80] + b"\xff" + raw[81:] if change is None
                   else encode_superblock(change(decode_superblock(raw)), raw))
    before = [digest(image) for image in sorted(directory.glob("*.img"))]
    refuse(tmp_path, [*options(directory / "cache.img", path), "--export", "nbd"], FAILED, str(path), why)
    assert [digest(image) for image in sorted(directory.glob("*.img"))] == before


def test_devices_in_the_wrong_place(golden: Callable[..., Path], tmp_path: Path) -> None:
    one, other = golden("dirty_crash"), golden("thrash_crash")
    export = ["--export", "nbd", "--read-only"]
    refuse(tmp_path, [*options(one / "back0.img"), *export], STATE, str(one / "back0.img"), "is a backing device")
    refuse(tmp_path, [*options(one / "cache.img", other / "cache.img"), *export], STATE, "is a cache device")
    refuse(tmp_path, [*options(one / "cache.img", other / "back0.img"), *export], STATE, str(other / "back0.img"),
           "belongs to set")
    refuse(tmp_path, [*options(one / "cache.img", one / "back0.img", one / "back0.img"), *export], USAGE, "twice")
    refuse(tmp_path, [*options(tmp_path, one / "back0.img"), *export], FAILED, "is a directory")
    refuse(tmp_path, [*options(tmp_path / "none", one / "back0.img"), *export], FAILED, "no such file")


def test_devices_in_use(golden: Callable[..., Path], tmp_path: Path, loop_device: Callable[..., str],
                        require_tool: Callable[[str], str]) -> None:
    need_root()
    directory = golden("dirty_crash", writable=True)
    words = [*options(directory / "cache.img", directory / "back0.img"), "--export", "nbd"]
    with Engine(tmp_path, *words):
        second = tmp_path / "second"
        second.mkdir()
        refuse(second, words, REFUSED, "cache.img", "in use")
        refuse(second, [*words, "--read-only"], REFUSED, "cache.img", "in use")
        text = run("format", "--cache", directory / "cache.img", "--force=bcache", status=REFUSED)
        assert "in use" in text
    plain = tmp_path / "plain.img"
    with plain.open("wb") as file:
        file.truncate(64 << 20)
    device = loop_device(plain)
    subprocess.run([require_tool("mkfs.ext4"), "-q", device], check=True)
    with mounted(device, tmp_path / "point"):
        refuse(second, [*options(directory / "cache.img", Path(device)), "--export", "nbd"], REFUSED, device, "in use")
        text = run("format", "--backing", device, "--force=signature", status=REFUSED)
        assert device in text
        assert "in use" in text or "mounted" in text
