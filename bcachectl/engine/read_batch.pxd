# SPDX-License-Identifier: GPL-2.0-only
# C types for read_batch.py, where it is compiled.

cimport cython
from cpython.array cimport array

from bcachectl.engine.node cimport Node
from bcachectl.engine.search cimport bisect_right


cdef class ReadBatch:
    cdef public object volume, btree
    cdef public unsigned long long[::1] sectors, lengths, hit_sectors, hit_lengths
    cdef public long long[::1] places
    cdef public Py_ssize_t hit_count
    cdef unsigned char[::1] gen_at
    cdef unsigned short[::1] prio_at
    cdef int shift

    @cython.locals(count=cython.Py_ssize_t)
    cpdef list places_of(self, list reads)

    @cython.locals(
        base=cython.ulonglong, start=cython.ulonglong, end=cython.ulonglong, ptr=cython.ulonglong, at=cython.ulonglong,
        offset=cython.longlong, meta=cython.uint, index=cython.Py_ssize_t, number=cython.Py_ssize_t,
        bucket=cython.Py_ssize_t, node=Node, root=Node, ends=array, metas=array, ptrs=array, size_mask=cython.uint,
        has_ptr=cython.uint, sector_mask=cython.ulonglong, initial_prio=cython.ushort, shift=cython.int,
        hit_count=cython.Py_ssize_t,
        sectors=cython.ulonglong[::1], lengths=cython.ulonglong[::1], hit_sectors=cython.ulonglong[::1],
        hit_lengths=cython.ulonglong[::1], places=cython.longlong[::1], gen_at=cython.uchar[::1],
        prio_at=cython.ushort[::1],
    )
    cpdef place(self, Py_ssize_t count, bint shortens=*)

    cpdef settle_as_one(self)

    cpdef drop(self)

    cpdef settle(self)


@cython.locals(lengths=cython.ulonglong[::1], total=cython.longlong, number=cython.Py_ssize_t)
cpdef long long hit_sectors_sum(ReadBatch hits)

@cython.locals(
    recent=dict, since_ns=cython.longlong, sectors=cython.ulonglong[::1], lengths=cython.ulonglong[::1],
    offset=cython.ulonglong, passed=cython.longlong, passed_sectors=cython.longlong, run=cython.longlong,
    average=cython.longlong, number=cython.Py_ssize_t, start=cython.ulonglong, nsectors=cython.ulonglong,
    nbytes=cython.longlong, found=tuple,
)
cpdef tuple note_hits(ReadBatch hits, streams, long long cutoff_bytes, long long now_ns)
