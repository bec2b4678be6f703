/* The stable permutation in the simulator, against the plain loop, for several seeds. */
#include "cuda/permute.cuh"
#include "tests/sim/buffer.h"
#include "tests/sim/check.h"
#include "tests/sim/simulator.h"

#include <random>

namespace
{

struct Case {
    const char *name;
    int64_t tokens, live;
    int32_t experts, top_k;
    int only; // all slots name this expert; -1: random ones, from -1 (none) to E (none as well)
};

const Case kCases[] = {
    {"no token", 0, 0, 4, 2, -1},
    {"one token", 1, 1, 4, 2, -1},
    {"one expert", 700, 700, 1, 1, -1},
    {"few experts", 1000, 1000, 8, 2, -1},
    {"sizes off every tile", 2049, 2000, 37, 3, -1},
    {"all on one expert", 1500, 1500, 16, 2, 5},
    {"no live token", 300, 0, 16, 2, -1},
    {"more experts than slots", 100, 90, 4096, 4, -1},
    {"K = E", 500, 500, 4, 4, -1},
    {"more blocks than lanes", 35000, 34999, 3, 2, -1},
};

struct Expected {
    std::vector<int32_t> offset, row_token, row_slot, slot_row;
};

Expected plain_loop(const Case &c, const std::vector<int32_t> &expert)
{
    const size_t slots = expert.size(), live = static_cast<size_t>(c.live * c.top_k);
    Expected out = {
        std::vector<int32_t>(static_cast<size_t>(c.experts) + 1), {}, {}, std::vector<int32_t>(slots, -1)};
    for (int32_t e = 0; e < c.experts; e++) {
        for (size_t slot = 0; slot < live; slot++) {
            if (expert[slot] != e) continue;
            out.slot_row[slot] = static_cast<int32_t>(out.row_slot.size());
            out.row_slot.push_back(static_cast<int32_t>(slot));
            out.row_token.push_back(static_cast<int32_t>(slot) / c.top_k);
        }
        out.offset[static_cast<size_t>(e) + 1] = static_cast<int32_t>(out.row_slot.size());
    }
    return out;
}

std::vector<int32_t> make_experts(const Case &c, uint64_t seed)
{
    std::mt19937_64 random(seed);
    std::vector<int32_t> expert(static_cast<size_t>(c.tokens * c.top_k));
    for (int32_t &e : expert) e = c.only >= 0 ? c.only : static_cast<int32_t>(random() % (c.experts + 2u)) - 1;
    return expert;
}

void run(const Case &c, uint64_t seed)
{
    sim_set_seed(seed);
    const std::vector<int32_t> expert = make_experts(c, seed);
    const Expected expected = plain_loop(c, expert);

    Buffer<int32_t> experts(expert), offset(static_cast<size_t>(c.experts) + 1), row_token(expert.size()),
        row_slot(expert.size()), slot_row(expert.size());
    Buffer<cumoe_call_t> call(std::vector<cumoe_call_t>{{0, 0, 0, c.live}});
    const size_t workspace_size = cumoe::permute_workspace(c.tokens, c.experts, c.top_k);
    Buffer<char> workspace(workspace_size);
    cumoe_permute_args_t args = {};
    args.num_tokens = c.tokens;
    args.routing.call = call.data();
    args.routing.expert = experts.data();
    args.rows = {offset.data(), row_token.data(), row_slot.data(), slot_row.data(), nullptr};
    args.workspace = workspace.data();
    args.workspace_size = workspace_size;
    EXPECT(cumoe::permute(args, c.experts, c.top_k, nullptr) == cudaSuccess, "%s", c.name);

    const auto begins_with = [](std::vector<int32_t> values, const std::vector<int32_t> &head) {
        values.resize(head.size());
        return values == head;
    };
    EXPECT(offset.read() == expected.offset, "%s", c.name);
    EXPECT(slot_row.read() == expected.slot_row, "%s", c.name);
    EXPECT(begins_with(row_slot.read(), expected.row_slot), "%s", c.name);
    EXPECT(begins_with(row_token.read(), expected.row_token), "%s", c.name);
}

} // namespace

int main()
{
    for (uint64_t seed = 1; seed <= 3; seed++)
        for (const Case &c : kCases)
            if (seed == 1 || c.tokens < 10000) run(c, seed);
    EXPECT(sim_num_objects() == 0, "%lld left", static_cast<long long>(sim_num_objects()));
    return check::result();
}
