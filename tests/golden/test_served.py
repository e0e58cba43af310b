# SPDX-License-Identifier: GPL-2.0-only
"""The engine serves what kernels left, clean or crashed: every byte as the truth says, and read-only means read-only.

traps.md, T8: the kernel was killed or stopped, the engine opens.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.acceptance import acceptance_of_run
from tests.conftest import TESTS
from tests.engine_process import EngineProcess
from tests.stamps import draw

STORIES = sorted(path.name for path in (TESTS / "golden").iterdir() if (path / "make.txt").exists())
WITH_TRUTH = [name for name in STORIES if (TESTS / "golden" / name / "truth0.json").exists()]


def digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digests(story: Path) -> dict[str, str]:
    return {image.name: digest(image) for image in sorted(story.glob("*.img"))}


def engine_on(story: Path, *arguments: str) -> EngineProcess:
    return EngineProcess(story / "cache.img", sorted(story.glob("back*.img")), arguments=arguments)


def truths(story: Path) -> list[dict[str, object]]:
    return [json.loads(path.read_text()) for path in sorted(story.glob("truth?.json"))]


def judge_by_truth(engine: EngineProcess, story: Path) -> None:
    """Every volume that has a truth reads as it says."""
    assert len(engine.volumes) >= len(truths(story))
    for number, truth in enumerate(truths(story)):
        with engine.client(f"bcache{number}") as client:
            assert client.size_bytes == truth["device_bytes"]
            assert hashlib.sha256(client.read_all()).hexdigest() == truth["sha256"], f"bcache{number}"


def test_there_are_stories() -> None:
    assert len(STORIES) == 10
    assert len(WITH_TRUTH) == 8


@pytest.mark.parametrize("name", WITH_TRUTH)
def test_t8_read_only_reads_the_truth_and_changes_nothing(golden: Callable[..., Path], name: str) -> None:
    story = golden(name)
    before = digests(story)
    with engine_on(story, "--read-only") as engine:
        judge_by_truth(engine, story)
        engine.stop()
    assert digests(story) == before


@pytest.mark.parametrize("name", WITH_TRUTH)
def test_t8_writable_reads_the_truth_and_again_after_a_clean_stop(golden: Callable[..., Path], name: str) -> None:
    story = golden(name)
    copy = golden(name, writable=True)
    with engine_on(copy, "--debug-checks") as engine:
        judge_by_truth(engine, story)
        engine.stop()
    with engine_on(copy) as engine:
        judge_by_truth(engine, story)
        engine.stop()


def test_t8_killed_story_is_accepted(golden: Callable[..., Path]) -> None:
    story = golden("killed")
    arguments = json.loads((story / "truth-progress.txt.args").read_text())
    plan = draw(seed=arguments["seed"], ops=arguments["ops"], size_bytes=arguments["size"],
                max_kib=arguments["max_kib"], reads=arguments["reads"], hot=arguments["hot"],
                block_bytes=arguments["block"], span=arguments["span"])
    last = int((story / "truth-progress.txt").read_text().split("\n")[-2])
    acceptance = acceptance_of_run(plan, seed=arguments["seed"], last_acknowledged=last, size_bytes=arguments["size"])
    assert acceptance.completed_flushes() > 10
    before = digests(story)
    with engine_on(story, "--read-only") as engine, engine.client() as client:
        content = client.read_all()
    assert acceptance.judge(content) == []
    assert acceptance.judge((story / "back0.img").read_bytes()[8192:]), "the backing device alone would not do"
    assert digests(story) == before


def test_fresh_set_is_zeros(golden: Callable[..., Path]) -> None:
    copy = golden("fresh", writable=True)
    with engine_on(copy) as engine:
        with engine.client() as client:
            assert not any(client.read_all())
        engine.stop()
