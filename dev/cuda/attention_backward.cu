// attention_backward.cu: a ladder for the backward of DeepSeek-V4's attention core, whose keys are
// also its values (C text: train.c 5.4, attention_backward_query and attention_backward_key).
//
//     p = exp(scale <q, key> - lse)      dp = <dout, key>      dl = scale p (dp - delta)
//     dq = sum_key dl key                dkey = sum_(t,h) dl q + p dout
//
// A token attends to a window of 128 rows of kv and, in compressed layers, to entries: all that are
// visible, or a list of at most topk (`selected`). All 64 heads share the keys, so a token's heads
// are the 64 rows of a matrix product, and everything below is products of 64 x 64 x 512.
//
// Versions (H200, one document of 4,096 tokens, ms of both kernels, TFLOP/s of the attended pairs)
//                                                              CSA          HCA          window
//   1 naive: a warp per (token, head), a block per key         124          43           21
//   2 wgmma: 64-key tiles, two warpgroups in lock step         4.05 (237)   1.44 (184)   1.10 (215)
//   3 pipeline: a third warpgroup copies; S and dP of the
//     same heads come from one product                         2.18 (440)   0.96 (278)   0.71 (333)
//
// Arithmetic. Query kernel (dq), one block per token: S, dP, dS K = 3 products over the token's own
// keys, gathered: 128 + min(visible, 512), rounded up to 64. Key kernel (dkv, dentries), one block
// per 64 keys and stretch of tokens: S, dP, P^T dO, dS^T Q = 4 products over key tiles, 191 tokens
// for each window tile, all visible entries for each token (masked to the selected ones).
//   CSA at 4,096: 4,096 tokens x 64 x 512 x 2 x (3 x 528 + 4 x 735) = 1.21 TFLOP, 1.5 ms at 802
//   TFLOP/s; bytes: q, dout read twice, dq written: 1.3 GB, 0.3 ms at 4,277 GB/s.
//   Shared memory, the second bound: a wgmma of 64 x 64 x 16 reads 4 KB in the 32 clocks that its
//   arithmetic takes, which is all that shared memory gives, and every step also writes 64 (query)
//   or 128 KB (key) of it. Predicted for version 3: 3.1 us per key step of 16.8 MFLOP; measured 3.9
//   (569 TFLOP/s executed, masked pairs counted; query kernel 535).
// 5 products would do if the key kernel wrote dS (0.4 GB here, 17 GB for one document of 32,768
// tokens) for the other to read; with the gathered query kernel that would save 20 %. Not done.
// Deterministic: no atomics on sums; every part of a key's gradient has a slot, added in order.
//
// An earlier version 3, 1.60 / 0.90 ms (key / query kernel, CSA), with one stage left out:
// no copies 1.39 / 0.78; no swap and softmax 1.32 / 0.81; no accumulating product 1.25 / 0.81.
// Tried on it: freeing chunks one by one, N = 64 (1.63 ms), all at once, N = 256 (1.60), two by
// two, N = 128 (1.56, kept). Tried later: prefetching the next token's Q and dO into L2 (query 0.80
// -> 0.83, key no change). ptxas serialises products of different N on one accumulator.
//
// Build: nvcc -O3 -std=c++17 -gencode=arch=compute_90a,code=sm_90a attention_backward.cu
#include "common.h"

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

static struct { unsigned char *base; size_t size, used; } work;
static inline size_t workspace_mark(void) { return work.used; }
static inline void workspace_release(size_t mark) { work.used = mark; }
static void *workspace(size_t bytes) {
    void *p = work.base + work.used;
    work.used += (bytes + 255) / 256 * 256;
    if (work.used > work.size) { fprintf(stderr, "workspace: %zu\n", work.used); exit(2); }
    return p;
}

// -------------------------------------------------------------------------------------------------
// Version 1: one warp per query and head, or one block per key; every dot product a shuffle tree.

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

extern "C" void attention_forward_gpu(act *out, real *lse, const act *q, const act *kv,
                                      const act *entries, const float *sink, const int *selected,
                                      AttentionShape a) {
    if (a.T == 0) { return; }
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

// delta = <dout, out> per query and head.
template <int NV>
__global__ void attention_delta_kernel(real *delta, const act *dout, const act *out, size_t rows) {
    const int lane = threadIdx.x % 32;
    const size_t row = (size_t)blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32;
    if (row >= rows) { return; }
    float a[NV], b[NV], dot = 0;
    load_row<NV>(a, dout + row * NV * 32 + lane * NV);
    load_row<NV>(b, out + row * NV * 32 + lane * NV);
    #pragma unroll
    for (int d = 0; d < NV; d++) { dot += a[d] * b[d]; }
    dot = warp_sum(dot);
    if (lane == 0) { delta[row] = dot; }
}

extern "C" void attention_delta_gpu(real *delta, const act *dout, const act *out, int T, int H,
                                    int D) {
    const size_t rows = (size_t)T * H;
    if (rows == 0) { return; }
    if (D == 512) {
        attention_delta_kernel<16><<<blocks_for(rows, 8), 256, 0, stream>>>(delta, dout, out, rows);
    } else {
        gpuRequire(D == 128);
        attention_delta_kernel<4><<<blocks_for(rows, 8), 256, 0, stream>>>(delta, dout, out, rows);
    }
    cudaCheck(cudaGetLastError());
}

template <int NV>
__global__ void attention_backward_query_kernel(act *dq, const act *dout, const real *delta,
                                                const real *lse, const act *q, const act *kv,
                                                const act *entries, const int *selected,
                                                AttentionShape a) {
    const int lane = threadIdx.x % 32, first = lane * NV;
    const size_t row = (size_t)blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32;
    if (row >= (size_t)a.T * a.H) { return; }
    const int t = (int)(row / a.H);
    const float scale = rsqrtf((float)a.D);
    int window;
    const int n = attended_count(a, selected, t, &window);
    float x[NV], d[NV], sum[NV] = {0}, k[NV];
    load_row<NV>(x, q + row * a.D + first);
    load_row<NV>(d, dout + row * a.D + first);
    for (int i = 0; i < n; i++) {
        load_row<NV>(k, attended_key(a, kv, entries, selected, t, window, i) + first);
        float l = 0, dp = 0;
        #pragma unroll
        for (int j = 0; j < NV; j++) { l += x[j] * k[j]; dp += d[j] * k[j]; }
        const float p = expf(scale * warp_sum(l) - lse[row]);
        const float dl = scale * p * (warp_sum(dp) - delta[row]);
        #pragma unroll
        for (int j = 0; j < NV; j++) { sum[j] += dl * k[j]; }
    }
    store_row<NV>(dq + row * a.D + first, sum);
}

extern "C" void attention_backward_query_1(act *dq, const act *dout, const real *delta,
                                             const real *lse, const act *q, const act *kv,
                                             const act *entries, const int *selected,
                                             AttentionShape a) {
    if (a.T == 0) { return; }
    const int grid = blocks_for((size_t)a.T * a.H, 8);
    if (a.D == 512) {
        attention_backward_query_kernel<16><<<grid, 256, 0, stream>>>(dq, dout, delta, lse, q, kv,
                                                                      entries, selected, a);
    } else {
        gpuRequire(a.D == 128);
        attention_backward_query_kernel<4><<<grid, 256, 0, stream>>>(dq, dout, delta, lse, q, kv,
                                                                     entries, selected, a);
    }
    cudaCheck(cudaGetLastError());
}

// One block of 16 warps per key: warp w takes every 16th (query, head), and the block adds the
// warps' sums in order.
enum { KEY_WARPS = 16 };
template <int NV>
__global__ void attention_backward_key_kernel(real *dkv, real *dentries, const act *dout,
                                              const real *delta, const real *lse, const act *q,
                                              const act *kv, const act *entries,
                                              const int *selected, AttentionShape a) {
    __shared__ float shared[NV * 32];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, first = lane * NV;
    const int e = (int)blockIdx.x - a.T;
    const float scale = rsqrtf((float)a.D);
    float key[NV], x[NV], d[NV], sum[NV] = {0};
    load_row<NV>(key, (e < 0 ? kv + (size_t)blockIdx.x * a.D : entries + (size_t)e * a.D) + first);
    const int from = e < 0 ? (int)blockIdx.x : a.token[e] + a.ratio - 1;
    const int end = e < 0 ? min(a.end[from], from + a.W) : a.end[from];
    for (int t = from; t < end; t++) {
        if (e >= 0 && selected) {
            const int *list = selected + (size_t)t * a.topk;
            int low = 0, high = a.topk;
            while (low < high) {
                const int middle = (low + high) / 2;
                const bool before = list[middle] >= 0 && list[middle] < e;
                if (before) { low = middle + 1; } else { high = middle; }
            }
            if (low >= a.topk || list[low] != e) { continue; }
        }
        for (int h = warp; h < a.H; h += KEY_WARPS) {
            const size_t row = (size_t)t * a.H + h;
            load_row<NV>(x, q + row * a.D + first);
            load_row<NV>(d, dout + row * a.D + first);
            float l = 0, dp = 0;
            #pragma unroll
            for (int j = 0; j < NV; j++) { l += x[j] * key[j]; dp += d[j] * key[j]; }
            const float p = expf(scale * warp_sum(l) - lse[row]);
            const float dl = scale * p * (warp_sum(dp) - delta[row]);
            #pragma unroll
            for (int j = 0; j < NV; j++) { sum[j] += dl * x[j] + p * d[j]; }
        }
    }
    for (int w = 0; w < KEY_WARPS; w++) {
        if (w == warp) {
            #pragma unroll
            for (int j = 0; j < NV; j++) {
                shared[first + j] = (w ? shared[first + j] : 0) + sum[j];
            }
        }
        __syncthreads();
    }
    float *dkey = e < 0 ? dkv + (size_t)blockIdx.x * a.D : dentries + (size_t)e * a.D;
    for (int i = threadIdx.x; i < a.D; i += blockDim.x) { dkey[i] = shared[i]; }
}

extern "C" void attention_backward_key_1(real *dkv, real *dentries, const act *dout,
                                           const real *delta, const real *lse, const act *q,
                                           const act *kv, const act *entries, const int *selected,
                                           AttentionShape a) {
    if (a.T == 0) { return; }
    if (a.D == 512) {
        attention_backward_key_kernel<16><<<a.T + a.P, KEY_WARPS * 32, 0, stream>>>(
            dkv, dentries, dout, delta, lse, q, kv, entries, selected, a);
    } else {
        gpuRequire(a.D == 128);
        attention_backward_key_kernel<4><<<a.T + a.P, KEY_WARPS * 32, 0, stream>>>(
            dkv, dentries, dout, delta, lse, q, kv, entries, selected, a);
    }
    cudaCheck(cudaGetLastError());
}

// -------------------------------------------------------------------------------------------------
// Tensor cores: the pieces that versions 2 and 3 share
//
// A tile is 64 rows of 512 dims in shared memory, as 8 chunks of 64 dims. A chunk is 64 rows of 128
// bytes, 8 KB, whose 16-byte pieces are permuted within each row (piece ^ row % 8, the hardware's
// 128-byte swizzle), so that both ways to read it are free of bank conflicts: rows as M or N and
// dims as the product's inner index (K-major), or dims as N and rows as the inner index (MN-major).
// One layout therefore serves S = Q K^T, dP = dO K^T and dQ = dS K, dK = dS^T Q, dV = P^T dO.

enum {
    AB_HEADS = 64, AB_DIM = 512,        // what these kernels are written for
    AB_KEYS = 64,                       // keys of a tile
    AB_CHUNKS = 8, AB_CHUNK = 8192,     // of a tile, in bytes
    AB_TILE = AB_CHUNKS * AB_CHUNK,
    AB_EXCHANGE = 32768,                // two buffers in turn: warpgroups swap halves
};

__device__ inline uint32_t shared_address(const void *p) {
    return (uint32_t)__cvta_generic_to_shared(p);
}

// Descriptors of an operand in shared memory: address, strides in units of 16 bytes, swizzle 128.
// K-major: 1,024 bytes from one group of 8 rows to the next. MN-major: 1,024 bytes from one group
// of 8 inner rows to the next, `stride` from one run of 64 dims to the next.
__device__ inline uint64_t operand(uint32_t address, int stride = AB_CHUNK) {
    return (uint64_t)((address & 0x3FFFF) >> 4) | (uint64_t)(stride >> 4) << 16
         | (uint64_t)(1024 >> 4) << 32 | (uint64_t)1 << 62;
}

__device__ inline void wgmma_fence(void) { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ inline void wgmma_commit(void) {
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
template <int PENDING> __device__ inline void wgmma_wait(void) {
    asm volatile("wgmma.wait_group.sync.aligned %0;" :: "n"(PENDING) : "memory");
}
// Keeps the compiler from moving uses of x across this point.
template <int N> __device__ inline void pin(float (&x)[N]) {
    #pragma unroll
    for (int i = 0; i < N; i++) { asm volatile("" : "+f"(x[i]) :: "memory"); }
}
template <int N> __device__ inline void pin(uint32_t (&x)[N]) {
    #pragma unroll
    for (int i = 0; i < N; i++) { asm volatile("" : "+r"(x[i]) :: "memory"); }
}

__device__ inline void pin(float (&x)[4][32]) {
    pin(x[0]); pin(x[1]); pin(x[2]); pin(x[3]);
}

#define AB_D8(d, i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), \
                    "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), "+f"(d[i + 7])
#define AB_D32(d, i) AB_D8(d, i), AB_D8(d, i + 8), AB_D8(d, i + 16), AB_D8(d, i + 24)
#define AB_R32 "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21," \
               "%22,%23,%24,%25,%26,%27,%28,%29,%30,%31}"

// d (64,64) = or += a b^T over 16 dims: both operands K-major in shared memory.
__device__ inline void wgmma_rows(float (&d)[32], uint64_t a, uint64_t b, int add) {
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %34, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 " AB_R32
        ", %32, %33, p, 1, 1, 0, 0;\n}"
        : AB_D32(d, 0) : "l"(a), "l"(b), "r"(add));
}

// 16 bytes from global to shared memory without passing through registers; zeros if !valid.
__device__ inline void copy16(uint32_t to, const void *from, bool valid) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
                 :: "r"(to), "l"(from), "r"(valid ? 16 : 0) : "memory");
}

__device__ inline uint32_t pack2(float low, float high) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    return *(const uint32_t *)&pair;
}

// The named barrier of the two consumer warpgroups.
__device__ inline void pair_barrier(void) { asm volatile("bar.sync 1, 256;" ::: "memory"); }

// The layout of an accumulator: thread 32 w + 4 g + i has, of each block j of 8 columns, row
// 16 w + g in x[4 j], x[4 j + 1] and row 16 w + g + 8 in x[4 j + 2], x[4 j + 3], columns 8 j + 2 i
// and the next.
// An accumulator's half, rounded to bf16, is the left operand of the next product as it stands: two
// blocks of 8 columns are 16 of its inner index.
__device__ inline void pack_half(uint32_t (&out)[8], const float (&x)[16]) {
    #pragma unroll
    for (int i = 0; i < 8; i++) { out[i] = pack2(x[2 * i], x[2 * i + 1]); }
}

// Hands registers to the same thread of the other warpgroup: send, a barrier, then receive.
template <int N> __device__ inline void send(const uint32_t (&x)[N], float4 *exchange, int at) {
    #pragma unroll
    for (int i = 0; i < N / 4; i++) {
        ((uint4 *)exchange)[at + i * 128] = make_uint4(x[4 * i], x[4 * i + 1], x[4 * i + 2],
                                                       x[4 * i + 3]);
    }
}
template <int N> __device__ inline void receive(uint32_t (&x)[N], const float4 *exchange, int at) {
    #pragma unroll
    for (int i = 0; i < N / 4; i++) {
        const uint4 y = ((const uint4 *)exchange)[at + i * 128];
        x[4 * i] = y.x; x[4 * i + 1] = y.y; x[4 * i + 2] = y.z; x[4 * i + 3] = y.w;
    }
}

// The work of the key kernel, cut so that every part fills the machine evenly. A tile of 64 entries
// is cut into segments of the token axis, a tile of 64 window keys into pieces of its own tokens.
// Each part has a slot of 64 x 512 fp32 sums; a last kernel adds the slots of a tile in order.
typedef struct {
    int entry_tiles, segments, segment;     // tiles, parts of each, tokens of a part
    int window_tiles, pieces, piece;
} KeyPlan;

static KeyPlan key_plan(const AttentionShape &a) {
    KeyPlan p;
    p.window_tiles = blocks_for(a.T, AB_KEYS);
    p.pieces = 768 / p.window_tiles;
    p.pieces = p.pieces > 6 ? 6 : p.pieces < 1 ? 1 : p.pieces;
    p.piece = blocks_for(AB_KEYS + a.W - 1, p.pieces);
    p.entry_tiles = a.ratio ? blocks_for(a.P, AB_KEYS) : 0;
    p.segment = blocks_for((size_t)a.T * p.entry_tiles, 2048);
    p.segment = p.segment < 64 ? 64 : p.segment;
    p.segments = p.entry_tiles ? blocks_for(a.T, p.segment) : 0;
    return p;
}

typedef struct {
    int entry;                  // 1: entries, 0: window keys
    int tile, first, end;       // keys first .. end-1
    int from, to;               // tokens from .. to-1 that may see them
} KeyItem;

// A whole tile.
__device__ inline KeyItem key_tile(const AttentionShape &a, int entry, int tile) {
    KeyItem k;
    k.entry = entry;
    k.tile = tile;
    k.first = tile * AB_KEYS;
    k.end = min(k.first + AB_KEYS, entry ? a.P : a.T);
    k.from = entry ? a.token[k.first] + a.ratio - 1 : k.first;
    k.to = entry ? a.end[a.token[k.end - 1]] : min(a.T, k.end - 1 + a.W);
    return k;
}

// The part of a tile that has this slot: entries first, one segment of all tiles after the other,
// then the window's tiles, piece by piece. It may be empty (from >= to).
__device__ inline KeyItem key_item(const KeyPlan &p, const AttentionShape &a, int slot) {
    const int window = slot - p.entry_tiles * p.segments;
    KeyItem k;
    if (window < 0) {
        const int segment = slot / p.entry_tiles;
        k = key_tile(a, 1, slot % p.entry_tiles);
        k.from = max(k.from, segment * p.segment);
        k.to = min(k.to, (segment + 1) * p.segment);
    } else {
        k = key_tile(a, 0, window / p.pieces);
        k.from += window % p.pieces * p.piece;
        k.to = min(k.to, k.from + p.piece);
    }
    return k;
}

// Bit r: token t attends to key first + r. masks: those of selected, (T,entry_tiles), or NULL.
__device__ inline uint64_t key_mask(const KeyItem &k, const KeyPlan &p, const AttentionShape &a,
                                    const uint64_t *masks, int t) {
    int low, high;
    if (k.entry) {
        low = a.first_entry[t];
        high = low + (a.position[t] + 1) / a.ratio;
    } else {
        low = t - min(a.position[t], a.W - 1);
        high = t + 1;
    }
    low = max(low, k.first) - k.first;
    high = min(high, k.end) - k.first;
    if (low >= high) { return 0; }
    uint64_t mask = ~0ull >> (64 - (high - low)) << low;
    if (k.entry && masks) { mask &= masks[(size_t)t * p.entry_tiles + k.tile]; }
    return mask;
}

// The next token from t on that sees a key of the tile, and its mask; k.to if there is none.
__device__ inline int next_token(uint64_t *mask, const KeyItem &k, const KeyPlan &p,
                                 const AttentionShape &a, const uint64_t *masks, int t) {
    for (; t < k.to; t++) {
        *mask = key_mask(k, p, a, masks, t);
        if (*mask) { return t; }
    }
    return k.to;
}

// masks (T,tiles) of selected (T,topk): bit e % 64 of word e / 64. One block per token.
__global__ void attention_masks_kernel(uint64_t *masks, const int *selected, int tiles, int topk) {
    extern __shared__ unsigned int words[];
    for (int i = threadIdx.x; i < 2 * tiles; i += blockDim.x) { words[i] = 0; }
    __syncthreads();
    const int *list = selected + (size_t)blockIdx.x * topk;
    for (int i = threadIdx.x; i < topk; i += blockDim.x) {
        if (list[i] >= 0) { atomicOr(words + list[i] / 32, 1u << list[i] % 32); }
    }
    __syncthreads();
    unsigned int *out = (unsigned int *)(masks + (size_t)blockIdx.x * tiles);
    for (int i = threadIdx.x; i < 2 * tiles; i += blockDim.x) { out[i] = words[i]; }
}

// dkv (T,D) and dentries (P,D) = the sums of their tiles' parts, in order. One block per row.
__global__ void attention_key_sum_kernel(real *dkv, real *dentries, const float *part, KeyPlan p,
                                         AttentionShape a) {
    const int e = (int)blockIdx.x - a.T, key = e < 0 ? (int)blockIdx.x : e;
    const KeyItem k = key_tile(a, e >= 0, key / AB_KEYS);
    const int first = e < 0 ? 0 : k.from / p.segment;
    const int end = e < 0 ? (k.to - k.from + p.piece - 1) / p.piece : (k.to - 1) / p.segment + 1;
    const int slot = e < 0 ? p.entry_tiles * p.segments + k.tile * p.pieces : k.tile;
    const int stride = e < 0 ? 1 : p.entry_tiles;
    float4 sum = make_float4(0, 0, 0, 0);
    #pragma unroll 4
    for (int i = first; i < end; i++) {
        const size_t row = (size_t)(slot + i * stride) * AB_KEYS + key % AB_KEYS;
        const float4 x = ((const float4 *)(part + row * AB_DIM))[threadIdx.x];
        sum.x += x.x; sum.y += x.y; sum.z += x.z; sum.w += x.w;
    }
    real *out = e < 0 ? dkv + (size_t)key * AB_DIM : dentries + (size_t)key * AB_DIM;
    ((float4 *)out)[threadIdx.x] = sum;
}

// p = exp(scale s - lse) and dl = scale p (dp - delta) of one element, 0 and 0 if it is masked. The
// caller has turned lse into -log2(e) lse, delta into -scale delta.
__device__ inline void softmax_backward(float *p, float *dl, float s, float dp, float lse,
                                        float delta, bool valid) {
    const float scale = 0.04419417382f;         // 1 / sqrt(AB_DIM)
    const float x = valid ? fmaf(s, scale * (float)M_LOG2E, lse) : -INFINITY;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(*p) : "f"(x));
    *dl = *p * fmaf(dp, scale, delta);
}

// -------------------------------------------------------------------------------------------------
// Version 2: tensor cores, one step after the other: copy, S and dP (one warpgroup each), swap
// halves, softmax, swap, accumulate (one half of the 512 dims each)

// d (64,256) += a b over 16 rows of b: a in registers, b MN-major, four chunks wide.
__device__ inline void wgmma_half(float (&d)[4][32], const uint32_t *a, uint64_t b) {
    asm volatile(
        "wgmma.mma_async.sync.aligned.m64n256k16.f32.bf16.bf16 "
        "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,"
        "%23,%24,%25,%26,%27,%28,%29,%30,%31,%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,"
        "%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63,%64,"
        "%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,%79,%80,%81,%82,%83,%84,%85,"
        "%86,%87,%88,%89,%90,%91,%92,%93,%94,%95,%96,%97,%98,%99,%100,%101,%102,%103,%104,%105,"
        "%106,%107,%108,%109,%110,%111,%112,%113,%114,%115,%116,%117,%118,%119,%120,%121,%122,"
        "%123,%124,%125,%126,%127}, "
        "{%128,%129,%130,%131}, %132, 1, 1, 1, 1;"
        : AB_D32(d[0], 0), AB_D32(d[1], 0), AB_D32(d[2], 0), AB_D32(d[3], 0)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}

// Where piece (0..63) of 16 bytes of a row lies in a tile.
__device__ inline uint32_t tile_offset(int row, int piece) {
    return piece / 8 * AB_CHUNK + row * 128 + ((piece ^ row) % 8) * 16;
}

// x (64,64) = a b^T over all 512 dims, both tiles in shared memory; commits one group.
__device__ inline void tile_product(float (&x)[32], uint32_t a, uint32_t b) {
    pin(x);
    wgmma_fence();
    #pragma unroll
    for (int c = 0; c < AB_CHUNKS; c++) {
        #pragma unroll
        for (int k = 0; k < 4; k++) {
            wgmma_rows(x, operand(a + c * AB_CHUNK + k * 32), operand(b + c * AB_CHUNK + k * 32),
                       c + k > 0);
        }
    }
    wgmma_commit();
}

// Warpgroup 0 has S (64,64) and warpgroup 1 has dP; afterwards both have both for their own 32
// columns, 4 blocks: s and dp. What is sent stays in fp32.
// A thread writes where it read last, so the region needs no second barrier.
__device__ inline void swap_halves(float (&s)[16], float (&dp)[16], const float (&x)[32],
                                   float4 *exchange, int group, int thread) {
    float4 *mine = exchange + group * 512 + thread;
    float4 *theirs = exchange + (1 - group) * 512 + thread;
    #pragma unroll
    for (int j = 0; j < 4; j++) {
        const int a = 4 * j, b = 4 * j + 16;    // registers need indices known to the compiler
        mine[j * 128] = group ? make_float4(x[a], x[a + 1], x[a + 2], x[a + 3])
                              : make_float4(x[b], x[b + 1], x[b + 2], x[b + 3]);
    }
    pair_barrier();
    #pragma unroll
    for (int j = 0; j < 4; j++) {
        const float4 y = theirs[j * 128];
        const float in[4] = {y.x, y.y, y.z, y.w};
        #pragma unroll
        for (int i = 0; i < 4; i++) {
            s[4 * j + i] = group ? in[i] : x[4 * j + i];
            dp[4 * j + i] = group ? x[4 * j + i + 16] : in[i];
        }
    }
}

// Copies a tile of 64 rows of 1,024 bytes into shared memory; rows from `rows` on become zeros.
__device__ inline void load_tile(uint32_t tile, const act *from, int rows) {
    for (int i = threadIdx.x; i < 64 * 64; i += 256) {
        const int row = i / 64, piece = i % 64;
        copy16(tile + tile_offset(row, piece), from + (size_t)(row < rows ? row : 0) * AB_DIM
               + piece * 8, row < rows);
    }
}
// Waits for this block's copies and shows them to the tensor cores, which read by another path.
__device__ inline void tiles_ready(void) {
    asm volatile("cp.async.wait_all;" ::: "memory");
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    __syncthreads();
}

enum { AB_SHARED_2 = 3 * AB_TILE + AB_EXCHANGE + 1024 };

__global__ void __launch_bounds__(256, 1)
attention_backward_query_2_kernel(act *dq, const act *dout, const real *delta, const real *lse,
                                  const act *q, const act *kv, const act *entries,
                                  const int *selected, AttentionShape a) {
    extern __shared__ unsigned char raw[];
    unsigned char *base = (unsigned char *)(((uintptr_t)raw + 1023) / 1024 * 1024);
    const uint32_t Q = shared_address(base), dO = Q + AB_TILE, K = dO + AB_TILE;
    float4 *exchange = (float4 *)(base + 3 * AB_TILE);
    const int t = a.T - 1 - (int)blockIdx.x;        // the longest first
    const int group = threadIdx.x / 128, thread = threadIdx.x % 128;
    const int warp = thread / 32, lane = thread % 32, row = 16 * warp + lane / 4;
    const float scale = rsqrtf((float)AB_DIM);
    const size_t head0 = (size_t)t * AB_HEADS;
    int window;
    const int n = attended_count(a, selected, t, &window);

    load_tile(Q, q + head0 * AB_DIM, 64);
    load_tile(dO, dout + head0 * AB_DIM, 64);
    const float log2e = -(float)M_LOG2E;
    const float lse0 = lse[head0 + row] * log2e, delta0 = -scale * delta[head0 + row];
    const float lse1 = lse[head0 + row + 8] * log2e, delta1 = -scale * delta[head0 + row + 8];
    float sum[4][32] = {{0}};
    for (int first = 0; first < n; first += AB_KEYS) {
        for (int i = threadIdx.x; i < 64 * 64; i += 256) {
            const int r = i / 64, piece = i % 64;
            const bool valid = first + r < n;
            const act *key = attended_key(a, kv, entries, selected, t, window,
                                          valid ? first + r : 0);
            copy16(K + tile_offset(r, piece), key + piece * 8, valid);
        }
        tiles_ready();
        float x[32], s[16], dp[16];
        uint32_t dl[2][8];
        tile_product(x, group ? dO : Q, K);         // (heads,keys)
        wgmma_wait<0>();
        pin(x);
        swap_halves(s, dp, x, exchange, group, thread);
        #pragma unroll
        for (int j = 0; j < 16; j++) {
            const int key = first + 32 * group + 8 * (j / 4) + 2 * (lane % 4) + j % 2;
            float p;
            softmax_backward(&p, &s[j], s[j], dp[j], j & 2 ? lse1 : lse0, j & 2 ? delta1 : delta0,
                             key < n);
        }
        pack_half(dl[0], s);
        send(dl[0], exchange, (1 - group) * 512 + thread);
        pair_barrier();
        receive(dl[1], exchange, group * 512 + thread);
        pin(sum); pin(dl[0]); pin(dl[1]);
        wgmma_fence();
        #pragma unroll
        for (int k = 0; k < 4; k++) {               // 16 keys each; the own half first
            const int half = k / 2, keys = (group ^ half) * 2 + k % 2;
            wgmma_half(sum, dl[half] + 4 * (k % 2),
                       operand(K + group * 4 * AB_CHUNK + keys * 2048));
        }
        wgmma_commit();
        wgmma_wait<0>();
        pin(sum);
        __syncthreads();
    }
    #pragma unroll
    for (int j = 0; j < 32; j++) {
        const int column = group * 256 + 8 * j + 2 * (lane % 4);
        act *out = dq + (head0 + row) * AB_DIM + column;
        const float *y = sum[j / 8] + j % 8 * 4;
        *(uint32_t *)out = pack2(y[0], y[1]);
        *(uint32_t *)(out + 8 * AB_DIM) = pack2(y[2], y[3]);
    }
}

__global__ void __launch_bounds__(256, 1)
attention_backward_key_2_kernel(float *part, const act *dout, const real *delta, const real *lse,
                                const act *q, const act *kv, const act *entries,
                                const uint64_t *masks, KeyPlan plan, AttentionShape a) {
    extern __shared__ unsigned char raw[];
    unsigned char *base = (unsigned char *)(((uintptr_t)raw + 1023) / 1024 * 1024);
    const uint32_t Q = shared_address(base), dO = Q + AB_TILE, K = dO + AB_TILE;
    float4 *exchange = (float4 *)(base + 3 * AB_TILE);
    const KeyItem item = key_item(plan, a, blockIdx.x);
    if (item.from >= item.to) { return; }
    const int group = threadIdx.x / 128, thread = threadIdx.x % 128;
    const int warp = thread / 32, lane = thread % 32, row = 16 * warp + lane / 4;
    const float scale = rsqrtf((float)AB_DIM);

    load_tile(K, (item.entry ? entries : kv) + (size_t)item.first * AB_DIM, item.end - item.first);
    float sum[4][32] = {{0}};
    uint64_t mask = 0;
    for (int t = next_token(&mask, item, plan, a, masks, item.from); t < item.to;
         t = next_token(&mask, item, plan, a, masks, t + 1)) {
        const size_t head0 = (size_t)t * AB_HEADS;
        load_tile(Q, q + head0 * AB_DIM, 64);
        load_tile(dO, dout + head0 * AB_DIM, 64);
        tiles_ready();
        float x[32], s[16], dp[16];
        uint32_t p[2][8], dl[2][8];
        tile_product(x, K, group ? dO : Q);         // (keys,heads)
        wgmma_wait<0>();
        pin(x);
        swap_halves(s, dp, x, exchange, group, thread);
        const bool valid0 = mask >> row & 1, valid1 = mask >> (row + 8) & 1;
        #pragma unroll
        for (int j = 0; j < 16; j++) {
            const size_t head = head0 + 32 * group + 8 * (j / 4) + 2 * (lane % 4) + j % 2;
            softmax_backward(&s[j], &dp[j], s[j], dp[j], -(float)M_LOG2E * lse[head],
                             -scale * delta[head], j & 2 ? valid1 : valid0);
        }
        pack_half(p[0], s);
        pack_half(dl[0], dp);
        send(p[0], exchange, (1 - group) * 512 + thread);
        send(dl[0], exchange, (1 - group) * 512 + 256 + thread);
        pair_barrier();
        receive(p[1], exchange, group * 512 + thread);
        receive(dl[1], exchange, group * 512 + 256 + thread);
        pin(sum); pin(p[0]); pin(p[1]); pin(dl[0]); pin(dl[1]);
        wgmma_fence();
        #pragma unroll
        for (int k = 0; k < 4; k++) {               // 16 heads each; the own half first
            const int half = k / 2, heads = (group ^ half) * 2 + k % 2;
            const uint32_t at = group * 4 * AB_CHUNK + heads * 2048;
            wgmma_half(sum, p[half] + 4 * (k % 2), operand(dO + at));
            wgmma_half(sum, dl[half] + 4 * (k % 2), operand(Q + at));
        }
        wgmma_commit();
        wgmma_wait<0>();
        pin(sum);
        __syncthreads();
    }
    tiles_ready();                                  // even if no token came, no copy may be left
    float *out = part + ((size_t)blockIdx.x * AB_KEYS + row) * AB_DIM + group * 256
               + 2 * (lane % 4);
    #pragma unroll
    for (int j = 0; j < 32; j++) {
        const float *y = sum[j / 8] + j % 8 * 4;
        *(float2 *)(out + 8 * j) = make_float2(y[0], y[1]);
        *(float2 *)(out + 8 * AB_DIM + 8 * j) = make_float2(y[2], y[3]);
    }
}

extern "C" void attention_backward_query_2(act *dq, const act *dout, const real *delta,
                                           const real *lse, const act *q, const act *kv,
                                           const act *entries, const int *selected,
                                           AttentionShape a) {
    if (a.T == 0) { return; }
    if (a.D != AB_DIM || a.H != AB_HEADS) {
        attention_backward_query_1(dq, dout, delta, lse, q, kv, entries, selected, a);
        return;
    }
    cudaCheck(cudaFuncSetAttribute(attention_backward_query_2_kernel,
                                   cudaFuncAttributeMaxDynamicSharedMemorySize, AB_SHARED_2));
    attention_backward_query_2_kernel<<<a.T, 256, AB_SHARED_2, stream>>>(
        dq, dout, delta, lse, q, kv, entries, selected, a);
    cudaCheck(cudaGetLastError());
}

extern "C" void attention_backward_key_2(real *dkv, real *dentries, const act *dout,
                                         const real *delta, const real *lse, const act *q,
                                         const act *kv, const act *entries, const int *selected,
                                         AttentionShape a) {
    if (a.T == 0) { return; }
    if (a.D != AB_DIM || a.H != AB_HEADS) {
        attention_backward_key_1(dkv, dentries, dout, delta, lse, q, kv, entries, selected, a);
        return;
    }
    const KeyPlan plan = key_plan(a);
    const size_t mark = workspace_mark();
    const int slots = plan.entry_tiles * plan.segments + plan.window_tiles * plan.pieces;
    float *part = (float *)workspace(sizeof(float) * (size_t)slots * AB_KEYS * AB_DIM);
    uint64_t *masks = NULL;
    if (selected && plan.entry_tiles) {
        masks = (uint64_t *)workspace(sizeof(uint64_t) * (size_t)a.T * plan.entry_tiles);
        attention_masks_kernel<<<a.T, 128, sizeof(uint64_t) * plan.entry_tiles, stream>>>(
            masks, selected, plan.entry_tiles, a.topk);
        cudaCheck(cudaGetLastError());
    }
    cudaCheck(cudaFuncSetAttribute(attention_backward_key_2_kernel,
                                   cudaFuncAttributeMaxDynamicSharedMemorySize, AB_SHARED_2));
    attention_backward_key_2_kernel<<<slots, 256, AB_SHARED_2, stream>>>(
        part, dout, delta, lse, q, kv, entries, masks, plan, a);
    cudaCheck(cudaGetLastError());
    attention_key_sum_kernel<<<a.T + (plan.entry_tiles ? a.P : 0), AB_DIM / 4, 0, stream>>>(
        dkv, dentries, part, plan, a);
    cudaCheck(cudaGetLastError());
    workspace_release(mark);
}

// -------------------------------------------------------------------------------------------------
// Version 3: a third warpgroup copies, chunk by chunk, what the other two will read next, and each
// warpgroup has scores and their gradients of the same heads
//
// A slot of shared memory holds one chunk (64 dims) of Q and dO. Two barriers go with it: `full`
// says that the copies have arrived, `empty` that the last product on it is done. Accumulating
// products finish one half of their chunks first, so that these are filled for the next step while
// the tensor cores still work on the others.
//   key kernel: 128 KB of Q and dO per (token, tile of 64 keys), 4 products = 16.8 MFLOP
//   query kernel: 64 KB of keys per (token, 64 keys), 3 products = 12.6 MFLOP; a block stays for
//   many tokens, so that the next token's Q and dO come while the last product runs.
// Q and dO are interleaved in a slot such that ONE product of 64 rows gives 32 heads of S and the
// same 32 heads of dP. Version 2 swapped halves in fp32 for that: 0.3 of 1.6 ms.

#include <cuda.h>           // CUtensorMap; the one driver function is found through the runtime

enum {
    AB_SLOT = 2 * AB_CHUNK,
    AB_THREADS = 384,                                       // two warpgroups compute, one copies
    AB_BARRIERS = 3 * AB_TILE + AB_EXCHANGE,                // where they lie
    AB_SHARED_3 = AB_BARRIERS + 512 + 1024,                 // the tiles want multiples of 1,024
};

__device__ inline void barrier_init(uint32_t barrier, int arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" :: "r"(barrier), "r"(arrivals));
}
__device__ inline void barrier_arrive(uint32_t barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" :: "r"(barrier) : "memory");
}
// One arrival, and the phase also waits for that many bytes of bulk copies.
__device__ inline void barrier_expect(uint32_t barrier, int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;"
                 :: "r"(barrier), "r"(bytes) : "memory");
}
// An arrival when this thread's copy16s so far have landed.
__device__ inline void barrier_arrive_copies(uint32_t barrier) {
    asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" :: "r"(barrier) : "memory");
}
// Waits until the phase of that parity has completed; that of parity 1 before the first counts.
__device__ inline void barrier_wait(uint32_t barrier, int parity) {
    int done;
    do {
        asm volatile("{\n.reg .pred p;\n"
                     "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
                     "selp.b32 %0, 1, 0, p;\n}"
                     : "=r"(done) : "r"(barrier), "r"(parity) : "memory");
    } while (!done);
}
__device__ inline void proxy_fence(void) {
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// One chunk, 64 rows from `row` and 64 dims from `dim`, swizzled, by the bulk copy engine. Rows
// outside the tensor become zeros.
__device__ inline void copy_chunk(uint32_t to, const CUtensorMap *map, int dim, int row,
                                  uint32_t barrier) {
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
                 "[%0], [%1, {%2, %3}], [%4];"
                 :: "r"(to), "l"(map), "r"(dim), "r"(row), "r"(barrier) : "memory");
}

// d (64,128 of 256, h: which half) += a b over 16 rows of b: a in registers, b MN-major, two chunks
// wide.
__device__ inline void wgmma_quarter(float (&d)[4][32], int h, const uint32_t *a, uint64_t b) {
    float (&d0)[32] = d[2 * h], (&d1)[32] = d[2 * h + 1];
    asm volatile("wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 "
        "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,"
        "%23,%24,%25,%26,%27,%28,%29,%30,%31,%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,"
        "%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63}, "
        "{%64,%65,%66,%67}, %68, 1, 1, 1, 1;"
        : AB_D32(d0, 0), AB_D32(d1, 0)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}
// Both halves of d += P^T dO + dS^T Q over 32 heads, two chunks of a key kernel's slots.
__device__ inline void add_heads(float (&d)[4][32], int h, const uint32_t (&p)[8],
                                 const uint32_t (&dl)[8], uint32_t at) {
    #pragma unroll
    for (int k = 0; k < 2; k++) {
        wgmma_quarter(d, h, p + 4 * k, operand(at + 4096 + k * 2048, AB_SLOT));
        wgmma_quarter(d, h, dl + 4 * k, operand(at + k * 2048, AB_SLOT));
    }
}

// Waits for the two groups of products on own chunks, and says for each that its chunks are free.
__device__ inline void free_chunks(uint32_t empty, int lane) {
    wgmma_wait<1>();
    if (lane == 0) { barrier_arrive(empty); barrier_arrive(empty + 8); }
    wgmma_wait<0>();
    if (lane == 0) { barrier_arrive(empty + 16); barrier_arrive(empty + 24); }
}

// The order in which chunks are freed, filled and first used: both warpgroups' first, and so on.
__device__ inline int chunk_at(int i) { return i % 2 * 4 + i / 2; }

// The key kernel's slot, 16 KB: Q of heads 0..31, dO of heads 0..31, Q of 32..63, dO of 32..63. As
// rows of the right operand, 64 of them are S^T and dP^T of a warpgroup's 32 heads.
__global__ void __launch_bounds__(AB_THREADS, 1)
attention_backward_key_3_kernel(float *part, const __grid_constant__ CUtensorMap q_map,
                                const __grid_constant__ CUtensorMap dout_map,
                                const __grid_constant__ CUtensorMap key_map,
                                const __grid_constant__ CUtensorMap entry_map,
                                const real *delta, const real *lse, const uint64_t *masks,
                                KeyPlan plan, AttentionShape a) {
    extern __shared__ unsigned char raw[];
    unsigned char *base = (unsigned char *)(((uintptr_t)raw + 1023) / 1024 * 1024);
    const uint32_t K = shared_address(base), slots = K + AB_TILE;
    const uint32_t full = K + AB_BARRIERS, empty = full + 8 * AB_CHUNKS;
    const uint32_t key_full = empty + 8 * AB_CHUNKS;
    float4 *exchange = (float4 *)(base + 3 * AB_TILE);
    const KeyItem item = key_item(plan, a, blockIdx.x);
    if (item.from >= item.to) { return; }
    if (threadIdx.x == 0) {
        for (int c = 0; c < AB_CHUNKS; c++) {
            barrier_init(full + 8 * c, 1);
            barrier_init(empty + 8 * c, 4);
        }
        barrier_init(key_full, 1);
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    __syncthreads();
    const int group = threadIdx.x / 128, thread = threadIdx.x % 128;
    uint64_t mask = 0;

    if (group == 2) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
        if (thread != 0) { return; }
        barrier_expect(key_full, AB_TILE);
        for (int c = 0; c < AB_CHUNKS; c++) {
            copy_chunk(K + c * AB_CHUNK, item.entry ? &entry_map : &key_map, c * 64, item.first,
                       key_full);
        }
        int phase = 0;
        for (int t = next_token(&mask, item, plan, a, masks, item.from); t < item.to;
             t = next_token(&mask, item, plan, a, masks, t + 1), phase ^= 1) {
            for (int i = 0; i < AB_CHUNKS; i++) {
                const int c = chunk_at(i);
                const uint32_t slot = slots + c * AB_SLOT, arrived = full + 8 * c;
                barrier_wait(empty + 8 * c, phase ^ 1);
                barrier_expect(arrived, AB_SLOT);
                for (int half = 0; half < 2; half++) {
                    const int head = t * AB_HEADS + 32 * half;
                    copy_chunk(slot + 8192 * half, &q_map, c * 64, head, arrived);
                    copy_chunk(slot + 8192 * half + 4096, &dout_map, c * 64, head, arrived);
                }
            }
        }
        return;
    }

    asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
    const int warp = thread / 32, lane = thread % 32, row = 16 * warp + lane / 4;
    const float scale = rsqrtf((float)AB_DIM);
    float sum[4][32] = {{0}};
    barrier_wait(key_full, 0);
    int phase = 0;
    for (int t = next_token(&mask, item, plan, a, masks, item.from); t < item.to; phase ^= 1) {
        // x = K [Q ; dO]^T: S^T (keys,heads) in x[0..15], dP^T in x[16..31], of own 32 heads.
        float x[32], s[16], dp[16];
        float2 l[4], d[4];
        uint32_t p[2][8], dl[2][8];
        pin(x);
        #pragma unroll
        for (int i = 0; i < AB_CHUNKS; i++) {
            const int c = chunk_at(i);
            barrier_wait(full + 8 * c, phase);
            wgmma_fence();
            #pragma unroll
            for (int k = 0; k < 4; k++) {
                wgmma_rows(x, operand(K + c * AB_CHUNK + k * 32),
                           operand(slots + c * AB_SLOT + group * 8192 + k * 32), i + k > 0);
            }
        }
        wgmma_commit();
        // Meanwhile: this token's numbers, and which token is next.
        const size_t head = (size_t)t * AB_HEADS + 32 * group + 2 * (lane % 4);
        #pragma unroll
        for (int j = 0; j < 4; j++) {
            l[j] = *(const float2 *)(lse + head + 8 * j);
            d[j] = *(const float2 *)(delta + head + 8 * j);
        }
        const bool valid0 = mask >> row & 1, valid1 = mask >> (row + 8) & 1;
        t = next_token(&mask, item, plan, a, masks, t + 1);
        wgmma_wait<0>();
        pin(x);
        #pragma unroll
        for (int j = 0; j < 16; j++) {
            const float lse_j = -(float)M_LOG2E * (j % 2 ? l[j / 4].y : l[j / 4].x);
            const float delta_j = -scale * (j % 2 ? d[j / 4].y : d[j / 4].x);
            softmax_backward(&s[j], &dp[j], x[j], x[j + 16], lse_j, delta_j,
                             j & 2 ? valid1 : valid0);
        }
        // Each warpgroup reads what the other wrote. The buffers take turns: who writes one again
        // has passed the barrier in between, and so has who read it.
        float4 *swap = exchange + phase * 1024;
        pack_half(p[0], s);
        pack_half(dl[0], dp);
        send(p[0], swap, group * 512 + thread);
        send(dl[0], swap, group * 512 + 256 + thread);

        // dK (keys,dims) += P^T dO + dS^T Q, for own 4 chunks, two by two; own heads first.
        const uint32_t chunks = slots + group * 4 * AB_SLOT;
        const uint32_t own = chunks + group * 8192, other = chunks + (1 - group) * 8192;
        pin(sum); pin(p[0]); pin(dl[0]);
        wgmma_fence();
        add_heads(sum, 0, p[0], dl[0], own);
        pair_barrier();
        receive(p[1], swap, (1 - group) * 512 + thread);
        receive(dl[1], swap, (1 - group) * 512 + 256 + thread);
        pin(p[1]); pin(dl[1]);
        wgmma_fence();
        add_heads(sum, 0, p[1], dl[1], other);
        wgmma_commit();
        add_heads(sum, 1, p[0], dl[0], own + 2 * AB_SLOT);
        add_heads(sum, 1, p[1], dl[1], other + 2 * AB_SLOT);
        wgmma_commit();
        free_chunks(empty + 32 * group, lane);
        pin(sum);
    }
    float *out = part + ((size_t)blockIdx.x * AB_KEYS + row) * AB_DIM + group * 256
               + 2 * (lane % 4);
    #pragma unroll
    for (int j = 0; j < 32; j++) {
        const float *y = sum[j / 8] + j % 8 * 4;
        *(float2 *)(out + 8 * j) = make_float2(y[0], y[1]);
        *(float2 *)(out + 8 * AB_DIM + 8 * j) = make_float2(y[2], y[3]);
    }
}

// Word k of lane i of a quad becomes word i of lane k.
__device__ inline void transpose_quad(uint32_t (&v)[4], int lane) {
    const bool odd = lane & 1, high = lane & 2;
    #pragma unroll
    for (int k = 0; k < 4; k += 2) {
        const uint32_t in = __shfl_xor_sync(~0u, odd ? v[k] : v[k + 1], 1);
        v[k] = odd ? in : v[k];
        v[k + 1] = odd ? v[k + 1] : in;
    }
    #pragma unroll
    for (int k = 0; k < 2; k++) {
        const uint32_t in = __shfl_xor_sync(~0u, high ? v[k] : v[k + 2], 2);
        v[k] = high ? in : v[k];
        v[k + 2] = high ? v[k + 2] : in;
    }
}

// Copies for the query kernel. Q and dO of each token by the bulk engine, in groups of 8 heads; key
// rows, which may lie anywhere, 16 bytes at a time: this thread has piece thread % 8 of every 16th
// row of each chunk.
__device__ inline void query_copies(uint32_t slots, uint32_t K, uint32_t full, uint32_t empty,
                                    uint32_t q_full, uint32_t q_empty, const CUtensorMap *q_map,
                                    const CUtensorMap *dout_map, const act *kv, const act *entries,
                                    const int *selected, const AttentionShape &a, int thread) {
    const int piece = thread % 8, first_row = thread / 8;
    const uint32_t place = K + first_row * 128 + ((piece ^ first_row) % 8) * 16;
    int step = 0, phase = 0;
    for (int t = a.T - 1 - (int)blockIdx.x; t >= 0; t -= gridDim.x, step ^= 1) {
        int window;
        const int n = attended_count(a, selected, t, &window);
        if (thread < 32) {
            barrier_wait(q_empty, step ^ 1);
            if (thread < AB_CHUNKS) { barrier_expect(q_full + 8 * thread, AB_SLOT); }
            __syncwarp();
            for (int i = thread; i < 16 * AB_CHUNKS; i += 32) {     // groups of 8 heads of Q or dO
                const int c = chunk_at(i / 16), part = i % 16;
                copy_chunk(slots + c * AB_SLOT + part * 1024, part % 2 ? dout_map : q_map, c * 64,
                           t * AB_HEADS + part / 2 * 8, q_full + 8 * c);
            }
        }
        for (int first = 0; first < n; first += AB_KEYS, phase ^= 1) {
            const act *key[4];
            bool valid[4];
            #pragma unroll
            for (int r = 0; r < 4; r++) {
                const int i = first + first_row + 16 * r;
                valid[r] = i < n;
                key[r] = attended_key(a, kv, entries, selected, t, window, valid[r] ? i : 0)
                       + piece * 8;
            }
            for (int i = 0; i < AB_CHUNKS; i++) {
                const int c = chunk_at(i);
                barrier_wait(empty + 8 * c, phase ^ 1);
                #pragma unroll
                for (int r = 0; r < 4; r++) {
                    copy16(place + c * AB_CHUNK + r * 2048, key[r] + c * 64, valid[r]);
                }
                barrier_arrive_copies(full + 8 * c);
            }
        }
    }
}

// The query kernel's slot, 16 KB: 8 heads of Q, the same 8 of dO, the next 8 of Q, and so on. As
// rows of the left operand, a thread's row g is a head's S and its row g + 8 that head's dP.
__global__ void __launch_bounds__(AB_THREADS, 1)
attention_backward_query_3_kernel(act *dq, const __grid_constant__ CUtensorMap q_map,
                                  const __grid_constant__ CUtensorMap dout_map, const real *delta,
                                  const real *lse, const act *kv, const act *entries,
                                  const int *selected, AttentionShape a) {
    extern __shared__ unsigned char raw[];
    unsigned char *base = (unsigned char *)(((uintptr_t)raw + 1023) / 1024 * 1024);
    const uint32_t K = shared_address(base), slots = K + AB_TILE;
    const uint32_t full = K + AB_BARRIERS, empty = full + 8 * AB_CHUNKS;
    const uint32_t q_full = empty + 8 * AB_CHUNKS, q_empty = q_full + 8 * AB_CHUNKS;
    float4 *exchange = (float4 *)(base + 3 * AB_TILE);
    if (threadIdx.x == 0) {
        for (int c = 0; c < AB_CHUNKS; c++) {
            barrier_init(full + 8 * c, 128);
            barrier_init(empty + 8 * c, 4);
            barrier_init(q_full + 8 * c, 1);
        }
        barrier_init(q_empty, 8);
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    __syncthreads();
    const int group = threadIdx.x / 128, thread = threadIdx.x % 128;
    if (group == 2) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 56;");
        query_copies(slots, K, full, empty, q_full, q_empty, &q_map, &dout_map, kv, entries,
                     selected, a, thread);
        return;
    }

    asm volatile("setmaxnreg.inc.sync.aligned.u32 224;");
    const int warp = thread / 32, lane = thread % 32, row = 8 * warp + lane / 4;
    const float scale = rsqrtf((float)AB_DIM);
    int step = 0, phase = 0;
    for (int t = a.T - 1 - (int)blockIdx.x; t >= 0; t -= gridDim.x, step ^= 1) {
        const size_t head = (size_t)t * AB_HEADS + row;     // and head + 32
        int window;
        const int n = attended_count(a, selected, t, &window);
        const float lse_h = -(float)M_LOG2E * lse[head + 32 * group];
        const float delta_h = -scale * delta[head + 32 * group];
        float sum[4][32] = {{0}};
        for (int first = 0; first < n; first += AB_KEYS, phase ^= 1) {
            // x = [Q ; dO] K^T (heads,keys): of block j, x[4 j], x[4 j + 1] are S of head `row` of
            // own 32, the next two its dP.
            float x[32];
            uint32_t own[8], other[8], dl[16];
            pin(x);
            #pragma unroll
            for (int i = 0; i < AB_CHUNKS; i++) {
                const int c = chunk_at(i);
                if (first == 0) { barrier_wait(q_full + 8 * c, step); }
                barrier_wait(full + 8 * c, phase);
                proxy_fence();                      // copy16's writes -> the tensor cores' reads
                wgmma_fence();
                #pragma unroll
                for (int k = 0; k < 4; k++) {
                    wgmma_rows(x, operand(slots + c * AB_SLOT + group * 8192 + k * 32),
                               operand(K + c * AB_CHUNK + k * 32), i + k > 0);
                }
            }
            wgmma_commit();
            wgmma_wait<0>();
            pin(x);
            if (first + AB_KEYS >= n && lane == 0) { barrier_arrive(q_empty); }
            const int left = n - first - 2 * (lane % 4);
            #pragma unroll
            for (int j = 0; j < 8; j++) {
                float p, dl0, dl1;
                softmax_backward(&p, &dl0, x[4 * j], x[4 * j + 2], lse_h, delta_h, 8 * j < left);
                softmax_backward(&p, &dl1, x[4 * j + 1], x[4 * j + 3], lse_h, delta_h,
                                 8 * j + 1 < left);
                own[j] = pack2(dl0, dl1);
            }
            // As left operand of the next product, rows g are of the first 32 heads, rows g + 8 of
            // the others: half of each fragment comes from the other warpgroup.
            send(own, exchange + phase * 512, group * 256 + thread);
            pair_barrier();
            receive(other, exchange + phase * 512, (1 - group) * 256 + thread);
            #pragma unroll
            for (int j = 0; j < 8; j++) {
                dl[2 * j] = group ? other[j] : own[j];
                dl[2 * j + 1] = group ? own[j] : other[j];
            }
            // dQ (heads,dims) += dS K, for own 4 chunks, two by two.
            const uint32_t chunks = K + group * 4 * AB_CHUNK;
            pin(sum); pin(dl);
            wgmma_fence();
            #pragma unroll
            for (int h = 0; h < 2; h++) {
                #pragma unroll
                for (int k = 0; k < 4; k++) {
                    wgmma_quarter(sum, h, dl + 4 * k,
                                  operand(chunks + 2 * h * AB_CHUNK + k * 2048));
                }
                wgmma_commit();
            }
            free_chunks(empty + 32 * group, lane);
            pin(sum);
        }
        #pragma unroll
        for (int half = 0; half < 2; half++) {      // rows g, g + 8; 16 bytes per lane
            act *out = dq + (head + 32 * half) * AB_DIM + group * 256 + 8 * (lane % 4);
            #pragma unroll
            for (int m = 0; m < 8; m++) {
                uint32_t v[4];
                #pragma unroll
                for (int j = 0; j < 4; j++) {
                    const int at = (4 * m + j) % 8 * 4 + 2 * half;
                    v[j] = pack2(sum[m / 2][at], sum[m / 2][at + 1]);
                }
                transpose_quad(v, lane);
                *(uint4 *)(out + 32 * m) = make_uint4(v[0], v[1], v[2], v[3]);
            }
        }
    }
}

// A bf16 matrix of rows of 512, as the bulk copy engine sees it: boxes of box_rows x 64 dims.
static CUtensorMap tensor_map(const act *p, size_t rows, unsigned int box_rows) {
    typedef CUresult (*Encode)(CUtensorMap *, CUtensorMapDataType, cuuint32_t, void *,
                               const cuuint64_t *, const cuuint64_t *, const cuuint32_t *,
                               const cuuint32_t *, CUtensorMapInterleave, CUtensorMapSwizzle,
                               CUtensorMapL2promotion, CUtensorMapFloatOOBfill);
    static Encode encode;
    if (encode == NULL) {
        void *f = NULL;
        cudaDriverEntryPointQueryResult found;
        cudaCheck(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &f, 12000,
                                                   cudaEnableDefault, &found));
        gpuRequire(found == cudaDriverEntryPointSuccess);
        encode = (Encode)f;
    }
    CUtensorMap map;
    const cuuint64_t dims[2] = {AB_DIM, rows}, strides[1] = {AB_DIM * sizeof(act)};
    const cuuint32_t box[2] = {64, box_rows}, steps[2] = {1, 1};
    const CUresult result = encode(&map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 2, (void *)p, dims,
                                   strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
                                   CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                                   CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    gpuRequire(result == CUDA_SUCCESS);
    return map;
}

extern "C" void attention_backward_query_3(act *dq, const act *dout, const real *delta,
                                           const real *lse, const act *q, const act *kv,
                                           const act *entries, const int *selected,
                                           AttentionShape a) {
    if (a.T == 0) { return; }
    if (a.D != AB_DIM || a.H != AB_HEADS) {
        attention_backward_query_1(dq, dout, delta, lse, q, kv, entries, selected, a);
        return;
    }
    int device, processors;
    cudaCheck(cudaGetDevice(&device));
    cudaCheck(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device));
    cudaCheck(cudaFuncSetAttribute(attention_backward_query_3_kernel,
                                   cudaFuncAttributeMaxDynamicSharedMemorySize, AB_SHARED_3));
    const size_t rows = (size_t)a.T * AB_HEADS;
    attention_backward_query_3_kernel<<<a.T < processors ? a.T : processors, AB_THREADS,
                                        AB_SHARED_3, stream>>>(
        dq, tensor_map(q, rows, 8), tensor_map(dout, rows, 8), delta, lse, kv, entries, selected,
        a);
    cudaCheck(cudaGetLastError());
}

extern "C" void attention_backward_key_3(real *dkv, real *dentries, const act *dout,
                                         const real *delta, const real *lse, const act *q,
                                         const act *kv, const act *entries, const int *selected,
                                         AttentionShape a) {
    if (a.T == 0) { return; }
    if (a.D != AB_DIM || a.H != AB_HEADS) {
        attention_backward_key_1(dkv, dentries, dout, delta, lse, q, kv, entries, selected, a);
        return;
    }
    const KeyPlan plan = key_plan(a);
    const size_t mark = workspace_mark(), rows = (size_t)a.T * AB_HEADS;
    const int slots = plan.entry_tiles * plan.segments + plan.window_tiles * plan.pieces;
    float *part = (float *)workspace(sizeof(float) * (size_t)slots * AB_KEYS * AB_DIM);
    uint64_t *masks = NULL;
    if (selected && plan.entry_tiles) {
        masks = (uint64_t *)workspace(sizeof(uint64_t) * (size_t)a.T * plan.entry_tiles);
        attention_masks_kernel<<<a.T, 128, sizeof(uint64_t) * plan.entry_tiles, stream>>>(
            masks, selected, plan.entry_tiles, a.topk);
        cudaCheck(cudaGetLastError());
    }
    cudaCheck(cudaFuncSetAttribute(attention_backward_key_3_kernel,
                                   cudaFuncAttributeMaxDynamicSharedMemorySize, AB_SHARED_3));
    const CUtensorMap kv_map = tensor_map(kv, a.T, AB_KEYS);
    attention_backward_key_3_kernel<<<slots, AB_THREADS, AB_SHARED_3, stream>>>(
        part, tensor_map(q, rows, 32), tensor_map(dout, rows, 32), kv_map,
        plan.entry_tiles ? tensor_map(entries, a.P, AB_KEYS) : kv_map, delta, lse, masks, plan, a);
    cudaCheck(cudaGetLastError());
    attention_key_sum_kernel<<<a.T + (plan.entry_tiles ? a.P : 0), AB_DIM / 4, 0, stream>>>(
        dkv, dentries, part, plan, a);
    cudaCheck(cudaGetLastError());
    workspace_release(mark);
}

// -------------------------------------------------------------------------------------------------
// Checks and times

typedef void (*QueryFn)(act *, const act *, const real *, const real *, const act *, const act *,
                        const act *, const int *, AttentionShape);
typedef void (*KeyFn)(real *, real *, const act *, const real *, const real *, const act *,
                      const act *, const act *, const int *, AttentionShape);
static const struct { const char *name; QueryFn query; KeyFn key; } versions[] = {
    {"1 naive", attention_backward_query_1, attention_backward_key_1},
    {"2 wgmma", attention_backward_query_2, attention_backward_key_2},
    {"3 pipeline", attention_backward_query_3, attention_backward_key_3},
};
enum { VERSIONS = sizeof versions / sizeof *versions };

// A batch of documents with random inputs and what the forward made of them.
typedef struct {
    AttentionShape a;
    std::vector<int> position, end, first_entry, token, list;
    act *q, *kv, *entries, *out, *dout, *dq;
    float *sink;
    int *selected;
    real *lse, *delta, *dkv, *dentries;
    double pairs;               // (query token, key) pairs
} Batch;

static Batch make_batch(std::vector<int> docs, int H, int D, int W, int ratio, int topk, int seed) {
    Batch b = {};
    int T = 0, P = 0;
    for (int length : docs) {
        for (int i = 0; i < length; i++) {
            b.position.push_back(i);
            b.end.push_back(T + length);
            b.first_entry.push_back(P);
        }
        for (int p = 0; ratio && p < length / ratio; p++) { b.token.push_back(T + p * ratio); }
        P += ratio ? length / ratio : 0;
        T += length;
    }
    for (int t = 0; t < T; t++) {
        const int visible = ratio ? (b.position[t] + 1) / ratio : 0;
        b.pairs += std::min(b.position[t] + 1, W) + (topk ? std::min(visible, topk) : visible);
        int need = std::min(visible, topk), i = 0;
        for (int e = 0; e < visible && topk; e++) {     // each with the chance need / left
            if ((int)(hash64(seed + (uint64_t)t * 65536 + e) % (uint64_t)(visible - e)) < need) {
                b.list.push_back(b.first_entry[t] + e);
                need--;
                i++;
            }
        }
        for (; i < topk; i++) { b.list.push_back(-1); }
    }
    b.a = {T, P, H, D, W, ratio, topk, to_device(b.position), to_device(b.end),
           to_device(b.first_entry), to_device(b.token)};
    const size_t n = (size_t)T * H * D;
    b.q = random_normal(n, seed + 1, 1.5f);
    b.dout = random_normal(n, seed + 2, 1);
    b.kv = random_normal((size_t)T * D, seed + 3, 1);
    b.entries = random_normal((size_t)std::max(P, 1) * D, seed + 4, 1);
    b.out = device_alloc<act>(n);
    b.dq = device_alloc<act>(n);
    b.lse = device_alloc<real>((size_t)T * H);
    b.delta = device_alloc<real>((size_t)T * H);
    b.dkv = device_alloc<real>((size_t)T * D);
    b.dentries = device_alloc<real>((size_t)std::max(P, 1) * D);
    b.sink = to_device(std::vector<float>(H, 0.5f));
    b.selected = topk ? to_device(b.list) : NULL;
    attention_forward_gpu(b.out, b.lse, b.q, b.kv, b.entries, b.sink, b.selected, b.a);
    attention_delta_gpu(b.delta, b.dout, b.out, T, H, D);
    cudaCheck(cudaDeviceSynchronize());
    return b;
}

static void free_batch(Batch *b) {
    for (void *p : {(void *)b->q, (void *)b->kv, (void *)b->entries, (void *)b->out,
                    (void *)b->dout,
                    (void *)b->dq, (void *)b->sink, (void *)b->selected, (void *)b->lse,
                    (void *)b->delta, (void *)b->dkv, (void *)b->dentries, (void *)b->a.position,
                    (void *)b->a.end, (void *)b->a.first_entry, (void *)b->a.token}) {
        cudaCheck(cudaFree(p));
    }
}

template <typename V>
__global__ void compare_kernel(double *out, const V *x, const V *y, size_t n) {
    double difference = 0, norm = 0;
    for (size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x; i < n;
         i += (size_t)gridDim.x * blockDim.x) {
        const double a = (float)x[i], b = (float)y[i];
        difference += (a - b) * (a - b);
        norm += b * b;
    }
    atomicAdd(out, difference);
    atomicAdd(out + 1, norm);
}
// ||x - y|| / ||y|| on the device.
template <typename V> static double compare(const V *x, const V *y, size_t n) {
    double h[2], *d = device_alloc<double>(2);
    cudaCheck(cudaMemset(d, 0, sizeof h));
    compare_kernel<<<512, 256>>>(d, x, y, n);
    cudaCheck(cudaMemcpy(h, d, sizeof h, cudaMemcpyDeviceToHost));
    cudaCheck(cudaFree(d));
    return h[1] > 0 ? sqrt(h[0] / h[1]) : sqrt(h[0]);
}
__global__ void digest_kernel(unsigned long long *out, const uint16_t *x, size_t n) {
    unsigned long long sum = 0;
    for (size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x; i < n;
         i += (size_t)gridDim.x * blockDim.x) {
        sum += hash64(i << 16 ^ x[i]);
    }
    atomicAdd(out, sum);
}
static unsigned long long digest(const void *x, size_t bytes) {
    unsigned long long h, *d = device_alloc<unsigned long long>(1);
    cudaCheck(cudaMemset(d, 0, sizeof h));
    digest_kernel<<<512, 256>>>(d, (const uint16_t *)x, bytes / 2);
    cudaCheck(cudaMemcpy(&h, d, sizeof h, cudaMemcpyDeviceToHost));
    cudaCheck(cudaFree(d));
    return h;
}

static void run_version(int v, Batch *b) {
    const size_t n = (size_t)b->a.T * b->a.H * b->a.D;
    cudaCheck(cudaMemset(b->dq, 0xFF, n * sizeof(act)));
    cudaCheck(cudaMemset(b->dkv, 0xFF, (size_t)b->a.T * b->a.D * sizeof(real)));
    cudaCheck(cudaMemset(b->dentries, 0xFF, (size_t)b->a.P * b->a.D * sizeof(real)));
    cudaCheck(cudaMemset(work.base, 0xFF, work.size < (256u << 20) ? work.size : 256u << 20));
    versions[v].key(b->dkv, b->dentries, b->dout, b->delta, b->lse, b->q, b->kv, b->entries,
                    b->selected, b->a);
    versions[v].query(b->dq, b->dout, b->delta, b->lse, b->q, b->kv, b->entries, b->selected, b->a);
    cudaCheck(cudaDeviceSynchronize());
}

// The formulas in double, softmax included.
static void check_double(const char *name, const Batch &b) {
    const AttentionShape &a = b.a;
    const int D = a.D, H = a.H;
    auto h_q = to_host(b.q, (size_t)a.T * H * D), h_do = to_host(b.dout, (size_t)a.T * H * D);
    auto h_kv = to_host(b.kv, (size_t)a.T * D), h_e = to_host(b.entries, (size_t)a.P * D);
    std::vector<double> q(h_q.size()), d(h_do.size()), k((size_t)(a.T + a.P) * D);
    for (size_t i = 0; i < q.size(); i++) { q[i] = (float)h_q[i]; d[i] = (float)h_do[i]; }
    for (size_t i = 0; i < k.size(); i++) {
        k[i] = i < h_kv.size() ? (float)h_kv[i] : (float)h_e[i - h_kv.size()];
    }
    std::vector<double> dq(q.size()), dk(k.size());
    for (int t = 0; t < a.T; t++) {
        std::vector<int> keys;
        for (int j = t - std::min(b.position[t], a.W - 1); j <= t; j++) { keys.push_back(j); }
        const int visible = a.ratio ? (b.position[t] + 1) / a.ratio : 0;
        for (int i = 0; i < (b.selected ? a.topk : visible); i++) {
            const int e = b.selected ? b.list[(size_t)t * a.topk + i] : b.first_entry[t] + i;
            if (e >= 0) { keys.push_back(a.T + e); }
        }
        for (int h = 0; h < H; h++) {
            const double *x = &q[((size_t)t * H + h) * D], *g = &d[((size_t)t * H + h) * D];
            std::vector<double> p(keys.size()), dp(keys.size());
            double sum = exp(0.5), delta = 0;
            for (size_t i = 0; i < keys.size(); i++) {
                const double *key = &k[(size_t)keys[i] * D];
                double l = 0;
                for (int j = 0; j < D; j++) { l += x[j] * key[j]; dp[i] += g[j] * key[j]; }
                sum += p[i] = exp(l / sqrt((double)D));
            }
            for (size_t i = 0; i < keys.size(); i++) { p[i] /= sum; delta += p[i] * dp[i]; }
            for (size_t i = 0; i < keys.size(); i++) {
                const double dl = p[i] * (dp[i] - delta) / sqrt((double)D);
                const double *key = &k[(size_t)keys[i] * D];
                double *to = &dk[(size_t)keys[i] * D], *at = &dq[((size_t)t * H + h) * D];
                for (int j = 0; j < D; j++) {
                    at[j] += dl * key[j];
                    to[j] += dl * x[j] + p[i] * g[j];
                }
            }
        }
    }
    std::vector<double> dkv(dk.begin(), dk.begin() + (size_t)a.T * D);
    std::vector<double> de(dk.begin() + (size_t)a.T * D, dk.end());
    printf("    %-34s against float64: dq %.1e, dkv %.1e, dentries %.1e\n", name,
           relative_error(to_host(b.dq, dq.size()), dq),
           relative_error(to_host(b.dkv, dkv.size()), dkv),
           relative_error(to_host(b.dentries, de.size()), de));
}

static int check(const char *name, Batch b, bool in_double, int runs) {
    const size_t n = (size_t)b.a.T * b.a.H * b.a.D, nk = (size_t)b.a.T * b.a.D;
    const size_t ne = (size_t)b.a.P * b.a.D;
    act *dq = device_alloc<act>(n);
    real *dkv = device_alloc<real>(nk), *dentries = device_alloc<real>(ne);
    int failures = 0;
    for (int v = 0; v < VERSIONS; v++) {
        run_version(v, &b);
        if (v == 0) {
            cudaCheck(cudaMemcpy(dq, b.dq, n * sizeof(act), cudaMemcpyDeviceToDevice));
            cudaCheck(cudaMemcpy(dkv, b.dkv, nk * sizeof(real), cudaMemcpyDeviceToDevice));
            cudaCheck(cudaMemcpy(dentries, b.dentries, ne * sizeof(real),
                                 cudaMemcpyDeviceToDevice));
        } else {
            const double eq = compare(b.dq, dq, n), ek = compare(b.dkv, dkv, nk);
            const double ee = compare(b.dentries, dentries, ne);
            unsigned long long first = 0;
            bool same = true;
            for (int run = 0; run < runs; run++) {
                if (run) { run_version(v, &b); }
                const unsigned long long now = digest(b.dq, n * sizeof(act))
                    + 3 * digest(b.dkv, nk * sizeof(real))
                    + 5 * digest(b.dentries, ne * sizeof(real));
                same = same && (run == 0 || now == first);
                first = now;
            }
            const bool good = eq <= 1e-2 && ek <= 1e-2 && ee <= 1e-2 && same;
            failures += !good;
            printf("%s %-34s v%s: dq %.1e, dkv %.1e, dentries %.1e%s\n", good ? "ok  " : "FAIL",
                   name, versions[v].name, eq, ek, ee, same ? "" : ", runs differ");
        }
        if (in_double) { check_double(name, b); }
    }
    cudaCheck(cudaFree(dq)); cudaCheck(cudaFree(dkv)); cudaCheck(cudaFree(dentries));
    fflush(stdout);
    return failures;
}

static void time_versions(const char *name, Batch b, int first) {
    const double product = b.pairs * 2 * b.a.H * b.a.D * 1e-9;  // GFLOP
    for (int v = first; v < VERSIONS; v++) {
        const int repeats = v ? 11 : 1, warm = v ? 3 : 0;
        const float key = time_ms([&](int) {
            versions[v].key(b.dkv, b.dentries, b.dout, b.delta, b.lse, b.q, b.kv, b.entries,
                            b.selected, b.a); }, repeats, warm);
        const float query = time_ms([&](int) {
            versions[v].query(b.dq, b.dout, b.delta, b.lse, b.q, b.kv, b.entries, b.selected, b.a);
        }, repeats, warm);
        printf("%-22s v%-9s key %8.3f ms (%5.1f TFLOP/s)  query %8.3f ms (%5.1f)  both %8.3f ms, "
               "%5.1f TFLOP/s of 7 products, %4.1f %% of %.0f\n", name, versions[v].name, key,
               4 * product / key, query, 3 * product / query, key + query,
               7 * product / (key + query), 100 * 7 * product / (key + query) / CEILING_TFLOPS,
               CEILING_TFLOPS);
        fflush(stdout);
    }
}

// "small": only the shapes that are compared with float64 too, for compute-sanitizer.
int main(int argc, char **argv) {
    const bool small = argc > 1 && !strcmp(argv[1], "small");
    work.size = (size_t)1 << 30;
    work.base = device_alloc<unsigned char>(work.size);
    struct { const char *name; std::vector<int> docs; int H, D, W, ratio, topk; bool in_double; }
    cases[] = {
        {"window, T 1", {1}, 64, 512, 128, 0, 0, true},
        {"window, odd documents", {1, 130, 64, 3, 200, 1, 1, 457}, 64, 512, 128, 0, 0, false},
        {"CSA, T 71", {1, 30, 3, 37}, 64, 512, 128, 4, 0, true},
        {"HCA, T 140", {140}, 64, 512, 128, 128, 0, true},
        {"CSA, no entry", {3, 2}, 64, 512, 128, 4, 0, false},
        {"HCA, odd documents", {128, 127, 300, 1, 517, 1, 255}, 64, 512, 128, 128, 0, false},
        {"CSA, odd documents", {5, 333, 4, 3, 129, 1, 700}, 64, 512, 128, 4, 0, false},
        {"CSA selected, T 90, topk 8", {1, 70, 19}, 64, 512, 32, 4, 8, true},
        {"CSA selected, packed", {2500, 1, 77, 2100, 3}, 64, 512, 128, 4, 512, false},
        {"tiny shape", {100, 1, 155}, 4, 128, 32, 4, 16, false},
    };
    int failures = 0, seed = 1;
    for (auto &c : cases) {
        if (small && !c.in_double) { continue; }
        Batch b = make_batch(c.docs, c.H, c.D, c.W, c.ratio, c.topk, seed++ * 1000);
        failures += check(c.name, b, c.in_double, 5);
        free_batch(&b);
    }
    struct { const char *name; std::vector<int> docs; int ratio, topk; bool slow; } shapes[] = {
        {"window 4,096", {4096}, 0, 0, true},
        {"HCA 4,096", {4096}, 128, 0, true},
        {"CSA 4,096", {4096}, 4, 512, true},
        {"CSA 4,096 packed", {1000, 500, 1500, 96, 700, 300}, 4, 512, true},
        {"CSA 16,384", {16384}, 4, 512, false},
        {"HCA 16,384", {16384}, 128, 0, false},
    };
    for (auto &s : shapes) {
        if (small) { break; }
        Batch b = make_batch(s.docs, 64, 512, 128, s.ratio, s.topk, seed++ * 1000);
        if (s.slow) { failures += check(s.name, b, false, 5); }
        time_versions(s.name, b, s.slow ? 0 : 1);
        free_batch(&b);
    }
    printf("%d failures\n", failures);
    return failures != 0;
}
