# SPDX-License-Identifier: GPL-2.0-only
"""What a tick of the live view costs at a million buckets: the engine's side, and the whole of it as `monitor` has it.

Aim: less than 2 % of a core with a tick a second, 20 ms, on 200x60 cells.  An engine's own view (``engine run --live``)
pays for the snapshot and the drawing; an engine that a `monitor` watches pays for the snapshot and its JSON, and the
monitor for reading that and drawing.
"""

from __future__ import annotations

import io
import json
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from rich.console import Console

from bcachectl.blockdev import open_device
from bcachectl.engine.bdev import Bdev
from bcachectl.engine.buckets import INITIAL_PRIO
from bcachectl.engine.cache_set import CacheSet
from bcachectl.engine.io.loop import Loop, make_backend
from bcachectl.engine.io.medium import Medium
from bcachectl.engine.sched import NS_PER_S, Sched
from bcachectl.snapshot import SetSnapshot, from_json, to_json
from bcachectl.views.history import History
from bcachectl.views.monitor import map_size, screen
from bench.process import machine, row
from bench.scale import format_set

NBUCKETS = 1 << 20
TICKS = 15
SIZES = ((80, 24), (200, 60))


def median_ms(function: Callable[[], object]) -> float:
    """Milliseconds of CPU time of this thread, the median of some calls."""
    took = []
    for _ in range(TICKS):
        start = time.thread_time()
        function()
        took.append((time.thread_time() - start) * 1e3)
    return statistics.median(took)


def running_set(directory: Path) -> tuple[CacheSet, Medium]:
    """A set of a million buckets, every one of them in use, as after weeks."""
    device: Medium = open_device(str(directory / "cache.img"), write=True, exclusive=True)
    sched = Sched()
    cset = CacheSet(sched, Bdev(sched, 0, device.path, size_sectors=device.size_bytes >> 9), entropy=random.Random(1))
    backend = make_backend([device])
    Loop(sched, backend, cset.front).run(cset.start())
    backend.close()
    draw = np.random.default_rng(1)
    buckets = cset.buckets
    buckets.prio[:] = draw.integers(0, INITIAL_PRIO + 1, NBUCKETS, dtype=np.uint16)
    buckets.sectors_used[:] = draw.integers(0, 1025, NBUCKETS, dtype=np.uint16)
    buckets.mark[:] = draw.integers(0, 3, NBUCKETS, dtype=np.uint8)
    buckets.gen[:] = draw.integers(0, 90, NBUCKETS, dtype=np.uint8)
    return cset, device


def draw_once(snapshot: SetSnapshot, history: History, size: tuple[int, int]) -> str:
    """The screen as a terminal gets it."""
    text = io.StringIO()
    console = Console(file=text, force_terminal=True, width=size[0], height=size[1])
    console.print(screen(snapshot, history, width=size[0], height=size[1]))
    return text.getvalue()


def main() -> None:
    """Measure and print."""
    print(f"live: a tick at {NBUCKETS} buckets, CPU time ({machine()})")
    with tempfile.TemporaryDirectory(prefix="bcachectl-bench-") as name:
        directory = Path(name, "set")
        format_set(directory, NBUCKETS * (512 << 10))
        cset, device = running_set(directory)
        for size in SIZES:
            columns, rows = map_size(width=size[0], height=size[1])
            cells = columns * rows
            history = History()
            for _ in range(60):         # a minute of history
                cset.sched.now_ns += NS_PER_S
                history.add(cset.snapshot(cells))
            snapshot = cset.snapshot(cells)
            text = json.dumps(to_json(snapshot))
            taking = median_ms(lambda cells=cells: cset.snapshot(cells))    # type: ignore[misc]
            coding = median_ms(lambda shown=snapshot: json.dumps(to_json(shown)))   # type: ignore[misc]
            reading = median_ms(lambda text=text: from_json(SetSnapshot, json.loads(text)))   # type: ignore[misc]
            drawing = median_ms(lambda shown=snapshot, history=history, size=size:      # type: ignore[misc]
                                draw_once(shown, history, size))
            print(f"  {size[0]}x{size[1]}, {cells} cells")
            row("  snapshot, in the engine", f"{taking:.1f} ms")
            row("  its JSON, in a watched engine", f"{coding:.1f} ms")
            row("  reading it, in the monitor", f"{reading:.1f} ms")
            row("  drawing", f"{drawing:.1f} ms")
            row("  a tick of engine run --live", f"{taking + drawing:.1f} ms", "< 20 ms")
            row("  a tick of a watched engine", f"{taking + coding:.1f} ms", "< 20 ms")
            row("  a tick of monitor itself", f"{reading + drawing:.1f} ms", "< 20 ms")
        device.close()


if __name__ == "__main__":
    main()
