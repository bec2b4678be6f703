/* The other ranks of a meeting: they knock at rank 0's port until they get its data, or the time is over. */
#define _POSIX_C_SOURCE 200809L /* sockets, clocks */
#include "host/bootstrap_wire.h"

#include <netdb.h>

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
    return meeting->rank == 0 ? cumoe__bootstrap_host(meeting, data, size) : be_guest(meeting, data, size);
}
