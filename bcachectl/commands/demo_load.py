# SPDX-License-Identifier: GPL-2.0-only
"""`Load`: a client that writes, reads and never forgets what each block must hold.

Every block of 4 KiB carries its own number and version, so each read is judged at once, and `Load.verify` judges every
block that was ever written.  The load comes in waves (random, with a favourite region; then sequential), so that hits,
misses, bypasses, invalidations and writeback can be seen in turn.
"""

from __future__ import annotations

import array
import random
import struct
import time
from collections.abc import Callable

from bcachectl.commands.nbd_client import Answer, NbdClient
from bcachectl.engine.export.nbd_wire import CMD_FLUSH, CMD_READ, CMD_WRITE
from bcachectl.errors import BcachectlError

BLOCK_BYTES = 4096
CHUNK_BLOCKS = 16
"""Requests stay inside one chunk and a chunk has one request in flight, so each answer has one right content."""

DEPTH = 16
WAVE_S = 6.0
_STAMP = struct.Struct("<QQ")


class Load:
    """What was written where, and the requests under way."""

    def __init__(self, *, blocks: int, seed: int) -> None:
        self.versions = array.array("Q", bytes(8 * blocks))
        self.random = random.Random(seed)
        self.reads = 0
        self.writes = 0
        self.bytes_read = 0
        self.bytes_written = 0
        self._version = 0
        self._sequential = 0
        self._flying: dict[int, tuple[int, int, int]] = {}
        self._busy: set[int] = set()

    def run(self, client: NbdClient, is_over: Callable[[], bool]) -> None:
        """Read and write until told to stop; then wait for everything and flush.  Raises if any block is wrong."""
        started = time.monotonic()
        while not is_over():
            wave = (time.monotonic() - started) % WAVE_S / WAVE_S
            while len(self._flying) < DEPTH:
                self._ask(client, wave)
            self._take(client.receive())
        while self._flying:
            self._take(client.receive())
        client.ask(CMD_FLUSH)

    def verify(self, client: NbdClient) -> int:
        """Read everything back; the number of blocks that were ever written.  Raises at the first wrong one."""
        count = CHUNK_BLOCKS * 4
        for first in range(0, len(self.versions), count):
            here = min(count, len(self.versions) - first)
            self._judge(first, here, client.ask(CMD_READ, first * BLOCK_BYTES, here * BLOCK_BYTES))
        return sum(1 for version in self.versions if version)

    def _ask(self, client: NbdClient, wave: float) -> None:
        chunks = len(self.versions) // CHUNK_BLOCKS
        if wave > 0.8:
            # Sequential reads, which the cutoff sends past the cache.
            chunk, first, count, is_read = self._sequential % chunks, 0, CHUNK_BLOCKS, True
            self._sequential += 1
        else:
            favourite = self.random.random() < 0.75
            chunk = self.random.randrange(chunks // 5 if favourite else chunks)
            first = self.random.randrange(CHUNK_BLOCKS)
            count = self.random.randrange(1, CHUNK_BLOCKS - first + 1)
            is_read = self.random.random() < (0.8 if wave < 0.4 else 0.55)
        if chunk in self._busy:
            return
        self._busy.add(chunk)
        start = chunk * CHUNK_BLOCKS + first
        if is_read:
            cookie = client.send(CMD_READ, start * BLOCK_BYTES, count * BLOCK_BYTES)
            self._flying[cookie] = (start, count, 0)
            return
        self._version += 1
        data = b"".join([_content(block, self._version) for block in range(start, start + count)])
        cookie = client.send(CMD_WRITE, start * BLOCK_BYTES, data=data)
        self._flying[cookie] = (start, count, self._version)

    def _take(self, answer: Answer) -> None:
        start, count, version = self._flying.pop(answer.cookie)
        self._busy.remove(start // CHUNK_BLOCKS)
        if answer.error:
            raise BcachectlError(f"a request at block {start} failed with errno {answer.error}")
        if version:
            self.versions[start:start + count] = array.array("Q", [version] * count)
            self.writes += 1
            self.bytes_written += count * BLOCK_BYTES
        else:
            self._judge(start, count, answer.data)
            self.reads += 1
            self.bytes_read += count * BLOCK_BYTES

    def _judge(self, start: int, count: int, data: bytes) -> None:
        for index in range(count):
            block = start + index
            here = data[index * BLOCK_BYTES:(index + 1) * BLOCK_BYTES]
            if here != _content(block, self.versions[block]):
                number, version = _STAMP.unpack_from(here)
                raise BcachectlError(f"block {block} should hold version {self.versions[block]} but holds block "
                                     f"{number}, version {version}: data was lost")


def _content(block: int, version: int) -> bytes:
    # What was never written reads as zeros.
    return _STAMP.pack(block, version) * (BLOCK_BYTES // _STAMP.size) if version else bytes(BLOCK_BYTES)
