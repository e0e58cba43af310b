# SPDX-License-Identifier: GPL-2.0-only
"""The program's frame: verb table, loading on demand, options that take several words, pipes, completion, colour."""

from __future__ import annotations

import inspect
import os
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from bcachectl import __version__
from bcachectl import cli as program
from bcachectl.views import table
from tests.cli.conftest import Result
from tests.export.engine import Engine

Cli = Callable[..., Result]
READERS = ("list", "show", "dump", "where", "status", "monitor", "get", "engine list")
WRITERS = ("format", "wipe", "undo")


def run_python(code: str, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True,
                          env={**os.environ, **environment})


@pytest.mark.parametrize("verb", program.COMMANDS)
def test_every_verb_loads_and_has_help(cli: Cli, verb: str) -> None:
    function = program.load(program.COMMANDS[verb])
    assert inspect.getdoc(function), "the first lines of a verb's help"
    shown = cli(*verb.split(), "--help")
    assert (shown.status, shown.err) == (0, "")
    assert shown.out.startswith(f"Usage: bcachectl {verb}")


@pytest.mark.parametrize("verb", READERS)
def test_reading_verbs_take_json(cli: Cli, verb: str) -> None:
    assert "--json" in cli(*verb.split(), "--help").out


@pytest.mark.parametrize("verb", WRITERS)
def test_writing_verbs_take_dry_run(cli: Cli, verb: str) -> None:
    assert "--dry-run" in cli(*verb.split(), "--help").out


def test_overview_lists_every_verb(cli: Cli) -> None:
    overview = cli("--help").out
    for verb in program.COMMANDS:
        assert f"\n  {verb.split()[0]} " in overview
    assert [word for word in cli("-h").out.split() if word == "list"]
    groups = {verb.split()[0] for verb in program.COMMANDS if " " in verb}
    assert groups == set(program.GROUPS)


def test_version(cli: Cli) -> None:
    assert cli("--version") == Result(0, f"bcachectl {__version__}\n", "")


@pytest.mark.parametrize("words", [["--help"], ["engine", "--help"], ["--version"], []])
def test_overview_loads_nothing_heavy(words: list[str]) -> None:
    code = ("import sys; from bcachectl.cli import run; run(sys.argv[1:]); "
            "heavy = {'numpy', 'construct', 'rich', 'pyudev', 'fastcrc'} & set(sys.modules); sys.exit(len(heavy))")
    assert run_python(code, *words).returncode == 0


def test_overview_is_quick() -> None:
    """57 ms on the machine this was written on; the limit is for the slowest.  Processor time: others may be busy."""
    best = 9.0
    for _ in range(5):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, "-m", "bcachectl", "--help"], check=True, stdout=subprocess.DEVNULL)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        best = min(best, after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime)
    assert best < 0.3


@pytest.mark.parametrize(("words", "spread"), [
    ("format --cache a --backing b c", "format --cache a --backing b --backing c"),
    ("format -C a -B b c -b 4k", "format -C a -B b -B c -b 4k"),
    ("format --backing=b c d --label x", "format --backing=b --backing c --backing d --label x"),
    ("format --label x y", "format --label x y"),
    ("format --dry-run x", "format --dry-run x"),
    ("show a b", "show a b"),
    ("engine run --cache a --backing b c", "engine run --cache a --backing b --backing c"),
    ("engine stop --cache a b", "engine stop --cache a b"),
    ("", ""),
])
def test_options_that_take_several_words(words: str, spread: str) -> None:
    assert " ".join(program.spread(words.split())) == spread


def test_debug_is_taken_anywhere(cli: Cli) -> None:
    for words in (["--debug", "show", "/nowhere"], ["show", "--debug", "/nowhere"], ["show", "/nowhere", "--debug"]):
        shown = cli(*words)
        assert shown.status == 1
        assert "Traceback" in shown.err
        assert shown.err.endswith("bcachectl: /nowhere: no such file or device\n")


def test_words_behind_dashes_are_devices(cli: Cli) -> None:
    assert "--debug: no such file" in cli("show", "--", "--debug").err


@pytest.mark.parametrize(("word", "meant"), [("shw", "show"), ("formt", "format"), ("lst", "list")])
def test_a_typing_mistake(cli: Cli, word: str, meant: str) -> None:
    wrong = cli(word)
    assert wrong.status == 2
    assert f"Did you mean '{meant}'" in wrong.err


def test_a_closed_pipe_ends_quietly(golden: Callable[..., Path]) -> None:
    image = golden("deep_crash") / "cache.img"
    done = subprocess.run(f"{sys.executable} -m bcachectl dump btree {image} | head -1; exit ${{PIPESTATUS[0]}}",
                          shell=True, executable="/bin/bash", capture_output=True, text=True)
    assert done.stderr == ""
    assert done.stdout.startswith("INODE")
    assert done.returncode in (0, program.EXIT_FAILED)


def test_a_full_disk_is_one_sentence(golden: Callable[..., Path]) -> None:
    image = golden("deep_crash") / "cache.img"
    with open("/dev/full", "w") as full:
        done = subprocess.run([sys.executable, "-m", "bcachectl", "dump", "btree", image], stdout=full,
                              stderr=subprocess.PIPE, text=True)
    assert done.returncode == 1
    assert "No space left on device" in done.stderr
    assert "Traceback" not in done.stderr


class TestCompletion:
    """The shells ask the program itself; the scripts in completions/ only carry the question."""

    def ask(self, shell: str, line: str, **more: str) -> list[str]:
        words = line.split(" ")
        environment = {
            "bash": {"COMP_WORDS": line, "COMP_CWORD": str(len(words) - 1)},
            "zsh": {"_TYPER_COMPLETE_ARGS": line},
            "fish": {"_TYPER_COMPLETE_ARGS": line, "_TYPER_COMPLETE_FISH_ACTION": "get-args"},
        }[shell]
        done = subprocess.run([sys.executable, "-m", "bcachectl"], capture_output=True, text=True,
                              env={**os.environ, **environment, **more, "_BCACHECTL_COMPLETE": f"complete_{shell}"})
        assert "Traceback" not in done.stderr
        return done.stdout.splitlines()

    @pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
    def test_verbs(self, shell: str) -> None:
        answer = "\n".join(self.ask(shell, "bcachectl sh"))
        assert "show" in answer
        assert "list" not in answer

    @pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
    def test_verbs_of_two_words(self, shell: str) -> None:
        answer = "\n".join(self.ask(shell, "bcachectl engine "))
        assert all(word in answer for word in ("run", "list", "stop"))

    def test_options(self) -> None:
        assert "--replacement" in self.ask("bash", "bcachectl format --re")

    def test_values(self) -> None:
        assert self.ask("bash", "bcachectl dump ex") == ["extents"]
        assert self.ask("bash", "bcachectl format --cache-mode write") == ["writethrough", "writeback", "writearound"]

    def test_devices(self, loop_device: Callable[..., str], tmp_path: Path) -> None:
        image = tmp_path / "image"
        image.write_bytes(bytes(1 << 20))
        device = loop_device(image)
        assert device in self.ask("bash", "bcachectl show /dev/loop")

    def test_sets_and_volumes(self, loop_device: Callable[..., str], golden: Callable[..., Path],
                              tmp_path: Path) -> None:
        story = golden("two_backing", writable=True)
        device, uuid = loop_device(story / "cache.img"), "014a299e-a27a-45e0-b9c5-b79d60a449a0"
        assert self.ask("bash", "bcachectl gc 014a29") == [uuid]
        assert device in self.ask("bash", "bcachectl gc /dev/loop")
        with Engine(tmp_path, "--cache", device, "--backing", story / "back0.img", "--export", "nbd",
                    "--read-only") as engine:
            runtime = engine.runtime.name
            assert self.ask("bash", "bcachectl flush bc", XDG_RUNTIME_DIR=runtime) == ["bcache0"]
            assert self.ask("bash", "bcachectl status vol", XDG_RUNTIME_DIR=runtime) == ["vol0"]
            assert self.ask("bash", "bcachectl get 014a", XDG_RUNTIME_DIR=runtime) == [uuid]

    def test_tunables(self) -> None:
        assert self.ask("bash", "bcachectl get bcache0 writeback_p") == ["writeback_percent"]
        assert self.ask("bash", "bcachectl set bcache0 cache_mode=none writeback_p") == ["writeback_percent="]

    @pytest.mark.parametrize(("shell", "name"), [("bash", "bcachectl.bash"), ("zsh", "_bcachectl"),
                                                 ("fish", "bcachectl.fish")])
    def test_script_is_valid(self, shell: str, name: str) -> None:
        script = Path(program.__file__).parent.parent / "completions" / name
        assert f"complete_{shell}" in script.read_text()
        if shell == "bash":
            done = subprocess.run(
                ["/bin/bash", "-c", f"source {script}; COMP_WORDS=(bcachectl sh); COMP_CWORD=1; _bcachectl; "
                                    "echo ${COMPREPLY[@]}"],
                capture_output=True, text=True,
                env={**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"})
            assert done.stdout == "show\n", done


class Stream:
    """What `wants_color` asks of a stream."""

    def __init__(self, is_terminal: bool) -> None:
        self.is_terminal = is_terminal

    def isatty(self) -> bool:
        return self.is_terminal


@pytest.mark.parametrize(("is_terminal", "environment", "color"), [
    (True, {"TERM": "xterm"}, True), (True, {"TERM": "dumb"}, False), (True, {}, False),
    (True, {"TERM": "xterm", "NO_COLOR": "1"}, False), (False, {"TERM": "xterm"}, False),
    (False, {"FORCE_COLOR": "1"}, True), (False, {"FORCE_COLOR": "1", "NO_COLOR": "1"}, False)])
def test_color_survives_a_pipe_only_when_asked(is_terminal: bool, environment: dict[str, str], color: bool) -> None:
    assert table.wants_color(Stream(is_terminal), environment) is color  # type: ignore[arg-type]


def test_forced_color(cli: Cli, golden: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    image = golden("fresh") / "cache.img"
    assert "\x1b[" not in cli("show", image).out
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert "\x1b[1m" in cli("show", image).out
