/* Groups of ranks, whatever carries their messages. */
#include "host/comm.h"
#include "host/kinds.h"

#include <stdlib.h>
#include <string.h>

cumoe_status_t cumoe__check_timeout(const char *function, double *timeout)
{
    CUMOE_REQUIRE(*timeout >= 0 && *timeout <= CUMOE_EP_MAX_TIMEOUT, INVALID_ARGUMENT,
                  "%s: timeout = %g, but must be 0..1e9 seconds (0 = %g)", function, *timeout,
                  CUMOE_EP_DEFAULT_TIMEOUT);
    if (*timeout == 0) *timeout = CUMOE_EP_DEFAULT_TIMEOUT;
    return CUMOE_SUCCESS;
}

void cumoe_ep_destroy(cumoe_ep_t *ep)
{
    if (ep) ep->ops->destroy(ep->comm);
}

void cumoe_ep_abort(cumoe_ep_t *ep)
{
    if (ep) ep->ops->abort(ep->comm);
}

cumoe_status_t cumoe_ep_wait(const cumoe_ep_t *ep, cumoe_stream_t stream, double timeout)
{
    const char *function = "cumoe_ep_wait";
    CUMOE_REQUIRE(ep, INVALID_ARGUMENT, "%s: ep = NULL, but must be a group of ranks", function);
    if (timeout == 0) timeout = ep->timeout;
    CUMOE_TRY(cumoe__check_timeout(function, &timeout));
    CUMOE_TRY(cumoe__check_stream(function, ep->handle, stream));
    return ep->ops->wait(ep->comm, stream, timeout);
}

int32_t cumoe_ep_rank(const cumoe_ep_t *ep)
{
    return ep ? ep->rank : -1;
}

int32_t cumoe_ep_num_ranks(const cumoe_ep_t *ep)
{
    return ep ? ep->num_ranks : -1;
}

/* What must be the same on every rank. */
#define FIELD(name)                                                                                                \
    {                                                                                                              \
#name, offsetof(cumoe_config_t, name), sizeof(((cumoe_config_t *)0)->name)                                 \
    }
static const struct {
    const char *name;
    size_t offset, size;
} agreed[] = {FIELD(hidden_size),    FIELD(intermediate_size), FIELD(num_experts),  FIELD(top_k),
              FIELD(dtype),          FIELD(compute),           FIELD(activation),   FIELD(swiglu_limit),
              FIELD(swiglu_alpha),   FIELD(swiglu_offset),     FIELD(expert_bias),  FIELD(recompute),
              FIELD(gate),           FIELD(num_groups),        FIELD(top_k_groups), FIELD(renormalize),
              FIELD(noise_epsilon),  FIELD(noise_stream),      FIELD(loss_weight),  FIELD(exchange_capacity),
              FIELD(exchange_chunks)};
#undef FIELD

static cumoe_status_t compare(const char *function, const cumoe_ep_t *ep, const cumoe_config_t *all)
{
    for (int32_t r = 0; r < ep->num_ranks; r++)
        for (size_t i = 0; i < sizeof agreed / sizeof agreed[0]; i++)
            CUMOE_REQUIRE(memcmp((const char *)&all[r] + agreed[i].offset, (const char *)&all[0] + agreed[i].offset,
                                 agreed[i].size) == 0,
                          COMM_ERROR, "%s: config.%s of rank %d is not that of rank 0, but must be the same",
                          function, agreed[i].name, r);
    return CUMOE_SUCCESS;
}

/* Send CONFIG to all ranks and compare what comes. device: [W + 1], host [W]. */
static cumoe_status_t exchange_configs(const cumoe_ep_t *ep, const cumoe_config_t *config, cumoe_config_t *device,
                                       cumoe_config_t *host, int64_t *numbers)
{
    const cumoe_backend_ops_t *ops = ep->handle->ops;
    const int32_t W = ep->num_ranks;
    int64_t *zero = numbers, *one = numbers + W, *rank = numbers + 2 * W;
    for (int32_t r = 0; r < W; r++) zero[r] = 0, one[r] = 1, rank[r] = r;
    const cumoe_transfer_t transfer = {.send = device + W,
                                       .recv = device,
                                       .row_size = sizeof *config,
                                       .sent = {zero, one},
                                       .received = {rank, one}};
    CUMOE_TRY(ops->memory_copy(ep->handle->device, device + W, config, sizeof *config, CUMOE_COPY_TO_DEVICE, NULL));
    CUMOE_TRY(ep->ops->exchange(ep->comm, &transfer, 1, NULL));
    CUMOE_TRY(ep->ops->wait(ep->comm, NULL, ep->timeout)); /* first: a copy to the host may wait without an end */
    CUMOE_TRY(
        ops->memory_copy(ep->handle->device, host, device, (size_t)W * sizeof *config, CUMOE_COPY_TO_HOST, NULL));
    return ops->stream_synchronize(ep->handle->device, NULL);
}

cumoe_status_t cumoe__ep_agree(const char *function, const cumoe_config_t *config)
{
    const cumoe_ep_t *ep = config->ep;
    const size_t W = (size_t)ep->num_ranks;
    cumoe_config_t *host = malloc(W * sizeof *host);
    int64_t *numbers = malloc(3 * W * sizeof *numbers);
    void *device = NULL;
    cumoe_status_t status = host && numbers ? cumoe_memory_alloc(ep->handle, (W + 1) * sizeof *host, &device)
                                            : cumoe__fail(CUMOE_OUT_OF_MEMORY, "%s: no host memory", function);
    if (status == CUMOE_SUCCESS) status = exchange_configs(ep, config, device, host, numbers);
    if (status == CUMOE_SUCCESS) status = compare(function, ep, host);
    cumoe_memory_free(ep->handle, device);
    free(numbers);
    free(host);
    return status;
}

cumoe_status_t cumoe_layer_experts_of_rank(const cumoe_layer_t *layer, int32_t rank, int32_t *first, int32_t *count)
{
    const char *function = "cumoe_layer_experts_of_rank";
    CUMOE_REQUIRE(layer, INVALID_ARGUMENT, "%s: layer = NULL, but must come from cumoe_layer_create()", function);
    CUMOE_REQUIRE(first && count, INVALID_ARGUMENT, "%s: %s = NULL, but the result needs a place", function,
                  first ? "count" : "first");
    const cumoe_ranks_t *ranks = &layer->context.ranks;
    CUMOE_REQUIRE(rank >= 0 && rank < ranks->count, INVALID_ARGUMENT, "%s: rank = %d, but must be 0..%d", function,
                  rank, ranks->count - 1);
    *first = cumoe__first_expert(&layer->context.config, ranks->count, rank);
    *count = cumoe__first_expert(&layer->context.config, ranks->count, rank + 1) - *first;
    return CUMOE_SUCCESS;
}

cumoe_status_t cumoe_ep_sum_gradients(const cumoe_layer_t *layer, const cumoe_weights_t *gradients,
                                      cumoe_stream_t stream)
{
    const char *function = "cumoe_ep_sum_gradients";
    CUMOE_REQUIRE(layer, INVALID_ARGUMENT, "%s: layer = NULL, but must come from cumoe_layer_create()", function);
    CUMOE_REQUIRE(gradients, INVALID_ARGUMENT, "%s: gradients = NULL, but is required", function);
    cumoe_weights_t ours;
    CUMOE_TRY(cumoe__weights_read(function, "gradients", layer, gradients, CUMOE_ROLE_GRADIENTS, &ours));
    CUMOE_TRY(cumoe__check_stream(function, layer->handle, stream));
    const cumoe_config_t *config = &layer->context.config;
    if (!config->ep) return CUMOE_SUCCESS;
    const int64_t flat = (int64_t)config->num_experts * config->hidden_size;
    const int64_t groups = (int64_t)config->num_groups * config->hidden_size;
    const cumoe_sum_t sums[] = {{ours.w_gate, flat, ours.gate_dtype},
                                {ours.w_noise, flat, ours.gate_dtype},
                                {ours.w_gate_primary, groups, ours.gate_dtype},
                                {ours.w_noise_primary, groups, ours.gate_dtype}};
    return config->ep->ops->sum(config->ep->comm, sums, sizeof sums / sizeof sums[0], stream);
}

cumoe_status_t cumoe_ep_sum(const cumoe_ep_t *ep, void *data, int64_t count, cumoe_dtype_t dtype,
                            cumoe_stream_t stream)
{
    const char *function = "cumoe_ep_sum";
    CUMOE_REQUIRE(ep, INVALID_ARGUMENT, "%s: ep = NULL, but must be a group of ranks", function);
    CUMOE_REQUIRE(count >= 0 && count <= (int64_t)1 << 58, INVALID_ARGUMENT,
                  "%s: count = %lld, but must be 0..2^58", function, (long long)count);
    CUMOE_REQUIRE(dtype == CUMOE_I32 || dtype == CUMOE_I64 || dtype == CUMOE_F32 || dtype == CUMOE_F64,
                  INVALID_ARGUMENT, "%s: dtype = %d, but must be F64 (1), F32 (2), I32 (5) or I64 (6)", function,
                  (int)dtype);
    CUMOE_TRY(cumoe__check_array(function, "data", data, cumoe__dtype_size(dtype), count > 0));
    CUMOE_TRY(cumoe__check_stream(function, ep->handle, stream));
    const cumoe_sum_t sum = {count > 0 ? data : NULL, count, dtype};
    return ep->ops->sum(ep->comm, &sum, 1, stream);
}

/* Where the rows of each rank begin in an array; 0 bytes without rows. */
static cumoe_status_t set_begin(const char *function, const char *name, const int64_t *count, int32_t W,
                                size_t row_size, int64_t *begin, size_t *size)
{
    const int64_t most = ((int64_t)1 << 58) / (int64_t)row_size;
    int64_t rows = 0;
    for (int32_t r = 0; r < W; rows += count[r++]) {
        CUMOE_REQUIRE(count[r] >= 0 && count[r] <= most - rows, INVALID_ARGUMENT,
                      "%s: %s[%d] = %lld, but must be 0..%lld, with which all rows are 2^58 bytes", function, name,
                      r, (long long)count[r], (long long)(most - rows));
        begin[r] = rows;
    }
    *size = (size_t)rows * row_size;
    return CUMOE_SUCCESS;
}

cumoe_status_t cumoe_ep_exchange(const cumoe_ep_t *ep, const cumoe_ep_exchange_args_t *args, cumoe_stream_t stream)
{
    const char *function = "cumoe_ep_exchange";
    cumoe_ep_exchange_args_t a;
    int64_t sent_begin[CUMOE_EP_MAX_RANKS], received_begin[CUMOE_EP_MAX_RANKS];
    size_t sent_size = 0, received_size = 0;
    CUMOE_REQUIRE(ep, INVALID_ARGUMENT, "%s: ep = NULL, but must be a group of ranks", function);
    CUMOE_TRY(cumoe__struct_read(function, "args", args, sizeof a, &a, sizeof a));
    CUMOE_REQUIRE(a.sent && a.received, INVALID_ARGUMENT,
                  "%s: %s = NULL, but must have a number for each of %d ranks", function,
                  a.sent ? "received" : "sent", ep->num_ranks);
    CUMOE_REQUIRE(a.row_size >= 1 && a.row_size <= (size_t)1 << 58, INVALID_ARGUMENT,
                  "%s: row_size = %zu, but must be 1..2^58", function, a.row_size);
    CUMOE_TRY(set_begin(function, "sent", a.sent, ep->num_ranks, a.row_size, sent_begin, &sent_size));
    CUMOE_TRY(
        set_begin(function, "received", a.received, ep->num_ranks, a.row_size, received_begin, &received_size));
    CUMOE_REQUIRE(a.sent[ep->rank] == a.received[ep->rank], INVALID_ARGUMENT,
                  "%s: received[%d] = %lld, but this rank sends itself %lld rows", function, ep->rank,
                  (long long)a.received[ep->rank], (long long)a.sent[ep->rank]);
    CUMOE_TRY(cumoe__check_array(function, "send", a.send, 1, sent_size > 0));
    CUMOE_TRY(cumoe__check_array(function, "recv", a.recv, 1, received_size > 0));
    CUMOE_REQUIRE(!sent_size || !received_size || (uintptr_t)a.send + sent_size <= (uintptr_t)a.recv ||
                      (uintptr_t)a.recv + received_size <= (uintptr_t)a.send,
                  INVALID_ARGUMENT, "%s: recv = %p overlaps send = %p, but must not", function, a.recv, a.send);
    CUMOE_TRY(cumoe__check_stream(function, ep->handle, stream));
    const cumoe_transfer_t transfer = {
        a.send, a.recv, a.row_size, {sent_begin, a.sent}, {received_begin, a.received}};
    return ep->ops->exchange(ep->comm, &transfer, 1, stream);
}
