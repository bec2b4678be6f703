/* The five functions of cuBLAS that blas.c calls, on the CPU, for the simulator: whether the call says what is
 * meant (transposes, leading dimensions, types) can be told without a GPU. */
#include <stdint.h>
#include <string.h>

enum { R_32F = 0, R_16F = 2, OP_T = 1 };
__extension__ typedef _Float16 half_t;

typedef struct matrix {
    void *values;
    int type, rows; /* columns first: element (i, j) at i + j rows */
} matrix_t;

static float get(const matrix_t *m, int i, int j)
{
    const int64_t at = i + (int64_t)j * m->rows;
    if (m->type == R_32F) return ((const float *)m->values)[at];
    if (m->type == R_16F) return (float)((const half_t *)m->values)[at];
    const uint32_t bits = (uint32_t)((const uint16_t *)m->values)[at] << 16;
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

static void put(const matrix_t *m, int i, int j, float value)
{
    const int64_t at = i + (int64_t)j * m->rows;
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    if (m->type == R_32F) {
        ((float *)m->values)[at] = value;
    } else if (m->type == R_16F) {
        ((half_t *)m->values)[at] = (half_t)value;
    } else {
        ((uint16_t *)m->values)[at] = (uint16_t)(bits >> 16);
    }
}

int cublasCreate_v2(void **handle);
int cublasDestroy_v2(void *handle);
int cublasSetStream_v2(void *handle, void *stream);
int cublasGetVersion_v2(void *handle, int *version);
int cublasGemmEx(void *handle, int ta, int tb, int m, int n, int k, const float *alpha, void *a, int a_type,
                 int lda, void *b, int b_type, int ldb, const float *beta, void *c, int c_type, int ldc,
                 int compute, int algorithm);

int cublasCreate_v2(void **handle)
{
    static int none;
    *handle = &none;
    return 0;
}

int cublasDestroy_v2(void *handle)
{
    return handle == NULL;
}

int cublasSetStream_v2(void *handle, void *stream)
{
    (void)stream;
    return handle == NULL;
}

int cublasGetVersion_v2(void *handle, int *version)
{
    *version = 0;
    return handle == NULL;
}

int cublasGemmEx(void *handle, int ta, int tb, int m, int n, int k, const float *alpha, void *a, int a_type,
                 int lda, void *b, int b_type, int ldb, const float *beta, void *c, int c_type, int ldc,
                 int compute, int algorithm)
{
    const matrix_t left = {a, a_type, lda}, right = {b, b_type, ldb}, out = {c, c_type, ldc};
    if (lda < (ta == OP_T ? k : m) || ldb < (tb == OP_T ? n : k) || ldc < m)
        return 7; /* CUBLAS_STATUS_INVALID_VALUE */
    if ((compute != 68 && compute != 77) || (compute == 77 && a_type != R_32F)) return 15;
    (void)handle, (void)algorithm;
    for (int j = 0; j < n; j++) {
        for (int i = 0; i < m; i++) {
            float sum = *beta == 0 ? 0 : *beta * get(&out, i, j);
            for (int l = 0; l < k; l++)
                sum += *alpha * (ta == OP_T ? get(&left, l, i) : get(&left, i, l)) *
                       (tb == OP_T ? get(&right, j, l) : get(&right, l, j));
            put(&out, i, j, sum);
        }
    }
    return 0;
}
