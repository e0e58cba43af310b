# SPDX-License-Identifier: GPL-2.0-only
"""What a test needs from its machine: say it with `need_tool`, `need_root` or `need`, never with a bare pytest.skip.

Normally a missing tool skips the test and the reason is printed at the end of the run.  With BCACHECTL_REQUIRE=all, as
CI sets it, nothing may be missing: conftest.py turns every skip into a failure.
"""

from __future__ import annotations

import os
import shutil

import pytest

_SBIN = ("/usr/sbin", "/sbin")


def all_required() -> bool:
    """Whether a skipped test counts as a failed one."""
    return os.environ.get("BCACHECTL_REQUIRE", "") == "all"


def find_tool(name: str) -> str | None:
    """The path of a program, those of /usr/sbin included whatever PATH says."""
    return shutil.which(name, path=os.pathsep.join([os.environ.get("PATH", os.defpath), *_SBIN]))


def need(condition: object, reason: str) -> None:
    """Go on only if the condition holds; ``reason`` names what is missing."""
    if not condition:
        pytest.skip(f"missing: {reason}")


def need_tool(name: str) -> str:
    """The path of a program that the test cannot do without."""
    path = find_tool(name)
    need(path is not None, f"the program {name}")
    assert path is not None
    return path


def need_root() -> None:
    """Go on only as root."""
    need(os.geteuid() == 0, "root")


def patience(seconds: float) -> float:
    """How long to wait for what takes so many seconds at most on a usual machine; BCACHECTL_SLOWNESS says how many
    times slower this one is."""
    return seconds * float(os.environ.get("BCACHECTL_SLOWNESS", "1"))
