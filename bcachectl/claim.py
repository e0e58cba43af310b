# SPDX-License-Identifier: GPL-2.0-only
"""Devices as the writing offline verbs hold them: each claimed exclusively, refused with the reason if in use.

The claim lasts for the whole verb, from the first look to the last write, so what was checked stays true.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

from bcachectl import discovery
from bcachectl.blockdev import BlockDevice, open_device
from bcachectl.errors import Corrupt, DeviceError, Refused, UsageError
from bcachectl.ondisk.superblock import SB_BYTES, SB_SECTOR, decode_superblock
from bcachectl.tailfile import left_behind


@contextmanager
def claim(paths: Sequence[str], *, write: bool) -> Iterator[dict[str, BlockDevice]]:
    """Open every device exclusively; a dry run asks for no writing, so that even udev notices nothing."""
    refuse_twice(paths)
    with ExitStack() as stack:
        yield {path: stack.enter_context(_open(path, write=write)) for path in paths}


def refuse_twice(paths: Sequence[str]) -> None:
    """UsageError if two of the paths lead to one device or file."""
    known: dict[tuple[bool, int, int], str] = {}
    for path in paths:
        if os.path.exists(path):
            status = os.stat(path)
            is_block = stat.S_ISBLK(status.st_mode)
            identity = (is_block, 0, status.st_rdev) if is_block else (is_block, status.st_dev, status.st_ino)
            if identity in known:
                same = "is named twice" if path == known[identity] else f"is the same device as {known[identity]}"
                raise UsageError(f"{path}: {same}; name it once")
            known[identity] = path


def _open(path: str, *, write: bool) -> BlockDevice:
    users = discovery.users_of(path)
    if users:
        raise Refused(f"{path}: is in use ({', '.join(users)}); stop that first")
    try:
        device = open_device(path, write=write, exclusive=True, direct=False)
    except DeviceError as error:
        if error.errno == errno.EBUSY:
            raise Refused(f"{error}; stop that first" if "stop" not in str(error) else str(error)) from error
        raise
    try:
        left = _left_behind(device)
        if left is not None:
            raise Refused(f"{path}: {left}; 'bcachectl engine stop {path}' has them written, or start the engine again")
    except BaseException:
        device.close()
        raise
    return device


def _left_behind(device: BlockDevice) -> str | None:
    try:
        return left_behind(decode_superblock(device.read(SB_SECTOR << 9, SB_BYTES)).set_uuid)
    except (Corrupt, DeviceError):
        return None
