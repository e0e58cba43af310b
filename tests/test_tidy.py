# SPDX-License-Identifier: GPL-2.0-only
"""The rules of the source tree, judged from the AST: layers, banned imports, sizes, essays, names in them, dead code.

Every rule is a function that takes sources and gives complaints, one line each, so that each can be shown to fail on a
bad snippet (the lower half of this file) before it is believed on the real tree (the tests named ``test_tree_``).
"""

from __future__ import annotations

import ast
import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "bcachectl"
FILE_LINES_LIMIT = 800
FUNCTION_LINES_LIMIT = 100
ESSAY_CHARACTERS_MIN = 80
COMMAND_ESSAY_CHARACTERS_MIN = 30
BANNED_FILE_NAMES = {"utils.py", "common.py", "helpers.py", "misc.py"}

BASE = ("errors", "units", "snapshot", "plain")
CORE_BANNED = ("os", "time", "random", "threading", "asyncio", "socket", "logging", "datetime", "secrets", "pathlib",
               "io")
"""What would let the core see the outside world; time and randomness are handed in."""


@dataclass(frozen=True)
class Layer:
    """What the modules under a name may import of the package, of others' packages, and what of the stdlib not."""

    internal: tuple[str, ...]
    third_party: tuple[str, ...] = ()
    banned_stdlib: tuple[str, ...] = ()


# The most specific name wins: engine.io before engine.  Names are relative to the package; "" is its __init__.
LAYERS: dict[str, Layer] = {
    "": Layer(internal=()),
    "errors": Layer(internal=BASE),
    "plain": Layer(internal=()),
    "units": Layer(internal=BASE),
    "snapshot": Layer(internal=BASE),
    "sysfs": Layer(internal=(*BASE, "sysfs"), banned_stdlib=("socket", "threading", "asyncio")),
    "metaimage": Layer(internal=BASE),
    "blockdev": Layer(internal=(*BASE, "metaimage")),
    "control": Layer(internal=(*BASE, "sysfs")),
    "census": Layer(internal=BASE, third_party=("numpy",)),
    "signatures": Layer(internal=(*BASE, "blockdev")),
    "writeplan": Layer(internal=(*BASE, "blockdev")),
    "discovery": Layer(internal=(*BASE, "ondisk", "sysfs", "blockdev"), third_party=("pyudev",)),
    # What the offline commands share; the engine never sees it.
    "claim": Layer(internal=(*BASE, "ondisk", "blockdev", "discovery", "tailfile")),
    "describe": Layer(internal=(*BASE, "ondisk", "fsck"), third_party=("numpy",)),
    "formatter": Layer(internal=(*BASE, "ondisk", "blockdev", "signatures", "writeplan")),
    "offline": Layer(internal=(*BASE, "ondisk", "fsck", "blockdev", "describe")),
    "tailfile": Layer(internal=(*BASE, "engine")),
    "ondisk": Layer(internal=(*BASE, "ondisk"), third_party=("construct", "numpy", "fastcrc"),
                    banned_stdlib=("os", "time", "random", "socket", "threading", "asyncio", "logging")),
    "views": Layer(internal=(*BASE, "views"), third_party=("rich",),
                   banned_stdlib=("os", "time", "random", "socket", "threading", "asyncio")),
    "fsck": Layer(internal=(*BASE, "census", "ondisk", "fsck"), third_party=("numpy", "cython"),
                  banned_stdlib=("socket", "threading", "asyncio")),
    "engine": Layer(internal=(*BASE, "census", "ondisk", "engine"), third_party=("numpy", "cython"),
                    banned_stdlib=CORE_BANNED),
    "engine.io": Layer(internal=(*BASE, "ondisk", "engine", "engine.io", "blockdev"),
                       third_party=("numpy", "cython")),
    "engine.export": Layer(internal=(*BASE, "ondisk", "engine", "engine.io", "engine.export", "blockdev",
                                     "control", "tailfile"), third_party=("numpy", "cython")),
    "commands": Layer(internal=("",), third_party=("typer", "rich", "numpy", "pyudev", "construct")),
    "cli": Layer(internal=("", *BASE, "commands"), third_party=("typer", "click", "rich")),
    "__main__": Layer(internal=("cli", "errors")),
}

# Words in `backticks` that are no names of the package, but of the world it lives in.
KNOWN_WORDS = {"construct", "struct", "numpy", "pyudev", "fastcrc", "rich", "typer", "dmesg", "None", "True", "False",
               "int", "bytes", "bytearray", "memoryview", "make-bcache", "bcache-super-show"}


def module_name(path: Path) -> str:
    """``engine.io.uring`` for bcachectl/engine/io/uring.py; an __init__ is its package."""
    parts = path.with_suffix("").parts
    parts = parts[parts.index(PACKAGE) + 1:]
    return ".".join(parts[:-1] if parts and parts[-1] == "__init__" else parts)


def layer_of(name: str) -> str:
    """The key of LAYERS that rules a module; raises KeyError for a module that no layer knows."""
    while name not in LAYERS:
        if "." not in name:
            raise KeyError(name)
        name = name.rpartition(".")[0]
    return name


def imports_of(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of everything imported at run time; what stands under TYPE_CHECKING counts as well."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 or node.module is not None or node.names
            prefix = "." * node.level + (node.module or "")
            for alias in node.names:
                yield node.lineno, f"{prefix}.{alias.name}" if prefix else alias.name


def layer_complaints(path: Path, source: str, modules: set[str]) -> Iterator[str]:
    """Imports that do not point down, or reach for what the layer must not know."""
    name = module_name(path)
    try:
        layer_name = layer_of(name)
    except KeyError:
        yield f"{path}: no layer of test_tidy.LAYERS knows this module"
        return
    layer = LAYERS[layer_name]
    for line, imported in imports_of(ast.parse(source)):
        top, _, rest = imported.partition(".")
        if imported.startswith("."):
            yield f"{path}:{line}: relative import {imported}"
        elif top == PACKAGE:
            while rest and rest not in modules:
                rest = rest.rpartition(".")[0]
            try:
                target = layer_of(rest) if rest else ""
            except KeyError:
                continue   # complained about where that module is judged
            if rest and target not in layer.internal and "" not in layer.internal:
                yield f"{path}:{line}: layer {layer_name} must not import {PACKAGE}.{rest}"
            if target in ("cli", "__main__") and layer_name != "__main__":
                yield f"{path}:{line}: nothing imports the command line"
        elif top in layer.banned_stdlib:
            yield f"{path}:{line}: layer {layer_name} must not import {top}"
        elif top not in STDLIB and top not in layer.third_party:
            yield f"{path}:{line}: layer {layer_name} must not import the package {top}"


STDLIB = sys.stdlib_module_names


def size_complaints(path: Path, source: str) -> Iterator[str]:
    """Files and functions that are too long to be read."""
    lines = source.count("\n")
    if lines > FILE_LINES_LIMIT:
        yield f"{path}: {lines} lines, more than {FILE_LINES_LIMIT}"
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            if length > FUNCTION_LINES_LIMIT:
                yield f"{path}:{node.lineno}: {node.name} has {length} lines, more than {FUNCTION_LINES_LIMIT}"


def header_complaints(path: Path, source: str) -> Iterator[str]:
    """The SPDX line and the essay; banned file names.  An empty __init__ needs neither."""
    if path.name == "__init__.py" and not source:
        return
    head = source.splitlines()[:2]
    if not any(line == "# SPDX-License-Identifier: GPL-2.0-only" for line in head):
        yield f"{path}: no SPDX line at its head"
    essay = ast.get_docstring(ast.parse(source)) or ""
    if not essay:
        yield f"{path}: no docstring"
    elif path.parts[0] == PACKAGE and not path.name.startswith("__") and len(essay) < (
            COMMAND_ESSAY_CHARACTERS_MIN if "commands" in path.parts else ESSAY_CHARACTERS_MIN):
        yield f"{path}: its essay is too short to say what it owns and what holds"
    if path.name in BANNED_FILE_NAMES:
        yield f"{path}: a file is named after what it owns"


def defined_names(tree: ast.Module) -> Iterator[str]:
    """Every name that a module defines or imports: functions, classes, constants, attributes, arguments, table keys."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.attr
        elif isinstance(node, ast.arg):
            yield node.arg
        elif isinstance(node, ast.alias):
            yield node.asname or node.name
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.isidentifier():
            yield node.value


def essay_name_complaints(path: Path, source: str, names: set[str], modules: set[str]) -> Iterator[str]:
    """Names in `backticks` of a module's essay that do not exist.  (Code and words of others stand in ``two``.)"""
    parts_of_modules = {part for module in modules for part in module.split(".")}
    essay = ast.get_docstring(ast.parse(source)) or ""
    for quoted in re.findall(r"(?<!`)`([^`\n]+)`(?!`)", essay):
        word = quoted.removesuffix("()").removeprefix(f"{PACKAGE}.")
        if quoted.startswith(f"{PACKAGE} "):
            word = "commands." + "_".join(quoted.split()[1:])   # a verb: `bcachectl engine run`
        if word in KNOWN_WORDS or re.fullmatch(r"\w+\.[ch]", word) or word in modules or word == PACKAGE:
            continue
        if not all(part in names or part in parts_of_modules for part in word.split(".")):
            yield f"{path}: its essay speaks of `{quoted}`, which does not exist"


def set_iteration_complaints(path: Path, source: str) -> Iterator[str]:
    """Loops over sets, whose order differs from run to run; the core may not have any (sorted() makes one harmless)."""
    tree = ast.parse(source)

    def is_set(node: ast.expr | None) -> bool:
        if isinstance(node, ast.Set | ast.SetComp):
            return True
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            return node.func.id in ("set", "frozenset")
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr | ast.BitAnd | ast.Sub):
            return is_set(node.left) or is_set(node.right)
        return isinstance(node, ast.Name | ast.Attribute) and name_of(node) in sets

    def name_of(node: ast.expr) -> str:
        return node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else ""

    sets: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.AnnAssign):
            if ast.unparse(node.annotation).split("[")[0] in ("set", "frozenset"):
                sets.add(name_of(node.target))
        elif isinstance(node, ast.Assign) and is_set(node.value):
            sets.update(name_of(target) for target in node.targets)
    for node in ast.walk(tree):
        if isinstance(node, ast.For | ast.AsyncFor | ast.comprehension) and is_set(node.iter):
            yield f"{path}:{node.iter.lineno}: iterates over a set ({ast.unparse(node.iter)})"


def assert_complaints(path: Path, source: str) -> Iterator[str]:
    """Assertions in functions without a text: what a user reports of one is its text and its line, of whatever
    version.
    """
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.Assert) and node.msg is None and node not in tree.body:
            yield f"{path}:{node.lineno}: the assertion does not say which promise was broken"


def skip_complaints(path: Path, source: str) -> Iterator[str]:
    """Tests that are left out without saying why."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("pytest.skip", "pytest.xfail", "pytest.mark.skip"):
            if not node.args and not node.keywords:
                yield f"{path}:{node.lineno}: {ast.unparse(node.func)} gives no reason"
        elif isinstance(node, ast.Attribute) and ast.unparse(node) == "pytest.mark.skip":
            if f"{ast.unparse(node)}(" not in source.splitlines()[node.lineno - 1]:
                yield f"{path}:{node.lineno}: pytest.mark.skip gives no reason"


def doubt_complaints(path: Path, source: str) -> Iterator[str]:
    """Doubt belongs into an issue; paths of one machine belong nowhere."""
    for number, line in enumerate(source.splitlines(), 1):
        if re.search(r"\b(TODO|FIXME|XXX|HACK)\b", line):
            yield f"{path}:{number}: doubt is an issue or a decision record, not a comment"
        if re.search(r"(^|[^a-zA-Z0-9_.$}])/(work|tmp/img)/", line):
            yield f"{path}:{number}: a path of one machine"


def dead_complaints(package: dict[Path, str], users: dict[Path, str]) -> Iterator[str]:
    """Functions, classes and methods of the package that nothing mentions; a decorator counts as a caller."""
    mentions: Counter[str] = Counter()
    prefixes: set[str] = set()   # of names that getattr(self, f"_do_{verb}") puts together
    for source in [*package.values(), *users.values()]:
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Name):
                mentions[node.id] += 1
            elif isinstance(node, ast.Attribute):
                mentions[node.attr] += 1
            elif isinstance(node, ast.alias):
                mentions[node.name.rpartition(".")[2]] += 1
            elif isinstance(node, ast.keyword) and node.arg:
                mentions[node.arg] += 1
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                mentions.update(re.findall(r"\w+", node.value))
            elif isinstance(node, ast.JoinedStr) and isinstance(node.values[0], ast.Constant):
                prefixes.add(str(node.values[0].value))

    def put_together(name: str) -> bool:
        return any(name.startswith(prefix) for prefix in prefixes if re.fullmatch(r"_\w+_", prefix))

    for path, source in package.items():
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and not node.decorator_list:
                if not re.fullmatch(r"__\w+__", node.name) and not mentions[node.name] and not put_together(node.name):
                    yield f"{path}:{node.lineno}: nothing uses {node.name}"


# --- the tree ----------------------------------------------------------------------------------------------------


def sources_of(*folders: str) -> dict[Path, str]:
    """Path from the root -> text, of every Python file."""
    return {path.relative_to(ROOT): path.read_text()
            for folder in folders for path in sorted((ROOT / folder).rglob("*.py")) if path.name != "workload.py"}


PACKAGE_SOURCES = sources_of(PACKAGE)
OTHER_SOURCES = sources_of("tests", "bench")
ALL_SOURCES = {**PACKAGE_SOURCES, **OTHER_SOURCES}
MODULES = {module_name(path) for path in PACKAGE_SOURCES} - {""}
NAMES = {name for source in PACKAGE_SOURCES.values() for name in defined_names(ast.parse(source))}


def judge(complaints: Iterable[str]) -> None:
    """Fail with all complaints, one a line."""
    lines = list(complaints)
    assert not lines, "\n" + "\n".join(lines)


def test_tree_layers() -> None:
    judge(text for path, source in PACKAGE_SOURCES.items() for text in layer_complaints(path, source, MODULES))


def test_tree_core_iterates_over_no_set() -> None:
    core = {path: source for path, source in PACKAGE_SOURCES.items() if path.parent == Path(PACKAGE, "engine")}
    judge(text for path, source in core.items() for text in set_iteration_complaints(path, source))


def test_tree_assertions_of_the_engine_say_what_is_wrong() -> None:
    engine = {path: source for path, source in PACKAGE_SOURCES.items() if path.is_relative_to(Path(PACKAGE, "engine"))}
    assert Path(PACKAGE, "engine", "io", "ring.py") in engine
    judge(text for path, source in engine.items() for text in assert_complaints(path, source))


def test_tree_sizes() -> None:
    judge(text for path, source in ALL_SOURCES.items() for text in size_complaints(path, source))


def test_tree_headers() -> None:
    judge(text for path, source in ALL_SOURCES.items() for text in header_complaints(path, source))


def test_tree_essays_name_what_exists() -> None:
    judge(text for path, source in PACKAGE_SOURCES.items()
                for text in essay_name_complaints(path, source, NAMES, MODULES))


def test_tree_skips_have_reasons() -> None:
    judge(text for path, source in OTHER_SOURCES.items() for text in skip_complaints(path, source))


def test_tree_no_doubts_and_no_machine_paths() -> None:
    judge(text for path, source in ALL_SOURCES.items() if path.name != "test_tidy.py"
                for text in doubt_complaints(path, source))


def test_tree_no_dead_code() -> None:
    judge(dead_complaints(PACKAGE_SOURCES, OTHER_SOURCES))


# --- each rule can fail ------------------------------------------------------------------------------------------

HEAD = '# SPDX-License-Identifier: GPL-2.0-only\n"""' + "An essay. " * 10 + '"""\n'


@pytest.mark.parametrize(("path", "line"), [
    ("engine/alloc.py", "import os"),
    ("engine/alloc.py", "import time as t"),
    ("engine/alloc.py", "from os import path"),
    ("engine/alloc.py", "def f():\n    import random"),
    ("engine/alloc.py", "from bcachectl import blockdev"),
    ("engine/alloc.py", "from bcachectl.engine.io import uring"),
    ("engine/alloc.py", "from bcachectl.fsck.walk import walk"),
    ("engine/alloc.py", "import construct"),
    ("engine/alloc.py", "from . import journal"),
    ("fsck/walk.py", "from bcachectl.engine import alloc"),
    ("ondisk/bkey.py", "from bcachectl.engine.alloc import Alloc"),
    ("ondisk/bkey.py", "import os"),
    ("views/monitor.py", "import bcachectl.engine.alloc"),
    ("errors.py", "import numpy"),
    ("snapshot.py", "from bcachectl.ondisk.bkey import Bkey"),
    ("commands/list.py", "from bcachectl.cli import app"),
    ("engine/export/nbd.py", "from bcachectl.commands import list"),
    ("strange.py", "import os"),
])
def test_layer_rule_fails(path: str, line: str) -> None:
    modules = {"engine.alloc", "engine.io.uring", "engine.io", "engine.journal", "fsck.walk", "ondisk.bkey", "blockdev",
               "commands.list", "cli"}
    assert list(layer_complaints(Path(PACKAGE, path), HEAD + line, modules))


def test_layer_rule_passes() -> None:
    modules = {"engine.alloc", "engine.sched", "ondisk.bkey", "errors"}
    source = HEAD + ("from bcachectl.engine.sched import Sched\nfrom bcachectl.ondisk import bkey\nimport numpy as np\n"
                     "from bcachectl.errors import Corrupt\nfrom heapq import heappush\n")
    assert not list(layer_complaints(Path(PACKAGE, "engine/alloc.py"), source, modules))


@pytest.mark.parametrize("source", [
    "busy: set[int] = set()\nfor x in busy: pass",
    "class A:\n    def f(self):\n        self.busy = set()\n        return [x for x in self.busy]",
    "for x in {1, 2}: pass",
    "for x in set(y) | z: pass",
])
def test_set_rule_fails(source: str) -> None:
    assert list(set_iteration_complaints(Path("bcachectl/engine/alloc.py"), source))


def test_set_rule_passes() -> None:
    source = "busy: set[int] = set()\nfor x in sorted(busy): pass\nfor y in [1]: pass\nok = 3 in busy"
    assert not list(set_iteration_complaints(Path("bcachectl/engine/alloc.py"), source))


def test_assert_rule_fails() -> None:
    assert list(assert_complaints(Path("a.py"), "def f(x):\n    assert x"))
    assert not list(assert_complaints(Path("a.py"), "assert SIZE == 8\ndef f(x):\n    assert x, 'x is true'"))


def test_size_rule_fails() -> None:
    assert list(size_complaints(Path("a.py"), "x = 1\n" * 801))
    assert list(size_complaints(Path("a.py"), "def f():\n" + "    x = 1\n" * 100))
    assert not list(size_complaints(Path("a.py"), "def f():\n" + "    x = 1\n" * 99))


def test_header_rule_fails() -> None:
    assert list(header_complaints(Path("bcachectl/a.py"), '"""' + "An essay. " * 10 + '"""\n'))
    assert list(header_complaints(Path("bcachectl/a.py"), "# SPDX-License-Identifier: GPL-2.0-only\nx = 1\n"))
    assert list(header_complaints(Path("bcachectl/a.py"), '# SPDX-License-Identifier: GPL-2.0-only\n"""Short."""\n'))
    assert list(header_complaints(Path("bcachectl/utils.py"), HEAD))
    assert not list(header_complaints(Path("bcachectl/a.py"), HEAD))


def test_essay_rule_fails() -> None:
    source = '"""Owns `Alloc`, `Alloc.free`, ``nothing_here``, `engine.alloc`; answers to `alloc.c`; or `Gone`."""\n'
    complaints = list(essay_name_complaints(Path("a.py"), source, {"Alloc", "free"}, {"engine.alloc"}))
    assert len(complaints) == 1
    assert "`Gone`" in complaints[0]


def test_skip_rule_fails() -> None:
    assert list(skip_complaints(Path("a.py"), "pytest.skip()"))
    assert list(skip_complaints(Path("a.py"), "@pytest.mark.skip\ndef test_a(): pass"))
    assert not list(skip_complaints(Path("a.py"), "pytest.skip('no loop devices')"))


def test_doubt_rule_fails() -> None:
    assert list(doubt_complaints(Path("a.py"), "x = 1  # " + "TO" + "DO: think"))
    assert list(doubt_complaints(Path("a.py"), 'open("/' + 'work/main/x")'))
    assert not list(doubt_complaints(Path("a.py"), "framework/main todo"))


def test_dead_rule_fails() -> None:
    source = "def used(): pass\ndef unused(): pass\n@app\ndef shown(): pass\nclass K:\n    def lost(self): pass\n"
    package = {Path("a.py"): source}
    complaints = list(dead_complaints(package, {Path("test_a.py"): "from a import used, K"}))
    assert [text.split()[-1] for text in complaints] == ["unused", "lost"]
