# SPDX-License-Identifier: GPL-2.0-only
"""`write_plan` carries out a plan of `tests.stamps` on a volume, with several requests in flight.

It tells an `Acceptance` of each request and each acknowledgement, so that whatever moment the server is killed at,
the judge knows what had to survive.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from tests.acceptance import Acceptance
from tests.nbd_client import CMD_FLUSH, CMD_READ, CMD_WRITE, FLAG_FUA
from tests.over import Client
from tests.stamps import Op, content, tag


def write_plan(client: Client, plan: Iterable[Op], acceptance: Acceptance, *, seed: int, depth: int = 8,
               fua: float = 0.0, stop_after: int | None = None, on_write: Callable[[], None] | None = None) -> bool:
    """Carry out a plan with ``depth`` requests in flight; True if it came to its end, False if the server went away.

    One write of ``1 / fua`` carries FUA.  After ``stop_after`` acknowledged writes ``on_write()`` is called once (it
    may kill the engine); what is acknowledged later still counts.  A request that overlaps one in flight waits, so
    every read of what the plan wrote before has one right answer, and that is checked.
    """
    writes: dict[int, tuple[int, Op]] = {}          # cookie -> handle and what
    reads: dict[int, Op] = {}
    flushes: dict[int, int] = {}                    # cookie -> handle
    written: dict[int, bytes] = {}                  # byte offset of a sector -> the 16 bytes that fill it
    acknowledged = 0

    def take_one() -> None:
        nonlocal acknowledged
        reply = client.receive()
        assert reply.error == 0, f"the engine answers with error {reply.error}"
        if reply.cookie in writes:
            acceptance.acknowledge_write(writes.pop(reply.cookie)[0])
            acknowledged += 1
            if acknowledged == stop_after and on_write:
                on_write()
        elif reply.cookie in flushes:
            acceptance.acknowledge_flush(flushes.pop(reply.cookie))
        else:
            op = reads.pop(reply.cookie)
            for offset in range(0, op.length_bytes, 512):
                stamp = written.get(op.offset_bytes + offset)
                assert stamp is None or reply.data[offset:offset + 512] == stamp * 32, \
                    f"read {op.number}: wrong content at byte {op.offset_bytes + offset}"

    def overlaps(op: Op, other: Op) -> bool:
        return (op.offset_bytes < other.offset_bytes + other.length_bytes
                and other.offset_bytes < op.offset_bytes + op.length_bytes)

    every = round(1 / fua) if fua else 0
    try:
        for op in plan:
            while client.in_flight >= depth or any(overlaps(op, other) for _, other in writes.values()) \
                    or (not op.is_read and any(overlaps(op, other) for other in reads.values())):
                take_one()
            if op.is_read:
                reads[client.next_cookie] = op
                client.send(CMD_READ, op.offset_bytes, op.length_bytes)
            else:
                has_fua = bool(every) and op.number % every == 0
                write_tag = tag(seed, op.number)
                handle = acceptance.send_write(write_tag, op.offset_bytes, op.length_bytes, fua=has_fua)
                # Noted before it is sent: a server that dies in between may have it or not.
                writes[client.next_cookie] = (handle, op)
                stamp = content(write_tag, op.offset_bytes, 16)
                written.update(dict.fromkeys(range(op.offset_bytes, op.offset_bytes + op.length_bytes, 512), stamp))
                client.send(CMD_WRITE, op.offset_bytes, op.length_bytes, stamp * (op.length_bytes // 16),
                            FLAG_FUA if has_fua else 0)
            if op.flush_after:
                flushes[client.next_cookie] = acceptance.send_flush()
                client.send(CMD_FLUSH, 0, 0)
        while client.in_flight:
            take_one()
    except ConnectionError:
        return False
    return True
