/* Back from rows to tokens: y, the weighted sum of the experts' outputs, and, backward, dx, the sum of the rows'
 * gradients. Bound by memory: a thread asks for several rows of a token before it adds the first. */
#include "cuda/launch.cuh"
#include "cuda/stages.cuh"
#include "cuda/vector.cuh"

namespace cumoe
{

namespace
{

constexpr int kThreads = 256;
constexpr int kInFlight = 8; // rows

/* to[t] = start[t] + sum over the choices j of t, ascending, of weight[t, j] * rows[row of (t, j)] */
struct TokenSums {
    const int32_t *slot_row;   // [S] -1 = none
    const int32_t *token_slot; // [T + 1] where the slots of a token begin; NULL: every token has K
    const void *weight;        // [S] of the gate type; NULL = 1
    const void *rows;          // [R, H]
    const void *start;         // [T, H] of the gate type; NULL = 0
    void *to;                  // [T, H]
    int64_t to_stride;         // in elements
    const cumoe_call_t *call;  // [1]
    int64_t num_tokens, hidden_size;
    int32_t top_k;
    cumoe_dtype_t dtype; // of rows and to
};

/* Which of a block's threads has which columns of which token. */
struct Shape {
    int32_t width;  // threads of a token
    int32_t chunks; // blocks of a token
};

/* Columns in accesses of 16 bytes. */
template <typename Value>
struct WholeVectors {
    using Real = real_of<Value>;
    static constexpr int kColumns = 16 / sizeof(Value);
    static constexpr bool kPacked = sizeof(Value) == 2;
    using Vector16 = Vector<Value, kColumns>;
    using Piece = std::conditional_t<kPacked, uint4, Vector16>; // as words 16-bit values stay together in registers

    static __device__ __forceinline__ Piece read(const void *data, cumoe_dtype_t, int64_t at)
    {
        return load_vector<Piece>(static_cast<const Value *>(data) + at);
    }
    static __device__ __forceinline__ void widen_to(const Piece &piece, Real (&real)[kColumns])
    {
        if constexpr (kPacked) {
            const uint32_t words[4] = {piece.x, piece.y, piece.z, piece.w};
            for (int c = 0; c < kColumns; c++) {
                const uint32_t bits = words[c / 2] >> 16 * (c % 2) & 0xffff;
                if constexpr (std::is_same_v<Value, __half>)
                    real[c] = __half2float(__ushort_as_half(static_cast<unsigned short>(bits)));
                else
                    real[c] = bits_float(bits << 16);
            }
        } else {
            for (int c = 0; c < kColumns; c++) real[c] = piece.value[c];
        }
    }
    static __device__ __forceinline__ void write(void *data, cumoe_dtype_t, int64_t at,
                                                 const Real (&real)[kColumns])
    {
        Vector16 vector;
        for (int c = 0; c < kColumns; c++) vector.value[c] = narrow<Value>(real[c]);
        store_vector(static_cast<Value *>(data) + at, vector);
    }
    static __device__ __forceinline__ void read_start(const void *data, int64_t at, Real (&real)[kColumns])
    {
        constexpr int kReals = 16 / sizeof(Real);
        using Reals = Vector<Real, kReals>;
        const Real *from = static_cast<const Real *>(data) + at;
        for (int i = 0; i < kColumns / kReals; i++) {
            const Reals reals = load_vector<Reals>(from + i * kReals);
            for (int c = 0; c < kReals; c++) real[i * kReals + c] = reals.value[c];
        }
    }
};

/* One by one, of any width, stride and alignment. */
template <typename Real_>
struct SingleColumns {
    using Real = Real_;
    using Piece = Real;
    static constexpr int kColumns = 1;

    static __device__ __forceinline__ Piece read(const void *data, cumoe_dtype_t dtype, int64_t at)
    {
        return load<Real>(data, dtype, at);
    }
    static __device__ __forceinline__ void widen_to(const Piece &piece, Real (&real)[1])
    {
        real[0] = piece;
    }
    static __device__ __forceinline__ void write(void *data, cumoe_dtype_t dtype, int64_t at, const Real (&real)[1])
    {
        store(data, dtype, at, real[0]);
    }
    static __device__ __forceinline__ void read_start(const void *data, int64_t at, Real (&real)[1])
    {
        real[0] = static_cast<const Real *>(data)[at];
    }
};

template <typename Columns>
__global__ void __launch_bounds__(kThreads, 3) token_sums_kernel(TokenSums sums, Shape shape)
{
    using Real = typename Columns::Real;
    constexpr int kColumns = Columns::kColumns;
    const uint32_t width = static_cast<uint32_t>(shape.width), chunks = static_cast<uint32_t>(shape.chunks);
    const int64_t t = static_cast<int64_t>(blockIdx.x / chunks) * (kThreads / width) + threadIdx.x / width;
    const int64_t column = (static_cast<int64_t>(blockIdx.x % chunks) * width + threadIdx.x % width) * kColumns;
    if (t >= sums.call->live_tokens || column >= sums.hidden_size) return;
    const int64_t slot = sums.token_slot ? sums.token_slot[t] : t * sums.top_k;
    const int32_t count = sums.token_slot ? static_cast<int32_t>(sums.token_slot[t + 1] - slot) : sums.top_k;
    const int32_t *row_of = sums.slot_row + slot;
    const Real *weight = sums.weight ? static_cast<const Real *>(sums.weight) + slot : nullptr;

    Real sum[kColumns] = {};
    if (sums.start) Columns::read_start(sums.start, t * sums.hidden_size + column, sum);
    bool unusable = false; // a slot that has no row, and NaN as its weight

    for (int32_t first = 0; first < count; first += kInFlight) {
        // Ask for some rows, and for their weights beside where they are.
        int32_t row[kInFlight];
        Real factor[kInFlight];
        typename Columns::Piece piece[kInFlight] = {};
        for (int j = 0; j < kInFlight; j++) {
            const bool chosen = first + j < count;
            row[j] = chosen ? row_of[first + j] : -1;
            factor[j] = chosen && weight ? weight[first + j] : Real(1);
        }
        for (int j = 0; j < kInFlight; j++)
            if (row[j] >= 0) piece[j] = Columns::read(sums.rows, sums.dtype, row[j] * sums.hidden_size + column);
        for (int j = 0; j < kInFlight; j++) unusable |= row[j] < 0 && factor[j] != factor[j];
        // Add them in the order of the choices.
        for (int j = 0; j < kInFlight; j++) {
            if (row[j] < 0) continue;
            Real value[kColumns];
            Columns::widen_to(piece[j], value);
            for (int c = 0; c < kColumns; c++) sum[c] += factor[j] * value[c];
        }
    }
    if (unusable)
        for (int c = 0; c < kColumns; c++) sum[c] = static_cast<Real>(NAN);
    Columns::write(sums.to, sums.dtype, t * sums.to_stride + column, sum);
}

template <typename Columns>
cudaError_t launch_columns(const TokenSums &sums, cudaStream_t stream)
{
    const int64_t vectors = (sums.hidden_size + Columns::kColumns - 1) / Columns::kColumns;
    const int width = side_by_side(vectors, kThreads), tokens = kThreads / width;
    const int64_t chunks = (vectors + width - 1) / width;
    const int64_t blocks = (sums.num_tokens + tokens - 1) / tokens * chunks;
    return launch({dim3(static_cast<unsigned>(blocks)), kThreads, stream}, token_sums_kernel<Columns>, sums,
                  Shape{width, static_cast<int32_t>(chunks)});
}

bool is_aligned(const void *address)
{
    return reinterpret_cast<uintptr_t>(address) % 16 == 0;
}

/* All rows of all arrays can be read 16 bytes at a time. */
bool has_whole_vectors(const TokenSums &sums)
{
    const int64_t columns = 16 / static_cast<int64_t>(cumoe__dtype_size(sums.dtype));
    return sums.hidden_size % columns == 0 && sums.to_stride % columns == 0 && is_aligned(sums.rows) &&
           is_aligned(sums.to) && is_aligned(sums.start);
}

cudaError_t launch_sums(const TokenSums &sums, cudaStream_t stream)
{
    const bool whole = has_whole_vectors(sums);
    if (sums.dtype == CUMOE_F64)
        return whole ? launch_columns<WholeVectors<double>>(sums, stream)
                     : launch_columns<SingleColumns<double>>(sums, stream);
    if (!whole) return launch_columns<SingleColumns<float>>(sums, stream);
    if (sums.dtype == CUMOE_BF16) return launch_columns<WholeVectors<__nv_bfloat16>>(sums, stream);
    if (sums.dtype == CUMOE_F16) return launch_columns<WholeVectors<__half>>(sums, stream);
    return launch_columns<WholeVectors<float>>(sums, stream);
}

} // namespace

cudaError_t combine(const cumoe_context_t &context, const cumoe_combine_args_t &args, cudaStream_t stream)
{
    const cumoe_config_t &config = context.config;
    return launch_sums({args.rows.slot_row, args.routing.token_slot, args.routing.weight, args.output, nullptr,
                        args.y, args.y_stride, args.routing.call, args.num_tokens, config.hidden_size, config.top_k,
                        config.dtype},
                       stream);
}

cudaError_t permute_backward(const cumoe_context_t &context, const cumoe_permute_backward_args_t &args,
                             cudaStream_t stream)
{
    const cumoe_config_t &config = context.config;
    return launch_sums({args.rows.slot_row, args.routing.token_slot, nullptr, args.drows, args.dx_gate, args.dx,
                        args.dx_stride, args.routing.call, args.num_tokens, config.hidden_size, config.top_k,
                        config.dtype},
                       stream);
}

} // namespace cumoe
