# SPDX-License-Identifier: GPL-2.0-only
"""The least of ublk servers, for `bench.ublk_copy`: a disk as /dev/ublkbN, each request carried out where it says.

It runs in the virtual machine, on the engine's own `Ring` and `UblkControl`, without anything of a cache.  What differs
is how data gets from a request's pages into the tag's buffer and back; ``->`` is a link of the ring's entries:

* `DRIVER`, as the engine has it: the driver copies.  A read is READ disk -> COMMIT, a write WRITE disk -> COMMIT.
* `HEARD`, the same but for the reads' link: when READ disk has ended, COMMIT.  Writes are those of `DRIVER`.
* `LINKED`, user copy by entries of the ring.  A read is READ disk -> WRITE to /dev/ublkcN -> COMMIT, a write is
  READ from /dev/ublkcN -> WRITE disk -> COMMIT.
* `CALLED`, user copy by system calls.  A read is READ disk, and when that has ended pwrite, then COMMIT; a write is
  pread, then WRITE disk -> COMMIT.

What `CALLED` is to `HEARD` is due to the copy, what `HEARD` is to `DRIVER` to the link, or, of writes, to chance.
Nobody hears of links that succeed.  With ``--ask`` it asks the driver what it knows, and serves nothing.
"""

from __future__ import annotations

import argparse
import ctypes
import errno
import mmap
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from types import FrameType

from bcachectl.engine.export import ublk_wire as wire
from bcachectl.engine.export.ublk import DEPTH, MAX_BLOCK_BYTES, MAX_IO_BYTES, OPEN_TIMEOUT_S, QUEUES
from bcachectl.engine.export.ublk_control import UblkControl
from bcachectl.engine.io.ring import CLIENT_SHIFT, Arrivals, Ring
from bcachectl.engine.io.uring import OP_READ, OP_URING_CMD, OP_WRITE, SQE_IO_LINK
from bcachectl.errors import WrongState

DRIVER, HEARD, LINKED, CALLED = "driver", "heard", "linked", "called"
FORMS = (DRIVER, HEARD, LINKED, CALLED)

F_SUPPORT_ZERO_COPY, F_USER_COPY = 1 << 0, 1 << 7
IO_BUF_OFFSET, TAG_SHIFT, QUEUE_SHIFT = 0x80000000, 25, 41
"""Where a request's data lies in /dev/ublkcN.  Kernel: include/uapi/linux/ublk_cmd.h, UBLKSRV_IO_BUF_OFFSET,
UBLK_TAG_OFF, UBLK_QID_OFF."""

ENTRIES = 1024
LANDED = 1 << 16
"""Number of what comes before a tag's commit; that of the commit is the tag's own."""
TURN_NS = 300_000_000
_CLIENT = 1
_QUIET_LINK = SQE_IO_LINK | 1 << 6      # IOSQE_CQE_SKIP_SUCCESS
_OFFSET_WORD, _LENGTH_WORD = 1, 6       # in an entry, in words of 64 and of 32 bits


def add(control: UblkControl, flags: int) -> wire.DevInfo:
    """Make a device with these flags and with those of the engine's; what the driver made of it."""
    flags |= wire.F_USER_RECOVERY | wire.F_USER_RECOVERY_REISSUE | wire.F_CMD_IOCTL_ENCODE
    raw = bytearray(wire.DevInfo(min(QUEUES, os.cpu_count() or 1), DEPTH, 0, MAX_IO_BYTES, wire.ANY_DEVICE, os.getpid(),
                                 flags, 0).encode())
    control._command(wire.ADD_DEV, wire.ANY_DEVICE, buffer=raw)
    return wire.decode_dev_info(raw)


class Server:
    """One device; a `bcachectl.engine.io.ring.QuickClient` that is alone in its ring."""

    def __init__(self, control: UblkControl, form: str, path: str) -> None:
        self.control = control
        self.form = form
        self.is_user_copy = form in (LINKED, CALLED)
        self.hears_reads = form in (HEARD, CALLED)
        self.ring = Ring(ENTRIES, waited_in=True)
        self.arrivals = Arrivals(self.ring.cq_entries)
        self.ended = self.failed = 0
        self.disk_fd = os.open(path, os.O_RDWR | os.O_DIRECT)
        self.size_sectors = os.lseek(self.disk_fd, 0, os.SEEK_END) >> 9
        self.info = add(control, F_USER_COPY if self.is_user_copy else 0)
        assert bool(self.info.flags & F_USER_COPY) == self.is_user_copy, f"the driver gave flags {self.info.flags:#x}"
        control.set_params(self.info.dev_id, wire.Params(self.size_sectors, MAX_BLOCK_BYTES, MAX_IO_BYTES,
                                                         False, 0, 0))
        self.fd = _open_when_there(f"/dev/ublkc{self.info.dev_id}")
        self.count = self.info.queues * self.info.depth
        self.maps: list[mmap.mmap] = []
        self.views: list[memoryview] = []
        self.descs: list[memoryview] = []
        self.buffers: list[memoryview] = []
        self.offsets = [IO_BUF_OFFSET + (index // self.info.depth << QUEUE_SHIFT)
                        + (index % self.info.depth << TAG_SHIFT) for index in range(self.count)]
        self.first_commit, self.first_read, self.first_write, self.first_out, self.first_in = (
            self.ring.reserve(self.count) for _ in range(5))
        self.ring.add_quick(_CLIENT, self)
        self._map()
        self._fill()

    def _map(self) -> None:
        # The tags' descriptors.
        for queue in range(self.info.queues):
            length = -(-self.info.depth * wire.IO_DESC.size // mmap.PAGESIZE) * mmap.PAGESIZE
            mapped = mmap.mmap(self.fd, length, mmap.MAP_SHARED, mmap.PROT_READ, offset=queue * wire.DESC_STRIDE_BYTES)
            raw = memoryview(mapped)
            words = raw.cast("Q")
            self.maps.append(mapped)
            self.views += (words, raw)
            self.descs += (words[3 * tag:3 * tag + 3] for tag in range(self.info.depth))

    def _fill(self) -> None:
        # The tags' buffers and entries, and their first fetches.
        memory = mmap.mmap(-1, self.count * MAX_IO_BYTES)
        data = memoryview(memory)
        start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        ring, base = self.ring, _CLIENT << CLIENT_SHIFT
        fetch, commit = (self.control.io_command(command) for command in (wire.FETCH_REQ, wire.COMMIT_AND_FETCH_REQ))
        for index, offset in enumerate(self.offsets):
            address, landed = start + index * MAX_IO_BYTES, base | LANDED | index
            self.buffers.append(data[index * MAX_IO_BYTES:(index + 1) * MAX_IO_BYTES])
            payload = wire.IO_CMD.pack(index // self.info.depth, index % self.info.depth, 0,
                                       0 if self.is_user_copy else address)
            ring.fill(self.first_commit + index, OP_URING_CMD, fd=self.fd, user_data=base | index, offset=commit,
                      payload=payload)
            ring.fill(self.first_read + index, OP_READ, fd=self.disk_fd, user_data=landed, address=address,
                      flags=0 if self.hears_reads else _QUIET_LINK)
            ring.fill(self.first_write + index, OP_WRITE, fd=self.disk_fd, user_data=landed, address=address,
                      flags=_QUIET_LINK)
            ring.fill(self.first_out + index, OP_WRITE, fd=self.fd, user_data=landed, address=address, offset=offset,
                      flags=_QUIET_LINK)
            ring.fill(self.first_in + index, OP_READ, fd=self.fd, user_data=landed, address=address, offset=offset,
                      flags=_QUIET_LINK)
            if not ring.room:
                ring.enter()
            ring.push(OP_URING_CMD, fd=self.fd, user_data=base | index, offset=fetch, payload=payload)
        ring.enter()

    def serve(self) -> bool:
        """Requests have come, disks have read, links have failed."""
        arrivals = self.arrivals
        count, arrivals.count = arrivals.count, 0
        for number, result in zip(arrivals.numbers[:count], arrivals.results[:count], strict=True):
            if number >= LANDED:
                self._landed(number - LANDED, result)
            elif not result:
                self._begin(number)
            elif result != -errno.ECANCELED:        # a commit whose read or write has failed, which `_landed` has seen
                self.ended += 1
        return self.ended > 0

    def finish(self) -> None:
        """Nothing is left for anybody else."""

    def _begin(self, index: int) -> None:
        word, sector, _ = self.descs[index]
        operation, length = word & (0xFF | wire.FLAG_FUA), word >> 32 << 9
        ring, slot_words, slot_offsets = self.ring, self.ring.sqe_u32, self.ring.sqe_u64
        if operation == wire.OP_READ:
            slots = (self.first_read,) if self.form != LINKED else (self.first_read, self.first_out)
            slot_offsets[8 * (self.first_read + index) + _OFFSET_WORD] = sector << 9
        elif operation == wire.OP_WRITE:
            slots = (self.first_write,) if self.form != LINKED else (self.first_in, self.first_write)
            slot_offsets[8 * (self.first_write + index) + _OFFSET_WORD] = sector << 9
            if self.form == CALLED and os.preadv(self.fd, (self.buffers[index][:length],),
                                                 self.offsets[index]) != length:
                self._fail(index)
                return
        else:
            # Clients ask for nothing else here but flushes, when they close the device.
            if operation == wire.OP_FLUSH:
                os.fdatasync(self.disk_fd)
            self._commit(index, 0 if operation == wire.OP_FLUSH else -errno.EOPNOTSUPP)
            return
        for first in slots:
            slot_words[16 * (first + index) + _LENGTH_WORD] = length
            ring.publish(first + index)
        if operation == wire.OP_WRITE or not self.hears_reads:
            self._commit(index, length)

    def _landed(self, index: int, result: int) -> None:
        # The disk has read, and nothing is linked to that; or something has failed, and its commit with it.
        word = self.descs[index][0]
        length = word >> 32 << 9
        if not self.hears_reads or word & 0xFF != wire.OP_READ or result != length or (self.is_user_copy and os.pwrite(
                self.fd, self.buffers[index][:length], self.offsets[index]) != length):
            self._fail(index)
        else:
            self._commit(index, length)

    def _fail(self, index: int) -> None:
        self.failed += 1
        self._commit(index, -errno.EIO)

    def _commit(self, index: int, result: int) -> None:
        slot = self.first_commit + index
        self.ring.sqe_i32[16 * slot + wire.IO_CMD_RESULT_WORD] = result
        self.ring.publish(slot)

    def serve_during(self, command: Callable[[int], None]) -> None:
        """Serve while a command of the driver, which waits for that, is carried out."""
        thread = threading.Thread(target=command, args=(self.info.dev_id,))
        thread.start()
        while thread.is_alive():
            self.ring.serve(TURN_NS // 10)
        thread.join()

    def close(self) -> None:
        """Take the device away."""
        self.serve_during(self.control.stop)
        while self.ended < self.count:
            self.ring.serve(TURN_NS)
        self.ring.close()
        for view in (*self.descs, *self.views):
            view.release()
        for mapped in self.maps:
            mapped.close()
        os.close(self.fd)
        self.control.delete(self.info.dev_id)


def _open_when_there(path: str) -> int:
    # The node may come a moment after the device.
    deadline_s = time.monotonic() + OPEN_TIMEOUT_S
    while not os.path.exists(path) and time.monotonic() < deadline_s:
        time.sleep(0.01)
    return os.open(path, os.O_RDWR)


def ask() -> None:
    """Print what the driver says of its features, and what it makes of a device that is asked for with each."""
    try:
        control = UblkControl()
    except WrongState as error:
        print(f"no ublk: {error}")
        return
    print(f"GET_FEATURES: {control.features:#x}; of those zero copy: {bool(control.features & F_SUPPORT_ZERO_COPY)}, "
          f"user copy: {bool(control.features & F_USER_COPY)}")
    for name, flags in (("zero copy", F_SUPPORT_ZERO_COPY), ("user copy", F_USER_COPY),
                        ("zero copy and user copy", F_SUPPORT_ZERO_COPY | F_USER_COPY)):
        try:
            info = add(control, flags)
        except OSError as error:
            print(f"ADD_DEV with {name}: {error.strerror}")
            continue
        print(f"ADD_DEV with {name}: made, with flags {info.flags:#x}; zero copy: "
              f"{bool(info.flags & F_SUPPORT_ZERO_COPY)}, user copy: {bool(info.flags & F_USER_COPY)}")
        control.delete(info.dev_id)


def main() -> None:
    """Serve a disk until SIGTERM; prints the device's name and the process's number when it is there."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--form", choices=FORMS, default=DRIVER)
    parser.add_argument("--ask", action="store_true", help="ask the driver, serve nothing")
    parser.add_argument("disk", nargs="?", default="/dev/vda")
    asked = parser.parse_args()
    if asked.ask:
        ask()
        return
    is_over = False

    def end(_number: int, _frame: FrameType | None) -> None:
        nonlocal is_over
        is_over = True

    signal.signal(signal.SIGTERM, end)
    server = Server(UblkControl(), asked.form, asked.disk)
    server.serve_during(server.control.start)
    print(f"ublkb{server.info.dev_id} {os.getpid()}", flush=True)
    while not is_over:
        server.ring.serve(TURN_NS)
    server.close()
    if server.failed:
        sys.exit(f"{asked.form}: {server.failed} requests have failed")


if __name__ == "__main__":
    main()
