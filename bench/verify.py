# SPDX-License-Identifier: GPL-2.0-only
"""`verify`: what was written through a benchmark's own engine, in its own set-up, is what is read.

It comes after the measuring, since it leaves dirty data behind.
"""

from __future__ import annotations

import subprocess
import sys

OPTIONS = ("--name=verify", "--rw=randwrite", "--bsrange=4k-64k", "--iodepth=32", "--verify=crc32c", "--do_verify=1",
           "--verify_fatal=1", "--verify_state_save=0", "--invalidate=0", "--randrepeat=0", "--output-format=terse")
"""Of fio: write everything once, in requests of many sizes, then read it all and look at its checksums."""


def verify(what: str, *target: str, size_bytes: int) -> None:
    """Have fio write and verify the first bytes of a volume; the benchmark ends with an error if they differ."""
    done = subprocess.run(["fio", *OPTIONS, f"--size={size_bytes}", *target], capture_output=True, text=True,
                          check=False)
    if done.returncode:
        sys.exit(f"{what}: fio --verify has failed: {done.stderr.strip() or done.stdout.strip()}")
    print(f"  {what}: fio --verify=crc32c is content with {size_bytes >> 20} MiB", flush=True)
