# SPDX-License-Identifier: GPL-2.0-only
"""REQ_STABLE: what was acknowledged is there for the engine that comes after a SIGKILL, without any flush.

A killed engine is a crash in which the devices keep all that they ever answered; only what the engine had in memory is
lost.  A client of a ublk device does not see such a crash, so to it an old sector would be corruption.
"""

from __future__ import annotations

import pytest

from bcachectl.engine.front import REQ_DISCARD, REQ_FUA, REQ_READ, REQ_STABLE, REQ_WRITE, REQ_WRITE_ZEROES
from tests.sim.world import Setup, World

OLD, NEW, ZEROES = b"o" * 4096, b"n" * 4096, bytes(4096)
SECTOR = 64


async def ask(w: World, operation: int, data: bytes | bytearray, flags: int = 0, *, volume: int = 0) -> None:
    buf = None if operation in (REQ_WRITE_ZEROES, REQ_DISCARD) else data
    assert await w._ask(volume, operation, SECTOR, 8, buf, flags, 0) == 0


def read_after_kill(w: World) -> bytes:
    """What the next engine reads, if this one is killed now."""
    after = w.revive("after", images=[bytearray(disk.now) for disk in w.disks])
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
    found = {}
    for flags in (0, REQ_STABLE):
        w = World(Setup(), f"stable {operation} {mode} {old_mode}")

        async def story(w: World = w, flags: int = flags) -> None:
            await w.up()
            await w.tune("bcache0", "cache_mode", old_mode)
            await ask(w, REQ_WRITE, OLD, REQ_FUA)
            await w.tune("bcache0", "cache_mode", mode)
            await ask(w, operation, NEW, flags)

        w.run(story())
        found[flags] = read_after_kill(w)
    new = NEW if operation == REQ_WRITE else ZEROES
    assert found[REQ_STABLE] == new
    assert found[0] == OLD, "without the flag the key is in memory only, and this test would prove nothing"


@pytest.mark.parametrize("operation", [REQ_WRITE, REQ_WRITE_ZEROES])
def test_on_a_flash_only_volume(operation: int) -> None:
    w = World(Setup(backings=()), f"stable flash {operation}")

    async def story() -> None:
        await w.up()
        await w.flash_create(0, 1024)
        await ask(w, REQ_WRITE, OLD, REQ_FUA)
        await ask(w, operation, NEW, REQ_STABLE)

    w.run(story())
    assert read_after_kill(w) == (NEW if operation == REQ_WRITE else ZEROES)


def test_of_writes_that_came_together() -> None:
    found = {}
    for stable in (False, True):
        w = World(Setup(bucket_sectors=32), "stable group")

        async def story(w: World = w, stable: bool = stable) -> None:
            await w.up()
            await ask(w, REQ_WRITE, OLD, REQ_FUA)
            await w.write_group(0, [(SECTOR, 8), (SECTOR + 16, 4)], stable=stable)

        w.run(story())
        found[stable] = read_after_kill(w)
    assert found[True] != OLD
    assert found[False] == OLD, "without the flag the keys are in memory only, and this test would prove nothing"


def test_of_writes_whose_data_an_export_wrote() -> None:
    w = World(Setup(bucket_sectors=32), "stable exported")

    async def story() -> None:
        await w.up()
        await ask(w, REQ_WRITE, OLD, REQ_FUA)
        await w.write_exported(0, [(SECTOR, 8), (SECTOR + 16, 4)])
        assert w.exported_writes == 2

    w.run(story())
    assert read_after_kill(w) != OLD
