# SPDX-License-Identifier: GPL-2.0-only
"""Snapshots travel as JSON and come back the same; older programs read newer engines."""

from __future__ import annotations

import json

import pytest

from bcachectl.snapshot import GEN_GUARD, GenSnapshot, SetSnapshot, WindowSnapshot, from_json, to_json
from tests.unit.views.samples import sample_snapshot


def test_json_there_and_back() -> None:
    for cells in (0, 400):
        snapshot = sample_snapshot(cells)
        assert from_json(SetSnapshot, json.loads(json.dumps(to_json(snapshot)))) == snapshot


def test_unknown_names_are_ignored_and_defaults_fill_in() -> None:
    raw = to_json(sample_snapshot())
    raw["of_the_future"] = {"a": 1}
    del raw["cache_read_races"]
    assert from_json(SetSnapshot, raw) == sample_snapshot()


@pytest.mark.parametrize("raw", [{}, {"t_ns": 1}, [], 7, None])
def test_a_missing_field_is_said(raw: object) -> None:
    with pytest.raises(ValueError, match="not a SetSnapshot"):
        from_json(SetSnapshot, raw)


@pytest.mark.parametrize(("farthest", "headroom"), [(0, 96), (95, 1), (96, 0), (200, 0)])
def test_headroom(farthest: int, headroom: int) -> None:
    assert GenSnapshot(histogram=(), max=farthest, need_gc=0).headroom == headroom
    assert GEN_GUARD == 96


@pytest.mark.parametrize(("hits", "misses", "ratio"), [(0, 0, 0), (1, 2, 33), (5, 0, 100), (0, 5, 0)])
def test_hit_ratio(hits: int, misses: int, ratio: int) -> None:
    assert WindowSnapshot("total", hits, misses, 9, 9, 9, 9).hit_ratio_percent == ratio
