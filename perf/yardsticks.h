/* What the layer is measured against, both on OpenBLAS and in fp32:
 *   dense   one multilayer perceptron of width K I: the FLOPs of the experts without their routing
 *   loop    the experts one after the other, rows gathered and scattered: what one would write without a library */
#ifndef CUMOE_PERF_YARDSTICKS_H
#define CUMOE_PERF_YARDSTICKS_H

#include <stdbool.h>
#include <stdint.h>

typedef struct shape {
    int T, H, I, E, K; /* tokens, hidden, intermediate, experts, experts per token */
    bool glu;          /* SwiGLU, else ReLU */
} shape_t;

/* Expert matrices, or their gradients. */
typedef struct matrices {
    float *up, *glu; /* [E, I, H]; glu NULL with ReLU */
    float *down;     /* [E, H, I] */
} matrices_t;

/* The wall clock. */
double seconds(void);

/* Idle threads of OpenBLAS spin for some 20 ms and would take the cores from the next contestant. */
void let_threads_sleep(int threads);

/* count numbers, zero; ends the program if memory is exhausted. */
void *new_array(int64_t count, int64_t size);

typedef struct dense dense_t;

/* The dense network of experts 0..K-1 side by side. */
dense_t *dense_create(const shape_t *shape, const matrices_t *weights);
void dense_destroy(dense_t *dense);

/* With activate = false only the products, as they are timed; with true a network whose results can be compared. */
void dense_forward(dense_t *dense, const float *x, float *y, bool activate);
void dense_backward(dense_t *dense, const float *x, const float *dy, float *dx, bool activate);

/* Gradients of the last dense_backward() in the layout of experts 0..K-1. */
void dense_gradients(const dense_t *dense, const matrices_t *gradients);

typedef struct loop loop_t;
loop_t *loop_create(const shape_t *shape);
void loop_destroy(loop_t *loop);

/* expert, weight [T, K]: given; the gate is not part of the loop. */
void loop_forward(loop_t *loop, const matrices_t *weights, const float *x, const int32_t *expert,
                  const float *weight, float *y);
/* Once after each loop_forward(), whose buffers it uses up. dweight [T, K]. */
void loop_backward(loop_t *loop, const matrices_t *weights, const float *dy, const float *weight, float *dx,
                   float *dweight, const matrices_t *gradients);

#endif
