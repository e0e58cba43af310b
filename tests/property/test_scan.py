# SPDX-License-Identifier: GPL-2.0-only
"""`Scan` and `CountingScan` against the columns of `Tallier`: the same is said about a leaf, whatever is in it.

Leaves are made of several sets of few keys, close together, so that they touch, with buckets of few generations and a
journal on top; then anything may be wrong with any key.  The columns are held against the full decoder elsewhere
(tests/fsck/test_tally.py).
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st

from bcachectl.fsck import extents as extent
from bcachectl.fsck.counted import Counted
from bcachectl.fsck.counting import CountingScan
from bcachectl.fsck.extents import Extents
from bcachectl.fsck.fast_crc import crc64_address
from bcachectl.fsck.scan import JOURNAL_ROWS_MAX, SPREADS_MAX, rows_of
from bcachectl.fsck.tally import RUN_BITS, RUN_MASK, Place, Spread, Tallier, Tally, joined_spreads
from bcachectl.ondisk.bkey import HIGH_ONE, INODE_SHIFT, MAX_POS, PTR_CHECK_DEV
from bcachectl.ondisk.bset import encode_bset
from bcachectl.ondisk.crc64 import crc64
from bcachectl.ondisk.geometry import Geometry

GEOMETRY = Geometry(1, 64, 40, 2)
MAGIC, SEQ, BUCKET = 0x1234, 77, 3
PLACE_PTR = BUCKET * 64 << 8 | 1
INODES = (0, 5)


class Key(NamedTuple):
    """Any key: the words but for what is computed."""

    inode: int
    end: int
    size: int
    dirty: bool
    ptr: int | None
    flip: int = 0
    """Bits of the first word that are turned over."""

    def words(self) -> list[int]:
        high = HIGH_ONE | self.size << 20 | int(self.dirty) << 36 | self.inode | (0 if self.ptr is None else 1 << 60)
        return [high ^ self.flip, self.end, *([] if self.ptr is None else [self.ptr])]


def ptr_of(bucket: int, inside: int, gen: int, dev: int = 0) -> int:
    return dev << 51 | (bucket * 64 + inside) << 8 | gen


@st.composite
def good_sets(draw: st.DrawFn, *, inodes: tuple[int, ...], plain: bool) -> list[Key]:
    """A set of keys in order; of one volume with data only if ``plain``."""
    keys: list[Key] = []
    for inode in inodes:
        at = draw(st.integers(0, 20))
        bucket, inside = draw(st.integers(2, 39)), 0
        for _ in range(draw(st.integers(0, 12))):
            at += draw(st.sampled_from([0, 0, 0, 1, 3, 20]))
            size = draw(st.sampled_from([1, 2, 8, 8, 8, 16, 64]))
            if inside + size > 64 or draw(st.integers(0, 5)) == 0:
                bucket, inside = draw(st.integers(2, 39)), draw(st.integers(0, 64 - size))
            kind = "data" if plain else draw(st.sampled_from(["data"] * 6 + ["hole", "check", "zeroed"]))
            at += size
            # As old as the bucket is most often; some are behind, ahead, or far behind.
            gen = (10 + draw(st.sampled_from([0] * 30 + [255, 254, 1, 100, 150, 160]))) & 0xFF
            ptr = ptr_of(bucket, inside, gen)
            if kind == "hole":
                keys.append(Key(inode, at, size, False, None))
            elif kind == "check":
                keys.append(Key(inode, at, size, False, ptr_of(5, 0, 0, PTR_CHECK_DEV) | draw(st.booleans()) << 63))
            else:
                keys.append(Key(inode, at, 0 if kind == "zeroed" else size, draw(st.booleans()), ptr))
            inside += size
    return keys


@st.composite
def wrong(draw: st.DrawFn, key: Key) -> Key:
    """Something about a key is changed."""
    match draw(st.integers(0, 9)):
        case 0:
            return key._replace(flip=1 << draw(st.integers(0, 63)))
        case 1:
            return key._replace(end=max(0, key.end + draw(st.sampled_from([-64, -8, -1, 1, 8, 64, 1 << 43]))))
        case 2:
            return key._replace(end=draw(st.sampled_from([0, 1, (1 << 44) - 1, 1 << 44, (1 << 63) - 1, MAX_POS])))
        case 3:
            return key._replace(size=draw(st.sampled_from([0, 1, 63, 64, 65, 0xFFFF])))
        case 4:
            return key._replace(ptr=draw(st.sampled_from([None, 0, ptr_of(1, 63, 10), ptr_of(39, 63, 10),
                                                          ptr_of(40, 0, 10), MAX_POS, (1 << 51) - 1, 1 << 51])))
        case 5:
            return key._replace(ptr=(key.ptr or 0) ^ 1 << draw(st.integers(0, 63)))
        case 6:
            return key._replace(ptr=(key.ptr or 0) & ~0xFF | draw(st.integers(0, 255)))
        case 7:
            return key._replace(inode=draw(st.sampled_from([0, 1, 4, 5, 6, 0xFFFFE, 0xFFFFF])))
        case 8:
            return key._replace(ptr=ptr_of(draw(st.integers(0, 41)), draw(st.integers(0, 63)), 10))
        case _:
            return key._replace(dirty=not key.dirty)


def journal_of(keys: list[Key]) -> Extents:
    """Good keys with data, holes or check pointers, as a flat map."""
    rows = [key for key in keys if key.size]
    end = np.array([key.inode << INODE_SHIFT | key.end for key in rows], np.uint64)
    size = np.array([key.size for key in rows], np.uint64)
    return extent.flatten(Extents(
        end - size, end, np.array([key.dirty for key in rows], np.bool_),
        np.array([key.ptr is not None for key in rows], np.uint8),
        np.array([key.ptr or 0 for key in rows], np.uint64), np.zeros(len(rows), np.uint8)))


def node(sets: list[list[Key]], tail: int = 0) -> bytes:
    """The leaf; ``tail`` words of the last set's last key are missing."""
    data = b""
    for number, keys in enumerate(sets):
        words = [word for key in keys for word in key.words()]
        if number == len(sets) - 1 and tail:
            words = words[:-tail]
        data += bytes(encode_bset(struct.pack(f"<{len(words)}Q", *words), seq=SEQ, magic=MAGIC, seed=PLACE_PTR,
                                  block_bytes=512))
    size_bytes = GEOMETRY.node_bytes
    assert len(data) <= size_bytes
    return data.ljust(size_bytes, b"\0")


def canonical(tally: Tally) -> tuple[object, ...]:
    """A tally less what is only order: sectors that are taken, and generations."""
    sectors: list[int] = []
    for word in tally.taken.tolist():
        sectors += range(word >> RUN_BITS, (word >> RUN_BITS) + (word & RUN_MASK))
    marks = {(word >> 8 >> 6, word & 0xFF) for word in tally.marks.tolist()}
    return tally.extents, tally.dirty_sectors, tally.clean_sectors, tally.dirty, sorted(sectors), marks


def compare(sets: list[list[Key]], journal: Extents, gens: np.ndarray[tuple[int], np.dtype[np.uint8]], start: int,
            end: int, tail: int = 0) -> bool:
    """Whether the scan knows; if it does, it has to be right."""
    data = node(sets, tail)
    tallier = Tallier(lambda _sector, _count: data, GEOMETRY, MAGIC, gens, journal)
    place = Place(BUCKET * 64, PLACE_PTR, GEOMETRY.node_sectors, start, end)
    tallier.scan = None
    expected = tallier.tally(place)
    tallier.scan = CountingScan(GEOMETRY, gens, rows_of(journal), MAGIC, crc64_address())
    log = tallier.log(memoryview(data), place)
    is_known = tallier.scan.leaf(memoryview(data).cast("Q"), log, start, end) if log else False
    got = tallier.tally(place)
    if expected is None:
        assert not is_known
        assert got is None
    else:
        assert got is not None
        assert canonical(got) == canonical(expected)
    return is_known


GENS = np.full(GEOMETRY.nbuckets, 10, np.uint8)


@st.composite
def leaves(draw: st.DrawFn) -> tuple[list[list[Key]], Extents, tuple[int, int]]:
    first = draw(good_sets(inodes=draw(st.sampled_from([(0,), (5,), (0, 5)])), plain=draw(st.booleans())))
    later = [draw(good_sets(inodes=INODES, plain=False)) for _ in range(draw(st.integers(0, 3)))]
    sets = [first, *(keys for keys in later if keys)]
    shuffled = draw(st.permutations(draw(good_sets(inodes=INODES, plain=False))))
    start = draw(st.sampled_from([0, 0, 0, 8, 30, 5 << INODE_SHIFT]))
    end = draw(st.sampled_from([MAX_POS, MAX_POS, MAX_POS, 5 << INODE_SHIFT | 60, 60]))
    return sets, journal_of(list(shuffled)), (start, end)


@settings(max_examples=400)
@given(leaves())
def test_what_is_said_about_any_leaf(leaf: tuple[list[list[Key]], Extents, tuple[int, int]]) -> None:
    sets, journal, (start, end) = leaf
    event(f"known: {compare(sets, journal, GENS, start, end)}")


@settings(max_examples=400)
@given(leaves(), st.data())
def test_wrong_keys(leaf: tuple[list[list[Key]], Extents, tuple[int, int]], data: st.DataObject) -> None:
    sets, journal, (start, end) = leaf
    places = [(number, row) for number, keys in enumerate(sets) for row in range(len(keys))]
    if not places:
        return
    for number, row in data.draw(st.lists(st.sampled_from(places), min_size=1, max_size=2, unique=True)):
        sets[number][row] = data.draw(wrong(sets[number][row]))
    tail = data.draw(st.sampled_from([0] * 9 + [1])) if sets[-1] else 0
    event(f"known: {compare(sets, journal, GENS, start, end, tail)}")


@settings(max_examples=150)
@given(leaves(), st.lists(st.integers(0, 255), min_size=GEOMETRY.nbuckets, max_size=GEOMETRY.nbuckets))
def test_any_generations(leaf: tuple[list[list[Key]], Extents, tuple[int, int]], gens: list[int]) -> None:
    sets, journal, (start, end) = leaf
    compare(sets, journal, np.array(gens, np.uint8), start, end)


@contextmanager
def device(nodes: list[bytes]) -> Iterator[int]:
    """A descriptor that has the nodes, each in a bucket of its own."""
    fd = os.memfd_create("nodes")
    try:
        for number, data in enumerate(nodes):
            os.pwrite(fd, data, number * 64 << 9)
        yield fd
    finally:
        os.close(fd)


def counting(nodes: list[bytes], gens: np.ndarray[tuple[int], np.dtype[np.uint8]], journal: Extents,
             fd: int = -1) -> Tallier:
    """A tallier that counts, as a compiled one does, by a descriptor if there is one."""
    made = Tallier(lambda sector, _count: nodes[sector // 64], GEOMETRY, MAGIC, gens, journal, fd)
    made.scan = CountingScan(GEOMETRY, gens, rows_of(journal), MAGIC, crc64_address())
    made.can_count = True
    return made


TAILS = ("nothing", "older", "number", "version", "magic", "long", "empty", "short")


def with_tail(sets: list[list[Key]], tail: str) -> tuple[bytearray, int]:
    """A leaf with something behind its log, and the bytes of the log."""
    made = bytearray(node(sets))
    log_bytes = len(bytes(made).rstrip(b"\0")) + 511 & ~511
    if tail == "nothing" or log_bytes + 512 > len(made):
        return made, log_bytes
    words = [word for key in row_of_keys(0 if tail == "empty" else 2) for word in key.words()]
    later = bytearray(encode_bset(struct.pack(f"<{len(words)}Q", *words), magic=MAGIC, seed=PLACE_PTR,
                                  seq=SEQ - 1 if tail == "older" else SEQ, block_bytes=512))
    if tail == "version":
        # One whose checksum does not begin at the pointer.
        later[24] = 0
        later[:8] = struct.pack("<Q", crc64(later[8:32 + 8 * len(words)]))
    elif tail == "magic":
        later[8] ^= 1
    elif tail == "long":
        later[30] = 255
    elif tail == "short":
        later[28] -= 1
    if tail != "older":
        later[16] ^= 3
    made[log_bytes:log_bytes + len(later)] = later
    return made, log_bytes


def counted_alike(data: bytearray, journal: Extents, start: int, end: int) -> object:
    """What counting says of a leaf, with a descriptor and without."""
    nodes = [b"", bytes(data)]
    places = [Place(64, PLACE_PTR, GEOMETRY.node_sectors, start, end)]
    with device(nodes) as fd:
        [with_fd], [without] = (counting(nodes, GENS, journal, each).count(places) for each in (fd, -1))
    assert repr(with_fd) == repr(without)
    return without


@settings(max_examples=400)
@given(leaves(), st.data())
def test_what_checksums_say(leaf: tuple[list[list[Key]], Extents, tuple[int, int]], data: st.DataObject) -> None:
    """With a descriptor, checksums and what stands behind the log are judged as without."""
    sets, journal, (start, end) = leaf
    good, log_bytes = with_tail(sets, data.draw(st.sampled_from(TAILS)))
    for at in data.draw(st.lists(st.integers(0, log_bytes + 511), max_size=1)):
        if at < len(good):
            good[at] ^= data.draw(st.integers(1, 255))
    event(type(counted_alike(good, journal, start, end)).__name__)


@pytest.mark.parametrize("tail", TAILS)
def test_a_set_behind_the_log(tail: str) -> None:
    good, _log_bytes = with_tail([row_of_keys(10)], tail)
    is_counted = isinstance(counted_alike(good, NONE, 0, MAX_POS), np.ndarray)
    # Only one whose checksum is right but for its number may be of the node.
    assert is_counted == (tail not in ("number", "version"))


@settings(max_examples=400)
@given(st.lists(leaves(), min_size=1, max_size=3), st.lists(st.sampled_from([0] * 40 + [1, 2, 47, 48, 49, 100]),
                                                            min_size=GEOMETRY.nbuckets, max_size=GEOMETRY.nbuckets),
       st.booleans())
def test_leaves_that_are_counted(some: list[tuple[list[list[Key]], Extents, tuple[int, int]]], rise: list[int],
                                 by_fd: bool) -> None:
    """What leaves hold together is what their tallies say that are made when all generations are known."""
    journal, ranges = some[0][1], [place for _sets, _journal, place in some]
    nodes = [b"", *(node(sets) for sets, _journal, _place in some)]
    places = [Place((index + 1) * 64, PLACE_PTR, GEOMETRY.node_sectors, start, end)
              for index, (start, end) in enumerate(ranges)]

    gens = GENS + np.array(rise, np.uint8)
    with device(nodes) as fd:
        counted = Counted([counting(nodes, GENS, journal, fd if by_fd else -1) for _ in range(2)], GENS, 0)
        said = [each for tallier, piece in zip(counted.talliers, (places[:2], places[2:]), strict=True)
                for each in tallier.count(piece)]
    is_settled = counted.settle(gens)
    event(f"settled: {is_settled}")
    if not is_settled:
        return
    columns = counting(nodes, gens, journal)
    columns.scan = None
    expected = [columns.tally(place) for place, what in zip(places, said, strict=True) if isinstance(what, np.ndarray)]
    assert counted.extents == sum(tally.extents for tally in expected if tally is not None)
    assert counted.dirty_sectors == sum(tally.dirty_sectors for tally in expected if tally is not None)
    assert counted.clean_sectors == sum(tally.clean_sectors for tally in expected if tally is not None)
    dirty: dict[int, Spread] = {}
    taken: list[int] = []
    for tally in expected:
        assert tally is not None
        dirty = joined_spreads(dirty, tally.dirty)
        taken += [sector for word in tally.taken.tolist()
                  for sector in range(word >> RUN_BITS, (word >> RUN_BITS) + (word & RUN_MASK))]
    assert counted.dirty == dirty
    assert len(taken) == len(set(taken))
    assert np.flatnonzero(counted.used).tolist() == sorted({sector // 64 for sector in taken})


def row_of_keys(count: int) -> list[Key]:
    """Keys with gaps between them, every other one dirty."""
    return [Key(0, 8 * number + 8, 4, number % 2 == 1, ptr_of(4 + number // 8, number % 8 * 8, 10))
            for number in range(count)]


NONE = extent.empty()
OVER = [Key(0, 30, 20, True, ptr_of(30, 0, 10)), Key(0, 70, 8, False, None), Key(0, 90, 8, False, ptr_of(31, 3, 11))]
ZEROED = Key(0, 3, 0, False, None)


@pytest.mark.parametrize("sets", [
    [row_of_keys(60)],
    [row_of_keys(60), OVER],
    [[*row_of_keys(20), Key(0, 1000, 100, False, None), Key(5, 40, 10, True, ptr_of(33, 0, 10))], OVER],
    [[*row_of_keys(20), Key(0, 1000, 8, False, ptr_of(33, 0, 9)), Key(0, 1010, 8, True, ptr_of(33, 8, 12))]],
    [[Key(0, 8 * number + 8, 8, False, ptr_of(4, 8 * number, 10)) for number in range(24)]],    # three full buckets
    [[Key(0, 8, 8, False, ptr_of(4, 0, 10))]],
    [[Key(0, 64, 64, True, ptr_of(4, 0, 10))]],
    [[], row_of_keys(3)],
    [row_of_keys(60), [Key(0, 70, 4, False, ptr_of(5, 0, 0, PTR_CHECK_DEV) | 1 << 63)]],
])
def test_good_leaves_are_known(sets: list[list[Key]]) -> None:
    assert compare(sets, NONE, GENS, 0, MAX_POS)
    assert compare([*sets, [Key(0, 86, 30, False, ptr_of(32, 0, 10))]], journal_of(row_of_keys(9)), GENS, 0, MAX_POS)


@pytest.mark.parametrize("key", [
    Key(0, 1000, 8, False, ptr_of(33, 0, 160)),             # too stale
    Key(0, 1000, 8, False, ptr_of(33, 60, 10)),             # crosses its bucket
    Key(0, 470, 8, False, ptr_of(33, 0, 10)),               # out of order
    Key(0, 482, 8, False, ptr_of(33, 0, 10)),               # overlaps
    Key(0, 1000, 8, False, ptr_of(1, 0, 10)),               # in the reserved
    Key(0, 1000, 8, False, ptr_of(40, 0, 10)),              # beyond the device
    Key(0, 2001, 8, False, ptr_of(33, 0, 10)),              # beyond the leaf
    Key(0, 1 << 44 | 1000, 8, False, ptr_of(33, 0, 10)),    # beyond 8 PiB
    Key(5, 4, 8, False, ptr_of(33, 0, 10)),                 # larger than its offset
    Key(0, 1000, 8, False, ptr_of(33, 0, 10) | 1 << 63),    # a bit that no kernel looks at
    Key(0xFFFFF, 1000, 8, False, ptr_of(33, 0, 10)),        # the last device number
    Key(0, 1000, 8, False, ptr_of(33, 0, 10), 1 << 61),     # three pointers
    Key(0, 1000, 8, False, None, 1 << 60),                  # runs past the end
    Key(0, 1000, 0, False, None, 1 << 60),
])
def test_one_key_that_speaks_against_a_leaf(key: Key) -> None:
    good, end = row_of_keys(60), 5 << INODE_SHIFT | 2000 if key.inode == 5 else 2000
    ends = 1 << INODE_SHIFT | 1200 if key.end >> INODE_SHIFT else end
    assert compare([good], NONE, GENS, 0, ends)
    assert not compare([[*good, key]], NONE, GENS, 0, ends)
    assert not compare([[ZEROED, *good, key]], NONE, GENS, 0, ends)
    assert not compare([good, [*good, key]], NONE, GENS, 0, ends)
    if key.ptr is not None and key.size:
        # Nor if it is hidden.
        assert not compare([good, [*good, key], [key._replace(ptr=None, flip=0)]], NONE, GENS, 0, ends)


def test_a_key_with_two_pointers() -> None:
    two = [Key(0, 1000, 8, False, ptr_of(33, 0, 10), 3 << 60), Key(0, 0, 0, False, None)]
    words = [word for key in two for word in key.words()][:4]
    assert words[0] >> 60 & 7 == 2
    assert not compare([row_of_keys(60), two], NONE, GENS, 0, MAX_POS, tail=1)
    assert not compare([two], NONE, GENS, 0, MAX_POS, tail=1)


def test_data_that_was_reused() -> None:
    stale = Key(0, 1000, 8, True, ptr_of(33, 0, 9))
    assert not compare([[*row_of_keys(60), stale]], NONE, GENS, 0, MAX_POS)
    assert not compare([row_of_keys(60), [stale]], NONE, GENS, 0, MAX_POS)
    assert not compare([row_of_keys(60)], journal_of([stale]), GENS, 0, MAX_POS)
    assert compare([row_of_keys(60)], journal_of([stale._replace(dirty=False)]), GENS, 0, MAX_POS)
    assert not compare([row_of_keys(60)], journal_of([Key(0, 1000, 8, False, ptr_of(33, 0, 160))]), GENS, 0, MAX_POS)
    # Hidden, it costs nothing.
    assert compare([[*row_of_keys(60), stale], [stale._replace(ptr=None)]], NONE, GENS, 0, MAX_POS)


def test_what_may_be_a_node_of_pointers() -> None:
    pointers = [Key(0, 100 * number, 64, False, ptr_of(4 + number, 0, 10)) for number in range(1, 5)]
    assert not compare([pointers], NONE, GENS, 0, MAX_POS)
    assert not compare([[ZEROED, *pointers]], NONE, GENS, 0, MAX_POS)
    assert not compare([pointers, pointers], NONE, GENS, 0, MAX_POS)
    assert compare([pointers, [pointers[2]._replace(size=63)]], NONE, GENS, 0, MAX_POS)
    assert compare([[*pointers[:3], pointers[3]._replace(size=63)]], NONE, GENS, 0, MAX_POS)


def test_limits() -> None:
    count = JOURNAL_ROWS_MAX + 1
    start = 2 * np.arange(count).astype(np.uint64)
    many = Extents(start, start + np.uint64(1), np.ones(count, np.bool_), np.ones(count, np.uint8),
                   np.full(count, ptr_of(30, 0, 10), np.uint64), np.zeros(count, np.uint8))
    assert not compare([row_of_keys(60)], many, GENS, 0, MAX_POS)
    assert compare([row_of_keys(60)], many, GENS, 0, 2 * JOURNAL_ROWS_MAX)
    volumes = [Key(inode, 8, 8, True, ptr_of(30, inode, 10)) for inode in range(SPREADS_MAX + 1)]
    assert compare([volumes[1:]], NONE, GENS, 0, MAX_POS)
    assert not compare([volumes], NONE, GENS, 0, MAX_POS)
