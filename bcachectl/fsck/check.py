# SPDX-License-Identifier: GPL-2.0-only
"""`Check`: the rules across all structures of a set, over one walk, as `Finding`s with what they cost.

1. `Check.stages` walks the device and yields its `Progress`; each `Damage` becomes a finding.  Nodes are judged
   as they come and not kept.
2. Rules that need one structure whole: superblock, journal, prio sets, uuid array.
3. Who claims which bucket: superblock, journal, prio sets, uuid array, btree nodes; then data.
4. Every leaf once more with the journal on top (`salvage`): extents against buckets, against each other, against the
   uuid array; what is lost where something is damaged.
5. Backing devices against all that (`check_backing`).
6. Each finding gets its losses: those in the range of positions that it makes unreadable.

No rule may fire on what a power failure leaves behind; the tests hold hundreds of such images against this file.
Limits: at most `FINDINGS_LIMIT` findings are kept; of the data one number per extent is in memory.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import islice
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from bcachectl.errors import BcachectlError
from bcachectl.fsck import extents as extent
from bcachectl.fsck.check_backing import Backing, check_backings, read_backing, slot_of
from bcachectl.fsck.check_journal import check_journal
from bcachectl.fsck.check_sizes import check_sizes
from bcachectl.fsck.extents import Extents
from bcachectl.fsck.fanout import processors
from bcachectl.fsck.findings import Finding, Loss, Severity
from bcachectl.fsck.flags import changes, superblock_there
from bcachectl.fsck.live import staleness
from bcachectl.fsck.lost_prios import lost_prio_sets, may_be_prio_set
from bcachectl.fsck.records import Damage, JournalEntry, Node, PlainLeaf, Slot
from bcachectl.fsck.salvage import (
    TAG_CONTRADICTED,
    TAG_DOUBTED,
    TAG_UNKNOWN_GEN,
    LeafMap,
    bucket_of,
    expand,
    has_lost_set,
    journal_map,
    leaf_map,
    older_keys,
)
from bcachectl.fsck.strays import with_strays
from bcachectl.fsck.tally import RUN_BITS, RUN_MASK, Place, Spread, Tally, joined_spreads, run_buckets
from bcachectl.fsck.walk import Read, Walk
from bcachectl.ondisk import validity
from bcachectl.ondisk.bkey import INODE_SHIFT, MAX_POS, PTR_GEN, PTR_OFFSET, SECTOR_MASK, ptr_make
from bcachectl.ondisk.magic import bset_magic
from bcachectl.ondisk.superblock import NBUCKETS_MIN_RUN, SB_SECTOR, Superblock
from bcachectl.ondisk.uuids import FREE, UUID_FLASH_ONLY
from bcachectl.units import counted

FINDINGS_LIMIT = 10_000
UNKNOWN_CODES = ("JOURNAL_GAP", "JOURNAL_CSUM", "JOURNAL_KEYS", "JOURNAL_EMPTY", "BTREE_ROOT_PTR")
"""Codes of damage that may have hit keys anywhere."""
LOST_PRIO_CODES = ("PRIO_PTR", "PRIO_CSUM", "PRIO_MAGIC", "PRIO_IO", "PRIO_LOOP", "PRIO_INTO_JOURNAL")
"""Codes of damage that hides prio sets."""
DAMAGED_PRIO_CODES = ("PRIO_CSUM", "PRIO_MAGIC", "PRIO_IO")
"""Codes of prio sets that are damaged themselves."""
RANGES_LIMIT = 1_000
RUNS_AT_ONCE = 1 << 17
LEAVES_AT_ONCE = 64
PRIO_INITIAL, PRIO_BTREE = 32768, 65535


class Progress(NamedTuple):
    """How far a check is: what it does, how much of it is done, of how much (0: unknown)."""

    what: str
    done: int
    total: int


class _Pending(NamedTuple):
    # A finding and the positions that it makes unreadable.
    finding: Finding
    start: int
    end: int


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
                 fd: int = -1) -> None:
        """``instead`` is what to go by if the superblock is damaged, ``more`` journal entries out of normal reach;
        ``fd``, if not -1, is where pread gives what ``read`` does."""
        self.walk = Walk(read, size_sectors, instead=instead, more=more, processes=processors(), fd=fd)
        self.instead = instead
        self.backings = tuple(backings)
        self.findings: list[Finding] = []
        self.slots: list[Slot] = []
        self.journal = extent.empty()
        self.dirty: dict[int, Spread] = {}
        """Live dirty data by device number; `dirty_extents` has it in full."""
        self.dropped: frozenset[tuple[int, int]] = frozenset()
        """Live extents, as (start, first sector), that lie where other data or metadata is; a repair drops them."""
        self.claims: dict[int, str] = {}
        """Buckets of metadata, and whose they are."""
        self.used: npt.NDArray[np.bool_] = np.zeros(0, np.bool_)
        """Buckets that live data is in."""
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
        self._pending: list[_Pending] = []
        self._lost: list[Extents] = []
        self._damaged_prios: set[int] = set()
        self._plain: dict[int, PlainLeaf] = {}
        self._is_all_plain = self._is_counted = False
        self._counted_places: list[Place] = []
        self._marks: list[npt.NDArray[np.uint64]] = []
        self._taken: list[npt.NDArray[np.uint64]] = []
        self._max_ahead: npt.NDArray[np.uint8] = np.zeros(0, np.uint8)
        self._disk_gens: npt.NDArray[np.uint8] = np.zeros(0, np.uint8)

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
            self._superblock(sb)
            self._add_all(check_sizes(self.walk, sb))
            if sb.cache_sync and self.walk.newest is not None:
                self._add_all(check_journal(self.walk))
                self.is_doubtful = any(pending.finding.code in UNKNOWN_CODES for pending in self._pending)
                self._prios()
                self._uuids()
                self._claim_fixed()
                yield from self._leaves()
                self._overlaps()
                self._gens()
                self._owners()
        self._add_all(check_backings(self.walk, self.backings, self))
        self._settle()

    # Findings.

    def _add(self, finding: Finding, start: int = 0, end: int = 0) -> None:
        if len(self._pending) < FINDINGS_LIMIT:
            self._pending.append(_Pending(finding, start, end))

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
        size = lost.size.astype(np.int64)
        self.totals = self.totals._replace(lost_dirty_sectors=int(size[lost.dirty].sum()),
                                           lost_clean_sectors=int(size[~lost.dirty].sum()))
        unsure = lost.csum == TAG_UNKNOWN_GEN
        is_first_cause = True
        for finding, start, end in self._pending:
            losses: tuple[Loss, ...] = ()
            unknown: tuple[tuple[int, int], ...] = ()
            if start < end:
                is_stray = finding.code == "BTREE_STRAY"
                rows = (lost.start < np.uint64(end)) & (lost.end > np.uint64(start)) & ~unsure
                rows &= (lost.csum == TAG_CONTRADICTED) == is_stray
                losses = self._losses(lost.take(rows))
                ranges = self.doubted + self.unknown if is_stray else self.unknown
                unknown = tuple((max(slot.start, start), min(slot.end, end)) for slot in ranges
                                if slot.start < end and start < slot.end)
            if finding.code in UNKNOWN_CODES or finding.code == "JOURNAL_IO":
                unknown = ((0, MAX_POS),)
            is_cause = finding.code in UNKNOWN_CODES or finding.code.startswith("PRIO_")
            if is_cause and finding.severity is Severity.ERROR and is_first_cause:
                losses, is_first_cause = self._losses(lost.take(unsure)), False
            self.findings.append(replace(finding, losses=losses, unknown=unknown))
        self.findings.sort(key=lambda finding: -finding.severity)

    def _losses(self, lost: Extents) -> tuple[Loss, ...]:
        inodes = lost.start >> np.uint64(INODE_SHIFT)
        return tuple(self._loss(int(inode), lost.take(inodes == inode)) for inode in np.unique(inodes))

    def _loss(self, inode: int, lost: Extents) -> Loss:
        size = lost.size.astype(np.int64)
        offset = self.data_offset(inode)
        dirty = lost.take(lost.dirty)
        ranges: list[tuple[int, int]] = []
        for start, end in zip((dirty.start & np.uint64(SECTOR_MASK)).tolist(),
                              (dirty.end - np.uint64(inode << INODE_SHIFT)).tolist(), strict=True):
            first, last = (start - offset) << 9, (end - offset) << 9
            if ranges and ranges[-1][1] == first:
                ranges[-1] = (ranges[-1][0], last)
            elif len(ranges) < RANGES_LIMIT:
                ranges.append((first, last))
        return Loss(inode, self.volume_name(inode), int(size[lost.dirty].sum()), int(size[~lost.dirty].sum()),
                    tuple(ranges))

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
                if not len(self._disk_gens):
                    self._disk_gens = walk.gens.copy()
                if isinstance(item.value, Node):
                    self._node(item.value)
                else:
                    self._plain_leaf(item.value, item.where)
                if walk.nodes % 64 == 0:
                    yield Progress("btree", walk.nodes, 0)
        self._note_marks()
        yield Progress("btree", walk.nodes, walk.nodes)

    def _superblock(self, sb: Superblock) -> None:
        def say(code: str, why: str) -> None:
            self._add(Finding(code, "superblock", why, sector=SB_SECTOR))

        if sb.unknown_flags:
            say("SB_FLAGS", f"unknown flag bits {sb.unknown_flags:#x}")
        if sb.replacement is None:
            say("SB_REPLACEMENT", f"flags {sb.flags:#x}")
        if sb.is_obso_large_bucket:
            say("SB_OBSO_LARGE_BUCKET", f"feature_incompat {sb.feature_incompat:#x}")
        if sb.discard:
            say("SB_DISCARD", "discard is on")
        if self.walk.geometry.node_sectors < 2 * sb.block_size:
            say("SB_NODE_BLOCKS", f"node of {self.walk.geometry.node_sectors} sectors, block of {sb.block_size}")
        if sb.nbuckets < NBUCKETS_MIN_RUN:
            say("SB_TOO_FEW_TO_RUN", counted(sb.nbuckets, "bucket"))
        if not sb.cache_sync:
            say("SB_NEVER_RUN", "CACHE_SYNC is 0")

    def _prios(self) -> None:
        walk = self.walk
        journal = set(walk.superblock.d) if walk.superblock is not None else set()
        for number, bucket in enumerate(walk.prio_buckets):
            where = f"prio set {number} at bucket {bucket}"
            if bucket in walk.prio_buckets[:number]:
                self._add(Finding("PRIO_LOOP", where, f"bucket {bucket} is in the chain already", bucket))
            if bucket in journal:
                self._add(Finding("PRIO_INTO_JOURNAL", where, f"bucket {bucket} belongs to the journal", bucket))
        prios = walk.prios[:self.known_buckets]
        wrong = np.flatnonzero((prios > PRIO_INITIAL) & (prios < PRIO_BTREE))
        if len(wrong):
            self._add(Finding("PRIO_VALUE", "prio sets", f"{counted(len(wrong), 'bucket')}, the first with priority "
                                                         f"{int(prios[wrong[0]])}", int(wrong[0])))

    def _uuids(self) -> None:
        seen: dict[bytes, int] = {}
        for slot, entry in enumerate(self.walk.uuids):
            if entry is FREE:
                continue
            where = f"uuid array, slot {slot}"
            if entry.is_free or entry.is_retired:
                if entry.is_free and (entry.sectors or entry.flags or any(entry.label)):
                    self._add(Finding("UUID_FREE_DIRTY", where, "uuid is zero, other fields are not"))
                continue
            if entry.uuid in seen:
                self._add(Finding("UUID_TWICE", where, f"uuid of slot {seen[entry.uuid]}"))
            seen.setdefault(entry.uuid, slot)
            if entry.is_flash_only and not entry.sectors:
                self._add(Finding("UUID_FLASH_SIZE", where, "flash-only volume of 0 sectors"))
            if entry.sectors and not entry.is_flash_only:
                self._add(Finding("UUID_SECTORS", where, counted(entry.sectors, "sector")))
            if entry.flags & ~UUID_FLASH_ONLY.mask:
                self._add(Finding("UUID_FLAGS", where, f"flags {entry.flags:#x}"))

    def _node(self, node: Node) -> None:
        walk = self.walk
        assert walk.superblock is not None
        where, sector = f"btree node at bucket {node.bucket}, level {node.level}", walk.geometry.sector_of(node.bucket)
        self._claim(node.bucket, where)
        magic = bset_magic(walk.superblock.set_uuid)
        if node.written_blocks * walk.geometry.block_size_sectors < node.nsectors:
            try:
                buf = walk.read(sector, node.nsectors)
            except BcachectlError:
                buf = b""
            if buf and has_lost_set(buf, written_blocks=node.written_blocks, magic=magic,
                                    seed=ptr_make(sector, node.gen), block_bytes=walk.geometry.block_bytes):
                self._add(Finding("BTREE_SET_LOST", f"{where}, block {node.written_blocks}", "bad seq or magic",
                                  node.bucket, sector), node.start, node.end)
        if node.level:
            self._interior(node, where)
        for image in node.sets:
            keys = image.keys
            self._note_gens(keys.ptr[validity.columns_available(keys)
                                     & ~validity.columns_out_of_range(keys, walk.geometry)])
            if node.level:
                continue
            rows = keys.size > 0
            start, end = keys.pos[rows] - keys.size[rows], keys.pos[rows]
            if bool((start[1:] < end[:-1]).any()) and bool((end[1:] >= end[:-1]).all()):
                self._add(Finding("BTREE_SET_OVERLAP", f"{where}, block {image.block}", "keys overlap", node.bucket,
                                  sector), node.start, node.end)
            if bool((start < np.uint64(node.start)).any()) and not validity.extents_fatal(keys, walk.geometry).any():
                self._add(Finding("BTREE_KEY_BEFORE", f"{where}, block {image.block}", "keys before the leaf's range",
                                  node.bucket, sector), int(start.min()), node.start)

    def _plain_leaf(self, leaf: PlainLeaf, where: str) -> None:
        self._claim(leaf.bucket, where)
        if len(leaf.marks):
            self._marks.append(leaf.marks)
            if len(self._marks) == LEAVES_AT_ONCE:
                self._note_marks()
        self._plain[leaf.place.sector] = leaf

    def _interior(self, node: Node, where: str) -> None:
        walk = self.walk
        inside = np.uint64(walk.geometry.bucket_size_sectors - 1)
        if not any((PTR_OFFSET.get(image.keys.ptr) & inside).any() for image in node.sets):
            return
        for _level, key, start, end in walk.children(node)[0]:
            if key.ptrs[0].sector % walk.geometry.bucket_size_sectors:
                self._add(Finding("BTREE_PTR_OFFSET", where, f"sector {key.ptrs[0].sector}", node.bucket,
                                  key.ptrs[0].sector), start, end)

    def _note_marks(self) -> None:
        self._note_gens(np.concatenate([np.zeros(0, np.uint64), *self._marks]))
        self._marks.clear()

    def _note_gens(self, ptr: npt.NDArray[np.uint64]) -> None:
        walk = self.walk
        if not len(ptr):
            return
        if not len(self._max_ahead):
            self._max_ahead = np.zeros(walk.geometry.nbuckets, np.uint8)
        bucket = (PTR_OFFSET.get(ptr) // np.uint64(walk.geometry.bucket_size_sectors)).astype(np.intp)
        ahead = PTR_GEN.get(ptr).astype(np.uint8) - self._disk_gens[bucket]
        ahead[ahead >= 128] = 0
        np.maximum.at(self._max_ahead, bucket, ahead)

    def _gens(self) -> None:
        far = np.flatnonzero(self._max_ahead[:self.known_buckets] > validity.BUCKET_GC_GEN_MAX)
        for bucket in far.tolist():
            self._add(Finding("PRIO_GEN", f"prio sets, bucket {bucket}",
                              f"a pointer is {int(self._max_ahead[bucket])} generations ahead", bucket))

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
        self.used = np.zeros(walk.geometry.nbuckets, np.bool_)

    # Data.

    def _leaves(self) -> Iterator[Progress]:
        walk = self.walk
        self.slots = with_strays(walk, expand(walk, self._lost_ranges, self.claims), known_buckets=self.known_buckets)
        self.journal = journal_map(walk)
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
        leaves = self._plain_leaves()
        self._is_counted = self._take_counted(leaves, metadata)
        tallied = self._tallied(leaves)
        for number in range(0, len(self.slots), LEAVES_AT_ONCE):
            some = list(islice(tallied, LEAVES_AT_ONCE))
            for slot in self._add_tallies(some, metadata):
                self._leaf(slot, metadata)
            yield Progress("extents", number, len(self.slots))
        yield Progress("extents", len(self.slots), len(self.slots))

    def _plain_leaves(self) -> list[PlainLeaf | None]:
        # For each slot, its leaf if that is plain and may be believed: where keys or generations are missing, none.
        plain, self._plain = self._plain, {}
        is_sure = self.known_buckets == self.walk.geometry.nbuckets
        leaves = [plain.get(slot.leaf.sector) if slot.leaf is not None and slot.strays is None and is_sure else None
                  for slot in self.slots]
        found = [leaf if leaf is not None and (leaf.place.start, leaf.place.end) == (slot.start, slot.end) else None
                 for slot, leaf in zip(self.slots, leaves, strict=True)]
        self._is_all_plain = sum(leaf is not None for leaf in found) == len(plain)
        return found

    def _take_counted(self, leaves: Sequence[PlainLeaf | None], metadata: npt.NDArray[np.bool_]) -> bool:
        # Add what all leaves without a tally hold, if that can be done, and every one of them is still what it was.
        counted = self.walk.counted
        if counted is None or not self._is_all_plain or not counted.settle(self.walk.gens):
            return False
        if bool((counted.used & metadata).any()):
            return False
        self.used |= counted.used
        self._counted_places = [leaf.place for leaf in leaves if leaf is not None and leaf.tally is None]
        self.dirty = counted.dirty
        self.totals = Totals(self.walk.nodes, counted.extents, counted.dirty_sectors, counted.clean_sectors, 0, 0)
        return True

    def _tallied(self, leaves: Sequence[PlainLeaf | None]) -> Iterator[tuple[Slot, Tally | None]]:
        # Each leaf that is not counted yet with its tally, None if it has none.  Tallies that newer generations
        # overtook are made anew.
        walk = self.walk
        rest = [(slot, leaf) for slot, leaf in zip(self.slots, leaves, strict=True)
                if leaf is None or leaf.tally is not None or not self._is_counted]
        is_late = [leaf is not None and (leaf.tally is None or leaf.raised != walk.raised) for _slot, leaf in rest]
        places = [leaf.place for (_slot, leaf), late in zip(rest, is_late, strict=True) if leaf is not None and late]
        again = walk.tallies(places) if places else iter(())
        for (slot, leaf), late in zip(rest, is_late, strict=True):
            yield slot, next(again) if late else leaf.tally if leaf is not None else None

    def _add_tallies(self, leaves: Sequence[tuple[Slot, Tally | None]], metadata: npt.NDArray[np.bool_]) -> list[Slot]:
        # Count what needs no further look.  The others are left: those without a tally, or with a bucket of metadata.
        geometry = self.walk.geometry
        tallies = [tally for _slot, tally in leaves if tally is not None]
        taken = np.concatenate([np.zeros(0, np.uint64), *(tally.taken for tally in tallies)])
        buckets = run_buckets(taken, geometry)
        if metadata[buckets].any():
            if len(leaves) > 1:
                return [slot for leaf in leaves for slot in self._add_tallies([leaf], metadata)]
            return [slot for slot, _tally in leaves]
        self.used[buckets] = True
        self._taken.append(taken)
        _nodes, extents, dirty_sectors, clean_sectors, _lost, _lost_clean = self.totals
        for tally in tallies:
            extents += tally.extents
            dirty_sectors += tally.dirty_sectors
            clean_sectors += tally.clean_sectors
            self.dirty = joined_spreads(self.dirty, tally.dirty)
        self.totals = Totals(self.walk.nodes, extents, dirty_sectors, clean_sectors, 0, 0)
        return [slot for slot, tally in leaves if tally is None]

    def _leaf(self, slot: Slot, metadata: npt.NDArray[np.bool_]) -> None:
        found = self._leaf_map(slot)
        if found.is_unknown:
            self.unknown.append(slot)
        self.is_clean_unknown |= found.is_clean_unknown
        self.lost_positions += slot.end - slot.start if found.is_lost else 0
        self._lost.append(found.lost)
        if len(found.strays.start):
            self._strays(found.strays)
        self._count(found.kept, metadata)
        dirty = found.kept.take(found.kept.dirty)
        inodes = dirty.start >> np.uint64(INODE_SHIFT)
        for inode in np.unique(inodes).tolist():
            rows = dirty.take(inodes == inode)
            spread = Spread(int(rows.size.sum()), int(rows.start.min()), int(rows.end.max()))
            self.dirty = joined_spreads(self.dirty, {inode: spread})
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

    def _count(self, kept: Extents, metadata: npt.NDArray[np.bool_]) -> None:
        if not len(kept.start):
            return
        size, bucket = kept.size, bucket_of(self.walk, kept).astype(np.intp)
        self._taken.append(PTR_OFFSET.get(kept.ptr) << np.uint64(RUN_BITS) | size)
        self.used[bucket] = True
        dirty = int(size[kept.dirty].sum())
        totals = self.totals
        self.totals = Totals(self.walk.nodes, totals.extents + len(size), totals.dirty_sectors + dirty,
                             totals.clean_sectors + int(size.sum()) - dirty, 0, 0)
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
        counted = self.walk.counted
        if counted is not None and self._is_counted:
            if all(map(counted.claim, self._taken)):
                return
            # Only runs tell whether they share a sector, where they share a block.
            self._taken += [tally.taken for tally in self.walk.tallies(self._counted_places) if tally is not None]
        taken = np.concatenate([np.zeros(0, np.uint64), *self._taken])
        self._taken.clear()
        if len(_overlapping(taken)):
            # Runs do not say which of their extents it is.
            kept = [self._leaf_map(slot).kept for slot in self.slots]
            self._judge_overlaps(_overlapping(np.concatenate(
                [PTR_OFFSET.get(part.ptr) << np.uint64(RUN_BITS) | part.size for part in kept])))

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
        free = [*(slot for slot, entry in enumerate(uuids) if entry is FREE or entry.is_free), len(uuids)]
        found: set[int] = set()
        for slot in self.slots:
            first, last = slot.start >> INODE_SHIFT, slot.end - 1 >> INODE_SHIFT
            at = bisect_left(free, first)
            if last < len(uuids) and (at == len(free) or free[at] > last):
                continue
            kept = self._leaf_map(slot).kept
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


def _overlapping(taken: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    # The sectors at which runs begin that share a sector with their neighbour.  Sorts in place, and looks at some
    # neighbours at a time: there may be one run for every key of the set.
    taken.sort()
    found = [np.zeros(0, np.uint64)]
    for at in range(0, len(taken), RUNS_AT_ONCE):
        some = taken[at:at + RUNS_AT_ONCE + 1]
        sector = some >> np.uint64(RUN_BITS)
        rows = np.flatnonzero(sector[:-1] + (some[:-1] & np.uint64(RUN_MASK)) > sector[1:])
        found += [sector[rows], sector[rows + 1]]
    return np.concatenate(found)


def run(check: Check) -> Check:
    """Do all of ``check`` without looking at its progress."""
    for _progress in check.stages():
        pass
    return check
