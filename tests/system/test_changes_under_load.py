# SPDX-License-Identifier: GPL-2.0-only
"""What can be changed on a running engine is changed while a client writes; no request fails and nothing is lost.

The client keeps eight stamped requests in flight and checks what it reads.  Meanwhile the verbs are typed as a user
types them: cache modes, replacement policies, discard, gc, flush, detach and attach.
"""

from __future__ import annotations

import itertools
import threading
from pathlib import Path

import pytest

from tests.acceptance import Acceptance
from tests.export.engine import Engine
from tests.require import patience
from tests.stamps import Op, draw
from tests.system.sets import make_set, run, status_of
from tests.writer import write_plan

SIZE_BYTES = 64 << 20


class Load(threading.Thread):
    """A client that writes plans until it is told to stop; what went wrong is raised by `finish`."""

    def __init__(self, engine: Engine) -> None:
        super().__init__(daemon=True)
        self.engine = engine
        self.acceptance = Acceptance(SIZE_BYTES)
        self.is_over = threading.Event()
        self.error: BaseException | None = None
        self.start()

    def plan(self) -> itertools.takewhile[Op]:
        """Requests without end, until it is over."""
        return itertools.takewhile(lambda _: not self.is_over.is_set(), draw(
            seed=9, ops=10_000_000, size_bytes=SIZE_BYTES, max_kib=64, reads=0.4, flushes=0.01))

    def run(self) -> None:
        try:
            with self.engine.client() as client:
                assert write_plan(client, self.plan(), self.acceptance, seed=9, fua=0.02)
                flush = self.acceptance.send_flush()
                client.flush()
                self.acceptance.acknowledge_flush(flush)
        except BaseException as error:
            self.error = error

    def finish(self) -> Acceptance:
        """Stop, wait, and give the judge."""
        self.is_over.set()
        self.join(patience(60))
        assert not self.is_alive(), "a request was not answered"
        if self.error is not None:
            raise self.error
        return self.acceptance


@pytest.mark.timeout(300)
def test_changes_under_load(tmp_path: Path) -> None:
    options = [*make_set(tmp_path, cache_bytes=24 << 20, backing_bytes=SIZE_BYTES + 8192, mode="writeback"),
               "--export", "nbd", "--set", "writeback_delay=0", "--debug-checks"]
    cache, backing = options[1], options[3]
    with Engine(tmp_path, *options) as engine:
        load = Load(engine)
        for mode, policy in (("writethrough", "fifo"), ("writeback", "random"), ("none", "fifo"), ("writeback", "lru"),
                             ("writearound", "fifo"), ("writeback", "lru")):
            run("set", backing, f"cache_mode={mode}", engine=engine)
            run("set", cache, f"cache_replacement_policy={policy}", f"discard={int(policy == 'fifo')}", engine=engine)
            if mode == "writeback":
                run("flush", backing, engine=engine)
            else:
                run("gc", cache, engine=engine)
            assert run("get", backing, "cache_mode", engine=engine).count(f"[{mode}]") == 1
            assert load.is_alive(), load.error
        for _ in range(2):
            run("detach", backing, "--wait", engine=engine)
            assert status_of(engine, cache)["volumes"][0]["attached"] is False
            run("detach", backing, engine=engine, status=4)
            run("attach", backing, cache, engine=engine)
            assert status_of(engine, cache)["volumes"][0]["attached"] is True
            assert load.is_alive(), load.error
        acceptance = load.finish()
        assert engine.stop() == 0
        assert engine.errors == ""
    with Engine(tmp_path, *options) as engine, engine.client() as client:
        assert acceptance.judge(client.read_all()) == []
        assert engine.stop() == 0
        assert engine.errors == ""
