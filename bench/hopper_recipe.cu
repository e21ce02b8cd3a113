// The block-scaled product of hopper.cu as a function of a shared library, for hopper_recipe_chain.py.

#include "hopper.cu"

// a (m, k), b (n, k) E4M3 codes, sa (m, k/128), sb (n, k/128)  ->  d (m, n), all on the device; 0 if it ran.
extern "C" int product(const uint8_t* a, const float* sa, const uint8_t* b, const float* sb, float* d, int m, int n,
                       int k) {
    cudaMemset(d, 0, size_t(m) * n * sizeof(float));  // where the kernel reads its first accumulator
    wgmma_kernel<E4M3_E4M3><<<dim3(n / 8, m / 64), 128>>>(a, b, d, sa, sb, d, n, k);
    if (cudaGetLastError() != cudaSuccess) return 1;
    return cudaDeviceSynchronize() != cudaSuccess;
}
