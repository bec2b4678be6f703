#include "host/objects.h"

#include <cumoe/optimizer.h>

static cumoe_status_t unsupported(const char *function, const cumoe_layer_t *layer)
{
    CUMOE_REQUIRE(layer, INVALID_ARGUMENT, "%s: layer = NULL, but must come from cumoe_layer_create()", function);
    return cumoe__fail(CUMOE_UNSUPPORTED_CONFIG, "%s: the optimizer step is not in this version", function);
}

cumoe_status_t cumoe_optimizer_state_size(const cumoe_layer_t *layer, cumoe_optimizer_t optimizer,
                                          const cumoe_weights_t *weights, size_t *state_size)
{
    (void)optimizer;
    (void)weights;
    (void)state_size;
    return unsupported("cumoe_optimizer_state_size", layer);
}

cumoe_status_t cumoe_optimizer_step(const cumoe_layer_t *layer, const cumoe_optimizer_args_t *args,
                                    cumoe_stream_t stream)
{
    (void)args;
    (void)stream;
    return unsupported("cumoe_optimizer_step", layer);
}
