# SPDX-License-Identifier: GPL-2.0-only
"""A repair that is interrupted at any write: fsck -y again ends where it would have ended, and undo is a way back.

Each write of each scenario is interrupted before it, after it and torn by sector: any of its sectors may be there.  Of
the other writes of a step, which may pass each other on their way, any may be there as well; steps are in order, since
each is flushed before the next.  `make damage` does this to every case of tests/damage.py that a repair ends.
"""

from __future__ import annotations

import hashlib
import os
import random
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest

from bcachectl import cli, writeplan
from bcachectl.blockdev import BlockDevice
from bcachectl.fsck.check import Check
from bcachectl.fsck.repair import Repair, RepairWrite, plan_repair
from tests.damage import Case, cases
from tests.fsck.image import Image
from tests.fsck.test_damage import apply, base_image, check, live, per_position, serious

CASES = {case.name: case for case in cases()}
SCENARIOS = ("sb_all_zero_attached_clean", "prio_csum_dirty_crash", "journal_middle_csum_two_backing",
             "uuid_array_zero_dirty_crash", "uuid_twice_two_backing", "set_csum_first_root_leaf_attached_clean",
             "set_unreadable_root_leaf_attached_clean", "backing_clean_dirty", "root_level_1_flash_volume",
             "extent_overlap_thrash_crash", "child_beyond_gen_churn", "uuid_flash_0", "set_zero_interior_gen_churn",
             "child_is_interior_gen_churn")
EXTRA = ("set_csum_middle_leaf_deep_crash", "set_zero_interior_deep_crash", "sb_csum_deep_crash",
         "prio_csum_deep_crash", "separator_lower_deep_crash")
"""Many writes each: a sample of them."""
EXTRA_POINTS = 6
ALL = os.environ.get("BCACHECTL_DAMAGE") == "all"
BEFORE, TORN, AFTER = "before", "torn", "after"


def states(repair: Repair, dice: random.Random) -> Iterator[tuple[str, list[tuple[RepairWrite, bytes]]]]:
    """What may have reached the devices, for each write and each way to be interrupted there."""
    done: list[tuple[RepairWrite, bytes]] = []
    number = 0
    for step in repair.steps:
        for write in step:
            others = [each for each in step if each is not write]
            reached = [(each, each.data) for each in others if dice.random() < 0.5]
            sectors = range(len(write.data) >> 9)
            torn = [one_sector(write, sector) for sector in sectors if dice.random() < 0.5]
            yield f"{BEFORE} write {number}", [*done, *reached]
            yield f"{TORN} write {number}", [*done, *reached, *((each, each.data) for each in torn)]
            yield f"{AFTER} write {number}", [*done, *reached, (write, write.data)]
            number += 1
        done += [(write, write.data) for write in step]


def one_sector(write: RepairWrite, sector: int) -> RepairWrite:
    """One sector of a write."""
    return RepairWrite(write.device, write.offset_bytes + (sector << 9), write.data[sector << 9:(sector + 1) << 9],
                       write.what)


def put(image: Image, reached: list[tuple[RepairWrite, bytes]]) -> None:
    devices = {"": image.cache, **{device.name: device for device in image.backings}}
    for write, data in reached:
        devices[write.device].put(write.offset_bytes, data)


def interrupted(image: Image, steps: tuple[tuple[RepairWrite, ...], ...], done: int, dice: random.Random) -> None:
    """Apply ``done`` writes; of the step that is under way any may be missing, and one may be torn."""
    devices = {"": image.cache, **{device.name: device for device in image.backings}}
    for step in steps:
        if done <= 0:
            return
        is_whole = done >= len(step)
        for write in step if is_whole else dice.sample(step, done):
            data = write.data
            if not is_whole and len(data) > 512 and dice.random() < 0.5:
                data = data[:dice.randrange(1, len(data) // 512) * 512]
            devices[write.device].put(write.offset_bytes, data)
        done -= len(step)


def content(checked: Check) -> str:
    """A digest of all data that is left: positions, whether dirty, bytes."""
    digest = hashlib.sha256()
    for dirty in (True, False):
        every = live(checked)
        positions, sectors = per_position(every.take(every.dirty == dirty))
        digest.update(positions.tobytes())
        for sector in sectors.tolist():
            digest.update(checked.walk.read(sector, 1))
    return digest.hexdigest()


def judge(base: Image, case: Case, points: set[int] | None = None) -> int:
    """Interrupt the repair of a case everywhere, or at some of the states; how many there were."""
    whole = base.fresh()
    case.edit(whole)
    repair = plan_repair(check(whole), safe_only=False)
    left = {finding.code for finding in repair.left}
    apply(whole, repair)
    wanted = content(check(whole))
    count = 0
    for number, (where, reached) in enumerate(states(repair, random.Random(case.name))):
        if points is not None and number not in points:
            continue
        image = base.fresh()
        case.edit(image)
        put(image, reached)
        apply(image, plan_repair(check(image), safe_only=False))
        after = check(image)
        assert set(serious(after)) <= left, f"{case.name}, {where}"
        assert content(after) == wanted, f"{case.name}, {where}"
        count += 1
    return count


@pytest.mark.parametrize("name", sorted(set(CASES) - set(EXTRA)) if ALL else SCENARIOS)
def test_every_write(golden: Callable[..., Path], name: str, record_property: Callable[[str, object], None]) -> None:
    count = judge(base_image(golden(CASES[name].base)), CASES[name])
    if count:
        record_property("interrupted", count)
    assert count >= 3 or name not in SCENARIOS


@pytest.mark.parametrize("name", EXTRA)
def test_some_writes(golden: Callable[..., Path], name: str, record_property: Callable[[str, object], None]) -> None:
    base = base_image(golden(CASES[name].base))
    image = base.fresh()
    CASES[name].edit(image)
    total = 3 * sum(len(step) for step in plan_repair(check(image), safe_only=False).steps)
    points = None if ALL else {total - 1, *random.Random(name).sample(range(total), min(EXTRA_POINTS, total))}
    record_property("interrupted", judge(base, CASES[name], points))


@pytest.mark.parametrize("name", ["prio_csum_dirty_crash", "uuid_array_zero_dirty_crash", "backing_clean_dirty"])
def test_undo_of_an_interrupted_repair(golden: Callable[..., Path], tmp_path: Path, name: str,
                                       monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The program dies at a write, before or in the middle of it; undo then restores every byte of every device."""
    image = base_image(golden(CASES[name].base)).fresh()
    CASES[name].edit(image)
    paths = image.as_files(tmp_path)
    before = [path.read_bytes() for path in paths]
    words = [str(path) for path in paths]
    writes = sum(len(step) for step in plan_repair(check(image), safe_only=False).steps)
    points = range(writes) if ALL else sorted({0, writes // 4, writes // 3, writes - 1})
    for point in points:
        for is_torn in (False, True) if ALL else (point % 2 == 0,):
            undo = tmp_path / f"undo-{point}-{is_torn}"
            with monkeypatch.context() as patch:
                patch.setattr(writeplan, "apply", dying(point, is_torn))
                cli.run(["fsck", "-y", "--backup", str(undo), *words])
            said = capsys.readouterr().err
            assert "Died" in said
            assert f"`bcachectl undo {undo}` takes back what was written" in said
            assert cli.run(["undo", str(undo)]) == 0, f"write {point}, torn: {is_torn}"
            assert [path.read_bytes() for path in paths] == before, f"write {point}, torn: {is_torn}"


class Died(BaseException):
    """The end of the program."""


def dying(point: int, is_torn: bool) -> Callable[..., None]:
    """A `writeplan.apply` that dies at a write, after half of it if ``is_torn``."""
    def apply_until(plan: writeplan.Plan, devices: Mapping[str, BlockDevice]) -> None:
        for number, write in enumerate(plan.writes):
            data = write.data or bytes(write.length_bytes)
            if number == point and not is_torn:
                raise Died
            reached = data if number < point or not is_torn else data[:len(data) // 1024 * 512]
            devices[write.device].write(write.offset_bytes, reached)
            if number == point:
                raise Died
        raise AssertionError("there is no such write")

    return apply_until
