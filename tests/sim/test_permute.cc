/* The stable permutation and the tile map in the simulator, against plain loops, for several seeds. */
#include "cuda/stages.cuh"
#include "host/kinds.h"
#include "tests/sim/buffer.h"
#include "tests/sim/check.h"
#include "tests/sim/simulator.h"

#include <algorithm>
#include <random>

namespace
{

struct Case {
    const char *name;
    int64_t tokens, live;
    int32_t experts, top_k;
    int only; // all slots name this expert; -1: random ones, from -1 (none) to E (none as well)
    cumoe_dtype_t dtype = CUMOE_F32;
    int32_t tile_rows = 64;
    bool vary = false;    // slots vary in number, K on average
    int64_t max_rows = 0; // of the config
};

const Case kCases[] = {
    // One block.
    {"no token", 0, 0, 4, 2, -1},
    {"one token", 1, 1, 4, 2, -1},
    {"one expert", 700, 700, 1, 1, -1},
    {"few experts", 1000, 1000, 8, 2, -1},
    {"sizes off every tile", 2049, 2000, 37, 3, -1},
    {"all on one expert", 1500, 1500, 16, 2, 5},
    {"tiles of 128 rows", 1500, 1499, 16, 2, -1, CUMOE_BF16, 128},
    {"few rows of 16 bits", 700, 700, 16, 2, -1, CUMOE_BF16, 64},
    {"no live token", 300, 0, 16, 2, -1},
    {"two warps less", 300, 300, 1500, 3, -1},
    {"most experts, one block", 100, 90, 4096, 4, -1},
    {"K = E", 500, 500, 4, 4, -1},
    // Several.
    {"more blocks than lanes", 35000, 34999, 3, 2, -1},
    {"sizes off every chunk", 8200, 8100, 37, 3, -1},
    {"all of several blocks on one expert", 9000, 9000, 16, 2, 5, CUMOE_F16, 128},
    {"no live token of several blocks", 9000, 0, 16, 2, -1},
    {"most experts", 1500, 1400, 4096, 4, -1},
    // Sorted.
    {"first that are sorted", 600, 590, 4097, 3, -1},
    {"5000 experts", 2100, 2099, 5000, 2, -1},
    {"no token to sort", 0, 0, 5000, 2, -1},
    {"one slot to sort", 1, 1, 5000, 1, -1},
    {"no live token to sort", 50, 0, 5000, 1, -1},
    {"all sorted to the last", 700, 650, 8191, 2, 8190},
    {"most experts of all", 1000, 900, 131072, 4, -1},
    // Slots that vary in number.
    {"no token that varies", 0, 0, 4, 2, -1, CUMOE_F32, 64, true},
    {"one token that varies", 1, 1, 40, 1, -1, CUMOE_F32, 64, true},
    {"one block, varying", 700, 650, 9, 2, -1, CUMOE_F32, 64, true},
    {"no live token that varies", 300, 0, 16, 2, -1, CUMOE_F32, 64, true},
    {"several blocks, varying", 8200, 8100, 37, 2, -1, CUMOE_BF16, 128, true},
    {"more rows than T * K", 4000, 4000, 16, 1, -1, CUMOE_F16, 128, true, 9000},
    {"sorted, varying", 600, 590, 4097, 3, -1, CUMOE_F32, 64, true},
};

struct Expected {
    std::vector<int32_t> offset, row_token, row_slot, slot_row, tile;
};

/* The choices of all tokens. */
struct Choices {
    std::vector<int32_t> expert, token_slot, slot_token; // [S], [T + 1], [S]
};

/* A list of slots for each expert, one behind the other. */
Expected plain_loop(const Case &c, const Choices &choices)
{
    const std::vector<int32_t> &expert = choices.expert;
    std::vector<std::vector<int32_t>> slots(static_cast<size_t>(c.experts));
    for (int32_t slot = 0; slot < choices.token_slot[static_cast<size_t>(c.live)]; slot++) {
        const int32_t e = expert[static_cast<size_t>(slot)];
        if (e >= 0 && e < c.experts) slots[static_cast<size_t>(e)].push_back(slot);
    }
    Expected out = {{0}, {}, {}, std::vector<int32_t>(expert.size(), -1), {0, c.tile_rows}};
    for (int32_t e = 0; e < c.experts; e++) {
        int32_t in_tile = 0;
        for (const int32_t slot : slots[static_cast<size_t>(e)]) {
            const int32_t row = static_cast<int32_t>(out.row_slot.size());
            if (in_tile++ % c.tile_rows == 0) {
                out.tile[0]++;
                out.tile.push_back(e);
                out.tile.push_back(row);
            }
            out.slot_row[static_cast<size_t>(slot)] = row;
            out.row_slot.push_back(slot);
            out.row_token.push_back(choices.slot_token[static_cast<size_t>(slot)]);
        }
        out.offset.push_back(static_cast<int32_t>(out.row_slot.size()));
    }
    return out;
}

/* Slots from those of the last live token on name experts as well. */
Choices make_choices(const Case &c, const cumoe_config_t &config, uint64_t seed)
{
    std::mt19937_64 random(seed);
    const int64_t rows = cumoe__max_rows(&config, c.tokens);
    Choices choices = {std::vector<int32_t>(static_cast<size_t>(cumoe__max_slots(&config, c.tokens))), {0}, {}};
    for (int32_t &e : choices.expert)
        e = c.only >= 0 ? c.only : static_cast<int32_t>(random() % (c.experts + 2u)) - 1;
    for (int32_t t = 0; t < c.tokens; t++) {
        const uint64_t most = static_cast<uint64_t>(2 * rows / c.tokens) + 1;
        const int64_t wanted = !c.vary ? c.top_k : t < c.live ? static_cast<int64_t>(random() % most) : 0;
        const int64_t left = rows - choices.token_slot.back();
        choices.slot_token.insert(choices.slot_token.end(), static_cast<size_t>(std::min(wanted, left)), t);
        choices.token_slot.push_back(static_cast<int32_t>(choices.slot_token.size()));
    }
    choices.slot_token.resize(choices.expert.size(), INT32_MAX); // not to be read
    return choices;
}

void run(const Case &c, uint64_t seed)
{
    sim_set_seed(seed);
    const cumoe::Device device = {0, 4, 80};
    cumoe_context_t context = {};
    context.config.num_experts = c.experts;
    context.config.top_k = c.top_k;
    context.config.dtype = c.dtype;
    context.config.gate = c.vary ? CUMOE_GATE_BALANCED : CUMOE_GATE_EXTERNAL;
    context.config.max_rows = c.max_rows;
    context.device = const_cast<cumoe::Device *>(&device);
    const Choices choices = make_choices(c, context.config, seed);
    const Expected expected = plain_loop(c, choices);
    const int64_t rows = cumoe__max_rows(&context.config, c.tokens);
    Buffer<int32_t> experts(choices.expert), token_slot(choices.token_slot), slot_token(choices.slot_token),
        offset(static_cast<size_t>(c.experts) + 1), row_token(static_cast<size_t>(rows)),
        row_slot(static_cast<size_t>(rows)), slot_row(choices.expert.size()),
        tile(static_cast<size_t>(cumoe_tile_size(rows, c.experts)));
    Buffer<cumoe_call_t> call(std::vector<cumoe_call_t>{{0, 0, 0, c.live}});
    const size_t workspace_size = cumoe::permute_workspace(context, c.tokens);
    Buffer<char> workspace(workspace_size);
    cumoe_permute_args_t args = {};
    args.num_tokens = c.tokens;
    args.routing.call = call.data();
    args.routing.expert = experts.data();
    args.routing.token_slot = c.vary ? token_slot.data() : nullptr;
    args.routing.slot_token = c.vary ? slot_token.data() : nullptr;
    args.rows = {offset.data(), row_token.data(), row_slot.data(), slot_row.data(), tile.data()};
    args.workspace = workspace.data();
    args.workspace_size = workspace_size;
    EXPECT(cumoe::permute(context, args, nullptr) == cudaSuccess, "%s", c.name);

    // Behind what is there, nothing is written.
    const auto is = [](const std::vector<int32_t> &values, std::vector<int32_t> wanted) {
        wanted.resize(values.size(), -1);
        return values == wanted;
    };
    EXPECT(offset.read() == expected.offset, "%s, seed %llu", c.name, static_cast<unsigned long long>(seed));
    EXPECT(slot_row.read() == expected.slot_row, "%s, seed %llu", c.name, static_cast<unsigned long long>(seed));
    EXPECT(is(row_slot.read(), expected.row_slot), "%s, seed %llu", c.name, static_cast<unsigned long long>(seed));
    EXPECT(is(row_token.read(), expected.row_token), "%s, seed %llu", c.name,
           static_cast<unsigned long long>(seed));
    EXPECT(is(tile.read(), expected.tile), "%s, seed %llu", c.name, static_cast<unsigned long long>(seed));
}

} // namespace

int main()
{
    for (uint64_t seed = 1; seed <= 3; seed++)
        for (const Case &c : kCases)
            if (seed == 1 || c.tokens < 1000) run(c, seed);
    EXPECT(sim_num_objects() == 0, "%lld left", static_cast<long long>(sim_num_objects()));
    return check::result();
}
