# SPDX-License-Identifier: GPL-2.0-only
"""On-disk structures as plain dictionaries: what ``--json`` prints and what the tables for people are made from.

Names are the kernel's, with the unit last; numbers stay numbers, uuids and flags become text.  What a field means in
words stands beside its number under ``..._text``.  `super_show` gives the one text that others parse:
bcache-super-show's, version 1.0.8, byte for byte.
"""

from __future__ import annotations

import struct
from typing import Any

from bcachectl.errors import Corrupt
from bcachectl.fsck.extents import Extents
from bcachectl.fsck.records import Damage, JournalEntry, Node
from bcachectl.ondisk.bkey import (
    INODE_SHIFT,
    MAX_POS,
    PTR_CHECK_DEV,
    SECTOR_MASK,
    Bkey,
    ptr_dev,
    ptr_gen,
    ptr_sector,
    text,
)
from bcachectl.ondisk.magic import BCACHE_MAGIC
from bcachectl.ondisk.superblock import (
    BDEV,
    BDEV_CACHE_MODE,
    CACHE_DISCARD,
    CACHE_REPLACEMENT,
    CACHE_SYNC,
    CDEV_WITH_FEATURES,
    FEATURE_INCOMPAT_LARGE_BUCKET,
    FEATURE_INCOMPAT_OBSO_LARGE_BUCKET,
    SB_SECTOR,
    BdevState,
    CacheMode,
    Superblock,
    check_superblock,
    decode_superblock,
    judge_csum,
)
from bcachectl.ondisk.uuids import UuidEntry
from bcachectl.units import format_uuid

VERSION_NAMES = ("CDEV", "BDEV", "unused", "CDEV_WITH_UUID", "BDEV_WITH_OFFSET", "CDEV_WITH_FEATURES",
                 "BDEV_WITH_FEATURES")
MODE_TEXTS = {CacheMode.WRITETHROUGH: "writethrough", CacheMode.WRITEBACK: "writeback",
              CacheMode.WRITEAROUND: "writearound", CacheMode.NONE: "none"}

_D_OFFSET = 208


def role(sb: Superblock) -> str:
    """``cache``, ``backing`` or ``unknown``."""
    return "cache" if sb.is_cache else "backing" if sb.is_backing else "unknown"


def state_text(state: BdevState) -> str:
    """What a backing device's superblock says, in the words of bcache-super-show; the kernel's are `BdevState.word`."""
    return "detached" if state is BdevState.NONE else state.word


def mode_text(sb: Superblock) -> str:
    """The cache mode of a backing device in the kernel's word."""
    return MODE_TEXTS[sb.cache_mode] if sb.cache_mode is not None else f"undefined ({BDEV_CACHE_MODE.get(sb.flags)})"


def replacement_text(sb: Superblock) -> str:
    """The replacement policy of a cache device in the kernel's word."""
    return (sb.replacement.name.lower() if sb.replacement is not None
            else f"undefined ({CACHE_REPLACEMENT.get(sb.flags)})")


def judge(raw: bytes, *, device_sectors: int, logical_block_sectors: int) -> str | None:
    """What the kernel says when it refuses the superblock in ``raw``; None if it takes it."""
    try:
        check_superblock(decode_superblock(raw), device_sectors=device_sectors,
                         logical_block_sectors=logical_block_sectors)
    except Corrupt as error:
        return error.why
    return None


def superblock(raw: bytes, sb: Superblock) -> dict[str, Any]:
    """Every field of a superblock; ``raw`` is what it was parsed from."""
    stored, expected = judge_csum(raw)
    fields: dict[str, Any] = {
        "role": role(sb),
        "version": sb.version,
        "version_text": VERSION_NAMES[sb.version] if sb.version < len(VERSION_NAMES) else "unknown",
        "magic": sb.magic.hex(), "magic_good": sb.magic == BCACHE_MAGIC,
        "csum": f"{stored:016x}", "csum_expected": f"{expected:016x}", "csum_good": stored == expected,
        "offset": sb.offset,
        "uuid": format_uuid(sb.uuid), "set_uuid": format_uuid(sb.set_uuid),
        "label": sb.label_text,
        "flags": f"{sb.flags:#x}", "flags_text": explain_flags(sb),
        "seq": sb.seq,
        "feature_compat": sb.feature_compat, "feature_incompat": sb.feature_incompat,
        "feature_ro_compat": sb.feature_ro_compat, "features_text": explain_features(sb),
        "block_size_sectors": sb.block_size, "bucket_size_sectors": sb.bucket_size,
        "bucket_size_field": sb.bucket_size_raw, "obso_bucket_size_hi": sb.obso_bucket_size_hi,
    }
    if sb.is_backing:
        fields |= {"data_offset_sectors": sb.data_offset, "cache_mode": mode_text(sb),
                   "state": state_text(sb.state)}
    else:
        fields |= {"nbuckets": sb.nbuckets, "size_bytes": sb.nbuckets * sb.bucket_size << 9,
                   "replacement": replacement_text(sb), "discard": sb.discard, "ordered": sb.cache_sync}
    fields |= {"nr_in_set": sb.nr_in_set, "nr_this_dev": sb.nr_this_dev, "last_mount": sb.last_mount,
               "first_bucket": sb.first_bucket, "keys": sb.keys, "journal_buckets": list(sb.d)}
    return fields


def explain_flags(sb: Superblock) -> list[str]:
    """One sentence for each flag that is set or has a value."""
    if sb.is_backing:
        said = [f"BDEV_CACHE_MODE {BDEV_CACHE_MODE.get(sb.flags)}: {mode_text(sb)}",
                f"BDEV_STATE {int(sb.state)}: {state_text(sb.state)}"]
    else:
        said = ["CACHE_SYNC: the set has run, its journal is valid" if CACHE_SYNC.get(sb.flags) else
                "no CACHE_SYNC: the set never ran, everything else on the device counts as empty"]
        if CACHE_DISCARD.get(sb.flags):
            said.append("CACHE_DISCARD: buckets are discarded before they are used again")
        said.append(f"CACHE_REPLACEMENT {CACHE_REPLACEMENT.get(sb.flags)}: {replacement_text(sb)}"
                    + ("" if sb.replacement is not None else ", a kernel would never free a bucket"))
    if sb.unknown_flags:
        said.append(f"unknown bits {sb.unknown_flags:#x}: no kernel gives them a meaning")
    return said


def explain_features(sb: Superblock) -> list[str]:
    """One sentence for each feature bit, if the version has feature words."""
    if sb.version < CDEV_WITH_FEATURES:
        return []
    if sb.is_backing:
        return ["the kernel does not read the feature words of a backing device"]
    said = []
    if sb.feature_incompat & FEATURE_INCOMPAT_LARGE_BUCKET:
        said.append("incompat large_bucket: the bucket size field is a binary logarithm")
    if sb.feature_incompat & FEATURE_INCOMPAT_OBSO_LARGE_BUCKET:
        said.append("incompat obso_large_bucket: the old form of large buckets, read-only since 5.11")
    for name, bits in (("compat", sb.feature_compat), ("incompat", sb.feature_incompat & ~3),
                       ("ro_compat", sb.feature_ro_compat)):
        if bits:
            said.append(f"{name} {bits:#x}: unknown, refused")
    return said


def uuid_entry(slot: int, entry: UuidEntry) -> dict[str, Any]:
    """One slot of the uuid array."""
    kind = ("free" if entry.is_free else "retired" if entry.is_retired
            else "volume" if entry.is_flash_only else "backing")
    return {"slot": slot, "kind": kind, "uuid": format_uuid(entry.uuid), "label": entry.label_text,
            "first_reg": entry.first_reg, "last_reg": entry.last_reg, "invalidated": entry.invalidated,
            "flags": entry.flags, "size_bytes": entry.sectors << 9}


def key(bkey: Bkey) -> dict[str, Any]:
    """One key with all its pointers; sectors are half-open."""
    return {"inode": bkey.inode, "start": bkey.start, "end": bkey.end, "dirty": bkey.dirty, "csum": bkey.csum,
            "ptrs": [{"dev": ptr.dev, "sector": ptr.sector, "gen": ptr.gen, "check": ptr.dev == PTR_CHECK_DEV}
                     for ptr in bkey.ptrs], "text": text(bkey)}


def journal_entry(entry: JournalEntry) -> dict[str, Any]:
    """The header of a journal entry and its place."""
    jset = entry.jset
    return {"seq": jset.seq, "last_seq": jset.last_seq, "version": jset.version, "bucket_index": entry.index,
            "offset_bytes": entry.offset_bytes, "blocks": jset.blocks, "key_u64s": len(jset.keys) // 8,
            "btree_level": jset.btree_level, "btree_root": key(jset.btree_root),
            "uuid_bucket": key(jset.uuid_bucket), "prio_bucket": jset.prio_bucket[0]}


def node(found: Node) -> dict[str, Any]:
    """The shape of a btree node."""
    return {"bucket": found.bucket, "gen": found.gen, "level": found.level, "start": position(found.start),
            "end": position(found.end), "size_sectors": found.nsectors, "written_blocks": found.written_blocks,
            "sets": [{"block": image.block, "seq": f"{image.seq:016x}", "keys": len(image.keys.pos)}
                     for image in found.sets]}


def damage(found: Damage) -> dict[str, Any]:
    """A damage with the range of keys that it costs."""
    return {"where": found.where, "why": found.why, "sector": found.sector, "nsectors": found.nsectors,
            "lost_start": position(found.start) if found.end else None,
            "lost_end": position(found.end) if found.end else None, "harmless": found.is_harmless}


def position(pos: int) -> str:
    """``inode:sector``; the end of the address space is ``end``."""
    return "end" if pos == MAX_POS else f"{pos >> INODE_SHIFT}:{pos & SECTOR_MASK}"


def kernel_lines(extents: Extents) -> list[str]:
    """Live extents as the kernel's debugfs file prints them."""
    return [f"{start >> INODE_SHIFT}:{start & SECTOR_MASK} len {end - start} -> "
            f"[{ptr_dev(ptr)}:{ptr_sector(ptr)} gen {ptr_gen(ptr)}]{' dirty' if dirty else ''}"
            for start, end, dirty, ptr in zip(extents.start.tolist(), extents.end.tolist(), extents.dirty.tolist(),
                                              extents.ptr.tolist(), strict=True)]


def super_show(raw: bytes, sb: Superblock) -> tuple[list[str], str]:
    """What bcache-super-show 1.0.8 prints: lines of its stdout, and its complaint on stderr, empty if it has none."""
    lines = [_line("sb.magic", "ok" if sb.magic == BCACHE_MAGIC else "bad magic")]
    if sb.magic != BCACHE_MAGIC:
        return lines, "Invalid superblock (bad magic)"
    # The "8s" is its own misprint.
    lines.append(_line("sb.first_sector", f"{sb.offset} [{'match' if sb.offset == SB_SECTOR else 'expected 8s'}]"))
    if sb.offset != SB_SECTOR:
        return lines, "Invalid superblock (bad sector)"
    stored, expected = judge_csum(raw)
    verdict = "match" if stored == expected else f"expected {expected:X}"
    lines.append(_line("sb.csum", f"{stored:X} [{verdict}]"))
    if stored != expected:
        return lines, "Corrupt superblock (bad csum)"
    is_known = sb.version < CDEV_WITH_FEATURES and (sb.is_cache or sb.is_backing)
    kind = f"{role(sb)} device" if is_known else "unknown"
    lines.append(_line("sb.version", f"{sb.version} [{kind}]"))
    if not is_known:
        return lines, ""
    lines += ["", _line("dev.label", _percent(sb.label) or "(empty)"), _line("dev.uuid", format_uuid(sb.uuid)),
              f"dev.sectors_per_block\t{sb.block_size}", f"dev.sectors_per_bucket\t{sb.bucket_size_raw}"]
    if sb.is_cache:
        lines += _super_show_cache(sb)
    else:
        first_journal_bucket: int = struct.unpack_from("<Q", raw, _D_OFFSET)[0]
        if sb.version != BDEV and (sb.keys == 1 or first_journal_bucket):
            return lines, "Possible experimental format detected, bailing"
        mode, state = BDEV_CACHE_MODE.get(sb.flags), int(sb.state)
        modes = (" [writethrough]", " [writeback]", " [writearound]", " [no caching]")
        lines += [f"dev.data.first_sector\t{sb.data_offset}",
                  f"dev.data.cache_mode\t{mode}{modes[mode] if mode < len(modes) else ''}",
                  f"dev.data.cache_state\t{state} [{state_text(sb.state)}]"]
    return [*lines, "", _line("cset.uuid", format_uuid(sb.set_uuid))], ""


def _super_show_cache(sb: Superblock) -> list[str]:
    policy = CACHE_REPLACEMENT.get(sb.flags)
    name = f" [{sb.replacement.name.lower()}]" if sb.replacement is not None else ""
    size = sb.bucket_size_raw
    return [f"dev.cache.first_sector\t{size * sb.first_bucket}",
            f"dev.cache.cache_sectors\t{size * (sb.nbuckets - sb.first_bucket)}",
            f"dev.cache.total_sectors\t{size * sb.nbuckets}",
            f"dev.cache.ordered\t{'yes' if sb.cache_sync else 'no'}",
            f"dev.cache.discard\t{'yes' if sb.discard else 'no'}",
            f"dev.cache.pos\t\t{sb.nr_this_dev}",
            f"dev.cache.replacement\t{policy}{name}"]


def _line(name: str, value: str) -> str:
    return f"{name}{chr(9) * (3 if len(name) < 8 else 2)}{value}"


def _percent(label: bytes) -> str:
    # Its bytes are signed: what is above 127 comes out with six f before it.
    return "".join(chr(byte) if chr(byte).isascii() and (chr(byte).isalnum() or chr(byte) in "._-")
                   else f"%{byte if byte < 128 else byte | 0xFFFFFF00:x}" for byte in label.split(b"\0")[0])
