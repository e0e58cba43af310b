# SPDX-License-Identifier: GPL-2.0-only
"""Labels and uuids of a metadata image replaced, so that it stays the same image under other names: `Names`.

* A uuid becomes a hash of itself, so that a cache and its backing devices still find each other, and nobody gets back.
  Its first half depends on the first half alone: that half makes the magics of the set, and is all that is left of the
  uuid where the superblock is gone.  Zeros and `INVALID_UUID` have a meaning and stay.
* A label becomes a hash of itself and of the set's uuid, which is no secret among the devices of a set only.
* Magics change with the set's uuid.  Every change is made to the bytes and, by what it changes in the checksum of those
  bytes, to the stored checksum: a good structure stays good, and a damaged one stays damaged in exactly the same bits.
  For this the seed of a checksum need not be known, since a CRC is linear.
* What is left of the old names in any other place, as behind the log of a damaged node, is replaced byte by byte.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterable

from bcachectl.fsck.collect import SUPERBLOCK, Region
from bcachectl.ondisk.crc64 import crc64
from bcachectl.ondisk.magic import INVALID_UUID, bset_magic, jset_magic, prio_magic, set_magic
from bcachectl.ondisk.superblock import SB_JOURNAL_BUCKETS

LABEL_SEARCHED_BYTES_MIN = 4
"""A shorter label is replaced in the fields for labels, but not looked for in other places."""

_SB_UUIDS, _SB_LABEL, _SB_KEYS, _SB_D = (40, 56), 72, 206, 208
_LABEL_BYTES = 32


def pseudonym(uuid: bytes) -> bytes:
    """What stands for a uuid."""
    if uuid in (bytes(16), INVALID_UUID):
        return uuid
    first = hashlib.sha256(b"bcachectl half of a uuid" + uuid[:8]).digest()[:8] if any(uuid[:8]) else bytes(8)
    return first + hashlib.sha256(b"bcachectl uuid" + uuid).digest()[:8]


class Names:
    """The names of one device and what stands for them; ``set_uuid`` is what its magics go by."""

    def __init__(self, set_uuid: bytes) -> None:
        self.set_uuid = set_uuid
        self._mask = set_magic(set_uuid) ^ set_magic(pseudonym(set_uuid))
        self._searched: dict[bytes, bytes] = {}
        for magic in (jset_magic, prio_magic, bset_magic):
            self._searched[_word(magic(set_uuid))] = _word(magic(pseudonym(set_uuid)))
        self.learn([set_uuid], [])

    def learn(self, uuids: Iterable[bytes], labels: Iterable[bytes]) -> None:
        """Note names that must not be left anywhere; a label is its whole field."""
        for uuid in uuids:
            if uuid not in (bytes(16), INVALID_UUID):
                self._searched[uuid] = pseudonym(uuid)
        for label in labels:
            text = label.split(b"\0")[0]
            if len(text) >= LABEL_SEARCHED_BYTES_MIN:
                self._searched[text] = self._hash(label).hex().encode()[:len(text)]

    def learn_from(self, region: Region) -> None:
        """Note the names in a superblock or uuid array."""
        if SUPERBLOCK in region.kinds:
            self.learn([bytes(region.buf[at:at + 16]) for at in _SB_UUIDS],
                       [bytes(region.buf[_SB_LABEL:_SB_LABEL + _LABEL_BYTES])])
        for start, end, step in _uuid_arrays(region):
            for at in range(start, end, step):
                self.learn([bytes(region.buf[at:at + 16])], [bytes(region.buf[at + 16:at + 16 + _LABEL_BYTES])])

    def replace(self, region: Region) -> None:
        """Change all names in a region."""
        buf, before = region.buf, bytes(region.buf)
        headers = dict(region.headers)
        if SUPERBLOCK in region.kinds:
            for at in _SB_UUIDS:
                self._uuid(buf, at)
            self._label(buf, _SB_LABEL)
            keys = struct.unpack_from("<H", before, _SB_KEYS)[0]
            headers[0] = _SB_D + 8 * min(keys, SB_JOURNAL_BUCKETS)
        for start, end, step in _uuid_arrays(region):
            for at in range(start, end, step):
                self._uuid(buf, at)
                self._label(buf, at + 16)
        for at in region.headers:
            magic = struct.unpack_from("<Q", buf, at + 8)[0]
            struct.pack_into("<Q", buf, at + 8, magic ^ self._mask)
        for old, new in sorted(self._searched.items(), key=lambda each: -len(each[0])):
            at = buf.find(old)
            while at >= 0:
                buf[at:at + len(old)] = new
                at = buf.find(old, at + 1)
        # From the back: what lies inside another structure's bytes is final before that one's checksum.
        for at in sorted(headers, reverse=True):
            change = crc64(before[at + 8:headers[at]]) ^ crc64(memoryview(buf)[at + 8:headers[at]])
            csum = struct.unpack_from("<Q", buf, at)[0]
            struct.pack_into("<Q", buf, at, csum ^ change)

    def _hash(self, label: bytes) -> bytes:
        return hashlib.sha256(b"bcachectl label" + self.set_uuid + label.split(b"\0")[0]).digest()

    def _uuid(self, buf: bytearray, at: int) -> None:
        buf[at:at + 16] = pseudonym(bytes(buf[at:at + 16]))

    def _label(self, buf: bytearray, at: int) -> None:
        label = bytes(buf[at:at + _LABEL_BYTES])
        if not any(label):
            return
        text = b"label-" + self._hash(label).hex()[:8].encode() if label[0] else b"\0-"
        buf[at:at + _LABEL_BYTES] = text.ljust(_LABEL_BYTES, b"\0")


def _uuid_arrays(region: Region) -> list[tuple[int, int, int]]:
    # A bad pointer to the array may lead to a structure of another kind, whose bytes are no names.
    return [] if region.headers else region.uuids


def _word(magic: int) -> bytes:
    return magic.to_bytes(8, "little")
