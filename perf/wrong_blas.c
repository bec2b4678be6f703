/* A library for dense products that makes none: cumoe-perf must notice (perf_test.sh). And like an old OpenBLAS it
 * knows no processor unless it is told. */
#include <stdlib.h>

char *openblas_get_corename(void);
char *openblas_get_config(void);
void cblas_sgemm(int order, int ta, int tb, int m, int n, int k, float alpha, const float *a, int lda,
                 const float *b, int ldb, float beta, float *c, int ldc);

static char *core;

__attribute__((constructor)) static void begin(void)
{
    static char oldest[] = "Prescott";
    core = getenv("OPENBLAS_CORETYPE");
    if (!core) core = oldest;
}

char *openblas_get_corename(void)
{
    return core;
}

char *openblas_get_config(void)
{
    return core;
}

void cblas_sgemm(int order, int ta, int tb, int m, int n, int k, float alpha, const float *a, int lda,
                 const float *b, int ldb, float beta, float *c, int ldc)
{
    (void)order, (void)ta, (void)tb, (void)k, (void)alpha, (void)a, (void)lda, (void)b, (void)ldb, (void)beta;
    for (int i = 0; i < m; i++)
        for (int j = 0; j < n; j++) c[(long)i * ldc + j] = 0;
}
