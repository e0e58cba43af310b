# SPDX-License-Identifier: GPL-2.0-only
"""Devices whose sectors cannot be read, for tests of whole commands on files."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest

from bcachectl.blockdev import BlockDevice

IsBad = Callable[[str, int, int], bool]
"""``is_bad(path, offset_bytes, nbytes)``: whether a read of that range fails."""


def fail_reads(patch: pytest.MonkeyPatch, is_bad: IsBad) -> None:
    """Have reads of bad ranges fail as a device fails them, whichever way they are made."""
    read, read_into = BlockDevice.read, BlockDevice.read_into

    def failing_read(self: BlockDevice, offset_bytes: int, nbytes: int) -> bytes:
        if is_bad(self.path, offset_bytes, nbytes):
            raise self._failed("read", offset_bytes, OSError(5, os.strerror(5)))
        return read(self, offset_bytes, nbytes)

    def failing_read_into(self: BlockDevice, offset_bytes: int, buf: memoryview) -> None:
        if is_bad(self.path, offset_bytes, len(buf)):
            raise OSError(5, os.strerror(5))
        read_into(self, offset_bytes, buf)

    # Nobody can come between a descriptor and who reads it.
    patch.setattr(BlockDevice, "plain_fd", property(lambda self: -1))
    patch.setattr(BlockDevice, "read", failing_read)
    patch.setattr(BlockDevice, "read_into", failing_read_into)
