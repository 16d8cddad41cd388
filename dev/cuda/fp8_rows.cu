// fp8_rows.cu: what happens to rows of fp8 between two products: the scaling-aware transpose, and
// the clamped SwiGLU that quantises its result. The C texts are in fp8.c, parts 7 and 8.
//
// Transpose of codes (T,C) with a scale per row and 128 columns into (C,T) with a scale per 128 x
// 128: a code is shifted by the distance of its row's scale from the tile's largest.
//   v1  a thread per code: integer rule, writes T bytes apart
//   v2  tiles of 128 x 128 through shared memory, byte by byte
//   v3  16 bytes per load and store; four bytes turned at a time; the shift is a product of halves,
//       which holds every e4m3 number and every number that rounding could tell from its neighbour.
//       The trainer does not call it; the tile is turned as kernels.cu turns a recast one
//   bytes: 2 per code: 49,152 x 4,096, 403 MB, 94 us at 4,277 GB/s.
//
// SwiGLU of gv = [g | v] (T,2F) into codes (T,F), and its gradient (T,2F) from dh (T,F):
//   v1  two kernels: SwiGLU to bf16, then quantisation
//   v2  one kernel: 16 lanes own a group of 128 columns, whose largest they find by shuffles.
//       Shipped: v2, its gradient and the quantisation are kernels.cu's own (section 3)
//   bytes: forward 4 F + F per row (v1: 4 F + 2 F + 2 F + F), backward 4 F + 2 F + 2 F; 49,152 rows
//   of F = 2,048: 503 and 805 MB, 118 and 188 us.
//
// Measured (one H200, medians, GB/s), 49,152 rows: transpose v1 127, v2 518, v3 3,659; SwiGLU v1
// 1,450 (of the bytes that v2 moves), v2 2,900, its gradient 3,000; quantising rows 3,631.
//
//     nvcc -O3 -std=c++17 -gencode=arch=compute_90a,code=sm_90a -diag-suppress 177
//          fp8_rows.cu -lcublas -o fp8_rows && ./fp8_rows
#include "../../kernels.cu"
#include "common.h"

// -------------------------------------------------------------------------------------------------
// 1 Transpose

// e4m3(code) / 2^k to the nearest code: fp8.c's e4m3_shifted.
__host__ __device__ static inline uint8_t shifted(uint8_t code, int k) {
    int exponent = code >> 3 & 15, digits = exponent ? 8 + (code & 7) : code & 7;
    if ((code & 0x7F) == 0x7F) { return code; }
    if (exponent > k) { return (uint8_t)(code - 8 * k); }
    int shift = k + 1 - (exponent ? exponent : 1);
    if (shift == 0) { return code; }
    shift = shift < 5 ? shift : 5;
    int odd = digits >> shift & 1;
    return (uint8_t)((code & 0x80) | (digits + (1 << (shift - 1)) - 1 + odd) >> shift);
}

// largest (T/128,C/128): of a tile's row scales.
__global__ void largest_kernel(uint8_t *largest, const uint8_t *scales, int T, int across) {
    int g = blockIdx.x, t = blockIdx.y * 128 + threadIdx.x;
    unsigned s = t < T ? scales[(size_t)t * across + g] : 0;
    __shared__ uint32_t most[4];
    largest_byte(most, s);
    __syncthreads();
    if (threadIdx.x == 0) {
        largest[(size_t)g * gridDim.y + blockIdx.y] = (uint8_t)largest_of(most);
    }
}

__global__ void transpose_v1_kernel(uint8_t *out, const uint8_t *largest, const uint8_t *codes,
                                    const uint8_t *scales, int T, int C) {
    size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= (size_t)T * C) { return; }
    int t = (int)(i / C), c = (int)(i % C), across = (C + 127) / 128, down = (T + 127) / 128;
    int k = largest[(size_t)(c / 128) * down + t / 128] - scales[(size_t)t * across + c / 128];
    out[(size_t)c * T + t] = shifted(codes[i], k);
}

__global__ void __launch_bounds__(256) transpose_v2_kernel(uint8_t *out, const uint8_t *largest,
                                                           const uint8_t *codes,
                                                           const uint8_t *scales, int T, int C) {
    __shared__ uint8_t tile[128][132];
    int t0 = blockIdx.y * 128, c0 = blockIdx.x * 128, across = (C + 127) / 128;
    int most = largest[(size_t)blockIdx.x * gridDim.y + blockIdx.y];
    for (int i = threadIdx.x; i < 128 * 128; i += 256) {
        int t = t0 + i / 128, c = c0 + i % 128;
        if (t >= T || c >= C) { continue; }
        tile[i % 128][i / 128] = shifted(codes[(size_t)t * C + c],
                                         most - scales[(size_t)t * across + blockIdx.x]);
    }
    __syncthreads();
    for (int i = threadIdx.x; i < 128 * 128; i += 256) {
        int t = t0 + i % 128, c = c0 + i / 128;
        if (t < T && c < C) { out[(size_t)c * T + t] = tile[i / 128][i % 128]; }
    }
}

// 2^-k as two halves.
__device__ __forceinline__ __half2 power_down(int k) {
    uint16_t bits = k < 15 ? (15 - k) << 10 : k < 25 ? 1 << (24 - k) : 0;
    __half_raw h = { bits };
    return __half2half2(h);
}

// Four codes, shifted. Halves down to 2^-24 hold the product, or what differs from it by less than
// rounding to the nearest 2^-9 can see. The sign of a NaN is put back: conversion drops it.
__device__ __forceinline__ uint32_t shifted_four(uint32_t four, __half2 factor) {
    __half2 low = __nv_cvt_fp8x2_to_halfraw2(four & 0xFFFF, __NV_E4M3);
    __half2 high = __nv_cvt_fp8x2_to_halfraw2(four >> 16, __NV_E4M3);
    low = __hmul2(low, factor), high = __hmul2(high, factor);
    uint32_t a = __nv_cvt_halfraw2_to_fp8x2(low, __NV_SATFINITE, __NV_E4M3);
    uint32_t b = __nv_cvt_halfraw2_to_fp8x2(high, __NV_SATFINITE, __NV_E4M3);
    return a | b << 16 | (four & 0x80808080);
}

// out (C,T), out_scales (C/128,T/128). C a multiple of 16. A thread takes 4 neighbouring rows of 16
// codes.
__global__ void __launch_bounds__(256)
transpose_v3_kernel(uint8_t *out, uint8_t *out_scales, const uint8_t *codes, const uint8_t *scales,
                    int T, int C) {
    __shared__ __align__(16) uint32_t tile[128 * 32];
    __shared__ uint32_t most[4];
    __shared__ uint8_t row_scale[128];
    const int t0 = blockIdx.y * 128, c0 = blockIdx.x * 128, across = (C + 127) / 128;
    const int thread = threadIdx.x, part = thread % 8, c = c0 + part * 16;
    uint4 raw[4];
    #pragma unroll
    for (int j = 0; j < 4; j++) {
        const int t = t0 + thread / 8 * 4 + j;
        raw[j] = make_uint4(0, 0, 0, 0);
        if (t < T && c < C) { raw[j] = *(const uint4 *)(codes + (size_t)t * C + c); }
    }
    if (thread < 128) {
        const int t = t0 + thread;
        const unsigned s = t < T ? scales[(size_t)t * across + blockIdx.x] : 0;
        row_scale[thread] = (uint8_t)s;
        largest_byte(most, s);
    }
    __syncthreads();
    const int largest = largest_of(most);
    if (thread == 0) { out_scales[(size_t)blockIdx.x * gridDim.y + blockIdx.y] = largest; }
    #pragma unroll
    for (int j = 0; j < 4; j++) {
        const int k = largest - row_scale[thread / 8 * 4 + j];
        if (k == 0) { continue; }
        const __half2 factor = power_down(k);
        raw[j].x = shifted_four(raw[j].x, factor), raw[j].y = shifted_four(raw[j].y, factor);
        raw[j].z = shifted_four(raw[j].z, factor), raw[j].w = shifted_four(raw[j].w, factor);
    }
    tile_turn(tile, raw);
    __syncthreads();
    #pragma unroll
    for (int j = 0; j < 4; j++) {
        const int row = j * 32 + thread / 8, t = t0 + part * 16;
        const uint4 line = tile_line(tile, row, part);
        if (c0 + row >= C) { continue; }
        uint8_t *to = out + (size_t)(c0 + row) * T + t;
        if (T % 16 == 0) {
            if (t < T) { *(uint4 *)to = line; }
        } else {
            #pragma unroll
            for (int i = 0; i < 16; i++) {
                if (t + i < T) { to[i] = ((const uint8_t *)&line)[i]; }
            }
        }
    }
}

// -------------------------------------------------------------------------------------------------
// 2 SwiGLU

__global__ void swiglu_v1_kernel(bf16 *h, const bf16 *gv, const float *weight, float limit, int F) {
    const size_t row = blockIdx.x;
    for (int c = threadIdx.x; c < F; c += blockDim.x) {
        const float g = __bfloat162float(gv[row * 2 * F + c]);
        const float v = __bfloat162float(gv[row * 2 * F + F + c]);
        const float gate = g > limit ? limit : g, up = fminf(fmaxf(v, -limit), limit);
        h[row * F + c] = __float2bfloat16(weight[row] * (gate / (1 + expf(-gate))) * up);
    }
}

// -------------------------------------------------------------------------------------------------
// 3 Checks

static void run_transpose(int version, uint8_t *out, uint8_t *out_scales, const uint8_t *codes,
                          const uint8_t *scales, int T, int C) {
    dim3 tiles((C + 127) / 128, (T + 127) / 128);
    if (version < 3) { largest_kernel<<<tiles, 128>>>(out_scales, scales, T, tiles.x); }
    if (version == 1) {
        unsigned blocks = (unsigned)divide_up((size_t)T * C, 256);
        transpose_v1_kernel<<<blocks, 256>>>(out, out_scales, codes, scales, T, C);
    } else if (version == 2) {
        transpose_v2_kernel<<<tiles, 256>>>(out, out_scales, codes, scales, T, C);
    } else {
        transpose_v3_kernel<<<tiles, 256>>>(out, out_scales, codes, scales, T, C);
    }
    cudaCheck(cudaGetLastError());
}

// spread 40: row t is t % 128 below the largest, column c has code c: all codes by all shifts.
static void check_transpose(int T, int C, int spread) {
    int across = (C + 127) / 128, down = (T + 127) / 128;
    size_t n = (size_t)T * C;
    std::vector<uint8_t> codes(n), scales((size_t)T * across);
    for (size_t i = 0; i < n; i++) { codes[i] = spread == 40 ? i % C : hash64(i); }
    for (size_t i = 0; i < scales.size(); i++) {
        scales[i] = (uint8_t)(250 - (spread == 40 ? i / across % 128 : hash64(i) % spread));
    }
    uint8_t *d_codes = to_device(codes), *d_scales = to_device(scales);
    uint8_t *out = device_alloc<uint8_t>(n + 16), *grid = device_alloc<uint8_t>(across * down);
    for (int version = 1; version <= 3; version++) {
        cudaCheck(cudaMemset(out, 0x41, n + 16));
        run_transpose(version, out, grid, d_codes, d_scales, T, C);
        std::vector<uint8_t> got = to_host(out, n + 16), got_grid = to_host(grid, across * down);
        size_t wrong = 0;
        for (int g = 0; g < across; g++) {
            for (int b = 0; b < down; b++) {
                int most = 0, end = std::min(T, b * 128 + 128);
                for (int t = b * 128; t < end; t++) {
                    most = std::max<int>(most, scales[t * across + g]);
                }
                wrong += got_grid[g * down + b] != most;
                for (int t = b * 128; t < end; t++) {
                    for (int c = g * 128; c < std::min(C, g * 128 + 128); c++) {
                        wrong += got[(size_t)c * T + t]
                              != shifted(codes[(size_t)t * C + c], most - scales[t * across + g]);
                    }
                }
            }
        }
        for (int i = 0; i < 16; i++) { wrong += got[n + i] != 0x41; }
        check(wrong == 0, "transpose v%d %d x %d spread %d: %zu wrong", version, T, C, spread,
              wrong);
    }
    cudaFree(d_codes), cudaFree(d_scales), cudaFree(out), cudaFree(grid);
}

static double value_of(int code) {
    int E = code >> 3 & 15, M = code & 7;
    double magnitude = E == 0 ? ldexp(M, -9) : ldexp(8 + M, E - 10);
    return code & 0x80 ? -magnitude : magnitude;
}
static double nearest(double x, int t) {                // of the numbers with scale 2^t
    return ldexp(value_of(__nv_cvt_double_to_fp8(ldexp(x, -t), __NV_SATFINITE, __NV_E4M3)), t);
}

// What is wrong with a group of codes of x, each known to tol.
static int group_wrong(const uint8_t *codes, int scale, const double *x, const double *tol,
                       float floor) {
    double low = floor, high = floor;
    int t = scale - 127, wrong = 0;
    for (int i = 0; i < 128; i++) {
        low = std::max(low, fabs(x[i]) - tol[i]), high = std::max(high, fabs(x[i]) + tol[i]);
    }
    if (t > -126 && high <= ldexp(448, t - 1)) { wrong++; }        // not the smallest
    if (low > ldexp(448, t)) { wrong++; }
    for (int i = 0; i < 128; i++) {
        double got = ldexp(value_of(codes[i]), t);
        wrong += !(got >= nearest(x[i] - tol[i], t) && got <= nearest(x[i] + tol[i], t));
    }
    return wrong;
}

static void check_swiglu(int T, int F, bool weighted) {
    size_t n = (size_t)T * F;
    const float limit = 10;
    std::vector<bf16> gv(2 * n), dh(n);
    std::vector<float> weight(T);
    for (size_t i = 0; i < 2 * n; i++) {
        gv[i] = __float2bfloat16(i % 50 == 7 ? 10 : i % 50 == 9 ? -10 : 8 * hash_normal(1, i));
    }
    for (size_t i = 0; i < n; i++) {
        dh[i] = __float2bfloat16(hash_normal(2, i) * (i / F % 5 == 4 ? 1e-9f : 1));
    }
    for (int t = 0; t < T; t++) { weight[t] = !weighted ? 1 : t % 7 == 3 ? 0 : hash_normal(3, t); }
    bf16 *d_gv = to_device(gv), *d_dh = to_device(dh);
    float *d_w = to_device(weight), *dw = device_alloc<float>(T);
    uint8_t *codes = device_alloc<uint8_t>(n), *scales = device_alloc<uint8_t>(n / 128);
    uint8_t *dcodes = device_alloc<uint8_t>(2 * n), *dscales = device_alloc<uint8_t>(2 * n / 128);
    cudaCheck(cudaMemset(codes, 0x7F, n));
    cudaCheck(cudaMemset(dcodes, 0x7F, 2 * n));
    const float *w_or_none = weighted ? d_w : NULL;
    swiglu_quantize_forward_gpu(codes, scales, d_gv, w_or_none, limit, 1e-4f, T, F);
    swiglu_quantize_backward_gpu(dcodes, dscales, dw, d_dh, d_gv, w_or_none, limit, T, F);
    std::vector<uint8_t> a = to_host(codes, n), sa = to_host(scales, n / 128);
    std::vector<uint8_t> b = to_host(dcodes, 2 * n), sb = to_host(dscales, 2 * n / 128);
    std::vector<float> got_dw = to_host(dw, T);
    bf16 *h = device_alloc<bf16>(n);
    cudaCheck(cudaMemset(codes, 0x7F, n));
    swiglu_v1_kernel<<<T, 256>>>(h, d_gv, d_w, limit, F);
    quantize_rows_fp8_gpu(codes, scales, h, 1e-4f, T, F);
    std::vector<uint8_t> a1 = to_host(codes, n), sa1 = to_host(scales, n / 128);
    int wrong = 0, wrong_1 = 0, wrong_back = 0, wrong_dw = 0;
    for (int t = 0; t < T; t++) {
        double sum = 0, size = 0, w = weight[t];
        for (int c = 0; c < F; c += 128) {
            double x[3][128], tol[3][128];
            for (int i = 0; i < 128; i++) {
                double g = (float)gv[(size_t)t * 2 * F + c + i];
                double d = (float)dh[(size_t)t * F + c + i];
                double v = (float)gv[(size_t)t * 2 * F + F + c + i];
                double gate = std::min(g, 10.), up = std::max(-10., std::min(v, 10.));
                double s = 1 / (1 + exp(-gate)), silu = gate * s;
                x[0][i] = w * silu * up;
                x[1][i] = g > 10 ? 0 : w * d * up * s * (1 + gate * (1 - s));
                x[2][i] = fabs(v) > 10 ? 0 : w * d * silu;
                tol[0][i] = fabs(x[0][i]) * 0x1p-19, tol[1][i] = fabs(w * d * 10) * 0x1p-19;
                tol[2][i] = fabs(x[2][i]) * 0x1p-19;
                sum += d * silu * up, size += fabs(d * silu * up);
            }
            size_t at = (size_t)t * F + c, left = (size_t)t * 2 * F + c;
            wrong += group_wrong(&a[at], sa[at / 128], x[0], tol[0], 1e-4f);
            for (int i = 0; i < 128; i++) { tol[0][i] = fabs(x[0][i]) * 0x1p-8; }   // bf16 between
            wrong_1 += group_wrong(&a1[at], sa1[at / 128], x[0], tol[0], 1e-4f);
            wrong_back += group_wrong(&b[left], sb[left / 128], x[1], tol[1], 0);
            wrong_back += group_wrong(&b[left + F], sb[(left + F) / 128], x[2], tol[2], 0);
        }
        wrong_dw += !(fabs(got_dw[t] - sum) <= 1e-5 * size);
    }
    check(!wrong && !wrong_1 && !wrong_back && !wrong_dw, "SwiGLU %d x %d: %d forward, %d v1, "
          "%d backward, %d dweight", T, F, wrong, wrong_1, wrong_back, wrong_dw);
    cudaFree(d_gv), cudaFree(d_dh), cudaFree(d_w), cudaFree(dw), cudaFree(codes), cudaFree(scales);
    cudaFree(dcodes), cudaFree(dscales), cudaFree(h);
}

// -------------------------------------------------------------------------------------------------
// 4 Times

static void print_rate(const char *name, double bytes, float ms) {
    printf("  %-28s %8.4f ms %6.0f GB/s %5.1f %%\n", name, ms, bytes / ms * 1e-6,
           bytes / ms * 1e-6 / CEILING_GBS * 100);
}

static void time_all(int T, int C, int F) {
    const int sets = 2;
    size_t n = (size_t)T * C, m = (size_t)T * F;
    uint8_t *codes[sets], *scales[sets], *out = device_alloc<uint8_t>(n), *grid;
    bf16 *gv[sets], *dh[sets], *h = device_alloc<bf16>(m);
    for (int i = 0; i < sets; i++) {
        codes[i] = random_bytes(n, i, 0, 255), scales[i] = random_bytes(n / 128, i + 5, 116, 121);
        gv[i] = random_normal(2 * m, i + 7, 3), dh[i] = random_normal(m, i + 9, 1);
    }
    grid = device_alloc<uint8_t>(n / 16384 + 1);
    printf("transpose %d x %d\n", T, C);
    uint64_t bits[4];
    for (int v = 1; v <= 3; v++) {
        float ms = time_ms([&](int i) {
            run_transpose(v, out, grid, codes[i % sets], scales[i % sets], T, C); }, 10, 2);
        run_transpose(v, out, grid, codes[0], scales[0], T, C);
        bits[v] = device_hash(out, n);
        check(bits[v] == bits[1], "v%d differs from v1", v);
        const char *names[] = { "", "v1 a thread per code", "v2 tiles", "v3 wide, halves" };
        print_rate(names[v], 2.0 * n + n / 128, ms);
    }
    printf("SwiGLU %d x %d\n", T, F);
    float *weight, *dw = device_alloc<float>(T);
    std::vector<float> w(T);
    for (int t = 0; t < T; t++) { w[t] = 0.2f; }
    weight = to_device(w);
    uint8_t *dcodes = device_alloc<uint8_t>(2 * m), *dscales = device_alloc<uint8_t>(2 * m / 128);
    double bytes = 5.0 * m + m / 128;
    float ms = time_ms([&](int i) {
        swiglu_v1_kernel<<<T, 256>>>(h, gv[i % sets], weight, 10, F);
        quantize_rows_fp8_gpu(dcodes, dscales, h, 1e-4f, T, F); });
    print_rate("v1 forward, two kernels", bytes, ms);
    ms = time_ms([&](int i) {
        swiglu_quantize_forward_gpu(dcodes, dscales, gv[i % sets], weight, 10, 1e-4f, T, F); });
    print_rate("v2 forward", bytes, ms);
    ms = time_ms([&](int i) {
        swiglu_quantize_backward_gpu(dcodes, dscales, dw, dh[i % sets], gv[i % sets], weight, 10,
                                     T, F); });
    print_rate("v2 backward", 8.0 * m + m / 64, ms);
    ms = time_ms([&](int i) {
        quantize_rows_fp8_gpu(dcodes, dscales, dh[i % sets], 1e-4f, T, F); });
    print_rate("quantise rows", 3.0 * m + m / 128, ms);
    for (int i = 0; i < sets; i++) {
        cudaFree(codes[i]), cudaFree(scales[i]), cudaFree(gv[i]), cudaFree(dh[i]);
    }
    cudaFree(out), cudaFree(grid), cudaFree(h), cudaFree(weight), cudaFree(dw), cudaFree(dcodes);
    cudaFree(dscales);
}

int main(void) {
    setvbuf(stdout, NULL, _IOLBF, 0);
    check_transpose(128, 256, 40);
    const int sizes[] = { 1, 15, 64, 127, 128, 129, 400 };
    for (int T : sizes) {
        check_transpose(T, 128, 1);
        check_transpose(T, 400, 20);
        check_transpose(T, 48, 250);
    }
    check_swiglu(37, 2048, true);
    check_swiglu(5, 128, false);
    check_swiglu(9, 384, true);
    check_swiglu(3, 4224, true);
    printf("%d checks, %d failed\n", checks_done, checks_failed);
    if (checks_failed) { return 1; }
    time_all(49152, 4096, 2048);
    time_all(24576, 4096, 2048);
    return checks_failed != 0;
}
