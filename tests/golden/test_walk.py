# SPDX-License-Identifier: GPL-2.0-only
"""The offline walk on images that the kernel's driver wrote: no damage, the kernel's own keys, the users' own data.

How strictly a dump can equal the kernel's, and why (the kernel printed its keys while it ran, then was reset):

* `EXACT`: line by line.  Everything the kernel knew was on the device;
* `FILLS_LOST`: what a read miss put into the cache is not journaled, so the newest of it existed in memory only.
  Every key of ours is the kernel's, and what is missing is clean;
* `WRITING_BACK`: write-back went on around the dump, and clearing a dirty bit is not journaled either.  The keys are
  the same but for that bit, and again for clean ones that are missing.

Whatever the keys, the content must be what the users wrote: `test_content`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from bcachectl import describe
from bcachectl.fsck import extents as extent
from bcachectl.fsck.live import leaf_extents
from bcachectl.fsck.records import Damage, JournalEntry, Node
from bcachectl.fsck.walk import Walk
from bcachectl.ondisk.bkey import INODE_SHIFT, ptr_sector
from bcachectl.ondisk.crc64 import crc64
from bcachectl.ondisk.jset import JSET_HEADER_BYTES

EXACT = ("attached_clean", "dirty_crash", "fifo_discard", "flash_volume", "gen_churn")
FILLS_LOST = {"deep_crash": 46, "two_backing": 21}
WRITING_BACK = {"thrash_crash": 1}
STORIES = (*EXACT, *FILLS_LOST, *WRITING_BACK, "killed")


def open_walk(image: Path) -> tuple[Walk, list[Damage], list[object]]:
    data = image.read_bytes()
    walk = Walk(lambda sector, count: data[sector << 9:(sector + count) << 9], len(data) >> 9)
    damages: list[Damage] = []
    values: list[object] = []
    for item in walk.structures():
        if isinstance(item, Damage):
            damages.append(item)
        else:
            values.append(item.value)
    return walk, damages, values


def our_keys(walk: Walk) -> list[str]:
    return [line for _slot, found in leaf_extents(walk) for line in describe.kernel_lines(
        extent.merge(found, bucket_size_sectors=walk.geometry.bucket_size_sectors))]


def kernel_keys(story: Path) -> list[str]:
    text = (story / "facts/btree.txt").read_text().replace("\0", "")
    return [line for line in text.splitlines() if line]


def without_dirty(line: str) -> str:
    return line.removesuffix(" dirty")


@pytest.mark.parametrize("name", STORIES)
def test_no_damage(golden: Callable[..., Path], name: str) -> None:
    _walk, damages, _values = open_walk(golden(name) / "cache.img")
    assert [str(damage) for damage in damages if not damage.is_harmless] == []


@pytest.mark.parametrize("name", EXACT)
def test_keys_exact(golden: Callable[..., Path], name: str) -> None:
    walk, _damages, _values = open_walk(golden(name) / "cache.img")
    assert our_keys(walk) == kernel_keys(golden(name))


@pytest.mark.parametrize("name", FILLS_LOST)
def test_keys_but_for_lost_fills(golden: Callable[..., Path], name: str) -> None:
    walk, _damages, _values = open_walk(golden(name) / "cache.img")
    ours, theirs = our_keys(walk), kernel_keys(golden(name))
    missing = set(theirs) - set(ours)
    assert ours == [line for line in theirs if line not in missing]
    assert len(missing) == FILLS_LOST[name]
    assert [line for line in missing if line.endswith("dirty")] == []


@pytest.mark.parametrize("name", WRITING_BACK)
def test_keys_but_for_dirty_bits(golden: Callable[..., Path], name: str) -> None:
    walk, _damages, _values = open_walk(golden(name) / "cache.img")
    ours, theirs = our_keys(walk), kernel_keys(golden(name))
    missing = [line for line in theirs if without_dirty(line) not in map(without_dirty, ours)]
    assert len(missing) == WRITING_BACK[name]
    assert [line for line in missing if line.endswith("dirty")] == []
    assert [without_dirty(line) for line in ours] == [without_dirty(line) for line in theirs if line not in missing]


@pytest.mark.parametrize("name", [name for name in STORIES if name != "killed"])
def test_content(golden: Callable[..., Path], name: str) -> None:
    """Every volume, put together from both devices by the walk alone, has the bytes that its users wrote."""
    story = golden(name)
    walk, _damages, _values = open_walk(story / "cache.img")
    cache = (story / "cache.img").read_bytes()
    slots = [(inode, entry) for inode, entry in enumerate(walk.uuids) if not entry.is_free and not entry.is_retired]
    truths = sorted(story.glob("truth*.json"))
    assert len(truths) == len(slots)
    backings = sorted(story.glob("back*.img"))
    for truth_path, (inode, entry) in zip(truths, slots, strict=True):
        truth = json.loads(truth_path.read_text())
        if entry.is_flash_only:
            content, offset = bytearray(entry.sectors << 9), 0
        else:
            content, offset = bytearray(backings.pop(0).read_bytes()), 16
        for _slot, found in leaf_extents(walk):
            for start, end, ptr in zip(found.start.tolist(), found.end.tolist(), found.ptr.tolist(), strict=True):
                if start >> INODE_SHIFT == inode:
                    base = inode << INODE_SHIFT
                    sector = ptr_sector(ptr)
                    content[(start - base) << 9:(end - base) << 9] = cache[sector << 9:(sector + end - start) << 9]
        content = content[offset << 9:]
        assert len(content) == truth["device_bytes"]
        assert hashlib.sha256(content).hexdigest() == truth["sha256"]


def test_t5_no_freed_node_is_visited(golden: Callable[..., Path]) -> None:
    """T5: splits and coalescing leave pointers to freed nodes behind; only their markers' gens say so."""
    for name in ("deep_crash", "gen_churn", "killed", "thrash_crash"):
        walk, _damages, values = open_walk(golden(name) / "cache.img")
        nodes = [value for value in values if isinstance(value, Node)]
        assert len({node.bucket for node in nodes}) == len(nodes) == walk.nodes
        leaves = [node for node in nodes if node.level == 0]
        assert [slot.start for slot in walk.slots[1:]] == [slot.end for slot in walk.slots[:-1]]
        assert len(leaves) == len(walk.slots)
        assert all(walk.gens[node.bucket] == node.gen for node in nodes)


def test_t6_newest_entry_is_found_across_the_wrap(golden: Callable[..., Path]) -> None:
    """T6: in a journal that went round the newest entry stands before older ones, and all to be replayed is there."""
    walk, _damages, values = open_walk(golden("thrash_crash") / "cache.img")
    entries = [value for value in values if isinstance(value, JournalEntry)]
    by_place = [entry.jset.seq for entry in entries]
    assert by_place != sorted(by_place)
    assert walk.newest is not None
    assert walk.newest.seq == max(by_place)
    assert [entry.jset.seq for entry in walk.replay] == list(range(walk.newest.last_seq, walk.newest.seq + 1))


def test_t6_gap_is_fatal(golden: Callable[..., Path]) -> None:
    """T6: without one of the entries that a start would replay, the kernel refuses the set; so the walk says so."""
    image = golden("dirty_crash") / "cache.img"
    walk, _damages, _values = open_walk(image)
    lost = walk.replay[len(walk.replay) // 2]
    data = bytearray(image.read_bytes())
    assert walk.superblock is not None
    at = (walk.geometry.sector_of(walk.superblock.d[lost.index]) << 9) + lost.offset_bytes
    # Another number in a valid entry: with a bad checksum the walk of its bucket would end there and find no gap.
    data[at + 16:at + 24] = (walk.replay[0].jset.seq).to_bytes(8, "little")
    length = JSET_HEADER_BYTES + len(lost.jset.keys)
    data[at:at + 8] = crc64(bytes(data[at + 8:at + length])).to_bytes(8, "little")
    broken = Walk(lambda sector, count: bytes(data[sector << 9:(sector + count) << 9]), len(data) >> 9)
    said = [str(item) for item in broken.structures() if isinstance(item, Damage)]
    seq, newest = lost.jset.seq, walk.replay[-1].jset
    assert f"journal: journal entries {seq}-{seq} missing! (replaying {newest.last_seq}-{newest.seq})" in said
