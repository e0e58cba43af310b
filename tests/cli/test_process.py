# SPDX-License-Identifier: GPL-2.0-only
"""The program as a process: signals at any moment, descriptors that are closed, full or a pipe that nobody reads."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from bcachectl import cli as program
from tests.cli.conftest import Result

Cli = Callable[..., Result]

SIGNALLED = """
import os, signal, sys, time
from bcachectl import __main__, cli
def wait(words):
    os.kill(os.getpid(), getattr(signal, words[-1]))
    time.sleep(60)
cli.run = wait
__main__.main()
"""

EARLY = """
import sys
from bcachectl import __main__
class Finder:
    def find_spec(self, name, path, target=None):
        if name == "bcachectl.cli":
            raise KeyboardInterrupt
sys.meta_path.insert(0, Finder())
__main__.main()
"""


def run(*words: object, code: str = "", shell: str = "") -> subprocess.CompletedProcess[str]:
    """Run the program, or ``code`` with its words, by a shell if what that does to the descriptors is given."""
    line = [sys.executable, *(["-c", code] if code else ["-m", "bcachectl"]), *map(str, words)]
    if shell:
        line = ["sh", "-c", f'"$@" {shell}', "sh", *line]
    return subprocess.run(line, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize(("name", "verb", "status"), [
    ("SIGINT", "show", 130), ("SIGTERM", "show", 130), ("SIGHUP", "show", 130), ("SIGTERM", "fsck", 32)])
def test_a_signal_ends_in_one_sentence(name: str, verb: str, status: int) -> None:
    # The tests themselves may run under nohup.
    done = run(verb, name, code="import signal; signal.signal(signal.SIGHUP, signal.SIG_DFL)\n" + SIGNALLED)
    assert (done.returncode, done.stdout, done.stderr) == (status, "", "bcachectl: interrupted\n")


def test_nohup_is_respected() -> None:
    ignoring = "import signal; signal.signal(signal.SIGHUP, signal.SIG_IGN)\n" + SIGNALLED.replace("60", "0")
    assert (run("show", "SIGHUP", code=ignoring).returncode, run("show", "SIGHUP", code=ignoring).stderr) == (0, "")


@pytest.mark.parametrize(("verb", "status"), [("show", 130), ("fsck", 32)])
def test_a_signal_while_it_is_loaded(verb: str, status: int) -> None:
    done = run(verb, code=EARLY)
    assert (done.returncode, done.stderr) == (status, "bcachectl: interrupted\n")


def test_a_signal_in_a_verb(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(program, "load", lambda command: interrupted)
    assert cli("show") == Result(130, "", "bcachectl: interrupted\n")
    assert cli("fsck") == Result(32, "", "bcachectl: interrupted\n")


def test_watching_ends_well(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("bcachectl.discovery.watch", interrupted)
    monkeypatch.setattr("bcachectl.discovery.enumerate_devices", list)
    assert cli("list", "--watch") == Result(0, "no bcache device here\n", "")


def test_closed_descriptors(golden: Callable[..., Path]) -> None:
    """Nothing is printed, and nothing that is opened later takes the place of stdout."""
    cache = golden("fresh", writable=True) / "cache.img"
    before = cache.read_bytes()
    for words, status in ((["show", cache], 0), (["list", cache], 0), (["show", "/nonexistent"], 1)):
        assert (run(*words, shell=">&-").returncode, run(*words, shell=">&- 2>&-").returncode) == (status, status)
    assert run("show", cache, shell="<&- >&- 2>&-").stdout == ""
    assert cache.read_bytes() == before
    code = "import os, sys; from bcachectl.__main__ import main, open_standard_streams; open_standard_streams(); "
    done = run(code=code + "print('x', os.open('/dev/null', 0) > 2, file=open('/proc/self/fd/2', 'w'))", shell=">&-")
    assert done.stderr == "x True\n"


@pytest.mark.parametrize(("words", "status"), [(["show"], 1), (["fsck"], 8), (["fsck", "--json"], 8)])
def test_output_that_cannot_be_written(golden: Callable[..., Path], words: list[str], status: int) -> None:
    """For fsck, 1 would say that something was repaired."""
    cache = golden("dirty_crash") / "cache.img"
    full = run(*words, cache, shell=">/dev/full")
    assert full.returncode == status
    assert full.stderr == "bcachectl: the output cannot be written: No space left on device\n"
    reader, writer = os.pipe()
    os.close(reader)
    line = [sys.executable, "-m", "bcachectl", *words, str(cache)]
    broken = subprocess.run(line, stdout=writer, stderr=subprocess.PIPE, text=True, timeout=120)
    os.close(writer)
    assert (broken.returncode, broken.stderr) == (status, "")


def test_choices_are_named_in_plain_words(cli: Cli) -> None:
    assert "'STRUCTURE': 'foo' is not one of 'superblock'" in cli("dump", "foo", "x").err


@pytest.mark.parametrize("label", ["two\nlines", "\x1b[31mred", "tab\t", "\udcff"])
def test_labels_are_a_line_of_text(cli: Cli, tmp_path: Path, label: str) -> None:
    backing = tmp_path / "b.img"
    backing.write_bytes(bytes(1 << 20))
    refused = cli("format", "--backing", backing, "--label", label)
    assert (refused.status, refused.err.count("\n")) == (2, 1)
    assert "has a character that cannot be shown" in refused.err
    assert "\x1b" not in refused.err
    assert cli("format", "--backing", backing, "--label", "Bücher 本").status == 0
    assert "Bücher 本" in cli("list", backing).out


def test_a_label_on_a_device_does_not_steer_the_terminal(cli: Cli, golden: Callable[..., Path]) -> None:
    """Labels that others wrote: shown with escapes, in tables and sentences."""
    backing = golden("fresh", writable=True) / "back0.img"
    raw = bytearray(backing.read_bytes()[4096:8192])
    raw[72:104] = b"a\x1b[2Jb\nc\xff".ljust(32, b"\0")
    with backing.open("r+b") as file:
        file.seek(4096)
        file.write(raw)
    for words in (["list"], ["show"], ["dump", "superblock"]):
        out = cli(*words, backing).out
        assert r"a\x1b[2Jb\nc\xff" in out
        assert "\x1b" not in out


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_a_locale_without_the_characters(golden: Callable[..., Path], encoding: str) -> None:
    """The live view has blocks and dots; where a locale has none there are question marks, and no error."""
    cache = golden("dirty_crash") / "cache.img"
    line = [sys.executable, "-m", "bcachectl", "monitor", "--once", str(cache)]
    done = subprocess.run(line, capture_output=True, timeout=120, env={**os.environ, "PYTHONIOENCODING": encoding})
    assert (done.returncode, done.stderr) == (0, b"")
    assert b"Gens      ?" in done.stdout or b"Gens      \xb7" in done.stdout


def test_a_name_that_is_no_text(golden: Callable[..., Path], tmp_path: Path) -> None:
    """It is printed as it is, as every other program does."""
    name = os.fsencode(tmp_path) + b"/bad\xff.img"
    shutil.copy(golden("fresh") / "cache.img", name)
    for words, status in (["list", name], 0), (["show", name], 0), (["fsck", name], 0), (["show", name + b"x"], 1):
        line = [sys.executable, "-m", "bcachectl", *words]
        done = subprocess.run(line, capture_output=True, timeout=120,
                              env={**os.environ, "PYTHONIOENCODING": "utf-8:strict"})
        assert done.returncode == status, done.stderr
        if words[0] != "fsck":
            assert b"bad\xff.img" in done.stdout + done.stderr
