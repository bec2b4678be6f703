/* The allocator that the static library and these tests call, wrapped by the linker: it counts, and fails on
 * demand. Other libraries, OpenMP's among them, are not seen. */
#ifndef CUMOE_TESTS_ALLOCATION_H
#define CUMOE_TESTS_ALLOCATION_H

/* Allocations since the last call of this function. */
long allocation_count(void);

/* Blocks that are allocated and not freed. */
long allocation_live(void);

/* The n-th allocation from now (from 1) fails, and no other; 0 = none. */
void allocation_fail(long n);

/* Has the one that was to fail been reached? */
int allocation_failed(void);

#endif
