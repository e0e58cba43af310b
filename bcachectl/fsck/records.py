# SPDX-License-Identifier: GPL-2.0-only
"""What a walk over a cache device yields: a `Record` for each structure that could be read, a `Damage` for each other.

`bcachectl.fsck.walk` makes them.  A `Slot` is what stays in the walk of a leaf.  What there is one of for each leaf
is a NamedTuple: it is made in a third of the time.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from bcachectl.fsck.extents import Extents
from bcachectl.fsck.findings import DamageCode
from bcachectl.fsck.tally import Place, Tally
from bcachectl.ondisk.bkey import Ptr
from bcachectl.ondisk.bset import BsetImage
from bcachectl.ondisk.jset import Jset
from bcachectl.ondisk.prio import PrioSet
from bcachectl.ondisk.superblock import Superblock
from bcachectl.ondisk.uuids import UuidEntry


@dataclass(frozen=True, slots=True)
class JournalEntry:
    """A valid jset and its place: the index of its journal bucket and the byte there."""

    index: int
    offset_bytes: int
    jset: Jset


@dataclass(frozen=True, slots=True)
class Node:
    """A btree node as read.  It covers positions [start, end); ``gen`` is that of the pointer that led to it."""

    bucket: int
    gen: int
    level: int
    start: int
    end: int
    nsectors: int
    sets: tuple[BsetImage, ...]
    written_blocks: int


class PlainLeaf(NamedTuple):
    """A leaf that nothing is wrong with, and what was live in it when generations had been raised ``raised`` times.

    ``marks`` are its pointers whose generation is not their bucket's.  Without ``tally`` it is among `Walk.counted`.
    """

    bucket: int
    place: Place
    tally: Tally | None
    marks: npt.NDArray[np.uint64]
    raised: int


class Record(NamedTuple):
    """A structure that could be read: where it stands, and what it says."""

    where: str
    sector: int
    nsectors: int
    value: Superblock | JournalEntry | PrioSet | tuple[UuidEntry, ...] | Node | PlainLeaf


@dataclass(frozen=True, slots=True)
class Damage:
    """Something that is not as it should be: ``why`` is the kernel's word for it, ``code`` that of the finding.

    ``start, end`` are the positions whose keys cannot be known because of it, both 0 if it costs no keys.
    ``is_harmless`` marks what any power failure leaves behind: a torn entry at the end of the journal.
    """

    code: DamageCode
    where: str
    why: str
    sector: int
    nsectors: int
    start: int = 0
    end: int = 0
    is_harmless: bool = False

    def __str__(self) -> str:
        return f"{self.where}: {self.why}"


class Slot(NamedTuple):
    """A stretch [start, end) of the address space and the leaf that covers it; None where the tree is damaged.

    There ``lost`` is the pointer to the node of ``level`` that could not be read, if there is a pointer at all.
    """

    start: int
    end: int
    leaf: Ptr | None
    nsectors: int
    lost: Ptr | None = None
    level: int = 0
    is_doubtful: bool = False
    """Found without a parent, and not the only one that could be meant."""
    is_astray: bool = False
    """Some keys of the leaf lie outside [start, end)."""
    strays: Extents | None = None
    """Dirty keys of other leaves that lie in [start, end) (`bcachectl.fsck.strays`)."""
    lacks_set: bool = False
    """The journal tells of keys that the leaf must have had (`bcachectl.fsck.lacking`)."""


class Progress(NamedTuple):
    """How far a check is: what it does, how much of it is done, of how much (0: unknown)."""

    what: str
    done: int
    total: int
