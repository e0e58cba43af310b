# SPDX-License-Identifier: GPL-2.0-only
"""The verbs of a set of the kernel's: what is written, in which order, what is waited for, and what is refused."""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import Any

import pytest

from bcachectl import control
from bcachectl.control import KERNEL, find, find_set, find_volume
from bcachectl.errors import BcachectlError, DeviceError, Refused, UsageError, WrongState
from bcachectl.sysfs.live import STUCK_S, KernelSet, find_cached, kernel_alone
from bcachectl.sysfs.tree import Sysfs
from bcachectl.units import hprint, parse_hprint
from tests.unit.sysfs.fake import FakeKernel

Fake = Callable[[str], FakeKernel]


def do(live: Any, verb: str, **params: Any) -> Any:
    job = live.start(verb, **params)
    assert job.wait(60)
    job.close()
    return job.result


def live_set(kernel: FakeKernel) -> KernelSet:
    return KernelSet(Sysfs(), kernel.uuid)


# What is there.


def test_nodes_and_slots(fake: Fake) -> None:
    kernel = fake("two_backing")
    nodes = Sysfs().nodes()
    assert [(node.name, node.disk, node.slot) for node in nodes] == [("bcache0", "vdb", 0), ("bcache1", "vdc", 1)]
    assert {node.set_uuid for node in nodes} == {kernel.uuid}
    assert Sysfs().cache_disk(kernel.uuid) == "vda"


@pytest.mark.parametrize("text", ["UUID", "PREFIX", "DIGITS", "DEV/vda"])
def test_a_set_by_each_of_its_names(fake: Fake, text: str) -> None:
    kernel = fake("dirty_crash")
    text = {"UUID": kernel.uuid.upper(), "PREFIX": kernel.uuid[:8], "DIGITS": kernel.uuid.replace("-", "")}.get(
        text, text.replace("DEV", str(kernel.dev)))
    found = find(text, KERNEL)
    assert (found.live.uuid, found.target, found.live.source) == (kernel.uuid, "", "kernel")
    assert find_volume(text).target == "bcache0"


@pytest.mark.parametrize("text", ["bcache1", "DEV/bcache1", "DEV/vdc", "UUID"])
def test_a_volume_by_each_of_its_names(fake: Fake, text: str) -> None:
    kernel = fake("two_backing")
    uuid = (kernel.backing("vdc") / "backing_dev_uuid").read_text().strip()
    found = find(text.replace("DEV", str(kernel.dev)).replace("UUID", uuid))
    assert (found.live.uuid, found.target) == (kernel.uuid, "bcache1")
    assert find_set(text.replace("DEV", str(kernel.dev)).replace("UUID", uuid)).uuid == kernel.uuid


def test_an_engine_and_the_kernel_may_have_the_same_names(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = fake("dirty_crash")
    other = KernelSet(Sysfs(), kernel.uuid)
    monkeypatch.setattr(other, "source", "engine")
    monkeypatch.setattr(control, "engines", lambda: [other])
    with pytest.raises(UsageError, match=r"use --kernel or --engine: bcache0 of .*, bcache0 of .*kernel"):
        find("bcache0")
    assert find("bcache0", "engine").live is other
    assert find("bcache0", KERNEL).live.source == "kernel"
    with pytest.raises(UsageError, match="several sets run here"):
        find(None)


def test_what_is_not_there(fake: Fake) -> None:
    kernel = fake("dirty_crash")
    for text in ("bcache7", "12345678", "", "/dev/null"):
        with pytest.raises(WrongState):
            find(text)
    kernel.write(str(kernel.set / "stop"), "1")
    with pytest.raises(WrongState, match="the kernel's driver runs no set; `bcachectl register DEVICE`"):
        find(None, KERNEL)


# Verbs.


def test_detach_waits_until_the_device_has_no_cache(fake: Fake) -> None:
    kernel = fake("dirty_crash")
    live = live_set(kernel)
    job = live.start("detach", volume="bcache0")
    assert kernel.writes == []
    assert not job.wait(0)
    assert kernel.writes == [("devices/vdb/bcache/detach", "1")]
    assert live.volumes()[0].state == "dirty"
    assert job.wait(60)
    assert live.volumes() == ()
    (alone,) = kernel_alone(Sysfs())
    assert alone.get("", ["state"]) == {"state": "no cache"}
    with pytest.raises(WrongState, match="bcache0 is not attached"):
        alone.start("detach", volume="bcache0")
    with pytest.raises(WrongState, match="runs on vdb without a cache"):
        find("bcache0").live.snapshot(0)


def test_attach(fake: Fake) -> None:
    kernel = fake("dirty_crash")
    live = live_set(kernel)
    with pytest.raises(WrongState, match="bcache0 is already attached, to set"):
        do(live, "attach", volume="bcache0", set=kernel.uuid)
    with pytest.raises(WrongState, match="register DEVICE"):
        do(live, "attach", volume="vdz", set=kernel.uuid)
    kernel.take_out(kernel.backing())
    assert do(live, "attach", volume=str(kernel.dev / "vdb"), set=kernel.uuid) == "bcache0"
    assert live.volumes()[0].slot == 7


def test_what_attach_fails_with_is_explained(fake: Fake) -> None:
    kernel = fake("dirty_crash")
    kernel.take_out(kernel.backing())
    kernel.failures["attach"] = errno.EINVAL
    with pytest.raises(DeviceError) as caught:
        do(live_set(kernel), "attach", volume="bcache0", set=kernel.uuid)
    text = str(caught.value)
    assert "/vdb/bcache/attach: writing" in text
    assert "Invalid argument (EINVAL): it may be attached already, have smaller blocks" in text
    kernel.said = ["bch_cached_dev_attach() Couldn't attach vdb: block size less than set's block size"]
    with pytest.raises(DeviceError, match="the kernel says: Couldn't attach vdb: block size less than") as caught:
        do(live_set(kernel), "attach", volume="bcache0", set=kernel.uuid)
    assert caught.value.errno == errno.EINVAL


def test_the_log_says_only_what_is_new(fake: Fake) -> None:
    kernel = fake("dirty_crash")
    kernel.kmsg.write_text("6,1,2,-;bcache: old news\n")
    kernel.failures["register"], kernel.said = errno.EINVAL, ["register_bcache() error : Bad checksum"]
    with pytest.raises(DeviceError) as caught:
        Sysfs().register("/dev/vdx")
    assert str(caught.value).endswith("the kernel says: Bad checksum")


def test_stop_ends_the_volumes_first(fake: Fake) -> None:
    kernel = fake("two_backing")
    live = live_set(kernel)
    do(live, "stop")
    assert [place.rpartition("/")[0] for place, _text in kernel.writes] == [
        "devices/vdb/bcache", "devices/vdc/bcache", f"fs/bcache/{kernel.uuid}"]
    assert live.wait_end(1)
    with pytest.raises(WrongState, match="does not run set"):
        live.snapshot(0)


@pytest.mark.parametrize("verb", ["stop", "unregister"])
def test_a_set_has_ended_when_its_cache_device_is_let_go(fake: Fake, verb: str) -> None:
    kernel = fake("two_backing")
    live = live_set(kernel)
    job = live.start(verb)
    assert not job.wait(0.1)
    assert not kernel.set.exists()
    assert not live.wait_end(0)
    assert job.wait(1)
    assert not kernel.backing("vda").exists()
    assert live.wait_end(0)


def test_a_set_that_is_registered_again_has_ended(fake: Fake) -> None:
    kernel = fake("two_backing")
    live = live_set(kernel)
    job = live.start("stop")
    assert not job.wait(0.1)
    (kernel.root / "fs/bcache" / kernel.uuid).mkdir()
    assert job.wait(0.2)
    assert kernel.backing("vda").exists()


def test_one_volume_ends_and_the_set_goes_on(fake: Fake) -> None:
    kernel = fake("two_backing")
    live = live_set(kernel)
    do(live, "volume_stop", volume="bcache1")
    assert [volume.name for volume in live.volumes()] == ["bcache0"]
    assert not live.wait_end(0)


def test_unregister(fake: Fake) -> None:
    kernel = fake("two_backing")
    do(live_set(kernel), "unregister")
    assert kernel.writes == [(f"fs/bcache/{kernel.uuid}/unregister", "1")]
    assert Sysfs().set_uuids() == []
    assert [node.set_uuid for node in Sysfs().nodes()] == [None, None]


@pytest.mark.parametrize(("last_s", "takes_s"), [(-1, 0), (0, 0), (1, 5), (100, 0), (100, 7)])
def test_gc_is_done_when_one_has_ended_since(fake: Fake, monkeypatch: pytest.MonkeyPatch, last_s: int,
                                             takes_s: int) -> None:
    kernel = fake("dirty_crash")
    asked: list[float] = []
    ended_s = kernel.now_s - last_s - 0.95 if last_s >= 0 else None

    def read(path: str) -> str:
        if not path.endswith("btree_gc_last_sec"):
            return kernel.read(path)
        ends = [end for end in (ended_s, *(start + takes_s + 0.003 for start in asked))
                if end is not None and end <= kernel.now_s]
        return f"{int(kernel.now_s - max(ends))}\n" if ends else "-1\n"

    monkeypatch.setattr("bcachectl.sysfs.tree.read_text", read)
    monkeypatch.setattr(kernel, "_on_trigger_gc", lambda real, text: asked.append(kernel.now_s))
    started = kernel.now_s
    do(live_set(kernel), "gc")
    assert len(asked) == 1
    assert takes_s < kernel.now_s - asked[0] < takes_s + 0.3
    assert asked[0] - started < 2.5


def test_gc_that_runs_all_the_time_is_not_waited_for(fake: Fake) -> None:
    kernel = fake("dirty_crash")
    (kernel.set / "internal/btree_gc_last_sec").write_text("0\n")
    do(live_set(kernel), "gc")
    assert kernel.writes == []


@pytest.mark.parametrize("ends", ["well", "interrupted", "device gone"])
def test_flush_puts_everything_back(fake: Fake, ends: str) -> None:
    kernel = fake("dirty_crash")
    before = live_set(kernel).get("bcache0", ["writeback_percent", "writeback_delay", "writeback_running"])
    assert before == {"writeback_percent": "10", "writeback_delay": "30", "writeback_running": "0"}
    job = live_set(kernel).start("flush", volume="bcache0")
    assert not job.wait(0)
    now = live_set(kernel).get("bcache0", list(before))
    assert now == {"writeback_percent": "0", "writeback_delay": "0", "writeback_running": "1"}
    if ends == "device gone":
        kernel.write(str(kernel.backing() / "stop"), "1")
        with pytest.raises(WrongState, match="it was stopped"):
            job.wait(60)
        return
    if ends == "well":
        assert job.wait(60)
        assert live_set(kernel).volumes()[0].state == "clean"
    else:
        job.close()
    assert live_set(kernel).get("bcache0", list(before)) == before


def test_flush_of_a_device_that_is_written_to_all_the_time(fake: Fake) -> None:
    kernel = fake("dirty_crash")
    mode = (kernel.backing() / "cache_mode").read_text()
    job = live_set(kernel).start("flush", volume="bcache0")
    kernel._leaving[kernel.backing()] = 1 << 30
    kernel._leave = lambda directory: None  # type: ignore[method-assign]
    assert not job.wait(STUCK_S + 5)
    assert "[writethrough]" in (kernel.backing() / "cache_mode").read_text()
    job.close()
    assert (kernel.backing() / "cache_mode").read_text() == mode


def test_flash_volumes(fake: Fake) -> None:
    kernel = fake("flash_volume")
    live = live_set(kernel)
    for size_bytes in (0, 511, 4095):
        with pytest.raises(Refused, match="smaller than a block of 4096 bytes"):
            do(live, "volume_create", size=size_bytes)
    assert kernel.writes == []
    assert do(live, "volume_create", size=(1 << 20) + 100) == "bcache9"
    assert kernel.writes == [(f"fs/bcache/{kernel.uuid}/flash_vol_create", str(1 << 20))]
    with pytest.raises(WrongState, match="cached device, not a flash-only volume"):
        do(live, "volume_remove", volume="bcache0")
    with pytest.raises(WrongState, match="`volume remove` deletes it"):
        do(live, "volume_stop", volume="bcache1")
    for verb in ("detach", "flush"):
        with pytest.raises(WrongState, match="flash-only"):
            do(live, verb, volume="bcache1")
    do(live, "volume_remove", volume="bcache1")
    assert "bcache1" not in [volume.name for volume in live.volumes()]


def test_what_waits_for_its_set(fake: Fake) -> None:
    kernel = fake("dirty_crash")
    kernel.let_wait("dirty")
    (alone,) = kernel_alone(Sysfs())
    assert "vdb waits for its cache set (state dirty)" in alone.story
    assert find("vdb").target == "vdb"
    for verb in ("gc", "flush"):
        with pytest.raises(WrongState, match=f"no set for `{verb}`"):
            alone.start(verb)
    assert do(alone, "run") == "bcache5"
    assert find_cached(Sysfs(), "bcache5").disk == "vdb"
    with pytest.raises(WrongState, match="runs already, as bcache5"):
        do(kernel_alone(Sysfs())[0], "run")


# Attributes.


def test_names_as_in_sysfs(fake: Fake) -> None:
    kernel = fake("flash_volume")
    live = live_set(kernel)
    every = live.get("", [])
    assert {"synchronous", "internal/copy_gc_enabled", "cache0/nbuckets", "stats_day/cache_hits"} <= set(every)
    assert not {"cache0/priority_stats", "internal/bset_tree_stats", "stop", "unregister", "cache0"} & set(every)
    assert live.get("", ["nbuckets", "cache0/nbuckets", "copy_gc_enabled"]) == {
        "nbuckets": "1024", "cache0/nbuckets": "1024", "copy_gc_enabled": "0"}
    assert live.get("", ["priority_stats"])["priority_stats"].startswith("Unused:\t\t85%\nClean:")
    assert live.get("bcache1", []) == {"label": "", "size": "16.0M"}
    for name in ("../synchronous", "internal/../synchronous", "bdev0/state", "/etc/passwd", "nothing", "cache0", "",
                 "bdev0"):
        with pytest.raises(UsageError, match="is no attribute of a set"):
            live.get("", [name])
    with pytest.raises(UsageError, match="can only be written"):
        live.get("bcache0", ["attach"])


def test_set_says_what_is_stored(fake: Fake) -> None:
    kernel = fake("dirty_crash")
    live = live_set(kernel)
    asked = {"writeback_percent": "99", "cache_mode": "writearound", "label": "", "writeback_delay": "7"}
    assert live.set("bcache0", asked) == {
        "writeback_percent": "40", "cache_mode": "writearound", "label": "", "writeback_delay": "7"}
    assert kernel.writes[2] == ("devices/vdb/bcache/label", "\n")
    assert live.set("", {"internal/copy_gc_enabled": "1", "discard": "1", "trigger_gc": "go"}) == {
        "internal/copy_gc_enabled": "1", "discard": "1", "trigger_gc": "go"}


def test_sizes_are_shown_rounded(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = fake("dirty_crash")

    def cutoff(real: Any, text: str) -> None:
        real.write_text(hprint(min(int(text), (1 << 32) - 1)) + "\n")

    monkeypatch.setattr(kernel, "_on_sequential_cutoff", cutoff, raising=False)
    live = live_set(kernel)
    assert live.set("bcache0", {"sequential_cutoff": "100"}) == {"sequential_cutoff": "100"}
    assert live.set("bcache0", {"sequential_cutoff": str(1 << 40)}) == {"sequential_cutoff": "3.9G"}


@pytest.mark.parametrize(("target", "name", "value", "why"), [
    ("bcache0", "writeback_percent", "4M", "not a plain decimal number"),
    ("bcache0", "writeback_percent", " 5", "not a plain decimal number"),
    ("bcache0", "writeback_percent", "0x10", "not a plain decimal number"),
    ("bcache0", "writeback_percent", "-1", "not a plain decimal number"),
    ("bcache0", "writeback_percent", str(1 << 64), "larger than 2"),
    ("bcache0", "cache_mode", "Writeback", "is none of writethrough, writeback, writearound, none"),
    ("bcache0", "cache_mode", "[writeback]", "is none of"),
    ("bcache0", "label", "x" * 33, "has 33 bytes"),
    ("bcache0", "state", "clean", "can only be read"),
    ("bcache0", "running", "1", "`bcachectl run` does that"),
    ("bcache0", "detach", "1", "`bcachectl detach` does that"),
    ("", "unregister", "1", "`bcachectl unregister` does that"),
    ("", "flash_vol_create", "1", "`bcachectl volume create` does that"),
    ("", "writeback_percent", "4", "is no attribute of a set"),
    ("", "synchronous", "0", "lose everything"),
    ("bcache1", "size", "1M", "would be lost"),
])
def test_t22_nothing_is_written_if_a_value_is_wrong(fake: Fake, target: str, name: str, value: str, why: str) -> None:
    kernel = fake("flash_volume")
    good = {"bcache0": {"writeback_delay": "7"}, "": {"journal_delay_ms": "50"}, "bcache1": {"label": "x"}}[target]
    for act in (live_set(kernel).set, live_set(kernel).check):
        with pytest.raises(BcachectlError, match=why):
            act(target, {**good, name: value})
    assert kernel.writes == []


def test_a_failure_says_what_was_set_before(fake: Fake) -> None:
    kernel = fake("dirty_crash")
    kernel.failures["writeback_percent"] = errno.EBUSY
    with pytest.raises(DeviceError, match=r"EBUSY.*going down.*; set before that: writeback_delay=7"):
        live_set(kernel).set("bcache0", {"writeback_delay": "7", "writeback_percent": "5"})


@pytest.mark.parametrize("value", [0, 511, 512, 1023, 131072, 1000 << 10, (1 << 40) - 1, 1 << 40, 3774873, -5 << 20])
def test_hprint_and_back(value: int) -> None:
    least, step = parse_hprint(hprint(value))
    assert hprint(least) == hprint(value)
    if value >= 0:
        assert least <= value < least + step
        assert least == 0 or hprint(least - 1) != hprint(value)


@pytest.mark.parametrize("text", ["", "12", "1.5", "1.55M", "x.1M", "1M", "1.0Q", "-"])
def test_no_hprint(text: str) -> None:
    with pytest.raises(UsageError):
        parse_hprint(text)
