# SPDX-License-Identifier: GPL-2.0-only
"""fsck of a cache with ten million keys, beside ``dd bs=1M`` of the same bytes; what else reads every leaf; memory.

Two images, each sparse, with a superblock, a journal, prio sets, the uuid array and a btree of full leaves:

* *new*: what a cache holds that was filled once, in the order of the volume;
* *old*: every extent somewhere else on the cache, as after a long life; each leaf has three later sets that overwrite
  some of it, one bucket in fifty a generation that the prio sets do not know yet, and the journal has keys for every
  leaf.

The file that dd reads holds what the image has allocated, hole by hole left out, and is as warm; the journal, which
fsck reads to its end, is allocated as a whole.  A round is dd, then
fsck; the figures are medians over the rounds, with their spread.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt

from bcachectl.blockdev import BlockDevice, open_device
from bcachectl.fsck.check import Check, run
from bcachectl.fsck.records import PlainLeaf
from bcachectl.fsck.rescue import open_check
from bcachectl.fsck.tally import Place, Tallier
from bcachectl.fsck.walk import Walk
from bcachectl.fsck.writeback import find_dirty
from bcachectl.ondisk.bkey import MAX_POS, encode_key_columns, pack_key, ptr_make
from bcachectl.ondisk.bset import encode_bset
from bcachectl.ondisk.geometry import Geometry
from bcachectl.ondisk.jset import encode_jset
from bcachectl.ondisk.magic import bset_magic, jset_magic, prio_magic
from bcachectl.ondisk.prio import encode_prio_set
from bcachectl.ondisk.superblock import CACHE_SYNC, Superblock, encode_superblock
from bcachectl.ondisk.uuids import UuidEntry, encode_uuids
from bench.process import machine, row

BUCKET_SECTORS, BLOCK_SECTORS, KEY_SECTORS = 1024, 8, 8
KEYS_PER_BUCKET = BUCKET_SECTORS // KEY_SECTORS
SET_UUID, BACKING_UUID = bytes(range(16)), b"b" * 16
MEMORY_TARGET_MIB = 1024
DD_SHARE_TARGET = 0.5
LATER_SETS, LATER_KEYS = 3, 64
RAISED = 50
"""Of so many buckets one has a generation that the prio sets do not know."""

U64 = npt.NDArray[np.uint64]


class Writer:
    """Writes an image bucket by bucket: one set in each leaf, or, if ``is_old``, what a long life leaves behind."""

    def __init__(self, path: Path, keys: int, *, spare_buckets: int = 0, dirty_every: int = 2, scattered: bool = False,
                 is_old: bool = False) -> None:
        self.keys, self.dirty_every, self.is_old = keys, dirty_every, is_old
        room_bytes = (256 << 10) - (LATER_SETS * 4096 if is_old else 0)
        self.per_leaf = (room_bytes - 32) // 24 * 9 // 10
        leaves = -(-keys // self.per_leaf)
        pointers = keys + (leaves * LATER_KEYS * (LATER_SETS + 1) if is_old else 0)
        self.data_buckets = -(-pointers // KEYS_PER_BUCKET)
        self.places = np.random.default_rng(1).permutation(pointers) if scattered or is_old else np.arange(pointers)
        self.used = 0
        nbuckets = self.data_buckets + 2 * leaves + 600 + spare_buckets
        self.geometry = Geometry(BLOCK_SECTORS, BUCKET_SECTORS, nbuckets, 1)
        self.journal = self.geometry.njournal_default
        self.data_start = 1 + self.journal + 2 * leaves + 100
        self.next = 1 + self.journal
        self.file = path.open("w+b")
        self.file.truncate(nbuckets * BUCKET_SECTORS * 512)

    def put(self, bucket: int, data: bytes | bytearray, offset: int = 0) -> None:
        self.file.seek(bucket * BUCKET_SECTORS * 512 + offset)
        self.file.write(data)

    def alloc(self) -> int:
        self.next += 1
        return self.next - 1

    def pointers(self, count: int) -> U64:
        """Pointers to places that nobody has yet."""
        places = self.places[self.used:self.used + count].astype(np.uint64)
        self.used += count
        gen = np.ones(count, np.uint64)
        if self.is_old:
            gen += places // np.uint64(KEYS_PER_BUCKET) % np.uint64(RAISED) == 0
        return (np.uint64(self.data_start * BUCKET_SECTORS) + places * np.uint64(KEY_SECTORS)) << np.uint64(8) | gen

    def stream(self, index: U64) -> bytes:
        """Keys of every other place of the volume, so that no two join."""
        end = index * np.uint64(2 * KEY_SECTORS) + np.uint64(16 + KEY_SECTORS)
        count = len(index)
        dirty = index % np.uint64(self.dirty_every) == 0 if self.dirty_every else np.zeros(count, np.bool_)
        return encode_key_columns(end, np.full(count, KEY_SECTORS, np.uint32), dirty, np.ones(count, np.uint8),
                                  self.pointers(count))

    def node(self, sets: list[bytes], end: int) -> tuple[int, int]:
        bucket = self.alloc()
        ptr = ptr_make(bucket * BUCKET_SECTORS, 1)
        offset = 0
        for keys in sets:
            data = encode_bset(keys, seq=bucket + 1000, magic=bset_magic(SET_UUID), seed=ptr, block_bytes=4096)
            self.put(bucket, data, offset)
            offset += len(data)
        return end, ptr

    def write(self) -> None:
        dice = np.random.default_rng(2)
        nodes, journal = [], []
        for first in range(0, self.keys, self.per_leaf):
            last = min(first + self.per_leaf, self.keys)
            sets = [self.stream(np.arange(first, last, dtype=np.uint64))]
            if self.is_old:
                few = min(LATER_KEYS, last - first)
                again = [np.sort(dice.choice(last - first, few, replace=False)) + first for _ in range(LATER_SETS + 1)]
                sets += [self.stream(some.astype(np.uint64)) for some in again[1:]]
                journal.append(self.stream(again[0].astype(np.uint64)))
            is_last = last == self.keys
            nodes.append(self.node(sets, MAX_POS if is_last else (last - 1) * 2 * KEY_SECTORS + 16 + KEY_SECTORS))
        stream = b"".join(pack_key(end, self.geometry.node_sectors, False, ptr) for end, ptr in nodes)
        _end, root = self.node([stream], MAX_POS)
        self._write_rest(root, journal)

    def _write_rest(self, root: int, journal: list[bytes]) -> None:
        geometry = self.geometry
        uuid_bucket = self.alloc()
        self.put(uuid_bucket, encode_uuids([UuidEntry(uuid=BACKING_UUID)], geometry.meta_bytes))
        prio_bucket = 0
        for _ in range(geometry.prio_buckets):
            # Last to first; only the first one's link is never read.
            after, prio_bucket = prio_bucket, self.alloc()
            self.put(prio_bucket, encode_prio_set(1, after, np.full(geometry.prios_per_bucket, 32768, np.uint16),
                                                  np.ones(geometry.prios_per_bucket, np.uint8), prio_magic(SET_UUID),
                                                  geometry.meta_bytes))
        for index in range(self.journal):
            self.put(1 + index, bytes(BUCKET_SECTORS * 512))
        bucket, offset = 2, 0
        for seq, keys in enumerate(journal or [b""], 1):
            entry = encode_jset(
                seq=seq, last_seq=1, uuid_bucket=pack_key(0, geometry.meta_sectors, False,
                                                          ptr_make(uuid_bucket * BUCKET_SECTORS, 1)),
                btree_root=pack_key(MAX_POS, geometry.node_sectors, False, root), btree_level=1,
                prio_bucket0=prio_bucket, keys=keys, magic=jset_magic(SET_UUID), block_bytes=4096)
            if offset + len(entry) > BUCKET_SECTORS * 512:
                bucket, offset = bucket + 1, 0
            self.put(bucket, entry, offset)
            offset += len(entry)
        assert bucket <= self.journal
        sb = Superblock(version=3, uuid=b"c" * 16, set_uuid=SET_UUID, flags=CACHE_SYNC.mask, nbuckets=geometry.nbuckets,
                        block_size=BLOCK_SECTORS, bucket_size_raw=BUCKET_SECTORS, nr_in_set=1, first_bucket=1)
        self.file.seek(4096)
        self.file.write(encode_superblock(sb.with_journal_buckets(self.journal)))
        self.file.close()


def allocated(path: Path) -> Iterator[bytes]:
    """What the file has, holes left out."""
    with path.open("rb") as file:
        end, size = 0, path.stat().st_size
        while end < size:
            try:
                start = os.lseek(file.fileno(), end, os.SEEK_DATA)
            except OSError:
                return
            end = os.lseek(file.fileno(), start, os.SEEK_HOLE)
            for at in range(start, end, 1 << 20):
                yield os.pread(file.fileno(), min(end - at, 1 << 20), at)


def check(device: BlockDevice) -> Check:
    """One whole check."""
    return run(open_check(lambda sector, count: device.read(sector << 9, count << 9), device.size_bytes >> 9,
                          fd=device.plain_fd))


def peak_mib() -> float:
    """The most memory that this process has had since that was last reset."""
    return next(int(line.split()[1]) for line in Path("/proc/self/status").read_text().splitlines()
                if line.startswith("VmHWM:")) / 1024


def measure(path: Path, keys: int, rounds: int) -> bool:
    """Print the figures of one image; whether it stays below the memory that it may take."""
    flat = path.with_name("metadata")
    with flat.open("wb") as out:
        for piece in allocated(path):
            out.write(piece)
    mib = flat.stat().st_size / (1 << 20)
    # From here on, the most that this process has had.
    Path("/proc/self/clear_refs").write_text("5")
    dd: list[float] = []
    walls: list[float] = []
    cpus: list[float] = []
    with open_device(str(path)) as device:
        for number in range(rounds + 1):
            start_s = time.perf_counter()
            subprocess.run(["dd", f"if={flat}", "of=/dev/null", "bs=1M"], check=True, capture_output=True)
            dd.append(time.perf_counter() - start_s)
            before, start_s = sum(os.times()[:4]), time.perf_counter()
            checked = check(device)
            walls.append(time.perf_counter() - start_s)
            cpus.append(sum(os.times()[:4]) - before)
            assert checked.totals.extents == keys, checked.totals
            assert not checked.findings, checked.findings[:3]
            if not number:
                dd, walls, cpus = [], [], []   # The first round warms the cache.
        own_mib = peak_mib()
        start_s = time.perf_counter()
        dirty = find_dirty(checked)
        scan_s = time.perf_counter() - start_s
        assert sum(int(part.size.sum()) for part in dirty.by_inode.values()) == checked.totals.dirty_sectors
    wall, dd_s = statistics.median(walls), statistics.median(dd)
    row(f"fsck of {keys} keys, {mib:.0f} MiB of metadata", f"{wall:.3f} s",
        f"{min(walls):.3f} to {max(walls):.3f}, processor {statistics.median(cpus):.2f} s")
    row("  keys a second", f"{keys / wall:.0f}")
    row("  metadata a second", f"{mib / wall:.0f} MiB/s", f"dd bs=1M: {mib / dd_s:.0f} MiB/s")
    row("  share of dd", f"{dd_s / wall:.3f}",
        f"by the best rounds of both {min(dd) / min(walls):.3f} ({mib / min(dd):.0f} MiB/s); target {DD_SHARE_TARGET}")
    row("  memory", f"{own_mib:.0f} MiB", f"target {MEMORY_TARGET_MIB} MiB")
    row("  writeback's search for dirty data, keys a second", f"{keys / scan_s:.0f}")
    return own_mib < MEMORY_TARGET_MIB


def steps(path: Path, keys: int) -> None:
    """Print where the time of one thread goes: reading, checksums, columns, runs and counting, by key."""
    with open_device(str(path)) as device:
        walk = Walk(lambda sector, count: device.read(sector << 9, count << 9), device.size_bytes >> 9, processes=1)
        leaves = [item.value for item in walk.structures() if isinstance(getattr(item, "value", None), PlainLeaf)]
        assert walk.superblock is not None and walk.plain_journal is not None
        tallier = Tallier(walk.read, walk.geometry, bset_magic(walk.superblock.set_uuid), walk.gens,
                          walk.plain_journal, device.plain_fd)
        names = ["read", "log and checksum", "columns", "runs and counts"]
        depths = [0, 1, 2, 3]
        if tallier.scan is not None:
            names, depths = ["read", "log and checksum", "scan"], [0, 1, 3]
        spent = [min(_step(tallier, [leaf.place for leaf in leaves], depth) for _ in range(3)) / keys * 1e9
                 for depth in depths]
        parts = zip(names, spent, [0.0, *spent], strict=False)
        row("  one thread, ns a key", f"{spent[-1]:.1f}", ", ".join(f"{name} {now - before:.1f}"
                                                                  for name, now, before in parts))


def _step(tallier: Tallier, places: list[Place], depth: int) -> float:
    start_s = time.process_time()
    if depth == 3:
        for at in range(0, len(places), tallier.piece_leaves):
            piece = places[at:at + tallier.piece_leaves]
            tallier.count(piece)
        return time.process_time() - start_s
    for place in places:
        view = memoryview(tallier.read(place.sector, place.nsectors))
        if depth > 0:
            (at, count), *_rest = tallier.log(view, place)
            if depth > 1:
                tallier.base(np.frombuffer(view, "<u8")[at:at + count], place)
    return time.process_time() - start_s


def dump(path: Path, keys: int, structure: str) -> None:
    """Print how fast a dump is, to nowhere."""
    start_s = time.perf_counter()
    subprocess.run([sys.executable, "-m", "bcachectl", "dump", structure, str(path)], check=True,
                   stdout=subprocess.DEVNULL)
    row(f"dump {structure} of {keys} keys, keys a second", f"{keys / (time.perf_counter() - start_s):.0f}")


def main() -> int:
    """Print the figures; 1 if a target is missed that is not the machine's."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--keys", type=int, default=10_000_000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--write", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--old", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.write is not None:
        Writer(args.write, args.keys, is_old=args.old).write()
        return 0
    print(f"fsck: {machine()}")
    is_good = True
    for kind in ("new", "old"):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "cache.img"
            # In a process of its own, whose memory is not that of what is measured.
            subprocess.run([sys.executable, "-m", "bench.fsck", "--keys", str(args.keys), "--write", str(path),
                            *(["--old"] if kind == "old" else [])], check=True)
            print(f" {kind} cache")
            is_good &= measure(path, args.keys, args.rounds)
            steps(path, args.keys)
            if kind == "new":
                small = Path(folder) / "small.img"
                count = min(args.keys, 1_000_000)
                Writer(small, count, is_old=False).write()
                for structure in ("btree", "extents"):
                    dump(small, count, structure)
    return 0 if is_good else 1


if __name__ == "__main__":
    sys.exit(main())
