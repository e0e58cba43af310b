# SPDX-License-Identifier: GPL-2.0-only
"""The manual pages: fresh, complete, and accepted by groff; their examples parse."""

from __future__ import annotations

import importlib.util
import shlex
import subprocess
from pathlib import Path
from types import ModuleType

import pytest
import typer

from bcachectl import cli as program
from tests.require import need_tool

MAN = Path(program.__file__).parent.parent / "man"


def load_generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("generate", MAN / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


GENERATOR = load_generator()


def test_pages_are_fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    """If this fails: `make docs`."""
    monkeypatch.setenv("COLUMNS", "100")
    made = GENERATOR.pages()
    assert {path.name for path in MAN.glob("*.8")} == set(made)
    for name, text in made.items():
        assert (MAN / name).read_text() == text, name


@pytest.mark.parametrize("verb", program.COMMANDS)
def test_page_has_what_is_promised(verb: str) -> None:
    text = (MAN / f"bcachectl-{verb.replace(' ', '-')}.8").read_text()
    for section in ("NAME", "SYNOPSIS", "DESCRIPTION", "OPTIONS", "EXIT STATUS", "EXAMPLES", "SEE ALSO"):
        assert f"\n.SH {section}\n" in text


@pytest.mark.parametrize(("verb", "line"), [(verb, line) for verb, examples in GENERATOR.EXAMPLES.items()
                                            if verb in program.COMMANDS for line, _meaning in examples])
def test_examples_are_valid(verb: str, line: str) -> None:
    """Every example is a command line that the program takes."""
    first, *words = shlex.split(line)
    assert first == program.PROGRAM
    assert words[:len(verb.split())] == verb.split()
    command = typer.main.get_command(program.build_app(words))
    context = command.make_context(program.PROGRAM, program.spread(words))
    for word in verb.split():
        command = command.commands[word]  # type: ignore[attr-defined]
    arguments = program.spread(words)[len(verb.split()):]
    assert command.make_context(verb, arguments, parent=context).params is not None


def test_groff_has_no_complaint() -> None:
    groff = need_tool("groff")
    for page in MAN.glob("*.8"):
        done = subprocess.run([groff, "-man", "-Tutf8", "-ww", page], capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, ""), page


def test_pages_to_read_next_exist() -> None:
    """A page names others that there are, none of them itself, and by their section."""
    there = {path.name for path in MAN.glob("*.[578]")}
    for verb, names in GENERATOR.NEXT.items():
        assert verb in program.COMMANDS
        for name in names:
            page = f"{name.removesuffix(')').replace('(', '.')}" if "(" in name else f"{name}.8"
            assert page in there | {"ddrescue.1"}, name
            assert page != f"bcachectl-{verb.replace(' ', '-')}.8"
