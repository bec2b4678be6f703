#include "options.h"
#include "command_line.h"

#include <omp.h>
#include <stddef.h>

const char *const dtype_names[] = {"f32", "bf16", "f16", NULL};

options_t options_parse(int argc, char **argv)
{
    options_t o = {4096, 512, 1024, 32, 4, F32, omp_get_max_threads(), 9, NULL};
    const option_t table[] = {
        {"tokens", "T, tokens in a call", .number = &o.tokens, .min = 1, .max = 1 << 20},
        {"hidden", "H, width of the model", .number = &o.hidden, .min = 1, .max = 1 << 16},
        {"intermediate", "I, width inside an expert", .number = &o.intermediate, .min = 1, .max = 1 << 16},
        {"experts", "E, number of experts", .number = &o.experts, .min = 1, .max = 1 << 12},
        {"top-k", "K, experts per token", .number = &o.top_k, .min = 1, .max = 64},
        {"dtype", "of tokens and experts; 16 bits: against the layer in f32", .choice = &o.dtype,
         .words = dtype_names},
        {"threads", "threads of every contestant", .number = &o.threads, .min = 1, .max = 1024},
        {"repeat", "timed rounds", .number = &o.repeat, .min = 1, .max = 1000},
        {"json", "FILE: write all figures to it as well", .string = &o.json},
    };
    const program_t program = {
        "cumoe-perf-cpu",
        "the layer on the CPU against OpenBLAS, forward and backward, ReLU and SwiGLU\n\n"
        "Prints a Markdown table; perf/README.md says what its columns mean. Exits with 1 if results disagree.",
        table, sizeof table / sizeof *table};
    command_line_read(&program, argc, argv);
    if (o.top_k > o.experts) command_line_fail(&program, "--top-k", NULL, "must not be larger than --experts");
    return o;
}
