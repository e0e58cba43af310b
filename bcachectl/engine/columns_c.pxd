# SPDX-License-Identifier: GPL-2.0-only
# What bcachectl/engine/columns.py says, for compiled modules: the memory of the columns, with no Python object for an
# item.

from cpython.array cimport array, resize_smart
from libc.string cimport memmove


cdef inline unsigned long long *u64s(array column):
    return column.data.as_ulonglongs


cdef inline unsigned int *u32s(array column):
    return column.data.as_uints


cdef inline int make_room(array column, Py_ssize_t first, Py_ssize_t last, Py_ssize_t count) except -1:
    cdef Py_ssize_t length = len(column), size = column.ob_descr.itemsize, grown = length + count - (last - first)
    assert 0 <= first <= last <= length and count >= 0
    if grown > length:
        resize_smart(column, grown)
    memmove(column.data.as_chars + (first + count) * size, column.data.as_chars + last * size, (length - last) * size)
    if grown < length:
        resize_smart(column, grown)
    return 0
