# SPDX-License-Identifier: GPL-2.0-only
# C types for ring.py, where it is compiled.

cimport cython

from bcachectl.engine.io.enter_c cimport enter_ring, enter_ring_for


cdef class Arrivals:
    cdef public unsigned int[::1] numbers
    cdef public int[::1] results
    cdef public Py_ssize_t count

    cpdef put(self, unsigned int number, int result)


cdef class Ring:
    cdef public int fd, entry_bytes
    cdef public unsigned int sq_entries, cq_entries, sq_mask, tail
    cdef public unsigned int[::1] sqe_u32, sq_array
    cdef public unsigned long long[::1] sqe_u64
    cdef public int[::1] sqe_i32
    cdef public list quick
    cdef public long quiet_reads
    cdef public bint is_alone
    cdef public long gathering
    cdef unsigned int _gather_count
    cdef long long _gather_ns
    cdef object _mmap, _sqes
    cdef unsigned int[::1] _u32
    cdef unsigned long long[::1] _cq_u64
    cdef int[::1] _cq_i32
    cdef Py_ssize_t _sq_head, _sq_tail, _cq_head, _cq_tail
    cdef unsigned int _cq_mask
    cdef list _arrivals
    cdef Py_ssize_t _shared_slots, _pushed, _next_slot
    cdef dict _given_back

    @cython.locals(tail=cython.uint)
    cpdef publish(self, Py_ssize_t slot)

    cpdef gather(self, unsigned int count, long long limit_ns)

    @cython.locals(unsent=cython.uint, sent=cython.long)
    cpdef enter(self, unsigned int min_complete=*)

    @cython.locals(unsent=cython.uint)
    cpdef hand_over(self)

    @cython.locals(unsent=cython.uint, sent=cython.long)
    cpdef wait(self, long long timeout_ns, unsigned int count=*)

    @cython.locals(
        head=cython.uint, tail=cython.uint, mask=cython.uint, index=cython.uint, data=cython.ulonglong,
        client=cython.longlong, quick_end=cython.longlong, last=cython.longlong, arrivals=Arrivals, found=dict,
        here=list, words=cython.uint[::1], user_data=cython.ulonglong[::1], results=cython.int[::1],
        client_shift=cython.int, word_mask=cython.uint,
    )
    cpdef dict take(self)

    @cython.locals(served=cython.bint, left=cython.bint)
    cpdef dict take_served(self)

    @cython.locals(began_ns=cython.longlong, left_ns=cython.longlong, spent_ns=cython.longlong, quiet=cython.long)
    cpdef dict serve(self, long long timeout_ns)
