/* Ranks as processes that meet over TCP, and what comes to the port beside them. */
#define _GNU_SOURCE /* unshare() */
#include "host/bootstrap.h"
#include "tests/suite.h"

#include <fcntl.h>
#include <net/if.h>
#include <netinet/in.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/ioctl.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

enum { SIZE = 128, HELLO = 24, REPLY = 16 };
static const double LONG = 10; /* seconds: how slow the machine may be */
static const char F[] = "cumoe_ep_create";

static double now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

/* A socket of this machine: connected to the port, or listening at it (0 = any). -1: that does not go. */
static int open_socket(int32_t port, bool listens)
{
    const int fd = socket(AF_INET, SOCK_STREAM, 0), on = 1;
    const struct sockaddr_in address = {
        .sin_family = AF_INET, .sin_port = htons((uint16_t)port), .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    const struct timeval patience = {.tv_sec = (time_t)LONG};
    setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
    setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof patience);
    if (listens ? bind(fd, (const struct sockaddr *)&address, sizeof address) == 0 && listen(fd, 16) == 0
                : connect(fd, (const struct sockaddr *)&address, sizeof address) == 0)
        return fd;
    close(fd);
    return -1;
}

/* A port that is this test's alone: the socket stays, without listening, which keeps others from it. */
static int32_t free_port(void)
{
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    socklen_t size = sizeof address;
    const int fd = socket(AF_INET, SOCK_STREAM, 0), on = 1;
    cr_assert(fd >= 0 && setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on) == 0);
    cr_assert(bind(fd, (const struct sockaddr *)&address, size) == 0);
    cr_assert(getsockname(fd, (struct sockaddr *)&address, &size) == 0);
    return ntohs(address.sin_port);
}

/* As soon as somebody listens. */
static int visit(int32_t port)
{
    int fd;
    for (const double begin = now(); (fd = open_socket(port, false)) < 0; usleep(2000))
        cr_assert(now() - begin < LONG, "nobody listens");
    return fd;
}

/* A child that ends when the test does. */
static pid_t fork_child(void)
{
    const pid_t child = fork();
    cr_assert(child >= 0, "no process to be had");
    if (child == 0) prctl(PR_SET_PDEATHSIG, SIGKILL);
    return child;
}

static cumoe_meeting_t meeting_at(int32_t port, int32_t rank, int32_t num_ranks)
{
    return (cumoe_meeting_t){
        .function = F, .address = "127.0.0.1", .port = port, .rank = rank, .num_ranks = num_ranks, .timeout = LONG};
}

/* Whether a rank gets what is EXPECTED: rank 0's bytes, or a sentence with that in it, and all bytes as they were.
 */
static bool meet(const cumoe_meeting_t *meeting, const char *expected)
{
    unsigned char data[SIZE], right[SIZE];
    for (int i = 0; i < SIZE; i++) {
        right[i] = (unsigned char)(i * 7);
        data[i] = meeting->rank == 0 ? right[i] : 99;
        if (expected) right[i] = data[i];
    }
    const cumoe_status_t status = cumoe__bootstrap(meeting, data, SIZE);
    const bool same = memcmp(data, right, SIZE) == 0;
    if (!expected && status == CUMOE_SUCCESS && same) return true;
    const char *sentence = cumoe_last_error();
    if (expected && status == CUMOE_COMM_ERROR && same && strstr(sentence, expected) &&
        strncmp(sentence, F, strlen(F)) == 0)
        return true;
    fprintf(stderr, "rank %d: %s: %s, expected %s\n", meeting->rank, cumoe_status_name(status), sentence,
            expected ? expected : "success");
    return false;
}

/* meet() in a process of its own, after so many milliseconds. */
static pid_t start(const cumoe_meeting_t *meeting, int delay, const char *expected)
{
    const pid_t child = fork_child();
    if (child != 0) return child;
    usleep((useconds_t)delay * 1000);
    _exit(meet(meeting, expected) ? 0 : 1);
}

static void finish(pid_t child)
{
    int result = -1;
    cr_expect_eq(waitpid(child, &result, 0), child);
    cr_expect_eq(result, 0);
}

Test(bootstrap, all_meet)
{
    static const char *const addresses[] = {"127.0.0.1", "localhost", "::1"};
    const int six = socket(AF_INET6, SOCK_STREAM, 0);
    const struct sockaddr_in6 loopback = {.sin6_family = AF_INET6, .sin6_addr = IN6ADDR_LOOPBACK_INIT};
    const bool has_six = six >= 0 && bind(six, (const struct sockaddr *)&loopback, sizeof loopback) == 0;
    close(six);
    for (int turn = 0; turn < 12; turn++) {
        const int32_t W = 1 + turn % 4 * 3, port = free_port();
        if (turn % 3 == 2 && !has_six) continue;
        pid_t children[16];
        for (int32_t r = 0; r < W; r++) {
            cumoe_meeting_t meeting = meeting_at(port, r, W);
            meeting.address = addresses[turn % 3];
            children[r] = start(&meeting, turn < 6 ? 100 * (r == 0) : 10 * r, NULL);
        }
        for (int32_t r = 0; r < W; r++) finish(children[r]);
    }
}

/* The same port serves again and again, also while the slow are still at the meeting before. */
Test(bootstrap, one_after_another)
{
    const int32_t port = free_port();
    pid_t children[3];
    for (int32_t r = 0; r < 3; r++) {
        children[r] = fork_child();
        if (children[r] != 0) continue;
        const cumoe_meeting_t meeting = meeting_at(port, r, 3);
        for (int turn = 0; turn < 10; turn++)
            if (!meet(&meeting, NULL)) _exit(1);
        _exit(0);
    }
    for (int32_t r = 0; r < 3; r++) finish(children[r]);
}

Test(bootstrap, late)
{
    const double begin = now();
    cumoe_meeting_t zero = meeting_at(free_port(), 0, 4);
    zero.timeout = 1;
    cumoe_meeting_t one = meeting_at(zero.port, 1, 4), three = meeting_at(zero.port, 3, 4);
    one.timeout = three.timeout = 2;
    const pid_t children[] = {start(&zero, 0, "rank 0 of 4: rank 2 did not come to port"),
                              start(&one, 0, "rank 1 of 4: no answer from rank 0 at 127.0.0.1, port"),
                              start(&three, 0, "within 2 s")};
    for (int i = 0; i < 3; i++) finish(children[i]);
    cr_expect(now() - begin < 10);
}

Test(bootstrap, nobody_is_there)
{
    cumoe_meeting_t one = meeting_at(free_port(), 1, 2);
    one.timeout = 0.3;
    const double begin = now();
    cr_expect(meet(&one, "connect: Connection refused"));
    one.address = "no.such.machine.invalid";
    cr_expect(meet(&one, "getaddrinfo: "));
    cr_expect(now() - begin < 30); /* a resolver takes its own time */
    cumoe_meeting_t zero = meeting_at(one.port, 0, 2);
    const int taken = open_socket(zero.port, true);
    cr_expect(meet(&zero, "Address already in use. CUMOE_MASTER_PORT names another"));
    close(taken);
}

/* ---- strangers ---- */

static void put32(unsigned char *to, uint32_t value)
{
    for (int i = 0; i < 4; i++) to[i] = (unsigned char)(value >> (24 - 8 * i));
}

static void make_hello(unsigned char *hello, uint32_t version, uint32_t rank, uint32_t num_ranks, uint32_t size)
{
    const uint32_t numbers[] = {version, rank, num_ranks, size};
    memcpy(hello, "cumoe-ep", 8);
    for (int i = 0; i < 4; i++) put32(hello + 8 + 4 * i, numbers[i]);
}

static void say(int fd, const void *data, size_t size)
{
    (void)!send(fd, data, size, MSG_NOSIGNAL);
}

/* What comes back until the other end closes; it must do that. */
static size_t hear(int fd, unsigned char *to, size_t size)
{
    size_t got = 0;
    for (ssize_t n; got < size && (n = recv(fd, to + got, size - got, 0)) > 0;) got += (size_t)n;
    return got;
}

/* Rank 0 says what is wrong with a hello, and goes on. */
Test(bootstrap, wrong_hellos)
{
    static const struct {
        uint32_t version, rank, num_ranks, size, verdict, value;
    } wrong[] = {{2, 1, 3, SIZE, 1, 1},          {1, 1, 4, SIZE, 2, 3}, {1, 1, 3, SIZE + 1, 3, SIZE},
                 {1, 3, 3, SIZE, 4, 3},          {1, 0, 3, SIZE, 5, 0}, {1, 0x80000000, 3, SIZE, 4, 3},
                 {1, 0xffffffff, 3, SIZE, 4, 3}, {0, 0, 0, 0, 1, 1}};
    const cumoe_meeting_t zero = meeting_at(free_port(), 0, 3), one = meeting_at(zero.port, 1, 3);
    const cumoe_meeting_t two = meeting_at(zero.port, 2, 3), five = meeting_at(zero.port, 1, 5);
    const pid_t host = start(&zero, 0, NULL), first = start(&one, 0, NULL);
    for (size_t i = 0; i < sizeof wrong / sizeof wrong[0]; i++) {
        unsigned char hello[HELLO], reply[REPLY + 1], right[REPLY];
        const int fd = visit(zero.port);
        make_hello(hello, wrong[i].version, wrong[i].rank, wrong[i].num_ranks, wrong[i].size);
        say(fd, hello, HELLO);
        memcpy(right, "cumoe-ep", 8);
        put32(right + 8, wrong[i].verdict);
        put32(right + 12, wrong[i].value);
        cr_expect_eq(hear(fd, reply, sizeof reply), (size_t)REPLY, "hello %zu", i);
        cr_expect_eq(memcmp(reply, right, REPLY), 0, "hello %zu", i);
        close(fd);
    }
    usleep(500000); /* rank 1 is there */
    cr_expect(meet(&one, "rank 1 of 3: rank 1 has come already, but every rank must be there once"));
    cr_expect(meet(&five, "rank 1 of 5: rank 0 knows of 3 ranks, but the number must be the same"));
    cr_expect(meet(&two, NULL));
    finish(first);
    finish(host);
}

/* Connections that say nothing, more than there are places; that say something else, or half of it, or too much;
 * that come and go, also as a rank; and a rank that is slow of speech. */
Test(bootstrap, strangers)
{
    const cumoe_meeting_t zero = meeting_at(free_port(), 0, 3), one = meeting_at(zero.port, 1, 3);
    const pid_t host = start(&zero, 0, NULL);
    unsigned char hello[HELLO + 1] = {0}, reply[REPLY + SIZE + 1];
    int silent[150];
    for (int i = 0; i < 150; i++) silent[i] = visit(zero.port);
    for (int i = 0; i < 40; i++) {
        const int fd = visit(zero.port);
        make_hello(hello, 1, 1 + (uint32_t)i % 2, 3, SIZE);
        if (i % 4 == 0) say(fd, hello, (size_t)i % HELLO);
        if (i % 4 == 1) say(fd, "GET / HTTP/1.1\r\n\r\n", 18);
        if (i % 4 == 2) say(fd, hello, HELLO); /* a rank, which leaves */
        if (i % 4 == 3) say(fd, hello, HELLO + 1);
        usleep(1000);
        close(fd);
    }
    const int slow = visit(zero.port);
    make_hello(hello, 1, 2, 3, SIZE);
    for (int i = 0; i < HELLO; i++, usleep(2000)) say(slow, hello + i, 1);
    cr_expect(meet(&one, NULL));
    cr_expect_eq(hear(slow, reply, sizeof reply), (size_t)(REPLY + SIZE));
    for (int i = 0; i < SIZE; i++) cr_expect_eq(reply[REPLY + i], (unsigned char)(i * 7));
    finish(host);
    close(slow);
    for (int i = 0; i < 150; i++) close(silent[i]);
}

/* Ranks that have left before rank 0 has heard them are not there; nor do they keep the place of one that comes
 * before (WAITS: it knocks first, and says its hello last). */
static void check_ghosts(bool waits)
{
    const cumoe_meeting_t zero = meeting_at(free_port(), 0, 3), one = meeting_at(zero.port, 1, 3);
    const cumoe_meeting_t two = meeting_at(zero.port, 2, 3);
    const pid_t host = start(&zero, 0, NULL);
    unsigned char hello[HELLO], reply[REPLY + SIZE + 1];
    close(visit(zero.port));
    kill(host, SIGSTOP);
    const int first = visit(zero.port);
    for (uint32_t rank = 1; rank < 3; rank++) {
        const int ghost = visit(zero.port);
        make_hello(hello, 1, rank, 3, SIZE);
        say(ghost, hello, HELLO);
        close(ghost);
    }
    make_hello(hello, 1, 1, 3, SIZE);
    if (waits) say(first, hello, HELLO);
    kill(host, SIGCONT);
    const pid_t other = waits ? 0 : start(&one, 0, NULL);
    cr_expect(meet(&two, NULL));
    if (waits) cr_expect_eq(hear(first, reply, sizeof reply), (size_t)(REPLY + SIZE));
    if (!waits) finish(other);
    close(first);
    finish(host);
}

Test(bootstrap, ghosts)
{
    check_ghosts(true);
    check_ghosts(false);
}

static bool write_file(const char *name, const char *text)
{
    const int fd = open(name, O_WRONLY);
    const bool written = fd >= 0 && write(fd, text, strlen(text)) == (ssize_t)strlen(text);
    close(fd);
    return written;
}

/* Into a network of its own, with one port for those who connect; false if this system does not let it. */
static bool enter_network(void)
{
    struct ifreq loopback = {.ifr_name = "lo", .ifr_flags = IFF_UP};
    char root[32];
    snprintf(root, sizeof root, "0 %d 1", (int)geteuid());
    if (unshare(CLONE_NEWNET) != 0 &&
        (unshare(CLONE_NEWUSER | CLONE_NEWNET) != 0 || !write_file("/proc/self/uid_map", root)))
        return false;
    const int fd = socket(AF_INET, SOCK_DGRAM, 0);
    const bool up = ioctl(fd, SIOCSIFFLAGS, &loopback) == 0;
    close(fd);
    return up && write_file("/proc/sys/net/ipv4/ip_local_port_range", "40000 40000");
}

/* Who connects to a port at which nobody listens may get that port himself, here must, and hears his own hello. */
Test(bootstrap, oneself)
{
    enum { NO_NETWORK = 77 };
    const pid_t child = fork_child(); /* of one thread, as a network of one's own demands */
    if (child == 0) {
        cumoe_meeting_t one = meeting_at(40000, 1, 2), zero = meeting_at(40000, 0, 2);
        one.timeout = zero.timeout = 0.5;
        if (!enter_network()) _exit(NO_NETWORK);
        _exit(meet(&one, "rank 1 of 2: no answer from rank 0 at 127.0.0.1, port 40000") &&
                      meet(&zero, "rank 1 did not come to port 40000")
                  ? 0
                  : 1);
    }
    int result = -1;
    cr_assert_eq(waitpid(child, &result, 0), child);
    if (WIFEXITED(result) && WEXITSTATUS(result) == NO_NETWORK) {
        fprintf(stderr, "skipped: no network of its own\n"); /* mutate.sh looks for it */
        cr_skip_test();
    }
    cr_expect_eq(result, 0);
}

/* A process that listens at the port, and does SERVE with each who comes. */
static pid_t start_stranger(int32_t port, void (*serve)(int fd))
{
    const int listener = open_socket(port, true);
    const pid_t child = fork_child();
    while (child == 0) {
        const int fd = accept(listener, NULL, NULL);
        serve(fd);
        close(fd);
    }
    close(listener);
    return child;
}

static void finish_stranger(pid_t child)
{
    kill(child, SIGKILL);
    waitpid(child, NULL, 0);
}

static void greet(int fd)
{
    unsigned char hello[HELLO];
    say(fd, "220 mail.example.org ESMTP\r\n", 28);
    hear(fd, hello, HELLO);
}

/* Somebody else listens where rank 0 is expected, and then rank 0 comes. */
Test(bootstrap, another_host)
{
    const cumoe_meeting_t zero = meeting_at(free_port(), 0, 2), one = meeting_at(zero.port, 1, 2);
    const pid_t guest = start(&one, 0, NULL);
    const int listener = open_socket(zero.port, true);
    for (int i = 0; i < 6; i++) {
        unsigned char reply[REPLY] = "cumoe-ep";
        put32(reply + 8, i % 2 ? 6 : 0xffffffff); /* no verdict */
        const int fd = accept(listener, NULL, NULL);
        if (i < 2) say(fd, "SSH-2.0-OpenSSH_9.2p1\r\n", 23);
        if (i >= 2) say(fd, reply, i < 4 ? 15 : REPLY);
        close(fd);
    }
    close(listener);
    cr_expect(meet(&zero, NULL));
    finish(guest);

    cumoe_meeting_t late = meeting_at(free_port(), 1, 2);
    late.timeout = 0.5;
    const pid_t mail = start_stranger(late.port, greet);
    cr_expect(meet(&late, "recv: who answers is not rank 0"));
    finish_stranger(mail);
}

/* ---- launchers ---- */

Test(bootstrap, environment)
{
    static const char *const all[] = {"RANK",         "WORLD_SIZE",   "MASTER_ADDR",      "MASTER_PORT",
                                      "SLURM_PROCID", "SLURM_NTASKS", "CUMOE_MASTER_PORT"};
    for (int v = 0; v < 7; v++) unsetenv(all[v]);
    cumoe_meeting_t m = {0};
    setenv("MASTER_ADDR", "here", 1);
    setenv("MASTER_PORT", "29500", 1);
    setenv("SLURM_PROCID", "2", 1);
    setenv("SLURM_NTASKS", "3", 1);
    cr_expect_eq(cumoe__meeting_read(&m), CUMOE_SUCCESS, "%s", cumoe_last_error());
    cr_expect(m.rank == 2 && m.num_ranks == 3 && m.port == 29501 && strcmp(m.address, "here") == 0);
    setenv("RANK", "0", 1); /* torchrun within Slurm */
    setenv("WORLD_SIZE", "1024", 1);
    setenv("CUMOE_MASTER_PORT", "65535", 1);
    cr_expect_eq(cumoe__meeting_read(&m), CUMOE_SUCCESS, "%s", cumoe_last_error());
    cr_expect(m.rank == 0 && m.num_ranks == 1024 && m.port == 65535);
    setenv("WORLD_SIZE", "1", 1);
    for (int v = 2; v < 7; v++) unsetenv(all[v]);
    cr_expect_eq(cumoe__meeting_read(&m), CUMOE_SUCCESS, "%s", cumoe_last_error());
}

/* ---- fuzz ---- */

/* Bytes that are nearly right. */
static size_t spoil(random_state_t *random, unsigned char *bytes, size_t size)
{
    const int changes = (int)(random_bits(random) % 4);
    for (int i = 0; i < changes; i++) bytes[random_bits(random) % size] = (unsigned char)random_bits(random);
    return random_bits(random) % 2 ? size : random_bits(random) % (size + 1);
}

Test(bootstrap, fuzzed_hellos)
{
    random_state_t random = random_start(random_seed("bootstrap hellos", 71));
    const cumoe_meeting_t zero = meeting_at(free_port(), 0, 64);
    const pid_t host = start(&zero, 0, NULL);
    for (int i = 0; i < 2000; i++) {
        unsigned char hello[HELLO + 8] = {0};
        make_hello(hello, 1, (uint32_t)(random_bits(&random) % 70), 64, SIZE);
        const int fd = visit(zero.port);
        say(fd, hello, spoil(&random, hello, sizeof hello));
        close(fd);
    }
    pid_t guests[64];
    for (int32_t r = 1; r < 64; r++) {
        const cumoe_meeting_t guest = meeting_at(zero.port, r, 64);
        guests[r] = start(&guest, 0, NULL);
    }
    for (int32_t r = 1; r < 64; r++) finish(guests[r]);
    finish(host);
}

static void answer(int fd)
{
    static random_state_t random = {72};
    unsigned char reply[REPLY + SIZE + 8] = "cumoe-ep";
    put32(reply + 8, (uint32_t)(random_bits(&random) % 8));
    say(fd, reply, spoil(&random, reply, random_bits(&random) % 2 ? REPLY : sizeof reply));
}

/* Whatever the answer is: data or a sentence, and in time. */
Test(bootstrap, fuzzed_replies)
{
    cumoe_meeting_t one = meeting_at(free_port(), 1, 2);
    one.timeout = 0.02;
    const pid_t stranger = start_stranger(one.port, answer);
    int answers = 0, sentences = 0;
    for (int i = 0; i < 100; i++) {
        unsigned char data[SIZE + 1];
        memset(data, 99, sizeof data);
        const cumoe_status_t status = cumoe__bootstrap(&one, data, SIZE);
        cr_expect(status == CUMOE_SUCCESS || (status == CUMOE_COMM_ERROR && data[0] == 99));
        cr_expect_eq(data[SIZE], 99);
        answers += status == CUMOE_SUCCESS;
        sentences += strstr(cumoe_last_error(), "but ") != NULL;
    }
    cr_expect(answers > 0 && sentences > 0, "%d answers, %d sentences", answers, sentences);
    finish_stranger(stranger);
}
