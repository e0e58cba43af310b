# SPDX-License-Identifier: GPL-2.0-only
"""`fill_words`: words of a device into memory that is there, as `bcachectl.fsck.scan` needs it.

The compiled scan has its own in fill_c.pxd, which does without the interpreter.
"""

from __future__ import annotations

import os


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
