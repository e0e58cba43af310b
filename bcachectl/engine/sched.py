# SPDX-License-Identifier: GPL-2.0-only
"""The scheduler: `Task`, `Io` and `WaitQueue`; the engine's only yield and its only clock.

From outside the engine is a function: `Sched.run` takes the time and the Ios that completed, runs every task that can
run, and returns the Ios to submit.  Inside it is straight-line coroutines that suspend for two reasons only:

* an `Io` (made, and thereby submitted, by `bcachectl.engine.bdev`), resumed when the rim reports it done;
* a `WaitQueue`, resumed when someone wakes it or a deadline passes.

Life of a task:

1. `Sched.spawn` makes it ready; nothing of it runs yet.
2. `Sched.run` steps it until it yields; a task that was woken runs in the order of the wake-ups.
3. Awaiting a `Task` gives its result or raises what it raised.  An exception that nobody awaits ends `Sched.run`:
   it is a bug, and the engine stops rather than guess.

Everything is single-threaded and deterministic: the same times and completions give the same Ios.  A plain ``def`` is
atomic; every ``await`` is a place where the world may have changed.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Coroutine, Generator
from typing import Any, Generic, TypeVar

T = TypeVar("T")

READ, WRITE, FLUSH, DISCARD, WRITE_ZEROES = range(5)
"""What an `Io` asks of its device."""

OP_NAMES = ("read", "write", "flush", "discard", "write_zeroes")

PREFLUSH = 1
"""`Io.flags`: everything the device acknowledged before this Io is durable before this Io's data is."""
FUA = 2
"""`Io.flags`: this Io's data is durable when it completes."""

NS_PER_S = 1_000_000_000
NS_PER_MS = 1_000_000


class Io:
    """One request to one device.  Sectors are 512 bytes; ``error`` is 0 or a positive errno, valid once ``done``.

    A READ fills ``buf``; a WRITE takes its bytes from it, or from all of a tuple of buffers, one after the other, and
    must find them unchanged until it is done.  The other operations have no buffer.  ``what`` says what is written
    (`"journal"`, `"data"`), for traces and dry runs.
    """

    __slots__ = ("op", "device", "sector", "nsectors", "buf", "flags", "what", "error", "done", "waiter", "start_ns")

    def __init__(
        self, op: int, device: int, sector: int, nsectors: int, buf: Any = None, flags: int = 0, what: str = ""
    ) -> None:
        self.op = op
        self.device = device
        self.sector = sector
        self.nsectors = nsectors
        self.buf = buf
        self.flags = flags
        self.what = what
        self.error = 0
        self.done = False
        self.waiter: Task[Any] | None = None
        self.start_ns = 0

    def joined(self) -> Any:
        """What a WRITE writes, in one piece."""
        return b"".join(self.buf) if type(self.buf) is tuple else self.buf

    def __await__(self) -> Generator[Any, None, int]:
        """Suspend until the device has answered; the value is ``error``."""
        if not self.done:
            yield self
        return self.error

    def __repr__(self) -> str:
        flags = ("+preflush" if self.flags & PREFLUSH else "") + ("+fua" if self.flags & FUA else "")
        return f"<Io {OP_NAMES[self.op]}{flags} dev{self.device} {self.sector}+{self.nsectors} {self.what}>"


class Task(Generic[T]):
    """A coroutine that the scheduler runs; awaiting it gives its result."""

    __slots__ = ("coro", "name", "done", "result", "error", "waiters", "parked", "timed_out", "observed")

    def __init__(self, coro: Coroutine[Any, Any, T], name: str) -> None:
        self.coro = coro
        self.name = name
        self.done = False
        self.result: T | None = None
        self.error: BaseException | None = None
        self.waiters: list[Task[Any]] = []
        self.parked: _Park | None = None
        self.timed_out = False
        self.observed = False

    def __await__(self) -> Generator[Any, None, T]:
        self.observed = True
        if not self.done:
            yield self
        if self.error is not None:
            raise self.error
        return self.result  # type: ignore[return-value]

    def __repr__(self) -> str:
        return f"<Task {self.name}{' done' if self.done else ''}>"


class _Park:
    # What a task yields to wait in a queue, with or without a deadline.  A park is woken once: by the queue or the
    # timer.
    __slots__ = ("queue", "deadline_ns", "task")

    def __init__(self, queue: WaitQueue | None, deadline_ns: int | None) -> None:
        self.queue = queue
        self.deadline_ns = deadline_ns
        self.task: Task[Any] | None = None

    def __await__(self) -> Generator[_Park, bool, bool]:
        return (yield self)


class WaitQueue:
    """Tasks that wait for a condition.  Whoever changes the condition calls `wake_all`; a woken task checks again."""

    __slots__ = ("sched", "name", "parked")

    def __init__(self, sched: Sched, name: str) -> None:
        self.sched = sched
        self.name = name
        self.parked: list[_Park] = []

    async def wait(self, *, deadline_ns: int | None = None) -> bool:
        """Suspend until `wake_all`, or until the clock reaches ``deadline_ns``; True if it was a wake-up."""
        return await _Park(self, deadline_ns)

    def wake_all(self) -> None:
        """Make every waiting task ready, first come first."""
        if self.parked:
            parked, self.parked = self.parked, []
            for park in parked:
                self.sched.unpark(park, timed_out=False)

    def __len__(self) -> int:
        return len(self.parked)


class Mutex:
    """Mutual exclusion between tasks, handed over in the order of asking: ``async with mutex:``."""

    __slots__ = ("queue", "held")

    def __init__(self, sched: Sched, name: str) -> None:
        self.queue = WaitQueue(sched, name)
        self.held = False

    async def __aenter__(self) -> None:
        while self.held:
            await self.queue.wait()
        self.held = True

    async def __aexit__(self, *_exc: object) -> None:
        self.held = False
        self.queue.wake_all()


class Sched:
    """Runs tasks; the rim drives it with `run`.

    ``wall_base_s`` is the calendar time, in seconds since 1970, at ``now_ns`` = 0: what superblocks and uuid entries
    are stamped with.
    """

    def __init__(self, *, wall_base_s: int = 0) -> None:
        self.now_ns = 0
        self.wall_base_s = wall_base_s
        self.ready: deque[Task[Any]] = deque()
        self.outbox: list[Io] = []
        self.timers: list[tuple[int, int, _Park]] = []
        self._timer_serial = 0

    @property
    def wall_s(self) -> int:
        """Calendar time in seconds since 1970."""
        return self.wall_base_s + self.now_ns // NS_PER_S

    def spawn(self, coro: Coroutine[Any, Any, T], name: str) -> Task[T]:
        """Start a coroutine as a task; its first step runs in the next (or the current) `run`."""
        task = Task(coro, name)
        self.ready.append(task)
        return task

    def submit(self, io: Io) -> Io:
        """Hand an Io to the rim with the next batch."""
        io.start_ns = self.now_ns
        self.outbox.append(io)
        return io

    async def sleep_until(self, deadline_ns: int) -> None:
        """Suspend until the clock reaches ``deadline_ns``."""
        if deadline_ns > self.now_ns:
            await _Park(None, deadline_ns)

    async def yield_now(self) -> None:
        """Let everything else that is ready run first, the rim included."""
        await _Park(None, self.now_ns)

    def run(self, now_ns: int, completions: list[Io]) -> list[Io]:
        """Run every task that can run and return the Ios to submit, in the order they were made.

        ``now_ns`` must not go back.  Call again with nothing completed when `next_timer_ns` is reached.
        """
        assert now_ns >= self.now_ns, "the clock went backwards"
        self.now_ns = now_ns
        for io in completions:
            self.complete(io)
        timers = self.timers
        while timers and timers[0][0] <= now_ns:
            park = heapq.heappop(timers)[2]
            if park.task is not None:
                self.unpark(park, timed_out=True)
        ready = self.ready
        while ready:
            self._step(ready.popleft())
        batch, self.outbox = self.outbox, []
        return batch

    def complete(self, io: Io) -> None:
        """Note that the device answered ``io`` and make the task that waits for it ready."""
        assert not io.done, io
        io.done = True
        if io.waiter is not None:
            self.ready.append(io.waiter)
            io.waiter = None

    def next_timer_ns(self) -> int | None:
        """When `run` is wanted even if nothing completes; None if no task sleeps."""
        timers = self.timers
        while timers and timers[0][2].task is None:
            heapq.heappop(timers)
        return timers[0][0] if timers else None

    def unpark(self, park: _Park, *, timed_out: bool) -> None:
        """Make the task of a park ready; a second wake-up of the same park does nothing."""
        task = park.task
        if task is None:
            return
        park.task = None
        if timed_out and park.queue is not None:
            park.queue.parked.remove(park)
        task.timed_out = timed_out
        self.ready.append(task)

    def _step(self, task: Task[Any]) -> None:
        try:
            wanted = task.coro.send(None if task.parked is None else not task.timed_out)
        except StopIteration as stop:
            task.result = stop.value
        except BaseException as error:
            task.error = error
            if not task.waiters and not task.observed:
                task.done = True
                raise
        else:
            task.parked = None
            kind = type(wanted)
            if kind is Io:
                assert wanted.waiter is None, "an Io has one waiter"
                wanted.waiter = task
            elif kind is _Park:
                wanted.task = task
                task.parked = wanted
                if wanted.queue is not None:
                    wanted.queue.parked.append(wanted)
                if wanted.deadline_ns is not None:
                    self._timer_serial += 1
                    heapq.heappush(self.timers, (wanted.deadline_ns, self._timer_serial, wanted))
            else:
                assert kind is Task, wanted
                wanted.waiters.append(task)
            return
        task.done = True
        for waiter in task.waiters:
            self.ready.append(waiter)
        task.waiters.clear()
