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
//       dm needs. Shipped: this rung is kernels.cu itself.
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
// Build: nvcc -O3 -std=c++17 --extended-lambda -gencode=arch=compute_90a,code=sm_90a
//        -diag-suppress 177 hyper_connections.cu -lcublas -o hyper_connections
#include "../../kernels.cu"
#include "common.h"

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

// m = r (fn X), r = 1 / rms. A block takes HC_TOKENS tokens; each thread walks every blockDim-th
// group of 4 columns, keeps HC_TOKENS x M sums, and the block adds them up at the end.
//   operations: 2 x 24 x 16,384 per token, 3.2 GFLOP at T = 4,096: 54 us at fp32 rate, against
//   31 us to read X. fn (1.6 MB) comes from L2 once per HC_TOKENS tokens.
enum { HC_TOKENS = 4, HC_THREADS = 256, M = HC_MIX };

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
                                      int T, int C) {
    if (T == 0) { return; }
    const int grid = blocks_for(T, HC_TOKENS);
    hc_logits_forward_kernel<<<grid, HC_THREADS, 0, stream>>>(m, r, X, fn, eps, T, HC * C);
    cudaCheck(cudaGetLastError());
}

// dX += r fn^T dm - (r^2 / N) <m, dm> X. A block takes HC_TOKENS tokens and HC_THREADS * 4 columns;
// fn's columns are read once per block.
//   bytes: 8 N for dX, 2 N for X per token: 10 x 16,384 = 160 KiB, 671 MB at T = 4,096: 157 us.
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
                                       const act *X, const float *fn, int T, int C) {
    if (T == 0) { return; }
    const int N = HC * C;
    const dim3 grid(blocks_for(T, HC_TOKENS), blocks_for(N, HC_THREADS * 4));
    hc_logits_backward_kernel<<<grid, HC_THREADS, 0, stream>>>(dX, dm, m, r, X, fn, T, N);
    cudaCheck(cudaGetLastError());
}

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
    v2::hc_logits_forward_gpu(s.next_m, s.next_r, s.Y, s.next, EPS, s.T, s.C);
}

static void backward(const Site &s) {
    hc_deal_backward_gpu(s.do_, s.dpost, s.dcomb, s.dX32, s.o, s.X, s.post, s.comb, s.T, s.C);
    rmsnorm_backward_gpu(s.du, s.dx, s.u, s.rstd, s.w, s.T, s.C);
    hc_collapse_backward_gpu(s.dX32, s.dpre, s.du, s.X, s.pre, s.T, s.C);
    hc_weights_backward_gpu(s.dm, s.dpre, s.dpost, s.dcomb, s.m, s.base, s.scale, EPS, s.T, ITERS);
    hc_logits_backward_gpu(s.dX32, s.dm, s.m, s.r, s.X, s.fn, s.T, s.C);
}

} // namespace v2

// -------------------------------------------------------------------------------------------------
// Version 3, shipped: the launchers of kernels.cu, part 7, where the kernels are explained

namespace v3 {

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
    hc_logits_forward_gpu(s.m, s.r, s.X, s.fn, EPS, T, C, HC_MIX);
    return s;
}

static void site_free(const Site &s) {
    void *all[] = { s.X, s.o, s.Y, s.x, s.do_, s.dX, s.u, s.du, s.fn, s.next, s.base, s.scale, s.m,
                    s.r, s.next_m, s.next_r, s.pre, s.post, s.comb, s.rstd, s.dx, s.dX32, s.dpost,
                    s.dcomb, s.dpre, s.dm, s.w };
    for (void *p : all) { cudaCheck(cudaFree(p)); }
}

static void check_row(const char *version, const char *what, const Row &got, const Row &want,
                      double tol) {
    const double error = relative_error(got, want);
    check(error <= tol, "%s %s: relative error %g, at most %g", version, what, error, tol);
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
            if (run) { check(now == bits, "%s: other bits", versions[v].name); }
            bits = now;
            if (run == 0) {
                const char *name = versions[v].name;
                check_row(name, "x", widen(s.x, n), a.x, 4e-3);
                check_row(name, "Y", widen(s.Y, N), a.Y, 4e-3);
                check_row(name, "next m", widen(s.next_m, (size_t)T * HC_MIX), a.next_m, 1e-3);
                check_row(name, "do", widen(s.do_, n), a.do_, 4e-3);
                check_row(name, "dpost", widen(s.dpost, (size_t)T * HC), a.dpost, 1e-4);
                check_row(name, "dcomb", widen(s.dcomb, (size_t)T * HC * HC), a.dcomb, 1e-4);
                check_row(name, "dX", v == 2 ? widen(s.dX, N) : widen(s.dX32, N), a.dX, 4e-3);
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
    ladder_workspace((size_t)256 << 20);
    check_shape(37, 4096);
    check_shape(300, 192);
    check_shape(1, 128);
    printf("%d checks, %d failed\n", checks_done, checks_failed);
    if (checks_failed || (argc > 1 && strcmp(argv[1], "check") == 0)) { return checks_failed != 0; }
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
