# SPDX-License-Identifier: GPL-2.0-only
"""What the benchmarks keep: ratios, by group, in one JSON file, which `bench.chart` draws."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Ratio:
    """How often the engine is as fast as something else: the median of the rounds, the smallest and the largest.

    ``target`` is what was asked for, None if nothing was.
    """

    what: str
    against: str
    median: float
    low: float
    high: float
    target: float | None = None

    def __str__(self) -> str:
        return f"{self.median:.2f}  ({self.low:.2f} to {self.high:.2f})"


def ratio_of(what: str, against: str, mine: Sequence[float], theirs: Sequence[float],
             target: float | None = None) -> Ratio:
    """The ratio of two series of figures, of the same rounds, where more is better."""
    each = [one / other for one, other in zip(mine, theirs, strict=True)]
    return Ratio(what, against, statistics.median(each), min(each), max(each), target)


def save(path: Path | None, group: str, ratios: Sequence[Ratio]) -> None:
    """Put a group's ratios in the place of its former ones; nothing if there is no path."""
    if path is None:
        return
    found = json.loads(path.read_text()) if path.exists() else {}
    found[group] = [asdict(ratio) for ratio in ratios]
    path.write_text(json.dumps(found, indent=1) + "\n")


def load(path: Path) -> dict[str, list[Ratio]]:
    """All that was saved, by group."""
    return {group: [Ratio(**fields) for fields in ratios] for group, ratios in json.loads(path.read_text()).items()}
