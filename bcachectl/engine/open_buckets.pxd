# SPDX-License-Identifier: GPL-2.0-only
# C types for open_buckets.py, where it is compiled.

cimport cython


cdef class OpenBucket:
    cdef public unsigned long long ptr, position, sectors_free
    cdef public long long write_point
    cdef public bint flash


cdef class SectorAllocator:
    cdef object cset
    cdef int bucket_shift
    cdef unsigned long long bucket_sectors, block, max_sectors
    cdef int[::1] pin_at
    cdef unsigned char[::1] gen_at
    cdef dict lru, by_write_point
    cdef public dict by_position
    cdef public unsigned short[::1] near
    cdef public OpenBucket last_used
    cdef public unsigned long long sectors_written

    @cython.locals(found=OpenBucket, same=dict)
    cdef OpenBucket _pick(self, unsigned long long position, long long write_point, bint flash)

    @cython.locals(bucket=cython.longlong, shift=cython.int)
    cdef bint _open(self, OpenBucket open_bucket, reserve) except -1

    @cython.locals(ptr=cython.ulonglong)
    cdef unsigned long long _take(self, OpenBucket open_bucket, unsigned long long position, unsigned long long count,
                                  long long write_point, bint flash) except? 0

    @cython.locals(open_bucket=OpenBucket)
    cpdef took(self, unsigned long long position, unsigned long long nsectors)

    @cython.locals(open_bucket=OpenBucket)
    cpdef unsigned long long alloc_whole(self, unsigned long long position, unsigned long long nsectors,
                                         long long write_point) except? 0

    @cython.locals(
        by_position=dict, near=cython.ushort[::1], before=cython.ulonglong, near_mask=cython.ulonglong,
    )
    cdef _move(self, OpenBucket open_bucket, unsigned long long position)

    @cython.locals(lru=dict, by_write_point=dict, before=tuple, old=dict)
    cdef _reindex(self, OpenBucket open_bucket, unsigned long long position, long long write_point, bint flash)
