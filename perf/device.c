/* Of CUDA's runtime, what the library does not offer: graphs, events, the memory that is free. In a build without
 * CUDA there is the CPU alone. */
#include "perf.h"

#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { NO_DEVICE = 77 };

#ifdef PERF_WITH_CUDA
#include <cuda_runtime_api.h>

/* The simulator has no time, and so not this one. */
extern cudaError_t CUDARTAPI cudaEventElapsedTime(float *ms, cudaEvent_t start, cudaEvent_t stop)
    __attribute__((weak));

struct graph {
    cudaGraph_t captured;
    cudaGraphExec_t executable;
};

static void cuda_check(cudaError_t error)
{
    if (error == cudaSuccess) return;
    fprintf(stderr, "cumoe-perf: CUDA: %s\n", cudaGetErrorString(error));
    exit(EXIT_FAILURE);
}
#else
struct graph {
    int none;
};
#endif

/* A stream, and events where there is CUDA. */
static void start_stream(device_t *d)
{
    perf_check(cumoe_stream_create(d->handle, &d->stream));
#ifdef PERF_WITH_CUDA
    if (d->cpu) return;
    cuda_check(cudaSetDevice(d->ordinal)); /* of this thread: for cuBLAS, and for what stands below */
    if (!cudaEventElapsedTime) return;
    cuda_check(cudaEventCreate((cudaEvent_t *)&d->start));
    cuda_check(cudaEventCreate((cudaEvent_t *)&d->stop));
#endif
}

void device_open(device_t *d, int backend, int ordinal)
{
    const cumoe_status_t status = cumoe_handle_create(&d->handle, (cumoe_backend_t)backend, ordinal);
    if (status == CUMOE_UNSUPPORTED_DEVICE) {
        fprintf(stderr, "cumoe-perf: %s\n", cumoe_last_error());
        exit(NO_DEVICE);
    }
    perf_check(status);
    d->ordinal = ordinal;
    d->cpu = cumoe_handle_backend(d->handle) == CUMOE_BACKEND_CPU;
    start_stream(d);
}

void device_close(device_t *d)
{
    device_unshare(d);
    cumoe_handle_destroy(d->handle);
}

void device_share(device_t *d, const device_t *with)
{
    *d = (device_t){.handle = with->handle, .cpu = with->cpu, .threads = with->threads, .ordinal = with->ordinal};
    start_stream(d);
}

void device_unshare(device_t *d)
{
#ifdef PERF_WITH_CUDA
    if (d->start) cuda_check(cudaEventDestroy(d->start));
    if (d->stop) cuda_check(cudaEventDestroy(d->stop));
#endif
    cumoe_stream_destroy(d->handle, d->stream);
}

static int number_of_gpus(void)
{
    int count = 0;
#ifdef PERF_WITH_CUDA
    if (cudaGetDeviceCount(&count) != cudaSuccess) (void)cudaGetLastError();
#endif
    return count > 0 ? count : 1;
}

int device_of_rank(int ordinal, int local)
{
    return local > 0 ? (ordinal + local) % number_of_gpus() : ordinal;
}

int device_sharers(int local_count)
{
    return (local_count + number_of_gpus() - 1) / number_of_gpus();
}

void device_wait(const device_t *d)
{
    perf_check(cumoe_stream_synchronize(d->handle, d->stream));
}

/* What Linux would give without pushing out others. */
static double host_memory(void)
{
    char line[128];
    long long kibibytes = 0;
    FILE *file = fopen("/proc/meminfo", "r");
    while (file && kibibytes == 0 && fgets(line, sizeof line, file))
        (void)sscanf(line, "MemAvailable: %lld", &kibibytes);
    if (file) fclose(file);
    if (kibibytes > 0) return 1024 * (double)kibibytes;
    return (double)sysconf(_SC_PHYS_PAGES) * (double)sysconf(_SC_PAGESIZE);
}

double device_memory(const device_t *d)
{
#ifdef PERF_WITH_CUDA
    size_t available = 0, total = 0;
    if (!d->cpu) {
        cuda_check(cudaMemGetInfo(&available, &total));
        return (double)available;
    }
#endif
    (void)d;
    return host_memory();
}

/* ---- the clock ---- */

void device_start_clock(device_t *d)
{
#ifdef PERF_WITH_CUDA
    if (d->start) {
        cuda_check(cudaEventRecord(d->start, d->stream));
        return;
    }
#endif
    device_wait(d);
    d->started = clock_now();
}

double device_stop_clock(device_t *d)
{
#ifdef PERF_WITH_CUDA
    if (d->start) {
        float ms;
        cuda_check(cudaEventRecord(d->stop, d->stream));
        cuda_check(cudaEventSynchronize(d->stop));
        cuda_check(cudaEventElapsedTime(&ms, d->start, d->stop));
        return 1e-3 * (double)ms;
    }
#endif
    device_wait(d);
    return clock_now() - d->started;
}

/* ---- graphs ---- */

bool device_has_graphs(const device_t *d)
{
#ifdef PERF_WITH_CUDA
    return !d->cpu;
#else
    (void)d;
    return false;
#endif
}

void device_start_graph(const device_t *d)
{
#ifdef PERF_WITH_CUDA
    cuda_check(cudaStreamBeginCapture(d->stream, cudaStreamCaptureModeThreadLocal));
#endif
    (void)d;
}

graph_t *device_stop_graph(const device_t *d)
{
    graph_t *graph = calloc(1, sizeof *graph);
    if (!graph) abort();
#ifdef PERF_WITH_CUDA
    cuda_check(cudaStreamEndCapture(d->stream, &graph->captured));
    cuda_check(cudaGraphInstantiate(&graph->executable, graph->captured, 0));
#endif
    (void)d;
    return graph;
}

void device_launch(const device_t *d, const graph_t *graph)
{
#ifdef PERF_WITH_CUDA
    cuda_check(cudaGraphLaunch(graph->executable, d->stream));
#endif
    (void)d;
    (void)graph;
}

void device_free_graph(graph_t *graph)
{
#ifdef PERF_WITH_CUDA
    if (graph) {
        cuda_check(cudaGraphExecDestroy(graph->executable));
        cuda_check(cudaGraphDestroy(graph->captured));
    }
#endif
    free(graph);
}
