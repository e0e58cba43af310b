# SPDX-License-Identifier: GPL-2.0-only
"""`Medium` and `Backend`: the two protocols of the rim's lower side.

A medium is what one `bcachectl.engine.bdev.Bdev` index stands for: a `bcachectl.blockdev.BlockDevice`, an overlay over
one (`bcachectl.engine.io.overlay`), or a test's device that fails on purpose.  A backend performs Ios on a list of
media: it is handed a batch, and gives the Ios back as they are done.
"""

from __future__ import annotations

from typing import Protocol

from bcachectl.engine.sched import Io


class Medium(Protocol):
    """A device to perform Ios on.  Offsets are bytes; the methods raise OSError.

    ``fd`` is -1 if the bytes of the device are not those of one descriptor; then every Io takes the methods.
    """

    fd: int
    path: str
    size_bytes: int
    logical_block_bytes: int
    optimal_io_bytes: int
    partial_stripes_expensive: bool
    is_block: bool
    direct: bool
    can_discard: bool
    can_zero: bool
    read_only: bool
    nowait_flag: int

    def read_into(self, offset_bytes: int, buf: memoryview) -> None:
        """Fill ``buf``."""
        ...

    def write_from(self, offset_bytes: int, data: bytes | bytearray | memoryview) -> None:
        """Write all of ``data``."""
        ...

    def sync(self) -> None:
        """Make what was written durable."""
        ...

    def trim(self, offset_bytes: int, length_bytes: int) -> None:
        """Discard the range."""
        ...

    def write_zeroes(self, offset_bytes: int, length_bytes: int) -> None:
        """Make the range read as zeros."""
        ...

    def close(self) -> None:
        """Give the device back."""
        ...


class Backend(Protocol):
    """Performs Ios.  An Io that is done has its ``error`` set and comes back from `reap` once."""

    def submit(self, ios: list[Io]) -> None:
        """Start the Ios, in this order."""
        ...

    def reap(self) -> list[Io]:
        """The Ios that are done, in the order they were done; never waits."""
        ...

    def fileno(self) -> int:
        """A descriptor that polls readable when `reap` has something; -1 if Ios are done when `submit` returns."""
        ...

    def pending(self) -> int:
        """How many Ios `reap` still owes."""
        ...

    def close(self) -> None:
        """Free the backend; nothing may be pending."""
        ...
