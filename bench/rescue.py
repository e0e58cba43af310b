# SPDX-License-Identifier: GPL-2.0-only
"""``bcachectl writeback``: dirty data in extents of 4 KiB, in any order on the cache, beside fio, which only reads.

Every other block of the volume is dirty, so that no two make one write.  Both devices are files whose data is on the
disk and not in memory when a round begins.  A round is fio, which reads as many blocks of the cache in any order past
the page cache, one at a time, then 32 at a time, and after these `bcachectl writeback`, from its start to its end: it
checks the set, reads the same, writes all of it and flushes.  The ratio is fio's time to its.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from bcachectl.ondisk.superblock import SB_BYTES, SB_SECTOR
from bench.bulk import make_set
from bench.process import machine, row

BLOCK_BYTES, PIECE_BYTES = 4096, 1 << 20
DEPTHS = (1, 32)


def fill(path: Path) -> None:
    """Give every hole of a file content of its own."""
    with path.open("r+b") as file:
        size, at = path.stat().st_size, 0
        while at < size:
            try:
                data = os.lseek(file.fileno(), at, os.SEEK_DATA)
            except OSError:
                data = size
            while at < data:
                at += os.pwrite(file.fileno(), os.urandom(min(data - at, PIECE_BYTES)), at)
            at = os.lseek(file.fileno(), at, os.SEEK_HOLE) if at < size else size
        os.fsync(file.fileno())


def forget(*paths: Path) -> None:
    """Nothing of these files is in memory any more."""
    for path in paths:
        with path.open("r+b") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def fio_s(path: Path, blocks: int, depth: int) -> float:
    """How long fio reads so many blocks, in seconds."""
    done = subprocess.run(
        ["fio", "--name=read", f"--filename={path}", "--rw=randread", "--bs=4k", "--direct=1", "--ioengine=io_uring",
         f"--iodepth={depth}", f"--io_size={blocks * BLOCK_BYTES}", "--output-format=json"],
        check=True, capture_output=True)
    read = json.loads(done.stdout)["jobs"][0]["read"]
    assert read["total_ios"] == blocks
    return float(read["runtime"]) / 1000


def measure(directory: Path, keys: int, rounds: int) -> None:
    """Print what it takes."""
    make_set(directory, keys, dirty_every=1)
    cache, back = directory / "cache.img", directory / "back.img"
    fill(cache)
    fill(back)
    with back.open("rb") as file:
        file.seek(SB_SECTOR << 9)
        superblock = file.read(SB_BYTES)
    fio: dict[int, list[float]] = {depth: [] for depth in DEPTHS}
    ours: list[float] = []
    for _round in range(rounds):
        for depth in DEPTHS:
            fio[depth].append(fio_s(cache, keys, depth))
        with back.open("r+b") as file:
            file.seek(SB_SECTOR << 9)
            file.write(superblock)                              # dirty again
        forget(cache, back)
        began = time.perf_counter()
        subprocess.run([sys.executable, "-m", "bcachectl", "writeback", str(cache), str(back)], check=True,
                       stdout=subprocess.DEVNULL)
        ours.append(time.perf_counter() - began)
    our_s = statistics.median(ours)
    row(f"{keys} extents, {keys * BLOCK_BYTES >> 20} MiB", f"{our_s:.2f} s", f"{min(ours):.2f} to {max(ours):.2f}")
    row("  extents a second", f"{keys / our_s:.0f}")
    for depth in DEPTHS:
        ratios = [fio_one / our_one for fio_one, our_one in zip(fio[depth], ours, strict=True)]
        row(f"  fio, {depth} at a time, which only reads", f"{statistics.median(fio[depth]):.2f} s",
            f"its time to ours: {statistics.median(ratios):.2f}  ({min(ratios):.2f} to {max(ratios):.2f})")


def main() -> None:
    """Make the set, and copy."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keys", type=int, default=50_000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--directory", help="where the files are made; a disk, not memory")
    asked = parser.parse_args()
    print(f"write-back without the set ({machine()})")
    with tempfile.TemporaryDirectory(prefix="bcachectl-bench-", dir=asked.directory or Path.cwd()) as name:
        measure(Path(name), asked.keys, asked.rounds)


if __name__ == "__main__":
    main()
