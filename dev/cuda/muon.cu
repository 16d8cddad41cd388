// muon.cu: one step of Muon over all factors, lora.c section 7. One idea per rung:
//   v1  a block per slice, X in global memory, where the gradient was
//   v2  X in shared memory where one block can hold it
//   v3  a slice is a cluster of blocks, each with some columns of X in shared memory: what one
//       block cannot hold fits, and blocks are small enough that an SM has two, so that the one's
//       arithmetic hides behind the other's memory. Shipped.
// It is one kernel: the rungs are the bytes of X that a block may have (0: v1), and how many blocks
// may share a slice.
//
// Arithmetic, full model at r 8 on 8 ranks: attention and shared 43 x 14 slices, experts 43 x 192,
// 228 M elements. Muon reads g, m, p and writes m, p: 20 bytes each, 4.57 GB, 1.07 ms at 4,277
// GB/s; AdamW 28 bytes, 6.4 GB, 1.49 ms. Per element of a slice with 8 rows two Gram matrices take
// 2 x 4.5 and two products with Q 2 x 8 multiply-adds: 5.7 G, 0.2 ms of 132 SMs. Shared memory is
// passed 9 times, 8.2 GB, 0.5 ms at 132 x 128 bytes a clock. So memory bounds it, if these hide.
//
// Measured (one H200, ms of a step; AdamW 1.72 at r 8, 3.44 at r 16):
//                                             r 8: gram  standard      r 16: gram
//   v1, 256 threads, 1 element at a time          7.11      9.06           24.6
//   v1, 4 elements at a time                      3.82                     14.1
//   v2, one block of up to 200 KB                 3.52                     12.3
//   v3, 64 KB, 256 threads, two per SM            2.26      3.24            8.5     shipped
//   v3, 64 KB, 80 registers: three per SM         2.50      3.25            7.1
//   v3, 64 KB, 512 threads, one per SM            2.82      4.10            9.4
//   v3, 32 KB, 128 threads, five per SM           2.37                     10.0
// At r 16, 43 slices of 32,768 columns, which 16 blocks of 64 KB cannot hold, take 3.5 ms of the
// 8.5 (2.1 with 4 elements at a time, a kernel more per rank). What mattered most: no array of sums
// that is indexed at run time (in local memory the same kernel took 3.67 ms); sums over a warp by
// exchanging halves; no division per element to find its place.
//
//     nvcc -O3 -std=c++17 -gencode=arch=compute_90a,code=sm_90a muon.cu -o muon && ./muon
#include "common.h"
#include <cooperative_groups.h>

// -------------------------------------------------------------------------------------------------
// 1 The kernel

namespace muon {
enum { THREADS = 256, WARPS = THREADS / 32, TILE = 8, ROUNDS = 5, BLOCKS_MAX = 16 };

struct Slice { size_t at, rows, cols; };

struct Step {
    float *p, *m, *g;
    const Slice *slices;        // of this launch
    float scale, old, fresh, keep;
    double lr;
    int restarts;               // bit t: before round t
    int n, count;               // the short side, and how many of the other's columns a block has
};

// What a block has in shared memory besides its part of X.
template <int N> struct Room {
    float r[N * N], q[N * N], z[N * N], next[N * N], p[N * N];
    float part[2][N * N];       // this block's part of R, of two Gram matrices in turn
    float warp[WARPS][TILE * TILE];
    double sum[WARPS], norm;    // this block's part of |U|^2
    int state;                  // bit 0: some gradient is not zero, bit 1: one is not finite
};

__device__ inline float warp_sum(float x) {
    #pragma unroll
    for (int k = 16; k > 0; k /= 2) { x += __shfl_xor_sync(~0u, x, k); }
    return x;
}
template <int V> __device__ inline void load(float *x, const float *p) {
    if (V == 4) { *(float4 *)x = *(const float4 *)p; } else { *x = *p; }
}
template <int V> __device__ inline void store(float *p, const float *x) {
    if (V == 4) { *(float4 *)p = *(const float4 *)x; } else { *p = *x; }
}

// Where X is: n rows, the block's columns first .. first + count - 1 of all m.
struct Columns {
    float *x;                   // element (i,j) of the block at x[i * down + j * right]
    int down, right;
    int n, m, first, count;
    bool wide;                  // stored row by row, n rows; else m rows of n
};

// A thread's way through the block's elements in the order of memory, V at a time: (i,j) and its
// V - 1 neighbours in memory, then those THREADS V further on.
template <int V, bool WIDE, bool SHARED> struct Walk {
    int i, j;
    __device__ Walk(const Columns &c) {
        const int e = threadIdx.x * V, length = WIDE ? c.count : c.n;
        i = WIDE ? e / length : e % length, j = WIDE ? e % length : e / length;
    }
    __device__ void next(const Columns &c) {
        if (WIDE) {
            for (j += THREADS * V; j >= c.count; j -= c.count) { i++; }
        } else {
            i += THREADS * V % c.n, j += THREADS * V / c.n;
            if (i >= c.n) { i -= c.n, j++; }
        }
    }
    __device__ bool inside(const Columns &c) const { return WIDE ? i < c.n : j < c.count; }
    // Its place in the slice.
    __device__ int at(const Columns &c) const {
        return WIDE ? i * c.m + c.first + j : (c.first + j) * c.n + i;
    }
    // From X, or to it.
    template <bool STORE> __device__ void move(float *x, const Columns &c) const {
        if constexpr (WIDE || !SHARED) {
            float *p = c.x + (SHARED ? i * c.down + j : at(c));
            if (STORE) { store<V>(p, x); } else { load<V>(x, p); }
        } else {
            #pragma unroll
            for (int v = 0, row = i, column = j; v < V; v++) {
                float *p = c.x + row * c.down + column;
                if (STORE) { *p = x[v]; } else { x[v] = *p; }
                if (++row == c.n) { row = 0, column++; }
            }
        }
    }
};

enum { BATCH = 4 };             // loads that a thread has under way

// Reads the gradient, into X if that is in shared memory; what it is like, as in Room.
template <int V, bool WIDE, bool SHARED>
__device__ int read_gradient(const Columns &c, const float *g) {
    int state = 0;
    for (Walk<V, WIDE, SHARED> w(c); w.inside(c); ) {
        float x[BATCH][V];
        Walk<V, WIDE, SHARED> here = w;
        #pragma unroll
        for (int u = 0; u < BATCH; u++, w.next(c)) {
            if (w.inside(c)) { load<V>(x[u], g + w.at(c)); }
        }
        #pragma unroll
        for (int u = 0; u < BATCH; u++, here.next(c)) {
            if (!here.inside(c)) { break; }
            #pragma unroll
            for (int v = 0; v < V; v++) { state |= (x[u][v] != 0) | !isfinite(x[u][v]) << 1; }
            if (SHARED) { here.template move<true>(x[u], c); }
        }
    }
    return state;
}

// Moments, and U in place of the gradient. Returns this thread's part of |U|^2.
template <int V, bool WIDE, bool SHARED>
__device__ double update_moments(const Columns &c, float *m, const Step &s) {
    double sum = 0;
    for (Walk<V, WIDE, SHARED> w(c); w.inside(c); ) {
        float x[V], old[BATCH][V];
        Walk<V, WIDE, SHARED> here = w;
        #pragma unroll
        for (int u = 0; u < BATCH; u++, w.next(c)) {
            if (w.inside(c)) { load<V>(old[u], m + w.at(c)); }
        }
        #pragma unroll
        for (int u = 0; u < BATCH; u++, here.next(c)) {
            if (!here.inside(c)) { break; }
            here.template move<false>(x, c);
            #pragma unroll
            for (int v = 0; v < V; v++) {
                const float g = x[v] * s.scale;
                old[u][v] = s.old * old[u][v] + s.fresh * g;
                x[v] = s.fresh * g + s.old * old[u][v];
                sum += (double)x[v] * x[v];
            }
            store<V>(m + here.at(c), old[u]);
            here.template move<true>(x, c);
        }
    }
    return sum;
}

template <int V, bool WIDE, bool SHARED>
__device__ void update_masters(const Columns &c, float *p, float keep, float rate) {
    for (Walk<V, WIDE, SHARED> w(c); w.inside(c); ) {
        float y[BATCH][V], x[V];
        Walk<V, WIDE, SHARED> here = w;
        #pragma unroll
        for (int u = 0; u < BATCH; u++, w.next(c)) {
            if (w.inside(c)) { load<V>(y[u], p + w.at(c)); }
        }
        #pragma unroll
        for (int u = 0; u < BATCH; u++, here.next(c)) {
            if (!here.inside(c)) { break; }
            here.template move<false>(x, c);
            #pragma unroll
            for (int v = 0; v < V; v++) { y[u][v] = keep * y[u][v] - rate * x[v]; }
            store<V>(p + here.at(c), y[u]);
        }
    }
}

// Rows i0 .. i0+7 of column j, times scale; rows past n are zero.
template <bool SHARED> __device__ inline void load_tile(float *y, const Columns &c, float scale,
                                                        int i0, int j) {
    #pragma unroll
    for (int i = 0; i < TILE; i++) {
        const int at = (i0 + i) * c.down + (SHARED ? j : j * c.right);
        y[i] = i0 + i < c.n ? c.x[at] * scale : 0;
    }
}

// 32 sums over the lanes of a warp at once: lanes exchange halves, then quarters, ..; lane l is
// left with sum l in x[0], after 31 exchanges where 32 trees would take 160.
template <int HALF> __device__ inline void warp_sums(float *x) {
    const bool upper = threadIdx.x & HALF;
    #pragma unroll
    for (int i = 0; i < HALF; i++) {
        const float give = upper ? x[i] : x[i + HALF], keep = upper ? x[i + HALF] : x[i];
        x[i] = keep + __shfl_xor_sync(~0u, give, HALF);
    }
    if constexpr (HALF > 1) { warp_sums<HALF / 2>(x); }
}

// Place of (i,k), i <= k < 8, in a triangle of 36.
__host__ __device__ constexpr int triangle(int i, int k) {
    return i * TILE - i * (i - 1) / 2 + k - i;
}

// part (N,N) = the block's part of X X^T, X times scale: tiles of 8 x 8, those of the diagonal as
// triangles. Each thread has sums over its columns; then over the warp, and over warps.
template <int N, bool SHARED>
__device__ void gram(float *part, Room<N> &room, const Columns &c, float scale) {
    enum { ALL = TILE * TILE, HALF_ALL = TILE * (TILE + 1) / 2 };
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    float *mine = room.warp[warp];
    for (int i0 = 0; i0 < c.n; i0 += TILE) {
        for (int k0 = i0; k0 < c.n; k0 += TILE) {
            float a[TILE], b[TILE];
            if (i0 == k0) {
                float sum[HALF_ALL] = {0};
                for (int j = threadIdx.x; j < c.count; j += THREADS) {
                    load_tile<SHARED>(a, c, scale, i0, j);
                    #pragma unroll
                    for (int i = 0; i < TILE; i++) {
                        #pragma unroll
                        for (int k = i; k < TILE; k++) { sum[triangle(i, k)] += a[i] * a[k]; }
                    }
                }
                warp_sums<16>(sum);
                mine[lane] = sum[0];
                #pragma unroll
                for (int e = 32; e < HALF_ALL; e++) { mine[e] = warp_sum(sum[e]); }
            } else {
                float sum[ALL] = {0};
                for (int j = threadIdx.x; j < c.count; j += THREADS) {
                    load_tile<SHARED>(a, c, scale, i0, j);
                    load_tile<SHARED>(b, c, scale, k0, j);
                    #pragma unroll
                    for (int e = 0; e < ALL; e++) { sum[e] += a[e / TILE] * b[e % TILE]; }
                }
                warp_sums<16>(sum);
                warp_sums<16>(sum + 32);
                mine[lane] = sum[0];
                mine[lane + 32] = sum[32];
            }
            __syncthreads();
            if (threadIdx.x < ALL) {
                const int i = threadIdx.x / TILE, k = threadIdx.x % TILE;
                const int e = i0 < k0 ? (int)threadIdx.x : triangle(min(i, k), max(i, k));
                float all = 0;
                for (int w = 0; w < WARPS; w++) { all += room.warp[w][e]; }
                part[(i0 + i) * N + k0 + k] = part[(k0 + k) * N + i0 + i] = all;
            }
            __syncthreads();
        }
    }
}

// A barrier of the slice's blocks.
__device__ inline void slice_sync(int blocks) {
    if (blocks > 1) { cooperative_groups::this_cluster().sync(); } else { __syncthreads(); }
}

// out (N,N) = s x + t y x, by `workers` threads.
template <int N> __device__ inline void polynomial(float *out, float s, const float *x, float t,
                                                   const float *y, int workers) {
    for (int e = threadIdx.x; e < N * N; e += workers) {
        const int i = e / N, k = e % N;
        float sum = 0;
        #pragma unroll
        for (int j = 0; j < N; j++) { sum += y[i * N + j] * x[j * N + k]; }
        out[e] = s * x[e] + t * sum;
    }
}

// Rounds of the iteration on R: room.q from room.r, as in newton_schulz. With 8 rows it is one
// warp's work.
template <int N> __device__ void rounds(Room<N> &room, int count) {
    const float a = 3.4445f, b = -4.7750f, c = 2.0315f;
    const int workers = N == TILE ? 32 : THREADS, worker = threadIdx.x < workers;
    #define SYNC() do { if (N == TILE) { __syncwarp(); } else { __syncthreads(); } } while (0)
    if (worker) {
        for (int e = threadIdx.x; e < N * N; e += workers) { room.q[e] = e % (N + 1) == 0; }
        SYNC();
        for (int t = 0; t < count; t++) {
            polynomial<N>(room.z, b, room.r, c, room.r, workers);
            SYNC();
            polynomial<N>(room.next, a, room.q, 1, room.z, workers);
            if (t + 1 < count) { polynomial<N>(room.p, a, room.r, 1, room.z, workers); }
            SYNC();
            if (t + 1 < count) { polynomial<N>(room.r, a, room.p, 1, room.z, workers); }
            for (int e = threadIdx.x; e < N * N; e += workers) { room.q[e] = room.next[e]; }
            SYNC();
        }
    }
    #undef SYNC
    __syncthreads();
}

// X <- Q X, X times scale, a thread per column.
template <int N, bool SHARED>
__device__ void apply(const Columns &c, const float *q, float scale) {
    for (int j = threadIdx.x; j < c.count; j += THREADS) {
        float x[N];
        #pragma unroll
        for (int i = 0; i < N; i += TILE) { load_tile<SHARED>(x + i, c, scale, i, j); }
        #pragma unroll 8
        for (int i = 0; i < N; i++) {
            if (i >= c.n) { break; }
            float sum = 0;
            #pragma unroll
            for (int k = 0; k < N; k += 4) {
                const float4 q4 = *(const float4 *)(q + i * N + k);
                sum += q4.x * x[k] + q4.y * x[k + 1] + q4.z * x[k + 2] + q4.w * x[k + 3];
            }
            c.x[i * c.down + (SHARED ? j : j * c.right)] = sum;
        }
    }
    __syncthreads();
}

// One slice: `blocks` blocks of a cluster, each with count of its columns.
template <int N, bool SHARED> __global__ __launch_bounds__(THREADS, N == TILE ? 2 : 1)
void muon_kernel(Step s, int blocks) {
    enum { V = SHARED ? 4 : 1 };
    extern __shared__ __align__(16) unsigned char shared[];
    Room<N> &room = *(Room<N> *)shared;
    const Slice slice = s.slices[blockIdx.x / blocks];
    const int rank = blockIdx.x % blocks, m = (int)(slice.rows * slice.cols / s.n);
    Columns c = { SHARED ? (float *)(shared + sizeof room) : s.g + slice.at, s.count, 1, s.n, m,
                  rank * s.count, min(s.count, m - rank * s.count), slice.rows <= slice.cols };
    if (!SHARED) { c.down = c.wide ? m : 1, c.right = c.wide ? 1 : s.n; }
    auto cluster = cooperative_groups::this_cluster();

    int state = c.wide ? read_gradient<V, true, SHARED>(c, s.g + slice.at)
                       : read_gradient<V, false, SHARED>(c, s.g + slice.at);
    state = __syncthreads_or(state & 1) | __syncthreads_or(state & 2) << 1;
    if (blocks > 1) {
        if (threadIdx.x == 0) { room.state = state; }
        cluster.sync();
        for (int b = 0; b < blocks; b++) { state |= *cluster.map_shared_rank(&room.state, b); }
    }
    if (state != 1) {           // nothing to follow: the slice keeps its bits
        slice_sync(blocks);
        return;
    }

    double sum = c.wide ? update_moments<V, true, SHARED>(c, s.m + slice.at, s)
                        : update_moments<V, false, SHARED>(c, s.m + slice.at, s);
    for (int k = 16; k > 0; k /= 2) { sum += __shfl_xor_sync(~0u, sum, k); }
    if (threadIdx.x % 32 == 0) { room.sum[threadIdx.x / 32] = sum; }
    __syncthreads();
    if (threadIdx.x == 0) {
        room.norm = 0;
        for (int w = 0; w < WARPS; w++) { room.norm += room.sum[w]; }
    }
    slice_sync(blocks);
    sum = 0;
    for (int b = 0; b < blocks; b++) { sum += *cluster.map_shared_rank(&room.norm, b); }
    // X = U / |U|: multiplied when it is read, until the first product has stored it.
    float scale = sum > 0 ? fminf((float)(1 / sqrt(sum)), 3e38f) : 0;
    for (int t = 0, turn = 0, end; t < ROUNDS; t = end, turn ^= 1) {
        for (end = t + 1; end < ROUNDS && !(s.restarts >> end & 1); end++) { }
        gram<N, SHARED>(room.part[turn], room, c, scale);
        slice_sync(blocks);
        for (int e = threadIdx.x; e < N * N; e += THREADS) {
            float all = 0;
            for (int b = 0; b < blocks; b++) {
                all += cluster.map_shared_rank(room.part[turn], b)[e];
            }
            room.r[e] = e / N < c.n && e % N < c.n ? all : 0;
        }
        __syncthreads();
        rounds<N>(room, end - t);
        apply<N, SHARED>(c, room.q, scale);
        scale = 1;
    }
    const double side = (double)max(slice.rows, slice.cols);
    const float rate = (float)(s.lr * 0.2 * sqrt(side));
    if (c.wide) { update_masters<V, true, SHARED>(c, s.p + slice.at, s.keep, rate); }
    else { update_masters<V, false, SHARED>(c, s.p + slice.at, s.keep, rate); }
    slice_sync(blocks);         // nobody may leave while its part of R is read
}

template <int N, bool SHARED> static void launch(const Step &s, int slices, int blocks) {
    const size_t bytes = sizeof(Room<N>) + (SHARED ? sizeof(float) * s.n * s.count : 0);
    auto kernel = muon_kernel<N, SHARED>;
    cudaLaunchConfig_t config = {};
    cudaLaunchAttribute cluster = {};
    cluster.id = cudaLaunchAttributeClusterDimension;
    cluster.val.clusterDim.x = blocks, cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
    config.gridDim = dim3(slices * blocks), config.blockDim = dim3(THREADS);
    config.dynamicSmemBytes = bytes, config.stream = stream;
    config.attrs = &cluster, config.numAttrs = 1;
    cudaCheck(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                   (int)bytes));
    cudaCheck(cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1));
    cudaCheck(cudaLaunchKernelEx(&config, kernel, s, blocks));
}

// Slices of one size, with m columns. most: bytes of X that a block may have, 0: none.
template <int N> static void launch_size(Step s, size_t m, int slices, bool vector, size_t most) {
    const size_t column = sizeof(float) * s.n;
    size_t count = m;
    int blocks = 1;
    while (blocks < BLOCKS_MAX && count * column > most) {
        blocks *= 2;
        count = (divide_up(m, blocks) + 3) / 4 * 4;
    }
    const bool shared = vector && count * column <= most;
    s.count = (int)(shared ? count : m);
    if (shared) { launch<N, true>(s, slices, blocks); } else { launch<N, false>(s, slices, 1); }
}

// What lora.c's muon_update does. slices_h (n), largest first; slices: room for as many.
static void update(float *p, float *m, float *g, const Slice *slices_h, Slice *slices, int n,
                   double grad_scale, double lr, double beta, double decay, int restarts,
                   size_t most) {
    cudaCheck(cudaMemcpyAsync(slices, slices_h, n * sizeof *slices, cudaMemcpyHostToDevice,
                              stream));
    Step s = { p, m, g, slices, (float)grad_scale, (float)beta, (float)(1 - beta),
               (float)(1 - lr * decay), lr, restarts, 0, 0 };
    for (int first = 0, last; first < n; first = last) {
        const size_t low = std::min(slices_h[first].rows, slices_h[first].cols);
        const size_t high = std::max(slices_h[first].rows, slices_h[first].cols);
        bool vector = high % 4 == 0;
        for (last = first; last < n; last++) {
            const Slice &next = slices_h[last];
            if (std::min(next.rows, next.cols) != low) { break; }
            if (std::max(next.rows, next.cols) != high) { break; }
            vector = vector && next.at % 4 == 0;
        }
        s.slices = slices + first, s.n = (int)low;
        if (low <= 8) { launch_size<8>(s, high, last - first, vector, most); }
        else if (low <= 16) { launch_size<16>(s, high, last - first, vector, most); }
        else if (low <= 32) { launch_size<32>(s, high, last - first, vector, most); }
        else if (low <= 64) { launch_size<64>(s, high, last - first, vector, most); }
        else { fprintf(stderr, "rank %zu\n", low); exit(1); }
    }
}
} // namespace muon

// -------------------------------------------------------------------------------------------------
// 2 Right?

using muon::Slice;
static int checks, failures;

static void reference(double *p, double *m, const float *g, Slice s, double scale, double lr,
                      double beta, double decay) {
    const size_t rows = s.rows, cols = s.cols, n = std::min(rows, cols), k = std::max(rows, cols);
    std::vector<double> x(n * k), r(n * n), y(n), z(n);
    double norm = 0;
    bool any = false;
    for (size_t i = 0; i < rows * cols; i++) { any = any || g[i] != 0; }
    if (!any) { return; }
    for (size_t i = 0; i < rows * cols; i++) {
        const size_t at = rows <= cols ? i : i % cols * k + i / cols;
        m[i] = beta * m[i] + (1 - beta) * g[i] * scale;
        x[at] = (1 - beta) * g[i] * scale + beta * m[i];
        norm += x[at] * x[at];
    }
    for (double &v : x) { v /= sqrt(norm); }
    for (int t = 0; t < 5; t++) {
        for (size_t a = 0; a < n; a++) {
            for (size_t b = 0; b < n; b++) {
                r[a * n + b] = 0;
                for (size_t j = 0; j < k; j++) { r[a * n + b] += x[a * k + j] * x[b * k + j]; }
            }
        }
        for (size_t j = 0; j < k; j++) {
            for (size_t a = 0; a < n; a++) {
                y[a] = 0;
                for (size_t b = 0; b < n; b++) { y[a] += r[a * n + b] * x[b * k + j]; }
            }
            for (size_t a = 0; a < n; a++) {
                z[a] = 3.4445 * x[a * k + j] - 4.7750 * y[a];
                for (size_t b = 0; b < n; b++) { z[a] += 2.0315 * r[a * n + b] * y[b]; }
            }
            for (size_t a = 0; a < n; a++) { x[a * k + j] = z[a]; }
        }
    }
    for (size_t i = 0; i < rows * cols; i++) {
        const size_t at = rows <= cols ? i : i % cols * k + i / cols;
        p[i] = p[i] * (1 - lr * decay) - lr * 0.2 * sqrt((double)k) * x[at];
    }
}

static void check(size_t most, int restarts) {
    const size_t shapes[][2] = {
        {8, 32768}, {32768, 8}, {16, 32768}, {64, 4096}, {2048, 64}, {8192, 16}, {8, 8192},
        {8, 4096}, {4096, 8}, {3, 1000}, {20, 300}, {500, 7}, {5, 5}, {1, 64}, {8, 510},
        {33, 1025} };
    std::vector<Slice> slices;
    size_t size = 0;
    for (auto &s : shapes) {
        for (int k = 0; k < 3; k++) {       // the second one is not aligned
            slices.push_back({ size + k % 2, s[0], s[1] });
            size += (s[0] * s[1] + 4) / 4 * 4;
        }
    }
    std::vector<float> p(size), m(size), g(size);
    for (size_t i = 0; i < size; i++) {
        p[i] = hash_normal(1, i), m[i] = 0.01f * hash_normal(2, i), g[i] = 0.1f * hash_normal(3, i);
    }
    const Slice zero = slices[4];
    for (size_t i = 0; i < zero.rows * zero.cols; i++) { g[zero.at + i] = 0; }
    float *dp = to_device(p), *dm = to_device(m), *dg = to_device(g);
    Slice *room = device_alloc<Slice>(slices.size());
    muon::update(dp, dm, dg, slices.data(), room, (int)slices.size(), 0.5, 0.02, 0.95, 0.1,
                 restarts, most);
    std::vector<float> p1 = to_host(dp, size), m1 = to_host(dm, size);
    for (Slice s : slices) {
        const size_t n = s.rows * s.cols;
        std::vector<double> wp(p.begin() + s.at, p.begin() + s.at + n);
        std::vector<double> wm(m.begin() + s.at, m.begin() + s.at + n);
        reference(wp.data(), wm.data(), g.data() + s.at, s, 0.5, 0.02, 0.95, 0.1);
        double diff = 0, step = 0, worst_m = 0;
        for (size_t i = 0; i < n; i++) {
            diff += pow(p1[s.at + i] - wp[i], 2), step += pow(p[s.at + i] - wp[i], 2);
            worst_m = std::max(worst_m, fabs(m1[s.at + i] - wm[i]));
        }
        const double error = step > 0 ? sqrt(diff / step) : sqrt(diff);
        const bool ok = error < 2e-4 && worst_m < 1e-7;
        checks++, failures += !ok;
        if (ok) { continue; }
        printf("FAIL %zu x %zu, most %zu, restarts %x: p %g m %g\n", s.rows, s.cols, most, restarts,
               error, worst_m);
    }
    cudaFree(dp), cudaFree(dm), cudaFree(dg), cudaFree(room);
}

// -------------------------------------------------------------------------------------------------
// 3 Fast?

__global__ void adamw_kernel(float *p, float *m, float *v, const float *g, size_t n, float scale,
                             float keep, float new1, float old2, float new2, float rate, float root,
                             float eps) {
    const size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) { return; }
    const float grad = g[i] * scale;
    const float mean = m[i] + new1 * (grad - m[i]), square = old2 * v[i] + new2 * grad * grad;
    m[i] = mean;
    v[i] = square;
    p[i] = keep * p[i] - rate * mean / (sqrtf(square) / root + eps);
}

__global__ void fill_kernel(float *x, size_t n, int seed, float std) {
    for (size_t i = (size_t)blockIdx.x * 256 + threadIdx.x; i < n; i += (size_t)gridDim.x * 256) {
        x[i] = std * hash_normal(seed, i);
    }
}

static void time_model(size_t r) {
    const size_t dense[][2] = { {4096, 1024}, {1024, 32768}, {4096, 512}, {8192, 4096},
                                {4096, 2048}, {2048, 4096}, {4096, 2048} };
    std::vector<Slice> slices;
    size_t size = 0;
    auto add = [&](size_t rows, size_t cols) {
        slices.push_back({ size, rows, cols });
        size += rows * cols; };
    for (int l = 0; l < 43; l++) { for (auto &d : dense) { add(r, d[0]), add(d[1], r); } }
    for (int l = 0; l < 43; l++) {
        for (int w = 0; w < 3; w++) {
            const size_t in = w == 1 ? 2048 : 4096, out = w == 1 ? 4096 : 2048;
            for (int e = 0; e < 32; e++) { add(r, in); }
            for (int e = 0; e < 32; e++) { add(out, r); }
        }
    }
    std::stable_sort(slices.begin(), slices.end(), [](const Slice &a, const Slice &b) {
        return a.rows * a.cols > b.rows * b.cols; });
    float *p = device_alloc<float>(size), *m = device_alloc<float>(size);
    float *v = device_alloc<float>(size), *g = device_alloc<float>(size);
    fill_kernel<<<1024, 256>>>(p, size, 1, 0.1f);
    fill_kernel<<<1024, 256>>>(m, size, 2, 0.1f);
    fill_kernel<<<1024, 256>>>(g, size, 3, 0.1f);
    cudaMemset(v, 0, size * 4);
    Slice *room = device_alloc<Slice>(slices.size());
    const float adam = time_ms([&](int) {
        adamw_kernel<<<(unsigned)divide_up(size, 256), 256>>>(p, m, v, g, size, 1, 1, 0.1f, 0.95f,
                                                              0.05f, 1e-6f, 1, 1e-8f); });
    printf("r %zu: %zu slices, %.1f M elements | AdamW %.3f ms, %.0f GB/s\n", r, slices.size(),
           size * 1e-6, adam, 28.0 * size / adam * 1e-6);
    auto race = [&](const Slice *list, int n, int restarts, size_t most) {
        return time_ms([&](int) { muon::update(p, m, g, list, room, n, 1, 1e-6, 0.95, 0, restarts,
                                               most); }, 9, 2); };
    for (size_t most : { 0, 32 << 10, 64 << 10, 96 << 10 }) {
        for (int restarts : { 4, 0x1E }) {
            const float ms = race(slices.data(), (int)slices.size(), restarts, most);
            printf("  %2zu KB of X per block, %s: %.3f ms, %.0f GB/s, %.2f x AdamW\n", most >> 10,
                   restarts == 4 ? "gram" : "standard", ms, 20.0 * size / ms * 1e-6, ms / adam);
        }
    }
    for (size_t first = 0, last; first < slices.size(); first = last) {
        auto elements = [&](size_t k) { return slices[k].rows * slices[k].cols; };
        for (last = first; last < slices.size() && elements(last) == elements(first); last++) { }
        const size_t n = elements(first) * (last - first);
        const float ms = race(slices.data() + first, (int)(last - first), 4, 64 << 10);
        printf("    %5zu slices of %7zu: %.3f ms, %.0f GB/s\n", last - first, elements(first), ms,
               20.0 * n / ms * 1e-6);
    }
    cudaFree(p), cudaFree(m), cudaFree(v), cudaFree(g), cudaFree(room);
}

int main(int argc, char **argv) {
    setvbuf(stdout, NULL, _IOLBF, 0);
    const bool only_time = argc > 1 && strcmp(argv[1], "time") == 0;
    for (size_t most : { 0, 16 << 10, 64 << 10, 96 << 10 }) {
        if (only_time) { break; }
        check(most, 4);
        check(most, 0x1E);
    }
    printf("%d checks, %d failed\n", checks, failures);
    time_model(8);
    time_model(16);
    return failures != 0;
}
