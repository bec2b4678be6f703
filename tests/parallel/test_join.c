/* How a group of GPUs is asked for: wrong arguments and wrong environments get a sentence before NCCL is looked
 * for. */
#include "tests/suite.h"
#include "tests/unit/refusal.h"

#include <math.h>
#include <stdlib.h>

static const char F[] = "cumoe_ep_create";

typedef struct fixture {
    cumoe_handle_t *handle;
    cumoe_ep_t *untouched, *ep;
    report_t report;
} fixture_t;

static void set_up(fixture_t *x)
{
    *x = (fixture_t){.handle = suite_handle(), .untouched = (cumoe_ep_t *)(uintptr_t)0x1234};
    x->ep = x->untouched;
    setenv("CUMOE_NCCL", "/nowhere/libnccl.so.2", 1);
}

static void tear_down(fixture_t *x)
{
    cr_expect(x->ep == x->untouched);
    cumoe_handle_destroy(x->handle);
    EXPECT_EMPTY(x->report);
}

static bool is_gpu(const fixture_t *x)
{
    return cumoe_handle_backend(x->handle) == CUMOE_BACKEND_CUDA;
}

Test(join, needs_a_gpu)
{
    fixture_t x;
    set_up(&x);
    expect_refusal(&x.report, cumoe_ep_create(NULL, x.handle, NULL), CUMOE_INVALID_ARGUMENT, F, "ep", "NULL");
    expect_refusal(&x.report, cumoe_ep_create(&x.ep, NULL, NULL), CUMOE_INVALID_ARGUMENT, F, "handle", "NULL");
    if (!is_gpu(&x)) {
        expect_refusal(&x.report, cumoe_ep_create(&x.ep, x.handle, NULL), CUMOE_UNSUPPORTED_DEVICE, F, "handle",
                       "CPU");
        cr_expect(strstr(cumoe_last_error(), "cumoe_ep_create_local()"), "%s", cumoe_last_error());
        cr_expect(strstr(cumoe_last_error(), "cumoe_ep_create_mpi()"), "%s", cumoe_last_error());
    }
    tear_down(&x);
}

Test(join, ids)
{
    fixture_t x;
    set_up(&x);
    cumoe_handle_t *gpu = NULL;
    cumoe_ep_id_t id;
    memset(&id, 77, sizeof id);
    const char *f = "cumoe_ep_id_create";
    expect_refusal(&x.report, cumoe_ep_id_create(NULL), CUMOE_INVALID_ARGUMENT, f, "id", "NULL");
    const bool opened = cumoe_handle_create(&gpu, CUMOE_BACKEND_CUDA, 0) == CUMOE_SUCCESS;
    const bool built = opened || !strstr(cumoe_last_error(), "built without");
    const cumoe_status_t status = cumoe_ep_id_create(&id);
    if (built) {
        cr_expect_eq(status, CUMOE_COMM_ERROR, "%s", cumoe_last_error());
        cr_expect(strstr(cumoe_last_error(), "/nowhere/libnccl.so.2"), "%s", cumoe_last_error());
    } else {
        expect_refusal(&x.report, status, CUMOE_UNSUPPORTED_DEVICE, f, "id", "without CUDA");
        cr_expect(strstr(cumoe_last_error(), "cumoe_ep_create_local()"), "%s", cumoe_last_error());
    }
    for (size_t i = 0; i < sizeof id; i++) cr_expect_eq(id.bytes[i], 77);
    cumoe_handle_destroy(gpu);
    tear_down(&x);
}

/* Arguments that are right but for CHANGE. */
#define REFUSE(change, argument, value)                                                                            \
    do {                                                                                                           \
        cumoe_ep_args_t a = {.struct_size = sizeof a, .id = &id, .rank = 1, .num_ranks = 4};                       \
        change;                                                                                                    \
        expect_refusal(&x.report, cumoe_ep_create(&x.ep, x.handle, &a), CUMOE_INVALID_ARGUMENT, F, argument,       \
                       value);                                                                                     \
    } while (0)

Test(join, arguments)
{
    fixture_t x;
    set_up(&x);
    cumoe_ep_id_t id = {{0}};
    if (!is_gpu(&x)) {
        tear_down(&x);
        return;
    }
    REFUSE(a.struct_size = 0, "args.struct_size", "0");
    REFUSE(a.struct_size = sizeof a - 8, "args.struct_size", NULL);
    REFUSE(a.timeout = -1, "timeout", "-1");
    REFUSE(a.timeout = NAN, "timeout", "nan");
    REFUSE(a.timeout = INFINITY, "timeout", "inf");
    REFUSE(a.num_ranks = 0, "args.num_ranks", "0");
    REFUSE(a.num_ranks = -4, "args.num_ranks", "-4");
    REFUSE(a.num_ranks = 1025, "args.num_ranks", "1025");
    REFUSE(a.rank = -1, "args.rank", "-1");
    REFUSE(a.rank = 4, "args.rank = 4", "0..3");
    REFUSE(a.id = NULL, "args.rank = 1", "environment");
    REFUSE((a.id = NULL, a.rank = 0), "args.num_ranks = 4", "environment");
    REFUSE(a.nccl_comm = &x, "args.id", "NULL");
    REFUSE((a.nccl_comm = &x, a.id = NULL), "args.rank = 1", "nccl_comm");
    REFUSE((a.nccl_comm = &x, a.id = NULL, a.rank = 0), "args.num_ranks = 4", "nccl_comm");
    tear_down(&x);
}

static const char *const VARIABLES[] = {"RANK",         "WORLD_SIZE",        "MASTER_ADDR", "MASTER_PORT",
                                        "SLURM_NTASKS", "CUMOE_MASTER_PORT", "SLURM_PROCID"};

/* Values of these variables, up to the last that is set; NULL = not there. */
typedef struct environment {
    const char *values[7], *argument, *value;
} environment_t;

static const environment_t WRONG[] = {
    {{NULL}, "WORLD_SIZE", "environment"},
    {{"0"}, "WORLD_SIZE", "environment"},
    {{NULL, "2"}, "RANK", "environment"},
    {{"0", "0"}, "WORLD_SIZE = \"0\"", "1..1024"},
    {{"0", ""}, "WORLD_SIZE = \"\"", "1..1024"},
    {{"0", "2x"}, "WORLD_SIZE = \"2x\"", "1..1024"},
    {{"0", "1025"}, "WORLD_SIZE = \"1025\"", "1..1024"},
    {{"0", "99999999999999999999"}, "WORLD_SIZE", "1..1024"},
    {{"2", "2"}, "RANK = \"2\"", "0..1"},
    {{"-1", "2"}, "RANK = \"-1\"", "0..1"},
    {{"one", "2"}, "RANK = \"one\"", "0..1"},
    {{"4294967296", "2"}, "RANK", "0..1"},
    {{"0", "2"}, "MASTER_ADDR", "environment"},
    {{"0", "2", ""}, "MASTER_ADDR", "environment"},
    {{"0", "2", "localhost"}, "MASTER_PORT", "environment"},
    {{"0", "2", "localhost", "0"}, "MASTER_PORT = \"0\"", "1..65534"},
    {{"0", "2", "localhost", "65535"}, "MASTER_PORT = \"65535\"", "1..65534"},
    {{"0", "2", "localhost", "-1"}, "MASTER_PORT = \"-1\"", "1..65534"},
    {{"0", "2", "localhost", "29500", NULL, "65536"}, "CUMOE_MASTER_PORT = \"65536\"", "1..65535"},
    {{NULL, NULL, NULL, NULL, NULL, NULL, "0"}, "SLURM_NTASKS", "environment"},
    {{NULL, NULL, NULL, NULL, "3", NULL, "3"}, "SLURM_PROCID = \"3\"", "0..2"},
    {{"0", NULL, NULL, NULL, "3", NULL, "1"}, "WORLD_SIZE", "environment"},
};

Test(join, environments)
{
    fixture_t x;
    set_up(&x);
    for (size_t i = 0; is_gpu(&x) && i < sizeof WRONG / sizeof WRONG[0]; i++) {
        for (int v = 0; v < 7; v++) {
            unsetenv(VARIABLES[v]);
            if (WRONG[i].values[v]) setenv(VARIABLES[v], WRONG[i].values[v], 1);
        }
        expect_refusal(&x.report, cumoe_ep_create(&x.ep, x.handle, NULL), CUMOE_INVALID_ARGUMENT, F,
                       WRONG[i].argument, WRONG[i].value);
    }
    tear_down(&x);
}
