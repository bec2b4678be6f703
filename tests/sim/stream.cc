/* Streams do their work when somebody waits for it: the latest moment that is legal. */
#include "tests/sim/stream.h"
#include "tests/sim/core.h"

#include <algorithm>

namespace sim
{

namespace
{

constexpr int kMaxDevices = 16;
Stream defaults[kMaxDevices];
std::vector<Stream *> streams;
size_t num_events, num_graphs;

template <typename Object, typename Handle>
Object *object_of(Handle handle)
{
    return reinterpret_cast<Object *>(handle);
}

bool is_default(const Stream *stream)
{
    return stream >= defaults && stream < defaults + kMaxDevices;
}

Capture *capture_going_on()
{
    for (const Stream *stream : streams)
        if (stream->capture) return stream->capture;
    return nullptr;
}

/* The default stream and the blocking ones wait for each other. */
cudaError_t drain_partners(const Stream *stream)
{
    if (!is_default(stream)) return stream->blocking ? drain(&defaults[stream->device]) : cudaSuccess;
    cudaError_t result = cudaSuccess;
    for (Stream *other : streams)
        if (other->blocking && other->device == stream->device)
            if (const cudaError_t error = drain(other)) result = error;
    return result;
}

cudaError_t reach(Event *event, int64_t record)
{
    Stream *stream = event->stream;
    while (event->reached < record && !stream->queue.empty()) {
        const work_t work = std::move(stream->queue.front());
        stream->queue.pop_front();
        if (const cudaError_t error = work()) return error;
    }
    return cudaSuccess;
}

} // namespace

Stream *find_stream(cudaStream_t handle)
{
    if (handle != nullptr && handle != cudaStreamLegacy) return object_of<Stream>(handle);
    Stream *stream = &defaults[current_device()];
    stream->device = current_device();
    return stream;
}

cudaError_t enqueue(cudaStream_t handle, work_t work)
{
    Stream *stream = find_stream(handle);
    if (stream->capture) {
        stream->capture->graph.work.push_back(std::move(work));
        return cudaSuccess;
    }
    if (is_default(stream) && !allows_allocation()) return cudaErrorStreamCaptureImplicit;
    const cudaError_t error = drain_partners(stream);
    stream->queue.push_back(std::move(work));
    return error;
}

cudaError_t drain(Stream *stream)
{
    while (!stream->queue.empty()) {
        const work_t work = std::move(stream->queue.front());
        stream->queue.pop_front();
        if (const cudaError_t error = work()) {
            stream->queue.clear();
            return error;
        }
    }
    return cudaSuccess;
}

cudaError_t drain_all()
{
    cudaError_t result = cudaSuccess;
    for (Stream &stream : defaults)
        if (const cudaError_t error = drain(&stream)) result = error;
    for (Stream *stream : streams)
        if (const cudaError_t error = drain(stream)) result = error;
    return result;
}

bool allows_allocation()
{
    Capture *capture = capture_going_on();
    if (!capture) return true;
    capture->broken = true;
    return false;
}

size_t num_streams_and_events()
{
    return streams.size() + num_events + num_graphs;
}

} // namespace sim

using namespace sim;

extern "C" {

cudaError_t cudaStreamCreateWithFlags(cudaStream_t *stream, unsigned flags)
{
    SIM_ENTER();
    Stream *made = new Stream{current_device(), !(flags & cudaStreamNonBlocking), {}, nullptr, false};
    streams.push_back(made);
    *stream = object_of<CUstream_st>(made);
    return cudaSuccess;
}

cudaError_t cudaStreamCreateWithPriority(cudaStream_t *stream, unsigned flags, int)
{
    return cudaStreamCreateWithFlags(stream, flags);
}

cudaError_t cudaStreamCreate(cudaStream_t *stream)
{
    return cudaStreamCreateWithFlags(stream, cudaStreamDefault);
}

cudaError_t cudaStreamDestroy(cudaStream_t handle)
{
    SIM_LOCK;
    const cudaError_t injected = enter();
    Stream *stream = find_stream(handle);
    const cudaError_t error = drain(stream);
    streams.erase(std::find(streams.begin(), streams.end(), stream));
    delete stream;
    return keep_error(injected ? injected : error);
}

cudaError_t cudaStreamSynchronize(cudaStream_t handle)
{
    SIM_ENTER();
    Stream *stream = find_stream(handle);
    if (stream->capture) {
        stream->capture->broken = true;
        return keep_error(cudaErrorStreamCaptureUnsupported);
    }
    const cudaError_t partners = is_default(stream) ? drain_partners(stream) : cudaSuccess, error = drain(stream);
    return keep_error(error ? error : partners);
}

/* Who asks again and again waits as well: each time one piece of the work is done. */
cudaError_t cudaStreamQuery(cudaStream_t handle)
{
    SIM_ENTER();
    Stream *stream = find_stream(handle);
    if (stream->queue.empty()) return cudaSuccess;
    const work_t work = std::move(stream->queue.front());
    stream->queue.pop_front();
    const cudaError_t error = work();
    return keep_error(error ? error : cudaErrorNotReady);
}

cudaError_t cudaDeviceSynchronize()
{
    SIM_ENTER();
    if (!allows_allocation()) return keep_error(cudaErrorStreamCaptureUnsupported);
    return keep_error(drain_all());
}

cudaError_t cudaEventCreateWithFlags(cudaEvent_t *event, unsigned)
{
    SIM_ENTER();
    *event = object_of<CUevent_st>(new Event{});
    num_events++;
    return cudaSuccess;
}

cudaError_t cudaEventCreate(cudaEvent_t *event)
{
    return cudaEventCreateWithFlags(event, cudaEventDefault);
}

cudaError_t cudaEventDestroy(cudaEvent_t handle)
{
    SIM_LOCK;
    const cudaError_t injected = enter();
    Event *event = object_of<Event>(handle);
    if (event->reached < event->recorded) reach(event, event->recorded);
    delete event;
    num_events--;
    return keep_error(injected);
}

cudaError_t cudaEventRecord(cudaEvent_t handle, cudaStream_t stream)
{
    SIM_ENTER();
    Event *event = object_of<Event>(handle);
    event->stream = find_stream(stream);
    event->capture = event->stream->capture;
    if (event->capture) return cudaSuccess;
    const int64_t record = ++event->recorded;
    return keep_error(enqueue(stream, [event, record] {
        event->reached = std::max(event->reached, record);
        return cudaSuccess;
    }));
}

cudaError_t cudaEventSynchronize(cudaEvent_t handle)
{
    SIM_ENTER();
    Event *event = object_of<Event>(handle);
    if (event->capture) return keep_error(cudaErrorCapturedEvent);
    return keep_error(event->reached < event->recorded ? reach(event, event->recorded) : cudaSuccess);
}

cudaError_t cudaStreamWaitEvent(cudaStream_t handle, cudaEvent_t event_handle, unsigned)
{
    SIM_ENTER();
    Event *event = object_of<Event>(event_handle);
    Stream *stream = find_stream(handle);
    if (event->capture) { // the stream joins the capture
        stream->capture = event->capture;
        return cudaSuccess;
    }
    if (event->recorded == 0) return cudaSuccess;
    const int64_t record = event->recorded;
    return keep_error(
        enqueue(handle, [event, record] { return event->reached < record ? reach(event, record) : cudaSuccess; }));
}

cudaError_t cudaStreamBeginCapture(cudaStream_t handle, cudaStreamCaptureMode)
{
    SIM_ENTER();
    Stream *stream = find_stream(handle);
    if (is_default(stream) || stream->capture) return keep_error(cudaErrorStreamCaptureUnsupported);
    stream->capture = new Capture{{}, false};
    stream->origin = true;
    return cudaSuccess;
}

cudaError_t cudaStreamEndCapture(cudaStream_t handle, cudaGraph_t *graph)
{
    SIM_ENTER();
    Stream *origin = find_stream(handle);
    Capture *capture = origin->capture;
    *graph = nullptr;
    if (!capture || !origin->origin) return keep_error(cudaErrorIllegalState);
    for (Stream *stream : streams)
        if (stream->capture == capture) stream->capture = nullptr;
    origin->origin = false;
    const bool broken = capture->broken;
    if (!broken) {
        *graph = object_of<CUgraph_st>(new Graph(std::move(capture->graph)));
        num_graphs++;
    }
    delete capture;
    return keep_error(broken ? cudaErrorStreamCaptureInvalidated : cudaSuccess);
}

cudaError_t cudaStreamIsCapturing(cudaStream_t handle, cudaStreamCaptureStatus *status)
{
    SIM_ENTER();
    const Capture *capture = find_stream(handle)->capture;
    *status = !capture          ? cudaStreamCaptureStatusNone
              : capture->broken ? cudaStreamCaptureStatusInvalidated
                                : cudaStreamCaptureStatusActive;
    return cudaSuccess;
}

cudaError_t cudaGraphInstantiate(cudaGraphExec_t *executable, cudaGraph_t graph, unsigned long long)
{
    SIM_ENTER();
    *executable = object_of<CUgraphExec_st>(new Graph(*object_of<Graph>(graph)));
    num_graphs++;
    return cudaSuccess;
}

cudaError_t cudaGraphLaunch(cudaGraphExec_t executable, cudaStream_t stream)
{
    SIM_ENTER();
    for (const work_t &work : object_of<Graph>(executable)->work)
        if (const cudaError_t error = enqueue(stream, work)) return keep_error(error);
    return cudaSuccess;
}

cudaError_t cudaGraphDestroy(cudaGraph_t graph)
{
    SIM_LOCK;
    const cudaError_t injected = enter();
    delete object_of<Graph>(graph);
    num_graphs--;
    return keep_error(injected);
}

cudaError_t cudaGraphExecDestroy(cudaGraphExec_t executable)
{
    SIM_LOCK;
    const cudaError_t injected = enter();
    delete object_of<Graph>(executable);
    num_graphs--;
    return keep_error(injected);
}
}
