# SPDX-License-Identifier: GPL-2.0-only
"""``bcachectl engine run`` as a process: started, asked over NBD, stopped in good order or killed with SIGKILL.

`write_plan` sends a plan of `tests.stamps` with several requests in flight and tells an `Acceptance` of each request
and each acknowledgement, so that whatever moment the engine is killed at, the judge knows what had to survive.
"""

from __future__ import annotations

import json
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from tests.acceptance import Acceptance
from tests.conftest import TESTS
from tests.nbd_client import CMD_FLUSH, CMD_READ, CMD_WRITE, FLAG_FUA, NbdClient
from tests.stamps import Op, content, tag

READY_TIMEOUT_S = 60
STOP_TIMEOUT_S = 120


def bcachectl(*arguments: str | Path, check: bool = True) -> subprocess.CompletedProcess[str]:
    """Run the program with these arguments; with ``check`` it has to succeed."""
    done = subprocess.run([sys.executable, "-m", "bcachectl", *map(str, arguments)], capture_output=True, text=True,
                          cwd=TESTS.parent, stdin=subprocess.DEVNULL, timeout=300)
    assert not check or done.returncode == 0, f"bcachectl {arguments}: {done.returncode}\n{done.stdout}{done.stderr}"
    assert "Traceback" not in done.stderr, done.stderr
    return done


class EngineProcess:
    """A running engine that exports over NBD; use it in a ``with`` statement, so that it never outlives its test."""

    def __init__(self, cache: Path | str, backings: Sequence[Path | str], *, arguments: Sequence[str] = (),
                 tunables: dict[str, Any] | None = None) -> None:
        # Unix sockets have short names, and pytest's directories long ones.
        self._directory = Path(tempfile.mkdtemp(prefix="engine-"))
        self.socket = self._directory / "nbd"
        self.log = self._directory / "log"
        command = [sys.executable, "-m", "bcachectl", "engine", "run", "--cache", str(cache), "--export", "nbd",
                   "--nbd-socket", str(self.socket), "--no-live"]
        for backing in backings:
            command += ["--backing", str(backing)]
        for name, value in (tunables or {}).items():
            command += ["--set", f"{name}={value}"]
        ready_out, ready_in = os.pipe()
        with self.log.open("wb") as log:
            self.process = subprocess.Popen([*command, "--ready-fd", str(ready_in), *arguments], pass_fds=[ready_in],
                                            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=log,
                                            cwd=TESTS.parent, env=self.environment)
        os.close(ready_in)
        try:
            is_ready = select.select([ready_out], [], [], READY_TIMEOUT_S)[0] and os.read(ready_out, 1) == b"\n"
        finally:
            os.close(ready_out)
        if not is_ready:
            self.kill()
            raise AssertionError(f"the engine did not become ready\n{self.messages()}")
        self.volumes: list[dict[str, Any]] = self._announced()

    def __enter__(self) -> EngineProcess:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
        shutil.rmtree(self._directory)

    @property
    def environment(self) -> dict[str, str]:
        """The environment in which other commands find this engine's control socket."""
        return {**os.environ, "XDG_RUNTIME_DIR": str(self._directory)}

    def client(self, export: str = "bcache0", **more: Any) -> NbdClient:
        """A new connection to one of its volumes."""
        return NbdClient(self.socket, export, **more)

    def stop(self, how: signal.Signals = signal.SIGTERM) -> None:
        """Ask for an orderly stop; the engine has to end well."""
        self.process.send_signal(how)
        status = self.process.wait(STOP_TIMEOUT_S)
        assert status == 0, f"the engine ended with {status}\n{self.messages()}"

    def kill(self) -> None:
        """End it as power loss would, but that the host's page cache stays."""
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        if self.process.stdout:
            self.process.stdout.close()

    def messages(self) -> str:
        """What it wrote to stderr."""
        return self.log.read_text(errors="replace")

    def _announced(self) -> list[dict[str, Any]]:
        # One JSON line a volume was written before the ready mark, so all of it is in the pipe already.
        assert self.process.stdout is not None
        os.set_blocking(self.process.stdout.fileno(), False)
        text, deadline = b"", time.monotonic() + 5
        while time.monotonic() < deadline and not text.endswith(b"\n"):
            text += self.process.stdout.read() or b""
        return [json.loads(line) for line in text.decode().splitlines()]


def write_plan(client: NbdClient, plan: Iterable[Op], acceptance: Acceptance, *, seed: int, depth: int = 8,
               fua: float = 0.0, stop_after: int | None = None, on_write: Callable[[], None] | None = None) -> bool:
    """Carry out a plan with ``depth`` requests in flight; True if it came to its end, False if the server went away.

    One write of ``1 / fua`` carries FUA.  After ``stop_after`` acknowledged writes ``on_write()`` is called once (it
    may kill the engine); what is acknowledged later still counts.  A request that overlaps one in flight waits, so
    every read of what the plan wrote before has one right answer, and that is checked.
    """
    writes: dict[int, tuple[int, Op]] = {}          # cookie -> handle and what
    reads: dict[int, Op] = {}
    flushes: dict[int, int] = {}                    # cookie -> handle
    written: dict[int, bytes] = {}                  # byte offset of a sector -> the 16 bytes that fill it
    acknowledged = 0

    def take_one() -> None:
        nonlocal acknowledged
        reply = client.receive()
        assert reply.error == 0, f"the engine answers with error {reply.error}"
        if reply.cookie in writes:
            acceptance.acknowledge_write(writes.pop(reply.cookie)[0])
            acknowledged += 1
            if acknowledged == stop_after and on_write:
                on_write()
        elif reply.cookie in flushes:
            acceptance.acknowledge_flush(flushes.pop(reply.cookie))
        else:
            op = reads.pop(reply.cookie)
            for offset in range(0, op.length_bytes, 512):
                stamp = written.get(op.offset_bytes + offset)
                assert stamp is None or reply.data[offset:offset + 512] == stamp * 32, \
                    f"read {op.number}: wrong content at byte {op.offset_bytes + offset}"

    def overlaps(op: Op, other: Op) -> bool:
        return (op.offset_bytes < other.offset_bytes + other.length_bytes
                and other.offset_bytes < op.offset_bytes + op.length_bytes)

    every = round(1 / fua) if fua else 0
    try:
        for op in plan:
            while client.in_flight >= depth or any(overlaps(op, other) for _, other in writes.values()) \
                    or (not op.is_read and any(overlaps(op, other) for other in reads.values())):
                take_one()
            if op.is_read:
                reads[client.next_cookie] = op
                client.send(CMD_READ, op.offset_bytes, op.length_bytes)
            else:
                has_fua = bool(every) and op.number % every == 0
                write_tag = tag(seed, op.number)
                handle = acceptance.send_write(write_tag, op.offset_bytes, op.length_bytes, fua=has_fua)
                # Noted before it is sent: a server that dies in between may have it or not.
                writes[client.next_cookie] = (handle, op)
                stamp = content(write_tag, op.offset_bytes, 16)
                written.update(dict.fromkeys(range(op.offset_bytes, op.offset_bytes + op.length_bytes, 512), stamp))
                client.send(CMD_WRITE, op.offset_bytes, op.length_bytes, stamp * (op.length_bytes // 16),
                            FLAG_FUA if has_fua else 0)
            if op.flush_after:
                flushes[client.next_cookie] = acceptance.send_flush()
                client.send(CMD_FLUSH, 0, 0)
        while client.in_flight:
            take_one()
    except ConnectionError:
        return False
    return True
