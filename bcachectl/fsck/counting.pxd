# SPDX-License-Identifier: GPL-2.0-only
# C types for counting.py, where it is compiled.

cimport cython

from bcachectl.fsck.fill_c cimport crc_words, fill_words
from bcachectl.fsck.scan cimport DOUBTFUL, GOOD, Scan, add_spread, word


cdef int _STAGED_WORDS, _SEED, _SETS, _MARKS_END, _DOUBTFUL_BLOCK
cdef word _ALL_BITS, _LOW_HALF


cdef class CountingScan(Scan):
    cdef word magic, version, in_block
    cdef int block_shift, is_begun
    cdef Py_ssize_t block_words, node_blocks, all_spreads_max
    cdef word[::1] piece_words, staged_words, head_words
    cdef size_t crc
    cdef readonly bint can_check
    cdef Py_ssize_t leaf_words, staged_size, last_doubtful
    cdef readonly list buffers
    cdef readonly bint can_count, is_unsure
    cdef readonly object claims
    cdef word[::1] claim_words, late, all_spread_words
    cdef readonly Py_ssize_t nlate
    cdef Py_ssize_t late_max, nall_spreads
    cdef readonly word all_extents, all_dirty_sectors, all_sectors

    @cython.locals(nleaves=cython.Py_ssize_t)
    cpdef list read_and_count(self, int fd, list leaves)

    @cython.locals(staged=object, size=cython.Py_ssize_t, nleaves=cython.Py_ssize_t, number=cython.Py_ssize_t, at=cython.Py_ssize_t)
    cpdef list stage(self, int fd, list leaves)

    cpdef Py_ssize_t doubtful_block(self, Py_ssize_t number)

    cpdef drop(self, Py_ssize_t number)

    cpdef list count(self, Py_ssize_t nleaves)

    @cython.locals(staged=cython.ulonglong[::1], words=cython.ulonglong[::1], claims=cython.ulonglong[::1],
                   number=cython.Py_ssize_t, at=cython.Py_ssize_t, index=cython.Py_ssize_t)
    cdef int _read_and_count(self, int fd, Py_ssize_t nleaves) except -2 nogil

    @cython.locals(index=cython.Py_ssize_t, at=cython.Py_ssize_t, length=cython.Py_ssize_t, version=cython.ulonglong,
                   begun=cython.ulonglong)
    cdef int _is_sound(self, const word[::1] words, word seed) except -2 nogil

    @cython.locals(done=cython.int)
    cdef int _add_leaf(self, const word[::1] words, Py_ssize_t at) except -2 nogil

    @cython.locals(staged=cython.ulonglong[::1], log_words=cython.ulonglong[::1],
                   number=cython.Py_ssize_t, at=cython.Py_ssize_t, first=cython.Py_ssize_t, index=cython.Py_ssize_t,
                   nsets=cython.Py_ssize_t)
    cdef int _stage(self, int fd, Py_ssize_t nleaves) except -2 nogil

    @cython.locals(staged=cython.ulonglong[::1], log_words=cython.ulonglong[::1],
                   number=cython.Py_ssize_t, at=cython.Py_ssize_t, first=cython.Py_ssize_t, index=cython.Py_ssize_t)
    cdef int _piece(self, Py_ssize_t nleaves) except -2 nogil

    @cython.locals(count=cython.Py_ssize_t, block=cython.Py_ssize_t, block_words=cython.Py_ssize_t,
                   node_blocks=cython.Py_ssize_t, seq=cython.ulonglong, at=cython.Py_ssize_t,
                   length=cython.Py_ssize_t, blocks=cython.Py_ssize_t)
    cdef Py_ssize_t _log(self, const word[::1] words) except -2 nogil

    @cython.locals(index=cython.Py_ssize_t)
    cdef int _keep(self) except -2 nogil

    @cython.locals(taken=cython.ulonglong[::1], claims=cython.ulonglong[::1], block_shift=cython.int, block_sectors=cython.ulonglong,
                   in_block=cython.ulonglong, one=cython.ulonglong, is_twice=cython.ulonglong, index=cython.Py_ssize_t,
                   sector=cython.ulonglong, length=cython.ulonglong, block=cython.ulonglong, bit=cython.ulonglong)
    cdef int _claim_taken(self) except -2 nogil

    @cython.locals(claims=cython.ulonglong[::1], block=cython.ulonglong, last=cython.ulonglong, first=cython.ulonglong,
                   count=cython.ulonglong, bits=cython.ulonglong)
    cdef int _claim(self, word sector, word length) except -2 nogil

    @cython.locals(late=cython.ulonglong[::1], index=cython.Py_ssize_t, head=cython.ulonglong, tail=cython.ulonglong,
                   length=cython.ulonglong, behind=cython.ulonglong)
    cdef int _judge_late(self) except -2 nogil
