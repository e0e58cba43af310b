# SPDX-License-Identifier: GPL-2.0-only
"""fio on the loop export, with a cache far smaller than the data: what is read is what was written, in every mode.

Three kinds of traffic run at once, each in a part of its own: random requests of all sizes that are read back while
they are written, streams of large requests around the sequential cutoff, and small ones that overwrite each other.  The
cache turns over many times, so allocator, gc and writeback are at work under them.  Then the engine is stopped, started
again, and fio looks at every block once more.
"""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.export.engine import Engine
from tests.over import need_block_export, only
from tests.require import patience
from tests.system.sets import MODES, make_set, status_of

SEEDS = (20, 21)
CACHE_BYTES = 24 << 20
BACKING_BYTES = 208 << 20

JOBS = """
[global]
ioengine=libaio
direct=1
verify=crc32c
verify_fatal=1
verify_state_save=0
randseed={seed}
filename={device}
{phase}

[random]
rw=randwrite
bsrange=4k-64k
iodepth=16
offset=0
size=96m
verify_backlog=64

[streams]
rw=write
bs=512k
iodepth=4
offset=96m
size=80m

[small]
rw=randwrite
bs=4k
iodepth=8
offset=176m
size=32m
"""

READERS = """
[readers]
rw=randread
verify=0
bsrange=4k-128k
iodepth=8
size=208m
io_size=160m
"""


@pytest.mark.parametrize("mode", MODES)
def test_what_is_read_is_what_was_written(tmp_path: Path, mode: str, require_tool: Callable[[str], str]) -> None:
    need_block_export()
    fio = require_tool("fio")
    options = make_set(tmp_path, cache_bytes=CACHE_BYTES, backing_bytes=BACKING_BYTES + (1 << 20), mode=mode)
    options += ["--export", "loop", "--set", "sequential_cutoff=1048576", "--set", "writeback_delay=0"]

    def work(device: str, *, seed: int, verify_only: bool) -> None:
        jobs = tmp_path / "jobs.fio"
        text = JOBS.format(seed=seed, device=device, phase="verify_only=1" if verify_only else "do_verify=1")
        jobs.write_text(text if verify_only else text + READERS, encoding="ascii")
        done = subprocess.run([fio, str(jobs)], capture_output=True, text=True, cwd=tmp_path, timeout=patience(240))
        assert done.returncode == 0, done.stderr + done.stdout

    with Engine(tmp_path, *options, "--debug-checks") as engine:
        for seed in SEEDS:
            work(engine.volumes[0]["device"], seed=seed, verify_only=False)
        snapshot = status_of(engine, options[1])
        if mode != "none":
            assert snapshot["allocator"]["counters"]["invalidations"] > 2 * snapshot["allocator"]["nbuckets"]
            assert snapshot["gc"]["runs"] > 10
        assert (snapshot["volumes"][0]["writeback"]["written_sectors"] > 0) == (mode == "writeback")
        assert engine.stop() == 0
        assert engine.errors == ""
    with Engine(tmp_path, *options) as engine:
        work(engine.volumes[0]["device"], seed=SEEDS[-1], verify_only=True)
        assert engine.stop() == 0
        assert engine.errors == ""


def test_batches_of_writes_over_nbd(tmp_path: Path, require_tool: Callable[[str], str]) -> None:
    """Small writes at depth 32 in writeback mode, which the engine takes in batches, read back while they go on."""
    only("nbd", "fio's own client")
    fio = require_tool("fio")
    options = make_set(tmp_path, cache_bytes=CACHE_BYTES, backing_bytes=BACKING_BYTES + (1 << 20), mode="writeback")
    with Engine(tmp_path, *options, "--export", "nbd", "--debug-checks") as engine:
        done = subprocess.run(
            [fio, "--name=batches", "--ioengine=nbd", f"--uri={engine.volumes[0]['uri']}", "--size=48m",
             "--io_size=96m", "--rw=randrw", "--rwmixread=30", "--bsrange=4k-80k", "--iodepth=32", "--verify=crc32c",
             "--verify_backlog=256", "--verify_fatal=1"], capture_output=True, text=True, cwd=tmp_path,
            timeout=patience(240))
        assert done.returncode == 0, done.stderr + done.stdout
        assert engine.stop() == 0
        assert engine.errors == ""
