/* The suites on every backend. Buffers stay host memory, so that a test writes and reads them as it likes. Where
 * the library works in device memory, a buffer that a call names gets a twin there, guard zones included, and a
 * call is: upload what it names, translate the pointers of its argument structs, call on a stream, wait, download.
 * On the CPU all that falls away, unless the environment variable CUMOE_TEST_MIRROR is 1, which tests the twins.
 *
 * A pointer outside of all buffers is passed on as it is: device memory of the test's own. */
#ifndef CUMOE_TESTS_DEVICE_H
#define CUMOE_TESTS_DEVICE_H

#include "tests/support/buffers.h"

#include <cumoe/cumoe.h>

/* The backend that the environment variable CUMOE_TEST_BACKEND names, cpu or cuda; the CPU if it is not set. */
cumoe_backend_t device_backend(void);

/* Shall tables be shortened? The environment variable CUMOE_TEST_SHORT is 1 or more: the simulator is slow. */
bool device_is_slow(void);

/* CUMOE_TEST_SHORT, at least 1: of what is left in the tables, one problem in so many is run. */
int device_share(void);

/* CUMOE_TEST_PART, 0 if it is not set: which of these, so that two runs look at different ones. */
int device_part(void);

/* Do buffers have twins? */
bool device_has_twins(const cumoe_handle_t *handle);

/* ---- a call, all in one ---- */

cumoe_status_t device_layer_forward(const cumoe_handle_t *handle, const cumoe_layer_t *layer,
                                    const cumoe_forward_args_t *args);
cumoe_status_t device_layer_backward(const cumoe_handle_t *handle, const cumoe_layer_t *layer,
                                     const cumoe_backward_args_t *args);
cumoe_status_t device_gate(const cumoe_handle_t *handle, const cumoe_layer_t *layer, const cumoe_gate_args_t *args);
cumoe_status_t device_permute(const cumoe_handle_t *handle, const cumoe_layer_t *layer,
                              const cumoe_permute_args_t *args);
cumoe_status_t device_experts_up(const cumoe_handle_t *handle, const cumoe_layer_t *layer,
                                 const cumoe_up_args_t *args);
cumoe_status_t device_experts_down(const cumoe_handle_t *handle, const cumoe_layer_t *layer,
                                   const cumoe_down_args_t *args);
cumoe_status_t device_combine(const cumoe_handle_t *handle, const cumoe_layer_t *layer,
                              const cumoe_combine_args_t *args);
cumoe_status_t device_experts_down_backward(const cumoe_handle_t *handle, const cumoe_layer_t *layer,
                                            const cumoe_down_backward_args_t *args);
cumoe_status_t device_gate_backward(const cumoe_handle_t *handle, const cumoe_layer_t *layer,
                                    const cumoe_gate_backward_args_t *args);
cumoe_status_t device_experts_up_backward(const cumoe_handle_t *handle, const cumoe_layer_t *layer,
                                          const cumoe_up_backward_args_t *args);
cumoe_status_t device_permute_backward(const cumoe_handle_t *handle, const cumoe_layer_t *layer,
                                       const cumoe_permute_backward_args_t *args);
cumoe_status_t device_optimizer_step(const cumoe_handle_t *handle, const cumoe_layer_t *layer,
                                     const cumoe_optimizer_args_t *args);
cumoe_status_t device_weights_init(const cumoe_handle_t *handle, const cumoe_layer_t *layer, uint64_t seed,
                                   const cumoe_weights_t *weights);

cumoe_status_t device_gate_bias_update(const cumoe_handle_t *handle, const cumoe_layer_t *layer, void *gate_bias,
                                       const int32_t *expert_count, float rate);

cumoe_status_t device_ep_plan(const cumoe_handle_t *handle, const cumoe_layer_t *layer,
                              const cumoe_forward_args_t *args, cumoe_ep_plan_t *plan, cumoe_ep_sizes_t *sizes);
cumoe_status_t device_ep_sum_gradients(const cumoe_handle_t *handle, const cumoe_layer_t *layer,
                                       const cumoe_weights_t *gradients);

/* ---- its pieces, where several calls or a captured graph stand between upload and download ---- */

enum { DEVICE_MAX_BUFFERS = 96, DEVICE_MAX_WEIGHTS = 4 };

typedef struct device_call {
    const cumoe_handle_t *handle;
    cumoe_stream_t stream; /* the call's own; NULL on the CPU */
    buffer_t *buffers[DEVICE_MAX_BUFFERS];
    cumoe_weights_t weights[DEVICE_MAX_WEIGHTS];
    int num_buffers, num_weights;
} device_call_t;

void device_begin(device_call_t *call, const cumoe_handle_t *handle);

/* The address that the library gets; the buffer behind it is uploaded, once. */
void *device_address(device_call_t *call, const void *host);

/* The same for every pointer of a struct, in place. */
void device_forward_args(device_call_t *call, cumoe_forward_args_t *args);
void device_backward_args(device_call_t *call, cumoe_backward_args_t *args);
void device_optimizer_args(device_call_t *call, cumoe_optimizer_args_t *args);

/* Upload a buffer again that the host has changed since. */
void device_upload(device_call_t *call, const void *host);

/* All that was named so far. */
void device_upload_all(device_call_t *call);

/* Wait, and download every buffer that was named. */
cumoe_status_t device_download(device_call_t *call);

/* device_download() and the end. */
cumoe_status_t device_end(device_call_t *call);

/* ---- device memory that the library, or the test itself, has allocated ---- */

/* A buffer in the list whose twin is size bytes of that memory, with their contents. Without twins: memory itself.
 */
void *device_adopt(buffer_list_t *list, const cumoe_handle_t *handle, void *memory, size_t size);

/* Copies between host memory and device memory, and wait. */
void device_write(const cumoe_handle_t *handle, void *memory, const void *host, size_t size);
void device_read(const cumoe_handle_t *handle, void *host, const void *memory, size_t size);

#endif
