/* Refusals: a status and a sentence, in one line at the place where the rule is. */
#ifndef CUMOE_ERROR_H
#define CUMOE_ERROR_H

#include <cumoe/status.h>

#ifdef __cplusplus
extern "C" {
#endif

/* Store the sentence for this thread and give the status back. */
cumoe_status_t cumoe__fail(cumoe_status_t status, const char *format, ...)
    __attribute__((format(printf, 2, 3), cold));

/* The caller must have done this; status is given without its prefix. */
#define CUMOE_REQUIRE(condition, status, ...)                                                                      \
    do {                                                                                                           \
        if (!(condition)) return cumoe__fail(CUMOE_##status, __VA_ARGS__);                                         \
    } while (0)

/* Pass a failure on; its sentence stands already. */
#define CUMOE_TRY(call)                                                                                            \
    do {                                                                                                           \
        const cumoe_status_t status_ = (call);                                                                     \
        if (status_ != CUMOE_SUCCESS) return status_;                                                              \
    } while (0)

#ifdef __cplusplus
}
#endif
#endif
