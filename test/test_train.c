// Tests of the model (train.c parts 2-8): check vectors, gradients against central differences, and
// packed documents against documents alone. Built three times: as it is, with -DACT=float, and with
// -DACT=double -DREAL=double, where the gradients are compared. test_vectors.c compares with
// PyTorch.
//
// Seen to fail on broken copies of train.c: comb transposed in hc_deal_forward; columns and rows
// swapped in Sinkhorn; `along` dropped or comb transposed in hc_enter_backward, its du without the
// norm, dm without r; the sink left out of the softmax;
// lse without the sink; delta dropped; dkv without its value part; window one too long; entries
// visible one token early; A and B halves of the compressor swapped; the first entry of a document
// reading the tokens before it; ape dropped; o not turned back; norm's mean term dropped; topk in
// descending order (is_selected misses); sign of rotate in norm_rope_backward.
#include "model.h"

// -------------------------------------------------------------------------------------------------
// Check vectors of the model document, section 11

static void test_hc_vectors(void) {
    const double logits[16] = { 0.5, -0.3,  0.2, 0.1,  -1.0,  0.4, 0.0,   0.7,
                                0.3,  0.3, -0.6, 1.2,   0.9, -0.8, 0.25, -0.15};
    const double want[16] = {0.305412, 0.203452, 0.319329, 0.171805,  0.064758, 0.389323,
                             0.248441, 0.297478, 0.195294, 0.289534,  0.112064, 0.403106,
                             0.434535, 0.117690, 0.320165, 0.127610};
    const double slope[16] = {-0.042975, 0.123529, -0.047153, -0.033401,  0.007502, -0.053050,
                              0.027057, 0.018490, 0.018635, -0.045369, 0.009915, 0.016819,
                              0.016838, -0.025111, 0.010181, -0.001908};
    const double y_want[4] = {7.75895, 12.32146, 17.43306, 22.48652};
    real m[HC_MIX], dm[HC_MIX], pre[HC], post[HC], comb[HC * HC];
    real dpre[HC] = {0}, dpost[HC] = {0}, dcomb[HC * HC] = {0};
    float base[HC_MIX], scale[3] = {2, 4, 0.5f};
    for (int i = 0; i < HC_MIX; i++) {      // dealt unevenly to m and base: losing either shows
        base[i] = 0.125f * (i % 5);
        double logit = i < HC ? 0.5 : i < 2 * HC ? -1 : logits[i - 2 * HC];
        m[i] = (real)((logit - base[i]) / scale[i < HC ? 0 : i < 2 * HC ? 1 : 2]);
    }
    hc_weights_forward(pre, post, comb, m, base, scale, 1e-6f, 1, HC_MIX, 20);
    for (int i = 0; i < HC; i++) {
        check_close("pre", i, pre[i], 0.6224593312018546 + 1e-6, 1e-6);     // sigmoid(0.5) + eps
        check_close("post", i, post[i], 2 * 0.2689414213699951, 1e-6);      // 2 sigmoid(-1)
    }
    for (int i = 0; i < 16; i++) { check_close("comb", i, comb[i], want[i], 1.5e-6); }
    dcomb[1] = 1;
    hc_weights_row_backward(dm, dpre, dpost, dcomb, m, base, scale, 1e-6f, HC_MIX, 20);
    for (int i = 0; i < 16; i++) {
        check_close("dcomb[0][1]/dlogit", i, dm[2 * HC + i] / 0.5, slope[i], 1.5e-6);
    }
    act X[HC], o, Y[HC];
    real weights[HC] = {0.5, 1, 1.5, 2}, next[HC], r, mean_square = 0;
    const float fn[HC * HC] = {1, 0, 0, 0, 0, -2, 0, 0, 0, 0, 3, 0, 0, 0, 0, -4};
    for (int i = 0; i < HC; i++) { st(&X[i], i + 1); }
    st(&o, 10);
    hc_deal_forward(Y, next, &r, &o, X, weights, comb, fn, 0.5f, 1, 1, HC);
    for (int j = 0; j < HC; j++) {
        check_close("mixed stream", j, ld(&Y[j]), y_want[j], sizeof(act) == 2 ? 0.06 : 1e-5);
        mean_square += ld(&Y[j]) * ld(&Y[j]) / HC;
    }
    check_close("r of the next site", 0, r, 1 / sqrt(mean_square + 0.5), 1e-6);
    for (int j = 0; j < HC; j++) {      // of the streams as they are stored
        check_close("m of the next site", j, next[j], fn[5 * j] * ld(&Y[j]) * r, 1e-5);
    }
    hc_weights_forward(pre, post, comb, m, base, scale, 1e-6f, 1, HC_MIX, 1);   // one round tells
    double worst_row = 0;
    for (int a = 0; a < HC; a++) {
        double row = 0, column = 0;
        for (int b = 0; b < HC; b++) { row += comb[a * HC + b]; column += comb[b * HC + a]; }
        check_close("column sum after one round", a, column, 1, 1e-5);
        worst_row = fmax(worst_row, fabs(row - 1));
    }
    check(worst_row > 0.05, "columns come first: rows cannot all be 1, worst %g", worst_row);
}

static void test_rope_vectors(void) {
    Config c = t2_config(2);
    real f[32], *table = NEW(real, 1001 * 64);
    const struct { int compressed, i; double f, cosine, sine; } want[] = {
        {1, 0, 1, 0.562379, 0.826880}, {1, 16, 2.265625e-3, -0.640254, 0.768163},
        {1, 31, 5.680529e-7, 1, 0.000568}, {0, 1, 0.749894209, -0.584579, 0.811337},
        {0, 31, 1.333521e-4, 0.991122, 0.132957}, {1, 14, 5.28686e-3, 0, 0},
        {1, 25, 5.37231e-6, 0, 0},
    };
    for (size_t k = 0; k < sizeof want / sizeof *want; k++) {
        rope_frequencies(f, &c, want[k].compressed);
        check_close("rope frequency", (long)k, f[want[k].i] / want[k].f, 1, 1e-5);
        if (want[k].cosine == 0) { continue; }
        rope_table(table, &c, want[k].compressed, 1001);
        check_close("rope cos", (long)k, table[(1000 * 32 + want[k].i) * 2], want[k].cosine, 3e-5);
        check_close("rope sin", (long)k, table[(1000 * 32 + want[k].i) * 2 + 1], want[k].sine,
                    3e-5);
    }
    free(table);
}

// Logits (1, 0.5), sink 0.2: two keys in the window, D = 1, so that scale = 1.
static void test_sink_vector(void) {
    int position[2] = {0, 1}, end[2] = {2, 2}, first_entry[2] = {0, 0};
    AttentionShape a = { .T = 2, .H = 1, .D = 1, .W = 2, .position = position, .end = end,
                         .first_entry = first_entry };
    act q[2], kv[2], out[2];
    real lse[2];
    float sink = 0.2f;
    st(&q[0], 1); st(&q[1], 1); st(&kv[0], 1); st(&kv[1], 0.5);
    attention_forward(out, lse, q, kv, NULL, &sink, NULL, a);
    check_close("sink softmax", 0, ld(&out[1]), 0.486415 + 0.5 * 0.295025,
                sizeof(act) == 2 ? 3e-3 : 1e-6);
    check_close("share of the sink", 0, exp(0.2 - (double)lse[1]), 0.218560, 1e-6);
}

// The worked example of section 5, and the entry counts of section 11.
static void test_documents(void) {
    const int start[4] = {0, 5, 135, 435};
    Documents d;
    mem_count();
    documents_alloc(&d, 435, 0);
    mem_open();
    documents_alloc(&d, 435, 0);
    documents_set(&d, start, 3);
    check(d.of[0].P == 108 && d.of[1].P == 3, "entries %d, %d", d.of[0].P, d.of[1].P);
    check(d.of[0].first_entry[0] == 0 && d.of[0].first_entry[5] == 1 &&
          d.of[0].first_entry[135] == 33, "first CSA entries");
    check(d.of[1].first_entry[0] == 0 && d.of[1].first_entry[5] == 0 &&
          d.of[1].first_entry[135] == 1, "first HCA entries");
    AttentionShape a = { .T = d.T, .P = 108, .W = 128, .ratio = 4, .position = d.position,
                         .end = d.end, .first_entry = d.of[0].first_entry, .token = d.of[0].token };
    check(visible_entries(&a, 137) == 0 && visible_entries(&a, 138) == 1 &&
          visible_entries(&a, 262) == 32 && visible_entries(&a, 434) == 75, "visible entries");
    check(window_start(&a, 137) == 135 && window_start(&a, 262) == 135 &&
          window_start(&a, 263) == 136, "windows");
    check(d.of[0].token[33] == 135 && d.of[0].position[34] == 4 && d.of[1].position[2] == 128,
          "places of entries");
    mem_free();
    const int counts[7][3] = {{3, 0, 0}, {4, 1, 0}, {127, 31, 0}, {128, 32, 1}, {2051, 512, 16},
                              {2052, 513, 16}, {4096, 1024, 32}};
    for (int i = 0; i < 7; i++) {
        int one[2] = {0, counts[i][0]};
        mem_count();
        documents_alloc(&d, one[1], 0);
        mem_open();
        documents_alloc(&d, one[1], 0);
        documents_set(&d, one, 1);
        check(d.of[0].P == counts[i][1] && d.of[1].P == counts[i][2], "entries of %d", one[1]);
        mem_free();
    }
}

// -------------------------------------------------------------------------------------------------
// Selection: against a sort of all scores, with ties

static void test_indexer(void) {
    enum { T = 90, heads = 2, dim = 8, topk = 5 };
    const int start[3] = {0, 13, T};
    Documents d;
    mem_count();
    documents_alloc(&d, T, 0);
    mem_open();
    documents_alloc(&d, T, 0);
    documents_set(&d, start, 2);
    Entries *e = &d.of[0];
    AttentionShape a = { .T = T, .P = e->P, .H = 1, .D = dim, .W = 4, .ratio = 4, .topk = topk,
                         .position = d.position, .end = d.end, .first_entry = e->first_entry,
                         .token = e->token };
    act *q = NEW(act, T * heads * dim), *k = NEW(act, e->P * dim);
    real *w = NEW(real, T * heads);
    int *selected = NEW(int, T * topk);
    fill_act(q, T * heads * dim, 1);
    fill_act(k, (size_t)e->P * dim, 1);
    fill(w, T * heads, 1);
    memcpy(k + 9 * dim, k + 7 * dim, sizeof(act) * dim);    // entries 7 and 9 always tie
    indexer_select(selected, q, k, w, a, heads, dim);
    for (int t = 0; t < T; t++) {
        int first = e->first_entry[t], visible = visible_entries(&a, t), chosen = 0;
        for (int p = 0; p < visible; p++) {
            int above = 0;              // how many of the visible come before p
            double score[2];
            for (int o = 0; o < visible; o++) {
                for (int side = 0; side < 2; side++) {
                    score[side] = 0;
                    for (int h = 0; h < heads; h++) {
                        double s = 0;
                        for (int i = 0; i < dim; i++) {
                            s += (double)ld(q + (t * heads + h) * dim + i) *
                                 (double)ld(k + (first + (side ? o : p)) * dim + i);
                        }
                        score[side] += (double)w[t * heads + h] * fmax(s, 0);
                    }
                }
                above += score[1] > score[0] || (score[1] == score[0] && o < p);
            }
            int want = above < topk, got = is_selected(selected, &a, t, first + p);
            check(got == want, "token %d, entry %d: selected %d, want %d", t, p, got, want);
            chosen += got;
        }
        check(chosen == (visible < topk ? visible : topk), "token %d selects %d", t, chosen);
    }
    free(q); free(k); free(w); free(selected);
    mem_free();
}

// -------------------------------------------------------------------------------------------------
// Packed documents, recompute, threads

#if !REAL_IS_DOUBLE
// A row of documents gives the loss and the gradients of its documents alone.
static void test_packing(void) {
    const int length[] = {1, 3, 4, 127, 128, 129, 5, 300, 31};
    enum { DOCS = sizeof length / sizeof *length };
    Config c = t2_config(2);
    Model m;
    build(&m, &c, 2, 728, RECOMPUTE_FULL, 5);
    size_t n = adapter_elements(&m);
    Batch all = make_batch(length, DOCS, c.V);
    real *packed = NEW(real, n);
    double loss = model_forward(&m, &all, 1), alone = 0;
    int used = 0;
    model_backward(&m, &all, 1.0 / 100);
    memcpy(packed, m.adapters.g, sizeof(real) * n);
    memset(m.adapters.g, 0, sizeof(real) * n);
    for (int i = 0; i < DOCS; i++) {
        int start[2] = {0, length[i]}, at = all.doc_start[i];
        Batch one = { .T = length[i], .docs = 1, .token = all.token + at, .target = all.target + at,
                      .doc_start = start };
        alone += model_forward(&m, &one, 1);
        model_backward(&m, &one, 1.0 / 100);
    }
    check_close("loss of packed documents, relative", 0, loss / alone, 1, 1e-6);
    for (int i = 0; i < m.adapters.n; i++) {
        const AdapterTensor *t = &m.adapters.tensors[i];
        double diff = 0, norm = 0;
        for (size_t k = 0; k < (size_t)t->rows * t->cols; k++) {
            double d = (double)packed[t->at + k] - (double)m.adapters.g[t->at + k];
            diff += d * d;
            norm += (double)packed[t->at + k] * (double)packed[t->at + k];
        }
        // Forward values are the same bits; only the order of the sum over tokens differs.
        check(sqrt(diff) <= 1e-5 * sqrt(norm), "%s: packed differs by %g of %g",
              t->name, sqrt(diff), sqrt(norm));
        used += norm > 0;
    }
    check(used > m.adapters.n * 9 / 10, "only %d of %d adapters have a gradient", used,
          m.adapters.n);
    free(packed);
    free_batch(&all);
    destroy(&m);
}

// Gradients and loss into out (n + 1).
static void one_step(double *out, int recompute, int threads) {
    const int length[] = {70, 150, 33};
    Config c = t2_config(6);
    Model m;
    build(&m, &c, 2, 253, recompute, 6);
    #ifdef _OPENMP
    omp_set_num_threads(threads);
    #else
    (void)threads;
    #endif
    Batch b = make_batch(length, 3, c.V);
    out[0] = model_forward(&m, &b, 1);
    model_backward(&m, &b, 1.0 / 200);
    for (size_t i = 0; i < adapter_elements(&m); i++) { out[i + 1] = (double)m.adapters.g[i]; }
    free_batch(&b);
    destroy(&m);
}

static void test_same_bits(void) {
    size_t n = 1 << 17;
    double *want = NEW(double, n), *got = NEW(double, n);
    one_step(want, RECOMPUTE_FULL, 2);
    one_step(got, RECOMPUTE_FULL, 1);
    check(memcmp(got, want, sizeof(double) * n) == 0, "one thread and two give the same bits");
    one_step(got, RECOMPUTE_FULL, 3);
    check(memcmp(got, want, sizeof(double) * n) == 0, "three threads and two give the same bits");
    one_step(got, RECOMPUTE_NONE, 2);
    check(memcmp(got, want, sizeof(double) * n) == 0, "recompute full and none: the same bits");
    one_step(got, RECOMPUTE_MOE, 2);
    check(memcmp(got, want, sizeof(double) * n) == 0, "recompute full and moe: the same bits");
    check(want[0] > 0 && isfinite(want[0]), "a loss of %g", want[0]);
    free(want);
    free(got);
}

#endif // !REAL_IS_DOUBLE

// An empty micro-batch (a rank with no rows left) changes nothing.
static void test_empty_batch(void) {
    Config c = t2_config(2);
    Model m;
    int start[1] = {0};
    Batch none = { .doc_start = start };
    build(&m, &c, 2, 64, RECOMPUTE_FULL, 7);
    check(model_forward(&m, &none, 1) == 0, "no tokens, no loss");
    model_backward(&m, &none, 1);
    check(sum_squares(m.adapters.g, adapter_elements(&m)) == 0, "no tokens, no gradient");
    destroy(&m);
}

#if !REAL_IS_DOUBLE
// G11, G13: steps of AdamW and of Muon with weight decay leave every bit of the base as it was, the
// router's bias included, and the optimizer has two moments per adapter number and nothing else.
static void test_frozen(void) {
    const int length[] = {16};
    Config c = t2_config(2);
    Model m;
    build(&m, &c, 2, 16, RECOMPUTE_NONE, 8);
    size_t n = adapter_elements(&m), bytes = mem.arena[MEM_WEIGHTS].used, moved = 0;
    check(mem.arena[MEM_OPTIMIZER].used == 2 * ((n * sizeof(real) + 255) / 256 * 256),
          "%zu bytes of moments for %zu numbers", mem.arena[MEM_OPTIMIZER].used, n);
    unsigned char *weights = NEW(unsigned char, bytes), *base = mem.arena[MEM_WEIGHTS].base;
    real *adapters = NEW(real, n);
    memcpy(weights, base, bytes);
    memcpy(adapters, m.adapters.p, sizeof(real) * n);
    Batch b = make_batch(length, 1, c.V);
    for (int step = 1; step <= 3; step++) {
        memset(m.adapters.g, 0, sizeof(real) * n);
        model_forward(&m, &b, 1);
        model_backward(&m, &b, 1.0 / 16);
        m.adapters.muon = step == 3 ? NS_GRAM : 0;
        adapters_update(&m.adapters, 1, 0.01, 0.9, 0.95, 1e-8, 0.1, step);
    }
    const unsigned char *bias = (const unsigned char *)m.layer[c.layers - 1].moe.bias;
    check(bias >= base && bias < base + bytes && m.layer[c.layers - 1].moe.bias[0] != 0,
          "the router's bias is not one of the weights");
    check(memcmp(weights, base, bytes) == 0, "the base has changed");
    for (size_t i = 0; i < n; i++) { moved += adapters[i] != m.adapters.p[i]; }
    check(moved > n / 2, "only %zu of %zu adapter numbers have moved", moved, n);
    free(weights);
    free(adapters);
    free_batch(&b);
    destroy(&m);
}

// The logits that sampling sees are those of the loss; and without training, where layers share
// their buffers, they are the same.
static void test_next_logits(void) {
    const int length[] = {200};
    Config c = t2_config(2);
    Model m;
    build(&m, &c, 2, 200, RECOMPUTE_FULL, 8);
    Batch b = make_batch(length, 1, c.V);
    float *logits = NEW(float, c.V), *again = NEW(float, c.V);
    for (int t = 0; t < b.T - 1; t++) { b.target[t] = -1; }
    b.target[b.T - 1] = 3;
    double loss = model_forward(&m, &b, 0), sum = 0;
    model_next_logits(&m, b.token, b.T, logits);
    for (int v = 0; v < c.V; v++) { sum += exp((double)logits[v] - logits[3]); }
    check_close("-log p of token 3", 0, log(sum), loss, 1e-4);
    real *p = NEW(real, adapter_elements(&m));
    memcpy(p, m.adapters.p, sizeof(real) * adapter_elements(&m));
    ModelOptions o = m.options;
    destroy(&m);
    o.training = 0;
    memset(&m, 0, sizeof m);
    mem_count();
    model_alloc(&m, &c, &o);
    mem_open();
    model_alloc(&m, &c, &o);
    model_load(&m, NULL);
    memcpy(m.adapters.p, p, sizeof(real) * adapter_elements(&m));
    model_next_logits(&m, b.token, b.T, again);
    check(memcmp(logits, again, sizeof(float) * (size_t)c.V) == 0, "logits without training");
    free(p); free(logits); free(again);
    free_batch(&b);
    destroy(&m);
}
#endif // !REAL_IS_DOUBLE

// -------------------------------------------------------------------------------------------------
// Gradients, in double: what the backward says must be the slope of the loss

#if REAL_IS_DOUBLE
// Compares grad (n), the claimed gradient of loss(arg) with respect to x (n), with central
// differences, as vectors: |difference| <= 1e-6 |slope|.
static void check_gradient(const char *what, double (*loss)(void *), void *arg, real *x,
                           const real *grad, size_t n) {
    real *slope = NEW(real, n);
    const double h = 1e-4;
    for (size_t i = 0; i < n; i++) {        // error of this stencil: h^4 times the fifth derivative
        real keep = x[i];
        double at[4];
        const double step[4] = {-2, -1, 1, 2};
        for (int k = 0; k < 4; k++) {
            x[i] = keep + (real)(step[k] * h);
            at[k] = loss(arg);
        }
        x[i] = keep;
        slope[i] = (real)((at[0] - 8 * at[1] + 8 * at[2] - at[3]) / (12 * h));
    }
    check_tensor(what, grad, slope, n, 1e-6);
    free(slope);
}

// One page of data that all the small gradient tests share: loss = <out, direction>.
enum { gT = 11, gC = 12, gD = 8, gH = 3, gR = 4 };
static struct {
    act X[gT * HC * gC], o[gT * gC], out[gT * HC * gC], q[gT * gH * gD], kv[gT * gD],
        raw[gT * gH * gD];
    act entries[gT * gD];
    real pre[gT * HC], post[gT * HC], comb[gT * HC * HC], m[gT * HC_MIX], r[gT];
    real direction[gT * HC * gC * 4], K[gT * 2 * gD], Z[gT * 2 * gD], lse[gT * gH], rstd[gT * gH];
    float fn[HC_MIX * HC * gC], base[HC_MIX], scale[3], sink[gH], ape[gR * 2 * gD];
    bf16 w[gC];
    real rope[gT * 4];
    int selected[gT * 2];
    const int *choice;
    Documents docs;
    AttentionShape shape;
} G;

static double against_direction(const act *out, size_t n) {
    double sum = 0;
    for (size_t i = 0; i < n; i++) { sum += (double)ld(out + i) * (double)G.direction[i]; }
    return sum;
}

static void gradient_data(void) {
    static int start[3] = {0, 4, gT};
    fill_act(G.X, gT * HC * gC, 1);
    fill_act(G.o, gT * gC, 1);
    fill_act(G.q, gT * gH * gD, 2);
    fill_act(G.kv, gT * gD, 2);
    fill_act(G.raw, gT * gH * gD, 2);
    fill_act(G.entries, gT * gD, 2);
    fill(G.direction, gT * HC * gC * 4, 1);
    fill(G.K, gT * 2 * gD, 1);
    fill(G.Z, gT * 2 * gD, 1);
    fill(G.m, gT * HC_MIX, 2);
    fill(G.pre, gT * HC, 1);
    fill(G.post, gT * HC, 1);
    fill(G.comb, gT * HC * HC, 1);
    for (int i = 0; i < HC_MIX * HC * gC; i++) { G.fn[i] = (float)uniform(); }
    for (int i = 0; i < HC_MIX; i++) { G.base[i] = (float)uniform(); }
    for (int i = 0; i < 3; i++) {
        G.scale[i] = 1 + (float)uniform() / 2;
        G.sink[i] = (float)uniform();
    }
    for (int i = 0; i < gR * 2 * gD; i++) { G.ape[i] = (float)uniform(); }
    for (int i = 0; i < gC; i++) { G.w[i] = bf16_from_float(1 + (float)uniform() / 2); }
    for (int i = 0; i < gT * 4; i++) { G.rope[i] = (real)((i / 2) % 2 ? 0.8 : 0.6); }
    for (int i = 0; i < gT * 2; i++) {
        double angle = 0.7 * i;
        G.rope[2 * i] = cos(angle);
        G.rope[2 * i + 1] = sin(angle);
    }
    mem_count();
    documents_alloc(&G.docs, gT, 0);
    mem_open();
    documents_alloc(&G.docs, gT, 0);
    documents_set(&G.docs, start, 2);
    Entries *e = &G.docs.of[0];
    G.shape = (AttentionShape){ .T = gT, .P = e->P, .H = gH, .D = gD, .W = 3, .ratio = 4, .topk = 2,
                                .position = G.docs.position, .end = G.docs.end,
                                .first_entry = e->first_entry, .token = e->token };
}

static double loss_rmsnorm(void *unused) {
    (void)unused;
    rmsnorm_forward(G.out, G.rstd, G.X, G.w, 1e-2f, gT, gC);
    return against_direction(G.out, gT * gC);
}
static double loss_norm_rope(void *w) {
    norm_rope_forward(G.out, G.rstd, G.raw, w, G.rope, G.docs.position, 1e-2f, gT, w ? 1 : gH, gD,
                      4);
    return against_direction(G.out, gT * (w ? 1 : gH) * gD);
}
static double loss_weights(void *unused) {
    (void)unused;
    hc_weights_forward(G.pre, G.post, G.comb, G.m, G.base, G.scale, 1e-6f, gT, HC_MIX, 20);
    double sum = 0;
    for (int i = 0; i < gT * HC; i++) {
        sum += (double)(G.pre[i] * G.direction[i] + G.post[i] * G.direction[100 + i]);
    }
    for (int i = 0; i < gT * HC * HC; i++) { sum += (double)(G.comb[i] * G.direction[200 + i]); }
    return sum;
}
static double loss_deal(void *unused) {
    (void)unused;
    hc_deal_forward(G.out, G.m, G.r, G.o, G.X, G.post, G.comb, G.fn, 1e-2f, gT, gC, HC_MIX);
    return against_direction(G.out, gT * HC * gC);
}
// A whole site, whose sublayer is the rest of the loss: <x, direction> + <Y, direction + 600>, with
// o a constant. *M is HC at the head, where no Y follows.
static double loss_site(void *M) {
    int sites = *(int *)M;
    hc_logits_forward(G.m, G.r, G.X, G.fn, 1e-2f, gT, gC, sites);
    hc_weights_forward(G.pre, G.post, G.comb, G.m, G.base, G.scale, 1e-6f, gT, sites, 20);
    hc_enter_forward(G.raw, G.rstd, G.X, G.pre, G.w, 1e-2f, gT, gC);
    double sum = against_direction(G.raw, gT * gC);
    if (sites == HC) { return sum; }
    real m[gT * HC_MIX], r[gT];
    hc_deal_forward(G.out, m, r, G.o, G.X, G.post, G.comb, G.fn, 1e-2f, gT, gC, HC_MIX);
    for (int i = 0; i < gT * HC * gC; i++) {
        sum += (double)ld(G.out + i) * (double)G.direction[600 + i];
    }
    return sum;
}
static double loss_pool(void *unused) {
    (void)unused;
    pool_forward(G.out, G.K, G.Z, G.ape, G.shape, G.docs.of[entries_of(G.shape.ratio)].position,
                 gD);
    return against_direction(G.out, (size_t)G.shape.P * gD);
}
static double loss_attention(void *unused) {
    (void)unused;
    attention_forward(G.out, G.lse, G.q, G.kv, G.entries, G.sink, G.choice, G.shape);
    return against_direction(G.out, gT * gH * gD);
}

static void test_norm_gradients(void) {
    static act d[gT * gH * gD], dout[gT * gH * gD];
    loss_rmsnorm(NULL);
    rmsnorm_backward(d, G.direction, G.X, G.rstd, G.w, gT, gC);
    check_gradient("rmsnorm", loss_rmsnorm, NULL, G.X, d, gT * gC);
    for (int i = 0; i < gT * gH * gD; i++) { st(dout + i, G.direction[i]); }
    loss_norm_rope(NULL);
    norm_rope_backward(d, dout, G.out, G.rstd, G.rope, G.docs.position, gT, gH, gD, 4);
    check_gradient("norm + rope, queries", loss_norm_rope, NULL, G.raw, d, gT * gH * gD);
    loss_norm_rope(G.w);
    key_norm_rope_backward(d, G.direction, G.raw, G.rstd, G.w, G.rope, G.docs.position, gT, gD, 4);
    check_gradient("norm + rope, keys", loss_norm_rope, G.w, G.raw, d, gT * gD);
}

static void test_hc_gradients(void) {
    static act dX[gT * HC * gC], d[gT * gC];
    static real dm[gT * HC_MIX], dpost[gT * HC], dcomb[gT * HC * HC];
    int mix = HC_MIX, head = HC;
    for (int i = 0; i < gT * HC_MIX; i++) { dm[i] = NAN; }      // every element must be written
    for (int t = 0; t < gT; t++) {
        const real *at = G.direction;
        hc_weights_row_backward(dm + t * HC_MIX, at + t * HC, at + 100 + t * HC,
                                at + 200 + t * HC * HC, G.m + t * HC_MIX, G.base, G.scale, 1e-6f,
                                HC_MIX, 20);
    }
    check_gradient("hc weights", loss_weights, NULL, G.m, dm, gT * HC_MIX);
    fill(G.post, gT * HC, 1);
    fill(G.comb, gT * HC * HC, 1);
    for (int i = 0; i < gT * HC * gC; i++) { st(dX + i, G.direction[i]); }
    hc_deal_backward(d, dpost, dcomb, dX, G.o, G.X, G.post, gT, gC);
    check_gradient("deal, do", loss_deal, NULL, G.o, d, gT * gC);
    check_gradient("deal, dpost", loss_deal, NULL, G.post, dpost, gT * HC);
    check_gradient("deal, dcomb", loss_deal, NULL, G.comb, dcomb, gT * HC * HC);

    loss_site(&mix);
    for (int i = 0; i < gT * HC * gC; i++) { st(dX + i, G.direction[600 + i]); }
    hc_deal_backward(d, dpost, dcomb, dX, G.o, G.X, G.post, gT, gC);
    hc_enter_backward(dX, G.direction, dpost, dcomb, G.X, G.m, G.r, G.pre, G.comb, G.rstd, G.fn,
                      G.base, G.scale, G.w, 1e-6f, gT, gC, HC_MIX, 20);
    check_gradient("site, do", loss_site, &mix, G.o, d, gT * gC);
    check_gradient("site, dX", loss_site, &mix, G.X, dX, gT * HC * gC);
    loss_site(&head);
    for (int i = 0; i < gT * HC * gC; i++) { st(dX + i, NAN); }     // only written
    hc_enter_backward(dX, G.direction, NULL, NULL, G.X, G.m, G.r, G.pre, NULL, G.rstd, G.fn, G.base,
                      G.scale, G.w, 1e-6f, gT, gC, HC, 0);
    check_gradient("head, dX", loss_site, &head, G.X, dX, gT * HC * gC);
}

static void test_attention_gradients(void) {
    static act dout[gT * gH * gD], dq[gT * gH * gD], dpool[gT * gD];
    static real delta[gT * gH], dkv[gT * gD], dentries[gT * gD], dK[gT * 2 * gD], dZ[gT * 2 * gD];
    for (int i = 0; i < gT * gH * gD; i++) { st(dout + i, G.direction[i]); }
    for (int kind = 0; kind < 3; kind++) {      // all entries, selected entries, none
        const char *names[3] = {"all entries", "selected entries", "window only"};
        char what[64];
        AttentionShape all = G.shape;
        for (int t = 0; t < gT; t++) {          // the last of the visible ones, at most one
            int v = visible_entries(&G.shape, t);
            G.selected[2 * t] = v ? G.shape.first_entry[t] + v - 1 : -1;
            G.selected[2 * t + 1] = -1;
        }
        G.choice = kind == 1 ? G.selected : NULL;
        if (kind == 2) { G.shape.ratio = G.shape.P = 0; }
        loss_attention(NULL);
        attention_delta(delta, dout, G.out, gT, gH, gD);
        attention_backward_query(dq, dout, delta, G.lse, G.q, G.kv, G.entries, G.choice, G.shape);
        attention_backward_key(dkv, dentries, dout, delta, G.lse, G.q, G.kv, G.entries, G.choice,
                               G.shape);
        snprintf(what, sizeof what, "attention dq, %s", names[kind]);
        check_gradient(what, loss_attention, NULL, G.q, dq, gT * gH * gD);
        snprintf(what, sizeof what, "attention dkv, %s", names[kind]);
        check_gradient(what, loss_attention, NULL, G.kv, dkv, gT * gD);
        snprintf(what, sizeof what, "attention dentries, %s", names[kind]);
        if (kind < 2) {
            check_gradient(what, loss_attention, NULL, G.entries, dentries, (size_t)G.shape.P * gD);
        }
        G.shape = all;
    }
    for (int i = 0; i < gT * gD; i++) { st(dpool + i, G.direction[i]); }
    pool_backward(dK, dZ, dpool, G.K, G.Z, G.ape, G.shape, G.docs.of[0].position, gD);
    check_gradient("pool CSA, dK", loss_pool, NULL, G.K, dK, gT * 2 * gD);
    check_gradient("pool CSA, dZ", loss_pool, NULL, G.Z, dZ, gT * 2 * gD);
}

// The whole model: for every kind of adapter matrix, the slope along a random direction in all
// layers and experts at once. All kinds of layers, three documents, the indexer at work.
static void test_model_gradients(void) {
    const int length[] = {135, 9, 40};
    const char *kinds[] = {"wq_a", "wq_b", "wkv", "wo_b", "shared_experts.w1", "shared_experts.w2",
                           "shared_experts.w3", ".w1", ".w2", ".w3"};
    Config c = t2_config(2);
    c.index_topk = 8;
    c.swiglu_limit = 10;        // the clamp is a kink, and test_fp8.c's
    Model m;
    build(&m, &c, 2, 184, RECOMPUTE_FULL, 9);
    Batch b = make_batch(length, 3, c.V);
    size_t n = adapter_elements(&m);
    real *keep = NEW(real, n), *d = NEW(real, n);
    memcpy(keep, m.adapters.p, sizeof(real) * n);
    model_forward(&m, &b, 1);
    model_backward(&m, &b, 1);
    for (int kind = 0; kind < 20; kind++) {
        char factor[8] = "lora_A";
        factor[5] = "AB"[kind % 2];
        memset(d, 0, sizeof(real) * n);
        double at[4], claimed = 0;
        for (int i = 0; i < m.adapters.n; i++) {
            const AdapterTensor *t = &m.adapters.tensors[i];
            if (strstr(t->name, kinds[kind / 2]) == NULL || strstr(t->name, factor) == NULL) {
                continue;
            }
            if (kinds[kind / 2][0] == '.' && t->expert < 0) { continue; }
            fill(d + t->at, (size_t)t->rows * t->cols, 1);
        }
        for (size_t k = 0; k < n; k++) { claimed += (double)(d[k] * m.adapters.g[k]); }
        const double h = 1e-5, step[4] = {-2, -1, 1, 2};
        for (int s = 0; s < 4; s++) {
            for (size_t k = 0; k < n; k++) {
                m.adapters.p[k] = keep[k] + (real)(step[s] * h) * d[k];
            }
            at[s] = model_forward(&m, &b, 0);
        }
        memcpy(m.adapters.p, keep, sizeof(real) * n);
        double slope = (at[0] - 8 * at[1] + 8 * at[2] - at[3]) / (12 * h);
        printf("  slope along %-18s %s %12.6f, claimed less %9.1e\n", kinds[kind / 2], factor,
               slope, slope - claimed);
        check(fabs(slope - claimed) <= 1e-6 * fabs(slope), "%s %s: slope %.12g, claimed %.12g",
              kinds[kind / 2], factor, slope, claimed);
    }
    free(keep);
    free(d);
    free_batch(&b);
    destroy(&m);
}
#endif // REAL_IS_DOUBLE

int main(void) {
    test_hc_vectors();
    test_rope_vectors();
    test_sink_vector();
    test_documents();
    test_indexer();
    #if REAL_IS_DOUBLE
    gradient_data();
    test_norm_gradients();
    test_hc_gradients();
    test_attention_gradients();
    mem_free();
    test_model_gradients();
    #else
    test_packing();
    test_same_bits();
    test_next_logits();
    test_frozen();
    #endif
    test_empty_batch();
    return finish("test_train");
}
