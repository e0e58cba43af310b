# SPDX-License-Identifier: GPL-2.0-only
# C types for write_batch.py, where it is compiled.

cimport cython
from cpython.array cimport array

from bcachectl.engine.node cimport Node
from bcachectl.engine.open_buckets cimport OpenBucket, SectorAllocator
from bcachectl.engine.search cimport bisect_right


cdef class Placed:
    cdef public object dev
    cdef public unsigned long long base
    cdef public unsigned long long[::1] starts, ends, ptrs
    cdef public Py_ssize_t count
    cdef public list leaves
    cdef array keys
    cdef unsigned long long[::1] words
    cdef int[::1] pins
    cdef int shift

    @cython.locals(starts=cython.ulonglong[::1], ends=cython.ulonglong[::1], index=cython.Py_ssize_t)
    cpdef bint overlaps(self, unsigned long long start, unsigned long long end)

    @cython.locals(
        starts=cython.ulonglong[::1], ends=cython.ulonglong[::1], total=cython.ulonglong, index=cython.Py_ssize_t,
    )
    cpdef unsigned long long sectors_sum(self)

    @cython.locals(
        starts=cython.ulonglong[::1], ends=cython.ulonglong[::1], ptrs=cython.ulonglong[::1], index=cython.Py_ssize_t,
        dirty_key3=cython.ulonglong, inode_shift=cython.int, sector_mask=cython.ulonglong, end=cython.ulonglong,
        words=cython.ulonglong[::1],
    )
    cpdef bytes pack_keys(self)

    @cython.locals(ptrs=cython.ulonglong[::1], pins=cython.int[::1], shift=cython.int, index=cython.Py_ssize_t)
    cpdef pin_all(self)

    @cython.locals(ptrs=cython.ulonglong[::1], pins=cython.int[::1], shift=cython.int, index=cython.Py_ssize_t)
    cpdef unpin_all(self)

    @cython.locals(
        starts=cython.ulonglong[::1], ends=cython.ulonglong[::1], leaves=list, root=Node, leaf=Node, last=Node,
        rooms=Rooms, start=cython.ulonglong, index=cython.Py_ssize_t,
    )
    cpdef bint find_leaves(self)

    @cython.locals(
        starts=cython.ulonglong[::1], ends=cython.ulonglong[::1], ptrs=cython.ulonglong[::1], leaves=list, leaf=Node,
        start=cython.ulonglong, end=cython.ulonglong, ptr=cython.ulonglong, became_dirty=cython.longlong,
        flags=cython.uint, pending=cython.uint, has_stripes=cython.bint, index=cython.Py_ssize_t, overwritten=list,
        seq=cython.ulonglong, write_bytes=cython.long, settled=cython.Py_ssize_t,
    )
    cpdef insert(self, pin)


cdef class Rooms:
    cdef dict known
    cdef object cset, geometry
    cdef long words

    @cython.locals(found=object)
    cpdef bint has_room(self, Node leaf)


cdef class WriteBatch:
    cdef public object dev
    cdef public unsigned long long[::1] sectors, lengths
    cdef public long long[::1] places
    cdef public Placed placed, spare
    cdef unsigned long long[::1] pins
    cdef Py_ssize_t pinned
    cdef unsigned char[::1] mark_at
    cdef Py_ssize_t uncounted
    cdef unsigned long long uncounted_sectors

    @cython.locals(
        count=cython.Py_ssize_t, sectors=cython.ulonglong[::1], lengths=cython.ulonglong[::1],
        places=cython.longlong[::1],
    )
    cpdef list place(self, list writes, long stream)

    @cython.locals(
        placed=Placed, writes=cython.ulonglong[::1], lengths=cython.ulonglong[::1], places=cython.longlong[::1],
        not_now=cython.longlong, soon=cython.longlong, number=cython.Py_ssize_t, room=cython.Py_ssize_t,
        starts=cython.ulonglong[::1], ends=cython.ulonglong[::1], ptrs=cython.ulonglong[::1], leaves=list, root=Node, rooms=Rooms, leaf=Node,
        last_leaf=Node, data_offset=cython.ulonglong, base=cython.ulonglong, mask=cython.ulonglong,
        size_sectors=cython.ulonglong, shift=cython.int, block=cython.ulonglong, by_position=dict,
        cutoff_bytes=cython.longlong, now_ns=cython.longlong, since_ns=cython.longlong, recent=dict,
        run_bytes=cython.longlong, average=cython.longlong, has_writes=cython.bint, has_fills=cython.bint,
        marked=cython.ulonglong, got=cython.Py_ssize_t, ptr=cython.ulonglong, next_ptr=cython.ulonglong,
        free=cython.ulonglong, taken=cython.ulonglong, position=cython.ulonglong, nbytes=cython.longlong,
        bytes_average=cython.longlong, nsectors=cython.ulonglong, first=cython.ulonglong, start=cython.ulonglong,
        found=tuple, sectors=SectorAllocator, open_bucket=OpenBucket, pins=cython.ulonglong[::1],
        mark_at=cython.uchar[::1], dirty=cython.uchar, near=cython.ushort[::1], near_mask=cython.ulonglong,
    )
    cpdef place_columns(self, Py_ssize_t count, long stream)

    @cython.locals(placed=Placed)
    cpdef commit(self, long long duration_ns)

    @cython.locals(placed=Placed)
    cpdef Placed hand_over(self)

    cpdef take_back(self, Placed placed)

    cpdef abandon(self)

    cdef _count(self)

    @cython.locals(nsectors=cython.ulonglong)
    cpdef settle(self)

    @cython.locals(
        pin_at=cython.int[::1], pins=cython.ulonglong[::1], index=cython.Py_ssize_t, bucket=cython.ulonglong,
    )
    cdef _drop_pins(self)
