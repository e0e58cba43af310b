# SPDX-License-Identifier: GPL-2.0-only
"""`Plan`: the writes that an offline verb is about to make, as data: printed by ``--dry-run``, applied, and taken back.

A plan is made while nothing is written, so that every refusal comes first.  Its life:

1. A verb collects `Write`s in `Plan.steps`, in an order that leaves nothing half-valid if it stops after any of them;
   what makes the result valid (a superblock) is in the last step.  Between two steps every device is flushed.
2. `save_undo` keeps the bytes that are about to go in an undo file, which is durable before `apply` starts.
3. `apply` writes.  `apply_with_undo` does both, and names the undo file if the writes do not come to their end.
4. `read_undo` and `undo_plan` make the plan that takes it back.  A device that has changed since is refused.

An undo file is one line of JSON (`UNDO_SCHEMA`, the verb, one entry a write with its device, place, length and the
SHA-256 of the bytes before and after, and the CRC-32 of each sector after), a newline, and the old bytes one behind the
other.  A write that was interrupted leaves some of its sectors old and some new: that counts as unchanged.
"""

from __future__ import annotations

import base64
import errno
import hashlib
import json
import os
import sys
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

from bcachectl.blockdev import BlockDevice
from bcachectl.errors import BcachectlError, DeviceError, Refused

UNDO_SCHEMA = 1
UNDO_HEADER_MAX_BYTES = 64 << 20
SECTOR_BYTES = 512


@dataclass(frozen=True, slots=True)
class Write:
    """One write: ``data``, or ``length_bytes`` zeros where ``data`` is None.

    ``discard`` drops the range instead, on a device that can; nothing may depend on what it reads as afterwards.
    """

    device: str
    offset_bytes: int
    length_bytes: int
    what: str
    data: bytes | None = None
    discard: bool = False

    def __post_init__(self) -> None:
        assert self.data is None or len(self.data) == self.length_bytes
        assert not (self.discard and self.data is not None)

    @property
    def operation(self) -> str:
        """The word for what is done: write, zero or discard."""
        return "discard" if self.discard else "zero" if self.data is None else "write"


@dataclass(frozen=True, slots=True)
class Plan:
    """Steps of writes; every device is flushed after each step."""

    verb: str
    steps: tuple[tuple[Write, ...], ...]

    @property
    def writes(self) -> list[Write]:
        """All writes in order."""
        return [write for step in self.steps for write in step]


class UndoEntry(TypedDict):
    """One range of an undo file's header."""

    device: str
    size_bytes: int
    offset_bytes: int
    length_bytes: int
    what: str
    before: str
    after: str
    after_sectors: str
    unreadable: bool
    """What was there could not be read, so nothing can be put back."""


def describe(plan: Plan) -> list[str]:
    """One line a write, as ``--dry-run`` prints them."""
    return [f"{write.device}: {write.operation} {write.length_bytes} bytes at byte {write.offset_bytes}: {write.what}"
            for write in plan.writes]


def describe_json(plan: Plan) -> dict[str, Any]:
    """The plan for ``--dry-run --json``."""
    return {"dry_run": True, "writes": [
        {"device": write.device, "operation": write.operation, "offset_bytes": write.offset_bytes,
         "length_bytes": write.length_bytes, "what": write.what} for write in plan.writes]}


def apply(plan: Plan, devices: Mapping[str, BlockDevice]) -> None:
    """Make the writes; each step is durable before the next begins."""
    for step in plan.steps:
        for write in step:
            device = devices[write.device]
            if write.discard:
                if device.can_discard:
                    device.discard(write.offset_bytes, write.length_bytes)
            elif write.data is None:
                device.zero(write.offset_bytes, write.length_bytes)
            else:
                device.write(write.offset_bytes, write.data)
        for name in dict.fromkeys(write.device for write in step):
            devices[name].flush()


def apply_with_undo(plan: Plan, devices: Mapping[str, BlockDevice], path: Path) -> None:
    """Keep an undo file at ``path``, then make the writes; who is stopped half-way is told the way back."""
    save_undo(plan, devices, path)
    try:
        apply(plan, devices)
    except BaseException:
        print(f"bcachectl: {plan.verb} did not come to its end; `bcachectl undo {path}` takes back what was written",
              file=sys.stderr)
        raise


def save_undo(plan: Plan, devices: Mapping[str, BlockDevice], path: Path) -> None:
    """Keep what ``plan`` is about to overwrite in a new file at ``path``; durable when this returns.

    Discarded ranges are not kept: a discard gives up data on purpose, as much as the device is large.
    """
    entries: list[UndoEntry] = []
    saved: list[bytes] = []
    for write in plan.writes:
        if write.discard:
            continue
        device = devices[write.device]
        before, unreadable = _read_before(device, write)
        entries.append({"device": os.path.realpath(write.device), "size_bytes": device.size_bytes,
                        "offset_bytes": write.offset_bytes, "length_bytes": write.length_bytes, "what": write.what,
                        "before": _digest(before), "after": _digest(write.data or bytes(write.length_bytes)),
                        "after_sectors": _sectors(write.data or bytes(write.length_bytes)), "unreadable": unreadable})
        saved.append(before)
    header = {"bcachectl-undo": UNDO_SCHEMA, "verb": plan.verb, "entries": entries}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("xb") as file:
            try:
                file.write(json.dumps(header).encode() + b"\n")
                for before in saved:
                    file.write(before)
                file.flush()
                os.fsync(file.fileno())
            except OSError:
                path.unlink()
                raise
        _sync_directory(path.parent)
    except OSError as error:
        raise BcachectlError(f"{path}: the undo file cannot be written ({error.strerror}); nothing was changed, "
                             "name another place with --backup") from error


def read_undo(path: Path) -> tuple[str, list[UndoEntry], list[bytes]]:
    """The verb, the entries and the old bytes of an undo file; a damaged one is refused whole."""
    try:
        with path.open("rb") as file:
            line = file.readline(UNDO_HEADER_MAX_BYTES)
            rest = file.read()
    except OSError as error:
        raise BcachectlError(f"{path}: {error.strerror}") from error
    try:
        header = json.loads(line)
        schema = header["bcachectl-undo"]
        verb, entries = str(header["verb"]), [_undo_entry(entry) for entry in header["entries"]]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise BcachectlError(f"{path}: is not an undo file of bcachectl") from error
    if schema != UNDO_SCHEMA:
        raise BcachectlError(f"{path}: is an undo file of schema {schema}; this bcachectl knows {UNDO_SCHEMA}")
    saved: list[bytes] = []
    position = 0
    for entry in entries:
        before = rest[position:position + entry["length_bytes"]]
        position += entry["length_bytes"]
        if _digest(before) != entry["before"]:
            raise BcachectlError(f"{path}: the undo file is damaged or cut short; nothing was changed")
        saved.append(before)
    return verb, entries, saved


def undo_plan(verb: str, entries: Sequence[UndoEntry], saved: Sequence[bytes], devices: Mapping[str, BlockDevice],
              *, force_changed: bool) -> Plan:
    """The plan that takes ``entries`` back, last write first; refused where a device is no longer as it was left."""
    for device_name in dict.fromkeys(entry["device"] for entry in entries):
        expected = next(entry["size_bytes"] for entry in entries if entry["device"] == device_name)
        found = devices[device_name].size_bytes
        if found != expected:
            raise Refused(f"{device_name}: has {found} bytes, the undo file is for a device of {expected}; "
                          "is it another device under this name?")
    for index, entry in enumerate(entries):
        if entry["unreadable"]:
            continue
        now = devices[entry["device"]].read(entry["offset_bytes"], entry["length_bytes"])
        overwritten = any(later["device"] == entry["device"]
                          and later["offset_bytes"] < entry["offset_bytes"] + entry["length_bytes"]
                          and entry["offset_bytes"] < later["offset_bytes"] + later["length_bytes"]
                          for later in entries[index + 1:])
        if overwritten or force_changed or _digest(now) in (entry["after"], entry["before"]):
            continue
        if not _is_torn(now, saved[index], entry["after_sectors"]):
            raise Refused(f"{entry['device']}: the {entry['what']} at byte {entry['offset_bytes']} was changed after "
                          f"{verb}; what was written since would be lost", hazard="changed")
    steps = tuple((Write(entry["device"], entry["offset_bytes"], entry["length_bytes"],
                         f"{entry['what']}, as before {verb}", before),)
                  for entry, before in zip(reversed(entries), reversed(saved), strict=True) if not entry["unreadable"])
    return Plan("undo", steps)


def undo_directory() -> Path:
    """Where undo files go if nobody names a place."""
    state = os.environ.get("XDG_STATE_HOME")
    if state:
        return Path(state) / "bcachectl/undo"
    return Path("/var/lib/bcachectl/undo") if os.geteuid() == 0 else Path.home() / ".local/state/bcachectl/undo"


def undo_path(verb: str, devices: Iterable[str], *, now_s: int) -> Path:
    """A name in `undo_directory` that is not taken yet."""
    names = "+".join(Path(name).name for name in devices)[:80]
    directory = undo_directory()
    path = directory / f"{verb}-{names}-{now_s}.undo"
    number = 1
    while path.exists():
        number += 1
        path = directory / f"{verb}-{names}-{now_s}-{number}.undo"
    return path


def _read_before(device: BlockDevice, write: Write) -> tuple[bytes, bool]:
    # A sector that cannot be read holds nothing to go back to, and a write may well mend it.
    try:
        return device.read(write.offset_bytes, write.length_bytes), False
    except DeviceError as error:
        if error.errno != errno.EIO:
            raise
    return bytes(write.length_bytes), True


def _undo_entry(entry: Mapping[str, Any]) -> UndoEntry:
    found: UndoEntry = {
        "device": str(entry["device"]), "size_bytes": int(entry["size_bytes"]), "what": str(entry["what"]),
        "offset_bytes": int(entry["offset_bytes"]), "length_bytes": int(entry["length_bytes"]),
        "before": str(entry["before"]), "after": str(entry["after"]),
        "after_sectors": str(entry.get("after_sectors", "")), "unreadable": bool(entry.get("unreadable", False))}
    base64.b64decode(found["after_sectors"], validate=True)
    if found["length_bytes"] < 0 or found["offset_bytes"] < 0:
        raise ValueError("negative range")
    return found


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _sectors(data: bytes) -> str:
    # The CRC-32 of each sector, 4 bytes each, in base64.
    sums = b"".join(zlib.crc32(data[at:at + SECTOR_BYTES]).to_bytes(4, "little")
                    for at in range(0, len(data), SECTOR_BYTES))
    return base64.b64encode(sums).decode()


def _is_torn(now: bytes, before: bytes, after_sectors: str) -> bool:
    # Each sector is what it was before, or what was written.
    sums = base64.b64decode(after_sectors)
    pieces = range(0, len(now), SECTOR_BYTES)
    return len(sums) == 4 * len(pieces) and all(
        now[at:at + SECTOR_BYTES] == before[at:at + SECTOR_BYTES]
        or zlib.crc32(now[at:at + SECTOR_BYTES]) == int.from_bytes(sums[number * 4:number * 4 + 4], "little")
        for number, at in enumerate(pieces))


def _sync_directory(directory: Path) -> None:
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
