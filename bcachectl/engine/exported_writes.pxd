# SPDX-License-Identifier: GPL-2.0-only
# C types for exported_writes.py, where it is compiled.

from bcachectl.engine.write_batch cimport Placed


cdef class ExportedWrites:
    cdef public object dev

    cpdef Placed begin(self)

    cpdef bint written(self, Placed placed, long long duration_ns)

    cpdef failed(self, Placed placed, int error)

    cpdef lost(self, Placed placed)
