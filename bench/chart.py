# SPDX-License-Identifier: GPL-2.0-only
"""Draws the ratios that `bench.results` has kept: a bar each, from as fast as the other on, on a logarithmic scale.

    python -m bench.chart docs/performance.json docs/performance.svg

To the right of the line the engine is faster.  The thin line is the spread of the rounds, the red mark what was asked
for.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from xml.sax.saxutils import escape

from bench.results import Ratio, load

LABEL_PX, PLOT_PX, NUMBER_PX, ROW_PX, HEAD_PX = 390, 460, 70, 20, 30
STEPS = (0.1, 0.2, 0.5, 1, 2, 5, 10)
FASTER, SLOWER, TARGET, INK, FAINT = "#2a7f62", "#c77d2e", "#c0392b", "#222222", "#bbbbbb"


def draw(groups: dict[str, list[Ratio]]) -> str:
    """The picture as SVG."""
    every = [ratio for ratios in groups.values() for ratio in ratios]
    low = min([0.5, *(ratio.low for ratio in every)])
    high = max([2.0, *(ratio.high for ratio in every), *(ratio.target or 0 for ratio in every)])
    span = math.log(high / low)

    def x(value: float) -> float:
        return LABEL_PX + PLOT_PX * math.log(max(value, low) / low) / span

    parts: list[str] = []
    y = HEAD_PX
    for group, ratios in groups.items():
        parts.append(_text(8, y + 14, group, weight="bold"))
        y += ROW_PX
        for ratio in ratios:
            middle = y + ROW_PX / 2
            start, end = sorted((x(1), x(ratio.median)))
            color = FASTER if ratio.median >= 1 else SLOWER
            parts.append(f'<rect x="{start:.1f}" y="{y + 4}" width="{max(1, end - start):.1f}" height="{ROW_PX - 8}" '
                         f'fill="{color}"/>')
            parts.append(_line(x(ratio.low), middle, x(ratio.high), middle, INK))
            if ratio.target:
                parts.append(_line(x(ratio.target), y + 1, x(ratio.target), y + ROW_PX - 1, TARGET, width=2))
            parts.append(_text(20, y + 14, f"{ratio.what} / {ratio.against}"))
            parts.append(_text(LABEL_PX + PLOT_PX + 10, y + 14, f"{ratio.median:.2f}"))
            y += ROW_PX
        y += 6
    scale = []
    for step in STEPS:
        if low <= step <= high:
            scale.append(_line(x(step), HEAD_PX, x(step), y, INK if step == 1 else FAINT))
            scale.append(_text(x(step) - 8, HEAD_PX - 8, f"{step:g}"))
    width = LABEL_PX + PLOT_PX + NUMBER_PX
    return "\n".join([
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{y + 8}" font-family="sans-serif" '
        f'font-size="12">', f'<rect width="{width}" height="{y + 8}" fill="white"/>', *scale, *parts, "</svg>", ""])


def _text(x: float, y: float, text: str, weight: str = "normal") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" fill="{INK}" font-weight="{weight}">{escape(text)}</text>'


def _line(x1: float, y1: float, x2: float, y2: float, color: str, width: int = 1) -> str:
    return (f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{color}" '
            f'stroke-width="{width}"/>')


def main() -> None:
    """Draw."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("results", type=Path)
    parser.add_argument("picture", type=Path)
    asked = parser.parse_args()
    asked.picture.write_text(draw(load(asked.results)))


if __name__ == "__main__":
    main()
