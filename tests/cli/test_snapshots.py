# SPDX-License-Identifier: GPL-2.0-only
"""Verbatim help and output of the commands, in tests/cli/snapshots.

BCACHECTL_UPDATE_SNAPSHOTS=1 pytest tests/cli/test_snapshots.py writes them anew; read the diff before committing it.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from bcachectl import cli as program
from tests.cli.conftest import Result

SNAPSHOTS = Path(__file__).parent / "snapshots"

# Name -> story whose images are in the current directory, and the words.
OUTPUTS: dict[str, tuple[str, str]] = {
    "show-cache": ("flash_volume", "show cache.img"),
    "show-backing": ("flash_volume", "show back0.img"),
    "show-json": ("fresh", "show --json cache.img"),
    "show-super-show": ("deep_crash", "show --format=bcache-super-show cache.img"),
    "dump-superblock": ("fresh", "dump superblock back0.img"),
    "dump-uuids": ("flash_volume", "dump uuids cache.img"),
    "dump-uuids-json": ("two_backing", "dump uuids --json cache.img"),
    "dump-prio": ("attached_clean", "dump prio cache.img"),
    "dump-journal": ("fifo_discard", "dump journal cache.img"),
    "dump-btree": ("flash_volume", "dump btree cache.img"),
    "dump-btree-kernel": ("thrash_crash", "dump btree --format=kernel cache.img"),
    "dump-extents": ("flash_volume", "dump extents cache.img"),
    "dump-wrong-device": ("fresh", "dump btree back0.img"),
    "dump-never-ran": ("fresh", "dump btree cache.img"),
    "where": ("thrash_crash", "where back0.img 1000 600 --cache cache.img"),
    "where-volume": ("flash_volume", "where bcache1 0 200 --cache cache.img"),
    "where-json": ("flash_volume", "where bcache0 480 64 --cache cache.img --json"),
    "list": ("two_backing", "list cache.img back0.img back1.img nothing.img"),
    "list-json": ("fresh", "list --json back0.img"),
    "format-dry-run": ("fresh",
                       "format --cache cache.img --backing back0.img --bucket-size 64k --force=bcache --dry-run"),
    "format-refused": ("dirty_crash", "format --backing back0.img"),
    "wipe-dry-run": ("fresh", "wipe cache.img back0.img --dry-run --json --backup a.undo"),
    "wipe-refused": ("dirty_crash", "wipe cache.img"),
    "nothing": ("fresh", ""),
    "version": ("fresh", "--version"),
}


def check(name: str, text: str) -> None:
    path = SNAPSHOTS / f"{name}.txt"
    if os.environ.get("BCACHECTL_UPDATE_SNAPSHOTS") == "1":
        path.write_text(text)
    assert path.exists(), f"no snapshot {path.name}; BCACHECTL_UPDATE_SNAPSHOTS=1 makes it"
    assert text == path.read_text()


def written(words: list[str], result: Result) -> str:
    return (f"$ bcachectl {' '.join(words)}".rstrip() + f"\n{result.out}"
            + "".join(f"2> {line}\n" for line in result.err.splitlines()) + f"[exit status {result.status}]\n")


@pytest.mark.parametrize("verb", ["", *program.GROUPS, *program.COMMANDS])
def test_help(cli: Callable[..., Result], verb: str) -> None:
    words = [*verb.split(), "--help"]
    check(f"help-{verb.replace(' ', '-')}".rstrip("-"), written(words, cli(*words)))


@pytest.mark.parametrize("name", OUTPUTS)
def test_output(cli: Callable[..., Result], golden: Callable[..., Path], monkeypatch: pytest.MonkeyPatch,
                name: str) -> None:
    story, line = OUTPUTS[name]
    monkeypatch.chdir(golden(story))
    monkeypatch.setattr("bcachectl.discovery.enumerate_devices", list)
    check(name, written(line.split(), cli(*line.split())))


def test_no_snapshot_is_left_over() -> None:
    expected = {f"{name}.txt" for name in OUTPUTS} | {
        f"help-{verb.replace(' ', '-')}".rstrip("-") + ".txt" for verb in ("", *program.GROUPS, *program.COMMANDS)}
    assert {path.name for path in SNAPSHOTS.iterdir()} == expected
