#include "models.h"

#include <stdio.h>

const char *const gate_words[] = {"noisy-topk", "softmax",      "external",     "hierarchical",
                                  "balanced",   "softmax-topk", "sigmoid-topk", NULL};
const char *const activation_words[] = {"relu",  "swiglu",         "gelu",     "gelu-tanh",  "silu", "relu2",
                                        "geglu", "swiglu-clamped", "identity", "geglu-tanh", NULL};
const char *const dtype_words[] = {"f64", "f32", "bf16", "f16", NULL};

/* paper-E: the layer of Shazeer et al. 2017, flat, with so many experts. sonic-*: the shapes of the SonicMoE paper
 * (arXiv 2512.14080, figure 14), sizes of whole models and widths of experts. */
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
    {"sonic-1.4b-n256", 768, 256, 128, 8, CUMOE_ACTIVATION_SWIGLU, CUMOE_GATE_SOFTMAX_TOPK, 0},
    {"sonic-1.4b-n512", 768, 512, 64, 4, CUMOE_ACTIVATION_SWIGLU, CUMOE_GATE_SOFTMAX_TOPK, 0},
    {"sonic-1.4b-n1024", 768, 1024, 32, 2, CUMOE_ACTIVATION_SWIGLU, CUMOE_GATE_SOFTMAX_TOPK, 0},
    {"sonic-7b-n256", 1536, 256, 128, 8, CUMOE_ACTIVATION_SWIGLU, CUMOE_GATE_SOFTMAX_TOPK, 0},
    {"sonic-7b-n512", 1536, 512, 64, 4, CUMOE_ACTIVATION_SWIGLU, CUMOE_GATE_SOFTMAX_TOPK, 0},
    {"sonic-7b-n1024", 1536, 1024, 32, 2, CUMOE_ACTIVATION_SWIGLU, CUMOE_GATE_SOFTMAX_TOPK, 0},
    {"sonic-30b-n256", 4096, 256, 256, 16, CUMOE_ACTIVATION_SWIGLU, CUMOE_GATE_SOFTMAX_TOPK, 0},
    {"sonic-30b-n512", 4096, 512, 128, 8, CUMOE_ACTIVATION_SWIGLU, CUMOE_GATE_SOFTMAX_TOPK, 0},
    {"sonic-30b-n1024", 4096, 1024, 64, 4, CUMOE_ACTIVATION_SWIGLU, CUMOE_GATE_SOFTMAX_TOPK, 0},
    {"sonic-120b-n512", 4096, 512, 256, 16, CUMOE_ACTIVATION_SWIGLU, CUMOE_GATE_SOFTMAX_TOPK, 0},
    {"sonic-120b-n1024", 4096, 1024, 128, 8, CUMOE_ACTIVATION_SWIGLU, CUMOE_GATE_SOFTMAX_TOPK, 0},
    {"sonic-120b-n2048", 4096, 2048, 64, 4, CUMOE_ACTIVATION_SWIGLU, CUMOE_GATE_SOFTMAX_TOPK, 0},
};

void models_names(const char *names[MODELS + 1])
{
    for (int i = 0; i < MODELS; i++) names[i] = models[i].name;
    names[MODELS] = NULL;
}

void models_list(void)
{
    puts("One layer, its routed experts; shared experts and biases of gates are left out.\n\n"
         "| shape | H | I | E | K | activation | gate | biases |\n"
         "|---|---:|---:|---:|---:|---|---|---|");
    for (int i = 0; i < MODELS; i++) {
        const model_t *m = &models[i];
        printf("| %s | %d | %d | %d | %d | %s | %s | %s |\n", m->name, m->hidden, m->intermediate, m->experts,
               m->top_k, activation_words[m->activation], gate_words[m->gate], m->bias ? "yes" : "no");
    }
}
