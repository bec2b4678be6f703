/* A test is a program: it prints what fails, and its exit status says whether anything did. With
 * CUMOE_SIM_FAIL_FAST set it ends at the first failure. */
#ifndef CUMOE_SIM_CHECK_H
#define CUMOE_SIM_CHECK_H

#include <stdio.h>
#include <stdlib.h>

namespace check
{

inline int failures;

/* Print at most some of the failures. */
inline bool fail()
{
    return ++failures <= 20;
}

inline int result()
{
    if (failures) printf("%d failed\n", failures);
    return failures ? 1 : 0;
}

} // namespace check

#define EXPECT(condition, ...)                                                                                     \
    do {                                                                                                           \
        if (!(condition) && check::fail()) {                                                                       \
            printf("%s:%d: %s: ", __FILE__, __LINE__, #condition);                                                 \
            printf(__VA_ARGS__);                                                                                   \
            printf("\n");                                                                                          \
            if (getenv("CUMOE_SIM_FAIL_FAST")) exit(1);                                                            \
        }                                                                                                          \
    } while (0)

#endif
