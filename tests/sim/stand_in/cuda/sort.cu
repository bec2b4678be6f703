/* The simulator's twin of cuda/sort.cu: one thread, one bit at a time. CUB's own kernels cannot be compiled by g++.
 */
#include "cuda/sort.cuh"

#include "cuda/launch.cuh"

namespace cumoe
{

namespace
{

/* A step moves the pairs with a 0 in front of those with a 1, and keeps the order of each. */
__global__ void sort_kernel(SortPairs pairs)
{
    for (int bit = 0; bit < pairs.key_bits; bit++) {
        const int from = bit % 2, to = 1 - from;
        int32_t next = 0;
        for (uint32_t wanted = 0; wanted < 2; wanted++)
            for (int32_t i = 0; i < pairs.count; i++) {
                const uint32_t key = pairs.key[from][i];
                if ((key >> bit & 1) != wanted) continue;
                pairs.key[to][next] = key;
                pairs.value[to][next++] = pairs.value[from][i];
            }
    }
}

} // namespace

cudaError_t sort_pairs(const SortPairs &pairs, void *workspace, int *result, cudaStream_t stream)
{
    if (!workspace) return cudaErrorInvalidValue;
    *result = pairs.key_bits % 2;
    return launch({dim3(pairs.count > 0), dim3(1), stream}, sort_kernel, pairs);
}

} // namespace cumoe
