# SPDX-License-Identifier: GPL-2.0-only
"""Runs in the virtual machine: asks the one engine there, without the seconds that the program needs to start.

    ask.py DIRECTORY METHOD PARAMETERS      (DIRECTORY: where engines have their sockets; PARAMETERS as JSON)
"""

from __future__ import annotations

import glob
import json
import socket
import sys


def main() -> None:
    directory, method, parameters = sys.argv[1:]
    (path,) = glob.glob(f"{directory}/*.sock")
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(path)
        lines = connection.makefile("rw")
        lines.readline()
        lines.write(json.dumps({"id": 1, "method": method, "params": json.loads(parameters)}) + "\n")
        lines.flush()
        answer = json.loads(lines.readline())
    if "error" in answer:
        sys.exit(str(answer["error"]))
    print(json.dumps(answer["result"]))


if __name__ == "__main__":
    main()
