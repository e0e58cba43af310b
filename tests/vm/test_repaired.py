# SPDX-License-Identifier: GPL-2.0-only
"""The kernel registers what fsck repaired, without a complaint, and hands out what fsck said that it kept.

Each name stands for one damage (`tests.vm.repaired`); one boot takes several images, one after the other.  With
BCACHECTL_REPAIRED=all (``make repaired``) every case of `tests.damage` is tried, and combinations of them.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.vm import machine
from tests.vm.repaired import CASES, DISKS_MAX, register, repaired, seeds

SAMPLE = (
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
    # Sets that are gone, keys outside their leaf, leaves hidden by wrong pointers.
    ("set_zero_last_leaf_killed", "last_set_zero_deep_crash", "last_set_zero_two_backing", "separator_lower_deep_crash",
     "separator_higher_deep_crash", "child_twice_deep_crash", "child_same_deep_crash+child_into_journal_deep_crash",
     "child_is_interior_deep_crash"),
    # Flags that fail their checksum, superblocks that were guessed, data where metadata is, what discard left.
    ("sb_flags_overwritten_deep_crash", "sb_flags_zero_dirty_crash", "backing_state_overwritten_dirty_crash",
     "backing_state_overwritten_two_backing", "sb_zero_dirty_crash", "extent_in_metadata_gen_churn",
     "prio_in_journal_gen_churn", "uuids_in_prio", "journal_discarded_deep_crash"),
)
ALL = os.environ.get("BCACHECTL_REPAIRED") == "all"
COMBINED = 6
"""Seeds for each image with ``make repaired``."""
NAMES = (*sorted(CASES), *seeds(COMBINED))
SHARE = 12
"""Names of a test with ``make repaired``."""


@pytest.mark.timeout(900)
@pytest.mark.parametrize("number", range(len(SAMPLE)))
def test_kernel_registers_repaired(golden: Callable[..., Path], tmp_path: Path, number: int) -> None:
    some = []
    for name in SAMPLE[number]:
        one = repaired(name, golden)
        assert one is not None, name
        some.append(one)
    register(some, tmp_path)


if ALL:
    @pytest.mark.timeout(2000)
    @pytest.mark.parametrize("number", range(-(-len(NAMES) // SHARE)))
    def test_kernel_registers_every_repair(golden: Callable[..., Path], tmp_path: Path, number: int) -> None:
        some, disks = [], 0
        for name in NAMES[number * SHARE:(number + 1) * SHARE]:
            one = repaired(name, golden)
            if one is None:
                continue
            disks += 1 + len(one.image.backings)
            if disks > DISKS_MAX:
                register(some, tmp_path)
                some, disks = [], 1 + len(one.image.backings)
            some.append(one)
        if some:
            register(some, tmp_path, series="6.1" if number % 2 else machine.DEFAULT_SERIES)
