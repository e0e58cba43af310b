# SPDX-License-Identifier: GPL-2.0-only
"""Image files that make a cache set, formatted and run as a user does it, and what else the stories here share."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests import program
from tests.export.engine import ROOT, Engine
from tests.require import need, need_root, patience

MODES = ("writethrough", "writeback", "writearound", "none")


def need_loop_export() -> None:
    """Go on only where a volume can become a loop device."""
    need_root()
    need(os.path.exists("/dev/fuse"), "/dev/fuse")
    need(os.path.exists("/dev/loop-control"), "loop devices")


def make_set(directory: Path, *, cache_bytes: int, backing_bytes: int, backings: int = 1, mode: str = "writethrough",
             more: tuple[str, ...] = ()) -> list[str]:
    """Make sparse images and format them; the options of ``engine run`` that name them."""
    cache = directory / "cache.img"
    backs = [directory / f"back{index}.img" for index in range(backings)]
    for path in (cache, *backs):
        with path.open("wb") as file:
            file.truncate(cache_bytes if path == cache else backing_bytes)
    bucket = () if "--bucket-size" in more else ("--bucket-size", "32k")
    run("format", "--cache", cache, "--backing", *backs, *bucket, "--cache-mode", mode, *more)
    return options(cache, *backs)


def options(cache: Path, *backings: Path) -> list[str]:
    """The options of ``engine run`` that name these images."""
    words = ["--cache", str(cache)]
    for path in backings:
        words += ["--backing", str(path)]
    return words


def run(*words: str | Path, engine: Engine | None = None, status: int = 0) -> str:
    """Run ``bcachectl`` with these words and give its stdout; it has to end with ``status``, and without a traceback.

    With an engine, in the environment where that engine's control socket is found.  A failure's one sentence on stderr
    is what is given for a ``status`` other than 0.
    """
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    if engine is not None:
        environment["XDG_RUNTIME_DIR"] = engine.runtime.name
    done = program.run([*map(str, words)], environment=environment, timeout_s=patience(120))
    assert "Traceback" not in done.stderr, done.stderr
    assert done.returncode == status, f"bcachectl {words}: {done.returncode}\n{done.stdout}{done.stderr}"
    if status == 0:
        return done.stdout
    return sentence(done.stderr)


def sentence(errors: str) -> str:
    """The one sentence on stderr; more or less than one is a failure."""
    lines = errors.splitlines()
    assert len(lines) == 1, errors
    assert lines[0].startswith("bcachectl: "), errors
    return lines[0].removeprefix("bcachectl: ")


def status_of(engine: Engine, cache: Path | str) -> Any:
    """``status --json`` of the engine's set, named by its cache device: other engines may run here."""
    return json.loads(run("status", "--json", cache, engine=engine))


@contextlib.contextmanager
def mounted(device: str, point: Path, *mount_options: str) -> Iterator[Path]:
    """A file system on a device, unmounted at the end of the block whatever happens in it."""
    point.mkdir(exist_ok=True)
    subprocess.run(["mount", *mount_options, device, str(point)], check=True)
    try:
        yield point
    finally:
        subprocess.run(["umount", str(point)], check=True)


def digest(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
