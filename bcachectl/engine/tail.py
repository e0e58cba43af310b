# SPDX-License-Identifier: GPL-2.0-only
"""`Tail`: the keys that are in the journal in memory and not yet on the device, in memory that outlives the engine.

To the clients of a ublk device a killed engine is a pause (docs/decisions/0020): the next engine must know every write
that was answered.  Nobody has seen a power loss, so nothing needs to be on the device for that.  It is enough that the
keys of the open entry, and of the one that is being written, are in a file of a file system in memory
(docs/decisions/0036).  `bcachectl.engine.journal` adds keys here as it takes them; `bcachectl.engine.recovery` inserts
again what a dead engine has left.

The memory is changed by plain stores, in the order of the program; what a process stored is there whenever it is
killed.  Each of the following is one store of a word at its end:

* `Tail.add`: the keys, then their number;
* `Tail.begun`: an entry is about to be written;
* `Tail.take_over`: what was left becomes what is *inherited*, which stays until `Tail.settle`: until those keys are on
  the device once more.

**Whose tail is it?**  An entry of the journal has a seq and a checksum, and those of the last two that were begun are
here (`Tail.begun`), before they are written.  The newest entry on the device is one of the two, unless somebody else
has run the set since.  A file of another boot counts for nothing: power has failed, or may have.
"""

from __future__ import annotations

from bcachectl.errors import WrongState
from bcachectl.ondisk.jset import JSET_MAX_BYTES

_MAGIC = int.from_bytes(b"bctail\0\1", "little")

# Words of the head.
_MAGIC_WORD, _SET_UUID, _BOOT, _INHERITED_BYTES, _DURABLE_SEQ = 0, 1, 3, 5, 6
_BEGUN = 8          # seq and checksum, twice
_OPEN = 12          # seq and bytes of keys, twice: an entry has the place of its seq's lowest bit
_HEAD_BYTES = 4096
_INHERITED_AT = _HEAD_BYTES
_KEYS_AT = _INHERITED_AT + 2 * JSET_MAX_BYTES
TAIL_BYTES = _KEYS_AT + 2 * JSET_MAX_BYTES


class Tail:
    """The tail of one set, in ``memory`` of `TAIL_BYTES`: bcachectl/tailfile.py has it in a file."""

    __slots__ = ("memory", "words", "last", "path")

    def __init__(self, memory: memoryview, *, set_uuid: bytes, boot_id: bytes, path: str = "the tail") -> None:
        """What is there and is not of this set and this boot is forgotten.  ``path`` is for messages."""
        self.memory = memory
        self.words = memory.cast("Q")
        self.last = 0                           # which of the two that were begun came last
        self.path = path
        if not is_of(bytes(memory[:_HEAD_BYTES]), set_uuid, boot_id):
            self.words[_MAGIC_WORD] = 0
            memory[8:_HEAD_BYTES] = bytes(_HEAD_BYTES - 8)
            memory[8 * _SET_UUID:8 * _SET_UUID + 16] = set_uuid
            memory[8 * _BOOT:8 * _BOOT + 16] = boot_id
            self.words[_MAGIC_WORD] = _MAGIC

    def close(self) -> None:
        """Let go of the memory."""
        self.words.release()
        self.memory.release()

    # Of the engine that runs.

    def add(self, seq: int, keys: bytes) -> None:
        """Keys are added to entry ``seq``, which is open."""
        words, place = self.words, _OPEN + 2 * (seq & 1)
        if words[place] != seq:
            words[place + 1] = 0
            words[place] = seq
        here = words[place + 1]
        at = _KEYS_AT + (seq & 1) * JSET_MAX_BYTES + here
        self.memory[at:at + len(keys)] = keys
        words[place + 1] = here + len(keys)

    def begun(self, seq: int, csum: int) -> None:
        """Entry ``seq`` is about to be written."""
        # The one before may still be the newest on the device, so it stays.
        self.last ^= 1
        place = _BEGUN + 2 * self.last
        self.words[place] = seq
        self.words[place + 1] = csum

    def written(self, seq: int) -> None:
        """Entry ``seq`` is on the device."""
        self.words[_DURABLE_SEQ] = seq

    def settle(self) -> None:
        """What was inherited is on the device."""
        self.words[_INHERITED_BYTES] = 0

    # Of the one before.

    def left(self, newest_seq: int, newest_csum: int) -> bytes:
        """The keys that the newest entry on the device does not know of, in their order; WrongState if there are any
        and that entry was not written by who left them.
        """
        words = self.words
        begun = {(words[_BEGUN], words[_BEGUN + 1]), (words[_BEGUN + 2], words[_BEGUN + 3])}
        if (newest_seq, newest_csum) in begun:
            return self._inherited() or self._added_after(newest_seq)
        if self.has_more():
            raise WrongState(
                f"{self.path}: has writes that a killed engine answered and that are nowhere else, and something else "
                "has run the set since, so they do not fit it any more; remove that file to give them up")
        return b""

    def has_more(self) -> bool:
        """Whether there are keys here that are not known to be on the device."""
        return bool(self._inherited() or self._added_after(self.words[_DURABLE_SEQ]))

    def take_over(self, newest_seq: int, newest_csum: int) -> bytes:
        """`left`, which is inherited from now on; entries after ``newest_seq`` are this engine's."""
        words = self.words
        keys = self.left(newest_seq, newest_csum)
        if keys and not words[_INHERITED_BYTES]:
            self.memory[_INHERITED_AT:_INHERITED_AT + len(keys)] = keys
            words[_INHERITED_BYTES] = len(keys)
        words[_OPEN] = words[_OPEN + 2] = 0
        words[_DURABLE_SEQ] = newest_seq
        self.begun(newest_seq, newest_csum)
        self.begun(newest_seq, newest_csum)
        return keys

    def _inherited(self) -> bytes:
        return bytes(self.memory[_INHERITED_AT:_INHERITED_AT + self.words[_INHERITED_BYTES]])

    def _added_after(self, seq: int) -> bytes:
        # At most two entries are open or on their way, and they follow each other.
        words = self.words
        found = sorted((words[_OPEN + 2 * slot], slot) for slot in (0, 1) if words[_OPEN + 2 * slot] > seq)
        places = [(_KEYS_AT + slot * JSET_MAX_BYTES, words[_OPEN + 2 * slot + 1]) for _, slot in found]
        return b"".join([bytes(self.memory[at:at + nbytes]) for at, nbytes in places])


def is_of(head: bytes, set_uuid: bytes, boot_id: bytes) -> bool:
    """Whether memory that begins like this is the tail of this set, from this boot."""
    return head[:8 * _INHERITED_BYTES] == _MAGIC.to_bytes(8, "little") + set_uuid + boot_id
