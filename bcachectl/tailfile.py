# SPDX-License-Identifier: GPL-2.0-only
"""The file of a `bcachectl.engine.tail.Tail`: where it is, who may have it, and whether it holds anything.

docs/decisions/0036-tail.md says what it is for.
"""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import time
from uuid import UUID

from bcachectl.engine.tail import TAIL_BYTES, Tail, is_of
from bcachectl.errors import DeviceError, Refused

DIRECTORY = "/run/bcachectl"
"""The same for whoever starts an engine, since the next one has to find the file; gone with the boot."""
RELEASE_TIMEOUT_S = 20.0
"""How long whoever opens it waits for an engine that was killed to let go of it."""
_BOOT_ID = "/proc/sys/kernel/random/boot_id"


def tail_path(set_uuid: bytes) -> str:
    """Where the tail of a set is."""
    return os.path.join(DIRECTORY, f"{UUID(bytes=set_uuid)}.tail")


class TailFile:
    """The file, mapped and locked; ``tail`` is what is in it."""

    def __init__(self, path: str, set_uuid: bytes, *, timeout_s: float = RELEASE_TIMEOUT_S) -> None:
        """Makes the file if it is not there, for its owner only; DeviceError if that cannot be.  Refused if another
        engine has it, which then runs a copy of the set, since the cache device is claimed.
        """
        self.path = path
        try:
            os.makedirs(os.path.dirname(path), mode=0o700, exist_ok=True)
            self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                deadline_s = time.monotonic() + timeout_s
                while not _lock(self._fd, fcntl.LOCK_EX):
                    if time.monotonic() > deadline_s:
                        raise Refused(f"{path}: another engine has it; two sets of one uuid (a copy?) cannot run at a "
                                      "time")
                    time.sleep(0.02)
                if os.fstat(self._fd).st_size < TAIL_BYTES:
                    os.posix_fallocate(self._fd, 0, TAIL_BYTES)
                self._mapped = mmap.mmap(self._fd, TAIL_BYTES)
            except BaseException:
                os.close(self._fd)
                raise
        except OSError as error:
            raise DeviceError(f"{path}: cannot be opened, and it has to keep the writes that are answered: "
                              f"{error.strerror}", errno=error.errno or 0) from error
        self.tail = Tail(memoryview(self._mapped), set_uuid=set_uuid, boot_id=boot_id(), path=path)

    def remove(self) -> None:
        """Nobody needs it any more."""
        os.unlink(self.path)

    def close(self) -> None:
        """Let go of it; the file stays."""
        self.tail.close()
        self._mapped.close()
        os.close(self._fd)


def _lock(fd: int, kind: int) -> bool:
    try:
        fcntl.flock(fd, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def read_tail(path: str, set_uuid: bytes) -> Tail | None:
    """A copy of what is in the file; None if there is none, if it counts for nothing, or if an engine that runs has
    it.
    """
    with contextlib.suppress(OSError), open(path, "rb") as file:
        if not _lock(file.fileno(), fcntl.LOCK_SH):
            return None
        raw = bytearray(file.read(TAIL_BYTES))
        if len(raw) == TAIL_BYTES and is_of(bytes(raw), set_uuid, boot_id()):
            return Tail(memoryview(raw), set_uuid=set_uuid, boot_id=boot_id(), path=path)
    return None


def killed_sets() -> list[tuple[bytes, str]]:
    """The sets of engines that were killed and left something behind: uuid, `left_behind`; what may be seen of them."""
    found = []
    with contextlib.suppress(OSError):
        for name in sorted(os.listdir(DIRECTORY)):
            with contextlib.suppress(ValueError):
                uuid = UUID(name.removesuffix(".tail")).bytes
                left = left_behind(uuid)
                if left is not None:
                    found.append((uuid, left))
    return found


def left_behind(set_uuid: bytes) -> str | None:
    """What keeps everybody else from a set whose engine was killed; None if nothing does that can be seen."""
    tail = read_tail(tail_path(set_uuid), set_uuid)
    if tail is None or not tail.has_more():
        return None
    return f"writes that a killed engine of this set answered are in {tail.path} and nowhere else"


def boot_id() -> bytes:
    """Of the running kernel; 16 bytes."""
    with open(_BOOT_ID, encoding="ascii") as file:
        return UUID(file.read().strip()).bytes
