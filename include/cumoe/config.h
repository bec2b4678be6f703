/* What a layer computes. Start from cumoe_config_init(), set the four sizes, change what you like. */
#ifndef CUMOE_CONFIG_H
#define CUMOE_CONFIG_H

#include <cumoe/status.h>
#include <cumoe/types.h>

#ifdef __cplusplus
extern "C" {
#endif

#define CUMOE_MAX_EXPERTS 131072
#define CUMOE_MAX_TOP_K   64
#define CUMOE_MAX_CHUNKS  16
#define CUMOE_MAX_WIDTH   (1 << 24) /* of H and I; E * H * I stays below 2^56 */

typedef struct cumoe_config {
    size_t struct_size; /* set by cumoe_config_init() */

    int32_t hidden_size;           /* H, 1..CUMOE_MAX_WIDTH                                          required */
    int32_t intermediate_size;     /* I, 1..CUMOE_MAX_WIDTH (ignored for IDENTITY)                   required */
    int32_t num_experts;           /* E, 1..CUMOE_MAX_EXPERTS                                        required */
    int32_t top_k;                 /* K, 1..min(E, CUMOE_MAX_TOP_K); for HIERARCHICAL K = K1 * K2, inside a
                                      group K2 = top_k / top_k_groups. SOFTMAX: 0 or E. BALANCED: the average
                                                                                                     required */
    cumoe_dtype_t dtype;           /* x, y, expert weights                                    default F32 */
    cumoe_compute_t compute;       /* products of F32 matrices                              default EXACT */
    cumoe_activation_t activation; /*                                                        default RELU */
    float swiglu_limit;            /* > 0, of SWIGLU_CLAMPED                                    default 7 */
    float swiglu_alpha;            /* finite, of SWIGLU_CLAMPED                             default 1.702 */
    float swiglu_offset;           /* finite, of SWIGLU_CLAMPED: 1 in gpt-oss, 0 in DeepSeek-V4 (with alpha 1)
                                                                                                default 1 */
    int32_t expert_bias;           /* 1: b_up (b_glu) and b_down exist                          default 0 */
    int32_t recompute;             /* 1: the backward pass computes the pre-activations again (App. D):
                                      saved is smaller by R * I values (2I with glu); same bits  default 0 */

    cumoe_gate_kind_t gate; /*                                                        default NOISY_TOPK */
    int32_t num_groups;     /* G, divides E; HIERARCHICAL only                                 default 0 */
    int32_t top_k_groups;   /* K1, 1..G, divides K; HIERARCHICAL only                          default 0 */
    int32_t renormalize;    /* SOFTMAX_TOPK, SIGMOID_TOPK: 1 = the K weights sum to 1          default 1 */
    float noise_epsilon;    /* noise std = softplus(x w_noise^T) + noise_epsilon, >= 0; 0 is the paper's
                               text                                                         default 0.01 */
    uint32_t noise_stream;  /* a number per layer, so that layers with one seed differ         default 0 */
    int64_t max_rows; /* BALANCED at inference: upper bound of R; 0 = T * K. Of more rows, those with the lowest
                         g are dropped and counted                                       default 0 */

    float loss_weight[CUMOE_NUM_LOSSES]; /* upstream gradients of the losses when a backward call brings none
                                            of its own, >= 0. Losses come back unweighted.
                                            default 0.1 importance, 0.1 load, 0, 0, 1 threshold */

    int32_t max_threads;       /* CPU: threads per call, 0 = OpenMP's number at creation              default 0 */
    int32_t max_sms;           /* CUDA: grouped products and gates launch no more blocks than so many SMs hold,
                                  0 = all; results have the same bits                                 default 0 */
    const cumoe_ep_t *ep;      /* borrowed group of ranks, see parallel.h; NULL = one device         default NULL */
    int64_t exchange_capacity; /* with ep: rows from each rank to each rank in a call; 0 = as many as there are, by
                                  cumoe_ep_plan()                                                   default 0 */
    int32_t exchange_chunks;   /* with ep: so many parts of a rank's experts, 1..16: while one is computed, what
                                  belongs to the next is on its way. 0 = chosen                      default 0 */
} cumoe_config_t;

/* Write the defaults into the first struct_size bytes of config. Use cumoe_config_init().
 *
 * CUMOE_INVALID_ARGUMENT  config is NULL, or struct_size is below that of version 0.1
 *
 * Allocates: no.  Synchronizes: no.  Capturable: yes.  Thread-safe: yes. */
CUMOE_API cumoe_status_t cumoe_config_init_sized(cumoe_config_t *config, size_t struct_size);

/* Write the library's defaults; fields added by later versions of the header included. */
static inline cumoe_status_t cumoe_config_init(cumoe_config_t *config)
{
    return cumoe_config_init_sized(config, sizeof *config);
}

#ifdef __cplusplus
}
#endif
#endif
