/* What the instructions of cuda/ptx.cuh give on a device, for cumoe-check. */
#ifndef CUMOE_SIM_PRINT_INSTRUCTIONS_H
#define CUMOE_SIM_PRINT_INSTRUCTIONS_H

#ifdef __cplusplus
extern "C" {
#endif

/* Print a line for each instruction: its name and a hash of what it gave on the device ORDINAL, or for an
 * approximation the words themselves. On a GPU that output is a golden file; what differs from golden files, NULL
 * at their end, is an error. The program's exit status: 0, 1 something differs, 2 a file or the device cannot be
 * used. */
int print_instructions(int ordinal, char **golden);

#ifdef __cplusplus
}
#endif

#endif
