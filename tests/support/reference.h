/* The layer once more, in double precision, straight from the formulas of the paper and as naive as possible: no
 * sorting of rows, no tiles, no threads, every array at full size. It shares nothing with the library but the
 * public enumerations; the noise comes in as an array. Results are kept per token and slot: the j-th choice of
 * token t is slot t * K + j, with BALANCED slot token_slot[t] + j, so that a test of a single stage finds what it
 * needs. For tokens of 16 bits it rounds what stands in arrays of the token type, as the next stage reads it.
 *
 *   c = x w_gate^T     s = max(softplus(x w_noise^T) + noise_epsilon, FLT_MIN)     v = c + noise * s
 *   weights = softmax over the K largest of v           importance_e = sum_t weight     (eq. 3-6)
 *   P(x, i) = Phi((c_i - kth_excluding(v, K, i)) / s_i)       load_i = sum_t P          (eq. 8-10)
 *   losses  = CV^2 of importance, CV^2 of load                                          (eq. 7, 11)
 *   y = sum over choices of weight * (act(x w_up^T + b_up ...) w_down^T + b_down)       (eq. 1)
 *
 * HIERARCHICAL does the first two lines for G groups (K1 of them) and inside each chosen group for its B = E / G
 * experts (K2); weights are the products, load_ij = Lp_i Ls_ij / N_i (eq. 12-14). BALANCED takes for every expert
 * the m tokens with its largest g = softmax(c), or the tokens above its threshold (eq. 15-20). SOFTMAX_TOPK and
 * SIGMOID_TOPK, the losses SWITCH and Z: as cumoe/types.h says.
 *
 * IDENTITY has no w_up: its pre-activations are the rows of x, and intermediate_size is hidden_size. */
#ifndef CUMOE_TESTS_REFERENCE_H
#define CUMOE_TESTS_REFERENCE_H

#include <cumoe/types.h>

#include <stdbool.h>

typedef struct reference_input {
    cumoe_gate_kind_t gate; /* SOFTMAX: top_k = experts */
    cumoe_activation_t activation;
    double swiglu_limit, swiglu_alpha, swiglu_offset; /* SWIGLU_CLAMPED */
    double (*round)(double);                          /* to the token type; NULL = nothing is rounded */
    double (*round_scaled)(double); /* of weight * hidden, a factor of the gradient of w_down; NULL alike */
    int64_t tokens, live_tokens;    /* T, and how many of them are computed */
    int64_t hidden_size, intermediate_size, experts, top_k;
    int64_t groups, top_k_groups; /* HIERARCHICAL: G, K1 */
    bool renormalize;             /* SOFTMAX_TOPK, SIGMOID_TOPK */
    int64_t max_rows;             /* BALANCED at inference: of more rows the lowest g are dropped; 0 = T * K */
    bool training;
    double noise_epsilon;

    const uint8_t *token_mask;   /* [T] or NULL; 0 = padding */
    const double *noise;         /* [T, E] standard normals; read for noisy kinds in training only */
    const double *noise_primary; /* [T, G] the same for the groups; HIERARCHICAL */
    const double *x;             /* [T, H] */
    const double *w_gate;        /* [E, H] */
    const double *w_noise;       /* [E, H] */
    const double *w_gate_primary, *w_noise_primary; /* [G, H] HIERARCHICAL */
    const double *thresholds;                       /* [E] BALANCED */
    const double *gate_bias;                        /* [E] SIGMOID_TOPK, or NULL */
    const double *w_up;                             /* [E, I, H] not IDENTITY */
    const double *w_glu;                            /* [E, I, H] gated linear units */
    const double *w_down;                           /* [E, H, I] */
    const double *b_up, *b_glu;                     /* [E, I] or NULL */
    const double *b_down;                           /* [E, H] or NULL */
    const int64_t *index;                           /* [T, K] EXTERNAL */
    const double *index_weight;                     /* [T, K] EXTERNAL */

    const double *dy; /* [T, H] */
    double loss_gradient[CUMOE_NUM_LOSSES];
} reference_input_t;

typedef struct reference_result {
    /* forward, gate */
    double *clean, *std, *noisy; /* [T, E] noisy: what decides, -Inf where it is not usable; SIGMOID_TOPK: scores */
    double *probability;         /* [T, E] P(x, i); 0 where it does not exist */
    int32_t *threshold;          /* [T, E] the expert whose noisy logit is kth_excluding; -1 = none. HIERARCHICAL:
                                    inside the group */
    double *softmax;             /* [T, E] over the usable clean logits, 0 for others; BALANCED: g */
    double *share;               /* [T, E] p of the loss SWITCH */
    double *log_sum;             /* [T]    log(sum of exp(c)); 0 without a usable logit */
    int32_t *expert;             /* [S] -1 = none */
    double *weight;              /* [S] */
    double *local_weight;        /* [S] HIERARCHICAL: of the second level */
    int32_t *token_slot;         /* [T + 1] first slot of a token */
    int32_t *slot_token;         /* [S] */
    double *importance, *load;   /* [E] */
    double *level_load;          /* [E] HIERARCHICAL: Load_i(X^(i))_j; others: load */
    int64_t *count;              /* [E] */
    double losses[CUMOE_NUM_LOSSES];
    double threshold_loss_size; /* of the terms of that loss before they cancel */
    cumoe_statistics_t statistics;

    /* HIERARCHICAL, the first level */
    double *primary_clean, *primary_std, *primary_noisy, *primary_probability; /* [T, G] */
    int32_t *primary_threshold;                                                /* [T, G] */
    int32_t *primary_group;                                                    /* [T, K1] -1 = none */
    double *primary_weight;                                                    /* [T, K1] */
    double *primary_load;                                                      /* [G] */
    int64_t *primary_count;                                                    /* [G] */

    /* BALANCED */
    double *batch_threshold;         /* [E] the smallest g that an expert took in training; 0 without tokens */
    double *runner_up;               /* [E] the largest that it did not take; -1 = it took all */
    int64_t *excess;                 /* [E] tokens above the threshold less tokens taken; 0 at inference */
    double last_kept, first_dropped; /* of g, where max_rows had no room; -1 = it had */

    /* forward, experts; by slot */
    double *up, *glu, *hidden; /* [S, I] */
    double *output;            /* [S, H] */
    double *y;                 /* [T, H] 0 for padding; NaN beyond the live tokens: nobody may look there */

    /* backward */
    double *dweight;                       /* [S] <dy w_down, hidden> + <dy, b_down>: without the losses */
    double *dup, *dglu;                    /* [S, I] */
    double *drows;                         /* [S, H] */
    double *dclean, *draw;                 /* [T, E] gradients of x w_gate^T and of x w_noise^T */
    double *primary_dclean, *primary_draw; /* [T, G] */
    double *dx_gate, *dx;                  /* [T, H] */
    double *dw_gate, *dw_noise, *dw_up, *dw_glu, *dw_down;
    double *dw_gate_primary, *dw_noise_primary; /* [G, H] */
    double *dthresholds;                        /* [E] */
    double *db_up, *db_glu;                     /* [E, I] */
    double *db_down;                            /* [E, H] */

    /* how large the terms of these are before they cancel */
    double *dx_gate_size, *dx_size, *dw_gate_size, *dw_noise_size, *dw_gate_primary_size, *dw_noise_primary_size;

    void *memory;
    size_t memory_size;
} reference_result_t;

/* How many slots there is room for, S above. */
int64_t reference_slots(const reference_input_t *input);

/* false: out of memory */
bool reference_create(const reference_input_t *input, reference_result_t *result);
void reference_destroy(reference_result_t *result);

void reference_forward(const reference_input_t *input, reference_result_t *result);

/* After reference_forward(). */
void reference_backward(const reference_input_t *input, reference_result_t *result);

/* The sizes. After reference_backward(). */
void reference_sizes(const reference_input_t *input, reference_result_t *result);

/* <dy, y> + sum over losses l of loss_gradient[l] * losses[l]: what backward differentiates, but that the gradient
 * of the loss THRESHOLD goes to the thresholds alone. NaN tokens are left out. After reference_forward(). */
double reference_total(const reference_input_t *input, const reference_result_t *result);

/* An activation, and its derivatives by up and by glu. */
typedef struct reference_activation {
    double value, dup, dglu;
} reference_activation_t;

reference_activation_t reference_activation(const reference_input_t *input, double up, double glu);

/* How far a token is from the next kink: the smallest gap between neighbours among the K + 2 largest noisy logits
 * (selection, order of slots, thresholds) at every level, and the smallest distance of a pre-activation from a kink
 * of the activation. BALANCED: the smallest distance of its log g from one that decides: the nearest g of another
 * token on the other side of what an expert takes, the threshold, and the nearest on the other side of max_rows.
 * Numbers that are exactly equal are no kink: ties have rules. After reference_forward(). */
double reference_margin(const reference_input_t *input, const reference_result_t *result, int64_t token);

/* Squared coefficient of variation of v[n], population variance, 0 for a zero vector; and its gradient. */
double reference_cv_squared(int64_t n, const double *v);
double reference_cv_squared_gradient(int64_t n, const double *v, int64_t i);

#endif
