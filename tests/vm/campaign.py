# SPDX-License-Identifier: GPL-2.0-only
"""Sets of every shape that the kernel's driver makes, drawn from a seed, and what each of our programs says of them.

    python -m tests.vm.campaign 1-40            (or `make campaign SEEDS=1-40`)

A seed draws the geometry, the policy, the devices, what is written, what an administrator does in between
(`tests.vm.shapes`), whether a second kernel goes on with what the first left, and how each ends.  After each boot

1. ``fsck`` finds nothing;
2. a read-only engine serves what the writes left, and no byte of any device has changed;

and at last

3. ``dump btree`` prints the keys that the kernel held, if nothing could move between its dump and the end;
4. ``writeback`` copies the dirty data to copies of the backing devices, and these alone hold the content.

A failure names its seed, and leaves the images behind.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.acceptance import Acceptance, acceptance_of_run
from tests.conftest import TESTS
from tests.nbd_client import NbdClient
from tests.stamps import draw
from tests.vm.engine_side import bcachectl, engine_on
from tests.vm.kernel_side import PROGRESS, Seen, Visit, plan_for
from tests.vm.shapes import KIB, MIB, Boot, Shape, act, flash_plan, grow, shape_of

HANG_S = 100
"""What waits for the journal so long waits for ever: the timer of leaves is 30 seconds."""


@dataclass
class Judged:
    """A set's files, and what each volume may hold: the backing devices first, then the flash-only volumes."""

    shape: Shape
    directory: Path
    cache: Path
    backings: list[Path]
    judges: list[Acceptance]

    @property
    def devices(self) -> list[Path]:
        """All files, the cache first."""
        return [self.cache, *self.backings]

    @property
    def flash(self) -> int:
        """How many flash-only volumes there are."""
        return len(self.judges) - len(self.backings)


def run(seed: int, directory: Path) -> str:
    """Draw, run and judge one seed; a line about it.  AssertionError if anything is wrong."""
    shape = shape_of(seed)
    one = make(shape, directory)
    hung = 0
    for number, boot in enumerate(shape.boots):
        rng = random.Random(f"acts/{seed}/{number}")
        seen = carry_out(one, boot, number, rng)
        assert seen is None or [line for line in seen.result.complaints() if "discard" not in line] == []
        hung += seen is None
        contents = look(one)
        for judge, content in zip(one.judges, contents, strict=True):
            complaints = judge.judge(content)
            assert complaints == [], f"boot {number}, the engine serves: {complaints[:3]}"
        if number + 1 < len(shape.boots):
            one.judges = [judge.carry_over(content) for judge, content in zip(one.judges, contents, strict=True)]
    return verdict(one) + (", the driver hung when it registered the set" if hung else "")


def make(shape: Shape, directory: Path) -> Judged:
    """An empty set."""
    cache = directory / "cache.img"
    backings = [directory / f"back{number}.img" for number in range(len(shape.backing_mib))]
    kib = (shape.bucket_kib * shape.buckets, *(mib << 10 for mib in shape.backing_mib))
    for path, size_kib in zip((cache, *backings), kib, strict=True):
        with path.open("wb") as file:
            file.truncate(size_kib * KIB)
    bcachectl("format", "--cache", cache, "--backing", *backings, "--bucket-size", f"{shape.bucket_kib}k",
              "--block-size", str(shape.block_bytes), "--data-offset", str(shape.data_offset), "--cache-mode",
              shape.mode, "--replacement", shape.policy, *(["--discard"] if shape.discard else []),
              directory=directory)
    sizes = [mib * MIB - shape.data_offset * 512 for mib in shape.backing_mib]
    return Judged(shape, directory, cache, backings, [Acceptance(size) for size in sizes])


def carry_out(one: Judged, boot: Boot, number: int, rng: random.Random) -> Seen | None:
    """One boot: acts, one before each plan but the first, and plans for all volumes; their judges are told.

    None if the driver hangs when it registers the set, and the machine is killed: nothing was written then.
    """
    shape, count, flash = one.shape, len(one.backings), len(one.judges)
    visit = Visit(one.directory / f"kernel{number}", cache=one.cache, backings=one.backings, series=boot.series,
                  flash_bytes=[shape.flash_bytes] * one.flash)
    visit.register()
    if shape.held:
        visit.step("for f in /sys/block/bcache*/bcache/writeback_running; do echo 0 >$f; done")
    if shape.is_grown and number == 0:
        grow(visit, shape, one.judges[0].size_bytes)
    plans: list[tuple[int, dict[str, Any]]] = []
    acts = list(boot.acts)
    turns = max(count, len(acts)) + 1
    first_seed = shape.seed * 1000 + number * 100
    for turn in range(turns):
        if turn and acts:
            new, plan_seed, what = len(one.judges), first_seed + 50 + turn, acts.pop(0)
            act(visit, what, shape, rng, number=new, plan_seed=plan_seed)
            if what == "flash":
                plans.append((new, flash_plan(shape, plan_seed)))
                one.judges.append(Acceptance(shape.flash_bytes))
        volume = turn % count
        plan = plan_for(first_seed + turn, one.judges[volume].size_bytes, ops=shape.ops, max_kib=shape.max_kib,
                        hot=shape.hot, block_bytes=shape.block_bytes, reads=0.3)
        plans.append((volume, plan))
        visit.write(plan, volume=volume, progress=PROGRESS if turn == turns - 1 else f"earlier{turn}")
    if boot.end == "stop":
        visit.stop()
    elif boot.end == "crash":
        visit.facts()
        visit.crash()
    is_killed = boot.end == "kill"
    if number and shape.has_few_blocks and visit.hangs(HANG_S):
        del one.judges[flash:]
        return None
    seen = visit.run_and_kill(after_writes=shape.ops // 4, timeout_s=900) if is_killed else visit.run(timeout_s=900)
    for volume, plan in plans[:-1]:
        tell(one.judges[volume], plan)
        one.judges[volume].settle_all()
    volume, plan = plans[-1]
    tell(one.judges[volume], plan, seen.last_acknowledged if is_killed else plan["ops"])
    if not is_killed:
        one.judges[volume].settle_all()
    return seen


def tell(judge: Acceptance, plan: dict[str, Any], last_acknowledged: int | None = None) -> None:
    """A judge hears of a plan that was carried out, up to a write."""
    last = plan["ops"] if last_acknowledged is None else last_acknowledged
    acceptance_of_run(draw(**plan), seed=plan["seed"], acceptance=judge, last_acknowledged=last)


def look(one: Judged) -> list[bytes]:
    """Each volume's content as a read-only engine serves it; fsck finds nothing, and no byte of any device changes."""
    before = [digest(path) for path in one.devices]
    report = json.loads(call(one.directory, "fsck", "--json", *one.devices))
    # What the driver itself may leave.
    left = {*(("JOURNAL_DISCARDED",) if one.shape.may_discard else ()),
            *(("JOURNAL_FULL",) if one.shape.has_few_blocks else ())}
    found = [finding for finding in report["findings"] if finding["severity"] != "note" and finding["code"] not in left]
    assert found == [], found[:5]
    with engine_on(one.directory, one.cache, one.backings, "--read-only") as engine:
        names = {volume["uuid"]: volume["volume"] for volume in engine.volumes}
        wanted = [names.pop(uuid_of(backing)) for backing in one.backings]
        wanted += names.values()
        assert len(wanted) == len(one.judges), engine.volumes
        contents = [NbdClient(engine.socket(), name).read_all() for name in wanted]
        engine.stop()
    assert [digest(path) for path in one.devices] == before, "a reading verb has written"
    return contents


def verdict(one: Judged) -> str:
    """What is left to see at the end: the keys beside those of the kernel, and what `writeback` makes of copies."""
    shape, directory = one.shape, one.directory
    before = [digest(path) for path in one.devices]
    ours = bcachectl("dump", "btree", "--format=kernel", one.cache, directory=directory)
    assert [digest(path) for path in one.devices] == before, "dump has written"
    last = len(shape.boots) - 1
    kernels = directory / f"kernel{last}" / "facts" / "btree.txt"
    keys = {line for line in ours.splitlines() if line}
    missing = extra = 0
    if shape.boots[-1].end == "crash" and kernels.exists():
        theirs = {line for line in kernels.read_text(errors="replace").replace("\0", "").splitlines() if ":" in line}
        missing, extra = len(theirs - keys), len(keys - theirs)
        lost = sorted(dirty_sectors(theirs) - dirty_sectors(keys))
        # A second boot begins with dirty data: what was collected before write-back was held goes back all the same.
        may_move = not shape.held or len(shape.boots) > 1
        assert not lost or may_move, f"dirty sectors that we do not see: {lost[:5]}"
    copies = [directory / f"copy-{path.name}" for path in one.devices]
    for path, copy in zip(one.devices, copies, strict=True):
        shutil.copy(path, copy)
    call(directory, "writeback", *copies)
    for judge, copy in zip(one.judges, copies[1:], strict=False):
        with copy.open("rb") as file:
            file.seek(shape.data_offset * 512)
            content = file.read()
        complaints = judge.judge(content[:judge.size_bytes])
        assert complaints == [], f"after writeback, {copy.name} alone: {complaints[:3]}"
    dirty = sum(line.endswith("dirty") for line in keys)
    return f"{len(keys)} keys ({dirty} dirty), kernel's dump: {missing} more, {extra} fewer"


def dirty_sectors(lines: Iterable[str]) -> set[tuple[int, int, int, int]]:
    """Inode, sector, sector of the cache and generation of all dirty data: keys that touch may be one or two."""
    found: set[tuple[int, int, int, int]] = set()
    for line in lines:
        key = re.fullmatch(r"(\d+):(\d+) len (\d+) -> \[0:(\d+) gen (\d+)\] dirty", line)
        if key:
            inode, start, length, sector, gen = map(int, key.groups())
            found |= {(inode, start + number, sector + number, gen) for number in range(length)}
    return found


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


def seeds_of(text: str) -> list[int]:
    """The seeds of a word as 1-40 or 3,7,20-25."""
    seeds: list[int] = []
    for part in text.split(","):
        first, _, last = part.partition("-")
        seeds += range(int(first), int(last or first) + 1)
    return seeds


def main() -> int:
    """Run the seeds of the command line."""
    failed = []
    for seed in seeds_of(sys.argv[1] if len(sys.argv) > 1 else "1-10"):
        directory = Path(tempfile.mkdtemp(prefix=f"bcachectl-campaign-{seed}-"))
        try:
            print(f"seed {seed}: ok, {run(seed, directory)}  {shape_of(seed)}", flush=True)
        except (AssertionError, OSError, subprocess.SubprocessError) as error:
            failed.append(seed)
            print(f"seed {seed}: FAILED, {str(error)[-3000:]}\n  {shape_of(seed)}\n  images: {directory}", flush=True)
        else:
            shutil.rmtree(directory)
    print(f"{len(failed)} failed: {failed}" if failed else "all are well")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
