/* Arrays of a type that is known at run time, as a test sees them: numbers here, values of the type on the device.
 */
#ifndef CUMOE_SIM_VALUES_H
#define CUMOE_SIM_VALUES_H

#include "cumoe/types.h"
#include "tests/sim/buffer.h"

#include <cmath>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <string.h>

inline size_t size_of(cumoe_dtype_t dtype)
{
    return dtype == CUMOE_F64 ? 8 : dtype == CUMOE_F32 ? 4 : 2;
}

inline void encode(double number, cumoe_dtype_t dtype, char *to)
{
    const float single = static_cast<float>(number);
    const __nv_bfloat16 bf16 = __float2bfloat16_rn(single);
    const __half f16 = __float2half_rn(single);
    const void *from = &number;
    if (dtype == CUMOE_F32) from = &single;
    if (dtype == CUMOE_BF16) from = &bf16;
    if (dtype == CUMOE_F16) from = &f16;
    memcpy(to, from, size_of(dtype));
}

inline double decode(const char *from, cumoe_dtype_t dtype)
{
    double number = 0;
    float single = 0;
    __nv_bfloat16 bf16;
    __half f16;
    void *to = &number;
    if (dtype == CUMOE_F32) to = &single;
    if (dtype == CUMOE_BF16) to = &bf16;
    if (dtype == CUMOE_F16) to = &f16;
    memcpy(to, from, size_of(dtype));
    if (dtype == CUMOE_BF16) return static_cast<double>(__bfloat162float(bf16));
    if (dtype == CUMOE_F16) return static_cast<double>(__half2float(f16));
    return dtype == CUMOE_F32 ? static_cast<double>(single) : number;
}

/* What storing leaves of a number. */
inline double stored(double number, cumoe_dtype_t dtype)
{
    char bytes[8];
    encode(number, dtype, bytes);
    return decode(bytes, dtype);
}

class Values
{
  public:
    /* What no kernel has written is NaN. */
    Values(cumoe_dtype_t dtype, size_t count) : dtype_(dtype), bytes_(count * size_of(dtype)) {}
    Values(cumoe_dtype_t dtype, const std::vector<double> &numbers)
        : dtype_(dtype), bytes_(encode_all(dtype, numbers))
    {
    }
    void *data()
    {
        return bytes_.data();
    }
    std::vector<double> read() const
    {
        const std::vector<char> bytes = bytes_.read();
        std::vector<double> numbers(bytes.size() / size_of(dtype_));
        for (size_t i = 0; i < numbers.size(); i++) numbers[i] = decode(&bytes[i * size_of(dtype_)], dtype_);
        return numbers;
    }

  private:
    static std::vector<char> encode_all(cumoe_dtype_t dtype, const std::vector<double> &numbers)
    {
        std::vector<char> bytes(numbers.size() * size_of(dtype));
        for (size_t i = 0; i < numbers.size(); i++) encode(numbers[i], dtype, &bytes[i * size_of(dtype)]);
        return bytes;
    }
    cumoe_dtype_t dtype_;
    Buffer<char> bytes_;
};

/* The same number, or NaN both times. */
inline bool same(double a, double b)
{
    return a == b ? std::signbit(a) == std::signbit(b) : std::isnan(a) && std::isnan(b);
}

#endif
