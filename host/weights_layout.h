/* Where the element (expert, row, column) of an expert's matrix or bias stands, whatever the layout: the one place
 * that knows strides and the placement of glu. */
#ifndef CUMOE_WEIGHTS_LAYOUT_H
#define CUMOE_WEIGHTS_LAYOUT_H

#include "host/kinds.h"

#include <cumoe/weights.h>

/* Element (e, row, col) stands at data + e * expert_stride + row * row_stride + col * col_stride. */
typedef struct cumoe_matrix {
    void *data; /* NULL = not wanted (gradients) */
    cumoe_dtype_t dtype;
    int64_t expert_stride, row_stride, col_stride;
} cumoe_matrix_t;

/* w_down [E, H, I]. Strides of weights are resolved. */
static inline cumoe_matrix_t cumoe__matrix_down(const cumoe_weights_t *w)
{
    const cumoe_matrix_t m = {w->w_down, w->dtype, w->down_expert_stride, w->down_row_stride, w->down_col_stride};
    return m;
}

/* w_up [E, I, H], or the glu half [E, I, H]. */
static inline cumoe_matrix_t cumoe__matrix_up(const cumoe_weights_t *w, const cumoe_config_t *config, bool glu)
{
    cumoe_matrix_t m = {w->w_up, w->dtype, w->up_expert_stride, w->up_row_stride, w->up_col_stride};
    if (w->glu == CUMOE_GLU_SEPARATE) {
        if (glu) m.data = w->w_glu;
        return m;
    }
    if (!m.data) return m;
    int64_t first_row = 0;
    if (w->glu == CUMOE_GLU_INTERLEAVED) {
        first_row = glu ? 0 : 1;
        m.row_stride *= 2;
    } else if (glu != (w->glu == CUMOE_GLU_FIRST)) {
        first_row = config->intermediate_size;
    }
    m.data = (char *)m.data + (size_t)(first_row * w->up_row_stride) * cumoe__dtype_size(w->dtype);
    return m;
}

/* b_down [E, H] as [E, 1, H]. */
static inline cumoe_matrix_t cumoe__bias_down(const cumoe_weights_t *w, const cumoe_config_t *config)
{
    const cumoe_matrix_t m = {w->b_down, w->dtype, config->hidden_size, 0, 1};
    return m;
}

/* b_up [E, I], or its glu half, as [E, 1, I]: what w_up is with one column. */
static inline cumoe_matrix_t cumoe__bias_up(const cumoe_weights_t *w, const cumoe_config_t *config, bool glu)
{
    cumoe_weights_t column = *w;
    column.w_up = w->b_up;
    column.w_glu = w->b_glu;
    column.up_row_stride = 1;
    column.up_expert_stride = (int64_t)config->intermediate_size * (w->glu == CUMOE_GLU_SEPARATE ? 1 : 2);
    cumoe_matrix_t m = cumoe__matrix_up(&column, config, glu);
    m.col_stride = m.row_stride;
    m.row_stride = 0;
    return m;
}

/* The arrays of experts from FIRST on. */
static inline cumoe_weights_t cumoe__weights_from(const cumoe_weights_t *w, const cumoe_config_t *config,
                                                  int64_t first)
{
    const int64_t H = config->hidden_size, I = config->intermediate_size;
    const int64_t biases_up = w->glu == CUMOE_GLU_SEPARATE ? I : 2 * I;
    cumoe_weights_t from = *w;
    const struct {
        void **array;
        int64_t elements; /* of an expert */
    } arrays[] = {{&from.w_up, w->up_expert_stride},
                  {&from.w_glu, w->up_expert_stride},
                  {&from.b_up, biases_up},
                  {&from.b_glu, I},
                  {&from.b_down, H},
                  {&from.w_down, w->down_expert_stride}};
    for (size_t i = 0; i < sizeof arrays / sizeof arrays[0]; i++)
        if (*arrays[i].array)
            *arrays[i].array =
                (char *)*arrays[i].array + first * arrays[i].elements * (int64_t)cumoe__dtype_size(w->dtype);
    return from;
}

#endif
