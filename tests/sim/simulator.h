/* The simulator, as a test sees it: the knobs. Everything else is the CUDA runtime's own interface.
 *
 * The files of cuda/ are compiled by g++ with tests/sim/stand_in in front, and their kernels run here: a CUDA
 * thread is a fiber, blocks run one after another, and the order of blocks and threads is shuffled by a seed. The
 * compiler's hooks for data races (-fsanitize=thread, without its library) show every load and store of a kernel,
 * so that the simulator knows for each byte of shared memory who wrote and read it since which barrier, and for
 * each access to global memory whether it is inside an allocation and what else the launch did there.
 *
 * Everything happens as late as the rules allow: work in a stream when somebody waits for the stream, a cp.async
 * when its thread waits for the group. A mistake becomes a report: one sentence with kernel, block, thread, file
 * and line. It ends the launch, and the process as well unless reports are held.
 *
 * Not looked for: accesses through calls of memcpy and the like, races between launches, performance. */
#ifndef CUMOE_SIM_SIMULATOR_H
#define CUMOE_SIM_SIMULATOR_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* Seed of the order of blocks and threads; at the start that of the environment variable CUMOE_SIM_SEED, or 1. */
void sim_set_seed(uint64_t seed);

/* COUNT devices of compute capability MAJOR.MINOR with MEMORY bytes each, 0 = taken by others. At the start one of
 * 8.0 with 80 GiB. */
void sim_set_devices(int count, int major, int minor, size_t memory);

/* The CALL-th call of the runtime from now on fails, and nothing else of it happens; 0 = none. */
void sim_fail_call(int64_t call);

/* Calls of the runtime so far. */
int64_t sim_num_calls(void);

/* Allocations, streams, events and graphs that are alive. */
int64_t sim_num_objects(void);

/* Whether a report is held for sim_take_report instead of ending the process. */
void sim_hold_reports(int hold);

/* The first report since the last call, or "". Valid until the next report. */
const char *sim_take_report(void);

#ifdef __cplusplus
}
#endif

#endif
