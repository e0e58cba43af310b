# SPDX-License-Identifier: GPL-2.0-only
"""`FakeKernel`: a /sys of the attributes that a real kernel had (tests/golden/*/facts), which answers to writes.

It stands where `bcachectl.sysfs.tree` reads and writes.  What is written is kept in ``writes``, and does what the
driver does: a list moves its brackets, a number is clamped, a word that is in no list is EINVAL; a detach takes some
looks until it is done, a stop takes directories away: that of a set at once, that of its cache device some time later,
when all is written.  Its clock moves when someone sleeps.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
from pathlib import Path

import pytest

GOLDEN = Path(__file__).resolve().parents[2] / "golden"
WRITE_ONLY = {"attach", "detach", "stop", "unregister", "flash_vol_create", "clear_stats", "trigger_gc", "prune_cache",
              "register", "register_quiet"}
WRITABLE = re.compile(r"writeback_(running|percent|delay|rate|metadata|rate_.*|consider_fragment)|cache_mode|label"
                      r"|running|sequential_cutoff|io_error_.*|io_disable|size|synchronous|journal_delay_ms|errors|discard"
                      r"|congested_.*_us|cache_replacement_policy|copy_gc_enabled|gc_.*|idle_max.*|stop_when.*|readahead.*")
LOOKS = 3
"""How often the state of a device is looked at until a detach or a flush is done."""

WRITES_OUT_S = 0.35
"""How long a set that stops is still being written out after its directory is gone."""


class FakeKernel:
    """One set with the devices of a golden story, ``vda`` the cache device."""

    def __init__(self, home: Path, story: str, monkeypatch: pytest.MonkeyPatch) -> None:
        self.root, self.dev = home / "sys", home / "dev"
        self.writes: list[tuple[str, str]] = []
        self.now_s = 1000.0
        self.failures: dict[str, int] = {}
        self.said: list[str] = []
        self._leaving: dict[Path, int] = {}
        self._written_out_s: float | None = None
        self._monkeypatch = monkeypatch
        self.dev.mkdir(parents=True)
        self._build((GOLDEN / story / "facts" / "sysfs.tsv").read_text())
        (home / "kmsg").write_text("")
        self.kmsg = home / "kmsg"
        for name, value in (("ROOT", str(self.root)), ("DEV", str(self.dev)), ("KMSG", str(self.kmsg)),
                            ("read_text", self.read), ("write_text", self.write)):
            monkeypatch.setattr(f"bcachectl.sysfs.tree.{name}", value)
        for module in ("job", "live", "look"):
            monkeypatch.setattr(f"bcachectl.sysfs.{module}.time", self)

    # The clock.

    def monotonic(self) -> float:
        return self.now_s

    def monotonic_ns(self) -> int:
        return int(self.now_s * 1e9)

    def sleep(self, seconds: float) -> None:
        self.now_s += seconds
        if self._written_out_s is not None and self.now_s >= self._written_out_s:
            shutil.rmtree(self.backing("vda"))
            self._written_out_s = None

    # The tree.

    def _build(self, facts: str) -> None:
        self.uuid = re.search(r"fs/bcache/([0-9a-f-]{36})/", facts)[1]  # type: ignore[index]
        values = {path: text.replace(";", "\n") for path, text in
                  (line.split("\t", 1) for line in facts.splitlines())}
        (self.root / "class/block").mkdir(parents=True)
        self.put("fs/bcache/register", "")
        self.add_disk("vda", 131072)
        disks = {path.split("/")[1]: text.strip() for path, text in values.items() if path.endswith("backing_dev_name")}
        for path, text in values.items():
            first, name, rest = path.split("/", 2)
            if first == "fs":
                rest = rest.split("/", 1)[1]
                place = (f"devices/vda/bcache/{rest.removeprefix('cache0/')}" if rest.startswith("cache0/")
                         else f"fs/bcache/{self.uuid}/{rest}")
            else:
                place = f"devices/{disks.get(name, name)}/{rest}"
            self.put(place, text)
        for name in ("stop", "unregister", "flash_vol_create", "clear_stats", "internal/trigger_gc",
                     "internal/prune_cache"):
            self.put(f"fs/bcache/{self.uuid}/{name}", "")
        self.put("devices/vda/bcache/clear_stats", "")
        (self.set / "cache0").symlink_to(self.root / "devices/vda/bcache")
        volumes = sorted({path.split("/")[1] for path in values if path.startswith("block/bcache")})
        for slot, volume in enumerate(volumes):
            self.add_volume(volume, disks.get(volume), slot)

    def add_disk(self, name: str, size_sectors: int) -> None:
        self.put(f"devices/{name}/size", f"{size_sectors}\n")
        self.put(f"devices/{name}/stat", "100 0 800 1 200 0 3200 1 0 1 1 5 0 40 0 9 0\n")
        (self.root / "class/block" / name).symlink_to(self.root / "devices" / name)
        (self.dev / name).touch()

    def add_volume(self, volume: str, disk: str | None, slot: int) -> None:
        self.add_disk(volume, 65520)
        if disk is None:
            self.put(f"devices/{volume}/bcache/unregister", "")
            directory = self.root / "devices" / volume / "bcache"
            (self.set / f"volume{slot}").symlink_to(directory)
        else:
            self.add_disk(disk, 65536)
            directory = self.root / "devices" / disk / "bcache"
            for name in ("detach", "stop", "attach"):
                self.put(f"devices/{disk}/bcache/{name}", "")
            (self.root / "devices" / volume / "bcache").symlink_to(directory)
            (directory / "dev").symlink_to(self.root / "devices" / volume)
            (self.set / f"bdev{slot}").symlink_to(directory)
        (directory / "cache").symlink_to(self.set)

    @property
    def set(self) -> Path:
        return self.root / "fs/bcache" / self.uuid

    def backing(self, disk: str = "vdb") -> Path:
        return self.root / "devices" / disk / "bcache"

    def put(self, place: str, text: str) -> None:
        path = self.root / place
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        path.chmod(0o200 if path.name in WRITE_ONLY else 0o644 if WRITABLE.fullmatch(path.name) else 0o444)

    # What the driver does.

    def read(self, path: str) -> str:
        real = Path(os.path.realpath(path))
        if real.name == "state" and real.parent in self._leaving:
            self._leave(real.parent)
        return real.read_text()

    def write(self, path: str, text: str) -> None:
        real = Path(os.path.realpath(path))
        place = str(real.relative_to(self.root))
        self.writes.append((place, text))
        if code := self.failures.get(real.name, 0):
            self.kmsg.write_text(self.kmsg.read_text() + "".join(f"6,1,2,-;bcache: {line}\n" for line in self.said))
            raise OSError(code, os.strerror(code))
        react = getattr(self, f"_on_{real.name}", None)
        if react is not None:
            react(real, text)
        elif "[" in real.read_text():
            words = re.sub(r"[\[\]]", "", real.read_text()).split()
            if text not in words:
                raise OSError(errno.EINVAL, "Invalid argument")
            real.write_text(" ".join(f"[{word}]" if word == text else word for word in words) + "\n")
        else:
            real.write_text(f"{text}\n")

    def _on_writeback_percent(self, real: Path, text: str) -> None:
        real.write_text(f"{min(int(text), 40)}\n")
        if text == "0":
            self._leaving.setdefault(real.parent, LOOKS)

    def _on_detach(self, real: Path, text: str) -> None:
        self._leaving[real.parent] = LOOKS
        (real.parent / "detaching").touch()

    def _on_stop(self, real: Path, text: str) -> None:
        if real.parent == self.set:
            self._end_set()
            return
        volume = os.path.basename(os.path.realpath(real.parent / "dev"))
        (self.root / "class/block" / volume).unlink()
        for link in self.set.glob("bdev*"):
            if os.path.realpath(link) == str(real.parent):
                link.unlink()
        shutil.rmtree(real.parent)

    def _on_unregister(self, real: Path, text: str) -> None:
        if real.parent == self.set:
            self._end_set()
            for link in self.root.glob("devices/*/bcache/cache"):
                link.unlink()
        else:
            (self.root / "class/block" / real.parent.parent.name).unlink()

    def _end_set(self) -> None:
        shutil.rmtree(self.set)
        self._written_out_s = self.now_s + WRITES_OUT_S

    def _on_trigger_gc(self, real: Path, text: str) -> None:
        (self.set / "internal/btree_gc_last_sec").write_text("0\n")

    def _on_flash_vol_create(self, real: Path, text: str) -> None:
        self.put("devices/bcache9/bcache/size", "1.0M\n")
        self.put("devices/bcache9/bcache/label", "\n\n")
        self.add_volume("bcache9", None, 9)

    def _on_attach(self, real: Path, text: str) -> None:
        if not (self.root / "fs/bcache" / text).is_dir():
            raise OSError(errno.ENOENT, "No such file or directory")
        (real.parent / "cache").symlink_to(self.set)
        (self.set / "bdev7").symlink_to(real.parent)
        (real.parent / "state").write_text("clean\n")

    def _on_running(self, real: Path, text: str) -> None:
        self.add_disk("bcache5", 65520)
        (self.root / "devices/bcache5/bcache").symlink_to(real.parent)
        (real.parent / "dev").symlink_to(self.root / "devices/bcache5")
        (real.parent / "state").write_text("inconsistent\n")

    def _leave(self, directory: Path) -> None:
        # One look more: dirty data gets less, at last the state changes.
        self._leaving[directory] -= 1
        left = self._leaving[directory]
        (directory / "dirty_data").write_text(f"{max(left, 0)}.0M\n")
        if left <= 0:
            del self._leaving[directory]
            detaches = (directory / "detaching").exists()
            (directory / "state").write_text("no cache\n" if detaches else "clean\n")
            if detaches:
                self.take_out(directory)

    def take_out(self, directory: Path) -> None:
        """A device leaves its set."""
        (directory / "cache").unlink()
        (directory / "state").write_text("no cache\n")
        for link in self.set.glob("bdev*"):
            if os.path.realpath(link) == str(directory):
                link.unlink()

    def let_wait(self, state: str, disk: str = "vdb") -> None:
        """A device waits for a set that is not there."""
        self.take_out(self.backing(disk))
        (self.backing(disk) / "state").write_text(f"{state}\n")
        (self.backing(disk) / "running").write_text("0\n")
        volume = os.path.basename(os.path.realpath(self.backing(disk) / "dev"))
        (self.backing(disk) / "dev").unlink()
        (self.root / "class/block" / volume).unlink()
