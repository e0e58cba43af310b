# SPDX-License-Identifier: GPL-2.0-only
"""Large journal buckets: what stands behind their entries is looked at, and may be unreadable."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest

from bcachectl.errors import DeviceError
from bcachectl.fsck.records import Damage, Record
from bcachectl.fsck.walk import Walk
from bench.fsck import BUCKET_SECTORS, Writer

KEYS = 3000
ENTRIES_BUCKET = 1
"""The index of the journal bucket that holds the entries; bucket 1 of the device is the first one."""


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("journal") / "cache.img"
    Writer(path, KEYS, is_old=True).write()
    # The journal is all that is asked about; what stands behind it is zeros.
    with path.open("rb") as file:
        return file.read((1 << 20) + 20 * BUCKET_SECTORS * 512)


def reader(image: bytes, unreadable: Sequence[int]) -> Callable[[int, int], bytes]:
    def read(sector: int, count: int) -> bytes:
        if any(sector <= bad < sector + count for bad in unreadable):
            raise DeviceError("Input/output error")
        return image[sector << 9:sector + count << 9].ljust(count << 9, b"\0")

    return read


def journal(image: bytes, *unreadable: int, within: Sequence[tuple[int, int]] | None = None) -> tuple[Walk, list[str]]:
    walk = Walk(reader(image, unreadable), 1 << 40, within=within)
    found = [item for item in walk.structures() if item.where.startswith("journal")]
    assert all(isinstance(item, Record | Damage) for item in found)
    return walk, [item.where for item in found if isinstance(item, Damage)]


def bucket_start(index: int) -> int:
    return (1 + index) * BUCKET_SECTORS


def test_all_of_it_can_be_read(image: bytes) -> None:
    walk, damages = journal(image)
    assert not damages
    assert len(walk.journal) == 1
    assert len(walk.journal_exhausted) == len(walk.superblock.d if walk.superblock else ())


@pytest.mark.parametrize("sector", [BUCKET_SECTORS // 2, BUCKET_SECTORS - 1])
@pytest.mark.parametrize("index", [ENTRIES_BUCKET, 2])
def test_a_bad_sector_behind_the_entries(image: bytes, index: int, sector: int) -> None:
    """It costs no entry, but nobody can say that there is none."""
    walk, damages = journal(image, bucket_start(index) + sector)
    assert not damages
    assert len(walk.journal) == 1
    assert index not in walk.journal_exhausted


@pytest.mark.parametrize("index", [ENTRIES_BUCKET, 2])
def test_a_bad_sector_among_the_entries(image: bytes, index: int) -> None:
    walk, damages = journal(image, bucket_start(index) + 100)
    assert damages == [f"journal bucket {index}"] + (["journal"] if index == ENTRIES_BUCKET else [])
    assert len(walk.journal) == (index != ENTRIES_BUCKET)


def test_entries_only(image: bytes) -> None:
    """Who asks for few positions does not look behind the entries."""
    walk, damages = journal(image, *(bucket_start(index) + BUCKET_SECTORS // 2 for index in range(4)), within=())
    assert not damages
    assert len(walk.journal) == 1
    assert not walk.journal_exhausted
