# SPDX-License-Identifier: GPL-2.0-only
"""``bcachectl demo``: one command that shows a cache set at work, on two files, and cleans up behind itself.

1. Two sparse files are formatted, as ``bcachectl format`` does it.
2. An engine runs them in a process of its own; a client writes and reads over NBD, and judges every block it reads.
3. The engine is killed with SIGKILL after a flush, and started again: whatever was flushed must be there.
4. The load goes on; at the end every block is read back, the engine is stopped, and what was shown is summed up.

On a terminal the live view is shown meanwhile, elsewhere a page of text now and then.
"""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from types import FrameType
from typing import Annotated

import typer
from rich.console import Console

from bcachectl.commands.demo_load import BLOCK_BYTES, Load
from bcachectl.commands.format import format_devices
from bcachectl.commands.nbd_client import NbdClient
from bcachectl.control import EngineSet, socket_path
from bcachectl.errors import BcachectlError, WrongState
from bcachectl.snapshot import SetSnapshot
from bcachectl.units import format_size, format_uuid
from bcachectl.views.history import History
from bcachectl.views.monitor import PAGE_MAP_ROWS, page
from bcachectl.views.terminal import LiveView

CACHE_BYTES, BUCKET_TEXT = 96 << 20, "64k"
BACKING_BYTES = 512 << 20
LOAD_BYTES = 192 << 20
"""How much of the volume the load uses: twice the cache, so that buckets have to be reused."""

KILL_SHARE = 0.6
"""After this part of the time the engine is killed."""

PAGE_S = 5.0
READY_TIMEOUT_S = 60
PAGE_WIDTH = 80


def demo(
    seconds: Annotated[float, typer.Option("--seconds", min=2.0, max=3600.0,
                                           help="How long the load runs.")] = 12.0,
    seed: Annotated[int, typer.Option("--seed", help="Repeats a load.")] = 1,
) -> None:
    """Show it at work: two files, an engine, a load, a crash, the live view; everything is verified and removed."""
    with contextlib.ExitStack() as cleanup:
        old = signal.signal(signal.SIGTERM, _interrupt)
        cleanup.callback(signal.signal, signal.SIGTERM, old)
        directory = tempfile.mkdtemp(prefix="bcachectl-demo-")
        story = Demo(directory, seed=seed)
        cleanup.callback(shutil.rmtree, directory, ignore_errors=True)
        cleanup.callback(story.end)
        story.run(seconds)


class Demo:
    """The files, the engine's process and the load of one demo."""

    def __init__(self, directory: str, *, seed: int) -> None:
        self.cache = os.path.join(directory, "cache.img")
        self.backing = os.path.join(directory, "backing.img")
        self.socket = os.path.join(directory, "nbd")
        self.log = os.path.join(directory, "engine.log")
        self.load = Load(blocks=LOAD_BYTES // BLOCK_BYTES, seed=seed)
        self.console = Console(highlight=False)
        self.uuid = os.urandom(16)
        self.process: subprocess.Popen[bytes] | None = None
        self.last: SetSnapshot | None = None
        self.events: dict[str, int] = {}
        self.history = History()

    def run(self, seconds: float) -> None:
        """The whole story."""
        self._format()
        _say(f"A cache of {format_size(CACHE_BYTES)} and a backing device of {format_size(BACKING_BYTES)}, two sparse "
             "files, formatted as `bcachectl format` does it, in writeback mode.")
        self._start()
        _say(f"An engine runs them (`bcachectl engine run`); a client uses {format_size(LOAD_BYTES)} of bcache0 over "
             "NBD and judges every block it reads.  Another terminal may watch with `bcachectl monitor`.")
        self._work(seconds * KILL_SHARE)
        self._remember()
        flushed = self.load.writes
        self._kill()
        _say(f"\nThe client has flushed after {flushed} writes; now the engine is killed with SIGKILL and started "
             "again.")
        started = time.monotonic()
        self._start()
        recovered_s = time.monotonic() - started
        blocks = self._verify()
        _say(f"It came back in {recovered_s:.1f} s, and all {blocks} blocks ({format_size(blocks * BLOCK_BYTES)}) that "
             "were ever written are right.")
        self._work(seconds * (1 - KILL_SHARE))
        blocks = self._verify()
        self._remember()
        self._stop()
        self._sum_up(blocks)

    def end(self) -> None:
        """End the engine, however far the story came."""
        if self.process is not None and self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(10)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()

    def _format(self) -> None:
        for path, size_bytes in ((self.cache, CACHE_BYTES), (self.backing, BACKING_BYTES)):
            with open(path, "wb") as file:
                file.truncate(size_bytes)
        with contextlib.redirect_stdout(io.StringIO()):
            format_devices(cache=[self.cache], backing=[self.backing], bucket_size=BUCKET_TEXT, writeback=True,
                           set_uuid=format_uuid(self.uuid))

    def _start(self) -> None:
        ready, told = os.pipe()
        with open(self.log, "ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "bcachectl", "engine", "run", "--cache", self.cache, "--backing", self.backing,
                 "--export", "nbd", "--nbd-socket", self.socket, "--no-live", "--ready-fd", str(told),
                 "--set", "writeback_delay=1", "--set", "sequential_cutoff=1048576"],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, pass_fds=[told])
        os.close(told)
        with open(ready, "rb") as pipe:
            if not pipe.read(1):
                self.process.wait(READY_TIMEOUT_S)
                with open(self.log, encoding="utf-8", errors="replace") as log_text:
                    raise WrongState(f"the engine did not start: {log_text.read().strip()[-500:]}")

    def _kill(self) -> None:
        assert self.process is not None
        self.process.kill()
        self.process.wait()

    def _work(self, seconds: float) -> None:
        # The load runs in a thread; this one looks.
        deadline = time.monotonic() + seconds
        failures: list[BaseException] = []
        is_over = threading.Event()

        def work() -> None:
            try:
                client = NbdClient(self.socket, "bcache0")
                self.load.run(client, is_over.is_set)
                client.close()
            except BaseException as error:
                failures.append(error)
                is_over.set()

        thread = threading.Thread(target=work)
        thread.start()
        try:
            with contextlib.closing(EngineSet(socket_path(format_uuid(self.uuid)))) as engine:
                if self.console.is_terminal:
                    self._show(engine, deadline, is_over)
                else:
                    self._print(engine, deadline, is_over)
        finally:
            is_over.set()
            thread.join()
        if failures:
            raise failures[0]

    def _show(self, engine: EngineSet, deadline: float, is_over: threading.Event) -> None:
        with LiveView(self.console, self.history) as view:
            while not is_over.is_set() and time.monotonic() < deadline:
                view.show(engine.snapshot(view.cells()))
                is_over.wait(min(1.0, max(0.0, deadline - time.monotonic())))

    def _print(self, engine: EngineSet, deadline: float, is_over: threading.Event) -> None:
        history = self.history
        next_page = time.monotonic() + PAGE_S
        while not is_over.is_set():
            is_last = time.monotonic() >= deadline
            snapshot = engine.snapshot(PAGE_WIDTH * PAGE_MAP_ROWS)
            history.add(snapshot)
            if is_last or time.monotonic() >= next_page:
                next_page += PAGE_S
                _say(f"\n{page(snapshot, history, width=PAGE_WIDTH).plain}")
            if is_last:
                return
            is_over.wait(min(0.5, max(0.0, deadline - time.monotonic())))

    def _verify(self) -> int:
        client = NbdClient(self.socket, "bcache0")
        blocks = self.load.verify(client)
        client.close()
        return blocks

    def _remember(self) -> None:
        # Counters begin anew when the engine does.
        with contextlib.closing(EngineSet(socket_path(format_uuid(self.uuid)))) as engine:
            self.last = engine.snapshot(0)
        counters = self.last.allocator.counters
        assert counters is not None
        assert self.last.gc is not None
        window = self.last.volumes[0].windows[0]
        written_back = self.last.volumes[0].writeback
        for name, count in (("allocations", counters.allocations), ("invalidations", counters.invalidations),
                            ("prio writes", counters.prio_writes), ("gc runs", self.last.gc.runs or 0),
                            ("hits", window.hits), ("misses", window.misses),
                            ("bypassed", window.bypassed_sectors * 512),
                            ("written back", (written_back.written_sectors or 0) * 512 if written_back else 0)):
            self.events[name] = self.events.get(name, 0) + count

    def _stop(self) -> None:
        assert self.process is not None
        self.process.send_signal(signal.SIGTERM)
        if self.process.wait(60):
            raise BcachectlError(f"the engine ended with status {self.process.returncode}")

    def _sum_up(self, blocks: int) -> None:
        load, events = self.load, self.events
        looked_up = max(1, events["hits"] + events["misses"])
        _say(f"\nDone: {load.reads} reads ({format_size(load.bytes_read)}) and {load.writes} writes "
             f"({format_size(load.bytes_written)}); {events['hits'] * 100 // looked_up} % of the lookups hit, "
             f"{format_size(events['bypassed'])} bypassed the cache, {format_size(events['written back'])} were "
             "written back.")
        _say(f"The allocator gave out {events['allocations']} buckets and invalidated {events['invalidations']}, with "
             f"{events['prio writes']} prio writes and {events['gc runs']} gc runs.")
        _say(f"All {blocks} blocks that were ever written have been read back right.  The engine has stopped in good "
             "order, and the files are removed.")


def _say(text: str) -> None:
    print(text, flush=True)


def _interrupt(_number: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt
