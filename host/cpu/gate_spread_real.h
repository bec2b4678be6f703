/* What two losses of today's gates look at, in REAL; forward and backward. */

/* What the Switch loss and the z-loss see of a row with usable logits: p_e = share[e] / total and softmax(c)_e =
 * power[e] / sum, lse = log sum exp(c). A softmax gate's share is its power. */
typedef struct FN(spread) {
    REAL *share, *power;
    REAL total, sum, lse;
} FN(spread_t);

/* share and power take the free rows. */
CUMOE_CPU_CLONES static FN(spread_t)
    FN(spread_row)(const cumoe_config_t *c, const REAL *restrict clean, const FN(gate_row_t) * row)
{
    const int64_t E = c->num_experts;
    const REAL *restrict usable = row->noisy;
    const bool sigmoid = c->gate == CUMOE_GATE_SIGMOID_TOPK;
    REAL *restrict power = row->first, *restrict share = row->second, most = -(REAL)INFINITY;
    for (int64_t e = 0; e < E; e++) most = usable[e] > -(REAL)INFINITY && clean[e] > most ? clean[e] : most;
    for (int64_t e = 0; e < E; e++) {
        const REAL p = FN(exp)(clean[e] - most);
        power[e] = usable[e] > -(REAL)INFINITY ? p : 0;
    }
    for (int64_t e = 0; sigmoid && e < E; e++) {
        const REAL s = FN(sigmoid)(clean[e]);
        share[e] = usable[e] > -(REAL)INFINITY ? s : 0;
    }
    FN(spread_t) spread = {.power = power, .sum = FN(sum_row)(power, E)};
    spread.share = sigmoid ? share : power;
    spread.total = sigmoid ? FN(sum_row)(share, E) : spread.sum;
    spread.lse = most + (REAL)log((double)spread.sum);
    return spread;
}
