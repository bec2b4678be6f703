/* What the files of the probe share: errors, measuring, rows, random numbers. */
#ifndef PROBE_CUH
#define PROBE_CUH

#include <algorithm>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>
#include <cuda_runtime.h>
#include <math.h>
#include <stdint.h>
#include <time.h>
#include <vector>

#define GIB 1073741824.0

extern cudaDeviceProp device;
extern cudaStream_t stream;
extern double seconds_per_row;
extern int cublas_version;    /* 0: not there */
extern const char *json_path; /* NULL: no file */

void probe_dense();
void probe_grouped();
void probe_hopper();

/* Ends the program with a sentence, after writing what has been measured. */
[[noreturn]] void fail(const char *message, ...) __attribute__((format(printf, 1, 2)));
#define CHECK(call)                                                                                                \
    do {                                                                                                           \
        const cudaError_t error_ = (call);                                                                         \
        if (error_ != cudaSuccess) fail("%s:%d: %s: %s", __FILE__, __LINE__, #call, cudaGetErrorString(error_));   \
    } while (0)

/* Text that is good until the fourth call after this one. */
const char *format(const char *text, ...) __attribute__((format(printf, 1, 2)));

void *device_alloc(size_t bytes);
size_t free_memory();

typedef struct stats {
    double median, min, max; /* seconds of one run */
    int samples;
} stats_t;

/* A rate is work / time, in the 1e9 or 1e12 that the unit begins with; a time is in us. */
void row_rate(const char *group, const char *name, double work, const char *unit, stats_t time);
void row_time(const char *group, const char *name, stats_t time);
void row_value(const char *group, const char *name, double value, const char *unit);
void write_json(const char *failure); /* all rows and the failure, if not NULL; nothing without a path */
void left_out(const char *sentence, ...) __attribute__((format(printf, 1, 2)));

double now();
stats_t stats_of(std::vector<double> samples);
void flush_l2();
double elapsed_since(cudaEvent_t start); /* seconds; waits for the stream */
extern cudaEvent_t start_event;

/* Calls sample(), which returns seconds, until the time of a row is over: a third of it to warm up, then at least
 * five samples that count. */
template <class Sample>
stats_t collect(Sample sample)
{
    const double start = now();
    do sample();
    while (now() - start < seconds_per_row / 3);
    std::vector<double> samples;
    while (samples.size() < 5 || (now() - start < seconds_per_row && samples.size() < 1000))
        samples.push_back(sample());
    return stats_of(samples);
}

enum { WARM, COLD };

/* Seconds of one of the `parts` equal parts of run(), which puts work on the stream. COLD: nothing of it is in the
 * L2 cache before. WARM: as often in a row as it takes to be long against the resolution of events. */
template <class Run>
stats_t measure(int cold, Run run, int parts = 1)
{
    auto sample = [&](int times) {
        if (cold) flush_l2();
        CHECK(cudaEventRecord(start_event, stream));
        for (int i = 0; i < times; i++) run();
        CHECK(cudaGetLastError());
        return elapsed_since(start_event) / times / parts;
    };
    sample(1);
    const int times = cold ? 1 : std::clamp((int)(3e-4 / (sample(1) * parts)), 1, 100);
    return collect([&] { return sample(times); });
}

/* A mix of the bits of i in which all look random. */
__host__ __device__ inline uint32_t hash(uint32_t i)
{
    i = (i ^ (i >> 16)) * 0x7feb352du;
    i = (i ^ (i >> 15)) * 0x846ca68bu;
    return i ^ (i >> 16);
}

template <class T>
__global__ void fill_kernel(T *p, int64_t n, uint32_t seed)
{
    for (int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x; i < n; i += (int64_t)gridDim.x * blockDim.x) {
        const uint32_t bits = hash((uint32_t)i ^ hash((uint32_t)(i >> 32) + seed));
        const float radius = sqrtf(-2 * __logf(((bits >> 16) + 0.5f) / 65536));
        p[i] = T(radius * __cosf(((bits & 0xffff) + 0.5f) * (float)(2 * M_PI / 65536)));
    }
}

/* Normal random numbers: the bits of a value decide what a product costs in power, and so its rate. */
template <class T>
void fill(void *p, int64_t n, uint32_t seed)
{
    fill_kernel<T><<<device.multiProcessorCount * 8, 256, 0, stream>>>((T *)p, n, seed);
    CHECK(cudaGetLastError());
}

#endif
