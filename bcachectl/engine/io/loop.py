# SPDX-License-Identifier: GPL-2.0-only
"""`Loop`: the one place where the engine meets time, entropy, signals and file descriptors.

One turn of the loop:

1. completions of the backend go into `bcachectl.engine.sched.Sched.run`, the Ios that it returns go to the backend;
   a few such passes, as long as there is something to do (with image files most Ios are done when they are submitted);
2. requests that the engine completed are answered: ``request.tag`` is an `Answerer`;
3. exports send what they gathered (`Export.flush`), one system call per client;
4. the loop sleeps in epoll until a descriptor is ready or the next timer of the scheduler is due.  With nothing to do
   it sleeps for ever: an idle engine uses no CPU.  With a ring that is ``waited_in`` it sleeps there, and the ring
   polls epoll: one system call a turn carries the submissions, completions and commands of all devices.

Descriptors are registered with a `Handler`.  `STOP_SIGNALS` make `Loop.signalled` true and wake `Loop.signal_wait`;
what follows from it is the business of the task that waits there.
"""

from __future__ import annotations

import os
import random
import select
import signal
import threading
import time
from collections.abc import Callable, Coroutine
from types import FrameType
from typing import Any, Protocol, TypeVar

from bcachectl.engine.front import Front, Request
from bcachectl.engine.io.medium import Backend, Medium
from bcachectl.engine.io.sync import SyncBackend
from bcachectl.engine.io.uring import RingBackend
from bcachectl.engine.sched import NS_PER_S, Io, Sched, Task, WaitQueue

T = TypeVar("T")

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

PASSES_PER_TURN = 8
"""How often the scheduler runs before descriptors are looked at again; clients must not wait for a long gc."""

WAITED_RING_ENTRIES = 4096
"""Entries of a ring with clients: room for some 15 ublk devices."""


class Handler(Protocol):
    """Someone who waits for a descriptor."""

    def on_ready(self, fd: int, events: int) -> None:
        """The descriptor is ready; ``events`` as epoll gives them."""
        ...


class Answerer(Protocol):
    """What `bcachectl.engine.front.Request.tag` is."""

    def answered(self, request: Request) -> None:
        """The request is complete."""
        ...


class Export(Protocol):
    """Something that gathers answers."""

    def flush(self) -> None:
        """Send what was gathered since the last call."""
        ...


def make_backend(media: list[Medium], kind: str = "auto", *, waited_in: bool = False) -> SyncBackend | RingBackend:
    """A backend by name: ``uring``, ``sync``, or ``auto``: the ring where the kernel has one.

    The ring performs what lies in memory at once, so it serves image files as well as devices.  ``waited_in``: a ring
    that the loop sleeps in, with room for clients; OSError where the kernel has none.
    """
    if kind not in ("auto", "sync", "uring"):
        raise ValueError(kind)
    if waited_in:
        return RingBackend(media, entries=WAITED_RING_ENTRIES, waited_in=True)
    if kind != "sync":
        try:
            return RingBackend(media)
        except OSError:
            if kind == "uring":
                raise
    return SyncBackend(media)


def make_sched() -> Sched:
    """A scheduler whose calendar starts now."""
    return Sched(wall_base_s=int(time.time()))


def make_entropy() -> random.Random:
    """The engine's randomness (``getrandbits``)."""
    return random.SystemRandom()


class Loop:
    """Drives a scheduler on real descriptors.  Close it when done; it gives the signals back."""

    def __init__(self, sched: Sched, backend: Backend, front: Front) -> None:
        self.sched = sched
        self.backend = backend
        self.front = front
        self.exports: list[Export] = []
        self.signalled = False
        self.signal_wait = WaitQueue(sched, "signal")
        self._epoll = select.epoll()
        self._handlers: dict[int, Handler] = {}
        self._start_ns = time.monotonic_ns() - sched.now_ns
        self._signal_fds = (-1, -1)
        self._old_signals: list[tuple[int, Any]] = []
        self._old_wakeup_fd = -1
        self._ring = backend if isinstance(backend, RingBackend) and backend.waited_in else None
        if self._ring is None and backend.fileno() >= 0:
            self._epoll.register(backend.fileno(), select.EPOLLIN)

    def register(self, fd: int, handler: Handler, events: int = select.EPOLLIN) -> None:
        """Call ``handler`` whenever ``fd`` is ready (level-triggered)."""
        self._epoll.register(fd, events)
        self._handlers[fd] = handler

    def modify(self, fd: int, events: int) -> None:
        """Wait for other events on ``fd``."""
        self._epoll.modify(fd, events)

    def unregister(self, fd: int) -> None:
        """Forget ``fd``; to be called before it is closed."""
        del self._handlers[fd]
        self._epoll.unregister(fd)

    def catch_signals(self) -> None:
        """From now on `STOP_SIGNALS` set ``signalled`` instead of ending the program; main thread only."""
        self._signal_fds = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self._old_wakeup_fd = signal.set_wakeup_fd(self._signal_fds[1], warn_on_full_buffer=False)
        for number in STOP_SIGNALS:
            if signal.getsignal(number) == signal.SIG_IGN:
                continue                        # nohup
            self._old_signals.append((number, signal.signal(number, _ignore)))
        self.register(self._signal_fds[0], self)

    async def call_in_thread(self, function: Callable[[], T]) -> T:
        """Run a function that may block, a system call that waits for this very loop included; its result."""
        errand = _Errand(self)
        thread = threading.Thread(target=errand.run, args=(function,), daemon=True)
        thread.start()
        while not errand.is_done:
            await errand.wait.wait()
        if errand.error is not None:
            raise errand.error
        return errand.result  # type: ignore[no-any-return]

    def on_ready(self, fd: int, events: int) -> None:
        """A signal came in."""
        if any(number in STOP_SIGNALS for number in os.read(fd, 4096)):
            self.signalled = True
            self.signal_wait.wake_all()

    def run(self, coro: Coroutine[Any, Any, T], name: str = "main") -> T:
        """Run until this coroutine is done; its result, or what it raised."""
        sched = self.sched
        task = sched.spawn(coro, name)
        task.observed = True
        while not task.done:
            self._turn(task)
        if task.error is not None:
            raise task.error
        return task.result  # type: ignore[return-value]

    def set_clock(self) -> None:
        """Bring the engine's clock up to now, for someone who has requests that came while it stood still."""
        self.sched.now_ns = time.monotonic_ns() - self._start_ns

    def answer(self) -> None:
        """Tell whoever asked of the requests that are complete."""
        front = self.front
        while front.completed:
            completed, front.completed = front.completed, []
            for request in completed:
                request.tag.answered(request)

    def close(self) -> None:
        """Give back descriptors and signals; the backend stays the caller's."""
        for number, old in self._old_signals:
            signal.signal(number, old)
        if self._signal_fds[0] >= 0:
            signal.set_wakeup_fd(self._old_wakeup_fd)
            for fd in self._signal_fds:
                os.close(fd)
        for task in self.sched.ready:
            task.coro.close()                   # never begun; Python would complain
        self._old_signals.clear()
        self._signal_fds = (-1, -1)
        self._epoll.close()

    def _turn(self, main: Task[Any]) -> None:
        sched, backend = self.sched, self.backend
        ios: list[Io] = []
        for _ in range(PASSES_PER_TURN):
            done = backend.reap()
            ios = sched.run(time.monotonic_ns() - self._start_ns, done)
            if ios:
                backend.submit(ios)
            self.answer()
            if not ios and not sched.ready and not sched.outbox:
                break
        for export in self.exports:
            export.flush()
        timeout_s = 0 if ios or main.done else self._timeout_s()
        if self._ring is not None:
            if not self._ring.wait(self._epoll.fileno(), timeout_s):
                return
            timeout_s = 0
        handlers = self._handlers
        for fd, events in self._epoll.poll(timeout_s):
            handler = handlers.get(fd)
            if handler is not None:
                handler.on_ready(fd, events)

    def _timeout_s(self) -> float:
        # -1 sleeps until a descriptor is ready; what is ready now must not wait for one.
        sched = self.sched
        if sched.ready or sched.outbox or self.front.completed:
            return 0
        timer_ns = sched.next_timer_ns()
        if timer_ns is None:
            return -1
        left_ns = timer_ns - (time.monotonic_ns() - self._start_ns)
        return max(0.0, left_ns / NS_PER_S)


class _Errand:
    # What a thread does for a coroutine.  The thread touches nothing of the loop but the eventfd.
    def __init__(self, loop: Loop) -> None:
        self.loop = loop
        self.fd = os.eventfd(0, os.EFD_CLOEXEC)
        self.wait = WaitQueue(loop.sched, "errand")
        self.is_done = False
        self.result: Any = None
        self.error: BaseException | None = None
        loop.register(self.fd, self)

    def run(self, function: Callable[[], Any]) -> None:
        try:
            self.result = function()
        except BaseException as error:
            self.error = error
        os.eventfd_write(self.fd, 1)

    def on_ready(self, fd: int, events: int) -> None:
        self.loop.unregister(fd)
        os.close(fd)
        self.is_done = True
        self.wait.wake_all()


def _ignore(_number: int, _frame: FrameType | None) -> None:
    # The wake-up descriptor tells; a handler has to exist or the number would never be written there.
    pass
