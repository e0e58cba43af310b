# SPDX-License-Identifier: GPL-2.0-only
"""The virtual machine: boots in seconds with a busybox initramfs, runs one job, and is gone.

A job is a shell script (busybox sh, with the functions of lib.sh) that finds its disks as /dev/vda, /dev/vdb ... in
the order given, and a directory /job that it shares with the test: ``Machine.share``.  The test puts files there
before, and reads results there after, or while the job runs.

1. `start` boots; `Machine.wait` gives a `Result` when the job has ended; `run` does both.
2. `Machine.kill` ends it at any moment, as power loss would but for the host's page cache: what the disks had
   acknowledged is in their files, what was in flight may be or not.
3. A job that called ``crash`` ended by a reset without any shutdown.

With ``host=True`` the host's file system is there as well, read-only below a tmpfs, and ``host COMMAND`` runs its
programs. No KVM is needed: QEMU emulates, some 30 times slower than the host.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.require import need_tool
from tests.vm.kernel import Kernel, fetch_kernel

HERE = Path(__file__).resolve().parent
DEFAULT_SERIES = os.environ.get("BCACHECTL_VM_KERNEL") or "6.12"
BOOT_TIMEOUT_S = 120
PATIENT = "no_timer_check"
"""An emulated processor may stand still for a second when the host is busy, which is no fault of its timer."""


@dataclass(frozen=True)
class Result:
    """How a job ended: its exit status (None: killed before it ended), its output, the kernel's log, its files."""

    status: int | None
    stdout: str
    dmesg: str
    console: str
    share: Path
    seconds: float

    def check(self) -> Result:
        """Fail with all there is to see unless the job ended well."""
        assert self.status == 0, f"job ended with {self.status}\n{self.stdout}\n--- console\n{self.console}"
        return self

    def complaints(self) -> list[str]:
        """Lines of the kernel's log that are more than bcache's ordinary news."""
        return complaints(self.dmesg or self.console)


# What a healthy run of the driver says (super.c, journal.c, request.c).
_NEWS = re.compile("|".join((
    r"run_cache_set\(\) invalidating existing data",
    r"register(_cache|_bdev)\(\) registered (cache|backing) device",
    r"bch_cached_dev_attach\(\) Caching \S+ as bcache\d+ on set",
    r"bch_cached_dev_run\(\) cached dev \S+ is running already",
    r"bch_journal_replay\(\) journal replay done, \d+ keys in \d+ entries",
    r"cache_set_free\(\) Cache set \S+ unregistered",
    r"bcache_device_free\(\) \S+ stopped",
    r"cached_dev_detach_finish\(\) Caching disabled",
    r"bcache_reboot\(\)")))
_ALARM = re.compile(r"WARNING:|BUG:|Oops|Call Trace|I/O error|blocked for more than|general protection|Kernel panic"
                    r"|soft lockup|rcu.*stall|EXT4-fs error")


def complaints(log: str) -> list[str]:
    """Lines of a kernel log that bcache, the block layer or the kernel itself should not have had to write."""
    return [line for line in log.splitlines()
            if ("bcache" in line and "bcache:" in line and not _NEWS.search(line)) or _ALARM.search(line)]


class Machine:
    """One running virtual machine; made by `start`."""

    def __init__(self, process: subprocess.Popen[bytes], share: Path, console: Path) -> None:
        self.process = process
        self.share = share
        self._console = console
        self._started = time.monotonic()

    def wait_for_file(self, name: str, timeout_s: float = BOOT_TIMEOUT_S) -> Path:
        """Wait until the job has put something into a file of its share."""
        path = self.share / name
        self.wait_until(lambda: path.exists() and path.stat().st_size > 0, f"the job writes {name}", timeout_s)
        return path

    def wait_until(self, condition: Callable[[], bool], what: str, timeout_s: float = BOOT_TIMEOUT_S) -> None:
        """Wait until ``condition()`` holds; the machine must not end before."""
        if not self.comes_to(condition, timeout_s):
            ended = self.process.poll() is not None
            self.kill()
            raise AssertionError(f"{'ended before' if ended else 'waited in vain until'} {what}\n{self._text()}")

    def comes_to(self, condition: Callable[[], bool], timeout_s: float) -> bool:
        """Whether ``condition()`` holds in time, while the machine runs or when it has ended."""
        deadline = time.monotonic() + timeout_s
        while not condition():
            if self.process.poll() is not None or time.monotonic() > deadline:
                return condition()
            time.sleep(0.02)
        return True

    def said(self) -> str:
        """What is on the console by now."""
        return self._console.read_text(errors="replace") if self._console.exists() else ""

    def kill(self) -> Result:
        """Power off from outside, at once."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGKILL)
        self.process.wait()
        return self._result()

    def wait(self, timeout_s: float) -> Result:
        """The job's result; fails if it takes longer."""
        try:
            self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self.kill()
            raise AssertionError(f"the job took more than {timeout_s} s\n{self._text()}") from None
        return self._result()

    def _read(self, name: str) -> str:
        path = self.share / name
        return path.read_text(errors="replace") if path.exists() else ""

    def _text(self) -> str:
        return f"{self._read('stdout')}\n--- console\n{self.said()}"

    def _result(self) -> Result:
        status = self._read("status").strip()
        return Result(int(status) if status else None, self._read("stdout"), self._read("dmesg"),
                      self.said(), self.share, time.monotonic() - self._started)


def start(script: str, disks: Sequence[Path | str], share: Path, *, series: str = DEFAULT_SERIES, host: bool = False,
          memory_mib: int = 768, processors: int = 1) -> Machine:
    """Boot a machine that runs ``script``; ``share`` is a directory that may hold files for it already."""
    qemu = need_tool("qemu-system-x86_64")
    kernel = fetch_kernel(series)
    share.mkdir(exist_ok=True)
    for name in ("status", "stdout", "dmesg", "started"):
        (share / name).unlink(missing_ok=True)
    (share / "lib.sh").write_text((HERE / "lib.sh").read_text())
    (share / "job.sh").write_text(f". /job/lib.sh\n{script}\n")
    if host:
        (share / "wants-host").touch()
    console = share / "console"
    # No AVX2: QEMU 7.2 emulates it wrongly, and numpy sorts with it where it is (`test_machine`).
    # One processor, but for benchmarks: with two, QEMU's emulation of code that the kernel changes while it runs
    # (int3, jump labels) is not safe, and one boot in fifty ended in "Oops: int3".
    command = [qemu, "-accel", "tcg,thread=multi", "-cpu", "max,-avx2", "-m", str(memory_mib), "-smp", str(processors),
               "-nographic",
               "-no-reboot", "-monitor", "none", "-nodefaults", "-serial", f"file:{console}",
               "-kernel", str(kernel.image), "-initrd", str(_initramfs(kernel)),
               "-append", f"console=ttyS0 quiet panic=-1 {PATIENT}",
               "-virtfs", f"local,path={share},mount_tag=jobdir,security_model=none"]
    if host:
        command += ["-virtfs", "local,path=/,mount_tag=hostroot,security_model=none,readonly=on,multidevs=remap"]
    for disk in disks:
        command += ["-drive", f"file={disk},if=virtio,format=raw,cache=unsafe,discard=unmap"]
    with (share / "qemu.log").open("wb") as log:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT)
    return Machine(process, share, console)


def run(script: str, disks: Sequence[Path | str], share: Path, *, timeout_s: float = 240, series: str = DEFAULT_SERIES,
        host: bool = False) -> Result:
    """Boot, run the script to its end, and give its result."""
    return start(script, disks, share, series=series, host=host).wait(timeout_s)


def _initramfs(kernel: Kernel) -> Path:
    # Built beside the kernel, once for each content of init.sh.  Not compressed: unpacking would be emulated, too.
    busybox = need_tool("busybox")
    init = (HERE / "init.sh").read_bytes()
    modules = sorted(str(path.name) for path in (kernel.image.parent / "modules").rglob("*.ko"))
    fingerprint = hashlib.sha256(init + "\n".join(modules).encode()).hexdigest()[:12]
    target = kernel.image.parent / f"initramfs-{fingerprint}.cpio"
    if not target.exists():
        root = kernel.image.parent / f"initramfs-{os.getpid()}"
        (root / "bin").mkdir(parents=True)
        shutil.copy(busybox, root / "bin" / "busybox")
        (root / "init").write_bytes(init)
        (root / "init").chmod(0o755)
        shutil.copytree(kernel.image.parent / "modules", root / "modules")
        names = "\n".join(str(path.relative_to(root)) for path in sorted(root.rglob("*")))
        packed = subprocess.run([need_tool("cpio"), "-o", "-H", "newc", "--quiet", "-R", "0:0"], input=names.encode(),
                                stdout=subprocess.PIPE, cwd=root, check=True)
        made = target.with_suffix(f".{os.getpid()}")
        made.write_bytes(packed.stdout)
        made.rename(target)
        shutil.rmtree(root)
    return target
