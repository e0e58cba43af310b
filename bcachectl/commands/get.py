# SPDX-License-Identifier: GPL-2.0-only
"""``bcachectl get``: tunables and attributes of a set or a volume that runs, under the kernel's own names."""

from __future__ import annotations

from typing import Annotated

import typer

from bcachectl.commands.options import Json, Kernel, complete_name, complete_target, driver, print_json
from bcachectl.control import find

TargetArgument = Annotated[str, typer.Argument(metavar="TARGET", autocompletion=complete_target, show_default=False,
                                               help="A SET or a VOLUME.")]


def get(
    target: TargetArgument,
    names: Annotated[list[str] | None, typer.Argument(metavar="NAME", show_default=False, autocompletion=complete_name,
                                                      help="Names as in sysfs; by default all.")] = None,
    kernel: Kernel = None,
    as_json: Json = False,
) -> None:
    """Read tunables; a single name prints the bare value, as cat on sysfs does.

    Names of a set may have their directory, as internal/copy_gc_enabled. What holds the kernel's driver up
    (priority_stats, bset_tree_stats) is read only if it is named.
    """
    live, volume = find(target, driver(kernel))
    values = live.get(volume, names or [])
    live.close()
    if as_json:
        print_json("get", {"set": live.uuid or None, "volume": volume or None, "values": values})
    elif names and len(names) == 1:
        print(values[names[0]])
    else:
        width = max((len(name) for name in values), default=0)
        for name, value in values.items():
            first, *rest = value.split("\n")
            print(f"{name:<{width}}  {first}".rstrip())
            for line in rest:
                print(" " * (width + 2) + line)
