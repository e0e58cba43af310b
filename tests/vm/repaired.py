# SPDX-License-Identifier: GPL-2.0-only
"""Images that were damaged and repaired, for the kernel to register: `repaired` makes one, `register` boots with some.

A name says what was done: a case of `tests.damage`, one of `MORE`, several of them with a + between, or a seed of
`tests.fsck.combined` on an image as ``deep_crash:7``.  What each volume must hold then is put together from both
devices by the walk over the repaired image, and held against the undamaged image: it differs in nothing that the report
did not list as lost or as unknown.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np

from bcachectl.fsck.check import Check
from bcachectl.fsck.owners import live_extents
from bcachectl.fsck.repair import plan_repair
from bcachectl.ondisk.bkey import INODE_SHIFT, ptr_sector
from bcachectl.ondisk.superblock import SB_BYTES, SB_SECTOR, parse_superblock
from tests.damage import Case, cases
from tests.fsck.combined import (
    MOVING,
    Listed,
    Truth,
    bases,
    damaged,
    is_newest_torn,
    listed,
    truth_before_newest,
    truth_of,
)
from tests.fsck.image import Image
from tests.fsck.test_damage import apply, base_image, check, serious
from tests.vm import machine

DISKS_MAX = 22
"""Of so many disks a machine has room."""


def _zero_last_set(number: int) -> Callable[[Image], None]:
    # Zeros where the last set of a leaf begins: the log seems to end before it.
    def edit(image: Image) -> None:
        node = [node for node in image.nodes if not node.level][number]
        image.cache.put(image.set_at(node, len(node.sets) - 1), bytes(512))
    return edit


MORE = (
    Case("last_set_zero_deep_crash", "deep_crash", _zero_last_set(2), ("BTREE_SET_MISSING",)),
    Case("last_set_zero_two_backing", "two_backing", _zero_last_set(0), ("BTREE_SET_MISSING",)),
    Case("sb_flags_overwritten_deep_crash", "deep_crash",
         lambda image: image.sb(104, "Q", 0xA5A5A5A5A5A5A5A7, fix=False), ("SB_CSUM",)),
    Case("sb_flags_zero_dirty_crash", "dirty_crash", lambda image: image.sb(104, "Q", 0, fix=False), ("SB_CSUM",)),
    Case("sb_zero_dirty_crash", "dirty_crash", lambda image: image.cache.put(SB_SECTOR << 9, bytes(SB_BYTES)),
         ("SB_OFFSET",)),
)
CASES = {case.name: case for case in (*cases(), *MORE)}


class Repaired(NamedTuple):
    """A repaired image and what the volumes of its backing devices hold."""

    name: str
    image: Image
    sums: list[str]


def seeds(count: int) -> list[str]:
    """Names of combined damage, so many for each image."""
    return [f"{base}:{seed}" for seed in range(count) for base in bases()]


def repaired(name: str, golden: Callable[..., Path]) -> Repaired | None:
    """Damaged and repaired as the name says; None if a repair has nothing to do, or leaves what it cannot end."""
    base, _, seed = name.partition(":")
    named = [CASES[part] for part in name.split("+")] if not seed else []
    story = golden(named[0].base if named else base)
    good = base_image(story)
    if named:
        image = good.fresh()
        for case in named:
            case.edit(image)
    else:
        image, _names = damaged(_truth(story), bases()[base], random.Random(f"repaired/{name}"))
    truth = _truth(story)
    if is_newest_torn(image, truth):
        truth = truth_before_newest(truth)
    before = check(image)
    repair = plan_repair(before, safe_only=False)
    if not repair.steps:
        return None
    apply(image, repair)
    after = check(image)
    if repair.left or serious(after):
        assert named == [] or serious(after) == [] or repair.left, f"{name}: {serious(after)}"
        return None
    for device in (image.cache, *image.backings):
        for sector in tuple(device.unreadable):
            device.put(sector << 9, bytes(512))   # As a disk does with a sector that is written again.
    found = contents(image, after)
    if named and not any(word in name for word in MOVING) and good.backings:
        # What the report called safe reads back whole.
        wrong = differing(found, contents(truth.image, check(truth.image)), listed(before))
        assert wrong == [], f"{name}: {len(wrong)} sectors, {wrong[:3]}"
        truths = [json.loads(path.read_text())["sha256"] for path in sorted(story.glob("truth?.json"))]
        if truths and all(finding.is_safe for finding in before.findings) and truth.image is good:
            assert _sums(found) == truths[:len(found)], name
    return Repaired(name, image, _sums(found))


@lru_cache(maxsize=2)
def _truth(story: Path) -> Truth:
    return truth_of(base_image(story))


def _sums(found: Sequence[bytes]) -> list[str]:
    return [hashlib.sha256(content).hexdigest() for content in found]


def contents(image: Image, checked: Check) -> list[bytes]:
    """The content of each backing device's volume."""
    found = []
    extents = live_extents(checked)
    cache = image.cache.content()
    for device in image.backings:
        sb = parse_superblock(device.read(SB_SECTOR, SB_BYTES >> 9))
        content = bytearray(device.content())
        inode = next((slot for slot, entry in enumerate(checked.walk.uuids) if entry.uuid == sb.uuid), None)
        if inode is not None:
            own = extents.take(extents.start >> INODE_SHIFT == inode)
            for start, end, ptr in zip(own.start.tolist(), own.end.tolist(), own.ptr.tolist(), strict=True):
                at, sector = start - (inode << INODE_SHIFT), ptr_sector(ptr)
                content[at << 9:(at + end - start) << 9] = cache[sector << 9:(sector + end - start) << 9]
        found.append(bytes(content[sb.data_offset << 9:]))
    return found


def differing(found: Sequence[bytes], true: Sequence[bytes], told: Listed, *, data_offset: int = 16) -> list[str]:
    """Sectors with other content than the truth that the report did not list."""
    wrong = []
    for number, (mine, good) in enumerate(zip(found, true, strict=True)):
        ours, theirs = (np.frombuffer(each, np.uint8).reshape(-1, 512) for each in (mine, good))
        for sector in np.flatnonzero((ours != theirs).any(axis=1)).tolist():
            if not told.has((number << INODE_SHIFT) + sector + data_offset):
                wrong.append(f"volume {number}, sector {sector}")
    return wrong


def register(some: Sequence[Repaired], directory: Path, *, series: str = machine.DEFAULT_SERIES) -> None:
    """One boot: each image is registered, all its volumes are read, and it is stopped; nothing is complained of."""
    disks: list[Path] = []
    script: list[str] = []
    for index, one in enumerate(some):
        names = []
        for device in [one.image.cache, *one.image.backings]:
            path = directory / f"{index}-{device.name}.img"
            path.write_bytes(device.content())
            disks.append(path)
            names.append(f"/dev/vd{chr(ord('a') + len(disks) - 1)}")
        script.append(f"echo '{one.name}'; echo '{one.name}' >/dev/kmsg; register {' '.join(names)}")
        for volume, disk in enumerate(names[1:]):
            link = f"/sys/block/{disk.removeprefix('/dev/')}/bcache/dev"
            script.append(f"wait_for 60 test -e {link}; volume=$(basename $(readlink {link})); wait_volume $volume\n"
                          f"sha256sum </dev/$volume >/job/sum-{index}-{volume}")
        script.append("stop_all")
    result = machine.run("\n".join(script), disks, directory / "share", timeout_s=800, series=series).check()
    for index, one in enumerate(some):
        found = [(result.share / f"sum-{index}-{volume}").read_text().split()[0] for volume in range(len(one.sums))]
        assert found == one.sums, one.name
    assert result.complaints() == []
    for path in disks:
        path.unlink()
