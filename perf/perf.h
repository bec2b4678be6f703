/* The parts of the program cumoe-perf. README.md says what its figures mean. */
#ifndef CUMOE_PERF_PERF_H
#define CUMOE_PERF_PERF_H

#include "models.h"

#include <cumoe/cumoe.h>
#include <stdbool.h>
#include <stdio.h>

/* What is timed: the stages by their numbers, then calls of the layer. */
enum {
    INFERENCE = CUMOE_NUM_STAGES, /* forward without noise, nothing saved */
    FORWARD,                      /* in training */
    BACKWARD,
    BOTH,      /* no call: in every round the times of the two added */
    OPTIMIZER, /* a step of Adam */
    NUM_PARTS
};
extern const char *const part_names[NUM_PARTS];

/* As bits, 1 << part: those that need gradients. */
enum {
    OF_BACKWARD = 1 << CUMOE_STAGE_DOWN_BACKWARD | 1 << CUMOE_STAGE_GATE_BACKWARD | 1 << CUMOE_STAGE_UP_BACKWARD |
                  1 << CUMOE_STAGE_PERMUTE_BACKWARD | 1 << BACKWARD | 1 << BOTH | 1 << OPTIMIZER
};

/* Who does it. The two yardsticks do the products of a part with a library for dense ones. */
enum { CUMOE, DENSE, LOOP, CONTESTANTS };
extern const char *const contestant_names[CONTESTANTS];

/* The axes; those with more than one value are columns of the table. NULL ends words. */
enum {
    AXIS_SHAPE,
    AXIS_TOKENS,
    AXIS_EXPERTS,
    AXIS_TYPE,
    AXIS_ACTIVATION,
    AXIS_GATE,
    AXIS_SKEW,
    AXIS_CACHE,
    AXIS_LAUNCH,
    AXIS_RANKS,    /* of exchange alone, */
    AXIS_CAPACITY, /* as this */
    AXIS_CHUNKS,   /* and this */
    AXES
};
enum { UNIFORM, ZIPF, ONE };
extern const char *const skew_words[];
enum { WARM, COLD };
extern const char *const cache_words[];
enum { CALL, GRAPH };
extern const char *const launch_words[];
extern const char *const type_words[]; /* "bf16", "f16", "f32", "tf32" */
enum { TYPE_BF16, TYPE_F16, TYPE_F32, TYPE_TF32, TYPES };
static inline cumoe_dtype_t dtype_of(int type)
{
    return type == TYPE_BF16 ? CUMOE_BF16 : type == TYPE_F16 ? CUMOE_F16 : CUMOE_F32;
}

/* What is measured together: one layer, one T, some parts. */
typedef struct subject {
    const char *shape; /* a name, or "own" */
    cumoe_config_t config;
    int type;
    int64_t num_tokens;
    int skew, cache, launch;
    int32_t num_ranks; /* 0: none; num_tokens is of each */
    unsigned parts;    /* bit 1 << part */
} subject_t;

static inline bool has_part(const subject_t *s, int part)
{
    return (s->parts >> part & 1) != 0;
}

/* What the routing came to. */
typedef struct counts {
    int64_t rows, experts, most; /* R, experts with rows, rows of the busiest */
} counts_t;

/* ---- sizes that follow from a configuration ---- */

bool is_glu(const cumoe_config_t *config);
static inline int64_t z_width(const cumoe_config_t *c)
{
    return (int64_t)c->intermediate_size * (is_glu(c) ? 2 : 1);
}
static inline size_t token_size(const cumoe_config_t *c)
{
    return c->dtype == CUMOE_F32 ? 4 : 2;
}

/* ---- device: one handle, one stream, and what CUDA's runtime has beside the library ---- */

typedef struct device {
    cumoe_handle_t *handle;
    cumoe_stream_t stream;
    bool cpu;
    int threads;        /* of the CPU; 0 = all */
    int ordinal;        /* of a GPU */
    void *start, *stop; /* events of CUDA, or NULL */
    double started;
} device_t;

/* Ends the program with a sentence; status 77 if there is no such device. */
void device_open(device_t *device, int backend, int ordinal);
void device_close(device_t *device);
/* Another thread's, with a stream and a clock of its own. */
void device_share(device_t *device, const device_t *with);
void device_unshare(device_t *device);
/* The GPU of a rank, by its number on this machine, and how many ranks have the same one. */
int device_of_rank(int ordinal, int local);
int device_sharers(int local_count);
void device_wait(const device_t *device);
/* Bytes of free memory. */
double device_memory(const device_t *device);

/* Seconds from start to stop, as the device sees it: without the time that the host waits for it. One at a time. */
void device_start_clock(device_t *device);
double device_stop_clock(device_t *device);

/* Everything enqueued between the two, to be launched again; CUDA alone. */
typedef struct graph graph_t;
bool device_has_graphs(const device_t *device);
void device_start_graph(const device_t *device);
graph_t *device_stop_graph(const device_t *device);
void device_launch(const device_t *device, const graph_t *graph);
void device_free_graph(graph_t *graph);

/* ---- blas: a library for dense products, found when the program runs ---- */

/* c [m, n] = a b (add: c += a b), all row-major; a is [m, k], or its transpose is stored, [k, m]; so with b. */
typedef struct product {
    bool a_transposed, b_transposed, add;
    int64_t m, n, k;
} product_t;

typedef struct blas blas_t;

/* OpenBLAS or cuBLAS; file NULL = where the system has it. NULL with a sentence if there is none. */
blas_t *blas_open(device_t *device, const char *file, char *why, size_t why_size);
void blas_close(blas_t *blas);
const char *blas_name(const blas_t *blas);
/* The type in which the library has products for a type of ours: on the CPU always F32. */
int blas_type(const blas_t *blas, int type);
void blas_product(blas_t *blas, int type, const product_t *product, const void *a, const void *b, void *c);

/* ---- dense: the products of a part, as if its experts were one dense network ---- */

enum { MOST_PRODUCTS = 4 };
/* Their number; 0 for parts without products. */
int dense_products(const subject_t *subject, int part, product_t products[MOST_PRODUCTS]);

typedef struct dense dense_t;
/* NULL, with a sentence, without memory. */
dense_t *dense_create(device_t *device, blas_t *blas, const subject_t *subject, char *why, size_t why_size);
void dense_destroy(dense_t *dense);
void dense_run(dense_t *dense, int part);
/* False, with a sentence, if the products are not those of the part, or one is wrong. */
bool dense_check(dense_t *dense, char *why, size_t why_size);
/* FLOP a second of a large product. */
double dense_peak(device_t *device, blas_t *blas, int type);

/* ---- loop: the experts one after the other, gathered and scattered by hand; F32 on the CPU ---- */

typedef struct loop loop_t;
/* weights: of the layer, borrowed. NULL where it does not do what the subject does. */
loop_t *loop_create(blas_t *blas, const subject_t *subject, const cumoe_weights_t *weights);
void loop_destroy(loop_t *loop);
/* expert, weight [T, K]: given; the gate is not part of the loop. */
void loop_forward(loop_t *loop, const float *x, const int32_t *expert, const float *weight);
/* After loop_forward(). */
void loop_backward(loop_t *loop, const float *dy, const float *weight);
/* The largest relative difference of y and of the gradients of matrices (NULL: of y). */
double loop_difference(const loop_t *loop, const float *y, const cumoe_weights_t *gradients);

/* ---- bench: a layer with all its buffers, and its yardsticks ---- */

typedef struct bench bench_t;

/* blas may be NULL. NULL, with a sentence, where the device has no kernel for the subject or not enough memory. */
bench_t *bench_create(device_t *device, blas_t *blas, const subject_t *subject, char *why, size_t why_size);
void bench_destroy(bench_t *bench);

/* Run everything once. False, with a sentence, if a result is wrong: not as in the formulas, for some tokens and
 * columns; of other bits by the stages one by one, or by the layer on three multiprocessors and another stream; or
 * not as the yardsticks have it. error: the largest relative error. */
bool bench_check(bench_t *bench, double *error, char *why, size_t why_size);

/* NULL, or why a part is not measured; part -1: why there is nothing dense beside it. */
const char *bench_left_out(const bench_t *bench, int part);
bool bench_takes_part(const bench_t *bench, int contestant, int part);
void bench_enqueue(bench_t *bench, int contestant, int part);
counts_t bench_counts(const bench_t *bench);
const subject_t *bench_subject(const bench_t *bench);
device_t *bench_device(const bench_t *bench);

/* ---- input: random data ---- */

/* [T, H] multiples of 1/128 in -1..1, which every type holds; with ones, column 0 is 1. */
void input_tokens(const subject_t *subject, bool ones, uint64_t seed, void *values);
/* count values of a type, the same kind of numbers. */
void input_values(cumoe_dtype_t dtype, int64_t count, uint64_t seed, void *values);
/* A number of a type, from its bits. */
float input_widen(cumoe_dtype_t dtype, uint32_t bits);
/* [E, H], or [G, H] of the groups: logits of unit variance, and by column 0 the skew. */
void input_gate(const subject_t *subject, bool groups, float *w_gate);
/* [T, K]: K experts for each token, different ones, and their weights. */
void input_routing(const subject_t *subject, uint64_t seed, int32_t *expert, float *weight);

/* ---- work: what a part must do at least ---- */

typedef struct work {
    double flop, bytes;
    double gate_flop; /* of flop: products of the gate type */
} work_t;

work_t work_of(const subject_t *subject, const counts_t *counts, int part);
double gate_columns(const cumoe_config_t *config, double choices);
double gate_matrices(const cumoe_config_t *config);

/* False, with a sentence, if the stages do not add up to what cumoe_config_cost() counts. */
bool work_agrees(const subject_t *subject, char *why, size_t why_size);

/* ---- clock ---- */

typedef struct spread {
    double median, p95, min, max;
} spread_t;

typedef struct times {
    int samples, calls;          /* 0 samples: not measured; calls of a sample */
    spread_t seconds;            /* of a call */
    spread_t ratio[CONTESTANTS]; /* of ours: theirs over it, round by round; median 0: none */
} times_t;

/* Everybody in turns, until the spread settles or for so many seconds; 0: a single call of each. */
void clock_parts(bench_t *bench, double seconds, times_t times[CONTESTANTS][NUM_PARTS],
                 void (*progress)(void *, const char *), void *context);
enum { FEWEST_ROUNDS = 3, SETTLED_ROUNDS = 7, MOST_ROUNDS = 25, WARM_UP_ROUNDS = 5, MOST_CALLS = 1000 };
/* How many calls make a sample, from the time of so many; negative: minus it are to be timed first. */
int clock_calls(int calls, double seconds, int most);
/* Sorts them. */
spread_t clock_spread(double *values, int count);
/* Whether the middle half of the samples lies near their median. */
bool clock_settled(const double *values, int count);
/* Bytes that the device's memory reads and writes a second, at best; 0 without room to try. */
double clock_memory(device_t *device);
double clock_now(void);

/* ---- report: a Markdown table, CSV and JSON ---- */

enum { MOST_SENTENCES = 1000 };

typedef struct peaks {
    double flops[TYPES]; /* of dense products, by type; 0 = not known */
    double bytes;        /* a second */
} peaks_t;

typedef struct report {
    device_t *device;
    const char *blas; /* the library, or why there is none */
    const char *commit;
    peaks_t peaks;
    bool varies[AXES];
    bool exchange;            /* ranks: another table */
    bool per_token;           /* ns a token in place of us a call, and the floor beside it */
    FILE *table, *csv, *json; /* NULL = none */
    int rows, sentences;
    char *sentence[MOST_SENTENCES][2]; /* about what, and why */
} report_t;

void report_begin(report_t *report, const subject_t *first, int argc, char **argv);
void report_rows(report_t *report, const bench_t *bench, double error, times_t times[CONTESTANTS][NUM_PARTS]);
/* Why something was not measured. part -1: the whole subject. */
void report_sentence(report_t *report, const subject_t *subject, int part, const char *sentence);
/* False if a file could not be written. */
bool report_end(report_t *report);

/* End the program with the library's sentence. */
void perf_check(cumoe_status_t status);

#endif
