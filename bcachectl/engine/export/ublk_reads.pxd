# SPDX-License-Identifier: GPL-2.0-only
# C types for ublk_reads.py, where it is compiled.

cimport cython
from cpython.array cimport array

from bcachectl.engine.export.descs_c cimport desc_of, kept_descs
from bcachectl.engine.export.ublk_writes cimport UblkWrites
from bcachectl.engine.io.ring cimport Arrivals, Ring
from bcachectl.engine.read_batch cimport ReadBatch


cdef class UblkReads:
    cdef public Ring ring
    cdef public ReadBatch reads
    cdef public UblkWrites writes
    cdef public Arrivals arrivals
    cdef public list others
    cdef public long ended, quiet
    cdef object owner
    cdef bint serves_hits
    cdef int[::1] pin_at
    cdef int shift
    cdef Py_ssize_t first_commit, first_read
    cdef unsigned int[::1] tags
    cdef int[::1] buckets
    cdef array descs

    @cython.locals(
        arrivals=Arrivals, reads=ReadBatch, pins=cython.int[::1], buckets=cython.int[::1], numbers=cython.uint[::1],
        results=cython.int[::1], words=cython.uint[::1], sectors=cython.ulonglong[::1], lengths=cython.ulonglong[::1],
        tags=cython.uint[::1], descs=array, first_read=cython.Py_ssize_t, read_number=cython.uint,
        quiet_bytes=cython.uint, cancelled=cython.int, quiet=cython.long, count=cython.Py_ssize_t,
        index=cython.Py_ssize_t, number=cython.uint, result=cython.int, word=cython.ulonglong, writes=UblkWrites,
        write_number=cython.uint, write_mask=cython.ulonglong, op_write=cython.ulonglong,
        max_write_sectors=cython.ulonglong, max_writes=cython.Py_ssize_t,
    )
    cpdef bint serve(self)

    @cython.locals(
        ring=Ring, reads=ReadBatch, sqe_u64=cython.ulonglong[::1], sqe_u32=cython.uint[::1], sqe_i32=cython.int[::1],
        slots=cython.uint[::1], mask=cython.uint, tail=cython.uint, handed_over=cython.uint,
        quiet_bytes=cython.ulonglong, gathered=cython.uint, result_word=cython.Py_ssize_t, places=cython.longlong[::1],
        lengths=cython.ulonglong[::1], tags=cython.uint[::1], buckets=cython.int[::1], pins=cython.int[::1],
        shift=cython.int, first_commit=cython.Py_ssize_t, first_read=cython.Py_ssize_t, quiet=cython.long,
        index=cython.Py_ssize_t, number=cython.uint, place=cython.longlong, bucket=cython.Py_ssize_t,
        length=cython.ulonglong, slot=cython.Py_ssize_t, word_mask=cython.uint,
    )
    cdef _publish(self, Py_ssize_t count)
