/* Device memory, and the compiler's hooks, which show every load and store of a kernel.
 *
 * An address is used once: freed memory stays unmapped, so that a pointer that outlives it is noticed. */
#include "tests/sim/core.h"

#include <algorithm>
#include <string.h>
#include <sys/mman.h>

extern "C" const char __executable_start, _end; // of the linker: the program with its constants

namespace sim
{

namespace
{

constexpr size_t kRegion = size_t{1} << 42, kPage = 4096;
constexpr size_t kPoisoned = size_t{64}
                             << 20; // larger allocations read as zeros: they may be far larger than memory

struct Allocation {
    uintptr_t begin;
    size_t bytes;
    int device;
    bool alive;
};

char *region; // [kRegion]
size_t region_used;
std::vector<Allocation> allocations; // by address
size_t last;                         // hit

bool in_region(const void *address)
{
    return region && address >= region && address < region + kRegion;
}

/* The last allocation that begins at or before the address. */
const Allocation *nearest_allocation(const void *address)
{
    const uintptr_t at = reinterpret_cast<uintptr_t>(address);
    if (last < allocations.size() && at - allocations[last].begin < allocations[last].bytes)
        return &allocations[last];
    const auto behind = std::upper_bound(allocations.begin(), allocations.end(), at,
                                         [](uintptr_t a, const Allocation &b) { return a < b.begin; });
    if (behind == allocations.begin()) return nullptr;
    last = static_cast<size_t>(behind - allocations.begin()) - 1;
    return &allocations[last];
}

bool is_inside(const Allocation *allocation, const void *address, size_t bytes)
{
    if (!allocation || !allocation->alive) return false;
    const size_t offset = reinterpret_cast<uintptr_t>(address) - allocation->begin;
    return offset <= allocation->bytes && bytes <= allocation->bytes - offset;
}

bool is_within(const void *address, size_t bytes, const void *begin, size_t size)
{
    const size_t offset =
        static_cast<size_t>(static_cast<const char *>(address) - static_cast<const char *>(begin));
    return offset < size && bytes <= size - offset;
}

void report_outside(const Allocation *nearest, const void *address, size_t bytes, const char *does, const void *pc)
{
    const size_t offset = nearest ? reinterpret_cast<uintptr_t>(address) - nearest->begin : 0;
    if (!in_region(address))
        report(pc, "%s %zu bytes of the host's memory", does, bytes);
    else if (!nearest)
        report(pc, "%s %zu bytes before the first allocation", does, bytes);
    else if (!nearest->alive)
        report(pc, "%s %zu bytes of an allocation that was freed", does, bytes);
    else
        report(pc, "%s %zu bytes at byte %zu of an allocation of %zu", does, bytes, offset, nearest->bytes);
}

void check_alignment(const void *address, size_t bytes, Access access, const void *pc)
{
    if (reinterpret_cast<uintptr_t>(address) % bytes == 0) return;
    report(pc, "%s %zu bytes at an address that is no multiple of it",
           access == Access::READ    ? "reads"
           : access == Access::WRITE ? "writes"
                                     : "updates",
           bytes);
}

/* A load or store that the compiler has shown. */
void observe(const void *address, size_t bytes, Access access, const void *pc)
{
    if (!in_kernel()) { // the host's part of a file in cuda/
        if (in_region(address)) report(pc, "%s device memory", access == Access::READ ? "reads" : "writes");
        return;
    }
    Thread *thread = block.thread;
    if (thread->quiet) return;
    if (is_within(address, bytes, thread->fiber.stack, kStackBytes)) return;
    thread->quiet = true;
    if (bytes <= 16 && (bytes & (bytes - 1)) == 0) check_alignment(address, bytes, access, pc);
    if (is_shared(address))
        shared_access(address, bytes, access, pc);
    else
        global_access(address, bytes, access, pc);
    thread->quiet = false;
}

uint64_t apply(Atomic operation, uint64_t old, uint64_t value, uint64_t expected)
{
    switch (operation) {
    case Atomic::ADD:
        return old + value;
    case Atomic::MIN:
        return std::min(old, value);
    case Atomic::MAX:
        return std::max(old, value);
    default:
        return old == expected ? value : old;
    }
}

} // namespace

void *reserve(size_t bytes)
{
    return mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
}

void *device_allocate(int device, size_t bytes)
{
    size_t available, total;
    device_memory(device, &available, &total);
    if (bytes > available) return nullptr;
    if (!region) region = static_cast<char *>(reserve(kRegion));
    char *begin = region + region_used;
    region_used += (bytes + kPage - 1) / kPage * kPage + kPage;
    if (bytes <= kPoisoned) memset(begin, 0xff, bytes);
    allocations.push_back({reinterpret_cast<uintptr_t>(begin), bytes, device, true});
    return begin;
}

bool device_free(void *address)
{
    for (Allocation &allocation : allocations) {
        if (allocation.begin != reinterpret_cast<uintptr_t>(address) || !allocation.alive) continue;
        allocation.alive = false;
        mmap(address, (allocation.bytes + kPage - 1) / kPage * kPage, PROT_NONE,
             MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0);
        return true;
    }
    return false;
}

void device_memory(int device, size_t *available, size_t *total)
{
    *total = memory_of_device(device);
    size_t used = 0;
    for (const Allocation &allocation : allocations)
        if (allocation.alive && allocation.device == device) used += allocation.bytes;
    *available = *total - std::min(used, *total);
}

size_t num_allocations()
{
    return static_cast<size_t>(
        std::count_if(allocations.begin(), allocations.end(), [](const Allocation &a) { return a.alive; }));
}

bool is_device_memory(const void *address, size_t bytes, int *device)
{
    const Allocation *nearest = nearest_allocation(address);
    if (!is_inside(nearest, address, bytes)) return false;
    *device = nearest->device;
    return true;
}

void global_access(const void *address, size_t bytes, Access access, const void *pc)
{
    const char *does = access == Access::READ ? "reads" : access == Access::WRITE ? "writes" : "updates";
    if (in_region(address)) {
        const Allocation *nearest = nearest_allocation(address);
        if (!is_inside(nearest, address, bytes)) report_outside(nearest, address, bytes, does, pc);
        if (nearest->device != block.kernel->device)
            report(pc, "runs on device %d and %s memory of device %d", block.kernel->device, does, nearest->device);
        order_access(address, bytes, access, pc);
        return;
    }
    const Body *body = block.kernel->body.get();
    if (access == Access::READ && is_within(address, bytes, body, body->bytes)) return;
    if (is_within(address, bytes, &__executable_start, static_cast<size_t>(&_end - &__executable_start))) {
        if (access != Access::READ) report(pc, "%s a global variable of the program", does);
        return;
    }
    report_outside(nullptr, address, bytes, does, pc);
}

void load_vector(void *to, const void *global, size_t bytes)
{
    const void *pc = SIM_PC;
    Quiet quiet;
    check_alignment(global, bytes, Access::READ, pc);
    global_access(global, bytes, Access::READ, pc);
    memcpy(to, global, bytes);
}

void store_vector(void *global, const void *from, size_t bytes)
{
    const void *pc = SIM_PC;
    Quiet quiet;
    check_alignment(global, bytes, Access::WRITE, pc);
    global_access(global, bytes, Access::WRITE, pc);
    memcpy(global, from, bytes);
}

uint64_t atomic(Atomic operation, void *address, size_t bytes, uint64_t value, uint64_t expected)
{
    const void *pc = SIM_PC;
    Quiet quiet;
    check_alignment(address, bytes, Access::ATOMIC, pc);
    if (is_shared(address))
        shared_access(address, bytes, Access::ATOMIC, pc);
    else
        global_access(address, bytes, Access::ATOMIC, pc);
    uint64_t old = 0; // little-endian, as CUDA's hosts are
    memcpy(&old, address, bytes);
    const uint64_t changed = apply(operation, old, value, expected);
    memcpy(address, &changed, bytes);
    return old;
}

} // namespace sim

/* What g++ -fsanitize=thread calls; its own library is not linked. */
#define SIM_HOOK(name, size, access)                                                                               \
    void name(void *address)                                                                                       \
    {                                                                                                              \
        sim::observe(address, size, sim::Access::access, SIM_PC);                                                  \
    }
#define SIM_HOOKS(size)                                                                                            \
    SIM_HOOK(__tsan_read##size, size, READ)                                                                        \
    SIM_HOOK(__tsan_write##size, size, WRITE)                                                                      \
    SIM_HOOK(__tsan_unaligned_read##size, size, READ)                                                              \
    SIM_HOOK(__tsan_unaligned_write##size, size, WRITE)
extern "C" {
SIM_HOOK(__tsan_read1, 1, READ)
SIM_HOOK(__tsan_write1, 1, WRITE)
SIM_HOOKS(2)
SIM_HOOKS(4)
SIM_HOOKS(8)
SIM_HOOKS(16)
void __tsan_read_range(void *address, ptrdiff_t bytes)
{
    sim::observe(address, static_cast<size_t>(bytes), sim::Access::READ, SIM_PC);
}
void __tsan_write_range(void *address, ptrdiff_t bytes)
{
    sim::observe(address, static_cast<size_t>(bytes), sim::Access::WRITE, SIM_PC);
}
void __tsan_init() {}
void __tsan_vptr_update(void *, void *) {}
}
