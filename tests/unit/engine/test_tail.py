# SPDX-License-Identifier: GPL-2.0-only
"""`Tail` by itself: what is left of a killed engine, and whose it is.

What engines do with it is tested in tests/sim and tests/crash.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bcachectl import tailfile
from bcachectl.engine.tail import TAIL_BYTES, Tail
from bcachectl.errors import DeviceError, Refused, WrongState
from bcachectl.ondisk.jset import JSET_HEADER_BYTES, JSET_MAX_BYTES
from bcachectl.tailfile import TailFile, left_behind, read_tail

SET, OTHER_SET, BOOT, OTHER_BOOT = b"s" * 16, b"o" * 16, b"b" * 16, b"c" * 16
MAX_KEYS = JSET_MAX_BYTES - JSET_HEADER_BYTES


def made(memory: bytearray | None = None, set_uuid: bytes = SET, boot_id: bytes = BOOT) -> Tail:
    return Tail(memoryview(memory or bytearray(TAIL_BYTES)), set_uuid=set_uuid, boot_id=boot_id, path="file")


def next_one(tail: Tail) -> Tail:
    """What the next engine finds if this one is killed now."""
    return made(bytearray(tail.memory))


def test_keys_of_the_open_entry_and_of_the_one_on_its_way() -> None:
    tail = made()
    tail.begun(6, 66)
    tail.written(6)
    tail.add(7, b"a" * 24)
    tail.add(7, b"b" * 24)
    tail.begun(7, 77)
    tail.add(8, b"c" * 24)
    assert next_one(tail).take_over(6, 66) == b"a" * 24 + b"b" * 24 + b"c" * 24
    assert next_one(tail).take_over(7, 77) == b"c" * 24
    tail.written(7)
    tail.begun(8, 88)
    assert next_one(tail).take_over(8, 88) == b""


def test_an_entry_may_be_as_large_as_it_can() -> None:
    tail = made()
    tail.begun(6, 66)
    tail.add(7, b"a" * MAX_KEYS)
    tail.begun(7, 77)
    tail.add(8, b"b" * MAX_KEYS)
    after = next_one(tail)
    assert after.take_over(6, 66) == b"a" * MAX_KEYS + b"b" * MAX_KEYS
    assert next_one(after).take_over(6, 66) == b"a" * MAX_KEYS + b"b" * MAX_KEYS


def test_what_is_inherited_stays_until_it_is_settled() -> None:
    tail = made()
    tail.begun(6, 66)
    tail.add(7, b"a" * 24)
    after = next_one(tail)
    assert after.take_over(6, 66) == b"a" * 24
    # Its own entries have the seqs that those of the dead one had, and not yet its keys.
    after.begun(7, 79)
    after.written(7)
    after.add(8, b"a" * 24)
    assert next_one(after).take_over(7, 79) == b"a" * 24
    after.settle()
    assert next_one(after).take_over(7, 79) == b"a" * 24, "of its own open entry"
    after.begun(8, 80)
    after.written(8)
    assert next_one(after).take_over(8, 80) == b""


def test_the_newest_entry_may_be_written_again() -> None:
    tail = made()
    tail.begun(6, 66)
    tail.written(6)
    tail.begun(6, 67)
    tail.add(7, b"a" * 24)
    for csum in (66, 67):
        assert next_one(tail).take_over(6, csum) == b"a" * 24


@pytest.mark.parametrize(("seq", "csum"), [(7, 77), (6, 99), (9, 1), (1, 1)])
def test_someone_else_has_run_the_set(seq: int, csum: int) -> None:
    tail = made()
    tail.begun(6, 66)
    tail.written(6)
    tail.add(7, b"a" * 24)
    with pytest.raises(WrongState, match="remove that file to give them up"):
        next_one(tail).take_over(seq, csum)
    tail.begun(7, 70)
    tail.written(7)
    assert next_one(tail).take_over(seq, csum) == b"", "nothing is lost"


@pytest.mark.parametrize(("set_uuid", "boot_id"), [(OTHER_SET, BOOT), (SET, OTHER_BOOT)])
def test_another_set_and_another_boot(set_uuid: bytes, boot_id: bytes) -> None:
    tail = made()
    tail.begun(6, 66)
    tail.add(7, b"a" * 24)
    other = made(bytearray(tail.memory), set_uuid, boot_id)
    assert not other.has_more()
    assert other.take_over(6, 66) == b""


@given(st.lists(st.tuples(st.integers(1, 40), st.booleans()), max_size=30), st.integers(1, 1 << 40))
def test_against_a_list(steps: list[tuple[int, bool]], first_seq: int) -> None:
    """After every step, and with the newest entry on the device or not, exactly the keys that it has not are left."""
    tail, seq, durable = made(), first_seq + 1, (first_seq, 1)
    tail.begun(*durable)
    entries: dict[int, bytes] = {}
    for number, (count, ends) in enumerate(steps):
        keys = bytes([number]) * 24 * count
        if len(entries.get(seq, b"")) + len(keys) <= MAX_KEYS:
            tail.add(seq, keys)
            entries[seq] = entries.get(seq, b"") + keys
        if ends:
            tail.begun(seq, number + 2)
            on_its_way = (seq, number + 2)
            seq += 1
            for newest in (durable, on_its_way):
                left = b"".join(keys for each, keys in sorted(entries.items()) if each > newest[0])
                assert next_one(tail).left(*newest) == left
            tail.written(on_its_way[0])
            durable = on_its_way
        left = b"".join(keys for each, keys in sorted(entries.items()) if each > durable[0])
        assert next_one(tail).left(*durable) == left
        assert next_one(tail).has_more() == bool(left)


def test_in_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tailfile, "DIRECTORY", str(tmp_path / "run"))
    path = tailfile.tail_path(SET)
    assert left_behind(SET) is None
    first = TailFile(path, SET)
    assert os.stat(path).st_mode & 0o777 == 0o600
    first.tail.begun(6, 66)
    first.tail.add(7, b"a" * 24)
    assert left_behind(SET) is None, "its engine runs"
    with pytest.raises(Refused, match="another engine has it"):
        TailFile(path, SET, timeout_s=0.05)
    first.close()
    assert path in str(left_behind(SET))
    assert left_behind(OTHER_SET) is None
    copy = read_tail(path, SET)
    again = TailFile(path, SET)
    assert copy is not None
    assert copy.left(6, 66) == again.tail.take_over(6, 66) == b"a" * 24
    again.tail.settle()
    again.close()
    assert left_behind(SET) is None
    again.remove()
    assert not os.path.exists(path)


def test_a_file_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(DeviceError, match="File exists"):
        TailFile(str(tmp_path / "file" / "tail"), SET)
