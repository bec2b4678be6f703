/* Ranks as MPI processes (mpi.sh starts them): the bits of one device, and what becomes of a rank that is late, dies
 * or calls something else.   usage: mpi_ranks cases|differs|late|aborts|killed|refusals */
#include "tests/support/pairwise.h"
#include "tests/support/ranks.h"

#include <cumoe/mpi.h>

#include "tests/support/device.h"

#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static const double TIMEOUT = 2;

static cumoe_handle_t *handle;
static int32_t rank, num_ranks;

/* One's own failure ends all. */
static void demand(bool condition, const char *what)
{
    if (condition) return;
    fprintf(stderr, "rank %d: %s: %s\n", rank, what, cumoe_last_error());
    MPI_Abort(MPI_COMM_WORLD, 1);
}

static cumoe_ep_t *make_group(double timeout)
{
    cumoe_ep_t *ep = NULL;
    demand(cumoe_ep_create_mpi(&ep, handle, MPI_COMM_WORLD, timeout) == CUMOE_SUCCESS, "cumoe_ep_create_mpi");
    demand(cumoe_ep_rank(ep) == rank && cumoe_ep_num_ranks(ep) == num_ranks, "rank and number of ranks");
    return ep;
}

/* ---- the bits of one device ---- */

static int cases_run, failures;

static void check_case(const layer_case_t *layer_case, const problem_options_t *options, cumoe_ep_t *ep)
{
    problem_t problem;
    report_t report = {0};
    const int64_t most = layer_case->experts; /* ranks of a flat gate */
    if (options->variant.gate == CUMOE_GATE_BALANCED || most < num_ranks) return;
    if (problem_create(&problem, handle, layer_case, options, &report) && problem_run_forward(&problem, &report) &&
        problem_run_backward(&problem, &report) && (problem.groups == 0 || problem.groups >= num_ranks)) {
        const int64_t capacity = cases_run % 3 == 2 ? problem.tokens * problem.top_k + 3 : 0;
        const ranks_options_t split = {
            .num_ranks = num_ranks, .split = (ranks_split_t)(cases_run % NUM_SPLITS), .capacity = capacity};
        rank_t part;
        if (rank_create(&part, &problem, &split, ep) && rank_run(&part)) rank_check(&part);
        if (part.report.failures) report_fail(&report, "%s", part.report.text);
        rank_destroy(&part);
        cases_run++;
    }
    if (report.failures) fprintf(stderr, "rank %d: %s:\n%s", rank, problem.name, report.text);
    failures += report.failures > 0;
    problem_destroy(&problem);
}

static void run_cases(void)
{
    cumoe_ep_t *ep = make_group(0);
    int chosen[MAX_PAIRWISE];
    const int num_chosen = pairs_choose(&PAIRWISE, MAX_PAIRWISE, chosen);
    for (int n = 0; n < num_chosen; n += device_share()) {
        layer_case_t layer_case;
        problem_options_t options;
        pairwise_case(chosen[n], n, 1, &layer_case, &options);
        check_case(&layer_case, &options, ep);
    }
    cumoe_ep_destroy(ep);
    if (rank == 0) printf("%d cases on %d ranks, %s\n", cases_run, num_ranks, cumoe_handle_description(handle));
    demand(failures == 0 && cases_run > 0, "cases");
    MPI_Finalize();
}

/* ---- ranks that fail ---- */

static cumoe_layer_t *make_layer(cumoe_ep_t *ep, int32_t hidden_size)
{
    cumoe_config_t config;
    cumoe_layer_t *layer = NULL;
    demand(cumoe_config_init(&config) == CUMOE_SUCCESS, "config");
    config.hidden_size = hidden_size;
    config.intermediate_size = 16;
    config.num_experts = 8;
    config.top_k = 2;
    config.ep = ep;
    demand(cumoe_layer_create(&layer, handle, &config) == CUMOE_SUCCESS, "cumoe_layer_create");
    return layer;
}

/* One call that all ranks make: the gates' gradients are added up. */
static cumoe_status_t step(const cumoe_layer_t *layer, cumoe_weights_t *gradients)
{
    return cumoe_ep_sum_gradients(layer, gradients, NULL);
}

/* This rank is told, in time, what has happened; and the group says so again. */
static void demand_report(cumoe_ep_t *ep, cumoe_status_t status, double seconds, const char *sentence)
{
    char first[512];
    snprintf(first, sizeof first, "%s", cumoe_last_error());
    demand(status == CUMOE_COMM_ERROR, "the failure is not reported");
    demand(strstr(first, sentence), sentence);
    demand(seconds < TIMEOUT + 1, "the failure is reported late");
    demand(cumoe_ep_wait(ep, NULL, 0) == CUMOE_COMM_ERROR, "cumoe_ep_wait() after the failure");
    demand(strcmp(first, cumoe_last_error()) == 0, "the same sentence again");
    printf("rank %d was told: %s\n", rank, first);
    fflush(stdout);
}

/* Steps until something fails, for a minute at most. A DIFFERENT rank makes another call in the fifth. */
static void run_steps(cumoe_ep_t *ep, cumoe_layer_t *layer, const char *sentence, bool different)
{
    cumoe_weights_t gradients;
    demand(cumoe_weights_create(layer, CUMOE_DTYPE_DEFAULT, &gradients) == CUMOE_SUCCESS, "cumoe_weights_create");
    cumoe_status_t status = CUMOE_SUCCESS;
    double begin = MPI_Wtime();
    const double end = begin + 60;
    for (int i = 0; status == CUMOE_SUCCESS && MPI_Wtime() < end; i++) {
        begin = MPI_Wtime();
        if (i == 4 && different) gradients.w_noise = NULL;
        status = step(layer, &gradients);
    }
    demand_report(ep, status, MPI_Wtime() - begin, sentence);
}

/* The last rank goes another way in the middle of its steps. */
static void run_failure(const char *action)
{
    const bool last = rank == num_ranks - 1;
    cumoe_ep_t *ep = make_group(TIMEOUT);
    cumoe_layer_t *layer = make_layer(ep, 512);
    if (strcmp(action, "differs") == 0) {
        run_steps(ep, layer, last ? "rank 0 makes another call" : "rank", last);
    } else if (strcmp(action, "late") == 0) {
        if (last) sleep((unsigned)TIMEOUT + 2);
        run_steps(ep, layer, last ? "has given up" : "did not come in time", false);
    } else {
        if (last) cumoe_ep_abort(ep);
        if (last) run_steps(ep, layer, "it has aborted", false);
        if (!last) run_steps(ep, layer, "", false);
    }
    cumoe_layer_destroy(layer);
    cumoe_ep_destroy(ep);
    MPI_Finalize(); /* all are alive */
}
