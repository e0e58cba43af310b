# SPDX-License-Identifier: GPL-2.0-only
"""What a process costs, as /proc tells it; and how busy the machine is with other things."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

_TICKS_PER_S = os.sysconf("SC_CLK_TCK")


def cpu_s(pid: int) -> float:
    """User and system time of a process, all its threads, in seconds (a tick is 10 ms)."""
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / _TICKS_PER_S


def memory_bytes(pid: int, field: str = "VmRSS") -> int:
    """Resident memory of a process now; ``VmHWM`` for the most it ever had."""
    for line in Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines():
        name, _, value = line.partition(":")
        if name == field:
            return int(value.split()[0]) << 10
    raise KeyError(field)


def machine() -> str:
    """The line that every report starts with: how much else is going on, and what is measured."""
    load = os.getloadavg()
    state = "hot path compiled" if is_compiled() else "plain Python"
    return f"{os.cpu_count()} cores, load {load[0]:.1f} {load[1]:.1f}, Linux {os.uname().release}, {state}"


def is_compiled() -> bool:
    """Whether `make compiled` has been run."""
    found = importlib.util.find_spec("bcachectl.engine.node")
    return found is not None and not (found.origin or "").endswith(".py")


def row(what: str, figure: str, target: str = "") -> None:
    """Print one line of a report."""
    print(f"  {what:<58} {figure:>16}  {target}", flush=True)
