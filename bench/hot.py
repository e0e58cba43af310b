# SPDX-License-Identifier: GPL-2.0-only
"""The hot path, step by step: nanoseconds of one thread for each request, on a map of 65,536 extents of 4 KiB.

Everything runs in this process and in memory; nothing waits.  A figure is the least of several repetitions, so that
what else the machine does hardly shows.  What the kernel does in a system call is part of a step only where the step
has one, and that line says so.
"""

from __future__ import annotations

import argparse
import contextlib
import mmap
import os
import random
import socket
import subprocess
import sys
import tempfile
from bisect import bisect_right
from collections.abc import Callable
from pathlib import Path
from time import thread_time_ns
from unittest import mock

from bcachectl.engine.cached_dev import CachedDev
from bcachectl.engine.export import nbd_wire as wire
from bcachectl.engine.export import ublk, ublk_reads, ublk_wire
from bcachectl.engine.export.host import EngineHost, HostOptions
from bcachectl.engine.export.nbd import NbdServer, enlarge
from bcachectl.engine.export.nbd_connection import Connection
from bcachectl.engine.export.ublk import UblkExport
from bcachectl.engine.front import NOT_NOW, REQ_READ, REQ_WRITE, Request
from bcachectl.engine.io.uring import RingBackend
from bcachectl.engine.sched import NS_PER_MS
from bench.process import machine, row
from tests.export.engine import ROOT

EXTENTS = 65_536
BATCH = 32
ROUNDS = 200
REPEATS = 5


class Done:
    """Whom a request's answer goes to."""

    def answered(self, request: Request) -> None:
        """It worked."""
        assert not request.error


def least(step: Callable[[], object], count: int) -> float:
    """Nanoseconds for each of the ``count`` requests that ``step`` is about."""
    times = []
    for _ in range(REPEATS):
        began = thread_time_ns()
        for _ in range(ROUNDS):
            step()
        times.append(thread_time_ns() - began)
    return min(times) / ROUNDS / count


class Control:
    """What a ublk export asks of the driver's control device while it is set up."""

    def io_command(self, command: int) -> int:
        """As `UblkControl.io_command`."""
        return ublk_wire.encoded(command)


class Bench:
    """The steps, on a running set."""

    def __init__(self, host: EngineHost, directory: Path) -> None:
        self.host = host
        self.cset = host.cset
        volume = self.cset.volumes[0]
        assert isinstance(volume, CachedDev)
        self.dev = volume
        self.dice = random.Random(1)
        self.sectors = [self.dice.randrange(EXTENTS) * 8 for _ in range(BATCH)]
        self.directory = directory

    async def fill(self) -> None:
        """Make the device dirty, then give every 4 KiB an extent of its own; the data does not matter."""
        self.dev.submit(Request(REQ_WRITE, 0, 8, bytearray(4096), tag=Done()))
        while self.cset.requests_in_flight:
            await self.cset.sched.yield_now()
        order = list(range(EXTENTS))
        self.dice.shuffle(order)
        for first in range(0, EXTENTS, BATCH):
            left = [(block * 8, 8) for block in order[first:first + BATCH]]
            while left:
                places = self.dev.batch.place(left, 1)
                self.dev.batch.commit(0)
                left = [write for write, place in zip(left, places, strict=True) if place == NOT_NOW]
                await self.cset.sched.yield_now()
                if left:
                    for sector, nsectors in left:
                        self.dev.submit(Request(REQ_WRITE, sector, nsectors, bytearray(4096), stream=1, tag=Done()))
                    while self.cset.requests_in_flight:
                        await self.cset.sched.yield_now()
                    left = []

    def lookup(self) -> None:
        btree, base = self.cset.btree, self.dev.base
        for sector in self.sectors:
            leaf = btree.leaf_nowait(base + sector)
            assert leaf is not None
            bisect_right(leaf.ends, base + sector)

    def gens_and_prios(self) -> None:
        buckets = self.cset.buckets
        gen_at, prio_at, shift = buckets.gen_at, buckets.prio_at, buckets.bucket_shift
        for sector in self.sectors:
            bucket = sector >> shift
            if not gen_at[bucket] & 255:
                prio_at[bucket] = prio_at[bucket]

    def runs(self) -> None:
        note, now_ns = self.dev.streams.note, self.cset.sched.now_ns
        for sector in self.sectors:
            note(sector, 8, stream=0, now_ns=now_ns)

    def hits(self) -> None:
        assert min(self.dev.reads_nowait([(sector, 8) for sector in self.sectors])) >= 0

    def preads(self) -> None:
        fd, buf = self.host.media[0].fd, [bytearray(4096)]
        places = [self.dev.read_nowait(sector, 8) for sector in self.sectors]
        preadv = os.preadv
        for place in places:
            preadv(fd, buf, place)

    async def writes(self) -> tuple[float, float]:
        """`place` and `commit`, with the engine getting its turn between batches, which is not counted."""
        batch = self.dev.batch
        placing = committing = count = 0
        for _ in range(ROUNDS * REPEATS):
            writes = [(self.dice.randrange(EXTENTS) * 8, 8) for _ in range(BATCH)]
            began = thread_time_ns()
            places = batch.place(writes, 1)
            placed = thread_time_ns()
            batch.commit(0)
            done = thread_time_ns()
            taken = sum(place != NOT_NOW for place in places)
            if taken == BATCH:
                placing, committing, count = placing + placed - began, committing + done - placed, count + taken
                await self.cset.sched.yield_now()
            else:
                await self.cset.sched.sleep_until(self.cset.sched.now_ns + NS_PER_MS)
        return placing / count, committing / count

    async def tasks(self, operation: int) -> float:
        """A request that goes all the way, as a task."""
        began = thread_time_ns()
        count = 0
        for _ in range(ROUNDS):
            for sector in self.sectors:
                self.dev.submit(Request(operation, sector, 8, bytearray(4096), stream=1, tag=Done()))
                count += 1
            while self.cset.requests_in_flight:
                await self.cset.sched.yield_now()
        return (thread_time_ns() - began) / count

    async def groups(self) -> float:
        """Writes that a block device brings together."""
        began = thread_time_ns()
        count = 0
        for _ in range(ROUNDS):
            self.dev.submit_all([Request(REQ_WRITE, self.dice.randrange(EXTENTS) * 8, 8, bytearray(4096), 0,
                                         1, Done()) for _ in range(BATCH)])
            count += BATCH
            while self.cset.requests_in_flight:
                await self.cset.idle.wait()
        return (thread_time_ns() - began) / count

    def connection(self) -> tuple[Connection, socket.socket]:
        """A connection to the volume that has been negotiated, and the client's end."""
        server = NbdServer(self.host.loop, self.cset.volumes, self.host.media[0], str(self.directory / "socket"))
        ours, theirs = socket.socketpair()
        for end in (ours, theirs):
            enlarge(end)
            end.setblocking(False)
        connection = Connection(server, ours, 1)
        self.host.loop.register(connection.fd, connection)
        server.connections[connection.fd] = connection
        connection.out.clear()
        connection.handshake.structured = True
        connection.choose(self.dev)
        return connection, theirs

    def ublk(self, operation: int, sectors: list[int]) -> tuple[UblkExport, RingBackend]:
        """A ublk device with a request on each of its tags.  The driver is played by a file, which the descriptors lie
        in; its commands all fail at once.
        """
        device = self.directory / "ublkc"
        with device.open("wb") as file:
            file.writelines(ublk_wire.IO_DESC.pack(operation, 8, sector, 0) for sector in sectors)
            file.truncate(mmap.PAGESIZE)
        backend = RingBackend(list(self.host.media), waited_in=True)
        export = UblkExport(self.host.loop, backend, Control(), self.dev,  # type: ignore[arg-type]
                            self.host.media[0], self.cset.buckets,
                            mark=1, stream=1, block_bytes=4096, can_discard=True, can_zero=True)
        with mock.patch.object(ublk, "_open_when_there", return_value=os.open(device, os.O_RDWR)):
            export._open(ublk_wire.DevInfo(1, BATCH, 0, 64 << 10, 0, 1, 0, 1))
        backend.wait(0, 0.05)
        return export, backend

    def reads_over_ublk(self) -> float:
        """A turn of a ublk device: the reads of the last turn have ended, as many requests have come.  Nothing goes to
        the kernel.
        """
        export, _ = self.ublk(ublk_wire.OP_READ, self.sectors)
        reads = export._reads
        assert reads is not None
        commits = [(tag, 0) for tag in range(BATCH)]

        def turn(completions: list[tuple[int, int]]) -> None:
            for number, result in completions:
                reads.arrivals.put(number, result)
            assert not reads.serve()
            reads.finish()

        turn(commits)
        both = [(ublk_reads.READ_NUMBER + tag, 4096) for tag in range(BATCH)] + commits
        with mock.patch.object(ublk_reads, "HAND_OVER_READS", 1 << 20):
            spent = least(lambda: turn(both), BATCH)
        return spent

    async def writes_over_ublk(self) -> float:
        """Requests on all tags of a ublk device, from their arrival to the commits, with all system calls."""
        export, backend = self.ublk(ublk_wire.OP_WRITE, self.dice.sample(range(0, EXTENTS * 8, 8), BATCH))
        reads = export._reads
        assert reads is not None and reads.writes is not None, "the volume has a batch"
        quiet, writes = os.eventfd(0), reads.writes
        began = thread_time_ns()
        for _ in range(ROUNDS):
            for tag in range(BATCH):
                reads.arrivals.put(tag, 0)
            reads.serve()
            while writes.waiting or writes.runs or self.cset.requests_in_flight:
                backend.wait(quiet, 0.003)
                await self.cset.sched.yield_now()
        os.close(quiet)
        return (thread_time_ns() - began) / ROUNDS / BATCH

    def served(self, connection: Connection, theirs: socket.socket, requests: bytes, answer_bytes: int) -> float:
        """A turn of a connection: requests in, answers out; the client's share is not counted."""
        times = []
        answers = bytearray(answer_bytes)
        for _ in range(REPEATS):
            spent = 0
            for _ in range(ROUNDS):
                theirs.send(requests)
                began = thread_time_ns()
                connection.on_ready(connection.fd, 1)
                spent += thread_time_ns() - began
                got = 0
                while got < answer_bytes:
                    got += theirs.recv_into(memoryview(answers)[got:])
            times.append(spent)
        return min(times) / ROUNDS / BATCH


    async def written(self, connection: Connection, theirs: socket.socket) -> float:
        """Like `served` for writes; a turn counts if the batch took all of them."""
        spent = turns = 0
        for _ in range(ROUNDS * REPEATS):
            sent = theirs.send(b"".join(
                wire.REQUEST.pack(wire.REQUEST_MAGIC, 0, 1, cookie, self.dice.randrange(EXTENTS) << 12, 4096)
                + bytes(4096) for cookie in range(BATCH)))
            assert sent == BATCH * (4096 + wire.REQUEST.size), "the socket's buffer is too small"
            began = thread_time_ns()
            connection.on_ready(connection.fd, 1)
            took = thread_time_ns() - began
            if not connection.in_flight:
                spent, turns = spent + took, turns + 1
            answers = BATCH * wire.SIMPLE_REPLY.size
            while answers:
                await self.cset.sched.yield_now()
                with contextlib.suppress(BlockingIOError):
                    answers -= len(theirs.recv(answers))
        return spent / turns / BATCH


async def measure(host: EngineHost, directory: Path) -> None:
    """Start the set, measure, stop it."""
    await host.start()
    bench = Bench(host, directory)
    await bench.fill()

    def line(what: str, ns: float) -> None:
        row(what, f"{ns:.0f} ns")

    line("lookup: root to leaf, and bisection in the leaf", least(bench.lookup, BATCH))
    line("gen check and priority", least(bench.gens_and_prios, BATCH))
    line("mode decision: sequential run", least(bench.runs, BATCH))
    line("read hit decided: all of these, and the counters", least(bench.hits, BATCH))
    line("the same and the preadv (system call)", least(bench.preads, BATCH))
    line("read hit over ublk, two completions in, two entries out", bench.reads_over_ublk())
    connection, theirs = bench.connection()
    reads = b"".join(wire.REQUEST.pack(wire.REQUEST_MAGIC, 0, 0, cookie, sector << 9, 4096)
                     for cookie, sector in enumerate(bench.sectors))
    line("read hit served over NBD, all of it (three system calls a turn)",
         bench.served(connection, theirs, reads, BATCH * (4096 + wire.DATA_CHUNK.size)))
    line("write served over NBD, all of it (three system calls a turn)", await bench.written(connection, theirs))
    connection.close()
    theirs.close()
    placing, committing = await bench.writes()
    line("write placed: mode decision, lookup, sectors", placing)
    line("write committed: journal and leaf", committing)
    line("read hit as a task: submit to complete (system call)", await bench.tasks(REQ_READ))
    line("write in a group of 32 (system calls)", await bench.groups())
    line("write over ublk, 32 together (system calls)", await bench.writes_over_ublk())
    line("write as a task: submit to complete (system call)", await bench.tasks(REQ_WRITE))
    await host.stop()


def main() -> None:
    """Make a set, measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--directory", help="where the image files are made")
    asked = parser.parse_args()
    print(f"hot path: {EXTENTS} extents, {BATCH} requests a turn ({machine()}, Python {sys.version.split()[0]})")
    with tempfile.TemporaryDirectory(prefix="bcachectl-bench-", dir=asked.directory) as name:
        directory = Path(name)
        os.environ["XDG_RUNTIME_DIR"] = name
        cache, backing = directory / "cache.img", directory / "back0.img"
        for path, size_bytes in ((cache, 4 << 30), (backing, EXTENTS * 4096 + 8192)):
            with path.open("wb") as file:
                file.truncate(size_bytes)
        subprocess.run([sys.executable, "-m", "bcachectl", "format", "--cache", str(cache), "--backing", str(backing),
                        "--bucket-size", "512k", "--cache-mode", "writeback"], check=True, stdout=subprocess.DEVNULL,
                       cwd=ROOT)
        host = EngineHost(HostOptions(cache=str(cache), backings=(str(backing),), use_nbd=False,
                                      tail=str(directory / "tail"), tunables=(
            ("sequential_cutoff", "4194304"), ("congested_write_threshold_us", "0"),
            ("congested_read_threshold_us", "0"), ("cutoff_writeback", "70"), ("writeback_running", "0"))))
        try:
            host.loop.run(measure(host, directory))
        finally:
            host.close()


if __name__ == "__main__":
    main()
