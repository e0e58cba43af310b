# SPDX-License-Identifier: GPL-2.0-only
"""`bcachectl forget-backing`: what it exports is all there was, what is left is a good set, and there is a way back."""

from __future__ import annotations

import hashlib
import json
import random
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from bcachectl import cli as program
from bcachectl.fsck import forget
from bcachectl.fsck.check import Check
from bcachectl.ondisk.bkey import INODE_SHIFT, ptr_sector
from bcachectl.ondisk.magic import INVALID_UUID
from tests.damage import cases
from tests.export.engine import Engine
from tests.faults import fail_reads
from tests.fsck.image import Image
from tests.fsck.test_damage import base_image, check, live, per_sector, serious
from tests.fsck.test_interrupted import interrupted
from tests.require import need_root, need_tool

DATA_BYTES = 16 << 9
NOW_S = 1_800_000_000


def run(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str, str]:
    capsys.readouterr()
    status = program.run([str(word) for word in words])
    said = capsys.readouterr()
    assert "Traceback" not in said.err
    return status, said.out, said.err


def uuids(capsys: pytest.CaptureFixture[str], cache: Path) -> list[dict[str, object]]:
    found: list[dict[str, object]] = json.loads(run(capsys, "dump", "uuids", "--json", cache)[1])["items"]
    return found


def put_back(export: Path, map_file: Path, device: Path) -> None:
    """What ``ddrescue -m`` does: every range that the map marks finished."""
    with export.open("rb") as source, device.open("r+b") as target:
        for line in map_file.read_text().splitlines():
            words = line.split()
            if len(words) == 3 and words[2] == "+" and not line.startswith("#") and words[1].startswith("0x"):
                source.seek(int(words[0], 16))
                target.seek(int(words[0], 16))
                target.write(source.read(int(words[1], 16)))


def volume_digest(story: Path, number: int) -> str:
    found: str = json.loads((story / f"truth{number}.json").read_text())["sha256"]
    return found


def test_export_forget_and_undo(golden: Callable[..., Path], tmp_path: Path,
                                capsys: pytest.CaptureFixture[str]) -> None:
    story = golden("two_backing", writable=True)
    cache, dead = story / "cache.img", story / "back1.img"
    before = cache.read_bytes()
    export, undo = tmp_path / "saved.img", tmp_path / "undo"
    status, _out, err = run(capsys, "forget-backing", cache, "bcache1")
    assert status == 3
    assert "--export FILE" in err and "--accept-loss" in err
    words = ["forget-backing", cache, "bcache1", "--export", export, "--backup", undo]
    assert run(capsys, *words, "--dry-run")[0] == 0
    assert cache.read_bytes() == before
    assert not export.exists() and not undo.exists()
    status, out, err = run(capsys, *words, "--json")
    assert (status, err) == (0, "")
    found = json.loads(out)
    assert found["export"]["copied_bytes"] == found["dirty_bytes"] > 0
    assert found["export"]["lost_bytes"] == 0
    assert export.stat().st_blocks * 512 < 2 * found["dirty_bytes"]
    # The export makes the device whole.
    put_back(export, tmp_path / "saved.img.map", dead)
    assert hashlib.sha256(dead.read_bytes()[DATA_BYTES:]).hexdigest() == volume_digest(golden("two_backing"), 1)
    # The set is whole without it.
    assert run(capsys, "fsck", cache, story / "back0.img")[0] == 0
    entries = uuids(capsys, cache)
    assert [entry["kind"] for entry in entries] == ["backing", "retired"]
    assert entries[1]["invalidated"]
    assert "slot 1" not in run(capsys, "dump", "extents", cache)[1]
    assert run(capsys, "writeback", cache, story / "back0.img")[0] == 0
    alive = hashlib.sha256((story / "back0.img").read_bytes()[DATA_BYTES:]).hexdigest()
    assert alive == volume_digest(golden("two_backing"), 0)
    assert run(capsys, "undo", undo)[0] == 0
    assert cache.read_bytes() == before


def test_crash_at_any_write(golden: Callable[..., Path]) -> None:
    """The set is the old one or the new one, clean in either case, and the other volume's data is never touched."""
    base = base_image(golden("two_backing"))
    dirty = per_sector(live(check(base.fresh())), dirty=True)
    other = {sector for sector in dirty if sector >> INODE_SHIFT == 0}
    steps = forget.plan_forget(alone(base), 1, now_s=NOW_S)
    dice = random.Random(5)
    for done in range(sum(len(step) for step in steps) + 1):
        for _draw in range(3):
            image = base.fresh()
            interrupted(image, steps, done, dice)
            after = alone(image)
            assert serious(after) == [], done
            left = per_sector(live(after), dirty=True)
            is_new = after.walk.uuids[1].uuid == INVALID_UUID
            assert left == (other if is_new else dirty), done
            assert is_new or done <= len(steps[0]) + 1


def alone(image: Image) -> Check:
    """A check of the cache without its backing devices."""
    other = image.fresh()
    other.cache, other.backings = image.cache, []
    return check(other)


def test_a_large_tree(golden: Callable[..., Path]) -> None:
    """Every slot of a set with interior nodes; nothing is left of it and all else stays."""
    base = base_image(golden("flash_volume"))
    before = live(check(base.fresh()))
    for slot in (0, 1):
        image = base.fresh()
        steps = forget.plan_forget(alone(image), slot, now_s=NOW_S)
        interrupted(image, steps, 1000, random.Random(0))
        after = alone(image)
        assert serious(after) == []
        kept = live(after)
        rows = before.start >> np.uint64(INODE_SHIFT) != slot
        for dirty in (True, False):
            assert per_sector(kept, dirty=dirty) == per_sector(before.take(rows), dirty=dirty)
        assert after.walk.uuids[slot].invalidated == NOW_S


def test_lost_sectors_need_a_word(golden: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                  capsys: pytest.CaptureFixture[str]) -> None:
    story = golden("dirty_crash", writable=True)
    cache, export = story / "cache.img", tmp_path / "saved.img"
    extents = live(alone(base_image(golden("dirty_crash"))))
    sector = ptr_sector(int(extents.ptr[extents.dirty][0]))
    before = cache.read_bytes()
    fail_reads(monkeypatch, lambda path, offset_bytes, nbytes: (
        path == str(cache) and offset_bytes <= sector << 9 < offset_bytes + nbytes))
    words = ["forget-backing", cache, 0, "--export", export, "--backup", tmp_path / "undo"]
    status, _out, err = run(capsys, *words)
    assert status == 3
    assert "512 B of the dirty data cannot be read" in err
    assert cache.read_bytes() == before
    assert "-" in {line.split()[-1] for line in (tmp_path / "saved.img.map").read_text().splitlines()}
    # The same line goes on with the export that is there.
    status, out, _err = run(capsys, *words, "--accept-loss", "--json")
    assert status == 0
    assert json.loads(out)["export"]["lost_bytes"] == 512


def test_refusals(golden: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    story = golden("flash_volume", writable=True)
    cache = story / "cache.img"
    before = cache.read_bytes()
    there = tmp_path / "there"
    there.write_text("mine")
    for words, status, text in (
            ([cache, "bcache1", "--accept-loss"], 4, "flash-only"), ([cache, "bcache7"], 4, "is no backing device"),
            ([cache, "7"], 4, "no slot"), ([story / "back0.img", "bcache0"], 2, "name the cache device"),
            ([cache, "bcache0", "--export", there], 3, "exists already"),
            ([cache, "bcache0", "--export", cache], 2, "is the cache device itself"),
            ([cache, "bcache0", "--export", "/dev/null"], 3, "--to /dev/null"),
            (["0123456789", "bcache0"], 4, "no cache device here"),
            ([cache, "bcache0", "--force=dirty"], 2, "present")):
        found, _out, err = run(capsys, "forget-backing", *words)
        assert (found, err.count("\n")) == (status, 1), words
        assert text in err
    assert cache.read_bytes() == before
    assert there.read_text() == "mine"
    fresh = golden("fresh", writable=True) / "cache.img"
    assert "never ran" in run(capsys, "forget-backing", fresh, "bcache0")[2]


def test_a_damaged_set_is_refused(golden: Callable[..., Path], tmp_path: Path,
                                  capsys: pytest.CaptureFixture[str]) -> None:
    case = next(case for case in cases() if case.name == "prio_csum_dirty_crash")
    image = base_image(golden(case.base)).fresh()
    case.edit(image)
    cache = tmp_path / "cache.img"
    cache.write_bytes(image.cache.content())
    status, _out, err = run(capsys, "forget-backing", cache, "0", "--accept-loss")
    assert (status, "PRIO_CSUM" in err, "fsck" in err) == (3, True, True)
    assert cache.read_bytes() == image.cache.content()


def test_orphans_of_a_forced_detach(golden: Callable[..., Path], tmp_path: Path,
                                    capsys: pytest.CaptureFixture[str]) -> None:
    """A retired slot's dirty data, which nothing else gets off the cache."""
    image = base_image(golden("dirty_crash")).fresh()
    image.uuid(0, 0, "16s", INVALID_UUID)
    image.uuid(0, 56, "I", 12345)
    cache = tmp_path / "cache.img"
    cache.write_bytes(image.cache.content())
    assert "ORPHAN_RETIRED" in run(capsys, "fsck", cache)[1]
    assert run(capsys, "forget-backing", cache, "0", "--export", tmp_path / "e", "--backup", tmp_path / "u")[0] == 0
    assert "ORPHAN" not in run(capsys, "fsck", cache)[1]
    assert uuids(capsys, cache)[0]["invalidated"] == 12345
    back = golden("dirty_crash", writable=True) / "back0.img"
    put_back(tmp_path / "e", tmp_path / "e.map", back)
    assert hashlib.sha256(back.read_bytes()[DATA_BYTES:]).hexdigest() == volume_digest(golden("dirty_crash"), 0)


def test_an_engine_runs_the_set(golden: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                capsys: pytest.CaptureFixture[str]) -> None:
    story = golden("two_backing", writable=True)
    with Engine(tmp_path, "--cache", story / "cache.img", "--backing", story / "back0.img", "--export", "nbd",
                "--set", "writeback_running=0") as running:
        monkeypatch.setenv("XDG_RUNTIME_DIR", running.runtime.name)
        status, _out, err = run(capsys, "forget-backing", story / "cache.img", "bcache1", "--accept-loss")
    assert status == 4
    assert "run by an engine" in err
    assert "bcachectl engine stop" in err


def test_by_the_set_s_uuid(golden: Callable[..., Path], tmp_path: Path, loop_device: Callable[..., str],
                           capsys: pytest.CaptureFixture[str]) -> None:
    """The cache is found by its set; a backing device that is here after all is not forgotten by mistake."""
    story = golden("two_backing", writable=True)
    cache = loop_device(story / "cache.img")
    uuid = json.loads(run(capsys, "show", "--json", cache)[1])["superblock"]["set_uuid"]
    words = ["forget-backing", uuid[:8], "bcache1", "--export", tmp_path / "e", "--backup", tmp_path / "u"]
    here = loop_device(story / "back1.img")
    status, _out, err = run(capsys, *words)
    assert (status, "--force=present" in err, f"writeback {cache} {here}" in err) == (3, True, True)
    status, out, err = run(capsys, *words, "--force=present", "--json")
    assert (status, err) == (0, "")
    assert json.loads(out)["export"]["lost_bytes"] == 0
    assert [entry["kind"] for entry in uuids(capsys, Path(cache))] == ["backing", "retired"]
    status, _out, err = run(capsys, "forget-backing", uuid, "bcache1")
    assert (status, "is no backing device" in err) == (4, True)


def test_an_export_to_a_full_disk_goes_on_when_there_is_room(golden: Callable[..., Path], tmp_path: Path,
                                                             capsys: pytest.CaptureFixture[str]) -> None:
    need_root()
    cache = golden("dirty_crash", writable=True) / "cache.img"
    before = cache.read_bytes()
    place = tmp_path / "small"
    place.mkdir()
    export = place / "dead.img"
    words = ("forget-backing", cache, "bcache0", "--export", export, "--backup", tmp_path / "undo")
    subprocess.run([need_tool("mount"), "-t", "tmpfs", "-o", "size=2m", "none", place], check=True)
    try:
        status, _out, error = run(capsys, *words)
        assert status == 1
        assert re.fullmatch(f"bcachectl: {export}: write at byte [0-9]+ failed: No space left on device; {export}.map "
                            "says how far it is, and the same command goes on from there\n", error)
        assert cache.read_bytes() == before
        subprocess.run([need_tool("mount"), "-o", "remount,size=200m", place], check=True)
        assert run(capsys, *words)[0] == 0
        device = tmp_path / "new.img"
        device.write_bytes((golden("dirty_crash") / "back0.img").read_bytes())
        put_back(export, place / "dead.img.map", device)
        found = hashlib.sha256(device.read_bytes()[DATA_BYTES:]).hexdigest()
        assert found == volume_digest(golden("dirty_crash"), 0)
    finally:
        subprocess.run([need_tool("umount"), place], check=True)
