/* What tests of the transport over NCCL have in common: the library in place of NCCL, and a group of one rank. */
#ifndef CUMOE_TESTS_NCCL_GROUP_H
#define CUMOE_TESTS_NCCL_GROUP_H

#include "tests/parallel/nccl_stand_in.h"
#include "tests/parallel/turns.h"
#include "tests/sim/simulator.h"

#include <dlfcn.h>
#include <stdlib.h>

static struct {
    stand_in_fail_t *fail;
    stand_in_failed_t *failed;
    stand_in_live_t *live;
    stand_in_misuse_t *misuse;
    stand_in_version_t *version;
    stand_in_alone_t *alone;
    stand_in_blocking_t *blocking;
    stand_in_elsewhere_t *elsewhere;
} stand_in;

static inline void load(int flags)
{
    void *library = dlopen(NCCL_STAND_IN, RTLD_NOW | flags);
    cr_assert(library, "%s", dlerror());
#define FIND(name) *(void **)&stand_in.name = dlsym(library, "stand_in_" #name)
    FIND(fail);
    FIND(failed);
    FIND(live);
    FIND(misuse);
    FIND(version);
    FIND(alone);
    FIND(blocking);
    FIND(elsewhere);
#undef FIND
}

static inline void use_stand_in(void)
{
    load(RTLD_LOCAL);
    setenv("CUMOE_NCCL", NCCL_STAND_IN, 1);
}

/* Nothing is left, and nothing was done that NCCL would not survive. */
static inline void expect_clean(int live)
{
    cr_expect_eq(stand_in.live(), live, "%d communicators are left", stand_in.live() - live);
    cr_expect_eq(stand_in.misuse(), 0, "%d calls that NCCL would not survive", stand_in.misuse());
}

static const layer_case_t CASE = {"nccl", 24, 8, 12, 6, 2, .pattern = PATTERN_RANDOM};

static inline void make_problem(problem_t *p, const cumoe_handle_t *handle)
{
    const problem_options_t options = {.dtype = CUMOE_F32,
                                       .variant = GATE_VARIANTS[VARIANT_NOISY],
                                       .seed = random_seed("nccl", 51),
                                       .max_threads = 1,
                                       .without_reference = true};
    report_t report = {0};
    cr_assert(problem_create(p, handle, &CASE, &options, &report), "%s", report.text);
}

/* A group of one, or the status of the call that failed. */
static inline cumoe_status_t join_alone(cumoe_ep_t **ep, const cumoe_handle_t *handle)
{
    cumoe_ep_id_t id;
    const cumoe_status_t status = cumoe_ep_id_create(&id);
    if (status != CUMOE_SUCCESS) return status;
    const cumoe_ep_args_t args = {.struct_size = sizeof args, .id = &id, .num_ranks = 1, .timeout = 20};
    return cumoe_ep_create(ep, handle, &args);
}

#endif
