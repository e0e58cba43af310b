# SPDX-License-Identifier: GPL-2.0-only
"""``bcachectl engine run``: a cache set in the foreground, exported as block devices."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from enum import StrEnum
from typing import Annotated

import typer

from bcachectl.blockdev import open_device
from bcachectl.commands.options import Force, complete_device
from bcachectl.engine.export.host import EngineHost, HostOptions
from bcachectl.engine.export.ublk_control import is_available
from bcachectl.engine.sched import NS_PER_MS, NS_PER_S
from bcachectl.errors import BcachectlError, Refused, UsageError, WrongState

HAZARD_STALE = "inconsistent"
IN_USE_POLL_NS = 500 * NS_PER_MS
"""How often a stopping engine looks whether a device has been let go."""


class Export(StrEnum):
    """How volumes are exported."""

    NBD = "nbd"
    LOOP = "loop"
    UBLK = "ublk"


class IoBackend(StrEnum):
    """How the engine performs its own I/O."""

    AUTO = "auto"
    URING = "uring"
    SYNC = "sync"


def engine_run(
    cache: Annotated[str, typer.Option("--cache", metavar="DEVICE", autocompletion=complete_device,
                                       show_default=False, help="The set's cache device or image.")],
    backing: Annotated[list[str] | None, typer.Option("--backing", metavar="DEVICE", autocompletion=complete_device,
                                                      help="A backing device or image of the set; may be repeated."
                                                      )] = None,
    export: Annotated[Export | None, typer.Option("--export", help="How volumes are exported; by default as ublk "
                                                  "devices, as loop devices, or over NBD, whatever is possible "
                                                  "first.")] = None,
    recover: Annotated[bool, typer.Option("--recover", help="Take back the ublk devices that an engine of this set "
                                          "left when it was killed; whoever uses them never notices.")] = False,
    nbd_socket: Annotated[str | None, typer.Option("--nbd-socket", metavar="PATH", help="Serve NBD on this Unix "
                                                   "socket, beside another export if there is one.")] = None,
    read_only: Annotated[bool, typer.Option("--read-only", help="Write nothing to any device; volumes are "
                                                                "read-only.")] = False,
    overlay: Annotated[str | None, typer.Option("--overlay", metavar="FILE", help="Write to this file instead of the "
                                                "devices; it can be used again, as long as they do not change.")]
    = None,
    direct: Annotated[bool, typer.Option("--direct", help="Read and write image files past the page cache (O_DIRECT), "
                                         "as block devices always are; the file system must know it.")] = False,
    tunables: Annotated[list[str] | None, typer.Option("--set", metavar="NAME=VALUE", help="Set a tunable of the set "
                                                       "or of its volumes at the start; may be repeated.")] = None,
    live: Annotated[bool | None, typer.Option("--live/--no-live", show_default=False, help="Show the live view; by "
                                              "default on a terminal.")] = None,
    ready_fd: Annotated[int | None, typer.Option("--ready-fd", metavar="N", help="Write a newline to this descriptor "
                                                                                 "when all is ready.")] = None,
    trace: Annotated[str | None, typer.Option("--trace", metavar="FILE", help="Record the allocator's events here, "
                                                                              "as JSON lines.")] = None,
    debug_checks: Annotated[bool, typer.Option("--debug-checks", help="Check invariants all the time; slow.")] = False,
    io_backend: Annotated[IoBackend, typer.Option("--io", help="How the engine does its own I/O.")] = IoBackend.AUTO,
    force: Force = None,
) -> int:
    """Run a cache set in the foreground: open its devices, export its volumes, until SIGINT, SIGTERM or SIGHUP.

    For each volume one JSON line on stdout says where it is. A second signal does not wait for devices in use.
    """
    export = export or _best_export(io_backend)
    if export is Export.UBLK and io_backend is IoBackend.SYNC:
        raise UsageError("--export ublk and --io sync exclude each other: ublk devices are served through io_uring")
    if recover and export is not Export.UBLK:
        raise UsageError(f"--recover: only ublk devices can be taken back, and this engine exports over {export}; "
                         "add --export ublk")
    if read_only and overlay is not None:
        raise UsageError("--read-only and --overlay exclude each other: an overlay is there to be written to")
    if direct and overlay is not None:
        raise UsageError("--direct and --overlay exclude each other: what an overlay holds lies in the page cache")
    if ready_fd is not None:
        _check_descriptor(ready_fd)
    others = frozenset(force or ()) - {HAZARD_STALE}
    if others:
        raise UsageError(f"--force={min(others)} overrides nothing here; it takes {HAZARD_STALE}")
    if overlay is None:
        _refuse_small(cache, backing or [])
    is_forced = bool(force)
    if not is_forced:
        _refuse_newer(cache, backing or [], only_warn=read_only or overlay is not None)
    host = EngineHost(HostOptions(
        cache=cache, backings=tuple(backing or ()), use_loop=export is Export.LOOP, use_ublk=export is Export.UBLK,
        recover=recover, use_nbd=export is Export.NBD or nbd_socket is not None, nbd_socket=nbd_socket,
        read_only=read_only, overlay=overlay, direct=direct, accept_newer=is_forced or overlay is not None,
        tunables=tuple(_parse_tunable(text) for text in tunables or ()), trace=trace, debug_checks=debug_checks,
        io_backend=io_backend.value))
    try:
        host.loop.catch_signals()
        host.loop.run(_life(host, live=sys.stdout.isatty() if live is None else live, ready_fd=ready_fd))
    finally:
        host.close()
    if host.trace_error is not None:
        print(f"bcachectl: {host.trace_error}", file=sys.stderr)
    return 1 if host.failed is not None or host.trace_error is not None else 0


async def _life(host: EngineHost, *, live: bool, ready_fd: int | None) -> None:
    await host.start()
    try:
        await _serve(host, live=live, ready_fd=ready_fd)
    except OSError:
        # Nobody reads what we print, or the terminal is gone: no reason to leave the set in disorder.
        await host.stop()
        raise
    await host.stop()


async def _serve(host: EngineHost, *, live: bool, ready_fd: int | None) -> None:
    for ready in host.ready():
        print(json.dumps({"volume": ready.volume, "uuid": ready.uuid, "size": ready.size_bytes,
                          "device": ready.device, "uri": ready.uri}), flush=True)
    if ready_fd is not None:
        os.write(ready_fd, b"\n")
        os.close(ready_fd)
    if live:
        await _show(host)
    else:
        await _report(host)
    await _wait_until_unused(host)


async def _show(host: EngineHost) -> None:
    # The view is drawn in a thread: a terminal that someone has paused must not stop the engine.
    from rich.console import Console

    from bcachectl.views.terminal import LiveView

    with LiveView(Console()) as view:
        while not await host.wait_for_stop(deadline_ns=host.sched.now_ns + NS_PER_S):
            snapshot = host.cset.snapshot(view.cells())
            await host.loop.call_in_thread(lambda shown=snapshot: view.show(shown))  # type: ignore[misc]
    _tell_warnings(host)
    if host.failed is not None:
        _complain(host.failed)


async def _report(host: EngineHost) -> None:
    # Without a view, warnings and the failure of the set are said when they happen.
    is_told = False
    while not await host.wait_for_stop():
        _tell_warnings(host)
        if host.failed is not None and not is_told:
            is_told = True
            _complain(host.failed)
    if host.failed is not None and not is_told:
        _complain(host.failed)


def _tell_warnings(host: EngineHost) -> None:
    told, host.warnings = host.warnings, []
    for text in told:
        print(f"bcachectl: {text}", file=sys.stderr, flush=True)


async def _wait_until_unused(host: EngineHost) -> None:
    # A device under a mounted file system is not torn away, unless a second signal says so.
    host.loop.signalled = False
    told = None
    while not host.loop.signalled and (device := await host.device_in_use()) is not None:
        if device != told:
            told = device
            print(f"bcachectl: {device} is in use (mounted?); waiting for it; a second signal stops the engine anyway",
                  file=sys.stderr, flush=True)
        await host.loop.signal_wait.wait(deadline_ns=host.sched.now_ns + IN_USE_POLL_NS)


def _refuse_small(cache: str, backings: list[str]) -> None:
    # The engine finds this out as well, once the set has started, which writes to the cache device.  What cannot be
    # opened or is damaged is the engine's to refuse.
    from bcachectl.fsck.beyond import dirty_beyond
    from bcachectl.ondisk.superblock import SB_BYTES, SB_SECTOR, parse_superblock

    with contextlib.ExitStack() as stack:
        try:
            device, *members = [stack.enter_context(open_device(path)) for path in (cache, *backings)]
            superblocks = [parse_superblock(member.read(SB_SECTOR << 9, SB_BYTES)) for member in members]
            # The smallest last: it counts, if one is named with a copy of it.
            found = sorted(((member.size_bytes >> 9, member.path, sb.uuid)
                            for member, sb in zip(members, superblocks, strict=True) if sb.is_backing), reverse=True)
            if not found:
                return
            small = dirty_beyond(lambda sector, count: device.read(sector << 9, count << 9), device.size_bytes >> 9,
                                 {uuid: end for end, _path, uuid in found})
        except BcachectlError:
            return
    for _end, path, uuid in reversed(found):
        if uuid in small:
            raise WrongState(f"{path} is smaller than the dirty data that its cache holds for it (truncated?)")


def _refuse_newer(cache: str, backings: list[str], *, only_warn: bool) -> None:
    # The engine refuses it as well; here before the start of the set writes anything.
    from bcachectl.fsck.beyond import run_later
    from bcachectl.ondisk.superblock import SB_BYTES, SB_SECTOR, parse_superblock

    with contextlib.ExitStack() as stack:
        try:
            device, *members = [stack.enter_context(open_device(path)) for path in (cache, *backings)]
            superblocks = {member.path: parse_superblock(member.read(SB_SECTOR << 9, SB_BYTES)) for member in members}
            late = run_later(lambda sector, count: device.read(sector << 9, count << 9), device.size_bytes >> 9,
                             superblocks)
        except BcachectlError:
            return
    for path in late:
        why = (f"{path} is dirty and has run later than the set knows: {cache} may be an older copy of itself, or the "
               "clock was set back; `bcachectl fsck` with both tells more")
        if not only_warn:
            raise Refused(why, hazard=HAZARD_STALE)
        print(f"bcachectl: {why}", file=sys.stderr, flush=True)


def _complain(why: str) -> None:
    print(f"bcachectl: the set has failed: {why}", file=sys.stderr, flush=True)


def _best_export(io_backend: IoBackend) -> Export:
    if os.geteuid() == 0 and is_available() and io_backend is not IoBackend.SYNC:
        return Export.UBLK
    if os.geteuid() == 0 and os.path.exists("/dev/fuse") and os.path.exists("/dev/loop-control"):
        return Export.LOOP
    return Export.NBD


def _check_descriptor(fd: int) -> None:
    try:
        os.fstat(fd)
    except OSError as error:
        raise UsageError(f"--ready-fd {fd}: not an open descriptor") from error


def _parse_tunable(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise UsageError(f"--set {text}: write it like --set cache_mode=writeback")
    return name, value
