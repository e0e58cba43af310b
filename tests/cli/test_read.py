# SPDX-License-Identifier: GPL-2.0-only
"""`dump`, `where` and `list` on images that the kernel wrote; and that no reading verb ever writes (promise P1)."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from bcachectl.discovery import named
from tests.cli.conftest import Result

Cli = Callable[..., Result]
Golden = Callable[..., Path]

EXACT = ("attached_clean", "dirty_crash", "fifo_discard", "flash_volume", "gen_churn")
STRUCTURES = ("superblock", "uuids", "prio", "journal", "btree", "extents")


@pytest.mark.parametrize("name", EXACT)
def test_t4_btree_as_the_kernel_prints_it(cli: Cli, golden: Golden, name: str) -> None:
    """T4: line by line the kernel's debugfs file; tests/golden/test_walk.py tells which stories cannot, and why."""
    story = golden(name)
    dumped = cli("dump", "btree", "--format=kernel", story / "cache.img")
    expected = (story / "facts/btree.txt").read_text().replace("\0", "")
    assert dumped == Result(0, "\n".join(line for line in expected.splitlines() if line) + "\n", "")


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("name", [*EXACT, "deep_crash", "thrash_crash", "two_backing", "killed"])
def test_json_and_table_agree(cli: Cli, golden: Golden, name: str, structure: str) -> None:
    image = golden(name) / "cache.img"
    table, machine = cli("dump", structure, image), cli("dump", structure, image, "--json")
    assert table.status == machine.status == 0
    document = json.loads(machine.out)
    assert document["schema"] == 1
    assert document["kind"] == structure
    if structure != "superblock":
        assert len(document["items"]) == len(table.out.splitlines()) - 1
        assert [damage for damage in document["damages"] if not damage["harmless"]] == []


def test_extents_are_the_merged_keys(cli: Cli, golden: Golden) -> None:
    image = golden("two_backing") / "cache.img"
    keys = json.loads(cli("dump", "btree", image, "--json").out)["items"]
    runs = json.loads(cli("dump", "extents", image, "--json").out)["items"]
    assert sum(run["keys"] for run in runs) == len(keys)
    assert sum(run["size_bytes"] for run in runs) == sum(key["end"] - key["start"] for key in keys) * 512
    assert {run["volume"] for run in runs} == {"bcache0", "bcache1"}
    for before, after in itertools.pairwise(runs):
        assert before["inode"] < after["inode"] or before["end"] < after["start"] or (
            before["end"] == after["start"] and before["state"] != after["state"])


def test_dirty_extents_are_the_kernels_count(cli: Cli, golden: Golden) -> None:
    """What the kernel's dirty_data said, which it rounds to a tenth of a MiB."""
    story = golden("dirty_crash")
    runs = json.loads(cli("dump", "extents", story / "cache.img", "--json").out)["items"]
    dirty_mib = sum(run["size_bytes"] for run in runs if run["state"] == "dirty") / (1 << 20)
    facts = dict(line.split("\t")[:2] for line in (story / "facts/sysfs.tsv").read_text().splitlines() if "\t" in line)
    said = next(value for name, value in facts.items() if name.endswith("dirty_data"))
    assert abs(float(said.strip().rstrip("M;")) - dirty_mib) < 0.11, said


def test_where_matches_the_keys(cli: Cli, golden: Golden) -> None:
    story = golden("flash_volume")
    image = story / "cache.img"
    keys = json.loads(cli("dump", "btree", image, "--json").out)["items"]
    for volume, inode, offset in ((str(story / "back0.img"), 0, 16), ("bcache1", 1, 0)):
        answer = json.loads(cli("where", volume, 0, 2000, "--cache", image, "--json").out)
        cached = {sector: (piece["device_sector"] + sector - piece["start"], piece["state"])
                  for piece in answer["pieces"] if piece["device"] == "cache"
                  for sector in range(piece["start"], piece["end"])}
        expected = {sector - offset: (key["sector"] + sector - key["start"], key["state"]) for key in keys
                    if key["inode"] == inode for sector in range(key["start"], key["end"])
                    if sector - offset < 2000}
        assert cached == expected
        ends = [piece["end"] for piece in answer["pieces"]]
        assert [piece["start"] for piece in answer["pieces"]] == [0, *ends[:-1]]
        assert ends[-1] == 2000


def test_where_names_a_volume_in_four_ways(cli: Cli, golden: Golden) -> None:
    story = golden("two_backing")
    uuids = json.loads(cli("dump", "uuids", story / "cache.img", "--json").out)["items"]
    said = {cli("where", name, 100, 50, "--cache", story / "cache.img").out
            for name in (story / "back1.img", "bcache1", uuids[1]["uuid"], uuids[1]["uuid"].upper().replace("-", ""))}
    assert len(said) == 1


def test_list(cli: Cli, golden: Golden, loop_device: Callable[..., str]) -> None:
    story = golden("two_backing", writable=True)
    device = loop_device(story / "cache.img")
    listed = json.loads(cli("list", "--json", story / "back0.img", story / "back1.img").out)
    ours = {entry["device"]: entry for entry in listed["devices"] if entry["device"] in
            (device, str(story / "back0.img"), str(story / "back1.img"))}
    assert len(ours) == 3
    assert len({entry["set_uuid"] for entry in ours.values()}) == 1
    assert ours[device]["kind"] == "loop"
    assert ours[device]["file"] == str(story / "cache.img")
    assert ours[device]["role"] == "cache"
    assert ours[str(story / "back0.img")]["state"] == "dirty"
    text = cli("list", story / "back0.img", story / "back1.img").out
    assert f"set {ours[device]['set_uuid']}" in text
    assert device in text


def test_list_goes_on_past_what_it_cannot_read(cli: Cli, golden: Golden, tmp_path: Path) -> None:
    image = golden("fresh") / "cache.img"
    listed = cli("list", tmp_path / "nothing", tmp_path, image)
    assert listed.status == 1
    assert listed.err == ""
    assert f"{tmp_path / 'nothing'}: no such file or device" in listed.out
    assert f"{tmp_path}: is a directory" in listed.out
    assert str(image) in listed.out


def test_list_says_that_the_cache_is_missing(cli: Cli, golden: Golden) -> None:
    assert "its cache device is not here" in cli("list", golden("dirty_crash") / "back0.img").out


def test_where_needs_the_data_offset_only_without_the_backing_device(cli: Cli, golden: Golden) -> None:
    story = golden("dirty_crash")
    image = story / "cache.img"
    by_device = cli("where", story / "back0.img", 0, 64, "--cache", image)
    assert cli("where", "bcache0", 0, 64, "--cache", image).out == by_device.out
    assert cli("where", "bcache0", 0, 64, "--cache", image, "--data-offset", 16).out == by_device.out
    assert cli("where", "bcache0", 0, 64, "--cache", image, "--data-offset", 2048).out != by_device.out
    assert cli("where", story / "back0.img", 0, "--cache", image, "--data-offset", 16).status == 2
    assert cli("where", "bcache0", 0, "--cache", image, "--data-offset", 8).status == 2


def test_p1_devices_that_refuse_writes(cli: Cli, golden: Golden, loop_device: Callable[..., str]) -> None:
    """P1: every reading verb works on block devices that cannot be written."""
    story = golden("dirty_crash", writable=True)
    cache, backing = (loop_device(story / name, read_only=True) for name in ("cache.img", "back0.img"))
    assert [cli("show", device).status for device in (cache, backing)] == [0, 0]
    assert [cli("dump", structure, cache).status for structure in STRUCTURES] == [0] * len(STRUCTURES)
    assert cli("where", backing, 0, 5000, "--cache", cache).status == 0
    assert {cache, backing} <= {entry["device"] for entry in json.loads(cli("list", "--json").out)["devices"]}
    for words in (("wipe", backing, "--force=dirty"),
                  ("format", "--backing", backing, "--force=bcache", "--force=dirty")):
        assert cli(*words, "--dry-run").status == 0
        assert "read-only" in cli(*words).err


@pytest.mark.parametrize("name", ["deep_crash", "flash_volume", "fresh"])
def test_p1_reading_verbs_never_write(cli: Cli, golden: Golden, tmp_path: Path, name: str) -> None:
    """P1: the files are read-only, their content stays, and so do their times."""
    story = golden(name)
    images = sorted(story.glob("*.img"))
    before = [(hashlib.sha256(image.read_bytes()).hexdigest(), os.stat(image).st_mtime_ns) for image in images]
    for image in images:
        cli("show", image)
        cli("list", image)
        for structure in STRUCTURES:
            cli("dump", structure, image)
        cli("where", image, 0, 100, "--cache", images[-1])
        assert cli("image", "create", image, tmp_path / f"{image.name}.bcimg").status == 0
    assert before == [(hashlib.sha256(image.read_bytes()).hexdigest(), os.stat(image).st_mtime_ns) for image in images]


def test_status_of_a_device_that_does_not_run_says_where_to_look(cli: Cli, golden: Callable[..., Path]) -> None:
    cache = golden("fresh") / "cache.img"
    result = cli("status", cache)
    assert (result.status, result.out, result.err.count("\n")) == (4, "", 1)
    assert f"`bcachectl monitor --once {cache}`" in result.err
    assert "monitor" not in cli("status", "bcache0").err


def test_one_format_at_a_time(cli: Cli, golden: Golden) -> None:
    cache = golden("dirty_crash") / "cache.img"
    for words in (["show", "--format=bcache-super-show"], ["dump", "btree", "--format=kernel"]):
        assert cli(*words, cache).status == 0
        refused = cli(*words, cache, "--json")
        assert (refused.status, refused.out) == (2, "")
        assert "and --json exclude each other" in refused.err


def test_watching_tells_what_comes_and_goes(cli: Cli, golden: Golden, monkeypatch: pytest.MonkeyPatch) -> None:
    """For programs a document a line, each saying what it is."""
    backing = golden("dirty_crash") / "back0.img"
    node = replace(named(str(backing)), kind="loop")
    monkeypatch.setattr("bcachectl.discovery.enumerate_devices", list)
    monkeypatch.setattr("bcachectl.discovery.watch", lambda: iter([("add", node), ("remove", node)]))
    text = cli("list", "--watch").out.splitlines()
    assert text[1].startswith(f"add {backing} (loop, 96 MiB: backing device of set 0167b536")
    assert text[2] == f"remove {backing} (loop, 96 MiB)"
    first, *events = map(json.loads, cli("list", "--watch", "--json").out.splitlines())
    assert (first["kind"], first["devices"]) == ("list", [])
    assert [(each["kind"], each["action"], each["device"]["kind"]) for each in events] == [
        ("event", "add", "loop"), ("event", "remove", "loop")]
    assert events[0]["device"]["state"] == "dirty"
