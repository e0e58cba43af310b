# SPDX-License-Identifier: GPL-2.0-only
"""What sysfs and /proc say about devices, and what is made of it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from bcachectl import discovery
from bcachectl.discovery import BlockNode, enumerate_devices, named, node_of, probe, users_of


def device(name: str, *, kind: str = "disk", node: str | None = "", **attributes: str) -> Any:
    return SimpleNamespace(device_node=f"/dev/{name}" if node == "" else node, device_type=kind, sys_name=name,
                           sys_path=f"/sys/nowhere/{name}",
                           attributes={key.replace("__", "/"): value.encode() for key, value in attributes.items()})


@pytest.mark.parametrize(("name", "kind"), [
    ("sda", "disk"), ("nvme0n1", "disk"), ("vda", "disk"), ("loop7", "loop"), ("ublkb0", "ublk"), ("zram0", "zram"),
    ("dm-3", "dm"), ("md127", "md"), ("nbd0", "nbd"), ("bcache0", "bcache")])
def test_kinds(name: str, kind: str) -> None:
    assert node_of(device(name, size="16")) == BlockNode(f"/dev/{name}", kind, 8192)


def test_attributes() -> None:
    found = node_of(device("loop1", size="8", ro="1\n", loop__backing_file="/a file\n"))
    assert found == BlockNode("/dev/loop1", "loop", 4096, file="/a file", read_only=True)
    found = node_of(device("dm-0", size="8", dm__name="vg-lv\n"))
    assert found is not None
    assert found.name == "vg-lv"
    found = node_of(device("loop0p1", kind="partition", size="8"))
    assert found is not None
    assert found.kind == "partition"
    assert node_of(device("sda", node=None)) is None


def test_names_are_in_natural_order(loop_device: Callable[..., str], tmp_path: Path) -> None:
    image = tmp_path / "image"
    image.write_bytes(bytes(4096))
    paths = [loop_device(image) for _ in range(3)]
    listed = [node.path for node in enumerate_devices() if node.path in paths]
    assert listed == sorted(paths, key=lambda path: int(path.removeprefix("/dev/loop")))


def test_named(tmp_path: Path, loop_device: Callable[..., str]) -> None:
    image = tmp_path / "image"
    image.write_bytes(bytes(4096))
    assert named(str(image)) == BlockNode(str(image), "file", 4096)
    assert named(str(tmp_path)).kind == "other"
    assert named("/no/where").kind == "missing"
    link = tmp_path / "link"
    link.symlink_to(loop_device(image))
    found = named(str(link))
    assert (found.path, found.kind, found.file) == (str(link), "loop", str(image))


def test_probe_never_raises(tmp_path: Path) -> None:
    empty, short, zeros = tmp_path / "empty", tmp_path / "short", tmp_path / "zeros"
    empty.touch()
    short.write_bytes(bytes(600))
    zeros.write_bytes(bytes(1 << 20))
    assert probe(named(str(empty))).problem == "is empty (0 sectors)"
    assert probe(named(str(short))).problem == "too small for a superblock"
    assert probe(named("/no/where")).problem == "no such file or device"
    assert probe(named(str(zeros))) == discovery.Probe(named(str(zeros)))


def test_users(tmp_path: Path, loop_device: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    image = tmp_path / "image"
    image.write_bytes(bytes(1 << 20))
    assert users_of(str(image)) == []
    path = loop_device(image)
    assert users_of(str(image)) == [f"the file behind {path}"]
    assert users_of(path) == []
    assert users_of("/no/where") == []
    number = f"7:{path.removeprefix('/dev/loop')}"
    files = {"/proc/self/mountinfo": [f"36 35 {number} / /mnt/with\\040blank rw - ext4 {path} rw",
                                      "37 35 8:1 / /other rw - ext4 /dev/sda1 rw"],
             "/proc/swaps": ["Filename Type Size Used Priority", f"{path} partition 1020 0 -2"]}
    monkeypatch.setattr(discovery, "_lines", files.__getitem__)
    assert users_of(path) == ["mounted on /mnt/with blank", "used as swap"]


def test_a_file_that_another_process_writes_to(tmp_path: Path) -> None:
    """An engine's lock is seen without taking one."""
    image = tmp_path / "image"
    image.write_bytes(bytes(4096))
    code = ("import fcntl, sys; file = open(sys.argv[1], 'r+b'); fcntl.flock(file, getattr(fcntl, sys.argv[2])); "
            "print('locked', flush=True); sys.stdin.read()")
    for kind, is_seen in (("LOCK_EX", True), ("LOCK_SH", False)):
        with subprocess.Popen([sys.executable, "-c", code, image, kind], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                              text=True) as other:
            assert other.stdout is not None
            assert other.stdout.readline() == "locked\n"
            assert users_of(str(image)) == ([f"written to by process {other.pid}"] if is_seen else [])
            other.communicate()
    assert users_of(str(image)) == []
