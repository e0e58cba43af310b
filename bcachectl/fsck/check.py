# SPDX-License-Identifier: GPL-2.0-only
"""`Check`: the rules across all structures of a set, over one walk, as `Finding`s with what they cost.

1. `Check.stages` walks the device and yields its `Progress`; each `Damage` becomes a finding.  Nodes are judged as they
   come and not kept.
2. Rules that need one structure whole: superblock, prio sets, uuid array (`bcachectl.fsck.check_structures`), sizes
   (`bcachectl.fsck.check_sizes`), journal (`bcachectl.fsck.check_journal`).
3. Who claims which bucket: superblock, journal, prio sets, uuid array, btree nodes; then data.
4. Every leaf once more with the journal on top, counted where that is enough (`bcachectl.fsck.leaves`), else read as a
   map (`bcachectl.fsck.salvage`): extents against buckets, against each other, against the uuid array; what is lost
   where something is damaged.
5. Backing devices against all that (`bcachectl.fsck.check_backing`).
6. Each finding gets its losses (`bcachectl.fsck.losses`).

This file is 1, 3 and 4, and the order of all.

No rule may fire on what a power failure leaves behind; the tests hold hundreds of such images against this file.
Limits: at most `FINDINGS_LIMIT` findings are kept; of the data one number per extent is in memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from bcachectl.fsck import extents as extent
from bcachectl.fsck.check_backing import Backing, check_backings, read_backing, slot_of
from bcachectl.fsck.check_journal import check_journal
from bcachectl.fsck.check_sizes import check_sizes
from bcachectl.fsck.check_structures import Found, GenMarks, check_node, check_prios, check_superblock, check_uuids
from bcachectl.fsck.expand import expand
from bcachectl.fsck.extents import Extents
from bcachectl.fsck.fanout import processors
from bcachectl.fsck.findings import Finding, Severity
from bcachectl.fsck.flags import changes, superblock_there
from bcachectl.fsck.lacking import lacking
from bcachectl.fsck.leaves import LEAVES_AT_ONCE, Leaves, overlapping
from bcachectl.fsck.live import staleness
from bcachectl.fsck.losses import UNKNOWN_CODES, with_losses
from bcachectl.fsck.lost_prios import lost_prio_sets, may_be_prio_set
from bcachectl.fsck.records import Damage, JournalEntry, Node, PlainLeaf, Progress, Slot
from bcachectl.fsck.salvage import (
    TAG_CONTRADICTED,
    TAG_DOUBTED,
    LeafMap,
    bucket_of,
    journal_map,
    leaf_map,
    older_keys,
)
from bcachectl.fsck.strays import with_strays
from bcachectl.fsck.tally import Spread
from bcachectl.fsck.walk import Read, Walk
from bcachectl.ondisk.bkey import INODE_SHIFT, MAX_POS, PTR_GEN, PTR_OFFSET, SECTOR_MASK
from bcachectl.ondisk.superblock import SB_SECTOR, Superblock
from bcachectl.ondisk.uuids import FREE
from bcachectl.units import counted

FINDINGS_LIMIT = 10_000
LOST_PRIO_CODES = ("PRIO_PTR", "PRIO_CSUM", "PRIO_MAGIC", "PRIO_IO", "PRIO_LOOP", "PRIO_INTO_JOURNAL")
"""Codes of damage that hides prio sets."""
DAMAGED_PRIO_CODES = ("PRIO_CSUM", "PRIO_MAGIC", "PRIO_IO")
"""Codes of prio sets that are damaged themselves."""


class Totals(NamedTuple):
    """What a set holds and what is lost of it, in sectors."""

    nodes: int
    extents: int
    dirty_sectors: int
    clean_sectors: int
    lost_dirty_sectors: int
    lost_clean_sectors: int


class Check:
    """One check of one set.  Exhaust `stages`; then `findings` and `totals` are complete."""

    def __init__(self, read: Read, size_sectors: int, backings: Sequence[Backing] = (), *,
                 instead: Superblock | None = None, more: Sequence[JournalEntry] = (),
                 fd: int = -1, judges_backings: bool = True) -> None:
        """``instead`` is what to go by if the superblock is damaged, ``more`` journal entries out of normal reach;
        ``fd``, if not -1, is where pread gives what ``read`` does.  Without ``judges_backings`` the backing devices are
        only read where the cache is doubtful."""
        self.walk = Walk(read, size_sectors, instead=instead, more=more, processes=processors(), fd=fd)
        self.instead = instead
        self.backings = tuple(backings)
        self.judges_backings = judges_backings
        self.findings: list[Finding] = []
        self.slots: list[Slot] = []
        self.journal = extent.empty()
        self.dropped: frozenset[tuple[int, int]] = frozenset()
        """Live extents, as (start, first sector), that lie where other data or metadata is; a repair drops them."""
        self.claims: dict[int, str] = {}
        """Buckets of metadata, and whose they are."""
        self.totals = Totals(0, 0, 0, 0, 0, 0)
        self.is_doubtful = False
        """Keys are missing, nobody knows which."""
        self.is_clean_unknown = False
        """More clean data is dropped than `totals` says; nobody knows how much."""
        self.unknown: list[Slot] = []
        """Leaves that nothing, or not all, is known about."""
        self.doubted: list[Slot] = []
        """Ranges of dirty data that is kept, though something newer may have been written back since."""
        self.lost_positions = 0
        """Positions covered by leaves that told nothing at all."""
        self._lost_ranges: list[tuple[int, int]] = []
        self._pending: list[Found] = []
        self._lost: list[Extents] = []
        self._damaged_prios: set[int] = set()
        self._leaves = Leaves(self.walk)
        self._gen_marks: GenMarks | None = None

    @property
    def dirty(self) -> dict[int, Spread]:
        """Live dirty data by device number; `dirty_extents` has it in full."""
        return self._leaves.dirty

    @property
    def used(self) -> npt.NDArray[np.bool_]:
        """Buckets that live data is in."""
        return self._leaves.used

    @property
    def known_buckets(self) -> int:
        """Buckets, from 0 on, whose clean extents can be believed: whose generation the prio sets tell.

        None if keys of the journal are missing: they may have said that any clean extent is out of date.
        """
        walk = self.walk
        if self.is_doubtful:
            return 0
        return min(len(walk.prio_buckets) * walk.geometry.prios_per_bucket, walk.geometry.nbuckets)

    @property
    def worst(self) -> Severity:
        """The severity of the worst finding."""
        return max((finding.severity for finding in self.findings), default=Severity.NOTE)

    def stages(self) -> Iterator[Progress]:
        """Do all of it, telling how far it is."""
        yield from self._structures()
        sb = self.walk.superblock
        if sb is None:
            self._add(Finding("SB_UNUSABLE", "superblock", "no geometry", sector=SB_SECTOR))
        elif sb is self.instead:
            told = [f"{sb.nbuckets} buckets of {sb.bucket_size} sectors", f"blocks of {sb.block_size}",
                    *changes(superblock_there(self.walk.read), sb)]
            self._add(Finding("SB_GUESSED", "superblock", ", ".join(told), sector=SB_SECTOR))
        if sb is not None and sb.is_cache:
            self._add_all(check_superblock(self.walk, sb))
            self._add_all(check_sizes(self.walk, sb))
            if sb.cache_sync and self.walk.newest is not None:
                self._add_all(check_journal(self.walk))
                self.is_doubtful = any(pending.finding.code in UNKNOWN_CODES for pending in self._pending)
                self._add_all(check_prios(self.walk, self.known_buckets))
                self._add_all(check_uuids(self.walk))
                self._claim_fixed()
                yield from self._data()
                self._overlaps()
                if self._gen_marks is not None:
                    self._add_all(self._gen_marks.check(self.known_buckets))
                self._owners()
        if self.judges_backings:
            self._add_all(check_backings(self.walk, self.backings, self))
        self._settle()

    # Findings.

    def _add(self, finding: Finding, start: int = 0, end: int = 0) -> None:
        if len(self._pending) < FINDINGS_LIMIT:
            self._pending.append(Found(finding, start, end))

    def _add_all(self, findings: Iterator[Finding]) -> None:
        for finding in findings:
            self._add(finding)

    def _damage(self, damage: Damage) -> None:
        code = damage.code
        bucket = self.walk.geometry.bucket_of(damage.sector) if damage.sector and self.walk.superblock else None
        if code == "BTREE_PTR" and damage.start < damage.end:
            self._lost_ranges.append((damage.start, damage.end))
        if code == "BTREE_LEVEL" and bucket is not None and damage.where.startswith("btree node"):
            # No free room for a repair: if that is interrupted, the node has to say once more what it is.
            self.claims.setdefault(bucket, "btree node of another level")
        if code == "BTREE_CHILD_TWICE":
            self.unknown.append(Slot(damage.start, damage.end, None, 0))
        key = damage.why.partition("spotted extent ")[2].partition(": bad")[0]
        self._add(Finding(code, damage.where, damage.why, bucket, damage.sector, key), damage.start, damage.end)

    def _settle(self) -> None:
        lost = extent.concatenate(self._lost)
        lost = lost.take(np.argsort(lost.start, kind="stable"))
        size, leaves = lost.size.astype(np.int64), self._leaves
        self.totals = Totals(self.walk.nodes if self.slots else 0, leaves.extents, leaves.dirty_sectors,
                             leaves.clean_sectors, int(size[lost.dirty].sum()), int(size[~lost.dirty].sum()))
        self.findings = with_losses(self._pending, lost, unknown=self.unknown, doubted=self.doubted, volumes=self)

    def volume_name(self, inode: int) -> str:
        """The name of a volume as the other verbs say it, ``slot N`` for a device that the set no longer knows."""
        entries = self.walk.uuids
        if inode >= len(entries) or entries[inode].is_free or entries[inode].is_retired:
            return f"slot {inode}"
        return f"bcache{sum(not entry.is_free and not entry.is_retired for entry in entries[:inode])}"

    def data_offset(self, inode: int) -> int:
        """The sector of a backing device at which its volume begins; 16 if the device was not given."""
        entries = self.walk.uuids
        if inode < len(entries) and entries[inode].is_flash_only:
            return 0
        for backing in self.backings:
            sb, _found = read_backing(backing)
            if sb is not None and slot_of(self.walk, sb.uuid) == inode:
                return sb.data_offset
        return 16

    # One structure at a time.

    def _structures(self) -> Iterator[Progress]:
        walk = self.walk
        for item in walk.structures():
            if isinstance(item, Damage):
                self._damage(item)
            elif isinstance(item.value, Node | PlainLeaf):
                if self._gen_marks is None:
                    self._gen_marks = GenMarks(walk)
                self._claim(item.value.bucket, item.where)
                if isinstance(item.value, Node):
                    for found in check_node(walk, item.value):
                        self._add(*found)
                    self._gen_marks.note_node(item.value)
                else:
                    self._gen_marks.note_marks(item.value.marks)
                    self._leaves.note(item.value)
                if walk.nodes % 64 == 0:
                    yield Progress("btree", walk.nodes, 0)
        yield Progress("btree", walk.nodes, walk.nodes)

    # Buckets.

    def _claim(self, bucket: int, what: str) -> None:
        other = self.claims.setdefault(bucket, what)
        if other == what:
            return
        is_journal = "journal" in other or "journal" in what
        kind = "UUID" if "uuid" in what else "BTREE_PTR" if "btree" in f"{what} {other}" else "PRIO"
        code = f"{kind}_INTO_JOURNAL" if is_journal else "BUCKET_TWICE"
        if code != "PRIO_INTO_JOURNAL":
            self._add(Finding(code, f"bucket {bucket}", f"{what}; and {other}", bucket))

    def _claim_fixed(self) -> None:
        walk = self.walk
        assert walk.superblock is not None and walk.newest is not None
        for index, bucket in enumerate(walk.superblock.d):
            self._claim(bucket, f"journal bucket {index}")
        for number, bucket in enumerate(dict.fromkeys(walk.prio_buckets)):
            self._claim(bucket, f"prio set {number}")
        for ptr in walk.newest.uuid_bucket.ptrs if walk.uuids else ():
            self._claim(walk.geometry.bucket_of(ptr.sector), "uuid array")

    # Data.

    def _data(self) -> Iterator[Progress]:
        walk = self.walk
        slots = yield from expand(walk, self._lost_ranges, self.claims)
        self.slots = with_strays(walk, slots, known_buckets=self.known_buckets)
        self.journal = journal_map(walk)
        self._lacking()
        for slot in self.slots:
            if slot.leaf is None and slot.lost is not None:
                self.claims.setdefault(walk.geometry.bucket_of(slot.lost.sector), "damaged btree node")
            elif slot.leaf is not None:
                # One that was found without its parent is no free room for a repair either.
                self.claims.setdefault(walk.geometry.bucket_of(slot.leaf.sector), "btree leaf")
        metadata = np.zeros(walk.geometry.nbuckets, np.bool_)
        if any(pending.finding.code in LOST_PRIO_CODES for pending in self._pending):
            metadata[lost_prio_sets(walk, self.claims)] = True
        metadata[[bucket for bucket in self.claims if bucket < len(metadata)]] = True
        self._damaged_prios = {pending.finding.bucket for pending in self._pending if pending.finding.bucket is not None
                               and pending.finding.code in DAMAGED_PRIO_CODES
                               and may_be_prio_set(walk, pending.finding.bucket)}
        is_sure = self.known_buckets == walk.geometry.nbuckets
        for number, rest in enumerate(self._leaves.count(self.slots, metadata, is_sure=is_sure)):
            for slot in rest:
                self._leaf(slot, metadata)
            yield Progress("extents", number * LEAVES_AT_ONCE, len(self.slots))
        yield Progress("extents", len(self.slots), len(self.slots))

    def _lacking(self) -> None:
        # Leaves of which a set is gone that the journal tells of.
        missing = lacking(self.walk, self.slots, self.journal, known_buckets=self.known_buckets,
                           backings=self.backings)
        for number, sectors in enumerate(missing):
            if sectors:
                slot = self.slots[number] = self.slots[number]._replace(lacks_set=True)
                assert slot.leaf is not None, "a leaf that lacks something is there"
                self._add(Finding("BTREE_SET_MISSING", "btree leaf", f"{counted(sectors, 'dirty sector')} that the "
                                  "journal tells of are not in it", self.walk.geometry.bucket_of(slot.leaf.sector),
                                  slot.leaf.sector), slot.start, slot.end)

    def _leaf(self, slot: Slot, metadata: npt.NDArray[np.bool_]) -> None:
        found = self._leaf_map(slot)
        if found.is_unknown:
            self.unknown.append(slot)
        self.is_clean_unknown |= found.is_clean_unknown
        self.lost_positions += slot.end - slot.start if found.is_lost else 0
        self._lost.append(found.lost)
        if len(found.strays.start):
            self._strays(found.strays)
        self._leaves.add(found.kept)
        self._judge_places(found.kept, metadata)
        self._judge_stale(found.stale_dirty, found.too_stale)

    def _strays(self, strays: Extents) -> None:
        # Dirty keys that other leaves have in the range of one; what that hides, being out of date, is not among them.
        doubted, lost = strays.take(strays.csum == TAG_DOUBTED), strays.take(strays.csum == TAG_CONTRADICTED)
        pairs = zip(doubted.start.tolist(), doubted.end.tolist(), strict=True)
        self.doubted += [Slot(start, end, None, 0) for start, end in pairs]
        sectors, lost_sectors = int(strays.size.sum()), int(lost.size.sum())
        why = f"{counted(sectors, 'dirty sector')} known by keys outside their leaf"
        self._add(Finding("BTREE_STRAY", "btree leaf", f"{why}, {sectors - lost_sectors} of them kept"),
                  int(strays.start.min()), int(strays.end.max()))

    def _leaf_map(self, slot: Slot) -> LeafMap:
        return leaf_map(self.walk, slot, self.journal, known_buckets=self.known_buckets)

    def dirty_extents(self, inode: int) -> Extents:
        """The live dirty extents of a device number, read from the leaves again."""
        first, last = inode << INODE_SHIFT, inode + 1 << INODE_SHIFT
        parts = [self._leaf_map(slot).kept for slot in self.slots if slot.start < last and first < slot.end]
        return extent.concatenate([part.take(part.dirty & (part.start >> np.uint64(INODE_SHIFT) == inode))
                                   for part in parts])

    def _judge_places(self, kept: Extents, metadata: npt.NDArray[np.bool_]) -> None:
        bucket = bucket_of(self.walk, kept).astype(np.intp)
        for row in np.flatnonzero(metadata[bucket]).tolist():
            # A repair may use the others, but while a key points here it has to stay what it is.
            what = self.claims.setdefault(int(bucket[row]), "prio set that nothing leads to")
            code = "EXTENT_INTO_JOURNAL" if "journal" in what else "EXTENT_IN_METADATA"
            self._add(self._extent_finding(code, kept, row, f"the bucket is that of the {what}"),
                      int(kept.start[row]), int(kept.end[row]))
            self._drop(kept, row)
        for row in np.flatnonzero(np.isin(bucket, list(self._damaged_prios)) & ~metadata[bucket]).tolist():
            # The pointer to the prio set may be what is wrong, or this one.
            start, end = int(kept.start[row]), int(kept.end[row])
            why = "the bucket may be that of a damaged prio set"
            self._add(self._extent_finding("EXTENT_IN_METADATA", kept, row, f"{why}; this one is kept" if
                                           kept.dirty[row] else why), start, end)
            if kept.dirty[row]:
                self.unknown.append(Slot(start, end, None, 0))
            else:
                self._drop(kept, row)

    def _drop(self, extents: Extents, row: int) -> None:
        self.dropped |= {(int(extents.start[row]), int(PTR_OFFSET.get(extents.ptr)[row]))}
        self._lost.append(extents.take(slice(row, row + 1)))

    def _extent_finding(self, code: str, extents: Extents, row: int, why: str) -> Finding:
        start, end = int(extents.start[row]), int(extents.end[row])
        sector, gen = int(PTR_OFFSET.get(extents.ptr)[row]), int(PTR_GEN.get(extents.ptr)[row])
        inode = start >> INODE_SHIFT
        key = f"{inode}:{start & SECTOR_MASK} len {end - start} -> [0:{sector} gen {gen}]"
        return Finding(code, "btree leaf", why, self.walk.geometry.bucket_of(sector), sector,
                       key + (" dirty" if extents.dirty[row] else ""))

    def _judge_stale(self, stale_dirty: Extents, too_stale: Extents) -> None:
        behind = staleness(self.walk, stale_dirty)
        for row in range(len(stale_dirty.start)):
            self._add(self._extent_finding("BTREE_PTR_STALE_DIRTY", stale_dirty, row, f"stale by {int(behind[row])}"),
                      int(stale_dirty.start[row]), int(stale_dirty.end[row]))
        self._lost.append(stale_dirty)
        behind = staleness(self.walk, too_stale)
        for row in range(len(too_stale.start)):
            self._add(self._extent_finding("BTREE_PTR_TOO_STALE", too_stale, row, f"stale by {int(behind[row])}"))

    def _overlaps(self) -> None:
        if self._leaves.shared():
            # What was counted does not say which extents it is.
            self._judge_overlaps(overlapping([self._leaf_map(slot).kept for slot in self.slots]))

    def _judge_overlaps(self, sectors: npt.NDArray[np.uint64]) -> None:
        # The leaves once more, to see which extents these are.  Clean ones give way; of dirty ones the first stays.
        parts = [self._leaf_map(slot).kept for slot in self.slots]
        found = extent.concatenate([part.take(np.isin(PTR_OFFSET.get(part.ptr), sectors)) for part in parts])
        known = extent.overlay(older_keys(self.walk)[0], self.walk.journal_map)
        told = set(zip(known.start.tolist(), known.ptr.tolist(), strict=True))
        pairs = zip(found.start.tolist(), found.ptr.tolist(), strict=True)
        is_told = np.array([pair in told for pair in pairs], np.bool_)
        order = np.lexsort((PTR_OFFSET.get(found.ptr), ~is_told, ~found.dirty, found.csum == TAG_DOUBTED))
        taken: dict[tuple[int, int], int] = {}
        for row in order.tolist():
            first = int(PTR_OFFSET.get(found.ptr)[row])
            last = first + int(found.size[row])
            if found.dirty[row] and not any(start < last and first < end for start, end in taken):
                taken[first, last] = row
                continue
            for kept in (taken[start, end] for start, end in taken if start < last and first < end):
                if not is_told[kept] and found.dirty[kept] and found.dirty[row]:
                    # Nobody knows which of the two it is.
                    start, end = int(found.start[kept]), int(found.end[kept])
                    self.unknown.append(Slot(start, end, None, 0))
                    self._add(self._extent_finding("EXTENT_OVERLAP", found, kept, "another extent uses these sectors; "
                                                                                  "this one is kept"), start, end)
            self._add(self._extent_finding("EXTENT_OVERLAP", found, row, "another extent uses these sectors"),
                      int(found.start[row]), int(found.end[row]))
            self._drop(found, row)

    def may_lack(self, inode: int) -> bool:
        """Whether dirty data of a device number may be missing from ``dirty``, lost or unknown."""
        first, last = inode << INODE_SHIFT, inode + 1 << INODE_SHIFT
        ranges = [(slot.start, slot.end) for slot in self.unknown]
        ranges += [pair for lost in self._lost for pair in zip(lost.start[lost.dirty].tolist(),
                                                               lost.end[lost.dirty].tolist(), strict=True)]
        return self.is_doubtful or any(start < last and first < end for start, end in ranges)

    # Whose the data is.

    def _only_clean(self) -> list[int]:
        # Device numbers that have clean data only, and a free slot or none.  Few leaves can hold any.
        uuids = self.walk.uuids
        is_used = np.array([entry is not FREE and not entry.is_free for entry in uuids], np.bool_)
        free = np.append(np.flatnonzero(~is_used), len(uuids)).astype(np.uint64)
        first, last = (np.array(ends, np.uint64) >> np.uint64(INODE_SHIFT) for ends in (
            [slot.start for slot in self.slots], [max(slot.end, 1) - 1 for slot in self.slots]))
        next_free = free[np.minimum(np.searchsorted(free, first), len(free) - 1)]
        found: set[int] = set()
        for number in np.flatnonzero((next_free <= last) | (last >= len(uuids))).tolist():
            kept = self._leaf_map(self.slots[number]).kept
            found |= set(np.unique(kept.start >> np.uint64(INODE_SHIFT)).tolist())
        return sorted(inode for inode in found if inode not in self.dirty
                      and (inode >= len(uuids) or uuids[inode].is_free))

    def _owners(self) -> None:
        walk = self.walk
        if not walk.uuids:
            return
        for inode in self._only_clean():
            if inode >= len(walk.uuids):
                self._add(Finding("EXTENT_INODE", "btree", f"clean data of device number {inode}; there are "
                                                           f"{len(walk.uuids)} slots"))
            else:
                self._add(Finding("ORPHAN_CLEAN", f"uuid array, slot {inode}", "clean data, the slot is free"))
        for inode, dirty in sorted(self.dirty.items()):
            if inode >= len(walk.uuids):
                self._add(Finding("EXTENT_INODE", "btree", f"{counted(dirty.sectors, 'dirty sector')} of device number "
                                  f"{inode}; there are {len(walk.uuids)} slots"), inode << INODE_SHIFT,
                          min(inode + 1 << INODE_SHIFT, MAX_POS))
                extents = self.dirty_extents(inode)
                for row in range(len(extents.start)):
                    self._drop(extents, row)
                continue
            entry = walk.uuids[inode]
            if entry.is_free or entry.is_retired:
                state = "free" if entry.is_free else "retired"
                self._add(Finding("ORPHAN_DIRTY" if entry.is_free else "ORPHAN_RETIRED", f"uuid array, slot {inode}",
                                  f"{counted(dirty.sectors, 'dirty sector')}, the slot is {state}"))
            elif entry.is_flash_only and dirty.end - (inode << INODE_SHIFT) > entry.sectors:
                self._add(Finding("EXTENT_BEYOND_VOLUME", f"uuid array, slot {inode}",
                                  f"volume of {counted(entry.sectors, 'sector')}"))


def run(check: Check) -> Check:
    """Do all of ``check`` without looking at its progress."""
    for _progress in check.stages():
        pass
    return check
