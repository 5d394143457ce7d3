// Blocks through a socket, straight from and to where they lie. Compiled for the plain target.
//
// What has just been received is digested while it is in the cache, and while the kernel receives
// what follows; so not much is taken at a time.

#pragma once

#include <errno.h>
#include <limits.h>
#include <poll.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <time.h>

#include "digest.h"

#ifndef MSG_NOSIGNAL
#define MSG_NOSIGNAL 0
#endif

namespace {

constexpr int kVectors = 64;
constexpr int64_t kReceiveBytes = 256 << 10, kSendBytes = 1 << 20;

inline int64_t least_of(int64_t a, int64_t b) { return a < b ? a : b; }

// 0, or why there is nothing to wait for any more.
int64_t wait_for(int fd, short events, int64_t deadline_ns) {
    timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    const int64_t left_ns = deadline_ns - (now.tv_sec * 1000000000ll + now.tv_nsec);
    if (left_ns <= 0) return ETIMEDOUT;
    pollfd polled = {fd, events, 0};
    // An interrupted or early one is no matter: the caller tries, and comes again.
    const int found = poll(&polled, 1, (int)least_of(left_ns / 1000000 + 1, INT_MAX));
    return found < 0 && errno != EINTR ? errno : 0;
}

bool is_over(int64_t deadline_ns) {
    timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return deadline_ns <= now.tv_sec * 1000000000ll + now.tv_nsec;
}

// Which pieces, from `done` bytes into the first on, go into one call of about `bytes`.
size_t gather(const Piece* pieces, int64_t count, int64_t done, int64_t bytes, iovec* vectors) {
    int n = 0;
    for (; n < count && n < kVectors && bytes > 0; n++, done = 0) {
        const int64_t size = least_of(pieces[n].bytes - done, bytes);
        vectors[n] = {pieces[n].at + done, (size_t)size};
        bytes -= size;
    }
    return (size_t)n;
}

}  // namespace

extern "C" int64_t baton_send(int fd, const Piece* pieces, int64_t count, int64_t deadline_ns) {
    iovec vectors[kVectors];
    int64_t done = 0;  // of the first piece
    while (count > 0) {
        if (is_over(deadline_ns)) return ETIMEDOUT;
        msghdr message = {};
        message.msg_iov = vectors;
        message.msg_iovlen = gather(pieces, count, done, kSendBytes, vectors);
        int64_t sent = sendmsg(fd, &message, MSG_DONTWAIT | MSG_NOSIGNAL);
        if (sent < 0) {
            if (errno == EINTR) continue;
            if (errno != EAGAIN && errno != EWOULDBLOCK) return errno;
            if (int64_t error = wait_for(fd, POLLOUT, deadline_ns)) return error;
            continue;
        }
        for (done += sent; count > 0 && done >= pieces->bytes; pieces++, count--)
            done -= pieces->bytes;
    }
    return 0;
}

extern "C" int64_t baton_receive(const Copier* copier, int fd, const Piece* pieces, int64_t count,
                                 int64_t deadline_ns, int32_t* low_water, uint8_t* digests,
                                 int64_t* num_full) {
    iovec vectors[kVectors];
    Partial partial = {};
    int64_t left = 0, done = 0;  // of all; of the first piece that is not full
    for (int64_t i = 0; i < count; i++) left += pieces[i].bytes;
    int64_t full = *num_full = 0;
    bool was_waiting = false;  // until the deadline, for more than had come
    while (full < count) {
        if (!was_waiting && is_over(deadline_ns)) return ETIMEDOUT;
        was_waiting = false;
        msghdr message = {};
        message.msg_iov = vectors;
        message.msg_iovlen = gather(pieces + full, count - full, done, kReceiveBytes, vectors);
        int64_t received = recvmsg(fd, &message, MSG_DONTWAIT);
        if (received < 0) {
            if (errno == EINTR) continue;
            if (errno != EAGAIN && errno != EWOULDBLOCK) return errno;
            // Woken for every packet, both ends would get in each other's way.
            const int32_t wanted = (int32_t)least_of(left, kReceiveBytes);
            if (wanted != *low_water) {
                if (setsockopt(fd, SOL_SOCKET, SO_RCVLOWAT, &wanted, sizeof wanted)) return errno;
                *low_water = wanted;
            }
            if (int64_t error = wait_for(fd, POLLIN, deadline_ns)) return error;
            was_waiting = is_over(deadline_ns);  // then what there is below the mark is taken
            continue;
        }
        if (received == 0) return ECONNRESET;
        left -= received;
        for (done += received; full < count;) {
            const Piece& piece = pieces[full];
            const int64_t here = least_of(done, piece.bytes);
            if (piece.bytes >= kShortest)
                copier->digest_some(&partial, piece.at, piece.bytes, here, digests + 16 * full);
            if (here < piece.bytes) break;
            done -= piece.bytes;
            *num_full = ++full;
        }
    }
    return 0;
}
