/* The model: embedding sum -> h = x + layer(x) -> softmax over the characters. The layer is cumoe's. */
#ifndef MODEL_H
#define MODEL_H

#include "dense.h"
#include "device.h"
#include "protocol.h"

typedef struct model {
    /* The caller's. */
    const device_t *device;
    const kind_t *kind;
    int symbols; /* V */
    int batch;   /* the most characters in a call, of all ranks together */
    uint64_t seed;
    cumoe_optimizer_t optimizer; /* of the layer */
    const cumoe_ep_t
        *ep; /* ranks that train one model: each has its part of a batch, and its experts; NULL = one */

    cumoe_layer_t *layer;
    cumoe_weights_t weights, gradients;
    void *state; /* of the optimizer */
    size_t state_size;

    parameter_t embedding, projection; /* ours, on the host; the latter is the softmax matrix */
    softmax_t softmax;

    mirror_t x, y, dy, dx;        /* [batch, WIDTH] */
    mirror_t index, index_weight; /* [batch] external routing of the dense layer: expert 0, weight 1 */
    mirror_t expert_offset;       /* [batch + 1] strictly balanced: where the choices of a character begin */
    mirror_t threshold;           /* [E] strictly balanced: the smallest gates that the experts took */
    mirror_t expert, gate;        /* [batch, TOP_K] the experts of every character and their weights */
    mirror_t importance, load;    /* [E] */
    mirror_t sum;                 /* with ranks: for what is added up over them */
    void *workspace, *saved;
    size_t workspace_size, saved_size;
} model_t;

/* Makes everything from the first fields. */
void model_create(model_t *model);
void model_destroy(model_t *model);

/* The part of a batch that this rank has. */
void model_fill(const model_t *model, batch_t *batch, const text_t *text, const int32_t *position, int64_t size);

/* One optimizer step on the batch; step counts from 1. Returns, of this rank's part, the sum of -ln(probability of
 * the target). */
double model_train(model_t *model, const batch_t *batch, int64_t step, double learning_rate);

/* The same sum without noise and without training; leaves expert and gate on the host. */
double model_evaluate(model_t *model, const batch_t *batch);

/* A number, added up over the ranks. */
double model_sum(model_t *model, double value);

/* A training forward of the layer alone, with noise; leaves importance and load on the host. */
void model_route(model_t *model, const batch_t *batch, uint64_t offset);

/* Numbers in the layer, gates included; embedding and softmax are the same for all models and left out. */
int64_t kind_parameters(const kind_t *kind);

/* Multiply-adds of the layer for one character, forward in training, both gate matrices included. */
int64_t kind_operations(const kind_t *kind);

#endif
