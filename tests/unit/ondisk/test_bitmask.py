# SPDX-License-Identifier: GPL-2.0-only
"""A field of bits in one word and in a column of words."""

from __future__ import annotations

import numpy as np
import pytest

from bcachectl.ondisk.bitmask import Bitmask


def test_get_and_set_of_one_word() -> None:
    field = Bitmask(4, 8)
    assert field.mask == 0xFF0
    assert field.get(0xABCDE) == 0xCD
    assert field.set(0xABCDE, 0x12) == 0xAB12E


def test_set_refuses_what_does_not_fit() -> None:
    with pytest.raises(AssertionError):
        Bitmask(0, 2).set(0, 4)


def test_get_of_a_column() -> None:
    words = np.array([0, 1 << 63, (1 << 64) - 1], np.uint64)
    assert Bitmask(60, 4).get(words).tolist() == [0, 8, 15]
    assert Bitmask(0, 20).get(words).tolist() == [0, 0, 0xFFFFF]
