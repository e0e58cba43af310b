# SPDX-License-Identifier: GPL-2.0-only
"""fsck of a cache with ten million keys: seconds, keys a second, metadata a second beside ``dd bs=1M``, peak memory.

The image is sparse: a superblock, one journal entry, prio sets, the uuid array and a btree of full leaves.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from bcachectl.blockdev import open_device
from bcachectl.fsck.rescue import open_check
from bcachectl.ondisk.bkey import MAX_POS, encode_key_columns, pack_key, ptr_make
from bcachectl.ondisk.bset import encode_bset
from bcachectl.ondisk.geometry import Geometry
from bcachectl.ondisk.jset import encode_jset
from bcachectl.ondisk.magic import bset_magic, jset_magic, prio_magic
from bcachectl.ondisk.prio import encode_prio_set
from bcachectl.ondisk.superblock import CACHE_SYNC, Superblock, encode_superblock
from bcachectl.ondisk.uuids import UuidEntry, encode_uuids

BUCKET_SECTORS, BLOCK_SECTORS, KEY_SECTORS = 1024, 8, 8
SET_UUID, BACKING_UUID = bytes(range(16)), b"b" * 16
MEMORY_TARGET_MIB = 1024


class Writer:
    """Writes an image bucket by bucket."""

    def __init__(self, path: Path, keys: int, *, spare_buckets: int = 0, dirty_every: int = 2,
                 scattered: bool = False) -> None:
        self.keys = keys
        self.dirty_every = dirty_every
        self.data_buckets = -(-keys * KEY_SECTORS // BUCKET_SECTORS)
        self.places = np.random.default_rng(1).permutation(keys) if scattered else np.arange(keys)
        per_leaf = ((256 << 10) - 32) // 24 * 9 // 10
        self.per_leaf = per_leaf
        leaves = -(-keys // per_leaf)
        nbuckets = self.data_buckets + 2 * leaves + 600 + spare_buckets
        self.geometry = Geometry(BLOCK_SECTORS, BUCKET_SECTORS, nbuckets, 1)
        self.journal = self.geometry.njournal_default
        self.next = 1 + self.journal
        self.file = path.open("w+b")
        self.file.truncate(nbuckets * BUCKET_SECTORS * 512)
        self.metadata_bytes = 0

    def put(self, bucket: int, data: bytes | bytearray) -> None:
        self.file.seek(bucket * BUCKET_SECTORS * 512)
        self.file.write(data)
        self.metadata_bytes += len(data)

    def alloc(self) -> int:
        self.next += 1
        return self.next - 1

    def node(self, keys: bytes, end: int) -> tuple[int, int]:
        bucket = self.alloc()
        ptr = ptr_make(bucket * BUCKET_SECTORS, 1)
        self.put(bucket, encode_bset(keys, seq=bucket + 1000, magic=bset_magic(SET_UUID), seed=ptr, block_bytes=4096))
        return end, ptr

    def write(self) -> None:
        geometry = self.geometry
        data_start = 1 + self.journal + 2 * -(-self.keys // self.per_leaf) + 100
        nodes = []
        for first in range(0, self.keys, self.per_leaf):
            index = np.arange(first, min(first + self.per_leaf, self.keys), dtype=np.uint64)
            # Every other place of the volume, so that no two keys join.
            end = index * np.uint64(2 * KEY_SECTORS) + np.uint64(16 + KEY_SECTORS)
            place = self.places[first:first + len(index)].astype(np.uint64)
            sector = np.uint64(data_start * BUCKET_SECTORS) + place * np.uint64(KEY_SECTORS)
            ptr = sector << np.uint64(8) | np.uint64(1)
            count = len(index)
            dirty = index % np.uint64(self.dirty_every) == 0 if self.dirty_every else np.zeros(count, bool)
            keys = encode_key_columns(end, np.full(count, KEY_SECTORS, np.uint32), dirty, np.ones(count, np.uint8), ptr)
            is_last = first + self.per_leaf >= self.keys
            nodes.append(self.node(keys, MAX_POS if is_last else int(end[-1])))
        stream = b"".join(pack_key(end, geometry.node_sectors, False, ptr) for end, ptr in nodes)
        _end, root = self.node(stream, MAX_POS)
        uuid_bucket = self.alloc()
        self.put(uuid_bucket, encode_uuids([UuidEntry(uuid=BACKING_UUID)], geometry.meta_bytes))
        prio_bucket = 0
        for _ in range(geometry.prio_buckets):
            # Last to first; only the first one's link is never read.
            after, prio_bucket = prio_bucket, self.alloc()
            self.put(prio_bucket, encode_prio_set(1, after, np.full(geometry.prios_per_bucket, 32768, np.uint16),
                                                  np.ones(geometry.prios_per_bucket, np.uint8), prio_magic(SET_UUID),
                                                  geometry.meta_bytes))
        self.put(2, encode_jset(
            seq=1, last_seq=1, uuid_bucket=pack_key(0, geometry.meta_sectors, False,
                                                    ptr_make(uuid_bucket * BUCKET_SECTORS, 1)),
            btree_root=pack_key(MAX_POS, geometry.node_sectors, False, root), btree_level=1, prio_bucket0=prio_bucket,
            keys=b"", magic=jset_magic(SET_UUID), block_bytes=4096))
        sb = Superblock(version=3, uuid=b"c" * 16, set_uuid=SET_UUID, flags=CACHE_SYNC.mask, nbuckets=geometry.nbuckets,
                        block_size=BLOCK_SECTORS, bucket_size_raw=BUCKET_SECTORS, nr_in_set=1, first_bucket=1)
        self.file.seek(4096)
        self.file.write(encode_superblock(sb.with_journal_buckets(self.journal)))
        self.file.close()


def main() -> int:
    """Print the figures; 1 if a target is missed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--keys", type=int, default=10_000_000)
    keys = parser.parse_args().keys
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "cache.img"
        writer = Writer(path, keys)
        writer.write()
        metadata = path.with_name("metadata")
        metadata.write_bytes(bytes(1 << 20) * (writer.metadata_bytes >> 20))
        start_s = time.monotonic()
        subprocess.run(["dd", f"if={metadata}", "of=/dev/null", "bs=1M"], check=True, capture_output=True)
        dd_s = time.monotonic() - start_s
        with open_device(str(path)) as device:
            start_s = time.monotonic()
            check = open_check(lambda sector, count: device.read(sector << 9, count << 9), device.size_bytes >> 9)
            for _progress in check.stages():
                pass
            spent_s = time.monotonic() - start_s
        assert check.totals.extents == keys, check.totals
        assert not check.findings, check.findings[:3]
    mib = writer.metadata_bytes / (1 << 20)
    peak_mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"fsck of {keys} keys, {mib:.0f} MiB of metadata: {spent_s:.1f} s, {keys / spent_s:.0f} keys/s, "
          f"{mib / spent_s:.0f} MiB/s (dd: {mib / dd_s:.0f} MiB/s), {peak_mib:.0f} MiB of memory")
    return 0 if peak_mib < MEMORY_TARGET_MIB else 1


if __name__ == "__main__":
    sys.exit(main())
