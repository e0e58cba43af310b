# SPDX-License-Identifier: GPL-2.0-only
"""Debian's kernels with bcache as a module: fetched once a machine, never installed.

1. The machine's own Debian source (address and key) is read from its apt configuration; the wanted suite is added to a
   *private* apt configuration in the cache directory, so the machine's own stays as it is.
2. ``linux-image-amd64`` of that suite names the real package; it is downloaded and unpacked beside.
3. The kernel and the modules that a test needs, uncompressed and in the order they load, are kept; the rest is deleted.

The cache is ``$XDG_CACHE_HOME/bcachectl/vm/<kernel>``; a lock file lets two test workers ask at the same time.
"""

from __future__ import annotations

import fcntl
import lzma
import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from tests.require import need, need_tool

SUITES = {"6.12": "bookworm-backports", "6.1": "bookworm"}
"""Kernel series -> the Debian suite that has it."""

BASE_SUITE = "bookworm"
MODULES = ("virtio_pci", "virtio_blk", "9pnet_virtio", "9p", "overlay", "loop", "nbd", "bcache", "ublk_drv", "ext4",
           "crc32c_generic")
"""What is loaded at boot, after what it depends on; one that a kernel has built in, or lacks, is passed over."""
EXTRA_MODULES = ("dm_cache", "dm_cache_smq")
"""What is there for a job that loads it: ``load_extra``."""
NEEDED_MODULES = {"virtio_blk", "9p", "bcache"}


@dataclass(frozen=True)
class Kernel:
    """A kernel ready to boot: its image, and its modules in load order."""

    series: str
    release: str
    image: Path
    modules: tuple[Path, ...]


def cache_directory() -> Path:
    """Where fetched kernels are kept between runs."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(base) / "bcachectl" / "vm"


def fetch_kernel(series: str) -> Kernel:
    """The kernel of a series, from the cache or from the machine's Debian source."""
    assert series in SUITES, f"no suite is known for kernel {series}"
    home = cache_directory() / series
    home.mkdir(parents=True, exist_ok=True)
    with (home / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (home / "release").exists() or not (home / "modules" / "extra").exists():
            _fetch(series, home)
    return Kernel(series, (home / "release").read_text().strip(), home / "vmlinuz",
                  tuple(sorted((home / "modules").glob("*.ko"))))


def _fetch(series: str, home: Path) -> None:
    for tool in ("apt-get", "apt-cache", "dpkg-deb", "depmod", "modprobe"):
        need_tool(tool)
    apt = _private_apt(SUITES[series], home / "apt")
    _run("apt-get", *apt, "update", "-qq")
    meta = _run("apt-cache", *apt, "show", "linux-image-amd64")
    names = [name for name in re.findall(r"linux-image-[0-9][^ ,]*-amd64", meta) if f"-{series}." in name]
    assert names, f"linux-image-amd64 of {SUITES[series]} names no {series} kernel"
    _run("apt-get", *apt, "download", "-qq", names[0], cwd=home / "apt")
    (package,) = (home / "apt").glob("linux-image-*.deb")
    root = home / "apt" / "root"
    _run("dpkg-deb", "-x", str(package), str(root))
    (image,) = (root / "boot").glob("vmlinuz-*")
    release = image.name.removeprefix("vmlinuz-")
    _run(need_tool("depmod"), "-b", str(root), release)
    modules = home / "modules"
    shutil.rmtree(modules, ignore_errors=True)
    (modules / "extra").mkdir(parents=True)
    always = _modules_in_order(root, release, MODULES)
    extra = [path for path in _modules_in_order(root, release, EXTRA_MODULES) if path not in always]
    for directory, sources in ((modules, always), (modules / "extra", extra)):
        for number, source in enumerate(sources):
            name = source.name.removesuffix(".xz")
            content = lzma.decompress(source.read_bytes()) if source.suffix == ".xz" else source.read_bytes()
            (directory / f"{number:03d}-{name}").write_bytes(content)
    shutil.copyfile(image, home / "vmlinuz")
    shutil.rmtree(home / "apt")
    (home / "release").write_text(release + "\n")   # last: it says that all the rest is there


def _modules_in_order(root: Path, release: str, names: tuple[str, ...]) -> list[Path]:
    ordered: list[Path] = []
    for name in names:
        done = subprocess.run([need_tool("modprobe"), "-d", str(root), "-S", release, "--show-depends", name],
                              capture_output=True, text=True)
        assert done.returncode == 0 or name not in NEEDED_MODULES, done.stderr
        for line in done.stdout.splitlines():
            kind, _, path = line.strip().partition(" ")
            if kind == "insmod" and Path(path.split()[0]) not in ordered:
                ordered.append(Path(path.split()[0]))
    return ordered


def _private_apt(suite: str, home: Path) -> list[str]:
    # Options that make apt work in a directory of its own, with one source: ``suite`` of the machine's Debian.
    shutil.rmtree(home, ignore_errors=True)
    for name in ("lists/partial", "cache/archives/partial", "sources"):
        (home / name).mkdir(parents=True)
    (home / "sources" / "debian.sources").write_text(_debian_source().replace("SUITE", suite))
    return ["-o", "Dir::Etc::sourcelist=/dev/null", "-o", f"Dir::Etc::sourceparts={home}/sources",
            "-o", f"Dir::State::lists={home}/lists", "-o", f"Dir::Cache={home}/cache",
            "-o", "APT::Sandbox::User=root", "-o", "Acquire::Languages=none", "-o", "Acquire::Retries=3"]


def _debian_source() -> str:
    # The machine's entry for Debian 12 itself, as a stanza whose suite is the word SUITE.
    base = Path("/etc/apt")
    for path in sorted((base / "sources.list.d").glob("*.sources")):
        for stanza in re.split(r"\n\s*\n", path.read_text()):
            fields = dict(re.findall(r"(?m)^([A-Za-z-]+):[ \t]*((?:.|\n[ \t])*)$", stanza))
            if BASE_SUITE in fields.get("Suites", "").split() and fields.get("Enabled", "yes") != "no":
                signed = f"Signed-By: {fields['Signed-By']}\n" if "Signed-By" in fields else ""
                address = fields["URIs"].split()[0]
                return f"Types: deb\nURIs: {address}\nSuites: SUITE\nComponents: main\n{signed}"
    for path in [base / "sources.list", *sorted((base / "sources.list.d").glob("*.list"))]:
        for line in path.read_text().splitlines() if path.exists() else ():
            entry = re.fullmatch(r"deb\s+(?:\[(.*?)\]\s+)?(\S+)\s+(\S+)\s+(.*)", line.strip())
            if entry and entry[3] == BASE_SUITE:
                key = re.search(r"signed-by=(\S+)", entry[1] or "")
                signed = f"Signed-By: {key[1]}\n" if key else ""
                return f"Types: deb\nURIs: {entry[2]}\nSuites: SUITE\nComponents: main\n{signed}"
    need(False, "a Debian 12 package source in apt's configuration, to fetch a kernel from")
    raise AssertionError


def _run(*command: str, cwd: Path | None = None) -> str:
    done = subprocess.run(command, capture_output=True, text=True, cwd=cwd, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}{done.stderr}"
    return done.stdout
