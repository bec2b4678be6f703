/* Factors of products on the device, beside the values that a double loop needs. What lies between their lines is
 * NaN. */
#ifndef CUMOE_SIM_FACTOR_H
#define CUMOE_SIM_FACTOR_H

#include "cuda/gemm.cuh"
#include "tests/sim/buffer.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <limits>
#include <math.h>
#include <memory>
#include <random>

namespace factor
{

constexpr double kNaN = std::numeric_limits<double>::quiet_NaN(),
                 kInfinity = std::numeric_limits<double>::infinity();

inline std::mt19937 random_bits; // of a test, seeded anew for each round

inline size_t size(int64_t count)
{
    return static_cast<size_t>(count);
}

inline int64_t random_below(int64_t bound)
{
    return static_cast<int64_t>(random_bits()) % bound;
}

/* --- Values of a type */

template <typename T>
struct Type;

template <>
struct Type<__nv_bfloat16> {
    static constexpr cumoe_dtype_t kDtype = CUMOE_BF16;
    static constexpr const char *kName = "BF16";
    static __nv_bfloat16 from(double value)
    {
        return __float2bfloat16(static_cast<float>(value));
    }
    static double rounded(double value)
    {
        return static_cast<double>(__bfloat162float(from(value)));
    }
};

template <>
struct Type<__half> {
    static constexpr cumoe_dtype_t kDtype = CUMOE_F16;
    static constexpr const char *kName = "F16";
    static __half from(double value)
    {
        return __float2half(static_cast<float>(value));
    }
    static double rounded(double value)
    {
        return static_cast<double>(__half2float(from(value)));
    }
};

/* TF32: 11 bits of mantissa, ties away from zero. */
template <>
struct Type<float> {
    static constexpr cumoe_dtype_t kDtype = CUMOE_F32;
    static constexpr const char *kName = "TF32";
    static float from(double value)
    {
        return static_cast<float>(value);
    }
    static double rounded(double value)
    {
        int exponent;
        if (!isfinite(value)) return value;
        const double fraction = frexp(static_cast<double>(from(value)), &exponent);
        return ldexp(round(ldexp(fraction, 11)), exponent - 11);
    }
};

enum class Values { INTEGERS, REALS };

inline double random_value(Values values)
{
    if (values == Values::INTEGERS) return static_cast<double>(random_below(9) - 4);
    return std::normal_distribution<double>()(random_bits);
}

/* --- Factors */

/* Which of the two dimensions is contiguous, and how far apart the others are. */
enum class Order { DEPTH, LINES, NEITHER };

struct Layout {
    Order order;
    int64_t gap;   // elements between lines (or depths) that are not part of the factor
    int64_t begin; // of the first element: 1 is off every alignment
};

/* A factor [groups, lines, depth] on the device, and its values as T holds them on the host. */
template <typename T>
class Factor
{
  public:
    Factor(int64_t groups, int64_t lines, int64_t depth, const Layout &layout, Values values)
        : lines_(lines), depth_(depth), values_(size(groups * lines * depth))
    {
        for (double &value : values_) value = random_value(values);
        const int64_t inner = layout.order == Order::NEITHER ? 3 : 1;
        const bool by_depth = layout.order != Order::LINES;
        line_stride_ = by_depth ? depth * inner + layout.gap : 1;
        depth_stride_ = by_depth ? inner : lines + layout.gap;
        group_stride_ = lines * depth * inner + (by_depth ? lines : depth) * layout.gap;
        begin_ = layout.begin;
    }

    double &at(int64_t group, int64_t line, int64_t depth)
    {
        return values_[size((group * lines_ + line) * depth_ + depth)];
    }

    /* What the mainloop multiplies. */
    double rounded(int64_t group, int64_t line, int64_t depth)
    {
        return Type<T>::rounded(at(group, line, depth));
    }

    /* No element may be set behind this. */
    cumoe::Operand operand(const int32_t *index = nullptr)
    {
        const int64_t groups = static_cast<int64_t>(values_.size()) / (lines_ * depth_);
        std::vector<T> memory(size(begin_ + groups * group_stride_), Type<T>::from(kNaN));
        for (int64_t g = 0; g < groups; g++)
            for (int64_t l = 0; l < lines_; l++)
                for (int64_t d = 0; d < depth_; d++)
                    memory[size(begin_ + g * group_stride_ + l * line_stride_ + d * depth_stride_)] =
                        Type<T>::from(at(g, l, d));
        buffer_.reset(new Buffer<T>(memory));
        return {buffer_->data() + begin_, Type<T>::kDtype, group_stride_, line_stride_, depth_stride_, index};
    }

  private:
    int64_t lines_, depth_, line_stride_, depth_stride_, group_stride_, begin_;
    std::vector<double> values_;
    std::unique_ptr<Buffer<T>> buffer_;
};

} // namespace factor

#endif
