/* The products of a part as one dense network of the same operations has them, and nothing else: no gate, no
 * activation, no movement. */
#include "perf.h"

#include <math.h>
#include <stdlib.h>

struct dense {
    subject_t subject;
    device_t *device;
    blas_t *blas;
    void *a, *b, *c;
};

static bool in_gate(int part)
{
    return part == CUMOE_STAGE_GATE || part == CUMOE_STAGE_GATE_BACKWARD;
}

int dense_products(const subject_t *s, int part, product_t products[MOST_PRODUCTS])
{
    const cumoe_config_t *c = &s->config;
    const int64_t T = s->num_tokens, H = c->hidden_size, W = (int64_t)c->top_k * c->intermediate_size,
                  Z = c->top_k * z_width(c), P = (int64_t)(gate_matrices(c) * gate_columns(c, c->top_k_groups));
    product_t *p = products;
    switch (part) {
    case CUMOE_STAGE_GATE:
        if (P > 0) *p++ = (product_t){.b_transposed = true, .m = T, .n = P, .k = H};
        break;
    case CUMOE_STAGE_GATE_BACKWARD: /* dx, dw */
        if (P > 0) *p++ = (product_t){.m = T, .n = H, .k = P};
        if (P > 0) *p++ = (product_t){.a_transposed = true, .m = P, .n = H, .k = T};
        break;
    case CUMOE_STAGE_UP:
        *p++ = (product_t){.b_transposed = true, .m = T, .n = Z, .k = H};
        break;
    case CUMOE_STAGE_DOWN:
        *p++ = (product_t){.b_transposed = true, .m = T, .n = H, .k = W};
        break;
    case CUMOE_STAGE_DOWN_BACKWARD: /* d, dw */
        *p++ = (product_t){.m = T, .n = W, .k = H};
        *p++ = (product_t){.a_transposed = true, .m = H, .n = W, .k = T};
        break;
    case CUMOE_STAGE_UP_BACKWARD: /* dx, dw */
        *p++ = (product_t){.m = T, .n = H, .k = Z};
        *p++ = (product_t){.a_transposed = true, .m = Z, .n = H, .k = T};
        break;
    case INFERENCE:
    case FORWARD: /* of the experts; the gate's are not part of a dense layer */
        p += dense_products(s, CUMOE_STAGE_UP, p);
        p += dense_products(s, CUMOE_STAGE_DOWN, p);
        break;
    case BACKWARD:
        p += dense_products(s, CUMOE_STAGE_DOWN_BACKWARD, p);
        p += dense_products(s, CUMOE_STAGE_UP_BACKWARD, p);
        break;
    default:
        break;
    }
    return (int)(p - products);
}

static int type_of(const dense_t *d, int part)
{
    return blas_type(d->blas, in_gate(part) ? TYPE_F32 : d->subject.type);
}

static size_t element_size(int type)
{
    return type == TYPE_BF16 || type == TYPE_F16 ? 2 : 4;
}

/* Device memory full of random numbers, a block of them again and again; NULL without memory. */
static void *random_array(device_t *device, int type, size_t bytes)
{
    enum { BLOCK = 1 << 20 };
    const size_t block_size = BLOCK * element_size(type);
    void *array = NULL, *block = malloc(block_size);
    if (!block) abort();
    if (cumoe_memory_alloc(device->handle, bytes, &array) == CUMOE_SUCCESS) {
        input_values(dtype_of(type), BLOCK, 5, block);
        for (size_t at = 0; at < bytes; at += block_size) {
            const size_t size = bytes - at < block_size ? bytes - at : block_size;
            perf_check(cumoe_memory_copy(device->handle, (char *)array + at, block, size, CUMOE_COPY_TO_DEVICE,
                                         device->stream));
        }
        device_wait(device);
    }
    free(block);
    return array;
}

static void grow(size_t *size, int64_t elements, size_t element)
{
    if ((size_t)elements * element > *size) *size = (size_t)elements * element;
}

dense_t *dense_create(device_t *device, blas_t *blas, const subject_t *subject, char *why, size_t why_size)
{
    dense_t *d = calloc(1, sizeof *d);
    if (!d) abort();
    *d = (dense_t){.subject = *subject, .device = device, .blas = blas};
    size_t a = 0, b = 0, c = 0;
    const int type = blas_type(blas, subject->type); /* halves are numbers of F32, too, two by two */
    for (int part = 0; part < NUM_PARTS; part++) {
        product_t p[MOST_PRODUCTS];
        const int count = has_part(subject, part) ? dense_products(subject, part, p) : 0;
        for (int i = 0; i < count; i++) {
            grow(&a, p[i].m * p[i].k, element_size(type_of(d, part)));
            grow(&b, p[i].k * p[i].n, element_size(type_of(d, part)));
            grow(&c, p[i].m * p[i].n, element_size(type_of(d, part)));
        }
    }
    d->a = random_array(device, type, a);
    d->b = random_array(device, type, b);
    d->c = random_array(device, type, c);
    if ((d->a || !a) && (d->b || !b) && (d->c || !c)) return d;
    snprintf(why, why_size, "no dense products beside it: %.200s", cumoe_last_error());
    dense_destroy(d);
    return NULL;
}

void dense_destroy(dense_t *d)
{
    if (!d) return;
    cumoe_memory_free(d->device->handle, d->a);
    cumoe_memory_free(d->device->handle, d->b);
    cumoe_memory_free(d->device->handle, d->c);
    free(d);
}

void dense_run(dense_t *d, int part)
{
    product_t p[MOST_PRODUCTS];
    const int count = dense_products(&d->subject, part, p), type = type_of(d, part);
    for (int i = 0; i < count; i++) blas_product(d->blas, type, &p[i], d->a, d->b, d->c);
}

/* ---- checks ---- */

static float read_element(const dense_t *d, int type, const void *array, int64_t index)
{
    uint32_t bits = 0;
    perf_check(cumoe_memory_copy(d->device->handle, &bits, (const char *)array + (size_t)index * element_size(type),
                                 element_size(type), CUMOE_COPY_TO_HOST, d->device->stream));
    device_wait(d->device);
    return input_widen(dtype_of(type), bits);
}

/* The last element of a product, cut down to a size that is read quickly. */
static bool product_is_right(dense_t *d, int type, product_t p)
{
    enum { MOST = 48 };
    double sum = 0, size = 0;
    p.m = p.m < MOST ? p.m : MOST;
    p.n = p.n < MOST ? p.n : MOST - 1;
    p.k = p.k < MOST ? p.k : MOST - 2;
    blas_product(d->blas, type, &p, d->a, d->b, d->c);
    for (int64_t i = 0; i < p.k; i++) {
        const int64_t in_a = p.a_transposed ? i * p.m + p.m - 1 : (p.m - 1) * p.k + i;
        const int64_t in_b = p.b_transposed ? (p.n - 1) * p.k + i : i * p.n + p.n - 1;
        const double term = (double)read_element(d, type, d->a, in_a) * (double)read_element(d, type, d->b, in_b);
        sum += term;
        size += fabs(term);
    }
    const double unit = type == TYPE_BF16   ? 0x1p-8
                        : type == TYPE_F16  ? 0x1p-11
                        : type == TYPE_TF32 ? 0x1p-10
                                            : 1e-6;
    return fabs((double)read_element(d, type, d->c, p.m * p.n - 1) - sum) <= unit * size;
}

/* Of a routing that gives each token K rows. */
static double flop_of(const subject_t *s, int part)
{
    const counts_t counts = {.rows = s->num_tokens * s->config.top_k, .experts = 1};
    const work_t work = work_of(s, &counts, part);
    return in_gate(part) ? work.flop : work.flop - work.gate_flop;
}

bool dense_check(dense_t *d, char *why, size_t why_size)
{
    for (int part = 0; part < NUM_PARTS; part++) {
        product_t p[MOST_PRODUCTS];
        double flop = 0;
        const int count = has_part(&d->subject, part) ? dense_products(&d->subject, part, p) : 0;
        for (int i = 0; i < count; i++) {
            flop += 2 * (double)p[i].m * (double)p[i].n * (double)p[i].k;
            if (product_is_right(d, type_of(d, part), p[i])) continue;
            snprintf(why, why_size, "wrong: a dense product of %s is not what its operands give", part_names[part]);
            return false;
        }
        if (count == 0 || fabs(flop - flop_of(&d->subject, part)) <= 1e-12 * flop) continue;
        snprintf(why, why_size, "wrong: the dense products of %s have %.17g FLOP, and the part has %.17g",
                 part_names[part], flop, flop_of(&d->subject, part));
        return false;
    }
    return true;
}

double dense_peak(device_t *device, blas_t *blas, int type)
{
    enum { ROUNDS = 5 };
    const int64_t n = device->cpu ? 2048 : 8192;
    const size_t bytes = (size_t)(n * n) * element_size(type);
    const product_t p = {.b_transposed = true, .m = n, .n = n, .k = n};
    void *a = random_array(device, type, bytes), *b = random_array(device, type, bytes),
         *c = random_array(device, type, bytes);
    double best = 0;
    for (int round = 0; a && b && c && round < ROUNDS; round++) {
        device_start_clock(device);
        blas_product(blas, type, &p, a, b, c);
        const double rate = 2.0 * (double)n * (double)n * (double)n / device_stop_clock(device);
        if (rate > best) best = rate;
    }
    cumoe_memory_free(device->handle, a);
    cumoe_memory_free(device->handle, b);
    cumoe_memory_free(device->handle, c);
    return best;
}
