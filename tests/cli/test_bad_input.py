# SPDX-License-Identifier: GPL-2.0-only
"""Whatever is wrong with a device ends in one sentence on stderr that names it, and in the right exit status."""

from __future__ import annotations

import fcntl
import os
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from bcachectl.ondisk.superblock import SB_BYTES, Superblock, decode_superblock, encode_superblock, judge_csum
from tests.cli.conftest import Result
from tests.require import need_tool

Cli = Callable[..., Result]
Golden = Callable[..., Path]

OK, FAILED, USAGE, REFUSED, STATE = range(5)
SB_START = 4096


def one_sentence(result: Result, status: int, *words: str) -> None:
    assert result.status == status, result
    lines = result.err.splitlines()
    assert len(lines) == 1, result.err
    assert lines[0].startswith("bcachectl: ")
    for word in words:
        assert word in lines[0], lines[0]


def patch(image: Path, offset: int, data: bytes) -> None:
    with image.open("r+b") as file:
        file.seek(offset)
        file.write(data)


def change_superblock(image: Path, change: Callable[[Superblock], Superblock]) -> None:
    raw = image.read_bytes()[SB_START:SB_START + SB_BYTES]
    patch(image, SB_START, encode_superblock(change(decode_superblock(raw)), raw))


READERS = [("show",), ("dump", "btree"), ("dump", "superblock"), ("where", "bcache0", "0", "--cache")]


@pytest.mark.parametrize("words", READERS, ids=" ".join)
class TestNoDevice:
    """What is no device at all; every reading verb says the same."""

    def test_missing(self, cli: Cli, tmp_path: Path, words: tuple[str, ...]) -> None:
        path = tmp_path / "nothing"
        one_sentence(cli(*words, path), FAILED, str(path), "no such file or device")

    def test_directory(self, cli: Cli, tmp_path: Path, words: tuple[str, ...]) -> None:
        one_sentence(cli(*words, tmp_path), FAILED, str(tmp_path), "is a directory")

    def test_character_device(self, cli: Cli, words: tuple[str, ...]) -> None:
        one_sentence(cli(*words, "/dev/null"), FAILED, "/dev/null", "character device")

    def test_zero_length(self, cli: Cli, tmp_path: Path, words: tuple[str, ...]) -> None:
        path = tmp_path / "empty"
        path.touch()
        one_sentence(cli(*words, path), FAILED, str(path), "is empty")

    def test_too_short_for_a_superblock(self, cli: Cli, tmp_path: Path, words: tuple[str, ...]) -> None:
        path = tmp_path / "short"
        path.write_bytes(bytes(6000))
        one_sentence(cli(*words, path), FAILED, str(path), "too small for a bcache superblock")

    def test_something_else(self, cli: Cli, tmp_path: Path, words: tuple[str, ...]) -> None:
        path = tmp_path / "zeros"
        path.write_bytes(bytes(1 << 20))
        one_sentence(cli(*words, path), FAILED, str(path), "no bcache superblock")


def test_no_permission(cli: Cli, tmp_path: Path) -> None:
    path = tmp_path / "mine"
    path.write_bytes(bytes(1 << 20))
    path.chmod(0)
    is_root = os.geteuid() == 0
    if is_root:
        os.seteuid(65534)
    try:
        shown = cli("show", path)
    finally:
        if is_root:
            os.seteuid(0)
    one_sentence(shown, FAILED, str(path), "permission denied")


class TestSuperblock:
    """A superblock that the kernel would refuse: shown with the reason, and walked no further than is safe."""

    @pytest.fixture
    def image(self, golden: Golden) -> Path:
        return golden("dirty_crash", writable=True) / "cache.img"

    def test_bad_checksum(self, cli: Cli, image: Path) -> None:
        patch(image, SB_START + 72, b"x")
        shown = cli("show", image)
        assert (shown.status, shown.err) == (FAILED, "")
        assert "bad, expected" in shown.out
        assert "The kernel refuses it: Bad checksum" in shown.out
        one_sentence(cli("dump", "btree", image), FAILED, str(image), "superblock: Bad checksum")

    @pytest.mark.parametrize("version", [2, 7, 255])
    def test_p6_unknown_version(self, cli: Cli, image: Path, version: int) -> None:
        change_superblock(image, lambda sb: replace(sb, version=version))
        shown = cli("show", image)
        assert shown.status == FAILED
        assert "Unsupported superblock version" in shown.out
        one_sentence(cli("dump", "btree", image), FAILED, str(image), "Unsupported superblock version")

    @pytest.mark.parametrize(("field", "why"), [
        ("feature_incompat", "Unsupported incompatible feature found"),
        ("feature_ro_compat", "Unsupported read-only compatible feature found"),
        ("feature_compat", "Unsupported compatible feature found")])
    def test_p6_unknown_feature(self, cli: Cli, image: Path, field: str, why: str) -> None:
        change_superblock(image, lambda sb: replace(sb, version=5, **{field: 0x10}))
        shown = cli("show", image)
        assert shown.status == FAILED
        assert why in shown.out
        assert "0x10: unknown, refused" in shown.out
        one_sentence(cli("dump", "btree", image), FAILED, str(image), why)

    def test_too_many_journal_buckets(self, cli: Cli, image: Path) -> None:
        raw = bytearray(image.read_bytes()[SB_START:SB_START + SB_BYTES])
        raw[206:208] = (257).to_bytes(2, "little")
        raw[:8] = judge_csum(raw)[1].to_bytes(8, "little")
        patch(image, SB_START, bytes(raw))
        assert "Too many journal buckets" in cli("show", image).out
        one_sentence(cli("dump", "journal", image), FAILED, str(image), "Too many journal buckets")

    def test_never_ran(self, cli: Cli, golden: Golden) -> None:
        image = golden("fresh") / "cache.img"
        assert cli("show", image).status == OK
        one_sentence(cli("dump", "journal", image), STATE, str(image), "never ran")

    def test_backing_device_as_cache(self, cli: Cli, golden: Golden) -> None:
        image = golden("dirty_crash") / "back0.img"
        one_sentence(cli("dump", "btree", image), USAGE, str(image), "is a backing device", "name the cache device")

    def test_cache_as_backing_device(self, cli: Cli, golden: Golden) -> None:
        image = golden("dirty_crash") / "cache.img"
        one_sentence(cli("where", image, "0", "--cache", image), USAGE, str(image), "is not a backing device")

    def test_backing_device_of_another_set(self, cli: Cli, golden: Golden) -> None:
        backing, cache = golden("dirty_crash") / "back0.img", golden("thrash_crash") / "cache.img"
        one_sentence(cli("where", backing, "0", "--cache", cache), STATE, str(backing), "belongs to set", str(cache))


class TestTruncated:
    """An image that was cut short, at several places."""

    def test_in_the_middle(self, cli: Cli, golden: Golden) -> None:
        image = golden("dirty_crash", writable=True) / "cache.img"
        os.truncate(image, 32 << 20)
        shown = cli("show", image)
        assert shown.status == FAILED
        assert "device too small" in shown.out
        dumped = cli("dump", "btree", image)
        assert dumped.status == FAILED
        assert "Invalid superblock: device too small" in dumped.err
        assert dumped.out.startswith("INODE"), "what is left is shown all the same"

    def test_behind_the_superblock(self, cli: Cli, golden: Golden) -> None:
        image = golden("dirty_crash", writable=True) / "cache.img"
        os.truncate(image, 8192)
        dumped = cli("dump", "btree", image)
        assert dumped.status == FAILED
        assert "no journal entries found" in dumped.err
        assert all(line.startswith(f"bcachectl: {image}: ") for line in dumped.err.splitlines())


class TestBadChecksums:
    """One wrong byte in each structure: it is named, the rest is printed, the exit status is 1."""

    @pytest.fixture
    def image(self, golden: Golden) -> Path:
        return golden("thrash_crash", writable=True) / "cache.img"

    def flip(self, image: Path, sector: int) -> None:
        at = (sector << 9) + 40
        byte = image.read_bytes()[at]
        patch(image, at, bytes([byte ^ 1]))

    def test_prio_set(self, cli: Cli, image: Path) -> None:
        self.flip(image, 732 * 64)
        dumped = cli("dump", "prio", image)
        assert "732" in dumped.err
        one_sentence(dumped, FAILED, str(image), "bad csum reading priorities")

    def test_btree_root(self, cli: Cli, image: Path) -> None:
        self.flip(image, 20288)
        dumped = cli("dump", "btree", image)
        one_sentence(dumped, FAILED, str(image), "btree node at bucket", "level 1", "bad checksum")
        assert "dirty" in dumped.out, "the journal's keys are left"

    def test_btree_leaf(self, cli: Cli, image: Path) -> None:
        self.flip(image, 9536)
        whole = cli("dump", "btree", image).out
        one_sentence(cli("dump", "extents", image), FAILED, str(image), "level 0", "bad checksum")
        one_sentence(cli("where", "bcache0", "0", "--cache", image), FAILED, str(image), "bad checksum")
        assert max(int(line.split()[2]) for line in whole.splitlines()[1:]) > 115992, "the other leaf is left"

    def test_journal(self, cli: Cli, image: Path) -> None:
        """A bad entry ends the walk of its bucket, as in the kernel; the entries before it still count."""
        entries = [line.split() for line in cli("dump", "journal", image).out.splitlines()[1:]]
        newest = max(entries, key=lambda fields: int(fields[0]))
        at = (1 + int(newest[2])) * 32768 + int(newest[3])
        patch(image, at, b"\xff")
        left = cli("dump", "journal", image)
        assert left.status == OK, "a torn entry is what any crash leaves"
        assert newest[0] not in [line.split()[0] for line in left.out.splitlines()]
        assert int(newest[0]) - 1 == max(int(line.split()[0]) for line in left.out.splitlines()[1:])

    def test_everything_behind_the_superblock(self, cli: Cli, image: Path) -> None:
        size = image.stat().st_size
        patch(image, 16384, b"\xa5" * (size - 16384))
        for structure in ("uuids", "prio", "journal", "btree", "extents"):
            one_sentence(cli("dump", structure, image), FAILED, str(image), "no journal entries found")


class TestInUse:
    """Devices that somebody holds are refused by every verb that writes, and listed by those that read."""

    @pytest.mark.parametrize("words", [("format", "--backing"), ("wipe",)], ids=" ".join)
    def test_locked_file(self, cli: Cli, golden: Golden, words: tuple[str, ...]) -> None:
        image = golden("fresh", writable=True) / "back0.img"
        with image.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            one_sentence(cli(*words, image), REFUSED, str(image), "in use")

    @pytest.mark.parametrize("words", [("format", "--backing"), ("wipe",)], ids=" ".join)
    def test_file_behind_a_loop_device(self, cli: Cli, golden: Golden, loop_device: Callable[..., str],
                                       words: tuple[str, ...]) -> None:
        image = golden("fresh", writable=True) / "back0.img"
        device = loop_device(image)
        one_sentence(cli(*words, image), REFUSED, str(image), f"the file behind {device}")

    def test_claimed_block_device(self, cli: Cli, golden: Golden, loop_device: Callable[..., str]) -> None:
        device = loop_device(golden("fresh", writable=True) / "back0.img")
        fd = os.open(device, os.O_RDONLY | os.O_EXCL)
        try:
            one_sentence(cli("wipe", device), REFUSED, device, "in use")
        finally:
            os.close(fd)

    def test_mounted(self, cli: Cli, tmp_path: Path, loop_device: Callable[..., str]) -> None:
        image, place = tmp_path / "image", tmp_path / "place with blanks"
        with image.open("wb") as file:
            file.truncate(16 << 20)
        place.mkdir()
        subprocess.run([need_tool("mke2fs"), "-q", "-F", image], check=True)
        device = loop_device(image)
        subprocess.run([need_tool("mount"), device, place], check=True)
        try:
            for words in (("format", "--force=signature", "--cache"), ("wipe",), ("format", "--backing")):
                one_sentence(cli(*words, device), REFUSED, device, f"mounted on {place}")
        finally:
            subprocess.run([need_tool("umount"), place], check=True)

    def test_read_only_block_device(self, cli: Cli, golden: Golden, loop_device: Callable[..., str]) -> None:
        device = loop_device(golden("fresh", writable=True) / "back0.img", read_only=True)
        one_sentence(cli("wipe", device), FAILED, device, "read-only")


class TestFailingDevices:
    """EIO, and no room: one sentence, and nothing that could be taken for a whole superblock."""

    @pytest.fixture
    def broken(self, golden: Golden, loop_device: Callable[..., str]) -> str:
        # Behind the end of its file a loop device answers EIO.
        image = golden("dirty_crash", writable=True) / "cache.img"
        device = loop_device(image)
        os.truncate(image, 4096)
        subprocess.run([need_tool("blockdev"), "--flushbufs", device], check=True)
        return device

    @pytest.mark.parametrize("words", [*READERS, ("wipe",), ("format", "--backing"),
                                       ("format", "--bucket-size", "64k", "--cache")], ids=" ".join)
    def test_eio(self, cli: Cli, broken: str, words: tuple[str, ...]) -> None:
        one_sentence(cli(*words, broken), FAILED, broken, "Input/output error")

    def test_eio_in_list(self, cli: Cli, broken: str) -> None:
        listed = cli("list", broken)
        assert listed.status == FAILED
        assert f"{broken}: read at byte 4096 failed: Input/output error" in listed.out

    def test_no_room_under_the_image(self, cli: Cli, tmp_path: Path) -> None:
        place = tmp_path / "small"
        place.mkdir()
        subprocess.run([need_tool("mount"), "-t", "tmpfs", "-o", "size=8k", "none", place], check=True)
        try:
            image = place / "image"
            with image.open("wb") as file:
                file.truncate(400 << 20)
                file.seek(100 << 20)
                file.write(b"x" * 4096)
            one_sentence(cli("format", "--cache", image), FAILED, str(image), "No space left on device")
            assert cli("show", image).status == FAILED
        finally:
            subprocess.run([need_tool("umount"), place], check=True)

    def test_no_room_for_the_undo_file(self, cli: Cli, golden: Golden, tmp_path: Path) -> None:
        image = golden("fresh", writable=True) / "back0.img"
        before = image.read_bytes()
        place = tmp_path / "small"
        place.mkdir()
        subprocess.run([need_tool("mount"), "-t", "tmpfs", "-o", "size=4k", "none", place], check=True)
        try:
            failed = cli("wipe", image, "--backup", place / "undo")
            one_sentence(failed, FAILED, str(place), "nothing was changed")
            assert list(place.iterdir()) == [], "half an undo file is none"
            assert image.read_bytes() == before
        finally:
            subprocess.run([need_tool("umount"), place], check=True)


class TestUsage:
    """Mistakes on the command line: exit status 2, and where to read on."""

    @pytest.mark.parametrize("words", [
        (), ("lost",), ("show",), ("show", "--lost", "x"), ("dump", "nothing", "x"), ("engine",), ("engine", "walk"),
        ("where", "bcache0", "-5", "--cache", "x"), ("format", "--cache-mode", "fast")])
    def test_wrong(self, cli: Cli, words: tuple[str, ...]) -> None:
        one_sentence(cli(*words), USAGE, "--help`")

    def test_fsck_has_its_own_exit_statuses(self, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
        """As fsck(8): 16 for the command line, 8 for an operation that failed, 32 when interrupted."""
        one_sentence(cli("fsck"), 16, "--help`")
        one_sentence(cli("fsck", "--lost", "x"), 16, "--help`")
        one_sentence(cli("fsck", "/nowhere"), 8, "/nowhere")

        def interrupted(*_arguments: object, **_options: object) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr("bcachectl.blockdev.os.stat", interrupted)
        assert cli("fsck", "/nowhere").status == 32

    def test_kernel_format_for_something_else(self, cli: Cli, golden: Golden) -> None:
        image = golden("dirty_crash") / "cache.img"
        one_sentence(cli("dump", "prio", image, "--format=kernel"), USAGE, "dump btree")

    def test_behind_the_end(self, cli: Cli, golden: Golden) -> None:
        story = golden("dirty_crash")
        result = cli("where", story / "back0.img", 196592, 1, "--cache", story / "cache.img")
        one_sentence(result, USAGE, "behind its end")

    def test_where_without_engine_or_cache(self, cli: Cli) -> None:
        one_sentence(cli("where", "bcache0", 0), STATE, "bcache0", "--cache")

    def test_unknown_volume(self, cli: Cli, golden: Golden) -> None:
        story = golden("two_backing")
        one_sentence(cli("where", "bcache2", 0, "--cache", story / "cache.img"), STATE, "bcache2", "bcache0", "bcache1")


def test_a_bug_is_one_sentence_too(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_arguments: object, **_options: object) -> None:
        raise ZeroDivisionError("oops")

    monkeypatch.setattr("bcachectl.commands.show.open_device", broken)
    one_sentence(cli("show", "x"), FAILED, "a bug", "--debug", "ZeroDivisionError: oops (test_bad_input.py, line ")
    debugged = cli("show", "x", "--debug")
    assert debugged.status == FAILED
    assert "Traceback" in debugged.err


def test_interrupted(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_arguments: object, **_options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("bcachectl.commands.show.open_device", interrupted)
    assert cli("show", "x").status == 130
