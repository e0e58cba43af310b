# SPDX-License-Identifier: GPL-2.0-only
"""`RescueMap`: what of a backing device's dirty data is written back, as a file in the format of GNU ddrescue.

Positions are bytes on the backing device, the bcache superblock included.  The statuses are ddrescue's:

* ``+`` the data is on the backing device, durably;
* ``-`` the data is lost: its sectors could not be read, or the key that says where they are is damaged;
* ``/`` the keys are unknown: a damaged node may have held dirty data here;
* ``*`` dirty data was written here, but the keys were doubtful: a damaged node may have named newer data;
* ``?`` everything else: dirty data that is not written back yet, and what was never dirty.

What was never dirty is not marked ``+``, so that a range that a later look at a failing cache finds dirty is not taken
for written back.  The second comment line says which set and device the map is of, and the number of the newest
journal entry: a set that ran since has a newer one, and its map is refused (`parse`).  It also has the `fingerprint` of
all keys that the run went by.  A failing device may tell others in the next run; then only ``+`` is believed.

A flat map is an `Extents` whose ``csum`` column holds the status.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from bcachectl.errors import BcachectlError, Refused, WrongState
from bcachectl.fsck import extents as extent
from bcachectl.fsck.extents import U64, Extents
from bcachectl.units import format_uuid

TITLE = "# bcachectl writeback"
STATUSES = "?*/-+"
UNTRIED, DOUBTED, UNKNOWN, LOST, DONE = (STATUSES.index(status) for status in "?*/-+")
_HEAD_FIELDS = 3
_ROW_FIELDS = 3


class Owner(NamedTuple):
    """Whose map it is: the set, the device, the newest journal entry that is known, the fingerprint of its keys."""

    set_uuid: bytes
    uuid: bytes
    journal_seq: int
    keys: str = ""


class RescueMap(NamedTuple):
    """The map of a device of ``end`` sectors; ``at`` is the sector up to which the copy has come."""

    owner: Owner
    rows: Extents
    at: int
    end: int


def fingerprint(extents: Extents) -> str:
    """Sixteen hexadecimal digits that change with any of the extents, by where they are and where their data is."""
    digest = hashlib.sha256()
    for column in (extents.start, extents.end, extents.ptr):
        digest.update(column.astype("<u8").tobytes())
    return digest.hexdigest()[:16]


def ranges(pairs: list[tuple[int, int]], status: int) -> Extents:
    """Flat rows of one status for sorted pairs (start, end) of sectors."""
    columns = np.array(pairs, np.uint64).reshape(-1, 2)
    return marked(columns[:, 0], columns[:, 1], status)


def marked(start: U64, end: U64, status: int) -> Extents:
    """Flat rows of one status."""
    count = len(start)
    return Extents(start, end, np.zeros(count, np.bool_), np.zeros(count, np.uint8), np.zeros(count, np.uint64),
                   np.full(count, status, np.uint8))


def without(extents: Extents, hidden: Extents) -> Extents:
    """What of flat extents with pointers lies outside the flat rows ``hidden``."""
    both = extent.overlay(extents, hidden._replace(nptrs=np.zeros(len(hidden.start), np.uint8)))
    return both.take(both.nptrs > 0)


def within(extents: Extents, bounds: Extents) -> Extents:
    """What of flat extents with pointers lies inside the flat rows ``bounds``."""
    return without(extents, without(extents, bounds))


def of_status(rows: Extents, status: int) -> Extents:
    """The rows of one status."""
    return rows.take(rows.csum == status)


def joined(rows: Extents) -> Extents:
    """Flat rows with neighbours of one status joined."""
    if len(rows.start) < 2:
        return rows
    is_head = (rows.end[:-1] != rows.start[1:]) | (rows.csum[:-1] != rows.csum[1:])
    heads = np.flatnonzero(np.concatenate(([True], is_head)))
    tails = np.append(heads[1:], len(rows.start)) - 1
    return rows.take(heads)._replace(end=rows.end[tails])


def render(found: RescueMap) -> Iterator[str]:
    """The lines of the file."""
    owner = found.owner
    yield f"{TITLE}: a mapfile of GNU ddrescue's format, in bytes of the backing device"
    yield (f"# set {format_uuid(owner.set_uuid)} device {format_uuid(owner.uuid)} journal {owner.journal_seq}"
           f"{f' keys {owner.keys}' if owner.keys else ''}")
    yield "# + written back, * the same by doubtful keys, - lost, / keys unknown, ? not dirty or not written back yet"
    yield "# current_pos  current_status  current_pass"
    is_done = found.at >= found.end
    yield f"0x{found.at << 9:08X}     {'+' if is_done else '?'}               1"
    yield "#      pos        size  status"
    whole = ranges([(0, found.end)], UNTRIED)
    rows = joined(extent.overlay(whole, extent.clip(found.rows, start=0, end=found.end)))
    for start, end, status in zip(rows.start.tolist(), rows.end.tolist(), rows.csum.tolist(), strict=True):
        yield f"0x{start << 9:08X}  0x{end - start << 9:08X}  {STATUSES[status]}"


def parse(text: str, name: str, owner: Owner) -> Extents:
    """The rows of the file ``name``; refused if it is not of this device, or older than what the set last did.

    What was written by doubtful keys counts as done if these are the same keys, and as untried if not.
    """
    lines = text.splitlines()
    if len(lines) < 2 or not lines[0].startswith(TITLE):
        raise Refused(f"{name}: was not made by `bcachectl writeback`; name a new file for the map")
    try:
        words = lines[1].split()
        is_same = words[1:5] == ["set", format_uuid(owner.set_uuid), "device", format_uuid(owner.uuid)]
        journal_seq = int(words[6])
        keys = words[8] if words[7:8] == ["keys"] else ""
        fields = [line.split() for line in lines if line and not line.startswith("#")]
        if len(fields[0]) != _HEAD_FIELDS or any(len(row) != _ROW_FIELDS for row in fields[1:]):
            raise ValueError("a line has the wrong number of fields")
        table = [(int(row[0], 16) >> 9, int(row[0], 16) + int(row[1], 16) >> 9, STATUSES.index(row[2]))
                 for row in fields[1:]]
        rows = Extents(np.array([row[0] for row in table], np.uint64), np.array([row[1] for row in table], np.uint64),
                       np.zeros(len(table), np.bool_), np.zeros(len(table), np.uint8),
                       np.zeros(len(table), np.uint64), np.array([row[2] for row in table], np.uint8))
        if not extent.is_flat(rows) or bool((rows.end < rows.start).any()):
            raise ValueError("its ranges overlap")
    except (ValueError, IndexError, OverflowError) as error:
        raise BcachectlError(f"{name}: is a damaged map ({error}); name a new file for the map") from error
    if not is_same:
        raise Refused(f"{name}: is the map of another device ({' '.join(words[1:5])}); name a new file for the map")
    if journal_seq < owner.journal_seq:
        raise WrongState(f"{name}: the set has run since this map was made (journal entry {owner.journal_seq}, the map "
                         f"is of {journal_seq}), so what it says is out of date; name a new file for the map")
    same_keys = bool(keys) and keys == owner.keys
    status = np.where(rows.csum == DOUBTED, DONE if same_keys else UNTRIED, rows.csum).astype(np.uint8)
    return rows._replace(csum=status).take(rows.end > rows.start)
