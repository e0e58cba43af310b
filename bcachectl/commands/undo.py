# SPDX-License-Identifier: GPL-2.0-only
"""``bcachectl undo``: what a destructive verb overwrote, put back."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from bcachectl import writeplan
from bcachectl.claim import claim
from bcachectl.commands.options import DryRun, Force, Json, print_json
from bcachectl.errors import UsageError

FileArgument = Annotated[Path, typer.Argument(metavar="FILE", show_default=False,
                                              help="The undo file that the verb named.")]

HAZARDS = ("changed",)


def undo(file: FileArgument, force: Force = None, dry_run: DryRun = False, as_json: Json = False) -> None:
    """Put back what `wipe`, `format` or a repair overwrote.

    Refused if a device is of another size now, or changed since; --force=changed overrides the latter.
    """
    hazards = frozenset(force or ())
    if hazards - set(HAZARDS):
        raise UsageError(f"--force={min(hazards - set(HAZARDS))} overrides nothing here; it takes {HAZARDS[0]}")
    verb, entries, saved = writeplan.read_undo(file)
    with claim(list(dict.fromkeys(entry["device"] for entry in entries)), write=not dry_run) as devices:
        plan = writeplan.undo_plan(verb, entries, saved, devices, force_changed="changed" in hazards)
        if not dry_run:
            writeplan.apply(plan, devices)
    if as_json:
        print_json("undo", {"verb": verb, **(writeplan.describe_json(plan) if dry_run else {"dry_run": False})})
    elif dry_run:
        print("\n".join(writeplan.describe(plan)))
    else:
        print(f"{file}: {verb} is taken back on {', '.join(devices)}.")
