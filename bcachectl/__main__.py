# SPDX-License-Identifier: GPL-2.0-only
"""``python -m bcachectl``: the program."""

from __future__ import annotations

import sys

from bcachectl.cli import run


def main() -> None:
    """Run the command line and leave with its exit status."""
    sys.exit(run(sys.argv[1:]))


if __name__ == "__main__":
    main()
