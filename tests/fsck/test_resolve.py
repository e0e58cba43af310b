# SPDX-License-Identifier: GPL-2.0-only
"""`bcachectl resolve`: what it says in each state, what each way out leaves; nothing is lost without a word."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from bcachectl.fsck.check import Check
from bcachectl.ondisk.bkey import INODE_SHIFT, ptr_sector
from bcachectl.ondisk.superblock import BdevState, decode_superblock, encode_superblock
from tests.export.engine import Engine
from tests.fsck.image import Image
from tests.fsck.test_damage import check, live
from tests.fsck.test_forget import put_back, run, volume_digest

SB, DATA_BYTES = 4096, 16 << 9
MARK = b"written without the cache".ljust(512, b".")


class Story(NamedTuple):
    """The devices of a story, and where on the backing device data is dirty, clean, and not cached at all (bytes)."""

    cache: Path
    backing: Path
    truth: str
    dirty: int
    clean: int
    bare: int


def make(golden: Callable[..., Path], state: BdevState, name: str = "dirty_crash") -> Story:
    """A story whose first backing device says something else."""
    directory = golden(name, writable=True)
    cache, backing = directory / "cache.img", directory / "back0.img"
    set_state(backing, state)
    extents = live(examined(cache))
    extents = extents.take(extents.start >> INODE_SHIFT == 0)
    dirty, clean = (int(extents.start[extents.dirty == kind][:1].sum()) << 9 for kind in (True, False))
    ends = sorted(extents.end.tolist())
    bare = next(int(end) for end in ends if not ((extents.start <= end) & (extents.end > end)).any()) << 9
    return Story(cache, backing, volume_digest(golden(name), 0), dirty, clean, bare)


def examined(cache: Path) -> Check:
    return check(Image(cache.read_bytes(), []))


def set_state(backing: Path, state: BdevState) -> None:
    with backing.open("r+b") as file:
        file.seek(SB)
        raw = file.read(4096)
        sb = decode_superblock(raw).with_state(state)
        file.seek(SB)
        file.write(encode_superblock(sb, raw))


def state_of(backing: Path) -> tuple[BdevState, bool]:
    """The state, and whether the device belongs to a set."""
    sb = decode_superblock(backing.read_bytes()[SB:SB + 4096])
    return sb.state, any(sb.set_uuid)


def write(path: Path, offset: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)


def with_dirty(story: Story) -> bytes:
    """The backing device with the cache's dirty data over it, without its first sectors."""
    content, cache = bytearray(story.backing.read_bytes()), story.cache.read_bytes()
    extents = live(examined(story.cache))
    extents = extents.take(extents.dirty & (extents.start >> INODE_SHIFT == 0))
    for start, end, ptr in zip(extents.start.tolist(), extents.end.tolist(), extents.ptr.tolist(), strict=True):
        content[start << 9:end << 9] = cache[ptr_sector(ptr) << 9:(ptr_sector(ptr) + end - start) << 9]
    return bytes(content[DATA_BYTES:])


def verdict(capsys: pytest.CaptureFixture[str], *words: object) -> dict[str, Any]:
    status, out, err = run(capsys, "resolve", "--json", *words)
    assert (status, err) == (0, "")
    found: dict[str, Any] = json.loads(out)
    return found


def options(found: dict[str, Any]) -> list[str | None]:
    return [choice["option"] for choice in found["choices"]]


@pytest.mark.parametrize(("state", "with_cache", "expected"), [
    (BdevState.DIRTY, False, [None, "--use-backing-alone"]), (BdevState.DIRTY, True, [None, "--use-backing-alone"]),
    (BdevState.STALE, False, [None, "--use-backing-alone"]),
    (BdevState.STALE, True, ["--keep-dirty", "--use-backing-alone"]),
    (BdevState.CLEAN, True, ["--keep-dirty", "--use-backing-alone"]), (BdevState.CLEAN, False, ["--use-backing-alone"]),
    (BdevState.NONE, True, ["--keep-dirty", "--use-backing-alone"]), (BdevState.NONE, False, [])])
def test_what_it_says(golden: Callable[..., Path], capsys: pytest.CaptureFixture[str], state: BdevState,
                      with_cache: bool, expected: list[str | None]) -> None:
    story = make(golden, state)
    before = story.cache.read_bytes(), story.backing.read_bytes()
    words = [story.backing, *(["--cache", story.cache] if with_cache else [])]
    found = verdict(capsys, *words)
    assert options(found) == expected
    text = run(capsys, "resolve", *words)[1]
    assert all(choice["loses"] in text for choice in found["choices"])
    dirty_bytes = sum(each.sectors << 9 for each in examined(story.cache).dirty.values())
    for choice in found["choices"]:
        if choice["option"] == "--use-backing-alone":
            unknown = 0 if state is BdevState.CLEAN else None
            assert choice["lost_bytes"] == (dirty_bytes if with_cache else unknown)
            ranges = choice["lost_ranges_bytes"]
            assert sum(end - start for start, end in ranges) == (dirty_bytes if with_cache else 0)
            assert not with_cache or ranges[0][0] == story.dirty - DATA_BYTES
    assert before == (story.cache.read_bytes(), story.backing.read_bytes())


def test_a_detach_that_power_failure_ended(golden: Callable[..., Path], capsys: pytest.CaptureFixture[str],
                                           tmp_path: Path) -> None:
    """The device says that it is detached, the keys are as they were, and all their data was written back."""
    story = make(golden, BdevState.NONE)
    write(story.backing, DATA_BYTES, with_dirty(story))
    assert "BACKING_DETACHED_KEYS" in run(capsys, "fsck", story.cache, story.backing)[1]
    found = verdict(capsys, story.backing, "--cache", story.cache)
    assert [(choice["option"], choice["lost_bytes"]) for choice in found["choices"]] == [("--use-backing-alone", 0)]
    before = story.backing.read_bytes()
    words = ["resolve", story.backing, "--cache", story.cache, "--use-backing-alone", "--backup", tmp_path / "undo"]
    assert run(capsys, *words)[0] == 0
    assert story.backing.read_bytes()[DATA_BYTES:] == before[DATA_BYTES:]
    status, out, _err = run(capsys, "fsck", story.cache, story.backing)
    assert (status, "DETACHED" in out) == (0, False)


def fail_csum(backing: Path, state: BdevState) -> None:
    """A superblock that says ``state``, its label damaged as well, so that the checksum tells nothing."""
    set_state(backing, state)
    write(backing, SB + 80, b"\xaa")


@pytest.mark.parametrize(("state", "with_cache", "taken", "expected"), [
    (BdevState.NONE, True, "no cache", ["--keep-dirty", "--use-backing-alone"]),
    (BdevState.STALE, True, "inconsistent", ["--keep-dirty", "--use-backing-alone"]),
    (BdevState.CLEAN, True, "dirty", [None, "--use-backing-alone"]),
    (BdevState.NONE, False, "dirty", [None, "--use-backing-alone"]),
    (BdevState.CLEAN, False, "dirty", [None, "--use-backing-alone"])])
def test_p4_a_superblock_that_fails_its_checksum(golden: Callable[..., Path], capsys: pytest.CaptureFixture[str],
                                                 tmp_path: Path, state: BdevState, with_cache: bool, taken: str,
                                                 expected: list[str | None]) -> None:
    """fsck leaves what nothing bears out; here is the way on, and no state is believed that would cost data."""
    story = make(golden, BdevState.DIRTY)
    fail_csum(story.backing, state)
    cache = ["--cache", story.cache] if with_cache else []
    status, out, err = run(capsys, "resolve", "--json", story.backing, *cache)
    assert (status, err) == (0, f"bcachectl: {story.backing}: its superblock fails its checksum; its state is taken to "
                                f"be {taken}\n")
    assert options(json.loads(out)) == expected
    alone = ["resolve", story.backing, *cache, "--use-backing-alone", "--backup", tmp_path / "undo"]
    status, _out, err = run(capsys, *alone)
    assert (status, "loses" in err) == (3, True)
    keep = ["resolve", story.backing, *cache, "--keep-dirty", "--backup", tmp_path / "undo", "--force=inconsistent"]
    if "--keep-dirty" in expected:
        assert run(capsys, *keep)[0] == 0
        assert state_of(story.backing) == (BdevState.NONE, False)
        assert hashlib.sha256(story.backing.read_bytes()[DATA_BYTES:]).hexdigest() == story.truth
    else:
        assert run(capsys, *alone, "--force=dirty")[0] == 0
        assert state_of(story.backing) == (BdevState.NONE, False)
    assert run(capsys, "undo", tmp_path / "undo")[0] == 0


@pytest.mark.parametrize("with_cache", [False, True])
def test_p4_a_dirty_device_stays_dirty_without_a_word(golden: Callable[..., Path], tmp_path: Path,
                                                      capsys: pytest.CaptureFixture[str], with_cache: bool) -> None:
    story = make(golden, BdevState.DIRTY)
    before = story.cache.read_bytes(), story.backing.read_bytes()
    words = ["resolve", story.backing, *(["--cache", story.cache] if with_cache else []), "--use-backing-alone",
             "--backup", tmp_path / "undo"]
    for refused in (words, [*words, "--json"], [*words, "--force=inconsistent"]):
        status, _out, err = run(capsys, *refused)
        assert (status, "--force=dirty" in err, err.count("\n")) == (3, True, 1)
    assert run(capsys, *words, "--dry-run")[0] == 0
    assert run(capsys, "resolve", story.backing, "--keep-dirty", "--force=inconsistent")[0] == 4
    assert before == (story.cache.read_bytes(), story.backing.read_bytes())
    assert run(capsys, *words, "--force=dirty")[0] == 0
    assert state_of(story.backing) == (BdevState.NONE, False)
    assert story.backing.read_bytes()[DATA_BYTES:] == before[1][DATA_BYTES:]
    if with_cache:
        assert run(capsys, "fsck", story.cache, story.backing)[0] == 0
        assert "bcache0" not in run(capsys, "dump", "extents", story.cache)[1]
    else:
        assert story.cache.read_bytes() == before[0]
    assert run(capsys, "undo", tmp_path / "undo")[0] == 0
    assert before == (story.cache.read_bytes(), story.backing.read_bytes())


@pytest.mark.parametrize("state", [BdevState.STALE, BdevState.NONE])
def test_keep_dirty_of_a_device_that_ran_alone(golden: Callable[..., Path], tmp_path: Path,
                                               capsys: pytest.CaptureFixture[str], state: BdevState) -> None:
    """Dirty data wins where it is; elsewhere what was written meanwhile does, also over clean data in the cache."""
    story = make(golden, state)
    for offset in (story.dirty, story.clean, story.bare):
        write(story.backing, offset, MARK)
    expected = with_dirty(story)
    before = story.cache.read_bytes(), story.backing.read_bytes()
    words = ["resolve", story.backing, "--cache", story.cache, "--keep-dirty", "--backup", tmp_path / "undo"]
    assert run(capsys, *words)[0] == 3
    assert run(capsys, *words, "--force=inconsistent", "--dry-run")[0] == 0
    assert before == (story.cache.read_bytes(), story.backing.read_bytes())
    assert run(capsys, *words, "--force=inconsistent")[0] == 0
    assert story.backing.read_bytes()[DATA_BYTES:] == expected
    assert state_of(story.backing) == (BdevState.NONE, False)
    assert run(capsys, "fsck", story.cache, story.backing)[0] == 0
    for offset, is_kept in ((story.dirty, False), (story.clean, True), (story.bare, True)):
        assert (story.backing.read_bytes()[offset:offset + 512] == MARK) == is_kept
    assert options(verdict(capsys, story.backing, "--cache", story.cache)) == []
    assert run(capsys, "undo", tmp_path / "undo")[0] == 0
    assert before == (story.cache.read_bytes(), story.backing.read_bytes())


def test_an_engine_goes_on_with_what_was_resolved(golden: Callable[..., Path], tmp_path: Path,
                                                  capsys: pytest.CaptureFixture[str]) -> None:
    """No clean data of before hides what was written without the cache."""
    story = make(golden, BdevState.STALE)
    write(story.backing, story.clean, MARK)
    expected = with_dirty(story)
    assert run(capsys, "resolve", story.backing, "--cache", story.cache, "--keep-dirty", "--force=inconsistent",
               "--backup", tmp_path / "undo")[0] == 0
    with Engine(tmp_path, "--cache", story.cache, "--backing", story.backing, "--export", "nbd") as running:
        with running.client() as client:
            assert client.read_all() == expected


def test_keep_dirty_of_a_device_that_says_clean(golden: Callable[..., Path], tmp_path: Path,
                                                capsys: pytest.CaptureFixture[str]) -> None:
    story = make(golden, BdevState.CLEAN)
    expected = with_dirty(story)
    assert "BACKING_CLEAN_DIRTY" in run(capsys, "fsck", story.cache, story.backing)[1]
    assert run(capsys, "resolve", story.backing, "--cache", story.cache, "--keep-dirty", "--backup",
               tmp_path / "undo")[0] == 0
    assert state_of(story.backing) == (BdevState.DIRTY, True)
    assert run(capsys, "fsck", story.cache, story.backing)[0] == 0
    assert run(capsys, "writeback", story.cache, story.backing)[0] == 0
    assert story.backing.read_bytes()[DATA_BYTES:] == expected


def test_a_clean_device_whose_cache_died(golden: Callable[..., Path], tmp_path: Path,
                                         capsys: pytest.CaptureFixture[str]) -> None:
    """It loses nothing, so no word is asked for; with the cache at hand, that forgets the device too."""
    story = make(golden, BdevState.CLEAN, "attached_clean")
    words = ["resolve", story.backing, "--use-backing-alone", "--backup"]
    assert run(capsys, *words, tmp_path / "undo")[0] == 0
    assert state_of(story.backing) == (BdevState.NONE, False)
    assert run(capsys, "undo", tmp_path / "undo")[0] == 0
    assert run(capsys, *words, tmp_path / "undo2", "--cache", story.cache)[0] == 0
    assert state_of(story.backing) == (BdevState.NONE, False)
    assert run(capsys, "fsck", story.cache, story.backing)[0] == 0
    assert run(capsys, "dump", "extents", story.cache)[1] == ""


def test_export_before_the_data_is_given_up(golden: Callable[..., Path], tmp_path: Path,
                                            capsys: pytest.CaptureFixture[str]) -> None:
    story = make(golden, BdevState.STALE)
    expected = with_dirty(story)
    export = tmp_path / "saved.img"
    words = ["resolve", story.backing, "--cache", story.cache, "--use-backing-alone", "--export", export,
             "--backup", tmp_path / "undo"]
    status, out, _err = run(capsys, *words, "--dry-run")
    assert (status, export.exists()) == (0, False)
    assert out.startswith(f"{export}: write ")
    status, out, _err = run(capsys, *words)
    assert status == 0
    assert f"lost: nothing, what only the cache had is in {export}" in out
    assert state_of(story.backing) == (BdevState.NONE, False)
    put_back(export, tmp_path / "saved.img.map", story.backing)
    assert story.backing.read_bytes()[DATA_BYTES:] == expected
    # Nothing is left to be exported.
    assert run(capsys, "resolve", story.backing, "--cache", story.cache, "--use-backing-alone", "--export", export)[0]


def test_interrupted_and_run_again(golden: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                   capsys: pytest.CaptureFixture[str]) -> None:
    """Killed between any two writes, the same line ends the same."""
    story = make(golden, BdevState.STALE)
    write(story.backing, story.clean, MARK)
    expected = with_dirty(story)
    before = story.cache.read_bytes(), story.backing.read_bytes()
    words = ["resolve", story.backing, "--cache", story.cache, "--keep-dirty", "--force=inconsistent"]
    from bcachectl import writeplan

    real = writeplan.apply
    dice = random.Random(3)
    for number in range(6):
        story.cache.write_bytes(before[0])
        story.backing.write_bytes(before[1])

        def stopped(plan: writeplan.Plan, devices: Any, number: int = number) -> None:
            # Whole steps, and of the next one any writes.
            part = [write for write in plan.steps[number] if dice.random() < 0.5] if number < len(plan.steps) else []
            real(writeplan.Plan(plan.verb, (*plan.steps[:number], tuple(part))), devices)
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(writeplan, "apply", stopped)
            assert run(capsys, *words, "--backup", tmp_path / f"undo{number}")[0] == 130
        left = verdict(capsys, story.backing, "--cache", story.cache)
        if "--keep-dirty" in options(left):
            assert run(capsys, *words, "--backup", tmp_path / f"again{number}")[0] == 0
        assert story.backing.read_bytes()[DATA_BYTES:] == expected
        assert state_of(story.backing) == (BdevState.NONE, False)
        assert run(capsys, "fsck", story.cache, story.backing)[0] == 0


def test_a_cache_that_is_not_the_device_s(golden: Callable[..., Path], tmp_path: Path,
                                          capsys: pytest.CaptureFixture[str]) -> None:
    story = make(golden, BdevState.DIRTY)
    other = golden("two_backing") / "cache.img"
    found = verdict(capsys, story.backing, "--cache", other)
    assert "is not its cache" in found["story"]
    assert found["choices"][1]["lost_bytes"] is None
    # The set without the device's slot: what it once had is nobody's now.
    image = Image(story.cache.read_bytes(), [])
    image.uuid(0, 0, "16s", bytes(16))
    story.cache.write_bytes(image.cache.content())
    found = verdict(capsys, story.backing, "--cache", story.cache)
    assert "slot 0" in found["story"]
    assert options(found) == [None, "--use-backing-alone"]
    words = ["resolve", story.backing, "--cache", story.cache, "--use-backing-alone", "--backup", tmp_path / "undo"]
    assert run(capsys, *words)[0] == 3
    before = story.cache.read_bytes()
    assert run(capsys, *words, "--force=dirty")[0] == 0
    assert story.cache.read_bytes() == before
    assert "ORPHAN_DIRTY" in run(capsys, "fsck", story.cache, story.backing)[1]


def test_it_asks_on_a_terminal(golden: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                               capsys: pytest.CaptureFixture[str]) -> None:
    """The question says what is lost; no is no."""
    story = make(golden, BdevState.DIRTY)
    before = story.backing.read_bytes()
    asked: list[str] = []
    words = ["resolve", story.backing, "--use-backing-alone", "--backup", tmp_path / "undo"]

    class Terminal:
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr("sys.stdin", Terminal())
    for answer, status in ((False, 3), (True, 0)):
        monkeypatch.setattr("typer.confirm", lambda text, answer=answer: (asked.append(text), answer)[1])
        assert run(capsys, *words)[0] == status
        assert (story.backing.read_bytes() == before) == (not answer)
    assert all("loses unknown" in text for text in asked)
    assert len(asked) == 2


def test_a_backing_device_that_is_not_here(golden: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    story = make(golden, BdevState.DIRTY, "flash_volume")
    found = verdict(capsys, "bcache0", "--cache", story.cache)
    assert (found["device"], found["slot"]) == (None, 0)
    assert [choice["lost_bytes"] for choice in found["choices"]] == [0, 0, examined(story.cache).dirty[0].sectors << 9]
    assert all("forget-backing" in choice["does"] for choice in found["choices"][1:])
    assert "in the cache alone" not in run(capsys, "resolve", "bcache1", "--cache", story.cache)[1]
    assert "nothing to resolve" in run(capsys, "resolve", "bcache1", "--cache", story.cache)[1]
    assert run(capsys, "resolve", "bcache0", "--cache", story.cache, "--keep-dirty")[0] == 2
    assert run(capsys, "resolve", "bcache9", "--cache", story.cache)[0] == 4


def test_refusals(golden: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    story = make(golden, BdevState.DIRTY)
    for words, status, text in (
            (["bcache0"], 4, "name its backing DEVICE"), ([story.cache], 3, "is a cache device"),
            ([story.backing, "--cache", story.backing], 2, "name the cache device"),
            ([story.backing, "--use-backing-alone", "--keep-dirty"], 2, "exclude each other"),
            ([story.backing, "--export", "x"], 2, "give both"), ([story.backing, "--force=yes"], 2, "dirty or"),
            ([story.backing, "--cache", story.cache, "--keep-dirty"], 4, "makes no sense")):
        found, _out, err = run(capsys, "resolve", *words)
        assert (found, err.count("\n")) == (status, 1), (words, err)
        assert text in err


def test_an_engine_runs_it(golden: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                           capsys: pytest.CaptureFixture[str]) -> None:
    story = make(golden, BdevState.DIRTY)
    with Engine(tmp_path, "--cache", story.cache, "--backing", story.backing, "--export", "nbd", "--set",
                "writeback_running=0") as running:
        monkeypatch.setenv("XDG_RUNTIME_DIR", running.runtime.name)
        assert "bcachectl engine stop" in run(capsys, "resolve", "bcache0")[2]
        status, _out, err = run(capsys, "resolve", story.backing, "--use-backing-alone", "--force=dirty")
        assert (status, "in use" in err) == (3, True)


def test_writeback_of_an_inconsistent_device_detaches_it(golden: Callable[..., Path], tmp_path: Path,
                                                         capsys: pytest.CaptureFixture[str]) -> None:
    """Clean data of the cache must not hide what the device was given while it ran alone."""
    story = make(golden, BdevState.STALE)
    write(story.backing, story.clean, MARK)
    expected = with_dirty(story)
    status, out, _err = run(capsys, "writeback", story.cache, story.backing, "--force=inconsistent")
    assert (status, "no cache" in out) == (0, True)
    assert state_of(story.backing) == (BdevState.NONE, False)
    with Engine(tmp_path, "--cache", story.cache, "--backing", story.backing, "--export", "nbd") as running:
        with running.client() as client:
            assert client.read_all() == expected


