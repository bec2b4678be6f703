/* What becomes of the sums of the experts' products: the same as in host/cpu/experts_real.h. */
#pragma once

#include "cuda/epilogue.cuh"

namespace cumoe
{

template <typename Real>
struct Activated {
    Real hidden, by_up, by_glu;
};

/* host/activation.h by the type of arithmetic. */
__device__ __forceinline__ Activated<float> activate(cumoe_activation_t activation, float up, float glu,
                                                     cumoe_swiglu_t swiglu)
{
    const cumoe_activated_t_f32 a = cumoe__activate_f32(activation, up, glu, swiglu);
    return {a.hidden, a.by_up, a.by_glu};
}
__device__ __forceinline__ Activated<double> activate(cumoe_activation_t activation, double up, double glu,
                                                      cumoe_swiglu_t swiglu)
{
    const cumoe_activated_t_f64 a = cumoe__activate_f64(activation, up, glu, swiglu);
    return {a.hidden, a.by_up, a.by_glu};
}

template <typename Real>
__device__ __forceinline__ void round_run(Run<Real> &run, cumoe_dtype_t dtype)
{
#pragma unroll
    for (int i = 0; i < kRun; i++) run.at[i] = rounded(run.at[i], dtype);
}

/* What every epilogue here knows of the layer. */
struct ExpertShape {
    cumoe_activation_t activation;
    cumoe_dtype_t dtype; // of the tokens
    cumoe_swiglu_t swiglu;
    int64_t I, z_width;
};

/* Up: sums of up, and of glu as a second part. z = sums + bias, rounded; hidden = act(z). */
struct StoreActivated {
    ExpertShape shape;
    cumoe_matrix_t bias[2]; // [E, 1, I] up, glu; data NULL = none
    void *z;                // [R, z_width]
    void *hidden;           // [R, I]; NULL: z only; z itself: hidden only

    template <typename Mainloop>
    __device__ __forceinline__ void run(const Tile &tile, const typename Mainloop::Real *sums) const
    {
        using Real = typename Mainloop::Real;
        using Runs = TileRuns<Mainloop>;
        const int column = Runs::column(), count = Runs::count(tile, column);
        if (count <= 0) return;
        const int64_t first = tile.column + column;
        const Run<Real> bias_up = load_bias<Real>(bias[0], tile.group, first, count),
                        bias_glu = Mainloop::kParts == 2 ? load_bias<Real>(bias[1], tile.group, first, count)
                                                         : Run<Real>{};
        for (int row = Runs::row(); row < tile.rows; row += Runs::kRowsApart) {
            const int64_t line = tile.row + row;
            Run<Real> up = read_sums<Mainloop>(sums, row, 0, column), glu = {};
            add_bias(up, bias[0], bias_up);
            round_run(up, shape.dtype);
            if (hidden != z) store_run(up, z, shape.dtype, line * shape.z_width + first, 1, count);
            if constexpr (Mainloop::kParts == 2) {
                glu = read_sums<Mainloop>(sums, row, 1, column);
                add_bias(glu, bias[1], bias_glu);
                round_run(glu, shape.dtype);
                store_run(glu, z, shape.dtype, line * shape.z_width + shape.I + first, 1, count);
            }
            if (!hidden) continue;
            Run<Real> active;
#pragma unroll
            for (int j = 0; j < kRun; j++)
                active.at[j] = activate(shape.activation, up.at[j], glu.at[j], shape.swiglu).hidden;
            store_run(active, hidden, shape.dtype, line * shape.I + first, 1, count);
        }
    }
};

/* Down backward: the sums are d = dy w_down. With g the weight of a row, dz = g d act'(z); scaled = g hidden, for
 * dw_down; partial = <d, hidden> over the columns of a tile. A slope of 0 lets nothing through, not even an
 * infinite d. */
struct StoreActivatedBackward {
    ExpertShape shape;
    const int32_t *row_slot; // [R]
    const void *z;           // [R, z_width]
    const void *weight;      // [S] Real
    const int32_t *exponent; // [E] scaled is smaller by 2^exponent; NULL = by 1
    void *dz;                // [R, z_width]
    void *scaled;            // [R, I] of scaled_dtype; NULL = not wanted
    cumoe_dtype_t scaled_dtype;
    void *partial; // [R, panels] Real, panels of kColumns
    int64_t panels;

    template <typename Mainloop>
    __device__ __forceinline__ void run(const Tile &tile, const typename Mainloop::Real *sums) const
    {
        using Real = typename Mainloop::Real;
        using Runs = TileRuns<Mainloop>;
        constexpr int kWarp = 32, kRowsOfWarp = kWarp / Runs::kOfRow;
        static_assert(Mainloop::kParts == 1 && kWarp % Runs::kOfRow == 0,
                      "the runs of a row are in one warp, all of whose lanes come to the sum over them");
        static_assert(Mainloop::kRows % Runs::kRowsApart == 0 &&
                          Mainloop::kRows / Runs::kRowsApart * kRowsOfWarp <= kWarp,
                      "a lane for each row of a warp");
        const int scale = exponent ? exponent[tile.group] : 0, lane = static_cast<int>(threadIdx.x) % kWarp;
        const int column = Runs::column(), count = Runs::count(tile, column);
        const int64_t first = tile.column + column;

        // The weights of all rows of the warp, a row a lane.
        const int my_row = static_cast<int>(threadIdx.x) / kWarp * kRowsOfWarp + lane % kRowsOfWarp +
                           lane / kRowsOfWarp * Runs::kRowsApart;
        const Real my_g =
            my_row < tile.rows ? static_cast<const Real *>(weight)[row_slot[tile.row + my_row]] : Real(0);

#pragma unroll 1
        for (int top = 0; top < tile.rows; top += kTogether * Runs::kRowsApart) {
            // Ask for z of some rows.
            ZRun<Real> z_run[kTogether];
#pragma unroll
            for (int i = 0; i < kTogether; i++)
                fetch_z(z_run[i], tile, top + i * Runs::kRowsApart + Runs::row(), first, count);

            // Then a row after the other: the code for one is long.
            const int bottom = top + kTogether * Runs::kRowsApart;
#pragma unroll 1
            for (int begin = top; begin < tile.rows && begin < bottom; begin += Runs::kRowsApart) {
                const int row = begin + Runs::row();
                const int64_t line = tile.row + row;
                const Real g =
                    shuffle(kFullMask, my_g, begin / Runs::kRowsApart * kRowsOfWarp + lane / Runs::kOfRow);
                Real product = 0;
                if (row < tile.rows && count > 0)
                    product = store_backward(read_sums<Mainloop>(sums, row, 0, column), z_run[0], g, line, first,
                                             count, scale);
#pragma unroll
                for (int i = 0; i + 1 < kTogether; i++) z_run[i] = z_run[i + 1];

                // <d, hidden> of the row: halves of the runs added, down to one. An order that is fixed.
                for (int span = Runs::kOfRow / 2; span > 0; span /= 2)
                    product += shuffle_xor(kFullMask, product, span);
                if (row < tile.rows && column == 0)
                    static_cast<Real *>(partial)[line * panels + tile.column / Runs::kPartColumns] = product;
            }
        }
    }

  private:
    static constexpr int kTogether = 4; // rows, of which z is on its way

    template <typename Real>
    struct ZRun {
        RunBits<Real> up, gate;
    };

    /* z of a row, where the tile has it. */
    template <typename Real>
    __device__ __forceinline__ void fetch_z(ZRun<Real> &run, const Tile &tile, int row, int64_t first,
                                            int count) const
    {
        if (row >= tile.rows || count <= 0) return;
        const int64_t at = (tile.row + row) * shape.z_width + first;
        fetch_run(run.up, z, shape.dtype, at, 1, count);
        if (shape.z_width != shape.I) fetch_run(run.gate, z, shape.dtype, at + shape.I, 1, count);
    }

    /* A run of a row with weight G; returns its part of <d, hidden>. */
    template <typename Real>
    __device__ __forceinline__ Real store_backward(Run<Real> d, ZRun<Real> &z_run, Real g, int64_t line,
                                                   int64_t first, int count, int scale) const
    {
        const Real scaled_g = scale ? ldexp(g, -scale) : g;
        const bool glu = shape.z_width != shape.I;
        const int64_t at = line * shape.z_width + first;
        const Run<Real> up = widen_run(z_run.up, shape.dtype);
        Run<Real> gate = {}, hidden, by_up, by_gate;
        if (glu) gate = widen_run(z_run.gate, shape.dtype);
        Real product[kRun];
#pragma unroll
        for (int j = 0; j < kRun; j++) {
            const Activated<Real> a = activate(shape.activation, up.at[j], gate.at[j], shape.swiglu);
            const Real active = rounded(a.hidden, shape.dtype), gd = d.at[j] * g;
            product[j] = j < count ? d.at[j] * active : Real(0);
            hidden.at[j] = active * scaled_g;
            by_up.at[j] = a.by_up == 0 ? Real(0) : gd * a.by_up;
            by_gate.at[j] = a.by_glu == 0 ? Real(0) : gd * a.by_glu;
        }
        store_run(by_up, dz, shape.dtype, at, 1, count);
        if (glu) store_run(by_gate, dz, shape.dtype, at + shape.I, 1, count);
        if (scaled) store_run(hidden, scaled, scaled_dtype, line * shape.I + first, 1, count);
        static_assert(kRun == 4, "as the sum below has it");
        return (product[0] + product[2]) + (product[1] + product[3]);
    }
};

} // namespace cumoe
