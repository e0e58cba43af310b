# SPDX-License-Identifier: GPL-2.0-only
"""Codes of damage: each has a meaning, and each message that reading a structure can raise has a code."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import get_args

import pytest

from bcachectl.fsck import damage
from bcachectl.fsck.findings import CODES, DamageCode
from bcachectl.ondisk import bkey, bset, prio, superblock, validity

_RAISED = re.compile(r'(?:_bad\(|Corrupt\([^\n]*?, )"([^"]+)"\)')


def raised(module: object) -> set[str]:
    """The messages of the errors in a module's source."""
    return set(_RAISED.findall(Path(str(module.__dict__["__file__"])).read_text()))


def test_every_code_has_a_meaning() -> None:
    assert set(get_args(DamageCode)) <= set(CODES)


@pytest.mark.parametrize(("codes", "modules"), [
    (damage.SUPERBLOCK, (superblock,)), (damage.PRIO_SET, (prio,)), (damage.BTREE_NODE, (bset, bkey))])
def test_every_message_has_a_code(codes: damage.Codes, modules: tuple[object, ...]) -> None:
    messages = set().union(*map(raised, modules))
    assert messages
    assert messages == set(codes.by_message)


def test_what_is_wrong_with_an_extent() -> None:
    said = set(re.findall(r'"(bad, [^"]+)"', inspect.getsource(validity.ptr_problem)))
    assert said | {"bad, size larger than its offset"} == set(damage.EXTENTS)
