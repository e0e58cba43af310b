# SPDX-License-Identifier: GPL-2.0-only
"""The program as a process of its own: `start` and `run`.

As a rule that is a new Python.  Where that takes seconds, as in the virtual machine, BCACHECTL_TEST_FORK=1 makes it a
fork of the process that runs the tests, which has all modules loaded already: with the environment, the directory and
the descriptors that were asked for and no others, and with Python's own handlers of signals.
"""

from __future__ import annotations

import os
import runpy
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import IO, NoReturn, Protocol

ROOT = Path(__file__).resolve().parents[1]
IS_FORKED = bool(os.environ.get("BCACHECTL_TEST_FORK"))
_POLL_S = 0.01


class Process(Protocol):
    """What tests use of `subprocess.Popen`."""

    pid: int

    @property
    def stdout(self) -> IO[str] | None: ...
    def poll(self) -> int | None: ...
    def wait(self, timeout: float | None = None) -> int: ...
    def send_signal(self, sig: int) -> None: ...
    def kill(self) -> None: ...


def start(words: Sequence[str], *, environment: dict[str, str], errors: IO[bytes],
          pass_fds: Sequence[int] = ()) -> Process:
    """Start ``bcachectl`` with these words; its stdout is a pipe, its stderr a file."""
    if IS_FORKED:
        return _Fork(words, environment=environment, errors=errors, pass_fds=pass_fds)
    return subprocess.Popen([sys.executable, "-m", "bcachectl", *words], stdin=subprocess.DEVNULL,
                            stdout=subprocess.PIPE, stderr=errors, text=True, pass_fds=pass_fds, env=environment,
                            cwd=ROOT)


def run(words: Sequence[str], *, environment: dict[str, str], timeout_s: float) -> subprocess.CompletedProcess[str]:
    """Run ``bcachectl`` with these words to its end."""
    command = [sys.executable, "-m", "bcachectl", *words]
    if not IS_FORKED:
        return subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, cwd=ROOT,
                              env=environment, timeout=timeout_s)
    with open(os.memfd_create("stderr"), "w+b") as errors:
        process = _Fork(words, environment=environment, errors=errors)
        try:
            output = process.stdout.read()
            status = process.wait(timeout_s)
        finally:
            process.kill()
            process.stdout.close()
        errors.seek(0)
        return subprocess.CompletedProcess(command, status, output, errors.read().decode())


class _Fork:
    # Like a `subprocess.Popen`.
    def __init__(self, words: Sequence[str], *, environment: dict[str, str], errors: IO[bytes],
                 pass_fds: Sequence[int] = ()) -> None:
        self._status: int | None = None
        read_fd, write_fd = os.pipe()
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if not self.pid:
            _become(words, environment, (write_fd, errors.fileno()), pass_fds)
        os.close(write_fd)
        self.stdout: IO[str] = os.fdopen(read_fd, encoding="utf-8")

    def poll(self) -> int | None:
        if self._status is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self._status = os.waitstatus_to_exitcode(status)
        return self._status

    def wait(self, timeout: float | None = None) -> int:
        deadline_s = None if timeout is None else time.monotonic() + timeout
        while (status := self.poll()) is None:
            if deadline_s is not None and time.monotonic() > deadline_s:
                assert timeout is not None
                raise subprocess.TimeoutExpired("bcachectl", timeout)
            time.sleep(_POLL_S)
        return status

    def send_signal(self, sig: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, sig)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def _become(words: Sequence[str], environment: dict[str, str], outputs: tuple[int, int],
            pass_fds: Sequence[int]) -> NoReturn:
    # In the child: nothing of the tests' process goes on here.
    status = 70
    try:
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number in (signal.SIGALRM, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        for index, fd in enumerate(outputs):
            os.dup2(fd, index + 1)
        kept = 3
        for fd in sorted(pass_fds):
            os.closerange(kept, fd)
            os.set_inheritable(fd, True)
            kept = fd + 1
        os.closerange(kept, os.sysconf("SC_OPEN_MAX"))
        os.environ.clear()
        os.environ.update(environment)
        os.chdir(ROOT)
        sys.stdin, sys.stdout, sys.stderr = os.fdopen(0), os.fdopen(1, "w"), os.fdopen(2, "w")
        sys.argv = ["bcachectl", *words]
        try:
            runpy.run_module("bcachectl", run_name="__main__", alter_sys=True)
            status = 0
        except SystemExit as error:
            status = error.code if isinstance(error.code, int) else bool(error.code)
        finally:
            for file in (sys.stdout, sys.stderr):
                file.flush()
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
    finally:
        os._exit(status)
