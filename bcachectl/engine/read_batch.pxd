# SPDX-License-Identifier: GPL-2.0-only
# C types for read_batch.py, where it is compiled.

cimport cython
from cpython.array cimport array

from bcachectl.engine.search cimport bisect_right


@cython.locals(
    base=cython.ulonglong, sector=cython.ulonglong, nsectors=cython.ulonglong, start=cython.ulonglong,
    end=cython.ulonglong, ptr=cython.ulonglong, at=cython.ulonglong, offset=cython.longlong, meta=cython.uint,
    shift=cython.int, index=cython.Py_ssize_t, bucket=cython.Py_ssize_t, ends=array, places=list, hits=list,
    size_mask=cython.uint, has_ptr=cython.uint, sector_mask=cython.ulonglong, initial_prio=cython.ushort,
    gen_at=cython.uchar[::1], prio_at=cython.ushort[::1],
)
cpdef list place_reads(dev, list reads)

@cython.locals(
    count=cython.longlong, nsectors=cython.longlong, passed=cython.longlong, passed_sectors=cython.longlong,
    cutoff_bytes=cython.longlong,
)
cdef _count(dev, list hits)

@cython.locals(
    recent=dict, since_ns=cython.longlong, count=cython.longlong, sectors=cython.longlong, run=cython.longlong,
    average=cython.longlong, sector=cython.longlong, nsectors=cython.longlong, start=cython.longlong,
    nbytes=cython.longlong, found=tuple,
)
cpdef tuple _note_all(streams, list hits, long long data_offset, long long cutoff_bytes, long long now_ns)
