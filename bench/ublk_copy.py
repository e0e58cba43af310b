# SPDX-License-Identifier: GPL-2.0-only
"""How ublk's data is copied: by the driver, as the engine has it, beside user copy, which the server asks for.

A server of the benchmark's own (`bench.ublk_server`, which says what the four forms are) hands the requests of a
device on to a disk, in the virtual machine, which is emulated: figures are ratios, and Python's share of a request is
some 30 times what it is on silicon.  Each form has a process and a device of its own on the same disk; they take turns,
round after round, after one turn each that does not count.  Before that, what was written through each form is read
through all of them and from the disk; at the end, fio verifies each.

The driver is also asked what it makes of zero copy.  ``--ask`` does no more than that.
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
import statistics
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.process import machine as machine_line
from bench.results import Ratio, ratio_of, save
from bench.ublk_server import CALLED, DRIVER, FORMS, HEARD, LINKED
from bench.verify import OPTIONS
from tests.export.engine import ROOT
from tests.vm import machine

MIB = 1 << 20
DISK_MIB, SPAN_MIB, CHECKED_MIB, VERIFY_MIB = 160, 128, 8, 16
NAMES = {DRIVER: "copy by the driver", HEARD: "the same, not linked", LINKED: "user copy, linked",
         CALLED: "user copy, called"}

WORKLOADS = {
    "read 4k QD32": "--rw=randread --bs=4k --iodepth=32",
    "write 4k QD32": "--rw=randwrite --bs=4k --iodepth=32",
    "read 1M QD4": "--rw=read --bs=1m --iodepth=4",
    "write 1M QD4": "--rw=write --bs=1m --iodepth=4",
}

ASK = """
server() { host env PYTHONPATH=ROOT PYTHONDONTWRITEBYTECODE=1 PYTHON -m bench.ublk_server "$@"; }
server --ask >/job/answers
"""

PREPARE = """
echo 0 >/proc/sys/kernel/printk
for form in FORMS; do
    server --form $form /dev/vda >/job/$form.ready 2>/job/$form.err &
    wait_for 120 test -s /job/$form.ready
done

# content DEVICE FORM_NUMBER: the checksum of what was written through this form.
content() {
    host dd if=/dev/$1 bs=1M count=CHECKED_MIB skip=$(($2 * CHECKED_MIB)) iflag=direct 2>/dev/null | md5sum
}
number=0
for form in FORMS; do
    read device pid </job/$form.ready
    dd if=/dev/urandom of=/tmp/data bs=1M count=CHECKED_MIB 2>/dev/null
    dd if=/tmp/data bs=1M 2>/dev/null | host dd of=/dev/$device bs=1M seek=$((number * CHECKED_MIB)) iflag=fullblock \\
        oflag=direct 2>/dev/null || fail "writing through $form"
    written=$(md5sum </tmp/data)
    [ "$(content vda $number)" = "$written" ] || fail "the disk has not what was written through $form"
    for other in FORMS; do
        read device pid </job/$other.ready
        [ "$(content $device $number)" = "$written" ] || fail "$other does not read what $form has written"
    done
    number=$((number + 1))
done

# turn FORM LABEL FIO_OPTION...
turn() {
    form=$1; label=$2
    shift 2
    read device pid </job/$form.ready
    cat /proc/$pid/stat /proc/$pid/task/*/stat >/job/$label.before
    host fio --name=turn --filename=/dev/$device --ioengine=io_uring --direct=1 --invalidate=0 --thread \\
        --randrepeat=0 --output-format=json --size=SPAN_MIBm --norandommap --time_based --runtime=SECONDS "$@" \\
        >/job/$label.json 2>/job/$label.err || fail "fio $label"
    cat /proc/$pid/stat /proc/$pid/task/*/stat >/job/$label.after
}
"""

FINISH = """
for form in FORMS; do
    read device pid </job/$form.ready
    host fio FIO_VERIFY --ioengine=io_uring --direct=1 --thread --filename=/dev/$device --size=VERIFY_MIBm \\
        >/job/verify 2>&1 || fail "fio --verify of $form: $(cat /job/verify)"
    cat /proc/$pid/status >/job/$form.status
    kill -TERM $pid
    wait_for 60 sh -c "! test -e /proc/$pid"
    [ ! -e /dev/$device ] && [ ! -s /job/$form.err ] || fail "$form: $(cat /job/$form.err)"
done
"""


@dataclass
class Form:
    """What was measured of one form, by workload."""

    rate: dict[str, list[float]] = field(default_factory=dict)
    user_us: dict[str, list[float]] = field(default_factory=dict)
    system_us: dict[str, list[float]] = field(default_factory=dict)
    worker_us: dict[str, list[float]] = field(default_factory=dict)
    """Of that, what threads used that the kernel makes for entries of the ring which would have waited."""

    def cpu_us(self, workload: str) -> list[float]:
        """Processor time of a request, in the program and in the kernel."""
        return [user + system for user, system in zip(self.user_us[workload], self.system_us[workload], strict=True)]


def script(rounds: int, seconds: float, only: str, *, only_asks: bool) -> str:
    """What the machine does."""
    words = {"PYTHON": sys.executable, "ROOT": str(ROOT), "FORMS": " ".join(FORMS), "SECONDS": str(seconds),
             "CHECKED_MIB": str(CHECKED_MIB), "SPAN_MIB": str(SPAN_MIB), "VERIFY_MIB": str(VERIFY_MIB),
             "FIO_VERIFY": shlex.join(OPTIONS)}
    lines = [ASK] if only_asks else [ASK, PREPARE]
    if not only_asks:
        for workload, options in WORKLOADS.items():
            if only in workload:
                lines += (f"turn {form} warm {options}" for form in FORMS)
                lines += (f"turn {form} {label(workload, form, number)} {options}"
                          for number in range(rounds) for form in in_turn(number))
        lines.append(FINISH)
    # PYTHONPATH has no value of its own.
    return re.sub("|".join(rf"\b{word}(?![A-Z_])" for word in words), lambda found: words[found.group()],
                  "\n".join(lines))


def in_turn(number: int) -> list[str]:
    """The forms in the order of a round: each is once the first."""
    first = number % len(FORMS)
    return [*FORMS[first:], *FORMS[:first]]


def label(workload: str, form: str, number: int) -> str:
    """The name of a turn's files."""
    return f"{workload.replace(' ', '-')}.{form}.{number}"


def collect(share: Path, rounds: int, only: str) -> dict[str, Form]:
    """Read what the machine left in its share."""
    found = {name: Form() for name in FORMS}
    for workload in WORKLOADS:
        if only not in workload:
            continue
        for name, form in found.items():
            for number in range(rounds):
                base = share / label(workload, name, number)
                text = base.with_name(base.name + ".json").read_text()
                job: dict[str, Any] = json.loads(text[text.index("{"):])["jobs"][0]
                side = job["write" if "write" in workload else "read"]
                form.rate.setdefault(workload, []).append(side["iops"])
                ticks = _ticks(*(base.with_name(base.name + end) for end in (".before", ".after")))
                for kept, count in zip((form.user_us, form.system_us, form.worker_us), ticks, strict=True):
                    kept.setdefault(workload, []).append(count * 1e4 / max(1, side["total_ios"]))
    return found


def _ticks(before: Path, after: Path) -> tuple[int, int, int]:
    # Processor time between two looks, in hundredths of a second: in the program, in the kernel, and that in workers of
    # the ring, some of which may not have been there before.
    looks: list[dict[str, tuple[int, int]]] = []
    for path in (before, after):
        look: dict[str, tuple[int, int]] = {}
        for number, line in enumerate(path.read_text().splitlines()):
            name, _, rest = line.rpartition(")")
            fields = rest.split()
            look[name if number else "whole"] = int(fields[11]), int(fields[12])
        looks.append(look)
    first, last = looks
    in_workers = sum(system - first.get(name, (0, 0))[1] for name, (_, system) in last.items() if "(iou-wrk" in name)
    return last["whole"][0] - first["whole"][0], last["whole"][1] - first["whole"][1], in_workers


def report(found: dict[str, Form]) -> list[Ratio]:
    """Print the tables; gives the ratios."""
    ratios: list[Ratio] = []
    driver = found[DRIVER]
    for workload in driver.rate:
        print(f"  {workload}")
        for name, form in found.items():
            user_us, system_us, worker_us = (statistics.median(kept[workload]) for kept in (
                form.user_us, form.system_us, form.worker_us))
            line = (f"    {NAMES[name]:<20} {statistics.median(form.rate[workload]):>6.0f}/s  CPU a request "
                    f"{user_us:>4.0f} + {system_us:>4.0f} us, of these {worker_us:>4.0f} in workers")
            for other in () if form is driver else (DRIVER, HEARD) if name == CALLED else (DRIVER,):
                theirs = found[other]
                ratios.append(ratio_of(workload, f"{NAMES[name]} / {NAMES[other]}", form.rate[workload],
                                       theirs.rate[workload]))
                cpu = ratio_of(workload, "CPU", form.cpu_us(workload), theirs.cpu_us(workload))
                line += f"\n      / {NAMES[other]}: {ratios[-1]}   CPU: {cpu}"
            print(line)
    return ratios


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=2.0)
    parser.add_argument("--only", default="", help="workloads whose name contains this")
    parser.add_argument("--ask", action="store_true", help="only ask the driver what it knows")
    parser.add_argument("--series", default=machine.DEFAULT_SERIES, help="the kernel")
    parser.add_argument("--json", type=Path, help="keep the ratios in this file")
    asked = parser.parse_args()
    print(f"ublk_copy: {asked.rounds} rounds of {asked.seconds} s, Linux {asked.series} emulated ({machine_line()})",
          flush=True)
    with tempfile.TemporaryDirectory(prefix="bcachectl-bench-") as name:
        home = Path(name)
        disk = home / "disk.img"
        with disk.open("wb") as file:
            for _ in range(DISK_MIB):
                file.write(bytes(MIB))
        job = script(asked.rounds, asked.seconds, asked.only, only_asks=asked.ask)
        vm = machine.start(job, [disk], home / "job", series=asked.series, host=True, memory_mib=1536, processors=2)
        done = vm.wait(600 + asked.rounds * len(FORMS) * len(WORKLOADS) * (asked.seconds + 6))
        if done.status != 0:
            errors = "".join(path.read_text() for path in sorted((home / "job").glob("*.err")))
            sys.exit(f"the machine ended with {done.status}\n{done.stdout}\n{errors}\n{done.console[-3000:]}")
        for answer in (home / "job" / "answers").read_text().splitlines():
            print(f"  {answer}")
        if asked.ask:
            return
        ratios = report(collect(home / "job", asked.rounds, asked.only))
        for form in FORMS:
            fields = dict(line.split(":", 1) for line in (home / "job" / f"{form}.status").read_text().splitlines())
            print(f"  {NAMES[form]}: {int(fields['VmHWM'].split()[0]) >> 10} MiB resident at most, "
                  f"{int(fields['Threads'])} threads at the end; fio --verify=crc32c is content")
        print(f"  load at the end: {machine_line()}")
        save(asked.json, f"ublk's copies, Linux {asked.series} emulated", ratios)


if __name__ == "__main__":
    main()
