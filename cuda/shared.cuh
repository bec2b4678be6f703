/* Shared memory, all of it: an arena that is carved from its beginning.
 *
 * A kernel lists its arrays in the constructor of a struct, and the host runs the same constructor to learn how
 * many bytes the launch must give:
 *
 *     struct Arrays {
 *         int *count; // [num_experts]
 *         __host__ __device__ Arrays(SharedArena &arena, int num_experts) : count(arena.take<int>(num_experts)) {}
 *     };
 *     launch.shared_bytes = shared_bytes<Arrays>(num_experts);       // host
 *     SharedArena arena; const Arrays shared(arena, num_experts);    // kernel, every thread
 *
 * Memory that serves two purposes in turn is one array, of bytes. */
#pragma once

#include "cuda/ptx.cuh"

namespace cumoe
{

class SharedArena
{
  public:
    /* An array [count] of T, at a multiple of ALIGNMENT: at most 1024, and at least 16 for copies of 16 bytes. */
    template <typename T>
    __host__ __device__ __forceinline__ T *take(size_t count, size_t alignment = 16)
    {
        const size_t begin = (used_ + alignment - 1) / alignment * alignment;
        used_ = begin + count * sizeof(T);
        return static_cast<T *>(shared_array(begin, count * sizeof(T)));
    }

    __host__ __device__ size_t used() const
    {
        return used_;
    }

  private:
    size_t used_ = 0;
};

template <typename Arrays, typename... Sizes>
size_t shared_bytes(Sizes... sizes)
{
    SharedArena arena;
    [[maybe_unused]] const Arrays arrays(arena, sizes...);
    return arena.used();
}

} // namespace cumoe
