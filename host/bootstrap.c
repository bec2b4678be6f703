/* Nothing is trusted that comes from the network: a message has a fixed size, and every wait has an end. */
#define _POSIX_C_SOURCE 200809L /* sockets, clocks */
#include "host/bootstrap.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <netdb.h>
#include <netinet/in.h>
#include <poll.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
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
    VERSION = 1,
    SPARE_GUESTS = 64, /* connections beside those of ranks */
    QUEUE = 4096       /* who finds it full tries again after a second; systems take less */
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

static double seconds(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec + (double)now.tv_nsec * 1e-9;
}

static void put32(unsigned char *to, uint32_t value)
{
    for (int i = 0; i < 4; i++) to[i] = (unsigned char)(value >> (24 - 8 * i));
}

static uint32_t get32(const unsigned char *from)
{
    uint32_t value = 0;
    for (int i = 0; i < 4; i++) value = value << 8 | from[i];
    return value;
}

/* poll() until the deadline, but for a second at most; it may return without an event. */
static void wait_for(struct pollfd *sockets, nfds_t count, double deadline)
{
    const double left = deadline - seconds();
    const int milliseconds = left >= 1 ? 1000 : left > 0 ? (int)(left * 1000) + 1 : 0;
    if (poll(sockets, count, milliseconds) > 0) return;
    for (nfds_t i = 0; i < count; i++) sockets[i].revents = 0;
}

static bool prepare(int fd)
{
    return fcntl(fd, F_SETFL, O_NONBLOCK) == 0 && fcntl(fd, F_SETFD, FD_CLOEXEC) == 0;
}

/* A message is so short that a connection that has sent nothing yet takes it whole. */
static bool send_all(int fd, const void *data, size_t size)
{
    return send(fd, data, size, MSG_NOSIGNAL) == (ssize_t)size;
}

static bool try_again(int error)
{
    return error == EAGAIN || error == EWOULDBLOCK || error == EINTR;
}

/* ---- rank 0 ---- */

typedef struct guest {
    int fd;
    int32_t rank; /* -1: has not said hello */
    double came;
    size_t got;
    unsigned char hello[HELLO_SIZE];
} guest_t;

typedef struct host {
    const cumoe_meeting_t *meeting;
    size_t size; /* of the data */
    double deadline;
    int listener;
    int32_t num_guests, max_guests, missing;
    guest_t *guests;        /* [max_guests] */
    struct pollfd *sockets; /* [max_guests + 1], the listener first */
    bool *here;             /* [num_ranks] */
} host_t;

static int listen_to(sa_family_t family, int32_t port)
{
    const int fd = socket(family, SOCK_STREAM, 0), on = 1, off = 0;
    if (fd < 0) return -1;
    struct sockaddr_in6 six = {.sin6_family = AF_INET6, .sin6_port = htons((uint16_t)port)};
    struct sockaddr_in four = {.sin_family = AF_INET, .sin_port = htons((uint16_t)port)};
    const bool is_six = family == AF_INET6;
    if (is_six) (void)setsockopt(fd, IPPROTO_IPV6, IPV6_V6ONLY, &off, sizeof off);
    if (prepare(fd) && setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on) == 0 &&
        bind(fd, is_six ? (const struct sockaddr *)&six : (const struct sockaddr *)&four,
             is_six ? sizeof six : sizeof four) == 0 &&
        listen(fd, QUEUE) == 0)
        return fd;
    const int error = errno;
    close(fd);
    errno = error;
    return -1;
}

/* The guest is a rank no more. */
static void forget(host_t *host, guest_t *guest)
{
    if (guest->rank < 0) return;
    host->here[guest->rank] = false;
    host->missing++;
    guest->rank = -1;
}

static void dismiss(host_t *host, int32_t i)
{
    forget(host, &host->guests[i]);
    close(host->guests[i].fd);
    host->guests[i] = host->guests[--host->num_guests];
}

/* Room for one more: of those who have said nothing, the one that has been here longest goes. There is one, as
 * there are more places than ranks. */
static void make_room(host_t *host)
{
    int32_t oldest = -1;
    for (int32_t i = 0; i < host->num_guests; i++)
        if (host->guests[i].rank < 0 && (oldest < 0 || host->guests[i].came < host->guests[oldest].came))
            oldest = i;
    dismiss(host, oldest);
}

/* All who wait at the door; but not more at a time than there are places beside ranks, or one would be shown out
 * for the next before it has been heard. */
static void let_in(host_t *host)
{
    for (int i = 0; i < SPARE_GUESTS; i++) {
        const int fd = accept(host->listener, NULL, NULL);
        if (fd < 0) return;
        if (!prepare(fd)) {
            close(fd);
            continue;
        }
        if (host->num_guests == host->max_guests) make_room(host);
        host->guests[host->num_guests++] = (guest_t){.fd = fd, .rank = -1, .came = seconds()};
    }
}

/* Of a rank that has come, only that it is still there: it says nothing more. */
static bool stays(const guest_t *guest)
{
    char byte;
    const ssize_t got = recv(guest->fd, &byte, 1, MSG_PEEK);
    return got < 0 && try_again(errno);
}

/* Whether the rank is there. Who has left has no place any more: the next may be the same rank, started again. */
static bool is_taken(host_t *host, int32_t rank)
{
    for (int32_t i = 0; host->here[rank] && i < host->num_guests; i++)
        if (host->guests[i].rank == rank && !stays(&host->guests[i])) forget(host, &host->guests[i]);
    return host->here[rank];
}

/* VALUE: what rank 0 has. */
static verdict_t judge(host_t *host, const unsigned char *hello, uint32_t *value)
{
    const unsigned char *numbers = hello + MAGIC_SIZE;
    const uint32_t rank = get32(numbers + 4), num_ranks = (uint32_t)host->meeting->num_ranks;
    *value = VERSION;
    if (get32(numbers) != *value) return OTHER_VERSION;
    *value = num_ranks;
    if (get32(numbers + 8) != *value) return OTHER_NUM_RANKS;
    *value = (uint32_t)host->size;
    if (get32(numbers + 12) != *value) return OTHER_SIZE;
    *value = num_ranks;
    if (rank >= num_ranks) return NO_SUCH_RANK;
    *value = rank;
    return is_taken(host, (int32_t)rank) ? TAKEN : WELCOME;
}

static void make_reply(unsigned char *reply, verdict_t verdict, uint32_t value)
{
    memcpy(reply, MAGIC, MAGIC_SIZE);
    put32(reply + MAGIC_SIZE, verdict);
    put32(reply + MAGIC_SIZE + 4, value);
}

/* The guest stays if this gives true. */
static bool hear(host_t *host, guest_t *guest)
{
    if (guest->got == HELLO_SIZE) return false; /* was a rank, and has been forgotten */
    const ssize_t got = recv(guest->fd, guest->hello + guest->got, HELLO_SIZE - guest->got, 0);
    if (got < 0) return try_again(errno);
    if (got == 0) return false;
    guest->got += (size_t)got;
    if (memcmp(guest->hello, MAGIC, guest->got < MAGIC_SIZE ? guest->got : MAGIC_SIZE) != 0) return false;
    if (guest->got < HELLO_SIZE) return true;
    uint32_t value;
    const verdict_t verdict = judge(host, guest->hello, &value);
    if (verdict != WELCOME) {
        unsigned char reply[REPLY_SIZE];
        make_reply(reply, verdict, value);
        (void)send_all(guest->fd, reply, sizeof reply);
        return false;
    }
    guest->rank = (int32_t)value;
    host->here[value] = true;
    host->missing--;
    return true;
}

static void serve(host_t *host)
{
    host->sockets[0] = (struct pollfd){.fd = host->listener, .events = POLLIN};
    for (int32_t i = 0; i < host->num_guests; i++)
        host->sockets[1 + i] = (struct pollfd){.fd = host->guests[i].fd, .events = POLLIN};
    wait_for(host->sockets, 1 + (nfds_t)host->num_guests, host->deadline);
    const double now = seconds();
    for (int32_t i = host->num_guests - 1; i >= 0; i--) { /* the one that takes a place has been asked */
        guest_t *guest = &host->guests[i];
        const bool spoke = host->sockets[1 + i].revents != 0;
        const bool welcome = !spoke            ? guest->rank >= 0 || now - guest->came < PATIENCE
                             : guest->rank < 0 ? hear(host, guest)
                                               : stays(guest);
        if (!welcome) dismiss(host, i);
    }
    if (host->sockets[0].revents) let_in(host);
}

/* Whether every rank has come, and not left since. */
static bool is_complete(host_t *host)
{
    for (int32_t i = host->num_guests - 1; host->missing == 0 && i >= 0; i--)
        if (host->guests[i].rank >= 0 && !stays(&host->guests[i])) dismiss(host, i);
    return host->missing == 0;
}

static cumoe_status_t receive_all(host_t *host, const void *data)
{
    const cumoe_meeting_t *m = host->meeting;
    while (!is_complete(host)) {
        int32_t late = 0;
        while (host->here[late]) late++;
        CUMOE_REQUIRE(seconds() < host->deadline, COMM_ERROR,
                      "%s: rank 0 of %d: rank %d did not come to port %d within %g s", m->function, m->num_ranks,
                      late, m->port, m->timeout);
        serve(host);
    }
    /* Who comes from here on is refused, and so comes again: perhaps to the next group's meeting. */
    close(host->listener);
    host->listener = -1;
    unsigned char reply[REPLY_SIZE + MAX_DATA];
    make_reply(reply, WELCOME, 0);
    memcpy(reply + REPLY_SIZE, data, host->size);
    int32_t lost = -1;
    for (int32_t i = 0; i < host->num_guests; i++) {
        const guest_t *guest = &host->guests[i];
        if (guest->rank >= 0 && !send_all(guest->fd, reply, REPLY_SIZE + host->size)) lost = guest->rank;
    }
    CUMOE_REQUIRE(lost < 0, COMM_ERROR, "%s: rank 0 of %d: rank %d came and left", m->function, m->num_ranks, lost);
    return CUMOE_SUCCESS;
}

static const char *text_of(int error, char *text, size_t size)
{
    if (strerror_r(error, text, size) != 0) snprintf(text, size, "error %d", error);
    return text;
}

static cumoe_status_t open_host(host_t *host)
{
    const cumoe_meeting_t *m = host->meeting;
    host->guests = calloc((size_t)host->max_guests, sizeof *host->guests);
    host->sockets = calloc((size_t)host->max_guests + 1, sizeof *host->sockets);
    host->here = calloc((size_t)m->num_ranks, sizeof *host->here);
    CUMOE_REQUIRE(host->guests && host->sockets && host->here, OUT_OF_MEMORY, "%s: no host memory for %d ranks",
                  m->function, m->num_ranks);
    host->here[0] = true;
    host->listener = listen_to(AF_INET6, m->port); /* IPv4 as well */
    if (host->listener < 0) host->listener = listen_to(AF_INET, m->port);
    char text[80];
    CUMOE_REQUIRE(host->listener >= 0, COMM_ERROR,
                  "%s: rank 0 of %d cannot listen at port %d: %s. CUMOE_MASTER_PORT names another", m->function,
                  m->num_ranks, m->port, text_of(errno, text, sizeof text));
    return CUMOE_SUCCESS;
}

static cumoe_status_t be_host(const cumoe_meeting_t *meeting, const void *data, size_t size)
{
    host_t host = {.meeting = meeting,
                   .size = size,
                   .deadline = seconds() + meeting->timeout,
                   .listener = -1,
                   .max_guests = meeting->num_ranks + SPARE_GUESTS,
                   .missing = meeting->num_ranks - 1};
    cumoe_status_t status = open_host(&host);
    if (status == CUMOE_SUCCESS) status = receive_all(&host, data);
    for (int32_t i = 0; i < host.num_guests; i++) close(host.guests[i].fd);
    if (host.listener >= 0) close(host.listener);
    free(host.here);
    free(host.sockets);
    free(host.guests);
    return status;
}

/* ---- the others ---- */

typedef struct visit {
    const cumoe_meeting_t *meeting;
    size_t size;
    double deadline;
    const char *step; /* what failed last, and why: an error, or 0 = no rank 0 answers there */
    int error;
    size_t got;
    unsigned char reply[REPLY_SIZE + MAX_DATA];
} visit_t;

static bool fail_step(visit_t *visit, const char *step, int error)
{
    visit->step = step;
    visit->error = error;
    return false;
}

/* The time is over: what failed before says more. */
static bool run_out(visit_t *visit, const char *step)
{
    return visit->step ? false : fail_step(visit, step, ETIMEDOUT);
}

static double sooner(double a, double b)
{
    return a < b ? a : b;
}

/* A port at which nobody listens may be given to the one who connects to it. */
static bool is_oneself(int fd)
{
    struct sockaddr_storage here = {0}, there = {0};
    socklen_t here_size = sizeof here, there_size = sizeof there;
    return getsockname(fd, (struct sockaddr *)&here, &here_size) == 0 &&
           getpeername(fd, (struct sockaddr *)&there, &there_size) == 0 && here_size == there_size &&
           memcmp(&here, &there, here_size) == 0;
}

static bool reach(visit_t *visit, int fd, const struct addrinfo *address)
{
    const double deadline = sooner(visit->deadline, seconds() + PATIENCE);
    if (!prepare(fd)) return fail_step(visit, "fcntl", errno);
    int error = connect(fd, address->ai_addr, address->ai_addrlen) == 0 ? 0 : errno;
    if (error == EINPROGRESS || error == EINTR) {
        struct pollfd socket = {.fd = fd, .events = POLLOUT};
        while (!socket.revents && seconds() < deadline) wait_for(&socket, 1, deadline);
        if (!socket.revents) return run_out(visit, "connect");
        socklen_t size = sizeof error;
        if (getsockopt(fd, SOL_SOCKET, SO_ERROR, &error, &size) != 0) error = errno;
    }
    if (error == 0 && is_oneself(fd)) error = ECONNREFUSED;
    return error == 0 || fail_step(visit, "connect", error);
}

static bool say_hello(visit_t *visit, int fd)
{
    const uint32_t numbers[] = {VERSION, (uint32_t)visit->meeting->rank, (uint32_t)visit->meeting->num_ranks,
                                (uint32_t)visit->size};
    unsigned char hello[HELLO_SIZE];
    memcpy(hello, MAGIC, MAGIC_SIZE);
    for (int i = 0; i < 4; i++) put32(hello + MAGIC_SIZE + 4 * i, numbers[i]);
    return send_all(fd, hello, sizeof hello) || fail_step(visit, "send", errno);
}

/* Until the whole answer is there, which is when all ranks have come. */
static bool hear_reply(visit_t *visit, int fd)
{
    const size_t size = REPLY_SIZE + visit->size;
    visit->got = 0;
    while (visit->got < size) {
        if (seconds() >= visit->deadline) return run_out(visit, "recv");
        struct pollfd socket = {.fd = fd, .events = POLLIN};
        wait_for(&socket, 1, visit->deadline);
        if (!socket.revents) { /* rank 0, it seems: it waits for others */
            visit->step = NULL;
            continue;
        }
        const ssize_t got = recv(fd, visit->reply + visit->got, size - visit->got, 0);
        if (got < 0 && try_again(errno)) continue;
        if (got <= 0) return fail_step(visit, "recv", got < 0 ? errno : ECONNRESET);
        visit->got += (size_t)got;
        if (memcmp(visit->reply, MAGIC, visit->got < MAGIC_SIZE ? visit->got : MAGIC_SIZE) != 0)
            return fail_step(visit, "recv", 0);
        if (visit->got < REPLY_SIZE) continue;
        const uint32_t verdict = get32(visit->reply + MAGIC_SIZE);
        if (verdict >= NUM_VERDICTS) return fail_step(visit, "recv", 0);
        if (verdict != WELCOME) return true;
    }
    return true;
}

/* Whether rank 0 has answered. */
static bool visit_addresses(visit_t *visit, const struct addrinfo *address)
{
    for (bool answered = false; address; address = address->ai_next) {
        const int fd = socket(address->ai_family, SOCK_STREAM, 0), on = 1;
        if (fd < 0) {
            fail_step(visit, "socket", errno);
            continue;
        }
        /* Such a connection with oneself must not keep rank 0 from the port afterwards. */
        (void)setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
        answered = reach(visit, fd, address) && say_hello(visit, fd) && hear_reply(visit, fd);
        close(fd);
        if (answered) return true;
    }
    return false;
}

static cumoe_status_t accept_verdict(const visit_t *visit)
{
    static const char *const sentences[NUM_VERDICTS] = {
        [OTHER_VERSION] = "rank 0 speaks version %d, but this library 1: all ranks must have the same library",
        [OTHER_NUM_RANKS] = "rank 0 knows of %d ranks, but the number must be the same",
        [OTHER_SIZE] = "rank 0 has %d bytes to give, but another size is expected",
        [NO_SUCH_RANK] = "the rank must be below %d",
        [TAKEN] = "rank %d has come already, but every rank must be there once"};
    const cumoe_meeting_t *m = visit->meeting;
    const uint32_t verdict = get32(visit->reply + MAGIC_SIZE);
    char sentence[160] = "";
    if (verdict != WELCOME)
        snprintf(sentence, sizeof sentence, sentences[verdict], (int)get32(visit->reply + MAGIC_SIZE + 4));
    CUMOE_REQUIRE(verdict == WELCOME, COMM_ERROR, "%s: rank %d of %d: %s", m->function, m->rank, m->num_ranks,
                  sentence);
    return CUMOE_SUCCESS;
}

static cumoe_status_t be_guest(const cumoe_meeting_t *m, void *data, size_t size)
{
    visit_t visit = {.meeting = m, .size = size, .deadline = seconds() + m->timeout};
    char port[16], text[80];
    snprintf(port, sizeof port, "%d", m->port);
    for (bool answered = false; !answered;) {
        const struct addrinfo hints = {.ai_family = AF_UNSPEC, .ai_socktype = SOCK_STREAM};
        struct addrinfo *addresses = NULL;
        const int unknown = getaddrinfo(m->address, port, &hints, &addresses);
        answered = !unknown && visit_addresses(&visit, addresses);
        if (!unknown) freeaddrinfo(addresses);
        if (answered || seconds() < visit.deadline) {
            if (!answered) nanosleep(&(struct timespec){.tv_nsec = 20000000}, NULL); /* rank 0 is not there yet */
            continue;
        }
        const char *why = unknown       ? gai_strerror(unknown)
                          : visit.error ? text_of(visit.error, text, sizeof text)
                                        : "who answers is not rank 0";
        return cumoe__fail(CUMOE_COMM_ERROR,
                           "%s: rank %d of %d: no answer from rank 0 at %s, port %d, within %g s (%s: %s)",
                           m->function, m->rank, m->num_ranks, m->address, m->port, m->timeout,
                           unknown ? "getaddrinfo" : visit.step, why);
    }
    CUMOE_TRY(accept_verdict(&visit));
    memcpy(data, visit.reply + REPLY_SIZE, size);
    return CUMOE_SUCCESS;
}

cumoe_status_t cumoe__bootstrap(const cumoe_meeting_t *meeting, void *data, size_t size)
{
    CUMOE_REQUIRE(size <= MAX_DATA, INTERNAL_ERROR, "%s: %zu bytes for a meeting, but at most %d",
                  meeting->function, size, MAX_DATA);
    if (meeting->num_ranks == 1) return CUMOE_SUCCESS;
    return meeting->rank == 0 ? be_host(meeting, data, size) : be_guest(meeting, data, size);
}
