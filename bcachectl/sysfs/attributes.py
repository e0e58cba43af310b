# SPDX-License-Identifier: GPL-2.0-only
"""Attributes of a set or a volume of the kernel's under their own names: listed, read, checked and written.

A name is that of the file, with its directory (``internal/copy_gc_enabled``) or, where no other has it, without.
`Attributes.check` refuses before anything is written what the kernel would refuse, what it would take for something
else, and what is a verb of ours or costs data.  `Attributes.set` reads back: the kernel clamps silently.

Which kind of value a file takes, it shows itself: a list has brackets, a label is text, all others are plain numbers.
"""

from __future__ import annotations

import os
import re
import stat

from bcachectl.errors import DeviceError, Refused, UsageError
from bcachectl.sysfs.look import WINDOWS
from bcachectl.sysfs.tree import attribute, chosen, listing, write
from bcachectl.units import hprint, parse_hprint, parse_human, parse_unsigned

VERBS = {"attach": "attach", "detach": "detach", "stop": "stop", "unregister": "unregister", "running": "run",
         "flash_vol_create": "volume create"}
"""Files that are verbs here, with checks and a wait."""

COSTLY = ("priority_stats", "bset_tree_stats")
"""Files whose reading holds the driver up; read only if they are named."""

LABEL_BYTES = 32
_U64_MAX = (1 << 64) - 1
_STATS = tuple(f"stats_{window}" for window in WINDOWS)
_NAME = re.compile(r"[a-z0-9_]+(/[a-z0-9_]+)?")


class Attributes:
    """The files of one set (``kind`` is "set"), cached device ("volume") or flash-only volume ("flash")."""

    def __init__(self, directory: str, kind: str) -> None:
        self.directory = directory
        self.kind = kind
        self._places = ("", "internal/", "cache0/") if kind == "set" else ("",)

    def names(self) -> list[str]:
        """Everything that may be read without holding the driver up, in alphabetical order, statistics last."""
        found = []
        for place in (*self._places, *(f"{name}/" for name in _STATS)):
            found += [place + name for name in sorted(listing(os.path.join(self.directory, place)))
                      if name not in COSTLY and self._mode(place + name) & 0o444]
        return found

    def get(self, names: list[str]) -> dict[str, str]:
        """Values by name, all if none is named; a file that went away meanwhile is left out of all."""
        if names:
            return {name: self._read(name) for name in names}
        every = {name: attribute(self.directory, name) for name in self.names()}
        return {name: text for name, text in every.items() if text is not None}

    def check(self, values: dict[str, str]) -> None:
        """UsageError or Refused for a value that `set` would not take."""
        for name, text in values.items():
            self._check(name, text)

    def set(self, values: dict[str, str]) -> dict[str, str]:
        """Write all, and give what is stored then; DeviceError names what was set before the one that failed."""
        self.check(values)
        stored: dict[str, str] = {}
        for name, text in values.items():
            place = self._find(name)
            try:
                # An empty write would never reach the driver.
                write(self.directory, place, text or "\n")
            except DeviceError as error:
                done = ", ".join(f"{one}={value}" for one, value in stored.items())
                raise DeviceError(f"{error}; set before that: {done}" if done else str(error),
                                  errno=error.errno) from error
            stored[name] = self._stored(place, text)
        return stored

    def _read(self, name: str) -> str:
        place = self._find(name)
        if not self._mode(place) & 0o444:
            raise UsageError(f"{name} can only be written")
        text = attribute(self.directory, place)
        if text is None:
            raise DeviceError(f"{os.path.join(self.directory, place)}: cannot be read (any more)")
        return text

    def _find(self, name: str) -> str:
        if _NAME.fullmatch(name):
            directory, slash, _file = name.rpartition("/")
            places = ("",) if slash else self._places
            if directory + slash in (*self._places, *(f"{each}/" for each in _STATS)) or not slash:
                for place in places:
                    if self._mode(place + name):
                        return place + name
        what = {"set": "set", "volume": "cached device", "flash": "flash-only volume"}[self.kind]
        raise UsageError(f"{name} is no attribute of a {what} on this kernel; `bcachectl get` lists them all")

    def _mode(self, name: str) -> int:
        # The permissions of a plain file, 0 for anything else.
        try:
            status = os.stat(os.path.join(self.directory, name))
        except OSError:
            return 0
        return stat.S_IMODE(status.st_mode) if stat.S_ISREG(status.st_mode) else 0

    def _check(self, name: str, text: str) -> None:
        place = self._find(name)
        bare = os.path.basename(place)
        if bare in VERBS:
            raise UsageError(f"{name} is no tunable; `bcachectl {VERBS[bare]}` does that")
        if not self._mode(place) & 0o222:
            raise UsageError(f"{name} can only be read")
        now = attribute(self.directory, place)
        words = re.sub(r"[\[\]]", "", now or "").split()
        try:
            if bare == "label":
                if len(text.encode()) > LABEL_BYTES:
                    raise UsageError(f"{text!r} has {len(text.encode())} bytes; a label has at most {LABEL_BYTES}")
            elif chosen(now) is not None:
                if text not in words:
                    raise UsageError(f"{text!r} is none of {', '.join(words)}")
            elif bare == "size":
                self._check_size(text, now or "")
            elif bare not in ("clear_stats", "trigger_gc"):
                number = parse_unsigned(text, 0, _U64_MAX)
                if bare == "synchronous" and not number:
                    raise Refused("0 would make the next start treat the cache as new and lose everything on it")
        except UsageError as error:
            raise UsageError(f"{name}: {error}") from None
        except Refused as error:
            raise Refused(f"{name}: {error}") from None

    def _check_size(self, text: str, now: str) -> None:
        # The kernel cuts a volume off without a word, and makes one of less than a sector unusable.
        if parse_human(text) < parse_hprint(now)[0]:
            raise Refused(f"the volume has {now}, and what is behind {text} would be lost")

    def _stored(self, place: str, asked: str) -> str:
        now = attribute(self.directory, place) if self._mode(place) & 0o444 else None
        if now is None:
            return asked
        if chosen(now) is not None:
            return chosen(now) or now
        try:
            # Sizes are shown rounded: if the asked one looks the same, it is the one.
            shown = parse_unsigned(asked, 0, _U64_MAX) * (512 if place == "writeback_rate" else 1)
            return asked if hprint(shown) == now else now
        except UsageError:
            return now
