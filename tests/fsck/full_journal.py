# SPDX-License-Identifier: GPL-2.0-only
"""`fill_journal`: a set whose journal is full to its very last block, as kernels before 6.0 could leave one.

The keys that a start has to replay stay the same and in the same order; they are spread over as many entries as the
ring has blocks, all of which the newest entry asks for.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

from bcachectl.ondisk.crc64 import crc64
from bcachectl.ondisk.jset import JSET_HEADER_BYTES
from tests.fsck.image import Image


def fill_journal(image: Image, *, is_bare: bool = False) -> None:
    """Write every block of the journal; the newest entry has a key, or with ``is_bare`` none."""
    walk = image.walk
    assert walk.superblock is not None
    newest = walk.replay[-1]
    head = image.cache.get(image.entry_at(newest), JSET_HEADER_BYTES)
    keys = [key for entry in walk.replay for key in split(entry.jset.keys)]
    assert keys
    block_bytes = walk.geometry.block_bytes
    blocks = walk.geometry.bucket_bytes // block_bytes
    places = [image.bucket(bucket) + block * block_bytes for bucket in walk.superblock.d for block in range(blocks)]
    first = newest.jset.seq + 1
    at = 0
    for number, place in enumerate(places):
        body = b""
        while at < len(keys) and JSET_HEADER_BYTES + len(body) + len(keys[at]) <= block_bytes:
            body += keys[at]
            at += 1
        if number == len(places) - 1:
            assert at == len(keys), "more keys than the journal has room for"
            body = b"" if is_bare else keys[-1]   # Once more what was last: nothing changes.
        entry = bytearray(head + body)
        struct.pack_into("<Q", entry, 16, first + number)
        struct.pack_into("<IQ", entry, 28, len(body) // 8, first)
        struct.pack_into("<Q", entry, 0, crc64(entry[8:]))
        image.cache.put(place, bytes(entry).ljust(block_bytes, b"\0"))


def split(stream: bytes) -> Iterator[bytes]:
    """The keys of a key stream, raw."""
    at = 0
    while at < len(stream):
        words = 2 + (struct.unpack_from("<Q", stream, at)[0] >> 60 & 7)
        yield stream[at:at + 8 * words]
        at += 8 * words
