#include "cuda/sort.cuh"

#include <cub/device/device_radix_sort.cuh>

namespace cumoe
{

namespace
{

/* Without a workspace CUB only says how much it needs. */
cudaError_t sort(const SortPairs &pairs, void *workspace, size_t *bytes, int *result, cudaStream_t stream)
{
    cub::DoubleBuffer<uint32_t> key(pairs.key[0], pairs.key[1]), value(pairs.value[0], pairs.value[1]);
    const cudaError_t error =
        cub::DeviceRadixSort::SortPairs(workspace, *bytes, key, value, pairs.count, 0, pairs.key_bits, stream);
    *result = key.selector;
    return error;
}

} // namespace

cudaError_t sort_pairs(const SortPairs &pairs, void *workspace, int *result, cudaStream_t stream)
{
    // Another version of CUB may want more than the bound, and would not check it in all cases.
    size_t wanted = 0, bytes = sort_workspace(pairs.count);
    const cudaError_t error = sort(pairs, nullptr, &wanted, result, stream);
    if (error != cudaSuccess) return error;
    return wanted <= bytes ? sort(pairs, workspace, &bytes, result, stream) : cudaErrorInvalidValue;
}

} // namespace cumoe
