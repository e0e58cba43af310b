# SPDX-License-Identifier: GPL-2.0-only
"""`Engine`: ``bcachectl engine run`` as a process of its own, as a user has it; `tests.over` says over which export."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import tempfile
from pathlib import Path
from types import TracebackType
from typing import Any

from tests import program
from tests.block_client import BlockClient
from tests.nbd_client import NbdClient
from tests.over import EXPORT, Client, exported, only
from tests.program import ROOT as ROOT
from tests.require import patience

READY_TIMEOUT_S = 60


class Engine:
    """A running engine; SIGTERM at the end of the block, and its exit status in ``status``."""

    def __init__(self, directory: Path, *options: str | Path, expect_failure: bool = False) -> None:
        self.directory = directory
        self.status: int | None = None
        self.volumes: list[dict[str, Any]] = []
        # The path of a Unix socket must be short, so pytest's directory would not do.
        self.runtime = tempfile.TemporaryDirectory(prefix="bcachectl-")
        environment = {**os.environ, "XDG_RUNTIME_DIR": self.runtime.name, "PYTHONPATH": str(ROOT)}
        read_fd, write_fd = os.pipe()
        self.errors_path = directory / "engine.stderr"
        with self.errors_path.open("wb") as errors:
            self.process = program.start(
                ["engine", "run", "--no-live", "--ready-fd", str(write_fd), *exported(options)],
                environment=environment, errors=errors, pass_fds=[write_fd])
        os.close(write_fd)
        try:
            readable, _, _ = select.select([read_fd], [], [], patience(READY_TIMEOUT_S))
            self.is_ready = bool(readable) and os.read(read_fd, 1) == b"\n"
        finally:
            os.close(read_fd)
        if self.is_ready:
            assert self.process.stdout is not None
            while select.select([self.process.stdout], [], [], 0)[0]:
                # All lines were written before the newline.
                chunk = os.read(self.process.stdout.fileno(), 1 << 16)
                self.volumes += [json.loads(line) for line in chunk.decode().splitlines()]
                if not chunk:
                    break
        else:
            self.wait()
        if self.is_ready == expect_failure:
            self.kill()
            raise AssertionError(f"ready: {self.is_ready}; stderr: {self.errors}")

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 traceback: TracebackType | None) -> None:
        if self.status is None:
            self.stop()
        self.runtime.cleanup()
        if kind is not None:
            print(self.errors)
        elif EXPORT and self.status != -signal.SIGKILL:
            assert [device for device in self.devices() if os.path.exists(device)] == []

    def devices(self) -> list[str]:
        """The block devices that it made at its start."""
        return [volume["device"] for volume in self.volumes if volume["device"] is not None]

    @property
    def errors(self) -> str:
        """What it said on stderr so far."""
        return self.errors_path.read_text(encoding="utf-8")

    def client(self, volume: str = "") -> Client:
        """A client of a volume, the first one if it is not named; the caller closes it."""
        if EXPORT:
            names = [place["volume"] for place in self.volumes]
            return BlockClient(self.volumes[names.index(volume) if volume else 0]["device"], self.process)
        return NbdClient(self.place(), volume)

    def place(self) -> str:
        """The path under which a client finds the first volume: a socket, or a block device."""
        if EXPORT:
            return str(self.volumes[0]["device"])
        return str(self.volumes[0]["uri"]).partition("socket=")[2]

    def socket(self) -> str:
        """The NBD socket, for a test that is about NBD."""
        only("nbd", "several volumes on one socket")
        return self.place()

    def stop(self, number: int = signal.SIGTERM) -> int:
        """Signal it and wait."""
        self.process.send_signal(number)
        return self.wait()

    def wait(self) -> int:
        """Wait for its end."""
        try:
            self.status = self.process.wait(patience(60))
        except subprocess.TimeoutExpired:
            self.kill()
            raise
        if self.process.stdout is not None:
            self.process.stdout.close()
        return self.status

    def kill(self) -> None:
        """SIGKILL."""
        self.process.kill()
        self.status = self.process.wait(patience(10))
        if self.process.stdout is not None:
            self.process.stdout.close()
