# SPDX-License-Identifier: GPL-2.0-only
"""What ``bcachectl fsck`` prints: a summary first, then every finding with its cost; or the same as JSON."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn

from bcachectl.fsck.check import Check
from bcachectl.fsck.findings import Finding, Loss, Severity
from bcachectl.fsck.owners import Choice
from bcachectl.fsck.repair import Repair, is_repairable, offers_repair, plan_repair
from bcachectl.fsck.walk import Read
from bcachectl.ondisk.bkey import INODE_SHIFT, MAX_POS, SECTOR_MASK
from bcachectl.units import counted, format_sectors, format_uuid

RANGES_SHOWN = 8
QUIET_S, REDRAW_S = 1.0, 0.1


def watch(check: Check, *, show: bool) -> None:
    """Run the check; if ``show``, with a bar on stderr as soon as it has taken `QUIET_S`."""
    with _Bar(show=show) as bar:
        for step in check.stages():
            bar.draw(step.what, step.done, step.total)


@contextmanager
def told(read: Read, *, show: bool) -> Iterator[Read]:
    """``read`` for someone who looks for the set all over the device; if ``show``, with a bar like that of `watch`."""
    done_sectors = 0

    def read_and_tell(sector: int, count: int) -> bytes:
        nonlocal done_sectors
        data = read(sector, count)
        done_sectors += count
        bar.draw("looking for the set, MiB", done_sectors >> 11, 0)
        return data

    with _Bar(show=show) as bar:
        yield read_and_tell


class _Bar:
    # Drawn when its owner says how far he is, and by no thread of its own: a check forks.
    def __init__(self, *, show: bool) -> None:
        self._show = show
        self._bars: Progress | None = None
        self._task = TaskID(0)
        self._draw_s = time.monotonic() + QUIET_S

    def __enter__(self) -> _Bar:
        return self

    def draw(self, what: str, done: int, total: int) -> None:
        now_s = time.monotonic()
        if not self._show or now_s < self._draw_s:
            return
        self._draw_s = now_s + REDRAW_S
        if self._bars is None:
            self._bars = Progress(
                TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}"),
                console=Console(stderr=True), transient=True, auto_refresh=False)
            self._bars.start()
            self._task = self._bars.add_task(what, total=None)
        self._bars.update(self._task, description=what, completed=done, total=total or None, refresh=True)

    def __exit__(self, *_: object) -> None:
        if self._bars is not None:
            self._bars.stop()


def as_json(check: Check, repair: Repair | None, undo: Path | None, files: list[str]) -> dict[str, Any]:
    """The whole report as JSON."""
    sb, totals = check.walk.superblock, check.totals
    body: dict[str, Any] = {
        "set": format_uuid(sb.set_uuid) if sb is not None else None,
        "clean": check.worst is Severity.NOTE,
        "summary": totals._asdict(),
        "findings": [_finding_json(finding) for finding in check.findings],
    }
    if files:
        body["files"] = files
    choices = choices_of(check, repair)
    if choices:
        body["choices"] = [_choice_json(choice) for choice in choices]
    if repair is not None:
        body["repair"] = {
            "writes": [{"device": write.device or "cache", "offset_bytes": write.offset_bytes,
                        "length_bytes": len(write.data), "what": write.what}
                       for step in repair.steps for write in step],
            "repaired": [finding.code for finding in repair.repaired],
            "left": [finding.code for finding in repair.left],
            "undo_file": str(undo) if undo is not None else None}
    return body


def choices_of(check: Check, repair: Repair | None) -> tuple[Choice, ...]:
    """The slots whose owner a repair would have to find, or has found."""
    if repair is not None:
        return repair.choices
    if any(finding.code.startswith(("UUID_", "ORPHAN_")) for finding in check.findings):
        return plan_repair(check, safe_only=False).choices
    return ()


def _choice_json(choice: Choice) -> dict[str, Any]:
    return {"slot": choice.inode, "dirty_bytes": choice.dirty_sectors << 9, "clean_bytes": choice.clean_sectors << 9,
            "outcome": choice.outcome or None,
            "candidates": [{"device": each.device, "uuid": format_uuid(each.uuid), "large_enough": each.fits,
                            "clean_extents_compared": each.compared, "clean_extents_equal": each.equal}
                           for each in choice.evidence]}


def _choice_lines(choice: Choice) -> Iterator[str]:
    yield (f"slot {choice.inode}: {format_sectors(choice.dirty_sectors)} of dirty data, "
           f"{format_sectors(choice.clean_sectors)} of clean data, and no owner")
    for each in choice.evidence:
        told = "is too small, or its data starts later" if not each.fits else "is large enough" + (
            f"; {each.equal} of {each.compared} clean extents agree with it" if each.compared
            else "; there is no clean data, or only zeros, to compare")
        yield f"  {each.device} ({format_uuid(each.uuid)}) {told}"
    if choice.outcome:
        yield f"  A repair has it {choice.outcome}."
        return
    if not choice.evidence:
        yield "  No backing device that the set forgot is named; name the backing devices of the set to compare them."
    yield (f"  A repair has to be told: --assign {choice.inode}=UUID of its backing device, {choice.inode}=none to "
           f"keep it as an orphan, {choice.inode}=flash if it was a flash-only volume.")


def _finding_json(finding: Finding) -> dict[str, Any]:
    return {"code": finding.code, "severity": finding.severity.name.lower(), "device": finding.device or "cache",
            "structure": finding.structure, "bucket": finding.bucket, "sector": finding.sector,
            "key": finding.key or None, "why": finding.why, "meaning": finding.meaning, "safe": finding.is_safe,
            "repairable": is_repairable(finding),
            "losses": [{"volume": loss.volume, "inode": loss.inode, "dirty_sectors": loss.dirty_sectors,
                        "clean_sectors": loss.clean_sectors, "dirty_ranges_bytes": [list(each) for each in loss.ranges]}
                       for loss in finding.losses],
            "unknown": [{"start_inode": start >> INODE_SHIFT, "start_sector": start & SECTOR_MASK,
                         "end_inode": end >> INODE_SHIFT, "end_sector": end & SECTOR_MASK}
                        for start, end in finding.unknown]}


def lines(check: Check, repair: Repair | None, files: list[str]) -> Iterator[str]:
    """The report for people."""
    sb, totals = check.walk.superblock, check.totals
    counts = {severity: sum(finding.severity is severity for finding in check.findings) for severity in Severity}
    name = f"set {format_uuid(sb.set_uuid)}" if sb is not None else "unknown set"
    state = {Severity.NOTE: "clean", Severity.WARNING: "not as it should be", Severity.ERROR: "DAMAGED"}[check.worst]
    yield f"{name}: {state}"
    told = ", ".join(counted(counts[severity], severity.name.lower()) for severity in sorted(Severity, reverse=True))
    yield f"  {told}; {counted(totals.nodes, 'btree node')}, {counted(totals.extents, 'extent')}"
    good, lost = format_sectors(totals.dirty_sectors), format_sectors(totals.lost_dirty_sectors)
    clean, dropped = format_sectors(totals.clean_sectors), format_sectors(totals.lost_clean_sectors)
    more = " and more" if check.is_clean_unknown else ""
    yield f"  dirty data: {good} good, {lost} lost; clean data: {clean} good, {dropped}{more} to drop"
    for finding in check.findings:
        yield ""
        yield from _finding_lines(check, finding)
    if files:
        yield ""
        yield from files
    for choice in choices_of(check, repair):
        yield ""
        yield from _choice_lines(choice)
    if repair is not None and repair.left:
        yield ""
        yield f"Not repaired: {', '.join(dict.fromkeys(finding.code for finding in repair.left))}"
    if repair is None and check.worst > Severity.NOTE:
        yield ""
        yield ("Nothing was written. `bcachectl fsck -p` repairs what costs nothing, -y everything, and --repair "
               "shows the plan and asks; each keeps an undo file, and --output FILE repairs a copy."
               if offers_repair(check) else "Nothing was written, and nothing of this can be repaired here.")


def _finding_lines(check: Check, finding: Finding) -> Iterator[str]:
    device = f"{finding.device}: " if finding.device else ""
    place = f" (sector {finding.sector})" if finding.sector else ""
    yield f"{finding.severity.name.lower()} {finding.code}: {device}{finding.structure}{place}: {finding.why}"
    if finding.key and finding.key not in finding.why:
        yield f"  key {finding.key}"
    yield f"  {finding.meaning}"
    for loss in finding.losses:
        yield from _loss_lines(loss)
    for start, end in finding.unknown[:RANGES_SHOWN]:
        yield from _unknown_lines(check, start, end, is_stray=finding.code == "BTREE_STRAY")
    if len(finding.unknown) > RANGES_SHOWN:
        yield f"  and {counted(len(finding.unknown) - RANGES_SHOWN, 'more range')}; --json lists them"
    if finding.severity > Severity.NOTE and not finding.losses and not finding.unknown:
        yield "  It costs no data." if finding.is_safe else "  What it costs cannot be told."


def _unknown_lines(check: Check, start: int, end: int, *, is_stray: bool = False) -> Iterator[str]:
    # By volume, as far as there are any in the range; what lies behind the last one has no keys.
    if (start, end) == (0, MAX_POS):
        yield "  nothing is known about any data in the cache, dirty or clean"
        return
    inodes = {inode for inode, entry in enumerate(check.walk.uuids) if not entry.is_free}
    for inode in sorted(inodes | {start >> INODE_SHIFT}):
        base = inode << INODE_SHIFT
        first, last = max(start - base, 0), min(end - base, SECTOR_MASK)
        if first >= last:
            continue
        offset = check.data_offset(inode)
        first, last = max(first - offset, 0) << 9, max(last - offset, 0) << 9
        behind = "its end" if end - base >= SECTOR_MASK else f"byte {last}"
        volume = check.volume_name(inode)
        yield (f"  kept, unless something newer was written back since, which nobody knows: {volume}, bytes {first} to "
               f"{last}" if is_stray else
               f"  nothing is known about what the cache has of {volume} from byte {first} to {behind}")


def _loss_lines(loss: Loss) -> Iterator[str]:
    parts = []
    if loss.dirty_sectors:
        parts.append(f"{counted(loss.dirty_sectors, 'dirty sector')} ({format_sectors(loss.dirty_sectors)}) lost")
    if loss.clean_sectors:
        parts.append(f"{counted(loss.clean_sectors, 'clean sector')} dropped, which the backing device has")
    yield f"  {loss.volume}: {' and '.join(parts)}"
    for first, last in loss.ranges[:RANGES_SHOWN]:
        yield f"    bytes {first} to {last}"
    if len(loss.ranges) > RANGES_SHOWN:
        yield f"    and {counted(len(loss.ranges) - RANGES_SHOWN, 'more range')}; --json lists them"
