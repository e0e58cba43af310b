# SPDX-License-Identifier: GPL-2.0-only
"""What a killed engine had answered and not yet written to the cache device (`bcachectl.engine.tail`), by processes.

Engines have a tail when they have ublk devices; one that finds the file of a tail goes on with it, whatever it exports.
So these engines speak NBD; the same over ublk, with clients that wait, is tests/vm/test_ublk.py.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from bcachectl.engine.export import ublk_wire as wire
from bcachectl.engine.export.host import EngineHost, HostOptions
from bcachectl.errors import WrongState
from bcachectl.ondisk.superblock import SB_BYTES, SB_SECTOR, decode_superblock
from bcachectl.tailfile import TailFile, tail_path
from tests.export.engine import Engine
from tests.over import only
from tests.require import need_root
from tests.system.sets import make_set, run

DATA = os.urandom(4096)
AT = 1 << 20


class Story:
    """A set whose engine was killed after it had answered a write that nobody flushed."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.options = [*make_set(directory, cache_bytes=32 << 20, backing_bytes=16 << 20, mode="writeback"),
                        "--export", "nbd"]
        self.cache, self.backing = directory / "cache.img", directory / "back0.img"
        with self.cache.open("rb") as file:
            file.seek(SB_SECTOR << 9)
            uuid = decode_superblock(file.read(SB_BYTES)).set_uuid
        self.tail = Path(tail_path(uuid))
        TailFile(str(self.tail), uuid).close()
        with Engine(directory, *self.options, "--set", "journal_delay_ms=60000") as engine, engine.client() as client:
            client.write(0, b"1" * 4096)        # the set becomes dirty, a bucket is taken: all that is written
            client.flush()
            time.sleep(0.5)
            client.flush()
            client.write(AT, DATA)
            engine.kill()

    def read(self, *more: str) -> bytes:
        """What an engine reads where the write was; the engine ends in good order."""
        with Engine(self.directory, *self.options, *more) as engine, engine.client() as client:
            found = client.read(AT, len(DATA))
            assert engine.stop() == 0
            assert engine.errors == ""
        return found


@pytest.fixture
def story(tmp_path: Path) -> Iterator[Story]:
    need_root()
    only("nbd", "a tail without a ublk device")
    one = Story(tmp_path)
    yield one
    one.tail.unlink(missing_ok=True)


def test_the_next_engine_has_it(story: Story) -> None:
    assert story.read() == DATA
    assert not story.tail.exists(), "all of it is on the device"
    run("fsck", story.cache, story.backing)
    assert story.read() == DATA


def test_it_is_seen_where_sets_and_engines_are_listed(story: Story) -> None:
    said = f"writes that a killed engine of this set answered are in {story.tail} and nowhere else"
    assert f"  {story.cache}: {said}; run the engine again, or have them written with " \
           f"'bcachectl engine stop {story.cache}'" in run("list", story.cache).splitlines()
    assert said in run("engine", "list")
    devices = json.loads(run("list", "--json", story.cache, story.backing))["devices"]
    assert [device["left_behind"] for device in devices if device["device"] == str(story.cache)] == [said]
    killed = json.loads(run("engine", "list", "--json"))["killed"]
    assert {"set": story.tail.stem, "left_behind": said} in killed
    assert story.read() == DATA
    assert said not in run("list", story.cache) + run("engine", "list")


def test_without_the_tail_it_were_gone(story: Story) -> None:
    story.tail.unlink()
    assert story.read() == bytes(len(DATA))


def test_an_engine_that_only_reads_has_it_and_changes_nothing(story: Story) -> None:
    before = story.cache.read_bytes(), story.tail.read_bytes()
    assert story.read("--read-only") == DATA
    assert (story.cache.read_bytes(), story.tail.read_bytes()) == before
    assert story.read() == DATA


def test_under_an_overlay(story: Story) -> None:
    before = story.cache.read_bytes(), story.tail.read_bytes()
    overlay = story.directory / "overlay"
    assert story.read("--overlay", str(overlay)) == DATA
    assert (story.cache.read_bytes(), story.tail.read_bytes()) == before
    assert not (story.directory / "overlay.tail").exists()
    assert story.read("--overlay", str(overlay)) == DATA, "in the overlay, and its journal knows nothing of a tail"


def test_nobody_else_writes_before_it_is_written(story: Story) -> None:
    before = story.cache.read_bytes()
    for words in (("fsck", "-y", story.cache), ("writeback", story.cache, story.backing),
                  ("wipe", story.cache)):
        said = run(*words, status=8 if words[0] == "fsck" else 3)
        assert f"are in {story.tail} and nowhere else" in said, said
        assert f"engine stop {story.cache}" in said
    assert story.cache.read_bytes() == before


def test_engine_stop_has_it_written(story: Story) -> None:
    before = story.cache.read_bytes()
    assert "would write to" in run("engine", "stop", story.cache, "--dry-run")
    assert story.cache.read_bytes() == before
    assert f"wrote to {story.cache} what the killed engine had answered and not written there: 1 key" \
        in run("engine", "stop", story.cache).splitlines()
    assert not story.tail.exists()
    run("fsck", story.cache, story.backing)
    run("writeback", story.cache, story.backing)
    with story.backing.open("rb") as file:
        file.seek(8192 + AT)
        assert file.read(len(DATA)) == DATA


def test_a_device_whose_tail_is_gone_is_not_taken_back(story: Story, monkeypatch: pytest.MonkeyPatch) -> None:
    """There is no ublk driver here; the engine is told that it found a device."""
    def find(host: EngineHost) -> None:
        host._left_over = [wire.DevInfo(3, 1, 0, 4096, 0, 1, 0, 1)]

    monkeypatch.setattr(EngineHost, "_find_left_over", find)
    options = HostOptions(cache=str(story.cache), backings=(str(story.backing),), recover=True)
    EngineHost(options).close()
    story.tail.unlink()
    with pytest.raises(WrongState, match="might miss them, so it is not taken over"):
        EngineHost(options)


def test_another_state_of_the_set(story: Story) -> None:
    """Someone has put an older copy in its place, or has run the set without the tail."""
    kept = story.directory / "kept"
    shutil.move(story.tail, kept)
    assert story.read() == bytes(len(DATA))
    shutil.move(kept, story.tail)
    with Engine(story.directory, *story.options, expect_failure=True) as engine:
        assert "remove that file to give them up" in engine.errors
    story.tail.unlink()
    assert story.read() == bytes(len(DATA))
