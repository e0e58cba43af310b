# SPDX-License-Identifier: GPL-2.0-only
"""Repair: `plan_repair` turns a finished `Check` into writes; nothing here writes.

A rebuild is the walk's live map piped into a fresh writer.  Nothing that is in use is overwritten before the switch:

1. fresh leaves, interior nodes, uuid array and prio sets go to buckets that neither data nor any old structure claims;
2. one sector, a journal entry at the head of the next journal bucket, switches to them: it is the newest entry, names
   the new root, uuids and prios, and asks for no replay.  Before it the device is what it was, after it the set is new;
3. the heads of the other journal buckets are cleared, so that nothing of the old journal is ever found again;
4. the superblock; if it needs a repair, a kernel refuses the device until then;
5. the superblocks of backing devices.

Each step is durable before the next begins, so a repair that is interrupted anywhere can be run again.

The live map holds what `salvage` keeps.  Orphaned dirty data is part of it; who owns the data of a slot that the uuid
array has lost is settled by `owners`, and nothing is rebuilt while that is open.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from bcachectl.errors import BcachectlError, WrongState
from bcachectl.fsck.check import Check, run
from bcachectl.fsck.check_backing import Backing, settled_backing
from bcachectl.fsck.check_journal import leftovers
from bcachectl.fsck.check_structures import PRIO_BTREE, PRIO_INITIAL
from bcachectl.fsck.expand import fresh_node_seq, highest_seq
from bcachectl.fsck.extents import Extents
from bcachectl.fsck.findings import CODES, Finding, Severity
from bcachectl.fsck.flags import changes, superblock_there
from bcachectl.fsck.owners import Choice, SlotPlan, flash_sectors, live_extents, slot_plan
from bcachectl.fsck.salvage import bucket_of
from bcachectl.fsck.walk import Walk
from bcachectl.ondisk.bkey import INODE_SHIFT, MAX_POS, encode_key_columns, pack_key, ptr_make
from bcachectl.ondisk.bset import BSET_HEADER_BYTES, encode_bset
from bcachectl.ondisk.jset import encode_jset
from bcachectl.ondisk.magic import INVALID_UUID, bset_magic, jset_magic, prio_magic
from bcachectl.ondisk.prio import encode_prio_set
from bcachectl.ondisk.superblock import (
    SB_BYTES,
    SB_SECTOR,
    BdevState,
    CacheMode,
    Replacement,
    Superblock,
    check_superblock,
    encode_superblock,
    parse_superblock,
)
from bcachectl.ondisk.uuids import UuidEntry, encode_uuids

SEQ_MARGIN = 16
"""Entries that damage hides may be newer than the newest that is seen, by no more than this."""
SEQ_MAX = (1 << 64) - 1
KEY_BYTES = 24
SWITCH_BYTES = 512

REBUILD_PREFIXES = ("JOURNAL_", "PRIO_", "UUID_", "BTREE_", "EXTENT_", "BUCKET_", "ORPHAN_")
NOT_REPAIRED = ("SB_UNUSABLE", "SB_HALF_UUID", "SB_FEATURE", "SB_OBSO_LARGE_BUCKET", "SB_NODE_BLOCKS",
                "SB_TOO_FEW_TO_RUN", "SB_BLOCK_ABOVE_PAGE", "SB_BLOCK_BELOW_DEVICE", "JOURNAL_EMPTY", "JOURNAL_IO")
BACKING_REPAIRED = ("BACKING_CSUM", "BACKING_OFFSET", "BACKING_MODE", "BACKING_CLEAN_DIRTY")


@dataclass(frozen=True, slots=True)
class RepairWrite:
    """One write: to the cache device (``device`` empty) or to the backing device of that name."""

    device: str
    offset_bytes: int
    data: bytes
    what: str


class Repair(NamedTuple):
    """Steps of writes, each durable before the next, and the findings that they end and that they leave.

    ``choices`` are slots with data and without an owner, and what becomes of each.
    """

    steps: tuple[tuple[RepairWrite, ...], ...]
    repaired: tuple[Finding, ...]
    left: tuple[Finding, ...]
    choices: tuple[Choice, ...] = ()


class _Node(NamedTuple):
    # A fresh node: where it covers up to, and the word that points to it.
    end: int
    ptr: int


def plan_repair(check: Check, *, safe_only: bool, assign: Mapping[int, bytes] | None = None) -> Repair:
    """What it takes to make a checked set good; with ``safe_only`` only what loses nothing and guesses nothing.

    ``assign`` is what `slot_plan` takes; WrongState if there is no such slot.
    """
    serious = [finding for finding in check.findings if finding.severity > Severity.NOTE]
    wanted = [finding for finding in serious if is_repairable(finding) and (finding.is_safe or not safe_only)]
    rebuild = [finding for finding in serious if finding.code.startswith(REBUILD_PREFIXES)]
    is_whole = all(finding in wanted for finding in rebuild) and _can_rebuild(check)
    slots: SlotPlan | None = None
    if rebuild and _can_rebuild(check):
        complete = _with_all_entries(check)
        live = live_extents(complete)
        slots = slot_plan(complete, live, assign or {})
        is_whole &= slots.is_decided and not (safe_only and any(choice.dirty_sectors for choice in slots.choices))
    elif assign:
        raise WrongState("--assign gives slots with data and without an owner to devices, and there are none here")
    if rebuild and not is_whole:
        wanted = [finding for finding in wanted if finding not in rebuild]
    elif slots is not None:
        # The new array has a slot for them.
        wanted += [finding for finding in serious if finding.code == "BACKING_FORGOTTEN"
                   and finding.device not in slots.forgotten]
    unsettled = {backing.name for backing in check.backings if _is_unsettled(check, backing)}
    wanted = [finding for finding in wanted if finding.device not in unsettled or not finding.device]
    superblock: tuple[RepairWrite, ...] = ()
    if any(finding.code.startswith("SB_") for finding in wanted):
        superblock = _superblock_write(check)
        wanted = [finding for finding in wanted if superblock or not finding.code.startswith("SB_")]
    steps: list[tuple[RepairWrite, ...]] = []
    if rebuild and is_whole and slots is not None:
        steps.extend(_Rebuild(complete, live, slots).steps())
        superblock = superblock or _superblock_as_it_is(check)
    steps.append(superblock)
    steps.extend(_backing_writes(check, [finding for finding in wanted if finding.code in BACKING_REPAIRED]))
    return Repair(tuple(step for step in steps if step), tuple(wanted),
                  tuple(finding for finding in serious if finding not in wanted),
                  slots.choices if slots is not None else ())


def plan_rebuild(check: Check, *, without: int) -> tuple[tuple[RepairWrite, ...], ...]:
    """The steps of a rebuild of a good set that leaves the extents of one device number out."""
    slots = SlotPlan(tuple(check.walk.uuids), frozenset((without,)), (), ())
    steps = (*_Rebuild(check, live_extents(check), slots).steps(), _superblock_as_it_is(check))
    return tuple(step for step in steps if step)


def is_repairable(finding: Finding) -> bool:
    """Whether any repair ends this finding."""
    if finding.code.startswith("BACKING_"):
        return finding.code in BACKING_REPAIRED
    return finding.code in CODES and finding.code not in NOT_REPAIRED


def offers_repair(check: Check) -> bool:
    """Whether a repair is worth asking for: `plan_repair` tells exactly, for more work."""
    codes = {finding.code for finding in check.findings if finding.severity > Severity.NOTE and is_repairable(finding)}
    is_hopeless = any(finding.code in ("SB_UNUSABLE", "JOURNAL_EMPTY") for finding in check.findings)
    return any(code.startswith("BACKING_") or not is_hopeless for code in codes)


def _can_rebuild(check: Check) -> bool:
    # Not if nothing is known of the tree: a rebuild would make an empty set of it.
    # Nor behind an entry whose number leaves no room for a newer one.
    walk = check.walk
    if walk.newest is None or highest_seq(walk) + SEQ_MARGIN > SEQ_MAX:
        return False
    return check.lost_positions < MAX_POS or check.totals.extents > 0


def _with_all_entries(check: Check) -> Check:
    # If valid entries lie behind a damaged one, what counts is the state with them.
    if not any(finding.code == "JOURNAL_CSUM" for finding in check.findings):
        return check
    walk = check.walk
    return run(Check(walk.read, walk.size_sectors, check.backings, instead=check.instead,
                     more=list(leftovers(walk))))


def _superblock_write(check: Check) -> tuple[RepairWrite, ...]:
    walk = check.walk
    base: bytes | None = None
    try:
        base = walk.read(SB_SECTOR, SB_BYTES >> 9)
    except BcachectlError:
        pass
    sb = check.instead or walk.superblock
    if sb is None or any(finding.code == "SB_HALF_UUID" for finding in check.findings):
        return ()
    if sb is check.instead and walk.newest is None:
        return ()  # What was given fits, but no kernel runs a set without a journal, and more may come to light.
    if sb.replacement is None:
        sb = sb.with_replacement(Replacement.LRU)
    try:
        check_superblock(sb, device_sectors=walk.size_sectors, for_kernel=False)
    except BcachectlError:
        return ()  # Nothing is known that would be better.
    words = ", ".join(changes(superblock_there(walk.read), sb))
    return (RepairWrite("", SB_SECTOR << 9, encode_superblock(sb, base), f"superblock{words and ': '}{words}"),)


def _superblock_as_it_is(check: Check) -> tuple[RepairWrite, ...]:
    # Written again for the undo file's sake: whoever runs the set changes it (seq, last_mount), and perhaps no other
    # sector of those that a rebuild writes.  An undo sees by it that the set ran since, and would throw that away.
    try:
        raw = check.walk.read(SB_SECTOR, SB_BYTES >> 9)
    except BcachectlError:
        return ()
    return (RepairWrite("", SB_SECTOR << 9, bytes(raw), "superblock, as it is"),)


def _backing_writes(check: Check, findings: Sequence[Finding]) -> Iterator[tuple[RepairWrite, ...]]:
    for backing in check.backings:
        codes = [finding.code for finding in findings if finding.device == backing.name]
        if codes:
            yield (_backing_write(check, backing, codes),)


def _is_unsettled(check: Check, backing: Backing) -> bool:
    # Its superblock fails its checksum, and nothing tells what it said.
    has_bad_csum = any(finding.code == "BACKING_CSUM" and finding.device == backing.name for finding in check.findings)
    return has_bad_csum and settled_backing(check.walk, backing, check).superblock is None


def _backing_write(check: Check, backing: Backing, codes: Sequence[str]) -> RepairWrite:
    raw = backing.read(SB_SECTOR, SB_BYTES >> 9)
    was = parse_superblock(raw)
    settled = settled_backing(check.walk, backing, check) if "BACKING_CSUM" in codes else None
    sb = replace(was if settled is None or settled.superblock is None else settled.superblock, offset=SB_SECTOR)
    if sb.cache_mode is None:
        sb = sb.with_cache_mode(CacheMode.WRITETHROUGH)
    if "BACKING_CLEAN_DIRTY" in codes:
        assert check.walk.superblock is not None
        sb = replace(sb.with_state(BdevState.DIRTY), set_uuid=check.walk.superblock.set_uuid)
    if sb.keys != len(sb.d):
        sb = replace(sb, keys=len(sb.d))
    words = ", ".join(changes(was, sb))
    return RepairWrite(backing.name, SB_SECTOR << 9, encode_superblock(sb, raw),
                       f"backing superblock{words and ': '}{words}")


class _Rebuild:
    # The writes of a rebuild, made front to back.

    def __init__(self, check: Check, live: Extents, slots: SlotPlan) -> None:
        self.check, self.slots = check, slots
        self.walk: Walk = check.walk
        assert self.walk.superblock is not None and self.walk.newest is not None
        self.sb: Superblock = self.walk.superblock
        self.newest = self.walk.newest
        self.geometry = self.walk.geometry
        self.gens: npt.NDArray[np.uint8] = self.walk.gens.copy()
        inodes = live.start >> np.uint64(INODE_SHIFT)
        kept = (inodes < np.uint64(len(slots.entries))) & ~np.isin(inodes, sorted(slots.dropped))
        self.extents = live.take(kept)
        self.metadata: list[int] = []
        self.free = self._free_buckets()
        self.writes: list[RepairWrite] = []
        self.highest = highest_seq(self.walk)
        self.seq = self.highest + SEQ_MARGIN

    def steps(self) -> list[tuple[RepairWrite, ...]]:
        root, level = self._tree()
        uuid_bucket = self._write_uuids()
        prio_bucket = self._write_prios()
        fresh = tuple(self.writes)
        cur = max(self.walk.journal, key=lambda entry: entry.jset.seq).index
        index = (cur + 1) % len(self.sb.d)
        jset = encode_jset(
            seq=self.seq, last_seq=self.seq, uuid_bucket=uuid_bucket, btree_level=level, prio_bucket0=prio_bucket,
            btree_root=pack_key(MAX_POS, self.geometry.node_sectors, False, root.ptr), keys=b"",
            magic=jset_magic(self.sb.set_uuid), block_bytes=self.geometry.block_bytes)
        switch = RepairWrite("", self._offset(self.sb.d[index]), bytes(jset[:SWITCH_BYTES]),
                             f"journal entry {self.seq} at the head of journal bucket {index}: the switch")
        clear = tuple(RepairWrite("", self._offset(bucket), bytes(SWITCH_BYTES), f"head of journal bucket {other}")
                      for other, bucket in enumerate(self.sb.d) if other != index and self._is_used(bucket))
        return [fresh, (switch,), clear]

    def _offset(self, bucket: int) -> int:
        return self.geometry.sector_of(bucket) << 9

    def _is_used(self, bucket: int) -> bool:
        try:
            return any(self.walk.read(self.geometry.sector_of(bucket), 1))
        except BcachectlError:
            return True

    # Room.

    def _free_buckets(self) -> list[int]:
        nbuckets = self.geometry.nbuckets
        busy = np.zeros(nbuckets, np.bool_)
        busy[:self.geometry.first_bucket] = True
        busy[[bucket for bucket in (*self.sb.d, *self.check.claims) if bucket < nbuckets]] = True
        dirty = self.extents.take(self.extents.dirty)
        busy[bucket_of(self.walk, self.extents).astype(np.intp)] = True
        free = np.flatnonzero(~busy).tolist()
        need = self._buckets_needed()
        if len(free) < need:
            # Clean data makes room; its backing device has it too.
            held = np.zeros(nbuckets, np.bool_)
            held[bucket_of(self.walk, self.extents).astype(np.intp)] = True
            held[bucket_of(self.walk, dirty).astype(np.intp)] = False
            given = np.flatnonzero(held)[:need - len(free)]
            self.extents = self.extents.take(~np.isin(bucket_of(self.walk, self.extents), given))
            free += given.tolist()
        if len(free) < need:
            raise WrongState(f"a repair needs {need} free buckets on the cache and there are {len(free)}; write the "
                             "dirty data back first, with `bcachectl writeback`")
        return free

    def _buckets_needed(self) -> int:
        leaves = -(-max(len(self.extents.start), 1) // self._keys_per_node())
        return leaves + -(-leaves // (self._keys_per_node() - 1)) + 8 + 1 + self.geometry.prio_buckets

    def _keys_per_node(self) -> int:
        # Two thirds full, so that the set can go on without splitting every leaf at once.
        room = self.geometry.node_bytes - BSET_HEADER_BYTES
        return max(room // KEY_BYTES * 2 // 3, 4)

    def _alloc(self) -> int:
        # What cannot be read is no place for metadata, and its bytes cannot be kept for an undo.
        while self.free and not self._can_be_read(self.free[0]):
            del self.free[0]
        if not self.free:
            raise WrongState("a repair needs more free buckets on the cache that can be read; write the dirty data "
                             "back first, with `bcachectl writeback`")
        bucket = self.free.pop(0)
        self.gens[bucket] += 1
        self.metadata.append(bucket)
        return bucket

    def _can_be_read(self, bucket: int) -> bool:
        sectors = max(self.geometry.node_sectors, self.geometry.meta_sectors)
        try:
            self.walk.read(self.geometry.sector_of(bucket), min(sectors, self.geometry.bucket_size_sectors))
        except BcachectlError:
            return False
        return True

    # The btree.

    def _tree(self) -> tuple[_Node, int]:
        per_node, live = self._keys_per_node(), self.extents
        nodes: list[_Node] = []
        for first in range(0, max(len(live.start), 1), per_node):
            part = live.take(slice(first, first + per_node))
            is_last = first + per_node >= len(live.start)
            keys = encode_key_columns(part.end, part.size.astype(np.uint32), part.dirty, part.nptrs, part.ptr)
            nodes.append(self._write_node(keys, MAX_POS if is_last else int(part.end[-1]), 0))
        level = 0
        while len(nodes) > 1:
            level += 1
            nodes = [self._write_interior(nodes[first:first + per_node], level)
                     for first in range(0, len(nodes), per_node)]
        return nodes[0], level

    def _write_interior(self, children: list[_Node], level: int) -> _Node:
        keys = b"".join(pack_key(child.end, self.geometry.node_sectors, False, child.ptr) for child in children)
        return self._write_node(keys, children[-1].end, level)

    def _write_node(self, keys: bytes, end: int, level: int) -> _Node:
        bucket = self._alloc()
        ptr = ptr_make(self.geometry.sector_of(bucket), int(self.gens[bucket]))
        data = encode_bset(keys, seq=fresh_node_seq(self.walk, self.highest, bucket),
                           magic=bset_magic(self.sb.set_uuid), seed=ptr, block_bytes=self.geometry.block_bytes)
        self.writes.append(RepairWrite("", self._offset(bucket), bytes(data),
                                       f"btree node of level {level} in bucket {bucket}"))
        return _Node(end, ptr)

    # Uuids and prios.

    def _write_uuids(self) -> bytes:
        geometry = self.geometry
        entries = self._uuid_entries()
        bucket = self._alloc()
        self.writes.append(RepairWrite("", self._offset(bucket), encode_uuids(entries, geometry.meta_bytes),
                                       f"uuid array in bucket {bucket}"))
        ptr = ptr_make(geometry.sector_of(bucket), int(self.gens[bucket]))
        return pack_key(0, geometry.meta_sectors, False, ptr)

    def _uuid_entries(self) -> list[UuidEntry]:
        entries = list(self.slots.entries)
        inodes = self.extents.start >> np.uint64(INODE_SHIFT)
        seen: set[bytes] = set()
        for slot, entry in enumerate(entries):
            if entry.is_free or entry.is_retired:
                continue
            if entry.uuid in seen:
                entries[slot] = replace(entry, uuid=INVALID_UUID)
                continue
            seen.add(entry.uuid)
            if entry.is_flash_only:
                own = self.extents.take(inodes == slot)
                end = int(own.end.max()) - (slot << INODE_SHIFT) if len(own.end) else 0
                entries[slot] = flash_sectors(entry, end, self.geometry.block_size_sectors)
        return entries

    def _write_prios(self) -> int:
        geometry = self.geometry
        buckets = [self._alloc() for _ in range(geometry.prio_buckets)]
        prios = self.walk.prios.copy()
        prios[prios > PRIO_INITIAL] = 0
        data = bucket_of(self.walk, self.extents).astype(np.intp)
        prios[data] = np.where(prios[data] == 0, PRIO_INITIAL, prios[data])
        prios[self.metadata] = PRIO_BTREE
        per_bucket, magic = geometry.prios_per_bucket, prio_magic(self.sb.set_uuid)
        for number, bucket in enumerate(buckets):
            rows = slice(number * per_bucket, min((number + 1) * per_bucket, geometry.nbuckets))
            following = buckets[number + 1] if number + 1 < len(buckets) else 0
            raw = encode_prio_set(self.seq, following, prios[rows], self.gens[rows], magic, geometry.meta_bytes)
            self.writes.append(RepairWrite("", self._offset(bucket), bytes(raw),
                                           f"prio set {number} in bucket {bucket}"))
        return buckets[0]
