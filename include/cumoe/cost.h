/* What a configuration costs, by counting: nothing is measured, no handle or layer is needed, and configurations
 * that no backend has kernels for are priced as well.
 *
 * Beside the letters of types.h:
 *   S  time steps that one call takes together            N = T * S  tokens of a call on one rank
 *   W  ranks; each has E / W experts, rounded up,         R = N * K  rows of a call on one rank
 *      and all gates                                                 (BALANCED: on average)
 *   M  elements of an expert's matrices: 2HI, with glu 3HI, IDENTITY HH
 *   Z  pre-activations of a row: I, with glu 2I, IDENTITY H
 *   P  elements of the gates that a token meets: EH, noisy kinds 2EH, HIERARCHICAL 2H (G + K1 E/G): of the second
 *      level only the K1 chosen gates; EXTERNAL 0 */
#ifndef CUMOE_COST_H
#define CUMOE_COST_H

#include <cumoe/config.h>

#ifdef __cplusplus
extern "C" {
#endif

typedef struct cumoe_cost {
    size_t struct_size; /* sizeof(cumoe_cost_t) */

    /* Values in the arrays of cumoe_weights_t, all ranks together, each gate once. */
    int64_t expert_parameters; /* E M, and biases */
    int64_t gate_parameters;   /* noisy kinds 2EH, HIERARCHICAL 2H (E + G), EXTERNAL 0, others EH; BALANCED and
                                  SIGMOID_TOPK E more for thresholds and selection bias */
    int64_t parameters;        /* the sum of the two */

    /* The paper's two figures (sections 3.2 and 5.1). */
    int64_t ops_per_timestep;  /* multiply-adds of a token, forward, in matrix products: K M + P */
    double compute_to_traffic; /* multiply-adds per element that goes into or out of an expert: M / 2H, which is I,
                                  with glu 1.5 I, IDENTITY H / 2 */

    /* Work of a call on one rank, in floating-point operations: a multiply-add is two. Products alone; the rank's
     * experts get R rows on average. */
    double forward_flop;  /* 2 N ops_per_timestep */
    double backward_flop; /* twice that; with config.recompute 2 R H Z more, but for IDENTITY. Logits that a noisy
                             gate computes again are not counted */

    /* Bytes that a call on one rank moves at least: every array is read once and written once, whatever caches
     * hold. Only experts that can have rows, R of the rank's at most, and only second-level gates that can have
     * tokens, N K1 at most. Not counted: routing and other numbers per row or per expert. Token type, unless said
     * otherwise. */
    double forward_bytes;  /* read weights, x [N, H]; write y [N, H]; write and read hidden [R, I], output [R, H];
                              write z [R, Z] where saved keeps it beside hidden (no recompute, not IDENTITY) */
    double backward_bytes; /* read weights, x, dy [N, H], z [R, Z]; write dx [N, H] and gradients; write and read
                              dz [R, Z], drows [R, H] (not IDENTITY: dz), with recompute z, and but for EXTERNAL
                              dx_gate [N, H], of the gate type */

    /* Memory of one rank in bytes, without alignment. Gates have the gate type, everything else config.dtype. */
    size_t weights_size;
    size_t gradients_size;         /* the same without the selection bias */
    size_t adam_state_size;        /* cumoe_optimizer_state_size() of ADAM */
    size_t factored_state_size;    /* and of FACTORED_ADAM */
    size_t saved_size;             /* of a forward call without config.recompute: routing and z [R, Z]. With CUDA
                                      cumoe_tile_size() numbers more, here and below. BALANCED: for as many rows as
                                      there can be, see cumoe_layer_max_rows() */
    size_t saved_size_recomputing; /* and with it: routing alone */

    /* Rows that an expert gets in one call if all are chosen equally often. */
    double rows_per_expert;           /* K T / E: one rank, one time step (the shrinking batch) */
    double rows_per_expert_ranks;     /* K T W / E: the ranks' tokens together */
    double rows_per_expert_timesteps; /* K T W S / E: the time steps together as well */
} cumoe_cost_t;

/* Count what calls with a configuration cost.
 *
 * config         dtype, sizes and kinds count; ep does not
 * num_tokens     T >= 0: tokens of one time step on one rank
 * num_timesteps  S >= 1, T * S * K < 2^31 (SOFTMAX: K = E)
 * num_ranks      W >= 1; memory is that of a rank but for what the exchange takes (cumoe_ep_sizes_t)
 * cost           out, but for struct_size; unchanged on failure
 *
 * CUMOE_INVALID_ARGUMENT  a pointer is NULL, a size or a field of config out of range
 *
 * Allocates: no.  Synchronizes: no.  Capturable: yes.  Thread-safe: yes. */
CUMOE_API CUMOE_NODISCARD cumoe_status_t cumoe_config_cost(const cumoe_config_t *config, int64_t num_tokens,
                                                           int64_t num_timesteps, int32_t num_ranks,
                                                           cumoe_cost_t *cost);

#ifdef __cplusplus
}
#endif
#endif
