# SPDX-License-Identifier: GPL-2.0-only
# C types for ublk_reads.py, where it is compiled.

cimport cython


@cython.locals(
    read_number=cython.longlong, quiet_bytes=cython.uint, cancelled=cython.longlong, number=cython.longlong,
    result=cython.longlong, bucket=cython.Py_ssize_t, word=cython.ulonglong, ended=cython.long, quiet=cython.long,
    tags=list, reads=list, others=list, pins=cython.int[::1], words=cython.uint[::1],
)
cpdef sort_out(list completions, list descs, list read_buckets, pin_at, lengths, Py_ssize_t first_read)

@cython.locals(
    sqe_u64=cython.ulonglong[::1], sqe_u32=cython.uint[::1], sqe_i32=cython.int[::1], array=cython.uint[::1],
    pins=cython.int[::1], mask=cython.uint, tail=cython.uint, handed_over=cython.uint, quiet_bytes=cython.ulonglong,
    gathered=cython.uint, result_word=cython.Py_ssize_t, tags=list, reads=list, others=list, shift=cython.int,
    index=cython.Py_ssize_t, number=cython.Py_ssize_t, place=cython.longlong, bucket=cython.Py_ssize_t,
    length=cython.ulonglong, slot=cython.Py_ssize_t, quiet=cython.long,
)
cpdef long publish_reads(ring, landed, list places, list read_buckets, pin_at, int bucket_shift,
                         Py_ssize_t first_commit, Py_ssize_t first_read)
