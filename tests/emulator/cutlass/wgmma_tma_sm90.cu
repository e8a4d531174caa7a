// CUTLASS's tutorial GEMM with TMA, clusters of two and wgmma, from its own source file, callable from Python.
#define main example_main
// The example ends the process on an error; here the caller looks at it.
#define CUTE_CHECK_LAST()
#include "cute/tutorial/hopper/wgmma_tma_sm90.cu"
#undef main

// C = alpha * A * B^T + beta * C in half precision; C is column-major, layouts as gemm() takes them.
extern "C" int run_gemm(char trans_a, char trans_b, int m, int n, int k, float alpha, const void* a, int lda,
                        const void* b, int ldb, float beta, void* c, int ldc) {
  using Half = cute::half_t;
  gemm(trans_a, trans_b, m, n, k, Half(alpha), static_cast<const Half*>(a), lda, static_cast<const Half*>(b), ldb,
       Half(beta), static_cast<Half*>(c), ldc);
  return cudaGetLastError();
}
