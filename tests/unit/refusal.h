/* A refused call: its status, and a sentence that names function, argument, value and rule. */
#ifndef CUMOE_TESTS_REFUSAL_H
#define CUMOE_TESTS_REFUSAL_H

#include "tests/support/compare.h"

#include <cumoe/status.h>
#include <string.h>

/* The sentence reads "function: argument ...value... , but ...". value may be NULL: then only NULL-ness and names.
 */
static inline void expect_refusal(report_t *report, cumoe_status_t actual, cumoe_status_t expected,
                                  const char *function, const char *argument, const char *value)
{
    const char *sentence = cumoe_last_error();
    const size_t length = strlen(function);
    if (actual != expected) {
        report_fail(report, "%s, %s = %s: %s, expected %s (last error: %s)", function, argument,
                    value ? value : "?", cumoe_status_name(actual), cumoe_status_name(expected), sentence);
        return;
    }
    const bool names_function = strncmp(sentence, function, length) == 0 && sentence[length] == ':';
    const bool names_rest = strstr(sentence, argument) && (!value || strstr(sentence, value));
    const bool names_rule = strstr(sentence, "but") || strstr(sentence, "is not");
    if (!names_function || !names_rest || !names_rule)
        report_fail(report, "the sentence should name %s, %s, %s and a rule, but is: %s", function, argument,
                    value ? value : "the value", sentence);
}

#endif
