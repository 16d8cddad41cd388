// train.c: DeepSeek-V4 as a model that can be trained, and the loop that trains it.
//
// The model is a stack of layers, each two sublayers f (attention, then a mixture of experts) that
// are joined to four residual streams X instead of one (hyper-connections, part 4):
//
//     X = expand(embed(ids))
//     for each layer, for f in (attention, experts):
//         u = collapse(X)              the streams become one vector
//         X = deal(f(RMSNorm(u)), X)   the result is dealt back to streams that are mixed
//     logits = head(RMSNorm(collapse(X)))
//
// All base weights are frozen. What learns are low-rank adapters on some matrices (lora.c), so the
// backward pass computes no gradient of a base weight, but every gradient of an activation. It
// keeps each layer's input X and the output of its experts; the rest of the layer is computed
// again when its turn comes in the backward pass (--recompute full), partly (moe) or not (none).
//
// Every operation is a function on plain arrays, forward and backward, in the order in which the
// model uses them. Here they are text; kernels.cu holds their twins.
//
// What accumulates: adapter gradients, a sublayer's dx and the real* dinp of every linear are +=
// into buffers that the layer loop zeroed, because several callers feed them. All other gradients
// of activations are =; that of the streams, dX, takes its turn in one buffer, site after site.
//
// Sources: the DeepSeek-V4 report (sections named where used) and its released inference code; the
// tests compare with Hugging Face transformers 5.17.
//
// Contents
//    1 this page, and the legend          7 head and loss
//    2 the model as one table of tensors  8 the model: plan, allocate, load, forward, backward
//    3 norms, embedding, RoPE             9 data: files, packing, order
//    4 hyper-connections                 10 a training step, validation, sampling
//    5 attention                         11 log lines, JSON, plot
//    6 one layer                         12 options, main
//
// Legend of dimensions, used everywhere
//    T  tokens of a micro-batch          H  attention heads         E  experts
//    C  channels of a stream             D  dims of a head          K  experts per token
//    HC residual streams (4)             W  window, in tokens       F  width of an expert
//    V  vocabulary                       P  pooled entries          R  rank of an adapter
//    Q  rank of the query projection     G  groups of the output projection, O rank of each
#ifndef TRAIN_C
#define TRAIN_C
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include "refit.c"          // defines: Config, Tensor, checkpoint_load, adapter_save, ...
#include <sys/file.h>
#include <tgmath.h>         // exp of a float stays a float
#include <time.h>
#ifdef _OPENMP
#include <omp.h>
#endif

// -------------------------------------------------------------------------------------------------
// Part 2: the model as one table of tensors
//
// A row of the table is all there is to know of one kind of tensor: its name in the checkpoint, how
// it is stored, its shape, which layers have it, how a random base draws it, and where its address
// goes. Allocation, loading, checking and drawing all walk this table, so they cannot disagree.

// The mixing of one site (attention or experts) of one layer, or of the head.
typedef struct { const float *fn, *base, *scale; } HyperConnection;

// A compressor pools runs of tokens into entries (part 5.2).
typedef struct { const float *ape; const bf16 *wkv, *wgate, *norm; } Compressor;

typedef struct {
    HyperConnection hc_attn, hc_ffn;
    const bf16 *attn_norm, *ffn_norm;           // (C)
    const float *sink;                          // (H)
    const uint8_t *wq_a, *wq_b, *wkv;           // fp8 codes: (Q,C) (H*D,Q) (D,C)
    const uint8_t *wo_a, *wo_b;                 // (G*O,H*D/G) (C,G*O)
    const uint8_t *sq_a, *sq_b, *skv, *so_a, *so_b;     // and their e8m0 scales
    const bf16 *q_norm, *kv_norm;               // (Q), (D)
    Compressor pool;                            // of the keys, where ratio > 0
    Compressor index_pool;                      // of the indexer's keys, where ratio == 4
    const uint8_t *index_wq, *index_sq;         // (index_heads*index_dim, Q) fp8
    const bf16 *index_weights;                  // (index_heads, C)
    MoeWeights moe;
    Lora lq_a, lq_b, lkv, lo_b;                 // adapters of wq_a, wq_b, wkv, wo_b
} Layer;

typedef struct {
    const bf16 *embed, *head, *norm;            // (V,C), (V,C), (C)
    HyperConnection hc_head;
} Globals;

// A shape is written in these; their values depend on the configuration and the layer.
enum {
    D_NONE, D_1, D_3, D_HC, D_MIX, D_STREAMS, D_V, D_C, D_Q, D_HEADS, D_D, D_H, D_GO, D_GC,
    D_RATIO, D_POOL, D_IHEADS, D_IH, D_ID, D_IPOOL, D_E, D_K, D_F,
};
// Which layers have the tensor. POOLED: those with a compressor (CSA and HCA).
enum { GLOBAL, EVERY, CSA, POOLED, HASHED, SCORED, EXPERT };

typedef struct {
    const char *name;           // under "layers.N." unless GLOBAL; EXPERT: %d is the expert
    int type, where, dim[2];    // logical shape (out, in)
    float mean, std;            // random base: mean + std * normal,
    int per_input;              // std divided by sqrt(in)
    size_t field, scale;        // where in Layer or Globals the address goes; of the scales
} TensorKind;

#define AT(field) offsetof(Layer, field), 0
#define AT2(field, scale) offsetof(Layer, field), offsetof(Layer, scale)
#define AT_GLOBAL(field) offsetof(Globals, field), 0
static const TensorKind tensor_kinds[] = {
    // name                 stored   layers   shape (out, in)  mean std  per_input   address
    {"embed.weight",       DT_BF16, GLOBAL, {D_V, D_C},        0, 1, 0,    AT_GLOBAL(embed)},
    {"head.weight",        DT_BF16, GLOBAL, {D_V, D_C},        0, 1.5f, 1, AT_GLOBAL(head)},
    {"norm.weight",        DT_BF16, GLOBAL, {D_C},             1, 0.2f, 0, AT_GLOBAL(norm)},
    {"hc_head_fn",         DT_F32,  GLOBAL, {D_HC, D_STREAMS}, 0, 1, 1,    AT_GLOBAL(hc_head.fn)},
    {"hc_head_base",       DT_F32,  GLOBAL, {D_HC},            0, 0.7f, 0, AT_GLOBAL(hc_head.base)},
    {"hc_head_scale",      DT_F32,  GLOBAL, {D_1},            1, 0.3f, 0, AT_GLOBAL(hc_head.scale)},
    {"hc_attn_fn",         DT_F32,  EVERY,  {D_MIX, D_STREAMS}, 0, 1, 1,   AT(hc_attn.fn)},
    {"hc_attn_base",       DT_F32,  EVERY,  {D_MIX},           0, 0.7f, 0, AT(hc_attn.base)},
    {"hc_attn_scale",      DT_F32,  EVERY,  {D_3},             1, 0.3f, 0, AT(hc_attn.scale)},
    {"hc_ffn_fn",          DT_F32,  EVERY,  {D_MIX, D_STREAMS}, 0, 1, 1,   AT(hc_ffn.fn)},
    {"hc_ffn_base",        DT_F32,  EVERY,  {D_MIX},           0, 0.7f, 0, AT(hc_ffn.base)},
    {"hc_ffn_scale",       DT_F32,  EVERY,  {D_3},             1, 0.3f, 0, AT(hc_ffn.scale)},
    {"attn_norm.weight",   DT_BF16, EVERY,  {D_C},             1, 0.2f, 0, AT(attn_norm)},
    {"ffn_norm.weight",    DT_BF16, EVERY,  {D_C},             1, 0.2f, 0, AT(ffn_norm)},
    {"attn.attn_sink",     DT_F32,  EVERY,  {D_H},             0, 1, 0,    AT(sink)},
    {"attn.wq_a.weight",   DT_FP8,  EVERY,  {D_Q, D_C},        0, 1, 1,    AT2(wq_a, sq_a)},
    {"attn.q_norm.weight", DT_BF16, EVERY,  {D_Q},             1, 0.2f, 0, AT(q_norm)},
    {"attn.wq_b.weight",   DT_FP8,  EVERY,  {D_HEADS, D_Q},    0, 1, 1,    AT2(wq_b, sq_b)},
    {"attn.wkv.weight",    DT_FP8,  EVERY,  {D_D, D_C},        0, 1, 1,    AT2(wkv, skv)},
    {"attn.kv_norm.weight", DT_BF16, EVERY, {D_D},             1, 0.2f, 0, AT(kv_norm)},
    {"attn.wo_a.weight",   DT_FP8,  EVERY,  {D_GO, D_GC},      0, 1, 1,    AT2(wo_a, so_a)},
    {"attn.wo_b.weight",   DT_FP8,  EVERY,  {D_C, D_GO},       0, 1, 1,    AT2(wo_b, so_b)},
    {"attn.compressor.ape",           DT_F32, POOLED, {D_RATIO, D_POOL}, 0, 0.7f, 0, AT(pool.ape)},
    {"attn.compressor.wkv.weight",    DT_BF16, POOLED, {D_POOL, D_C},   0, 1, 1,    AT(pool.wkv)},
    {"attn.compressor.wgate.weight",  DT_BF16, POOLED, {D_POOL, D_C},   0, 1, 1,    AT(pool.wgate)},
    {"attn.compressor.norm.weight",   DT_BF16, POOLED, {D_D},           1, 0.2f, 0, AT(pool.norm)},
    {"attn.indexer.wq_b.weight",    DT_FP8, CSA, {D_IHEADS, D_Q}, 0, 1, 1, AT2(index_wq, index_sq)},
    {"attn.indexer.weights_proj.weight", DT_BF16, CSA, {D_IH, D_C}, 0, 1, 1, AT(index_weights)},
    {"attn.indexer.compressor.ape", DT_F32, CSA, {D_RATIO, D_IPOOL}, 0, 0.7f, 0,
     AT(index_pool.ape)},
    {"attn.indexer.compressor.wkv.weight",   DT_BF16, CSA, {D_IPOOL, D_C}, 0, 1, 1,
     AT(index_pool.wkv)},
    {"attn.indexer.compressor.wgate.weight", DT_BF16, CSA, {D_IPOOL, D_C}, 0, 1, 1,
     AT(index_pool.wgate)},
    {"attn.indexer.compressor.norm.weight",  DT_BF16, CSA, {D_ID}, 1, 0.2f, 0, AT(index_pool.norm)},
    {"ffn.gate.weight",    DT_BF16, EVERY,  {D_E, D_C},        0, 1, 1,    AT(moe.gate)},
    {"ffn.gate.bias",      DT_F32,  SCORED, {D_E},             0, 0.3f, 0, AT(moe.bias)},
    {"ffn.gate.tid2eid",   DT_I64,  HASHED, {D_V, D_K},        0, 0, 0,    AT(moe.tid2eid)},
    {"ffn.shared_experts.w1.weight", DT_FP8, EVERY, {D_F, D_C}, 0, 1, 1, AT2(moe.sh_w1, moe.sh_s1)},
    {"ffn.shared_experts.w2.weight", DT_FP8, EVERY, {D_C, D_F}, 0, 1, 1, AT2(moe.sh_w2, moe.sh_s2)},
    {"ffn.shared_experts.w3.weight", DT_FP8, EVERY, {D_F, D_C}, 0, 1, 1, AT2(moe.sh_w3, moe.sh_s3)},
    {"ffn.experts.%d.w1.weight", DT_FP4, EXPERT, {D_F, D_C},   0, 1, 1,    AT2(moe.w1, moe.s1)},
    {"ffn.experts.%d.w2.weight", DT_FP4, EXPERT, {D_C, D_F},   0, 1, 1,    AT2(moe.w2, moe.s2)},
    {"ffn.experts.%d.w3.weight", DT_FP4, EXPERT, {D_F, D_C},   0, 1, 1,    AT2(moe.w3, moe.s3)},
};
enum { TENSOR_KINDS = sizeof tensor_kinds / sizeof *tensor_kinds };

// A CSA compressor pools overlapping runs, which takes two halves of channels; HCA one.
static inline int halves(int ratio) { return ratio == 4 ? 2 : 1; }

static int dim_value(const Config *c, int layer, int dim) {
    int ratio = layer < 0 ? 0 : c->ratio[layer];
    switch (dim) {
        case D_1: return 1;
        case D_3: return 3;
        case D_HC: return HC;
        case D_MIX: return HC_MIX;
        case D_STREAMS: return HC * c->C;
        case D_V: return c->V;
        case D_C: return c->C;
        case D_Q: return c->Q;
        case D_HEADS: return c->H * c->D;
        case D_D: return c->D;
        case D_H: return c->H;
        case D_GO: return c->G * c->O;
        case D_GC: return c->H * c->D / c->G;
        case D_RATIO: return ratio;
        case D_POOL: return halves(ratio) * c->D;
        case D_IHEADS: return c->index_heads * c->index_dim;
        case D_IH: return c->index_heads;
        case D_ID: return c->index_dim;
        case D_IPOOL: return halves(ratio) * c->index_dim;
        case D_E: return c->E;
        case D_K: return c->K;
        case D_F: return c->F;
        default: return 0;
    }
}

static int layer_has(const Config *c, int layer, const TensorKind *k) {
    switch (k->where) {
        case CSA: return c->ratio[layer] == 4;
        case POOLED: return c->ratio[layer] > 0;
        case HASHED: return layer < c->hash_layers;
        case SCORED: return layer >= c->hash_layers && !c->how.greedy;
        case GLOBAL: return 0;
        default: return 1;
    }
}

// Bytes of n elements in memory; hash tables are kept as int32.
static size_t type_bytes(int type, size_t n) {
    switch (type) {
        case DT_BF16: return 2 * n;
        case DT_F32: case DT_I64: return 4 * n;
        default: return n;          // fp8 codes, e8m0 scales, fp4 pairs (counted as bytes)
    }
}

// -------------------------------------------------------------------------------------------------
// 2.1 A random base
//
// --random-base and the built-in tiny model draw every tensor in its storage format, by the
// counter-based generator of the contract: the same bytes on any machine and any number of ranks,
// and in dev/ref/model.py, which is how the tests compare with PyTorch without storing weights.

// The exponent e with 2^e <= sigma < 2^(e+1).
static int floor_log2(float sigma) {
    int exponent;
    frexp((double)sigma, &exponent);
    return exponent - 1;
}

// n elements of data (for fp4: bytes of two), mean + unit * random_normal rounded to their type.
void draw_elements(void *data, int type, uint64_t key, float mean, double unit, size_t n) {
    GPU(draw_elements_gpu(data, type, key, mean, unit, n))
    #pragma omp parallel for schedule(static)
    for (size_t i = 0; i < n; i++) {
        #define DRAW(i) (float)((double)mean + (double)random_normal(key, i) * unit)
        switch (type) {
            case DT_BF16: ((bf16 *)data)[i] = bf16_from_float(DRAW(i)); break;
            case DT_F32: ((float *)data)[i] = DRAW(i); break;
            case DT_FP8: ((uint8_t *)data)[i] = e4m3_from_float(DRAW(i)); break;
            case DT_FP4: ((uint8_t *)data)[i] = (uint8_t)(e2m1_from_float(DRAW(2 * i)) |
                                                             e2m1_from_float(DRAW(2 * i + 1)) << 4);
                break;
            case DT_E8M0:           // mean is the middle byte
                ((uint8_t *)data)[i] = (uint8_t)((int)mean + (int)(random_bits(key, i) % 3) - 1);
                break;
        }
        #undef DRAW
    }
}
TWIN(draw_elements)

// Draws t->data. Codes of a block-scaled matrix are drawn alike in every block, and the scale's
// byte is one of three neighbours, so that a scale applied to the wrong block shows.
static void tensor_draw(const Tensor *t, uint64_t seed) {
    uint64_t key = random_key(seed, t->name);
    size_t n = 1;
    for (int d = 0; d < t->ndim; d++) { n *= t->dim[d]; }
    int fp8 = t->type == DT_FP8, scaled = fp8 || t->type == DT_FP4;
    int shift = scaled ? floor_log2(t->std) - (fp8 ? 6 : 0) : 0;
    double unit = (double)(float)(ldexp((double)t->std, -shift) / RANDOM_STD);
    if (t->type == DT_I64) {        // K distinct experts per token: a shuffle stopped after K cards
        int K = (int)t->dim[1], E = (int)t->std, *card = host_alloc(sizeof(int) * (size_t)E);
        int32_t *table = host_alloc(sizeof(int32_t) * n);
        for (size_t row = 0; row < t->dim[0]; row++) {
            for (int e = 0; e < E; e++) { card[e] = e; }
            for (int k = 0; k < K; k++) {
                uint64_t drawn_bits = random_bits(key, row * (size_t)K + (size_t)k);
                int j = k + (int)(drawn_bits % (uint64_t)(E - k)), drawn = card[j];
                card[j] = card[k];
                card[k] = drawn;
                table[row * (size_t)K + (size_t)k] = drawn;
            }
        }
        upload(t->data, table, sizeof(int32_t) * n);
        free(table);
        free(card);
        return;
    }
    draw_elements(t->data, t->type, key, t->mean, unit, n);
}

// -------------------------------------------------------------------------------------------------
// Part 3: norms, embedding, RoPE

// Σ a_i b_i. The compiler may keep several partial sums (simd), always the same ones.
static inline real dot(const real *a, const real *b, int n) {
    real sum = 0;
    #pragma omp simd reduction(+:sum)
    for (int i = 0; i < n; i++) { sum += a[i] * b[i]; }
    return sum;
}

// The same with the second vector in storage.
static inline real dot_act(const real *a, const act *b, int n) {
    real sum = 0;
    #pragma omp simd reduction(+:sum)
    for (int i = 0; i < n; i++) { sum += a[i] * ld(b + i); }
    return sum;
}

// 1 / sqrt(mean of squares + eps) of n stored values.
static inline real inverse_rms(const act *x, float eps, int n) {
    real sum = 0;
    #pragma omp simd reduction(+:sum)
    for (int i = 0; i < n; i++) { sum += ld(x + i) * ld(x + i); }
    return 1 / sqrt(sum / n + (real)eps);
}

static inline real weight_of(const bf16 *w, int i) { return w ? (real)float_from_bf16(w[i]) : 1; }

// out (T,C) = w * inp * rstd with rstd (T) = 1 / rms(inp). w (C), or NULL for a norm without
// weights.
void rmsnorm_forward(act *out, real *rstd, const act *inp, const bf16 *w, float eps, int T, int C) {
    GPU(rmsnorm_forward_gpu(out, rstd, inp, w, eps, T, C))
    #pragma omp parallel for
    for (int t = 0; t < T; t++) {
        const act *inp_t = inp + (size_t)t * C;
        rstd[t] = inverse_rms(inp_t, eps, C);
        for (int c = 0; c < C; c++) {
            st(out + (size_t)t * C + c, weight_of(w, c) * (ld(inp_t + c) * rstd[t]));
        }
    }
}
TWIN(rmsnorm_forward)

// One row of it, on reals: d comes in as gradient of the output and leaves as that of the input.
static inline void rmsnorm_row_backward(real *d, const real *inp, real rstd, const bf16 *w, int C) {
    // forward: out = w * x with x = inp * rstd. rstd depends on every element of inp, so with
    // a = w * dout:  dinp = rstd * (a - x * mean(a * x))
    real mean = 0;
    for (int c = 0; c < C; c++) {
        d[c] *= weight_of(w, c);
        mean += d[c] * (inp[c] * rstd);
    }
    mean /= C;
    for (int c = 0; c < C; c++) { d[c] = rstd * (d[c] - inp[c] * rstd * mean); }
}

// dinp (T,C) from dout (T,C), and inp, rstd of the forward.
void rmsnorm_backward(act *dinp, const real *dout, const act *inp, const real *rstd, const bf16 *w,
                      int T, int C) {
    GPU(rmsnorm_backward_gpu(dinp, dout, inp, rstd, w, T, C))
    #pragma omp parallel for
    for (int t = 0; t < T; t++) {
        real d[C], x[C];
        memcpy(d, dout + (size_t)t * C, sizeof d);
        load_rows(x, inp + (size_t)t * C, (size_t)C);
        rmsnorm_row_backward(d, x, rstd[t], w, C);
        store_rows(dinp + (size_t)t * C, d, (size_t)C);
    }
}
TWIN(rmsnorm_backward)

// X (T,HC,C): every stream starts as the token's embedding. Frozen, so there is no backward.
void embed_forward(act *X, const bf16 *embed, const int *token, int T, int C) {
    GPU(embed_forward_gpu(X, embed, token, T, C))
    #pragma omp parallel for
    for (int t = 0; t < T; t++) {
        for (int i = 0; i < HC; i++) {
            for (int c = 0; c < C; c++) {
                st(X + ((size_t)t * HC + i) * C + c,
                   (real)float_from_bf16(embed[(size_t)token[t] * C + c]));
            }
        }
    }
}
TWIN(embed_forward)

// RoPE turns pairs (a, b) of the last `rope` dims of a head by an angle that grows with the
// position inside the document: (a cos - b sin, a sin + b cos). Two kinds of layers, two sets of
// frequencies: base 10,000 in window layers; in layers with a compressor base 160,000, stretched
// by YaRN (slow pairs turn `factor` times slower, fast ones as they are, a ramp between). There is
// no attention factor on the scores.
static void rope_frequencies(real *f, const Config *c, int compressed) {
    int half = c->rope_dim / 2;
    double base = compressed ? c->compress_theta : c->rope_theta;
    // The pair that makes r turns within the original context length.
    #define PAIR(r) (c->rope_dim * log(c->original_positions / (2 * M_PI * (r))) / (2 * log(base)))
    double low = fmax(floor(PAIR(c->beta_fast)), 0);
    double high = fmin(ceil(PAIR(c->beta_slow)), c->rope_dim - 1);
    #undef PAIR
    for (int i = 0; i < half; i++) {
        double fast = pow(base, -(double)i / half);
        double ramp = fmin(fmax((i - low) / fmax(high - low, 0.001), 0), 1);
        f[i] = (real)(compressed ? fast * (1 - ramp) + fast / c->yarn_factor * ramp : fast);
    }
}

// table (positions, rope/2, 2): cos and sin of position * frequency. Made on the host.
static void rope_table(real *out, const Config *c, int compressed, int positions) {
    int half = c->rope_dim / 2;
    size_t bytes = sizeof(real) * (size_t)positions * half * 2;
    real f[half], *table = host_alloc(bytes);
    rope_frequencies(f, c, compressed);
    #pragma omp parallel for
    for (int p = 0; p < positions; p++) {
        for (int i = 0; i < half; i++) {
            real angle = (real)p * f[i];
            table[((size_t)p * half + i) * 2] = cos(angle);
            table[((size_t)p * half + i) * 2 + 1] = sin(angle);
        }
    }
    upload(out, table, bytes);
    free(table);
}

// Turns the pairs of v (rope) by sign times the angles of turn (rope/2, 2), in place. The backward
// of a rotation is the rotation back: sign -1.
static inline void rotate(real *v, const real *turn, int rope, int sign) {
    for (int i = 0; i < rope; i += 2) {
        real a = v[i], b = v[i + 1], cosine = turn[i], sine = sign * turn[i + 1];
        v[i] = a * cosine - b * sine;
        v[i + 1] = a * sine + b * cosine;
    }
}

// The last `rope` dims of each of the H heads of x (T,H,D) are turned in place by sign times the
// angles of the token's position.
void rope_apply(act *x, const real *table, const int *position, int sign, int T, int H, int D,
                int rope) {
    GPU(rope_apply_gpu(x, table, position, sign, T, H, D, rope))
    #pragma omp parallel for
    for (int t = 0; t < T; t++) {
        real v[rope];
        for (int h = 0; h < H; h++) {
            act *x_th = x + ((size_t)t * H + h) * D + D - rope;
            load_rows(v, x_th, (size_t)rope);
            rotate(v, table + (size_t)position[t] * rope, rope, sign);
            store_rows(x_th, v, (size_t)rope);
        }
    }
}
TWIN(rope_apply)

// out (T,H,D) = rope(rmsnorm(inp)), head by head. Queries have no norm weight (w NULL), keys and
// entries one head. rstd (T,H).
void norm_rope_forward(act *out, real *rstd, const act *inp, const bf16 *w, const real *table,
                       const int *position, float eps, int T, int H, int D, int rope) {
    GPU(norm_rope_forward_gpu(out, rstd, inp, w, table, position, eps, T, H, D, rope))
    #pragma omp parallel for
    for (int t = 0; t < T; t++) {
        real v[D];
        for (int h = 0; h < H; h++) {
            size_t row = (size_t)t * H + h;
            const act *inp_th = inp + row * D;
            rstd[row] = inverse_rms(inp_th, eps, D);
            for (int d = 0; d < D; d++) { v[d] = weight_of(w, d) * (ld(inp_th + d) * rstd[row]); }
            rotate(v + D - rope, table + (size_t)position[t] * rope, rope, 1);
            store_rows(out + row * D, v, (size_t)D);
        }
    }
}
TWIN(norm_rope_forward)

// dinp (T,H,D) from dout (T,H,D) of the queries and the forward's out; dinp may be dout. The
// forward may work in place: with no weight its output tells all that is needed of its input.
void norm_rope_backward(act *dinp, const act *dout, const act *out, const real *rstd,
                        const real *table, const int *position, int T, int H, int D, int rope) {
    GPU(norm_rope_backward_gpu(dinp, dout, out, rstd, table, position, T, H, D, rope))
    #pragma omp parallel for
    for (int t = 0; t < T; t++) {
        real d[D], y[D];
        for (int h = 0; h < H; h++) {
            size_t row = (size_t)t * H + h;
            load_rows(d, dout + row * D, (size_t)D);
            load_rows(y, out + row * D, (size_t)D);
            // forward: y = rotate(x), x = inp * rstd. A rotation leaves <dy, y> = <dx, x>, so the
            // norm's backward, dinp = rstd * (dx - x * mean(dx * x)), can come before turning back.
            real mean = dot(d, y, D) / D;
            for (int i = 0; i < D; i++) { d[i] = rstd[row] * (d[i] - y[i] * mean); }
            rotate(d + D - rope, table + (size_t)position[t] * rope, rope, -1);
            store_rows(dinp + row * D, d, (size_t)D);
        }
    }
}
TWIN(norm_rope_backward)

// The same for keys and entries: one head, a weight, so inp is needed, and a gradient that was
// summed in real.
void key_norm_rope_backward(act *dinp, const real *dout, const act *inp, const real *rstd,
                            const bf16 *w, const real *table, const int *position, int n, int D,
                            int rope) {
    GPU(key_norm_rope_backward_gpu(dinp, dout, inp, rstd, w, table, position, n, D, rope))
    #pragma omp parallel for
    for (int row = 0; row < n; row++) {
        real d[D], x[D];
        memcpy(d, dout + (size_t)row * D, sizeof d);
        load_rows(x, inp + (size_t)row * D, (size_t)D);
        // forward: out = rotate(norm(inp)); so turn back, then the norm's backward
        rotate(d + D - rope, table + (size_t)position[row] * rope, rope, -1);
        rmsnorm_row_backward(d, x, rstd[row], w, D);
        store_rows(dinp + (size_t)row * D, d, (size_t)D);
    }
}
TWIN(key_norm_rope_backward)

// -------------------------------------------------------------------------------------------------
// Part 4: hyper-connections (mHC)
//
// A block keeps four residual streams X[0..3] instead of one. Around each sublayer f:
//
//     u    = sum_i pre[i] X[i]                 the streams are collapsed into the sublayer's input,
//     o    = f(RMSNorm(u))
//     Y[j] = post[j] o + sum_i C[i][j] X[i]    its output is dealt back to streams mixed by C.
//
// C's first index is the OLD stream, its second the NEW one: transposing it leaves every shape and
// most magnitudes intact, and the model wrong. C is pushed towards a doubly stochastic matrix (rows
// and columns sum to one), so that mixing can neither amplify nor lose the streams however deep the
// stack: Sinkhorn's algorithm. All weights come from 24 numbers m per token and site, a projection
// of the normalised streams. Source: the report's section 2.2, and the released inference code.
//
// The streams are four times as wide as anything else, so what a site costs is how often it walks
// over them. Forward twice: dealing, which takes the next site's m along, and collapsing with the
// norm. Backward three times: dY and X for do, dpost and dcomb; then, when the sublayer's own
// gradient dx is there, dx and X for dm; then all of them for dX, written once.

// m (T,M) = r * (fn X) with r (T) = 1 / rms of a token's HC*C numbers. M is HC_MIX, or HC at the
// head. fn (M,HC*C) fp32.
void hc_logits_forward(real *m, real *r, const act *X, const float *fn, float eps, int T, int C,
                       int M) {
    GPU(hc_logits_forward_gpu(m, r, X, fn, eps, T, C, M))
    linear_f32_forward(m, X, fn, T, HC * C, M);
    #pragma omp parallel for
    for (int t = 0; t < T; t++) {
        r[t] = inverse_rms(X + (size_t)t * HC * C, eps, HC * C);
        for (int i = 0; i < M; i++) { m[(size_t)t * M + i] *= r[t]; }
    }
}
TWIN(hc_logits_forward)

// Sinkhorn: rows and columns take turns to be divided by their sums. The backward of one such
// half-step needs only its result y and the sums S: x = y * S brings the input back.
enum { COLUMNS, ROWS };

// Element b of line a: the lines are rows or columns of the 4x4 matrix c.
static inline real *line(real *c, int lines, int a, int b) {
    return lines == ROWS ? &c[a * HC + b] : &c[b * HC + a];
}

// y = x / (sum of x's line + eps), in place. sums (HC) keeps the divisors.
static inline void normalise_forward(real *c, real *sums, int lines, float eps) {
    for (int a = 0; a < HC; a++) {
        sums[a] = (real)eps;
        for (int b = 0; b < HC; b++) { sums[a] += *line(c, lines, a, b); }
        for (int b = 0; b < HC; b++) { *line(c, lines, a, b) /= sums[a]; }
    }
}

// Turns c from y back into x and dc from dy into dx, in place.
static inline void normalise_backward(real *dc, real *c, const real *sums, int lines) {
    for (int a = 0; a < HC; a++) {
        // forward: y_b = x_b / S with S = sum_b x_b + eps, so dx_b = (dy_b - sum_k dy_k y_k) / S
        real along = 0;
        for (int b = 0; b < HC; b++) { along += *line(dc, lines, a, b) * *line(c, lines, a, b); }
        for (int b = 0; b < HC; b++) {
            *line(dc, lines, a, b) = (*line(dc, lines, a, b) - along) / sums[a];
            *line(c, lines, a, b) *= sums[a];
        }
    }
}

enum { HC_MAX_ITERS = 64 };     // room for one token's divisors on the stack

// c (HC,HC): logits in, mixing matrix out. sums (2*iters-1, HC): the divisors of every half-step.
static inline void sinkhorn_forward(real *c, real *sums, int iters, float eps) {
    for (real *row = c; row < c + HC * HC; row += HC) {     // softmax of each row, + eps
        real max = row[0], sum = 0;
        for (int k = 1; k < HC; k++) { max = fmax(max, row[k]); }
        for (int k = 0; k < HC; k++) { sum += row[k] = exp(row[k] - max); }
        for (int k = 0; k < HC; k++) { row[k] = row[k] / sum + (real)eps; }
    }
    // Columns first, and columns last: columns sum to one almost exactly, rows nearly.
    for (int step = 0; step < 2 * iters - 1; step++) {
        normalise_forward(c, sums + step * HC, step % 2 ? ROWS : COLUMNS, eps);
    }
}

// dc (HC,HC): gradient of the mixing matrix in, of the logits out. c: that matrix, overwritten.
static inline void sinkhorn_backward(real *dc, real *c, const real *sums, int iters, float eps) {
    for (int step = 2 * iters - 2; step >= 0; step--) {
        normalise_backward(dc, c, sums + step * HC, step % 2 ? ROWS : COLUMNS);
    }
    for (int j = 0; j < HC; j++) {
        // forward: a = p + eps with p = softmax(logits of row j), so dlogits = p (da - <da, p>)
        real *da = dc + j * HC, *p = c + j * HC, along = 0;
        for (int k = 0; k < HC; k++) { p[k] -= (real)eps; along += da[k] * p[k]; }
        for (int k = 0; k < HC; k++) { da[k] = p[k] * (da[k] - along); }
    }
}

// pre (T,4), post (T,4), comb (T,4,4) from m (T,M), M = 24: [pre | post | comb row by row] logits,
// base (24) and scale (3), both frozen. The head (M = 4) only collapses: post and comb are NULL.
void hc_weights_forward(real *pre, real *post, real *comb, const real *m, const float *base,
                        const float *scale, float eps, int T, int M, int iters) {
    GPU(hc_weights_forward_gpu(pre, post, comb, m, base, scale, eps, T, M, iters))
    #pragma omp parallel for
    for (int t = 0; t < T; t++) {
        const real *m_t = m + (size_t)t * M;
        for (int i = 0; i < HC; i++) {      // never quite 0
            pre[(size_t)t * HC + i] = sigmoid(m_t[i] * scale[0] + base[i]) + (real)eps;
        }
        if (M == HC) { continue; }
        real *post_t = post + (size_t)t * HC, *comb_t = comb + (size_t)t * HC * HC;
        real sums[2 * HC_MAX_ITERS * HC];
        for (int i = 0; i < HC; i++) {      // 1 at logit 0
            post_t[i] = 2 * sigmoid(m_t[HC + i] * scale[1] + base[HC + i]);
        }
        for (int i = 0; i < HC * HC; i++) {
            comb_t[i] = m_t[2 * HC + i] * scale[2] + base[2 * HC + i];
        }
        sinkhorn_forward(comb_t, sums, iters, eps);
    }
}
TWIN(hc_weights_forward)

// One token of its backward: dm (M) from dpre (4), dpost (4), dcomb (4,4). The forward is run
// again: 24 numbers per token are cheaper to keep than 39 half-steps.
static inline void hc_weights_row_backward(real *dm, const real *dpre, const real *dpost,
                                           const real *dcomb, const real *m, const float *base,
                                           const float *scale, float eps, int M, int iters) {
    for (int i = 0; i < HC; i++) {
        // forward: pre = s(m scale0 + base) + eps, so dm = dpre s (1 - s) scale0
        real s = sigmoid(m[i] * scale[0] + base[i]);
        dm[i] = dpre[i] * s * (1 - s) * scale[0];
    }
    if (M == HC) { return; }
    real c[HC * HC], *dlogits = dm + 2 * HC, sums[2 * HC_MAX_ITERS * HC];
    for (int i = 0; i < HC; i++) {
        // forward: post = 2 s(m scale1 + base), so dm = dpost 2 s (1 - s) scale1
        real s = sigmoid(m[HC + i] * scale[1] + base[HC + i]);
        dm[HC + i] = dpost[i] * 2 * s * (1 - s) * scale[1];
    }
    for (int i = 0; i < HC * HC; i++) {
        c[i] = m[2 * HC + i] * scale[2] + base[2 * HC + i];
        dlogits[i] = dcomb[i];
    }
    sinkhorn_forward(c, sums, iters, eps);
    sinkhorn_backward(dlogits, c, sums, iters, eps);
    for (int i = 0; i < HC * HC; i++) { dlogits[i] *= scale[2]; }       // logit = m scale2 + base
}

// u (C) = sum_i pre[i] X[i] of one token, X (HC,C).
static inline void hc_collapse_row(real *u, const act *X, const real *pre, int C) {
    for (int c = 0; c < C; c++) {
        u[c] = pre[0] * ld(X + c) + pre[1] * ld(X + C + c) + pre[2] * ld(X + 2 * C + c)
             + pre[3] * ld(X + 3 * C + c);
    }
}

// The sublayer's input: x (T,C) = RMSNorm(u) with u = sum_i pre[i] X[i], norm weight w (C). All
// that is kept of u is rstd (T) = 1 / rms(u).
void hc_enter_forward(act *x, real *rstd, const act *X, const real *pre, const bf16 *w, float eps,
                      int T, int C) {
    GPU(hc_enter_forward_gpu(x, rstd, X, pre, w, eps, T, C))
    #pragma omp parallel for
    for (int t = 0; t < T; t++) {
        real u[C];
        hc_collapse_row(u, X + (size_t)t * HC * C, pre + (size_t)t * HC, C);
        rstd[t] = 1 / sqrt(dot(u, u, C) / C + (real)eps);
        for (int c = 0; c < C; c++) {
            st(x + (size_t)t * C + c, weight_of(w, c) * (u[c] * rstd[t]));
        }
    }
}
TWIN(hc_enter_forward)

// dX (T,HC,C), all of it, once dx (T,C), the gradient of the sublayer's input, is there. dX holds
// the gradient of Y, the streams after the site, on entry (four values per channel, so it needs no
// second buffer); dpost (T,4) and dcomb (T,4,4) come from hc_deal_backward, everything else from
// the forward. At the head no streams follow: dX is only written; dpost, dcomb, comb are NULL, and
// M is HC.
void hc_enter_backward(act *dX, const real *dx, const real *dpost, const real *dcomb, const act *X,
                       const real *m, const real *r, const real *pre, const real *comb,
                       const real *rstd, const float *fn, const float *base, const float *scale,
                       const bf16 *w, float eps, int T, int C, int M, int iters) {
    GPU(hc_enter_backward_gpu(dX, dx, dpost, dcomb, X, m, r, pre, comb, rstd, fn, base, scale, w,
                              eps, T, C, M, iters))
    const int N = HC * C;
    #pragma omp parallel for
    for (size_t t = 0; t < (size_t)T; t++) {
        const act *X_t = X + t * N;
        const real *pre_t = pre + t * HC, *m_t = m + t * M;
        real u[C], du[C], dpre[HC], dm[HC_MIX], d[N];
        memcpy(du, dx + t * C, sizeof du);
        hc_collapse_row(u, X_t, pre_t, C);
        rmsnorm_row_backward(du, u, rstd[t], w, C);
        // forward: u = sum_i pre[i] X[i]
        for (int i = 0; i < HC; i++) { dpre[i] = dot_act(du, X_t + (size_t)i * C, C); }
        hc_weights_row_backward(dm, dpre, dpost ? dpost + t * HC : NULL,
                                dcomb ? dcomb + t * HC * HC : NULL, m_t, base, scale, eps, M,
                                iters);
        // forward: m = r (fn X), r = (mean X^2 + eps)^(-1/2), so dr/dX = -r^3 X / N and
        // dX = r fn^T dm - (r^2 / N) <m, dm> X. The second term here, the first below.
        real along = r[t] * r[t] / N * dot(m_t, dm, M);
        for (int k = 0; k < N; k++) { d[k] = pre_t[k / C] * du[k % C] - along * ld(X_t + k); }
        // forward: Y[j] = post[j] o + sum_i comb[i][j] X[i]
        for (int ij = 0; comb && ij < HC * HC; ij++) {
            real mix = comb[t * HC * HC + ij], *d_i = d + (size_t)(ij / HC) * C;
            const act *dY_j = dX + t * N + (size_t)(ij % HC) * C;
            for (int c = 0; c < C; c++) { d_i[c] += mix * ld(dY_j + c); }
        }
        for (int i = 0; i < M; i++) {
            for (int k = 0; k < N; k++) { d[k] += r[t] * dm[i] * fn[(size_t)i * N + k]; }
        }
        store_rows(dX + t * N, d, (size_t)N);
    }
}
TWIN(hc_enter_backward)

// Y[j] (T,HC,C) = post[j] o + sum_i comb[i][j] X[i], o (T,C) the sublayer's output; Y may be X. And
// while Y is at hand, m (T,M) and r (T) of the site that it enters, whose projection is fn.
void hc_deal_forward(act *Y, real *m, real *r, const act *o, const act *X, const real *post,
                     const real *comb, const float *fn, float eps, int T, int C, int M) {
    GPU(hc_deal_forward_gpu(Y, m, r, o, X, post, comb, fn, eps, T, C, M))
    #pragma omp parallel for
    for (int t = 0; t < T; t++) {
        const act *o_t = o + (size_t)t * C;
        const real *mix = comb + (size_t)t * HC * HC;
        real x[HC * C];
        load_rows(x, X + (size_t)t * HC * C, (size_t)HC * C);
        for (int j = 0; j < HC; j++) {
            real p = post[(size_t)t * HC + j];
            for (int c = 0; c < C; c++) {
                st(Y + ((size_t)t * HC + j) * C + c, p * ld(o_t + c) +
                   mix[j] * x[c] + mix[HC + j] * x[C + c] +
                   mix[2 * HC + j] * x[2 * C + c] + mix[3 * HC + j] * x[3 * C + c]);
            }
        }
    }
    hc_logits_forward(m, r, Y, fn, eps, T, C, M);
}
TWIN(hc_deal_forward)

// do_ (T,C), dpost (T,4), dcomb (T,4,4) from dY (T,HC,C). What reaches X through the mixing is left
// to hc_enter_backward, which reads dY once more and so need not add to dX.
void hc_deal_backward(act *do_, real *dpost, real *dcomb, const act *dY, const act *o, const act *X,
                      const real *post, int T, int C) {
    GPU(hc_deal_backward_gpu(do_, dpost, dcomb, dY, o, X, post, T, C))
    #pragma omp parallel for
    for (size_t t = 0; t < (size_t)T; t++) {
        const real *p = post + t * HC;
        real d[HC * C];
        load_rows(d, dY + t * HC * C, (size_t)HC * C);
        for (int j = 0; j < HC; j++) {
            // forward: Y[j] = post[j] o + sum_i comb[i][j] X[i]
            dpost[t * HC + j] = dot_act(d + (size_t)j * C, o + t * C, C);
            for (int i = 0; i < HC; i++) {
                dcomb[(t * HC + i) * HC + j] = dot_act(d + (size_t)j * C, X + (t * HC + i) * C, C);
            }
        }
        for (int c = 0; c < C; c++) {
            st(do_ + t * C + c, p[0] * d[c] + p[1] * d[C + c] + p[2] * d[2 * C + c] +
                                p[3] * d[3 * C + c]);
        }
    }
}
TWIN(hc_deal_backward)

// -------------------------------------------------------------------------------------------------
// Part 5: attention
//
// One vector per token is both key and value of all H heads. A query sees
//     the last W tokens of its document (itself included), as they are, and,
//     in layers with a compressor, entries: runs of `ratio` tokens pooled into one vector each.
// HCA layers (ratio 128) attend to all entries that lie wholly in the past; CSA layers (ratio 4,
// runs that overlap) to the `topk` of them that a small indexer scores highest. A sink logit per
// head joins the softmax without a value, so a head may attend to nothing. Source: the report's
// section 2.3.
//
// Documents are packed one after the other without padding; nothing here crosses their borders.

// 5.1 Where the documents of a micro-batch lie. Positions and entries start anew in each.
typedef struct {
    int P;                      // entries of all documents: sum of length / ratio
    int *first_entry;           // (T) first entry of the token's document
    int *token;                 // (P) first token of the run that the entry is of
    int *position;              // (P) that token's position in its document: where RoPE puts it
} Entries;

typedef struct {
    int T, longest;             // tokens; the longest document's
    int *position;              // (T) in its document
    int *end;                   // (T) one past the last token of its document
    Entries of[2];              // of ratio 4, of ratio 128
} Documents;

static inline int entries_of(int ratio) { return ratio == 128; }

// Room for T tokens: on the host, where documents_set fills it, or in the arena, where operations
// read it.
static void documents_alloc(Documents *d, int T, int on_host) {
    #define INTS(n) (on_host ? (int *)host_alloc(sizeof(int) * (size_t)(n)) \
                             : MEM(int, MEM_SCRATCH, n))
    d->position = INTS(T);
    d->end = INTS(T);
    for (int k = 0; k < 2; k++) {
        int most = T / (k ? 128 : 4);
        d->of[k].first_entry = INTS(T);
        d->of[k].token = INTS(most);
        d->of[k].position = INTS(most);
    }
    #undef INTS
}

static void documents_free_host(Documents *d) {
    free(d->position);
    free(d->end);
    for (int k = 0; k < 2; k++) {
        free(d->of[k].first_entry);
        free(d->of[k].token);
        free(d->of[k].position);
    }
}

// d, in the arena, becomes h, on the host.
static void documents_upload(Documents *d, const Documents *h) {
    size_t bytes = sizeof(int) * (size_t)h->T;
    d->T = h->T;
    d->longest = h->longest;
    upload(d->position, h->position, bytes);
    upload(d->end, h->end, bytes);
    for (int k = 0; k < 2; k++) {
        d->of[k].P = h->of[k].P;
        upload(d->of[k].first_entry, h->of[k].first_entry, bytes);
        upload(d->of[k].token, h->of[k].token, sizeof(int) * (size_t)h->of[k].P);
        upload(d->of[k].position, h->of[k].position, sizeof(int) * (size_t)h->of[k].P);
    }
}

// start (n+1): first token of each document, and the end of the last.
static void documents_set(Documents *d, const int *start, int n) {
    d->T = n ? start[n] : 0;
    d->longest = d->of[0].P = d->of[1].P = 0;
    for (int i = 0; i < n; i++) {
        int length = start[i + 1] - start[i];
        if (length > d->longest) { d->longest = length; }
        for (int k = 0; k < 2; k++) {
            Entries *e = &d->of[k];
            int ratio = k ? 128 : 4, first = e->P;
            for (int t = start[i]; t < start[i + 1]; t++) { e->first_entry[t] = first; }
            for (int p = 0; p < length / ratio; p++, e->P++) {      // a shorter tail makes no entry
                e->token[e->P] = start[i] + p * ratio;
                e->position[e->P] = p * ratio;
            }
        }
        for (int t = start[i]; t < start[i + 1]; t++) {
            d->position[t] = t - start[i];
            d->end[t] = start[i + 1];
        }
    }
}

// Entries that token t sees: those whose last token is not after t.
static inline int visible_entries(const AttentionShape *s, int t) {
    return s->ratio ? (s->position[t] + 1) / s->ratio : 0;
}

static inline int window_start(const AttentionShape *s, int t) {
    return t - (s->position[t] < s->W - 1 ? s->position[t] : s->W - 1);
}

// -------------------------------------------------------------------------------------------------
// 5.2 The compressor: a softmax over the tokens of a run, for each channel by itself
//
//     entry[ch] = sum_s a_s[ch] K_s[ch],   a = softmax over s of (Z_s[ch] + ape[s][ch])
//
// with K = wkv x and Z = wgate x. HCA: the run is the entry's 128 tokens. CSA: eight slots; the
// first four are the run BEFORE it, seen through the first half of the channels of wkv and wgate,
// the others its own four through the second half. A document's first entry has no run before it.

// The row (of K, Z: T rows of halves*D) and first channel behind slot s of the entry; -1: empty.
static inline int pool_slot(const AttentionShape *a, const int *entry_position, int p, int s,
                            int *channel, int D) {
    if (halves(a->ratio) == 1) {
        *channel = 0;
        return a->token[p] + s;
    }
    *channel = s < a->ratio ? 0 : D;
    if (s < a->ratio && entry_position[p] == 0) { return -1; }
    return a->token[p] + s - a->ratio;
}

// weight (slots, D): the softmax of entry p. The maximum is taken out first, as always.
static inline void pool_weights(real *weight, const AttentionShape *a, const int *entry_position,
                                const real *Z, const float *ape, int p, int D) {
    int n = halves(a->ratio), slots = n * a->ratio, channel;
    real max[D], sum[D];
    for (int d = 0; d < D; d++) { max[d] = -INFINITY; sum[d] = 0; }
    for (int s = 0; s < slots; s++) {
        int row = pool_slot(a, entry_position, p, s, &channel, D);
        for (int d = 0; d < D; d++) {
            real z = row < 0 ? -INFINITY : Z[(size_t)row * n * D + channel + d] +
                                           ape[(size_t)(s % a->ratio) * n * D + channel + d];
            weight[(size_t)s * D + d] = z;
            max[d] = fmax(max[d], z);
        }
    }
    for (int s = 0; s < slots; s++) {
        for (int d = 0; d < D; d++) {
            weight[(size_t)s * D + d] = exp(weight[(size_t)s * D + d] - max[d]);
            sum[d] += weight[(size_t)s * D + d];
        }
    }
    for (int s = 0; s < slots; s++) {
        for (int d = 0; d < D; d++) { weight[(size_t)s * D + d] /= sum[d]; }
    }
}

// Entry p: weight (slots, D), as above, and y (D) = sum_s weight_s K_s.
static inline void pool_entry(real *y, real *weight, const AttentionShape *a,
                              const int *entry_position, const real *K, const real *Z,
                              const float *ape, int p, int D) {
    int n = halves(a->ratio), channel;
    memset(y, 0, sizeof *y * (size_t)D);
    pool_weights(weight, a, entry_position, Z, ape, p, D);
    for (int s = 0; s < n * a->ratio; s++) {
        int row = pool_slot(a, entry_position, p, s, &channel, D);
        for (int d = 0; row >= 0 && d < D; d++) {
            y[d] += weight[(size_t)s * D + d] * K[(size_t)row * n * D + channel + d];
        }
    }
}

// out (P,D) from K, Z (T,halves*D) and ape (ratio,halves*D).
void pool_forward(act *out, const real *K, const real *Z, const float *ape, AttentionShape a,
                  const int *entry_position, int D) {
    GPU(pool_forward_gpu(out, K, Z, ape, a, entry_position, D))
    int slots = halves(a.ratio) * a.ratio;
    #pragma omp parallel for
    for (int p = 0; p < a.P; p++) {
        real *weight = host_alloc(sizeof(real) * (size_t)slots * D), y[D];
        pool_entry(y, weight, &a, entry_position, K, Z, ape, p, D);
        store_rows(out + (size_t)p * D, y, (size_t)D);
        free(weight);
    }
}
TWIN(pool_forward)

// dK, dZ (T,halves*D) = from dout (P,D). A token's first half is read by the next entry and its
// second by its own, so no two entries write the same element; what none reads gets zero.
void pool_backward(real *dK, real *dZ, const act *dout, const real *K, const real *Z,
                   const float *ape, AttentionShape a, const int *entry_position, int D) {
    GPU(pool_backward_gpu(dK, dZ, dout, K, Z, ape, a, entry_position, D))
    int n = halves(a.ratio), slots = n * a.ratio;
    memset(dK, 0, sizeof(real) * (size_t)a.T * n * D);
    memset(dZ, 0, sizeof(real) * (size_t)a.T * n * D);
    #pragma omp parallel for
    for (int p = 0; p < a.P; p++) {
        real *weight = host_alloc(sizeof(real) * (size_t)slots * D), y[D], dy[D];
        int channel;
        load_rows(dy, dout + (size_t)p * D, (size_t)D);
        pool_entry(y, weight, &a, entry_position, K, Z, ape, p, D);
        for (int s = 0; s < slots; s++) {
            int row = pool_slot(&a, entry_position, p, s, &channel, D);
            if (row < 0) { continue; }
            for (int d = 0; d < D; d++) {
                // forward: y = sum_s w_s K_s, w = softmax_s(Z_s + ape_s), so dK_s = w_s dy and
                // dZ_s = w_s (dy K_s - sum_r w_r dy K_r) = dK_s (K_s - y)
                size_t at = (size_t)row * n * D + channel + d;
                dK[at] = weight[(size_t)s * D + d] * dy[d];
                dZ[at] = dK[at] * (K[at] - y[d]);
            }
        }
        free(weight);
    }
}
TWIN(pool_backward)

// -------------------------------------------------------------------------------------------------
// 5.3 The indexer: which entries a query of a CSA layer attends to
//
//     score[t][p] = sum_h w[t][h] relu(<q[t][h], k[p]>)
//
// It has its own queries (from the same low-rank vector), its own compressor for k, and heads'
// weights w from x. Only the membership of the topk set leaves it, so it has no gradient. The
// released code turns q and k by a Hadamard matrix and rounds them to fp4; the rotation alone
// changes no score, and the rounding is left out, as in other trainers.

// selected (T,topk): entries of the highest scores among the visible, ascending, -1 after the last.
// Equal scores: the smaller entry. q (T,heads,dim), k (P,dim), w (T,heads).
void indexer_select(int *selected, const act *q, const act *k, const real *w, AttentionShape a,
                    int heads, int dim) {
    GPU(indexer_select_gpu(selected, q, k, w, a, heads, dim))
    #pragma omp parallel for schedule(dynamic, 8)
    for (int t = 0; t < a.T; t++) {
        int visible = visible_entries(&a, t), first = a.first_entry[t];
        int *chosen = selected + (size_t)t * a.topk, n = visible < a.topk ? visible : a.topk;
        if (visible <= a.topk) {
            for (int i = 0; i < a.topk; i++) { chosen[i] = i < n ? first + i : -1; }
            continue;
        }
        real *score = host_calloc(sizeof(real) * (size_t)visible), q_h[dim];
        for (int h = 0; h < heads; h++) {
            load_rows(q_h, q + ((size_t)t * heads + h) * dim, (size_t)dim);
            for (int p = 0; p < visible; p++) {
                real s = dot_act(q_h, k + (size_t)(first + p) * dim, dim);
                if (s > 0) { score[p] += w[(size_t)t * heads + h] * s; }
            }
        }
        // The highest are taken one by one, and marked. The kernel is quicker about it, this is the
        // definition.
        unsigned char *taken = host_calloc((size_t)visible);
        for (int i = 0; i < a.topk; i++) {
            int best = -1;
            for (int p = 0; p < visible; p++) {
                if (!taken[p] && (best < 0 || score[p] > score[best])) { best = p; }
            }
            taken[best] = 1;
        }
        for (int p = 0, i = 0; p < visible; p++) {
            if (taken[p]) { chosen[i++] = first + p; }
        }
        free(taken);
        free(score);
    }
}
TWIN(indexer_select)

// -------------------------------------------------------------------------------------------------
// 5.4 The core: one softmax over window, entries and sink
//
//     l_k = <q, key_k> / sqrt(D)
//     p_k = exp(l_k) / (sum_k exp(l_k) + exp(sink))
//     o   = sum_k p_k key_k

// The i-th entry that token t attends to; -1 past the last.
static inline int attended_entry(const AttentionShape *a, const int *selected, int t, int i) {
    if (selected) { return i < a->topk ? selected[(size_t)t * a->topk + i] : -1; }
    return i < visible_entries(a, t) ? a->first_entry[t] + i : -1;
}

// Fills key with the rows that token t attends to and returns their number.
static inline int attended_keys(const act **key, const AttentionShape *a, const act *kv,
                                const act *entries, const int *selected, int t) {
    int n = 0;
    for (int j = window_start(a, t); j <= t; j++) { key[n++] = kv + (size_t)j * a->D; }
    for (int i = 0, e; (e = attended_entry(a, selected, t, i)) >= 0; i++) {
        key[n++] = entries + (size_t)e * a->D;
    }
    return n;
}

static inline int most_keys(const AttentionShape *a, const int *selected) {
    return min_int(a->W, a->T) + (selected ? a->topk : a->P);
}

// out (T,H,D) and lse (T,H), the log of the softmax's denominator, sink included; from q (T,H,D),
// kv (T,D), entries (P,D), sink (H), selected (T,topk) or NULL for all visible entries.
void attention_forward(act *out, real *lse, const act *q, const act *kv, const act *entries,
                       const float *sink, const int *selected, AttentionShape a) {
    GPU(attention_forward_gpu(out, lse, q, kv, entries, sink, selected, a))
    const real scale = 1 / sqrt((real)a.D);
    #pragma omp parallel for schedule(dynamic, 8)
    for (int t = 0; t < a.T; t++) {
        const act **key = host_alloc(sizeof *key * (size_t)most_keys(&a, selected));
        real *l = host_alloc(sizeof(real) * (size_t)most_keys(&a, selected)), q_h[a.D], o[a.D];
        int n = attended_keys(key, &a, kv, entries, selected, t);
        for (int h = 0; h < a.H; h++) {
            size_t row = (size_t)t * a.H + h;
            load_rows(q_h, q + row * a.D, (size_t)a.D);
            real max = sink[h], sum;
            for (int k = 0; k < n; k++) {
                l[k] = scale * dot_act(q_h, key[k], a.D);
                max = fmax(max, l[k]);
            }
            sum = exp(sink[h] - max);           // the sink takes its share and gives nothing
            memset(o, 0, sizeof o);
            for (int k = 0; k < n; k++) {
                real e = exp(l[k] - max);
                sum += e;
                for (int d = 0; d < a.D; d++) { o[d] += e * ld(key[k] + d); }
            }
            for (int d = 0; d < a.D; d++) { o[d] /= sum; }
            store_rows(out + row * a.D, o, (size_t)a.D);
            lse[row] = max + log(sum);
        }
        free(l);
        free(key);
    }
}
TWIN(attention_forward)

// delta (T,H) = <dout, out>, the part of the softmax's backward that is the same for every key.
void attention_delta(real *delta, const act *dout, const act *out, int T, int H, int D) {
    GPU(attention_delta_gpu(delta, dout, out, T, H, D))
    #pragma omp parallel for
    for (int row = 0; row < T * H; row++) {
        real d[D];
        load_rows(d, dout + (size_t)row * D, (size_t)D);
        delta[row] = dot_act(d, out + (size_t)row * D, D);
    }
}
TWIN(attention_delta)

// dq (T,H,D) =. Each query visits the keys it saw.
void attention_backward_query(act *dq, const act *dout, const real *delta, const real *lse,
                              const act *q, const act *kv, const act *entries, const int *selected,
                              AttentionShape a) {
    GPU(attention_backward_query_gpu(dq, dout, delta, lse, q, kv, entries, selected, a))
    const real scale = 1 / sqrt((real)a.D);
    #pragma omp parallel for schedule(dynamic, 8)
    for (int t = 0; t < a.T; t++) {
        const act **key = host_alloc(sizeof *key * (size_t)most_keys(&a, selected));
        real q_h[a.D], do_h[a.D], dq_h[a.D];
        int n = attended_keys(key, &a, kv, entries, selected, t);
        for (int h = 0; h < a.H; h++) {
            size_t row = (size_t)t * a.H + h;
            load_rows(q_h, q + row * a.D, (size_t)a.D);
            load_rows(do_h, dout + row * a.D, (size_t)a.D);
            memset(dq_h, 0, sizeof dq_h);
            for (int k = 0; k < n; k++) {
                // forward: l = scale <q, key>, p = exp(l - lse), o = sum_k p key. So dp is
                // <do, key>, and the softmax makes dl = p (dp - sum_k p dp) = p (dp - <do, o>).
                real p = exp(scale * dot_act(q_h, key[k], a.D) - lse[row]);
                real dl = p * (dot_act(do_h, key[k], a.D) - delta[row]);
                for (int d = 0; d < a.D; d++) { dq_h[d] += scale * dl * ld(key[k] + d); }
            }
            store_rows(dq + row * a.D, dq_h, (size_t)a.D);
        }
        free(key);
    }
}
TWIN(attention_backward_query)

// What token t's queries say of one key: dkey (D) += over the heads.
static inline void key_gradient(real *dkey, const real *key, const act *dout, const real *delta,
                                const real *lse, const act *q, int t, const AttentionShape *a) {
    const real scale = 1 / sqrt((real)a->D);
    for (int h = 0; h < a->H; h++) {
        // forward: the vector is key (l = scale <q, key>) and value (o += p key) at once
        size_t row = (size_t)t * a->H + h;
        const act *q_h = q + row * a->D, *do_h = dout + row * a->D;
        real p = exp(scale * dot_act(key, q_h, a->D) - lse[row]);
        real dl = p * (dot_act(key, do_h, a->D) - delta[row]);
        for (int d = 0; d < a->D; d++) { dkey[d] += scale * dl * ld(q_h + d) + p * ld(do_h + d); }
    }
}

// Whether token t attends to entry e, by bisection in its ascending list.
static inline int is_selected(const int *selected, const AttentionShape *a, int t, int e) {
    const int *list = selected + (size_t)t * a->topk;
    int low = 0, high = a->topk;
    while (low < high) {
        int middle = (low + high) / 2;
        if (list[middle] >= 0 && list[middle] < e) { low = middle + 1; } else { high = middle; }
    }
    return low < a->topk && list[low] == e;
}

// dkv (T,D) =, dentries (P,D) =. The other way round: each key visits the queries that saw it, so
// its gradient has one owner and one order of summation.
void attention_backward_key(real *dkv, real *dentries, const act *dout, const real *delta,
                            const real *lse, const act *q, const act *kv, const act *entries,
                            const int *selected, AttentionShape a) {
    GPU(attention_backward_key_gpu(dkv, dentries, dout, delta, lse, q, kv, entries, selected, a))
    #pragma omp parallel for schedule(dynamic, 8)
    for (int j = 0; j < a.T + a.P; j++) {
        int e = j - a.T;                        // rows first, then entries
        real key[a.D], *dkey = e < 0 ? dkv + (size_t)j * a.D : dentries + (size_t)e * a.D;
        load_rows(key, e < 0 ? kv + (size_t)j * a.D : entries + (size_t)e * a.D, (size_t)a.D);
        memset(dkey, 0, sizeof key);
        // A row is seen from itself on for W tokens, an entry from its last token on.
        int first = e < 0 ? j : a.token[e] + a.ratio - 1, end = a.end[first];
        if (e < 0 && end > j + a.W) { end = j + a.W; }
        for (int t = first; t < end; t++) {
            if (e >= 0 && selected && !is_selected(selected, &a, t, e)) { continue; }
            key_gradient(dkey, key, dout, delta, lse, q, t, &a);
        }
    }
}
TWIN(attention_backward_key)

// -------------------------------------------------------------------------------------------------
// 5.5 The output: heads fall into G groups, each with its own matrix, then one matrix joins them
//
//     v_g = wo_a[g] o_g     (O of every group; o_g are its H/G heads side by side)
//     a   = wo_b [v_0 .. v_G-1]

// v (T,G,O) from o (T,G,N), N = H*D/G; wo_a (G*O,N) fp8.
void group_output_forward(act *v, const act *o, const uint8_t *w, const uint8_t *scale, int T,
                          int G, int N, int O) {
    GPU(group_output_forward_gpu(v, o, w, scale, T, G, N, O))
    int tile = tile_rows(T, N + O);
    #pragma omp parallel for collapse(2)
    for (int g = 0; g < G; g++) {
        for (int first = 0; first < T; first += tile) {
            int n = T - first < tile ? T - first : tile;
            real *x = host_alloc(sizeof(real) * (size_t)n * N);
            real *y = host_alloc(sizeof(real) * (size_t)n * O);
            for (int t = 0; t < n; t++) {
                load_rows(x + (size_t)t * N, o + ((size_t)(first + t) * G + g) * N, (size_t)N);
            }
            frozen_forward(y, x, (Frozen){ w, scale, widen_fp8 }, (size_t)g * O, n, N, O);
            for (int t = 0; t < n; t++) {
                store_rows(v + ((size_t)(first + t) * G + g) * O, y + (size_t)t * O, (size_t)O);
            }
            free(y);
            free(x);
        }
    }
}
TWIN(group_output_forward)

// do_ (T,G,N) = from dv (T,G,O): do_g = wo_a[g]^T dv_g.
void group_output_backward(act *do_, const real *dv, const uint8_t *w, const uint8_t *scale, int T,
                           int G, int N, int O) {
    GPU(group_output_backward_gpu(do_, dv, w, scale, T, G, N, O))
    int tile = tile_rows(T, N + O);
    #pragma omp parallel for collapse(2)
    for (int g = 0; g < G; g++) {
        for (int first = 0; first < T; first += tile) {
            int n = T - first < tile ? T - first : tile;
            real *dx = host_calloc(sizeof(real) * (size_t)n * N);
            real *dy = host_alloc(sizeof(real) * (size_t)n * O);
            for (int t = 0; t < n; t++) {
                memcpy(dy + (size_t)t * O, dv + ((size_t)(first + t) * G + g) * O,
                       sizeof(real) * (size_t)O);
            }
            frozen_backward(dx, dy, (Frozen){ w, scale, widen_fp8 }, (size_t)g * O, n, N, O);
            for (int t = 0; t < n; t++) {
                store_rows(do_ + ((size_t)(first + t) * G + g) * N, dx + (size_t)t * N, (size_t)N);
            }
            free(dy);
            free(dx);
        }
    }
}
TWIN(group_output_backward)

// -------------------------------------------------------------------------------------------------
// Part 6: one layer: forward, recompute, backward

// What the mixing of one site leaves for the backward. All (T, ..).
typedef struct {
    real *m, *r;                // (T,24), (T): hc_logits; an attention site's are LayerSaved's
    real *pre, *post, *comb;    // (T,4), (T,4), (T,4,4)
    act *x;                     // (T,C) the sublayer's input: streams, collapsed and normalised
    real *rstd;                 // (T)
} Site;

// What one layer leaves for its own backward. One set for all layers with --recompute full.
typedef struct {
    Site attn, ffn;
    act *cq_raw, *cq;           // (T,Q) low-rank query, before and after its norm
    act *q;                     // (T,H,D) after norm and RoPE, which work in place
    act *kv_raw, *kv;           // (T,D) before and after; key and value at once
    real *cq_rstd, *q_rstd, *kv_rstd, *entry_rstd;      // (T), (T,H), (T), (P)
    real *K, *Z;                // (T,halves*D) the compressor's projections
    act *pooled, *entries;      // (P,D) before and after norm and RoPE
    act *o;                     // (T,H,D) attention output, turned back to position 0
    real *lse;                  // (T,H)
    act *v, *a;                 // (T,G*O), (T,C): group outputs; the sublayer's output
    act *X_mid;                 // (T,HC,C) streams between the two sites; if they need not be
                                // kept they lie where the layer's output goes
    real *uq_a, *uq_b, *ukv, *uo_b;     // (T,R) adapters' A x
} LayerActs;

// What every layer keeps from forward to backward.
typedef struct {
    act *X;                     // (T,HC,C) the layer's input
    real *m, *r;                // (T,24), (T) hc_logits of it, made where X was
    act *f;                     // (T,C) output of the experts: needed for dpost, dear to recompute
    MoeSaved moe;
    int *selected;              // (T,topk) the indexer's choice; NULL if all entries always fit
} LayerSaved;

// Buffers of the backward pass, and of the indexer.
typedef struct {
    act *dX;                    // (T,HC,C) gradient of the streams, from site to site
    act *dout;                  // (T,C) of a sublayer's output
    real *dx;                   // (T,C) of a sublayer's input, before the norm's backward
    real *dpost, *dcomb;        // (T,4), (T,4,4)
    real *dv;                   // (T,G*O)
    act *do_;                   // (T,H,D)
    real *delta;                // (T,H)
    real *dkv, *dentries;       // (T,D), (P,D)
    act *dkv_raw, *dpooled;
    real *dK, *dZ;
    real *dcq;                  // (T,Q)
    act *dcq_raw;
} Gradients;

typedef struct {
    real *K, *Z, *rstd, *w;     // (T,halves*dim) x 2, (P), (T,heads)
    act *pooled, *keys, *q;     // (P,dim) x 2, (T,heads,dim)
} IndexScratch;

// What the backward pass computes again: nothing, the experts' hidden rows, or the whole layer from
// its input.
enum { RECOMPUTE_NONE, RECOMPUTE_MOE, RECOMPUTE_FULL };

typedef struct {
    int R;                      // adapter rank
    float alpha;
    unsigned targets;           // bits TARGET_*
    int max_tokens;             // of a micro-batch or a sample
    int recompute;              // RECOMPUTE_*
    int muon;                   // as in Adapters
    int fp8;                    // experts' products, and rows on their way to them
    int training;               // 0: forward only, for evaluation
    uint64_t seed;              // of the random base and the adapters' start
    int offload;                // the inputs of so many layers wait in host memory
} ModelOptions;

typedef struct Model {
    Config config;
    ModelOptions options;
    // Where ranks share matrices (dev/engine.c), how wo_b and the experts are computed; else NULL.
    void (*join)(struct Model *m, const Layer *l, LayerActs *a);
    void (*experts)(struct Model *m, int layer, const act *x, const int *token);
    Globals globals;
    Layer *layer;               // (layers)
    Tensor *tensors;            // the checkpoint's tensors, with their places
    size_t n_tensors;
    Adapters adapters;
    MoeDims moe;
    MoeScratch moe_scratch;
    long *expert_count;         // (layers,E) rows per expert since the caller last cleared it
    real *rope[2];              // (max_tokens, rope_dim/2, 2): window layers, compressed layers
    Documents documents, documents_h;   // of the micro-batch; _h: on the host
    int *token, *target;        // (max_tokens) of the micro-batch, where operations read them
    LayerActs *acts;            // (layers), or (1)
    LayerSaved *saved;          // (layers); X of the last layer's output is X_out
    act *X_out;                 // (T,HC,C)
    act **X_host;               // (offload) of (T,HC,C): X of the first layers, on the host
    IndexScratch index;
    Gradients grad;
    Site head;                  // of part 7: m (T,4), r, pre, x, rstd
    real *loss, *loss_h;        // (T); its copy on the host
    real *dhead;                // (T,C) gradient of the loss's sum by the head's input
    real *logits;               // (V) of one token, for sampling
} Model;

// One micro-batch: whole documents, one after the other, no padding.
typedef struct {
    int T, docs;                // both may be 0: a rank with no rows left
    int *token;                 // (T)
    int *target;                // (T) id of the next token where it is a label, else -1
    int *doc_start;             // (docs+1) first token of each document; the last is T
} Batch;

static AttentionShape attention_shape(const Model *m, int layer) {
    const Config *c = &m->config;
    const Documents *d = &m->documents;
    int ratio = c->ratio[layer];
    const Entries *e = &d->of[entries_of(ratio)];
    return (AttentionShape){
        .T = d->T, .P = ratio ? e->P : 0, .H = c->H, .D = c->D, .W = c->window, .ratio = ratio,
        .topk = c->index_topk, .position = d->position, .end = d->end,
        .first_entry = e->first_entry, .token = e->token,
    };
}

// Streams -> mixing weights -> the sublayer's normalised input. s->m is there: whoever wrote X made
// it.
static void site_enter(Site *s, const act *X, HyperConnection hc, const bf16 *norm,
                       const Config *c, int T) {
    phase(PHASE_STREAMS);
    hc_weights_forward(s->pre, s->post, s->comb, s->m, hc.base, hc.scale, c->hc_eps, T, HC_MIX,
                       c->hc_iters);
    hc_enter_forward(s->x, s->rstd, X, s->pre, norm, c->norm_eps, T, c->C);
}

// The gradient of a sublayer's input, grad->dx, back into the streams: grad->dX, gradient of the
// streams behind the site, becomes that of those before it. dpost and dcomb are in place already.
static void site_leave_backward(Model *m, const Site *s, const act *X, HyperConnection hc,
                                const bf16 *norm) {
    const Config *c = &m->config;
    Gradients *g = &m->grad;
    phase(PHASE_STREAMS);
    hc_enter_backward(g->dX, g->dx, g->dpost, g->dcomb, X, s->m, s->r, s->pre, s->comb, s->rstd,
                      hc.fn, hc.base, hc.scale, norm, c->hc_eps, m->documents.T, c->C, HC_MIX,
                      c->hc_iters);
}

// The entries of one layer: keys pooled from x.
static void entries_forward(LayerActs *a, const Model *m, const Layer *l, AttentionShape shape) {
    const Config *c = &m->config;
    const int *position = m->documents.of[entries_of(shape.ratio)].position;
    int N = halves(shape.ratio) * c->D;
    phase(PHASE_ENTRIES);
    linear_bf16_forward(a->K, a->attn.x, l->pool.wkv, shape.T, c->C, N);
    linear_bf16_forward(a->Z, a->attn.x, l->pool.wgate, shape.T, c->C, N);
    pool_forward(a->pooled, a->K, a->Z, l->pool.ape, shape, position, c->D);
    norm_rope_forward(a->entries, a->entry_rstd, a->pooled, l->pool.norm, m->rope[1], position,
                      c->norm_eps, shape.P, 1, c->D, c->rope_dim);
}

// The indexer's choice for every token of a CSA layer, from x and the low-rank query.
static void indexer_forward(int *selected, Model *m, const Layer *l, const LayerActs *a,
                            AttentionShape shape) {
    const Config *c = &m->config;
    const int *position = m->documents.of[entries_of(shape.ratio)].position;
    IndexScratch *s = &m->index;
    int heads = c->index_heads, dim = c->index_dim, N = halves(shape.ratio) * dim;
    phase(PHASE_INDEXER);
    linear_bf16_forward(s->K, a->attn.x, l->index_pool.wkv, shape.T, c->C, N);
    linear_bf16_forward(s->Z, a->attn.x, l->index_pool.wgate, shape.T, c->C, N);
    pool_forward(s->pooled, s->K, s->Z, l->index_pool.ape, shape, position, dim);
    norm_rope_forward(s->keys, s->rstd, s->pooled, l->index_pool.norm, m->rope[1], position,
                      c->norm_eps, shape.P, 1, dim, c->rope_dim);
    linear_fp8_forward(s->q, a->cq, l->index_wq, l->index_sq, shape.T, c->Q, heads * dim);
    rope_apply(s->q, m->rope[1], shape.position, 1, shape.T, heads, dim, c->rope_dim);
    linear_bf16_forward(s->w, a->attn.x, l->index_weights, shape.T, c->C, heads);
    indexer_select(selected, s->q, s->keys, s->w, shape, heads, dim);
}

// Whether some document of the micro-batch has more entries than the indexer selects. If none has,
// every visible entry is attended to and the indexer need not run.
static int indexer_matters(const Model *m, const LayerSaved *s, int layer) {
    return m->config.ratio[layer] == 4 && s->selected != NULL
        && m->documents.longest / 4 > m->config.index_topk;
}

// The attention sublayer of layer i: a->a from the streams X. again: the backward's recompute,
// which takes the indexer's choice from the forward.
static void attention_sublayer(Model *m, int i, LayerActs *a, int again) {
    const Config *c = &m->config;
    const Layer *l = &m->layer[i];
    LayerSaved *saved = &m->saved[i];
    AttentionShape shape = attention_shape(m, i);
    const real *rope = m->rope[shape.ratio > 0];
    float scale = m->adapters.scale;
    int T = shape.T, R = m->options.R, N = c->H * c->D;
    const act *x = a->attn.x;

    phase(PHASE_PRODUCTS);
    lora_linear_forward(a->cq_raw, a->uq_a, x, l->wq_a, l->sq_a, l->lq_a.a, l->lq_a.b, scale,
                        T, c->C, c->Q, R);
    rmsnorm_forward(a->cq, a->cq_rstd, a->cq_raw, l->q_norm, c->norm_eps, T, c->Q);
    lora_linear_forward(a->q, a->uq_b, a->cq, l->wq_b, l->sq_b, l->lq_b.a, l->lq_b.b, scale,
                        T, c->Q, N, R);
    norm_rope_forward(a->q, a->q_rstd, a->q, NULL, rope, shape.position, c->norm_eps, T, c->H, c->D,
                      c->rope_dim);
    lora_linear_forward(a->kv_raw, a->ukv, x, l->wkv, l->skv, l->lkv.a, l->lkv.b, scale,
                        T, c->C, c->D, R);
    norm_rope_forward(a->kv, a->kv_rstd, a->kv_raw, l->kv_norm, rope, shape.position, c->norm_eps,
                      T, 1, c->D, c->rope_dim);
    if (shape.ratio) { entries_forward(a, m, l, shape); }
    int indexed = indexer_matters(m, saved, i);
    if (indexed && !again) { indexer_forward(saved->selected, m, l, a, shape); }
    phase(PHASE_ATTENTION);
    attention_forward(a->o, a->lse, a->q, a->kv, a->entries, l->sink,
                      indexed ? saved->selected : NULL, shape);
    phase(PHASE_PRODUCTS);
    // Values carry the rotation of their own position; turned back by the query's, what is left
    // depends on the distance alone.
    rope_apply(a->o, rope, shape.position, -1, T, c->H, c->D, c->rope_dim);
    group_output_forward(a->v, a->o, l->wo_a, l->so_a, T, c->G, N / c->G, c->O);
    if (m->join) { m->join(m, l, a); return; }
    lora_linear_forward(a->a, a->uo_b, a->v, l->wo_b, l->so_b, l->lo_b.a, l->lo_b.b, scale,
                        T, c->G * c->O, c->C, R);
}

// From the layer's input to the experts' input.
static void layer_first_half(Model *m, int i, LayerActs *a, int again) {
    const Config *c = &m->config;
    const Layer *l = &m->layer[i];
    const act *X = m->saved[i].X;
    int T = m->documents.T;
    site_enter(&a->attn, X, l->hc_attn, l->attn_norm, c, T);
    attention_sublayer(m, i, a, again);
    phase(PHASE_STREAMS);
    hc_deal_forward(a->X_mid, a->ffn.m, a->ffn.r, a->a, X, a->attn.post, a->attn.comb, l->hc_ffn.fn,
                    c->norm_eps, T, c->C, HC_MIX);
    site_enter(&a->ffn, a->X_mid, l->hc_ffn, l->ffn_norm, c, T);
}

// Where layer i's output goes: the next layer's input.
static inline act *layer_output(const Model *m, int i) {
    return i + 1 < m->config.layers ? m->saved[i + 1].X : m->X_out;
}

// The activations of layer i: its own, or those that all layers share.
static inline LayerActs *layer_acts(Model *m, int i) {
    int full = m->options.recompute == RECOMPUTE_FULL;
    LayerActs *a = full ? m->acts : &m->acts[i];
    if (full) { a->X_mid = layer_output(m, i); }
    a->attn.m = m->saved[i].m;
    a->attn.r = m->saved[i].r;
    return a;
}

// Whether the experts' input is kept as codes only (moe.c, x8). The shared expert's backward reads
// it in full: it is made once more, from streams that are kept anyway, in one place for all layers.
static inline int experts_input_again(const Model *m) {
    return m->moe.fp8 && m->options.recompute != RECOMPUTE_FULL;
}

// layer_output(i) (T,HC,C) from saved[i].X and its m; and the m of the next layer, or of the head.
static void layer_forward(Model *m, int i, const int *token) {
    const Config *c = &m->config;
    int last = i + 1 == c->layers;
    HyperConnection next = last ? m->globals.hc_head : m->layer[i + 1].hc_attn;
    real *next_m = last ? m->head.m : m->saved[i + 1].m;
    real *next_r = last ? m->head.r : m->saved[i + 1].r;
    LayerActs *a = layer_acts(m, i);
    LayerSaved *s = &m->saved[i];
    int T = m->documents.T;
    layer_first_half(m, i, a, 0);
    if (m->experts) { m->experts(m, i, a->ffn.x, token); }
    else { moe_forward(s->f, &s->moe, a->ffn.x, token, &m->layer[i].moe, &m->moe, &m->moe_scratch,
                       m->expert_count + (size_t)i * c->E, T); }
    phase(PHASE_STREAMS);
    hc_deal_forward(layer_output(m, i), next_m, next_r, s->f, a->X_mid, a->ffn.post, a->ffn.comb,
                    next.fn, c->norm_eps, T, c->C, last ? HC : HC_MIX);
}

// From g->dentries to dx: the compressor's backward.
static void entries_backward(Model *m, const Layer *l, const LayerActs *a, AttentionShape shape) {
    const Config *c = &m->config;
    const int *position = m->documents.of[entries_of(shape.ratio)].position;
    Gradients *g = &m->grad;
    int N = halves(shape.ratio) * c->D;
    phase(PHASE_ENTRIES);
    key_norm_rope_backward(g->dpooled, g->dentries, a->pooled, a->entry_rstd, l->pool.norm,
                           m->rope[1], position, shape.P, c->D, c->rope_dim);
    pool_backward(g->dK, g->dZ, g->dpooled, a->K, a->Z, l->pool.ape, shape, position, c->D);
    linear_bf16_backward(g->dx, g->dK, l->pool.wkv, shape.T, c->C, N);
    linear_bf16_backward(g->dx, g->dZ, l->pool.wgate, shape.T, c->C, N);
}

// The attention sublayer's backward: g->dx (T,C) += from g->dout (T,C). Passes in reverse order.
static void attention_sublayer_backward(Model *m, int i, const LayerActs *a) {
    const Config *c = &m->config;
    const Layer *l = &m->layer[i];
    Gradients *g = &m->grad;
    AttentionShape shape = attention_shape(m, i);
    const real *rope = m->rope[shape.ratio > 0];
    const int *selected = indexer_matters(m, &m->saved[i], i) ? m->saved[i].selected : NULL;
    float scale = m->adapters.scale;
    int T = shape.T, R = m->options.R, N = c->H * c->D;

    phase(PHASE_PRODUCTS);
    zero(g->dv, sizeof(real) * (size_t)T * c->G * c->O);
    lora_linear_backward(g->dv, l->lo_b.da, l->lo_b.db, g->dout, a->v, a->uo_b, l->wo_b, l->so_b,
                         l->lo_b.a, l->lo_b.b, scale, T, c->G * c->O, c->C, R);
    group_output_backward(g->do_, g->dv, l->wo_a, l->so_a, T, c->G, N / c->G, c->O);
    phase(PHASE_ATTENTION);
    // <do, o> does not change when both are turned, so it is taken while both are turned back.
    attention_delta(g->delta, g->do_, a->o, T, c->H, c->D);
    act *dq = a->o;                         // o has done its work
    rope_apply(g->do_, rope, shape.position, 1, T, c->H, c->D, c->rope_dim);
    attention_backward_query(dq, g->do_, g->delta, a->lse, a->q, a->kv, a->entries, selected,
                             shape);
    attention_backward_key(g->dkv, g->dentries, g->do_, g->delta, a->lse, a->q, a->kv, a->entries,
                           selected, shape);

    phase(PHASE_PRODUCTS);
    norm_rope_backward(dq, dq, a->q, a->q_rstd, rope, shape.position, T, c->H, c->D, c->rope_dim);
    zero(g->dcq, sizeof(real) * (size_t)T * c->Q);
    lora_linear_backward(g->dcq, l->lq_b.da, l->lq_b.db, dq, a->cq, a->uq_b, l->wq_b, l->sq_b,
                         l->lq_b.a, l->lq_b.b, scale, T, c->Q, N, R);
    rmsnorm_backward(g->dcq_raw, g->dcq, a->cq_raw, a->cq_rstd, l->q_norm, T, c->Q);
    lora_linear_backward(g->dx, l->lq_a.da, l->lq_a.db, g->dcq_raw, a->attn.x, a->uq_a, l->wq_a,
                         l->sq_a, l->lq_a.a, l->lq_a.b, scale, T, c->C, c->Q, R);
    key_norm_rope_backward(g->dkv_raw, g->dkv, a->kv_raw, a->kv_rstd, l->kv_norm, rope,
                           shape.position, T, c->D, c->rope_dim);
    lora_linear_backward(g->dx, l->lkv.da, l->lkv.db, g->dkv_raw, a->attn.x, a->ukv, l->wkv, l->skv,
                         l->lkv.a, l->lkv.b, scale, T, c->C, c->D, R);
    if (shape.ratio) { entries_backward(m, l, a, shape); }
}

// g->dX: gradient of the layer's output in, of its input out. The first half of the layer is run
// again unless it was kept; its streams may take the place of an output that is done with.
static void layer_backward(Model *m, int i) {
    const Config *c = &m->config;
    const Layer *l = &m->layer[i];
    LayerActs *a = layer_acts(m, i);
    LayerSaved *s = &m->saved[i];
    Gradients *g = &m->grad;
    int T = m->documents.T;
    phases.pass = PASS_AGAIN;
    if (m->options.recompute == RECOMPUTE_FULL) { layer_first_half(m, i, a, 1); }
    if (experts_input_again(m)) {
        phase(PHASE_STREAMS);
        hc_enter_forward(a->ffn.x, a->ffn.rstd, a->X_mid, a->ffn.pre, l->ffn_norm, c->norm_eps, T,
                         c->C);
    }

    phase_in(PHASE_STREAMS, PASS_BACKWARD);
    hc_deal_backward(g->dout, g->dpost, g->dcomb, g->dX, s->f, a->X_mid, a->ffn.post, T, c->C);
    zero(g->dx, sizeof(real) * (size_t)T * c->C);
    moe_backward(g->dx, g->dout, &s->moe, a->ffn.x, &l->moe, &m->moe, &m->moe_scratch, T);
    site_leave_backward(m, &a->ffn, a->X_mid, l->hc_ffn, l->ffn_norm);

    hc_deal_backward(g->dout, g->dpost, g->dcomb, g->dX, a->a, s->X, a->attn.post, T, c->C);
    zero(g->dx, sizeof(real) * (size_t)T * c->C);
    attention_sublayer_backward(m, i, a);
    site_leave_backward(m, &a->attn, s->X, l->hc_attn, l->attn_norm);
}

// -------------------------------------------------------------------------------------------------
// Part 7: head and loss
//
// The streams are collapsed once more, normalised and multiplied with the head: logits (T,V). They
// are the largest thing a language model makes (4,096 x 129,280 in fp32 are 2.1 GB), so they only
// ever exist for a tile of tokens, and their gradient is turned into the head input's at once.

// loss (T) = -log softmax(head inp)[target], 0 where target < 0. dinp (T,C) = gradient of the SUM
// of the losses, or NULL. head (V,C).
void head_loss(real *loss, real *dinp, const act *inp, const bf16 *head, const int *target, int T,
               int C, int V) {
    GPU(head_loss_gpu(loss, dinp, inp, head, target, T, C, V))
    Frozen w = { head, NULL, widen_bf16 };
    int tile = tile_rows(T, V + 2 * C);
    #pragma omp parallel for schedule(dynamic, 1)
    for (int first = 0; first < T; first += tile) {
        int n = 0, end = first + tile < T ? first + tile : T;
        int *token = host_alloc(sizeof(int) * (size_t)tile);    // those of the tile with a target
        real *x = host_alloc(sizeof(real) * (size_t)tile * C);
        real *dx = host_alloc(sizeof(real) * (size_t)tile * C);
        real *logit = host_alloc(sizeof(real) * (size_t)tile * V);
        for (int t = first; t < end; t++) {
            loss[t] = 0;
            if (dinp) { memset(dinp + (size_t)t * C, 0, sizeof(real) * (size_t)C); }
            if (target[t] < 0) { continue; }
            load_rows(x + (size_t)n * C, inp + (size_t)t * C, (size_t)C);
            token[n++] = t;
        }
        frozen_forward(logit, x, w, 0, n, C, V);
        for (int i = 0; i < n; i++) {
            // loss = log sum_v exp(l_v) - l_target, so dl = softmax(l) - onehot(target)
            real *l = logit + (size_t)i * V, max = l[0], sum = 0;
            for (int v = 1; v < V; v++) { max = fmax(max, l[v]); }
            real at_target = l[target[token[i]]] - max;
            for (int v = 0; v < V; v++) { sum += l[v] = exp(l[v] - max); }
            for (int v = 0; v < V; v++) { l[v] /= sum; }
            loss[token[i]] = log(sum) - at_target;
            l[target[token[i]]] -= 1;
        }
        if (dinp) {
            memset(dx, 0, sizeof(real) * (size_t)n * C);
            frozen_backward(dx, logit, w, 0, n, C, V);
            for (int i = 0; i < n; i++) {
                memcpy(dinp + (size_t)token[i] * C, dx + (size_t)i * C, sizeof(real) * (size_t)C);
            }
        }
        free(logit);
        free(dx);
        free(x);
        free(token);
    }
}
TWIN(head_loss)

// m->head.x (T,C): the head's input.
static void head_enter(Model *m) {
    const Config *c = &m->config;
    HyperConnection hc = m->globals.hc_head;
    Site *s = &m->head;
    int T = m->documents.T;
    phase(PHASE_HEAD);
    hc_weights_forward(s->pre, NULL, NULL, s->m, hc.base, hc.scale, c->hc_eps, T, HC, 0);
    hc_enter_forward(s->x, s->rstd, m->X_out, s->pre, m->globals.norm, c->norm_eps, T, c->C);
}

// x (n) *= scale.
void scale_reals(real *x, double scale, size_t n) {
    GPU(scale_reals_gpu(x, scale, n))
    for (size_t i = 0; i < n; i++) { x[i] *= (real)scale; }
}
TWIN(scale_reals)

// grad.dX = from m->dhead, times scale.
static void head_backward(Model *m, double scale) {
    const Config *c = &m->config;
    HyperConnection hc = m->globals.hc_head;
    Site *s = &m->head;
    int T = m->documents.T;
    phase_in(PHASE_HEAD, PASS_BACKWARD);
    scale_reals(m->dhead, scale, (size_t)T * c->C);
    hc_enter_backward(m->grad.dX, m->dhead, NULL, NULL, m->X_out, s->m, s->r, s->pre, NULL, s->rstd,
                      hc.fn, hc.base, hc.scale, m->globals.norm, c->hc_eps, T, c->C, HC, 0);
}

// -------------------------------------------------------------------------------------------------
// Part 8: the model: plan, allocate, load, forward, backward

static Tensor *tensor_add(Model *m, const char *name, int type, size_t rows, size_t cols) {
    if (m->n_tensors % 1024 == 0) {
        m->tensors = realloc(m->tensors, sizeof(Tensor) * (m->n_tensors + 1024));
        if (m->tensors == NULL) { die(EXIT_FIT, "no memory for the list of tensors"); }
    }
    Tensor *t = &m->tensors[m->n_tensors++];
    memset(t, 0, sizeof *t);
    require(strlen(name) < sizeof t->name);
    strcpy(t->name, name);
    t->type = type;
    t->ndim = cols ? 2 : 1;
    t->dim[0] = rows;
    t->dim[1] = cols;
    return t;
}

// Adds one tensor of kind k, and its scales; data and scales: where they go, NULL if another
// rank's.
static void tensor_place(Model *m, const TensorKind *k, const char *name, int layer, void *data,
                         void *scales) {
    const Config *c = &m->config;
    size_t rows = (size_t)dim_value(c, layer, k->dim[0]);
    size_t cols = (size_t)dim_value(c, layer, k->dim[1]);
    int fp4 = k->type == DT_FP4, block_rows = fp4 ? 1 : FP8_BLOCK;
    int block_cols = fp4 ? FP4_BLOCK : FP8_BLOCK;
    Tensor *t = tensor_add(m, name, k->type, rows, fp4 ? cols / 2 : cols);
    t->data = data;
    t->mean = k->mean;
    t->std = k->per_input ? (float)(k->std / sqrt((double)cols)) : k->std;
    if (k->type == DT_I64) { t->std = (float)c->E; }        // ids are drawn below this
    if (k->type != DT_FP8 && !fp4) { return; }
    char scale_name[96];
    snprintf(scale_name, sizeof scale_name, "%.*s.scale", (int)(strlen(name) - strlen(".weight")),
             name);
    float sigma = t->std;
    t = tensor_add(m, scale_name, DT_E8M0, (rows + block_rows - 1) / block_rows,
                   (cols + block_cols - 1) / block_cols);
    t->data = scales;
    t->mean = (float)(127 + floor_log2(sigma) - (fp4 ? 0 : 6));
}

// Room for one kind of tensor of one layer (-1: global), with its address written into base.
// Experts lie one after the other, this rank's only.
static void kind_alloc(Model *m, const TensorKind *k, int layer, void *base) {
    const Config *c = &m->config;
    size_t rows = (size_t)dim_value(c, layer, k->dim[0]);
    size_t cols = (size_t)dim_value(c, layer, k->dim[1]), n = rows * (cols ? cols : 1);
    int fp4 = k->type == DT_FP4, copies = k->where == EXPERT ? m->moe.local : 1;
    size_t bytes = fp4 ? n / 2 : type_bytes(k->type, n), scale_bytes = 0;
    if (k->type == DT_FP8) {
        scale_bytes = (rows + FP8_BLOCK - 1) / FP8_BLOCK * ((cols + FP8_BLOCK - 1) / FP8_BLOCK);
    }
    if (fp4) { scale_bytes = n / FP4_BLOCK; }
    uint8_t *data = mem_alloc(MEM_WEIGHTS, bytes * copies), *scales = NULL;
    *(void **)((char *)base + k->field) = data;
    if (scale_bytes) {
        scales = mem_alloc(MEM_WEIGHTS, scale_bytes * copies);
        *(void **)((char *)base + k->scale) = scales;
    }
    char name[96], prefix[24] = "";
    if (layer >= 0) { snprintf(prefix, sizeof prefix, "layers.%d.", layer); }
    for (int e = 0; e < (k->where == EXPERT ? c->E : 1); e++) {
        char kind[64];
        snprintf(kind, sizeof kind, "%s", k->name);
        if (k->where == EXPERT) {       // "ffn.experts.%d.w1.weight"
            const char *rest = strstr(k->name, "%d");
            snprintf(kind, sizeof kind, "%.*s%d%s", (int)(rest - k->name), k->name, e, rest + 2);
        }
        snprintf(name, sizeof name, "%s%s", prefix, kind);
        int mine = k->where != EXPERT || (e >= m->moe.first && e < m->moe.first + m->moe.local);
        size_t at = k->where == EXPERT && mine ? (size_t)(e - m->moe.first) : 0;
        tensor_place(m, k, name, layer, mine && data ? data + at * bytes : NULL,
                     mine && scales ? scales + at * scale_bytes : NULL);
    }
}

static void adapters_place(Model *m, int i) {
    const Config *c = &m->config;
    Layer *l = &m->layer[i];
    Adapters *s = &m->adapters;
    int first = m->moe.first, local = m->moe.local;
    char name[96], experts[64];
    #define ADD(target, module, in, out) \
        (snprintf(name, sizeof name, "layers.%d.%s", i, module), \
         adapter_add(s, target, name, in, out))
    l->lq_a = ADD(TARGET_WQ_A, "attn.wq_a", c->C, c->Q);
    l->lq_b = ADD(TARGET_WQ_B, "attn.wq_b", c->Q, c->H * c->D);
    l->lkv = ADD(TARGET_WKV, "attn.wkv", c->C, c->D);
    l->lo_b = ADD(TARGET_WO_B, "attn.wo_b", c->G * c->O, c->C);
    l->moe.l1 = ADD(TARGET_SHARED_W1, "ffn.shared_experts.w1", c->C, c->F);
    l->moe.l2 = ADD(TARGET_SHARED_W2, "ffn.shared_experts.w2", c->F, c->C);
    l->moe.l3 = ADD(TARGET_SHARED_W3, "ffn.shared_experts.w3", c->C, c->F);
    #undef ADD
    snprintf(experts, sizeof experts, "layers.%d.ffn.experts", i);
    l->moe.e1 = adapter_add_experts(s, TARGET_EXPERTS_W1, experts, "w1", first, local, c->C, c->F);
    l->moe.e2 = adapter_add_experts(s, TARGET_EXPERTS_W2, experts, "w2", first, local, c->F, c->C);
    l->moe.e3 = adapter_add_experts(s, TARGET_EXPERTS_W3, experts, "w3", first, local, c->C, c->F);
}

static void site_alloc(Site *s, int class_, size_t T, int C, int own_x) {
    s->pre = MEM(real, class_, T * HC);
    s->post = MEM(real, class_, T * HC);
    s->comb = MEM(real, class_, T * HC * HC);
    if (own_x) { s->x = MEM(act, class_, T * C); }
    s->rstd = MEM(real, class_, T);
}

// Room for one layer's activations. ratio 4 has the most of everything. keep: until the backward.
// own_x: the experts' input too, else it is the caller's to place.
static void acts_alloc(LayerActs *a, const Config *c, size_t T, int R, int keep, int own_x) {
    int class_ = MEM_ACTIVATIONS;
    size_t N = (size_t)c->H * c->D, P = T / 4;
    site_alloc(&a->attn, class_, T, c->C, 1);
    site_alloc(&a->ffn, class_, T, c->C, own_x);
    a->ffn.m = MEM(real, class_, T * HC_MIX);
    a->ffn.r = MEM(real, class_, T);
    a->cq_raw = MEM(act, class_, T * c->Q);
    a->cq = MEM(act, class_, T * c->Q);
    a->q = MEM(act, class_, T * N);
    a->kv_raw = MEM(act, class_, T * c->D);
    a->kv = MEM(act, class_, T * c->D);
    a->cq_rstd = MEM(real, class_, T);
    a->q_rstd = MEM(real, class_, T * c->H);
    a->kv_rstd = MEM(real, class_, T);
    a->entry_rstd = MEM(real, class_, P);
    a->K = MEM(real, class_, T * 2 * c->D);
    a->Z = MEM(real, class_, T * 2 * c->D);
    a->pooled = MEM(act, class_, P * c->D);
    a->entries = MEM(act, class_, P * c->D);
    a->o = MEM(act, class_, T * N);
    a->lse = MEM(real, class_, T * c->H);
    a->v = MEM(act, class_, T * c->G * c->O);
    a->a = MEM(act, class_, T * c->C);
    if (keep) { a->X_mid = MEM(act, class_, T * HC * c->C); }
    a->uq_a = MEM(real, class_, T * R);
    a->uq_b = MEM(real, class_, T * R);
    a->ukv = MEM(real, class_, T * R);
    a->uo_b = MEM(real, class_, T * R);
}

// Those that live through a whole layer.
static void gradients_alloc(Gradients *g, const Config *c, size_t T) {
    g->dX = MEM(act, MEM_SCRATCH, T * HC * c->C);
    g->dout = MEM(act, MEM_SCRATCH, T * c->C);
    g->dx = MEM(real, MEM_SCRATCH, T * c->C);
    g->dpost = MEM(real, MEM_SCRATCH, T * HC);
    g->dcomb = MEM(real, MEM_SCRATCH, T * HC * HC);
}

// Those that live inside the attention sublayer only.
static void attention_gradients_alloc(Gradients *g, const Config *c, size_t T) {
    size_t N = (size_t)c->H * c->D, P = T / 4;
    g->dv = MEM(real, MEM_SCRATCH, T * c->G * c->O);
    g->do_ = MEM(act, MEM_SCRATCH, T * N);
    g->delta = MEM(real, MEM_SCRATCH, T * c->H);
    g->dkv = MEM(real, MEM_SCRATCH, T * c->D);
    g->dentries = MEM(real, MEM_SCRATCH, P * c->D);
    g->dkv_raw = MEM(act, MEM_SCRATCH, T * c->D);
    g->dpooled = MEM(act, MEM_SCRATCH, P * c->D);
    g->dK = MEM(real, MEM_SCRATCH, T * 2 * c->D);
    g->dZ = MEM(real, MEM_SCRATCH, T * 2 * c->D);
    g->dcq = MEM(real, MEM_SCRATCH, T * c->Q);
    g->dcq_raw = MEM(act, MEM_SCRATCH, T * c->Q);
}

static void index_alloc(IndexScratch *s, const Config *c, size_t T) {
    size_t N = 2 * (size_t)c->index_dim, P = T / 4;
    s->K = MEM(real, MEM_SCRATCH, T * N);
    s->Z = MEM(real, MEM_SCRATCH, T * N);
    s->rstd = MEM(real, MEM_SCRATCH, P);
    s->w = MEM(real, MEM_SCRATCH, T * c->index_heads);
    s->pooled = MEM(act, MEM_SCRATCH, P * c->index_dim);
    s->keys = MEM(act, MEM_SCRATCH, P * c->index_dim);
    s->q = MEM(act, MEM_SCRATCH, T * c->index_heads * c->index_dim);
}

// What layers keep. Without training nothing is kept: two buffers take turns as X, and all layers
// share the rest. Layers whose X waits on the host share three places on the device.
static void saved_alloc(Model *m, size_t T) {
    const Config *c = &m->config;
    int offload = m->options.offload;
    int training = m->options.training, truncates = T / 4 > (size_t)c->index_topk;
    for (int i = 0; i < c->layers; i++) {
        LayerSaved *s = &m->saved[i];
        if (!training && i > 0) { *s = m->saved[0]; }
        if (!training && i > 1) { s->X = m->saved[i % 2].X; continue; }
        int shares = i < offload && i >= PLACES;        // with the layer PLACES before it
        s->X = shares ? m->saved[i - PLACES].X : MEM(act, MEM_ACTIVATIONS, T * HC * c->C);
        if (!training && i == 1) { continue; }
        s->m = MEM(real, MEM_ACTIVATIONS, T * HC_MIX);
        s->r = MEM(real, MEM_ACTIVATIONS, T);
        s->f = MEM(act, MEM_ACTIVATIONS, T * c->C);
        moe_alloc_saved(&s->moe, &m->moe, (int)T, RECOMPUTE_FULL - m->options.recompute);
        int selects = truncates && (c->ratio[i] == 4 || !training);
        s->selected = selects ? MEM(int, MEM_ACTIVATIONS, T * c->index_topk) : NULL;
    }
    m->X_out = MEM(act, MEM_ACTIVATIONS, T * HC * c->C);
    for (int i = 0; i < offload && !mem.counting && m->X_host[i] == NULL; i++) {
        m->X_host[i] = pinned_alloc(sizeof(act) * T * HC * c->C);
    }
    m->head.m = MEM(real, MEM_ACTIVATIONS, T * HC);
    m->head.r = MEM(real, MEM_ACTIVATIONS, T);
}

// Workspace for the adapters (R) of E matrices of up to N rows or columns, in products of `rows`
// rows: factors narrowed, u and du, and the partial sums of a gradient, of which there are as many
// as give 1,056 blocks of 1,024 columns something to do (kernels.cu, lora_wgrad).
static size_t workspace_adapters(size_t E, size_t N, size_t rows, size_t R) {
    const size_t whole = R + 7;
    return 4 * E * whole * N + 12 * rows * whole + 4 * R * (1056 * 1024 + E * (N + 1024));
}

// Bytes that kernels use inside themselves: the largest of experts' adapters, a chunk of logits and
// their gradients, a chunk of index scores, a dense matrix with its adapter beside a gradient.
static size_t workspace_bytes(const Config *c, const MoeDims *d, size_t T) {
    const size_t gates = d->fp8 ? 2 * c->F : c->F, N = c->C > (int)gates ? (size_t)c->C : gates;
    size_t head = 6 * (T < 512 ? T : 512) * (size_t)c->V;
    size_t index = 4 * 256 * (T / 4) * (size_t)(c->index_heads + 1);
    size_t wide = (size_t)c->H * c->D * c->Q, joined = (size_t)c->C * c->G * c->O;
    size_t groups = (size_t)c->H * c->D * c->O, heads = (size_t)c->H * c->D;
    if (joined > wide) { wide = joined; }
    if (groups > wide) { wide = groups; }
    size_t dense = 2 * wide + 2 * T * (size_t)(c->G * c->O) + workspace_adapters(1, heads, T, d->R);
    size_t most = workspace_adapters(d->local, N, moe_capacity(d, (int)T), d->R << d->fp8);
    // The attention backward's partial sums: 128 KiB for each of so many slots, and key masks.
    size_t tiles = T / 256 + 1, slots = 2048 + tiles + (T / 64 > 768 ? T / 64 : 768);
    size_t keys = c->D == 512 ? (slots << 17) + 8 * T * tiles : 0;
    if (keys > most) { most = keys; }
    if (head > most) { most = head; }
    if (index > most) { most = index; }
    if (dense > most) { most = dense; }
    return most + (96 << 20);           // cuBLAS takes 32 MiB; the rest is rounding up, and slack
}

// What passes need besides weights.
static void activations_alloc(Model *m) {
    const Config *c = &m->config;
    const ModelOptions *o = &m->options;
    size_t T = (size_t)o->max_tokens;
    for (int k = 0; k < 2; k++) { m->rope[k] = MEM(real, MEM_ACTIVATIONS, T * c->rope_dim); }
    documents_alloc(&m->documents, (int)T, 0);
    m->token = MEM(int, MEM_SCRATCH, T);
    m->target = MEM(int, MEM_SCRATCH, T);
    m->logits = MEM(real, MEM_SCRATCH, c->V);
    m->loss = MEM(real, MEM_ACTIVATIONS, T);
    saved_alloc(m, T);
    int full = m->options.recompute == RECOMPUTE_FULL;
    size_t mark = mem_mark(MEM_ACTIVATIONS);
    for (int i = 0; i < (full ? 1 : c->layers); i++) {
        acts_alloc(&m->acts[i], c, T, o->R, !full, i == 0 || !experts_input_again(m));
        if (i > 0 && experts_input_again(m)) { m->acts[i].ffn.x = m->acts[0].ffn.x; }
    }
    if (full) { mem_release(MEM_ACTIVATIONS, mark); }   // the head comes after them, and before
    site_alloc(&m->head, MEM_ACTIVATIONS, T, c->C, 1);
    if (o->training) { gradients_alloc(&m->grad, c, T); }
#ifdef USE_CUDA
    if (on_gpu) {
        size_t bytes = workspace_bytes(c, &m->moe, T);
        void *base = mem_alloc(MEM_SCRATCH, bytes);
        if (base) { gpu_workspace(base, bytes); }
    }
#else
    (void)workspace_bytes;
#endif
    // Never in use at the same time, so they share their place: the experts' rows, the indexer's
    // keys, the attention's gradients, the gradient that waits between the head's two passes.
    mark = mem_mark(MEM_SCRATCH);
    moe_alloc_scratch(&m->moe_scratch, &m->moe, (int)T, o->training);
    mem_release(MEM_SCRATCH, mark);
    index_alloc(&m->index, c, T);
    mem_release(MEM_SCRATCH, mark);
    if (!o->training) { return; }
    attention_gradients_alloc(&m->grad, c, T);
    mem_release(MEM_SCRATCH, mark);
    m->dhead = MEM(real, MEM_SCRATCH, T * c->C);
}

// Places everything the model needs into the arenas. Called twice: while counting (contract, 1.5)
// and for real. m is zero before the first call.
void model_alloc(Model *m, const Config *c, const ModelOptions *o) {
    size_t T = (size_t)o->max_tokens;
    m->config = *c;
    m->options = *o;
    if (!o->training) { m->options.recompute = RECOMPUTE_FULL, m->options.offload = 0; }
    m->n_tensors = 0;
    m->moe = (MoeDims){
        .C = c->C, .E = c->E, .K = c->K, .F = c->F, .R = o->R, .local = c->E / comm_ep(),
        .first = comm_ep_rank() * (c->E / comm_ep()), .limit = c->swiglu_limit,
        .route_scale = c->route_scale, .norm_topk = c->norm_topk, .lora_scale = o->alpha / o->R,
        .how = c->how, .fp8 = o->fp8,
    };
    if (m->layer == NULL) {
        m->layer = host_calloc(sizeof(Layer) * (size_t)c->layers);
        m->saved = host_calloc(sizeof(LayerSaved) * (size_t)c->layers);
        m->acts = host_calloc(sizeof(LayerActs) * (size_t)c->layers);
        m->expert_count = host_calloc(sizeof(long) * (size_t)c->layers * c->E);
        m->X_host = host_calloc(sizeof(act *) * (size_t)c->layers);
        m->loss_h = host_alloc(sizeof(real) * T);
        documents_alloc(&m->documents_h, (int)T, 1);
    }
    for (int k = 0; k < TENSOR_KINDS; k++) {
        const TensorKind *kind = &tensor_kinds[k];
        if (kind->where == GLOBAL) { kind_alloc(m, kind, -1, &m->globals); }
        for (int i = 0; i < c->layers; i++) {
            if (layer_has(c, i, kind)) { kind_alloc(m, kind, i, &m->layer[i]); }
        }
    }
    m->adapters.R = o->R;
    m->adapters.alpha = o->alpha;
    m->adapters.scale = o->alpha / o->R;
    m->adapters.targets = o->targets;
    m->adapters.muon = o->muon;
    if (mem.counting) {                 // sizes first: dense adapters lie before the experts'
        m->adapters.p = NULL;
        adapters_begin(&m->adapters);
        for (int i = 0; i < c->layers; i++) { adapters_place(m, i); }
    }
    adapters_alloc(&m->adapters, o->training);
    adapters_begin(&m->adapters);
    for (int i = 0; i < c->layers; i++) { adapters_place(m, i); }
    activations_alloc(m);
}

// The host's lists; the arenas are the caller's.
void model_free(Model *m) {
    if (m->layer == NULL) { return; }
    documents_free_host(&m->documents_h);
    const size_t bytes = sizeof(act) * (size_t)m->options.max_tokens * HC * m->config.C;
    for (int i = 0; i < m->options.offload; i++) { pinned_free(m->X_host[i], bytes); }
    free(m->X_host);
    free(m->loss_h);
    free(m->layer);
    free(m->saved);
    free(m->acts);
    free(m->expert_count);
    free(m->tensors);
    free(m->adapters.tensors);
    free(m->adapters.slices_h);
    memset(m, 0, sizeof *m);
}

// Fills the frozen weights, from a checkpoint or at random, and starts the adapters: A uniform,
// B zero, so that step 0 is the base model exactly.
void model_load(Model *m, const char *dir) {
    const Config *c = &m->config;
    if (dir) {
        checkpoint_load(dir, m->tensors, m->n_tensors);
    } else {
        for (size_t i = 0; i < m->n_tensors; i++) {
            if (m->tensors[i].data) { tensor_draw(&m->tensors[i], m->options.seed); }
        }
    }
    check_scales(m->tensors, m->n_tensors);
    for (int i = 0; i < c->layers; i++) {       // one NaN here, and an expert is never chosen
        const MoeWeights *w = &m->layer[i].moe;
        const size_t n = (size_t)c->E * c->C;
        const float *bias = w->bias ? host_view(w->bias, sizeof *bias * (size_t)c->E) : NULL;
        const bf16 *gate = host_view(w->gate, sizeof *gate * n);
        for (size_t j = 0; j < n; j++) {
            const float g = float_from_bf16(gate[j]), b = bias ? bias[j / c->C] : 0;
            refuse_if(!isfinite(g + b), "layers.%d.ffn.gate: expert %zu has weight %g, bias %g", i,
                      j / c->C, g, b);
        }
        host_view_end(gate, w->gate);
        if (bias) { host_view_end(bias, w->bias); }
    }
    for (int k = 0; k < 2; k++) { rope_table(m->rope[k], c, k, m->options.max_tokens); }
    adapters_init(&m->adapters, m->options.seed);
}

// ---- the inputs of the first layers on the host
//
// They are written once and read once, and lie still for most of a step. X of layer i has its place
// on the device, i mod PLACES, while it is used: layer i reads it and writes the next place,
// while the third one's goes to the host (forward) or comes back (backward), beside the kernels.

static size_t offload_bytes(const Model *m) {
    return sizeof(act) * (size_t)m->documents.T * HC * m->config.C;
}

// Before layer i of a forward: its input is there, and its output's place must have been copied.
static void offload_forward(Model *m, int i) {
    if (i >= m->options.offload) { return; }
    copy_begin(i % PLACES, m->X_host[i], m->saved[i].X, offload_bytes(m));
    if (i + 1 < m->options.offload) { copy_end((i + 1) % PLACES); }
}

// Begins to bring back the input of layer i, if it is on the host.
static void offload_fetch(Model *m, int i) {
    if (i < 0 || i >= m->options.offload) { return; }
    copy_begin(i % PLACES, m->saved[i].X, m->X_host[i], offload_bytes(m));
}

// Streams through all layers, up to the head's input. train: a backward follows.
static void model_run(Model *m, const Batch *b, int train) {
    const Config *c = &m->config;
    require(b->T <= m->options.max_tokens);
    phase_in(PHASE_STREAMS, PASS_FORWARD);
    documents_set(&m->documents_h, b->doc_start, b->docs);
    documents_upload(&m->documents, &m->documents_h);
    upload(m->token, b->token, sizeof(int) * (size_t)b->T);
    embed_forward(m->saved[0].X, m->globals.embed, m->token, b->T, c->C);
    hc_logits_forward(m->saved[0].m, m->saved[0].r, m->saved[0].X, m->layer[0].hc_attn.fn,
                      c->norm_eps, b->T, c->C, HC_MIX);
    for (int i = 0; i < c->layers; i++) {
        if (train) { offload_forward(m, i); }
        layer_forward(m, i, m->token);
    }
    head_enter(m);
}

// The sum of -log p over the labels of this rank's micro-batch, in nats. train: keeps what
// model_backward needs. Ranks call it equally often: the experts' exchange waits for all.
double model_forward(Model *m, const Batch *b, int train) {
    const Config *c = &m->config;
    double sum = 0;
    require(!train || m->options.training);
    model_run(m, b, train);
    upload(m->target, b->target, sizeof(int) * (size_t)b->T);
    head_loss(m->loss, train ? m->dhead : NULL, m->head.x, m->globals.head, m->target, b->T, c->C,
              c->V);
    download(m->loss_h, m->loss, sizeof(real) * (size_t)b->T);
    for (int t = 0; t < b->T; t++) { sum += m->loss_h[t]; }
    return sum;
}

// Adds the gradients of scale * model_forward(b) to the adapters' gradients. Follows that forward.
void model_backward(Model *m, const Batch *b, double scale) {
    require(m->options.training && b->T == m->documents.T);
    head_backward(m, scale);
    offload_fetch(m, m->config.layers - 1);
    for (int i = m->config.layers - 1; i >= 0; i--) {
        if (i < m->options.offload) { copy_end(i % PLACES); }
        offload_fetch(m, i - 1);
        layer_backward(m, i);
    }
}

// The logits (V) of what follows the last of T tokens, taken as one document.
void model_next_logits(Model *m, const int *token, int T, float *logits) {
    const Config *c = &m->config;
    int start[2] = { 0, T };
    Batch b = { .T = T, .docs = 1, .token = (int *)token, .doc_start = start };
    model_run(m, &b, 0);
    linear_bf16_forward(m->logits, m->head.x + (size_t)(T - 1) * c->C, m->globals.head, 1, c->C,
                        c->V);
    real *row = host_alloc(sizeof(real) * (size_t)c->V);
    download(row, m->logits, sizeof(real) * (size_t)c->V);
    for (int v = 0; v < c->V; v++) { logits[v] = (float)row[v]; }
    free(row);
}

// After a loss that is not finite: the first layer whose output is not. Writes its name.
void model_first_nonfinite(const Model *m, char *name, size_t size) {
    size_t n = (size_t)m->documents.T * HC * m->config.C;
    act *X = malloc(sizeof(act) * n + 1);       // the run is over: no rule about memory holds
    if (X == NULL) { snprintf(name, size, "a layer's output"); return; }
    for (int k = 0; k < PLACES; k++) { copy_end(k); }
    download(X, m->X_out, sizeof(act));         // waits for copies to the host, too
    for (int i = 0; i <= m->config.layers; i++) {
        if (i < m->options.offload) { memcpy(X, m->X_host[i], sizeof(act) * n); }
        else { download(X, i < m->config.layers ? m->saved[i].X : m->X_out, sizeof(act) * n); }
        for (size_t k = 0; k < n; k++) {
            if (isfinite((double)ld(X + k))) { continue; }
            if (i == 0) { snprintf(name, size, "embed"); }
            else { snprintf(name, size, "the output of layers.%d", i - 1); }
            free(X);
            return;
        }
    }
    free(X);
    snprintf(name, size, "the head");
}

// -------------------------------------------------------------------------------------------------
// Part 9: data: which rows a rank takes
//
// dev/data/prep.c makes rows out of files. Step s takes the next d/t rows of their one global
// sequence and row j of the step goes to rank j mod ranks, so what a step learns from does not
// depend on the number of ranks. Every rank holds the whole plan, with the number of labels of each
// piece: the loss is divided by the labels of all ranks, and no one has to ask for them.
#include "dev/data/prep.c"  // defines: Tokenizer, Data, Rows, data_*, prompt_tokens, token_print
#include "dev/inspect.c"    // defines: inspect_base, inspect_adapter
#include "dev/plot.c"       // defines: log_parse, plot_loss
#include "dev/options.c"    // defines: Option, option_*, options_from_argv, EACH_OPTION

// Micro-batches that so many rows take: the same number on every rank, because all must join in
// every exchange of tokens. A rank whose rows are used up runs empty ones.
static inline int micro_batches(int rows, int b, int ranks) {
    return (rows + b * ranks - 1) / (b * ranks);
}

static inline void batch_alloc(Batch *x, int tokens) {
    x->token = (int *)host_alloc((size_t)tokens * sizeof *x->token);
    x->target = (int *)host_alloc((size_t)tokens * sizeof *x->target);
    x->doc_start = (int *)host_alloc(((size_t)tokens + 1) * sizeof *x->doc_start);
}

// This rank's part of that micro-batch: its next b rows, each of them whole.
static inline void batch_fill(Batch *x, const Rows *s, int micro, int b, int rank, int ranks) {
    x->T = x->docs = 0;
    for (int k = 0; k < b; k++) {
        size_t j = ((size_t)micro * b + k) * ranks + rank;
        if (j >= (size_t)s->rows) { break; }
        for (const Piece *p = s->piece + s->first[j]; p < s->piece + s->first[j + 1]; p++) {
            x->doc_start[x->docs++] = x->T;
            for (int i = 0; i < p->length; i++, x->T++) {
                uint32_t next = i + 1 < p->length ? p->token[i + 1] : 0;
                x->token[x->T] = (int)(p->token[i] & TOKEN_ID);
                x->target[x->T] = next & TOKEN_LABEL ? (int)(next & TOKEN_ID) : -1;
            }
        }
    }
    x->doc_start[x->docs] = x->T;
}

// -------------------------------------------------------------------------------------------------
// Part 10: a training step, validation, sampling
//
// Everything here is collective: all ranks call it at the same time, with the same rows. What a
// rank alone knows (its loss, a NaN, a signal) travels in one small reduction per step, so that
// all ranks decide the same thing at the same step and none of them waits for one that left.

// What the user asked for. Names, defaults and meaning stand in the table of part 12.
static struct {
    const char *model, *train, *val, *out, *config, *schedule, *optimizer, *targets, *names, *init,
        *ns, *routing, *pack, *loss_on, *prompt, *resume, *recompute, *precision, *check_adapter;
    int batch, seq, per_step, steps, warmup, r, shuffle_seed, show_data, val_every, val_steps,
        sample_every, sample_len, save_every, keep, bench, offload, gpus, ranks, ep, seed,
        gen_gpus, refit_every;
    double epochs, lr, final_frac, decay, clip, beta1, beta2, eps, alpha, timeout;
    int no_shuffle, skip_bad_rows, eval, reset_optim, dry_run, inspect, random_base, overfit, cpu,
        help, version;
} opt;

typedef struct {
    Config config;
    Model model;
    Tokenizer tokenizer;        // n == 0: the model's folder has none
    Data train, val;            // val.pieces == 0: no validation
    Rows rows;                  // the rows of the current step
    Batch batch;                // this rank's micro-batch of them
    int steps;                  // of the whole run
    size_t row_limit;           // rows that the run may take: its last step may be short
    int step;                   // updates done so far
    int moments;                // updates that went into m and v (--reset-optim: fewer than step)
    double loss, val_loss;      // the newest ones, for the closing line; NAN: none yet
    int *context;               // tokens of a sample
    float *logits;              // (V)
} Trainer;

typedef struct {                // what one step has to report
    double loss, norm, lr, seconds;
    size_t tokens, labels;
    int epoch, stop;            // stop: some rank was asked to stop
} Report;

// Prints on rank 0 only, at once.
__attribute__((format(printf, 1, 2)))
static inline void say(const char *format, ...) {
    if (this_rank != 0) { return; }
    va_list args;
    va_start(args, format);
    vprintf(format, args);
    va_end(args);
    fflush(stdout);
}

static volatile sig_atomic_t stop_signals;

// The first Ctrl-C or SIGTERM ends the step, the second one the process. One that comes within a
// second is the first again: schedulers send it to all processes, and the supervisor passes it on.
static inline void on_stop_signal(int signal) {
    static double first;
    (void)signal;
    if (stop_signals && clock_seconds() - first > 1) { _exit(EXIT_INTERRUPTED); }
    if (!stop_signals) { first = clock_seconds(); }
    stop_signals = 1;
}

static inline void catch_stop_signals(void) {
    struct sigaction action;
    memset(&action, 0, sizeof action);
    action.sa_handler = on_stop_signal;
    action.sa_flags = SA_RESTART;
    sigaction(SIGINT, &action, NULL);
    sigaction(SIGTERM, &action, NULL);
}

// Ends the run: a number is not finite. where: what it belongs to, NULL on the ranks that do not
// have it. Those wait to be ended by the supervisor, so that the message comes first.
static inline void numerics_stop(const char *what, const char *where, int step) {
    if (where) {
        die(EXIT_NUMERICS, "non-finite %s in %s at step %d HINT: a lower --lr, or look at the data "
            "of this step", what, where, step);
    }
    comm_barrier(COMM_WORLD, "waiting for the rank with the non-finite number");
    exit(EXIT_NUMERICS);
}

// comm_sum_real, in --bench's list: on GPUs a rank sends all others their slices of the values, and
// the sum of its own.
static inline void sum_gradients(int which, real *values, size_t n, const char *name) {
    const size_t members = (size_t)comm_size(which);
    phase_collective(1, name);
    comm_sum_real(which, values, n, name);
    phases.sent += 2 * (members - 1) * n * sizeof *values / members;
    phase_collective(0, name);
}

// Adds up the gradients of all ranks and returns their norm. Dense adapters are the same on every
// rank; an expert's are shared by the ranks that hold the same experts. The norm counts every
// trained element once: dense ones, and the experts of each rank of one expert group.
static inline double reduce_gradients(const Adapters *a) {
    sum_gradients(COMM_WORLD, a->g, a->n_dense, "dense gradients");
    sum_gradients(COMM_REPLICA, a->g + a->n_dense, a->n_expert, "expert gradients");
    double expert = sum_squares(a->g + a->n_dense, a->n_expert);
    comm_sum_double(COMM_EP, &expert, 1, "gradient norm");
    return sqrt(sum_squares(a->g, a->n_dense) + expert);
}

// One step: rows, forward and backward of each micro-batch, one reduction, one update.
static inline void train_step(Trainer *r, Report *report) {
    Adapters *a = &r->model.adapters;
    int per_step = opt.per_step / opt.seq, ranks = comm_ranks(), step = r->step + 1;
    size_t taken = (size_t)r->step * per_step, n = a->n_dense + a->n_expert;
    double began = clock_seconds(), loss = 0;
    char where[128] = "";

    if (opt.overfit) { data_seek(&r->train, 0); }       // the same rows again
    if (r->row_limit - taken < (size_t)per_step) { per_step = (int)(r->row_limit - taken); }
    data_take(&r->train, &r->rows, per_step, 1);
    // The gradient of the mean over all labels of the step: every micro-batch of every rank uses
    // the same divisor, so how rows are dealt out changes nothing but the order of the sums.
    double scale = r->rows.labels ? 1.0 / (double)r->rows.labels : 0;

    phase_in(PHASE_UPDATE, PASS_FORWARD);
    zero(a->g, n * sizeof *a->g);
    memset(r->model.expert_count, 0, sizeof(long) * (size_t)r->config.layers * r->config.E);
    for (int i = 0; i < micro_batches(r->rows.rows, opt.batch, ranks); i++) {
        batch_fill(&r->batch, &r->rows, i, opt.batch, comm_rank(), ranks);
        loss += model_forward(&r->model, &r->batch, 1);
        if (!isfinite(loss) && !*where) { model_first_nonfinite(&r->model, where, sizeof where); }
        model_backward(&r->model, &r->batch, scale);
    }

    phase_in(PHASE_UPDATE, PASS_BACKWARD);
    // Before gradients are added up is the last moment to tell whose they were.
    const char *name = *where ? where
                     : isfinite(sum_squares(a->g, n)) ? NULL : adapters_first_nonfinite(a, a->g);
    double sums[3] = { name ? 0 : loss, stop_signals > 0, name != NULL };
    comm_sum_double(COMM_WORLD, sums, 3, "loss");
    if (sums[2] > 0) { numerics_stop(*where ? "loss" : "gradient", name, step); }
    report->norm = reduce_gradients(a);
    if (!isfinite(report->norm)) {      // finite on each rank, but not their sum
        numerics_stop("gradient", adapters_first_nonfinite(a, a->g), step);
    }

    report->loss = sums[0] * scale;
    report->stop = sums[1] > 0;
    report->lr = lr_at(opt.lr, r->step, r->steps, opt.warmup, opt.final_frac,
                       strcmp(opt.schedule, "cosine") == 0);
    adapters_update(a, clip_factor(report->norm, opt.clip), report->lr, opt.beta1, opt.beta2,
                    opt.eps, opt.decay, ++r->moments);
    report->tokens = r->rows.tokens;
    report->labels = r->rows.labels;
    report->epoch = r->rows.epoch;
    phases_end();
    report->seconds = clock_seconds() - began;
    r->loss = report->loss;
    r->step = step;
}

// The mean loss over the labels of the first so many micro-batches of d, 0: of all of it.
static inline double validate(Trainer *r, Data *d, int batches) {
    double loss = 0, labels = 0, told = clock_seconds();
    int ranks = comm_ranks();
    data_seek(d, 0);
    size_t rows = (size_t)batches * opt.batch * ranks;
    if (batches == 0 || rows > d->rows) { rows = d->rows; }
    for (int i = 0; batches == 0 || i < batches; i++) {
        data_take(d, &r->rows, opt.batch * ranks, 0);
        if (r->rows.rows == 0) { break; }
        batch_fill(&r->batch, &r->rows, 0, opt.batch, comm_rank(), ranks);
        loss += model_forward(&r->model, &r->batch, 0);
        labels += (double)r->rows.labels;
        if (clock_seconds() - told > 2) {       // long work shows that it goes on
            told = clock_seconds();
            say("val    %zu of %zu rows\n", d->next, rows);
        }
    }
    double sums[2] = { isfinite(loss) ? loss : 0, !isfinite(loss) };
    comm_sum_double(COMM_WORLD, sums, 2, "validation loss");
    if (sums[1] > 0) { numerics_stop("loss", isfinite(loss) ? NULL : "validation", r->step); }
    return labels > 0 ? sums[0] / labels : 0;
}

// Draws an index with probability softmax(logits / temperature), by a number in [0, 1).
static inline int draw(const float *logits, int V, double temperature, double coin) {
    double max = logits[0], sum = 0, passed = 0;
    for (int i = 1; i < V; i++) { max = logits[i] > max ? logits[i] : max; }
    for (int i = 0; i < V; i++) { sum += exp((logits[i] - max) / temperature); }
    for (int i = 0; i < V; i++) {
        passed += exp((logits[i] - max) / temperature);
        if (passed > coin * sum) { return i; }
    }
    return V - 1;
}

// Writes a token, on rank 0. held: what is not yet a whole character.
static inline void show_token(FILE *out, const Trainer *r, int id, char held[5]) {
    if (comm_rank() == 0) { token_print(out, &r->tokenizer, id, held); }
    if (comm_rank() == 0) { fflush(out); }
}

// Tokens of a sample, with its prompt; 0 if there are to be none.
static inline int sample_tokens(Trainer *r) {
    if (!opt.sample_every) { return 0; }
    return opt.sample_len + prompt_tokens(NULL, opt.prompt, &r->tokenizer, &r->config);
}

// Continues the prompt with that model, on all trainers or receivers, and rank 0 writes it. Every
// token runs the whole text again: that is slow and cannot be wrong, while a cache of keys, pooled
// entries and open windows would be a second forward pass to keep equal to the first. The draws
// depend on the seed, the step and the position.
static inline void sample(Trainer *r, Model *m, const char *whose) {
    int T = prompt_tokens(r->context, opt.prompt, &r->tokenizer, &r->config);
    uint64_t key = random_key((uint64_t)opt.seed + ((uint64_t)r->step << 32), "sample");
    char held[5] = { 0 };
    char *text = NULL;
    size_t size;
    FILE *out = comm_receivers() ? open_memstream(&text, &size) : stdout;   // two write: at once
    if (out == NULL) { die(EXIT_FIT, "no host memory for a sample"); }
    if (comm_rank() == 0) { fprintf(out, "%ssample at step %d:\n---\n", whose, r->step); }
    for (int t = 1; t < T; t++) { show_token(out, r, r->context[t], held); }
    for (int i = 0; i < opt.sample_len; i++, T++) {
        model_next_logits(m, r->context, T, r->logits);
        // One rank draws for all: a last bit that differed would let their texts drift apart.
        double id = 0;
        if (comm_rank() == 0) { id = draw(r->logits, r->config.V, 0.8, random_uniform(key, i)); }
        comm_sum_double(COMM_WORLD, &id, 1, "sample");
        if ((int)id == r->config.eos) { break; }
        r->context[T] = (int)id;
        show_token(out, r, (int)id, held);
    }
    show_token(out, r, -1, held);
    if (comm_rank() == 0) { fprintf(out, "\n---\n"); }
    if (out == stdout) { return; }
    fclose(out);
    if (comm_rank() == 0) { fputs(text, stdout); }
    free(text);
}

// How evenly the last step's tokens were spread over the experts. All layers together: the fullest
// expert's rows / mean, and the entropy in nats (at most log E). And the layer whose fullest one
// has most: a router that sends all tokens to the same few shows there, and hardly in the sum.
typedef struct { double worst, entropy, layer_worst; int layer; } ExpertLoad;

static inline double fullest(const double *rows, int E) {
    double sum = 0, most = 0;
    for (int e = 0; e < E; e++) { sum += rows[e]; most = fmax(most, rows[e]); }
    return sum > 0 ? most / (sum / E) : 0;
}

static inline ExpertLoad expert_load(Trainer *r) {
    const int E = r->config.E;
    double all[E], rows[E], sum = 0;
    ExpertLoad load = { .layer = 0 };
    for (int e = 0; e < E; e++) { all[e] = 0; }
    for (int i = 0; i < r->config.layers; i++) {
        for (int e = 0; e < E; e++) { rows[e] = (double)r->model.expert_count[(size_t)i * E + e]; }
        comm_sum_double(COMM_WORLD, rows, E, "expert load");
        for (int e = 0; e < E; e++) { all[e] += rows[e]; sum += rows[e]; }
        if (fullest(rows, E) > load.layer_worst) {
            load.layer = i;
            load.layer_worst = fullest(rows, E);
        }
    }
    for (int e = 0; e < E; e++) {
        if (all[e] > 0) { load.entropy -= all[e] / sum * log(all[e] / sum); }
    }
    load.worst = fullest(all, E);
    return load;
}

// -------------------------------------------------------------------------------------------------
// Part 11: log lines, JSON, plot
//
// One line per event, rank 0 only, flushed, beginning with what it is about: plan, load, scales,
// data, base, step, val, moe, refit, save, bench, done (error comes from die). The same numbers go
// to OUT/training.jsonl and OUT/validation.jsonl under NeMo Automodel's keys, one line per step, so
// that runs can be laid over each other. What loss.png shows is read back from them: a resumed run
// has it all.

static inline const char *plural(int n) { return n == 1 ? "" : "s"; }

#include "dev/plan.c"       // defines: plan_memory, plan_disk, step_operations, memory_used, ..

// OUT/name in one of a few buffers.
static inline const char *out_path(const char *name) {
    static char path[4][PATH_SIZE];
    static int at;
    return path_make(path[at++ % 4], opt.out, "/", name);
}

// The time as Automodel writes it: UTC, ISO 8601, milliseconds.
static inline const char *timestamp(void) {
    static char text[48];
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    size_t length = strftime(text, sizeof text, "%Y-%m-%dT%H:%M:%S", gmtime(&now.tv_sec));
    snprintf(text + length, sizeof text - length, ".%03dZ", (int)(now.tv_nsec / 1000000));
    return text;
}

// Appends one line to a log in OUT. The file is opened for each: nothing is lost with a crash, and
// steps are seconds apart.
__attribute__((format(printf, 2, 3)))
static inline void log_line(const char *name, const char *format, ...) {
    if (this_rank != 0) { return; }
    FILE *file = fopen(out_path(name), "a");
    va_list args;
    va_start(args, format);
    int ok = file && vfprintf(file, format, args) > 0;
    va_end(args);
    if ((file && fclose(file) != 0) || !ok) {
        die(EXIT_FIT, "cannot write %s: %s", out_path(name), strerror(errno));
    }
}

// Operations per second of dense bf16 products that an H100 or H200 (SXM) has by its data sheet.
#define GPU_PEAK 989.4e12

// mfu, in percent of it as in Automodel's logs, is for GPUs only: null on the CPU.
static inline void log_step(const Trainer *r, const Report *p) {
    double rate = (double)p->tokens / p->seconds;
    double mfu = 100 * step_operations(&r->model, &r->rows) / p->seconds / GPU_PEAK / comm_ranks();
    char shown[32] = "", logged[32] = "null";
    if (ON_GPU) {
        snprintf(shown, sizeof shown, " | %.1f %% MFU", mfu);
        snprintf(logged, sizeof logged, "%.9g", mfu);
    }
    say("step %5d/%d | loss %.6f | norm %.4f | lr %.2e | %.2f ms%s | %.0f tok/s | mem %s | labels "
        "%zu\n", r->step, r->steps, p->loss, p->norm, p->lr, 1e3 * p->seconds, shown, rate,
        bytes_text(memory_used()), p->labels);
    if (memory_beside > 0) {            // once
        const double plan = memory_planned() + memory_beside;
        say("plan   %-11s %s in use after a step, %s planned (%+.1f %%)\n", "held",
            bytes_text(memory_used()), bytes_text(plan), 100 * (memory_used() / plan - 1));
        memory_beside = 0;
    }
    if (opt.bench) { return; }
    log_line("training.jsonl", "{\"step\": %d, \"epoch\": %d, \"timestamp\": \"%s\", "
             "\"loss\": %.9g, \"grad_norm\": %.9g, \"lr\": %.9g, \"mem\": %.9g, \"tps\": %.9g, "
             "\"tps_per_gpu\": %.9g, \"mfu\": %s, \"num_tokens_per_step\": %zu, "
             "\"num_label_tokens\": %zu}\n", r->step, p->epoch, timestamp(), p->loss, p->norm,
             p->lr, memory_used() / 1073741824.0, rate, rate / comm_ranks(), logged, p->tokens,
             p->labels);
}

static inline void log_validation(int step, int epoch, double loss) {
    say("val  %5d | loss %.6f | ppl %.4f\n", step, loss, exp(loss));
    log_line("validation.jsonl", "{\"step\": %d, \"epoch\": %d, \"timestamp\": \"%s\", "
             "\"val_loss\": %.9g}\n", step, epoch, timestamp(), loss);
}

// A resumed run does its steps again from the checkpoint on, so the lines that the earlier one
// wrote after it go, and so does a last line that its end cut short.
static inline void log_rewind(const char *name, const char *key, int step) {
    FILE *file = fopen(out_path(name), "r");
    char line[1024];
    long keep = 0;
    int at;
    double value;
    if (file == NULL) { return; }
    while (fgets(line, sizeof line, file) && log_parse(line, key, &at, &value) && at <= step) {
        keep = ftell(file);
    }
    fclose(file);
    refuse_if(truncate(out_path(name), keep) != 0, "cannot shorten %s: %s", out_path(name),
              strerror(errno));
}

// Draws OUT/loss.png at exit, also after an error: then most of all one wants to see the curve.
void plot_at_exit(void) {
    int drawn = plot_loss(out_path("loss.png"), out_path("training.jsonl"),
                          out_path("validation.jsonl"));
    if (drawn != 0) { return; }
#ifdef HAVE_STB_IMAGE_WRITE
    say("done   cannot write %s\n", out_path("loss.png"));
#else
    say("done   no %s: stb/stb_image_write.h was not there when this was built HINT: make deps, or "
        "install libstb-dev, and make\n", out_path("loss.png"));
#endif
}

#include "dev/engine.c"     // defines: engine_options, engine_begin, engine_refit, engine_receive
// -------------------------------------------------------------------------------------------------
// Part 12: options, main
//
// One table says everything about an option. Parsing, --help, --config, the settings table, what
// state.json keeps and what --resume compares all read it. The value of an option comes from the
// strongest of four sources: the command line, the --config file, the run or adapter that is gone
// on with, the default.

// What state.json keeps: nothing, what shapes the run, what even --eval must agree with.
enum { NOT_KEPT, KEPT, MODEL };

static Option option_table[] = {
    // What is trained, on what, and where results go.
    {"model", 'm', TEXT, &opt.model, "", "DIR", MODEL, .help = "checkpoint; else a built-in model"},
    {"random-base", 0, FLAG, &opt.random_base, "0", "", MODEL, .help = "-m needs config.json only"},
    {"routing", 0, TEXT, &opt.routing, "", "LIST", MODEL, .help = "config.json's, key=value,.."},
    {"train", 'i', TEXT, &opt.train, "", "F", KEPT, .help = "training data; tiny: its source"},
    {"val", 'j', TEXT, &opt.val, "", "F", KEPT, .help = "validation data; tiny: the held-out tail"},
    {"out", 'o', TEXT, &opt.out, "out", "DIR", NOT_KEPT, .help = "logs, checkpoints, adapter"},
    // How much per step, and for how long.
    {"batch", 'b', COUNT, &opt.batch, "1", "N", KEPT, .help = "rows per rank and micro-batch"},
    {"seq", 't', COUNT, &opt.seq, "4096", "N", KEPT, .help = "tokens per row", .tiny = "256"},
    {"tokens-per-step", 'd', WHOLE, &opt.per_step, "0", "N", KEPT, .help = "0: b x t x ranks"},
    {"steps", 'x', WHOLE, &opt.steps, "0", "N", KEPT, .help = "0: --epochs", .tiny = "80"},
    {"epochs", 0, NUMBER, &opt.epochs, "1", "F", KEPT, .help = "passes over the data"},
    // The optimizer.
    {"lr", 'l', NUMBER, &opt.lr, "1e-4", "F", KEPT, .help = "peak", .tiny = "3e-3"},
    {"warmup", 'u', WHOLE, &opt.warmup, "10", "N", KEPT, .help = "steps; 0: none"},
    {"final-lr-frac", 'q', NUMBER, &opt.final_frac, "0.1", "F", KEPT, .help = "of lr, at the end"},
    {"schedule", 'k', WORD, &opt.schedule, "cosine", "cosine|constant", KEPT, .help = ""},
    {"weight-decay", 'c', NUMBER, &opt.decay, "0", "F", KEPT, .help = "of A and B"},
    {"clip", 0, NUMBER, &opt.clip, "1.0", "F", KEPT, .help = "largest gradient norm; 0: any"},
    {"beta1", 0, NUMBER, &opt.beta1, "0.9", "F", KEPT, .help = "of the mean; Muon: 0.95"},
    {"beta2", 0, NUMBER, &opt.beta2, "0.95", "F", KEPT, .help = "AdamW"},
    {"eps", 0, NUMBER, &opt.eps, "1e-8", "F", KEPT, .help = "AdamW"},
    {"optimizer", 0, WORD, &opt.optimizer, "adamw", "adamw|muon", KEPT, .help = ""},
    {"ns", 0, WORD, &opt.ns, "gram", "gram|standard", KEPT, .help = "Muon's Newton-Schulz"},
    // The adapters.
    {"lora-r", 0, COUNT, &opt.r, "8", "N", MODEL, .help = "rank of the adapters"},
    {"lora-alpha", 0, NUMBER, &opt.alpha, "32", "F", MODEL, .help = "their scale is alpha / r"},
    {"lora-targets", 0, TEXT, &opt.targets, "attn,shared,experts", "LIST", MODEL,
     .help = "groups, or wq_a, wq_b, wkv, wo_b, shared.w1 .. w3, experts.w1 .. w3"},
    {"adapter-names", 0, WORD, &opt.names, "vllm", "vllm|hf", KEPT, .help = "in saved adapters"},
    {"init-adapter", 0, TEXT, &opt.init, "", "DIR", NOT_KEPT, .help = "begin with this one"},
    // How data becomes rows.
    {"pack", 0, WORD, &opt.pack, "exact", "exact|off", KEPT, .help = "off: a row is one document"},
    {"no-shuffle", 0, FLAG, &opt.no_shuffle, "0", "", KEPT, .help = "keep the order of the files"},
    {"shuffle-seed", 0, WHOLE, &opt.shuffle_seed, "42", "N", KEPT, .help = "+ epoch: the order"},
    {"skip-bad-rows", 0, FLAG, &opt.skip_bad_rows, "0", "", KEPT, .help = "of JSONL"},
    {"overfit", 0, FLAG, &opt.overfit, "0", "", KEPT, .help = "the first step's rows forever"},
    {"show-data", 0, WHOLE, &opt.show_data, "0", "N", NOT_KEPT, .help = "print rows and stop"},
    {"loss-on", 0, WORD, &opt.loss_on, "assistant", "assistant|last|completion|all", KEPT,
     .help = "of chat JSONL"},
    // What happens between steps.
    {"val-every", 'v', WHOLE, &opt.val_every, "100", "N", KEPT, .help = "0: never", .tiny = "25"},
    {"val-steps", 0, COUNT, &opt.val_steps, "20", "N", KEPT, .help = "of b x ranks rows",
     .tiny = "10"},
    {"eval", 0, FLAG, &opt.eval, "0", "", NOT_KEPT, .help = "all of -j, else -i, and stop"},
    {"sample-every", 's', WHOLE, &opt.sample_every, "0", "N", KEPT, .help = "0: never; else also "
     "at the start and the end", .tiny = "1000"},
    {"sample-len", 'g', COUNT, &opt.sample_len, "64", "N", KEPT, .help = "tokens"},
    {"prompt", 0, TEXT, &opt.prompt, "", "S", KEPT, .help = "of samples: text or a row of JSON",
     .tiny = "// The "},
    {"save-every", 'n', WHOLE, &opt.save_every, "200", "N", KEPT, .help = "0: never"},
    {"keep", 0, COUNT, &opt.keep, "2", "N", KEPT, .help = "newest checkpoints"},
    {"resume", 'y', MAYBE, &opt.resume, "", "[DIR]", NOT_KEPT,
     .help = "go on from the newest checkpoint in --out or DIR; -l, --keep, ranks may differ"},
    {"reset-optim", 0, FLAG, &opt.reset_optim, "0", "", NOT_KEPT, .help = "resume without moments"},
    // Memory and arithmetic.
    {"recompute", 0, WORD, &opt.recompute, "fits", "fits|full|moe|none", KEPT, .help = ""},
    {"offload", 0, WHOLE, &opt.offload, "0", "N", NOT_KEPT, .help = "inputs of so many layers wait "
     "in host memory"},
    {"precision", 0, WORD, &opt.precision, "bf16", "bf16|fp8", KEPT, .help = "of the experts"},
    // Instead of training.
    {"dry-run", 0, FLAG, &opt.dry_run, "0", "", NOT_KEPT, .help = "plan memory and disk, and stop"},
    {"inspect", 0, FLAG, &opt.inspect, "0", "", NOT_KEPT, .help = "list the tensors and stop"},
    {"check-adapter", 0, TEXT, &opt.check_adapter, "", "DIR", NOT_KEPT, .help = "does it fit?"},
    {"bench", 0, WHOLE, &opt.bench, "0", "N", NOT_KEPT, .help = "time N steps, write nothing"},
    // Processes, and the rest.
    {"cpu", 0, FLAG, &opt.cpu, "0", "", NOT_KEPT, .help = "do not use GPUs"},
    {"gpus", 0, WHOLE, &opt.gpus, "0", "N", NOT_KEPT, .help = "0: all"},
    {"ranks", 0, COUNT, &opt.ranks, "1", "N", KEPT, .help = "processes on the CPU"},
    {"ep", 0, WHOLE, &opt.ep, "0", "N", KEPT, .help = "ranks that share the experts; 0: most"},
    {"gen-gpus", 0, WHOLE, &opt.gen_gpus, "0", "N", KEPT, .help = "the last N receive the weights"},
    {"refit-every", 0, COUNT, &opt.refit_every, "10", "N", KEPT, .help = "steps, and at both ends"},
    {"timeout", 0, NUMBER, &opt.timeout, "600", "S", NOT_KEPT, .help = "for a rank; 0: forever"},
    {"seed", 0, WHOLE, &opt.seed, "42", "N", MODEL, .help = "of adapters, samples, random base"},
    {"config", 0, TEXT, &opt.config, "", "F", NOT_KEPT, .help = "lines `name = value` or # text"},
    {"help", 'h', FLAG, &opt.help, "0", "", NOT_KEPT, .help = ""},
    {"version", 0, FLAG, &opt.version, "0", "", NOT_KEPT, .help = ""},
};
// Takes a value over from the run or the adapter that is gone on with. What the user says as well
// must be the same: a run that silently goes on with other settings is two runs in one log.
static inline void option_adopt(Option *o, const char *text, const char *whose) {
    int is_number = o->kind == WHOLE || o->kind == COUNT || o->kind == NUMBER;
    char where[PATH_SIZE + 4];
    snprintf(where, sizeof where, "%s: ", whose);
    if (!is_given(o->at)) { option_set(o, text, FROM_STATE, where); return; }
    if (o->at == &opt.alpha ? (float)strtod(o->text, NULL) == (float)strtod(text, NULL) // a float
        : is_number ? strtod(o->text, NULL) == strtod(text, NULL)
        : o->at == &opt.targets ? targets_parse(o->text) == targets_parse(text)
        : strcmp(o->text, text) == 0) { return; }
    int may_change = o->at == &opt.lr || o->at == &opt.keep;
    int split = o->at == &opt.ranks || o->at == &opt.ep;
    refuse_if(!may_change && !split, "--%s %s, but %s has %s HINT: leave it out", o->name, o->text,
              whose, text);
    say("plan   --%s %s -> %s%s\n", o->name, text, o->text, may_change ? "" :
           ": the same rows in the same order, but sums in another, so not bit for bit");
}

// r, alpha and targets are those of the adapter that the run begins with.
static inline void options_from_adapter(const char *dir) {
    int r, names;
    float alpha;
    unsigned targets;
    char text[256];
    adapter_read_config(dir, &r, &alpha, &targets, &names);
    snprintf(text, sizeof text, "%d", r);
    option_adopt(option_of(&opt.r), text, dir);
    snprintf(text, sizeof text, "%.9g", alpha);
    option_adopt(option_of(&opt.alpha), text, dir);
    size_t used = 0;
    for (int i = 0; i < TARGETS; i++) {
        if (!(targets >> i & 1)) { continue; }
        used += (size_t)snprintf(text + used, sizeof text - used, "%s%s", used ? "," : "",
                                 target_names[i].name);
    }
    option_adopt(option_of(&opt.targets), text, dir);
}

// ---- state.json: everything that a resumed run must know besides the tensors

// Random numbers have no state: they are functions of the seed and the step. The caller frees it.
static inline char *state_make(const Trainer *r) {
    char *text = NULL;
    size_t size;
    FILE *f = open_memstream(&text, &size);
    if (f == NULL) { die(EXIT_FIT, "no memory for the options"); }
    fprintf(f, "{\n  \"version\": 2,\n  \"step\": %d,\n  \"moments\": %d,\n  \"rows\": %zu,\n"
            "  \"epoch\": %d,\n  \"data_tokens\": %zu,\n  \"data_hash\": \"%016llx\",\n"
            "  \"options\": {",
            r->step, r->moments, (size_t)r->step * (opt.per_step / opt.seq), r->train.epoch,
            r->train.tokens, (unsigned long long)r->train.hash);
    const char *comma = "\n    ";
    for EACH_OPTION(o) {
        if (!o->kept) { continue; }
        fprintf(f, "%s\"%s\": ", comma, o->name);
        json_quote(f, o->text);
        comma = ",\n    ";
    }
    fprintf(f, "\n  }\n}\n");
    if (fclose(f) != 0) { die(EXIT_FIT, "no memory for the options"); }
    return text;
}

// The caller frees j.
static inline void state_open(Json *j, const char *checkpoint) {
    static char path[PATH_SIZE];        // j names it in messages
    char *text = training_state(checkpoint);
    json_parse(j, path_make(path, checkpoint, "/state.json", ""), text, strlen(text));
}

// Finds the checkpoint to go on from, and takes its run's options over.
static inline void options_from_state(char *checkpoint) {
    char path[PATH_SIZE];
    Json j;
    int newest = strcmp(opt.resume, "latest") == 0;
    if (!newest && access(path_make(path, opt.resume, "/state.json", ""), R_OK) == 0) {
        path_make(checkpoint, opt.resume, "", "");      // a checkpoint, not a folder of them
    } else {
        const char *out = newest ? opt.out : opt.resume;
        refuse_if(!training_find(out, checkpoint, PATH_SIZE), "--resume: no checkpoint in %s", out);
    }
    if (!newest && !is_given(&opt.out)) {               // its logs lie beside it
        char *slash = strrchr(path_make(path, checkpoint, "", ""), '/');
        if (slash == NULL) { strcpy(path, "."); } else { slash[slash == path] = 0; }
        option_set(option_of(&opt.out), path, FROM_STATE, "");
    }
    state_open(&j, checkpoint);
    int object = json_get(&j, 0, "options", '{');
    refuse_if(json_number(&j, json_get(&j, 0, "version", '0')) != 2, "%s is of another version of "
              "this program", j.file);
    for EACH_OPTION(o) {        // --eval: on the ranks there are, and what the user says holds
        int split = o->at == &opt.ranks || o->at == &opt.ep || o->at == &opt.gen_gpus ||
                    o->at == &opt.per_step || (o->at == &opt.val && is_given(&opt.train)) ||
                    (o->at == &opt.train && is_given(&opt.val));
        if (!o->kept || (opt.eval && o->kept == KEPT && (split || is_given(o->at)))) { continue; }
        option_adopt(o, json_text(&j, json_get(&j, object, o->name, '"')), checkpoint);
    }
    json_free(&j);
}

// ---- from options to a run

// The built-in model: the same architecture, every kind of layer, small enough for one core.
static const Config tiny_config = {
    .model_type = "deepseek_v4", .V = 264, .C = 128, .layers = 5, .H = 4, .D = 128, .rope_dim = 64,
    .Q = 128, .G = 2, .O = 128, .E = 8, .K = 2, .F = 128, .n_shared = 1, .hash_layers = 2,
    .window = 32, .index_heads = 2, .index_dim = 128, .index_topk = 16, .hc_iters = 20,
    .max_positions = 1048576, .bos = 256, .eos = 257, .norm_topk = 1, .route_scale = 1.5f,
    .swiglu_limit = 10, .norm_eps = 1e-6f, .hc_eps = 1e-6f, .rope_theta = 10000,
    .compress_theta = 160000, .yarn_factor = 16, .beta_fast = 32, .beta_slow = 1,
    .original_positions = 65536, .ratio = { 0, 4, 128, 4, 0 },
};

static inline void config_tiny(Config *c) {
    *c = tiny_config;
    for (int k = 0; k < ROUTE_KEYS; k++) { routing_set(k, route_keys[k].tiny, "built in"); }
    c->how = routing_resolve(&c->norm_topk, &c->route_scale, &c->swiglu_limit, c->E, c->K);
}

// --adapter-names as refit.c wants it.
static inline int adapter_naming(void) {
    return strcmp(opt.names, "hf") == 0 ? NAMES_HF : NAMES_VLLM;
}

// Reads all options. checkpoint (PATH_SIZE): the one to resume from, or "".
static inline void options_read(int argc, char **argv, char *checkpoint) {
    *checkpoint = 0;
    options.first = option_table;
    options.n = sizeof option_table / sizeof option_table[0];
    for EACH_OPTION(o) { option_set(o, o->normal, FROM_DEFAULT, ""); }
    options_from_argv(argc, argv);
    if (opt.help) {
        options_help("usage: ./train [options]\n\nFine-tunes DeepSeek-V4-Flash with LoRA. Without "
                     "options a tiny model of the\nsame architecture trains, in under a "
                     "minute.\n\n");
        exit(EXIT_OK);
    }
    if (opt.version) { printf("train 0.1, LoRA for DeepSeek-V4-Flash\n"); exit(EXIT_OK); }
    if (*opt.config) { options_from_file(opt.config); }
    refuse_if(*opt.init && *opt.resume, "--init-adapter begins a run, --resume goes on with one");
    refuse_if(opt.reset_optim && !*opt.resume, "--reset-optim needs --resume");
    refuse_if(is_given(&opt.steps) && opt.steps && is_given(&opt.epochs), "--steps and --epochs "
              "both say how long to train: one of them");
    if (is_given(&opt.epochs)) { option_set(option_of(&opt.steps), "0", FROM_STATE, ""); }
    if (*opt.resume) { options_from_state(checkpoint); }
    for EACH_OPTION(o) {
        if (o->tiny && !*opt.model) { option_set(o, o->tiny, FROM_DEFAULT, ""); }
    }
    if (*opt.optimizer == 'm') { option_set(option_of(&opt.beta1), "0.95", FROM_DEFAULT, ""); }
    if (*opt.init) { options_from_adapter(opt.init); }
    if (*opt.check_adapter) { options_from_adapter(opt.check_adapter); }
}

static char device_name[64];
static const char *why_cpu = "built without nvcc";
static Place place;                 // what a launcher says of this process,
static int launched, gpus;          // if one started it; GPUs to be used, of this node

// Checks what the options mean together, and derives those that were left open.
static inline void options_derive(const Config *c) {
    int needs_data = !opt.dry_run && !opt.bench && !opt.inspect && !*opt.check_adapter;
    refuse_if(*opt.model && needs_data && !*opt.train && !(opt.eval && *opt.val),
              "-m needs data: -i FILE.bin%s", opt.eval ? " or -j FILE.bin" : "");
    refuse_if(opt.beta1 >= 1 || opt.beta2 >= 1, "--beta1 and --beta2 must be below 1");
    refuse_if((float)opt.eps == 0 || (float)opt.alpha == 0, "--eps and --lora-alpha are above 0");
    refuse_if(*opt.optimizer == 'm' && opt.r > MUON_R, "--optimizer muon takes --lora-r up to %d, "
              "not %d", MUON_R, opt.r);
    refuse_if((opt.bench > 0) + opt.eval + opt.inspect + (opt.show_data > 0) +
              (*opt.check_adapter != 0) > 1, "--bench, --eval, --inspect, --show-data and "
              "--check-adapter are done one at a time");
    refuse_if(opt.bench > 1000 || (opt.bench && *opt.resume), "--bench times up to 1000 steps of a "
              "run of its own");
    refuse_if(opt.steps == 0 && !(opt.epochs > 0 && opt.epochs <= 1e4), "--epochs %g: more than 0, "
              "and at most 10000", opt.epochs);
    refuse_if(opt.seq < 2 || opt.seq > c->max_positions, "--seq %d: a row has 2 to %d tokens",
              opt.seq, c->max_positions);
    refuse_if(opt.sample_len >= c->max_positions, "--sample-len %d: the model has %d positions",
              opt.sample_len, c->max_positions);
    refuse_if(opt.offload > c->layers, "--offload %d: the model has %d layers", opt.offload,
              c->layers);
    adapter_check_names(targets_parse(opt.targets), adapter_naming());
    opt.ranks -= engine_options(c, launched);       // from here on: those that train
    // A node's ranks and experts are split evenly: the default is the greatest common divisor.
    int ep = launched ? place.locals : opt.ranks;
    for (int rest = c->E; rest; ) { int next = ep % rest; ep = rest; rest = next; }
    if (opt.ep == 0) { opt.ep = ep; }   // not in the table: it follows the ranks of each resume
    refuse_if(opt.ranks % opt.ep != 0 || c->E % opt.ep != 0, "--ep %d does not divide both %d "
              "ranks and %d experts HINT: --ep %d", opt.ep, opt.ranks, c->E, ep);
    double least = (double)opt.batch * opt.seq * opt.ranks;
    refuse_if(least > INT_MAX / 4, "%g tokens in one micro-batch are too many", least);
    if (opt.per_step == 0) {            // tiny: at least 1024, or its gradients are mostly noise
        option_derive(&opt.per_step, *opt.model ? least : least * ceil(1024 / least));
    }
    refuse_if(opt.per_step % (int)least != 0, "--tokens-per-step %d is not a multiple of batch %d "
              "x seq %d x ranks %d = %.0f", opt.per_step, opt.batch, opt.seq, opt.ranks, least);
}

// Which path runs, and on how many ranks, is decided once, before anything is allocated: one rank
// per GPU, those that a launcher started, or --ranks on the CPU. A child counts the GPUs, so that
// this process has not touched CUDA when it forks ranks.
static inline void device_choose(void) {
#ifdef USE_CUDA
    enum { OTHERS = 255 };      // there are GPUs, but this program has no kernels for them
    int status = 0;
    fflush(NULL);
    pid_t child = opt.cpu ? -1 : fork();
    if (child == 0) {
        int there;
        gpu_count(&gpus, &there);
        _exit(there && gpus == 0 ? OTHERS : gpus < OTHERS ? gpus : OTHERS - 1);
    }
    if (child > 0) { waitpid(child, &status, 0); }
    gpus = child > 0 && WIFEXITED(status) ? WEXITSTATUS(status) : 0;
    why_cpu = gpus == OTHERS ? "a GPU here is no Hopper" : "no GPU found";
    if (gpus == OTHERS) { gpus = 0; }
#endif
    if (opt.cpu) { why_cpu = "--cpu"; }
    refuse_if(is_given(&opt.gpus) && opt.gpus > gpus, "--gpus %d, but this program can use %d here "
              "(%s)", opt.gpus, gpus, gpus ? "see what make said of NCCL" : why_cpu);
    refuse_if(launched && gpus == 0, "a launcher started %d ranks, but they meet through GPUs: %s "
              "HINT: ./train --cpu --ranks N starts ranks of its own", place.ranks, why_cpu);
    refuse_if(launched && is_given(&opt.ranks) && opt.ranks != place.ranks, "--ranks %d, but a "
              "launcher started %d", opt.ranks, place.ranks);
    if (opt.gpus > 0) { gpus = opt.gpus; }
    int asked = is_given(&opt.ranks) ? opt.ranks : gpus, was = opt.ranks;
    refuse_if(gpus && !launched && asked > gpus, "--ranks %d, but there is one rank per GPU, and "
              "%d of them HINT: --cpu", asked, gpus);
    if (gpus || launched) { option_derive(&opt.ranks, launched ? place.ranks : asked); }
    if (*opt.resume && was != opt.ranks) { say("plan   %d ranks -> %d\n", was, opt.ranks); }
}

// The settings, in llm.c's form. First which path runs, and why, and on which model.
static inline void print_settings(const Config *c) {
    static const char rule[] = "+-----------------+--------------------------------------------"
                               "----------------+\n";
    char text[256];
    int threads = 1;
#ifdef _OPENMP
    threads = omp_get_max_threads();
#endif
    if (this_rank != 0) { return; }
    if (*device_name) {
        snprintf(text, sizeof text, "GPU (%d x %s)", opt.ranks, device_name);
    } else {
        snprintf(text, sizeof text, "CPU (%s), %d rank%s x %d thread%s", why_cpu, opt.ranks,
                 plural(opt.ranks), threads, plural(threads));
    }
    if (opt.ranks > 1) {
        snprintf(text + strlen(text), 64, ", experts over %d", opt.ep);
    }
    printf("%s| %-15s | %-58s |\n%s| %-15s | %-58s |\n", rule, "setting", "value", rule, "path",
           text);
    snprintf(text, sizeof text, "%s: %d layers, hidden %d, %d experts", *opt.model ? opt.model :
             "tiny, built in", c->layers, c->C, c->E);
    printf("| %-15s | %-58s |\n", "model", text);
    for EACH_OPTION(o) {
        int is_off = o->kind == FLAG || !o->kept ? strcmp(o->text, "0") == 0 : 0;
        if (is_off || *o->text == 0 || o->at == &opt.model) { continue; }
        printf("| %-15s | %-58s |\n", o->name, o->text);
    }
    printf("%s", rule);
    routing_print();
    printf("plan   routing     %d experts, %d per token, %d shared, %d hash-routed layers (%s)\n",
           c->E, c->K, c->n_shared, c->hash_layers, *opt.model ? "config.json" : "built in");
    fflush(stdout);
}

// Rows are those of the first epoch; with shuffling, another one may have a few more or less.
static inline void data_say(const char *name, Data *d) {
    if (d->pieces == 0) { return; }
    data_seek(d, 0);
    say("data   %-5s %zu document%s, %zu tokens, %zu labels, %zu truncated, %zu dropped | "
        "%zu row%s of %d, %.1f %% full\n", name, d->documents, plural((int)d->documents), d->tokens,
        d->labels, d->truncated, d->bad + d->unlabelled, d->rows, plural((int)d->rows), d->t,
        100.0 * (double)d->tokens / ((double)d->rows * d->t));
    if (d->bad + d->unlabelled) {
        say("data   %-5s dropped: %zu bad row%s, %zu without labels in their first %d tokens\n",
            name, d->bad, plural((int)d->bad), d->unlabelled, d->t);
    }
    if (d->spelled) {
        say("data   %-5s %zu rows have control tokens in their text: taken as plain text\n", name,
            d->spelled);
    }
}

// Opens the data and fixes the length of the run.
static inline void load_data(Trainer *r) {
    int per_step = opt.per_step / opt.seq;
    r->train = r->val = (Data){ .V = r->config.V, .t = opt.seq, .seed = (uint64_t)opt.shuffle_seed,
                                .pack = strcmp(opt.pack, "exact") == 0,
                                .tokenizer = &r->tokenizer, .loss_on = loss_on_word(opt.loss_on),
                                .skip_bad_rows = opt.skip_bad_rows };
    const char *end = strrchr(opt.train, '.');
    refuse_if(end && strcmp(end, ".bin") == 0 && is_given(&opt.loss_on), "--loss-on %s, but %s was "
              "marked when it was made HINT: leave it out", opt.loss_on, opt.train);
    r->train.shuffle = !opt.no_shuffle && !opt.eval;
    if (*opt.train) { data_add(&r->train, opt.train); }
    else if (!*opt.model) { data_add_own_text(&r->train, &r->val); }
    if (*opt.val) {
        r->val.documents = r->val.tokens = r->val.labels = r->val.pieces = 0;
        data_add(&r->val, opt.val);
    }
    rows_alloc(&r->rows, per_step, opt.seq);
    batch_alloc(&r->batch, opt.batch * opt.seq);
    r->steps = opt.bench ? opt.bench + 1 : opt.steps;
    r->row_limit = (size_t)r->steps * per_step;
    if (opt.bench && r->train.pieces == 0) {
        data_add_random(&r->train, r->row_limit, (uint64_t)opt.seed);
    }
    if (r->steps == 0 && r->train.pieces) {
        r->row_limit = data_rows(&r->train, opt.epochs);
        size_t steps = (r->row_limit + per_step - 1) / per_step;
        refuse_if(steps > INT_MAX / 2, "%zu steps are too many", steps);
        r->steps = (int)steps;
    }
    data_say("train", &r->train);
    data_say("val", &r->val);
    int micro = micro_batches(per_step, opt.batch, opt.ranks);
    if (r->steps == 0) { return; }      // no training data: --eval, --dry-run
    say("plan   %d step%s of %d tokens = %d rank%s x %d micro-batch%s x %d row%s of %d\n", r->steps,
        plural(r->steps), opt.per_step, opt.ranks, plural(opt.ranks), micro, micro > 1 ? "es" : "",
        opt.batch, plural(opt.batch), opt.seq);
}

// --show-data: the first rows, labels green, what is only context grey.
static inline void show_data(Trainer *r) {
    for (int k = 0; k < opt.show_data && r->train.next < r->train.rows; k++) {
        data_take(&r->train, &r->rows, 1, 0);
        say("data   row %d: %d pieces, %zu tokens, %zu labels\n", k, r->rows.first[1],
            r->rows.tokens, r->rows.labels);
        for (const Piece *p = r->rows.piece; p < r->rows.piece + r->rows.first[1]; p++) {
            char held[5] = { 0 };
            for (int i = 0, color = -1; i < p->length; i++) {
                int label = i > 0 && p->token[i] & TOKEN_LABEL;
                if (label != color) { say("\033[%sm", label ? "32" : "90"); }
                color = label;
                show_token(stdout, r, (int)(p->token[i] & TOKEN_ID), held);
            }
            show_token(stdout, r, -1, held);
            say("\033[0m\n");
        }
    }
}

// mkdir -p OUT.
static inline void out_make(void) {
    char part[PATH_SIZE];
    path_make(part, opt.out, "", "");
    for (char *slash = part; (slash = strchr(slash + 1, '/')) != NULL; *slash = '/') {
        *slash = 0;
        mkdir(part, 0777);
    }
    refuse_if(mkdir(part, 0777) != 0 && errno != EEXIST, "cannot make the folder %s: %s", part,
              strerror(errno));
}

// Two runs in one folder would write into each other's logs. Held until the process ends.
static inline void out_lock(void) {
    out_make();
    int folder = open(opt.out, O_RDONLY | O_CLOEXEC);
    refuse_if(folder >= 0 && flock(folder, LOCK_EX | LOCK_NB) != 0 && errno == EWOULDBLOCK,
              "another run is writing to %s HINT: another -o", opt.out);
}

// Makes room in OUT for a new run: what an earlier one wrote there goes to previous-N. Files that
// this program does not write stay: OUT may be someone's home folder.
static inline void out_prepare(void) {
    static const char ours[] = "training.jsonl|validation.jsonl|loss.png|latest|adapter|"
                               "latest.tmp|adapter.tmp|adapter.old";
    char folder[PATH_SIZE] = "", name[64], to[PATH_SIZE];
    DIR *dir = opendir(opt.out);
    refuse_if(dir == NULL, "cannot read the folder %s: %s", opt.out, strerror(errno));
    for (struct dirent *e; (e = readdir(dir)) != NULL; ) {
        if (!is_word(ours, e->d_name) && strncmp(e->d_name, "checkpoint-", 11) != 0) { continue; }
        for (int n = 1; *folder == 0; n++) {    // the first number that is free
            snprintf(name, sizeof name, "previous-%d", n);
            int made = mkdir(out_path(name), 0777) == 0;
            refuse_if(!made && errno != EEXIST, "cannot make a folder in %s: %s", opt.out,
                      strerror(errno));
            if (made) { path_make(folder, out_path(name), "/", ""); }
        }
        refuse_if(rename(out_path(e->d_name), path_make(to, folder, e->d_name, "")) != 0,
                  "cannot move %s to %s: %s", out_path(e->d_name), to, strerror(errno));
    }
    closedir(dir);
    if (*folder) { say("save   what an earlier run left in %s is now in %s\n", opt.out, folder); }
}

// What adapter_config.json names as the base model, without its path.
static inline const char *base_name(void) { return *opt.model ? opt.model : "tiny"; }

// Before adapters are saved: the newest update may have made numbers that no loss has seen yet.
static inline void check_adapters(const Trainer *r) {
    const Adapters *a = &r->model.adapters;
    double bad = !isfinite(sum_squares(a->p, a->n_dense + a->n_expert)), any = bad;
    comm_max_double(COMM_WORLD, &any, 1, "save: finite");
    if (any > 0) { numerics_stop("numbers", bad > 0 ? "the adapters" : NULL, r->step); }
}

// Everything that --resume needs. Collective, like adapter_save.
static inline void save_training(Trainer *r) {
    double began = clock_seconds();
    check_adapters(r);
    char *state = state_make(r);
    Adapters host = adapters_host(&r->model.adapters);
    training_save(opt.out, r->step, opt.keep, &host, &r->config, adapter_naming(), base_name(),
                  state);
    adapters_host_end(&host, &r->model.adapters, 0);
    free(state);
    say("save  %5d | %s/checkpoint-%06d | %.1f s\n", r->step, opt.out, r->step,
        clock_seconds() - began);
}

// Adapter, moments and place in the data from a checkpoint.
static inline void resume(Trainer *r, const char *checkpoint) {
    Adapters *a = &r->model.adapters;
    size_t n = a->n_dense + a->n_expert;
    Json j;
    state_open(&j, checkpoint);
    const size_t step = json_size(&j, json_get(&j, 0, "step", '0'));
    const size_t moments = json_size(&j, json_get(&j, 0, "moments", '0'));
    size_t tokens = json_size(&j, json_get(&j, 0, "data_tokens", '0'));
    const uint64_t hash = strtoull(json_text(&j, json_get(&j, 0, "data_hash", '"')), NULL, 16);
    refuse_if(!opt.eval && tokens != r->train.tokens, "the data has changed: %zu tokens, but the "
              "run in %s has %zu", r->train.tokens, checkpoint, tokens);
    refuse_if(!opt.eval && hash != r->train.hash, "the data has changed: as many tokens as the run "
              "in %s has, but others, or in another order", checkpoint);
    refuse_if(step > (opt.eval ? INT_MAX : (size_t)r->steps) || moments > step, "%s: step %zd with "
              "%zd updates in its moments, of a run of %d steps", j.file, (ssize_t)step,
              (ssize_t)moments, r->steps);
    r->step = (int)step;
    r->moments = opt.reset_optim ? 0 : (int)moments;
    json_free(&j);
    Adapters host = adapters_host(a);
    if (opt.eval) {
        adapter_load(checkpoint, &host, &r->config);
        adapters_host_end(&host, a, 1);
        return;
    }
    training_load(checkpoint, &host, &r->config);
    adapters_host_end(&host, a, 1);
    if (opt.reset_optim) {
        zero(a->m, n * sizeof *a->m);
        if (a->v) { zero(a->v, n * sizeof *a->v); }
    }
    data_seek(&r->train, opt.overfit ? 0 : (size_t)r->step * (opt.per_step / opt.seq));
    say("load   %s | step %d of %d%s\n", checkpoint, r->step, r->steps,
        opt.reset_optim ? " | moments forgotten" : "");
}

// Validation, and how the experts were used by the step before it (validation counts rows as well).
static inline void show_validation(Trainer *r) {
    const ExpertLoad load = expert_load(r);
    if (r->val.pieces) {
        r->val_loss = validate(r, &r->val, opt.val_steps);
        log_validation(r->step, r->train.epoch, r->val_loss);
    }
    if (isnan(r->loss)) { return; }     // no step has counted its tokens yet
    say("moe  %5d | load max/mean %.2f | entropy %.2f of %.2f | fullest in layer %d: %.2f\n",
        r->step, load.worst, load.entropy, log((double)r->config.E), load.layer, load.layer_worst);
}

// Does something that is done every so many steps (0: never), and at both ends, come now?
static inline int is_due(const Trainer *r, int every) {
    return every > 0 && (r->step % every == 0 || r->step == r->steps);
}

// All steps of a run. Returns the exit code.
static inline int train(Trainer *r, const char *checkpoint) {
    double began = clock_seconds();
    Report report = { .stop = 0 };
    if (this_rank == 0) { out_lock(); }
    if (this_rank == 0 && is_of_out(checkpoint)) {      // a validation due at this step is repeated
        log_rewind("training.jsonl", "loss", r->step);
        log_rewind("validation.jsonl", "val_loss", r->step - is_due(r, opt.val_every));
    } else if (this_rank == 0) {
        out_prepare();
    }
    if (this_rank == 0) { atexit(plot_at_exit); }
    comm_barrier(COMM_WORLD, "load: making room in the output folder");
    catch_stop_signals();
    if (r->step == 0 && r->val.pieces == 0) {   // a number to compare with what the base can do
        double base = validate(r, &r->train, 1);
        say("base   loss %.6f | on the first rows, before training\n", base);
        data_seek(&r->train, 0);
    }
    for (;;) {
        if (is_due(r, opt.val_every)) { show_validation(r); }
        if (is_due(r, opt.sample_every)) { sample(r, &r->model, ""); }
        if (is_due(r, opt.refit_every)) { engine_refit(r, 0); }
        if (r->step == r->steps) { break; }
        train_step(r, &report);
        log_step(r, &report);
        int save = opt.save_every && r->step % opt.save_every == 0;
        if (save || report.stop) { save_training(r); }
        if (report.stop) { break; }
    }
    engine_refit(r, 1);
    check_adapters(r);
    Adapters host = adapters_host(&r->model.adapters);
    adapter_save(out_path("adapter"), &host, &r->config, adapter_naming(), base_name());
    adapters_host_end(&host, &r->model.adapters, 0);
    char loss[64] = "", val[64] = "";
    int seconds = (int)(clock_seconds() - began);
    if (!isnan(r->loss)) { snprintf(loss, sizeof loss, " | loss %.4f", r->loss); }
    if (!isnan(r->val_loss)) { snprintf(val, sizeof val, " | val %.4f", r->val_loss); }
    say("done   %d steps%s | %dm %02ds%s%s | adapter %s (r=%d alpha=%g, names=%s)\n",
        r->step, report.stop ? ", interrupted" : "", seconds / 60, seconds % 60, loss, val,
        out_path("adapter"), opt.r, opt.alpha, opt.names);
    return report.stop ? EXIT_INTERRUPTED : EXIT_OK;
}

// --eval: all of -j, else of -i, once.
static inline void evaluate(Trainer *r) {
    Data *d = r->val.pieces ? &r->val : &r->train;
    if (this_rank == 0) { out_make(); }
    log_validation(r->step, 0, validate(r, d, 0));
}

#include "dev/bench.c"      // defines: bench

// What every rank does once all of them are there. Returns the exit code.
static inline int run(Trainer *r, const char *checkpoint) {
    const Adapters *a = &r->model.adapters;
    int check = *opt.check_adapter != 0;
    char tiny[PATH_SIZE];
    const char *base = opt.random_base ? NULL : *opt.model ? opt.model : tiny_folder(tiny);
    r->loss = r->val_loss = NAN;
    tokenizer_open(&r->tokenizer, &r->config, opt.model);
    refuse_if(*opt.prompt && r->tokenizer.n == 0, "--prompt needs %s/tokenizer.json", opt.model);
    if (!opt.inspect && !check) { load_data(r); }
    if (opt.show_data) { show_data(r); return EXIT_OK; }
    if (comm_is_receiver()) { return engine_receive(r); }
    ModelOptions o = plan_memory(r);
    say("plan   %-11s %d matrices, %zu numbers on all ranks, %zu of this rank's experts\n",
        "trained", a->n, a->n_dense, a->n_expert);
    if (this_rank == 0 && o.training) { adapters_ledger(a); }
    if (opt.inspect) { return inspect_base(base, r->model.tensors, r->model.n_tensors, 1); }
    if (check) { inspect_adapter(a, &r->config, opt.check_adapter); return EXIT_OK; }
    if (!opt.eval && !opt.bench) { plan_disk(a, checkpoint, r->steps); }
    if (opt.dry_run) { return inspect_base(base, r->model.tensors, r->model.n_tensors, 0); }

    r->logits = (float *)host_alloc((size_t)r->config.V * sizeof *r->logits);
    r->context = (int *)host_alloc((size_t)o.max_tokens * sizeof *r->context);
    double began = clock_seconds();
    mem_open();                 // the second pass of what plan_memory counted
    model_alloc(&r->model, &r->config, &o);
    if (o.offload) { say("load   host memory, pinned | %.1f s\n", clock_seconds() - began); }
    began = clock_seconds();
    model_load(&r->model, base);
    comm_barrier(COMM_WORLD, "load");       // files may lie nearer to some ranks than to others
    for (int i = 0; r->model.moe.fp8 && i < r->config.layers; i++) {
        inspect_spread(&r->model.layer[i].moe, &r->model.moe, i, r->config.layers);
    }
    if (*opt.init) {
        Adapters host = adapters_host(a);
        adapter_load(opt.init, &host, &r->config);
        adapters_host_end(&host, a, 1);
        comm_barrier(COMM_WORLD, "load: all have read it");     // it may lie in OUT, and be moved
    }
    say("load   %s | %.1f s\n", base ? base : "random base", clock_seconds() - began);
    if (*checkpoint) { resume(r, checkpoint); }
    engine_begin(r);
    mem.closed = 1;             // from here on memory does not grow
    if (opt.eval) { evaluate(r); return EXIT_OK; }
    if (opt.bench) { bench(r); return EXIT_OK; }
    return train(r, checkpoint);
}

// Starts the ranks; from here on the program runs in every one of them. Each takes its GPU.
static inline void ranks_start(void) {
    if (launched) { out_make(); comm_join(place, opt.ep, opt.timeout); }
    else { place.local = comm_launch(opt.ranks + opt.gen_gpus, opt.ep, opt.timeout); }
#ifdef USE_CUDA
    if (gpus == 0) { return; }
    // A kernel loaded at its first use would wait for one that waits for another rank. And memory
    // that the switch between GPUs adds up in is not worth what it takes: sums come once a step.
    if (comm.all > 1) { setenv("CUDA_MODULE_LOADING", "EAGER", 0); }
    setenv("NCCL_NVLS_ENABLE", "0", 0);
    gpu_start(place.local % gpus, device_name, sizeof device_name);
    comm_connect(opt.out);
#endif
}

// The whole program, in a form that a test can call. Several ranks: returns in each of them.
int trainer(int argc, char **argv) {
    static Trainer r;
    char checkpoint[PATH_SIZE];
    setvbuf(stdout, NULL, _IOLBF, 0);   // several ranks write: the lines of one stay whole
    launched = launcher_place(&place) && place.ranks > 1;   // one alone may be a shell of srun's
    this_rank = place.rank;
    options_read(argc, argv, checkpoint);
    routing_given = opt.routing;
    if (*opt.model) { config_load(&r.config, opt.model); } else { config_tiny(&r.config); }
    device_choose();
    options_derive(&r.config);
    ranks_start();
    print_settings(&r.config);
    int code = run(&r, checkpoint);
    comm_barrier(COMM_WORLD, "the end");    // no GPU is taken away that another one is reading
    return code;
}

#ifndef TESTING
// OpenMP's threads wait for each other by spinning, unless told not to before the program starts:
// on a machine with other work that made a step ten times slower. So the program starts again.
int main(int argc, char **argv) {
    if (getenv("OMP_WAIT_POLICY") == NULL && setenv("OMP_WAIT_POLICY", "passive", 0) == 0) {
        execv("/proc/self/exe", argv);      // on failure just go on
    }
    return trainer(argc, argv);
}
#endif
#endif // TRAIN_C
