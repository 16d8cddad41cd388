// attention_forward.cu: a ladder for the forward core of DeepSeek-V4's attention, whose keys are
// also its values (C text: train.c 5.4, attention_forward).
//
//     l = <q, key> / sqrt(D)     p = exp(l) / (sum exp(l) + exp(sink))     out = sum p key
//
// A token's keys are its window (up to 128 rows of kv that end at the token) and, in compressed
// layers, pooled entries: all visible ones, or the list that the indexer chose for this token.
//
// Versions, one idea each, and what an H200 gave at T 4,096, H 64, D 512 (2026-11-21; TFLOP/s
// count the keys that are attended to, not the padding of tiles; runs differ by 3 %):
//   1  one warp per query and head, dot products by shuffles
//   2  mma.sync: a block is one token x 64 heads, 64 keys at a time by cp.async, two buffers
//   3  wgmma: persistent, a producer and two consumers that own half of the output dims each
//   4  version 3 with the copy engine for rows that lie together, and no waits between products
//   5  version 3's order of steps with version 4's copies (not measured yet)
//
//     ms (TFLOP/s)            keys     1            2            3            4
//     window only            126.0                 0.409 (166)  0.197 (343)  0.189 (358)
//     HCA                    141.5                 0.528 (144)  0.261 (291)  0.247 (308)
//     CSA, topk 512          509.9   25.406 (11)   1.216 (225)  0.575 (476)  0.582 (470)
//     CSA, all visible       637.8                 1.481 (231)  0.710 (482)  0.654 (523)
//     CSA, 8 documents       175.9                 0.555 (170)  0.287 (329)  0.278 (340)
//     CSA, topk 512, 16,384  607.5                 5.456 (239)  2.540 (513)  2.849 (458)
//
// So attention_forward_gpu takes 4 where all visible entries are attended to, and 3 where tokens
// have lists; that gathering suffers from version 4's later freeing of buffers is a guess, which
// version 5 would show.
//
// Arithmetic. Operations: 4 D H = 131,072 per key; CSA with topk 512 at 4,096 tokens: 274 GFLOP =
// 0.34 ms at 802 TFLOP/s. Bytes: q and out 64 KB each per token, 0.54 GB = 0.13 ms at 4,277 GB/s,
// which is what window layers (68 GFLOP, 0.085 ms) could reach. Shared memory, per tile of 64 keys
// and 2,048 tensor clocks: scores read Q and K, 4 KB per 64 x 64 x 16 (32 clocks each way, 1,024
// in all), outputs read V, 8 KB per 64 x 256 x 16 (512), the tile's arrival writes 64 KB (512), P
// adds 40: 2,090 clocks, so tensor cores and shared memory are both near their limit and 60 - 65 %
// of the peak was the prediction (kernels.md). L2: 64 KB per tile is 128 FLOP per byte, 3.8 TB/s
// at 480 TFLOP/s. Short lists pay for Q (64 KB through L2 before the first product, 2.5 us a
// token): two tokens in a cluster that share their window tiles would be the next idea.
//
// What did not help: quarters of 16 KB as the unit of filling and freeing (-15 % and more, with
// products of 64 x 256 or 64 x 128 alike), starting an odd list with its short tile (HCA -7 %),
// leaving out the empty half of a last tile's products (-6 .. +2 %), dropping the proxy fences of
// consumers (nothing), arriving for cp.async by wait_group and one lane instead of 128 arrivals
// (-15 % where entries are gathered: too little in flight).
#include "common.h"
#include <cuda.h>
#include <cudaTypedefs.h>
#include <thread>

#define EXIT_COMM 4
#define EXIT_USAGE 1

// As in kernels.cu, part 1.
typedef struct {
    int T, P, H, D;             // tokens, entries, heads, dims of a head
    int W;                      // window, in tokens
    int ratio;                  // tokens per entry: 4, 128, or 0: window only
    int topk;                   // row length of the indexer's choice
    const int *position;        // (T) of the token in its document
    const int *end;             // (T) one past the last token of its document
    const int *first_entry;     // (T) first entry of its document
    const int *token;           // (P) first token of the run that the entry is of
} AttentionShape;

// -------------------------------------------------------------------------------------------------
// Helpers of kernels.cu, part 2, that the kernels use

#define gpuRequire(condition) do { if (!(condition)) { \
    fprintf(stderr, "no kernel for this shape: %s (line %d)\n", #condition, __LINE__); \
    exit(EXIT_USAGE); } } while (0)

static inline int blocks_for(size_t n, int per_block) {
    return (int)((n + per_block - 1) / per_block);
}

__device__ inline void load4(float *x, const bf16 *p) {
    const uint2 raw = *(const uint2 *)p;
    const __nv_bfloat162 *pair = (const __nv_bfloat162 *)&raw;
    const float2 a = __bfloat1622float2(pair[0]), b = __bfloat1622float2(pair[1]);
    x[0] = a.x; x[1] = a.y; x[2] = b.x; x[3] = b.y;
}
__device__ inline void store4(bf16 *p, const float *x) {
    uint2 raw;
    __nv_bfloat162 *pair = (__nv_bfloat162 *)&raw;
    pair[0] = __floats2bfloat162_rn(x[0], x[1]);
    pair[1] = __floats2bfloat162_rn(x[2], x[3]);
    *(uint2 *)p = raw;
}
template <int N, typename V> __device__ inline void load_row(float *x, const V *p) {
    #pragma unroll
    for (int i = 0; i < N; i += 4) { load4(x + i, p + i); }
}
template <int N, typename V> __device__ inline void store_row(V *p, const float *x) {
    #pragma unroll
    for (int i = 0; i < N; i += 4) { store4(p + i, x + i); }
}
__device__ inline float warp_sum(float x) {
    #pragma unroll
    for (int k = 16; k > 0; k /= 2) { x += __shfl_xor_sync(~0u, x, k); }
    return x;
}

typedef void Forward(act *, real *, const act *, const act *, const act *, const float *,
                     const int *, AttentionShape);

// -------------------------------------------------------------------------------------------------
// Version 1: one warp per query and head, its lanes sharing the D dims; every dot product is a
// shuffle tree. It stays, for shapes that the fast kernel was not written for.

// The i-th key row that token t attends to, of n = attended_count: window rows, then entries.
__device__ inline int attended_count(const AttentionShape &a, const int *selected, int t,
                                     int *window) {
    *window = min(a.position[t] + 1, a.W);
    const int visible = a.ratio ? (a.position[t] + 1) / a.ratio : 0;
    return *window + (selected ? min(visible, a.topk) : visible);
}

__device__ inline const act *attended_key(const AttentionShape &a, const act *kv,
                                          const act *entries, const int *selected, int t,
                                          int window, int i) {
    if (i < window) { return kv + (size_t)(t - window + 1 + i) * a.D; }
    const int e = selected ? selected[(size_t)t * a.topk + i - window]
                           : a.first_entry[t] + i - window;
    return entries + (size_t)e * a.D;
}

template <int NV>
__global__ void attention_forward_kernel(act *out, real *lse, const act *q, const act *kv,
                                         const act *entries, const float *sink, const int *selected,
                                         AttentionShape a) {
    const int lane = threadIdx.x % 32, first = lane * NV;
    const size_t row = (size_t)blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32;
    if (row >= (size_t)a.T * a.H) { return; }
    const int t = (int)(row / a.H), h = (int)(row % a.H);
    const float scale = rsqrtf((float)a.D);
    int window;
    const int n = attended_count(a, selected, t, &window);
    float x[NV], o[NV] = {0}, k[NV], max = sink[h], sum = 1;
    load_row<NV>(x, q + row * a.D + first);
    for (int i = 0; i < n; i++) {
        load_row<NV>(k, attended_key(a, kv, entries, selected, t, window, i) + first);
        float l = 0;
        #pragma unroll
        for (int d = 0; d < NV; d++) { l += x[d] * k[d]; }
        l = scale * warp_sum(l);
        const float higher = fmaxf(max, l), keep = expf(max - higher), e = expf(l - higher);
        sum = sum * keep + e;
        max = higher;
        #pragma unroll
        for (int d = 0; d < NV; d++) { o[d] = o[d] * keep + e * k[d]; }
    }
    #pragma unroll
    for (int d = 0; d < NV; d++) { o[d] /= sum; }
    store_row<NV>(out + row * a.D + first, o);
    if (lane == 0) { lse[row] = max + logf(sum); }
}

static void attention_forward_v1(act *out, real *lse, const act *q, const act *kv,
                                 const act *entries, const float *sink, const int *selected,
                                 AttentionShape a) {
    const int grid = blocks_for((size_t)a.T * a.H, 8);
    if (a.D == 512) {
        attention_forward_kernel<16><<<grid, 256, 0, stream>>>(out, lse, q, kv, entries, sink,
                                                               selected, a);
    } else {
        gpuRequire(a.D == 128);
        attention_forward_kernel<4><<<grid, 256, 0, stream>>>(out, lse, q, kv, entries, sink,
                                                              selected, a);
    }
    cudaCheck(cudaGetLastError());
}

// -------------------------------------------------------------------------------------------------
// What versions 2 and 3 share
//
// A tile is 64 rows of 512 dims: the heads of one token, or 64 consecutive keys of its list. In
// shared memory it is 8 blocks of 64 columns; a block's row is 128 bytes, its 16-byte chunk c lies
// at c ^ row % 8. That is the tensor cores' 128-byte swizzle, and keeps ldmatrix free of conflicts.
//
// The softmax works in powers of two: x = <q,k> * scale * log2(e). Its reference (what is
// subtracted before exp2) starts at the sink and follows the maximum only when that is more than
// RISE above it: p stays below 2^RISE, and the outputs are almost never rescaled.

enum { TILE = 64, ATT_H = 64, ATT_D = 512, BLOCK_BYTES = TILE * 128, TILE_BYTES = 8 * BLOCK_BYTES };
#define RISE 8.0f
#define LOG2E 1.4426950408889634f
#define LN2 0.6931471805599453f

__device__ inline uint32_t shared_address(const void *p) {
    return (uint32_t)__cvta_generic_to_shared(p);
}

__device__ inline uint32_t chunk_offset(int row, int chunk) {
    return chunk / 8 * BLOCK_BYTES + row * 128 + ((chunk ^ row) & 7) * 16;
}

// 16 bytes to shared memory, asynchronously; zeros when there is no source.
__device__ inline void copy16(uint32_t to, const void *from) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
                 :: "r"(to), "l"(from), "r"(from ? 16 : 0) : "memory");
}

// The keys that a token attends to.
typedef struct {
    int t, window, count, first_entry;
} Keys;

__device__ inline Keys token_keys(const AttentionShape &a, const int *selected, int t) {
    Keys k;
    k.t = t;
    k.count = attended_count(a, selected, t, &k.window);
    k.first_entry = a.ratio ? a.first_entry[t] : 0;
    return k;
}

// Row i of the list, or NULL past its end.
__device__ inline const act *key_row(const Keys &k, const AttentionShape &a, const act *kv,
                                     const act *entries, const int *selected, int i) {
    if (i >= k.count) { return NULL; }
    if (i < k.window) { return kv + (size_t)(k.t - k.window + 1 + i) * ATT_D; }
    i -= k.window;
    const int e = selected ? selected[(size_t)k.t * a.topk + i] : k.first_entry + i;
    return entries + (size_t)e * ATT_D;
}

__device__ inline const act *from_lane(const act *p, int lane) {
    return (const act *)__shfl_sync(~0u, (unsigned long long)p, lane);
}

// exp2, and 0 for -inf; the hardware's approximation has an error of 2^-22.
__device__ inline float power2(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

__device__ inline float quad_max(float x) {
    x = fmaxf(x, __shfl_xor_sync(~0u, x, 1));
    return fmaxf(x, __shfl_xor_sync(~0u, x, 2));
}
__device__ inline float quad_sum(float x) {
    x += __shfl_xor_sync(~0u, x, 1);
    return x + __shfl_xor_sync(~0u, x, 2);
}

__device__ inline uint32_t pack2(float low, float high) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    return *(const uint32_t *)&pair;
}

// Of four blocks of 8 columns a lane of a quad holds the columns 2 lane, 2 lane + 1 of each. It
// gets block `lane` whole, and stores its 16 bytes: a quad writes 64 bytes of one row.
__device__ inline void store_blocks(act *row, uint32_t x0, uint32_t x1, uint32_t x2, uint32_t x3) {
    const int lane = threadIdx.x % 4;
    const bool odd = lane & 1, high = lane & 2;
    const uint32_t a = __shfl_xor_sync(~0u, odd ? x0 : x1, 1);
    const uint32_t b = __shfl_xor_sync(~0u, odd ? x2 : x3, 1);
    const uint32_t y0 = odd ? a : x0, y1 = odd ? x1 : a, y2 = odd ? b : x2, y3 = odd ? x3 : b;
    const uint32_t c = __shfl_xor_sync(~0u, high ? y0 : y2, 2);
    const uint32_t d = __shfl_xor_sync(~0u, high ? y1 : y3, 2);
    *(uint4 *)(row + lane * 8) = high ? make_uint4(c, d, y2, y3) : make_uint4(y0, y1, c, d);
}

// Four blocks of 8 columns of rows r and r + 8, from 16 accumulators of an m16n8 fragment.
__device__ inline void store_fragments(act *at, const float *o, float scale0, float scale1) {
    store_blocks(at, pack2(o[0] * scale0, o[1] * scale0), pack2(o[4] * scale0, o[5] * scale0),
                 pack2(o[8] * scale0, o[9] * scale0), pack2(o[12] * scale0, o[13] * scale0));
    store_blocks(at + 8 * ATT_D,
                 pack2(o[2] * scale1, o[3] * scale1), pack2(o[6] * scale1, o[7] * scale1),
                 pack2(o[10] * scale1, o[11] * scale1), pack2(o[14] * scale1, o[15] * scale1));
}

// -------------------------------------------------------------------------------------------------
// Version 2: mma.sync. One block of 8 warps per token. The scores of 64 heads x 64 keys are cut
// into 16 x 32 per warp, the outputs 64 x 512 into 32 x 128 per warp (128 accumulators a thread);
// P goes through shared memory. The next tile arrives while this one is worked on.

__device__ inline void load_fragments(uint32_t (&r)[4], uint32_t at) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(at) : "memory");
}
__device__ inline void load_fragments_transposed(uint32_t (&r)[4], uint32_t at) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(at) : "memory");
}
__device__ inline void multiply(float *d, const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, "
                 "{%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// What lies where in version 2's shared memory.
enum {
    V2_Q = 0, V2_KV = TILE_BYTES, V2_P = 3 * TILE_BYTES, V2_PEAK = V2_P + BLOCK_BYTES,
    V2_KEEP = V2_PEAK + 2 * 64 * 4, V2_SUM = V2_KEEP + 64 * 4, V2_BYTES = V2_SUM + 2 * 64 * 4,
};

// 8 warps copy 64 rows; lane l of a warp knows row 8 (l % 8) + warp.
__device__ inline void copy_tile(uint32_t to, const act *mine) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    #pragma unroll
    for (int i = 0; i < 8; i++) {
        const act *row = from_lane(mine, i);
        #pragma unroll
        for (int half = 0; half < 2; half++) {
            const int chunk = half * 32 + lane;
            copy16(to + chunk_offset(8 * i + warp, chunk), row ? row + chunk * 8 : NULL);
        }
    }
    asm volatile("cp.async.commit_group;" ::: "memory");
}

// s += 16 heads x 32 keys.
__device__ inline void scores_16x32(float (&s)[16], uint32_t q, uint32_t keys, int m, int n) {
    const int lane = threadIdx.x % 32;
    #pragma unroll 8
    for (int k = 0; k < ATT_D / 16; k++) {
        uint32_t a[4], b[4];
        load_fragments(a, q + chunk_offset(16 * m + lane % 16, 2 * k + lane / 16));
        #pragma unroll
        for (int j = 0; j < 2; j++) {
            load_fragments(b, keys + chunk_offset(32 * n + 16 * j + lane / 16 * 8 + lane % 8,
                                                  2 * k + lane / 8 % 2));
            multiply(s + 8 * j, a, b[0], b[1]);
            multiply(s + 8 * j + 4, a, b[2], b[3]);
        }
    }
}

// o += 32 heads x 128 dims of P V.
__device__ inline void outputs_32x128(float (&o)[2][64], uint32_t p, uint32_t keys, int m, int n) {
    const int lane = threadIdx.x % 32;
    #pragma unroll
    for (int k = 0; k < TILE / 16; k++) {
        uint32_t a[2][4], b[4];
        #pragma unroll
        for (int i = 0; i < 2; i++) {
            load_fragments(a[i], p + chunk_offset(32 * m + 16 * i + lane % 16, 2 * k + lane / 16));
        }
        #pragma unroll
        for (int j = 0; j < 8; j++) {
            load_fragments_transposed(b, keys + chunk_offset(16 * k + lane % 16,
                                                             16 * n + 2 * j + lane / 16));
            #pragma unroll
            for (int i = 0; i < 2; i++) {
                multiply(o[i] + 8 * j, a[i], b[0], b[1]);
                multiply(o[i] + 8 * j + 4, a[i], b[2], b[3]);
            }
        }
    }
}

__global__ __launch_bounds__(256, 1)
void attention_forward_mma_kernel(act *out, real *lse, const act *q, const act *kv,
                                  const act *entries, const float *sink, const int *selected,
                                  AttentionShape a) {
    extern __shared__ __align__(1024) unsigned char shared[];
    const uint32_t base = shared_address(shared);
    float (*peak)[64] = (float (*)[64])(shared + V2_PEAK), *keep = (float *)(shared + V2_KEEP);
    float (*sums)[64] = (float (*)[64])(shared + V2_SUM);
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4;
    const int t = a.T - 1 - (int)blockIdx.x;
    const int sm = warp % 4, sn = warp / 4, om = warp % 2, on = warp / 2;
    const int row = 16 * sm + g;                        // of the scores, and row + 8
    const Keys keys = token_keys(a, selected, t);
    const int tiles = (keys.count + TILE - 1) / TILE, mine = 8 * (lane % 8) + warp;
    const float scale = rsqrtf((float)ATT_D) * LOG2E;
    float o[2][64] = {{0}}, reference[2], sum[2];
    for (int i = 0; i < 2; i++) {
        reference[i] = sink[row + 8 * i] * LOG2E;
        sum[i] = sn == 0 && lane % 4 == 0 ? 1 : 0;      // the sink's share, once
    }
    copy_tile(base + V2_Q, q + ((size_t)t * ATT_H + mine) * ATT_D);
    copy_tile(base + V2_KV, key_row(keys, a, kv, entries, selected, mine));
    for (int tile = 0; tile < tiles; tile++) {
        const uint32_t now = base + V2_KV + tile % 2 * TILE_BYTES;
        const act *next = key_row(keys, a, kv, entries, selected, (tile + 1) * TILE + mine);
        asm volatile("cp.async.wait_group 0;" ::: "memory");
        __syncthreads();                                // this tile is here, the last one done with
        if (tile + 1 < tiles) { copy_tile(base + V2_KV + (tile + 1) % 2 * TILE_BYTES, next); }
        float s[16] = {0}, high[2] = {-INFINITY, -INFINITY};
        scores_16x32(s, base + V2_Q, now, sm, sn);
        #pragma unroll
        for (int i = 0; i < 16; i++) {
            const int key = tile * TILE + 32 * sn + i / 4 * 8 + lane % 4 * 2 + i % 2;
            s[i] = key < keys.count ? s[i] * scale : -INFINITY;
            high[i / 2 % 2] = fmaxf(high[i / 2 % 2], s[i]);
        }
        for (int i = 0; i < 2; i++) {
            high[i] = quad_max(high[i]);
            if (lane % 4 == 0) { peak[sn][row + 8 * i] = high[i]; }
        }
        __syncthreads();
        for (int i = 0; i < 2; i++) {
            const float top = fmaxf(peak[0][row + 8 * i], peak[1][row + 8 * i]);
            const float now = top > reference[i] + RISE ? top : reference[i];
            const float kept = power2(reference[i] - now);
            if (sn == 0 && lane % 4 == 0) { keep[row + 8 * i] = kept; }
            sum[i] *= kept;
            reference[i] = now;
        }
        #pragma unroll
        for (int i = 0; i < 16; i += 2) {
            const int high = i / 2 % 2;
            const float p0 = power2(s[i] - reference[high]);
            const float p1 = power2(s[i + 1] - reference[high]);
            sum[high] += p0 + p1;
            *(uint32_t *)(shared + V2_P + chunk_offset(row + 8 * high, 4 * sn + i / 4)
                          + lane % 4 * 4) = pack2(p0, p1);
        }
        __syncthreads();
        #pragma unroll
        for (int i = 0; i < 2; i++) {
            const float k0 = keep[32 * om + 16 * i + g], k1 = keep[32 * om + 16 * i + g + 8];
            if (__any_sync(~0u, k0 != 1 || k1 != 1)) {
                #pragma unroll
                for (int j = 0; j < 64; j++) { o[i][j] *= j & 2 ? k1 : k0; }
            }
        }
        outputs_32x128(o, base + V2_P, now, om, on);
    }
    for (int i = 0; i < 2; i++) {
        sum[i] = quad_sum(sum[i]);
        if (lane % 4 == 0) { sums[sn][row + 8 * i] = sum[i]; }
    }
    __syncthreads();
    if (sn == 0 && lane % 4 == 0) {
        for (int i = 0; i < 2; i++) {
            const float total = sums[0][row + 8 * i] + sums[1][row + 8 * i];
            lse[(size_t)t * ATT_H + row + 8 * i] = (reference[i] + log2f(total)) * LN2;
        }
    }
    #pragma unroll
    for (int i = 0; i < 2; i++) {
        const int r = 32 * om + 16 * i + g;
        const float k0 = 1 / (sums[0][r] + sums[1][r]), k1 = 1 / (sums[0][r + 8] + sums[1][r + 8]);
        #pragma unroll
        for (int j = 0; j < 4; j++) {
            act *at = out + ((size_t)t * ATT_H + r) * ATT_D + 128 * on + 32 * j;
            store_fragments(at, o[i] + 16 * j, k0, k1);
        }
    }
}

static void attention_forward_v2(act *out, real *lse, const act *q, const act *kv,
                                 const act *entries, const float *sink, const int *selected,
                                 AttentionShape a) {
    gpuRequire(a.D == ATT_D && a.H == ATT_H);
    cudaCheck(cudaFuncSetAttribute(attention_forward_mma_kernel,
                                   cudaFuncAttributeMaxDynamicSharedMemorySize, V2_BYTES));
    attention_forward_mma_kernel<<<a.T, 256, V2_BYTES, stream>>>(out, lse, q, kv, entries, sink,
                                                                 selected, a);
    cudaCheck(cudaGetLastError());
}

// -------------------------------------------------------------------------------------------------
// Version 3: wgmma, two consumer warpgroups and one producer
//
// A block keeps its multiprocessor and takes every 132nd token. Tiles go in pairs: even ones into
// buffer 0, odd ones into buffer 1. Consumer 0 scores the even tile of a pair, consumer 1 the odd
// one (64 x 64 over 512 dims), each takes its tile's softmax, and hands P to the other through
// shared memory. Of the outputs consumer 0 owns the dims 0 .. 255, consumer 1 the dims 256 .. 511,
// over all keys. So one consumer's softmax hides under the other's products:
//
//     consumer 0:  S0 = Q K0   softmax 0           O += P0 V0 left    O += P1 V1 left
//     consumer 1:      S1 = Q K1   O += P0 V0 right   softmax 1       O += P1 V1 right
//
// The softmax reference of a row goes from one to the other with P, each rescales its outputs and
// its share of the sum when it moved. A buffer's left half is free when consumer 0 has used it, the
// right half when consumer 1 has, and is refilled at once, which lets the next scores begin on it.
//
// Full and free are mbarriers; the producer's cp.async arrive on full by themselves. P is handed
// over by named barriers. Nobody waits in a cycle: see the order of the steps in consume().

// The 128-byte swizzle's descriptor. K-major operands (Q, K, P): stride is between 8 rows, leading
// is not used. MN-major (V): leading is between blocks of 64 dims, stride between 8 keys.
__device__ inline uint64_t matrix_descriptor(uint32_t at) {
    return (uint64_t)(at >> 4) | (uint64_t)(BLOCK_BYTES >> 4) << 16 | (uint64_t)(1024 >> 4) << 32
         | 1ull << 62;
}

__device__ inline void wgmma_fence(void) { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ inline void wgmma_commit(void) {
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
// Waits for all products of this warpgroup. d: their accumulators, which the compiler must not read
// before.
template <int N> __device__ inline void wgmma_wait(float (&d)[N]) {
    asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
    #pragma unroll
    for (int i = 0; i < N; i++) { asm volatile("" : "+f"(d[i]) :: "memory"); }
}
// Ordinary and cp.async writes that this thread knows of, before what it lets wgmma read.
__device__ inline void proxy_fence(void) {
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

#define ACC4(d, i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define ACC16(d, i) ACC4(d, i), ACC4(d, i + 4), ACC4(d, i + 8), ACC4(d, i + 12)
#define ACC32(d, i) ACC16(d, i), ACC16(d, i + 16)

// d (64 x 64) = or += a (64 x 16) b (64 x 16)^T.
__device__ inline void wgmma_scores(float (&d)[32], uint64_t a, uint64_t b, int add) {
    asm volatile("{.reg .pred p; setp.ne.b32 p, %34, 0;\n"
                 "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {"
                 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, "
                 "%12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, "
                 "%24, %25, %26, %27, %28, %29, %30, %31"
                 "}, %32, %33, p, 1, 1, 0, 0;}"
                 : ACC32(d, 0) : "l"(a), "l"(b), "r"(add));
}

// d (64 x 256) += a (64 x 16) b (16 x 256), a from registers.
__device__ inline void wgmma_outputs(float (&d)[128], const uint32_t *a, uint64_t b) {
    asm volatile("wgmma.mma_async.sync.aligned.m64n256k16.f32.bf16.bf16 {"
                 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, "
                 "%12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, "
                 "%24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, "
                 "%36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
                 "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, "
                 "%60, %61, %62, %63, %64, %65, %66, %67, %68, %69, %70, %71, "
                 "%72, %73, %74, %75, %76, %77, %78, %79, %80, %81, %82, %83, "
                 "%84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, "
                 "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, "
                 "%108, %109, %110, %111, %112, %113, %114, %115, %116, %117, %118, %119, "
                 "%120, %121, %122, %123, %124, %125, %126, %127"
                 "}, {%128, %129, %130, %131}, %132, 1, 1, 1, 1;"
                 : ACC32(d, 0), ACC32(d, 32), ACC32(d, 64), ACC32(d, 96)
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}

// The same, a from shared memory.
__device__ inline void wgmma_outputs(float (&d)[128], uint64_t a, uint64_t b) {
    asm volatile("wgmma.mma_async.sync.aligned.m64n256k16.f32.bf16.bf16 {"
                 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, "
                 "%12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, "
                 "%24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, "
                 "%36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
                 "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, "
                 "%60, %61, %62, %63, %64, %65, %66, %67, %68, %69, %70, %71, "
                 "%72, %73, %74, %75, %76, %77, %78, %79, %80, %81, %82, %83, "
                 "%84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, "
                 "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, "
                 "%108, %109, %110, %111, %112, %113, %114, %115, %116, %117, %118, %119, "
                 "%120, %121, %122, %123, %124, %125, %126, %127"
                 "}, %128, %129, 1, 1, 1, 0, 1;"
                 : ACC32(d, 0), ACC32(d, 32), ACC32(d, 64), ACC32(d, 96) : "l"(a), "l"(b));
}

__device__ inline void barrier_init(uint32_t at, int count) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" :: "r"(at), "r"(count) : "memory");
}
__device__ inline void barrier_arrive(uint32_t at) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" :: "r"(at) : "memory");
}
// Arrives when the cp.async that this thread has issued so far are complete.
__device__ inline void barrier_arrive_after_copies(uint32_t at) {
    asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" :: "r"(at) : "memory");
}
__device__ inline void barrier_wait(uint32_t at, int parity) {
    asm volatile("{.reg .pred p;\n"
                 "again: mbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1;\n"
                 "@!p bra again;}" :: "r"(at), "r"(parity) : "memory");
}

// Barriers between the two consumers' 256 threads.
enum { P0_READY = 1, P1_READY = 2, TOKEN_DONE = 3 };
template <int ID> __device__ inline void pair_arrive(void) {
    asm volatile("bar.arrive %0, 256;" :: "n"(ID) : "memory");
}
template <int ID> __device__ inline void pair_sync(void) {
    asm volatile("bar.sync %0, 256;" :: "n"(ID) : "memory");
}

// What lies where in version 3's shared memory. Full and free: buffer 0 left, right, buffer 1 left,
// right.
enum {
    V3_Q = 0, V3_KV = TILE_BYTES, V3_P = 3 * TILE_BYTES, V3_REFERENCE = V3_P + 2 * BLOCK_BYTES,
    V3_SUM = V3_REFERENCE + 2 * 64 * 4, V3_FULL = V3_SUM + 2 * 2 * 64 * 4,
    V3_FREE = V3_FULL + 4 * 8, V3_Q_FULL = V3_FREE + 4 * 8, V3_Q_FREE = V3_Q_FULL + 8,
    V3_BYTES = V3_Q_FREE + 8, V3_HALF = TILE_BYTES / 2,
};

typedef struct {
    act *out;
    real *lse;
    const act *q, *kv, *entries;
    const float *sink;
    const int *selected;
    AttentionShape a;
} ForwardArguments;

// Tokens of this block, the last first: they have the most keys, and the next blocks' neighbours
// share them in L2.
__device__ inline int block_token(const AttentionShape &a, int i) {
    return a.T - 1 - (i * (int)gridDim.x + (int)blockIdx.x);
}

// The producer: 4 warps, each 16 rows of a tile; a warp copies half a row of 512 bytes at a time.
__device__ inline void copy_half(uint32_t to, const act *mine, int half) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4;
    #pragma unroll
    for (int i = 0; i < 16; i++) {
        const act *row = from_lane(mine, i);
        copy16(to + half * V3_HALF + chunk_offset(16 * warp + i, lane),
               row ? row + half * 256 + lane * 8 : NULL);
    }
}

__device__ inline void produce(const ForwardArguments &f, uint32_t base) {
    const int lane = threadIdx.x % 32, mine = threadIdx.x / 32 % 4 * 16 + lane % 16;
    int use[2] = {0, 0};                                // fills of each buffer so far
    for (int i = 0, t; (t = block_token(f.a, i)) >= 0; i++) {
        const Keys keys = token_keys(f.a, f.selected, t);
        const act *row = f.q + ((size_t)t * ATT_H + mine) * ATT_D;
        barrier_wait(base + V3_Q_FREE, ~i & 1);
        copy_half(base + V3_Q, row, 0);
        copy_half(base + V3_Q, row, 1);
        barrier_arrive_after_copies(base + V3_Q_FULL);
        if (block_token(f.a, i + 1) >= 0 && threadIdx.x % 128 == 0) {
            asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;"
                         :: "l"(f.q + (size_t)block_token(f.a, i + 1) * ATT_H * ATT_D),
                            "r"(TILE_BYTES) : "memory");
        }
        for (int tile = 0; tile * TILE < keys.count; tile++) {
            const int b = tile % 2;
            row = key_row(keys, f.a, f.kv, f.entries, f.selected, tile * TILE + mine);
            #pragma unroll
            for (int half = 0; half < 2; half++) {
                barrier_wait(base + V3_FREE + (2 * b + half) * 8, ~(b ? use[1] : use[0]) & 1);
                copy_half(base + V3_KV + b * TILE_BYTES, row, half);
                barrier_arrive_after_copies(base + V3_FULL + (2 * b + half) * 8);
            }
            if (b) { use[1]++; } else { use[0]++; }
        }
    }
}

// A consumer thread's part of a row pair: r = 16 warp + lane / 4, and r + 8.
typedef struct {
    float reference[2], sum[2];
} Softmax;

// s = Q K^T of the tile in that buffer, whose halves are filled for the use-th time.
__device__ inline void scores(float (&s)[32], uint32_t base, int buffer, int use) {
    const uint64_t q = matrix_descriptor(base + V3_Q);
    const uint64_t k = matrix_descriptor(base + V3_KV + buffer * TILE_BYTES);
    #pragma unroll
    for (int half = 0; half < 2; half++) {
        barrier_wait(base + V3_FULL + (2 * buffer + half) * 8, use & 1);
        proxy_fence();
        wgmma_fence();
        #pragma unroll
        for (int i = 16 * half; i < 16 * half + 16; i++) {
            const int step = (i / 4 * BLOCK_BYTES + i % 4 * 32) >> 4;
            wgmma_scores(s, q + step, k + step, i > 0);
        }
    }
    wgmma_commit();
}

// P from the scores: into p (bf16, as the operand of wgmma) and into shared memory for the other.
__device__ inline void softmax(uint32_t (&p)[16], float (&s)[32], Softmax &x, unsigned char *to,
                               int row, int left) {
    const float scale = rsqrtf((float)ATT_D) * LOG2E;
    const int lane = threadIdx.x % 32;
    float high[2] = {-INFINITY, -INFINITY};
    #pragma unroll
    for (int i = 0; i < 32; i++) {
        if (left < TILE && i / 4 * 8 + lane % 4 * 2 + i % 2 >= left) { s[i] = -INFINITY; }
        high[i / 2 % 2] = fmaxf(high[i / 2 % 2], s[i]);
    }
    #pragma unroll
    for (int i = 0; i < 2; i++) {
        const float top = quad_max(high[i]) * scale;
        const float now = top > x.reference[i] + RISE ? top : x.reference[i];
        x.sum[i] *= power2(x.reference[i] - now);
        x.reference[i] = now;
    }
    #pragma unroll
    for (int i = 0; i < 32; i += 2) {
        const int high = i / 2 % 2;
        const float p0 = power2(s[i] * scale - x.reference[high]);
        const float p1 = power2(s[i + 1] * scale - x.reference[high]);
        x.sum[high] += p0 + p1;
        p[i / 2] = pack2(p0, p1);
        *(uint32_t *)(to + chunk_offset(row + 8 * high, i / 4) + lane % 4 * 4) = p[i / 2];
    }
}

// The outputs follow the reference from `before` to now.
__device__ inline void rescale(float (&o)[128], const float *before, const float *now) {
    const float k0 = power2(before[0] - now[0]), k1 = power2(before[1] - now[1]);
    if (__any_sync(~0u, before[0] != now[0] || before[1] != now[1])) {
        #pragma unroll
        for (int i = 0; i < 128; i++) { o[i] *= i & 2 ? k1 : k0; }
    }
}

// Takes over the reference that the other consumer set.
__device__ inline void follow(float (&o)[128], Softmax &x, const float *reference, int row) {
    const float now[2] = {reference[row], reference[row + 8]};
    rescale(o, x.reference, now);
    #pragma unroll
    for (int i = 0; i < 2; i++) {
        x.sum[i] *= power2(x.reference[i] - now[i]);
        x.reference[i] = now[i];
    }
}

// o += P V, half of the dims; P of the own tile from registers, of the other's from shared memory.
template <typename P>
__device__ inline void outputs(float (&o)[128], P p, int step, uint32_t values) {
    const uint64_t v = matrix_descriptor(values);
    wgmma_fence();
    #pragma unroll
    for (int i = 0; i < 4; i++) { wgmma_outputs(o, p + i * step, v + i * (16 * 128 >> 4)); }
    wgmma_commit();
}

// The end of a token: the two shares of the sum meet; the outputs are divided and stored.
template <int SIDE>
__device__ inline void finish(const ForwardArguments &f, unsigned char *shared, float (&o)[128],
                              Softmax &x, int t, int parity, int row) {
    float (*sums)[64] = (float (*)[64])(shared + V3_SUM) + 2 * parity;
    const int lane = threadIdx.x % 32;
    float inverse[2];
    #pragma unroll
    for (int i = 0; i < 2; i++) {
        x.sum[i] = quad_sum(x.sum[i]);
        if (lane % 4 == 0) { sums[SIDE][row + 8 * i] = x.sum[i]; }
    }
    pair_sync<TOKEN_DONE>();
    #pragma unroll
    for (int i = 0; i < 2; i++) {
        const float total = sums[0][row + 8 * i] + sums[1][row + 8 * i];
        inverse[i] = 1 / total;
        if (SIDE == 0 && lane % 4 == 0) {
            f.lse[(size_t)t * ATT_H + row + 8 * i] = (x.reference[i] + log2f(total)) * LN2;
        }
    }
    act *at = f.out + ((size_t)t * ATT_H + row) * ATT_D + 256 * SIDE;
    #pragma unroll
    for (int j = 0; j < 8; j++) {
        store_fragments(at + 32 * j, o + 16 * j, inverse[0], inverse[1]);
    }
}

// The steps of one consumer. use[b]: the tiles that buffer b has held before.
template <int SIDE>
__device__ inline void consume(const ForwardArguments &f, unsigned char *shared) {
    const uint32_t base = shared_address(shared);
    const int lane = threadIdx.x % 32, row = threadIdx.x / 32 % 4 * 16 + lane / 4;
    float *reference = (float *)(shared + V3_REFERENCE), *mine = reference + 64 * SIDE;
    const float sink[2] = {f.sink[row] * LOG2E, f.sink[row + 8] * LOG2E};
    const uint32_t values = base + V3_KV + SIDE * V3_HALF;
    const uint64_t others = matrix_descriptor(base + V3_P + (1 - SIDE) * BLOCK_BYTES);
    unsigned char *own = shared + V3_P + SIDE * BLOCK_BYTES;
    int use[2] = {0, 0}, window, next = block_token(f.a, 0);
    int count = next >= 0 ? attended_count(f.a, f.selected, next, &window) : 0;
    for (int i = 0, t; (t = block_token(f.a, i)) >= 0; i++) {
        const int tiles = (count + TILE - 1) / TILE, last = (tiles - 1 - SIDE) / 2 * 2 + SIDE;
        const int keys = count;
        float o[128], s[32];
        uint32_t p[16];
        Softmax x;
        #pragma unroll
        for (int j = 0; j < 128; j++) { o[j] = 0; }
        #pragma unroll
        for (int j = 0; j < 2; j++) {
            x.reference[j] = sink[j];
            x.sum[j] = SIDE == 0 && lane % 4 == 0 ? 1 : 0;
        }
        next = block_token(f.a, i + 1);                 // its count arrives during this token
        count = next >= 0 ? attended_count(f.a, f.selected, next, &window) : 0;
        if (tiles > SIDE) {
            barrier_wait(base + V3_Q_FULL, i & 1);
        } else if (lane == 0) {
            barrier_arrive(base + V3_Q_FREE);           // one tile: consumer 1 needs no Q
        }
        for (int tile = 0; tile < tiles; tile += 2) {
            const bool both = tile + 1 < tiles;
            if (SIDE == 0 || both) {
                scores(s, base, SIDE, use[SIDE]);
                wgmma_wait(s);
                if (tile + SIDE == last && lane == 0) { barrier_arrive(base + V3_Q_FREE); }
            }
            if (SIDE == 0) {
                const float before[2] = {x.reference[0], x.reference[1]};
                softmax(p, s, x, own, row, keys - tile * TILE);
                if (lane % 4 == 0) {
                    mine[row] = x.reference[0];
                    mine[row + 8] = x.reference[1];
                }
                proxy_fence();
                pair_arrive<P0_READY>();
                rescale(o, before, x.reference);
                outputs(o, (const uint32_t *)p, 4, values);
            } else {
                pair_sync<P0_READY>();
                follow(o, x, reference, row);
                barrier_wait(base + V3_FULL + 8, use[0] & 1);
                proxy_fence();
                outputs(o, others, 2, values);
            }
            const float before[2] = {x.reference[0], x.reference[1]};
            if (SIDE == 1 && both) {
                softmax(p, s, x, own, row, keys - (tile + 1) * TILE);
                if (lane % 4 == 0) {
                    mine[row] = x.reference[0];
                    mine[row + 8] = x.reference[1];
                }
                proxy_fence();
            }
            wgmma_wait(o);
            if (lane == 0) { barrier_arrive(base + V3_FREE + SIDE * 8); }
            use[0]++;
            if (!both) { break; }
            if (SIDE == 0) {
                pair_sync<P1_READY>();
                follow(o, x, reference + 64, row);
                barrier_wait(base + V3_FULL + 16, use[1] & 1);
                proxy_fence();
                outputs(o, others, 2, values + TILE_BYTES);
            } else {
                pair_arrive<P1_READY>();
                rescale(o, before, x.reference);
                outputs(o, (const uint32_t *)p, 4, values + TILE_BYTES);
            }
            wgmma_wait(o);
            if (lane == 0) { barrier_arrive(base + V3_FREE + (2 + SIDE) * 8); }
            use[1]++;
        }
        finish<SIDE>(f, shared, o, x, t, i & 1, row);
    }
}

__global__ __launch_bounds__(384, 1)
void attention_forward_wgmma_kernel(const __grid_constant__ ForwardArguments f) {
    extern __shared__ __align__(1024) unsigned char shared[];
    const uint32_t base = shared_address(shared);
    if (threadIdx.x == 0) {
        for (int i = 0; i < 4; i++) {
            barrier_init(base + V3_FULL + i * 8, 128);
            barrier_init(base + V3_FREE + i * 8, 4);
        }
        barrier_init(base + V3_Q_FULL, 128);
        barrier_init(base + V3_Q_FREE, 8);
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    __syncthreads();
    const int group = threadIdx.x / 128;
    if (group == 2) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 72;");
        produce(f, base);
    } else {
        asm volatile("setmaxnreg.inc.sync.aligned.u32 216;");
        if (group == 0) { consume<0>(f, shared); } else { consume<1>(f, shared); }
    }
}

static void attention_forward_v3(act *out, real *lse, const act *q, const act *kv,
                                 const act *entries, const float *sink, const int *selected,
                                 AttentionShape a) {
    gpuRequire(a.D == ATT_D && a.H == ATT_H);
    int device, processors;
    cudaCheck(cudaGetDevice(&device));
    cudaCheck(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device));
    cudaCheck(cudaFuncSetAttribute(attention_forward_wgmma_kernel,
                                   cudaFuncAttributeMaxDynamicSharedMemorySize, V3_BYTES));
    const ForwardArguments f = { out, lse, q, kv, entries, sink, selected, a };
    const int blocks = a.T < processors ? a.T : processors;
    attention_forward_wgmma_kernel<<<blocks, 384, V3_BYTES, stream>>>(f);
    cudaCheck(cudaGetLastError());
}

// -------------------------------------------------------------------------------------------------
// Versions 4 and 5: the copy engine, and less waiting
//
// What lies together (the queries, whole window tiles, entries of which all are visible) comes
// through the copy engine, in boxes of 32 rows x 64 columns; a tile of up to 32 keys takes half of
// them. Only tiles of chosen entries, and tiles on the border between window and entries, are
// gathered by cp.async. Q comes and goes in halves, its next rows between the halves of the first
// keys. P1 is handed over before the products with P0 are complete, and the products of both tiles
// follow each other without a wait, unless the outputs must be rescaled in between.

// Version 4's shared memory is version 3's, with two barriers, for the halves of Q, where that has
// one.
enum { V4_Q_FULL = V3_Q_FULL, V4_Q_FREE = V4_Q_FULL + 2 * 8, V4_BYTES = V4_Q_FREE + 2 * 8 };

typedef struct {
    ForwardArguments f;
    CUtensorMap q, kv, entries;     // (T*H,D), (T,D), (P,D) in boxes of 32 rows x 64 columns
} TiledArguments;

// A producer warp's 32 arrivals, by one lane; one of them announces so many bytes of the copy
// engine.
__device__ inline void barrier_expect(uint32_t at, int bytes) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0], 31;\n"
                 "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" :: "r"(at), "r"(bytes)
                 : "memory");
}

// 32 rows of 64 columns, by the copy engine; rows past the tensor's end become zeros.
__device__ inline void load_box(uint32_t to, const CUtensorMap *map, uint32_t barrier, int column,
                                int row) {
    asm volatile("cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
                 " [%0], [%1, {%3, %4, %5}], [%2];"
                 :: "r"(to), "l"(map), "r"(barrier), "r"(column), "r"(row), "r"(0) : "memory");
}

// Half a tile of up to 64 consecutive rows of a tensor; each producer warp has one of its blocks
// fetched. Rows 32 .. 63 keep what they hold if they are not needed.
__device__ inline void load_half(uint32_t tile, const CUtensorMap *map, uint32_t barrier, int half,
                                 int row, int rows) {
    if (threadIdx.x % 32 == 0) {
        const int block = half * 4 + threadIdx.x / 32 % 4;
        const uint32_t to = tile + block * BLOCK_BYTES;
        barrier_expect(barrier, rows > 32 ? BLOCK_BYTES : BLOCK_BYTES / 2);
        load_box(to, map, barrier, block * 64, row);
        if (rows > 32) { load_box(to + BLOCK_BYTES / 2, map, barrier, block * 64, row + 32); }
    }
}

__device__ inline void produce_tiled(const TiledArguments &g, uint32_t base) {
    const ForwardArguments &f = g.f;
    const int lane = threadIdx.x % 32, mine = threadIdx.x / 32 % 4 * 16 + lane % 16;
    int use[2] = {0, 0};                                // fills of each buffer so far
    for (int i = 0, t; (t = block_token(f.a, i)) >= 0; i++) {
        const Keys keys = token_keys(f.a, f.selected, t);
        const int next = block_token(f.a, i + 1);
        // The list is a choice only where more entries are visible than it holds.
        const bool listed = f.selected && keys.count - keys.window == f.a.topk;
        const int tiles = (keys.count + TILE - 1) / TILE;
        for (int tile = 0; tile < tiles; tile++) {
            const int b = tile % 2, first = tile * TILE, end = min(first + TILE, keys.count);
            const bool in_window = end <= keys.window;
            const bool together = in_window || (first >= keys.window && !listed);
            const int start = in_window ? t - keys.window + 1 + first
                                        : keys.first_entry + first - keys.window;
            const act *row = together ? NULL : key_row(keys, f.a, f.kv, f.entries, f.selected,
                                                       first + mine);
            #pragma unroll
            for (int half = 0; half < 2; half++) {
                const uint32_t full = base + V3_FULL + (2 * b + half) * 8;
                if (tile == 0) {
                    barrier_wait(base + V4_Q_FREE + half * 8, ~i & 1);
                    load_half(base + V3_Q, &g.q, base + V4_Q_FULL + half * 8, half, t * ATT_H,
                              ATT_H);
                }
                barrier_wait(base + V3_FREE + (2 * b + half) * 8, ~(b ? use[1] : use[0]) & 1);
                if (together) {
                    load_half(base + V3_KV + b * TILE_BYTES, in_window ? &g.kv : &g.entries, full,
                              half, start, end - first);
                } else {
                    copy_half(base + V3_KV + b * TILE_BYTES, row, half);
                    barrier_arrive_after_copies(full);
                }
            }
            if (b) { use[1]++; } else { use[0]++; }
            if (tile == 0 && next >= 0 && threadIdx.x % 128 == 0) {
                asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;"
                             :: "l"(f.q + (size_t)next * ATT_H * ATT_D), "r"(TILE_BYTES)
                             : "memory");
            }
        }
    }
}

// Waits for all but the last N groups of products.
template <int N> __device__ inline void wgmma_wait_but(void) {
    asm volatile("wgmma.wait_group.sync.aligned %0;" :: "n"(N) : "memory");
}

// s = Q K^T of the tile in that buffer. last: of this consumer with this Q, which is then free.
__device__ inline void scores_tiled(float (&s)[32], uint32_t base, int buffer, int use, int token,
                                    bool last) {
    const uint64_t q = matrix_descriptor(base + V3_Q);
    const uint64_t k = matrix_descriptor(base + V3_KV + buffer * TILE_BYTES);
    #pragma unroll
    for (int half = 0; half < 2; half++) {
        barrier_wait(base + V4_Q_FULL + half * 8, token & 1);
        barrier_wait(base + V3_FULL + (2 * buffer + half) * 8, use & 1);
        proxy_fence();
        wgmma_fence();
        #pragma unroll
        for (int i = 16 * half; i < 16 * half + 16; i++) {
            const int step = (i / 4 * BLOCK_BYTES + i % 4 * 32) >> 4;
            wgmma_scores(s, q + step, k + step, i > 0);
        }
        wgmma_commit();
    }
    wgmma_wait_but<1>();
    if (last && threadIdx.x % 32 == 0) { barrier_arrive(base + V4_Q_FREE); }
    wgmma_wait(s);
    if (last && threadIdx.x % 32 == 0) { barrier_arrive(base + V4_Q_FREE + 8); }
}

// As rescale() and follow() of version 3, but products with o may still be on their way: they are
// waited for only if o must change.
__device__ inline void move_reference(float (&o)[128], const float *before, const float *now) {
    if (__any_sync(~0u, before[0] != now[0] || before[1] != now[1])) {
        const float k0 = power2(before[0] - now[0]), k1 = power2(before[1] - now[1]);
        wgmma_wait(o);
        #pragma unroll
        for (int i = 0; i < 128; i++) { o[i] *= i & 2 ? k1 : k0; }
    }
}
__device__ inline void take_reference(float (&o)[128], Softmax &x, const float *reference,
                                      int row) {
    const float now[2] = {reference[row], reference[row + 8]};
    move_reference(o, x.reference, now);
    #pragma unroll
    for (int i = 0; i < 2; i++) {
        x.sum[i] *= power2(x.reference[i] - now[i]);
        x.reference[i] = now[i];
    }
}

// The softmax of the own tile, and all of it that the other consumer needs.
template <int SIDE>
__device__ inline void write_softmax(uint32_t (&p)[16], float (&s)[32], Softmax &x,
                                     unsigned char *shared, int row, int left) {
    float *reference = (float *)(shared + V3_REFERENCE) + 64 * SIDE;
    softmax(p, s, x, shared + V3_P + SIDE * BLOCK_BYTES, row, left);
    if (threadIdx.x % 4 == 0) {
        reference[row] = x.reference[0];
        reference[row + 8] = x.reference[1];
    }
    proxy_fence();
}

// Consumer SIDE needs its half of the other's tile, filled for the use-th time.
template <int SIDE> __device__ inline void await_other(uint32_t base, int use) {
    barrier_wait(base + V3_FULL + (2 * (1 - SIDE) + SIDE) * 8, use & 1);
    proxy_fence();
}

// Consumer SIDE is done with its half of a buffer.
template <int SIDE> __device__ inline void free_half(uint32_t base, int buffer) {
    if (threadIdx.x % 32 == 0) { barrier_arrive(base + V3_FREE + (2 * buffer + SIDE) * 8); }
}

// One pair of tiles, or (both = false) the last one alone. left: keys in the even tile and after
// it. If EAGER, the products with P1 are issued before those with P0 are complete; if not, half a
// buffer is freed a little earlier, and the order is that of version 3.
template <int SIDE, bool EAGER>
__device__ inline void consume_pair(unsigned char *shared, float (&o)[128], Softmax &x,
                                    int (&use)[2], int token, int left, bool both, bool last,
                                    int row) {
    const uint32_t base = shared_address(shared), values = base + V3_KV + SIDE * V3_HALF;
    const float *reference = (const float *)(shared + V3_REFERENCE);
    const uint64_t others = matrix_descriptor(base + V3_P + (1 - SIDE) * BLOCK_BYTES);
    float s[32], before[2] = {x.reference[0], x.reference[1]};
    uint32_t p[16];
    if (SIDE == 0 || both) { scores_tiled(s, base, SIDE, use[SIDE], token, last); }
    if (SIDE == 0) {
        write_softmax<SIDE>(p, s, x, shared, row, left);
        pair_arrive<P0_READY>();
        move_reference(o, before, x.reference);
        outputs(o, (const uint32_t *)p, 4, values);
        if (both) {
            if (!EAGER) {
                wgmma_wait(o);
                free_half<SIDE>(base, 0);
            }
            pair_sync<P1_READY>();
            take_reference(o, x, reference + 64, row);
            await_other<SIDE>(base, use[1]);
            outputs(o, others, 2, values + TILE_BYTES);
        }
    } else {
        pair_sync<P0_READY>();
        take_reference(o, x, reference, row);
        await_other<SIDE>(base, use[0]);
        outputs(o, others, 2, values);
        if (both) {
            before[0] = x.reference[0];
            before[1] = x.reference[1];
            write_softmax<SIDE>(p, s, x, shared, row, left - TILE);
            if (!EAGER) {
                wgmma_wait(o);
                free_half<SIDE>(base, 0);
            }
            pair_arrive<P1_READY>();
            move_reference(o, before, x.reference);
            outputs(o, (const uint32_t *)p, 4, values + TILE_BYTES);
        }
    }
    if (EAGER && both) {
        wgmma_wait_but<1>();
        free_half<SIDE>(base, 0);
    }
    wgmma_wait(o);
    free_half<SIDE>(base, both);
    use[0]++;
    use[1] += both;
}

template <int SIDE, bool EAGER>
__device__ inline void consume_tiled(const ForwardArguments &f, unsigned char *shared) {
    const uint32_t base = shared_address(shared);
    const int lane = threadIdx.x % 32, row = threadIdx.x / 32 % 4 * 16 + lane / 4;
    const float sink[2] = {f.sink[row] * LOG2E, f.sink[row + 8] * LOG2E};
    int use[2] = {0, 0}, window, next = block_token(f.a, 0);
    int count = next >= 0 ? attended_count(f.a, f.selected, next, &window) : 0;
    for (int i = 0, t; (t = block_token(f.a, i)) >= 0; i++) {
        const int keys = count, tiles = (count + TILE - 1) / TILE;
        float o[128];
        Softmax x;
        #pragma unroll
        for (int j = 0; j < 128; j++) { o[j] = 0; }
        #pragma unroll
        for (int j = 0; j < 2; j++) {
            x.reference[j] = sink[j];
            x.sum[j] = SIDE == 0 && lane % 4 == 0 ? 1 : 0;
        }
        next = block_token(f.a, i + 1);                 // its count arrives during this token
        count = next >= 0 ? attended_count(f.a, f.selected, next, &window) : 0;
        if (tiles <= SIDE && lane == 0) {               // one tile: consumer 1 needs no Q
            barrier_arrive(base + V4_Q_FREE);
            barrier_arrive(base + V4_Q_FREE + 8);
        }
        for (int tile = 0; tile < tiles; tile += 2) {
            consume_pair<SIDE, EAGER>(shared, o, x, use, i, keys - tile * TILE, tile + 1 < tiles,
                                      tile + 2 + SIDE >= tiles, row);
        }
        finish<SIDE>(f, shared, o, x, t, i & 1, row);
    }
}

template <bool EAGER>
__global__ __launch_bounds__(384, 1)
void attention_forward_tiled_kernel(const __grid_constant__ TiledArguments g) {
    extern __shared__ __align__(1024) unsigned char shared[];
    const uint32_t base = shared_address(shared);
    // P = 0 multiplies rows that no copy has written yet: they must be numbers.
    for (int i = threadIdx.x; i < 2 * TILE_BYTES / 16; i += blockDim.x) {
        ((uint4 *)(shared + V3_KV))[i] = make_uint4(0, 0, 0, 0);
    }
    proxy_fence();
    if (threadIdx.x == 0) {
        for (int i = 0; i < 4; i++) {
            barrier_init(base + V3_FULL + i * 8, 128);
            barrier_init(base + V3_FREE + i * 8, 4);
        }
        for (int i = 0; i < 2; i++) {
            barrier_init(base + V4_Q_FULL + i * 8, 128);
            barrier_init(base + V4_Q_FREE + i * 8, 8);
        }
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    __syncthreads();
    const int group = threadIdx.x / 128;
    if (group == 2) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 72;");
        produce_tiled(g, base);
    } else {
        asm volatile("setmaxnreg.inc.sync.aligned.u32 216;");
        if (group == 0) {
            consume_tiled<0, EAGER>(g.f, shared);
        } else {
            consume_tiled<1, EAGER>(g.f, shared);
        }
    }
}

// A tensor of bf16, (rows,D), in swizzled boxes of 32 rows x 64 columns for the copy engine.
static CUtensorMap rows_map(const act *base, int rows) {
    static PFN_cuTensorMapEncodeTiled_v12000 encode;
    if (encode == NULL) {
        cudaDriverEntryPointQueryResult found;
        cudaCheck(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", (void **)&encode,
                                                   12000, cudaEnableDefault, &found));
    }
    CUtensorMap map;
    cuuint64_t size[3] = { ATT_D, (cuuint64_t)rows, 1 };
    cuuint64_t bytes[2] = { ATT_D * sizeof(act), (cuuint64_t)rows * ATT_D * sizeof(act) };
    cuuint32_t box[3] = { 64, 32, 1 }, every[3] = { 1, 1, 1 };
    CUresult r = encode(&map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 3, (void *)base, size, bytes, box,
                        every, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                        CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    if (r != CUDA_SUCCESS) {
        fprintf(stderr, "error  tensor map of %d rows at %p: %d (kernels.cu, exit %d)\n", rows,
                (const void *)base, (int)r, EXIT_COMM);
        exit(EXIT_COMM);
    }
    return map;
}

template <bool EAGER>
static void attention_forward_tiled(act *out, real *lse, const act *q, const act *kv,
                                    const act *entries, const float *sink, const int *selected,
                                    AttentionShape a) {
    gpuRequire(a.D == ATT_D && a.H == ATT_H);
    int device, processors;
    cudaCheck(cudaGetDevice(&device));
    cudaCheck(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device));
    cudaCheck(cudaFuncSetAttribute(attention_forward_tiled_kernel<EAGER>,
                                   cudaFuncAttributeMaxDynamicSharedMemorySize, V4_BYTES));
    const bool some = a.P > 0;                          // entries; else any valid map will do
    const TiledArguments g = {
        { out, lse, q, kv, entries, sink, selected, a },
        rows_map(q, a.T * ATT_H), rows_map(kv, a.T),
        rows_map(some ? entries : kv, some ? a.P : a.T),
    };
    const int blocks = a.T < processors ? a.T : processors;
    attention_forward_tiled_kernel<EAGER><<<blocks, 384, V4_BYTES, stream>>>(g);
    cudaCheck(cudaGetLastError());
}

static Forward *const attention_forward_v4 = attention_forward_tiled<true>;
static Forward *const attention_forward_v5 = attention_forward_tiled<false>;

// The one to ship (C text: attention_forward, train.c 5.4): version 4 where all visible entries are
// attended to, version 3 where each token has its own choice of them.
extern "C" void attention_forward_gpu(act *out, real *lse, const act *q, const act *kv,
                                      const act *entries, const float *sink, const int *selected,
                                      AttentionShape a) {
    if (a.T == 0) { return; }
    if (a.D != ATT_D || a.H != ATT_H) {
        attention_forward_v1(out, lse, q, kv, entries, sink, selected, a);
    } else if (selected) {
        attention_forward_v3(out, lse, q, kv, entries, sink, selected, a);
    } else {
        attention_forward_v4(out, lse, q, kv, entries, sink, selected, a);
    }
}

// -------------------------------------------------------------------------------------------------
// Tests and times

static Forward *const version[] = { attention_forward_v1, attention_forward_v2,
                                    attention_forward_v3, attention_forward_v4,
                                    attention_forward_v5, attention_forward_gpu };
enum { VERSIONS = sizeof version / sizeof version[0] };

// Documents of these lengths, their entries, and a choice of topk entries where more are visible
// (chosen: each token takes a random subset, as the indexer would).
typedef struct {
    const char *name;
    std::vector<int> position, end, first_entry, token, selected;
    AttentionShape a;
    const int *selected_device;
    double keys;                // that all tokens together attend to
} Case;

static Case make_case(const char *name, std::vector<int> lengths, int ratio, int topk, int H, int D,
                      int W) {
    Case c;
    c.name = name;
    for (int n : lengths) {
        const int start = (int)c.position.size(), first = (int)c.token.size();
        for (int i = 0; i < n; i++) {
            c.position.push_back(i);
            c.end.push_back(start + n);
            c.first_entry.push_back(first);
        }
        for (int e = 0; ratio && e < n / ratio; e++) { c.token.push_back(start + e * ratio); }
    }
    const int T = (int)c.position.size(), P = (int)c.token.size();
    uint64_t state = 12345;
    c.keys = 0;
    for (int t = 0; t < T; t++) {
        const int visible = ratio ? (c.position[t] + 1) / ratio : 0;
        c.keys += std::min(c.position[t] + 1, W) + (topk ? std::min(visible, topk) : visible);
        if (!topk) { continue; }
        int want = std::min(visible, topk);
        for (int e = 0; e < visible; e++) {             // of the rest, take each with want / rest
            state = hash64(state);
            if ((int)(state % (uint64_t)(visible - e)) < want) {
                c.selected.push_back(c.first_entry[t] + e);
                want--;
            }
        }
        while (c.selected.size() < (size_t)(t + 1) * topk) { c.selected.push_back(-1); }
    }
    c.a = { T, P, H, D, W, ratio, topk, to_device(c.position), to_device(c.end),
            to_device(c.first_entry), to_device(c.token) };
    c.selected_device = topk ? to_device(c.selected) : NULL;
    return c;
}

typedef struct {
    act *q, *kv, *entries;
    float *sink;
} Inputs;

static Inputs make_inputs(const AttentionShape &a, uint64_t seed, float q_std, float sink_mean) {
    std::vector<float> sink(a.H);
    for (int h = 0; h < a.H; h++) { sink[h] = sink_mean + hash_normal(seed + 3, h); }
    return { random_normal((size_t)a.T * a.H * a.D, seed, q_std),
             random_normal((size_t)a.T * a.D, seed + 1, 1),
             random_normal(std::max((size_t)a.P, (size_t)1) * a.D, seed + 2, 1), to_device(sink) };
}
static void free_inputs(Inputs in) {
    for (void *p : { (void *)in.q, (void *)in.kv, (void *)in.entries, (void *)in.sink }) {
        cudaCheck(cudaFree(p));
    }
}

// The definition, in double, for one query.
static void oracle(double *out, double *lse, const Case &c, const std::vector<act> &q,
                   const std::vector<act> &kv, const std::vector<act> &entries, float sink, int t,
                   int h) {
    const int D = c.a.D;
    std::vector<const act *> key;
    for (int j = t - std::min(c.position[t], c.a.W - 1); j <= t; j++) {
        key.push_back(&kv[(size_t)j * D]);
    }
    if (c.a.topk) {
        for (int i = 0; i < c.a.topk && c.selected[(size_t)t * c.a.topk + i] >= 0; i++) {
            key.push_back(&entries[(size_t)c.selected[(size_t)t * c.a.topk + i] * D]);
        }
    } else if (c.a.ratio) {
        for (int i = 0; i < (c.position[t] + 1) / c.a.ratio; i++) {
            key.push_back(&entries[(size_t)(c.first_entry[t] + i) * D]);
        }
    }
    const act *x = &q[((size_t)t * c.a.H + h) * D];
    std::vector<double> l(key.size());
    double max = sink, sum;
    for (size_t k = 0; k < key.size(); k++) {
        double dot = 0;
        for (int d = 0; d < D; d++) { dot += (double)(float)x[d] * (double)(float)key[k][d]; }
        l[k] = dot / sqrt((double)D);
        max = std::max(max, l[k]);
    }
    sum = exp(sink - max);
    for (int d = 0; d < D; d++) { out[d] = 0; }
    for (size_t k = 0; k < key.size(); k++) {
        const double e = exp(l[k] - max);
        sum += e;
        for (int d = 0; d < D; d++) { out[d] += e * (double)(float)key[k][d]; }
    }
    for (int d = 0; d < D; d++) { out[d] /= sum; }
    *lse = max + log(sum);
}

static double largest_difference(const std::vector<float> &x, const std::vector<float> &y) {
    double most = 0;
    for (size_t i = 0; i < x.size(); i++) {
        const double d = fabs((double)x[i] - (double)y[i]);
        if (!(d <= most)) { most = d == d ? d : INFINITY; }
    }
    return most;
}

static int failures, first_version = 1, last_version = VERSIONS;

// Every version against version 1, five runs bit for bit, outputs poisoned; version 1 and the last
// against the definition in double on a sample of queries.
static void check(const Case &c, float q_std, float sink_mean, bool exact) {
    const AttentionShape &a = c.a;
    const size_t n = (size_t)a.T * a.H * a.D, rows = (size_t)a.T * a.H;
    Inputs in = make_inputs(a, 77 + a.T, q_std, sink_mean);
    act *out = device_alloc<act>(n), *expected = device_alloc<act>(n);
    real *lse = device_alloc<real>(rows);
    std::vector<float> expected_lse;
    std::vector<double> exact_out;
    std::vector<int> sample;
    for (int t = 0; exact && t < a.T; t += 1 + a.T / 40) {
        for (int h = t % 7; h < a.H; h += 13) { sample.push_back(t * a.H + h); }
    }
    std::vector<double> exact_lse(sample.size());
    exact_out.resize(sample.size() * a.D);
    if (exact) {
        const std::vector<act> q = to_host(in.q, n), kv = to_host(in.kv, (size_t)a.T * a.D),
            entries = to_host(in.entries, (size_t)a.P * a.D);
        const std::vector<float> sink = to_host(in.sink, a.H);
        std::vector<std::thread> thread;
        for (int k = 0; k < 12; k++) {
            thread.emplace_back([&, k] {
                for (size_t i = k; i < sample.size(); i += 12) {
                    const int t = sample[i] / a.H, h = sample[i] % a.H;
                    oracle(&exact_out[i * a.D], &exact_lse[i], c, q, kv, entries, sink[h], t, h);
                }
            });
        }
        for (std::thread &x : thread) { x.join(); }
    }
    for (int v = 1; v <= VERSIONS; v++) {
        const bool wanted = v >= first_version && v <= last_version;
        if (v > 1 && v < VERSIONS && (a.D != 512 || a.H != 64 || !wanted)) { continue; }
        uint64_t hash = 0;
        bool same = true;
        for (int run = 0; run < (v == 1 ? 1 : 5); run++) {
            cudaCheck(cudaMemset(out, 0xFF, n * sizeof(act)));
            cudaCheck(cudaMemset(lse, 0xFF, rows * sizeof(real)));
            version[v - 1](out, lse, in.q, in.kv, in.entries, in.sink, c.selected_device, a);
            const uint64_t h = device_hash(out, n * sizeof(act)) + 31 * device_hash(lse, rows * 4);
            same = same && (run == 0 || h == hash);
            hash = h;
        }
        cudaCheck(cudaDeviceSynchronize());
        const std::vector<float> got_lse = to_host(lse, rows);
        if (v == 1) {
            cudaCheck(cudaMemcpy(expected, out, n * sizeof(act), cudaMemcpyDeviceToDevice));
            expected_lse = got_lse;
        }
        const double error = device_error(out, expected, n);
        const double lse_error = largest_difference(got_lse, expected_lse);
        double exact_error = 0, exact_lse_error = 0;
        if (exact) {
            const std::vector<act> got = to_host(out, n);
            std::vector<float> x(exact_out.size());
            for (size_t i = 0; i < sample.size(); i++) {
                for (int d = 0; d < a.D; d++) {
                    x[i * a.D + d] = (float)got[(size_t)sample[i] * a.D + d];
                }
                exact_lse_error = fmax(exact_lse_error, fabs(got_lse[sample[i]] - exact_lse[i]));
            }
            exact_error = relative_error(x, exact_out);
        }
        const bool ok = same && error <= 1e-2 && lse_error <= 1e-3 && exact_error <= 1e-2
                     && exact_lse_error <= 1e-3;
        failures += !ok;
        printf("%-28s T %5d P %4d sink %6g v%d  out %.1e lse %.1e", c.name, a.T, a.P, sink_mean, v,
               error, lse_error);
        if (exact) { printf("  to double %.1e %.1e", exact_error, exact_lse_error); }
        printf("%s%s\n", same ? "" : "  NOT THE SAME TWICE", ok ? "" : "  FAILED");
        fflush(stdout);
    }
    free_inputs(in);
    for (void *p : { (void *)out, (void *)expected, (void *)lse }) { cudaCheck(cudaFree(p)); }
}

static void measure(const Case &c, int from) {
    const AttentionShape &a = c.a;
    enum { SETS = 2 };                                  // of 268 MB of queries each, and more
    const size_t n = (size_t)a.T * a.H * a.D, rows = (size_t)a.T * a.H;
    Inputs in[SETS];
    act *out = device_alloc<act>(n);
    real *lse = device_alloc<real>(rows);
    for (int i = 0; i < SETS; i++) { in[i] = make_inputs(a, 1000 + 10 * i, 1.5f, 0); }
    const double flops = 4.0 * a.D * a.H * c.keys, bytes = 4.0 * (double)n;
    for (int v = std::max(from, first_version); v <= last_version; v++) {
        const float ms = time_ms([&](int i) {
            const Inputs &x = in[i % SETS];
            version[v - 1](out, lse, x.q, x.kv, x.entries, x.sink, c.selected_device, a);
        }, v == 1 ? 3 : 15, v == 1 ? 1 : 5);
        printf("%-28s T %5d keys %6.1f v%d  %8.3f ms  %6.1f TFLOP/s (%4.1f %% of %g)  q + out "
               "%5.0f GB/s\n", c.name, a.T, c.keys / a.T, v, ms, flops / ms * 1e-9,
               flops / ms * 1e-9 / CEILING_TFLOPS * 100, CEILING_TFLOPS, bytes / ms * 1e-6);
        fflush(stdout);
    }
    for (Inputs x : in) { free_inputs(x); }
    for (void *p : { (void *)out, (void *)lse }) { cudaCheck(cudaFree(p)); }
}

int main(int argc, char **argv) {
    if (argc > 1) { first_version = atoi(argv[1]); }
    if (argc > 2) { last_version = atoi(argv[2]); }
    const std::vector<int> odd = { 1, 130, 3, 127, 1, 64, 259, 2, 5, 128, 63, 129, 1 };
    check(make_case("tiny, selected", { 100, 156 }, 4, 16, 4, 128, 32), 2, 0, true);
    check(make_case("one token", { 1 }, 4, 512, 64, 512, 128), 2, 0, true);
    check(make_case("one token, window only", { 1 }, 0, 0, 64, 512, 128), 2, 0, true);
    check(make_case("window only, odd", odd, 0, 0, 64, 512, 128), 2, 0, true);
    check(make_case("HCA, odd", odd, 128, 0, 64, 512, 128), 2, 0, true);
    check(make_case("CSA, all visible, odd", odd, 4, 0, 64, 512, 128), 2, 0, true);
    check(make_case("CSA, topk 16, odd", odd, 4, 16, 64, 512, 128), 2, 0, true);
    check(make_case("CSA, topk 512, odd", odd, 4, 512, 64, 512, 128), 4, 0, true);
    check(make_case("window 100, odd", odd, 4, 0, 64, 512, 100), 2, 0, true);
    check(make_case("window 200, topk 70", { 1, 431, 77 }, 4, 70, 64, 512, 200), 2, 0, true);
    for (float sink : { -1e4f, -30.0f, 12.0f, 1e4f }) {
        check(make_case("CSA, sinks", { 70, 411 }, 4, 0, 64, 512, 128), 2, sink, true);
    }
    check(make_case("CSA, steep", { 700, 411 }, 4, 0, 64, 512, 128), 40, 0, false);
    check(make_case("CSA, selected", { 2500, 37, 1559 }, 4, 512, 64, 512, 128), 2, 0, true);
    check(make_case("CSA, all visible", { 4096 }, 4, 0, 64, 512, 128), 2, 0, false);
    check(make_case("HCA", { 4095 }, 128, 0, 64, 512, 128), 2, 0, false);
    printf("%d failures\n", failures);
    if (failures) { return 1; }

    measure(make_case("window only", { 4096 }, 0, 0, 64, 512, 128), 2);
    measure(make_case("HCA", { 4096 }, 128, 0, 64, 512, 128), 2);
    measure(make_case("CSA, topk 512", { 4096 }, 4, 512, 64, 512, 128), 1);
    measure(make_case("CSA, all visible", { 4096 }, 4, 0, 64, 512, 128), 2);
    measure(make_case("CSA, 8 documents", std::vector<int>(8, 512), 4, 512, 64, 512, 128), 2);
    measure(make_case("CSA, topk 512", { 16384 }, 4, 512, 64, 512, 128), 2);
    return 0;
}
