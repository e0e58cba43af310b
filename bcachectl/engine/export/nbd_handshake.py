# SPDX-License-Identifier: GPL-2.0-only
"""`Handshake`: the negotiation before an NBD connection carries requests.  Bytes in, bytes out; no socket.

1. We send a greeting; the client answers with four bytes of flags.
2. The client sends options, one at a time; each gets its replies in ``out``.
3. ``EXPORT_NAME`` or ``GO`` names an export: ``volume`` is set and transmission begins.  ``ABORT``, or anything that is
   not this protocol, sets ``is_over`` instead.

Nothing a client sends here makes the engine do anything but answer.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

from bcachectl.engine.export import nbd_wire as wire
from bcachectl.engine.front import Volume


class Malformed(Exception):
    """An option's data does not have the shape that the option asks for."""


class Handshake:
    """One client's negotiation."""

    def __init__(self, volumes: Sequence[Volume], block_bytes: int = wire.MIN_BLOCK_BYTES) -> None:
        self.volumes = volumes
        self.block_bytes = block_bytes
        self.out = bytearray(wire.GREETING.pack(wire.NBD_MAGIC, wire.OPTION_MAGIC,
                                                wire.FLAG_FIXED_NEWSTYLE | wire.FLAG_NO_ZEROES))
        self.volume: Volume | None = None
        self.is_over = False
        self.structured = False
        self.contexts: list[str] = []
        self._contexts_of: Volume | None = None
        self._has_flags = False
        self._no_zeroes = False
        self._options = 0

    def feed(self, data: memoryview) -> int:
        """Take what can be taken from the front of ``data`` and return how many bytes that was; 0 wants more."""
        if not self._has_flags:
            if len(data) < 4:
                return 0
            flags = int.from_bytes(data[:4], "big")
            self._has_flags = True
            self._no_zeroes = bool(flags & wire.FLAG_NO_ZEROES)
            if flags & ~(wire.FLAG_FIXED_NEWSTYLE | wire.FLAG_NO_ZEROES):
                self.is_over = True
            return 4
        if len(data) < wire.OPTION.size:
            return 0
        magic, option, length = wire.OPTION.unpack_from(data)
        self._options += 1
        if magic != wire.OPTION_MAGIC or length > wire.MAX_OPTION_BYTES or self._options > wire.MAX_OPTIONS:
            self.is_over = True
            return len(data)
        end: int = wire.OPTION.size + length
        if len(data) < end:
            return 0
        self._option(option, bytes(data[wire.OPTION.size:end]))
        return end

    def transmission_flags(self, volume: Volume) -> int:
        """What we can do with this volume, as the NBD flags."""
        flags = wire.TF_HAS_FLAGS | wire.TF_FLUSH | wire.TF_FUA | wire.TF_MULTI_CONN
        if volume.read_only:
            flags |= wire.TF_READ_ONLY
        else:
            flags |= wire.TF_TRIM | wire.TF_WRITE_ZEROES | wire.TF_FAST_ZERO
        return flags | (wire.TF_DF if self.structured else 0)

    def _option(self, option: int, data: bytes) -> None:
        try:
            if option == wire.OPT_EXPORT_NAME:
                self._export_name(data)
            elif option == wire.OPT_ABORT:
                self._reply(option, wire.REP_ACK)
                self.is_over = True
            elif option == wire.OPT_LIST:
                _expect_end(data, 0)
                for volume in self.volumes:
                    name = volume.name.encode()
                    self._reply(option, wire.REP_SERVER, struct.pack(">I", len(name)) + name)
                self._reply(option, wire.REP_ACK)
            elif option in (wire.OPT_INFO, wire.OPT_GO):
                self._info_or_go(option, data)
            elif option == wire.OPT_STRUCTURED_REPLY:
                _expect_end(data, 0)
                self.structured = True
                self._reply(option, wire.REP_ACK)
            elif option in (wire.OPT_LIST_META_CONTEXT, wire.OPT_SET_META_CONTEXT):
                self._meta_context(option, data)
            else:
                self._reply(option, wire.REP_ERR_UNSUP, b"this option is not known here")
        except Malformed as error:
            self._reply(option, wire.REP_ERR_INVALID, str(error).encode())

    def _reply(self, option: int, kind: int, data: bytes = b"") -> None:
        self.out += wire.OPTION_REPLY.pack(wire.OPTION_REPLY_MAGIC, option, kind, len(data)) + data

    def _find(self, name: bytes) -> Volume | None:
        for volume in self.volumes:
            if not name or volume.name.encode() == name:
                return volume
        return None

    def _export_name(self, data: bytes) -> None:
        # The oldest option has no way to say no.
        volume = self._find(data)
        if volume is None:
            self.is_over = True
            return
        self.out += struct.pack(">QH", volume.size_sectors << 9, self.transmission_flags(volume))
        if not self._no_zeroes:
            self.out += bytes(124)
        self._begin(volume)

    def _info_or_go(self, option: int, data: bytes) -> None:
        name, position = _take_string(data, 0)
        (count,) = _take(">H", data, position)
        wanted = _take(f">{count}H", data, position + 2)
        _expect_end(data, position + 2 + 2 * count)
        volume = self._find(name)
        if volume is None:
            self._reply(option, wire.REP_ERR_UNKNOWN, b"no such export; list shows what there is")
            return
        self._reply(option, wire.REP_INFO, struct.pack(">HQH", wire.INFO_EXPORT, volume.size_sectors << 9,
                                                       self.transmission_flags(volume)))
        if wire.INFO_NAME in wanted:
            self._reply(option, wire.REP_INFO, struct.pack(">H", wire.INFO_NAME) + volume.name.encode())
        if wire.INFO_DESCRIPTION in wanted and volume.label:
            self._reply(option, wire.REP_INFO, struct.pack(">H", wire.INFO_DESCRIPTION) + volume.label.encode())
        self._reply(option, wire.REP_INFO, struct.pack(
            ">HIII", wire.INFO_BLOCK_SIZE, self.block_bytes,
            max(wire.PREFERRED_BLOCK_BYTES, volume.block_size_sectors << 9), wire.MAX_PAYLOAD_BYTES))
        self._reply(option, wire.REP_ACK)
        if option == wire.OPT_GO:
            self._begin(volume)

    def _meta_context(self, option: int, data: bytes) -> None:
        name, position = _take_string(data, 0)
        (count,) = _take(">I", data, position)
        position += 4
        queries = []
        for _ in range(count):
            query, position = _take_string(data, position)
            queries.append(query.decode(errors="replace"))
        _expect_end(data, position)
        if option == wire.OPT_SET_META_CONTEXT:
            self.contexts = []
            if not self.structured:
                raise Malformed("ask for structured replies first")
        volume = self._find(name)
        if volume is None:
            self._reply(option, wire.REP_ERR_UNKNOWN, b"no such export; list shows what there is")
            return
        found = [context for context in wire.CONTEXT_IDS if context in queries]
        if option == wire.OPT_LIST_META_CONTEXT:
            namespaces = tuple(query for query in queries if query.endswith(":"))
            found = [context for context in wire.CONTEXT_IDS
                     if not queries or context in found or context.startswith(namespaces)]
        else:
            self.contexts = found
            self._contexts_of = volume
        for context in found:
            self._reply(option, wire.REP_META_CONTEXT,
                        struct.pack(">I", wire.CONTEXT_IDS[context]) + context.encode())
        self._reply(option, wire.REP_ACK)

    def _begin(self, volume: Volume) -> None:
        # Contexts were chosen for one export and hold for no other.
        if self._contexts_of is not volume:
            self.contexts = []
        self.volume = volume


def _take(layout: str, data: bytes, position: int) -> tuple[int, ...]:
    try:
        return struct.unpack_from(layout, data, position)
    except struct.error:
        raise Malformed("the option's data is too short") from None


def _take_string(data: bytes, position: int) -> tuple[bytes, int]:
    (length,) = _take(">I", data, position)
    position += 4
    if length > wire.MAX_NAME_BYTES or position + length > len(data):
        raise Malformed("a string leaves the option's data")
    return data[position:position + length], position + length


def _expect_end(data: bytes, position: int) -> None:
    if len(data) != position:
        raise Malformed("the option's data is too long")
