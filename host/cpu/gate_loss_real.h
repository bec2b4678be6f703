/* Gradients of a loss over the batch, in REAL. */

/* dCV^2 / dv_i = (2 n / S^2) ((v_i - mean) - mean CV^2), times the upstream gradient, in place of v_i; 0 for a zero
 * vector.
 */
static void FN(cv2_gradient)(double *values, int64_t n, double upstream)
{
    double mean;
    const double cv2 = cumoe__cpu_cv2(values, n, &mean);
    const double factor = mean > 0 ? upstream * 2 / ((double)n * mean * mean) : 0;
    for (int64_t i = 0; i < n; i++) values[i] = factor * ((values[i] - mean) - mean * cv2);
}

/* Upstream gradient of a loss: the caller's, or the config's weight. */
static double FN(upstream)(const cumoe_config_t *c, const cumoe_gate_backward_args_t *args, cumoe_loss_t loss)
{
    return args->loss_gradient ? (double)((const REAL *)args->loss_gradient)[loss] : (double)c->loss_weight[loss];
}

/* Of the importance loss by the weights of every expert. */
static void FN(importance_gradient)(const cumoe_config_t *c, const cumoe_gate_backward_args_t *args,
                                    const cumoe_cpu_gate_scratch_t *scratch)
{
    const double unit = cumoe__cpu_fixed_unit(c);
    double *values = scratch->numbers;
    for (int64_t e = 0; e < c->num_experts; e++) values[e] = (double)args->routing.importance[e] * unit;
    FN(cv2_gradient)(values, c->num_experts, FN(upstream)(c, args, CUMOE_LOSS_IMPORTANCE));
    for (int64_t e = 0; e < c->num_experts; e++) ((REAL *)scratch->dimportance)[e] = (REAL)values[e];
}
