# SPDX-License-Identifier: GPL-2.0-only
# C types for node.py, where it is compiled.

cimport cython
from cpython.array cimport array

from bcachectl.engine.columns_c cimport make_room, u32s, u64s
from bcachectl.engine.search cimport bisect_right


cdef class Node:
    cdef public unsigned long long ptr, end, seq
    cdef public long bucket, level, nblocks, written, pending_words, used
    cdef public unsigned long long sector
    cdef public array ends, meta, ptrs, dead
    cdef public list children
    cdef public int bucket_shift
    cdef public object pin, dirty_ns, frozen, writing, gone

    @cython.locals(
        size_mask=cython.uint, dirty=cython.uint, has_ptr=cython.uint, is_pending=cython.uint, all_flags=cython.uint,
        max_size=cython.ulonglong, ends=array, metas=array, ptrs=array, size=cython.ulonglong, first=cython.Py_ssize_t,
        last=cython.Py_ssize_t, count=cython.Py_ssize_t, sectors=cython.ulonglong, has_head=cython.bint,
        has_tail=cython.bint, head_meta=cython.uint, head_ptr=cython.ulonglong, tail_end=cython.ulonglong,
        tail_meta=cython.uint, tail_ptr=cython.ulonglong, end_at=cython.p_ulonglong, meta_at=cython.p_uint,
        ptr_at=cython.p_ulonglong, old_end=cython.ulonglong, meta=cython.uint, old_start=cython.ulonglong,
        low=cython.ulonglong, high=cython.ulonglong, before=cython.ulonglong, pieces=cython.Py_ssize_t,
    )
    cpdef unsigned long long insert_range(self, unsigned long long start, unsigned long long end, unsigned int flags,
                                          unsigned long long ptr, unsigned int pending, list overwritten)

    @cython.locals(
        ends=array, index=cython.Py_ssize_t, meta=cython.uint, meta_at=cython.p_uint, all_flags=cython.uint,
        pending=cython.uint, size_mask=cython.uint, count=cython.Py_ssize_t,
    )
    cpdef bint overwrite_dirty(self, unsigned long long start, unsigned long long end, unsigned long long ptr)

    @cython.locals(header_bytes=cython.long, slack_words=cython.long, block_bytes=cython.long, set_bytes=cython.long)
    cpdef bint has_room(self, long words, geometry)

    @cython.locals(header_bytes=cython.long)
    cpdef bint is_settled(self, unsigned long long seq, long write_bytes)
