# SPDX-License-Identifier: GPL-2.0-only
"""A plugin of pytest in the virtual machine (`tests.vm.over_ublk`): it leaves out what was done in an earlier boot,
tells of each test as it begins and ends, and stops in good time.
"""

from __future__ import annotations

import itertools
import json
import os
import time
from pathlib import Path
from typing import TypeVar

import pytest

Item = TypeVar("Item")

_SHARE = Path("/job")
_UNTIL_S = time.monotonic() + float(os.environ.get("BCACHECTL_OVER_SECONDS", "1e9"))


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if os.environ.get("BCACHECTL_OVER_SHARE"):
        items[:] = share_of(items)[:int(os.environ["BCACHECTL_OVER_SHARE"])]
    items[:] = part_of(items, os.environ.get("BCACHECTL_OVER_PART", "1/1"))
    done = set((_SHARE / "done").read_text().splitlines())
    (_SHARE / "collected").write_text("".join(f"{item.nodeid}\n" for item in items))
    config.hook.pytest_deselected(items=[item for item in items if item.nodeid in done])
    items[:] = [item for item in items if item.nodeid not in done]


def share_of(items: list[pytest.Item]) -> list[pytest.Item]:
    """Of each function what its first parameters make of it: first the first function of each file, then the second."""
    first: dict[str, pytest.Item] = {}
    for item in items:
        first.setdefault(item.nodeid.partition("[")[0], item)
    files: dict[Path, list[pytest.Item]] = {}
    for item in first.values():
        files.setdefault(item.path, []).append(item)
    rounds = itertools.zip_longest(*files.values())
    return [item for some in rounds for item in some if item is not None]


def part_of(items: list[Item], part: str) -> list[Item]:
    """Part ``2/3``: the second of each three."""
    number, _, parts = part.partition("/")
    return items[int(number) - 1::int(parts)]


def pytest_runtest_logstart(nodeid: str) -> None:
    _tell(nodeid, "begun", 0.0, "")


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.when == "call" or report.outcome != "passed":
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longreprtext
        _tell(report.nodeid, report.outcome, report.duration, reason)


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item: pytest.Item) -> None:
    if time.monotonic() > _UNTIL_S:
        item.session.shouldstop = "the time of this boot is over"


def _tell(name: str, outcome: str, seconds: float, reason: str) -> None:
    told = {"test": name, "outcome": outcome, "seconds": round(seconds, 1), "reason": reason}
    with (_SHARE / "told").open("a") as file:
        file.write(json.dumps(told) + "\n")
