# SPDX-License-Identifier: GPL-2.0-only
"""Every byte of every metadata structure flipped, one at a time: fsck neither fails nor hangs, and where a checksum
covers the byte it finds something.

`make flips` takes them all, ``BCACHECTL_SHARD=3/8`` the third eighth; test_flip.py takes a random share.
``python -m tests.fsck.flip IMAGE...`` does the same for unpacked images and prints the counts.
"""

from __future__ import annotations

import os
import random
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from bcachectl.fsck.check import run
from bcachectl.fsck.rescue import open_check
from bcachectl.ondisk.jset import JSET_HEADER_BYTES
from bench.process import memory_bytes
from tests.fsck.image import SB, Image

MEMORY_LIMIT_BYTES = 1 << 30
SECONDS_LIMIT = 20.0
"""Of processor time, which a busy machine does not change; a wait that never ends is for pytest's own limit."""


class Byte(NamedTuple):
    """A byte of the cache device: what it belongs to, whether a checksum covers it."""

    offset: int
    structure: str
    is_covered: bool


def metadata(image: Image) -> Iterator[Byte]:
    """Every byte of every structure of the cache device."""
    walk, geometry = image.walk, image.walk.geometry
    sb = walk.superblock
    assert sb is not None
    for offset in range(4096):
        yield Byte(SB + offset, "superblock", offset < 208 + 8 * sb.keys)
    for entry in walk.journal:
        at = image.entry_at(entry)
        length = JSET_HEADER_BYTES + len(entry.jset.keys)
        for offset in range(entry.jset.blocks * geometry.block_bytes):
            yield Byte(at + offset, "journal", offset < length)
    for bucket in walk.prio_buckets:
        for offset in range(geometry.meta_bytes):
            yield Byte(image.bucket(bucket) + offset, "prio", True)
    assert walk.newest is not None
    for offset in range(walk.newest.uuid_bucket.size << 9):
        yield Byte(image.uuid_at + offset, "uuids", False)
    for node in image.nodes:
        for number, bset in enumerate(node.sets):
            at = image.set_at(node, number)
            length = 32 + 8 * (2 * len(bset.keys.pos) + int(bset.keys.nptrs.sum()))
            for offset in range(-(-length // geometry.block_bytes) * geometry.block_bytes):
                yield Byte(at + offset, "btree", offset < length)


def judge(image: Image, byte: Byte, mask: int, baseline: Sequence[str]) -> str:
    """Flip one byte, check, and say how it went: covered by a checksum and found, found, missed (a failure), quiet."""
    damaged = image.fresh()
    damaged.cache.flip(byte.offset, mask)
    start_s = time.process_time()
    checked = run(open_check(damaged.cache.read, damaged.cache.size_sectors))
    assert time.process_time() - start_s < SECONDS_LIMIT, f"{byte}: took too long"
    found = sorted(finding.code for finding in checked.findings)
    if found != list(baseline):
        return "covered" if byte.is_covered else "found"
    return "missed" if byte.is_covered else "quiet"


def flips(image: Image, chosen: Sequence[Byte], seed: int) -> Counter[tuple[str, str]]:
    """Judge every chosen byte; the counts by structure and outcome."""
    dice = random.Random(seed)
    # Whatever this process did before does not count: the peak begins anew.
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    before_bytes = memory_bytes(os.getpid())
    baseline = sorted(finding.code for finding in run(open_check(image.cache.read, image.cache.size_sectors)).findings)
    counts: Counter[tuple[str, str]] = Counter()
    for byte in chosen:
        mask = dice.randrange(1, 256)
        try:
            outcome = judge(image, byte, mask, baseline)
        except Exception as error:
            raise AssertionError(f"byte {byte.offset} of the {byte.structure}, mask {mask:#x}: {error!r}") from error
        assert outcome != "missed", f"byte {byte.offset} of the {byte.structure}, mask {mask:#x}: not found"
        counts[byte.structure, outcome] += 1
    peak_bytes = memory_bytes(os.getpid(), "VmHWM") - before_bytes
    assert peak_bytes < MEMORY_LIMIT_BYTES, f"{peak_bytes} bytes of memory"
    return counts


def shard(every: Sequence[Byte], text: str) -> Sequence[Byte]:
    """The part of ``every`` that ``3/8`` names."""
    number, _, count = text.partition("/")
    return every[int(number) - 1::int(count or 1)]


if __name__ == "__main__":
    for name in sys.argv[1:]:
        base = Image(Path(name).read_bytes(), [])
        part = shard(list(metadata(base)), os.environ.get("BCACHECTL_SHARD") or "1/1")
        print(name, dict(flips(base, part, 1)), flush=True)
