# SPDX-License-Identifier: GPL-2.0-only
# What bcachectl/fsck/fill.py says, for compiled modules: without Python objects, and without the lock of the interpreter.

from libc.errno cimport EINTR, errno

cdef extern from "<unistd.h>" nogil:
    ssize_t pread(int fd, void *buf, size_t nbytes, long long offset)


cdef inline bint fill_words(int fd, unsigned long long[::1] words, long long offset_bytes) noexcept nogil:
    cdef char *buf = <char *>&words[0]
    cdef size_t size = words.shape[0] * sizeof(unsigned long long), done = 0
    cdef ssize_t got
    while done < size:
        got = pread(fd, buf + done, size - done, offset_bytes + <long long>done)
        if got > 0:
            done += <size_t>got
        elif got == 0 or errno != EINTR:
            return False
    return True


ctypedef unsigned long long (*crc_function)(unsigned long long, const void *, unsigned long long) noexcept nogil


cdef inline unsigned long long crc_words(size_t function, const unsigned long long[::1] words, Py_ssize_t first,
                                         Py_ssize_t end, unsigned long long previous) noexcept nogil:
    return (<crc_function>function)(previous, &words[first], (end - first) * sizeof(unsigned long long))
