# SPDX-License-Identifier: GPL-2.0-only
"""Leaves that are counted in columns: the counts are those of the maps, and what cannot be counted is declined.

So it is where the keys are scanned one by one (`bcachectl.fsck.scan`), which is done here compiled or not.
"""

from __future__ import annotations

import os
import random
import struct
from collections.abc import Callable
from contextlib import closing
from functools import lru_cache
from pathlib import Path

import pytest

from bcachectl.fsck import fanout, tally
from bcachectl.fsck.check import Check, run
from bcachectl.fsck.records import Damage, PlainLeaf
from bcachectl.fsck.salvage import journal_map, leaf_map
from bcachectl.fsck.scan import IS_COMPILED
from bcachectl.fsck.walk import Walk
from bcachectl.ondisk.bkey import INODE_SHIFT, MAX_POS
from tests.damage import Case, cases
from tests.fsck.image import Image
from tests.fsck.test_damage import base_image as case_image

STORIES = ("deep_crash", "gen_churn", "killed", "thrash_crash")
MUTANTS = int(os.environ.get("BCACHECTL_TALLY_MUTANTS") or 40)


IN_NODES = [case for case in cases() if case.name.startswith(("set_", "extent_", "gen_", "child_", "key_", "root_"))
            and "unreadable" not in case.name]
"""Damage that bytes show."""


@lru_cache(maxsize=2)
def base_image(cache: Path) -> Image:
    return Image(cache.read_bytes(), [])


@pytest.fixture(params=["columns", "scan"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """How leaves are tallied."""
    monkeypatch.setattr(tally, "IS_COMPILED", request.param == "scan")
    return str(request.param)


def report(image: Image, processes: int, fd: int = -1) -> list[str]:
    """All that a check says, with leaves tallied by so many processes; 0 for none tallied."""
    check = Check(image.cache.read, image.cache.size_sectors, fd=fd)
    check.walk.processes = processes
    run(check)
    return [repr(check.totals), *map(repr, check.findings), repr(check.dirty), repr(check.unknown),
            repr(check.used.tobytes()), repr(check.walk.gens.tobytes()), repr(sorted(check.dropped))]


@pytest.mark.parametrize("name", STORIES)
def test_tally_is_the_map(golden: Callable[..., Path], name: str, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    scanned: list[tally.Tally] = []
    plain = tally._scanned
    monkeypatch.setattr(tally, "_scanned", lambda scan: scanned.append(plain(scan)) or scanned[-1])
    image = base_image(golden(name) / "cache.img")
    walk = Walk(image.cache.read, image.cache.size_sectors, processes=1)
    found = [item.value for item in walk.structures() if not isinstance(item, Damage)]
    leaves = {leaf.place.sector: leaf for leaf in found if isinstance(leaf, PlainLeaf)}
    assert leaves
    journal, places = journal_map(walk), [leaf.place for leaf in leaves.values()]
    tallied = dict(zip(leaves, walk.tallies(places), strict=True))
    for slot in walk.slots:
        found_here = tallied.get(slot.leaf.sector) if slot.leaf is not None else None
        if found_here is None:
            continue
        kept = leaf_map(walk, slot, journal, known_buckets=walk.geometry.nbuckets).kept
        assert found_here.extents == len(kept.start)
        assert found_here.dirty_sectors == int(kept.size[kept.dirty].sum())
        assert found_here.clean_sectors == int(kept.size[~kept.dirty].sum())
        for inode, spread in found_here.dirty.items():
            rows = kept.take(kept.dirty & (kept.start >> INODE_SHIFT == inode))
            assert spread == (int(rows.size.sum()), int(rows.start.min()), int(rows.end.max()))
    assert len(scanned) > 0.9 * len(leaves) if way == "scan" else not scanned
    if walk.counted is not None:
        # They were added up as well.
        together = [tallied[sector] for sector, leaf in leaves.items() if leaf.tally is None]
        assert len(together) > 0.9 * len(leaves)
        assert walk.counted.settle(walk.gens)
        assert walk.counted.extents == sum(each.extents for each in together if each is not None)
        assert walk.counted.clean_sectors == sum(each.clean_sectors for each in together if each is not None)
        assert walk.counted.dirty_sectors == sum(each.dirty_sectors for each in together if each is not None)
    assert (walk.counted is not None) == (way == "scan")


@pytest.mark.parametrize("name", STORIES)
def test_a_good_set_is_added_up(golden: Callable[..., Path], name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a set that is in order no leaf is looked at twice."""
    monkeypatch.setattr(tally, "IS_COMPILED", True)
    image = base_image(golden(name) / "cache.img")
    check = Check(image.cache.read, image.cache.size_sectors)
    monkeypatch.setattr(check.walk, "tallies", None)
    # As plain Python, the scan is slow.
    check.walk.processes = 2 if IS_COMPILED else 1
    assert run(check).totals.extents


@pytest.mark.parametrize("case", IN_NODES, ids=lambda case: case.name)
def test_damage_read_from_a_descriptor(golden: Callable[..., Path], case: Case,
                                       monkeypatch: pytest.MonkeyPatch) -> None:
    """All that is said of a damaged set is the same, however its leaves are read and by whom they are checked."""
    monkeypatch.setattr(tally, "IS_COMPILED", True)
    image = case_image(golden(case.base)).fresh()
    case.edit(image)
    alone, fd = report(image, 0), os.memfd_create("cache")
    try:
        for sector in range(0, image.cache.size_sectors, 2048):
            data = image.cache.read(sector, min(2048, image.cache.size_sectors - sector))
            if any(data):
                os.pwrite(fd, data, sector << 9)
        os.truncate(fd, image.cache.size_sectors << 9)
        assert report(image, 2 if IS_COMPILED else 1, fd) == alone
    finally:
        os.close(fd)


@pytest.mark.parametrize("kept", [1, 2, 3])
def test_leaves_read_from_a_descriptor(golden: Callable[..., Path], tmp_path: Path, kept: int,
                                       monkeypatch: pytest.MonkeyPatch) -> None:
    """What cannot be read there is read in the usual way, which knows what to say about it."""
    monkeypatch.setattr(tally, "IS_COMPILED", True)
    image = base_image(golden("deep_crash") / "cache.img")
    alone, copy = report(image, 0), tmp_path / "cache.img"
    copy.write_bytes(image.cache.base[:len(image.cache.base) * kept // 3 - 100 * (kept < 3)])
    with copy.open("rb") as file:
        assert report(image, 2 if IS_COMPILED else 1, file.fileno()) == alone
    assert report(image, 2 if IS_COMPILED else 1, file_closed()) == alone


def file_closed() -> int:
    """A descriptor that nothing can be read from."""
    reader, writer = os.pipe()
    os.close(writer)
    os.close(reader)
    return reader


def test_damaged_leaves_read_from_a_descriptor(golden: Callable[..., Path], tmp_path: Path,
                                               monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tally, "IS_COMPILED", True)
    dice, base = random.Random(3), base_image(golden("deep_crash") / "cache.img")
    for number in range(4):
        image = base.fresh()
        for _ in range(3):
            change_key(image, dice)
        copy = tmp_path / f"cache{number}.img"
        copy.write_bytes(image.cache.content())
        with copy.open("rb") as file:
            assert report(image, 2 if IS_COMPILED else 1, file.fileno()) == report(image, 0)


def change_key(image: Image, dice: random.Random) -> None:
    """Change something about one key of a btree node; mostly with a good checksum."""
    node = dice.choice(image.nodes)
    number = dice.randrange(len(node.sets))
    keys = node.sets[number].keys
    if not len(keys.pos):
        return
    row = dice.randrange(len(keys.pos))
    at = image.set_at(node, number) + image.key_at(node, number, row)
    high, low = struct.unpack("<QQ", image.cache.get(at, 16))
    ptr = int(keys.ptr[row])
    other = int(keys.ptr[dice.randrange(len(keys.pos))])
    match dice.randrange(8):
        case 0:
            high ^= 1 << dice.randrange(64)
        case 1:
            low += dice.choice([8, -8, 1, 4096, -100000])
        case 2:
            high += dice.choice([8, -8, 1]) << 20
        case 3:
            high &= ~(0xFFFF << 20)
        case 4:
            ptr ^= dice.choice([1, 3, 0x40, 0x80, 0xFF, 1 << 63])
        case 5:
            ptr += dice.choice([8, -8, 1, 64, 1024]) << 8
        case 6:
            ptr = other
        case _:
            high ^= dice.choice([1, 2, 1 << 36])
    image.cache.put(at, struct.pack("<QQ", high & (1 << 64) - 1, low & (1 << 64) - 1))
    if keys.nptrs[row]:
        image.cache.put(at + 16, struct.pack("<Q", ptr & (1 << 64) - 1))
    if dice.random() < 0.95:
        image.fix_set(node, number)


@pytest.mark.parametrize("name", STORIES)
def test_nothing_else_is_found(golden: Callable[..., Path], name: str, way: str) -> None:
    base = base_image(golden(name) / "cache.img")
    # As plain Python, the scan is slow.
    for number in range(MUTANTS if way == "columns" or IS_COMPILED else MUTANTS // 8):
        dice = random.Random(f"{name}/{number}")
        image = base.fresh()
        for _ in range(dice.choice([1, 1, 2, 5])):
            change_key(image, dice)
        assert report(image, 1) == report(image, 0), f"mutant {number}"


@pytest.mark.usefixtures("way")
def test_the_last_device_number(golden: Callable[..., Path]) -> None:
    image = base_image(golden("gen_churn") / "cache.img").fresh()
    node = next(node for node in reversed(image.nodes) if not node.level and node.end == MAX_POS)
    row = len(node.sets[0].keys.pos) - 1
    at = image.set_at(node, 0) + image.key_at(node, 0, row)
    high, = struct.unpack("<Q", image.cache.get(at, 8))
    image.cache.put(at, struct.pack("<Q", high | 0xFFFFF | 1 << 36))
    image.fix_set(node, 0)
    assert any("EXTENT_INODE" in line for line in report(image, 1))


@pytest.mark.usefixtures("way")
def test_a_bit_that_nobody_looks_at(golden: Callable[..., Path]) -> None:
    base = base_image(golden("deep_crash") / "cache.img")
    for number in range(2):
        image = base.fresh()
        node = next(node for node in image.nodes if not node.level and len(node.sets) > number)
        keys = node.sets[number].keys
        row = int(keys.nptrs.argmax())
        image.key(node, number, row, ptr=int(keys.ptr[row]) | 1 << 63)
        assert report(image, 1) == report(image, 0)
    image = base.fresh()
    entry = next(entry for entry in reversed(image.walk.replay) if entry.jset.keys and entry.jset.keys[7] >> 4 & 7 == 1)
    image.jset(entry, 240 + 16 + 7, "B", entry.jset.keys[23] | 0x80)
    assert report(image, 1) == report(image, 0)


def test_a_node_of_less_than_a_block(golden: Callable[..., Path]) -> None:
    image = base_image(golden("deep_crash") / "cache.img").fresh()
    root = image.nodes[0]
    assert root.level
    image.key(root, 0, 3, size=4)
    assert any("BTREE_HEADER" in line for line in report(image, 1))
    assert report(image, 1) == report(image, 0)


def test_processes(golden: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    image = base_image(golden("deep_crash") / "cache.img")
    alone = report(image, 1)
    monkeypatch.setattr(fanout, "LEAVES_MIN", 2)
    monkeypatch.setattr(fanout, "PIECE_LEAVES", 3)
    assert report(image, 3) == alone


@pytest.mark.usefixtures("way")
def test_processes_say_what_one_says(golden: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    image = base_image(golden("deep_crash") / "cache.img")
    walk = Walk(image.cache.read, image.cache.size_sectors, processes=1)
    places = [item.value.place for item in walk.structures()
              if not isinstance(item, Damage) and isinstance(item.value, PlainLeaf)]
    alone = list(walk.tallies(places))
    assert None not in alone
    monkeypatch.setattr(fanout, "LEAVES_MIN", 2)
    for walk.processes, piece in ((2, 1), (2, 4), (3, 2), (5, 3)):
        monkeypatch.setattr(fanout, "PIECE_LEAVES", piece)
        assert repr(list(walk.tallies(places))) == repr(alone)
        assert [tally is not None and tally.taken.tobytes() for tally in walk.tallies(places)] == [
            tally is not None and tally.taken.tobytes() for tally in alone]


def test_a_process_that_dies(golden: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    image = base_image(golden("deep_crash") / "cache.img")
    alone, parent = report(image, 1), os.getpid()
    doomed = {node.bucket * image.walk.geometry.bucket_size_sectors for node in image.nodes[7:9]}
    read = image.cache.read

    def read_or_die(sector: int, count: int) -> bytes:
        if sector in doomed and os.getpid() != parent:
            os._exit(1)
        return read(sector, count)

    monkeypatch.setattr(fanout, "LEAVES_MIN", 2)
    monkeypatch.setattr(fanout, "PIECE_LEAVES", 3)
    monkeypatch.setattr(image.cache, "read", read_or_die)
    assert report(image, 2) == alone


def test_results_that_nobody_wants(golden: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    image = base_image(golden("deep_crash") / "cache.img")
    monkeypatch.setattr(fanout, "LEAVES_MIN", 2)
    monkeypatch.setattr(fanout, "PIECE_LEAVES", 1)
    walk = Walk(image.cache.read, image.cache.size_sectors, processes=2)
    with closing(walk.structures()) as items:
        assert any(isinstance(item.value, PlainLeaf) for item in items if not isinstance(item, Damage))
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)
