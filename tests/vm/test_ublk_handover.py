# SPDX-License-Identifier: GPL-2.0-only
"""Engine and kernel take turns on one set in one machine, the engine serving /dev/ublkb0 (traps.md, T7 over ublk).

1. The engine is killed with SIGKILL in the middle of writing, and its device taken away; that has the writes put into
   the journal which were only in memory.
2. The kernel registers the set.  Every write that was acknowledged must be there, flushed or not: whoever uses a ublk
   device has been promised that.  Then it writes, and stops in good order.
3. The engine serves the device again, and reads all that the kernel wrote.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.acceptance import Acceptance, acceptance_of_run
from tests.stamps import draw
from tests.vm.engine_side import bcachectl
from tests.vm.kernel_side import Visit, plan_for
from tests.vm.ublk_side import PRELUDE

BACKING_BYTES = 24 << 20
SIZE_BYTES = BACKING_BYTES - 8192
KILLED_AFTER = 200

ENGINE_WRITES = """
begin --export ublk --set cache_mode=MODE --debug-checks
$python -SE /job/stamp_writer.py $device /job/engine-progress 'PLAN' >/run/writer 2>&1 &
writer=$!
touch /job/engine-progress
until [ $(wc -l </job/engine-progress) -ge KILLED_AFTER ]; do
    [ -d /proc/$writer ] || fail "the writer: $(cat /run/writer)"
    sleep 0.1
done
killed
bcachectl engine stop /dev/vda | grep -q "removed $device" || fail "it was not removed"
wait $writer && fail "the writer came to its end" || :
grep -q "wrong content" /run/writer && fail "$(cat /run/writer)" || :
nothing_left
"""

ENGINE_READS = """
begin --export ublk
dd if=$device of=/job/engine.out bs=1M iflag=direct status=none
finish
[ ! -s /job/errors ] || fail "the engine complained"
"""


@pytest.mark.timeout(500)
@pytest.mark.parametrize(("mode", "cache_bytes"), [
    ("writeback", 20 << 20), ("writethrough", 17 << 20), ("writearound", 17 << 20), ("none", 20 << 20),
])
def test_t7_over_ublk(tmp_path: Path, mode: str, cache_bytes: int) -> None:
    cache, backing = tmp_path / "cache.img", tmp_path / "backing.img"
    for path, size_bytes in ((cache, cache_bytes), (backing, BACKING_BYTES)):
        with path.open("wb") as file:
            file.truncate(size_bytes)
    bcachectl("format", "--cache", cache, "--backing", backing, "--bucket-size", "32k", "--block-size", "4k",
              directory=tmp_path)
    ours, theirs = (plan_for(seed, SIZE_BYTES, reads=0.3, hot=0.3, max_kib=24) for seed in (1, 2))
    theirs["ops"] = 200
    visit = Visit(tmp_path / "visit", cache=cache, backings=[backing])
    for number, story in enumerate((ENGINE_WRITES, ENGINE_READS)):
        text = PRELUDE + story
        for word, value in (("MODE", mode), ("PLAN", json.dumps(ours)), ("KILLED_AFTER", str(KILLED_AFTER))):
            text = text.replace(word, value)
        (visit.share / f"story{number}.sh").write_text(text)
    visit.step("host bash /job/story0.sh")
    visit.register()
    visit.copy_out()
    visit.set_mode(mode)
    visit.write(theirs)
    visit.stop()
    visit.step("host bash /job/story1.sh")
    seen = visit.run(timeout_s=400)

    acknowledged = [int(line) for line in (visit.share / "engine-progress").read_text().split("\n")[:-1]]
    assert len(acknowledged) >= KILLED_AFTER
    acceptance = acceptance_of_run(draw(**ours), seed=1, last_acknowledged=acknowledged[-1],
                                   acceptance=Acceptance(SIZE_BYTES))
    acceptance.settle_all()
    assert acceptance.judge(seen.contents[0]) == [], "engine killed, kernel reads"

    assert seen.finished_writing
    acceptance = acceptance_of_run(draw(**theirs), seed=2, last_acknowledged=seen.last_acknowledged,
                                   acceptance=acceptance.carry_over(seen.contents[0]))
    acceptance.settle_all()
    assert acceptance.judge((visit.share / "engine.out").read_bytes()) == [], "kernel stopped, engine reads"
    # The write that was under way when the device was taken away has failed, as it should.
    assert [line for line in seen.result.complaints() if "I/O error, dev ublkb0" not in line] == []
