# SPDX-License-Identifier: GPL-2.0-only
"""The NBD server against our client, the usual tools, and clients that behave badly."""

from __future__ import annotations

import errno
import json
import os
import random
import socket
import struct
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from bcachectl.engine.export import nbd, nbd_connection, nbd_quick, nbd_request
from bcachectl.engine.export.buffers import BufferPool
from bcachectl.engine.export.nbd_handshake import Handshake
from bcachectl.engine.front import REQ_FLUSH, REQ_FUA, REQ_WRITE
from bcachectl.errors import WrongState
from tests import nbd_client
from tests.export.served import serve
from tests.nbd_client import NbdClient, NegotiationError, list_exports
from tests.require import need

SIZE_BYTES = 8 << 20


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "image0"
    path.write_bytes(random.Random(1).randbytes(SIZE_BYTES))
    return path


@pytest.fixture
def socket_path(tmp_path: Path) -> Path:
    return tmp_path / "nbd.sock"


@pytest.mark.parametrize("is_quick", [True, False])
@pytest.mark.parametrize("structured", [True, False])
def test_many_requests_at_once_agree_with_a_bytearray(image: Path, socket_path: Path, is_quick: bool,
                                                      structured: bool) -> None:
    draw = random.Random(4)
    model = bytearray(image.read_bytes())
    with serve([image], socket_path, is_quick=is_quick), NbdClient(socket_path, structured=structured) as client:
        assert client.size_bytes == SIZE_BYTES
        for _ in range(40):
            expected: dict[int, tuple[int, int]] = {}
            position = 0
            while position < SIZE_BYTES:
                start = position + draw.randrange(400) * 512
                length = 512 * draw.choice((1, 8, 8, 8, 8, 100, 1000, 3000))
                position = start + length
                if position > SIZE_BYTES:
                    break
                command = draw.choice((nbd_client.CMD_READ, nbd_client.CMD_READ, nbd_client.CMD_WRITE,
                                       nbd_client.CMD_WRITE_ZEROES))
                data = b""
                if command == nbd_client.CMD_WRITE:
                    data = draw.randbytes(length)
                    model[start:position] = data
                elif command == nbd_client.CMD_WRITE_ZEROES:
                    model[start:position] = bytes(length)
                cookie = client.send(command, start, length, data)
                if command == nbd_client.CMD_READ:
                    expected[cookie] = start, position
            while client.in_flight:
                reply = client.receive()
                assert reply.error == 0
                if reply.cookie in expected:
                    start, end = expected[reply.cookie]
                    assert reply.data == model[start:end]
        client.flush()
        assert client.read_all() == bytes(model)
    assert image.read_bytes() == bytes(model)


def test_images_on_a_file_system_without_nowait(socket_path: Path) -> None:
    need(os.path.ismount("/dev/shm"), "a tmpfs at /dev/shm")
    with tempfile.TemporaryDirectory(dir="/dev/shm") as directory:
        path = Path(directory, "image")
        path.write_bytes(data := random.Random(2).randbytes(1 << 20))
        with serve([path], socket_path) as served, NbdClient(socket_path) as client:
            assert client.read_all(4096) == data
            assert served.volumes[0].seen == []             # all the quick way


def test_eight_large_reads_at_once_do_not_hang(image: Path, socket_path: Path) -> None:
    # performance.md: the transmit buffer is full, whole requests wait in the receive buffer, and no event will come.
    expected = image.read_bytes()
    with serve([image], socket_path), NbdClient(socket_path, timeout_s=10) as client:
        for size_bytes in (1 << 20, nbd_quick.MAX_QUICK_BYTES // 2, 3 << 20, 256 << 10):
            sent = {client.send(nbd_client.CMD_READ, n * 4096, size_bytes): n * 4096 for n in range(40)}
            time.sleep(0.05)
            while client.in_flight:
                reply = client.receive()
                assert reply.data == expected[sent[reply.cookie]:][:size_bytes]


def test_what_the_last_parse_of_a_turn_answers_is_sent(image: Path, socket_path: Path,
                                                       monkeypatch: pytest.MonkeyPatch) -> None:
    """Two arenas full of answers, and one parse a turn besides the first: nothing is left to parse then, and no event
    will come for what that parse has answered.
    """
    monkeypatch.setattr(nbd_quick, "ARENA_BYTES", 64 << 10)
    monkeypatch.setattr(nbd_connection, "PARSES_PER_TURN", 1)
    expected = image.read_bytes()
    with serve([image], socket_path) as served, NbdClient(socket_path, timeout_s=10) as client:
        requests = b"".join(struct.pack(">IHHQQI", 0x25609513, 0, nbd_client.CMD_READ, n, n * 4096, 4096)
                            for n in range(30))
        client._socket.sendall(requests)
        got = bytearray()
        while len(got) < 30 * (16 + 4096):
            got += client._socket.recv(1 << 20)
        assert served.volumes[0].seen == []             # all the quick way
    for n in range(30):
        assert got[n * 4112 + 16:(n + 1) * 4112] == expected[n * 4096:(n + 1) * 4096]


def test_a_client_that_reads_nothing_is_held_back(image: Path, socket_path: Path) -> None:
    with serve([image], socket_path, is_quick=False) as served, NbdClient(socket_path, timeout_s=20) as client:
        count = 60
        for _ in range(count):
            client.send(nbd_client.CMD_READ, 0, 4 << 20)
        time.sleep(0.5)
        (connection,) = served.server.connections.values()
        assert connection.in_flight_bytes <= nbd_request.MAX_IN_FLIGHT_BYTES + (8 << 20)
        with NbdClient(socket_path) as other:
            assert len(other.read(0, 4096)) == 4096
        for _ in range(count):
            assert len(client.receive().data) == 4 << 20


def test_a_client_that_reads_no_acknowledgements_is_held_back_too(image: Path, socket_path: Path) -> None:
    requests = struct.pack(">IHHQQI", 0x25609513, 0, nbd_client.CMD_FLUSH, 7, 0, 0) * 1000
    requests += struct.pack(">IHHQQI", 0x25609513, 0, 99, 7, 0, 0) * 1000
    with serve([image], socket_path) as served, NbdClient(socket_path) as client:
        client._socket.setblocking(False)
        sent = 0
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            try:
                sent += client._socket.send(requests[sent % len(requests):])
            except BlockingIOError:
                (connection,) = served.server.connections.values()
                if connection.blocked and connection.in_flight == 0:
                    break
                time.sleep(0.01)
        assert connection.blocked
        assert len(connection.out) <= nbd_request.MAX_UNSENT + nbd_request.MAX_IN_FLIGHT
        client._socket.settimeout(10)
        answers = 0
        while answers < sent // 28 * 16:
            answers += len(client._socket.recv(1 << 20))


def test_flags_flush_and_fua_reach_the_volume(image: Path, socket_path: Path) -> None:
    with serve([image], socket_path) as served, NbdClient(socket_path, structured=True) as client:
        wanted = (nbd_client.SEND_FLUSH | nbd_client.SEND_FUA | nbd_client.SEND_TRIM | nbd_client.SEND_WRITE_ZEROES
                  | nbd_client.CAN_MULTI_CONN | nbd_client.SEND_DF | nbd_client.SEND_FAST_ZERO)
        assert client.flags & wanted == wanted
        assert not client.flags & nbd_client.READ_ONLY
        assert client.block_sizes == (512, 4096, 32 << 20)
        client.write(4096, b"a" * 512, fua=True)
        client.write(512, b"b" * 4096)
        client.flush()
        client.trim(1 << 20, 65536)
        client.write_zeroes(1 << 20, 65536, no_hole=True)
        assert served.volumes[0].seen[:3] == [(REQ_WRITE, 8, 1, REQ_FUA), (REQ_WRITE, 1, 8, 0), (REQ_FLUSH, 0, 0, 0)]
        assert client.read(1 << 20, 65536) == bytes(65536)
        reply = client.send(nbd_client.CMD_WRITE_ZEROES, 0, 4096, flags=nbd_client.FLAG_FAST_ZERO)
        assert client.receive().error == errno.EOPNOTSUPP, reply


@pytest.mark.parametrize("structured", [True, False])
def test_wrong_requests_get_an_errno_and_the_connection_lives(image: Path, socket_path: Path,
                                                              structured: bool) -> None:
    with serve([image], socket_path) as served, NbdClient(socket_path, structured=structured) as client:
        for command, offset, length, data, flags, error in (
                (nbd_client.CMD_READ, 100, 512, b"", 0, errno.EINVAL),
                (nbd_client.CMD_READ, 0, 100, b"", 0, errno.EINVAL),
                (nbd_client.CMD_READ, 0, 0, b"", 0, errno.EINVAL),
                (nbd_client.CMD_READ, SIZE_BYTES - 512, 1024, b"", 0, errno.EINVAL),
                (nbd_client.CMD_READ, 1 << 63, 512, b"", 0, errno.EINVAL),
                (nbd_client.CMD_READ, 0, 64 << 20, b"", 0, errno.EINVAL),
                (nbd_client.CMD_WRITE, SIZE_BYTES - 512, 1024, b"x" * 1024, 0, errno.ENOSPC),
                (nbd_client.CMD_WRITE, 1, 512, b"x" * 512, 0, errno.EINVAL),
                (nbd_client.CMD_WRITE, 0, 1000, b"x" * 1000, 0, errno.EINVAL),
                (nbd_client.CMD_WRITE, 0, 40 << 20, bytes(40 << 20), 0, errno.ENOSPC),
                (nbd_client.CMD_TRIM, SIZE_BYTES, 512, b"", 0, errno.EINVAL),
                (nbd_client.CMD_WRITE_ZEROES, SIZE_BYTES, 512, b"", 0, errno.ENOSPC),
                (nbd_client.CMD_WRITE_ZEROES, 3, 512, b"", 0, errno.EINVAL),
                (nbd_client.CMD_CACHE, 0, 512, b"", 0, errno.EINVAL),
                (nbd_client.CMD_BLOCK_STATUS, 0, 512, b"", 0, errno.EINVAL),
                (99, 0, 512, b"", 0, errno.EINVAL),
                (nbd_client.CMD_READ, 0, 512, b"", 1 << 15, errno.EINVAL)):
            client.send(command, offset, length, data, flags)
            assert client.receive().error == error, (command, offset, length)
            assert len(client.read(512, 512)) == 512
        served.volumes[0].fail_with = errno.ETIMEDOUT
        with pytest.raises(OSError) as caught:
            client.flush()
        assert caught.value.errno == errno.EIO


def test_a_read_only_volume_refuses_writes(image: Path, socket_path: Path) -> None:
    before = image.read_bytes()
    with serve([image], socket_path, read_only=True), NbdClient(socket_path) as client:
        assert client.flags & nbd_client.READ_ONLY
        assert not client.flags & nbd_client.SEND_TRIM
        for call in (lambda: client.write(0, b"x" * 512), lambda: client.trim(0, 512),
                     lambda: client.write_zeroes(0, 512)):
            with pytest.raises(OSError) as caught:
                call()
            assert caught.value.errno == errno.EPERM
        client.flush()
        assert client.read_all() == before


def test_exports_by_name(tmp_path: Path, image: Path, socket_path: Path) -> None:
    second = tmp_path / "image1"
    second.write_bytes(b"2" * 4096)
    with serve([image, second], socket_path):
        assert list_exports(socket_path) == ["bcache0", "bcache1"]
        with NbdClient(socket_path, "bcache1") as client:
            assert client.read_all() == b"2" * 4096
        with NbdClient(socket_path, "") as client:
            assert client.size_bytes == SIZE_BYTES
        with pytest.raises(NegotiationError, match="no such export"):
            NbdClient(socket_path, "bcache2")


def test_block_status(image: Path, socket_path: Path) -> None:
    contexts = ("base:allocation", "bcachectl:cache")
    with serve([image], socket_path), NbdClient(socket_path, meta_contexts=contexts) as client:
        assert client.block_status(0, 3 * 4096) == {
            "base:allocation": [(12288, 0)], "bcachectl:cache": [(4096, 0), (4096, 2), (4096, 1)]}
        assert client.block_status(0, 3 * 4096, one=True)["bcachectl:cache"] == [(4096, 0)]


def test_usual_tools_understand_it(image: Path, socket_path: Path, require_tool: Callable[[str], str],
                                   tmp_path: Path) -> None:
    nbdinfo, nbdcopy, qemu_img = require_tool("nbdinfo"), require_tool("nbdcopy"), require_tool("qemu-img")
    uri = f"nbd+unix:///bcache0?socket={socket_path}"
    with serve([image], socket_path):
        info = json.loads(subprocess.run([nbdinfo, "--json", uri], capture_output=True, check=True).stdout)
        (export,) = info["exports"]
        assert (export["export-size"], export["can_multi_conn"], export["is_read_only"]) == (SIZE_BYTES, True, False)
        assert sorted(export["contexts"]) == ["base:allocation", "bcachectl:cache"]
        subprocess.run([nbdinfo, "--map=bcachectl:cache", uri], capture_output=True, check=True)
        subprocess.run([nbdcopy, uri, str(tmp_path / "copy")], check=True)
        assert (tmp_path / "copy").read_bytes() == image.read_bytes()
        data = random.Random(9).randbytes(SIZE_BYTES)
        (tmp_path / "new").write_bytes(data)
        subprocess.run([nbdcopy, "--flush", str(tmp_path / "new"), uri], check=True)
        subprocess.run([qemu_img, "compare", "-f", "raw", "-F", "raw", str(tmp_path / "new"), uri], check=True,
                       capture_output=True)
    assert image.read_bytes() == data


def raw(path: Path) -> socket.socket:
    wire = socket.socket(socket.AF_UNIX)
    wire.settimeout(10)
    wire.connect(str(path))
    return wire


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def is_hung_up(wire: socket.socket) -> bool:
    try:
        while wire.recv(65536):
            pass
    except ConnectionResetError:
        pass
    return True


def test_malformed_clients_harm_nobody(image: Path, socket_path: Path) -> None:
    draw = random.Random(7)
    with serve([image], socket_path), NbdClient(socket_path) as good:
        for junk in (b"", b"\xff" * 4, b"GET / HTTP/1.1\r\n\r\n", bytes(4) + b"x" * 200,
                     bytes(4) + struct.pack(">QII", 0x49484156454F5054, 7, 1 << 31),
                     bytes(3) + b"\1" + struct.pack(">QII", 0x49484156454F5054, 1, 4) + b"none"):
            wire = raw(socket_path)
            wire.sendall(junk)
            wire.shutdown(socket.SHUT_WR)
            assert is_hung_up(wire)
            wire.close()
        for _ in range(50):
            wire = raw(socket_path)
            wire.recv(18)
            try:
                wire.sendall(b"\0\0\0\1" + struct.pack(">QII", 0x49484156454F5054, draw.choice((3, 6, 7, 8, 9, 10, 50)),
                                                       len(junk := draw.randbytes(draw.randrange(60)))) + junk)
            except BrokenPipeError:
                pass
            wire.close()
        # Away in the middle of a write's payload, and in the middle of many reads.
        for command, length, payload in ((1, 1 << 20, b"x" * 70000), (0, 1 << 20, b"")):
            bad = NbdClient(socket_path)
            for cookie in range(20):
                bad._socket.sendall(struct.pack(">IHHQQI", 0x25609513, 0, command, cookie, 0, length))
                if payload:
                    break
            bad._socket.sendall(payload)
            bad._socket.close()
        bad = NbdClient(socket_path)
        bad._socket.sendall(b"rubbish instead of a request, more than twenty-eight bytes")
        assert is_hung_up(bad._socket)
        assert good.read(0, 4096) == image.read_bytes()[:4096]


def test_the_handshake_survives_any_bytes() -> None:
    # Options by feed(): random, cut anywhere; it may only ever ask for more, answer, or be over.
    draw = random.Random(11)
    for _ in range(3000):
        handshake = Handshake([])
        data = b"\0\0\0\1"
        for _ in range(4):
            body = draw.choice((draw.randbytes(draw.randrange(40)), struct.pack(">IH", 0, draw.randrange(3)),
                                struct.pack(">II", 0, draw.randrange(1 << 32))))
            data += struct.pack(">QII", 0x49484156454F5054, draw.randrange(12), len(body)) + body
        view = memoryview(data)
        while not handshake.is_over and (used := handshake.feed(view)):
            view = view[used:]


def test_requests_in_flight_are_answered_before_a_stop(image: Path, socket_path: Path) -> None:
    with serve([image], socket_path, is_quick=False) as served:
        client = NbdClient(socket_path)
        served.volumes[0].delay_ns = 300_000_000
        for number in range(5):
            client.send(nbd_client.CMD_WRITE, number * 4096, 4096, bytes([number]) * 4096)
        time.sleep(0.1)
        replies: list[int] = []

        def take() -> None:
            replies.extend(client.receive().error for _ in range(5))

        thread = threading.Thread(target=take)
        thread.start()
    thread.join(5)
    assert replies == [0] * 5
    assert is_hung_up(client._socket)
    client.close()
    assert image.read_bytes()[4 * 4096:5 * 4096] == b"\4" * 4096


def test_sockets_that_are_in_the_way(image: Path, socket_path: Path, tmp_path: Path) -> None:
    with serve([image], socket_path), pytest.raises(WrongState, match="another engine"):
        nbd.listen(str(socket_path))
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(socket_path))
    with serve([image], socket_path):
        assert os.stat(socket_path).st_mode & 0o777 == 0o600
    (tmp_path / "file").touch()
    with pytest.raises(WrongState, match="no socket"):
        nbd.listen(str(tmp_path / "file"))
    with pytest.raises(WrongState, match="shorter"):
        nbd.listen("/" + "x" * 200)


def test_buffers_are_used_again_and_bounded() -> None:
    pool = BufferPool()
    first = pool.take(3000)
    assert first.capacity_bytes == 4096
    pool.release(first)
    assert pool.take(4096) is first
    for buffer in [pool.take(16 << 20) for _ in range(6)]:
        pool.release(buffer)
    assert pool.pooled_bytes <= 64 << 20


def test_large_buffers_make_room_for_small_ones() -> None:
    pool = BufferPool()
    small = pool.take(4096)
    for buffer in [pool.take(1 << 20) for _ in range(65)]:
        pool.release(buffer)
    pool.release(small)
    assert pool.take(4096) is small
    assert pool.pooled_bytes == 63 << 20


def test_nothing_is_leaked_by_any_mix_of_requests(image: Path, socket_path: Path) -> None:
    draw = random.Random(12)
    with serve([image], socket_path, is_quick=False) as served:
        for _ in range(30):
            client = NbdClient(socket_path, structured=draw.random() < 0.5)
            for _ in range(draw.randrange(60)):
                command = draw.randrange(9)
                length = draw.choice((0, 100, 512, 4096, 65536, 1 << 20))
                offset = draw.choice((0, 512, 7, SIZE_BYTES - 4096, 1 << 60))
                client.send(command if command != nbd_client.CMD_DISC else 3, offset, length,
                            bytes(length) if command == nbd_client.CMD_WRITE else b"", draw.choice((0, 0, 0, 1, 4, 16)))
            if draw.random() < 0.5:
                while client.in_flight:
                    client.receive()
                # The server may still be between the last byte and its books.
                connections = list(served.server.connections.values())
                wait_until(lambda held=connections: not any(each.in_flight or each.in_flight_bytes for each in held))
            client._socket.close()
        wait_until(lambda: not served.server.connections)
