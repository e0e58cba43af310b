# SPDX-License-Identifier: GPL-2.0-only
"""Over which export the tests of engines run: the seam between them and how a volume is reached.

As a rule a test's engine has the export that the test names, and its client speaks NBD.  With
BCACHECTL_TEST_EXPORT=ublk the same tests run over ublk (``make over-ublk``, in the virtual machine, which has the
driver):

* `exported` puts ``--export ublk`` in the place of ``--export nbd`` and ``--export loop``.  A test that is about the
  option itself writes ``--export=nbd``, which stays.
* `tests.export.engine.Engine.client` gives a client of the block device instead of one of the socket.
* What another export has, and a block device has not, is asked for by `only`, which leaves the test out and says why.
* An engine that was killed leaves its device; the next one takes it over (``--recover``), as a user would have it, and
  what was under way is carried out then.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable
from pathlib import Path

import pytest

from bcachectl.engine.export.ublk_control import UblkControl, is_available
from bcachectl.engine.export.ublk_wire import DevInfo
from tests.block_client import BlockClient
from tests.nbd_client import NbdClient
from tests.require import need, need_root

EXPORT = os.environ.get("BCACHECTL_TEST_EXPORT", "")
assert EXPORT in ("", "ublk"), f"BCACHECTL_TEST_EXPORT={EXPORT}: the only other export is ublk"

Client = NbdClient | BlockClient


def exported(words: Iterable[str | Path]) -> list[str]:
    """Options of ``engine run`` with the export that this run is about."""
    given = [str(word) for word in words]
    if not EXPORT:
        return given
    pairs = list(itertools.pairwise(given))
    for index, (word, value) in enumerate(pairs):
        if (word, value) == ("--io", "sync"):
            pytest.skip("not over ublk: without io_uring")
        if word == "--export" and value in ("nbd", "loop"):
            given[index + 1] = EXPORT
            if left_by_the_dead():
                given.insert(index + 2, "--recover")
    return given


def only(export: str, what: str) -> None:
    """Go on only where this export is; ``what`` names what the test is about."""
    if EXPORT not in ("", export):
        pytest.skip(f"only over {export}: {what}")


def need_block_export() -> None:
    """Go on only where a volume can become a block device."""
    need_root()
    if EXPORT:
        need(is_available(), "the ublk driver")
    else:
        need(os.path.exists("/dev/fuse") and os.path.exists("/dev/loop-control"), "FUSE and loop devices")


def devices() -> list[DevInfo]:
    """The ublk devices of this machine."""
    control = UblkControl()
    try:
        return control.devices()
    finally:
        control.close()


def left_by_the_dead() -> list[DevInfo]:
    """Those whose engine has been killed."""
    return [info for info in devices() if not os.path.exists(f"/proc/{info.pid}")]


def remove(left: list[DevInfo]) -> None:
    """Take devices away."""
    control = UblkControl()
    try:
        for info in left:
            control.stop(info.dev_id)
            control.delete(info.dev_id)
    finally:
        control.close()
