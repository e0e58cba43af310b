# SPDX-License-Identifier: GPL-2.0-only
"""A superblock that is gone, damaged or not what the user knows does not end fsck or write-back, nor is it made up.

What was lost is found on the rest of the device, on backing devices, or is given; what remains open is said.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pytest

from bcachectl import cli
from bcachectl.commands.fsck_report import lines
from bcachectl.fsck.check import run
from bcachectl.fsck.rescue import open_check
from bcachectl.ondisk.superblock import (
    BdevState,
    CacheMode,
    Replacement,
    Superblock,
    decode_superblock,
    judge_csum,
    parse_superblock,
)
from bcachectl.units import format_uuid
from tests.damage import cases
from tests.fsck.image import SB
from tests.fsck.test_damage import base_image, serious

STORIES = ("dirty_crash", "deep_crash", "two_backing")


class Copy:
    """A writable copy of a story, and runs of the program on it."""

    def __init__(self, images: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.cache, self.backings = images / "cache.img", sorted(images.glob("back*.img"))
        self.good = self.cache.read_bytes()[SB:SB + 4096]
        self.sb = decode_superblock(self.good)
        self._capsys = capsys

    def put(self, offset: int, data: bytes, path: Path | None = None) -> None:
        """Overwrite bytes of a device."""
        with (path or self.cache).open("r+b") as file:
            file.seek(offset)
            file.write(data)

    def set_superblock(self, offset: int, data: bytes, *, fix: bool) -> None:
        """Change the cache device's superblock."""
        raw = bytearray(self.good)
        raw[offset:offset + len(data)] = data
        if fix:
            struct.pack_into("<Q", raw, 0, judge_csum(bytes(raw))[1])
        self.put(SB, bytes(raw))

    def cli(self, *words: object) -> tuple[int, str, str]:
        """Exit status, stdout and stderr."""
        status = cli.run([str(word) for word in words])
        return status, *self._capsys.readouterr()

    def fsck(self, *words: object) -> tuple[int, str, str]:
        """fsck of the cache with its backing devices."""
        return self.cli("fsck", *words, self.cache, *self.backings)


@pytest.fixture
def copy(golden: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> Callable[[str], Copy]:
    return lambda name: Copy(golden(name, writable=True), capsys)


@pytest.mark.parametrize("name", STORIES)
@pytest.mark.parametrize("how", ["gone", "bit"])
def test_found_by_scanning(copy: Callable[[str], Copy], tmp_path: Path, name: str, how: str) -> None:
    """fsck goes on, -y writes the superblock, and undo has the old bytes."""
    set_ = copy(name)
    if how == "gone":
        set_.put(SB, bytes(4096))
    else:
        set_.set_superblock(194, b"\x07", fix=False)
    damaged = set_.cache.read_bytes()
    status, out, _err = set_.fsck()
    assert status == 4
    assert format_uuid(set_.sb.set_uuid) in out
    assert " 0 B lost" in out
    assert set_.cache.read_bytes() == damaged
    assert set_.fsck("-y", "--backup", tmp_path / "undo")[0] == 1
    written = decode_superblock(set_.cache.read_bytes()[SB:SB + 4096])
    for field in ("set_uuid", "nbuckets", "block_size", "bucket_size", "first_bucket", "keys", "d", "cache_sync"):
        assert getattr(written, field) == getattr(set_.sb, field), field
    assert set_.fsck()[0] == 0
    assert set_.cli("undo", tmp_path / "undo")[0] == 0
    assert set_.cache.read_bytes() == damaged


@pytest.mark.parametrize("name", STORIES)
def test_write_back_without_it(copy: Callable[[str], Copy], golden: Callable[..., Path], name: str) -> None:
    set_ = copy(name)
    set_.put(SB, bytes(4096))
    assert set_.cli("writeback", set_.cache, *set_.backings)[0] == 0
    for number, backing in enumerate(set_.backings):
        truth = json.loads((golden(name) / f"truth{number}.json").read_text())["sha256"]
        assert hashlib.sha256(backing.read_bytes()[16 << 9:]).hexdigest() == truth


def test_half_a_uuid_is_never_written(copy: Callable[[str], Copy], tmp_path: Path) -> None:
    """The cache device alone tells half of the set uuid; that is enough to read it and not to write it."""
    set_ = copy("dirty_crash")
    set_.put(SB, bytes(4096))
    damaged = set_.cache.read_bytes()
    status, out, _err = set_.cli("fsck", "-y", "--backup", tmp_path / "undo", set_.cache)
    assert status == 4
    assert "SB_HALF_UUID" in out
    assert "--set-uuid" in out
    assert set_.cache.read_bytes() == damaged
    assert not (tmp_path / "undo").exists()
    assert set_.cli("fsck", "-y", "--backup", tmp_path / "undo", "--set-uuid", format_uuid(set_.sb.set_uuid),
                    set_.cache)[0] == 1
    assert decode_superblock(set_.cache.read_bytes()[SB:SB + 4096]).set_uuid == set_.sb.set_uuid


def test_damaged_second_half_yields_to_a_backing_device(copy: Callable[[str], Copy], tmp_path: Path) -> None:
    set_ = copy("dirty_crash")
    set_.set_superblock(56 + 12, b"\0\0", fix=False)
    assert set_.fsck("-y", "--backup", tmp_path / "undo")[0] == 1
    assert decode_superblock(set_.cache.read_bytes()[SB:SB + 4096]).set_uuid == set_.sb.set_uuid


def test_bucket_size_is_needed_and_enough(copy: Callable[[str], Copy], tmp_path: Path) -> None:
    """Superblock and first prio set gone: nothing tells the bucket size, so it has to be given."""
    set_ = copy("dirty_crash")
    image = base_image(set_.cache.parent)
    set_.put(SB, bytes(4096))
    set_.put(image.bucket(image.walk.prio_buckets[0]), bytes(4096))
    status, out, _err = set_.fsck()
    assert status == 4
    assert "SB_UNUSABLE" in out
    assert "--bucket-size" in out
    assert set_.cli("writeback", "--dry-run", set_.cache, *set_.backings)[0] == 1
    status, out, _err = set_.fsck("--bucket-size", f"{set_.sb.bucket_size // 2}k")
    assert status == 4
    assert "PRIO_CSUM" in out or "PRIO_MAGIC" in out
    assert set_.cli("writeback", "--dry-run", "--bucket-size", "64k", set_.cache, *set_.backings)[0] == 0
    assert set_.fsck("-y", "--bucket-size", "64k", "--backup", tmp_path / "undo")[0] == 1
    written = decode_superblock(set_.cache.read_bytes()[SB:SB + 4096])
    assert (written.bucket_size, written.nbuckets) == (set_.sb.bucket_size, set_.sb.nbuckets)
    assert set_.fsck()[0] == 0


def test_wrong_bucket_size_is_said(copy: Callable[[str], Copy]) -> None:
    set_ = copy("dirty_crash")
    set_.put(SB, bytes(4096))
    status, out, err = set_.fsck("--bucket-size", "32k")
    assert status == 4
    assert "1 error," in out
    assert "has buckets of 64 KiB, not of 32 KiB" in err


def test_nothing_but_what_is_given(copy: Callable[[str], Copy], tmp_path: Path) -> None:
    """No superblock, no journal: what is left can be looked at by a geometry that fits it, and nothing is written."""
    set_ = copy("two_backing")
    set_.put(SB, bytes(4096))
    for bucket in set_.sb.d:
        set_.put(bucket * set_.sb.bucket_size << 9, bytes(set_.sb.bucket_size << 9))
    before = [path.read_bytes() for path in (set_.cache, *set_.backings)]
    uuid = format_uuid(set_.sb.set_uuid)
    told = ("--bucket-size", "128k", "--set-uuid", uuid)
    status, out, err = set_.fsck()
    assert (status, "SB_UNUSABLE" in out) == (4, True)
    assert out.endswith("Nothing was written, and nothing of this can be repaired here.\n")
    status, out, err = set_.fsck(*told)
    assert (status, err) == (4, "")
    assert f"set {uuid}: DAMAGED" in out
    assert "JOURNAL_EMPTY" in out
    assert "SB_GUESSED" in out
    assert "nothing is known about any data in the cache" in out
    for size in ("64k", "256k", "1M"):
        status, out, err = set_.fsck("--bucket-size", size, "--set-uuid", uuid)
        assert (status, out) == (16, "")
        assert f"has no journal entry of set {uuid}; there is none of any set, and buckets of" in err
    assert set_.fsck("--bucket-size", "128k", "--set-uuid", "00000000-1111-2222-3333-444444444444")[0] == 16
    status, out, err = set_.fsck("-y", *told, "--backup", tmp_path / "undo")
    assert (status, out.splitlines()[-1]) == (4, "Not repaired: SB_OFFSET, JOURNAL_EMPTY")
    status, out, err = set_.cli("writeback", *told, set_.cache, *set_.backings)
    assert (status, out, err.count("\n")) == (1, "", 1)
    assert "no journal entry is left" in err
    status, out, err = set_.cli("image", "create", set_.cache, tmp_path / "image")
    assert (status, "with --bucket-size and --set-uuid" in err) == (1, True)
    assert set_.cli("image", "create", *told, set_.cache, tmp_path / "image")[0] == 0
    assert "JOURNAL_EMPTY" in set_.cli("fsck", *told, tmp_path / "image")[1]
    assert before == [path.read_bytes() for path in (set_.cache, *set_.backings)]


@pytest.mark.parametrize("size", ["3k", "2k", "0", "8T", "4097"])
def test_what_is_no_bucket_size(copy: Callable[[str], Copy], size: str) -> None:
    set_ = copy("dirty_crash")
    status, out, err = set_.fsck("--bucket-size", size)
    assert (status, out) == (16, "")
    assert f"--bucket-size {size}: is no bucket size" in err


def test_a_good_superblock_is_not_overruled_by_a_mistake(copy: Callable[[str], Copy]) -> None:
    set_ = copy("dirty_crash")
    status, out, err = set_.fsck("--bucket-size", "128k")
    assert status == 0
    assert "0 errors, 0 warnings, 0 notes" in out
    assert "has buckets of 64 KiB, not of 128 KiB" in err


def test_a_device_is_named_once(copy: Callable[[str], Copy]) -> None:
    set_ = copy("dirty_crash")
    status, out, err = set_.cli("fsck", set_.cache, set_.cache)
    assert (status, out) == (16, "")
    assert "is named twice; name it once" in err
    other = set_.cache.parent / "." / ".." / set_.cache.parent.name / "back0.img"
    assert set_.cli("fsck", set_.cache, *set_.backings, other)[0] == 16


@pytest.mark.parametrize("gone", [False, True])
def test_wrong_set_is_refused(copy: Callable[[str], Copy], gone: bool) -> None:
    set_ = copy("dirty_crash")
    if gone:
        set_.put(SB, bytes(4096))
    other = "00000000-1111-2222-3333-444444444444"
    status, out, err = set_.fsck("--set-uuid", other)
    assert (status, out) == (16, "")
    assert f"no journal entry of set {other}" in err
    assert format_uuid(set_.sb.set_uuid)[:18] in err
    assert set_.cli("writeback", "--set-uuid", other, set_.cache, *set_.backings)[0] == 2


def test_superblock_of_another_set(copy: Callable[[str], Copy], tmp_path: Path) -> None:
    """A good superblock over another set's data (make-bcache by mistake): the set uuid that is given counts."""
    set_ = copy("dirty_crash")
    set_.set_superblock(56, b"made by mistake!", fix=True)
    assert set_.fsck()[0] == 4
    status, out, _err = set_.fsck("--set-uuid", format_uuid(set_.sb.set_uuid))
    assert status == 4
    assert "SB_OVERRULED" in out
    assert "19.5 MiB good, 0 B lost" in out
    assert set_.fsck("-y", "--set-uuid", format_uuid(set_.sb.set_uuid), "--backup", tmp_path / "undo")[0] == 1
    assert set_.fsck()[0] == 0


def test_block_of_the_device(golden: Callable[..., Path]) -> None:
    """A set with blocks of 512 bytes on a disk with blocks of 4 KiB: every kernel refuses it there."""
    image = base_image(golden("deep_crash"))
    found = run(open_check(image.cache.read, image.cache.size_sectors, logical_block_sectors=8))
    assert serious(found) == ["SB_BLOCK_BELOW_DEVICE"]


def test_unknown_ranges_are_told_by_volume(golden: Callable[..., Path]) -> None:
    """In bytes of the volume, as losses are, and not as positions of keys."""
    case = next(case for case in cases() if case.name == "child_not_at_start_gen_churn")
    image = base_image(golden(case.base)).fresh()
    case.edit(image)
    found = run(open_check(image.cache.read, image.cache.size_sectors))
    text = list(lines(found, None, []))
    assert "  nothing is known about what the cache has of bcache0 from byte 0 to byte 16146432" in text
    assert not [line for line in text if line.startswith("  nothing is known") and "byte" not in line]


# Flags that were overwritten.

SYNC, DISCARD, FIFO = 1, 2, 1 << 2


@pytest.mark.parametrize(("flags", "policy"), [
    (SYNC | DISCARD, Replacement.LRU), (0, Replacement.LRU), (SYNC | 5 << 2, Replacement.LRU),
    ((1 << 64) - 1, Replacement.LRU), (SYNC | DISCARD | FIFO, Replacement.FIFO),
    (DISCARD | FIFO | 1 << 40, Replacement.LRU)])
@pytest.mark.parametrize("is_known", [True, False])
def test_flags_that_were_overwritten(copy: Callable[[str], Copy], tmp_path: Path, flags: int, policy: Replacement,
                                     is_known: bool) -> None:
    """What they said is known if the checksum fits with it; else what costs nothing is written, and said."""
    set_ = copy("dirty_crash")
    raw = bytearray(set_.good)
    struct.pack_into("<Q", raw, 104, flags)
    if not is_known:
        raw[80] ^= 0x55  # The label is damaged as well.
    set_.put(SB, bytes(raw))
    damaged = set_.cache.read_bytes()
    wanted = Replacement.LRU if is_known else policy
    status, out, _err = set_.fsck()
    assert status == 4
    words = []
    if not flags & SYNC:
        words.append("a set that has run")
    if flags & DISCARD:
        words.append("discard off")
    if decode_flags(flags) is not wanted:
        words.append(f"replacement {wanted.name.lower()}")
    guessed = next(line for line in out.splitlines() if "SB_GUESSED" in line)
    assert all(word in guessed for word in words)
    assert "SB_DISCARD" not in out
    status, out, _err = set_.fsck("-y", "--backup", tmp_path / "undo")
    assert status == 1
    write = next(line for line in out.splitlines() if ": write 4096 bytes at byte 4096: superblock" in line)
    assert all(word in write for word in words)
    written = decode_superblock(set_.cache.read_bytes()[SB:SB + 4096])
    assert (written.discard, written.replacement, written.cache_sync, written.unknown_flags) == (False, wanted, True, 0)
    status, out, _err = set_.fsck()
    assert (status, "0 errors, 0 warnings, 0 notes" in out) == (0, True)
    assert set_.cli("undo", tmp_path / "undo")[0] == 0
    assert set_.cache.read_bytes() == damaged


def decode_flags(flags: int) -> Replacement | None:
    return replace(Superblock(), version=3, flags=flags).replacement


def test_flags_that_the_checksum_proves(copy: Callable[[str], Copy], tmp_path: Path) -> None:
    """Discard that the owner of the set has switched on stays on, where that is sure."""
    set_ = copy("fifo_discard")
    assert set_.sb.discard
    set_.set_superblock(194, b"\x07", fix=False)
    status, out, _err = set_.fsck("-y", "--backup", tmp_path / "undo")
    assert status == 1
    assert "discard off" not in out
    written = decode_superblock(set_.cache.read_bytes()[SB:SB + 4096])
    assert (written.flags, written.bucket_size) == (set_.sb.flags, set_.sb.bucket_size)
    set_.set_superblock(80, b"\x07", fix=False)
    status, out, _err = set_.fsck("-y", "--backup", tmp_path / "undo2")
    assert status == 1
    assert "superblock: discard off" in out
    assert not decode_superblock(set_.cache.read_bytes()[SB:SB + 4096]).discard


class Wrong(NamedTuple):
    """A backing superblock that fails its checksum, and what a repair makes of it; None: it is left as it is."""

    story: str
    state: BdevState
    rest: int
    is_known: bool
    after: tuple[BdevState, CacheMode] | None


@pytest.mark.parametrize("wrong", [
    # The state was overwritten, and nothing else: the checksum tells.
    Wrong("dirty_crash", BdevState.CLEAN, 1, True, (BdevState.DIRTY, CacheMode.WRITEBACK)),
    Wrong("dirty_crash", BdevState.NONE, 9, True, (BdevState.DIRTY, CacheMode.WRITEBACK)),
    Wrong("dirty_crash", BdevState.STALE, 1 << 30 | 5, True, (BdevState.DIRTY, CacheMode.WRITEBACK)),
    # The cache has dirty data of it, and most likely it was dirty.
    Wrong("dirty_crash", BdevState.CLEAN, 1, False, (BdevState.DIRTY, CacheMode.WRITEBACK)),
    Wrong("dirty_crash", BdevState.CLEAN, 1 << 30 | 1, False, (BdevState.DIRTY, CacheMode.WRITETHROUGH)),
    Wrong("dirty_crash", BdevState.DIRTY, 9, False, (BdevState.DIRTY, CacheMode.WRITETHROUGH)),
    Wrong("dirty_crash", BdevState.DIRTY, 1, False, (BdevState.DIRTY, CacheMode.WRITEBACK)),
    # It would come up without its cache.
    Wrong("dirty_crash", BdevState.STALE, 1, False, None),
    Wrong("dirty_crash", BdevState.NONE, 1, False, None),
    # Nothing dirty is anywhere.
    Wrong("attached_clean", BdevState.CLEAN, 1, False, (BdevState.CLEAN, CacheMode.WRITEBACK)),
    Wrong("attached_clean", BdevState.NONE, 0, False, (BdevState.NONE, CacheMode.WRITETHROUGH)),
])
def test_a_backing_superblock_that_was_overwritten(copy: Callable[[str], Copy], tmp_path: Path, wrong: Wrong) -> None:
    set_ = copy(wrong.story)
    backing = set_.backings[0]
    raw = bytearray(backing.read_bytes()[SB:SB + 4096])
    was = decode_superblock(raw)
    struct.pack_into("<Q", raw, 104, int(wrong.state) << 61 | wrong.rest)
    if not wrong.is_known:
        raw[80] ^= 0x55
    set_.put(SB, bytes(raw), backing)
    damaged = backing.read_bytes()
    said = parse_superblock(raw)
    status, out, _err = set_.fsck()
    assert status == 4
    wanted = wrong.after or (said.state, said.cache_mode)
    assert ("BACKING_GUESSED" in out) == (wrong.after is None or wanted != (said.state, said.cache_mode)
                                          or said.unknown_flags > 0)
    status, out, _err = set_.fsck("-y", "--backup", tmp_path / "undo")
    if wrong.after is None:
        assert status == 4
        assert "Not repaired: BACKING_CSUM" in out
        assert "which nothing bears out" in out
        assert backing.read_bytes() == damaged
        return
    assert status & 1
    written = decode_superblock(backing.read_bytes()[SB:SB + 4096])
    assert (written.state, written.cache_mode, written.unknown_flags) == (*wanted, 0)
    assert (written.uuid, written.set_uuid) == (was.uuid, was.set_uuid)
    if wanted[0] is not said.state:
        assert f"backing superblock: state {wanted[0].name.lower()}, not " in out
    assert set_.cli("undo", tmp_path / "undo")[0] == 0
    assert backing.read_bytes() == damaged


def test_a_clean_state_is_not_believed_where_keys_are_missing(copy: Callable[[str], Copy], tmp_path: Path) -> None:
    """The cache shows nothing dirty, and has lost a leaf; then a damaged superblock that says clean says nothing."""
    set_ = copy("gen_churn")
    assert decode_superblock(set_.backings[0].read_bytes()[SB:SB + 4096]).state is BdevState.CLEAN
    image = base_image(set_.cache.parent)
    node = next(node for node in image.nodes if not node.level)
    set_.put(image.bucket(node.bucket), bytes(512))
    raw = bytearray(set_.backings[0].read_bytes()[SB:SB + 4096])
    raw[80] ^= 0x55
    set_.put(SB, bytes(raw), set_.backings[0])
    assert set_.fsck("-y", "--backup", tmp_path / "undo")[0] & 1
    assert decode_superblock(set_.backings[0].read_bytes()[SB:SB + 4096]).state is BdevState.DIRTY
