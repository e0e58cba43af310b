# SPDX-License-Identifier: GPL-2.0-only
# C types for ublk_writes.py, where it is compiled.

cimport cython
from cpython.array cimport array

from bcachectl.engine.export.descs_c cimport desc_of, kept_descs
from bcachectl.engine.exported_writes cimport ExportedWrites
from bcachectl.engine.io.ring cimport Ring
from bcachectl.engine.write_batch cimport Placed, WriteBatch


cdef class Group:
    cdef public UblkWrites writes
    cdef public list numbers
    cdef public Placed placed

    cpdef answered(self, request)


cdef class UblkWrites:
    cdef public Ring ring
    cdef public WriteBatch batch
    cdef public ExportedWrites exported
    cdef public object owner, sched
    cdef public Group group
    cdef public Py_ssize_t waiting, runs
    cdef public int error
    cdef public bint is_due, is_open, is_written, is_gathering
    cdef public Py_ssize_t awaited
    cdef array descs
    cdef Py_ssize_t first_write, first_commit
    cdef unsigned long long buffer_address, buffer_bytes, vectors_address
    cdef long stream
    cdef unsigned int[::1] tags
    cdef unsigned long long[::1] vectors
    cdef long long[::1] expected
    cdef public long long until_ns, held_ns
    cdef long long began_ns

    cpdef add(self, unsigned int number)

    @cython.locals(left_ns=cython.longlong)
    cpdef bint may_start(self)

    cdef _gathered(self)

    @cython.locals(
        batch=WriteBatch, tags=cython.uint[::1], descs=array, count=cython.Py_ssize_t, sectors=cython.ulonglong[::1],
        lengths=cython.ulonglong[::1], places=cython.longlong[::1], index=cython.Py_ssize_t, numbers=list, soon=cython.longlong, kept=cython.Py_ssize_t,
        now_ns=cython.longlong, may_hold=cython.bint,
    )
    cpdef start(self, list declined)

    @cython.locals(
        ring=Ring, ptrs=cython.ulonglong[::1], lengths=cython.ulonglong[::1], vectors=cython.ulonglong[::1],
        expected=cython.longlong[::1], sqe_u64=cython.ulonglong[::1], sqe_u32=cython.uint[::1],
        count=cython.Py_ssize_t, first=cython.Py_ssize_t, nbytes=cython.longlong, slot=cython.Py_ssize_t,
        next_ptr=cython.ulonglong, index=cython.Py_ssize_t, number=cython.ulonglong, length=cython.ulonglong,
    )
    cdef _publish(self, list numbers, Placed placed)

    cpdef landed(self, Py_ssize_t number, int result)

    cpdef finish(self, list declined)

    @cython.locals(placed=Placed, group=Group, exported=ExportedWrites)
    cpdef conclude(self)

    cpdef bint wants_turn(self)

    @cython.locals(
        ring=Ring, descs=array, first_commit=cython.Py_ssize_t, result_word=cython.Py_ssize_t, sqe_i32=cython.int[::1],
        index=cython.Py_ssize_t, number=cython.Py_ssize_t, slot=cython.Py_ssize_t,
    )
    cdef _commit(self, list numbers)

    @cython.locals(now_ns=cython.longlong)
    cpdef answer(self, list numbers, int error)

    cpdef forget(self)
