# SPDX-License-Identifier: GPL-2.0-only
"""A share of the tests of engines, over ublk: ``make over-ublk`` runs all (`tests.vm.over_ublk`).

The share: of each file of `SHARE`, those about what a volume answers, the first function with its first parameters.
What the other files do for minutes, fio, file systems and SIGKILL under load, tests/vm/test_ublk.py does in short.
"""

from __future__ import annotations

import collections
from pathlib import Path

import pytest

from tests.vm.over_side import part_of
from tests.vm.over_ublk import Boot, Outcome, boot, report, run_all

SHARE = ("tests/export/test_faults.py", "tests/export/test_golden_serve.py", "tests/export/test_engine_run.py",
         "tests/export/test_writeback_serve.py", "tests/system/test_nothing_written.py", "tests/golden/test_killed.py")
LIMIT_S = 600


@pytest.mark.timeout(LIMIT_S + 600)
def test_a_share_of_the_tests_of_engines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = boot(list(SHARE), [], tmp_path / "job", seconds=LIMIT_S, share_of=len(SHARE), test_seconds=300)
    left = len(set(found.collected) - {one.test for one in found.outcomes})
    text = report(found.outcomes, left)
    with capsys.disabled():
        print(f"\n{text}")
    counts = collections.Counter(one.outcome for one in found.outcomes)
    assert not left, text
    assert counts == {"passed": len(SHARE)}, text


def test_machines_share_the_tests_and_go_on_where_they_stopped(tmp_path: Path) -> None:
    tests = [f"test{number}" for number in range(7)]
    noted: list[str] = []
    booted: list[str] = []

    def two_a_boot(part: str, done: list[str], directory: Path) -> Boot:
        directory.mkdir()
        booted.append(part)
        mine = part_of(tests, part)
        todo = [name for name in mine if name not in done][:2]
        return Boot(mine, [Outcome(name, "passed", 1.0, "") for name in todo], "")

    outcomes = [Outcome("test0", "passed", 1.0, "")]
    left = run_all(two_a_boot, outcomes, 2, 10, lambda found: noted.extend(one.test for one in found))
    assert left == 0
    assert sorted(one.test for one in outcomes) == tests
    assert sorted(noted) == tests[1:]
    assert sorted(booted) == ["1/2", "1/2", "2/2", "2/2"]
    assert run_all(two_a_boot, [], 2, 1, lambda found: None) == 3


def test_the_report_shows_each_failure() -> None:
    text = report([Outcome("a", "passed", 1.0, ""), Outcome("b", "skipped", 0.1, "Skipped: only over nbd: x"),
                   Outcome("c", "skipped", 0.1, "Skipped: only over nbd: x"), Outcome("d", "failed", 2.0, "why")], 3)
    assert text.splitlines() == ["over ublk: 1 passed, 1 failed, 2 left out, 3 still to run",
                                 "  left out, 2: only over nbd: x", "FAILED d", "why"]
