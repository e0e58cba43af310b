# SPDX-License-Identifier: GPL-2.0-only
"""The engine's side of a test with the kernel: the program run here, on the files that the machine gets as disks."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from tests.conftest import TESTS
from tests.export.engine import Engine


def bcachectl(*arguments: str | Path, directory: Path, runtime: Path | None = None) -> str:
    """Run the program, which has to succeed; its output.  Undo files go below ``directory``, engines are in
    ``runtime``."""
    done = subprocess.run([sys.executable, "-m", "bcachectl", *map(str, arguments)], capture_output=True, text=True,
                          cwd=TESTS.parent, stdin=subprocess.DEVNULL, timeout=300,
                          env={**os.environ, "XDG_STATE_HOME": str(directory / "state"),
                               "XDG_RUNTIME_DIR": str(runtime or directory / "run")})
    assert done.returncode == 0, f"bcachectl {arguments}: {done.returncode}\n{done.stdout}{done.stderr}"
    return done.stdout


def engine_on(directory: Path, cache: Path, backings: Sequence[Path], *options: str) -> Engine:
    """A running engine that exports over NBD; ``directory`` takes its messages."""
    words: list[str | Path] = ["--cache", cache, "--export", "nbd", *options]
    for backing in backings:
        words += ["--backing", backing]
    return Engine(directory, *words)
