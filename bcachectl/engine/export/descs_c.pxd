# SPDX-License-Identifier: GPL-2.0-only
# The descriptors of a ublk device's tags for compiled modules: addresses, read without a Python object.

from cpython.array cimport array
from cpython.buffer cimport PyBUF_SIMPLE, PyBuffer_Release, PyObject_GetBuffer


cdef inline array kept_descs(list descs):
    # Whoever gives the views keeps what they show.
    cdef Py_buffer buffer
    kept = array("Q")
    for desc in descs:
        PyObject_GetBuffer(desc, &buffer, PyBUF_SIMPLE)
        kept.append(<unsigned long long>buffer.buf)
        PyBuffer_Release(&buffer)
    return kept


cdef inline unsigned long long *desc_of(array kept, Py_ssize_t number):
    return <unsigned long long *>kept.data.as_ulonglongs[number]
