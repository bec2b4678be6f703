/* Shared memory: for every byte who wrote it last and who has read it since, and the copies on their way. */
#include "tests/sim/core.h"

#include <string.h>

namespace sim
{

namespace
{

constexpr size_t kAlignment = 1024; // an array keeps its offset's remainder, so that swizzles and alignments hold
constexpr size_t kGap = 64;         // at least; bytes that belong to no array
constexpr size_t kMaxArrays = 64, kMaxShared = 256 * 1024;
constexpr size_t kBytes = kMaxShared + kMaxArrays * (kGap + kAlignment);
constexpr uint16_t kNobody = 0xffff;

enum class State : uint8_t { GAP, UNWRITTEN, WRITTEN, IN_FLIGHT };

struct Byte {
    const void *write_pc, *read_pc;
    uint32_t write_time, read_time[2];
    uint16_t writer, reader[2]; // since the write: one that no barrier has dealt with, and the last of the others
    State state;
    bool atomic; // the write was
};

struct Array {
    size_t offset, bytes; // as the kernel counts
    size_t begin;         // in memory[]
    const void *pc;
};

alignas(kAlignment) char memory[kBytes];
Byte shadow[kBytes];
Array arrays[kMaxArrays];
size_t num_arrays;

const Array *nearest_array(size_t at)
{
    const Array *nearest = nullptr;
    for (size_t i = 0; i < num_arrays; i++)
        if (arrays[i].begin <= at) nearest = &arrays[i];
    return nearest;
}

const char *verb(Access access)
{
    return access == Access::READ ? "reads" : access == Access::WRITE ? "writes" : "updates";
}

void report_gap(size_t at, Access access, const void *pc)
{
    if (const Array *array = nearest_array(at))
        report(pc, "%s shared memory %zu bytes behind the array of %zu bytes taken at %s", verb(access),
               at - array->begin - array->bytes, array->bytes, place(array->pc));
    report(pc, "%s shared memory before the first array", verb(access));
}

void check_order(const Byte &byte, unsigned me, Access access, const void *pc)
{
    if (byte.writer != kNobody && !(byte.atomic && access == Access::ATOMIC) &&
        !is_before(byte.writer, byte.write_time, me))
        report(pc, "%s what thread %u wrote at %s, with no barrier in between", verb(access), byte.writer,
               place(byte.write_pc));
    if (access == Access::READ) return;
    for (int i = 0; i < 2; i++)
        if (byte.reader[i] != kNobody && !is_before(byte.reader[i], byte.read_time[i], me))
            report(pc, "%s what thread %u read at %s, with no barrier in between", verb(access), byte.reader[i],
                   place(byte.read_pc));
}

void set_written(Byte *byte, unsigned writer, bool atomic, const void *pc)
{
    byte->writer = static_cast<uint16_t>(writer);
    byte->write_time = now(writer);
    byte->write_pc = pc;
    byte->reader[0] = byte->reader[1] = kNobody;
    byte->atomic = atomic;
}

void touch(size_t at, unsigned me, Access access, const void *pc)
{
    Byte &byte = shadow[at];
    if (byte.state == State::GAP) report_gap(at, access, pc);
    if (byte.state == State::IN_FLIGHT)
        report(pc, "%s the target of a cp.async that is on its way since thread %u issued it at %s", verb(access),
               byte.writer, place(byte.write_pc));
    if (byte.state == State::UNWRITTEN && access != Access::WRITE)
        report(pc, "%s shared memory that nobody has written, byte %zu of the array taken at %s", verb(access),
               at - nearest_array(at)->begin, place(nearest_array(at)->pc));
    check_order(byte, me, access, pc);
    if (access == Access::READ) {
        const int i = byte.reader[0] == kNobody || is_before(byte.reader[0], byte.read_time[0], me) ? 0 : 1;
        byte.reader[i] = static_cast<uint16_t>(me);
        byte.read_time[i] = now(me);
        byte.read_pc = pc;
        return;
    }
    byte.state = State::WRITTEN;
    set_written(&byte, me, access == Access::ATOMIC, pc);
}

size_t index_of(const void *address)
{
    return static_cast<size_t>(static_cast<const char *>(address) - memory);
}

void complete(const Copy &job)
{
    memcpy(job.to, job.from, static_cast<size_t>(job.source_bytes));
    memset(job.to + job.source_bytes, 0, static_cast<size_t>(job.bytes - job.source_bytes));
    for (int i = 0; i < job.bytes; i++) {
        Byte &byte = shadow[index_of(job.to) + static_cast<size_t>(i)];
        byte.state = State::WRITTEN;
        set_written(&byte, block.thread->rank, false, job.pc);
    }
}

} // namespace

void shared_reset()
{
    for (size_t i = 0; i < num_arrays; i++)
        for (size_t at = 0; at < arrays[i].bytes; at++) shadow[arrays[i].begin + at].state = State::GAP;
    num_arrays = 0;
}

bool is_shared(const void *address)
{
    return address >= memory && address < memory + kBytes;
}

void shared_access(const void *address, size_t bytes, Access access, const void *pc)
{
    for (size_t i = 0; i < bytes; i++) touch(index_of(address) + i, block.thread->rank, access, pc);
}

void *carve(size_t offset, size_t bytes)
{
    if (!in_kernel()) return reinterpret_cast<void *>(offset); // the host counts
    const void *pc = SIM_PC;
    Quiet quiet;
    size_t end = 0;
    for (size_t i = 0; i < num_arrays; i++) {
        const Array &array = arrays[i];
        end = array.begin + array.bytes;
        if (array.offset == offset && array.bytes == bytes) return memory + array.begin;
        if (offset < array.offset + array.bytes && array.offset < offset + bytes)
            report(pc, "takes %zu bytes of shared memory at %zu, but another thread took %zu at %zu", bytes, offset,
                   array.bytes, array.offset);
    }
    if (offset + bytes > block.kernel->shared_bytes)
        report(pc, "takes %zu bytes of shared memory at %zu, but the launch gave %zu", bytes, offset,
               block.kernel->shared_bytes);
    if (num_arrays == kMaxArrays) report(pc, "takes more than %zu shared arrays", kMaxArrays);
    const size_t begin = (end + kGap + kAlignment - 1) / kAlignment * kAlignment + offset % kAlignment;
    arrays[num_arrays++] = {offset, bytes, begin, pc};
    memset(memory + begin, 0xff, bytes);
    for (size_t i = 0; i < bytes; i++)
        shadow[begin + i] = {nullptr, nullptr, 0, {0, 0}, kNobody, {kNobody, kNobody}, State::UNWRITTEN, false};
    return memory + begin;
}

void read_row(const void *address)
{
    const void *pc = SIM_PC;
    Quiet quiet;
    if (!is_shared(address)) report(pc, "ldmatrix of an address that is not in shared memory");
    if (reinterpret_cast<uintptr_t>(address) % 16) report(pc, "ldmatrix of an address that is no multiple of 16");
    shared_access(address, 16, Access::READ, pc);
}

void copy(void *shared, const void *global, int bytes, int source_bytes)
{
    const void *pc = SIM_PC;
    Quiet quiet;
    if (reinterpret_cast<uintptr_t>(shared) % static_cast<size_t>(bytes))
        report(pc, "cp.async of %d bytes to an address that is no multiple of it", bytes);
    if (source_bytes > 0 && reinterpret_cast<uintptr_t>(global) % static_cast<size_t>(bytes))
        report(pc, "cp.async of %d bytes from an address that is no multiple of it", bytes);
    if (source_bytes < 0 || source_bytes > bytes)
        report(pc, "cp.async of %d bytes, of them %d to read", bytes, source_bytes);
    if (!is_shared(shared)) report(pc, "cp.async to an address that is not in shared memory");
    if (source_bytes > 0) global_access(global, static_cast<size_t>(source_bytes), Access::READ, pc);
    shared_access(shared, static_cast<size_t>(bytes), Access::WRITE, pc);
    memset(shared, 0xff, static_cast<size_t>(bytes));
    for (int i = 0; i < bytes; i++) shadow[index_of(shared) + static_cast<size_t>(i)].state = State::IN_FLIGHT;
    block.thread->open.push_back(
        {static_cast<char *>(shared), static_cast<const char *>(global), bytes, source_bytes, pc});
}

void copy_commit()
{
    Quiet quiet;
    block.thread->groups.push_back(std::move(block.thread->open));
    block.thread->open.clear();
}

void copy_wait(int pending)
{
    Quiet quiet;
    auto &groups = block.thread->groups;
    while (groups.size() > static_cast<size_t>(pending)) {
        for (const Copy &job : groups.front()) complete(job);
        groups.erase(groups.begin());
    }
}

void copy_leave(Thread *thread)
{
    thread->groups.push_back(std::move(thread->open));
    for (const auto &group : thread->groups)
        for (const Copy &job : group) report(job.pc, "leaves the kernel with this cp.async on its way");
    thread->groups.clear();
    thread->open.clear();
}

} // namespace sim
