# SPDX-License-Identifier: GPL-2.0-only
"""Runs in the virtual machine: a plan of `tests.stamps` against a block device, one request after the other, with
O_DIRECT.

    stamp_writer.py DEVICE PROGRESS PLAN     (PLAN: the arguments of stamps.draw as JSON)

The number of each acknowledged write is a line of PROGRESS, a file of the share, so that a run that was killed can be
judged. A read that differs from what this run wrote before is printed, and makes the exit status 1.
"""

from __future__ import annotations

import json
import mmap
import os
import sys

import stamps  # type: ignore[import-not-found]  # beside this file in the share


def main() -> int:
    device, progress_path, plan_text = sys.argv[1:]
    plan = json.loads(plan_text)
    fd = os.open(device, os.O_RDWR | os.O_DIRECT)
    progress = os.open(progress_path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    buf = memoryview(mmap.mmap(-1, plan.get("max_kib", 32) * 1024))
    written: dict[int, bytes] = {}   # block -> the 16 bytes that fill it
    block_bytes = plan.get("block_bytes", 4096)
    mismatches = 0
    for op in stamps.draw(**plan):
        piece = buf[:op.length_bytes]
        blocks = range(op.offset_bytes, op.offset_bytes + op.length_bytes, block_bytes)
        if op.is_read:
            os.preadv(fd, [piece], op.offset_bytes)
            for block in blocks:
                start = block - op.offset_bytes
                stamp = written.get(block)
                if stamp is not None and piece[start:start + block_bytes] != stamp * (block_bytes // 16):
                    mismatches += 1
                    print(f"read {op.number}: wrong content at {block}", flush=True)
        else:
            stamp = stamps.content(stamps.tag(plan["seed"], op.number), op.offset_bytes, 16)
            piece[:] = stamp * (op.length_bytes // 16)
            os.pwritev(fd, [piece], op.offset_bytes)
            for block in blocks:
                written[block] = stamp
            os.write(progress, b"%d\n" % op.number)
        if op.flush_after:
            os.fsync(fd)
    os.fsync(fd)
    os.write(progress, b"done\n")
    return 1 if mismatches else 0


if __name__ == "__main__":
    sys.exit(main())
