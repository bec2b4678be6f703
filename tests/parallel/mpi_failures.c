/* What becomes of a group of MPI processes of which one fails; mpi.sh starts them. Each of the others must be told
 * in time, and come to its end.   usage: mpi_failures differs|late|aborts|killed|leaves|refusals */
#include "tests/support/device.h"
#include "tests/support/ranks.h"

#include <cumoe/mpi.h>

#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/time.h>
#include <unistd.h>

static const double TIMEOUT = 2;

static int32_t rank, num_ranks;

/* What is not so ends all processes. */
static void demand(bool condition, const char *what)
{
    if (condition) return;
    fprintf(stderr, "rank %d: not so: %s (%s)\n", rank, what, cumoe_last_error());
    MPI_Abort(MPI_COMM_WORLD, 1);
}

/* ---- the last rank fails ---- */

static void kill_now(int signal)
{
    (void)signal;
    raise(SIGKILL);
}

/* Somewhere in the steps. */
static void kill_soon(void)
{
    random_state_t random = random_start(random_seed("mpi killed", (uint64_t)getpid()));
    const struct itimerval soon = {.it_value = {.tv_usec = 100000 + (suseconds_t)random_below(&random, 300000)}};
    signal(SIGALRM, kill_now);
    setitimer(ITIMER_REAL, &soon, NULL);
}

/* Step number I of the rank that fails. */
static bool fail_step(const char *way, rank_t *part, int i)
{
    if (i < 3) return rank_run(part);
    if (strcmp(way, "differs") == 0) return rank_forward(part) && rank_forward(part);
    if (strcmp(way, "late") == 0) sleep((unsigned)TIMEOUT + 2);
    if (strcmp(way, "aborts") == 0) cumoe_ep_abort(part->ep);
    if (strcmp(way, "killed") == 0 && i == 3) kill_soon();
    return rank_run(part);
}

/* Steps until one fails, which takes no longer than it may. */
static void run_steps(const char *way, rank_t *part)
{
    const bool fails = rank == num_ranks - 1;
    const double end = MPI_Wtime() + 60;
    double begin;
    bool good = true;
    for (int i = 0; good && (begin = MPI_Wtime()) < end; i++)
        good = fails ? fail_step(way, part, i) : rank_run(part);
    char sentence[512];
    snprintf(sentence, sizeof sentence, "%s", cumoe_last_error());
    demand(!good, "a failure is reported");
    demand(fails || MPI_Wtime() - begin < TIMEOUT + 1, "it is reported in time");
    demand(cumoe_ep_wait(part->ep, NULL, 0) == CUMOE_COMM_ERROR, "the status is CUMOE_COMM_ERROR, and stays");
    demand(strcmp(sentence, cumoe_last_error()) == 0, "the sentence stays");
    printf("rank %d is told: %s\n", rank, sentence);
    fflush(stdout);
}

/* One rank is away when the others make their first call, or, leaving, for ever. */
static void run_leaving(cumoe_ep_t *ep, const problem_t *whole, const ranks_options_t *options)
{
    rank_t part;
    if (rank == num_ranks - 1) return;
    demand(!rank_create(&part, whole, options, ep), "no layer is made without a rank");
    printf("rank %d is told: %s\n", rank, cumoe_last_error());
    rank_destroy(&part);
}

static void run_failure(const char *way, cumoe_handle_t *handle)
{
    const layer_case_t layer_case = {"MPI", 60, 32, 48, 8, 2, .pattern = PATTERN_RANDOM};
    const problem_options_t options = {.dtype = CUMOE_F32, .variant = GATE_VARIANTS[VARIANT_NOISY], .seed = 1};
    const ranks_options_t split = {.num_ranks = num_ranks, .split = SPLIT_UNEVEN, .capacity = 120};
    problem_t whole;
    report_t report = {0};
    cumoe_ep_t *ep = NULL;
    rank_t part;
    demand(problem_create(&whole, handle, &layer_case, &options, &report), report.text);
    demand(cumoe_ep_create_mpi(&ep, handle, MPI_COMM_WORLD, TIMEOUT) == CUMOE_SUCCESS, "the group is made");
    if (strcmp(way, "leaves") == 0) {
        run_leaving(ep, &whole, &split);
    } else {
        demand(rank_create(&part, &whole, &split, ep), part.report.text);
        run_steps(way, &part);
        rank_destroy(&part);
    }
    cumoe_ep_destroy(ep);
    problem_destroy(&whole);
}

/* ---- refusals ---- */

static void refuse(cumoe_status_t status, const char *sentence)
{
    demand(status == CUMOE_INVALID_ARGUMENT, "CUMOE_INVALID_ARGUMENT");
    demand(strcmp(cumoe_last_error(), sentence) == 0, sentence);
}

static void run_refusals(const cumoe_handle_t *handle)
{
    const MPI_Comm world = MPI_COMM_WORLD;
    cumoe_ep_t *ep = NULL;
    refuse(cumoe_ep_create_mpi(NULL, handle, world, 0),
           "cumoe_ep_create_with: ep = NULL, but the result needs a place");
    refuse(cumoe_ep_create_mpi(&ep, NULL, world, 0),
           "cumoe_ep_create_with: handle = NULL, but must come from cumoe_handle_create()");
    refuse(cumoe_ep_create_mpi(&ep, handle, world, -1),
           "cumoe_ep_create_with: timeout = -1, but must be 0..1e9 seconds (0 = 600)");
    refuse(cumoe_ep_create_mpi(&ep, handle, MPI_COMM_NULL, 0),
           "cumoe_ep_create_mpi: comm = MPI_COMM_NULL, but is required");
    demand(ep == NULL, "ep is unchanged");
    /* A rank that does not come to the making of the group. */
    if (rank != num_ranks - 1) {
        demand(cumoe_ep_create_mpi(&ep, handle, world, 1) == CUMOE_COMM_ERROR && ep == NULL, "CUMOE_COMM_ERROR");
        demand(strcmp(cumoe_last_error(), "cumoe_ep_create_mpi: a rank did not come in time") == 0, "its sentence");
    }
}

int main(int argc, char **argv)
{
    int level;
    cumoe_handle_t *handle = NULL;
    cumoe_ep_t *ep = NULL;
    const char *way = argc > 1 ? argv[1] : "";
    demand(cumoe_handle_create(&handle, device_backend(), 0) == CUMOE_SUCCESS, "a device");
    const bool early = cumoe_ep_create_mpi(&ep, handle, MPI_COMM_WORLD, 0) == CUMOE_INVALID_ARGUMENT;
    MPI_Init_thread(&argc, &argv, MPI_THREAD_FUNNELED, &level);
    MPI_Comm_rank(MPI_COMM_WORLD, &rank);
    MPI_Comm_size(MPI_COMM_WORLD, &num_ranks);
    demand(early, "before MPI_Init() a group is refused");
    if (strcmp(way, "refusals") == 0)
        run_refusals(handle);
    else
        run_failure(way, handle);
    cumoe_handle_destroy(handle);
    printf("rank %d has come to its end\n", rank);
    fflush(NULL);
    _exit(0); /* MPI_Finalize() waits for the dead */
}
