/* The tensor-core mainloops in the simulator, against double loops. All that a product must not read is NaN: what
 * lies between lines, behind the depth, and rows that no tile has.
 *
 * Integers: sums are exact, and compared bit by bit. Reals: the factors are rounded to T first, so that only the
 * sums' rounding is left; then rows are compared among tiles of 64 and 128 rows and at other positions. */
#include "tests/sim/check.h"
#include "tests/sim/factor.h"
#include "tests/sim/gemm_probe.cuh"
#include "tests/sim/simulator.h"

#include <string.h>

namespace
{

using cumoe::DepthProduct;
using cumoe::RowsProduct;
using namespace factor;

uint64_t seed;

const cumoe::Device kDevice = {0, 1, 80}; // one multiprocessor: its blocks have several tiles each

cumoe_context_t make_context()
{
    cumoe_context_t context = {};
    context.device = const_cast<cumoe::Device *>(&kDevice);
    return context;
}

/* A sum of COUNT products, of which the sizes add up to SCALE, in float: exact, or every addition rounds. */
bool is_near(float value, double expected, double scale, int64_t count, Values values)
{
    if (isnan(expected)) return isnan(value);
    if (isinf(expected) || values == Values::INTEGERS) return static_cast<double>(value) == expected;
    return fabs(static_cast<double>(value) - expected) <= static_cast<double>(count) * 0x1p-24 * scale;
}

/* --- Rows */

struct RowsCase {
    const char *name;
    std::vector<int64_t> rows; // of each group
    int64_t n, k;
    int32_t parts, terms;
    Layout a, b;
    bool gathered, dense;
};

const RowsCase kRowsCases[] = {
    {"one of everything", {1}, 1, 1, 1, 1, {Order::DEPTH, 0, 0}, {Order::DEPTH, 0, 0}, false, false},
    {"whole tiles", {128, 64}, 128, 64, 1, 1, {Order::DEPTH, 0, 0}, {Order::DEPTH, 0, 0}, true, false},
    {"whole tiles, b by lines", {64}, 256, 128, 1, 1, {Order::DEPTH, 0, 0}, {Order::LINES, 0, 0}, false, false},
    {"tails", {3, 0, 70, 131, 0}, 136, 200, 1, 1, {Order::DEPTH, 8, 0}, {Order::DEPTH, 8, 0}, true, false},
    {"tails, b by lines", {65, 1, 0}, 40, 72, 1, 1, {Order::DEPTH, 8, 8}, {Order::LINES, 16, 8}, false, false},
    {"tails inside chunks", {5, 66}, 131, 45, 1, 1, {Order::DEPTH, 3, 0}, {Order::DEPTH, 3, 0}, true, false},
    {"chunks cut by lines", {5, 66}, 131, 45, 1, 1, {Order::DEPTH, 3, 8}, {Order::LINES, 5, 16}, false, false},
    {"odd strides", {0, 67}, 67, 37, 1, 1, {Order::DEPTH, 0, 0}, {Order::DEPTH, 0, 0}, true, false},
    {"odd strides by lines", {67}, 67, 37, 1, 1, {Order::DEPTH, 2, 0}, {Order::LINES, 0, 0}, true, false},
    {"even strides", {5, 66}, 67, 37, 1, 1, {Order::DEPTH, 1, 2}, {Order::DEPTH, 5, 0}, true, false},
    {"even strides by lines", {9}, 65, 40, 1, 1, {Order::DEPTH, 2, 0}, {Order::LINES, 1, 2}, false, false},
    {"odd begin", {10}, 130, 64, 1, 1, {Order::DEPTH, 0, 1}, {Order::DEPTH, 0, 1}, true, false},
    {"odd begin by lines", {10}, 128, 64, 1, 1, {Order::DEPTH, 0, 3}, {Order::LINES, 0, 1}, false, false},
    {"b far apart", {12, 4}, 70, 33, 1, 1, {Order::DEPTH, 0, 0}, {Order::NEITHER, 7, 1}, true, false},
    {"a far apart", {70}, 30, 40, 1, 1, {Order::NEITHER, 1, 2}, {Order::DEPTH, 0, 0}, true, false},
    {"two parts", {70, 0, 9}, 72, 40, 2, 1, {Order::DEPTH, 0, 0}, {Order::DEPTH, 0, 0}, true, false},
    {"two parts, odd", {70}, 67, 33, 2, 1, {Order::DEPTH, 0, 0}, {Order::DEPTH, 1, 1}, true, false},
    {"two parts by lines", {9, 66}, 88, 40, 2, 1, {Order::DEPTH, 0, 0}, {Order::LINES, 8, 0}, false, false},
    {"two parts by odd lines", {9}, 67, 40, 2, 1, {Order::DEPTH, 0, 0}, {Order::LINES, 0, 0}, false, false},
    {"two terms", {5, 66}, 72, 104, 1, 2, {Order::DEPTH, 0, 0}, {Order::DEPTH, 0, 0}, false, false},
    {"two terms by lines", {66, 0}, 136, 40, 1, 2, {Order::DEPTH, 40, 0}, {Order::LINES, 0, 0}, false, false},
    {"two odd terms by lines", {20}, 13, 75, 1, 2, {Order::DEPTH, 0, 0}, {Order::LINES, 0, 0}, true, false},
    {"dense", {130}, 24, 40, 1, 1, {Order::DEPTH, 0, 0}, {Order::DEPTH, 0, 0}, false, true},
    {"dense without rows", {0}, 24, 40, 1, 1, {Order::DEPTH, 0, 0}, {Order::DEPTH, 0, 0}, false, true},
};

/* The tiles of groups that follow each other; as cumoe_rows_t has them. */
struct Tiles {
    std::vector<int32_t> map, offset;
    Tiles(const std::vector<int64_t> &rows, int32_t rows_of_tile) : map{0, rows_of_tile}, offset{0}
    {
        for (size_t g = 0; g < rows.size(); g++) {
            const int32_t begin = offset.back(), end = begin + static_cast<int32_t>(rows[g]);
            for (int32_t row = begin; row < end; row += rows_of_tile, map[0]++) {
                map.push_back(static_cast<int32_t>(g));
                map.push_back(row);
            }
            offset.push_back(end);
        }
    }
};

template <typename T>
struct RowsTest {
    const RowsCase &c;
    Values values;
    int64_t R, sources, width; // rows; of a; of c, with what must not be written
    std::vector<int32_t> index;
    std::vector<Factor<T>> a, b;

    RowsTest(const RowsCase &rows_case, Values kind) : c(rows_case), values(kind), R(0)
    {
        for (const int64_t rows : c.rows) R += rows;
        sources = R + 3;
        width = c.parts * c.n + 5;
        for (int64_t r = 0; r < R; r++) index.push_back(static_cast<int32_t>(c.gathered ? 1 + random_below(R) : r));
        for (int32_t t = 0; t < c.terms; t++) a.emplace_back(1, sources, c.k, c.a, values);
        for (int32_t i = 0; i < c.parts * c.terms; i++)
            b.emplace_back(static_cast<int64_t>(c.rows.size()), c.n, c.k, c.b, values);
        std::vector<bool> used(size(sources), false);
        for (const int32_t row : index) used[size(row)] = true;
        for (int64_t row = 0; row < sources; row++)
            if (!used[size(row)])
                for (Factor<T> &factor : a) fill_row(&factor, row, kNaN);
        // Rows that are used spoil themselves alone.
        if (R > 2 && values == Values::INTEGERS) {
            fill_row(&a[0], index[size(R / 2)], kInfinity);
            fill_row(&a[0], index[0], kNaN);
        }
    }

    void fill_row(Factor<T> *factor, int64_t row, double value)
    {
        for (int64_t k = 0; k < c.k; k++) factor->at(0, row, k) = value;
    }

    int64_t group_of(int64_t row) const
    {
        int64_t g = 0;
        for (; row >= c.rows[size(g)]; g++) row -= c.rows[size(g)];
        return g;
    }

    /* c [R + 1, width]: with the rows of a where ROW_OF says. */
    std::vector<float> run(int32_t rows_of_tile, const std::vector<int32_t> &row_of)
    {
        const Tiles tiles(c.rows, rows_of_tile);
        Buffer<int32_t> map(tiles.map), offset(tiles.offset), rows(row_of);
        Buffer<cumoe_call_t> call(std::vector<cumoe_call_t>{{0, 0, 0, R + 7}});
        Buffer<float> out(size((R + 1) * width));
        RowsProduct product = {};
        product.parts = c.parts;
        product.terms = c.terms;
        product.n = c.n;
        product.k = c.k;
        for (int32_t t = 0; t < c.terms; t++)
            product.a[t] = a[size(t)].operand(row_of.empty() || !c.gathered ? nullptr : rows.data());
        for (int32_t i = 0; i < c.parts * c.terms; i++) product.b[i] = b[size(i)].operand();
        if (!c.dense) {
            product.tile = map.data();
            product.offset = offset.data();
        }
        product.call = call.data();
        product.first_token = 7;
        product.max_rows = R;
        product.groups = static_cast<int32_t>(c.rows.size());
        sim_set_seed(seed);
        const cudaError_t error = probe_rows(make_context(), product, rows_of_tile, out.data(), width, nullptr);
        EXPECT(error == cudaSuccess, "%s %s: %s", Type<T>::kName, c.name, cudaGetErrorName(error));
        return out.read();
    }

    void compare(const std::vector<float> &out)
    {
        for (int64_t row = 0; row < R; row++)
            for (int64_t i = 0; i < c.parts * c.n; i++) {
                const int64_t part = i / c.n, n = i % c.n;
                double sum = 0, scale = 0;
                for (int32_t t = 0; t < c.terms; t++)
                    for (int64_t k = 0; k < c.k; k++) {
                        const double term = a[size(t)].rounded(0, index[size(row)], k) *
                                            b[size(part + t)].rounded(group_of(row), n, k);
                        sum += term;
                        scale += fabs(term);
                    }
                const float value = out[size(row * width + i)];
                EXPECT(is_near(value, sum, scale, c.k * c.terms, values), "%s %s (%lld, %lld): %g, not %g",
                       Type<T>::kName, c.name, static_cast<long long>(row), static_cast<long long>(i),
                       static_cast<double>(value), sum);
            }
        for (int64_t row = 0; row <= R; row++)
            for (int64_t i = row < R ? c.parts * c.n : 0; i < width; i++)
                EXPECT(isnan(out[size(row * width + i)]), "%s %s: (%lld, %lld) is written", Type<T>::kName, c.name,
                       static_cast<long long>(row), static_cast<long long>(i));
    }

    /* The rows of a group in reverse: the same bits elsewhere. */
    void compare_positions(const std::vector<float> &out, int32_t rows_of_tile)
    {
        std::vector<int32_t> reversed = index;
        int64_t begin = 0;
        std::vector<int64_t> from(size(R));
        for (const int64_t rows : c.rows) {
            for (int64_t r = 0; r < rows; r++) {
                from[size(begin + r)] = begin + rows - 1 - r;
                reversed[size(begin + r)] = index[size(begin + rows - 1 - r)];
            }
            begin += rows;
        }
        const std::vector<float> other = run(rows_of_tile, reversed);
        for (int64_t row = 0; row < R; row++)
            EXPECT(memcmp(&other[size(row * width)], &out[size(from[size(row)] * width)],
                          size(c.parts * c.n) * sizeof(float)) == 0,
                   "%s %s: row %lld hangs on its position", Type<T>::kName, c.name, static_cast<long long>(row));
    }
};

template <typename T>
void run_rows(const RowsCase &c, Values values)
{
    RowsTest<T> test(c, values);
    const std::vector<float> out = test.run(64, test.index);
    test.compare(out);
    if (c.dense || (values == Values::INTEGERS && seed > 1)) return;
    const std::vector<float> other = test.run(128, test.index);
    EXPECT(memcmp(out.data(), other.data(), out.size() * sizeof(float)) == 0, "%s %s: bits hang on the tile",
           Type<T>::kName, c.name);
    if (values == Values::REALS && c.gathered) test.compare_positions(out, 128);
}

/* --- Depth */

struct DepthCase {
    const char *name;
    std::vector<int64_t> rows; // of each group
    int64_t m, n;
    Layout a, b; // DEPTH: rows stand apart; LINES: the other way round, which is not what they are made for
    bool a_gathered, b_gathered, add;
    int32_t exponent;
};

const DepthCase kDepthCases[] = {
    {"one of everything", {1}, 1, 1, {Order::LINES, 0, 0}, {Order::LINES, 0, 0}, false, false, false, 0},
    {"whole tiles", {64, 32}, 128, 128, {Order::LINES, 0, 0}, {Order::LINES, 0, 0}, true, false, false, 0},
    {"tails", {33, 0, 130}, 136, 72, {Order::LINES, 8, 8}, {Order::LINES, 16, 0}, true, false, false, 3},
    {"tails inside chunks", {5, 40, 1}, 45, 131, {Order::LINES, 3, 0}, {Order::LINES, 5, 8}, false, true, true, 0},
    {"odd strides", {0, 41}, 67, 35, {Order::LINES, 0, 0}, {Order::LINES, 2, 1}, true, true, true, -2},
    {"even strides", {12, 40}, 37, 65, {Order::LINES, 1, 2}, {Order::LINES, 1, 0}, true, false, false, 0},
    {"far apart", {3, 18}, 20, 33, {Order::NEITHER, 1, 0}, {Order::DEPTH, 0, 0}, true, false, false, 0},
};

template <typename T>
void run_depth(const DepthCase &c, Values values)
{
    const int64_t groups = static_cast<int64_t>(c.rows.size()), row_stride = c.n + 3,
                  group_stride = c.m * row_stride;
    const Tiles tiles(c.rows, 64);
    const int64_t R = tiles.offset.back(), sources = R + 4;
    Factor<T> a(1, c.m, sources, c.a, values), b(1, c.n, sources, c.b, values);
    std::vector<int32_t> index[2];
    for (int side = 0; side < 2; side++) {
        const bool gathered = side == 0 ? c.a_gathered : c.b_gathered;
        for (int64_t r = 0; r < R; r++)
            index[side].push_back(static_cast<int32_t>(gathered ? 2 + random_below(R) : r));
        std::vector<bool> used(size(sources), false);
        for (const int32_t row : index[side]) used[size(row)] = true;
        for (int64_t row = 0; row < sources; row++)
            for (int64_t line = 0; line < (side == 0 ? c.m : c.n); line++)
                if (!used[size(row)]) (side == 0 ? a : b).at(0, line, row) = kNaN;
    }
    // An infinite row spoils its own group alone.
    if (values == Values::INTEGERS && c.rows[0] > 0 && groups > 1) b.at(0, c.n / 2, index[1][0]) = kInfinity;

    Buffer<int32_t> offset(tiles.offset), a_index(index[0]), b_index(index[1]);
    Buffer<int32_t> exponent(std::vector<int32_t>(size(groups), c.exponent));
    std::vector<float> before(size(groups * group_stride));
    for (float &value : before) value = static_cast<float>(random_below(100));
    Buffer<float> out(before);
    DepthProduct product = {};
    product.m = c.m;
    product.n = c.n;
    product.a = a.operand(c.a_gathered ? a_index.data() : nullptr);
    product.b = b.operand(c.b_gathered ? b_index.data() : nullptr);
    product.offset = offset.data();
    product.groups = static_cast<int32_t>(groups);
    product.c = out.data();
    product.c_dtype = CUMOE_F32;
    product.c_group_stride = group_stride;
    product.c_row_stride = row_stride;
    product.c_col_stride = 1;
    product.add = c.add;
    product.exponent = c.exponent ? exponent.data() : nullptr;
    sim_set_seed(seed);
    const cudaError_t error = probe_depth(make_context(), product, nullptr);
    EXPECT(error == cudaSuccess, "%s %s: %s", Type<T>::kName, c.name, cudaGetErrorName(error));

    const std::vector<float> after = out.read();
    for (int64_t at = 0; at < groups * group_stride; at++) {
        const int64_t g = at / group_stride, m = at % group_stride / row_stride, n = at % row_stride;
        double expected = static_cast<double>(before[size(at)]), sum = 0, scale = fabs(expected);
        if (n < c.n && !(c.add && c.rows[size(g)] == 0)) {
            for (int32_t r = tiles.offset[size(g)]; r < tiles.offset[size(g + 1)]; r++) {
                const double term =
                    ldexp(a.rounded(0, m, index[0][size(r)]) * b.rounded(0, n, index[1][size(r)]), c.exponent);
                sum += term;
                scale += fabs(term);
            }
            expected = c.add ? expected + sum : sum;
        }
        EXPECT(is_near(after[size(at)], expected, scale, c.rows[size(g)] + 1, values),
               "%s %s group %lld (%lld, %lld): %g, not %g", Type<T>::kName, c.name, static_cast<long long>(g),
               static_cast<long long>(m), static_cast<long long>(n), static_cast<double>(after[size(at)]),
               expected);
    }
}

template <typename T>
void run_type(Values values)
{
    for (const RowsCase &c : kRowsCases) run_rows<T>(c, values);
    for (const DepthCase &c : kDepthCases) run_depth<T>(c, values);
}

} // namespace

int main()
{
    for (seed = 1; seed <= 2; seed++) {
        printf("seed %llu\n", static_cast<unsigned long long>(seed));
        random_bits.seed(static_cast<unsigned>(seed));
        const Values values = seed == 1 ? Values::INTEGERS : Values::REALS;
        run_type<__nv_bfloat16>(values);
        run_type<__half>(values);
        run_type<float>(values);
    }
    EXPECT(sim_num_objects() == 0, "%lld left", static_cast<long long>(sim_num_objects()));
    return check::result();
}
