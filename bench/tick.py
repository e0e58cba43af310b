# SPDX-License-Identifier: GPL-2.0-only
"""One tick of the live view at a million buckets: it may cost 2 % of one core, 20 ms of each second.

Measured twice.  Through the program: an engine and a ``monitor`` on a terminal of 200x60, CPU of both over some ticks.
In this process, part by part, with every bucket in a random state, which is the worst there is to count and to draw.
"""

from __future__ import annotations

import fcntl
import json
import os
import pty
import random
import struct
import subprocess
import sys
import tempfile
import termios
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from bcachectl.blockdev import open_device
from bcachectl.engine.bdev import Bdev
from bcachectl.engine.cache_set import CacheSet, Options
from bcachectl.engine.io.loop import Loop, make_backend
from bcachectl.engine.io.medium import Medium
from bcachectl.engine.sched import NS_PER_S, Sched
from bcachectl.snapshot import SetSnapshot, from_json, to_json
from bcachectl.views.history import History
from bcachectl.views.monitor import map_size, screen
from bench.process import cpu_s, machine, row
from tests.export.engine import ROOT, Engine

CACHE_BYTES = 512 << 30
BUCKET_TEXT = "512k"
TICKS = 20
SIZES = ((80, 24), (200, 60))


def format_set(directory: Path) -> None:
    """A sparse cache of a million buckets and a small backing device."""
    for name, size_bytes in (("cache.img", CACHE_BYTES), ("back.img", 1 << 30)):
        with (directory / name).open("wb") as file:
            file.truncate(size_bytes)
    subprocess.run([sys.executable, "-m", "bcachectl", "format", "--cache", str(directory / "cache.img"), "--backing",
                    str(directory / "back.img"), "--bucket-size", BUCKET_TEXT],
                   check=True, stdout=subprocess.DEVNULL, cwd=ROOT)


def watch(directory: Path) -> tuple[float, float]:
    """CPU seconds a tick of an engine that is watched, and of the monitor that watches it."""
    with Engine(directory, "--cache", directory / "cache.img", "--backing", directory / "back.img",
                "--export", "nbd") as engine:
        ours, theirs = pty.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 60, 200, 0, 0))
        environment = {**os.environ, "XDG_RUNTIME_DIR": engine.runtime.name, "TERM": "xterm-256color"}
        monitor = subprocess.Popen([sys.executable, "-m", "bcachectl", "monitor"], stdin=theirs, stdout=theirs,
                                   stderr=theirs, env=environment, cwd=ROOT)
        os.close(theirs)
        threading.Thread(target=_drain, args=(ours,), daemon=True).start()
        time.sleep(4)
        before = cpu_s(engine.process.pid), cpu_s(monitor.pid)
        time.sleep(TICKS)
        after = cpu_s(engine.process.pid), cpu_s(monitor.pid)
        monitor.terminate()
        monitor.wait()
        return (after[0] - before[0]) / TICKS, (after[1] - before[1]) / TICKS


def _drain(fd: int) -> None:
    try:
        while os.read(fd, 1 << 16):
            pass
    except OSError:
        pass


def parts(directory: Path) -> None:
    """Print what each part of a tick costs, every bucket in a random state."""
    devices: list[Medium] = [open_device(str(directory / "cache.img"))]
    backend = make_backend(devices)
    sched = Sched()
    cset = CacheSet(sched, Bdev(sched, 0, devices[0].path, size_sectors=CACHE_BYTES >> 9), entropy=random.Random(1),
                    options=Options(read_only=True))
    Loop(sched, backend, cset.front).run(cset.start())
    buckets, draw = cset.buckets, np.random.default_rng(1)
    count = buckets.nbuckets
    buckets.mark[:] = draw.integers(0, 4, count)
    buckets.sectors_used[:] = draw.integers(0, 1025, count)
    buckets.prio[:] = draw.integers(1, 32769, count)
    buckets.gen[:] = draw.integers(0, 40, count)
    for width, height in SIZES:
        columns, rows = map_size(width=width, height=height)

        def look(cells: int = columns * rows) -> str:
            sched.now_ns += NS_PER_S        # as often as a monitor asks
            return json.dumps(to_json(cset.snapshot(cells)))

        took_ms = [_cost_ms(look)]
        raw = json.dumps(to_json(cset.snapshot(columns * rows)))
        took_ms.append(_cost_ms(lambda text=raw: from_json(SetSnapshot, json.loads(text))))  # type: ignore[misc]
        snapshot, history = from_json(SetSnapshot, json.loads(raw)), History()
        history.add(snapshot)
        with open(os.devnull, "w", encoding="utf-8") as nowhere:
            console = Console(file=nowhere, force_terminal=True, width=width, height=height, color_system="256")

            def show(size: tuple[int, int] = (width, height), to: Console = console,
                     what: SetSnapshot = snapshot, past: History = history) -> None:
                to.print(screen(what, past, width=size[0], height=size[1]))

            took_ms.append(_cost_ms(show))
        row(f"  {width}x{height}: snapshot and JSON, decode, draw",
            " ".join(f"{took:.1f}" for took in took_ms) + " ms", "< 20 ms together")
    backend.close()
    devices[0].close()


def _cost_ms(work: Callable[[], Any]) -> float:
    work()
    start = time.process_time()
    for _ in range(TICKS):
        work()
    return (time.process_time() - start) / TICKS * 1e3


def main() -> None:
    """Measure and print."""
    print(f"tick: the live view of {CACHE_BYTES >> 19} buckets, once a second ({machine()})")
    with tempfile.TemporaryDirectory(prefix="bcachectl-bench-") as name:
        directory = Path(name)
        format_set(directory)
        engine_s, view_s = watch(directory)
        row("engine and monitor together, a tick", f"{(engine_s + view_s) * 1e3:.1f} ms", "< 20 ms (2 % of a core)")
        row("  engine, monitor", f"{engine_s * 1e3:.1f} {view_s * 1e3:.1f} ms")
        parts(directory)


if __name__ == "__main__":
    main()
