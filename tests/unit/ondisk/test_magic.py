# SPDX-License-Identifier: GPL-2.0-only
"""Magics of a set that Linux 6.12 wrote."""

from __future__ import annotations

import uuid

from bcachectl.ondisk.magic import INVALID_UUID, bset_magic, jset_magic, prio_magic, set_magic

SET_UUID = uuid.UUID("1e88d7e4-86ab-4106-9d13-98d34a63b5c1").bytes


def test_T1_magics_are_mixed_with_the_set_uuid() -> None:
    assert set_magic(SET_UUID) == 0x0641AB86E4D7881E
    assert jset_magic(SET_UUID) == 0x22139E4747B5D82C
    assert jset_magic(bytes(16)) == 0x245235C1A3625032
    assert prio_magic(bytes(16)) == 0x6750E15F87337F91
    assert bset_magic(bytes(16)) == 0x90135C78B99E07F5
    assert bset_magic(SET_UUID) ^ bset_magic(bytes(16)) == set_magic(SET_UUID)


def test_invalid_uuid() -> None:
    assert len(INVALID_UUID) == 16
    assert INVALID_UUID[:4] == bytes([0xA0, 0x3E, 0xF8, 0xED])
