# SPDX-License-Identifier: GPL-2.0-only
"""What a person may mean by SET and VOLUME, and where sockets are."""

from __future__ import annotations

import os
import socket
import tempfile
from pathlib import Path

import pytest

from bcachectl import control
from bcachectl.control import (
    ENGINE,
    KERNEL,
    engines,
    find,
    find_cached_alone,
    looks_like_uuid,
    match_volume,
    parse_set_uuid,
    socket_path,
)
from bcachectl.errors import Refused, UsageError, WrongState
from tests.unit.views.samples import sample_volume

UUID = "2d6c1f0e-7b5a-4c1e-8a55-90a1b2c3d4e5"


@pytest.mark.parametrize("text", [UUID, UUID.upper(), UUID.replace("-", ""), f"{UUID}\n", f" {UUID} "])
def test_t23_a_uuid_in_any_spelling(text: str) -> None:
    assert parse_set_uuid(text) == UUID
    assert looks_like_uuid(text)


@pytest.mark.parametrize(("text", "why"), [
    (f"{UUID}x", "text follows the uuid"),
    (f"{UUID}-0", "text follows the uuid"),
    (UUID[:-1] + "g", "'g' is no hexadecimal digit"),
    (UUID[:-1], "31 hexadecimal digits instead of 32"),
    ("", "0 hexadecimal digits instead of 32"),
])
def test_t23_a_wrong_uuid_is_told_why(text: str, why: str) -> None:
    with pytest.raises(UsageError, match=why):
        parse_set_uuid(text)


def test_a_prefix_or_a_path_is_no_uuid(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path(UUID).touch()
    assert not looks_like_uuid(UUID[:20])
    assert not looks_like_uuid("/dev/sda")
    assert not looks_like_uuid(UUID)


def test_a_volume_by_each_of_its_names(tmp_path: Path) -> None:
    backing, link = tmp_path / "back.img", tmp_path / "link"
    backing.touch()
    link.symlink_to(backing)
    volumes = (sample_volume(backing_path=str(backing)),
               sample_volume("bcache1", label="", uuid="11111111-0d34-4b7e-9d6c-3a5b1f0e7d21", backing_path=None))
    for text in ("bcache0", "home", volumes[0].uuid, volumes[0].uuid.upper(), str(backing), str(link)):
        assert match_volume(volumes, text) == ["bcache0"]
    for text in ("", "bcache", "bcache2", str(tmp_path)):
        assert match_volume(volumes, text) == []


@pytest.fixture
def runtime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    monkeypatch.setattr("bcachectl.control.SHARED_DIR", str(tmp_path / "shared"))
    monkeypatch.setattr("bcachectl.sysfs.tree.ROOT", str(tmp_path / "no sysfs"))
    return tmp_path


def test_the_socket_lies_in_a_directory_of_ones_own(runtime: Path) -> None:
    path = Path(socket_path(UUID))
    assert path == runtime / "bcachectl" / f"{UUID}.sock"
    assert path.parent.stat().st_mode & 0o777 == 0o700


@pytest.mark.skipif(os.geteuid() != 0, reason="gives a directory to another user")
def test_a_directory_of_someone_else_is_refused(runtime: Path) -> None:
    (runtime / "bcachectl").mkdir()
    os.chown(runtime / "bcachectl", 12345, 0)
    with pytest.raises(Refused, match="belongs to another user"):
        socket_path(UUID)


def test_leftovers_are_no_engines(runtime: Path) -> None:
    directory = Path(socket_path(UUID)).parent
    (directory / f"{UUID}.sock").touch()
    (directory / "note.txt").touch()
    assert engines() == []
    for name in (None, UUID, "bcache0"):
        with pytest.raises(WrongState, match="no engine runs here"):
            find(name)


def test_what_is_missing_is_named(runtime: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the kernel's driver nothing can be registered; and what one may not look at may be there."""
    with pytest.raises(WrongState, match=r"^'': no engine runs here, and the kernel has no bcache driver; "
                                         r"`bcachectl engine run` starts one, `modprobe bcache` loads it$"):
        find("")
    with pytest.raises(WrongState, match=r"^the kernel has no bcache driver; `modprobe bcache` loads it$"):
        find(None, KERNEL)
    with pytest.raises(WrongState, match=r"^the kernel has no bcache driver"):
        find_cached_alone("sdb")
    real = os.listdir

    def listdir(path: str) -> list[str]:
        if path == control.SHARED_DIR:
            raise PermissionError(13, "Permission denied")
        return real(path)

    monkeypatch.setattr(os, "listdir", listdir)
    with pytest.raises(WrongState, match=r"^bcache0: no engine of yours runs here \(those of root are in "):
        find("bcache0", ENGINE)


def test_an_engine_that_does_not_answer_is_not_called_absent(runtime: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is stopped, or hangs on a dead device, and still has the set."""
    monkeypatch.setattr(control, "GREETING_TIMEOUT_S", 0.05)
    with tempfile.TemporaryDirectory() as short:
        monkeypatch.setenv("XDG_RUNTIME_DIR", short)
        _ask_the_silent()


def _ask_the_silent() -> None:
    path = socket_path(UUID)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listening:
        listening.bind(path)
        listening.listen(8)
        with pytest.raises(WrongState, match=r"^bcache0: an engine listens at .* and does not answer"):
            find("bcache0", ENGINE)
    with pytest.raises(WrongState, match=r"^bcache0: no engine runs here"):
        find("bcache0", ENGINE)
