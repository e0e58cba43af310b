# SPDX-License-Identifier: GPL-2.0-only
# What jobs in the virtual machine are made of; job.sh reads this first.  busybox sh.
set -eu

fail() {
    echo "FAIL: $*"
    exit 1
}

# load_extra: the modules that are not loaded at boot.
load_extra() {
    for module in /modules/extra/*.ko; do
        insmod "$module" || fail "insmod $module"
    done
}

# register DEVICE...: give devices to the kernel's driver.
register() {
    for device in "$@"; do
        echo "$device" >/sys/fs/bcache/register || fail "register $device"
    done
}

# wait_for N COMMAND...: until the command succeeds, N seconds at most.
wait_for() {
    tries=$(($1 * 10))
    shift
    while ! "$@"; do
        tries=$((tries - 1))
        [ $tries -gt 0 ] || fail "waited in vain for: $*"
        sleep 0.1
    done
}

# wait_volume NAME...: until /dev/bcacheN is there.
wait_volume() {
    for volume in "$@"; do
        wait_for 60 test -b /dev/$volume
    done
}

# cset: the directory of the one cache set.
cset() {
    for folder in /sys/fs/bcache/*-*; do
        echo "$folder"
    done
}

# set_attribute PATH VALUE
set_attribute() {
    echo "$2" >"$1" || fail "$1 does not take $2"
}

# stop_all: an orderly end of the set and of its backing devices, dirty data staying where it is.
stop_all() {
    sync
    for folder in /sys/block/vd*/bcache; do
        # Only a backing device has such an attribute; a flash-only volume goes with its set.
        [ ! -e $folder/stop ] || echo 1 >$folder/stop
    done
    for folder in /sys/fs/bcache/*-*; do
        [ ! -e $folder ] || echo 1 >$folder/stop
    done
    wait_for 60 no_set
}

no_set() {
    # A set's directory goes before its btree and journal are written, its cache device's after that.
    for folder in /sys/fs/bcache/*-* /sys/block/bcache* /sys/block/vd*/bcache; do
        [ ! -e $folder ] || return 1
    done
    return 0
}

# facts DIRECTORY: the btree as debugfs tells it, and every attribute with its value.
facts() {
    mkdir -p "$1"
    for file in /sys/kernel/debug/bcache/bcache-*; do
        [ ! -f "$file" ] || cat "$file" >"$1/btree.txt"
    done
    for folder in /sys/fs/bcache/*-* /sys/block/bcache*/bcache /sys/block/vd*/bcache; do
        [ -d "$folder" ] || continue
        find "$folder/" -type f | while read -r file; do
            case "$file" in */priority_stats | */writeback_rate_debug) continue ;; esac
            value=$(cat "$file" 2>/dev/null | tr '\n' ';') || continue
            printf '%s\t%s\n' "$file" "$value"
        done
    done >"$1/sysfs.tsv"
}

# copy_out VOLUME DISK: the whole content of a volume onto a disk of the machine, which is a file on the host.
copy_out() {
    dd if=/dev/$1 of=$2 bs=1M conv=fsync 2>/dev/null || fail "reading $1"
}

# host COMMAND...: run a program of the host's system (the job must have asked for it).
host() {
    chroot /newroot "$@"
}

# crash: the machine is gone at once, nothing is written.  What the share was given is there.
crash() {
    dmesg >/job/dmesg
    echo 0 >/job/status
    echo b >/proc/sysrq-trigger
    sleep 60
}
