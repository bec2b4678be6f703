/* Every kind of mistake in a kernel of its own, and the sentence that the simulator must find for it. In a sentence
 * # is any number and @name the place of the line that is marked so. */
#include "cuda/launch.cuh"
#include "cuda/ptx.cuh"
#include "cuda/shared.cuh"
#include "tests/sim/buffer.h"
#include "tests/sim/check.h"
#include "tests/sim/simulator.h"

#include <ctype.h>
#include <fstream>
#include <sstream>
#include <stdlib.h>
#include <string.h>
#include <string>

using namespace cumoe;

namespace
{

constexpr int kThreads = 64, kWords = 64;

struct Words {
    uint32_t *word, *behind; // [64], [64]
    __host__ __device__ explicit Words(SharedArena &arena)
        : word(arena.take<uint32_t>(kWords)), // @words
          behind(arena.take<uint32_t>(kWords))
    {
    }
};

__device__ __forceinline__ uint32_t *shared_words()
{
    SharedArena arena;
    return Words(arena).word;
}

/* --- Barriers */

__global__ void missing_barrier(const uint32_t *in, uint32_t *out)
{
    uint32_t *word = shared_words();
    word[threadIdx.x] = 0;
    sync_threads();
    if (threadIdx.x == 5) word[5] = in[5]; // @late_write
    out[threadIdx.x] = word[5];            // @early_read
}

__global__ void missing_warp_barrier(const uint32_t *in, uint32_t *out)
{
    uint32_t *word = shared_words();
    word[threadIdx.x] = in[threadIdx.x];      // @warp_write
    out[threadIdx.x] = word[threadIdx.x ^ 1]; // @warp_read
}

__global__ void shuffle_is_no_barrier(const uint32_t *in, uint32_t *out)
{
    uint32_t *word = shared_words();
    word[threadIdx.x] = in[threadIdx.x]; // @before_shuffle
    const uint32_t lane = shuffle_xor(kFullMask, threadIdx.x, 1);
    out[threadIdx.x] = word[lane]; // @after_shuffle
}

__global__ void reused_too_soon(const uint32_t *in, uint32_t *out)
{
    uint32_t *word = shared_words();
    for (int round = 0; round < 2; round++) {
        if (threadIdx.x == 0) word[0] = in[round]; // @next_write
        sync_threads();
        out[threadIdx.x] = word[0]; // @last_read
    }
}

__global__ void divergent_barrier(const uint32_t *, uint32_t *)
{
    if (threadIdx.x < 40) sync_threads(); // @divergent
}

__global__ void two_barriers_for_one(const uint32_t *, uint32_t *)
{
    if (threadIdx.x % 2)
        sync_threads(); // @odd_lanes
    else
        sync_threads(); // @even_lanes
}

__global__ void barrier_for_more(const uint32_t *, uint32_t *)
{
    barrier_sync<1>(96); // @for_more
}

__global__ void barrier_for_less(const uint32_t *, uint32_t *)
{
    barrier_sync<2>(threadIdx.x < 32 ? 64 : 32); // @for_less
}

__global__ void barrier_for_half_a_warp(const uint32_t *, uint32_t *)
{
    if (threadIdx.x < 16) barrier_sync<1>(16); // @half_a_warp
}

__global__ void barrier_missed(const uint32_t *, uint32_t *)
{
    if (threadIdx.x == 7)
        sync_warp(1u << 7 | 1u << 8); // @waits_for_lane
    else
        sync_threads(); // @waits_for_all
}

/* --- Masks */

__global__ void mask_without_caller(const uint32_t *in, uint32_t *out)
{
    out[threadIdx.x] = shuffle_xor(0xffffu, in[threadIdx.x], 1); // @without_caller
}

__global__ void mask_with_lane_gone(const uint32_t *in, uint32_t *out)
{
    if (threadIdx.x == 9) return;
    out[threadIdx.x] = ballot(kFullMask, in[threadIdx.x] % 2); // @lane_gone
}

__global__ void masks_that_differ(const uint32_t *in, uint32_t *out)
{
    if (threadIdx.x < 32) out[threadIdx.x] = reduce_add(threadIdx.x ? kFullMask - 1 : kFullMask, in[0]); // @differ
}

__global__ void lane_not_in_mask(const uint32_t *in, uint32_t *out)
{
    if (threadIdx.x % 32 < 16) out[threadIdx.x] = shuffle(0xffffu, in[threadIdx.x], 20); // @not_in_mask
}

__global__ void instructions_that_differ(const uint32_t *in, uint32_t *out)
{
    if (threadIdx.x % 32 < 16)
        out[threadIdx.x] = reduce_min(kFullMask, in[threadIdx.x]); // @one
    else
        out[threadIdx.x] = reduce_max(kFullMask, in[threadIdx.x]); // @other
}

/* --- Asynchronous copies */

__global__ void missing_wait(const uint32_t *in, uint32_t *out)
{
    uint32_t *word = shared_words();
    cp_async<4>(word + threadIdx.x, in + threadIdx.x); // @copy
    cp_async_commit();
    out[threadIdx.x] = word[threadIdx.x]; // @unwaited
    cp_async_wait<0>();
}

__global__ void wait_for_too_few(const uint32_t *in, uint32_t *out)
{
    uint32_t *word = shared_words();
    cp_async<4>(word + threadIdx.x, in + threadIdx.x); // @only_group
    cp_async_commit();
    cp_async_wait<1>();
    out[threadIdx.x] = word[threadIdx.x]; // @too_few
    cp_async_wait<0>();
}

__global__ void wait_without_barrier(const uint32_t *in, uint32_t *out)
{
    uint32_t *word = shared_words();
    cp_async<4>(word + threadIdx.x, in + threadIdx.x); // @own_copy
    cp_async_commit();
    cp_async_wait<0>();
    out[threadIdx.x] = word[threadIdx.x]; // the thread's own: right
    const uint32_t lane = shuffle_xor(kFullMask, threadIdx.x, 1);
    out[threadIdx.x] = word[lane]; // @others_copy
}

__global__ void copy_over_read(const uint32_t *in, uint32_t *out)
{
    uint32_t *word = shared_words();
    word[threadIdx.x] = in[threadIdx.x];
    sync_threads();
    out[threadIdx.x] = word[63 - threadIdx.x];         // @still_reading
    cp_async<4>(word + threadIdx.x, in + threadIdx.x); // @copy_over
    cp_async_commit();
    cp_async_wait<0>();
}

__global__ void misaligned_copy(const uint32_t *in, uint32_t *)
{
    cp_async<16>(shared_words() + 1, in); // @misaligned_copy
}

__global__ void misaligned_source(const uint32_t *in, uint32_t *)
{
    cp_async<8>(shared_words(), in + 1); // @misaligned_source
}

__global__ void copy_never_waited_for(const uint32_t *in, uint32_t *)
{
    uint32_t *word = shared_words();
    cp_async<4>(word + threadIdx.x, in + threadIdx.x); // @never
}

/* --- Memory */

__global__ void unwritten(const uint32_t *, uint32_t *out)
{
    uint32_t *word = shared_words();
    if (threadIdx.x != 3) word[threadIdx.x] = 1;
    sync_threads();
    out[threadIdx.x] = word[threadIdx.x]; // @unwritten
}

__global__ void past_the_array(const uint32_t *in, uint32_t *)
{
    uint32_t *word = shared_words();
    word[threadIdx.x + 1] = in[threadIdx.x]; // @past
}

__global__ void past_the_allocation(const uint32_t *in, uint32_t *out)
{
    out[threadIdx.x] = in[threadIdx.x + 1]; // @past_global
}

__global__ void before_the_allocation(const uint32_t *in, uint32_t *out)
{
    out[static_cast<int>(threadIdx.x) - 1] = in[threadIdx.x]; // @before_global
}

__global__ void misaligned_load(const uint32_t *in, uint32_t *out)
{
    if (threadIdx.x == 0)
        reinterpret_cast<uint64_t *>(out)[0] = *reinterpret_cast<const uint64_t *>(in + 1); // @misaligned
}

__global__ void misaligned_vector(const uint32_t *in, uint32_t *out)
{
    if (threadIdx.x == 0) store_16(out + 2, load_16(in)); // @vector
}

__global__ void vector_past_the_end(const uint32_t *in, uint32_t *out)
{
    if (threadIdx.x == 0) store_8(out, load_8(in + kWords)); // @vector_past
}

__global__ void ldmatrix_off_row(const uint32_t *, uint32_t *out)
{
    uint32_t tile[4], *word = shared_words();
    word[threadIdx.x] = 0;
    sync_threads();
    ldmatrix_x4(tile, word + threadIdx.x % 32); // @off_row
    out[threadIdx.x] = tile[0];
}

__global__ void more_than_the_launch_gave(const uint32_t *, uint32_t *)
{
    SharedArena arena;
    [[maybe_unused]] const Words shared(arena);
    arena.take<char>(1); // @too_much
}

__global__ void arrays_that_differ(const uint32_t *, uint32_t *)
{
    SharedArena arena;
    arena.take<char>(threadIdx.x == 20 ? 16 : 32); // @arrays_differ
}

/* --- Global memory */

__global__ void global_without_barrier(const uint32_t *in, uint32_t *out)
{
    if (threadIdx.x == 5) out[5] = in[5]; // @global_write
    sync_warp();
    if (threadIdx.x >= 32) out[threadIdx.x] = out[5]; // @global_read
}

struct Fault {
    void (*kernel)(const uint32_t *in, uint32_t *out);
    const char *sentence;
};

#define FAULT(kernel, sentence)                                                                                    \
    {                                                                                                              \
        kernel, #kernel ", block 0, thread # at " sentence                                                         \
    }

const Fault kFaults[] = {
    FAULT(missing_barrier, "@late_write: writes what thread # read at @early_read, with no barrier in between"),
    FAULT(missing_warp_barrier,
          "@warp_read: reads shared memory that nobody has written, byte # of the array taken at @words"),
    FAULT(shuffle_is_no_barrier,
          "@after_shuffle: reads what thread # wrote at @before_shuffle, with no barrier in between"),
    FAULT(reused_too_soon, "@next_write: writes what thread # read at @last_read, with no barrier in between"),
    FAULT(divergent_barrier, "@divergent: sync_threads, but thread # has left the kernel"),
    FAULT(two_barriers_for_one, "@even_lanes: sync_threads, but lane # of the warp is in the one at @odd_lanes"),
    FAULT(barrier_for_more, "@for_more: waits in barrier_sync for ever, as all the others do"),
    FAULT(barrier_for_less, "@for_less: barrier_sync: barrier 2 of # threads, but others gave it #"),
    FAULT(barrier_for_half_a_warp, "@half_a_warp: barrier_sync: 16 threads are not whole warps"),
    FAULT(barrier_missed,
          "@waits_for_all: waits in sync_threads for ever; thread 7 waits in sync_warp at @waits_for_lane"),
    FAULT(mask_without_caller, "@without_caller: shuffle_xor: mask 0000ffff does not name the calling lane #"),
    FAULT(mask_with_lane_gone, "@lane_gone: ballot: mask ffffffff names lane 9, which has left the kernel"),
    FAULT(masks_that_differ,
          "@differ: reduce_add with mask #, but lane # waits in reduce_add with mask # at @differ"),
    FAULT(lane_not_in_mask, "@not_in_mask: shuffle: lane # asks lane 20, which mask 0000ffff does not name"),
    FAULT(instructions_that_differ,
          "@other: reduce_max with mask ffffffff, but lane # waits in reduce_min with mask "
          "ffffffff at @one"),
    FAULT(missing_wait,
          "@unwaited: reads the target of a cp.async that is on its way since thread # issued it at @copy"),
    FAULT(wait_for_too_few,
          "@too_few: reads the target of a cp.async that is on its way since thread # issued it at @only_group"),
    FAULT(wait_without_barrier, "@others_copy: reads what thread # wrote at @own_copy, with no barrier in between"),
    FAULT(copy_over_read, "@still_reading: reads what thread # wrote at @copy_over, with no barrier in between"),
    FAULT(misaligned_copy, "@misaligned_copy: cp.async of 16 bytes to an address that is no multiple of it"),
    FAULT(misaligned_source, "@misaligned_source: cp.async of 8 bytes from an address that is no multiple of it"),
    FAULT(copy_never_waited_for, "@never: leaves the kernel with this cp.async on its way"),
    FAULT(unwritten,
          "@unwritten: reads shared memory that nobody has written, byte 12 of the array taken at @words"),
    FAULT(past_the_array, "@past: writes shared memory 0 bytes behind the array of 256 bytes taken at @words"),
    FAULT(past_the_allocation, "@past_global: reads 4 bytes at byte 256 of an allocation of 256"),
    FAULT(before_the_allocation, "@before_global: writes 4 bytes at byte # of an allocation of #"),
    FAULT(misaligned_load, "@misaligned: reads 8 bytes at an address that is no multiple of it"),
    FAULT(misaligned_vector, "@vector: writes 16 bytes at an address that is no multiple of it"),
    FAULT(vector_past_the_end, "@vector_past: reads 8 bytes at byte 256 of an allocation of 256"),
    FAULT(ldmatrix_off_row, "@off_row: ldmatrix of an address that is no multiple of 16"),
    FAULT(more_than_the_launch_gave, "@too_much: takes 1 bytes of shared memory at 512, but the launch gave 512"),
    FAULT(global_without_barrier,
          "@global_read: reads global memory that thread 5 wrote at @global_write, with no barrier in between"),
    FAULT(arrays_that_differ,
          "@arrays_differ: takes # bytes of shared memory at 0, but another thread took # at 0"),
};

/* @name becomes the file and line that is marked so. */
std::string with_places(const char *sentence)
{
    std::string out;
    for (const char *at = sentence; *at;) {
        if (*at != '@') {
            out += *at++;
            continue;
        }
        const size_t length = 1 + strspn(at + 1, "abcdefghijklmnopqrstuvwxyz_");
        const std::string mark = "// " + std::string(at, length);
        std::ifstream source(__FILE__);
        std::string line;
        for (int number = 1; std::getline(source, line); number++)
            if (line.size() >= mark.size() && line.compare(line.size() - mark.size(), mark.size(), mark) == 0)
                out += "test_faults.cu:" + std::to_string(number);
        at += length;
    }
    return out;
}

/* # stands for digits of a number, hexadecimal ones as well. */
bool matches(const char *pattern, const char *text)
{
    for (; *pattern; pattern++) {
        if (*pattern == '#') {
            if (!isxdigit(*text)) return false;
            while (isxdigit(*text)) text++;
        } else if (*pattern != *text++)
            return false;
    }
    return *text == 0;
}

void run(const Fault &fault)
{
    sim_set_seed(1);
    Buffer<uint32_t> guard(kWords), in(std::vector<uint32_t>(kWords, 1)), out(kWords);
    const Launch once = {dim3(1), dim3(kThreads), nullptr, shared_bytes<Words>()};
    EXPECT(launch(once, fault.kernel, in.data(), out.data()) == cudaSuccess, "%s", fault.sentence);
    const cudaError_t error = cudaDeviceSynchronize();
    const std::string report = sim_take_report(), expected = with_places(fault.sentence);
    EXPECT(matches(expected.c_str(), report.c_str()), "\n  found    %s\n  expected %s", report.c_str(),
           expected.c_str());
    EXPECT(error == cudaErrorLaunchFailure, "%s", fault.sentence);
}

/* --- What takes more than one kernel with two buffers */

__global__ void copy_word(const uint32_t *in, uint32_t *out)
{
    *out = *in; // @copy_word
}

std::string report_of(const uint32_t *in, uint32_t *out)
{
    EXPECT(launch({dim3(1), dim3(1), nullptr}, copy_word, in, out) == cudaSuccess, "launch");
    (void)cudaDeviceSynchronize();
    return sim_take_report();
}

void expect_report(const std::string &report, const char *sentence)
{
    const std::string expected = with_places(sentence);
    EXPECT(matches(expected.c_str(), report.c_str()), "\n  found    %s\n  expected %s", report.c_str(),
           expected.c_str());
}

/* What blocks of a launch do to each other. */
__global__ void all_write(const uint32_t *in, uint32_t *out)
{
    *out = *in; // @all_write
}

__global__ void one_writes(const uint32_t *in, uint32_t *out)
{
    if (blockIdx.x == 0) out[0] = in[0];      // @one_writes
    if (blockIdx.x == 1) out[1] = out[0] + 1; // @one_reads
}

/* The last block to come reads what the others wrote: not a mistake. ticket [0] a counter, [1] the sum, [2..]
 * parts. */
__global__ void last_sums_up(const uint32_t *in, uint32_t *ticket)
{
    ticket[2 + blockIdx.x] = in[blockIdx.x];
    fence_device();
    if (atomic_add(&ticket[0], 1u) + 1 < gridDim.x) return;
    uint32_t sum = 0;
    for (unsigned i = 0; i < gridDim.x; i++) sum += ticket[2 + i];
    ticket[1] = sum;
}

void run_block_faults()
{
    constexpr unsigned kBlocks = 4;
    Buffer<uint32_t> in(std::vector<uint32_t>(kBlocks, 3)), out(std::vector<uint32_t>(2 + kBlocks));
    const auto report_of_blocks = [&](void (*kernel)(const uint32_t *, uint32_t *)) {
        EXPECT(launch({dim3(kBlocks), dim3(1), nullptr}, kernel, in.data(), out.data()) == cudaSuccess, "launch");
        (void)cudaDeviceSynchronize();
        return std::string(sim_take_report());
    };
    for (uint64_t seed = 1; seed <= 5; seed++) {
        sim_set_seed(seed);
        Buffer<uint32_t> zeros(std::vector<uint32_t>(2 + kBlocks));
        EXPECT(launch({dim3(kBlocks), dim3(1), nullptr}, last_sums_up, in.data(), zeros.data()) == cudaSuccess,
               "launch");
        (void)cudaDeviceSynchronize();
        EXPECT(!*sim_take_report() && zeros.read()[1] == 3 * kBlocks, "seed %d", static_cast<int>(seed));
    }
    expect_report(report_of_blocks(all_write),
                  "all_write, block #, thread 0 at @all_write: writes global memory that "
                  "block # wrote in the same launch at @all_write");
    const std::string report = report_of_blocks(one_writes);
    EXPECT(report.find("global memory that block") != std::string::npos, "%s", report.c_str());
}

void run_memory_faults()
{
    Buffer<uint32_t> word(std::vector<uint32_t>{7});
    uint32_t on_host = 7, *freed = nullptr;
    expect_report(report_of(&on_host, word.data()),
                  "copy_word, block 0, thread 0 at @copy_word: reads 4 bytes of the host's memory");

    EXPECT(cudaMalloc(&freed, 4) == cudaSuccess && cudaFree(freed) == cudaSuccess, "allocation");
    expect_report(report_of(freed, word.data()),
                  "copy_word, block 0, thread 0 at @copy_word: reads 4 bytes of an allocation that was freed");

    sim_set_devices(2, 8, 0, size_t{1} << 30);
    EXPECT(cudaSetDevice(1) == cudaSuccess, "second device");
    expect_report(report_of(word.data(), word.data()),
                  "copy_word, block 0, thread 0 at @copy_word: runs on device 1 and reads memory of device 0");
    EXPECT(cudaSetDevice(0) == cudaSuccess, "first device");

    volatile uint32_t seen = *word.data(); // @host_reads
    EXPECT(seen == 7, "%u", seen);
    expect_report(sim_take_report(), "host at @host_reads: reads device memory");
}

} // namespace

int main()
{
    sim_hold_reports(1);
    for (const Fault &fault : kFaults) run(fault);
    run_block_faults();
    run_memory_faults();
    return check::result();
}
