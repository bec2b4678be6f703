/* A stable sort of pairs of 32-bit numbers, CUB's: sort.cu is the one place that knows it. */
#pragma once

#include <cuda_runtime.h>
#include <stddef.h>
#include <stdint.h>

namespace cumoe
{

/* Pairs [count]: key[0] and value[0] are the input, all four are overwritten. */
struct SortPairs {
    uint32_t *key[2], *value[2];
    int32_t count;
    int key_bits; // bits of a key from here on are 0
};

/* Bytes of scratch, a bound that needs no device to ask: CUB has a counter of 4 bytes for each of 256 digits and
 * tile, and tiles of more than 512 pairs; and some counters of the whole. */
inline size_t sort_workspace(int32_t count)
{
    return 64 * 1024 + 2 * static_cast<size_t>(count);
}

/* RESULT, 0 or 1, says where the sorted pairs will be. workspace has sort_workspace(count) bytes. */
cudaError_t sort_pairs(const SortPairs &pairs, void *workspace, int *result, cudaStream_t stream);

} // namespace cumoe
