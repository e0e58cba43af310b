# SPDX-License-Identifier: GPL-2.0-only
"""Dirty data behind the end of a backing device is found by a look at a few nodes, as a whole check finds it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from bcachectl.fsck.beyond import dirty_beyond
from bcachectl.fsck.check_backing import slot_of
from bcachectl.ondisk.bkey import INODE_SHIFT
from tests.fsck.image import Image
from tests.fsck.test_damage import base_image, check

STORIES = ("deep_crash", "dirty_crash", "two_backing", "killed", "thrash_crash", "gen_churn", "attached_clean", "fresh",
           "fifo_discard", "flash_volume")


def uuids(image: Image) -> list[bytes]:
    return [device.get(4096 + 40, 16) for device in image.backings]


@pytest.mark.parametrize("name", STORIES)
def test_it_is_what_a_check_finds(golden: Callable[..., Path], name: str) -> None:
    image = base_image(golden(name)).fresh()
    checked = check(image)
    read = image.cache.read
    for uuid in uuids(image):
        slot = slot_of(checked.walk, uuid)
        spread = checked.dirty.get(slot) if slot is not None else None
        if spread is None:
            assert not dirty_beyond(read, image.cache.size_sectors, {uuid: 0})
            continue
        assert slot is not None
        last = spread.end - (slot << INODE_SHIFT)
        first = spread.start - (slot << INODE_SHIFT)
        for end, is_beyond in ((0, True), (first, True), (last - 1, True), (last, False), (last + 8, False)):
            assert (uuid in dirty_beyond(read, image.cache.size_sectors, {uuid: end})) == is_beyond, (name, end)


def test_devices_are_told_apart(golden: Callable[..., Path]) -> None:
    image = base_image(golden("two_backing")).fresh()
    one, other = uuids(image)
    assert dirty_beyond(image.cache.read, image.cache.size_sectors, {one: 0, other: 1 << 40}) == {one}
    assert dirty_beyond(image.cache.read, image.cache.size_sectors, {one: 1 << 40, other: 0}) == {other}
    assert dirty_beyond(image.cache.read, image.cache.size_sectors, {one: 0, other: 0}) == {one, other}
    assert not dirty_beyond(image.cache.read, image.cache.size_sectors, {bytes(16): 0, b"x" * 16: 0})


@pytest.mark.parametrize("name", ["deep_crash", "killed", "gen_churn"])
def test_few_nodes_are_read(golden: Callable[..., Path], name: str) -> None:
    """Those on the way to the end of the device, and none else."""
    image = base_image(golden(name)).fresh()
    nodes = {image.walk.geometry.sector_of(node.bucket): node for node in image.nodes}
    asked: list[int] = []

    def read(sector: int, count: int) -> bytes:
        asked.append(sector)
        return image.cache.read(sector, count)

    end = image.backings[0].size_sectors
    assert not dirty_beyond(read, image.cache.size_sectors, {uuids(image)[0]: end})
    found = [nodes[sector] for sector in dict.fromkeys(asked) if sector in nodes]
    assert found
    assert len(found) <= 2 * (1 + max(node.level for node in image.nodes)) < len(nodes)


def test_a_damaged_cache_says_nothing(golden: Callable[..., Path]) -> None:
    image = base_image(golden("dirty_crash")).fresh()
    image.cache.put(4096, bytes(512))
    assert not dirty_beyond(image.cache.read, image.cache.size_sectors, {uuids(image)[0]: 0})
    image.cache.unreadable.update(range(image.cache.size_sectors))
    assert not dirty_beyond(image.cache.read, image.cache.size_sectors, {uuids(image)[0]: 0})
