/* The stages of experts in the simulator, each alone, against plain loops in double precision: all types and
 * activations, weights in every layout, experts without rows, odd sizes, rows that are not there full of NaN. */
#include "cuda/stages.cuh"
#include "tests/sim/experts_problem.h"
#include "tests/sim/simulator.h"

using namespace experts;

namespace
{

struct Test : Problem {
    using Problem::Problem;

    void up();
    void down();
    void down_backward();
    void up_backward();

  private:
    /* What a stage should compute, and how far off it may be. */
    struct Number {
        double value = 0, error = 0;
    };
    Number pre_activation(const Array &x, bool half, int64_t row, int64_t i);
    void check_up_row(const Array &x, const Values &z, const Values &hidden, int kind, int64_t row);

    struct DownBackward {
        Array dy, z, dz, dweight;
        Gradient dw, db;
        Values largest; // weight of an expert
    };
    DownBackward make_down_backward();
    Number hidden_gradient(const Array &dy, int64_t row, int64_t i);
    void check_dz(const DownBackward &b, const Values &dz, int64_t row, int64_t i, Number d);
    void add_down_gradients(DownBackward &b, int64_t row, int64_t i);
    void check_down_row(DownBackward &b, const Values &dz, const Values &dweight, int64_t row);

    struct UpBackward {
        Array x, dz, drows;
        Gradient dw[2], db[2];
    };
    UpBackward make_up_backward();
    void check_drows(const UpBackward &b, const Values &drows, int64_t row);
    void add_up_gradients(UpBackward &b, int64_t row, bool half);
};

/* --- Up */

Test::Number Test::pre_activation(const Array &x, bool half, int64_t row, int64_t i)
{
    if (linear) return {x.values(token(row) * stride + i), 0};
    Number z;
    double size = 1;
    for (int64_t h = 0; h < H; h++) {
        const double product = x.values(token(row) * stride + h) * w(half, expert(row), i, h);
        z.value += product;
        size += fabs(product);
    }
    if (c.bias) z.value += bias_array(half).values(bias_at(half, expert(row), i));
    z.error = sum_error(H + 1, size) + eps * fabs(z.value);
    return z;
}

void Test::check_up_row(const Array &x, const Values &z, const Values &hidden, int kind, int64_t row)
{
    for (int64_t i = 0; i < I; i++) {
        const Number expected = pre_activation(x, false, row, i);
        if (kind == 2) { // within what z may differ by: slopes are at most 2 (1 + |z|)
            const double active = act(expected.value, 0), slope = 2 * (1 + fabs(expected.value));
            near(z(row * I + i), active, act_error(expected.value, 0) + expected.error * slope + eps * fabs(active),
                 "hidden", row, i);
            continue;
        }
        near(z(row * z_width + i), expected.value, expected.error, "z", row, i);
        if (is_glu) {
            const Number glu = pre_activation(x, true, row, i);
            near(z(row * z_width + I + i), glu.value, glu.error, "glu", row, i);
        }
        if (kind == 0) continue;
        const double stored = z(row * z_width + i), stored_glu = is_glu ? z(row * z_width + I + i) : 0;
        const double active = act(stored, stored_glu);
        near(hidden(row * I + i), active, act_error(stored, stored_glu) + eps * fabs(active), "hidden", row, i);
    }
}

void Test::up()
{
    Array x = token_array(), z = no_array(z_width), hidden = no_array(I);
    const int kind = is_glu && c.hidden == 2 ? 1 : c.hidden;
    cumoe_up_args_t args = {};
    args.num_tokens = T;
    args.weights = &weights;
    args.rows = rows;
    args.x = x.data();
    args.x_stride = stride;
    args.z = z.data();
    args.hidden = kind == 0 ? nullptr : kind == 1 ? hidden.data() : z.data();
    EXPECT(cumoe::up(context, args, nullptr) == cudaSuccess, "%s", c.shape.name);

    const Values got_z = z.read(), got_hidden = kind == 1 ? hidden.read() : Values();
    for (int64_t row = 0; row < R; row++) check_up_row(x, got_z, got_hidden, kind, row);
    check_rest(got_z, R * z_width, "z");
    if (kind == 1) check_rest(got_hidden, R * I, "hidden");
}

/* --- Down */

void Test::down()
{
    Array hidden = rows_array(I), output = no_array(H);
    cumoe_down_args_t args = {};
    args.num_tokens = T;
    args.weights = &weights;
    args.rows = rows;
    args.hidden = hidden.data();
    args.output = output.data();
    EXPECT(cumoe::down(context, args, nullptr) == cudaSuccess, "%s", c.shape.name);

    const Values got = output.read();
    for (int64_t row = 0; row < R; row++)
        for (int64_t h = 0; h < H; h++) {
            double value = 0, size = 1;
            for (int64_t i = 0; i < I; i++) {
                const double product = hidden.values(row * I + i) * wd(expert(row), h, i);
                value += product;
                size += fabs(product);
            }
            if (c.bias) value += b_down.values(expert(row) * H + h);
            near(got(row * H + h), value, sum_error(I + 1, size) + eps * fabs(value), "output", row, h);
        }
    check_rest(got, R * H, "output");
}

/* --- Down, backward */

Test::DownBackward Test::make_down_backward()
{
    DownBackward b = {token_array(),
                      rows_array(z_width, c.z_scale),
                      no_array(z_width),
                      Array(static_cast<size_t>(T * K), gate),
                      Gradient(w_down.values.size(), c.gradient_dtype),
                      Gradient(static_cast<size_t>(E * H), c.gradient_dtype),
                      Values(static_cast<size_t>(E))};
    for (size_t i = 0; i < w_down.values.size(); i++) b.dw.is_element[i] = !isnan(w_down.values[i]);
    for (size_t i = 0; i < b.db.value.size(); i++) b.db.is_element[i] = true;
    begin_gradient(*this, b.dw);
    begin_gradient(*this, b.db);
    for (int64_t row = 0; row < R; row++) {
        double &g = b.largest(expert(row));
        g = fmax(g, fabs(weight.values(slot(row))));
    }
    return b;
}

/* d = dy w_down. */
Test::Number Test::hidden_gradient(const Array &dy, int64_t row, int64_t i)
{
    Number d;
    double size = 0;
    for (int64_t h = 0; h < H; h++) {
        const double product = dy.values(token(row) * stride + h) * wd(expert(row), h, i);
        d.value += product;
        size += fabs(product);
    }
    d.error = sum_error(H, size);
    return d;
}

/* Slopes by central differences, away from kinks. */
void Test::check_dz(const DownBackward &b, const Values &dz, int64_t row, int64_t i, Number d)
{
    const int64_t at = row * z_width + i;
    const double up = b.z.values(at), glu = is_glu ? b.z.values(at + I) : 0, step = 1e-5;
    const bool clamped = c.activation == CUMOE_ACTIVATION_SWIGLU_CLAMPED;
    const bool kinked = clamped || c.activation == CUMOE_ACTIVATION_RELU || c.activation == CUMOE_ACTIVATION_RELU2;
    if (kinked && fabs(up) < 2 * step) return;
    if (clamped && fmin(fabs(fabs(up) - limit()), fabs(glu - limit())) < 2 * step) return;
    for (int half = 0; half < halves; half++) {
        const double up_step = half ? 0 : step, glu_step = half ? step : 0;
        const double slope = (act(up + up_step, glu + glu_step) - act(up - up_step, glu - glu_step)) / (2 * step);
        const double g = weight.values(slot(row)), expected = g * d.value * slope;
        const double slope_error = 4 * act_error(up, glu) + 1e-8 * (1 + fabs(up));
        near(dz(at + half * I), expected,
             fabs(g) * (d.error * fabs(slope) + fabs(d.value) * slope_error) + 2 * eps * fabs(expected),
             half ? "dz of glu" : "dz", row, i);
    }
}

/* dw_down gets dy g hidden; of 16-bit types g hidden is rounded once more. */
void Test::add_down_gradients(DownBackward &b, int64_t row, int64_t i)
{
    const int64_t e = expert(row), at = row * z_width + i;
    const double up = b.z.values(at), glu = is_glu ? b.z.values(at + I) : 0, g = weight.values(slot(row));
    const double hidden = act(up, glu), once = size_of(c.dtype) == 2 ? 1 : 0;
    for (int64_t h = 0; h < H; h++) {
        const double y = b.dy.values(token(row) * stride + h), product = y * g * hidden;
        b.dw.add(down_at(e, h, i), product,
                 fabs(y * g) * (act_error(up, glu) + (1 + once) * eps * fabs(hidden)) +
                     sum_error(R, fabs(product)) + once * fabs(y) * b.largest(e) * 2 * tiny(c.dtype));
    }
}

void Test::check_down_row(DownBackward &b, const Values &dz, const Values &dweight, int64_t row)
{
    const int64_t e = expert(row);
    Number expected;
    double size = 0;
    for (int64_t i = 0; i < I; i++) {
        const Number d = hidden_gradient(b.dy, row, i);
        const int64_t at = row * z_width + i;
        const double up = b.z.values(at), glu = is_glu ? b.z.values(at + I) : 0, hidden = act(up, glu);
        expected.value += d.value * hidden;
        expected.error += fabs(d.value) * (act_error(up, glu) + eps * fabs(hidden)) + d.error * fabs(hidden);
        size += fabs(d.value * hidden);
        check_dz(b, dz, row, i, d);
        add_down_gradients(b, row, i);
    }
    for (int64_t h = 0; h < H; h++) {
        const double y = b.dy.values(token(row) * stride + h), g = weight.values(slot(row));
        b.db.add(e * H + h, g * y, 2 * static_cast<double>(R + 1) * eps_sum * fabs(g * y));
        if (!c.bias) continue;
        const double product = y * b_down.values(e * H + h);
        expected.value += product;
        size += fabs(product);
    }
    near(dweight(slot(row)), expected.value, expected.error + 2 * static_cast<double>(I + H) * eps_sum * size,
         "dweight", row, -1);
}

void Test::down_backward()
{
    DownBackward b = make_down_backward();
    cumoe_weights_t gradients = weights;
    gradients.dtype = c.gradient_dtype;
    gradients.w_down = c.hidden == 0 ? nullptr : b.dw.array.data();
    gradients.b_down = c.bias ? b.db.array.data() : nullptr;
    cumoe_down_backward_args_t args = {};
    args.num_tokens = T;
    args.weights = &weights;
    args.routing.weight = weight.data();
    args.rows = rows;
    args.z = b.z.data();
    args.dy = b.dy.data();
    args.dy_stride = stride;
    args.dz = b.dz.data();
    args.dweight = b.dweight.data();
    args.gradients = &gradients;
    args.gradient_mode = c.add ? CUMOE_GRADIENT_ADD : CUMOE_GRADIENT_WRITE;
    args.workspace_size = cumoe::down_backward_workspace(context, T);
    Buffer<unsigned char> workspace(args.workspace_size);
    args.workspace = workspace.data();
    EXPECT(cumoe::down_backward(context, args, nullptr) == cudaSuccess, "%s", c.shape.name);

    const Values dz = b.dz.read(), dweight = b.dweight.read();
    for (int64_t row = 0; row < R; row++) check_down_row(b, dz, dweight, row);
    for (int64_t s = 0; s < T * K; s++)
        if (slot_row[static_cast<size_t>(s)] < 0) near(dweight(s), 0, 0, "dweight of no row", s, -1);
    check_rest(dz, R * z_width, "dz");
    if (gradients.w_down) expect_gradient(*this, b.dw, "dw_down");
    if (gradients.b_down) expect_gradient(*this, b.db, "db_down");
}

/* --- Up, backward */

Test::UpBackward Test::make_up_backward()
{
    UpBackward b = {token_array(), rows_array(z_width), no_array(H), {}, {}};
    for (int half = 0; half < 2; half++) {
        const Array &matrix = half ? w_glu : w_up, &bias = half ? b_glu : b_up;
        b.dw[half] = Gradient(matrix.values.size(), c.gradient_dtype);
        b.db[half] = Gradient(bias.values.size(), c.gradient_dtype);
        for (size_t i = 0; i < matrix.values.size(); i++) b.dw[half].is_element[i] = !isnan(matrix.values[i]);
        for (size_t i = 0; i < bias.values.size(); i++) b.db[half].is_element[i] = true;
        begin_gradient(*this, b.dw[half]);
        begin_gradient(*this, b.db[half]);
    }
    return b;
}

void Test::check_drows(const UpBackward &b, const Values &drows, int64_t row)
{
    for (int64_t h = 0; h < H; h++) {
        double value = linear ? b.dz.values(row * H + h) : 0, size = 0;
        for (int half = 0; half < (linear ? 0 : halves); half++)
            for (int64_t i = 0; i < I; i++) {
                const double product = b.dz.values(row * z_width + half * I + i) * w(half, expert(row), i, h);
                value += product;
                size += fabs(product);
            }
        near(drows(row * H + h), value, sum_error(2 * I, size) + eps * fabs(value), "drows", row, h);
    }
}

void Test::add_up_gradients(UpBackward &b, int64_t row, bool half)
{
    const int array = half && c.glu == CUMOE_GLU_SEPARATE;
    const int64_t e = expert(row);
    for (int64_t i = 0; i < I; i++) {
        const double slope = b.dz.values(row * z_width + half * I + i);
        for (int64_t h = 0; h < H; h++) {
            const double product = slope * b.x.values(token(row) * stride + h);
            b.dw[array].add(up_at(half, e, i, h), product, sum_error(R + 1, fabs(product)));
        }
        if (c.bias)
            b.db[array].add(bias_at(half, e, i), slope, 2 * static_cast<double>(R + 1) * eps_sum * fabs(slope));
    }
}

void Test::up_backward()
{
    UpBackward b = make_up_backward();
    cumoe_weights_t gradients = weights;
    gradients.dtype = c.gradient_dtype;
    gradients.w_up = weights.w_up ? b.dw[0].array.data() : nullptr;
    gradients.w_glu = weights.w_glu ? b.dw[1].array.data() : nullptr;
    gradients.b_up = weights.b_up ? b.db[0].array.data() : nullptr;
    gradients.b_glu = weights.b_glu ? b.db[1].array.data() : nullptr;
    Array &drows = linear && c.hidden == 2 ? b.dz : b.drows;
    cumoe_up_backward_args_t args = {};
    args.num_tokens = T;
    args.weights = &weights;
    args.rows = rows;
    args.x = b.x.data();
    args.x_stride = stride;
    args.dz = b.dz.data();
    args.drows = c.hidden == 0 ? nullptr : drows.data();
    args.gradients = &gradients;
    args.gradient_mode = c.add ? CUMOE_GRADIENT_ADD : CUMOE_GRADIENT_WRITE;
    EXPECT(cumoe::up_backward(context, args, nullptr) == cudaSuccess, "%s", c.shape.name);

    const Values got = args.drows ? drows.read() : Values();
    for (int64_t row = 0; row < R; row++) {
        if (args.drows) check_drows(b, got, row);
        for (int half = 0; half < (linear ? 0 : halves); half++) add_up_gradients(b, row, half);
    }
    if (args.drows) check_rest(got, R * H, "drows");
    if (gradients.w_up) expect_gradient(*this, b.dw[0], "dw_up");
    if (gradients.w_glu) expect_gradient(*this, b.dw[1], "dw_glu");
    if (gradients.b_up) expect_gradient(*this, b.db[0], "db_up");
    if (gradients.b_glu) expect_gradient(*this, b.db[1], "db_glu");
}

/* Every type with every activation; the rest is drawn. */
void run(uint64_t seed)
{
    struct Type {
        cumoe_dtype_t dtype;
        bool tf32;
    };
    const Type types[] = {
        {CUMOE_F32, false}, {CUMOE_BF16, false}, {CUMOE_F16, false}, {CUMOE_F64, false}, {CUMOE_F32, true}};
    std::mt19937_64 random(seed);
    const auto draw = [&](uint64_t count) { return static_cast<int>(random() % count); };
    size_t shape = seed;
    for (const Type &type : types)
        for (int kind = 0; kind < CUMOE_NUM_ACTIVATIONS; kind++) {
            Case c;
            c.shape = kShapes[shape++ % (sizeof kShapes / sizeof *kShapes)];
            c.dtype = type.dtype;
            c.tf32 = type.tf32;
            c.activation = static_cast<cumoe_activation_t>(kind);
            c.glu = static_cast<cumoe_glu_placement_t>(draw(4));
            c.order = static_cast<Order>(draw(kNumOrders));
            c.bias = draw(2);
            c.add = draw(2);
            c.gradient_dtype = draw(2) ? type.dtype : type.dtype == CUMOE_F64 ? CUMOE_F64 : CUMOE_F32;
            c.hidden = draw(3);
            c.padding = draw(3) * 5 % 8; // 0, 5, 2
            c.weight_scale = draw(3) ? 1 : 1e-9;
            const bool large = kind == CUMOE_ACTIVATION_RELU; // near the end of F16: g hidden fits, sums do not
            c.z_scale = large ? 6e4 : 2;
            if (large) c.gradient_dtype = type.dtype == CUMOE_F64 ? CUMOE_F64 : CUMOE_F32;
            c.seed = random();
            sim_set_seed(c.seed);
            Test test(c);
            test.up();
            test.down();
            test.down_backward();
            test.up_backward();
        }
}

} // namespace

int main()
{
    for (uint64_t seed = 1; seed <= 2; seed++) run(seed);
    EXPECT(sim_num_objects() == 0, "%lld left", static_cast<long long>(sim_num_objects()));
    return check::result();
}
