# SPDX-License-Identifier: GPL-2.0-only
"""Every case of tests/damage.py: the exact findings, the exact cost, and a repair after which fsck finds nothing."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cache, lru_cache
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from bcachectl.fsck import extents as extent
from bcachectl.fsck import findings
from bcachectl.fsck.check import Check, run
from bcachectl.fsck.extents import Extents
from bcachectl.fsck.findings import CODES, Severity
from bcachectl.fsck.repair import Repair, plan_repair
from bcachectl.fsck.rescue import open_check
from bcachectl.fsck.salvage import leaf_map
from bcachectl.ondisk.bkey import INODE_SHIFT, PTR_OFFSET
from tests.damage import Case, cases
from tests.fsck.conftest import CLEAN, LEFT, NOTHING
from tests.fsck.image import Image, stored

CASES = cases()
ELSEWHERE = {"SB_OVERRULED": "test_superblock.py", "SB_HALF_UUID": "test_superblock.py",
             "SB_BLOCK_BELOW_DEVICE": "test_superblock.py"}
"""Codes without a case, and the test that knows them: they come from options and from the device's own block size."""
CONSEQUENCES = {"SB_GUESSED", "JOURNAL_TORN"}
"""Notes that come with any damage of a superblock or a journal entry."""
MOVED = ("too_long", "key_inode", "dirty_stale", "too_stale", "set_overlap", "extent_size", "extent_inode")


def test_enough_cases() -> None:
    assert len(CASES) >= 150
    assert {code for case in CASES for code in (*case.codes, *case.notes)} <= set(CODES)


def test_every_code_has_a_case() -> None:
    """But for those that need more than bytes of an image; each says where it is tried instead."""
    tried = {code for case in CASES for code in (*case.codes, *case.notes)}
    assert set(CODES) - tried == set(ELSEWHERE)
    for code, place in ELSEWHERE.items():
        assert code in (Path(__file__).parent / place).read_text()


def test_every_code_exists() -> None:
    package = Path(findings.__file__).parent
    used = {code for path in package.glob("check*.py")
            for code in re.findall(r'"((?:SB|JOURNAL|PRIO|UUID|BTREE|EXTENT|BUCKET|BACKING|ORPHAN)_[A-Z0-9_]+)"',
                                   path.read_text())}
    assert used - set(CODES) == {"PRIO_INTO_JOURNAL"} - set(CODES)


@lru_cache(maxsize=2)
def base_image(story: Path) -> Image:
    return stored(story)


def check(image: Image) -> Check:
    backings = [device.as_backing() for device in image.backings]
    return run(open_check(image.cache.read, image.cache.size_sectors, backings))


def serious(checked: Check) -> list[str]:
    return sorted({finding.code for finding in checked.findings if finding.severity > Severity.NOTE})


def notes(checked: Check) -> set[str]:
    return {finding.code for finding in checked.findings if finding.severity is Severity.NOTE}


@cache
def notes_of(story: Path) -> set[str]:
    """The notes on an undamaged image."""
    return notes(check(base_image(story).fresh()))


def apply(image: Image, repair: Repair) -> None:
    devices = {"": image.cache, **{device.name: device for device in image.backings}}
    for step in repair.steps:
        for write in step:
            devices[write.device].put(write.offset_bytes, write.data)


def live(checked: Check) -> Extents:
    parts = [leaf_map(checked.walk, slot, checked.journal, known_buckets=checked.known_buckets).kept
             for slot in checked.slots]
    return extent.concatenate(parts)


def per_sector(extents: Extents, *, dirty: bool) -> set[int]:
    """The position of every sector of the dirty or the clean extents."""
    chosen = extents.take(extents.dirty == dirty)
    found: set[int] = set()
    for start, end in zip(chosen.start.tolist(), chosen.end.tolist(), strict=True):
        found.update(range(start, end))
    return found


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_damage(golden: Callable[..., Path], case: Case, record_property: Callable[[str, object], None]) -> None:
    image = base_image(golden(case.base)).fresh()
    case.edit(image)
    before = check(image)
    assert serious(before) == sorted(case.codes)
    new_notes = notes(before) - notes_of(golden(case.base))
    assert new_notes == set(case.notes) or (not case.notes and new_notes <= CONSEQUENCES)
    assert all(finding.meaning and finding.why for finding in before.findings)
    repair = plan_repair(before, safe_only=False)
    if not repair.steps:
        assert repair.left or not case.codes
        record_property("damage", (list(case.codes), NOTHING))
        return
    apply(image, repair)
    after = check(image)
    assert set(serious(after)) <= {finding.code for finding in repair.left}
    record_property("damage", (list(case.codes), LEFT if serious(after) else CLEAN))
    if any(word in case.name for word in MOVED):
        return  # A damaged key no longer says where it was; clean extents of an old generation are no loss.
    judge_cost(before, truth_of(golden(case.base)), after)


@lru_cache(maxsize=2)
def truth_of(story: Path) -> tuple[Extents, set[int], set[int]]:
    """The live map of an undamaged image, and its clean and dirty sectors."""
    extents = live(check(base_image(story).fresh()))
    return extents, per_sector(extents, dirty=False), per_sector(extents, dirty=True)


def judge_cost(before: Check, good: tuple[Extents, set[int], set[int]], after: Check) -> None:
    """What was reported as lost is what is missing, and nothing that is there was not there before."""
    truth, left = good[0], live(after)
    for dirty, reported in ((True, before.totals.lost_dirty_sectors), (False, before.totals.lost_clean_sectors)):
        missing = good[1 + dirty] - per_sector(left, dirty=dirty)
        if not dirty:
            # The journal does not say that dirty data was written back: it may come back as dirty, with its content.
            missing -= per_sector(left, dirty=True)
        is_known = dirty or not before.is_clean_unknown
        if is_known and not any(finding.unknown for finding in before.findings):
            assert len(missing) <= reported, f"{len(missing)} missing, {reported} reported, dirty: {dirty}"
    assert not per_sector(left, dirty=False) - good[1]
    judge_content(before, after, left, truth)
    assert np.unique(left.start >> np.uint64(INODE_SHIFT)).size <= np.unique(truth.start >> np.uint64(INODE_SHIFT)).size


def judge_content(before: Check, after: Check, left: Extents, truth: Extents) -> None:
    """Every sector that is left holds what it held, wherever it is, but where nobody knew what it should hold."""
    (pos, sector), (good_pos, good_sector) = per_position(left), per_position(truth)
    place = np.searchsorted(good_pos, pos)
    assert bool((good_pos[np.minimum(place, len(good_pos) - 1)] == pos).all())
    unknown = {each for finding in before.findings for each in finding.unknown}
    is_known = np.ones(len(pos), np.bool_)
    for start, end in unknown:
        is_known &= (pos < np.uint64(start)) | (pos >= np.uint64(end))
    for row in np.flatnonzero(is_known & (sector != good_sector[place])).tolist():
        one, other = int(sector[row]), int(good_sector[place[row]])
        assert after.walk.read(one, 1) == after.walk.read(other, 1), f"position {int(pos[row])}"


def per_position(extents: Extents) -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.uint64]]:
    """Each position, ascending, and the cache's sector that it is in."""
    size = extents.size.astype(np.int64)
    row = np.repeat(np.arange(len(size)), size)
    nth = (np.arange(len(row)) - np.repeat(np.cumsum(size) - size, size)).astype(np.uint64)
    pos, sector = extents.start[row] + nth, PTR_OFFSET.get(extents.ptr)[row] + nth
    order = np.argsort(pos, kind="stable")
    return pos[order], sector[order]
