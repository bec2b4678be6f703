/* Products by cuBLAS: dense ones of every type, and the grouped ones of the experts.
 *
 * cuBLAS is opened at run time: the program runs with any minor version of it, and without it these rows are left
 * out. */
#include "probe.cuh"
#include <cublas_v2.h>
#include <cublasLt.h>
#include <dlfcn.h>

#define LIBRARY_OF(name, major) "lib" name ".so." TEXT_OF(major)
#define TEXT_OF(macro)          TEXT(macro)
#define TEXT(x)                 #x
#define LT_FUNCTIONS(X)                                                                                            \
    X(cublasLtCreate)                                                                                              \
    X(cublasLtGetVersion)                                                                                          \
    X(cublasLtMatmul)                                                                                              \
    X(cublasLtMatmulAlgoGetHeuristic)                                                                              \
    X(cublasLtMatmulDescCreate)                                                                                    \
    X(cublasLtMatmulDescSetAttribute)                                                                              \
    X(cublasLtMatmulPreferenceCreate)                                                                              \
    X(cublasLtMatmulPreferenceSetAttribute)                                                                        \
    X(cublasLtMatrixLayoutCreate)
#define CUBLAS_FUNCTIONS(X) X(cublasCreate_v2) X(cublasSetStream_v2) X(cublasGemmGroupedBatchedEx)
#define DECLARE(name)       decltype(&::name) name;

static struct {
    LT_FUNCTIONS(DECLARE)
    CUBLAS_FUNCTIONS(DECLARE)
    cublasLtHandle_t lt;
    cublasHandle_t blas;
    void *workspace;
    size_t workspace_bytes;
} cublas;

#define CUBLAS(call)                                                                                               \
    do {                                                                                                           \
        const cublasStatus_t status_ = cublas.call;                                                                \
        if (status_ != CUBLAS_STATUS_SUCCESS) fail("cuBLAS: %s: status %d", #call, (int)status_);                  \
    } while (0)

/* The reason why cuBLAS cannot be used, or NULL. */
static const char *open_cublas()
{
    void *lt = dlopen(LIBRARY_OF("cublasLt", CUBLAS_VER_MAJOR), RTLD_NOW | RTLD_GLOBAL);
    void *blas = lt ? dlopen(LIBRARY_OF("cublas", CUBLAS_VER_MAJOR), RTLD_NOW) : NULL;
    if (!blas) return format("%s (its folder can be named in LD_LIBRARY_PATH)", dlerror());
#define FIND_LT(name)                                                                                              \
    if (!(cublas.name = (decltype(cublas.name))dlsym(lt, #name))) return "libcublasLt has no " #name;
#define FIND_BLAS(name)                                                                                            \
    if (!(cublas.name = (decltype(cublas.name))dlsym(blas, #name))) return "libcublas has no " #name;
    LT_FUNCTIONS(FIND_LT)
    CUBLAS_FUNCTIONS(FIND_BLAS)
    CUBLAS(cublasLtCreate(&cublas.lt));
    CUBLAS(cublasCreate_v2(&cublas.blas));
    CUBLAS(cublasSetStream_v2(cublas.blas, stream));
    cublas.workspace_bytes = (size_t)64 << 20;
    cublas.workspace = device_alloc(cublas.workspace_bytes);
    return NULL;
}

/* y = x w^T, one w per group: starts[g]..starts[g + 1] are the rows of group g. */
typedef struct product {
    void *x;     /* [rows, k] */
    void *w;     /* [groups, n, k] */
    void *y;     /* [rows, n] */
    int *starts; /* [groups + 1] */
    int groups, rows, n, k;
} product_t;

/* The worst of 4096 elements of y, in standard deviations of such a sum. NaN, which y starts with, is the worst. */
template <class In, class Out>
__global__ void error_kernel(product_t p, int *worst)
{
    const int row = hash(2 * blockIdx.x) % p.rows, column = hash(2 * blockIdx.x + 1) % p.n;
    int group = 0;
    while (p.starts[group + 1] <= row) group++;
    const In *x = (const In *)p.x + (int64_t)row * p.k;
    const In *w = (const In *)p.w + ((int64_t)group * p.n + column) * p.k;
    double sum = 0, squares = 0;
    for (int i = threadIdx.x; i < p.k; i += 32) {
        const double term = (double)(float)x[i] * (double)(float)w[i];
        sum += term;
        squares += term * term;
    }
    for (int lanes = 16; lanes > 0; lanes /= 2) {
        sum += __shfl_xor_sync(~0u, sum, lanes);
        squares += __shfl_xor_sync(~0u, squares, lanes);
    }
    const double y = (double)(float)((const Out *)p.y)[(int64_t)row * p.n + column];
    if (threadIdx.x == 0) atomicMax(worst, __float_as_int((float)(fabs(y - sum) / sqrt(squares))));
}

template <class In, class Out>
static void check_product(const char *what, const product_t *p)
{
    int *worst = (int *)device_alloc(sizeof(int));
    float error;
    CHECK(cudaMemsetAsync(worst, 0, sizeof(int), stream));
    error_kernel<In, Out><<<4096, 32, 0, stream>>>(*p, worst);
    CHECK(cudaMemcpyAsync(&error, worst, sizeof error, cudaMemcpyDefault, stream));
    CHECK(cudaStreamSynchronize(stream));
    CHECK(cudaFree(worst));
    if (!(error < 0.1f)) fail("%s: wrong result, off by %g standard deviations", what, (double)error);
}

typedef struct number_type {
    const char *name;
    cudaDataType_t in, out;
    cublasComputeType_t compute;
    size_t in_size, out_size;
    void (*fill)(void *, int64_t, uint32_t);
    void (*check)(const char *, const product_t *);
} number_type_t;

static const number_type_t number_types[] = {
    {"bf16", CUDA_R_16BF, CUDA_R_16BF, CUBLAS_COMPUTE_32F, 2, 2, fill<__nv_bfloat16>,
     check_product<__nv_bfloat16, __nv_bfloat16>},
    {"fp16", CUDA_R_16F, CUDA_R_16F, CUBLAS_COMPUTE_32F, 2, 2, fill<__half>, check_product<__half, __half>},
    {"tf32", CUDA_R_32F, CUDA_R_32F, CUBLAS_COMPUTE_32F_FAST_TF32, 4, 4, fill<float>, check_product<float, float>},
    {"fp32", CUDA_R_32F, CUDA_R_32F, CUBLAS_COMPUTE_32F, 4, 4, fill<float>, check_product<float, float>},
    {"fp8 e4m3", CUDA_R_8F_E4M3, CUDA_R_16BF, CUBLAS_COMPUTE_32F, 1, 2, fill<__nv_fp8_e4m3>,
     check_product<__nv_fp8_e4m3, __nv_bfloat16>},
};

/* False, with a sentence, if the memory is too small for it. */
static bool create_product(product_t *p, const char *what, const number_type_t *t, const std::vector<int> &starts,
                           int n, int k)
{
    *p = {};
    p->groups = (int)starts.size() - 1, p->rows = starts.back(), p->n = n, p->k = k;
    const int64_t x = (int64_t)p->rows * k, w = (int64_t)p->groups * n * k, y = (int64_t)p->rows * n;
    const size_t bytes = (x + w) * t->in_size + y * t->out_size;
    if (bytes > free_memory() / 10 * 9) {
        left_out("%s needs %.1f GiB, %.1f are free", what, bytes / GIB, free_memory() / GIB);
        return false;
    }
    p->x = device_alloc(x * t->in_size), p->w = device_alloc(w * t->in_size), p->y = device_alloc(y * t->out_size);
    p->starts = (int *)device_alloc(starts.size() * sizeof(int));
    CHECK(cudaMemcpy(p->starts, starts.data(), starts.size() * sizeof(int), cudaMemcpyHostToDevice));
    CHECK(cudaMemset(p->y, 0xff, y * t->out_size));
    t->fill(p->x, x, 1);
    t->fill(p->w, w, 2);
    return true;
}

static void free_product(product_t *p)
{
    for (void *pointer : {p->x, p->w, p->y, (void *)p->starts}) CHECK(cudaFree(pointer));
}

/* In the column-major terms of cuBLAS: y^T [n, rows] = (w^T [k, n])^T x^T [k, rows]. As one group. */
typedef struct dense {
    cublasLtMatmulDesc_t operation;
    cublasLtMatrixLayout_t w, x, y;
    cublasLtMatmulHeuristicResult_t choice;
} dense_t;

/* The descriptors are a few hundred bytes and live as long as the program. False: cuBLAS does not offer it. */
static bool create_dense(dense_t *d, const number_type_t *t, const product_t *p)
{
    const cublasOperation_t transposed = CUBLAS_OP_T;
    const int8_t fast = t->in == CUDA_R_8F_E4M3;
    CUBLAS(cublasLtMatmulDescCreate(&d->operation, t->compute, CUDA_R_32F));
    CUBLAS(
        cublasLtMatmulDescSetAttribute(d->operation, CUBLASLT_MATMUL_DESC_TRANSA, &transposed, sizeof transposed));
    CUBLAS(cublasLtMatmulDescSetAttribute(d->operation, CUBLASLT_MATMUL_DESC_FAST_ACCUM, &fast, sizeof fast));
    CUBLAS(cublasLtMatrixLayoutCreate(&d->w, t->in, p->k, p->n, p->k));
    CUBLAS(cublasLtMatrixLayoutCreate(&d->x, t->in, p->k, p->rows, p->k));
    CUBLAS(cublasLtMatrixLayoutCreate(&d->y, t->out, p->n, p->rows, p->n));
    cublasLtMatmulPreference_t preference;
    CUBLAS(cublasLtMatmulPreferenceCreate(&preference));
    CUBLAS(cublasLtMatmulPreferenceSetAttribute(preference, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES,
                                                &cublas.workspace_bytes, sizeof cublas.workspace_bytes));
    int found = 0;
    const cublasStatus_t status = cublas.cublasLtMatmulAlgoGetHeuristic(cublas.lt, d->operation, d->w, d->x, d->y,
                                                                        d->y, preference, 1, &d->choice, &found);
    return status == CUBLAS_STATUS_SUCCESS && found == 1;
}

static void run_dense(const dense_t *d, const product_t *p)
{
    const float one = 1, zero = 0;
    CUBLAS(cublasLtMatmul(cublas.lt, d->operation, &one, p->w, d->w, p->x, d->x, &zero, p->y, d->y, p->y, d->y,
                          &d->choice.algo, cublas.workspace, cublas.workspace_bytes, stream));
}

static double flops(const product_t *p)
{
    return 2.0 * p->rows * p->n * p->k;
}

static void probe_dense_type(const number_type_t *t)
{
    for (int size : {1024, 2048, 4096, 8192, 16384}) {
        const char *what = format("%s %d^3, random", t->name, size);
        product_t p;
        dense_t d;
        if (!create_product(&p, what, t, {0, size}, size, size)) continue;
        if (create_dense(&d, t, &p)) {
            run_dense(&d, &p);
            t->check(what, &p);
            row_rate("dense", what, flops(&p), "TFLOP/s", measure(WARM, [&] { run_dense(&d, &p); }));
            if (size == 4096 || size == 8192) {
                CHECK(cudaMemset(p.x, 0, (int64_t)size * size * t->in_size));
                CHECK(cudaMemset(p.w, 0, (int64_t)size * size * t->in_size));
                row_rate("dense", format("%s %d^3, zeros", t->name, size), flops(&p), "TFLOP/s",
                         measure(WARM, [&] { run_dense(&d, &p); }));
            }
        } else {
            left_out("%s: cuBLAS does not offer it on this device", what);
        }
        free_product(&p);
    }
}

typedef struct shape {
    const char *name;
    int T, H, I, E, K;
} shape_t;

/* The names are those of perf/peers/. */
static const shape_t shapes[] = {
    {"qwen3-30b", 32768, 2048, 768, 128, 8},   {"olmoe", 32768, 2048, 1024, 64, 8},
    {"120b-n1024", 32768, 4096, 1024, 128, 8}, {"qwen3-next", 32768, 2048, 512, 512, 10},
    {"mixtral", 4096, 4096, 14336, 8, 2},      {"deepseek-v3", 4096, 7168, 2048, 256, 8},
};

/* What the grouped product takes, in device memory: [3, groups] pointers to w, x and y of each group. */
static void **expert_pointers(const product_t *p, const std::vector<int> &starts)
{
    std::vector<void *> pointers(3 * p->groups);
    for (int g = 0; g < p->groups; g++) {
        pointers[g] = (__nv_bfloat16 *)p->w + (int64_t)g * p->n * p->k;
        pointers[p->groups + g] = (__nv_bfloat16 *)p->x + (int64_t)starts[g] * p->k;
        pointers[2 * p->groups + g] = (__nv_bfloat16 *)p->y + (int64_t)starts[g] * p->n;
    }
    void **copied = (void **)device_alloc(pointers.size() * sizeof(void *));
    CHECK(cudaMemcpy(copied, pointers.data(), pointers.size() * sizeof(void *), cudaMemcpyHostToDevice));
    return copied;
}

static cublasStatus_t run_grouped(const product_t *p, const std::vector<int> &starts, void **pointers)
{
    const int groups = p->groups;
    std::vector<cublasOperation_t> transposed(groups, CUBLAS_OP_T), plain(groups, CUBLAS_OP_N);
    std::vector<int> rows(groups), n(groups, p->n), k(groups, p->k), ones(groups, 1);
    std::vector<float> one(groups, 1), zero(groups, 0);
    for (int g = 0; g < groups; g++) rows[g] = starts[g + 1] - starts[g];
    return cublas.cublasGemmGroupedBatchedEx(
        cublas.blas, transposed.data(), plain.data(), n.data(), rows.data(), k.data(), one.data(), pointers,
        CUDA_R_16BF, k.data(), pointers + groups, CUDA_R_16BF, k.data(), zero.data(), pointers + 2 * groups,
        CUDA_R_16BF, n.data(), groups, ones.data(), CUBLAS_COMPUTE_32F);
}

static void probe_grouped_shape(const shape_t *s)
{
    const number_type_t *bf16 = &number_types[0];
    std::vector<int> starts(s->E + 1); /* of the rows of each expert, under uniform random routing */
    for (int i = 0; i < s->T * s->K; i++) starts[hash(i) % s->E + 1]++;
    for (int e = 0; e < s->E; e++) starts[e + 1] += starts[e];
    for (bool up : {true, false}) {
        const int n = up ? 2 * s->I : s->H, k = up ? s->H : s->I;
        const char *what = format("%s, [%d, %d] to %d, %d experts", s->name, s->T * s->K, k, n, s->E);
        product_t p;
        dense_t d;
        if (!create_product(&p, what, bf16, starts, n, k)) continue;
        void **pointers = expert_pointers(&p, starts);
        const cublasStatus_t status = run_grouped(&p, starts, pointers);
        if (status == CUBLAS_STATUS_SUCCESS) {
            bf16->check(what, &p);
            row_rate("grouped", what, flops(&p), "TFLOP/s",
                     measure(COLD, [&] { run_grouped(&p, starts, pointers); }));
        } else {
            left_out("%s: cublasGemmGroupedBatchedEx: status %d", what, (int)status);
        }
        if (create_dense(&d, bf16, &p))
            row_rate("grouped", format("%s, one matrix for all rows", what), flops(&p), "TFLOP/s",
                     measure(COLD, [&] { run_dense(&d, &p); }));
        CHECK(cudaFree(pointers));
        free_product(&p);
    }
}

/* Opens cuBLAS for the group that comes first. */
static bool has_cublas()
{
    static bool asked;
    if (asked) return cublas_version != 0;
    asked = true;
    if (const char *reason = open_cublas()) {
        left_out("dense and grouped: %s", reason);
    } else {
        cublas_version = (int)cublas.cublasLtGetVersion();
    }
    return cublas_version != 0;
}

void probe_dense()
{
    if (!has_cublas()) return;
    for (const number_type_t &t : number_types) probe_dense_type(&t);
}

void probe_grouped()
{
    if (!has_cublas()) return;
    for (const shape_t &s : shapes) probe_grouped_shape(&s);
}
