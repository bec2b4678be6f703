/* What one GPU gives: the denominators of the ratios that perf/ reports. README.md says what each row means. Here:
 * memory, L2, launches, and the command. */
#include "probe.cuh"
#include <getopt.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* Each thread has eight loads of 16 bytes under way. Past L1, which would answer otherwise. */
__global__ void read_kernel(const uint4 *p, int64_t n, int64_t loads, uint32_t *never)
{
    const int64_t stride = (int64_t)gridDim.x * blockDim.x;
    int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
    uint32_t sum = 0;
    for (int64_t done = 0; done < loads; done += 8) {
#pragma unroll
        for (int j = 0; j < 8; j++) {
            const uint4 v = __ldcg(p + i);
            sum += v.x ^ v.y ^ v.z ^ v.w;
            i += stride;
            if (i >= n) i -= n;
        }
    }
    if (sum == 0x9e3779b9u && never) *never = sum;
}

/* One warp copies one row at a time: row r of to is row index[r] of from. */
__global__ void gather_kernel(const uint4 *from, uint4 *to, const int *index, int rows, int row_length)
{
    const int lane = threadIdx.x % 32, warps = gridDim.x * blockDim.x / 32;
    for (int r = (blockIdx.x * blockDim.x + threadIdx.x) / 32; r < rows; r += warps) {
        const uint4 *source = from + (int64_t)index[r] * row_length;
        uint4 *target = to + (int64_t)r * row_length;
#pragma unroll 4
        for (int i = lane; i < row_length; i += 32) target[i] = source[i];
    }
}

static void probe_memory()
{
    size_t bytes = (size_t)2 << 30;
    while (bytes > free_memory() / 4) bytes /= 2;
    uint4 *from = (uint4 *)device_alloc(bytes), *to = (uint4 *)device_alloc(bytes);
    fill<float>(from, bytes / sizeof(float), 1);
    const int64_t n = bytes / sizeof(uint4);
    const int blocks = device.multiProcessorCount * 2;
    const int64_t loads = n / ((int64_t)blocks * 1024) / 8 * 8;

    row_rate("memory", "cudaMemcpy, read + written", 2.0 * bytes, "GB/s",
             measure(WARM, [&] { CHECK(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDefault, stream)); }));
    row_rate("memory", "cudaMemset", bytes, "GB/s",
             measure(WARM, [&] { CHECK(cudaMemsetAsync(to, 1, bytes, stream)); }));
    row_rate("memory", "read", 16.0 * loads * blocks * 1024, "GB/s",
             measure(WARM, [&] { read_kernel<<<blocks, 1024, 0, stream>>>(from, n, loads, NULL); }));

    std::vector<int> order;
    for (int row_bytes : {1024, 4096, 14336}) {
        const int rows = (int)(bytes / row_bytes);
        order.resize(rows);
        for (int i = 0; i < rows; i++) order[i] = i;
        int *index = (int *)device_alloc(rows * sizeof(int)); /* [rows] */
        for (const char *how : {"in order", "shuffled"}) {
            CHECK(cudaMemcpy(index, order.data(), rows * sizeof(int), cudaMemcpyHostToDevice));
            auto gather = [&] {
                gather_kernel<<<blocks * 4, 256, 0, stream>>>(from, to, index, rows, row_bytes / 16);
            };
            row_rate("memory", format("rows of %d bytes %s, read + written", row_bytes, how),
                     2.0 * rows * row_bytes, "GB/s", measure(WARM, gather));
            for (int i = rows - 1; i > 0; i--) std::swap(order[i], order[hash(i) % (i + 1)]);
        }
        CHECK(cudaFree(index));
    }
    CHECK(cudaFree(from));
    CHECK(cudaFree(to));
}

static void probe_l2()
{
    const int blocks = device.multiProcessorCount;
    for (size_t mib : {4, 8, 16, 24, 32, 48, 64, 128, 256}) {
        const int64_t n = (mib << 20) / sizeof(uint4), loads = ((int64_t)1 << 30) / 16 / (blocks * 1024) / 8 * 8;
        uint4 *p = (uint4 *)device_alloc(mib << 20);
        fill<float>(p, (mib << 20) / sizeof(float), 1);
        row_rate("l2", format("read %zu MiB again and again", mib), 16.0 * loads * blocks * 1024, "GB/s",
                 measure(WARM, [&] { read_kernel<<<blocks, 1024, 0, stream>>>(p, n, loads, NULL); }));
        CHECK(cudaFree(p));
    }
}

/* With dependents it lets the next kernel be set up early and waits for the one before, as ours would. */
__global__ void nothing_kernel(int dependents)
{
#if __CUDA_ARCH__ >= 900
    if (dependents) {
        cudaTriggerProgrammaticLaunchCompletion();
        cudaGridDependencySynchronize();
    }
#endif
}

static void launch_nothing(bool dependent)
{
    cudaLaunchAttribute attribute = {};
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(device.multiProcessorCount);
    config.blockDim = dim3(128);
    config.stream = stream;
    config.attrs = &attribute;
    config.numAttrs = dependent;
    CHECK(cudaLaunchKernelEx(&config, nothing_kernel, (int)dependent));
}

static cudaGraphExec_t graph_of(int kernels, bool dependent)
{
    cudaGraph_t graph;
    cudaGraphExec_t executable;
    CHECK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
    for (int i = 0; i < kernels; i++) launch_nothing(dependent && i > 0);
    CHECK(cudaStreamEndCapture(stream, &graph));
    CHECK(cudaGraphInstantiate(&executable, graph, 0));
    CHECK(cudaGraphDestroy(graph));
    return executable;
}

static void probe_launch()
{
    const int many = 500; /* fewer than the driver queues before a launch has to wait */
    row_time("launch", "launch, time of the host", collect([&] {
                 CHECK(cudaStreamSynchronize(stream));
                 const double start = now();
                 for (int i = 0; i < many; i++) launch_nothing(false);
                 return (now() - start) / many;
             }));
    for (bool dependent : {false, true}) {
        if (dependent && device.major < 9) break;
        const char *how = dependent ? ", dependent launch" : "";
        auto launch_many = [&] {
            for (int i = 0; i < many; i++) launch_nothing(dependent);
        };
        row_time("launch", format("launch after launch, time of the device%s", how),
                 measure(WARM, launch_many, many));
        cudaGraphExec_t graph = graph_of(100, dependent);
        auto replay = [&] { CHECK(cudaGraphLaunch(graph, stream)); };
        row_time("launch", format("graph of 100 kernels, each%s", how), measure(WARM, replay, 100));
        CHECK(cudaGraphExecDestroy(graph));
    }
    row_time("launch", "launch and wait for it", collect([&] {
                 const double start = now();
                 launch_nothing(false);
                 CHECK(cudaStreamSynchronize(stream));
                 return now() - start;
             }));
    cudaGraphExec_t graph = graph_of(1, false);
    row_time("launch", "graph of 1 kernel, launch and wait for it", collect([&] {
                 const double start = now();
                 CHECK(cudaGraphLaunch(graph, stream));
                 CHECK(cudaStreamSynchronize(stream));
                 return now() - start;
             }));
    CHECK(cudaGraphExecDestroy(graph));
}

typedef struct group {
    const char *name, *what;
    void (*run)();
} group_t;

static const group_t groups[] = {
    {"memory", "copying, reading, and gathering rows in device memory", probe_memory},
    {"l2", "reading what fits the L2 cache, and what does not", probe_l2},
    {"launch", "what a kernel costs that does nothing", probe_launch},
    {"dense", "cuBLAS: dense products of every type", probe_dense},
    {"grouped", "cuBLAS: grouped products of the experts", probe_grouped},
    {"hopper", "bulk tensor copies and their fence (compute capability 9.0 and up)", probe_hopper},
};

static void help(FILE *f)
{
    fprintf(f,
            "usage: probe [--only GROUP,...] [--seconds S] [--json FILE] [--list] [--help]\n"
            "Measures what the first GPU gives. The rest of perf/ is put in relation to it.\n\n"
            "  --only GROUP,...  these groups of rows alone\n"
            "  --seconds S       time of each row (%g)\n"
            "  --json FILE       write the rows there too\n"
            "  --list            the groups\n\n"
            "Exit status: 0, 1 a call failed or a result was wrong, 2 bad usage, 77 no GPU.\n",
            seconds_per_row);
}

static void list(FILE *f)
{
    for (const group_t &g : groups) fprintf(f, "%-10s%s\n", g.name, g.what);
}

/* The groups named in only, which NULL leaves all, as one bit each. */
static unsigned chosen_groups(char *only)
{
    unsigned chosen = 0;
    for (char *name = only ? strtok(only, ",") : NULL; name; name = strtok(NULL, ",")) {
        unsigned bit = 0;
        for (size_t i = 0; i < std::size(groups); i++)
            if (strcmp(name, groups[i].name) == 0) bit = 1u << i;
        if (!bit) {
            fprintf(stderr, "probe: there is no group '%s'. There are:\n", name);
            list(stderr);
            exit(2);
        }
        chosen |= bit;
    }
    return only ? chosen : ~0u;
}

static unsigned parse(int argc, char **argv)
{
    static const struct option options[] = {
        {"only", required_argument, NULL, 'o'}, {"seconds", required_argument, NULL, 's'},
        {"json", required_argument, NULL, 'j'}, {"list", no_argument, NULL, 'l'},
        {"help", no_argument, NULL, 'h'},       {}};
    char *only = NULL, *end = NULL;
    for (int c; (c = getopt_long(argc, argv, "", options, NULL)) != -1;) {
        switch (c) {
        case 'o':
            only = optarg;
            break;
        case 'j':
            json_path = optarg;
            break;
        case 's':
            seconds_per_row = strtod(optarg, &end);
            if (*end || !(seconds_per_row > 0 && seconds_per_row <= 60)) {
                fprintf(stderr, "probe: --seconds %s: must be a number above 0, at most 60\n", optarg);
                exit(2);
            }
            break;
        case 'l':
            list(stdout);
            exit(0);
        case 'h':
            help(stdout);
            exit(0);
        default:
            help(stderr);
            exit(2);
        }
    }
    if (optind < argc) {
        fprintf(stderr, "probe: '%s' is no option\n", argv[optind]);
        exit(2);
    }
    return chosen_groups(only);
}

int main(int argc, char **argv)
{
    const unsigned chosen = parse(argc, argv);
    int count = 0;
    const cudaError_t error = cudaGetDeviceCount(&count);
    if (error != cudaSuccess || count == 0) {
        fprintf(stderr, "probe: no GPU: %s\n", error ? cudaGetErrorString(error) : "the driver lists none");
        return 77;
    }
    CHECK(cudaGetDeviceProperties(&device, 0));
    if (device.major < 8)
        fail("%s is of compute capability %d.%d; 8.0 is needed", device.name, device.major, device.minor);
    CHECK(cudaStreamCreate(&stream)); /* in order with the copies of the default stream */
    CHECK(cudaEventCreate(&start_event));
    write_json(NULL); /* now is the time to learn that the file cannot be written */

    printf("%s, %d multiprocessors, %.1f GiB, L2 %.1f MiB\n\n", device.name, device.multiProcessorCount,
           device.totalGlobalMem / GIB, device.l2CacheSize / 1048576.0);
    printf("| group | row | median | smallest | largest | unit |\n|---|---|---:|---:|---:|---|\n");
    for (size_t i = 0; i < std::size(groups); i++) {
        if (!(chosen >> i & 1)) continue;
        groups[i].run();
        CHECK(cudaStreamSynchronize(stream));
        write_json(NULL);
    }
    return 0;
}
