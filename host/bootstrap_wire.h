/* What both sides of a meeting share: the messages, and how to wait. Nothing is trusted that comes from the
 * network: a message has a fixed size, and every wait has an end. The file that includes this defines
 * _POSIX_C_SOURCE. */
#ifndef CUMOE_BOOTSTRAP_WIRE_H
#define CUMOE_BOOTSTRAP_WIRE_H

#include "host/bootstrap.h"

#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <poll.h>
#include <stdbool.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

/* Both messages are a magic word and numbers of 32 bits, the high byte first. Behind a welcome comes the data. */
enum {
    MAGIC_SIZE = 8,
    HELLO_SIZE = MAGIC_SIZE + 4 * 4, /* version, rank, num_ranks, size of the data */
    REPLY_SIZE = MAGIC_SIZE + 2 * 4, /* verdict, what rank 0 has in place of it */
    MAX_DATA = 1024,
    VERSION = 1
};
static const char MAGIC[MAGIC_SIZE] = {'c', 'u', 'm', 'o', 'e', '-', 'e', 'p'};

typedef enum verdict {
    WELCOME,
    OTHER_VERSION,
    OTHER_NUM_RANKS,
    OTHER_SIZE,
    NO_SUCH_RANK,
    TAKEN,
    NUM_VERDICTS
} verdict_t;

static const double PATIENCE = 10; /* seconds for a hello, or for a connection */

static inline double seconds(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec + (double)now.tv_nsec * 1e-9;
}

static inline void put32(unsigned char *to, uint32_t value)
{
    for (int i = 0; i < 4; i++) to[i] = (unsigned char)(value >> (24 - 8 * i));
}

static inline uint32_t get32(const unsigned char *from)
{
    uint32_t value = 0;
    for (int i = 0; i < 4; i++) value = value << 8 | from[i];
    return value;
}

/* poll() until the deadline, but for a second at most; it may return without an event. */
static inline void wait_for(struct pollfd *sockets, nfds_t count, double deadline)
{
    const double left = deadline - seconds();
    const int milliseconds = left >= 1 ? 1000 : left > 0 ? (int)(left * 1000) + 1 : 0;
    if (poll(sockets, count, milliseconds) > 0) return;
    for (nfds_t i = 0; i < count; i++) sockets[i].revents = 0;
}

static inline bool prepare(int fd)
{
    return fcntl(fd, F_SETFL, O_NONBLOCK) == 0 && fcntl(fd, F_SETFD, FD_CLOEXEC) == 0;
}

/* A message is so short that a connection that has sent nothing yet takes it whole. */
static inline bool send_all(int fd, const void *data, size_t size)
{
    return send(fd, data, size, MSG_NOSIGNAL) == (ssize_t)size;
}

static inline bool try_again(int error)
{
    return error == EAGAIN || error == EWOULDBLOCK || error == EINTR;
}

static inline const char *text_of(int error, char *text, size_t size)
{
    if (strerror_r(error, text, size) != 0) snprintf(text, size, "error %d", error);
    return text;
}

/* Rank 0's side: gives its data to all others. */
cumoe_status_t cumoe__bootstrap_host(const cumoe_meeting_t *meeting, const void *data, size_t size);

#endif
