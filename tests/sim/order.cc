/* Races in global memory: for every two bytes who wrote them last and who read them since, in the launch that runs.
 *
 * Inside a block barriers order accesses, as in shared memory. Between the blocks of a launch nothing does, but
 * this: what a block wrote before an atomic may be read by a block behind an atomic of its own (the last block to
 * come sums up what the others left). */
#include "tests/sim/core.h"

#include <memory>
#include <string.h>
#include <unordered_map>

namespace sim
{

namespace
{

constexpr size_t kPage = 4096, kPair = 2; // bytes; nothing smaller than a pair is written by kernels
constexpr size_t kMaxPages = 4096;        // what a launch touches beyond is not watched

struct Deed {
    const void *pc;
    uint32_t event; // of the launch, when it happened
    uint32_t time;  // of the thread
    uint32_t block;
    uint16_t thread;
    bool atomic, valid;
};

struct Pair {
    uint32_t launch;   // of what stands here
    bool more_readers; // of other blocks than read's
    Deed write, read;
};

struct Page {
    Pair pair[kPage / kPair] = {};
};

std::unordered_map<uintptr_t, std::unique_ptr<Page>> pages;
uintptr_t last_number;
Page *last_page;

uint32_t launch_number, event;
std::vector<uint32_t> last_atomic; // [blocks] event of a block's last atomic; 0 = none

Page *page_of(uintptr_t number)
{
    if (last_page && number == last_number) return last_page;
    const auto known = pages.find(number);
    if (known == pages.end() && pages.size() >= kMaxPages) return nullptr;
    std::unique_ptr<Page> &page = pages[number];
    if (!page) page = std::make_unique<Page>();
    last_number = number;
    return last_page = page.get();
}

uint32_t this_block()
{
    return blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
}

const char *verb(Access access)
{
    return access == Access::READ ? "reads" : access == Access::WRITE ? "writes" : "updates";
}

/* Is the other access, of this launch, over for this one? */
void check(const Deed &other, const char *did, bool atomic, Access access, const void *pc)
{
    if (!other.valid || (other.atomic && atomic)) return;
    if (other.block == this_block()) {
        if (!is_before(other.thread, other.time, block.thread->rank))
            report(pc, "%s global memory that thread %u %s at %s, with no barrier in between", verb(access),
                   other.thread, did, place(other.pc));
        return;
    }
    const bool published = last_atomic[other.block] > other.event, asked = last_atomic[this_block()] > other.event;
    if (!(published && asked))
        report(pc, "%s global memory that block %u %s in the same launch at %s", verb(access), other.block, did,
               place(other.pc));
}

void touch(Pair *pair, Access access, const void *pc)
{
    if (pair->launch != launch_number) *pair = {launch_number, false, {}, {}};
    const bool atomic = access == Access::ATOMIC;
    check(pair->write, "wrote", atomic, access, pc);
    const Deed me = {
        pc, event, now(block.thread->rank), this_block(), static_cast<uint16_t>(block.thread->rank), atomic, true};
    if (access == Access::READ) {
        if (pair->read.valid && pair->read.block != me.block) pair->more_readers = true;
        pair->read = me;
        return;
    }
    if (!atomic) check(pair->read, "read", atomic, access, pc);
    if (!atomic && pair->more_readers)
        report(pc, "%s global memory that several blocks read in the same launch", verb(access));
    pair->write = me;
    pair->read.valid = false;
}

} // namespace

void order_reset(uint64_t num_blocks)
{
    launch_number++;
    event = 0;
    last_atomic.assign(num_blocks, 0);
    if (pages.size() >= kMaxPages) {
        pages.clear();
        last_page = nullptr;
    }
}

void order_access(const void *address, size_t bytes, Access access, const void *pc)
{
    event++;
    if (access == Access::ATOMIC) last_atomic[this_block()] = event;
    const uintptr_t begin = reinterpret_cast<uintptr_t>(address);
    for (uintptr_t at = begin / kPair; at <= (begin + bytes - 1) / kPair; at++)
        if (Page *page = page_of(at * kPair / kPage)) touch(&page->pair[at % (kPage / kPair)], access, pc);
}

} // namespace sim
