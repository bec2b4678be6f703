#include "models.h"

#include <stddef.h>

const char *const gate_words[] = {"noisy-topk", "softmax",      "external",     "hierarchical",
                                  "balanced",   "softmax-topk", "sigmoid-topk", NULL};
const char *const activation_words[] = {"relu",  "swiglu", "gelu",           "gelu-tanh", "silu",
                                        "relu2", "geglu",  "swiglu-clamped", "identity",  NULL};
const char *const dtype_words[] = {"f64", "f32", "bf16", "f16", NULL};

/* paper-E: the layer of Shazeer et al. 2017, flat, with so many experts. */
const model_t models[MODELS] = {
    {"paper-4", 512, 1024, 4, 4, CUMOE_ACTIVATION_RELU, CUMOE_GATE_NOISY_TOPK, 0},
    {"paper-32", 512, 1024, 32, 4, CUMOE_ACTIVATION_RELU, CUMOE_GATE_NOISY_TOPK, 0},
    {"paper-256", 512, 1024, 256, 4, CUMOE_ACTIVATION_RELU, CUMOE_GATE_NOISY_TOPK, 0},
    {"paper-1024", 512, 1024, 1024, 4, CUMOE_ACTIVATION_RELU, CUMOE_GATE_NOISY_TOPK, 0},
    {"paper-4096", 512, 1024, 4096, 4, CUMOE_ACTIVATION_RELU, CUMOE_GATE_NOISY_TOPK, 0},
    {"mixtral-8x7b", 4096, 14336, 8, 2, CUMOE_ACTIVATION_SWIGLU, CUMOE_GATE_SOFTMAX_TOPK, 0},
    {"mixtral-8x22b", 6144, 16384, 8, 2, CUMOE_ACTIVATION_SWIGLU, CUMOE_GATE_SOFTMAX_TOPK, 0},
    {"qwen3-30b-a3b", 2048, 768, 128, 8, CUMOE_ACTIVATION_SWIGLU, CUMOE_GATE_SOFTMAX_TOPK, 0},
    {"qwen3-235b-a22b", 4096, 1536, 128, 8, CUMOE_ACTIVATION_SWIGLU, CUMOE_GATE_SOFTMAX_TOPK, 0},
    {"qwen3-next-80b-a3b", 2048, 512, 512, 10, CUMOE_ACTIVATION_SWIGLU, CUMOE_GATE_SOFTMAX_TOPK, 0},
    {"olmoe", 2048, 1024, 64, 8, CUMOE_ACTIVATION_SWIGLU, CUMOE_GATE_SOFTMAX_TOPK, 0},
    {"gpt-oss-20b", 2880, 2880, 32, 4, CUMOE_ACTIVATION_SWIGLU_CLAMPED, CUMOE_GATE_SOFTMAX_TOPK, 1},
    {"gpt-oss-120b", 2880, 2880, 128, 4, CUMOE_ACTIVATION_SWIGLU_CLAMPED, CUMOE_GATE_SOFTMAX_TOPK, 1},
    {"deepseek-v3", 7168, 2048, 256, 8, CUMOE_ACTIVATION_SWIGLU, CUMOE_GATE_SIGMOID_TOPK, 0},
};
