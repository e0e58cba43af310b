# SPDX-License-Identifier: GPL-2.0-only
"""The hot path compiled (``make compiled``): the same tests pass as with its sources, in a copy of the tree.

The copy's modules are really the compiled ones, and what was compiled can be removed again.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from tests.require import need, need_tool

ROOT = Path(__file__).resolve().parent.parent.parent
SAME_TESTS = ("tests/unit/engine", "tests/property/test_alloc.py", "tests/property/test_node.py",
              "tests/property/test_extents.py", "tests/property/test_streams.py", "tests/sim",
              "tests/export/test_write_batch.py", "tests/export/test_ublk_writes.py",
              "tests/export/test_nbd.py", "tests/export/test_nbd_direct.py", "tests/property/test_scan.py",
              "tests/fsck/test_tally.py", "tests/fsck/test_damage.py", "tests/fsck/test_no_false.py::test_golden")


def compile_script() -> ModuleType:
    """packaging/compile.py as a module."""
    spec = importlib.util.spec_from_file_location("compile_script", ROOT / "packaging" / "compile.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def in_tree(tree: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """Run Python in the tree, which comes before whatever is installed."""
    return subprocess.run([sys.executable, *words], cwd=tree, text=True, capture_output=True, timeout=800, check=False,
                          env={**os.environ, "PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": "1"})


def sources(package: Path) -> set[Path]:
    """The files that are not made."""
    return {path.relative_to(package) for path in package.rglob("*.*") if path.suffix not in (".so", ".pyc")}


@pytest.mark.timeout(900)
def test_compiled_modules_pass_the_tests_of_their_sources(tmp_path: Path) -> None:
    need_tool("cc")
    need(importlib.util.find_spec("Cython") is not None, "Cython is not installed (requirements-compile.txt)")
    for name in ("bcachectl", "tests", "packaging"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path / name)
    script = compile_script()
    compiler = str(tmp_path / "packaging" / "compile.py")
    before = sources(tmp_path / "bcachectl")

    done = in_tree(tmp_path, compiler, "--root", str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    done = in_tree(tmp_path, "-c", "import importlib, sys\n"
                                   "for name in sys.argv[1:]: print(importlib.import_module(name).__file__)",
                   *script.MODULES)
    assert done.returncode == 0, done.stderr
    files = [Path(line) for line in done.stdout.splitlines()]
    assert len(files) == len(script.MODULES) > 4
    assert all(file.suffix == ".so" and file.is_relative_to(tmp_path) for file in files), files

    done = in_tree(tmp_path, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *SAME_TESTS)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout.splitlines()[-1]

    done = in_tree(tmp_path, compiler, "--root", str(tmp_path), "--remove")
    assert f"{len(files)} extension modules removed" in done.stdout
    assert not [file for file in files if file.exists()]
    assert sources(tmp_path / "bcachectl") == before
