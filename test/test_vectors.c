// The whole model against Hugging Face transformers 5.17: logits, choices, gradients of all
// adapters, and a training run, from test/vectors (whose README says how they were made). Built
// with -DACT=float. Weights, tokens and factors are not stored: both sides draw them.
//
// Seen to fail on broken copies: the routing weight of one expert off by 1 %, weights normalised
// with the bias, tid2eid by the next token, w1 and w3 swapped, the clamp's lower side on g, YaRN
// left out, RoPE of entries at their last token, hc_post with C transposed, weight decay after the
// update, bias correction dropped, labels shifted by one.
#include "model.h"

#ifndef VECTORS
#define VECTORS "test/vectors"
#endif

// The tensor of that name as doubles (n of them, which must be right).
static double *load_vector(const Safetensors *f, const char *name, size_t n) {
    const Entry *e = safetensors_find(f, name);
    if (!check(e != NULL, "%s has no %s", f->path, name)) { exit(finish("test_vectors")); }
    size_t have = 1;
    for (int d = 0; d < e->ndim; d++) { have *= e->dim[d]; }
    if (!check(have == n, "%s has %zu elements, not %zu", name, have, n)) { exit(1); }
    float *raw = NEW(float, n);         // F32 and I32 are both four bytes
    double *out = NEW(double, n);
    check(file_pread(f->fd, raw, 4 * n, f->data + e->begin) == 0, "%s: cannot read %s", f->path,
          name);
    for (size_t i = 0; i < n; i++) {
        int32_t integer;
        memcpy(&integer, &raw[i], 4);
        out[i] = e->type == DT_F32 ? (double)raw[i] : (double)integer;
    }
    free(raw);
    return out;
}

// A config.json of test/vectors through config_load, which wants a folder.
static void load_config(Config *c, const char *name) {
    char folder[] = "/tmp/test_vectors_XXXXXX", command[512];
    if (mkdtemp(folder) == NULL) { exit(1); }
    snprintf(command, sizeof command, "cp %s/%s.json %s/config.json", VECTORS, name, folder);
    check(system(command) == 0, "%s", command);
    config_load(c, folder);
    snprintf(command, sizeof command, "rm -r %s", folder);
    check(system(command) == 0, "%s", command);
}

static int by_value(const void *a, const void *b) { return *(const int *)a - *(const int *)b; }

// The sets ids (n, K) of one layer against want, both sorted row by row.
static void check_choices(const char *what, int layer, const int *ids, const double *want, int n,
                          int K) {
    int *row = NEW(int, K), wrong = 0;
    for (int t = 0; t < n; t++) {
        memcpy(row, ids + (size_t)t * K, sizeof(int) * (size_t)K);
        qsort(row, (size_t)K, sizeof(int), by_value);
        int same = 1, shift = 0;        // want has its -1 at the end
        while (shift < K && row[shift] < 0) { shift++; }
        for (int k = 0; k < K; k++) {
            int got = k + shift < K ? row[k + shift] : -1;
            same &= got == (int)want[(size_t)t * K + k];
        }
        wrong += !same;
    }
    check(wrong == 0, "%s of layer %d: %d of %d tokens choose differently", what, layer, wrong, n);
    free(row);
}

// Gradients by their projections on random signs: the mean square of the projections' differences
// estimates the squared distance of the whole tensors.
static void check_gradients(const Model *m, const double *want) {
    enum { PROJECTIONS = 16 };
    double worst = 0;
    const char *modules[7] = {"attn.wq_a", "attn.wq_b", "attn.wkv", "attn.wo_b",
                              "ffn.shared_experts.w1", "ffn.shared_experts.w2",
                              "ffn.shared_experts.w3"};
    int rows = m->config.layers * (7 + 3 * m->config.E) * 2, found = 0;
    for (int row = 0; row < rows; row++) {
        int per_layer = (7 + 3 * m->config.E) * 2, module = row % per_layer / 2;
        char name[96];
        if (module < 7) {
            snprintf(name, sizeof name, "layers.%d.%s.lora_%c", row / per_layer, modules[module],
                     "AB"[row % 2]);
        } else {
            snprintf(name, sizeof name, "layers.%d.ffn.experts.%d.w%d.lora_%c", row / per_layer,
                     (module - 7) / 3, (module - 7) % 3 + 1, "AB"[row % 2]);
        }
        for (int i = 0; i < m->adapters.n; i++) {
            const AdapterTensor *t = &m->adapters.tensors[i];
            if (strcmp(t->name, name) != 0) { continue; }
            found++;
            const double *norm = want + (size_t)row * (PROJECTIONS + 1);
            double distance = 0, square = 0;
            size_t n = (size_t)t->rows * t->cols;
            for (size_t k = 0; k < n; k++) { square += pow((double)m->adapters.g[t->at + k], 2); }
            for (int j = 0; j < PROJECTIONS; j++) {
                uint64_t key = random_key((uint64_t)j, "projection");
                double sum = 0;
                for (size_t k = 0; k < n; k++) {
                    double g = (double)m->adapters.g[t->at + k];
                    sum += random_bits(key, k) & 1 ? g : -g;
                }
                distance += pow(sum - norm[1 + j], 2) / PROJECTIONS;
            }
            double error = norm[0] > 0 ? sqrt(distance) / norm[0] : sqrt(square);
            worst = fmax(worst, error);
            check(error <= 1e-4, "gradient of %s: off by %.2e of its norm", name, error);
            check_close(name, 0, sqrt(square), norm[0], 1e-4 * norm[0]);
        }
    }
    check(found == rows, "%d of %d adapters found", found, rows);
    printf("  worst gradient: %.2e of its norm, allowed 1e-4\n", worst);
}

static void test_case(int K, int seed) {
    enum { T = 300, ROWS = 24 };
    char path[256];
    Config c, own = t2_config(K);
    Model m;
    Safetensors f;
    snprintf(path, sizeof path, "t2_top%d", K);
    load_config(&c, path);
    check(memcmp(c.ratio, own.ratio, sizeof(int) * 5) == 0 && c.C == own.C && c.K == own.K &&
          c.swiglu_limit == own.swiglu_limit, "config.json of T2 is read as written");
    snprintf(path, sizeof path, "%s/t2_top%d_seed%d.safetensors", VECTORS, K, seed);
    printf("%s\n", path);
    safetensors_open(&f, path, "run the tests from the top folder");
    build(&m, &c, 2, T, RECOMPUTE_FULL, (uint64_t)seed);

    int token[T], target[T], start[2] = {0, T};
    uint64_t key = random_key((uint64_t)seed, "tokens");
    for (int t = 0; t < T; t++) { token[t] = (int)(random_bits(key, (uint64_t)t) % (uint64_t)c.V); }
    for (int t = 0; t < T; t++) { target[t] = t + 1 < T ? token[t + 1] : -1; }
    Batch b = { .T = T, .docs = 1, .token = token, .target = target, .doc_start = start };
    double loss = model_forward(&m, &b, 1) / (T - 1);
    double *want = load_vector(&f, "loss", 1);
    check_close("loss", 0, loss, want[0], 2e-6);
    free(want);

    double *position = load_vector(&f, "positions", ROWS),
           *error = load_vector(&f, "logits_error", 2);
    double *logits = load_vector(&f, "logits", (size_t)ROWS * c.V), largest = 0;
    real *row = NEW(real, c.V);
    for (int i = 0; i < ROWS; i++) {
        linear_bf16_forward(row, m.head.x + (size_t)position[i] * c.C, m.globals.head, 1, c.C, c.V);
        for (int v = 0; v < c.V; v++) {
            largest = fmax(largest, fabs((double)row[v] - logits[(size_t)i * c.V + v]));
        }
    }
    printf("  logits: largest error %.1e; PyTorch's own fp32 %.1e, allowed 4 times that\n", largest,
           error[0]);
    check(largest <= 4 * error[0], "logits are off by %g, PyTorch's fp32 by %g", largest, error[0]);

    double *experts = load_vector(&f, "experts", (size_t)c.layers * T * K);
    double *entries = load_vector(&f, "entries", (size_t)2 * T * c.index_topk), *at = entries;
    for (int i = 0; i < c.layers; i++) {
        check_choices("experts", i, m.saved[i].moe.ids, experts + (size_t)i * T * K, T, K);
        if (c.ratio[i] != 4) { continue; }
        check_choices("entries", i, m.saved[i].selected, at, T, c.index_topk);
        at += (size_t)T * c.index_topk;
    }
    model_backward(&m, &b, 1.0 / (T - 1));
    double *gradients = load_vector(&f, "gradients", (size_t)m.adapters.n * 17);
    check_gradients(&m, gradients);
    free(position); free(error); free(logits); free(row);
    free(experts); free(entries); free(gradients);
    safetensors_close(&f);
    destroy(&m);
}

// Ten AdamW steps from a fresh adapter, with clipping, weight decay and masked labels, through the
// trainer's own update.
static void test_trace(void) {
    enum { STEPS = 10 };
    const int length[2] = {96, 61}, seed = 3;
    Config c = t2_config(2);
    Model m;
    Safetensors f;
    ModelOptions o = { .R = 4, .alpha = 8, .targets = targets_parse("attn,shared,experts"),
                       .max_tokens = 157, .recompute = RECOMPUTE_FULL, .training = 1,
                       .seed = seed };
    memset(&m, 0, sizeof m);
    mem_count();
    model_alloc(&m, &c, &o);
    mem_open();
    model_alloc(&m, &c, &o);
    model_load(&m, NULL);
    safetensors_open(&f, VECTORS "/t2_trace.safetensors", "run the tests from the top folder");
    double *loss = load_vector(&f, "losses", STEPS), *norm = load_vector(&f, "norms", STEPS);
    double *lr = load_vector(&f, "lr", 1), *clip = load_vector(&f, "clip", 1);
    uint64_t trace = random_key(seed, "trace"), mask = random_key(seed, "mask");
    size_t n = adapter_elements(&m);
    double worst_loss = 0, worst_norm = 0;
    for (int step = 0; step < STEPS; step++) {
        int token[157], target[157], start[3] = {0, 96, 157}, labels = 0, t = 0;
        for (int doc = 0; doc < 2; doc++) {
            for (int i = 0; i < length[doc]; i++, t++) {
                uint64_t at = (uint64_t)(1000 * step + 500 * doc + i);
                token[t] = (int)(random_bits(trace, at) % (uint64_t)c.V);
                target[t] = -1;
                if (i > 0 && random_bits(mask, at) % 4 != 0) { target[t - 1] = token[t]; labels++; }
            }
        }
        Batch b = { .T = t, .docs = 2, .token = token, .target = target, .doc_start = start };
        memset(m.adapters.g, 0, sizeof(real) * n);
        double got = model_forward(&m, &b, 1) / labels;
        model_backward(&m, &b, 1.0 / labels);
        double got_norm = sqrt(sum_squares(m.adapters.g, n));
        check_close("trace loss", step, got, loss[step], 2e-5);
        check_close("trace norm, relative", step, got_norm / norm[step], 1, 1e-4);
        worst_loss = fmax(worst_loss, fabs(got - loss[step]));
        worst_norm = fmax(worst_norm, fabs(got_norm / norm[step] - 1));
        adamw_update(m.adapters.p, m.adapters.m, m.adapters.v, m.adapters.g, n,
                     clip_factor(got_norm, clip[0]), lr_at(lr[0], step, STEPS, 3, 0.1, 1), 0.9,
                     0.95, 1e-8, 0.1, step + 1);
    }
    printf("10 steps: worst loss %.1e of 2e-5, worst norm %.1e of 1e-4\n", worst_loss, worst_norm);
    free(loss); free(norm); free(lr); free(clip);
    safetensors_close(&f);
    destroy(&m);
}

static int tensor_order(const void *a, const void *b) {
    return strcmp((*(Tensor *const *)a)->name, (*(Tensor *const *)b)->name);
}

// Do both sides draw the same bytes? The checksum of every tensor as a checkpoint would store it.
static void test_draws(void) {
    Config c = t2_config(2);
    Model m;
    Safetensors f;
    build(&m, &c, 2, 16, RECOMPUTE_FULL, 1);
    safetensors_open(&f, VECTORS "/t2_draws.safetensors", "run the tests from the top folder");
    double *want = load_vector(&f, "checksums", 2 * m.n_tensors);
    Tensor **sorted = NEW(Tensor *, m.n_tensors);
    for (size_t i = 0; i < m.n_tensors; i++) { sorted[i] = &m.tensors[i]; }
    qsort(sorted, m.n_tensors, sizeof *sorted, tensor_order);
    for (size_t i = 0; i < m.n_tensors; i++) {
        const Tensor *t = sorted[i];
        size_t n = 1;
        for (int d = 0; d < t->ndim; d++) { n *= t->dim[d]; }
        uint64_t sum = 0;
        int hash = t->type == DT_I64;       // int32 here, eight bytes in the file, the upper zero
        size_t bytes = hash ? 8 * n : type_bytes(t->type, n);
        const uint8_t *data = t->data;
        for (size_t k = 0; k < bytes; k++) {
            unsigned byte = !hash ? data[k] : k % 8 < 4 ? data[k / 8 * 4 + k % 8] : 0;
            sum += (byte + 1ull) * random_bits(0, k);
        }
        check((int32_t)sum == (int32_t)want[2 * i]
              && (int32_t)(sum >> 32) == (int32_t)want[2 * i + 1],
              "%s: other bytes than dev/ref draws", t->name);
    }
    free(want);
    free(sorted);
    safetensors_close(&f);
    destroy(&m);
}

int main(void) {
    test_draws();
    for (int seed = 1; seed <= 2; seed++) {
        test_case(2, seed);
        test_case(6, seed);
    }
    test_trace();
    return finish("test_vectors");
}
