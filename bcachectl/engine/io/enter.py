# SPDX-License-Identifier: GPL-2.0-only
"""The system call io_uring_enter, as `bcachectl.engine.io.ring` needs it; the compiled ring has its own in enter_c.pxd.

A call without declared types costs half.  Numbers are then passed as 32 bits, so the last two arguments, which go to
the kernel as 64, are ready-made objects.
"""

from __future__ import annotations

import ctypes
import struct

SYS_IO_URING_ENTER = 426
_GETEVENTS, _EXT_ARG = 1, 8
_TIMESPEC = struct.Struct("<qq")
_ARGUMENTS = struct.Struct("<QIIQ")         # signal mask, its size, padding, address of a timespec
NS_PER_S = 1_000_000_000

_syscall = ctypes.CDLL(None, use_errno=True)["syscall"]
_NO_POINTER, _NO_BYTES = ctypes.c_void_p(None), ctypes.c_size_t(0)
_ARGUMENTS_BYTES = ctypes.c_size_t(_ARGUMENTS.size)
_timespec = ctypes.create_string_buffer(_TIMESPEC.size)
_arguments = ctypes.create_string_buffer(_ARGUMENTS.pack(0, 0, 0, ctypes.addressof(_timespec)), _ARGUMENTS.size)
_arguments_pointer = ctypes.c_void_p(ctypes.addressof(_arguments))


def enter_ring(fd: int, to_submit: int, min_complete: int, gets_events: bool) -> int:
    """Hand over entries; with ``gets_events`` wait for so many completions.  Entries taken, or a negative errno."""
    sent: int = _syscall(SYS_IO_URING_ENTER, fd, to_submit, min_complete, _GETEVENTS if gets_events else 0, _NO_POINTER,
                         _NO_BYTES)
    return sent if sent >= 0 else -ctypes.get_errno()


def enter_ring_for(fd: int, to_submit: int, min_complete: int, timeout_ns: int) -> int:
    """As `enter_ring`, but wait no longer than ``timeout_ns``, which is more than 0; that gives -ETIME."""
    _TIMESPEC.pack_into(_timespec, 0, timeout_ns // NS_PER_S, timeout_ns % NS_PER_S)
    sent: int = _syscall(SYS_IO_URING_ENTER, fd, to_submit, min_complete, _GETEVENTS | _EXT_ARG, _arguments_pointer,
                         _ARGUMENTS_BYTES)
    return sent if sent >= 0 else -ctypes.get_errno()
