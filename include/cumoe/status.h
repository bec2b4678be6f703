/* What a call answers: a status that says which kind of "no", and a sentence that says why. */
#ifndef CUMOE_STATUS_H
#define CUMOE_STATUS_H

#include <cumoe/version.h>

#if defined(__GNUC__)
#define CUMOE_API       __attribute__((visibility("default")))
#define CUMOE_NODISCARD __attribute__((warn_unused_result))
#else
#define CUMOE_API
#define CUMOE_NODISCARD
#endif

#ifdef __cplusplus
extern "C" {
#endif

/* Name, value (never reused), meaning. */
#define CUMOE_STATUS_MAP(X)                                                                                        \
    X(SUCCESS, 0, "success")                                                                                       \
    X(INVALID_ARGUMENT, 1, "an argument is wrong, on every device")                                                \
    X(UNSUPPORTED_CONFIG, 2, "valid, but no kernel covers this kind, type or shape")                               \
    X(UNSUPPORTED_DEVICE, 3, "valid, but not on this device")                                                      \
    X(BUFFER_TOO_SMALL, 4, "workspace, saved or state is smaller than the size query said")                        \
    X(OUT_OF_MEMORY, 5, "host or device memory is exhausted")                                                      \
    X(CUDA_ERROR, 6, "a CUDA call failed")                                                                         \
    X(COMM_ERROR, 7, "a communication call failed")                                                                \
    X(INTERNAL_ERROR, 8, "a bug in this library")

typedef enum cumoe_status {
#define CUMOE_STATUS_ENTRY(name, value, text) CUMOE_##name = value,
    CUMOE_STATUS_MAP(CUMOE_STATUS_ENTRY)
#undef CUMOE_STATUS_ENTRY
        CUMOE_STATUS_FORCE_INT = 0x7fffffff
} cumoe_status_t;

/* The identifier of a status ("CUMOE_INVALID_ARGUMENT"); "CUMOE_UNKNOWN_STATUS" for any other number.
 *
 * Allocates: no.  Synchronizes: no.  Capturable: yes.  Thread-safe: yes. */
CUMOE_API const char *cumoe_status_name(cumoe_status_t status);

/* The sentence of the last call that failed in this thread, "" before the first. Function, argument,
 * value and rule: "cumoe_layer_create: config.top_k = 9, but must be 1..8 (num_experts)". Never NULL; valid
 * until the next failing call in this thread; a call that succeeds does not change it.
 *
 * Allocates: no.  Synchronizes: no.  Capturable: yes.  Thread-safe: yes (one sentence a thread). */
CUMOE_API const char *cumoe_last_error(void);

/* CUMOE_VERSION of the library that was loaded; compare with the headers' when in doubt.
 *
 * Allocates: no.  Synchronizes: no.  Capturable: yes.  Thread-safe: yes. */
CUMOE_API int cumoe_version(void);

#ifdef __cplusplus
}
#endif
#endif
