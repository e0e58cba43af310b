# SPDX-License-Identifier: GPL-2.0-only
"""Sizes, dates and uuids as people type and read them, and the kernel's own ways of parsing and printing numbers.

Sizes are IEC (1 KiB = 1024 bytes) in both directions.  The kernel's sysfs knows two more forms, kept apart because they
are lossy: `parse_human` (util.c, strtoi_h) and `hprint` (util.c, bch_hprint).
"""

from __future__ import annotations

import uuid
from datetime import UTC, datetime

from bcachectl.errors import UsageError

SECTOR_BYTES = 512
"""A sector is 512 bytes everywhere, whatever the device's logical block size."""

_SUFFIXES = "kmgtpezy"


def parse_size(text: str) -> int:
    """Bytes of a size as a person writes it: ``4096``, ``512k``, ``4M``, ``1TiB``.

    Raises UsageError for anything else, a fraction or a sign included.
    """
    word = text.strip()
    digits = word.rstrip("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ")
    suffix = word[len(digits):].lower()
    if not digits.isascii() or not digits.isdigit():
        raise UsageError(f"{text!r} is not a size; write it like 4096, 512k, 4M or 1TiB")
    if suffix in ("", "b"):
        return int(digits)
    if suffix[1:] not in ("", "b", "ib") or suffix[0] not in _SUFFIXES:
        raise UsageError(f"{text!r} has an unknown unit; use k, M, G, T or P (each 1024 times the last)")
    return int(digits) << (10 * (_SUFFIXES.index(suffix[0]) + 1))


def format_size(size_bytes: int) -> str:
    """A size for people: three significant digits and an IEC unit, exact where it can be."""
    if abs(size_bytes) < 1024:
        return f"{size_bytes} B"
    value = float(size_bytes)
    for unit in ("KiB", "MiB", "GiB", "TiB", "PiB", "EiB"):
        value /= 1024
        if abs(value) < 1023.95:
            text = f"{value:.1f}" if abs(value) < 100 else f"{value:.0f}"
            return f"{text.removesuffix('.0')} {unit}"
    return f"{value:.0f} EiB"


def format_sectors(sectors: int | None) -> str:
    """A number of sectors as a size for people; ``-`` for what is not known."""
    return "-" if sectors is None else format_size(sectors * SECTOR_BYTES)


def counted(count: int | None, what: str) -> str:
    """A number and its noun, ``1 node`` and ``2 nodes``; a number that is not known is a dash.

    ``what`` is the singular, with what belongs to it: ``range of the volume``.
    """
    noun, _, rest = what.partition(" of ")
    if count != 1:
        noun = f"{noun[:-1]}ies" if noun.endswith("ry") else f"{noun}es" if noun.endswith("sh") else f"{noun}s"
    return f"{'-' if count is None else count} {noun}{f' of {rest}' if rest else ''}"


def format_time(seconds: int) -> str:
    """A moment in seconds since 1970, as devices store them, in UTC; empty for 0, the number for what is no date."""
    if not seconds:
        return ""
    try:
        return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M:%SZ")
    except (OverflowError, ValueError, OSError):
        return str(seconds)


def hprint(value: int) -> str:
    """The kernel's rounding-down size text, ``128.0k`` (util.c, bch_hprint)."""
    sign, rest, unit, tenths = ("-" if value < 0 else ""), abs(value), 0, 0
    while True:
        unit += 1
        tenths, rest = rest % 1024, rest // 1024
        if rest < 1000:
            break
    return f"{sign}{rest}.{tenths * 10 // 1024}{'?kMGTPEZY'[unit]}"


def parse_hprint(text: str) -> tuple[int, int]:
    """The least value that `hprint` prints as ``text``, and how many more print the same: ``3.6M``.

    UsageError for anything else.  A blank and what follows, and ``/sec``, are left out.
    """
    word = text.split()[0].removesuffix("/sec") if text.split() else ""
    sign, digits, letter = (-1 if word.startswith("-") else 1), word.removeprefix("-")[:-1], word[-1:]
    whole, dot, tenth = digits.partition(".")
    if not dot or not whole.isdigit() or len(tenth) != 1 or not tenth.isdigit() or letter not in "kMGTPEZY":
        raise UsageError(f"{text!r} is not a size as the kernel prints it")
    shift = 10 * ("?kMGTPEZY".index(letter) - 1)
    # The digit is t * 10 // 1024 of a remainder t below 1024.
    low, high = (-(-int(tenth) * 1024 // 10), -(-(int(tenth) + 1) * 1024 // 10))
    if shift and whole == "0":
        # Less than 1000 has the unit below.
        low = max(low, 1000)
    return sign * (((int(whole) << 10) + low) << shift), (high - low) << shift


def parse_unsigned(text: str, low: int, high: int) -> int:
    """A plain unsigned number as sysfs takes it, clamped into [low, high] (sysfs.h, sysfs_strtoul_clamp).

    Raises UsageError for a suffix, a sign other than one ``+``, a blank, hexadecimal, or a value past 2^64 - 1.
    """
    word = text.removesuffix("\n").removeprefix("+")
    if not word.isascii() or not word.isdigit():
        raise UsageError(f"{text!r} is not a plain decimal number (no unit, sign, blank or 0x)")
    value = int(word)
    if value >= 1 << 64:
        raise UsageError(f"{text!r} is larger than 2^64 - 1")
    return min(max(value, low), high)


def parse_human(text: str) -> int:
    """Bytes of the kernel's suffixed form, ``4M`` (util.c, strtoi_h): digits and at most one letter of kmgtpezy."""
    word = text.removesuffix("\n")
    shift = 0
    if word and word[-1].lower() in _SUFFIXES:
        shift = 10 * (_SUFFIXES.index(word[-1].lower()) + 1)
        word = word[:-1]
    if not word.isascii() or not word.isdigit():
        raise UsageError(f"{text!r} is not a size; write it like 4096, 512k or 4M")
    return int(word) << shift


def parse_uuid(text: str) -> bytes:
    """The 16 bytes of a uuid in any usual spelling; UsageError otherwise."""
    try:
        return uuid.UUID(text.strip()).bytes
    except ValueError:
        raise UsageError(f"{text!r} is not a uuid") from None


def format_label(raw: bytes) -> str:
    """A label as stored on a device, for people: up to its first NUL; a byte that is no text, or that a terminal would
    act upon, as an escape like ``\\x1b``."""
    text = raw.split(b"\0")[0].decode("utf-8", "backslashreplace")
    return "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in text)


def format_uuid(raw: bytes) -> str:
    """The usual spelling of a uuid's 16 bytes."""
    return str(uuid.UUID(bytes=bytes(raw)))
