# SPDX-License-Identifier: GPL-2.0-only
"""The engine's side of a test of the ublk export: words for a story in bash, which runs in the virtual machine, in a
chroot to the host's system."""

from __future__ import annotations

import shlex
import sys

from tests.conftest import TESTS

PRELUDE = f"""
set -eu
cd {shlex.quote(str(TESTS.parent))}
export HOME=/run XDG_RUNTIME_DIR=/run/x XDG_STATE_HOME=/run/x PATH=/usr/sbin:/usr/bin:/sbin:/bin
mkdir -p /run/x /run/mnt
python={shlex.quote(sys.executable)}
bcachectl() {{ $python -m bcachectl "$@"; }}
say() {{ echo "$(cut -d' ' -f1 /proc/uptime) $*"; }}
fail() {{ say "FAIL: $*"; cat /job/errors || :; exit 1; }}

# begin OPTION...: the engine on the two disks; $engine is its process, $device what it made.
begin() {{
    rm -f /run/ready
    $python -m bcachectl engine run --cache /dev/vda --backing /dev/vdb --no-live "$@" >/run/ready 2>>/job/errors &
    engine=$!
    echo $engine >/run/engine
    until [ -s /run/ready ]; do
        [ -d /proc/$engine ] || fail "the engine has ended"
        sleep 0.1
    done
    device=$(sed 's/.*"device": "//; s/".*//' /run/ready)
    say "engine $engine serves $device"
}}

# finish: an orderly stop, which leaves nothing.
finish() {{
    kill $engine
    wait $engine || fail "the engine's status is $?"
    nothing_left
}}
nothing_left() {{
    for name in /dev/ublkb* /dev/ublkc* /sys/block/ublkb*; do
        [ ! -e $name ] || fail "$name is left"
    done
}}
killed() {{
    kill -9 $engine
    wait $engine || :
    say "engine $engine is killed"
}}
ask() {{ $python -I -S tests/vm/ask.py /run/x/bcachectl "$@"; }}
format() {{
    bcachectl format --cache /dev/vda --backing /dev/vdb --bucket-size 64k --block-size 4k --cache-mode $1 >/dev/null
}}
verify() {{
    fio --name=verify --direct=1 --ioengine=libaio --iodepth=16 --rw=randrw --bsrange=4k-64k --verify=crc32c \\
        --verify_fatal=1 --do_verify=1 --output-format=terse "$@" >/run/fio 2>&1 || {{ cat /run/fio; fail "fio $*"; }}
}}
"""
