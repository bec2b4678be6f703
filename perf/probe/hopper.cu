/* What the copy engine of Hopper does with tiles that end inside a box, and what its fence costs. Our kernels
 * choose between 16-byte stores under a mask and such copies; these rows say what there is to win. */
#include "probe.cuh"
#include <cuda.h>

enum { TILE_ROWS = 64, TILE_COLUMNS = 64, TILE_BYTES = TILE_ROWS * TILE_COLUMNS * 2 };

/* A map of [rows, columns] bf16 whose boxes can be made to end at any row. Two dimensions more than the matrix has
 * and strides that sum to 2^64 make the address of element {c, 2^30 - length + r, 2^30, first + length} that of row
 * first + r, while r >= length is out of bounds of dimension 1: zero when loaded, dropped when stored. */
static CUtensorMap ragged_map(void *matrix, int columns)
{
    void *function = NULL;
    cudaDriverEntryPointQueryResult found;
    CHECK(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found));
    if (found != cudaDriverEntryPointSuccess) fail("the driver has no cuTensorMapEncodeTiled");
    const cuuint64_t sizes[] = {(cuuint64_t)columns, (cuuint64_t)1 << 30, 0x7fff0000, 0x7fff0000};
    const cuuint64_t row = (cuuint64_t)columns * 2, strides[] = {row, ((cuuint64_t)1 << 35) - row, row};
    const cuuint32_t box[] = {TILE_COLUMNS, TILE_ROWS, 1, 1}, ones[] = {1, 1, 1, 1};
    CUtensorMap map;
    const CUresult status = ((decltype(&cuTensorMapEncodeTiled))function)(
        &map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 4, matrix, sizes, strides, box, ones, CU_TENSOR_MAP_INTERLEAVE_NONE,
        CU_TENSOR_MAP_SWIZZLE_NONE, CU_TENSOR_MAP_L2_PROMOTION_NONE, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    if (status != CUDA_SUCCESS) fail("cuTensorMapEncodeTiled: error %d", (int)status);
    return map;
}

#if __CUDA_ARCH__ >= 900

__device__ uint32_t shared_address(const void *p)
{
    return (uint32_t)__cvta_generic_to_shared(p);
}

__device__ void fence_async_shared()
{
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

__device__ void store_tile(const CUtensorMap *map, const void *tile, int column, int first, int length)
{
    asm volatile("cp.async.bulk.tensor.4d.global.shared::cta.bulk_group [%0, {%1, %2, %3, %4}], [%5];" ::"l"(map),
                 "r"(column), "r"((1 << 30) - length), "r"(1 << 30), "r"(first + length), "r"(shared_address(tile))
                 : "memory");
    asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}

/* Waits for the tile, but not for ever. */
__device__ bool load_tile(const CUtensorMap *map, void *tile, uint64_t *barrier, int column, int first, int length)
{
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)),
                 "r"((int)TILE_BYTES)
                 : "memory");
    asm volatile("cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes "
                 "[%0], [%1, {%2, %3, %4, %5}], [%6];" ::"r"(shared_address(tile)),
                 "l"(map), "r"(column), "r"((1 << 30) - length), "r"(1 << 30), "r"(first + length),
                 "r"(shared_address(barrier))
                 : "memory");
    uint32_t done = 0;
    for (int i = 0; i < 100000 && !done; i++)
        asm volatile("{\n.reg .pred p;\nmbarrier.try_wait.parity.shared::cta.b64 p, [%1], 0;\n"
                     "selp.u32 %0, 1, 0, p;\n}"
                     : "=r"(done)
                     : "r"(shared_address(barrier))
                     : "memory");
    return done;
}

#endif

/* One block, one tile: rows first..first + length - 1 of from to the same rows of to. loaded: the whole tile. */
__global__ void ragged_kernel(const __grid_constant__ CUtensorMap from, const __grid_constant__ CUtensorMap to,
                              uint16_t *loaded, int *arrived, int first, int length)
{
#if __CUDA_ARCH__ >= 900
    __shared__ alignas(128) uint16_t tile[TILE_ROWS * TILE_COLUMNS];
    __shared__ uint64_t barrier;
    if (threadIdx.x == 0) {
        asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(shared_address(&barrier)) : "memory");
        fence_async_shared();
        *arrived = load_tile(&from, tile, &barrier, 0, first, length);
        store_tile(&to, tile, 0, first, length);
        asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
    }
    __syncthreads();
    for (int i = threadIdx.x; i < TILE_ROWS * TILE_COLUMNS; i += blockDim.x) loaded[i] = tile[i];
#endif
}

static void probe_ragged()
{
    enum { ROWS = 256, COUNT = ROWS * TILE_COLUMNS, FIRST = 37, LENGTH = 50 };
    uint16_t *from = (uint16_t *)device_alloc(2 * COUNT), *to = (uint16_t *)device_alloc(2 * COUNT);
    uint16_t *loaded = (uint16_t *)device_alloc(TILE_BYTES);
    int *arrived = (int *)device_alloc(sizeof(int)), done = 0;
    std::vector<uint16_t> source(COUNT), target(COUNT), tile(TILE_BYTES / 2);
    for (int i = 0; i < COUNT; i++) source[i] = (uint16_t)(hash(i) % 1000 + 1);
    CHECK(cudaMemcpy(from, source.data(), 2 * COUNT, cudaMemcpyHostToDevice));
    CHECK(cudaMemset(to, 0xff, 2 * COUNT));
    CHECK(cudaMemset(arrived, 0, sizeof(int)));
    ragged_kernel<<<1, 128, 0, stream>>>(ragged_map(from, TILE_COLUMNS), ragged_map(to, TILE_COLUMNS), loaded,
                                         arrived, FIRST, LENGTH);
    CHECK(cudaGetLastError());
    CHECK(cudaStreamSynchronize(stream));
    CHECK(cudaMemcpy(&done, arrived, sizeof done, cudaMemcpyDeviceToHost));
    CHECK(cudaMemcpy(tile.data(), loaded, TILE_BYTES, cudaMemcpyDeviceToHost));
    CHECK(cudaMemcpy(target.data(), to, 2 * COUNT, cudaMemcpyDeviceToHost));
    bool load = done, store = done;
    for (int i = 0; i < TILE_BYTES / 2; i++)
        load &= tile[i] == (i < LENGTH * TILE_COLUMNS ? source[FIRST * TILE_COLUMNS + i] : 0);
    for (int i = 0; i < COUNT; i++) {
        const int row = i / TILE_COLUMNS;
        store &= target[i] == (row >= FIRST && row < FIRST + LENGTH ? source[i] : 0xffff);
    }
    row_value("hopper", "bulk load that ends inside its box: right", load, "1 = yes");
    row_value("hopper", "bulk store that ends inside its box: right", store, "1 = yes");
    for (void *p : {(void *)from, (void *)to, (void *)loaded, (void *)arrived}) CHECK(cudaFree(p));
}

/* Tile after tile out of shared memory into a matrix [rows, columns], `length` rows of each. */
__global__ void store_kernel(const __grid_constant__ CUtensorMap map, uint4 *matrix, int rows, int columns,
                             int length, int bulk)
{
#if __CUDA_ARCH__ >= 900
    __shared__ alignas(128) uint4 tile[TILE_BYTES / 16];
    for (int i = threadIdx.x; i < TILE_BYTES / 16; i += blockDim.x) tile[i] = make_uint4(i, i, i, i);
    fence_async_shared();
    __syncthreads();
    const int across = columns / TILE_COLUMNS, tiles = rows / TILE_ROWS * across;
    for (int t = blockIdx.x; t < tiles; t += gridDim.x) {
        const int first = t / across * TILE_ROWS, column = t % across * TILE_COLUMNS;
        if (!bulk) {
            for (int i = threadIdx.x; i < TILE_BYTES / 16; i += blockDim.x)
                if (i / 8 < length) matrix[((int64_t)(first + i / 8) * columns + column) / 8 + i % 8] = tile[i];
        } else if (threadIdx.x == 0) {
            store_tile(&map, tile, column, first, length);
            asm volatile("cp.async.bulk.wait_group.read 3;" ::: "memory");
        }
    }
    if (bulk && threadIdx.x == 0) asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
#endif
}

static void probe_stores()
{
    const int rows = 131072, columns = 4096, blocks = device.multiProcessorCount * 4;
    uint4 *matrix = (uint4 *)device_alloc((size_t)rows * columns * 2);
    const CUtensorMap map = ragged_map(matrix, columns);
    for (int length : {(int)TILE_ROWS, 50}) {
        for (int bulk : {0, 1}) {
            auto store = [&] {
                store_kernel<<<blocks, 128, 0, stream>>>(map, matrix, rows, columns, length, bulk);
            };
            const char *how = bulk ? "bulk stores" : "16-byte stores under a mask";
            row_rate("hopper", format("%s, %d of %d rows", how, length, (int)TILE_ROWS),
                     2.0 * rows / TILE_ROWS * length * columns, "GB/s", measure(WARM, store));
        }
    }
    CHECK(cudaFree(matrix));
}

/* Cycles that one warp takes for a store to shared memory, with and without the fence behind it. */
__global__ void fence_kernel(int64_t *cycles, int times)
{
#if __CUDA_ARCH__ >= 900
    __shared__ volatile int slot[32];
    const int64_t start = clock64();
    for (int i = 0; i < times; i++) slot[threadIdx.x] = i;
    const int64_t middle = clock64();
    for (int i = 0; i < times; i++) {
        slot[threadIdx.x] = i;
        fence_async_shared();
    }
    if (threadIdx.x == 0) *cycles = (clock64() - middle) - (middle - start);
#endif
}

static void probe_fence()
{
    const int times = 10000;
    int64_t *cycles = (int64_t *)device_alloc(sizeof(int64_t)), result;
    for (int i = 0; i < 2; i++)
        fence_kernel<<<1, 32, 0, stream>>>(cycles, times); /* the second has it all loaded */
    CHECK(cudaGetLastError());
    CHECK(cudaStreamSynchronize(stream));
    CHECK(cudaMemcpy(&result, cycles, sizeof result, cudaMemcpyDeviceToHost));
    row_value("hopper", "fence between a store to shared memory and the copy engine", (double)result / times,
              "cycles");
    CHECK(cudaFree(cycles));
}

void probe_hopper()
{
    if (device.major < 9) {
        left_out("hopper: %s is of compute capability %d.%d", device.name, device.major, device.minor);
        return;
    }
    probe_fence();
    probe_ragged();
    probe_stores();
}
