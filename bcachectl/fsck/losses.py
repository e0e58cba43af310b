# SPDX-License-Identifier: GPL-2.0-only
"""`with_losses`: each finding with what it costs.

A finding costs the extents that are lost in the range of positions that it makes unreadable.  What is lost because keys
of the journal or generations are missing (`bcachectl.fsck.salvage.TAG_UNKNOWN_GEN`) lies anywhere, and is the cost of
the first finding that says so.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol

import numpy as np

from bcachectl.fsck.check_structures import Found
from bcachectl.fsck.extents import Extents
from bcachectl.fsck.findings import Finding, Loss, Severity
from bcachectl.fsck.records import Slot
from bcachectl.fsck.salvage import TAG_CONTRADICTED, TAG_UNKNOWN_GEN
from bcachectl.ondisk.bkey import INODE_SHIFT, MAX_POS, SECTOR_MASK

UNKNOWN_CODES = ("JOURNAL_GAP", "JOURNAL_CSUM", "JOURNAL_KEYS", "JOURNAL_EMPTY", "BTREE_ROOT_PTR")
"""Codes of damage that may have hit keys anywhere."""
RANGES_LIMIT = 1_000


class Volumes(Protocol):
    """What is told about volumes besides their number."""

    def volume_name(self, inode: int) -> str:
        """Its name."""

    def data_offset(self, inode: int) -> int:
        """The sector of the backing device at which it begins."""


def with_losses(found: Sequence[Found], lost: Extents, *, unknown: Sequence[Slot], doubted: Sequence[Slot],
                volumes: Volumes) -> list[Finding]:
    """The findings, the worst first.

    ``lost`` is in order.  Nothing, or not all, is known about the ranges ``unknown``; those ``doubted`` are kept though
    something newer may have been written back.
    """
    unsure = lost.csum == TAG_UNKNOWN_GEN
    is_first_cause = True
    findings = []
    for finding, start, end in found:
        losses: tuple[Loss, ...] = ()
        ranges: tuple[tuple[int, int], ...] = ()
        if start < end:
            is_stray = finding.code == "BTREE_STRAY"
            rows = (lost.start < np.uint64(end)) & (lost.end > np.uint64(start)) & ~unsure
            rows &= (lost.csum == TAG_CONTRADICTED) == is_stray
            losses = _losses(lost.take(rows), volumes)
            slots = [*doubted, *unknown] if is_stray else unknown
            ranges = tuple((max(slot.start, start), min(slot.end, end)) for slot in slots
                           if slot.start < end and start < slot.end)
        if finding.code in UNKNOWN_CODES or finding.code == "JOURNAL_IO":
            ranges = ((0, MAX_POS),)
        is_cause = finding.code in UNKNOWN_CODES or finding.code.startswith("PRIO_")
        if is_cause and finding.severity is Severity.ERROR and is_first_cause:
            losses, is_first_cause = _losses(lost.take(unsure), volumes), False
        findings.append(replace(finding, losses=losses, unknown=ranges))
    return sorted(findings, key=lambda finding: -finding.severity)


def _losses(lost: Extents, volumes: Volumes) -> tuple[Loss, ...]:
    inodes = lost.start >> np.uint64(INODE_SHIFT)
    return tuple(_loss(int(inode), lost.take(inodes == inode), volumes) for inode in np.unique(inodes))


def _loss(inode: int, lost: Extents, volumes: Volumes) -> Loss:
    size = lost.size.astype(np.int64)
    offset = volumes.data_offset(inode)
    dirty = lost.take(lost.dirty)
    ranges: list[tuple[int, int]] = []
    for start, end in zip((dirty.start & np.uint64(SECTOR_MASK)).tolist(),
                          (dirty.end - np.uint64(inode << INODE_SHIFT)).tolist(), strict=True):
        first, last = (start - offset) << 9, (end - offset) << 9
        if ranges and ranges[-1][1] == first:
            ranges[-1] = (ranges[-1][0], last)
        elif len(ranges) < RANGES_LIMIT:
            ranges.append((first, last))
    return Loss(inode, volumes.volume_name(inode), int(size[lost.dirty].sum()), int(size[~lost.dirty].sum()),
                tuple(ranges))
