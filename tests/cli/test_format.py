# SPDX-License-Identifier: GPL-2.0-only
"""`format`: what it writes, in which order, what it refuses, and that `undo` takes it back."""

from __future__ import annotations

import errno
import json
import os
import re
import struct
import subprocess
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from bcachectl import formatter, writeplan
from bcachectl.blockdev import BlockDevice, open_device
from bcachectl.fsck.records import Damage
from bcachectl.fsck.walk import Walk
from bcachectl.ondisk.magic import jset_magic
from bcachectl.ondisk.superblock import (
    SB_BYTES,
    CacheMode,
    Replacement,
    Superblock,
    check_superblock,
    decode_superblock,
)
from bcachectl.units import parse_uuid
from tests.cli.conftest import Result
from tests.require import need_tool

Cli = Callable[..., Result]
MIB = 1 << 20


def sparse(path: Path, size_bytes: int) -> Path:
    with path.open("wb") as file:
        file.truncate(size_bytes)
    return path


def superblock(path: Path | str) -> Superblock:
    with open(path, "rb") as file:
        file.seek(4096)
        return decode_superblock(file.read(SB_BYTES))


def digest(path: Path) -> list[tuple[int, bytes]]:
    """What stands in a sparse file and where; holes cost nothing."""
    pieces: list[tuple[int, bytes]] = []
    with path.open("rb") as file:
        end, at = os.fstat(file.fileno()).st_size, 0
        while at < end:
            try:
                at = os.lseek(file.fileno(), at, os.SEEK_DATA)
            except OSError as error:
                if error.errno != errno.ENXIO:
                    raise
                break
            stop = os.lseek(file.fileno(), at, os.SEEK_HOLE)
            data = os.pread(file.fileno(), stop - at, at)
            pieces += [(at + i, data[i:i + 4096]) for i in range(0, len(data), 4096) if any(data[i:i + 4096])]
            at = stop
    return [*pieces, (end, b"")]


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return sparse(tmp_path / "cache.img", 512 * MIB)


@pytest.fixture
def backing(tmp_path: Path) -> Path:
    return sparse(tmp_path / "back.img", 64 * MIB)


def test_one_set(cli: Cli, cache: Path, backing: Path, tmp_path: Path) -> None:
    other = sparse(tmp_path / "other.img", 32 * MIB)
    made = cli("format", "--cache", cache, "--backing", backing, other)
    assert made.status == 0
    assert made.err == ""
    sb, first, second = superblock(cache), superblock(backing), superblock(other)
    assert (sb.version, sb.bucket_size, sb.nbuckets, sb.block_size, sb.first_bucket) == (0, 1024, 1024, 8, 1)
    assert (sb.nr_in_set, sb.nr_this_dev, sb.keys, sb.seq, sb.flags) == (1, 0, 0, 0, 0)
    assert sb.set_uuid == first.set_uuid == second.set_uuid
    assert len({sb.uuid, first.uuid, second.uuid}) == 3
    assert (first.version, first.data_offset, first.cache_mode) == (1, 16, CacheMode.WRITETHROUGH)
    assert made.out.count("Set UUID:") == 3


def test_fields_printed_as_make_bcache_does(cli: Cli, cache: Path, backing: Path) -> None:
    made = cli("format", "-C", cache, "-B", backing)
    names = [line.split(":")[0] for line in made.out.splitlines()]
    assert names == ["Device", "UUID", "Set UUID", "version", "block_size", "data_offset",
                     "Device", "UUID", "Set UUID", "version", "nbuckets", "block_size", "bucket_size", "nr_in_set",
                     "nr_this_dev", "first_bucket"]


def test_every_option(cli: Cli, cache: Path, backing: Path) -> None:
    made = cli("format", "-C", cache, "-b", "64k", "-w", "512", "--replacement", "fifo", "--discard",
               "--cset-uuid", "00112233-4455-6677-8899-AABBCCDDEEFF", "-B", backing, "-o", "1M",
               "--cache-mode", "writearound", "-l", "Grüße")
    assert made.status == 0, made.err
    sb, back = superblock(cache), superblock(backing)
    assert (sb.bucket_size, sb.block_size, sb.replacement, sb.discard) == (128, 1, Replacement.FIFO, True)
    assert sb.set_uuid == back.set_uuid == parse_uuid("00112233-4455-6677-8899-aabbccddeeff")
    assert (back.version, back.data_offset) == (4, 2048)
    assert (back.cache_mode, back.label_text) == (CacheMode.WRITEAROUND, "Grüße")


@pytest.mark.parametrize(("words", "expected"), [
    (["--bucket", "128k"], 256), (["-b", "16M"], 32768), (["--bucket-size", "4k", "-w", "512"], 8),
    (["--bucket-size", "8k"], 16)])
def test_t2_bucket_sizes(cli: Cli, tmp_path: Path, words: list[str], expected: int) -> None:
    image = sparse(tmp_path / "c", 513 * expected * 512)
    assert cli("format", "--cache", image, *words).status == 0
    sb = superblock(image)
    assert (sb.version, sb.bucket_size, sb.nbuckets) == (0, expected, 513)
    assert sb.first_bucket == {8: 3, 16: 2}.get(expected, 1)
    check_superblock(sb, device_sectors=image.stat().st_size >> 9)


@pytest.mark.parametrize("order", [16, 17, 21])
def test_large_buckets_in_log_form(cli: Cli, tmp_path: Path, order: int) -> None:
    """Past 16 MiB the size no longer fits as it is: version 5, and the form that kernels since 5.11 write."""
    image = sparse(tmp_path / "c", 600 << order + 9)
    assert cli("format", "--cache", image, "--bucket-size", str(512 << order)).status == 0
    sb = superblock(image)
    assert (sb.version, sb.feature_incompat, sb.bucket_size_raw, sb.bucket_size) == (5, 2, order, 1 << order)
    check_superblock(sb, device_sectors=image.stat().st_size >> 9)


def test_t2_512_buckets_are_refused(cli: Cli, tmp_path: Path) -> None:
    image = sparse(tmp_path / "c", 512 * 512 * 1024)
    refused = cli("format", "--cache", image)
    assert refused.status == 3
    assert "512 buckets" in refused.err
    assert "513" in refused.err


def test_4k_buckets_with_4k_blocks_are_refused(cli: Cli, cache: Path) -> None:
    """Trap 9: Linux 6.12 corrupts its memory with such a set."""
    before = digest(cache)
    refused = cli("format", "--cache", cache, "--bucket-size", "4k")
    assert refused.status == 3
    assert "one block" in refused.err
    assert digest(cache) == before


@pytest.mark.parametrize(("words", "status", "why"), [
    (["--bucket-size", "3k"], 2, "power of two"), (["--bucket-size", "2k"], 2, "at least 4 KiB"),
    (["--bucket-size", "big"], 2, "not a size"), (["--block-size", "8k"], 2, "4 KiB, the page size"),
    (["--block-size", "3k"], 2, "power of two"), (["--block-size", "256"], 2, "512 bytes"),
    (["--set-uuid", "x"], 2, "not a uuid"), (["--set-uuid", "0" * 32], 2, "zero"),
    (["--force=all"], 2, "bcache, signature or dirty"),
    (["--writeback"], 2, "--backing"), (["--label", "x"], 2, "--backing"), (["-o", "32"], 2, "--backing"),
    (["--replacement", "mru"], 2, "mru")])
def test_wrong_options_for_a_cache(cli: Cli, cache: Path, words: list[str], status: int, why: str) -> None:
    before = digest(cache)
    refused = cli("format", "--cache", cache, *words)
    assert refused.status == status
    assert why in refused.err
    assert refused.err.count("\n") == 1
    assert digest(cache) == before


@pytest.mark.parametrize(("words", "status", "why"), [
    (["--data-offset", "15"], 2, "minimum"), (["--data-offset", "17"], 3, "no multiple"),
    (["-o", "100x"], 2, "unknown unit"), (["-o", "100"], 3, "no multiple"),
    (["-o", "1G"], 3, "leaves no room"), (["-o", "9kb"], 3, "no multiple"),
    (["--label", "x" * 32], 2, "31 bytes"), (["--discard"], 2, "--cache"), (["--replacement", "lru"], 2, "--cache"),
    (["--writeback", "--cache-mode", "none"], 2, "contradict")])
def test_wrong_options_for_a_backing_device(cli: Cli, backing: Path, words: list[str], status: int, why: str) -> None:
    before = digest(backing)
    refused = cli("format", "--backing", backing, *words)
    assert refused.status == status, refused
    assert why in refused.err
    assert digest(backing) == before


def test_two_caches_are_refused(cli: Cli, cache: Path, tmp_path: Path) -> None:
    other = sparse(tmp_path / "other", 512 * MIB)
    refused = cli("format", "--cache", cache, other)
    assert refused.status == 3
    assert "one cache device" in refused.err


def test_one_device_twice_is_refused(cli: Cli, cache: Path, tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(cache)
    refused = cli("format", "--cache", cache, "--backing", link)
    assert refused.status == 2
    assert "same device" in refused.err


def test_bcache_superblock_is_refused(cli: Cli, cache: Path, backing: Path) -> None:
    assert cli("format", "--cache", cache, "--backing", backing).status == 0
    before = digest(backing)
    refused = cli("format", "--backing", backing)
    assert refused.status == 3
    assert "bcache backing device already" in refused.err
    assert "--force=bcache" in refused.err
    assert digest(backing) == before
    assert cli("format", "--backing", backing, "--wipe-bcache").status == 0
    assert cli("format", "--backing", backing, "--force", "bcache").status == 0
    assert cli("format", "--backing", backing, "--force=signature").status == 3


def test_dirty_backing_device_is_named(cli: Cli, golden: Callable[..., Path]) -> None:
    image = golden("dirty_crash", writable=True) / "back0.img"
    assert "with dirty data on its cache" in cli("format", "--backing", image).err


SIGNATURES = {
    "xfs": (0, b"XFSB"), "crypto_LUKS": (0, b"LUKS\xba\xbe"), "linux_raid_member": (4096, b"\xfc\x4e\x2b\xa9"),
    "LVM2_member": (512 + 24, b"LVM2 001"), "gpt": (512, b"EFI PART"), "btrfs": (0x10040, b"_BHRfS_M"),
    "swap": (4086, b"SWAPSPACE2"), "iso9660": (0x8001, b"CD001"), "ntfs": (3, b"NTFS    "), "vfat": (82, b"FAT32   "),
    "zfs_member": (132 << 10, (0x00BAB10C).to_bytes(8, "little")), "f2fs": (1024, b"\x10\x20\xf5\xf2"),
    "ext2": (0x438, b"\x53\xef"), "bcachefs": (4120, bytes.fromhex("c68573f666ce90a9d96a60cf803df7ef")),
}


@pytest.mark.parametrize("name", SIGNATURES)
def test_signature_is_refused(cli: Cli, backing: Path, name: str) -> None:
    offset, magic = SIGNATURES[name]
    with backing.open("r+b") as file:
        file.seek(offset)
        file.write(magic)
    before = digest(backing)
    refused = cli("format", "--backing", backing)
    assert refused.status == 3
    assert f"signature of {name}" in refused.err
    assert "--force=signature" in refused.err
    assert digest(backing) == before
    assert cli("format", "--backing", backing, "--force=signature").status == 0
    assert magic not in backing.read_bytes()[offset:offset + 512], "nobody shall find the old one"
    assert superblock(backing).is_backing


@pytest.mark.parametrize(("where", "name"), [(-512, "gpt"), (-4096, "gpt"), (-65536, "linux_raid_member"),
                                             (-8192, "linux_raid_member")])
def test_signature_at_the_end_is_refused(cli: Cli, backing: Path, where: int, name: str) -> None:
    with backing.open("r+b") as file:
        file.seek(where, os.SEEK_END)
        file.write(b"EFI PART" if name == "gpt" else b"\xfc\x4e\x2b\xa9")
    assert f"signature of {name}" in cli("format", "--backing", backing).err


def test_partition_table_is_refused(cli: Cli, backing: Path) -> None:
    entry = struct.pack("<B3sB3sII", 0x80, b"\0" * 3, 0x83, b"\0" * 3, 2048, 4096)
    with backing.open("r+b") as file:
        file.seek(446)
        file.write(entry + bytes(48) + b"\x55\xaa")
    assert "signature of dos" in cli("format", "--backing", backing).err


@pytest.mark.parametrize("kind", ["ext2", "ext3", "ext4"])
def test_real_file_systems(cli: Cli, backing: Path, kind: str) -> None:
    tool = need_tool("mke2fs")
    subprocess.run([tool, "-q", "-F", "-t", kind, backing], check=True)
    assert f"signature of {kind}" in cli("format", "--backing", backing).err


def test_dry_run_writes_nothing_and_says_all(cli: Cli, cache: Path, backing: Path) -> None:
    with backing.open("r+b") as file:
        file.seek(0x10040)
        file.write(b"_BHRfS_M")
    before = digest(cache), digest(backing)
    words = ("format", "--cache", cache, "--backing", backing, "--force=signature")
    said = cli(*words, "--dry-run")
    assert said.status == 0
    assert (digest(cache), digest(backing)) == before
    assert said.out.splitlines() == [
        f"{backing}: write 8192 bytes at byte 0: start of the device and old superblock",
        f"{backing}: write 512 bytes at byte 65536: magic of btrfs",
        f"{cache}: write 8192 bytes at byte 0: start of the device and old superblock",
        f"{backing}: write 4096 bytes at byte 4096: superblock",
        f"{cache}: write 4096 bytes at byte 4096: superblock"]
    machine = json.loads(cli(*words, "--dry-run", "--json").out)
    assert [write["length_bytes"] for write in machine["writes"]] == [8192, 512, 8192, 4096, 4096]
    assert machine["dry_run"] is True


def test_undo(cli: Cli, backing: Path) -> None:
    with backing.open("r+b") as file:
        file.write(os.urandom(16384))
        file.seek(0x10040)
        file.write(b"_BHRfS_M")
    before = digest(backing)
    made = cli("format", "--backing", backing, "--force=signature")
    undo_file = re.search(r"`bcachectl undo (.*)`", made.out)
    assert undo_file is not None
    assert digest(backing) != before
    dry = cli("undo", undo_file.group(1), "--dry-run")
    assert dry.status == 0
    assert superblock(backing).is_backing
    assert cli("undo", undo_file.group(1)).status == 0
    assert digest(backing) == before


def test_nothing_to_undo_on_an_empty_device(cli: Cli, backing: Path, tmp_path: Path) -> None:
    assert "`bcachectl undo" not in cli("format", "--backing", backing).out
    assert not (tmp_path / "state").exists()


def test_t10_reused_set_uuid_finds_no_old_journal(cli: Cli, golden: Callable[..., Path]) -> None:
    """Trap 10: entries of the set's former life would stand behind the new ones with higher numbers."""
    image = golden("dirty_crash", writable=True) / "cache.img"
    old = superblock(image)
    assert jset_magic(old.set_uuid).to_bytes(8, "little") in image.read_bytes()
    uuid_text = old.set_uuid.hex()
    made = cli("format", "--cache", image, "--set-uuid", uuid_text, "--bucket-size", "64k", "--force=bcache",
               "--force=dirty")
    assert made.status == 0, made.err
    data = image.read_bytes()
    sb = superblock(image)
    start, end = sb.first_bucket * 65536, (sb.first_bucket + sb.geometry.njournal_default) * 65536
    assert jset_magic(old.set_uuid).to_bytes(8, "little") not in data[start:end]
    ran = replace(sb, flags=1).with_journal_buckets(sb.geometry.njournal_default)
    walk = Walk(lambda sector, count: data[sector << 9:(sector + count) << 9], len(data) >> 9)
    walk.superblock, walk.geometry = ran, ran.geometry
    assert [str(item) for item in walk._walk_journal() if isinstance(item, Damage)] == [
        "journal: no journal entries found"]


def test_crash_at_any_write_leaves_nothing_half_valid(golden: Callable[..., Path]) -> None:
    """After any prefix of the plan each device has its old superblock, none at all, or its new one, and a cache has its
    new one only when the old journal is gone."""
    story = golden("dirty_crash", writable=True)
    paths = str(story / "cache.img"), str(story / "back0.img")
    old = superblock(paths[0])
    request = formatter.Request(caches=(paths[0],), backings=(paths[1],), bucket_bytes=65536, set_uuid=old.set_uuid,
                                force=frozenset(["bcache"]))
    devices: dict[str, BlockDevice] = {path: open_device(path, write=True) for path in paths}
    plan, superblocks = formatter.plan_format(request, devices, lambda: os.urandom(16))
    assert [write.what for write in plan.steps[-1]] == ["superblock"]
    assert plan.steps[-1][0].device == paths[0], "the cache's comes last"
    for number, step in enumerate(plan.steps):
        writeplan.apply(writeplan.Plan("format", (step,)), devices)
        done = {write.device for earlier in plan.steps[:number + 1] for write in earlier if write.what == "superblock"}
        for path in paths:
            raw = devices[path].read(4096, SB_BYTES)
            assert decode_superblock(raw).uuid == superblocks[path].uuid if path in done else raw == bytes(SB_BYTES)
    for device in devices.values():
        device.close()


def test_logical_blocks_of_the_devices_count(cli: Cli, tmp_path: Path, loop_device: Callable[..., str]) -> None:
    small = loop_device(sparse(tmp_path / "small", 600 << 19))
    large = loop_device(sparse(tmp_path / "large", 64 * MIB), sector_bytes=4096)
    refused = cli("format", "--cache", small, "--backing", large, "--block-size", "512")
    assert refused.status == 3
    assert f"{large}: has logical blocks of 4096 bytes" in refused.err
    assert cli("format", "--cache", small).status == 0
    assert superblock(small).block_size == 1
    assert cli("format", "--cache", small, "--backing", large, "--force=bcache").status == 0
    assert superblock(small).block_size == superblock(large).block_size == 8


def test_discard_empties_a_block_device(cli: Cli, cache: Path, loop_device: Callable[..., str]) -> None:
    with cache.open("r+b") as file:
        file.seek(100 * MIB)
        file.write(os.urandom(MIB))
    device = loop_device(cache)
    words = ("format", "--cache", device, "--discard")
    assert f"{device}: discard {512 * MIB} bytes at byte 0: whole device, if it can" in cli(*words, "--dry-run").out
    assert cache.read_bytes().count(0) < 512 * MIB - MIB // 2
    assert cli(*words).status == 0
    assert superblock(cache).discard
    assert [at for at, _data in digest(cache)] == [4096, 512 * MIB]


def test_image_of_make_bcache_differs_in_uuids_alone(cli: Cli, cache: Path, backing: Path, tmp_path: Path) -> None:
    tool = need_tool("make-bcache")
    other_cache, other_backing = sparse(tmp_path / "c2", 512 * MIB), sparse(tmp_path / "b2", 64 * MIB)
    subprocess.run([tool, "-C", other_cache, "-B", other_backing, "--writeback", "-o", "64"], check=True,
                   capture_output=True)
    assert cli("format", "-C", cache, "-B", backing, "--writeback", "-o", "64").status == 0
    for ours, theirs in ((cache, other_cache), (backing, other_backing)):
        one, two = superblock(ours), superblock(theirs)
        # Tools before 1.1 fill in a bucket size for backing devices, where it means nothing.
        assert replace(one, uuid=two.uuid, set_uuid=two.set_uuid, csum=two.csum,
                       bucket_size_raw=two.bucket_size_raw) == two
        assert one.bucket_size_raw == (two.bucket_size_raw if one.is_cache else 0)


def test_sparse_tebibyte_is_quick(cli: Cli, tmp_path: Path) -> None:
    image = sparse(tmp_path / "c", 1 << 40)
    began = time.monotonic()
    assert cli("format", "--cache", image, "--set-uuid", "11" * 16).status == 0
    assert time.monotonic() - began < 5
    assert image.stat().st_blocks * 512 < MIB
    assert superblock(image).nbuckets == 1 << 21


@pytest.mark.parametrize(("size_kib", "said"), [
    (1024, "use a device of at least 4104 KiB"), (4103, "use a device of at least 4104 KiB"),
    (4104, "use --bucket-size 8k or less"), (40 << 10, "use --bucket-size 64k or less"),
    (250 << 10, "use --bucket-size 256k or less")])
def test_a_device_too_small_for_its_buckets(cli: Cli, tmp_path: Path, size_kib: int, said: str) -> None:
    """The refusal names buckets that fit, and they do."""
    cache = tmp_path / "cache.img"
    cache.touch()
    os.truncate(cache, size_kib << 10)
    refused = cli("format", "--cache", cache)
    assert refused.status == 3
    assert said in refused.err
    if "--bucket-size" in said:
        size = said.split()[2]
        assert cli("format", "--cache", cache, "--bucket-size", f"{int(size[:-1]) * 2}k").status == 3
        assert cli("format", "--cache", cache, "--bucket-size", size).status == 0


@pytest.mark.parametrize("name", ["cache.img", "back0.img"])
def test_data_that_is_nowhere_else_takes_a_word_of_its_own(cli: Cli, golden: Callable[..., Path], name: str) -> None:
    """A superblock alone can be put back, and what --discard takes cannot."""
    images = golden("dirty_crash", writable=True)
    device = images / name
    option = "--cache" if name == "cache.img" else "--backing"
    more = ["--bucket-size", "64k", *(["--discard"] if option == "--cache" else [])]
    before = digest(device)
    for force in (["--force=bcache"], ["--wipe-bcache"], ["--wipe-bcache", "--dry-run"]):
        refused = cli("format", option, device, *more, *force)
        assert (refused.status, refused.out, refused.err.count("\n")) == (3, "", 1)
        assert "--force=dirty overrides this check" in refused.err
        assert "`bcachectl writeback`" in refused.err
    assert cli("format", option, device, *more, "--force=dirty").status == 3
    assert digest(device) == before
    assert cli("format", option, device, *more, "--force=bcache", "--force=dirty").status == 0


def test_a_damaged_cache_device_may_hold_the_only_copy(cli: Cli, golden: Callable[..., Path]) -> None:
    cache = golden("dirty_crash", writable=True) / "cache.img"
    with cache.open("r+b") as file:
        file.seek(4096 + 80)
        file.write(b"x")
    for words in (["wipe", cache], ["format", "--cache", cache, "--bucket-size", "64k", "--force=bcache"]):
        refused = cli(*words)
        assert (refused.status, refused.out) == (3, "")
        assert "is damaged, and may hold data that its volumes have nowhere else" in refused.err
