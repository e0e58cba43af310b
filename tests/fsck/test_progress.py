# SPDX-License-Identifier: GPL-2.0-only
"""What takes long is told: a check that looks in every bucket of the device says how far it is."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

from bcachectl.fsck.check import Check
from tests.fsck.test_damage import base_image


def test_the_search_for_lost_leaves_is_told(golden: Callable[..., Path]) -> None:
    image = base_image(golden("deep_crash")).fresh()
    root = next(node for node in image.nodes if node.level)
    image.cache.unreadable.update(range(root.bucket * image.walk.geometry.bucket_size_sectors,
                                        (root.bucket + 1) * image.walk.geometry.bucket_size_sectors))
    check = Check(image.cache.read, image.cache.size_sectors)
    steps = [step for step in check.stages() if step.what == "lost leaves"]
    nbuckets = image.walk.geometry.nbuckets
    assert {step.total for step in steps} == {nbuckets}
    done = [step.done for step in steps]
    assert done == sorted(done)
    assert done[-1] == nbuckets
    assert all(after - before <= 256 for before, after in pairwise(done))
    assert len(done) > 5
    # And all of them are found.
    assert len([slot for slot in check.slots if slot.leaf is not None]) > 10
