/* Arrays of a test in any type: the values in double precision, and the same in device memory. */
#ifndef CUMOE_SIM_EXPERTS_ARRAY_H
#define CUMOE_SIM_EXPERTS_ARRAY_H

#include "tests/sim/buffer.h"

#include <cumoe/types.h>

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <math.h>
#include <memory>
#include <string.h>

namespace experts
{

struct Values : std::vector<double> {
    using vector::vector;
    double &operator()(int64_t at)
    {
        return (*this)[static_cast<size_t>(at)];
    }
    double operator()(int64_t at) const
    {
        return (*this)[static_cast<size_t>(at)];
    }
};

inline size_t size_of(cumoe_dtype_t dtype)
{
    return dtype == CUMOE_F64 ? 8 : dtype == CUMOE_F32 ? 4 : 2;
}

inline double round_to(double value, cumoe_dtype_t dtype)
{
    if (dtype == CUMOE_F64) return value;
    if (dtype == CUMOE_F32) return static_cast<float>(value);
    if (dtype == CUMOE_F16) return __half2float(__float2half_rn(static_cast<float>(value)));
    return __bfloat162float(__float2bfloat16_rn(static_cast<float>(value)));
}

/* Half a unit in the last place, relative; and below the normal numbers. */
inline double unit(cumoe_dtype_t dtype)
{
    return dtype == CUMOE_F64 ? 0x1p-53 : dtype == CUMOE_F32 ? 0x1p-24 : dtype == CUMOE_F16 ? 0x1p-11 : 0x1p-8;
}
inline double tiny(cumoe_dtype_t dtype)
{
    return dtype == CUMOE_F16 ? 0x1p-25 : dtype == CUMOE_F64 ? 0x1p-1070 : 0x1p-126;
}

/* An array in device memory, of any type; not written elements are NaN. */
class Array
{
  public:
    Array() = default;
    Array(size_t count, cumoe_dtype_t dtype) : values(count, NAN), dtype_(dtype) {}

    void *data()
    {
        if (!buffer_) {
            std::vector<unsigned char> bytes(values.size() * size_of(dtype_) + 1, 0xff); // one more: none is NULL
            for (size_t i = 0; i < values.size(); i++) {
                unsigned char *to = bytes.data() + i * size_of(dtype_);
                const float single = static_cast<float>(values[i]);
                const __half half = __float2half_rn(single);
                const __nv_bfloat16 brain = __float2bfloat16_rn(single);
                if (dtype_ == CUMOE_F64) memcpy(to, &values[i], 8);
                if (dtype_ == CUMOE_F32) memcpy(to, &single, 4);
                if (dtype_ == CUMOE_F16) memcpy(to, &half, 2);
                if (dtype_ == CUMOE_BF16) memcpy(to, &brain, 2);
            }
            buffer_ = std::make_unique<Buffer<unsigned char>>(bytes);
        }
        return buffer_->data();
    }
    Values read()
    {
        const std::vector<unsigned char> bytes = buffer_->read();
        Values result(values.size());
        for (size_t i = 0; i < result.size(); i++) {
            const unsigned char *from = bytes.data() + i * size_of(dtype_);
            float single;
            __half half;
            __nv_bfloat16 brain;
            if (dtype_ == CUMOE_F64) memcpy(&result[i], from, 8);
            if (dtype_ == CUMOE_F32) memcpy(&single, from, 4), result[i] = single;
            if (dtype_ == CUMOE_F16) memcpy(&half, from, 2), result[i] = __half2float(half);
            if (dtype_ == CUMOE_BF16) memcpy(&brain, from, 2), result[i] = __bfloat162float(brain);
        }
        return result;
    }
    cumoe_dtype_t dtype() const
    {
        return dtype_;
    }

    Values values; // before data() is asked for

  private:
    cumoe_dtype_t dtype_ = CUMOE_F32;
    std::unique_ptr<Buffer<unsigned char>> buffer_;
};

} // namespace experts

#endif
