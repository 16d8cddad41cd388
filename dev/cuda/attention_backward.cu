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
// Versions 1 and 3 are kernels.cu's own code: attention_backward_query_gpu and _key_gpu take one or
// the other by the shape. So are the forward that makes the inputs, and what version 2 shares with
// version 3: tiles, the key kernel's plan, the masks, the softmax.
//
// Build: nvcc -O3 -std=c++17 -gencode=arch=compute_90a,code=sm_90a -diag-suppress 177
//        attention_backward.cu -lcublas -o attention_backward
#include "../../kernels.cu"
#include "common.h"

using namespace attention_backward;

// -------------------------------------------------------------------------------------------------
// Version 2: tensor cores, one step after the other: copy, S and dP (one warpgroup each), swap
// halves, softmax, swap, accumulate (one half of the 512 dims each)

// x (64,64) = a b^T over all 512 dims, both tiles in shared memory; commits one group.
__device__ inline void tile_product(float (&x)[32], uint32_t a, uint32_t b) {
    keep_order(x);
    wgmma_fence();
    #pragma unroll
    for (int c = 0; c < AB_CHUNKS; c++) {
        #pragma unroll
        for (int k = 0; k < 4; k++) {
            wgmma_m64n64k16(x, operand_at(a + c * AB_CHUNK + k * 32),
                            operand_at(b + c * AB_CHUNK + k * 32), c + k > 0);
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
        copy16(tile + forward::chunk_offset(row, piece),
               from + (size_t)(row < rows ? row : 0) * AB_DIM + piece * 8, row < rows);
    }
}
// Waits for this block's copies and shows them to the tensor cores, which read by another path.
__device__ inline void tiles_ready(void) {
    asm volatile("cp.async.wait_all;" ::: "memory");
    proxy_fence();
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
    float sum[128] = {0};
    for (int first = 0; first < n; first += AB_KEYS) {
        for (int i = threadIdx.x; i < 64 * 64; i += 256) {
            const int r = i / 64, piece = i % 64;
            const bool valid = first + r < n;
            const act *key = attended_key(a, kv, entries, selected, t, window,
                                          valid ? first + r : 0);
            copy16(K + forward::chunk_offset(r, piece), key + piece * 8, valid);
        }
        tiles_ready();
        float x[32], s[16], dp[16];
        uint32_t dl[2][8];
        tile_product(x, group ? dO : Q, K);         // (heads,keys)
        wgmma_wait<0>();
        keep_order(x);
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
        keep_order(sum); keep_order(dl[0]); keep_order(dl[1]);
        wgmma_fence();
        #pragma unroll
        for (int k = 0; k < 4; k++) {               // 16 keys each; the own half first
            const int half = k / 2, keys = (group ^ half) * 2 + k % 2;
            forward::wgmma_outputs(sum, dl[half] + 4 * (k % 2),
                                   operand_at(K + group * 4 * AB_CHUNK + keys * 2048));
        }
        wgmma_commit();
        wgmma_wait<0>();
        keep_order(sum);
        __syncthreads();
    }
    #pragma unroll
    for (int j = 0; j < 32; j++) {
        const int column = group * 256 + 8 * j + 2 * (lane % 4);
        act *out = dq + (head0 + row) * AB_DIM + column;
        const float *y = sum + 4 * j;
        *(uint32_t *)out = pack_bf16(y[0], y[1]);
        *(uint32_t *)(out + 8 * AB_DIM) = pack_bf16(y[2], y[3]);
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
    float sum[128] = {0};
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
        keep_order(x);
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
        keep_order(sum); keep_order(p[0]); keep_order(p[1]); keep_order(dl[0]); keep_order(dl[1]);
        wgmma_fence();
        #pragma unroll
        for (int k = 0; k < 4; k++) {               // 16 heads each; the own half first
            const int half = k / 2, heads = (group ^ half) * 2 + k % 2;
            const uint32_t at = group * 4 * AB_CHUNK + heads * 2048;
            forward::wgmma_outputs(sum, p[half] + 4 * (k % 2), operand_at(dO + at));
            forward::wgmma_outputs(sum, dl[half] + 4 * (k % 2), operand_at(Q + at));
        }
        wgmma_commit();
        wgmma_wait<0>();
        keep_order(sum);
        __syncthreads();
    }
    tiles_ready();                                  // even if no token came, no copy may be left
    float *out = part + ((size_t)blockIdx.x * AB_KEYS + row) * AB_DIM + group * 256
               + 2 * (lane % 4);
    #pragma unroll
    for (int j = 0; j < 32; j++) {
        const float *y = sum + 4 * j;
        *(float2 *)(out + 8 * j) = make_float2(y[0], y[1]);
        *(float2 *)(out + 8 * AB_DIM + 8 * j) = make_float2(y[2], y[3]);
    }
}

static void attention_backward_query_2(act *dq, const act *dout, const real *delta,
                                       const real *lse, const act *q, const act *kv,
                                       const act *entries, const int *selected,
                                       AttentionShape a) {
    if (a.T == 0) { return; }
    if (a.D != AB_DIM || a.H != AB_HEADS) {
        attention_backward_query_plain(dq, dout, delta, lse, q, kv, entries, selected, a);
        return;
    }
    cudaCheck(cudaFuncSetAttribute(attention_backward_query_2_kernel,
                                   cudaFuncAttributeMaxDynamicSharedMemorySize, AB_SHARED_2));
    attention_backward_query_2_kernel<<<a.T, 256, AB_SHARED_2, stream>>>(
        dq, dout, delta, lse, q, kv, entries, selected, a);
    cudaCheck(cudaGetLastError());
}

static void attention_backward_key_2(real *dkv, real *dentries, const act *dout,
                                     const real *delta, const real *lse, const act *q,
                                     const act *kv, const act *entries, const int *selected,
                                     AttentionShape a) {
    if (a.T == 0) { return; }
    if (a.D != AB_DIM || a.H != AB_HEADS) {
        attention_backward_key_plain(dkv, dentries, dout, delta, lse, q, kv, entries, selected, a);
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

// Version 3 has a third warpgroup that copies, chunk by chunk, what the other two will read next.
// Each of these has scores and their gradients of the same heads: kernels.cu, 9.2.

// -------------------------------------------------------------------------------------------------
// Checks and times

typedef void (*QueryFn)(act *, const act *, const real *, const real *, const act *, const act *,
                        const act *, const int *, AttentionShape);
typedef void (*KeyFn)(real *, real *, const act *, const real *, const real *, const act *,
                      const act *, const act *, const int *, AttentionShape);
static const struct { const char *name; QueryFn query; KeyFn key; } versions[] = {
    {"1 naive", attention_backward_query_plain, attention_backward_key_plain},
    {"2 wgmma", attention_backward_query_2, attention_backward_key_2},
    {"3 pipeline", attention_backward_query_gpu, attention_backward_key_gpu},
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
    attention_forward_plain(b.out, b.lse, b.q, b.kv, b.entries, b.sink, b.selected, b.a);
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

// The formulas in double, softmax included. Returns whether all errors are at most 1e-2: rounded to
// bf16 (1.6e-3 of the norm each) are out, of which delta is made, p and dl as operands, and dq.
// These roundings alone give 2.6e-3, and up to 5.5e-3 for one token, whose dp - delta cancels.
static bool check_double(const char *name, const Batch &b) {
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
    const double eq = relative_error(to_host(b.dq, dq.size()), dq);
    const double ek = relative_error(to_host(b.dkv, dkv.size()), dkv);
    const double ee = relative_error(to_host(b.dentries, de.size()), de);
    const bool good = eq <= 1e-2 && ek <= 1e-2 && ee <= 1e-2;
    printf("%s %-34s against float64: dq %.1e, dkv %.1e, dentries %.1e\n", good ? "ok  " : "FAIL",
           name, eq, ek, ee);
    return good;
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
            const double eq = device_error(b.dq, dq, n), ek = device_error(b.dkv, dkv, nk);
            const double ee = device_error(b.dentries, dentries, ne);
            uint64_t first = 0;
            bool same = true;
            for (int run = 0; run < runs; run++) {
                if (run) { run_version(v, &b); }
                const uint64_t now = device_hash(b.dq, n * sizeof(act))
                    + 3 * device_hash(b.dkv, nk * sizeof(real))
                    + 5 * device_hash(b.dentries, ne * sizeof(real));
                same = same && (run == 0 || now == first);
                first = now;
            }
            const bool good = eq <= 1e-2 && ek <= 1e-2 && ee <= 1e-2 && same;
            failures += !good;
            printf("%s %-34s v%s: dq %.1e, dkv %.1e, dentries %.1e%s\n", good ? "ok  " : "FAIL",
                   name, versions[v].name, eq, ek, ee, same ? "" : ", runs differ");
        }
        if (in_double) { failures += !check_double(name, b); }
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
    ladder_workspace((size_t)1 << 30);
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
