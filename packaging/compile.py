# SPDX-License-Identifier: GPL-2.0-only
"""Compile the hot path and the scan of fsck: extension modules beside their sources, which Python then takes instead.

The sources are the same.  A ``.pxd`` beside one gives C types to what it computes with.  Needs Cython, a C compiler and
Python's headers (Debian: gcc, libc6-dev, python3-dev).  ``--remove`` undoes it.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

MODULES = (
    "bcachectl.engine.exported_writes",
    "bcachectl.engine.node",
    "bcachectl.engine.open_buckets",
    "bcachectl.engine.read_batch",
    "bcachectl.engine.write_batch",
    "bcachectl.engine.io.ring",
    "bcachectl.engine.export.nbd_quick",
    "bcachectl.engine.export.ublk_reads",
    "bcachectl.engine.export.ublk_writes",
    "bcachectl.fsck.scan",
    "bcachectl.fsck.counting",
)
DIRECTIVES = {
    "language_level": 3,
    "annotation_typing": False,         # annotations are for readers and mypy; an int there has no limit
    "binding": True,
    "show_performance_hints": False,
}


def source_of(root: Path, module: str) -> Path:
    """Where a module's source lies."""
    return root / (module.replace(".", "/") + ".py")


def remove(root: Path) -> int:
    """Remove all extension modules; how many there were."""
    found = [path for name in MODULES for source in [source_of(root, name)]
             for path in source.parent.glob(source.stem + ".*.so")]
    for path in found:
        path.unlink()
    return len(found)


def build(root: Path) -> None:
    """Compile all modules."""
    from Cython.Build import cythonize
    from setuptools import Distribution, Extension

    remove(root)
    with tempfile.TemporaryDirectory(prefix="bcachectl-compile-") as scratch:
        extensions = [Extension(name, [str(source_of(root, name))], extra_compile_args=["-O2", "-g0"])
                      for name in MODULES]
        command = Distribution({"ext_modules": cythonize(
            extensions, build_dir=scratch, include_path=[str(root)], quiet=True, compiler_directives=DIRECTIVES,
        )}).get_command_obj("build_ext")
        command.build_lib, command.build_temp = str(root), scratch
        command.ensure_finalized()
        command.run()


def main() -> None:
    """Do what the command line asks."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--root", type=Path, default=Path(__file__).resolve().parent.parent,
                        help="the directory that holds the package bcachectl")
    parser.add_argument("--remove", action="store_true", help="remove the extension modules")
    asked = parser.parse_args()
    if asked.remove:
        print(f"{remove(asked.root)} extension modules removed")
        return
    try:
        build(asked.root)
    except ImportError as error:
        sys.exit(f"{error.name} is not installed; 'make compiled' installs it")
    print(f"{len(MODULES)} modules compiled; --remove undoes it")


if __name__ == "__main__":
    main()
