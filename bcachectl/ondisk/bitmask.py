# SPDX-License-Identifier: GPL-2.0-only
"""`Bitmask`: a field of bits inside a 64-bit word, as the kernel's BITMASK macros declare them (bcache_ondisk.h).

The same object reads a field from one int and from a whole numpy column of words.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, overload

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True, slots=True)
class Bitmask:
    """The ``size`` bits of a word that start at bit ``offset``."""

    offset: int
    size: int

    @property
    def mask(self) -> int:
        """The field's bits, in place."""
        return ((1 << self.size) - 1) << self.offset

    @overload
    def get(self, word: int) -> int: ...

    @overload
    def get(self, word: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]: ...

    def get(self, word: Any) -> Any:
        """The field's value."""
        return (word >> self.offset) & ((1 << self.size) - 1)

    def set(self, word: int, value: int) -> int:
        """``word`` with the field set to ``value``, every other bit kept."""
        assert 0 <= value < 1 << self.size, (value, self)
        return word & ~self.mask | value << self.offset
