# SPDX-License-Identifier: GPL-2.0-only
"""`bcachectl writeback` as a program: what it writes and what not, its map, its refusals and exit statuses."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from bcachectl.blockdev import BlockDevice
from bcachectl.errors import DeviceError
from bcachectl.ondisk.magic import INVALID_UUID
from bcachectl.ondisk.superblock import BdevState, decode_superblock
from bcachectl.units import format_uuid
from tests.cli.conftest import Result
from tests.faults import fail_reads
from tests.fsck.image import Image

Cli = Callable[..., Result]
DATA_BYTES = 16 << 9


def digest(path: Path, skip_bytes: int = 0) -> str:
    return hashlib.sha256(path.read_bytes()[skip_bytes:]).hexdigest()


def state(path: Path) -> BdevState:
    return decode_superblock(path.read_bytes()[4096:8192]).state


def volume_digest(story: Path, number: int = 0) -> str:
    found: str = json.loads((story / f"truth{number}.json").read_text())["sha256"]
    return found


def writes_end(patch: pytest.MonkeyPatch, left: int, error: BaseException) -> None:
    """Devices take ``left`` more writes; those after them raise the error."""
    real = BlockDevice.write

    def write(self: BlockDevice, offset_bytes: int, data: bytes) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise error
        real(self, offset_bytes, data)

    patch.setattr(BlockDevice, "write", write)


@pytest.mark.parametrize("name", ["dirty_crash", "thrash_crash", "two_backing", "flash_volume"])
def test_write_back(cli: Cli, golden: Callable[..., Path], tmp_path: Path, name: str) -> None:
    images = golden(name, writable=True)
    cache, backings = images / "cache.img", sorted(images.glob("back*.img"))
    before = digest(cache)
    result = cli("writeback", cache, *backings, "--json", "--map", tmp_path / "map")
    assert (result.status, result.err) == (0, "")
    found = json.loads(result.out)
    assert (found["schema"], found["kind"]) == (1, "writeback")
    assert digest(cache) == before
    for number, (backing, device) in enumerate(zip(backings, found["devices"], strict=True)):
        assert digest(backing, DATA_BYTES) == volume_digest(golden(name), number)
        assert state(backing) is BdevState.CLEAN
        assert device["copied_bytes"] == device["dirty_bytes"] > 0
        assert device["marked_clean"]
        assert sum(int(line.split()[1], 16) for line in Path(device["map"]).read_text().splitlines()
                   if line.endswith("+") and line.count("0x") == 2) == device["copied_bytes"]
    after = [digest(backing) for backing in backings]
    again = cli("writeback", cache, *backings, "--map", tmp_path / "map")
    assert again.status == 0
    assert "0 B written back" in again.out
    assert "an earlier run" in again.out
    assert [digest(backing) for backing in backings] == after


def test_dry_run(cli: Cli, golden: Callable[..., Path], tmp_path: Path) -> None:
    story = golden("dirty_crash")
    before = {path: digest(path) for path in sorted(story.glob("*.img"))}
    words = ["writeback", story / "cache.img", story / "back0.img", "--dry-run", "--map", tmp_path / "map"]
    result = cli(*words)
    assert (result.status, result.err) == (0, "")
    lines = result.out.splitlines()
    assert lines[-1].endswith("back0.img: write 4096 bytes at byte 4096: superblock, state clean")
    assert len(lines) > 10
    found = json.loads(cli(*words, "--json").out)
    assert found["dry_run"]
    assert len(found["writes"]) == len(lines)
    assert sum(write["length_bytes"] for write in found["writes"][:-1]) == found["devices"][0]["dirty_bytes"]
    assert {path: digest(path) for path in sorted(story.glob("*.img"))} == before
    assert not (tmp_path / "map").exists()


def break_reads(monkeypatch: pytest.MonkeyPatch, cache: Path, start: int, end: int) -> None:
    """Reads of bytes [start, end) of the cache fail."""
    fail_reads(monkeypatch, lambda path, offset_bytes, nbytes: (
        path == str(cache) and offset_bytes < end and start < offset_bytes + nbytes))




def test_lost_sectors(cli: Cli, golden: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not marked clean without a word of the user's; the map and the report say exactly what is lost."""
    images = golden("dirty_crash", writable=True)
    cache, backing, map_file = images / "cache.img", images / "back0.img", tmp_path / "map"
    first = json.loads(cli("writeback", cache, backing, "--dry-run", "--json").out)["writes"][0]
    at = first["offset_bytes"]
    where = json.loads(cli("where", backing, (at - DATA_BYTES) >> 9, 1, "--cache", cache, "--json").out)["pieces"][0]
    place = where["device_sector"] << 9
    with monkeypatch.context() as patch:
        break_reads(patch, cache, place, place + 512)
        words = ["writeback", cache, backing, "--map", map_file]
        result = cli(*words, "--json")
        assert result.status == 3
        [device] = json.loads(result.out)["devices"]
        assert device["lost_ranges_bytes"] == [[at - DATA_BYTES, at - DATA_BYTES + 512]]
        assert not device["marked_clean"]
        assert state(backing) is BdevState.DIRTY
        assert f"0x{at:08X}  0x00000200  -" in map_file.read_text()
        text = cli(*words)
        assert text.status == 3
        assert f"lost bytes {at - DATA_BYTES} to {at - DATA_BYTES + 512} of the volume" in text.out
        assert "--accept-loss" in text.err
        assert cli(*words, "--accept-loss", "--files").status == 0
    assert state(backing) is BdevState.CLEAN
    assert cli("writeback", cache, backing, "--map", map_file).status == 0
    assert digest(backing, DATA_BYTES) == volume_digest(golden("dirty_crash"))


def test_interrupted(cli: Cli, golden: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Control-C after some writes: the map is kept, and the same command goes on from there."""
    images = golden("dirty_crash", writable=True)
    words = ["writeback", images / "cache.img", images / "back0.img", "--map", tmp_path / "map"]
    with monkeypatch.context() as patch:
        writes_end(patch, 5, KeyboardInterrupt())
        result = cli(*words)
    assert result.status == 130
    assert "goes on from there" in result.err
    assert state(images / "back0.img") is BdevState.DIRTY
    found = cli(*words, "--json")
    assert found.status == 0
    assert json.loads(found.out)["devices"][0]["earlier_bytes"] > 0
    assert digest(images / "back0.img", DATA_BYTES) == volume_digest(golden("dirty_crash"))


def test_failed_flush_marks_nothing(cli: Cli, golden: Callable[..., Path], tmp_path: Path,
                                    monkeypatch: pytest.MonkeyPatch) -> None:
    images = golden("dirty_crash", writable=True)
    flushes = 0

    def sync(self: BlockDevice) -> None:
        nonlocal flushes
        flushes += 1
        if flushes > 1:
            raise OSError(5, os.strerror(5))

    monkeypatch.setattr(BlockDevice, "sync", sync)
    result = cli("writeback", images / "cache.img", images / "back0.img", "--map", tmp_path / "map")
    assert result.status == 1
    assert "flush" in result.err
    assert state(images / "back0.img") is BdevState.DIRTY
    assert "+" not in "".join(line[-1] for line in (tmp_path / "map").read_text().splitlines() if line[0] == "0")


def test_map_after_the_set_ran(cli: Cli, golden: Callable[..., Path], tmp_path: Path) -> None:
    images = golden("dirty_crash", writable=True)
    words = ["writeback", images / "cache.img", images / "back0.img", "--map", tmp_path / "map"]
    assert cli(*words).status == 0
    text = (tmp_path / "map").read_text()
    number = re.search(r"journal (\d+)", text)[1]  # type: ignore[index]
    (tmp_path / "map").write_text(text.replace(f"journal {number}", f"journal {int(number) - 1}"))
    result = cli(*words)
    assert result.status == 4
    assert "has run since" in result.err


@pytest.mark.parametrize(("words", "status", "said"), [
    (["cache.img"], 2, "name the backing devices"),
    (["cache.img", "cache.img"], 2, "named twice"),
    (["back0.img", "cache.img"], 2, "is a backing device"),
    (["cache.img", "nothing.img"], 1, "no such file"),
    (["cache.img", "back0.img", "--force=dirty"], 2, "overrides nothing"),
    (["cache.img", "back0.img", "--slot", "1"], 2, "--to"),
    (["cache.img", "--to", "x.img"], 2, "no"),
    (["cache.img", "--to", "x.img", "--slot", "77"], 4, "no dirty data"),
    (["cache.img", "back0.img", "--to", "x.img"], 2, "leave BACKING out")])
def test_refusals(cli: Cli, golden: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, words: list[str],
                  status: int, said: str) -> None:
    monkeypatch.chdir(golden("dirty_crash", writable=True))
    result = cli("writeback", *words)
    assert (result.status, result.err.count("\n")) == (status, 1)
    assert said in result.err
    assert not Path("x.img").exists()


@pytest.mark.parametrize("name", ["cache.img", "back0.img"])
def test_set_that_runs(cli: Cli, golden: Callable[..., Path], name: str) -> None:
    images = golden("dirty_crash", writable=True)
    with (images / name).open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        result = cli("writeback", images / "cache.img", images / "back0.img")
    assert result.status == 3
    assert "in use" in result.err


def test_orphans(cli: Cli, golden: Callable[..., Path], tmp_path: Path) -> None:
    images = golden("two_backing", writable=True)
    cache = images / "cache.img"
    assert "No orphans" in cli("writeback", cache, "--orphans").out
    assert json.loads(cli("writeback", cache, "--orphans", "--json").out)["orphans"] == []
    # The data of a slot, on an image that is as the former device was: what its users wrote.
    target = tmp_path / "saved.img"
    target.write_bytes((images / "back1.img").read_bytes()[DATA_BYTES:])
    refused = cli("writeback", cache, "--slot", 1, "--to", target)
    assert refused.status == 3
    assert "--force=overwrite" in refused.err
    assert cli("writeback", cache, "--slot", 1, "--to", target, "--force=overwrite").status == 0
    assert digest(target) == volume_digest(golden("two_backing"), 1)
    fresh = tmp_path / "new.img"
    assert cli("writeback", cache, "--slot", 1, "--to", fresh, "--dry-run").status == 0
    assert not fresh.exists()
    assert cli("writeback", cache, "--slot", 1, "--to", fresh).status == 0
    assert 0 < fresh.stat().st_size <= target.stat().st_size
    assert cli("writeback", cache, "--slot", 1, "--to", images / "back1.img").status == 3


def test_orphans_resumed(cli: Cli, golden: Callable[..., Path], tmp_path: Path,
                         monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy to a new image that was interrupted goes on with the same command, by its map."""
    cache = golden("two_backing") / "cache.img"
    whole, target = tmp_path / "whole.img", tmp_path / "saved.img"
    assert "is empty" in cli("writeback", cache, "--slot", 1, "--to", whole).out
    words = ["writeback", cache, "--slot", 1, "--to", target, "--map", tmp_path / "map"]
    with monkeypatch.context() as patch:
        writes_end(patch, 3, KeyboardInterrupt())
        assert cli(*words).status == 130
    assert cli("writeback", cache, "--slot", 1, "--to", target).status == 3
    assert cli(*words).status == 0
    assert target.read_bytes() == whole.read_bytes()


def test_likeliest_device_by_content(cli: Cli, golden: Callable[..., Path], tmp_path: Path) -> None:
    """Of two devices that may be the one, that with the content of the slot's clean data."""
    images = golden("killed", writable=True)
    image = Image((images / "cache.img").read_bytes(), [(images / "back0.img").read_bytes()])
    image.uuid(0, 0, "16s", INVALID_UUID)
    image.uuid(0, 16, "32s", bytes(32))
    image.sb(104, "Q", 0, device=image.backings[0])
    (images / "cache.img").write_bytes(image.cache.content())
    right, wrong = tmp_path / "right.img", tmp_path / "wrong.img"
    content = image.backings[0].content()
    right.write_bytes(content)
    wrong.write_bytes(content[:8192] + bytes(len(content) - 8192))
    found = json.loads(cli("writeback", "--orphans", "--json", images / "cache.img", wrong, right).out)
    [orphan] = found["orphans"]
    assert orphan["likely_devices"] == [str(right)]


def test_backing_by_uuid(cli: Cli, golden: Callable[..., Path], loop_device: Callable[..., str]) -> None:
    images = golden("dirty_crash", writable=True)
    uuid = format_uuid(decode_superblock((images / "back0.img").read_bytes()[4096:8192]).uuid)
    missing = cli("writeback", images / "cache.img", uuid)
    assert missing.status == 2
    assert "no block device here" in missing.err
    device = loop_device(images / "back0.img")
    result = cli("writeback", "--dry-run", images / "cache.img", uuid)
    assert result.status == 0
    assert f"{device}: write " in result.out


def test_flash_volume_to_image(cli: Cli, golden: Callable[..., Path], tmp_path: Path) -> None:
    """A volume without a backing device, whole, as an image."""
    story = golden("flash_volume")
    assert cli("writeback", story / "cache.img", "--slot", 1, "--to", tmp_path / "flash.img").status == 0
    assert digest(tmp_path / "flash.img") == volume_digest(story, 1)


@pytest.mark.parametrize("told", [False, True])
def test_without_superblock(cli: Cli, golden: Callable[..., Path], told: bool) -> None:
    """A cache device whose superblock is gone: its geometry is found, or told."""
    images = golden("dirty_crash", writable=True)
    cache, backing = images / "cache.img", images / "back0.img"
    sb = decode_superblock(cache.read_bytes()[4096:8192])
    with cache.open("r+b") as file:
        file.seek(4096)
        file.write(bytes(4096))
    words = ["--bucket-size", str(sb.bucket_size << 9), "--set-uuid", sb.set_uuid.hex()] if told else []
    result = cli("writeback", cache, backing, *words)
    assert (result.status, result.err) == (0, "")
    assert digest(backing, DATA_BYTES) == volume_digest(golden("dirty_crash"))
    assert state(backing) is BdevState.CLEAN
    assert cache.read_bytes()[4096:8192] == bytes(4096)


def test_without_prio_sets(cli: Cli, golden: Callable[..., Path]) -> None:
    """Priorities and generations are gone; the pointers themselves tell enough, and nothing is lost."""
    images = golden("dirty_crash", writable=True)
    cache, backing = images / "cache.img", images / "back0.img"
    newest = json.loads(cli("dump", "prio", cache, "--json").out)
    sb = decode_superblock(cache.read_bytes()[4096:8192])
    with cache.open("r+b") as file:
        for bucket in newest["prio_buckets"]:
            file.seek(bucket * sb.bucket_size << 9)
            file.write(bytes(4096))
    result = cli("writeback", cache, backing)
    assert (result.status, result.err) == (0, "")
    assert digest(backing, DATA_BYTES) == volume_digest(golden("dirty_crash"))


def test_a_map_does_not_vouch_for_another_device(cli: Cli, golden: Callable[..., Path], tmp_path: Path) -> None:
    """Tried on a copy first, then done in earnest with the same map: nothing of it is there yet."""
    images = golden("dirty_crash", writable=True)
    cache, backing, copy = images / "cache.img", images / "back0.img", tmp_path / "copy.img"
    copy.write_bytes(backing.read_bytes())
    before = backing.read_bytes()
    assert cli("writeback", cache, copy, "--map", tmp_path / "map").status == 0
    for more in ([], ["--dry-run"]):
        refused = cli("writeback", cache, backing, "--map", tmp_path / "map", *more)
        assert (refused.status, refused.out, refused.err.count("\n")) == (3, "", 1)
        assert "which is not there" in refused.err
    assert backing.read_bytes() == before
    assert cli("writeback", cache, copy, "--map", tmp_path / "map").status == 0
    assert cli("writeback", cache, backing, "--map", tmp_path / "map2").status == 0
    assert digest(backing, DATA_BYTES) == volume_digest(golden("dirty_crash"))


def test_a_map_does_not_vouch_for_an_image_that_is_gone(cli: Cli, golden: Callable[..., Path], tmp_path: Path) -> None:
    cache = golden("dirty_crash") / "cache.img"
    target, map_file = tmp_path / "saved.img", tmp_path / "map"
    words = ["writeback", cache, "--slot", 0, "--to", target, "--map", map_file]
    assert cli(*words).status == 0
    saved = target.read_bytes()
    target.unlink()
    assert cli(*words, "--dry-run").out.count("dirty data") > 1
    assert cli(*words).status == 0
    assert target.read_bytes() == saved
    target.write_bytes(bytes(len(saved)))
    assert cli(*words).status == 3
    map_file.write_text("my diary")
    target.unlink()
    assert cli(*words).status == 3
    assert (map_file.read_text(), target.exists()) == ("my diary", False)


@pytest.mark.parametrize(("error", "status"), [(DeviceError("full", errno=28), 1), (KeyboardInterrupt(), 130)])
@pytest.mark.parametrize("has_map", [False, True])
def test_what_is_half_written_is_not_left(cli: Cli, golden: Callable[..., Path], tmp_path: Path,
                                          monkeypatch: pytest.MonkeyPatch, error: BaseException, status: int,
                                          has_map: bool) -> None:
    """A new image without a map looks as if it were complete."""
    cache, target = golden("dirty_crash") / "cache.img", tmp_path / "saved.img"
    writes_end(monkeypatch, 3, error)
    result = cli("writeback", cache, "--slot", 0, "--to", target, *(["--map", tmp_path / "map"] if has_map else []))
    assert (result.status, result.out) == (status, "")
    assert target.exists() == has_map
    assert ("is removed again" in result.err) != has_map


@pytest.mark.parametrize("words", [["writeback", "cache.img", "--slot", "0", "--to", "saved.img", "--map",
                                    "saved.img.map"],
                                   ["forget-backing", "cache.img", "0", "--export", "saved.img"]])
def test_a_map_without_room(cli: Cli, golden: Callable[..., Path], monkeypatch: pytest.MonkeyPatch,
                            words: list[str]) -> None:
    images = golden("dirty_crash", writable=True)
    monkeypatch.chdir(images)
    before, there = (images / "cache.img").read_bytes(), set(os.listdir())

    def replace(self: Path, target: Path) -> None:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(Path, "replace", replace)
    result = cli(*words)
    assert (result.status, result.out) == (1, "")
    assert "saved.img.map: the map cannot be written (No space left on device); name another place\n" in result.err
    assert set(os.listdir()) == there
    assert (images / "cache.img").read_bytes() == before


def test_a_clean_device_is_not_overwritten_by_what_may_be_older(cli: Cli, golden: Callable[..., Path]) -> None:
    """The device says that it has all; a cache that says otherwise may be a copy from before it was written back."""
    images = golden("dirty_crash", writable=True)
    cache, backing = images / "cache.img", images / "back0.img"
    image = Image(cache.read_bytes(), [backing.read_bytes()])
    flags = int.from_bytes(image.backings[0].get(4096 + 104, 8), "little")
    image.sb(104, "Q", flags & ~(3 << 61) | int(BdevState.CLEAN) << 61, device=image.backings[0])
    backing.write_bytes(image.backings[0].content())
    before = backing.read_bytes()
    refused = cli("writeback", cache, backing)
    assert refused.status == 3
    assert "older copy" in refused.err
    assert cli("fsck", "-p", cache, backing).status == 4
    assert backing.read_bytes() == before
    assert cli("writeback", cache, backing, "--force=inconsistent").status == 0
    assert cli("writeback", cache, backing).status == 0


def test_a_device_that_ran_later_is_not_overwritten_by_what_may_be_older(cli: Cli, golden: Callable[..., Path]) -> None:
    """It is dirty, but its superblock is of a run that the set knows nothing of: the cache may be a copy."""
    images = golden("dirty_crash", writable=True)
    cache, backing = images / "cache.img", images / "back0.img"
    image = Image(cache.read_bytes(), [backing.read_bytes()])
    image.sb(200, "I", image.walk.uuids[0].last_reg + 1, device=image.backings[0])
    backing.write_bytes(image.backings[0].content())
    before = backing.read_bytes()
    refused = cli("writeback", cache, backing)
    assert refused.status == 3
    assert "older copy" in refused.err
    assert backing.read_bytes() == before
    assert "BACKING_NEWER" in cli("fsck", cache, backing).out
    # It would be marked clean even if the cache has nothing dirty of it.
    empty = golden("attached_clean", writable=True)
    image2 = Image((empty / "cache.img").read_bytes(), [(empty / "back0.img").read_bytes()])
    image2.sb(104, "Q", 2 << 61 | 1, device=image2.backings[0])
    image2.sb(200, "I", image2.walk.uuids[0].last_reg + 1, device=image2.backings[0])
    (empty / "back0.img").write_bytes(image2.backings[0].content())
    assert cli("writeback", empty / "cache.img", empty / "back0.img").status == 3
    assert (empty / "back0.img").read_bytes() == image2.backings[0].content()
    # An entry that a repair has made says nothing about it.
    unknown = images / "unknown.img"
    image.uuid(0, 52, "I", 0)
    unknown.write_bytes(image.cache.content())
    assert "BACKING_NEWER" not in cli("fsck", unknown, backing).out
    assert cli("writeback", unknown, backing, "--dry-run").status == 0
    assert cli("writeback", cache, backing, "--force=inconsistent").status == 0
    assert cli("writeback", cache, backing).status == 0


def test_a_uuid_in_two_slots(cli: Cli, golden: Callable[..., Path]) -> None:
    """The device would get the data of the first slot, and be called clean."""
    images = golden("two_backing", writable=True)
    cache, backing = images / "cache.img", images / "back0.img"
    image = Image(cache.read_bytes(), [])
    image.uuid(1, 0, "16s", image.cache.get(image.uuid_at, 16))
    cache.write_bytes(image.cache.content())
    before = backing.read_bytes()
    refused = cli("writeback", cache, backing)
    assert refused.status == 3
    assert "slots 0 and 1" in refused.err
    assert backing.read_bytes() == before


def test_a_slot_is_not_written_by_a_damaged_superblock(cli: Cli, golden: Callable[..., Path]) -> None:
    images = golden("dirty_crash", writable=True)
    backing = images / "back0.img"
    image = Image((images / "cache.img").read_bytes(), [backing.read_bytes()])
    image.backings[0].flip(4096 + 184)
    backing.write_bytes(image.backings[0].content())
    before = backing.read_bytes()
    refused = cli("writeback", images / "cache.img", "--slot", 0, "--to", backing, "--force=overwrite")
    assert refused.status == 1
    assert "no good superblock" in refused.err
    assert backing.read_bytes() == before


def test_what_stays_on_the_cache_of_a_slot_without_an_owner(cli: Cli, golden: Callable[..., Path]) -> None:
    """Listed with the way to it, not only counted."""
    images = golden("two_backing", writable=True)
    cache = images / "cache.img"
    image = Image(cache.read_bytes(), [])
    image.uuid(1, 0, "16s", INVALID_UUID)
    cache.write_bytes(image.cache.content())
    done = cli("writeback", cache, images / "back0.img")
    assert done.status == 0
    assert "slot 1: " in done.out
    assert "--slot 1 writes them" in done.out
