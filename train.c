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
// again when its turn comes in the backward pass (--recompute full) or kept (none).
//
// Every operation is a function on plain arrays, forward and backward, in the order in which the
// model uses them. Here they are text; kernels.cu will hold their twins.
//
// What accumulates: adapter gradients, the streams' gradient dX, a sublayer's dx and the real*
// dinp of every linear are += into buffers that the layer loop zeroed, because several callers
// feed them. All other gradients of activations are =.
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
    const uint8_t *wq_a, *wq_b, *wkv, *wo_a, *wo_b;     // fp8 codes: (Q,C) (H*D,Q) (D,C) (G*O,H*D/G) (C,G*O)
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
    {"hc_head_scale",      DT_F32,  GLOBAL, {D_1},             1, 0.3f, 0, AT_GLOBAL(hc_head.scale)},
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
    {"attn.compressor.ape",           DT_F32,  POOLED, {D_RATIO, D_POOL}, 0, 0.7f, 0, AT(pool.ape)},
    {"attn.compressor.wkv.weight",    DT_BF16, POOLED, {D_POOL, D_C},     0, 1, 1,    AT(pool.wkv)},
    {"attn.compressor.wgate.weight",  DT_BF16, POOLED, {D_POOL, D_C},     0, 1, 1,    AT(pool.wgate)},
    {"attn.compressor.norm.weight",   DT_BF16, POOLED, {D_D},             1, 0.2f, 0, AT(pool.norm)},
    {"attn.indexer.wq_b.weight",      DT_FP8,  CSA, {D_IHEADS, D_Q},  0, 1, 1, AT2(index_wq, index_sq)},
    {"attn.indexer.weights_proj.weight", DT_BF16, CSA, {D_IH, D_C},   0, 1, 1, AT(index_weights)},
    {"attn.indexer.compressor.ape",   DT_F32,  CSA, {D_RATIO, D_IPOOL}, 0, 0.7f, 0, AT(index_pool.ape)},
    {"attn.indexer.compressor.wkv.weight",   DT_BF16, CSA, {D_IPOOL, D_C}, 0, 1, 1, AT(index_pool.wkv)},
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
        case SCORED: return layer >= c->hash_layers;
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
    int shift = t->type == DT_FP8 ? floor_log2(t->std) - 6 : t->type == DT_FP4 ? floor_log2(t->std) : 0;
    double unit = (double)(float)(ldexp((double)t->std, -shift) / RANDOM_STD);
    if (t->type == DT_I64) {        // K distinct experts per token: a shuffle stopped after K cards
        int K = (int)t->dim[1], E = (int)t->std, *card = host_alloc(sizeof(int) * (size_t)E);
        int32_t *table = host_alloc(sizeof(int32_t) * n);
        for (size_t row = 0; row < t->dim[0]; row++) {
            for (int e = 0; e < E; e++) { card[e] = e; }
            for (int k = 0; k < K; k++) {
                int j = k + (int)(random_bits(key, row * (size_t)K + (size_t)k) % (uint64_t)(E - k));
                int drawn = card[j];
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
static inline void rmsnorm_row_backward(real *d, const act *inp, real rstd, const bf16 *w, int C) {
    // forward: out = w * x with x = inp * rstd. rstd depends on every element of inp, so with
    // a = w * dout:  dinp = rstd * (a - x * mean(a * x))
    real mean = 0;
    for (int c = 0; c < C; c++) {
        d[c] *= weight_of(w, c);
        mean += d[c] * (ld(inp + c) * rstd);
    }
    mean /= C;
    for (int c = 0; c < C; c++) { d[c] = rstd * (d[c] - ld(inp + c) * rstd * mean); }
}

// dinp (T,C) from dout (T,C), and inp, rstd of the forward.
void rmsnorm_backward(act *dinp, const real *dout, const act *inp, const real *rstd, const bf16 *w,
                      int T, int C) {
    GPU(rmsnorm_backward_gpu(dinp, dout, inp, rstd, w, T, C))
    #pragma omp parallel for
    for (int t = 0; t < T; t++) {
        real d[C];
        memcpy(d, dout + (size_t)t * C, sizeof d);
        rmsnorm_row_backward(d, inp + (size_t)t * C, rstd[t], w, C);
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

// One head of its backward, on reals, in place.
static inline void norm_rope_row_backward(real *d, const act *inp, real rstd, const bf16 *w,
                                          const real *turn, int D, int rope) {
    // forward: out = rotate(norm(inp)); so turn back, then the norm's backward
    rotate(d + D - rope, turn, rope, -1);
    rmsnorm_row_backward(d, inp, rstd, w, D);
}

// dinp (T,H,D) from dout (T,H,D) of the queries; dinp may be dout.
void norm_rope_backward(act *dinp, const act *dout, const act *inp, const real *rstd,
                        const real *table, const int *position, int T, int H, int D, int rope) {
    GPU(norm_rope_backward_gpu(dinp, dout, inp, rstd, table, position, T, H, D, rope))
    #pragma omp parallel for
    for (int t = 0; t < T; t++) {
        real d[D];
        for (int h = 0; h < H; h++) {
            size_t row = (size_t)t * H + h;
            load_rows(d, dout + row * D, (size_t)D);
            norm_rope_row_backward(d, inp + row * D, rstd[row], NULL,
                                   table + (size_t)position[t] * rope, D, rope);
            store_rows(dinp + row * D, d, (size_t)D);
        }
    }
}
TWIN(norm_rope_backward)

// The same for keys and entries: one head, a weight, and a gradient that was summed in real.
void key_norm_rope_backward(act *dinp, const real *dout, const act *inp, const real *rstd,
                            const bf16 *w, const real *table, const int *position, int n, int D,
                            int rope) {
    GPU(key_norm_rope_backward_gpu(dinp, dout, inp, rstd, w, table, position, n, D, rope))
    #pragma omp parallel for
    for (int row = 0; row < n; row++) {
        real d[D];
        memcpy(d, dout + (size_t)row * D, sizeof d);
        norm_rope_row_backward(d, inp + (size_t)row * D, rstd[row], w,
                               table + (size_t)position[row] * rope, D, rope);
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

// dX (T,HC,C) += what dm (T,M) says. dm is overwritten (scaled by r).
void hc_logits_backward(real *dX, real *dm, const real *m, const real *r, const act *X,
                        const float *fn, int T, int C, int M) {
    GPU(hc_logits_backward_gpu(dX, dm, m, r, X, fn, T, C, M))
    const int N = HC * C;
    #pragma omp parallel for
    for (int t = 0; t < T; t++) {
        // forward: m = r (fn X), r = (mean X^2 + eps)^(-1/2), so dr/dX = -r^3 X / N and
        // dX = r fn^T dm - (r^2 / N) <m, dm> X. Here the second term, below the first.
        real *dm_t = dm + (size_t)t * M, *dX_t = dX + (size_t)t * N;
        real along = r[t] * r[t] / N * dot(m + (size_t)t * M, dm_t, M);
        for (int k = 0; k < N; k++) { dX_t[k] -= along * ld(X + (size_t)t * N + k); }
        for (int i = 0; i < M; i++) { dm_t[i] *= r[t]; }
    }
    linear_f32_backward(dX, dm, fn, T, N, M);
}
TWIN(hc_logits_backward)

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

// pre (T,4), post (T,4), comb (T,4,4) from m (T,24) = [pre | post | comb row by row] logits,
// base (24) and scale (3), both frozen.
void hc_weights_forward(real *pre, real *post, real *comb, const real *m, const float *base,
                        const float *scale, float eps, int T, int iters) {
    GPU(hc_weights_forward_gpu(pre, post, comb, m, base, scale, eps, T, iters))
    #pragma omp parallel for
    for (int t = 0; t < T; t++) {
        const real *m_t = m + (size_t)t * HC_MIX;
        real *pre_t = pre + (size_t)t * HC, *post_t = post + (size_t)t * HC;
        real *comb_t = comb + (size_t)t * HC * HC, sums[2 * HC_MAX_ITERS * HC];
        for (int i = 0; i < HC; i++) {
            pre_t[i] = sigmoid(m_t[i] * scale[0] + base[i]) + (real)eps;        // never quite 0
            post_t[i] = 2 * sigmoid(m_t[HC + i] * scale[1] + base[HC + i]);     // 1 at logit 0
        }
        for (int i = 0; i < HC * HC; i++) {
            comb_t[i] = m_t[2 * HC + i] * scale[2] + base[2 * HC + i];
        }
        sinkhorn_forward(comb_t, sums, iters, eps);
    }
}
TWIN(hc_weights_forward)

// dm (T,24) = gradient of m, from dpre (T,4), dpost (T,4), dcomb (T,4,4). The forward is run again:
// 24 numbers per token are cheaper to keep than 39 half-steps.
void hc_weights_backward(real *dm, const real *dpre, const real *dpost, const real *dcomb,
                         const real *m, const float *base, const float *scale, float eps, int T,
                         int iters) {
    GPU(hc_weights_backward_gpu(dm, dpre, dpost, dcomb, m, base, scale, eps, T, iters))
    #pragma omp parallel for
    for (int t = 0; t < T; t++) {
        const real *m_t = m + (size_t)t * HC_MIX;
        real *dm_t = dm + (size_t)t * HC_MIX, *dlogits = dm_t + 2 * HC;
        real c[HC * HC], sums[2 * HC_MAX_ITERS * HC];
        for (int i = 0; i < HC; i++) {
            // forward: pre = s(m scale0 + base) + eps, so dm = dpre s (1 - s) scale0
            real s = sigmoid(m_t[i] * scale[0] + base[i]);
            dm_t[i] = dpre[(size_t)t * HC + i] * s * (1 - s) * scale[0];
            // forward: post = 2 s(m scale1 + base), so dm = dpost 2 s (1 - s) scale1
            s = sigmoid(m_t[HC + i] * scale[1] + base[HC + i]);
            dm_t[HC + i] = dpost[(size_t)t * HC + i] * 2 * s * (1 - s) * scale[1];
        }
        for (int i = 0; i < HC * HC; i++) {
            c[i] = m_t[2 * HC + i] * scale[2] + base[2 * HC + i];
            dlogits[i] = dcomb[(size_t)t * HC * HC + i];
        }
        sinkhorn_forward(c, sums, iters, eps);
        sinkhorn_backward(dlogits, c, sums, iters, eps);
        for (int i = 0; i < HC * HC; i++) { dlogits[i] *= scale[2]; }   // logit = m scale2 + base
    }
}
TWIN(hc_weights_backward)

// The head only collapses: pre (T,4) from m (T,4).
void hc_head_weights_forward(real *pre, const real *m, const float *base, const float *scale,
                             float eps, int T) {
    GPU(hc_head_weights_forward_gpu(pre, m, base, scale, eps, T))
    for (int i = 0; i < T * HC; i++) {
        pre[i] = sigmoid(m[i] * scale[0] + base[i % HC]) + (real)eps;
    }
}
TWIN(hc_head_weights_forward)

void hc_head_weights_backward(real *dm, const real *dpre, const real *m, const float *base,
                              const float *scale, int T) {
    GPU(hc_head_weights_backward_gpu(dm, dpre, m, base, scale, T))
    for (int i = 0; i < T * HC; i++) {
        // forward: pre = s(m scale + base) + eps
        real s = sigmoid(m[i] * scale[0] + base[i % HC]);
        dm[i] = dpre[i] * s * (1 - s) * scale[0];
    }
}
TWIN(hc_head_weights_backward)

// u (T,C) = sum_i pre[i] X[i].
void hc_collapse_forward(act *u, const act *X, const real *pre, int T, int C) {
    GPU(hc_collapse_forward_gpu(u, X, pre, T, C))
    #pragma omp parallel for
    for (int t = 0; t < T; t++) {
        const act *X_t = X + (size_t)t * HC * C;
        const real *p = pre + (size_t)t * HC;
        for (int c = 0; c < C; c++) {
            st(u + (size_t)t * C + c, p[0] * ld(X_t + c) + p[1] * ld(X_t + C + c) +
                                      p[2] * ld(X_t + 2 * C + c) + p[3] * ld(X_t + 3 * C + c));
        }
    }
}
TWIN(hc_collapse_forward)

// dX (T,HC,C) += and dpre (T,HC) =, from du (T,C).
void hc_collapse_backward(real *dX, real *dpre, const act *du, const act *X, const real *pre, int T,
                          int C) {
    GPU(hc_collapse_backward_gpu(dX, dpre, du, X, pre, T, C))
    #pragma omp parallel for
    for (int t = 0; t < T; t++) {
        real d[C];
        load_rows(d, du + (size_t)t * C, (size_t)C);
        for (int i = 0; i < HC; i++) {
            // forward: u = sum_i pre[i] X[i]
            size_t stream = ((size_t)t * HC + i) * C;
            dpre[(size_t)t * HC + i] = dot_act(d, X + stream, C);
            real p = pre[(size_t)t * HC + i];
            for (int c = 0; c < C; c++) { dX[stream + c] += p * d[c]; }
        }
    }
}
TWIN(hc_collapse_backward)

// Y[j] (T,HC,C) = post[j] o + sum_i comb[i][j] X[i], o (T,C) the sublayer's output.
void hc_deal_forward(act *Y, const act *o, const act *X, const real *post, const real *comb, int T,
                     int C) {
    GPU(hc_deal_forward_gpu(Y, o, X, post, comb, T, C))
    #pragma omp parallel for
    for (int t = 0; t < T; t++) {
        const act *X_t = X + (size_t)t * HC * C, *o_t = o + (size_t)t * C;
        const real *mix = comb + (size_t)t * HC * HC;
        for (int j = 0; j < HC; j++) {
            real p = post[(size_t)t * HC + j];
            for (int c = 0; c < C; c++) {
                st(Y + ((size_t)t * HC + j) * C + c, p * ld(o_t + c) +
                   mix[j] * ld(X_t + c) + mix[HC + j] * ld(X_t + C + c) +
                   mix[2 * HC + j] * ld(X_t + 2 * C + c) + mix[3 * HC + j] * ld(X_t + 3 * C + c));
            }
        }
    }
}
TWIN(hc_deal_forward)

// do_ (T,C) =, dpost (T,4) =, dcomb (T,4,4) =; dX (T,HC,C) holds the gradient of Y on entry and
// that of X, through the mixing, on return: four values per channel, so it needs no second buffer.
void hc_deal_backward(act *do_, real *dpost, real *dcomb, real *dX, const act *o, const act *X,
                      const real *post, const real *comb, int T, int C) {
    GPU(hc_deal_backward_gpu(do_, dpost, dcomb, dX, o, X, post, comb, T, C))
    #pragma omp parallel for
    for (int t = 0; t < T; t++) {
        real *dY = dX + (size_t)t * HC * C;
        const real *p = post + (size_t)t * HC, *mix = comb + (size_t)t * HC * HC;
        for (int j = 0; j < HC; j++) {
            // forward: Y[j] = post[j] o + sum_i comb[i][j] X[i]
            dpost[(size_t)t * HC + j] = dot_act(dY + (size_t)j * C, o + (size_t)t * C, C);
            for (int i = 0; i < HC; i++) {
                dcomb[((size_t)t * HC + i) * HC + j] =
                    dot_act(dY + (size_t)j * C, X + ((size_t)t * HC + i) * C, C);
            }
        }
        for (int c = 0; c < C; c++) {
            real d[HC] = { dY[c], dY[C + c], dY[2 * C + c], dY[3 * C + c] };
            st(do_ + (size_t)t * C + c, p[0] * d[0] + p[1] * d[1] + p[2] * d[2] + p[3] * d[3]);
            for (int i = 0; i < HC; i++) {
                const real *row = mix + i * HC;
                dY[(size_t)i * C + c] = row[0] * d[0] + row[1] * d[1] + row[2] * d[2] + row[3] * d[3];
            }
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
    #define INTS(n) (on_host ? (int *)host_alloc(sizeof(int) * (size_t)(n)) : MEM(int, MEM_SCRATCH, n))
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

// out (P,D) from K, Z (T,halves*D) and ape (ratio,halves*D).
void pool_forward(act *out, const real *K, const real *Z, const float *ape, AttentionShape a,
                  const int *entry_position, int D) {
    GPU(pool_forward_gpu(out, K, Z, ape, a, entry_position, D))
    int n = halves(a.ratio), slots = n * a.ratio;
    #pragma omp parallel for
    for (int p = 0; p < a.P; p++) {
        real *weight = host_alloc(sizeof(real) * (size_t)slots * D), y[D];
        int channel;
        memset(y, 0, sizeof y);
        pool_weights(weight, &a, entry_position, Z, ape, p, D);
        for (int s = 0; s < slots; s++) {
            int row = pool_slot(&a, entry_position, p, s, &channel, D);
            if (row < 0) { continue; }
            for (int d = 0; d < D; d++) {
                y[d] += weight[(size_t)s * D + d] * K[(size_t)row * n * D + channel + d];
            }
        }
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
        memset(y, 0, sizeof y);
        load_rows(dy, dout + (size_t)p * D, (size_t)D);
        pool_weights(weight, &a, entry_position, Z, ape, p, D);
        for (int s = 0; s < slots; s++) {
            int row = pool_slot(&a, entry_position, p, s, &channel, D);
            if (row < 0) { continue; }
            for (int d = 0; d < D; d++) {
                y[d] += weight[(size_t)s * D + d] * K[(size_t)row * n * D + channel + d];
            }
        }
        for (int s = 0; s < slots; s++) {
            int row = pool_slot(&a, entry_position, p, s, &channel, D);
            if (row < 0) { continue; }
            for (int d = 0; d < D; d++) {
                // forward: y = sum_s w_s K_s, w = softmax_s(Z_s + ape_s)
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
        // Drop the lowest until topk are left would be slow; take the highest one by one instead,
        // marking what is taken. A kernel does better, this is the definition.
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
//     l_k = <q, key_k> / sqrt(D),   p_k = exp(l_k) / (sum_k exp(l_k) + exp(sink)),   o = sum_k p_k key_k

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
    return a->W + (selected ? a->topk : a->P);
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
                // forward: l = scale <q, key>, p = exp(l - lse), o = sum_k p key. So dp = <do, key>,
                // and the softmax makes dl = p (dp - sum_k p dp) = p (dp - <do, o>).
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
    real *m, *r;                // (T,24), (T): hc_logits
    real *pre, *post, *comb;    // (T,4), (T,4), (T,4,4)
    act *u, *x;                 // (T,C) collapsed streams; normalised: the sublayer's input
    real *rstd;                 // (T)
} Site;

// What one layer leaves for its own backward. One set for all layers with --recompute full.
typedef struct {
    Site attn, ffn;
    act *cq_raw, *cq;           // (T,Q) low-rank query, before and after its norm
    act *q_raw, *q;             // (T,H,D) before and after norm and RoPE
    act *kv_raw, *kv;           // (T,D) likewise; key and value at once
    real *cq_rstd, *q_rstd, *kv_rstd, *entry_rstd;      // (T), (T,H), (T), (P)
    real *K, *Z;                // (T,halves*D) the compressor's projections
    act *pooled, *entries;      // (P,D) before and after norm and RoPE
    act *o;                     // (T,H,D) attention output, turned back to position 0
    real *lse;                  // (T,H)
    act *v, *a;                 // (T,G*O), (T,C): group outputs; the sublayer's output
    act *X_mid;                 // (T,HC,C) streams between the two sites
    real *uq_a, *uq_b, *ukv, *uo_b;     // (T,R) adapters' A x
} LayerActs;

// What every layer keeps from forward to backward.
typedef struct {
    act *X;                     // (T,HC,C) the layer's input
    act *f;                     // (T,C) output of the experts: needed for dpost, dear to recompute
    MoeSaved moe;
    int *selected;              // (T,topk) the indexer's choice; NULL if all entries always fit
} LayerSaved;

// Buffers of the backward pass, and of the indexer.
typedef struct {
    real *dX;                   // (T,HC,C) gradient of the streams, from layer to layer
    act *dout;                  // (T,C) of a sublayer's output
    real *dx;                   // (T,C) of a sublayer's input, before the norm's backward
    act *du;                    // (T,C) of the collapsed streams
    real *dpre, *dpost, *dcomb, *dm;
    real *dv;                   // (T,G*O)
    act *do_, *dq;              // (T,H,D)
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

typedef struct {
    int R;                      // adapter rank
    float alpha;
    unsigned targets;           // bits TARGET_*
    int max_tokens;             // of a micro-batch or a sample
    int recompute;              // 1: full, 0: none
    int training;               // 0: forward only, for evaluation
    uint64_t seed;              // of the random base and the adapters' start
} ModelOptions;

typedef struct {
    Config config;
    ModelOptions options;
    Globals globals;
    Layer *layer;               // (layers)
    Tensor *tensors;            // the checkpoint's tensors, with their places
    size_t n_tensors;
    Adapters adapters;
    MoeDims moe;
    MoeScratch moe_scratch;
    long *expert_count;         // (E) rows per expert since the caller last cleared it
    real *rope[2];              // (max_tokens, rope_dim/2, 2): window layers, compressed layers
    Documents documents, documents_h;   // of the micro-batch; _h: on the host
    int *token, *target;        // (max_tokens) of the micro-batch, where operations read them
    LayerActs *acts;            // (layers), or (1)
    LayerSaved *saved;          // (layers); X of the last layer's output is X_out
    act *X_out;                 // (T,HC,C)
    IndexScratch index;
    Gradients grad;
    Site head;                  // of part 7: m (T,4), r, pre, u = z (T,C), x, rstd
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

// Streams -> mixing weights -> the sublayer's normalised input.
static void site_enter(Site *s, const act *X, HyperConnection hc, const bf16 *norm,
                       const Config *c, int T) {
    hc_logits_forward(s->m, s->r, X, hc.fn, c->norm_eps, T, c->C, HC_MIX);
    hc_weights_forward(s->pre, s->post, s->comb, s->m, hc.base, hc.scale, c->hc_eps, T, c->hc_iters);
    hc_collapse_forward(s->u, X, s->pre, T, c->C);
    rmsnorm_forward(s->x, s->rstd, s->u, norm, c->norm_eps, T, c->C);
}

// The gradient of a sublayer's input, grad->dx, back into the streams: grad->dX +=. dpost and dcomb
// of the same site are in place already.
static void site_leave_backward(Model *m, const Site *s, const act *X, HyperConnection hc,
                                const bf16 *norm) {
    const Config *c = &m->config;
    Gradients *g = &m->grad;
    int T = m->documents.T;
    rmsnorm_backward(g->du, g->dx, s->u, s->rstd, norm, T, c->C);
    hc_collapse_backward(g->dX, g->dpre, g->du, X, s->pre, T, c->C);
    hc_weights_backward(g->dm, g->dpre, g->dpost, g->dcomb, s->m, hc.base, hc.scale, c->hc_eps, T,
                        c->hc_iters);
    hc_logits_backward(g->dX, g->dm, s->m, s->r, X, hc.fn, T, c->C, HC_MIX);
}

// The entries of one layer: keys pooled from x.
static void entries_forward(LayerActs *a, const Model *m, const Layer *l, AttentionShape shape) {
    const Config *c = &m->config;
    const int *position = m->documents.of[entries_of(shape.ratio)].position;
    int N = halves(shape.ratio) * c->D;
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

    lora_linear_forward(a->cq_raw, a->uq_a, x, l->wq_a, l->sq_a, l->lq_a.a, l->lq_a.b, scale,
                        T, c->C, c->Q, R);
    rmsnorm_forward(a->cq, a->cq_rstd, a->cq_raw, l->q_norm, c->norm_eps, T, c->Q);
    lora_linear_forward(a->q_raw, a->uq_b, a->cq, l->wq_b, l->sq_b, l->lq_b.a, l->lq_b.b, scale,
                        T, c->Q, N, R);
    norm_rope_forward(a->q, a->q_rstd, a->q_raw, NULL, rope, shape.position, c->norm_eps,
                      T, c->H, c->D, c->rope_dim);
    lora_linear_forward(a->kv_raw, a->ukv, x, l->wkv, l->skv, l->lkv.a, l->lkv.b, scale,
                        T, c->C, c->D, R);
    norm_rope_forward(a->kv, a->kv_rstd, a->kv_raw, l->kv_norm, rope, shape.position, c->norm_eps,
                      T, 1, c->D, c->rope_dim);
    if (shape.ratio) { entries_forward(a, m, l, shape); }
    int indexed = indexer_matters(m, saved, i);
    if (indexed && !again) { indexer_forward(saved->selected, m, l, a, shape); }
    attention_forward(a->o, a->lse, a->q, a->kv, a->entries, l->sink,
                      indexed ? saved->selected : NULL, shape);
    // Values carry the rotation of their own position; turned back by the query's, what is left
    // depends on the distance alone.
    rope_apply(a->o, rope, shape.position, -1, T, c->H, c->D, c->rope_dim);
    group_output_forward(a->v, a->o, l->wo_a, l->so_a, T, c->G, N / c->G, c->O);
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
    hc_deal_forward(a->X_mid, a->a, X, a->attn.post, a->attn.comb, T, c->C);
    site_enter(&a->ffn, a->X_mid, l->hc_ffn, l->ffn_norm, c, T);
}

// X_out (T,HC,C) from saved[i].X.
static void layer_forward(Model *m, int i, act *X_out, const int *token) {
    LayerActs *a = m->options.recompute ? m->acts : &m->acts[i];
    LayerSaved *s = &m->saved[i];
    int T = m->documents.T;
    layer_first_half(m, i, a, 0);
    moe_forward(s->f, &s->moe, a->ffn.x, token, &m->layer[i].moe, &m->moe, &m->moe_scratch,
                m->expert_count, T);
    hc_deal_forward(X_out, s->f, a->X_mid, a->ffn.post, a->ffn.comb, T, m->config.C);
}

// From g->dentries to dx: the compressor's backward.
static void entries_backward(Model *m, const Layer *l, const LayerActs *a, AttentionShape shape) {
    const Config *c = &m->config;
    const int *position = m->documents.of[entries_of(shape.ratio)].position;
    Gradients *g = &m->grad;
    int N = halves(shape.ratio) * c->D;
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

    zero(g->dv, sizeof(real) * (size_t)T * c->G * c->O);
    lora_linear_backward(g->dv, l->lo_b.da, l->lo_b.db, g->dout, a->v, a->uo_b, l->wo_b, l->so_b,
                         l->lo_b.a, l->lo_b.b, scale, T, c->G * c->O, c->C, R);
    group_output_backward(g->do_, g->dv, l->wo_a, l->so_a, T, c->G, N / c->G, c->O);
    // <do, o> does not change when both are turned, so it is taken while both are turned back.
    attention_delta(g->delta, g->do_, a->o, T, c->H, c->D);
    rope_apply(g->do_, rope, shape.position, 1, T, c->H, c->D, c->rope_dim);
    attention_backward_query(g->dq, g->do_, g->delta, a->lse, a->q, a->kv, a->entries, selected,
                             shape);
    attention_backward_key(g->dkv, g->dentries, g->do_, g->delta, a->lse, a->q, a->kv, a->entries,
                           selected, shape);

    norm_rope_backward(g->dq, g->dq, a->q_raw, a->q_rstd, rope, shape.position, T, c->H, c->D,
                       c->rope_dim);
    zero(g->dcq, sizeof(real) * (size_t)T * c->Q);
    lora_linear_backward(g->dcq, l->lq_b.da, l->lq_b.db, g->dq, a->cq, a->uq_b, l->wq_b, l->sq_b,
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
// again unless it was kept; moe_backward redoes the experts' first products itself.
static void layer_backward(Model *m, int i) {
    const Config *c = &m->config;
    const Layer *l = &m->layer[i];
    LayerActs *a = m->options.recompute ? m->acts : &m->acts[i];
    LayerSaved *s = &m->saved[i];
    Gradients *g = &m->grad;
    int T = m->documents.T;
    if (m->options.recompute) { layer_first_half(m, i, a, 1); }

    hc_deal_backward(g->dout, g->dpost, g->dcomb, g->dX, s->f, a->X_mid, a->ffn.post, a->ffn.comb,
                     T, c->C);
    zero(g->dx, sizeof(real) * (size_t)T * c->C);
    moe_backward(g->dx, g->dout, &s->moe, a->ffn.x, &l->moe, &m->moe, &m->moe_scratch, T);
    site_leave_backward(m, &a->ffn, a->X_mid, l->hc_ffn, l->ffn_norm);

    hc_deal_backward(g->dout, g->dpost, g->dcomb, g->dX, a->a, s->X, a->attn.post, a->attn.comb,
                     T, c->C);
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
        real *x = host_alloc(sizeof(real) * (size_t)tile * C), *dx = host_alloc(sizeof(real) * (size_t)tile * C);
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
    hc_logits_forward(s->m, s->r, m->X_out, hc.fn, c->norm_eps, T, c->C, HC);
    hc_head_weights_forward(s->pre, s->m, hc.base, hc.scale, c->hc_eps, T);
    hc_collapse_forward(s->u, m->X_out, s->pre, T, c->C);
    rmsnorm_forward(s->x, s->rstd, s->u, m->globals.norm, c->norm_eps, T, c->C);
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
    Gradients *g = &m->grad;
    int T = m->documents.T;
    scale_reals(m->dhead, scale, (size_t)T * c->C);
    zero(g->dX, sizeof(real) * (size_t)T * HC * c->C);
    rmsnorm_backward(g->du, m->dhead, s->u, s->rstd, m->globals.norm, T, c->C);
    hc_collapse_backward(g->dX, g->dpre, g->du, m->X_out, s->pre, T, c->C);
    hc_head_weights_backward(g->dm, g->dpre, s->m, hc.base, hc.scale, T);
    hc_logits_backward(g->dX, g->dm, s->m, s->r, m->X_out, hc.fn, T, c->C, HC);
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
        (snprintf(name, sizeof name, "layers.%d.%s", i, module), adapter_add(s, target, name, in, out))
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

static void site_alloc(Site *s, int class_, size_t T, int C, int M) {
    s->m = MEM(real, class_, T * M);
    s->r = MEM(real, class_, T);
    s->pre = MEM(real, class_, T * HC);
    s->post = MEM(real, class_, T * HC);
    s->comb = MEM(real, class_, T * HC * HC);
    s->u = MEM(act, class_, T * C);
    s->x = MEM(act, class_, T * C);
    s->rstd = MEM(real, class_, T);
}

// Room for one layer's activations. ratio 4 has the most of everything.
static void acts_alloc(LayerActs *a, const Config *c, size_t T, int R) {
    int class_ = MEM_ACTIVATIONS;
    size_t N = (size_t)c->H * c->D, P = T / 4;
    site_alloc(&a->attn, class_, T, c->C, HC_MIX);
    site_alloc(&a->ffn, class_, T, c->C, HC_MIX);
    a->cq_raw = MEM(act, class_, T * c->Q);
    a->cq = MEM(act, class_, T * c->Q);
    a->q_raw = MEM(act, class_, T * N);
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
    a->X_mid = MEM(act, class_, T * HC * c->C);
    a->uq_a = MEM(real, class_, T * R);
    a->uq_b = MEM(real, class_, T * R);
    a->ukv = MEM(real, class_, T * R);
    a->uo_b = MEM(real, class_, T * R);
}

static void gradients_alloc(Gradients *g, const Config *c, size_t T) {
    size_t N = (size_t)c->H * c->D, P = T / 4;
    g->dX = MEM(real, MEM_SCRATCH, T * HC * c->C);
    g->dout = MEM(act, MEM_SCRATCH, T * c->C);
    g->dx = MEM(real, MEM_SCRATCH, T * c->C);
    g->du = MEM(act, MEM_SCRATCH, T * c->C);
    g->dpre = MEM(real, MEM_SCRATCH, T * HC);
    g->dpost = MEM(real, MEM_SCRATCH, T * HC);
    g->dcomb = MEM(real, MEM_SCRATCH, T * HC * HC);
    g->dm = MEM(real, MEM_SCRATCH, T * HC_MIX);
    g->dv = MEM(real, MEM_SCRATCH, T * c->G * c->O);
    g->do_ = MEM(act, MEM_SCRATCH, T * N);
    g->dq = MEM(act, MEM_SCRATCH, T * N);
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
// share the rest.
static void saved_alloc(Model *m, size_t T) {
    const Config *c = &m->config;
    int training = m->options.training, truncates = T / 4 > (size_t)c->index_topk;
    for (int i = 0; i < c->layers; i++) {
        LayerSaved *s = &m->saved[i];
        if (!training && i > 0) { *s = m->saved[0]; }
        if (!training && i > 1) { s->X = m->saved[i % 2].X; continue; }
        s->X = MEM(act, MEM_ACTIVATIONS, T * HC * c->C);
        if (!training && i == 1) { continue; }
        s->f = MEM(act, MEM_ACTIVATIONS, T * c->C);
        moe_alloc_saved(&s->moe, &m->moe, (int)T);
        int selects = truncates && (c->ratio[i] == 4 || !training);
        s->selected = selects ? MEM(int, MEM_ACTIVATIONS, T * c->index_topk) : NULL;
    }
    m->X_out = MEM(act, MEM_ACTIVATIONS, T * HC * c->C);
}

// Places everything the model needs into the arenas. Called twice: while counting (contract, 1.4)
// and for real. m is zero before the first call.
void model_alloc(Model *m, const Config *c, const ModelOptions *o) {
    size_t T = (size_t)o->max_tokens;
    m->config = *c;
    m->options = *o;
    m->options.recompute = o->recompute || !o->training;
    m->n_tensors = 0;
    m->moe = (MoeDims){
        .C = c->C, .E = c->E, .K = c->K, .F = c->F, .R = o->R, .local = c->E / comm_ep(),
        .first = comm_ep_rank() * (c->E / comm_ep()), .limit = c->swiglu_limit,
        .route_scale = c->route_scale, .norm_topk = c->norm_topk, .lora_scale = o->alpha / o->R,
    };
    if (m->layer == NULL) {
        m->layer = host_calloc(sizeof(Layer) * (size_t)c->layers);
        m->saved = host_calloc(sizeof(LayerSaved) * (size_t)c->layers);
        m->acts = host_calloc(sizeof(LayerActs) * (size_t)c->layers);
        m->expert_count = host_calloc(sizeof(long) * (size_t)c->E);
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
    if (mem.counting) {                 // sizes first: dense adapters lie before the experts'
        m->adapters.p = NULL;
        adapters_begin(&m->adapters);
        for (int i = 0; i < c->layers; i++) { adapters_place(m, i); }
    }
    adapters_alloc(&m->adapters, o->training);
    adapters_begin(&m->adapters);
    for (int i = 0; i < c->layers; i++) { adapters_place(m, i); }

    for (int k = 0; k < 2; k++) { m->rope[k] = MEM(real, MEM_ACTIVATIONS, T * c->rope_dim); }
    documents_alloc(&m->documents, (int)T, 0);
    m->token = MEM(int, MEM_SCRATCH, T);
    m->target = MEM(int, MEM_SCRATCH, T);
    m->logits = MEM(real, MEM_SCRATCH, c->V);
    saved_alloc(m, T);
    for (int i = 0; i < (m->options.recompute ? 1 : c->layers); i++) {
        acts_alloc(&m->acts[i], c, T, o->R);
    }
    site_alloc(&m->head, MEM_ACTIVATIONS, T, c->C, HC);
    m->loss = MEM(real, MEM_ACTIVATIONS, T);
    index_alloc(&m->index, c, T);
    moe_alloc_scratch(&m->moe_scratch, &m->moe, (int)T, o->training);
    if (o->training) {
        m->dhead = MEM(real, MEM_SCRATCH, T * c->C);
        gradients_alloc(&m->grad, c, T);
    }
}

// The host's lists; the arenas are the caller's.
void model_free(Model *m) {
    if (m->layer == NULL) { return; }
    documents_free_host(&m->documents_h);
    free(m->loss_h);
    free(m->layer);
    free(m->saved);
    free(m->acts);
    free(m->expert_count);
    free(m->tensors);
    free(m->adapters.tensors);
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
    for (int k = 0; k < 2; k++) { rope_table(m->rope[k], c, k, m->options.max_tokens); }
    adapters_init(&m->adapters, m->options.seed);
}

// Streams through all layers, up to the head's input.
static void model_run(Model *m, const Batch *b) {
    const Config *c = &m->config;
    require(b->T <= m->options.max_tokens);
    documents_set(&m->documents_h, b->doc_start, b->docs);
    documents_upload(&m->documents, &m->documents_h);
    upload(m->token, b->token, sizeof(int) * (size_t)b->T);
    embed_forward(m->saved[0].X, m->globals.embed, m->token, b->T, c->C);
    for (int i = 0; i < c->layers; i++) {
        layer_forward(m, i, i + 1 < c->layers ? m->saved[i + 1].X : m->X_out, m->token);
    }
    head_enter(m);
}

// The sum of -log p over the labels of this rank's micro-batch, in nats. train: keeps what
// model_backward needs. Ranks call it the same number of times: the experts' exchange waits for all.
double model_forward(Model *m, const Batch *b, int train) {
    const Config *c = &m->config;
    double sum = 0;
    require(!train || m->options.training);
    model_run(m, b);
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
    for (int i = m->config.layers - 1; i >= 0; i--) { layer_backward(m, i); }
}

// The logits (V) of what follows the last of T tokens, taken as one document.
void model_next_logits(Model *m, const int *token, int T, float *logits) {
    const Config *c = &m->config;
    int start[2] = { 0, T };
    Batch b = { .T = T, .docs = 1, .token = (int *)token, .doc_start = start };
    model_run(m, &b);
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
    for (int i = 0; i <= m->config.layers; i++) {
        download(X, i < m->config.layers ? m->saved[i].X : m->X_out, sizeof(act) * n);
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

#include "train_loop.inc"
#endif // TRAIN_C
