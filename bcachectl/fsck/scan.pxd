# SPDX-License-Identifier: GPL-2.0-only
# C types for scan.py, where it is compiled.

cimport cython

ctypedef unsigned long long word


cdef int GOOD, DOUBTFUL, OTHER_FORM


cdef class Scan:
    cdef unsigned char[::1] gens
    cdef const word[::1] journal
    cdef word[::1] rows, others, cuts, odd, spread_words, taken_words, mark_words, log_words
    cdef readonly word node_sectors
    cdef word in_bucket, bucket_end, ptr_min, ptr_limit, gen_max, behind_max, form, fixed
    cdef word place_start, place_end
    cdef int shift
    cdef int is_leaf, is_counting
    cdef Py_ssize_t journal_rows_max, spreads_max
    cdef Py_ssize_t first_mark
    cdef Py_ssize_t journal_rows, nsets, nodd, ncuts, nspreads, ntaken, nmarks
    cdef readonly word extents, dirty_sectors, sectors

    @cython.locals(log_words=object, index=cython.Py_ssize_t, done=cython.int)
    cpdef bint leaf(self, const word[::1] words, list log, word start, word end) except -1

    @cython.locals(done=cython.int)
    cdef int _leaf(self, const word[::1] words, word start, word end) except -2 nogil

    @cython.locals(index=cython.Py_ssize_t, at=cython.Py_ssize_t, count=cython.Py_ssize_t, over=cython.Py_ssize_t,
                   done=cython.int)
    cdef int _in_form(self, const word[::1] words, word start, word end, int has_base) except -2 nogil

    cdef Py_ssize_t _over(self, Py_ssize_t over, Py_ssize_t count) except -2 nogil

    @cython.locals(start=cython.ulonglong, end=cython.ulonglong,
                   low=cython.Py_ssize_t, high=cython.Py_ssize_t, middle=cython.Py_ssize_t, count=cython.Py_ssize_t,
                   first=cython.ulonglong, last=cython.ulonglong, ptr=cython.ulonglong, kind=cython.ulonglong)
    cdef Py_ssize_t _with_journal(self) except -2 nogil

    @cython.locals(previous=cython.ulonglong, last_end=cython.ulonglong, count=cython.Py_ssize_t, high=cython.ulonglong,
                   low=cython.ulonglong, nptrs=cython.Py_ssize_t, size=cython.ulonglong, inode=cython.ulonglong,
                   pos=cython.ulonglong, ptr=cython.ulonglong, kind=cython.ulonglong)
    cdef Py_ssize_t _decode(self, const word[::1] words, Py_ssize_t at, Py_ssize_t stop, word[::1] rows) except -2 nogil

    @cython.locals(behind=cython.ulonglong)
    cdef int _judge(self, word ptr) except -2 nogil

    @cython.locals(rows=cython.ulonglong[::1], taken=cython.ulonglong[::1], gens=cython.uchar[::1],
                   shift=cython.int, form=cython.ulonglong, fixed=cython.ulonglong, ptr_min=cython.ulonglong,
                   ptr_limit=cython.ulonglong, in_bucket=cython.ulonglong, bucket_end=cython.ulonglong,
                   inode=cython.ulonglong, offset=cython.ulonglong, last=cython.ulonglong, row=cython.Py_ssize_t,
                   untouched_end=cython.ulonglong, head=cython.ulonglong, tail=cython.ulonglong,
                   ntaken=cython.Py_ssize_t, seen=cython.ulonglong, extents=cython.ulonglong,
                   sectors=cython.ulonglong, dirty_sectors=cython.ulonglong, dirty_start=cython.ulonglong,
                   dirty_end=cython.ulonglong, high=cython.ulonglong, low=cython.ulonglong, ptr=cython.ulonglong,
                   size=cython.ulonglong, dirty=cython.ulonglong, pos=cython.ulonglong)
    cdef int _base(self, const word[::1] words, Py_ssize_t at, Py_ssize_t stop, Py_ssize_t count) except -2 nogil

    @cython.locals(high=cython.ulonglong, ptr=cython.ulonglong)
    cdef int _find_evidence(self, const word[::1] words, Py_ssize_t at, Py_ssize_t stop) except -2 nogil

    @cython.locals(rows=cython.ulonglong[::1], at=cython.ulonglong)
    cdef int _cut(self, word start, word end, word ptr, word dirty, Py_ssize_t row, Py_ssize_t count) except -2 nogil

    @cython.locals(odd=cython.ulonglong[::1], at=cython.Py_ssize_t)
    cdef int _postpone(self, word head, word tail, word what) except -2 nogil

    @cython.locals(odd=cython.ulonglong[::1], index=cython.Py_ssize_t, head=cython.ulonglong, tail=cython.ulonglong,
                   length=cython.ulonglong, behind=cython.ulonglong)
    cdef int _settle(self) except -2 nogil

    @cython.locals(index=cython.Py_ssize_t)
    cdef int _judge_odd(self) except -2 nogil

    @cython.locals(index=cython.Py_ssize_t, kind=cython.ulonglong, start=cython.ulonglong, end=cython.ulonglong,
                   ptr=cython.ulonglong, behind=cython.ulonglong)
    cdef int _count(self, word[::1] rows, Py_ssize_t count) except -2 nogil

    @cython.locals(count=cython.Py_ssize_t)
    cdef int _note(self, word inode, word sectors, word start, word end) except -2 nogil


@cython.locals(at=cython.Py_ssize_t)
cdef Py_ssize_t add_spread(word[::1] words, Py_ssize_t count, Py_ssize_t limit, word inode, word sectors, word start,
                           word end) except -2 nogil

@cython.locals(at=cython.Py_ssize_t)
cdef Py_ssize_t _put(word[::1] rows, Py_ssize_t count, word start, word end, word ptr, word kind) except -2 nogil

@cython.locals(count=cython.Py_ssize_t, row=cython.Py_ssize_t, index=cython.Py_ssize_t, start=cython.ulonglong,
               end=cython.ulonglong, ptr=cython.ulonglong, kind=cython.ulonglong, at=cython.ulonglong,
               first=cython.ulonglong, last=cython.ulonglong)
cdef Py_ssize_t _lay(word[::1] under, Py_ssize_t nunder, word[::1] over, Py_ssize_t nover, word[::1] out) except -2 nogil
