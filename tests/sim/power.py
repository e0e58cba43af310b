# SPDX-License-Identifier: GPL-2.0-only
"""Power fails at point 1, 2, 3 ... of a `Story`, and what must be true afterwards.

A point is the moment before an Io is answered.  For every point that is asked for, and every *draw* of what the disks
kept:

1. a backing device whose superblock says clean or none is judged by itself, without its cache;
2. the bytes of the cache device are judged offline (`tests.sim.image`), by code that shares nothing with the engine;
   some also by the walk of the offline commands, and served by a read-only engine that must not write;
3. a fresh engine recovers, and what was written is read and judged, sometimes twice;
4. some have power fail again, during that recovery or in the requests that follow it; some are stopped cleanly and
   started again.

At a third of the points the engine is killed as well (`kill`), which to clients is a pause: every write that was
acknowledged must be there.

When the story has finished the set is stopped cleanly, started again and read in full.
"""

from __future__ import annotations

import random
import traceback
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass

from bcachectl.engine.sched import READ, Io
from tests.sim import image
from tests.sim.world import FLASH, Setup, SimFailure, World

Choose = Callable[[int], Iterable[int]]


@dataclass(frozen=True)
class Story:
    """``prepare`` runs without points (None: the set comes up and is idle), ``body`` with them."""

    name: str
    setup: Setup
    body: Callable[[World], Awaitable[None]]
    prepare: Callable[[World], Awaitable[None]] | None = None
    boots: bool = True
    """The set is brought up before the story; else the story does that itself."""
    ends: bool = True
    """The set still runs when the story is over."""


@dataclass
class Tally:
    """What a run did."""

    points: int = 0
    recoveries: int = 0
    second: int = 0
    stops: int = 0
    kills: int = 0


KILL_SHARE = 1 / 3
"""At this part of the points the engine is killed as well."""


class Stopped(Exception):
    """Power failed in a nested run."""


def build(story: Story, seed: int, *, mutate: Callable[[Io], bool] | None = None) -> World:
    """The world of a story when its preparation is over."""
    world = World(story.setup, f"{story.name}/{seed}")
    world.mutate = mutate
    if story.boots:
        world.run(world.up(), "up")
    if story.prepare is not None:
        world.run(_call(story.prepare, world), "prepare")
    return world


async def _call(function: Callable[[World], Awaitable[None]], world: World) -> None:
    await function(world)


def run_story(story: Story, seed: int, choose: Choose, *, mutate: Callable[[Io], bool] | None = None) -> Tally:
    """Run a story once; at point n power fails once for each draw in ``choose(n)``."""
    tally = Tally()
    where = f"story={story.name} seed={seed}"
    try:
        world = build(story, seed, mutate=mutate)
    except Exception as error:
        raise SimFailure(f"{where} while preparing: {text_of(error)}") from error

    def point(number: int) -> None:
        tally.points += 1
        for draw in choose(number):
            crash(world, f"{where} io={number} draw={draw}", tally)
            if random.Random(f"{where} io={number} draw={draw} kill?").random() < KILL_SHARE:
                kill(world, f"{where} io={number} draw={draw} kill", tally)

    world.on_point = point
    try:
        world.run(_call(story.body, world))
    except SimFailure:
        raise
    except Exception as error:
        raise SimFailure(f"{where} io={world.points}: the story itself: {text_of(error)}") from error
    for draw in choose(world.points + 1):
        crash(world, f"{where} io=end draw={draw}", tally)
    world.on_point = None
    if story.ends:
        _finish(world, where, tally)
    return tally


def text_of(error: BaseException) -> str:
    """One line about an exception, with the place it came from."""
    frames = traceback.extract_tb(error.__traceback__)
    place = f" at {frames[-1].filename.rsplit('/', 1)[-1]}:{frames[-1].lineno} {frames[-1].name}" if frames else ""
    return f"{type(error).__name__}: {error}{place}"


def _finish(world: World, where: str, tally: Tally) -> None:
    try:
        world.run(world.verify(twice=True), "verify")
        stop_and_start(world, where)
        tally.stops += 1
    except SimFailure:
        raise
    except Exception as error:
        raise SimFailure(f"{where} after the story: {text_of(error)}") from error


def stop_and_start(world: World, where: str) -> World:
    """A clean stop, and the next start from all bytes that were written."""
    world.run(world.cset.stop(), "stop")
    drain(world)
    image.check(world.disks[0].now, f"{where}: after a clean stop")
    world.check_backings_alone(f"{where}: after a clean stop", images=[disk.now for disk in world.disks])
    again = world.revive(f"{world.seed}/again")
    again.run(again.up(), "up")
    again.run(again.verify(everything=True), "verify")
    return again


def drain(world: World) -> None:
    """Let the Ios that a stopped engine left behind be answered."""
    for _ in range(10_000):
        if all(disk.quiet for disk in world.disks):
            return
        world.step()
    raise SimFailure("Ios without end after a stop")


def crash(world: World, where: str, tally: Tally, *, depth: int = 1) -> None:
    """Power fails now; everything that must hold is checked.  ``world`` is left as it is."""
    chooser = random.Random(where)
    images = world.survivors(chooser)
    tally.recoveries += 1
    flying = world.flying()
    fate = chooser.random()
    try:
        world.check_backings_alone("after power loss", images=images)
        found = image.check(images[0], "after power loss")
        if found is not None and 0.3 < fate < 0.45:
            image.check_walk(found)
            read_only(world, where, images)
        after = world.revive(where, images=images)
        if depth and fate < 0.3:
            _again(after, where, chooser, tally, while_starting=fate < 0.12)
            return
        _live_on(after, where, tally, fate)
    except Exception as error:
        raise _failure(where, flying, error) from error


def kill(world: World, where: str, tally: Tally, *, depth: int = 1) -> None:
    """The engine is killed now, and the next one comes; ``world`` is left as it is."""
    chooser = random.Random(where)
    tally.kills += 1
    flying = world.flying()
    fate = chooser.random()
    try:
        after = world.kill(where, chooser)
        found = image.check(after.disks[0].now, "after a kill")
        if found is not None and fate > 0.85:
            looking = after.kill(f"{where}/read-only", chooser, read_only=True)
            looking.run(looking.up(), "up")
            looking.run(looking.verify(everything=True), "verify")
        if depth and fate < 0.5:
            _again(after, where, chooser, tally, while_starting=fate < 0.3)
            return
        _live_on(after, where, tally, fate)
    except Exception as error:
        raise _failure(where, flying, error) from error


def _live_on(after: World, where: str, tally: Tally, fate: float) -> None:
    after.run(after.up(), "up")
    after.run(after.verify(twice=fate < 0.6), "verify")
    if fate > 0.8:
        tally.stops += 1
        stop_and_start(after, where)


def _failure(where: str, flying: str, error: Exception) -> SimFailure:
    if isinstance(error, SimFailure) and str(error).startswith("story="):
        return error
    text = str(error) if isinstance(error, SimFailure) else text_of(error)
    return SimFailure(f"{where}: {text} [in flight: {flying}]")


def read_only(world: World, where: str, images: list[bytearray]) -> None:
    """What a read-only engine serves from the same bytes is right as well, and nothing is written."""
    looking = world.revive(f"{where}/read-only", images=[bytearray(each) for each in images], read_only=True)

    def seen(io: Io) -> None:
        assert io.op == READ, f"a read-only engine asked for {io}"

    looking.on_io = seen
    looking.run(looking.up(), "up")
    looking.run(looking.verify(), "verify")
    looking.run(looking.cset.stop(), "stop")
    assert [disk.now for disk in looking.disks] == images


def _again(world: World, where: str, chooser: random.Random, tally: Tally, *, while_starting: bool) -> None:
    # Power fails a second time, or the engine is killed: in the recovery from the first, or in the traffic after it.
    last = chooser.randrange(1, 30 if while_starting else 70)

    def point(number: int) -> None:
        if number == last:
            raise Stopped

    async def life() -> None:
        await world.up()
        if while_starting:
            await world.verify()
        else:
            world.points = 0
            world.on_point = point
            await mixed(world, chooser, 30)

    world.on_point = point if while_starting else None
    try:
        world.run(life(), "second life")
    except Stopped:
        pass
    world.on_point = None
    tally.second += 1
    where += f" then {'start' if while_starting else 'io'}={last}"
    if chooser.random() < 0.5:
        crash(world, where, tally, depth=0)
    else:
        kill(world, where, tally, depth=0)


async def mixed(world: World, chooser: random.Random, count: int, *, width: int = 24, align: int = 0) -> None:
    """Requests of all kinds at random places, several at a time, in units of ``align`` sectors (default: blocks)."""
    align = align or world.setup.atomic_sectors

    async def one() -> None:
        volume = chooser.choice(sorted(world.volumes))
        size = world.oracle.sizes[volume]
        unit = max(align, world.setup.block_sectors) if volume >= FLASH else align
        nsectors = chooser.randrange(unit, (width if chooser.random() < 0.93 else 6 * width) + unit, unit)
        nsectors = min(nsectors, 256, size // 2)
        sector = chooser.randrange(0, min(size, 512) - nsectors + unit, unit)
        roll = chooser.random()
        if roll < 0.5:
            await world.write(volume, sector, nsectors, fua=chooser.random() < 0.2, preflush=chooser.random() < 0.1,
                              sync=chooser.random() < 0.5, stream=chooser.randrange(4))
        elif roll < 0.8:
            await world.read(volume, sector, nsectors, stream=chooser.randrange(4))
        elif roll < 0.92:
            await world.flush(volume)
        elif roll < 0.96:
            await world.zeroes(volume, sector, nsectors)
        else:
            await world.discard(volume, sector, nsectors)

    for _ in range(0, count if world.volumes else 0, 3):
        await world.together(*[one() for _ in range(chooser.choice((1, 2, 3, 4, 4, 12)))])


