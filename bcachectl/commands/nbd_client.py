# SPDX-License-Identifier: GPL-2.0-only
"""`NbdClient`: the other side of an engine's NBD socket, with many requests in flight; the demo's load uses it.

Plain replies only, over a Unix socket (doc/proto.md of the NBD project): `NbdClient.send` asks, `NbdClient.receive`
gives whichever answer comes next.
"""

from __future__ import annotations

import os
import socket
from typing import NamedTuple

from bcachectl.engine.export.nbd_wire import (
    CMD_DISC,
    CMD_READ,
    FLAG_FIXED_NEWSTYLE,
    FLAG_NO_ZEROES,
    GREETING,
    INFO_EXPORT,
    NBD_MAGIC,
    OPT_GO,
    OPTION,
    OPTION_MAGIC,
    OPTION_REPLY,
    REP_ACK,
    REP_INFO,
    REQUEST,
    REQUEST_MAGIC,
    SIMPLE_REPLY,
    SIMPLE_REPLY_MAGIC,
)
from bcachectl.errors import DeviceError


class Answer(NamedTuple):
    """The answer to the request that `NbdClient.send` numbered ``cookie``; ``error`` is 0 or an errno."""

    cookie: int
    error: int
    data: bytes


class NbdClient:
    """One connection to one export."""

    def __init__(self, path: str, export: str) -> None:
        """Connect and agree; DeviceError if the server has no such export."""
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.connect(path)
        self._reader = self._socket.makefile("rb", buffering=1 << 18)
        self._lengths: dict[int, int] = {}
        self._cookie = 0
        self.size_bytes = self._agree(export)

    def send(self, command: int, offset_bytes: int = 0, length_bytes: int = 0, data: bytes = b"",
             flags: int = 0) -> int:
        """Ask, and do not wait; returns the request's cookie."""
        self._cookie += 1
        length = length_bytes or len(data)
        self._lengths[self._cookie] = length if command == CMD_READ else 0
        self._socket.sendall(REQUEST.pack(REQUEST_MAGIC, flags, command, self._cookie, offset_bytes, length) + data)
        return self._cookie

    def receive(self) -> Answer:
        """Wait for the next answer."""
        magic, error, cookie = SIMPLE_REPLY.unpack(self._exactly(SIMPLE_REPLY.size))
        if magic != SIMPLE_REPLY_MAGIC:
            raise DeviceError("the NBD server sent something that is no reply")
        length = self._lengths.pop(cookie)
        return Answer(cookie, error, self._exactly(length) if length and not error else b"")

    def ask(self, command: int, offset_bytes: int = 0, length_bytes: int = 0, data: bytes = b"") -> bytes:
        """Ask and wait, with nothing else in flight; DeviceError if it fails."""
        self.send(command, offset_bytes, length_bytes, data)
        answer = self.receive()
        if answer.error:
            raise DeviceError(f"NBD request at byte {offset_bytes}: {os.strerror(answer.error)}", errno=answer.error)
        return answer.data

    def close(self) -> None:
        """Say goodbye and disconnect."""
        try:
            self._socket.sendall(REQUEST.pack(REQUEST_MAGIC, 0, CMD_DISC, 0, 0, 0))
        except OSError:
            pass
        self._reader.close()
        self._socket.close()

    def _agree(self, export: str) -> int:
        magic, option_magic, _flags = GREETING.unpack(self._exactly(GREETING.size))
        if (magic, option_magic) != (NBD_MAGIC, OPTION_MAGIC):
            raise DeviceError("this is no NBD server")
        name = export.encode()
        payload = len(name).to_bytes(4, "big") + name + bytes(2)
        self._socket.sendall((FLAG_FIXED_NEWSTYLE | FLAG_NO_ZEROES).to_bytes(4, "big")
                             + OPTION.pack(OPTION_MAGIC, OPT_GO, len(payload)) + payload)
        size_bytes = 0
        while True:
            _magic, _option, kind, length = OPTION_REPLY.unpack(self._exactly(OPTION_REPLY.size))
            body = self._exactly(length)
            if kind == REP_INFO and int.from_bytes(body[:2], "big") == INFO_EXPORT:
                size_bytes = int.from_bytes(body[2:10], "big")
            elif kind == REP_ACK:
                return size_bytes
            elif kind != REP_INFO:
                raise DeviceError(f"the NBD server has no export {export}")

    def _exactly(self, count: int) -> bytes:
        data: bytes = self._reader.read(count)
        if len(data) < count:
            raise DeviceError("the NBD server has closed the connection")
        return data
