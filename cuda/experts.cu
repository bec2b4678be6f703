/* The experts: two grouped products forward, and their adjoints. Rows of an expert are gathered by the products,
 * activations are applied to a tile in shared memory. */
#include "cuda/experts_products.cuh"
#include "cuda/experts_sums.cuh"
#include "cuda/stages.cuh"
#include "host/arena.h"
#include "host/tile.h"

namespace cumoe
{

namespace
{

const ExpertProducts &products_of(const cumoe_config_t &c)
{
    if (cumoe__uses_tensor_cores(&c))
        return c.dtype == CUMOE_BF16 ? kTensorBf16 : c.dtype == CUMOE_F16 ? kTensorF16 : kTensorTf32;
    return c.dtype == CUMOE_F64 ? kExactF64 : kExactF32;
}

/* An expert matrix [E, rows, cols] as b: its rows, or its columns, are the columns of c. */
Operand matrix_operand(const cumoe_matrix_t &m, bool by_column)
{
    return {m.data,
            m.dtype,
            m.expert_stride,
            by_column ? m.col_stride : m.row_stride,
            by_column ? m.row_stride : m.col_stride,
            nullptr};
}

/* Rows [R, width] as lines; rows of tokens [T, width] with their index. */
Operand rows_operand(const void *data, cumoe_dtype_t dtype, int64_t stride, const int32_t *index = nullptr)
{
    return {data, dtype, 0, stride, 1, index};
}

/* The same as depth. */
Operand depth_operand(const void *data, cumoe_dtype_t dtype, int64_t stride, const int32_t *index = nullptr)
{
    return {data, dtype, 0, 1, stride, index};
}

/* A product over all rows of the call; the factors are left to the caller. */
RowsProduct rows_product(const cumoe_config_t &c, const cumoe_rows_t &rows, int64_t num_tokens, int64_t n,
                         int64_t k)
{
    RowsProduct product = {};
    product.parts = product.terms = 1;
    product.n = n;
    product.k = k;
    product.tile = rows.tile;
    product.offset = rows.offset;
    product.max_rows = cumoe__max_rows(&c, num_tokens);
    product.groups = c.num_experts;
    return product;
}

/* A gradient [E, rows, cols] of the experts, unless it is not wanted. */
cudaError_t weight_gradient(const cumoe_context_t &context, const cumoe_matrix_t &gradient, int64_t rows,
                            int64_t cols, const Operand &a, const Operand &b, const int32_t *offset,
                            cumoe_gradient_mode_t mode, const int32_t *exponent, cudaStream_t stream)
{
    if (!gradient.data) return cudaSuccess;
    DepthProduct product = {};
    product.m = rows;
    product.n = cols;
    product.a = a;
    product.b = b;
    product.offset = offset;
    product.groups = context.config.num_experts;
    product.c = gradient.data;
    product.c_dtype = gradient.dtype;
    product.c_group_stride = gradient.expert_stride;
    product.c_row_stride = gradient.row_stride;
    product.c_col_stride = gradient.col_stride;
    product.add = mode == CUMOE_GRADIENT_ADD;
    product.exponent = exponent;
    return products_of(context.config).depth(context, product, stream);
}

ExpertShape shape_of(const cumoe_config_t &c)
{
    return {c.activation,
            c.dtype,
            {c.swiglu_limit, c.swiglu_alpha, c.swiglu_offset},
            c.intermediate_size,
            cumoe__z_width(&c)};
}

/* Where the glu half begins. */
template <typename T>
T *glu_half(const cumoe_config_t &c, T *z)
{
    using Byte = std::conditional_t<std::is_const_v<T>, const char, char>;
    return static_cast<Byte *>(z) + static_cast<size_t>(c.intermediate_size) * cumoe__dtype_size(c.dtype);
}

/* Scratch of down_backward. */
struct DownScratch {
    void *scaled;      // [R, I] of scaled_dtype: g * hidden * 2^-exponent, for dw_down
    void *partial;     // [R, panels] gate type
    int32_t *exponent; // [E]; 16 bits alone: so a small g leaves as much of hidden as a large one
    cumoe_dtype_t scaled_dtype;
    int64_t panels;
    size_t size;
};

DownScratch down_scratch(const cumoe_config_t &c, int64_t num_tokens, void *workspace)
{
    const int32_t columns = products_of(c).panel_columns;
    const size_t R = static_cast<size_t>(cumoe__max_rows(&c, num_tokens));
    const bool narrow = cumoe__dtype_size(c.dtype) == 2;
    cumoe_arena_t arena = {reinterpret_cast<uintptr_t>(workspace), 0};
    DownScratch s = {};
    s.scaled_dtype = narrow ? c.dtype : cumoe__gate_dtype(&c);
    s.panels = (c.intermediate_size + columns - 1) / columns;
    s.scaled =
        cumoe__take(&arena, R * static_cast<size_t>(c.intermediate_size) * cumoe__dtype_size(s.scaled_dtype));
    s.partial = cumoe__take(&arena, R * static_cast<size_t>(s.panels) * cumoe__dtype_size(cumoe__gate_dtype(&c)));
    if (narrow)
        s.exponent =
            static_cast<int32_t *>(cumoe__take(&arena, static_cast<size_t>(c.num_experts) * sizeof(int32_t)));
    s.size = arena.used;
    return s;
}

} // namespace

size_t up_workspace(const cumoe_context_t &, int64_t)
{
    return 0;
}

size_t down_workspace(const cumoe_context_t &, int64_t)
{
    return 0;
}

size_t down_backward_workspace(const cumoe_context_t &context, int64_t num_tokens)
{
    return down_scratch(context.config, num_tokens, nullptr).size;
}

size_t up_backward_workspace(const cumoe_context_t &, int64_t)
{
    return 0;
}

cudaError_t up(const cumoe_context_t &context, const cumoe_up_args_t &args, cudaStream_t stream)
{
    const cumoe_config_t &c = context.config;
    const cumoe_rows_t &rows = args.rows;
    if (cumoe__is_linear(c.activation)) { // z is x
        void *hidden = args.hidden != args.z ? args.hidden : nullptr;
        return copy_rows(context,
                         {args.x,
                          args.x_stride,
                          rows.row_token,
                          {args.z, hidden},
                          c.hidden_size,
                          rows.offset + c.num_experts,
                          cumoe__max_rows(&c, args.num_tokens)},
                         stream);
    }
    const bool glu = cumoe__is_glu(c.activation);
    RowsProduct product = rows_product(c, rows, args.num_tokens, c.intermediate_size, c.hidden_size);
    product.parts = glu ? 2 : 1;
    product.a[0] = rows_operand(args.x, c.dtype, args.x_stride, rows.row_token);
    product.b[0] = matrix_operand(cumoe__matrix_up(args.weights, &c, false), false);
    product.b[1] = matrix_operand(cumoe__matrix_up(args.weights, &c, true), false);
    const StoreActivated epilogue = {
        shape_of(c),
        {cumoe__bias_up(args.weights, &c, false), cumoe__bias_up(args.weights, &c, true)},
        args.z,
        args.hidden};
    return products_of(c).up(context, cumoe__row_tile(&c, args.num_tokens), product, epilogue, stream);
}

cudaError_t down(const cumoe_context_t &context, const cumoe_down_args_t &args, cudaStream_t stream)
{
    const cumoe_config_t &c = context.config;
    RowsProduct product = rows_product(c, args.rows, args.num_tokens, c.hidden_size, c.intermediate_size);
    product.a[0] = rows_operand(args.hidden, c.dtype, c.intermediate_size);
    product.b[0] = matrix_operand(cumoe__matrix_down(args.weights), false);
    const StoreRows epilogue = {args.output, c.dtype, c.hidden_size, 0, cumoe__bias_down(args.weights, &c)};
    return products_of(c).rows(context, cumoe__row_tile(&c, args.num_tokens), product, epilogue, stream);
}

namespace
{

/* d = gather(dy) w_down, and from it dz, scaled and the parts of dweight. */
cudaError_t hidden_gradient(const cumoe_context_t &context, const cumoe_down_backward_args_t &args,
                            const DownScratch &scratch, cudaStream_t stream)
{
    const cumoe_config_t &c = context.config;
    RowsProduct product = rows_product(c, args.rows, args.num_tokens, c.intermediate_size, c.hidden_size);
    product.a[0] = rows_operand(args.dy, c.dtype, args.dy_stride, args.rows.row_token);
    product.b[0] = matrix_operand(cumoe__matrix_down(args.weights), true);
    StoreActivatedBackward epilogue = {};
    epilogue.shape = shape_of(c);
    epilogue.row_slot = args.rows.row_slot;
    epilogue.z = args.z;
    epilogue.weight = args.routing.weight;
    epilogue.dz = args.dz;
    if (args.gradients->w_down) {
        epilogue.exponent = scratch.exponent;
        epilogue.scaled = scratch.scaled;
        epilogue.scaled_dtype = scratch.scaled_dtype;
    }
    epilogue.partial = scratch.partial;
    epilogue.panels = scratch.panels;
    return products_of(c).down_backward(context, cumoe__row_tile(&c, args.num_tokens), product, epilogue, stream);
}

} // namespace

cudaError_t down_backward(const cumoe_context_t &context, const cumoe_down_backward_args_t &args,
                          cudaStream_t stream)
{
    const cumoe_config_t &c = context.config;
    const cumoe_rows_t &rows = args.rows;
    const DownScratch scratch = down_scratch(c, args.num_tokens, args.workspace);
    cudaError_t error = cudaSuccess;
    if (args.gradients->w_down && scratch.exponent)
        error = weight_exponents(context, rows, static_cast<const float *>(args.routing.weight), scratch.exponent,
                                 stream);
    if (error == cudaSuccess) error = hidden_gradient(context, args, scratch, stream);
    if (error == cudaSuccess) error = write_dweight(context, args, scratch.partial, scratch.panels, stream);
    if (error == cudaSuccess)
        error = weight_gradient(context, cumoe__matrix_down(args.gradients), c.hidden_size, c.intermediate_size,
                                depth_operand(args.dy, c.dtype, args.dy_stride, rows.row_token),
                                depth_operand(scratch.scaled, scratch.scaled_dtype, c.intermediate_size),
                                rows.offset, args.gradient_mode, scratch.exponent, stream);
    if (error != cudaSuccess) return error;
    return bias_gradient(context,
                         {cumoe__bias_down(args.gradients, &c), args.gradient_mode == CUMOE_GRADIENT_ADD,
                          rows.offset, c.num_experts, c.hidden_size, args.dy, c.dtype, args.dy_stride,
                          rows.row_token, args.routing.weight, rows.row_slot},
                         stream);
}

namespace
{

/* drows = dz_up w_up + dz_glu w_glu: one sum, rounded once. */
cudaError_t rows_gradient(const cumoe_context_t &context, const cumoe_up_backward_args_t &args, cudaStream_t stream)
{
    const cumoe_config_t &c = context.config;
    const int64_t z_width = cumoe__z_width(&c);
    RowsProduct product = rows_product(c, args.rows, args.num_tokens, c.hidden_size, c.intermediate_size);
    product.terms = cumoe__is_glu(c.activation) ? 2 : 1;
    product.a[0] = rows_operand(args.dz, c.dtype, z_width);
    product.a[1] = rows_operand(glu_half(c, args.dz), c.dtype, z_width);
    product.b[0] = matrix_operand(cumoe__matrix_up(args.weights, &c, false), true);
    product.b[1] = matrix_operand(cumoe__matrix_up(args.weights, &c, true), true);
    const StoreRows epilogue = {args.drows, c.dtype, c.hidden_size, 0, {}};
    return products_of(c).rows(context, cumoe__row_tile(&c, args.num_tokens), product, epilogue, stream);
}

/* Gradients of w_up and b_up, or of the glu half. */
cudaError_t half_gradients(const cumoe_context_t &context, const cumoe_up_backward_args_t &args, bool glu,
                           cudaStream_t stream)
{
    const cumoe_config_t &c = context.config;
    const cumoe_rows_t &rows = args.rows;
    const void *dz = glu ? glu_half(c, args.dz) : args.dz;
    const int64_t z_width = cumoe__z_width(&c);
    const cudaError_t error = weight_gradient(
        context, cumoe__matrix_up(args.gradients, &c, glu), c.intermediate_size, c.hidden_size,
        depth_operand(dz, c.dtype, z_width), depth_operand(args.x, c.dtype, args.x_stride, rows.row_token),
        rows.offset, args.gradient_mode, nullptr, stream);
    if (error != cudaSuccess) return error;
    return bias_gradient(context,
                         {cumoe__bias_up(args.gradients, &c, glu), args.gradient_mode == CUMOE_GRADIENT_ADD,
                          rows.offset, c.num_experts, c.intermediate_size, dz, c.dtype, z_width, nullptr, nullptr,
                          nullptr},
                         stream);
}

} // namespace

cudaError_t up_backward(const cumoe_context_t &context, const cumoe_up_backward_args_t &args, cudaStream_t stream)
{
    const cumoe_config_t &c = context.config;
    if (cumoe__is_linear(c.activation)) { // z is x: dz is drows
        if (!args.drows || args.drows == args.dz) return cudaSuccess;
        return copy_rows(context,
                         {args.dz,
                          c.hidden_size,
                          nullptr,
                          {args.drows, nullptr},
                          c.hidden_size,
                          args.rows.offset + c.num_experts,
                          cumoe__max_rows(&c, args.num_tokens)},
                         stream);
    }
    cudaError_t error = args.drows ? rows_gradient(context, args, stream) : cudaSuccess;
    if (error == cudaSuccess) error = half_gradients(context, args, false, stream);
    if (error == cudaSuccess && cumoe__is_glu(c.activation)) error = half_gradients(context, args, true, stream);
    return error;
}

} // namespace cumoe
