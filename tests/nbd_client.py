# SPDX-License-Identifier: GPL-2.0-only
"""A small NBD client for tests: it knows exactly what was sent and what was acknowledged.

Newstyle negotiation with NBD_OPT_GO over a Unix socket; structured replies and meta contexts if asked for.

* One thing at a time: `NbdClient.read`, `write`, `flush`, `trim`, `write_zeroes`, `block_status`; a server's error is
  an OSError.
* Many at once: `send` gives a cookie, `receive` the next `Reply` whichever request it answers.

A server that goes away raises ConnectionError, whatever was being done.
"""

from __future__ import annotations

import os
import socket
import struct
from dataclasses import dataclass, field
from pathlib import Path

CMD_READ, CMD_WRITE, CMD_DISC, CMD_FLUSH, CMD_TRIM, CMD_CACHE, CMD_WRITE_ZEROES, CMD_BLOCK_STATUS = range(8)
FLAG_FUA, FLAG_NO_HOLE, FLAG_DF, FLAG_REQ_ONE, FLAG_FAST_ZERO = (1 << bit for bit in range(5))
(HAS_FLAGS, READ_ONLY, SEND_FLUSH, SEND_FUA, ROTATIONAL, SEND_TRIM, SEND_WRITE_ZEROES, SEND_DF, CAN_MULTI_CONN,
 SEND_RESIZE, SEND_CACHE, SEND_FAST_ZERO) = (1 << bit for bit in range(12))

_OPT_ABORT, _OPT_LIST, _OPT_GO, _OPT_STRUCTURED_REPLY, _OPT_LIST_META, _OPT_SET_META = 2, 3, 7, 8, 9, 10
_REP_ACK, _REP_SERVER, _REP_INFO, _REP_META_CONTEXT = 1, 2, 3, 4
_REP_ERROR = 1 << 31
_NBD_MAGIC, _OPTION_MAGIC, _REP_MAGIC = 0x4E42444D41474943, 0x49484156454F5054, 0x3E889045565A9
_REQUEST_MAGIC, _SIMPLE_MAGIC, _STRUCTURED_MAGIC = 0x25609513, 0x67446698, 0x668E33EF
_CHUNK_NONE, _CHUNK_DATA, _CHUNK_HOLE, _CHUNK_STATUS, _CHUNK_ERROR, _CHUNK_ERROR_OFFSET = 0, 1, 2, 5, 0x8001, 0x8002
_CHUNK_DONE = 1


class NegotiationError(Exception):
    """The server refuses an option; ``reply`` is its NBD_REP_ERR_ number without the top bit."""

    def __init__(self, reply: int, message: str) -> None:
        super().__init__(f"server refuses: error {reply} {message}")
        self.reply = reply


@dataclass(slots=True)
class Reply:
    """The answer to one request."""

    cookie: int
    error: int = 0
    data: bytearray = field(default_factory=bytearray)
    extents: dict[str, list[tuple[int, int]]] = field(default_factory=dict)
    """Meta context -> (length, flags) of each extent from the request's start on."""


@dataclass(slots=True)
class _Pending:
    command: int
    offset: int
    length: int
    reply: Reply


class NbdClient:
    """A connection to one export, ready for requests."""

    def __init__(self, path: Path | str, export: str = "", *, structured: bool = False,
                 meta_contexts: tuple[str, ...] = (), timeout_s: float = 60) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.settimeout(timeout_s)
        self._pending: dict[int, _Pending] = {}
        self.next_cookie = 1
        self._structured = structured or bool(meta_contexts)
        self._contexts: dict[int, str] = {}
        self.block_sizes: tuple[int, int, int] | None = None
        """Minimum, preferred and maximum, if the server says so."""
        self.size_bytes = self.flags = 0
        try:
            self._socket.connect(os.fspath(path))
            _greet(self._socket)
            if self._structured:
                _option(self._socket, _OPT_STRUCTURED_REPLY, b"")
            if meta_contexts:
                self._set_meta_contexts(export, meta_contexts)
            self._go(export)
        except BaseException:
            self._socket.close()
            raise

    def __enter__(self) -> NbdClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # --- one at a time

    def read(self, offset: int, length: int) -> bytes:
        """The bytes at an offset."""
        return bytes(self._do(CMD_READ, offset, length).data)

    def write(self, offset: int, data: bytes | memoryview, *, fua: bool = False) -> None:
        """Write and wait for the acknowledgement."""
        self._do(CMD_WRITE, offset, len(data), data, FLAG_FUA if fua else 0)

    def flush(self) -> None:
        """Make everything acknowledged durable."""
        self._do(CMD_FLUSH, 0, 0)

    def trim(self, offset: int, length: int, *, fua: bool = False) -> None:
        """Say that a range is not needed."""
        self._do(CMD_TRIM, offset, length, b"", FLAG_FUA if fua else 0)

    def write_zeroes(self, offset: int, length: int, *, fua: bool = False, no_hole: bool = False) -> None:
        """Make a range read as zeros."""
        self._do(CMD_WRITE_ZEROES, offset, length, b"", (FLAG_FUA if fua else 0) | (FLAG_NO_HOLE if no_hole else 0))

    def block_status(self, offset: int, length: int, *, one: bool = False) -> dict[str, list[tuple[int, int]]]:
        """The extents of each meta context that was agreed on."""
        return self._do(CMD_BLOCK_STATUS, offset, length, b"", FLAG_REQ_ONE if one else 0).extents

    def read_all(self, piece_bytes: int = 1 << 20) -> bytes:
        """The whole export."""
        return b"".join(self.read(offset, min(piece_bytes, self.size_bytes - offset))
                        for offset in range(0, self.size_bytes, piece_bytes))

    def close(self) -> None:
        """Say good-bye and hang up."""
        try:
            self._socket.sendall(struct.pack(">IHHQQI", _REQUEST_MAGIC, 0, CMD_DISC, 0, 0, 0))
        except OSError:
            pass
        self._socket.close()

    # --- many at once

    def send(self, command: int, offset: int, length: int, data: bytes | memoryview = b"", flags: int = 0) -> int:
        """Send a request; its cookie."""
        cookie, self.next_cookie = self.next_cookie, self.next_cookie + 1
        self._pending[cookie] = _Pending(command, offset, length, Reply(cookie))
        header = struct.pack(">IHHQQI", _REQUEST_MAGIC, flags, command, cookie, offset, length)
        try:
            self._socket.sendall(header + bytes(data) if data else header)
        except BrokenPipeError as error:
            raise ConnectionError("the server is gone") from error
        return cookie

    def receive(self) -> Reply:
        """The next finished request's answer."""
        while True:
            magic = struct.unpack(">I", _take(self._socket, 4))[0]
            if magic == _SIMPLE_MAGIC:
                error, cookie = struct.unpack(">IQ", _take(self._socket, 12))
                pending = self._pending.pop(cookie)
                pending.reply.error = error
                if pending.command == CMD_READ and not error:
                    pending.reply.data = _take(self._socket, pending.length)
                return pending.reply
            assert magic == _STRUCTURED_MAGIC, f"reply magic {magic:#x}"
            assert self._structured, "structured replies were not negotiated"
            flags, kind, cookie, length = struct.unpack(">HHQI", _take(self._socket, 16))
            self._chunk(self._pending[cookie], kind, _take(self._socket, length))
            if flags & _CHUNK_DONE:
                return self._pending.pop(cookie).reply

    @property
    def in_flight(self) -> int:
        """How many requests wait for their answer."""
        return len(self._pending)

    # --- inside

    def _do(self, command: int, offset: int, length: int, data: bytes | memoryview = b"", flags: int = 0) -> Reply:
        assert not self._pending, "requests are in flight"
        self.send(command, offset, length, data, flags)
        reply = self.receive()
        if reply.error:
            text = f"{os.strerror(reply.error)} (NBD command {command}, {length} bytes at {offset})"
            raise OSError(reply.error, text)
        return reply

    def _chunk(self, pending: _Pending, kind: int, payload: bytearray) -> None:
        reply = pending.reply
        if kind in (_CHUNK_DATA, _CHUNK_HOLE):
            offset = struct.unpack_from(">Q", payload)[0] - pending.offset
            piece = payload[8:] if kind == _CHUNK_DATA else bytes(struct.unpack_from(">I", payload, 8)[0])
            if len(reply.data) < offset + len(piece):
                reply.data.extend(bytes(offset + len(piece) - len(reply.data)))
            reply.data[offset:offset + len(piece)] = piece
        elif kind == _CHUNK_STATUS:
            context = self._contexts[struct.unpack_from(">I", payload)[0]]
            reply.extents[context] = list(struct.iter_unpack(">II", payload[4:]))
        elif kind in (_CHUNK_ERROR, _CHUNK_ERROR_OFFSET):
            reply.error = struct.unpack_from(">I", payload)[0]
        else:
            assert kind == _CHUNK_NONE, f"chunk type {kind}"

    def _set_meta_contexts(self, export: str, contexts: tuple[str, ...]) -> None:
        name = export.encode()
        payload = struct.pack(">I", len(name)) + name + struct.pack(">I", len(contexts))
        for context in contexts:
            payload += struct.pack(">I", len(context)) + context.encode()
        for kind, data in _option(self._socket, _OPT_SET_META, payload):
            assert kind == _REP_META_CONTEXT
            self._contexts[struct.unpack_from(">I", data)[0]] = data[4:].decode()

    def _go(self, export: str) -> None:
        name = export.encode()
        payload = struct.pack(">I", len(name)) + name + struct.pack(">HH", 1, 3)
        for kind, data in _option(self._socket, _OPT_GO, payload):
            assert kind == _REP_INFO
            what = struct.unpack_from(">H", data)[0]
            if what == 0:
                self.size_bytes, self.flags = struct.unpack_from(">QH", data, 2)
            elif what == 3:
                self.block_sizes = struct.unpack_from(">III", data, 2)
        assert self.flags & HAS_FLAGS


def _take(wire: socket.socket, count: int) -> bytearray:
    data = bytearray(count)
    view, done = memoryview(data), 0
    while done < count:
        try:
            got = wire.recv_into(view[done:])
        except ConnectionResetError as error:
            raise ConnectionError("the server is gone") from error
        if not got:
            raise ConnectionError("the server hung up")
        done += got
    return data


def _greet(wire: socket.socket) -> None:
    magic, option_magic, flags = struct.unpack(">QQH", _take(wire, 18))
    assert magic == _NBD_MAGIC
    assert option_magic == _OPTION_MAGIC
    assert flags & 1, "the server knows fixed newstyle"
    wire.sendall(struct.pack(">I", flags & 3))


def _option(wire: socket.socket, option: int, payload: bytes) -> list[tuple[int, bytearray]]:
    wire.sendall(struct.pack(">QII", _OPTION_MAGIC, option, len(payload)) + payload)
    replies: list[tuple[int, bytearray]] = []
    while True:
        magic, answered, kind, length = struct.unpack(">QIII", _take(wire, 20))
        assert (magic, answered) == (_REP_MAGIC, option)
        data = _take(wire, length)
        if kind & _REP_ERROR:
            raise NegotiationError(kind & ~_REP_ERROR, data.decode(errors="replace"))
        if kind == _REP_ACK:
            return replies
        replies.append((kind, data))


def list_exports(path: Path | str) -> list[str]:
    """The names that a server offers, in its order."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as wire:
        wire.settimeout(30)
        wire.connect(os.fspath(path))
        _greet(wire)
        names = []
        for kind, data in _option(wire, _OPT_LIST, b""):
            assert kind == _REP_SERVER
            length = struct.unpack_from(">I", data)[0]
            names.append(data[4:4 + length].decode())
        wire.sendall(struct.pack(">QII", _OPTION_MAGIC, _OPT_ABORT, 0))
    return names
