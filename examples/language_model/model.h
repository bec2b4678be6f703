/* The model: embedding sum -> h = x + layer(x) -> softmax over the characters. The layer is cumoe's. */
#ifndef MODEL_H
#define MODEL_H

#include "dense.h"
#include "device.h"
#include "protocol.h"

/* The first two are ours and live on the host; the others are the layer's. */
typedef enum parameter_index {
    EMBEDDING,
    SOFTMAX,
    W_UP,
    W_DOWN,
    W_GATE,
    W_NOISE,
    NUM_PARAMETERS
} parameter_index_t;

typedef struct model {
    const device_t *device;
    const kind_t *kind;
    int symbols; /* V */
    uint64_t seed;

    cumoe_layer_t *layer;
    cumoe_weights_t weights, gradients;
    mirror_t weight[NUM_PARAMETERS], gradient[NUM_PARAMETERS];
    parameter_t parameter[NUM_PARAMETERS]; /* count 0 where the layer has no such array */
    softmax_t softmax;

    mirror_t x, y, dy, dx;        /* [BATCH, WIDTH] */
    mirror_t index, index_weight; /* [BATCH] external routing of the dense layer: expert 0, weight 1 */
    mirror_t expert, gate;        /* [BATCH, TOP_K] the experts of every character and their weights */
    mirror_t load;                /* [E] */
    mirror_t statistics;          /* [1] */
    void *workspace, *saved;
    size_t workspace_size, saved_size;
} model_t;

void model_create(model_t *model, const device_t *device, const kind_t *kind, int symbols, uint64_t seed);
void model_destroy(model_t *model);

/* One step of Adam on the batch; step counts from 1. Returns the sum of -ln(probability of the target). */
double model_train(model_t *model, const batch_t *batch, int64_t step, double learning_rate);

/* The same sum without noise and without training; leaves expert and gate on the host. */
double model_evaluate(model_t *model, const batch_t *batch);

/* A training forward of the layer alone, with noise; leaves load and statistics on the host. */
void model_route(model_t *model, const batch_t *batch, uint64_t offset);

/* Numbers in the layer, gates included; embedding and softmax are the same for all models and left out. */
int64_t kind_parameters(const kind_t *kind);

/* Multiply-adds of the layer for one character, forward in training, both gate matrices included. */
int64_t kind_operations(const kind_t *kind);

#endif
