# SPDX-License-Identifier: GPL-2.0-only
"""What people read: dates, and labels that others wrote."""

from __future__ import annotations

import pytest

from bcachectl.units import counted, format_label, format_time


@pytest.mark.parametrize(("seconds", "text"), [
    (0, ""), (1, "1970-01-01 00:00:01Z"), (1795191161, "2026-11-20 16:12:41Z"), (2**32 - 1, "2106-02-07 06:28:15Z"),
    (2**62, str(2**62)), (2**64 - 1, str(2**64 - 1)), (253402300800, "253402300800")])
def test_times(seconds: int, text: str) -> None:
    """A damaged superblock may hold any number."""
    assert format_time(seconds) == text


@pytest.mark.parametrize(("raw", "text"), [
    (b"", ""), (b"home\0garbage", "home"), (b"x" * 32, "x" * 32), ("Bücher 本".encode(), "Bücher 本"),
    (b"a\x1b[2J\x07", r"a\x1b[2J\x07"), (b"two\nlines\t", r"two\nlines\t"), (b"\xff\xc3", r"\xff\xc3"),
    ("a\u202eb\u2028".encode(), r"a\u202eb\u2028")])
def test_labels(raw: bytes, text: str) -> None:
    assert format_label(raw) == text


@pytest.mark.parametrize(("count", "what", "text"), [
    (1, "node", "1 node"), (0, "node", "0 nodes"), (2, "open entry", "2 open entries"), (None, "key", "- keys"),
    (3, "range of the volume", "3 ranges of the volume"), (1, "range of the volume", "1 range of the volume"),
    (2, "flush", "2 flushes")])
def test_counted(count: int | None, what: str, text: str) -> None:
    assert counted(count, what) == text
