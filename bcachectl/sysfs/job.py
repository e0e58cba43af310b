# SPDX-License-Identifier: GPL-2.0-only
"""Work that the kernel does by itself once it is asked: `KernelJob` asks, and looks again and again whether it is done.

A job is a generator: what stands before its first yield asks for the work, each yield means "not yet", what it returns
is the result.  If it has to put something back, that stands in its ``finally``, and `KernelJob.close` runs it.
"""

from __future__ import annotations

import time
from collections.abc import Generator
from typing import Any

POLL_S = 0.1
"""Time between two looks at an attribute."""


class KernelJob:
    """One piece of work; nothing happens before the first `wait`."""

    def __init__(self, steps: Generator[None, None, Any]) -> None:
        self.result: Any = None
        self._steps = steps

    def wait(self, timeout_s: float) -> bool:
        """True once the work is done; raises what it failed with."""
        deadline_s = time.monotonic() + timeout_s
        while True:
            try:
                next(self._steps)
            except StopIteration as end:
                self.result = end.value
                return True
            left_s = deadline_s - time.monotonic()
            if left_s <= 0:
                return False
            time.sleep(min(POLL_S, left_s))

    def close(self) -> None:
        """Wait no more, and put back what was changed for its sake; the kernel goes on with what it was asked for."""
        self._steps.close()
