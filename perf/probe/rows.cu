/* Rows and their report, errors, and the clock.
 *
 * A row is printed as soon as it is measured, and the JSON file is written anew after each group: a run that is cut
 * off leaves what it has. */
#include "probe.cuh"
#include <errno.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

cudaDeviceProp device;
cudaStream_t stream;
cudaEvent_t start_event;
double seconds_per_row = 0.4;
int cublas_version;
const char *json_path;

typedef struct row {
    char group[16], name[96], unit[12];
    double median, min, max;
    int samples;
} row_t;

static std::vector<row_t> rows;
static std::vector<const char *> sentences; /* what was left out, and why */

void write_json(const char *failure)
{
    if (!json_path) return;
    FILE *f = fopen(json_path, "w");
    if (!f) {
        fprintf(stderr, "probe: cannot write %s: %s\n", json_path, strerror(errno));
        exit(1);
    }
    int driver = 0, runtime = 0, clock = 0, memory_clock = 0;
    cudaDriverGetVersion(&driver);
    cudaRuntimeGetVersion(&runtime);
    cudaDeviceGetAttribute(&clock, cudaDevAttrClockRate, 0);
    cudaDeviceGetAttribute(&memory_clock, cudaDevAttrMemoryClockRate, 0);
    fprintf(f, "{\"device\": \"%s\", \"compute_capability\": \"%d.%d\", \"multiprocessors\": %d,\n", device.name,
            device.major, device.minor, device.multiProcessorCount);
    fprintf(f, " \"l2_bytes\": %d, \"memory_bytes\": %zu, \"max_sm_mhz\": %d, \"max_memory_mhz\": %d,\n",
            device.l2CacheSize, device.totalGlobalMem, clock / 1000, memory_clock / 1000);
    fprintf(f, " \"cuda_driver\": %d, \"cuda_runtime\": %d, \"cublas\": %d, \"seconds_per_row\": %g,\n", driver,
            runtime, cublas_version, seconds_per_row);
    if (failure) fprintf(f, " \"failure\": \"%s\",\n", failure);
    fprintf(f, " \"not_measured\": [");
    for (size_t i = 0; i < sentences.size(); i++) fprintf(f, "%s\n  \"%s\"", i ? "," : "", sentences[i]);
    fprintf(f, "],\n \"rows\": [");
    for (size_t i = 0; i < rows.size(); i++) {
        const row_t *r = &rows[i];
        fprintf(f, "%s\n  {\"group\": \"%s\", \"row\": \"%s\", \"unit\": \"%s\", \"median\": %.6g, \"min\": %.6g, ",
                i ? "," : "", r->group, r->name, r->unit, r->median, r->min);
        fprintf(f, "\"max\": %.6g, \"samples\": %d}", r->max, r->samples);
    }
    fprintf(f, "]}\n");
    if (fclose(f) != 0) {
        fprintf(stderr, "probe: cannot write %s: %s\n", json_path, strerror(errno));
        exit(1);
    }
}

static void row_add(const char *group, const char *name, const char *unit, double median, double min, double max,
                    int samples)
{
    row_t r = {};
    snprintf(r.group, sizeof r.group, "%s", group);
    snprintf(r.name, sizeof r.name, "%s", name);
    snprintf(r.unit, sizeof r.unit, "%s", unit);
    r.median = median, r.min = min, r.max = max, r.samples = samples;
    rows.push_back(r);
    printf("| %s | %s | %.5g | %.5g | %.5g | %s |\n", r.group, r.name, median, min, max, unit);
    fflush(stdout);
}

void row_rate(const char *group, const char *name, double work, const char *unit, stats_t t)
{
    const double scale = work / (unit[0] == 'T' ? 1e12 : 1e9);
    row_add(group, name, unit, scale / t.median, scale / t.max, scale / t.min, t.samples);
}

void row_time(const char *group, const char *name, stats_t t)
{
    row_add(group, name, "us", 1e6 * t.median, 1e6 * t.min, 1e6 * t.max, t.samples);
}

void row_value(const char *group, const char *name, double value, const char *unit)
{
    row_add(group, name, unit, value, value, value, 1);
}

static char *text_of(const char *text, va_list arguments)
{
    char *made = NULL;
    if (vasprintf(&made, text, arguments) < 0) abort();
    for (char *c = made; *c; c++)
        if (*c == '"' || *c == '\\' || *c == '\n') *c = '\''; /* it goes into JSON and into a table */
    return made;
}

const char *format(const char *text, ...)
{
    static char *kept[4];
    static int next;
    va_list arguments;
    va_start(arguments, text);
    char **slot = &kept[next++ % 4];
    free(*slot);
    *slot = text_of(text, arguments);
    va_end(arguments);
    return *slot;
}

void left_out(const char *sentence, ...)
{
    va_list arguments;
    va_start(arguments, sentence);
    sentences.push_back(text_of(sentence, arguments));
    va_end(arguments);
    fprintf(stderr, "not measured: %s\n", sentences.back());
}

void fail(const char *message, ...)
{
    va_list arguments;
    va_start(arguments, message);
    char *sentence = text_of(message, arguments);
    va_end(arguments);
    fprintf(stderr, "probe: %s\n", sentence);
    write_json(sentence);
    exit(1);
}

double now()
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

stats_t stats_of(std::vector<double> samples)
{
    std::sort(samples.begin(), samples.end());
    return {samples[samples.size() / 2], samples.front(), samples.back(), (int)samples.size()};
}

void *device_alloc(size_t bytes)
{
    void *p;
    CHECK(cudaMalloc(&p, bytes));
    return p;
}

size_t free_memory()
{
    size_t available, total;
    CHECK(cudaMemGetInfo(&available, &total));
    return available;
}

/* Writing four times its size leaves nothing else in it, and keeps the device busy while the host gets ahead. */
void flush_l2()
{
    static void *junk = device_alloc((size_t)4 * device.l2CacheSize);
    CHECK(cudaMemsetAsync(junk, 0, (size_t)4 * device.l2CacheSize, stream));
}

double elapsed_since(cudaEvent_t start)
{
    static cudaEvent_t stop;
    if (!stop) CHECK(cudaEventCreate(&stop));
    float ms;
    CHECK(cudaEventRecord(stop, stream));
    CHECK(cudaEventSynchronize(stop));
    CHECK(cudaEventElapsedTime(&ms, start, stop));
    return 1e-3 * ms;
}
