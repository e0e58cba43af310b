# SPDX-License-Identifier: GPL-2.0-only
"""``cli("show", "cache.img")`` runs the program in this process and gives its exit status, stdout and stderr."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from bcachectl import cli as program


class Result(NamedTuple):
    """What a run left."""

    status: int
    out: str
    err: str


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
        tmp_path: Path) -> Callable[..., Result]:
    """Run the program as a user without a terminal would; its state and sockets go below the test's directory."""
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "run"))
    monkeypatch.setattr("bcachectl.control.SHARED_DIR", str(tmp_path / "run of all"))
    monkeypatch.setattr("bcachectl.sysfs.tree.ROOT", str(tmp_path / "no sysfs"))
    for name in ("NO_COLOR", "FORCE_COLOR", "COMP_WORDS", "_TYPER_COMPLETE_ARGS", "_BCACHECTL_COMPLETE"):
        monkeypatch.delenv(name, raising=False)

    def run(*words: object) -> Result:
        capsys.readouterr()
        status = program.run([str(word) for word in words])
        said = capsys.readouterr()
        assert "Traceback" not in said.err or "--debug" in words
        return Result(status, said.out, said.err)

    return run
