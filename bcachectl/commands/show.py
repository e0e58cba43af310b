# SPDX-License-Identifier: GPL-2.0-only
"""``bcachectl show``: one superblock, every field, and what the kernel would say about it."""

from __future__ import annotations

import os
import sys
from enum import StrEnum
from typing import Annotated

import typer

from bcachectl import describe, offline
from bcachectl.blockdev import open_device
from bcachectl.commands.options import DeviceArgument, Json, print_json
from bcachectl.errors import UsageError
from bcachectl.views import superblock, table


class Format(StrEnum):
    """What to print."""

    TEXT = "text"
    SUPER_SHOW = "bcache-super-show"


FormatOption = Annotated[Format, typer.Option("--format", help="For people, or exactly as bcache-super-show 1.0.8.")]


def show(device: DeviceArgument, output: FormatOption = Format.TEXT, as_json: Json = False) -> int:
    """Print the superblock of a cache or backing DEVICE: every field, its checksum judged, its flags explained.

    A damaged superblock is printed as well. The exit status is 0 if the kernel would take it, 1 if not.
    """
    if output is Format.SUPER_SHOW and as_json:
        raise UsageError("--format=bcache-super-show and --json exclude each other; give one of them")
    with open_device(device) as opened:
        found = offline.read_superblock(opened)
        if output is Format.SUPER_SHOW:
            lines, complaint = describe.super_show(found.raw, found.superblock)
            print("\n".join(lines))
            if complaint:
                print(f"bcachectl: {device}: {complaint}", file=sys.stderr)
            return 1 if complaint else 0
        offline.require_magic(opened, found)
        fields = describe.superblock(found.raw, found.superblock)
        if as_json:
            print_json("superblock", {"device": device, "size_bytes": opened.size_bytes, "superblock": fields,
                                      "problem": found.problem})
        else:
            color = table.wants_color(sys.stdout, os.environ)
            print("\n".join(superblock.lines(device, fields, found.problem, color=color)))
    return 0 if found.problem is None else 1
