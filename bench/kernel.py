# SPDX-License-Identifier: GPL-2.0-only
"""What reads every node of a set, beside the kernel's own: the start of a set, and a gc.

Both in the virtual machine, one after the other, on two copies of one set.  The kernel's start is the time that the
registration of the cache device takes, its gc what internal/btree_gc_average_duration_ms says after three; the engine's
figures are processor time.  The machine is emulated: only the ratio means something.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from pathlib import Path

from bench.bulk import make_set
from bench.process import machine as machine_line
from bench.process import row
from tests.export.engine import ROOT
from tests.vm import machine

JOB = """
load_extra
now() { cut -d' ' -f1 /proc/uptime; }
now >/job/before
register /dev/vda
now >/job/after
register /dev/vdb
wait_for 60 test -e /sys/block/vdb/bcache/dev
for number in 1 2 3; do
    echo 1 >$(cset)/internal/trigger_gc
    sleep 3
done
cat $(cset)/internal/btree_gc_average_duration_ms >/job/gc_ms
stop_all
mkdir /newroot/run/set
ln -s /dev/vdc /newroot/run/set/cache.img
ln -s /dev/vdd /newroot/run/set/back.img
host env PYTHONPATH=ROOT PYTHONDONTWRITEBYTECODE=1 PYTHON -m bench.growth --one /run/set --keys KEYS --bulk \\
    >/job/engine.json
"""


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--keys", type=int, default=1_000_000)
    parser.add_argument("--series", default=machine.DEFAULT_SERIES, help="the kernel")
    asked = parser.parse_args()
    print(f"kernel: {asked.keys} keys, Linux {asked.series} emulated ({machine_line()})", flush=True)
    with tempfile.TemporaryDirectory(prefix="bcachectl-bench-") as name:
        home = Path(name)
        make_set(home / "set", asked.keys, spare_buckets=3000, dirty_every=0)
        disks = [home / "set" / file for file in ("cache.img", "back.img")]
        for path in disks[:2]:
            disks.append(path.with_suffix(".copy"))
            shutil.copy(path, disks[-1])
        job = JOB
        for word, value in (("PYTHON -m", f"{sys.executable} -m"), ("ROOT", str(ROOT)), ("KEYS", str(asked.keys))):
            job = job.replace(word, value)
        done = machine.start(job, disks, home / "job", series=asked.series, host=True, memory_mib=1536).wait(600)
        if done.status != 0:
            sys.exit(f"the machine ended with {done.status}\n{done.stdout}\n{done.console[-3000:]}")
        before_s, after_s, gc_ms = (float((home / "job" / file).read_text()) for file in ("before", "after", "gc_ms"))
        engine = json.loads((home / "job" / "engine.json").read_text())
        for what, mine_s, kernel_s in (("start", engine["open_s"], after_s - before_s),
                                       ("gc", engine["gc_s"], gc_ms / 1000)):
            row(f"{what}: engine, keys a second", f"{asked.keys / mine_s:.3g}")
            row("  the kernel's driver", f"{asked.keys / kernel_s:.3g}", f"engine / kernel: {kernel_s / mine_s:.2f}")


if __name__ == "__main__":
    main()
