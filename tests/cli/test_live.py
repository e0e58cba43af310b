# SPDX-License-Identifier: GPL-2.0-only
"""`list` and `where` while an engine runs the set, and what is refused meanwhile."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cli.conftest import Result
from tests.export.engine import Engine

Cli = Callable[..., Result]


def test_list_and_where_of_a_running_set(cli: Cli, golden: Callable[..., Path], tmp_path: Path,
                                         monkeypatch: pytest.MonkeyPatch) -> None:
    story = golden("two_backing", writable=True)
    cache, backings = story / "cache.img", (story / "back0.img", story / "back1.img")
    offline = json.loads(cli("where", "bcache1", 0, 3000, "--cache", cache, "--json").out)
    with Engine(tmp_path, "--cache", cache, "--backing", backings[0], "--backing", backings[1], "--export", "nbd",
                "--read-only") as engine:
        monkeypatch.setenv("XDG_RUNTIME_DIR", engine.runtime.name)
        listed = json.loads(cli("list", "--json").out)
        assert {device["device"] for device in listed["devices"]} >= {str(cache), *map(str, backings)}
        assert [found["pid"] for found in listed["engines"]] == [engine.process.pid]
        assert f"run by an engine (pid {engine.process.pid})" in cli("list").out

        running = json.loads(cli("where", "bcache1", 0, 3000, "--json").out)
        assert running["uuid"] == offline["uuid"]
        assert sectors(running) == sectors(offline)
        assert cli("where", backings[1], 5).out == cli("where", "bcache1", 5).out

        for words, status, why in ((("where", "bcache9", 0), 4, "bcache9"),
                                   (("where", "bcache0", 1 << 40), 2, "behind its end"),
                                   (("wipe", cache), 3, "in use"),
                                   (("format", "--cache", cache, "--force=bcache"), 3, "in use")):
            refused = cli(*words)
            assert refused.status == status
            assert why in refused.err
            assert refused.err.count("\n") == 1
    assert cli("where", "bcache0", 0).status == 4
    assert os.path.exists(cache)


def sectors(answer: dict[str, list[dict[str, object]]]) -> dict[int, tuple[object, ...]]:
    # Where extents are cut is the tree's business; where each sector lies is not.
    said: dict[int, tuple[object, ...]] = {}
    for piece in answer["pieces"]:
        start, end, at = piece["start"], piece["end"], piece["device_sector"]
        assert isinstance(start, int)
        assert isinstance(end, int)
        assert isinstance(at, int)
        said |= {sector: (piece["state"], piece["device"], at + sector - start) for sector in range(start, end)}
    return said
