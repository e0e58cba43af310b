# SPDX-License-Identifier: GPL-2.0-only
"""What stands for the module ``cython`` where that is not installed: nothing is compiled.

A few modules have a ``.pxd`` beside them, in which the C types of what they compute with are declared
(packaging/compile.py).  Their source is plain Python, and runs as such.  They ask ``cython.compiled`` where the
compiled form has something better of its own, say ``with cython.nogil`` where it lets
other threads run, and `boundscheck` where the range of a loop is looked at before it.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import TypeVar

compiled = False
nogil: nullcontext[None] = nullcontext()
_F = TypeVar("_F", bound=Callable[..., object])


def boundscheck(_is_checked: bool) -> Callable[[_F], _F]:
    """Whether compiled code looks at every index."""
    return lambda function: function
