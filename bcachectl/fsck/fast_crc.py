# SPDX-License-Identifier: GPL-2.0-only
"""`crc64_address`: the checksum for compiled code that does without the interpreter.

fastcrc (`bcachectl.ondisk.crc64`) is as fast, but can only be called with Python's lock, which makes threads that
check one leaf after the other wait for each other.  ISA-L (Debian: libisal2) has the same checksum as a C function,
``crc64_ecma_norm``, which takes and gives finished checksums like ours.  It is not needed: docs/decisions/0001.
"""

from __future__ import annotations

import ctypes
from functools import cache

from bcachectl.ondisk.crc64 import crc64

LIBRARY = "libisal.so.2"


@cache
def crc64_address() -> int:
    """Where ``crc64_ecma_norm`` stands in memory; 0 if this system does not have it, or if it says anything else than
    `crc64` does."""
    try:
        function = ctypes.CDLL(LIBRARY).crc64_ecma_norm
    except (OSError, AttributeError):
        return 0
    function.restype, function.argtypes = ctypes.c_uint64, [ctypes.c_uint64, ctypes.c_char_p, ctypes.c_uint64]
    sample = bytes(index * index % 251 for index in range(3000))
    for length in (0, 1, 8, 16, 24, 127, 128, 255, 256, 1000, len(sample)):
        for previous in (0, 1, (1 << 64) - 1, 0x8000_0000_0400_0001):
            if function(previous, sample[:length], length) != crc64(sample[:length], previous):
                return 0
    return ctypes.cast(function, ctypes.c_void_p).value or 0
