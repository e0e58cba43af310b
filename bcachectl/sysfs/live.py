# SPDX-License-Identifier: GPL-2.0-only
"""Sets and devices that the kernel's driver runs, behind the interface that running engines have too.

`KernelSet` is a set; `KernelAlone` is a registered backing device that is in no set, because it was detached, never
attached, or waits for a set that is not there.  Both are a `LiveSet` (`bcachectl.control`): the target of a method is
"" or the name of a volume.

Lasting verbs are generators for `KernelJob`: they write one attribute, and look until the driver has done it.  Each
looks first at what the kernel would refuse without a reason, or do with an effect that nobody asked for.  Users of a
device node are not this module's business: the commands ask for them.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Generator
from typing import Any

from bcachectl.errors import BcachectlError, Refused, UsageError, WrongState
from bcachectl.snapshot import SetSnapshot, VolumeSnapshot
from bcachectl.sysfs.attributes import Attributes
from bcachectl.sysfs.job import KernelJob
from bcachectl.sysfs.look import Priorities, look, volume, volumes_of
from bcachectl.sysfs.tree import Node, Sysfs, absent, attribute, chosen, number, size, write

SOURCE = "kernel"
STUCK_S = 20.0
"""Without less dirty data for so long, a flush keeps new dirty data from coming."""

GC_OLD_S, GC_PATIENCE_S = 2, 10.0

Steps = Generator[None, None, Any]

_FULL_SPEED = {"writeback_delay": "0", "writeback_percent": "0", "writeback_running": "1"}
"""What makes writeback go on until nothing is dirty: no limit of its rate, no pause between two passes."""


class KernelSet:
    """A set that the kernel runs."""

    source = SOURCE

    def __init__(self, sysfs: Sysfs, uuid: str) -> None:
        self.sysfs = sysfs
        self.uuid = uuid
        self.directory = sysfs.set_directory(uuid)
        self._cache_directory = os.path.realpath(os.path.join(self.directory, "cache0"))
        self._priorities = Priorities(self.directory)

    @property
    def cache_path(self) -> str:
        """The device node of its cache device."""
        disk = self.sysfs.cache_disk(self.uuid)
        return self.sysfs.device_path(disk) if disk else ""

    def volumes(self) -> tuple[VolumeSnapshot, ...]:
        """Its volumes now."""
        return volumes_of(self.sysfs, self.uuid)

    def snapshot(self, cells: int) -> SetSnapshot:
        """The state as far as the kernel tells; it tells nothing of which bucket is where, so there is no map."""
        found = look(self.sysfs, self.uuid, self._priorities)
        if found is None:
            raise WrongState(f"the kernel does not run set {self.uuid} any more")
        return found

    def get(self, target: str, names: list[str]) -> dict[str, str]:
        """Attributes by name."""
        return self._attributes(target).get(names)

    def check(self, target: str, values: dict[str, str]) -> None:
        """Whether `set` would take the values."""
        self._attributes(target).check(values)

    def set(self, target: str, values: dict[str, str]) -> dict[str, str]:
        """Write attributes; what is stored then."""
        return self._attributes(target).set(values)

    def start(self, verb: str, **params: Any) -> KernelJob:
        """A job for one of the verbs of `LiveSet`, or ``unregister``."""
        steps = getattr(self, f"_do_{verb}", None)
        if steps is None:
            raise WrongState(f"the kernel's driver cannot tell `{verb}`; `bcachectl {verb} --cache DEVICE` reads it "
                             f"from the device, {self.cache_path}")
        return KernelJob(steps(**params))

    def wait_end(self, timeout_s: float) -> bool:
        """True once the kernel does not run it any more."""
        return KernelJob(self._until_gone()).wait(timeout_s)

    def close(self) -> None:
        """Nothing is held."""

    # Verbs.

    def _do_attach(self, volume: str, set: str) -> Steps:
        node = find_cached(self.sysfs, volume)
        if node.set_uuid is not None:
            raise WrongState(f"{node.name} is already attached, to set {node.set_uuid}")
        write(node.directory, "attach", set)
        while (now := _again(self.sysfs, node)).set_uuid is None or now.volume is None:
            yield
        return now.volume

    def _do_detach(self, volume: str) -> Steps:
        node = self._node(volume)
        if node.disk is None:
            raise WrongState(f"{volume} is a flash-only volume; it has no backing device to detach from the set")
        write(node.directory, "detach", "1")
        while (state := attribute(node.directory, "state")) != "no cache":
            if state is None:
                raise WrongState(f"{volume} was stopped while it was being detached")
            yield

    def _do_stop(self) -> Steps:
        # Volumes first: one that someone holds open keeps the set running, with its cache.
        for node in self._nodes():
            if node.disk is not None:
                write(node.directory, "stop", "1")
        while any(node.disk is not None for node in self._nodes()):
            yield
        write(self.directory, "stop", "1")
        yield from self._until_gone()

    def _do_unregister(self) -> Steps:
        write(self.directory, "unregister", "1")
        yield from self._until_gone()

    def _until_gone(self) -> Steps:
        # A set's directory goes first (super.c, cache_set_flush), its cache device's when the btree and the journal are
        # written (cache_set_free): before that, the same set cannot be registered again.  If it is, by udev perhaps,
        # the one that was to end has ended.
        yield from absent(self.directory)
        for _ in absent(self._cache_directory):
            if os.path.lexists(self.directory):
                return
            yield

    def _do_gc(self) -> Steps:
        # The end of a gc is told by the whole seconds since the last one, which fall then.  So one that has just ended
        # must be some seconds old before another is asked for; if none ever is, gc runs all the time.
        started = time.monotonic()
        while 0 <= (before_s := self._gc_ago_s()) < GC_OLD_S:
            if time.monotonic() - started > GC_PATIENCE_S:
                return
            yield
        write(self.directory, "internal/trigger_gc", "1")
        while not 0 <= self._gc_ago_s() < (before_s if before_s >= 0 else math.inf):
            yield

    def _do_flush(self, volume: str) -> Steps:
        node = self._node(volume)
        if node.disk is None:
            raise WrongState(f"{volume} is a flash-only volume; it has no backing device to be written back to")
        before = {name: attribute(node.directory, name) for name in _FULL_SPEED}
        mode = chosen(attribute(node.directory, "cache_mode"))
        changed: dict[str, str] = {}
        try:
            for name, value in _FULL_SPEED.items():
                old = before[name]
                if old is not None and old != value:
                    changed[name] = old
                    write(node.directory, name, value)
            lowest, since_s = math.inf, time.monotonic()
            while (state := attribute(node.directory, "state")) == "dirty":
                dirty = size(node.directory, "dirty_data") or 0
                if dirty < lowest:
                    lowest, since_s = dirty, time.monotonic()
                elif time.monotonic() - since_s > STUCK_S and mode == "writeback" and "cache_mode" not in changed:
                    changed["cache_mode"] = mode
                    write(node.directory, "cache_mode", "writethrough")
                yield
        finally:
            _restore(node.directory, changed)
        if state != "clean":
            raise WrongState(f"{volume} could not be written back: " + ("it was stopped" if state is None else
                                                                       f"its state is {state}"))

    def _do_volume_create(self, size: int | str) -> Steps:
        size_bytes = int(size)
        block_bytes = self._block_bytes()
        usable = size_bytes - size_bytes % block_bytes
        if usable <= 0:
            raise Refused(f"a volume of {size_bytes} bytes is smaller than a block of {block_bytes} bytes; the kernel "
                          "would fail, and leave an entry that keeps later volumes from starting")
        before = {node.name for node in self._nodes()}
        write(self.directory, "flash_vol_create", str(usable))
        while True:
            for node in self._nodes():
                if node.disk is None and node.name not in before:
                    return node.name
            yield

    def _do_volume_remove(self, volume: str) -> Steps:
        node = self._node(volume)
        if node.disk is not None:
            raise WrongState(f"{volume} is a cached device, not a flash-only volume; `detach` takes it out of the set")
        write(node.directory, "unregister", "1")
        yield from absent(self.sysfs.path(f"class/block/{volume}"))

    def _do_volume_stop(self, volume: str) -> Steps:
        yield from _stop(self.sysfs, self._node(volume))

    def _gc_ago_s(self) -> int:
        ago_s = number(self.directory, "internal/btree_gc_last_sec")
        if ago_s is None:
            raise WrongState(f"the kernel does not run set {self.uuid} any more")
        return ago_s

    def _block_bytes(self) -> int:
        return size(self.directory, "block_size") or 4096

    def _nodes(self) -> list[Node]:
        return [node for node in self.sysfs.nodes() if node.set_uuid == self.uuid]

    def _node(self, name: str) -> Node:
        for node in self._nodes():
            if node.name == name:
                return node
        raise WrongState(f"{name} is no volume of set {self.uuid}")

    def _attributes(self, target: str) -> Attributes:
        if not target:
            return Attributes(self.directory, "set")
        node = self._node(target)
        return Attributes(node.directory, "volume" if node.disk else "flash")


class KernelAlone:
    """A backing device that the kernel has and that is in no set; its only target is its own name."""

    source = SOURCE
    cache_path = ""

    def __init__(self, sysfs: Sysfs, node: Node) -> None:
        self.sysfs = sysfs
        self.node = node
        self.uuid = ""

    @property
    def story(self) -> str:
        """Why it is alone."""
        if self.node.volume is None:
            state = attribute(self.node.directory, "state")
            return f"{self.node.disk} waits for its cache set (state {state}); `bcachectl run` would start it without"
        return f"{self.node.volume} runs on {self.node.disk} without a cache"

    def volumes(self) -> tuple[VolumeSnapshot, ...]:
        """Itself."""
        return (volume(self.sysfs, self.node),)

    def snapshot(self, cells: int) -> SetSnapshot:
        """There is no set to look at: WrongState."""
        raise WrongState(f"{self.story}; `bcachectl get {self.node.name}` shows its attributes")

    def get(self, target: str, names: list[str]) -> dict[str, str]:
        """Attributes by name."""
        return Attributes(self.node.directory, "volume").get(names)

    def check(self, target: str, values: dict[str, str]) -> None:
        """Whether `set` would take the values."""
        Attributes(self.node.directory, "volume").check(values)

    def set(self, target: str, values: dict[str, str]) -> dict[str, str]:
        """Write attributes; what is stored then."""
        return Attributes(self.node.directory, "volume").set(values)

    def start(self, verb: str, **params: Any) -> KernelJob:
        """Only ``volume_stop`` and ``run`` are possible without a set."""
        if verb == "volume_stop":
            return KernelJob(_stop(self.sysfs, self.node))
        if verb == "run":
            return KernelJob(self._run())
        if verb == "detach":
            raise WrongState(f"{self.node.name} is not attached to a set")
        raise WrongState(f"{self.story}; it has no set for `{verb}`")

    def wait_end(self, timeout_s: float) -> bool:
        """True once the driver has let go of the device."""
        return KernelJob(absent(self.node.directory)).wait(timeout_s)

    def close(self) -> None:
        """Nothing is held."""

    def _run(self) -> Steps:
        if self.node.volume is not None:
            raise WrongState(f"{self.node.disk} runs already, as {self.node.volume}")
        write(self.node.directory, "running", "1")
        while (now := _again(self.sysfs, self.node)).volume is None:
            yield
        return now.volume


def kernel_sets(sysfs: Sysfs) -> list[KernelSet]:
    """Every set that the kernel runs, by uuid."""
    return [KernelSet(sysfs, uuid) for uuid in sysfs.set_uuids()]


def kernel_alone(sysfs: Sysfs) -> list[KernelAlone]:
    """Every registered backing device that is in no set."""
    return [KernelAlone(sysfs, node) for node in sysfs.nodes() if node.set_uuid is None and node.disk is not None]


def find_cached(sysfs: Sysfs, text: str) -> Node:
    """The registered backing device that a person means: by its or its volume's name, path, uuid or label."""
    sysfs.require_driver()
    found = [node for node in sysfs.nodes() if node.disk is not None and text != "" and _is_meant(sysfs, node, text)]
    if len(found) > 1:
        raise UsageError(f"{text} could be {' or '.join(node.name for node in found)}")
    if not found:
        raise WrongState(f"{text}: the kernel has no such backing device; `bcachectl register DEVICE` gives it one")
    return found[0]


def _is_meant(sysfs: Sysfs, node: Node, text: str) -> bool:
    names = [node.volume, node.disk, attribute(node.directory, "label"),
             attribute(node.directory, "backing_dev_uuid")]
    paths = [sysfs.device_path(name) for name in (node.volume, node.disk) if name]
    return text in names or text.lower() == names[-1] or any(_same_device(text, path) for path in paths)


def _same_device(one: str, other: str) -> bool:
    try:
        return os.path.samefile(one, other)
    except OSError:
        return False


def _again(sysfs: Sysfs, node: Node) -> Node:
    for now in sysfs.nodes():
        if now.directory == node.directory:
            return now
    raise WrongState(f"{node.name} was stopped meanwhile")


def _stop(sysfs: Sysfs, node: Node) -> Steps:
    if node.disk is None:
        raise WrongState(f"{node.name} is a flash-only volume, which ends with its set; `volume remove` deletes it "
                         "and its data")
    write(node.directory, "stop", "1")
    yield from absent(node.directory)
    if node.volume is not None:
        yield from absent(sysfs.path(f"class/block/{node.volume}"))


def _restore(directory: str, values: dict[str, str]) -> None:
    # Whatever happens to one, the others are put back; a device that is gone took its values with it.
    failed: BcachectlError | None = None
    for name, value in reversed(values.items()):
        try:
            if os.path.exists(directory):
                write(directory, name, value)
        except BcachectlError as error:
            failed = error
    if failed is not None:
        raise failed
