// hyper_connections.cu: four residual streams around a sublayer (mHC), forward and backward.
//
//     m = r (fn X), r = 1 / rms(X)      pre, post, comb = sigmoids and Sinkhorn of m
//     x = w RMSNorm(sum_i pre[i] X[i])            what the sublayer reads
//     Y[j] = post[j] o + sum_i comb[i][j] X[i]    what its output o makes of the streams
//
// X (T,4,C) is four times as wide as anything else in the model, so what a version costs is how
// often it walks over it. One idea per rung:
//   v1  the text: a thread per output
//   v2  a block per token, 16 bytes per access; fn is read once per 4 tokens; every function walks
//       over the streams by itself, and the streams' gradient is a sum in fp32 that three of them
//       add to
//   v3  functions that read the same are one: dealing computes the next site's m while Y is in
//       registers, on tensor cores against a slice of fn that stays in shared memory; collapsing
//       and norm are one; dX is written once, so bf16 is enough; eight sums per token tell all that
//       dm needs. Shipped.
//
// Arithmetic per token and site at C = 4,096 (X 32 KiB in bf16, dX 64 in fp32; o, x, do 8; dx 16):
//              forward                                  backward
//   v2   X 32 | X 32, u 8 | u 8, x 8 |            dY 64, X 32, o 8, do 8, dX 64 | dx 16, u 8, du 8
//        X 32, o 8, Y 32             = 160 KiB    | du 8, X 32, dX 128 | X 32, dX 128 = 536 KiB
//   v3   X 32, x 8 | X 32, o 8, Y 32 = 112 KiB    dY 32, X 32, o 8, do 8 | dx 16, X 32 |
//                                                 dY 32, X 32, dx 16, dX 32          = 240 KiB
//   at 4,096 tokens and 4,277 GB/s: 157 and 526 us; 110 and 235 us.
//   fn: 2 * 24 * 16,384 = 0.8 MFLOP per token each way, 54 us per site in fp32 without tensor
//   cores; two bf16 halves of fn keep 16 of its 24 bits and cost 13 us of tensor cores.
// With dX in fp32 v3 would move 112 + 48 + 176 = 336 KiB. What lies below 240: dealing's backward
// can ride in the kernel that writes dX, of the site behind it (208), and the sums of dx and X can
// be taken on the way if X of a token stayed on the chip until its dm is known (160), but then fn,
// 1.6 MB, must come from L2 for every few tokens. dX in bf16 does not show in the gradients of 21
// tiny layers: 0.108 from those in fp32 with it, 0.122 with v2's roundings of u and du.
//
// Measured (one H200, medians; share of 4,277 GB/s):
//   4,096 tokens       forward                     backward
//     v1               8,624 us                    7,730 us
//     v2               378 us  1,775 GB/s  42 %    721 us  3,120 GB/s  73 %
//     v3               153     3,065       72      299     3,363       79
//   16,384 tokens
//     v2             1,390     1,932       45    2,667     3,372       79
//     v3               538     3,496       82    1,116     3,609       84
//   v3 at 4,096 / 16,384: weights, collapse, norm 80 / 95 %; deal 66 / 76; deal backward 90 / 100;
//   enter backward 72 / 78. DRAM moves what the table above says (ncu: 69 of 72 KiB in deal, 79 of
//   80 in its backward, 48 + 109 of 160 in enter backward); at 4,096 tokens kernels of 5 to 10 us
//   (Sinkhorn, partial sums) take some percent.
// The two that stay below 80 % are those that multiply with fn: tokens pass by in pieces of 64
// bytes, and ncu sees L2 busier (70 and 76 % of its rate) than DRAM (61 and 65 %). Pieces of 256
// bytes by the copy engine would be the next rung.
//
// Tried, us for dealing at 4,096 tokens: nothing staged, 118; rounds ahead through shared memory,
// 106; L2 told to bring the 256 bytes around each piece, 100, since part of them is gone before its
// turn; 128 bytes, the next tile's factors touched in time, fn fetched in fours, 95 (and enter
// backward's last kernel 168 -> 156). Sinkhorn by 16 lanes per token takes 6 us, its backward 10,
// with true divisions 15.
//
//     nvcc -O3 -std=c++17 --extended-lambda -gencode=arch=compute_90a,code=sm_90a \
//          hyper_connections.cu -o hyper_connections && ./hyper_connections
#include "common.h"

enum { HC = 4, HC_MIX = 24 };

#define gpuRequire(condition) do { if (!(condition)) { \
    fprintf(stderr, "%s:%d: no kernel for this shape: %s\n", __FILE__, __LINE__, #condition); \
    exit(1); } } while (0)

// -------------------------------------------------------------------------------------------------
// 1 Helpers, as in kernels.cu

static int multiprocessors(void) {
    static int n;
    int device;
    if (n == 0) {
        cudaCheck(cudaGetDevice(&device));
        cudaCheck(cudaDeviceGetAttribute(&n, cudaDevAttrMultiProcessorCount, device));
    }
    return n;
}

static inline int blocks_for(size_t n, int per_block) {
    return (int)((n + per_block - 1) / per_block);
}

// Threads for a row of C elements at 8 per thread: whole warps, at most 512.
static inline int row_threads(int C) {
    const int threads = (C / 8 + 31) / 32 * 32;
    return threads < 32 ? 32 : threads > 512 ? 512 : threads;
}

__device__ inline void load8(float *x, const bf16 *p) {
    const uint4 raw = *(const uint4 *)p;
    const __nv_bfloat162 *pair = (const __nv_bfloat162 *)&raw;
    #pragma unroll
    for (int i = 0; i < 4; i++) {
        const float2 v = __bfloat1622float2(pair[i]);
        x[2 * i] = v.x;
        x[2 * i + 1] = v.y;
    }
}

__device__ inline void load4(float *x, const float *p) {
    const float4 v = *(const float4 *)p;
    x[0] = v.x; x[1] = v.y; x[2] = v.z; x[3] = v.w;
}

__device__ inline void load8(float *x, const float *p) { load4(x, p); load4(x + 4, p + 4); }

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

__device__ inline void store4(float *p, const float *x) {
    *(float4 *)p = make_float4(x[0], x[1], x[2], x[3]);
}

__device__ inline void store8(bf16 *p, const float *x) {
    uint4 raw;
    __nv_bfloat162 *pair = (__nv_bfloat162 *)&raw;
    #pragma unroll
    for (int i = 0; i < 4; i++) { pair[i] = __floats2bfloat162_rn(x[2 * i], x[2 * i + 1]); }
    *(uint4 *)p = raw;
}

__device__ inline void store8(float *p, const float *x) { store4(p, x); store4(p + 4, x + 4); }

// The sum over a warp, to all lanes, in a fixed tree.
__device__ inline float warp_sum(float x) {
    #pragma unroll
    for (int k = 16; k > 0; k /= 2) { x += __shfl_xor_sync(~0u, x, k); }
    return x;
}

// The sum over a block, to all threads. shared: 32 floats, free again on return.
__device__ inline float block_sum(float x, float *shared) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, warps = blockDim.x / 32;
    x = warp_sum(x);
    if (lane == 0) { shared[warp] = x; }
    __syncthreads();
    x = warp_sum(lane < warps ? shared[lane] : 0);
    __syncthreads();
    return x;
}

// Shared memory is addressed by 32-bit numbers where instructions of the copy engine and the tensor
// cores take it.
__device__ __forceinline__ uint32_t shared_address(const void *p) {
    return (uint32_t)__cvta_generic_to_shared(p);
}

// 16 bytes from global to shared memory without passing through registers; zeros if !valid. What
// a thread started since its last commit is a group; wait until at most `left` of its groups run.
__device__ inline void copy16(uint32_t to, const void *from, bool valid = true) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
                 :: "r"(to), "l"(from), "r"(valid ? 16 : 0) : "memory");
}
__device__ inline void copy_commit(void) { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int left> __device__ inline void copy_wait(void) {
    asm volatile("cp.async.wait_group %0;" :: "n"(left) : "memory");
}

__device__ __forceinline__ uint32_t pack_bf16(float low, float high) {
    __nv_bfloat162 two = __floats2bfloat162_rn(low, high);
    return *(uint32_t *)&two;
}

// Scratch of a launcher: one region, handed out like a stack.
static struct { unsigned char *base; size_t used; } work;
static size_t workspace_mark(void) { return work.used; }
static void workspace_release(size_t mark) { work.used = mark; }
static void *workspace(size_t bytes) {
    void *p = work.base + work.used;
    work.used += (bytes + 255) / 256 * 256;
    return p;
}

// One site: what it reads, what it keeps, what it makes. dX holds dY before the backward; v1 and v2
// take it in fp32.
typedef struct {
    int T, C;
    act *X, *o, *Y, *x, *do_, *dX, *u, *du;
    float *fn, *next, *base, *scale, *m, *r, *next_m, *next_r, *pre, *post, *comb, *rstd;
    float *dx, *dX32, *dpost, *dcomb, *dpre, *dm;
    bf16 *w;
} Site;
static const float EPS = 1e-6f;
enum { ITERS = 20 };

// -------------------------------------------------------------------------------------------------
// Version 1: the text

namespace v1 {

template <typename F> __global__ void each_kernel(size_t n, F f) {
    const size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) { f(i); }
}
// f(0) .. f(n - 1), a thread each.
template <typename F> static void each(size_t n, F f) {
    each_kernel<<<(unsigned)divide_up(n, 256), 256>>>(n, f);
    cudaCheck(cudaGetLastError());
}

__host__ __device__ static inline float sigmoid(float x) { return 1 / (1 + expf(-x)); }

// Sinkhorn forward; then, if dc, backward. c: logits in, mixing matrix out. real: float or double.
template <typename F> __host__ __device__ static void sinkhorn(F *c, F *dc, F eps) {
    F sums[2 * ITERS - 1][HC], p[HC * HC];
    for (int j = 0; j < HC; j++) {
        F max = c[j * HC], sum = 0;
        for (int k = 1; k < HC; k++) { max = c[j * HC + k] > max ? c[j * HC + k] : max; }
        for (int k = 0; k < HC; k++) { sum += c[j * HC + k] = exp(c[j * HC + k] - max); }
        for (int k = 0; k < HC; k++) {
            p[j * HC + k] = c[j * HC + k] /= sum;
            c[j * HC + k] += eps;
        }
    }
    for (int step = 0; step < 2 * ITERS - 1; step++) {
        const int line = step % 2 ? HC : 1, along = step % 2 ? 1 : HC;     // columns first
        for (int a = 0; a < HC; a++) {
            F sum = eps;
            for (int b = 0; b < HC; b++) { sum += c[a * line + b * along]; }
            for (int b = 0; b < HC; b++) { c[a * line + b * along] /= sum; }
            sums[step][a] = sum;
        }
    }
    for (int step = 2 * ITERS - 2; dc && step >= 0; step--) {
        const int line = step % 2 ? HC : 1, along = step % 2 ? 1 : HC;
        for (int a = 0; a < HC; a++) {
            F dot = 0;
            for (int b = 0; b < HC; b++) {
                dot += dc[a * line + b * along] * c[a * line + b * along];
            }
            for (int b = 0; b < HC; b++) {
                F *d = dc + a * line + b * along;
                *d = (*d - dot) / sums[step][a];
                c[a * line + b * along] *= sums[step][a];
            }
        }
    }
    for (int j = 0; dc && j < HC; j++) {
        F dot = 0;
        for (int k = 0; k < HC; k++) { dot += dc[j * HC + k] * p[j * HC + k]; }
        for (int k = 0; k < HC; k++) { dc[j * HC + k] = p[j * HC + k] * (dc[j * HC + k] - dot); }
    }
}

static void logits(float *m, float *r, const act *X, const float *fn, int T, int N) {
    each(T, [=] __device__(size_t t) {
        float sum = 0;
        for (int k = 0; k < N; k++) { sum += (float)X[t * N + k] * (float)X[t * N + k]; }
        r[t] = 1 / sqrtf(sum / N + EPS);
    });
    each((size_t)T * HC_MIX, [=] __device__(size_t at) {
        const size_t t = at / HC_MIX, i = at % HC_MIX;
        float sum = 0;
        for (int k = 0; k < N; k++) { sum += (float)X[t * N + k] * fn[i * N + k]; }
        m[at] = r[t] * sum;
    });
}

static void forward(const Site &s) {
    const int C = s.C, N = HC * C;
    each(s.T, [=] __device__(size_t t) {
        const float *m = s.m + t * HC_MIX;
        float *c = s.comb + t * HC * HC;
        for (int i = 0; i < HC; i++) {
            s.pre[t * HC + i] = sigmoid(m[i] * s.scale[0] + s.base[i]) + EPS;
            s.post[t * HC + i] = 2 * sigmoid(m[HC + i] * s.scale[1] + s.base[HC + i]);
        }
        for (int i = 0; i < HC * HC; i++) {
            c[i] = m[2 * HC + i] * s.scale[2] + s.base[2 * HC + i];
        }
        sinkhorn<float>(c, NULL, EPS);
    });
    each((size_t)s.T * C, [=] __device__(size_t at) {
        const size_t t = at / C, c = at % C;
        float sum = 0;
        for (int i = 0; i < HC; i++) { sum += s.pre[t * HC + i] * (float)s.X[t * N + i * C + c]; }
        s.u[at] = sum;
    });
    each(s.T, [=] __device__(size_t t) {
        float sum = 0;
        for (int c = 0; c < C; c++) { sum += (float)s.u[t * C + c] * (float)s.u[t * C + c]; }
        s.rstd[t] = 1 / sqrtf(sum / C + EPS);
    });
    each((size_t)s.T * C, [=] __device__(size_t at) {
        s.x[at] = (float)s.w[at % C] * ((float)s.u[at] * s.rstd[at / C]);
    });
    each((size_t)s.T * N, [=] __device__(size_t at) {
        const size_t t = at / N, j = at % N / C, c = at % C;
        float sum = s.post[t * HC + j] * (float)s.o[t * C + c];
        for (int i = 0; i < HC; i++) {
            sum += s.comb[t * HC * HC + i * HC + j] * (float)s.X[t * N + i * C + c];
        }
        s.Y[at] = sum;
    });
    logits(s.next_m, s.next_r, s.Y, s.next, s.T, N);
}

static void backward(const Site &s) {
    const int C = s.C, N = HC * C;
    each((size_t)s.T * HC * (HC + 1), [=] __device__(size_t at) {
        const size_t t = at / (HC * (HC + 1)), i = at / HC % (HC + 1), j = at % HC;
        float sum = 0;                              // i = HC: dpost
        for (int c = 0; c < C; c++) {
            sum += s.dX32[t * N + j * C + c]
                 * (float)(i < HC ? s.X[t * N + i * C + c] : s.o[t * C + c]);
        }
        (i < HC ? s.dcomb + t * HC * HC + i * HC : s.dpost + t * HC)[j] = sum;
    });
    each((size_t)s.T * C, [=] __device__(size_t at) {
        const size_t t = at / C, c = at % C;
        float d[HC], sum = 0;
        for (int j = 0; j < HC; j++) { d[j] = s.dX32[t * N + j * C + c]; }
        for (int j = 0; j < HC; j++) { sum += s.post[t * HC + j] * d[j]; }
        s.do_[at] = sum;
        for (int i = 0; i < HC; i++) {
            sum = 0;
            for (int j = 0; j < HC; j++) { sum += s.comb[t * HC * HC + i * HC + j] * d[j]; }
            s.dX32[t * N + i * C + c] = sum;
        }
    });
    each(s.T, [=] __device__(size_t t) {
        float mean = 0;
        for (int c = 0; c < C; c++) {
            mean += s.dx[t * C + c] * (float)s.w[c] * (float)s.u[t * C + c] * s.rstd[t] / C;
        }
        for (int c = 0; c < C; c++) {
            s.du[t * C + c] = s.rstd[t] * (s.dx[t * C + c] * (float)s.w[c]
                                           - (float)s.u[t * C + c] * s.rstd[t] * mean);
        }
    });
    each((size_t)s.T * HC, [=] __device__(size_t ti) {
        float sum = 0;
        for (int c = 0; c < C; c++) {
            sum += (float)s.du[ti / HC * C + c] * (float)s.X[ti * C + c];
            s.dX32[ti * C + c] += s.pre[ti] * (float)s.du[ti / HC * C + c];
        }
        s.dpre[ti] = sum;
    });
    each(s.T, [=] __device__(size_t t) {
        const float *m = s.m + t * HC_MIX;
        float *dm = s.dm + t * HC_MIX, c[HC * HC];
        for (int i = 0; i < 2 * HC; i++) {
            const float y = sigmoid(m[i] * s.scale[i / HC] + s.base[i]);
            dm[i] = (i < HC ? s.dpre[t * HC + i] : 2 * s.dpost[t * HC + i - HC]) * y * (1 - y)
                  * s.scale[i / HC];
        }
        for (int i = 0; i < HC * HC; i++) {
            c[i] = m[2 * HC + i] * s.scale[2] + s.base[2 * HC + i];
            dm[2 * HC + i] = s.dcomb[t * HC * HC + i];
        }
        sinkhorn<float>(c, dm + 2 * HC, EPS);
        for (int i = 0; i < HC * HC; i++) { dm[2 * HC + i] *= s.scale[2]; }
    });
    each((size_t)s.T * N, [=] __device__(size_t at) {
        const size_t t = at / N, k = at % N;
        float dot = 0, sum = 0;
        for (int i = 0; i < HC_MIX; i++) {
            dot += s.m[t * HC_MIX + i] * s.dm[t * HC_MIX + i];
            sum += s.dm[t * HC_MIX + i] * s.fn[i * N + k];
        }
        s.dX32[at] += s.r[t] * sum - s.r[t] * s.r[t] / N * dot * (float)s.X[at];
    });
}

} // namespace v1

// -------------------------------------------------------------------------------------------------
// Version 2: a block per token

namespace v2 {

__global__ void rmsnorm_forward_kernel(act *out, real *rstd, const act *inp, const bf16 *w,
                                       float eps, int C) {
    __shared__ float shared[32];
    const size_t row = blockIdx.x;
    const int n = C / 8;
    float sum = 0;
    for (int i = threadIdx.x; i < n; i += blockDim.x) {
        float x[8];
        load8(x, inp + row * C + i * 8);
        #pragma unroll
        for (int k = 0; k < 8; k++) { sum += x[k] * x[k]; }
    }
    sum = block_sum(sum, shared);
    const float r = 1 / sqrtf(sum / C + eps);
    if (threadIdx.x == 0) { rstd[row] = r; }
    for (int i = threadIdx.x; i < n; i += blockDim.x) {
        float x[8], g[8];
        load8(x, inp + row * C + i * 8);
        if (w) { load8(g, w + i * 8); }
        #pragma unroll
        for (int k = 0; k < 8; k++) { x[k] = (w ? g[k] : 1) * (x[k] * r); }
        store8(out + row * C + i * 8, x);
    }
}

void rmsnorm_forward_gpu(act *out, real *rstd, const act *inp, const bf16 *w, float eps,
                                    int T, int C) {
    if (T == 0) { return; }
    rmsnorm_forward_kernel<<<T, row_threads(C), 0, stream>>>(out, rstd, inp, w, eps, C);
    cudaCheck(cudaGetLastError());
}

// dinp = rstd (a - x mean(a x)), a = w dout, x = inp rstd.
//   bytes: 4 C + 2 C read, 2 C written per row: 134 MB at 4,096 x 4,096, 31 us.
__global__ void rmsnorm_backward_kernel(act *dinp, const real *dout, const act *inp,
                                        const real *rstd, const bf16 *w, int C) {
    __shared__ float shared[32];
    const size_t row = blockIdx.x;
    const int n = C / 8;
    const float r = rstd[row];
    float sum = 0;
    for (int i = threadIdx.x; i < n; i += blockDim.x) {
        float x[8], d[8], g[8];
        load8(x, inp + row * C + i * 8);
        load8(d, dout + row * C + i * 8);
        if (w) { load8(g, w + i * 8); }
        #pragma unroll
        for (int k = 0; k < 8; k++) { sum += d[k] * (w ? g[k] : 1) * (x[k] * r); }
    }
    const float mean = block_sum(sum, shared) / C;
    for (int i = threadIdx.x; i < n; i += blockDim.x) {
        float x[8], d[8], g[8];
        load8(x, inp + row * C + i * 8);
        load8(d, dout + row * C + i * 8);
        if (w) { load8(g, w + i * 8); }
        #pragma unroll
        for (int k = 0; k < 8; k++) { d[k] = r * (d[k] * (w ? g[k] : 1) - x[k] * r * mean); }
        store8(dinp + row * C + i * 8, d);
    }
}

void rmsnorm_backward_gpu(act *dinp, const real *dout, const act *inp, const real *rstd,
                                     const bf16 *w, int T, int C) {
    if (T == 0) { return; }
    rmsnorm_backward_kernel<<<T, row_threads(C), 0, stream>>>(dinp, dout, inp, rstd, w, C);
    cudaCheck(cudaGetLastError());
}

// m = r (fn X), r = 1 / rms. A block takes HC_TOKENS tokens; each thread walks every blockDim-th
// group of 4 columns, keeps HC_TOKENS x M sums, and the block adds them up at the end.
//   operations: 2 x 24 x 16,384 per token, 3.2 GFLOP at T = 4,096: 54 us at fp32 rate, against
//   31 us to read X. fn (1.6 MB) comes from L2 once per HC_TOKENS tokens.
enum { HC_TOKENS = 4, HC_THREADS = 256 };

template <int M>
__global__ void __launch_bounds__(HC_THREADS)
hc_logits_forward_kernel(real *m, real *r, const act *X, const float *fn, float eps, int T, int N) {
    __shared__ float shared[HC_THREADS / 32][HC_TOKENS][M + 1];
    const int t0 = blockIdx.x * HC_TOKENS, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    float sum[HC_TOKENS][M + 1];                // the last one: the sum of squares
    #pragma unroll
    for (int t = 0; t < HC_TOKENS; t++) {
        #pragma unroll
        for (int i = 0; i <= M; i++) { sum[t][i] = 0; }
    }
    for (int k = threadIdx.x * 4; k < N; k += HC_THREADS * 4) {
        float x[HC_TOKENS][4];
        #pragma unroll
        for (int t = 0; t < HC_TOKENS; t++) {
            load4(x[t], X + (size_t)min(t0 + t, T - 1) * N + k);
            #pragma unroll
            for (int j = 0; j < 4; j++) { sum[t][M] += x[t][j] * x[t][j]; }
        }
        #pragma unroll
        for (int i = 0; i < M; i++) {
            const float4 w = *(const float4 *)(fn + (size_t)i * N + k);
            #pragma unroll
            for (int t = 0; t < HC_TOKENS; t++) {
                sum[t][i] += x[t][0] * w.x + x[t][1] * w.y + x[t][2] * w.z + x[t][3] * w.w;
            }
        }
    }
    #pragma unroll
    for (int t = 0; t < HC_TOKENS; t++) {
        #pragma unroll
        for (int i = 0; i <= M; i++) {
            const float all = warp_sum(sum[t][i]);
            if (lane == 0) { shared[warp][t][i] = all; }
        }
    }
    __syncthreads();
    for (int at = threadIdx.x; at < HC_TOKENS * M; at += HC_THREADS) {
        const int t = at / M, i = at % M;
        if (t0 + t >= T) { continue; }
        float dot = 0, square = 0;
        for (int k = 0; k < HC_THREADS / 32; k++) {
            dot += shared[k][t][i];
            square += shared[k][t][M];
        }
        const float rms = 1 / sqrtf(square / N + eps);
        m[(size_t)(t0 + t) * M + i] = dot * rms;
        if (i == 0) { r[t0 + t] = rms; }
    }
}

void hc_logits_forward_gpu(real *m, real *r, const act *X, const float *fn, float eps,
                                      int T, int C, int M) {
    if (T == 0) { return; }
    const int grid = blocks_for(T, HC_TOKENS);
    if (M == HC_MIX) {
        hc_logits_forward_kernel<HC_MIX><<<grid, HC_THREADS, 0, stream>>>(m, r, X, fn, eps, T,
                                                                          HC * C);
    } else {
        gpuRequire(M == HC);
        hc_logits_forward_kernel<HC><<<grid, HC_THREADS, 0, stream>>>(m, r, X, fn, eps, T, HC * C);
    }
    cudaCheck(cudaGetLastError());
}

// dX += r fn^T dm - (r^2 / N) <m, dm> X. A block takes HC_TOKENS tokens and HC_THREADS * 4 columns;
// fn's columns are read once per block.
//   bytes: 8 N for dX, 2 N for X per token: 10 x 16,384 = 160 KiB, 671 MB at T = 4,096: 157 us.
template <int M>
__global__ void __launch_bounds__(HC_THREADS)
hc_logits_backward_kernel(real *dX, const real *dm, const real *m, const real *r, const act *X,
                          const float *fn, int T, int N) {
    __shared__ float g[HC_TOKENS][M], along[HC_TOKENS];
    const int t0 = blockIdx.x * HC_TOKENS;
    for (int at = threadIdx.x; at < HC_TOKENS * M; at += HC_THREADS) {
        const int t = min(t0 + at / M, T - 1);
        g[at / M][at % M] = r[t] * dm[(size_t)t * M + at % M];
    }
    if (threadIdx.x < HC_TOKENS) {
        const int t = min(t0 + (int)threadIdx.x, T - 1);
        float dot = 0;
        for (int i = 0; i < M; i++) { dot += m[(size_t)t * M + i] * dm[(size_t)t * M + i]; }
        along[threadIdx.x] = r[t] * r[t] / N * dot;
    }
    __syncthreads();
    const int k = (blockIdx.y * HC_THREADS + threadIdx.x) * 4;
    if (k >= N) { return; }
    float4 sum[HC_TOKENS];
    #pragma unroll
    for (int t = 0; t < HC_TOKENS; t++) { sum[t] = make_float4(0, 0, 0, 0); }
    #pragma unroll 4
    for (int i = 0; i < M; i++) {
        const float4 w = *(const float4 *)(fn + (size_t)i * N + k);
        #pragma unroll
        for (int t = 0; t < HC_TOKENS; t++) {
            sum[t].x += g[t][i] * w.x;
            sum[t].y += g[t][i] * w.y;
            sum[t].z += g[t][i] * w.z;
            sum[t].w += g[t][i] * w.w;
        }
    }
    #pragma unroll
    for (int t = 0; t < HC_TOKENS; t++) {
        if (t0 + t >= T) { break; }
        const size_t at = (size_t)(t0 + t) * N + k;
        float x[4];
        load4(x, X + at);
        float4 d = *(float4 *)(dX + at);
        d.x += sum[t].x - along[t] * x[0];
        d.y += sum[t].y - along[t] * x[1];
        d.z += sum[t].z - along[t] * x[2];
        d.w += sum[t].w - along[t] * x[3];
        *(float4 *)(dX + at) = d;
    }
}

void hc_logits_backward_gpu(real *dX, real *dm, const real *m, const real *r,
                                       const act *X, const float *fn, int T, int C, int M) {
    if (T == 0) { return; }
    const int N = HC * C;
    const dim3 grid(blocks_for(T, HC_TOKENS), blocks_for(N, HC_THREADS * 4));
    if (M == HC_MIX) {
        hc_logits_backward_kernel<HC_MIX><<<grid, HC_THREADS, 0, stream>>>(dX, dm, m, r, X, fn, T,
                                                                           N);
    } else {
        gpuRequire(M == HC);
        hc_logits_backward_kernel<HC><<<grid, HC_THREADS, 0, stream>>>(dX, dm, m, r, X, fn, T, N);
    }
    cudaCheck(cudaGetLastError());
}

__device__ inline float sigmoid_gpu(float x) { return 1 / (1 + expf(-x)); }

// Sinkhorn on a 4 x 4 matrix in registers; every loop is unrolled. Divisors go to sums if KEEP.
template <bool KEEP>
__device__ inline void sinkhorn(float c[HC][HC], float *sums, int iters, float eps) {
    #pragma unroll
    for (int j = 0; j < HC; j++) {
        float max = c[j][0], sum = 0;
        #pragma unroll
        for (int k = 1; k < HC; k++) { max = fmaxf(max, c[j][k]); }
        #pragma unroll
        for (int k = 0; k < HC; k++) { sum += c[j][k] = expf(c[j][k] - max); }
        #pragma unroll
        for (int k = 0; k < HC; k++) { c[j][k] = c[j][k] / sum + eps; }
    }
    for (int step = 0; step < 2 * iters - 1; step++) {      // columns, rows, columns, .. columns
        #pragma unroll
        for (int a = 0; a < HC; a++) {
            float sum = eps;
            #pragma unroll
            for (int b = 0; b < HC; b++) { sum += step % 2 ? c[a][b] : c[b][a]; }
            if (KEEP) { sums[step * HC + a] = sum; }
            const float inverse = 1 / sum;
            #pragma unroll
            for (int b = 0; b < HC; b++) { (step % 2 ? c[a][b] : c[b][a]) *= inverse; }
        }
    }
}

// One thread per token: its 24 numbers fit into registers, and no two tokens meet.
//   bytes: 192 per token; what it costs is 39 dependent half-steps, about 10 us.
__global__ void hc_weights_forward_kernel(real *pre, real *post, real *comb, const real *m,
                                          const float *base, const float *scale, float eps, int T,
                                          int iters) {
    const int t = blockIdx.x * blockDim.x + threadIdx.x;
    if (t >= T) { return; }
    m += (size_t)t * HC_MIX;
    float c[HC][HC];
    #pragma unroll
    for (int i = 0; i < HC; i++) {
        pre[(size_t)t * HC + i] = sigmoid_gpu(m[i] * scale[0] + base[i]) + eps;
        post[(size_t)t * HC + i] = 2 * sigmoid_gpu(m[HC + i] * scale[1] + base[HC + i]);
        #pragma unroll
        for (int k = 0; k < HC; k++) {
            const int at = 2 * HC + i * HC + k;
            c[i][k] = m[at] * scale[2] + base[at];
        }
    }
    sinkhorn<false>(c, NULL, iters, eps);
    #pragma unroll
    for (int i = 0; i < HC * HC; i++) { comb[(size_t)t * HC * HC + i] = c[i / HC][i % HC]; }
}

void hc_weights_forward_gpu(real *pre, real *post, real *comb, const real *m,
                                       const float *base, const float *scale, float eps, int T,
                                       int iters) {
    if (T == 0) { return; }
    hc_weights_forward_kernel<<<blocks_for(T, 32), 32, 0, stream>>>(pre, post, comb, m, base, scale,
                                                                    eps, T, iters);
    cudaCheck(cudaGetLastError());
}

// The forward again with its divisors kept (in local memory), then backwards through the steps.
__global__ void hc_weights_backward_kernel(real *dm, const real *dpre, const real *dpost,
                                           const real *dcomb, const real *m, const float *base,
                                           const float *scale, float eps, int T, int iters) {
    const int t = blockIdx.x * blockDim.x + threadIdx.x;
    if (t >= T) { return; }
    m += (size_t)t * HC_MIX;
    dm += (size_t)t * HC_MIX;
    float c[HC][HC], d[HC][HC], sums[2 * 64 * HC];
    #pragma unroll
    for (int i = 0; i < HC; i++) {
        float s = sigmoid_gpu(m[i] * scale[0] + base[i]);
        dm[i] = dpre[(size_t)t * HC + i] * s * (1 - s) * scale[0];
        s = sigmoid_gpu(m[HC + i] * scale[1] + base[HC + i]);
        dm[HC + i] = dpost[(size_t)t * HC + i] * 2 * s * (1 - s) * scale[1];
        #pragma unroll
        for (int k = 0; k < HC; k++) {
            const int at = 2 * HC + i * HC + k;
            c[i][k] = m[at] * scale[2] + base[at];
            d[i][k] = dcomb[(size_t)t * HC * HC + i * HC + k];
        }
    }
    sinkhorn<true>(c, sums, iters, eps);
    for (int step = 2 * iters - 2; step >= 0; step--) {
        #pragma unroll
        for (int a = 0; a < HC; a++) {
            // forward: y_b = x_b / S, so dx_b = (dy_b - sum_k dy_k y_k) / S
            const float sum = sums[step * HC + a], inverse = 1 / sum;
            float along = 0;
            #pragma unroll
            for (int b = 0; b < HC; b++) {
                along += step % 2 ? d[a][b] * c[a][b] : d[b][a] * c[b][a];
            }
            #pragma unroll
            for (int b = 0; b < HC; b++) {
                float &db = step % 2 ? d[a][b] : d[b][a], &cb = step % 2 ? c[a][b] : c[b][a];
                db = (db - along) * inverse;
                cb *= sum;
            }
        }
    }
    #pragma unroll
    for (int j = 0; j < HC; j++) {
        // forward: a = p + eps, p = softmax, so dlogits = p (da - <da, p>)
        float along = 0;
        #pragma unroll
        for (int k = 0; k < HC; k++) { c[j][k] -= eps; along += d[j][k] * c[j][k]; }
        #pragma unroll
        for (int k = 0; k < HC; k++) {
            dm[2 * HC + j * HC + k] = c[j][k] * (d[j][k] - along) * scale[2];
        }
    }
}

void hc_weights_backward_gpu(real *dm, const real *dpre, const real *dpost,
                                        const real *dcomb, const real *m, const float *base,
                                        const float *scale, float eps, int T, int iters) {
    if (T == 0) { return; }
    gpuRequire(iters <= 64);
    hc_weights_backward_kernel<<<blocks_for(T, 32), 32, 0, stream>>>(dm, dpre, dpost, dcomb, m,
                                                                     base, scale, eps, T, iters);
    cudaCheck(cudaGetLastError());
}

// u = sum_i pre[i] X[i]. One block per token.
//   bytes: 8 C read + 2 C written per token: 168 MB at T = 4,096, 39 us.
__global__ void hc_collapse_forward_kernel(act *u, const act *X, const real *pre, int C) {
    const size_t t = blockIdx.x;
    float p[HC];
    #pragma unroll
    for (int i = 0; i < HC; i++) { p[i] = pre[t * HC + i]; }
    for (int c = threadIdx.x * 8; c < C; c += blockDim.x * 8) {
        float sum[8] = {0}, x[8];
        #pragma unroll
        for (int i = 0; i < HC; i++) {
            load8(x, X + (t * HC + i) * C + c);
            #pragma unroll
            for (int k = 0; k < 8; k++) { sum[k] += p[i] * x[k]; }
        }
        store8(u + t * C + c, sum);
    }
}

void hc_collapse_forward_gpu(act *u, const act *X, const real *pre, int T, int C) {
    if (T == 0) { return; }
    hc_collapse_forward_kernel<<<T, row_threads(C), 0, stream>>>(u, X, pre, C);
    cudaCheck(cudaGetLastError());
}

// dX[i] += pre[i] du, dpre[i] = <du, X[i]>. One block per token.
//   bytes: 32 C for dX, 8 C for X, 2 C for du per token: 704 MB at T = 4,096, 165 us.
__global__ void hc_collapse_backward_kernel(real *dX, real *dpre, const act *du, const act *X,
                                            const real *pre, int C) {
    __shared__ float shared[32];
    const size_t t = blockIdx.x;
    float p[HC], dot[HC] = {0};
    #pragma unroll
    for (int i = 0; i < HC; i++) { p[i] = pre[t * HC + i]; }
    for (int c = threadIdx.x * 8; c < C; c += blockDim.x * 8) {
        float d[8], x[8], g[8];
        load8(d, du + t * C + c);
        #pragma unroll
        for (int i = 0; i < HC; i++) {
            const size_t at = (t * HC + i) * C + c;
            load8(x, X + at);
            load8(g, dX + at);
            #pragma unroll
            for (int k = 0; k < 8; k++) { dot[i] += d[k] * x[k]; g[k] += p[i] * d[k]; }
            store8(dX + at, g);
        }
    }
    #pragma unroll
    for (int i = 0; i < HC; i++) {
        const float all = block_sum(dot[i], shared);
        if (threadIdx.x == 0) { dpre[t * HC + i] = all; }
    }
}

void hc_collapse_backward_gpu(real *dX, real *dpre, const act *du, const act *X,
                                         const real *pre, int T, int C) {
    if (T == 0) { return; }
    hc_collapse_backward_kernel<<<T, row_threads(C), 0, stream>>>(dX, dpre, du, X, pre, C);
    cudaCheck(cudaGetLastError());
}

// Y[j] = post[j] o + sum_i comb[i][j] X[i]. One block per token.
//   bytes: 8 C + 2 C read, 8 C written per token: 302 MB at T = 4,096, 71 us.
__global__ void hc_deal_forward_kernel(act *Y, const act *o, const act *X, const real *post,
                                       const real *comb, int C) {
    const size_t t = blockIdx.x;
    float p[HC], mix[HC][HC];
    #pragma unroll
    for (int i = 0; i < HC; i++) {
        p[i] = post[t * HC + i];
        #pragma unroll
        for (int j = 0; j < HC; j++) { mix[i][j] = comb[(t * HC + i) * HC + j]; }
    }
    for (int c = threadIdx.x * 8; c < C; c += blockDim.x * 8) {
        float x[HC][8], v[8], y[8];
        load8(v, o + t * C + c);
        #pragma unroll
        for (int i = 0; i < HC; i++) { load8(x[i], X + (t * HC + i) * C + c); }
        #pragma unroll
        for (int j = 0; j < HC; j++) {
            #pragma unroll
            for (int k = 0; k < 8; k++) {
                y[k] = p[j] * v[k] + mix[0][j] * x[0][k] + mix[1][j] * x[1][k] +
                       mix[2][j] * x[2][k] + mix[3][j] * x[3][k];
            }
            store8(Y + (t * HC + j) * C + c, y);
        }
    }
}

void hc_deal_forward_gpu(act *Y, const act *o, const act *X, const real *post,
                                    const real *comb, int T, int C) {
    if (T == 0) { return; }
    hc_deal_forward_kernel<<<T, row_threads(C), 0, stream>>>(Y, o, X, post, comb, C);
    cudaCheck(cudaGetLastError());
}

// do = sum_j post[j] dY[j], dpost[j] = <dY[j], o>, dcomb[i][j] = <X[i], dY[j]>, and dX in place of
// dY. One block per token; 20 sums over its threads.
//   bytes: 32 C for dY and dX, 8 C for X, 4 C for o and do: 738 MB at T = 4,096, 173 us.
__global__ void hc_deal_backward_kernel(act *do_, real *dpost, real *dcomb, real *dX, const act *o,
                                        const act *X, const real *post, const real *comb, int C) {
    __shared__ float shared[32][HC + HC * HC];
    const size_t t = blockIdx.x;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, warps = blockDim.x / 32;
    float p[HC], mix[HC][HC], sums[HC + HC * HC] = {0};
    #pragma unroll
    for (int i = 0; i < HC; i++) {
        p[i] = post[t * HC + i];
        #pragma unroll
        for (int j = 0; j < HC; j++) { mix[i][j] = comb[(t * HC + i) * HC + j]; }
    }
    for (int c = threadIdx.x * 4; c < C; c += blockDim.x * 4) {
        float d[HC][4], x[4], v[4], out[4];
        load4(v, o + t * C + c);
        #pragma unroll
        for (int j = 0; j < HC; j++) { load4(d[j], dX + (t * HC + j) * C + c); }
        #pragma unroll
        for (int k = 0; k < 4; k++) {
            out[k] = p[0] * d[0][k] + p[1] * d[1][k] + p[2] * d[2][k] + p[3] * d[3][k];
        }
        store4(do_ + t * C + c, out);
        #pragma unroll
        for (int j = 0; j < HC; j++) {
            #pragma unroll
            for (int k = 0; k < 4; k++) { sums[j] += d[j][k] * v[k]; }
        }
        #pragma unroll
        for (int i = 0; i < HC; i++) {
            load4(x, X + (t * HC + i) * C + c);
            #pragma unroll
            for (int k = 0; k < 4; k++) {
                out[k] = mix[i][0] * d[0][k] + mix[i][1] * d[1][k] + mix[i][2] * d[2][k] +
                         mix[i][3] * d[3][k];
                #pragma unroll
                for (int j = 0; j < HC; j++) { sums[HC + i * HC + j] += x[k] * d[j][k]; }
            }
            store4(dX + (t * HC + i) * C + c, out);
        }
    }
    #pragma unroll
    for (int i = 0; i < HC + HC * HC; i++) {
        const float all = warp_sum(sums[i]);
        if (lane == 0) { shared[warp][i] = all; }
    }
    __syncthreads();
    if (threadIdx.x >= HC + HC * HC) { return; }
    float all = 0;
    for (int k = 0; k < warps; k++) { all += shared[k][threadIdx.x]; }
    if (threadIdx.x < HC) { dpost[t * HC + threadIdx.x] = all; }
    else { dcomb[t * HC * HC + threadIdx.x - HC] = all; }
}

void hc_deal_backward_gpu(act *do_, real *dpost, real *dcomb, real *dX, const act *o,
                                     const act *X, const real *post, const real *comb, int T,
                                     int C) {
    if (T == 0) { return; }
    hc_deal_backward_kernel<<<T, row_threads(C), 0, stream>>>(do_, dpost, dcomb, dX, o, X, post,
                                                              comb, C);
    cudaCheck(cudaGetLastError());
}

static void forward(const Site &s) {
    hc_weights_forward_gpu(s.pre, s.post, s.comb, s.m, s.base, s.scale, EPS, s.T, ITERS);
    hc_collapse_forward_gpu(s.u, s.X, s.pre, s.T, s.C);
    rmsnorm_forward_gpu(s.x, s.rstd, s.u, s.w, EPS, s.T, s.C);
    hc_deal_forward_gpu(s.Y, s.o, s.X, s.post, s.comb, s.T, s.C);
    hc_logits_forward_gpu(s.next_m, s.next_r, s.Y, s.next, EPS, s.T, s.C, HC_MIX);
}

static void backward(const Site &s) {
    hc_deal_backward_gpu(s.do_, s.dpost, s.dcomb, s.dX32, s.o, s.X, s.post, s.comb, s.T, s.C);
    rmsnorm_backward_gpu(s.du, s.dx, s.u, s.rstd, s.w, s.T, s.C);
    hc_collapse_backward_gpu(s.dX32, s.dpre, s.du, s.X, s.pre, s.T, s.C);
    hc_weights_backward_gpu(s.dm, s.dpre, s.dpost, s.dcomb, s.m, s.base, s.scale, EPS, s.T, ITERS);
    hc_logits_backward_gpu(s.dX32, s.dm, s.m, s.r, s.X, s.fn, s.T, s.C, HC_MIX);
}

} // namespace v2

// -------------------------------------------------------------------------------------------------
// Version 3, shipped

namespace v3 {

// A token's streams are HC * C numbers, and its projection fn is a matrix (M,HC*C) that all tokens
// share. What multiplies with fn keeps a slice of it, 128 or 256 channels of all four streams, in
// shared memory and lets the tokens pass by; so a token is worked on by several blocks, which leave
// partial sums. A warp takes 16 tokens and 32 channels at a time, held as the operands of the
// tensor cores lie: lane 4 g + q has the channels 8 q .. 8 q + 7 of tokens g and g + 8.

// It asks for them some rounds ahead, each lane for what it will use itself, so nobody waits for
// another.

enum { HC_TILE = 16, HC_GROUP = 32, HC_THREADS = 256, HC_WARPS = HC_THREADS / 32 };

// Blocks along C, and as many along T as fit onto the device, one per multiprocessor.
static dim3 hc_grid(int T, int C, int slice) {
    const int slices = blocks_for(C, slice), most = blocks_for(T, HC_TILE * HC_WARPS);
    const int fit = multiprocessors() / slices > 1 ? multiprocessors() / slices : 1;
    return dim3(slices, most < fit ? most : fit);
}

// 16 bytes to shared memory; L2 is told to bring the 128 around them, which the next round wants.
__device__ inline void copy16_ahead(uint4 *to, const void *from) {
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16;"
                 :: "r"(shared_address(to)), "l"(from) : "memory");
}

// Asks for a line that the next tile will want.
__device__ inline void touch(const float *p) { asm volatile("prefetch.global.L1 [%0];" :: "l"(p)); }

// The rounds of a warp: 16 tokens with one group of 32 channels after the other, then the next 16.
typedef struct { int tile, group, groups, stride; } HcRound;
__device__ inline void next_round(HcRound &r) {
    if (++r.group == r.groups) { r.group = 0; r.tile += r.stride; }
}

// 8 bf16 in 4 registers, as floats.
__device__ inline void unpack8(float *x, const uint4 &raw) {
    const uint32_t word[4] = { raw.x, raw.y, raw.z, raw.w };
    #pragma unroll
    for (int i = 0; i < 4; i++) {
        x[2 * i] = __uint_as_float(word[i] << 16);
        x[2 * i + 1] = __uint_as_float(word[i] & 0xFFFF0000u);
    }
}

// d (16,8) += a (16,16) b (16,8) in bf16.
__device__ inline void mma_bf16(float *d, const uint32_t *a, uint32_t b0, uint32_t b1) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, "
                 "{%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// d (16,8) += a (16,8) b (8,8) in tf32: fp32 rounded to 11 bits.
__device__ inline void mma_tf32(float *d, const uint32_t *a, uint32_t b0, uint32_t b1) {
    asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, "
                 "{%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
__device__ inline uint32_t round_tf32(float x) {
    uint32_t y;
    asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(y) : "f"(x));
    return y;
}

// Y[j] = post[j] o + sum_i comb[i][j] X[i] (DEAL; else Y is X), and this slice's share of fn Y and
// of the sum of Y's squares: partial (slices,T,M+1). fn is split into two bf16, which keep 16 of
// its 24 bits; Y is bf16 as it stands, so the tensor cores' products lose nothing else.
//   bytes: 8 C for X, 2 C for o, 8 C for Y per token: 72 KiB, 302 MB at T = 4,096: 71 us.
//   operations: 2 x 2 x 24 x 16,384 per token on tensor cores, 6.4 GFLOP: 13 us, and about 500
//   instructions per warp and 9 KB moved, a quarter of what the bytes take.
enum { HC_DEAL_SLICE = 256, HC_DEAL_STAGES = 3, HC_DEAL_LOADS = 2 * (HC + 1) };
template <int M> constexpr int hc_deal_parts = HC_DEAL_SLICE / HC_GROUP * HC * ((M + 7) / 8) * 64;
template <int M, bool DEAL>
__global__ void __launch_bounds__(HC_THREADS, 1)
hc_deal_forward_kernel(act *Y, float *partial, const act *o, const act *X, const real *post,
                       const real *comb, const float *fn, int T, int C) {
    constexpr int NT = (M + 7) / 8;             // blocks of 8 rows of fn
    extern __shared__ uint4 parts[];            // (groups,HC,NT,2,32): high and low halves of fn
    uint4 *mine = parts + hc_deal_parts<M> + threadIdx.x;       // (stages,loads,threads)
    const int first = blockIdx.x * HC_DEAL_SLICE, groups = min(HC_DEAL_SLICE, C - first) / HC_GROUP;
    const int lane = threadIdx.x % 32, g = lane / 4, q = lane % 4;
    HcRound now = { (int)blockIdx.y * HC_WARPS + (int)threadIdx.x / 32, 0, groups,
                    (int)gridDim.y * HC_WARPS }, ahead = now;
    auto fetch = [&](int stage) {
        uint4 *to = mine + stage * HC_DEAL_LOADS * HC_THREADS;
        #pragma unroll
        for (int h = 0; h < 2 && ahead.tile * HC_TILE < T; h++) {
            const size_t t = min(ahead.tile * HC_TILE + g + 8 * h, T - 1);
            const int c = first + ahead.group * HC_GROUP + q * 8;
            #pragma unroll
            for (int i = 0; i < HC; i++) {
                copy16_ahead(to + (h * HC + i) * HC_THREADS, X + (t * HC + i) * C + c);
            }
            if (DEAL) { copy16_ahead(to + (2 * HC + h) * HC_THREADS, o + t * C + c); }
            if (DEAL && ahead.group == 0) {
                touch(q < 2 ? comb + t * HC * HC + q * 8 : post + t * HC);
            }
        }
        copy_commit();
        next_round(ahead);
    };
    #pragma unroll
    for (int stage = 0; stage < HC_DEAL_STAGES - 1; stage++) { fetch(stage); }
    #pragma unroll 4
    for (int at = threadIdx.x; at < groups * HC * NT * 32; at += HC_THREADS) {
        const int l = at % 32, n = at / 32 % NT * 8 + l / 4, j = at / (32 * NT) % HC;
        const int c = first + at / (32 * NT * HC) * HC_GROUP + l % 4 * 8;
        float x[8] = {0}, low[8];
        if (n < M) { load8(x, fn + ((size_t)n * HC + j) * C + c); }
        #pragma unroll
        for (int k = 0; k < 8; k++) { low[k] = x[k] - __bfloat162float(__float2bfloat16_rn(x[k])); }
        store8((bf16 *)&parts[at / 32 * 64 + l], x);
        store8((bf16 *)&parts[at / 32 * 64 + 32 + l], low);
    }
    __syncthreads();
    float p[2][HC], mix[2][HC][HC], sum[NT][4], square[2];
    for (int stage = 0; now.tile * HC_TILE < T; stage = (stage + 1) % HC_DEAL_STAGES) {
        const int t0 = now.tile * HC_TILE + g, c = first + now.group * HC_GROUP + q * 8;
        if (now.group == 0) {
            #pragma unroll
            for (int h = 0; DEAL && h < 2; h++) {
                const size_t t = min(t0 + 8 * h, T - 1);
                load4(p[h], post + t * HC);
                #pragma unroll
                for (int i = 0; i < HC; i++) { load4(mix[h][i], comb + (t * HC + i) * HC); }
            }
            #pragma unroll
            for (int n = 0; n < NT; n++) { sum[n][0] = sum[n][1] = sum[n][2] = sum[n][3] = 0; }
            square[0] = square[1] = 0;
        }
        copy_wait<HC_DEAL_STAGES - 2>();
        const uint4 *from = mine + stage * HC_DEAL_LOADS * HC_THREADS;
        fetch((stage + HC_DEAL_STAGES - 1) % HC_DEAL_STAGES);
        uint4 y4[2][HC];                        // Y, rounded
        #pragma unroll
        for (int h = 0; h < 2; h++) {
            float y[HC][8], z[8];
            if (DEAL) {
                unpack8(z, from[(2 * HC + h) * HC_THREADS]);
                #pragma unroll
                for (int je = 0; je < HC * 8; je++) {
                    y[je / 8][je % 8] = p[h][je / 8] * z[je % 8];
                }
                #pragma unroll
                for (int i = 0; i < HC; i++) {
                    unpack8(z, from[(h * HC + i) * HC_THREADS]);
                    #pragma unroll
                    for (int je = 0; je < HC * 8; je++) {
                        y[je / 8][je % 8] += mix[h][i][je / 8] * z[je % 8];
                    }
                }
            }
            #pragma unroll
            for (int j = 0; j < HC; j++) {
                if (DEAL) { store8((bf16 *)&y4[h][j], y[j]); }
                else { y4[h][j] = from[(h * HC + j) * HC_THREADS]; }
                if (DEAL && t0 + 8 * h < T) {
                    *(uint4 *)(Y + ((size_t)(t0 + 8 * h) * HC + j) * C + c) = y4[h][j];
                }
                unpack8(z, y4[h][j]);
                #pragma unroll
                for (int e = 0; e < 8; e++) { square[h] += z[e] * z[e]; }
            }
        }
        #pragma unroll
        for (int j = 0; j < HC; j++) {
            const uint32_t a[2][4] = { { y4[0][j].x, y4[1][j].x, y4[0][j].y, y4[1][j].y },
                                       { y4[0][j].z, y4[1][j].z, y4[0][j].w, y4[1][j].w } };
            #pragma unroll
            for (int n = 0; n < 2 * NT; n++) {          // high half, low half, next block of rows
                const uint4 b = parts[((now.group * HC + j) * 2 * NT + n) * 32 + lane];
                mma_bf16(sum[n / 2], a[0], b.x, b.y);
                mma_bf16(sum[n / 2], a[1], b.z, b.w);
            }
        }
        if (now.group == groups - 1) {
            #pragma unroll
            for (int h = 0; h < 2; h++) {       // the four lanes of a token; then its M + 1 sums
                square[h] += __shfl_xor_sync(~0u, square[h], 1);
                square[h] += __shfl_xor_sync(~0u, square[h], 2);
                float *out = partial + ((size_t)blockIdx.x * T + t0 + 8 * h) * (M + 1);
                #pragma unroll
                for (int ne = 0; ne < 2 * NT; ne++) {
                    const int n = ne / 2 * 8 + 2 * q + ne % 2;
                    if (n < M && t0 + 8 * h < T) { out[n] = sum[ne / 2][2 * h + ne % 2]; }
                }
                if (q == 0 && t0 + 8 * h < T) { out[M] = square[h]; }
            }
        }
        next_round(now);
    }
}

// The slices' shares added up, in their order: a warp per token, a lane per sum.
__global__ void hc_logits_sum_kernel(real *m, real *r, const float *partial, float eps, int slices,
                                     int T, int N, int M) {
    const int t = blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32, lane = threadIdx.x % 32;
    if (t >= T) { return; }
    float sum = 0;
    for (int s = 0; s < slices && lane <= M; s++) {
        sum += partial[((size_t)s * T + t) * (M + 1) + lane];
    }
    const float rms = 1 / sqrtf(__shfl_sync(~0u, sum, M) / N + eps);
    if (lane < M) { m[(size_t)t * M + lane] = sum * rms; }
    if (lane == M) { r[t] = rms; }
}

template <int M, bool DEAL>
static void hc_deal(act *Y, real *m, real *r, const act *o, const act *X, const real *post,
                    const real *comb, const float *fn, float eps, int T, int C) {
    if (T == 0) { return; }
    const dim3 grid = hc_grid(T, C, HC_DEAL_SLICE);
    const size_t mark = workspace_mark();
    const int bytes = 16 * (hc_deal_parts<M> + HC_DEAL_STAGES * HC_DEAL_LOADS * HC_THREADS);
    float *partial = (float *)workspace(sizeof(float) * grid.x * T * (M + 1));
    auto kernel = hc_deal_forward_kernel<M, DEAL>;
    cudaCheck(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
    kernel<<<grid, HC_THREADS, bytes, stream>>>(Y, partial, o, X, post, comb, fn, T, C);
    cudaCheck(cudaGetLastError());
    hc_logits_sum_kernel<<<blocks_for(T, 8), 256, 0, stream>>>(m, r, partial, eps, grid.x, T,
                                                               HC * C, M);
    cudaCheck(cudaGetLastError());
    workspace_release(mark);
}

void hc_deal_forward_gpu(act *Y, real *m, real *r, const act *o, const act *X,
                                    const real *post, const real *comb, const float *fn, float eps,
                                    int T, int C, int M) {
    gpuRequire(C % HC_GROUP == 0 && (M == HC_MIX || M == HC));
    auto deal = M == HC ? hc_deal<HC, true> : hc_deal<HC_MIX, true>;
    deal(Y, m, r, o, X, post, comb, fn, eps, T, C);
}

void hc_logits_forward_gpu(real *m, real *r, const act *X, const float *fn, float eps,
                                      int T, int C, int M) {
    gpuRequire(C % HC_GROUP == 0 && (M == HC_MIX || M == HC));
    auto deal = M == HC ? hc_deal<HC, false> : hc_deal<HC_MIX, false>;
    deal(NULL, m, r, NULL, X, NULL, NULL, fn, eps, T, C);
}

__device__ inline float sigmoid_gpu(float x) { return 1 / (1 + expf(-x)); }

// Sinkhorn with one element of the 4 x 4 matrix per lane, row by row: 16 lanes are a token. Sums
// over a line's four lanes, to all of them; columns at step 0, 2, ..
__device__ inline float line_sum(float x, int step) {
    const int stride = step % 2 ? 1 : 4;
    x += __shfl_xor_sync(~0u, x, stride);
    return x + __shfl_xor_sync(~0u, x, 2 * stride);
}

// Element c of the mixing matrix, from its logit. sums, unless NULL, gets the divisor of every
// half-step, `stride` apart.
__device__ inline float sinkhorn(float c, float *sums, int stride, int iters, float eps) {
    float max = fmaxf(c, __shfl_xor_sync(~0u, c, 1));
    max = fmaxf(max, __shfl_xor_sync(~0u, max, 2));
    c = expf(c - max);
    c = c / line_sum(c, 1) + eps;
    for (int step = 0; step < 2 * iters - 1; step++) {
        const float sum = line_sum(c, step) + eps;
        if (sums) { sums[step * stride] = sum; }
        c = __fdividef(c, sum);
    }
    return c;
}

// 16 lanes per token. bytes: 196 per token; what it costs is 39 dependent half-steps.
__global__ void hc_weights_forward_kernel(real *pre, real *post, real *comb, const real *m,
                                          const float *base, const float *scale, float eps, int T,
                                          int M, int iters) {
    const int at = blockIdx.x * blockDim.x + threadIdx.x, e = at % 16;
    const size_t t = min(at / 16, T - 1);       // lanes past the end repeat the last token
    m += t * M;
    if (e < HC) { pre[t * HC + e] = sigmoid_gpu(m[e] * scale[0] + base[e]) + eps; }
    if (M == HC) { return; }
    if (e < HC) { post[t * HC + e] = 2 * sigmoid_gpu(m[HC + e] * scale[1] + base[HC + e]); }
    const float c = m[2 * HC + e] * scale[2] + base[2 * HC + e];
    comb[t * HC * HC + e] = sinkhorn(c, NULL, 0, iters, eps);
}

void hc_weights_forward_gpu(real *pre, real *post, real *comb, const real *m,
                                       const float *base, const float *scale, float eps, int T,
                                       int M, int iters) {
    if (T == 0) { return; }
    hc_weights_forward_kernel<<<blocks_for((size_t)T * 16, 128), 128, 0, stream>>>(
        pre, post, comb, m, base, scale, eps, T, M, iters);
    cudaCheck(cudaGetLastError());
}

// 8 channels from c on of u = sum_i pre[i] X[i] of one token.
__device__ inline void collapse8(float *u, const act *X, const float *p, int c, int C) {
    float x[8];
    #pragma unroll
    for (int k = 0; k < 8; k++) { u[k] = 0; }
    #pragma unroll
    for (int i = 0; i < HC; i++) {
        load8(x, X + (size_t)i * C + c);
        #pragma unroll
        for (int k = 0; k < 8; k++) { u[k] += p[i] * x[k]; }
    }
}

// x = w u rstd, u = sum_i pre[i] X[i]. One block per token, which keeps u in registers (up to
// C = 4,096; the rest it reads again).
//   bytes: 8 C read + 2 C written per token: 40 KiB, 168 MB at T = 4,096: 39 us.
__global__ void hc_enter_forward_kernel(act *out, real *rstd, const act *X, const real *pre,
                                        const bf16 *w, float eps, int C) {
    __shared__ float shared[32];
    const size_t t = blockIdx.x;
    const int first = threadIdx.x * 8, stride = blockDim.x * 8;
    float p[HC], u[8], g[8], sum = 0;
    load4(p, pre + t * HC);
    X += t * HC * C;
    for (int c = first; c < C; c += stride) {
        collapse8(u, X, p, c, C);
        #pragma unroll
        for (int k = 0; k < 8; k++) { sum += u[k] * u[k]; }
    }
    sum = block_sum(sum, shared);
    const float r = 1 / sqrtf(sum / C + eps);
    if (threadIdx.x == 0) { rstd[t] = r; }
    for (int c = first; c < C; c += stride) {
        if (C > stride) { collapse8(u, X, p, c, C); }
        load8(g, w + c);
        #pragma unroll
        for (int k = 0; k < 8; k++) { g[k] *= u[k] * r; }
        store8(out + t * C + c, g);
    }
}

void hc_enter_forward_gpu(act *x, real *rstd, const act *X, const real *pre,
                                     const bf16 *w, float eps, int T, int C) {
    if (T == 0) { return; }
    hc_enter_forward_kernel<<<T, row_threads(C), 0, stream>>>(x, rstd, X, pre, w, eps, C);
    cudaCheck(cudaGetLastError());
}

// N sums over a block; thread i gets the i-th.
enum { HC_SUM_THREADS = 128 };
template <int N> __device__ inline float hc_block_sums(const float (&sums)[N]) {
    __shared__ float shared[HC_SUM_THREADS / 32][N];
    float all = 0;
    #pragma unroll
    for (int i = 0; i < N; i++) {
        const float of_warp = warp_sum(sums[i]);
        if (threadIdx.x % 32 == 0) { shared[threadIdx.x / 32][i] = of_warp; }
    }
    __syncthreads();
    for (int k = 0; k < HC_SUM_THREADS / 32 && threadIdx.x < N; k++) {
        all += shared[k][threadIdx.x];
    }
    return all;
}

// do = sum_j post[j] dY[j], dpost[j] = <dY[j], o>, dcomb[i][j] = <X[i], dY[j]>. One block per
// token; 20 sums over its threads.
//   bytes: 16 C for dY and X, 4 C for o and do: 80 KiB, 336 MB at T = 4,096: 78 us.
__global__ void __launch_bounds__(HC_SUM_THREADS)
hc_deal_backward_kernel(act *do_, real *dpost, real *dcomb, const act *dY, const act *o,
                        const act *X, const real *post, int C) {
    const size_t t = blockIdx.x;
    float p[HC], sums[HC + HC * HC] = {0};
    load4(p, post + t * HC);
    for (int c = threadIdx.x * 8; c < C; c += HC_SUM_THREADS * 8) {
        float d[HC][8], x[8], out[8] = {0};
        load8(x, o + t * C + c);
        #pragma unroll
        for (int j = 0; j < HC; j++) {
            load8(d[j], dY + (t * HC + j) * C + c);
            #pragma unroll
            for (int k = 0; k < 8; k++) { sums[j] += d[j][k] * x[k]; out[k] += p[j] * d[j][k]; }
        }
        store8(do_ + t * C + c, out);
        #pragma unroll
        for (int i = 0; i < HC; i++) {
            load8(x, X + (t * HC + i) * C + c);
            #pragma unroll
            for (int j = 0; j < HC; j++) {
                #pragma unroll
                for (int k = 0; k < 8; k++) { sums[HC + i * HC + j] += x[k] * d[j][k]; }
            }
        }
    }
    const float all = hc_block_sums(sums);
    if (threadIdx.x >= HC + HC * HC) { return; }
    if (threadIdx.x < HC) { dpost[t * HC + threadIdx.x] = all; }
    else { dcomb[t * HC * HC + threadIdx.x - HC] = all; }
}

void hc_deal_backward_gpu(act *do_, real *dpost, real *dcomb, const act *dY,
                                     const act *o, const act *X, const real *post, int T, int C) {
    if (T == 0) { return; }
    hc_deal_backward_kernel<<<T, HC_SUM_THREADS, 0, stream>>>(do_, dpost, dcomb, dY, o, X, post, C);
    cudaCheck(cudaGetLastError());
}

// The backward of entering, in three kernels. With a = w dx and u = sum_i pre[i] X[i], the norm
// says
//     du = rstd a - kappa u,  kappa = rstd^3 <a, u> / C
// so all that dm needs of a token's streams are eight sums, <a, X[i]> and <u, X[i]>. One block per
// token.
//   bytes: 8 C for X, 4 C for dx per token: 48 KiB, 201 MB at T = 4,096: 47 us.
__global__ void __launch_bounds__(HC_SUM_THREADS)
hc_enter_sums_kernel(float *out, const real *dx, const act *X, const real *pre, const bf16 *w,
                     int C) {
    const size_t t = blockIdx.x;
    float p[HC], sums[2 * HC] = {0};
    load4(p, pre + t * HC);
    for (int c = threadIdx.x * 8; c < C; c += HC_SUM_THREADS * 8) {
        float a[8], g[8], u[8] = {0}, x[HC][8];
        load8(a, dx + t * C + c);
        load8(g, w + c);
        #pragma unroll
        for (int i = 0; i < HC; i++) {
            load8(x[i], X + (t * HC + i) * C + c);
            #pragma unroll
            for (int k = 0; k < 8; k++) { u[k] += p[i] * x[i][k]; }
        }
        #pragma unroll
        for (int i = 0; i < HC; i++) {
            #pragma unroll
            for (int k = 0; k < 8; k++) {
                sums[i] += a[k] * g[k] * x[i][k];
                sums[HC + i] += u[k] * x[i][k];
            }
        }
    }
    const float all = hc_block_sums(sums);
    if (threadIdx.x < 2 * HC) { out[t * 2 * HC + threadIdx.x] = all; }
}

// What dX needs of a token: r dm, 24 numbers, then kappa and `along`, the factors of u and X.
enum { HC_KAPPA = HC_MIX, HC_ALONG, HC_TOKEN = 32, HC_WEIGHTS_THREADS = 64 };

// dm by 16 lanes per token: the forward again with its divisors kept, then backwards through the
// steps.
__global__ void hc_weights_backward_kernel(float *token, const float *sums, const real *dpost,
                                           const real *dcomb, const real *m, const real *r,
                                           const real *pre, const real *rstd, const float *base,
                                           const float *scale, float eps, int T, int C, int M,
                                           int iters) {
    extern __shared__ float divisors[];         // (2*iters-1, threads)
    const int at = blockIdx.x * HC_WEIGHTS_THREADS + threadIdx.x, e = at % 16;
    const size_t t = min(at / 16, T - 1);
    const float norm = rstd[t], rms = r[t];
    float p[HC], a[HC], mean = 0, along = 0, dm = 0;
    load4(p, pre + t * HC);
    load4(a, sums + t * 2 * HC);
    #pragma unroll
    for (int i = 0; i < HC; i++) { mean += norm / C * p[i] * a[i]; }
    const float kappa = norm * norm * mean;
    m += t * M;
    token += t * HC_TOKEN;
    if (e < HC || (M > HC && e < 2 * HC)) {     // pre = s(..) + eps, post = 2 s(..)
        const float s = sigmoid_gpu(m[e] * scale[e / HC] + base[e]);
        const float dy = e < HC ? norm * sums[t * 2 * HC + e] - kappa * sums[t * 2 * HC + HC + e]
                                : 2 * dpost[t * HC + e - HC];
        dm = dy * s * (1 - s) * scale[e / HC];
        along = m[e] * dm;
        token[e] = rms * dm;
    }
    if (M > HC) {
        float *mine = divisors + threadIdx.x;
        float d = dcomb[t * HC * HC + e];
        float c = m[2 * HC + e] * scale[2] + base[2 * HC + e];
        c = sinkhorn(c, mine, HC_WEIGHTS_THREADS, iters, eps);
        for (int step = 2 * iters - 2; step >= 0; step--) {
            // forward: y_b = x_b / S, so dx_b = (dy_b - sum_k dy_k y_k) / S
            const float sum = mine[step * HC_WEIGHTS_THREADS];
            d = __fdividef(d - line_sum(d * c, step), sum);
            c *= sum;
        }
        c -= eps;                               // p + eps with p a softmax: p (da - <da, p>)
        dm = c * (d - line_sum(d * c, 1)) * scale[2];
        along += m[2 * HC + e] * dm;
        token[2 * HC + e] = rms * dm;
    }
    #pragma unroll
    for (int k = 1; k < 16; k *= 2) { along += __shfl_xor_sync(~0u, along, k); }
    if (e == 0) {
        token[HC_KAPPA] = kappa;
        token[HC_ALONG] = rms * rms / (HC * C) * along;
    }
}

// dX[i] = sum_j comb[i][j] dY[j] + pre[i] du + (fn^T r dm)[i] - along X[i]; dX holds dY on entry
// (NEXT; at the head there is none). fn is rounded to tf32, as is r dm: 2^-12, where dX rounds to
// 2^-9. Tokens come last to first: of what hc_enter_sums_kernel read last, some is still in L2.
//   bytes: 8 C for dY, 8 C for X, 4 C for dx, 8 C for dX: 112 KiB, 470 MB at T = 4,096: 110 us.
//   operations: 2 x 24 x 16,384 per token on tensor cores, 3.2 GFLOP in tf32: 13 us.
enum { HC_ENTER_SLICE = 128, HC_ENTER_STAGES = 2, HC_ENTER_LOADS = 2 * (2 * HC + 2) };
template <int M> constexpr int hc_enter_parts = HC_ENTER_SLICE / HC_GROUP * HC * ((M + 7) / 8) * 64;
template <int M, bool NEXT>
__global__ void __launch_bounds__(HC_THREADS, 1)
hc_enter_backward_kernel(act *dX, const real *dx, const act *X, const real *pre, const real *comb,
                         const real *rstd, const float *token, const float *fn, const bf16 *w,
                         int T, int C) {
    constexpr int KT = (M + 7) / 8;             // blocks of 8 rows of fn
    extern __shared__ uint4 parts[];            // (groups,HC,2*KT,32)
    uint4 *mine = parts + hc_enter_parts<M> + threadIdx.x;      // (stages,loads,threads)
    const int first = blockIdx.x * HC_ENTER_SLICE, tiles = (T + HC_TILE - 1) / HC_TILE;
    const int groups = min(HC_ENTER_SLICE, C - first) / HC_GROUP;
    const int lane = threadIdx.x % 32, g = lane / 4, q = lane % 4;
    HcRound now = { (int)blockIdx.y * HC_WARPS + (int)threadIdx.x / 32, 0, groups,
                    (int)gridDim.y * HC_WARPS }, ahead = now;
    auto fetch = [&](int stage) {
        uint4 *to = mine + stage * HC_ENTER_LOADS * HC_THREADS;
        #pragma unroll
        for (int h = 0; h < 2 && ahead.tile < tiles; h++) {
            const size_t t = min((tiles - 1 - ahead.tile) * HC_TILE + g + 8 * h, T - 1);
            const int c = first + ahead.group * HC_GROUP + q * 8, at = h * HC_ENTER_LOADS / 2;
            #pragma unroll
            for (int i = 0; i < HC; i++) {
                const size_t stream_i = (t * HC + i) * C + c;
                copy16_ahead(to + (at + i) * HC_THREADS, X + stream_i);
                if (NEXT) { copy16_ahead(to + (at + HC + i) * HC_THREADS, dX + stream_i); }
            }
            copy16_ahead(to + (at + 2 * HC) * HC_THREADS, dx + t * C + c);
            copy16_ahead(to + (at + 2 * HC + 1) * HC_THREADS, dx + t * C + c + 4);
            if (ahead.group == 0) {
                touch(token + t * HC_TOKEN + q * 8);
                touch(NEXT && q < 2 ? comb + t * HC * HC + q * 8 : pre + t * HC);
                touch(rstd + t);
            }
        }
        copy_commit();
        next_round(ahead);
    };
    #pragma unroll
    for (int stage = 0; stage < HC_ENTER_STAGES - 1; stage++) { fetch(stage); }
    #pragma unroll 4
    for (int at = threadIdx.x; at < groups * HC * KT * 64; at += HC_THREADS) {
        const int c = at % 8 * 4, k = at / 8 % (8 * KT), j = at / (64 * KT) % HC;
        const int group = at / (64 * KT * HC);
        float x[4] = {0};
        if (k < M) { load4(x, fn + ((size_t)k * HC + j) * C + first + group * HC_GROUP + c); }
        #pragma unroll
        for (int e = 0; e < 4; e++) {
            // Block v of 8 columns has the channels 8 q + 2 v, 8 q + 2 v + 1 of every q.
            const int v = (c + e) % 8 / 2, column = (c + e) / 8 * 2 + e % 2;
            const int word = (v * KT + k / 8) * 2 + k % 8 / 4, of_lane = column * 4 + k % 4;
            const int at_word = ((group * HC + j) * 2 * KT + word / 4) * 32 + of_lane;
            ((uint32_t *)&parts[at_word])[word % 4] = round_tf32(x[e]);
        }
    }
    __syncthreads();
    uint32_t a[KT][4];
    float p[2][HC], norm[2], kappa[2], along[2];
    for (int stage = 0; now.tile < tiles; stage = (stage + 1) % HC_ENTER_STAGES) {
        const int t0 = (tiles - 1 - now.tile) * HC_TILE + g;
        const int c = first + now.group * HC_GROUP + q * 8;
        const size_t t[2] = { (size_t)min(t0, T - 1), (size_t)min(t0 + 8, T - 1) };
        #pragma unroll
        for (int h = 0; h < 2 && now.group == 0; h++) {
            const float *of = token + t[h] * HC_TOKEN;
            load4(p[h], pre + t[h] * HC);
            norm[h] = rstd[t[h]];
            kappa[h] = of[HC_KAPPA];
            along[h] = of[HC_ALONG];
            #pragma unroll
            for (int k = 0; k < KT; k++) {
                a[k][h] = 8 * k + q < M ? round_tf32(of[8 * k + q]) : 0;
                a[k][2 + h] = 8 * k + q + 4 < M ? round_tf32(of[8 * k + q + 4]) : 0;
            }
        }
        copy_wait<HC_ENTER_STAGES - 2>();
        const uint4 *from = mine + stage * HC_ENTER_LOADS * HC_THREADS;
        fetch((stage + HC_ENTER_STAGES - 1) % HC_ENTER_STAGES);
        float du[2][8], weight[8], z[8];
        load8(weight, w + c);
        #pragma unroll
        for (int h = 0; h < 2; h++) {
            const uint4 *half = from + h * HC_ENTER_LOADS / 2 * HC_THREADS;
            load4(du[h], (const float *)(half + 2 * HC * HC_THREADS));
            load4(du[h] + 4, (const float *)(half + (2 * HC + 1) * HC_THREADS));
            #pragma unroll
            for (int e = 0; e < 8; e++) { du[h][e] *= norm[h] * weight[e]; }
            #pragma unroll
            for (int i = 0; i < HC; i++) {
                unpack8(z, half[i * HC_THREADS]);
                #pragma unroll
                for (int e = 0; e < 8; e++) { du[h][e] -= kappa[h] * p[h][i] * z[e]; }
            }
        }
        #pragma unroll
        for (int i = 0; i < HC; i++) {
            float sum[4][4];
            uint4 b[2 * KT];
            #pragma unroll
            for (int k = 0; k < 2 * KT; k++) {
                b[k] = parts[((now.group * HC + i) * 2 * KT + k) * 32 + lane];
            }
            const uint32_t *word = (const uint32_t *)b;
            #pragma unroll
            for (int v = 0; v < 4; v++) {
                sum[v][0] = sum[v][1] = sum[v][2] = sum[v][3] = 0;
                #pragma unroll
                for (int k = 0; k < KT; k++) {
                    mma_tf32(sum[v], a[k], word[(v * KT + k) * 2], word[(v * KT + k) * 2 + 1]);
                }
            }
            #pragma unroll
            for (int h = 0; h < 2; h++) {
                const uint4 *half = from + h * HC_ENTER_LOADS / 2 * HC_THREADS;
                float out[8], mix[HC];
                unpack8(z, half[i * HC_THREADS]);
                #pragma unroll
                for (int e = 0; e < 8; e++) {
                    out[e] = sum[e / 2][2 * h + e % 2] + p[h][i] * du[h][e] - along[h] * z[e];
                }
                if (NEXT) {
                    load4(mix, comb + (t[h] * HC + i) * HC);
                    #pragma unroll
                    for (int j = 0; j < HC; j++) {
                        unpack8(z, half[(HC + j) * HC_THREADS]);
                        #pragma unroll
                        for (int e = 0; e < 8; e++) { out[e] += mix[j] * z[e]; }
                    }
                }
                if (t0 + 8 * h < T) { store8(dX + (t[h] * HC + i) * C + c, out); }
            }
        }
        next_round(now);
    }
}

void hc_enter_backward_gpu(act *dX, const real *dx, const real *dpost, const real *dcomb,
                                      const act *X, const real *m, const real *r, const real *pre,
                                      const real *comb, const real *rstd, const float *fn,
                                      const float *base, const float *scale, const bf16 *w,
                                      float eps, int T, int C, int M, int iters) {
    if (T == 0) { return; }
    gpuRequire(C % HC_GROUP == 0 && iters <= 64 && (M == HC_MIX || M == HC));
    const size_t mark = workspace_mark();
    float *sums = (float *)workspace(sizeof(float) * T * 2 * HC);
    float *token = (float *)workspace(sizeof(float) * T * HC_TOKEN);
    hc_enter_sums_kernel<<<T, HC_SUM_THREADS, 0, stream>>>(sums, dx, X, pre, w, C);
    cudaCheck(cudaGetLastError());
    hc_weights_backward_kernel<<<blocks_for((size_t)T * 16, HC_WEIGHTS_THREADS), HC_WEIGHTS_THREADS,
                                 sizeof(float) * 2 * iters * HC_WEIGHTS_THREADS, stream>>>(
        token, sums, dpost, dcomb, m, r, pre, rstd, base, scale, eps, T, C, M, iters);
    cudaCheck(cudaGetLastError());
    const int bytes = 16 * ((M == HC ? hc_enter_parts<HC> : hc_enter_parts<HC_MIX>) +
                            HC_ENTER_STAGES * HC_ENTER_LOADS * HC_THREADS);
    auto kernel = M == HC ? hc_enter_backward_kernel<HC, false>
                          : hc_enter_backward_kernel<HC_MIX, true>;
    cudaCheck(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
    kernel<<<hc_grid(T, C, HC_ENTER_SLICE), HC_THREADS, bytes, stream>>>(
        dX, dx, X, pre, comb, rstd, token, fn, w, T, C);
    cudaCheck(cudaGetLastError());
    workspace_release(mark);
}

static void enter(const Site &s) {
    hc_weights_forward_gpu(s.pre, s.post, s.comb, s.m, s.base, s.scale, EPS, s.T, HC_MIX, ITERS);
    hc_enter_forward_gpu(s.x, s.rstd, s.X, s.pre, s.w, EPS, s.T, s.C);
}
static void deal(const Site &s) {
    hc_deal_forward_gpu(s.Y, s.next_m, s.next_r, s.o, s.X, s.post, s.comb, s.next, EPS, s.T, s.C,
                        HC_MIX);
}
static void deal_back(const Site &s) {
    hc_deal_backward_gpu(s.do_, s.dpost, s.dcomb, s.dX, s.o, s.X, s.post, s.T, s.C);
}
static void enter_back(const Site &s) {
    hc_enter_backward_gpu(s.dX, s.dx, s.dpost, s.dcomb, s.X, s.m, s.r, s.pre, s.comb, s.rstd, s.fn,
                          s.base, s.scale, s.w, EPS, s.T, s.C, HC_MIX, ITERS);
}
static void forward(const Site &s) { enter(s); deal(s); }
static void backward(const Site &s) { deal_back(s); enter_back(s); }

} // namespace v3

// -------------------------------------------------------------------------------------------------
// The oracle: the C text of a site (train.c, part 4) in double, token by token

typedef std::vector<double> Row;

static Row widen(const float *p, size_t n) {
    std::vector<float> h = to_host(p, n);
    return Row(h.begin(), h.end());
}
static Row widen(const bf16 *p, size_t n) {
    std::vector<bf16> h = to_host(p, n);
    Row y(n);
    for (size_t i = 0; i < n; i++) { y[i] = (double)(float)h[i]; }
    return y;
}

typedef struct { Row x, Y, next_m, do_, dpost, dcomb, dX; } Answer;

static double inverse_rms(const double *x, int n) {
    double sum = 0;
    for (int i = 0; i < n; i++) { sum += x[i] * x[i]; }
    return 1 / sqrt(sum / n + (double)EPS);
}

static Answer answer(const Site &s) {
    const size_t T = s.T, C = s.C, N = HC * C;
    const Row X = widen(s.X, T * N), o = widen(s.o, T * C), fn = widen(s.fn, HC_MIX * N);
    const Row next = widen(s.next, HC_MIX * N), base = widen(s.base, HC_MIX), w = widen(s.w, C);
    const Row scale = widen(s.scale, 3), dx = widen(s.dx, T * C), dY = widen(s.dX32, T * N);
    Answer a = { Row(T * C), Row(T * N), Row(T * HC_MIX), Row(T * C), Row(T * HC), Row(T * HC * HC),
                 Row(T * N) };
    for (size_t t = 0; t < T; t++) {
        const double *x = &X[t * N], *d = &dY[t * N];
        double m[HC_MIX], pre[HC], post[HC], comb[HC * HC], dm[HC_MIX], mean = 0, along = 0;
        double r = inverse_rms(x, N);
        for (int i = 0; i < HC_MIX; i++) {
            m[i] = 0;
            for (size_t k = 0; k < N; k++) { m[i] += r * fn[i * N + k] * x[k]; }
        }
        for (int i = 0; i < HC; i++) {
            pre[i] = 1 / (1 + exp(-(m[i] * scale[0] + base[i]))) + (double)EPS;
            post[i] = 2 / (1 + exp(-(m[HC + i] * scale[1] + base[HC + i])));
        }
        for (int i = 0; i < HC * HC; i++) { comb[i] = m[2 * HC + i] * scale[2] + base[2 * HC + i]; }
        v1::sinkhorn<double>(comb, NULL, (double)EPS);
        Row u(C), du(C);
        for (size_t c = 0; c < C; c++) {
            for (int i = 0; i < HC; i++) { u[c] += pre[i] * x[i * C + c]; }
        }
        const double rstd = inverse_rms(u.data(), C);
        for (size_t c = 0; c < C; c++) {
            a.x[t * C + c] = w[c] * u[c] * rstd;
            for (int j = 0; j < HC; j++) {
                double y = post[j] * o[t * C + c];
                for (int i = 0; i < HC; i++) { y += comb[i * HC + j] * x[i * C + c]; }
                a.Y[t * N + j * C + c] = y;
                a.do_[t * C + c] += post[j] * d[j * C + c];
            }
            mean += dx[t * C + c] * w[c] * u[c] * rstd / C;
        }
        Row stored(N);                      // the streams as they are stored
        for (size_t k = 0; k < N; k++) {
            stored[k] = (double)__bfloat162float(__float2bfloat16((float)a.Y[t * N + k]));
        }
        r = inverse_rms(stored.data(), N);
        for (int i = 0; i < HC_MIX; i++) {
            for (size_t k = 0; k < N; k++) {
                a.next_m[t * HC_MIX + i] += r * next[i * N + k] * stored[k];
            }
        }
        r = inverse_rms(x, N);
        for (size_t c = 0; c < C; c++) {
            du[c] = rstd * (dx[t * C + c] * w[c] - u[c] * rstd * mean);
        }
        double logit[HC * HC];
        for (int j = 0; j < HC; j++) {
            double dpre = 0, dpost = 0;
            for (size_t c = 0; c < C; c++) {
                dpre += du[c] * x[j * C + c];
                dpost += d[j * C + c] * o[t * C + c];
            }
            a.dpost[t * HC + j] = dpost;
            const double y = pre[j] - (double)EPS;
            dm[j] = dpre * y * (1 - y) * scale[0];
            dm[HC + j] = dpost * post[j] * (1 - post[j] / 2) * scale[1];
            for (int i = 0; i < HC; i++) {
                double sum = 0;
                for (size_t c = 0; c < C; c++) { sum += d[j * C + c] * x[i * C + c]; }
                a.dcomb[t * HC * HC + i * HC + j] = dm[2 * HC + i * HC + j] = sum;
            }
        }
        for (int i = 0; i < HC * HC; i++) {
            logit[i] = m[2 * HC + i] * scale[2] + base[2 * HC + i];
        }
        v1::sinkhorn<double>(logit, dm + 2 * HC, (double)EPS);
        for (int i = 0; i < HC * HC; i++) { dm[2 * HC + i] *= scale[2]; }
        for (int i = 0; i < HC_MIX; i++) { along += r * r / N * m[i] * dm[i]; }
        for (size_t k = 0; k < N; k++) {
            double sum = pre[k / C] * du[k % C] - along * x[k];
            for (int j = 0; j < HC; j++) { sum += comb[k / C * HC + j] * d[j * C + k % C]; }
            for (int i = 0; i < HC_MIX; i++) { sum += r * dm[i] * fn[i * N + k]; }
            a.dX[t * N + k] = sum;
        }
    }
    return a;
}

// -------------------------------------------------------------------------------------------------
// Checks and times

static float *random_floats(size_t n, uint64_t seed, float std) {
    std::vector<float> h(n);
    for (size_t i = 0; i < n; i++) { h[i] = std * hash_normal(seed, i); }
    return to_device(h);
}

static Site site(int T, int C) {
    const size_t n = (size_t)T * C, N = HC * n;
    Site s;
    s.T = T, s.C = C;
    s.X = random_normal(N, 1, 1), s.o = random_normal(n, 2, 1), s.w = random_normal(C, 3, 1);
    s.fn = random_floats((size_t)HC_MIX * HC * C, 4, 1 / sqrtf((float)HC * C));
    s.next = random_floats((size_t)HC_MIX * HC * C, 5, 1 / sqrtf((float)HC * C));
    s.base = random_floats(HC_MIX, 6, 1), s.scale = random_floats(3, 7, 1);
    s.dx = random_floats(n, 8, 1), s.dX = random_normal(N, 9, 1);
    std::vector<bf16> dY = to_host(s.dX, N);
    s.dX32 = to_device(std::vector<float>(dY.begin(), dY.end()));
    s.Y = device_alloc<act>(N), s.x = device_alloc<act>(n), s.do_ = device_alloc<act>(n);
    s.u = device_alloc<act>(n), s.du = device_alloc<act>(n);
    float **small[] = { &s.m, &s.next_m, &s.dm, &s.r, &s.next_r, &s.rstd, &s.pre, &s.post, &s.comb,
                        &s.dpost, &s.dcomb, &s.dpre };
    for (float **p : small) {
        *p = device_alloc<float>((size_t)T * HC_MIX);
        cudaCheck(cudaMemset(*p, 0xFF, sizeof(float) * T * HC_MIX));
    }
    v3::hc_logits_forward_gpu(s.m, s.r, s.X, s.fn, EPS, T, C, HC_MIX);
    return s;
}

static void site_free(const Site &s) {
    void *all[] = { s.X, s.o, s.Y, s.x, s.do_, s.dX, s.u, s.du, s.fn, s.next, s.base, s.scale, s.m,
                    s.r, s.next_m, s.next_r, s.pre, s.post, s.comb, s.rstd, s.dx, s.dX32, s.dpost,
                    s.dcomb, s.dpre, s.dm, s.w };
    for (void *p : all) { cudaCheck(cudaFree(p)); }
}

static int checks, failures;
static void check(const char *version, const char *what, const Row &got, const Row &want,
                  double tol) {
    const double error = relative_error(got, want);
    checks++;
    if (!(error <= tol)) {
        failures++;
        printf("FAIL %s %s: relative error %g, at most %g\n", version, what, error, tol);
    }
}

typedef struct {
    const char *name;
    void (*forward)(const Site &), (*backward)(const Site &);
} Version;
static const Version versions[] = {
    { "v1", v1::forward, v1::backward }, { "v2", v2::forward, v2::backward },
    { "v3", v3::forward, v3::backward } };

// Every version against the oracle, from poisoned outputs; then four more runs of the same bits.
static void check_shape(int T, int C) {
    const size_t n = (size_t)T * C, N = HC * n;
    for (int v = 0; v < 3; v++) {
        uint64_t bits = 0;
        Answer a;
        for (int run = 0; run < 5; run++) {
            const Site s = site(T, C);
            if (run == 0) { a = answer(s); }
            cudaCheck(cudaMemset(s.Y, 0xFF, N * 2));
            cudaCheck(cudaMemset(s.x, 0xFF, n * 2));
            cudaCheck(cudaMemset(s.do_, 0xFF, n * 2));
            versions[v].forward(s);
            versions[v].backward(s);
            const uint64_t now = device_hash(s.Y, N * 2) ^ device_hash(s.x, n * 2)
                ^ device_hash(s.do_, n * 2) ^ device_hash(s.next_m, (size_t)T * HC_MIX * 4)
                ^ (v == 2 ? device_hash(s.dX, N * 2) : device_hash(s.dX32, N * 4));
            checks += run > 0;
            if (run && now != bits) {
                failures++;
                printf("FAIL %s: other bits\n", versions[v].name);
            }
            bits = now;
            if (run == 0) {
                const char *name = versions[v].name;
                check(name, "x", widen(s.x, n), a.x, 4e-3);
                check(name, "Y", widen(s.Y, N), a.Y, 4e-3);
                check(name, "next m", widen(s.next_m, (size_t)T * HC_MIX), a.next_m, 1e-3);
                check(name, "do", widen(s.do_, n), a.do_, 4e-3);
                check(name, "dpost", widen(s.dpost, (size_t)T * HC), a.dpost, 1e-4);
                check(name, "dcomb", widen(s.dcomb, (size_t)T * HC * HC), a.dcomb, 1e-4);
                check(name, "dX", v == 2 ? widen(s.dX, N) : widen(s.dX32, N), a.dX, 4e-3);
            }
            site_free(s);
        }
    }
}

// Inputs are larger than L2 (X alone 134 MB), so one set is enough.
static void report(const char *what, const Site &s, void (*f)(const Site &), double KiB, int slow) {
    const float ms = time_ms([&](int) { f(s); }, slow ? 3 : 15, slow ? 1 : 5);
    const double rate = KiB * 1024 * s.T * (s.C / 4096.0) / ms * 1e-6;
    printf("%-34s %8.1f us  %4.0f KiB/token  %5.0f GB/s  %3.0f %%\n", what, ms * 1e3, KiB, rate,
           100 * rate / CEILING_GBS);
}

int main(int argc, char **argv) {
    work.base = device_alloc<unsigned char>((size_t)256 << 20);
    check_shape(37, 4096);
    check_shape(300, 192);
    check_shape(1, 128);
    printf("%d checks, %d failed\n", checks, failures);
    if (failures || (argc > 1 && strcmp(argv[1], "check") == 0)) { return failures != 0; }
    const int lengths[] = { 4096, 16384 };
    for (int T : lengths) {
        const Site s = site(T, 4096);
        printf("%d tokens x 4 x 4,096\n", T);
        for (int v = T > 4096 ? 1 : 0; v < 3; v++) {
            char name[64];
            snprintf(name, sizeof name, "%s forward", versions[v].name);
            report(name, s, versions[v].forward, v == 2 ? 112 : 160, v == 0);
            snprintf(name, sizeof name, "%s backward", versions[v].name);
            report(name, s, versions[v].backward, v == 2 ? 240 : 536, v == 0);
        }
        report("   v3 weights, collapse, norm", s, v3::enter, 40, 0);
        report("   v3 deal, next site's logits", s, v3::deal, 72, 0);
        report("   v3 deal backward", s, v3::deal_back, 80, 0);
        report("   v3 enter backward", s, v3::enter_back, 160, 0);
        site_free(s);
    }
    return 0;
}
