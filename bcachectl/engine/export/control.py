# SPDX-License-Identifier: GPL-2.0-only
"""The engine's control socket: `ControlServer` answers the protocol that `bcachectl.control` describes.

The server never blocks the engine.  It has no thread and no loop of its own:

1. it registers its sockets with the rim's loop, which calls `ControlServer.on_ready` for one that is ready;
2. a request that only looks is answered at once; one that works becomes a task of the core;
3. after the tasks ran the loop calls `ControlServer.flush`, which sends the results of those that ended.

Everything about a client is bounded: the length of its request line, how many of its requests may be open, and how
much it may leave unread.  A client that does not read its answers is not read from either, until it does.

A socket that an engine left behind when it was killed refuses connections; it is replaced.  One that answers belongs
to an engine that runs this very set, and this engine does not start (WrongState).
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import os
import select
import socket
from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING, Any, Protocol

from bcachectl import __version__
from bcachectl.control import (
    MAX_REQUEST_BYTES,
    PROTOCOL,
    EngineSet,
    match_volume,
    parse_set_uuid,
)
from bcachectl.engine.bdev import Bdev
from bcachectl.engine.front import Volume
from bcachectl.engine.where import where
from bcachectl.errors import BcachectlError, Refused, UsageError, WrongState
from bcachectl.snapshot import SetSnapshot, to_json
from bcachectl.units import format_uuid, parse_size

if TYPE_CHECKING:
    from bcachectl.engine.cache_set import CacheSet

MAX_CLIENTS = 64
MAX_OPEN_CALLS = 64
"""Requests of one client that may wait for their tasks."""

MAX_BACKLOG_BYTES = 1 << 20
"""Unread answers of one client past which its next request is left in the socket."""

_PARAM_TYPES: dict[str, Any] = {"cells": int, "since": int, "target": str, "names": list, "values": dict,
                                "volume": str, "set": str, "size": (int, str), "sector": int, "count": int}

MAX_TEXT_BYTES = 4096
"""Of one name, path or value; a longer number Python would not even read."""

MAX_CELLS = 65536
"""Cells of a bucket map."""


class Poller(Protocol):
    """The rim's loop, as far as the server needs it: whom to call when a descriptor is ready."""

    def register(self, fd: int, handler: ControlServer, events: int = select.EPOLLIN) -> None:
        """Call the handler's ``on_ready`` whenever ``fd`` is ready."""
        ...

    def modify(self, fd: int, events: int) -> None:
        """Wait for other events."""
        ...

    def unregister(self, fd: int) -> None:
        """Forget ``fd``."""
        ...


class Host(Protocol):
    """What the server asks of the program around the engine."""

    def open_backing(self, path: str) -> Bdev:
        """Open a backing device and give it the next index; DeviceError or Refused if that cannot be."""
        ...

    def close_backing(self, bdev: Bdev) -> None:
        """Close a device whose registration failed."""
        ...

    def publish(self, volume: Volume) -> None:
        """Export a volume that has just appeared."""
        ...

    def places(self) -> list[dict[str, str | None]]:
        """Where each volume is exported: ``volume``, ``device`` and ``uri``."""
        ...

    def request_stop(self) -> None:
        """Stop the engine in good order, as SIGTERM does."""
        ...


class _Call:
    # A request that a task works on.
    __slots__ = ("client", "number", "result", "error")

    def __init__(self, client: _Client, number: Any) -> None:
        self.client = client
        self.number = number
        self.result: Any = None
        self.error: BcachectlError | None = None


class _Client:
    __slots__ = ("socket", "received", "unsent", "open_calls", "events", "is_closing", "is_gone")

    def __init__(self, connection: socket.socket) -> None:
        self.socket = connection
        self.received = bytearray()
        self.unsent = bytearray()
        self.open_calls = 0
        self.events = select.EPOLLIN
        self.is_closing = False
        self.is_gone = False


class ControlServer:
    """One engine's socket and its clients."""

    def __init__(self, cset: CacheSet, host: Host, loop: Poller, path: str) -> None:
        """Listen at ``path``, mode 0600; WrongState if an engine answers there already."""
        self.cset = cset
        self.host = host
        self.loop = loop
        self.path = path
        self.pid = os.getpid()
        self._clients: dict[int, _Client] = {}
        self._ended: list[_Call] = []
        self._listener = _listen(path)
        status = os.stat(path)
        self._inode = (status.st_dev, status.st_ino)
        loop.register(self._listener.fileno(), self)

    def on_ready(self, fd: int, events: int) -> None:
        """Serve a descriptor that is ready."""
        if fd == self._listener.fileno():
            self._accept()
            return
        client = self._clients.get(fd)
        if client is None:
            return
        if events & select.EPOLLOUT:
            self._send(client)
            self._serve(client)
        if events & (select.EPOLLIN | select.EPOLLHUP | select.EPOLLERR) and not client.is_gone:
            self._receive(client)
        self._poll(client)

    def flush(self) -> None:
        """Send what the tasks that have ended gave."""
        if not self._ended:
            return
        ended, self._ended = self._ended, []
        for call in ended:
            call.client.open_calls -= 1
            if call.error is None:
                self._put(call.client, {"id": call.number, "result": call.result})
            else:
                self._put(call.client, _error_of(call.number, call.error))
            self._serve(call.client)
            self._poll(call.client)

    def close(self) -> None:
        """Stop listening, and take the socket away if it is still this engine's."""
        self.flush()
        self.loop.unregister(self._listener.fileno())
        self._listener.close()
        for client in list(self._clients.values()):
            self._send(client)
            self._drop(client)
        try:
            status = os.stat(self.path)
            if (status.st_dev, status.st_ino) == self._inode:
                os.unlink(self.path)
        except FileNotFoundError:
            pass

    # Sockets.

    def _accept(self) -> None:
        try:
            connection, _address = self._listener.accept()
        except OSError:
            return
        connection.setblocking(False)
        client = _Client(connection)
        if len(self._clients) >= MAX_CLIENTS:
            client.unsent += _line(_error_of(None, WrongState(f"this engine has {MAX_CLIENTS} clients already")))
            self._send(client)
            connection.close()
            return
        self._clients[connection.fileno()] = client
        self.loop.register(connection.fileno(), self)
        self._put(client, {"bcachectl": PROTOCOL, "version": __version__, "set": self._set_uuid(), "pid": self.pid})

    def _receive(self, client: _Client) -> None:
        try:
            data = client.socket.recv(MAX_REQUEST_BYTES)
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            data = b""
        if not data:
            self._drop(client)
            return
        client.received += data
        self._serve(client)

    def _serve(self, client: _Client) -> None:
        # Take whole lines while the client may ask; what is left stays for later.
        while not client.is_gone and _may_ask(client):
            end = client.received.find(b"\n")
            if end < 0:
                if len(client.received) > MAX_REQUEST_BYTES:
                    client.is_closing = True
                    client.received.clear()
                    too_long = UsageError(f"a request line is longer than {MAX_REQUEST_BYTES} bytes")
                    self._put(client, _error_of(None, too_long))
                return
            line = bytes(client.received[:end])
            del client.received[:end + 1]
            self._take(client, line)

    def _put(self, client: _Client, message: dict[str, Any]) -> None:
        if not client.is_gone:
            client.unsent += _line(message)
            self._send(client)

    def _send(self, client: _Client) -> None:
        try:
            while client.unsent:
                sent = client.socket.send(client.unsent)
                del client.unsent[:sent]
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            self._drop(client)
            return
        if client.is_closing:
            self._drop(client)

    def _poll(self, client: _Client) -> None:
        # What to wait for next: room for the answers that are left, and requests while the client may ask.
        if not client.is_gone:
            events = (select.EPOLLOUT if client.unsent else 0) | (select.EPOLLIN if _may_ask(client) else 0)
            if events != client.events:
                client.events = events
                self.loop.modify(client.socket.fileno(), events)

    def _drop(self, client: _Client) -> None:
        if not client.is_gone:
            client.is_gone = True
            self.loop.unregister(client.socket.fileno())
            self._clients.pop(client.socket.fileno(), None)
            client.socket.close()

    # Requests.

    def _take(self, client: _Client, line: bytes) -> None:
        number: Any = None
        try:
            number, method, params = _parse(line)
            answer = getattr(self, f"_do_{method}", None) if method.isidentifier() else None
            if answer is None:
                raise UsageError(f"this engine knows no method {method!r}")
            _check_params(answer, params)
            result = answer(**params)
        except BcachectlError as error:
            self._put(client, _error_of(number, error))
        else:
            if isinstance(result, Coroutine):
                client.open_calls += 1
                self.cset.sched.spawn(self._finish(_Call(client, number), result), f"control {method}")
            else:
                self._put(client, {"id": number, "result": result})

    async def _finish(self, call: _Call, work: Coroutine[Any, Any, Any]) -> None:
        try:
            call.result = await work
        except BcachectlError as error:
            call.error = error
        self._ended.append(call)

    def _do_snapshot(self, cells: int = 0) -> Any:
        return to_json(self._snapshot(cells))

    def _do_volumes(self) -> Any:
        return to_json(self._snapshot(0).volumes)

    def _do_places(self) -> Any:
        return self.host.places()

    def _do_events(self, since: int = 0) -> Any:
        return [to_json(event) for event in self._snapshot(0).events if event.serial > since]

    def _do_get(self, target: str = "", names: list[str] | None = None) -> Any:
        tunables = self.cset.tunables
        return {name: tunables.get(target, name) for name in names or tunables.names(target)}

    def _do_check(self, target: str, values: dict[str, str]) -> Any:
        for name, text in values.items():
            self.cset.tunables.check(target, name, text)

    def _do_set(self, target: str, values: dict[str, str]) -> Any:
        self._do_check(target, values)
        return self._set(target, values)

    def _do_attach(self, volume: str, set: str | None = None) -> Any:
        self._check_set(set)
        names = match_volume(self._snapshot(0).volumes, volume)
        if len(names) > 1:
            raise UsageError(f"{volume} could be {' or '.join(names)}")
        if names:
            return self._attach_volume(names[0])
        return self._attach_device(volume)

    def _do_detach(self, volume: str) -> Any:
        found = self._volume(volume)
        if found.kind != "cached":
            raise WrongState(f"{found.name} is a flash-only volume; it has no backing device to detach from the set")
        if not found.attached:
            raise WrongState(f"{found.name} is not attached to a set")
        return self.cset.detach(found.name)

    def _do_stop(self) -> Any:
        self.host.request_stop()
        return None

    def _do_gc(self) -> Any:
        return self.cset.run_gc()

    def _do_flush(self, volume: str) -> Any:
        return self.cset.flush_volume(self._volume(volume).name)

    def _do_where(self, volume: str, sector: int, count: int = 1) -> Any:
        return self._where(self._volume(volume).name, sector, count)

    def _do_volume_create(self, size: int | str) -> Any:
        size_bytes = size if isinstance(size, int) else parse_size(size)
        if size_bytes < 0:
            raise UsageError(f"a volume of {size_bytes} bytes cannot be")
        return self._create(size_bytes)

    def _do_volume_remove(self, volume: str) -> Any:
        found = self._volume(volume)
        if found.kind != "flash":
            raise WrongState(f"{found.name} is a cached device, not a flash-only volume; "
                             "`detach` takes it out of the set")
        return self.cset.volume_remove(found.name)

    async def _set(self, target: str, values: dict[str, str]) -> dict[str, str]:
        return {name: await self.cset.tunables.set(target, name, text) for name, text in values.items()}

    async def _where(self, name: str, sector: int, count: int) -> dict[str, Any]:
        found = self.cset.volume(name)
        pieces = await where(self.cset, found, sector=sector, count=count)
        return {"volume": name, "uuid": format_uuid(found.uuid), "pieces": pieces}

    async def _create(self, size_bytes: int) -> str:
        created = await self.cset.volume_create(size_bytes)
        return self._publish(created)

    async def _attach_volume(self, name: str) -> str:
        await self.cset.attach(name)
        return name

    async def _attach_device(self, path: str) -> str:
        bdev = self.host.open_backing(path)
        try:
            device = await self.cset.register_backing(bdev)
        except BcachectlError:
            self.host.close_backing(bdev)
            raise
        name = self._publish(device)
        if not device.attached:
            await self.cset.attach(name)
        return name

    def _publish(self, volume: Volume) -> str:
        # A volume gets its name when the volumes are listed for the first time.
        assert any(one is volume for one in self.cset.volumes), "only a volume of the set is published"
        self.host.publish(volume)
        return volume.name

    def _check_set(self, text: str | None) -> None:
        # A volume is attached to the set that was asked; the text must name this one.
        if text is not None and parse_set_uuid(text) != self._set_uuid():
            raise WrongState(f"no running set has the uuid {parse_set_uuid(text)}; this engine runs {self._set_uuid()}")

    def _volume(self, text: str) -> Any:
        volumes = self._snapshot(0).volumes
        names = match_volume(volumes, text)
        if len(names) != 1:
            known = ", ".join(volume.name for volume in volumes) or "none"
            raise WrongState(f"{text}: {'no' if not names else 'more than one'} volume of this set (volumes: {known})")
        return next(volume for volume in volumes if volume.name == names[0])

    def _snapshot(self, cells: int) -> SetSnapshot:
        if not 0 <= cells <= MAX_CELLS:
            raise UsageError(f"cells must be from 0 to {MAX_CELLS}")
        return dataclasses.replace(self.cset.snapshot(cells), pid=self.pid, version=__version__)

    def _set_uuid(self) -> str:
        return format_uuid(self.cset.uuid)


def _listen(path: str) -> socket.socket:
    # Bound under another name with no one else's rights, then renamed: nobody ever sees it with wider ones.
    if os.path.lexists(path):
        try:
            EngineSet(path).close()
        except WrongState:
            pass
        else:
            raise WrongState(f"an engine runs this set already and listens at {path}")
    # Short, since the name of a Unix socket has at most 107 bytes.
    new_path = os.path.join(os.path.dirname(path), f".{os.getpid()}")
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.setblocking(False)
    try:
        mask = os.umask(0o177)
        try:
            listener.bind(new_path)
        finally:
            os.umask(mask)
        listener.listen(MAX_CLIENTS)
        os.rename(new_path, path)
    except OSError as error:
        listener.close()
        raise Refused(f"{path}: cannot listen there ({error.strerror or error})") from None
    return listener


def _may_ask(client: _Client) -> bool:
    return (not client.is_closing and client.open_calls < MAX_OPEN_CALLS
            and len(client.unsent) < MAX_BACKLOG_BYTES)


def _parse(line: bytes) -> tuple[Any, str, dict[str, Any]]:
    try:
        request = json.loads(line)
    except (ValueError, RecursionError):
        raise UsageError("a request is one line of JSON") from None
    if not isinstance(request, dict) or not isinstance(request.get("method"), str):
        raise UsageError('a request is {"id": n, "method": ..., "params": {...}}')
    params = request.get("params", {})
    if not isinstance(params, dict):
        raise UsageError("params is an object")
    return request.get("id"), request["method"], params


def _check_params(answer: Callable[..., Any], params: dict[str, Any]) -> None:
    try:
        inspect.signature(answer).bind(**params)
    except TypeError as error:
        raise UsageError(f"wrong parameters: {error}") from None
    for name, value in params.items():
        is_right = isinstance(value, _PARAM_TYPES[name]) and not isinstance(value, bool)
        texts = [value] if isinstance(value, str) else []
        if is_right and isinstance(value, (list, dict)):
            texts = [*value, *(value.values() if isinstance(value, dict) else [])]
        if not is_right or not all(isinstance(item, str) for item in texts):
            raise UsageError(f"wrong parameters: {name} is {type(value).__name__}")
        if not all(map(_is_argument, texts)):
            raise UsageError(f"wrong parameters: {name} has a text that no command line can have")


def _is_argument(text: str) -> bool:
    # Bytes that are no text come as the surrogates that Python makes of them; so they do in an argument.
    try:
        return len(text.encode("utf-8", "surrogateescape")) <= MAX_TEXT_BYTES and "\0" not in text
    except UnicodeEncodeError:
        return False


def _error_of(number: Any, error: BcachectlError) -> dict[str, Any]:
    return {"id": number, "error": {"status": error.exit_status, "message": str(error)}}


def _line(message: dict[str, Any]) -> bytes:
    return json.dumps(message, separators=(",", ":")).encode() + b"\n"
