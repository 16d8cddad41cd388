// mxfp4_matmul.cu: the grouped expert product on packed fp4 weights, and the one bf16 product of
// the trainer that it is built on.
//
//     out[r][n] = sum_k X[r][k] W[e][n][k] + sum_j U[r][j] V[e][n][j],  e = the group of row r
//
// W (E,N,K) is stored as e2m1 codes and e8m0 scales; U V^T is the LoRA border. One idea per rung:
//   v1  a thread per output, which decodes its weights as it goes
//   v2  all experts widened to bf16 once, then one cuBLAS product per expert    (the one to beat)
//   v3  one persistent kernel for all experts: the copy engine fills a ring of 4 swizzled stages of
//       shared memory, two wgmma warpgroups empty it, tiles of 128 x 256, and stores go out by the
//       copy engine too. W row by n (forward) or row by k (dgrad), bf16 or fp32 out, groups of rows
//       (experts), of columns (wo_a), or one (dense).
//   v4  the border as further K blocks of the same sums. v3 is v4 with KU = 0: one kernel, shipped.
//   v5  no bf16 copy of W at all: two producer warpgroups widen the codes of a stage in shared
//       memory, tiles of 256 x 128. Shipped for the experts.
// v3, v4 and v5 are kernels.cu's own (4.2). Beside them the widening kernels, plain and transposed,
// for fp4 and fp8.
//
// Arithmetic, 24,576 rows of 32 experts, N = K = 4,096 (w1 and w3 side by side):
//   product   2 * 24,576 * 4,096^2 = 825 GFLOP: 1.03 ms at 802 TFLOP/s
//             bytes: W 1.07 GB, X and out 0.4 GB: 0.35 ms, so arithmetic bounds it
//             a tile's K block is 128 * 256 * 64 / 2,048 = 1,024 tensor clocks, and brings 48 KB
//   widening  0.27 GB codes + 0.017 scales in, 1.07 out: 0.32 ms at 4,277 GB/s
//   border    one K block in 64, 1.6 %, were all of it computed; at rank 16 a quarter is
//
// Measured (one H200, each product after a widening, medians; in TFLOP/s at N x K):
//   24,576 rows      4096 x 4096   4096 x 2048   2048 x 4096      4,096 rows, dense     cuBLAS   v3
//   v1                   0.8                                      1024 x 4096              721  715
//   v2 cuBLAS            651           589           582          32768 x 1024             754  748
//   v3                   733           727           728          512 x 4096               547  546
//   v3, W row by k       732           725           735          4096 x 8192              801  800
//   v4, border 16        717           720           722          8 x (1024 x 4096)        744  750
//   v3, fp32 out         693           695           716
// Another run, N x K as above, and 6,144 rows at 4096 x 4096:                               6,144
//   v3 after widen        719           704           711          without the widening         515
//   widen, and v3         552           541           546                                       273
//   v5, fp4               511           513           509                                       476
//   v5, W row by k        517           495           542                                       491
// So v5 gives what widening and v3 give at 768 rows per expert, needs none of its memory, and is
// 1.7 times faster at 192, 1.1 times slower at 1,536. Its stage takes 40 % more clocks than v3's:
// shared memory moves 24 KB per 16 k for the tensor cores, and takes 8 KB of X and 4 KB of W, 144
// bytes per clock where 128 is the most. One producer warpgroup instead of two: 1.18 times slower;
// 128 x 256 tiles need more registers than four warpgroups have.
//
//   widen            0.351 ms, 3,870 GB/s; transposed 0.583 ms, 2,330 GB/s: not needed, since
//                    tensor cores read W row by k as fast, and forward and dgrad share one scratch.
// A K block takes 1,054 clocks, 1,024 of them tensor: what is left is power. At 700 W the clock
// falls from 1.98 to 1.35 GHz within 100 ms of products on random data, so only times taken in
// turns compare: on other machines, or hotter, v3 gave 645 where cuBLAS gave 581; 0.4 s of nothing
// else gave 610 (cuBLAS, whose SMs idle a quarter of the time, 660).
//
// Tried and dropped, clocks per K block: pairs of CTAs that share W by multicast, 1,193 (in step,
// they wait for each other); releasing a stage with .release.cluster, 1,900 (it waits for memory);
// pointers to shared memory in the loops, 1,125 (the compiler works the base out again in every
// turn); bf16 stores by the threads, 1,075; fp32 += by the copy engine, 1,425 (its loads wait).
//
//     nvcc -O3 -std=c++17 -gencode=arch=compute_90a,code=sm_90a -diag-suppress 177
//          mxfp4_matmul.cu -lcublas -o mxfp4_matmul && ./mxfp4_matmul
#include "../../kernels.cu"
#include "common.h"
#include <functional>

using namespace grouped;

// -------------------------------------------------------------------------------------------------
// 1 Widening to bf16
//
// e2m1 (s|EE|M) and e4m3 (s|EEEE|MMM) times a power of two always fit a bf16, whose exponent is a
// float's, so widening is exact. Both kernels are templates over the format; an Eight is 8 codes as
// loaded, and becomes 16 bytes.

struct Fp4 {                            // one scale per 32 columns of a row
    typedef uint32_t Eight;
    __device__ static size_t scale_at(size_t eight, int) { return eight / 4; }
    // A code's low three bits, moved to where a bf16 has the lowest exponent bits and the highest
    // mantissa bit, are its magnitude times 2^-126, for E = 0 too (bf16 has subnormals). Two
    // products with powers of two, each exact, make the weight.
    __device__ static uint4 widen(Eight codes, uint8_t scale) {
        uint32_t bits = scale == 0 ? 0x0040 : scale == 255 ? 0x7FC0 : (uint32_t)scale << 7;
        uint32_t two_126 = 0x7E807E80, out[4];
        bits |= bits << 16;
        #pragma unroll
        for (int i = 0; i < 4; i++) {
            uint32_t pair = codes >> (8 * i);               // column 2i in the low nibble
            pair = (pair & 0xF) | (pair & 0xF0) << 12;
            pair = (pair & 0x00070007) << 6 | (pair & 0x00080008) << 12;
            __nv_bfloat162 w = __hmul2(*(__nv_bfloat162 *)&pair, *(__nv_bfloat162 *)&two_126);
            w = __hmul2(w, *(__nv_bfloat162 *)&bits);
            out[i] = *(uint32_t *)&w;
        }
        return make_uint4(out[0], out[1], out[2], out[3]);
    }
};

struct Fp8 {                            // one scale per 128 x 128 codes
    typedef uint2 Eight;
    __device__ static size_t scale_at(size_t eight, int C) {
        unsigned row = (unsigned)eight / (unsigned)(C / 8), column = (unsigned)eight % (C / 8) * 8;
        return (size_t)(row / 128) * ((C + 127) / 128) + column / 128;
    }
    __device__ static uint4 widen(Eight codes, uint8_t scale) {
        float s = __uint_as_float(scale == 0 ? 0x00400000u : scale == 255 ? 0x7FC00000u
                                                                          : (uint32_t)scale << 23);
        uint32_t out[4];
        #pragma unroll
        for (int i = 0; i < 4; i++) {
            uint16_t pair = (uint16_t)((i < 2 ? codes.x : codes.y) >> (16 * (i % 2)));
            __half2_raw half = __nv_cvt_fp8x2_to_halfraw2(pair, __NV_E4M3);
            float2 w = __half22float2(*(__half2 *)&half);
            out[i] = pack_bf16(w.x * s, w.y * s);
        }
        return make_uint4(out[0], out[1], out[2], out[3]);
    }
};

// out + e slice (O,C) = the matrix e of w (E,O,C), scales beside it. A thread keeps 8 loads of 4
// (fp8: 8) bytes in flight and stores 8 x 16: bound by the 2 bytes written per weight.
template <typename F>
__global__ void __launch_bounds__(256) widen_kernel(bf16 *out, size_t slice,
                                                    const typename F::Eight *w,
                                                    const uint8_t *scale, int O, int C,
                                                    size_t scales) {
    const int each = 8;
    size_t count = (size_t)O * C / 8, at = (size_t)blockIdx.x * (256 * each) + threadIdx.x;
    w += blockIdx.y * count;
    scale += blockIdx.y * scales;
    uint4 *to = (uint4 *)(out + blockIdx.y * slice);
    typename F::Eight codes[each];
    uint8_t s[each];
    #pragma unroll
    for (int i = 0; i < each; i++) {
        size_t eight = at + i * 256;
        if (eight < count) { codes[i] = w[eight], s[i] = scale[F::scale_at(eight, C)]; }
    }
    #pragma unroll
    for (int i = 0; i < each; i++) {
        if (at + i * 256 < count) { to[at + i * 256] = F::widen(codes[i], s[i]); }
    }
}

// out + e slice: row c, ld apart, = column c of matrix e. A CTA turns 128 rows x 64 columns: a
// thread widens 32 columns of two rows, interleaves them, and the tile goes through shared memory,
// so that 256 bytes of a row are written together. O and ld are multiples of 8, C of 32.
template <typename F>
__global__ void __launch_bounds__(128) widen_transposed_kernel(bf16 *out, size_t slice, int ld,
                                                               const typename F::Eight *w,
                                                               const uint8_t *scale, int O, int C,
                                                               size_t scales) {
    struct alignas(16) Codes { typename F::Eight eight[4]; };
    const int pitch = 68;       // words per column of 128 rows; 16-byte reads stay aligned
    __shared__ alignas(16) uint32_t tile[64 * pitch];
    int o0 = blockIdx.x * 128, c0 = blockIdx.y * 64, lane = threadIdx.x % 32;
    int half = threadIdx.x / 32 % 2, strip = threadIdx.x / 64;
    int o = o0 + 64 * half + 2 * lane, c = c0 + 32 * strip;
    w += blockIdx.z * ((size_t)O * C / 8);
    scale += blockIdx.z * scales;
    out += blockIdx.z * slice;
    if (o < O && c < C) {
        size_t first = ((size_t)o * C + c) / 8, second = first + C / 8;
        Codes a = *(const Codes *)(w + first), b = *(const Codes *)(w + second);
        uint8_t scale_a = scale[F::scale_at(first, C)], scale_b = scale[F::scale_at(second, C)];
        uint32_t *to = tile + 32 * strip * pitch + 32 * half + lane;
        #pragma unroll
        for (int i = 0; i < 4; i++) {
            uint4 wide_a = F::widen(a.eight[i], scale_a), wide_b = F::widen(b.eight[i], scale_b);
            uint32_t x[4] = { wide_a.x, wide_a.y, wide_a.z, wide_a.w };
            uint32_t y[4] = { wide_b.x, wide_b.y, wide_b.z, wide_b.w };
            #pragma unroll
            for (int j = 0; j < 4; j++) {
                to[(8 * i + 2 * j) * pitch] = __byte_perm(x[j], y[j], 0x5410);
                to[(8 * i + 2 * j + 1) * pitch] = __byte_perm(x[j], y[j], 0x7632);
            }
        }
    }
    __syncthreads();
    for (int i = threadIdx.x; i < 64 * 16; i += 128) {
        int column = i / 16, row = i % 16 * 8;
        if (c0 + column < C && o0 + row < O) {
            *(uint4 *)(out + (size_t)(c0 + column) * ld + o0 + row)
                = *(const uint4 *)(tile + column * pitch + row / 2);
        }
    }
}

// The four entries. fp4: out + e slice (O,C), or (C,ld) if transposed, from w (E,O,C/2) and scale
// (E,O,C/32). fp8: one matrix. slice and ld place w1 and w3 side by side in one scratch.
static void widen_fp4_gpu(bf16 *out, size_t slice, const uint8_t *w, const uint8_t *scale, int E,
                          int O, int C) {
    if ((size_t)E * O * C == 0) { return; }
    dim3 grid((unsigned)(((size_t)O * C / 8 + 2047) / 2048), E);
    widen_kernel<Fp4><<<grid, 256, 0, stream>>>(out, slice, (const uint32_t *)w, scale, O, C,
                                                (size_t)O * C / 32);
    cudaCheck(cudaGetLastError());
}
static void widen_fp4_transposed_gpu(bf16 *out, size_t slice, int ld, const uint8_t *w,
                                     const uint8_t *scale, int E, int O, int C) {
    if ((size_t)E * O * C == 0) { return; }
    dim3 grid((O + 127) / 128, (C + 63) / 64, E);
    widen_transposed_kernel<Fp4><<<grid, 128, 0, stream>>>(out, slice, ld, (const uint32_t *)w,
                                                           scale, O, C, (size_t)O * C / 32);
    cudaCheck(cudaGetLastError());
}
static void widen_fp8_gpu(bf16 *out, const uint8_t *w, const uint8_t *scale, int O, int C) {
    if ((size_t)O * C == 0) { return; }
    unsigned grid = (unsigned)(((size_t)O * C / 8 + 2047) / 2048);
    widen_kernel<Fp8><<<grid, 256, 0, stream>>>(out, 0, (const uint2 *)w, scale, O, C, 0);
    cudaCheck(cudaGetLastError());
}
static void widen_fp8_transposed_gpu(bf16 *out, int ld, const uint8_t *w, const uint8_t *scale,
                                     int O, int C) {
    if ((size_t)O * C == 0) { return; }
    dim3 grid((O + 127) / 128, (C + 63) / 64);
    widen_transposed_kernel<Fp8><<<grid, 128, 0, stream>>>(out, 0, ld, (const uint2 *)w, scale, O,
                                                           C, 0);
    cudaCheck(cudaGetLastError());
}

// -------------------------------------------------------------------------------------------------
// 2 v3, v4 and v5: the grouped product, with tiles that its launcher would not choose

// W bf16, or fp4 (BN 128, MT 2: then there is no `width` to choose).
template <int BN, int MT, int W_BY_K, int OUT_F32, int W_FP4>
static void launch(const Product &p) {
    const int depth = p.offset ? 1 : p.E;
    auto weights = [&](const bf16 *w, int K) {
        const size_t slice = (size_t)p.N * K;
        return W_BY_K ? tensor_map(w, 0, p.N, K, p.E, p.N, slice, PRODUCT_K)
                      : tensor_map(w, 0, K, p.N, p.E, K, slice, BN);
    };
    CUtensorMap x = tensor_map(p.x, 0, p.K, p.rows, depth, p.ldx, depth > 1 ? p.x_group : p.ldx,
                               PRODUCT_ROWS);
    CUtensorMap out = tensor_map(p.out, OUT_F32, p.N, p.rows, depth, p.ldo,
                                 depth > 1 ? p.out_group : p.ldo, 16);
    CUtensorMap w = W_FP4 ? x : weights(p.w, p.K), v = p.KU ? weights(p.v, p.KU) : w;
    CUtensorMap u = p.KU ? tensor_map(p.u, 0, p.KU, p.rows, 1, p.ldu, p.ldu, PRODUCT_ROWS) : x;
    ProductShape s = { p.E, p.rows, p.N, p.K, p.KU, p.offset != NULL, p.out_add, p.ldo,
                       p.offset ? 0 : p.out_group, p.codes, p.scales };
    auto kernel = product_kernel<BN, MT, W_BY_K, OUT_F32, W_FP4>;
    const int bytes = 1024 + (int)ProductMemory<BN, MT>::SIZE;
    cudaCheck(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
    kernel<<<multiprocessors(), W_FP4 ? 512 : 384, bytes, stream>>>(p.out, out, x, w, u, v,
                                                                    p.offset, s);
    cudaCheck(cudaGetLastError());
}

// The launcher of kernels.cu, where it takes tiles that wide by itself.
static void product_of_width(const Product &p, int width) {
    static void (*const others[2][2][2])(const Product &) = {       // [width][w_by_k][out_f32]
        { { launch<128, 1, 0, 0, 0>, launch<128, 1, 0, 1, 0> },
          { launch<128, 1, 1, 0, 0>, launch<128, 1, 1, 1, 0> } },
        { { launch<256, 1, 0, 0, 0>, launch<256, 1, 0, 1, 0> },
          { launch<256, 1, 1, 0, 0>, launch<256, 1, 1, 1, 0> } } };
    if (p.rows == 0 || width == product_width(p, multiprocessors())) { grouped_product(p); }
    else { others[width == 256][p.w_by_k][p.out_f32](p); }
}

// -------------------------------------------------------------------------------------------------
// 3 The rungs below: v1 and v2

// v1: a thread per output, weights decoded on the way. K multiple of 32. Bound by the instructions
// that decode, and by the cache lines of 32 rows of W at once: 0.1 % of the tensor cores.
__global__ void experts_v1_kernel(bf16 *out, const bf16 *x, const uint8_t *w, const uint8_t *scale,
                                  const int *offset, int E, int N, int K) {
    int n = blockIdx.x * blockDim.x + threadIdx.x, r = blockIdx.y, e = 0;
    if (n >= N || r >= offset[E]) { return; }
    while (r >= offset[e + 1]) { e++; }
    const uint8_t *codes = w + ((size_t)e * N + n) * (K / 2);
    const uint8_t *s = scale + ((size_t)e * N + n) * (K / 32);
    float sum = 0;
    for (int k = 0; k < K; k += 2) {
        const float magnitude[8] = { 0, 0.5f, 1, 1.5f, 2, 3, 4, 6 };
        uint8_t byte = codes[k / 2];
        float unit = exp2f((float)s[k / 32] - 127);
        float low = magnitude[byte & 7] * (byte & 8 ? -unit : unit);
        float high = magnitude[byte >> 4 & 7] * (byte & 128 ? -unit : unit);
        sum += low * __bfloat162float(x[(size_t)r * K + k]);
        sum += high * __bfloat162float(x[(size_t)r * K + k + 1]);
    }
    out[(size_t)r * N + n] = __float2bfloat16(sum);
}

// v2: one after the other, with the counts on the host. out (rows,N) = x (rows,K) w^T, w (N,K).
static void experts_v2(void *out, cudaDataType type, const bf16 *x, const bf16 *w,
                       const int *offset_h, int E, int N, int K) {
    for (int e = 0; e < E; e++) {
        const size_t row = offset_h[e];
        product((char *)out + row * N * (type == CUDA_R_32F ? 4 : 2), type, x + row * K,
                w + (size_t)e * N * K, offset_h[e + 1] - offset_h[e], K, N, 0);
    }
}

// -------------------------------------------------------------------------------------------------
// 4 Checks
//
// Small integers: every sum is exact in fp32 in any order, so the kernels must agree with plain
// loops to the last bit. Outputs are poisoned, gaps and rows that belong to nobody are NaN on input
// and must be untouched on output.

static bf16 small_integer(uint64_t seed, size_t i, int most) {
    return __float2bfloat16((float)((int)(hash64(seed + i) % (2 * most + 1)) - most));
}
// (rows,columns) with rows pitch apart; NaN between, and in what `live` rows leave.
static std::vector<bf16> integers(size_t rows, size_t live, size_t columns, size_t pitch,
                                  uint64_t seed, int most) {
    std::vector<bf16> v(rows * pitch, __float2bfloat16(NAN));
    for (size_t r = 0; r < live; r++) {
        for (size_t c = 0; c < columns; c++) {
            v[r * pitch + c] = small_integer(seed, r * columns + c, most);
        }
    }
    return v;
}

struct Case { std::vector<int> rows; int N, K, KU, batched; };

// The plain loops: out (rows of all groups,N), exact.
static std::vector<float> oracle(const Case &c, const std::vector<bf16> &x, size_t ldx,
                                 const std::vector<bf16> &w, const std::vector<bf16> &u, size_t ldu,
                                 const std::vector<bf16> &v) {
    int E = (int)c.rows.size(), N = c.N, K = c.K, KU = c.KU;
    std::vector<int> group, row;            // of each output row; batched: all rows in every group
    for (int e = 0, first = 0; e < E; e++) {
        for (int r = 0; r < c.rows[e]; r++) { group.push_back(e), row.push_back(first + r); }
        if (!c.batched) { first += c.rows[e]; }
    }
    std::vector<float> out(group.size() * N);
    std::vector<float> wide_w(w.size()), wide_v(v.size());
    for (size_t i = 0; i < w.size(); i++) { wide_w[i] = (float)w[i]; }
    for (size_t i = 0; i < v.size(); i++) { wide_v[i] = (float)v[i]; }
    for (size_t i = 0; i < group.size(); i++) {
        std::vector<float> xi(K), ui(KU);
        size_t e = group[i];
        const bf16 *xr = &x[row[i] * ldx + (c.batched ? e * K : 0)];
        for (int k = 0; k < K; k++) { xi[k] = (float)xr[k]; }
        for (int k = 0; k < KU; k++) { ui[k] = (float)u[row[i] * ldu + k]; }
        for (int n = 0; n < N; n++) {
            const float *wn = &wide_w[(e * N + n) * K];
            float sum = 0;
            for (int k = 0; k < K; k++) { sum += xi[k] * wn[k]; }
            for (int k = 0; k < KU; k++) { sum += ui[k] * wide_v[(e * N + n) * KU + k]; }
            out[i * N + n] = sum;
        }
    }
    return out;
}

// (E,A,B) -> (E,B,A)
static std::vector<bf16> transposed(const std::vector<bf16> &m, int E, int A, int B) {
    std::vector<bf16> t(m.size());
    for (int e = 0; e < E; e++) {
        for (int a = 0; a < A; a++) {
            for (int b = 0; b < B; b++) {
                t[((size_t)e * B + b) * A + a] = m[((size_t)e * A + a) * B + b];
            }
        }
    }
    return t;
}

static void check_product(const Case &c) {
    int E = (int)c.rows.size(), N = c.N, K = c.K, KU = c.KU, total = 0;
    std::vector<int> offset(1, 0);
    for (int n : c.rows) { offset.push_back(total += n); }
    if (c.batched) { total = c.rows[0]; }
    size_t spare = 40, rows = total + spare, ldx = (c.batched ? (size_t)E * K : K) + 24;
    size_t ldu = KU + 8, ldo = (c.batched ? (size_t)E * N : N) + 16;
    if (c.batched) { rows = total; }
    std::vector<bf16> x = integers(rows, total, ldx - 24, ldx, 1, 3);
    std::vector<bf16> w = integers((size_t)E * N, (size_t)E * N, K, K, 2, 3);
    std::vector<bf16> u = integers(rows, total, KU, ldu, 3, 3);
    std::vector<bf16> v = integers((size_t)E * N, (size_t)E * N, KU, KU, 4, 3);
    std::vector<float> right = oracle(c, x, ldx, w, u, ldu, v);
    bf16 *dx = to_device(x), *du = to_device(u), *dw[2], *dv[2];
    dw[0] = to_device(w), dv[0] = to_device(v);
    dw[1] = to_device(transposed(w, E, N, K)), dv[1] = to_device(transposed(v, E, N, KU));
    int *d_offset = to_device(offset);
    void *out = device_alloc<float>(rows * ldo);

    for (int variant = 0; variant < 12; variant++) {
        int mode = variant % 3, by_k = variant / 3 % 2, width = variant / 6 ? 256 : 128;
        Product p = {};
        p.out = out, p.ldo = ldo, p.out_f32 = mode > 0, p.out_add = mode == 2;
        p.x = dx, p.ldx = ldx, p.w = dw[by_k], p.w_by_k = by_k;
        p.u = du, p.ldu = ldu, p.v = dv[by_k], p.KU = KU;
        p.offset = c.batched ? NULL : d_offset, p.x_group = K, p.out_group = N;
        p.E = E, p.rows = (int)rows, p.N = N, p.K = K;
        // 0x41 in every byte: 12.08 as a float, and an old value for +=.
        cudaCheck(cudaMemset(out, 0x41, rows * ldo * sizeof(float)));
        product_of_width(p, width);
        size_t wrong = 0, touched = 0, first = 0;
        float old;
        memset(&old, 0x41, sizeof old);
        auto compare = [&](auto &&got, auto as_stored, auto poison) {
            std::vector<char> owned(rows * ldo);
            size_t i = 0;
            for (int e = 0, from = 0; e < E; e++) {
                for (int r = 0; r < c.rows[e]; r++, i++) {
                    for (int n = 0; n < N; n++) {
                        size_t at = (from + r) * ldo + (c.batched ? (size_t)e * N : 0) + n;
                        owned[at] = 1;
                        if (!(got[at] == as_stored(right[i * N + n])) && !wrong++) { first = at; }
                    }
                }
                if (!c.batched) { from += c.rows[e]; }
            }
            for (size_t at = 0; at < rows * ldo; at++) {
                touched += !owned[at] && memcmp(&got[at], &poison, sizeof poison) != 0;
            }
        };
        if (mode == 0) {
            uint16_t poison = 0x4141;
            compare(to_host((bf16 *)out, rows * ldo), [](float f) { return __float2bfloat16(f); },
                    poison);
        } else {
            compare(to_host((float *)out, rows * ldo),
                    [&](float f) { return mode == 2 ? old + f : f; }, old);
        }
        check(wrong == 0 && touched == 0, "E %d rows %d.. N %d K %d KU %d batched %d: %s w_by_k %d "
              "width %d: %zu wrong (first row %zu column %zu), %zu touched", E, c.rows[0], N, K, KU,
              c.batched, mode == 0 ? "bf16" : mode == 1 ? "fp32" : "fp32 +=", by_k, width, wrong,
              first / ldo, first % ldo, touched);
    }
    cudaFree(dx), cudaFree(du), cudaFree(dw[0]), cudaFree(dw[1]), cudaFree(dv[0]), cudaFree(dv[1]);
    cudaFree(d_offset), cudaFree(out);
}

// What reads codes: v1, v2, and v5 in all its forms. Scales of 1/2, 1 and 2 keep the sums exact.
static void check_codes(const Case &c) {
    const float magnitude[8] = { 0, 0.5f, 1, 1.5f, 2, 3, 4, 6 };
    const int E = (int)c.rows.size(), N = c.N, K = c.K;
    std::vector<int> offset(1, 0);
    for (int n : c.rows) { offset.push_back(offset.back() + n); }
    const size_t total = offset[E], rows = total + 40, weights = (size_t)E * N * K;
    std::vector<uint8_t> codes(weights / 2), scales(weights / 32);
    for (size_t i = 0; i < codes.size(); i++) { codes[i] = (uint8_t)hash64(i); }
    for (size_t i = 0; i < scales.size(); i++) { scales[i] = (uint8_t)(126 + hash64(i) % 3); }
    std::vector<bf16> w(weights), x = integers(rows, total, K, K, 1, 3);
    for (size_t i = 0; i < weights; i++) {
        const int code = codes[i / 2] >> (i % 2 * 4) & 15;
        w[i] = __float2bfloat16(ldexpf(magnitude[code & 7] * (code & 8 ? -1.f : 1.f),
                                       scales[i / 32] - 127));
    }
    const std::vector<bf16> u = integers(rows, total, c.KU, c.KU, 3, 3);
    const std::vector<bf16> v = integers((size_t)E * N, (size_t)E * N, c.KU, c.KU, 4, 3);
    bf16 *dx = to_device(x), *du = to_device(u), *wide = device_alloc<bf16>(weights);
    bf16 *dv[2] = { to_device(v), to_device(transposed(v, E, N, c.KU)) };
    uint8_t *d_codes = to_device(codes), *d_scales = to_device(scales);
    int *d_offset = to_device(offset);
    float *out = device_alloc<float>(rows * N);
    std::vector<float> right;
    // Runs it on poison, which rows of nobody keep; add: to it.
    auto compare = [&](const char *name, bool f32, bool add, auto call) {
        cudaCheck(cudaMemset(out, 0x41, rows * N * sizeof(float)));
        call();
        cudaCheck(cudaGetLastError());
        const std::vector<float> got = to_host(out, rows * N);
        const bf16 *narrow = (const bf16 *)got.data();
        float old;
        memset(&old, 0x41, sizeof old);
        size_t wrong = 0;
        for (size_t i = 0; i < rows * N; i++) {
            const bool mine = i < total * N;
            if (f32) { wrong += got[i] != (!mine ? old : add ? old + right[i] : right[i]); }
            else if (mine) { wrong += (float)narrow[i] != (float)__float2bfloat16(right[i]); }
            else { wrong += memcmp(narrow + i, &old, 2) != 0; }
        }
        check(wrong == 0, "codes, E %d N %d K %d KU %d, %s: %zu wrong", E, N, K, c.KU, name, wrong);
    };
    for (int form = 0; form < 4; form++) {
        const int by_k = form & 1;
        Case one = c;
        one.KU = form & 2 ? c.KU : 0;
        right = oracle(one, x, K, by_k ? transposed(w, E, K, N) : w, u, c.KU, v);
        if (form == 0) {
            compare("v1", false, false, [&] {
                experts_v1_kernel<<<dim3((N + 127) / 128, (unsigned)rows), 128>>>(
                    (bf16 *)out, dx, d_codes, d_scales, d_offset, E, N, K); });
            compare("v2", true, false, [&] {
                widen_fp4_gpu(wide, (size_t)N * K, d_codes, d_scales, E, N, K);
                experts_v2(out, CUDA_R_32F, dx, wide, offset.data(), E, N, K); });
        }
        for (int mode = 0; mode < 3; mode++) {
            Product p = {};
            p.out = out, p.ldo = N, p.out_f32 = mode > 0, p.out_add = mode == 2;
            p.x = dx, p.ldx = K, p.codes = d_codes, p.scales = d_scales, p.w_by_k = by_k;
            p.u = du, p.ldu = c.KU, p.v = dv[by_k], p.KU = one.KU;
            p.offset = d_offset, p.E = E, p.rows = (int)rows, p.N = N, p.K = K;
            char name[64];
            snprintf(name, sizeof name, "v5 w_by_k %d border %d mode %d", by_k, one.KU, mode);
            compare(name, mode > 0, mode == 2, [&] {
                if (by_k && mode == 0) { launch<128, 2, 1, 0, 1>(p); } else { grouped_product(p); }
            });
        }
    }
    cudaFree(dx), cudaFree(du), cudaFree(wide), cudaFree(dv[0]), cudaFree(dv[1]);
    cudaFree(d_codes), cudaFree(d_scales), cudaFree(d_offset), cudaFree(out);
}

static void check_products(void) {
    std::vector<std::vector<int>> rows = {
        { 1 }, { 63 }, { 64 }, { 65 }, { 129 }, { 256 }, { 0, 129, 0, 64, 1, 0, 65, 300, 0 },
        { 0, 0 }, { 385, 127, 128, 640 } };
    for (auto &r : rows) {
        check_product({ r, 256, 128, 0, 0 });
        check_product({ r, 128, 128, 16, 0 });
        check_product({ r, 640, 192, 64, 0 });
    }
    check_product({ { 65, 0, 200 }, 264, 72, 8, 0 });           // tails in N and K
    check_product({ { 65, 0, 200 }, 8, 64, 80, 0 });
    check_product({ { 130 }, 1024, 512, 128, 0 });
    check_product({ { 2437, 5, 1100 }, 648, 64, 16, 0 });       // more than one band
    check_product({ { 4096 }, 512, 64, 0, 0 });
    check_product({ std::vector<int>(100, 33), 256, 64, 16, 0 });
    for (int r : { 1, 64, 65, 129, 300 }) {                     // groups side by side (wo_a)
        check_product({ { r, r }, 128, 128, 0, 1 });
        check_product({ std::vector<int>(8, r), 264, 192, 0, 1 });
    }
    check_codes({ { 0, 129, 0, 64, 1, 0, 65, 300, 0 }, 192, 128, 16, 0 });
    check_codes({ { 385, 127, 128, 640 }, 256, 192, 64, 0 });
    check_codes({ std::vector<int>(100, 33), 64, 64, 8, 0 });
}

static uint16_t bf16_bits(float f) {
    bf16 b = __float2bfloat16(f);
    uint16_t bits;
    memcpy(&bits, &b, 2);
    return bits;
}

// Every code with every scale: e m of a row of 16 bytes meets all 256 values, scales 0 .. 254.
static void check_widening(void) {
    const float magnitude[8] = { 0, 0.5f, 1, 1.5f, 2, 3, 4, 6 };
    int E = 3, O = 200, C = 288;                    // tails of the 128 x 64 tiles
    std::vector<uint8_t> w((size_t)E * O * C / 2), s((size_t)E * O * C / 32);
    for (size_t i = 0; i < w.size(); i++) { w[i] = (uint8_t)hash64(i); }
    for (size_t i = 0; i < s.size(); i++) { s[i] = (uint8_t)(i * 7 % 255); }
    uint8_t *dw = to_device(w), *ds = to_device(s);
    size_t slice = (size_t)C * (O + 16);
    for (int turned = 0; turned < 2; turned++) {
        uint16_t *out = device_alloc<uint16_t>(E * slice);
        cudaCheck(cudaMemset(out, 0x41, E * slice * 2));
        if (turned) { widen_fp4_transposed_gpu((bf16 *)out, slice, O + 16, dw, ds, E, O, C); }
        else { widen_fp4_gpu((bf16 *)out, slice, dw, ds, E, O, C); }
        std::vector<uint16_t> got = to_host(out, E * slice);
        size_t wrong = 0, written = 0;
        for (uint16_t g : got) { written += g != 0x4141; }
        for (int e = 0; e < E; e++) {
            for (int o = 0; o < O; o++) {
                for (int c = 0; c < C; c++) {
                    size_t i = ((size_t)e * O + o) * C + c;
                    int code = w[i / 2] >> (i % 2 * 4) & 15;
                    float value = ldexpf(magnitude[code & 7] * (code & 8 ? -1.f : 1.f),
                                         s[i / 32] - 127);
                    size_t at = turned ? e * slice + (size_t)c * (O + 16) + o
                                       : e * slice + (size_t)o * C + c;
                    wrong += got[at] != bf16_bits(value);
                }
            }
        }
        check(wrong == 0 && written <= (size_t)E * O * C, "fp4 widening, transposed %d: %zu wrong",
              turned, wrong);
        cudaFree(out);
    }
    O = 264, C = 416;
    w.resize((size_t)O * C);
    s.resize((size_t)((O + 127) / 128) * ((C + 127) / 128));
    const uint8_t scales[12] = { 127, 107, 147, 0, 1, 254, 128, 126, 120, 134, 100, 150 };
    for (size_t i = 0; i < w.size(); i++) { w[i] = (uint8_t)hash64(i + 77); }
    for (size_t i = 0; i < s.size(); i++) { s[i] = scales[i % 12]; }
    dw = to_device(w), ds = to_device(s);
    for (int turned = 0; turned < 2; turned++) {
        uint16_t *out = device_alloc<uint16_t>(slice = (size_t)C * (O + 8));
        cudaCheck(cudaMemset(out, 0x41, slice * 2));
        if (turned) { widen_fp8_transposed_gpu((bf16 *)out, O + 8, dw, ds, O, C); }
        else { widen_fp8_gpu((bf16 *)out, dw, ds, O, C); }
        std::vector<uint16_t> got = to_host(out, slice);
        size_t wrong = 0;
        for (int o = 0; o < O; o++) {
            for (int c = 0; c < C; c++) {
                int code = w[(size_t)o * C + c], m = code & 7, e = code >> 3 & 15;
                float value = e ? ldexpf(1 + m / 8.f, e - 7) : ldexpf((float)m, -9);
                value = ldexpf(code & 128 ? -value : value,
                               s[o / 128 * ((C + 127) / 128) + c / 128] - 127);
                uint16_t g = got[turned ? (size_t)c * (O + 8) + o : (size_t)o * C + c];
                bool nan = (code & 127) == 127;
                wrong += nan ? (g & 0x7FFF) <= 0x7F80 : g != bf16_bits(value);
            }
        }
        check(wrong == 0, "fp8 widening, transposed %d: %zu wrong", turned, wrong);
        cudaFree(out);
    }
}

// -------------------------------------------------------------------------------------------------
// 5 Times

static void print_rate(const char *name, double flop, float ms) {
    printf("  %-34s %8.3f ms %7.1f TFLOP/s  %5.1f %%\n", name, ms, flop / ms * 1e-9,
           flop / ms * 1e-9 / CEILING_TFLOPS * 100);
}

struct Candidate { const char *name; std::function<void(int)> call; };

// Times the candidates in turn, so that they meet the same clocks, with `between` before each: what
// runs next to a product in training, and pushes its inputs out of L2. Medians.
static void race(const std::vector<Candidate> &list, double flop, std::function<void()> between) {
    const int rounds = 15;
    std::vector<std::vector<float>> ms(list.size());
    std::vector<cudaEvent_t> event(list.size() * 2);
    for (cudaEvent_t &e : event) { cudaCheck(cudaEventCreate(&e)); }
    for (int r = 0; r < rounds; r++) {
        for (size_t i = 0; i < list.size(); i++) {
            between();
            cudaCheck(cudaEventRecord(event[2 * i], stream));
            list[i].call(r);
            cudaCheck(cudaEventRecord(event[2 * i + 1], stream));
        }
        cudaCheck(cudaDeviceSynchronize());
        for (size_t i = 0; i < list.size(); i++) {
            float t;
            cudaCheck(cudaEventElapsedTime(&t, event[2 * i], event[2 * i + 1]));
            ms[i].push_back(t);
        }
    }
    for (size_t i = 0; i < list.size(); i++) {
        std::sort(ms[i].begin(), ms[i].end());
        print_rate(list[i].name, flop, ms[i][rounds / 2]);
    }
    for (cudaEvent_t &e : event) { cudaCheck(cudaEventDestroy(e)); }
}

static void time_experts(int rows, int N, int K, bool slow) {
    const int E = 32, KU = 16;
    std::vector<int> offset_h = skewed_offsets(E, rows);
    int *offset = to_device(offset_h);
    size_t weights = (size_t)E * N * K;
    uint8_t *packed = random_bytes(weights / 2, 1, 0, 255);
    uint8_t *scale = random_bytes(weights / 32, 2, 118, 122);
    bf16 *w = device_alloc<bf16>(weights), *w_by_k = device_alloc<bf16>(weights);
    bf16 *x = random_normal((size_t)rows * K, 3, 1), *u = random_normal((size_t)rows * KU, 4, 1);
    bf16 *v = random_normal((size_t)E * N * KU, 5, 0.1f);
    bf16 *out = device_alloc<bf16>((size_t)rows * N);
    float *reference = device_alloc<float>((size_t)rows * N);
    float *f32 = device_alloc<float>((size_t)rows * N);
    double flop = 2.0 * rows * N * K, bytes = weights * (0.5 + 1. / 32 + 2);
    auto widen = [&] { widen_fp4_gpu(w, (size_t)N * K, packed, scale, E, N, K); };
    auto widen_transposed = [&] {
        widen_fp4_transposed_gpu(w_by_k, (size_t)N * K, N, packed, scale, E, N, K); };
    printf("experts: %d rows, N %d, K %d\n", rows, N, K);
    float ms = time_ms([&](int) { widen(); });
    printf("  %-34s %8.3f ms %7.0f GB/s\n", "widen", ms, bytes / ms * 1e-6);
    ms = time_ms([&](int) { widen_transposed(); });
    printf("  %-34s %8.3f ms %7.0f GB/s\n", "widen transposed", ms, bytes / ms * 1e-6);

    Product p = {};
    p.out = out, p.ldo = N, p.x = x, p.ldx = K, p.w = w, p.offset = offset;
    p.E = E, p.rows = rows, p.N = N, p.K = K;
    Product by_k = p, fp32 = p, add, border = p, codes = p, codes_by_k, codes_add;
    by_k.w = w_by_k, by_k.w_by_k = 1;
    fp32.out = f32, fp32.out_f32 = 1;
    add = fp32, add.out_add = 1;
    border.u = u, border.ldu = KU, border.v = v, border.KU = KU;
    codes.w = NULL, codes.codes = packed, codes.scales = scale;
    codes_by_k = codes, codes_by_k.w_by_k = 1;      // the same bytes, taken for an (E,K,N) matrix
    codes_add = codes_by_k, codes_add.out = f32, codes_add.out_f32 = codes_add.out_add = 1;
    Product border5 = codes;
    border5.u = u, border5.ldu = KU, border5.v = v, border5.KU = KU;

    experts_v2(reference, CUDA_R_32F, x, w, offset_h.data(), E, N, K);
    auto compare = [&](const char *name, double error, double most) {
        check(error <= most, "%s against cuBLAS: %g", name, error);
        cudaCheck(cudaMemset(out, 0xFF, (size_t)rows * N * 2));
    };
    size_t n = (size_t)rows * N;
    if (slow) {
        ms = time_ms([&](int) {
            experts_v1_kernel<<<dim3((N + 127) / 128, rows), 128>>>(out, x, packed, scale, offset,
                                                                   E, N, K); }, 1, 0);
        print_rate("v1 a thread per output", flop, ms);
        compare("v1", device_error(out, reference, n), 3e-3);
    }
    grouped_product(by_k);
    compare("v3, W by k", device_error(out, reference, n), 3e-3);
    grouped_product(fp32);
    grouped_product(add);
    experts_v2(reference, CUDA_R_32F, x, w, offset_h.data(), E, N, K);
    std::vector<float> once = to_host(reference, 65536), twice = to_host(f32, 65536);
    for (float &f : once) { f *= 2; }
    compare("v3, fp32 and +=", relative_error(twice, once), 1e-5);
    // v5 does the same sums in the same order as v3 on the widened copy: the same bits.
    grouped_product(p);
    uint64_t bits = device_hash(out, n * 2);
    compare("v3", device_error(out, reference, n), 3e-3);
    grouped_product(codes);
    check(bits == device_hash(out, n * 2), "v5 has v3's bits");
    widen_fp4_gpu(w_by_k, (size_t)N * K, packed, scale, E, K, N);
    grouped_product(by_k);
    bits = device_hash(out, n * 2);
    cudaCheck(cudaMemset(out, 0xFF, n * 2));
    launch<128, 2, 1, 0, 1>(codes_by_k);
    check(bits == device_hash(out, n * 2), "v5, W row by k, has v3's bits");
    grouped_product(border);
    bits = device_hash(out, n * 2);
    cudaCheck(cudaMemset(out, 0xFF, n * 2));
    grouped_product(border5);
    check(bits == device_hash(out, n * 2), "v5 with a border has v4's bits");
    grouped_product(p);
    bits = device_hash(out, n * 2);
    for (int i = 0; i < 5; i++) {
        compare("v3", device_error(out, reference, n), 3e-3);
        grouped_product(p);
        check(bits == device_hash(out, n * 2), "same bits in every run");
    }
    auto v2 = [&](int) { experts_v2(out, CUDA_R_16BF, x, w, offset_h.data(), E, N, K); };
    race({ { "v2 cuBLAS per expert", v2 },
           { "v3", [&](int) { grouped_product(p); } },
           { "v3, W row by k", [&](int) { grouped_product(by_k); } },
           { "v3, fp32 out", [&](int) { grouped_product(fp32); } },
           { "v3, fp32 out +=", [&](int) { grouped_product(add); } },
           { "v4, border of 16", [&](int) { grouped_product(border); } },
           { "v5, fp4", [&](int) { grouped_product(codes); } },
           { "v5, fp4, W row by k", [&](int) { launch<128, 2, 1, 0, 1>(codes_by_k); } },
           { "v5, fp4, W row by k, fp32 +=", [&](int) { grouped_product(codes_add); } },
           { "v5, fp4, border of 16", [&](int) { grouped_product(border5); } },
           { "widen, and v3", [&](int) { widen(); grouped_product(p); } } }, flop, widen);
    if (slow) {
        print_rate("v2 alone, for 0.4 s", flop, time_ms(v2, 200, 200));
        ms = time_ms([&](int) { grouped_product(p); }, 200, 200);
        print_rate("v3 alone, for 0.4 s", flop, ms);
    }
    cudaFree(offset), cudaFree(packed), cudaFree(scale), cudaFree(w), cudaFree(w_by_k), cudaFree(x);
    cudaFree(u), cudaFree(v), cudaFree(reference), cudaFree(f32), cudaFree(out);
}

// Dense products (groups 1), and wo_a's: groups of columns.
static void time_dense(int T, int groups, int N, int K) {
    size_t ldx = (size_t)groups * K, ldo = (size_t)groups * N, n = (size_t)T * ldo;
    bf16 *x = random_normal((size_t)T * ldx, 10, 1), *out = device_alloc<bf16>(n);
    bf16 *w = random_normal((size_t)groups * N * K, 50, 0.02f), *right = device_alloc<bf16>(n);
    size_t spare_n = 128 << 20;
    uint8_t *spare = device_alloc<uint8_t>(spare_n);
    double flop = 2.0 * T * groups * N * K;
    printf("dense: %d rows, %d x (N %d, K %d)\n", T, groups, N, K);
    float one = 1, zero = 0;
    for (int by_k = 0; by_k < 2; by_k++) {
        auto with_cublas = [&](int) {
            blasCheck(cublasGemmStridedBatchedEx(blas, by_k ? CUBLAS_OP_N : CUBLAS_OP_T,
                CUBLAS_OP_N, N, T, K, &one, w, CUDA_R_16BF, by_k ? N : K, (long long)N * K, x,
                CUDA_R_16BF, (int)ldx, K, &zero, out, CUDA_R_16BF, (int)ldo, N, groups,
                CUBLAS_COMPUTE_32F, CUBLAS_GEMM_DEFAULT));
        };
        with_cublas(0);
        cudaCheck(cudaMemcpy(right, out, n * 2, cudaMemcpyDeviceToDevice));
        Product p = {};
        p.out = out, p.x = x, p.w = w;
        p.ldo = ldo, p.ldx = ldx, p.x_group = K, p.out_group = N, p.w_by_k = by_k;
        p.E = groups, p.rows = T, p.N = N, p.K = K;
        for (int width : { 128, 256 }) {
            cudaCheck(cudaMemset(out, 0xFF, n * 2));
            product_of_width(p, width);
            double e = device_error(out, right, n);
            check(e < 3e-3, "dense N %d K %d by_k %d width %d against cuBLAS: %g", N, K, by_k,
                  width, e);
        }
        bool is_wide = product_width(p, multiprocessors()) == 256;
        race({ { by_k ? "cuBLAS, W row by k" : "cuBLAS", with_cublas },
               { is_wide ? "v3, 128 wide" : "v3, 128 wide (chosen)",
                 [&](int) { product_of_width(p, 128); } },
               { is_wide ? "v3, 256 wide (chosen)" : "v3, 256 wide",
                 [&](int) { product_of_width(p, 256); } } }, flop,
             [&] { cudaCheck(cudaMemsetAsync(spare, 1, spare_n, stream)); });
    }
    cudaFree(x), cudaFree(w), cudaFree(out), cudaFree(right), cudaFree(spare);
}

static void time_widen_fp8(int O, int C) {
    uint8_t *w = random_bytes((size_t)O * C, 1, 0, 126);
    uint8_t *s = random_bytes((size_t)(O / 128) * (C / 128), 2, 118, 122);
    bf16 *out = device_alloc<bf16>((size_t)O * C);
    float ms = time_ms([&](int) { widen_fp8_gpu(out, w, s, O, C); });
    printf("fp8 (%d,%d): widen %.4f ms %.0f GB/s, ", O, C, ms, 3.0 * O * C / ms * 1e-6);
    ms = time_ms([&](int) { widen_fp8_transposed_gpu(out, O, w, s, O, C); });
    printf("transposed %.4f ms %.0f GB/s\n", ms, 3.0 * O * C / ms * 1e-6);
    cudaFree(w), cudaFree(s), cudaFree(out);
}

int main(int argc, char **argv) {
    setvbuf(stdout, NULL, _IOLBF, 0);
    blasCheck(cublasCreate(&blas));
    check_widening();
    printf("widening: %d checks, %d failed\n", checks_done, checks_failed);
    check_products();
    printf("products: %d checks, %d failed\n", checks_done, checks_failed);
    if (checks_failed || (argc > 1 && strcmp(argv[1], "check") == 0)) { return checks_failed != 0; }
    time_experts(24576, 4096, 4096, true);
    time_experts(24576, 4096, 2048, false);
    time_experts(24576, 2048, 4096, false);
    time_experts(49152, 4096, 2048, false);
    time_experts(6144, 4096, 4096, false);
    const int shapes[][3] = { { 1, 1024, 4096 }, { 1, 32768, 1024 }, { 1, 512, 4096 },
                              { 1, 4096, 8192 }, { 8, 1024, 4096 } };
    for (auto &s : shapes) { time_dense(4096, s[0], s[1], s[2]); }
    time_widen_fp8(32768, 1024);
    time_widen_fp8(8192, 4096);
    printf("%d checks, %d failed\n", checks_done, checks_failed);
    return checks_failed != 0;
}
