# SPDX-License-Identifier: GPL-2.0-only
"""fsck as a program: its repairs, its undo file, its copy, its exit status.

test_interrupted.py has repairs that are interrupted."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from bcachectl import cli, writeplan
from bcachectl.errors import DeviceError
from tests.damage import Case, cases
from tests.fsck.test_damage import base_image

CASES = {case.name: case for case in cases()}


def damaged_files(golden: Callable[..., Path], tmp_path: Path, *damages: Case) -> list[Path]:
    """The devices of a case as files; of several with one base, if all of it has happened."""
    image = base_image(golden(damages[0].base)).fresh()
    for case in damages:
        case.edit(image)
    return image.as_files(tmp_path)


@pytest.mark.parametrize("name", ["prio_csum_dirty_crash", "sb_all_zero_attached_clean", "backing_csum_dirty_crash",
                                  "set_csum_first_leaf_thrash_crash"])
def test_verb_repairs_and_undoes(golden: Callable[..., Path], tmp_path: Path, name: str,
                                 capsys: pytest.CaptureFixture[str]) -> None:
    paths = damaged_files(golden, tmp_path, CASES[name])
    before = [path.read_bytes() for path in paths]
    words = [str(path) for path in paths]
    undo = tmp_path / "undo"
    assert cli.run(["fsck", *words]) == 4
    assert [path.read_bytes() for path in paths] == before
    assert CASES[name].codes[0] in capsys.readouterr().out
    assert cli.run(["fsck", "-y", "--backup", str(undo), *words]) == 1
    assert cli.run(["fsck", "--json", *words]) == 0
    output = capsys.readouterr().out
    assert json.loads(output[output.index('{\n  "schema"'):])["clean"] is True
    assert cli.run(["undo", str(undo)]) == 0
    assert [path.read_bytes() for path in paths] == before


def test_output_leaves_the_device_alone(golden: Callable[..., Path], tmp_path: Path) -> None:
    paths = damaged_files(golden, tmp_path, CASES["prio_csum_dirty_crash"])
    before = [path.read_bytes() for path in paths]
    copy = tmp_path / "copy.img"
    assert cli.run(["fsck", "-y", "--output", str(copy), *map(str, paths)]) == 1
    assert [path.read_bytes() for path in paths] == before
    assert cli.run(["fsck", str(copy), *map(str, paths[1:])]) == 0


def test_output_says_that_a_backing_device_stays_as_it_is(golden: Callable[..., Path], tmp_path: Path) -> None:
    paths = damaged_files(golden, tmp_path, CASES["prio_csum_dirty_crash"], CASES["backing_csum_dirty_crash"])
    before = [path.read_bytes() for path in paths]
    assert cli.run(["fsck", "-y", "--output", str(tmp_path / "copy.img"), *map(str, paths)]) == 1 | 4
    assert [path.read_bytes() for path in paths] == before
    assert cli.run(["fsck", str(tmp_path / "copy.img"), *map(str, paths[1:])]) == 4


def test_half_a_copy_is_none(golden: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk is full while the copy is repaired."""
    paths = damaged_files(golden, tmp_path, CASES["prio_csum_dirty_crash"])

    def full(plan: object, devices: object) -> None:
        raise DeviceError("copy.img: write at byte 0 failed: No space left on device", errno=28)

    monkeypatch.setattr(writeplan, "apply", full)
    assert cli.run(["fsck", "-y", "--output", str(tmp_path / "copy.img"), *map(str, paths)]) == 8
    assert not (tmp_path / "copy.img").exists()


def test_preen_leaves_what_costs_data(golden: Callable[..., Path], tmp_path: Path) -> None:
    paths = damaged_files(golden, tmp_path, CASES["set_csum_first_leaf_killed"])
    before = [path.read_bytes() for path in paths]
    assert cli.run(["fsck", "-p", *map(str, paths)]) == 4
    assert [path.read_bytes() for path in paths] == before


@pytest.mark.parametrize(("words", "status"), [
    (["fsck"], 16),
    (["fsck", "-n", "-y", "nowhere"], 16),
    (["fsck", "--output", "x", "nowhere"], 16),
    (["fsck", "/nonexistent"], 8),
])
def test_exit_status(words: list[str], status: int) -> None:
    assert cli.run(words) == status


def test_backing_device_in_the_place_of_the_cache(golden: Callable[..., Path], capsys: pytest.CaptureFixture[str],
                                                  ) -> None:
    assert cli.run(["fsck", str(golden("dirty_crash") / "back0.img")]) == 16
    assert "name the cache device first" in capsys.readouterr().err


def test_no_set_at_all(tmp_path: Path) -> None:
    path = tmp_path / "random.img"
    path.write_bytes(random.Random(1).randbytes(1 << 20))
    assert cli.run(["fsck", str(path)]) == 4
    path.write_bytes(bytes(600))
    assert cli.run(["fsck", str(path)]) == 4
