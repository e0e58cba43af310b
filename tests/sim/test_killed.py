# SPDX-License-Identifier: GPL-2.0-only
"""What was acknowledged is there for the engine that comes after a SIGKILL, without any flush.

A killed engine is a crash in which the devices keep all that they ever answered, and the tail what is in it; only what
the engine had in memory is lost.  A client of a ublk device does not see such a crash, so to it an old sector would be
corruption.
"""

from __future__ import annotations

import random

import pytest

from bcachectl.engine.front import REQ_DISCARD, REQ_FUA, REQ_READ, REQ_WRITE, REQ_WRITE_ZEROES
from bcachectl.errors import WrongState
from tests.sim.power import drain
from tests.sim.world import Setup, World

OLD, NEW, ZEROES = b"o" * 4096, b"n" * 4096, bytes(4096)
SECTOR = 64


async def ask(w: World, operation: int, data: bytes | bytearray, flags: int = 0, *, volume: int = 0) -> None:
    buf = None if operation in (REQ_WRITE_ZEROES, REQ_DISCARD) else data
    assert await w._ask(volume, operation, SECTOR, 8, buf, flags, 0) == 0


def read_after_kill(w: World, *, has_tail: bool = True) -> bytes:
    """What the next engine reads, if this one is killed now."""
    after = w.kill("after", random.Random(1)) if has_tail else w.revive(
        "after", images=[bytearray(disk.now) for disk in w.disks])
    buf = bytearray(4096)

    async def story() -> None:
        await after.up()
        await ask(after, REQ_READ, buf)

    after.run(story())
    return bytes(buf)


@pytest.mark.parametrize("old_mode", ["writeback", "writethrough"])
@pytest.mark.parametrize("mode", ["writeback", "writethrough", "writearound", "none"])
@pytest.mark.parametrize("operation", [REQ_WRITE, REQ_WRITE_ZEROES])
def test_what_was_acknowledged_survives_the_engine(operation: int, mode: str, old_mode: str) -> None:
    w = World(Setup(), f"killed {operation} {mode} {old_mode} b")

    async def story() -> None:
        await w.up()
        await w.tune("bcache0", "cache_mode", old_mode)
        await ask(w, REQ_WRITE, OLD, REQ_FUA)
        await w.tune("bcache0", "cache_mode", mode)
        await ask(w, operation, NEW)

    w.run(story())
    assert read_after_kill(w) == (NEW if operation == REQ_WRITE else ZEROES)
    assert read_after_kill(w, has_tail=False) == OLD, "else the key were on the device, and this test proved nothing"


@pytest.mark.parametrize("operation", [REQ_WRITE, REQ_WRITE_ZEROES])
def test_on_a_flash_only_volume(operation: int) -> None:
    w = World(Setup(backings=()), f"killed flash {operation}")

    async def story() -> None:
        await w.up()
        await w.flash_create(0, 1024)
        await ask(w, REQ_WRITE, OLD, REQ_FUA)
        await ask(w, operation, NEW)

    w.run(story())
    assert read_after_kill(w) == (NEW if operation == REQ_WRITE else ZEROES)


def test_of_writes_that_came_together() -> None:
    w = World(Setup(bucket_sectors=32), "killed group")

    async def story() -> None:
        await w.up()
        await ask(w, REQ_WRITE, OLD, REQ_FUA)
        await w.write_group(0, [(SECTOR, 8), (SECTOR + 16, 4)])

    w.run(story())
    assert read_after_kill(w) != OLD
    assert read_after_kill(w, has_tail=False) == OLD


def test_of_writes_whose_data_an_export_wrote() -> None:
    w = World(Setup(bucket_sectors=32), "killed exported")

    async def story() -> None:
        await w.up()
        await ask(w, REQ_WRITE, OLD, REQ_FUA)
        await w.write_exported(0, [(SECTOR, 8), (SECTOR + 16, 4)])
        assert w.exported_writes == 2

    w.run(story())
    assert read_after_kill(w) != OLD
    assert read_after_kill(w, has_tail=False) == OLD


def test_someone_else_ran_the_set_in_between() -> None:
    """His engine knew nothing of the tail, so what is in it does not fit any more."""
    w = World(Setup(bucket_sectors=32), "killed and run")

    async def story() -> None:
        await w.up()
        await ask(w, REQ_WRITE, OLD, REQ_FUA)
        await ask(w, REQ_WRITE, NEW)

    w.run(story())
    other = w.revive("other", images=[bytearray(disk.now) for disk in w.disks])
    other.run(other.up())
    other.run(other.cset.stop())
    drain(other)
    again = World(w.setup, "again", images=[disk.now for disk in other.disks], tail=bytearray(w.tail.memory))
    with pytest.raises(WrongState, match="something else has run the set since"):
        again.run(again.up())
