/* Fibers: stacks that hand the processor to each other. */
#ifndef CUMOE_SIM_FIBER_H
#define CUMOE_SIM_FIBER_H

#include <stddef.h>

namespace sim
{

/* The sanitizers' own code runs on these stacks as well. */
constexpr size_t kStackBytes = 256 * 1024;

struct Fiber {
    char *stack = nullptr;   // [kStackBytes]
    void *context = nullptr; // where it goes on
    void *fake = nullptr;    // AddressSanitizer's second stack
};

/* The next fiber_resume begins ENTRY, which must end in fiber_leave. */
void fiber_prepare(Fiber *fiber, void (*entry)());

/* From the scheduler: run the fiber until it pauses or leaves. */
void fiber_resume(Fiber *fiber);

/* From the fiber: back to the scheduler. */
void fiber_pause(Fiber *fiber);
[[noreturn]] void fiber_leave(Fiber *fiber);

} // namespace sim

#endif
