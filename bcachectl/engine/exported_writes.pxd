# SPDX-License-Identifier: GPL-2.0-only
# C types for exported_writes.py, where it is compiled.

cimport cython

from bcachectl.engine.write_batch cimport Placed, WriteBatch


cdef class ExportedWrites:
    cdef public object dev

    cpdef Placed begin(self)

    @cython.locals(batch=WriteBatch)
    cpdef bint written(self, Placed placed, long long duration_ns)

    cpdef failed(self, Placed placed, int error)

    cpdef lost(self, Placed placed)
