# SPDX-License-Identifier: GPL-2.0-only
"""Runs in the virtual machine: writes blocks of a device one after the other and knows what each must hold.

    ublk_writer.py DEVICE FIRST_BLOCK OVER      (blocks of 4 KiB; it ends when the file OVER is there)

Nothing is flushed.  Whenever an answer took long, the engine was killed meanwhile, and all blocks are read again: what
was acknowledged to us before must be there, flushed or not, for nobody has seen a power loss.
"""

from __future__ import annotations

import mmap
import os
import random
import sys
import time

BLOCKS = 256
BLOCK_BYTES = 4096
PAUSE_S = 1.0


def main() -> int:
    device, first, over = sys.argv[1], int(sys.argv[2]), sys.argv[3]
    fd = os.open(device, os.O_RDWR | os.O_DIRECT)
    buf = mmap.mmap(-1, BLOCK_BYTES)
    draw = random.Random(1)
    written: dict[int, bytes] = {}
    writes = pauses = 0

    def look(block: int) -> bool:
        os.preadv(fd, [buf], (first + block) * BLOCK_BYTES)
        is_right = buf[:] == written[block] * (BLOCK_BYTES // 16)
        if not is_right:
            print(f"block {block} holds {buf[:16]!r} and not {written[block]!r}, after {writes} writes", flush=True)
        return is_right

    while not os.path.exists(over):
        block = draw.randrange(BLOCKS)
        start = time.monotonic()
        stamp = b"%016d" % writes
        buf[:] = stamp * (BLOCK_BYTES // 16)
        os.pwritev(fd, [buf], (first + block) * BLOCK_BYTES)
        writes += 1
        written[block] = stamp
        is_right = look(draw.choice(list(written)))
        if time.monotonic() - start > PAUSE_S:
            pauses += 1
            is_right = all(look(block) for block in written) and is_right
        if not is_right:
            return 1
    print(f"{writes} writes, {pauses} pauses")
    return 0 if all(look(block) for block in written) else 1


if __name__ == "__main__":
    sys.exit(main())
