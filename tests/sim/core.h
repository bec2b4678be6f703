/* What the parts of the simulator share. One kernel runs at a time, so all of this is one of a kind. */
#ifndef CUMOE_SIM_CORE_H
#define CUMOE_SIM_CORE_H

#include "tests/sim/device.h"
#include "tests/sim/fiber.h"

#include <vector>

extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;

namespace sim
{

constexpr unsigned kMaxThreads = 1024, kWarp = 32, kNumBarriers = 16;

/* A cp.async on its way. */
struct Copy {
    char *to;
    const char *from;
    int bytes, source_bytes;
    const void *pc;
};

struct Thread {
    Fiber fiber;
    unsigned rank;        // in the block
    bool left;            // has come to the end of the kernel
    bool quiet;           // is in the simulator's own code, whose memory accesses do not count
    const char *waits_in; // name of what it waits in, or NULL
    const void *pc;       // and the place in the kernel
    std::vector<Copy> open;
    std::vector<std::vector<Copy>> groups; // committed, oldest first
};

/* One launch. */
struct Kernel {
    std::shared_ptr<const Body> body;
    dim3 grid, block;
    size_t shared_bytes;
    int device;
};

/* The block that runs. */
struct Block {
    const Kernel *kernel = nullptr;
    Thread *thread = nullptr; // that runs now; NULL in the scheduler and on the host
    bool failed = false;      // a report has ended the launch
    unsigned num_threads = 0, num_left = 0;
    std::vector<Thread> threads; // [kMaxThreads]
    std::vector<Thread *> ready; // in no order
};
extern Block block;

/* In the simulator's own code on a kernel's stack. */
class Quiet
{
  public:
    Quiet() : thread_(block.thread)
    {
        thread_->quiet = true;
    }
    ~Quiet()
    {
        thread_->quiet = false;
    }

  private:
    Thread *thread_;
};

/* block.cc */
uint64_t random_below(uint64_t bound);
bool in_kernel(); // the caller's code is a kernel's, and not that of another thread of the host meanwhile
bool run_kernel(const Kernel &kernel);       // false: a report ended it
void wait(const char *name, const void *pc); // until somebody wakes the thread
void wake(Thread *thread);

/* sync.cc: barriers, collectives, and what they say about the order of things */
void sync_reset();
void sync_leave(Thread *thread);
/* The present time of a thread, and whether what A did at TIME comes before what B does now. */
uint32_t now(unsigned thread);
bool is_before(unsigned a, uint32_t time, unsigned b);

/* shared.cc */
enum class Access { READ, WRITE, ATOMIC };
void shared_reset();
bool is_shared(const void *address);
void shared_access(const void *address, size_t bytes, Access access, const void *pc);
void copy_leave(Thread *thread);

/* global.cc: device memory, and the compiler's hooks */
void *device_allocate(int device, size_t bytes); // NULL: the device has not so much left
bool device_free(void *address);
void device_memory(int device, size_t *free, size_t *total);
size_t num_allocations();
bool is_device_memory(const void *address, size_t bytes, int *device); // inside one allocation
void global_access(const void *address, size_t bytes, Access access, const void *pc);
void *reserve(size_t bytes); // pages that cost nothing until they are touched

/* order.cc: races in global memory */
void order_reset(uint64_t num_blocks);
void order_access(const void *address, size_t bytes, Access access, const void *pc);

/* report.cc: "kernel, block, thread at file:line: sentence". In a kernel this does not return. */
[[gnu::format(printf, 2, 3)]] void report(const void *pc, const char *format, ...);
[[gnu::format(printf, 3, 4)]] void report_for(const Thread *thread, const void *pc, const char *format, ...);
const char *place(const void *pc); // "file:line"; the last four answers stay valid
uint64_t seed();

/* runtime.cc */
size_t memory_of_device(int device);

#define SIM_PC __builtin_return_address(0)

} // namespace sim

#endif
