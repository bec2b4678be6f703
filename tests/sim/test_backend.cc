/* The CUDA backend behind the public interface: devices and their refusals, the caller's device and error left as
 * they were, memory and streams. What a layer does is in test_backend_layer.cc. */
#include "tests/sim/check.h"
#include "tests/sim/simulator.h"

#include <cumoe/cumoe.h>

#include <cuda_runtime.h>
#include <string.h>
#include <string>
#include <thread>
#include <vector>

namespace
{

constexpr size_t kGiB = size_t{1} << 30;

cumoe_handle_t *const kUntouched = reinterpret_cast<cumoe_handle_t *>(0x1234);

void expect_sentence(const char *wanted)
{
    EXPECT(strstr(cumoe_last_error(), wanted), "\"%s\" has no \"%s\"", cumoe_last_error(), wanted);
}

/* A handle is refused, with these words, nothing is left, and AUTO takes the CPU without a word. */
void expect_no_cuda(int ordinal, std::initializer_list<const char *> words)
{
    cumoe_handle_t *handle = kUntouched;
    EXPECT(cumoe_handle_create(&handle, CUMOE_BACKEND_CUDA, ordinal) == CUMOE_UNSUPPORTED_DEVICE, "%d", ordinal);
    EXPECT(handle == kUntouched, "written");
    expect_sentence("cumoe_handle_create: ");
    for (const char *word : words) expect_sentence(word);
    EXPECT(cudaPeekAtLastError() == cudaSuccess, "an error is left to the caller");

    EXPECT(cumoe_memory_alloc(nullptr, 1, nullptr) == CUMOE_INVALID_ARGUMENT, "a sentence of another call");
    const std::string before = cumoe_last_error();
    const cumoe_status_t status = cumoe_handle_create(&handle, CUMOE_BACKEND_AUTO, 0);
    if (ordinal > 0) { // device 0 is there
        EXPECT(status == CUMOE_SUCCESS && cumoe_handle_backend(handle) == CUMOE_BACKEND_CUDA, "%d", status);
    } else {
        EXPECT(status == CUMOE_SUCCESS && cumoe_handle_backend(handle) == CUMOE_BACKEND_CPU, "%d", status);
    }
    EXPECT(before == cumoe_last_error(), "%s", cumoe_last_error());
    cumoe_handle_destroy(handle);
}

void test_refusals()
{
    sim_set_devices(0, 8, 0, 0);
    expect_no_cuda(0, {"no CUDA device", "cudaErrorNoDevice"});
    sim_set_devices(1, 7, 5, kGiB);
    expect_no_cuda(0, {"simulated GPU", "7.5", "8.0"});
    sim_set_devices(2, 8, 0, kGiB);
    expect_no_cuda(2, {"ordinal = 2", "2 CUDA devices"});
    cumoe_handle_t *none = kUntouched;
    EXPECT(cumoe_handle_create(&none, CUMOE_BACKEND_AUTO, 2) == CUMOE_UNSUPPORTED_DEVICE && none == kUntouched,
           "%s", "no error");
    expect_sentence("2 CUDA devices");
    sim_set_devices(1, 9, 0, 0); // full
    expect_no_cuda(0, {"CUDA device 0 cannot be used", "cudaErrorMemoryAllocation"});

    // Whatever CUDA call of the opening fails: AUTO takes the CPU.
    sim_set_devices(1, 9, 0, kGiB);
    const int64_t begin = sim_num_calls();
    cumoe_handle_t *handle = nullptr;
    EXPECT(cumoe_handle_create(&handle, CUMOE_BACKEND_CUDA, 0) == CUMOE_SUCCESS, "%s", cumoe_last_error());
    cumoe_handle_destroy(handle);
    const int64_t calls = sim_num_calls() - begin;
    EXPECT(calls >= 3, "%lld calls", static_cast<long long>(calls));
    for (int64_t call = 1; call <= calls; call++) {
        for (const cumoe_backend_t backend : {CUMOE_BACKEND_CUDA, CUMOE_BACKEND_AUTO}) {
            handle = kUntouched;
            sim_fail_call(call);
            const cumoe_status_t status = cumoe_handle_create(&handle, backend, 0);
            sim_fail_call(0);
            if (backend == CUMOE_BACKEND_CUDA) {
                EXPECT(status == CUMOE_UNSUPPORTED_DEVICE && handle == kUntouched, "call %d: status %d",
                       static_cast<int>(call), status);
                expect_sentence("cudaErrorUnknown");
            } else {
                EXPECT(status == CUMOE_SUCCESS && cumoe_handle_backend(handle) == CUMOE_BACKEND_CPU, "call %d: %d",
                       static_cast<int>(call), status);
                cumoe_handle_destroy(handle);
            }
            EXPECT(cudaPeekAtLastError() == cudaSuccess, "an error is left to the caller");
        }
    }
}

struct Opened {
    cumoe_handle_t *handle = nullptr;

    explicit Opened(int ordinal, cumoe_backend_t backend = CUMOE_BACKEND_CUDA)
    {
        const cumoe_status_t status = cumoe_handle_create(&handle, backend, ordinal);
        EXPECT(status == CUMOE_SUCCESS, "%s", cumoe_last_error());
    }
    ~Opened()
    {
        cumoe_handle_destroy(handle);
    }
    Opened(const Opened &) = delete;
    Opened &operator=(const Opened &) = delete;
};

void test_description()
{
    sim_set_devices(1, 9, 0, 80 * kGiB);
    const Opened any(0, CUMOE_BACKEND_AUTO);
    EXPECT(cumoe_handle_backend(any.handle) == CUMOE_BACKEND_CUDA, "%d", cumoe_handle_backend(any.handle));
    const char *wanted = "simulated GPU, sm_90, 4 SMs, 80 GiB, CUDA ",
               *found = cumoe_handle_description(any.handle);
    EXPECT(strncmp(found, wanted, strlen(wanted)) == 0, "%s", found);
}

int current()
{
    int device = -1;
    (void)cudaGetDevice(&device);
    return device;
}

size_t available(int device)
{
    const int before = current();
    size_t available = 0, total = 0;
    (void)cudaSetDevice(device);
    (void)cudaMemGetInfo(&available, &total);
    (void)cudaSetDevice(before);
    return available;
}

/* Handles of two devices; the thread's own device stays what it is. */
void test_two_devices()
{
    sim_set_devices(2, 8, 0, kGiB);
    for (int mine = 0; mine < 2; mine++) {
        (void)cudaSetDevice(mine);
        for (int ordinal = 0; ordinal < 2; ordinal++) {
            const Opened opened(ordinal);
            EXPECT(current() == mine, "%d", current());
            void *memory = nullptr;
            cumoe_stream_t stream = nullptr;
            EXPECT(cumoe_memory_alloc(opened.handle, 4096, &memory) == CUMOE_SUCCESS, "%s", cumoe_last_error());
            EXPECT(available(ordinal) < kGiB && available(1 - ordinal) == kGiB, "memory of the other device");
            EXPECT(cumoe_stream_create(opened.handle, &stream) == CUMOE_SUCCESS, "%s", cumoe_last_error());
            for (cumoe_stream_t s : {stream, cumoe_stream_t{}}) {
                EXPECT(cumoe_memory_set(opened.handle, memory, 7, 4096, s) == CUMOE_SUCCESS, "%s",
                       cumoe_last_error());
                EXPECT(cumoe_stream_synchronize(opened.handle, s) == CUMOE_SUCCESS, "%s", cumoe_last_error());
                EXPECT(current() == mine, "%d", current());
            }
            void *more = nullptr;
            EXPECT(cumoe_memory_alloc(opened.handle, 2 * kGiB, &more) == CUMOE_OUT_OF_MEMORY, "%s", "no error");
            EXPECT(current() == mine, "%d", current());
            cumoe_stream_destroy(opened.handle, stream);
            cumoe_memory_free(opened.handle, memory);
            EXPECT(current() == mine, "%d", current());
        }
    }
    (void)cudaSetDevice(0);
}

void test_errors_of_the_caller()
{
    sim_set_devices(1, 8, 0, kGiB);
    const Opened opened(0);
    void *memory = kUntouched;

    // Ours: told by the status, and nothing is left.
    EXPECT(cumoe_memory_alloc(opened.handle, 2 * kGiB, &memory) == CUMOE_OUT_OF_MEMORY, "%s", "no error");
    EXPECT(memory == kUntouched, "written");
    expect_sentence("cumoe_memory_alloc: size = 2147483648");
    expect_sentence("cudaErrorMemoryAllocation");
    EXPECT(cudaPeekAtLastError() == cudaSuccess, "an error is left to the caller");
    EXPECT(cumoe_memory_alloc(opened.handle, SIZE_MAX, &memory) == CUMOE_OUT_OF_MEMORY, "%s", cumoe_last_error());

    // His: stays, whether our call succeeds or not.
    (void)cudaSetDevice(99);
    EXPECT(cumoe_memory_alloc(opened.handle, 64, &memory) == CUMOE_SUCCESS, "%s", cumoe_last_error());
    EXPECT(cudaPeekAtLastError() == cudaErrorInvalidDevice, "%d", cudaPeekAtLastError());
    void *more = nullptr;
    EXPECT(cumoe_memory_alloc(opened.handle, 2 * kGiB, &more) == CUMOE_OUT_OF_MEMORY, "%s", "no error");
    cumoe_handle_t *handle = nullptr;
    EXPECT(cumoe_handle_create(&handle, CUMOE_BACKEND_CUDA, 5) == CUMOE_UNSUPPORTED_DEVICE, "%s", "no error");
    cumoe_memory_free(opened.handle, memory);
    EXPECT(cudaGetLastError() != cudaSuccess, "the caller's error is gone");
}

void test_memory_and_streams()
{
    sim_set_devices(1, 8, 0, kGiB);
    const Opened opened(0);
    const std::vector<char> from(1000, 'x');
    std::vector<char> to(1000);
    void *a = nullptr, *b = nullptr;
    cumoe_stream_t stream = nullptr;
    EXPECT(cumoe_memory_alloc(opened.handle, 0, &a) == CUMOE_SUCCESS && !a, "%p", a);
    EXPECT(cumoe_memory_alloc(opened.handle, 1000, &a) == CUMOE_SUCCESS, "%s", cumoe_last_error());
    EXPECT(cumoe_memory_alloc(opened.handle, 1000, &b) == CUMOE_SUCCESS, "%s", cumoe_last_error());
    EXPECT(reinterpret_cast<uintptr_t>(a) % 256 == 0 && reinterpret_cast<uintptr_t>(b) % 256 == 0, "%p %p", a, b);
    EXPECT(cumoe_stream_create(opened.handle, &stream) == CUMOE_SUCCESS && stream, "%s", cumoe_last_error());

    EXPECT(cumoe_memory_copy(opened.handle, a, from.data(), 1000, CUMOE_COPY_TO_DEVICE, stream) == CUMOE_SUCCESS,
           "%s", cumoe_last_error());
    EXPECT(cumoe_memory_set(opened.handle, static_cast<char *>(a) + 500, 'y', 400, stream) == CUMOE_SUCCESS, "%s",
           cumoe_last_error());
    EXPECT(cumoe_memory_copy(opened.handle, b, a, 1000, CUMOE_COPY_ON_DEVICE, stream) == CUMOE_SUCCESS, "%s",
           cumoe_last_error());
    EXPECT(cudaStreamQuery(stream) == cudaErrorNotReady, "somebody waited"); // the copies are enqueued
    EXPECT(cudaGetLastError() == cudaErrorNotReady, "%s", "an answer that CUDA keeps as an error");
    EXPECT(cumoe_memory_copy(opened.handle, to.data(), b, 1000, CUMOE_COPY_TO_HOST, stream) == CUMOE_SUCCESS, "%s",
           cumoe_last_error());
    EXPECT(cumoe_stream_synchronize(opened.handle, stream) == CUMOE_SUCCESS, "%s", cumoe_last_error());
    for (size_t i = 0; i < to.size(); i++) EXPECT(to[i] == (i >= 500 && i < 900 ? 'y' : 'x'), "%zu: %c", i, to[i]);

    // What CUDA refuses.
    EXPECT(cumoe_memory_copy(opened.handle, a, b, 1000, CUMOE_COPY_TO_HOST, stream) == CUMOE_CUDA_ERROR, "%s",
           "no error");
    expect_sentence("cumoe_memory_copy: ");
    expect_sentence("cudaErrorInvalidValue");
    EXPECT(cumoe_memory_set(opened.handle, to.data(), 0, 10, stream) == CUMOE_CUDA_ERROR, "%s", "no error");
    expect_sentence("cumoe_memory_set: ");
    sim_fail_call(2);
    EXPECT(cumoe_stream_synchronize(opened.handle, stream) == CUMOE_CUDA_ERROR, "%s", "no error");
    expect_sentence("cumoe_stream_synchronize: ");
    sim_fail_call(2);
    cumoe_stream_t none = nullptr;
    EXPECT(cumoe_stream_create(opened.handle, &none) == CUMOE_CUDA_ERROR && !none, "%s", "no error");
    EXPECT(cudaPeekAtLastError() == cudaSuccess, "an error is left to the caller");

    cumoe_stream_destroy(opened.handle, stream);
    cumoe_memory_free(opened.handle, a);
    cumoe_memory_free(opened.handle, b);
}

/* A layer that exchanges in chunks has a stream of its own. Whatever call of CUDA fails, nothing is left of it. */
void test_chunks()
{
    sim_set_devices(1, 9, 0, kGiB);
    const Opened opened(0);
    cumoe_config_t config;
    EXPECT(cumoe_config_init(&config) == CUMOE_SUCCESS, "%s", cumoe_last_error());
    config.hidden_size = config.intermediate_size = 8;
    config.num_experts = config.top_k = 2;
    config.exchange_chunks = 2;
    const int64_t objects = sim_num_objects();
    for (int64_t call = 1; call < 100; call++) {
        cumoe_ep_t *ep = nullptr; // a failure breaks it
        cumoe_layer_t *layer = nullptr;
        EXPECT(cumoe_ep_create_local(&ep, opened.handle, 1, 1) == CUMOE_SUCCESS, "%s", cumoe_last_error());
        config.ep = ep;
        sim_fail_call(call);
        const cumoe_status_t status = cumoe_layer_create(&layer, opened.handle, &config);
        sim_fail_call(0);
        EXPECT((status == CUMOE_SUCCESS) == (layer != nullptr), "call %d: status %d", static_cast<int>(call),
               status);
        cumoe_layer_destroy(layer);
        cumoe_ep_destroy(ep);
        EXPECT(sim_num_objects() == objects, "call %d: %d left", static_cast<int>(call),
               static_cast<int>(sim_num_objects() - objects));
        if (status == CUMOE_SUCCESS) {
            EXPECT(call > 5, "%d calls make a stream and three marks", static_cast<int>(call));
            return;
        }
    }
    EXPECT(false, "%s", "the layer is never made");
}

/* A handle is shared by threads. */
void test_threads()
{
    sim_set_devices(1, 8, 0, kGiB);
    const Opened opened(0);
    std::vector<std::thread> threads;
    for (int i = 0; i < 4; i++)
        threads.emplace_back([&] {
            for (int round = 0; round < 50; round++) {
                void *memory = nullptr;
                EXPECT(cumoe_memory_alloc(opened.handle, 100, &memory) == CUMOE_SUCCESS, "%s", cumoe_last_error());
                EXPECT(cumoe_memory_set(opened.handle, memory, 1, 100, nullptr) == CUMOE_SUCCESS, "%s",
                       cumoe_last_error());
                cumoe_memory_free(opened.handle, memory);
            }
        });
    for (std::thread &thread : threads) thread.join();
}

} // namespace

int main()
{
    test_refusals();
    test_description();
    test_two_devices();
    test_errors_of_the_caller();
    test_memory_and_streams();
    test_chunks();
    test_threads();
    EXPECT(sim_num_objects() == 0, "%lld left", static_cast<long long>(sim_num_objects()));
    return check::result();
}
