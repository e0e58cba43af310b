# SPDX-License-Identifier: GPL-2.0-only
"""What a seed of `tests.vm.campaign` draws, and what an administrator does meanwhile.

A shape is geometry, policy, devices, traffic, and one or two boots.  A boot has acts, a kernel and an end: the second
one goes on with what the first left behind, and may be of another kernel.

A journal of few blocks is full before the first leaf is, and then the driver stands still: what writes leaves to make
room (journal.c, btree_flush_write) looks through the list of btree nodes, and the root is not in that list (btree.c,
bch_btree_set_root).  As long as the root is a leaf, nothing but its own timer writes it, and each time the journal is
full all writes wait for up to 30 seconds.  So such a set (`Shape.journal_blocks`) begins with reads, whose keys are not
journaled, until the root has children.

The replay of such a journal may fill it as well, with one new root after the other, and then the driver hangs for ever
when it registers the set.  The campaign kills it, and our programs have to make do with what it leaves.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

from bcachectl.ondisk.geometry import Geometry
from tests.vm.kernel_side import Visit, plan_for

KIB, MIB = 1 << 10, 1 << 20
GONE = 9
"""The number of a flash-only volume that is removed before the boot ends."""
FEW_BLOCKS = 64
ACTS = ("gc", "move", "mode", "detach", "drain", "flash", "unflash", "replace", "discard", "policy", "prune", "label",
        "cutoff")
MODES = ("writeback", "writethrough", "writearound")


@dataclass(frozen=True)
class Boot:
    """One run of a kernel."""

    series: str
    acts: tuple[str, ...]
    end: str
    """stop: in good order; off: the machine is switched off, and the driver told; crash: a reset; kill: the machine is
    gone in the middle of writing."""


@dataclass(frozen=True)
class Shape:
    """What a seed draws before anything runs."""

    seed: int
    bucket_kib: int
    buckets: int
    block_bytes: int
    backing_mib: tuple[int, ...]
    data_offset: int
    policy: str
    discard: bool
    mode: str
    ops: int
    max_kib: int
    hot: float
    held: bool
    """Nothing is written back while the set runs, but by an act."""
    boots: tuple[Boot, ...]

    @property
    def journal_blocks(self) -> int:
        """Blocks of the journal that the driver gives to such a set (super.c, run_cache_set)."""
        geometry = Geometry(self.block_bytes >> 9, self.bucket_kib << 1, self.buckets, 1)
        return geometry.njournal_default * (geometry.bucket_bytes // geometry.block_bytes)

    @property
    def may_discard(self) -> bool:
        """Whether discard is on at any time."""
        return self.discard or any("discard" in boot.acts for boot in self.boots)

    @property
    def flash_bytes(self) -> int:
        """The size of a flash-only volume: small, since its data cannot leave the cache."""
        return min(max(self.bucket_kib * self.buckets // 32 // 64 * 64, 64) * KIB, 4 * MIB)

    @property
    def has_few_blocks(self) -> bool:
        """Whether the driver may stand still for want of journal blocks."""
        return self.journal_blocks < FEW_BLOCKS

    @property
    def is_grown(self) -> bool:
        """Whether reads come first, until the root has children."""
        return self.has_few_blocks and self.bucket_kib <= 32


def shape_of(seed: int) -> Shape:
    """The shape of a seed."""
    rng = random.Random(f"campaign/{seed}")
    ends = [rng.choice(("stop", "off", "crash", "crash", "kill", "kill")) for _ in range(rng.choice((1, 1, 2)))]
    return Shape(
        seed=seed, bucket_kib=rng.choice((8, 8, 16, 16, 32, 64, 128, 256)), buckets=rng.choice((560, 700, 1000, 1500)),
        block_bytes=rng.choice((512, 4096, 4096)),
        backing_mib=tuple(rng.choice((12, 20, 30)) for _ in range(rng.choice((1, 1, 1, 2, 3)))),
        data_offset=rng.choice((16, 16, 16, 24, 128, 2048)),
        policy=rng.choice(("lru", "lru", "fifo", "random")), discard=rng.random() < 0.3,
        mode=rng.choice(("writeback",) * 4 + ("writethrough", "writearound", "none")),
        ops=rng.choice((60, 200, 500, 1200)), max_kib=rng.choice((4, 16, 64)), hot=rng.choice((0.0, 0.3, 0.7)),
        held=rng.random() < 0.5,
        boots=tuple(Boot(rng.choice(("6.12", "6.12", "6.1")), tuple(rng.sample(ACTS, rng.choice((0, 1, 2, 3, 3)))), end)
                    for end in ends))


def grow(visit: Visit, shape: Shape, size_bytes: int) -> None:
    """Read here and there until the root has children."""
    mode = "/sys/block/$volume0/bcache/cache_mode"
    visit.step(f"set_attribute {mode} writethrough")
    plan = plan_for(shape.seed, size_bytes, ops=shape.bucket_kib * KIB // 16, max_kib=4, reads=1.0)
    visit.write(plan, progress="grown")
    visit.step(f"set_attribute {mode} {shape.mode}")


def flash_plan(shape: Shape, plan_seed: int) -> dict[str, Any]:
    """What is written to a flash-only volume."""
    return plan_for(plan_seed, shape.flash_bytes, ops=min(shape.ops // 4, 100), max_kib=shape.max_kib,
                    block_bytes=shape.block_bytes)


def act(visit: Visit, what: str, shape: Shape, rng: random.Random, *, number: int, plan_seed: int) -> None:
    """Something that an administrator does; ``number`` is that of a new flash-only volume."""
    volume = "/sys/block/$volume0/bcache"
    if what == "gc":
        visit.step("echo 1 >$(cset)/internal/trigger_gc; sleep 1")
    elif what == "move":
        visit.step("echo 1 >$(cset)/internal/copy_gc_enabled; echo 1 >$(cset)/internal/trigger_gc; sleep 2")
    elif what == "mode":
        visit.step(f"set_attribute {volume}/cache_mode {rng.choice(MODES)}")
    elif what == "detach":
        visit.step(f"echo 30 >{volume}/writeback_percent; echo 1 >{volume}/writeback_running\n"
                   f"echo 1 >{volume}/detach\nwait_for 120 grep -q 'no cache' {volume}/state\n"
                   f"id=$(basename $(cset))\necho $id >{volume}/attach || fail attach\n"
                   f"echo {int(not shape.held)} >{volume}/writeback_running")
    elif what == "drain":
        visit.step(f"echo 0 >{volume}/writeback_percent; echo 1 >{volume}/writeback_running\n"
                   f"wait_for 120 grep -q clean {volume}/state\n"
                   f"echo 10 >{volume}/writeback_percent; echo {int(not shape.held)} >{volume}/writeback_running")
    elif what in ("flash", "unflash"):
        number = GONE if what == "unflash" else number
        visit.step(f"before=$(echo /sys/block/bcache*)\nset_attribute $(cset)/flash_vol_create {shape.flash_bytes}\n"
                   "for folder in /sys/block/bcache*; do\n"
                   f"    case \" $before \" in *\" $folder \"*) ;; *) volume{number}=${{folder##*/}} ;; esac\ndone\n"
                   f"wait_volume $volume{number}")
        visit.write(flash_plan(shape, plan_seed), volume=number, progress=f"flash{number}")
        if what == "unflash":
            visit.step(f"set_attribute /sys/block/$volume{number}/bcache/unregister 1\n"
                       f"wait_for 60 test ! -e /sys/block/$volume{number}")
    elif what == "replace":
        visit.step("for limit in read write; do echo 0 >$(cset)/congested_${limit}_threshold_us; done\n"
                   f"set_attribute {volume}/sequential_cutoff 0\n"
                   "for turn in 1 2; do dd if=/dev/$volume0 of=/dev/null bs=64k iflag=direct 2>/dev/null; done")
    elif what == "discard":
        visit.step(f"set_attribute $(cset)/cache0/discard {int(not shape.discard)}")
    elif what == "policy":
        visit.step(f"set_attribute $(cset)/cache0/cache_replacement_policy {rng.choice(('lru', 'fifo', 'random'))}")
    elif what == "prune":
        visit.step("echo 1000 >$(cset)/internal/prune_cache")
    elif what == "label":
        visit.step(f"set_attribute {volume}/label disk-{shape.seed}")
    else:
        visit.step(f"set_attribute {volume}/sequential_cutoff 0")
