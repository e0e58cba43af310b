# SPDX-License-Identifier: GPL-2.0-only
"""`crc64_address`: a checksum of the system's is taken only if it is ours."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bcachectl.fsck import fast_crc
from bcachectl.ondisk.crc64 import crc64
from tests.require import need

FUNCTION = ctypes.CFUNCTYPE(ctypes.c_uint64, ctypes.c_uint64, ctypes.c_char_p, ctypes.c_uint64)


@pytest.fixture(autouse=True)
def anew() -> Iterator[None]:
    """Nothing is remembered from one test to the next."""
    fast_crc.crc64_address.cache_clear()
    yield
    fast_crc.crc64_address.cache_clear()


def is_there() -> bool:
    try:
        ctypes.CDLL(fast_crc.LIBRARY)
    except OSError:
        return False
    return True


@given(st.binary(max_size=2000), st.integers(0, (1 << 64) - 1))
def test_it_is_our_checksum(data: bytes, previous: int) -> None:
    need(is_there(), f"{fast_crc.LIBRARY} is not installed (Debian: libisal2)")
    assert FUNCTION(fast_crc.crc64_address())(previous, data, len(data)) == crc64(data, previous)


def test_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fast_crc, "LIBRARY", "libisal-of-nobody.so.2")
    assert fast_crc.crc64_address() == 0


def test_one_without_the_function(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fast_crc, "LIBRARY", "libc.so.6")
    assert fast_crc.crc64_address() == 0


def test_one_that_says_something_else(monkeypatch: pytest.MonkeyPatch) -> None:
    need(is_there(), f"{fast_crc.LIBRARY} is not installed (Debian: libisal2)")
    monkeypatch.setattr(fast_crc, "crc64", lambda data, previous: crc64(data, previous) ^ (len(data) == 256))
    assert fast_crc.crc64_address() == 0
