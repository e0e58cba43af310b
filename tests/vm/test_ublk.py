# SPDX-License-Identifier: GPL-2.0-only
"""The ublk export, in the virtual machine, which has a ublk driver: the engine runs there, on the machine's disks.

A test is a story in bash (`PRELUDE` has its words), run in a chroot to the host's system.  Everything is emulated, the
engine some 30 times slower than usual, so the stories are short and their data small.  Debian's kernel 6.1 is built
without the driver; there, the engine has to say so.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.vm import machine
from tests.vm.machine import Result
from tests.vm.ublk_side import PRELUDE

CACHE_BYTES = 96 << 20
BACKING_BYTES = 160 << 20


def tell(story: str, directory: Path, *, series: str = "6.12", timeout_s: float = 300) -> Result:
    """Run a story on two new disks."""
    disks = []
    for name, size_bytes in (("cache.img", CACHE_BYTES), ("back0.img", BACKING_BYTES)):
        disks.append(directory / name)
        with disks[-1].open("wb") as file:
            file.truncate(size_bytes)
    share = directory / "job"
    share.mkdir()
    (share / "story.sh").write_text(PRELUDE + story)
    done = machine.run("host bash /job/story.sh", disks, share, timeout_s=timeout_s, series=series, host=True)
    print(done.stdout)
    done.check()
    assert done.complaints() == []
    return done


@pytest.mark.timeout(500)
def test_a_file_system_and_fio_in_all_modes(tmp_path: Path) -> None:
    """No option says how to export: where there is a ublk driver, that is how."""
    tell("""
format writeback
begin --set sequential_cutoff=0
[ $device = /dev/ublkb0 ] || fail "the default is $device"
[ "$(cat /sys/block/ublkb0/size)" = 327664 ] || fail "size $(cat /sys/block/ublkb0/size)"
queue=/sys/block/ublkb0/queue
[ "$(cat $queue/logical_block_size $queue/fua $queue/write_cache | tr '\\n' ' ')" = "4096 1 write back " ] || fail queue
[ $(cat $queue/discard_max_bytes) != 0 ] || fail "virtio disks here know discard"
for mode in writeback writethrough writearound none; do
    ask set '{"target": "bcache0", "values": {"cache_mode": "'$mode'"}}' >/dev/null
    verify --filename=$device --size=6m --offset=100m
    say "fio is content with $mode"
done
ask volume_create '{"size": 8388608}' >/dev/null
until [ -b /dev/ublkb1 ]; do sleep 0.1; done
verify --filename=/dev/ublkb1 --size=2m
ask volume_remove '{"volume": "bcache1"}' >/dev/null
until [ ! -e /dev/ublkb1 ]; do sleep 0.1; done
say "fio is content with a flash-only volume, which came and went"
ask set '{"target": "bcache0", "values": {"cache_mode": "writeback"}}' >/dev/null
mkfs.ext4 -q -E lazy_itable_init=0 $device 64m
mount $device /run/mnt
for number in $(seq 30); do head -c 200000 /dev/urandom >/run/mnt/$number; done
(cd /run/mnt && md5sum [0-9]*) >/run/sums
sync
rm /run/mnt/1?
fstrim /run/mnt || fail fstrim
umount /run/mnt
echo 3 >/proc/sys/vm/drop_caches
e2fsck -fn $device || fail "fsck: $?"
mount -o ro $device /run/mnt
(cd /run/mnt && grep -v ' 1.$' /run/sums | md5sum -c --quiet) || fail "files have changed"
umount /run/mnt
dd if=$device of=/run/before bs=1M count=8 status=none
finish
begin --read-only
mount -o ro $device /run/mnt
cmp -n 8388608 /run/before $device || fail "what was read is not what is there after a start"
[ $(cat /sys/block/ublkb0/ro) = 1 ] || fail "the device can be written to"
dd if=/dev/zero of=$device bs=4k count=1 oflag=direct 2>/dev/null && fail "it was written to" || :
[ ! -s /job/errors ] || fail "the engine complained"
kill $engine
until grep -q "ublkb0 is in use (mounted?)" /job/errors; do sleep 0.2; done
umount /run/mnt
wait $engine || fail "the engine's status is $?"
nothing_left
begin
exec 7<$device
finish
say "whoever has the device open, but not as his own, does not keep the engine from its end"
exec 7<&-
""", tmp_path)


@pytest.mark.timeout(500)
def test_killed_again_and_again_under_a_mounted_file_system(tmp_path: Path) -> None:
    """Each engine takes the device of the one before; fio, the file system and a writer that never flushes notice but a
    pause."""
    tell("""
format writeback
begin --export ublk --set sequential_cutoff=0
mkfs.ext4 -q -E lazy_itable_init=0 $device 96m
mount $device /run/mnt
head -c 4000000 /dev/urandom >/run/data
cp /run/data /run/mnt/data
(
    until [ -e /run/over ]; do
        verify --directory=/run/mnt --size=3m --iodepth=8 --verify_backlog=16 --rate_iops=80,80
        say "fio is content" >>/run/rounds
    done
) &
client=$!
$python -I -S tests/vm/ublk_writer.py $device 30000 /run/over >/run/writer &
writer=$!
for mode in writeback writethrough writearound; do
    sleep 3
    killed
    begin --recover
    [ $device = /dev/ublkb0 ] || fail "the device is now $device"
    ask set '{"target": "bcache0", "values": {"cache_mode": "'$mode'"}}' >/dev/null
done
touch /run/over
wait $client || fail "the client has failed"
wait $writer || fail "the writer: $(cat /run/writer)"
cat /run/rounds /run/writer
grep -q "[0-9] writes, [1-9][0-9]* pauses" /run/writer || fail "the engine was not killed under the writer"
echo 3 >/proc/sys/vm/drop_caches
cmp /run/data /run/mnt/data || fail "an old file has changed"
umount /run/mnt
e2fsck -fn $device || fail "fsck: $?"
[ ! -s /job/errors ] || fail "the engine complained"

killed
status=0
bcachectl engine run --cache /dev/vda --backing /dev/vdb --export nbd --no-live 2>/run/refusal || status=$?
[ $status = 4 ] || fail "status $status"
grep -q "/dev/ublkb0: left by an engine of this set that was killed; take it back with" /run/refusal \\
    || fail "$(cat /run/refusal)"
[ -b /dev/ublkb0 ] || fail "it has gone"
bcachectl engine stop /dev/vda | grep -q "removed /dev/ublkb0" || fail "it was not removed"
sleep 0.5
nothing_left
""", tmp_path, timeout_s=400)


@pytest.mark.timeout(300)
@pytest.mark.parametrize("series", ["6.1"])
def test_a_kernel_without_ublk(tmp_path: Path, series: str) -> None:
    tell("""
status=0
bcachectl engine run --cache /dev/vda --export ublk --no-live 2>/run/refusal || status=$?
[ $status = 4 ] || fail "status $status"
grep -q "the kernel's ublk driver is not loaded; load it (modprobe ublk_drv" /run/refusal || fail "$(cat /run/refusal)"
""", tmp_path, series=series)
