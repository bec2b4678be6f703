/* A report: where it happened, in the words of the source. */
#include "tests/sim/core.h"
#include "tests/sim/simulator.h"

#include <dlfcn.h>
#include <link.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

namespace sim
{

namespace
{

bool hold;
char first_report[2048], taken[2048];

/* The innermost of the functions inlined at the address that is neither a stand-in nor the arena's helper. */
void look_up(const void *address, char *function, char *file_line, size_t bytes)
{
    snprintf(function, bytes, "?");
    snprintf(file_line, bytes, "?");
    Dl_info info;
    link_map *map;
    if (!dladdr1(address, &info, reinterpret_cast<void **>(&map), RTLD_DL_LINKMAP)) return;
    char file[512] = "", command[1024]; // the file by name: /proc/self would be the shell's
    if (*map->l_name)
        snprintf(file, sizeof file, "%s", map->l_name);
    else if (readlink("/proc/self/exe", file, sizeof file - 1) < 0)
        return;
    snprintf(command, sizeof command, "addr2line -Cfie '%s' 0x%zx 2>/dev/null", file,
             reinterpret_cast<size_t>(address) - map->l_addr);
    FILE *pipe = popen(command, "r");
    if (!pipe) return;
    char name[512], line[512];
    bool found = false;
    while (fgets(name, sizeof name, pipe) && fgets(line, sizeof line, pipe)) {
        if (found || strstr(line, "/stand_in/") || strstr(line, "/shared.cuh:")) continue;
        found = true;
        name[strcspn(name, "\n")] = 0;
        line[strcspn(line, " \n")] = 0;
        const char *slash = strrchr(line, '/');
        snprintf(file_line, bytes, "%s", slash ? slash + 1 : line);
        snprintf(function, bytes, "%s", name);
    }
    pclose(pipe);
}

/* "void cumoe::(anonymous namespace)::scan_kernel<4>(int*)" is scan_kernel<4>. */
void kernel_name(char *out, size_t bytes)
{
    char function[512], file_line[512];
    look_up(block.kernel->body->kernel, function, file_line, sizeof function);
    char *begin = function;
    for (const char *prefix : {"void ", "cumoe::", "(anonymous namespace)::"}) {
        const size_t length = strlen(prefix);
        if (strncmp(begin, prefix, length) == 0) begin += length;
    }
    begin[strcspn(begin, "(")] = 0;
    snprintf(out, bytes, "%.*s", static_cast<int>(bytes) - 1, begin);
}

void print_index(char *out, size_t bytes, const char *what, const uint3 &index, const dim3 &size)
{
    if (size.y == 1 && size.z == 1)
        snprintf(out, bytes, "%s %u", what, index.x);
    else
        snprintf(out, bytes, "%s (%u, %u, %u)", what, index.x, index.y, index.z);
}

void keep(const char *sentence)
{
    if (!hold) {
        fprintf(stderr, "%s (CUMOE_SIM_SEED=%llu)\n", sentence, static_cast<unsigned long long>(seed()));
        abort();
    }
    if (!*first_report) snprintf(first_report, sizeof first_report, "%s", sentence);
}

void report_v(const Thread *thread, const void *pc, const char *format, va_list list)
{
    char sentence[1024], text[2048];
    vsnprintf(sentence, sizeof sentence, format, list);
    if (!block.kernel) { // host code of cuda/
        snprintf(text, sizeof text, "host at %s: %s", place(pc), sentence);
        keep(text);
        return;
    }
    char kernel[256], block_name[64], thread_name[64];
    kernel_name(kernel, sizeof kernel);
    const dim3 size = block.kernel->block;
    const unsigned rank = thread->rank;
    print_index(block_name, sizeof block_name, "block", blockIdx, block.kernel->grid);
    print_index(thread_name, sizeof thread_name, "thread",
                uint3{rank % size.x, rank / size.x % size.y, rank / size.x / size.y}, size);
    snprintf(text, sizeof text, "%s, %s, %s at %s: %s", kernel, block_name, thread_name, place(pc), sentence);
    keep(text);
    block.failed = true;
    if (block.thread) fiber_leave(&block.thread->fiber);
}

} // namespace

const char *place(const void *pc)
{
    static char answer[4][256];
    static unsigned next;
    char *mine = answer[next++ % 4];
    char function[256];
    look_up(static_cast<const char *>(pc) - 1, function, mine, sizeof function); // the call, not what follows it
    return mine;
}

void report_for(const Thread *thread, const void *pc, const char *format, ...)
{
    va_list list;
    va_start(list, format);
    if (block.thread) block.thread->quiet = true;
    report_v(thread, pc, format, list);
    va_end(list);
}

void report(const void *pc, const char *format, ...)
{
    va_list list;
    va_start(list, format);
    if (block.thread) block.thread->quiet = true;
    report_v(block.thread, pc, format, list);
    va_end(list);
}

} // namespace sim

void sim_hold_reports(int hold)
{
    sim::hold = hold;
}

const char *sim_take_report(void)
{
    snprintf(sim::taken, sizeof sim::taken, "%s", sim::first_report);
    *sim::first_report = 0;
    return sim::taken;
}
