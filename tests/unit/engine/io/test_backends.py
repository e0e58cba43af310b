# SPDX-License-Identifier: GPL-2.0-only
"""Both backends give the same answers; the overlay keeps its base untouched; the loop sleeps and wakes."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import mmap
import os
import random
import select
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from bcachectl.blockdev import BlockDevice, open_device
from bcachectl.engine.front import Front
from bcachectl.engine.io import uring
from bcachectl.engine.io.loop import Loop, make_backend, make_sched
from bcachectl.engine.io.medium import Backend, Medium
from bcachectl.engine.io.overlay import Overlay
from bcachectl.engine.io.ring import Arrivals, Ring
from bcachectl.engine.sched import DISCARD, FLUSH, FUA, NS_PER_S, PREFLUSH, READ, WRITE, WRITE_ZEROES, Io, Sched
from bcachectl.errors import WrongState

SIZE_BYTES = 1 << 20


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "image"
    path.write_bytes(random.Random(1).randbytes(SIZE_BYTES))
    return path


@pytest.fixture(params=["sync", "uring", "uring-direct", "uring-waited", "uring-waited-direct"])
def backend(request: pytest.FixtureRequest, image: Path) -> Iterator[Backend]:
    kind, *words = request.param.split("-")
    try:
        device = open_device(str(image), write=True, direct="direct" in words)
        made = make_backend([device], kind, waited_in="waited" in words)
    except Exception as error:
        pytest.skip(f"not here: {error}")
    yield made
    made.close()
    device.close()


def ring_backend(media: list[Any]) -> uring.RingBackend:
    """A ring, where the kernel has one."""
    try:
        return uring.RingBackend(media)
    except OSError as error:
        pytest.skip(f"not here: {error}")


def drain(backend: Backend, ios: list[Io]) -> list[Io]:
    backend.submit(ios)
    done: list[Io] = []
    while len(done) < len(ios):
        if isinstance(backend, uring.RingBackend) and backend.waited_in:
            read_fd, write_fd = os.pipe()
            assert not backend.wait(read_fd, 0), "nothing can be read from an empty pipe"
            os.write(write_fd, b"x")
            while not backend.wait(read_fd, 5):
                pass
            os.close(read_fd)
            os.close(write_fd)
            got = backend.reap()
        elif backend.fileno() >= 0 and not (got := backend.reap()):
            assert select.select([backend.fileno()], [], [], 5)[0], "the ring never answered"
            got = backend.reap()
        elif backend.fileno() < 0:
            got = backend.reap()
        done += got
    assert backend.pending() == 0
    return done


def in_parts(data: bytes) -> tuple[Any, ...]:
    """As the data of a group of writes comes."""
    half = len(data) >> 10 << 9
    return data[:512], bytearray(data[512:half]), memoryview(data)[max(half, 512):]


def test_random_ios_agree_with_a_bytearray(backend: Backend, image: Path) -> None:
    draw = random.Random(2)
    model = bytearray(image.read_bytes())
    for _ in range(60):
        ios, spans = [], []
        used = 0
        while used < SIZE_BYTES >> 9:                   # side by side, so no two touch one sector
            sector = used + draw.randrange(64)
            nsectors = draw.choice((1, 2, 8, 24, 128))
            used = sector + nsectors
            if used > SIZE_BYTES >> 9:
                break
            op = draw.choice((READ, READ, WRITE, WRITE, WRITE_ZEROES, DISCARD, FLUSH))
            start, end = sector << 9, used << 9
            if op == WRITE:
                data = draw.randbytes(end - start)
                model[start:end] = data
                buf = draw.choice((bytes, bytearray, memoryview, in_parts))(data)
                ios.append(Io(WRITE, 0, sector, nsectors, buf, draw.choice((0, 0, FUA, PREFLUSH | FUA, PREFLUSH))))
            elif op == READ:
                buf = bytearray(end - start)
                ios.append(Io(READ, 0, sector, nsectors, buf))
                spans.append((buf, start, end))
            elif op == FLUSH:
                ios.append(Io(FLUSH, 0, 0, 0))
            else:
                model[start:end] = bytes(end - start)
                ios.append(Io(op, 0, sector, nsectors))
        assert {id(io) for io in drain(backend, ios)} == {id(io) for io in ios}
        assert [io for io in ios if io.error] == []
        for buf, start, end in spans:
            assert buf == model[start:end]
    assert image.read_bytes() == bytes(model)


def test_more_ios_than_the_ring_holds(backend: Backend, image: Path) -> None:
    expected = image.read_bytes()
    ios = [Io(READ, 0, n * 8 % 2048, 8, memoryview(mmap.mmap(-1, 4096))) for n in range(1500)]
    drain(backend, ios)
    for io in ios:
        assert io.error == 0
        assert bytes(io.buf) == expected[io.sector << 9:][:4096]


def test_errors_are_positive_errnos(backend: Backend, image: Path) -> None:
    os.truncate(image, SIZE_BYTES // 2)
    io = Io(READ, 0, SIZE_BYTES // 2 >> 9, 8, bytearray(4096))
    part = Io(READ, 0, (SIZE_BYTES // 2 >> 9) - 4, 8, bytearray(4096))
    drain(backend, [io, part])
    assert (io.error, part.error) == (errno.EIO, errno.EIO)


@pytest.mark.parametrize(("flags", "error"), [(FUA, errno.ENOSPC), (PREFLUSH | FUA, errno.EINVAL), (0, errno.ENOSPC)])
def test_a_flush_that_fails_takes_its_write_along(flags: int, error: int) -> None:
    """And it is the flush's error that is told.  /dev/full can be neither flushed nor written."""
    descriptor = os.open("/dev/full", os.O_WRONLY)
    medium = SimpleNamespace(fd=descriptor, is_block=False, direct=True, read_only=False, logical_block_bytes=512,
                             can_discard=False)
    backend = ring_backend([medium])
    io = Io(WRITE, 0, 0, 8, bytes(4096), flags)
    assert drain(backend, [io]) == [io]
    assert io.error == error
    assert backend.in_ring == 0
    backend.close()
    os.close(descriptor)


def test_several_buffers_are_written_side_by_side(backend: Backend, image: Path) -> None:
    parts = (b"a" * 512, bytearray(b"b" * 1024), memoryview(b"c" * 4096))
    io = Io(WRITE, 0, 16, 11, parts)
    aligned = Io(WRITE, 0, 64, 16, (b"d" * 4096, b"e" * 4096), PREFLUSH)
    drain(backend, [io, aligned])
    assert (io.error, aligned.error) == (0, 0)
    content = image.read_bytes()
    assert content[8192:8192 + 5632] == b"".join(parts)
    assert content[32768:32768 + 8192] == b"d" * 4096 + b"e" * 4096


def test_a_kernel_without_io_uring(image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_entries: int = 0, **_how: object) -> None:
        raise OSError(errno.ENOSYS, "no io_uring")

    monkeypatch.setattr(uring, "Ring", refuse)
    with open_device(str(image)) as device:
        assert make_backend([device]).fileno() == -1
        with pytest.raises(OSError):
            make_backend([device], "uring")


@pytest.mark.parametrize("kind", ["sync", "uring"])
def test_read_only_media_refuse_writes(kind: str, image: Path) -> None:
    before = image.read_bytes()
    device = open_device(str(image))
    backend = make_backend([device], kind)
    ios = [Io(WRITE, 0, 0, 1, b"x" * 512), Io(WRITE, 0, 0, 1, b"x" * 512, FUA), Io(DISCARD, 0, 0, 8),
           Io(WRITE_ZEROES, 0, 0, 8), Io(FLUSH, 0, 0, 0)]
    drain(backend, ios)
    assert [io.error for io in ios] == [errno.EROFS] * 4 + [0]
    backend.close()
    assert image.read_bytes() == before


def overlaid(path: Path, image: Path) -> tuple[Overlay, Backend, BlockDevice]:
    base = open_device(str(image), exclusive=True)
    overlay = Overlay(str(path), [base, base])
    media: list[Medium] = list(overlay.devices)
    return overlay, make_backend(media), base


def test_an_overlay_over_a_file_that_was_changed_is_refused(tmp_path: Path, image: Path) -> None:
    """Far behind the superblock, where no fingerprint looks."""
    overlay, backend, base = overlaid(tmp_path / "overlay", image)
    for each in (backend, overlay, base):
        each.close()
    with image.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        last = file.read(1)
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last[0] ^ 1]))
    with pytest.raises(WrongState, match="was changed since"):
        overlaid(tmp_path / "overlay", image)


def test_an_overlay_takes_all_writes_and_can_be_opened_again(tmp_path: Path, image: Path) -> None:
    before = hashlib.sha256(image.read_bytes()).digest()
    models = [bytearray(image.read_bytes()) for _ in range(2)]
    draw = random.Random(3)
    path = tmp_path / "overlay"
    for _ in range(3):
        overlay, backend, base = overlaid(path, image)
        for _ in range(100):
            device = draw.randrange(2)
            sector = draw.randrange(SIZE_BYTES // 512 - 40)
            nsectors = draw.randrange(1, 40)
            start, end = sector << 9, sector + nsectors << 9
            if draw.random() < 0.5:
                data = draw.randbytes(end - start)
                models[device][start:end] = data
                drain(backend, [io := Io(WRITE, device, sector, nsectors, data)])
            else:
                drain(backend, [io := Io(READ, device, sector, nsectors, buf := bytearray(end - start))])
                assert buf == models[device][start:end]
            assert io.error == 0
        drain(backend, [Io(FLUSH, 0, 0, 0), Io(FLUSH, 1, 0, 0)])
        backend.close()
        overlay.close()
        base.close()
    assert hashlib.sha256(image.read_bytes()).digest() == before
    assert os.stat(path).st_blocks * 512 < 3 * SIZE_BYTES


def test_an_overlay_goes_on_after_a_short_write(
        tmp_path: Path, image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system that is nearly full takes a part.  What it did not take must not count as copied."""
    pwrite, pwritev = os.pwrite, os.pwritev
    monkeypatch.setattr(os, "pwrite", lambda fd, data, offset: pwrite(fd, bytes(data)[:1000], offset))
    monkeypatch.setattr(os, "pwritev", lambda fd, parts, offset: pwritev(fd, [bytes(parts[0])[:1000]], offset))
    model = bytearray(image.read_bytes())
    model[1536:2048] = b"w" * 512
    for _ in range(2):
        overlay, backend, base = overlaid(tmp_path / "overlay", image)
        drain(backend, [Io(WRITE, 0, 3, 1, b"w" * 512), Io(FLUSH, 0, 0, 0), Io(READ, 0, 0, 8, buf := bytearray(4096))])
        assert buf == model[:4096]
        backend.close()
        overlay.close()
        base.close()


def test_an_overlay_refuses_a_base_that_changed(tmp_path: Path, image: Path) -> None:
    path = tmp_path / "overlay"
    overlay, backend, base = overlaid(path, image)
    with pytest.raises(Exception, match="in use"):
        overlaid(path, image)
    backend.close()
    overlay.close()
    base.close()
    with open(image, "r+b") as file:
        file.seek(4096)
        file.write(b"changed")
    with pytest.raises(WrongState, match="written since"):
        overlaid(path, image)
    (tmp_path / "foreign").write_bytes(b"x" * 4096)
    with pytest.raises(WrongState, match="not an overlay"):
        overlaid(tmp_path / "foreign", image)


@pytest.mark.parametrize("waited_in", [False, True])
def test_the_loop_runs_coroutines_and_an_idle_one_uses_no_cpu(image: Path, waited_in: bool) -> None:
    with open_device(str(image)) as device:
        sched = make_sched()
        backend = make_backend([device], waited_in=waited_in)
        loop = Loop(sched, backend, Front())
        buf = bytearray(4096)

        async def story(sched: Sched) -> int:
            error = await sched.submit(Io(READ, 0, 8, 8, buf))
            await sched.sleep_until(sched.now_ns + 50_000_000)
            return error

        used = time.process_time()
        start = time.monotonic()
        assert loop.run(story(sched)) == 0
        assert time.monotonic() - start >= 0.05
        assert time.process_time() - used < 0.02
        assert buf == image.read_bytes()[4096:8192]
        backend.close()
        loop.close()


@pytest.mark.parametrize("waited_in", [False, True])
def test_a_signal_wakes_the_loop(image: Path, waited_in: bool) -> None:
    with open_device(str(image)) as device:
        sched = make_sched()
        backend = make_backend([device], "sync", waited_in=waited_in)
        loop = Loop(sched, backend, Front())
        before = signal.getsignal(signal.SIGTERM)
        loop.catch_signals()

        async def story() -> None:
            os.kill(os.getpid(), signal.SIGTERM)
            while not loop.signalled:
                await loop.signal_wait.wait()

        loop.run(story())
        loop.close()
        assert signal.getsignal(signal.SIGTERM) is before


class Client:
    """A client of the ring that keeps what it is told."""

    def __init__(self) -> None:
        self.landed_so_far: list[tuple[int, int]] = []

    def landed(self, completions: list[tuple[int, int]]) -> None:
        """Keep them."""
        self.landed_so_far += completions


def test_looking_in_vain_becomes_rare_and_one_success_brings_it_back() -> None:
    looks, asked = uring.Looks(), 0
    for _ in range(10 * uring.LOOKS_SKIPPED_MAX):
        if looks.is_due():
            asked += 1
            looks.ended(found=False)
    assert asked <= 20
    while not looks.is_due():
        pass
    looks.ended(found=True)
    for _ in range(10):
        assert looks.is_due()
        looks.ended(found=True)


def test_a_ring_is_looked_at_before_it_is_slept_in(image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What comes soon is found without a sleep, and what does not come is slept for, and no longer than was said."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: {0, 1})
    backend = ring_backend([])
    now_ns, comes_ns, sleeps = 0, 0, list[int]()

    def serve(timeout_ns: int) -> dict[int, list[tuple[int, int]]]:
        nonlocal now_ns
        now_ns += 1000
        if timeout_ns:
            sleeps.append(timeout_ns)
            now_ns = comes_ns
        return {7: [(0, 0)]} if now_ns >= comes_ns else {}

    with contextlib.closing(backend), open(os.devnull, encoding="ascii") as nobody:
        monkeypatch.setattr(uring, "monotonic_ns", lambda: now_ns)
        monkeypatch.setattr(backend, "ring", SimpleNamespace(serve=serve, push=lambda *_words, **_more: True, quick=[]))
        comes_ns = uring.LOOK_NS // 2
        backend.wait(nobody.fileno(), -1)
        assert sleeps == [-NS_PER_S], "no process waits for anything"
        sleeps.clear()
        backend.client_ios = 1
        for _ in range(5):
            comes_ns = now_ns + uring.LOOK_NS // 2
            backend.wait(nobody.fileno(), -1)
        assert not sleeps
        comes_ns = now_ns + 10 * uring.LOOK_NS
        backend.wait(nobody.fileno(), uring.LOOK_NS / 4 / NS_PER_S)
        assert sleeps == [uring.LOOK_NS // 4]
        assert now_ns == comes_ns
        sleeps.clear()
        # In vain once: the next sleep comes at once.
        began_ns = now_ns
        comes_ns = now_ns + 10 * uring.LOOK_NS
        backend.wait(nobody.fileno(), -1)
        assert sleeps == [-NS_PER_S]
        assert now_ns == comes_ns == began_ns + 10 * uring.LOOK_NS
        monkeypatch.undo()


@pytest.mark.parametrize("nbytes", [4096, 8192])
def test_an_entry_that_is_linked_to_a_read_fails_with_it(image: Path, nbytes: int) -> None:
    """What the ublk export builds on: a read that is short takes the entry behind it along; and a slot is filled once
    and published many times."""
    with open_device(str(image)) as device:
        backend = make_backend([device], waited_in=True)
        assert isinstance(backend, uring.RingBackend)
        client, ring = Client(), backend.ring
        base = backend.add_client(client)
        slot = ring.reserve(2)
        first, second = (np.frombuffer(mmap.mmap(-1, nbytes), np.uint8) for _ in range(2))
        for number, (buf, length) in enumerate(((first, nbytes), (second, 4096))):
            ring.fill(slot + number, uring.OP_READ, fd=device.fd, user_data=base | number, length=length,
                      flags=0 if number else uring.SQE_IO_LINK, address=buf.__array_interface__["data"][0])
        for turn, offset in enumerate((0, SIZE_BYTES // 2, SIZE_BYTES - 4096)):
            ring.sqe_u64[slot * 8 + 1] = offset
            ring.publish(slot)
            ring.publish(slot + 1)
            while len(client.landed_so_far) < 2 * turn + 2:
                backend.wait(0, 5)
        is_short = nbytes > 4096
        whole, linked = (0, nbytes), (1, 4096)
        last = [(0, 4096), (1, -errno.ECANCELED)] if is_short else [whole, linked]
        assert client.landed_so_far == [whole, linked, whole, linked, *last]
        assert bytes(second[:4096]) == image.read_bytes()[:4096]
        backend.remove_client(base)
        backend.close()


class Quick:
    """A client that serves himself, and counts how often."""

    def __init__(self) -> None:
        self.arrivals = Arrivals(64)
        self.turns = 0

    def serve(self) -> bool:
        """Take all."""
        self.turns += 1
        self.arrivals.count = 0
        return False

    def finish(self) -> None:
        """Nothing is left."""


def test_who_holds_something_back_is_asked_whoever_else_is_served(image: Path) -> None:
    """Else the reads of one device would keep another's writes waiting."""
    with open_device(str(image)) as device:
        backend = make_backend([device], waited_in=True)
        assert isinstance(backend, uring.RingBackend)
        busy, gatherer = Quick(), Quick()
        base = backend.add_quick(busy)
        backend.add_quick(gatherer)
        ring = backend.ring
        buf = np.frombuffer(mmap.mmap(-1, 4096), np.uint8)
        slot = ring.reserve(1)
        ring.fill(slot, uring.OP_READ, fd=device.fd, user_data=base, length=4096,
                  address=buf.__array_interface__["data"][0])
        ring.publish(slot)
        ring.wait(NS_PER_S)
        ring.take_served()
        assert (busy.turns, gatherer.turns) == (1, 0)
        assert ring.is_alone
        ring.gathering += 1
        ring.gather(5, 1_000_000)
        ring.publish(slot)
        began_ns = time.monotonic_ns()
        ring.serve(50_000_000)
        assert time.monotonic_ns() - began_ns < NS_PER_S, "it does not wait for five"
        assert busy.turns >= 2
        assert gatherer.turns >= 1
        ring.gathering -= 1
        backend.close()


def test_a_ring_that_has_no_slots_left_says_so() -> None:
    ring = Ring(256)
    assert ring.reserve(128) == 128
    with pytest.raises(OSError, match="no room for another device"):
        ring.reserve(1)
    ring.close()
