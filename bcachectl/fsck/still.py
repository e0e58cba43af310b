# SPDX-License-Identifier: GPL-2.0-only
"""`Still`: the snapshot of a cache set that does not run, read from its cache device alone.

`Still` makes one `Walk` and keeps what a start of the set would find out: which buckets hold metadata, clean or dirty
data and how much, gens and their distance to the oldest pointer, priorities, the journal, and the dirty data of each
volume.  What only a running set has (lists, rates, requests) stays None.  Nothing is written; damage is counted.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from bcachectl import census
from bcachectl.errors import Corrupt, WrongState
from bcachectl.fsck.extents import Extents
from bcachectl.fsck.live import leaf_extents
from bcachectl.fsck.records import Damage, Node
from bcachectl.fsck.walk import Read, Walk
from bcachectl.ondisk import validity
from bcachectl.ondisk.bkey import INODE_SHIFT, PTR_GEN, PTR_OFFSET
from bcachectl.ondisk.superblock import Superblock
from bcachectl.snapshot import (
    AllocatorSnapshot,
    BtreeSnapshot,
    EventSnapshot,
    JournalSnapshot,
    SetSnapshot,
    VolumeSnapshot,
)
from bcachectl.units import format_uuid

DAMAGES_SHOWN = 32
_NEVER = -1000
"""Distance of a bucket that no pointer was seen of."""


class Still:
    """A cache device as it lies there; `snapshot` gives as many cells as are asked for."""

    def __init__(self, path: str, read: Read, size_sectors: int) -> None:
        """Walk the whole device; WrongState if it is no cache device, or one that no set has used."""
        self.path = path
        self.walk = Walk(read, size_sectors)
        self.damages: list[Damage] = []
        self._behind: npt.NDArray[np.int16] = np.zeros(0, np.int16)
        self._gens_before: npt.NDArray[np.uint8] = np.zeros(0, np.uint8)
        self._node_buckets: list[int] = []
        self._node_sectors = 0
        self._walk_structures()
        walk = self.walk
        self.sb = self._superblock()
        count = self.sb.nbuckets
        self.sectors_used: npt.NDArray[np.int64] = np.zeros(count, np.int64)
        self.is_dirty: npt.NDArray[np.bool_] = np.zeros(count, np.bool_)
        self.dirty_sectors: dict[int, int] = {}
        self.keys = 0
        for _slot, extents in leaf_extents(walk):
            self._count(extents)

    def snapshot(self, cells: int) -> SetSnapshot:
        """The set at rest, with a map in ``cells`` cells."""
        sb, walk, geometry = self.sb, self.walk, self.walk.geometry
        state = self._states()
        used = np.minimum(self.sectors_used, 65535).astype(np.uint16)
        counts, buckets = census.census(state, used, bucket_size_sectors=geometry.bucket_size_sectors, cells=cells)
        last_gc = self._last_gc()
        gens = census.gen_snapshot(walk.gens, last_gc, need_gc=0)
        prio = census.prio_snapshot(walk.prios[sb.first_bucket:], bucket_size_sectors=geometry.bucket_size_sectors)
        replacement = sb.replacement
        return SetSnapshot(
            t_ns=0, source="offline", version="", uuid=format_uuid(sb.set_uuid), cache_path=self.path,
            cache_bytes=sb.nbuckets * geometry.bucket_bytes, block_bytes=geometry.block_bytes,
            bucket_bytes=geometry.bucket_bytes, pid=None, uptime_ns=None, failed=None,
            allocator=AllocatorSnapshot(
                nbuckets=sb.nbuckets, first_bucket=sb.first_bucket, bucket_bytes=geometry.bucket_bytes, counts=counts,
                gens=gens, prio=prio, replacement="unknown" if replacement is None else replacement.name.lower(),
                discard=sb.discard,
                in_use_percent=(sb.nbuckets - counts.unused - counts.clean) * 100 // sb.nbuckets),
            map=buckets, gc=None, journal=self._journal(), btree=self._btree(), volumes=self._volumes(),
            events=tuple(EventSnapshot(0, "damage", str(damage)) for damage in self.damages[:DAMAGES_SHOWN]),
            damages=len(self.damages))

    # The walk.

    def _superblock(self) -> Superblock:
        sb = self.walk.superblock
        if sb is None:
            first = self.damages[0]
            raise Corrupt(self.path, f"{first.where}: {first.why}")
        if not sb.is_cache:
            raise WrongState(f"{self.path} is a backing device; name the cache device of its set")
        if not sb.cache_sync:
            raise WrongState(f"{self.path} is a cache device that no set has used yet; there is nothing to see")
        return sb

    def _walk_structures(self) -> None:
        walk = self.walk
        for found in walk.structures():
            if isinstance(found, Damage):
                if not found.is_harmless:
                    self.damages.append(found)
            elif isinstance(found.value, Node):
                self._note_node(found.value)

    def _note_node(self, node: Node) -> None:
        # Every pointer, fresh or stale, holds last_gc back.  Distances count from the gens of the prio sets, since the
        # walk raises gens as it meets newer pointers.
        walk = self.walk
        if not len(self._behind):
            self._gens_before = walk.gens.copy()
            self._behind = np.full(len(walk.gens), _NEVER, np.int16)
        self._node_buckets.append(node.bucket)
        self._node_sectors = node.nsectors
        for image in node.sets:
            keys = image.keys
            usable = validity.columns_available(keys) & ~validity.columns_out_of_range(keys, walk.geometry)
            ptr = keys.ptr[usable]
            bucket = (PTR_OFFSET.get(ptr) // walk.geometry.bucket_size_sectors).astype(np.intp)
            gen = PTR_GEN.get(ptr).astype(np.uint8)
            behind = (self._gens_before[bucket] - gen).view(np.int8).astype(np.int16)
            np.maximum.at(self._behind, bucket, behind)

    def _last_gc(self) -> npt.NDArray[np.uint8]:
        gens = self.walk.gens
        if not len(self._behind):
            return gens.copy()
        raised = (gens - self._gens_before).astype(np.int16)
        distance = np.where(self._behind == _NEVER, 0, np.maximum(0, self._behind + raised))
        return gens - distance.astype(np.uint8)

    def _count(self, extents: Extents) -> None:
        bucket = (PTR_OFFSET.get(extents.ptr) // self.walk.geometry.bucket_size_sectors).astype(np.intp)
        size = extents.size.astype(np.int64)
        np.add.at(self.sectors_used, bucket, size)
        self.is_dirty[bucket[extents.dirty]] = True
        self.keys += len(bucket)
        inodes = (extents.start >> np.uint64(INODE_SHIFT))[extents.dirty]
        for inode in np.unique(inodes).tolist():
            dirty = int(size[extents.dirty][inodes == inode].sum())
            self.dirty_sectors[inode] = self.dirty_sectors.get(inode, 0) + dirty

    # The parts of the snapshot.

    def _states(self) -> npt.NDArray[np.uint8]:
        walk, newest = self.walk, self.walk.newest
        state = np.full(self.sb.nbuckets, census.STATE_UNUSED, np.uint8)
        state[self.sectors_used > 0] = census.STATE_CLEAN
        state[self.is_dirty] = census.STATE_DIRTY
        metadata = [*self._node_buckets, *walk.prio_buckets]
        if newest is not None:
            metadata += [walk.geometry.bucket_of(ptr.sector) for ptr in newest.uuid_bucket.ptrs]
        state[[bucket for bucket in metadata if bucket < self.sb.nbuckets]] = census.STATE_METADATA
        state[:self.sb.first_bucket] = census.STATE_RESERVED
        state[list(self.sb.d)] = census.STATE_RESERVED
        return state

    def _journal(self) -> JournalSnapshot | None:
        replay, njournal = self.walk.replay, len(self.sb.d)
        if not replay:
            return None
        cur_idx, last_idx = replay[-1].index, replay[0].index
        used = (cur_idx - last_idx) % njournal + 1
        return JournalSnapshot(
            seq=replay[-1].jset.seq, last_seq=replay[-1].jset.last_seq, pins=len(replay), pins_size=0,
            njournal=njournal, cur_idx=cur_idx, last_idx=last_idx, free_buckets=njournal - used, blocks_free=0,
            is_full=False, delay_ms=0)

    def _btree(self) -> BtreeSnapshot | None:
        newest = self.walk.newest
        if newest is None:
            return None
        nodes = len(self._node_buckets)
        return BtreeSnapshot(depth=newest.btree_level, nodes_cached=nodes, cache_bytes=nodes * self._node_sectors * 512,
                             limit_bytes=0, dirty_leaves=0, keys_cached=self.keys)

    def _volumes(self) -> tuple[VolumeSnapshot, ...]:
        volumes: list[VolumeSnapshot] = []
        for slot, entry in enumerate(self.walk.uuids):
            if entry.is_free or entry.is_retired:
                continue
            dirty = self.dirty_sectors.get(slot, 0)
            volumes.append(VolumeSnapshot(
                name=f"bcache{len(volumes)}", uuid=format_uuid(entry.uuid), label=entry.label_text,
                kind="flash" if entry.is_flash_only else "cached", slot=slot, size_bytes=entry.sectors * 512,
                state="dirty" if dirty else "clean", mode="", dirty_sectors=dirty, has_dirty=dirty > 0, attached=True))
        return tuple(volumes)
