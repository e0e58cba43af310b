# SPDX-License-Identifier: GPL-2.0-only
"""``python -m bcachectl``: the program as a process, around `bcachectl.cli.run`.

1. Descriptors 0 to 2 are open before anything else is: a device that was opened as descriptor 1 or 2 would get what
   is printed.
2. SIGTERM and SIGHUP end a command as SIGINT does, so that what it cleans up, puts back and notes down is done for each
   of them.  Where one is ignored, as nohup has it, it stays so; an engine has handlers of its own while it runs.
3. A signal may come before the command line is loaded, and ends in one sentence as well.
"""

from __future__ import annotations

import codecs
import io
import os
import signal
import sys
from types import FrameType
from typing import TextIO

from bcachectl.errors import EXIT_CANCELLED, EXIT_INTERRUPTED

ENDING = (signal.SIGTERM, signal.SIGHUP)


def main() -> None:
    """Run the command line and leave with its exit status."""
    words = sys.argv[1:]
    # The threads of numpy's algebra spin for some time when they begin, and nothing here multiplies matrices.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    try:
        open_standard_streams()
        for stream in (sys.stdout, sys.stderr):
            pass_everything(stream)
        for number in ENDING:
            if signal.getsignal(number) is signal.SIG_DFL:
                signal.signal(number, _interrupt)
        from bcachectl.cli import run

        status = run(words)
    except KeyboardInterrupt:
        print("bcachectl: interrupted", file=sys.stderr)
        status = EXIT_CANCELLED if words[:1] == ["fsck"] else EXIT_INTERRUPTED
    sys.exit(status)


def open_standard_streams() -> None:
    """Give whatever of descriptors 0 to 2 is closed to /dev/null; what is printed there is lost, as was asked for."""
    fd = os.open(os.devnull, os.O_RDWR)
    while fd <= 2:
        if fd == 1:
            sys.stdout = os.fdopen(fd, "w", closefd=False)
        elif fd == 2:
            sys.stderr = os.fdopen(fd, "w", closefd=False)
        fd = os.open(os.devnull, os.O_RDWR)
    os.close(fd)


def pass_everything(stream: TextIO) -> None:
    """Let a stream take any text: names that are no UTF-8 as they are, and what its encoding has not as question marks.

    Python does the first by itself in the C locale only, and ends with an error otherwise.
    """
    if isinstance(stream, io.TextIOWrapper):
        is_utf8 = codecs.lookup(stream.encoding).name == "utf-8"
        stream.reconfigure(errors="surrogateescape" if is_utf8 else "replace")


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    main()
