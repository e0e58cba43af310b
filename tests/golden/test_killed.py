# SPDX-License-Identifier: GPL-2.0-only
"""The kernel was killed in the middle of writing, the engine opens (traps.md, T8): judged write by write."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from tests.acceptance import Acceptance, acceptance_of_run
from tests.export.engine import Engine
from tests.export.test_golden_serve import digest, options_for
from tests.stamps import draw


def test_t8_killed_story_is_accepted(golden: Callable[..., Path], tmp_path: Path) -> None:
    story = golden("killed")
    arguments = json.loads((story / "truth-progress.txt.args").read_text())
    plan = draw(seed=arguments["seed"], ops=arguments["ops"], size_bytes=arguments["size"],
                max_kib=arguments["max_kib"], reads=arguments["reads"], hot=arguments["hot"],
                block_bytes=arguments["block"], span=arguments["span"])
    last = int((story / "truth-progress.txt").read_text().split("\n")[-2])
    acceptance = acceptance_of_run(plan, seed=arguments["seed"], last_acknowledged=last,
                                   acceptance=Acceptance(arguments["size"]))
    assert acceptance.completed_flushes() > 10
    before = [digest(story / name) for name in ("cache.img", "back0.img")]
    options = [*options_for(story), "--export", "nbd", "--read-only"]
    with Engine(tmp_path, *options) as engine, engine.client() as client:
        content = client.read_all()
    assert acceptance.judge(content) == []
    assert acceptance.judge((story / "back0.img").read_bytes()[8192:]), "the backing device alone would not do"
    assert [digest(story / name) for name in ("cache.img", "back0.img")] == before
