/* Handles, and the memory, copy and stream helpers. */
#include "tests/suite.h"
#include "tests/unit/refusal.h"

#include <pthread.h>

/* Without a usable GPU, AUTO falls back in silence. */
Test(handle, auto_leaves_the_last_error_alone)
{
    cumoe_handle_t *handle = NULL;
    cr_assert_eq(cumoe_handle_create(NULL, CUMOE_BACKEND_AUTO, 0), CUMOE_INVALID_ARGUMENT);
    char before[512];
    strncpy(before, cumoe_last_error(), sizeof before - 1);
    before[sizeof before - 1] = 0;
    cr_assert_eq(cumoe_handle_create(&handle, CUMOE_BACKEND_AUTO, 0), CUMOE_SUCCESS);
    cr_expect_str_eq(cumoe_last_error(), before);
    cumoe_handle_destroy(handle);
}

Test(handle, cpu_and_auto)
{
    static const cumoe_backend_t backends[] = {CUMOE_BACKEND_CPU, CUMOE_BACKEND_AUTO};
    for (int i = 0; i < 2; i++) {
        cumoe_handle_t *handle = NULL;
        cr_assert_eq(cumoe_handle_create(&handle, backends[i], 0), CUMOE_SUCCESS, "%s", cumoe_last_error());
        const bool cpu = cumoe_handle_backend(handle) == CUMOE_BACKEND_CPU; /* AUTO: or a GPU */
        cr_expect(cpu || backends[i] == CUMOE_BACKEND_AUTO);
        cr_expect_eq(strncmp(cumoe_handle_description(handle), "CPU", 3) == 0, cpu, "%s",
                     cumoe_handle_description(handle));
        cumoe_handle_destroy(handle);
    }
    cr_expect_eq(cumoe_handle_backend(NULL), CUMOE_BACKEND_AUTO);
    cr_expect_str_empty(cumoe_handle_description(NULL));
    cumoe_handle_destroy(NULL);
}

Test(handle, refusals)
{
    report_t report = {0};
    cumoe_handle_t *const untouched = (cumoe_handle_t *)(uintptr_t)0x1234;
    cumoe_handle_t *handle = untouched;
    const char *f = "cumoe_handle_create";
    expect_refusal(&report, cumoe_handle_create(NULL, CUMOE_BACKEND_CPU, 0), CUMOE_INVALID_ARGUMENT, f, "handle",
                   "NULL");
    expect_refusal(&report, cumoe_handle_create(&handle, (cumoe_backend_t)9, 0), CUMOE_INVALID_ARGUMENT, f,
                   "backend", "9");
    expect_refusal(&report, cumoe_handle_create(&handle, CUMOE_BACKEND_CPU, -1), CUMOE_INVALID_ARGUMENT, f,
                   "ordinal", "-1");
    expect_refusal(&report, cumoe_handle_create(&handle, CUMOE_BACKEND_CPU, 1), CUMOE_UNSUPPORTED_DEVICE, f,
                   "ordinal", "1");
    cr_expect_eq(cumoe_handle_create(&handle, CUMOE_BACKEND_CUDA, INT32_MAX), CUMOE_UNSUPPORTED_DEVICE);
    cr_expect(strncmp(cumoe_last_error(), f, strlen(f)) == 0, "%s", cumoe_last_error());
    cr_expect(handle == untouched);
    EXPECT_EMPTY(report);
}

Test(handle, memory)
{
    report_t report = {0};
    cumoe_handle_t *handle = suite_handle();
    void *const untouched = (void *)(uintptr_t)0x1234;
    void *ptr = untouched;
    const char *f = "cumoe_memory_alloc";
    expect_refusal(&report, cumoe_memory_alloc(NULL, 8, &ptr), CUMOE_INVALID_ARGUMENT, f, "handle", "NULL");
    expect_refusal(&report, cumoe_memory_alloc(handle, 8, NULL), CUMOE_INVALID_ARGUMENT, f, "ptr", "NULL");
    cr_expect_eq(cumoe_memory_alloc(handle, SIZE_MAX, &ptr), CUMOE_OUT_OF_MEMORY);
    cr_expect_eq(cumoe_memory_alloc(handle, SIZE_MAX - 200, &ptr), CUMOE_OUT_OF_MEMORY);
    cr_expect(ptr == untouched);
    cr_assert_eq(cumoe_memory_alloc(handle, 0, &ptr), CUMOE_SUCCESS);
    cr_expect_null(ptr);
    cumoe_memory_free(handle, ptr);
    for (size_t size = 1; size < 100000; size = size * 3 + 1) {
        cr_assert_eq(cumoe_memory_alloc(handle, size, &ptr), CUMOE_SUCCESS, "%s", cumoe_last_error());
        cr_expect_eq((uintptr_t)ptr % 256, 0);
        memset(ptr, 1, size);
        cumoe_memory_free(handle, ptr);
    }
    cumoe_handle_destroy(handle);
    EXPECT_EMPTY(report);
}

Test(handle, copy_and_set)
{
    report_t report = {0};
    cumoe_handle_t *handle = suite_handle();
    static const cumoe_copy_t kinds[] = {CUMOE_COPY_TO_DEVICE, CUMOE_COPY_TO_HOST, CUMOE_COPY_ON_DEVICE};
    char a[37] = "thirty-six characters and a nul byte", b[37];
    for (int i = 0; i < 3; i++) {
        memset(b, 0, sizeof b);
        cr_assert_eq(cumoe_memory_copy(handle, b + 1, a + 1, 30, kinds[i], NULL), CUMOE_SUCCESS);
        cr_expect(memcmp(a + 1, b + 1, 30) == 0 && b[0] == 0 && b[31] == 0);
        cr_expect_eq(cumoe_memory_copy(handle, NULL, NULL, 0, kinds[i], NULL), CUMOE_SUCCESS);
    }
    const char *f = "cumoe_memory_copy";
    cumoe_stream_t stream = (cumoe_stream_t)(uintptr_t)64;
    memset(b, 0x55, sizeof b);
    expect_refusal(&report, cumoe_memory_copy(NULL, b, a, 4, kinds[0], NULL), CUMOE_INVALID_ARGUMENT, f, "handle",
                   "NULL");
    expect_refusal(&report, cumoe_memory_copy(handle, NULL, a, 4, kinds[0], NULL), CUMOE_INVALID_ARGUMENT, f, "dst",
                   "NULL");
    expect_refusal(&report, cumoe_memory_copy(handle, b, NULL, 4, kinds[0], NULL), CUMOE_INVALID_ARGUMENT, f, "src",
                   "NULL");
    expect_refusal(&report, cumoe_memory_copy(handle, b, a, 4, (cumoe_copy_t)7, NULL), CUMOE_INVALID_ARGUMENT, f,
                   "kind", "7");
    expect_refusal(&report, cumoe_memory_copy(handle, b, a, 4, kinds[0], stream), CUMOE_INVALID_ARGUMENT, f,
                   "stream", NULL);
    for (size_t i = 0; i < sizeof b; i++) cr_expect_eq(b[i], 0x55);

    f = "cumoe_memory_set";
    cr_assert_eq(cumoe_memory_set(handle, b + 3, 0xaa, 5, NULL), CUMOE_SUCCESS);
    cr_expect(b[2] == 0x55 && (unsigned char)b[3] == 0xaa && (unsigned char)b[7] == 0xaa && b[8] == 0x55);
    expect_refusal(&report, cumoe_memory_set(NULL, b, 0, 4, NULL), CUMOE_INVALID_ARGUMENT, f, "handle", "NULL");
    expect_refusal(&report, cumoe_memory_set(handle, NULL, 0, 4, NULL), CUMOE_INVALID_ARGUMENT, f, "ptr", "NULL");
    expect_refusal(&report, cumoe_memory_set(handle, b, 256, 4, NULL), CUMOE_INVALID_ARGUMENT, f, "value", "256");
    expect_refusal(&report, cumoe_memory_set(handle, b, -1, 4, NULL), CUMOE_INVALID_ARGUMENT, f, "value", "-1");
    expect_refusal(&report, cumoe_memory_set(handle, b, 0, 4, stream), CUMOE_INVALID_ARGUMENT, f, "stream", NULL);
    cumoe_handle_destroy(handle);
    EXPECT_EMPTY(report);
}

Test(handle, streams)
{
    report_t report = {0};
    cumoe_handle_t *handle = suite_handle();
    cumoe_stream_t stream = (cumoe_stream_t)(uintptr_t)64;
    cr_expect_eq(cumoe_stream_synchronize(handle, NULL), CUMOE_SUCCESS);
    expect_refusal(&report, cumoe_stream_synchronize(NULL, NULL), CUMOE_INVALID_ARGUMENT,
                   "cumoe_stream_synchronize", "handle", "NULL");
    expect_refusal(&report, cumoe_stream_synchronize(handle, stream), CUMOE_INVALID_ARGUMENT,
                   "cumoe_stream_synchronize", "stream", NULL);
    expect_refusal(&report, cumoe_stream_create(NULL, &stream), CUMOE_INVALID_ARGUMENT, "cumoe_stream_create",
                   "handle", "NULL");
    expect_refusal(&report, cumoe_stream_create(handle, NULL), CUMOE_INVALID_ARGUMENT, "cumoe_stream_create",
                   "stream", "NULL");
    cr_assert_eq(cumoe_stream_create(handle, &stream), CUMOE_SUCCESS);
    cr_expect_null(stream);
    cumoe_stream_destroy(handle, stream);
    cumoe_handle_destroy(handle);
    EXPECT_EMPTY(report);
}

static void *use_handle(void *handle)
{
    for (int i = 0; i < 100; i++) {
        void *ptr = NULL;
        if (cumoe_memory_alloc(handle, 1000, &ptr) != CUMOE_SUCCESS) return handle;
        if (cumoe_memory_set(handle, ptr, i, 1000, NULL) != CUMOE_SUCCESS) return handle;
        cumoe_memory_free(handle, ptr);
    }
    return NULL;
}

Test(handle, shared_between_threads)
{
    cumoe_handle_t *handle = suite_handle();
    pthread_t threads[4];
    for (int i = 0; i < 4; i++) cr_assert_eq(pthread_create(&threads[i], NULL, use_handle, handle), 0);
    for (int i = 0; i < 4; i++) {
        void *failed;
        pthread_join(threads[i], &failed);
        cr_expect_null(failed);
    }
    cumoe_handle_destroy(handle);
}
