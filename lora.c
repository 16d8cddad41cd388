// lora.c: everything that is trained. Low-rank adapters, their gradients, and the optimizer.
//
// A frozen matrix W (O,C) gets two small factors, A (R,C) and B (O,R), with R of 8 or so. For each
// row x of the input:
//
//     u = A x                 what the adapter sees of the input: R numbers, kept for the backward
//     y = W x + s B u         s = alpha / R, so that changing R does not change the step size
//
// and, from dy, the gradient of y:
//
//     du  = s B^T dy          dx += W^T dy + A^T du          dB += s dy u^T          dA += du x^T
//
// W stays packed as the checkpoint stores it and gets no gradient, no master copy and no moments:
// the optimizer's memory is R (C + O) numbers per matrix, not C O. A starts random and B at zero,
// so the first step sees exactly the base model, and B moves first. Source: Hu et al. 2021,
// "LoRA", section 4.1, and PEFT for the initialisation.
//
// What it refuses to do: dropout, biases, a rank per module, training the router or the indexer,
// merging (dev/merge.c), and sums whose bits depend on the number of threads.
//
// Contents
//   1 the factors on a tile of rows, forward and backward
//   2 linears with an adapter: dense matrices and routed experts
//   3 which matrices get an adapter
//   4 the tensors that are trained: names, places, memory, first values
//   5 the size of a gradient: norm, clipping, non-finite values
//   6 AdamW
//   7 Muon
//   8 which optimizer has which tensor
//   9 the learning rate over time
#ifndef LORA_C
#define LORA_C
#include "mxfp4.c"          // frozen_*, Frozen, widen_*, expert_tiles, tile_rows, *_rows
#include <tgmath.h>         // sqrt of a float stays a float

// -------------------------------------------------------------------------------------------------
// 1 The factors on a tile of rows
//
// Both factors have one short side, R. Products run along the long side, where the compiler finds
// vectors: rows of A are long already, and B (O,R) is turned, a strip of its rows at a time, into
// (R,STRIP). The gradients are dealt to threads in the same strips: a thread owns its outputs and
// adds all rows of the batch to them in their order. So the bits do not depend on the threads, and
// two backwards of n rows leave the same bits as one of 2 n rows.

enum { STRIP = 64 };        // columns of A, or rows of B, that one thread works on at a time

// turned (R,STRIP) = the transpose of width rows of B, b (width,R).
static inline void strip_load(real *turned, const real *b, int width, int R) {
    for (int r = 0; r < R; r++) {
        for (int o = 0; o < width; o++) { turned[(size_t)r * STRIP + o] = b[(size_t)o * R + r]; }
    }
}

// The way back: b (width,R) = the transpose of turned (R,STRIP).
static inline void strip_store(real *b, const real *turned, int width, int R) {
    for (int o = 0; o < width; o++) {
        for (int r = 0; r < R; r++) { b[(size_t)o * R + r] = turned[(size_t)r * STRIP + o]; }
    }
}

// u (n,R) = x (n,C) A^T with a (R,C). Overwrites u.
static inline void lora_down_forward(real *u, const real *x, const real *a, int n, int C, int R) {
    for (int t = 0; t < n; t++) {
        for (int r = 0; r < R; r++) {
            const real *x_t = x + (size_t)t * C, *a_r = a + (size_t)r * C;
            real sum = 0;
            #pragma omp simd reduction(+ : sum)
            for (int c = 0; c < C; c++) { sum += a_r[c] * x_t[c]; }
            u[(size_t)t * R + r] = sum;
        }
    }
}

// dx (n,C) += du (n,R) A.
static inline void lora_down_backward(real *dx, const real *du, const real *a, int n, int C,
                                      int R) {
    for (int t = 0; t < n; t++) {
        for (int r = 0; r < R; r++) {
            // forward: u[r] += A[r][c] x[c], so dx[c] += A[r][c] du[r]
            real *dx_t = dx + (size_t)t * C, du_tr = du[(size_t)t * R + r];
            const real *a_r = a + (size_t)r * C;
            #pragma omp simd
            for (int c = 0; c < C; c++) { dx_t[c] += a_r[c] * du_tr; }
        }
    }
}

// y (n,O) += s u (n,R) B^T with b (O,R).
static inline void lora_up_forward(real *y, const real *u, const real *b, real s, int n, int O,
                                   int R) {
    real *turned = (real *)host_alloc(sizeof(real) * STRIP * R);
    for (int o0 = 0; o0 < O; o0 += STRIP) {
        int width = min_int(STRIP, O - o0);
        strip_load(turned, b + (size_t)o0 * R, width, R);
        for (int t = 0; t < n; t++) {
            real *y_t = y + (size_t)t * O + o0;
            for (int r = 0; r < R; r++) {
                real su = s * u[(size_t)t * R + r], *b_r = turned + (size_t)r * STRIP;
                #pragma omp simd
                for (int o = 0; o < width; o++) { y_t[o] += b_r[o] * su; }
            }
        }
    }
    free(turned);
}

// du (n,R) = s dy (n,O) B. Overwrites du.
static inline void lora_up_backward(real *du, const real *dy, const real *b, real s, int n, int O,
                                    int R) {
    real *turned = (real *)host_alloc(sizeof(real) * STRIP * R);
    memset(du, 0, sizeof(real) * n * R);
    for (int o0 = 0; o0 < O; o0 += STRIP) {
        int width = min_int(STRIP, O - o0);
        strip_load(turned, b + (size_t)o0 * R, width, R);
        for (int t = 0; t < n; t++) {
            const real *dy_t = dy + (size_t)t * O + o0;
            for (int r = 0; r < R; r++) {
                // forward: y[o] += s B[o][r] u[r], so du[r] += s B[o][r] dy[o]
                real sum = 0, *b_r = turned + (size_t)r * STRIP;
                #pragma omp simd reduction(+ : sum)
                for (int o = 0; o < width; o++) { sum += b_r[o] * dy_t[o]; }
                du[(size_t)t * R + r] += s * sum;
            }
        }
    }
    free(turned);
}

// The gradient of one strip of a factor: sum[r][j] += s k[t][r] z[t][j], over all n rows t.
// k (n,R) is the side with R columns. z points to the strip's first column of a matrix with Z
// columns. Rows of sum are stride apart, so that it may be a strip of dA, or a turned one of dB.
static inline void lora_strip_gradient(real *sum, size_t stride, const real *k, real s,
                                       const act *z, int n, int Z, int width, int R) {
    real wide[STRIP];
    for (int t = 0; t < n; t++) {
        load_rows(wide, z + (size_t)t * Z, (size_t)width);
        for (int r = 0; r < R; r++) {
            real sk = s * k[(size_t)t * R + r], *sum_r = sum + (size_t)r * stride;
            #pragma omp simd
            for (int j = 0; j < width; j++) { sum_r[j] += sk * wide[j]; }
        }
    }
}

// -------------------------------------------------------------------------------------------------
// 2 Linears with an adapter
//
// A dense matrix is the case of one expert that gets all rows, so there is one forward and one
// backward. Rows come grouped by expert, offset[e] .. offset[e+1]-1 are expert e's, and are cut
// into tiles as in mxfp4.c. The base product of a tile stays in reals until the adapter has been
// added, and is stored then: y is rounded once. (Adding two tensors that were rounded to bf16 would
// round three times, and lose most of a small adapter's contribution.)

// out (T,O), u (T,R) from inp (T,C): rows offset[e] .. offset[e+1]-1 go through expert e, with
// m (E*O,C), a (E,R,C), b (E,O,R). Overwrites out and u; without an adapter u is not touched.
static inline void lora_forward(act *out, real *u, const act *inp, const int *offset, Frozen m,
                                const real *a, const real *b, real s, int E, int C, int O, int R) {
    int count;
    ExpertTile *list = expert_tiles(&count, offset, E, tile_rows(offset[E], C + O));
    #pragma omp parallel for schedule(dynamic)
    for (int i = 0; i < count; i++) {
        size_t e = list[i].expert, row = list[i].row, n = list[i].n;
        real *x = tile_alloc(n * C), *y = tile_alloc(n * O);
        load_rows(x, inp + row * C, n * C);
        frozen_forward(y, x, m, e * O, (int)n, C, O);
        if (a != NULL && R > 0) {
            lora_down_forward(u + row * R, x, a + e * R * C, (int)n, C, R);
            lora_up_forward(y, u + row * R, b + e * O * R, s, (int)n, O, R);
        }
        store_rows(out + row * O, y, n * O);
        free(x);
        free(y);
    }
    free(list);
}

// First pass of the backward, over tiles of rows: dinp (T,C) += W^T dy + A^T du, and du, kept for
// the second pass: row t of the batch is row t - offset[0] of du.
static inline void lora_backward_rows(real *dinp, real *du, const act *dout, const int *offset,
                                      Frozen m, const real *a, const real *b, real s, int E, int C,
                                      int O, int R) {
    int count;
    ExpertTile *list = expert_tiles(&count, offset, E, tile_rows(offset[E] - offset[0], C + O));
    #pragma omp parallel for schedule(dynamic)
    for (int i = 0; i < count; i++) {
        size_t e = list[i].expert, row = list[i].row, n = list[i].n;
        real *dy = tile_alloc(n * O);
        load_rows(dy, dout + row * O, n * O);
        frozen_backward(dinp + row * C, dy, m, e * O, (int)n, C, O);
        if (a != NULL && R > 0) {
            real *du_row = du + (row - offset[0]) * R;
            lora_up_backward(du_row, dy, b + e * O * R, s, (int)n, O, R);
            lora_down_backward(dinp + row * C, du_row, a + e * R * C, (int)n, C, R);
        }
        free(dy);
    }
    free(list);
}

// Second pass, over strips of the factors: da (E,R,C) += du x^T and db (E,O,R) += s dy u^T.
// The gradients of an expert without rows stay as they are.
static inline void lora_backward_factors(real *da, real *db, const act *dout, const act *inp,
                                         const real *u, const real *du, const int *offset, real s,
                                         int E, int C, int O, int R) {
    int strips_b = (O + STRIP - 1) / STRIP, strips = strips_b + (C + STRIP - 1) / STRIP;
    #pragma omp parallel for schedule(dynamic)
    for (int k = 0; k < E * strips; k++) {
        size_t e = k / strips, row = offset[e];
        int strip = k % strips, n = offset[e + 1] - offset[e];
        if (n == 0) { continue; }
        if (strip < strips_b) {
            // forward: y[o] += s B[o][r] u[r], so dB[o][r] += s dy[o] u[r]
            size_t o0 = (size_t)strip * STRIP;
            int width = min_int(STRIP, O - (int)o0);
            real *db_strip = db + (e * O + o0) * R;
            real *turned = (real *)host_alloc(sizeof(real) * STRIP * R);
            strip_load(turned, db_strip, width, R);
            lora_strip_gradient(turned, STRIP, u + row * R, s, dout + row * O + o0, n, O, width,
                                R);
            strip_store(db_strip, turned, width, R);
            free(turned);
        } else {
            // forward: u[r] = sum_c A[r][c] x[c], so dA[r][c] += du[r] x[c]
            size_t c0 = (size_t)(strip - strips_b) * STRIP;
            int width = min_int(STRIP, C - (int)c0);
            lora_strip_gradient(da + e * R * C + c0, C, du + (row - offset[0]) * R, 1,
                                inp + row * C + c0, n, C, width, R);
        }
    }
}

// dinp (T,C), da (E,R,C), db (E,O,R) += the gradients of lora_forward. du is needed for all rows
// of a strip, so the batch is taken in parts whose du fits a host buffer. A sum that goes on in
// the next part has the same terms in the same order, so the parts do not show in the result.
static inline void lora_backward(real *dinp, real *da, real *db, const act *dout, const act *inp,
                                 const real *u, const int *offset, Frozen m, const real *a,
                                 const real *b, real s, int E, int C, int O, int R) {
    int adapted = a != NULL && R > 0, T = offset[E] - offset[0], most = T;
    if (adapted) { most = min_int(T, (int)((1 << 20) / (sizeof(real) * R))); }
    if (most < 1) { most = 1; }
    real *du = (real *)host_alloc(sizeof(real) * (adapted ? (size_t)most * R : 0));
    int *part = (int *)host_alloc(sizeof(int) * (E + 1));       // offset, cut to the part
    for (int first = offset[0], last; first < offset[E]; first = last) {
        last = offset[E] - first > most ? first + most : offset[E];
        for (int e = 0; e <= E; e++) {
            part[e] = offset[e] < first ? first : min_int(offset[e], last);
        }
        lora_backward_rows(dinp, du, dout, part, m, a, b, s, E, C, O, R);
        if (adapted) { lora_backward_factors(da, db, dout, inp, u, du, part, s, E, C, O, R); }
    }
    free(part);
    free(du);
}

// y = W x + s B (A x), rounded once. out (T,O) and u (T,R) are overwritten; u = A x is what the
// backward needs. inp (T,C), w (O,C) e4m3 with scale (O/128,C/128), a (R,C), b (O,R).
// a == NULL or R == 0: no adapter, out = W x, and u may be NULL.
void lora_linear_forward(act *out, real *u, const act *inp, const uint8_t *w, const uint8_t *scale,
                         const real *a, const real *b, float s, int T, int C, int O, int R) {
    GPU(lora_linear_forward_gpu(out, u, inp, w, scale, a, b, s, T, C, O, R))
    int offset[2] = {0, T};
    Frozen m = {w, scale, widen_fp8};
    lora_forward(out, u, inp, offset, m, a, b, (real)s, 1, C, O, R);
}
TWIN(lora_linear_forward)

// dinp (T,C), da (R,C), db (O,R) += the gradients, from dout (T,O), and inp and u of the forward.
void lora_linear_backward(real *dinp, real *da, real *db, const act *dout, const act *inp,
                          const real *u, const uint8_t *w, const uint8_t *scale, const real *a,
                          const real *b, float s, int T, int C, int O, int R) {
    GPU(lora_linear_backward_gpu(dinp, da, db, dout, inp, u, w, scale, a, b, s, T, C, O, R))
    int offset[2] = {0, T};
    Frozen m = {w, scale, widen_fp8};
    lora_backward(dinp, da, db, dout, inp, u, offset, m, a, b, (real)s, 1, C, O, R);
}
TWIN(lora_linear_backward)

// The same for E experts: rows offset[e] .. offset[e+1]-1 of inp (T,C), out (T,O) and u (T,R) are
// expert e's. w (E,O,C/2) packed e2m1 with scale (E,O,C/32), a (E,R,C), b (E,O,R).
void lora_experts_forward(act *out, real *u, const act *inp, const int *offset, const uint8_t *w,
                          const uint8_t *scale, const real *a, const real *b, float s, int E,
                          int C, int O, int R) {
    GPU(lora_experts_forward_gpu(out, u, inp, offset, w, scale, a, b, s, E, C, O, R))
    Frozen m = {w, scale, widen_fp4};
    lora_forward(out, u, inp, offset, m, a, b, (real)s, E, C, O, R);
}
TWIN(lora_experts_forward)

// dinp (T,C), da (E,R,C), db (E,O,R) += the gradients. An expert without rows adds nothing.
void lora_experts_backward(real *dinp, real *da, real *db, const act *dout, const act *inp,
                           const real *u, const int *offset, const uint8_t *w,
                           const uint8_t *scale, const real *a, const real *b, float s, int E,
                           int C, int O, int R) {
    GPU(lora_experts_backward_gpu(dinp, da, db, dout, inp, u, offset, w, scale, a, b, s, E, C, O,
                                  R))
    Frozen m = {w, scale, widen_fp4};
    lora_backward(dinp, da, db, dout, inp, u, offset, m, a, b, (real)s, E, C, O, R);
}
TWIN(lora_experts_backward)

// The adapters' share alone: u (T,R) = A x, of inp (T,C), where the product W x is made of codes
// (moe.c, 7.1) or is not needed again (moe.c, 7).
void lora_experts_down(real *u, const act *inp, const int *offset, const real *a, int E, int C,
                       int R) {
    GPU(lora_experts_down_gpu(u, inp, offset, a, E, C, R))
    if (a == NULL || R == 0) { return; }
    int count;
    ExpertTile *list = expert_tiles(&count, offset, E, tile_rows(offset[E], C));
    #pragma omp parallel for schedule(dynamic)
    for (int i = 0; i < count; i++) {
        size_t e = list[i].expert, row = list[i].row, n = list[i].n;
        real *x = tile_alloc(n * C);
        load_rows(x, inp + row * C, n * C);
        lora_down_forward(u + row * R, x, a + e * R * C, (int)n, C, R);
        free(x);
    }
    free(list);
}
TWIN(lora_experts_down)

// And of its backward: du (T,R) = s B^T dy, overwritten; da (E,R,C) += du x^T, db (E,O,R) +=
// s dy u^T. A^T du, what the input gets, is left to the caller.
void lora_experts_gradients(real *du, real *da, real *db, const act *dout, const act *inp,
                            const real *u, const int *offset, const real *b, float s, int E, int C,
                            int O, int R) {
    GPU(lora_experts_gradients_gpu(du, da, db, dout, inp, u, offset, b, s, E, C, O, R))
    if (b == NULL || R == 0) { return; }
    int count;
    ExpertTile *list = expert_tiles(&count, offset, E, tile_rows(offset[E], O));
    #pragma omp parallel for schedule(dynamic)
    for (int i = 0; i < count; i++) {
        size_t e = list[i].expert, row = list[i].row, n = list[i].n;
        real *dy = tile_alloc(n * O);
        load_rows(dy, dout + row * O, n * O);
        lora_up_backward(du + row * R, dy, b + e * O * R, (real)s, (int)n, O, R);
        free(dy);
    }
    free(list);
    lora_backward_factors(da, db, dout, inp, u, du, offset, (real)s, E, C, O, R);
}
TWIN(lora_experts_gradients)

// w1 above w3 is one matrix (2F,C), and their adapters are one of rank 2R: A = [A1; A3], and
// B = [B1 0; 0 B3]. The stack is A (E,2R,C) and, behind it, B (E,2F,2R). Returns where element i of
// it comes from in a1, a3 (E,R,C), b1, b3 (E,F,R); NULL: from none of them, it is zero.
static inline real *lora_stacked(size_t i, real *a1, real *b1, real *a3, real *b3, int E, int C,
                                 int F, int R) {
    const size_t n_a = (size_t)E * 2 * R * C;
    if (i < n_a) {
        size_t r = i / C % (2 * R), e = i / C / (2 * R);
        real *a = r < (size_t)R ? a1 : a3;
        return a ? a + (e * R + r % R) * C + i % C : NULL;
    }
    size_t row = (i - n_a) / (2 * R), r = (i - n_a) % (2 * R), f = row % (2 * F), e = row / (2 * F);
    real *b = f < (size_t)F ? b1 : b3;
    return b && (r < (size_t)R) == (f < (size_t)F) ? b + (e * F + f % F) * R + r % R : NULL;
}

// add 0: fills the stack from there. add 1: adds the stack, which holds gradients then, to there.
// Either adapter may be absent.
void lora_stack(real *stack, real *a1, real *b1, real *a3, real *b3, int add, int E, int C, int F,
                int R) {
    GPU(lora_stack_gpu(stack, a1, b1, a3, b3, add, E, C, F, R))
    #pragma omp parallel for
    for (size_t i = 0; i < (size_t)E * 2 * R * (C + 2 * F); i++) {
        real *p = lora_stacked(i, a1, b1, a3, b3, E, C, F, R);
        if (!add) { stack[i] = p ? *p : 0; }
        else if (p) { *p += stack[i]; }
    }
}
TWIN(lora_stack)

// -------------------------------------------------------------------------------------------------
// 3 Which matrices get an adapter
//
// The user names groups or single matrices. Not on offer are the router and the indexer, which
// decide by comparing and pass no useful gradient, and wo_a, which is block-diagonal: other
// programs would load its adapter as that of a full matrix.

enum { TARGET_WQ_A, TARGET_WQ_B, TARGET_WKV, TARGET_WO_B,
       TARGET_SHARED_W1, TARGET_SHARED_W2, TARGET_SHARED_W3,
       TARGET_EXPERTS_W1, TARGET_EXPERTS_W2, TARGET_EXPERTS_W3, TARGETS };

static const struct { const char *name, *group; } target_names[TARGETS] = {
    [TARGET_WQ_A]       = {"wq_a",       "attn"},
    [TARGET_WQ_B]       = {"wq_b",       "attn"},
    [TARGET_WKV]        = {"wkv",        "attn"},
    [TARGET_WO_B]       = {"wo_b",       "attn"},
    [TARGET_SHARED_W1]  = {"shared.w1",  "shared"},
    [TARGET_SHARED_W2]  = {"shared.w2",  "shared"},
    [TARGET_SHARED_W3]  = {"shared.w3",  "shared"},
    [TARGET_EXPERTS_W1] = {"experts.w1", "experts"},
    [TARGET_EXPERTS_W2] = {"experts.w2", "experts"},
    [TARGET_EXPERTS_W3] = {"experts.w3", "experts"},
};

// "attn,shared.w1" as bits 1 << TARGET_*. Words are groups or single matrices, with a comma between
// them and blanks around them at will; anything else ends the process and is named.
unsigned targets_parse(const char *list) {
    unsigned targets = 0;
    for (const char *word = list;; word++) {
        word += strspn(word, " ");
        int length = (int)strcspn(word, ","), end = length;
        while (end > 0 && word[end - 1] == ' ') { end--; }
        unsigned found = 0;
        for (int i = 0; i < TARGETS; i++) {
            const char *names[2] = {target_names[i].name, target_names[i].group};
            for (int j = 0; j < 2; j++) {
                int same = (int)strlen(names[j]) == end && memcmp(names[j], word, end) == 0;
                found |= (unsigned)same << i;
            }
        }
        if (found == 0) {
            die(EXIT_USAGE, "--lora-targets: '%.*s' is not a target HINT: the groups attn, shared, "
                "experts, or single ones: wq_a, wq_b, wkv, wo_b, shared.w1, shared.w2, shared.w3, "
                "experts.w1, experts.w2, experts.w3", end, word);
        }
        targets |= found;
        word += length;
        if (*word == 0) { return targets; }
    }
}

// -------------------------------------------------------------------------------------------------
// 4 The tensors that are trained
//
// All factors lie in one flat array, dense ones first, then those of this rank's experts, and the
// gradients and both moments in three more of the same layout. So ranks add up their dense
// gradients, which everyone has, in one call, and leave the expert gradients, which only the owner
// has, alone; the optimizer is one loop, and a saved file a list of (name, place). The model
// registers its adapters twice: first to count, then, with memory, to get pointers. Both passes
// must say the same, or a name would point at another tensor's numbers.

typedef struct {
    real *a, *b, *da, *db;      // (R,in), (out,R) and gradients; NULL when the module is no target
} Lora;

typedef struct {                // one trained matrix: factor A or B of one module
    char name[96];              // "layers.3.attn.wq_a.lora_A", "layers.3.ffn.experts.17.w1.lora_B"
    int rows, cols;             // (R,in) or (out,R)
    int expert;                 // -1: dense, the same on all ranks; else its number of ALL experts
    size_t at;                  // first element in p, g, m, v
} AdapterTensor;

typedef struct {
    int R;                      // set by the caller before adapters_begin, with alpha and targets
    float alpha, scale;         // scale = alpha / R
    unsigned targets;           // bits 1 << TARGET_*
    int n, capacity;
    AdapterTensor *tensors;     // (n) in the order of registration
    size_t n_dense, n_expert;   // elements of the two blocks
    real *p, *g, *m, *v;        // (n_dense + n_expert) masters, gradients, moments
    size_t cursor_dense, cursor_expert;     // how far registration has come
    int muon;                   // 0: AdamW; NS_GRAM or NS_STANDARD: Muon, which has no v
    size_t *slices_h;           // (n,3) place, rows, columns of each tensor; Muon only
} Adapters;

// Begins a pass. Before the very first, the struct is zero but for R, alpha and targets.
void adapters_begin(Adapters *s) {
    s->scale = s->R > 0 ? s->alpha / s->R : 0;
    s->n = 0;
    s->cursor_dense = s->cursor_expert = 0;
}

// Records factor 'A' or 'B' of a module. In the second pass, compares with what the first recorded.
static inline void adapter_record(Adapters *s, const char *module, const char *leaf, char factor,
                                  int rows, int cols, int expert, size_t at) {
    AdapterTensor t = {.rows = rows, .cols = cols, .expert = expert, .at = at};
    int length = expert < 0 ? snprintf(t.name, sizeof t.name, "%s.lora_%c", module, factor)
                            : snprintf(t.name, sizeof t.name, "%s.%d.%s.lora_%c", module, expert,
                                       leaf, factor);
    if (length >= (int)sizeof t.name) {
        die(EXIT_USAGE, "the adapter name %s... has %d characters, more than %zu", t.name, length,
            sizeof t.name - 1);
    }
    if (s->p != NULL) {
        const AdapterTensor *counted = &s->tensors[s->n];
        if (strcmp(counted->name, t.name) != 0 || counted->rows != rows || counted->cols != cols) {
            die(EXIT_USAGE, "internal: adapter %d was counted as %s (%d,%d), now it is %s (%d,%d)",
                s->n, counted->name, counted->rows, counted->cols, t.name, rows, cols);
        }
    } else if (s->n == s->capacity) {
        s->capacity = s->capacity ? 2 * s->capacity : 64;
        s->tensors = (AdapterTensor *)realloc(s->tensors, sizeof t * s->capacity);
        if (s->tensors == NULL) { die(EXIT_FIT, "no memory for %d adapter names", s->capacity); }
    }
    s->tensors[s->n++] = t;
}

// Pointers to the factors at a and b; all NULL in the counting pass, da and db without training.
static inline Lora adapter_pointers(const Adapters *s, size_t a, size_t b) {
    Lora lora = {NULL, NULL, NULL, NULL};
    if (s->p != NULL) { lora.a = s->p + a; lora.b = s->p + b; }
    if (s->g != NULL) { lora.da = s->g + a; lora.db = s->g + b; }
    return lora;
}

// Registers the adapter of one dense matrix (out,in). module: "layers.3.attn.wq_a".
Lora adapter_add(Adapters *s, int target, const char *module, int in, int out) {
    Lora none = {NULL, NULL, NULL, NULL};
    if (s->R <= 0 || !(s->targets >> target & 1)) { return none; }
    size_t a = s->cursor_dense, b = a + (size_t)s->R * in;
    s->cursor_dense = b + (size_t)out * s->R;
    require(s->p == NULL || s->cursor_dense <= s->n_dense);
    adapter_record(s, module, NULL, 'A', s->R, in, -1, a);
    adapter_record(s, module, NULL, 'B', out, s->R, -1, b);
    return adapter_pointers(s, a, b);
}

// Registers those of experts first .. first+count-1, which this rank owns. prefix:
// "layers.3.ffn.experts", leaf: "w1". In memory all A of the module (count,R,in) come before all
// B (count,out,R), as the grouped products want them; in the list each expert has its A, then its
// B. No experts, no adapter.
Lora adapter_add_experts(Adapters *s, int target, const char *prefix, const char *leaf, int first,
                         int count, int in, int out) {
    Lora none = {NULL, NULL, NULL, NULL};
    if (s->R <= 0 || count <= 0 || !(s->targets >> target & 1)) { return none; }
    size_t size_a = (size_t)s->R * in, size_b = (size_t)out * s->R;
    size_t a = s->n_dense + s->cursor_expert, b = a + count * size_a;
    s->cursor_expert += count * (size_a + size_b);
    require(s->p == NULL || s->cursor_expert <= s->n_expert);
    for (int i = 0; i < count; i++) {
        adapter_record(s, prefix, leaf, 'A', s->R, in, first + i, a + i * size_a);
        adapter_record(s, prefix, leaf, 'B', out, s->R, first + i, b + i * size_b);
    }
    return adapter_pointers(s, a, b);
}

// Between the passes: memory for what the first one counted. For evaluation the masters are enough.
void adapters_alloc(Adapters *s, int training) {
    s->n_dense = s->cursor_dense;
    s->n_expert = s->cursor_expert;
    size_t n = s->n_dense + s->n_expert;
    s->p = MEM(real, MEM_ADAPTERS, n);
    s->g = training ? MEM(real, MEM_ADAPTERS, n) : NULL;
    s->m = training ? MEM(real, MEM_OPTIMIZER, n) : NULL;
    s->v = training && !s->muon ? MEM(real, MEM_OPTIMIZER, n) : NULL;
}

// First values, as PEFT's: A uniform in +-1/sqrt(in), B zero. An element depends on the seed, the
// tensor's name and its index, so every rank that has a tensor draws the same one.
void adapters_init(Adapters *s, uint64_t seed) {
    require(s->cursor_dense == s->n_dense && s->cursor_expert == s->n_expert);
    for (int k = 0; k < s->n; k++) {
        const AdapterTensor *t = &s->tensors[k];
        size_t n = (size_t)t->rows * t->cols;
        int is_a = t->name[strlen(t->name) - 1] == 'A';
        double bound = is_a ? 1 / sqrt((double)t->cols) : 0;
        uint64_t key = random_key(seed, t->name);
        real *values = (real *)host_alloc(n * sizeof *values);
        #pragma omp parallel for
        for (size_t i = 0; i < n; i++) {
            values[i] = is_a ? (real)(bound * (2.0 * random_uniform(key, i) - 1)) : 0;
        }
        upload(s->p + t->at, values, n * sizeof *values);       // by the thread that has the GPU
        free(values);
    }
}

// s with p, m and v where the host can read and write them: s itself on the CPU, a copy beside a
// GPU. adapters_host_end brings it back if it was written, and frees it.
static inline Adapters adapters_host(const Adapters *s) {
    const size_t bytes = sizeof(real) * (s->n_dense + s->n_expert);
    Adapters host = *s;
    if (!ON_GPU) { return host; }
    real **const to[3] = { &host.p, &host.m, &host.v };
    for (int k = 0; k < 3; k++) {
        const real *from = *to[k];
        if (from == NULL) { continue; }
        *to[k] = (real *)malloc(bytes);         // between steps: no rule about memory holds
        if (*to[k] == NULL) { die(EXIT_FIT, "no host memory for %zu bytes of adapters", bytes); }
        download(*to[k], from, bytes);
    }
    return host;
}

static inline void adapters_host_end(Adapters *host, const Adapters *s, int written) {
    const size_t bytes = sizeof(real) * (s->n_dense + s->n_expert);
    if (!ON_GPU) { return; }
    real *const from[3] = { host->p, host->m, host->v }, *const to[3] = { s->p, s->m, s->v };
    for (int k = 0; k < 3; k++) {
        if (written && to[k]) { upload(to[k], from[k], bytes); }
        free(from[k]);
    }
}

// -------------------------------------------------------------------------------------------------
// 5 The size of a gradient
//
// Clipping looks at one number, the norm over every trained element of every rank: sums of squares
// are added up, of dense gradients once (all ranks hold the same), of expert gradients by owner.
// They are taken in double, where squares of floats neither overflow nor vanish. So the norm is
// finite exactly when every gradient is, and the search below runs only when the run has failed.
// Order in a step: norm, finite or stop, clip, moments, decay, update. Each of them once.

enum { SUM_PARTS = 256 };

// The kernel's answer: a twin is void, so the number comes through a pointer.
static inline double sum_squares_device(const real *g, size_t n) {
    double sum = 0;
    (void)g, (void)n;
#ifdef USE_CUDA
    sum_squares_gpu(&sum, g, n);
#endif
    return sum;
}

// sum of g[i]^2 over n elements on the host. The parts depend on n alone, and are added in order.
static inline double sum_squares_host(const real *g, size_t n) {
    double parts[SUM_PARTS], total = 0;
    size_t length = n / SUM_PARTS + 1;
    #pragma omp parallel for
    for (int k = 0; k < SUM_PARTS; k++) {
        size_t begin = length * k < n ? length * k : n;
        size_t end = n - begin > length ? begin + length : n;
        double sum = 0;
        #pragma omp simd reduction(+ : sum)
        for (size_t i = begin; i < end; i++) { sum += (double)g[i] * (double)g[i]; }
        parts[k] = sum;
    }
    for (int k = 0; k < SUM_PARTS; k++) { total += parts[k]; }
    return total;
}
double sum_squares(const real *g, size_t n) {
    return ON_GPU ? sum_squares_device(g, n) : sum_squares_host(g, n);
}

// The name of the first tensor that has a NaN or an infinity among values (n_dense + n_expert),
// which has the layout of p; NULL if there is none.
const char *adapters_first_nonfinite(const Adapters *s, const real *values) {
    for (int k = 0; k < s->n; k++) {
        const AdapterTensor *t = &s->tensors[k];
        if (!isfinite(sum_squares(values + t->at, (size_t)t->rows * t->cols))) { return t->name; }
    }
    return NULL;
}

// What all gradients are multiplied by, as torch.nn.utils.clip_grad_norm_: min(1, max / (norm +
// 1e-6)). max_norm <= 0 turns clipping off. A NaN stays a NaN.
double clip_factor(double norm, double max_norm) {
    double factor = max_norm / (norm + 1e-6);
    return max_norm <= 0 || factor > 1 ? 1 : factor;
}

// -------------------------------------------------------------------------------------------------
// 6 AdamW
//
// Per element, with m and v running means of the gradient and its square, and t the step:
//
//     p *= 1 - lr decay                                    decoupled: not part of the gradient
//     m += (1 - beta1) (g - m)          v = beta2 v + (1 - beta2) g^2
//     p -= lr / (1 - beta1^t) m / (sqrt(v) / sqrt(1 - beta2^t) + eps)
//
// m and v start at zero and so begin too small; the two corrections undo that. They come from the
// one step counter, never from a product kept per tensor: every shard of a tensor sees the same
// ones. No gradient is no special case: an expert that saw no token has g = 0, its moments fade,
// and decay applies. Source: Loshchilov and Hutter 2019, algorithm 2, as in torch.optim.AdamW.

enum { ADAMW_BLOCK = 4096 };    // elements that a thread takes at a time

// p, m, v (n) are updated from g (n) * grad_scale. step counts from 1. Bytes: 4 reads and 3 writes
// per element, which is what bounds it.
void adamw_update(real *p, real *m, real *v, const real *g, size_t n, double grad_scale, double lr,
                  double beta1, double beta2, double eps, double weight_decay, int step) {
    GPU(adamw_update_gpu(p, m, v, g, n, grad_scale, lr, beta1, beta2, eps, weight_decay, step))
    // Constants are made in double and rounded once, as torch does.
    real scale = (real)grad_scale, keep = (real)(1 - lr * weight_decay), eps_ = (real)eps;
    real old2 = (real)beta2, new1 = (real)(1 - beta1), new2 = (real)(1 - beta2);
    real rate = (real)(lr / (1 - pow(beta1, step)));
    real root = (real)sqrt(1 - pow(beta2, step));
    #pragma omp parallel for
    for (size_t block = 0; block < (n + ADAMW_BLOCK - 1) / ADAMW_BLOCK; block++) {
        size_t begin = block * ADAMW_BLOCK, count = n - begin;
        if (count > ADAMW_BLOCK) { count = ADAMW_BLOCK; }
        real *restrict p_b = p + begin, *restrict m_b = m + begin, *restrict v_b = v + begin;
        const real *restrict g_b = g + begin;
        for (size_t i = 0; i < count; i++) {
            real g_i = g_b[i] * scale;
            m_b[i] += new1 * (g_i - m_b[i]);
            v_b[i] = old2 * v_b[i] + new2 * g_i * g_i;
            p_b[i] = keep * p_b[i] - rate * m_b[i] / (sqrt(v_b[i]) / root + eps_);
        }
    }
}
TWIN(adamw_update)

// -------------------------------------------------------------------------------------------------
// 7 Muon
//
// A gradient of a matrix is mostly its few largest directions. Muon follows all of them alike: it
// replaces the running mean of the gradient by a matrix with the same singular vectors, and
// singular values near 1. With G the gradient of one factor of one expert, and M its one moment:
//
//     M <- beta M + (1 - beta) G        U = (1 - beta) G + beta M      Nesterov: one step ahead
//     O  = NS(U)                        the singular vectors of U, values in 0.68 .. 1.21
//     p <- p (1 - lr decay) - lr 0.2 sqrt(max(rows, columns)) O
//
// The last factor gives an update the size of AdamW's, so that its learning rates can be used. The
// polynomial f(x) = a x + b x^3 + c x^5, five times over, takes any x from 0.0017 to 1 to that
// range, and a polynomial in X X^T does to each singular value what f does to a number. So with
// X = U / |U|, turned if need be so that it has no more rows than columns, five times:
//
//     R = X X^T       Z = b R + c R^2       X <- a X + Z X        (here R is no adapter's rank)
//
// Gram Newton-Schulz leaves X alone and works on R: all of R, Z and Q are polynomials in the first
// R, so they commute, and with P = a R + Z R the next round's R is a P + Z P:
//
//     Q <- a Q + Z Q       R <- a P + Z P                 and at the end X <- Q X
//
// But R's smallest eigenvalues drown in rounding: X of nearly rank one, an adapter's usual
// gradient, comes out wrong. A restart, X <- Q X, R = X X^T, Q = I, puts that right. One before the
// third round is enough in fp32; a restart before every round is the standard method.
//
// Others add 1e-7 to |U|. Here a slice's whole gradient may be that small, and its step would
// depend on how small: nothing is added, and a U of zero stays zero. An expert without tokens has
// gradient 0 but a moment, which NS would scale up to a full step, again and again for some 180
// steps: so a slice whose gradient is all zero is left as it is. Since a step's size does not
// depend on the gradient's, Muon hides wrong scales: compare gradients, not what it makes of them.
// Sources: Jordan et al. 2024, "Muon"; Liu et al. 2025, "Muon is scalable", 2.2, for the scale;
// Dao-AILab, gram-newton-schulz, for the restart.

enum { NS_ROUNDS = 5, NS_GRAM = 1 << 2, NS_STANDARD = 0x1E };    // bit t: restart before round t
static const double ns_a = 3.4445, ns_b = -4.7750, ns_c = 2.0315;

// Sums are taken in double, so an element of X, R, Z or Q is rounded once, when it is stored: here.
// test_lora.c rounds to fp16 instead, which shows what the restart is there for.
#ifndef ns_round
#define ns_round(x) (x)
#endif

// A matrix with n rows, m >= n columns; element (i,j) lies at x[i * down + j * right].
typedef struct {
    real *x;
    size_t n, m, down, right;
} NsMatrix;

// r (n,n) = x x^T.
static inline void ns_gram(real *r, NsMatrix x) {
    for (size_t i = 0; i < x.n; i++) {
        for (size_t k = i; k < x.n; k++) {
            const real *x_i = x.x + i * x.down, *x_k = x.x + k * x.down;
            double sum = 0;
            #pragma omp simd reduction(+ : sum)
            for (size_t j = 0; j < x.m; j++) { sum += (double)x_i[j * x.right] * x_k[j * x.right]; }
            r[i * x.n + k] = r[k * x.n + i] = ns_round((real)sum);
        }
    }
}

// out (n,n) = s x + t y x. out is neither of them.
static inline void ns_polynomial(real *out, double s, const real *x, double t, const real *y,
                                 size_t n) {
    for (size_t i = 0; i < n; i++) {
        for (size_t k = 0; k < n; k++) {
            double sum = 0;
            for (size_t j = 0; j < n; j++) { sum += (double)y[i * n + j] * x[j * n + k]; }
            out[i * n + k] = ns_round((real)(s * x[i * n + k] + t * sum));
        }
    }
}

// x <- q x with q (n,n), a column at a time.
static inline void ns_apply(NsMatrix x, const real *q) {
    for (size_t j = 0; j < x.m; j++) {
        real column[x.n];
        for (size_t i = 0; i < x.n; i++) { column[i] = x.x[i * x.down + j * x.right]; }
        for (size_t i = 0; i < x.n; i++) {
            double sum = 0;
            for (size_t k = 0; k < x.n; k++) { sum += (double)q[i * x.n + k] * column[k]; }
            x.x[i * x.down + j * x.right] = ns_round((real)sum);
        }
    }
}

static inline void ns_identity(real *q, size_t n) {
    for (size_t i = 0; i < n * n; i++) { q[i] = i % (n + 1) == 0; }
}

static inline void ns_swap(real **a, real **b) { real *keep = *a; *a = *b; *b = keep; }

// u (rows,cols) <- NS(u), in place. restarts: NS_GRAM or NS_STANDARD.
static inline void newton_schulz(real *u, size_t rows, size_t cols, int restarts) {
    const int wide = rows <= cols;
    NsMatrix x = { u, wide ? rows : cols, wide ? cols : rows, wide ? cols : 1, wide ? 1 : cols };
    const size_t n = x.n;
    const double norm = sqrt(sum_squares(u, rows * cols));
    if (norm == 0) { return; }
    for (size_t i = 0; i < rows * cols; i++) { u[i] = ns_round((real)(u[i] / norm)); }

    real *room = (real *)host_alloc(4 * n * n * sizeof *room);
    real *r = room, *q = room + n * n, *z = room + 2 * n * n, *next = room + 3 * n * n;
    ns_gram(r, x);
    ns_identity(q, n);
    for (int t = 0; t < NS_ROUNDS; t++) {
        if (t > 0 && restarts >> t & 1) {
            ns_apply(x, q);
            ns_gram(r, x);
            ns_identity(q, n);
        }
        ns_polynomial(z, ns_b, r, ns_c, r, n);
        ns_polynomial(next, ns_a, q, 1, z, n);
        ns_swap(&q, &next);
        if (t + 1 == NS_ROUNDS || restarts >> (t + 1) & 1) { continue; }    // nobody wants this R
        ns_polynomial(next, ns_a, r, 1, z, n);
        ns_polynomial(r, ns_a, next, 1, z, n);
    }
    ns_apply(x, q);
    free(room);
}

// Updates n slices: slices_h (n,3) holds for each its first element in p, m and g, its rows and its
// columns. g * grad_scale is the gradient; g is the room that X needs, and holds no gradient
// afterwards. A slice whose gradient is all zero, or not finite, keeps p and m to the bit. Slices
// are worked off alone, so the result of one depends neither on the others nor on their order.
void muon_update(real *p, real *m, real *g, const size_t *slices_h, int n, double grad_scale,
                 double lr, double beta, double weight_decay, int restarts) {
    GPU(muon_update_gpu(p, m, g, slices_h, n, grad_scale, lr, beta, weight_decay, restarts))
    const real scale = (real)grad_scale, old = (real)beta, new = (real)(1 - beta);
    const real keep = (real)(1 - lr * weight_decay);
    #pragma omp parallel for schedule(dynamic)
    for (int k = 0; k < n; k++) {
        const size_t at = slices_h[3 * k], rows = slices_h[3 * k + 1], cols = slices_h[3 * k + 2];
        real *p_k = p + at, *m_k = m + at, *g_k = g + at;
        const double size = sum_squares(g_k, rows * cols);
        if (size == 0 || !isfinite(size)) { continue; }
        for (size_t i = 0; i < rows * cols; i++) {
            const real g_i = g_k[i] * scale;
            m_k[i] = old * m_k[i] + new * g_i;
            g_k[i] = new * g_i + old * m_k[i];
        }
        newton_schulz(g_k, rows, cols, restarts);
        const real rate = (real)(lr * 0.2 * sqrt((double)(rows > cols ? rows : cols)));
        for (size_t i = 0; i < rows * cols; i++) { p_k[i] = keep * p_k[i] - rate * g_k[i]; }
    }
}
TWIN(muon_update)

// -------------------------------------------------------------------------------------------------
// 8 Which optimizer has which tensor
//
// All adapters are matrices, so one optimizer has them all: AdamW with two moments per element, or
// Muon with one. For Muon they are a list of slices, largest first: a large one begun last would
// keep everyone waiting. Once per step, when the gradients are complete and known to be finite.

static inline int slice_order(const void *a, const void *b) {
    const size_t *x = (const size_t *)a, *y = (const size_t *)b;
    const size_t size_x = x[1] * x[2], size_y = y[1] * y[2];
    return size_x != size_y ? (size_x < size_y ? 1 : -1) : (x[0] > y[0]) - (x[0] < y[0]);
}

// Makes the list from the tensors.
static inline void adapters_slices(Adapters *s) {
    free(s->slices_h);
    s->slices_h = (size_t *)malloc(((size_t)s->n * 3 + 1) * sizeof *s->slices_h);
    if (s->slices_h == NULL) { die(EXIT_FIT, "no memory for a list of %d slices", s->n); }
    for (int k = 0; k < s->n; k++) {
        const AdapterTensor *t = &s->tensors[k];
        const size_t slice[3] = { t->at, (size_t)t->rows, (size_t)t->cols };
        memcpy(s->slices_h + 3 * (size_t)k, slice, sizeof slice);
    }
    qsort(s->slices_h, (size_t)s->n, 3 * sizeof *s->slices_h, slice_order);
}

// One update of everything that is trained. step counts from 1; beta1 is Muon's beta.
void adapters_update(Adapters *s, double grad_scale, double lr, double beta1, double beta2,
                     double eps, double weight_decay, int step) {
    if (s->muon) {
        if (s->slices_h == NULL) { adapters_slices(s); }
        muon_update(s->p, s->m, s->g, s->slices_h, s->n, grad_scale, lr, beta1, weight_decay,
                    s->muon);
        return;
    }
    adamw_update(s->p, s->m, s->v, s->g, s->n_dense + s->n_expert, grad_scale, lr, beta1, beta2,
                 eps, weight_decay, step);
}

// "layers.3.ffn.experts.17.w1.lora_A" -> "ffn.experts.w1": the kind of matrix that a factor is of.
static inline void adapter_kind(char *kind, size_t size, const char *name) {
    const char *end = strstr(name, ".lora_");
    size_t used = 0;
    for (const char *part = name; part < end; part += strcspn(part, ".") + 1) {
        int length = (int)strcspn(part, "."), number = *part >= '0' && *part <= '9';
        if (number || strncmp(part, "layers.", 7) == 0) { continue; }
        used += (size_t)snprintf(kind + used, size - used, "%s%.*s", used ? "." : "", length, part);
    }
}

// Prints what this rank trains by which optimizer, a line for each kind of matrix, and the state
// that it keeps: "plan   muon        ffn.experts.w1           344 x A (8,4096), B (2048,8)".
void adapters_ledger(const Adapters *s) {
    enum { MOST = 2 * TARGETS };
    const char *name = s->muon ? "muon" : "adamw";
    const size_t bytes = (s->n_dense + s->n_expert) * sizeof(real) * (s->muon ? 1 : 2);
    char kind[MOST][sizeof s->tensors->name], text[64] = "";
    int count[MOST] = { 0 }, first[MOST], kinds = 0;
    for (int k = 0; k < s->n; k += 2) {         // a module's A and B follow each other
        int j = 0;
        require(kinds < MOST);
        adapter_kind(kind[kinds], sizeof kind[0], s->tensors[k].name);
        while (strcmp(kind[j], kind[kinds]) != 0) { j++; }
        if (j == kinds) { first[kinds++] = k; }
        count[j]++;
    }
    for (int j = 0; j < kinds; j++) {
        const AdapterTensor *t = &s->tensors[first[j]];
        printf("plan   %-11s %-21s %5d x A (%d,%d), B (%d,%d)\n", name, kind[j], count[j],
               t[0].rows, t[0].cols, t[1].rows, t[1].cols);
    }
    if (s->muon) {
        snprintf(text, sizeof text, " | %d Newton-Schulz (%s) a step", s->n,
                 s->muon == NS_GRAM ? "gram" : "standard");
    }
    printf("plan   %-11s %.1f MiB of state, %d moment%s%s\n", name, (double)bytes / 1048576.0,
           s->muon ? 1 : 2, s->muon ? "" : "s", text);
}

// -------------------------------------------------------------------------------------------------
// 9 The learning rate over time
//
// A linear warm-up, because the first moments are noise, then half a cosine down to a fraction of
// the peak, or a constant.

// For step 0 .. steps-1. warmup > step: lr (step + 1) / warmup. After that, with cosine: half a
// period from lr, at step warmup, towards lr * final_frac, at step steps. Without: lr.
double lr_at(double lr, int step, int steps, int warmup, double final_frac, int cosine) {
    if (step < warmup) { return lr * (step + 1.0) / warmup; }
    if (!cosine) { return lr; }
    double done = step < steps ? (double)(step - warmup) / (steps - warmup) : 1;
    return lr * (final_frac + (1 - final_frac) / 2 * (1 + cos(3.14159265358979323846 * done)));
}
#endif // LORA_C
