# SPDX-License-Identifier: GPL-2.0-only
"""The harness itself, with the kernel on both sides: what it says of a good set is good, and of a bad one bad."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.acceptance import Acceptance, acceptance_of_run
from tests.conftest import copy_sparse
from tests.stamps import draw
from tests.vm import machine
from tests.vm.kernel_side import Visit, plan_for

SIZE_BYTES = (48 << 20) - 8192


def test_registers_writes_and_stops(golden: Callable[..., Path], tmp_path: Path) -> None:
    story = golden("fresh", writable=True)
    visit = Visit(tmp_path / "job", cache=story / "cache.img", backings=[story / "back0.img"])
    visit.register()
    visit.step("yes stamped | head -c 65536 >/job/written\n"
               "dd if=/job/written of=/dev/$volume0 bs=64k conv=fsync 2>/dev/null")
    visit.facts()
    visit.copy_out()
    visit.stop()
    seen = visit.run()
    assert seen.contents[0] == b"stamped\n" * 8192 + bytes(SIZE_BYTES - 65536)
    assert "register_cache() registered cache device vda" in seen.result.dmesg
    assert seen.result.complaints() == []
    assert "0:16 len " in (seen.result.share / "facts" / "btree.txt").read_text(), "the first key starts at data_offset"
    assert "cache_mode\t[writethrough]" in (seen.result.share / "facts" / "sysfs.tsv").read_text()


def test_golden_content_is_what_the_truth_says(golden: Callable[..., Path], tmp_path: Path) -> None:
    story = golden("two_backing", writable=True)
    visit = Visit(tmp_path / "job", cache=story / "cache.img", backings=[story / "back0.img", story / "back1.img"])
    visit.register()
    visit.copy_out()
    visit.stop()
    seen = visit.run()
    for number, content in enumerate(seen.contents):
        truth = json.loads((golden("two_backing") / f"truth{number}.json").read_text())
        assert len(content) == truth["device_bytes"]
        assert hashlib.sha256(content).hexdigest() == truth["sha256"]
    assert seen.result.complaints() == []


@pytest.mark.parametrize("series", ["6.12", "6.1"])
def test_killed_kernel_is_judged(golden: Callable[..., Path], tmp_path: Path, series: str) -> None:
    story = golden("fresh", writable=True)
    plan = plan_for(31, SIZE_BYTES)
    visit = Visit(tmp_path / "write", series=series, cache=story / "cache.img", backings=[story / "back0.img"])
    visit.register()
    visit.set_mode("writeback")
    visit.write(plan)
    killed = visit.run_and_kill(after_writes=300)
    assert killed.last_acknowledged >= 299
    assert killed.result.status is None
    assert killed.result.complaints() == []
    acceptance = acceptance_of_run(draw(**plan), seed=31, last_acknowledged=killed.last_acknowledged,
                                   acceptance=Acceptance(SIZE_BYTES))
    assert acceptance.completed_flushes() > 1

    old = tmp_path / "old"
    old.mkdir()
    copy_sparse(story / "back0.img", old / "back0.img")
    visit = Visit(tmp_path / "read", series=series, cache=story / "cache.img", backings=[story / "back0.img"])
    visit.register()
    visit.copy_out()
    visit.stop()
    seen = visit.run()
    assert acceptance.judge(seen.contents[0]) == []
    assert seen.result.complaints() == []
    # The backing device alone has not got the dirty data: the judge sees that.
    assert acceptance.judge((old / "back0.img").read_bytes()[8192:])


RESTARTS = """
for round in $(seq 12); do
    register /dev/vda /dev/vdb
    wait_for 60 test -b /dev/bcache0
    dd if=/dev/urandom of=/dev/bcache0 bs=64k count=4 seek=$round conv=fsync 2>/dev/null
    echo 1 >/sys/block/bcache0/bcache/stop
    echo 1 >$(cset)/stop
    until no_set; do true; done
done
"""


def test_a_set_that_is_gone_can_be_registered_at_once(golden: Callable[..., Path], tmp_path: Path) -> None:
    story = golden("gen_churn", writable=True)
    done = machine.run(RESTARTS, [story / "cache.img", story / "back0.img"], tmp_path / "job")
    assert done.check().complaints() == []


def test_a_bad_set_fails_the_job(golden: Callable[..., Path], tmp_path: Path) -> None:
    story = golden("dirty_crash", writable=True)
    with (story / "cache.img").open("r+b") as file:
        file.seek(4096 + 16)
        file.write(b"\xff" * 8)
    done = machine.run("echo one\nregister /dev/vda\necho two", [story / "cache.img"], tmp_path / "job", timeout_s=120)
    assert done.status == 1
    assert done.stdout.startswith("one\n")
    assert "FAIL: register /dev/vda" in done.stdout
    assert "two" not in done.stdout
    assert done.complaints()
    with pytest.raises(AssertionError, match="job ended with 1"):
        done.check()


SORTS = """
import numpy as np
for count in (10, 1000, 100000):
    drawn = np.random.default_rng(count).integers(0, 1 << 62, count, dtype=np.uint64)
    found = drawn[np.argsort(drawn)]
    assert (found[1:] >= found[:-1]).all(), count
    assert found.tolist() == sorted(drawn.tolist()), count
"""


def test_numpy_sorts_as_it_should(tmp_path: Path) -> None:
    """An emulated processor may have flaws that no other has, and the engine in there sorts with numpy."""
    machine.run(f"host {sys.executable} -c '{SORTS}'", [], tmp_path / "job", timeout_s=200, host=True).check()


def test_complaints_tell_news_from_alarms() -> None:
    news = ("[ 3.8] bcache: run_cache_set() invalidating existing data\n"
            "[ 3.9] bcache: register_bdev() registered backing device vdb\n"
            "[ 3.5] bcache: bch_journal_replay() journal replay done, 0 keys in 2 entries, seq 4\n[ 1.0] loop: ok\n")
    assert machine.complaints(news) == []
    for alarm in ("bcache: bch_count_io_errors() vda: IO error on writing btree.", "WARNING: CPU: 0 PID: 1 at x.c:1",
                  "bcache: prio_read() bad csum reading priorities", "I/O error, dev vda, sector 8"):
        assert machine.complaints(news + "[ 4.0] " + alarm) == ["[ 4.0] " + alarm]
