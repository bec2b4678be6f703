/* The two objects behind the interface, and the rules that several files of host/ share. */
#ifndef CUMOE_OBJECTS_H
#define CUMOE_OBJECTS_H

#include "host/backend.h"
#include "host/error.h"

#include <stdbool.h>

struct cumoe_handle {
    const cumoe_backend_ops_t *ops;
    cumoe_backend_t backend;
    void *device;
    char description[96];
};

struct cumoe_layer {
    const cumoe_handle_t *handle;
    cumoe_context_t context;
    cumoe_context_t experts; /* the same where the experts of this rank see it: with ranks, each row is a token */
    cumoe_context_t parcels; /* with ranks: tokens that are sorted by parcel */
    struct cumoe_traffic *bounded; /* with a capacity: what there is room for */
    cumoe_lane_t lane; /* with several chunks, where there are streams: what exchanges are enqueued on */
};

/* handle.c: NULL where the library was built without it. */
const cumoe_backend_ops_t *cumoe__backend_ops(cumoe_backend_t backend);

/* config.c: copy and check a caller's config; function names the public call in sentences. */
cumoe_status_t cumoe__config_read(const char *function, const cumoe_config_t *theirs, cumoe_config_t *ours);

/* config.c: copy a size-tagged struct of another version: a shorter one is filled up with what ours holds already,
 * a longer one accepted if the rest is zero. Both begin with size_t struct_size. */
cumoe_status_t cumoe__struct_read(const char *function, const char *name, const void *theirs, size_t first_size,
                                  void *ours, size_t our_size);

typedef struct cumoe_range {
    const char *name;
    const void *ptr;
    size_t size;
} cumoe_range_t;

/* tensors.c: rules about sizes and pointers of the arrays of a layer. */
cumoe_status_t cumoe__check_tokens(const char *function, const cumoe_layer_t *layer, int64_t num_tokens);
cumoe_status_t cumoe__check_array(const char *function, const char *name, const void *ptr, size_t alignment,
                                  bool required);
cumoe_status_t cumoe__check_stride(const char *function, const char *name, int64_t *stride, int64_t width,
                                   int64_t rows);
cumoe_status_t cumoe__check_stream(const char *function, const cumoe_handle_t *handle, cumoe_stream_t stream);
cumoe_status_t cumoe__check_buffer(const char *function, const char *name, const void *ptr, size_t size,
                                   size_t needed, int64_t num_tokens);
cumoe_status_t cumoe__check_first_token(const char *function, int64_t first_token, int64_t num_tokens);
cumoe_status_t cumoe__check_flag(const char *function, const char *name, int32_t flag);
cumoe_status_t cumoe__check_mode(const char *function, cumoe_gradient_mode_t mode);
/* The choices of EXTERNAL, and their types' defaults; refused elsewhere. */
cumoe_status_t cumoe__check_index(const char *function, const cumoe_layer_t *layer, int64_t num_tokens,
                                  const void *index_data, const void *weight_data, cumoe_dtype_t *index,
                                  cumoe_dtype_t *weight);
cumoe_status_t cumoe__check_batch_threshold(const char *function, const cumoe_layer_t *layer, const void *threshold,
                                            int32_t training);
/* ranges[0] is workspace, [1] saved, [2] routing: none may share a byte with another range. */
cumoe_status_t cumoe__check_buffers_apart(const char *function, const cumoe_range_t *ranges, size_t count);
bool cumoe__overlap(const void *a, int64_t a_stride, const void *b, int64_t b_stride, int64_t rows, int64_t width,
                    size_t element);

/* What a cumoe_weights_t is passed as. */
typedef enum cumoe_role {
    CUMOE_ROLE_WEIGHTS,         /* read: all arrays of the layer are required */
    CUMOE_ROLE_GRADIENTS,       /* any may be NULL, or all: theirs = NULL */
    CUMOE_ROLE_SOME_WEIGHTS,    /* written: any may be NULL */
    CUMOE_ROLE_TRAINED_WEIGHTS, /* written: all are required */
} cumoe_role_t;

/* weights.c: copy and check what a caller passes; strides and types of the copy are resolved. */
cumoe_status_t cumoe__weights_read(const char *function, const char *name, const cumoe_layer_t *layer,
                                   const cumoe_weights_t *theirs, cumoe_role_t role, cumoe_weights_t *ours);

#endif
