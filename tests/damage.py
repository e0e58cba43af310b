# SPDX-License-Identifier: GPL-2.0-only
"""Named cases of damage, each made by changing a good image, with the findings that fsck must report.

A `Case` names its base image, the edit, and the exact codes of all warnings and errors.  The checksum is set right
again where the rule is not the checksum.  What a case costs is not written down here: tests/fsck/test_damage.py works
it out from the undamaged image and holds the report against it.  ``make damage`` runs all cases, ``python -m
tests.damage`` lists them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

from bcachectl.fsck.live import leaf_extents
from bcachectl.fsck.records import JournalEntry, Node
from bcachectl.ondisk.bkey import ptr_make, ptr_sector
from tests.damage_rare import rare_cases
from tests.fsck.full_journal import fill_journal
from tests.fsck.image import SB, Image

Edit = Callable[[Image], None]


class Case(NamedTuple):
    """One kind of damage."""

    name: str
    base: str
    edit: Edit
    codes: tuple[str, ...]
    notes: tuple[str, ...] = ()
    """Notes that it adds to those of its base, beside what goes with any damaged superblock or journal."""


def cases() -> list[Case]:
    """Every case, names unique."""
    found = [*superblock_cases(), *journal_cases(), *prio_cases(), *uuid_cases(), *set_cases(), *interior_cases(),
             *extent_cases(), *bucket_cases(), *backing_cases(), *order_cases(), *pointer_cases(),
             *(Case(*case) for case in rare_cases())]
    names = [case.name for case in found]
    assert len(names) == len(set(names)), [name for name in names if names.count(name) > 1]
    return found


# Superblock.

def superblock_cases() -> Iterator[Case]:
    """Geometry, features, size, flags."""

    def sb(name: str, code: str, offset: int, form: str, *values: object, fix: bool = True) -> Iterator[Case]:
        for base in ("attached_clean", "deep_crash"):
            yield Case(f"sb_{name}_{base}", base, lambda image: image.sb(offset, form, *values, fix=fix), (code,))

    yield from sb("csum", "SB_CSUM", 0, "Q", 7, fix=False)
    yield from sb("label_changed", "SB_CSUM", 80, "B", 255, fix=False)
    yield from sb("offset", "SB_OFFSET", 8, "Q", 9)
    yield from sb("magic", "SB_MAGIC", 24, "B", 0)
    yield from sb("version_2", "SB_VERSION", 16, "Q", 2)
    yield from sb("version_7", "SB_VERSION", 16, "Q", 7)
    yield from sb("uuid_zero", "SB_UUID", 40, "16s", bytes(16))
    yield from sb("set_uuid_zero", "SB_UUID", 56, "16s", bytes(16))
    yield from sb("block_size_0", "SB_BLOCK_SIZE", 192, "H", 0)
    yield from sb("block_size_3", "SB_BLOCK_SIZE", 192, "H", 3)
    yield from sb("bucket_size_1000", "SB_BUCKET_SIZE", 194, "H", 1000)
    yield from sb("bucket_size_4", "SB_BUCKET_SIZE", 194, "H", 4)
    yield from sb("nbuckets_100", "SB_NBUCKETS", 184, "Q", 100)
    yield from sb("nbuckets_2_63", "SB_NBUCKETS", 184, "Q", 1 << 63)
    yield from sb("nbuckets_too_many", "SB_DEVICE_SIZE", 184, "Q", 1 << 20)
    yield from sb("nr_in_set_0", "SB_NR_IN_SET", 196, "H", 0)
    yield from sb("nr_in_set_9", "SB_NR_IN_SET", 196, "H", 9)
    yield from sb("nr_this_dev_1", "SB_NR_IN_SET", 198, "H", 1)
    yield from sb("journal_not_sequential", "SB_JOURNAL_BUCKETS", 216, "Q", 77)
    yield from sb("journal_257", "SB_JOURNAL_BUCKETS", 206, "H", 257)
    yield from sb("replacement_5", "SB_REPLACEMENT", 104, "Q", 1 | 5 << 2)
    for bit, name in ((120, "compat"), (136, "ro_compat")):
        yield from _feature(name, bit, 1)
    yield from _feature("incompat", 128, 4)
    for base in ("attached_clean", "deep_crash"):
        yield Case(f"sb_all_zero_{base}", base, lambda image: image.cache.put(SB, bytes(4096)), ("SB_OFFSET",))
        yield Case(f"sb_unreadable_{base}", base, lambda image: image.cache.unreadable.update(range(8, 16)), ("SB_IO",))


def _feature(name: str, offset: int, bits: int) -> Iterator[Case]:
    def edit(image: Image) -> None:
        image.sb(offset, "Q", bits, fix=False)
        image.sb(16, "Q", 5)

    yield Case(f"sb_feature_{name}", "attached_clean", edit, ("SB_FEATURE",))


# Journal.

def _newest(image: Image) -> JournalEntry:
    return image.walk.replay[-1]


def _middle(image: Image) -> JournalEntry:
    # An entry to be replayed, with another to be replayed behind it in the same bucket, so that a hole shows.
    replay = image.walk.replay
    for before, entry, after in zip(replay, replay[1:], replay[2:], strict=False):
        if before.index == entry.index == after.index == replay[-1].index:
            return entry
    raise AssertionError("no such entry")


def _with_keys(image: Image) -> JournalEntry:
    return next(entry for entry in reversed(image.walk.replay) if len(entry.jset.keys) >= 24)


def journal_cases() -> Iterator[Case]:
    """Gaps, torn and damaged entries, numbers, keys, pointers."""
    nowhere = ptr_make(1 << 40, 1)
    for base in ("dirty_crash", "two_backing", "flash_volume"):
        def on_newest(name: str, codes: tuple[str, ...], offset: int, form: str, *values: object,
                      base: str = base) -> Case:
            return Case(f"journal_{name}_{base}", base, lambda image: image.jset(_newest(image), offset, form, *values),
                        codes)

        yield Case(f"journal_gone_{base}", base, _clear_journal, ("JOURNAL_EMPTY",))
        yield Case(f"journal_middle_csum_{base}", base,
                   lambda image: image.cache.flip(image.entry_at(_middle(image))), ("JOURNAL_CSUM",))
        yield Case(f"journal_middle_magic_{base}", base,
                   lambda image: image.cache.flip(image.entry_at(_middle(image)) + 8), ("JOURNAL_CSUM",))
        yield Case(f"journal_middle_length_{base}", base,
                   lambda image: image.cache.flip(image.entry_at(_middle(image)) + 30), ("JOURNAL_CSUM",))
        yield on_newest("last_seq_ahead", ("JOURNAL_LAST_SEQ",), 32, "Q", 1 << 40)
        yield on_newest("last_seq_0", ("JOURNAL_LAST_SEQ",), 32, "Q", 0)
        yield on_newest("version_9", ("JOURNAL_VERSION",), 24, "I", 9)
        yield on_newest("root_beyond", ("BTREE_ROOT_PTR",), 120, "Q", nowhere)
        yield on_newest("root_size_0", ("BTREE_ROOT_PTR",), 104, "Q", 1 << 63 | 1 << 60 | 0xFFFFF)
        yield on_newest("root_dirty", ("BTREE_ROOT_PTR",), 104, "Q", 1 << 63 | 1 << 60 | 1 << 36 | 8 << 20 | 0xFFFFF)
        yield on_newest("root_no_ptr", ("BTREE_ROOT_PTR",), 104, "Q", 1 << 63 | 8 << 20 | 0xFFFFF)
        yield on_newest("uuids_beyond", ("BACKING_FORGOTTEN", "UUID_PTR"), 56, "Q", nowhere)
        yield on_newest("uuids_no_ptr", ("BACKING_FORGOTTEN", "UUID_PTR"), 40, "Q", 1 << 63 | 8 << 20)
        yield on_newest("prio_beyond", ("PRIO_PTR",), 176, "Q", 1 << 30)
        yield on_newest("prio_0", ("PRIO_PTR",), 176, "Q", 0)
        yield on_newest("prio_wrong_bucket", ("PRIO_CSUM",), 176, "Q", 300)
        yield Case(f"journal_key_inode_{base}", base,
                   lambda image: image.jset(_with_keys(image), 240, "Q", 1 << 63 | 1 << 60 | 8 << 20 | 0xFFFF0),
                   ("EXTENT_INODE", "JOURNAL_KEY_INODE", *(("EXTENT_OVERLAP",) if base == "dirty_crash" else ())))
        yield Case(f"journal_key_beyond_{base}", base, lambda image: image.jset(_with_keys(image), 256, "Q", nowhere),
                   ("JOURNAL_KEY",))
        yield Case(f"journal_key_too_long_{base}", base, lambda image: image.jset(_with_keys(image), 248, "Q", 1),
                   ("JOURNAL_KEY",))
        yield Case(f"journal_keys_cut_{base}", base,
                   lambda image: image.jset(_with_keys(image), 28, "I", 1), ("JOURNAL_KEYS",))


    for base in ("dirty_crash", "two_backing"):
        yield Case(f"journal_full_{base}", base, fill_journal, ("JOURNAL_FULL",))
        yield Case(f"journal_full_bare_{base}", base, lambda image: fill_journal(image, is_bare=True),
                   ("JOURNAL_FULL",))


def _clear_journal(image: Image) -> None:
    assert image.walk.superblock is not None
    for bucket in image.walk.superblock.d:
        image.cache.put(image.bucket(bucket), bytes(image.walk.geometry.bucket_bytes))


# Prio sets.

def prio_cases() -> Iterator[Case]:
    """Checksum, magic, chain, values, gens."""
    for base in ("deep_crash", "dirty_crash", "thrash_crash"):
        yield Case(f"prio_csum_{base}", base, lambda image: image.prio(0, 0, "Q", 1, fix=False), ("PRIO_CSUM",))
        yield Case(f"prio_data_{base}", base, lambda image: image.prio(0, 1000, "B", 0xEE, fix=False), ("PRIO_CSUM",))
        yield Case(f"prio_last_byte_{base}", base, _flip_prio_end, ("PRIO_CSUM",))
        yield Case(f"prio_magic_{base}", base, lambda image: image.prio(0, 8, "Q", 1), ("PRIO_MAGIC",))
        yield Case(f"prio_zero_{base}", base,
                   lambda image: image.cache.put(image.bucket(image.walk.prio_buckets[0]), bytes(4096)), ("PRIO_CSUM",))
        yield Case(f"prio_unreadable_{base}", base, _prio_unreadable, ("PRIO_IO",))
        yield Case(f"prio_value_{base}", base, lambda image: image.prio(0, 40 + 3 * 50, "H", 40000), ("PRIO_VALUE",))
    yield Case("prio_next_beyond", "deep_crash", lambda image: image.prio(1, 32, "Q", 1 << 30), ("PRIO_PTR",))
    yield Case("prio_next_reserved", "deep_crash", lambda image: image.prio(1, 32, "Q", 0), ("PRIO_PTR",))
    yield Case("prio_loop", "deep_crash",
               lambda image: image.prio(1, 32, "Q", image.walk.prio_buckets[0]), ("PRIO_LOOP",))
    yield Case("prio_third_csum", "deep_crash", lambda image: image.prio(2, 0, "Q", 1, fix=False), ("PRIO_CSUM",))


def _flip_prio_end(image: Image) -> None:
    image.cache.flip(image.bucket(image.walk.prio_buckets[0]) + image.walk.geometry.meta_bytes - 1)


def _prio_unreadable(image: Image) -> None:
    image.cache.unreadable.add(image.walk.geometry.sector_of(image.walk.prio_buckets[0]) + 1)


# Uuids.

def _slot(image: Image) -> int:
    return next(slot for slot, entry in enumerate(image.walk.uuids) if not entry.is_free and not entry.is_retired)


def uuid_cases() -> Iterator[Case]:
    """Duplicates, sizes, slots without an owner."""
    for base in ("two_backing", "dirty_crash", "flash_volume"):
        yield Case(f"uuid_twice_{base}", base, _uuid_twice, ("UUID_TWICE",))
        yield Case(f"uuid_freed_{base}", base, lambda image: image.uuid(_slot(image), 0, "16s", bytes(16)),
                   ("BACKING_FORGOTTEN", "ORPHAN_DIRTY"), ("UUID_FREE_DIRTY",) if base == "two_backing" else ())
        yield Case(f"uuid_unreadable_{base}", base,
                   lambda image: image.cache.unreadable.add(image.uuid_at >> 9), ("BACKING_FORGOTTEN", "UUID_IO"))
    yield Case("uuid_flash_0", "flash_volume", lambda image: image.uuid(1, 64, "Q", 0),
               ("EXTENT_BEYOND_VOLUME", "UUID_FLASH_SIZE"))
    yield Case("uuid_flash_huge", "flash_volume", lambda image: image.uuid(1, 64, "Q", (1 << 64) - 1),
               ("UUID_FLASH_SIZE",))
    yield Case("uuid_flash_small", "flash_volume", lambda image: image.uuid(1, 64, "Q", 8), ("EXTENT_BEYOND_VOLUME",))


def _uuid_twice(image: Image) -> None:
    image.uuid(5, 0, "128s", image.cache.get(image.uuid_at + _slot(image) * 128, 128))


# Sets of keys.

def _leaf(image: Image) -> Node:
    """A leaf with many sets and many keys, not the last one if there are several."""
    leaves = [node for node in image.nodes if node.level == 0 and len(node.sets[0].keys.pos) > 8]
    leaves = leaves or [node for node in image.nodes if node.level == 0]
    return max(leaves[:-1] or leaves, key=lambda node: (len(node.sets), len(node.sets[0].keys.pos)))


def _inner(image: Image) -> Node:
    return max((node for node in image.nodes if node.level), key=lambda node: len(node.sets))


def set_cases() -> Iterator[Case]:
    """Each rule of a set: its header, its checksum, its keys; first, middle and last set; leaves and interior nodes."""
    places: tuple[tuple[str, str, Callable[[Image], Node]], ...] = (
        ("leaf", "deep_crash", _leaf), ("root_leaf", "attached_clean", _leaf), ("leaf", "killed", _leaf),
        ("interior", "deep_crash", _inner), ("interior", "gen_churn", _inner), ("leaf", "thrash_crash", _leaf))
    for what, base, pick in places:
        def case(name: str, code: str, edit: Callable[[Image, Node], None], *, what: str = what, base: str = base,
                 pick: Callable[[Image], Node] = pick) -> Case:
            return Case(f"set_{name}_{what}_{base}", base, lambda image: edit(image, pick(image)), (code,))

        yield case("csum_first", "BTREE_CSUM", lambda image, node: image.bset(node, 0, 0, "Q", 5, fix=False))
        yield case("csum_last", "BTREE_CSUM", lambda image, node: image.bset(node, len(node.sets) - 1, 0, "Q", 5,
                                                                              fix=False))
        yield case("magic_first", "BTREE_MAGIC", lambda image, node: image.bset(node, 0, 8, "Q", 5))
        yield case("version_first", "BTREE_VERSION", lambda image, node: image.bset(node, 0, 24, "I", 2, fix=False))
        yield case("length_first", "BTREE_HEADER", lambda image, node: image.bset(node, 0, 28, "I", 1 << 30, fix=False))
        yield case("unreadable", "BTREE_IO", _node_unreadable)
        yield case("zero", "BTREE_HEADER", lambda image, node: image.cache.put(image.bucket(node.bucket), bytes(512)))
        if base in ("deep_crash", "killed") and what != "interior":
            yield case("csum_middle", "BTREE_CSUM", lambda image, node: image.bset(node, 1, 0, "Q", 5, fix=False))
            yield case("magic_last", "BTREE_MAGIC",
                       lambda image, node: image.bset(node, len(node.sets) - 1, 8, "Q", 5))
            yield case("seq_middle", "BTREE_CORRUPTED", lambda image, node: image.bset(node, 1, 16, "Q", 5, fix=False))
            yield case("seq_last", "BTREE_SET_LOST",
                       lambda image, node: image.bset(node, len(node.sets) - 1, 16, "Q", 5, fix=False))
        if base == "killed" and what != "interior":
            yield case("zero_last", "BTREE_SET_MISSING",
                       lambda image, node: image.cache.put(image.set_at(node, len(node.sets) - 1), bytes(512)))


def _node_unreadable(image: Image, node: Node) -> None:
    image.cache.unreadable.add(image.walk.geometry.sector_of(node.bucket))


# Interior nodes.

def _child(image: Image, node: Node) -> tuple[int, int]:
    # Set and row of a live child pointer, not the last one.
    live = {each.bucket: each for each in image.nodes}
    size = image.walk.geometry.bucket_size_sectors
    for number, bset in enumerate(node.sets):
        for row in range(len(bset.keys.pos) - 1):
            child = live.get(ptr_sector(int(bset.keys.ptr[row])) // size)
            is_live = child is not None and child.gen == int(bset.keys.ptr[row]) & 0xFF
            if child is not None and is_live and child.end == int(bset.keys.pos[row]):
                return number, row
    raise AssertionError("no child")


def interior_cases() -> Iterator[Case]:
    """Pointers of interior nodes."""
    for base in ("deep_crash", "gen_churn"):
        def case(name: str, codes: tuple[str, ...], edit: Callable[[Image, Node, int, int], None],
                 base: str = base) -> Case:
            def apply(image: Image) -> None:
                node = _inner(image)
                edit(image, node, *_child(image, node))

            return Case(f"child_{name}_{base}", base, apply, codes)

        yield case("beyond", ("BTREE_PTR",), lambda image, node, number, row: image.key(
            node, number, row, ptr=ptr_make(1 << 40, 1)))
        yield case("reserved", ("BTREE_PTR",), lambda image, node, number, row: image.key(
            node, number, row, ptr=ptr_make(8, 1)))
        yield case("dirty", ("BTREE_PTR",), _child_dirty)
        yield case("size_0", ("BTREE_PTR",), lambda image, node, number, row: image.key(node, number, row, size=0))
        yield case("gen", ("BTREE_CSUM",), _child_gen)


def _child_dirty(image: Image, node: Node, number: int, row: int) -> None:
    high = int(node.sets[number].keys.high[row])
    image.key(node, number, row, high=high | 1 << 36)


def _child_gen(image: Image, node: Node, number: int, row: int) -> None:
    image.key(node, number, row, ptr=int(node.sets[number].keys.ptr[row]) + 1)


# Extents.

def _live_rows(image: Image, node: Node, *, dirty: bool | None = None, count: int = 1) -> list[tuple[int, int]]:
    # Sets and rows of keys of a leaf that are live just as they stand, and that the journal does not touch.
    live: set[tuple[int, int]] = set()
    for slot, found in leaf_extents(image.walk):
        if slot.leaf is not None and image.walk.geometry.bucket_of(slot.leaf.sector) == node.bucket:
            live = set(zip(found.end.tolist(), found.ptr.tolist(), strict=True))
            sizes = dict(zip(found.end.tolist(), found.size.tolist(), strict=True))
    journal = image.walk.journal_map
    rows = []
    for number, bset in enumerate(node.sets):
        keys = bset.keys
        for row in range(len(keys.pos)):
            end, size = int(keys.pos[row]), int(keys.size[row])
            if (end, int(keys.ptr[row])) not in live or sizes[end] != size or size < 2:
                continue
            if dirty is not None and bool(keys.dirty[row]) != dirty:
                continue
            if not bool(((journal.start < end) & (journal.end > end - size)).any()):
                rows.append((number, row))
    assert len(rows) >= count, "no such key"
    return rows[:count] if count else rows


def extent_cases() -> Iterator[Case]:
    """Keys of leaves that point where they must not."""
    for base, dirty in (("deep_crash", True), ("gen_churn", False), ("killed", None), ("thrash_crash", False)):
        def case(name: str, codes: tuple[str, ...], edit: Callable[[Image, Node, int, int], None], base: str = base,
                 dirty: bool | None = dirty) -> Case:
            def apply(image: Image) -> None:
                node = _leaf(image)
                edit(image, node, *_live_rows(image, node, dirty=dirty)[0])

            return Case(f"extent_{name}_{base}", base, apply, codes)

        yield case("beyond", ("EXTENT_BEYOND_DEVICE",), lambda image, node, number, row: image.key(
            node, number, row, ptr=ptr_make(image.walk.geometry.bucket_size_sectors * image.walk.geometry.nbuckets, 1)))
        yield case("reserved", ("EXTENT_IN_RESERVED",), lambda image, node, number, row: image.key(
            node, number, row, ptr=ptr_make(0, 1)))
        yield case("crosses", ("EXTENT_CROSSES_BUCKET",), _crosses)
        yield case("in_journal", ("EXTENT_INTO_JOURNAL",), _in_journal)
        yield case("in_metadata", ("EXTENT_IN_METADATA",), _in_metadata)
        yield case("overlap", ("EXTENT_OVERLAP",), _overlap)
        yield case("out_of_order", ("BTREE_ORDER",), _swap)


def _crosses(image: Image, node: Node, number: int, row: int) -> None:
    size = image.walk.geometry.bucket_size_sectors
    keys = node.sets[number].keys
    sector = ptr_sector(int(keys.ptr[row])) // size * size + size - 1
    image.key(node, number, row, ptr=ptr_make(sector, int(keys.ptr[row]) & 0xFF))


def _to_bucket(image: Image, node: Node, number: int, row: int, bucket: int) -> None:
    image.key(node, number, row, ptr=ptr_make(image.walk.geometry.sector_of(bucket), int(image.walk.gens[bucket])))


def _in_journal(image: Image, node: Node, number: int, row: int) -> None:
    assert image.walk.superblock is not None
    _to_bucket(image, node, number, row, image.walk.superblock.d[0])


def _in_metadata(image: Image, node: Node, number: int, row: int) -> None:
    _to_bucket(image, node, number, row, image.walk.prio_buckets[0])


def _overlap(image: Image, node: Node, number: int, row: int) -> None:
    (other_number, other), = [place for place in _live_rows(image, node, dirty=bool(node.sets[number].keys.dirty[row]),
                                                            count=2) if place != (number, row)][:1]
    mine, theirs = int(node.sets[number].keys.size[row]), int(node.sets[other_number].keys.size[other])
    size = image.walk.geometry.bucket_size_sectors
    ptr = int(node.sets[other_number].keys.ptr[other])
    room = size - ptr_sector(ptr) % size
    if mine > room:
        ptr -= (mine - room) << 8
    del theirs
    image.key(node, number, row, ptr=ptr)


def _swap(image: Image, node: Node, number: int, row: int) -> None:
    # Two keys of equal length in the wrong order.
    keys = node.sets[number].keys
    for first in range(len(keys.pos) - 1):
        if keys.nptrs[first] == keys.nptrs[first + 1] == 1 and keys.pos[first] < keys.pos[first + 1]:
            at = image.set_at(node, number) + image.key_at(node, number, first)
            one, two = image.cache.get(at, 24), image.cache.get(at + 24, 24)
            image.cache.put(at, two + one)
            image.fix_set(node, number)
            return
    raise AssertionError("nothing to swap")


# Buckets and gens.

def bucket_cases() -> Iterator[Case]:
    """Generations against pointers."""
    for base in ("killed", "thrash_crash", "deep_crash"):
        yield Case(f"gen_far_behind_{base}", base, lambda image: _gen(image, -100), ("PRIO_GEN",))
        yield Case(f"gen_dirty_stale_{base}", base, lambda image: _gen(image, 1), ("BTREE_PTR_STALE_DIRTY",))
        yield Case(f"gen_too_stale_{base}", base, lambda image: _gen(image, 100),
                   ("BTREE_PTR_STALE_DIRTY", "BTREE_PTR_TOO_STALE"))


def _gen(image: Image, by: int) -> None:
    # A bucket with dirty extents that only leaves know of.
    size = image.walk.geometry.bucket_size_sectors
    journal = {ptr_sector(ptr) // size for ptr in image.walk.journal_map.ptr.tolist()}
    ptrs = (ptr for _slot_, found in leaf_extents(image.walk) for ptr in found.ptr[found.dirty].tolist())
    chosen = next(ptr for ptr in ptrs if ptr_sector(ptr) // size not in journal)
    image.bucket_gen(ptr_sector(chosen) // size, lambda _old: (chosen & 0xFF) + by)


# Order, numbers and ranges.

def order_cases() -> Iterator[Case]:
    """Rules of order: of journal entries, of keys in a set, of a node's range."""
    yield Case("journal_gap", "killed", _journal_gap, ("JOURNAL_GAP",))
    yield Case("journal_gap_thrash", "thrash_crash", _journal_gap, ("JOURNAL_GAP",))
    yield Case("journal_unreadable", "attached_clean", lambda image: image.cache.unreadable.add(
        image.walk.geometry.sector_of(_journal_buckets(image)[-1])), ("JOURNAL_IO",))
    yield Case("journal_seq_twice", "thrash_crash", _seq_twice, ("JOURNAL_SEQ_TWICE",))
    yield Case("sb_obso_large_bucket", "attached_clean", lambda image: _features(image, 1), ("SB_OBSO_LARGE_BUCKET",))
    yield Case("sb_first_bucket_0", "attached_clean", _first_bucket_0, ("SB_FIRST_BUCKET",))
    for base in ("deep_crash", "killed", "gen_churn"):
        yield Case(f"set_empty_{base}", base, _empty_set, ("BTREE_EMPTY_SET",))
        yield Case(f"set_overlap_{base}", base, _set_overlap, ("BTREE_SET_OVERLAP",))
        yield Case(f"set_short_key_{base}", base, _short_key, ("BTREE_SHORT_KEY",))
        yield Case(f"set_key_beyond_8_pib_{base}", base, _beyond_8_pib, ("BTREE_KEYS",))
        yield Case(f"set_keys_cut_{base}", base, _keys_cut, ("BTREE_KEYS",))
        yield Case(f"extent_size_{base}", base, _extent_size, ("EXTENT_SIZE",))


def _journal_buckets(image: Image) -> tuple[int, ...]:
    assert image.walk.superblock is not None
    return image.walk.superblock.d


def _journal_gap(image: Image) -> None:
    # The head of a bucket whose entries lie between others that are to be replayed.
    replay = image.walk.replay
    indices = list(dict.fromkeys(entry.index for entry in replay))
    chosen = indices[1] if len(indices) > 2 else indices[0]
    image.cache.put(image.bucket(_journal_buckets(image)[chosen]), bytes(image.walk.geometry.bucket_bytes))


def _seq_twice(image: Image) -> None:
    # The last entry of some bucket, other than the newest, says that it is another one.
    newest = image.walk.replay[-1]
    chosen = next(entry for entry in image.walk.journal if entry.index != newest.index
                  and not any(other.index == entry.index and other.offset_bytes > entry.offset_bytes
                              for other in image.walk.journal) and entry.jset.seq < image.walk.replay[0].jset.seq - 1)
    image.jset(chosen, 16, "Q", chosen.jset.seq + 1)


def _features(image: Image, bits: int) -> None:
    image.sb(128, "Q", bits, fix=False)
    image.sb(16, "Q", 5)


def _first_bucket_0(image: Image) -> None:
    image.sb(204, "H", 0, fix=False)
    image.sb(208, f"{len(_journal_buckets(image))}Q", *range(len(_journal_buckets(image))))


def _two_sets(image: Image) -> Node:
    return max((node for node in image.nodes if node.level == 0), key=lambda node: len(node.sets))


def _empty_set(image: Image) -> None:
    image.bset(_two_sets(image), 1, 28, "I", 0)


def _row_before(image: Image, node: Node) -> tuple[int, int]:
    # A set and a row in it such that the keys at row and row + 1 both have sectors.
    for number, bset in enumerate(node.sets):
        keys = bset.keys
        for row in range(len(keys.pos) - 2):
            is_pair = keys.size[row] > 1 and keys.size[row + 1] > 1 and keys.nptrs[row] == keys.nptrs[row + 1] == 1
            if is_pair and keys.pos[row + 1] - keys.size[row + 1] >= keys.pos[row]:
                return number, row
    raise AssertionError("no such pair")


def _set_overlap(image: Image) -> None:
    # The second key becomes long enough to reach into the first, as a hole, which points nowhere it must not.
    node = _leaf(image)
    number, row = _row_before(image, node)
    keys = node.sets[number].keys
    size = int(keys.pos[row + 1] - keys.pos[row]) + 1
    image.key(node, number, row + 1, size=size, ptr=CHECK_PTR)


def _short_key(image: Image) -> None:
    node = _leaf(image)
    number = next(number for number, bset in enumerate(node.sets) if len(bset.keys.pos))
    last = len(node.sets[number].keys.pos) - 1
    image.key(node, number, last, pos=(0xF0000, 1 << 20), ptr=CHECK_PTR)


def _beyond_8_pib(image: Image) -> None:
    node = _leaf(image)
    number = next(number for number, bset in enumerate(node.sets) if len(bset.keys.pos))
    image.key(node, number, len(node.sets[number].keys.pos) - 1, pos=(0, 1 << 50))


def _keys_cut(image: Image) -> None:
    # The last key says that it has six pointers.
    node = _leaf(image)
    number = next(number for number, bset in enumerate(node.sets) if len(bset.keys.pos))
    last = len(node.sets[number].keys.pos) - 1
    image.key(node, number, last, high=int(node.sets[number].keys.high[last]) & ~(7 << 60) | 6 << 60)


def _extent_size(image: Image) -> None:
    node = min((node for node in image.nodes if node.level == 0 and len(node.sets[0].keys.pos)),
               key=lambda node: node.start)
    image.key(node, 0, 0, pos=(0, 1), size=2)


# Where pointers lead.

CHECK_PTR = 4095 << 51 | 12345


def pointer_cases() -> Iterator[Case]:
    """Pointers to nodes and structures that belong to others."""
    for base in ("deep_crash", "gen_churn"):
        yield Case(f"child_same_{base}", base, _same_child, ("BTREE_NODE_TWICE",))
        yield Case(f"child_gap_{base}", base, _child_gap, ("BTREE_CHILD_GAP",))
        yield Case(f"child_into_journal_{base}", base, _child_into_journal, ("BTREE_MAGIC",))
        stray = ("BTREE_STRAY",) if base == "deep_crash" else ()
        yield Case(f"child_twice_{base}", base, _child_twice, ("BTREE_CHILD_TWICE", "BTREE_KEY_BEFORE", *stray))
        yield Case(f"child_not_at_start_{base}", base, _child_inside,
                   ("BTREE_VERSION" if base == "deep_crash" else "BTREE_CSUM", "BTREE_PTR_OFFSET"))
        yield Case(f"key_before_{base}", base, _key_before, ("BTREE_KEY_BEFORE",))
        yield Case(f"separator_lower_{base}", base, _separator_lower, ("BTREE_SHORT_KEY", *stray))
        yield Case(f"separator_higher_{base}", base, _separator_higher, ("BTREE_KEY_BEFORE", *stray))
        yield Case(f"prio_in_journal_{base}", base, _prio_in_journal, ("PRIO_INTO_JOURNAL",))
    yield Case("sb_unusable", "attached_clean", _unusable, ("SB_OFFSET", "SB_UNUSABLE"))
    yield Case("journal_ring", "thrash_crash", _swap_journal, ("JOURNAL_RING",))
    yield Case("uuids_in_prio", "two_backing", _uuids_in_prio,
               ("BACKING_FORGOTTEN", "BUCKET_TWICE", "UUID_FLASH_SIZE"), ("UUID_FLAGS",))
    yield Case("extent_inode_deep_crash", "deep_crash", _extent_inode, ("EXTENT_INODE",))
    yield Case("backing_before_data", "dirty_crash", _before_data, ("BACKING_BEFORE_DATA",))


def _same_child(image: Image) -> None:
    node = _inner(image)
    number, row = _child(image, node)
    keys = node.sets[number].keys
    live = {(each.bucket, each.gen) for each in image.nodes}
    size = image.walk.geometry.bucket_size_sectors
    other = next(index for index in range(row + 1, len(keys.pos))
                 if (ptr_sector(int(keys.ptr[index])) // size, int(keys.ptr[index]) & 0xFF) in live)
    image.key(node, number, other, ptr=int(keys.ptr[row]))


def _child_gap(image: Image) -> None:
    # The pointer to the last child turns into the marker of a freed node.
    node = _inner(image)
    for number, bset in enumerate(node.sets):
        for row in range(len(bset.keys.pos)):
            if int(bset.keys.pos[row]) == node.end:
                image.key(node, number, row, ptr=CHECK_PTR)


def _child_twice(image: Image) -> None:
    node = _inner(image)
    number, row = _child(image, node)
    pos = int(node.sets[number].keys.pos[row + 1])
    image.key(node, number, row, pos=(pos >> 44, pos & (1 << 44) - 1))


def _child_inside(image: Image) -> None:
    node = _inner(image)
    number, row = _child(image, node)
    size = image.walk.geometry.bucket_size_sectors
    image.key(node, number, row, ptr=int(node.sets[number].keys.ptr[row]) + (size // 2 << 8), size=size // 2)


def _key_before(image: Image) -> None:
    # The first key of a leaf that is not the first one becomes a check key before its range.
    node = next(node for node in sorted(image.nodes, key=lambda node: node.start)
                if node.level == 0 and node.start > 4096 and len(node.sets[0].keys.pos))
    before = node.start - 8
    image.key(node, 0, 0, pos=(before >> 44, before & (1 << 44) - 1), size=8, ptr=CHECK_PTR)


def _separator_lower(image: Image) -> None:
    # A child ends, by its parent, before its keys do.
    _move_separator(image, into_left=True)


def _separator_higher(image: Image) -> None:
    # A child begins, by its parent, behind its first keys.
    _move_separator(image, into_left=False)


def _move_separator(image: Image, *, into_left: bool) -> None:
    # To the end of a key in the middle of the leaf on one side; of the leaf with most dirty keys.
    node = _inner(image)
    live = {(each.bucket, each.gen): each for each in image.nodes}
    leaves = {each.start: each for each in image.nodes if each.level == 0}
    size = image.walk.geometry.bucket_size_sectors
    found: list[tuple[int, int, int, int]] = []
    for number, bset in enumerate(node.sets):
        for row, ptr in enumerate(bset.keys.ptr.tolist()):
            left = live.get((ptr_sector(ptr) // size, ptr & 0xFF))
            right = leaves.get(left.end) if left is not None else None
            if left is None or right is None or left.end != int(bset.keys.pos[row]):
                continue
            keys = (left if into_left else right).sets[0].keys
            inside = sorted(keys.pos[keys.size > 0].tolist())
            if len(inside) > 2:
                pos = inside[len(inside) // 2]
                rows = keys.pos > pos if into_left else keys.pos <= pos
                found.append((int(keys.dirty[rows].sum()), number, row, pos))
    _count, number, row, pos = max(found)
    image.key(node, number, row, pos=(pos >> 44, pos & (1 << 44) - 1))


def _prio_in_journal(image: Image) -> None:
    # A copy of the first prio set in a journal bucket that nobody needs.
    needed = {entry.index for entry in image.walk.replay}
    index = max(index for index in range(len(_journal_buckets(image))) if index not in needed)
    bucket = _journal_buckets(image)[index]
    image.cache.put(image.bucket(bucket), image.cache.get(image.bucket(image.walk.prio_buckets[0]),
                                                          image.walk.geometry.meta_bytes))
    image.jset(_newest(image), 176, "Q", bucket)


def _unusable(image: Image) -> None:
    _clear_journal(image)
    image.cache.put(SB, bytes(4096))


def _swap_journal(image: Image) -> None:
    # Two journal buckets of old entries change places.
    first, second = image.walk.journal[0].index, image.walk.journal[0].index + 2
    count = len(_journal_buckets(image))
    one, two = (image.bucket(_journal_buckets(image)[index % count]) for index in (first, second))
    size = image.walk.geometry.bucket_bytes
    content = image.cache.get(one, size)
    image.cache.put(one, image.cache.get(two, size))
    image.cache.put(two, content)


def _uuids_in_prio(image: Image) -> None:
    sector = image.walk.geometry.sector_of(image.walk.prio_buckets[0])
    image.jset(_newest(image), 56, "Q", ptr_make(sector, int(image.walk.gens[image.walk.prio_buckets[0]])))


def _child_into_journal(image: Image) -> None:
    node = _inner(image)
    image.key(node, *_child(image, node), ptr=ptr_make(image.walk.geometry.sector_of(_journal_buckets(image)[1]), 0))


def _extent_inode(image: Image) -> None:
    # The last key of the last leaf moves to a device number that no set can have.
    node = max((node for node in image.nodes if node.level == 0), key=lambda node: node.end)
    number, row = next((number, row) for number, row in _live_rows(image, node, dirty=True, count=0)
                       if row == len(node.sets[number].keys.pos) - 1)
    image.key(node, number, row, pos=(0xF0000, int(node.sets[number].keys.pos[row]) & (1 << 44) - 1))


def _before_data(image: Image) -> None:
    image.sb(16, "Q", 4, device=image.backings[0], fix=False)
    image.sb(184, "Q", 4096, device=image.backings[0])


# Backing devices.

def backing_cases() -> Iterator[Case]:
    """Superblock, membership, state."""
    for base in ("dirty_crash", "two_backing"):
        def sb(name: str, codes: tuple[str, ...], offset: int, form: str, *values: object, fix: bool = True,
               base: str = base) -> Case:
            return Case(f"backing_{name}_{base}", base, lambda image: image.sb(
                offset, form, *values, device=image.backings[0], fix=fix), codes)

        yield Case(f"backing_state_overwritten_{base}", base, lambda image: image.sb(
            104, "Q", 1 << 61 | 1 << 30, device=image.backings[0], fix=False), ("BACKING_CLEAN_DIRTY", "BACKING_CSUM"),
            ("BACKING_FLAGS", "BACKING_GUESSED"))
        yield sb("csum", ("BACKING_CSUM",), 0, "Q", 1, fix=False)
        yield sb("magic", ("BACKING_MAGIC",), 24, "B", 1)
        yield sb("offset", ("BACKING_OFFSET",), 8, "Q", 9)
        yield sb("version_9", ("BACKING_VERSION",), 16, "Q", 9)
        yield sb("is_cache", ("BACKING_KIND",), 16, "Q", 3)
        yield sb("uuid_zero", ("BACKING_UUID", "BACKING_FORGOTTEN"), 40, "16s", bytes(16))
        yield sb("block_size_0", ("BACKING_BLOCK_SIZE",), 192, "H", 0)
        yield sb("block_size_1", ("BACKING_BLOCK_SIZE",), 192, "H", 1)
        yield sb("mode_9", ("BACKING_MODE",), 104, "Q", 9 | 2 << 61)
        yield sb("state_none", ("BACKING_DETACHED_DIRTY",), 104, "Q", 1)
        yield sb("state_stale", ("BACKING_INCONSISTENT",), 104, "Q", 1 | 3 << 61)
        yield sb("other_set", ("BACKING_OTHER_SET",), 56, "16s", b"another set uuid")
        yield sb("unknown_uuid", ("BACKING_FORGOTTEN",), 40, "16s", b"unknown to a set")
        yield Case(f"backing_unreadable_{base}", base,
                   lambda image: image.backings[0].unreadable.add(8), ("BACKING_IO",))
        yield Case(f"backing_cut_{base}", base, _cut, ("BACKING_SMALL",))
        yield Case(f"backing_twice_{base}", base, lambda image: image.backings.append(image.backings[0]),
                   ("BACKING_TWICE",))
    yield Case("backing_clean_dirty", "dirty_crash", lambda image: image.sb(
        104, "Q", 1 | 1 << 61, device=image.backings[0]), ("BACKING_CLEAN_DIRTY",))
    yield Case("backing_data_offset", "dirty_crash", _data_offset, ("BACKING_DATA_OFFSET",))


def _cut(image: Image) -> None:
    image.backings[0].size_sectors = 64


def _data_offset(image: Image) -> None:
    image.sb(16, "Q", 4, device=image.backings[0], fix=False)
    image.sb(184, "Q", 8, device=image.backings[0])


def main() -> None:
    """``python -m tests.damage``: every case, the image that it damages and the findings, and how many there are."""
    every = cases()
    width = max(len(case.name) for case in every)
    for case in every:
        print(f"{case.name:{width}}  {case.base:14}  {' '.join(case.codes) or 'notes only'}")
    codes = {code for case in every for code in case.codes}
    print(f"{len(every)} cases of damage to {len({case.base for case in every})} images, {len(codes)} kinds of finding")


if __name__ == "__main__":
    main()
