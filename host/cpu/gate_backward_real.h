/* Gradients of the losses over the batch, in REAL. */

/* Of SWITCH by the sum of an expert's probabilities: upstream E count / tokens^2. */
static void FN(switch_gradient)(const cumoe_config_t *c, const cumoe_routing_t *routing, double upstream,
                                double unit, REAL *gradient)
{
    const double tokens = (double)*routing->tokens, factor = tokens > 0 ? upstream * c->num_experts / tokens : 0;
    for (int64_t e = 0; e < c->num_experts; e++)
        gradient[e] = (REAL)(tokens > 0 ? factor * ((double)routing->load[e] * unit) / tokens : 0);
}

static cumoe_cpu_batch_t FN(sum_gradients)(const cumoe_config_t *c, const cumoe_gate_backward_args_t *args,
                                           const cumoe_cpu_level_t *level, const cumoe_cpu_gate_scratch_t *scratch)
{
    const cumoe_routing_t *routing = &args->routing;
    FN(importance_gradient)(c, args, scratch);
    if (cumoe__has_shares(c->gate)) {
        const double upstream = FN(upstream)(c, args, CUMOE_LOSS_SWITCH);
        const double z = 2 * FN(upstream)(c, args, CUMOE_LOSS_Z);
        FN(switch_gradient)(c, routing, upstream, cumoe__cpu_fixed_unit(c), scratch->dload);
        return (cumoe_cpu_batch_t){.probabilities = upstream != 0,
                                   .z = *routing->tokens > 0 ? z / (double)*routing->tokens : 0};
    }
    const double upstream = FN(upstream)(c, args, CUMOE_LOSS_LOAD);
    cumoe__cpu_loads(c, routing, scratch->numbers);
    FN(cv2_gradient)(scratch->numbers, c->num_experts, upstream);
    for (int64_t e = 0; e < c->num_experts; e++) ((REAL *)scratch->dload)[e] = (REAL)scratch->numbers[e];
    return (cumoe_cpu_batch_t){.load = upstream != 0 && level->smooth};
}

/* Of the thresholds: L_batchwise alone moves them (eq. 20). */
static void FN(threshold_gradient)(const cumoe_config_t *c, const cumoe_gate_backward_args_t *args)
{
    REAL *gradient = args->gradients->thresholds;
    const REAL upstream = (REAL)FN(upstream)(c, args, CUMOE_LOSS_THRESHOLD);
    for (int64_t e = 0; gradient && e < c->num_experts; e++) {
        const REAL d = args->training ? -(upstream * (REAL)args->routing.excess[e]) : 0;
        gradient[e] = args->gradient_mode == CUMOE_GRADIENT_ADD ? gradient[e] + d : d;
    }
}
