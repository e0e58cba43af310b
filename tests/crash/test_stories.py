# SPDX-License-Identifier: GPL-2.0-only
"""Power fails at Io 1, 2, 3 ... of each story, and the set comes back.

`make test` takes a share of the points of each story, different ones for each; `make crash` takes them all, three
times.  ``BCACHECTL_SIM_SEED`` replays a seed, ``BCACHECTL_SIM_POINTS`` (``17`` or ``10-40``) only those points.
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterable

import pytest

from tests.crash.stories import STORIES
from tests.sim.power import Choose, run_story

SEED = int(os.environ.get("BCACHECTL_SIM_SEED") or 1)
EVERYTHING = os.environ.get("BCACHECTL_CRASH") == "all"
POINTS = os.environ.get("BCACHECTL_SIM_POINTS", "")
SHARE = 40
"""Points of a story that are tried when not all are; a long story has some more."""

DRAWS = 3
GUESSED_POINTS = 260


def share(name: str) -> Choose:
    """Which points of a story are tried, and how often."""
    if POINTS:
        first, _, last = POINTS.partition("-")
        return lambda number: range(DRAWS) if int(first) <= number <= int(last or first) else ()
    if EVERYTHING:
        return lambda number: range(DRAWS)
    dice = random.Random(f"{name}/{SEED}")

    def some(number: int) -> Iterable[int]:
        return (number % DRAWS,) if number < 4 or dice.random() < SHARE / max(GUESSED_POINTS, number) else ()

    return some


ORDER = ("leaves_come_and_go", "around", "miss_fill", "modes", "detach", "writeback", "interior")


@pytest.mark.parametrize("name", ORDER)
def test_without_power_loss(name: str) -> None:
    """More seeds of what is mostly a matter of order, not of what survives."""
    for seed in range(SEED + 1, SEED + 5):
        run_story(STORIES[name], seed, lambda number: ())


@pytest.mark.parametrize("name", STORIES)
def test_power_loss(name: str) -> None:
    tally = run_story(STORIES[name], SEED, share(name))
    assert tally.recoveries
    print(f"{name}: {tally}")
