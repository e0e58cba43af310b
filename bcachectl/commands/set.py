# SPDX-License-Identifier: GPL-2.0-only
"""``bcachectl set``: change tunables of a set or a volume that runs, with the kernel's rules for numbers.

The kernel clamps silently what is out of range; here the command says what was stored instead.
"""

from __future__ import annotations

from typing import Annotated

import typer

from bcachectl.commands.get import TargetArgument
from bcachectl.commands.options import DryRun, Json, Kernel, complete_setting, driver, print_json
from bcachectl.control import find
from bcachectl.errors import UsageError


def set_tunables(
    target: TargetArgument,
    settings: Annotated[list[str], typer.Argument(metavar="NAME=VALUE", show_default=False,
                                                  autocompletion=complete_setting,
                                                  help="Names and values as in sysfs.")],
    kernel: Kernel = None,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Change tunables; all names and values are looked at before the first is changed."""
    pairs = [parse_setting(setting) for setting in settings]
    live, volume = find(target, driver(kernel))
    if dry_run:
        live.check(volume, dict(pairs))
        readable = live.get(volume, [])
        for name, value in pairs:
            found = [text for known, text in readable.items() if name in (known, known.rpartition("/")[2])]
            now = f" (now {found[0]})" if found else ""
            print(f"would set {name} of {volume or live.uuid} to {value}{now}")
        return
    stored = live.set(volume, dict(pairs))
    live.close()
    if as_json:
        print_json("set", {"set": live.uuid or None, "volume": volume or None, "stored": stored})
        return
    for name, value in pairs:
        if stored[name] == value:
            print(f"{name} = {value}")
        else:
            print(f"{name} = {stored[name]} (asked for {value})")


def parse_setting(text: str) -> tuple[str, str]:
    """Name and value of ``NAME=VALUE``; the value may be empty or contain more of them."""
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise UsageError(f"{text!r} is not a setting; write NAME=VALUE")
    return name, value
