# SPDX-License-Identifier: GPL-2.0-only
"""No bytes that a client may send end the engine: each line gets one answer, or the connection ends."""

from __future__ import annotations

import json
import os
import socket
import tempfile
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bcachectl import control
from bcachectl.engine.tunables import TRIGGERS, TUNABLES
from tests.unit.engine.export.test_control import Served

METHODS = ("snapshot", "volumes", "events", "get", "check", "set", "attach", "detach", "gc", "flush", "where",
           "volume_create", "volume_remove")
NAMES = sorted({name for scope in TUNABLES.values() for name in scope} | {"stats_total/cache_hits", "internal/", "",
                                                                         "priority_stats", "stats_total/"}
               | set(TRIGGERS["set"])) + ["state", "attach", "cache0/cache0/discard"]

WORDS = ("bcache0", "bcache1", "0", "1", "-1", "4M", "writeback", "/dev/null", ".")
text = st.one_of(st.text(st.characters(), max_size=40), st.sampled_from(WORDS))
number = st.one_of(st.integers(-2, 2000), st.integers(-1 << 70, 1 << 70))
anything = st.recursive(st.none() | st.booleans() | number | st.floats(allow_nan=False) | text,
                        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(text, inner, max_size=3),
                        max_leaves=5)
params = st.fixed_dictionaries({}, optional={
    "cells": number | anything, "since": number | anything, "target": st.sampled_from(["", "bcache0"]) | anything,
    "names": st.lists(st.sampled_from(NAMES) | text, max_size=3) | anything,
    "values": st.dictionaries(st.sampled_from(NAMES), text, max_size=2) | anything,
    "volume": text | anything, "set": text | anything, "size": number | text | anything,
    "sector": number | anything, "count": number | anything, "strange": anything})


@st.composite
def fitting(draw: st.DrawFn) -> dict[str, Any]:
    """A request with the parameters that its method has, of the right types, so that it gets further."""
    method = draw(st.sampled_from(METHODS))
    volume = draw(st.sampled_from(["bcache0", "bcache1", "bcache2"]) | text)
    target = draw(st.sampled_from(["", "bcache0"]))
    fields: dict[str, Any] = {
        "snapshot": {"cells": draw(number)}, "volumes": {}, "events": {"since": draw(number)},
        "get": {"target": target, "names": draw(st.lists(st.sampled_from(NAMES), max_size=3))},
        "check": {"target": target, "values": draw(st.dictionaries(st.sampled_from(NAMES), text, max_size=2))},
        "set": {"target": target, "values": draw(st.dictionaries(st.sampled_from(NAMES), text, max_size=2))},
        "attach": {"volume": volume, "set": draw(text)}, "detach": {"volume": volume}, "gc": {},
        "flush": {"volume": volume}, "where": {"volume": volume, "sector": draw(number), "count": draw(number)},
        "volume_create": {"size": draw(number)}, "volume_remove": {"volume": volume}}[method]
    return {"id": draw(number), "method": method, "params": fields}


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    patch = pytest.MonkeyPatch()
    with tempfile.TemporaryDirectory(prefix="ctl") as directory:
        patch.setenv("XDG_RUNTIME_DIR", directory)
        patch.setattr(control, "SHARED_DIR", f"{directory}/shared")
        made = Served()
        yield made
        made.server.close()
        made.epoll.close()
    patch.undo()


def answers(served: Served, data: bytes) -> list[dict[str, Any]]:
    """Everything that the server says to ``data`` after its greeting, until it has nothing more to say."""
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(served.path)
        client.setblocking(False)
        received = bytearray()
        quiet = 0
        try:
            served.turn(0)
            client.sendall(data)
            while quiet < 3:
                served.turn(0)
                try:
                    more = client.recv(1 << 20)
                except BlockingIOError:
                    quiet += 1
                    continue
                if not more:
                    break
                received += more
                quiet = 0
        except (BrokenPipeError, ConnectionResetError):
            pass
    for _ in range(3):
        served.turn(0)
    return [json.loads(line) for line in bytes(received).splitlines()][1:]


@settings(max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(request=fitting() | st.fixed_dictionaries({"id": number, "method": st.sampled_from(METHODS), "params": params}))
def test_every_request_gets_one_answer(served: Served, request: dict[str, Any]) -> None:
    (answer,) = answers(served, json.dumps(request).encode() + b"\n")
    assert answer["id"] == request["id"]
    assert ("result" in answer) != ("error" in answer)
    if "error" in answer:
        assert answer["error"]["status"] in (1, 2, 3, 4)
        assert "\n" not in answer["error"]["message"]
    assert os.path.exists(served.path)
    assert served.world.cset.failed is None


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(lines=st.lists(st.binary(max_size=60) | anything.map(lambda value: json.dumps(value).encode()), max_size=5))
def test_any_bytes(served: Served, lines: list[bytes]) -> None:
    data = b"\n".join(lines) + b"\n"
    found = answers(served, data)
    assert len(found) == data.count(b"\n")
    assert all(answer["error"]["status"] == 2 for answer in found)
