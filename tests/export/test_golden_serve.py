# SPDX-License-Identifier: GPL-2.0-only
"""Every set that a real kernel wrote, served over NBD, reads as the kernel said it does; and nothing is written."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.export.engine import Engine
from tests.over import need_block_export

STORIES = ("attached_clean", "dirty_crash", "deep_crash", "thrash_crash", "two_backing", "flash_volume",
           "fifo_discard", "gen_churn")


def digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def options_for(directory: Path) -> list[str | Path]:
    options: list[str | Path] = ["--cache", directory / "cache.img"]
    for backing in sorted(directory.glob("back*.img")):
        options += ["--backing", backing]
    return options


def truths(directory: Path) -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in sorted(directory.glob("truth*.json"))]


def check_content(engine: Engine, expected: list[dict[str, Any]]) -> None:
    assert [volume["volume"] for volume in engine.volumes] == [f"bcache{index}" for index in range(len(expected))]
    for index, truth in enumerate(expected):
        with engine.client(f"bcache{index}") as client:
            assert client.size_bytes == truth["device_bytes"] == engine.volumes[index]["size"]
            # Twice: the second pass finds every node in memory, and hits are answered the quick way.
            for piece_bytes in (1 << 20, 64 << 10):
                assert hashlib.sha256(client.read_all(piece_bytes)).hexdigest() == truth["sha256"]


@pytest.mark.parametrize("story", STORIES)
def test_read_only(story: str, golden: Callable[..., Path], tmp_path: Path) -> None:
    directory = golden(story)
    images = sorted(directory.glob("*.img"))
    before = [digest(image) for image in images]
    with Engine(tmp_path, *options_for(directory), "--read-only", "--export", "nbd", "--debug-checks") as engine:
        check_content(engine, truths(directory))
    assert engine.status == 0
    assert engine.errors == ""
    assert [digest(image) for image in images] == before


@pytest.mark.parametrize("story", ["dirty_crash", "flash_volume"])
def test_read_only_as_block_devices(story: str, golden: Callable[..., Path], tmp_path: Path) -> None:
    need_block_export()
    directory = golden(story)
    images = sorted(directory.glob("*.img"))
    before = [digest(image) for image in images]
    with Engine(tmp_path, *options_for(directory), "--read-only", "--export", "loop") as engine:
        for volume, truth in zip(engine.volumes, truths(directory), strict=True):
            assert digest(Path(volume["device"])) == truth["sha256"]
    assert (engine.status, engine.errors) == (0, "")
    assert [digest(image) for image in images] == before


@pytest.mark.parametrize("story", STORIES)
def test_overlay(story: str, golden: Callable[..., Path], tmp_path: Path) -> None:
    directory = golden(story)
    expected = truths(directory)
    images = sorted(directory.glob("*.img"))
    before = [digest(image) for image in images]
    overlay = tmp_path / "overlay"
    options = [*options_for(directory), "--overlay", overlay, "--export", "nbd", "--debug-checks"]
    data = b"overlay!" * 8192
    with Engine(tmp_path, *options) as engine:
        check_content(engine, expected)
        with engine.client("bcache0") as client:
            client.write(1 << 20, data)
            client.flush()
    assert (engine.status, engine.errors) == (0, "")
    with Engine(tmp_path, *options) as engine, engine.client("bcache0") as client:
        assert client.read(1 << 20, len(data)) == data
    assert engine.status == 0
    assert [digest(image) for image in images] == before


def test_an_overlay_survives_sigkill(golden: Callable[..., Path], tmp_path: Path) -> None:
    directory = golden("thrash_crash")
    options = [*options_for(directory), "--overlay", tmp_path / "overlay", "--export", "nbd"]
    model = bytearray()
    for number in range(3):
        with Engine(tmp_path, *options) as engine, engine.client() as client:
            model = model or bytearray(client.read_all())
            assert client.read_all() == model
            for index in range(200):
                start = (number * 7919 + index * 104729) % (len(model) // 512 - 64) * 512
                model[start:start + 6144] = data = bytes([number + 1, index]) * 3072
                client.write(start, data)
            client.flush()
            engine.kill()


@pytest.mark.parametrize("story", STORIES)
def test_run_stop_and_run_again(story: str, golden: Callable[..., Path], tmp_path: Path) -> None:
    directory = golden(story, writable=True)
    expected = truths(golden(story))
    for _ in range(3):
        with Engine(tmp_path, *options_for(directory), "--export", "nbd", "--debug-checks") as engine:
            check_content(engine, expected)
        assert (engine.status, engine.errors) == (0, "")


def test_a_set_that_was_never_run_becomes_one(golden: Callable[..., Path], tmp_path: Path) -> None:
    directory = golden("fresh", writable=True)
    with Engine(tmp_path, *options_for(directory), "--export", "nbd", "--read-only", expect_failure=True) as engine:
        assert engine.status == 4
        assert len(engine.errors.splitlines()) == 1
