# SPDX-License-Identifier: GPL-2.0-only
# Compiled modules search the columns of a node without making a Python integer for every step.

from cpython.array cimport array


cdef inline Py_ssize_t bisect_right(array column, unsigned long long position):
    # As bisect.bisect_right, of an array of type Q.
    cdef Py_ssize_t low = 0, high = len(column), middle
    cdef unsigned long long *positions = column.data.as_ulonglongs
    while low < high:
        middle = (low + high) >> 1
        if position < positions[middle]:
            high = middle
        else:
            low = middle + 1
    return low
