// Tests of dev/merge.c: an adapter is the same under either naming and as NeMo Automodel writes it;
// a merged checkpoint holds, element by element, bf16(W + s B A) of the matrices as they were
// written here; and a merge that changes nothing, or would overwrite something, is refused.
#include "../refit.c"
// What merging last said of its progress.
static size_t progress_done, progress_total;
#define progress(what, done, total, start, last) \
    (progress_done = (done), progress_total = (total), (void)(start), (void)(last))
#define MERGE_MAIN
#define main merge_main
#include "../dev/merge.c"
#undef main
#include "check.h"

static char root[64];

static char *in_root(char *out, const char *name) { return path_make(out, root, "/", name); }

static char *read_text(const char *dir, const char *name, size_t *n) {
    char path[PATH_SIZE];
    return file_read(path_make(path, dir, "/", name), n, "");
}

static int same_file(const char *a, const char *b, const char *name) {
    size_t n, m;
    char *x = read_text(a, name, &n), *y = read_text(b, name, &m);
    int same = n == m && memcmp(x, y, n) == 0;
    free(x);
    free(y);
    return same;
}

// -------------------------------------------------------------------------------------------------
// An adapter of two layers, three experts, odd sizes

enum { L = 2, E = 3, C = 64, F = 96, Q = 5, R = 2 };
static Adapters s;
static const Config config = { .E = E, .layers = L };

static void make_adapter(unsigned targets, float b_size) {
    memset(&s, 0, sizeof s);
    s.R = R;
    s.alpha = 3;
    s.targets = targets;
    mem_free();
    mem_count();
    for (int pass = 0; pass < 2; pass++) {
        if (pass) { mem_open(); adapters_alloc(&s, 0); }
        adapters_begin(&s);
        for (int l = 0; l < L; l++) {
            char name[96];
            snprintf(name, sizeof name, "layers.%d.attn.wq_a", l);
            adapter_add(&s, TARGET_WQ_A, name, C, Q);
            snprintf(name, sizeof name, "layers.%d.attn.wkv", l);
            adapter_add(&s, TARGET_WKV, name, C, Q + l);        // layers may differ
            for (int t = TARGET_SHARED_W1; t <= TARGET_SHARED_W3; t++) {
                snprintf(name, sizeof name, "layers.%d.%s", l, adapter_modules[t].ours);
                adapter_add(&s, t, name, C, F);
            }
            snprintf(name, sizeof name, "layers.%d.ffn.experts", l);
            adapter_add_experts(&s, TARGET_EXPERTS_W1, name, "w1", 0, E, C, F);
            adapter_add_experts(&s, TARGET_EXPERTS_W2, name, "w2", 0, E, F, C);
            adapter_add_experts(&s, TARGET_EXPERTS_W3, name, "w3", 0, E, C, F);
        }
        if (!pass) { adapters_alloc(&s, 0); }
    }
    for (int i = 0; i < s.n; i++) {
        const AdapterTensor *t = &s.tensors[i];
        float size = strstr(t->name, "lora_B") ? b_size : 0.3f;
        for (size_t k = 0; k < (size_t)(t->rows * t->cols); k++) {
            s.p[t->at + k] = size * (random_uniform(random_key(1, t->name), k) - 0.5f);
        }
    }
}

enum { SHARED = 1u << TARGET_SHARED_W1 | 1u << TARGET_SHARED_W2 | 1u << TARGET_SHARED_W3 };

static void test_names(void) {
    static const unsigned sets[] = { 1u << TARGET_WQ_A | 1u << TARGET_WKV | GATE_UP | DOWN,
                                     1u << TARGET_WKV | GATE_UP, DOWN, 1u << TARGET_WQ_A,
                                     SHARED, 1u << TARGET_WKV | SHARED | DOWN };
    char vllm[PATH_SIZE], hf[PATH_SIZE], there[PATH_SIZE], back[PATH_SIZE], name[32];
    for (int k = 0; k < 6; k++) {
        char *const dirs[] = { vllm, hf, there, back };
        for (int d = 0; d < 4; d++) { sprintf(name, "names%d.%d", k, d); in_root(dirs[d], name); }
        make_adapter(sets[k], 1);
        adapter_save(vllm, &s, &config, NAMES_VLLM, "base");
        adapter_save(hf, &s, &config, NAMES_HF, "base");
        adapter_rename(vllm, there, NAMES_HF);
        adapter_rename(there, back, NAMES_VLLM);
        for (int f = 0; f < FILE_OPTIMIZER; f++) {
            check(same_file(there, hf, file_names[f]), "set %d, to hf: %s", k, file_names[f]);
            check(same_file(back, vllm, file_names[f]), "set %d, and back: %s", k, file_names[f]);
        }
    }
}

// Automodel's file is ours with other names: written here by replacing text in the header. Shared
// experts have transformers' leaves in it, routed ones the checkpoint's.
static void test_automodel(void) {
    char ours[PATH_SIZE], theirs[PATH_SIZE], out[PATH_SIZE], path[PATH_SIZE], *text;
    size_t n, length;
    static const char *const parts[][2] = {
        {"attn.", "self_attn."}, {"ffn.shared_experts.w1", "mlp.shared_experts.gate_proj"},
        {"ffn.shared_experts.w2", "mlp.shared_experts.down_proj"},
        {"ffn.shared_experts.w3", "mlp.shared_experts.up_proj"}, {"ffn.", "mlp."}, {"", ""} };
    make_adapter(1u << TARGET_WQ_A | 1u << TARGET_WKV | SHARED | GATE_UP | DOWN, 1);
    adapter_save(in_root(ours, "ours"), &s, &config, NAMES_VLLM, "base");
    adapter_save(in_root(theirs, "theirs"), &s, &config, NAMES_VLLM, "base");
    text = read_text(theirs, file_names[FILE_ADAPTER], &n);
    memcpy(&length, text, 8);
    char *header = (char *)calloc(2, n), *end = header;
    for (const char *c = text + 8; c < text + 8 + length; c++) {
        const char *from = "base_model.model.layers.", *part = c + 26;     // behind "0."
        int k = 0;
        if (strncmp(c, from, 24) != 0) { *end++ = *c; continue; }
        while (strncmp(part, parts[k][0], strlen(parts[k][0])) != 0) { k++; }
        end += sprintf(end, "base_model.model.model.layers.%.2s%s", c + 24, parts[k][1]);
        c += 25 + strlen(parts[k][0]);
    }
    FILE *f = fopen(path_make(path, theirs, "/", file_names[FILE_ADAPTER]), "wb");
    size_t changed = (size_t)(end - header);
    fwrite(&changed, 8, 1, f);
    fwrite(header, 1, changed, f);
    fwrite(text + 8 + length, 1, n - 8 - length, f);
    fclose(f);
    free(header);
    free(text);
    adapter_rename(theirs, in_root(out, "converted"), NAMES_VLLM);
    check(same_file(ours, out, file_names[FILE_ADAPTER]), "Automodel's names became ours");
    check(!same_file(ours, theirs, file_names[FILE_ADAPTER]), "and were others");
    check(access(path_make(path, out, ".renamed.tmp", ""), F_OK) != 0, "nothing is left over");
    char name[160];
    check(automodel_rename(name,
                           "base_model.model.model.layers.12.mlp.experts.7.w2.lora_A.weight", 0) &&
          strcmp(name, "base_model.model.layers.12.ffn.experts.7.w2.lora_A.weight") == 0,
          "experts");
    check(!automodel_rename(name,
                            "base_model.model.model.layers.12.self_attn.q_a_proj.lora_A.weight", 1),
          "transformers' names are not Automodel's");
    check(!automodel_rename(name, "base_model.model.model.layers.1.mlp.experts.lora_A.weight", 1),
          "nor is a fused tensor");
}

static struct { const char *argv[6]; } tool_case;
static void run_tool(void *unused) {
    (void)unused;
    static char word[6][PATH_SIZE];
    char *argv[6];
    int argc = 0;
    for (; argc < 6 && tool_case.argv[argc]; argc++) {
        argv[argc] = strcpy(word[argc], tool_case.argv[argc]);
    }
    exit(merge_main(argc, argv));
}

// Runs the program with four arguments. Returns its exit code; its error is in tool_said.
static char tool_said[2048];
static int tool(const char *what, const char *a, const char *b, const char *c) {
    tool_case = (__typeof__(tool_case)){ { "merge", what, a, b, c, NULL } };
    return run_child(run_tool, NULL, tool_said, sizeof tool_said);
}

// What the wildcards of Automodel's recipes also hit, and experts in one tensor: refused by name.
static void test_automodel_refused(void) {
    static const struct { const char *name, *shape, *error; } cases[] = {
        {"self_attn.compressor.wkv.lora_A.weight", "2,2", "no place here"},
        {"self_attn.compressor.indexer.wq_b.lora_B.weight", "2,2", "no place here"},
        {"self_attn.indexer.q_b_proj.lora_B.weight", "2,2", "no place here"},
        {"mlp.experts.lora_gate_and_up_A", "1,2,2", "has 3 dimensions: all experts in one"} };
    char dir[PATH_SIZE], out[PATH_SIZE], path[PATH_SIZE], head[512];
    make_adapter(1u << TARGET_WKV, 1);
    adapter_save(in_root(dir, "refused.in"), &s, &config, NAMES_VLLM, "base");
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        snprintf(head, sizeof head, "{\"base_model.model.model.layers.2.%s\":{\"dtype\":\"F32\","
                 "\"shape\":[%s],\"data_offsets\":[0,16]}", cases[i].name, cases[i].shape);
        FILE *f = fopen(path_make(path, dir, "/", file_names[FILE_ADAPTER]), "wb");
        header_write(f, head);
        fwrite("0123456789abcdef", 1, 16, f);
        fclose(f);
        int code = tool("names", "vllm", dir, in_root(out, "refused.out"));
        check(code == 1 && strstr(tool_said, cases[i].name) && strstr(tool_said, cases[i].error),
              "%s: exit code %d, %s", cases[i].name, code, tool_said);
        check(access(out, F_OK) != 0, "%s: something is written", cases[i].name);
    }
}

// -------------------------------------------------------------------------------------------------
// A checkpoint of two files; the scales of one matrix are in the other file

static float w8[Q * C], w4[E][F * C];
static uint8_t codes8[Q * C], scale8[1], codes4[E][F * C / 2], scale4[E][F * C / 32];
static bf16 plain[Q * C];

static void put_tensor(char **head, unsigned char **data, const char *name, const char *dtype,
                       int rows, int cols, const void *bytes, size_t n,
                       const unsigned char *start) {
    *head += sprintf(*head,
                     "%c\"%s\":{\"dtype\":\"%s\",\"shape\":[%d,%d],\"data_offsets\":[%zu,%zu]}",
                     *data == start ? '{' : ',', name, dtype, rows, cols, (size_t)(*data - start),
                     (size_t)(*data - start) + n);
    memcpy(*data, bytes, n);
    *data += n;
}

static void put_file(const char *path, const char *head, const unsigned char *data, size_t n) {
    FILE *f = fopen(path, "wb");
    if (f == NULL) { perror(path); exit(99); }
    header_write(f, head);
    fwrite(data, 1, n, f);
    fclose(f);
}

// Away from zero, which takes any delta: +-[0.08, 0.16).
static float weight(uint64_t key, int i) {
    float u = random_uniform(key, (uint64_t)i) - 0.5f;
    return u * 0.16f + (u < 0 ? -0.08f : 0.08f);
}

static void put_checkpoint(const char *dir) {
    static unsigned char data[2][65536];
    static char head[2][16384], index[16384], longer[4001];
    char path[PATH_SIZE], name[96], *h[2] = { head[0], head[1] }, *x = index;
    unsigned char *d[2] = { data[0], data[1] };
    mkdir(dir, 0777);
    for (int i = 0; i < Q * C; i++) { w8[i] = weight(5, i); }
    quantize_blocks_fp8(codes8, scale8, w8, Q, C);
    for (int e = 0; e < E; e++) {
        for (int i = 0; i < F * C; i++) { w4[e][i] = weight((uint64_t)(6 + e), i); }
        quantize_fp4(codes4[e], scale4[e], w4[e], F, C);
    }
    for (int i = 0; i < Q * C; i++) { plain[i] = bf16_from_float(w8[i] * 3); }
    x += sprintf(x, "{\"weight_map\": {");
    for (int l = 0; l < L; l++) {         // layer 0 in the first file, layer 1 in the second,
        for (int e = -1; e < E; e++) {    // but the scales of the dense matrix the other way round
            const char *dense = "layers.%d.attn.wq_a.%s",
                       *expert = "layers.%d.ffn.experts.%d.w1.%s";
            for (int scale = 0; scale < 2; scale++) {
                int file = e < 0 && scale ? 1 - l : l;
                const char *end = scale ? "scale" : "weight";
                if (e < 0) { snprintf(name, sizeof name, dense, l, end); }
                else { snprintf(name, sizeof name, expert, l, e, end); }
                const void *bytes = e < 0 ? scale ? scale8 : codes8 : scale ? scale4[e] : codes4[e];
                int rows = e < 0 ? scale ? 1 : Q : F,
                    cols = e < 0 ? scale ? 1 : C : scale ? C / 32 : C / 2;
                put_tensor(&h[file], &d[file], name, scale ? "F8_E8M0" : e < 0 ? "F8_E4M3" : "I8",
                           rows, cols, bytes, (size_t)(rows * cols), data[file]);
                x += sprintf(x, "\"%s\": \"model-%d.safetensors\", ", name, file);
            }
        }
    }
    put_tensor(&h[1], &d[1], "layers.0.attn.wkv.weight", "BF16", Q, C, plain, sizeof plain,
               data[1]);
    put_tensor(&h[0], &d[0], "norm.weight", "BF16", 1, C, plain, 2 * C, data[0]);
    memset(longer, 'n', sizeof longer - 1);         // a name that is longer than any of ours
    put_tensor(&h[0], &d[0], longer, "BF16", 1, C, plain, 2 * C, data[0]);
    sprintf(x, "\"layers.0.attn.wkv.weight\": \"model-1.safetensors\", \"%s\": "
            "\"model-0.safetensors\", \"norm.weight\": \"model-0.safetensors\"}}", longer);
    for (int k = 0; k < 2; k++) {
        snprintf(name, sizeof name, "model-%d.safetensors", k);
        put_file(path_make(path, dir, "/", name), head[k], data[k], (size_t)(d[k] - data[k]));
    }
    const char *texts[][2] = {
        {"model.safetensors.index.json", index}, {"tokenizer.json", "{\"x\": 1}"},
        {"config.json",
         "\xEF\xBB\xBF{\"a\": [1, {\"b\": 2}], \"quantization_config\": {\"fmt\": \"e4m3\"},\n"
         " \"s\": \"x}, \\\"y\", \"expert_dtype\": \"fp4\", \"last\": {\"z\": {}}}\n"} };
    for (int k = 0; k < 3; k++) {
        FILE *f = fopen(path_make(path, dir, "/", texts[k][0]), "wb");
        fputs(texts[k][1], f);
        fclose(f);
    }
}

// The tensors that have a matrix in that checkpoint: w1 of all experts, wq_a, and wkv of layer 0.
static void make_small_adapter(float b_size) {
    make_adapter(1u << TARGET_WQ_A | 1u << TARGET_EXPERTS_W1, b_size);
}

static float *read_bf16(const char *dir, const char *name, size_t n) {
    for (int k = 0; k < 2; k++) {
        char path[PATH_SIZE], file[32];
        Safetensors st;
        snprintf(file, sizeof file, "model-%d.safetensors", k);
        safetensors_open(&st, path_make(path, dir, "/", file), "");
        const Entry *e = safetensors_find(&st, name);
        if (e && e->type == DT_BF16 && e->end - e->begin == 2 * n) {
            bf16 *half = (bf16 *)malloc(2 * n);
            float *x = (float *)malloc(4 * n);
            if (file_pread(st.fd, half, 2 * n, st.data + e->begin)) { exit(99); }
            for (size_t i = 0; i < n; i++) { x[i] = float_from_bf16(half[i]); }
            free(half);
            safetensors_close(&st);
            return x;
        }
        safetensors_close(&st);
    }
    return NULL;
}

static double factor_at(const char *name, int i) {
    for (int k = 0; k < s.n; k++) {
        if (strcmp(s.tensors[k].name, name) == 0) {
            return (double)s.p[s.tensors[k].at + (size_t)i];
        }
    }
    exit(99);
}

// One merged matrix against the definition; base (O,C) is what its codes stand for.
static void check_matrix(const char *dir, const char *module, const real *base, int O) {
    char name[112], a[112], b[112];
    snprintf(name, sizeof name, "%s.weight", module);
    snprintf(a, sizeof a, "%s.lora_A", module);
    snprintf(b, sizeof b, "%s.lora_B", module);
    float *got = read_bf16(dir, name, (size_t)(O * C));
    if (!check(got != NULL, "%s is not there as bf16", name)) { return; }
    double worst = 0;
    for (int o = 0; o < O; o++) {
        for (int c = 0; c < C; c++) {
            double want = (double)base[o * C + c];
            for (int r = 0; r < R; r++) {
                want += 1.5 * factor_at(b, o * R + r) * factor_at(a, r * C + c);    // alpha / r
            }
            worst = fmax(worst, fabs((double)got[o * C + c] - want) / fmax(fabs(want), 1e-6));
        }
    }
    check(worst <= 1.001 / 256, "%s: off by %g, half a step of bf16 is %g", name, worst, 1.0 / 256);
    free(got);
}

static struct { const char *base, *adapter, *out; } merge_case;
static void run_merge(void *unused) {
    (void)unused;
    merge_checkpoint(merge_case.base, merge_case.adapter, merge_case.out);
}

static void check_refused(const char *what, const char *expect) {
    char text[2048];
    int code = run_child(run_merge, NULL, text, sizeof text);
    check(code == 1 && strstr(text, expect), "%s: exit code %d, %s", what, code, text);
    check(access(merge_case.out, F_OK) != 0, "%s: nothing is written", what);
}

static void test_checkpoint(void) {
    char base[PATH_SIZE], adapter[PATH_SIZE], out[PATH_SIZE], module[64], path[PATH_SIZE];
    static real wide[F * C];
    size_t n;
    put_checkpoint(in_root(base, "base"));
    make_small_adapter(0.5f);
    adapter_save(in_root(adapter, "small"), &s, &config, NAMES_VLLM, "base");
    merge_checkpoint(base, adapter, in_root(out, "merged"));
    for (int l = 0; l < L; l++) {
        for (int o = 0; o < Q; o++) { widen_fp8(wide + o * C, codes8, scale8, (size_t)o, C); }
        snprintf(module, sizeof module, "layers.%d.attn.wq_a", l);
        check_matrix(out, module, wide, Q);
        for (int e = 0; e < E; e++) {
            for (int o = 0; o < F; o++) {
                widen_fp4(wide + o * C, codes4[e], scale4[e], (size_t)o, C);
            }
            snprintf(module, sizeof module, "layers.%d.ffn.experts.%d.w1", l, e);
            check_matrix(out, module, wide, F);
        }
    }
    float *kept = read_bf16(out, "layers.0.attn.wkv.weight", Q * C);
    for (int i = 0; kept && i < Q * C; i++) {
        check_close("copied", i, (double)kept[i], (double)float_from_bf16(plain[i]), 0);
    }
    check(kept != NULL, "what has no adapter is there");
    Json j;
    json_load(&j, path_make(path, out, "/", "config.json"), "");
    check(j.tok[0].size == 3 && json_find(&j, 0, "quantization_config") < 0 &&
          json_find(&j, 0, "expert_dtype") < 0 && json_find(&j, 0, "last") > 0 &&
          strcmp(json_text(&j, json_find(&j, 0, "s")), "x}, \"y") == 0, "config.json");
    json_free(&j);
    json_load(&j, path_make(path, out, "/", "model.safetensors.index.json"), "");
    int map = json_get(&j, 0, "weight_map", '{');
    check(j.tok[map].size == L * (1 + E) + 3 && json_find(&j, map, "layers.0.attn.wq_a.scale") < 0,
          "the index names what is there: %d", j.tok[map].size);
    json_free(&j);
    char *text = read_text(out, "tokenizer.json", &n);
    check(strcmp(text, "{\"x\": 1}") == 0, "the tokenizer is copied");
    free(text);

    size_t read = L * (Q * C + E * F * C / 2) + 2 * (Q * C + 2 * C);   // without scales
    check(progress_done == read && progress_total == read, "progress in bytes: %zu of %zu, not "
          "%zu", progress_done, progress_total, read);

    char refused[PATH_SIZE];
    merge_case = (__typeof__(merge_case)){ base, adapter, in_root(refused, "refused") };
    make_small_adapter(0);
    adapter_save(adapter, &s, &config, NAMES_VLLM, "base");
    check_refused("B is zero", "the adapter adds nothing");
    make_small_adapter(1e-7f);
    adapter_save(adapter, &s, &config, NAMES_VLLM, "base");
    check_refused("deltas far below a step", "would change almost nothing");
    make_adapter(1u << TARGET_WKV, 1);
    adapter_save(adapter, &s, &config, NAMES_VLLM, "base");
    check_refused("a matrix that is not in the checkpoint", "2 of the adapter's 4 tensors");
    unlink(path_make(path, base, "/", "model-0.safetensors"));
    check_refused("a missing file", "model-0.safetensors: No such file");
}

// What is at OUT is never touched, unless it is an empty folder; how its name ends does not matter.
static void test_out(void) {
    char base[PATH_SIZE], adapter[PATH_SIZE], out[PATH_SIZE], path[PATH_SIZE], slashes[PATH_SIZE];
    char there[PATH_SIZE];
    put_checkpoint(in_root(base, "base2"));
    make_small_adapter(0.5f);
    adapter_save(in_root(adapter, "small2"), &s, &config, NAMES_VLLM, "base");
    fclose(fopen(path_make(path, base, "/", ".gitattributes"), "w"));
    mkdir(in_root(there, "hidden"), 0777);
    fclose(fopen(path_make(path, there, "/", ".keep"), "w"));
    fclose(fopen(in_root(out, "file"), "w"));
    const char *const full[] = { base, adapter, there, out };
    for (int k = 0; k < 8; k++) {
        int code = k / 4 ? tool("names", "vllm", adapter, full[k % 4])
                         : tool("bf16", base, adapter, full[k]);
        check(code == 1 && strstr(tool_said, full[k % 4]) && strstr(tool_said, "HINT: ")
              && strchr(tool_said, '\n') == tool_said + strlen(tool_said) - 1,
              "over %s: exit code %d, '%s'", full[k % 4], code, tool_said);
    }
    check(access(path_make(path, base, "/", "model-1.safetensors"), F_OK) == 0
          && access(path_make(path, adapter, "/", "adapter_config.json"), F_OK) == 0
          && access(path_make(path, there, "/", ".keep"), F_OK) == 0 && access(out, F_OK) == 0,
          "something was removed");
    for (int k = 0; k < 4; k++) {       // twice to a new name, twice to an empty folder
        char name[16];
        snprintf(name, sizeof name, "slashes%d", k);
        in_root(out, name);
        if (k > 1) { mkdir(out, 0777); }
        path_make(slashes, out, "//", "");
        int code = k % 2 ? tool("names", "vllm", path_make(path, adapter, "/", ""), slashes)
                         : tool("bf16", path_make(path, base, "/", ""),
                                path_make(there, adapter, "/", ""), slashes);
        check(code == 0, "to %s: exit code %d, '%s'", slashes, code, tool_said);
        check(access(path_make(path, out, "/", k % 2 ? "adapter_config.json" : "config.json"),
                     F_OK) == 0, "nothing in %s", out);
        check(access(path_make(path, out, "/", ".gitattributes"), F_OK) != 0, "a hidden file in "
              "%s: its folder could not be removed", out);
    }
    check(tool("bf16", base, adapter, NULL) == 1 && strstr(tool_said, "usage"), "'%s'", tool_said);
}

// Adapters that lack something: no tensor, one factor of two, all experts but the last, a rank.
static void test_damaged(void) {
    static const struct { unsigned targets; int names; const char *name[2], *error; } cases[] = {
        {1u << TARGET_WQ_A, NAMES_VLLM, {NULL, NULL}, "is of no matrix that can be trained"},
        {1u << TARGET_WQ_A, NAMES_VLLM, {"layers.0.attn.wq_a.lora_A", NULL}, "wq_a has no lora_B"},
        {1u << TARGET_WQ_A, NAMES_VLLM, {NULL, "layers.0.attn.wq_a.lora_B"}, "wq_a has no lora_A"},
        {1u << TARGET_EXPERTS_W1, NAMES_VLLM, {"layers.0.ffn.experts.2147483646.w1.lora_A",
         "layers.0.ffn.experts.2147483646.w1.lora_B"}, "but there are 2 tensors"},
        {DOWN, NAMES_HF, {"model.layers.0.mlp.experts.lora_A", "model.layers.0.mlp.experts.lora_B"},
         "both factors of rank 2"} };
    static const unsigned char zeros[C * 4];
    static unsigned char data[C * 8];
    char base[PATH_SIZE], dir[PATH_SIZE], out[PATH_SIZE], path[PATH_SIZE], head[1024], name[160];
    merge_case = (__typeof__(merge_case)){ in_root(base, "base"), in_root(dir, "damaged"),
                                           in_root(out, "refused") };
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        make_adapter(cases[i].targets, 1);
        adapter_save(dir, &s, &config, cases[i].names, "base");
        char *h = head + sprintf(head, "{");
        unsigned char *d = data;
        for (int k = 0; k < 2; k++) {
            if (cases[i].name[k] == NULL) { continue; }
            h -= d == data;                     // put_tensor writes the first brace itself
            snprintf(name, sizeof name, "base_model.model.%s.weight", cases[i].name[k]);
            put_tensor(&h, &d, name, "F32", k ? C : 1, k ? 1 : C, zeros, C * 4, data);
        }
        put_file(path_make(path, dir, "/", file_names[FILE_ADAPTER]), head, data,
                 (size_t)(d - data));
        check_refused(cases[i].error, cases[i].error);
    }
}

// -------------------------------------------------------------------------------------------------
// Merged in its own format

static void test_packed(void) {
    static uint8_t codes[F * C], scales[F * C / 32];
    static real a[R * C], b[F * R], row[C];
    for (int fp4 = 0; fp4 < 2; fp4++) {
        int O = fp4 ? F : Q;
        Tensor w = { .type = fp4 ? DT_FP4 : DT_FP8, .ndim = 2,
                     .dim = { (size_t)O, (size_t)(fp4 ? C / 2 : C) },
                     .data = fp4 ? codes4[0] : codes8 };
        const uint8_t *old = fp4 ? scale4[0] : scale8;
        size_t n = w.dim[0] * w.dim[1], n_scales = fp4 ? F * C / 32 : 1;
        double last = 2;
        for (int k = 0; k < 4; k++) {    // deltas of 0, and of 1, 0.1 and 0.01 of the weights
            Merged m = {0};
            float size = k == 0 ? 0 : k == 1 ? 1 : k == 2 ? 0.1f : 0.01f;
            for (int i = 0; i < R * C; i++) { a[i] = random_uniform(31, (uint64_t)i) - 0.5f; }
            for (int i = 0; i < O * R; i++) {
                b[i] = size * (random_uniform(32, (uint64_t)i) - 0.5f) / 2;
            }
            memset(codes, 0xA5, sizeof codes);
            merge_packed(codes, scales, &w, old, a, b, 1, R, &m);
            if (k == 0) {    // small codes under a large scale, which quantising would not choose
                static uint8_t odd[F * C];
                memset(odd, fp4 ? 0x11 : 0x30, n);
                Tensor small = w;
                small.data = odd;
                merge_packed(codes, scales, &small, old, a, b, 1, R, &m);
                check(memcmp(codes, odd, n) == 0 && memcmp(scales, old, n_scales) == 0 &&
                      m.values == 0, "no delta: the same bytes, not only the same values");
                merge_packed(codes, scales, &w, old, a, b, 1, R, &m);
                check(memcmp(codes, w.data, n) == 0 && memcmp(scales, old, n_scales) == 0,
                      "no delta: the same bytes");
                continue;
            }
            double correlation = merged_correlation(&m), meant = 0, made = 0, both = 0;
            for (int o = 0; o < O; o++) {       // the same, from the bytes and the definition
                (fp4 ? widen_fp4 : widen_fp8)(row, codes, scales, (size_t)o, C);
                real before[C];
                (fp4 ? widen_fp4 : widen_fp8)(before, w.data, old, (size_t)o, C);
                for (int c = 0; c < C; c++) {
                    double d = 0, got = (double)(row[c] - before[c]);
                    for (int r = 0; r < R; r++) {
                        d += (double)b[o * R + r] * (double)a[r * C + c];
                    }
                    meant += d * d;
                    made += got * got;
                    both += d * got;
                    check(fabs(got - d) < (fp4 ? 0.12 : 0.03), "[%d,%d]: change %g, meant %g", o, c,
                          got, d);
                }
            }
            check_close("correlation", k, correlation,
                        made > 0 ? both / sqrt(meant * made) : 0, 1e-5);
            printf("  %s, delta %4.2f: %3.0f %% changed, correlation %.3f\n", fp4 ? "fp4" : "fp8",
                   (double)size, 100 * m.changed / m.values, correlation);
            check(correlation < last && (k > 1 || correlation > 0.9),
                  "smaller deltas survive worse");
            last = correlation;
        }
    }
}

int main(void) {
#ifdef _OPENMP
    omp_set_num_threads(1);             // so that children may have threads of their own
#endif
    snprintf(root, sizeof root, "/tmp/test_merge.XXXXXX");
    if (mkdtemp(root) == NULL) { perror(root); return 99; }
#ifndef HAVE_JSMN
    skip("everything that reads JSON: built without jsmn.h (make deps)");
    return finish("test_merge");
#endif
    test_names();
    test_automodel();
    test_automodel_refused();
    test_checkpoint();
    test_out();
    test_damaged();
    test_packed();
    char command[128];
    snprintf(command, sizeof command, "rm -rf '%s'", root);
    if (system(command) != 0) { return 99; }
    return finish("test_merge");
}
