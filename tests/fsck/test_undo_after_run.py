# SPDX-License-Identifier: GPL-2.0-only
"""An undo of what was done to a cache is refused once the set has run: it would throw away what was written since."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.damage import cases
from tests.export.engine import Engine
from tests.fsck.test_damage import base_image
from tests.fsck.test_forget import run

STORIES = ("attached_clean", "dirty_crash", "deep_crash", "gen_churn", "thrash_crash", "flash_volume", "fifo_discard")


def run_set(tmp_path: Path, cache: Path, backing: Path) -> None:
    """Start, write a little, stop in good order."""
    with Engine(tmp_path, "--cache", cache, "--backing", backing, "--export", "nbd") as running:
        with running.client() as client:
            client.write(1 << 20, b"new" * 1000 + bytes(1096))
            client.flush()


def writable(path: Path, directory: Path) -> Path:
    """A copy of a device."""
    copy = directory / path.name
    copy.write_bytes(path.read_bytes())
    return copy


@pytest.mark.parametrize("story", STORIES)
def test_after_a_repair(golden: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str],
                        story: str) -> None:
    image = base_image(golden(story)).fresh()
    image.prio(0, 0, "Q", 1, fix=False)
    cache, backing, undo = tmp_path / "cache.img", tmp_path / "back.img", tmp_path / "undo"
    cache.write_bytes(image.cache.content())
    backing.write_bytes(image.backings[0].content())
    assert run(capsys, "fsck", "-y", "--backup", undo, cache)[0] == 1
    run_set(tmp_path, cache, backing)
    status, _out, err = run(capsys, "undo", undo)
    assert (status, "--force=changed" in err) == (3, True)


def test_after_forgetting(golden: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    story = golden("two_backing", writable=True)
    undo = tmp_path / "undo"
    assert run(capsys, "forget-backing", story / "cache.img", "bcache1", "--accept-loss", "--backup", undo)[0] == 0
    run_set(tmp_path, story / "cache.img", story / "back0.img")
    status, _out, err = run(capsys, "undo", undo)
    assert (status, "--force=changed" in err) == (3, True)


def test_a_superblock_that_was_repaired_too(golden: Callable[..., Path], tmp_path: Path,
                                            capsys: pytest.CaptureFixture[str]) -> None:
    case = next(case for case in cases() if case.name == "sb_all_zero_attached_clean")
    image = base_image(golden(case.base)).fresh()
    case.edit(image)
    cache, undo = tmp_path / "cache.img", tmp_path / "undo"
    cache.write_bytes(image.cache.content())
    backing = golden(case.base) / "back0.img"
    assert run(capsys, "fsck", "-y", "--backup", undo, cache, writable(backing, tmp_path))[0] == 1
    assert run(capsys, "undo", undo)[0] == 0
    assert cache.read_bytes() == image.cache.content()
