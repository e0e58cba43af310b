# SPDX-License-Identifier: GPL-2.0-only
"""Rules about one structure at a time: superblock, prio sets, uuid array, btree nodes, generations.

What more than one structure is needed for is elsewhere: `bcachectl.fsck.check_sizes`, `bcachectl.fsck.check_journal`,
and `bcachectl.fsck.check` for who claims which bucket and for data.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from bcachectl.errors import BcachectlError
from bcachectl.fsck.findings import Finding
from bcachectl.fsck.records import Node
from bcachectl.fsck.salvage import has_lost_set
from bcachectl.fsck.walk import Walk
from bcachectl.ondisk import validity
from bcachectl.ondisk.bkey import PTR_GEN, PTR_OFFSET, ptr_make
from bcachectl.ondisk.magic import bset_magic
from bcachectl.ondisk.superblock import NBUCKETS_MIN_RUN, SB_SECTOR, Superblock
from bcachectl.ondisk.uuids import FREE, UUID_FLASH_ONLY
from bcachectl.units import counted

PRIO_INITIAL, PRIO_BTREE = 32768, 65535
MARKS_AT_ONCE = 64
"""The pointers of so many leaves are looked at together."""


class Found(NamedTuple):
    """A finding and the positions [start, end) that it makes unreadable; both 0 if it costs no keys."""

    finding: Finding
    start: int = 0
    end: int = 0


def check_superblock(walk: Walk, sb: Superblock) -> Iterator[Finding]:
    """What a superblock says that a kernel takes, but should not have to."""
    def say(code: str, why: str) -> Finding:
        return Finding(code, "superblock", why, sector=SB_SECTOR)

    if sb.unknown_flags:
        yield say("SB_FLAGS", f"unknown flag bits {sb.unknown_flags:#x}")
    if sb.replacement is None:
        yield say("SB_REPLACEMENT", f"flags {sb.flags:#x}")
    if sb.is_obso_large_bucket:
        yield say("SB_OBSO_LARGE_BUCKET", f"feature_incompat {sb.feature_incompat:#x}")
    if sb.discard:
        yield say("SB_DISCARD", "discard is on")
    if walk.geometry.node_sectors < 2 * sb.block_size:
        yield say("SB_NODE_BLOCKS", f"node of {walk.geometry.node_sectors} sectors, block of {sb.block_size}")
    if sb.nbuckets < NBUCKETS_MIN_RUN:
        yield say("SB_TOO_FEW_TO_RUN", counted(sb.nbuckets, "bucket"))
    if not sb.cache_sync:
        yield say("SB_NEVER_RUN", "CACHE_SYNC is 0")


def check_prios(walk: Walk, known_buckets: int) -> Iterator[Finding]:
    """The chain of prio sets, and the priorities of the buckets up to ``known_buckets``."""
    journal = set(walk.superblock.d) if walk.superblock is not None else set()
    for number, bucket in enumerate(walk.prio_buckets):
        where = f"prio set {number} at bucket {bucket}"
        if bucket in walk.prio_buckets[:number]:
            yield Finding("PRIO_LOOP", where, f"bucket {bucket} is in the chain already", bucket)
        if bucket in journal:
            yield Finding("PRIO_INTO_JOURNAL", where, f"bucket {bucket} belongs to the journal", bucket)
    prios = walk.prios[:known_buckets]
    wrong = np.flatnonzero((prios > PRIO_INITIAL) & (prios < PRIO_BTREE))
    if len(wrong):
        yield Finding("PRIO_VALUE", "prio sets", f"{counted(len(wrong), 'bucket')}, the first with priority "
                                                 f"{int(prios[wrong[0]])}", int(wrong[0]))


def check_uuids(walk: Walk) -> Iterator[Finding]:
    """The slots of the uuid array."""
    seen: dict[bytes, int] = {}
    for slot, entry in enumerate(walk.uuids):
        if entry is FREE:
            continue
        where = f"uuid array, slot {slot}"
        if entry.is_free or entry.is_retired:
            if entry.is_free and (entry.sectors or entry.flags or any(entry.label)):
                yield Finding("UUID_FREE_DIRTY", where, "uuid is zero, other fields are not")
            continue
        if entry.uuid in seen:
            yield Finding("UUID_TWICE", where, f"uuid of slot {seen[entry.uuid]}")
        seen.setdefault(entry.uuid, slot)
        if entry.is_flash_only and not entry.is_volume:
            yield Finding("UUID_FLASH_SIZE", where, f"flash-only volume of {counted(entry.sectors, 'sector')}")
        if entry.sectors and not entry.is_flash_only:
            yield Finding("UUID_SECTORS", where, counted(entry.sectors, "sector"))
        if entry.flags & ~UUID_FLASH_ONLY.mask:
            yield Finding("UUID_FLAGS", where, f"flags {entry.flags:#x}")


def check_node(walk: Walk, node: Node) -> Iterator[Found]:
    """A btree node that was read: sets that cannot be seen any more, pointers, the order and range of its keys."""
    assert walk.superblock is not None
    where, sector = f"btree node at bucket {node.bucket}, level {node.level}", walk.geometry.sector_of(node.bucket)
    if node.written_blocks * walk.geometry.block_size_sectors < node.nsectors:
        try:
            buf = walk.read(sector, node.nsectors)
        except BcachectlError:
            buf = b""
        if buf and has_lost_set(buf, written_blocks=node.written_blocks, magic=bset_magic(walk.superblock.set_uuid),
                                seed=ptr_make(sector, node.gen), block_bytes=walk.geometry.block_bytes):
            yield Found(Finding("BTREE_SET_LOST", f"{where}, block {node.written_blocks}", "bad seq or magic",
                                node.bucket, sector), node.start, node.end)
    if node.level:
        yield from _check_interior(walk, node, where)
        return
    for image in node.sets:
        keys = image.keys
        rows = keys.size > 0
        start, end = keys.pos[rows] - keys.size[rows], keys.pos[rows]
        if bool((start[1:] < end[:-1]).any()) and bool((end[1:] >= end[:-1]).all()):
            yield Found(Finding("BTREE_SET_OVERLAP", f"{where}, block {image.block}", "keys overlap", node.bucket,
                                sector), node.start, node.end)
        if bool((start < np.uint64(node.start)).any()) and not validity.extents_fatal(keys, walk.geometry).any():
            yield Found(Finding("BTREE_KEY_BEFORE", f"{where}, block {image.block}", "keys before the leaf's range",
                                node.bucket, sector), int(start.min()), node.start)


def _check_interior(walk: Walk, node: Node, where: str) -> Iterator[Found]:
    inside = np.uint64(walk.geometry.bucket_size_sectors - 1)
    if not any((PTR_OFFSET.get(image.keys.ptr) & inside).any() for image in node.sets):
        return
    for _level, key, start, end in walk.children(node)[0]:
        if key.ptrs[0].sector % walk.geometry.bucket_size_sectors:
            yield Found(Finding("BTREE_PTR_OFFSET", where, f"sector {key.ptrs[0].sector}", node.bucket,
                                key.ptrs[0].sector), start, end)


class GenMarks:
    """How far pointers are ahead of the generations that the prio sets have."""

    def __init__(self, walk: Walk) -> None:
        """``walk`` is at its first node."""
        self.walk, self._disk_gens = walk, walk.gens.copy()
        self._max_ahead: npt.NDArray[np.uint8] = np.zeros(walk.geometry.nbuckets, np.uint8)
        self._marks: list[npt.NDArray[np.uint64]] = []

    def note_node(self, node: Node) -> None:
        """All pointers of a node."""
        for image in node.sets:
            usable = validity.columns_available(image.keys)
            usable &= ~validity.columns_out_of_range(image.keys, self.walk.geometry)
            self._note(image.keys.ptr[usable])

    def note_marks(self, marks: npt.NDArray[np.uint64]) -> None:
        """Those pointers of a plain leaf that are not of their bucket's generation."""
        if len(marks):
            self._marks.append(marks)
            if len(self._marks) == MARKS_AT_ONCE:
                self._note_all()

    def check(self, known_buckets: int) -> Iterator[Finding]:
        """Buckets, up to ``known_buckets``, that are too far behind one of their pointers."""
        self._note_all()
        far = np.flatnonzero(self._max_ahead[:known_buckets] > validity.BUCKET_GC_GEN_MAX)
        for bucket in far.tolist():
            yield Finding("PRIO_GEN", f"prio sets, bucket {bucket}",
                          f"a pointer is {int(self._max_ahead[bucket])} generations ahead", bucket)

    def _note_all(self) -> None:
        self._note(np.concatenate([np.zeros(0, np.uint64), *self._marks]))
        self._marks.clear()

    def _note(self, ptr: npt.NDArray[np.uint64]) -> None:
        if not len(ptr):
            return
        bucket = (PTR_OFFSET.get(ptr) // np.uint64(self.walk.geometry.bucket_size_sectors)).astype(np.intp)
        ahead = PTR_GEN.get(ptr).astype(np.uint8) - self._disk_gens[bucket]
        ahead[ahead >= 128] = 0
        np.maximum.at(self._max_ahead, bucket, ahead)
