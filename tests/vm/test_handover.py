# SPDX-License-Identifier: GPL-2.0-only
"""Engine and kernel take turns on one set, and each is killed in the middle of writing (traps.md, T7 and T8).

In each cache mode, with the same files all the way:

1. the engine writes and is killed with SIGKILL;
2. the kernel registers the set, reads all of it, writes, and its machine is killed;
3. the engine reads all of it, writes, and is killed again;
4. the kernel reads all of it and stops in good order;
5. the engine reads the same once more, and stops in good order.

After each kill every sector must hold what the last completed flush settled, or what a later write put there, and the
kernel's log must have no complaint.  The caches are smaller than the volumes, so buckets are reused all the time.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.acceptance import Acceptance, acceptance_of_run
from tests.export.engine import Engine
from tests.nbd_client import NbdClient
from tests.stamps import draw
from tests.vm.engine_side import bcachectl, engine_on
from tests.vm.kernel_side import Visit, plan_for
from tests.writer import write_plan

DATA_OFFSET_BYTES = 8192
BACKING_BYTES = 40 << 20
SIZE_BYTES = BACKING_BYTES - DATA_OFFSET_BYTES


@dataclass(frozen=True)
class Case:
    """One set's shape, its mode, and how far the writers come before they are killed."""

    mode: str
    bucket: str
    block: str
    cache_bytes: int
    first_kill: int
    second_kill: int
    series: str = "6.12"

    def __str__(self) -> str:
        return f"{self.mode}-{self.series}"


CASES = [
    Case("writeback", "64k", "4k", 44 << 20, first_kill=900, second_kill=350),
    Case("writethrough", "16k", "4k", 24 << 20, first_kill=1500, second_kill=300),
    Case("writearound", "16k", "512", 12 << 20, first_kill=700, second_kill=250),
    Case("none", "32k", "4k", 20 << 20, first_kill=500, second_kill=200),
    Case("writeback", "16k", "4k", 14 << 20, first_kill=1200, second_kill=300, series="6.1"),
]


@dataclass
class Handed:
    """The set that goes from hand to hand."""

    cache: Path
    backing: Path
    case: Case
    directory: Path

    def engine(self) -> Engine:
        """The engine on the set, reading and writing."""
        return engine_on(self.directory, self.cache, [self.backing], "--set", f"cache_mode={self.case.mode}")

    def visit(self, name: str) -> Visit:
        """A boot of the kernel on the set."""
        return Visit(self.directory / name, cache=self.cache, backings=[self.backing], series=self.case.series)

    def engine_writes_until_killed(self, engine: Engine, acceptance: Acceptance, seed: int) -> None:
        """The engine is killed after ``first_kill`` acknowledged writes, with eight requests in flight."""
        plan = draw(**plan_for(seed, SIZE_BYTES, reads=0.3, hot=0.3))
        ended = write_plan(NbdClient(engine.socket()), plan, acceptance, seed=seed, fua=0.04,
                           stop_after=self.case.first_kill, on_write=engine.kill)
        assert not ended, "the plan came to its end before the kill"
        assert acceptance.acknowledged_writes() >= self.case.first_kill
        assert acceptance.completed_flushes() > 3


def format_set(case: Case, directory: Path) -> Handed:
    """A new set made by ``bcachectl format``."""
    cache, backing = directory / "cache.img", directory / "backing.img"
    for path, size_bytes in ((cache, case.cache_bytes), (backing, BACKING_BYTES)):
        with path.open("wb") as file:
            file.truncate(size_bytes)
    bcachectl("format", "--cache", cache, "--backing", backing, "--bucket-size", case.bucket,
              "--block-size", case.block, directory=directory)
    return Handed(cache, backing, case, directory)


def key_lines(dump: str) -> list[str]:
    """The keys of a dump; the kernel's file has zero bytes between its buffers."""
    return [line for line in dump.replace("\0", "").splitlines() if line]


@pytest.mark.timeout(600)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_t7_t8_three_handovers_in_a_row(case: Case, tmp_path: Path) -> None:
    handed = format_set(case, tmp_path)

    acceptance = Acceptance(SIZE_BYTES)
    with handed.engine() as engine:
        handed.engine_writes_until_killed(engine, acceptance, seed=1)

    # Small requests: a kernel whose cache is full of them waits seconds for each pass of its gc, and this is emulated.
    plan = plan_for(2, SIZE_BYTES, reads=0.3, hot=0.3, max_kib=12)
    visit = handed.visit("kernel-writes")
    visit.register()
    visit.copy_out()
    visit.set_mode(case.mode)
    visit.write(plan)
    seen = visit.run_and_kill(after_writes=case.second_kill)
    assert acceptance.judge(seen.contents[0]) == [], "engine killed, kernel reads"
    assert seen.result.complaints() == []

    acceptance = acceptance_of_run(draw(**plan), seed=2, last_acknowledged=seen.last_acknowledged,
                                   acceptance=acceptance.carry_over(seen.contents[0]))
    with handed.engine() as engine:
        content = NbdClient(engine.socket()).read_all()
        assert acceptance.judge(content) == [], "kernel killed, engine reads"
        acceptance = acceptance.carry_over(content)
        handed.engine_writes_until_killed(engine, acceptance, seed=3)

    ours = bcachectl("dump", "btree", "--format=kernel", handed.cache, directory=tmp_path)
    visit = handed.visit("kernel-reads")
    visit.register_cache()
    visit.register()
    visit.copy_out()
    visit.stop()
    seen = visit.run()
    theirs = (seen.result.share / "btree.txt").read_text()
    assert key_lines(theirs) == key_lines(ours), "T4: after the engine was killed the kernel holds the keys that we see"
    assert acceptance.judge(seen.contents[0]) == [], "engine killed again, kernel reads"
    assert seen.result.complaints() == []

    with handed.engine() as engine:
        content = NbdClient(engine.socket()).read_all()
        assert acceptance.carry_over(seen.contents[0]).judge(content) == [], "kernel stopped, engine reads"
        assert engine.stop() == 0


@pytest.mark.timeout(400)
def test_t7_two_backing_devices_and_flash_only_volumes(tmp_path: Path) -> None:
    """One set with everything, killed while the last volume is written: the kernel has all of it."""
    cache, backings = tmp_path / "cache.img", [tmp_path / "back0.img", tmp_path / "back1.img"]
    flash_bytes = [6 << 20, 3 << 20]
    for path, size_bytes in ((cache, 64 << 20), (backings[0], 24 << 20), (backings[1], 16 << 20)):
        with path.open("wb") as file:
            file.truncate(size_bytes)
    bcachectl("format", "--cache", cache, "--backing", *backings, "--bucket-size", "32k", "--block-size", "4k",
              "--cache-mode", "writeback", directory=tmp_path)
    sizes = [(24 << 20) - DATA_OFFSET_BYTES, (16 << 20) - DATA_OFFSET_BYTES, *flash_bytes]
    judges = [Acceptance(size_bytes) for size_bytes in sizes]
    with engine_on(tmp_path, cache, backings, "--debug-checks") as engine:
        for size_bytes in flash_bytes:
            bcachectl("volume", "create", cache, f"{size_bytes >> 20}M", directory=tmp_path,
                      runtime=Path(engine.runtime.name))
        for number, size_bytes in enumerate(sizes):
            plan = plan_for(10 + number, size_bytes, ops=400, max_kib=48)
            is_last = number == len(sizes) - 1
            client = NbdClient(engine.socket(), f"bcache{number}")
            assert client.size_bytes == size_bytes
            ended = write_plan(client, draw(**plan), judges[number], seed=10 + number, fua=0.05,
                               stop_after=200 if is_last else None, on_write=engine.kill)
            assert ended is not is_last
    visit = Visit(tmp_path / "kernel-reads", cache=cache, backings=backings, flash_bytes=flash_bytes)
    visit.register()
    visit.copy_out()
    visit.stop()
    seen = visit.run()
    for judge, content in zip(judges, seen.contents, strict=True):
        assert judge.judge(content) == []
        assert judge.completed_flushes() > 2
    assert seen.result.complaints() == []
