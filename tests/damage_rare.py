# SPDX-License-Identifier: GPL-2.0-only
"""More cases for tests/damage.py: notes, counts and sizes, levels of nodes, structures in the journal's buckets."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from typing import NamedTuple

from bcachectl.fsck.live import leaf_extents
from bcachectl.fsck.records import Node
from bcachectl.ondisk.bkey import INODE_SHIFT, PTR_OFFSET, ptr_make, ptr_sector
from bcachectl.ondisk.crc64 import crc64_seeded
from bcachectl.ondisk.magic import INVALID_UUID
from tests.fsck.image import Image


class RareCase(NamedTuple):
    """As a `tests.damage.Case`, with the notes that it adds to those of its base."""

    name: str
    base: str
    edit: Callable[[Image], None]
    codes: tuple[str, ...]
    notes: tuple[str, ...] = ()


def rare_cases() -> Iterator[RareCase]:
    """All of them."""
    yield from _notes()
    yield from _sizes()
    yield from _levels()
    yield from _into_journal()
    yield from _keys()
    yield from _owners()
    yield from _discards()


def _discards() -> Iterator[RareCase]:
    for base in ("dirty_crash", "deep_crash", "thrash_crash"):
        yield RareCase(f"journal_discarded_{base}", base, discard_oldest, ("JOURNAL_DISCARDED",), ("SB_DISCARD",))
        yield RareCase(f"journal_discarded_in_part_{base}", base, _discard_part, ("JOURNAL_GAP",), ("SB_DISCARD",))
        yield RareCase(f"journal_zero_{base}", base, _zero_oldest, ("JOURNAL_GAP",))


def discard_oldest(image: Image) -> None:
    """The journal bucket before the last ones that a replay needs is discarded, and with it the oldest entry of the
    replay."""
    _zero_oldest(image)
    image.sb(104, "Q", 1 | 1 << 1)


def _zero_oldest(image: Image) -> None:
    # As with discard on, but it is off.
    walk = image.walk
    assert walk.superblock is not None
    index = walk.replay[0].index
    oldest = min(entry.jset.seq for entry in walk.journal
                 if entry.index == index and entry.jset.seq > walk.replay[-1].jset.seq - 32) - 1
    for entry in walk.journal:
        if entry.jset.seq > oldest:
            image.jset(entry, 32, "Q", min(entry.jset.last_seq, oldest))
    image.cache.put(image.bucket(walk.superblock.d[index - 1]), bytes(walk.geometry.bucket_bytes))


def _discard_part(image: Image) -> None:
    # No discard leaves an entry behind a hole.
    walk = image.walk
    assert walk.superblock is not None
    at = image.bucket(walk.superblock.d[walk.replay[0].index - 1]) + 3 * walk.geometry.block_bytes
    kept = image.cache.get(at, walk.geometry.bucket_bytes - 3 * walk.geometry.block_bytes)
    discard_oldest(image)
    image.cache.put(at, kept)


def _owners() -> Iterator[RareCase]:
    for base in ("attached_clean", "gen_churn", "fifo_discard"):
        yield RareCase(f"uuid_freed_clean_{base}", base, forget_slots, ("BACKING_FORGOTTEN", "ORPHAN_CLEAN"))
    for base in ("dirty_crash", "two_backing", "flash_volume", "killed"):
        yield RareCase(f"uuid_array_zero_{base}", base, forget_arrays, ("BACKING_FORGOTTEN", "ORPHAN_DIRTY"))


def forget_slots(image: Image) -> None:
    """Every slot of every uuid array that the journal names becomes free."""
    for sector in _arrays(image):
        for slot in range(8):
            image.cache.put((sector << 9) + slot * 128, bytes(16))


def forget_arrays(image: Image) -> None:
    """Every uuid array that the journal names becomes zeros: it has no checksum to tell."""
    for sector in _arrays(image):
        image.cache.put(sector << 9, bytes(1024))


def _arrays(image: Image) -> set[int]:
    # Those whose bucket was not used again since.
    return {ptr.sector for entry in image.walk.journal for ptr in entry.jset.uuid_bucket.ptrs
            if image.walk.gens[ptr.sector // image.walk.geometry.bucket_size_sectors] == ptr.gen}


def _notes() -> Iterator[RareCase]:
    def sb(name: str, note: str, offset: int, form: str, *values: object) -> RareCase:
        return RareCase(f"note_{name}", "attached_clean", lambda image: image.sb(offset, form, *values), (), (note,))

    def backing(name: str, base: str, note: str, offset: int, form: str, *values: object) -> RareCase:
        return RareCase(f"note_{name}_{base}", base, lambda image: image.sb(
            offset, form, *values, device=image.backings[0]), (), (note,))

    yield sb("sb_flags", "SB_FLAGS", 104, "Q", 1 | 1 << 40)
    yield sb("sb_discard", "SB_DISCARD", 104, "Q", 1 | 1 << 1)
    yield sb("sb_never_run", "SB_NEVER_RUN", 104, "Q", 0)
    yield RareCase("note_sb_guessed", "attached_clean", lambda image: image.sb(0, "Q", 9, fix=False), ("SB_CSUM",),
                   ("SB_GUESSED",))
    for base in ("dirty_crash", "killed"):
        yield RareCase(f"note_journal_torn_{base}", base, _torn, (), ("JOURNAL_TORN",))
    for base in ("two_backing", "flash_volume"):
        yield RareCase(f"note_uuid_sectors_{base}", base, lambda image: image.uuid(0, 64, "Q", 4096), (),
                       ("UUID_SECTORS",))
        yield RareCase(f"note_uuid_flags_{base}", base, lambda image: image.uuid(0, 60, "I", 1 << 7), (),
                       ("UUID_FLAGS",))
        yield RareCase(f"note_uuid_free_dirty_{base}", base, lambda image: image.uuid(9, 16, "B", 7), (),
                       ("UUID_FREE_DIRTY",))
    yield RareCase("note_orphan_retired", "two_backing", _retire, (), ("BACKING_NOT_ATTACHED", "ORPHAN_RETIRED"))
    yield backing("backing_flags", "attached_clean", "BACKING_FLAGS", 104, "Q", 1 << 61 | 1 << 30)
    yield RareCase("note_backing_not_attached", "attached_clean", _never_attached, (), ("BACKING_NOT_ATTACHED",))
    yield backing("backing_dirty_clean", "attached_clean", "BACKING_DIRTY_CLEAN", 104, "Q", 2 << 61)
    yield RareCase("note_backing_newer", "dirty_crash", _newer, (), ("BACKING_NEWER",))
    yield RareCase("note_backing_detached_keys", "dirty_crash", _detached_clean, (), ("BACKING_DETACHED_KEYS",))
    yield RareCase("note_backing_clean_keys", "dirty_crash", _written_back, (), ("BACKING_CLEAN_KEYS",))


def _newer(image: Image) -> None:
    # Of a run that began after the last one that the set knows of.
    image.sb(200, "I", image.walk.uuids[0].last_reg + 1, device=image.backings[0])


def _torn(image: Image) -> None:
    # The newest entry's last word never reached the device; the one before it is the newest then.
    entry = image.walk.replay[-1]
    assert any(other.index == entry.index and other is not entry for other in image.walk.replay)
    at = image.entry_at(entry)
    image.cache.put(at + 512 * (len(entry.jset.keys) // 1024) + 8 * 20, struct.pack("<Q", 1))


def _retire(image: Image) -> None:
    # A forced detach: the slot is retired, the backing device belongs to nobody, the keys stay.
    image.uuid(0, 0, "16s", INVALID_UUID)
    image.sb(56, "16s", bytes(16), device=image.backings[0], fix=False)
    image.sb(104, "Q", 1, device=image.backings[0])


def _never_attached(image: Image) -> None:
    image.sb(40, "16s", b"never seen here ", device=image.backings[0], fix=False)
    image.sb(104, "Q", 0, device=image.backings[0])


def _written_back(image: Image) -> None:
    # Write-back is done and the device marked clean; the cleared dirty bits never reached the cache.
    for _slot, found in leaf_extents(image.walk):
        rows = found.take(found.dirty)
        for start, end, ptr in zip(rows.start.tolist(), rows.end.tolist(), rows.ptr.tolist(), strict=True):
            data = image.cache.read(ptr_sector(ptr), end - start)
            image.backings[0].put((start & (1 << INODE_SHIFT) - 1) << 9, data)
    image.sb(104, "Q", 1 | 1 << 61, device=image.backings[0])


def _detached_clean(image: Image) -> None:
    # A detach that ended just before power failed: the uuid array and the keys are as they were.
    _written_back(image)
    image.sb(104, "Q", 1, device=image.backings[0])


def _sizes() -> Iterator[RareCase]:
    for base in ("attached_clean", "deep_crash"):
        yield RareCase(f"sb_device_larger_{base}", base, _grown, (), ("SB_DEVICE_LARGER",))
        yield RareCase(f"sb_journal_short_{base}", base, _short_journal, ("SB_JOURNAL_SHORT",), ("SB_GUESSED",))
        yield RareCase(f"sb_journal_none_{base}", base, lambda image: image.sb(206, "H", 0), ("SB_JOURNAL_SHORT",),
                       ("SB_GUESSED",))
    yield RareCase("sb_block_16_fresh", "fresh", lambda image: image.sb(192, "H", 16), ("SB_BLOCK_ABOVE_PAGE",))
    yield RareCase("sb_node_blocks_fresh", "fresh", _small_buckets, ("SB_NODE_BLOCKS",), ("SB_DEVICE_LARGER",))
    yield RareCase("sb_too_few_fresh", "fresh", lambda image: image.sb(184, "Q", 512), ("SB_TOO_FEW_TO_RUN",),
                   ("SB_DEVICE_LARGER",))
    for base in ("two_backing", "dirty_crash"):
        yield RareCase(f"uuid_length_{base}", base, lambda image: _uuid_key(image, size=8), ("UUID_LENGTH",))
        yield RareCase(f"uuid_stale_{base}", base, _uuid_stale, ("UUID_STALE",))
        yield RareCase(f"backing_feature_incompat_{base}", base, lambda image: _backing_features(image, 128),
                       ("BACKING_FEATURE",))
        yield RareCase(f"backing_feature_ro_compat_{base}", base, lambda image: _backing_features(image, 136),
                       ("BACKING_FEATURE",))


def _small_buckets(image: Image) -> None:
    # Buckets of one block: the first that may be allocated is the third, behind the superblock's 16 KiB.
    image.sb(204, "H", 3, fix=False)
    image.sb(194, "H", 8)


def _grown(image: Image) -> None:
    image.cache.base = image.cache.base[:] + bytes(image.walk.geometry.bucket_bytes)
    image.cache.size_sectors += image.walk.geometry.bucket_size_sectors


def _short_journal(image: Image) -> None:
    # The newest entry stands in the last bucket of the journal that the superblock still names, or behind it.
    assert image.walk.superblock is not None
    newest = image.walk.replay[-1].index
    assert newest > 0
    image.sb(206, "H", newest)


def _uuid_key(image: Image, *, size: int | None = None, ptr: int | None = None) -> None:
    newest = image.walk.replay[-1]
    high, = struct.unpack("<Q", image.cache.get(image.entry_at(newest) + 40, 8))
    if size is not None:
        image.jset(newest, 40, "Q", high & ~(0xFFFF << 20) | size << 20)
    if ptr is not None:
        image.jset(newest, 56, "Q", ptr)


def _uuid_stale(image: Image) -> None:
    bucket = (image.uuid_at >> 9) // image.walk.geometry.bucket_size_sectors
    image.bucket_gen(bucket, lambda gen: gen + 1)


def _backing_features(image: Image, offset: int) -> None:
    image.sb(offset, "Q", 1 << 5, device=image.backings[0], fix=False)
    # A version 6 superblock keeps the data offset in the word after the feature words.
    image.sb(184, "Q", 16, device=image.backings[0], fix=False)
    image.sb(16, "Q", 6, device=image.backings[0])


def _levels() -> Iterator[RareCase]:
    for base in ("deep_crash", "gen_churn", "thrash_crash"):
        yield RareCase(f"root_level_0_{base}", base, lambda image: _root_level(image, 0), ("BTREE_LEVEL",))
        yield RareCase(f"root_level_2_{base}", base, lambda image: _root_level(image, 2), ("BTREE_LEVEL",))
        yield RareCase(f"root_level_200_{base}", base, lambda image: _root_level(image, 200), ("BTREE_LEVEL",))
    for base in ("dirty_crash", "two_backing", "flash_volume"):
        yield RareCase(f"root_level_1_{base}", base, lambda image: _root_level(image, 1), ("BTREE_LEVEL",))
    for base in ("deep_crash", "gen_churn"):
        yield RareCase(f"child_is_interior_{base}", base, _interior_child, ("BTREE_LEVEL",))


def _root_level(image: Image, level: int) -> None:
    image.jset(image.walk.replay[-1], 168, "H", level)


def inner(image: Image) -> Node:
    """The root, with at least two children."""
    return max((node for node in image.nodes if node.level), key=lambda node: len(node.sets))


def _child(image: Image) -> tuple[Node, int, int, Node]:
    # The root, set and row of a pointer to a child that is not the last one, and that child.
    node = inner(image)
    by_bucket = {each.bucket: each for each in image.nodes}
    size = image.walk.geometry.bucket_size_sectors
    for number, bset in enumerate(node.sets):
        for row, (pos, ptr) in enumerate(zip(bset.keys.pos.tolist(), bset.keys.ptr.tolist(), strict=True)):
            child = by_bucket.get(ptr_sector(ptr) // size)
            if child is not None and child.gen == ptr & 0xFF and child.end == pos != node.end:
                return node, number, row, child
    raise AssertionError("no child")


def _copy_node(image: Image, node: Node, bucket: int, gen: int) -> int:
    # The node in another bucket, its checksums seeded with the pointer that this returns.
    geometry = image.walk.geometry
    ptr = ptr_make(geometry.sector_of(bucket), gen)
    buf = bytearray(image.cache.get(image.bucket(node.bucket), geometry.node_bytes))
    for bset in node.sets:
        at = bset.block * geometry.block_bytes
        length = 32 + 8 * struct.unpack_from("<I", buf, at + 28)[0]
        struct.pack_into("<Q", buf, at, crc64_seeded(bytes(buf[at + 8:at + length]), ptr))
    image.cache.put(image.bucket(bucket), bytes(buf))
    return ptr


def _interior_child(image: Image) -> None:
    # A pointer leads to a copy of the root in a bucket that nothing uses.
    node, number, row, _old = _child(image)
    image.key(node, number, row, ptr=_copy_node(image, node, _unused(image), 1))


def _unused(image: Image) -> int:
    geometry = image.walk.geometry
    used = {int(bucket) for _slot, found in leaf_extents(image.walk)
            for bucket in PTR_OFFSET.get(found.ptr) // geometry.bucket_size_sectors}
    used |= {node.bucket for node in image.nodes} | set(image.walk.prio_buckets)
    used |= {(image.uuid_at >> 9) // geometry.bucket_size_sectors, *journal_buckets(image)}
    return next(bucket for bucket in range(geometry.nbuckets - 1, 0, -1)
                if bucket not in used and image.walk.gens[bucket] <= 1)


def journal_buckets(image: Image) -> tuple[int, ...]:
    """The buckets of the journal."""
    assert image.walk.superblock is not None
    return image.walk.superblock.d


def _idle_journal_bucket(image: Image) -> int:
    # One whose entries nobody needs, not the next to be written.
    needed = {entry.index for entry in image.walk.replay}
    return journal_buckets(image)[max(index for index in range(len(journal_buckets(image))) if index not in needed)]


def _into_journal() -> Iterator[RareCase]:
    for base in ("deep_crash", "gen_churn", "thrash_crash"):
        yield RareCase(f"child_in_journal_{base}", base, _child_in_journal, ("BTREE_PTR_INTO_JOURNAL",))
    for base in ("two_backing", "dirty_crash"):
        yield RareCase(f"uuids_in_journal_{base}", base, _uuids_in_journal, ("UUID_INTO_JOURNAL",))
        yield RareCase(f"journal_key_in_journal_{base}", base, _journal_key_in_journal, ("EXTENT_INTO_JOURNAL",))


def _child_in_journal(image: Image) -> None:
    node, number, row, child = _child(image)
    image.key(node, number, row, ptr=_copy_node(image, child, _idle_journal_bucket(image), 0))


def _uuids_in_journal(image: Image) -> None:
    bucket = _idle_journal_bucket(image)
    image.cache.put(image.bucket(bucket), image.cache.get(image.uuid_at, image.walk.geometry.meta_bytes))
    _uuid_key(image, ptr=ptr_make(image.walk.geometry.sector_of(bucket), 0))


def _journal_key_in_journal(image: Image) -> None:
    # The first key of the newest entry that has one points to the journal.
    entry = next(entry for entry in reversed(image.walk.replay) if len(entry.jset.keys) >= 24)
    high, = struct.unpack("<Q", entry.jset.keys[:8])
    assert high >> 60 & 7 == 1
    image.jset(entry, 256, "Q", ptr_make(image.walk.geometry.sector_of(_idle_journal_bucket(image)), 0))


def _keys() -> Iterator[RareCase]:
    for base in ("deep_crash", "killed", "gen_churn"):
        yield RareCase(f"key_two_pointers_{base}", base, _two_pointers, ("BTREE_PTRS",))
    for base in ("deep_crash", "gen_churn"):
        yield RareCase(f"interior_out_of_order_{base}", base, _interior_order, ("BTREE_ORDER",))


def _two_pointers(image: Image) -> None:
    # The last key of a set gets its pointer once more.
    block_bytes = image.walk.geometry.block_bytes
    for node in image.nodes:
        for number, bset in enumerate(node.sets):
            at, keys = image.set_at(node, number), bset.keys
            words, = struct.unpack("<I", image.cache.get(at + 28, 4))
            has_room = 0 < (32 + words * 8) % block_bytes <= block_bytes - 8
            if node.level or not has_room or not len(keys.pos) or not keys.nptrs[-1]:
                continue
            row = len(keys.pos) - 1
            key_at = at + image.key_at(node, number, row)
            high, _low, ptr = struct.unpack("<QQQ", image.cache.get(key_at, 24))
            image.cache.put(key_at, struct.pack("<Q", high & ~(7 << 60) | 2 << 60))
            image.cache.put(key_at + 24, struct.pack("<Q", ptr))
            image.cache.put(at + 28, struct.pack("<I", words + 1))
            image.fix_set(node, number)
            return
    raise AssertionError("no room for a pointer")


def _interior_order(image: Image) -> None:
    node = inner(image)
    keys = node.sets[0].keys
    row = next(row for row in range(len(keys.pos) - 1) if keys.nptrs[row] == keys.nptrs[row + 1] == 1
               and 0 < keys.pos[row] < keys.pos[row + 1] < node.end)
    at = image.set_at(node, 0) + image.key_at(node, 0, row)
    one, two = image.cache.get(at, 24), image.cache.get(at + 24, 24)
    image.cache.put(at, two + one)
    image.fix_set(node, 0)
