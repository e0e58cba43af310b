# SPDX-License-Identifier: GPL-2.0-only
# C types for completions.py, where it is compiled.

cimport cython


@cython.locals(
    found=dict, here=list, head=cython.uint, tail=cython.uint, last=cython.longlong, index=cython.uint,
    data=cython.ulonglong, client=cython.longlong,
)
cpdef dict take_completions(cython.uint[::1] words, cython.ulonglong[::1] user_data, cython.int[::1] results,
                            Py_ssize_t head_at, Py_ssize_t tail_at, cython.uint mask)
