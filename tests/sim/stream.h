/* Streams, events and graphs of the simulator's runtime. */
#ifndef CUMOE_SIM_STREAM_H
#define CUMOE_SIM_STREAM_H

#include <cuda_runtime_api.h>
#include <deque>
#include <functional>
#include <mutex>
#include <vector>

namespace sim
{

typedef std::function<cudaError_t()> work_t;

struct Graph {
    std::vector<work_t> work; // in an order that keeps all dependences: that of the capture
};

/* A capture that is going on, perhaps through several streams. */
struct Capture {
    Graph graph;
    bool broken; // by a call that no capture allows
};

struct Stream {
    int device;
    bool blocking; // waits for the default stream, and it for this one
    std::deque<work_t> queue;
    Capture *capture;
    bool origin; // of the capture
};

struct Event {
    Stream *stream; // of the last record
    Capture *capture;
    int64_t recorded, reached; // records, and how many of them have been reached
};

Stream *find_stream(cudaStream_t handle); // the default stream of the current device for NULL
cudaError_t enqueue(cudaStream_t handle, work_t work);
cudaError_t drain(Stream *stream);
cudaError_t drain_all();
bool allows_allocation(); // or synchronisation; false: a capture is going on, and is broken now

int current_device();
cudaError_t keep_error(cudaError_t error); // as the thread's last
/* Counts a call of the runtime; not cudaSuccess: it must fail with this. */
cudaError_t enter(cudaError_t failure = cudaErrorUnknown);
size_t num_streams_and_events();

/* The runtime may be called by several threads of the host; all of it is under one lock. */
extern std::recursive_mutex mutex;

} // namespace sim

#define SIM_LOCK const std::lock_guard<std::recursive_mutex> lock(sim::mutex)
#define SIM_ENTER(...)                                                                                             \
    SIM_LOCK;                                                                                                      \
    if (const cudaError_t injected = sim::enter(__VA_ARGS__)) return sim::keep_error(injected)

#endif
