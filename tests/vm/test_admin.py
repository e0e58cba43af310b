# SPDX-License-Identifier: GPL-2.0-only
"""The offline verbs on devices that the kernel's driver runs: they are seen and read, and writing is refused."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from tests.vm import machine
from tests.vm.engine_side import bcachectl

MIB = 1 << 20
ROOT = Path(__file__).resolve().parents[2]

# One process for all commands: starting Python takes seconds in an emulated machine.
PROGRAM = """
import contextlib, io, json, os, sys
from bcachectl.cli import run
answers = []
for words in json.load(open("/job/commands.json")):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = run(words)
    answers.append([status, out.getvalue(), err.getvalue()])
json.dump(answers, open("/job/answers.json", "w"))
"""

COMMANDS = [
    ["list", "--json"], ["list"], ["show", "/dev/vda"], ["show", "/dev/vdb"], ["dump", "btree", "/dev/vda"],
    ["wipe", "/dev/vda"], ["wipe", "/dev/vdb"], ["format", "--backing", "/dev/vdb", "--force=bcache"],
    ["wipe", "/dev/bcache0"],
]


@pytest.mark.timeout(400)
def test_devices_of_the_kernel(tmp_path: Path) -> None:
    cache, backing, share = tmp_path / "cache.img", tmp_path / "back.img", tmp_path / "job"
    for path, size_bytes in ((cache, 64 * MIB), (backing, 32 * MIB)):
        with path.open("wb") as file:
            file.truncate(size_bytes)
    bcachectl("format", "--cache", cache, "--backing", backing, "--bucket-size", "64k", "--label", "photos",
              directory=tmp_path)
    share.mkdir()
    (share / "program.py").write_text(PROGRAM)
    (share / "commands.json").write_text(json.dumps(COMMANDS))
    script = (
        "register /dev/vda /dev/vdb\n"
        "wait_volume bcache0\n"
        "head -c 1048576 /dev/zero | tr '\\0' x | dd of=/dev/bcache0 bs=4k seek=10 conv=fsync 2>/dev/null\n"
        f"host env PYTHONPATH={ROOT} PYTHONDONTWRITEBYTECODE=1 {sys.executable} /job/program.py\n"
        "stop_all\n")
    done = machine.run(script, [cache, backing], share, host=True).check()
    assert done.complaints() == []
    answers = json.loads((share / "answers.json").read_text())
    by_words = {" ".join(words): answer for words, answer in zip(COMMANDS, answers, strict=True)}

    status, out, _err = by_words["list --json"]
    assert status == 0
    listed = json.loads(out)
    devices = {device["device"]: device for device in listed["devices"]}
    assert {"/dev/vda", "/dev/vdb"} <= set(devices)
    assert devices["/dev/vdb"]["label"] == "photos"
    assert [device["device"] for device in listed["kernel_devices"]] == ["/dev/bcache0"]
    assert "run by the kernel" in by_words["list"][1]
    assert by_words["show /dev/vda"][0] == by_words["show /dev/vdb"][0] == 0
    assert "CACHE_SYNC: the set has run" in by_words["show /dev/vda"][1]
    assert by_words["dump btree /dev/vda"][0] == 0
    for words in ("wipe /dev/vda", "wipe /dev/vdb", "format --backing /dev/vdb --force=bcache"):
        status, out, err = by_words[words]
        assert (status, out) == (3, ""), words
        assert "run by the kernel's bcache driver" in err
    assert by_words["wipe /dev/bcache0"][0] == 1
