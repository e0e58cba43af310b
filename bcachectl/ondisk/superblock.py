# SPDX-License-Identifier: GPL-2.0-only
"""The superblock of a cache or backing device (bcache_ondisk.h, cache_sb_disk; super.c, read_super and __write_super).

It stands at sector 8 and takes 4 KiB, of which 2264 bytes have a meaning.  Life of one:

1. a formatter writes version 0, 1 or 4 (5 for buckets from 32 MiB on) with no journal buckets;
2. the first kernel that runs the set chooses the journal buckets, sets CACHE_SYNC and raises version 0 to 3;
3. from then on it is read once at registration and *patched* at each write: whatever the kernel does not know stays.

`encode_superblock` does the same with ``base``.  The checksum covers the journal buckets in use and nothing behind
them, so its length depends on ``keys``, which is bounded before the checksum is computed.

Two rules have more than one form.  Bucket size: `Superblock.bucket_size`.  Byte 184: the number of buckets of a cache
device, the start of the data of a backing device, where version 1 means 16 whatever stands there.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, replace
from enum import IntEnum

from construct import Array, Bytes, Int16ul, Int32ul, Int64ul
from construct import Struct as Layout

from bcachectl.errors import Corrupt
from bcachectl.ondisk.bitmask import Bitmask
from bcachectl.ondisk.crc64 import Buffer, crc64
from bcachectl.ondisk.geometry import PAGE_SECTORS, Geometry
from bcachectl.ondisk.magic import BCACHE_MAGIC
from bcachectl.units import format_label

SB_SECTOR = 8
SB_BYTES = 4096
SB_JOURNAL_BUCKETS = 256

CDEV = 0
BDEV = 1
CDEV_WITH_UUID = 3
BDEV_WITH_OFFSET = 4
CDEV_WITH_FEATURES = 5
BDEV_WITH_FEATURES = 6
CACHE_VERSIONS = (CDEV, CDEV_WITH_UUID, CDEV_WITH_FEATURES)
BACKING_VERSIONS = (BDEV, BDEV_WITH_OFFSET, BDEV_WITH_FEATURES)

BDEV_DATA_START_DEFAULT = 16
NBUCKETS_MIN = 128
NBUCKETS_MIN_RUN = 513
"""The kernel's allocator refuses to run fewer buckets, although its superblock check allows `NBUCKETS_MIN`."""
NBUCKETS_MAX = (1 << 63) - 1
MAX_CACHES_PER_SET = 8

FEATURE_INCOMPAT_OBSO_LARGE_BUCKET = 1 << 0
FEATURE_INCOMPAT_LARGE_BUCKET = 1 << 1
FEATURE_INCOMPAT_SUPPORTED = FEATURE_INCOMPAT_OBSO_LARGE_BUCKET | FEATURE_INCOMPAT_LARGE_BUCKET
BUCKET_ORDER_MAX = 31

CACHE_SYNC = Bitmask(0, 1)
CACHE_DISCARD = Bitmask(1, 1)
CACHE_REPLACEMENT = Bitmask(2, 3)
BDEV_CACHE_MODE = Bitmask(0, 4)
BDEV_STATE = Bitmask(61, 2)

LAYOUT = Layout(
    "csum" / Int64ul,                      # over bytes 8 to 208 + 8 * keys
    "offset" / Int64ul,                    # the sector it was written to, always 8
    "version" / Int64ul,
    "magic" / Bytes(16),
    "uuid" / Bytes(16),                    # of this device
    "set_uuid" / Bytes(16),
    "label" / Bytes(32),
    "flags" / Int64ul,
    "seq" / Int64ul,
    "feature_compat" / Int64ul,            # the three feature words: from version 5 on
    "feature_incompat" / Int64ul,
    "feature_ro_compat" / Int64ul,
    "pad" / Array(5, Int64ul),
    "nbuckets_or_data_offset" / Int64ul,   # cache: buckets; backing: sector where the data starts
    "block_size" / Int16ul,                # sectors
    "bucket_size" / Int16ul,               # sectors, or their binary logarithm
    "nr_in_set" / Int16ul,
    "nr_this_dev" / Int16ul,
    "last_mount" / Int32ul,                # unix seconds
    "first_bucket" / Int16ul,
    "keys" / Int16ul,                      # njournal_buckets
    "d" / Array(256, Int64ul),             # bucket numbers of the journal
    "obso_bucket_size_hi" / Int16ul,
    "tail" / Bytes(6),
    "rest" / Bytes(4096 - 2264),
)

# Byte 0 to 208 without the five pad words, which no field of `Superblock` holds.
_HEAD = struct.Struct("<3Q16s16s16s32s5Q")
_BODY = struct.Struct("<Q4HI2H")
_BODY_OFFSET = 184
_D_OFFSET = 208
_KEYS_OFFSET = 206
_OBSO_OFFSET = 2256
assert _HEAD.size == 144
assert _BODY_OFFSET + _BODY.size == _D_OFFSET


class CacheMode(IntEnum):
    """What a backing device's requests do with the cache (BDEV_CACHE_MODE)."""

    WRITETHROUGH = 0
    WRITEBACK = 1
    WRITEAROUND = 2
    NONE = 3


class BdevState(IntEnum):
    """What the cache means to a backing device (BDEV_STATE)."""

    NONE = 0
    CLEAN = 1
    DIRTY = 2
    STALE = 3

    @property
    def word(self) -> str:
        """What the kernel's attribute ``state`` says (sysfs.c, bch_cached_dev)."""
        return ("no cache", "clean", "dirty", "inconsistent")[self]


class Replacement(IntEnum):
    """How buckets to reuse are chosen (CACHE_REPLACEMENT)."""

    LRU = 0
    FIFO = 1
    RANDOM = 2


@dataclass(frozen=True, slots=True)
class Superblock:
    """Every field, raw; the properties interpret them.

    For a version that is neither a cache's nor a backing device's, ``nbuckets`` holds byte 184.
    """

    csum: int = 0
    offset: int = SB_SECTOR
    version: int = CDEV
    magic: bytes = BCACHE_MAGIC
    uuid: bytes = bytes(16)
    set_uuid: bytes = bytes(16)
    label: bytes = bytes(32)
    flags: int = 0
    seq: int = 0
    feature_compat: int = 0
    feature_incompat: int = 0
    feature_ro_compat: int = 0
    nbuckets: int = 0
    data_offset: int = 0
    block_size: int = 0
    bucket_size_raw: int = 0
    nr_in_set: int = 0
    nr_this_dev: int = 0
    last_mount: int = 0
    first_bucket: int = 0
    keys: int = 0
    d: tuple[int, ...] = ()
    obso_bucket_size_hi: int = 0

    @property
    def is_cache(self) -> bool:
        """A cache device's, of a version that kernels know."""
        return self.version in CACHE_VERSIONS

    @property
    def is_backing(self) -> bool:
        """A backing device's, of a version that kernels know."""
        return self.version in BACKING_VERSIONS

    @property
    def bucket_size(self) -> int:
        """Sectors of a bucket, by whichever of the three forms applies; 0 if the logarithm is out of range."""
        if self.version < CDEV_WITH_FEATURES or not self.feature_incompat & FEATURE_INCOMPAT_SUPPORTED:
            return self.bucket_size_raw
        if self.feature_incompat & FEATURE_INCOMPAT_LARGE_BUCKET:
            return 1 << self.bucket_size_raw if self.bucket_size_raw <= BUCKET_ORDER_MAX else 0
        return self.bucket_size_raw + (self.obso_bucket_size_hi << 16)

    @property
    def is_obso_large_bucket(self) -> bool:
        """The form of large buckets that kernels since 5.11 only read: every volume of such a set is read-only."""
        return (self.version >= CDEV_WITH_FEATURES
                and self.feature_incompat & FEATURE_INCOMPAT_SUPPORTED == FEATURE_INCOMPAT_OBSO_LARGE_BUCKET)

    @property
    def cache_sync(self) -> bool:
        """The set has run and its journal is valid; without it a cache device counts as empty."""
        return bool(CACHE_SYNC.get(self.flags))

    @property
    def discard(self) -> bool:
        """Buckets are discarded before they are used again."""
        return bool(CACHE_DISCARD.get(self.flags))

    @property
    def replacement(self) -> Replacement | None:
        """The replacement policy; None for the values 3 to 7, for which a kernel frees nothing at all."""
        value = CACHE_REPLACEMENT.get(self.flags)
        return Replacement(value) if value in tuple(Replacement) else None

    @property
    def cache_mode(self) -> CacheMode | None:
        """The cache mode; None for the values 4 to 15, which have no meaning."""
        value = BDEV_CACHE_MODE.get(self.flags)
        return CacheMode(value) if value in tuple(CacheMode) else None

    @property
    def state(self) -> BdevState:
        """The state of a backing device."""
        return BdevState(BDEV_STATE.get(self.flags))

    @property
    def unknown_flags(self) -> int:
        """Bits of ``flags`` that no kernel gives a meaning to; kept, and worth a report."""
        if self.is_backing:
            return self.flags & ~(BDEV_CACHE_MODE.mask | BDEV_STATE.mask)
        return self.flags & ~(CACHE_SYNC.mask | CACHE_DISCARD.mask | CACHE_REPLACEMENT.mask)

    @property
    def label_text(self) -> str:
        """The label up to its first NUL; all 32 bytes may be in use."""
        return format_label(self.label)

    @property
    def geometry(self) -> Geometry:
        """The cut of a cache device, with 4 KiB pages."""
        return Geometry(self.block_size, self.bucket_size, self.nbuckets, self.first_bucket)

    def with_cache_mode(self, mode: CacheMode) -> Superblock:
        """The same with another cache mode."""
        return replace(self, flags=BDEV_CACHE_MODE.set(self.flags, mode))

    def with_state(self, state: BdevState) -> Superblock:
        """The same with another state."""
        return replace(self, flags=BDEV_STATE.set(self.flags, state))

    def with_sync(self, is_sync: bool) -> Superblock:
        """The same with CACHE_SYNC set or cleared."""
        return replace(self, flags=CACHE_SYNC.set(self.flags, is_sync))

    def with_replacement(self, policy: Replacement) -> Superblock:
        """The same with another replacement policy."""
        return replace(self, flags=CACHE_REPLACEMENT.set(self.flags, policy))

    def with_discard(self, is_discard: bool) -> Superblock:
        """The same with discard on or off."""
        return replace(self, flags=CACHE_DISCARD.set(self.flags, is_discard))

    def with_journal_buckets(self, count: int) -> Superblock:
        """The same with ``count`` journal buckets, the first that may be allocated (super.c, run_cache_set)."""
        assert 0 <= count <= SB_JOURNAL_BUCKETS
        return replace(self, keys=count, d=tuple(range(self.first_bucket, self.first_bucket + count)))


def judge_csum(raw: Buffer) -> tuple[int, int]:
    """The checksum that stands in a superblock, and the one that belongs there."""
    keys: int = struct.unpack_from("<H", raw, _KEYS_OFFSET)[0]
    stored: int = struct.unpack_from("<Q", raw)[0]
    return stored, crc64(memoryview(raw)[8:_D_OFFSET + 8 * min(keys, SB_JOURNAL_BUCKETS)])


def parse_superblock(raw: Buffer) -> Superblock:
    """Every field of ``raw``, without any judgement; ``d`` has at most 256 elements whatever ``keys`` says."""
    assert len(raw) >= SB_BYTES
    (csum, offset, version, magic, uuid, set_uuid, label, flags, seq,
     feature_compat, feature_incompat, feature_ro_compat) = _HEAD.unpack_from(raw)
    (nbuckets, block_size, bucket_size_raw, nr_in_set, nr_this_dev, last_mount,
     first_bucket, keys) = _BODY.unpack_from(raw, _BODY_OFFSET)
    journal_buckets = struct.unpack_from(f"<{min(keys, SB_JOURNAL_BUCKETS)}Q", raw, _D_OFFSET)
    obso_bucket_size_hi: int = struct.unpack_from("<H", raw, _OBSO_OFFSET)[0]
    data_offset = 0
    if version in BACKING_VERSIONS:
        data_offset = BDEV_DATA_START_DEFAULT if version == BDEV else nbuckets
        nbuckets = 0
    return Superblock(csum, offset, version, magic, uuid, set_uuid, label, flags, seq, feature_compat, feature_incompat,
                      feature_ro_compat, nbuckets, data_offset, block_size, bucket_size_raw, nr_in_set, nr_this_dev,
                      last_mount, first_bucket, keys, journal_buckets, obso_bucket_size_hi)


def decode_superblock(raw: Buffer) -> Superblock:
    """The superblock in the 4096 bytes ``raw``.

    Corrupt if it is none or damaged; `check_superblock` judges what it says.  ``keys`` past 256 is refused before the
    checksum, whose range it would stretch; kernels before 5.9 had the same order.
    """
    sb = parse_superblock(raw)
    if sb.offset != SB_SECTOR:
        raise Corrupt("superblock", "Not a bcache superblock (bad offset)")
    if sb.magic != BCACHE_MAGIC:
        raise Corrupt("superblock", "Not a bcache superblock (bad magic)")
    if sb.keys > SB_JOURNAL_BUCKETS:
        raise Corrupt("superblock", "Too many journal buckets")
    stored, expected = judge_csum(raw)
    if stored != expected:
        raise Corrupt("superblock", "Bad checksum")
    return sb


def encode_superblock(sb: Superblock, base: Buffer | None = None) -> bytes:
    """The 4096 bytes of a superblock, with its checksum computed.

    ``base`` is what was read: bytes that no field stands for keep their value from there, among them the journal
    buckets behind ``keys`` and, for version 1, byte 184.
    """
    assert sb.keys == len(sb.d) <= SB_JOURNAL_BUCKETS, (sb.keys, len(sb.d))
    raw = bytearray(SB_BYTES) if base is None else bytearray(base[:SB_BYTES])
    assert len(raw) == SB_BYTES
    _HEAD.pack_into(raw, 0, 0, sb.offset, sb.version, sb.magic, sb.uuid, sb.set_uuid, sb.label, sb.flags, sb.seq,
                    sb.feature_compat, sb.feature_incompat, sb.feature_ro_compat)
    if sb.version == BDEV:
        nbuckets: int = struct.unpack_from("<Q", raw, _BODY_OFFSET)[0]
    else:
        nbuckets = sb.data_offset if sb.is_backing else sb.nbuckets
    _BODY.pack_into(raw, _BODY_OFFSET, nbuckets, sb.block_size, sb.bucket_size_raw, sb.nr_in_set, sb.nr_this_dev,
                    sb.last_mount, sb.first_bucket, sb.keys)
    struct.pack_into(f"<{len(sb.d)}Q", raw, _D_OFFSET, *sb.d)
    struct.pack_into("<H", raw, _OBSO_OFFSET, sb.obso_bucket_size_hi)
    struct.pack_into("<Q", raw, 0, judge_csum(raw)[1])
    return bytes(raw)


def check_superblock(sb: Superblock, *, device_sectors: int, logical_block_sectors: int = 1,
                     for_kernel: bool = True) -> None:
    """Judge what a superblock says as the kernel does at registration, in its order (read_super, read_super_common).

    ``device_sectors`` is the size of the whole disk, which is what the kernel compares even for a partition.  With
    ``for_kernel`` the limits of a running kernel count too: its page size, and the buckets that its allocator needs.
    """
    if sb.uuid == bytes(16):
        raise _bad("Bad UUID")
    if sb.block_size < max(logical_block_sectors, 1):
        raise _bad("Superblock block size smaller than device block size")
    if sb.is_cache:
        _check_features(sb)
        _check_cache(sb, device_sectors=device_sectors, for_kernel=for_kernel)
    elif sb.is_backing:
        if sb.data_offset < BDEV_DATA_START_DEFAULT:
            raise _bad("Bad data offset")
    else:
        raise _bad("Unsupported superblock version")


def _check_features(sb: Superblock) -> None:
    if sb.version < CDEV_WITH_FEATURES:
        return
    if sb.feature_compat:
        raise _bad("Unsupported compatible feature found")
    if sb.feature_ro_compat:
        raise _bad("Unsupported read-only compatible feature found")
    if sb.feature_incompat & ~FEATURE_INCOMPAT_SUPPORTED:
        raise _bad("Unsupported incompatible feature found")


def check_backing_features(sb: Superblock) -> None:
    """Corrupt if a backing device of version 6 asks for a feature; none is known.

    The kernel does not look at these words, and writes zeros into them.  Whoever is about to write the device should
    not guess what they mean.
    """
    if sb.version == BDEV_WITH_FEATURES and sb.feature_ro_compat:
        raise _bad("Unsupported read-only compatible feature found")
    if sb.version == BDEV_WITH_FEATURES and sb.feature_incompat:
        raise _bad("Unsupported incompatible feature found")


def _check_cache(sb: Superblock, *, device_sectors: int, for_kernel: bool) -> None:
    if sb.keys > SB_JOURNAL_BUCKETS:
        raise _bad("Too many journal buckets")
    if sb.nbuckets > NBUCKETS_MAX:
        raise _bad("Too many buckets")
    if sb.nbuckets < NBUCKETS_MIN:
        raise _bad("Not enough buckets")
    if not _is_power_of_2(sb.block_size):
        raise _bad("Bad block size (not power of 2)")
    if sb.block_size > PAGE_SECTORS and for_kernel:
        raise _bad("Bad block size (larger than page size)")
    if not _is_power_of_2(sb.bucket_size):
        raise _bad("Bad bucket size (not power of 2)")
    if sb.bucket_size < PAGE_SECTORS:
        raise _bad("Bad bucket size (smaller than page size)")
    if device_sectors < sb.bucket_size * sb.nbuckets:
        raise _bad("Invalid superblock: device too small")
    if sb.set_uuid == bytes(16):
        raise _bad("Bad UUID")
    if not sb.nr_this_dev < sb.nr_in_set <= MAX_CACHES_PER_SET:
        raise _bad("Bad cache device number in set")
    if sb.d != tuple(range(sb.first_bucket, sb.first_bucket + sb.keys)):
        raise _bad("Journal buckets not sequential")
    if sb.first_bucket + sb.keys > sb.nbuckets:
        raise _bad("Too many journal buckets")
    if sb.first_bucket * sb.bucket_size < SB_SECTOR + SB_BYTES // 512:
        raise _bad("Invalid superblock: first bucket comes before end of super")
    if sb.nbuckets < NBUCKETS_MIN_RUN and for_kernel:
        raise _bad("ca->sb.nbuckets is too small")


def _is_power_of_2(value: int) -> bool:
    return value > 0 and value & (value - 1) == 0


def _bad(why: str) -> Corrupt:
    return Corrupt("superblock", why)
