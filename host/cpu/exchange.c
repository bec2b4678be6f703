/* What goes to the experts of other ranks, what came from them, and rows that are taken from where they stand. */
#include "host/cpu/cpu.h"

#include <string.h>

/* Where the experts of a parcel begin. */
static int32_t first_expert(const cumoe_context_t *context, int32_t parcel)
{
    return cumoe__first_of_parcel(&context->config, context->ranks.count, parcel);
}

/* How many parcels there are, and those of a rank. */
static int32_t num_parcels(const cumoe_context_t *context)
{
    return context->ranks.count * context->config.exchange_chunks;
}
static int32_t rank_of(const cumoe_context_t *context, int32_t parcel)
{
    return parcel / context->config.exchange_chunks;
}

/* Rows of a parcel, whether or not they have room there. */
static int64_t rows_of(const cumoe_context_t *context, const cumoe_dispatch_args_t *args, int32_t parcel)
{
    return args->rows.offset[first_expert(context, parcel + 1)] - args->rows.offset[first_expert(context, parcel)];
}

/* The parcel of an expert: the last one that begins there or before. */
static int32_t parcel_of(const cumoe_context_t *context, int32_t expert)
{
    const cumoe_config_t *c = &context->config;
    const int32_t together = cumoe__experts_together(c), n = c->exchange_chunks;
    const int64_t units = c->num_experts / together, unit = expert / together;
    const int32_t rank = (int32_t)(((unit + 1) * context->ranks.count - 1) / units);
    const int32_t first = first_expert(context, rank * n), own = first_expert(context, (rank + 1) * n) - first;
    return rank * n + (int32_t)(((int64_t)(expert - first + 1) * n - 1) / own);
}

/* The row of a slot among those of its parcel, and which that is; false for a slot that is not routed or has no
 * room there. */
static bool find_row(const cumoe_context_t *context, const cumoe_dispatch_args_t *args, int64_t slot,
                     int32_t *parcel, int64_t *row)
{
    if (args->rows.slot_row[slot] < 0) return false;
    *parcel = parcel_of(context, args->routing.expert[slot]);
    *row = args->rows.slot_row[slot] - args->rows.offset[first_expert(context, *parcel)];
    return args->capacity == 0 || *row < args->capacity;
}

/* Another slot of the token brings it to the rank of PARCEL, earlier than SLOT does. */
static bool comes_before(const cumoe_context_t *context, const cumoe_dispatch_args_t *args, int64_t other,
                         int64_t slot, int32_t parcel)
{
    int32_t with;
    int64_t row;
    if (!find_row(context, args, other, &with, &row) || rank_of(context, with) != rank_of(context, parcel))
        return false;
    return with < parcel || (with == parcel && other < slot);
}

static int32_t mark_slot(const cumoe_context_t *context, const cumoe_dispatch_args_t *args, int64_t slot)
{
    const int64_t K = context->config.top_k, begin = slot / K * K;
    int32_t parcel;
    int64_t row;
    if (slot / K >= args->routing.call->live_tokens || !find_row(context, args, slot, &parcel, &row)) return -1;
    for (int64_t other = slot - 1; other >= begin; other--) /* of ascending experts, one step */
        if (comes_before(context, args, other, slot, parcel)) return -1;
    if (parcel == rank_of(context, parcel) * context->config.exchange_chunks) return parcel; /* the first there */
    for (int64_t other = slot + 1; other < begin + K; other++)
        if (comes_before(context, args, other, slot, parcel)) return -1;
    return parcel;
}

cumoe_status_t cumoe__cpu_dispatch_mark(const cumoe_context_t *context, const cumoe_dispatch_args_t *args,
                                        cumoe_stream_t stream)
{
    (void)stream;
    const int64_t slots = args->num_tokens * context->config.top_k;
#pragma omp parallel for schedule(static) num_threads(context->config.max_threads)
    for (int64_t slot = 0; slot < slots; slot++) args->slot_parcel[slot] = mark_slot(context, args, slot);
    return CUMOE_SUCCESS;
}

cumoe_status_t cumoe__cpu_dispatch_count(const cumoe_context_t *context, const cumoe_dispatch_args_t *args,
                                         cumoe_stream_t stream)
{
    (void)stream;
    for (int32_t p = 0; p < num_parcels(context); p++) {
        args->count[2 * p] = (int32_t)rows_of(context, args, p);
        args->count[2 * p + 1] = args->parcels.offset[p + 1] - args->parcels.offset[p];
    }
    return CUMOE_SUCCESS;
}

/* Where a parcel begins, among rows or tokens that are sorted. */
static int64_t begin_of(const cumoe_dispatch_args_t *args, int32_t parcel, int32_t sorted)
{
    return args->capacity > 0 ? parcel * args->capacity : sorted;
}

/* The slot that stands for the token of SLOT with a rank. */
static int64_t find_marked(const cumoe_context_t *context, const cumoe_dispatch_args_t *args, int64_t slot,
                           int32_t rank)
{
    const int64_t begin = slot / context->config.top_k * context->config.top_k;
    int64_t i = slot;
    while (i >= begin && (args->slot_parcel[i] < 0 || rank_of(context, args->slot_parcel[i]) != rank)) i--;
    if (i >= begin) return i;
    i = slot + 1;
    while (args->slot_parcel[i] < 0 || rank_of(context, args->slot_parcel[i]) != rank) i++;
    return i;
}

static void pack_slot(const cumoe_context_t *context, const cumoe_dispatch_args_t *args, int64_t slot)
{
    int32_t parcel;
    int64_t row;
    const bool sent = find_row(context, args, slot, &parcel, &row);
    int32_t *place = &args->rows.slot_row[slot];
    *place = -1;
    if (!sent) return;
    const int32_t expert = first_expert(context, parcel), rank = rank_of(context, parcel);
    const int64_t at = begin_of(args, parcel, args->rows.offset[expert]) + row;
    const int64_t marked = find_marked(context, args, slot, rank);
    const int32_t with = args->slot_parcel[marked], *offset = args->parcels.offset;
    const int64_t sent_token = begin_of(args, with, offset[with]) + args->parcels.slot_row[marked] - offset[with];
    const int32_t first = rank * context->config.exchange_chunks; /* parcel of the rank */
    *place = (int32_t)at;
    args->expert[at] = args->routing.expert[slot] - expert;
    args->token[at] = (int32_t)(sent_token - begin_of(args, first, offset[first]));
    if (context->config.dtype == CUMOE_F64)
        ((double *)args->weight)[at] = ((const double *)args->routing.weight)[slot];
    else
        ((float *)args->weight)[at] = ((const float *)args->routing.weight)[slot];
    if (marked == slot) args->sent_token[sent_token] = (int32_t)(slot / context->config.top_k);
}

cumoe_status_t cumoe__cpu_dispatch_pack(const cumoe_context_t *context, const cumoe_dispatch_args_t *args,
                                        cumoe_stream_t stream)
{
    (void)stream;
    const int64_t slots = args->routing.call->live_tokens * context->config.top_k;
#pragma omp parallel for schedule(static) num_threads(context->config.max_threads)
    for (int64_t slot = 0; slot < slots; slot++) pack_slot(context, args, slot);
    if (!args->statistics || args->capacity == 0) return CUMOE_SUCCESS;
    for (int32_t p = 0; p < num_parcels(context); p++) {
        const int64_t rows = rows_of(context, args, p);
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
    const int32_t n = context->config.exchange_chunks;
    int64_t slot = 0, tokens = 0;
    for (int32_t r = 0; r < context->ranks.count; r++) {
        const int32_t *count = args->capacity > 0 ? NULL : args->count + 2 * r * n; /* of this rank's parcels */
        const int64_t end = slot + (count ? count[2 * args->chunk] : args->capacity);
        for (; slot < end; slot++)
            if (args->rows.slot_row[slot] >= 0)
                args->rows.row_token[args->rows.slot_row[slot]] = (int32_t)(tokens + args->token[slot]);
        for (int32_t i = 0; i < n; i++) tokens += count ? count[2 * i + 1] : args->capacity;
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
