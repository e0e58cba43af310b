# SPDX-License-Identifier: GPL-2.0-only
"""``bcachectl engine stop``: the engine of a set ends in good order."""

from __future__ import annotations

import os
from typing import Annotated

import typer

from bcachectl.commands.options import DryRun, Json, complete_set, print_json
from bcachectl.control import LiveSet, engines, find_set, socket_dirs
from bcachectl.engine.export.loopdev import clean_all_stale
from bcachectl.errors import WrongState

STOP_TIMEOUT_S = 600.0
"""How long an orderly stop may take: all dirty btree nodes and the journal are written."""


def engine_stop(
    target: Annotated[str | None, typer.Argument(metavar="SET", autocompletion=complete_set, show_default=False,
                                                 help="The set to stop; by default the only one that runs.")] = None,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Stop an engine in good order, as SIGTERM does.

    What an engine that was killed left behind, a dead mount and its loop device, is removed first.
    """
    if not dry_run and os.geteuid() == 0:
        left = clean_all_stale(socket_dirs())
        if left and target is None and not engines():
            print("\n".join(f"removed {path}, left by an engine that was killed" for path in left))
            return
    stop_engine(find_set(target), dry_run=dry_run, as_json=as_json)


def stop_engine(live: LiveSet, *, dry_run: bool, as_json: bool) -> None:
    """Ask the engine to stop and wait until it is gone."""
    if dry_run:
        print(f"would ask the {live.source} of set {live.uuid} to stop; it would write what is journaled and not yet "
              "in the btree")
        return
    job = live.start("stop")
    job.wait(STOP_TIMEOUT_S)
    if not live.wait_end(STOP_TIMEOUT_S):
        raise WrongState(f"the engine of set {live.uuid} has not ended within {STOP_TIMEOUT_S:.0f} s")
    if as_json:
        print_json("stop", {"set": live.uuid})
    else:
        print(f"set {live.uuid} has stopped")
