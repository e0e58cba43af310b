# SPDX-License-Identifier: GPL-2.0-only
"""The verbs on sets of the kernel's, from the command line to the files of a made-up /sys and back."""

from __future__ import annotations

import errno
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from bcachectl.snapshot import SetSnapshot, from_json
from tests.cli.conftest import Result
from tests.unit.sysfs.fake import FakeKernel

Cli = Callable[..., Result]
Fake = Callable[[str], FakeKernel]


@pytest.fixture
def fake(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Fake:
    """After ``cli``, which takes the kernel away."""
    monkeypatch.setattr("bcachectl.discovery.enumerate_devices", list)
    return lambda story: FakeKernel(tmp_path / "kernel", story, monkeypatch)


def last_document(text: str) -> dict[str, object]:
    document: dict[str, object] = json.loads(text[text.index("{\n"):])
    return document


def test_a_day_in_the_life_of_a_kernel_set(cli: Cli, fake: Fake) -> None:
    kernel = fake("two_backing")
    listed = json.loads(cli("list", "--json").out)
    assert [one["set_uuid"] for one in listed["kernel_sets"]] == [kernel.uuid]
    assert [volume["volume"] for volume in listed["kernel_sets"][0]["volumes"]] == ["bcache0", "bcache1"]
    page = cli("list").out
    assert f"set {kernel.uuid}, run by the kernel" in page
    assert f"bcache1: 32 MiB, dirty, writeback, at {kernel.dev}/bcache1\n" in page

    status = json.loads(cli("status", "--json").out)
    assert from_json(SetSnapshot, status).source == "kernel"
    assert "\nbcache1 " not in cli("status", "bcache0", "--kernel").out
    assert "run by the kernel" in cli("monitor", kernel.uuid[:8], "--once").out
    line = cli("monitor", "--once", "--json").out
    assert (line.count("\n"), json.loads(line)["source"]) == (1, "kernel")

    assert cli("get", "bcache0", "state").out == "dirty\n"
    assert cli("set", kernel.dev / "bcache1", "writeback_percent=99").out == "writeback_percent = 40 (asked for 99)\n"
    assert "would set writeback_percent of bcache1 to 7 (now 40)" in cli(
        "set", "bcache1", "writeback_percent=7", "--dry-run").out
    assert cli("get", kernel.uuid, "internal/cutoff_writeback").out == "40\n"
    refused = cli("set", "bcache0", "cache_mode=writebakc")
    assert (refused.status, refused.err.count("\n")) == (2, 1)

    assert "in use" in cli("gc", kernel.uuid).out
    assert "writeback_percent=0" in cli("flush", "bcache0", "--dry-run").out
    assert "bcache0 is clean" in cli("flush", "bcache0").out
    assert "of dirty data back" in cli("detach", "bcache1", "--dry-run").out
    assert "bcache1 is detached" in cli("detach", "bcache1", "--wait").out
    assert cli("get", "bcache1", "state").out == "no cache\n"
    assert cli("status", "bcache1").status == 4
    assert "run by the kernel without a set" in cli("list").out
    assert cli("attach", "bcache1", f"{kernel.uuid}0").status == 2
    assert "attached to set" in cli("attach", "bcache1", kernel.uuid.upper()).out
    assert cli("attach", "bcache1", kernel.uuid).status == 4

    assert json.loads(cli("volume", "create", kernel.uuid, "1M", "--json").out)["volume"] == "bcache9"
    assert cli("volume", "remove", "bcache9").status == 3
    assert "bcache9 is removed" in cli("volume", "remove", "bcache9", "--force=data").out

    before = list(kernel.writes)
    for words in (("stop", "bcache0"), ("stop", kernel.uuid), ("unregister", kernel.uuid), ("unregister", "bcache0"),
                  ("detach", "bcache0"), ("attach", "bcache0", kernel.uuid), ("gc", kernel.uuid)):
        planned = cli(*words, "--dry-run")
        assert (planned.status, planned.err) == (0, ""), words
        assert "would " in planned.out
    assert kernel.writes == before
    assert cli("stop", "bcache0").out == "bcache0 has stopped\n"
    assert cli("stop", kernel.uuid).out == f"set {kernel.uuid} has stopped\n"
    assert cli("status").status == 4


def test_a_set_taken_apart(cli: Cli, fake: Fake) -> None:
    kernel = fake("two_backing")
    assert last_document(cli("unregister", kernel.uuid, "--json").out)["detached"] == ["bcache0", "bcache1"]
    assert cli("unregister", kernel.uuid).status == 4


def test_what_is_in_use_is_not_stopped(cli: Cli, fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = fake("flash_volume")
    monkeypatch.setattr("bcachectl.discovery.users_of",
                        lambda path: ["mounted on /srv"] if path.endswith("bcache1") else [])
    for words in (("stop", kernel.uuid), ("unregister", kernel.uuid), ("volume", "remove", "bcache1", "--force=data")):
        refused = cli(*words)
        assert (refused.status, refused.err.count("\n")) == (3, 1), words
        assert "bcache1: is in use (mounted on /srv)" in refused.err
    assert kernel.writes == []
    assert cli("stop", "bcache0").status == 0


def test_run_of_a_dirty_device(cli: Cli, fake: Fake) -> None:
    kernel = fake("dirty_crash")
    assert cli("run", "bcache0").status == 4
    kernel.let_wait("dirty")
    listed = cli("list").out
    assert "vdb: 0 B, dirty, writeback: vdb waits for its cache set" in listed
    refused = cli("run", kernel.dev / "vdb")
    assert refused.status == 3
    assert "would be lost (--force=dirty overrides" in refused.err
    assert cli("run", "vdb", "--dry-run").status == 0
    assert kernel.writes == []
    answer = json.loads(cli("run", "vdb", "--force=dirty", "--json").out)
    assert (answer["volume"], answer["state_before"], answer["state"]) == ("bcache5", "dirty", "inconsistent")


def test_run_of_a_clean_device(cli: Cli, fake: Fake) -> None:
    kernel = fake("dirty_crash")
    kernel.let_wait("clean")
    assert "runs as bcache5 without a cache; its state was clean" in cli("run", "vdb").out


def test_what_register_sees_first(cli: Cli, fake: Fake, golden: Callable[..., Path], tmp_path: Path,
                                  loop_device: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    image = golden("dirty_crash") / "cache.img"
    assert "`modprobe bcache` loads it" in cli("register", image).err
    kernel = fake("two_backing")
    refused = cli("register", image)
    assert refused.status == 4
    assert "is not a block device" in refused.err
    assert "losetup --find --show" in refused.err
    assert cli("register", tmp_path / "nothing").status == 1
    blank = tmp_path / "blank.img"
    blank.write_bytes(bytes(1 << 20))
    assert "has no bcache superblock" in cli("register", loop_device(blank)).err
    story = golden("dirty_crash", writable=True)
    with (story / "back0.img").open("r+b") as file:
        file.seek(4096 + 100)
        file.write(b"x")
    assert "the kernel would refuse it: Bad checksum" in cli("register", loop_device(story / "back0.img")).err
    assert kernel.writes == []
    # The kernel has another opinion.
    device = loop_device(story / "cache.img", read_only=True)
    kernel.failures["register"], kernel.said = errno.EINVAL, ["register_bcache() error : something else"]
    failed = cli("register", device)
    assert (failed.status, failed.err.count("\n")) == (1, 1)
    assert "the kernel says: something else" in failed.err
    assert f"would write {device} to" in cli("register", device, "--dry-run").out
    # What runs already.
    (kernel.dev / "vdb").unlink()
    (kernel.dev / "vdb").symlink_to(device)
    assert "is registered already, as bcache0" in cli("register", device).err


def test_register_of_dirty_data_with_a_new_cache(cli: Cli, fake: Fake, golden: Callable[..., Path], tmp_path: Path,
                                                 loop_device: Callable[..., str]) -> None:
    fake("two_backing")
    backing = golden("dirty_crash", writable=True) / "back0.img"
    uuid = json.loads(cli("show", "--json", backing).out)["superblock"]["set_uuid"]
    new = tmp_path / "new.img"
    new.write_bytes(b"")
    with new.open("r+b") as file:
        file.truncate(64 << 20)
    assert cli("format", "--cache", new, "--set-uuid", uuid, "--bucket-size", "64k").status == 0
    refused = cli("register", loop_device(new), loop_device(backing))
    assert refused.status == 3
    assert "never ran and has none of its data" in refused.err
