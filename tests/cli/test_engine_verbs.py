# SPDX-License-Identifier: GPL-2.0-only
"""The verbs that ask a running engine, from the command line to the devices and back."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from bcachectl.snapshot import SetSnapshot, from_json
from tests.cli.conftest import Result
from tests.export.engine import Engine
from tests.require import patience

Cli = Callable[..., Result]


@pytest.fixture
def engine(golden: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Engine]:
    story = golden("two_backing", writable=True)
    with Engine(tmp_path, "--cache", story / "cache.img", "--backing", story / "back0.img", "--backing",
                story / "back1.img", "--export", "nbd", "--set", "writeback_running=0") as running:
        monkeypatch.setenv("XDG_RUNTIME_DIR", running.runtime.name)
        yield running


def test_a_day_in_the_life_of_an_engine(cli: Cli, engine: Engine) -> None:
    listed = json.loads(cli("engine", "list", "--json").out)["engines"]
    assert [volume["volume"] for volume in listed[0]["volumes"]] == ["bcache0", "bcache1"]
    uuid = listed[0]["set"]
    text = cli("engine", "list").out
    assert f"set {uuid}  pid {engine.process.pid}" in text
    places = [volume["device"] or volume["uri"] for volume in engine.volumes]
    assert [volume["device"] or volume["uri"] for volume in listed[0]["volumes"]] == places
    assert all(place in text for place in places)

    page = cli("status").out
    assert "writeback is paused" in page
    assert "exist only in the cache" in page
    assert "\nbcache1 " in page
    assert "\nbcache1 " not in cli("status", "bcache0").out
    status = json.loads(cli("status", "--json").out)
    assert (status["kind"], status["uuid"]) == ("status", uuid)
    assert from_json(SetSnapshot, status).volumes[0].state == "dirty"

    page = cli("monitor", "--once").out
    for word in ("BTREE", "free_inc", "headroom", "D dirty 17%", "bcache1"):
        assert word in page
    line = cli("monitor", uuid[:8], "--once", "--json").out
    assert line.count("\n") == 1
    assert len(json.loads(line)["map"]["states"]) == 640

    assert cli("get", "bcache0", "state").out == "dirty\n"
    assert cli("set", "vol1", "writeback_percent=99").out == "writeback_percent = 40 (asked for 99)\n"
    assert cli("get", "bcache1", "writeback_percent").out == "40\n"
    refused = cli("set", "bcache0", "writeback_percent=4M")
    assert (refused.status, refused.err.count("\n")) == (2, 1)
    assert cli("set", uuid, "writeback_percent=4").status == 2
    assert cli("set", uuid, "synchronous=0").status == 3

    assert "gc done over" in cli("gc", uuid).out
    short = cli("gc", uuid[:7].upper())
    assert (short.status, "is too short for a set, which takes 8 characters" in short.err) == (4, True)
    # A flush is done though writeback is paused.
    assert "bcache0 is clean" in cli("flush", "bcache0").out
    assert cli("get", "bcache0", "state").out == "clean\n"
    assert "of dirty data back" in cli("detach", "bcache1", "--dry-run").out
    assert cli("get", "bcache1", "state").out == "dirty\n"
    assert "bcache1 is detached" in cli("detach", "bcache1", "--wait").out
    assert cli("get", "bcache1", "state").out == "no cache\n"
    assert cli("detach", "bcache1").status == 4
    assert cli("flush", "bcache1").out == "bcache1 is attached to no set; nothing was dirty\n"
    assert "attached to set" in cli("attach", "bcache1", uuid.upper()).out
    assert cli("attach", "bcache1", uuid).status == 4
    assert cli("attach", "bcache1", f"{uuid}0").status == 2

    assert "bcache2 is a flash-only volume of 1 MiB" in cli("volume", "create", uuid, "1M").out
    assert cli("volume", "remove", "bcache0").status == 4
    assert cli("volume", "create", uuid, "10").status == 3
    assert "bcache2 is removed" in cli("volume", "remove", "bcache2").out

    assert cli("stop", "bcache0").status == 4
    assert "would ask" in cli("engine", "stop", "--dry-run").out
    assert cli("engine", "stop").out == f"set {uuid} has stopped\n"
    engine.process.wait(patience(10))
    assert cli("engine", "list").out == "no engine runs here\n"
    for words in (("status",), ("monitor", "--once"), ("engine", "stop"), ("get", "bcache0"), ("gc", uuid)):
        gone = cli(*words)
        assert (gone.status, gone.err.count("\n")) == (4, 1)


def test_a_still_picture_of_a_set_that_does_not_run(cli: Cli, golden: Callable[..., Path]) -> None:
    story = golden("two_backing")
    before = (story / "cache.img").read_bytes()
    page = cli("monitor", story / "cache.img").out
    assert "a still picture" in page
    assert "9.9 MiB exist only in the cache" in page
    shown = from_json(SetSnapshot, json.loads(cli("monitor", story / "cache.img", "--json").out))
    assert shown.source == "offline"
    # As the engine has it, too: see the page above.
    assert [volume.state for volume in shown.volumes] == ["dirty", "dirty"]
    assert sum(volume.dirty_sectors for volume in shown.volumes) == 20280
    assert (story / "cache.img").read_bytes() == before
    refused = cli("monitor", story / "back0.img")
    assert refused.status == 4
    assert "backing device" in refused.err


def test_the_demo_shows_what_it_says_and_leaves_nothing(cli: Cli, tmp_path: Path,
                                                        monkeypatch: pytest.MonkeyPatch) -> None:
    # The name of a socket must be short.
    runtime = tempfile.mkdtemp(prefix="demo")
    monkeypatch.setenv("XDG_RUNTIME_DIR", runtime)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    monkeypatch.setattr("bcachectl.commands.demo.LOAD_BYTES", 16 << 20)
    shown = cli("demo", "--seconds", "3", "--seed", "5")
    assert shown.status == 0, shown.err
    for word in ("killed with SIGKILL", "are right", "free_inc", "The allocator gave out", "have been read back right",
                 "the files are removed"):
        assert word in shown.out, word
    assert not list(tmp_path.glob("bcachectl-demo-*"))
    assert not list(Path(runtime).glob("**/*.sock"))
    shutil.rmtree(runtime)
