#!/bin/sh
# SPDX-License-Identifier: GPL-2.0-only
# Print the Python to build the virtual environment with: the system's if it is new enough, else the first in PATH.
for python in /usr/bin/python3 python3 python3.14 python3.13 python3.12 python3.11; do
    if "$python" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
        command -v "$python"
        exit 0
    fi
done
echo "no Python 3.11 or newer with the venv module was found; on Debian install python3 and python3-venv" >&2
exit 1
