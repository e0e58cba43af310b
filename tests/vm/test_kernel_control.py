# SPDX-License-Identifier: GPL-2.0-only
"""The lifecycle verbs on the kernel's driver itself, in one boot: what they say is what sysfs says.

The program runs in the machine, in one process for all commands, since starting Python takes seconds there.  Words that
begin with a colon are not the program's: ``:write`` makes dirty data, ``:sysfs`` takes some attributes down.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from bcachectl.snapshot import SetSnapshot, from_json
from bcachectl.units import parse_hprint
from tests.vm import machine
from tests.vm.engine_side import bcachectl

MIB = 1 << 20
ROOT = Path(__file__).resolve().parents[2]
UUID = "2d6c1f0e-7b5a-4c1e-8a55-90a1b2c3d4e5"

PROGRAM = """
import contextlib, glob, io, json, os, time
from bcachectl.cli import run

ATTRIBUTES = ["state", "dirty_data", "cache_mode", "writeback_percent", "writeback_delay", "writeback_running", "label"]

def read(path):
    try:
        return open(path).read().strip()
    except OSError:
        return None

def write(volume):
    fd = os.open("/dev/" + volume, os.O_WRONLY)
    for index in range(24):
        os.pwrite(fd, bytes([65 + index]) * 65536, index << 18)
    os.fsync(fd)
    os.close(fd)
    return [0, "", ""]

def sysfs(volume):
    found = {name: read(f"/sys/block/{volume}/bcache/{name}") for name in ATTRIBUTES}
    found["available"] = [read(path) for path in glob.glob("/sys/fs/bcache/*-*/cache_available_percent")]
    found["volumes"] = sorted(os.path.basename(path) for path in glob.glob("/sys/block/bcache*"))
    return [0, json.dumps(found), ""]

def command(words):
    if words[0] == ":write":
        return write(words[1])
    if words[0] == ":sysfs":
        return sysfs(words[1])
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = run(words)
    return [status, out.getvalue(), err.getvalue()]

answers = []
for words in json.load(open("/job/commands.json")):
    started = time.monotonic()
    answers.append(command(words))
    print(f"{time.monotonic() - started:6.1f} s", *words, answers[-1], flush=True)
json.dump(answers, open("/job/answers.json", "w"))
"""

STORY: list[tuple[str, str, int]] = [
    # Name, words, exit status.
    ("blank", "register /dev/vdc", 4),
    ("plan", "register /dev/vdb /dev/vda --dry-run", 0),
    ("register", "register /dev/vdb /dev/vda --json", 0),
    ("again", "register /dev/vdb", 4),
    ("list", "list --json", 0),
    ("set", "set bcache0 cache_mode=writeback writeback_percent=99 writeback_running=0 sequential_cutoff=0", 0),
    # An emulated device is slow enough to count as congested at times, and what is written then bypasses the cache.
    ("not congested", f"set {UUID} congested_read_threshold_us=0 congested_write_threshold_us=0", 0),
    ("dirty", ":write bcache0", 0),
    ("sysfs", ":sysfs bcache0", 0),
    ("status", "status --json", 0),
    ("page", "status", 0),
    ("monitor", "monitor --once --kernel", 0),
    ("where", "where bcache0 0 512 --json", 0),
    ("get", f"get {UUID[:8]} nbuckets", 0),
    ("flush", "flush bcache0", 0),
    ("flushed", ":sysfs bcache0", 0),
    ("dirty again", ":write bcache0", 0),
    ("detach", "detach /dev/vdb --wait", 0),
    ("alone", ":sysfs bcache0", 0),
    ("listed alone", "list", 0),
    ("detached", "detach bcache0", 4),
    ("attach", f"attach photos {UUID.upper()} --json", 0),
    ("attached", ":sysfs bcache0", 0),
    ("gc", f"gc {UUID} --json", 0),
    ("small", f"volume create {UUID} 100", 3),
    ("create", f"volume create {UUID} 8M --json", 0),
    ("remove refused", "volume remove bcache1", 3),
    ("remove", "volume remove bcache1 --force=data", 0),
    ("without", ":sysfs bcache0", 0),
    ("set again", "set bcache0 cache_mode=writeback writeback_running=0", 0),
    ("dirty before stop", ":write bcache0", 0),
    ("before stop", ":sysfs bcache0", 0),
    ("stop", f"stop {UUID}", 0),
    ("stopped", ":sysfs bcache0", 0),
    ("backing first", "register /dev/vdb", 0),
    ("run refused", "run /dev/vdb", 3),
    ("run planned", "run /dev/vdb --dry-run", 0),
    ("cache comes", "register /dev/vda", 0),
    ("there again", ":sysfs bcache0", 0),
    ("unregister volume", "unregister bcache0", 0),
    ("unregister set", f"unregister {UUID}", 0),
    ("backing alone", "register /dev/vdb", 0),
    ("run", "run /dev/vdb --force=dirty --json", 0),
    ("ran", ":sysfs bcache0", 0),
    ("last", "unregister bcache0", 0),
    ("nothing", ":sysfs bcache0", 0),
]


@pytest.mark.timeout(600)
def test_the_kernel_as_a_backend(tmp_path: Path) -> None:
    cache, backing, blank, share = (tmp_path / name for name in ("cache.img", "back.img", "blank.img", "job"))
    for path, size_bytes in ((cache, 64 * MIB), (backing, 32 * MIB), (blank, MIB)):
        with path.open("wb") as file:
            file.truncate(size_bytes)
    bcachectl("format", "--cache", cache, "--backing", backing, "--bucket-size", "64k", "--label", "photos",
              "--set-uuid", UUID, directory=tmp_path)
    share.mkdir()
    (share / "program.py").write_text(PROGRAM)
    (share / "commands.json").write_text(json.dumps([words.split() for _name, words, _status in STORY]))
    script = f"host env PYTHONPATH={ROOT} PYTHONDONTWRITEBYTECODE=1 {sys.executable} /job/program.py\n"
    done = machine.run(script, [cache, backing, blank], share, host=True, timeout_s=560).check()
    answers = json.loads((share / "answers.json").read_text())
    said = {name: (out, err) for (name, _words, _status), (_got, out, err) in zip(STORY, answers, strict=True)}
    for (name, words, status), (got, out, err) in zip(STORY, answers, strict=True):
        assert got == status, f"{name}: {words}: {got}\n{out}{err}"
        # `where` says that it reads a device which the kernel writes to.
        assert err.count("\n") == (1 if status or name == "where" else 0), (name, err)
    assert done.complaints() == []
    _judge(said)


def _judge(said: dict[str, tuple[str, str]]) -> None:
    def answer(name: str) -> dict[str, Any]:
        # Lines of progress may stand before the document.
        text = said[name][0]
        document: dict[str, Any] = json.loads(text[text.index("{\n"):] if "{\n" in text else text)
        return document

    assert "has no bcache superblock; the kernel would refuse it" in said["blank"][1]
    # The cache device goes first, whatever the order of the words.
    assert said["plan"][0].splitlines()[0] == (
        f"would write /dev/vda to /sys/fs/bcache/register: the cache device of set {UUID}, which has never run")
    cache, backing = answer("register")["devices"]
    assert (cache["device"], cache["state"]) == ("/dev/vda", "running")
    assert (backing["device"], backing["volume_path"], backing["attached"], backing["state"]) == (
        "/dev/vdb", "/dev/bcache0", True, "clean")
    assert "is registered already, as bcache0" in said["again"][1]
    (kernel_set,) = answer("list")["kernel_sets"]
    assert (kernel_set["set_uuid"], kernel_set["cache"]) == (UUID, "/dev/vda")
    assert [(volume["device"], volume["label"], volume["backing"]) for volume in kernel_set["volumes"]] == [
        ("/dev/bcache0", "photos", "/dev/vdb")]
    assert "writeback_percent = 40 (asked for 99)" in said["set"][0]

    truth, status = answer("sysfs"), from_json(SetSnapshot, answer("status"))
    (volume,) = status.volumes
    assert (status.source, status.uuid, status.allocator.nbuckets) == ("kernel", UUID, 1024)
    assert (volume.state, volume.mode, volume.label) == (truth["state"], "writeback", "photos") == (
        "dirty", "writeback", "photos")
    assert volume.dirty_sectors == parse_hprint(truth["dirty_data"])[0] >> 9 == 24 * 128
    assert volume.size_bytes == 32 * MIB - 8192
    assert status.allocator.in_use_percent == 100 - int(truth["available"][0])
    assert volume.writeback is not None
    assert (volume.writeback.percent, volume.writeback.running) == (40, False)
    assert status.allocator.percents is not None
    assert status.allocator.percents.dirty > 0
    assert "1.5 MiB exist only in the cache" in said["page"][0]
    assert "run by the kernel" in said["monitor"][0]
    # In how many keys the kernel put 64 KiB is its business.
    states = {sector: piece["state"] for piece in answer("where")["pieces"]
              for sector in range(piece["start"], piece["end"])}
    assert [states[sector] for sector in range(512)] == ["dirty"] * 128 + ["uncached"] * 384
    assert said["get"][0] == "1024\n"

    assert "bcache0 is clean" in said["flush"][0]
    flushed = answer("flushed")
    assert (flushed["state"], flushed["dirty_data"]) == ("clean", "0.0k")
    tuned = ("cache_mode", "writeback_percent", "writeback_delay", "writeback_running")
    assert [flushed[name] for name in tuned] == [truth[name] for name in tuned]
    assert "bcache0 is detached" in said["detach"][0]
    assert answer("alone")["state"] == "no cache"
    assert "bcache0 runs on vdb without a cache" in said["listed alone"][0]
    assert "bcache0 is not attached" in said["detached"][1]
    assert answer("attach")["volume"] == "bcache0"
    assert answer("attached")["state"] == "clean"
    assert answer("gc")["gc"]["nodes"] >= 1
    assert "smaller than a block" in said["small"][1]
    assert answer("create")["volume"] == "bcache1"
    assert "--force=data" in said["remove refused"][1]
    assert answer("without")["volumes"] == ["bcache0"]

    assert f"set {UUID} has stopped" in said["stop"][0]
    assert (answer("stopped")["volumes"], answer("stopped")["available"]) == ([], [])
    assert f"waits for its cache set {UUID} (state dirty)" in said["backing first"][0]
    refusal = said["run refused"][1]
    assert (answer("before stop")["state"], answer("before stop")["dirty_data"]) == ("dirty", "1.5M")
    assert "(1.5 MiB) and would be lost; its cache device /dev/vda is here" in refusal
    assert "--force=dirty" in refusal
    assert "would write 1 to" in said["run planned"][0]
    there = answer("there again")
    # Writeback runs again from the registration on.
    assert (there["state"], there["volumes"]) == ("dirty", ["bcache0"])
    assert 1 << 19 < parse_hprint(there["dirty_data"])[0] <= 3 << 19
    assert f"the kernel has let go of set {UUID}" in said["unregister set"][0]
    assert answer("run")["volume"] == "bcache0"
    assert answer("ran")["state"] == answer("run")["state"] == "inconsistent"
    assert answer("nothing")["volumes"] == []
