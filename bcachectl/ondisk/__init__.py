# SPDX-License-Identifier: GPL-2.0-only
"""Bytes to plain data and back, for every structure that bcache keeps on a device.

Nothing here does I/O or decides anything.  Each structure is stated once with construct, readable as its table in
docs/format.md; beside it stand the ``struct`` and numpy codecs that are used where time counts.  Tests prove that
both agree byte for byte.  A decoder that meets bytes which the kernel would refuse raises `bcachectl.errors.Corrupt`
with the kernel's own words.

All structures are little-endian.  The kernel keeps most of them in host order, so a set written on a big-endian machine
is not readable here.
"""
