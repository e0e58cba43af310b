# SPDX-License-Identifier: GPL-2.0-only
# C types for nbd_quick.py, where it is compiled.

cimport cython

from bcachectl.engine.export.nbd_c cimport put_chunk, put_simple, read_at, request_at, write_places
from bcachectl.engine.read_batch cimport ReadBatch
from bcachectl.engine.write_batch cimport WriteBatch


cdef class QuickTransmission:
    cdef public object connection, volume
    cdef public Py_ssize_t served
    cdef object _arena
    cdef unsigned char[::1] rx, arena
    cdef Py_ssize_t _arena_queued, _arena_end
    cdef ReadBatch reads
    cdef WriteBatch batch
    cdef unsigned long long[::1] sectors, lengths, cookies, write_cookies, write_offsets, write_lengths
    cdef long long[::1] places, write_starts

    @cython.locals(
        rx=cython.uchar[::1], quick_fd=cython.int, unaligned=cython.ulonglong, arena_bytes=cython.Py_ssize_t,
        size_bytes=cython.ulonglong, start=cython.Py_ssize_t, end=cython.Py_ssize_t, filled=cython.Py_ssize_t,
        max_write_bytes=cython.ulonglong, max_batch=cython.Py_ssize_t, cookies=cython.ulonglong[::1],
        offsets=cython.ulonglong[::1], lengths=cython.ulonglong[::1], starts=cython.longlong[::1],
        gathered=cython.Py_ssize_t, has_batch=cython.bint, magic=cython.uint, flags=cython.uint, command=cython.uint,
        cookie=cython.ulonglong, offset=cython.ulonglong, length=cython.ulonglong, used=cython.Py_ssize_t,
        there=cython.ulonglong,
    )
    cpdef serve(self)

    @cython.locals(
        rx=cython.uchar[::1], arena=cython.uchar[::1], places=cython.longlong[::1], unaligned=cython.ulonglong,
        size_bytes=cython.ulonglong, fd=cython.int, nowait=cython.int, max_count=cython.Py_ssize_t,
        max_bytes=cython.ulonglong, large_bytes=cython.ulonglong, page_bytes=cython.Py_ssize_t,
        chunk_magic=cython.uint, simple_magic=cython.uint, structured=cython.bint, header_bytes=cython.Py_ssize_t,
        cookies=cython.ulonglong[::1], sectors=cython.ulonglong[::1], lengths=cython.ulonglong[::1],
        room=cython.Py_ssize_t, at=cython.Py_ssize_t, count=cython.Py_ssize_t, is_large=cython.bint,
        magic=cython.uint, flags=cython.uint, command=cython.uint, cookie=cython.ulonglong, offset=cython.ulonglong,
        length=cython.ulonglong, used=cython.Py_ssize_t, late=list, index=cython.Py_ssize_t, place=cython.longlong,
        data_start=cython.Py_ssize_t, header_start=cython.Py_ssize_t, got=cython.ulonglong,
        has_batch=cython.bint, small_bytes=cython.ulonglong,
    )
    cdef tuple _read(self, Py_ssize_t start, Py_ssize_t end, Py_ssize_t filled)

    @cython.locals(
        reads=ReadBatch, arena=cython.uchar[::1], done=cython.ulonglong, fd=cython.int, nowait=cython.int,
        nbytes=cython.ulonglong, got=cython.ulonglong,
    )
    cdef unsigned long long _read_extents(
        self, unsigned long long offset, unsigned long long length, Py_ssize_t at) except? 1

    cdef _place(self, Py_ssize_t count)

    @cython.locals(
        quick=WriteBatch, arena=cython.uchar[::1], cookies=cython.ulonglong[::1], offsets=cython.ulonglong[::1],
        sizes=cython.ulonglong[::1], starts=cython.longlong[::1], sectors=cython.ulonglong[::1],
        lengths=cython.ulonglong[::1], places=cython.longlong[::1], simple_magic=cython.uint, is_written=cython.bint,
        index=cython.Py_ssize_t, late=list,
    )
    cdef Py_ssize_t _write(self, Py_ssize_t count, Py_ssize_t filled) except -1

    cpdef hand_over(self)

    cdef Py_ssize_t _use_again(self) except -1

    cdef _queue(self, Py_ssize_t end, Py_ssize_t start)
