/* The CPU backend, shared by its stages. Arithmetic is F32, or F64 with F64 tokens; 16-bit values are
 * widened as they are read and rounded as they are written. Stages whose arithmetic is their own are written once
 * for both in a *_real.h file, included with REAL (the type) and FN (the suffix of names) defined. */
#ifndef CUMOE_CPU_H
#define CUMOE_CPU_H

#include "host/arena.h"
#include "host/backend.h"
#include "host/cpu/gemm.h"
#include "host/kinds.h"

/* One function body, compiled for the machines that differ most in vector length; the loader picks. */
#if defined(__x86_64__) && defined(__gnu_linux__) && !defined(__clang__) && !defined(__SANITIZE_ADDRESS__) &&      \
    !defined(__SANITIZE_THREAD__)
#define CUMOE_CPU_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define CUMOE_CPU_CLONES
#endif

/* The slots of a token. */
typedef struct cumoe_cpu_slots {
    int64_t begin, end;
} cumoe_cpu_slots_t;

static inline cumoe_cpu_slots_t cumoe__cpu_slots_of(const cumoe_config_t *c, const int32_t *token_slot, int64_t t)
{
    const cumoe_cpu_slots_t slots = {token_slot ? token_slot[t] : t * c->top_k,
                                     token_slot ? token_slot[t + 1] : (t + 1) * c->top_k};
    return slots;
}

size_t cumoe__cpu_gate_workspace(const cumoe_context_t *context, int64_t num_tokens);
size_t cumoe__cpu_gate_backward_workspace(const cumoe_context_t *context, int64_t num_tokens);
size_t cumoe__cpu_permute_workspace(const cumoe_context_t *context, int64_t num_tokens);
size_t cumoe__cpu_down_backward_workspace(const cumoe_context_t *context, int64_t num_tokens);

cumoe_status_t cumoe__cpu_gate(const cumoe_context_t *, const cumoe_gate_args_t *, cumoe_stream_t);
cumoe_status_t cumoe__cpu_permute(const cumoe_context_t *, const cumoe_permute_args_t *, cumoe_stream_t);
cumoe_status_t cumoe__cpu_up(const cumoe_context_t *, const cumoe_up_args_t *, cumoe_stream_t);
cumoe_status_t cumoe__cpu_down(const cumoe_context_t *, const cumoe_down_args_t *, cumoe_stream_t);
cumoe_status_t cumoe__cpu_combine(const cumoe_context_t *, const cumoe_combine_args_t *, cumoe_stream_t);
cumoe_status_t cumoe__cpu_down_backward(const cumoe_context_t *, const cumoe_down_backward_args_t *,
                                        cumoe_stream_t);
cumoe_status_t cumoe__cpu_gate_backward(const cumoe_context_t *, const cumoe_gate_backward_args_t *,
                                        cumoe_stream_t);
cumoe_status_t cumoe__cpu_up_backward(const cumoe_context_t *, const cumoe_up_backward_args_t *, cumoe_stream_t);
cumoe_status_t cumoe__cpu_permute_backward(const cumoe_context_t *, const cumoe_permute_backward_args_t *,
                                           cumoe_stream_t);
int cumoe__cpu_gate_sums(const cumoe_context_t *, const cumoe_gate_args_t *, cumoe_sum_t sums[CUMOE_GATE_MAX_SUMS]);
cumoe_status_t cumoe__cpu_gate_finish(const cumoe_context_t *, const cumoe_gate_args_t *, cumoe_stream_t);
cumoe_status_t cumoe__cpu_dispatch_mark(const cumoe_context_t *, const cumoe_dispatch_args_t *, cumoe_stream_t);
cumoe_status_t cumoe__cpu_dispatch_count(const cumoe_context_t *, const cumoe_dispatch_args_t *, cumoe_stream_t);
cumoe_status_t cumoe__cpu_dispatch_pack(const cumoe_context_t *, const cumoe_dispatch_args_t *, cumoe_stream_t);
cumoe_status_t cumoe__cpu_arrive_begin(const cumoe_context_t *, const cumoe_arrive_args_t *, cumoe_stream_t);
cumoe_status_t cumoe__cpu_arrive_end(const cumoe_context_t *, const cumoe_arrive_args_t *, cumoe_stream_t);
cumoe_status_t cumoe__cpu_gather(const cumoe_context_t *, const cumoe_gather_args_t *, cumoe_stream_t);
cumoe_status_t cumoe__cpu_gate_bias_update(const cumoe_context_t *, void *gate_bias, const int32_t *expert_count,
                                           float rate, cumoe_stream_t);
cumoe_status_t cumoe__cpu_weights_init(const cumoe_context_t *, uint64_t seed, const cumoe_weights_t *,
                                       cumoe_stream_t);
cumoe_status_t cumoe__cpu_optimizer_step(const cumoe_context_t *, const cumoe_optimizer_args_t *,
                                         const cumoe_parameter_t *parameters, int count, cumoe_stream_t);

#endif
