# SPDX-License-Identifier: GPL-2.0-only
"""``bcachectl gc``: run garbage collection now and wait for it."""

from __future__ import annotations

from bcachectl.commands.options import DryRun, Json, Kernel, SetArgument, driver, print_json
from bcachectl.commands.waiting import wait_for
from bcachectl.control import find_set
from bcachectl.snapshot import to_json
from bcachectl.units import counted


def gc(target: SetArgument, kernel: Kernel = None, dry_run: DryRun = False, as_json: Json = False) -> None:
    """Run garbage collection now and wait for it."""
    live = find_set(target, driver(kernel))
    if dry_run:
        print(f"would ask the {live.source} of set {live.uuid} for a gc; it would write dirty btree nodes")
        return
    before = live.snapshot(0).allocator
    wait_for(live, live.start("gc"), "gc", as_json=as_json)
    after = live.snapshot(0)
    live.close()
    if as_json:
        print_json("gc", {"set": live.uuid, "gc": to_json(after.gc), "counts": to_json(after.allocator.counts),
                          "in_use_percent": after.allocator.in_use_percent})
        return
    nodes = ""
    if after.gc is not None and after.gc.nodes is not None:
        nodes = f" over {counted(after.gc.nodes, 'node')}"
        if after.gc.last_duration_ns is not None:
            nodes += f" in {after.gc.last_duration_ns / 1e6:.0f} ms"
    print(f"gc done{nodes}; in use {before.in_use_percent} % before, {after.allocator.in_use_percent} % now")
