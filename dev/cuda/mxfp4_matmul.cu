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
// Beside them the widening kernels, plain and transposed, for fp4 and fp8.
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
// shared memory moves 24 KB per 16 k for the tensor cores, 3 KB for X and 1 KB written for W, 144
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
//     nvcc -O3 -std=c++17 -gencode=arch=compute_90a,code=sm_90a mxfp4_matmul.cu -lcublas \
//          -o mxfp4_matmul && ./mxfp4_matmul
#include "common.h"
#include <cublas_v2.h>
#include <cuda.h>
#include <cuda_fp8.h>
#include <cudaTypedefs.h>
#include <stdarg.h>
#include <functional>
#include <type_traits>

enum { FP4_BLOCK = 32 };
#define gpuRequire(condition) do { if (!(condition)) { \
    fprintf(stderr, "%s does not hold\n", #condition); exit(4); } } while (0)

// -------------------------------------------------------------------------------------------------
// 1 Helpers: barriers, the copy engine, tensor cores
//
// A barrier of shared memory (mbarrier) counts arrivals and bytes; when both are complete its phase
// flips, and waiters ask for the parity of the phase they wait for. The copy engine (TMA) counts
// bytes on it.
//
// Shared memory is addressed by 32-bit numbers here: what these instructions take.

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
// how its groups of 8 rows of 128 swizzled bytes are spaced. Both layouts are what a TMA box 64
// elements wide leaves. Along K: a row is 64 k, groups of 8 rows (1,024 bytes) follow each other,
// and the next 16 k are 32 bytes on. Across K (only W): a row is 64 n of one k, the next 64 n are a
// box of 64 k (8,192 bytes) further on, and the next 16 k are 16 rows (2,048 bytes) on. The low
// word holds the address, in units of 16 bytes, so it can be moved by adding.
__device__ __forceinline__ uint32_t operand_low(uint32_t at, int across_k) {
    return at / 16 | (across_k ? 8192 / 16 : 1) << 16;
}
__device__ __forceinline__ uint64_t operand(uint32_t low) {
    return (uint64_t)(1024 / 16 | 1 << 30) << 32 | low;         // bit 62: swizzle of 128 bytes
}

#define SUMS_4(d, i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define SUMS_16(d, i) SUMS_4(d, i), SUMS_4(d, i + 4), SUMS_4(d, i + 8), SUMS_4(d, i + 12)
#define SUMS_32(d, i) SUMS_16(d, i), SUMS_16(d, i + 16)

// d (64,BN) = (add ? d : 0) + x (64,16) w (BN,16)^T, for a warpgroup. Asynchronous: d must not be
// touched between fence and wait.
template <int BN, int W_BY_K>
__device__ __forceinline__ void wgmma_m64k16(float (&d)[BN / 2], uint64_t x, uint64_t w, int add) {
    static_assert(BN == 256 || BN == 128, "two widths are spelled out");
    if constexpr (BN == 256) {
        asm volatile(
            "{ .reg .pred p; setp.ne.b32 p, %130, 0;\n"
            "wgmma.mma_async.sync.aligned.m64n256k16.f32.bf16.bf16 {"
            "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, "
            "%13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, "
            "%26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, "
            "%39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, "
            "%52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, %64, "
            "%65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, "
            "%78, %79, %80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, "
            "%91, %92, %93, %94, %95, %96, %97, %98, %99, %100, %101, %102, %103, "
            "%104, %105, %106, %107, %108, %109, %110, %111, %112, %113, %114, %115, %116, "
            "%117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
            "}, %128, %129, p, 1, 1, 0, %131; }"
            : SUMS_32(d, 0), SUMS_32(d, 32), SUMS_32(d, 64), SUMS_32(d, 96)
            : "l"(x), "l"(w), "r"(add), "n"(W_BY_K));
    } else {
        asm volatile(
            "{ .reg .pred p; setp.ne.b32 p, %66, 0;\n"
            "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {"
            "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, "
            "%13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, "
            "%26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, "
            "%39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, "
            "%52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
            "}, %64, %65, p, 1, 1, 0, %67; }"
            : SUMS_32(d, 0), SUMS_32(d, 32)
            : "l"(x), "l"(w), "r"(add), "n"(W_BY_K));
    }
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

__device__ __forceinline__ void store_two(uint32_t to, float a, float b) {
    asm volatile("st.shared.v2.f32 [%0], {%1, %2};" :: "r"(to), "f"(a), "f"(b) : "memory");
}

// Four 8 x 8 matrices of bf16, as they lie in the sums' registers, to shared memory: lane l gives
// the address of row l % 8 of matrix l / 8.
__device__ __forceinline__ void store_matrices(uint32_t row, uint32_t a, uint32_t b, uint32_t c,
                                               uint32_t d) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};"
                 :: "r"(row), "r"(a), "r"(b), "r"(c), "r"(d) : "memory");
}

// prmt: bytes of the table low, high (bytes 0..3, 4..7) picked by the four nibbles of `by`; a
// nibble with bit 3 gets that byte's sign bit eight times.
__device__ __forceinline__ uint32_t pick_bytes(uint32_t low, uint32_t high, uint32_t by) {
    uint32_t picked;
    asm("prmt.b32 %0, %1, %2, %3;" : "=r"(picked) : "r"(low), "r"(high), "r"(by));
    return picked;
}

// Eight e2m1 codes, times a power of two, as eight bf16: exact. The tables are the high and the low
// bytes of 0, 0.5, 1, 1.5, 2, 3, 4, 6 as bf16.
__device__ __forceinline__ uint4 widen_codes(uint32_t codes, __nv_bfloat162 scale) {
    uint32_t value[4];
    #pragma unroll
    for (int half = 0; half < 2; half++, codes >>= 16) {
        uint32_t low = pick_bytes(0xC0800000, 0xC0804000, codes & 0x7777);
        uint32_t high = pick_bytes(0x3F3F3F00, 0x40404040, codes & 0x7777);
        uint32_t sign = pick_bytes(0x80808080, 0x80808080, codes);      // 0x80, 0xFF if negative
        high |= sign << 1 & 0x80808080;
        value[2 * half] = pick_bytes(low, high, 0x5140);
        value[2 * half + 1] = pick_bytes(low, high, 0x7362);
    }
    #pragma unroll
    for (int i = 0; i < 4; i++) {
        __nv_bfloat162 two = __hmul2(*(__nv_bfloat162 *)&value[i], scale);
        value[i] = *(uint32_t *)&two;
    }
    return make_uint4(value[0], value[1], value[2], value[3]);
}

// 2^(b - 127) twice, as bf16.
__device__ __forceinline__ __nv_bfloat162 scale_pair(uint32_t b) {
    uint32_t bits = b ? b << 7 : 0x40;
    bits |= bits << 16;
    return *(__nv_bfloat162 *)&bits;
}

// 32 bytes of global memory that are read once or twice, with the rest of their 128 in L2.
__device__ __forceinline__ uint4 load_once(const uint8_t *p) {
    uint4 v;
    asm volatile("ld.global.nc.L2::128B.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p));
    return v;
}
__device__ __forceinline__ void store_chunk(uint32_t to, uint4 v) {
    asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};"
                 :: "r"(to), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w) : "memory");
}

// -------------------------------------------------------------------------------------------------
// 2 Widening to bf16
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
// 3 v3, v4 and v5: the grouped product
//
// A tile is 128 MT rows x BN columns of one group, and 64 k at a time of X and W lie in shared
// memory: 4 stages of 48 KB, in a ring. One thread of the producer warpgroup keeps the copy engine
// busy; two consumer warpgroups hold MT blocks of 64 x BN sums in registers, every second block of
// the tile each. A stage's `full` barrier counts its bytes, its `empty` barrier the 8 consumer
// warps. Boxes of X may reach into the next group's rows: what comes of them is never stored.
// Blocks past the group's end are skipped.
//
// Tiles are dealt to the CTAs in a fixed order: CTA i takes tiles i, i + CTAs, .. The order walks
// row tiles first, inside bands of 2,048 rows, then columns, then bands, then groups: at any time
// the CTAs are at work on about 2,048 x 2,048 outputs, whose X and W stay in L2. How many rows a
// group has is known only on the device, so each role finds its tiles itself. A sum's terms and
// their order depend on neither: same inputs, same bits.
//
// W is bf16, or packed fp4 that nobody ever sees wider: the copy engine then brings X only, and the
// producer warpgroup turns 64 x BN codes per stage into bf16 in shared memory; those of the next
// stage are on their way in registers meanwhile. 8 codes take some 20 integer instructions at half
// a warp per cycle, 350 cycles for 64 x 128 codes, where the tensor cores need 1,024 for 256 rows.
// So tiles are 256 x 128 then, not 128 x 256, and two producer warpgroups take turns: one of them
// alone waits more than it works.
//
// K blocks past K come from U and V. A border of rank 16 costs its loads (mostly zero fill) and a
// quarter of a block's arithmetic. The sums are rounded once, at the end.

enum {
    PRODUCT_ROWS = 128, PRODUCT_K = 64,     // rows of a box of X; k of a stage: 128 bytes
    PRODUCT_BAND = 2048,                    // rows that share a walk over the columns
    PRODUCT_GROUPS = 384,                   // most groups: their offsets are kept in shared memory
    PRODUCT_WARPS = 8,                      // of the two consumer warpgroups
};

struct ProductShape {
    int E, rows, N, K, KU;
    int by_rows;                    // groups are row ranges (offset); else all rows, other columns
    int out_add;                    // fp32 only: out += instead of =
    size_t ldo, out_group;          // elements from row to row, from group to group
    const uint8_t *codes, *scales;  // W in fp4: (E,N,K/2) or (E,K,N/2), and a byte per 32 weights
};

// Shared memory, in bytes from a multiple of 1,024 (from which the swizzle counts).
template <int BN, int MT> struct ProductMemory {
    enum {
        X_STAGE = MT * PRODUCT_ROWS * PRODUCT_K * 2, W_STAGE = BN * PRODUCT_K * 2,
        STAGES = 192 * 1024 / (X_STAGE + W_STAGE),
        X = 0, W = X + STAGES * X_STAGE,
        OUT = W + STAGES * W_STAGE,             // two boxes of 16 rows x 128 bytes for each warp
        FULL = OUT + PRODUCT_WARPS * 4096, EMPTY = FULL + STAGES * 8,
        OFFSET = EMPTY + STAGES * 8, SIZE = OFFSET + (PRODUCT_GROUPS + 1) * 4,
    };
};

struct ProductTile {
    int group, row, rows, n;        // first row of X and out; rows left in the group; first column
};

// Where a walk over all tiles stands: tiles before `group` count `before`.
struct ProductWalk { int group, before; };

// Tile number `index`; 0 when there is none.
template <int BN, int MT>
__device__ __forceinline__ int product_tile(ProductTile &t, ProductWalk &walk, int index,
                                            const int *offset, const ProductShape &s) {
    const int height_of = MT * PRODUCT_ROWS, band_of = PRODUCT_BAND / height_of;
    int columns = (s.N + BN - 1) / BN, first, rows, tiles;
    for (;; walk.group++) {
        if (walk.group >= s.E) { return 0; }
        first = s.by_rows ? offset[walk.group] : 0;
        rows = s.by_rows ? offset[walk.group + 1] - first : s.rows;
        tiles = (rows + height_of - 1) / height_of;
        if (index - walk.before < tiles * columns) { break; }
        walk.before += tiles * columns;
    }
    int i = index - walk.before, band = i / (band_of * columns);
    int height = min(band_of, tiles - band * band_of);
    i -= band * band_of * columns;
    int m = band * band_of + i % height;
    t.group = walk.group;
    t.row = first + m * height_of;
    t.rows = rows - m * height_of;
    t.n = i / height * BN;
    return 1;
}

// 64 weights of a stage: a line of 128 bytes as bf16. They lie along K, or across it.
template <int BN> struct ProductCodes {
    enum { LINES = BN / 128 };      // of a thread: number threadIdx.x % 128, and 128 further on
    uint4 code[LINES][2];
    uint32_t scale[LINES];          // two bytes
};

template <int BN, int W_BY_K>
__device__ __forceinline__ void product_fetch(ProductCodes<BN> &c, const ProductShape &s,
                                              const ProductTile &t, int k) {
    #pragma unroll
    for (int i = 0; i < c.LINES; i++) {
        // Lines past the last column read other weights instead; nothing is made of their products.
        int line = threadIdx.x % 128 + 128 * i;
        int row = W_BY_K ? k + line % 64 : min(t.n + line, s.N - 1);
        int col = W_BY_K ? min(t.n + line / 64 * 64, s.N - 64) : k;
        size_t at = W_BY_K ? ((size_t)t.group * s.K + row) * s.N + col
                           : ((size_t)t.group * s.N + row) * s.K + col;
        c.code[i][0] = load_once(s.codes + at / 2);
        c.code[i][1] = load_once(s.codes + at / 2 + 16);
        c.scale[i] = *(const uint16_t *)(s.scales + at / FP4_BLOCK);
    }
}

// The lines go where the copy engine would have put them: chunks of 16 bytes, permuted by the row.
template <int BN>
__device__ __forceinline__ void product_widen(uint32_t w, const ProductCodes<BN> &c) {
    #pragma unroll
    for (int i = 0; i < c.LINES; i++) {
        int line = threadIdx.x % 128 + 128 * i;
        #pragma unroll
        for (int j = 0; j < 8; j++) {
            const uint4 &four = c.code[i][j / 4];
            uint32_t word = j % 4 == 0 ? four.x : j % 4 == 1 ? four.y : j % 4 == 2 ? four.z
                          : four.w;
            __nv_bfloat162 scale = scale_pair(c.scale[i] >> j / 4 * 8 & 255);
            store_chunk(w + line * 128 + (j ^ line % 8) * 16, widen_codes(word, scale));
        }
    }
}

// A warp's 16 x BN sums -> out, by the copy engine: boxes of 16 rows x 128 bytes (64 bf16 or 32
// fp32) through two buffers of shared memory, while the next tile's products run. The 16-byte
// chunks of a row are permuted by its number (the swizzle): no bank conflicts.
template <int BN, int OUT_F32>
__device__ __forceinline__ void product_store(const CUtensorMap *map, const float (&sum)[BN / 2],
                                              uint32_t buffers, int n, int row, int slice) {
    int lane = threadIdx.x % 32;
    const int wide = OUT_F32 ? 32 : 64;
    #pragma unroll
    for (int box = 0; box < BN / wide; box++) {
        uint32_t to = buffers + box % 2 * 2048;
        const float *d = sum + box * wide / 2;
        if (lane == 0) { tma_wait_read<1>(); }          // the buffer's last box is on its way
        __syncwarp();
        if (OUT_F32) {          // lane l holds two columns of rows l / 4 and l / 4 + 8
            uint32_t line = to + lane / 4 * 128 + lane % 2 * 8;
            #pragma unroll
            for (int j = 0; j < 4; j++) {
                uint32_t chunk = ((2 * j + lane % 4 / 2) ^ (lane / 4)) * 16;
                store_two(line + chunk, d[4 * j], d[4 * j + 1]);
                store_two(line + chunk + 8 * 128, d[4 * j + 2], d[4 * j + 3]);
            }
        } else {
            #pragma unroll
            for (int j = 0; j < 8; j += 2) {
                store_matrices(to + lane % 16 * 128 + ((j + lane / 16) ^ (lane % 8)) * 16,
                               pack_bf16(d[4 * j], d[4 * j + 1]),
                               pack_bf16(d[4 * j + 2], d[4 * j + 3]),
                               pack_bf16(d[4 * j + 4], d[4 * j + 5]),
                               pack_bf16(d[4 * j + 6], d[4 * j + 7]));
            }
        }
        tma_fence();
        __syncwarp();
        if (lane == 0) {
            tma_store(map, to, n + box * wide, row, slice);
            tma_commit();
        }
    }
}

// The same for a warp with fewer than 16 rows: straight from the registers. Rare, and slow.
template <int BN, typename Out>
__device__ __forceinline__ void product_store_some(Out *out, size_t ldo, const float (&sum)[BN / 2],
                                                   int rows, int columns) {
    int lane = threadIdx.x % 32;
    #pragma unroll
    for (int i = 0; i < BN / 4; i++) {      // lane l holds two columns of rows l / 4 and l / 4 + 8
        int r = lane / 4 + i % 2 * 8, c = lane % 4 * 2 + i / 2 * 8;
        if (r >= rows || c >= columns) { continue; }
        Out *to = out + r * ldo + c;
        to[0] = (Out)sum[2 * i], to[1] = (Out)sum[2 * i + 1];
    }
}

// out += sums, added in L2, where the numbers lie: no round trip. Each number gets one term per
// launch, so that no order shows in the result. Subnormal results become 0.
template <int BN>
__device__ __forceinline__ void product_add(float *out, size_t ldo, const float (&sum)[BN / 2],
                                            int rows, int columns) {
    int lane = threadIdx.x % 32;
    #pragma unroll
    for (int i = 0; i < BN / 4; i++) {
        int r = lane / 4 + i % 2 * 8, c = lane % 4 * 2 + i / 2 * 8;
        if (r >= rows || c >= columns) { continue; }
        asm volatile("red.global.add.v2.f32 [%0], {%1, %2};"
                     :: "l"(out + r * ldo + c), "f"(sum[2 * i]), "f"(sum[2 * i + 1]) : "memory");
    }
}

template <int BN, int MT, int W_BY_K, int OUT_F32, int W_FP4>
__global__ void __launch_bounds__(W_FP4 ? 512 : 384, 1)
product_kernel(void *out, const __grid_constant__ CUtensorMap map_out,
               const __grid_constant__ CUtensorMap map_x, const __grid_constant__ CUtensorMap map_w,
               const __grid_constant__ CUtensorMap map_u, const __grid_constant__ CUtensorMap map_v,
               const int *offset, const __grid_constant__ ProductShape s) {
    extern __shared__ unsigned char dynamic[];
    typedef ProductMemory<BN, MT> M;
    uint32_t unaligned = shared_address(dynamic), base;
    // volatile: computed once, not again in every turn of a loop
    asm volatile("add.u32 %0, %1, %2;" : "=r"(base) : "r"(unaligned), "r"(-unaligned % 1024));
    int *groups = (int *)(dynamic + (base - unaligned) + M::OFFSET);
    int warpgroup = threadIdx.x / 128, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    if (threadIdx.x == 0) {
        for (int i = 0; i < M::STAGES; i++) {
            barrier_init(base + M::FULL + 8 * i, W_FP4 ? 1 + 4 : 1);    // the engine, and 4 warps
            barrier_init(base + M::EMPTY + 8 * i, PRODUCT_WARPS);
        }
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    if (s.by_rows) {
        for (int i = threadIdx.x; i <= s.E; i += blockDim.x) { groups[i] = offset[i]; }
    }
    __syncthreads();

    ProductTile t;
    ProductWalk walk = { 0, 0 };
    int slot = 0, index = blockIdx.x, more = product_tile<BN, MT>(t, walk, index, groups, s);
    uint32_t phase = 0;
    auto next_stage = [&] { if (++slot == M::STAGES) { slot = 0, phase ^= 1; } };
    if (warpgroup >= 2) {
        const int border = (s.K + PRODUCT_K - 1) / PRODUCT_K * PRODUCT_K;   // first k of U and V
        int k = 0;
        // One stage further, in this tile or the next.
        auto step = [&] {
            next_stage();
            if ((k += PRODUCT_K) < border + s.KU) { return; }
            k = 0;
            more = product_tile<BN, MT>(t, walk, index += gridDim.x, groups, s);
        };
        // A stage on its way: MT * 16 KB of X or U, and of W or V BN * 128 bytes.
        auto load = [&](const ProductTile &t, int k, int slot) {
            const CUtensorMap *of_x = k < border ? &map_x : &map_u;
            const CUtensorMap *of_w = k < border ? &map_w : &map_v;
            int with_w = !W_FP4 || k >= border, wide = W_BY_K ? 64 : BN;
            uint32_t x = base + M::X + slot * M::X_STAGE, w = base + M::W + slot * M::W_STAGE;
            uint32_t full = base + M::FULL + 8 * slot;
            if (k >= border) { k -= border; }
            barrier_expect(full, M::X_STAGE + (with_w ? M::W_STAGE : 0));
            #pragma unroll
            for (int m = 0; m < MT; m++) {
                tma_load(x + m * (M::X_STAGE / MT), of_x, full, k, t.row + m * PRODUCT_ROWS,
                         s.by_rows ? 0 : t.group);
            }
            #pragma unroll
            for (int i = 0; i < BN && with_w; i += wide) {
                int n = t.n + i;
                tma_load(w + i * 128, of_w, full, W_BY_K ? n : k, W_BY_K ? k : n, t.group);
            }
        };
        if constexpr (!W_FP4) {
            registers_give<40>();
            for (; more && threadIdx.x == 256; step()) {
                barrier_wait(base + M::EMPTY + 8 * slot, phase ^ 1);
                load(t, k, slot);
            }
        } else {
            registers_give<72>();
            ProductCodes<BN> next;
            if (warpgroup == 3 && more) { step(); }     // the two take turns
            if (more && k < border) { product_fetch<BN, W_BY_K>(next, s, t, k); }
            while (more) {
                const ProductCodes<BN> codes = next;
                const ProductTile of = t;
                const int at = k, in = slot;
                const uint32_t parity = phase ^ 1;
                step();
                if (more) { step(); }
                if (more && k < border) { product_fetch<BN, W_BY_K>(next, s, t, k); }
                barrier_wait(base + M::EMPTY + 8 * in, parity);
                if (threadIdx.x % 128 == 0) { load(of, at, in); }
                if (at < border) {
                    product_widen<BN>(base + M::W + in * M::W_STAGE, codes);
                    tma_fence();                // the tensor cores read through the same door
                    __syncwarp();
                }
                if (lane == 0) { barrier_arrive(base + M::FULL + 8 * in); }
            }
        }
    } else {
        registers_take<W_FP4 ? 184 : 232>();
        // Blocks of 64 k, and what is left of the border in steps of 16.
        int blocks = (s.K + PRODUCT_K - 1) / PRODUCT_K + s.KU / PRODUCT_K;
        int steps = (s.KU % PRODUCT_K + 15) / 16;
        const int x_step = 32 / 16, w_step = (W_BY_K ? 2048 : 32) / 16;
        uint32_t x0 = operand_low(base + M::X + warpgroup * 64 * 128, 0);
        uint32_t w0 = operand_low(base + M::W, W_BY_K), empty = base + M::EMPTY;
        const int x_block = PRODUCT_ROWS * PRODUCT_K * 2 / 16;
        float sum[MT][BN / 2];
        uint32_t before = 0, last = 0;          // `empty` of the stages that are still being read
        // All products of a tile, for the first `active` of this warpgroup's blocks.
        auto products = [&](auto active) {
            for (int b = 0; b < blocks; b++) {
                uint32_t x = x0 + slot * (M::X_STAGE / 16), w = w0 + slot * (M::W_STAGE / 16);
                uint32_t current = empty + 8 * slot;
                barrier_wait(base + M::FULL + 8 * slot, phase);
                wgmma_fence();
                #pragma unroll
                for (int k = 0; k < 4; k++) {
                    #pragma unroll
                    for (int m = 0; m < active.value; m++) {
                        wgmma_m64k16<BN, W_BY_K>(sum[m], operand(x + m * x_block + k * x_step),
                                                 operand(w + k * w_step), b | k);
                    }
                }
                wgmma_commit();
                wgmma_wait<1>();
                if (b > 0 && lane == 0) { barrier_arrive(before); }
                before = current;
                next_stage();
            }
            if (steps == 0) { return; }
            uint32_t x = x0 + slot * (M::X_STAGE / 16), w = w0 + slot * (M::W_STAGE / 16);
            last = empty + 8 * slot;
            barrier_wait(base + M::FULL + 8 * slot, phase);
            #pragma unroll
            for (int k = 0; k < 4; k++) {
                if (k >= steps) { break; }
                wgmma_fence();
                #pragma unroll
                for (int m = 0; m < active.value; m++) {
                    wgmma_m64k16<BN, W_BY_K>(sum[m], operand(x + m * x_block + k * x_step),
                                             operand(w + k * w_step), 1);
                }
                wgmma_commit();
            }
            next_stage();
        };
        while (more) {
            if (warpgroup * 64 >= t.rows) {     // no rows here: only keep step
                for (int b = 0; b < blocks + (steps > 0); b++) {
                    barrier_wait(base + M::FULL + 8 * slot, phase);
                    if (lane == 0) { barrier_arrive(empty + 8 * slot); }
                    next_stage();
                }
                more = product_tile<BN, MT>(t, walk, index += gridDim.x, groups, s);
                continue;
            }
            if (MT > 1 && (MT - 1) * PRODUCT_ROWS + warpgroup * 64 < t.rows) {
                products(std::integral_constant<int, MT>());
            } else {
                products(std::integral_constant<int, 1>());
            }
            ProductTile done = t;
            more = product_tile<BN, MT>(t, walk, index += gridDim.x, groups, s);
            wgmma_wait<0>();
            if (lane == 0) {
                barrier_arrive(before);
                if (steps) { barrier_arrive(last); }
            }
            #pragma unroll
            for (int m = 0; m < MT; m++) {
                keep_order(sum[m]);
                int row = m * PRODUCT_ROWS + warp * 16, rows = done.rows - row;
                typedef typename std::conditional<OUT_F32, float, bf16>::type Out;
                row += done.row;
                Out *to = (Out *)out + done.group * s.out_group + row * s.ldo + done.n;
                if (OUT_F32 && s.out_add) {
                    product_add<BN>((float *)to, s.ldo, sum[m], rows, s.N - done.n);
                } else if (rows >= 16) {
                    product_store<BN, OUT_F32>(&map_out, sum[m], base + M::OUT + warp * 4096,
                                               done.n, row, s.by_rows ? 0 : done.group);
                } else if (rows > 0) {
                    product_store_some<BN>(to, s.ldo, sum[m], rows, s.N - done.n);
                }
            }
        }
        if (lane == 0) { tma_wait_all(); }
    }
}

// A tensor (depth, height, width) with the last contiguous, and how TMA cuts it: boxes of
// box_height rows of 128 bytes, swizzled. pitch and slice are in elements.
static CUtensorMap tensor_map(const void *base, int is_f32, int width, int height, int depth,
                              size_t pitch, size_t slice, int box_height) {
    static PFN_cuTensorMapEncodeTiled_v12000 encode;
    if (encode == NULL) {
        cudaDriverEntryPointQueryResult found;
        cudaCheck(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", (void **)&encode,
                                                   12000, cudaEnableDefault, &found));
    }
    CUtensorMap map;
    size_t size_of = is_f32 ? 4 : 2;
    cuuint64_t size[3] = { (cuuint64_t)width, (cuuint64_t)height, (cuuint64_t)depth };
    cuuint64_t bytes[2] = { pitch * size_of, slice * size_of };
    cuuint32_t box[3] = { (cuuint32_t)(128 / size_of), (cuuint32_t)box_height, 1 };
    cuuint32_t every[3] = { 1, 1, 1 };
    CUresult r = encode(&map, is_f32 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT32
                                     : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 3, (void *)base, size,
                        bytes, box, every, CU_TENSOR_MAP_INTERLEAVE_NONE,
                        CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                        CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    if (r != CUDA_SUCCESS) {
        gpuRequire(!"a tensor map of this shape");
    }
    return map;
}

// What a product reads and writes. All zero but what is set. N, K, KU, the strides are multiples of
// 8, pointers of 16 bytes. Rows of out that belong to no group are not touched.
struct Product {
    void *out;              // (rows,N), rows ldo apart: bf16, or float if out_f32
    size_t ldo;
    int out_f32, out_add;   // out_add (fp32 only): out += instead of =
    const bf16 *x;          // (rows,K), rows ldx apart
    size_t ldx;
    const bf16 *w;          // (E,N,K), or (E,K,N) if w_by_k; NULL: fp4, in
    const uint8_t *codes;   // half as many bytes, and a scale for 32 weights; N and K are multiples
    const uint8_t *scales;  // of 64
    int w_by_k;             // also of v
    const bf16 *u;          // border (rows,KU), rows ldu apart, and
    size_t ldu;
    const bf16 *v;          // (E,N,KU), or (E,KU,N); KU = 0: none
    const int *offset;      // device (E+1): rows of each group. NULL: every group has all rows, and
    size_t x_group;         // its columns of x and of out start that many elements after the last's
    size_t out_group;
    int E, rows, N, K, KU;  // rows: of the buffers, at least offset[E]
    int ctas;               // most CTAs to use; 0: all SMs
    int width;              // columns of a tile, 128 or 256; 0: by the shape
};

// The narrower tile wins where the wide one leaves SMs idle: it costs about 8 % more per output.
static int product_width(const Product &p, int ctas) {
    double cost[2];
    for (int i = 0; i < 2; i++) {
        int width = i ? 256 : 128;
        size_t tiles = p.offset ? (size_t)p.rows / PRODUCT_ROWS + p.E / 2 + 1
                                : (size_t)p.E * ((p.rows + PRODUCT_ROWS - 1) / PRODUCT_ROWS);
        tiles *= (p.N + width - 1) / width;
        cost[i] = (double)((tiles + ctas - 1) / ctas) * (i ? 2 : 1.08);
    }
    return cost[1] <= cost[0] ? 256 : 128;
}

static void grouped_product(const Product &p) {
    typedef void Kernel(void *, CUtensorMap, CUtensorMap, CUtensorMap, CUtensorMap, CUtensorMap,
                        const int *, ProductShape);
    static Kernel *const kernels[3][2][2] = {       // [width][w_by_k][out_f32]
        { { product_kernel<128, 1, 0, 0, 0>, product_kernel<128, 1, 0, 1, 0> },
          { product_kernel<128, 1, 1, 0, 0>, product_kernel<128, 1, 1, 1, 0> } },
        { { product_kernel<256, 1, 0, 0, 0>, product_kernel<256, 1, 0, 1, 0> },
          { product_kernel<256, 1, 1, 0, 0>, product_kernel<256, 1, 1, 1, 0> } },
        { { product_kernel<128, 2, 0, 0, 1>, NULL },                        // fp4
          { product_kernel<128, 2, 1, 0, 1>, product_kernel<128, 2, 1, 1, 1> } } };
    static int sms;
    if (p.rows == 0 || p.N == 0 || p.E == 0) { return; }
    if (p.K <= 0 || p.K % 8 || p.N % 8 || p.KU % 8 || p.ldx % 8 || p.ldu % 8 || p.ldo % 8
        || p.x_group % 8 || p.out_group % 8 || p.E > PRODUCT_GROUPS || (p.out_add && !p.out_f32)
        || (p.offset == NULL && p.E > 1 && p.KU) || (p.codes && (p.K % 64 || p.N % 64))) {
        gpuRequire(!"a product of this shape");
    }
    if (sms == 0) {
        int device;
        cudaCheck(cudaGetDevice(&device));
        cudaCheck(cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, device));
    }
    int ctas = p.ctas ? p.ctas : sms;
    int width = p.codes ? 128 : p.width ? p.width : product_width(p, ctas);
    int depth = p.offset ? 1 : p.E, box = p.w_by_k ? PRODUCT_K : width;
    auto weights = [&](const bf16 *w, int K) {
        return p.w_by_k ? tensor_map(w, 0, p.N, K, p.E, p.N, (size_t)p.N * K, box)
                        : tensor_map(w, 0, K, p.N, p.E, K, (size_t)p.N * K, box);
    };
    CUtensorMap out = tensor_map(p.out, p.out_f32, p.N, p.rows, depth, p.ldo,
                                 depth > 1 ? p.out_group : p.ldo, 16);
    CUtensorMap x = tensor_map(p.x, 0, p.K, p.rows, depth, p.ldx, depth > 1 ? p.x_group : p.ldx,
                               PRODUCT_ROWS);
    CUtensorMap w = p.codes ? x : weights(p.w, p.K), u = x, v = w;
    if (p.KU) {
        u = tensor_map(p.u, 0, p.KU, p.rows, 1, p.ldu, p.ldu, PRODUCT_ROWS);
        v = weights(p.v, p.KU);
    }
    ProductShape s = { p.E, p.rows, p.N, p.K, p.KU, p.offset != NULL, p.out_add, p.ldo,
                       p.offset ? 0 : p.out_group, p.codes, p.scales };
    Kernel *kernel = kernels[p.codes ? 2 : width == 256][p.w_by_k][p.out_f32];
    int bytes = 1024 + (p.codes ? (int)ProductMemory<128, 2>::SIZE :
                        width == 256 ? (int)ProductMemory<256, 1>::SIZE
                                     : (int)ProductMemory<128, 1>::SIZE);
    cudaCheck(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
    kernel<<<ctas, p.codes ? 512 : 384, bytes, stream>>>(p.out, out, x, w, u, v, p.offset, s);
    cudaCheck(cudaGetLastError());
}

// -------------------------------------------------------------------------------------------------
// 4 The rungs below: v1 and v2

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

// One cuBLAS product: out (rows,N) = x (rows,K) w^T, w (N,K), or (K,N) if w_by_k.
static cublasHandle_t cublas;
static void cublas_product(void *out, size_t ldo, int out_f32, const bf16 *x, size_t ldx,
                           const bf16 *w, int w_by_k, int rows, int N, int K, float beta) {
    float one = 1;
    if (rows == 0) { return; }
    cublasCheck(cublasGemmEx(cublas, w_by_k ? CUBLAS_OP_N : CUBLAS_OP_T, CUBLAS_OP_N, N, rows, K,
                             &one, w, CUDA_R_16BF, w_by_k ? N : K, x, CUDA_R_16BF, (int)ldx, &beta,
                             out, out_f32 ? CUDA_R_32F : CUDA_R_16BF, (int)ldo, CUBLAS_COMPUTE_32F,
                             CUBLAS_GEMM_DEFAULT));
}

// v2: one after the other, with the counts on the host.
static void experts_v2(void *out, int out_f32, const bf16 *x, const bf16 *w, int w_by_k,
                       const int *offset_h, int E, int N, int K) {
    for (int e = 0; e < E; e++) {
        size_t row = offset_h[e];
        cublas_product((char *)out + row * N * (out_f32 ? 4 : 2), N, out_f32, x + row * K, K,
                       w + (size_t)e * N * K, w_by_k, offset_h[e + 1] - offset_h[e], N, K, 0);
    }
}

// -------------------------------------------------------------------------------------------------
// 5 Checks
//
// Small integers: every sum is exact in fp32 in any order, so the kernels must agree with plain
// loops to the last bit. Outputs are poisoned, gaps and rows that belong to nobody are NaN on input
// and must be untouched on output.

static int failures, checks;
static void check(bool good, const char *format, ...) {
    checks++;
    if (good) { return; }
    failures++;
    va_list args;
    va_start(args, format);
    printf("FAILED ");
    vprintf(format, args);
    printf("\n");
    va_end(args);
}

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
        p.E = E, p.rows = (int)rows, p.N = N, p.K = K, p.width = width;
        // 0x41 in every byte: 12.08 as a float, and an old value for +=.
        cudaCheck(cudaMemset(out, 0x41, rows * ldo * sizeof(float)));
        grouped_product(p);
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
// 6 Times

static void print_rate(const char *name, double flop, float ms) {
    printf("  %-34s %8.3f ms %7.1f TFLOP/s  %5.1f %%\n", name, ms, flop / ms * 1e-9,
           flop / ms * 1e-9 / CEILING_TFLOPS * 100);
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

    experts_v2(reference, 1, x, w, 0, offset_h.data(), E, N, K);
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
    experts_v2(reference, 1, x, w, 0, offset_h.data(), E, N, K);
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
    grouped_product(codes_by_k);
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
    auto v2 = [&](int) { experts_v2(out, 0, x, w, 0, offset_h.data(), E, N, K); };
    race({ { "v2 cuBLAS per expert", v2 },
           { "v3", [&](int) { grouped_product(p); } },
           { "v3, W row by k", [&](int) { grouped_product(by_k); } },
           { "v3, fp32 out", [&](int) { grouped_product(fp32); } },
           { "v3, fp32 out +=", [&](int) { grouped_product(add); } },
           { "v4, border of 16", [&](int) { grouped_product(border); } },
           { "v5, fp4", [&](int) { grouped_product(codes); } },
           { "v5, fp4, W row by k", [&](int) { grouped_product(codes_by_k); } },
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
            cublasCheck(cublasGemmStridedBatchedEx(cublas, by_k ? CUBLAS_OP_N : CUBLAS_OP_T,
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
        Product narrow = p, wide = p;
        narrow.width = 128, wide.width = 256;
        for (const Product &q : { narrow, wide }) {
            cudaCheck(cudaMemset(out, 0xFF, n * 2));
            grouped_product(q);
            double e = device_error(out, right, n);
            check(e < 3e-3, "dense N %d K %d by_k %d width %d against cuBLAS: %g", N, K, by_k,
                  q.width, e);
        }
        bool is_wide = product_width(p, 132) == 256;
        race({ { by_k ? "cuBLAS, W row by k" : "cuBLAS", with_cublas },
               { is_wide ? "v3, 128 wide" : "v3, 128 wide (chosen)",
                 [&](int) { grouped_product(narrow); } },
               { is_wide ? "v3, 256 wide (chosen)" : "v3, 256 wide",
                 [&](int) { grouped_product(wide); } } }, flop,
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
    cublasCheck(cublasCreate(&cublas));
    check_widening();
    printf("widening: %d checks, %d failed\n", checks, failures);
    check_products();
    printf("products: %d checks, %d failed\n", checks, failures);
    if (failures || (argc > 1 && strcmp(argv[1], "check") == 0)) { return failures != 0; }
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
    printf("%d checks, %d failed\n", checks, failures);
    return failures != 0;
}
