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
// The control: sums that stay inside the tensor cores for all of K.
//
// Arithmetic, 49,152 rows of 32 experts (8,192 tokens, 6 experts each), C 4,096, F 2,048:
//   products  w1 and w3 as one of N 4,096 K 4,096, w2 of N 4,096 K 2,048: 2.47 TFLOP, 1.25 ms at
//             the 1,979 TFLOP/s of the data sheet; at the clock that 700 W leave (1.4 GHz) 1.6 ms
//   recast    805 M weights, 0.43 GB in, 0.81 out: 0.29 ms at 4,277 GB/s
//   a K block 128 x 256 x 128: 1,024 tensor clocks, 48 KB in, 6 KB read by each of 16 wgmma of 64
//             clocks: (48 + 96) KB of shared memory traffic, 1,125 clocks at 128 bytes each. Adding
//             up takes 256 of 1,024 issue slots.
//
// Measured (one H200, a product after each recast, medians; TFLOP/s at N x K):
//                49,152 rows     4096 x 4096   4096 x 2048   2048 x 4096
//   v2                               765           749           748
//   v3                             1,079         1,053         1,062      (24,576: 1,041 .. 1,005)
//   v4, border 16                  1,068         1,028         1,038
//   recast                       3,670 GB/s, turned 3,500: 0.33 ms for a layer
//   three products of a layer and their recast: 936 forward, 932 backward; 24,576 rows: 807, 801
// Tried and dropped: warpgroups that take turns at the tensor cores by named barriers, 1,030 where
// v3 gave 1,040: they find their rhythm by themselves.
// The control at K 4,096, for numbers of one sign: 1 - 2xy/(xx+yy) is 2.9e-3 for sums left inside
// the tensor cores, 1.9e-6 (bf16's rounding) for sums taken out every 128 k.
//
//     nvcc -O3 -std=c++17 -gencode=arch=compute_90a,code=sm_90a fp8_matmul.cu -o fp8_matmul
#include "common.h"
#include <cuda.h>
#include <cuda_fp8.h>
#include <cudaTypedefs.h>
#include <stdarg.h>
#include <functional>

// -------------------------------------------------------------------------------------------------
// 1 Helpers: barriers, the copy engine, tensor cores (those of mxfp4_matmul.cu, for bytes)

__device__ __forceinline__ uint32_t shared_address(const void *p) {
    return (uint32_t)__cvta_generic_to_shared(p);
}

__device__ __forceinline__ void barrier_init(uint32_t barrier, int arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;"
                 :: "r"(barrier), "r"(arrivals) : "memory");
}

__device__ __forceinline__ void barrier_wait(uint32_t barrier, uint32_t parity) {
    uint32_t done;
    do {
        asm volatile("{ .reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
                     "selp.u32 %0, 1, 0, p; }"
                     : "=r"(done) : "r"(barrier), "r"(parity) : "memory");
    } while (!done);
}

// One arrival, and that many bytes to come.
__device__ __forceinline__ void barrier_expect(uint32_t barrier, uint32_t bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;"
                 :: "r"(barrier), "r"(bytes) : "memory");
}

__device__ __forceinline__ void barrier_arrive(uint32_t barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" :: "r"(barrier) : "memory");
}

// Box (x, y, z) of the map's tensor -> shared memory, counted on the barrier. Elements outside the
// tensor become zeros, and count as bytes.
__device__ __forceinline__ void tma_load(uint32_t to, const CUtensorMap *map, uint32_t barrier,
                                         int x, int y, int z) {
    asm volatile("cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
                 " [%0], [%1, {%3, %4, %5}], [%2];"
                 :: "r"(to), "l"(map), "r"(barrier), "r"(x), "r"(y), "r"(z) : "memory");
}

// The way back. Elements outside are dropped. What this thread started since its last commit is a
// group.
__device__ __forceinline__ void tma_store(const CUtensorMap *map, uint32_t from, int x, int y,
                                          int z) {
    asm volatile("cp.async.bulk.tensor.3d.global.shared::cta.tile.bulk_group"
                 " [%0, {%2, %3, %4}], [%1];"
                 :: "l"(map), "r"(from), "r"(x), "r"(y), "r"(z) : "memory");
}
__device__ __forceinline__ void tma_commit(void) {
    asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}
// Until shared memory of all but the last `left` groups has been read; until all is written.
template <int left> __device__ __forceinline__ void tma_wait_read(void) {
    asm volatile("cp.async.bulk.wait_group.read %0;" :: "n"(left) : "memory");
}
__device__ __forceinline__ void tma_wait_all(void) {
    asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
}
// Ordinary stores of this thread to shared memory are seen by the copy engine.
__device__ __forceinline__ void tma_fence(void) {
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// A tensor core reads its operands through descriptors: where a matrix starts in shared memory, and
// how its groups of 8 rows of 128 swizzled bytes are spaced: they follow each other, as a TMA box
// 128 bytes wide leaves them. A row is 128 k, and the next 32 k are 32 bytes on; fp8 operands run
// along k always, there is no turning them on the way. bf16 operands may be across k (v, in the
// backward): a row is 64 n of one k, the next 64 n are a box of 64 k (8,192 bytes) further on, the
// next 16 k 16 rows (2,048 bytes). The low word holds the address, in units of 16 bytes, so it can
// be moved by adding.
__device__ __forceinline__ uint32_t operand_low(uint32_t at, int across_k) {
    return at / 16 | (across_k ? 8192 / 16 : 1) << 16;
}
__device__ __forceinline__ uint64_t operand(uint32_t low) {
    return (uint64_t)(1024 / 16 | 1 << 30) << 32 | low;         // bit 62: swizzle of 128 bytes
}

#define SUMS_4(d, i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define SUMS_16(d, i) SUMS_4(d, i), SUMS_4(d, i + 4), SUMS_4(d, i + 8), SUMS_4(d, i + 12)
#define SUMS_32(d, i) SUMS_16(d, i), SUMS_16(d, i + 16)

// d (64,128) = (add ? d : 0) + x (64,32) w (128,32)^T, e4m3, for a warpgroup. Asynchronous: d must
// not be touched between fence and wait.
__device__ __forceinline__ void wgmma_m64n128k32(float (&d)[64], uint64_t x, uint64_t w, int add) {
    asm volatile(
        "{ .reg .pred p; setp.ne.b32 p, %66, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n128k32.f32.e4m3.e4m3 {"
        "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, "
        "%13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, "
        "%26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, "
        "%39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, "
        "%52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
        "}, %64, %65, p, 1, 1; }"
        : SUMS_32(d, 0), SUMS_32(d, 32)
        : "l"(x), "l"(w), "r"(add));
}
// d (64,128) += u (64,16) v (128,16)^T, bf16, in the same way.
template <int V_BY_K>
__device__ __forceinline__ void wgmma_m64n128k16(float (&d)[64], uint64_t u, uint64_t v) {
    asm volatile(
        "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {"
        "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, "
        "%13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, "
        "%26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, "
        "%39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, "
        "%52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
        "}, %64, %65, 1, 1, 1, 0, %66;"
        : SUMS_32(d, 0), SUMS_32(d, 32)
        : "l"(u), "l"(v), "n"(V_BY_K));
}
// Registers written before are seen by the tensor cores.
__device__ __forceinline__ void wgmma_fence(void) {
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
__device__ __forceinline__ void wgmma_commit(void) {
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
// Until at most `left` committed groups are running.
template <int left> __device__ __forceinline__ void wgmma_wait(void) {
    asm volatile("wgmma.wait_group.sync.aligned %0;" :: "n"(left) : "memory");
}
// The compiler does not know that d changes between commit and wait: no use of d moves up over
// this.
template <int n> __device__ __forceinline__ void keep_order(float (&d)[n]) {
    #pragma unroll
    for (int i = 0; i < n; i++) { asm volatile("" : "+f"(d[i]) :: "memory"); }
}

// Registers move from the warpgroup that only starts copies to those that hold sums.
template <int n> __device__ __forceinline__ void registers_give(void) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" :: "n"(n));
}
template <int n> __device__ __forceinline__ void registers_take(void) {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" :: "n"(n));
}

__device__ __forceinline__ uint32_t pack_bf16(float low, float high) {
    __nv_bfloat162 two = __floats2bfloat162_rn(low, high);
    return *(uint32_t *)&two;
}

// Four 8 x 8 matrices of bf16, as they lie in the sums' registers, to shared memory: lane l gives
// the address of row l % 8 of matrix l / 8.
__device__ __forceinline__ void store_matrices(uint32_t row, uint32_t a, uint32_t b, uint32_t c,
                                               uint32_t d) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};"
                 :: "r"(row), "r"(a), "r"(b), "r"(c), "r"(d) : "memory");
}

__device__ __forceinline__ float e8m0_value(unsigned b) {
    return __uint_as_float(b ? b << 23 : 0x00400000u);
}

// -------------------------------------------------------------------------------------------------
// 2 Recast: e2m1 with a scale per 32 -> e4m3 with a scale per 128 x 128
//
// The block keeps its largest scale 2^m as 2^(m-6); a code of a group with scale 2^e becomes
// e2m1 * 2^(6-d), d = m - e. That is a table of eight bytes per d, and prmt looks four codes up at
// once. Exact for d <= 14 (fp8-flow-moe.md, 2.10).

enum { RECAST_LIFT = 6, RECAST_TABLES = 20 };       // from d = 19 on all codes are 0

// Eight magnitudes of the table (lo, hi) by the eight nibbles of w; out: codes 0..3 and 4..7.
__device__ __forceinline__ void recast_eight(uint32_t &low, uint32_t &high, uint32_t w, uint2 t) {
    // prmt's fourth selector bit repeats a byte's sign bit: from bytes 0x80 that makes 0xFF of a
    // negative code's 0x80, one bit left of which lies the sign.
    low = __byte_perm(t.x, t.y, w & 0x7777);
    high = __byte_perm(t.x, t.y, w >> 16 & 0x7777);
    uint32_t s_low, s_high, ones = 0x80808080;
    asm("prmt.b32 %0, %1, %1, %2;" : "=r"(s_low) : "r"(ones), "r"(w));
    asm("prmt.b32 %0, %1, %1, %2;" : "=r"(s_high) : "r"(ones), "r"(w >> 16));
    low |= s_low << 1 & 0x80808080;
    high |= s_high << 1 & 0x80808080;
}

// Bytes i of four words become word i: a 4 x 4 transpose.
__device__ __forceinline__ void turn_four(uint32_t &a, uint32_t &b, uint32_t &c, uint32_t &d) {
    uint32_t ab = __byte_perm(a, b, 0x5140), cd = __byte_perm(c, d, 0x5140);
    uint32_t ab2 = __byte_perm(a, b, 0x7362), cd2 = __byte_perm(c, d, 0x7362);
    a = __byte_perm(ab, cd, 0x5410), b = __byte_perm(ab, cd, 0x7632);
    c = __byte_perm(ab2, cd2, 0x5410), d = __byte_perm(ab2, cd2, 0x7632);
}

// codes (E,rows,C), scales (E,rows/128,C/128) from w (E,O,C/2), scale (E,O,C/32): rows at .. of
// each expert; TURNED: codes (E,C,rows), scales (E,C/128,rows/128). One block of threads per
// 128 x 128; a thread takes 4 pieces of 16 codes, TURNED of 4 neighbouring rows.
template <int TURNED>
__global__ void __launch_bounds__(256) recast_kernel(uint8_t *codes, uint8_t *scales,
                                                     const uint8_t *w, const uint8_t *scale, int at,
                                                     int rows, int C, int O) {
    __shared__ uint2 table[RECAST_TABLES];
    __shared__ uint32_t group[128], most[4];            // rows' four scale bytes; largest
    __shared__ __align__(16) uint32_t tile[TURNED ? 128 * 32 : 1];  // [c][o / 4], swizzled
    const size_t e = blockIdx.z;
    const int o0 = blockIdx.y * 128, c0 = blockIdx.x * 128, thread = threadIdx.x;
    const int part = thread % 8;
    uint2 raw[4];
    #pragma unroll
    for (int j = 0; j < 4; j++) {
        int o = o0 + (TURNED ? thread / 8 * 4 + j : j * 32 + thread / 8);
        raw[j] = *(const uint2 *)(w + ((e * O + o) * C + c0) / 2 + part * 8);
    }
    if (thread < 128) {
        uint32_t four = *(const uint32_t *)(scale + ((e * O + o0 + thread) * C + c0) / 32);
        uint32_t two = __vmaxu2(four & 0x00FF00FF, four >> 8 & 0x00FF00FF);
        uint32_t all = __reduce_max_sync(~0u, max(two & 0xFFFF, two >> 16));
        group[thread] = four;
        if (thread % 32 == 0) { most[thread / 32] = all; }
    }
    if (thread < RECAST_TABLES * 8) {
        const float magnitude = thread % 8 < 4 ? 0.5f * (thread % 8)
                              : (thread % 8 < 6 ? thread % 8 - 2 : 2 * (thread % 8) - 8);
        const float value = ldexpf(magnitude, RECAST_LIFT - thread / 8);
        ((uint8_t *)table)[thread] = __nv_cvt_float_to_fp8(value, __NV_SATFINITE, __NV_E4M3);
    }
    __syncthreads();
    const int most_of_all = (int)max(max(most[0], most[1]), max(most[2], most[3]));
    const int largest = max((int)RECAST_LIFT, most_of_all);
    uint32_t out[4][4];
    #pragma unroll
    for (int j = 0; j < 4; j++) {
        int o = TURNED ? thread / 8 * 4 + j : j * 32 + thread / 8;
        int d = largest - (int)(group[o] >> part / 2 * 8 & 0xFF);
        uint2 t = table[min(d, RECAST_TABLES - 1)];
        recast_eight(out[j][0], out[j][1], raw[j].x, t);
        recast_eight(out[j][2], out[j][3], raw[j].y, t);
        if (!TURNED) {
            *(uint4 *)(codes + (e * rows + at + o0 + o) * C + c0 + part * 16) =
                make_uint4(out[j][0], out[j][1], out[j][2], out[j][3]);
        }
    }
    const int down = rows / 128, across = C / 128, row_block = (at + o0) / 128;
    if (thread == 0) {
        const int block = TURNED ? blockIdx.x * down + row_block : row_block * across + blockIdx.x;
        scales[e * down * across + block] = largest - RECAST_LIFT;
    }
    if constexpr (TURNED) {
        // Word (c, o / 4) lies at o / 4 ^ c / 16 * 4 of row c: no two lanes meet in a bank, neither
        // when a warp writes 4 words o of 8 parts nor when it reads 4 rows c whole.
        #pragma unroll
        for (int i = 0; i < 4; i++) {
            turn_four(out[0][i], out[1][i], out[2][i], out[3][i]);
            #pragma unroll
            for (int j = 0; j < 4; j++) {
                tile[(part * 16 + i * 4 + j) * 32 + (thread / 8 ^ part * 4)] = out[j][i];
            }
        }
        __syncthreads();
        #pragma unroll
        for (int j = 0; j < 4; j++) {
            int c = j * 32 + thread / 8;
            *(uint4 *)(codes + (e * C + c0 + c) * rows + at + o0 + part * 16) =
                *(uint4 *)(tile + c * 32 + (part * 4 ^ c / 16 * 4));
        }
    }
}

static void recast_fp4_gpu(uint8_t *codes, uint8_t *scales, const uint8_t *w, const uint8_t *scale,
                           int turned, int at, int rows, int E, int C, int O) {
    dim3 grid(C / 128, O / 128, E);
    auto kernel = turned ? recast_kernel<1> : recast_kernel<0>;
    kernel<<<grid, 256, 0, stream>>>(codes, scales, w, scale, at, rows, C, O);
    cudaCheck(cudaGetLastError());
}

// -------------------------------------------------------------------------------------------------
// 3 The grouped product
//
// A tile is 128 rows x 256 columns of one group, and 128 k at a time of x and w lie in shared
// memory: 4 stages of 48 KB, in a ring. One thread of the producer warpgroup keeps the copy engine
// busy. Of two consumer warpgroups each holds 128 x 128 sums in registers, the left or the right
// half: one column of w's scales, so that a row needs one factor per block. It multiplies 64 rows
// at a time into 64 further registers, waits, and adds them, scaled, to the sums.
//
// Tiles are dealt to the CTAs in a fixed order, as in mxfp4_matmul.cu: row tiles first, inside
// bands of 2,048 rows, then columns, bands, groups. Same inputs, same bits. Boxes of x may
// reach into the next group's rows, and boxes of w past N: what comes of them is never stored.

enum {
    FP8_ROWS = 128, FP8_COLUMNS = 256, FP8_K = 128,     // of a tile; k of a stage
    FP8_BAND = 16, FP8_GROUPS = 384, FP8_WARPS = 8,
    FP8_X_STAGE = FP8_ROWS * FP8_K, FP8_W_STAGE = FP8_COLUMNS * FP8_K,
};

struct Fp8Shape { int E, rows, N, K, KU; size_t ldo; };     // rows: of the buffers, >= offset[E]

// Shared memory, in bytes from a multiple of 1,024 (from which the swizzle counts).
template <int STAGES> struct Fp8Memory {
    enum {
        X = 0, W = X + STAGES * FP8_X_STAGE,
        OUT = W + STAGES * FP8_W_STAGE,         // two boxes of 16 rows x 128 bytes for each warp
        FULL = OUT + FP8_WARPS * 4096, EMPTY = FULL + STAGES * 8,
        OFFSET = EMPTY + STAGES * 8, SIZE = OFFSET + (FP8_GROUPS + 1) * 4,
    };
};

struct Fp8Tile { int group, row, rows, n; };    // first row; rows left in the group; first column
struct Fp8Walk { int group, before; };          // tiles before `group` count `before`

// Tile number `index`; 0 when there is none.
__device__ __forceinline__ int fp8_tile(Fp8Tile &t, Fp8Walk &walk, int index, const int *offset,
                                        const Fp8Shape &s) {
    int columns = (s.N + FP8_COLUMNS - 1) / FP8_COLUMNS, first, rows, tiles;
    for (;; walk.group++) {
        if (walk.group >= s.E) { return 0; }
        first = offset[walk.group];
        rows = offset[walk.group + 1] - first;
        tiles = (rows + FP8_ROWS - 1) / FP8_ROWS;
        if (index - walk.before < tiles * columns) { break; }
        walk.before += tiles * columns;
    }
    int i = index - walk.before, band = i / (FP8_BAND * columns);
    int height = min((int)FP8_BAND, tiles - band * FP8_BAND);
    i -= band * FP8_BAND * columns;
    int m = band * FP8_BAND + i % height;
    t.group = walk.group;
    t.row = first + m * FP8_ROWS;
    t.rows = rows - m * FP8_ROWS;
    t.n = i / height * FP8_COLUMNS;
    return 1;
}

// A warp's 16 x 128 sums -> out, by the copy engine: boxes of 16 rows x 64 bf16 through two buffers
// of shared memory, while the next tile's products run. The 16-byte chunks of a row are permuted by
// its number (the swizzle): no bank conflicts.
__device__ __forceinline__ void fp8_store(const CUtensorMap *map, const float (&sum)[64],
                                          uint32_t buffers, int n, int row) {
    int lane = threadIdx.x % 32;
    #pragma unroll
    for (int box = 0; box < 2; box++) {
        uint32_t to = buffers + box * 2048;
        const float *d = sum + box * 32;
        if (lane == 0) { tma_wait_read<1>(); }          // the buffer's last box is on its way
        __syncwarp();
        #pragma unroll
        for (int j = 0; j < 8; j += 2) {
            store_matrices(to + lane % 16 * 128 + ((j + lane / 16) ^ (lane % 8)) * 16,
                           pack_bf16(d[4 * j], d[4 * j + 1]), pack_bf16(d[4 * j + 2], d[4 * j + 3]),
                           pack_bf16(d[4 * j + 4], d[4 * j + 5]),
                           pack_bf16(d[4 * j + 6], d[4 * j + 7]));
        }
        tma_fence();
        __syncwarp();
        if (lane == 0) {
            tma_store(map, to, n + box * 64, row, 0);
            tma_commit();
        }
    }
}

// The same for a warp with fewer than 16 rows: straight from the registers. Rare, and slow.
__device__ __forceinline__ void fp8_store_some(bf16 *out, size_t ldo, const float (&sum)[64],
                                               int rows) {
    int lane = threadIdx.x % 32;
    #pragma unroll
    for (int i = 0; i < 32; i++) {          // lane l holds two columns of rows l / 4 and l / 4 + 8
        int r = lane / 4 + i % 2 * 8, c = lane % 4 * 2 + i / 2 * 8;
        if (r < rows) { *(uint32_t *)(out + r * ldo + c) = pack_bf16(sum[2 * i], sum[2 * i + 1]); }
    }
}

template <int STAGES, int V_BY_K, int PROMOTE>
__global__ void __launch_bounds__(384, 1)
fp8_kernel(bf16 *out, const __grid_constant__ CUtensorMap map_out,
           const __grid_constant__ CUtensorMap map_x, const __grid_constant__ CUtensorMap map_w,
           const __grid_constant__ CUtensorMap map_u, const __grid_constant__ CUtensorMap map_v,
           const uint8_t *x_scale, const uint8_t *w_scale, const int *offset,
           const __grid_constant__ Fp8Shape s) {
    extern __shared__ unsigned char dynamic[];
    typedef Fp8Memory<STAGES> M;
    uint32_t unaligned = shared_address(dynamic), base;
    // volatile: computed once, not again in every turn of a loop
    asm volatile("add.u32 %0, %1, %2;" : "=r"(base) : "r"(unaligned), "r"(-unaligned % 1024));
    int *groups = (int *)(dynamic + (base - unaligned) + M::OFFSET);
    int warpgroup = threadIdx.x / 128, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    if (threadIdx.x == 0) {
        for (int i = 0; i < STAGES; i++) {
            barrier_init(base + M::FULL + 8 * i, 1);
            barrier_init(base + M::EMPTY + 8 * i, FP8_WARPS);
        }
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    for (int i = threadIdx.x; i <= s.E; i += blockDim.x) { groups[i] = offset[i]; }
    __syncthreads();

    Fp8Tile t;
    Fp8Walk walk = { 0, 0 };
    const int blocks = s.K / FP8_K;
    int slot = 0, index = blockIdx.x, more = fp8_tile(t, walk, index, groups, s);
    uint32_t phase = 0;
    auto next_stage = [&] { if (++slot == STAGES) { slot = 0, phase ^= 1; } };
    if (warpgroup == 2) {
        registers_give<40>();
        if (threadIdx.x != 256) { return; }
        // A stage on its way: 128 rows of x or u, 256 columns of w or v.
        auto load = [&](const CUtensorMap *of_x, const CUtensorMap *of_w, int k, int across_k) {
            uint32_t full = base + M::FULL + 8 * slot, w = base + M::W + slot * FP8_W_STAGE;
            barrier_wait(base + M::EMPTY + 8 * slot, phase ^ 1);
            barrier_expect(full, FP8_X_STAGE + FP8_W_STAGE);
            tma_load(base + M::X + slot * FP8_X_STAGE, of_x, full, k, t.row, 0);
            for (int n = 0; n < FP8_COLUMNS; n += across_k ? 64 : FP8_COLUMNS) {
                int x = across_k ? t.n + n : k, y = across_k ? k : t.n + n;
                tma_load(w + n * 128, of_w, full, x, y, t.group);
            }
            next_stage();
        };
        while (more) {
            for (int k = 0; k < s.K; k += FP8_K) { load(&map_x, &map_w, k, 0); }
            for (int k = 0; k < s.KU; k += FP8_K / 2) { load(&map_u, &map_v, k, V_BY_K); }
            more = fp8_tile(t, walk, index += gridDim.x, groups, s);
        }
        return;
    }
    registers_take<232>();
    const uint32_t w_half = base + M::W + warpgroup * 128 * FP8_K;
    const uint32_t x0 = operand_low(base + M::X, 0), w0 = operand_low(w_half, 0);
    const uint32_t v0 = operand_low(w_half, V_BY_K);
    while (more) {
        float sum[2][64], part[64];
        // The scales of this thread's rows, l / 4 and l / 4 + 8 of its warp's 16 in both halves,
        // and of its columns; those of the next block are fetched while this one is multiplied.
        int row_scale[4];
        unsigned row_next[4], column_next;
        #pragma unroll
        for (int i = 0; i < 4; i++) {
            int row = t.row + i / 2 * 64 + warp % 4 * 16 + lane / 4 + i % 2 * 8;
            row_scale[i] = min(row, s.rows - 1) * blocks;
            row_next[i] = x_scale[row_scale[i]];
        }
        int column = min(t.n / 128 + warpgroup, s.N / 128 - 1);
        int column_scale = (t.group * (s.N / 128) + column) * blocks;
        column_next = w_scale[column_scale];
        const int halves = t.rows > 64 ? 2 : 1;
        #pragma unroll
        for (int i = 0; i < 64; i++) { sum[0][i] = sum[1][i] = 0; }
        for (int b = 0; b < blocks; b++) {
            float factor[4], of_column = e8m0_value(column_next);
            #pragma unroll
            for (int i = 0; i < 4; i++) { factor[i] = of_column * e8m0_value(row_next[i]); }
            int next = min(b + 1, blocks - 1);
            #pragma unroll
            for (int i = 0; i < 4; i++) { row_next[i] = x_scale[row_scale[i] + next]; }
            column_next = w_scale[column_scale + next];

            uint32_t x = x0 + slot * (FP8_X_STAGE / 16), w = w0 + slot * (FP8_W_STAGE / 16);
            barrier_wait(base + M::FULL + 8 * slot, phase);
            #pragma unroll
            for (int half = 0; half < 2; half++) {
                if (half == halves) { break; }
                wgmma_fence();
                #pragma unroll
                for (int k = 0; k < 4; k++) {
                    uint64_t rows_k = operand(x + half * (64 * FP8_K / 16) + k * 2);
                    if (PROMOTE) { wgmma_m64n128k32(part, rows_k, operand(w + k * 2), k); }
                    else { wgmma_m64n128k32(sum[half], rows_k, operand(w + k * 2), 1); }
                }
                wgmma_commit();
                wgmma_wait<0>();
                if (half == halves - 1 && lane == 0) { barrier_arrive(base + M::EMPTY + 8 * slot); }
                if (PROMOTE) {
                    keep_order(part);
                    #pragma unroll
                    for (int i = 0; i < 64; i++) {
                        sum[half][i] += part[i] * factor[2 * half + i / 2 % 2];
                    }
                } else {
                    keep_order(sum[half]);
                }
            }
            next_stage();
        }
        for (int left = s.KU; left > 0; left -= FP8_K / 2) {    // the border: bf16, needs no scale
            uint32_t u = x0 + slot * (FP8_X_STAGE / 16), v = v0 + slot * (FP8_W_STAGE / 16);
            barrier_wait(base + M::FULL + 8 * slot, phase);
            #pragma unroll
            for (int half = 0; half < 2; half++) {
                for (int k = 0; k < min(left, FP8_K / 2); k += 16) {     // waits: they are few
                    wgmma_fence();
                    wgmma_m64n128k16<V_BY_K>(sum[half],
                                             operand(u + half * (64 * FP8_K / 16) + k / 8),
                                             operand(v + (V_BY_K ? k * 8 : k / 8)));
                    wgmma_commit();
                    wgmma_wait<0>();
                    keep_order(sum[half]);
                }
            }
            if (lane == 0) { barrier_arrive(base + M::EMPTY + 8 * slot); }
            next_stage();
        }
        Fp8Tile done = t;
        more = fp8_tile(t, walk, index += gridDim.x, groups, s);
        int n = done.n + warpgroup * 128;
        if (n >= s.N) { continue; }
        #pragma unroll
        for (int half = 0; half < 2; half++) {
            int row = done.row + half * 64 + warp % 4 * 16, rows = done.rows - (row - done.row);
            if (rows >= 16) {
                fp8_store(&map_out, sum[half], base + M::OUT + warp * 4096, n, row);
            } else if (rows > 0) {
                fp8_store_some(out + row * s.ldo + n, s.ldo, sum[half], rows);
            }
        }
    }
    if (lane == 0) { tma_wait_all(); }
}

// A tensor (depth, height, width) of bytes or bf16 with the last contiguous, and how TMA cuts it:
// boxes of box_height rows of 128 bytes, swizzled.
static CUtensorMap tensor_map(const void *base, int size_of, int width, int height, int depth,
                              size_t pitch, int box_height) {
    static PFN_cuTensorMapEncodeTiled_v12000 encode;
    if (encode == NULL) {
        cudaDriverEntryPointQueryResult found;
        cudaCheck(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", (void **)&encode,
                                                   12000, cudaEnableDefault, &found));
    }
    CUtensorMap map;
    cuuint64_t size[3] = { (cuuint64_t)width, (cuuint64_t)height, (cuuint64_t)depth };
    cuuint64_t bytes[2] = { pitch * size_of, pitch * size_of * height };
    cuuint32_t box[3] = { (cuuint32_t)(128 / size_of), (cuuint32_t)box_height, 1 };
    cuuint32_t every[3] = { 1, 1, 1 };
    CUtensorMapDataType type = size_of == 1 ? CU_TENSOR_MAP_DATA_TYPE_UINT8
                                            : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
    CUresult r = encode(&map, type, 3, (void *)base, size, bytes, box, every,
                        CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                        CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    if (r != CUDA_SUCCESS) {
        fprintf(stderr, "no tensor map of this shape (%d)\n", (int)r);
        exit(1);
    }
    return map;
}

struct Fp8Product {
    bf16 *out;                      // (rows,N), rows ldo apart
    size_t ldo;
    const uint8_t *x, *x_scale;     // (rows,K), (rows,K/128)
    const uint8_t *w, *w_scale;     // (E,N,K), (E,N/128,K/128)
    const int *offset;              // device (E+1)
    const bf16 *u, *v;              // border (rows,KU), and (E,N,KU) or, v_by_k, (E,KU,N)
    int E, rows, N, K, KU, v_by_k;  // rows: of the buffers, >= offset[E]. N, K: times 128, KU: 8
};

template <int STAGES, int V_BY_K, int PROMOTE> static void fp8_launch(const Fp8Product &p) {
    if (p.rows == 0) { return; }
    CUtensorMap out = tensor_map(p.out, 2, p.N, p.rows, 1, p.ldo, 16);
    CUtensorMap x = tensor_map(p.x, 1, p.K, p.rows, 1, p.K, FP8_ROWS);
    CUtensorMap w = tensor_map(p.w, 1, p.K, p.N, p.E, p.K, FP8_COLUMNS), u = x, v = w;
    if (p.KU) {
        u = tensor_map(p.u, 2, p.KU, p.rows, 1, p.KU, FP8_ROWS);
        v = V_BY_K ? tensor_map(p.v, 2, p.N, p.KU, p.E, p.N, FP8_K / 2)
                   : tensor_map(p.v, 2, p.KU, p.N, p.E, p.KU, FP8_COLUMNS);
    }
    Fp8Shape s = { p.E, p.rows, p.N, p.K, p.KU, p.ldo };
    auto kernel = fp8_kernel<STAGES, V_BY_K, PROMOTE>;
    int bytes = 1024 + Fp8Memory<STAGES>::SIZE;
    cudaCheck(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
    kernel<<<132, 384, bytes, stream>>>(p.out, out, x, w, u, v, p.x_scale, p.w_scale, p.offset, s);
    cudaCheck(cudaGetLastError());
}

template <int STAGES, int PROMOTE> static void fp8_product(const Fp8Product &p) {
    if (p.v_by_k) { fp8_launch<STAGES, 1, PROMOTE>(p); } else { fp8_launch<STAGES, 0, PROMOTE>(p); }
}

// -------------------------------------------------------------------------------------------------
// 4 v1: a thread per output, every `step`-th row; sums in double where `exact`

__device__ __forceinline__ float e4m3_value(unsigned code) {
    const float v = __uint_as_float((code & 0x7F) << 20) * 0x1p120f;
    return __uint_as_float(__float_as_uint(v) | (code & 0x80) << 24);
}

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
// 5 Checks
//
// Small integers and powers of two are exact in every order of summing, so a wrong index shows.

static int failures, checks;
static void check(bool good, const char *format, ...) {
    checks++;
    if (good) { return; }
    failures++;
    va_list args;
    va_start(args, format);
    printf("FAIL ");
    vprintf(format, args);
    printf("\n");
    va_end(args);
}

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
        recast_fp4_gpu(codes, scales, dw, ds, turned, at, rows, E, C, O);
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
static const Rung rungs[] = { { "v2 tensor cores, one stage", fp8_product<1, 1> },
                              { "v3 ring of 4 stages", fp8_product<4, 1> },
                              { "v4 with a border of 16", fp8_product<4, 1> } };
enum { RUNGS = sizeof rungs / sizeof *rungs };

static void check_product(std::vector<int> counts, int N, int K, int KU = 0) {
    int E = (int)counts.size();
    std::vector<int> offset(E + 1, 0);
    for (int e = 0; e < E; e++) { offset[e + 1] = offset[e] + counts[e]; }
    int live = offset[E], rows = live + 3;                  // some rows belong to nobody
    size_t ldo = N + 8, blocks = K / 128;
    std::vector<uint8_t> x((size_t)rows * K), w((size_t)E * N * K);
    std::vector<uint8_t> sx(rows * blocks), sw((size_t)E * N / 128 * blocks);
    for (size_t i = 0; i < x.size(); i++) { x[i] = code_of((float)(int)(hash64(i) % 9) - 4); }
    for (size_t i = 0; i < w.size(); i++) { w[i] = code_of((float)(int)(hash64(i + 99) % 9) - 4); }
    for (size_t i = 0; i < sx.size(); i++) { sx[i] = (uint8_t)(125 + hash64(i + 5) % 4); }
    for (size_t i = 0; i < sw.size(); i++) { sw[i] = (uint8_t)(125 + hash64(i + 6) % 4); }
    Fp8Product p = {};
    p.x = to_device(x), p.w = to_device(w), p.x_scale = to_device(sx), p.w_scale = to_device(sw);
    p.offset = to_device(offset), p.E = E, p.rows = rows, p.N = N, p.K = K, p.ldo = ldo;
    bf16 *out = p.out = device_alloc<bf16>(rows * ldo);
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
    for (int i = 0; i < 2 * RUNGS; i++) {
        const Rung &rung = rungs[i / 2];
        p.v_by_k = i % 2, p.v = dv[i % 2];
        cudaCheck(cudaMemset(out, 0x41, rows * ldo * 2));
        rung.call(p);
        std::vector<bf16> got = to_host(out, rows * ldo);
        size_t wrong = 0, touched = 0, first = 0;
        for (size_t i = 0; i < got.size(); i++) {
            size_t r = i / ldo, n = i % ldo;
            uint16_t bits;
            memcpy(&bits, &got[i], 2);
            if (r >= (size_t)live || n >= (size_t)N) { touched += bits != 0x4141; continue; }
            bool same = (float)got[i] == (float)__float2bfloat16(want[r * N + n]);
            if (!same && !wrong++) { first = i; }
        }
        check(wrong == 0 && touched == 0, "%s: E %d rows %d N %d K %d KU %d by_k %d: %zu wrong "
              "(first %zu, %zu), %zu touched", rung.name, E, live, N, K, KU, p.v_by_k, wrong,
              first / ldo, first % ldo, touched);
    }
    cudaFree((void *)p.x), cudaFree((void *)p.w), cudaFree((void *)p.x_scale);
    cudaFree((void *)p.w_scale), cudaFree((void *)p.offset), cudaFree(out);
    cudaFree((void *)p.u), cudaFree(dv[0]), cudaFree(dv[1]);
}

// -------------------------------------------------------------------------------------------------
// 6 Times

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

// Rows per expert: a mean of rows / E, skewed by up to 20 %.
static std::vector<int> skewed_offsets(int E, int rows) {
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
    p.ldo = N, p.E = 1, p.rows = rows, p.N = N, p.K = K;
    float *right = device_alloc<float>(rows * N);
    fp8_v1_kernel<double><<<dim3(N / 128, rows), 128>>>(right, p, 1);
    std::vector<float> want = to_host(right, rows * N);
    fp8_product<4, 1>(p);
    double with = difference(to_host(p.out, rows * N), want, 1, N);
    fp8_product<4, 0>(p);
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
    p.offset = offset, p.v_by_k = turned, p.ldo = N, p.E = E, p.rows = rows, p.N = N, p.K = K;
    auto recast = [&] {
        for (int i = 0; i <= stacked; i++) {
            recast_fp4_gpu(w, w_scale, packed + i * (weights / 4),
                           packed_scale + i * (weights / 64), turned, i * O, whole, E, C, O);
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
    printf("%d checks, %d failed\n", checks, failures);
    if (failures || (argc > 1 && strcmp(argv[1], "check") == 0)) { return failures != 0; }
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
    printf("%d checks, %d failed\n", checks, failures);
    return failures != 0;
}
