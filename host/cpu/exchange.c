/* What goes to the experts of other ranks, what came from them, and rows that are taken from where they stand. */
#include "host/cpu/cpu.h"

#include <string.h>

/* Where the experts of a rank begin. */
static int32_t first_expert(const cumoe_context_t *context, int32_t rank)
{
    return cumoe__first_expert(&context->config, context->ranks.count, rank);
}

/* Rows for the experts of a rank, whether or not they have room there. */
static int64_t rows_for(const cumoe_context_t *context, const cumoe_dispatch_args_t *args, int32_t rank)
{
    return args->rows.offset[first_expert(context, rank + 1)] - args->rows.offset[first_expert(context, rank)];
}

/* The rank that has an expert. */
static int32_t rank_of(const cumoe_context_t *context, int32_t expert)
{
    const int32_t together = cumoe__experts_together(&context->config);
    const int64_t units = context->config.num_experts / together, unit = expert / together;
    return (int32_t)(((unit + 1) * context->ranks.count - 1) / units);
}

/* The row of a slot among those for its rank, and which that is; false for a slot that is not routed or has no room
 * there. */
static bool find_row(const cumoe_context_t *context, const cumoe_dispatch_args_t *args, int64_t slot, int32_t *rank,
                     int64_t *row)
{
    if (args->rows.slot_row[slot] < 0) return false;
    *rank = rank_of(context, args->routing.expert[slot]);
    *row = args->rows.slot_row[slot] - args->rows.offset[first_expert(context, *rank)];
    return args->capacity == 0 || *row < args->capacity;
}

cumoe_status_t cumoe__cpu_dispatch_mark(const cumoe_context_t *context, const cumoe_dispatch_args_t *args,
                                        cumoe_stream_t stream)
{
    (void)stream;
    const int64_t K = context->config.top_k, live = args->routing.call->live_tokens;
#pragma omp parallel for schedule(static) num_threads(context->config.max_threads)
    for (int64_t t = 0; t < args->num_tokens; t++)
        for (int64_t slot = t * K; slot < (t + 1) * K; slot++) {
            int32_t rank = -1;
            int64_t row;
            bool first = t < live && find_row(context, args, slot, &rank, &row);
            for (int64_t before = slot - 1; first && before >= t * K; before--) /* of ascending experts, one step */
                first = args->slot_rank[before] != rank;
            args->slot_rank[slot] = first ? rank : -1;
        }
    return CUMOE_SUCCESS;
}

cumoe_status_t cumoe__cpu_dispatch_count(const cumoe_context_t *context, const cumoe_dispatch_args_t *args,
                                         cumoe_stream_t stream)
{
    (void)stream;
    for (int32_t r = 0; r < context->ranks.count; r++) {
        args->count[2 * r] = (int32_t)rows_for(context, args, r);
        args->count[2 * r + 1] = args->parcels.offset[r + 1] - args->parcels.offset[r];
    }
    return CUMOE_SUCCESS;
}

/* Where what goes to a rank begins, among rows or tokens that are sorted. */
static int64_t begin_of(const cumoe_dispatch_args_t *args, int32_t rank, int32_t sorted)
{
    return args->capacity > 0 ? rank * args->capacity : sorted;
}

static void pack_slot(const cumoe_context_t *context, const cumoe_dispatch_args_t *args, int64_t token,
                      int64_t slot)
{
    int32_t rank;
    int64_t row;
    const bool sent = find_row(context, args, slot, &rank, &row);
    int32_t *place = &args->rows.slot_row[slot];
    *place = -1;
    if (!sent) return;
    const int32_t expert = first_expert(context, rank);
    const int64_t at = begin_of(args, rank, args->rows.offset[expert]) + row;
    int64_t first = slot; /* the one that stands for the token with this rank */
    while (args->slot_rank[first] != rank) first--;
    const int32_t number = args->parcels.slot_row[first] - args->parcels.offset[rank];
    *place = (int32_t)at;
    args->expert[at] = args->routing.expert[slot] - expert;
    args->token[at] = number;
    if (context->config.dtype == CUMOE_F64)
        ((double *)args->weight)[at] = ((const double *)args->routing.weight)[slot];
    else
        ((float *)args->weight)[at] = ((const float *)args->routing.weight)[slot];
    if (first == slot) args->sent_token[begin_of(args, rank, args->parcels.offset[rank]) + number] = (int32_t)token;
}

cumoe_status_t cumoe__cpu_dispatch_pack(const cumoe_context_t *context, const cumoe_dispatch_args_t *args,
                                        cumoe_stream_t stream)
{
    (void)stream;
    const int64_t K = context->config.top_k, live = args->routing.call->live_tokens;
#pragma omp parallel for schedule(static) num_threads(context->config.max_threads)
    for (int64_t t = 0; t < live; t++)
        for (int64_t slot = t * K; slot < (t + 1) * K; slot++) pack_slot(context, args, t, slot);
    if (!args->statistics || args->capacity == 0) return CUMOE_SUCCESS;
    for (int32_t r = 0; r < context->ranks.count; r++) {
        const int64_t rows = rows_for(context, args, r);
        if (rows > args->capacity) args->statistics->exchange_overflow += rows - args->capacity;
    }
    return CUMOE_SUCCESS;
}

cumoe_status_t cumoe__cpu_arrive_begin(const cumoe_context_t *context, const cumoe_arrive_args_t *args,
                                       cumoe_stream_t stream)
{
    (void)context, (void)stream;
    *args->call = (cumoe_call_t){.live_tokens = args->num_slots};
    return CUMOE_SUCCESS;
}

cumoe_status_t cumoe__cpu_arrive_end(const cumoe_context_t *context, const cumoe_arrive_args_t *args,
                                     cumoe_stream_t stream)
{
    (void)stream;
    int64_t slot = 0, tokens = 0;
    for (int32_t r = 0; r < context->ranks.count; r++) {
        const int64_t end = slot + (args->capacity > 0 ? args->capacity : args->count[2 * r]);
        for (; slot < end; slot++)
            if (args->rows.slot_row[slot] >= 0)
                args->rows.row_token[args->rows.slot_row[slot]] = (int32_t)(tokens + args->token[slot]);
        tokens += args->capacity > 0 ? args->capacity : args->count[2 * r + 1];
    }
    return CUMOE_SUCCESS;
}

cumoe_status_t cumoe__cpu_gather(const cumoe_context_t *context, const cumoe_gather_args_t *args,
                                 cumoe_stream_t stream)
{
    (void)stream;
    const size_t row = (size_t)args->width * args->element, stride = (size_t)args->from_stride * args->element;
#pragma omp parallel for schedule(static) num_threads(context->config.max_threads)
    for (int64_t i = 0; i < args->count; i++) {
        char *to = (char *)args->to + (size_t)i * row;
        if (args->index[i] >= 0)
            memcpy(to, (const char *)args->from + (size_t)args->index[i] * stride, row);
        else if (args->zeros)
            memset(to, 0, row);
    }
    return CUMOE_SUCCESS;
}
