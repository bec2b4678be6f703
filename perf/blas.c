/* OpenBLAS or cuBLAS, opened when the program runs: it starts without them, and what it needs of their headers is
 * declared here. */
#include "perf.h"

#include <dlfcn.h>
#include <stdlib.h>
#include <string.h>

/* cblas.h */
enum { ROW_MAJOR = 101, NO_TRANS = 111, TRANS = 112 };
typedef void sgemm_t(int order, int ta, int tb, int m, int n, int k, float alpha, const float *a, int lda,
                     const float *b, int ldb, float beta, float *c, int ldc);

/* cublas_v2.h, library_types.h */
enum {
    OP_N = 0,
    OP_T = 1,
    R_32F = 0,
    R_16F = 2,
    R_16BF = 14,
    COMPUTE_32F = 68,
    COMPUTE_32F_TF32 = 77,
    DEFAULT = -1
};
typedef int gemm_ex_t(void *handle, int ta, int tb, int m, int n, int k, const void *alpha, const void *a,
                      int a_type, int lda, const void *b, int b_type, int ldb, const void *beta, void *c,
                      int c_type, int ldc, int compute, int algorithm);
typedef int on_handle_t(void *handle);
typedef int on_pointer_t(void *handle, void *value);

struct blas {
    void *library;
    char name[200];
    sgemm_t *sgemm;
    gemm_ex_t *gemm_ex;
    on_handle_t *destroy;
    void *handle;
};

/* dlsym() gives an object's address; that of a function has the same bits. */
static bool find(const blas_t *blas, const char *name, void *function)
{
    void *address = dlsym(blas->library, name);
    memcpy(function, &address, sizeof address);
    return address != NULL;
}

static bool open_file(blas_t *blas, const char *file, const char *const *names, char *why, size_t why_size)
{
    if (file) blas->library = dlopen(file, RTLD_NOW);
    for (int i = 0; !file && names[i] && !blas->library; i++) blas->library = dlopen(names[i], RTLD_NOW);
    const char *said = blas->library ? NULL : dlerror();
    if (said) snprintf(why, why_size, "no dense products to compare with: %s", said);
    return blas->library != NULL;
}

/* What OpenBLAS calls the processors whose kernels this one can run. */
static const char *core_of_machine(void)
{
#ifdef __x86_64__
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw")) return "SkylakeX";
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return "Haswell";
#endif
    return NULL;
}

/* An OpenBLAS older than the processor takes it for a Prescott, whose kernels have a fifth of the speed: no
 * yardstick. It is opened again then, and told. */
static bool is_misled(const blas_t *blas)
{
    char *(*core)(void);
    return core_of_machine() && !getenv("OPENBLAS_CORETYPE") && find(blas, "openblas_get_corename", &core) &&
           strcmp(core(), "Prescott") == 0;
}

static bool open_cpu(blas_t *blas, int threads)
{
    void (*set_threads)(int);
    char *(*describe)(void);
    if (!find(blas, "cblas_sgemm", &blas->sgemm)) return false;
    if (threads > 0 && find(blas, "openblas_set_num_threads", &set_threads)) set_threads(threads);
    snprintf(blas->name, sizeof blas->name, "%s",
             find(blas, "openblas_get_config", &describe) ? describe() : "BLAS");
    return true;
}

static bool open_cuda(blas_t *blas, void *stream)
{
    on_handle_t *create;
    on_pointer_t *set_stream, *get_version;
    int version = 0;
    if (!find(blas, "cublasCreate_v2", &create) || !find(blas, "cublasSetStream_v2", &set_stream) ||
        !find(blas, "cublasGetVersion_v2", &get_version) || !find(blas, "cublasDestroy_v2", &blas->destroy) ||
        !find(blas, "cublasGemmEx", &blas->gemm_ex))
        return false;
    if (create(&blas->handle) || set_stream(blas->handle, stream) || get_version(blas->handle, &version))
        return false;
    snprintf(blas->name, sizeof blas->name, "cuBLAS %d.%d.%d", version / 10000, version / 100 % 100, version % 100);
    return true;
}

blas_t *blas_open(device_t *device, const char *file, char *why, size_t why_size)
{
    static const char *const on_cpu[] = {"libopenblas.so.0", "libopenblas.so", NULL};
    static const char *const on_cuda[] = {"libcublas.so.13", "libcublas.so", NULL};
    blas_t *blas = calloc(1, sizeof *blas);
    if (!blas) abort();
    bool opened = open_file(blas, file, device->cpu ? on_cpu : on_cuda, why, why_size);
    if (opened && device->cpu && is_misled(blas)) {
        dlclose(blas->library);
        blas->library = NULL;
        setenv("OPENBLAS_CORETYPE", core_of_machine(), 1);
        opened = open_file(blas, file, on_cpu, why, why_size);
    }
    if (opened) {
        if (device->cpu ? open_cpu(blas, device->threads) : open_cuda(blas, device->stream)) return blas;
        snprintf(why, why_size, "no dense products to compare with: the library lacks a function or refuses");
    }
    blas_close(blas);
    return NULL;
}

void blas_close(blas_t *blas)
{
    if (!blas) return;
    if (blas->handle) (void)blas->destroy(blas->handle);
    if (blas->library) dlclose(blas->library);
    free(blas);
}

const char *blas_name(const blas_t *blas)
{
    return blas->name;
}

int blas_type(const blas_t *blas, int type)
{
    return blas->sgemm ? TYPE_F32 : type;
}

void blas_product(blas_t *blas, int type, const product_t *p, const void *a, const void *b, void *c)
{
    static const float zero = 0, one = 1;
    const int m = (int)p->m, n = (int)p->n, k = (int)p->k, lda = p->a_transposed ? m : k,
              ldb = p->b_transposed ? k : n;
    if (blas->sgemm) {
        blas->sgemm(ROW_MAJOR, p->a_transposed ? TRANS : NO_TRANS, p->b_transposed ? TRANS : NO_TRANS, m, n, k, 1,
                    a, lda, b, ldb, p->add, c, n);
        return;
    }
    /* cuBLAS has columns first, and sees all three matrices transposed: c^T = b^T a^T. */
    const int element = type == TYPE_BF16 ? R_16BF : type == TYPE_F16 ? R_16F : R_32F;
    const int status = blas->gemm_ex(blas->handle, p->b_transposed ? OP_T : OP_N, p->a_transposed ? OP_T : OP_N, n,
                                     m, k, &one, b, element, ldb, a, element, lda, p->add ? &one : &zero, c,
                                     element, n, type == TYPE_TF32 ? COMPUTE_32F_TF32 : COMPUTE_32F, DEFAULT);
    if (status == 0) return;
    fprintf(stderr, "cumoe-perf: cublasGemmEx: status %d for [%d, %d] x [%d, %d]\n", status, m, k, k, n);
    exit(EXIT_FAILURE);
}
