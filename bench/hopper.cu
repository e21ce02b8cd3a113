// Runs matrix products on the tensor cores of a Hopper GPU, for hopper.py:   hopper INPUT OUTPUT
//
// INPUT is a sequence of jobs.  A job is six int32 (operation, M, N, bytes of a row of K, 1 if scaled, 0), then
// A (M, K), B (N, K), C (M, N) float32, and if scaled, sa (M, K/128) and sb (N, K/128) float32.  OUTPUT has D
// (M, N) float32 of each job.  M is a multiple of 64 and N of 8; a step of every instruction takes 32 bytes of K.

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <vector>

#define CHECK(call)                                                                            \
    do {                                                                                       \
        cudaError_t status = (call);                                                           \
        if (status != cudaSuccess) {                                                           \
            std::fprintf(stderr, "%s: %s\n", #call, cudaGetErrorString(status));               \
            std::exit(2);                                                                      \
        }                                                                                      \
    } while (0)

enum Operation { E4M3_E4M3, E4M3_E5M2, E5M2_E4M3, E5M2_E5M2, BF16, FP16, MMA_E4M3, MMA_E5M2, MMA_BF16, MMA_FP16 };

// Without swizzling, shared memory holds bricks of 8 rows of 16 bytes.  `along_k` and `along_rows` are the
// distances of neighbouring bricks in bytes.
__device__ uint64_t descriptor(const void* shared, int along_k, int along_rows) {
    uint64_t address = __cvta_generic_to_shared(shared);
    return ((address & 0x3FFFF) >> 4) | uint64_t(along_k >> 4) << 16 | uint64_t(along_rows >> 4) << 32;
}

#define WGMMA(shape_and_types, flags)                                                          \
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %6, 0;\n"                                   \
                 "wgmma.mma_async.sync.aligned." shape_and_types                               \
                 " {%0, %1, %2, %3}, %4, %5, p, 1, 1" flags ";\n}\n"                           \
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                              \
                 : "l"(a), "l"(b), "r"(accumulate))

template <int operation>
__device__ void wgmma(float (&d)[4], uint64_t a, uint64_t b, int accumulate) {
    if (operation == E4M3_E4M3) WGMMA("m64n8k32.f32.e4m3.e4m3", "");
    if (operation == E4M3_E5M2) WGMMA("m64n8k32.f32.e4m3.e5m2", "");
    if (operation == E5M2_E4M3) WGMMA("m64n8k32.f32.e5m2.e4m3", "");
    if (operation == E5M2_E5M2) WGMMA("m64n8k32.f32.e5m2.e5m2", "");
    if (operation == BF16) WGMMA("m64n8k16.f32.bf16.bf16", ", 0, 0");
    if (operation == FP16) WGMMA("m64n8k16.f32.f16.f16", ", 0, 0");
}

// A block of 128 threads makes 64 x 8 of D.  With scales: 4 steps from zero, then acc = fma(sa * sb, p, acc).
template <int operation>
__global__ void wgmma_kernel(const uint8_t* A, const uint8_t* B, const float* C, const float* sa, const float* sb,
                             float* D, int n, int bytes) {
    __shared__ alignas(128) uint4 a[2][64], b[2][8];
    const int t = threadIdx.x, m0 = blockIdx.y * 64, n0 = blockIdx.x * 8;
    const int row = m0 + t / 32 * 16 + t % 32 / 4, column = n0 + t % 4 * 2;  // of d[0]
    float d[4], acc[4] = {0, 0, 0, 0};
    for (int i = 0; i < 4; i++) d[i] = C[size_t(row + i / 2 * 8) * n + column + i % 2];
    for (int at = 0; at < bytes; at += 32) {
        __syncthreads();
        a[t / 64][t % 64] = *reinterpret_cast<const uint4*>(A + size_t(m0 + t % 64) * bytes + at + t / 64 * 16);
        if (t < 16) b[t / 8][t % 8] = *reinterpret_cast<const uint4*>(B + size_t(n0 + t % 8) * bytes + at + t / 8 * 16);
        asm volatile("fence.proxy.async;" ::: "memory");
        __syncthreads();
        asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
        wgmma<operation>(d, descriptor(a, 1024, 128), descriptor(b, 128, 128), sa == nullptr || at % 128 != 0);
        asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
        asm volatile("wgmma.wait_group.sync.aligned 0;" : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])::"memory");
        if (sa != nullptr && at % 128 == 96) {
            const int blocks = bytes / 128, k = at / 128;
            for (int i = 0; i < 4; i++) {
                float scale = __fmul_rn(sa[size_t(row + i / 2 * 8) * blocks + k], sb[size_t(column + i % 2) * blocks + k]);
                acc[i] = __fmaf_rn(scale, d[i], acc[i]);
            }
        }
    }
    for (int i = 0; i < 4; i++) D[size_t(row + i / 2 * 8) * n + column + i % 2] = sa == nullptr ? d[i] : acc[i];
}

#define MMA(shape_and_types)                                                                   \
    asm volatile("mma.sync.aligned." shape_and_types                                           \
                 " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};\n"          \
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                              \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]))

// A warp makes 16 x 8 of D.
template <int operation>
__global__ void mma_kernel(const uint8_t* A, const uint8_t* B, const float* C, float* D, int n, int bytes) {
    const int t = threadIdx.x, row = blockIdx.y * 16 + t / 4, n0 = blockIdx.x * 8, column = n0 + t % 4 * 2;
    float d[4];
    for (int i = 0; i < 4; i++) d[i] = C[size_t(row + i / 2 * 8) * n + column + i % 2];
    for (int at = t % 4 * 4; at < bytes; at += 32) {
        uint32_t a[4], b[2];
        for (int i = 0; i < 4; i++)
            a[i] = *reinterpret_cast<const uint32_t*>(A + size_t(row + i % 2 * 8) * bytes + at + i / 2 * 16);
        for (int i = 0; i < 2; i++)
            b[i] = *reinterpret_cast<const uint32_t*>(B + size_t(n0 + t / 4) * bytes + at + i * 16);
        if (operation == MMA_E4M3) MMA("m16n8k32.row.col.f32.e4m3.e4m3.f32");
        if (operation == MMA_E5M2) MMA("m16n8k32.row.col.f32.e5m2.e5m2.f32");
        if (operation == MMA_BF16) MMA("m16n8k16.row.col.f32.bf16.bf16.f32");
        if (operation == MMA_FP16) MMA("m16n8k16.row.col.f32.f16.f16.f32");
    }
    for (int i = 0; i < 4; i++) D[size_t(row + i / 2 * 8) * n + column + i % 2] = d[i];
}

template <typename T>
T* upload(std::FILE* file, size_t count) {
    std::vector<T> host(count);
    if (std::fread(host.data(), sizeof(T), count, file) != count) {
        std::fprintf(stderr, "the input ends within a job\n");
        std::exit(2);
    }
    T* device;
    CHECK(cudaMalloc(&device, count * sizeof(T)));
    CHECK(cudaMemcpy(device, host.data(), count * sizeof(T), cudaMemcpyHostToDevice));
    return device;
}

int main(int count, char** arguments) {
    if (count != 3) return 2;
    std::FILE *in = std::fopen(arguments[1], "rb"), *out = std::fopen(arguments[2], "wb");
    if (in == nullptr || out == nullptr) return 2;
    cudaDeviceProp properties;
    CHECK(cudaGetDeviceProperties(&properties, 0));
    std::printf("%s, compute capability %d.%d\n", properties.name, properties.major, properties.minor);
    int32_t job[6];
    while (std::fread(job, sizeof(int32_t), 6, in) == 6) {
        const int operation = job[0], m = job[1], n = job[2], bytes = job[3];
        uint8_t* a = upload<uint8_t>(in, size_t(m) * bytes);
        uint8_t* b = upload<uint8_t>(in, size_t(n) * bytes);
        float* c = upload<float>(in, size_t(m) * n);
        float* sa = job[4] ? upload<float>(in, size_t(m) * (bytes / 128)) : nullptr;
        float* sb = job[4] ? upload<float>(in, size_t(n) * (bytes / 128)) : nullptr;
        float* d;
        CHECK(cudaMalloc(&d, size_t(m) * n * sizeof(float)));
        const dim3 wide(n / 8, m / 64), narrow(n / 8, m / 16);
        switch (operation) {
            case E4M3_E4M3: wgmma_kernel<E4M3_E4M3><<<wide, 128>>>(a, b, c, sa, sb, d, n, bytes); break;
            case E4M3_E5M2: wgmma_kernel<E4M3_E5M2><<<wide, 128>>>(a, b, c, sa, sb, d, n, bytes); break;
            case E5M2_E4M3: wgmma_kernel<E5M2_E4M3><<<wide, 128>>>(a, b, c, sa, sb, d, n, bytes); break;
            case E5M2_E5M2: wgmma_kernel<E5M2_E5M2><<<wide, 128>>>(a, b, c, sa, sb, d, n, bytes); break;
            case BF16: wgmma_kernel<BF16><<<wide, 128>>>(a, b, c, sa, sb, d, n, bytes); break;
            case FP16: wgmma_kernel<FP16><<<wide, 128>>>(a, b, c, sa, sb, d, n, bytes); break;
            case MMA_E4M3: mma_kernel<MMA_E4M3><<<narrow, 32>>>(a, b, c, d, n, bytes); break;
            case MMA_E5M2: mma_kernel<MMA_E5M2><<<narrow, 32>>>(a, b, c, d, n, bytes); break;
            case MMA_BF16: mma_kernel<MMA_BF16><<<narrow, 32>>>(a, b, c, d, n, bytes); break;
            case MMA_FP16: mma_kernel<MMA_FP16><<<narrow, 32>>>(a, b, c, d, n, bytes); break;
            default: return 2;
        }
        CHECK(cudaGetLastError());
        std::vector<float> result(size_t(m) * n);
        CHECK(cudaMemcpy(result.data(), d, result.size() * sizeof(float), cudaMemcpyDeviceToHost));
        std::fwrite(result.data(), sizeof(float), result.size(), out);
        for (void* pointer : {(void*)a, (void*)b, (void*)c, (void*)sa, (void*)sb, (void*)d}) CHECK(cudaFree(pointer));
    }
    std::fclose(in);
    return std::fclose(out) == 0 ? 0 : 2;
}
