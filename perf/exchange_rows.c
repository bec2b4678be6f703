/* From the experts that tokens chose to the rows that ranks exchange: counted here once more, as the header says.
 */
#include "exchange.h"

#include <stdlib.h>
#include <string.h>

/* Slots in the order of (expert, token): offset [E + 1], slot [T K]. */
static void sort_slots(const int32_t *chosen, int64_t slots, int32_t E, int64_t *offset, int64_t *slot)
{
    memset(offset, 0, ((size_t)E + 1) * sizeof *offset);
    for (int64_t i = 0; i < slots; i++)
        if (chosen[i] >= 0) offset[chosen[i] + 1]++;
    for (int32_t e = 0; e < E; e++) offset[e + 1] += offset[e];
    for (int64_t i = 0; i < slots; i++)
        if (chosen[i] >= 0) slot[offset[chosen[i]]++] = i;
    memmove(offset + 1, offset, (size_t)E * sizeof *offset); /* each has moved on to the next one's */
    offset[0] = 0;
}

int32_t num_chunks(const cumoe_config_t *c)
{
    return c->exchange_chunks > 0 ? c->exchange_chunks : 1;
}

int64_t room_of_chunk(const cumoe_config_t *c)
{
    return (c->exchange_capacity + num_chunks(c) - 1) / num_chunks(c);
}

void rows_list(share_t *s, const int32_t *chosen, traffic_t *traffic, int64_t *dropped, unsigned char *incomplete,
               int32_t *expert)
{
    const cumoe_config_t *c = &s->subject->config;
    const int64_t K = c->top_k, T = s->subject->num_tokens, C = room_of_chunk(c);
    const int32_t chunks = num_chunks(c);
    int64_t *offset = malloc(((size_t)c->num_experts + 1) * sizeof *offset);
    int64_t *slot = malloc((size_t)(T * K + 1) * sizeof *slot);
    int32_t *last = malloc((size_t)(T + 1) * sizeof *last); /* the last rank that a token goes to */
    if (!offset || !slot || !last) abort();
    sort_slots(chosen, T * K, c->num_experts, offset, slot);
    for (int64_t t = 0; t < T; t++) last[t] = -1;
    memset(incomplete, 0, (size_t)T);
    *dropped = traffic->num_rows = traffic->num_tokens = 0;
    for (int32_t r = 0; r < s->rank->count; r++) {
        const int64_t own = s->first[r + 1] - s->first[r];
        traffic->rows[r] = traffic->tokens[r] = 0;
        for (int32_t chunk = 0; chunk < chunks; chunk++) {
            const int64_t begin = offset[s->first[r] + own * chunk / chunks],
                          end = offset[s->first[r] + own * (chunk + 1) / chunks];
            const int64_t room = C > 0 && end - begin > C ? begin + C : end;
            for (int64_t i = begin; i < end; i++) {
                const int64_t t = slot[i] / K;
                if (i < room) {
                    traffic->tokens[r] += last[t] != r;
                    last[t] = r;
                    if (expert) expert[traffic->num_rows + i - begin] = chosen[slot[i]] - s->first[r];
                } else {
                    incomplete[t] = 1;
                    ++*dropped;
                }
            }
            traffic->rows[r] += room - begin;
            traffic->num_rows += room - begin;
        }
        traffic->num_tokens += traffic->tokens[r];
    }
    free(offset);
    free(slot);
    free(last);
}
