# SPDX-License-Identifier: GPL-2.0-only
"""SIGKILL in the middle of writing, again and again on the same set: what a completed flush or FUA covered is there.

A client writes stamped requests, eight in flight, some with FUA, with a flush now and then; after a number of
acknowledgements that differs from kill to kill, the engine is killed while requests are in flight.  The next engine
serves the result to the judge (`tests.acceptance`), and then gets killed in turn: recovery of what an interrupted
recovery left is part of the story.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from tests.acceptance import Acceptance
from tests.export.engine import ROOT, Engine
from tests.over import exported
from tests.require import patience
from tests.stamps import draw
from tests.system.sets import MODES, make_set
from tests.writer import write_plan

KILLS = 4
SIZE_BYTES = 64 << 20


@pytest.mark.parametrize("mode", MODES)
def test_what_was_flushed_survives_every_kill(tmp_path: Path, mode: str) -> None:
    # The cache is smaller than what is written, so buckets are reused and prios written when the power goes.
    options = [*make_set(tmp_path, cache_bytes=20 << 20, backing_bytes=SIZE_BYTES + 8192, mode=mode), "--export", "nbd",
               "--set", "writeback_delay=0", "--debug-checks"]
    acceptance = Acceptance(SIZE_BYTES)
    killed = 0
    for number in range(KILLS):
        plan = draw(seed=100 + number, ops=2000, size_bytes=SIZE_BYTES, max_kib=64, flushes=0.02)
        with Engine(tmp_path, *options) as engine, engine.client() as client:
            assert client.size_bytes == SIZE_BYTES
            is_finished = write_plan(client, plan, acceptance, seed=100 + number, fua=0.05,
                                     stop_after=150 + 301 * number, on_write=engine.kill)
            killed += not is_finished
            assert engine.errors == ""
        assert acceptance.completed_flushes() > 0
        with Engine(tmp_path, *options) as engine, engine.client() as client:
            content = client.read_all()
            assert acceptance.judge(content) == []
            acceptance = acceptance.carry_over(content)
            if number % 2:
                engine.kill()
            else:
                assert engine.stop() == 0
            assert engine.errors == ""
    assert killed == KILLS


def test_kills_while_it_starts(tmp_path: Path) -> None:
    """Killed at many moments of the start, recovery included; the last start finds everything."""
    options = [*make_set(tmp_path, cache_bytes=20 << 20, backing_bytes=SIZE_BYTES + 8192, mode="writeback"),
               "--export", "nbd"]
    acceptance = Acceptance(SIZE_BYTES)
    with Engine(tmp_path, *options) as engine, engine.client() as client:
        write_plan(client, draw(seed=7, ops=900, size_bytes=SIZE_BYTES, max_kib=64, flushes=0.02), acceptance, seed=7,
                   stop_after=600, on_write=engine.kill)
    command = [sys.executable, "-m", "bcachectl", "engine", "run", "--no-live", *exported(options)]
    with tempfile.TemporaryDirectory() as runtime:
        environment = {**os.environ, "XDG_RUNTIME_DIR": runtime}
        for after_ms in range(200, 700, 40):
            starting = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL)
            time.sleep(patience(after_ms / 1000))
            starting.kill()
            starting.wait(10)
    with Engine(tmp_path, *options) as engine, engine.client() as client:
        assert acceptance.judge(client.read_all()) == []
        assert engine.stop() == 0
        assert engine.errors == ""
