# SPDX-License-Identifier: GPL-2.0-only
"""The engine over ublk beside what a kernel has: its own bcache, dm-cache, the loop driver, and the bare disk.

All in one boot of the virtual machine, on disks of one kind (files in the host's page cache, over virtio), in turns,
round after round; a figure is the median of the rounds' ratios, with the smallest and the largest behind it.  The
machine is emulated: absolute figures say nothing of real ones, and Python, some 30 times slower here, is at a
disadvantage that it does not have on silicon.

Each cache holds the first part of its volume, written through it before; misses are read behind that, in a place of
their own for each round.  dm-cache decides by itself what it keeps; how much it had is printed.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.process import machine as machine_line
from bench.results import Ratio, ratio_of, save
from bench.verify import OPTIONS
from tests.export.engine import ROOT
from tests.vm import machine

VOLUME_MIB, HOT_MIB, MISS_MIB, VERIFY_MIB = 160, 32, 4, 16
BUCKETS = 8192
"""Of each cache: 4 GiB of buckets of 512 KiB, as 'bcachectl format' makes them by default."""
ENGINE, BCACHE, DM_CACHE, LOOP, DISK = "engine ublk", "kernel bcache", "dm-cache", "loop", "disk"

WORKLOADS = {
    "read 4k QD32": "--rw=randread --bs=4k --iodepth=32",
    "read 4k QD1": "--rw=randread --bs=4k --iodepth=1",
    "read 1M QD4": "--rw=read --bs=1m --iodepth=4",
    "write 4k QD32": "--rw=randwrite --bs=4k --iodepth=32",
    "miss 4k QD32": "--rw=randread --bs=4k --iodepth=32",
}

TARGETS = {("read 4k QD32", BCACHE): 0.9, ("write 4k QD32", BCACHE): 0.8}

PREPARE = """
load_extra
echo 0 >/proc/sys/kernel/printk
register /dev/vda /dev/vdb
wait_for 60 test -e /sys/block/vdb/bcache/dev
bcache=$(basename $(readlink /sys/block/vdb/bcache/dev))
wait_volume $bcache
echo 0 >/sys/block/$bcache/bcache/sequential_cutoff
echo 0 >$(cset)/congested_read_threshold_us
echo 0 >$(cset)/congested_write_threshold_us

host env PYTHONPATH=ROOT PYTHONDONTWRITEBYTECODE=1 XDG_RUNTIME_DIR=/run PYTHON -m bcachectl engine run \\
    --cache /dev/vdc --backing /dev/vdd --export ublk --no-live \\
    --set sequential_cutoff=0 --set cache_mode=writethrough \\
    --set congested_read_threshold_us=0 --set congested_write_threshold_us=0 \\
    >/job/engine.json 2>/job/engine.err &
wait_for 120 test -s /job/engine.json
engine=$(sed 's/.*"device": "\\/dev\\/\\([a-z0-9]*\\)".*/\\1/' /job/engine.json)
for pid in /proc/[0-9]*; do
    if grep -q 'engine.*--export.*ublk' $pid/cmdline 2>/dev/null && [ "$(cat $pid/comm)" != env ]; then
        pid_of_engine=${pid#/proc/}
    fi
done

data=$((CACHE_SECTORS - 32768))
host env DM_DISABLE_UDEV=1 dmsetup create meta --table "0 32768 linear /dev/vde 0"
host env DM_DISABLE_UDEV=1 dmsetup create data --table "0 $data linear /dev/vde 32768"
dd if=/dev/zero of=/dev/dm-0 bs=1M count=1 2>/dev/null
host env DM_DISABLE_UDEV=1 dmsetup create cached --table "0 VOLUME_SECTORS cache /dev/dm-0 /dev/dm-1 /dev/vdf 128 \\
    1 writeback smq 2 migration_threshold 204800"
host /sbin/losetup --direct-io=on /dev/loop0 /dev/vdg

# turn NAME DEVICE LABEL FIO_OPTION...
turn() {
    name=$1; device=$2; label=$3
    shift 3
    [ $name != engine ] || cat /proc/$pid_of_engine/stat >/job/$label.before
    host fio --name=turn --filename=/dev/$device --ioengine=io_uring --direct=1 --invalidate=0 --thread \\
        --randrepeat=0 --output-format=json "$@" >/job/$label.json 2>/job/$label.err || fail "fio $label"
    [ $name != engine ] || cat /proc/$pid_of_engine/stat >/job/$label.after
}
prime() {
    host dd if=/dev/urandom of=/dev/$1 bs=1M count=HOT_MIB oflag=direct 2>/dev/null || fail "writing $1"
    for again in 1 2 3; do host dd if=/dev/$1 of=/dev/null bs=64k count=$((HOT_MIB * 16)) iflag=direct 2>/dev/null; done
}
for device in $bcache $engine dm-2 loop0 vdh; do prime $device; done
"""

MODES = """
echo MODE >/sys/block/$bcache/bcache/cache_mode
host env PYTHONPATH=ROOT XDG_RUNTIME_DIR=/run PYTHON -m bcachectl set --engine bcache0 cache_mode=MODE >/dev/null || \\
    fail "set"
"""

VERIFY = """
host fio FIO_VERIFY --ioengine=io_uring --direct=1 --thread --filename=/dev/$engine --size=VERIFY_MIBm \\
    >/job/verify 2>&1 || fail "fio --verify in mode MODE: $(cat /job/verify)"
"""

FINISH = """
host env DM_DISABLE_UDEV=1 dmsetup status cached >/job/dm-cache.status
cat /proc/$pid_of_engine/status >/job/engine.status
kill -TERM $pid_of_engine
wait_for 60 sh -c "! test -e /proc/$pid_of_engine"
host env DM_DISABLE_UDEV=1 dmsetup remove cached
stop_all
"""


@dataclass
class Target:
    """Something that serves a volume, and what was measured of it, by workload."""

    name: str
    device: str
    iops: dict[str, list[float]] = field(default_factory=dict)
    p99_us: dict[str, list[float]] = field(default_factory=dict)
    user_us: dict[str, list[float]] = field(default_factory=dict)
    system_us: dict[str, list[float]] = field(default_factory=dict)


def targets() -> dict[str, Target]:
    """The targets by the names they have in the machine's script."""
    return {"engine": Target(ENGINE, "$engine"), "bcache": Target(BCACHE, "$bcache"),
            "dm": Target(DM_CACHE, "dm-2"), "loop": Target(LOOP, "loop0"), "disk": Target(DISK, "vdh")}


def script(rounds: int, seconds: float, only: str, bucket_kib: int, *, verifies: bool) -> str:
    """What the machine does."""
    words = {"PYTHON": sys.executable, "ROOT": str(ROOT), "HOT_MIB": str(HOT_MIB),
             "FIO_VERIFY": shlex.join(OPTIONS), "VERIFY_MIB": str(VERIFY_MIB),
             "CACHE_SECTORS": str(BUCKETS * bucket_kib << 1), "VOLUME_SECTORS": str(VOLUME_MIB << 11)}
    lines = [PREPARE]
    for workload, options in WORKLOADS.items():
        if only not in workload:
            continue
        lines.append(MODES.replace("MODE", "writeback" if "write" in workload else "writethrough"))
        if "miss" not in workload:
            options += f" --size={HOT_MIB}m --norandommap --time_based --runtime={seconds}"
        for number in range(rounds):
            for name, target in targets().items():
                place = f" --size={MISS_MIB}m --offset={HOT_MIB + 8 + number * MISS_MIB}m" if "miss" in workload else ""
                lines.append(f"turn {name} {target.device} {label(workload, name, number)} {options}{place}")
    for mode in ("writeback", "writethrough") if verifies else ():
        lines += [MODES.replace("MODE", mode), VERIFY.replace("MODE", mode)]
    text = "\n".join([*lines, FINISH])
    # PYTHONPATH has no value of its own.
    return re.sub("|".join(rf"\b{word}(?![A-Z_])" for word in words), lambda found: words[found.group()], text)


def label(workload: str, name: str, number: int) -> str:
    """The name of a turn's files."""
    return f"{workload.replace(' ', '-')}.{name}.{number}"


def collect(share: Path, rounds: int, only: str) -> dict[str, Target]:
    """Read what the machine left in its share."""
    found = targets()
    for workload in WORKLOADS:
        if only not in workload:
            continue
        for name, target in found.items():
            for number in range(rounds):
                base = share / label(workload, name, number)
                text = base.with_name(base.name + ".json").read_text()
                job: dict[str, Any] = json.loads(text[text.index("{"):])["jobs"][0]
                side = job["write" if "write" in workload else "read"]
                target.iops.setdefault(workload, []).append(side["iops"])
                target.p99_us.setdefault(workload, []).append(
                    side["clat_ns"].get("percentile", {}).get("99.000000", 0) / 1000)
                if name == "engine":
                    after, before = (_ticks(base.with_name(base.name + end)) for end in (".after", ".before"))
                    for kept, index in ((target.user_us, 0), (target.system_us, 1)):
                        kept.setdefault(workload, []).append(
                            (after[index] - before[index]) * 1e4 / max(1, side["total_ios"]))
    return found


def _ticks(path: Path) -> tuple[int, int]:
    # Processor time in hundredths of a second: in the program, in the kernel.
    fields = path.read_text().rpartition(")")[2].split()
    return int(fields[11]), int(fields[12])


def report(found: dict[str, Target]) -> list[Ratio]:
    """Print the tables; gives the ratios."""
    ratios: list[Ratio] = []
    engine = found["engine"]
    for workload, mine in engine.iops.items():
        user_us, system_us = (statistics.median(kept[workload]) for kept in (engine.user_us, engine.system_us))
        print(f"  {workload}: engine, CPU (emulated) a request: {user_us:.0f} us in the program, "
              f"{system_us:.0f} us in the kernel")
        for target in found.values():
            line = (f"    {target.name:<14} {statistics.median(target.iops[workload]):>9.0f}/s  p99 "
                    f"{statistics.median(target.p99_us[workload]):>8.0f} us")
            if target is not engine:
                ratios.append(ratio_of(workload, target.name, mine, target.iops[workload],
                                       TARGETS.get((workload, target.name))))
                line += f"   engine / this: {ratios[-1]}"
            print(line)
    return ratios


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--only", default="", help="workloads whose name contains this")
    parser.add_argument("--bucket-kib", type=int, default=512, help=f"each cache has {BUCKETS} buckets of this size")
    parser.add_argument("--verify", action="store_true", help="have fio verify the engine's volume afterwards")
    parser.add_argument("--series", default=machine.DEFAULT_SERIES, help="the kernel")
    parser.add_argument("--json", type=Path, help="keep the ratios in this file")
    asked = parser.parse_args()
    print(f"vm: {asked.rounds} rounds of {asked.seconds} s, Linux {asked.series} emulated ({machine_line()})",
          flush=True)
    with tempfile.TemporaryDirectory(prefix="bcachectl-bench-") as name:
        home = Path(name)
        disks = [home / f"{letter}.img" for letter in "abcdefgh"]
        for number, path in enumerate(disks):
            with path.open("wb") as file:
                is_cache = number in (0, 2, 4)
                file.truncate(BUCKETS * asked.bucket_kib << 10 if is_cache else VOLUME_MIB + (number in (1, 3)) << 20)
        for cache, backing in ((disks[0], disks[1]), (disks[2], disks[3])):
            subprocess.run([sys.executable, "-m", "bcachectl", "format", "--cache", str(cache),
                            "--backing", str(backing), "--bucket-size", f"{asked.bucket_kib}k", "--block-size", "4k"],
                           check=True, cwd=ROOT, stdout=subprocess.DEVNULL, env={**os.environ, "XDG_STATE_HOME": name})
        job = script(asked.rounds, asked.seconds, asked.only, asked.bucket_kib, verifies=asked.verify)
        vm = machine.start(job, disks, home / "job", series=asked.series, host=True, memory_mib=1536, processors=2)
        done = vm.wait(600 + asked.rounds * 5 * len(WORKLOADS) * (asked.seconds + 6))
        if done.status != 0:
            errors = "".join(path.read_text() for path in sorted((home / "job").glob("*.err")))
            sys.exit(f"the machine ended with {done.status}\n{done.stdout}\n{errors}\n{done.console[-3000:]}")
        ratios = report(collect(home / "job", asked.rounds, asked.only))
        if asked.verify:
            print(f"  {ENGINE}: fio --verify=crc32c is content with {VERIFY_MIB} MiB in writeback and in writethrough")
        print(f"  dm-cache at the end: {(home / 'job' / 'dm-cache.status').read_text().strip()}")
        for line in (home / "job" / "engine.status").read_text().splitlines():
            if line.startswith("VmRSS"):
                print(f"  memory of the engine: {line.split()[1]} KiB resident")
        save(asked.json, f"ublk, Linux {asked.series} emulated", ratios)


if __name__ == "__main__":
    main()
