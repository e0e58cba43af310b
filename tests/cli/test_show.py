# SPDX-License-Identifier: GPL-2.0-only
"""`show`, and above all its second form, which must be what bcache-super-show 1.0.8 prints, byte for byte."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from bcachectl.ondisk.superblock import BdevState, CacheMode, Superblock, encode_superblock
from tests.cli.conftest import Result
from tests.require import find_tool

STORIES = ("fresh", "attached_clean", "dirty_crash", "deep_crash", "thrash_crash", "killed", "two_backing",
           "flash_volume", "fifo_discard", "gen_churn")
UUID = bytes(range(16))
SET_UUID = bytes(range(100, 116))
CACHE = Superblock(version=3, uuid=UUID, set_uuid=SET_UUID, flags=1, seq=7, nbuckets=1024, block_size=8,
                   bucket_size_raw=128, nr_in_set=1, first_bucket=1, keys=8, d=tuple(range(1, 9)))
BACKING = Superblock(version=1, uuid=UUID, set_uuid=SET_UUID, block_size=8, data_offset=16, bucket_size_raw=128)


def image_of(directory: Path, sb: Superblock) -> Path:
    path = directory / "image"
    with path.open("wb") as file:
        file.truncate(128 << 20)
        file.seek(4096)
        file.write(encode_superblock(sb))
    return path


@pytest.mark.parametrize("name", STORIES)
def test_super_show_golden(cli: Callable[..., Result], golden: Callable[..., Path], name: str) -> None:
    story = golden(name)
    expected = re.split(r"^== (.*)\n", (story / "super.txt").read_text(), flags=re.MULTILINE)[1:]
    assert len(expected) == 2 * len(list(story.glob("*.img")))
    for image, text in zip(expected[::2], expected[1::2], strict=True):
        shown = cli("show", "--format=bcache-super-show", story / image)
        assert shown == Result(0, text, "")


T24 = {
    "label with odd characters": replace(BACKING, label="a b/ä._-Z9%\n".encode().ljust(32, b"\0")),
    "label of 32 bytes": replace(BACKING, label=b"x" * 32),
    "label with garbage behind its end": replace(BACKING, label=b"name\0garbage".ljust(32, b"\0")),
    "version 0": replace(CACHE, version=0),
    "version 2": replace(CACHE, version=2),
    "version 3": CACHE,
    "version 4": replace(BACKING, version=4, data_offset=2048),
    "version 5": replace(CACHE, version=5),
    "version 6": replace(BACKING, version=6, data_offset=2048),
    "version 77": replace(CACHE, version=77),
    "replacement 5": replace(CACHE, flags=1 | 5 << 2),
    "discard, never ran": replace(CACHE, flags=2 | 2 << 2, keys=0, d=()),
    "unknown policy word of make-bcache": replace(CACHE, flags=(-22 << 2) & ((1 << 64) - 1)),
    "mode 7": replace(BACKING, flags=7),
    "mode none, inconsistent": BACKING.with_cache_mode(CacheMode.NONE).with_state(BdevState.STALE),
    "writearound, clean": BACKING.with_cache_mode(CacheMode.WRITEAROUND).with_state(BdevState.CLEAN),
    "large buckets, log form": replace(CACHE, version=5, feature_incompat=2, bucket_size_raw=17),
    "experimental format by keys": replace(BACKING, version=4, keys=1, d=(0,)),
    "experimental format by d": replace(BACKING, version=4, keys=2, d=(5, 0)),
    "two keys, d zero": replace(BACKING, version=4, keys=2, d=(0, 5)),
    "wrong sector": replace(CACHE, offset=9),
    "wrong magic": replace(CACHE, magic=b"x" * 16),
}


@pytest.mark.parametrize("name", T24)
def test_t24_super_show(cli: Callable[..., Result], tmp_path: Path, name: str) -> None:
    """T24: whatever the superblock, the text is the tool's; compared with the tool itself where it is installed."""
    image = image_of(tmp_path, T24[name])
    shown = cli("show", "--format=bcache-super-show", image)
    assert shown.out.startswith("sb.magic\t\t")
    assert (shown.status == 0) == (shown.err == "")
    tool = find_tool("bcache-super-show")
    if tool is not None:
        real = subprocess.run([tool, image], capture_output=True)
        assert shown.out.encode() == real.stdout
        assert shown.err.removeprefix(f"bcachectl: {image}: ").encode() == real.stderr


def test_t24_checksum_with_leading_zeros(cli: Callable[..., Result], tmp_path: Path) -> None:
    """T24: the tool prints the checksum without leading zeros."""
    number = 0
    while (raw := encode_superblock(replace(BACKING, last_mount=number)))[7]:
        number += 1
    csum = int.from_bytes(raw[:8], "little")
    shown = cli("show", "--format=bcache-super-show", image_of(tmp_path, replace(BACKING, last_mount=number)))
    assert f"sb.csum\t\t\t{csum:X} [match]" in shown.out
    assert len(f"{csum:X}") < 15


def test_wrong_checksum_in_super_show(cli: Callable[..., Result], tmp_path: Path) -> None:
    image = image_of(tmp_path, CACHE)
    raw = bytearray(image.read_bytes()[:8192])
    expected = int.from_bytes(raw[4096:4104], "little")
    raw[4096] ^= 1
    with image.open("r+b") as file:
        file.write(raw)
    shown = cli("show", "--format=bcache-super-show", image)
    assert shown.status == 1
    assert shown.out.splitlines()[2] == f"sb.csum\t\t\t{expected ^ 1:X} [expected {expected:X}]"
    assert shown.err == f"bcachectl: {image}: Corrupt superblock (bad csum)\n"


@pytest.mark.parametrize("name", T24)
def test_text_and_json_say_everything(cli: Callable[..., Result], tmp_path: Path, name: str) -> None:
    image = image_of(tmp_path, T24[name])
    shown, machine = cli("show", image), cli("show", "--json", image)
    assert shown.status == machine.status
    if name == "wrong magic":
        assert "no bcache superblock" in shown.err
        return
    document = json.loads(machine.out)
    assert document["schema"] == 1
    assert document["kind"] == "superblock"
    for field in document["superblock"]:
        if not field.endswith(("_text", "_good", "_expected")) and field != "role":
            assert f"\n  {field} " in shown.out
    said = document["superblock"]["flags_text"] + document["superblock"]["features_text"]
    assert all(sentence in shown.out for sentence in said)
    assert (document["problem"] is None) == (shown.status == 0)
    assert shown.out.splitlines()[-1] == ("The kernel takes it." if document["problem"] is None
                                          else f"The kernel refuses it: {document['problem']}")


def test_unknown_flag_bits_are_named(cli: Callable[..., Result], tmp_path: Path) -> None:
    shown = cli("show", image_of(tmp_path, T24["unknown policy word of make-bcache"]))
    assert "unknown bits 0xffffffffffffffa0" in shown.out
