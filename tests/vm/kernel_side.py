# SPDX-License-Identifier: GPL-2.0-only
"""What tests ask of the kernel's driver: to register a set and hand out its content, to write to it until it is killed.

`Visit` builds the job of one boot from steps, in the order they are called::

    visit = Visit(share, cache=cache, backings=[backing])
    visit.register()
    visit.copy_out()                        # every volume's content, into a file here
    visit.write(plan)                       # a plan of tests.stamps on bcache0
    visit.stop()
    seen = visit.run()                      # or visit.run_and_kill(after_writes=500)

The disks are the test's files themselves: what the kernel writes is in them afterwards.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.stamps import draw
from tests.vm import machine
from tests.vm.machine import Result

HERE = Path(__file__).resolve().parent
PROGRESS = "progress"
REGISTERED = "registered"


@dataclass(frozen=True)
class Seen:
    """What a visit brought back."""

    result: Result
    contents: list[bytes]
    """The content of each backing device's volume, in the order of the backing devices; empty if it was not copied
    out."""
    last_acknowledged: int
    """The number of the last acknowledged write, -1 if there was none."""
    finished_writing: bool


class Visit:
    """One boot of a kernel with one cache set; see the module's text."""

    def __init__(self, share: Path, *, cache: Path, backings: Sequence[Path], flash_bytes: Sequence[int] = (),
                 series: str = machine.DEFAULT_SERIES) -> None:
        self.share = share
        self.series = series
        self.disks = [cache, *backings]
        self._volume_bytes = [*map(os.path.getsize, backings), *flash_bytes]   # not less than the volumes' sizes
        self._names = [f"/dev/vd{chr(ord('a') + number)}" for number in range(len(self.disks))]
        self._outs: list[Path] = []
        self._steps: list[str] = []
        self._wants_host = False
        self._has_cache = False
        self._vm: machine.Machine | None = None
        share.mkdir(parents=True, exist_ok=True)

    def step(self, script: str) -> None:
        """Any lines of shell."""
        self._steps.append(script)

    def register_cache(self) -> None:
        """Register the cache alone, and leave the kernel's text of all keys in the share's file ``btree.txt``.

        As long as there is no volume nobody reads, which could add keys: the kernel looks for partitions on a volume.
        """
        self.step(f"register {self._names[0]}\ncat /sys/kernel/debug/bcache/bcache-* >/job/btree.txt")
        self._has_cache = True

    def register(self) -> None:
        """Register all devices, and wait for the volumes; $volume0, $volume1 ... are their names.

        The volumes of the backing devices come first, then the flash-only ones, which the kernel makes in their order.
        """
        self.step(f"register {' '.join(self._names[self._has_cache:])}")
        for number, name in enumerate(self._names[1:]):
            link = f"/sys/block/{name.removeprefix('/dev/')}/bcache/dev"
            self.step(f"wait_for 60 test -e {link}\nvolume{number}=$(basename $(readlink {link}))\n"
                      f"wait_volume $volume{number}")
        backed = len(self.disks) - 1
        if len(self._volume_bytes) > backed:
            names = " ".join(f"$volume{number}" for number in range(backed))
            self.step(f"""number={backed}
                for folder in /sys/block/bcache*; do
                    name=${{folder##*/}}
                    case " {names} " in *" $name "*) continue ;; esac
                    eval volume$number=$name
                    number=$((number + 1))
                done
                [ $number = {len(self._volume_bytes)} ] || fail "$number volumes"
                wait_volume {' '.join(f'$volume{number}' for number in range(backed, len(self._volume_bytes)))}""")
        self.step(f"echo yes >/job/{REGISTERED}")

    def copy_out(self) -> None:
        """Read every volume as a whole."""
        assert not self._outs, "once a visit"
        for number, size_bytes in enumerate(self._volume_bytes):
            out = self.share / f"volume{number}.out"
            with out.open("wb") as file:
                file.truncate(size_bytes)
            self._outs.append(out)
            disk = f"/dev/vd{chr(ord('a') + len(self.disks) + number)}"
            self.step(f"cat /sys/block/$volume{number}/size >/job/volume{number}.sectors\n"
                      f"copy_out $volume{number} {disk}\necho yes >/job/volume{number}.copied")

    def set_mode(self, mode: str) -> None:
        """Switch every volume to a cache mode."""
        for number in range(len(self.disks) - 1):
            self.step(f"set_attribute /sys/block/$volume{number}/bcache/cache_mode {mode}")

    def write(self, plan: dict[str, Any], *, volume: int = 0, progress: str = PROGRESS) -> None:
        """Carry out a plan (the arguments of `tests.stamps.draw`) on a volume; `Seen` tells of the plan whose numbers
        go to the file `PROGRESS`."""
        self._wants_host = True
        shutil.copy(HERE.parent / "stamps.py", self.share / "stamps.py")
        shutil.copy(HERE / "stamp_writer.py", self.share / "stamp_writer.py")
        (self.share / progress).unlink(missing_ok=True)
        python = os.path.realpath(sys.executable)
        self.step(f"host {python} -SE /job/stamp_writer.py /dev/$volume{volume} /job/{progress} '{json.dumps(plan)}'")

    def facts(self) -> None:
        """Leave the btree and all attributes in the share's directory ``facts``."""
        self.step("facts /job/facts")

    def stop(self) -> None:
        """Stop the set in good order, dirty data staying dirty."""
        self.step("stop_all")

    def crash(self) -> None:
        """Reset the machine."""
        self.step("crash")

    def run(self, timeout_s: float = 240) -> Seen:
        """Boot, take all steps, and bring back what was seen; fails unless all steps went well."""
        result = self._started().wait(timeout_s)
        return self._seen(result.check())

    def hangs(self, within_s: float) -> bool:
        """Boot, and kill the machine if it waits for the journal for ever; else let it go on, for `run`."""
        self._steps.insert(0, f"(sleep {within_s}; [ -e /job/{REGISTERED} ] || echo w >/proc/sysrq-trigger) &")
        vm = self._vm = self._start()
        registered = self.share / REGISTERED
        if vm.comes_to(lambda: registered.exists() or "bch_journal+" in vm.said(), 2 * within_s) \
                and registered.exists():
            return False
        console = vm.kill().console
        assert "bch_journal+" in console, f"the devices are not registered, and not for want of a journal\n{console}"
        return True

    def run_and_kill(self, *, after_writes: int, timeout_s: float = 240) -> Seen:
        """Boot, and kill the machine when the plan's writes have come that far."""
        vm = self._started()
        vm.wait_until(lambda: self._progress_lines() >= after_writes, f"{after_writes} writes are done", timeout_s)
        return self._seen(vm.kill())

    def _started(self) -> machine.Machine:
        return self._vm or self._start()

    def _start(self) -> machine.Machine:
        return machine.start("\n".join(self._steps), [*self.disks, *self._outs], self.share, series=self.series,
                             host=self._wants_host)

    def _progress_lines(self) -> int:
        path = self.share / PROGRESS
        return path.read_bytes().count(b"\n") if path.exists() else 0

    def _seen(self, result: Result) -> Seen:
        contents = []
        for number, out in enumerate(self._outs):
            assert (self.share / f"volume{number}.copied").exists(), result.console
            sectors = int((self.share / f"volume{number}.sectors").read_text())
            with out.open("rb") as file:
                contents.append(file.read(sectors * 512))
        path = self.share / PROGRESS
        # The last line counts only if its end is there.
        lines = path.read_text().split("\n")[:-1] if path.exists() else []
        numbers = [int(line) for line in lines if line != "done"]
        return Seen(result, contents, numbers[-1] if numbers else -1, "done" in lines)


def plan_for(seed: int, size_bytes: int, *, ops: int = 100_000, **more: Any) -> dict[str, Any]:
    """The arguments of `tests.stamps.draw` for a volume, with a flush every fifty requests or so."""
    plan = {"seed": seed, "ops": ops, "size_bytes": size_bytes, "max_kib": 32, "flushes": 0.02, **more}
    next(draw(**plan))   # wrong arguments are noticed here, not in the machine
    return plan
