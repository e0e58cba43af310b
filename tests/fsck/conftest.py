# SPDX-License-Identifier: GPL-2.0-only
"""``make damage`` and ``make flips`` end with what was tried; ``python -m tests.damage`` lists the cases.

Tests say it with ``record_property``, which comes back from every worker:

* ``damage``: the codes that a case must report, and how its repair ends (`CLEAN`, `LEFT` or `NOTHING`);
* ``interrupted``: at how many points the repair of a case was interrupted;
* ``combined``: how many combinations of damage were judged;
* ``flips``: bytes that were flipped, by structure and outcome.
"""

from __future__ import annotations

import os
import textwrap
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest

from tests.damage import cases

CLEAN, LEFT, NOTHING = "clean", "left", "nothing"
WIDTH = 110


def pytest_report_header(config: pytest.Config) -> list[str]:
    """A line at the head of a complete run."""
    if os.environ.get("BCACHECTL_DAMAGE") != "all":
        return []
    every = cases()
    return [f"{len(every)} cases of damage to {len({case.base for case in every})} images"]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """What was tried, and how it ended; only of tests that passed."""
    told: dict[str, list[Any]] = {}
    for report in terminalreporter.stats.get("passed", []):
        for name, value in report.user_properties:
            told.setdefault(name, []).append(value)
    lines = [*_damage(told), *_flips(told.get("flips", []))]
    if lines:
        terminalreporter.section("what was damaged")
        for line in lines:
            terminalreporter.write_line(line)


def _damage(told: dict[str, list[Any]]) -> Iterator[str]:
    found = told.get("damage", [])
    if found:
        ends = Counter(end for _codes, end in found)
        by_code = Counter(code for codes, _end in found for code in codes)
        yield (f"{len(found)} cases found exactly, of {len(by_code)} codes: {ends[CLEAN]} are clean after -y, "
               f"{ends[LEFT]} have left what the repair says it leaves, {ends[NOTHING]} have nothing that it could end")
        yield from textwrap.wrap(", ".join(f"{code} {count}" for code, count in sorted(by_code.items())), WIDTH,
                                 initial_indent="cases by code: ", subsequent_indent="  ")
    points = told.get("interrupted", [])
    if points:
        yield f"{len(points)} repairs interrupted at {sum(points)} points, each repaired again to the same data"
    if told.get("combined"):
        yield f"{sum(told['combined'])} combinations of damage: nothing lost that was not listed"


def _flips(found: list[list[tuple[str, str, int]]]) -> Iterator[str]:
    counts: Counter[tuple[str, str]] = Counter()
    for part in found:
        counts.update({(structure, outcome): count for structure, outcome, count in part})
    for structure in sorted({structure for structure, _outcome in counts}):
        every = sum(count for (name, _outcome), count in counts.items() if name == structure)
        covered, others, quiet = (counts[structure, outcome] for outcome in ("covered", "found", "quiet"))
        yield (f"{structure}: {every} bytes flipped, {covered} of them covered by a checksum, all of these found; "
               f"{others} others found as well, {quiet} without effect")
