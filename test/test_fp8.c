// Tests of fp8.c: formats, products of frozen matrices, quantisation, the clamped SwiGLU.
//
//   cc -std=gnu11 -O3 -march=native -fopenmp -Wall -Wextra -Werror test/test_fp8.c -o test_fp8 -lm
//   ... also with -DACT=float, with -DACT=double -DREAL=double (adds central differences), and with
//   -fsanitize=address,undefined
//
// The references are written from the formulas in double, and share no code with fp8.c: formats by
// ldexp, rounding by a search for the nearest code, products by three loops. Small integers make
// most products exact, so that a wrong index cannot hide in a tolerance.
//
// Each check was seen to fail on broken copies of fp8.c (and of bf16 in kernels.cu), 108 of them:
// formats: no sign, no or wrong subnormals, bias or rounding off by one, ties up, no NaN, no clamp,
//   infinity as NaN, byte 0 as 0, byte 255 as infinity;
// widening: scale dropped, taken from the next block, from the wrong row or column of the grid;
// products: half of the lanes lost, short columns or rows lost or read past the end, row0 or the
//   panel's first row forgotten, a sign, += for = and = for +=, a last panel taken as full, rows
//   without neighbours summed in another order;
// linears: tiles stored or loaded at the wrong row, bf16 read as float, tiles too large or too few;
// quantisation: > as >=, scale one off, a group's first or last number or row not looked at, its
//   neighbour's looked at, floor ignored, infinity saturated or setting the scale, signs dropped;
// SwiGLU: each clamp dropped, one-sided, added below g, hiding a NaN; its end point not passed;
//   weight dropped or applied twice; slopes with a term lost or a sign changed;
// rows in fp8: a shift one short, rounded up or cut off one exponent early; the smallest scale for
//   the largest, scales not turned; a half's scale in the other's place, dweight lacking a factor;
//   a weight by token, not slot; row 0 taken for absent; a turned matrix read at a wrong stride.
// One survived because it is no fault: the last whole step of a dot product taken as a short one.
#include "../fp8.c"
#include "check.h"

// The flavour of this build, for expressions; #if knows REAL_IS_DOUBLE.
enum { IN_DOUBLE = sizeof(real) == sizeof(double), IN_BF16 = sizeof(act) == sizeof(bf16) };

// In [-1, 1), the same on every machine.
static double uniform(void) {
    static uint64_t state = 1;
    state = state * 6364136223846793005u + 1442695040888963407u;
    return (double)(state >> 32) / 2147483648.0 - 1;
}

// 0 .. n-1.
static int below(int n) { return (int)((uniform() + 1) / 2 * n); }

static int same_bits(float a, float b) { return bits_from_float(a) == bits_from_float(b); }

// The value an activation keeps of x.
static double stored(double x) {
    act a;
    st(&a, (real)x);
    return (double)ld(&a);
}

// -------------------------------------------------------------------------------------------------
// Formats

// deepseek-v4-flash.md 2.3, in double. Not for the NaN codes.
static double e4m3_value(int code) {
    int E = code >> 3 & 15, M = code & 7;
    double magnitude = E == 0 ? ldexp(M, -9) : ldexp(8 + M, E - 10);
    return code & 0x80 ? -magnitude : magnitude;
}

// The code nearest to x by trying all of them; of two equally near ones the even one.
static int e4m3_nearest(double x) {
    static double values[0x7F];
    int best = 0;
    if (values[1] == 0) {
        for (int code = 0; code < 0x7F; code++) { values[code] = e4m3_value(code); }
    }
    for (int code = 1; code < 0x7F; code++) {
        double gain = fabs(fabs(x) - values[best]) - fabs(fabs(x) - values[code]);
        if (gain > 0 || (gain == 0 && code % 2 == 0)) { best = code; }
    }
    return best | (signbit(x) ? 0x80 : 0);
}

static void test_e4m3(void) {
    int wrong = 0;
    for (int code = 0; code < 256; code++) {
        float got = float_from_e4m3((uint8_t)code);
        if ((code & 0x7F) == 0x7F) {
            check(isnan(got), "e4m3 code %02x is %g, not NaN", code, got);
            check(e4m3_from_float(got) == code, "NaN %02x comes back as %02x", code,
                  e4m3_from_float(got));
            continue;
        }
        check(same_bits(got, (float)e4m3_value(code)), "e4m3 code %02x is %g, want %g", code, got,
              e4m3_value(code));
        check(e4m3_from_float(got) == code, "%g comes back as %02x, want %02x", got,
              e4m3_from_float(got), code);
    }
    // Halfway between neighbours, and the floats on both sides of that point.
    for (int code = 0; code < 0x7E; code++) {
        float middle = (float)((e4m3_value(code) + e4m3_value(code + 1)) / 2);
        int even = code % 2 ? code + 1 : code;
        for (int sign = 0; sign < 256; sign += 128) {
            float s = sign ? -1.0f : 1.0f;
            check(e4m3_from_float(s * middle) == (sign | even), "tie at %g", s * middle);
            check(e4m3_from_float(s * nextafterf(middle, 0)) == (sign | code), "below %g", middle);
            check(e4m3_from_float(s * nextafterf(middle, 1e9f)) == (sign | (code + 1)), "above %g",
                  middle);
        }
    }
    const float large[] = { 448, 449, 463.99f, 464, 465, 480, 1e9f, 3.4e38f, INFINITY };
    for (size_t i = 0; i < sizeof large / sizeof *large; i++) {
        check(e4m3_from_float(large[i]) == 0x7E, "%g is not saturated", large[i]);
        check(e4m3_from_float(-large[i]) == 0xFE, "%g is not saturated", -large[i]);
    }
    check(e4m3_from_float(0x1p-149f) == 0 && e4m3_from_float(-0x1p-130f) == 0x80, "tiny numbers");
    check(e4m3_from_float(NAN) == 0x7F && e4m3_from_float(-NAN) == 0xFF, "NaN keeps its sign");
    for (int i = 0; i < 100000; i++) {      // all magnitudes from 2^-12 to 2^12
        float x = (float)ldexp(uniform(), below(24) - 12);
        wrong += e4m3_from_float(x) != e4m3_nearest(x);
    }
    check(wrong == 0, "e4m3_from_float differs from the nearest code for %d of 100000", wrong);
}

static void test_e8m0(void) {
    for (int b = 0; b < 255; b++) {
        check(same_bits(float_from_e8m0((uint8_t)b), (float)ldexp(1, b - 127)), "e8m0 byte %d", b);
    }
    check(isnan(float_from_e8m0(255)), "e8m0 byte 255 is NaN");
}

// Every pattern comes back, and every pair of neighbours is rounded to from around its middle.
static void test_bf16(void) {
    int back = 0, ties = 0, sides = 0, nans = 0;
    for (uint32_t b = 0; b < 65536; b++) {
        float x = float_from_bf16((bf16){ (uint16_t)b });
        int nan = (b & 0x7FFF) > 0x7F80;
        back += !same_bits(x, float_from_bits(b << 16));
        back += bf16_from_float(x).bits != (nan ? b | 0x40 : b);
        if (nan) {          // also those whose payload is all in the lower half
            nans += !isnan(float_from_bf16(bf16_from_float(float_from_bits(b << 16 | 0xFFFF))));
        } else if ((b & 0x7FFF) < 0x7F80) {
            uint32_t even = b + (b & 1), middle = b << 16 | 0x8000;
            ties += bf16_from_float(float_from_bits(middle)).bits != even;
            sides += bf16_from_float(float_from_bits(middle - 1)).bits != b;
            sides += bf16_from_float(float_from_bits(middle + 1)).bits != b + 1;
        }
    }
    nans += !isnan(float_from_bf16(bf16_from_float(float_from_bits(0x7F800001u))));
    check(back == 0 && ties == 0 && sides == 0 && nans == 0,
          "bf16: %d do not come back, %d ties, %d neighbours of ties, %d NaN wrong", back, ties,
          sides, nans);
}

// -------------------------------------------------------------------------------------------------
// Frozen matrices

enum { FP8, BF16, F32, KINDS };
static const char *const kind_names[KINDS] = { "fp8", "bf16", "f32" };

typedef struct {
    Frozen frozen;
    void *w;
    uint8_t *scale;
    double *value;          // (O,C), what the matrix means
} Matrix;

// Draws a matrix (O,C) of that kind. Every block has another scale than its neighbours. `whole`:
// its values are integers of at most 32.
static Matrix matrix_random(int kind, int O, int C, int whole) {
    Matrix m = { { NULL, NULL, NULL }, NULL, NULL, NULL };
    Widen *const widen[KINDS] = { widen_fp8, widen_bf16, widen_f32 };
    int across = (C + 127) / 128, down = (O + 127) / 128;
    size_t n = (size_t)O * C;
    m.w = malloc(n * 4);
    m.scale = malloc((size_t)across * down);
    m.value = malloc(n * sizeof *m.value);
    for (int b = 0; b < across * down; b++) {
        m.scale[b] = (uint8_t)(whole ? 127 + b * 5 % 3 : 121 + b * 5 % 13);
    }
    for (size_t i = 0; i < n; i++) {
        if (kind == FP8) {
            int code = whole ? e4m3_nearest(below(17) - 8) : below(127) | below(2) << 7;
            ((uint8_t *)m.w)[i] = (uint8_t)code;
            int block = (int)(i / C) / 128 * across + (int)(i % C) / 128;
            m.value[i] = ldexp(e4m3_value(code), m.scale[block] - 127);
        } else {
            float x = (float)(whole ? below(65) - 32 : uniform());
            uint32_t bits = bits_from_float(x) & (kind == BF16 ? 0xFFFF0000u : 0xFFFFFFFFu);
            if (kind == BF16) { ((bf16 *)m.w)[i].bits = (uint16_t)(bits >> 16); }
            else { ((float *)m.w)[i] = x; }
            m.value[i] = float_from_bits(bits);
        }
    }
    m.frozen = (Frozen){ m.w, kind == FP8 ? m.scale : NULL, widen[kind] };
    return m;
}

static void matrix_free(Matrix *m) {
    free(m->w);
    free(m->scale);
    free(m->value);
}

static void test_widen(void) {
    const int O = 300, C = 261;
    for (int kind = 0; kind < KINDS; kind++) {
        Matrix m = matrix_random(kind, O, C, 0);
        real *row = malloc(sizeof(real) * C);
        int wrong = 0;
        for (int o = 0; o < O; o++) {
            m.frozen.widen(row, m.frozen.w, m.frozen.scale, (size_t)o, C);
            for (int c = 0; c < C; c++) { wrong += (double)row[c] != m.value[(size_t)o * C + c]; }
        }
        check(wrong == 0, "widen_%s: %d of %d values are wrong", kind_names[kind], wrong, O * C);
        free(row);
        matrix_free(&m);
    }
    // The extreme scales, and that all codes are widened in vector code as in scalar code.
    uint8_t codes[256], scales[2] = { 0, 254 };
    real row[256];
    for (int i = 0; i < 256; i++) { codes[i] = (uint8_t)(i % 128 == 127 ? 0 : i); }
    widen_fp8(row, codes, scales, 0, 256);
    for (int i = 0; i < 256; i++) {
        double want = ldexp(e4m3_value(codes[i]), i < 128 ? -127 : 127);
        check((double)row[i] == want || (sizeof(real) == 4 && fabs(want) > 3.4e38),
              "code %02x at an extreme scale is %g, want %g", codes[i], (double)row[i], want);
    }
}

// y = x W^T and dx += dy W on rows row0 .. row0+O-1 of a larger matrix, exactly, and nothing
// written around them. All sums are integers below 2^24.
static void check_products_exact(int kind, int n, int C, int O) {
    enum { EDGE = 8, MARK = 12345 };
    int row0 = 3, bad_y = 0, bad_dx = 0, edges = 0;
    Matrix m = matrix_random(kind, O + row0 + 2, C, 1);
    size_t n_x = (size_t)n * C, n_y = (size_t)n * O;
    real *x = malloc(sizeof(real) * n_x), *dy = malloc(sizeof(real) * n_y);
    real *y = malloc(sizeof(real) * (n_y + EDGE)), *dx = malloc(sizeof(real) * (n_x + EDGE));
    double *want_dx = malloc(sizeof(double) * n_x);
    for (size_t i = 0; i < n_x; i++) {
        x[i] = (real)(below(9) - 4);
        want_dx[i] = dx[i] = (real)(below(9) - 4);      // there already: the backward adds
    }
    for (size_t i = 0; i < n_y; i++) { dy[i] = (real)(below(9) - 4); }
    for (size_t i = 0; i < n_y + EDGE; i++) { y[i] = MARK; }
    for (size_t i = n_x; i < n_x + EDGE; i++) { dx[i] = MARK; }
    frozen_forward(y, x, m.frozen, (size_t)row0, n, C, O);
    frozen_backward(dx, dy, m.frozen, (size_t)row0, n, C, O);
    for (int r = 0; r < n; r++) {
        for (int o = 0; o < O; o++) {
            double want = 0;
            for (int c = 0; c < C; c++) {
                double w = m.value[(size_t)(row0 + o) * C + c];
                want += (double)x[(size_t)r * C + c] * w;
                want_dx[(size_t)r * C + c] += (double)dy[(size_t)r * O + o] * w;
            }
            bad_y += (double)y[(size_t)r * O + o] != want;
        }
    }
    for (size_t i = 0; i < n_x; i++) { bad_dx += (double)dx[i] != want_dx[i]; }
    for (int i = 0; i < EDGE; i++) { edges += y[n_y + i] != MARK || dx[n_x + i] != MARK; }
    check(!bad_y && !bad_dx && !edges, "%s, n %d, C %d, O %d: %d of y, %d of dx wrong, %d outside",
          kind_names[kind], n, C, O, bad_y, bad_dx, edges);
    free(x);
    free(dy);
    free(y);
    free(dx);
    free(want_dx);
    matrix_free(&m);
}

static void test_products_exact(void) {
    const int ns[] = { 0, 1, 2, 3, 4, 5, 7, 8 }, Os[] = { 1, 2, 3, 4, 5, 16, 17, 130 };
    const int Cs[] = { 1, 3, 4, 5, 8, 13, 16, 17, 128, 200, 257 };
    for (size_t i = 0; i < sizeof ns / sizeof *ns; i++) {
        for (size_t j = 0; j < sizeof Cs / sizeof *Cs; j++) {
            for (size_t k = 0; k < sizeof Os / sizeof *Os; k++) {
                check_products_exact((int)(i + j + k) % KINDS, ns[i], Cs[j], Os[k]);
            }
        }
    }
    check_products_exact(F32, 6, 20000, 35);        // rows too long for a whole panel
}

// Random values: close to the sums in double, and the same bits for a row alone as among others.
static void test_products_random(void) {
    const int n = 11, C = 389, O = 211;
    size_t n_x = (size_t)n * C, n_y = (size_t)n * O;
    for (int kind = 0; kind < KINDS; kind++) {
        Matrix m = matrix_random(kind, O, C, 0);
        real *x = malloc(sizeof(real) * n_x), *dy = malloc(sizeof(real) * n_y);
        real *y = malloc(sizeof(real) * n_y), *y_part = malloc(sizeof(real) * n_y);
        real *dx = calloc(n_x, sizeof(real)), *dx_part = calloc(n_x, sizeof(real));
        double *want = calloc(n_y, sizeof(double)), *want_dx = calloc(n_x, sizeof(double));
        for (size_t i = 0; i < n_x; i++) { x[i] = (real)uniform(); }
        for (size_t i = 0; i < n_y; i++) { dy[i] = (real)uniform(); }
        frozen_forward(y, x, m.frozen, 0, n, C, O);
        frozen_backward(dx, dy, m.frozen, 0, n, C, O);
        for (int r = 0; r < n; r++) {
            for (int o = 0; o < O; o++) {
                for (int c = 0; c < C; c++) {
                    double w = m.value[(size_t)o * C + c];
                    want[r * O + o] += (double)x[r * C + c] * w;
                    want_dx[r * C + c] += (double)dy[r * O + o] * w;
                }
            }
        }
        double tol = IN_DOUBLE ? 1e-14 : 5e-7;
        check_tensor("y, n 11, C 389, O 211", y, want, n_y, tol);
        check_tensor("dx", dx, want_dx, n_x, tol);
        for (int part = 1; part < n; part++) {
            memset(dx_part, 0, sizeof(real) * n_x);
            for (int r = 0; r < n; r += part) {
                int rows = min_int(part, n - r);
                frozen_forward(y_part + r * O, x + r * C, m.frozen, 0, rows, C, O);
                frozen_backward(dx_part + r * C, dy + r * O, m.frozen, 0, rows, C, O);
            }
            check(memcmp(y, y_part, sizeof(real) * n_y) == 0, "bits of y in parts of %d", part);
            check(memcmp(dx, dx_part, sizeof(real) * n_x) == 0, "bits of dx in parts of %d", part);
        }
        free(x);
        free(dy);
        free(y);
        free(y_part);
        free(dx);
        free(dx_part);
        free(want);
        free(want_dx);
        matrix_free(&m);
    }
}

// -------------------------------------------------------------------------------------------------
// Linears

static void set_threads(int n) {
#ifdef _OPENMP
    omp_set_num_threads(n);
#else
    (void)n;
#endif
}

// One linear, forward and backward, on doubles: out (T,O), dinp (T,C), x (T,C), dy (T,O). dinp
// holds what is there before; the fp8 linear gets NaN instead, because it overwrites.
static void run_linear(int kind, double *out, double *dinp, const double *x, const double *dy,
                       const Matrix *m, int T, int C, int O) {
    size_t n_x = (size_t)T * C, n_y = (size_t)T * O;
    act *x_act = malloc(n_x * sizeof(act) + 1), *dy_act = malloc(n_y * sizeof(act) + 1);
    act *out_act = malloc(n_y * sizeof(act) + 1), *dinp_act = malloc(n_x * sizeof(act) + 1);
    real *dy_real = malloc(n_y * sizeof(real) + 1), *out_real = malloc(n_y * sizeof(real) + 1);
    real *dinp_real = malloc(n_x * sizeof(real) + 1);
    for (size_t i = 0; i < n_x; i++) {
        st(x_act + i, (real)x[i]);
        st(dinp_act + i, (real)NAN);
        dinp_real[i] = (real)dinp[i];
    }
    for (size_t i = 0; i < n_y; i++) {
        st(dy_act + i, (real)dy[i]);
        dy_real[i] = (real)dy[i];
        st(out_act + i, (real)NAN);
        out_real[i] = (real)NAN;
    }
    if (kind == FP8) {
        linear_fp8_forward(out_act, x_act, m->w, m->scale, T, C, O);
        linear_fp8_backward(dinp_act, dy_act, m->w, m->scale, T, C, O);
    } else if (kind == BF16) {
        linear_bf16_forward(out_real, x_act, m->w, T, C, O);
        linear_bf16_backward(dinp_real, dy_real, m->w, T, C, O);
    } else {
        linear_f32_forward(out_real, x_act, m->w, T, C, O);
        linear_f32_backward(dinp_real, dy_real, m->w, T, C, O);
    }
    for (size_t i = 0; i < n_y; i++) {
        out[i] = (double)(kind == FP8 ? ld(out_act + i) : out_real[i]);
    }
    for (size_t i = 0; i < n_x; i++) {
        dinp[i] = (double)(kind == FP8 ? ld(dinp_act + i) : dinp_real[i]);
    }
    free(x_act);
    free(dy_act);
    free(out_act);
    free(dinp_act);
    free(dy_real);
    free(out_real);
    free(dinp_real);
}

// Integers: the exact sums, rounded once where the result is stored.
static void check_linear_exact(int kind, int T, int C, int O) {
    Matrix m = matrix_random(kind, O, C, 1);
    size_t n_x = (size_t)T * C, n_y = (size_t)T * O;
    double *x = malloc(8 * n_x), *dy = calloc(n_y, 8), *out = malloc(8 * n_y);
    double *dinp = malloc(8 * n_x), *want = calloc(n_y, 8), *want_dinp = malloc(8 * n_x);
    int wrong = 0;
    for (size_t i = 0; i < n_x; i++) {
        x[i] = below(9) - 4;
        dinp[i] = below(9) - 4;
        want_dinp[i] = kind == FP8 ? 0 : dinp[i];
    }
    for (size_t i = 0; i < n_y; i++) { dy[i] = below(9) - 4; }
    run_linear(kind, out, dinp, x, dy, &m, T, C, O);
    for (int t = 0; t < T; t++) {
        for (int o = 0; o < O; o++) {
            for (int c = 0; c < C; c++) {
                want[t * O + o] += x[t * C + c] * m.value[o * C + c];
                want_dinp[t * C + c] += dy[t * O + o] * m.value[o * C + c];
            }
        }
    }
    for (size_t i = 0; i < n_y; i++) {
        wrong += out[i] != (kind == FP8 ? stored(want[i]) : want[i]);
    }
    check(wrong == 0, "linear_%s_forward %d x %d x %d: %d wrong", kind_names[kind], T, C, O, wrong);
    wrong = 0;
    for (size_t i = 0; i < n_x; i++) {
        wrong += dinp[i] != (kind == FP8 ? stored(want_dinp[i]) : want_dinp[i]);
    }
    check(wrong == 0, "linear_%s_backward %d x %d x %d: %d wrong", kind_names[kind], T, C, O,
          wrong);
    free(x);
    free(dy);
    free(out);
    free(dinp);
    free(want);
    free(want_dinp);
    matrix_free(&m);
}

// Random values: the same bits for any number of threads and any cut of the rows; and, where
// nothing is rounded, gradients that are slopes.
static void check_linear_random(int kind, int T, int C, int O) {
    Matrix m = matrix_random(kind, O, C, 0);
    size_t n_x = (size_t)T * C, n_y = (size_t)T * O;
    double *x = malloc(8 * n_x), *dy = malloc(8 * n_y), *out = malloc(8 * n_y);
    double *dinp = calloc(n_x, 8), *out2 = malloc(8 * n_y), *dinp2 = calloc(n_x, 8);
    for (size_t i = 0; i < n_x; i++) { x[i] = uniform(); }
    for (size_t i = 0; i < n_y; i++) { dy[i] = uniform(); }
    set_threads(1);
    run_linear(kind, out, dinp, x, dy, &m, T, C, O);
    for (int threads = 2; threads <= 3; threads++) {
        set_threads(threads);
        memset(dinp2, 0, 8 * n_x);
        run_linear(kind, out2, dinp2, x, dy, &m, T, C, O);
        check(memcmp(out, out2, 8 * n_y) == 0 && memcmp(dinp, dinp2, 8 * n_x) == 0,
              "linear_%s: bits with %d threads", kind_names[kind], threads);
    }
    for (int cut = 0; cut <= T; cut += T / 4) {
        memset(dinp2, 0, 8 * n_x);
        run_linear(kind, out2, dinp2, x, dy, &m, cut, C, O);
        run_linear(kind, out2 + cut * O, dinp2 + cut * C, x + cut * C, dy + cut * O, &m, T - cut, C,
                   O);
        check(memcmp(out, out2, 8 * n_y) == 0 && memcmp(dinp, dinp2, 8 * n_x) == 0,
              "linear_%s: bits of rows cut at %d", kind_names[kind], cut);
    }
    if (IN_DOUBLE) {
        double left = 0, right = 0;     // the adjoint: <dy, W x> = <W^T dy, x>
        for (size_t i = 0; i < n_y; i++) { left += dy[i] * out[i]; }
        for (size_t i = 0; i < n_x; i++) { right += dinp[i] * x[i]; }
        check_close("adjoint", kind, right, left, 1e-10 * fabs(left));
        for (int trial = 0; trial < 20; trial++) {
            size_t i = (size_t)below((int)n_x);
            double keep = x[i], h = 1e-3, loss[2] = { 0, 0 };
            for (int side = 0; side < 2; side++) {
                x[i] = keep + (side ? h : -h);
                run_linear(kind, out2, dinp2, x, dy, &m, T, C, O);
                for (size_t k = 0; k < n_y; k++) { loss[side] += dy[k] * out2[k]; }
            }
            x[i] = keep;
            double slope = (loss[1] - loss[0]) / (2 * h);
            check_close("slope of the linear", (long)i, dinp[i], slope, 1e-6 * fabs(slope) + 1e-9);
        }
    }
    free(x);
    free(dy);
    free(out);
    free(dinp);
    free(out2);
    free(dinp2);
    matrix_free(&m);
}

static void test_linears(void) {
    for (int kind = 0; kind < KINDS; kind++) {
        for (int threads = 1; threads <= 3; threads++) {
            set_threads(threads);
            check_linear_exact(kind, 37, 261, 150);
            check_linear_exact(kind, 1, 128, 128);
        }
        check_linear_random(kind, 29, 140, 71);
    }
#ifndef _OPENMP
    skip("threads: built without OpenMP");
#endif
}

// Tiles are non-empty, small enough for what host buffers may take, and enough for all threads.
static void test_tile_rows(void) {
    const int widths[] = { 0, 1, 256, 4096, 36864, 129280, 400000 };
    for (int threads = 1; threads <= 3; threads++) {
        set_threads(threads);
        for (int T = 0; T < 3000; T = 2 * T + 1) {
            for (size_t i = 0; i < sizeof widths / sizeof *widths; i++) {
                int tile = tile_rows(T, widths[i]);
                size_t bytes = sizeof(real) * (size_t)tile * (size_t)widths[i];
                check(tile >= 1 && (tile == 1 || bytes < 1 << 20),
                      "tile %d of %d x %d is %zu bytes", tile, T, widths[i], bytes);
#ifdef _OPENMP
                check(T <= 4 * threads * threads || (T + tile - 1) / tile >= threads,
                      "tile %d of %d x %d leaves a thread without work", tile, T, widths[i]);
#endif
            }
        }
    }
}

// -------------------------------------------------------------------------------------------------
// Quantisation

// The smallest t >= -126 with a <= largest 2^t, by trying.
static int exponent_for(double a, double largest) {
    int t = -126;
    while (a > ldexp(largest, t)) { t++; }
    return t;
}

static void test_scale_for(void) {
    const float largest[2] = { 448, 6 };
    for (int l = 0; l < 2; l++) {
        float limit = largest[l];
        int wrong = 0, formula = 0;
        double covers[256];             // the largest number that a scale byte will do for
        for (int b = 0; b < 256; b++) { covers[b] = ldexp(limit, b - 127); }
        for (int k = -149; k < 120; k++) {
            float a = (float)ldexp(limit, k);
            float around[3] = { a, nextafterf(a, 0), nextafterf(a, INFINITY) };
            for (int i = 0; i < 3; i++) {
                wrong += scale_for(around[i], limit) != exponent_for(around[i], limit) + 127;
            }
        }
        for (uint32_t mantissa = 0; mantissa < 1 << 23; mantissa++) {
            // The released code takes ceil(log2()) from the bits of a float product: the same.
            float a = float_from_bits(134u << 23 | mantissa);
            uint32_t product = bits_from_float(a * (1 / limit));
            int b = scale_for(a, limit);
            formula += b != (int)(product >> 23) + ((product & 0x7FFFFF) != 0);
            wrong += a > covers[b] || a <= covers[b - 1];
        }
        check(wrong == 0, "scale_for(a, %g): %d wrong", limit, wrong);
        check(formula == 0, "scale_for(a, %g): %d unlike the released formula", limit, formula);
        check(scale_for(0, limit) == 1, "the scale of a zero group is 2^-126");
    }
}

// What group and scale say about one number: its code, or the NaN that it must become.
static int code_wanted(float x, int t) {
    return isfinite(x) ? e4m3_nearest(ldexp(x, -t)) : 0x7F | (signbit(x) ? 0x80 : 0);
}

static void test_quantize_rows(void) {
    enum { T = 300, C = 333, GROUPS = 3 };
    act *inp = malloc(sizeof(act) * T * C);
    uint8_t *codes = malloc(T * C), *scales = malloc(T * GROUPS);
    const float floors[2] = { 0, 1e-4f };
    for (int t = 0; t < T; t++) {
        for (int c = 0; c < C; c++) {
            // Row magnitudes from subnormal to huge, another one in each group, whose largest is
            // at either end, or exactly 448 2^k.
            double x = ldexp(uniform(), (t - 150 < 110 ? t - 150 : 0) + 4 - c / 128 * 4);
            if (t % 3 == 1 && (c == 0 || c == 128 || c == 256)) { x *= 0x1p5; }
            if (t % 3 == 2 && (c == 127 || c == 255 || c == 332)) { x *= 0x1p5; }
            if (t % 3 == 0) { x = ldexp(below(449), t - 160 < 115 ? t - 160 : 0); }
            if (t == 200) { x = c % 2 ? 0.0 : -0.0; }
            if (t == 201 && c == 7) { x = NAN; }
            if (t == 201 && c == 130) { x = -INFINITY; }
            st(inp + t * C + c, (real)(float)x);
        }
        if (t % 3 == 0 && t < 270) { st(inp + t * C + 200, (real)ldexp(-448, t - 160)); }
    }
    for (int f = 0; f < 2; f++) {
        int bad_scales = 0, bad_codes = 0;
        quantize_rows_fp8(codes, scales, inp, floors[f], T, C);
        for (int t = 0; t < T; t++) {
            for (int g = 0; g < GROUPS; g++) {
                int end = g == GROUPS - 1 ? C : (g + 1) * 128;
                double amax = floors[f];
                for (int c = g * 128; c < end; c++) {
                    double x = fabs((double)ld(inp + t * C + c));
                    if (isfinite(x) && x > amax) { amax = x; }
                }
                int e = exponent_for(amax, 448);
                bad_scales += scales[t * GROUPS + g] != e + 127;
                for (int c = g * 128; c < end; c++) {
                    bad_codes += codes[t * C + c] != code_wanted((float)ld(inp + t * C + c), e);
                }
            }
        }
        check(bad_scales == 0 && bad_codes == 0,
              "quantize_rows, floor %g: %d scales, %d codes wrong", floors[f], bad_scales,
              bad_codes);
    }
    check(scales[200 * GROUPS] == 127 - 22, "a floor of 1e-4 is a scale of 2^-22");
    free(inp);
    free(codes);
    free(scales);

    // deepseek-v4-flash.md section 11, fp8 kv block.
    const double block[4] = { 3.3, -0.71, 0.0123, 100 };
    const double want[4] = { 3.25, -0.6875, 0.0126953125, 96 };
    act x[4];
    uint8_t code[4], scale;
    for (int i = 0; i < 4; i++) { st(x + i, (real)block[i]); }
    quantize_rows_fp8(code, &scale, x, 1e-4f, 1, 4);
    check(scale == 125, "kv block: scale byte %d, want 125", scale);
    for (int i = 0; i < 4; i++) { check_close("kv block", i, e4m3_value(code[i]) / 4, want[i], 0); }
}

static void test_quantize_blocks(void) {
    const int O = 300, C = 200, across = 2, down = 3;
    size_t n = (size_t)O * C;
    float *w = malloc(4 * n), *w_t = malloc(4 * n);
    uint8_t *codes = malloc(n), *codes_t = malloc(n), scales[6], scales_t[6];
    for (int o = 0; o < O; o++) {
        for (int c = 0; c < C; c++) {
            // Each block has its own magnitude, one is zero; the largest sits in a corner.
            const int peak_o[6] = { 0, 0, 255, 0, 299, 299 };
            const int peak_c[6] = { 0, 199, 0, 0, 127, 128 };
            int block = o / 128 * across + c / 128;
            float x = block == 3 ? 0 : (float)ldexp(uniform(), 7 * block - 20);
            if (o == peak_o[block] && c == peak_c[block]) { x *= 0x1p9f; }
            if (o == 299 && c == 128) { x = (float)(448 * 0x1p20); }
            if (o == 0 && c == 0) { x = nextafterf(448, 449); }
            if (o == 7 && c == 8) { x = -NAN; }
            w[o * C + c] = w_t[c * O + o] = x;
        }
    }
    for (int threads = 1; threads <= 3; threads++) {
        set_threads(threads);
        quantize_blocks_fp8(codes, scales, w, O, C);
        quantize_blocks_fp8(codes_t, scales_t, w_t, C, O);
        int bad_scales = 0, bad_codes = 0, differ = 0;
        for (int b = 0; b < across * down; b++) {
            double amax = 0;
            for (size_t i = 0; i < n; i++) {
                int mine = (int)i / C / 128 * across + (int)i % C / 128 == b;
                if (mine && fabs(w[i]) > amax) { amax = fabs(w[i]); }
            }
            bad_scales += scales[b] != exponent_for(amax, 448) + 127;
            differ += scales[b] != scales_t[b % across * down + b / across];
        }
        for (int o = 0; o < O; o++) {
            for (int c = 0; c < C; c++) {
                int e = scales[o / 128 * across + c / 128] - 127;
                bad_codes += codes[o * C + c] != code_wanted(w[o * C + c], e);
                differ += codes[o * C + c] != codes_t[c * O + o];
            }
        }
        check(bad_scales == 0 && bad_codes == 0, "quantize_blocks: %d scales, %d codes wrong",
              bad_scales, bad_codes);
        check(differ == 0, "Q(W^T) differs from Q(W)^T in %d places", differ);
    }
    // What was quantised is quantised to itself.
    int moved = 0;
    real *row = malloc(sizeof(real) * C);
    w[7 * C + 8] = 0;
    quantize_blocks_fp8(codes, scales, w, O, C);
    for (int o = 0; o < O; o++) {
        widen_fp8(row, codes, scales, (size_t)o, C);
        for (int c = 0; c < C; c++) { w_t[o * C + c] = (float)row[c]; }
    }
    quantize_blocks_fp8(codes_t, scales_t, w_t, O, C);
    for (int o = 0; o < O; o++) {
        widen_fp8(row, codes_t, scales_t, (size_t)o, C);
        for (int c = 0; c < C; c++) { moved += (float)row[c] != w_t[o * C + c]; }
    }
    check(moved == 0, "quantising twice moves %d values", moved);
    free(row);
    free(w);
    free(w_t);
    free(codes);
    free(codes_t);
}

// -------------------------------------------------------------------------------------------------
// SwiGLU

// One row of swiglu in double, from the formulas: h, and the slopes by g and v.
static double swiglu_row(double g, double v, double limit, double *by_g, double *by_v) {
    double x = g > limit ? limit : g, y = v > limit ? limit : v < -limit ? -limit : v;
    double e = exp(-x), silu = x / (1 + e);
    *by_g = g > limit ? 0 : y * (1 + e + x * e) / ((1 + e) * (1 + e));
    *by_v = v > limit || v < -limit ? 0 : silu;
    return silu * y;
}

// deepseek-v4-flash.md section 11, and what a clamp does at, below and above its limit.
static void test_swiglu_points(void) {
    enum { N = 9 };
    const double above = 10.0625;       // the next bf16
    const double gs[N] = { 12, -12, 10, above, 10, 3, 3, -15, NAN };
    const double vs[N] = { -15, 3, 10, 2, -10, above, -above, 2, 1 };
    act g[N], v[N], h[N], dg[N], dv[N];
    real dh[N], dw[N];
    for (int i = 0; i < N; i++) {
        st(g + i, (real)gs[i]);
        st(v + i, (real)vs[i]);
        dh[i] = 1;
    }
    swiglu_forward(h, g, v, NULL, 10, N, 1);
    swiglu_backward(dg, dv, dw, dh, g, v, NULL, 10, N, 1);
    check_close("h(12, -15)", 0, (double)ld(h), stored(-99.995460), IN_BF16 ? 0 : 5e-6);
    check_close("h(-12, 3)", 0, (double)ld(h + 1), stored(-2.211903e-4), IN_BF16 ? 0 : 5e-11);
    const int g_passes[N - 1] = { 0, 1, 1, 0, 1, 1, 1, 1 };
    const int v_passes[N - 1] = { 0, 1, 1, 1, 1, 0, 0, 1 };
    for (int i = 0; i < N - 1; i++) {
        check((ld(dg + i) != 0) == g_passes[i], "gradient of g at (%g, %g)", gs[i], vs[i]);
        check((ld(dv + i) != 0) == v_passes[i], "gradient of v at (%g, %g)", gs[i], vs[i]);
    }
    check(isnan((double)ld(h + N - 1)) && isnan((double)ld(dg + N - 1)), "a NaN gate shows");
    st(g, 1);
    st(v, (real)NAN);
    swiglu_forward(h, g, v, NULL, 10, 1, 1);
    swiglu_backward(dg, dv, dw, dh, g, v, NULL, 10, 1, 1);
    check(isnan((double)ld(h)) && isnan((double)ld(dg)) && isnan((double)dw[0]),
          "a NaN value shows");
}

// Random rows against the double formulas, with and without weights, at 1, 2, 3 threads; in double
// against central differences.
static void test_swiglu_random(float limit) {
    enum { T = 7, F = 37, N = T * F };
    act g[N], v[N], h[N], dg[N], dv[N];
    real dh[N], weight[T], dw[T];
    const double tol = IN_DOUBLE ? 1e-12 : 3e-6, rounding = IN_BF16 ? 1.0 / 256 : tol;
    for (int i = 0; i < N; i++) {
        st(g + i, (real)(15 * uniform()));
        st(v + i, (real)(15 * uniform()));
        dh[i] = (real)uniform();
    }
    for (int t = 0; t < T; t++) { weight[t] = (real)(t == 3 ? 0 : uniform()); }
    for (int threads = 1; threads <= 3; threads++) {
        for (int weighted = 0; weighted < 2; weighted++) {
            set_threads(threads);
            for (int i = 0; i < N; i++) { st(dg + i, (real)NAN); st(dv + i, (real)NAN); }
            for (int t = 0; t < T; t++) { dw[t] = (real)NAN; }
            swiglu_forward(h, g, v, weighted ? weight : NULL, limit, T, F);
            swiglu_backward(dg, dv, weighted ? dw : NULL, dh, g, v, weighted ? weight : NULL,
                            limit, T, F);
            for (int t = 0; t < T; t++) {
                double w = weighted ? (double)weight[t] : 1, want_dw = 0, size = 0;
                for (int i = t * F; i < (t + 1) * F; i++) {
                    double by_g, by_v, d = (double)dh[i];
                    double y = swiglu_row((double)ld(g + i), (double)ld(v + i), limit, &by_g,
                                          &by_v);
                    want_dw += d * y;
                    size += fabs(d * y);
                    check_close("h", i, (double)ld(h + i), w * y, rounding * fabs(w * y) + 1e-30);
                    check_close("dg", i, (double)ld(dg + i), w * d * by_g,
                                rounding * fabs(w * d * by_g) + 20 * tol * fabs(w * d));
                    check_close("dv", i, (double)ld(dv + i), w * d * by_v,
                                rounding * fabs(w * d * by_v) + 1e-30);
                }
                if (weighted) { check_close("dweight", t, (double)dw[t], want_dw, tol * size); }
                else { check(isnan((double)dw[t]), "dweight is written, though NULL"); }
            }
        }
    }
}

// loss = <h, dh> in double: what the backward says must be its slope.
static void test_swiglu_slopes(void) {
#if REAL_IS_DOUBLE
    enum { T = 3, F = 17, N = T * F };
    double g[N], v[N], h[N], dg[N], dv[N], dh[N], weight[T], dw[T];
    for (int i = 0; i < N; i++) { g[i] = 6 * uniform(); v[i] = 6 * uniform(); dh[i] = uniform(); }
    for (int t = 0; t < T; t++) { weight[t] = uniform(); }
    swiglu_backward(dg, dv, dw, dh, g, v, weight, 4, T, F);
    for (int i = 0; i < 2 * N + T; i++) {
        double *p = i < N ? g + i : i < 2 * N ? v + i - N : weight + i - 2 * N;
        double got = i < N ? dg[i] : i < 2 * N ? dv[i - N] : dw[i - 2 * N];
        double keep = *p, step = 1e-5, loss[2] = { 0, 0 };
        for (int side = 0; side < 2; side++) {
            *p = keep + (side ? step : -step);
            swiglu_forward(h, g, v, weight, 4, T, F);
            for (int k = 0; k < N; k++) { loss[side] += h[k] * dh[k]; }
        }
        *p = keep;
        double slope = (loss[1] - loss[0]) / (2 * step);
        check_close("slope of swiglu", i, got, slope, 1e-6 * fabs(slope) + 1e-8);
    }
#else
    skip("slopes of swiglu: they need -DACT=double -DREAL=double");
#endif
}

// -------------------------------------------------------------------------------------------------
// The quantising SwiGLU

// Whether `code` is what x / 2^t rounds to, for some x within tol: the reference and the float
// arithmetic need not agree on which side of a tie a number lies.
static int code_fits(int code, double x, double tol, int t) {
    if (code == e4m3_nearest(ldexp(x - tol, -t)) || code == e4m3_nearest(ldexp(x + tol, -t))) {
        return 1;
    }
    double value = ldexp(e4m3_value(code), t);
    return (code & 0x7F) == 0 && fabs(value - x) <= tol;     // a zero of the other sign
}

// Counts what is wrong with one group of 128 codes that should be those of x, each known to tol.
static int group_wrong(const uint8_t *codes, uint8_t scale, const double *x, const double *tol,
                       double floor) {
    double low = floor, high = floor;
    int wrong = 0;
    for (int i = 0; i < 128; i++) {
        if (!isfinite(x[i])) { continue; }
        low = fmax(low, fabs(x[i]) - tol[i]);
        high = fmax(high, fabs(x[i]) + tol[i]);
    }
    wrong += scale != exponent_for(low, 448) + 127 && scale != exponent_for(high, 448) + 127;
    for (int i = 0; i < 128; i++) {
        wrong += isfinite(x[i]) ? !code_fits(codes[i], x[i], tol[i], scale - 127)
                                : (codes[i] & 0x7F) != 0x7F;
    }
    return wrong;
}

// Codes and scales against the formulas in double, at limits, at weight 0, tiny and huge gradients,
// and with a NaN, which must show as one. In double, where no last bit decides, the fused text must
// also give the codes of its unfused parts.
static void test_swiglu_quantize(void) {
    enum { T = 13, F = 256, N = T * F };
    static act gv[2 * N], g[N], v[N], dh[N], h[N], dg[N], dv[N];
    static uint8_t codes[N], scales[N / 128], dcodes[2 * N], dscales[2 * N / 128], want[N];
    static real wide_dh[N], weight[T], dw[T], want_dw[T];
    uint8_t want_scales[N / 128];
    int wrong = 0, wrong_back = 0, unlike = 0;
    for (int t = 0; t < T; t++) {
        weight[t] = (real)(t == 3 ? 0 : t == 4 ? 1e-30 : uniform());
        for (int c = 0; c < F; c++) {
            int i = t * F + c;
            double d = uniform() * (t == 5 ? 1e-9 : t == 6 ? 1e9 : 1);
            st(g + i, (real)(c % 50 == 7 ? 10 : 15 * uniform()));
            st(v + i, (real)(c % 50 == 9 ? -10 : 15 * uniform()));
            if (t == 7 && c == 200) { st(g + i, (real)NAN); }
            gv[2 * t * F + c] = g[i];
            gv[2 * t * F + F + c] = v[i];
            st(dh + i, (real)d);
            wide_dh[i] = ld(dh + i);
        }
    }
    for (int weighted = 0; weighted < 2; weighted++) {
        const real *w = weighted ? weight : NULL;
        swiglu_quantize_forward(codes, scales, gv, w, 10, FP8_FLOOR, T, F);
        swiglu_quantize_backward(dcodes, dscales, weighted ? dw : NULL, dh, gv, w, 10, T, F);
        for (int t = 0; t < T; t++) {
            double dw_t = 0, size = 0, w_t = weighted ? (double)weight[t] : 1;
            for (int c = 0; c < F; c += 128) {
                double x[3][128], tol[3][128];
                for (int i = 0; i < 128; i++) {
                    double by_g, by_v, d = (double)ld(dh + t * F + c + i);
                    double a = (double)ld(g + t * F + c + i), b = (double)ld(v + t * F + c + i);
                    double y = swiglu_row(a, b, 10, &by_g, &by_v);
                    x[0][i] = w_t * y;
                    x[1][i] = w_t * d * by_g;
                    x[2][i] = w_t * d * by_v;
                    tol[0][i] = fabs(x[0][i]) * 0x1p-20;
                    tol[1][i] = fabs(w_t * d * 10) * 0x1p-20;   // its slope has a cancellation
                    tol[2][i] = fabs(x[2][i]) * 0x1p-20;
                    dw_t += d * y;
                    size += fabs(d * y);
                }
                int at = t * F + c, left = 2 * t * F + c, right = left + F;
                wrong += group_wrong(codes + at, scales[at / 128], x[0], tol[0], 1e-4f);
                wrong_back += group_wrong(dcodes + left, dscales[left / 128], x[1], tol[1], 0);
                wrong_back += group_wrong(dcodes + right, dscales[right / 128], x[2], tol[2], 0);
            }
            if (weighted && t != 7) {
                check_close("dweight", t, (double)dw[t], dw_t, 1e-5 * size);
            }
        }
        if (IN_DOUBLE) {
            const act *part[3] = { h, dg, dv };
            swiglu_forward(h, g, v, w, 10, T, F);
            swiglu_backward(dg, dv, want_dw, wide_dh, g, v, w, 10, T, F);
            for (int k = 0; k < 3; k++) {
                quantize_rows_fp8(want, want_scales, part[k], k == 0 ? FP8_FLOOR : 0, T, F);
                for (int t = 0; t < T; t++) {
                    if (t == 7) { continue; }       // a NaN's sign is nobody's promise
                    uint8_t *got = k == 0 ? codes + t * F : dcodes + (2 * t + k - 1) * F;
                    uint8_t *s = k == 0 ? scales + t * F / 128
                                        : dscales + (2 * t + k - 1) * F / 128;
                    unlike += memcmp(got, want + t * F, F) != 0;
                    unlike += memcmp(s, want_scales + t * F / 128, F / 128) != 0;
                }
            }
        }
    }
    check(wrong == 0, "swiglu_quantize_forward: %d codes or scales wrong", wrong);
    check(wrong_back == 0, "swiglu_quantize_backward: %d codes or scales wrong", wrong_back);
    check(unlike == 0, "the fused SwiGLU differs from its parts in %d rows", unlike);
    check(scales[3 * F / 128] == 127 - 22 && dscales[2 * 3 * F / 128] == 1,
          "a row of weight 0: the floor's scale forward, none backward");
    check(dscales[2 * 5 * F / 128] < 127 - 30, "tiny gradients keep their scale");
}

// -------------------------------------------------------------------------------------------------
// Rows that stay fp8

// The rule of the first published kernel, compiled nowhere else: it takes k off the exponent, and
// clamps that at 0 without a look at the digits.
static int shifted_published(int code, int k) {
    int exponent = code >> 3 & 15, moved = exponent - k;
    if (exponent == 0) { return 0; }
    return (code & 0x80) | (moved < 1 ? 0 : moved) << 3 | (code & 7);
}

// All codes by all shifts; then what the published rule does instead.
static void test_shift(void) {
    int wrong = 0, differ = 0, last = 0;
    for (int k = 0; k < 256; k++) {
        for (int code = 0; code < 256; code++) {
            int nan = (code & 0x7F) == 0x7F;
            int want = nan ? code : e4m3_nearest(ldexp(e4m3_value(code), -k));
            wrong += e4m3_shifted((uint8_t)code, k) != want;
            differ += !nan && k < 16
                    && e4m3_value(shifted_published(code, k)) != e4m3_value(want);
            if (!nan && (want & 0x7F) != 0) { last = k; }
        }
    }
    check(wrong == 0, "e4m3_shifted: %d of 65536 wrong", wrong);
    check(last == 18, "the last shift that leaves anything is %d, want 18", last);
    check(e4m3_shifted(0x7F, 40) == 0x7F && e4m3_shifted(0xFF, 1) == 0xFF, "NaN is shifted");
    check(e4m3_shifted(0x80, 0) == 0x80 && e4m3_shifted(0x80, 9) == 0x80, "-0 is shifted");
    // (a) an implicit one is lost, (b) subnormals vanish without any shift, (c) NaN becomes 240.
    check(differ == 1698, "the published rule: %d of 4064 numbers differ, want 1698", differ);
    check(shifted_published(0x07, 0) == 0, "(b)");
    check(e4m3_value(shifted_published(0x7F, 1)) == 240, "(c)");
}

static void check_transpose(int T, int C, int spread) {
    static const int shifts[] = { 0, 1, 6, 7, 14, 15, 16, 40, 126, 253 };
    int across = (C + 127) / 128, down = (T + 127) / 128, bad_scale = 0, bad = 0, far = 0;
    uint8_t *codes = malloc((size_t)T * C + 1), *out = malloc((size_t)T * C + 1);
    uint8_t *back = malloc((size_t)T * C + 1), *scales = malloc((size_t)T * across + 1);
    uint8_t *out_scales = malloc((size_t)across * down + 1), *rows = malloc((size_t)C * down + 1);
    uint8_t *back_scales = malloc((size_t)across * down + 1);
    for (int i = 0; i < T * C; i++) { codes[i] = (uint8_t)below(256); }
    for (int i = 0; i < T * across; i++) {
        scales[i] = (uint8_t)(spread ? 253 - shifts[below(spread)] : 130);
    }
    transpose_fp8(out, out_scales, codes, scales, T, C);
    for (int c = 0; c < C; c++) {
        for (int t = 0; t < T; t++) {
            int largest = 0, s = scales[t * across + c / 128], code = codes[t * C + c];
            for (int r = t / 128 * 128; r < T && r < t / 128 * 128 + 128; r++) {
                int other = scales[r * across + c / 128];
                largest = other > largest ? other : largest;
            }
            int got = out[(size_t)c * T + t], k = largest - s;
            bad_scale += out_scales[c / 128 * down + t / 128] != largest;
            if ((code & 0x7F) == 0x7F) { bad += got != code; continue; }
            bad += got != e4m3_nearest(ldexp(e4m3_value(code), -k));
            // The number itself: the same wherever an exponent is left, else half a digit off.
            double off = fabs(ldexp(e4m3_value(got), k) - e4m3_value(code));
            far += off > ((code >> 3 & 15) > k ? 0 : ldexp(1, k - 10));
        }
    }
    check(!bad_scale && !bad && !far, "transpose_fp8 %d x %d: %d scales, %d codes, %d numbers", T,
          C, bad_scale, bad, far);
    for (int c = 0; c < C; c++) {
        for (int b = 0; b < down; b++) { rows[c * down + b] = out_scales[c / 128 * down + b]; }
    }
    transpose_fp8(back, back_scales, out, rows, C, T);
    if (spread == 0) {
        check(memcmp(back, codes, (size_t)T * C) == 0, "transposing %d x %d twice", T, C);
    }
    // A frozen matrix has one scale per block: nothing is shifted, and twice is nothing at all.
    turn_fp8(back, back_scales, out, out_scales, C, T);
    for (int i = 0; i < across * down; i++) {
        bad_scale += back_scales[i % down * across + i / down] != out_scales[i];
    }
    for (int i = 0; i < T * C; i++) { bad += back[i % T * C + i / T] != out[i]; }
    check(!bad_scale && !bad, "turn_fp8 %d x %d: %d scales, %d codes", C, T, bad_scale, bad);
    free(codes);
    free(out);
    free(back);
    free(scales);
    free(out_scales);
    free(rows);
    free(back_scales);
}

// Why powers of two: a second quantisation along the columns moves no number that has a normal code
// under both scales, while the same with scales amax / 448 moves many.
static void test_double_quantisation(void) {
    enum { N = 128 };
    static act x[N * N];
    static uint8_t codes[N * N];
    uint8_t scales[N];
    int moved[2] = { 0, 0 };
    for (int t = 0; t < N; t++) {
        double size = ldexp(1, below(5));
        for (int c = 0; c < N; c++) { st(x + t * N + c, (real)(size * (uniform() + uniform()))); }
    }
    quantize_rows_fp8(codes, scales, x, 0, N, N);
    for (int c = 0; c < N; c++) {
        double amax = 0, value[N];
        for (int t = 0; t < N; t++) {
            value[t] = ldexp(e4m3_value(codes[t * N + c]), scales[t] - 127);
            amax = fmax(amax, fabs(value[t]));
        }
        double step[2] = { ldexp(1, exponent_for(amax, 448)), amax / 448 };
        for (int t = 0; t < N; t++) {
            for (int k = 0; k < 2; k++) {
                if (fabs(value[t]) < step[k] * 0x1p-6) { continue; }
                moved[k] += e4m3_value(e4m3_nearest(value[t] / step[k])) * step[k] != value[t];
            }
        }
    }
    check(moved[0] == 0, "powers of two: a second quantisation moves %d numbers", moved[0]);
    check(moved[1] > N * N / 4, "scales amax / 448 move only %d numbers: no control", moved[1]);
}

// Tokens to experts and back, against a copy by hand. Experts get rows[e] of the slots.
static void check_permute(const int *rows, int E, int T, int K, int C, int align) {
    int offset[16] = { 0 }, padded[16], groups = (C + 127) / 128, slots = T * K, wrong = 0;
    int *row_slot = malloc(sizeof(int) * slots), *place = malloc(sizeof(int) * slots);
    real *weight = malloc(sizeof(real) * slots);
    uint8_t *codes = malloc((size_t)T * C), *scales = malloc((size_t)T * groups);
    for (int e = 0; e < E; e++) { offset[e + 1] = offset[e] + rows[e]; }
    for (int i = 0; i < slots; i++) {       // a permutation: 7 is prime to all slots used here
        if (i < offset[E]) { row_slot[i] = i * 7 % slots; }
        weight[i] = (real)(i + 1);
        place[i] = -1;
    }
    for (int i = 0; i < T * C; i++) { codes[i] = (uint8_t)e4m3_nearest(below(9) - 4); }
    for (int i = 0; i < T * groups; i++) { scales[i] = (uint8_t)(127 + i % 3); }
    pad_offsets(padded, place, row_slot, offset, E, align);
    size_t P = padded[E];
    uint8_t *out = malloc(P * C + 1), *out_scales = malloc(P * groups + 1);
    real *out_weight = malloc(sizeof(real) * (P + 1));
    memset(out, 0xEE, P * C + 1);
    memset(out_scales, 0xEE, P * groups + 1);
    permute_pad_fp8(out, out_scales, out_weight, codes, scales, weight, row_slot, offset, padded, E,
                    K, C);
    for (int e = 0; e < E; e++) {
        int own = padded[e + 1] - padded[e];
        wrong += padded[e] % align != 0 || own < rows[e] || own >= rows[e] + align;
        for (int r = 0; r < own; r++) {
            size_t p = padded[e] + r, slot = r < rows[e] ? row_slot[offset[e] + r] : 0;
            for (int c = 0; c < C; c++) {
                wrong += out[p * C + c] != (r < rows[e] ? codes[slot / K * C + c] : 0);
            }
            for (int g = 0; g < groups; g++) {
                size_t from = slot / K * groups + g;
                wrong += out_scales[p * groups + g] != (r < rows[e] ? scales[from] : 0);
            }
            wrong += out_weight[p] != (r < rows[e] ? weight[slot] : 0);
            wrong += r < rows[e] && place[slot] != (int)p;
        }
    }
    wrong += out[P * C] != 0xEE || out_scales[P * groups] != 0xEE;
    check(wrong == 0, "permute_pad E %d T %d K %d align %d: %d wrong", E, T, K, align, wrong);

    act *wide = malloc(sizeof(act) * (P * C + 1)), *sum = malloc(sizeof(act) * (size_t)T * C);
    wrong = 0;
    widen_rows_fp8(wide, out, out_scales, (int)P, C);
    unpermute_unpad(sum, wide, place, T, K, C);
    for (int t = 0; t < T; t++) {
        int times = 0;
        for (int k = 0; k < K; k++) { times += place[t * K + k] >= 0; }
        for (int c = 0; c < C; c++) {
            double x = ldexp(e4m3_value(codes[t * C + c]), scales[t * groups + c / 128] - 127);
            wrong += (double)ld(sum + t * C + c) != times * x;
        }
    }
    check(wrong == 0, "unpermute_unpad E %d T %d K %d align %d: %d wrong", E, T, K, align, wrong);
    free(row_slot);
    free(place);
    free(weight);
    free(codes);
    free(scales);
    free(out);
    free(out_scales);
    free(out_weight);
    free(wide);
    free(sum);
}

static void test_rows_fp8(void) {
    const int sizes[] = { 1, 5, 127, 128, 129, 300 };
    test_shift();
    for (int i = 0; i < 6; i++) {
        for (int spread = 0; spread <= 10; spread += spread ? 3 : 1) {
            check_transpose(sizes[i], sizes[(i * 5 + 2) % 6], spread);
        }
    }
    check_transpose(256, 384, 7);
    test_double_quantisation();
    check_permute((const int[]){ 5, 0, 17, 11, 0 }, 5, 11, 3, 200, 8);      // all slots are here
    check_permute((const int[]){ 0, 33, 0 }, 3, 11, 3, 128, 16);            // all on one expert
    check_permute((const int[]){ 16, 1, 3 }, 3, 11, 3, 129, 16);            // a full block, few
    check_permute((const int[]){ 0, 0 }, 2, 4, 1, 64, 128);                 // none at all
    check_permute((const int[]){ 1, 2, 128, 129 }, 4, 130, 2, 64, 128);
}

// A rank without rows calls everything with T = 0: nothing is read or written.
static void test_no_rows(void) {
    linear_fp8_forward(NULL, NULL, NULL, NULL, 0, 128, 128);
    linear_fp8_backward(NULL, NULL, NULL, NULL, 0, 128, 128);
    linear_bf16_forward(NULL, NULL, NULL, 0, 128, 128);
    linear_f32_backward(NULL, NULL, NULL, 0, 128, 128);
    quantize_rows_fp8(NULL, NULL, NULL, 0, 0, 128);
    widen_rows_fp8(NULL, NULL, NULL, 0, 128);
    transpose_fp8(NULL, NULL, NULL, NULL, 0, 128);
    swiglu_quantize_forward(NULL, NULL, NULL, NULL, 10, 0, 0, 128);
    swiglu_quantize_backward(NULL, NULL, NULL, NULL, NULL, NULL, 10, 0, 128);
    swiglu_forward(NULL, NULL, NULL, NULL, 10, 0, 128);
    swiglu_backward(NULL, NULL, NULL, NULL, NULL, NULL, NULL, 10, 0, 128);
    check(1, "T = 0");
}

int main(void) {
    test_e4m3();
    test_e8m0();
    test_bf16();
    test_widen();
    test_products_exact();
    test_products_random();
    test_linears();
    test_tile_rows();
    test_scale_for();
    test_quantize_rows();
    test_quantize_blocks();
    test_swiglu_points();
    test_swiglu_random(10);
    test_swiglu_random(INFINITY);
    test_swiglu_slopes();
    test_swiglu_quantize();
    test_rows_fp8();
    test_no_rows();
    return finish("test_fp8");
}
