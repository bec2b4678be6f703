/* Foreign layouts of expert weights: glu and up in one array, transposed matrices. Packing reads them all, so
 * outputs and gradients have the bits of the separate, contiguous arrays. */
#include "tests/suite.h"

#include <stdlib.h>
#include <string.h>

enum { T = 29, H = 13, I = 18, E = 5 };

typedef struct layout {
    const char *name;
    cumoe_glu_placement_t glu;
    bool transposed;
} layout_t;

static const layout_t LAYOUTS[] = {
    {"glu first", CUMOE_GLU_FIRST, false},
    {"glu last", CUMOE_GLU_LAST, false},
    {"interleaved", CUMOE_GLU_INTERLEAVED, false},
    {"transposed", CUMOE_GLU_SEPARATE, true},
    {"glu first, transposed", CUMOE_GLU_FIRST, true},
    {"gpt-oss", CUMOE_GLU_INTERLEAVED, true},
};

/* Row of the combined [2I, H] array where row i of a half stands. */
static int combined_row(cumoe_glu_placement_t placement, bool glu, int i)
{
    if (placement == CUMOE_GLU_INTERLEAVED) return 2 * i + (glu ? 0 : 1);
    return i + ((placement == CUMOE_GLU_FIRST) == glu ? 0 : I);
}

/* Copy between the separate arrays of plain and the layout's arrays of foreign. */
static void convert(const layout_t *l, const cumoe_weights_t *plain, const cumoe_weights_t *foreign,
                    bool to_foreign)
{
    const int rows = l->glu == CUMOE_GLU_SEPARATE ? I : 2 * I;
    for (int e = 0; e < E; e++)
        for (int i = 0; i < I; i++)
            for (int h = 0; h < H; h++) {
                for (int glu = 0; glu < 2; glu++) {
                    const int row = l->glu == CUMOE_GLU_SEPARATE ? i : combined_row(l->glu, glu, i);
                    float *base = l->glu == CUMOE_GLU_SEPARATE && glu ? foreign->w_glu : foreign->w_up;
                    float *f = base + (size_t)e * rows * H + (l->transposed ? h * rows + row : row * H + h);
                    float *p = (float *)(glu ? plain->w_glu : plain->w_up) + ((size_t)e * I + i) * H + h;
                    *(to_foreign ? f : p) = *(to_foreign ? p : f);
                }
                float *f = (float *)foreign->w_down + (size_t)e * H * I + (l->transposed ? i * H + h : h * I + i);
                float *p = (float *)plain->w_down + (size_t)e * H * I + h * I + i;
                *(to_foreign ? f : p) = *(to_foreign ? p : f);
            }
}

static void *bytes(size_t size)
{
    void *made = aligned_alloc(64, (size + 63) / 64 * 64);
    cr_assert_not_null(made);
    return memset(made, 0xFF, (size + 63) / 64 * 64);
}

/* The expert matrices of a layout, poisoned; the gate is shared with plain. */
static cumoe_weights_t foreign_weights(const layout_t *l, const cumoe_weights_t *plain)
{
    const int rows = l->glu == CUMOE_GLU_SEPARATE ? I : 2 * I;
    cumoe_weights_t w = {
        .struct_size = sizeof w, .glu = l->glu, .w_gate = plain->w_gate, .w_noise = plain->w_noise};
    w.w_up = bytes((size_t)E * rows * H * sizeof(float));
    w.w_glu = l->glu == CUMOE_GLU_SEPARATE ? bytes((size_t)E * I * H * sizeof(float)) : NULL;
    w.w_down = bytes((size_t)E * H * I * sizeof(float));
    if (l->transposed) {
        w.up_row_stride = 1, w.up_col_stride = rows;
        w.down_row_stride = 1, w.down_col_stride = H;
    }
    return w;
}

static void free_foreign(const cumoe_weights_t *w)
{
    free(w->w_up);
    free(w->w_glu);
    free(w->w_down);
}

typedef struct pass {
    cumoe_layer_t *layer;
    void *x, *workspace, *saved;
    size_t workspace_size, saved_size;
} pass_t;

/* y, dx and the gradients. */
static void run(const pass_t *p, const cumoe_weights_t *w, const cumoe_weights_t *g, float *y, float *dx)
{
    const cumoe_forward_args_t forward = {.struct_size = sizeof forward,
                                          .num_tokens = T,
                                          .weights = w,
                                          .x = p->x,
                                          .y = y,
                                          .training = 1,
                                          .seed = 3,
                                          .workspace = p->workspace,
                                          .workspace_size = p->workspace_size,
                                          .saved = p->saved,
                                          .saved_size = p->saved_size};
    cr_assert_eq(cumoe_layer_forward(p->layer, &forward, NULL), CUMOE_SUCCESS, "%s", cumoe_last_error());
    const cumoe_backward_args_t backward = {.struct_size = sizeof backward,
                                            .num_tokens = T,
                                            .weights = w,
                                            .x = p->x,
                                            .dy = y,
                                            .training = 1,
                                            .dx = dx,
                                            .gradients = g,
                                            .workspace = p->workspace,
                                            .workspace_size = p->workspace_size,
                                            .saved = p->saved,
                                            .saved_size = p->saved_size};
    cr_assert_eq(cumoe_layer_backward(p->layer, &backward, NULL), CUMOE_SUCCESS, "%s", cumoe_last_error());
}

Test(layouts, have_the_bits_of_separate_arrays)
{
    cumoe_handle_t *handle = suite_handle();
    cumoe_config_t config;
    cr_assert_eq(cumoe_config_init(&config), CUMOE_SUCCESS);
    config.hidden_size = H, config.intermediate_size = I, config.num_experts = E, config.top_k = 2;
    config.activation = CUMOE_ACTIVATION_SWIGLU;
    pass_t p = {0};
    cumoe_weights_t w, g;
    cr_assert_eq(cumoe_layer_create(&p.layer, handle, &config), CUMOE_SUCCESS, "%s", cumoe_last_error());
    cr_assert_eq(cumoe_weights_create(p.layer, CUMOE_DTYPE_DEFAULT, &w), CUMOE_SUCCESS);
    cr_assert_eq(cumoe_weights_create(p.layer, CUMOE_DTYPE_DEFAULT, &g), CUMOE_SUCCESS);
    cr_assert_eq(cumoe_weights_init(p.layer, 1, &w, NULL), CUMOE_SUCCESS);
    cr_assert_eq(cumoe_layer_buffer_sizes(p.layer, T, &p.workspace_size, &p.saved_size), CUMOE_SUCCESS);
    p.workspace = bytes(p.workspace_size), p.saved = bytes(p.saved_size), p.x = bytes(T * H * sizeof(float));
    for (int i = 0; i < T * H; i++) ((float *)p.x)[i] = (float)((i * 37) % 101) / 50 - 1;
    float *y = bytes(T * H * sizeof(float)), *dx = bytes(T * H * sizeof(float));
    float *y2 = bytes(T * H * sizeof(float)), *dx2 = bytes(T * H * sizeof(float));
    run(&p, &w, &g, y, dx);

    for (size_t i = 0; i < sizeof LAYOUTS / sizeof LAYOUTS[0]; i++) {
        const layout_t *l = &LAYOUTS[i];
        cumoe_weights_t back, fw = foreign_weights(l, &w), fg = foreign_weights(l, &g),
                              initial = foreign_weights(l, &w);
        cr_assert_eq(cumoe_weights_create(p.layer, CUMOE_DTYPE_DEFAULT, &back), CUMOE_SUCCESS);
        convert(l, &w, &fw, true);
        run(&p, &fw, &fg, y2, dx2);
        cr_expect(memcmp(y, y2, T * H * sizeof(float)) == 0, "%s: y", l->name);
        cr_expect(memcmp(dx, dx2, T * H * sizeof(float)) == 0, "%s: dx", l->name);
        convert(l, &back, &fg, false);
        const size_t size = (size_t)E * I * H * sizeof(float);
        cr_expect(memcmp(g.w_up, back.w_up, size) == 0, "%s: dw_up", l->name);
        cr_expect(memcmp(g.w_glu, back.w_glu, size) == 0, "%s: dw_glu", l->name);
        cr_expect(memcmp(g.w_down, back.w_down, size) == 0, "%s: dw_down", l->name);

        /* Initial values do not depend on the layout. */
        initial.w_gate = initial.w_noise = NULL;
        cr_assert_eq(cumoe_weights_init(p.layer, 1, &initial, NULL), CUMOE_SUCCESS, "%s", cumoe_last_error());
        convert(l, &back, &initial, false);
        cr_expect(memcmp(w.w_up, back.w_up, size) == 0 && memcmp(w.w_glu, back.w_glu, size) == 0 &&
                      memcmp(w.w_down, back.w_down, size) == 0,
                  "%s: initial values", l->name);
        free_foreign(&fw);
        free_foreign(&fg);
        free_foreign(&initial);
        cumoe_weights_destroy(p.layer, &back);
    }
    void *owned[] = {p.workspace, p.saved, p.x, y, dx, y2, dx2};
    for (size_t i = 0; i < sizeof owned / sizeof owned[0]; i++) free(owned[i]);
    cumoe_weights_destroy(p.layer, &w);
    cumoe_weights_destroy(p.layer, &g);
    cumoe_layer_destroy(p.layer);
    cumoe_handle_destroy(handle);
}
