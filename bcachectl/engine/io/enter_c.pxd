# SPDX-License-Identifier: GPL-2.0-only
# What bcachectl/engine/io/enter.py says, for compiled modules: the system call without Python objects, and without the
# lock of the interpreter.

from libc.errno cimport errno

cdef extern from "<unistd.h>" nogil:
    long syscall(long number, ...)

cdef extern from *:
    """
    struct bcachectl_timespec { long long seconds, nanoseconds; };
    struct bcachectl_getevents { unsigned long long mask; unsigned int mask_bytes, pad; unsigned long long timespec; };
    """
    struct bcachectl_timespec:
        long long seconds
        long long nanoseconds
    struct bcachectl_getevents:
        unsigned long long mask
        unsigned int mask_bytes
        unsigned int pad
        unsigned long long timespec


cdef inline long enter_ring(int fd, unsigned int to_submit, unsigned int min_complete, bint gets_events):
    cdef long sent
    with nogil:
        sent = syscall(426, fd, to_submit, min_complete, <unsigned int>gets_events, <void *>NULL, <size_t>0)
        if sent < 0:
            sent = -errno
    return sent


cdef inline long enter_ring_for(int fd, unsigned int to_submit, unsigned int min_complete, long long timeout_ns):
    cdef bcachectl_timespec timespec
    cdef bcachectl_getevents arguments
    cdef long sent
    timespec.seconds = timeout_ns // 1000000000
    timespec.nanoseconds = timeout_ns % 1000000000
    arguments.mask = 0
    arguments.mask_bytes = 0
    arguments.pad = 0
    arguments.timespec = <unsigned long long>&timespec
    with nogil:
        sent = syscall(426, fd, to_submit, min_complete, <unsigned int>(1 | 8), <void *>&arguments,
                       <size_t>sizeof(arguments))
        if sent < 0:
            sent = -errno
    return sent
