/* The formulas of cumoe/optimizer.h in double precision. */
#include "optimizer_problem.h"

#include <math.h>

typedef struct step_numbers {
    double rate, scale, beta1, beta2, epsilon, decay, correction1, correction2; /* corrections: 1 - beta^t */
    double unit;   /* of rounding of the library's arithmetic */
    double errors; /* roundings in a row behind an update; those of t steps, and of the corrections, come on top */
} step_numbers_t;

static step_numbers_t read_numbers(const optimizer_problem_t *p, const cumoe_optimizer_call_t *call)
{
    const cumoe_optimizer_args_t *a = &p->args;
    const double t = call->step > 1 ? (double)call->step : 1;
    step_numbers_t s = {.rate = call->learning_rate,
                        .scale = call->gradient_scale == 0 ? 1 : call->gradient_scale,
                        .beta1 = (double)(a->beta1 == 0 ? 0.9f : a->beta1),
                        .beta2 = (double)(a->beta2 == 0 ? 0.999f : a->beta2),
                        .epsilon = (double)(a->epsilon == 0 ? 1e-8f : a->epsilon),
                        .decay = (double)a->weight_decay};
    s.correction1 = 1 - pow(s.beta1, t);
    s.correction2 = 1 - pow(s.beta2, t);
    s.unit = real_rounding_unit(p->layer.options.dtype == CUMOE_F64 ? CUMOE_F64 : CUMOE_F32);
    s.errors = 24 + t + 0x1p-53 / s.unit * (1 / s.correction1 + 1 / s.correction2);
    return s;
}

/* value -= rate * (direction + decay * value); scale is the size of what direction was made of. */
static void move(optimizer_numbers_t *n, const step_numbers_t *s, int64_t i, double direction, double scale,
                 double errors)
{
    const double w = n->value[i];
    n->value[i] = w - s->rate * (direction + s->decay * w);
    n->tolerance[i] += s->unit * (fabs(w) + s->rate * (errors * scale + 8 * s->decay * fabs(w)));
}

static void expect_adam(optimizer_numbers_t *n, const step_numbers_t *s)
{
    for (int64_t i = 0; i < n->elements; i++) {
        const double g = s->scale * n->gradient[i];
        n->moment1[i] = s->beta1 * n->moment1[i] + (1 - s->beta1) * g;
        n->moment1_size[i] = s->beta1 * n->moment1_size[i] + (1 - s->beta1) * fabs(g);
        n->moment2[i] = s->beta2 * n->moment2[i] + (1 - s->beta2) * g * g;
        const double divisor = s->correction1 * (sqrt(n->moment2[i] / s->correction2) + s->epsilon);
        move(n, s, i, n->moment1[i] / divisor, n->moment1_size[i] / divisor, s->errors);
    }
}

/* value, gradient and means of one expert. */
static void expect_factored(optimizer_numbers_t *n, const step_numbers_t *s, int64_t expert)
{
    const int64_t rows = n->rows, cols = n->cols, first = expert * rows * cols;
    double *r = n->row_mean + expert * rows, *c = n->col_mean + expert * cols, mean = 0;
    for (int64_t i = 0; i < rows; i++) r[i] *= s->beta2;
    for (int64_t j = 0; j < cols; j++) c[j] *= s->beta2;
    for (int64_t e = 0; e < rows * cols; e++) {
        const double g = s->scale * n->gradient[first + e], part = (1 - s->beta2) * (g * g + 1e-30);
        r[e / cols] += part / (double)cols;
        c[e % cols] += part / (double)rows;
    }
    for (int64_t i = 0; i < rows; i++) mean += r[i] / (double)rows;
    for (int64_t e = 0; e < rows * cols; e++) {
        const double v = r[e / cols] * c[e % cols] / mean;
        const double direction = s->scale * n->gradient[first + e] / sqrt(v / s->correction2);
        move(n, s, first + e, direction, fabs(direction), s->errors + (double)(rows + cols));
    }
}

/* The state of a first step, and its values: those that are there. */
static void begin(const optimizer_problem_t *p, problem_matrix_t matrix)
{
    const optimizer_numbers_t *n = &p->numbers[matrix];
    problem_matrix_get(&p->layer, &p->layer.weights, matrix, n->value);
    for (int64_t i = 0; i < n->elements; i++) {
        n->moment1[i] = n->moment1_size[i] = n->moment2[i] = n->tolerance[i] = 0;
        n->row_mean[i] = n->col_mean[i] = 0;
    }
}

void optimizer_expect_step(optimizer_problem_t *p)
{
    const cumoe_optimizer_call_t *call = p->args.call ? p->args.call : &p->args.values;
    const step_numbers_t s = read_numbers(p, call);
    for (problem_matrix_t m = 0; m < NUM_MATRICES && !call->skip; m++) {
        optimizer_numbers_t *n = &p->numbers[m];
        const bool matrix = m == MATRIX_UP || m == MATRIX_GLU || m == MATRIX_DOWN;
        if (problem_has_matrix(&p->layer, m) && call->step <= 1) begin(p, m);
        if (!optimizer_has_gradient(p, m)) continue;
        problem_matrix_get(&p->layer, &p->layer.gradients, m, n->gradient);
        if (!matrix || p->args.optimizer == CUMOE_OPTIMIZER_ADAM)
            expect_adam(n, &s);
        else
            for (int64_t e = 0; e < p->layer.experts; e++) expect_factored(n, &s, e);
    }
}
