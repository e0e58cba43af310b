# SPDX-License-Identifier: GPL-2.0-only
"""Flags of a superblock that fails its checksum: `cache_flags` and `settle` say which to write, `changes` what differs.

A repair that takes the fields as they are and sets the checksum right makes garbage look good.  The flags are where
that costs data: a backing device that says *clean* is used without its cache, and discard has cost users their
priorities.  So:

1. There are few sensible flag words.  If the checksum fits with one of them, that is what was written, beyond doubt.
2. Otherwise the damage lies elsewhere, or there as well, and the word is believed as far as the rest bears it out, and
   only where a mistake costs nothing.  A cache has run if there is a journal; discard is off; a replacement policy that
   may be is kept.  A backing device is *dirty* unless the set is sure to have nothing dirty of it.  A word with bits
   that have no meaning was overwritten: then the mode is writethrough, and the policy lru.
3. What nothing bears out is left as it is: a kernel refuses such a device, and that is better than a device that comes
   up without its cache.  `bcachectl resolve` has the user choose.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import product
from typing import NamedTuple, Protocol

from bcachectl.errors import BcachectlError
from bcachectl.fsck.tally import Spread
from bcachectl.ondisk.magic import BCACHE_MAGIC
from bcachectl.ondisk.superblock import (
    BDEV_CACHE_MODE,
    BDEV_STATE,
    CACHE_DISCARD,
    CACHE_REPLACEMENT,
    CACHE_SYNC,
    SB_BYTES,
    SB_SECTOR,
    BdevState,
    CacheMode,
    Replacement,
    Superblock,
    encode_superblock,
    judge_csum,
    parse_superblock,
)


class Evidence(Protocol):
    """What is known of the dirty data that a set holds of its devices."""

    @property
    def dirty(self) -> dict[int, Spread]:
        """Sectors by device number, and where they lie."""

    def may_lack(self, inode: int) -> bool:
        """Dirty data of a device number may be missing from ``dirty``."""


class Settled(NamedTuple):
    """The superblock to write, or None if nothing tells which, and that in words; no words if it is what was there."""

    superblock: Superblock | None
    words: tuple[str, ...]


def cache_flags(sb: Superblock, raw: bytes) -> int:
    """The flags of a cache device whose superblock ``raw`` should be ``sb``, flags apart; the set has a journal."""
    words = (CACHE_REPLACEMENT.set(CACHE_DISCARD.set(CACHE_SYNC.set(0, sync), discard), policy)
             for sync, discard, policy in product((1, 0), (0, 1), Replacement))
    stored, expected = judge_csum(raw)
    proven = sb.flags if stored == expected else _proven(sb, raw, words)
    if proven is not None:
        found = replace(sb, flags=CACHE_SYNC.set(proven, 1))
        return found.flags if found.replacement is not None else found.with_replacement(Replacement.LRU).flags
    policy = sb.replacement if not sb.unknown_flags else None
    return CACHE_REPLACEMENT.set(CACHE_SYNC.set(0, 1), Replacement.LRU if policy is None else policy)


def settle(sb: Superblock, raw: bytes, evidence: Evidence | None, *, slot: int | None, is_member: bool) -> Settled:
    """What to write over a backing superblock ``raw`` that fails its checksum and says ``sb``.

    ``slot`` is its device number if the set knows its uuid, ``is_member`` whether it names the set; without a cache at
    hand there is no ``evidence`` and no slot.
    """
    sb = replace(sb, offset=SB_SECTOR, keys=len(sb.d))
    words = (BDEV_STATE.set(BDEV_CACHE_MODE.set(0, mode), state) for mode, state in product(CacheMode, BdevState))
    proven = _proven(sb, raw, words)
    if proven is not None:
        found = replace(sb, flags=proven)
        return Settled(found, tuple(changes(sb, found)))
    is_known = slot is not None and is_member
    has_dirty = slot is not None and evidence is not None and (slot in evidence.dirty or evidence.may_lack(slot))
    is_unattached = sb.state is BdevState.NONE and not any(sb.set_uuid) and not sb.unknown_flags and slot is None
    runs_alone = sb.state in (BdevState.NONE, BdevState.STALE)
    if sb.state is not BdevState.DIRTY and not is_unattached and (not is_known or (runs_alone and has_dirty)):
        return Settled(None, (f"state {sb.state.word}, which nothing bears out",))
    found = sb
    if sb.unknown_flags or sb.cache_mode is None:
        found = replace(sb, flags=0).with_state(sb.state).with_cache_mode(CacheMode.WRITETHROUGH)
    if sb.state is BdevState.CLEAN and has_dirty:
        found = found.with_state(BdevState.DIRTY)
    return Settled(found, tuple(changes(sb, found)))


def superblock_there(read: Callable[[int, int], bytes]) -> Superblock:
    """What stands where the superblock should; an empty one if that cannot be read."""
    try:
        return parse_superblock(read(SB_SECTOR, SB_BYTES >> 9))
    except BcachectlError:
        return Superblock()


def changes(was: Superblock, now: Superblock) -> Iterator[str]:
    """What of the flags differs, in words; nothing if there was no superblock."""
    if was.magic != BCACHE_MAGIC:
        return
    if was.is_cache and now.is_cache:
        if was.cache_sync != now.cache_sync:
            yield f"a set that has {'' if now.cache_sync else 'not '}run"
        if was.discard != now.discard:
            yield f"discard {'on' if now.discard else 'off'}"
        if was.replacement is not now.replacement and now.replacement is not None:
            yield f"replacement {now.replacement.name.lower()}"
    if was.is_backing and now.is_backing:
        if was.state is not now.state:
            yield f"state {now.state.word}, not {was.state.word}"
        if was.cache_mode is not now.cache_mode and now.cache_mode is not None:
            yield f"cache mode {now.cache_mode.name.lower()}"
    if was.unknown_flags & ~now.unknown_flags:
        yield f"flag bits {was.unknown_flags & ~now.unknown_flags:#x} cleared"


def _proven(sb: Superblock, raw: bytes, words: Iterator[int]) -> int | None:
    # The flags with which the checksum that is there is right.
    stored = judge_csum(raw)[0]
    return next((word for word in (sb.flags, *words)
                 if judge_csum(encode_superblock(replace(sb, flags=word), raw))[0] == stored), None)
