# SPDX-License-Identifier: GPL-2.0-only
"""Whose data it is where the uuid array does not say: found, or told, never guessed in silence."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from bcachectl import cli
from bcachectl.errors import WrongState
from bcachectl.fsck.check import Check
from bcachectl.fsck.owners import ASSIGN_FLASH, ASSIGN_NONE, live_extents, slot_plan
from bcachectl.fsck.repair import Repair, plan_repair
from bcachectl.ondisk.magic import INVALID_UUID
from bcachectl.units import format_uuid
from tests.damage_rare import forget_arrays, forget_slots
from tests.fsck.image import Device, Image
from tests.fsck.test_damage import apply, base_image, check, live, per_sector, serious


def mended(image: Image, assign: dict[int, bytes] | None = None) -> tuple[Repair, Check]:
    """A full repair, and what a second check finds."""
    repair = plan_repair(check(image), safe_only=False, assign=assign)
    apply(image, repair)
    return repair, check(image)


def uuids(checked: Check) -> dict[int, bytes]:
    return {slot: entry.uuid for slot, entry in enumerate(checked.walk.uuids) if not entry.is_free}


@pytest.mark.parametrize("name", ["dirty_crash", "killed", "deep_crash"])
@pytest.mark.parametrize("forget", [forget_slots, forget_arrays])
def test_one_slot_and_one_device(golden: Callable[..., Path], name: str, forget: Callable[[Image], None]) -> None:
    base = base_image(golden(name))
    image = base.fresh()
    forget(image)
    repair, after = mended(image)
    [choice] = repair.choices
    assert choice.outcome.startswith("given to back0")
    assert serious(after) == []
    assert uuids(after) == uuids(check(base.fresh()))
    for dirty in (True, False):
        assert per_sector(live(after), dirty=dirty) == per_sector(live(check(base.fresh())), dirty=dirty)


def test_a_guess_is_not_safe(golden: Callable[..., Path]) -> None:
    image = base_image(golden("dirty_crash")).fresh()
    forget_arrays(image)
    assert plan_repair(check(image), safe_only=True).steps == ()


@pytest.mark.parametrize("first", [0, 1])
def test_the_content_tells_two_devices_apart(golden: Callable[..., Path], first: int) -> None:
    """Two devices say that they are attached, one slot has data: clean data is on the right device too."""
    base = base_image(golden("attached_clean"))
    image = base.fresh()
    other = Device("other", bytes(len(base.backings[0].base)))
    other.put(4096, image.backings[0].get(4096, 4096))
    image.sb(40, "16s", b"another device's", device=other)
    image.backings.insert(first, other)
    forget_arrays(image)
    repair, after = mended(image)
    [choice] = repair.choices
    assert "back0" in choice.outcome
    assert "agree" in choice.outcome
    assert uuids(after)[0] == uuids(check(base.fresh()))[0]
    assert per_sector(live(after), dirty=False) == per_sector(live(check(base.fresh())), dirty=False)


def only_dirty(image: Image) -> Image:
    """Nothing to compare: the contents of both devices are as those of fresh disks, and so is all clean data."""
    for device in image.backings:
        raw = device.get(4096, 4096)
        device.base = bytes(len(device.base))
        device.put(4096, raw)
    extents = live(check(image))
    clean = extents.take(~extents.dirty)
    for sector, size in zip((clean.ptr >> 8).tolist(), clean.size.tolist(), strict=True):
        image.cache.put((sector & (1 << 43) - 1) << 9, bytes(size << 9))
    return image


def test_undecided_is_told_and_blocks(golden: Callable[..., Path]) -> None:
    base = base_image(golden("two_backing"))
    image = only_dirty(base.fresh())
    forget_arrays(image)
    before = check(image)
    repair = plan_repair(before, safe_only=False)
    assert repair.steps == ()
    assert [choice.outcome for choice in repair.choices] == ["", ""]
    assert {each.device for choice in repair.choices for each in choice.evidence} == {"back0", "back1"}
    right = uuids(check(base.fresh()))
    repair, after = mended(image, {0: right[0]})
    assert [choice.outcome for choice in repair.choices] == [
        "given to the device, as told",
        "given to back1: the only slot without an owner, the only device without a slot"]
    assert uuids(after) == right
    assert serious(after) == []


def test_assigned_otherwise(golden: Callable[..., Path]) -> None:
    base = base_image(golden("dirty_crash"))
    image = base.fresh()
    forget_arrays(image)
    _repair, after = mended(image, {0: ASSIGN_NONE})
    assert after.walk.uuids[0].uuid == INVALID_UUID
    assert after.totals.dirty_sectors == check(base.fresh()).totals.dirty_sectors
    image = base.fresh()
    forget_arrays(image)
    _repair, after = mended(image, {0: ASSIGN_FLASH})
    entry = after.walk.uuids[0]
    assert entry.is_flash_only
    assert entry.sectors >= int(live(after).end.max())


def test_lost_flash_volume_is_known_by_its_first_sectors(golden: Callable[..., Path]) -> None:
    base = base_image(golden("flash_volume"))
    image = base.fresh()
    forget_arrays(image)
    repair, after = mended(image)
    flash = [choice.inode for choice in repair.choices if "superblock" in choice.outcome]
    was = check(base.fresh()).walk.uuids
    assert flash == [slot for slot, entry in enumerate(was) if entry.is_flash_only and not entry.is_free]
    assert all(after.walk.uuids[slot].is_flash_only for slot in flash)
    assert serious(after) == []


@pytest.mark.parametrize("inode", [5, 0])
def test_no_such_slot(golden: Callable[..., Path], inode: int) -> None:
    found = check(base_image(golden("dirty_crash")).fresh())
    with pytest.raises(WrongState, match=f"--assign {inode}"):
        slot_plan(found, live_extents(found), {inode: ASSIGN_NONE})


def test_the_verb(golden: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Without a device there is nothing to go by: the choice is told, nothing is written; then it is made."""
    image = base_image(golden("dirty_crash")).fresh()
    right = uuids(check(image))
    forget_arrays(image)
    paths = []
    for device in (image.cache, image.backings[0]):
        paths.append(tmp_path / f"{device.name}.img")
        paths[-1].write_bytes(device.content())
    cache = str(paths[0])
    undo = ["--backup", str(tmp_path / "undo")]
    assert cli.run(["fsck", "-y", *undo, cache]) == 4
    out = capsys.readouterr().out
    assert "slot 0: 19.5 MiB of dirty data" in out
    assert "--assign 0=" in out
    assert paths[0].read_bytes() == image.cache.content()
    assert cli.run(["fsck", "--json", *map(str, paths)]) == 4
    [choice] = json.loads(capsys.readouterr().out)["choices"]
    assert (choice["slot"], choice["candidates"][0]["uuid"]) == (0, format_uuid(right[0]))
    assert cli.run(["fsck", "-y", "--assign", f"0={format_uuid(right[0])}", *undo, cache]) == 1
    capsys.readouterr()
    assert cli.run(["fsck", *map(str, paths)]) == 0
    assert cli.run(["undo", str(tmp_path / "undo")]) == 0
    for words in (["0"], ["x=none"], ["0=nothing"], ["0=none", "--assign", "0=flash"]):
        assert cli.run(["fsck", "-y", "--assign", *words, cache]) == 16
    assert cli.run(["fsck", "--assign", "0=none", cache]) == 16
