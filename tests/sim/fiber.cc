#include "tests/sim/fiber.h"

#include <stdint.h>
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace sim
{

namespace
{

void *scheduler;          // where it goes on
const void *caller_stack; // the scheduler's, as AddressSanitizer knows it
size_t caller_stack_bytes;
void (*first)(); // what a fiber that begins is to run

#if defined(__x86_64__)
/* Keep what a called function must keep, and change stacks. */
extern "C" void cumoe_sim_switch(void **from, void *to);
asm(R"(
.text
.type cumoe_sim_switch, @function
cumoe_sim_switch:
    pushq %rbp; pushq %rbx; pushq %r12; pushq %r13; pushq %r14; pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15; popq %r14; popq %r13; popq %r12; popq %rbx; popq %rbp
    ret
.size cumoe_sim_switch, .-cumoe_sim_switch
)");

void change(void **from, void *to)
{
    cumoe_sim_switch(from, to);
}
#else
void change(void **from, void *to)
{
    ucontext_t here;
    *from = &here; // lives on the stack that waits
    swapcontext(&here, static_cast<ucontext_t *>(to));
}
#endif

/* AddressSanitizer must hear of every change of stack. FAKE = NULL: the stack left is not come back to. */
void leave_stack([[maybe_unused]] void **fake, [[maybe_unused]] const void *stack, [[maybe_unused]] size_t bytes)
{
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(fake, stack, bytes);
#endif
}

void enter_stack([[maybe_unused]] void *fake, [[maybe_unused]] const void **stack, [[maybe_unused]] size_t *bytes)
{
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(fake, stack, bytes);
#endif
}

void begin()
{
    enter_stack(nullptr, &caller_stack, &caller_stack_bytes);
    first();
}

} // namespace

void fiber_prepare(Fiber *fiber, void (*entry)())
{
    first = entry;
#if defined(__SANITIZE_ADDRESS__)
    __asan_unpoison_memory_region(fiber->stack, kStackBytes); // a launch that ended in a report left it as it was
#endif
#if defined(__x86_64__)
    void **top = reinterpret_cast<void **>(fiber->stack + kStackBytes - 64);
    *--top = nullptr; // as if begin() had been called: its frame is aligned, and a walk of the stack ends here
    *--top = reinterpret_cast<void *>(begin);
    for (int saved = 0; saved < 6; saved++) *--top = nullptr;
    fiber->context = top;
#else
    ucontext_t *context = reinterpret_cast<ucontext_t *>(fiber->stack); // the far end of the stack
    getcontext(context);
    context->uc_stack.ss_sp = fiber->stack + sizeof *context;
    context->uc_stack.ss_size = kStackBytes - sizeof *context;
    context->uc_link = nullptr;
    makecontext(context, begin, 0);
    fiber->context = context;
#endif
}

void fiber_resume(Fiber *fiber)
{
    void *fake = nullptr;
    leave_stack(&fake, fiber->stack, kStackBytes);
    change(&scheduler, fiber->context);
    enter_stack(fake, nullptr, nullptr);
}

void fiber_pause(Fiber *fiber)
{
    leave_stack(&fiber->fake, caller_stack, caller_stack_bytes);
    change(&fiber->context, scheduler);
    enter_stack(fiber->fake, &caller_stack, &caller_stack_bytes);
}

void fiber_leave(Fiber *fiber)
{
    leave_stack(nullptr, caller_stack, caller_stack_bytes);
    change(&fiber->context, scheduler);
    __builtin_unreachable();
}

} // namespace sim
