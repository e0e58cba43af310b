# SPDX-License-Identifier: GPL-2.0-only
"""`wipe` and `undo`: nothing is taken away that cannot be put back, and nothing is put back over something new."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cli.conftest import Result

Cli = Callable[..., Result]
Golden = Callable[..., Path]


def digest(*paths: Path) -> list[str]:
    return [hashlib.sha256(path.read_bytes()).hexdigest() for path in paths]


def test_wipe_and_undo(cli: Cli, golden: Golden, tmp_path: Path) -> None:
    story = golden("attached_clean", writable=True)
    images = story / "cache.img", story / "back0.img"
    before = digest(*images)
    undo_file = tmp_path / "my.undo"
    wiped = cli("wipe", *images, "--backup", undo_file)
    assert wiped.status == 0, wiped.err
    assert f"`bcachectl undo {undo_file}` takes it back" in wiped.out
    assert all(cli("show", image).status == 1 for image in images)
    assert all("no bcache superblock" in cli("show", image).err for image in images)
    assert images[0].read_bytes()[4096:8192] == bytes(4096)
    assert cli("undo", undo_file).status == 0
    assert digest(*images) == before


def test_dry_run(cli: Cli, golden: Golden, tmp_path: Path) -> None:
    image = golden("attached_clean", writable=True) / "back0.img"
    before = digest(image)
    said = cli("wipe", image, "--dry-run")
    assert said == Result(0, f"{image}: write 4096 bytes at byte 4096: superblock\n", "")
    machine = json.loads(cli("wipe", image, "--dry-run", "--json").out)
    assert machine["writes"] == [{"device": str(image), "operation": "write", "offset_bytes": 4096,
                                  "length_bytes": 4096, "what": "superblock"}]
    assert digest(image) == before
    assert not (tmp_path / "state").exists()


@pytest.mark.parametrize("name", ["cache.img", "back0.img"])
def test_dirty_data_is_refused(cli: Cli, golden: Golden, name: str) -> None:
    image = golden("dirty_crash", writable=True) / name
    before = digest(image)
    refused = cli("wipe", image)
    assert refused.status == 3
    assert "--force=dirty" in refused.err
    assert digest(image) == before
    assert cli("wipe", image, "--force=dirty").status == 0


def test_damaged_cache_counts_as_dirty(cli: Cli, golden: Golden) -> None:
    image = golden("attached_clean", writable=True) / "cache.img"
    with image.open("r+b") as file:
        file.seek(9 << 16)
        file.write(bytes(30 << 20))
    refused = cli("wipe", image)
    assert refused.status == 3
    assert "is damaged, and may hold" in refused.err


def test_one_bad_device_stops_all(cli: Cli, golden: Golden, tmp_path: Path) -> None:
    image = golden("attached_clean", writable=True) / "back0.img"
    other = tmp_path / "zeros"
    other.write_bytes(bytes(1 << 20))
    before = digest(image)
    assert cli("wipe", image, other).status == 1
    assert digest(image) == before


def test_nowhere_to_put_the_backup(cli: Cli, golden: Golden) -> None:
    image = golden("attached_clean", writable=True) / "back0.img"
    before = digest(image)
    failed = cli("wipe", image, "--backup", "/proc/no/such/place")
    assert failed.status == 1
    assert "nothing was changed" in failed.err
    assert digest(image) == before


def test_existing_backup_is_not_overwritten(cli: Cli, golden: Golden, tmp_path: Path) -> None:
    image = golden("attached_clean", writable=True) / "back0.img"
    mine = tmp_path / "precious"
    mine.write_text("precious")
    assert cli("wipe", image, "--backup", mine).status == 1
    assert mine.read_text() == "precious"


class TestUndo:
    """An undo file is believed only as far as it fits the device."""

    @pytest.fixture
    def image(self, golden: Golden) -> Path:
        return golden("attached_clean", writable=True) / "back0.img"

    @pytest.fixture
    def undo_file(self, cli: Cli, image: Path, tmp_path: Path) -> Path:
        path = tmp_path / "a.undo"
        assert cli("wipe", image, "--backup", path).status == 0
        return path

    def test_changed_since(self, cli: Cli, image: Path, undo_file: Path) -> None:
        with image.open("r+b") as file:
            file.seek(5000)
            file.write(b"new")
        before = digest(image)
        refused = cli("undo", undo_file)
        assert refused.status == 3
        assert "changed after wipe" in refused.err
        assert digest(image) == before
        assert cli("undo", undo_file, "--force=changed").status == 0
        assert cli("show", image).status == 0

    def test_another_size(self, cli: Cli, image: Path, undo_file: Path) -> None:
        with image.open("r+b") as file:
            file.truncate(1 << 20)
        assert cli("undo", undo_file, "--force=changed").status == 3

    def test_gone_device(self, cli: Cli, image: Path, undo_file: Path) -> None:
        image.unlink()
        assert str(image) in cli("undo", undo_file).err

    def test_twice(self, cli: Cli, image: Path, undo_file: Path) -> None:
        assert cli("undo", undo_file).status == 0
        before = digest(image)
        assert cli("undo", undo_file).status == 0
        assert digest(image) == before

    @pytest.mark.parametrize("damage", [0, 1, 100, 300, -1, -4000])
    def test_cut_short(self, cli: Cli, image: Path, undo_file: Path, damage: int) -> None:
        undo_file.write_bytes(undo_file.read_bytes()[:damage])
        before = digest(image)
        failed = cli("undo", undo_file)
        assert failed.status == 1
        assert failed.err.count("\n") == 1
        assert digest(image) == before

    def test_one_wrong_byte(self, cli: Cli, image: Path, undo_file: Path) -> None:
        data = bytearray(undo_file.read_bytes())
        data[-100] ^= 1
        undo_file.write_bytes(data)
        assert "damaged" in cli("undo", undo_file).err

    def test_something_else(self, cli: Cli, image: Path) -> None:
        assert "not an undo file" in cli("undo", image).err
        assert cli("undo", image.parent / "nothing").status == 1
