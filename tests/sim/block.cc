/* Runs the blocks of a kernel, one after another, each thread a fiber. */
#include "tests/sim/core.h"
#include "tests/sim/simulator.h"

#include <numeric>
#include <stdlib.h>

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace sim
{

Block block;

namespace
{

thread_local bool runs_kernel;
uint64_t the_seed = getenv("CUMOE_SIM_SEED") ? strtoull(getenv("CUMOE_SIM_SEED"), nullptr, 10) : 1;
uint64_t random_state = the_seed;

void thread_main()
{
    Thread *thread = block.thread;
    block.kernel->body->run();
    thread->quiet = true;
    copy_leave(thread);
    thread->left = true;
    block.num_left++;
    sync_leave(thread);
    fiber_leave(&thread->fiber);
}

void prepare(const Kernel &kernel)
{
    if (block.threads.empty()) {
        block.threads.resize(kMaxThreads);
        char *stacks = static_cast<char *>(reserve(kMaxThreads * kStackBytes));
        for (unsigned i = 0; i < kMaxThreads; i++) {
            block.threads[i].rank = i;
            block.threads[i].fiber.stack = stacks + i * kStackBytes;
        }
    }
    block.kernel = &kernel;
    block.num_threads = kernel.block.x * kernel.block.y * kernel.block.z;
    gridDim = kernel.grid;
    blockDim = kernel.block;
}

/* Nobody can go on, and somebody waits: say for whom. */
void report_deadlock()
{
    const Thread *waiting = nullptr;
    for (unsigned i = 0; i < block.num_threads && !waiting; i++)
        if (block.threads[i].waits_in) waiting = &block.threads[i];
    for (unsigned i = 0; i < block.num_threads; i++) {
        const Thread &other = block.threads[i];
        if (other.left)
            return report_for(waiting, waiting->pc, "waits in %s for ever; thread %u has left the kernel",
                              waiting->waits_in, i);
        if (other.pc != waiting->pc)
            return report_for(waiting, waiting->pc, "waits in %s for ever; thread %u waits in %s at %s",
                              waiting->waits_in, i, other.waits_in, place(other.pc));
    }
    report_for(waiting, waiting->pc, "waits in %s for ever, as all the others do", waiting->waits_in);
}

void run_block()
{
    const dim3 size = block.kernel->block;
    sync_reset();
    shared_reset();
    block.num_left = 0;
    block.ready.clear();
    for (unsigned i = 0; i < block.num_threads; i++) {
        Thread &thread = block.threads[i];
        thread.left = thread.quiet = false;
        thread.waits_in = nullptr;
        thread.pc = nullptr;
        thread.open.clear();
        thread.groups.clear();
        fiber_prepare(&thread.fiber, thread_main);
        block.ready.push_back(&thread);
    }
    while (!block.ready.empty() && !block.failed) {
        std::swap(block.ready[random_below(block.ready.size())], block.ready.back());
        Thread *thread = block.ready.back();
        block.ready.pop_back();
        const unsigned rank = thread->rank;
        threadIdx = uint3{rank % size.x, rank / size.x % size.y, rank / size.x / size.y};
        block.thread = thread;
        fiber_resume(&thread->fiber);
        block.thread = nullptr;
    }
    if (!block.failed && block.num_left < block.num_threads) report_deadlock();
}

} // namespace

uint64_t seed()
{
    return the_seed;
}

/* splitmix64 */
uint64_t random_below(uint64_t bound)
{
    uint64_t z = random_state += 0x9E3779B97F4A7C15u;
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9u;
    z = (z ^ z >> 27) * 0x94D049BB133111EBu;
    return (z ^ z >> 31) % bound;
}

bool in_kernel()
{
    return runs_kernel && block.thread;
}

bool run_kernel(const Kernel &kernel)
{
    prepare(kernel);
    block.failed = false;
    runs_kernel = true;
    const uint64_t count = static_cast<uint64_t>(kernel.grid.x) * kernel.grid.y * kernel.grid.z;
    std::vector<uint64_t> order(count);
    std::iota(order.begin(), order.end(), 0);
    order_reset(count);
    for (uint64_t i = 0; i < count && !block.failed; i++) {
        std::swap(order[i], order[i + random_below(count - i)]);
        const uint64_t plane = static_cast<uint64_t>(kernel.grid.x) * kernel.grid.y, in_plane = order[i] % plane;
        blockIdx = uint3{static_cast<unsigned>(in_plane % kernel.grid.x),
                         static_cast<unsigned>(in_plane / kernel.grid.x), static_cast<unsigned>(order[i] / plane)};
        run_block();
    }
    block.kernel = nullptr;
    runs_kernel = false;
    return !block.failed;
}

void wait(const char *name, const void *pc)
{
    Thread *thread = block.thread;
    thread->waits_in = name;
    thread->pc = pc;
    fiber_pause(&thread->fiber);
}

void wake(Thread *thread)
{
    thread->waits_in = nullptr;
    block.ready.push_back(thread);
}

} // namespace sim

void sim_set_seed(uint64_t seed)
{
    sim::the_seed = sim::random_state = seed;
}
