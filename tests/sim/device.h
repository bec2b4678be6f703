/* What the stand-ins call from inside a kernel, and how a launch reaches the simulator. */
#ifndef CUMOE_SIM_DEVICE_H
#define CUMOE_SIM_DEVICE_H

#include <cuda_runtime_api.h>
#include <memory>
#include <stddef.h>
#include <stdint.h>

namespace sim
{

/* A kernel with its arguments. The arguments are memory that the kernel may read. */
struct Body {
    virtual ~Body() = default;
    virtual void run() const = 0;
    size_t bytes;       // of the whole object
    const void *kernel; // its code, for reports
};

cudaError_t launch(const cudaLaunchConfig_t &config, std::unique_ptr<const Body> body);

/* The shared array that SharedArena puts at OFFSET: kept apart from its neighbours by gaps that nobody may touch.
 * On the host nothing that could be used. */
void *carve(size_t offset, size_t bytes);

/* Barrier 0 is the whole block's; of the others THREADS is the number of those who wait or only arrive. */
void barrier(const char *name, int id, int threads, bool wait);

/* The lanes of MASK come together, and the last one does the work of all: from in[] to out[], [32] each, of which
 * those of the mask are set. An ALIGNED instruction must be one and the same for all; one that ORDERS also orders
 * memory. */
typedef void combine_t(const void *const *in, void *const *out, uint32_t mask);
enum { ALIGNED = 1, ORDERS = 2 };
void collective(const char *name, uint32_t mask, int flags, const void *in, void *out, combine_t *combine);
[[noreturn]] void lane_without_source(int lane, int source); // from a combine_t: a report

/* Of a lane, for multiply_*: out is d = a b + c. For load_matrices* in is a row's address, and out tile [4]. */
struct Fragments {
    float c[4];
    uint32_t a[4], b[2];
};
combine_t multiply_bf16, multiply_f16, multiply_tf32, load_matrices, load_matrices_trans;

enum class Atomic { ADD, MIN, MAX, CAS };
uint64_t atomic(Atomic operation, void *address, size_t bytes, uint64_t value, uint64_t expected);

/* One access of BYTES to global memory: the compiler's hooks would show that of a struct as several. */
void load_vector(void *to, const void *global, size_t bytes);
void store_vector(void *global, const void *from, size_t bytes);

void copy(void *shared, const void *global, int bytes, int source_bytes);
void copy_commit();
void copy_wait(int pending);

/* The calling thread reads 16 bytes of shared memory on behalf of an instruction of its warp. */
void read_row(const void *address);

} // namespace sim

#endif
