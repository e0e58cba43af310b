# SPDX-License-Identifier: GPL-2.0-only
"""The engine's loop export (a FUSE file below a loop device) beside the kernel's loop driver on a plain file.

fio with O_DIRECT on one block device at a time, in turns, round after round; a figure is the median of the rounds'
ratios, with the smallest and the largest behind it.  Both files go past the page cache, as a loop device with direct
I/O does; the engine's cache holds the whole volume, and its mode is writeback.  Needs root.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.nbd import fill, loop_device, zeros
from bench.process import cpu_s, machine, memory_bytes
from bench.results import Ratio, ratio_of, save
from bench.verify import verify
from tests.export.engine import ROOT, Engine

SIZE_BYTES = 256 << 20
CACHE_BYTES = 2 << 30
LOOP = "loop"

WORKLOADS = {
    "read 4k QD32": "--rw=randread --bs=4k --iodepth=32",
    "read 4k QD1": "--rw=randread --bs=4k --iodepth=1",
    "write 4k QD32": "--rw=randwrite --bs=4k --iodepth=32",
    "read 1M QD8": "--rw=read --bs=1m --iodepth=8",
}
TARGETS = {"read 4k QD32": 0.4, "write 4k QD32": 0.4}


@dataclass
class Device:
    """A block device, and what was measured of it, by workload."""

    path: str
    iops: dict[str, list[float]] = field(default_factory=dict)
    p99_us: dict[str, list[float]] = field(default_factory=dict)
    cpu_us: list[float] = field(default_factory=list)


@contextlib.contextmanager
def engine(directory: Path) -> Iterator[tuple[int, Device]]:
    """``engine run --export loop`` in writeback mode, the whole volume in its cache; its process."""
    cache, backing = directory / "cache.img", directory / "back0.img"
    zeros(cache, CACHE_BYTES)
    zeros(backing, SIZE_BYTES + (1 << 20))
    subprocess.run([sys.executable, "-m", "bcachectl", "format", "--cache", str(cache), "--backing", str(backing),
                    "--bucket-size", "512k", "--writeback"], check=True, stdout=subprocess.DEVNULL, cwd=ROOT)
    with Engine(directory, "--cache", cache, "--backing", backing, "--export", "loop", "--set", "sequential_cutoff=0",
                "--set", "cutoff_writeback=70", "--set", "congested_write_threshold_us=0", "--set",
                "congested_read_threshold_us=0") as running:
        device = running.volumes[0]["device"]
        with open(device, "r+b", buffering=0) as file:
            for _ in range(SIZE_BYTES >> 20):
                file.write(os.urandom(1 << 20))
            os.fsync(file.fileno())
        yield running.process.pid, Device(device)


def measure(device: Device, workload: str, seconds: float) -> int:
    """One turn of fio; how many requests it made."""
    done = subprocess.run(
        ["fio", "--name=turn", "--ioengine=io_uring", "--direct=1", f"--filename={device.path}",
         f"--size={SIZE_BYTES}", "--time_based", f"--runtime={seconds}", "--invalidate=0", "--norandommap",
         "--randrepeat=0", "--output-format=json", *WORKLOADS[workload].split()],
        capture_output=True, text=True, check=True)
    job: dict[str, Any] = json.loads(done.stdout[done.stdout.index("{"):])["jobs"][0]
    side = job["write" if "write" in workload else "read"]
    device.iops.setdefault(workload, []).append(side["iops"])
    device.p99_us.setdefault(workload, []).append(side["clat_ns"]["percentile"]["99.000000"] / 1000)
    return int(side["total_ios"])


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=1.0)
    parser.add_argument("--verify", action="store_true", help="have fio verify the engine's volume afterwards")
    parser.add_argument("--directory", help="where the image files are made")
    parser.add_argument("--json", type=Path, help="keep the ratios in this file")
    asked = parser.parse_args()
    if os.geteuid() != 0:
        print("fuse: left out, it needs root")
        return
    print(f"fuse: {asked.rounds} rounds of {asked.seconds} s ({machine()})", flush=True)
    ratios: list[Ratio] = []
    with tempfile.TemporaryDirectory(prefix="bcachectl-bench-", dir=asked.directory) as name, \
            contextlib.ExitStack() as stack:
        directory = Path(name)
        pid, mine = stack.enter_context(engine(directory))
        fill(directory / "plain.img")
        loop = Device(str(stack.enter_context(loop_device(directory / "plain.img"))))
        for workload in WORKLOADS:
            measure(mine, workload, 0.3)
            measure(loop, workload, 0.3)
            for device in (mine, loop):
                device.iops[workload].clear()
                device.p99_us[workload].clear()
            mine.cpu_us.clear()
            for _ in range(asked.rounds):
                before_s = cpu_s(pid)
                count = measure(mine, workload, asked.seconds)
                mine.cpu_us.append((cpu_s(pid) - before_s) * 1e6 / count)
                measure(loop, workload, asked.seconds)
            ratios.append(ratio_of(workload, LOOP, mine.iops[workload], loop.iops[workload], TARGETS.get(workload)))
            target = TARGETS.get(workload)
            print(f"  {workload:<14} engine {statistics.median(mine.iops[workload]):>8.0f}/s  p99 "
                  f"{statistics.median(mine.p99_us[workload]):>6.0f} us  {statistics.median(mine.cpu_us):>6.1f} us CPU"
                  f"   loop {statistics.median(loop.iops[workload]):>8.0f}/s   engine / loop: {ratios[-1]}"
                  + (f", target {target}" if target else ""), flush=True)
        if asked.verify:
            verify("engine", "--ioengine=io_uring", "--direct=1", f"--filename={mine.path}", size_bytes=SIZE_BYTES)
        print(f"  memory of the engine {memory_bytes(pid) / 2**20:.0f} MiB resident")
    save(asked.json, "loop over FUSE", ratios)


if __name__ == "__main__":
    main()
