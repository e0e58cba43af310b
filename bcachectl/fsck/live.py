# SPDX-License-Identifier: GPL-2.0-only
"""The live map of a set that has been walked: `leaf_extents`, `lookup`; how far its pointers are behind, `staleness`.

`bcachectl.fsck.walk` must be through: only then is it known which extents are stale.  The leaves are read once more,
one after the other: the sets of a leaf, newer over older, and the journal's keys on top.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from bcachectl.errors import BcachectlError
from bcachectl.fsck import extents as extent
from bcachectl.fsck.extents import Extents
from bcachectl.fsck.records import Slot
from bcachectl.fsck.walk import Walk
from bcachectl.ondisk import validity
from bcachectl.ondisk.bkey import MAX_POS, PTR_DEV, PTR_GEN, PTR_OFFSET, ptr_make
from bcachectl.ondisk.bset import BsetImage, decode_node
from bcachectl.ondisk.magic import bset_magic


def leaf_extents(walk: Walk, *, with_journal: bool = True) -> Iterator[tuple[Slot, Extents]]:
    """Each leaf's live extents, in key order, as a start of the set would find them: no holes, check keys or
    stale extents.  Where a leaf is damaged there are those of the journal alone."""
    for slot in _slots_and_gaps(walk):
        yield slot, _live(walk, slot, with_journal=with_journal)


def lookup(walk: Walk, *, start: int, end: int) -> Extents:
    """The live extents that touch positions [start, end), whole, joined where the kernel joins keys."""
    parts = [_live(walk, slot, with_journal=True) for slot in _slots_and_gaps(walk)
             if slot.start < end and start < slot.end]
    joined = extent.merge(extent.concatenate(parts), bucket_size_sectors=walk.geometry.bucket_size_sectors)
    return joined.take((joined.end > np.uint64(start)) & (joined.start < np.uint64(end)))


def staleness(walk: Walk, extents: Extents) -> npt.NDArray[np.uint8]:
    """How many generations each extent's pointer is behind its bucket; 0 for holes and check keys."""
    bucket = (PTR_OFFSET.get(extents.ptr) // walk.geometry.bucket_size_sectors).astype(np.intp)
    ahead = walk.gens[np.minimum(bucket, len(walk.gens) - 1)] - PTR_GEN.get(extents.ptr).astype(np.uint8)
    ahead[(ahead > 128) | _no_data(extents)] = 0
    return ahead


def too_stale(walk: Walk, extents: Extents) -> npt.NDArray[np.bool_]:
    """Which extents are so far behind their bucket that the kernel would fail the set: "key too stale"."""
    return staleness(walk, extents) > validity.BUCKET_GC_GEN_MAX


def _live(walk: Walk, slot: Slot, *, with_journal: bool) -> Extents:
    merged = extent.empty()
    if slot.leaf is not None:
        for image in _reread(walk, slot):
            sound = extent.without(image.keys, validity.extents_fatal(image.keys, walk.geometry))
            merged = extent.overlay(merged, extent.flatten(extent.from_keys(sound)))
    if with_journal:
        merged = extent.overlay(merged, extent.clip(walk.journal_map, start=slot.start, end=slot.end))
    return merged.take(~(_no_data(merged) | (staleness(walk, merged) > 0)))


def _slots_and_gaps(walk: Walk) -> Iterator[Slot]:
    at = 0
    for slot in walk.slots:
        if slot.start > at:
            yield Slot(at, slot.start, None, 0)
        yield slot
        at = slot.end
    if at < MAX_POS and walk.superblock is not None:
        yield Slot(at, MAX_POS, None, 0)


def _reread(walk: Walk, slot: Slot) -> list[BsetImage]:
    assert slot.leaf is not None and walk.superblock is not None
    block_bytes = walk.geometry.block_bytes
    try:
        sets, _written = decode_node(
            walk.read(slot.leaf.sector, slot.nsectors), magic=bset_magic(walk.superblock.set_uuid),
            seed=ptr_make(slot.leaf.sector, slot.leaf.gen, slot.leaf.dev), block_bytes=block_bytes,
            node_blocks=(slot.nsectors << 9) // block_bytes, where="")
    except BcachectlError:
        # It was good a moment ago: somebody writes to the device.  The first reading counted it as good.
        return []
    return sets


def _no_data(extents: Extents) -> npt.NDArray[np.bool_]:
    # Holes, and keys of cache misses, whose pointer leads to no cache.
    none: npt.NDArray[np.bool_] = (extents.nptrs == 0) | (PTR_DEV.get(extents.ptr) != 0)
    return none
