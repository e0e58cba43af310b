# SPDX-License-Identifier: GPL-2.0-only
"""``bcachectl stop``: stop a set in good order.  Backing devices stay attached, and dirty data stays in the cache."""

from __future__ import annotations

from bcachectl.commands.engine_stop import stop_engine
from bcachectl.commands.options import DryRun, Json, SetArgument
from bcachectl.control import find
from bcachectl.errors import WrongState


def stop(target: SetArgument, dry_run: DryRun = False, as_json: Json = False) -> None:
    """Stop a set: its volumes go away, everything journaled is written."""
    live, volume = find(target)
    if volume:
        live.close()
        raise WrongState(f"{volume} is one volume of set {live.uuid}, and an engine runs all or none; stop the set, or "
                         f"`bcachectl detach {volume}`")
    stop_engine(live, dry_run=dry_run, as_json=as_json)
