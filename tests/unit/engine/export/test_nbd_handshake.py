# SPDX-License-Identifier: GPL-2.0-only
"""The NBD negotiation option by option, as bytes: what doc/proto.md says a server answers."""

from __future__ import annotations

import struct
from dataclasses import dataclass

import pytest

from bcachectl.engine.export import nbd_wire as wire
from bcachectl.engine.export.nbd_handshake import Handshake
from bcachectl.engine.front import NOT_NOW, Request


@dataclass
class FakeVolume:
    """A volume that nobody reads."""

    name: str
    size_sectors: int = 2048
    label: str = ""
    uuid: bytes = bytes(16)
    block_size_sectors: int = 8
    read_only: bool = False
    reads = None
    batch = None

    def reads_nowait(self, reads: list[tuple[int, int]]) -> list[int]:
        return [self.read_nowait(sector, nsectors) for sector, nsectors in reads]

    def read_nowait(self, sector: int, nsectors: int) -> int:
        return NOT_NOW

    def submit_all(self, requests: list[Request]) -> None:
        for request in requests:
            self.submit(request)

    def submit(self, request: Request) -> None:
        raise AssertionError


VOLUMES = [FakeVolume("bcache0", label="root"), FakeVolume("bcache1", size_sectors=4096, read_only=True)]


def begun(flags: int = 3) -> Handshake:
    handshake = Handshake(VOLUMES)
    handshake.out.clear()
    assert handshake.feed(memoryview(struct.pack(">I", flags))) == 4
    return handshake


def ask(handshake: Handshake, option: int, data: bytes = b"") -> list[tuple[int, bytes]]:
    packet = memoryview(struct.pack(">QII", wire.OPTION_MAGIC, option, len(data)) + data)
    for length in (0, 8, 15, len(packet) - 1):
        assert length >= len(packet) or handshake.feed(packet[:length]) == 0
    assert handshake.feed(packet) == len(packet)
    replies = []
    out, position = bytes(handshake.out), 0
    handshake.out.clear()
    while position < len(out) and option != wire.OPT_EXPORT_NAME:
        magic, answered, kind, length = wire.OPTION_REPLY.unpack_from(out, position)
        assert (magic, answered) == (wire.OPTION_REPLY_MAGIC, option)
        position += wire.OPTION_REPLY.size
        replies.append((kind, out[position:position + length]))
        position += length
    return replies if option != wire.OPT_EXPORT_NAME else [(0, out)]


def named(name: str, rest: bytes = b"\0\0") -> bytes:
    return struct.pack(">I", len(name)) + name.encode() + rest


def query(export: str, *queries: str) -> bytes:
    return named(export, struct.pack(">I", len(queries)) + b"".join(named(text, b"") for text in queries))


def test_greeting() -> None:
    assert bytes(Handshake(VOLUMES).out) == b"NBDMAGICIHAVEOPT\0\3"


@pytest.mark.parametrize(("flags", "zeros"), [(3, 0), (1, 124), (0, 124)])
def test_export_name(flags: int, zeros: int) -> None:
    handshake = begun(flags)
    ((_, out),) = ask(handshake, wire.OPT_EXPORT_NAME, b"bcache1")
    size_bytes, transmission = struct.unpack_from(">QH", out)
    assert (size_bytes, len(out)) == (4096 * 512, 10 + zeros)
    assert transmission & wire.TF_READ_ONLY
    assert not transmission & (wire.TF_TRIM | wire.TF_WRITE_ZEROES)
    assert handshake.volume is VOLUMES[1]


def test_unknown_client_flags_and_names_end_it() -> None:
    assert begun(4).is_over
    handshake = begun()
    ask(handshake, wire.OPT_EXPORT_NAME, b"bcache7")
    assert handshake.is_over
    assert handshake.volume is None


def test_list_and_abort() -> None:
    handshake = begun()
    assert ask(handshake, wire.OPT_LIST) == [
        (wire.REP_SERVER, named("bcache0", b"")), (wire.REP_SERVER, named("bcache1", b"")), (wire.REP_ACK, b"")]
    assert ask(handshake, wire.OPT_LIST, b"x")[0][0] == wire.REP_ERR_INVALID
    assert ask(handshake, wire.OPT_ABORT) == [(wire.REP_ACK, b"")]
    assert handshake.is_over


def test_info_says_all_that_is_asked_and_go_begins() -> None:
    handshake = begun()
    wanted = struct.pack(">HHHH", 3, wire.INFO_NAME, wire.INFO_DESCRIPTION, wire.INFO_BLOCK_SIZE)
    replies = ask(handshake, wire.OPT_INFO, named("", wanted))
    assert [struct.unpack_from(">H", data)[0] for _, data in replies[:-1]] == [0, 1, 2, 3]
    assert replies[1][1][2:] == b"bcache0"
    assert replies[2][1][2:] == b"root"
    assert struct.unpack_from(">III", replies[3][1], 2) == (512, 4096, 32 << 20)
    assert replies[-1] == (wire.REP_ACK, b"")
    assert handshake.volume is None
    assert ask(handshake, wire.OPT_GO, named("bcache9"))[0][0] == wire.REP_ERR_UNKNOWN
    assert ask(handshake, wire.OPT_GO, named("bcache0"))[-1] == (wire.REP_ACK, b"")
    assert handshake.volume is VOLUMES[0]


def test_contexts() -> None:
    handshake = begun()
    both = list(wire.CONTEXT_IDS)
    assert ask(handshake, wire.OPT_SET_META_CONTEXT, query("", *both))[0][0] == wire.REP_ERR_INVALID
    ask(handshake, wire.OPT_STRUCTURED_REPLY)
    for queries, expected in (((), both), (("base:",), both[:1]), (("bcachectl:", "base:allocation"), both),
                              (("other:x",), [])):
        replies = ask(handshake, wire.OPT_LIST_META_CONTEXT, query("bcache0", *queries))
        assert [data[4:].decode() for kind, data in replies if kind == wire.REP_META_CONTEXT] == expected
    replies = ask(handshake, wire.OPT_SET_META_CONTEXT, query("bcache0", "other:x", *both))
    assert [data for kind, data in replies if kind == wire.REP_META_CONTEXT] == [
        struct.pack(">I", number) + name.encode() for name, number in wire.CONTEXT_IDS.items()]
    assert handshake.contexts == both
    # They were chosen for bcache0 and do not hold for another export.
    ask(handshake, wire.OPT_GO, named("bcache1"))
    assert handshake.contexts == []


@pytest.mark.parametrize("option", [5, 11, 0, 99])
def test_unknown_options_are_unsupported(option: int) -> None:
    assert ask(begun(), option, b"whatever")[0][0] == wire.REP_ERR_UNSUP


@pytest.mark.parametrize("data", [b"", b"\0\0\0\xff", named("bcache0", b""), named("bcache0", b"\0\1"),
                                  named("bcache0", b"\0\0\0"), struct.pack(">I", 1 << 31)])
def test_malformed_options_are_invalid(data: bytes) -> None:
    assert ask(begun(), wire.OPT_GO, data)[0][0] == wire.REP_ERR_INVALID


def test_too_long_and_too_many_options_end_it() -> None:
    handshake = begun()
    handshake.feed(memoryview(struct.pack(">QII", wire.OPTION_MAGIC, wire.OPT_GO, wire.MAX_OPTION_BYTES + 1)))
    assert handshake.is_over
    handshake = begun()
    for _ in range(wire.MAX_OPTIONS):
        ask(handshake, 99)
    handshake.feed(memoryview(struct.pack(">QII", wire.OPTION_MAGIC, 99, 0)))
    assert handshake.is_over


def test_errors_on_the_wire() -> None:
    assert wire.wire_error(28) == 28
    assert wire.wire_error(116) == 5
