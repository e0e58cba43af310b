#!/bin/sh
# SPDX-License-Identifier: GPL-2.0-only
# Install the Debian packages that are missing: for "demo" what the program needs, for "compiled" what compiling its hot
# path needs and what that calls then, for "test" what its tests need too.
# As root on a Debian system it installs them; anyone else gets a line that names what is left out and why.
set -eu

case "${1:-}" in
demo) packages="python3-venv" ;;
compiled) packages="gcc libc6-dev python3-dev libisal2" ;;
test) packages="python3-venv gcc libc6-dev python3-dev libisal2 fio nbdkit qemu-utils libnbd-bin bcache-tools e2fsprogs xfsprogs
    util-linux mount fdisk qemu-system-x86 busybox-static cpio kmod xz-utils dpkg apt" ;;
*) echo "usage: $0 demo|compiled|test" >&2; exit 2 ;;
esac

if ! command -v dpkg-query >/dev/null; then
    echo "note: this is no Debian system; tests whose tools are missing will say so and be left out" >&2
    exit 0
fi

missing=""
for package in $packages; do
    state=$(dpkg-query -W -f='${db:Status-Status}' "$package" 2>/dev/null || true)
    [ "$state" = installed ] || missing="$missing $package"
done
[ -n "$missing" ] || exit 0

if [ "$(id -u)" != 0 ]; then
    echo "note: not root, so these packages are not installed, and tests that need them are left out:$missing" >&2
    exit 0
fi

echo "installing Debian packages:$missing"
export DEBIAN_FRONTEND=noninteractive
apt-get update -qq </dev/null
# shellcheck disable=SC2086  # a list of words
apt-get install -y -qq --no-install-recommends $missing </dev/null >/dev/null
