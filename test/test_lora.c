// Tests of lora.c: adapters against the base product, central differences and themselves in
// parts; the list of trained tensors; AdamW, Muon and clipping against PyTorch; Newton-Schulz
// against singular vectors known in closed form, and against itself in fp16; the schedule.
//
//   cc -std=gnu11 -O3 -march=native -fopenmp test/test_lora.c -o test_lora -lm && ./test_lora
//   the same with -DACT=double -DREAL=double (central differences), and with sanitizers
//
// What must hold of gradients however a step is cut, and of updates, on the CPU, and the test that
// shows it (file.function):
//   G1  nothing is added after the sum; same bits         cli.splits, moe.ranks, moe.collectives
//   G2  micro-batches and rows per rank change nothing    cli.splits, cli.ranks, data.steps
//   G3  every backward adds                               lora.accumulation, moe.repeats,
//                                                         cli.splits, train.packing
//   G4  rows of any length: divided by all labels         cli.splits, train.packing, data.steps
//   G5  expert parallelism changes no gradient            cli.splits, moe.ranks
//   G6  the norm counts every element once                lora.norm, moe.collectives, cli.splits
//   G7  clip, finite, momentum, update; an infinity       lora.nonfinite, lora.muon_size,
//       leaves all as it was                              lora.muon_skips, data.nonfinite
//   G8  one step counter, any chunks                      lora.adamw_chunks, data.resume
//   G9  no rows, no experts, no targets, idle experts     lora.no_rows, lora.registry, moe.ranks,
//                                                         train.empty_batch, cli.splits
//   G10 no token is dropped                               moe.trip, moe.ranks (capacity 1)
//   G11 the bias selects, weighs nothing, is not trained  moe.router, train.frozen
//   G12 scales once                                       lora.accumulation, cli.splits
//   G13 state of what is trained, and of nothing else     lora.registry, lora.muon_adapters,
//                                                         train.frozen
//   G14 64-bit places                                     lora.large_offsets, reshard.full_size
//   G15 derived splits are those that the others say      moe.trip
//   G16 resume to the bit; onto other ranks               cli.resume, cli.resume_ranks,
//                                                         cli.resume_muon, data.other_ranks
// Several GPUs: test_ranks.sh, functions gradients, uneven, numerics, losses.
//
// Each was seen to fail on a broken copy of lora.c:
//   linears: A, B or u read transposed; B turned or put back with the wrong stride; s dropped from
//     y, du or dB, used twice in dA, cut to an int; y rounded before the adapter is added; dx
//     without the adapter, or with its sign; u in place of du; the first strip's columns in every
//     strip; the last strip lost; dinp, dA or dB overwritten; expert 0's A, B, W, dA or dB for
//     all; A's stride for B; int offsets; parts of a long batch that overlap, or lose a row's
//     place; du not reset; an expert without rows zeroed; a strip that one thread skips
//   targets: a prefix accepted, groups not known, blanks kept, an unknown word ignored, only the
//     last word used, two matrices swapped, another exit code
//   registry: experts first; A beside B in memory; local expert numbers; a shape transposed; alpha
//     * R; b where a is; a module that is no target; a second pass with another name, another
//     shape, one tensor more or less; a name of 96; m and v in one place; moments for evaluation;
//     32-bit cursors
//   init: bound from R, or 1 % wide; one-sided; without name, without seed, by place in memory; B
//     too
//   norm: in float, last part lost, parts rounded down, by thread; non-finite: only NaN, only
//     infinity, not the last element, wrong place; clip: no 1e-6, amplifies, not off, NaN lost
//   AdamW: decay after the update, in the gradient, dropped, only where there is a gradient;
//     moments only where there is one; a correction dropped, of the next step, both swapped; betas
//     swapped; eps inside the root, or before the correction; the old m; grad_scale dropped, or
//     for m only; sign; last block lost; elements that depend on their place in a block
//   Muon: no Nesterov; scale from the rows; decay of the step; grad_scale dropped; the restart one
//     round late; Z and Q exchanged; 1e-7 added to the norm; a zero or non-finite slice moved; one
//     method for both; a slice less
//   stack: B1 and B3 exchanged, A's rows interleaved, B3 in the columns of A1, = for +=, an absent
//     one left as it was
//   schedule: warm-up from 0, or one step too long; cosine from step 0, or to the last step; final
//     fraction dropped, or not taken off; constant ignored, or without warm-up; nothing after the
//     end
#include <math.h>

// What Muon stores is narrowed on demand: to fp16, to nearest, ties to even. Done in double, so
// that it needs no such type.
static int in_fp16;
static double fp16(double x) {
    int exponent;
    frexp(x, &exponent);
    double unit = ldexp(1, (exponent < -13 ? -13 : exponent) - 11), rounded = unit * rint(x / unit);
    return fabs(rounded) > 65504 ? copysign(INFINITY, x) : rounded;
}
#define ns_round(x) (in_fp16 ? (__typeof__(x))fp16((double)(x)) : (x))
#include "../lora.c"
#include "check.h"

// -------------------------------------------------------------------------------------------------
// A linear with everything it needs, dense (E == 0) or of E experts, filled with random numbers

typedef struct {
    int T, C, O, R, E, offset[8];
    float s;
    uint8_t *w, *scale;                             // (max(E,1),O,C) fp8 or fp4
    act *inp, *out, *dout;                          // (T,C), (T,O), (T,O)
    real *u, *a, *b, *dinp, *da, *db;               // (T,R), (E,R,C), (E,O,R) and gradients
    size_t n_a, n_b;
} Linear;

// In [-1, 1), the same on every machine.
static double uniform(void) {
    static uint64_t i;
    return 2.0 * random_uniform(1, i++) - 1;
}

static real *random_reals(size_t n) {
    real *p = (real *)malloc(sizeof(real) * (n + 1));
    for (size_t i = 0; i < n; i++) { p[i] = (real)uniform(); }
    return p;
}

static act *random_acts(size_t n) {
    act *p = (act *)malloc(sizeof(act) * (n + 1));
    for (size_t i = 0; i < n; i++) { st(p + i, (real)uniform()); }
    return p;
}

// offset (E+1) may be NULL for E == 0.
static Linear linear_new(int T, int C, int O, int R, int E, const int *offset) {
    Linear l = {.T = T, .C = C, .O = O, .R = R, .E = E, .s = 1.7f};
    size_t n = E ? E : 1, bytes = n * O * C / (E ? 2 : 1);
    size_t scales = E ? n * O * (C / 32) : (size_t)((O + 127) / 128) * ((C + 127) / 128);
    l.n_a = n * R * C;
    l.n_b = n * O * R;
    for (int e = 0; E && e <= E; e++) { l.offset[e] = offset[e]; }
    l.w = (uint8_t *)malloc(bytes);
    l.scale = (uint8_t *)malloc(scales);
    for (size_t i = 0; i < bytes; i++) {            // any e2m1 pair; e4m3 below 2 in magnitude
        l.w[i] = (uint8_t)(random_bits(2, i) & (E ? 0xFF : 0xBF));
    }
    for (size_t i = 0; i < scales; i++) { l.scale[i] = (uint8_t)(124 + random_bits(3, i) % 3); }
    l.inp = random_acts((size_t)T * C);
    l.out = random_acts((size_t)T * O);
    l.dout = random_acts((size_t)T * O);
    l.u = random_reals((size_t)T * R);
    l.a = random_reals(l.n_a);
    l.b = random_reals(l.n_b);
    l.dinp = random_reals((size_t)T * C);           // gradients are added to what is there
    l.da = random_reals(l.n_a);
    l.db = random_reals(l.n_b);
    return l;
}

static void linear_free(Linear *l) {
    void *all[] = {l->w, l->scale, l->inp, l->out, l->dout, l->u, l->a, l->b, l->dinp, l->da,
                   l->db};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++) { free(all[i]); }
}

static void linear_forward(Linear *l) {
    if (l->E) {
        lora_experts_forward(l->out, l->u, l->inp, l->offset, l->w, l->scale, l->a, l->b, l->s,
                             l->E, l->C, l->O, l->R);
    } else {
        lora_linear_forward(l->out, l->u, l->inp, l->w, l->scale, l->a, l->b, l->s, l->T, l->C,
                            l->O, l->R);
    }
}

static void linear_backward(Linear *l) {
    if (l->E) {
        lora_experts_backward(l->dinp, l->da, l->db, l->dout, l->inp, l->u, l->offset, l->w,
                              l->scale, l->a, l->b, l->s, l->E, l->C, l->O, l->R);
    } else {
        lora_linear_backward(l->dinp, l->da, l->db, l->dout, l->inp, l->u, l->w, l->scale, l->a,
                             l->b, l->s, l->T, l->C, l->O, l->R);
    }
}

// The expert of row t, and row o of its matrix, widened.
static int linear_expert(const Linear *l, int t) {
    int e = 0;
    while (l->E && t >= l->offset[e + 1]) { e++; }
    return e;
}

static void linear_weights(const Linear *l, int e, int o, real *row) {
    (l->E ? widen_fp4 : widen_fp8)(row, l->w, l->scale, (size_t)e * l->O + o, l->C);
}

static void *copy(const void *p, size_t bytes) { return memcpy(malloc(bytes + 1), p, bytes); }

static void use_threads(int n) {
#ifdef _OPENMP
    omp_set_num_threads(n);
#else
    (void)n;
#endif
}

// Experts with no row, at both ends and in the middle, and with many.
static const int some_offsets[] = {0, 0, 5, 5, 36, 37, 37};

// -------------------------------------------------------------------------------------------------
// The forward

// out against the base operation: B = 0, A = NULL and R = 0 must leave the same bits.
static void test_base(Linear *l, const char *what) {
    size_t bytes = sizeof(act) * l->T * l->O;
    act *want = random_acts((size_t)l->T * l->O);
    if (l->E) {
        experts_fp4_forward(want, l->inp, l->offset, l->w, l->scale, l->E, l->C, l->O);
    } else {
        linear_fp8_forward(want, l->inp, l->w, l->scale, l->T, l->C, l->O);
    }
    linear_forward(l);
    check(memcmp(l->out, want, bytes) != 0, "%s: the adapter does nothing", what);
    Linear k = *l;
    k.b = (real *)calloc(l->n_b, sizeof(real));
    linear_forward(&k);
    check(memcmp(k.out, want, bytes) == 0, "%s: B = 0 is not the base", what);
    memset(k.out, 0, bytes);
    free(k.b);
    k.a = k.b = k.u = NULL;
    linear_forward(&k);
    check(memcmp(k.out, want, bytes) == 0, "%s: A = NULL is not the base", what);
    memset(k.out, 0, bytes);
    k.a = l->a; k.b = l->b; k.R = 0;
    linear_forward(&k);
    check(memcmp(k.out, want, bytes) == 0, "%s: R = 0 is not the base", what);
    free(want);

    // Without an adapter the backward is the base's, and touches no factor's gradient.
    real *dinp = (real *)copy(l->dinp, sizeof(real) * l->T * l->C), *keep = l->dinp;
    k.a = k.b = k.u = k.da = k.db = NULL;
    k.dinp = dinp;
    linear_backward(&k);
    double diff = 0;
    for (int t = 0; t < l->T; t += 9) {
        real row[512];
        for (int c = 0; c < l->C; c++) {
            double sum = keep[t * l->C + c];
            for (int o = 0; o < l->O; o++) {
                linear_weights(l, linear_expert(l, t), o, row);
                sum += (double)ld(l->dout + t * l->O + o) * row[c];
            }
            diff = fmax(diff, fabs(sum - dinp[t * l->C + c]));
        }
    }
    check_close(what, -1, diff, 0, 1e-4);
    free(dinp);
}

// out = st(W x + s B (A x)) and u = A x, written once more in double. `out` is rounded once: its
// error is half a bf16 ulp of the result and not of the parts, which nearly cancel here and there.
static void test_values(Linear *l, const char *what) {
    linear_forward(l);
    double worst = 0, worst_u = 0;
    double *u = (double *)calloc(l->R + 1, sizeof *u);
    real row[512];
    for (int t = 0; t < l->T; t++) {
        size_t e = linear_expert(l, t);
        for (int r = 0; r < l->R; r++) {
            u[r] = 0;
            for (int c = 0; c < l->C; c++) {
                u[r] += (double)l->a[(e * l->R + r) * l->C + c] * ld(l->inp + t * l->C + c);
            }
            worst_u = fmax(worst_u, fabs(u[r] - l->u[t * l->R + r]));
        }
        for (int o = 0; o < l->O; o++) {
            double y = 0;
            linear_weights(l, (int)e, o, row);
            for (int c = 0; c < l->C; c++) { y += (double)row[c] * ld(l->inp + t * l->C + c); }
            for (int r = 0; r < l->R; r++) { y += l->s * l->b[(e * l->O + o) * l->R + r] * u[r]; }
            double error = fabs(y - ld(l->out + t * l->O + o));
            worst = fmax(worst, error / (fabs(y) * (sizeof(act) == 2 ? 0x1.01p-8 : 0) + 4e-5));
        }
    }
    check(worst <= 1, "%s: out is off by %.2f times its tolerance", what, worst);
    check_close(what, -2, worst_u, 0, 1e-5);
    free(u);
}

// -------------------------------------------------------------------------------------------------
// The backward

// loss = <dout, out>, from a forward that starts from the present a, b and inp.
static double linear_loss(Linear *l) {
    double loss = 0;
    linear_forward(l);
    for (int i = 0; i < l->T * l->O; i++) { loss += (double)ld(l->dout + i) * ld(l->out + i); }
    return loss;
}

// slope[j] = that of the loss in x[j * stride]. The loss is linear in each single element, so only
// rounding limits the step.
static real *slopes(Linear *l, real *x, size_t n, size_t stride) {
    real *slope = random_reals(n);
    for (size_t j = 0; j * stride < n; j++) {
        real *x_j = x + j * stride, keep = *x_j;
        *x_j = keep + (real)0.5;
        double up = linear_loss(l);
        *x_j = keep - (real)0.5;
        slope[j] = (real)(up - linear_loss(l));
        *x_j = keep;
    }
    return slope;
}

static void test_gradients(Linear *l, const char *what) {
#if REAL_IS_DOUBLE
    struct { const char *name; real *x, *dx; size_t n; } parts[3] = {
        {"dinp", l->inp, l->dinp, (size_t)l->T * l->C}, {"da", l->a, l->da, l->n_a},
        {"db", l->b, l->db, l->n_b}};
    real *before[3];
    use_threads(1);
    for (int k = 0; k < 3; k++) {
        before[k] = (real *)copy(parts[k].dx, sizeof(real) * parts[k].n);
    }
    linear_forward(l);
    linear_backward(l);
    for (int k = 0; k < 3; k++) {
        char name[64];
        snprintf(name, sizeof name, "%s: %s", what, parts[k].name);
        size_t stride = parts[k].n > 3000 ? 7 : 1, n = (parts[k].n + stride - 1) / stride;
        real *want = slopes(l, parts[k].x, parts[k].n, stride);
        for (size_t j = 0; j < n; j++) {
            before[k][j] = parts[k].dx[j * stride] - before[k][j * stride];
        }
        check_tensor(name, before[k], want, n, 1e-10);
        free(want);
        free(before[k]);
    }
    use_threads(2);
#else
    (void)l; (void)what; (void)slopes;
#endif
}

// Rows from .. to-1 of a dense linear, or with everything else shared.
static Linear linear_rows(const Linear *l, int from, int to) {
    Linear k = *l;
    k.T = to - from;
    k.inp += (size_t)from * l->C;
    k.dinp += (size_t)from * l->C;
    k.out += (size_t)from * l->O;
    k.dout += (size_t)from * l->O;
    k.u += (size_t)from * l->R;
    for (int e = 0; e <= l->E; e++) {
        k.offset[e] = l->offset[e] < from ? 0 : min_int(l->offset[e], to) - from;
    }
    return k;
}

// G3, G12: N backwards over parts of the batch leave the same bits as one over all of it. With
// T > 4096 and R = 64, one backward works in parts itself.
static void test_accumulation(Linear *l, const char *what) {
    size_t n_x = (size_t)l->T * l->C, n_a = l->n_a, n_b = l->n_b;
    linear_forward(l);
    Linear once = *l;
    once.dinp = (real *)copy(l->dinp, sizeof(real) * n_x);
    once.da = (real *)copy(l->da, sizeof(real) * n_a);
    once.db = (real *)copy(l->db, sizeof(real) * n_b);
    linear_backward(&once);
    check(memcmp(once.da, l->da, sizeof(real) * n_a) != 0, "%s: da did not move", what);
    for (int parts = 2; parts <= 4; parts *= 2) {
        Linear many = *l;
        many.dinp = (real *)copy(l->dinp, sizeof(real) * n_x);
        many.da = (real *)copy(l->da, sizeof(real) * n_a);
        many.db = (real *)copy(l->db, sizeof(real) * n_b);
        for (int k = 0; k < parts; k++) {
            Linear part = linear_rows(&many, l->T * k / parts, l->T * (k + 1) / parts);
            linear_backward(&part);
        }
        check(memcmp(many.da, once.da, sizeof(real) * n_a) == 0, "%s: da in %d", what, parts);
        check(memcmp(many.db, once.db, sizeof(real) * n_b) == 0, "%s: db in %d", what, parts);
        check(memcmp(many.dinp, once.dinp, sizeof(real) * n_x) == 0, "%s: dinp in %d", what,
              parts);
        free(many.dinp); free(many.da); free(many.db);
    }
    // G9: the gradients of an expert without rows are the bits that were there.
    for (int e = 0; e < l->E; e++) {
        size_t a = (size_t)l->R * l->C, b = (size_t)l->O * l->R;
        int same = memcmp(once.da + e * a, l->da + e * a, sizeof(real) * a) == 0
                && memcmp(once.db + e * b, l->db + e * b, sizeof(real) * b) == 0;
        check(same == (l->offset[e] == l->offset[e + 1]), "%s: gradient of expert %d", what, e);
    }
    free(once.dinp); free(once.da); free(once.db);
}

// The same bits for 1, 2 and 3 threads.
static void test_threads(Linear *l, const char *what) {
    size_t n_x = (size_t)l->T * l->C;
    Linear k[3];
    for (int i = 0; i < 3; i++) {
        k[i] = *l;
        k[i].out = (act *)malloc(sizeof(act) * l->T * l->O);
        k[i].u = (real *)malloc(sizeof(real) * l->T * l->R);
        k[i].dinp = (real *)copy(l->dinp, sizeof(real) * n_x);
        k[i].da = (real *)copy(l->da, sizeof(real) * l->n_a);
        k[i].db = (real *)copy(l->db, sizeof(real) * l->n_b);
        use_threads(i + 1);
        linear_forward(&k[i]);
        linear_backward(&k[i]);
        check(memcmp(k[i].out, k[0].out, sizeof(act) * l->T * l->O) == 0
              && memcmp(k[i].u, k[0].u, sizeof(real) * l->T * l->R) == 0,
              "%s: forward, %d threads", what, i + 1);
        check(memcmp(k[i].dinp, k[0].dinp, sizeof(real) * n_x) == 0, "%s: dinp, %d threads", what,
              i + 1);
        check(memcmp(k[i].da, k[0].da, sizeof(real) * l->n_a) == 0
              && memcmp(k[i].db, k[0].db, sizeof(real) * l->n_b) == 0,
              "%s: da, db, %d threads", what, i + 1);
    }
    for (int i = 0; i < 3; i++) {
        free(k[i].out); free(k[i].u); free(k[i].dinp); free(k[i].da); free(k[i].db);
    }
    use_threads(2);
}

// No rows at all: legal, and nothing is written.
static void test_no_rows(void) {
    const int none[] = {0, 0, 0, 0};
    for (int E = 0; E <= 3; E += 3) {
        Linear l = linear_new(0, 64, 32, 2, E, none);
        real *da = (real *)copy(l.da, sizeof(real) * l.n_a);
        linear_forward(&l);
        linear_backward(&l);
        check(memcmp(da, l.da, sizeof(real) * l.n_a) == 0, "no rows: da has changed");
        free(da);
        linear_free(&l);
    }
}

// G14: 300 experts of 2^23 elements of A and 2^24 packed weights, in 2^23 bytes. Only the last one
// has rows; other pages stay untouched.
static void test_large_offsets(void) {
    enum { E = 300, C = 8192, O = 2048, R = 1024, T = 2 };
    size_t size_a = (size_t)R * C, n = E * size_a, n_w = (size_t)E * O * C / 2;
    size_t n_b = (size_t)E * O * R, bytes = sizeof(real) * 2 * (n + n_b) + n_w + n_w / 16;
    char *base = (char *)mmap(NULL, bytes, PROT_READ | PROT_WRITE,
                              MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (base == MAP_FAILED) { skip("large offsets: no address space"); return; }
    real *a = (real *)base, *da = a + n, *b = da + n, *db = b + n_b;
    uint8_t *w = (uint8_t *)(db + n_b), *scale = w + n_w;
    int *offset = (int *)calloc(E + 1, sizeof(int));
    act *inp = random_acts((size_t)T * C), *out = random_acts(T * O), *dout = random_acts(T * O);
    real *dinp = random_reals((size_t)T * C), *u = random_reals(T * R);
    offset[E] = T;
    a[n - size_a + 5 * C + 7] = 2;              // A[5][7] of the last expert
    b[n_b - R + 5] = 3;                         // B[O-1][5] of the last expert
    w[n_w - C / 2 + 5] = 2 << 4;                // W[O-1][11] of the last expert is 1
    scale[n_w / 16 - C / 32] = 127;
    real before[T] = { dinp[11], dinp[C + 11] };
    lora_experts_forward(out, u, inp, offset, w, scale, a, b, 0.5f, E, C, O, R);
    lora_experts_backward(dinp, da, db, dout, inp, u, offset, w, scale, a, b, 0.5f, E, C, O, R);
    double want = 0;
    for (int t = 0; t < T; t++) {
        check_close("large u", t, u[t * R + 5], 2 * ld(inp + t * C + 7), 1e-6);
        check_close("large out", t, ld(out + t * O + O - 1), 3 * (double)ld(inp + t * C + 7)
                    + (double)ld(inp + t * C + 11), 1e-2);
        check_close("large dinp", t, dinp[t * C + 11] - before[t], ld(dout + t * O + O - 1), 1e-6);
        want += 1.5 * ld(dout + t * O + O - 1) * ld(inp + t * C + 9);
    }
    check_close("large da", 9, da[n - size_a + 5 * C + 9], want, 1e-5);
    munmap(base, bytes);
    free(offset); free(inp); free(out); free(dout); free(dinp); free(u);
}

static void test_linears(void) {
    Linear cases[] = {
        linear_new(37, 96, 80, 3, 0, NULL),             // partial strips, partial scale blocks
        linear_new(37, 160, 136, 8, 0, NULL),
        linear_new(1, 64, 64, 1, 0, NULL),
        linear_new(37, 96, 80, 3, 6, some_offsets),
        linear_new(37, 160, 72, 8, 6, some_offsets),
    };
    const char *names[] = {"dense R 3", "dense R 8", "dense one row", "experts R 3", "experts R 8"};
    for (int i = 0; i < 5; i++) {
        test_base(&cases[i], names[i]);
        test_values(&cases[i], names[i]);
        test_gradients(&cases[i], names[i]);
        test_accumulation(&cases[i], names[i]);
        test_threads(&cases[i], names[i]);
        linear_free(&cases[i]);
    }
    const int offset[] = {0, 4090, 4097, 9000};
    Linear dense = linear_new(9000, 32, 32, 64, 0, NULL);
    Linear experts = linear_new(9000, 32, 32, 64, 3, offset);
    test_accumulation(&dense, "dense in parts");
    test_accumulation(&experts, "experts in parts");
    linear_free(&dense);
    linear_free(&experts);
    test_no_rows();
    test_large_offsets();
}

// -------------------------------------------------------------------------------------------------
// Targets and the list of trained tensors

static void parse_in_child(void *list) { targets_parse((const char *)list); }

static void test_targets(void) {
    static const struct { const char *list; unsigned bits; } good[] = {
        {"attn", 0x00F}, {"shared", 0x070}, {"experts", 0x380}, {"attn,shared,experts", 0x3FF},
        {"wq_a", 1}, {"wq_b", 2}, {"wkv", 4}, {"wo_b", 8}, {"shared.w1", 0x10},
        {"shared.w2", 0x20}, {"shared.w3", 0x40}, {"experts.w1", 0x80}, {"experts.w2", 0x100},
        {"experts.w3", 0x200}, {"experts, wkv ,wkv", 0x384}};
    for (size_t i = 0; i < sizeof good / sizeof *good; i++) {
        check(targets_parse(good[i].list) == good[i].bits, "targets_parse(\"%s\") = %x",
              good[i].list, targets_parse(good[i].list));
    }
    static const struct { const char *list, *word; } bad[] = {
        {"attn,wo_a,shared", "'wo_a'"}, {"", "''"}, {"attn,", "''"}, {"attn,,shared", "''"},
        {"att", "'att'"}, {"attn2", "'attn2'"}, {"gate,attn", "'gate'"}, {"experts.w4", "w4'"}};
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        char text[1024];
        int code = run_child(parse_in_child, (void *)bad[i].list, text, sizeof text);
        check(code == EXIT_USAGE && strstr(text, bad[i].word) && strstr(text, "HINT"),
              "targets_parse(\"%s\"): exit %d, %s", bad[i].list, code, text);
    }
}

// One pass of a small model: in layer 0 a dense matrix and two experts, in layer 1 the same.
typedef struct { Lora wq_a, w1, w2, shared, wkv, late; int change; } Registered;

static void register_all(Adapters *s, Registered *r, int first, int count) {
    adapters_begin(s);
    r->wq_a = adapter_add(s, TARGET_WQ_A, r->change == 1 ? "0.wq_b" : "0.wq_a", 10, 7);
    r->w1 = adapter_add_experts(s, TARGET_EXPERTS_W1, "0.experts", "w1", first, count, 5, 6);
    r->w2 = adapter_add_experts(s, TARGET_EXPERTS_W2, "0.experts", "w2", first, count, 6,
                                r->change == 2 ? 4 : 5);
    r->shared = adapter_add(s, TARGET_SHARED_W1, "0.shared", 10, 7);
    if (r->change != 3) { r->wkv = adapter_add(s, TARGET_WKV, "1.wkv", 4, 8); }
    if (r->change == 4) { r->late = adapter_add(s, TARGET_WO_B, "1.wo_b", 4, 8); }
}

// Counts, allocates, registers, as the model does.
static void adapters_place_all(Adapters *s, Registered *r, int first, int count, int training) {
    mem_count();
    register_all(s, r, first, count);
    adapters_alloc(s, training);
    mem_open();
    register_all(s, r, first, count);
    adapters_alloc(s, training);
    register_all(s, r, first, count);
}

static Adapters adapters_new(Registered *r, unsigned targets, int first, int count, int training) {
    Adapters s = {.R = 3, .alpha = 6, .targets = targets};
    adapters_place_all(&s, r, first, count, training);
    return s;
}

static void test_registry(void) {
    static const struct { const char *name; int rows, cols, expert; size_t at; } want[] = {
        {"0.wq_a.lora_A", 3, 10, -1, 0}, {"0.wq_a.lora_B", 7, 3, -1, 30},
        {"0.experts.4.w1.lora_A", 3, 5, 4, 87}, {"0.experts.4.w1.lora_B", 6, 3, 4, 117},
        {"0.experts.5.w1.lora_A", 3, 5, 5, 102}, {"0.experts.5.w1.lora_B", 6, 3, 5, 135},
        {"0.experts.4.w2.lora_A", 3, 6, 4, 153}, {"0.experts.4.w2.lora_B", 5, 3, 4, 189},
        {"0.experts.5.w2.lora_A", 3, 6, 5, 171}, {"0.experts.5.w2.lora_B", 5, 3, 5, 204},
        {"1.wkv.lora_A", 3, 4, -1, 51}, {"1.wkv.lora_B", 8, 3, -1, 63}};
    enum { N = sizeof want / sizeof *want, ELEMENTS = 219 };
    Registered r = {0};
    Adapters s = adapters_new(&r, targets_parse("attn,experts"), 4, 2, 1);
    char used[ELEMENTS] = {0};
    check(s.n == N && s.n_dense == 87 && s.n_expert == 132, "registry: %d tensors, %zu + %zu", s.n,
          s.n_dense, s.n_expert);
    check_close("scale", 0, s.scale, 2, 0);
    for (int i = 0; i < N && i < s.n; i++) {
        const AdapterTensor *t = &s.tensors[i];
        check(strcmp(t->name, want[i].name) == 0 && t->rows == want[i].rows
              && t->cols == want[i].cols && t->expert == want[i].expert && t->at == want[i].at,
              "registry %d: %s (%d,%d) of %d at %zu, want %s at %zu", i, t->name, t->rows, t->cols,
              t->expert, t->at, want[i].name, want[i].at);
        for (int k = 0; k < t->rows * t->cols; k++) { used[t->at + k]++; }
    }
    for (int i = 0; i < ELEMENTS; i++) { check(used[i] == 1, "element %d: %d owners", i, used[i]); }
    check(r.wq_a.a == s.p && r.wq_a.b == s.p + 30 && r.wq_a.da == s.g && r.wq_a.db == s.g + 30,
          "pointers of a dense adapter");
    check(r.w2.a == s.p + 153 && r.w2.b == s.p + 189 && r.w2.da == s.g + 153
          && r.w2.db == s.g + 189, "pointers of an expert adapter");
    check(!r.shared.a && !r.shared.b && !r.shared.da && !r.shared.db, "not a target, yet pointers");
    // G13: the optimizer holds two moments per trained element, up to the arena's alignment.
    size_t block = (ELEMENTS * sizeof(real) + 255) / 256 * 256;
    check(mem.arena[MEM_OPTIMIZER].used == 2 * block && mem.arena[MEM_OPTIMIZER].size == 2 * block
          && mem.arena[MEM_ADAPTERS].used == 2 * block, "ledger: %zu bytes of optimizer state",
          mem.arena[MEM_OPTIMIZER].used);
    check(s.m != NULL && s.v != NULL && s.m != s.v, "moments");
    free(s.tensors);
    mem_free();

    s = adapters_new(&r, targets_parse("attn,experts"), 4, 2, 0);
    check(s.p && !s.g && !s.m && !s.v && r.w1.b && !r.w1.da && !r.w1.db, "not only masters");
    check(mem.arena[MEM_OPTIMIZER].size == 0, "evaluation: optimizer memory");
    free(s.tensors);
    mem_free();

    // G9: a rank without experts, and no target at all.
    s = adapters_new(&r, targets_parse("wq_a,experts"), 4, 0, 1);
    check(s.n == 2 && s.n_expert == 0 && !r.w1.a && r.wq_a.a, "a rank without experts");
    adapters_init(&s, 1);
    free(s.tensors);
    mem_free();
    s = adapters_new(&r, 0, 4, 2, 1);
    check(s.n == 0 && s.n_dense + s.n_expert == 0 && !r.w1.a && !r.wq_a.a, "no targets");
    adapters_init(&s, 1);
    free(s.tensors);
    mem_free();
}

// A second pass that differs from the first must not get pointers.
static void second_pass_in_child(void *change) {
    Registered r = {0};
    Adapters s = adapters_new(&r, 0x3FF, 0, 2, 1);
    r.change = *(int *)change;
    use_threads(1);                 // the parent's threads do not exist here
    register_all(&s, &r, 0, 2);
    adapters_init(&s, 1);
}

static void long_name_in_child(void *module) {
    Adapters s = {.R = 1, .alpha = 1, .targets = 1};
    adapters_begin(&s);
    adapter_add(&s, TARGET_WQ_A, (const char *)module, 1, 1);
    free(s.tensors);
}

static void test_registry_errors(void) {
    char text[1024], name[97];
    const char *says[] = {"0.wq_b.lora_A", "(4,3)", "does not hold", "does not hold"};
    for (int change = 1; change <= 4; change++) {
        int code = run_child(second_pass_in_child, &change, text, sizeof text);
        check(code == EXIT_USAGE && strstr(text, says[change - 1]), "change %d: exit %d, %s",
              change, code, text);
    }
    for (int length = 88; length <= 89; length++) {     // + 7 for ".lora_A"
        memset(name, 'x', sizeof name);
        name[length] = 0;
        int code = run_child(long_name_in_child, name, text, sizeof text);
        check(code == (length == 88 ? EXIT_OK : EXIT_USAGE), "a name of %d: exit %d", length + 7,
              code);
    }
    // G14: places beyond 2^32, in a counting pass.
    Adapters s = {.R = 64, .alpha = 1, .targets = 0x3FF};
    adapters_begin(&s);
    for (int i = 0; i < 43; i++) {
        adapter_add_experts(&s, TARGET_EXPERTS_W1, "x", "w1", 0, 256, 4096, 2048);
    }
    check(s.cursor_expert == 43ull * 256 * 64 * 6144, "cursor %zu", s.cursor_expert);
    check(s.tensors[s.n - 1].at == 43ull * 256 * 64 * 6144 - 64 * 2048, "last tensor at %zu",
          s.tensors[s.n - 1].at);
    free(s.tensors);
}

// What was not counted is not had, nor more than 1 MiB beside the arenas once they are closed.
static void memory_in_child(void *how) {
    const int what = *(int *)how;
    mem_count();
    mem_alloc(MEM_SCRATCH, 1000);
    mem_open();
    mem_alloc(MEM_SCRATCH, 1000);
    free(host_alloc(2 << 20));
    mem.closed = 1;
    if (what == 1) { mem_alloc(MEM_SCRATCH, 1000); }
    free(host_alloc(what == 2 ? (1 << 20) + 1 : 1 << 20));
}

static void test_memory(void) {
    static const struct { int code; const char *says; } want[3] = {
        { 0, "" }, { EXIT_FIT, "were not in the plan of 1024 (after step 1)" },
        { EXIT_USAGE, "mem.closed" } };
    for (int what = 0; what < 3; what++) {
        char text[1024];
        int code = run_child(memory_in_child, &what, text, sizeof text);
        check(code == want[what].code && strstr(text, want[what].says), "memory %d: exit %d, %s",
              what, code, text);
    }
}

static void test_init(void) {
    Registered r = {0};
    Adapters s = adapters_new(&r, 0x3FF, 0, 4, 1);
    adapters_init(&s, 7);
    real *all = (real *)copy(s.p, sizeof(real) * (s.n_dense + s.n_expert)), low = 0, high = 0;
    double sum = 0, n = 0;
    for (int k = 0; k < s.n; k++) {
        const AdapterTensor *t = &s.tensors[k];
        int is_a = strstr(t->name, "lora_A") != NULL;
        for (int i = 0; i < t->rows * t->cols; i++) {
            real x = s.p[t->at + i] * (real)sqrt((double)t->cols);
            if (!is_a) { check(x == 0, "%s[%d] is not zero", t->name, i); continue; }
            check(fabs(x) <= 1 + 1e-6, "%s[%d] is %g of its bound", t->name, i, (double)x);
            low = fmin(low, x);
            high = fmax(high, x);
            sum += x;
            n++;
        }
    }
    check(low < -0.95 && high > 0.95 && fabs(sum / n) < 3 * 0.58 / sqrt(n),
          "init: %g .. %g, mean %g", (double)low, (double)high, sum / n);
    // One element by hand: 2 u - 1 of the tensor's own stream, over sqrt(in) = sqrt(10).
    double u = random_uniform(random_key(7, "0.wq_a.lora_A"), 11);
    check_close("A[1][1]", 11, s.p[11], (2 * u - 1) / sqrt(10.0), 1e-7);
    Adapters one = s;
    adapters_init(&one, 8);
    check(memcmp(all, one.p, sizeof(real) * s.n_dense) != 0, "the seed does nothing");
    adapters_init(&one, 7);
    check(memcmp(all, one.p, sizeof(real) * (s.n_dense + s.n_expert)) == 0, "init again differs");
    AdapterTensor *tensors = s.tensors;
    int count = s.n, found = 0;
    mem_free();

    // A rank that owns experts 2 and 3 draws for them what the rank that owned all four drew.
    s = adapters_new(&r, 0x3FF, 2, 2, 1);
    adapters_init(&s, 7);
    for (int k = 0; k < s.n; k++) {
        for (int j = 0; j < count; j++) {
            const AdapterTensor *t = &s.tensors[k];
            if (strcmp(t->name, tensors[j].name) != 0) { continue; }
            found++;
            check(memcmp(s.p + t->at, all + tensors[j].at, sizeof(real) * t->rows * t->cols) == 0,
                  "%s depends on who owns it", t->name);
        }
    }
    check(found == s.n, "%d of %d names found", found, s.n);
    free(tensors);
    free(s.tensors);
    free(all);
    mem_free();
}

// -------------------------------------------------------------------------------------------------
// Norm, clipping, AdamW, schedule

static void test_norm(void) {
    // G6: two ranks' expert gradients with squares 20 and 100.
    real one[2] = {2, -4}, two[2] = {6, 8};
    check_close("norm", 0, sqrt(sum_squares(one, 2) + sum_squares(two, 2)), 10.954451150103322,
                1e-12);
    check_close("empty sum", 0, sum_squares(NULL, 0), 0, 0);
    size_t n = 300007;
    real *g = random_reals(n);
    double want = 0, sums[3];
    for (size_t i = 0; i < n; i++) { want += (double)g[i] * g[i]; }
    for (int i = 0; i < 3; i++) { use_threads(i + 1); sums[i] = sum_squares(g, n); }
    check_close("sum_squares", 0, sums[0], want, 1e-9 * want);
    check(sums[0] == sums[1] && sums[0] == sums[2], "sum_squares depends on the threads");
    use_threads(1);
    for (size_t m = 0; m < 1000; m++) {                 // every element counts once, for every n
        double sum = 0;
        for (size_t i = 0; i < m; i++) {
            g[i] = (real)(i % 5 + 1);
            sum += g[i] * g[i];
        }
        check(sum_squares(g, m) == sum, "sum_squares of %zu elements", m);
    }
    g[5] = (real)1e30;                                  // its square is no float
    check(isfinite(sum_squares(g, n)), "sum_squares overflows");
    free(g);
    use_threads(2);

    // torch 2.11: p.grad = [3,-4,1,0,-0.5]; clip_grad_norm_([p], 1) returns the norm and leaves
    // the clipped gradients; the same with 5.2 leaves them alone.
    const double grad[5] = {3, -4, 1, 0, -0.5}, norm = 5.1234753829798, clipped[5] = {
        0.585539929483428, -0.780719905977904, 0.195179976494476, 0, -0.097589988247238};
    real t[5];
    for (int i = 0; i < 5; i++) { t[i] = (real)grad[i]; }
    check_close("torch norm", 0, sqrt(sum_squares(t, 5)), norm, 1e-13);
    for (int i = 0; i < 5; i++) {
        check_close("clipped", i, grad[i] * clip_factor(norm, 1), clipped[i], 1e-14);
    }
    check(clip_factor(norm, 5.2) == 1, "clipping below the limit");
    check(clip_factor(norm, 0) == 1 && clip_factor(norm, -1) == 1, "clipping is not off");
    check(clip_factor(0, 1) == 1 && isnan(clip_factor(NAN, 1)), "clipping of 0 and of NaN");
    check(clip_factor(1, 1) < 1, "1e-6 is missing");
}

static void test_nonfinite(void) {
    Registered r = {0};
    Adapters s = adapters_new(&r, 0x3FF, 0, 2, 1);
    adapters_init(&s, 7);
    check(adapters_first_nonfinite(&s, s.p) == NULL && adapters_first_nonfinite(&s, s.g) == NULL,
          "finite values are reported");
    const real bad[3] = {NAN, INFINITY, -INFINITY};
    for (int k = s.n - 1; k >= 0; k--) {                // last element of each, back to the first
        const AdapterTensor *t = &s.tensors[k];
        s.g[t->at + (size_t)t->rows * t->cols - 1] = bad[k % 3];
        const char *name = adapters_first_nonfinite(&s, s.g);
        check(name != NULL && strcmp(name, t->name) == 0, "not %s but %s", t->name,
              name ? name : "none");
    }
    free(s.tensors);
    mem_free();
}

// Made with torch 2.11.0 (/tmp/venv/bin/python), and printed as %.15g:
//   p = torch.nn.Parameter(torch.tensor([0.5, -1.0, 2.0, -0.25, 1e-3], dtype=torch.float64))
//   o = torch.optim.AdamW([p], lr=0.01, betas=(0.9, 0.95), eps=1e-3, weight_decay=0.1)
//   for g in grads: p.grad = torch.tensor(g, dtype=torch.float64); o.step(); print(p.tolist())
//   print(o.state[p]["exp_avg"].tolist(), o.state[p]["exp_avg_sq"].tolist())
// Column 3 never has a gradient, column 4 only once: experts without tokens. eps is large enough
// to show where it is added.
static void test_adamw_torch(void) {
    static const double grads[4][5] = {
        {1, -2, 0.001, 0, 3}, {0.5, 2, -0.002, 0, 0}, {0, 0, 0, 0, 0}, {-1, 1e-4, 0.003, 0, 0}};
    static const double want[4][5] = {
        {0.48950999000999, -0.989004997501249, 1.993, -0.24975, -0.00899766777740753},
        {0.479639507777177, -0.98854204526684, 1.99323951228814, -0.24950025, -0.0157719081275623},
        {0.471816839716904, -0.987965351793324, 1.99284574743659, -0.24925074975,
         -0.0210667859599731},
        {0.470825710797912, -0.987319322111128, 1.98874206602794, -0.24900149900025,
         -0.0254521662164814}};
    static const double want_m[5] = {0.0134, 0.01621, 0.0002109, 0, 0.2187};
    static const double want_v[5] = {0.10415, 0.3519750005, 6.73368750000001e-07, 0, 0.38581875};
    const double tol = sizeof(real) == 8 ? 1e-13 : 3e-6;
    real p[5] = {0.5, -1, 2, -0.25, (real)1e-3}, m[5] = {0}, v[5] = {0}, g[5];
    for (int step = 0; step < 4; step++) {
        // The gradients come four times too large, and grad_scale puts that right.
        for (int i = 0; i < 5; i++) { g[i] = (real)(4 * grads[step][i]); }
        adamw_update(p, m, v, g, 5, 0.25, 0.01, 0.9, 0.95, 1e-3, 0.1, step + 1);
        for (int i = 0; i < 5; i++) {
            check_close("adamw p", 10 * (step + 1) + i, p[i], want[step][i],
                        tol * fabs(want[step][i]));
            check(g[i] == (real)(4 * grads[step][i]), "adamw writes to g");
        }
    }
    for (int i = 0; i < 5; i++) {
        check_close("adamw m", i, m[i], want_m[i], tol * want_m[i] * 5);
        check_close("adamw v", i, v[i], want_v[i], tol * want_v[i]);
    }
}

// G8: a tensor updated in two parts, wherever it is cut, or by any number of threads, has the bits
// of one update.
static void test_adamw_chunks(void) {
    enum { N = 10007, SMALL = 41 };
    real *g = random_reals(N), *start = random_reals(N);
    real *x[2][3];
    for (int k = 0; k < 6; k++) { x[k / 3][k % 3] = (real *)malloc(sizeof(real) * N); }
    for (int cut = 0; cut <= SMALL + 3; cut++) {
        // The last rounds cut a tensor of several blocks, with 1, 2 and 3 threads.
        size_t n = cut <= SMALL ? SMALL : N, at = cut <= SMALL ? cut : 4096 + 1;
        for (int i = 0; i < 2; i++) {
            memcpy(x[i][0], start, sizeof(real) * n);
            memset(x[i][1], 0, sizeof(real) * n);
            memset(x[i][2], 0, sizeof(real) * n);
        }
        for (int step = 1; step <= 4; step++) {
            real *p = x[0][0], *m = x[0][1], *v = x[0][2];
            use_threads(1);
            adamw_update(p, m, v, g, n, 0.7, 1e-2, 0.9, 0.95, 1e-8, 0.1, step);
            p = x[1][0]; m = x[1][1]; v = x[1][2];
            use_threads(cut <= SMALL ? 1 : cut - SMALL);
            adamw_update(p + at, m + at, v + at, g + at, n - at, 0.7, 1e-2, 0.9, 0.95, 1e-8, 0.1,
                         step);
            adamw_update(p, m, v, g, at, 0.7, 1e-2, 0.9, 0.95, 1e-8, 0.1, step);
        }
        for (int k = 0; k < 3; k++) {
            check(memcmp(x[0][k], x[1][k], sizeof(real) * n) == 0, "adamw cut at %zu: part %d", at,
                  k);
        }
    }
    check(memcmp(x[0][0] + N - 1, start + N - 1, sizeof(real)) != 0, "the last element stays");
    use_threads(2);
    for (int k = 0; k < 6; k++) { free(x[k / 3][k % 3]); }
    free(g);
    free(start);
    adamw_update(NULL, NULL, NULL, NULL, 0, 1, 1, 0.9, 0.95, 1e-8, 0, 1);       // G9: no elements
}

// -------------------------------------------------------------------------------------------------
// Muon

static double normal(uint64_t key, uint64_t i) { return random_normal(key, i) / RANDOM_STD; }

enum { GAUSSIAN, CONDITION, NEAR_RANK_ONE, KINDS };
static const char *const kind_names[KINDS] = { "Gaussian", "condition 1e4", "rank 1 + 1e-3 noise" };

// x (rows,cols) = U diag(sigma) V^T. The columns of U and V are cosines: orthonormal, and written
// down rather than computed.
static void with_spectrum(real *x, size_t rows, size_t cols, const double *sigma) {
    size_t n = rows < cols ? rows : cols;
    for (size_t i = 0; i < rows; i++) {
        for (size_t j = 0; j < cols; j++) {
            double sum = 0;
            for (size_t k = 0; k < n; k++) {
                double u = sqrt((k ? 2.0 : 1.0) / rows) * cos(M_PI * (i + 0.5) * k / rows);
                double v = sqrt((k ? 2.0 : 1.0) / cols) * cos(M_PI * (j + 0.5) * k / cols);
                sum += u * sigma[k] * v;
            }
            x[i * cols + j] = (real)sum;
        }
    }
}

static real *muon_input(int kind, size_t rows, size_t cols) {
    real *x = (real *)malloc(rows * cols * sizeof *x);
    double sigma[64];
    size_t n = rows < cols ? rows : cols;
    for (size_t k = 0; k < n && kind == CONDITION; k++) {
        sigma[k] = pow(1e-4, (double)k / (double)(n - 1));
    }
    if (kind == CONDITION) { with_spectrum(x, rows, cols, sigma); return x; }
    for (size_t i = 0; i < rows; i++) {
        for (size_t j = 0; j < cols; j++) {
            double noise = normal(5, i * cols + j);
            double one = normal(6, i) * normal(7, j);
            x[i * cols + j] = (real)(kind == GAUSSIAN ? noise : one + 1e-3 * noise);
        }
    }
    return x;
}

// The method as it is usually written, in double, on X itself: o (rows,cols) from x.
static void reference_newton_schulz(double *o, const real *x, size_t rows, size_t cols) {
    double *r = (double *)malloc(rows * rows * sizeof *r), *next, norm = 0;
    next = (double *)malloc(rows * cols * sizeof *next);
    for (size_t i = 0; i < rows * cols; i++) { norm += (double)x[i] * x[i]; }
    for (size_t i = 0; i < rows * cols; i++) { o[i] = x[i] / sqrt(norm); }
    for (int round = 0; round < 5; round++) {
        for (size_t pass = 0; pass < 2; pass++) {      // X <- a X + b R X + c R (R X)
            const double *from = pass ? next : o;
            for (size_t i = 0; i < rows && !pass; i++) {
                for (size_t k = 0; k < rows; k++) {
                    r[i * rows + k] = 0;
                    for (size_t j = 0; j < cols; j++) {
                        r[i * rows + k] += o[i * cols + j] * o[k * cols + j];
                    }
                }
            }
            for (size_t j = 0; j < cols; j++) {
                double column[64], result[64];
                for (size_t i = 0; i < rows; i++) { column[i] = from[i * cols + j]; }
                for (size_t i = 0; i < rows; i++) {
                    result[i] = 0;
                    for (size_t k = 0; k < rows; k++) { result[i] += r[i * rows + k] * column[k]; }
                }
                for (size_t i = 0; i < rows; i++) {
                    size_t at = i * cols + j;
                    if (!pass) { next[at] = result[i]; continue; }
                    o[at] = 3.4445 * o[at] - 4.7750 * column[i] + 2.0315 * result[i];
                }
            }
        }
    }
    free(r);
    free(next);
}

static double frobenius(const real *x, const double *want, size_t n) {
    double diff = 0, size = 0;
    for (size_t i = 0; i < n; i++) {
        diff += (x[i] - want[i]) * (x[i] - want[i]);
        size += want[i] * want[i];
    }
    return sqrt(diff / size);
}

// M5, M6: both methods against the one in double; in fp32 as tight as it goes, in fp16 as bad as
// was measured elsewhere, and useless without the restart.
static void test_newton_schulz(void) {
    static const struct { size_t rows, cols; } shapes[] = {
        {8, 256}, {8, 4096}, {16, 2048}, {40, 40}, {64, 640}};
    static const double limit[KINDS] = { 1e-5, 1e-5, 5e-4 }, limit16[KINDS] = { 1e-2, 0.1, 0.3 };
    // In double the reference, itself in double, rounds as much as what it is the measure of.
    const double tighter = sizeof(real) == 8 ? 1e-7 : 1;
    double worst[KINDS] = { 0 }, worst16[KINDS] = { 0 }, least_bad = INFINITY;
    for (size_t k = 0; k < sizeof shapes / sizeof *shapes; k++) {
        size_t rows = shapes[k].rows, cols = shapes[k].cols, n = rows * cols;
        double *want = (double *)malloc(n * sizeof *want);
        for (int kind = 0; kind < KINDS; kind++) {
            real *x = muon_input(kind, rows, cols);
            reference_newton_schulz(want, x, rows, cols);
            // gram, standard, and in fp16: gram, gram without its restart
            const int restarts[4] = { NS_GRAM, NS_STANDARD, NS_GRAM, 0 };
            for (int way = 0; way < 4; way++) {
                real *o = (real *)copy(x, n * sizeof *x);
                in_fp16 = way >= 2;
                newton_schulz(o, rows, cols, restarts[way]);
                in_fp16 = 0;
                double error = frobenius(o, want, n), *at = way < 2 ? worst : worst16;
                if (way == 1) {                         // and the two methods among each other
                    real *gram = (real *)copy(x, n * sizeof *x);
                    newton_schulz(gram, rows, cols, NS_GRAM);
                    for (size_t i = 0; i < n; i++) { gram[i] = o[i] - gram[i] + (real)want[i]; }
                    error = fmax(error, frobenius(gram, want, n));
                    free(gram);
                }
                if (way < 3) { at[kind] = fmax(at[kind], error); }
                else if (kind == NEAR_RANK_ONE) { least_bad = fmin(least_bad, error); }
                free(o);
            }
            free(x);
        }
        free(want);
    }
    for (int kind = 0; kind < KINDS; kind++) {
        printf("  %-22s error %.1e of %.0e, fp16 %.1e of %.0e\n", kind_names[kind], worst[kind],
               tighter * limit[kind], worst16[kind], limit16[kind]);
        check(worst[kind] <= tighter * limit[kind], "Newton-Schulz, %s: %g", kind_names[kind],
              worst[kind]);
        check(worst16[kind] <= limit16[kind], "in fp16, %s: %g", kind_names[kind], worst16[kind]);
    }
    printf("  fp16 without a restart   error %.2f, must be above 1\n", least_bad);
    check(least_bad > 1, "fp16 without a restart is off by %g only", least_bad);
}

// M1, M2: singular vectors stay, and each value becomes f five times over of its share.
static void test_singular_values(void) {
    static const struct { size_t rows, cols; } shapes[] = {{8, 300}, {1, 50}, {300, 16}, {3, 4096}};
    for (size_t k = 0; k < 2 * sizeof shapes / sizeof *shapes; k++) {
        size_t rows = shapes[k / 2].rows, cols = shapes[k / 2].cols, n = rows < cols ? rows : cols;
        double sigma[64], norm = 0;
        real *x = (real *)malloc(rows * cols * sizeof *x);
        real *want = (real *)malloc(rows * cols * sizeof *want);
        for (size_t i = 0; i < n; i++) {
            sigma[i] = 100 * pow(0.002, (double)i / (double)n);     // shares of 1 .. 0.0017 or more
            norm += sigma[i] * sigma[i];
        }
        with_spectrum(x, rows, cols, sigma);
        for (size_t i = 0; i < n; i++) {
            double s = sigma[i] / sqrt(norm);
            for (int t = 0; t < 5; t++) { s = 3.4445 * s - 4.775 * s * s * s + 2.0315 * pow(s, 5); }
            check(s >= 0.68 && s <= 1.21, "a singular value of %g becomes %g", sigma[i], s);
            sigma[i] = s;
        }
        with_spectrum(want, rows, cols, sigma);
        newton_schulz(x, rows, cols, k % 2 ? NS_GRAM : NS_STANDARD);
        check_tensor("O from singular vectors", x, want, rows * cols, 1e-4);
        free(x);
        free(want);
    }
}

// M7, M8: of the transpose, and of any multiple. Zero stays zero, and is no NaN.
static void test_symmetries(void) {
    enum { ROWS = 8, COLS = 160, N = ROWS * COLS };
    real *x = muon_input(GAUSSIAN, ROWS, COLS), *o = (real *)copy(x, N * sizeof *x);
    real *turned = random_reals(N), *scaled = random_reals(N);
    newton_schulz(o, ROWS, COLS, NS_GRAM);
    for (int i = 0; i < N; i++) { turned[i % COLS * ROWS + i / COLS] = x[i]; }
    newton_schulz(turned, COLS, ROWS, NS_GRAM);
    for (int i = 0; i < N; i++) { scaled[i] = turned[i % COLS * ROWS + i / COLS]; }
    check_tensor("NS of the transpose", scaled, o, N, 1e-6);
    for (double c = 1e-18; c < 1e18; c *= 1e4) {
        for (int i = 0; i < N; i++) { scaled[i] = (real)(c * x[i]); }
        in_fp16 = c > 1e-5 && c < 1e7;           // normalised before anything is narrowed
        newton_schulz(scaled, ROWS, COLS, NS_GRAM);
        double diff = 0, size = 0;
        for (int i = 0; i < N; i++) {
            diff += ((double)scaled[i] - o[i]) * ((double)scaled[i] - o[i]);
            size += (double)o[i] * o[i];
        }
        check(sqrt(diff / size) <= (in_fp16 ? 1e-2 : 1e-5), "NS of %g X is off by %g", c,
              sqrt(diff / size));
        in_fp16 = 0;
    }
    memset(scaled, 0, N * sizeof *scaled);
    newton_schulz(scaled, ROWS, COLS, NS_GRAM);
    for (int i = 0; i < N; i++) { check(scaled[i] == 0, "NS of zero is %g", (double)scaled[i]); }
    free(x);
    free(o);
    free(turned);
    free(scaled);
}

// Made by dev/ref/make_muon.py: torch.optim.Muon (lr 0.01, decay 0.1, momentum 0.95, nesterov,
// match_rms_adamw) with a singular value decomposition in float64 for Newton-Schulz. p starts at
// cos(i), and g in step t is sin(1 + 3 t + 0.7 i + 0.13 i^2). One wide matrix, one tall one.
static void test_muon_torch(void) {
    enum { N = 22 };
    static const double want[3][N] = {
        {0.996547979666618, 0.536862202306719, -0.416400142524154, -0.986275634394445,
         -0.651867085036957, 0.280253616440152, 0.960661849023387, 0.754090484099133,
         -0.147660908190641, -0.907525380918715,
         0.997309815675409, 0.536294160451568, -0.417263568907352, -0.986885817687531,
         -0.652765925456609, 0.280492888165348, 0.960285929616255, 0.753358412494513,
         -0.147352401116635, -0.908527556987947, -0.84040389639666, 0.00535238732101758},
        {0.997517528801827, 0.539452664141205, -0.414473346635597, -0.987767483175228,
         -0.653003545205533, 0.282549845249935, 0.959021399836529, 0.75176521011964,
         -0.144939542265824, -0.909271320963264,
         0.996960722136409, 0.538759886155763, -0.415007240051974, -0.987759085571349,
         -0.652735889404085, 0.282895437979768, 0.958703198347765, 0.751867585155601,
         -0.144972565191223, -0.909779277424802, -0.83688794959854, 0.00426593418032845},
        {0.994470572474458, 0.535795875378951, -0.415451042284698, -0.984244793630703,
         -0.65065416606302, 0.279612569932553, 0.958850058194968, 0.75250472194278,
         -0.147345264768728, -0.905693379685598,
         0.995203299356049, 0.535113416366853, -0.416376164161197, -0.984899966735144,
         -0.651483455325827, 0.279874402172296, 0.958430541554729, 0.751800332716555,
         -0.147053498365127, -0.906824076390988, -0.838718106845343, 0.00534240731277354}};
    static const double want_m[12] = {
        0.0348725895982692, 0.046431334502567, 0.0172238466688464, -0.0385587935647388,
        -0.0247756564156429, 0.045105493321591, -0.0137448372496778, -0.0204168693178334,
        0.0378131726128969, -0.0430853691030985, 0.0425579099138501, -0.0353464031159119};
    const size_t slices[6] = { 0, 2, 5, 10, 4, 3 };
    const double tol = sizeof(real) == 8 ? 1e-12 : 1e-6;
    for (int way = 0; way < 2; way++) {
        real p[N], m[N] = { 0 }, g[N];
        for (int i = 0; i < N; i++) { p[i] = (real)cos(i < 10 ? i : i - 10); }
        for (int step = 0; step < 3; step++) {
            for (int i = 0; i < N; i++) {       // twice too large, which grad_scale puts right
                int j = i < 10 ? i : i - 10;
                g[i] = (real)(2 * sin(1 + 3 * step + 0.7 * j + 0.13 * j * j));
            }
            muon_update(p, m, g, slices, 2, 0.5, 0.01, 0.95, 0.1, way ? NS_GRAM : NS_STANDARD);
            for (int i = 0; i < N; i++) { check_close("muon p", i, p[i], want[step][i], tol); }
        }
        for (int i = 0; i < N; i++) {
            check_close("muon m", i, m[i], want_m[i < 10 ? i : i - 10], tol);
        }
    }
}

// Slices of several shapes in one array, with gaps between them; the moments are not zero.
enum { MUON_SLICES = 7, MUON_SIZE = 20000 };
static const size_t muon_slices[3 * MUON_SLICES] = {
    3, 8, 500, 4010, 600, 8, 9000, 8, 500, 13001, 1, 40, 13100, 500, 8, 17200, 5, 5, 17300, 8, 300};

typedef struct { real *p, *m, *g; } MuonState;

static MuonState muon_state(void) {
    size_t bytes = MUON_SIZE * sizeof(real);
    MuonState s = { (real *)malloc(bytes), (real *)malloc(bytes), (real *)malloc(bytes) };
    for (size_t i = 0; i < MUON_SIZE; i++) {
        s.p[i] = (real)normal(1, i);
        s.m[i] = (real)(0.01 * normal(2, i));
        s.g[i] = (real)(0.1 * normal(3, i));
    }
    return s;
}

static void muon_state_free(MuonState *s) {
    free(s->p);
    free(s->m);
    free(s->g);
}

static void muon_step(MuonState *s, const size_t *slices, int n, double grad_scale, int restarts) {
    muon_update(s->p, s->m, s->g, slices, n, grad_scale, 0.02, 0.95, 0.1, restarts);
}

// M3, M4: one call, one slice at a time, backwards, by one thread or three: the same bits; and what
// belongs to no slice is not touched.
static void test_muon_batch(void) {
    MuonState one = muon_state(), start = muon_state();
    use_threads(1);
    muon_step(&one, muon_slices, MUON_SLICES, 0.7, NS_GRAM);
    for (int way = 0; way < 3; way++) {
        MuonState s = muon_state();
        use_threads(way == 0 ? 3 : 1);
        if (way == 0) { muon_step(&s, muon_slices, MUON_SLICES, 0.7, NS_GRAM); }
        for (int k = 0; way && k < MUON_SLICES; k++) {
            int at = way == 1 ? k : MUON_SLICES - 1 - k;
            muon_step(&s, muon_slices + 3 * at, 1, 0.7, NS_GRAM);
        }
        check(memcmp(s.p, one.p, MUON_SIZE * sizeof(real)) == 0 &&
              memcmp(s.m, one.m, MUON_SIZE * sizeof(real)) == 0, "muon, batched way %d", way);
        muon_state_free(&s);
    }
    char owned[MUON_SIZE] = { 0 };
    for (int k = 0; k < MUON_SLICES; k++) {
        memset(owned + muon_slices[3 * k], 1, muon_slices[3 * k + 1] * muon_slices[3 * k + 2]);
    }
    for (int i = 0; i < MUON_SIZE; i++) {
        check((one.p[i] != start.p[i]) == owned[i], "element %d of a slice or not", i);
    }
    use_threads(2);
    muon_state_free(&one);
    muon_state_free(&start);
    muon_update(NULL, NULL, NULL, NULL, 0, 1, 1, 0.95, 0, NS_GRAM);         // G9: no slices
}

// M9: a slice whose gradient is zero, or not finite, keeps its bits, moments too, and its
// neighbours do not notice.
static void test_muon_skips(void) {
    MuonState all = muon_state(), start = muon_state();
    muon_step(&all, muon_slices, MUON_SLICES, 1, NS_GRAM);
    const real bad[3] = { 0, NAN, -INFINITY };
    for (int kind = 0; kind < 3; kind++) {
        MuonState s = muon_state();
        const size_t at = muon_slices[6], n = muon_slices[7] * muon_slices[8];
        for (size_t i = 0; i < n && kind == 0; i++) { s.g[at + i] = 0; }
        if (kind > 0) { s.g[at + n - 1] = bad[kind]; }
        muon_step(&s, muon_slices, MUON_SLICES, 1, NS_GRAM);
        check(memcmp(s.p + at, start.p + at, n * sizeof(real)) == 0 &&
              memcmp(s.m + at, start.m + at, n * sizeof(real)) == 0, "a slice of %g has moved",
              (double)bad[kind]);
        memcpy(s.p + at, all.p + at, n * sizeof(real));
        memcpy(s.m + at, all.m + at, n * sizeof(real));
        check(memcmp(s.p, all.p, MUON_SIZE * sizeof(real)) == 0 &&
              memcmp(s.m, all.m, MUON_SIZE * sizeof(real)) == 0, "a slice's neighbours moved by %g",
              (double)bad[kind]);
        muon_state_free(&s);
    }
    // One element of 1e-30 is a gradient, and its slice takes a whole step.
    MuonState s = muon_state();
    for (int i = 0; i < MUON_SIZE; i++) { s.g[i] = s.m[i] = 0; }
    s.g[9007] = (real)1e-30;
    muon_step(&s, muon_slices, MUON_SLICES, 1, NS_GRAM);
    check(fabs(s.p[9007] - start.p[9007]) > 0.01 && s.p[4100] == start.p[4100], "a tiny gradient");
    muon_state_free(&s);
    muon_state_free(&all);
    muon_state_free(&start);
}

// M10, M12, G7: the size of a step; another way to keep the moment; clipping before it all.
static void test_muon_size(void) {
    MuonState s = muon_state(), start = muon_state(), clipped = muon_state();
    memset(s.m, 0, MUON_SIZE * sizeof(real));
    memset(clipped.m, 0, MUON_SIZE * sizeof(real));
    muon_update(s.p, s.m, s.g, muon_slices, MUON_SLICES, 1, 0.02, 0.95, 0, NS_GRAM);
    muon_update(clipped.p, clipped.m, clipped.g, muon_slices, MUON_SLICES, 1e-9, 0.02, 0.95, 0,
                NS_GRAM);
    for (int k = 0; k < MUON_SLICES; k++) {
        size_t at = muon_slices[3 * k], n = muon_slices[3 * k + 1] * muon_slices[3 * k + 2];
        double sum = 0, diff = 0;
        for (size_t i = at; i < at + n; i++) {
            sum += pow(s.p[i] - start.p[i], 2);
            diff += pow(s.p[i] - clipped.p[i], 2);
        }
        double rms = sqrt(sum / n) / 0.02, wide = muon_slices[3 * k + 1] < muon_slices[3 * k + 2];
        check(rms > 0.13 && rms < 0.25, "slice %d: an update of RMS %g, wide %g", k, rms, wide);
        check(sqrt(diff / sum) < 1e-4, "slice %d: clipping changes the step by %g", k,
              sqrt(diff / sum));
    }
    muon_state_free(&s);
    muon_state_free(&start);
    muon_state_free(&clipped);

    enum { N = 8 * 50 };
    const size_t slice[3] = { 0, 8, 50 };
    real p[N] = { 0 }, m[N] = { 0 }, g[N], sum[N] = { 0 }, u[N], o[N];
    for (int step = 0; step < 4; step++) {
        for (int i = 0; i < N; i++) {
            g[i] = (real)normal(20 + step, i);
            sum[i] = (real)0.95 * sum[i] + g[i];
            u[i] = g[i] + (real)0.95 * sum[i];
        }
        newton_schulz(u, 8, 50, NS_STANDARD);
        memset(p, 0, sizeof p);
        muon_update(p, m, g, slice, 1, 1, 1, 0.95, 0, NS_STANDARD);
        for (int i = 0; i < N; i++) { o[i] = -p[i] / (real)(0.2 * sqrt(50.0)); }
        check_tensor("a mean or a sum as the moment", o, u, N, 1e-5);
    }
}

// M11: the method asked for is what a dense factor and an expert's get; one moment, no second; and
// the ledger says all that.
static void test_muon_adapters(void) {
    for (int method = 0; method < 3; method++) {
        const int restarts[3] = { 0, NS_GRAM, NS_STANDARD };
        Registered r = {0};
        Adapters s = {.R = 3, .alpha = 6, .targets = targets_parse("attn,experts"),
                      .muon = restarts[method]};
        adapters_place_all(&s, &r, 4, 2, 1);
        size_t n = s.n_dense + s.n_expert, block = (n * sizeof(real) + 255) / 256 * 256;
        check(mem.arena[MEM_OPTIMIZER].used == (method ? 1 : 2) * block, "method %d: %zu bytes of "
              "state", method, mem.arena[MEM_OPTIMIZER].used);
        check(s.m != NULL && (s.v == NULL) == (method > 0), "method %d: moments", method);
        for (size_t i = 0; i < n; i++) { s.g[i] = (real)normal(9, i); }
        real *g = (real *)copy(s.g, n * sizeof(real));
        memset(s.p, 0, n * sizeof(real));
        adapters_update(&s, 1, 0.01, 0.95, 0.95, 1e-8, 0, 1);
        int other[2] = { 0 };               // dense, expert factors that the other method changes
        for (int k = 0; k < s.n && method; k++) {
            const AdapterTensor *t = &s.tensors[k];
            size_t size = (size_t)t->rows * t->cols;
            const size_t slice[3] = { 0, (size_t)t->rows, (size_t)t->cols };
            for (int way = 1; way < 3; way++) {
                real *p = (real *)calloc(size, sizeof *p), *m = (real *)calloc(size, sizeof *m);
                real *u = (real *)copy(g + t->at, size * sizeof *g);
                muon_update(p, m, u, slice, 1, 1, 0.01, 0.95, 0, restarts[way]);
                int same = memcmp(p, s.p + t->at, size * sizeof *p) == 0;
                check(same || way != method, "%s by method %d", t->name, method);
                other[t->expert >= 0] += !same;
                free(p);
                free(m);
                free(u);
            }
        }
        check(!method || (other[0] > 0 && other[1] > 0), "both methods give the same bits");
        char text[2048] = "";
        int keep = dup(1);
        FILE *file = tmpfile();
        fflush(stdout);
        dup2(fileno(file), 1);
        adapters_ledger(&s);
        fflush(stdout);
        dup2(keep, 1);
        close(keep);
        rewind(file);
        text[fread(text, 1, sizeof text - 1, file)] = 0;
        fclose(file);
        static const char *const lines[3] = {
            "plan   adamw       0.0 MiB of state, 2 moments\n",
            "plan   muon        0.0 MiB of state, 1 moment | 12 Newton-Schulz (gram) a step\n",
            "plan   muon        0.0 MiB of state, 1 moment | 12 Newton-Schulz (standard) a step\n"};
        check(strstr(text, lines[method]) &&
              strstr(text, "experts.w2                2 x A (3,6), B (5,3)\n") &&
              strstr(text, "wkv                       1 x A (3,4), B (8,3)\n"),
              "the ledger of method %d:\n%s", method, text);
        free(g);
        free(s.tensors);
        free(s.slices_h);
        mem_free();
    }
}

// The adapters of w1 and w3 as those of w1 above w3, [A1; A3] and [B1 0; 0 B3], and back. What is
// no adapter's, the two zeros and all of an absent adapter, is 0 in the stack and goes nowhere.
static void test_stack(void) {
    enum { E = 3, C = 128, F = 256, R = 8, A = E * R * C, B = E * F * R };
    const size_t n = 2 * A + 4 * B;
    for (int present = 0; present < 16; present++) {
        real *part[4], *before[4], *stack = random_reals(n), *want = calloc(n, sizeof(real));
        for (int k = 0; k < 4; k++) {           // a1, b1, a3, b3
            before[k] = random_reals(k % 2 ? B : A);
            part[k] = random_reals(k % 2 ? B : A);
            memcpy(before[k], part[k], sizeof(real) * (k % 2 ? B : A));
        }
        real *a1 = present & 1 ? part[0] : NULL, *b1 = present & 2 ? part[1] : NULL;
        real *a3 = present & 4 ? part[2] : NULL, *b3 = present & 8 ? part[3] : NULL;
        real (*a)[2 * R][C] = (real (*)[2 * R][C])want;
        real (*b)[2 * F][2 * R] = (real (*)[2 * F][2 * R])(want + 2 * A);
        for (int pass = 0; pass < 2; pass++) {  // filled, then added to what the adapters hold
            real (*up)[2 * F][2 * R] = (real (*)[2 * F][2 * R])(stack + 2 * A);
            real (*down)[2 * R][C] = (real (*)[2 * R][C])stack;
            for (int i = 0; i < A; i++) {
                int e = i / (R * C), r = i / C % R, c = i % C;
                if (a1) { a[e][r][c] = a1[i]; before[0][i] += pass ? down[e][r][c] : 0; }
                if (a3) { a[e][R + r][c] = a3[i]; before[2][i] += pass ? down[e][R + r][c] : 0; }
            }
            for (int i = 0; i < B; i++) {
                int e = i / (F * R), f = i / R % F, r = i % R;
                if (b1) { b[e][f][r] = b1[i]; before[1][i] += pass ? up[e][f][r] : 0; }
                if (!b3) { continue; }
                b[e][F + f][R + r] = b3[i];
                before[3][i] += pass ? up[e][F + f][R + r] : 0;
            }
            lora_stack(stack, a1, b1, a3, b3, pass, E, C, F, R);
            check(pass || memcmp(stack, want, n * sizeof(real)) == 0, "stack of %d", present);
            for (int k = 0; k < 4; k++) {
                check(memcmp(part[k], before[k], sizeof(real) * (k % 2 ? B : A)) == 0,
                      "stack of %d, pass %d: adapter part %d", present, pass, k);
            }
            for (size_t i = 0; i < n; i++) { stack[i] = (real)(i % 1000); }     // a gradient of it
        }
        for (int k = 0; k < 4; k++) { free(part[k]); free(before[k]); }
        free(stack); free(want);
    }
}

static void test_schedule(void) {
    static const struct { int step, steps, warmup; double last; int cosine; double want; } at[] = {
        {0, 10, 4, 0.1, 1, 0.5},        // lr = 2 everywhere: 2 * 1/4
        {3, 10, 4, 0.1, 1, 2},          // the last step of the warm-up is at the peak
        {4, 10, 4, 0.1, 1, 2},          // and so is step == warmup
        {7, 10, 4, 0.1, 1, 1.1},        // half-way: 2 (0.1 + 0.9 / 2)
        {9, 10, 4, 0.1, 1, 0.3205771365940052},     // 2 (0.1 + 0.45 (1 + cos(5 pi / 6)))
        {10, 10, 4, 0.1, 1, 0.2},       // what the curve leads to
        {0, 10, 0, 0.1, 1, 2},          // no warm-up
        {5, 10, 0, 0, 1, 1},
        {9, 10, 0, 0, 1, 0.04894348370484647},      // 1 + cos(9 pi / 10)
        {0, 10, 4, 0.1, 0, 0.5},        // constant, after the warm-up
        {4, 10, 4, 0.1, 0, 2},
        {9, 10, 4, 0.1, 0, 2},
        {1, 3, 5, 0.1, 1, 0.8},         // a run that ends within its warm-up
        {3, 3, 3, 0.1, 1, 0.2},
        {0, 1, 0, 0.1, 1, 2}};
    for (size_t i = 0; i < sizeof at / sizeof *at; i++) {
        check_close("lr", (long)i, lr_at(2, at[i].step, at[i].steps, at[i].warmup, at[i].last,
                                         at[i].cosine), at[i].want, 1e-15);
    }
}

int main(void) {
    use_threads(2);
    test_linears();
    test_targets();
    test_registry();
    test_registry_errors();
    test_memory();
    test_init();
    test_norm();
    test_nonfinite();
    test_adamw_torch();
    test_adamw_chunks();
    test_newton_schulz();
    test_singular_values();
    test_symmetries();
    test_muon_torch();
    test_muon_batch();
    test_muon_skips();
    test_muon_size();
    test_muon_adapters();
    test_stack();
    test_schedule();
    return finish("test_lora");
}
