# SPDX-License-Identifier: GPL-2.0-only
"""The loop export on a kernel before 6.16, whose loop driver asks a file less than that of the newer ones does."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.vm.test_ublk import tell


@pytest.mark.timeout(400)
@pytest.mark.parametrize("series", ["6.12"])
def test_a_loop_device_has_its_size_and_its_data(tmp_path: Path, series: str) -> None:
    tell("""
format writeback
begin --export loop
[ "$(cat /sys/block/${device#/dev/}/size)" = 327664 ] || fail "size $(cat /sys/block/${device#/dev/}/size)"
verify --filename=$device --size=2m --offset=100m
kill $engine
wait $engine || fail "the engine's status is $?"
[ ! -e /sys/block/${device#/dev/}/loop/backing_file ] || fail "$device is left"
[ ! -s /job/errors ] || fail "the engine complained"
""", tmp_path, series=series)
