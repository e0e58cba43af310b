# SPDX-License-Identifier: GPL-2.0-only
"""Sets of every shape that the kernel's driver makes, drawn from a seed, and what each of our programs says of them.

    python -m tests.vm.campaign 1-40            (or `make campaign SEEDS=1-40`)

A seed draws the geometry, the policy, the devices, what is written, what an administrator does in between (modes,
gc, detach and attach, a flash-only volume) and how it ends: an orderly stop, a reset, or a machine that is killed in
the middle of writing.  Afterwards

1. ``fsck`` finds nothing;
2. a read-only engine serves what the writes left, and no byte of any device has changed;
3. ``dump btree`` prints the keys that the kernel held, if nothing could move between its dump and the end;
4. ``writeback`` copies the dirty data to copies of the backing devices, and these alone hold the content.

A failure names its seed, and leaves the images behind.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import uuid
from dataclasses import dataclass
from pathlib import Path

from tests.acceptance import Acceptance, acceptance_of_run
from tests.conftest import TESTS
from tests.nbd_client import NbdClient
from tests.stamps import draw
from tests.vm.engine_side import bcachectl, engine_on
from tests.vm.kernel_side import PROGRESS, Visit, plan_for

KIB, MIB = 1 << 10, 1 << 20


@dataclass(frozen=True)
class Shape:
    """What a seed draws before anything runs."""

    seed: int
    series: str
    bucket_kib: int
    block_bytes: int
    cache_kib: int
    backing_mib: tuple[int, ...]
    data_offset: int
    policy: str
    discard: bool
    mode: str
    ops: int
    max_kib: int
    hot: float
    held: bool
    """Nothing is written back while the set runs."""
    acts: tuple[str, ...]
    end: str


def shape_of(seed: int) -> Shape:
    """The shape of a seed."""
    rng = random.Random(f"campaign/{seed}")
    bucket_kib = rng.choice((8, 8, 16, 16, 32, 64, 256))
    buckets = rng.choice((560, 700, 1000, 1500))
    count = rng.choice((1, 1, 1, 2, 3))
    return Shape(
        seed=seed, series=rng.choice(("6.12", "6.12", "6.1")), bucket_kib=bucket_kib,
        block_bytes=rng.choice((512, 4096, 4096)), cache_kib=bucket_kib * buckets,
        backing_mib=tuple(rng.choice((12, 20, 30)) for _ in range(count)),
        data_offset=rng.choice((16, 16, 16, 24, 128, 2048)),
        policy=rng.choice(("lru", "lru", "fifo", "random")), discard=rng.random() < 0.3,
        mode=rng.choice(("writeback", "writeback", "writeback", "writethrough", "writearound", "none")),
        ops=rng.choice((60, 200, 500, 1200)), max_kib=rng.choice((4, 16, 64)), hot=rng.choice((0.0, 0.3, 0.7)),
        held=rng.random() < 0.5,
        acts=tuple(rng.sample(("gc", "mode", "detach", "flash", "prune", "label", "cutoff"), rng.choice((0, 1, 2)))),
        end=rng.choice(("stop", "crash", "crash", "kill")))


def act(visit: Visit, what: str, shape: Shape, rng: random.Random) -> None:
    """Something that an administrator does."""
    volume = "/sys/block/$volume0/bcache"
    if what == "gc":
        visit.step("echo 1 >$(cset)/internal/trigger_gc; sleep 1")
    elif what == "mode":
        visit.step(f"set_attribute {volume}/cache_mode {rng.choice(('writethrough', 'writearound', 'writeback'))}")
    elif what == "detach":
        visit.step(f"echo 30 >{volume}/writeback_percent; echo 1 >{volume}/writeback_running\n"
                   f"echo 1 >{volume}/detach\nwait_for 120 grep -q 'no cache' {volume}/state\n"
                   f"id=$(basename $(cset))\necho $id >{volume}/attach || fail attach")
    elif what == "flash":
        visit.step("echo 4M >$(cset)/flash_vol_create; sleep 1")
    elif what == "prune":
        visit.step("echo 1000 >$(cset)/internal/prune_cache")
    elif what == "label":
        visit.step(f"set_attribute {volume}/label disk-{shape.seed}")
    else:
        visit.step(f"set_attribute {volume}/sequential_cutoff 0")


def run(seed: int, directory: Path) -> str:
    """Draw, run and judge one seed; a line about it.  AssertionError if anything is wrong."""
    shape = shape_of(seed)
    rng = random.Random(f"acts/{seed}")
    cache = directory / "cache.img"
    backings = [directory / f"back{number}.img" for number in range(len(shape.backing_mib))]
    kib = (shape.cache_kib, *(mib << 10 for mib in shape.backing_mib))
    for path, size_kib in zip((cache, *backings), kib, strict=True):
        with path.open("wb") as file:
            file.truncate(size_kib * KIB)
    bcachectl("format", "--cache", cache, "--backing", *backings, "--bucket-size", f"{shape.bucket_kib}k",
              "--block-size", str(shape.block_bytes), "--data-offset", str(shape.data_offset), "--cache-mode",
              shape.mode, "--replacement", shape.policy, *(["--discard"] if shape.discard else []),
              directory=directory)
    sizes = [mib * MIB - shape.data_offset * 512 for mib in shape.backing_mib]
    judges = [Acceptance(size) for size in sizes]
    visit = Visit(directory / "kernel", cache=cache, backings=backings, series=shape.series)
    visit.register()
    if shape.held:
        visit.step("for f in /sys/block/bcache*/bcache/writeback_running; do echo 0 >$f; done")
    plans = []
    for turn in range(len(backings) + 1):
        number = turn % len(backings)
        plan = plan_for(seed * 100 + turn, sizes[number], ops=shape.ops, max_kib=shape.max_kib, hot=shape.hot,
                        block_bytes=max(shape.block_bytes, 512), reads=0.3)
        if turn:
            for what in shape.acts[turn - 1:turn]:
                act(visit, what, shape, rng)
        plans.append((number, plan))
        visit.write(plan, volume=number, progress=PROGRESS if turn == len(backings) else f"earlier{turn}")
    if shape.end == "stop":
        visit.stop()
    elif shape.end == "crash":
        visit.facts()
        visit.crash()
    if shape.end == "kill":
        seen = visit.run_and_kill(after_writes=shape.ops // 4, timeout_s=600)
    else:
        seen = visit.run(timeout_s=600)
    for turn, (number, plan) in enumerate(plans):
        is_last = turn == len(plans) - 1
        judges[number] = acceptance_of_run(
            draw(**plan), seed=plan["seed"], acceptance=judges[number],
            last_acknowledged=seen.last_acknowledged if is_last and shape.end == "kill" else plan["ops"])
        if not is_last or shape.end != "kill":
            judges[number].settle_all()
    assert [line for line in seen.result.complaints() if "discard" not in line] == []
    return judge(shape, directory, cache, backings, judges)


def judge(shape: Shape, directory: Path, cache: Path, backings: list[Path], judges: list[Acceptance]) -> str:
    """What our programs say of the set."""
    before = [digest(path) for path in (cache, *backings)]
    report = json.loads(call(directory, "fsck", "--json", cache, *backings))
    found = [finding for finding in report["findings"] if finding["severity"] != "note"]
    assert found == [], found[:5]
    with engine_on(directory, cache, backings, "--read-only") as engine:
        names = {volume["uuid"]: volume["volume"] for volume in engine.volumes}
        for number, one in enumerate(judges):
            content = NbdClient(engine.socket(), names[uuid_of(backings[number])]).read_all()
            assert one.judge(content) == [], f"the engine serves {backings[number].name}"
        engine.stop()
    ours = bcachectl("dump", "btree", "--format=kernel", cache, directory=directory)
    assert [digest(path) for path in (cache, *backings)] == before, "a reading verb has written"
    kernels = directory / "kernel" / "facts" / "btree.txt"
    keys = {line for line in ours.splitlines() if line}
    missing = extra = 0
    if shape.end == "crash" and kernels.exists():
        theirs = {line for line in kernels.read_text(errors="replace").replace("\0", "").splitlines() if ":" in line}
        missing, extra = len(theirs - keys), len(keys - theirs)
        lost = [line for line in theirs - keys if line.endswith("dirty")]
        assert not lost or not shape.held, f"dirty keys that we do not see: {lost[:5]}"
    copies = [directory / f"copy{number}.img" for number in range(len(backings))]
    for path, copy in zip((cache, *backings), (directory / "cache-copy.img", *copies), strict=True):
        shutil.copy(path, copy)
    call(directory, "writeback", directory / "cache-copy.img", *copies)
    for number, copy in enumerate(copies):
        with copy.open("rb") as file:
            file.seek(shape.data_offset * 512)
            content = file.read()
        complaints = judges[number].judge(content[:judges[number].size_bytes])
        assert complaints == [], f"after writeback, back{number}.img alone: {complaints[:3]}"
    dirty = sum(line.endswith("dirty") for line in keys)
    return f"{len(keys)} keys ({dirty} dirty), kernel's dump: {missing} more, {extra} fewer"


def call(directory: Path, *words: str | Path) -> str:
    """A run of the program that may end with fsck's bits, but not with an error."""
    done = subprocess.run([sys.executable, "-m", "bcachectl", *map(str, words)], capture_output=True, text=True,
                          cwd=TESTS.parent, stdin=subprocess.DEVNULL,
                          env={**os.environ, "XDG_STATE_HOME": str(directory / "state")})
    assert done.returncode in (0, 1, 4), f"{words}: {done.returncode}\n{done.stdout[-2000:]}{done.stderr}"
    return done.stdout


def uuid_of(backing: Path) -> str:
    """The uuid in a backing device's superblock; a device that was attached anew comes later among the volumes."""
    with backing.open("rb") as file:
        file.seek(4096 + 40)
        return str(uuid.UUID(bytes=file.read(16)))


def digest(path: Path) -> str:
    """A file's hash."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def main() -> int:
    """Run the seeds of the command line."""
    first, _, last = (sys.argv[1] if len(sys.argv) > 1 else "1-10").partition("-")
    failed = []
    for seed in range(int(first), int(last or first) + 1):
        directory = Path(tempfile.mkdtemp(prefix=f"bcachectl-campaign-{seed}-"))
        try:
            print(f"seed {seed}: ok, {run(seed, directory)}  {shape_of(seed)}", flush=True)
        except AssertionError as error:
            failed.append(seed)
            print(f"seed {seed}: FAILED, {str(error)[-3000:]}\n  {shape_of(seed)}\n  images: {directory}", flush=True)
        else:
            shutil.rmtree(directory)
    print(f"{len(failed)} failed: {failed}" if failed else "all are well")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
