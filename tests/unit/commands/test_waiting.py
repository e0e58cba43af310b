# SPDX-License-Identifier: GPL-2.0-only
"""What ``detach --wait``, ``flush`` and ``gc`` say while they wait: how much is left, how fast, how long, why not."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import signal
import sys
from typing import Any

import pytest

from bcachectl.commands.waiting import (
    ALL_VOLUMES,
    RATE_LOOKS,
    STALL_LOOKS,
    DirtyProgress,
    progress_line,
    progress_record,
    wait_for,
)
from bcachectl.errors import WrongState
from bcachectl.snapshot import GcSnapshot, SetSnapshot
from bcachectl.views.alerts import why_stalled
from tests.unit.views.samples import sample_snapshot, sample_volume

SECOND = 1_000_000_000


def looks(*dirty_sectors: int) -> DirtyProgress:
    """A progress that saw these amounts a second apart."""
    progress = DirtyProgress()
    for second, sectors in enumerate(dirty_sectors):
        progress.add(second * SECOND, sectors)
    return progress


def test_rate_and_time_left() -> None:
    progress = looks(10240, 8192, 6144)
    assert progress.rate_sectors == 2048
    volume = sample_volume(dirty_sectors=6144)
    assert progress_line(sample_snapshot(), volume, progress, "detaching bcache0") == (
        "detaching bcache0: 3 MiB dirty, 1 MiB/s, 3.0 s left")
    record = progress_record(sample_snapshot(), volume, progress, "detaching bcache0")
    assert (record["dirty_bytes"], record["rate_bytes"]) == (3 << 20, 1 << 20)
    assert (record["eta_s"], record["stall"]) == (3, None)


def test_before_there_is_a_rate() -> None:
    progress = looks(100)
    assert progress.rate_sectors is None
    assert progress_line(sample_snapshot(), sample_volume(dirty_sectors=100), progress, "x") == "x: 50 KiB dirty"


def test_the_rate_is_that_of_the_last_looks() -> None:
    progress = looks(*(1000 for _ in range(50)), *(1000 - 10 * step for step in range(RATE_LOOKS)))
    assert progress.rate_sectors == 10


def test_a_stall_has_a_reason() -> None:
    progress = looks(*(500 for _ in range(STALL_LOOKS)))
    assert progress.is_stalled
    volume = sample_volume(dirty_sectors=500, io_disabled=True)
    assert "stalled: bcache0 is disabled after I/O errors" in progress_line(sample_snapshot(), volume, progress, "x")
    record = progress_record(sample_snapshot(), volume, progress, "x")
    assert "io_disable" in record["stall"]
    assert record["eta_s"] is None
    assert not looks(*(500 for _ in range(STALL_LOOKS - 1))).is_stalled
    assert not looks(*(0 for _ in range(STALL_LOOKS))).is_stalled


def test_gc_tells_its_progress() -> None:
    gc = sample_snapshot().gc
    assert gc is not None
    running = dataclasses.replace(gc, running=True, progress_percent=40)
    assert progress_line(sample_snapshot(gc=running), None, DirtyProgress(), "gc") == "gc: 40 %"
    unknown = dataclasses.replace(running, progress_percent=None)
    assert progress_line(sample_snapshot(gc=unknown), None, DirtyProgress(), "gc") == "gc: 212 nodes"
    assert progress_line(sample_snapshot(), None, DirtyProgress(), "gc") == "gc"
    assert progress_record(sample_snapshot(gc=running), None, DirtyProgress(), "gc")["percent"] == 40


class FakeSet:
    """A set whose dirty data shrinks with each look, and a job that ends after some."""

    uuid = source = ""
    result: Any = None

    def __init__(self, ends_after: int, error: Exception | None = None) -> None:
        self.looked = 0
        self.waits = 0
        self.ends_after = ends_after
        self.error = error
        self.closed = 0

    def wait(self, _timeout_s: float) -> bool:
        self.waits += 1
        if self.waits > self.ends_after and self.error is not None:
            raise self.error
        return self.waits > self.ends_after

    def close(self) -> None:
        self.closed += 1

    def snapshot(self, _cells: int) -> SetSnapshot:
        self.looked += 1
        volume = sample_volume(dirty_sectors=4096 - 1024 * self.looked)
        gc: GcSnapshot | None = None
        return sample_snapshot(t_ns=self.looked * SECOND, volumes=(volume,), gc=gc)


def test_json_lines_on_request(capsys: pytest.CaptureFixture[str]) -> None:
    fake = FakeSet(3)
    wait_for(fake, fake, "detaching", volume="bcache0", as_json=True)  # type: ignore[arg-type]
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["dirty_bytes"] for line in lines] == [3072 * 512, 2048 * 512, 1024 * 512]
    assert [line["eta_s"] for line in lines] == [None, 2, 1]


def test_silence_without_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    fake = FakeSet(2)
    wait_for(fake, fake, "detaching", volume="bcache0")  # type: ignore[arg-type]
    assert capsys.readouterr() == ("", "")
    assert fake.closed == 1


def test_one_line_on_a_terminal_that_is_gone_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = io.StringIO()
    monkeypatch.setattr(terminal, "isatty", lambda: True)
    monkeypatch.setattr(sys, "stderr", terminal)
    fake = FakeSet(2, WrongState("it failed"))
    with pytest.raises(WrongState):
        wait_for(fake, fake, "detaching", volume="bcache0")  # type: ignore[arg-type]
    assert terminal.getvalue().count("\n") == 0
    assert "detaching: 1 MiB dirty, 512 KiB/s, 2.0 s left" in terminal.getvalue()
    assert terminal.getvalue().endswith("\r\x1b[K")


def test_a_rounded_amount_needs_some_steps_for_a_rate() -> None:
    # 100 MiB a step, 20 MiB a second: the amount changes every five looks.
    step = 100 << 11
    progress = DirtyProgress()
    for second in range(21):
        progress.add(second * SECOND, 20 * step - second // 5 * step, step_sectors=step, keys_done=second)
        assert second == 20 or progress.rate_sectors is None
        assert not progress.is_stalled
    assert progress.rate_sectors == 4 * step / 16


def test_keys_that_are_written_back_are_no_stall() -> None:
    step = 100 << 11
    progress = DirtyProgress()
    for second in range(STALL_LOOKS):
        progress.add(second * SECOND, step, step_sectors=step, keys_done=second)
    assert not progress.is_stalled
    for second in range(STALL_LOOKS, 2 * STALL_LOOKS):
        progress.add(second * SECOND, step, step_sectors=step, keys_done=STALL_LOOKS)
    assert progress.is_stalled


def test_why_a_kernel_stalls() -> None:
    volume = sample_volume(writeback=dataclasses.replace(sample_volume().writeback, in_flight=None))  # type: ignore[type-var]
    snapshot = sample_snapshot(source="kernel", volumes=(volume,))
    assert "the kernel does not tell why" in why_stalled(snapshot, volume)
    assert "7 keys could not be written back" in why_stalled(
        dataclasses.replace(snapshot, writeback_keys_failed=7), volume)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_to_end_lets_the_job_clean_up(number: signal.Signals) -> None:
    class Ended(FakeSet):
        def wait(self, _timeout_s: float) -> bool:
            os.kill(os.getpid(), number)
            return super().wait(_timeout_s)

    fake, before = Ended(5), signal.getsignal(number)
    with pytest.raises(KeyboardInterrupt):
        wait_for(fake, fake, "flushing", volume="bcache0")  # type: ignore[arg-type]
    assert fake.closed == 1
    assert signal.getsignal(number) is before


def test_the_dirty_data_of_all_volumes(capsys: pytest.CaptureFixture[str]) -> None:
    class Two(FakeSet):
        def snapshot(self, _cells: int) -> SetSnapshot:
            return sample_snapshot(volumes=(sample_volume(dirty_sectors=0, has_dirty=False), sample_volume(
                "bcache1", dirty_sectors=100)))

    fake = Two(1)
    wait_for(fake, fake, "unregistering", volume=ALL_VOLUMES, as_json=True)  # type: ignore[arg-type]
    line = json.loads(capsys.readouterr().out)
    assert (line["volume"], line["dirty_bytes"]) == ("bcache1", 51200)
