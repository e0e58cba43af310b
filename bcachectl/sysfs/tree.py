# SPDX-License-Identifier: GPL-2.0-only
"""The kernel's driver as a tree of files: which sets and devices it runs, and its attributes read and written.

`Sysfs` finds things; `attribute`, `number` and `size` read, `write` writes.  What is where (super.c, sysfs.c)::

    /sys/fs/bcache/register                    a device's path, written there, is given to the driver
    /sys/fs/bcache/<set uuid>/                 a set; internal/, cache0/ and stats_total/ ... below it
    /sys/class/block/<disk>/bcache/            a backing device (it has `running`) or a cache device
    /sys/class/block/bcacheN/bcache/           the backing device's directory again, or a flash-only volume (`size`)

A backing device whose set is not there has no bcacheN; one that is detached has no ``cache`` link.  Everything may go
away between two looks, so what cannot be read is None, as is what an older or a newer kernel does not have.

The kernel clamps what is out of range with success, and says little more than EINVAL otherwise.  `write` adds what
is known about the attribute and what the kernel's log said meanwhile.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Generator
from dataclasses import dataclass, field

from bcachectl.errors import DeviceError, UsageError, WrongState
from bcachectl.units import parse_hprint

ROOT = "/sys"
DEV = "/dev"
KMSG = "/dev/kmsg"
UUID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
LOG_BYTES = 8192

_REASONS: dict[tuple[str, int], str] = {
    ("attach", errno.ENOENT): "no set of this uuid runs, or the set knows nothing of this device, whose state is dirty",
    ("attach", errno.EINVAL): "it may be attached already, have smaller blocks than the set, or find no free slot",
    ("running", errno.EBUSY): "it runs already",
    ("flash_vol_create", errno.ENOMEM): "the kernel could not make a device of that size",
}
"""What an errno means for one attribute, beyond the system's own word (sysfs specification, 6.1 and 8.3)."""

_GENERAL = {errno.EINVAL: "that is no value it takes", errno.ERANGE: "the number is larger than 2^64 - 1",
            errno.EBUSY: "the system is going down, or the device is in use"}


@dataclass(frozen=True, slots=True)
class Node:
    """A device that the driver runs on or makes.

    ``disk`` is the backing device's name (None: a flash-only volume), ``volume`` is bcacheN (None: it does not run),
    ``slot`` its place in the uuid array of the set ``set_uuid``, while it is attached.
    """

    directory: str
    disk: str | None
    volume: str | None
    set_uuid: str | None = None
    slot: int | None = None

    @property
    def name(self) -> str:
        """What it is called: bcacheN, or its backing device until it runs."""
        return self.volume or self.disk or ""


@dataclass(frozen=True, slots=True)
class Sysfs:
    """The driver's files below ``root``, the device nodes below ``dev``."""

    root: str = field(default_factory=lambda: ROOT)
    dev: str = field(default_factory=lambda: DEV)

    @property
    def is_loaded(self) -> bool:
        """Whether the kernel has the driver."""
        return os.path.exists(self.path("fs/bcache/register"))

    def path(self, name: str) -> str:
        """A file below the root."""
        return os.path.join(self.root, name)

    def device_path(self, name: str) -> str:
        """The device node of a block device of sysfs, where a slash of the name is an exclamation mark."""
        return os.path.join(self.dev, name.replace("!", "/"))

    def set_uuids(self) -> list[str]:
        """The sets that run."""
        return sorted(name for name in listing(self.path("fs/bcache")) if UUID.fullmatch(name))

    def set_directory(self, uuid: str) -> str:
        """Where a set's attributes are."""
        return self.path(f"fs/bcache/{uuid}")

    def cache_disk(self, uuid: str) -> str | None:
        """The name of a set's cache device; there is one since 5.10."""
        link = os.path.join(self.set_directory(uuid), "cache0")
        return _owner(link) if os.path.isdir(link) else None

    def nodes(self) -> list[Node]:
        """Every backing device that is registered, and every flash-only volume, in the order of their names."""
        found = []
        for name in sorted(listing(self.path("class/block")), key=_natural):
            link = self.path(f"class/block/{name}/bcache")
            if not os.path.isdir(link):
                continue
            if os.path.exists(os.path.join(link, "running")) and _owner(link) == name:
                found.append(self._cached(name, os.path.realpath(link)))
            elif os.path.exists(os.path.join(link, "size")) and _owner(link) == name:
                found.append(self._placed(Node(os.path.realpath(link), None, name)))
        return sorted(found, key=lambda node: _natural(node.name))

    def _cached(self, disk: str, directory: str) -> Node:
        link = os.path.join(directory, "dev")
        volume = os.path.basename(os.path.realpath(link)) if os.path.exists(link) else None
        return self._placed(Node(directory, disk, volume))

    def _placed(self, node: Node) -> Node:
        link = os.path.join(node.directory, "cache")
        uuid = os.path.basename(os.path.realpath(link)) if os.path.exists(link) else ""
        if not UUID.fullmatch(uuid):
            return node
        slot = None
        for name in listing(self.set_directory(uuid)):
            place = re.fullmatch(r"(?:bdev|volume)(\d+)", name)
            if place and os.path.realpath(os.path.join(self.set_directory(uuid), name)) == node.directory:
                slot = int(place[1])
        return Node(node.directory, node.disk, node.volume, uuid, slot)

    def require_driver(self) -> None:
        """WrongState if the kernel has no such driver."""
        if not self.is_loaded:
            raise WrongState("the kernel has no bcache driver; `modprobe bcache` loads it")

    def register(self, path: str) -> None:
        """Give a device to the driver; DeviceError with what its log said if it refuses."""
        self.require_driver()
        write(self.path("fs/bcache"), "register", path)


class KernelLog:
    """What the kernel's log says about bcache from now on; nothing where the log cannot be read."""

    def __init__(self) -> None:
        try:
            self._fd = os.open(KMSG, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
            os.lseek(self._fd, 0, os.SEEK_END)
        except OSError:
            self._fd = -1

    def lines(self) -> list[str]:
        """The new messages, without what stands before the text; closes the log."""
        found: list[str] = []
        while self._fd >= 0:
            try:
                record = os.read(self._fd, LOG_BYTES)
            except BrokenPipeError:
                continue   # Records were overwritten before they were read.
            except OSError:
                break
            if not record:
                break
            for line in record.decode(errors="replace").splitlines():
                text = line.partition(";")[2]
                if text.startswith("bcache: "):
                    found.append(re.sub(r"^bcache: (\w+\(\) )?(error : )?", "", text).strip())
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
        return found


def listing(directory: str) -> list[str]:
    """Names in a directory; none if there is none."""
    try:
        return os.listdir(directory)
    except OSError:
        return []


def read_text(path: str) -> str:
    """The content of an attribute."""
    with open(path, encoding="utf-8", errors="surrogateescape") as file:
        return file.read()


def write_text(path: str, text: str) -> None:
    """Write an attribute in one piece, as the kernel wants it."""
    fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(fd, text.encode("utf-8", "surrogateescape"))
    finally:
        os.close(fd)


def attribute(directory: str, name: str) -> str | None:
    """The text of an attribute without the newlines at its end; None if there is none, or not for this user."""
    try:
        return read_text(os.path.join(directory, name)).rstrip("\n")
    except OSError:
        return None


def number(directory: str, name: str) -> int | None:
    """An attribute that is a plain number; None for anything else."""
    text = attribute(directory, name)
    try:
        return int(text) if text is not None else None
    except ValueError:
        return None


def size(directory: str, name: str) -> int | None:
    """An attribute that is a size as the kernel prints it: the least number of bytes that it may stand for."""
    text = attribute(directory, name)
    try:
        return parse_hprint(text)[0] if text is not None else None
    except UsageError:
        return None


def sectors(directory: str, name: str) -> int | None:
    """The same in sectors."""
    found = size(directory, name)
    return None if found is None else found >> 9


def chosen(text: str | None) -> str | None:
    """The word in brackets of a list, ``writethrough [writeback] none``."""
    found = re.search(r"\[([^\[\]]*)\]", text or "")
    return found[1] if found else None


def write(directory: str, name: str, text: str) -> None:
    """Write an attribute; DeviceError with the attribute, the value, the errno and what is known of the reason."""
    log = KernelLog()
    try:
        write_text(os.path.join(directory, name), text)
    except OSError as error:
        raise _refused(os.path.join(directory, name), text, error, log.lines()) from error
    log.lines()


def _refused(path: str, text: str, error: OSError, said: list[str]) -> DeviceError:
    name = os.path.basename(path)
    code = error.errno or 0
    if code in (errno.EACCES, errno.EPERM) and os.geteuid() != 0:
        reason = "only root may write it"
    elif code == errno.EACCES:
        reason = "it can only be read"
    elif code == errno.ENOENT and not os.path.exists(path):
        reason = "it is not there (any more)"
    else:
        reason = _REASONS.get((name, code)) or _GENERAL.get(code, "")
    if said:
        reason = f"the kernel says: {'; '.join(said)}"
    number_text = errno.errorcode.get(code, str(code))
    return DeviceError(f"{path}: writing {text!r} failed, {error.strerror} ({number_text})"
                       + (f": {reason}" if reason else ""), errno=code)


def absent(path: str) -> Generator[None, None, None]:
    """Look until a path is gone: a step of a `KernelJob`."""
    while os.path.lexists(path):
        yield


def _owner(link: str) -> str:
    # The block device that a ``bcache`` directory, or a link to one, belongs to.
    return os.path.basename(os.path.dirname(os.path.realpath(link)))


def _natural(name: str) -> tuple[str, int]:
    head = name.rstrip("0123456789")
    return head, int(name[len(head):] or -1)
