/* The parts of the program cumoe-perf-stages. README.md says what its figures mean. */
#ifndef CUMOE_PERF_STAGES_H
#define CUMOE_PERF_STAGES_H

#include "models.h"

#include <cumoe/cumoe.h>
#include <stdbool.h>
#include <stdio.h>

/* What is timed: the stages by their numbers, then whole calls. */
enum {
    INFERENCE = CUMOE_NUM_STAGES, /* forward without noise, nothing saved */
    FORWARD,                      /* in training */
    FORWARD_BACKWARD,
    OPTIMIZER, /* a step of Adam */
    NUM_PARTS
};
extern const char *const part_names[NUM_PARTS];

enum { UNIFORM, ZIPF, ONE };
extern const char *const skew_words[]; /* NULL ends them */

/* One layer, one type, one T. */
typedef struct subject {
    const model_t *model;
    cumoe_config_t config;
    const char *dtype; /* "bf16", "f16", "f32" or "tf32" */
    int64_t num_tokens;
    int skew;
} subject_t;

/* What the routing came to. */
typedef struct counts {
    int64_t rows, experts, most; /* R, experts with rows, rows of the busiest */
} counts_t;

/* ---- bench: a layer with all its buffers ---- */

typedef struct bench bench_t;

/* NULL, with a sentence, where the device has no kernel for the subject or not enough memory. */
bench_t *bench_create(cumoe_handle_t *handle, cumoe_stream_t stream, const subject_t *subject, char *why,
                      size_t why_size);
void bench_destroy(bench_t *bench);

/* Run everything once. False, with a sentence, if results are not finite, or if y and dx have other bits by the
 * stages one by one, or by the layer on three multiprocessors and another stream. */
bool bench_check(bench_t *bench, char *why, size_t why_size);

/* NULL, or why a part is not measured. */
const char *bench_left_out(const bench_t *bench, int part);
void bench_enqueue(bench_t *bench, int part);
void bench_wait(const bench_t *bench);
counts_t bench_counts(const bench_t *bench);

/* ---- input: random data ---- */

/* [T, H] multiples of 1/128 in -1..1, which every type holds; with ones, column 0 is 1. */
void input_tokens(const subject_t *subject, bool ones, uint64_t seed, void *values);
/* [E, H]: logits of unit variance, and by column 0 the skew. */
void input_gate(const subject_t *subject, float *w_gate);
/* [T, K]: K experts for each token, different ones, and their weights. */
void input_routing(const subject_t *subject, int32_t *expert, float *weight);

/* ---- work: what a part must do at least ---- */

typedef struct work {
    double flop, bytes;
    double gate_flop; /* of flop: products of the gate type */
} work_t;

work_t work_of(const subject_t *subject, const counts_t *counts, int part);

/* False, with a sentence on stderr, if the stages do not add up to what cumoe_config_cost() counts. */
bool work_agrees(const subject_t *subject);

/* ---- clock ---- */

typedef struct times {
    double median, min, max; /* seconds of a call */
    int samples, calls;      /* calls of a sample, between two synchronisations */
} times_t;

/* All parts in turns, for so many seconds; 0: a single call of each. A part that is left out gets 0 samples. */
void clock_parts(bench_t *bench, double seconds, times_t times[NUM_PARTS]);

/* Bytes read and written a second by copies on the device; 0, with a sentence on stderr, without the memory. */
double clock_copy(const cumoe_handle_t *handle, cumoe_stream_t stream);
double clock_now(void);

/* ---- report ---- */

typedef struct rates {
    double bf16, f16, f32, tf32; /* FLOP a second of a dense product, measured elsewhere; 0 = not known */
    double bytes;                /* a second */
    bool bytes_measured;         /* by this program */
} rates_t;

typedef struct report {
    const cumoe_handle_t *handle;
    rates_t rates;
    double seconds;
    FILE *json; /* NULL = none */
    bool any_row, any_sentence;
    char sentences[4000]; /* JSON strings with commas */
} report_t;

void report_begin(report_t *report, int argc, char **argv);
void report_rows(report_t *report, const subject_t *subject, const bench_t *bench, const times_t times[NUM_PARTS]);
/* A sentence about the subject: what is left out, or what is wrong. */
void report_sentence(report_t *report, const subject_t *subject, const char *sentence);
/* False if the JSON file could not be written. */
bool report_end(report_t *report);

/* End the program with the library's sentence. */
void stages_check(cumoe_status_t status);

#endif
