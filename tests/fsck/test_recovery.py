# SPDX-License-Identifier: GPL-2.0-only
"""docs/recovery.md: its commands are run on the disasters that it tells of, and say what the document says they say.

A section names its disaster in a comment, ``<!-- disaster: dead sectors -->``; every console block of it is run in one
directory, one after the other.  A line of three dots stands for lines that are left out.
BCACHECTL_UPDATE_RECOVERY=1 writes the answers anew (whole ones; shorten them again by hand, and read the diff).
"""

from __future__ import annotations

import hashlib
import os
import re
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from bcachectl.ondisk.superblock import BdevState
from tests.faults import fail_reads
from tests.fsck.disasters import BACKING, DISASTERS
from tests.fsck.test_forget import run, volume_digest
from tests.fsck.test_resolve import DATA_BYTES, state_of

DOCUMENT = Path(__file__).resolve().parents[2] / "docs/recovery.md"
SECTION = re.compile(r"^<!-- disaster: ([a-z ]+) -->$(.*?)(?=^## |\Z)", re.MULTILINE | re.DOTALL)
BLOCK = re.compile(r"^```console\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LEFT_OUT = "..."


class Step(NamedTuple):
    """A command line and the lines that it answers, as the document has them."""

    command: str
    answer: list[str]


def steps(block: str) -> Iterator[Step]:
    """The commands of a console block."""
    command, answer = "", list[str]()
    for line in block.splitlines():
        if line.startswith("$ "):
            if command:
                yield Step(command, answer)
            command, answer = line[2:], []
        else:
            answer.append(line)
    yield Step(command, answer)


def fits(said: list[str], shown: list[str]) -> bool:
    """The answer is what the document shows, with dots for any lines."""
    if not shown:
        return not said
    if shown[0] != LEFT_OUT:
        return bool(said) and said[0] == shown[0] and fits(said[1:], shown[1:])
    return any(fits(said[count:], shown[1:]) for count in range(1, len(said) + 1))


class Terminal:
    """Runs command lines in a directory whose files stand for the devices below /dev."""

    def __init__(self, capsys: pytest.CaptureFixture[str], directory: Path) -> None:
        self.capsys, self.directory, self.status = capsys, directory, 0

    def run(self, command: str) -> list[str]:
        """What a command line answers."""
        if command == "echo $?":
            return [str(self.status)]
        first, *words = shlex.split(command)
        assert first == "bcachectl", command
        words = [re.sub(r"^/dev/", f"{self.directory}/", word) for word in words]
        self.status, out, err = run(self.capsys, *words)
        return (out + err).replace(f"{self.directory}/", "/dev/").splitlines()


@pytest.fixture
def terminal(golden: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
             capsys: pytest.CaptureFixture[str]) -> Callable[[str], Terminal]:
    """The machine on which a disaster has happened."""
    def after(name: str) -> Terminal:
        dev, home = tmp_path / "dev", tmp_path / "home"
        dev.mkdir()
        home.mkdir()
        bad = DISASTERS[name](golden, dev)

        fail_reads(monkeypatch, lambda path, offset_bytes, nbytes: not bad.get(Path(path).name, set()).isdisjoint(
            range(offset_bytes >> 9, (offset_bytes + nbytes + 511) >> 9)))
        monkeypatch.setattr("bcachectl.discovery.enumerate_devices", list)
        monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "run"))
        monkeypatch.setattr("bcachectl.control.SHARED_DIR", str(tmp_path / "run of all"))
        monkeypatch.chdir(home)
        return Terminal(capsys, dev)

    return after


def test_every_disaster_is_told() -> None:
    assert {name for name, _text in SECTION.findall(DOCUMENT.read_text())} == set(DISASTERS)


@pytest.mark.parametrize("name", DISASTERS)
def test_transcripts(terminal: Callable[[str], Terminal], golden: Callable[..., Path], name: str) -> None:
    machine = terminal(name)
    text = DOCUMENT.read_text()
    section = next(body for found, body in SECTION.findall(text) if found == name)
    wrong: list[str] = []

    def renew(found: re.Match[str]) -> str:
        lines = ["```console"]
        for step in steps(found[1]):
            said = machine.run(step.command)
            if not fits(said, step.answer):
                wrong.append("\n".join([f"$ {step.command}", *said]))
            lines += [f"$ {step.command}", *(step.answer if fits(said, step.answer) else said)]
        return "\n".join([*lines, "```"])

    renewed = BLOCK.sub(renew, section)
    if os.environ.get("BCACHECTL_UPDATE_RECOVERY") == "1":
        DOCUMENT.write_text(text.replace(section, renewed))
        return
    assert not wrong, "\n\n".join(["the document says something else", *wrong])
    judge(name, machine.directory, golden)


def judge(name: str, dev: Path, golden: Callable[..., Path]) -> None:
    """What the document promises at the end of a section is so."""
    state, is_member = state_of(dev / BACKING)
    volume = (dev / BACKING).read_bytes()[DATA_BYTES:]
    is_whole = hashlib.sha256(volume).hexdigest() == volume_digest(golden("dirty_crash"), 0)
    match name:
        case "dead sectors" | "dead cache":
            assert (state, is_member, is_whole) == (BdevState.NONE, False, False)
        case "unclean detach":
            assert (state, is_member, is_whole) == (BdevState.NONE, False, True)
        case _:
            assert (state, is_member) == (BdevState.DIRTY, True)


def test_fits() -> None:
    assert fits(["a", "b", "c"], ["a", "b", "c"])
    assert fits(["a", "b", "c"], ["a", LEFT_OUT])
    assert fits(["a", "b", "c"], [LEFT_OUT, "c"])
    assert not fits(["a", "b", "c"], ["a", LEFT_OUT, "b"])
    assert not fits(["a"], ["a", LEFT_OUT])
    assert not fits(["a", "b"], ["a"])
    assert not fits(["a"], ["b"])
