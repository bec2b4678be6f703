/* The instances of the packed micro-kernel: one for every instruction set and type of sums. */
#include "host/cpu/gemm_tile.h"
#include "host/cpu/float16.h"

#include <string.h>
#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#define ALWAYS_INLINE static inline __attribute__((always_inline))

enum {
    COPY_DEPTHS = 8,     /* depths that a copying pack takes along at a time */
    COPY_AHEAD = 16,     /* depths ahead that it asks for */
    TRANSPOSE_AHEAD = 2, /* cache lines ahead that a transposing pack asks for */
};

/* Four 16-bit values, and four F32 as bits. */
typedef uint16_t halves_t __attribute__((vector_size(8)));
typedef uint16_t loose_halves_t __attribute__((vector_size(8), aligned(2), may_alias));
typedef uint32_t words_t __attribute__((vector_size(16)));

typedef float singles_t __attribute__((vector_size(16)));
ALWAYS_INLINE singles_t widen_f16_portable(halves_t h)
{
    return (singles_t){f16_to_f32(h[0]), f16_to_f32(h[1]), f16_to_f32(h[2]), f16_to_f32(h[3])};
}

/* The multiply-add is spelled out: whether it is fused may not hang on how hard the compiler optimises. */
#if defined(__FMA__)
#define PORTABLE_FMA_F32(a, b, c) _mm_fmadd_ps(a, b, c)
#define PORTABLE_FMA_F64(a, b, c) _mm_fmadd_pd(a, b, c)
#elif defined(__aarch64__)
#define PORTABLE_FMA_F32(a, b, c) vfmaq_f32(c, a, b)
#define PORTABLE_FMA_F64(a, b, c) vfmaq_f64(c, a, b)
#else
#define PORTABLE_FMA_F32(a, b, c) ((a) * (b) + (c))
#define PORTABLE_FMA_F64(a, b, c) ((a) * (b) + (c))
#endif

#define SCALAR       float
#define VECTOR_BYTES 16
#define VECTOR_QUADS 1
#define FMA          PORTABLE_FMA_F32
#define MR           4
#define NAME(x)      x##_f32_portable
#define TARGET
#define WIDEN_F16(h) widen_f16_portable(h)
#define WIDEN_ALL(h) widen_f16_portable(h)
#include "host/cpu/gemm_kernel.h"

#define SCALAR       double
#define VECTOR_BYTES 16
#define VECTOR_QUADS 0
#define FMA          PORTABLE_FMA_F64
#define MR           4
#define NAME(x)      x##_f64_portable
#define TARGET
#include "host/cpu/gemm_kernel.h"

#ifdef __x86_64__
#define SCALAR       float
#define VECTOR_BYTES 32
#define VECTOR_QUADS 2
#define FMA(a, b, c) _mm256_fmadd_ps(a, b, c)
#define STREAM(p, v) _mm256_stream_ps(p, v)
#define MR           6
#define NAME(x)      x##_f32_avx2
#define TARGET       __attribute__((target("avx2,fma,f16c")))
#define WIDEN_F16(h) _mm_cvtph_ps(_mm_cvtsi64_si128((long long)(h)))
#define WIDEN_ALL(h) _mm256_cvtph_ps((__m128i)(h))
#include "host/cpu/gemm_kernel.h"

#define SCALAR       double
#define VECTOR_BYTES 32
#define VECTOR_QUADS 1
#define FMA(a, b, c) _mm256_fmadd_pd(a, b, c)
#define STREAM(p, v) _mm256_stream_pd(p, v)
#define MR           6
#define NAME(x)      x##_f64_avx2
#define TARGET       __attribute__((target("avx2,fma")))
#include "host/cpu/gemm_kernel.h"

#define SCALAR       float
#define VECTOR_BYTES 64
#define VECTOR_QUADS 4
#define FMA(a, b, c) _mm512_fmadd_ps(a, b, c)
#define STREAM(p, v) _mm512_stream_ps(p, v)
#define MR           14
#define NAME(x)      x##_f32_avx512
#define TARGET       __attribute__((target("avx512f,fma,f16c")))
#define WIDEN_F16(h) _mm_cvtph_ps(_mm_cvtsi64_si128((long long)(h)))
#define WIDEN_ALL(h) _mm512_cvtph_ps((__m256i)(h))
#include "host/cpu/gemm_kernel.h"

#define SCALAR       double
#define VECTOR_BYTES 64
#define VECTOR_QUADS 2
#define FMA(a, b, c) _mm512_fmadd_pd(a, b, c)
#define STREAM(p, v) _mm512_stream_pd(p, v)
#define MR           14
#define NAME(x)      x##_f64_avx512
#define TARGET       __attribute__((target("avx512f,fma")))
#include "host/cpu/gemm_kernel.h"
#endif

/* Beside its vectors an instance uses fma and the conversion of f16, which machines with AVX2 have. */
#define HAS(vectors)                                                                                               \
    (__builtin_cpu_supports(vectors) && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"))

const kernel_t *cumoe__cpu_gemm_kernel(cumoe_cpu_isa_t isa, bool f64)
{
    switch (isa) {
    case CUMOE_CPU_ISA_PORTABLE:
        return f64 ? &kernel_f64_portable : &kernel_f32_portable;
#ifdef __x86_64__
    case CUMOE_CPU_ISA_AVX2:
        if (!HAS("avx2")) return NULL;
        return f64 ? &kernel_f64_avx2 : &kernel_f32_avx2;
    case CUMOE_CPU_ISA_AVX512:
        if (!HAS("avx512f")) return NULL;
        return f64 ? &kernel_f64_avx512 : &kernel_f32_avx512;
#endif
    default:
        return NULL;
    }
}
