/* The simulator's runtime: errors, streams that work late, capture, and failures on request. */
#include "cuda/launch.cuh"
#include "cuda/ptx.cuh"
#include "cuda/shared.cuh"
#include "tests/sim/buffer.h"
#include "tests/sim/check.h"
#include "tests/sim/simulator.h"

#include <thread>

using namespace cumoe;

namespace
{

struct Bytes {
    char *byte; // [count]
    __host__ __device__ Bytes(SharedArena &arena, int count) : byte(arena.take<char>(static_cast<size_t>(count))) {}
};

__global__ void add_kernel(int *sum, int value)
{
    *sum += value;
}

__global__ void touch_kernel(int count)
{
    SharedArena arena;
    const Bytes shared(arena, count);
    shared.byte[count - 1] = 1;
}

cudaError_t add(int *sum, int value, cudaStream_t stream)
{
    return launch({dim3(1), dim3(1), stream}, add_kernel, sum, value);
}

cudaError_t touch(int count)
{
    return launch({dim3(1), dim3(1), nullptr, shared_bytes<Bytes>(count)}, touch_kernel, count);
}

#define EXPECT_ERROR(expected, call)                                                                               \
    do {                                                                                                           \
        const cudaError_t found = (call);                                                                          \
        EXPECT(found == expected, "%s", cudaGetErrorName(found));                                                  \
    } while (0)

/* Device memory is looked at through cudaMemcpy, so this says what has been done without anybody waiting for it. */
int peek(const cudaStream_t other, const int *device)
{
    int value = 0;
    EXPECT_ERROR(cudaSuccess, cudaMemcpyAsync(&value, device, sizeof value, cudaMemcpyDeviceToHost, other));
    return value;
}

void test_launch_limits()
{
    struct Limit {
        int major, minor, bytes;
    };
    for (const Limit &limit :
         {Limit{8, 0, 163 * 1024}, Limit{8, 6, 99 * 1024}, Limit{9, 0, 227 * 1024}, Limit{12, 0, 99 * 1024}}) {
        sim_set_devices(1, limit.major, limit.minor, size_t{1} << 30);
        EXPECT_ERROR(cudaSuccess, touch(limit.bytes));
        EXPECT_ERROR(cudaErrorInvalidValue, touch(limit.bytes + 1));
        EXPECT_ERROR(cudaSuccess, cudaDeviceSynchronize());
    }
    Buffer<int> sum(1);
    EXPECT_ERROR(cudaErrorInvalidConfiguration, launch({dim3(1), dim3(1025), nullptr}, add_kernel, sum.data(), 1));
    EXPECT_ERROR(cudaErrorInvalidConfiguration,
                 launch({dim3(1, 65536), dim3(1), nullptr}, add_kernel, sum.data(), 1));
    cudaLaunchAttribute early = {};
    early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    const Launch with_attribute = {dim3(1), dim3(1), nullptr, 0, &early, 1};
    sim_set_devices(1, 8, 0, size_t{1} << 30);
    EXPECT_ERROR(cudaErrorNotSupported, launch(with_attribute, add_kernel, sum.data(), 1));
    sim_set_devices(1, 9, 0, size_t{1} << 30);
    EXPECT_ERROR(cudaSuccess, launch(with_attribute, add_kernel, sum.data(), 1));
    const int64_t calls = sim_num_calls();
    EXPECT_ERROR(cudaSuccess, launch({dim3(0), dim3(1), nullptr}, add_kernel, sum.data(), 1));
    EXPECT(sim_num_calls() == calls, "an empty grid is launched");
    (void)cudaGetLastError();
}

void test_streams_are_late()
{
    Buffer<int> sum(std::vector<int>{0});
    cudaStream_t a, b;
    cudaEvent_t event;
    EXPECT_ERROR(cudaSuccess, cudaStreamCreateWithFlags(&a, cudaStreamNonBlocking));
    EXPECT_ERROR(cudaSuccess, cudaStreamCreateWithFlags(&b, cudaStreamNonBlocking));
    EXPECT_ERROR(cudaSuccess, cudaEventCreateWithFlags(&event, cudaEventDisableTiming));

    EXPECT_ERROR(cudaSuccess, add(sum.data(), 1, a));
    EXPECT(peek(b, sum.data()) == 0, "a kernel that nobody waited for");
    EXPECT_ERROR(cudaErrorNotReady, cudaStreamQuery(a));
    EXPECT_ERROR(cudaSuccess, cudaEventRecord(event, a));
    EXPECT_ERROR(cudaSuccess, add(sum.data(), 10, a));
    EXPECT_ERROR(cudaSuccess, cudaStreamWaitEvent(b, event, 0));
    EXPECT(peek(b, sum.data()) == 1, "b waits for the event, and for nothing after it");
    EXPECT_ERROR(cudaSuccess, cudaStreamSynchronize(a));
    EXPECT(peek(b, sum.data()) == 11, "a has been waited for");

    EXPECT_ERROR(cudaSuccess, cudaEventDestroy(event));
    EXPECT_ERROR(cudaSuccess, cudaStreamDestroy(a));
    EXPECT_ERROR(cudaSuccess, cudaStreamDestroy(b));
}

void test_default_stream()
{
    Buffer<int> sum(std::vector<int>{0});
    cudaStream_t stream;
    EXPECT_ERROR(cudaSuccess, cudaStreamCreate(&stream));
    EXPECT_ERROR(cudaSuccess, add(sum.data(), 1, stream));
    EXPECT_ERROR(cudaSuccess, add(sum.data(), 2, nullptr)); // waits for the blocking stream
    EXPECT_ERROR(cudaSuccess, cudaStreamSynchronize(nullptr));
    EXPECT(sum.read()[0] == 3, "%d", sum.read()[0]);
    EXPECT_ERROR(cudaSuccess, cudaStreamDestroy(stream));
}

void test_capture()
{
    Buffer<int> sum(std::vector<int>{0});
    cudaStream_t stream, side;
    cudaEvent_t event;
    cudaGraph_t graph;
    cudaGraphExec_t executable;
    EXPECT_ERROR(cudaSuccess, cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
    EXPECT_ERROR(cudaSuccess, cudaStreamCreateWithFlags(&side, cudaStreamNonBlocking));
    EXPECT_ERROR(cudaSuccess, cudaEventCreate(&event));
    EXPECT_ERROR(cudaSuccess, cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal));
    EXPECT_ERROR(cudaSuccess, add(sum.data(), 1, stream));
    EXPECT_ERROR(cudaSuccess, cudaEventRecord(event, stream));
    EXPECT_ERROR(cudaSuccess, cudaStreamWaitEvent(side, event, 0));
    EXPECT_ERROR(cudaSuccess, add(sum.data(), 10, side));
    EXPECT_ERROR(cudaSuccess, cudaStreamEndCapture(stream, &graph));
    EXPECT(sum.read()[0] == 0, "captured work is not done");
    EXPECT_ERROR(cudaSuccess, cudaGraphInstantiate(&executable, graph, 0));
    for (int replay = 0; replay < 3; replay++) EXPECT_ERROR(cudaSuccess, cudaGraphLaunch(executable, stream));
    EXPECT_ERROR(cudaSuccess, cudaStreamSynchronize(stream));
    EXPECT(sum.read()[0] == 33, "%d", sum.read()[0]);
    EXPECT_ERROR(cudaSuccess, cudaGraphExecDestroy(executable));
    EXPECT_ERROR(cudaSuccess, cudaGraphDestroy(graph));
    EXPECT_ERROR(cudaSuccess, cudaEventDestroy(event));
    EXPECT_ERROR(cudaSuccess, cudaStreamDestroy(side));
    EXPECT_ERROR(cudaSuccess, cudaStreamDestroy(stream));
}

/* What CALL returns inside a capture; it must break the capture. */
template <typename Call>
void expect_breaks_capture(cudaError_t expected, Call call)
{
    cudaStream_t stream;
    cudaGraph_t graph;
    cudaStreamCaptureStatus status;
    EXPECT_ERROR(cudaSuccess, cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
    EXPECT_ERROR(cudaSuccess, cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal));
    EXPECT_ERROR(expected, call(stream));
    EXPECT_ERROR(cudaSuccess, cudaStreamIsCapturing(stream, &status));
    EXPECT(status == cudaStreamCaptureStatusInvalidated, "%d", static_cast<int>(status));
    EXPECT_ERROR(cudaErrorStreamCaptureInvalidated, cudaStreamEndCapture(stream, &graph));
    EXPECT_ERROR(cudaSuccess, cudaStreamDestroy(stream));
}

void test_forbidden_in_capture()
{
    Buffer<int> sum(std::vector<int>{0});
    int host = 0, *made = nullptr;
    expect_breaks_capture(cudaErrorStreamCaptureUnsupported, [&](cudaStream_t) { return cudaMalloc(&made, 4); });
    expect_breaks_capture(cudaErrorStreamCaptureUnsupported, [&](cudaStream_t) { return cudaFree(sum.data()); });
    expect_breaks_capture(cudaErrorStreamCaptureUnsupported,
                          [](cudaStream_t s) { return cudaStreamSynchronize(s); });
    expect_breaks_capture(cudaErrorStreamCaptureUnsupported, [](cudaStream_t) { return cudaDeviceSynchronize(); });
    expect_breaks_capture(cudaErrorStreamCaptureImplicit,
                          [&](cudaStream_t) { return add(sum.data(), 1, nullptr); });
    expect_breaks_capture(cudaErrorStreamCaptureImplicit,
                          [&](cudaStream_t) { return cudaMemcpy(&host, sum.data(), 4, cudaMemcpyDeviceToHost); });
}

void test_memory()
{
    int *first = nullptr, *second = nullptr, host[2] = {};
    size_t available, total;
    sim_set_devices(1, 8, 0, 1000);
    EXPECT_ERROR(cudaSuccess, cudaMalloc(&first, 600));
    EXPECT_ERROR(cudaErrorMemoryAllocation, cudaMalloc(&second, 401));
    EXPECT_ERROR(cudaSuccess, cudaMemGetInfo(&available, &total));
    EXPECT(available == 400 && total == 1000, "%zu of %zu", available, total);
    EXPECT_ERROR(cudaErrorMemoryAllocation, cudaPeekAtLastError());
    EXPECT_ERROR(cudaErrorMemoryAllocation, cudaGetLastError());
    EXPECT_ERROR(cudaSuccess, cudaGetLastError());
    EXPECT_ERROR(cudaErrorInvalidValue, cudaMemcpy(first + 149, host, 8, cudaMemcpyHostToDevice));
    EXPECT_ERROR(cudaErrorInvalidValue, cudaMemcpy(host, host + 1, 4, cudaMemcpyDeviceToHost));
    EXPECT_ERROR(cudaErrorInvalidValue, cudaMemset(first, 0, 601));
    EXPECT_ERROR(cudaErrorInvalidValue, cudaFree(first + 1));
    EXPECT_ERROR(cudaSuccess, cudaFree(first));
    EXPECT_ERROR(cudaErrorInvalidValue, cudaFree(first));

    sim_set_devices(1, 8, 0, size_t{1} << 40);
    EXPECT_ERROR(cudaSuccess, cudaMalloc(&first, size_t{200} << 30)); // takes no memory before it is touched
    EXPECT_ERROR(cudaSuccess, add(first + (size_t{40} << 30), 5, nullptr));
    EXPECT_ERROR(cudaSuccess, cudaMemcpy(host, first + (size_t{40} << 30), 4, cudaMemcpyDeviceToHost));
    EXPECT(host[0] == 5, "%d", host[0]);
    EXPECT_ERROR(cudaSuccess, cudaFree(first));
    (void)cudaGetLastError();
}

void test_failures_on_request()
{
    Buffer<int> sum(std::vector<int>{0});
    sim_fail_call(2);
    EXPECT_ERROR(cudaSuccess, add(sum.data(), 1, nullptr));
    EXPECT_ERROR(cudaErrorLaunchOutOfResources, add(sum.data(), 10, nullptr));
    EXPECT_ERROR(cudaSuccess, add(sum.data(), 100, nullptr));
    EXPECT(sum.read()[0] == 101, "%d", sum.read()[0]);
    (void)cudaGetLastError();
}

/* Threads of the host, each with its own stream: the host's code of one runs while a kernel of another does. */
void test_host_threads()
{
    Buffer<int> sums(std::vector<int>{0, 0, 0});
    std::vector<std::thread> threads;
    for (int i = 0; i < 3; i++)
        threads.emplace_back([i, sum = sums.data() + i] {
            cudaStream_t stream;
            EXPECT_ERROR(cudaSuccess, cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
            for (int round = 0; round < 200; round++) {
                EXPECT_ERROR(cudaSuccess, add(sum, i + 1, stream));
                EXPECT_ERROR(cudaSuccess, cudaStreamSynchronize(stream));
            }
            EXPECT_ERROR(cudaSuccess, cudaStreamDestroy(stream));
        });
    for (std::thread &thread : threads) thread.join();
    EXPECT((sums.read() == std::vector<int>{200, 400, 600}), "%d %d %d", sums.read()[0], sums.read()[1],
           sums.read()[2]);
}

void test_no_device()
{
    int count = -1, *made = nullptr;
    sim_set_devices(0, 8, 0, 0);
    EXPECT_ERROR(cudaErrorNoDevice, cudaGetDeviceCount(&count));
    EXPECT(count == 0, "%d", count);
    EXPECT_ERROR(cudaErrorNoDevice, cudaMalloc(&made, 4));
    sim_set_devices(1, 8, 0, size_t{1} << 30);
    (void)cudaGetLastError();
}

} // namespace

int main()
{
    test_launch_limits();
    test_streams_are_late();
    test_default_stream();
    test_capture();
    test_forbidden_in_capture();
    test_memory();
    test_failures_on_request();
    test_host_threads();
    test_no_device();
    EXPECT(sim_num_objects() == 0, "%lld left", static_cast<long long>(sim_num_objects()));
    return check::result();
}
