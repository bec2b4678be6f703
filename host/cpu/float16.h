/* The two 16-bit types and F32. Widening is exact; narrowing rounds to nearest, ties to even, overflows to infinity
 * and keeps a NaN a NaN, made quiet. Without branches, so that a compiler makes vector code of it, and without
 * subnormal F32 values, so that a host's flush-to-zero mode changes nothing (a subnormal bf16 is moved as bits). */
#ifndef CUMOE_FLOAT16_H
#define CUMOE_FLOAT16_H

#include <stdint.h>
#include <string.h>

#define CUMOE_FLOAT16_FN static inline __attribute__((always_inline, unused))

CUMOE_FLOAT16_FN float float_of_bits(uint32_t bits)
{
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

CUMOE_FLOAT16_FN uint32_t bits_of_float(float value)
{
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

CUMOE_FLOAT16_FN float bf16_to_f32(uint16_t half)
{
    return float_of_bits((uint32_t)half << 16);
}

CUMOE_FLOAT16_FN uint16_t f32_to_bf16(float value)
{
    const uint32_t bits = bits_of_float(value);
    const uint32_t nearest = bits + 0x7fff + (bits >> 16 & 1);
    return (uint16_t)((bits & 0x7fffffff) > 0x7f800000 ? bits >> 16 | 0x40 : nearest >> 16);
}

CUMOE_FLOAT16_FN float f16_to_f32(uint16_t half)
{
    const uint32_t sign = (uint32_t)(half & 0x8000) << 16, magnitude = half & 0x7fff;
    const uint32_t normal = (magnitude << 13) + (112u << 23);
    const uint32_t special = magnitude << 13 | 0x7f800000 | (magnitude > 0x7c00 ? 0x400000 : 0);
    const uint32_t subnormal = bits_of_float((float)(int32_t)magnitude * 0x1p-24f);
    const uint32_t bits = magnitude >= 0x7c00 ? special : magnitude < 0x400 ? subnormal : normal;
    return float_of_bits(sign | bits);
}

CUMOE_FLOAT16_FN uint16_t f32_to_f16(float value)
{
    const uint32_t bits = bits_of_float(value), magnitude = bits & 0x7fffffff;
    const uint32_t normal = (magnitude - (112u << 23) + 0xfff + (magnitude >> 13 & 1)) >> 13;
    /* Below 2^-14 a unit is 2^-24, which is that of an F32 in [0.5, 1): the addition rounds. */
    const uint32_t subnormal = bits_of_float(float_of_bits(magnitude) + 0.5f) - 0x3f000000;
    const uint32_t special = magnitude > 0x7f800000 ? 0x7e00 | (magnitude >> 13 & 0x3ff) : 0x7c00;
    const uint32_t half = magnitude >= 0x47800000 ? special : magnitude < 0x38800000 ? subnormal : normal;
    return (uint16_t)((bits >> 16 & 0x8000) | half);
}

#endif
