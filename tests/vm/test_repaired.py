# SPDX-License-Identifier: GPL-2.0-only
"""The kernel registers what fsck repaired, without a complaint, and hands out what fsck said that it kept.

Each case of `tests.damage` named here is damaged, repaired and written to files; one boot takes several, one after the
other.  The expected content is put together from both devices by the walk over the repaired image.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from bcachectl.fsck.check import Check
from bcachectl.fsck.repair import plan_repair
from bcachectl.ondisk.bkey import INODE_SHIFT, ptr_sector
from bcachectl.ondisk.superblock import SB_BYTES, SB_SECTOR, parse_superblock
from tests.damage import cases
from tests.fsck.image import Image
from tests.fsck.test_damage import apply, base_image, check, live, serious
from tests.vm import machine

CASES = {case.name: case for case in cases()}
BOOTS = (
    ("sb_all_zero_attached_clean", "sb_bucket_size_1000_attached_clean", "sb_version_7_attached_clean",
     "sb_journal_257_attached_clean", "sb_uuid_zero_attached_clean", "set_csum_first_root_leaf_attached_clean",
     "sb_replacement_5_attached_clean"),
    ("prio_csum_dirty_crash", "prio_magic_dirty_crash", "journal_middle_csum_dirty_crash",
     "journal_prio_beyond_dirty_crash", "journal_uuids_beyond_dirty_crash", "journal_last_seq_ahead_dirty_crash",
     "backing_csum_dirty_crash", "backing_mode_9_dirty_crash"),
    ("prio_zero_thrash_crash", "prio_value_thrash_crash", "extent_overlap_thrash_crash",
     "extent_in_metadata_thrash_crash", "set_magic_first_leaf_thrash_crash", "uuid_twice_two_backing",
     "journal_key_beyond_two_backing"),
    ("prio_csum_deep_crash", "prio_next_beyond", "set_csum_middle_leaf_deep_crash", "set_zero_interior_deep_crash",
     "child_beyond_gen_churn", "extent_beyond_gen_churn", "set_csum_first_interior_gen_churn"),
    ("uuid_array_zero_dirty_crash", "set_unreadable_root_leaf_attached_clean", "sb_journal_short_deep_crash",
     "root_level_2_thrash_crash", "key_two_pointers_gen_churn", "set_unreadable_leaf_deep_crash"),
)


def contents(image: Image, checked: Check) -> list[str]:
    """The SHA-256 of each backing device's volume."""
    sums = []
    extents = live(checked)
    cache = image.cache.content()
    for device in image.backings:
        sb = parse_superblock(device.read(SB_SECTOR, SB_BYTES >> 9))
        inode = next(slot for slot, entry in enumerate(checked.walk.uuids) if entry.uuid == sb.uuid)
        content = bytearray(device.content())
        own = extents.take(extents.start >> INODE_SHIFT == inode)
        for start, end, ptr in zip(own.start.tolist(), own.end.tolist(), own.ptr.tolist(), strict=True):
            at, sector = start - (inode << INODE_SHIFT), ptr_sector(ptr)
            content[at << 9:(at + end - start) << 9] = cache[sector << 9:(sector + end - start) << 9]
        sums.append(hashlib.sha256(content[sb.data_offset << 9:]).hexdigest())
    return sums


@pytest.mark.timeout(900)
@pytest.mark.parametrize("number", range(len(BOOTS)))
def test_kernel_registers_repaired(golden: Callable[..., Path], tmp_path: Path, number: int) -> None:
    disks: list[Path] = []
    script: list[str] = []
    expected: list[list[str]] = []
    for index, name in enumerate(BOOTS[number]):
        image = base_image(golden(CASES[name].base)).fresh()
        CASES[name].edit(image)
        before = check(image)
        repair = plan_repair(before, safe_only=False)
        assert repair.steps, name
        apply(image, repair)
        checked = check(image)
        assert serious(checked) == [], name
        for sector in tuple(image.cache.unreadable):
            image.cache.put(sector << 9, bytes(512))  # As a disk does with a sector that is written again.
        expected.append(contents(image, checked))
        truths = sorted(golden(CASES[name].base).glob("truth?.json"))
        if truths and all(finding.is_safe for finding in before.findings):
            # What the report called safe reads back whole: as its users wrote it before the damage.
            known = [json.loads(path.read_text())["sha256"] for path in truths]
            assert expected[-1] == known[:len(expected[-1])], name
        names = []
        for device in [image.cache, *image.backings]:
            path = tmp_path / f"{index}-{device.name}.img"
            path.write_bytes(device.content())
            disks.append(path)
            names.append(f"/dev/vd{chr(ord('a') + len(disks) - 1)}")
        script.append(f"echo '{name}'; register {' '.join(names)}")
        for volume, disk in enumerate(names[1:]):
            link = f"/sys/block/{disk.removeprefix('/dev/')}/bcache/dev"
            script.append(f"wait_for 60 test -e {link}; volume=$(basename $(readlink {link})); wait_volume $volume\n"
                          f"sha256sum </dev/$volume >/job/sum-{index}-{volume}")
        script.append("stop_all")
    result = machine.run("\n".join(script), disks, tmp_path / "share", timeout_s=800).check()
    for index, name in enumerate(BOOTS[number]):
        found = [(result.share / f"sum-{index}-{volume}").read_text().split()[0]
                 for volume in range(len(expected[index]))]
        assert found == expected[index], name
