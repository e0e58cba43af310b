# SPDX-License-Identifier: GPL-2.0-only
"""The tests of engines over ublk: ``make over-ublk`` runs all of them, unchanged, in the virtual machine.

`FILES` are the tests that reach a volume through its export.  They run inside the machine, as root, with the host's
Python and the project's own tree, on files in memory; `tests.over` puts a block device in the place of the socket.
What only another export has is left out there, and its reason is counted here.  Not among them: tests of the servers
of other exports (test_nbd.py, test_nbd_direct.py, test_loop.py).

The machine is emulated, and a test takes up to 30 times as long as usual.  So the tests are run in boots of a few
minutes, each of which goes on where the one before has stopped; a test that hangs or takes the machine along fails, and
the next boot begins behind it.  Several machines, one for each processor, share the tests (`run_all`).
"""

from __future__ import annotations

import argparse
import collections
import concurrent.futures
import json
import os
import shlex
import sys
import tempfile
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tests.conftest import TESTS
from tests.vm import machine

FILES = (
    "tests/export/test_changes.py", "tests/export/test_engine_run.py", "tests/export/test_faults.py",
    "tests/export/test_features.py", "tests/export/test_golden_serve.py", "tests/export/test_write_batch.py",
    "tests/export/test_writeback_serve.py", "tests/fsck/test_undo_after_run.py", "tests/golden/test_killed.py",
    "tests/system/test_changes_under_load.py", "tests/system/test_damage.py", "tests/system/test_dying_device.py",
    "tests/system/test_ext4.py", "tests/system/test_fio.py", "tests/system/test_kill.py",
    "tests/system/test_nothing_written.py",
    "tests/cli/test_engine_verbs.py::test_a_day_in_the_life_of_an_engine", "tests/cli/test_live.py",
    "tests/fsck/test_forget.py::test_an_engine_runs_the_set", "tests/fsck/test_resolve.py::test_an_engine_runs_it",
    "tests/fsck/test_resolve.py::test_an_engine_goes_on_with_what_was_resolved",
    "tests/fsck/test_resolve.py::test_writeback_of_an_inconsistent_device_detaches_it",
)
SLOWNESS = 15
MEMORY_MIB = 3072
BOOT_S = 420
"""How long a boot goes on with further tests."""
LAST_TEST_S = 900
"""How long a test may take, and so the last one of a boot besides."""

_JOB = """
echo 0 >/proc/sys/kernel/printk
mount -t tmpfs -o size=2g tmpfs /newroot/run
host bash /job/go.sh
"""
_GO = """
cd {root}
mkdir -p /run/t
export HOME=/run TMPDIR=/run/t XDG_STATE_HOME=/run/state PATH=/usr/sbin:/usr/bin:/sbin:/bin PYTHONDONTWRITEBYTECODE=1
export BCACHECTL_TEST_EXPORT=ublk BCACHECTL_TEST_FORK=1 BCACHECTL_SLOWNESS={slowness} BCACHECTL_OVER_SECONDS={seconds}
export BCACHECTL_OVER_SHARE={share} BCACHECTL_OVER_PART={part}
{python} -m pytest -p no:cacheprovider -p no:xdist -p tests.vm.over_side --basetemp=/run/t/p --timeout {timeout_s} \\
    --durations=0 {words}
status=$?
[ $status -le 2 ] || exit $status
"""


@dataclass(frozen=True)
class Outcome:
    """What became of a test."""

    test: str
    outcome: str
    seconds: float
    reason: str


@dataclass(frozen=True)
class Boot:
    """What one boot has told: the tests that it knew, and what became of those that it began."""

    collected: list[str]
    outcomes: list[Outcome]
    console: str


def boot(words: list[str], done: list[str], share: Path, *, seconds: float = BOOT_S, share_of: int = 0,
         test_seconds: float = LAST_TEST_S, part: str = "1/1") -> Boot:
    """Run the tests that ``words`` of pytest's command line choose, but for those that are done; with ``share_of``, so
    many of them at most, each function with its first parameters only; of these a ``part`` (`tests.vm.over_side`).
    """
    share.mkdir()
    (share / "done").write_text("".join(f"{name}\n" for name in done))
    (share / "go.sh").write_text(_GO.format(
        root=shlex.quote(str(TESTS.parent)), slowness=SLOWNESS, seconds=seconds, python=shlex.quote(sys.executable),
        share=share_of or "", part=part,
        timeout_s=test_seconds, words=shlex.join(words)))
    started = machine.start(_JOB, [], share, host=True, memory_mib=MEMORY_MIB)
    try:
        result = started.wait(seconds + test_seconds + 120)
        output = f"{result.stdout}\n{result.console}"
        assert result.status == 0, output
    except AssertionError as error:
        output = str(error)
    told = [Outcome(**json.loads(line)) for line in _lines(share / "told")]
    last: dict[str, Outcome] = {}
    for outcome in told:
        # An error of the teardown comes after the call's own outcome.
        if outcome.test not in last or last[outcome.test].outcome != "failed":
            last[outcome.test] = outcome
    outcomes = [Outcome(one.test, "failed", one.seconds, f"the machine ended in it\n{output[-4000:]}")
                if one.outcome == "begun" else one for one in last.values()]
    collected = _lines(share / "collected")
    assert outcomes or (collected and set(collected) <= set(done)), output
    return Boot(collected, outcomes, output)


def _lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []


def report(outcomes: list[Outcome], left: int) -> str:
    """Counts, why tests were left out, and each failure."""
    counts = collections.Counter(one.outcome for one in outcomes)
    lines = [f"over ublk: {counts['passed']} passed, {counts['failed']} failed, {counts['skipped']} left out"
             + (f", {left} still to run" if left else "")]
    reasons = collections.Counter(one.reason.removeprefix("Skipped: ") for one in outcomes if one.outcome == "skipped")
    lines += [f"  left out, {count}: {reason}" for reason, count in sorted(reasons.items())]
    lines += [f"FAILED {one.test}\n{one.reason}" for one in outcomes if one.outcome == "failed"]
    return "\n".join(lines)


def run_all(boot_part: Callable[[str, list[str], Path], Boot], outcomes: list[Outcome], machines: int, boots: int,
            note: Callable[[list[Outcome]], None]) -> int:
    """Run boots, each of so many machines a part of the tests, until all is done or each has booted ``boots`` times.

    ``boot_part`` is told the part (``1/2``), which tests are done, and a directory to make.  What became of each test
    is appended to ``outcomes``; ``note`` is told what a boot has brought.  How many tests are left.
    """
    lock = threading.Lock()
    left = [1] * machines

    def run_part(number: int, directory: Path) -> None:
        for boot_number in range(boots):
            with lock:
                done = [one.test for one in outcomes]
            found = boot_part(f"{number + 1}/{machines}", done, directory / f"{number}-{boot_number}")
            with lock:
                outcomes.extend(found.outcomes)
                left[number] = len(set(found.collected) - {one.test for one in outcomes})
                note(found.outcomes)
            if not left[number]:
                break

    with tempfile.TemporaryDirectory(prefix="bcachectl-over-") as name, \
            concurrent.futures.ThreadPoolExecutor(machines) as pool:
        for task in [pool.submit(run_part, number, Path(name)) for number in range(machines)]:
            task.result()
    return sum(left)


def main() -> None:
    """Run boots until all is done."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path, help="keep what is done in this file, and go on with it")
    parser.add_argument("--boots", type=int, default=1000, help="no more than so many")
    parser.add_argument("--seconds", type=float, default=BOOT_S, help="of a boot")
    parser.add_argument("--test-seconds", type=float, default=LAST_TEST_S, help="of a test")
    parser.add_argument("--first", action="store_true", help="each function with its first parameters only")
    parser.add_argument("--machines", type=int, default=min(4, os.cpu_count() or 1),
                        help="so many at once, 3 GiB each")
    parser.add_argument("words", nargs="*", help="of pytest's command line, instead of all files")
    asked = parser.parse_args()
    outcomes = [Outcome(**json.loads(line)) for line in _lines(asked.results)] if asked.results else []

    def boot_part(part: str, done: list[str], directory: Path) -> Boot:
        return boot(asked.words or list(FILES), done, directory, seconds=asked.seconds,
                    share_of=10_000 if asked.first else 0, test_seconds=asked.test_seconds, part=part)

    def note(found: list[Outcome]) -> None:
        for one in found:
            print(f"{one.outcome:<8}{one.seconds:>7.1f} s  {one.test}", flush=True)
            if one.outcome == "failed":
                print(one.reason, flush=True)
        if asked.results:
            asked.results.write_text("".join(json.dumps(vars(one)) + "\n" for one in outcomes))

    left = run_all(boot_part, outcomes, asked.machines, asked.boots, note)
    print(report(outcomes, left))
    sys.exit(any(one.outcome == "failed" for one in outcomes))


if __name__ == "__main__":
    main()
