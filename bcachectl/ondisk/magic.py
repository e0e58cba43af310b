# SPDX-License-Identifier: GPL-2.0-only
"""The numbers that tell one structure from another (bcache_ondisk.h).

The magics of journal entries, prio sets and btree sets are XORed with the first eight bytes of the set's uuid, so that
what an earlier set left on the device is not taken for this one's.
"""

from __future__ import annotations

BCACHE_MAGIC = bytes.fromhex("c68573f64e1a45ca8265f57f48ba6d81")
"""What every superblock holds at byte 24, that is at byte 0x1018 of the device."""

INVALID_UUID = bytes.fromhex("a03ef8ed3ee1b878c850fc5ecb16cd99")
"""Marks a slot of the uuid array as used up (super.c, invalid_uuid)."""

JSET_MAGIC = 0x245235C1A3625032
PSET_MAGIC = 0x6750E15F87337F91
BSET_MAGIC = 0x90135C78B99E07F5


def set_magic(set_uuid: bytes) -> int:
    """The number that a set's uuid contributes to its magics."""
    return int.from_bytes(set_uuid[:8], "little")


def jset_magic(set_uuid: bytes) -> int:
    """Magic of the set's journal entries."""
    return JSET_MAGIC ^ set_magic(set_uuid)


def prio_magic(set_uuid: bytes) -> int:
    """Magic of the set's prio sets."""
    return PSET_MAGIC ^ set_magic(set_uuid)


def bset_magic(set_uuid: bytes) -> int:
    """Magic of the sets of keys in the set's btree nodes."""
    return BSET_MAGIC ^ set_magic(set_uuid)
