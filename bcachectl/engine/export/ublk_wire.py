# SPDX-License-Identifier: GPL-2.0-only
"""Layouts and numbers of the ublk driver; nothing here does anything.

::

    /dev/ublk-control   control commands, 32 bytes of payload in a 128-byte io_uring entry: `CTRL_CMD`
    /dev/ublkcN         one command for each tag, 16 bytes of payload: `IO_CMD`;
                        mapped, it shows for each tag what is asked: `IO_DESC`
    /dev/ublkbN         the block device

A command's number is an ioctl's (`encoded`), from Linux 6.4 on; older drivers know the bare number, and later ones may
be built without those.  Kernel: include/uapi/linux/ublk_cmd.h, drivers/block/ublk_drv.c; little-endian machines.
"""

from __future__ import annotations

from struct import Struct
from typing import NamedTuple

CTRL_CMD = Struct("<IHHQQHHI")      # dev_id, queue_id, length, address, data, path length, padding, reserved
IO_CMD = Struct("<HHiQ")            # queue, tag, result, buffer's address
IO_CMD_RESULT_WORD = (48 + 4) // 4
"""Where the result lies in an entry, in words of 32 bits."""
IO_DESC = Struct("<IIQQ")           # operation and flags, sectors, first sector, address
DEV_INFO = Struct("<HHHHIIiIQQIIQQ")
PARAMS = Struct("<II IBBBBIIQQ IIIIHH")
assert (CTRL_CMD.size, IO_CMD.size, IO_DESC.size, DEV_INFO.size, PARAMS.size) == (32, 16, 24, 64, 60)

GET_DEV_INFO, ADD_DEV, DEL_DEV, START_DEV, STOP_DEV, SET_PARAMS, GET_PARAMS = 2, 4, 5, 6, 7, 8, 9
START_USER_RECOVERY, END_USER_RECOVERY, GET_FEATURES, DEL_DEV_ASYNC = 0x10, 0x11, 0x13, 0x14
FETCH_REQ, COMMIT_AND_FETCH_REQ = 0x20, 0x21
_READ_ONLY_COMMANDS = {GET_DEV_INFO, GET_PARAMS, GET_FEATURES, DEL_DEV_ASYNC}

ANY_DEVICE, NO_QUEUE = 0xFFFFFFFF, 0xFFFF

F_USER_RECOVERY, F_USER_RECOVERY_REISSUE, F_CMD_IOCTL_ENCODE = 1 << 3, 1 << 4, 1 << 6
STATE_DEAD, STATE_LIVE, STATE_QUIESCED = 0, 1, 2
"""Not started or stopped; serving; its server has died and another may take it."""

ATTR_READ_ONLY, ATTR_VOLATILE_CACHE, ATTR_FUA = 1, 1 << 2, 1 << 3
_TYPE_BASIC, _TYPE_DISCARD = 1, 2

OP_READ, OP_WRITE, OP_FLUSH, OP_DISCARD, OP_WRITE_ZEROES = 0, 1, 2, 3, 5
FLAG_META, FLAG_FUA = 1 << 11, 1 << 13
"""Flags beside the operation in the first word of an `IO_DESC`."""

DESC_STRIDE_BYTES = 4096 * IO_DESC.size
"""From the descriptors of one queue to those of the next, in the mapping."""


def encoded(command: int) -> int:
    """The ioctl number of a command (_IOR or _IOWR of type 'u')."""
    size = IO_CMD.size if command >= FETCH_REQ else CTRL_CMD.size
    direction = 2 if command in _READ_ONLY_COMMANDS else 3
    return direction << 30 | size << 16 | ord("u") << 8 | command


class DevInfo(NamedTuple):
    """A device as GET_DEV_INFO tells.  ``mark`` is the server's own to set, and the driver keeps it."""

    queues: int
    depth: int
    state: int
    max_io_bytes: int
    dev_id: int
    pid: int
    flags: int
    mark: int

    def encode(self) -> bytes:
        """For ADD_DEV."""
        return DEV_INFO.pack(self.queues, self.depth, self.state, 0, self.max_io_bytes, self.dev_id, self.pid, 0,
                             self.flags, self.mark, 0, 0, 0, 0)


def decode_dev_info(raw: bytes | bytearray) -> DevInfo:
    """What the driver wrote."""
    queues, depth, state, _, max_io_bytes, dev_id, pid, _, flags, mark, *_ = DEV_INFO.unpack(raw)
    return DevInfo(queues, depth, state, max_io_bytes, dev_id, pid, flags, mark)


class Params(NamedTuple):
    """What a device promises to whoever uses it.  0 sectors of discard or of zeroes: it does not know such requests."""

    size_sectors: int
    block_bytes: int
    max_io_bytes: int
    read_only: bool
    max_discard_sectors: int
    max_zeroes_sectors: int

    def encode(self) -> bytes:
        """For SET_PARAMS.  What is written is in a volatile cache until a flush, and FUA is obeyed."""
        attributes = ATTR_VOLATILE_CACHE | ATTR_FUA | (ATTR_READ_ONLY if self.read_only else 0)
        shift = self.block_bytes.bit_length() - 1
        has_discard = bool(self.max_discard_sectors or self.max_zeroes_sectors)
        return PARAMS.pack(
            PARAMS.size, _TYPE_BASIC | (_TYPE_DISCARD if has_discard else 0), attributes, shift, shift, shift, shift,
            self.max_io_bytes >> 9, 0, self.size_sectors, 0,
            0, self.block_bytes if has_discard else 0, self.max_discard_sectors, self.max_zeroes_sectors,
            1 if has_discard else 0, 0)


def decode_size_sectors(raw: bytes | bytearray) -> int:
    """The size of a device, from what GET_PARAMS gave."""
    size_sectors: int = PARAMS.unpack(raw)[9]
    return size_sectors
