# SPDX-License-Identifier: GPL-2.0-only
# Requests, replies and system calls of nbd_quick.py for compiled modules, without a Python object each.

from libc.string cimport memcpy
from posix.uio cimport iovec, preadv2, pwritev

cdef extern from "<endian.h>" nogil:
    unsigned short be16toh(unsigned short)
    unsigned int be32toh(unsigned int)
    unsigned long long be64toh(unsigned long long)
    unsigned short htobe16(unsigned short)
    unsigned int htobe32(unsigned int)
    unsigned long long htobe64(unsigned long long)

cdef enum:
    RUN = 64


cdef inline unsigned int u32_at(const unsigned char *where) noexcept nogil:
    cdef unsigned int word
    memcpy(&word, where, 4)
    return be32toh(word)


cdef inline unsigned short u16_at(const unsigned char *where) noexcept nogil:
    cdef unsigned short word
    memcpy(&word, where, 2)
    return be16toh(word)


cdef inline unsigned long long u64_at(const unsigned char *where) noexcept nogil:
    cdef unsigned long long word
    memcpy(&word, where, 8)
    return be64toh(word)


cdef inline (unsigned int, unsigned int, unsigned int, unsigned long long, unsigned long long, unsigned long long) \
        request_at(unsigned char[::1] rx, Py_ssize_t at):
    # magic, flags, command, cookie, offset, length: there are 28 bytes at ``at``.
    cdef const unsigned char *where = &rx[at]
    return (u32_at(where), u16_at(where + 4), u16_at(where + 6), u64_at(where + 8), u64_at(where + 16),
            u32_at(where + 24))


cdef inline void put_u32(unsigned char *where, unsigned int word) noexcept nogil:
    word = htobe32(word)
    memcpy(where, &word, 4)


cdef inline void put_u64(unsigned char *where, unsigned long long word) noexcept nogil:
    word = htobe64(word)
    memcpy(where, &word, 8)


cdef inline int put_simple(unsigned char[::1] arena, Py_ssize_t at, unsigned int magic, unsigned int error,
                           unsigned long long cookie) except -1:
    cdef unsigned char *where = &arena[at]
    put_u32(where, magic)
    put_u32(where + 4, error)
    put_u64(where + 8, cookie)
    return 0


cdef inline int put_chunk(unsigned char[::1] arena, Py_ssize_t at, unsigned int magic, unsigned short flags,
                          unsigned short kind, unsigned long long cookie, unsigned int length,
                          unsigned long long offset) except -1:
    cdef unsigned char *where = &arena[at]
    put_u32(where, magic)
    put_u32(where + 4, (<unsigned int>flags) << 16 | kind)
    put_u64(where + 8, cookie)
    put_u32(where + 16, length)
    put_u64(where + 20, offset)
    return 0


cdef inline Py_ssize_t read_at(int fd, unsigned char[::1] arena, Py_ssize_t at, Py_ssize_t length, long long place,
                               int flags) except? -1:
    cdef iovec part
    cdef Py_ssize_t got
    assert 0 <= at and at + length <= arena.shape[0], "a reply lies in the arena"
    part.iov_base = &arena[at]
    part.iov_len = length
    with nogil:
        got = preadv2(fd, &part, 1, place, flags)
    return got


cdef inline bint write_run(int fd, iovec *parts, int count, long long place, long long nbytes) noexcept:
    cdef long long written
    if not count:
        return True
    with nogil:
        written = pwritev(fd, parts, count, place)
    return written == nbytes


cdef inline bint write_places(int fd, unsigned char[::1] rx, long long[::1] places, long long[::1] starts,
                              unsigned long long[::1] lengths, Py_ssize_t count) except? False:
    cdef iovec parts[RUN]
    cdef int gathered = 0
    cdef long long first = -1, end = -1, place, length
    cdef Py_ssize_t index
    for index in range(count):
        place, length = places[index], <long long>(lengths[index] << 9)
        if place < 0:
            continue
        if place != end or gathered == RUN:
            if not write_run(fd, parts, gathered, first, end - first):
                return False
            gathered, first = 0, place
        assert 0 <= starts[index] and starts[index] + length <= rx.shape[0], "a payload lies in the receive buffer"
        parts[gathered].iov_base = &rx[starts[index]]
        parts[gathered].iov_len = <size_t>length
        gathered += 1
        end = place + length
    return write_run(fd, parts, gathered, first, end - first)
