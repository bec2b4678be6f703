/* Barriers and warp collectives, and the order that they give to memory accesses.
 *
 * A thread's time goes up whenever it takes part in something that orders memory. seen[b][a] is the latest time of
 * a that b knows to be over; a barrier of the whole block is kept as one row, floor_time, that all know. */
#include "tests/sim/core.h"

#include <algorithm>
#include <string.h>

namespace sim
{

namespace
{

uint32_t time_of[kMaxThreads]; // goes on from block to block
uint32_t floor_time[kMaxThreads];
std::vector<uint32_t> seen; // [kMaxThreads, kMaxThreads]

uint32_t *row_of(unsigned thread)
{
    return &seen[size_t{thread} * kMaxThreads];
}

/* What some threads know together. */
struct Knowledge {
    uint32_t time[kMaxThreads];

    void clear()
    {
        memset(time, 0, block.num_threads * sizeof *time);
    }
    void add(unsigned thread) // and the thread's later deeds are not part of it
    {
        const uint32_t *row = row_of(thread);
        for (unsigned i = 0; i < block.num_threads; i++) time[i] = std::max(time[i], row[i]);
        time[thread] = time_of[thread]++;
    }
    void tell(unsigned thread) const
    {
        uint32_t *row = row_of(thread);
        for (unsigned i = 0; i < block.num_threads; i++) row[i] = std::max(row[i], time[i]);
    }
};

struct Barrier {
    int expected, arrived;
    std::vector<Thread *> waiting;
    Knowledge knowledge;
};
Barrier barriers[kNumBarriers];
const Thread *first_of_warp[kMaxThreads / kWarp]; // in the block's barrier

/* Lanes of one warp that come together. */
struct Meeting {
    const char *name; // NULL: free
    uint32_t mask, arrived;
    const void *pc; // of the first
    const void *in[kWarp];
    void *out[kWarp];
};
Meeting meetings[kMaxThreads / kWarp][kWarp]; // masks of one warp are disjoint, so 32 are enough
Knowledge lanes_knowledge;
const Meeting *at_work; // the meeting whose last lane does the work

unsigned first_lane(uint32_t mask)
{
    return static_cast<unsigned>(__builtin_ctz(mask));
}

void check_mask(const char *name, uint32_t mask, const void *pc)
{
    const unsigned rank = block.thread->rank, warp = rank / kWarp;
    if (!(mask >> rank % kWarp & 1))
        report(pc, "%s: mask %08x does not name the calling lane %u", name, mask, rank % kWarp);
    for (unsigned lane = 0; lane < kWarp; lane++) {
        if (!(mask >> lane & 1)) continue;
        const unsigned other = warp * kWarp + lane;
        if (other >= block.num_threads)
            report(pc, "%s: mask %08x names lane %u, but the block ends before it", name, mask, lane);
        if (block.threads[other].left)
            report(pc, "%s: mask %08x names lane %u, which has left the kernel", name, mask, lane);
    }
}

/* The meeting of the mask, a new one for its first lane. */
Meeting *join(const char *name, uint32_t mask, bool aligned, const void *pc)
{
    Meeting *unused = nullptr;
    for (Meeting &meeting : meetings[block.thread->rank / kWarp]) {
        if (!meeting.name) {
            if (!unused) unused = &meeting;
        } else if (meeting.mask & mask) {
            if (meeting.mask != mask || strcmp(meeting.name, name) != 0 || (aligned && meeting.pc != pc))
                report(pc, "%s with mask %08x, but lane %u waits in %s with mask %08x at %s", name, mask,
                       first_lane(meeting.arrived), meeting.name, meeting.mask, place(meeting.pc));
            return &meeting;
        }
    }
    unused->name = name;
    unused->mask = mask;
    unused->arrived = 0;
    unused->pc = pc;
    return unused;
}

void complete_block_barrier(Barrier *barrier)
{
    for (unsigned i = 0; i < block.num_threads; i++) floor_time[i] = time_of[i]++;
    barrier->arrived = 0;
    for (Thread *thread : barrier->waiting) wake(thread);
    barrier->waiting.clear();
    memset(first_of_warp, 0, sizeof first_of_warp);
}

void block_barrier(const char *name, const void *pc)
{
    Barrier *barrier = &barriers[0];
    for (unsigned i = 0; i < block.num_threads && block.num_left; i++)
        if (block.threads[i].left) report(pc, "%s, but thread %u has left the kernel", name, i);
    const Thread *&first = first_of_warp[block.thread->rank / kWarp];
    if (first && first->pc != pc)
        report(pc, "%s, but lane %u of the warp is in the one at %s", name, first->rank % kWarp, place(first->pc));
    if (!first) first = block.thread;
    if (++barrier->arrived == static_cast<int>(block.num_threads)) return complete_block_barrier(barrier);
    barrier->waiting.push_back(block.thread);
    wait(name, pc);
}

} // namespace

void sync_reset()
{
    if (seen.empty()) seen.resize(size_t{kMaxThreads} * kMaxThreads);
    for (unsigned i = 0; i < block.num_threads; i++) floor_time[i] = time_of[i]++;
    for (Barrier &barrier : barriers) {
        barrier.expected = barrier.arrived = 0;
        barrier.waiting.clear();
    }
    memset(first_of_warp, 0, sizeof first_of_warp);
    for (auto &warp : meetings)
        for (Meeting &meeting : warp) meeting.name = nullptr;
}

void sync_leave(Thread *thread)
{
    for (const Thread *other : barriers[0].waiting)
        report_for(other, other->pc, "%s, but thread %u has left the kernel", other->waits_in, thread->rank);
    const unsigned warp = thread->rank / kWarp, lane = thread->rank % kWarp;
    for (const Meeting &meeting : meetings[warp])
        if (meeting.name && meeting.mask >> lane & 1)
            report_for(&block.threads[warp * kWarp + first_lane(meeting.arrived)], meeting.pc,
                       "%s: mask %08x names lane %u, which has left the kernel", meeting.name, meeting.mask, lane);
}

uint32_t now(unsigned thread)
{
    return time_of[thread];
}

bool is_before(unsigned a, uint32_t time, unsigned b)
{
    return a == b || time <= floor_time[a] || time <= row_of(b)[a];
}

void barrier(const char *name, int id, int threads, bool waits)
{
    const void *pc = SIM_PC;
    Quiet quiet;
    if (id == 0) return block_barrier(name, pc);
    if (threads <= 0 || threads % static_cast<int>(kWarp))
        report(pc, "%s: %d threads are not whole warps", name, threads);
    Barrier *barrier = &barriers[id];
    if (barrier->arrived == 0) {
        barrier->expected = threads;
        barrier->knowledge.clear();
    }
    if (barrier->expected != threads)
        report(pc, "%s: barrier %d of %d threads, but others gave it %d", name, id, threads, barrier->expected);
    barrier->knowledge.add(block.thread->rank);
    if (waits) barrier->waiting.push_back(block.thread);
    if (++barrier->arrived < barrier->expected) {
        if (waits) wait(name, pc);
        return;
    }
    barrier->arrived = 0;
    for (Thread *thread : barrier->waiting) {
        barrier->knowledge.tell(thread->rank);
        if (thread != block.thread) wake(thread);
    }
    barrier->waiting.clear();
}

void collective(const char *name, uint32_t mask, int flags, const void *in, void *out, combine_t *combine)
{
    const void *pc = SIM_PC;
    Quiet quiet;
    check_mask(name, mask, pc);
    Meeting *meeting = join(name, mask, flags & ALIGNED, pc);
    const unsigned lane = block.thread->rank % kWarp, warp_begin = block.thread->rank - lane;
    meeting->in[lane] = in;
    meeting->out[lane] = out;
    meeting->arrived |= 1u << lane;
    if (meeting->arrived != mask) return wait(name, pc);

    at_work = meeting;
    if (combine) combine(meeting->in, meeting->out, mask);
    if (flags & ORDERS) {
        lanes_knowledge.clear();
        for (unsigned i = 0; i < kWarp; i++)
            if (mask >> i & 1) lanes_knowledge.add(warp_begin + i);
    }
    meeting->name = nullptr;
    for (unsigned i = 0; i < kWarp; i++) {
        if (!(mask >> i & 1)) continue;
        if (flags & ORDERS) lanes_knowledge.tell(warp_begin + i);
        if (i != lane) wake(&block.threads[warp_begin + i]);
    }
}

void lane_without_source(int lane, int source)
{
    report(at_work->pc, "%s: lane %d asks lane %d, which mask %08x does not name", at_work->name, lane, source,
           at_work->mask);
    __builtin_unreachable(); // a report in a kernel does not return
}

} // namespace sim
