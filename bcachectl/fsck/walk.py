# SPDX-License-Identifier: GPL-2.0-only
"""`Walk`: a whole cache device read offline, from the superblock down to every key.

The device is seen only as ``read(sector, count)``.  `Walk.structures` yields a `Record` for each structure that could
be read and a `Damage` for each that could not or that the kernel would refuse; bad data never raises.  What was learned
on the way stays in the walk's attributes: `Walk.superblock`, `Walk.gens`, `Walk.prios`, `Walk.uuids`, `Walk.replay`,
`Walk.slots`.  Its order (super.c, run_cache_set):

1. superblock; a set that never ran (no CACHE_SYNC) has nothing else that is valid;
2. every journal bucket; the newest entry names all the rest, and the entries from its last_seq on are to be replayed;
3. prio sets: priority and generation of every bucket, the generations as lower bounds;
4. uuid array;
5. btree from the root.  All keys of a node raise the gens of their buckets before its children are looked at: the
   marker of a freed node is what makes the pointer to it stale (btree.c, bch_initial_mark_key);
6. keys of the journal raise gens likewise.

Only then is it known which extents are stale: `bcachectl.fsck.live` gives the live map of a set that has been walked.

Whoever only counts asks for tallies: then a leaf that is beyond doubt comes as a `PlainLeaf`, with what it holds, and
is not decoded (`bcachectl.fsck.tally`).  Such a tally is final if `Walk.raised` is still what it was made at;
`Walk.tallies` makes it again.  Where leaves are added up as they are scanned, most come without a tally: `Walk.counted`
has what all of them hold.

Limits: no bucket is read as two structures of the tree, which bounds the walk whatever the pointers say; of the keys
only one node's and the journal's are in memory at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from functools import cached_property

import numpy as np
import numpy.typing as npt

from bcachectl.errors import BcachectlError, Corrupt
from bcachectl.fsck import extents as extent
from bcachectl.fsck import levels
from bcachectl.fsck.counted import Counted
from bcachectl.fsck.damage import BTREE_NODE, EXTENTS, PRIO_SET, SUPERBLOCK, UUID_ARRAY, damage_of
from bcachectl.fsck.extents import Extents
from bcachectl.fsck.fanout import tallies
from bcachectl.fsck.journal import read_journal
from bcachectl.fsck.records import Damage, JournalEntry, Node, PlainLeaf, Record, Slot
from bcachectl.fsck.tally import RUN_MASK, Place, Tallier, Tally
from bcachectl.ondisk import validity
from bcachectl.ondisk.bkey import (
    INODE_SHIFT,
    MAX_POS,
    PTR_GEN,
    PTR_OFFSET,
    SECTOR_MASK,
    SHORTEST_KEY_WORDS,
    Bkey,
    KeyColumns,
    Ptr,
    decode_key_columns,
    ptr_make,
    ptr_sector,
    text,
)
from bcachectl.ondisk.bset import check_node_end, decode_node
from bcachectl.ondisk.geometry import Geometry
from bcachectl.ondisk.jset import JSET_VERSION_UUIDV1, Jset
from bcachectl.ondisk.magic import bset_magic, prio_magic
from bcachectl.ondisk.prio import decode_prio_set
from bcachectl.ondisk.superblock import SB_BYTES, SB_SECTOR, Superblock, check_superblock, decode_superblock
from bcachectl.ondisk.uuids import UuidEntry, decode_uuids, decode_uuids_v0

Read = Callable[[int, int], bytes]
"""``read(sector, count)``: that many sectors, or DeviceError."""

Child = tuple[int, Bkey, int, int]
"""A node before it is read: its level, the key that points to it, the positions [start, end) it covers."""

BUCKETS_LIMIT = 1 << 24
"""A superblock that claims more buckets than this, and more than the device has room for, is not believed."""
MARKS_AT_ONCE = 64
"""The pointers of so many leaves are looked at together."""


class Walk:
    """One walk over one device.  Exhaust `structures` before asking for anything else."""

    def __init__(self, read: Read, size_sectors: int, *, instead: Superblock | None = None,
                 more: Sequence[JournalEntry] = (), processes: int = 0,
                 within: Sequence[tuple[int, int]] | None = None, fd: int = -1) -> None:
        """``instead`` is what to go by in place of the device's own superblock; ``more`` are journal entries that stand
        behind damaged ones.  With ``processes`` plain leaves are tallied, by so many.

        With ``within`` only nodes that have keys of these positions are read, and of the journal only its entries; it
        may be said when the uuid array is known.
        """
        self.read, self.fd = read, fd
        self.size_sectors = size_sectors
        self.logical_block_sectors = 1
        """The device's own block: a kernel refuses a superblock that says less."""
        self.processes = processes
        self.within = within
        self.raised = 0
        """How often the generation of a bucket was raised."""
        self.counted: Counted | None = None
        """The leaves that were added up; to be settled when all generations are known."""
        self._instead = instead
        self._more = more
        self.superblock: Superblock | None = None
        self.geometry = Geometry(8, 1024, 0, 1)
        self.gens: npt.NDArray[np.uint8] = np.zeros(0, np.uint8)
        self.prios: npt.NDArray[np.uint16] = np.zeros(0, np.uint16)
        self.journal: list[JournalEntry] = []
        """Every valid entry, by seq, old ones that a reused bucket still holds included."""
        self.replay: list[JournalEntry] = []
        """The entries that a start would replay, by seq."""
        self.journal_exhausted: set[int] = set()
        """Journal buckets, by index, in which no block that could begin an entry stands behind the last one."""
        self.journal_blank: set[int] = set()
        """Those in which zeros begin where another entry would stand."""
        self.prio_buckets: list[int] = []
        self.uuids: tuple[UuidEntry, ...] = ()
        self.slots: list[Slot] = []
        """The leaves in key order; together they cover the whole address space."""
        self.older: tuple[Extents, bool] | None = None
        """What `bcachectl.fsck.salvage.older_keys` found, if it was asked."""
        self.nodes = 0
        self._gen_known: npt.NDArray[np.bool_] = np.zeros(0, np.bool_)
        self._visited: npt.NDArray[np.bool_] = np.zeros(0, np.bool_)
        self.journal_map = extent.empty()
        """The keys of the journal as a flat map, holes included."""

    @cached_property
    def journal_keys(self) -> list[KeyColumns | Corrupt]:
        """The keys of each entry of `replay`, or what is wrong with them; to be asked when the journal is known."""
        found: list[KeyColumns | Corrupt] = []
        for entry in self.replay:
            try:
                found.append(decode_key_columns(entry.jset.keys, len(entry.jset.keys) // 8))
            except Corrupt as error:
                found.append(error)
        return found

    @cached_property
    def sound_journal(self) -> KeyColumns | None:
        """The keys of all entries of `replay` in one table; None if there is anything odd about one of them."""
        words = [len(entry.jset.keys) // 8 for entry in self.replay]
        try:
            keys = decode_key_columns(b"".join(entry.jset.keys for entry in self.replay), sum(words))
        except Corrupt:
            return None
        # Of each entry the last key must end with it.
        ends = np.concatenate(([0], np.cumsum(keys.nptrs.astype(np.int64) + SHORTEST_KEY_WORDS)))
        is_whole = bool(np.isin(np.cumsum(words), ends).all())
        odd = validity.extents_fatal(keys, self.geometry) | (keys.ptr >> np.uint64(63) != 0)
        return keys if is_whole and not odd.any() else None

    @cached_property
    def plain_journal(self) -> Extents | None:
        """`sound_journal` as a flat map, holes included."""
        keys = self.sound_journal
        return extent.flatten(extent.from_keys(keys)) if keys is not None else None

    @property
    def newest(self) -> Jset | None:
        """The newest journal entry."""
        return self.replay[-1].jset if self.replay else None

    def structures(self) -> Generator[Record | Damage, None, None]:
        """Every structure and every damage, in the order of the module's text."""
        yield from self._walk_superblock()
        if self.superblock is None or not self.superblock.is_cache or not self.superblock.cache_sync:
            return
        yield from self._walk_journal()
        if self.newest is None:
            return
        yield from self._walk_prios(self.newest)
        yield from self._walk_uuids(self.newest)
        yield from self._walk_btree(self.newest)
        yield from self._mark_journal()

    # Superblock.

    def _walk_superblock(self) -> Iterator[Record | Damage]:
        try:
            raw = self.read(SB_SECTOR, SB_BYTES >> 9)
            sb = decode_superblock(raw)
        except BcachectlError as error:
            yield damage_of(error, SUPERBLOCK, "superblock", SB_SECTOR, SB_BYTES >> 9)
            self._adopt(self._instead)
            return
        yield Record("superblock", SB_SECTOR, SB_BYTES >> 9, sb)
        try:
            check_superblock(sb, device_sectors=self.size_sectors, for_kernel=False)
        except Corrupt as error:
            yield Damage(SUPERBLOCK.of(error), error.where, error.why, SB_SECTOR, SB_BYTES >> 9)
            if self._instead is not None or not _is_usable(sb, self.size_sectors):
                self._adopt(self._instead)
                return
        self._adopt(self._instead or sb)

    def _adopt(self, sb: Superblock | None) -> None:
        self.superblock = sb
        if sb is not None and sb.is_cache:
            self.geometry = sb.geometry
            self.gens = np.zeros(sb.nbuckets, np.uint8)
            self.prios = np.zeros(sb.nbuckets, np.uint16)
            self._gen_known = np.zeros(sb.nbuckets, np.bool_)
            self._visited = np.zeros(sb.nbuckets, np.bool_)

    # Journal.

    def _walk_journal(self) -> Iterator[Record | Damage]:
        assert self.superblock is not None
        torn: list[Damage] = []
        with closing(read_journal(self.read, self.superblock, fd=self.fd, threads=max(self.processes, 1),
                                  entries_only=self.within is not None)) as buckets:
            for bucket in buckets:
                for record in bucket.entries:
                    assert isinstance(record.value, JournalEntry)
                    self.journal.append(record.value)
                    yield record
                if bucket.damage is not None:
                    torn.append(bucket.damage)
                if bucket.is_exhausted:
                    self.journal_exhausted.add(bucket.number)
                if bucket.is_blank:
                    self.journal_blank.add(bucket.number)
        yield from torn
        self.journal.extend(self._more)
        self.journal.sort(key=lambda entry: entry.jset.seq)
        if not self.journal:
            yield Damage("JOURNAL_EMPTY", "journal", "no journal entries found",
                         self._sector_of(self.superblock.first_bucket), 0, 0, MAX_POS)
            return
        newest = self.journal[-1].jset
        # One that makes no sense is taken from the entries before.
        last_seq = next((entry.jset.last_seq for entry in reversed(self.journal)
                         if 0 < entry.jset.last_seq <= entry.jset.seq), newest.seq)
        by_seq = {entry.jset.seq: entry for entry in self.journal if entry.jset.seq >= last_seq}
        self.replay = [by_seq[seq] for seq in sorted(by_seq)]
        expected = last_seq
        for entry in self.replay:
            if entry.jset.seq != expected:
                why = (f"journal entries {expected}-{entry.jset.seq - 1} missing! "
                       f"(replaying {newest.last_seq}-{newest.seq})")
                if expected == last_seq and self._is_discarded_before(entry):
                    yield Damage("JOURNAL_DISCARDED", "journal", why, 0, 0, is_harmless=True)
                else:
                    yield Damage("JOURNAL_GAP", "journal", why, 0, 0, 0, MAX_POS)
            expected = entry.jset.seq + 1

    def _is_discarded_before(self, oldest: JournalEntry) -> bool:
        # A kernel discards journal buckets by the oldest entry that is needed now (journal.c, do_journal_discard); that
        # it is needed no more is only said by the next entry, which a crash may prevent.  So whole buckets are missing,
        # and nothing is left in them that could begin an entry.
        assert self.superblock is not None
        before = (oldest.index - 1) % len(self.superblock.d)
        is_empty = all(entry.index != before for entry in self.journal)
        return self.superblock.discard and oldest.offset_bytes == 0 and is_empty and (
            before in self.journal_exhausted or self.within is not None)

    # Prio sets and uuids.

    def prio_chain(self, jset: Jset) -> int:
        """The bucket of the first prio set that a journal entry leads to; every prio write takes another one."""
        assert self.superblock is not None
        number = self.superblock.nr_this_dev
        return jset.prio_bucket[number] if number < len(jset.prio_bucket) else 0

    def _walk_prios(self, newest: Jset) -> Iterator[Record | Damage]:
        assert self.superblock is not None
        geometry, sb = self.geometry, self.superblock
        per_bucket = geometry.prios_per_bucket
        bucket = self.prio_chain(newest)
        for number in range(geometry.prio_buckets):
            where, sector = f"prio set {number} at bucket {bucket}", self._sector_of(bucket)
            if not geometry.first_bucket <= bucket < geometry.nbuckets:
                yield Damage("PRIO_PTR", where, "bad prio bucket", 0, 0)
                return
            try:
                prio_set = decode_prio_set(self.read(sector, geometry.meta_sectors), prio_magic(sb.set_uuid), bucket)
            except BcachectlError as error:
                yield damage_of(error, PRIO_SET, where, sector, geometry.meta_sectors)
                return
            rows = slice(number * per_bucket, min((number + 1) * per_bucket, geometry.nbuckets))
            count = rows.stop - rows.start
            self.gens[rows] = prio_set.gen[:count]
            self.prios[rows] = prio_set.prio[:count]
            self._gen_known[rows] = True
            self.prio_buckets.append(bucket)
            yield Record(where, sector, geometry.meta_sectors, prio_set)
            bucket = prio_set.next_bucket

    def _walk_uuids(self, newest: Jset) -> Iterator[Record | Damage]:
        key = newest.uuid_bucket
        if validity.btree_ptr_invalid(key, self.geometry):
            yield Damage("UUID_PTR", "uuid array", f"bad uuid pointer {text(key)}", 0, 0)
            return
        ptr = key.ptrs[0]
        where = f"uuid array at bucket {self.geometry.bucket_of(ptr.sector)}"
        try:
            buf = self.read(ptr.sector, key.size)
            entries = decode_uuids(buf) if newest.version >= JSET_VERSION_UUIDV1 else decode_uuids_v0(buf)
        except BcachectlError as error:
            yield damage_of(error, UUID_ARRAY, where, ptr.sector, key.size)
            return
        self._mark_ptr(ptr)
        self.uuids = tuple(entries)
        yield Record(where, ptr.sector, key.size, self.uuids)

    # The btree.

    def _walk_btree(self, newest: Jset) -> Iterator[Record | Damage]:
        root, level = newest.btree_root, newest.btree_level
        if not self._is_root(root):
            yield Damage("BTREE_ROOT_PTR", "btree root", f"bad btree root {text(root)}", 0, 0, 0, MAX_POS)
            # The root seldom changes: the entry before most likely named the same one.
            older = next((entry.jset for entry in reversed(self.journal) if self._is_root(entry.jset.btree_root)), None)
            if older is None:
                self.slots.append(Slot(0, MAX_POS, None, 0))
                return
            root, level = older.btree_root, older.btree_level
        real = levels.root_level(self.read, root.ptrs[0], root.size, self._bset_magic, self.geometry, level)
        if real != level:
            yield Damage("BTREE_LEVEL", "btree root", f"bad level {level}, its nodes are of level {real}",
                         root.ptrs[0].sector, root.size)
            level = real
        self._mark_ptr(root.ptrs[0])
        tallier = self._tallier() if self.processes else None
        # A stack, not recursion: the level of a damaged root may say anything.
        todo: list[Child] = [(level, root, 0, MAX_POS)]
        if level == 0 and tallier is not None:
            yield from self._walk_leaves(todo, tallier)
            return
        while todo:
            child = todo.pop()
            if not self._is_wanted(child):
                continue
            node = yield from self._walk_node(child)
            if node is None or not node.level:
                continue
            children, damages = self.children(node)
            yield from damages
            if node.level == 1 and tallier is not None:
                yield from self._walk_leaves(children, tallier)
            else:
                todo.extend(reversed(children))

    def _is_wanted(self, child: Child) -> bool:
        _level, _key, start, end = child
        return self.within is None or any(start < last and first < end for first, last in self.within)

    def _walk_node(self, child: Child) -> Generator[Record | Damage, None, Node | None]:
        level, key, start, end = child
        ptr = key.ptrs[0]
        node, damages = self._read_node(level, ptr, key.size, start=start, end=end)
        yield from damages
        if node is None:
            # A node of another level tells nothing about its range: it is as if nothing stood there.
            is_other = any(damage.code == "BTREE_LEVEL" for damage in damages)
            self.slots.append(Slot(start, end, None, 0) if is_other else Slot(start, end, None, key.size, ptr, level))
            return None
        yield Record(f"btree node at bucket {node.bucket}, level {level}", ptr.sector, key.size, node)
        if level == 0:
            self.slots.append(Slot(start, end, ptr, key.size, is_astray=_is_astray(node)))
            yield from self._judge_leaf(node)
        self.mark_columns([image.keys for image in node.sets], level)
        return node

    # Leaves that are tallied.

    def _tallier(self) -> Tallier | None:
        # None where a leaf cannot be told apart from a damaged one by counting.
        journal = self.plain_journal
        if journal is None or not self._gen_known.all() or self.geometry.bucket_size_sectors > RUN_MASK:
            return None
        return Tallier(self.read, self.geometry, self._bset_magic, self.gens, journal, self.fd)

    def _walk_leaves(self, children: Sequence[Child], tallier: Tallier) -> Iterator[Record | Damage]:
        # The leaves below one node.  What is not plain is read again, by the way of all nodes.
        buckets = np.array([key.ptrs[0].sector for _level, key, _start, _end in children],
                           np.intp) >> self.geometry.bucket_shift
        is_first = np.zeros(len(children), np.bool_)
        is_first[np.unique(buckets, return_index=True)[1]] = True
        is_new = is_first & ~self._visited[buckets]
        places = [_place_of(child) for child in children]
        asked = [place for place, new in zip(places, is_new.tolist(), strict=True) if new]
        self._count_by(tallier)
        raised = self.raised if self.counted is None else self.counted.raised
        late: list[npt.NDArray[np.uint64]] = []
        with closing(tallies(tallier, asked, self.processes) if self.counted is None
                     else self.counted.counts(asked)) as found:
            for child, bucket, new, place in zip(children, buckets.tolist(), is_new.tolist(), places, strict=True):
                said = next(found) if new else None
                if said is None:
                    yield from self._walk_node(child)
                    continue
                tally, marks = (said, said.marks) if isinstance(said, Tally) else (None, said)
                self._visited[bucket] = True
                self.nodes += 1
                _level, key, start, end = child
                yield Record(f"btree node at bucket {bucket}, level 0", key.ptrs[0].sector, key.size,
                             PlainLeaf(bucket, place, tally, marks, raised))
                self.slots.append(Slot(start, end, key.ptrs[0], key.size))
                if not len(marks):
                    continue
                late.append(marks)
                if self.counted is None or len(late) == MARKS_AT_ONCE:
                    # Leaves that are counted do not look at generations before the end.
                    self._mark_words(np.concatenate(late))
                    late.clear()
        self._mark_words(np.concatenate([np.zeros(0, np.uint64), *late]))

    def _count_by(self, tallier: Tallier) -> None:
        # From the first leaf on, with the generations of that moment.
        if self.counted is None and tallier.can_count:
            gens = self.gens.copy()
            self.counted = Counted([tallier.with_gens(gens) for _ in range(self.processes)], gens, self.raised)

    def tallies(self, places: Sequence[Place]) -> Generator[Tally | None, None, None]:
        """Leaves once more, with the generations as they are now, None for those that are not plain any more."""
        tallier = self._tallier()
        assert tallier is not None
        return tallies(tallier, places, self.processes)

    @property
    def _bset_magic(self) -> int:
        assert self.superblock is not None
        return bset_magic(self.superblock.set_uuid)

    def _is_root(self, key: Bkey) -> bool:
        return not validity.btree_ptr_invalid(key, self.geometry) and key.ptrs[0].dev == 0

    def _read_node(self, level: int, ptr: Ptr, nsectors: int, *, start: int,
                   end: int) -> tuple[Node | None, list[Damage]]:
        assert self.superblock is not None
        bucket = self.geometry.bucket_of(ptr.sector)
        where = f"btree node at bucket {bucket}, level {level}"
        if self._visited[bucket]:
            return None, [Damage("BTREE_NODE_TWICE", where, "two pointers lead to this node", ptr.sector, nsectors,
                                 start, end)]
        self._visited[bucket] = True
        self.nodes += 1
        block_bytes = self.geometry.block_bytes
        try:
            sets, written_blocks = decode_node(
                self.read(ptr.sector, nsectors), magic=bset_magic(self.superblock.set_uuid),
                seed=ptr_make(ptr.sector, ptr.gen, ptr.dev), block_bytes=block_bytes,
                node_blocks=(nsectors << 9) // block_bytes, where=f"bucket {bucket}")
        except BcachectlError as error:
            return None, [damage_of(error, BTREE_NODE, where, ptr.sector, nsectors, start, end)]
        if (levels.is_leaf(self.read, sets, nsectors, self._bset_magic, self.geometry) if level
                else levels.is_interior(self.read, sets, nsectors, self._bset_magic, self.geometry)):
            why = "bad level: it is a leaf" if level else "bad level: it is an interior node"
            return None, [Damage("BTREE_LEVEL", where, why, ptr.sector, nsectors, start, end)]
        node = Node(bucket, ptr.gen, level, start, end, nsectors, tuple(sets), written_blocks)
        damages = []
        last = max((int(image.keys.pos[image.keys.size > 0].max(initial=0)) for image in sets), default=0)
        try:
            check_node_end(last, end, where)
        except Corrupt as error:
            lost = (0, 0) if level else (end, last)
            damages.append(Damage(BTREE_NODE.of(error), error.where, error.why, ptr.sector, nsectors, *lost))
        if any(bool((image.keys.nptrs > 1).any()) for image in sets):
            damages.append(Damage("BTREE_PTRS", where, "a key with several pointers", ptr.sector, nsectors))
        if any(not bool((image.keys.pos[:-1] <= image.keys.pos[1:]).all()) for image in sets):
            damages.append(Damage("BTREE_ORDER", where, "keys out of order", ptr.sector, nsectors))
        return node, damages

    def children(self, node: Node) -> tuple[list[Child], list[Damage]]:
        """What an interior node leads to (level, key, start, end), and what is wrong with its pointers."""
        # In key order, the newer set first at equal positions; each child covers what follows the one before it, up to
        # the end of the node.  One for which that leaves nothing is read for its keys, which may be right.
        # The kernel's iterator likewise skips what is bad (bset.c, bch_btree_iter_next_filter).
        where = f"btree node at bucket {node.bucket}, level {node.level}"
        sector = self._sector_of(node.bucket)
        children: list[Child] = []
        damages: list[Damage] = []
        rows = sorted((pos, -number, row) for number, image in enumerate(node.sets)
                      for row, pos in enumerate(image.keys.pos.tolist()))
        good = [self._good_children(image.keys) for image in node.sets]
        start = node.start
        for pos, minus_number, row in rows:
            child = good[-minus_number].get(row)
            if child is not None and pos > start:
                children.append((node.level - 1, child, min(start, node.end), min(pos, node.end)))
                start = pos
                continue
            key = _interior_key(node.sets[-minus_number].keys, row)
            if validity.btree_ptr_invalid(key, self.geometry):
                lost = (start, pos) if start < pos <= node.end else (0, 0)
                damages.append(Damage("BTREE_PTR", where, f"spotted btree ptr {text(key)}", sector, node.nsectors,
                                      *lost))
                continue
            if pos == 0 or not _is_here(key) or validity.ptr_stale(key, self.geometry, self.gens):
                continue
            if pos <= start:
                why = f"two children end at {pos >> INODE_SHIFT}:{pos & SECTOR_MASK}"
                damages.append(Damage("BTREE_CHILD_TWICE", where, why, sector, node.nsectors,
                                      children[-1][2] if children else 0, start))
                children.append((node.level - 1, key, min(start, node.end), min(start, node.end)))
                continue
            children.append((node.level - 1, key, min(start, node.end), min(pos, node.end)))
            start = pos
        if start < node.end:
            # The journal may still hold keys there; `bcachectl.fsck.live` finds the gap by itself.
            damages.append(Damage("BTREE_CHILD_GAP", where, "no child for the end of the node's range", sector,
                                  node.nsectors, start, node.end))
        return children, damages

    def _good_children(self, keys: KeyColumns) -> dict[int, Bkey]:
        # The keys that lead to a node, beyond doubt, by their rows.
        bad = validity.btree_ptrs_invalid(keys, self.geometry) | ~validity.columns_available(keys)
        bad |= validity.columns_staleness(keys, self.geometry, self.gens) != 0
        bad |= (keys.pos == 0) | (keys.pos == MAX_POS)
        rows = np.flatnonzero(~bad)
        columns = (column[rows].tolist() for column in (keys.pos, keys.size, keys.ptr))
        return {row: Bkey(pos >> INODE_SHIFT, (pos & SECTOR_MASK) - size, pos & SECTOR_MASK, False, 0,
                          (Ptr(0, ptr_sector(ptr), ptr & 0xFF),))
                for row, pos, size, ptr in zip(rows.tolist(), *columns, strict=True)}

    def _judge_leaf(self, node: Node) -> Iterator[Damage]:
        for image in node.sets:
            for row in np.flatnonzero(validity.extents_fatal(image.keys, self.geometry)):
                key = _leaf_key(image.keys, int(row))
                why = validity.ptr_problem(key, self.geometry) or "bad, size larger than its offset"
                end = int(image.keys.pos[row])
                yield Damage(EXTENTS[why], f"btree node at bucket {node.bucket}, level 0",
                             f"spotted extent {text(key)}: {why}", self._sector_of(node.bucket), node.nsectors,
                             max(end - key.size, 0), end)

    # Generations.

    def _mark_ptr(self, ptr: Ptr) -> None:
        if ptr.dev == 0:
            self._mark(np.array([self.geometry.bucket_of(ptr.sector)], np.intp), np.array([ptr.gen], np.uint8))

    def mark_columns(self, sets: list[KeyColumns], level: int) -> None:
        """Raise the gens of the buckets that the keys of a node of ``level`` point to."""
        for keys in sets:
            usable = validity.columns_available(keys) & ~validity.columns_out_of_range(keys, self.geometry)
            usable &= (keys.size > 0) if level else ~validity.extents_fatal(keys, self.geometry)
            self._mark_words(keys.ptr[usable])

    def _mark_words(self, ptr: npt.NDArray[np.uint64]) -> None:
        if not len(ptr):
            return
        bucket = (PTR_OFFSET.get(ptr) // self.geometry.bucket_size_sectors).astype(np.intp)
        self._mark(bucket, PTR_GEN.get(ptr).astype(np.uint8))

    def _mark(self, bucket: npt.NDArray[np.intp], gen: npt.NDArray[np.uint8]) -> None:
        # Where the prio set is lost, the first gen seen is the best that is known.
        unknown = ~self._gen_known[bucket]
        if unknown.any():
            self.raised += 1
            self.gens[bucket[unknown]] = gen[unknown]
            self._gen_known[bucket[unknown]] = True
        ahead = gen - self.gens[bucket]
        newer = (ahead > 0) & (ahead < 128)
        if not newer.any():
            return
        self.raised += 1
        # Several keys may point into one bucket: numpy lets the last one stand, so that must be the newest.
        newest_last = np.flatnonzero(newer)[np.argsort(ahead[newer], kind="stable")]
        self.gens[bucket[newest_last]] = gen[newest_last]

    def _mark_journal(self) -> Iterator[Damage]:
        if self.sound_journal is not None and self.plain_journal is not None:
            self.mark_columns([self.sound_journal], 0)
            self.journal_map = self.plain_journal
            return
        parts: list[Extents] = []
        for entry, keys in zip(self.replay, self.journal_keys, strict=True):
            where = f"journal entry {entry.jset.seq} in bucket {entry.index}"
            if isinstance(keys, Corrupt):
                yield Damage("JOURNAL_KEYS", where, f"{keys.where}: {keys.why}", 0, 0)
                continue
            fatal = validity.extents_fatal(keys, self.geometry)
            for row in np.flatnonzero(fatal):
                end = int(keys.pos[row])
                yield Damage("JOURNAL_KEY", where, f"bad key {text(_leaf_key(keys, int(row)))}", 0, 0,
                             max(end - int(keys.size[row]), 0), end)
            self.mark_columns([keys], 0)
            parts.append(extent.from_keys(extent.without(keys, fatal)))
        self.journal_map = extent.flatten(extent.concatenate(parts))

    # Small things.

    def _sector_of(self, bucket: int) -> int:
        return self.geometry.sector_of(bucket)


def _place_of(child: Child) -> Place:
    _level, key, start, end = child
    ptr = key.ptrs[0]
    return Place(ptr.sector, ptr_make(ptr.sector, ptr.gen, ptr.dev), key.size, start, end)


def _is_astray(node: Node) -> bool:
    # Some keys lie outside the node's range.
    return any(bool((keys.pos - keys.size < np.uint64(node.start)).any() or (keys.pos > np.uint64(node.end)).any())
               for keys in (image.keys for image in node.sets) if len(keys.pos))


def _is_usable(sb: Superblock, size_sectors: int) -> bool:
    # Enough of it makes sense to go on looking, for a report of what is lost.
    if not sb.is_cache or sb.feature_incompat & ~3 or sb.keys > len(sb.d):
        return False
    if not sb.block_size or sb.bucket_size < 8 or sb.bucket_size & (sb.bucket_size - 1):
        return False
    limit = max(BUCKETS_LIMIT, size_sectors // sb.bucket_size)
    return 0 < sb.nbuckets <= limit and all(bucket < sb.nbuckets for bucket in sb.d)


def _is_here(key: Bkey) -> bool:
    return all(validity.ptr_available(ptr) for ptr in key.ptrs)


def _leaf_key(keys: KeyColumns, row: int) -> Bkey:
    pos, size = int(keys.pos[row]), int(keys.size[row])
    inode, end = pos >> INODE_SHIFT, pos & SECTOR_MASK
    return Bkey(inode, end - size, end, bool(keys.dirty[row]), int(keys.csum[row]), _ptrs(keys, row))


def _interior_key(keys: KeyColumns, row: int) -> Bkey:
    pos = int(keys.pos[row])
    inode, end = (0xFFFFF, (1 << 63) - 1) if pos == MAX_POS else (pos >> INODE_SHIFT, pos & SECTOR_MASK)
    return Bkey(inode, end - int(keys.size[row]), end, bool(keys.dirty[row]), 0, _ptrs(keys, row))


def _ptrs(keys: KeyColumns, row: int) -> tuple[Ptr, ...]:
    ptr = int(keys.ptr[row])
    return (Ptr(ptr >> 51 & 0xFFF, ptr >> 8 & (1 << 43) - 1, ptr & 0xFF),) if keys.nptrs[row] else ()
