# SPDX-License-Identifier: GPL-2.0-only
"""``bcachectl wipe``: a device that bcache knows no more, and the way back."""

from __future__ import annotations

import time

from bcachectl import offline, writeplan
from bcachectl.blockdev import BlockDevice
from bcachectl.claim import claim
from bcachectl.commands.options import Backup, DevicesArgument, DryRun, Force, Json, print_json
from bcachectl.errors import Refused, UsageError
from bcachectl.ondisk.superblock import SB_BYTES, SB_SECTOR
from bcachectl.writeplan import Plan, Write

HAZARDS = ("dirty",)


def wipe(devices: DevicesArgument, backup: Backup = None, force: Force = None, dry_run: DryRun = False,
         as_json: Json = False) -> None:
    """Take the bcache superblock off each DEVICE, after keeping it in an undo file.

    A cache device with data that its backing devices do not have, and a backing device with such data on its cache,
    are refused; --force=dirty overrides that.
    """
    hazards = frozenset(force or ())
    if hazards - set(HAZARDS):
        raise UsageError(f"--force={min(hazards - set(HAZARDS))} overrides nothing here; it takes {HAZARDS[0]}")
    with claim(devices, write=not dry_run) as opened:
        for device in opened.values():
            _check(device, force_dirty="dirty" in hazards)
        plan = Plan("wipe", tuple((Write(path, SB_SECTOR << 9, SB_BYTES, "superblock", bytes(SB_BYTES)),)
                                  for path in opened))
        undo = backup or writeplan.undo_path("wipe", opened, now_s=int(time.time()))
        if not dry_run:
            writeplan.apply_with_undo(plan, opened, undo)
    if as_json:
        print_json("wipe", {"undo_file": str(undo), **(writeplan.describe_json(plan) if dry_run else
                                                       {"dry_run": False, "devices": devices})})
    elif dry_run:
        print("\n".join(writeplan.describe(plan)))
    else:
        for path in opened:
            print(f"{path}: no longer a bcache device")
        print(f"`bcachectl undo {undo}` takes it back.")


def _check(device: BlockDevice, *, force_dirty: bool) -> None:
    found = offline.read_superblock(device)
    offline.require_magic(device, found)
    reason = "" if force_dirty else offline.only_copy(device)
    if reason:
        raise Refused(f"{device.path}: {reason}", hazard="dirty")
