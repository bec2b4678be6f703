/* Rank 0 of a meeting: it listens, hears who comes, and when all ranks are there it gives them its data. */
#define _POSIX_C_SOURCE 200809L /* sockets, clocks */
#include "host/bootstrap_wire.h"

#include <stdlib.h>

enum {
    SPARE_GUESTS = 64, /* connections beside those of ranks */
    QUEUE = 4096       /* who finds it full tries again after a second; systems take less */
};

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

cumoe_status_t cumoe__bootstrap_host(const cumoe_meeting_t *meeting, const void *data, size_t size)
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
