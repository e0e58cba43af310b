# SPDX-License-Identifier: GPL-2.0-only
# C types for node.py, where it is compiled.

cimport cython
from cpython.array cimport array

from bcachectl.engine.search cimport bisect_right


cdef class Node:
    cdef public unsigned long long ptr, end, seq
    cdef public long bucket, level, nblocks, written, pending_words, used
    cdef public unsigned long long sector
    cdef public array ends, meta, ptrs, dead
    cdef public list children
    cdef public int bucket_shift
    cdef public object pin, dirty_ns, frozen, writing, gone

    @cython.locals(ends=array, metas=array, index=cython.Py_ssize_t, meta=cython.uint)
    cpdef bint overwrite_dirty(self, unsigned long long start, unsigned long long end, unsigned long long ptr)
