// model.h: small models and batches for the tests that run the whole model.
#ifndef MODEL_H
#define MODEL_H
#define TESTING
#include "../train.c"
#include "check.h"

// In [-1, 1), the same on every machine.
static inline double uniform(void) {
    static uint64_t i;
    return 2 * (double)random_uniform(12345, i++) - 1;
}

static inline void fill(real *x, size_t n, double size) {
    for (size_t i = 0; i < n; i++) { x[i] = (real)(size * uniform()); }
}

static inline void fill_act(act *x, size_t n, double size) {
    for (size_t i = 0; i < n; i++) { st(x + i, (real)(size * uniform())); }
}

#define NEW(type, n) ((type *)host_calloc(sizeof(type) * (size_t)(n)))

// The configuration T2 of dev/ref/model.py: every kind of layer, dims that fit the storage formats,
// and a clamp low enough to matter.
static inline Config t2_config(int K) {
    Config c = {
        .model_type = "deepseek_v4", .V = 512, .C = 256, .layers = 5, .H = 4, .D = 128,
        .rope_dim = 64, .Q = 128, .G = 2, .O = 128, .E = 8, .K = K, .F = 128, .n_shared = 1,
        .hash_layers = 2, .window = 32, .index_heads = 4, .index_dim = 128, .index_topk = 16,
        .hc_iters = 20, .max_positions = 1048576, .bos = 0, .eos = 1, .norm_topk = 1,
        .route_scale = 1.5f, .swiglu_limit = K == 2 ? 2.796875f : 2.8125f, .norm_eps = 1e-6f,
        .hc_eps = 1e-6f, .rope_theta = 10000, .compress_theta = 160000, .yarn_factor = 16,
        .beta_fast = 32, .beta_slow = 1, .original_positions = 65536, .ratio = {0, 4, 128, 4, 0},
    };
    return c;
}

// Builds the model with a random base and adapters that are not zero.
static inline void build(Model *m, const Config *c, int R, int max_tokens, int recompute,
                         uint64_t seed) {
    ModelOptions o = { .R = R, .alpha = 2.0f * R, .targets = targets_parse("attn,shared,experts"),
                       .max_tokens = max_tokens, .recompute = recompute, .training = 1,
                       .seed = seed };
    memset(m, 0, sizeof *m);
    mem_count();
    model_alloc(m, c, &o);
    mem_open();
    model_alloc(m, c, &o);
    model_load(m, NULL);
    Adapters host = adapters_host(&m->adapters);
    for (int i = 0; i < m->adapters.n; i++) {       // B too, or dA would be zero
        AdapterTensor *t = &m->adapters.tensors[i];
        uint64_t key = random_key(seed, t->name);
        double std = strstr(t->name, "lora_A") ? 1 / sqrt((double)t->cols) : 0.05;
        for (size_t k = 0; k < (size_t)t->rows * t->cols; k++) {
            host.p[t->at + k] = (real)(random_normal(key, k) * (std / RANDOM_STD));
        }
    }
    adapters_host_end(&host, &m->adapters, 1);
}

static inline void destroy(Model *m) {
    model_free(m);
    mem_free();
}

static inline size_t adapter_elements(const Model *m) {
    return m->adapters.n_dense + m->adapters.n_expert;
}

// Documents of those lengths with random tokens; a label is dropped here and there.
static inline Batch make_batch(const int *length, int docs, int V) {
    Batch b = { .docs = docs };
    b.doc_start = NEW(int, docs + 1);
    for (int i = 0; i < docs; i++) { b.doc_start[i + 1] = b.T += length[i]; }
    b.token = NEW(int, b.T);
    b.target = NEW(int, b.T);
    for (int t = 0; t < b.T; t++) {
        b.token[t] = (int)(random_bits(77, (uint64_t)t) % (uint64_t)V);
    }
    for (int i = 0; i < docs; i++) {
        for (int t = b.doc_start[i]; t < b.doc_start[i + 1]; t++) {
            int last = t + 1 == b.doc_start[i + 1];
            b.target[t] = last || random_bits(78, (uint64_t)t) % 5 == 0 ? -1 : b.token[t + 1];
        }
    }
    return b;
}

static inline void free_batch(Batch *b) {
    free(b->token);
    free(b->target);
    free(b->doc_start);
}
#endif // MODEL_H
