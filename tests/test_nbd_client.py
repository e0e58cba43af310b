# SPDX-License-Identifier: GPL-2.0-only
"""The tests' own NBD client against a server that is not ours."""

from __future__ import annotations

import errno
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Generator
from pathlib import Path

import pytest

from tests import nbd_client
from tests.acceptance import Acceptance
from tests.nbd_client import CMD_READ, CMD_WRITE, NbdClient, NegotiationError, list_exports
from tests.stamps import draw
from tests.writer import write_plan

pytestmark = pytest.mark.export


@pytest.fixture
def nbdkit(tmp_path: Path, require_tool: Callable[[str], str]) -> Generator[Callable[..., Path], None, None]:
    """``nbdkit("memory", "4M")`` serves on the socket that it gives."""
    started: list[subprocess.Popen[bytes]] = []

    def serve(*arguments: str) -> Path:
        path = tmp_path / f"nbd{len(started)}.sock"
        started.append(subprocess.Popen([require_tool("nbdkit"), "--foreground", "--unix", str(path), *arguments]))
        for _ in range(500):
            with socket.socket(socket.AF_UNIX) as probe:
                if probe.connect_ex(str(path)) == 0:
                    break
            time.sleep(0.02)
        return path

    yield serve
    for process in started:
        process.terminate()
        process.wait()


@pytest.mark.parametrize("structured", [False, True])
def test_one_at_a_time(nbdkit: Callable[..., Path], structured: bool) -> None:
    with NbdClient(nbdkit("memory", "4M"), structured=structured) as client:
        assert client.size_bytes == 4 << 20
        assert client.flags & nbd_client.SEND_FLUSH
        client.write(4096, b"a" * 8192, fua=True)
        client.trim(8192, 512)
        client.write_zeroes(4096, 1024)
        client.flush()
        assert client.read(4096, 8192) == bytes(1024) + b"a" * 3072 + bytes(512) + b"a" * 3584
        with pytest.raises(OSError, match="NBD command") as caught:
            client.read(4 << 20, 512)
        assert caught.value.errno == errno.EINVAL


def test_many_at_once(nbdkit: Callable[..., Path]) -> None:
    with NbdClient(nbdkit("memory", "4M"), structured=True) as client:
        for number in range(32):
            client.send(CMD_WRITE, number * 512, 512, bytes([number]) * 512)
        assert {client.receive().error for _ in range(32)} == {0}
        cookies = {client.send(CMD_READ, number * 512, 512): number for number in range(32)}
        for _ in range(32):
            reply = client.receive()
            assert reply.data == bytes([cookies[reply.cookie]]) * 512
        assert client.in_flight == 0


def test_block_status(nbdkit: Callable[..., Path]) -> None:
    with NbdClient(nbdkit("memory", "1M"), meta_contexts=("base:allocation",)) as client:
        client.write(65536, b"x" * 32768)
        extents = client.block_status(0, 1 << 20)["base:allocation"]
        assert sum(length for length, _ in extents) == 1 << 20
        assert {flags for _, flags in extents} == {0, 3}


def test_errors_and_names(nbdkit: Callable[..., Path]) -> None:
    path = nbdkit("--filter=exportname", "memory", "1M", "exportname=one", "exportname=two", "exportname-list=explicit",
                  "exportname-strict=true")
    assert list_exports(path) == ["one", "two"]
    NbdClient(path, "two").close()
    with pytest.raises((NegotiationError, ConnectionError)):
        NbdClient(path, "three")


def test_a_server_that_dies(nbdkit: Callable[..., Path], tmp_path: Path) -> None:
    path = nbdkit("--pidfile", str(tmp_path / "pid"), "memory", "1M")
    client = NbdClient(path)
    subprocess.run(["kill", "-9", (tmp_path / "pid").read_text().strip()], check=True)
    with pytest.raises(ConnectionError):
        client.read(0, 512)


def test_write_plan_over_a_server_that_is_killed(nbdkit: Callable[..., Path], tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.write_bytes(bytes(1 << 20))
    path = nbdkit("--pidfile", str(tmp_path / "pid"), "file", str(disk))
    acceptance = Acceptance(1 << 20)
    plan = draw(seed=5, ops=3000, size_bytes=1 << 20, max_kib=16, flushes=0.02)
    client = NbdClient(path)

    def kill() -> None:
        os.kill(int((tmp_path / "pid").read_text()), signal.SIGKILL)

    assert not write_plan(client, plan, acceptance, seed=5, stop_after=500, on_write=kill, fua=0.1)
    assert acceptance.acknowledged_writes() >= 500
    assert acceptance.completed_flushes() > 2
    assert acceptance.judge(disk.read_bytes()) == []
    assert acceptance.judge(bytes(1 << 20))
