# SPDX-License-Identifier: GPL-2.0-only
"""T22: numbers, words and texts given to tunables are taken, clamped or refused as the kernel's sysfs does it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from bcachectl.engine.tunables import TRIGGERS, TUNABLES
from bcachectl.errors import Refused, UsageError, WrongState
from bcachectl.ondisk.superblock import SB_BYTES, SB_SECTOR, CacheMode, Replacement, decode_superblock
from tests.sim.world import SECTOR, Backing, Setup, World

U32_MAX = (1 << 32) - 1


@pytest.fixture
def w() -> Iterator[World]:
    world = World(Setup(backings=(Backing(), Backing(member=False))), "tunables")
    world.run(world.up(), "up")
    yield world
    world.run(world.cset.stop(), "stop")


def put(w: World, target: str, name: str, text: str) -> str:
    stored: str = w.run(w.cset.tunables.set(target, name, text), "set")
    return stored


@pytest.mark.parametrize(("text", "why"), [
    ("4M", "not a plain decimal"), ("0x10", "not a plain decimal"), (" 5", "not a plain decimal"),
    ("5 ", "not a plain decimal"), ("-1", "not a plain decimal"), ("", "not a plain decimal"),
    ("5\n\n", "not a plain decimal"), ("++5", "not a plain decimal"), ("٣", "not a plain decimal"),
    (str(1 << 64), "larger than 2"),
])
def test_t22_what_is_no_number_is_refused(w: World, text: str, why: str) -> None:
    for target, name in (("bcache0", "writeback_percent"), ("bcache0", "writeback_running"), ("", "journal_delay_ms")):
        before = w.cset.tunables.get(target, name)
        with pytest.raises(UsageError, match=f"{name}: .*{why}"):
            put(w, target, name, text)
        assert w.cset.tunables.get(target, name) == before


@pytest.mark.parametrize(("target", "name", "text", "stored"), [
    ("bcache0", "sequential_cutoff", "010", "10"),
    ("bcache0", "sequential_cutoff", "+7\n", "7"),
    ("bcache0", "sequential_cutoff", str((1 << 64) - 1), str(U32_MAX)),
    ("bcache0", "writeback_percent", "41", "40"),
    ("bcache0", "writeback_rate", "0", "1"),
    ("bcache0", "writeback_rate", str(1 << 40), str((1 << 31) - 1)),
    ("bcache0", "writeback_rate_update_seconds", "61", "60"),
    ("bcache0", "writeback_rate_update_seconds", "0", "1"),
    ("bcache0", "writeback_rate_minimum", "0", "1"),
    ("bcache0", "writeback_rate_fp_term_low", "1000", "9"),
    ("bcache0", "writeback_rate_fp_term_mid", "1", "2"),
    ("bcache0", "writeback_rate_fp_term_mid", "5000", "999"),
    ("bcache0", "writeback_rate_fp_term_high", "3", "11"),
    ("bcache0", "io_error_limit", str(U32_MAX), str((1 << 31) - 1)),
    ("bcache0", "writeback_running", "2", "1"),
    ("bcache0", "io_disable", "0", "0"),
    ("", "journal_delay_ms", "70000", "65535"),
    ("", "io_error_halflife", "100", "88"),
    ("", "io_error_halflife", "1000", "968"),
    ("", "congested_read_threshold_us", str(1 << 33), str(U32_MAX)),
    ("", "gc_after_writeback", "5", "1"),
    ("", "copy_gc_enabled", "7", "1"),
    ("", "cutoff_writeback", "0", "40"),
    ("", "cutoff_writeback", "99", "70"),
    ("", "cutoff_writeback_sync", "0", "70"),
    ("", "cutoff_writeback_sync", "100", "90"),
])
def test_t22_out_of_range_is_clamped_and_what_was_stored_is_told(w: World, target: str, name: str, text: str,
                                                                 stored: str) -> None:
    assert put(w, target, name, text) == stored


def test_t22_words(w: World) -> None:
    for text in ("Writeback", "write", " writeback", "writeback\n\n", ""):
        with pytest.raises(UsageError, match=r"cache_mode: .* is none of writethrough, writeback, writearound, none"):
            put(w, "bcache0", "cache_mode", text)
    assert put(w, "bcache0", "cache_mode", "writearound\n") == "writearound"
    assert w.cset.tunables.get("bcache0", "cache_mode") == "writethrough writeback [writearound] none"


def test_labels(w: World) -> None:
    assert put(w, "bcache0", "label", "x" * 31 + "\n") == "x" * 31
    assert put(w, "bcache0", "label", "y" * 32) == "y" * 32
    with pytest.raises(UsageError, match="at most 32"):
        put(w, "bcache0", "label", "z" * 32 + "\n")
    assert put(w, "bcache0", "label", "ä\n") == "ä"
    assert w.superblock(0).label_text == "ä"
    # An argument in the encoding of another day.
    assert put(w, "bcache0", "label", "\udce4") == "\\xe4"
    assert w.superblock(0).label.startswith(b"\xe4\0")


def test_what_is_on_disk_after_it_was_set(w: World) -> None:
    put(w, "bcache0", "cache_mode", "none")
    put(w, "", "cache_replacement_policy", "fifo")
    put(w, "", "cache0/discard", "1")
    assert w.superblock(0).cache_mode == CacheMode.NONE
    raw = bytes(w.disks[0].durable[SB_SECTOR * SECTOR:SB_SECTOR * SECTOR + SB_BYTES])
    sb = decode_superblock(raw)
    assert sb.replacement == Replacement.FIFO
    assert sb.discard
    assert w.cset.tunables.get("", "cache_replacement_policy") == "lru [fifo] random"
    assert w.cset.alloc.replacement == Replacement.FIFO


def test_the_lower_cutoff_is_never_above_the_upper(w: World) -> None:
    assert put(w, "", "cutoff_writeback", "60") == "60"
    assert put(w, "", "cutoff_writeback_sync", "50") == "50"
    assert w.cset.tunables.get("", "cutoff_writeback") == "50"
    assert put(w, "bcache0", "writeback_percent", "100") == "50"


def test_writeback_running_needs_something_attached(w: World) -> None:
    assert put(w, "bcache1", "writeback_running", "1") == "0"
    assert w.cset.tunables.get("bcache1", "writeback_running") == "0"
    assert put(w, "bcache0", "writeback_running", "1") == "1"


def test_what_would_lose_the_cache_is_refused(w: World) -> None:
    with pytest.raises(Refused, match="lose everything"):
        put(w, "", "synchronous", "0")
    assert put(w, "", "synchronous", "1") == "1"
    with pytest.raises(UsageError, match="cannot make the kernel panic"):
        put(w, "", "errors", "panic")


@pytest.mark.parametrize(("target", "name", "why"), [
    ("", "nonsense", "no tunable or attribute of a set"),
    ("", "writeback_percent", "belongs to a volume"),
    ("bcache0", "journal_delay_ms", "belongs to a set"),
    ("bcache0", "attach", "`bcachectl attach` does that"),
    ("", "unregister", "`bcachectl detach` does that"),
    ("bcache0", "state", "can only be read"),
    ("", "internal/cache_read_races", "can only be read"),
    ("bcache0", "stats_total/cache_hits", "can only be read"),
])
def test_a_name_that_does_not_fit_is_told_why(w: World, target: str, name: str, why: str) -> None:
    with pytest.raises(UsageError, match=why):
        put(w, target, name, "1")


def test_unknown_volume(w: World) -> None:
    with pytest.raises(WrongState, match="bcache7 is no volume"):
        w.cset.tunables.get("bcache7", "state")


def test_a_read_only_engine_writes_no_superblock(w: World) -> None:
    w.cset.options.read_only = True
    with pytest.raises(WrongState, match="writes nothing"):
        put(w, "bcache0", "cache_mode", "none")
    w.cset.options.read_only = False


def test_everything_can_be_read_and_every_row_lives_somewhere(w: World) -> None:
    tunables = w.cset.tunables
    w.run(w.cset.volume_create(64 << 10), "flash")
    for target in ("", "bcache0", "bcache1", "bcache2"):
        for name in tunables.names(target):
            assert isinstance(tunables.get(target, name), str)
    for scope, target in (("set", ""), ("volume", "bcache0")):
        for name, row in TUNABLES[scope].items():
            if row.kind in ("U", "B") and name not in ("synchronous", "io_disable"):
                # What is stored is what is read, in the unit of the input, whatever the file shows.
                stored = put(w, target, name, "3")
                assert put(w, target, name, stored) == stored


def test_the_kernels_form_of_sizes(w: World) -> None:
    get = w.cset.tunables.get
    assert get("bcache0", "sequential_cutoff") == "4.0M"
    assert get("bcache0", "writeback_rate") == "512.0k"
    assert get("", "bucket_size") == "4.0k"
    assert get("", "internal/feature_incompat") == "large_bucket"
    assert get("bcache0", "dirty_data") == "0.0k"
    assert get("bcache0", "state") == "clean"
    assert get("", "priority_stats").startswith("Unused:\t\t")
    assert get("bcache0", "writeback_rate_debug").startswith("rate:\t\t512.0k/sec\ndirty:\t\t0.0k\n")


def test_triggers(w: World) -> None:
    w.run(w.read(0, 0, 8, nowait=False), "read")
    assert w.cset.tunables.get("bcache0", "stats_total/cache_misses") == "1"
    assert w.cset.tunables.get("", "stats_total/cache_misses") == "1"
    put(w, "bcache0", "clear_stats", "anything")
    assert w.cset.tunables.get("bcache0", "stats_total/cache_misses") == "0"
    runs = w.cset.gc.runs
    put(w, "", "trigger_gc", "1")
    w.run(w.sleep(2000), "gc")
    assert w.cset.gc.runs == runs + 1
    assert set(TRIGGERS) == {"set", "volume", "flash"}
