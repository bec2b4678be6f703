/* The transport over NCCL, with a library in place of NCCL, on the simulated GPU. */
#include "tests/parallel/nccl_group.h"
#include "tests/parallel/rows.h"

#include <cuda_runtime_api.h>
#include <netinet/in.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

static double now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

/* ---- groups ---- */

typedef struct joining {
    const cumoe_handle_t *handle;
    cumoe_ep_args_t args;
    cumoe_ep_t *ep;
    cumoe_status_t status;
    char sentence[512];
} joining_t;

static void *join(void *argument)
{
    joining_t *j = argument;
    j->status = cumoe_ep_create(&j->ep, j->handle, &j->args);
    if (j->status != CUMOE_SUCCESS) strncpy(j->sentence, cumoe_last_error(), sizeof j->sentence - 1);
    return NULL;
}

/* For ranks_options_t: each rank joins in a thread of its own. */
static cumoe_status_t create_nccl(cumoe_ep_t **ep, const cumoe_handle_t *handle, int32_t num_ranks, double timeout)
{
    cumoe_ep_id_t id;
    joining_t j[RANKS_MAX] = {0};
    pthread_t threads[RANKS_MAX];
    if (cumoe_ep_id_create(&id) != CUMOE_SUCCESS) return CUMOE_COMM_ERROR;
    for (int32_t r = 0; r < num_ranks; r++) {
        j[r].handle = handle;
        j[r].args = (cumoe_ep_args_t){
            .struct_size = sizeof j[r].args, .id = &id, .rank = r, .num_ranks = num_ranks, .timeout = timeout};
        if (pthread_create(&threads[r], NULL, join, &j[r]) != 0) abort();
    }
    cumoe_status_t status = CUMOE_SUCCESS;
    for (int32_t r = 0; r < num_ranks; r++) {
        pthread_join(threads[r], NULL);
        ep[r] = j[r].ep;
        if (j[r].status != CUMOE_SUCCESS) status = j[r].status;
        cr_expect(j[r].status != CUMOE_SUCCESS ||
                  (cumoe_ep_rank(ep[r]) == r && cumoe_ep_num_ranks(ep[r]) == num_ranks));
    }
    return status;
}

static void check_ranks(problem_t *p, report_t *report)
{
    check_ranks_of(p, create_nccl, report);
}

/* What is exchanged hangs on the gate and on types, and what a transport makes of it on neither. */
Test(nccl, same_bits)
{
    static const int variants[] = {VARIANT_NOISY, VARIANT_SOFTMAX_TOPK, VARIANT_HIERARCHICAL, VARIANT_EXTERNAL};
    use_stand_in();
    cumoe_handle_t *handle = suite_handle();
    report_t report = {0};
    for (int i = 0; i < 16; i++) {
        const problem_options_t options =
            suite_options(i % NUM_SUITE_OPTIONS, &GATE_VARIANTS[variants[i / 4]], random_seed("nccl", 50));
        suite_one_case(handle, &CASE, &options, check_ranks, &report);
    }
    cumoe_handle_destroy(handle);
    EXPECT_EMPTY(report);
    expect_clean(0);
}

Test(nccl, rows)
{
    use_stand_in();
    const problem_t nothing = {.name = "rows", .handle = suite_handle()};
    for (int32_t num_ranks = 1; num_ranks <= 3; num_ranks++) {
        const ranks_options_t options = {.num_ranks = num_ranks, .create = create_nccl};
        report_t report = {0};
        ranks_run(&nothing, &options, rows_exchange, NULL, &report);
        EXPECT_EMPTY(report);
    }
    cumoe_handle_destroy((cumoe_handle_t *)(uintptr_t)nothing.handle);
    expect_clean(0);
}

/* ---- one rank, whose calls fail ---- */

/* All that a transport does, up to the call that fails. */
static cumoe_status_t use_group(cumoe_ep_t *ep, const cumoe_handle_t *handle, const problem_t *p)
{
    cumoe_config_t config = p->config;
    cumoe_layer_t *layer = NULL;
    config.ep = ep;
    cumoe_status_t status = cumoe_layer_create(&layer, handle, &config);
    if (status == CUMOE_SUCCESS) status = device_ep_sum_gradients(handle, layer, &p->gradients);
    if (status == CUMOE_SUCCESS) status = cumoe_ep_wait(ep, NULL, 0);
    cumoe_layer_destroy(layer);
    return status;
}

static void expect_sentence(const char *function, const char *sentence)
{
    const bool remote = strcmp(function, "asynchronous") == 0;
    cr_expect(remote || strstr(sentence, function), "%s: %s", function, sentence);
    cr_expect(strstr(sentence, STAND_IN_TEXT), "%s: %s", function, sentence);
    cr_expect(strstr(sentence, remote ? "remote error" : "unhandled system error"), "%s: %s", function, sentence);
}

/* Whether there was such a call. */
static bool fail_once(const cumoe_handle_t *handle, const problem_t *p, const char *function, int call)
{
    cumoe_ep_t *ep = NULL;
    stand_in.fail(function, call);
    cumoe_status_t status = join_alone(&ep, handle);
    if (status == CUMOE_SUCCESS) {
        status = use_group(ep, handle, p);
        if (status != CUMOE_SUCCESS) { /* and from now on */
            expect_sentence(function, cumoe_last_error());
            cr_expect_eq(cumoe_ep_wait(ep, NULL, 0), CUMOE_COMM_ERROR, "%s, call %d", function, call);
            expect_sentence(function, cumoe_last_error());
            cr_expect_eq(use_group(ep, handle, p), CUMOE_COMM_ERROR, "%s, call %d", function, call);
            cumoe_ep_abort(ep);
        }
        const bool before = stand_in.failed();
        cumoe_ep_destroy(ep);
        cr_expect_eq(status, before ? CUMOE_COMM_ERROR : CUMOE_SUCCESS, "%s, call %d: %s", function, call,
                     cumoe_last_error());
    } else {
        cr_expect_eq(status, CUMOE_COMM_ERROR, "%s, call %d", function, call);
        expect_sentence(function, cumoe_last_error());
        cr_expect_null(ep);
    }
    const bool failed = stand_in.failed();
    stand_in.fail(NULL, 0);
    expect_clean(0);
    return failed;
}

Test(nccl, every_call_fails_once)
{
    static const char *const functions[] = {"ncclGetVersion", "ncclGetUniqueId",  "ncclCommInitRankConfig",
                                            "ncclGroupStart", "ncclGroupEnd",     "ncclSend",
                                            "ncclRecv",       "ncclAllReduce",    "ncclCommGetAsyncError",
                                            "asynchronous",   "ncclCommFinalize", "ncclCommDestroy"};
    use_stand_in();
    cumoe_handle_t *handle = suite_handle();
    problem_t p;
    make_problem(&p, handle);
    cr_expect_not(fail_once(handle, &p, "none", 1)); /* twins are made */
    const int64_t objects = sim_num_objects();
    for (size_t f = 0; f < sizeof functions / sizeof functions[0]; f++) {
        int call = 1;
        while (fail_once(handle, &p, functions[f], call)) call++;
        cr_expect_gt(call, 1, "%s is never called", functions[f]);
    }
    cr_expect_eq(sim_num_objects(), objects);
    problem_destroy(&p);
    cumoe_handle_destroy(handle);
}

/* A failure of others is noticed while one waits, also where no call is made. */
Test(nccl, others_fail)
{
    use_stand_in();
    cumoe_handle_t *handle = suite_handle();
    cumoe_ep_t *ep = NULL;
    cr_assert_eq(join_alone(&ep, handle), CUMOE_SUCCESS, "%s", cumoe_last_error());
    cr_expect_eq(cumoe_ep_wait(ep, NULL, 0), CUMOE_SUCCESS, "%s", cumoe_last_error());
    stand_in.fail("asynchronous", 1);
    for (int time = 0; time < 2; time++) {
        cr_expect_eq(cumoe_ep_wait(ep, NULL, 0), CUMOE_COMM_ERROR);
        cr_expect(strstr(cumoe_last_error(), "cumoe_ep_wait: rank 0 of 1 over NCCL"), "%s", cumoe_last_error());
        expect_sentence("asynchronous", cumoe_last_error());
    }
    cumoe_ep_destroy(ep);
    cumoe_handle_destroy(handle);
    expect_clean(0);
}

/* A call of CUDA that fails is no failure of the group. */
Test(nccl, cuda_fails)
{
    use_stand_in();
    cumoe_handle_t *handle = suite_handle();
    cumoe_ep_t *ep = NULL;
    cr_assert_eq(join_alone(&ep, handle), CUMOE_SUCCESS, "%s", cumoe_last_error());
    sim_fail_call(1);
    cr_expect_eq(cumoe_ep_wait(ep, NULL, 0), CUMOE_CUDA_ERROR, "%s", cumoe_last_error());
    cr_expect_eq(cumoe_ep_wait(ep, NULL, 0), CUMOE_SUCCESS, "%s", cumoe_last_error());
    cumoe_ep_destroy(ep);
    cumoe_handle_destroy(handle);
    expect_clean(0);
}

/* ---- ranks that are late ---- */

Test(nccl, a_rank_does_not_come)
{
    use_stand_in();
    joining_t j = {.handle = suite_handle()};
    cumoe_ep_id_t id;
    cr_assert_eq(cumoe_ep_id_create(&id), CUMOE_SUCCESS, "%s", cumoe_last_error());
    j.args = (cumoe_ep_args_t){.struct_size = sizeof j.args, .id = &id, .rank = 1, .num_ranks = 2, .timeout = 0.3};
    const double begin = now();
    join(&j);
    cr_expect_eq(j.status, CUMOE_COMM_ERROR);
    cr_expect(strstr(j.sentence, "cumoe_ep_create: rank 1 of 2") && strstr(j.sentence, "within 0.3 s"), "%s",
              j.sentence);
    cr_expect(now() - begin >= 0.3 && now() - begin < 5);
    cr_expect_null(j.ep);
    expect_clean(0);
    cumoe_handle_destroy((cumoe_handle_t *)(uintptr_t)j.handle);
}

/* Rank 1 joins, and does nothing more. */
Test(nccl, a_rank_is_late)
{
    use_stand_in();
    cumoe_handle_t *handle = suite_handle();
    problem_t p;
    make_problem(&p, handle);
    cumoe_ep_t *ep[2];
    cr_assert_eq(create_nccl(ep, handle, 2, 0.3), CUMOE_SUCCESS, "%s", cumoe_last_error());
    const double begin = now();
    cr_expect_eq(use_group(ep[0], handle, &p), CUMOE_COMM_ERROR);
    cr_expect(strstr(cumoe_last_error(), "rank 0 of 2 over NCCL") && strstr(cumoe_last_error(), "within 0.3 s"),
              "%s", cumoe_last_error());
    cr_expect(now() - begin >= 0.3 && now() - begin < 5);
    cumoe_ep_destroy(ep[0]);
    cumoe_ep_destroy(ep[1]);
    problem_destroy(&p);
    cumoe_handle_destroy(handle);
    expect_clean(0);
}

/* More work in the stream than there is time for. */
Test(nccl, the_stream_is_late)
{
    use_stand_in();
    cumoe_handle_t *handle = suite_handle();
    cumoe_ep_t *ep = NULL;
    cumoe_stream_t stream = NULL;
    void *memory = NULL;
    cr_assert_eq(join_alone(&ep, handle), CUMOE_SUCCESS, "%s", cumoe_last_error());
    cr_assert_eq(cumoe_stream_create(handle, &stream), CUMOE_SUCCESS);
    cr_assert_eq(cumoe_memory_alloc(handle, 1 << 20, &memory), CUMOE_SUCCESS);
    for (int time = 0; time < 2; time++) {
        for (int i = 0; i < 1000; i++)
            cr_assert_eq(cumoe_memory_set(handle, memory, i % 256, 1 << 20, stream), CUMOE_SUCCESS);
        const cumoe_status_t status = cumoe_ep_wait(ep, stream, time ? 1e-3 : 0);
        cr_expect_eq(status, time ? CUMOE_COMM_ERROR : CUMOE_SUCCESS, "%s", cumoe_last_error());
    }
    cr_expect(strstr(cumoe_last_error(), "cumoe_ep_wait: rank 0 of 1") &&
                  strstr(cumoe_last_error(), "within 0.001 s"),
              "%s", cumoe_last_error());
    cr_expect_eq(cudaPeekAtLastError(), cudaSuccess, "an error is left to the caller");
    cr_expect_eq(stand_in.live(), 0, "the communicator is aborted, so that the stream comes to its end");
    cumoe_memory_free(handle, memory);
    cumoe_stream_destroy(handle, stream);
    cumoe_ep_destroy(ep);
    cumoe_handle_destroy(handle);
    expect_clean(0);
}

static void *abort_soon(void *ep)
{
    usleep(200000);
    cumoe_ep_abort(ep);
    return NULL;
}

/* While this thread waits for a rank that does not come, another gives up. */
Test(nccl, abort_ends_a_wait)
{
    use_stand_in();
    cumoe_handle_t *handle = suite_handle();
    problem_t p;
    make_problem(&p, handle);
    cumoe_ep_t *ep[2];
    cr_assert_eq(create_nccl(ep, handle, 2, 60), CUMOE_SUCCESS, "%s", cumoe_last_error());
    const double begin = now();
    pthread_t thread;
    cr_assert_eq(pthread_create(&thread, NULL, abort_soon, ep[0]), 0);
    cr_expect_eq(use_group(ep[0], handle, &p), CUMOE_COMM_ERROR);
    cr_expect(strstr(cumoe_last_error(), "this rank has aborted"), "%s", cumoe_last_error());
    cr_expect(now() - begin < 10);
    pthread_join(thread, NULL);
    cumoe_ep_destroy(ep[0]);
    cumoe_ep_destroy(ep[1]);
    problem_destroy(&p);
    cumoe_handle_destroy(handle);
    expect_clean(0);
}

/* ---- communicators of the caller's ---- */

static cumoe_status_t borrow(cumoe_ep_t **ep, const cumoe_handle_t *handle, void *comm)
{
    const cumoe_ep_args_t args = {.struct_size = sizeof args, .nccl_comm = comm, .timeout = 20};
    return cumoe_ep_create(ep, handle, &args);
}

Test(nccl, borrowed)
{
    use_stand_in();
    sim_set_devices(2, 9, 0, (size_t)1 << 30);
    cumoe_handle_t *handle = suite_handle(), *other = NULL;
    cr_assert_eq(cumoe_handle_create(&other, CUMOE_BACKEND_CUDA, 1), CUMOE_SUCCESS);
    problem_t p;
    make_problem(&p, handle);
    void *comm = stand_in.blocking();
    cumoe_ep_t *ep = NULL;
    static const char *const functions[] = {"ncclCommUserRank", "ncclCommCount", "ncclCommCuDevice"};
    for (int f = 0; f < 3; f++) {
        stand_in.fail(functions[f], 1);
        cr_expect_eq(borrow(&ep, handle, comm), CUMOE_COMM_ERROR);
        expect_sentence(functions[f], cumoe_last_error());
        expect_clean(1);
    }
    cr_assert_eq(borrow(&ep, handle, comm), CUMOE_SUCCESS, "%s", cumoe_last_error());
    cr_expect_eq(cumoe_ep_rank(ep), 0);
    cr_expect_eq(cumoe_ep_num_ranks(ep), 1);
    cr_expect_eq(use_group(ep, handle, &p), CUMOE_SUCCESS, "%s", cumoe_last_error());
    cumoe_ep_destroy(ep);
    expect_clean(1);

    cr_assert_eq(borrow(&ep, handle, comm), CUMOE_SUCCESS, "%s", cumoe_last_error());
    stand_in.fail("ncclAllReduce", 1);
    cr_expect_eq(use_group(ep, handle, &p), CUMOE_COMM_ERROR);
    expect_sentence("ncclAllReduce", cumoe_last_error());
    cumoe_ep_abort(ep);
    cumoe_ep_destroy(ep);
    expect_clean(1);

    cr_expect_eq(borrow(&ep, other, comm), CUMOE_INVALID_ARGUMENT);
    cr_expect(strstr(cumoe_last_error(), "args.nccl_comm is on CUDA device 0") && strstr(cumoe_last_error(), "1"),
              "%s", cumoe_last_error());
    problem_destroy(&p);
    cumoe_handle_destroy(other);
    cumoe_handle_destroy(handle);
}

/* NCCL is called with the handle's device, and the caller keeps his. */
Test(nccl, device)
{
    use_stand_in();
    sim_set_devices(2, 9, 0, (size_t)1 << 30);
    cumoe_handle_t *handle = NULL;
    cr_assert_eq(cumoe_handle_create(&handle, CUMOE_BACKEND_CUDA, 1), CUMOE_SUCCESS);
    cr_assert_eq(cudaSetDevice(0), cudaSuccess);
    problem_t p;
    make_problem(&p, handle);
    cumoe_ep_t *ep = NULL;
    for (int time = 0; time < 2; time++) {
        cr_assert_eq(join_alone(&ep, handle), CUMOE_SUCCESS, "%s", cumoe_last_error());
        cr_expect_eq(use_group(ep, handle, &p), CUMOE_SUCCESS, "%s", cumoe_last_error());
        if (time) cumoe_ep_abort(ep);
        cumoe_ep_destroy(ep);
        int current = -1;
        cr_expect_eq(cudaGetDevice(&current), cudaSuccess);
        cr_expect_eq(current, 0);
    }
    problem_destroy(&p);
    cumoe_handle_destroy(handle);
    expect_clean(0);
}

/* ---- where NCCL comes from ---- */

static void expect_group(cumoe_status_t expected, const char *text)
{
    cumoe_handle_t *handle = suite_handle();
    cumoe_ep_t *ep = NULL;
    const cumoe_status_t status = join_alone(&ep, handle);
    cr_expect_eq(status, expected, "%s", cumoe_last_error());
    cr_expect(status == CUMOE_SUCCESS || strstr(cumoe_last_error(), text), "%s", cumoe_last_error());
    cumoe_ep_destroy(ep);
    cumoe_handle_destroy(handle);
}

Test(nccl, named)
{
    setenv("CUMOE_NCCL", "/nowhere/libnccl.so.2", 1);
    expect_group(CUMOE_COMM_ERROR, "CUMOE_NCCL cannot be loaded: /nowhere/libnccl.so.2");
    setenv("CUMOE_NCCL", "libm.so.6", 1);
    expect_group(CUMOE_COMM_ERROR, "NCCL has no ncclGetVersion, but must have version 2.18");
    use_stand_in();
    stand_in.version(21705);
    expect_group(CUMOE_COMM_ERROR, "NCCL has version 2.17.5, but must have 2.18 or later");
    stand_in.version(21800);
    expect_group(CUMOE_SUCCESS, "");
}

/* A copy that the process has: under its name, or with its functions in reach of all. */
Test(nccl, found_by_name)
{
    load(RTLD_LOCAL);
    stand_in.version(21701);
    expect_group(CUMOE_COMM_ERROR, "2.17.1");
}

Test(nccl, found_by_function)
{
    load(RTLD_GLOBAL);
    stand_in.version(21702);
    expect_group(CUMOE_COMM_ERROR, "2.17.2");
}

Test(nccl, borrowed_from_nowhere)
{
    cumoe_handle_t *handle = suite_handle();
    cumoe_ep_t *ep = NULL;
    int none;
    cr_expect_eq(borrow(&ep, handle, &none), CUMOE_COMM_ERROR);
    cr_expect(strstr(cumoe_last_error(), "no NCCL is in this process"), "%s", cumoe_last_error());
    cr_expect_null(ep);
    cumoe_handle_destroy(handle);
}

/* ---- launchers ---- */

static int join_by_environment(bool slurm, int rank, const char *port)
{
    char number[16];
    snprintf(number, sizeof number, "%d", rank);
    setenv(slurm ? "SLURM_PROCID" : "RANK", number, 1);
    setenv(slurm ? "SLURM_NTASKS" : "WORLD_SIZE", "3", 1);
    setenv("MASTER_ADDR", "localhost", 1);
    setenv("MASTER_PORT", port, 1);
    stand_in.alone(1);
    cumoe_handle_t *handle = suite_handle();
    cumoe_ep_t *ep = NULL;
    const cumoe_status_t status = cumoe_ep_create(&ep, handle, NULL);
    if (status != CUMOE_SUCCESS) fprintf(stderr, "%s\n", cumoe_last_error());
    const bool right = cumoe_ep_rank(ep) == rank && cumoe_ep_num_ranks(ep) == 3;
    cumoe_ep_destroy(ep);
    cumoe_handle_destroy(handle);
    return status == CUMOE_SUCCESS && right ? 0 : 1;
}

/* torchrun itself listens at MASTER_PORT. */
static int launch(int32_t port)
{
    const struct sockaddr_in address = {
        .sin_family = AF_INET, .sin_port = htons((uint16_t)port), .sin_addr.s_addr = htonl(INADDR_ANY)};
    const int fd = socket(AF_INET, SOCK_STREAM, 0);
    return bind(fd, (const struct sockaddr *)&address, sizeof address) == 0 && listen(fd, 9) == 0 ? fd : -1;
}

/* Three processes, twice in a row; rank 0 comes last. */
Test(nccl, environment)
{
    use_stand_in();
    const char *variables[] = {"RANK", "WORLD_SIZE", "SLURM_PROCID", "SLURM_NTASKS", "CUMOE_MASTER_PORT"};
    for (int v = 0; v < 5; v++) unsetenv(variables[v]);
    char port[16];
    snprintf(port, sizeof port, "%d", 20000 + 2 * (int)(getpid() % 5000));
    const int launcher = launch(atoi(port));
    cr_assert(launcher >= 0);
    for (int slurm = 0; slurm < 2; slurm++) {
        pid_t children[3];
        for (int rank = 2; rank >= 0; rank--) {
            children[rank] = fork();
            cr_assert(children[rank] >= 0);
            if (children[rank] == 0) _exit(join_by_environment(slurm, rank, port));
        }
        for (int rank = 0; rank < 3; rank++) {
            int result = -1;
            cr_expect_eq(waitpid(children[rank], &result, 0), children[rank]);
            cr_expect_eq(result, 0, "rank %d", rank);
        }
    }
    close(launcher);
}
