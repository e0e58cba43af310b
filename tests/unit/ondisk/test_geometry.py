# SPDX-License-Identifier: GPL-2.0-only
"""Sizes of every usual bucket size, as kernels with 4 KiB pages computed them."""

from __future__ import annotations

import pytest

from bcachectl.ondisk.geometry import Geometry

KIB = 1024


@pytest.mark.parametrize(("bucket_bytes", "meta_bytes", "node_sectors", "prios_per_bucket", "nr_uuids"), [
    (4 * KIB, 4096, 8, 1352, 32),
    (64 * KIB, 65536, 128, 21832, 512),
    (128 * KIB, 131072, 256, 43677, 1024),
    (256 * KIB, 262144, 512, 87368, 2048),
    (512 * KIB, 524288, 512, 174749, 4096),
    (1024 * KIB, 1048576, 512, 349512, 8192),
    (2048 * KIB, 2097152, 1024, 699037, 16384),
    (4096 * KIB, 4194304, 2048, 1398088, 32768),
    (8192 * KIB, 4194304, 2048, 1398088, 32768),
    (65536 * KIB, 4194304, 2048, 1398088, 32768),
])
def test_T2_sizes_by_bucket_size(bucket_bytes: int, meta_bytes: int, node_sectors: int, prios_per_bucket: int,
                                 nr_uuids: int) -> None:
    geometry = Geometry(block_size_sectors=1, bucket_size_sectors=bucket_bytes // 512, nbuckets=2560, first_bucket=1)
    assert geometry.bucket_bytes == bucket_bytes
    assert 1 << geometry.bucket_shift == geometry.bucket_size_sectors
    assert geometry.meta_bytes == meta_bytes
    assert geometry.meta_sectors == meta_bytes // 512
    assert geometry.node_sectors == node_sectors
    assert geometry.node_bytes == node_sectors * 512
    assert geometry.node_blocks == node_sectors
    assert geometry.prios_per_bucket == prios_per_bucket
    assert geometry.nr_uuids == nr_uuids


@pytest.mark.parametrize(("nbuckets", "prio_buckets"), [(1352, 1), (1353, 2), (2704, 2), (2705, 3)])
def test_T2_prio_sets_cover_every_bucket(nbuckets: int, prio_buckets: int) -> None:
    assert Geometry(1, 8, nbuckets, 3).prio_buckets == prio_buckets


@pytest.mark.parametrize(("nbuckets", "njournal"), [(513, 4), (128, 2), (640, 5), (2560, 20), (32767, 255),
                                                    (1 << 20, 256)])
def test_T2_journal_buckets_of_a_new_set(nbuckets: int, njournal: int) -> None:
    assert Geometry(8, 1024, nbuckets, 1).njournal_default == njournal


def test_blocks_of_a_node() -> None:
    geometry = Geometry(block_size_sectors=8, bucket_size_sectors=1024, nbuckets=1000, first_bucket=1)
    assert geometry.block_bytes == 4096
    assert geometry.node_blocks == 64


def test_larger_pages() -> None:
    geometry = Geometry(128, 1024, 1000, 1, page_sectors=128)
    assert geometry.meta_bytes == 512 * KIB
    assert geometry.node_sectors == 512
    assert geometry.jset_max_bytes == 512 * KIB
    assert Geometry(8, 1024, 1000, 1).jset_max_bytes == 32 * KIB


def test_sectors_and_buckets() -> None:
    geometry = Geometry(8, 1024, 1000, 1)
    assert geometry.bucket_of(1023) == 0
    assert geometry.bucket_of(1024) == 1
    assert geometry.sector_of(3) == 3072
