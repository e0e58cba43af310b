# SPDX-License-Identifier: GPL-2.0-only
"""`SimDisk`: each fault kind that its head lists can happen, and nothing else can."""

from __future__ import annotations

import random
from errno import EIO

import pytest

from bcachectl.engine.sched import DISCARD, FLUSH, FUA, PREFLUSH, READ, WRITE, Io
from tests.sim.disk import SECTOR, STYLES, SimDisk, SimError


def disk(size: int = 16, seed: str = "0", atomic: int = 1) -> SimDisk:
    return SimDisk("d", size, seed=seed, atomic_sectors=atomic)


def write(d: SimDisk, sector: int, text: str, flags: int = 0) -> Io:
    return Io(WRITE, 0, sector, len(text), b"".join(letter.encode() * SECTOR for letter in text), flags)


def do(d: SimDisk, io: Io) -> Io:
    d.begin(io)
    d.finish(io)
    return io


def text(image: bytearray, start: int = 0, count: int = 4) -> str:
    return "".join(chr(image[sector * SECTOR] or ord(".")) for sector in range(start, start + count))


def outcomes(d: SimDisk, style: str | None = None, draws: int = 400) -> set[str]:
    return {text(d.survive(random.Random(f"{style}{draw}"), style)) for draw in range(draws)}


def test_a_write_not_flushed_is_kept_dropped_or_torn_by_sector() -> None:
    d = disk()
    do(d, write(d, 0, "ab"))
    assert text(d.now) == "ab.."
    assert outcomes(d) == {"....", "a...", ".b..", "ab.."}
    assert outcomes(d, "drop") == {"...."}
    assert outcomes(d, "keep") == {"ab.."}
    assert outcomes(d, "whole") == {"....", "ab.."}


def test_a_flush_makes_durable_what_was_answered_before_it_was_submitted() -> None:
    d = disk()
    do(d, write(d, 0, "a"))
    flush = Io(FLUSH, 0, 0, 0)
    d.begin(flush)
    do(d, write(d, 1, "b"))
    assert "...." in outcomes(d)
    d.finish(flush)
    assert outcomes(d) == {"a...", "ab.."}


def test_fua_is_durable_and_says_nothing_of_earlier_writes() -> None:
    d = disk()
    do(d, write(d, 0, "a"))
    do(d, write(d, 1, "b", FUA))
    assert outcomes(d) == {".b..", "ab.."}


def test_an_older_write_does_not_come_back_over_a_fua_write() -> None:
    d = disk()
    do(d, write(d, 0, "aaa"))
    do(d, write(d, 1, "b", FUA))
    assert {found[1] for found in outcomes(d)} == {"b"}


def test_preflush_is_there_before_the_data() -> None:
    d = disk()
    do(d, write(d, 0, "a"))
    io = write(d, 1, "b", PREFLUSH | FUA)
    d.begin(io)
    assert outcomes(d) == {"....", "a...", "ab.."}
    d.finish(io)
    assert outcomes(d) == {"ab.."}


def test_what_is_in_flight_may_be_there_partly() -> None:
    d = disk()
    d.begin(write(d, 0, "ab", FUA))
    assert outcomes(d) == {"....", "a...", ".b..", "ab.."}
    assert text(d.now) == "...."


def test_overwritten_pending_data_comes_back_as_any_of_its_versions() -> None:
    d = disk()
    do(d, write(d, 0, "a"))
    do(d, write(d, 0, "b"))
    assert text(d.now) == "b..."
    assert outcomes(d) == {"....", "a...", "b..."}


def test_the_atomic_unit_is_never_torn() -> None:
    d = disk(atomic=2)
    do(d, write(d, 0, "abcd"))
    assert outcomes(d) == {"....", "ab..", "..cd", "abcd"}
    with pytest.raises(SimError, match="aligned"):
        d.begin(write(d, 1, "ab"))


def test_every_style_is_reproducible() -> None:
    for style in STYLES:
        images = []
        for _ in range(2):
            d = disk()
            for sector in range(0, 12, 2):
                do(d, write(d, sector, "xy"))
            d.begin(write(d, 12, "zz"))
            images.append(d.survive(random.Random(style), style))
        assert images[0] == images[1]


def test_a_discarded_range_is_zeros_or_old_until_written() -> None:
    seen = set()
    for seed in range(40):
        d = disk(seed=str(seed))
        do(d, write(d, 0, "ab", FUA))
        do(d, Io(DISCARD, 0, 0, 2))
        seen.add(text(d.now))
    assert seen == {"ab..", "....", "a...", ".b.."}


def test_errors_on_demand() -> None:
    d = disk()
    d.fail_ios[2] = EIO
    assert do(d, write(d, 0, "a")).error == 0
    assert do(d, Io(FLUSH, 0, 0, 0)).error == EIO
    assert "...." in outcomes(d), "a failed flush flushes nothing"
    d.bad_sectors.add(3)
    buf = bytearray(2 * SECTOR)
    assert do(d, Io(READ, 0, 2, 2, buf)).error == EIO
    assert bytes(buf) != bytes(2 * SECTOR)
    assert do(d, Io(READ, 0, 0, 2, buf)).error == 0
    d.gone_from = d.serial + 1
    assert do(d, Io(READ, 0, 0, 2, buf)).error == EIO


def test_a_failed_write_may_have_written_parts() -> None:
    seen = set()
    for seed in range(40):
        d = disk(seed=str(seed))
        d.fail_ios[1] = EIO
        do(d, write(d, 0, "ab"))
        seen.add(text(d.now))
    assert seen == {"ab..", "....", "a...", ".b.."}


def test_a_buffer_that_changes_in_flight_is_a_bug() -> None:
    d = disk()
    buf = bytearray(b"a" * SECTOR)
    io = Io(WRITE, 0, 0, 1, buf)
    d.begin(io)
    buf[0] = 0
    with pytest.raises(SimError, match="changed"):
        d.finish(io)
