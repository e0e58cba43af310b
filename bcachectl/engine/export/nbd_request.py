# SPDX-License-Identifier: GPL-2.0-only
"""What an NBD request is to the engine: which commands there are, what is refused without asking it, and what a request
in flight remembers until it is answered (`Pending`, `PendingWrites`).

A client may be slow, hostile, or both.  So everything has a limit, and here they are: what is in flight, what waits to
be sent, what is served at once.
"""

from __future__ import annotations

import errno
from collections.abc import Sequence
from struct import pack
from typing import TYPE_CHECKING

from bcachectl.engine.export import nbd_wire as wire
from bcachectl.engine.export.buffers import Buffer
from bcachectl.engine.front import (
    EXTENT_CLEAN,
    EXTENT_DIRTY,
    REQ_DISCARD,
    REQ_FLUSH,
    REQ_READ,
    REQ_STATUS,
    REQ_WRITE,
    REQ_WRITE_ZEROES,
    Request,
)

if TYPE_CHECKING:
    from bcachectl.engine.export.nbd_connection import Connection

RX_BYTES = 256 << 10
MAX_QUICK_WRITE_BYTES = 64 << 10
"""A longer write takes the way of all other requests."""
MAX_IN_FLIGHT = 1024
MAX_IN_FLIGHT_BYTES = 64 << 20
MAX_UNSENT = 4096
"""Answers that a client has not taken yet."""
MAX_STATUS_BYTES = 1 << 30
"""How much of a block status request is answered; a client asks again for the rest."""

_CACHE_STATES = {EXTENT_CLEAN: 1, EXTENT_DIRTY: 2}
"""Flags of the context ``bcachectl:cache``: 0 not in the cache, 1 clean, 2 dirty."""

# Which request flags each command may carry.
_ALLOWED_FLAGS = {
    wire.CMD_READ: wire.CMD_FLAG_DF | wire.CMD_FLAG_FUA,
    wire.CMD_WRITE: wire.CMD_FLAG_FUA,
    wire.CMD_FLUSH: wire.CMD_FLAG_FUA,
    wire.CMD_TRIM: wire.CMD_FLAG_FUA,
    wire.CMD_WRITE_ZEROES: wire.CMD_FLAG_FUA | wire.CMD_FLAG_NO_HOLE | wire.CMD_FLAG_FAST_ZERO,
    wire.CMD_BLOCK_STATUS: wire.CMD_FLAG_REQ_ONE | wire.CMD_FLAG_FUA,
}
OPERATIONS = {
    wire.CMD_READ: REQ_READ, wire.CMD_WRITE: REQ_WRITE, wire.CMD_FLUSH: REQ_FLUSH, wire.CMD_TRIM: REQ_DISCARD,
    wire.CMD_WRITE_ZEROES: REQ_WRITE_ZEROES, wire.CMD_BLOCK_STATUS: REQ_STATUS,
}
_WRITING = frozenset((wire.CMD_WRITE, wire.CMD_TRIM, wire.CMD_WRITE_ZEROES))

GatheredWrite = tuple[int, int, int, int]
"""A write whose payload is in the receive buffer: cookie, offset, length, where the payload begins."""


class Pending:
    """A request in flight: the tag of a `Request`."""

    __slots__ = ("connection", "cookie", "flags", "length", "buffer")

    def __init__(self, connection: Connection, cookie: int, flags: int, length: int, buffer: Buffer | None) -> None:
        self.connection = connection
        self.cookie = cookie
        self.flags = flags
        self.length = length
        self.buffer = buffer

    def answered(self, request: Request) -> None:
        """The engine has completed the request."""
        self.connection.answer(self, request)


class PendingWrites:
    """Writes in flight that the engine writes together: the tag of their one `Request`."""

    __slots__ = ("connection", "cookies", "buffer", "length")

    def __init__(self, connection: Connection, cookies: list[int], buffer: Buffer, length: int) -> None:
        self.connection = connection
        self.cookies = cookies
        self.buffer = buffer
        self.length = length

    def answered(self, request: Request) -> None:
        """The engine has completed them."""
        self.connection.answer_writes(self, request.error)


def refusal(connection: Connection, flags: int, command: int, offset: int, length: int) -> int:
    """The errno that a request gets without the engine seeing it, or 0."""
    volume, size_bytes = connection.volume, connection.size_bytes
    assert volume is not None, "a connection that transmits has a volume"
    if command not in OPERATIONS or flags & ~_ALLOWED_FLAGS[command]:
        return errno.EINVAL
    if command in _WRITING and volume.read_only:
        return errno.EPERM
    if command == wire.CMD_FLUSH:
        return errno.EINVAL if offset or length else 0
    if (offset | length) & (connection.handshake.block_bytes - 1) or not length:
        return errno.EINVAL
    if offset + length > size_bytes:
        return errno.ENOSPC if command in (wire.CMD_WRITE, wire.CMD_WRITE_ZEROES) else errno.EINVAL
    if command in (wire.CMD_READ, wire.CMD_WRITE) and length > wire.MAX_PAYLOAD_BYTES:
        return errno.EINVAL
    if flags & wire.CMD_FLAG_FAST_ZERO:
        # Zeros may have to be written; a client that asks for fast ones rather writes them itself.
        return errno.EOPNOTSUPP
    if command == wire.CMD_BLOCK_STATUS and not connection.handshake.contexts:
        return errno.EINVAL
    return 0


def status_reply(contexts: Sequence[str], pending: Pending, extents: list[tuple[int, int]]) -> bytes:
    """The reply to a block status request: a chunk for each context, of (sectors, kind) as the engine gave them."""
    reply = b""
    for context in contexts:
        runs: list[tuple[int, int]] = []
        for nsectors, kind in extents:
            # A cached device's holes are on the backing device, so all of it counts as allocated.
            state = _CACHE_STATES.get(kind, 0) if context == wire.CONTEXT_CACHE else 0
            if runs and runs[-1][1] == state:
                runs[-1] = runs[-1][0] + (nsectors << 9), state
            else:
                runs.append((nsectors << 9, state))
        if pending.flags & wire.CMD_FLAG_REQ_ONE:
            del runs[1:]
        done = wire.CHUNK_DONE if context == contexts[-1] else 0
        payload = pack(">I", wire.CONTEXT_IDS[context]) + b"".join(pack(">II", *run) for run in runs)
        reply += wire.CHUNK.pack(wire.CHUNK_MAGIC, done, wire.CHUNK_BLOCK_STATUS, pending.cookie, len(payload))
        reply += payload
    return reply
