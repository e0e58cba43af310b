# SPDX-License-Identifier: GPL-2.0-only
"""What the documents say exists: names in docs/design.md, tests in docs/promises.md, commands in README.md, links.

Each rule is a function that takes text and gives complaints, so that it can be shown to fail on a wrong one (the lower
half of this file) before it is believed on the real documents.
"""

from __future__ import annotations

import ast
import re
import subprocess
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

from bcachectl.cli import COMMANDS
from bcachectl.engine.tunables import TUNABLES
from bcachectl.engine.writeback import Rate
from tests.require import need_tool

pytestmark = pytest.mark.tidy

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
LIBRARIES = tuple(re.findall(r"^([a-z]+)==", (ROOT / "requirements.txt").read_text(encoding="utf-8"), re.MULTILINE))
PROMISES = ("P1", "P2", "P3", "P4", "P5", "P6")

CODE = re.compile(r"(?<!`)`([^`\n]+)`(?!`)")
FENCE = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
NAME = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*(\(\))?")


class Names:
    """Everything that the package defines: by module, by class, and all simple names."""

    def __init__(self, root: Path) -> None:
        self.modules: dict[str, set[str]] = {}
        self.classes: dict[str, set[str]] = {}
        self.simple: set[str] = set()
        for path in sorted(root.rglob("*.py")):
            tree = ast.parse(path.read_text(encoding="utf-8"))
            stem = path.parent.name if path.name == "__init__.py" else path.stem
            self.modules.setdefault(stem, set()).update(defined(tree.body))
            for node in ast.walk(tree):
                if isinstance(node, ast.ClassDef):
                    self.classes.setdefault(node.name, set()).update(members(node))
            self.simple.update(node.arg for node in ast.walk(tree) if isinstance(node, ast.arg))
        for some in (*self.modules.values(), *self.classes.values()):
            self.simple |= some
        self.simple |= set(self.modules) | set(self.classes)

    def has(self, word: str) -> bool:
        """Whether a dotted name exists: a module's, a class's, or (one part) anybody's."""
        first, *rest = word.removesuffix("()").removeprefix("bcachectl.").split(".")
        if first in LIBRARIES:
            return True
        if not rest:
            return first in self.simple
        owner = self.classes.get(first) or self.modules.get(first)
        if owner is None:
            return False
        return rest[0] in owner and (len(rest) == 1 or self.has(".".join(rest)))


def defined(body: Iterable[ast.stmt]) -> Iterator[str]:
    """Names that statements define."""
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            for target in targets:
                yield from (name.id for name in ast.walk(target) if isinstance(name, ast.Name))


def members(node: ast.ClassDef) -> Iterator[str]:
    """Names of a class: methods, fields, slots, and what its methods put on ``self``."""
    yield from defined(node.body)
    for inner in ast.walk(node):
        if isinstance(inner, ast.Attribute) and isinstance(inner.ctx, ast.Store):
            if isinstance(inner.value, ast.Name) and inner.value.id == "self":
                yield inner.attr


def name_complaints(text: str, names: Names, *, only_names: bool = True) -> Iterator[str]:
    """Python names, files and verbs in `backticks` that do not exist; with ``only_names`` whatever else is there."""
    for quoted in CODE.findall(FENCE.sub("", text)):
        if quoted.startswith(("make ", "bcachectl ")):
            yield from command_complaints(f"`{quoted}`", targets())
        elif "/" in quoted or quoted.endswith((".py", ".md")):
            if not any((base / quoted).exists() for base in (ROOT, ROOT / "bcachectl", ROOT / "bcachectl/engine")):
                yield f"there is no file {quoted}"
        elif NAME.fullmatch(quoted):
            # A decision also speaks of the kernel's words; those have no dots and no capitals.
            if not names.has(quoted) and (only_names or "." in quoted or not quoted.islower()):
                yield f"`{quoted}` does not exist"
        elif only_names:
            yield f"`{quoted}` is neither a name nor a file nor a command"


def reference_complaints(text: str) -> Iterator[str]:
    """Tests named as `file::test` that do not exist."""
    for file, test in re.findall(r"`(tests/[\w/]+\.py)::([\w:]+)`", text):
        path = ROOT / file
        if not path.exists():
            yield f"there is no file {file}"
            continue
        body: list[ast.stmt] = ast.parse(path.read_text(encoding="utf-8")).body
        for part in test.split("::"):
            found = [node for node in body
                     if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name == part]
            if not found:
                if part == "runTest" or part in set(defined(body)):
                    break
                yield f"{file} has no {test}"
                break
            body = found[0].body


def command_complaints(text: str, known_targets: set[str]) -> Iterator[str]:
    """Commands that a document shows (in code or after a prompt) and that the program or the Makefile do not have."""
    shown = [line.removeprefix("$ ").removeprefix("# ") for block in FENCE.findall(text) for line in block.splitlines()
             if line.startswith(("$ ", "# "))]
    for command in [*shown, *CODE.findall(FENCE.sub("", text))]:
        words = command.removeprefix("sudo ").split()
        if not words:
            continue
        if words[0] == "make":
            for target in words[1:]:
                if "=" not in target and target not in known_targets:
                    yield f"there is no `make {target}`"
        elif words[0] == "bcachectl" and len(words) > 1 and not words[1].startswith("-"):
            if words[1] not in COMMANDS and " ".join(words[1:3]) not in COMMANDS:
                if not any(verb.split()[0] == words[1] for verb in COMMANDS) or len(words) > 2:
                    yield f"there is no verb `{command}`"


def link_complaints(path: Path, text: str) -> Iterator[str]:
    """Links to files that do not exist."""
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", text):
        if "://" not in target and not (path.parent / target).exists():
            yield f"{path.relative_to(ROOT)}: its link to {target} leads nowhere"


def targets() -> set[str]:
    """The Makefile's targets."""
    return set(re.findall(r"^([a-z][a-z-]*):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def judge(complaints: Iterable[str]) -> None:
    found = list(complaints)
    assert not found, "\n" + "\n".join(found)


# --- the documents -----------------------------------------------------------------------------------------------

NAMES = Names(ROOT / "bcachectl")


def test_names_in_the_design_exist() -> None:
    judge(name_complaints(read("docs/design.md"), NAMES))


def test_names_in_the_decisions_exist() -> None:
    judge(f"{path.name}: {text}" for path in sorted((ROOT / "docs/decisions").glob("*.md"))
          for text in name_complaints(path.read_text(encoding="utf-8"), NAMES, only_names=False))


def test_every_promise_has_tests_that_exist() -> None:
    text = read("docs/promises.md")
    judge(reference_complaints(text))
    for promise in PROMISES:
        section = re.search(rf"^## {promise}:.*?(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)
        assert section is not None, f"{promise} is missing"
        assert re.search(r"`tests/[\w/]+\.py::\w+", section[0]), f"no test guards {promise}"


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_commands_and_links_exist(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    judge(command_complaints(text, targets()))
    judge(link_complaints(path, text))


def test_readme_names_both_commands() -> None:
    text = read("README.md")
    assert "make demo" in text
    assert "make test" in text


def test_decisions_are_numbered_and_say_what_they_must() -> None:
    paths = sorted((ROOT / "docs/decisions").glob("*.md"))
    assert [int(path.name[:4]) for path in paths] == list(range(1, len(paths) + 1))
    for path in paths:
        text = path.read_text(encoding="utf-8")
        assert text.startswith(f"# {path.name[:4]}: "), path.name
        assert re.findall(r"^## (\w+)", text, re.MULTILINE)[:3] == ["Context", "Choice", "Price"], path.name


# --- each rule can fail ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["`Journal.explode`", "`no_such_name`", "`request.no_such_function()`",
                                  "`Nobody.wait`", "`engine/nothing.py`", "`make nonsense`", "`bcachectl frobnicate`",
                                  "`a + b`"])
def test_name_rule_fails(text: str) -> None:
    assert list(name_complaints(text, NAMES))


@pytest.mark.parametrize("text", ["`Journal.add`", "`request.mode_for`", "`CachedDev.become_dirty()`", "`MODES`",
                                  "`alloc.py`", "`make test`", "`bcachectl engine run`", "```\n`x y`\n```"])
def test_name_rule_passes(text: str) -> None:
    assert not list(name_complaints(text, NAMES))


@pytest.mark.parametrize("text", ["`tests/test_docs.py::test_nothing`", "`tests/nowhere.py::test_x`",
                                  "`tests/test_docs.py::Names::nothing`"])
def test_reference_rule_fails(text: str) -> None:
    assert list(reference_complaints(text))


@pytest.mark.parametrize("text", ["`make nonsense`", "```\n$ bcachectl frobnicate x\n```", "```\n# make nonsense\n```",
                                  "`bcachectl volume nothing`"])
def test_command_rule_fails(text: str) -> None:
    assert list(command_complaints(text, targets()))


def test_link_rule_fails() -> None:
    assert list(link_complaints(ROOT / "README.md", "[here](docs/nothing.md#a)"))


# --- pages of the manual that are written by hand ----------------------------------------------------------------

HAND_WRITTEN = ("bcachectl.7", "bcachectl-recovery.7", "bcachectl-tunables.5")


def tunables_of(section: str) -> set[str]:
    """The names in one section of the page about tunables."""
    body = read("man/bcachectl-tunables.5").split(f".SH {section}\n")[1].split("\n.SH ")[0]
    return set(re.findall(r"^\.TP\n\.B (\w+)$", body, re.MULTILINE))


def test_the_page_about_tunables_has_them_all() -> None:
    assert tunables_of("OF A SET") == set(TUNABLES["set"])
    assert tunables_of("OF A VOLUME") == set(TUNABLES["volume"])


def test_defaults_in_the_page_are_those_of_an_engine() -> None:
    body = read("man/bcachectl-tunables.5")
    stated = dict(re.findall(r"^\.TP\n\.B (writeback_\w+|sequential_cutoff)\n(?:(?!\.TP).*\n)*?Default (\d+)", body,
                             re.MULTILINE))
    rate, sources = Rate(), read("bcachectl/engine/writeback.py") + read("bcachectl/engine/cached_dev.py")
    assert len(stated) > 8
    for name, text in stated.items():
        attribute = name if hasattr(rate, name) else ""
        if attribute:
            assert int(getattr(rate, attribute)) == int(text), name
        elif name == "sequential_cutoff":
            assert int(text) == 4 << 20
            assert "self.sequential_cutoff = 4 << 20" in sources
        else:
            value = re.search(rf"self\.{name} = (\w+)", sources)
            assert value is not None, name
            assert int(value[1] == "True" or value[1]) == int(text), name


@pytest.mark.parametrize("name", HAND_WRITTEN)
def test_hand_written_pages(name: str) -> None:
    text = read(f"man/{name}")
    for line in re.findall(r"^\\fB(bcachectl .*)\\fR$", text, re.MULTILINE):
        judge(command_complaints(f"`{line}`".replace("\\-", "-"), targets()))
    for page, section in re.findall(r"^\.BR (\S+) \((\d)\)", text, re.MULTILINE):
        assert (ROOT / "man" / f"{page}.{section}".replace("\\-", "-")).exists(), page
    groff = need_tool("groff")
    done = subprocess.run([groff, "-man", "-Tutf8", "-ww", ROOT / "man" / name], capture_output=True, text=True,
                          check=False)
    assert (done.returncode, done.stderr) == (0, ""), name
