# SPDX-License-Identifier: GPL-2.0-only
"""`NbdServer`: the set's volumes on a Unix socket, for any NBD client.

It takes clients in, up to `MAX_CONNECTIONS`, and lets go of them; what is said to each is the business of
`bcachectl.engine.export.nbd_connection.Connection`.
"""

from __future__ import annotations

import os
import socket
import stat
from collections.abc import Sequence

from bcachectl.engine.export import nbd_wire as wire
from bcachectl.engine.export.buffers import BufferPool
from bcachectl.engine.export.nbd_connection import Connection
from bcachectl.engine.export.nbd_direct import DirectReads
from bcachectl.engine.export.page_cache import read_fd, write_fd
from bcachectl.engine.front import Volume
from bcachectl.engine.io.loop import Loop
from bcachectl.engine.io.medium import Medium
from bcachectl.engine.sched import NS_PER_S, WaitQueue
from bcachectl.errors import DeviceError, WrongState

MAX_CONNECTIONS = 128
STOP_TIMEOUT_NS = 5 * NS_PER_S
"""How long a stopping server waits for a client to take its last answers."""

_SOCKET_PATH_MAX_BYTES = 107
_SO_SNDBUFFORCE = 32
_SOCKET_BUFFER_BYTES = 1 << 20


class NbdServer:
    """Listens on a Unix socket; `Loop.exports` calls `flush` once a turn."""

    def __init__(self, loop: Loop, volumes: Sequence[Volume], cache: Medium, path: str, *,
                 block_bytes: int = wire.MIN_BLOCK_BYTES, direct_reads: DirectReads | None = None) -> None:
        """``block_bytes``: the largest logical block of the devices; a smaller request could not be served.
        ``direct_reads`` serves hits if the cache device goes past the page cache.
        """
        self.loop = loop
        self.block_bytes = block_bytes
        self.volumes = volumes
        self.path = path
        self.direct_reads = direct_reads
        self.pool = BufferPool() if direct_reads is None else direct_reads.pool
        self.quick_fd, self.quick_write_fd = read_fd(cache), write_fd(cache)
        self.nowait_flag = cache.nowait_flag
        self.active: set[Connection] = set()
        self.connections: dict[int, Connection] = {}
        self.closed_wait = WaitQueue(loop.sched, "nbd connection closed")
        self._serial = 0
        self._listener = listen(path)
        loop.register(self._listener.fileno(), self)
        loop.exports.append(self)

    def on_ready(self, fd: int, events: int) -> None:
        """A client connects."""
        try:
            sock, _ = self._listener.accept()
        except OSError:
            return                          # gone again, or no descriptor left: the next client may fare better
        if len(self.connections) >= MAX_CONNECTIONS:
            sock.close()
            return
        sock.setblocking(False)
        enlarge(sock)
        self._serial += 1
        connection = Connection(self, sock, self._serial)
        self.connections[connection.fd] = connection
        self.loop.register(connection.fd, connection)
        connection.flush()

    def flush(self) -> None:
        """Send the answers of this turn."""
        while self.active:
            self.active.pop().flush()

    def forget(self, connection: Connection) -> None:
        """The connection closes."""
        self.active.discard(connection)
        del self.connections[connection.fd]
        self.loop.unregister(connection.fd)
        self.closed_wait.wake_all()

    async def stop(self) -> None:
        """Take no more clients or requests, answer what is in flight, close."""
        self._close_listener()
        deadline_ns = self.loop.sched.now_ns + STOP_TIMEOUT_NS
        for connection in list(self.connections.values()):
            connection.leave()
        while self.connections and await self.closed_wait.wait(deadline_ns=deadline_ns):
            pass
        self.close()

    def close(self) -> None:
        """Close everything at once and remove the socket."""
        self._close_listener()
        for connection in list(self.connections.values()):
            connection.close()
        if self in self.loop.exports:
            self.loop.exports.remove(self)

    def _close_listener(self) -> None:
        if self._listener.fileno() >= 0:
            self.loop.unregister(self._listener.fileno())
            self._listener.close()
            os.unlink(self.path)


def enlarge(sock: socket.socket) -> None:
    """Let a socket take many answers at once, as far as the system allows."""
    for option in (_SO_SNDBUFFORCE, socket.SO_SNDBUF):
        try:
            sock.setsockopt(socket.SOL_SOCKET, option, _SOCKET_BUFFER_BYTES)
            return
        except OSError:
            continue


def listen(path: str) -> socket.socket:
    """A listening Unix socket at ``path``, for its owner only; a dead engine's socket is replaced, a live one's not."""
    if len(os.fsencode(path)) > _SOCKET_PATH_MAX_BYTES:
        raise WrongState(f"{path}: a socket's path may have {_SOCKET_PATH_MAX_BYTES} bytes; choose a shorter one")
    try:
        if stat.S_ISSOCK(os.lstat(path).st_mode):
            with socket.socket(socket.AF_UNIX) as probe:
                try:
                    probe.connect(path)
                except ConnectionRefusedError:
                    os.unlink(path)
                else:
                    raise WrongState(f"{path}: another engine listens there; choose another path")
        else:
            raise WrongState(f"{path}: exists and is no socket; choose another path")
    except FileNotFoundError:
        pass
    listener = socket.socket(socket.AF_UNIX)
    try:
        mask = os.umask(0o177)
        try:
            listener.bind(path)
        finally:
            os.umask(mask)
        listener.listen(MAX_CONNECTIONS)
        listener.setblocking(False)
    except OSError as error:
        listener.close()
        raise DeviceError(f"{path}: cannot listen there: {error.strerror}", errno=error.errno or 0) from error
    return listener
