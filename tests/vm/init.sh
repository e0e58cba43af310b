#!/bin/busybox sh
# SPDX-License-Identifier: GPL-2.0-only
# The virtual machine's first process: load modules, mount the job's share, run /job/job.sh, leave its results there, power off.
/bin/busybox mkdir -p /proc /sys /dev /tmp /run /job /host /newroot /sbin /usr/bin /usr/sbin
/bin/busybox --install -s
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
mount -t debugfs debugfs /sys/kernel/debug
mount -t tmpfs tmpfs /tmp
for module in /modules/*.ko; do
    insmod "$module" || echo "insmod $module failed"
done
mount -t 9p -o trans=virtio,version=9p2000.L,msize=262144,cache=none jobdir /job
# From here on the console (a file on the host) gets what dmesg gets: it is all that is left of a machine that was killed.
dmesg -n 7
if [ -e /job/wants-host ]; then
    mount -t 9p -o trans=virtio,version=9p2000.L,ro,msize=1048576,cache=loose hostroot /host
    mkdir /tmp/upper
    mount -t tmpfs tmpfs /tmp/upper
    mkdir /tmp/upper/up /tmp/upper/work
    mount -t overlay -o lowerdir=/host,upperdir=/tmp/upper/up,workdir=/tmp/upper/work overlay /newroot
    for folder in proc sys dev; do mount --rbind /$folder /newroot/$folder; done
    # Not /tmp: the project may be there, and the overlay takes what is written.
    mount -t tmpfs tmpfs /newroot/run
    mkdir -p /newroot/job /newroot/bin
    mount --bind /job /newroot/job
fi
cd /job
touch /job/started
sh /job/job.sh >/job/stdout 2>&1
status=$?
dmesg >/job/dmesg
echo $status >/job/status
sync
poweroff -f
