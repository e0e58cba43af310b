# SPDX-License-Identifier: GPL-2.0-only
"""Running cache sets as commands see them, and the client's side of an engine's control socket.

A `LiveSet` is a set that runs somewhere: in an engine of ours (`EngineSet`) or in the kernel's driver
(`bcachectl.sysfs.live`).  Commands know only this interface.  `find` takes what a person writes to the one that is
meant; where an engine and the kernel both could be, ``driver`` says which.

The protocol, version `PROTOCOL`: JSON lines over a Unix socket, one socket per engine, ``<set uuid>.sock``.

1. The engine greets: ``{"bcachectl": 1, "version": ..., "set": uuid, "pid": n}``.
2. The client asks: ``{"id": n, "method": ..., "params": {...}}``; it may ask again before it has an answer.
3. The engine answers in the order in which things end: ``{"id": n, "result": ...}`` or
   ``{"id": n, "error": {"status": exit status, "message": sentence}}``.

A request line has at most `MAX_REQUEST_BYTES`, an answer at most `MAX_ANSWER_BYTES`.
"""

from __future__ import annotations

import json
import os
import socket
import tempfile
import time
from typing import Any, NamedTuple, Protocol

from bcachectl.errors import BcachectlError, Refused, UsageError, WrongState
from bcachectl.snapshot import SetSnapshot, VolumeSnapshot, from_json
from bcachectl.sysfs.live import KernelAlone, find_cached, kernel_alone, kernel_sets
from bcachectl.sysfs.tree import Sysfs
from bcachectl.units import format_uuid, parse_uuid

PROTOCOL = 1
MAX_REQUEST_BYTES = 64 << 10
MAX_ANSWER_BYTES = 16 << 20
ANSWER_TIMEOUT_S = 30.0
"""How long a request that does no work may take before the engine counts as stuck."""

GREETING_TIMEOUT_S = 2.0
SHARED_DIR = "/run/bcachectl"
"""Where the engines of root have their sockets."""

ENGINE, KERNEL = "engine", "kernel"
"""Who may run a set: the ``source`` of a `LiveSet`, and what ``--engine`` and ``--kernel`` ask for."""

MIN_PREFIX = 8
"""Characters of a set's uuid that name it, at least."""

_ERRORS: dict[int, type[BcachectlError]] = {2: UsageError, 3: Refused, 4: WrongState}


class Job(Protocol):
    """Work that was started and may last: gc, a flush, a detach."""

    result: Any

    def wait(self, timeout_s: float) -> bool:
        """True once it has ended, with its ``result``; raises what it ended with."""
        ...

    def close(self) -> None:
        """Wait no more; what was changed only for the wait is put back."""
        ...


class LiveSet(Protocol):
    """A set that runs, whoever runs it.  A target is "" for the set itself or the name of one of its volumes.

    A backing device that the kernel has without a set is one as well, with an empty ``uuid``.
    """

    uuid: str

    @property
    def source(self) -> str:
        """Who runs it: `ENGINE` or `KERNEL`."""
        ...

    @property
    def cache_path(self) -> str:
        """Its cache device."""
        ...

    def volumes(self) -> tuple[VolumeSnapshot, ...]:
        """Its volumes, for as little work as that takes."""
        ...

    def snapshot(self, cells: int) -> SetSnapshot:
        """The state now, with a map of all buckets in ``cells`` cells (0: none)."""
        ...

    def get(self, target: str, names: list[str]) -> dict[str, str]:
        """Tunables and attributes by the kernel's names; all of the target's if ``names`` is empty."""
        ...

    def check(self, target: str, values: dict[str, str]) -> None:
        """Raise what `set` would raise, and set nothing."""
        ...

    def set(self, target: str, values: dict[str, str]) -> dict[str, str]:
        """Set tunables and give what was stored; nothing is set if a name or a value is wrong."""
        ...

    def start(self, verb: str, **params: Any) -> Job:
        """Begin ``attach``, ``detach``, ``stop``, ``gc``, ``flush``, ``where``, ``volume_create`` or ``_remove``."""
        ...

    def wait_end(self, timeout_s: float) -> bool:
        """True once the set does not run any more."""
        ...

    def close(self) -> None:
        """Let go of it; the set runs on."""
        ...


class Found(NamedTuple):
    """What a SET or VOLUME argument names: a set, and the name of a volume in it, or "" for the set."""

    live: LiveSet
    target: str


class EngineJob:
    """A request that an engine has not answered yet."""

    def __init__(self, engine: EngineSet, number: int) -> None:
        self.engine = engine
        self.number = number
        self.result: Any = None

    def wait(self, timeout_s: float) -> bool:
        """True once the answer is here (``result``); raises the engine's error as this program's own."""
        answer = self.engine.receive(self.number, timeout_s)
        if answer is None:
            return False
        if "error" in answer:
            error = answer["error"]
            raise _ERRORS.get(int(error["status"]), BcachectlError)(str(error["message"]))
        self.result = answer.get("result")
        return True

    def close(self) -> None:
        """Nothing was changed for the wait; the engine goes on."""


class EngineSet:
    """A set that an engine runs, over its control socket."""

    source = ENGINE

    def __init__(self, path: str) -> None:
        """Connect and read the greeting; WrongState if nobody answers there."""
        self.path = path
        self._buffer = bytearray()
        self._answers: dict[int, dict[str, Any]] = {}
        self._last_number = 0
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.settimeout(GREETING_TIMEOUT_S)
        try:
            self._socket.connect(path)
            greeting = self._read_line(GREETING_TIMEOUT_S)
        except OSError as error:
            self._socket.close()
            raise WrongState(f"{path}: no engine answers there ({error.strerror or error})") from None
        except BcachectlError:
            self._socket.close()
            raise
        if greeting is None or greeting.get("bcachectl") != PROTOCOL:
            self._socket.close()
            spoken = "nothing" if greeting is None else f"version {greeting.get('bcachectl')!r}"
            raise WrongState(f"{path}: the engine speaks {spoken}, this program version {PROTOCOL}; "
                             "use the same release")
        self.uuid = str(greeting["set"])
        self.pid = int(greeting["pid"])
        self.version = str(greeting["version"])

    def snapshot(self, cells: int) -> SetSnapshot:
        """The state now, with a map in ``cells`` cells."""
        return from_json(SetSnapshot, self.call("snapshot", cells=cells))

    @property
    def cache_path(self) -> str:
        """The cache device that the engine has open."""
        return self.snapshot(0).cache_path

    def volumes(self) -> tuple[VolumeSnapshot, ...]:
        """The engine's volumes."""
        return self.snapshot(0).volumes

    def places(self) -> dict[str, dict[str, str | None]]:
        """By volume: the ``device`` and the ``uri`` where the engine exports it."""
        return {place["volume"]: place for place in self.call("places")}

    def get(self, target: str, names: list[str]) -> dict[str, str]:
        """Attributes by name."""
        values: dict[str, str] = self.call("get", target=target, names=names)
        return values

    def check(self, target: str, values: dict[str, str]) -> None:
        """Whether the engine would take the values."""
        self.call("check", target=target, values=values)

    def set(self, target: str, values: dict[str, str]) -> dict[str, str]:
        """Set attributes; what was stored."""
        stored: dict[str, str] = self.call("set", target=target, values=values)
        return stored

    def call(self, method: str, **params: Any) -> Any:
        """Ask and wait for the answer of a method that does no lasting work."""
        job = self.start(method, **params)
        if not job.wait(ANSWER_TIMEOUT_S):
            raise WrongState(f"the engine of set {self.uuid} (pid {self.pid}) has not answered "
                             f"for {ANSWER_TIMEOUT_S:.0f} s")
        return job.result

    def start(self, verb: str, **params: Any) -> EngineJob:
        """Ask, and do not wait."""
        self._last_number += 1
        line = json.dumps({"id": self._last_number, "method": verb, "params": params}).encode() + b"\n"
        if len(line) > MAX_REQUEST_BYTES:
            raise UsageError(f"the request is longer than {MAX_REQUEST_BYTES} bytes")
        try:
            self._socket.settimeout(ANSWER_TIMEOUT_S)
            self._socket.sendall(line)
        except OSError as error:
            raise self._gone(error) from None
        return EngineJob(self, self._last_number)

    def receive(self, number: int, timeout_s: float) -> dict[str, Any] | None:
        """The answer to request ``number``, or None if it does not come in time; answers to others are kept."""
        deadline_s = time.monotonic() + timeout_s
        while number not in self._answers:
            try:
                answer = self._read_line(max(0.0, deadline_s - time.monotonic()))
            except OSError as error:
                raise self._gone(error) from None
            if answer is None:
                return None
            if answer.get("id") is None:
                raise BcachectlError(str(answer.get("error", {}).get("message", "the engine did not understand")))
            self._answers[int(answer["id"])] = answer
        return self._answers.pop(number)

    def wait_end(self, timeout_s: float) -> bool:
        """True once the engine has closed the connection: it has ended, or nearly so."""
        deadline_s = time.monotonic() + timeout_s
        try:
            while time.monotonic() < deadline_s:
                self._read_line(max(0.001, deadline_s - time.monotonic()))
        except OSError:
            return True
        return False

    def close(self) -> None:
        """Disconnect."""
        self._socket.close()

    def _gone(self, error: OSError) -> WrongState:
        return WrongState(f"the engine of set {self.uuid} (pid {self.pid}) has ended ({error.strerror or error})")

    def _read_line(self, timeout_s: float) -> dict[str, Any] | None:
        # One line as JSON, None if none is complete in time; ConnectionResetError when the engine is gone.
        deadline_s = time.monotonic() + timeout_s
        while (end := self._buffer.find(b"\n")) < 0:
            if len(self._buffer) > MAX_ANSWER_BYTES:
                raise BcachectlError(f"{self.path}: an answer is longer than {MAX_ANSWER_BYTES} bytes")
            self._socket.settimeout(max(0.001, deadline_s - time.monotonic()))
            try:
                data = self._socket.recv(1 << 18)
            except TimeoutError:
                return None
            if not data:
                raise ConnectionResetError(104, "connection closed")
            self._buffer += data
        line = bytes(self._buffer[:end])
        del self._buffer[:end + 1]
        try:
            answer = json.loads(line)
        except ValueError:
            raise BcachectlError(f"{self.path}: the engine sent something that is not JSON") from None
        if not isinstance(answer, dict):
            raise BcachectlError(f"{self.path}: the engine sent something that is not an answer")
        return answer


def socket_dirs() -> list[str]:
    """Where engines of this user (and, for all to see, of root) have their sockets, the preferred place first."""
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    if runtime:
        return [os.path.join(runtime, "bcachectl"), SHARED_DIR]
    if os.geteuid() == 0:
        return [SHARED_DIR]
    return [os.path.join(tempfile.gettempdir(), f"bcachectl-{os.geteuid()}"), SHARED_DIR]


def socket_path(set_uuid: str) -> str:
    """Where the engine of this set listens; makes the directory, readable by its owner only."""
    directory = socket_dirs()[0]
    os.makedirs(directory, mode=0o700, exist_ok=True)
    status = os.lstat(directory)
    if status.st_uid != os.geteuid():
        raise Refused(f"{directory} belongs to another user (uid {status.st_uid}); "
                      "set XDG_RUNTIME_DIR to a directory of yours")
    return os.path.join(directory, f"{set_uuid}.sock")


def engines() -> list[EngineSet]:
    """Every engine that runs here and lets this user in, by set uuid; leftover sockets are passed over."""
    found: dict[str, EngineSet] = {}
    for directory in socket_dirs():
        for path in _sockets(directory):
            try:
                engine = EngineSet(path)
            except BcachectlError:
                continue
            if engine.uuid in found:
                engine.close()
            else:
                found[engine.uuid] = engine
    return [found[uuid] for uuid in sorted(found)]


def _sockets(directory: str) -> list[str]:
    try:
        return [os.path.join(directory, name) for name in sorted(os.listdir(directory)) if name.endswith(".sock")]
    except OSError:
        return []


def _is_listened_to(path: str) -> bool:
    # The kernel accepts for a process that is stopped, too.
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as asking:
        asking.settimeout(GREETING_TIMEOUT_S)
        try:
            asking.connect(path)
        except OSError:
            return False
    return True


def running(driver: str | None = None) -> list[LiveSet]:
    """Every set that runs here, engines first; only those of one ``driver`` if it is given."""
    found: list[LiveSet] = []
    if driver != KERNEL:
        found += engines()
    if driver != ENGINE:
        found += kernel_sets(Sysfs())
    return found


def alone() -> list[KernelAlone]:
    """The backing devices that the kernel has without a set."""
    return kernel_alone(Sysfs())


def find_cached_alone(text: str) -> KernelAlone:
    """The backing device of that name that the kernel has and that waits for its set; WrongState if it runs."""
    sysfs = Sysfs()
    node = find_cached(sysfs, text)
    if node.volume is not None:
        raise WrongState(f"{text}: runs already, as {node.volume}"
                         + (f" of set {node.set_uuid}" if node.set_uuid else " without a cache"))
    return KernelAlone(sysfs, node)


def find(text: str | None, driver: str | None = None) -> Found:
    """The running set or volume that a person means; None means the only set that runs.

    A set goes by its uuid, a prefix of it or its cache device, a volume by name, uuid, label or backing device; of the
    kernel's also by its device node, and without a set.  Raises WrongState if nothing of that name runs, UsageError if
    it could be several.
    """
    there = running(driver)
    if text is None:
        if len(there) == 1:
            return Found(there[0], "")
        _close_all(there)
        if there:
            raise UsageError("several sets run here, name one: " + ", ".join(map(_name, there)))
        raise WrongState(f"{_nothing_runs(driver)}; {_how_to_start(driver)}")
    matches = [Found(live, target) for live in there for target in _targets(live, text)]
    if driver != ENGINE:
        matches += [Found(lone, target) for lone in alone() for target in _targets(lone, text)]
    kept = [match.live for match in matches[:1]] if len(matches) == 1 else []
    _close_all([live for live in there if live not in kept])
    if len(matches) == 1:
        return matches[0]
    if matches:
        names = ", ".join(f"{match.target or 'set'} of {_name(match.live)}" for match in matches)
        which = "--kernel or --engine" if len({match.live.source for match in matches}) > 1 else "a uuid"
        raise UsageError(f"{text} could be several things, use {which}: {names}")
    raise WrongState(_why_unknown(text, there, driver))


def find_set(text: str | None, driver: str | None = None) -> LiveSet:
    """The running set that a person means; a volume stands for its set."""
    found = find(text, driver)
    if not found.live.uuid:
        raise WrongState(f"{text}: the kernel has it without a set")
    return found.live


def find_volume(text: str, driver: str | None = None) -> Found:
    """The running volume that a person means; a set stands for its volume if it has just one, else UsageError."""
    found = find(text, driver)
    if found.target:
        return found
    volumes = found.live.volumes()
    if len(volumes) == 1:
        return Found(found.live, volumes[0].name)
    found.live.close()
    names = ", ".join(volume.name for volume in volumes) or "none"
    raise UsageError(f"{text} is a set; name one of its volumes: {names}")


def parse_set_uuid(text: str) -> str:
    """The uuid that an ``attach`` names, in its usual spelling: any case, dashes or none.

    The kernel takes the first 32 digits and ignores what follows (sysfs.c, STORE(__cached_dev)); a typing mistake would
    attach to a set nobody named.  Here it is a UsageError that says what is wrong.
    """
    word = text.strip().lower()
    digits = word.replace("-", "")
    strange = sorted({character for character in digits if character not in "0123456789abcdef"})
    if not strange and len(digits) == 32:
        return format_uuid(parse_uuid(digits))
    head = word[:36]
    try:
        complete = format_uuid(parse_uuid(head))
    except UsageError:
        complete = ""
    if complete:
        raise UsageError(f"{text.strip()!r}: text follows the uuid {complete}; leave {word[36:]!r} out")
    if strange:
        raise UsageError(f"{text.strip()!r} is not a uuid: {''.join(strange)!r} is no hexadecimal digit")
    raise UsageError(f"{text.strip()!r} is not a uuid: {len(digits)} hexadecimal digits instead of 32")


def looks_like_uuid(text: str) -> bool:
    """Whether a person who wrote this meant a whole uuid, right or wrong, and not a prefix or a path."""
    digits = 0
    for character in text.strip().lower():
        if character in "0123456789abcdef":
            digits += 1
        elif character != "-":
            break
    return digits >= 32 and not os.path.exists(text)


def match_volume(volumes: tuple[VolumeSnapshot, ...], text: str) -> list[str]:
    """Names of the volumes that ``text`` means: by name, uuid, label, backing device or device node."""
    folded = text.strip().lower()
    names = []
    for volume in volumes:
        is_name = text in (volume.name, volume.label) and text != ""
        paths = (volume.backing_path, volume.device_path)
        if is_name or folded == volume.uuid or any(path and is_same_file(text, path) for path in paths):
            names.append(volume.name)
    return names


def is_same_file(one: str, other: str) -> bool:
    """Whether two paths name one file or one block device."""
    try:
        there, here = os.stat(one), os.stat(other)
    except OSError:
        return False
    if there.st_rdev or here.st_rdev:
        return there.st_rdev == here.st_rdev
    return (there.st_dev, there.st_ino) == (here.st_dev, here.st_ino)


def _targets(live: LiveSet, text: str) -> list[str]:
    folded = text.strip().lower()
    if live.uuid:
        if folded == live.uuid or (len(folded) >= MIN_PREFIX and live.uuid.startswith(folded)):
            return [""]
        if len(folded) == 32 and folded == live.uuid.replace("-", ""):
            return [""]
    try:
        if is_same_file(text, live.cache_path):
            return [""]
        return match_volume(live.volumes(), text)
    except BcachectlError:
        return []


def _name(live: LiveSet) -> str:
    if not live.uuid:
        return "no set, of the kernel"
    return live.uuid if live.source == ENGINE else f"{live.uuid} (kernel)"


def no_engine() -> str:
    """That no engine runs here, as far as this user may know: one that does not answer is told apart."""
    silent = [path for directory in socket_dirs() for path in _sockets(directory) if _is_listened_to(path)]
    if silent:
        return f"an engine listens at {silent[0]} and does not answer (it is stopped, or stuck on a device)"
    try:
        os.listdir(SHARED_DIR)
    except PermissionError:
        return f"no engine of yours runs here (those of root are in {SHARED_DIR}, which is not yours to read)"
    except OSError:
        pass
    return "no engine runs here"


def _nothing_runs(driver: str | None) -> str:
    kernel = "the kernel's driver runs no set" if Sysfs().is_loaded else "the kernel has no bcache driver"
    return kernel if driver == KERNEL else no_engine() + ("" if driver == ENGINE else f", and {kernel}")


def _how_to_start(driver: str | None) -> str:
    engine = "`bcachectl engine run` starts one"
    kernel = "`bcachectl register DEVICE` gives it devices" if Sysfs().is_loaded else "`modprobe bcache` loads it"
    return kernel if driver == KERNEL else engine if driver == ENGINE else f"{engine}, {kernel}"


def _why_unknown(text: str, there: list[LiveSet], driver: str | None) -> str:
    if not there:
        return f"{text or repr(text)}: {_nothing_runs(driver)}; {_how_to_start(driver)}"
    names = ", ".join(map(_name, there))
    if 0 < len(text) < MIN_PREFIX and any(live.uuid.startswith(text.lower()) for live in there):
        return (f"{text}: is too short for a set, which takes {MIN_PREFIX} characters of its uuid or more (sets that "
                f"run: {names})")
    if os.path.exists(text):
        return f"{text}: no running set uses this device (sets that run: {names})"
    return f"{text or repr(text)}: neither a running set nor one of its volumes (sets that run: {names})"


def _close_all(there: list[LiveSet]) -> None:
    for live in there:
        live.close()
