// muon.cu: one step of Muon over all factors, lora.c section 7. One idea per rung:
//   v1  a block per slice, X in global memory, where the gradient was
//   v2  X in shared memory where one block can hold it
//   v3  a slice is a cluster of blocks, each with some columns of X in shared memory: what one
//       block cannot hold fits, and blocks are small enough that an SM has two, so that the one's
//       arithmetic hides behind the other's memory. Shipped.
// It is one kernel; this file sets only how many bytes of X a block may have: 0 is v1, others are
// v3. The kernel, and the launcher with 64 KB, are kernels.cu's (section 5). Rows of the table that
// say more (v1 by fours, v2, other threads or registers) were earlier kernels.
//
// Arithmetic, full model at r 8 on 8 ranks: attention and shared 43 x 14 slices, experts 43 x 192,
// 228 M elements. Muon reads g, m, p and writes m, p: 20 bytes each, 4.57 GB, 1.07 ms at 4,277
// GB/s; AdamW 28 bytes, 6.4 GB, 1.49 ms. Per element of a slice with 8 rows two Gram matrices take
// 2 x 4.5 and two products with Q 2 x 8 multiply-adds: 5.7 G, 0.2 ms of 132 SMs. Shared memory is
// passed 9 times, 8.2 GB, 0.25 ms at 132 x 128 bytes a clock. So memory bounds it, if these hide.
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
//     nvcc -O3 -std=c++17 -gencode=arch=compute_90a,code=sm_90a -diag-suppress 177 muon.cu
//          -lcublas -o muon && ./muon
#include "../../kernels.cu"
#include "common.h"

// -------------------------------------------------------------------------------------------------
// 1 The rungs: kernels.cu's kernel, with other bytes of X per block

using muon::Slice;
enum { SHIPPED = 64 << 10 };

// What lora.c's muon_update does: by kernels.cu's launcher, or with another `most` in its place.
// slices_h (n), largest first; slices: room for as many.
static void update(float *p, float *m, float *g, const Slice *slices_h, Slice *slices, int n,
                   double grad_scale, double lr, double beta, double decay, int restarts,
                   size_t most) {
    if (most == SHIPPED) {
        muon_update_gpu(p, m, g, &slices_h->at, n, grad_scale, lr, beta, decay, restarts);
        return;
    }
    cudaCheck(cudaMemcpyAsync(slices, slices_h, n * sizeof *slices, cudaMemcpyHostToDevice,
                              stream));
    muon::Step s = { p, m, g, slices, (float)grad_scale, (float)beta, (float)(1 - beta),
                     (float)(1 - lr * decay), lr, restarts, 0, 0 };
    const Slice *end = slices_h + n;
    for (const Slice *from = slices_h, *to; from < end; from = to) {        // a run of one size
        const size_t low = std::min(from->rows, from->cols), size = from->rows * from->cols;
        to = std::find_if(from, end, [&](const Slice &l) {
            return std::min(l.rows, l.cols) != low || l.rows * l.cols != size; });
        const bool vector = size / low % 4 == 0 && std::all_of(from, to, [](const Slice &l) {
            return l.at % 4 == 0; });
        auto launch = low <= 8 ? muon::launch_size<8> : low <= 16 ? muon::launch_size<16>
                    : low <= 32 ? muon::launch_size<32> : muon::launch_size<64>;
        gpuRequire(low <= 64);
        s.slices = slices + (from - slices_h), s.n = (int)low;
        launch(s, size / low, (int)(to - from), vector, most);
    }
}

// -------------------------------------------------------------------------------------------------
// 2 Right?

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

static void check_slices(size_t most, int restarts) {
    const size_t shapes[][2] = {
        {8, 32768}, {32768, 8}, {16, 32768}, {64, 4096}, {2048, 64}, {8192, 16}, {8, 8192},
        {8, 4096}, {4096, 8}, {3, 1000}, {20, 300}, {500, 7}, {5, 5}, {1, 64}, {8, 510},
        {33, 1025} };
    std::vector<Slice> slices;
    size_t size = 0;
    for (int k = 0; k < 3; k++) {           // the second of each is not aligned, and not among
        for (auto &s : shapes) {            // aligned ones: these would go its way
            slices.push_back({ size + k % 2, s[0], s[1] });
            size += (s[0] * s[1] + 4) / 4 * 4;
        }
    }
    std::vector<float> p(size), m(size), g(size);
    for (size_t i = 0; i < size; i++) {
        p[i] = hash_normal(1, i), m[i] = 0.01f * hash_normal(2, i), g[i] = 0.1f * hash_normal(3, i);
    }
    const Slice zero = slices[1];           // of a launch with slices[0]
    for (size_t i = 0; i < zero.rows * zero.cols; i++) { g[zero.at + i] = 0; }
    float *dp = to_device(p), *dm = to_device(m), *dg = to_device(g);
    Slice *room = device_alloc<Slice>(slices.size());
    update(dp, dm, dg, slices.data(), room, (int)slices.size(), 0.5, 0.02, 0.95, 0.1, restarts,
           most);
    std::vector<float> p1 = to_host(dp, size), m1 = to_host(dm, size);
    for (Slice s : slices) {
        const size_t n = s.rows * s.cols;
        std::vector<double> wp(p.begin() + s.at, p.begin() + s.at + n);
        std::vector<double> wm(m.begin() + s.at, m.begin() + s.at + n);
        reference(wp.data(), wm.data(), g.data() + s.at, s, 0.5, 0.02, 0.95, 0.1);
        double diff = 0, step = 0, worst_m = 0;
        for (size_t i = 0; i < n; i++) {
            diff += pow(p1[s.at + i] - wp[i], 2), step += pow(p[s.at + i] - wp[i], 2);
            const double off = fabs(m1[s.at + i] - wm[i]);
            if (!(off <= worst_m)) { worst_m = off == off ? off : INFINITY; }
        }
        const double error = step > 0 ? sqrt(diff / step) : sqrt(diff);
        check(error < 2e-4 && worst_m < 1e-7, "%zu x %zu at %zu, most %zu, restarts %x: p %g m %g",
              s.rows, s.cols, s.at, most, restarts, error, worst_m);
    }
    cudaFree(dp), cudaFree(dm), cudaFree(dg), cudaFree(room);
}

// -------------------------------------------------------------------------------------------------
// 3 Fast?

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
    draw_elements_gpu(p, DT_F32, 1, 0, 0.1 / RANDOM_STD, size);
    draw_elements_gpu(m, DT_F32, 2, 0, 0.1 / RANDOM_STD, size);
    draw_elements_gpu(g, DT_F32, 3, 0, 0.1 / RANDOM_STD, size);
    cudaMemset(v, 0, size * 4);
    Slice *room = device_alloc<Slice>(slices.size());
    const float adam = time_ms([&](int) {
        adamw_update_gpu(p, m, v, g, size, 1, 1e-6, 0.9, 0.95, 1e-8, 0, 100); });
    printf("r %zu: %zu slices, %.1f M elements | AdamW %.3f ms, %.0f GB/s\n", r, slices.size(),
           size * 1e-6, adam, 28.0 * size / adam * 1e-6);
    auto race = [&](const Slice *list, int n, int restarts, size_t most) {
        return time_ms([&](int) {
            update(p, m, g, list, room, n, 1, 1e-6, 0.95, 0, restarts, most); }, 9, 2); };
    for (size_t most : { 0, 32 << 10, (int)SHIPPED, 96 << 10 }) {
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
        const float ms = race(slices.data() + first, (int)(last - first), 4, SHIPPED);
        printf("    %5zu slices of %7zu: %.3f ms, %.0f GB/s\n", last - first, elements(first), ms,
               20.0 * n / ms * 1e-6);
    }
    cudaFree(p), cudaFree(m), cudaFree(v), cudaFree(g), cudaFree(room);
}

int main(int argc, char **argv) {
    setvbuf(stdout, NULL, _IOLBF, 0);
    ladder_workspace(1 << 20);
    const bool only_time = argc > 1 && strcmp(argv[1], "time") == 0;
    for (size_t most : { 0, 16 << 10, (int)SHIPPED, 96 << 10 }) {
        if (only_time) { break; }
        check_slices(most, 4);
        check_slices(most, 0x1E);
    }
    printf("%d checks, %d failed\n", checks_done, checks_failed);
    time_model(8);
    time_model(16);
    return checks_failed != 0;
}
