# SPDX-License-Identifier: GPL-2.0-only
"""The engine over NBD beside ``nbdkit file``, ``nbdkit --filter=cache file`` and ``qemu-nbd``, which serve files of the
same size.

One client (fio, one connection) and one server at a time, in turns, round after round, because the machine is shared
and its speed changes from second to second: a figure is the median of the rounds' ratios, with the smallest and the
largest behind it.  Each server has image files of its own, written in full, all of it in the page cache; the engine's
cache holds the whole volume, so that every read is a hit, and its mode is writeback.  A sequential write passes the
cache by after the first 4 MiB, as it does by default; so that workload comes last.

With ``--direct`` the engine and ``qemu-nbd --cache=none`` serve the same files past the page cache; with ``--direct
--loop`` each serves a loop device on them, whose driver then does as much as the server above it.

The engine is one thread and nbdkit sixteen, so a busy machine gives nbdkit the larger share of its cores and the ratios
say nothing; ``chrt -r 5 python -m bench.nbd`` puts client and servers before everything else for as long as it takes.

A QD1 figure says how long two processes take to wake each other up, and hardly anything of the servers; the engine
looks for the next request for some microseconds before it sleeps, and so saves one of the two.
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
from bench.results import Ratio, ratio_of, save
from bench.verify import verify
from tests.export.engine import ROOT, Engine
from tests.nbd_client import NbdClient

SIZE_BYTES = 256 << 20
CACHE_BYTES = 4 << 30
ENGINE, PLAIN, FILTER, QEMU = "engine", "nbdkit file", "nbdkit cache", "qemu-nbd"

WORKLOADS = {
    "read 4k QD32": "--rw=randread --bs=4k --iodepth=32",
    "read 4k QD1": "--rw=randread --bs=4k --iodepth=1",
    "read 1M QD8": "--rw=read --bs=1m --iodepth=8",
    "70/30 4k QD32": "--rw=randrw --rwmixread=70 --bs=4k --iodepth=32",
    "write 4k QD32": "--rw=randwrite --bs=4k --iodepth=32",
    "write 4k QD1": "--rw=randwrite --bs=4k --iodepth=1",
    "write 1M QD8": "--rw=write --bs=1m --iodepth=8",
}
TARGETS = {
    ("read 4k QD32", PLAIN): 1.4, ("read 4k QD1", PLAIN): 0.8, ("read 1M QD8", PLAIN): 0.9,
    ("write 4k QD32", PLAIN): 1.0,
}
DIRECT_TARGETS = {("read 4k QD32", QEMU): 2.0}


@dataclass
class Server:
    """Something that serves NBD, and what was measured of it, by workload."""

    pid: int
    uri: str
    iops: dict[str, list[float]] = field(default_factory=dict)
    p99_us: dict[str, list[float]] = field(default_factory=dict)
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
def qemu_nbd(directory: Path, image: Path, cache: str) -> Iterator[Server]:
    """``qemu-nbd`` with an image that is there."""
    socket = directory / "socket"
    process = subprocess.Popen(["qemu-nbd", "--persistent", "--format=raw", f"--cache={cache}", "--aio=io_uring",
                                f"--socket={socket}", str(image)])
    try:
        while not socket.exists():
            assert process.poll() is None, "qemu-nbd ended"
            time.sleep(0.01)
        yield Server(process.pid, f"nbd+unix:///?socket={socket}")
    finally:
        process.terminate()
        process.wait(10)


@contextlib.contextmanager
def loop_device(image: Path) -> Iterator[Path]:
    """The image as a block device, past the page cache."""
    made = subprocess.run(["losetup", "--find", "--show", "--direct-io=on", str(image)], check=True,
                          capture_output=True, text=True)
    try:
        yield Path(made.stdout.strip())
    finally:
        subprocess.run(["losetup", "--detach", made.stdout.strip()], check=True)


@contextlib.contextmanager
def engine(directory: Path, *, direct: bool = False, loop: bool = False) -> Iterator[Server]:
    """``engine run`` in writeback mode, the whole volume in its cache and clean."""
    with contextlib.ExitStack() as stack:
        paths = []
        for name, size_bytes in (("cache.img", CACHE_BYTES), ("back0.img", SIZE_BYTES + (1 << 20))):
            zeros(directory / name, size_bytes)
            paths.append(stack.enter_context(loop_device(directory / name)) if loop else directory / name)
        cache, backing = map(str, paths)
        subprocess.run([sys.executable, "-m", "bcachectl", "format", "--cache", cache, "--backing", backing,
                        "--bucket-size", "512k"], check=True, stdout=subprocess.DEVNULL, cwd=ROOT)
        words = ["--cache", cache, "--backing", backing, "--export", "nbd", "--set", "sequential_cutoff=0",
                 "--set", "cutoff_writeback=70", "--set", "congested_write_threshold_us=0"]
        words += ["--direct"] if direct else []
        running = stack.enter_context(Engine(directory, *words))
        path = running.volumes[0]["uri"].partition("socket=")[2]
        with NbdClient(path) as client:
            for offset in range(0, SIZE_BYTES, 1 << 20):
                client.write(offset, os.urandom(1 << 20))
            client.flush()
        environment = {**os.environ, "XDG_RUNTIME_DIR": running.runtime.name}
        subprocess.run([sys.executable, "-m", "bcachectl", "set", backing, "cache_mode=writeback",
                        "sequential_cutoff=4194304"], check=True, stdout=subprocess.DEVNULL, cwd=ROOT, env=environment)
        subprocess.run([sys.executable, "-m", "bcachectl", "set", cache, "congested_write_threshold_us=20000"],
                       check=True, stdout=subprocess.DEVNULL, cwd=ROOT, env=environment)
        yield Server(running.process.pid, running.volumes[0]["uri"])


def zeros(path: Path, size_bytes: int) -> None:
    """Write zeros, so that the file has its blocks and lies in the page cache."""
    with path.open("wb") as file:
        for _ in range(size_bytes >> 20):
            file.write(bytes(1 << 20))
        os.fsync(file.fileno())


def fill(path: Path) -> None:
    """Write random data, so that nothing is a hole."""
    with path.open("wb") as file:
        for _ in range(SIZE_BYTES >> 20):
            file.write(os.urandom(1 << 20))
        os.fsync(file.fileno())


def measure(server: Server, workload: str, seconds: float) -> None:
    """One turn of fio on a server."""
    before = cpu_s(server.pid)
    done = subprocess.run(
        ["fio", "--name=turn", "--ioengine=nbd", f"--uri={server.uri}", f"--size={SIZE_BYTES}", "--time_based",
         f"--runtime={seconds}", "--invalidate=0", "--norandommap", "--randrepeat=0", "--output-format=json",
         *WORKLOADS[workload].split()], capture_output=True, text=True, check=True)
    used_s = cpu_s(server.pid) - before
    job: dict[str, Any] = json.loads(done.stdout[done.stdout.index("{"):])["jobs"][0]
    sides = [job[name] for name in ("read", "write") if job[name]["total_ios"]]
    server.iops.setdefault(workload, []).append(sum(side["iops"] for side in sides))
    server.p99_us.setdefault(workload, []).append(
        max(side["clat_ns"]["percentile"]["99.000000"] for side in sides) / 1000)
    server.cpu_us.setdefault(workload, []).append(used_s * 1e6 / sum(side["total_ios"] for side in sides))


def report(servers: dict[str, Server], workload: str, targets: dict[tuple[str, str], float]) -> list[Ratio]:
    """The table of one workload."""
    print(f"  {workload}")
    ratios = []
    for name, server in servers.items():
        iops, p99_us, cpu_us = (statistics.median(column[workload])
                                for column in (server.iops, server.p99_us, server.cpu_us))
        line = f"    {name:<13}{iops:>9.0f}/s   p99 {p99_us:>7.0f} us   {cpu_us:>6.1f} us CPU"
        if name != ENGINE:
            target = targets.get((workload, name))
            ratios.append(ratio_of(workload, name, servers[ENGINE].iops[workload], server.iops[workload], target))
            line += f"   engine / this: {ratios[-1]}" + (f", target {target}" if target else "")
        print(line, flush=True)
    return ratios


def servers_of(stack: contextlib.ExitStack, directory: Path, *, direct: bool, loop: bool) -> dict[str, Server]:
    """The servers to compare, running."""
    places = {name: directory / str(index) for index, name in enumerate((ENGINE, PLAIN, FILTER, QEMU))}
    for place in places.values():
        place.mkdir()
    servers = {ENGINE: stack.enter_context(engine(places[ENGINE], direct=direct, loop=loop))}
    image = places[QEMU] / "image"
    fill(image)
    if direct:
        path = stack.enter_context(loop_device(image)) if loop else image
        servers[QEMU] = stack.enter_context(qemu_nbd(places[QEMU], path, "none"))
        return servers
    servers[PLAIN] = stack.enter_context(nbdkit(places[PLAIN]))
    servers[FILTER] = stack.enter_context(nbdkit(places[FILTER], "--filter=cache"))
    servers[QEMU] = stack.enter_context(qemu_nbd(places[QEMU], image, "writeback"))
    return servers


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=2.0)
    parser.add_argument("--only", default="", help="workloads whose name contains one of these, separated by commas")
    parser.add_argument("--direct", action="store_true", help="past the page cache, beside qemu-nbd")
    parser.add_argument("--loop", action="store_true", help="with --direct, on loop devices; needs root")
    parser.add_argument("--verify", action="store_true", help="have fio verify the engine's volume afterwards")
    parser.add_argument("--directory", help="where the image files are made")
    parser.add_argument("--json", type=Path, help="keep the ratios in this file")
    asked = parser.parse_args()
    print(f"nbd: {asked.rounds} rounds of {asked.seconds} s ({machine()}, Python {sys.version.split()[0]})")
    ratios: list[Ratio] = []
    with tempfile.TemporaryDirectory(prefix="bcachectl-bench-", dir=asked.directory) as name, \
            contextlib.ExitStack() as stack:
        servers = servers_of(stack, Path(name), direct=asked.direct, loop=asked.loop)
        for workload in WORKLOADS:
            if not any(part in workload for part in asked.only.split(",")):
                continue
            for server in servers.values():
                measure(server, workload, 0.3)      # the first one warms up
                for column in (server.iops, server.p99_us, server.cpu_us):
                    column[workload].clear()
            for _ in range(asked.rounds):
                for server in servers.values():
                    measure(server, workload, asked.seconds)
            ratios += report(servers, workload, DIRECT_TARGETS if asked.direct else TARGETS)
        if asked.verify:
            verify(ENGINE, "--ioengine=nbd", f"--uri={servers[ENGINE].uri}", size_bytes=SIZE_BYTES)
        for name, server in servers.items():
            print(f"  memory of {name:<14} {memory_bytes(server.pid) / 2**20:>7.0f} MiB resident")
    kind = "NBD, O_DIRECT on loop devices" if asked.loop else "NBD, O_DIRECT"
    save(asked.json, kind if asked.direct else "NBD, files in the page cache", ratios)


if __name__ == "__main__":
    main()
