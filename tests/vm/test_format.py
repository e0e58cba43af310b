# SPDX-License-Identifier: GPL-2.0-only
"""What ``bcachectl format`` writes is registered by kernels, with the shape that was asked for (traps.md, T2)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.vm import machine
from tests.vm.engine_side import bcachectl

MIB = 1 << 20


@dataclass(frozen=True)
class Shape:
    """One set to format: options, the sizes of its devices, and what the kernel has to say of it."""

    name: str
    options: tuple[str, ...]
    cache_bytes: int
    backing_bytes: int
    expected: dict[str, str]
    volume_sectors: int


SHAPES = [
    Shape("smallest", ("--bucket-size", "4k", "--block-size", "512"), 513 * 4096, 8 * MIB,
          {"cache/block_size": "0.5k", "cache/bucket_size": "4.0k", "cache/nbuckets": "513",
           "backing/cache_mode": "[writethrough] writeback writearound none"}, (8 * MIB >> 9) - 16),
    Shape("usual", ("--bucket-size", "512k", "--block-size", "4k", "--cache-mode", "writeback", "--label", "usual"),
          400 * MIB, 32 * MIB,
          {"cache/block_size": "4.0k", "cache/bucket_size": "512.0k", "cache/nbuckets": "800", "backing/label": "usual",
           "backing/cache_mode": "writethrough [writeback] writearound none"}, (32 * MIB >> 9) - 16),
    Shape("offset", ("--bucket-size", "64k", "--block-size", "4k", "--data-offset", "1M", "--replacement", "fifo"),
          64 * MIB, 32 * MIB,
          {"cache/block_size": "4.0k", "cache/bucket_size": "64.0k", "cache/nbuckets": "1024",
           "cache/cache_replacement_policy": "lru [fifo] random"}, (32 * MIB >> 9) - 2048),
    Shape("random_discard", ("--bucket-size", "128k", "--block-size", "2k", "--replacement", "random", "--discard",
                             "--cache-mode", "writearound"), 96 * MIB, 32 * MIB,
          {"cache/block_size": "2.0k", "cache/bucket_size": "128.0k", "cache/nbuckets": "768", "cache/discard": "1",
           "cache/cache_replacement_policy": "lru fifo [random]",
           "backing/cache_mode": "writethrough writeback [writearound] none"}, (32 * MIB >> 9) - 16),
    Shape("large_bucket", ("--bucket-size", "8M", "--block-size", "4k", "--cache-mode", "none"),
          520 * 8 * MIB, 32 * MIB,
          {"cache/block_size": "4.0k", "cache/bucket_size": "8.0M", "cache/nbuckets": "520",
           "backing/cache_mode": "writethrough writeback writearound [none]"}, (32 * MIB >> 9) - 16),
    # Past 16 MiB the superblock says the size as a logarithm, with a feature bit (ondisk.md 3.5).
    Shape("log_form", ("--bucket-size", "32M", "--block-size", "4k"), 513 * 32 * MIB, 32 * MIB,
          {"cache/block_size": "4.0k", "cache/bucket_size": "32.0M", "cache/nbuckets": "513",
           "backing/cache_mode": "[writethrough] writeback writearound none"}, (32 * MIB >> 9) - 16),
]

SCRIPT = """
one() {
    cache=/dev/$2
    backing=/dev/$3
    register $cache $backing
    link=/sys/block/$3/bcache/dev
    wait_for 60 test -e $link
    volume=$(basename $(readlink $link))
    wait_volume $volume
    mkdir -p /job/$1
    cat /sys/block/$volume/size >/job/$1/sectors
    for name in block_size bucket_size nbuckets discard cache_replacement_policy; do
        [ ! -e /sys/block/$2/bcache/$name ] || cat /sys/block/$2/bcache/$name >/job/$1/cache.$name
    done
    for name in cache_mode label state; do
        cat /sys/block/$3/bcache/$name >/job/$1/backing.$name
    done
    yes "$1" | head -c 1048576 >/tmp/data
    dd if=/tmp/data of=/dev/$volume bs=4k seek=3 conv=fsync 2>/dev/null || fail "writing $1"
    echo 3 >/proc/sys/vm/drop_caches
    dd if=/dev/$volume of=/tmp/back bs=4k skip=3 count=256 2>/dev/null || fail "reading $1"
    cmp /tmp/data /tmp/back || fail "$1 reads back something else"
    stop_all
    echo "$1 done"
}
"""


@pytest.mark.timeout(400)
@pytest.mark.parametrize("series", ["6.12", "6.1"])
def test_t2_kernel_registers_what_format_writes(tmp_path: Path, series: str) -> None:
    share = tmp_path / "job"
    disks: list[Path] = []
    script = SCRIPT
    for number, shape in enumerate(SHAPES):
        cache, backing = tmp_path / f"{shape.name}.cache", tmp_path / f"{shape.name}.backing"
        for path, size_bytes in ((cache, shape.cache_bytes), (backing, shape.backing_bytes)):
            with path.open("wb") as file:
                file.truncate(size_bytes)
        bcachectl("format", "--cache", cache, "--backing", backing, *shape.options, directory=tmp_path)
        disks += [cache, backing]
        script += f"one {shape.name} vd{chr(97 + 2 * number)} vd{chr(98 + 2 * number)}\n"
    done = machine.run(script, disks, share, series=series).check()
    assert done.complaints() == []
    for shape in SHAPES:
        assert f"{shape.name} done" in done.stdout
        found = share / shape.name
        assert int((found / "sectors").read_text()) == shape.volume_sectors, shape.name
        for name, value in shape.expected.items():
            path = found / name.replace("/", ".")
            assert path.read_text().strip() == value, f"{shape.name}: {name}"
