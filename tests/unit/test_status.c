/* Statuses, the last error of a thread, the version. */
#include "tests/unit/refusal.h"

#include <criterion/criterion.h>
#include <cumoe/cumoe.h>
#include <pthread.h>
#include <stdio.h>

Test(status, every_status_has_its_name)
{
#define CHECK_NAME(name, value, text)                                                                              \
    cr_expect_str_eq(cumoe_status_name(CUMOE_##name), "CUMOE_" #name);                                             \
    cr_expect_eq((int)CUMOE_##name, value);
    CUMOE_STATUS_MAP(CHECK_NAME)
#undef CHECK_NAME
    cr_expect_str_eq(cumoe_status_name((cumoe_status_t)99), "CUMOE_UNKNOWN_STATUS");
    cr_expect_str_eq(cumoe_status_name((cumoe_status_t)-1), "CUMOE_UNKNOWN_STATUS");
}

Test(status, version_is_that_of_the_headers)
{
    cr_expect_eq(cumoe_version(), CUMOE_VERSION);
}

Test(status, last_error_starts_empty_and_survives_success)
{
    cumoe_config_t config;
    cr_expect_str_empty(cumoe_last_error());
    cr_expect_eq(cumoe_config_init(NULL), CUMOE_INVALID_ARGUMENT);
    char sentence[512];
    snprintf(sentence, sizeof sentence, "%s", cumoe_last_error());
    cr_expect(strncmp(sentence, "cumoe_config_init", strlen("cumoe_config_init")) == 0, "%s", sentence);
    cr_expect_eq(cumoe_config_init(&config), CUMOE_SUCCESS);
    cr_expect_str_eq(cumoe_last_error(), sentence);
}

static void *other_thread(void *sentence)
{
    snprintf(sentence, 512, "%s", cumoe_last_error());
    (void)!cumoe_handle_create(NULL, CUMOE_BACKEND_CPU, 0);
    return NULL;
}

Test(status, last_error_belongs_to_its_thread)
{
    cumoe_handle_t *handle = NULL;
    cr_assert_eq(cumoe_handle_create(&handle, CUMOE_BACKEND_CPU, 12345), CUMOE_UNSUPPORTED_DEVICE);
    char mine[512], theirs[512] = "not called";
    snprintf(mine, sizeof mine, "%s", cumoe_last_error());
    pthread_t thread;
    cr_assert_eq(pthread_create(&thread, NULL, other_thread, theirs), 0);
    pthread_join(thread, NULL);
    cr_expect_str_empty(theirs);
    cr_expect_str_eq(cumoe_last_error(), mine);
}
