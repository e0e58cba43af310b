# SPDX-License-Identifier: GPL-2.0-only
"""The control socket, with real clients in a thread and the engine on simulated disks: protocol, limits, T23."""

from __future__ import annotations

import json
import os
import select
import socket
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from bcachectl import control
from bcachectl.commands.attach import attach
from bcachectl.commands.detach import detach
from bcachectl.commands.get import get
from bcachectl.commands.set import set_tunables
from bcachectl.control import EngineSet, find, find_volume, socket_path
from bcachectl.engine.bdev import Bdev
from bcachectl.engine.export import control as server_side
from bcachectl.engine.export.control import ControlServer
from bcachectl.engine.front import Volume
from bcachectl.errors import BcachectlError, DeviceError, Refused, UsageError, WrongState
from bcachectl.units import format_uuid
from tests.sim.world import SECTOR, Backing, Setup, World


class Served:
    """A world whose engine can be asked over its socket; everything but the client runs in the calling thread."""

    def __init__(self, setup: Setup | None = None) -> None:
        self.world = World(setup or Setup(backings=(Backing(), Backing(member=False))), "control")
        self.world.run(self.world.cset.start(), "start")
        self.world.run(self.world.register(0), "register")
        self.uuid = format_uuid(self.world.cset.uuid)
        self.epoll = select.epoll()
        self.handlers: dict[int, ControlServer] = {}
        self.opened: list[str] = []
        self.closed: list[Bdev] = []
        self.published: list[str] = []
        self.is_stopped = False
        self.path = socket_path(self.uuid)
        self.server = ControlServer(self.world.cset, self, self, self.path)

    # What the server asks of the loop.

    def register(self, fd: int, handler: ControlServer, events: int = select.EPOLLIN) -> None:
        self.epoll.register(fd, events)
        self.handlers[fd] = handler

    def modify(self, fd: int, events: int) -> None:
        self.epoll.modify(fd, events)

    def unregister(self, fd: int) -> None:
        self.epoll.unregister(fd)
        del self.handlers[fd]

    # What the server asks of the program.

    def open_backing(self, path: str) -> Bdev:
        if path != "backing1":
            raise DeviceError(f"{path}: no such file or directory")
        self.opened.append(path)
        return self.world.bdevs[2]

    def close_backing(self, bdev: Bdev) -> None:
        self.closed.append(bdev)

    def publish(self, volume: Volume) -> None:
        self.published.append(volume.name)

    def places(self) -> list[dict[str, str | None]]:
        return [{"volume": volume.name, "device": None, "uri": f"nbd+unix:///{volume.name}?socket=s"}
                for volume in self.world.cset.volumes]

    def request_stop(self) -> None:
        self.is_stopped = True

    # The loop.

    def turn(self, timeout_s: float = 0.005) -> None:
        for fd, events in self.epoll.poll(timeout_s):
            if fd in self.handlers:
                self.handlers[fd].on_ready(fd, events)
        self.world._turn([])
        while any(client.open_calls for client in self.server._clients.values()) and not self.server._ended:
            self.world.step()
        self.server.flush()
        if self.is_stopped:
            self.is_stopped = False
            self.server.close()

    def during(self, work: Callable[[], Any]) -> Any:
        """The result of ``work``, done in a thread while the engine turns."""
        results: list[Any] = []

        def run() -> None:
            try:
                results.append(work())
            except BaseException as error:
                results.append(error)

        thread = threading.Thread(target=run)
        thread.start()
        while thread.is_alive():
            self.turn()
        if isinstance(results[0], BaseException):
            raise results[0]
        return results[0]


@pytest.fixture
def runtime(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    # pytest's own directories are too long for the name of a socket.
    with tempfile.TemporaryDirectory(prefix="ctl") as directory:
        monkeypatch.setenv("XDG_RUNTIME_DIR", directory)
        monkeypatch.setattr(control, "SHARED_DIR", f"{directory}/shared")
        yield Path(directory)


@pytest.fixture
def served(runtime: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Served]:
    monkeypatch.setattr("bcachectl.commands.waiting.LOOK_S", 0.05)
    made = Served()
    yield made
    if os.path.exists(made.path):
        made.server.close()
    made.epoll.close()


def ask(served: Served, method: str, **params: Any) -> Any:
    def work() -> Any:
        engine = EngineSet(served.path)
        try:
            return engine.call(method, **params)
        finally:
            engine.close()

    return served.during(work)


def test_greeting_and_rights(served: Served) -> None:
    engine = served.during(lambda: EngineSet(served.path))
    assert (engine.uuid, engine.pid) == (served.uuid, os.getpid())
    assert os.stat(served.path).st_mode & 0o777 == 0o600
    engine.close()


def test_snapshot_get_set(served: Served) -> None:
    def work() -> None:
        engine = EngineSet(served.path)
        snapshot = engine.snapshot(50)
        assert snapshot.pid == os.getpid()
        assert snapshot.map is not None
        assert len(snapshot.map.states) == 50
        assert engine.get("bcache0", ["state", "writeback_percent"]) == {"state": "clean", "writeback_percent": "10"}
        assert "tree_depth" in engine.get("", [])
        assert engine.set("bcache0", {"writeback_percent": "99", "writeback_delay": "1"}) == {
            "writeback_percent": "40", "writeback_delay": "1"}
        with pytest.raises(UsageError):
            engine.set("bcache0", {"writeback_percent": "5", "writeback_delay": "x"})
        assert engine.get("bcache0", ["writeback_percent"]) == {"writeback_percent": "40"}
        events = engine.call("events", since=0)
        assert engine.call("events", since=events[-1]["serial"]) == []
        assert [volume["name"] for volume in engine.call("volumes")] == ["bcache0"]
        engine.close()

    served.during(work)


def test_requests_are_answered_as_they_end_not_as_they_came(served: Served) -> None:
    def work() -> tuple[bool, bool, Any]:
        engine = EngineSet(served.path)
        gc, first, second = engine.start("gc"), engine.start("volumes"), engine.start("volumes")
        answered = (second.wait(5), first.wait(5))
        assert gc.wait(5)
        engine.close()
        return (*answered, gc.result)

    runs = served.world.cset.gc.runs
    assert served.during(work) == (True, True, None)
    assert served.world.cset.gc.runs == runs + 1


def test_t23_attach(served: Served, capsys: pytest.CaptureFixture[str]) -> None:
    uuid = served.uuid
    for text, error, why in (
        (f"{uuid}0", UsageError, "text follows the uuid"),
        (uuid[:-1] + ("0" if uuid[-1] != "0" else "1"), WrongState, "no running set has the uuid"),
        (uuid.replace("-", "x", 1).ljust(40, "0"), WrongState, "neither a running set"),
        ("bcache9", WrongState, "neither a running set"),
    ):
        with pytest.raises(error, match=why):
            served.during(lambda text=text: attach("backing1", text))
    with pytest.raises(WrongState, match="already attached"):
        served.during(lambda: attach("bcache0", uuid))
    with pytest.raises(BcachectlError, match="nowhere: no such file"):
        served.during(lambda: attach("nowhere", uuid))
    assert served.opened == []
    served.during(lambda: attach("backing1", uuid.upper().replace("-", "")))
    assert f"backing1 is attached to set {uuid} as bcache1" in capsys.readouterr().out
    assert (served.opened, served.published) == (["backing1"], ["bcache1"])
    with pytest.raises(WrongState, match="already attached"):
        served.during(lambda: attach("bcache1", uuid))


def test_t23_a_device_that_cannot_be_attached_is_closed_again(served: Served) -> None:
    # Not a bcache device at all.
    served.world.disks[2].now[4096:8192] = bytes(4096)
    with pytest.raises(BcachectlError, match="backing1"):
        served.during(lambda: attach("backing1", served.uuid))
    assert served.closed == [served.world.bdevs[2]]
    assert served.published == []


def test_detach_writes_back_first_and_the_set_forgets(served: Served, capsys: pytest.CaptureFixture[str]) -> None:
    world = served.world

    async def dirty() -> None:
        await world.tune("bcache0", "writeback_running", "0")
        await world.write(0, 0, 64, fua=True)

    world.run(dirty())
    served.during(lambda: detach("bcache0", dry_run=True))
    assert "32 KiB of dirty data" in capsys.readouterr().out
    served.during(lambda: detach("bcache0", wait=True))
    assert "bcache0 is detached" in capsys.readouterr().out
    assert world.cset.volumes[0].state == "no cache"
    with pytest.raises(WrongState, match="bcache0 is not attached"):
        served.during(lambda: detach("bcache0"))


def test_get_and_set_on_the_command_line(served: Served, capsys: pytest.CaptureFixture[str]) -> None:
    served.during(lambda: set_tunables("bcache0", ["writeback_percent=50", "cache_mode=writearound"]))
    assert capsys.readouterr().out == "writeback_percent = 40 (asked for 50)\ncache_mode = writearound\n"
    served.during(lambda: get("bcache0", ["cache_mode"]))
    assert capsys.readouterr().out == "writethrough writeback [writearound] none\n"
    served.during(lambda: get(served.uuid[:8], ["tree_depth", "nbuckets"], as_json=True))
    assert json.loads(capsys.readouterr().out)["values"] == {"tree_depth": "0", "nbuckets": "600"}
    served.during(lambda: set_tunables("bcache0", ["writeback_percent=7"], dry_run=True))
    assert capsys.readouterr().out == "would set writeback_percent of bcache0 to 7 (now 40)\n"
    with pytest.raises(UsageError, match="not a plain decimal"):
        served.during(lambda: set_tunables("bcache0", ["writeback_percent=x"], dry_run=True))
    for wrong in ("novalue", "=5"):
        with pytest.raises(UsageError, match="write NAME=VALUE"):
            set_tunables("bcache0", [wrong])


def test_where(served: Served) -> None:
    world = served.world

    async def story() -> None:
        await world.tune("bcache0", "writeback_running", "0")
        await world.write(0, 8, 16, fua=True)
        await world.write(0, 12, 4, fua=True)
        await world.read(0, 64, 8, nowait=False)
        await world.sleep(100)

    world.run(story())
    found = ask(served, "where", volume="bcache0", sector=0, count=128)
    assert found["uuid"] == format_uuid(world.cset.volumes[0].uuid)
    pieces = found["pieces"]
    assert [piece["start"] for piece in pieces[1:]] == [piece["end"] for piece in pieces[:-1]]
    assert (pieces[0]["start"], pieces[-1]["end"]) == (0, 128)
    states = {sector: piece for piece in pieces for sector in range(piece["start"], piece["end"])}
    assert {states[sector]["state"] for sector in range(8, 24)} == {"dirty"}
    assert {states[sector]["state"] for sector in range(64, 72)} == {"clean"}
    assert states[0]["state"] == "uncached"
    assert (states[0]["device"], states[0]["device_sector"]) == ("backing", 16)
    here = states[12]
    at = here["device_sector"] * SECTOR
    byte = world.volumes[0].read_nowait(12, 1)
    assert byte == at
    assert here["gen"] == world.cset.buckets.gen_at[here["bucket"]]
    name = ask(served, "volume_create", size="64k")
    assert ask(served, "where", volume=name, sector=0)["pieces"] == [
        {"start": 0, "end": 1, "state": "hole", "device": "zeros", "device_sector": None}]
    with pytest.raises(UsageError, match="behind its end"):
        ask(served, "where", volume="bcache0", sector=1 << 40)


def test_flash_volumes_come_and_go(served: Served) -> None:
    name = ask(served, "volume_create", size="64k")
    assert served.published == [name]
    with pytest.raises(WrongState, match="flash-only volume"):
        ask(served, "detach", volume=name)
    ask(served, "volume_remove", volume=name)
    with pytest.raises(WrongState, match="cached device, not a flash-only volume"):
        ask(served, "volume_remove", volume="bcache0")
    with pytest.raises(Refused):
        ask(served, "volume_create", size=100)


def test_what_a_person_may_call_a_running_set(served: Served) -> None:
    for text in (None, served.uuid, served.uuid.upper(), served.uuid[:8], served.uuid.replace("-", "")):
        found = served.during(lambda text=text: find(text))
        assert (found.live.uuid, found.target) == (served.uuid, "")
        found.live.close()
    found = served.during(lambda: find_volume(served.uuid))
    assert found.target == "bcache0"
    found.live.close()
    for text, words in ((served.uuid[:7], "is too short for a set"), ("bcache5", "neither a running set")):
        with pytest.raises(WrongState, match=words):
            served.during(lambda text=text: find(text))


@pytest.mark.parametrize(("line", "why"), [
    (b"nonsense\n", "one line of JSON"),
    (b"[" * 60_000 + b"\n", "one line of JSON"),
    (b"[1]\n", "a request is"),
    (b'{"id": 1}\n', "a request is"),
    (b'{"id": 1, "method": "nonsense"}\n', "knows no method 'nonsense'"),
    (b'{"id": 1, "method": "__init__"}\n', "knows no method"),
    (b'{"id": 1, "method": "a b"}\n', "knows no method"),
    (b'{"id": 1, "method": "volumes", "params": []}\n', "params is an object"),
    (b'{"id": 1, "method": "volumes", "params": {"x": 1}}\n', "wrong parameters"),
    (b'{"id": 1, "method": "flush"}\n', "wrong parameters"),
    (b'{"id": 1, "method": "snapshot", "params": {"cells": "7"}}\n', "cells is str"),
    (b'{"id": 1, "method": "snapshot", "params": {"cells": true}}\n', "cells is bool"),
    (b'{"id": 1, "method": "snapshot", "params": {"cells": -1}}\n', "cells must be from 0"),
    (b'{"id": 1, "method": "get", "params": {"names": [1]}}\n', "names is list"),
    (b'{"id": 1, "method": "set", "params": {"target": "", "values": {"a": 1}}}\n', "values is dict"),
    (b'{"id": 1, "method": "volume_create", "params": {"size": "many"}}\n', "is not a size"),
    (b'{"id": 1, "method": "attach", "params": {"volume": "a\\u0000b"}}\n', "no command line"),
    (b'{"id": 1, "method": "get", "params": {"names": ["\\ud800"]}}\n', "no command line"),
    (b'{"id": 1, "method": "set", "params": {"target": "bcache0", "values": {"label": "\\ud800"}}}\n',
     "no command line"),
    (b'{"id": 1, "method": "set", "params": {"target": "", "values": {"journal_delay_ms": "%s"}}}\n' % (b"9" * 5000),
     "no command line"),
])
def test_bad_requests_get_a_sentence_and_the_connection_lives(served: Served, line: bytes, why: str) -> None:
    def work() -> tuple[dict[str, Any], dict[str, Any]]:
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(served.path)
            reader = client.makefile()
            reader.readline()
            client.sendall(line)
            answer = json.loads(reader.readline())
            client.sendall(b'{"id": "x", "method": "volumes", "params": {}}\n')
            return answer, json.loads(reader.readline())

    answer, after = served.during(work)
    assert answer["error"]["status"] == 2
    assert why in answer["error"]["message"]
    assert after["id"] == "x"
    assert "result" in after


def test_a_line_without_end_closes_the_connection(served: Served) -> None:
    def work() -> tuple[str, str]:
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(served.path)
            reader = client.makefile()
            reader.readline()
            try:
                for _ in range(8):
                    client.sendall(b"x" * 32768)
            except (BrokenPipeError, ConnectionResetError):
                pass
            try:
                return reader.readline(), reader.readline()
            except ConnectionResetError:
                return "longer than", ""

    line, end = served.during(work)
    assert "longer than" in line
    assert end == ""
    assert not served.server._clients


def test_a_client_that_reads_nothing_is_not_read_from(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_side, "MAX_BACKLOG_BYTES", 4096)
    slow = socket.socket(socket.AF_UNIX)
    slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    slow.connect(served.path)
    slow.setblocking(False)
    line = b'{"id": 1, "method": "snapshot", "params": {"cells": 600}}\n'
    sent = 0
    try:
        while sent < 4 << 20:
            sent += slow.send(line * 16)
            served.turn(0)
    except BlockingIOError:
        pass
    for _ in range(20):
        served.turn(0)
    held = next(iter(served.server._clients.values()))
    assert len(held.unsent) < 4096 + 65536
    # Others are served all the while.
    assert ask(served, "volumes")[0]["name"] == "bcache0"
    slow.close()
    for _ in range(4):
        served.turn(0)
    assert not served.server._clients


def test_a_client_that_leaves_while_its_request_runs(served: Served) -> None:
    client = socket.socket(socket.AF_UNIX)
    client.connect(served.path)
    served.turn(0)
    assert b"bcachectl" in client.recv(4096)
    client.sendall(b'{"id": 1, "method": "gc", "params": {}}\n' * 3)
    client.close()
    runs = served.world.cset.gc.runs
    for _ in range(5):
        served.turn(0)
    served.world.run(served.world.sleep(1000))
    served.turn(0)
    assert served.world.cset.gc.runs > runs
    assert not served.server._clients


def test_too_many_clients(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_side, "MAX_CLIENTS", 1)
    first = served.during(lambda: EngineSet(served.path))
    with pytest.raises(WrongState):
        served.during(lambda: EngineSet(served.path))
    first.close()
    served.turn(0)
    served.turn(0)
    served.during(lambda: EngineSet(served.path)).close()


def test_a_second_engine_of_the_set_is_refused_and_a_dead_ones_socket_replaced(served: Served) -> None:
    with pytest.raises(WrongState, match="an engine runs this set already"):
        served.during(lambda: ControlServer(served.world.cset, served, served, served.path))
    dead = socket.socket(socket.AF_UNIX)
    path = f"{served.path}.dead.sock"
    dead.bind(path)
    dead.close()
    server = ControlServer(served.world.cset, served, served, path)
    assert os.stat(path).st_mode & 0o777 == 0o600
    server.close()
    assert not os.path.exists(path)


def test_closing_leaves_the_socket_of_a_successor(served: Served) -> None:
    os.unlink(served.path)
    Path(served.path).touch()
    served.server.close()
    assert os.path.exists(served.path)
    os.unlink(served.path)


def test_stop(served: Served) -> None:
    def work() -> bool:
        engine = EngineSet(served.path)
        assert engine.start("stop").wait(5)
        return engine.wait_end(5)

    assert served.during(work)
    assert not os.path.exists(served.path)
    with pytest.raises(WrongState, match="no engine runs here"):
        find(served.uuid)


def test_another_version_is_told(runtime: Path) -> None:
    path = str(runtime / "other.sock")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()

        def greet() -> None:
            connection, _address = listener.accept()
            connection.sendall(b'{"bcachectl": 99, "version": "9", "set": "", "pid": 1}\n')
            connection.close()

        thread = threading.Thread(target=greet)
        thread.start()
        with pytest.raises(WrongState, match="speaks version 99"):
            EngineSet(path)
        thread.join()
