// merge.c: an adapter in other forms. Other names, or merged into the weights it was trained on.
//
//     cc -O2 -DMERGE_MAIN -I.deps/usr/include dev/merge.c -o merge -lm
//     ./merge names vllm|hf ADAPTER OUT       the same adapter under the other program's names;
//                                             also reads what NeMo Automodel exports
//     ./merge bf16 CHECKPOINT ADAPTER OUT     W + s B A, as a checkpoint in bf16, shard by shard
//
// Merging loses. A trained delta is a small part of its weight: bf16 keeps 8 bits of the sum, fp8
// four, fp4 two, and what is smaller than half a step of the weight is gone. So the base is widened
// exactly, the delta added in fp32 and rounded once, and the tool says what survived: how many
// values changed, and how the change that was made correlates with the one that was meant. A merge
// after which nothing has changed is refused. Serving the adapter beside the base loses nothing.
//
// Contents
//   1 an adapter, from its files alone     3 merging a matrix
//   2 other names                          4 merging a checkpoint
#ifndef MERGE_C
#define MERGE_C
#include "../refit.c"       // defines: adapter_*, Save, safetensors_*, json_*, widen_*, quantize_*

// -------------------------------------------------------------------------------------------------
// 1 An adapter, from its files alone
//
// The trainer knows its matrices' sizes from the model. Here the adapter's own tensors tell them,
// so that a folder can be converted without the checkpoint it was trained on.
//
//     base_model.model.layers.3.attn.wq_a.lora_A.weight [8,4096]             R 8, in 4096
//     base_model.model.layers.3.attn.wq_a.lora_B.weight [1024,8]             out 1024
//     base_model.model.layers.3.ffn.experts.17.w1.lora_A.weight [8,4096]     at least 18 experts

// The module of target t in a layer, in out (96), with its leaf (NULL: dense) apart, as adapter_add
// and adapter_add_experts want them: "layers.3.attn.wq_a", or "layers.3.ffn.experts" and "w1".
static inline const char *module_name(char *out, int t, int layer) {
    const char *ours = adapter_modules[t].ours, *number = strchr(ours, '#');
    size_t length = number ? (size_t)(number - ours) - 1 : strlen(ours);
    sprintf(out, "layers.%d.%.*s", layer, (int)length, ours);
    return number ? number + 2 : NULL;
}

// Registers every matrix that the file has, in the order of layers and targets. *experts grows to
// their number. The names are known to be good: adapter_read_config has parsed them all, so the
// prefix, of 17 characters or, for transformers, 23, can be skipped.
//
// transformers' fused tensors of E experts, of which w1 and w3 are F x C and w2 is C x F:
//
//     mlp.experts.base_layer.lora_A [E*2R,C], lora_B [2F,2R*E]       gate_up_proj: w1 over w3
//     mlp.experts.lora_A [E*R,F], lora_B [C,R*E]                     down_proj: w2
//
// Without w2 there is nothing to wrap around gate_up_proj, and its names have no base_layer.
static inline void adapter_register(Adapters *s, const Safetensors *st, int names, int *experts) {
    typedef struct { size_t in, out; } Sizes;
    Sizes (*sizes)[TARGETS] = (Sizes (*)[TARGETS])host_calloc(sizeof *sizes * 1024);
    const int hf = names == NAMES_HF;
    adapters_begin(s);
    for (size_t i = 0; i < st->n; i++) {
        const Entry *e = &st->entry[i];
        const char *rest;
        int layer = 0, number = 0;
        int t = adapter_parse(e->name + (hf ? 23 : 17), names, &layer, &rest);
        const int fused = hf && t >= TARGET_EXPERTS_W1, is_b = strstr(rest, ".lora_B") != NULL;
        if (t < 0 || layer < 0 || layer >= 1024 || e->ndim != 2) {
            refuse("%s: %s is of no layer", st->path, e->name);
        }
        const char *at = strstr(e->name, ".experts.");
        if (at && sscanf(at, ".experts.%d.", &number) == 1 && number >= *experts) {
            if ((size_t)number >= st->n) {      // each has tensors here, and memory in the end:
                                                // a huge number in a name must not ask for it
                refuse("%s: %s, but there are %zu tensors", st->path, e->name, st->n);
            }
            *experts = number + 1;
        }
        // One fused tensor stands for w1 and w3, or for w2: the outer one, without base_layer.
        int inner = strstr(rest, "base_layer") != NULL, outer_is_down = s->targets & DOWN;
        int two = fused && (inner || !outer_is_down);
        size_t size = is_b ? e->dim[0] / (two ? 2 : 1) : e->dim[1];
        if (fused && !is_b) { *experts = (int)(e->dim[0] / (size_t)((two ? 2 : 1) * s->R)); }
        for (int k = 0; k < TARGETS; k++) {
            int same = !fused ? k == t : two ? (GATE_UP >> k & 1) : k == TARGET_EXPERTS_W2;
            if (same) { *(is_b ? &sizes[layer][k].out : &sizes[layer][k].in) = size; }
        }
    }
    for (int l = 0; l < 1024; l++) {
        for (int t = 0; t < TARGETS; t++) {
            char name[96];
            int in = (int)sizes[l][t].in, out = (int)sizes[l][t].out;
            const char *leaf = module_name(name, t, l);
            if ((in == 0 && out == 0) || !(s->targets >> t & 1)) { continue; }
            if (in == 0 || out == 0) {
                refuse("%s: %s has no lora_%c", st->path, name, in ? 'B' : 'A');
            }
            if (leaf) { adapter_add_experts(s, t, name, leaf, 0, *experts, in, out); }
            else { adapter_add(s, t, name, in, out); }
        }
    }
    if (s->n == 0) { refuse("%s: no matrix has both factors of rank %d", st->path, s->R); }
    free(sizes);
}

// Loads the adapter in dir, whatever it has, into s. c gets the number of experts, all that
// reading and saving want to know of a model. As in the trainer, registering is done twice: the
// first pass counts, mem_open gets the memory, and the second one gives out places in it. The
// factors then lie in the arenas, which the next mem_free returns: one adapter at a time.
void adapter_open(Adapters *s, Config *c, const char *dir) {
    char path[PATH_SIZE];
    int names;
    Safetensors st;
    memset(s, 0, sizeof *s);
    memset(c, 0, sizeof *c);
    adapter_read_config(dir, &s->R, &s->alpha, &s->targets, &names);
    safetensors_open(&st, path_make(path, dir, "/", file_names[FILE_ADAPTER]), not_a_folder);
    c->E = 1;
    mem_free();
    mem_count();
    for (int pass = 0; pass < 2; pass++) {
        if (pass) { mem_open(); adapters_alloc(s, 0); }
        adapter_register(s, &st, names, &c->E);
        if (!pass) { adapters_alloc(s, 0); }
    }
    safetensors_close(&st);
    adapter_load(dir, s, c);
}

// -------------------------------------------------------------------------------------------------
// 2 Other names
//
// NeMo Automodel writes checkpoint leaves under transformers' path,
//     base_model.model.model.layers.3.self_attn.wq_a.lora_A.weight
// which neither vLLM nor PEFT finds in its model. Such a file is first copied with our names. Its
// shared experts have transformers' names, so the others tell whose file it is.

// One name of Automodel's as ours, in out (160); any other name unchanged. Returns if it was one.
// automodel: names that transformers has too are Automodel's. Our names are the shorter ones, so
// what fits into 150 characters stays so.
static inline int automodel_rename(char *out, const char *name, int automodel) {
    static const char prefix[] = "base_model.model.model.layers.";
    static const struct { const char *theirs, *ours; } parts[] = {
        {"self_attn.w", "attn.w"}, {"mlp.shared_experts.w", "ffn.shared_experts.w"},
        {"mlp.experts.", "ffn.experts."},
        {"mlp.shared_experts.gate_proj.", "ffn.shared_experts.w1."},
        {"mlp.shared_experts.up_proj.", "ffn.shared_experts.w3."},
        {"mlp.shared_experts.down_proj.", "ffn.shared_experts.w2."} };
    const char *rest = name + sizeof prefix - 1;
    if (strlen(name) > 150) { refuse("%.60s...: a name of %zu characters", name, strlen(name)); }
    strcpy(out, name);
    if (strncmp(name, prefix, sizeof prefix - 1) != 0) { return 0; }
    size_t digits = strspn(rest, "0123456789");
    for (size_t i = 0; i < sizeof parts / sizeof *parts; i++) {
        size_t length = strlen(parts[i].theirs);
        const char *module = rest + digits + 1;
        if (rest[digits] != '.' || strncmp(module, parts[i].theirs, length)) { continue; }
        // transformers has mlp.experts too, as one fused tensor, without an expert's number
        if (i == 2 && !strchr("0123456789", module[length])) { continue; }
        if (i > 2 && !automodel) { continue; }
        sprintf(out, "base_model.model.layers.%.*s.%s%s", (int)digits, rest, parts[i].ours,
                module + length);
        return 1;
    }
    return 0;
}

// Copies n bytes of a file, from position `at`, to another. path: the first one's, for messages.
// fwrite is not asked for its success, here and below: save_close asks ferror.
static inline void copy_bytes(FILE *out, int from, size_t n, size_t at, const char *path) {
    char buffer[65536];
    for (size_t part; n > 0; n -= part, at += part) {
        part = n < sizeof buffer ? n : sizeof buffer;
        int error = file_pread(from, buffer, part, at);
        if (error) { refuse("cannot read %s: %s", path, strerror(error)); }
        fwrite(buffer, 1, part, out);
    }
}

// Writes the length and the header, padded so that the data is aligned. text: {...} without the }.
// A file begins so: 8 bytes of length, low byte first, JSON, blanks up to a multiple of 8, data.
// The header has one member per tensor, with its place in the data:
//
//     {"x.lora_A.weight":{"dtype":"F32","shape":[8,4096],"data_offsets":[0,131072]}, ...}
static inline void header_write(FILE *out, const char *text) {
    size_t n = strlen(text) + 1, padded = (n + 7) / 8 * 8;
    fwrite(&padded, 8, 1, out);
    fprintf(out, "%s}%*s", text, (int)(padded - n), "");
}

// Copies the adapter in dir into the folder v with Automodel's names made ours. Returns how many.
// Of the tensors' file only the header is written anew. The offsets count from the start of the
// data, so they hold whatever the header's length, and the data is copied as one block. The first
// loop asks whether some name can only be Automodel's, the second one renames.
static inline int automodel_copy(Save *v, const char *dir) {
    char path[PATH_SIZE], name[160];
    Safetensors st;
    safetensors_open(&st, path_make(path, dir, "/", file_names[FILE_ADAPTER]), not_a_folder);
    char *text = (char *)host_calloc(400 * (st.n + 1)), *end = text;
    int renamed = 0, automodel = 0;
    for (size_t i = 0; i < st.n; i++) { automodel |= automodel_rename(name, st.entry[i].name, 0); }
    for (size_t i = 0; i < st.n; i++) {
        const Entry *e = &st.entry[i];
        renamed += automodel_rename(name, e->name, automodel);
        if (strstr(e->name, ".compressor.") || strstr(e->name, ".indexer.")) {
            refuse("%s: %s: an adapter of a compressor or of the indexer has no place here HINT: "
                   "train without; a pattern such as *wkv or *wq_b matches those too, "
                   "*self_attn.wkv does not", path, e->name);
        }
        if (e->ndim != 2) {
            refuse("%s: %s has %d dimensions: all experts in one tensor is read as PEFT writes it "
                   "only (mlp.experts.lora_A, 2 dimensions)", path, e->name, e->ndim);
        }
        end += sprintf(end, "%s\"%s\":{\"dtype\":\"%s\",\"shape\":[%zu,%zu],"
                       "\"data_offsets\":[%zu,%zu]}", i ? "," : "{", name,
                       dtypes[e->dtype].name, e->dim[0], e->dim[1], e->begin, e->end);
    }
    FILE *out = save_open(v, v->temporary, file_names[FILE_ADAPTER], "wb");
    size_t size, length;
    int file = file_open(path, &size, not_a_folder);
    if (out) { header_write(out, text); copy_bytes(out, file, size - st.data, st.data, path); }
    close(file);
    save_close(v, out);
    free(text);
    safetensors_close(&st);
    path_make(path, dir, "/", file_names[FILE_CONFIG]);
    char *config = file_read(path, &length, not_a_folder);
    out = save_open(v, v->temporary, file_names[FILE_CONFIG], "wb");
    if (out) { fwrite(config, 1, length, out); }
    save_close(v, out);
    free(config);
    return renamed;
}

// The adapter in `dir`, of any naming, as folder `out` with these names. Values become F32. The
// copy with our names is OUT.renamed.tmp, which is never committed and goes once it is read.
void adapter_rename(const char *dir, const char *out, int names) {
    char base[256] = "", path[PATH_SIZE];
    Adapters s;
    Config c;
    Save v;
    Json j;
    json_load(&j, path_make(path, dir, "/", file_names[FILE_CONFIG]), not_a_folder);
    int i = json_find(&j, 0, "base_model_name_or_path");
    if (i >= 0 && json_kind(&j, i) == '"') { snprintf(base, sizeof base, "%s", json_text(&j, i)); }
    json_free(&j);
    save_begin(&v, path_make(path, out, ".renamed", ""));
    int renamed = automodel_copy(&v, dir);
    save_check(&v);
    adapter_open(&s, &c, v.temporary);
    folder_remove(v.temporary);
    adapter_check_names(s.targets, names);
    adapter_save(out, &s, &c, names, base);
    printf("merge  %d modules%s, r %d, as %s: %s\n", s.n / 2, renamed ? " (of NeMo Automodel)" : "",
           s.R, names == NAMES_HF ? "transformers names them" : "the checkpoint names them", out);
}

// -------------------------------------------------------------------------------------------------
// 3 Merging a matrix

// With d what was to be added to each value and e what its stored value has changed by,
//
//     correlation = sum d e / sqrt(sum d^2 sum e^2)
//
// 1: the weights moved in the direction that was meant; near 0: next to nothing of that arrived,
// and what else changed is rounding. No mean is subtracted. The sums go over all matrices that are
// merged, so large deltas count most.
typedef struct {                // what became of the deltas
    double meant2, made2, both; // sums of intended^2, realised^2, and of their products
    double values, changed;     // values that were meant to change; that did
} Merged;

// delta (C) = s B_o A, row o of what the adapter adds. a (R,C), b (O,R). Returns if it is not zero.
// One row, so that merging into bf16 needs no second matrix in fp32; sums are taken in double.
static inline int delta_row(float *delta, const real *a, const real *b, float s, size_t o, int C,
                            int R) {
    int any = 0;
    for (int c = 0; c < C; c++) {
        double sum = 0;
        for (int r = 0; r < R; r++) {
            sum += (double)b[o * (size_t)R + (size_t)r] * (double)a[(size_t)r * (size_t)C + c];
        }
        delta[c] = (float)(s * sum);
        any |= delta[c] != 0;
    }
    return any;
}

static inline void merged_add(Merged *m, double meant, double made) {
    m->meant2 += meant * meant;
    m->made2 += made * made;
    m->both += meant * made;
    m->values += meant != 0;
    m->changed += meant != 0 && made != 0;
}

// How the change that was made correlates with the one that was meant; 0 if there was none.
double merged_correlation(const Merged *m) {
    return m->made2 > 0 ? m->both / sqrt(m->meant2 * m->made2) : 0;
}

// Next to nothing of the adapter survived. Weights that are zero take any delta, so some may.
static inline int merged_null(const Merged *m) { return merged_correlation(m) < 0.1; }

// Prints what survived. Ends the process if nothing did.
void merged_report(const Merged *m, const char *what) {
    if (m->values == 0) { refuse("%s: the adapter adds nothing, B is zero in every module", what); }
    if (merged_null(m)) {
        refuse("%s: merging would change almost nothing, %.0f of %.0f values, correlation %.3f: "
               "the deltas are below half a step of their weights HINT: serve the adapter beside "
               "the base", what, m->changed, m->values, merged_correlation(m));
    }
    if (comm_rank() != 0) { return; }
    printf("merge  %s: %.1f %% of the values that were to change did; correlation of the change "
           "meant and made %.3f\n", what, 100 * m->changed / m->values, merged_correlation(m));
    if (m->changed < m->values) {
        printf("merge  WARNING: the rest is lost to rounding; the adapter beside the base is "
               "exact\n");
    }
}

// codes, scales = w (O,C) + s B A, in w's own format: fp4 (with its groups of 32) or fp8 (blocks of
// 128 x 128). For an engine that is sent a merged base. A matrix that its adapter does not change
// keeps its bytes: quantising again may choose other scales for the same values. codes and scales
// are the caller's and as large as w's. The sum is kept whole: one scale of fp8 is of 128 rows.
void merge_packed(uint8_t *codes, uint8_t *scales, const Tensor *w, const uint8_t *w_scales,
                  const real *a, const real *b, float s, int R, Merged *m) {
    const int fp4 = w->type == DT_FP4, O = (int)w->dim[0], C = (int)w->dim[1] << fp4;
    const size_t n_scales = fp4 ? (size_t)O * (size_t)(C / FP4_BLOCK)
        : (size_t)ceil_div(O, FP8_BLOCK) * (size_t)ceil_div(C, FP8_BLOCK);
    Widen *widen = fp4 ? widen_fp4 : widen_fp8;
    const size_t n = (size_t)O * (size_t)C;
    float *sum = (float *)host_alloc(sizeof *sum * n);
    float *delta = (float *)host_alloc(sizeof *delta * n);
    real *row = (real *)host_alloc(sizeof(real) * (size_t)C * 2), *now = row + C;
    int any = 0;
    for (size_t o = 0; o < (size_t)O; o++) {
        float *d = delta + o * (size_t)C;
        widen(row, w->data, w_scales, o, C);
        any |= delta_row(d, a, b, s, o, C, R);
        for (int c = 0; c < C; c++) { sum[o * (size_t)C + (size_t)c] = (float)row[c] + d[c]; }
    }
    if (any) { (fp4 ? quantize_fp4 : quantize_blocks_fp8)(codes, scales, sum, O, C); }
    else {
        memcpy(codes, w->data, w->dim[0] * w->dim[1]);
        memcpy(scales, w_scales, n_scales);
    }
    // What was made of it: the new codes widened, less the old ones.
    for (size_t o = 0; o < (size_t)O && any; o++) {
        widen(row, w->data, w_scales, o, C);
        widen(now, codes, scales, o, C);
        for (int c = 0; c < C; c++) {
            merged_add(m, (double)delta[o * (size_t)C + (size_t)c], (double)(now[c] - row[c]));
        }
    }
    free(row);
    free(sum);
    free(delta);
}

typedef struct { const char **name; const Adapters *s; } Factors;     // (s->n) sorted by name

// The names of all factors, which stay s's; the caller frees the list. Sorted, because a model has
// tens of thousands of matrices to look up.
static inline Factors factors_sorted(const Adapters *s) {
    Factors f = { (const char **)host_alloc(sizeof *f.name * (size_t)(s->n + 1)), s };
    for (int i = 0; i < s->n; i++) { f.name[i] = s->tensors[i].name; }
    qsort(f.name, (size_t)s->n, sizeof *f.name, by_name);
    return f;
}

// Factor 'A' or 'B' of the matrix "x.weight", which is "x.lora_A" in the list; NULL if it has no
// adapter. A tensor begins with its name, so the name's address is the tensor's.
static inline const AdapterTensor *factor_find(const Factors *f, const char *weight, char factor) {
    char name[160], *key = name;
    int length = (int)strlen(weight) - 7;
    if (length < 0 || strcmp(weight + length, ".weight") != 0) { return NULL; }
    snprintf(name, sizeof name, "%.*s.lora_%c", length, weight, factor);
    void *found = bsearch(&key, f->name, (size_t)f->s->n, sizeof key, by_name);
    return found ? *(const AdapterTensor *const *)found : NULL;
}

// Collective. What an engine is sent instead of the base and its adapters: out (n) becomes the
// table t (n) with merged matrices. Their memory is `mirror`, as large as the weights' arena, which
// is copied there first: so what is not merged is there too, and a tensor has one place in both.
// The table has a matrix's scales right behind it, at i + 1. Each rank merges what it holds, and
// the sums of all ranks decide. Refuses a merge that all but loses the adapter.
void merge_base(Tensor *out, const Tensor *t, size_t n, const Adapters *s, uint8_t *mirror) {
    CPU_ONLY();
    const uint8_t *base = mem.arena[MEM_WEIGHTS].base;
    Factors f = factors_sorted(s);
    Merged m = {0};
    memcpy(mirror, base, mem.arena[MEM_WEIGHTS].used);
    for (size_t i = 0; i < n; i++) {
        out[i] = t[i];
        if (t[i].data) { out[i].data = mirror + ((const uint8_t *)t[i].data - base); }
    }
    for (size_t i = 0; i < n; i++) {
        const AdapterTensor *a = factor_find(&f, t[i].name, 'A');
        const AdapterTensor *b = factor_find(&f, t[i].name, 'B');
        if (a == NULL || t[i].data == NULL || s->p == NULL) { continue; }
        merge_packed((uint8_t *)out[i].data, (uint8_t *)out[i + 1].data, &t[i],
                     (const uint8_t *)t[i + 1].data, s->p + a->at, s->p + b->at, s->scale, s->R,
                     &m);
    }
    free(f.name);
    double sums[] = { m.meant2, m.made2, m.both, m.values, m.changed };
    comm_sum_double(COMM_WORLD, sums, 5, "merge");
    merged_report(&(Merged){ sums[0], sums[1], sums[2], sums[3], sums[4] }, "the merged base");
}

// -------------------------------------------------------------------------------------------------
// 4 Merging a checkpoint
//
// One file at a time, one matrix at a time: memory is that of the largest matrix. Every matrix that
// has scales is widened, with or without an adapter, and becomes bf16; its scales are left out. All
// else is copied. The result has no fp8 or fp4, and its config.json does not speak of them.
//
//     x.weight F8_E4M3 [O,C], x.scale F8_E8M0 [O/128,C/128]     becomes  x.weight BF16 [O,C]
//     x.weight I8 [O,C/2], x.scale F8_E8M0 [O,C/32]             becomes  x.weight BF16 [O,C]
//
// (O/128 and C/128 are rounded up.) So a file grows: a byte of fp8 becomes two, a byte with two
// codes of fp4 four.

typedef struct {
    const Adapters *s;
    Factors factors;
    Safetensors *shard;         // (shards) of the checkpoint, opened
    int shards;
    Merged merged;
    FILE *index;                // model.safetensors.index.json: which tensor is in which file
    int listed;                 // tensors in it so far
    size_t done, total;         // bytes of the tensors that are read; scales aside
    double start, last;         // seconds: when it began, when progress was last shown
} Merging;

// The scales of a matrix, in whatever file they are; NULL if it has none. The caller frees them.
// "x.weight" has "x.scale": one exponent (e8m0) per block of 128 x 128 of fp8, or per 32 of fp4.
static inline uint8_t *merge_scales(const Merging *g, const Entry *e) {
    char name[160];
    int length = (int)strlen(e->name) - 6;
    if ((e->type != DT_FP8 && e->type != DT_FP4) || length < 0) { return NULL; }
    snprintf(name, sizeof name, "%.*sscale", length, e->name);
    for (int k = 0; k < g->shards; k++) {
        const Safetensors *st = &g->shard[k];
        const Entry *scale = safetensors_find(st, name);
        if (scale == NULL) { continue; }
        int fp4 = e->type == DT_FP4;
        size_t rows = fp4 ? e->dim[0] : (e->dim[0] + 127) / 128;
        size_t cols = fp4 ? e->dim[1] * 2 / FP4_BLOCK : (e->dim[1] + 127) / 128;
        if (scale->type != DT_E8M0 || scale->ndim != 2 || scale->dim[0] != rows ||
            scale->dim[1] != cols) {
            refuse("%s: %s has not the type and shape for its matrix", st->path, name);
        }
        uint8_t *scales = (uint8_t *)host_alloc(rows * cols);
        int error = file_pread(st->fd, scales, rows * cols, st->data + scale->begin);
        if (error) { refuse("cannot read %s: %s", st->path, strerror(error)); }
        return scales;
    }
    refuse("%s has no %s, and is %s", e->name, name, dtypes[e->dtype].name);
}

// Writes one matrix as bf16: widened, with its adapter's delta if it has one. Without one delta
// stays zero, and a value of fp8 or fp4 fits into bf16, so the statistics see neither a change that
// was meant nor one that was made.
static inline void merge_matrix(Merging *g, FILE *out, const Safetensors *st, const Entry *e) {
    const AdapterTensor *a = factor_find(&g->factors, e->name, 'A');
    const AdapterTensor *b = factor_find(&g->factors, e->name, 'B');
    const size_t O = e->dim[0], n = e->end - e->begin;
    const int C = (int)e->dim[1] << (e->type == DT_FP4);
    uint8_t *scales = merge_scales(g, e), *data = (uint8_t *)host_alloc(n);
    int error = file_pread(st->fd, data, n, st->data + e->begin);
    if (error) { refuse("cannot read %s: %s", st->path, strerror(error)); }
    if (a && (a->cols != C || b->rows != (int)O)) {
        refuse("%s is [%zu,%d], its adapter is for [%d,%d]", e->name, O, C, b->rows, a->cols);
    }
    real *row = (real *)host_alloc(sizeof(real) * (size_t)C);
    float *delta = (float *)host_calloc(sizeof(float) * (size_t)C);
    bf16 *rounded = (bf16 *)host_alloc(sizeof(bf16) * (size_t)C);
    for (size_t o = 0; o < O; o++) {
        if (scales) { (e->type == DT_FP4 ? widen_fp4 : widen_fp8)(row, data, scales, o, C); }
        for (int c = 0; c < C && !scales; c++) {
            bf16 x;
            memcpy(&x, data + 2 * (o * (size_t)C + (size_t)c), 2);
            row[c] = float_from_bf16(x);
        }
        if (a) { delta_row(delta, g->s->p + a->at, g->s->p + b->at, g->s->scale, o, C, g->s->R); }
        for (int c = 0; c < C; c++) {
            rounded[c] = bf16_from_float((float)row[c] + delta[c]);
            merged_add(&g->merged, (double)delta[c],
                       (double)float_from_bf16(rounded[c]) - (double)row[c]);
        }
        fwrite(rounded, sizeof(bf16), (size_t)C, out);
    }
    free(rounded);
    free(delta);
    free(row);
    free(data);
    free(scales);
}

// For a list of pointers: the entries themselves are sorted by name, the data is not.
static inline int entry_order(const void *a, const void *b) {
    return entry_by_begin(*(const Entry *const *)a, *(const Entry *const *)b);
}

// Writes one file of the merged checkpoint: the same tensors in the same order, but for scales. The
// header comes first in the file, so all sizes are known before any data is written. at: where the
// next tensor begins in the new data.
static inline void merge_shard(Merging *g, Save *v, const Safetensors *st) {
    const Entry **list = (const Entry **)host_alloc(sizeof *list * (st->n + 1));
    char *text = NULL;
    size_t length;
    FILE *header = open_memstream(&text, &length);
    if (header == NULL) { die(EXIT_FIT, "no memory for the header of %s", st->path); }
    const char *file = strrchr(st->path, '/') + 1;
    size_t at = 0, n = 0;
    for (size_t i = 0; i < st->n; i++) {
        if (st->entry[i].type != DT_E8M0) { list[n++] = &st->entry[i]; }
    }
    qsort(list, n, sizeof *list, entry_order);
    for (size_t i = 0; i < n; i++) {
        const Entry *e = list[i];
        int wide = e->type == DT_FP8 || e->type == DT_FP4;
        size_t size = wide ? (e->end - e->begin) << (1 + (e->type == DT_FP4)) : e->end - e->begin;
        if (e->ndim > DIMS_MAX) { refuse("%s: %s has %d dimensions", st->path, e->name, e->ndim); }
        fprintf(header, "%s\"%s\":{\"dtype\":\"%s\",\"shape\":[", i ? "," : "{", e->name,
                wide ? "BF16" : dtypes[e->dtype].name);
        for (int d = 0; d < e->ndim; d++) {
            fprintf(header, "%s%zu", d ? "," : "", e->dim[d] << (d == 1 && e->type == DT_FP4));
        }
        fprintf(header, "],\"data_offsets\":[%zu,%zu]}", at, at + size);
        at += size;
        fprintf(g->index, "%s\"%s\": \"%s\"", g->listed++ ? ",\n" : "", e->name, file);
    }
    if (fclose(header) != 0) { die(EXIT_FIT, "no memory for the header of %s", st->path); }
    FILE *out = save_open(v, v->temporary, file, "wb");
    if (out) { header_write(out, n ? text : "{"); }
    for (size_t i = 0; i < n && out; i++) {
        const Entry *e = list[i];
        int adapted = e->type == DT_BF16 && factor_find(&g->factors, e->name, 'A');
        if (e->type == DT_FP8 || e->type == DT_FP4 || adapted) { merge_matrix(g, out, st, e); }
        else { copy_bytes(out, st->fd, e->end - e->begin, st->data + e->begin, st->path); }
        g->done += e->end - e->begin;
        progress("merge", g->done, g->total, g->start, &g->last);
    }
    save_close(v, out);
    save_check(v);
    free(text);
    free(list);
}

// config.json without what says that weights are quantised. The other members are copied as they
// are written, so that no number or order changes on the way. j, which has a copy of its own, says
// where each begins; a member reaches from the quote of its key to the next one's, less the comma.
static inline void merge_config(Save *v, const char *dir) {
    char path[PATH_SIZE];
    size_t size;
    Json j;
    char *text = file_read(path_make(path, dir, "/", "config.json"), &size, not_a_folder);
    json_load(&j, path, not_a_folder);          // it ends its strings inside its own copy
    FILE *out = save_open(v, v->temporary, "config.json", "wb");
    text[j.tok[0].end - 1] = 0;                 // without the object's own }
    for (int k = 0, i = 1, written = 0; out && k < j.tok[0].size; k++) {
        int next = json_next(&j, i + 1), last = k + 1 == j.tok[0].size;
        const char *key = json_text(&j, i), *from = text + j.tok[i].start - 1;
        const char *end = last ? text + strlen(text) : text + j.tok[next].start - 1;
        while (strchr(" \t\r\n,", end[-1])) { end--; }
        i = next;
        if (!strcmp(key, "quantization_config") || !strcmp(key, "expert_dtype")) { continue; }
        fprintf(out, "%s%.*s", written++ ? ",\n  " : "{\n  ", (int)(end - from), from);
    }
    if (out) { fputs("\n}\n", out); }
    save_close(v, out);
    free(text);
    json_free(&j);
}

// What else is in the folder, the tokenizer above all, is copied. Not hidden files, which
// folder_remove leaves, and no folders. Weights and config.json are written elsewhere.
static inline void merge_others(Save *v, const char *dir) {
    static const char index[] = "model.safetensors.index.json";
    char path[PATH_SIZE];
    DIR *d = opendir(dir);
    struct stat info;
    for (struct dirent *e; d && (e = readdir(d)) != NULL;) {
        const char *end = strrchr(e->d_name, '.');
        int ours = !strcmp(e->d_name, "config.json") || !strcmp(e->d_name, index);
        path_make(path, dir, "/", e->d_name);
        if (ours || e->d_name[0] == '.' || (end && strcmp(end, ".safetensors") == 0)) { continue; }
        if (stat(path, &info) != 0 || !S_ISREG(info.st_mode)) { continue; }
        size_t size;
        int from = file_open(path, &size, not_a_folder);
        FILE *out = save_open(v, v->temporary, e->d_name, "wb");
        if (out) { copy_bytes(out, from, size, 0, path); }
        save_close(v, out);
        close(from);
    }
    if (d) { closedir(d); }
}

// Merges the adapter in `dir` into the checkpoint at `base`, as folder `out`, in bf16. The index of
// the base names a file per tensor, {"weight_map": {"x.weight": "model-00001-of-00046.safetensors",
// ...}}; each file is opened once. Every one of the adapter's factors must find its matrix. A merge
// after which next to nothing of the adapter is left leaves no folder.
void merge_checkpoint(const char *base, const char *dir, const char *out) {
    char path[PATH_SIZE];
    Adapters s;
    Config c;
    Save v;
    Json j;
    adapter_open(&s, &c, dir);
    Merging g = { .s = &s, .factors = factors_sorted(&s) };
    size_t used = 0;
    json_load(&j, path_make(path, base, "/", "model.safetensors.index.json"), not_a_folder);
    int map = json_get(&j, 0, "weight_map", '{');
    g.shard = (Safetensors *)host_alloc(sizeof *g.shard * (size_t)(j.tok[map].size + 1));
    for (int k = 0, i = map + 1; k < j.tok[map].size; k++, i = json_next(&j, i + 1)) {
        int known = 0;
        path_make(path, base, "/", json_text(&j, i + 1));
        while (known < g.shards && strcmp(g.shard[known].path, path) != 0) { known++; }
        if (known == g.shards) { safetensors_open(&g.shard[g.shards++], path, not_a_folder); }
    }
    for (int k = 0; k < g.shards; k++) {        // an adapter for another model is not left out
        for (size_t i = 0; i < g.shard[k].n; i++) {
            const Entry *e = &g.shard[k].entry[i];
            used += 2 * (factor_find(&g.factors, e->name, 'A') != NULL);
            g.total += e->type == DT_E8M0 ? 0 : e->end - e->begin;
        }
    }
    if (used != (size_t)s.n) {
        refuse("%s: %zu of the adapter's %d tensors have a matrix in %s", dir, used, s.n, base);
    }
    save_begin(&v, out);
    g.index = save_open(&v, v.temporary, "model.safetensors.index.json", "wb");
    save_check(&v);
    fputs("{\"metadata\": {}, \"weight_map\": {\n", g.index);
    g.start = g.last = clock_seconds();
    for (int k = 0; k < g.shards; k++) { merge_shard(&g, &v, &g.shard[k]); }
    fputs("\n}}\n", g.index);
    save_close(&v, g.index);
    merge_config(&v, base);
    merge_others(&v, base);
    save_check(&v);
    if (merged_null(&g.merged)) { folder_remove(v.temporary); }
    merged_report(&g.merged, out);
    save_commit(&v);
    for (int k = 0; k < g.shards; k++) { safetensors_close(&g.shard[k]); }
    json_free(&j);
    free(g.shard);
    free(g.factors.name);
}

#ifdef MERGE_MAIN
int main(int argc, char **argv) {
    int hf = argc == 5 && strcmp(argv[2], "hf") == 0;
    int names = argc == 5 && strcmp(argv[1], "names") == 0 && (hf || !strcmp(argv[2], "vllm"));
    if (!names && (argc != 5 || strcmp(argv[1], "bf16") != 0)) {
        refuse("usage: merge names vllm|hf ADAPTER OUT, or merge bf16 CHECKPOINT ADAPTER OUT");
    }
    for (int i = names ? 3 : 2; i < 5; i++) {       // OUT/ has another temporary name than OUT
        char *end = argv[i] + strlen(argv[i]);
        while (end > argv[i] + 1 && end[-1] == '/') { *--end = 0; }
    }
    // Saving replaces what has the name, which may be the base that was named by mistake. rmdir
    // removes an empty folder and nothing else.
    if (rmdir(argv[4]) != 0 && errno != ENOENT) {
        refuse("%s is there already: %s HINT: a new folder's name, or an empty folder", argv[4],
               strerror(errno));
    }
    if (names) { adapter_rename(argv[3], argv[4], hf ? NAMES_HF : NAMES_VLLM); }
    else { merge_checkpoint(argv[2], argv[3], argv[4]); }
    return 0;
}
#endif
#endif // MERGE_C
