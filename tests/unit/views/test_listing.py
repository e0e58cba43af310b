# SPDX-License-Identifier: GPL-2.0-only
"""The list of devices: nothing is said to be missing that is not, and it can be read on a narrow terminal."""

from __future__ import annotations

from typing import Any

import pytest

from bcachectl.views.listing import lines

SET = "014a299e-a27a-45e0-b9c5-b79d60a449a0"
UUID = "e7b8ed94-562b-4ddf-864b-3a0c89b3cd9f"


def body(*devices: dict[str, Any]) -> dict[str, Any]:
    return {"devices": list(devices), "engines": [], "kernel_sets": [], "kernel_alone": [], "others": [],
            "unreadable": []}


def device(path: str, role: str, **more: Any) -> dict[str, Any]:
    return {"device": path, "kind": "file", "role": role, "name": None, "size_bytes": 64 << 20, "state": "clean",
            "cache_mode": "writeback", "label": "", "uuid": UUID, "set_uuid": SET, "file": None, "problem": None} | more


@pytest.mark.parametrize(("more", "heading", "is_missed"), [
    ({"state": "dirty"}, f"set {SET}", True),
    ({"state": "clean"}, f"set {SET}", True),
    ({"state": "detached"}, f"set {SET}", False),
    ({"state": "detached", "set_uuid": "00000000-0000-0000-0000-000000000000"}, "attached to no set", False)])
def test_a_cache_is_missed_by_those_who_wait_for_it(more: dict[str, Any], heading: str, is_missed: bool) -> None:
    page = list(lines(body(device("a", "backing", **more)), color=False))
    assert page[0] == heading
    assert ("  its cache device is not here" in page) == is_missed
    with_cache = list(lines(body(device("a", "backing"), device("c", "cache", state="ordered")), color=False))
    assert "  its cache device is not here" not in with_cache


def test_a_narrow_terminal_has_two_lines_a_device() -> None:
    found = body(device("/dev/sdb1", "backing", label="home", file="/srv/disk"),
                 device("/dev/nvme0n1p3", "cache", state="ordered", bucket_size_bytes=524288))
    narrow = list(lines(found, color=False, width=80))
    assert max(map(len, narrow)) <= 80
    assert narrow[1:] == [
        "  DEVICE          KIND  ROLE     SIZE    STATE    POLICY     BUCKET",
        "  /dev/sdb1       file  backing  64 MiB  clean    writeback  -",
        f"    uuid {UUID}, label home, file /srv/disk",
        "  /dev/nvme0n1p3  file  cache    64 MiB  ordered  writeback  512 KiB",
        f"    uuid {UUID}"]
    assert list(lines(found, color=False, width=200)) == list(lines(found, color=False))
    assert len(list(lines(found, color=False))) == 4
