# SPDX-License-Identifier: GPL-2.0-only
"""`Finding`: what fsck concludes, where it is, what it means and which data it costs.

A finding has a stable `Finding.code`, one of `CODES`; scripts may rely on the codes, never on the texts.  `CODES` also
holds the severity, the plain sentence and whether a repair is safe, that is, loses nothing that only the cache has.

Severities: a `Severity.NOTE` is what a power failure leaves behind, or worth knowing; it does not change the exit
status.  A `Severity.WARNING` lets the kernel run the set, but not as it should.  A `Severity.ERROR` is damage.

`Loss` is the cost on one volume: dirty sectors exist nowhere else and are lost with the damage; clean sectors are on
the backing device too, and are merely dropped from the cache.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import Literal, NamedTuple

DamageCode = Literal[
    "SB_IO", "SB_OFFSET", "SB_MAGIC", "SB_CSUM", "SB_UUID", "SB_FEATURE", "SB_BLOCK_SIZE", "SB_BUCKET_SIZE",
    "SB_JOURNAL_BUCKETS", "SB_NBUCKETS", "SB_DEVICE_SIZE", "SB_NR_IN_SET", "SB_FIRST_BUCKET", "SB_VERSION",
    "SB_UNUSABLE",
    "JOURNAL_DISCARDED", "JOURNAL_EMPTY", "JOURNAL_GAP", "JOURNAL_IO", "JOURNAL_KEY", "JOURNAL_KEYS", "JOURNAL_TORN",
    "PRIO_PTR", "PRIO_CSUM", "PRIO_MAGIC", "PRIO_IO",
    "UUID_PTR", "UUID_IO",
    "BTREE_ROOT_PTR", "BTREE_LEVEL", "BTREE_NODE_TWICE", "BTREE_HEADER", "BTREE_VERSION", "BTREE_MAGIC", "BTREE_CSUM",
    "BTREE_EMPTY_SET", "BTREE_CORRUPTED", "BTREE_SHORT_KEY", "BTREE_PTRS", "BTREE_ORDER", "BTREE_PTR",
    "BTREE_CHILD_TWICE", "BTREE_CHILD_GAP", "BTREE_IO", "BTREE_KEYS", "BTREE_PTR_TOO_STALE",
    "EXTENT_CROSSES_BUCKET", "EXTENT_IN_RESERVED", "EXTENT_BEYOND_DEVICE", "EXTENT_SIZE",
]
"""The codes of what a walk comes across (`bcachectl.fsck.records.Damage`); the others are those of the rules."""


class Severity(IntEnum):
    """How bad a finding is."""

    NOTE = 0
    WARNING = 1
    ERROR = 2


class Meaning(NamedTuple):
    """What all findings of one code share; ``safe`` is whether repairing costs nothing that only the cache has."""

    severity: Severity
    text: str
    safe: bool = True


@dataclass(frozen=True, slots=True)
class Loss:
    """What is lost on one volume; ``ranges`` are half-open byte ranges on the volume, dirty ones."""

    inode: int
    volume: str
    dirty_sectors: int
    clean_sectors: int
    ranges: tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class Finding:
    """One conclusion.  ``why`` is what was seen, in the kernel's words where it has some."""

    code: str
    structure: str
    why: str
    bucket: int | None = None
    sector: int | None = None
    key: str = ""
    device: str = ""
    losses: tuple[Loss, ...] = ()
    unknown: tuple[tuple[int, int], ...] = ()
    """Ranges of positions whose keys nothing is known about."""

    @property
    def severity(self) -> Severity:
        """How bad it is."""
        return CODES[self.code].severity

    @property
    def meaning(self) -> str:
        """What it means, in one sentence."""
        return CODES[self.code].text

    @property
    def is_safe(self) -> bool:
        """Whether repairing it loses nothing that only the cache has."""
        return CODES[self.code].safe and not self.unknown and not any(loss.dirty_sectors for loss in self.losses)

    @property
    def dirty_sectors(self) -> int:
        """Sectors lost that only the cache had."""
        return sum(loss.dirty_sectors for loss in self.losses)

    @property
    def clean_sectors(self) -> int:
        """Sectors dropped that the backing devices have too."""
        return sum(loss.clean_sectors for loss in self.losses)


_N, _W, _E = Severity.NOTE, Severity.WARNING, Severity.ERROR

CODES: dict[str, Meaning] = {
    # The cache device's superblock.
    "SB_IO": Meaning(_E, "The superblock cannot be read; fsck goes on with what the rest of the device tells."),
    "SB_OFFSET": Meaning(_E, "There is no bcache superblock at sector 8, or it is damaged; the kernel does not know "
                             "the device as bcache's."),
    "SB_MAGIC": Meaning(_E, "The superblock's magic is damaged; the kernel does not know the device as bcache's."),
    "SB_CSUM": Meaning(_E, "The superblock's checksum is wrong; the kernel refuses the device."),
    "SB_VERSION": Meaning(_E, "The superblock has a version that no kernel knows.", safe=False),
    "SB_UUID": Meaning(_E, "The superblock has no device uuid or no set uuid; the kernel refuses the device."),
    "SB_FEATURE": Meaning(_E, "The superblock asks for features that no kernel has; what the device holds may not "
                              "be what it seems.", safe=False),
    "SB_BLOCK_SIZE": Meaning(_E, "The block size is one that the kernel refuses."),
    "SB_BUCKET_SIZE": Meaning(_E, "The bucket size is one that the kernel refuses."),
    "SB_NBUCKETS": Meaning(_E, "The number of buckets is one that the kernel refuses."),
    "SB_DEVICE_SIZE": Meaning(_E, "The device is smaller than the superblock says; was it, or an image of it, cut "
                                  "short?", safe=False),
    "SB_NR_IN_SET": Meaning(_E, "The device's number in its set makes no sense; the kernel refuses it."),
    "SB_JOURNAL_BUCKETS": Meaning(_E, "The list of journal buckets makes no sense; the kernel refuses the device."),
    "SB_FIRST_BUCKET": Meaning(_E, "The first bucket would overwrite the superblock; the kernel refuses the device."),
    "SB_GUESSED": Meaning(_N, "The superblock is unusable; what follows goes by geometry found on the device or "
                              "given."),
    "SB_HALF_UUID": Meaning(_E, "Only the first half of the set uuid is left on this device, which is enough to read "
                                "it; name a backing device of the set, or give --set-uuid, to have the superblock "
                                "written.", safe=False),
    "SB_UNUSABLE": Meaning(_E, "Neither the superblock nor the rest of the device tells the geometry; "
                               "give --bucket-size and --set-uuid.", safe=False),
    "SB_FLAGS": Meaning(_N, "The superblock has flag bits that no kernel gives a meaning to."),
    "SB_REPLACEMENT": Meaning(_W, "The replacement policy is none; the allocator of a kernel would never free a "
                                  "bucket."),
    "SB_OBSO_LARGE_BUCKET": Meaning(_W, "The large buckets are in the form of kernel 5.9; later kernels "
                                        "make every volume of this set read-only.", safe=False),
    "SB_DISCARD": Meaning(_N, "Discard is on; it has cost users their priorities (kernel bug 197377)."),
    "SB_NEVER_RUN": Meaning(_N, "The set never ran; there is nothing on the device but the superblock."),
    "SB_NODE_BLOCKS": Meaning(_W, "A btree node has room for one block only; this crashes kernels.", safe=False),
    "SB_TOO_FEW_TO_RUN": Meaning(_W, "The kernel's allocator refuses to run fewer than 513 buckets.", safe=False),
    "SB_OVERRULED": Meaning(_E, "The superblock contradicts --set-uuid or --bucket-size, which count.", safe=False),
    "SB_JOURNAL_SHORT": Meaning(_E, "The superblock names too few journal buckets; the kernel would go back in time "
                                    "without a word."),
    "SB_DEVICE_LARGER": Meaning(_N, "The device is larger than the set uses; bcache cannot use the rest."),
    "SB_BLOCK_ABOVE_PAGE": Meaning(_W, "The block size is larger than a page of 4 KiB; kernels with such pages refuse "
                                       "the device.", safe=False),
    "SB_BLOCK_BELOW_DEVICE": Meaning(_E, "The block size is smaller than the device's own; the kernel refuses it here. "
                                         "Copied to a device with smaller blocks, the set is as good as ever.",
                                     safe=False),
    # The journal.
    "JOURNAL_TORN": Meaning(_N, "The journal ends in an entry that was not written whole; any power failure leaves "
                                "that."),
    "JOURNAL_IO": Meaning(_E, "A journal bucket cannot be read. The newest keys may have stood there.", safe=False),
    "JOURNAL_EMPTY": Meaning(_E, "There is no journal entry, and only the journal knows where everything else is.",
                             safe=False),
    "JOURNAL_GAP": Meaning(_E, "Journal entries that a start must replay are missing; the kernel refuses "
                               "the set. What they held is unknown.", safe=False),
    "JOURNAL_DISCARDED": Meaning(_W, "The oldest journal entries that a start should replay are gone, as a crash "
                                     "leaves it where discard is on: their keys were in the btree. Kernels before 6.19 "
                                     "go by that, later ones refuse the set. A repair ends it."),
    "JOURNAL_CSUM": Meaning(_E, "A journal entry is damaged, and newer ones behind it are out of reach; "
                                "the kernel would go back in time without a word.", safe=False),
    "JOURNAL_FULL": Meaning(_W, "The journal is full to its last block. A kernel may hang for ever when it registers "
                                "the set: the replay may need room that only it can make. A repair replays it."),
    "JOURNAL_LAST_SEQ": Meaning(_E, "A journal entry names an oldest entry that is newer than itself, or goes back."),
    "JOURNAL_SEQ_TWICE": Meaning(_E, "Two different journal entries have one number.", safe=False),
    "JOURNAL_RING": Meaning(_E, "The journal's entries are not in the order of the ring; the kernel's search may miss "
                                "the newest."),
    "JOURNAL_VERSION": Meaning(_W, "A journal entry has a version that no kernel writes."),
    "JOURNAL_KEY": Meaning(_E, "A key in the journal points outside the device; the kernel refuses the "
                               "set.", safe=False),
    "JOURNAL_KEYS": Meaning(_E, "The keys of a journal entry cannot be taken apart.", safe=False),
    "JOURNAL_KEY_INODE": Meaning(_E, "A key in the journal belongs to a device number that the set cannot have."),
    # Prio sets.
    "PRIO_PTR": Meaning(_E, "The chain of priorities leads outside the device; the kernel refuses the set. Priorities "
                            "can be rebuilt."),
    "PRIO_CSUM": Meaning(_E, "A prio set fails its checksum; the kernel refuses the set. Priorities can be rebuilt."),
    "PRIO_MAGIC": Meaning(_E, "A prio set has a wrong magic; the kernel refuses the set. Priorities can be rebuilt."),
    "PRIO_IO": Meaning(_E, "A prio set cannot be read. Priorities can be rebuilt."),
    "PRIO_LOOP": Meaning(_E, "The chain of priorities comes back to itself."),
    "PRIO_INTO_JOURNAL": Meaning(_E, "The chain of priorities leads into the journal."),
    "PRIO_VALUE": Meaning(_W, "A bucket has a priority that no kernel gives."),
    "PRIO_GEN": Meaning(_W, "A bucket's generation on the device is far behind the pointers to it."),
    # The uuid array.
    "UUID_PTR": Meaning(_E, "The pointer to the uuid array is bad; the kernel refuses the set."),
    "UUID_IO": Meaning(_E, "The uuid array cannot be read."),
    "UUID_LENGTH": Meaning(_W, "The pointer to the uuid array has another length than a set like this writes; a kernel "
                               "would miss slots, or read too much."),
    "UUID_STALE": Meaning(_E, "The bucket of the uuid array was used again since; what is there is not the array."),
    "UUID_INTO_JOURNAL": Meaning(_E, "The pointer to the uuid array leads into the journal."),
    "UUID_TWICE": Meaning(_E, "Two slots of the uuid array hold one uuid; a backing device finds only the first."),
    "UUID_FLASH_SIZE": Meaning(_E, "A flash-only volume has no sectors, or more than there can be; volumes behind it "
                                   "may vanish at the next start."),
    "UUID_SECTORS": Meaning(_N, "A backing device's slot has a size, which only flash-only volumes have."),
    "UUID_FLAGS": Meaning(_N, "A slot of the uuid array has flags that no kernel gives a meaning to."),
    "UUID_FREE_DIRTY": Meaning(_N, "A free slot of the uuid array is not all zeros."),
    "ORPHAN_DIRTY": Meaning(_W, "There is dirty data of a slot that has no owner; the next device to be attached would "
                                "be given it. A repair finds the owner, or is told with --assign; `writeback "
                                "--orphans` can bring the data back.", safe=False),
    "ORPHAN_CLEAN": Meaning(_W, "There is clean data of a slot that has no owner; the next device to be attached would "
                                "be given it. A repair finds the owner, or drops the data."),
    "ORPHAN_RETIRED": Meaning(_N, "There are dirty keys of a device that was detached, or of a flash-only volume that "
                                  "was removed. An orderly detach leaves them for a while, the others for good: "
                                  "`writeback --orphans` lists them. A repair keeps them."),
    # Btree nodes and sets.
    "BTREE_LEVEL": Meaning(_E, "A node of the btree stands on another level than it is read at; the kernel would take "
                               "pointers to nodes for data, or data for nodes."),
    "BTREE_ROOT_PTR": Meaning(_E, "The pointer to the root of the btree is bad; the kernel refuses the "
                                  "set.", safe=False),
    "BTREE_IO": Meaning(_E, "A btree node cannot be read.", safe=False),
    "BTREE_HEADER": Meaning(_E, "A set of keys in a btree node has a damaged header; the kernel refuses the set."),
    "BTREE_VERSION": Meaning(_E, "A set of keys has a version that no kernel knows; the kernel refuses the set."),
    "BTREE_MAGIC": Meaning(_E, "A set of keys has a wrong magic; the kernel refuses the set."),
    "BTREE_CSUM": Meaning(_E, "A set of keys fails its checksum; the kernel refuses the set."),
    "BTREE_EMPTY_SET": Meaning(_E, "A set of keys behind the first is empty; the kernel refuses the set."),
    "BTREE_CORRUPTED": Meaning(_E, "A set of keys stands behind the end of its node's log: one between was lost."),
    "BTREE_SET_LOST": Meaning(_E, "The last set of keys of a node does not carry the node's number, and its checksum "
                                  "says that it should; the kernel would miss it without a word."),
    "BTREE_SET_MISSING": Meaning(_E, "A leaf has nothing where the journal tells of dirty data that nothing has "
                                     "replaced since: a set of its keys is gone. What the journal tells is kept; what "
                                     "else was in that set is not known."),
    "BTREE_SHORT_KEY": Meaning(_E, "A node holds keys behind the end of its range; the kernel refuses the set."),
    "BTREE_KEY_BEFORE": Meaning(_E, "A leaf holds keys before the start of its range, where no lookup finds them."),
    "BTREE_STRAY": Meaning(_E, "Dirty data is known only by keys outside the range of their leaf, where no lookup "
                               "finds them: readers get what is older. A repair puts these keys where they belong."),
    "BTREE_PTRS": Meaning(_E, "A key has several pointers; sets have had one cache since kernel 5.10."),
    "BTREE_ORDER": Meaning(_E, "Keys of a set are out of order; lookups go wrong."),
    "BTREE_SET_OVERLAP": Meaning(_E, "Keys within one set overlap."),
    "BTREE_KEYS": Meaning(_E, "The keys of a set cannot be taken apart."),
    "BTREE_NODE_TWICE": Meaning(_E, "Two pointers lead to one node."),
    "BTREE_PTR": Meaning(_E, "A pointer to a btree node is bad; the kernel refuses the set."),
    "BTREE_PTR_OFFSET": Meaning(_W, "A pointer to a btree node does not lead to the start of a bucket."),
    "BTREE_PTR_INTO_JOURNAL": Meaning(_E, "A pointer to a btree node leads into the journal."),
    "BTREE_CHILD_TWICE": Meaning(_E, "Two children of a node end at one position."),
    "BTREE_CHILD_GAP": Meaning(_E, "No child covers the end of a node's range; lookups there find nothing, or crash."),
    # Extents.
    "EXTENT_CROSSES_BUCKET": Meaning(_E, "An extent leaves its bucket; the kernel refuses the set."),
    "EXTENT_IN_RESERVED": Meaning(_E, "An extent lies in the buckets reserved for the superblock; the kernel refuses "
                                      "the set."),
    "EXTENT_BEYOND_DEVICE": Meaning(_E, "An extent lies beyond the end of the device; the kernel refuses the set."),
    "EXTENT_SIZE": Meaning(_E, "An extent is longer than its own end; the kernel refuses the set."),
    "EXTENT_INTO_JOURNAL": Meaning(_E, "An extent lies in the journal."),
    "EXTENT_IN_METADATA": Meaning(_E, "A bucket is used for metadata and for data; the kernel fails the set at its "
                                      "next gc."),
    "EXTENT_OVERLAP": Meaning(_E, "Two extents use the same sectors of the cache; one of them has the other's data."),
    "EXTENT_INODE": Meaning(_E, "Extents belong to a device number that the set cannot have."),
    "EXTENT_BEYOND_VOLUME": Meaning(_W, "Extents lie beyond the end of their flash-only volume."),
    "BTREE_PTR_STALE_DIRTY": Meaning(_W, "Dirty extents whose bucket was used again since: their data is gone."),
    "BTREE_PTR_TOO_STALE": Meaning(_E, "A pointer is more than 96 generations behind its bucket; the kernel fails the "
                                       "set."),
    "BUCKET_TWICE": Meaning(_E, "One bucket is claimed by two structures."),
    # Backing devices.
    "BACKING_IO": Meaning(_E, "The superblock of a backing device cannot be read.", safe=False),
    "BACKING_OFFSET": Meaning(_E, "A backing superblock does not say that it stands at sector 8."),
    "BACKING_MAGIC": Meaning(_E, "A backing device has no bcache superblock.", safe=False),
    "BACKING_CSUM": Meaning(_E, "The checksum of a backing superblock is wrong; the kernel refuses the device."),
    "BACKING_VERSION": Meaning(_E, "A backing superblock has a version that no kernel knows.", safe=False),
    "BACKING_KIND": Meaning(_E, "This is a cache device, not a backing device.", safe=False),
    "BACKING_UUID": Meaning(_E, "A backing superblock has no uuid; the kernel refuses the device.", safe=False),
    "BACKING_DATA_OFFSET": Meaning(_E, "The data of a backing device would start inside its superblock.", safe=False),
    "BACKING_BLOCK_SIZE": Meaning(_E, "The block size of a backing device is 0, or smaller than its set's or than "
                                      "the device's own; it cannot attach.", safe=False),
    "BACKING_GUESSED": Meaning(_N, "Nothing tells for sure which flags a backing superblock with a wrong checksum had. "
                                   "A repair writes what loses nothing, or leaves it as it is, and the kernel refuses "
                                   "it; `bcachectl resolve` tells what each choice loses then."),
    "BACKING_FLAGS": Meaning(_N, "A backing superblock has flag bits that no kernel gives a meaning to."),
    "BACKING_FEATURE": Meaning(_W, "A backing superblock asks for features that nobody knows; what the device holds "
                                   "may not be what it seems.", safe=False),
    "BACKING_MODE": Meaning(_W, "A backing superblock has a cache mode that does not exist."),
    "BACKING_TWICE": Meaning(_E, "Two backing devices have one uuid; one is a copy of the other.", safe=False),
    "BACKING_OTHER_SET": Meaning(_W, "A backing device belongs to another set.", safe=False),
    "BACKING_NOT_ATTACHED": Meaning(_N, "A backing device is attached to no set, and this cache holds no dirty data "
                                        "for it."),
    "BACKING_FORGOTTEN": Meaning(_E, "A backing device says that it is attached, but the set does not "
                                     "know it.", safe=False),
    "BACKING_DETACHED_DIRTY": Meaning(_E, "A backing device says that it is detached, but the cache holds dirty data "
                                          "of it; `bcachectl resolve` tells what each choice loses.", safe=False),
    "BACKING_DETACHED_KEYS": Meaning(_N, "A backing device is detached while keys still say dirty; all their data was "
                                         "written back. `bcachectl forget-backing` makes their space free."),
    "BACKING_CLEAN_DIRTY": Meaning(_E, "A backing device is marked clean, but the cache holds dirty data that differs "
                                       "from what is on it. Either the mark is wrong, and the kernel would never write "
                                       "it back, or the cache device is an older copy of itself; -y takes the mark for "
                                       "wrong.", safe=False),
    "BACKING_CLEAN_KEYS": Meaning(_N, "A backing device is marked clean while keys still say dirty; their data was "
                                      "written back."),
    "BACKING_DIRTY_CLEAN": Meaning(_N, "A backing device is marked dirty, and no key is; the next start settles that."),
    "BACKING_NEWER": Meaning(_N, "A dirty backing device has run later than its set knows. Power may have failed just "
                                 "then, or the clock been set back; or the cache device is an older copy of itself, "
                                 "whose dirty data must not be written back over newer data."),
    "BACKING_INCONSISTENT": Meaning(_E, "A backing device was run without its dirty cache; `bcachectl "
                                        "resolve` tells what each choice loses.", safe=False),
    "BACKING_SMALL": Meaning(_E, "The cache holds dirty data beyond the end of a backing device.", safe=False),
    "BACKING_BEFORE_DATA": Meaning(_E, "The cache holds data before the start of a backing device's data.", safe=False),
}
"""Every code that fsck knows."""
