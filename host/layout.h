/* Where everything stands in the two buffers of a call. One function places the arrays; the size query asks it with
 * no buffers, the run with the caller's: size and use cannot drift apart. */
#ifndef CUMOE_LAYOUT_H
#define CUMOE_LAYOUT_H

#include "host/objects.h"

enum { CUMOE_LAYOUT_ARRAYS = 32 }; /* saved has fewer, each of which may end with padding */

typedef struct cumoe_layout {
    /* In saved when there is one, else in workspace. */
    cumoe_routing_t routing;
    cumoe_rows_t rows;
    void *z; /* [R, I or 2I]; in workspace with config.recompute */

    /* In workspace. */
    union {
        struct {
            void *hidden; /* [R, I]; z itself when nothing else needs z, and for IDENTITY */
            void *output; /* [R, H] */
        } forward;
        struct {
            void *dz;      /* [R, I or 2I] */
            void *drows;   /* [R, H]; dz itself for IDENTITY */
            void *dweight; /* [S] gate type */
            void *dx_gate; /* [T, H] gate type */
        } backward;
    };
    void *stage; /* scratch of one stage after the other */
    size_t stage_size;

    size_t workspace_size, saved_size; /* what all this takes */
} cumoe_layout_t;

typedef enum cumoe_pass {
    CUMOE_PASS_INFERENCE, /* forward, nothing kept */
    CUMOE_PASS_FORWARD,   /* forward, saved filled */
    CUMOE_PASS_BACKWARD
} cumoe_pass_t;

/* workspace and saved are NULL for the query. */
cumoe_layout_t cumoe__layout(const cumoe_layer_t *layer, cumoe_pass_t pass, int64_t num_tokens, void *workspace,
                             const void *saved);

#endif
