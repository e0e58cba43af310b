# SPDX-License-Identifier: GPL-2.0-only
"""The engine over NBD beside ``nbdkit file`` and ``nbdkit --filter=cache file``, which serve files of the same size.

One client (fio, one connection) and one server at a time, in turns, round after round, because the machine is shared
and its speed changes from second to second: a figure is the median of the rounds' ratios, with the smallest and the
largest behind it.  Each server has image files of its own, all of it in the page cache; the engine's cache holds the
whole volume, so that every read is a hit.

The engine is one thread and nbdkit sixteen, so a busy machine gives nbdkit the larger share of its cores and the ratios
say nothing; ``chrt -r 5 python -m bench.nbd`` puts client and servers before everything else for as long as it takes.

A QD1 figure says how long two processes take to wake each other up, and hardly anything of the servers.
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
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.process import cpu_s, machine, memory_bytes
from tests.export.engine import ROOT, Engine
from tests.nbd_client import NbdClient

SIZE_BYTES = 256 << 20
CACHE_BYTES = 1 << 30
ENGINE, PLAIN, FILTER = "engine", "nbdkit file", "nbdkit cache"

WORKLOADS = {
    "read 4k QD32": "--rw=randread --bs=4k --iodepth=32",
    "read 4k QD1": "--rw=randread --bs=4k --iodepth=1",
    "read 1M QD8": "--rw=read --bs=1m --iodepth=8",
    "write 4k QD32": "--rw=randwrite --bs=4k --iodepth=32",
}


@dataclass
class Server:
    """Something that serves NBD, and what was measured of it, by workload."""

    pid: int
    uri: str
    iops: dict[str, list[float]] = field(default_factory=dict)
    cpu_us: dict[str, list[float]] = field(default_factory=dict)


@contextlib.contextmanager
def nbdkit(directory: Path, *words: str) -> Iterator[Server]:
    """``nbdkit`` with a file of random data."""
    image, socket = directory / "image", directory / "socket"
    fill(image)
    process = subprocess.Popen(["nbdkit", "--foreground", "--unix", str(socket), *words, "file", str(image)])
    try:
        while not socket.exists():
            assert process.poll() is None, "nbdkit ended"
            time.sleep(0.01)
        yield Server(process.pid, f"nbd+unix:///?socket={socket}")
    finally:
        process.terminate()
        process.wait(10)


@contextlib.contextmanager
def engine(directory: Path) -> Iterator[Server]:
    """``engine run`` in writeback mode, the whole volume in its cache and clean."""
    cache, backing = directory / "cache.img", directory / "back0.img"
    for path, size_bytes in ((cache, CACHE_BYTES), (backing, SIZE_BYTES + 8192)):
        with path.open("wb") as file:
            file.truncate(size_bytes)
    subprocess.run([sys.executable, "-m", "bcachectl", "format", "--cache", str(cache), "--backing", str(backing),
                    "--bucket-size", "512k"], check=True, stdout=subprocess.DEVNULL, cwd=ROOT)
    words = ["--cache", str(cache), "--backing", str(backing), "--export", "nbd", "--set", "sequential_cutoff=0"]
    with Engine(directory, *words) as running:
        path = running.volumes[0]["uri"].partition("socket=")[2]
        with NbdClient(path) as client:
            for offset in range(0, SIZE_BYTES, 1 << 20):
                client.write(offset, os.urandom(1 << 20))
            client.flush()
        environment = {**os.environ, "XDG_RUNTIME_DIR": running.runtime.name}
        subprocess.run([sys.executable, "-m", "bcachectl", "set", str(backing), "cache_mode=writeback",
                        "sequential_cutoff=4194304"], check=True, stdout=subprocess.DEVNULL, cwd=ROOT, env=environment)
        yield Server(running.process.pid, running.volumes[0]["uri"])


def fill(path: Path) -> None:
    """Write random data, so that nothing is a hole."""
    with path.open("wb") as file:
        for _ in range(SIZE_BYTES >> 20):
            file.write(os.urandom(1 << 20))


def measure(server: Server, workload: str, seconds: float) -> None:
    """One turn of fio on a server."""
    before = cpu_s(server.pid)
    done = subprocess.run(
        ["fio", "--name=turn", "--ioengine=nbd", f"--uri={server.uri}", f"--size={SIZE_BYTES}", "--time_based",
         f"--runtime={seconds}", "--invalidate=0", "--norandommap", "--randrepeat=0", "--output-format=json",
         *WORKLOADS[workload].split()], capture_output=True, text=True, check=True)
    used_s = cpu_s(server.pid) - before
    job: dict[str, Any] = json.loads(done.stdout[done.stdout.index("{"):])["jobs"][0]
    side = job["write" if "write" in workload else "read"]
    server.iops.setdefault(workload, []).append(side["iops"])
    server.cpu_us.setdefault(workload, []).append(used_s * 1e6 / max(1, side["total_ios"]))


def report(servers: dict[str, Server], workload: str) -> None:
    """The table of one workload."""
    print(f"  {workload}")
    for name, server in servers.items():
        iops = server.iops[workload]
        cpu = statistics.median(server.cpu_us[workload])
        line = f"    {name:<14} {statistics.median(iops):>10.0f}/s {cpu:>7.1f} us CPU"
        if name != ENGINE:
            ratios = [mine / theirs for mine, theirs in zip(servers[ENGINE].iops[workload], iops, strict=True)]
            line += f"   engine / this: {statistics.median(ratios):.2f}  ({min(ratios):.2f} to {max(ratios):.2f})"
        print(line, flush=True)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=2.0)
    parser.add_argument("--only", default="", help="workloads whose name contains this")
    asked = parser.parse_args()
    print(f"nbd: {asked.rounds} rounds of {asked.seconds} s ({machine()}, Python {sys.version.split()[0]})")
    with tempfile.TemporaryDirectory(prefix="bcachectl-bench-") as name, contextlib.ExitStack() as stack:
        places = [Path(name, str(index)) for index in range(3)]
        for place in places:
            place.mkdir()
        servers = {
            ENGINE: stack.enter_context(engine(places[0])),
            PLAIN: stack.enter_context(nbdkit(places[1])),
            FILTER: stack.enter_context(nbdkit(places[2], "--filter=cache")),
        }
        for workload in WORKLOADS:
            if asked.only not in workload:
                continue
            for server in servers.values():
                measure(server, workload, 0.5)      # the first one warms up
                server.iops[workload].clear()
                server.cpu_us[workload].clear()
            for _ in range(asked.rounds):
                for server in servers.values():
                    measure(server, workload, asked.seconds)
            report(servers, workload)
        for name, server in servers.items():
            print(f"  memory of {name:<14} {memory_bytes(server.pid) / 2**20:>7.0f} MiB resident")


if __name__ == "__main__":
    main()
