# SPDX-License-Identifier: GPL-2.0-only
"""The project's exceptions.  Each class carries the exit status that a command ends with when it escapes.

Four kinds of failure are never mixed:

* a bug is an ``assert`` and ends the program;
* a device's failure is an errno on the `Io` that met it, handled where it is awaited;
* corrupt bytes are `Corrupt`, raised by ``ondisk`` and caught by the offline walk and by the engine's recovery;
* a user's mistake, a refusal and a state that does not allow the request are the classes below.
"""

from __future__ import annotations

import os

EXIT_INTERRUPTED = 130
"""Control-C, SIGTERM or SIGHUP ended a command."""
EXIT_CANCELLED = 32
"""The same of fsck, which has the numbers of fsck(8)."""


class BcachectlError(Exception):
    """Anything that ends a command with one sentence on stderr."""

    exit_status = 1


class UsageError(BcachectlError):
    """The command line is wrong; the text says what would be right."""

    exit_status = 2


class Refused(BcachectlError):
    """A safety check refuses; ``hazard`` is the word that ``--force=`` takes for it, if any."""

    exit_status = 3

    def __init__(self, message: str, *, hazard: str | None = None) -> None:
        super().__init__(message if hazard is None else f"{message} (--force={hazard} overrides this check)")
        self.hazard = hazard


class WrongState(BcachectlError):
    """The device, set or engine is in a state that does not allow the request."""

    exit_status = 4


class DeviceError(BcachectlError):
    """A device could not be opened, read or written; ``errno`` says why where the system gave one."""

    def __init__(self, message: str, *, errno: int = 0) -> None:
        super().__init__(message)
        self.errno = errno


class Corrupt(BcachectlError):
    """Bytes that are not what they should be: ``where`` names the structure, ``why`` is the kernel's word for it."""

    def __init__(self, where: str, why: str) -> None:
        super().__init__(f"{where}: {why}")
        self.where = where
        self.why = why


def errno_text(number: int) -> str:
    """What the system calls an error number, as ``No space left on device``."""
    return os.strerror(number)
