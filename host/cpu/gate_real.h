/* What the gate stage writes beside the routing, in REAL. */

/* The vectors and losses that the caller asked for. */
static void FN(write_sums)(const cumoe_config_t *c, const cumoe_gate_args_t *args, const double *loads,
                           const double *losses)
{
    const double unit = cumoe__cpu_fixed_unit(c);
    for (int64_t e = 0; args->importance && e < c->num_experts; e++)
        ((REAL *)args->importance)[e] = (REAL)((double)args->routing.importance[e] * unit);
    for (int64_t e = 0; args->load && e < c->num_experts; e++) ((REAL *)args->load)[e] = (REAL)loads[e];
    for (int i = 0; args->losses && i < CUMOE_NUM_LOSSES; i++) ((REAL *)args->losses)[i] = (REAL)losses[i];
}

/* The sum over tokens of lse^2, in the order of tokens. */
static double FN(sum_squares)(const cumoe_gate_args_t *args, const REAL *square)
{
    double sum = 0;
    for (int64_t t = 0; t < args->routing.call->live_tokens; t++)
        if (cumoe__cpu_token_counts(args->token_mask, t)) sum += (double)square[t];
    return sum;
}
