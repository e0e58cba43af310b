# SPDX-License-Identifier: GPL-2.0-only
"""The two loops over the requests of a turn that every read hit of a ublk device goes through.

They know arrays and numbers only; `bcachectl.engine.export.ublk` says what they mean.
"""

from __future__ import annotations

import errno
from typing import NamedTuple

from bcachectl.engine.export import ublk_wire as wire
from bcachectl.engine.io.uring import HAND_OVER_READS, Ring

READ_NUMBER = 1 << 16
"""The number of a tag's read in the ring; that of its commit is the tag's own."""
QUIET_BYTES = 16 << 10
"""A read of no more than this is over soon, and wakes us up no sooner than the request that follows it."""


class Landed(NamedTuple):
    """What has come: tags with a read, and its (sector, nsectors); tags with something else; how many tags have ended;
    how many quiet reads.
    """

    tags: list[int]
    reads: list[tuple[int, int]]
    others: list[int]
    ended: int
    quiet: int


def sort_out(completions: list[tuple[int, int]], descs: list[memoryview], read_buckets: list[int], pin_at: memoryview,
             lengths: memoryview, first_read: int) -> Landed:
    """What (number, result) of each completion means.  The pins of reads that have ended are dropped; ``lengths`` are
    the words of the ring's entries, of which those from ``first_read`` on are the tags' reads.
    """
    pins, words = pin_at, lengths
    read_number, quiet_bytes, cancelled = READ_NUMBER, QUIET_BYTES, -errno.ECANCELED
    tags: list[int] = []
    reads: list[tuple[int, int]] = []
    others: list[int] = []
    ended = quiet = 0
    for number, result in completions:
        if number >= read_number:
            # Ended, well or not; if not, its commit comes back with ECANCELED.
            number -= read_number
            bucket = read_buckets[number]
            pins[bucket] -= 1
            read_buckets[number] = -1
            if words[16 * (first_read + number) + 6] <= quiet_bytes:
                quiet += 1
        elif not result:
            desc = descs[number]
            word = desc[0]
            if word & 0xFF:
                others.append(number)
            else:
                tags.append(number)
                reads.append((desc[1], word >> 32))
        elif result == cancelled:
            others.append(number)
        else:
            ended += 1
    return Landed(tags, reads, others, ended, quiet)


def publish_reads(ring: Ring, landed: Landed, places: list[int], read_buckets: list[int], pin_at: memoryview,
                  bucket_shift: int, first_commit: int, first_read: int) -> int:
    """Send each read, and the commit that is linked to it, to the kernel; ``places`` are bytes of the cache device.
    A negative one makes its tag one of the others.  How many of the reads are quiet ones.
    """
    sqe_u64, sqe_u32, sqe_i32, array = ring.sqe_u64, ring.sqe_u32, ring.sqe_i32, ring.sq_array
    mask, tail, handed_over = ring.sq_mask, ring.tail, ring.tail
    quiet_bytes, gathered, result_word = QUIET_BYTES, 2 * HAND_OVER_READS, wire.IO_CMD_RESULT_WORD
    tags, reads, others = landed.tags, landed.reads, landed.others
    pins, shift, quiet = pin_at, bucket_shift + 9, 0
    for index in range(len(tags)):
        number, place = tags[index], places[index]
        if place < 0:
            others.append(number)
            continue
        bucket = place >> shift
        pins[bucket] += 1
        read_buckets[number] = bucket
        length = reads[index][1] << 9
        if length <= quiet_bytes:
            quiet += 1
        slot = first_read + number
        sqe_u64[8 * slot + 1] = place
        sqe_u32[16 * slot + 6] = length
        array[tail & mask] = slot
        slot = first_commit + number
        sqe_i32[16 * slot + result_word] = length
        array[tail + 1 & mask] = slot
        tail = tail + 2 & 0xFFFFFFFF
        if tail - handed_over & 0xFFFFFFFF >= gathered:
            ring.tail = handed_over = tail
            ring.hand_over()
    ring.tail = tail
    return quiet
