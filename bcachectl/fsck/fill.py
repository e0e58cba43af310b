# SPDX-License-Identifier: GPL-2.0-only
"""`fill_words`, words of a device into memory that is there, and `crc_words`, as `bcachectl.fsck.counting` needs them.

The compiled scan has its own in fill_c.pxd, which do without the interpreter.
"""

from __future__ import annotations

import os

from bcachectl.ondisk.crc64 import crc64


def fill_words(fd: int, words: memoryview, offset_bytes: int) -> bool:
    """Whether all of ``words`` could be read; not if the device ends before, or cannot be read there."""
    buf = words.cast("B")
    done = 0
    try:
        while done < len(buf):
            got = os.preadv(fd, [buf[done:]], offset_bytes + done)
            if not got:
                return False
            done += got
    except OSError:
        return False
    return True


def crc_words(_function: int, words: memoryview, first: int, end: int, previous: int) -> int:
    """CRC-64/WE of words [first, end), continued from ``previous``.  Compiled, the function is called that stands at
    that address, as `bcachectl.fsck.fast_crc.crc64_address` gives it."""
    return crc64(words[first:end].cast("B"), previous)
