// fp8.c: numbers of eight bits and fewer, and the matrix products made of them.
//
// A number format is a promise about rounding. Three are kept here: e4m3 (a sign, 4 exponent bits,
// 3 mantissa bits, at most 448, no infinity), e8m0 (powers of two, nothing else), and, from
// kernels.cu, bf16. An fp8 matrix is e4m3 codes with one e8m0 scale per block of 128 x 128:
//
//     W[o][c] = e4m3(w[o][c]) * 2^(scale[o/128][c/128] - 127)
//
// That product is exact in a float, so a frozen matrix stays as it was stored, and a row of it is
// widened inside the product that needs it. Frozen means: a forward y = W x, a backward
// dx = W^T dy, and never a dW. Every linear of the trainer, whatever it is stored as, is these two
// products over a tile of rows; mxfp4.c brings one more way to widen, lora.c adds to the products.
//
// What it refuses to do: wide copies of frozen weights, gradients of frozen weights, sums whose
// bits depend on how many rows or threads there are.
//
// Contents
//   1 e4m3 and e8m0, code by code
//   2 widening a row of a frozen matrix
//   3 the two products of a tile, y = x W^T and dx += dy W
//   4 linears: tiles dealt to threads
//   5 quantisation: real numbers into codes and scales
//   6 the clamped SwiGLU, which sits between an expert's products
//   7 the clamped SwiGLU between two fp8 products
//   8 rows that stay fp8: widened, transposed, carried to their experts
#ifndef FP8_C
#define FP8_C
#include "kernels.cu"       // the contract: act, real, ld, st, bf16, require, host_alloc, CPU_ONLY
#include <tgmath.h>         // exp of a float stays a float
#ifdef _OPENMP
#include <omp.h>
#endif

// -------------------------------------------------------------------------------------------------
// 1 e4m3 and e8m0, code by code
//
// An e4m3 code is s|EEEE|MMM. E > 0: (1 + M/8) 2^(E-7). E = 0: M 2^-9, evenly spaced down to zero.
// 0x7F and 0xFF are NaN, so the largest value is 0x7E = 448. Both directions take a few operations
// on the bits of a float, without a branch or a table, so that the compiler can make vector code of
// a loop over codes. (PyTorch's cast does not saturate, 465 becomes NaN there; this one does.)

// The value of a code: exact. 0x7F and 0xFF give NaN.
static inline float float_from_e4m3(uint8_t code) {
    uint32_t magnitude = code & 0x7F, sign = (uint32_t)(code & 0x80) << 24;
    // A float has the same fields, 20 bits further left and with an exponent bias larger by 120.
    // With E = 0 there is no leading one: put it there by raising E to 1, and take it off again.
    uint32_t subnormal = magnitude < 8, exponent = (120 + subnormal) << 23;
    float leading_one = float_from_bits(subnormal * (121u << 23));      // 2^-6 or 0
    float value = float_from_bits((magnitude << 20) + exponent) - leading_one;
    uint32_t nan = magnitude == 0x7F ? 0x7FC00000u : 0;
    return float_from_bits(bits_from_float(value) | sign | nan);
}

// The nearest code, ties to the even one. Beyond 448, infinity included, gives 448 with x's sign;
// NaN gives NaN; -0 stays -0.
static inline uint8_t e4m3_from_float(float x) {
    uint32_t sign = bits_from_float(x) >> 24 & 0x80, bits = bits_from_float(x) & 0x7FFFFFFFu;
    uint32_t magnitude = bits < 0x43E00000u ? bits : 0x43E00000u;       // min(|x|, 448)
    uint32_t exponent = magnitude >> 23 > 121 ? magnitude >> 23 : 121;  // of 2^-6, or of x
    // Codes with this exponent are as far apart as floats with one larger by 20. So adding that
    // power of two makes the adder round, and leaves the mantissa, leading one included, in the
    // lowest bits. A subnormal has no leading one; all others carry it into E.
    float large = float_from_bits((exponent + 20) << 23);
    uint32_t mantissa = bits_from_float(float_from_bits(magnitude) + large)
                      - bits_from_float(large);
    uint32_t code = ((exponent - 121) << 3) + mantissa;
    return (uint8_t)(sign | (bits > 0x7F800000u ? 0x7F : code));
}

// 2^(b-127). A float's exponent field, except that 2^-127 is subnormal there and 255 means NaN.
static inline float float_from_e8m0(uint8_t b) {
    return float_from_bits(b == 0 ? 0x00400000u : b == 255 ? 0x7FC00000u : (uint32_t)b << 23);
}

// Half precision: its bits, moved to float's places, are 2^112 too small; inf and NaN are special.
static inline float float_from_f16(uint16_t h) {
    uint32_t bits = bits_from_float(float_from_bits((uint32_t)(h & 0x7FFF) << 13) * 0x1p112f);
    bits |= (h & 0x7C00) == 0x7C00 ? 0x7F800000 : 0;
    return float_from_bits(bits | (uint32_t)(h & 0x8000) << 16);
}

// -------------------------------------------------------------------------------------------------
// 2 Widening a row of a frozen matrix
//
// A matrix is a pointer and the function that knows how it is stored. All products below see rows
// of reals, and do not know what they were.

// Writes row o of the matrix w (O,C) to row (C).
typedef void Widen(real *row, const void *w, const uint8_t *scale, size_t o, int C);

typedef struct {
    const void *w;          // (O,C) in its storage format
    const uint8_t *scale;   // e8m0 scales, or NULL for formats without
    Widen *widen;
} Frozen;

// How many groups of that size cover n.
static inline int ceil_div(int n, int size) { return (n + size - 1) / size; }

// w (O,C) e4m3 codes, scale (ceil(O/128), ceil(C/128)).
static inline void widen_fp8(real *row, const void *w, const uint8_t *scale, size_t o, int C) {
    const uint8_t *codes = (const uint8_t *)w + o * C;
    scale += o / FP8_BLOCK * ceil_div(C, FP8_BLOCK);
    for (int c0 = 0; c0 < C; c0 += FP8_BLOCK) {
        real s = float_from_e8m0(*scale++);
        int end = c0 + FP8_BLOCK < C ? c0 + FP8_BLOCK : C;
        for (int c = c0; c < end; c++) { row[c] = float_from_e4m3(codes[c]) * s; }
    }
}

// w (O,C) bf16, no scales.
static inline void widen_bf16(real *row, const void *w, const uint8_t *scale, size_t o, int C) {
    const bf16 *values = (const bf16 *)w + o * C;
    (void)scale;
    for (int c = 0; c < C; c++) { row[c] = float_from_bf16(values[c]); }
}

// w (O,C) float, no scales.
static inline void widen_f32(real *row, const void *w, const uint8_t *scale, size_t o, int C) {
    const float *values = (const float *)w + o * C;
    (void)scale;
    for (int c = 0; c < C; c++) { row[c] = values[c]; }
}

// -------------------------------------------------------------------------------------------------
// 3 The two products of a tile
//
// Both run in one thread, over n rows that the caller has already widened. A weight row is widened
// once per tile, so its cost is shared by n rows. What is left is to keep the multiply-add units
// busy: a block of sums stays in registers, so that each number loaded is used several times.
//
// Blocks are always whole. Missing rows repeat the last one, and are computed and stored again with
// the same result; missing columns are zeros. So there is one path, and the bits of an output
// depend on its row and on W alone, not on its neighbours, the tile or the thread.

enum {
    LANES = 32 / sizeof(real),      // reals per vector register: 8 floats or 4 doubles
    BLOCK_ROWS = 4,                 // rows of x or dy per block of sums
    BLOCK_OUTS = 3,                 // forward: weight rows per block, 4 x 3 registers of sums
    BLOCK_COLUMNS = 2 * LANES,      // backward: columns per block, 4 x 2 registers of sums
    PANEL = 16,                     // backward: weight rows that are widened at a time
};

// A register's worth of reals (the vector extension of gcc and clang), at any address: but those
// that are multiples of 32 bytes are read nearly twice as fast, hence tile_alloc.
typedef real Lanes __attribute__((vector_size(32), aligned(sizeof(real)), may_alias));
#define LANES_AT(p) (*(const Lanes *)(p))

static inline int min_int(int a, int b) { return a < b ? a : b; }

// n reals for the inside of a function, aligned to a cache line. To be released with free().
static inline real *tile_alloc(size_t n) {
    size_t bytes = (sizeof(real) * n + 63) / 64 * 64;
    require(!mem.closed || bytes <= (1 << 20));
    real *p = (real *)aligned_alloc(64, bytes ? bytes : 64);
    if (p == NULL) { die(EXIT_FIT, "no memory for %zu bytes on the host", bytes); }
    return p;
}

// Reals from one row of a panel to the next: C or more, whole blocks. The extra block keeps rows
// from lying a power of two apart, where they would push each other out of the cache.
static inline int panel_stride(int C) { return (C / BLOCK_COLUMNS + 2) * BLOCK_COLUMNS; }

// The sum of all lanes, pairwise: the upper half is added to the lower until one is left.
static inline real lanes_sum(const Lanes *sum) {
    typedef real Half __attribute__((vector_size(16), aligned(sizeof(real)), may_alias));
    const Half *halves = (const Half *)sum;
    Half half = halves[0] + halves[1];
    return LANES == 4 ? half[0] + half[1]
                      : (half[0] + half[LANES / 4]) + (half[1] + half[LANES / 2 - 1]);
}

// y[i][j] = <x[i], w[j]>, over C reals. The sum is taken in LANES parts, part l over the columns
// c = l mod LANES in their order; then the parts are added.
static inline void dot_block(real y[BLOCK_ROWS][BLOCK_OUTS], const real *const x[BLOCK_ROWS],
                             const real *const w[BLOCK_OUTS], int C) {
    Lanes sum[BLOCK_ROWS][BLOCK_OUTS] = {0};
    int c = 0;
    for (; c + LANES <= C; c += LANES) {
        for (int i = 0; i < BLOCK_ROWS; i++) {
            for (int j = 0; j < BLOCK_OUTS; j++) {
                sum[i][j] += LANES_AT(x[i] + c) * LANES_AT(w[j] + c);
            }
        }
    }
    for (int i = 0; i < BLOCK_ROWS; i++) {
        for (int j = 0; j < BLOCK_OUTS; j++) {
            Lanes s = sum[i][j];
            if (c < C) {            // the last, short step
                Lanes x_end = {0}, w_end = {0};
                memcpy(&x_end, x[i] + c, sizeof(real) * (C - c));
                memcpy(&w_end, w[j] + c, sizeof(real) * (C - c));
                s += x_end * w_end;
            }
            y[i][j] = lanes_sum(&s);
        }
    }
}

// y (n,O) = x (n,C) times the transpose of rows row0 .. row0+O-1 of m. Overwrites y.
static inline void frozen_forward(real *y, const real *x, Frozen m, size_t row0, int n, int C,
                                  int O) {
    real *panel = tile_alloc((size_t)BLOCK_OUTS * panel_stride(C));
    for (int o0 = 0; o0 < O; o0 += BLOCK_OUTS) {
        int o[BLOCK_OUTS];
        const real *w[BLOCK_OUTS];
        for (int j = 0; j < BLOCK_OUTS; j++) {
            real *row = panel + (size_t)j * panel_stride(C);
            o[j] = min_int(o0 + j, O - 1);
            m.widen(row, m.w, m.scale, row0 + o[j], C);
            w[j] = row;
        }
        for (int r0 = 0; r0 < n; r0 += BLOCK_ROWS) {
            const real *x_r[BLOCK_ROWS];
            real block[BLOCK_ROWS][BLOCK_OUTS];
            for (int i = 0; i < BLOCK_ROWS; i++) {
                x_r[i] = x + (size_t)min_int(r0 + i, n - 1) * C;
            }
            dot_block(block, x_r, w, C);
            for (int i = 0; i < BLOCK_ROWS; i++) {
                real *y_r = y + (size_t)min_int(r0 + i, n - 1) * O;
                for (int j = 0; j < BLOCK_OUTS; j++) { y_r[o[j]] = block[i][j]; }
            }
        }
    }
    free(panel);
}

// dx[i][c] += sum_p dy[i][p] w[p][c] for BLOCK_COLUMNS columns, w with that stride. The terms are
// added one by one, p = 0 .. P-1, to what is in dx.
static inline void axpy_block(real *const dx[BLOCK_ROWS], const real *const dy[BLOCK_ROWS],
                              const real *w, int stride, int P) {
    Lanes sum[BLOCK_ROWS][2];
    for (int i = 0; i < BLOCK_ROWS; i++) {
        for (int k = 0; k < 2; k++) { sum[i][k] = LANES_AT(dx[i] + k * LANES); }
    }
    for (int p = 0; p < P; p++) {
        for (int i = 0; i < BLOCK_ROWS; i++) {
            for (int k = 0; k < 2; k++) {
                sum[i][k] += dy[i][p] * LANES_AT(w + (size_t)p * stride + k * LANES);
            }
        }
    }
    for (int i = 0; i < BLOCK_ROWS; i++) {      // all are read before any is written: rows repeat
        for (int k = 0; k < 2; k++) { *(Lanes *)(dx[i] + k * LANES) = sum[i][k]; }
    }
}

// The P weight rows of a panel, applied to BLOCK_ROWS rows dx (C) from dy (P).
static inline void panel_backward(real *const dx[BLOCK_ROWS], const real *const dy[BLOCK_ROWS],
                                  const real *panel, int C, int P) {
    int c = 0;
    real *at[BLOCK_ROWS], end[BLOCK_ROWS][BLOCK_COLUMNS] = {0};
    for (; c + BLOCK_COLUMNS <= C; c += BLOCK_COLUMNS) {
        for (int i = 0; i < BLOCK_ROWS; i++) { at[i] = dx[i] + c; }
        axpy_block(at, dy, panel + c, panel_stride(C), P);
    }
    if (c == C) { return; }
    for (int i = 0; i < BLOCK_ROWS; i++) {      // the last, short block works on a copy
        at[i] = (real *)memcpy(end[i], dx[i] + c, sizeof(real) * (C - c));
    }
    axpy_block(at, dy, panel + c, panel_stride(C), P);
    for (int i = 0; i < BLOCK_ROWS; i++) { memcpy(dx[i] + c, end[i], sizeof(real) * (C - c)); }
}

// dx (n,C) += dy (n,O) times rows row0 .. row0+O-1 of m. The terms of dx[r][c] are added one by
// one in the order of the rows o, starting from what is in dx.
static inline void frozen_backward(real *dx, const real *dy, Frozen m, size_t row0, int n, int C,
                                   int O) {
    size_t stride = panel_stride(C), room = (1 << 20) / sizeof(real) / stride;
    int rows = room < PANEL ? (int)room : PANEL;
    require(rows > 0);
    real *panel = tile_alloc(rows * stride);
    memset(panel, 0, sizeof(real) * rows * stride);
    for (int o0 = 0; o0 < O; o0 += rows) {
        int P = min_int(rows, O - o0);
        for (int p = 0; p < P; p++) {
            m.widen(panel + p * stride, m.w, m.scale, row0 + o0 + p, C);
        }
        for (int r0 = 0; r0 < n; r0 += BLOCK_ROWS) {
            // forward: y[r][o] = sum_c x[r][c] W[o][c], so dx[r][c] += sum_o dy[r][o] W[o][c]
            real *dx_r[BLOCK_ROWS];
            const real *dy_r[BLOCK_ROWS];
            for (int i = 0; i < BLOCK_ROWS; i++) {
                size_t r = min_int(r0 + i, n - 1);
                dx_r[i] = dx + r * C;
                dy_r[i] = dy + r * O + o0;
            }
            panel_backward(dx_r, dy_r, panel, C, P);
        }
    }
    free(panel);
}

// -------------------------------------------------------------------------------------------------
// 4 Linears: tiles dealt to threads
//
// A linear widens a tile of activations, runs the product, and narrows the result: one rounding per
// output, in store_rows. Threads take tiles, so that they split outputs and nothing else. Linears
// whose result is summed further (compressors, gate, hyper-connections) keep it real.

// Widens n stored activations into x.
static inline void load_rows(real *x, const act *inp, size_t n) {
    for (size_t i = 0; i < n; i++) { x[i] = ld(inp + i); }
}

// Rounds n results into storage.
static inline void store_rows(act *out, const real *y, size_t n) {
    for (size_t i = 0; i < n; i++) { st(out + i, y[i]); }
}

// How many of T rows make a tile: rows * width reals stay below 1 MiB, no thread has more than its
// share, and blocks are whole where that is possible. At least 1.
static inline int tile_rows(int T, int width) {
    int threads = 1;
#ifdef _OPENMP
    threads = omp_get_max_threads();
#endif
    size_t fit = ((1 << 20) - 1) / sizeof(real) / (size_t)(width > 0 ? width : 1);
    size_t rows = (size_t)ceil_div(ceil_div(T, threads), BLOCK_ROWS) * BLOCK_ROWS;
    if (rows > fit) { rows = fit < BLOCK_ROWS ? fit : fit / BLOCK_ROWS * BLOCK_ROWS; }
    return rows > 0 ? (int)rows : 1;
}

// out (T,O) = inp (T,C) times the transpose of w (O,C), e4m3 with 128 x 128 scales.
void linear_fp8_forward(act *out, const act *inp, const uint8_t *w, const uint8_t *scale, int T,
                        int C, int O) {
    GPU(linear_fp8_forward_gpu(out, inp, w, scale, T, C, O))
    Frozen m = { w, scale, widen_fp8 };
    int tile = tile_rows(T, C + O);
    #pragma omp parallel for
    for (int t = 0; t < T; t += tile) {
        int n = min_int(tile, T - t);
        real *x = tile_alloc((size_t)n * C), *y = tile_alloc((size_t)n * O);
        load_rows(x, inp + (size_t)t * C, (size_t)n * C);
        frozen_forward(y, x, m, 0, n, C, O);
        store_rows(out + (size_t)t * O, y, (size_t)n * O);
        free(x);
        free(y);
    }
}
TWIN(linear_fp8_forward)

// dinp (T,C) = dout (T,O) times w. Overwrites dinp. The trainer's is lora_linear_backward: all fp8
// matrices that pass a gradient may have an adapter, but wo_a (train.c, 5.5).
void linear_fp8_backward(act *dinp, const act *dout, const uint8_t *w, const uint8_t *scale, int T,
                         int C, int O) {
    CPU_ONLY();
    Frozen m = { w, scale, widen_fp8 };
    int tile = tile_rows(T, C + O);
    #pragma omp parallel for
    for (int t = 0; t < T; t += tile) {
        // forward: out[t][o] = sum_c inp[t][c] W[o][c], so dinp[t][c] = sum_o dout[t][o] W[o][c]
        int n = min_int(tile, T - t);
        real *dx = tile_alloc((size_t)n * C), *dy = tile_alloc((size_t)n * O);
        memset(dx, 0, sizeof(real) * n * C);
        load_rows(dy, dout + (size_t)t * O, (size_t)n * O);
        frozen_backward(dx, dy, m, 0, n, C, O);
        store_rows(dinp + (size_t)t * C, dx, (size_t)n * C);
        free(dx);
        free(dy);
    }
}

// out (T,O) = inp (T,C) times the transpose of m, not rounded.
static inline void linear_real_forward(real *out, const act *inp, Frozen m, int T, int C, int O) {
    int tile = tile_rows(T, C);
    #pragma omp parallel for
    for (int t = 0; t < T; t += tile) {
        int n = min_int(tile, T - t);
        real *x = tile_alloc((size_t)n * C);
        load_rows(x, inp + (size_t)t * C, (size_t)n * C);
        frozen_forward(out + (size_t)t * O, x, m, 0, n, C, O);
        free(x);
    }
}

// dinp (T,C) += dout (T,O) times m.
static inline void linear_real_backward(real *dinp, const real *dout, Frozen m, int T, int C,
                                        int O) {
    int tile = tile_rows(T, C);
    #pragma omp parallel for
    for (int t = 0; t < T; t += tile) {
        // forward: out[t][o] = sum_c inp[t][c] W[o][c], so dinp[t][c] += sum_o dout[t][o] W[o][c]
        frozen_backward(dinp + (size_t)t * C, dout + (size_t)t * O, m, 0, min_int(tile, T - t), C,
                        O);
    }
}

// For a matrix w (O,C) in bf16, and below in float: out (T,O) = inp (T,C) times its transpose.
void linear_bf16_forward(real *out, const act *inp, const bf16 *w, int T, int C, int O) {
    GPU(linear_bf16_forward_gpu(out, inp, w, T, C, O))
    linear_real_forward(out, inp, (Frozen){ w, NULL, widen_bf16 }, T, C, O);
}
TWIN(linear_bf16_forward)

// dinp (T,C) += dout (T,O) times w.
void linear_bf16_backward(real *dinp, const real *dout, const bf16 *w, int T, int C, int O) {
    GPU(linear_bf16_backward_gpu(dinp, dout, w, T, C, O))
    linear_real_backward(dinp, dout, (Frozen){ w, NULL, widen_bf16 }, T, C, O);
}
TWIN(linear_bf16_backward)

void linear_f32_forward(real *out, const act *inp, const float *w, int T, int C, int O) {
    CPU_ONLY();
    linear_real_forward(out, inp, (Frozen){ w, NULL, widen_f32 }, T, C, O);
}

void linear_f32_backward(real *dinp, const real *dout, const float *w, int T, int C, int O) {
    CPU_ONLY();
    linear_real_backward(dinp, dout, (Frozen){ w, NULL, widen_f32 }, T, C, O);
}

// out (n) = inp (n), rounded to storage.
void narrow(act *out, const real *inp, size_t n) {
    GPU(narrow_gpu(out, inp, n))
    store_rows(out, inp, n);
}
TWIN(narrow)

// -------------------------------------------------------------------------------------------------
// 5 Quantisation: real numbers into codes and scales
//
// A group of numbers shares the scale 2^t, with t the smallest integer that brings the largest of
// them, a, within the format: a <= 448 * 2^t. In logarithms that is ceil(log2(a / 448)), which a
// machine may round to the wrong side exactly where it matters; in the bits of a it is the exponent
// field, one more if the mantissa is above that of 448 = 1.75 * 2^8. Dividing by a power of two is
// exact, so each number is rounded once. Source: fp8-flow-moe.md, 2.1 and 2.2.

// The e8m0 byte of the smallest t >= -126 with a <= largest * 2^t, for finite a >= 0.
static inline uint8_t scale_for(float a, float largest) {
    int t = (int)(bits_from_float(a) >> 23) - (int)(bits_from_float(largest) >> 23)
          + ((bits_from_float(a) & 0x7FFFFF) > (bits_from_float(largest) & 0x7FFFFF));
    return (uint8_t)((t > -126 ? t : -126) + 127);
}

// 2^-t for the byte of 2^t, exact: t is in -126 .. 126 here.
static inline float inverse_scale(uint8_t b) { return float_from_e8m0((uint8_t)(254 - b)); }

// max(a, |x|), where a NaN or an infinity counts as nothing: it must not set the others' scale.
static inline float finite_max(float a, float x) {
    float magnitude = fabsf(x);
    return magnitude > a && magnitude < INFINITY ? magnitude : a;
}

// The code of x / 2^t. What is not finite becomes NaN: saturating it would hide it.
static inline uint8_t e4m3_quantized(float x, float inverse) {
    return e4m3_from_float(fabsf(x) < INFINITY ? x * inverse : copysignf(NAN, x));
}

// codes (n) from x (n), which share the scale that is returned. amax is taken as at least `floor`:
// FP8_FLOOR, as the released inference code does in its forward, or 0 for gradients, of which a
// floor would leave next to nothing.
#define FP8_FLOOR 1e-4f
static inline uint8_t quantize_group(uint8_t *codes, const real *x, float floor, int n) {
    float amax = floor;
    for (int i = 0; i < n; i++) { amax = finite_max(amax, (float)x[i]); }
    uint8_t scale = scale_for(amax, 448);
    for (int i = 0; i < n; i++) { codes[i] = e4m3_quantized((float)x[i], inverse_scale(scale)); }
    return scale;
}

// codes (T,C), scales (T,ceil(C/128)) from inp (T,C): one scale per row and 128 columns.
void quantize_rows_fp8(uint8_t *codes, uint8_t *scales, const act *inp, float floor, int T, int C) {
    GPU(quantize_rows_fp8_gpu(codes, scales, inp, floor, T, C))
    int groups = ceil_div(C, FP8_BLOCK);
    #pragma omp parallel for
    for (int t = 0; t < T; t++) {
        for (int g = 0; g < groups; g++) {
            size_t from = (size_t)t * C + g * FP8_BLOCK;
            int n = min_int(FP8_BLOCK, C - g * FP8_BLOCK);
            real x[FP8_BLOCK];
            load_rows(x, inp + from, (size_t)n);
            scales[(size_t)t * groups + g] = quantize_group(codes + from, x, floor, n);
        }
    }
}
TWIN(quantize_rows_fp8)

// codes (O,C), scales (ceil(O/128), ceil(C/128)) from w (O,C): one scale per block of 128 x 128, so
// that quantising the transpose gives the transposed codes.
void quantize_blocks_fp8(uint8_t *codes, uint8_t *scales, const float *w, int O, int C) {
    int across = ceil_div(C, FP8_BLOCK), count = ceil_div(O, FP8_BLOCK) * across;
    #pragma omp parallel for
    for (int b = 0; b < count; b++) {
        int o0 = b / across * FP8_BLOCK, o_end = min_int(O, o0 + FP8_BLOCK);
        int c0 = b % across * FP8_BLOCK, c_end = min_int(C, c0 + FP8_BLOCK);
        float amax = 0;
        for (int o = o0; o < o_end; o++) {
            for (int c = c0; c < c_end; c++) { amax = finite_max(amax, w[(size_t)o * C + c]); }
        }
        scales[b] = scale_for(amax, 448);
        for (int o = o0; o < o_end; o++) {
            for (int c = c0; c < c_end; c++) {
                size_t i = (size_t)o * C + c;
                codes[i] = e4m3_quantized(w[i], inverse_scale(scales[b]));
            }
        }
    }
}

// -------------------------------------------------------------------------------------------------
// 6 The clamped SwiGLU
//
// An expert's first product gives two rows, the gate g and the value v. With g' = min(g, limit) and
// v' = clamp(v, -limit, limit), and w the routing weight of the row (1 in the shared expert),
//
//     h = w silu(g') v',     silu(x) = x s(x),  s(x) = 1 / (1 + e^-x),  silu' = s (1 + x (1 - s)).
//
// The gate has no lower clamp: silu vanishes there by itself. A clamp passes the gradient where it
// does not act, its end points included, as PyTorch's does. All comparisons are written so that a
// NaN comes out as a NaN, for the check of the loss to find. Source: deepseek-v4-flash.md, 3.6 and
// 6.11.

static inline real sigmoid(real x) { return 1 / (1 + exp(-x)); }

// h of one gate and value.
static inline real swiglu(real gate, real value, real w, float limit) {
    gate = gate > limit ? limit : gate;
    value = value > limit ? limit : value < -limit ? -limit : value;
    return w * (gate * sigmoid(gate)) * value;
}

// Its slopes times dh: *dgate and *dvalue; *dw += that by w.
static inline void swiglu_slopes(real *dgate, real *dvalue, real *dw, real dh, real gate,
                                 real value, real w, float limit) {
    // forward: g' = min(g, limit), v' = clamp(v, -limit, limit)
    int gate_passes = !(gate > limit), value_passes = !(value > limit || value < -limit);
    gate = gate_passes ? gate : limit;
    value = value_passes ? value : value > 0 ? limit : -limit;
    // forward: h = w silu(g') v'
    real s = sigmoid(gate), silu = gate * s;
    *dw += dh * silu * value;
    *dvalue = value_passes ? w * dh * silu : 0;
    // forward: silu(x) = x s(x), so its slope is s + x s (1 - s)
    *dgate = gate_passes ? w * dh * value * (s * (1 + gate * (1 - s))) : 0;
}

// h (T,F) from g (T,F), v (T,F) and weight (T), or NULL for all ones. limit may be INFINITY.
void swiglu_forward(act *h, const act *g, const act *v, const real *weight, float limit, int T,
                    int F) {
    GPU(swiglu_forward_gpu(h, g, v, weight, limit, T, F))
    #pragma omp parallel for
    for (int t = 0; t < T; t++) {
        real w = weight ? weight[t] : 1;
        for (size_t i = (size_t)t * F; i < (size_t)(t + 1) * F; i++) {
            st(h + i, swiglu(ld(g + i), ld(v + i), w, limit));
        }
    }
}
TWIN(swiglu_forward)

// dg, dv (T,F) and dweight (T) from dh (T,F); all are overwritten. dweight may be NULL.
void swiglu_backward(act *dg, act *dv, real *dweight, const real *dh, const act *g, const act *v,
                     const real *weight, float limit, int T, int F) {
    GPU(swiglu_backward_gpu(dg, dv, dweight, dh, g, v, weight, limit, T, F))
    #pragma omp parallel for
    for (int t = 0; t < T; t++) {
        real w = weight ? weight[t] : 1, dw = 0, dgate, dvalue;
        for (size_t i = (size_t)t * F; i < (size_t)(t + 1) * F; i++) {
            swiglu_slopes(&dgate, &dvalue, &dw, dh[i], ld(g + i), ld(v + i), w, limit);
            st(dg + i, dgate);
            st(dv + i, dvalue);
        }
        if (dweight) { dweight[t] = dw; }
    }
}
TWIN(swiglu_backward)

// -------------------------------------------------------------------------------------------------
// 7 The clamped SwiGLU between two fp8 products
//
// Here gate and value are halves of one row, gv = [g | v] (T,2F): what one product with w1 above w3
// leaves. h is rounded once, straight to codes; so are its gradients, whose two halves have scales
// of their own. Nothing of it is ever stored in between. Source: fp8-flow-moe.md, 2.6.

// codes (T,F), scales (T,F/128) from gv (T,2F), weight (T) or NULL for all ones. F % 128 == 0.
void swiglu_quantize_forward(uint8_t *codes, uint8_t *scales, const act *gv, const real *weight,
                             float limit, float floor, int T, int F) {
    GPU(swiglu_quantize_forward_gpu(codes, scales, gv, weight, limit, floor, T, F))
    require(F % FP8_BLOCK == 0);
    #pragma omp parallel for
    for (int t = 0; t < T; t++) {
        real w = weight ? weight[t] : 1, h[FP8_BLOCK];
        for (int c = 0; c < F; c += FP8_BLOCK) {
            const act *g = gv + (size_t)t * 2 * F + c, *v = g + F;
            for (int i = 0; i < FP8_BLOCK; i++) {
                h[i] = swiglu(ld(g + i), ld(v + i), w, limit);
            }
            size_t group = ((size_t)t * F + c) / FP8_BLOCK;
            scales[group] = quantize_group(codes + group * FP8_BLOCK, h, floor, FP8_BLOCK);
        }
    }
}
TWIN(swiglu_quantize_forward)

// dcodes (T,2F), dscales (T,2F/128): [dg | dv], and dweight (T), which may be NULL, from dh (T,F).
// No floor: gradients may be as small as they like.
void swiglu_quantize_backward(uint8_t *dcodes, uint8_t *dscales, real *dweight, const act *dh,
                              const act *gv, const real *weight, float limit, int T, int F) {
    GPU(swiglu_quantize_backward_gpu(dcodes, dscales, dweight, dh, gv, weight, limit, T, F))
    require(F % FP8_BLOCK == 0);
    #pragma omp parallel for
    for (int t = 0; t < T; t++) {
        real w = weight ? weight[t] : 1, dw = 0, dg[FP8_BLOCK], dv[FP8_BLOCK];
        for (int c = 0; c < F; c += FP8_BLOCK) {
            const act *g = gv + (size_t)t * 2 * F + c, *v = g + F, *d = dh + (size_t)t * F + c;
            for (int i = 0; i < FP8_BLOCK; i++) {
                swiglu_slopes(&dg[i], &dv[i], &dw, ld(d + i), ld(g + i), ld(v + i), w, limit);
            }
            size_t group = ((size_t)t * 2 * F + c) / FP8_BLOCK, half = F / FP8_BLOCK;
            uint8_t *to = dcodes + group * FP8_BLOCK;
            dscales[group] = quantize_group(to, dg, 0, FP8_BLOCK);
            dscales[group + half] = quantize_group(to + F, dv, 0, FP8_BLOCK);
        }
        if (dweight) { dweight[t] = dw; }
    }
}
TWIN(swiglu_quantize_backward)

// -------------------------------------------------------------------------------------------------
// 8 Rows that stay fp8: widened, transposed, carried to their experts
//
// A row is quantised once, where it comes from, and is the same number for everything that reads it
// afterwards: the product of the forward, that of the backward, and the adapters' gradients.
//
// A product that sums over tokens wants the scale to be constant along tokens, not along channels.
// Quantising anew would round twice. But scales are powers of two: to give a code another scale is
// to shift it, and exact unless the code runs out of exponents. So a tile of 128 x 128 is brought
// to the largest scale of its rows, and turned. The result has the form of a frozen matrix.
//
// The trainer needs little of this: widen_rows_fp8, since adapters' gradients are made in bf16 and
// a frozen matrix is turned when it is recast (mxfp4.c). From e4m3_shifted on this is the published
// flow, kept to be read and tested. Source: fp8-flow-moe.md, 2.4 and 2.5.

// Rows of codes and, behind them, their scales: n C + n ceil(C/128) bytes.
typedef struct { uint8_t *codes, *scales; } Fp8Rows;
static inline Fp8Rows fp8_rows(const void *at, size_t n, int C) {
    uint8_t *codes = (uint8_t *)(uintptr_t)at;
    return (Fp8Rows){ codes, codes + n * C };
}
static inline size_t fp8_bytes(size_t n, int C) { return n * C + n * ceil_div(C, FP8_BLOCK); }

// out (T,C) = what codes (T,C) with scales (T,ceil(C/128)) stand for. Exact, in bf16 too.
void widen_rows_fp8(act *out, const uint8_t *codes, const uint8_t *scales, int T, int C) {
    GPU(widen_rows_fp8_gpu(out, codes, scales, T, C))
    int groups = ceil_div(C, FP8_BLOCK);
    #pragma omp parallel for
    for (int t = 0; t < T; t++) {
        for (int c = 0; c < C; c++) {
            float s = float_from_e8m0(scales[(size_t)t * groups + c / FP8_BLOCK]);
            st(out + (size_t)t * C + c, float_from_e4m3(codes[(size_t)t * C + c]) * s);
        }
    }
}
TWIN(widen_rows_fp8)

// The code nearest to e4m3(code) / 2^k, k >= 0, ties to the even one. NaN stays, and so does -0.
// With exponents left, this is k off the exponent. Without, the leading one becomes a digit of a
// subnormal code, and digits are shifted out below; a carry out of the top makes it normal again.
static inline uint8_t e4m3_shifted(uint8_t code, int k) {
    int exponent = code >> 3 & 15, digits = exponent ? 8 + (code & 7) : code & 7;
    if ((code & 0x7F) == 0x7F) { return code; }
    if (exponent > k) { return (uint8_t)(code - 8 * k); }
    int shift = k + 1 - (exponent ? exponent : 1);
    if (shift == 0) { return code; }
    shift = min_int(shift, 5);              // digits <= 15: nothing is left of them there
    int odd = digits >> shift & 1;
    return (uint8_t)((code & 0x80) | (digits + (1 << (shift - 1)) - 1 + odd) >> shift);
}

// out (C,T), out_scales (ceil(C/128), ceil(T/128)) from codes (T,C), scales (T,ceil(C/128)): the
// transpose, with one scale per block of 128 x 128. Rows of several experts must be padded, so that
// no block holds rows of two.
void transpose_fp8(uint8_t *out, uint8_t *out_scales, const uint8_t *codes, const uint8_t *scales,
                   int T, int C) {
    CPU_ONLY();
    int across = ceil_div(C, FP8_BLOCK), down = ceil_div(T, FP8_BLOCK);
    #pragma omp parallel for
    for (int b = 0; b < across * down; b++) {
        int t0 = b / across * FP8_BLOCK, t_end = min_int(T, t0 + FP8_BLOCK), g = b % across;
        uint8_t largest = 0;
        for (int t = t0; t < t_end; t++) {
            uint8_t s = scales[(size_t)t * across + g];
            largest = s > largest ? s : largest;
        }
        out_scales[(size_t)g * down + b / across] = largest;
        for (int c = g * FP8_BLOCK; c < min_int(C, (g + 1) * FP8_BLOCK); c++) {
            for (int t = t0; t < t_end; t++) {
                out[(size_t)c * T + t] = e4m3_shifted(codes[(size_t)t * C + c],
                                                      largest - scales[(size_t)t * across + g]);
            }
        }
    }
}

// out (C,O), out_scales (ceil(C/128), ceil(O/128)): the transpose of a frozen matrix w (O,C), scale
// (ceil(O/128), ceil(C/128)). Codes and scales only move, and a backward is a forward with it.
void turn_fp8(uint8_t *out, uint8_t *out_scales, const uint8_t *w, const uint8_t *scale, int O,
              int C) {
    CPU_ONLY();
    int across = ceil_div(C, FP8_BLOCK), down = ceil_div(O, FP8_BLOCK);
    for (int b = 0; b < across * down; b++) {
        out_scales[(size_t)(b % across) * down + b / across] = scale[b];
    }
    #pragma omp parallel for
    for (int c = 0; c < C; c++) {
        for (int o = 0; o < O; o++) { out[(size_t)c * O + o] = w[(size_t)o * C + c]; }
    }
}

// padded (E+1) from offset (E+1): the same experts, each with its rows rounded up to a multiple of
// `align`. place, if given, says where row r goes: place[row_slot[r]] for its slot t*K + k; slots
// whose expert is elsewhere keep what they hold, -1.
void pad_offsets(int *padded, int *place, const int *row_slot, const int *offset, int E,
                 int align) {
    padded[0] = 0;
    for (int e = 0; e < E; e++) {
        int rows = offset[e + 1] - offset[e];
        padded[e + 1] = padded[e] + ceil_div(rows, align) * align;
        for (int r = 0; place && r < rows; r++) {
            place[row_slot[offset[e] + r]] = padded[e] + r;
        }
    }
}

// Rows for the experts, by copying bytes: out (P,C), out_scales (P,ceil(C/128)), out_weight (P),
// P = padded[E], from tokens' codes (T,C), scales, and weight (T,K). All of a padding row is zero.
void permute_pad_fp8(uint8_t *out, uint8_t *out_scales, real *out_weight, const uint8_t *codes,
                     const uint8_t *scales, const real *weight, const int *row_slot,
                     const int *offset, const int *padded, int E, int K, int C) {
    CPU_ONLY();
    size_t groups = ceil_div(C, FP8_BLOCK);
    #pragma omp parallel for schedule(dynamic)
    for (int e = 0; e < E; e++) {
        for (int p = padded[e]; p < padded[e + 1]; p++) {
            int row = offset[e] + p - padded[e], real_row = row < offset[e + 1];
            size_t slot = real_row ? row_slot[row] : 0, t = slot / K;
            memset(out + (size_t)p * C, 0, (size_t)C);
            memset(out_scales + p * groups, 0, groups);
            out_weight[p] = real_row ? weight[slot] : 0;
            if (real_row) {
                memcpy(out + (size_t)p * C, codes + t * C, (size_t)C);
                memcpy(out_scales + p * groups, scales + t * groups, groups);
            }
        }
    }
}

// The way back, where numbers are added, and so are wide: out (T,C) = the sum of the token's rows
// inp (P,C), in the order of its slots. A slot with place < 0 is not here.
void unpermute_unpad(act *out, const act *inp, const int *place, int T, int K, int C) {
    CPU_ONLY();
    #pragma omp parallel for
    for (int t = 0; t < T; t++) {
        for (int c = 0; c < C; c++) {
            real sum = 0;
            for (int k = 0; k < K; k++) {
                int p = place[(size_t)t * K + k];
                if (p >= 0) { sum += ld(inp + (size_t)p * C + c); }
            }
            st(out + (size_t)t * C + c, sum);
        }
    }
}
#endif // FP8_C
