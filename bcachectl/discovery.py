# SPDX-License-Identifier: GPL-2.0-only
"""What block devices there are, which of them bcache knows, and who holds one.

Devices are enumerated through pyudev straight from sysfs; no udev daemon is needed, and nothing that one stored is
believed: `probe` reads each superblock itself.  A device that cannot be read is reported with the reason and stops
nothing.  `watch` follows the events of a udev daemon where one runs, and the kernel's own otherwise.

Discovery never writes and never claims a device.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass

import pyudev

from bcachectl.blockdev import open_device
from bcachectl.errors import BcachectlError, Corrupt
from bcachectl.ondisk.magic import BCACHE_MAGIC
from bcachectl.ondisk.superblock import (
    SB_BYTES,
    SB_SECTOR,
    Superblock,
    check_superblock,
    decode_superblock,
    parse_superblock,
)

KINDS = (("loop", "loop"), ("ublkb", "ublk"), ("zram", "zram"), ("dm-", "dm"), ("md", "md"), ("nbd", "nbd"),
         ("bcache", "bcache"), ("ram", "ram"))
"""Prefix of the kernel's name, and our word for it; partitions and disks are told by their type."""


@dataclass(frozen=True, slots=True)
class BlockNode:
    """One block device as sysfs tells: ``file`` is behind a loop device, ``name`` is a device mapper name."""

    path: str
    kind: str
    size_bytes: int
    file: str | None = None
    name: str | None = None
    read_only: bool = False
    holders: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Probe:
    """What was found on a device.

    ``superblock`` is None where there is no bcache magic or nothing could be read; ``problem`` says why a device could
    not be read, or what the kernel would refuse about its superblock.
    """

    node: BlockNode
    superblock: Superblock | None = None
    problem: str | None = None


def device_nodes() -> list[str]:
    """The path of every block device with a size, for the shell's completion."""
    return [node.path for node in enumerate_devices()]


def enumerate_devices() -> list[BlockNode]:
    """Every block device that has a size, in the order of their names."""
    context = pyudev.Context()
    nodes = [node_of(device) for device in context.list_devices(subsystem="block")]
    present = [node for node in nodes if node is not None and node.size_bytes]
    return sorted(present, key=lambda node: _natural(node.path))


def node_of(device: pyudev.Device) -> BlockNode | None:
    """What sysfs says about one device; None for one without a device node."""
    if device.device_node is None:
        return None
    kind = "partition" if device.device_type == "partition" else next(
        (word for prefix, word in KINDS if device.sys_name.startswith(prefix)), "disk")
    sectors = _attribute(device, "size")
    return BlockNode(
        path=device.device_node, kind=kind, size_bytes=int(sectors or 0) << 9,
        file=_attribute(device, "loop/backing_file"), name=_attribute(device, "dm/name"),
        read_only=_attribute(device, "ro") == "1", holders=tuple(_list_directory(f"{device.sys_path}/holders")))


def named(path: str) -> BlockNode:
    """The node for a path that a user gave: a block device or a plain file."""
    try:
        status = os.stat(path)
    except OSError:
        return BlockNode(path, "missing", 0)
    if not stat.S_ISBLK(status.st_mode):
        return _named_file(path, status)
    device = pyudev.Devices.from_device_number(pyudev.Context(), "block", status.st_rdev)
    node = node_of(device)
    return BlockNode(path, "disk", 0) if node is None else BlockNode(
        path, node.kind, node.size_bytes, node.file, node.name, node.read_only, node.holders)


def _named_file(path: str, status: os.stat_result) -> BlockNode:
    # A metadata image says how large its device was.
    if not stat.S_ISREG(status.st_mode):
        return BlockNode(path, "other", status.st_size)
    try:
        with open_device(path) as device:
            return BlockNode(path, "file" if device.image is None else "image", device.size_bytes)
    except BcachectlError:
        return BlockNode(path, "file", status.st_size)


def probe(node: BlockNode) -> Probe:
    """Read the superblock of a device; never raises for what is found there."""
    try:
        with open_device(node.path) as device:
            if device.size_bytes < (SB_SECTOR << 9) + SB_BYTES:
                return Probe(node, problem="too small for a superblock")
            raw = device.read(SB_SECTOR << 9, SB_BYTES)
            size_sectors, block_sectors = device.size_bytes >> 9, device.logical_block_bytes >> 9
    except BcachectlError as error:
        return Probe(node, problem=str(error).removeprefix(f"{node.path}: "))
    sb = parse_superblock(raw)
    if sb.magic != BCACHE_MAGIC:
        return Probe(node)
    try:
        check_superblock(decode_superblock(raw), device_sectors=size_sectors, logical_block_sectors=block_sectors)
    except Corrupt as error:
        return Probe(node, sb, error.why)
    return Probe(node, sb)


def watch() -> Iterator[tuple[str, BlockNode]]:
    """(action, device) for each event of a block device, for ever."""
    context = pyudev.Context()
    source = "udev" if os.path.exists("/run/udev/control") else "kernel"
    monitor = pyudev.Monitor.from_netlink(context, source=source)
    monitor.filter_by("block")
    monitor.start()
    while True:
        device = monitor.poll()
        node = node_of(device) if device is not None else None
        if node is not None:
            yield str(device.action), node


def users_of(path: str) -> list[str]:
    """Who uses a device or image file, one phrase each; empty if nobody is known to."""
    try:
        status = os.stat(path)
    except OSError:
        return []
    if not stat.S_ISBLK(status.st_mode):
        real = os.path.realpath(path)
        users = [f"the file behind {node.path}" for node in enumerate_devices()
                 if node.file is not None and os.path.realpath(node.file) == real]
        return users + [f"written to by process {pid}" for pid in _lock_holders(status)]
    number = f"{os.major(status.st_rdev)}:{os.minor(status.st_rdev)}"
    sysfs = f"/sys/dev/block/{number}"
    users = [f"held by {holder}" for holder in _list_directory(f"{sysfs}/holders")]
    # A device that the driver makes has such a directory as well as those it runs on.
    if os.path.exists(f"{sysfs}/bcache") and not os.path.basename(os.path.realpath(sysfs)).startswith("bcache"):
        users.append("run by the kernel's bcache driver")
    for line in _lines("/proc/self/mountinfo"):
        fields = line.split()
        if fields[2] == number:
            users.append(f"mounted on {_unescape(fields[4])}")
    for line in _lines("/proc/swaps")[1:]:
        if os.path.realpath(_unescape(line.split()[0])) == os.path.realpath(path):
            users.append("used as swap")
    return list(dict.fromkeys(users))


def _lock_holders(status: os.stat_result) -> list[int]:
    # Other processes that hold the file's lock for writing, as engines and writing verbs do (`blockdev`).
    place = f"{os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}:{status.st_ino}"
    fields = [line.split() for line in _lines("/proc/locks")]
    found = [int(each[4]) for each in fields if each[1:4] == ["FLOCK", "ADVISORY", "WRITE"] and each[5] == place]
    return [pid for pid in found if pid != os.getpid()]


def _attribute(device: pyudev.Device, name: str) -> str | None:
    raw = device.attributes.get(name)
    return raw.decode("utf-8", "surrogateescape").removesuffix("\n") if raw is not None else None


def _list_directory(path: str) -> list[str]:
    try:
        return sorted(os.listdir(path))
    except OSError:
        return []


def _lines(path: str) -> list[str]:
    try:
        with open(path, encoding="utf-8", errors="surrogateescape") as file:
            return file.read().splitlines()
    except OSError:
        return []


def _unescape(word: str) -> str:
    # /proc writes blanks and backslashes in paths as three octal digits.
    pieces = word.split("\\")
    return pieces[0] + "".join(chr(int(piece[:3], 8)) + piece[3:] if piece[:3].isdigit() else "\\" + piece
                               for piece in pieces[1:])


def _natural(path: str) -> tuple[str, int]:
    name = path.rstrip("0123456789")
    return name, int(path[len(name):] or -1)
