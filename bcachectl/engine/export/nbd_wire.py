# SPDX-License-Identifier: GPL-2.0-only
"""The NBD protocol's numbers and layouts (doc/proto.md of the NBD project); all of it big-endian."""

from __future__ import annotations

import errno
from struct import Struct

NBD_MAGIC = 0x4E42444D41474943
OPTION_MAGIC = 0x49484156454F5054
OPTION_REPLY_MAGIC = 0x3E889045565A9
REQUEST_MAGIC = 0x25609513
SIMPLE_REPLY_MAGIC = 0x67446698
CHUNK_MAGIC = 0x668E33EF

GREETING = Struct(">QQH")
OPTION = Struct(">QII")             # magic, option, length
OPTION_REPLY = Struct(">QIII")      # magic, option, reply type, length
REQUEST = Struct(">IHHQQI")         # magic, flags, type, cookie, offset, length
SIMPLE_REPLY = Struct(">IIQ")       # magic, error, cookie
CHUNK = Struct(">IHHQI")            # magic, flags, type, cookie, length
DATA_CHUNK = Struct(">IHHQIQ")      # a CHUNK of OFFSET_DATA with the offset that its payload starts with
ERROR_CHUNK = Struct(">IHHQIIH")    # a CHUNK of ERROR with error and message length

FLAG_FIXED_NEWSTYLE, FLAG_NO_ZEROES = 1, 2
"""Handshake flags, the client's and the server's alike."""

(OPT_EXPORT_NAME, OPT_ABORT, OPT_LIST, OPT_INFO, OPT_GO, OPT_STRUCTURED_REPLY, OPT_LIST_META_CONTEXT,
 OPT_SET_META_CONTEXT) = 1, 2, 3, 6, 7, 8, 9, 10

REP_ACK, REP_SERVER, REP_INFO, REP_META_CONTEXT = 1, 2, 3, 4
REP_ERR_UNSUP, REP_ERR_INVALID, REP_ERR_UNKNOWN, REP_ERR_TOO_BIG = 0x80000001, 0x80000003, 0x80000006, 0x80000009

INFO_EXPORT, INFO_NAME, INFO_DESCRIPTION, INFO_BLOCK_SIZE = range(4)

(TF_HAS_FLAGS, TF_READ_ONLY, TF_FLUSH, TF_FUA, TF_TRIM, TF_WRITE_ZEROES, TF_DF, TF_MULTI_CONN,
 TF_FAST_ZERO) = 1, 2, 4, 8, 32, 64, 128, 256, 2048
"""Transmission flags."""

(CMD_READ, CMD_WRITE, CMD_DISC, CMD_FLUSH, CMD_TRIM, CMD_CACHE, CMD_WRITE_ZEROES, CMD_BLOCK_STATUS) = range(8)
CMD_FLAG_FUA, CMD_FLAG_NO_HOLE, CMD_FLAG_DF, CMD_FLAG_REQ_ONE, CMD_FLAG_FAST_ZERO = 1, 2, 4, 8, 16

CHUNK_DONE = 1
CHUNK_NONE, CHUNK_OFFSET_DATA, CHUNK_BLOCK_STATUS, CHUNK_ERROR = 0, 1, 5, 0x8001

MIN_BLOCK_BYTES, PREFERRED_BLOCK_BYTES, MAX_PAYLOAD_BYTES = 512, 4096, 32 << 20
MAX_OPTION_BYTES = 64 << 10
"""A longer option is no option of this protocol: the connection ends."""
MAX_NAME_BYTES = 4096
MAX_OPTIONS = 1000
"""A client that still haggles after so many options is stopped."""

CONTEXT_ALLOCATION, CONTEXT_CACHE = "base:allocation", "bcachectl:cache"
CONTEXT_IDS = {CONTEXT_ALLOCATION: 1, CONTEXT_CACHE: 2}

NBD_ERRORS = frozenset((errno.EPERM, errno.EIO, errno.ENOMEM, errno.EINVAL, errno.ENOSPC, errno.EOVERFLOW,
                        errno.EOPNOTSUPP, errno.ESHUTDOWN))
"""The errnos that have a number in NBD, which is Linux' own; everything else is sent as EIO."""


def wire_error(code: int) -> int:
    """The NBD error for an errno."""
    return code if code in NBD_ERRORS else errno.EIO
