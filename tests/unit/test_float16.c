/* host/cpu/float16.h against values made with ldexp and a rounding that searches for the nearest of them. */
#include "host/cpu/float16.h"

#include "tests/suite.h"

#include <math.h>

#ifdef __SSE__
#include <xmmintrin.h>
#endif

typedef struct format {
    const char *name;
    int fraction_bits;
    float (*widen)(uint16_t);
    uint16_t (*narrow)(float);
} format_t;

/* Copies that have addresses. */
#define ADDRESSABLE(name, result, argument)                                                                        \
    static result call_##name(argument value)                                                                      \
    {                                                                                                              \
        return name(value);                                                                                        \
    }
ADDRESSABLE(bf16_to_f32, float, uint16_t)
ADDRESSABLE(f32_to_bf16, uint16_t, float)
ADDRESSABLE(f16_to_f32, float, uint16_t)
ADDRESSABLE(f32_to_f16, uint16_t, float)

static const format_t FORMATS[] = {{"bf16", 7, call_bf16_to_f32, call_f32_to_bf16},
                                   {"f16", 10, call_f16_to_f32, call_f32_to_f16}};
enum { NUM_FORMATS = sizeof FORMATS / sizeof *FORMATS };

static unsigned infinity_of(const format_t *f)
{
    return 0x8000u - (1u << f->fraction_bits);
}

/* The value of bits without a sign. Infinity gets the value that would stand there, 2^(largest exponent + 1): what
 * rounds to that overflows. */
static double magnitude_of(const format_t *f, unsigned bits)
{
    const int m = f->fraction_bits, bias = (1 << (14 - m)) - 1;
    const int exponent = (int)(bits >> m), fraction = (int)(bits & ((1u << m) - 1));
    return exponent == 0 ? ldexp(fraction, 1 - bias - m) : ldexp(fraction + (1 << m), exponent - bias - m);
}

/* The nearest to value, which is no NaN; of two, the even one. */
static uint16_t nearest(const format_t *f, float value)
{
    const double magnitude = fabs((double)value);
    unsigned low = 0, high = infinity_of(f);
    if (magnitude >= magnitude_of(f, high)) low = high;
    while (high - low > 1) {
        const unsigned middle = (low + high) / 2;
        *(magnitude_of(f, middle) <= magnitude ? &low : &high) = middle;
    }
    const double below = magnitude - magnitude_of(f, low), above = magnitude_of(f, high) - magnitude;
    const unsigned chosen = below < above ? low : above < below ? high : low & 1 ? high : low;
    return (uint16_t)(signbit(value) ? 0x8000u | chosen : chosen);
}

static void check_narrow(const format_t *f, float value, report_t *report)
{
    for (int sign = 0; sign < 2; sign++) {
        const float x = sign ? -value : value;
        const unsigned actual = f->narrow(x), expected = nearest(f, x);
        if (actual != expected)
            report_fail(report, "%s of %a: %#06x, expected %#06x", f->name, (double)x, actual, expected);
    }
}

Test(float16, widening_is_exact)
{
    report_t report = {0};
    for (int i = 0; i < NUM_FORMATS; i++) {
        const format_t *f = &FORMATS[i];
        for (unsigned bits = 0; bits < 65536; bits++) {
            const float value = f->widen((uint16_t)bits);
            const unsigned magnitude = bits & 0x7fff, infinity = infinity_of(f);
            const double expected = magnitude == infinity ? (double)INFINITY : magnitude_of(f, magnitude);
            const bool right = magnitude > infinity ? isnan(value) : fabs((double)value) == expected;
            if (!right || !signbit(value) != !(bits & 0x8000))
                report_fail(&report, "%s %#06x is %a", f->name, bits, (double)value);
        }
    }
    EXPECT_EMPTY(report);
}

/* Every value, and between every two neighbours (infinity is the last) the middle, and one F32 to either side. */
Test(float16, narrowing_rounds_to_nearest_even)
{
    report_t report = {0};
    for (int i = 0; i < NUM_FORMATS; i++) {
        const format_t *f = &FORMATS[i];
        for (unsigned bits = 0; bits < infinity_of(f); bits++) {
            const float value = (float)magnitude_of(f, bits);
            const double middle = (magnitude_of(f, bits) + magnitude_of(f, bits + 1)) / 2;
            cr_assert_eq((double)(float)middle, middle);
            check_narrow(f, value, &report);
            check_narrow(f, nextafterf(value, INFINITY), &report);
            check_narrow(f, nextafterf(value, -INFINITY), &report);
            check_narrow(f, (float)middle, &report);
            check_narrow(f, nextafterf((float)middle, INFINITY), &report);
            check_narrow(f, nextafterf((float)middle, 0), &report);
        }
    }
    EXPECT_EMPTY(report);
}

/* Every exponent of F32, the subnormals among them, with random fractions and the ends of its range. */
Test(float16, narrowing_of_every_exponent)
{
    report_t report = {0};
    random_state_t random = random_start(random_seed("float16", 4));
    for (int i = 0; i < NUM_FORMATS; i++)
        for (uint32_t exponent = 0; exponent < 255; exponent++)
            for (int k = 0; k < 1002; k++) {
                const uint32_t fraction = k == 0 ? 0 : k == 1 ? 0x7fffff : (uint32_t)random_below(&random, 1 << 23);
                check_narrow(&FORMATS[i], float_of_bits(exponent << 23 | fraction), &report);
            }
    for (int i = 0; i < NUM_FORMATS; i++) check_narrow(&FORMATS[i], INFINITY, &report);
    EXPECT_EMPTY(report);
}

Test(float16, nan_stays_nan_with_its_sign)
{
    report_t report = {0};
    for (int i = 0; i < NUM_FORMATS; i++)
        for (uint32_t sign = 0; sign < 2; sign++)
            for (uint32_t fraction = 1; fraction <= 0x7fffff; fraction += fraction < 0x7ff000 ? 0x1f : 1) {
                const unsigned half = FORMATS[i].narrow(float_of_bits(sign << 31 | 0x7f800000 | fraction));
                const unsigned quiet = infinity_of(&FORMATS[i]) | 1u << (FORMATS[i].fraction_bits - 1);
                if ((half & quiet) != quiet || half >> 15 != sign)
                    report_fail(&report, "%s of NaN %#x (sign %u): %#06x", FORMATS[i].name, fraction, sign, half);
            }
    EXPECT_EMPTY(report);
}

#ifdef __SSE__
/* A host that flushes subnormal numbers to zero (FTZ, DAZ) gets the same bits. */
Test(float16, flush_to_zero_changes_nothing)
{
    enum { FLUSH = 0x8040, STEP = 4099 };
    static uint16_t narrow[2][UINT32_MAX / STEP + 1];
    static float widen[2][65536];
    const unsigned mode = _mm_getcsr();
    for (int i = 0; i < NUM_FORMATS; i++) {
        const format_t *volatile format = &FORMATS[i]; /* nothing is computed ahead, in the other mode */
        for (int flush = 0; flush < 2; flush++) {
            _mm_setcsr(flush ? mode | FLUSH : mode);
            for (uint32_t k = 0; k < 65536; k++) widen[flush][k] = format->widen((uint16_t)k);
            for (uint32_t k = 0; k <= UINT32_MAX / STEP; k++)
                narrow[flush][k] = format->narrow(float_of_bits(k * STEP));
        }
        _mm_setcsr(mode);
        cr_expect(memcmp(widen[0], widen[1], sizeof widen[0]) == 0, "to F32 from %s", format->name);
        cr_expect(memcmp(narrow[0], narrow[1], sizeof narrow[0]) == 0, "from F32 to %s", format->name);
    }
}
#endif
