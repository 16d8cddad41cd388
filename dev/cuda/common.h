// common.h: what every kernel ladder of dev/cuda needs. Error checks, random inputs, timing with
// events, and the comparison with the oracle. Nothing here is part of the trainer. The last rung of
// a ladder is kernels.cu's own code, and types, checks and the stream are from there.
#ifndef COMMON_H
#define COMMON_H
#include "../../kernels.cu"
#include <algorithm>
#include <vector>

// In the trainer this is the C half's (kernels.cu, 1.2).
extern "C" void gpu_failed(const char *file, int line, int code, const char *what) {
    fprintf(stderr, "%s:%d: %s\n", file, line, what);
    exit(code);
}

// Scratch for the launchers of kernels.cu; gpu_workspace would also give cuBLAS a part of it, after
// gpu_start. Without gpu_start `stream` stays 0, the default stream, and all that a ladder does is
// in order.
static inline void ladder_workspace(size_t bytes) {
    cudaCheck(cudaMalloc(&work.base, bytes));
    work.size = bytes;
}

// Measured ceilings of an H200 (performance.md, section 0).
#define CEILING_TFLOPS 802.0    // bf16 product 8192^3, random data
#define CEILING_GBS 4277.0      // device copy, bytes read + written

static inline size_t divide_up(size_t n, size_t size) { return (n + size - 1) / size; }

// The same numbers on both sides, element by element.
__host__ __device__ static inline uint64_t hash64(uint64_t z) {
    return random_mix(z + 0x9E3779B97F4A7C15ull);
}

// Nearly normal with that standard deviation: four uniforms added.
__host__ __device__ static inline float hash_normal(uint64_t seed, uint64_t i) {
    uint64_t z = hash64(seed * 0x100000001B3ull + i);
    int sum = (int)(z & 0xFFFF) + (int)(z >> 16 & 0xFFFF) + (int)(z >> 32 & 0xFFFF)
            + (int)(z >> 48) - 131070;
    return (float)sum * (1 / 37836.95f);
}

__global__ static void fill_normal_kernel(bf16 *x, size_t n, uint64_t seed, float std) {
    size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) { x[i] = __float2bfloat16(std * hash_normal(seed, i)); }
}
__global__ static void fill_bytes_kernel(uint8_t *x, size_t n, uint64_t seed, int low, int high) {
    size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    uint64_t values = (uint64_t)(high - low + 1);
    if (i < n) { x[i] = (uint8_t)(low + (int)(hash64(seed ^ i << 8) % values)); }
}

// Device memory of n elements; random_* fill it on the device.
template <typename T> static T *device_alloc(size_t n) {
    T *p;
    cudaCheck(cudaMalloc(&p, std::max<size_t>(n, 1) * sizeof(T)));
    return p;
}
static inline bf16 *random_normal(size_t n, uint64_t seed, float std) {
    bf16 *p = device_alloc<bf16>(n);
    fill_normal_kernel<<<(unsigned)divide_up(n, 256), 256>>>(p, n, seed, std);
    cudaCheck(cudaGetLastError());
    return p;
}
// Bytes low .. high, both included.
static inline uint8_t *random_bytes(size_t n, uint64_t seed, int low, int high) {
    uint8_t *p = device_alloc<uint8_t>(n);
    fill_bytes_kernel<<<(unsigned)divide_up(n, 256), 256>>>(p, n, seed, low, high);
    cudaCheck(cudaGetLastError());
    return p;
}
template <typename T> static T *to_device(const std::vector<T> &h) {
    T *p = device_alloc<T>(h.size());
    cudaCheck(cudaMemcpy(p, h.data(), h.size() * sizeof(T), cudaMemcpyHostToDevice));
    return p;
}
template <typename T> static std::vector<T> to_host(const T *p, size_t n) {
    std::vector<T> h(n);
    cudaCheck(cudaDeviceSynchronize());
    cudaCheck(cudaMemcpy(h.data(), p, n * sizeof(T), cudaMemcpyDeviceToHost));
    return h;
}

// Median of `repeats` times of call(i) in milliseconds, after `warm` calls; i counts all calls, so
// that the caller can take another set of inputs each time.
template <typename F> static float time_ms(F call, int repeats = 15, int warm = 5) {
    std::vector<cudaEvent_t> event(repeats + 1);
    std::vector<float> ms(repeats);
    for (cudaEvent_t &e : event) { cudaCheck(cudaEventCreate(&e)); }
    for (int i = 0; i < warm; i++) { call(i); }
    cudaCheck(cudaEventRecord(event[0], stream));
    for (int i = 0; i < repeats; i++) {
        call(warm + i);
        cudaCheck(cudaEventRecord(event[i + 1], stream));
    }
    cudaCheck(cudaDeviceSynchronize());
    cudaCheck(cudaGetLastError());
    for (int i = 0; i < repeats; i++) {
        cudaCheck(cudaEventElapsedTime(&ms[i], event[i], event[i + 1]));
    }
    for (cudaEvent_t &e : event) { cudaCheck(cudaEventDestroy(e)); }
    std::sort(ms.begin(), ms.end());
    return ms[repeats / 2];
}

// Sums of (x - y)^2 and y^2, one pair per block.
template <typename X, typename Y>
__global__ static void error_kernel(double *sum, const X *x, const Y *y, size_t n) {
    __shared__ double difference[256], norm[256];
    double d = 0, s = 0;
    for (size_t i = (size_t)blockIdx.x * 256 + threadIdx.x; i < n; i += (size_t)gridDim.x * 256) {
        double a = (double)(float)x[i], b = (double)(float)y[i];
        d += (a - b) * (a - b), s += b * b;
    }
    difference[threadIdx.x] = d, norm[threadIdx.x] = s;
    __syncthreads();
    if (threadIdx.x == 0) {
        for (int i = 1; i < 256; i++) { d += difference[i], s += norm[i]; }
        sum[2 * blockIdx.x] = d, sum[2 * blockIdx.x + 1] = s;
    }
}

__global__ static void hash_kernel(unsigned long long *sum, const uint32_t *x, size_t n) {
    unsigned long long z = 0;
    for (size_t i = (size_t)blockIdx.x * 256 + threadIdx.x; i < n; i += (size_t)gridDim.x * 256) {
        z += hash64(x[i] ^ (uint64_t)i << 32);
    }
    atomicAdd(sum, z);              // integers: the order does not matter
}
// A number that tells apart two contents of device memory (bytes a multiple of 4).
static inline uint64_t device_hash(const void *x, size_t bytes) {
    unsigned long long *sum = device_alloc<unsigned long long>(1), h;
    cudaCheck(cudaMemset(sum, 0, 8));
    hash_kernel<<<1024, 256>>>(sum, (const uint32_t *)x, bytes / 4);
    cudaCheck(cudaMemcpy(&h, sum, 8, cudaMemcpyDeviceToHost));
    cudaCheck(cudaFree(sum));
    return h;
}

// ||x - y|| / ||y||, both on the device; NaN when one of them has a NaN.
template <typename X, typename Y> static double device_error(const X *x, const Y *y, size_t n) {
    double *sum = device_alloc<double>(2048), d = 0, s = 0;
    error_kernel<<<1024, 256>>>(sum, x, y, n);
    cudaCheck(cudaGetLastError());
    std::vector<double> h(2048);
    cudaCheck(cudaMemcpy(h.data(), sum, sizeof(double) * 2048, cudaMemcpyDeviceToHost));
    cudaCheck(cudaFree(sum));
    for (int i = 0; i < 2048; i += 2) { d += h[i], s += h[i + 1]; }
    return s > 0 ? sqrt(d / s) : sqrt(d);
}

// The same on the host; infinite when x has a NaN.
template <typename X, typename Y>
static double relative_error(const std::vector<X> &x, const std::vector<Y> &y) {
    double difference = 0, norm = 0;
    for (size_t i = 0; i < y.size(); i++) {
        double a = (double)(float)x[i], b = (double)(float)y[i];
        if (a != a) { return INFINITY; }
        difference += (a - b) * (a - b);
        norm += b * b;
    }
    return norm > 0 ? sqrt(difference / norm) : sqrt(difference);
}

// Counts a check; says what is wrong if it failed.
static int checks_done, checks_failed;
static inline void check(bool good, const char *format, ...) {
    checks_done++;
    if (good) { return; }
    checks_failed++;
    va_list args;
    va_start(args, format);
    printf("FAIL ");
    vprintf(format, args);
    printf("\n");
    va_end(args);
}

// Rows per expert: a mean of rows / E, skewed by up to 20 %.
static inline std::vector<int> skewed_offsets(int E, int rows) {
    std::vector<int> offset(E + 1, 0);
    for (int e = 0; e < E; e++) {
        double skew = (double)(hash64(e + 5) % 401) / 1000 - 0.2;
        offset[e + 1] = offset[e] + (int)(rows / E * (1 + skew));
    }
    int rest = rows - offset[E];
    for (int e = 0; e <= E; e++) { offset[e] += (int)((double)rest * e / E); }
    offset[E] = rows;
    return offset;
}
#endif // COMMON_H
