/* The update of values by Adam, or by the means of the squared gradients (factored). Element by element the same
 * operations as on the CPU, in whatever layout and grid: the same bits where the host knows the numbers of the
 * step, and within rounding where the device works them out (optimizer.cuh). */
#include "cuda/optimizer.cuh"

namespace cumoe
{

namespace
{

constexpr int kThreads = 256;

/* For which there are registers: the launch bounds, and the grid. */
template <typename Real>
constexpr int kBlocksPerSm = sizeof(Real) == 8 ? 2 : 3;

constexpr int kTileRows = 32; // that a thread's factors of columns serve
constexpr int kTile = 32, kTileLines = kThreads / kTile;

/* As many values as 16 bytes of state. */
template <typename Real>
constexpr int kVector = 16 / sizeof(Real);

/* The numbers of a step in the type of arithmetic. */
template <typename Real>
struct Numbers {
    Real scale, beta1, rest1, beta2, rest2, rate, root, epsilon, decay, factored_rate;
    __device__ __forceinline__ explicit Numbers(const Step &s)
        : scale(static_cast<Real>(s.gradient_scale)), beta1(static_cast<Real>(s.beta1)),
          rest1(static_cast<Real>(s.rest1)), beta2(static_cast<Real>(s.beta2)), rest2(static_cast<Real>(s.rest2)),
          rate(static_cast<Real>(s.rate)), root(static_cast<Real>(s.root)), epsilon(static_cast<Real>(s.epsilon)),
          decay(static_cast<Real>(s.decay)), factored_rate(static_cast<Real>(s.factored_rate))
    {
    }
};

template <typename Real>
__device__ __forceinline__ void adam(const Numbers<Real> &n, Real gradient, Real &value, Real &moment1,
                                     Real &moment2)
{
    const Real g = n.scale * gradient;
    const Real m = n.beta1 * moment1 + n.rest1 * g, v = n.beta2 * moment2 + n.rest2 * (g * g);
    moment1 = m;
    moment2 = v;
    value -= n.rate * m / (sqrt(v) * n.root + n.epsilon) + n.decay * value;
}

/* w -= learning_rate * g / sqrt(r c / mean(r) / (1 - beta2^t)). The roots are taken one by one: r c may be too
 * small for F32 where g is 0. */
template <typename Real>
__device__ __forceinline__ Real row_factor_of(const Numbers<Real> &n, const cumoe_parameter_t &p, int64_t expert,
                                              int64_t row)
{
    const Real average = static_cast<const Real *>(p.average)[expert];
    return n.scale * sqrt(average) / sqrt(static_cast<const Real *>(p.row_mean)[expert * p.rows + row]);
}

template <typename Real>
__device__ __forceinline__ Real col_factor_of(const Numbers<Real> &n, const cumoe_parameter_t &p, int64_t expert,
                                              int64_t col)
{
    return n.factored_rate / sqrt(static_cast<const Real *>(p.col_mean)[expert * p.cols + col]);
}

template <typename Real>
__device__ __forceinline__ void factored(const Numbers<Real> &n, Real gradient, Real row_factor, Real col_factor,
                                         Real &value)
{
    value -= gradient * row_factor * col_factor + n.decay * value;
}

template <typename Value, int kCount, typename Real>
__device__ __forceinline__ void read_as(const void *data, int64_t at, Real (&to)[kCount])
{
    const auto from = load_vector<Vector<Value, kCount>>(static_cast<const Value *>(data) + at);
    for (int i = 0; i < kCount; i++) to[i] = static_cast<Real>(widen(from.value[i]));
}

template <typename Value, int kCount, typename Real>
__device__ __forceinline__ void write_as(void *data, int64_t at, const Real (&from)[kCount])
{
    Vector<Value, kCount> to;
    for (int i = 0; i < kCount; i++) to.value[i] = narrow<Value>(static_cast<real_of<Value>>(from[i]));
    store_vector(static_cast<Value *>(data) + at, to);
}

/* kCount neighbours, aligned to all of them. */
template <int kCount, typename Real>
__device__ __forceinline__ void read(const void *data, cumoe_dtype_t dtype, int64_t at, Real (&to)[kCount])
{
    if (dtype == CUMOE_BF16)
        read_as<__nv_bfloat16>(data, at, to);
    else if (dtype == CUMOE_F16)
        read_as<__half>(data, at, to);
    else
        read_as<Real>(data, at, to);
}

template <int kCount, typename Real>
__device__ __forceinline__ void write(void *data, cumoe_dtype_t dtype, int64_t at, const Real (&from)[kCount])
{
    if (dtype == CUMOE_BF16)
        write_as<__nv_bfloat16>(data, at, from);
    else if (dtype == CUMOE_F16)
        write_as<__half>(data, at, from);
    else
        write_as<Real>(data, at, from);
}

/* kCount neighbours in a row, where columns stand side by side. */
template <typename Real, bool kFactored, int kCount>
__device__ __forceinline__ void update_neighbours(const Numbers<Real> &numbers, const cumoe_parameter_t &p,
                                                  bool first, int64_t expert, int64_t row, int64_t col,
                                                  const Real (&col_factor)[kCount])
{
    const cumoe_dtype_t real = sizeof(Real) == 8 ? CUMOE_F64 : CUMOE_F32;
    const int64_t value_at = expert * p.value.expert_stride + row * p.value.row_stride + col;
    const int64_t gradient_at = expert * p.gradient.expert_stride + row * p.gradient.row_stride + col;
    const int64_t at = (expert * p.rows + row) * p.cols + col; // in the state
    Real gradient[kCount], value[kCount];
    read(p.gradient.data, p.gradient.dtype, gradient_at, gradient);
    if (p.master && !first)
        read(p.master, real, at, value);
    else
        read(p.value.data, p.value.dtype, value_at, value);
    if constexpr (kFactored) {
        const Real row_factor = row_factor_of(numbers, p, expert, row);
        for (int i = 0; i < kCount; i++) factored(numbers, gradient[i], row_factor, col_factor[i], value[i]);
    } else {
        Real moment1[kCount], moment2[kCount];
        read(p.moment1, real, at, moment1);
        read(p.moment2, real, at, moment2);
        for (int i = 0; i < kCount; i++) adam(numbers, gradient[i], value[i], moment1[i], moment2[i]);
        write(p.moment1, real, at, moment1);
        write(p.moment2, real, at, moment2);
    }
    if (p.master) write(p.master, real, at, value);
    write(p.value.data, p.value.dtype, value_at, value);
}

/* Where columns stand side by side, in whole vectors: a thread has a vector of several rows. WIDTH threads share a
 * row. */
template <typename Real, bool kFactored>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm<Real>)
    optimizer_rows_kernel(StepSource source, cumoe_parameter_t p, int32_t width)
{
    constexpr int kCount = kVector<Real>;
    SharedArena arena;
    const Step step = read_step(source, StepArrays(arena));
    const Numbers<Real> numbers(step);
    const int64_t row_tiles = divide_up(p.rows, kTileRows), col_tiles = divide_up(p.cols, width * kCount);
    const int64_t work = step.skip ? 0 : p.experts * row_tiles * col_tiles;
    for (int64_t at = blockIdx.x; at < work; at += gridDim.x) {
        const int64_t row_tile = at / col_tiles, expert = row_tile / row_tiles;
        const int64_t col = ((at - row_tile * col_tiles) * width + threadIdx.x % width) * kCount;
        const int64_t first_row = (row_tile - expert * row_tiles) * kTileRows;
        const int64_t end = p.rows - first_row < kTileRows ? p.rows : first_row + kTileRows;

        if (col >= p.cols) continue;

        Real col_factor[kCount] = {};
        for (int i = 0; kFactored && i < kCount; i++) col_factor[i] = col_factor_of(numbers, p, expert, col + i);
        for (int64_t row = first_row + threadIdx.x / width; row < end; row += kThreads / width)
            update_neighbours<Real, kFactored>(numbers, p, step.first, expert, row, col, col_factor);
    }
}

template <typename Real>
struct TileArrays {
    StepArrays step;
    Real *gradient, *value; // [32, 33] the last column only keeps the others in different banks
    __host__ __device__ explicit TileArrays(SharedArena &arena)
        : step(arena), gradient(arena.take<Real>(kTile * (kTile + 1))), value(arena.take<Real>(kTile * (kTile + 1)))
    {
    }
};

/* 32 x 32 elements of an expert, fewer at the edges. */
struct Tile {
    int64_t expert, row, col;
    int rows, cols;
};

/* visit(row, col, element of the matrix) for this thread's part of a tile, so that neighbours in memory are visited
 * by neighbouring threads. */
template <typename Visit>
__device__ __forceinline__ void visit_tile(const cumoe_matrix_t &m, const Tile &tile, const Visit &visit)
{
    const int64_t begin = tile.expert * m.expert_stride + tile.row * m.row_stride + tile.col * m.col_stride;
    const int side = threadIdx.x % kTile;
    const bool transposed = is_transposed(m);
    for (int line = threadIdx.x / kTile; line < kTile; line += kTileLines) {
        const int row = transposed ? side : line, col = transposed ? line : side;
        if (row < tile.rows && col < tile.cols) visit(row, col, begin + row * m.row_stride + col * m.col_stride);
    }
}

/* Any layout: tiles go through shared memory, so that each array is walked along its shorter stride. */
template <typename Real, bool kFactored>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm<Real>)
    optimizer_tiles_kernel(StepSource source, cumoe_parameter_t p)
{
    SharedArena arena;
    const TileArrays<Real> shared(arena);
    const Step step = read_step(source, shared.step);
    const Numbers<Real> numbers(step);
    const bool from_master = p.master && !step.first;
    const int64_t row_tiles = divide_up(p.rows, kTile), col_tiles = divide_up(p.cols, kTile);
    const int64_t work = step.skip ? 0 : p.experts * row_tiles * col_tiles;
    for (int64_t at = blockIdx.x; at < work; at += gridDim.x) {
        const int64_t row_tile = at / col_tiles;
        Tile tile;
        tile.expert = row_tile / row_tiles;
        tile.row = (row_tile - tile.expert * row_tiles) * kTile;
        tile.col = (at - row_tile * col_tiles) * kTile;
        tile.rows = static_cast<int>(p.rows - tile.row < kTile ? p.rows - tile.row : kTile);
        tile.cols = static_cast<int>(p.cols - tile.col < kTile ? p.cols - tile.col : kTile);

        // Fetch.
        visit_tile(p.gradient, tile, [&](int row, int col, int64_t element) {
            shared.gradient[row * (kTile + 1) + col] = load<Real>(p.gradient.data, p.gradient.dtype, element);
        });
        if (!from_master)
            visit_tile(p.value, tile, [&](int row, int col, int64_t element) {
                shared.value[row * (kTile + 1) + col] = load<Real>(p.value.data, p.value.dtype, element);
            });
        sync_threads(); // the tile is there

        // Update, along the rows of the state.
        const cumoe_matrix_t state = {nullptr, p.value.dtype, p.rows * p.cols, p.cols, 1};
        visit_tile(state, tile, [&](int row, int col, int64_t element) {
            Real *master = static_cast<Real *>(p.master), *value = &shared.value[row * (kTile + 1) + col];
            const Real gradient = shared.gradient[row * (kTile + 1) + col];
            Real updated = from_master ? master[element] : *value;
            if constexpr (kFactored)
                factored(numbers, gradient, row_factor_of(numbers, p, tile.expert, tile.row + row),
                         col_factor_of(numbers, p, tile.expert, tile.col + col), updated);
            else
                adam(numbers, gradient, updated, static_cast<Real *>(p.moment1)[element],
                     static_cast<Real *>(p.moment2)[element]);
            if (master) master[element] = updated;
            *value = updated;
        });
        sync_threads(); // the tile is updated

        // Put it back. The next tile needs no barrier: each value is fetched by the thread that puts it back here.
        visit_tile(p.value, tile, [&](int row, int col, int64_t element) {
            store(p.value.data, p.value.dtype, element, shared.value[row * (kTile + 1) + col]);
        });
    }
}

bool has_aligned_rows(const cumoe_matrix_t &m, const cumoe_parameter_t &p, int64_t vector)
{
    const uintptr_t bytes = static_cast<uintptr_t>(vector) * cumoe__dtype_size(m.dtype);
    return m.col_stride == 1 && reinterpret_cast<uintptr_t>(m.data) % bytes == 0 &&
           (p.rows == 1 || m.row_stride % vector == 0) && (p.experts == 1 || m.expert_stride % vector == 0);
}

/* Whether vectors of every row are aligned, in the state too. */
bool has_vectors(const cumoe_parameter_t &p, int64_t vector)
{
    return has_aligned_rows(p.value, p, vector) && has_aligned_rows(p.gradient, p, vector) && p.cols % vector == 0;
}

/* The same array with the rows of an expert as one, and all experts as one, where they stand right behind each
 * other: for what is done element by element. */
cumoe_parameter_t joined(cumoe_parameter_t p)
{
    const auto both = [&](int64_t cumoe_matrix_t::*stride, int64_t is) {
        return p.value.*stride == is && p.gradient.*stride == is;
    };
    if (!both(&cumoe_matrix_t::col_stride, 1)) return p;
    if (p.rows > 1 && both(&cumoe_matrix_t::row_stride, p.cols)) {
        p.cols *= p.rows;
        p.rows = 1;
    }
    if (p.experts > 1 && p.rows == 1 && both(&cumoe_matrix_t::expert_stride, p.cols)) {
        p.cols *= p.experts;
        p.experts = 1;
    }
    return p;
}

template <typename Real, bool kFactored>
cudaError_t launch_update(const cumoe_context_t &context, const StepSource &source, const cumoe_parameter_t &p,
                          cudaStream_t stream)
{
    constexpr int kCount = kVector<Real>;
    const cumoe_parameter_t rows = kFactored ? p : joined(p);
    if (has_vectors(rows, kCount)) {
        const int width = side_by_side(divide_up(rows.cols, kCount), kThreads);
        const int64_t tiles = rows.experts * divide_up(rows.rows, kTileRows) * divide_up(rows.cols, width * kCount);
        return launch(
            {resident_blocks(context, tiles, kBlocksPerSm<Real>), kThreads, stream, shared_bytes<StepArrays>()},
            optimizer_rows_kernel<Real, kFactored>, source, rows, width);
    }
    const int64_t tiles = p.experts * divide_up(p.rows, kTile) * divide_up(p.cols, kTile);
    return launch(
        {resident_blocks(context, tiles, kBlocksPerSm<Real>), kThreads, stream, shared_bytes<TileArrays<Real>>()},
        optimizer_tiles_kernel<Real, kFactored>, source, p);
}

} // namespace

cudaError_t optimizer_update(const cumoe_context_t &context, const StepSource &source, const cumoe_parameter_t &p,
                             cudaStream_t stream)
{
    const bool f64 = context.config.dtype == CUMOE_F64;
    if (p.row_mean)
        return f64 ? launch_update<double, true>(context, source, p, stream)
                   : launch_update<float, true>(context, source, p, stream);
    return f64 ? launch_update<double, false>(context, source, p, stream)
               : launch_update<float, false>(context, source, p, stream);
}

} // namespace cumoe
