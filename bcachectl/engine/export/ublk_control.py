# SPDX-License-Identifier: GPL-2.0-only
"""`UblkControl`: the commands of /dev/ublk-control, and how an engine knows its own devices again.

Life of a device, in commands:

1. `UblkControl.add`, `UblkControl.set_params`; then the export opens /dev/ublkcN and puts a fetch for each tag into
   its ring; `UblkControl.start` makes /dev/ublkbN, and reads it for partitions, so the engine must be serving by then.
2. `UblkControl.stop` takes /dev/ublkbN away, answered requests first, and gives all fetches back; `UblkControl.delete`
   forgets the device when nobody has it open any more.
3. If the engine dies between 1 and 2, the driver keeps the device and the requests on it (the state is LIVE, and
   QUIESCED as soon as it has noticed).  Another engine opens it between `UblkControl.begin_recovery` and
   `UblkControl.end_recovery`, and gets all requests that were not answered.

Every device carries a mark in the driver, 32 bits of a hash of the set's uuid above 32 bits of one of the volume's
(`mark_of`).  So nothing has to be written down where it could be lost or get old: `left_over` asks the driver.

Commands that wait for the engine itself (start, stop, end of a recovery) are called from a thread
(`bcachectl.engine.io.loop.Loop.call_in_thread`); each command has a ring of its own, so any thread may.
"""

from __future__ import annotations

import ctypes
import errno
import hashlib
import os
import re
import time

from bcachectl.engine.export import ublk_wire as wire
from bcachectl.engine.io.ring import Ring
from bcachectl.engine.io.uring import OP_URING_CMD
from bcachectl.engine.sched import NS_PER_S
from bcachectl.errors import DeviceError, WrongState

CONTROL_PATH = "/dev/ublk-control"
RECOVERY_TIMEOUT_S = 30.0
"""How long the driver may take to notice that the engine before has died."""
RECOVERY_POLL_S = 0.02
DELETE_TIMEOUT_S = 2.0
"""How long an older driver may wait until nobody has a device open that it has taken away."""

_ENOTSUPP = 524                         # the kernel's own number, without a name out here
_WANTED_FLAGS = wire.F_USER_RECOVERY | wire.F_USER_RECOVERY_REISSUE


def is_available() -> bool:
    """Whether the ublk driver is there, for this user."""
    return os.access(CONTROL_PATH, os.R_OK | os.W_OK)


class UblkControl:
    """The open control device; WrongState says what is lacking."""

    def __init__(self) -> None:
        try:
            self.fd = os.open(CONTROL_PATH, os.O_RDWR)
        except FileNotFoundError:
            raise WrongState(f"{CONTROL_PATH}: not there: the kernel's ublk driver is not loaded; load it (modprobe "
                             "ublk_drv, Linux 6.0 or later), or use --export loop or --export nbd") from None
        except OSError as error:
            raise WrongState(f"{CONTROL_PATH}: {error.strerror}; a ublk device needs root and the kernel's module "
                             "ublk_drv; or use --export nbd") from error
        self.is_encoded = True
        features = bytearray(8)
        try:
            self._command(wire.GET_FEATURES, wire.ANY_DEVICE, buffer=features)
        except _CommandFailed:
            # Older than 6.5: no list of features.  Those of 6.1 are all that is needed, under the old numbers.
            self.is_encoded = False
        except OSError as error:
            os.close(self.fd)
            raise WrongState(f"{CONTROL_PATH}: a ublk device needs io_uring, which this kernel does not give "
                             f"({error.strerror}); use --export loop or --export nbd") from error
        self.features = int.from_bytes(features, "little")

    def close(self) -> None:
        """Close it; a second call does nothing."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def io_command(self, command: int) -> int:
        """The number of a command of /dev/ublkcN as this driver wants it."""
        return wire.encoded(command) if self.is_encoded else command

    def add(self, *, queues: int, depth: int, max_io_bytes: int, mark: int) -> wire.DevInfo:
        """Make a device; what the driver made of the wish.  WrongState if it cannot be taken over after a crash."""
        flags = _WANTED_FLAGS | (wire.F_CMD_IOCTL_ENCODE if self.is_encoded else 0)
        raw = bytearray(wire.DevInfo(queues, depth, 0, max_io_bytes, wire.ANY_DEVICE, os.getpid(), flags,
                                     mark).encode())
        try:
            self._command(wire.ADD_DEV, wire.ANY_DEVICE, buffer=raw)
        except OSError as error:
            raise DeviceError(f"{CONTROL_PATH}: no ublk device could be made: {error.strerror}",
                              errno=error.errno or 0) from error
        info = wire.decode_dev_info(raw)
        if info.flags & _WANTED_FLAGS != _WANTED_FLAGS:
            self.delete(info.dev_id)
            raise WrongState(f"{CONTROL_PATH}: this kernel's ublk driver cannot hand a device to another engine "
                             "(Linux 6.1 can); use --export loop or --export nbd")
        return info

    def info(self, dev_id: int) -> wire.DevInfo:
        """The device as it is now; OSError (ENODEV) if there is none."""
        raw = bytearray(wire.DEV_INFO.size)
        self._command(wire.GET_DEV_INFO, dev_id, buffer=raw)
        return wire.decode_dev_info(raw)

    def set_params(self, dev_id: int, params: wire.Params) -> None:
        """Say what the device is like, before it starts."""
        self._command(wire.SET_PARAMS, dev_id, buffer=bytearray(params.encode()))

    def size_sectors(self, dev_id: int) -> int:
        """The size that the device was given."""
        raw = bytearray(wire.PARAMS.size)
        raw[0] = wire.PARAMS.size
        self._command(wire.GET_PARAMS, dev_id, buffer=raw)
        return wire.decode_size_sectors(raw)

    def start(self, dev_id: int) -> None:
        """Make the block device; returns when its partitions have been looked for.  From a thread."""
        self._command(wire.START_DEV, dev_id, data=os.getpid())

    def stop(self, dev_id: int) -> None:
        """Take the block device away.  From a thread."""
        self._command(wire.STOP_DEV, dev_id)

    def delete(self, dev_id: int) -> None:
        """Forget the device.  Who still has it open keeps nobody waiting; its number is free when he closes it."""
        try:
            self._command(wire.DEL_DEV_ASYNC, dev_id)
        except OSError as error:
            if error.errno == errno.ENODEV:
                return                          # it has gone by itself
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, _ENOTSUPP):
                raise
            # Before 6.9 there is no such command.  The other one takes the device away as well, then waits for him.
            self._command(wire.DEL_DEV, dev_id, limit_s=DELETE_TIMEOUT_S)

    def begin_recovery(self, dev_id: int) -> None:
        """Take a device whose engine has died; waits until the driver has noticed that.  From a thread."""
        deadline_s = time.monotonic() + RECOVERY_TIMEOUT_S
        while True:
            try:
                self._command(wire.START_USER_RECOVERY, dev_id)
                return
            except OSError as error:
                if error.errno != errno.EBUSY:
                    raise DeviceError(f"/dev/ublkb{dev_id}: cannot be taken over: {error.strerror}",
                                      errno=error.errno or 0) from error
                if time.monotonic() > deadline_s:
                    pid = self.info(dev_id).pid
                    raise WrongState(f"/dev/ublkb{dev_id}: is still served by process {pid}; end that first") from None
            time.sleep(RECOVERY_POLL_S)

    def end_recovery(self, dev_id: int) -> None:
        """All fetches are there again: the device goes on.  From a thread."""
        self._command(wire.END_USER_RECOVERY, dev_id, data=os.getpid())

    def devices(self) -> list[wire.DevInfo]:
        """All ublk devices of this machine, in the order of their numbers."""
        numbers = sorted(int(found[1]) for name in os.listdir("/dev") if (found := re.fullmatch(r"ublkc(\d+)", name)))
        present = []
        for number in numbers:
            try:
                present.append(self.info(number))
            except OSError:
                continue                        # gone meanwhile
        return present

    def _command(self, command: int, dev_id: int, *, data: int = 0, buffer: bytearray | None = None,
                 limit_s: float | None = None) -> int:
        # One command on a ring of its own; its result, or an OSError.  After ``limit_s`` it is given up: 0.
        address = length = 0
        if buffer is not None:
            address, length = ctypes.addressof(ctypes.c_char.from_buffer(buffer)), len(buffer)
        payload = wire.CTRL_CMD.pack(dev_id, wire.NO_QUEUE, length, address, data, 0, 0, 0)
        ring = Ring(1, entry_bytes=128)
        try:
            ring.push(OP_URING_CMD, fd=self.fd, user_data=0, payload=payload,
                      offset=wire.encoded(command) if self.is_encoded else command)
            completions: dict[int, list[tuple[int, int]]] = {}
            while not completions:
                ring.wait(-1 if limit_s is None else int(limit_s * NS_PER_S))
                completions = ring.take()
                if limit_s is not None and not completions:
                    return 0
        finally:
            ring.close()
        ((_, result),) = completions[0]
        if result < 0:
            raise _CommandFailed(-result, os.strerror(-result))
        return result


class _CommandFailed(OSError):
    # The driver's own answer, and not the ring's.
    pass


def mark_of(set_uuid: bytes, volume_uuid: bytes) -> int:
    """What a device of this volume carries in the driver."""
    return _hash32(b"set", set_uuid) << 32 | _hash32(b"volume", volume_uuid)


def left_over(control: UblkControl, set_uuid: bytes) -> list[wire.DevInfo]:
    """The devices that an engine of this set made and that someone may be waiting on."""
    return [info for info in _of_set(control, set_uuid) if info.state != wire.STATE_DEAD]


def delete_dead(control: UblkControl, set_uuid: bytes) -> None:
    """Forget the devices of this set that never started, or had stopped: an engine was killed while it did that."""
    for info in _of_set(control, set_uuid):
        if info.state == wire.STATE_DEAD:
            control.delete(info.dev_id)


def _of_set(control: UblkControl, set_uuid: bytes) -> list[wire.DevInfo]:
    return [info for info in control.devices() if info.mark >> 32 == _hash32(b"set", set_uuid)]


def _hash32(kind: bytes, uuid: bytes) -> int:
    # Never 0: that is what servers have who set no mark.
    return int.from_bytes(hashlib.blake2b(uuid, digest_size=4, person=b"bcachectl" + kind).digest(), "little") | 1
