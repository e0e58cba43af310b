# SPDX-License-Identifier: GPL-2.0-only
"""A device that the kernel ran without its dirty cache: resolved, attached again, and nothing old hides what is new."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from bcachectl import cli
from bcachectl.ondisk.superblock import BdevState
from tests.fsck.test_resolve import DATA_BYTES, Story, make, state_of, with_dirty
from tests.vm import machine


@pytest.mark.timeout(600)
def test_kernel_goes_on_with_what_was_resolved(golden: Callable[..., Path], tmp_path: Path) -> None:
    story = make(golden, BdevState.DIRTY)
    # The kernel runs the device without its cache, and somebody writes where the cache has clean data.
    alone = tmp_path / "alone"
    alone.mkdir()
    machine.run("register /dev/vda\n"
                "echo 1 >/sys/block/vda/bcache/running\nwait_volume bcache0\n"
                f"head -c 512 /dev/zero | tr '\\0' n | dd of=/dev/bcache0 bs=512 seek={(story.clean - DATA_BYTES) >> 9}"
                " conv=fsync,notrunc 2>/dev/null\n"
                "cat /sys/block/bcache0/bcache/state >/job/state\nstop_all\n", [story.backing], alone).check()
    assert (alone / "state").read_text().strip() == "inconsistent"
    assert state_of(story.backing)[0] is BdevState.STALE
    expected = resolved(story, tmp_path)
    assert expected[story.clean - DATA_BYTES:][:512] == b"n" * 512
    both = tmp_path / "both"
    both.mkdir()
    out = tmp_path / "out.img"
    with out.open("wb") as file:
        file.truncate(story.backing.stat().st_size)
    done = machine.run("register /dev/vda /dev/vdb\nwait_volume bcache0\n"
                       "cat /sys/block/bcache0/bcache/state >/job/before\n"
                       "set=$(basename $(ls -d /sys/fs/bcache/*-*))\n"
                       "set_attribute /sys/block/bcache0/bcache/attach $set\n"
                       "wait_for 60 test -e /sys/block/bcache0/bcache/cache\n"
                       "cat /sys/block/bcache0/bcache/state >/job/after\n"
                       "copy_out bcache0 /dev/vdc\nstop_all\n", [story.cache, story.backing, out], both).check()
    assert done.complaints() == []
    assert [(both / name).read_text().strip() for name in ("before", "after")] == ["no cache", "clean"]
    assert out.read_bytes()[:len(expected)] == expected
    assert cli.run(["fsck", str(story.cache), str(story.backing)]) == 0


def resolved(story: Story, tmp_path: Path) -> bytes:
    """Keep the dirty data; what the volume has to hold afterwards."""
    expected = with_dirty(story)
    assert cli.run(["resolve", str(story.backing), "--cache", str(story.cache), "--keep-dirty", "--force=inconsistent",
                    "--backup", str(tmp_path / "undo")]) == 0
    return expected
