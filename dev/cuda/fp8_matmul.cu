// fp8_matmul.cu: the grouped expert product on fp8 tensor cores, from packed fp4 weights.
//
//     out[r][n] = sum_b 2^(sx[r][b] + sw[e][n/128][b]) sum_{k in block b} x[r][k] w[e][n][k]
//
// x are e4m3 codes with a scale per row and 128 k, w e4m3 codes with a scale per 128 x 128; a block
// b is 128 k, e the group of row r. The weights are stored in fp4 and recast, one layer at a time,
// into scratch: w[n][k] for the forward, turned to w[k][n] for the backward, which is then the same
// product. (fp8 operands cannot be turned on their way into the tensor cores, as bf16 ones can.)
// One idea per rung:
//   v1  a thread per output
//   v2  tensor cores (wgmma m64n128k32) on tiles of 128 x 256 from shared memory, filled by the
//       copy engine and emptied in turn; sums of 128 k leave the tensor cores, are scaled and
//       added in fp32 registers, because inside they are kept to about 14 bits
//   v3  a ring of 4 stages, filled ahead by a producer
//   v4  + sum_j u[r][j] v[e][n][j], the border of a LoRA adapter, in bf16: further steps of the
//       same sums, rounded once with them. v3 is v4 with KU = 0: one kernel, shipped.
// v1 and v2 are here, v3, v4 and the recast are kernels.cu's own (4.3).
// The control: v2 with sums that stay inside the tensor cores for all of K.
//
// Arithmetic, 49,152 rows of 32 experts (8,192 tokens, 6 experts each), C 4,096, F 2,048:
//   products  w1 and w3 as one of N 4,096 K 4,096, w2 of N 4,096 K 2,048: 2.47 TFLOP, 1.25 ms at
//             the 1,979 TFLOP/s of the data sheet; at the clock that 700 W leave (1.4 GHz) 1.6 ms
//   recast    805 M weights, 0.43 GB in, 0.81 out: 0.29 ms at 4,277 GB/s
//   a K block 128 x 256 x 128: 1,024 tensor clocks, 48 KB in, 6 KB read by each of 16 wgmma of 64
//             clocks: (48 + 96) KB of shared memory traffic, 1,152 clocks at 128 bytes each. Adding
//             up takes 256 of 1,024 issue slots.
//
// Measured (one H200, a product after each recast, medians; TFLOP/s at N x K):
//                49,152 rows     4096 x 4096   4096 x 2048   2048 x 4096
//   v2                               765           749           748
//   v3                             1,079         1,053         1,062      (24,576: 1,041 .. 1,005)
//   v4, border 16                  1,068         1,028         1,038
//   recast                       3,670 GB/s, turned 3,500: 0.33 ms for a layer
//   three products of a layer and their recast: 936 forward, 932 backward; 24,576 rows: 807, 801
// (v2 was then v3's kernel with a ring of one stage.)
// Tried and dropped: warpgroups that take turns at the tensor cores by named barriers, 1,030 where
// v3 gave 1,040: they find their rhythm by themselves.
// The control at K 4,096, for numbers of one sign: 1 - 2xy/(xx+yy) is 2.9e-3 for sums left inside
// the tensor cores, 1.9e-6 (bf16's rounding) for sums taken out every 128 k.
//
//     nvcc -O3 -std=c++17 -gencode=arch=compute_90a,code=sm_90a -diag-suppress 177
//          fp8_matmul.cu -lcublas -o fp8_matmul && ./fp8_matmul
#include "../../kernels.cu"
#include "common.h"

using namespace grouped;

// -------------------------------------------------------------------------------------------------
// 1 v1: a thread per output, every `step`-th row; sums in Real

template <typename Real, typename Out>
__global__ void fp8_v1_kernel(Out *out, Fp8Product p, int step) {
    const int n = blockIdx.x * blockDim.x + threadIdx.x, row = blockIdx.y * step;
    int e = 0;
    if (n >= p.N || row >= p.offset[p.E]) { return; }
    while (row >= p.offset[e + 1]) { e++; }
    const uint8_t *x = p.x + (size_t)row * p.K, *w = p.w + ((size_t)e * p.N + n) * p.K;
    Real sum = 0;
    for (int b = 0; b < p.K / 128; b++) {
        Real part = 0;
        for (int k = b * 128; k < b * 128 + 128; k++) {
            part += (Real)e4m3_value(x[k]) * (Real)e4m3_value(w[k]);
        }
        sum += part * (Real)e8m0_value(p.x_scale[(size_t)row * (p.K / 128) + b])
             * (Real)e8m0_value(p.w_scale[((size_t)e * (p.N / 128) + n / 128) * (p.K / 128) + b]);
    }
    out[(size_t)blockIdx.y * p.N + n] = (Out)sum;
}

// -------------------------------------------------------------------------------------------------
// 2 v2: tensor cores, one stage
//
// A tile is 128 rows x 256 columns of one group, and 128 k at a time of x and w lie in shared
// memory: 48 KB, which one thread asks the copy engine for when both warpgroups are done with the
// last. A warpgroup has 128 x 128 sums in registers, the left or the right half: one column of w's
// scales, so that a row needs one factor per block. It multiplies 64 rows at a time into 64 further
// registers, waits, and adds them, scaled, to the sums. Nothing overlaps but the stores.
//
// Tiles are dealt to the CTAs as in kernels.cu, 4.2. Boxes of x may reach into the next group's
// rows, and boxes of w past N: what comes of them is never stored.

// INSIDE: sums stay in the tensor cores for all of K; right only where all scales are 1.
template <int INSIDE>
__global__ void __launch_bounds__(256, 1)
fp8_v2_kernel(bf16 *out, const __grid_constant__ CUtensorMap map_out,
              const __grid_constant__ CUtensorMap map_x, const __grid_constant__ CUtensorMap map_w,
              const uint8_t *x_scale, const uint8_t *w_scale, const int *offset,
              const __grid_constant__ ProductShape s) {
    extern __shared__ unsigned char dynamic[];
    typedef ProductMemory<256, 1> M;        // of which only the first stage is used
    const uint32_t base = (shared_address(dynamic) + 1023) / 1024 * 1024, full = base + M::FULL;
    const int warpgroup = threadIdx.x / 128, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int blocks = s.K / FP8_BLOCK, across = s.N / FP8_BLOCK;
    const uint32_t x0 = operand_low(base + M::X, 16);
    const uint32_t w0 = operand_low(base + M::W + warpgroup * 128 * 128, 16);
    ProductTile t;
    ProductWalk walk = { 0, 0 };
    uint32_t phase = 0;
    if (threadIdx.x == 0) {
        barrier_init(full, 1);
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    for (int i = blockIdx.x; product_tile<256, 1>(t, walk, i, offset, s); i += gridDim.x) {
        float sum[2][64], part[64];
        // This thread's rows are l / 4 and l / 4 + 8 of its warp's 16, in both halves of 64.
        int row_scale[4];
        #pragma unroll
        for (int r = 0; r < 4; r++) {
            const int row = t.row + r / 2 * 64 + warp % 4 * 16 + lane / 4 + r % 2 * 8;
            row_scale[r] = min(row, s.rows - 1) * blocks;
        }
        const int column_scale = (t.group * across + min(t.n / FP8_BLOCK + warpgroup, across - 1))
                               * blocks;
        #pragma unroll
        for (int k = 0; k < 64; k++) { sum[0][k] = sum[1][k] = 0; }
        for (int b = 0; b < blocks; b++, phase ^= 1) {
            __syncthreads();                // the barrier is ready, and nobody reads the stage
            if (threadIdx.x == 0) {         // to the copy engine two codes are one bf16
                barrier_expect(full, M::X_STAGE + M::W_STAGE);
                tma_load(base + M::X, &map_x, full, b * PRODUCT_K, t.row, 0);
                tma_load(base + M::W, &map_w, full, b * PRODUCT_K, t.n, t.group);
            }
            float factor[4];
            const float of_column = e8m0_value(w_scale[column_scale + b]);
            #pragma unroll
            for (int r = 0; r < 4; r++) {
                factor[r] = of_column * e8m0_value(x_scale[row_scale[r] + b]);
            }
            barrier_wait(full, phase);
            #pragma unroll
            for (int half = 0; half < 2; half++) {
                if (half * 64 >= t.rows) { break; }
                wgmma_fence();
                #pragma unroll
                for (int k = 0; k < 4; k++) {
                    const uint64_t x = operand(x0 + half * (64 * 128 / 16) + 2 * k);
                    if (INSIDE) { wgmma_m64k32(sum[half], x, operand(w0 + 2 * k), 1); }
                    else { wgmma_m64k32(part, x, operand(w0 + 2 * k), k); }
                }
                wgmma_commit();
                wgmma_wait<0>();
                if (INSIDE) { keep_order(sum[half]); continue; }
                keep_order(part);
                #pragma unroll
                for (int k = 0; k < 64; k++) {
                    sum[half][k] += part[k] * factor[2 * half + k / 2 % 2];
                }
            }
        }
        const int n = t.n + warpgroup * 128;
        #pragma unroll
        for (int half = 0; half < 2; half++) {
            const int at = half * 64 + warp % 4 * 16, row = t.row + at, rows = t.rows - at;
            if (n >= s.N || rows <= 0) { continue; }
            if (rows >= 16) {
                product_store<128, 0>(&map_out, sum[half], base + M::OUT + warp * 4096, n, row, 0);
            } else {
                product_store_some<128>(out + row * s.ldo + n, s.ldo, sum[half], rows, 128);
            }
        }
    }
    if (lane == 0) { tma_wait_all(); }
}

template <int INSIDE> static void fp8_v2(const Fp8Product &p) {
    if (p.rows == 0) { return; }
    const int pairs = p.K / 2;
    CUtensorMap out = tensor_map(p.out, 0, p.N, p.rows, 1, p.N, p.N, 16);
    CUtensorMap x = tensor_map(p.x, 0, pairs, p.rows, 1, pairs, pairs, 128);
    CUtensorMap w = tensor_map(p.w, 0, pairs, p.N, p.E, pairs, (size_t)p.N * pairs, 256);
    ProductShape s = { p.E, p.rows, p.N, p.K, 0, 1, 0, (size_t)p.N, 0, NULL, NULL };
    const int bytes = 1024 + (int)ProductMemory<256, 1>::SIZE;
    cudaCheck(cudaFuncSetAttribute(fp8_v2_kernel<INSIDE>,
                                   cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
    fp8_v2_kernel<INSIDE><<<multiprocessors(), 256, bytes, stream>>>(
        p.out, out, x, w, p.x_scale, p.w_scale, p.offset, s);
    cudaCheck(cudaGetLastError());
}

// -------------------------------------------------------------------------------------------------
// 3 Checks
//
// Small integers and powers of two are exact in every order of summing, so a wrong index shows.

static uint8_t code_of(float x) { return __nv_cvt_float_to_fp8(x, __NV_SATFINITE, __NV_E4M3); }

static const float e2m1_values[16] = { 0, 0.5f, 1, 1.5f, 2, 3, 4, 6,
                                       -0.f, -0.5f, -1, -1.5f, -2, -3, -4, -6 };

// Recast against the table of values, both ways, all distances, two matrices side by side.
static void check_recast(int E, int C, int O, int most) {
    int rows = 2 * O;
    size_t n = (size_t)E * O * C, all = 2 * n;
    std::vector<uint8_t> w(n / 2), s(n / 32);
    for (size_t i = 0; i < n / 2; i++) { w[i] = (uint8_t)hash64(i); }
    for (size_t i = 0; i < n / 32; i++) {
        size_t block = i / (C / 32) / 128 * (C / 128) + i % (C / 32) / 4;
        s[i] = (uint8_t)(100 + block % 50 + hash64(i + 7) % (most + 1));
        if (i % (C / 32) % 4 == 0 && i / (C / 32) % 128 == 5) {     // the largest occurs
            s[i] = (uint8_t)(100 + block % 50 + most);
        }
    }
    uint8_t *dw = to_device(w), *ds = to_device(s), *codes = device_alloc<uint8_t>(all);
    uint8_t *scales = device_alloc<uint8_t>(all / 128 / 128);
    for (int variant = 0; variant < 4; variant++) {
        int turned = variant % 2, at = variant / 2 * O;
        size_t wrong = 0, touched = 0;
        cudaCheck(cudaMemset(codes, 0x41, all));
        cudaCheck(cudaMemset(scales, 0x41, all / 128 / 128));
        recast_fp4_gpu(codes, scales, dw, ds, turned, at, rows, NULL, E, C, O);
        std::vector<uint8_t> got = to_host(codes, all), grid = to_host(scales, all / 128 / 128);
        for (int e = 0; e < E; e++) {
            for (int r = 0; r < rows; r++) {
                for (int c = 0; c < C; c++) {
                    size_t i = turned ? ((size_t)e * C + c) * rows + r
                                      : ((size_t)e * rows + r) * C + c;
                    size_t g = turned ? ((size_t)e * C + c) / 128 * (rows / 128) + r / 128
                                      : ((size_t)e * rows + r) / 128 * (C / 128) + c / 128;
                    if (r < at || r >= at + O) {
                        touched += got[i] != 0x41 || grid[g] != 0x41;
                        continue;
                    }
                    size_t from = ((size_t)e * O + r - at) * C + c;
                    size_t block = ((size_t)e * O + r - at) / 128 * (C / 128) + c / 128;
                    int scale = (int)(100 + block % 50 + most - 6);
                    float value = e2m1_values[w[from / 2] >> from % 2 * 4 & 15];
                    wrong += grid[g] != scale
                          || got[i] != code_of(ldexpf(value, s[from / 32] - scale));
                }
            }
        }
        check(wrong == 0 && touched == 0, "recast E %d C %d O %d spread %d turned %d at %d: %zu "
              "wrong, %zu touched", E, C, O, most, turned, at, wrong, touched);
    }
    cudaFree(dw), cudaFree(ds), cudaFree(codes), cudaFree(scales);
}

struct Rung { const char *name; void (*call)(const Fp8Product &); };
static const Rung rungs[] = { { "v2 tensor cores, one stage", fp8_v2<0> },
                              { "v3 ring of 4 stages", fp8_product },
                              { "v4 with a border of 16", fp8_product } };
enum { RUNGS = sizeof rungs / sizeof *rungs };

static void check_product(std::vector<int> counts, int N, int K, int KU = 0) {
    int E = (int)counts.size();
    std::vector<int> offset(E + 1, 0);
    for (int e = 0; e < E; e++) { offset[e + 1] = offset[e] + counts[e]; }
    int live = offset[E], rows = live + 3;                  // some rows belong to nobody
    size_t spare = 64, blocks = K / 128;                     // numbers past the last row
    std::vector<uint8_t> x((size_t)rows * K), w((size_t)E * N * K);
    std::vector<uint8_t> sx(rows * blocks), sw((size_t)E * N / 128 * blocks);
    for (size_t i = 0; i < x.size(); i++) { x[i] = code_of((float)(int)(hash64(i) % 9) - 4); }
    for (size_t i = 0; i < w.size(); i++) { w[i] = code_of((float)(int)(hash64(i + 99) % 9) - 4); }
    for (size_t i = 0; i < sx.size(); i++) { sx[i] = (uint8_t)(125 + hash64(i + 5) % 4); }
    for (size_t i = 0; i < sw.size(); i++) { sw[i] = (uint8_t)(125 + hash64(i + 6) % 4); }
    Fp8Product p = {};
    p.x = to_device(x), p.w = to_device(w), p.x_scale = to_device(sx), p.w_scale = to_device(sw);
    p.offset = to_device(offset), p.E = E, p.rows = rows, p.N = N, p.K = K;
    size_t numbers = (size_t)rows * N + spare;
    bf16 *out = p.out = device_alloc<bf16>(numbers);
    std::vector<bf16> u((size_t)rows * KU), v[2];
    v[0].resize((size_t)E * N * KU), v[1].resize(v[0].size());
    for (size_t i = 0; i < u.size(); i++) { u[i] = __float2bfloat16(hash64(i + 1) % 9 - 4.f); }
    for (size_t i = 0; i < v[0].size(); i++) {
        size_t e = i / KU / N, n = i / KU % N, k = i % KU;
        v[0][i] = __float2bfloat16(hash64(i + 2) % 9 - 4.f);
        v[1][(e * KU + k) * N + n] = v[0][i];
    }
    bf16 *dv[2] = { to_device(v[0]), to_device(v[1]) };
    p.u = to_device(u), p.KU = KU;
    std::vector<float> want((size_t)live * N);
    for (int e = 0; e < E; e++) {
        std::vector<float> wide((size_t)N * K), row(K);
        for (size_t i = 0; i < wide.size(); i++) {
            size_t at = (size_t)e * N * K + i;
            int m = (int)w[at], v = m & 7, ex = m >> 3 & 15;
            float value = ex ? ldexpf(8 + v, ex - 10) : ldexpf(v, -9);
            size_t grid = ((size_t)e * (N / 128) + i / K / 128) * blocks + i % K / 128;
            wide[i] = ldexpf(m & 128 ? -value : value, sw[grid] - 127);
        }
        for (int r = offset[e]; r < offset[e + 1]; r++) {
            for (int k = 0; k < K; k++) {
                int m = x[(size_t)r * K + k], v = m & 7, ex = m >> 3 & 15;
                float value = ex ? ldexpf(8 + v, ex - 10) : ldexpf(v, -9);
                row[k] = ldexpf(m & 128 ? -value : value, sx[r * blocks + k / 128] - 127);
            }
            for (int n = 0; n < N; n++) {
                float sum = 0;
                const float *w_n = &wide[(size_t)n * K];
                for (int k = 0; k < K; k++) { sum += row[k] * w_n[k]; }
                for (int k = 0; k < KU; k++) {
                    sum += (float)u[(size_t)r * KU + k] * (float)v[0][((size_t)e * N + n) * KU + k];
                }
                want[(size_t)r * N + n] = sum;
            }
        }
    }
    for (int i = KU ? 1 : 0; i < 3; i++) {          // v2 has no border
        const Rung &rung = rungs[i == 0 ? 0 : KU ? 2 : 1];
        p.v_by_k = i == 2, p.v = dv[p.v_by_k];
        cudaCheck(cudaMemset(out, 0x41, numbers * 2));
        rung.call(p);
        std::vector<bf16> got = to_host(out, numbers);
        size_t wrong = 0, touched = 0, first = 0;
        for (size_t k = 0; k < got.size(); k++) {
            uint16_t bits;
            memcpy(&bits, &got[k], 2);
            if (k >= want.size()) { touched += bits != 0x4141; continue; }
            bool same = (float)got[k] == (float)__float2bfloat16(want[k]);
            if (!same && !wrong++) { first = k; }
        }
        check(wrong == 0 && touched == 0, "%s: E %d rows %d N %d K %d KU %d by_k %d: %zu wrong "
              "(first %zu, %zu), %zu touched", rung.name, E, live, N, K, KU, p.v_by_k, wrong,
              first / N, first % N, touched);
    }
    cudaFree((void *)p.x), cudaFree((void *)p.w), cudaFree((void *)p.x_scale);
    cudaFree((void *)p.w_scale), cudaFree((void *)p.offset), cudaFree(out);
    cudaFree((void *)p.u), cudaFree(dv[0]), cudaFree(dv[1]);
}

// -------------------------------------------------------------------------------------------------
// 4 Times

__global__ void fill_codes_kernel(uint8_t *x, size_t n, uint64_t seed, float std) {
    size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    const float value = std * hash_normal(seed, i);
    if (i < n) { x[i] = __nv_cvt_float_to_fp8(value, __NV_SATFINITE, __NV_E4M3); }
}
static uint8_t *random_codes(size_t n, uint64_t seed, float std) {
    uint8_t *p = device_alloc<uint8_t>(n);
    fill_codes_kernel<<<(unsigned)divide_up(n, 256), 256>>>(p, n, seed, std);
    cudaCheck(cudaGetLastError());
    return p;
}

// 1 - 2xy/(xx+yy) of every step-th row with the right ones.
static double difference(const std::vector<bf16> &got, const std::vector<float> &right, int step,
                         int N) {
    double xy = 0, xx = 0, yy = 0;
    for (size_t i = 0; i < right.size(); i++) {
        double a = (double)(float)got[i / N * step * N + i % N], b = right[i];
        xy += a * b, xx += a * a, yy += b * b;
    }
    return 1 - 2 * xy / (xx + yy);
}

// What adding up every 128 k is for: sums of numbers of one sign, with all scales 1, with and
// without. (Of both signs, errors cancel like the sums do: 1.4e-6 and 2.2e-6.)
static void check_promotion(void) {
    const int rows = 512, N = 512, K = 4096;
    Fp8Product p = {};
    p.x = random_bytes((size_t)rows * K, 11, 0x30, 0x3F);
    p.w = random_bytes((size_t)N * K, 12, 0x30, 0x3F);
    p.x_scale = random_bytes(rows * K / 128, 1, 127, 127), p.w_scale = p.x_scale;
    p.offset = to_device(std::vector<int>{ 0, rows }), p.out = device_alloc<bf16>(rows * N);
    p.E = 1, p.rows = rows, p.N = N, p.K = K;
    float *right = device_alloc<float>(rows * N);
    fp8_v1_kernel<double><<<dim3(N / 128, rows), 128>>>(right, p, 1);
    std::vector<float> want = to_host(right, rows * N);
    fp8_product(p);
    double with = difference(to_host(p.out, rows * N), want, 1, N);
    fp8_v2<1>(p);
    double without = difference(to_host(p.out, rows * N), want, 1, N);
    printf("1 - 2xy/(xx+yy) at K 4096: %.2e, with sums left inside the tensor cores %.2e\n", with,
           without);
    check(with < 1e-5 && without > 2 * with, "promotion: %g with, %g without", with, without);
}

// A layer of E experts: recast (twice N x K / 2 where two matrices stand above each other) and the
// product, timed in turns so that all meet the same clocks. Adds the medians of recast and of the
// best rung to sums[0], sums[1].
static void time_product(const char *what, int E, int rows, int N, int K, int turned, int stacked,
                         double sums[2]) {
    const int KU = 16, rounds = 9, count = RUNGS;
    int *offset = to_device(skewed_offsets(E, rows));
    size_t weights = (size_t)E * N * K;
    // The packed matrices are (O,C): forward N x K, turned K x N; stacked ones have half the rows.
    int C = turned ? N : K, whole = turned ? K : N, O = stacked ? whole / 2 : whole;
    uint8_t *packed = random_bytes(weights / 2, 1, 0, 255);
    uint8_t *packed_scale = random_bytes(weights / 32, 2, 118, 122);
    Fp8Product p = {};
    uint8_t *w = device_alloc<uint8_t>(weights), *w_scale = device_alloc<uint8_t>(weights / 16384);
    p.w = w, p.w_scale = w_scale;
    p.x = random_codes((size_t)rows * K, 3, 100);
    p.x_scale = random_bytes((size_t)rows * K / 128, 4, 118, 121);
    p.out = device_alloc<bf16>((size_t)rows * N);
    p.u = random_normal((size_t)rows * KU, 5, 1), p.v = random_normal((size_t)E * N * KU, 6, 0.1f);
    p.offset = offset, p.v_by_k = turned, p.E = E, p.rows = rows, p.N = N, p.K = K;
    auto recast = [&] {
        for (int i = 0; i <= stacked; i++) {
            recast_fp4_gpu(w, w_scale, packed + i * (weights / 4),
                           packed_scale + i * (weights / 64), turned, i * O, whole, NULL, E, C, O);
        }
    };
    recast();
    // Every 97th row against sums in double, then five runs bit by bit.
    int step = 97, some = rows / step;
    float *right = device_alloc<float>((size_t)some * N);
    fp8_v1_kernel<double><<<dim3(N / 128, some), 128>>>(right, p, step);
    std::vector<float> want = to_host(right, (size_t)some * N);
    for (int i = 0; i < count - 1; i++) {
        cudaCheck(cudaMemset(p.out, 0xFF, (size_t)rows * N * 2));
        rungs[i].call(p);
        double diff = difference(to_host(p.out, (size_t)rows * N), want, step, N);
        check(diff < 1e-5, "%s: 1 - 2xy/(xx+yy) %g", rungs[i].name, diff);
    }
    p.KU = KU;
    uint64_t bits = 0;
    for (int run = 0; run < 6; run++) {
        rungs[count - 1].call(p);
        uint64_t now = device_hash(p.out, (size_t)rows * N * 2);
        check(run == 0 || now == bits, "other bits in run %d", run);
        bits = now;
    }
    std::vector<cudaEvent_t> event(2 * count + 2);
    std::vector<std::vector<float>> ms(count + 1);
    for (cudaEvent_t &e : event) { cudaCheck(cudaEventCreate(&e)); }
    for (int round = 0; round < rounds; round++) {
        for (int i = 0; i < count; i++) {
            cudaCheck(cudaEventRecord(event[0], stream));
            recast();
            cudaCheck(cudaEventRecord(event[1], stream));
            cudaCheck(cudaEventRecord(event[2 * i + 2], stream));
            p.KU = i == count - 1 ? KU : 0;
            rungs[i].call(p);
            cudaCheck(cudaEventRecord(event[2 * i + 3], stream));
        }
        cudaCheck(cudaDeviceSynchronize());
        for (int i = 0; i <= count; i++) {
            float t;
            cudaCheck(cudaEventElapsedTime(&t, event[2 * i], event[2 * i + 1]));
            ms[i].push_back(t);
        }
    }
    double flop = 2.0 * rows * N * K, bytes = weights * (1.5 + 1.0 / 32), best = 1e9;
    printf("%s: %d rows, N %d, K %d\n", what, rows, N, K);
    for (int i = 0; i <= count; i++) {
        std::sort(ms[i].begin(), ms[i].end());
        float t = ms[i][rounds / 2];
        if (i == 0) { printf("  %-34s %8.3f ms %7.0f GB/s\n", "recast", t, bytes / t * 1e-6); }
        else {
            printf("  %-34s %8.3f ms %7.1f TFLOP/s, %6.1f with recast\n", rungs[i - 1].name, t,
                   flop / t * 1e-9, flop / (t + ms[0][rounds / 2]) * 1e-9);
            best = std::min(best, (double)t);
        }
    }
    sums[0] += ms[0][rounds / 2], sums[1] += best;
    for (cudaEvent_t &e : event) { cudaCheck(cudaEventDestroy(e)); }
    cudaFree(offset), cudaFree(packed), cudaFree(packed_scale), cudaFree(w), cudaFree(w_scale);
    cudaFree((void *)p.x), cudaFree((void *)p.x_scale), cudaFree(p.out), cudaFree(right);
    cudaFree((void *)p.u), cudaFree((void *)p.v);
}

int main(int argc, char **argv) {
    setvbuf(stdout, NULL, _IOLBF, 0);
    check_recast(2, 256, 384, 14);
    check_recast(1, 384, 128, 20);
    check_recast(3, 128, 256, 3);
    check_product({ 1 }, 128, 128);
    check_product({ 63 }, 256, 128);
    check_product({ 64, 65 }, 256, 256);
    check_product({ 129 }, 384, 384);
    check_product({ 0, 129, 0, 64, 1, 0, 65, 300, 0 }, 512, 256);
    check_product({ 0, 0 }, 256, 128);
    check_product({ 385, 127, 128, 640 }, 256, 640);
    check_product({ 2437, 5, 1100 }, 640, 128);                 // more than one band
    check_product(std::vector<int>(100, 33), 256, 128);
    for (int KU : { 8, 16, 24, 64, 80 }) {
        check_product({ 65, 0, 200 }, 384, 256, KU);
        check_product({ 130, 1 }, 128, 128, KU);
    }
    check_promotion();
    printf("%d checks, %d failed\n", checks_done, checks_failed);
    if (checks_failed || (argc > 1 && strcmp(argv[1], "check") == 0)) { return checks_failed != 0; }
    for (int rows = 49152; rows >= 24576; rows /= 2) {
        double forward[2] = { 0, 0 }, backward[2] = { 0, 0 }, flop = 6.0 * rows * 4096 * 2048;
        time_product("w1 w3", 32, rows, 4096, 4096, 0, 1, forward);
        time_product("w2", 32, rows, 4096, 2048, 0, 0, forward);
        time_product("w2 turned", 32, rows, 2048, 4096, 1, 0, backward);
        time_product("w1 w3 turned", 32, rows, 4096, 4096, 1, 1, backward);
        printf("%d tokens: forward %.1f, backward %.1f TFLOP/s, recast included\n", rows / 6,
               flop / (forward[0] + forward[1]) * 1e-9, flop / (backward[0] + backward[1]) * 1e-9);
    }
    // Dense matrices are in fp8 as they come: here only the products matter.
    double none[2] = { 0, 0 };
    time_product("dense, wq_b", 1, 4096, 32768, 1024, 0, 0, none);
    time_product("dense, wo_b", 1, 4096, 4096, 8192, 0, 0, none);
    time_product("dense, shared w1 w3", 1, 4096, 4096, 4096, 0, 1, none);
    time_product("dense, wq_a", 1, 4096, 1024, 4096, 0, 0, none);
    printf("%d checks, %d failed\n", checks_done, checks_failed);
    return checks_failed != 0;
}
