/* The library prints nothing, whatever it is asked. */
#include "tests/suite.h"

#include <stdio.h>
#include <unistd.h>

static void make_calls(void)
{
    report_t report = {0};
    static const layer_case_t layer_case = {"silence", 33, 12, 14, 6, 2, .pattern = PATTERN_NONFINITE_TOKENS};
    const problem_options_t options = {
        .dtype = CUMOE_F32, .variant = GATE_VARIANTS[VARIANT_NOISY], .without_reference = true};
    cumoe_handle_t *handle = suite_handle();
    problem_t p;
    cr_assert(problem_create(&p, handle, &layer_case, &options, &report));
    cr_assert_eq(cumoe_layer_forward(p.layer, &p.forward, NULL), CUMOE_SUCCESS);
    cr_assert_eq(cumoe_layer_backward(p.layer, &p.backward, NULL), CUMOE_SUCCESS);
    p.forward.workspace_size = 0;
    cr_assert_eq(cumoe_layer_forward(p.layer, &p.forward, NULL), CUMOE_BUFFER_TOO_SMALL);
    cr_assert_eq(cumoe_layer_forward(NULL, NULL, NULL), CUMOE_INVALID_ARGUMENT);
    cumoe_handle_t *cuda = NULL;
    cr_assert_eq(cumoe_handle_create(&cuda, CUMOE_BACKEND_CUDA, 0), CUMOE_UNSUPPORTED_DEVICE);
    problem_destroy(&p);
    cumoe_handle_destroy(handle);
}

Test(silence, nothing_is_printed)
{
    FILE *file = tmpfile();
    cr_assert_not_null(file);
    fflush(stdout);
    fflush(stderr);
    const int old_out = dup(STDOUT_FILENO), old_err = dup(STDERR_FILENO);
    cr_assert(old_out >= 0 && old_err >= 0);
    cr_assert(dup2(fileno(file), STDOUT_FILENO) >= 0 && dup2(fileno(file), STDERR_FILENO) >= 0);
    make_calls();
    fflush(stdout);
    fflush(stderr);
    cr_assert(dup2(old_out, STDOUT_FILENO) >= 0 && dup2(old_err, STDERR_FILENO) >= 0);
    close(old_out);
    close(old_err);
    cr_expect_eq(fseek(file, 0, SEEK_END), 0);
    cr_expect_eq(ftell(file), 0, "%ld bytes were printed", ftell(file));
    fclose(file);
}
