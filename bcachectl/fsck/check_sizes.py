# SPDX-License-Identifier: GPL-2.0-only
"""Rules about sizes and counts: device, journal and uuid array against the superblock, and features of backing devices.

Nothing here needs more than the superblocks and the newest journal entry.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from bcachectl.errors import BcachectlError
from bcachectl.fsck.findings import Finding
from bcachectl.fsck.walk import Read, Walk
from bcachectl.ondisk import validity
from bcachectl.ondisk.geometry import PAGE_SECTORS
from bcachectl.ondisk.jset import JSET_VERSION_UUIDV1, walk_journal_bucket
from bcachectl.ondisk.magic import jset_magic
from bcachectl.ondisk.superblock import SB_BYTES, SB_SECTOR, Superblock, check_superblock, decode_superblock
from bcachectl.units import format_uuid


def check_sizes(walk: Walk, sb: Superblock) -> Iterator[Finding]:
    """Every rule of this file about a cache device; ``sb`` is what the walk goes by, given or the device's own."""
    own = _own(walk)
    if own is None and sb.set_uuid[:8] == sb.set_uuid[8:]:
        yield _superblock("SB_HALF_UUID", f"it begins with {sb.set_uuid[:8].hex()}")
    if own is not None and (own.set_uuid, own.bucket_size) != (sb.set_uuid, sb.bucket_size):
        yield _superblock("SB_OVERRULED", f"set {format_uuid(own.set_uuid)}, buckets of {own.bucket_size} sectors")
    elif own is not None and own.cache_sync:
        within, behind = journal_shortfall(walk.read, own)
        if behind > within:
            yield _superblock("SB_JOURNAL_SHORT", f"{len(own.d)} journal buckets; entries up to {behind} stand behind "
                                                  f"them, and within only up to {within}")
    used = sb.nbuckets * sb.bucket_size
    if walk.size_sectors - used >= sb.bucket_size:
        yield _superblock("SB_DEVICE_LARGER", f"the device has {walk.size_sectors} sectors, the set uses {used}")
    if sb.block_size > PAGE_SECTORS:
        yield _superblock("SB_BLOCK_ABOVE_PAGE", f"blocks of {sb.block_size} sectors")
    if sb.block_size < walk.logical_block_sectors:
        yield _superblock("SB_BLOCK_BELOW_DEVICE", f"blocks of {sb.block_size} sectors, the device's have "
                                                   f"{walk.logical_block_sectors}")
    if walk.newest is not None and sb.cache_sync:
        yield from _uuid_pointer(walk)


def _superblock(code: str, why: str) -> Finding:
    return Finding(code, "superblock", why, sector=SB_SECTOR)


def _own(walk: Walk) -> Superblock | None:
    # The device's own superblock, if nothing is wrong with it by itself.
    try:
        sb = decode_superblock(walk.read(SB_SECTOR, SB_BYTES >> 9))
        check_superblock(sb, device_sectors=walk.size_sectors, for_kernel=False)
    except BcachectlError:
        return None
    return sb if sb.is_cache else None


def journal_shortfall(read: Read, sb: Superblock) -> tuple[int, int]:
    """The highest journal entry within the journal buckets, and behind them up to where a journal usually ends.

    The second is 0 if there is none; only if there is one does anybody look for the first.  If it is the higher one,
    the superblock names too few journal buckets, and a kernel would go back in time without a word.
    """
    end = min(sb.first_bucket + sb.geometry.njournal_default, sb.nbuckets)
    behind = _highest(read, sb, range(sb.first_bucket + len(sb.d), end))
    return _highest(read, sb, sb.d) if behind else 0, behind


def _highest(read: Read, sb: Superblock, buckets: Iterable[int]) -> int:
    geometry, highest = sb.geometry, 0
    for bucket in buckets:
        try:
            buf = read(geometry.sector_of(bucket), geometry.bucket_size_sectors)
        except BcachectlError:
            continue
        found = walk_journal_bucket(buf, magic=jset_magic(sb.set_uuid), block_bytes=geometry.block_bytes)
        highest = max([highest, *(jset.seq for _offset, jset in found)])
    return highest


def _uuid_pointer(walk: Walk) -> Iterator[Finding]:
    newest, geometry = walk.newest, walk.geometry
    assert newest is not None
    key = newest.uuid_bucket
    if validity.btree_ptr_invalid(key, geometry) or not validity.ptr_available(key.ptrs[0]):
        return
    bucket = geometry.bucket_of(key.ptrs[0].sector)
    where = f"uuid array at bucket {bucket}"
    if newest.version >= JSET_VERSION_UUIDV1 and key.size not in (geometry.meta_sectors, geometry.bucket_size_sectors):
        yield Finding("UUID_LENGTH", where, f"{key.size} sectors, a set like this writes {geometry.meta_sectors}",
                      bucket, key.ptrs[0].sector)
    stale = validity.ptr_stale(key, geometry, walk.gens)
    if stale:
        yield Finding("UUID_STALE", where, f"stale by {stale}", bucket, key.ptrs[0].sector)
