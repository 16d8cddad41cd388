// refit.c: trained weights leave the trainer, for a file or for an inference engine.
//
// In the trainer a tensor is a pointer, and each rank has some of them. In a file it is a name, a
// shape and a range of bytes; in another program it has another name, or is fused with others; in
// an engine it is cut over ranks in another way. This file is all these changes, and it does not
// know the model: it takes the list of trained matrices, and a table of (name, type, shape, place).
//
//     adapter folder:     adapter_config.json, adapter_model.safetensors (PEFT's format)
//     training state:     an adapter folder with optimizer.safetensors and state.json
//     refit:              box of the trainer's rank -> box of the engine's rank, over the wire
//
// Nothing written replaces anything before it is complete and on the disk: folders are written
// under a temporary name, synced and renamed, so a run can be killed at any instruction. Nothing is
// sent before all ranks have proved that they plan the same, and that it leaves no byte out.
//
// Contents
//   1 two namings of an adapter       5 resharding: who holds what
//   2 saving together, loading alone  6 resharding: the plan
//   3 adapter folders                 7 resharding: three ways to move
//   4 training state
#ifndef REFIT_C
#define REFIT_C
#include "dev/data/checkpoint.c"    // defines: Tensor, Config, safetensors_*, json_*, path_make,
                                    // refuse; below it comm_*, Adapters

static const char other_adapter[] = "HINT: made for another model, --lora-r or --lora-targets";

// -------------------------------------------------------------------------------------------------
// 1 The two namings of an adapter
//
// Programs that serve the model know its matrices by the checkpoint's names, one per expert (vllm).
// transformers (hf) has names of its own, and one tensor for all experts of a layer, with w1 over
// w3. PEFT adapts such a tensor by one A and one B:
//
//     A (E*r,in):  row    = expert*r + rank       experts slowest
//     B (out,r*E): column = rank*E + expert       experts fastest
//
// Two matrices that are fused need twice the rank: an expert's rows of A are w1's r and then w3's,
// B is block diagonal (w1's rows use the first r ranks, w3's the others), and alpha is doubled, so
// that alpha/r stays. All this was measured with peft 0.21 on transformers 5.17.

enum { NAMES_VLLM, NAMES_HF };

static const struct { const char *ours, *hf; } adapter_modules[TARGETS] = {
    [TARGET_WQ_A]       = {"attn.wq_a",             "self_attn.q_a_proj"},
    [TARGET_WQ_B]       = {"attn.wq_b",             "self_attn.q_b_proj"},
    [TARGET_WKV]        = {"attn.wkv",              "self_attn.kv_proj"},
    [TARGET_WO_B]       = {"attn.wo_b",             "self_attn.o_b_proj"},
    [TARGET_SHARED_W1]  = {"ffn.shared_experts.w1", "mlp.shared_experts.gate_proj"},
    [TARGET_SHARED_W2]  = {"ffn.shared_experts.w2", "mlp.shared_experts.down_proj"},
    [TARGET_SHARED_W3]  = {"ffn.shared_experts.w3", "mlp.shared_experts.up_proj"},
    [TARGET_EXPERTS_W1] = {"ffn.experts.#.w1",      "mlp.experts"},     // # stands for a number; in
    [TARGET_EXPERTS_W2] = {"ffn.experts.#.w2",      "mlp.experts"},     // hf this is the module of
    [TARGET_EXPERTS_W3] = {"ffn.experts.#.w3",      "mlp.experts"},     // two fused tensors:
};
static const char gate_up[] = "mlp.experts.gate_up_proj";
enum { GATE_UP = 1u << TARGET_EXPERTS_W1 | 1u << TARGET_EXPERTS_W3,
       DOWN = 1u << TARGET_EXPERTS_W2 };

// Which module "layers.3.ffn.experts.17.w1.lora_A" is of. Returns its target, or -1, and the layer
// and the text behind the module, ".lora_A".
static inline int adapter_parse(const char *name, int names, int *layer, const char **rest) {
    int used = 0;
    *rest = name;
    if (sscanf(name, "layers.%d.%n", layer, &used) != 1 || used == 0) { return -1; }
    for (int t = 0; t < TARGETS; t++) {
        const char *c = names == NAMES_HF ? adapter_modules[t].hf : adapter_modules[t].ours;
        *rest = name + used;
        for (size_t match = 1; *c && match; c++, *rest += match) {
            match = *c == '#' ? strspn(*rest, "0123456789") : **rest == *c;
            if (!match) { *rest = ""; }
        }
        if (**rest == '.') { return t; }
    }
    return -1;
}

// hf has one tensor for the experts' w1 and w3, so either both are trained or none. For the start
// of a run: the end would be late to say so.
void adapter_check_names(unsigned targets, int names) {
    if (names == NAMES_HF && (targets & GATE_UP) && (targets & GATE_UP) != GATE_UP) {
        refuse("--adapter-names hf: transformers has the experts' w1 and w3 in one tensor, so both "
               "must be trained, or none HINT: add the other one, or --adapter-names vllm");
    }
}

// The files of a folder that is being saved.
enum { FILE_CONFIG, FILE_ADAPTER, FILE_OPTIMIZER, FILE_STATE, FILES };
static const char *const file_names[FILES] = {
    "adapter_config.json", "adapter_model.safetensors", "optimizer.safetensors", "state.json" };

// The tensors of FILE_ADAPTER, or of FILE_OPTIMIZER: the moments, under the adapter tensors' names
// with .m and .v, in pairs; Muon has no .v. Both are stored by name. The list has all ranks'
// tensors and is small, 4 bytes for each: a save during training must not allocate more than 1 MiB.
typedef struct {
    const Adapters *s;
    int file, names, E, first, local;   // this rank owns experts first .. first+local-1 of E
    size_t n;
    uint32_t *code;                     // (n) place in s->tensors * E + expert, where an expert's
} Roster;                               // place is that of this rank's first one

typedef struct {                // one of them
    char name[160];
    size_t dim[2];
    const AdapterTensor *t;
    int expert, halves;         // halves: of a fused tensor; 0 if it is none
    real *values;               // where t->at counts from
} Item;

// Tensor i of the file.
static inline Item roster_item(const Roster *f, size_t i) {
    const size_t moments = f->s->muon ? 1 : 2;
    const int moment = f->file == FILE_OPTIMIZER ? 1 + (int)(i % moments) : 0;
    const uint32_t code = f->code[moment ? i / moments : i], E = (uint32_t)f->E;
    const AdapterTensor *t = &f->s->tensors[code / E];
    const char *suffix = moment == 0 ? ".weight" : moment == 1 ? ".weight.m" : ".weight.v", *rest;
    Item it = { .dim = { (size_t)t->rows, (size_t)t->cols }, .t = t, .expert = (int)(code % E),
                .values = moment == 0 ? f->s->p : moment == 1 ? f->s->m : f->s->v };
    if (f->names == NAMES_HF) {
        int layer = 0, target = adapter_parse(t->name, NAMES_VLLM, &layer, &rest);
        it.halves = t->expert < 0 ? 0 : target == TARGET_EXPERTS_W2 ? 1 : 2;
        if (it.halves) {
            it.dim[0] *= (size_t)it.halves * (rest[6] == 'A' ? E : 1);          // ".lora_A"
            it.dim[1] *= rest[6] == 'A' ? 1 : (size_t)it.halves * E;
        }
        // PEFT wraps a module once per tensor, the alphabetically first (down_proj) outermost.
        const char *inner = it.halves == 2 && f->s->targets & DOWN ? ".base_layer" : "";
        snprintf(it.name, sizeof it.name, "base_model.model.model.layers.%d.%s%s%s%s", layer,
                 adapter_modules[target].hf, inner, rest, suffix);
        return it;
    }
    const char *number = t->expert < 0 ? "" : strstr(t->name, ".experts.") + 9;
    int before = *number ? (int)(number - t->name) : (int)strlen(t->name);
    char digits[12] = "";
    if (*number) { sprintf(digits, "%d", it.expert); }
    snprintf(it.name, sizeof it.name, "base_model.model.%.*s%s%s%s", before, t->name, digits,
             number + strspn(number, "0123456789"), suffix);
    return it;
}

static Roster sorting;              // qsort has no argument for it
static inline int roster_order(const void *a, const void *b) {
    static uint32_t pair[2];
    pair[0] = *(const uint32_t *)a;
    pair[1] = *(const uint32_t *)b;
    sorting.code = pair;
    Item x = roster_item(&sorting, 0), y = roster_item(&sorting, 1);
    return strcmp(x.name, y.name);
}

// Lists the tensors of all ranks' adapters, sorted by name.
static inline Roster roster_make(const Adapters *s, const Config *c, int names) {
    const int local = c->E / comm_ep();
    Roster f = { .s = s, .file = FILE_ADAPTER, .names = names, .E = c->E, .local = local,
                 .first = comm_ep_rank() * local };
    adapter_check_names(s->targets, names);
    require(c->E % comm_ep() == 0);
    f.code = (uint32_t *)host_alloc((size_t)s->n * (size_t)comm_ep() * sizeof *f.code);
    for (int i = 0; i < s->n; i++) {
        const AdapterTensor *t = &s->tensors[i];
        int fused = names == NAMES_HF && t->expert >= 0, count = t->expert < 0 || fused ? 1 : f.E;
        if (t->expert > f.first || (fused && strstr(t->name, ".w3."))) { continue; }
        for (int e = 0; e < count; e++) { f.code[f.n++] = (uint32_t)(i * f.E + e); }
    }
    sorting = f;
    qsort(f.code, f.n, sizeof *f.code, roster_order);
    return f;
}

// Whether this rank has something of the tensor; and when writing, whether it is the one to do it.
static inline int roster_mine(const Roster *f, const Item *it, int writing) {
    int e = it->expert - f->first;
    if (writing && comm_rank() >= comm_ep()) { return 0; }          // a replica
    if (it->t->expert < 0) { return !writing || comm_rank() == 0; }
    return it->halves > 0 || (e >= 0 && e < f->local);
}

// -------------------------------------------------------------------------------------------------
// 2 Saving together, loading alone
//
// An expert's adapter exists on one rank (of each replica group), so all ranks write one file: the
// first its header, each its own tensors, at places that everybody can compute. In a fused tensor a
// rank's experts are many short runs of columns; reading and writing are the same walk over these
// runs. Every rank reads what is its own, however many ranks there were when it was written.

typedef struct {                // a file of which runs are read or written
    FILE *f;
    int writing, type;          // DT_* of the elements in the file
    size_t base, at;            // where the present tensor begins; where f is
    int error;                  // errno; EDOM: what must be zero is not; ERANGE: not finite
} Stream;

// A run: elements first .. first + n - 1 of the tensor lie `stride` apart in memory. Writes them
// from there, or reads them to there; values == NULL: they must be zero.
static inline void stream_run(Stream *s, size_t first, real *values, size_t stride, size_t n) {
    const size_t size = s->type == DT_F32 ? 4 : 2, at = s->base + first * size;
    unsigned char bytes[16384];
    if (!s->error && at != s->at && fseeko(s->f, (off_t)at, SEEK_SET) != 0) { s->error = errno; }
    s->at = at + n * size;
    for (size_t done = 0, part; done < n && !s->error; done += part) {
        part = n - done < sizeof bytes / size ? n - done : sizeof bytes / size;
        if (!s->writing && fread(bytes, size, part, s->f) != part) {
            s->error = ferror(s->f) ? errno : ENODATA;
        }
        for (size_t i = 0; i < part; i++) {
            real *value = values ? &values[(done + i) * stride] : NULL;
            float x = s->writing ? (float)*value : 0;
            uint16_t half;
            if (s->writing) { memcpy(bytes + i * 4, &x, 4); continue; }
            memcpy(&half, bytes + i * size, 2);
            if (size == 4) { memcpy(&x, bytes + i * 4, 4); }
            else { x = s->type == DT_F16 ? float_from_f16(half) : float_from_bf16((bf16){ half }); }
            if (!isfinite(x) && !s->error) { s->error = ERANGE; }
            if (value) { *value = x; } else if (x != 0 && !s->error) { s->error = EDOM; }
        }
        if (s->writing && fwrite(bytes, size, part, s->f) != part) { s->error = errno; }
    }
}

// The runs of this rank's part of a tensor, between file and memory.
static inline void roster_move(Stream *s, const Roster *f, const Item *it) {
    const AdapterTensor *t = it->t, *up = t;        // up: w3's, if t is w1's
    const size_t rows = (size_t)t->rows, size = rows * (size_t)t->cols, R = (size_t)f->s->R;
    const size_t E = (size_t)f->E, first = (size_t)f->first, local = (size_t)f->local,
                 halves = (size_t)it->halves;
    if (halves == 0) {
        size_t e = t->expert < 0 ? 0 : (size_t)it->expert - first;
        stream_run(s, 0, it->values + t->at + e * size, 1, size);
        return;
    }
    char name[sizeof t->name];
    memcpy(name, t->name, sizeof name);
    const int is_a = name[strlen(name) - 1] == 'A';
    if (halves == 2) {
        strstr(name, ".w1.")[2] = '3';
        for (up = f->s->tensors; strcmp(up->name, name) != 0; up++) { }
    }
    for (size_t half = 0; half < halves; half++) {
        real *own = it->values + (half ? up : t)->at;
        for (size_t e = 0; e < local && is_a; e++) {        // (E, halves, R, cols)
            stream_run(s, ((first + e) * halves + half) * size, own + e * size, 1, size);
        }
        for (size_t o = 0; o < rows && !is_a; o++) {        // (halves, rows, halves, R, E)
            size_t row = (half * rows + o) * halves * R * E, off = row + (1 - half) * R * E;
            for (size_t r = 0; r < R; r++) {
                stream_run(s, row + (half * R + r) * E + first, own + o * R + r, size, local);
            }
            // Off the diagonal are zeros; where nothing is written, a file has them.
            if (halves == 2 && !s->writing) { stream_run(s, off, NULL, 0, R * E); }
        }
    }
}

typedef struct {                // a folder that is being saved
    char dir[PATH_SIZE], temporary[PATH_SIZE];
    int error;                  // the first errno on this rank; after it nothing is written
} Save;

// A file to be written, for rank 0; NULL after an error.
static inline FILE *save_open(Save *v, const char *dir, const char *name, const char *mode) {
    char path[PATH_SIZE];
    FILE *f = v->error ? NULL : fopen(path_make(path, dir, "/", name), mode);
    if (f == NULL && !v->error) { v->error = errno; }
    return f;
}

// Closes it, once its bytes are on the disk.
static inline void save_close(Save *v, FILE *f) {
    if (f == NULL) { return; }
    int failed = ferror(f) || fflush(f) != 0 || (fsync(fileno(f)) != 0 && errno != EINVAL);
    if (failed && !v->error) { v->error = errno ? errno : EIO; }
    if (fclose(f) != 0 && !v->error) { v->error = errno; }
}

// Collective. After an error on any rank: the folder is removed, and all end with the same line.
static inline void save_check(Save *v) {
    int *errors = (int *)host_alloc(sizeof(int) * (size_t)comm_ranks()), failed = -1;
    comm_gather_int(COMM_WORLD, errors, &v->error, 1, "save: errors");
    for (int r = comm_ranks() - 1; r >= 0; r--) { failed = errors[r] ? r : failed; }
    if (failed >= 0) {
        const int e = errors[failed], full = e == ENOSPC || e == EDQUOT || e == EFBIG;
        if (comm_rank() == 0) { folder_remove(v->temporary); }
        comm_barrier(COMM_WORLD, "save: removed");
        die(full ? EXIT_FIT : EXIT_USAGE, "rank %d cannot save %s: %s; what was saved before is "
            "untouched%s", failed, v->dir, strerror(e), full ? " HINT: make room" : "");
    }
    free(errors);
}

// Collective. Begins a folder that will be dir, under a temporary name.
static inline void save_begin(Save *v, const char *dir) {
    path_make(v->dir, dir, "", "");
    path_make(v->temporary, dir, ".tmp", "");
    v->error = 0;
    if (comm_rank() == 0) {
        folder_remove(v->temporary);
        v->error = mkdir(v->temporary, 0777) == 0 ? 0 : errno;
    }
    save_check(v);
}

// Collective. The folder, complete, gets its name. One that had it is called .old for a moment.
static inline void save_commit(Save *v) {
    char old[PATH_SIZE], parent[PATH_SIZE];
    save_check(v);
    if (comm_rank() == 0) {
        path_make(old, v->dir, ".old", "");
        v->error = folder_sync(v->temporary);
        if (!v->error && access(v->dir, F_OK) == 0) {
            folder_remove(old);
            v->error = rename(v->dir, old) == 0 ? 0 : errno;
        }
        if (!v->error && rename(v->temporary, v->dir) != 0) {
            v->error = errno;
            rename(old, v->dir);
        }
        if (!v->error) { v->error = folder_sync(path_make(parent, v->dir, "/..", "")); }
        if (!v->error) { folder_remove(old); }
    }
    save_check(v);
}

// The header's part for all tensors of the file. Returns its length, and that of the data; writes
// it if out is not NULL. All are F32, so the order of the format's library, by type and then by
// name, is by name; the moments' suffixes do not change it.
static inline size_t roster_header(FILE *out, const Roster *f, size_t tensors, size_t *data) {
    size_t length = 0, at = 0;
    for (size_t i = 0; i < tensors; i++, at = *data) {
        char line[320];
        Item it = roster_item(f, i);
        *data = at + it.dim[0] * it.dim[1] * 4;
        length += (size_t)snprintf(line, sizeof line, ",\"%s\":{\"dtype\":\"F32\",\"shape\":"
                                   "[%zu,%zu],\"data_offsets\":[%zu,%zu]}", it.name, it.dim[0],
                                   it.dim[1], at, *data);
        if (out) { fputs(line, out); }
    }
    return length;
}

// Collective. Writes the file of the list.
static inline void roster_write(Save *v, const Roster *f) {
    static const char start[] = "{\"__metadata__\":{\"format\":\"pt\"}";
    const size_t tensors = f->file == FILE_OPTIMIZER && !f->s->muon ? 2 * f->n : f->n;
    size_t data = 0, n = sizeof start + roster_header(NULL, f, tensors, &data);
    size_t padded = (n + 7) / 8 * 8;        // blanks align the data, as the format's library does
    double begin = clock_seconds(), last = begin;
    const char *name = file_names[f->file];
    FILE *out = comm_rank() == 0 ? save_open(v, v->temporary, name, "wb") : NULL;
    if (out) {
        fwrite(&padded, 8, 1, out);
        fputs(start, out);
        roster_header(out, f, tensors, &data);
        fprintf(out, "}%*s", (int)(padded - n), "");
        if (fflush(out) != 0 || ftruncate(fileno(out), (off_t)(8 + padded + data)) != 0) {
            v->error = errno;
        }
        save_close(v, out);
    }
    save_check(v);
    out = comm_rank() < comm_ep() ? save_open(v, v->temporary, name, "r+b") : NULL;
    Stream s = { .f = out, .writing = 1, .type = DT_F32, .base = 8 + padded, .at = NOWHERE,
                 .error = v->error };        // replicas write nothing, and may have another disk
    for (size_t i = 0; i < tensors; i++) {
        Item it = roster_item(f, i);
        if (roster_mine(f, &it, 1)) { roster_move(&s, f, &it); }
        s.base += it.dim[0] * it.dim[1] * 4;
        progress("save", s.base, data, begin, &last);
    }
    v->error = s.error;
    save_close(v, s.f);
}

// Reads what belongs to this rank. Every tensor of the list must be in the file, and no other.
static inline void roster_read(const char *dir, const Roster *f) {
    const size_t tensors = f->file == FILE_OPTIMIZER && !f->s->muon ? 2 * f->n : f->n;
    char path[PATH_SIZE], have[120];
    Safetensors st;
    safetensors_open(&st, path_make(path, dir, "/", file_names[f->file]), not_a_folder);
    char *seen = (char *)host_calloc(st.n);
    Stream s = { .f = fopen(path, "rb"), .at = NOWHERE };
    if (s.f == NULL) { refuse("cannot open %s: %s", path, strerror(errno)); }
    for (size_t i = 0; i < tensors; i++) {
        Item it = roster_item(f, i);
        const Entry *e = safetensors_find(&st, it.name);
        if (e == NULL || (e->type != DT_F32 && e->type != DT_F16 && e->type != DT_BF16) ||
            e->ndim != 2 || e->dim[0] != it.dim[0] || e->dim[1] != it.dim[1]) {
            refuse("%s: %s is %s, expected F32, F16 or BF16 [%zu,%zu] %s", path, it.name, e
                   ? shape_text(have, e->dtype, e->ndim, e->dim) : "missing", it.dim[0], it.dim[1],
                   other_adapter);
        }
        seen[e - st.entry] = 1;
        s.type = e->type;
        s.base = st.data + e->begin;
        if (roster_mine(f, &it, 0)) { roster_move(&s, f, &it); }
        if (s.error) {
            refuse("%s: %s %s", path, it.name, s.error == ERANGE ? "is not finite" : s.error == EDOM
                   ? "is not zero off its diagonal: w1 and w3 share ranks" : strerror(s.error));
        }
    }
    for (size_t i = 0; i < st.n; i++) {
        if (!seen[i]) {
            refuse("%s: %s is of no trained matrix %s", path, st.entry[i].name, other_adapter);
        }
    }
    free(seen);
    fclose(s.f);
    safetensors_close(&st);
}

// -------------------------------------------------------------------------------------------------
// 3 Adapter folders
//
// What PEFT and vLLM load. target_modules is a pattern anchored at both ends: a bare "wkv" or
// "q_b_proj" would also match the compressor's and the indexer's matrices, which were not trained,
// and the loader would give them adapters of random numbers.

// Writes the pattern of all modules that are trained; [] if only fused tensors are.
static inline void write_target_modules(FILE *f, unsigned targets, int names) {
    const char *between = names == NAMES_HF ? "\"^model\\\\.layers\\\\.\\\\d+\\\\.("
                                            : "\"^layers\\\\.\\\\d+\\\\.(";
    if (names == NAMES_HF) { targets &= ~(unsigned)(GATE_UP | DOWN); }
    for (int t = 0; t < TARGETS; t++) {
        if (!(targets >> t & 1)) { continue; }
        fputs(between, f);
        between = "|";
        const char *c = names == NAMES_HF ? adapter_modules[t].hf : adapter_modules[t].ours;
        for (; *c; c++) { fprintf(f, *c == '.' ? "\\\\." : *c == '#' ? "\\\\d+" : "%c", *c); }
    }
    fputs(targets ? ")$\"" : "[]", f);
}

static inline void write_adapter_config(FILE *f, const Adapters *s, int names, const char *base) {
    const char *slash = strrchr(base, '/');     // a folder's name, not where it is on this machine
    const int fused = names == NAMES_HF && s->targets & GATE_UP;
    const int two = names == NAMES_HF && s->targets & DOWN ? 2 : 0;
    static const char *const parameters[] = {
        "null", "[\"mlp.experts.gate_up_proj\"]", "[\"mlp.experts.down_proj\"]",
        "[\"mlp.experts.gate_up_proj\", \"mlp.experts.down_proj\"]" };
    fputs("{\n  \"peft_type\": \"LORA\",\n  \"task_type\": \"CAUSAL_LM\",\n"
          "  \"base_model_name_or_path\": ", f);
    json_quote(f, slash ? slash + 1 : base);
    fprintf(f, ",\n  \"r\": %d,\n  \"lora_alpha\": %.9g,\n  \"target_modules\": ", s->R, s->alpha);
    write_target_modules(f, s->targets, names);
    fprintf(f, ",\n  \"target_parameters\": %s,\n  \"rank_pattern\": {", parameters[fused + two]);
    if (fused) { fprintf(f, "\"%s\": %d", gate_up, 2 * s->R); }
    fputs("},\n  \"alpha_pattern\": {", f);
    if (fused) { fprintf(f, "\"%s\": %.9g", gate_up, 2 * s->alpha); }
    fputs("},\n  \"lora_dropout\": 0.0,\n  \"bias\": \"none\",\n  \"use_rslora\": false,\n"
          "  \"use_dora\": false,\n  \"fan_in_fan_out\": false,\n  \"init_lora_weights\": true,\n"
          "  \"inference_mode\": true,\n  \"modules_to_save\": null\n}\n", f);
}

// Collective. Writes the files of an adapter into a folder that is being saved.
static inline void save_adapter(Save *v, const Adapters *s, const Config *c, int names,
                                const char *base_name, int with_moments) {
    FILE *out = comm_rank() ? NULL : save_open(v, v->temporary, file_names[FILE_CONFIG], "wb");
    if (out) { write_adapter_config(out, s, names, base_name); }
    save_close(v, out);
    Roster f = roster_make(s, c, names);
    roster_write(v, &f);
    f.file = FILE_OPTIMIZER;
    if (with_moments) { roster_write(v, &f); }
    free(f.code);
}

// Collective. Saves the adapter as folder dir. base_name: the checkpoint's folder, for people.
void adapter_save(const char *dir, const Adapters *s, const Config *c, int names,
                  const char *base_name) {
    Save v;
    save_begin(&v, dir);
    save_adapter(&v, s, c, names, base_name, 0);
    save_commit(&v);
}

// What kind of adapter is in dir: r and alpha from its config, the rest from its tensors' names,
// which say exactly what patterns only say roughly.
void adapter_read_config(const char *dir, int *r, float *alpha, unsigned *targets, int *names) {
    char path[PATH_SIZE], model[PATH_SIZE];
    Json j;
    Safetensors st;
    json_load(&j, path_make(path, dir, "/", file_names[FILE_CONFIG]), not_a_folder);
    size_t rank = json_size(&j, json_get(&j, 0, "r", '0'));
    double scale = json_number(&j, json_get(&j, 0, "lora_alpha", '0'));
    int rslora = json_find(&j, 0, "use_rslora"), fused = 0;
    if (rank - 1 >= 1 << 16 || !(scale > 0) || (rslora >= 0 && *json_text(&j, rslora) == 't')) {
        refuse("%s: expected r and lora_alpha above 0, and use_rslora false", path);
    }
    *r = (int)rank;
    *alpha = (float)scale;
    *targets = 0;
    *names = NAMES_VLLM;
    safetensors_open(&st, path_make(model, dir, "/", file_names[FILE_ADAPTER]), not_a_folder);
    for (size_t i = 0; i < st.n; i++) {
        const char *name = st.entry[i].name, *prefix = "base_model.model.model.", *rest;
        int layer, target = -1;
        if (i == 0) { *names = strncmp(name, prefix, 23) == 0 ? NAMES_HF : NAMES_VLLM; }
        size_t length = *names == NAMES_HF ? 23 : 17;
        if (strncmp(name, prefix, length) == 0) {
            target = adapter_parse(name + length, *names, &layer, &rest);
        }
        if (target < 0) { refuse("%s: %s is of no matrix that can be trained here", model, name); }
        *targets |= 1u << target;
    }
    int list = json_find(&j, 0, "target_parameters");
    if (*names == NAMES_HF) { *targets &= ~(unsigned)(GATE_UP | DOWN); }
    for (int k = 0; list >= 0 && k < j.tok[list].size; k++) {       // null has no elements
        const char *leaf = strrchr(json_text(&j, list + 1 + k), '.');
        if (leaf && strcmp(leaf, ".gate_up_proj") == 0) { *targets |= GATE_UP; fused = 1; }
        if (leaf && strcmp(leaf, ".down_proj") == 0) { *targets |= DOWN; }
    }
    // The fused tensor has twice the rank, which its shape will show, and twice the alpha.
    int pattern = json_find(&j, 0, "alpha_pattern"), own = json_find(&j, pattern, gate_up);
    if ((pattern >= 0 ? j.tok[pattern].size : 0) != fused ||
        (fused && (own < 0 || (float)json_number(&j, own) != 2 * *alpha))) {
        refuse("%s: alpha_pattern says that not all matrices have the same alpha/r", path);
    }
    if (*targets == 0) { refuse("%s is of no matrix that can be trained here", model); }
    safetensors_close(&st);
    json_free(&j);
}

// Reads the files of an adapter folder into s, whose r, alpha and targets must be the adapter's.
static inline void load_adapter(const char *dir, Adapters *s, const Config *c, int with_moments) {
    int r, names;
    float alpha;
    unsigned targets;
    adapter_read_config(dir, &r, &alpha, &targets, &names);
    if (r != s->R || alpha != s->alpha || targets != s->targets) {
        refuse("%s has r %d and alpha %g, this run %d and %g%s HINT: without --lora-* options the "
               "adapter's are taken", dir, r, alpha, s->R, s->alpha,
               targets != s->targets ? ", and other targets" : "");
    }
    Roster f = roster_make(s, c, names);
    roster_read(dir, &f);
    f.file = FILE_OPTIMIZER;
    if (with_moments) { roster_read(dir, &f); }
    free(f.code);
}

// Reads the adapter in dir, of either naming.
void adapter_load(const char *dir, Adapters *s, const Config *c) { load_adapter(dir, s, c, 0); }

// -------------------------------------------------------------------------------------------------
// 4 Training state
//
// OUT/checkpoint-NNNNNN is an adapter folder, so that any checkpoint can be served, plus the
// moments and state.json: what the loop wants to know, and which files with how many bytes make a
// whole. OUT/latest, one line of text, names the newest; it is written last, and atomically, so
// whatever it names is complete.

// Bytes that a checkpoint of these adapters takes, with room for the headers.
size_t training_bytes(const Adapters *s) {
    size_t n = s->n_dense + s->n_expert * (size_t)comm_ep();
    return n * (s->muon ? 2 : 3) * 4 + (size_t)s->n * (size_t)comm_ep() * 600 + 65536;
}

// What follows the number in a checkpoint's name; "?": it is no such name.
static inline const char *training_suffix(const char *name) {
    const size_t digits = strncmp(name, "checkpoint-", 11) ? 0 : strspn(name + 11, "0123456789");
    return digits ? name + 11 + digits : "?";
}

// How many whole checkpoints there are in out.
int training_count(const char *out) {
    struct dirent **list = NULL;
    int n = scandir(out, &list, NULL, NULL), whole = 0;
    for (int i = 0; i < n; free(list[i++])) { whole += !*training_suffix(list[i]->d_name); }
    free(list);
    return whole;
}

// Removes what a newer checkpoint makes superfluous: leftovers of saves that did not end, and all
// but the last `keep` checkpoints (0: none). The newest stays, and what has a name of the user's.
static inline void training_prune(const char *out, const char *newest, int keep) {
    char path[PATH_SIZE], trash[PATH_SIZE];
    struct dirent **list = NULL;
    int n = scandir(out, &list, NULL, alphasort), whole = 0;
    for (int i = n - 1; i >= 0; free(list[i--])) {
        const char *suffix = training_suffix(list[i]->d_name);
        int leftover = strcmp(suffix, ".tmp") == 0 || strcmp(suffix, ".old") == 0;
        if (*suffix && !leftover) { continue; }
        path_make(path, out, "/", list[i]->d_name);
        if (!leftover && ++whole > keep && keep > 0 && strcmp(list[i]->d_name, newest) != 0) {
            leftover = rename(path, path_make(trash, path, ".tmp", "")) == 0;   // half is not whole
            strcpy(path, trash);
        }
        if (leftover) { folder_remove(path); }
    }
    free(list);
}

// Collective. Saves OUT/checkpoint-<step> and makes it the latest. state_json: an object.
void training_save(const char *out, int step, int keep, const Adapters *s, const Config *c,
                   int names, const char *base_name, const char *state_json) {
    char name[32], dir[PATH_SIZE], path[PATH_SIZE], latest[PATH_SIZE];
    struct stat info;
    Save v;
    snprintf(name, sizeof name, "checkpoint-%06d", step);
    save_begin(&v, path_make(dir, out, "/", name));
    save_adapter(&v, s, c, names, base_name, 1);
    save_check(&v);
    FILE *state = comm_rank() ? NULL : save_open(&v, v.temporary, file_names[FILE_STATE], "wb");
    for (int k = 0; k < FILE_STATE && state; k++) {
        if (stat(path_make(path, v.temporary, "/", file_names[k]), &info) != 0) { v.error = errno; }
        fprintf(state, "%s\"%s\": %zu", k ? ", " : "{\"files\": {", file_names[k],
                (size_t)info.st_size);
    }
    const char *rest = json_blanks(strchr(state_json, '{') + 1);       // our member comes first
    if (state) { fprintf(state, "}%s%s", *rest == '}' ? "" : ",\n", rest); }
    save_close(&v, state);
    // The line that will name it is on the disk before anything is renamed, and can still fail.
    FILE *line = comm_rank() ? NULL : save_open(&v, out, "latest.tmp", "wb");
    if (line) { fprintf(line, "%s\n", name); }
    save_close(&v, line);
    path_make(latest, out, "/latest.tmp", "");
    if (v.error) { unlink(latest); }
    save_commit(&v);
    if (comm_rank() == 0) {
        v.error = rename(latest, path_make(path, out, "/latest", "")) ? errno : folder_sync(out);
        if (!v.error) { training_prune(out, name, keep); }
    }
    save_check(&v);
}

// state.json's text; the caller frees it.
char *training_state(const char *path) {
    char file[PATH_SIZE];
    size_t size;
    return file_read(path_make(file, path, "/", file_names[FILE_STATE]), &size, not_a_folder);
}

// The files of a checkpoint must be those that state.json lists.
static inline void training_verify(const char *path) {
    char file[PATH_SIZE], state[PATH_SIZE];
    Json j;
    struct stat info;
    json_load(&j, path_make(state, path, "/", file_names[FILE_STATE]), not_a_folder);
    int files = json_get(&j, 0, "files", '{');
    for (int k = 0; k < FILE_STATE; k++) {
        size_t size = json_size(&j, json_get(&j, files, file_names[k], '0'));
        path_make(file, path, "/", file_names[k]);
        if (stat(file, &info) != 0 || (size_t)info.st_size != size) {
            refuse("%s is missing or has not the %zu bytes that %s lists HINT: --resume another "
                   "checkpoint", file, size, state);
        }
    }
    json_free(&j);
}

// The folder that OUT/latest names, verified, in path; 0 if there is none yet.
int training_find(const char *out, char *path, size_t size) {
    char file[PATH_SIZE], name[64] = "";
    FILE *f = fopen(path_make(file, out, "/latest", ""), "rb");
    if (f == NULL && errno == ENOENT) { return 0; }
    if (f == NULL || fscanf(f, "%63s", name) != 1 || strncmp(name, "checkpoint-", 11) != 0 ||
        strchr(name, '/')) {
        refuse("%s does not name a checkpoint HINT: write the newest one's name into it", file);
    }
    fclose(f);
    path_make(file, out, "/", name);
    // If a save over the same step was killed between its renames, the old one is still there.
    if (access(file, F_OK) != 0) { strncat(file, ".old", sizeof file - strlen(file) - 1); }
    training_verify(file);
    require(snprintf(path, size, "%s", file) < (int)size);
    return 1;
}

// Reads masters and moments of the checkpoint at path.
void training_load(const char *path, Adapters *s, const Config *c) {
    training_verify(path);
    load_adapter(path, s, c, 1);
}

// -------------------------------------------------------------------------------------------------
// 5 Resharding: who holds what
//
// Trainer and engine hold the same matrices cut differently: the trainer's ranks own whole experts,
// tensor-parallel engine ranks a slice of each. Both cuts are one rule. Ranks form a grid, a mesh,
// and each axis of it either repeats a tensor or cuts one dimension. So a rank's part is a box, and
// what one rank must send another is the box that their two boxes share.
//
// Every tensor has three dimensions here, (experts, out, in). Boxes count what is stored: packed
// codes have in/2 bytes to a row and in/32 scales, dense scales are one per 128 x 128. A cut inside
// a byte or a block is no cut; such a tensor goes the slow way, whole, and so does its partner.

enum { SOURCE, ENGINE };                // the two sides of a refit
enum { REPEAT = -1 };                   // an axis that cuts nothing; else the dimension it cuts

typedef struct { int first, size[3]; } Mesh;    // ranks first .. in row-major order; unused axes: 1
typedef struct { size_t at[3], n[3]; } Region;     // where it begins, how long it is

typedef struct {                // one tensor of the trainer, under a name that is no engine's
    char name[96];              // "layers.3.ffn.experts.gate.weight": all experts are one tensor
    int type, rule, layer;      // DT_*; place in engine_rules, or -1
    size_t dim[3], grain[3];    // elements; how many of them, along each dimension, make one unit
    size_t width;               // bytes of a unit
    size_t align;               // rows and columns are cut at multiples of this; 0: anywhere
    int cut[2][3];              // of each side's mesh, what its axes do
    const void *source;         // this rank's box; NULL: it has none
    int first, held;            // the experts that it holds
    const char *misc;           // why it is not resharded but sent whole; NULL: it is resharded
    int tensor, half;           // where it arrives: in which of the engine's tensors, which half
    uint64_t hash;              // of all that ranks must agree on
} Param;

typedef struct { char name[96]; size_t n[3], at; } EngineTensor;     // in bytes; at: of its memory
typedef struct { int param, from, to; Region box; } Transfer;

typedef struct {
    Mesh mesh[2][2];            // of each side, for dense tensors and for experts: the same ranks
    int layers, stage_layers;   // so many layers are sent together
    unsigned needed;            // bits 1 << place in engine_rules: what the engine waits for
    int n, bulk, n_tensors;     // params, those before `bulk` are resharded, by layer and name
    size_t n_transfers, bytes;  // bytes of one engine rank
    Param *param;
    EngineTensor *tensor;
    Transfer *transfer;         // in the order of params, senders, receivers: the same on all ranks
    uint8_t *staging[2];        // (room) during a refit: bytes that will leave, or have come
    size_t room[2];
    int marks;                  // how often the wire's clock was read
    double sent, received, local;       // bytes of this rank's last refit
    double wire, seconds;       // how long it exchanged them, and in all
} Refit;

// What an engine with tensor parallelism wants (vLLM's loader layout), and the only place that
// knows it: w13 is gate's rows over up's, on every rank its own rows of each.
static const struct { const char *ours, *engine; int half, halves, cut, type, target; }
engine_rules[] = {
    {"attn.wq_b", "attn.wq_b", 0, 1, 1, DT_FP8, TARGET_WQ_B},
    {"attn.wo_a", "attn.wo_a", 0, 1, 1, DT_FP8, -1},
    {"attn.wo_b", "attn.wo_b", 0, 1, 2, DT_FP8, TARGET_WO_B},
    {"ffn.shared_experts.w1", "ffn.shared_experts.gate_up_proj", 0, 2, 1, DT_FP8, TARGET_SHARED_W1},
    {"ffn.shared_experts.w3", "ffn.shared_experts.gate_up_proj", 1, 2, 1, DT_FP8, TARGET_SHARED_W3},
    {"ffn.shared_experts.w2", "ffn.shared_experts.down_proj", 0, 1, 2, DT_FP8, TARGET_SHARED_W2},
    {"ffn.experts.gate", "ffn.experts.w13", 0, 2, 1, DT_FP4, TARGET_EXPERTS_W1},
    {"ffn.experts.up", "ffn.experts.w13", 1, 2, 1, DT_FP4, TARGET_EXPERTS_W3},
    {"ffn.experts.down", "ffn.experts.w2", 0, 1, 2, DT_FP4, TARGET_EXPERTS_W2},
};
enum { ENGINE_RULES = sizeof engine_rules / sizeof *engine_rules };

// "attn.wq_b.weight" of "layers.3.attn.wq_b.weight".
static inline const char *param_leaf(const char *name) {
    return strncmp(name, "layers.", 7) ? name : name + 8 + strspn(name + 7, "0123456789");
}

static inline int mesh_ranks(const Mesh *m) { return m->size[0] * m->size[1] * m->size[2]; }

static inline const Mesh *param_mesh(const Refit *r, const Param *p, int side) {
    return &r->mesh[side][strstr(p->name, ".experts.") != NULL];
}

// The box of p that the i-th rank of the side's mesh holds, in stored units, bytes in the last
// dimension. Axes cut from the outside in, each what the one before left. Returns NULL, or why
// there is no such box. All that moves weights takes its boxes from here.
static inline const char *slice(Region *box, const Refit *r, const Param *p, int side, int i) {
    const Mesh *m = param_mesh(r, p, side);
    int inner = mesh_ranks(m);
    *box = (Region){ .n = { p->dim[0], p->dim[1], p->dim[2] } };
    for (int a = 0; a < 3; a++) {
        int d = p->cut[side][a];
        size_t size = (size_t)m->size[a], place = (size_t)(i / (inner /= m->size[a])) % size;
        if (d == REPEAT) { continue; }
        if (box->n[d] % size != 0) { return "it does not divide evenly"; }
        box->n[d] /= size;
        box->at[d] += place * box->n[d];
    }
    for (int d = 0; d < 3; d++) {
        size_t end = box->at[d] + box->n[d], grain = p->grain[d];
        size_t step = d > 0 && p->align > grain ? p->align : grain;
        if (box->at[d] % step || (end % step && end != p->dim[d])) {
            return "a cut is inside a byte of codes or a block of scales";
        }
        box->at[d] /= grain;
        box->n[d] = (end + grain - 1) / grain - box->at[d];
    }
    box->at[2] *= p->width;
    box->n[2] *= p->width;
    return NULL;
}

static inline size_t region_bytes(const Region *b) { return b->n[0] * b->n[1] * b->n[2]; }

// What a and b share; 0 if nothing.
static inline int region_meet(Region *out, const Region *a, const Region *b) {
    for (int d = 0; d < 3; d++) {
        size_t end = a->at[d] + a->n[d], other = b->at[d] + b->n[d];
        out->at[d] = a->at[d] > b->at[d] ? a->at[d] : b->at[d];
        end = end < other ? end : other;
        if (end <= out->at[d]) { return 0; }
        out->n[d] = end - out->at[d];
    }
    return 1;
}

// Adds what one rank has of one tensor. name: as in the checkpoint or of an adapter's factor, with
// the number of the expert, of E, that it is of. data: NULL if another rank has it. Ranks offer the
// same names in any order; experts in theirs. rows, cols: elements; of scales, those they are for.
void refit_offer(Refit *r, const char *name, int type, size_t rows, size_t cols, int E,
                 const void *data) {
    static const char *const roles[] = { "", "gate", "down", "up" };        // of w1, w2, w3
    Param p = { .type = type, .rule = -1, .dim = { 1, rows, cols }, .source = data,
                .grain = { 1, 1, 1 }, .width = 1 };
    int expert = 0, role = 0, used = 0;
    const char *at = strstr(name, ".experts.");
    memcpy(p.name, name, strlen(name) + 1);
    if (at && sscanf(at, ".experts.%d.w%1d%n", &expert, &role, &used) == 2) {
        snprintf(p.name, sizeof p.name, "%.*s.experts.%s%s", (int)(at - name), name, roles[role],
                 at + used);
        p.dim[0] = (size_t)E;
    }
    for (int i = r->n - 1; i >= 0 && role; i--) {       // an expert after the first: nothing new
        Param *known = &r->param[i];
        if (strcmp(known->name, p.name) != 0) { continue; }
        if (data && known->held++ == 0) { known->source = data; known->first = expert; }
        return;
    }
    p.first = expert;
    p.held = data != NULL;
    if (sscanf(name, "layers.%d.", &p.layer) != 1) { p.layer = 0; }
    const char *end = strrchr(p.name, '.');
    for (int k = 0; k < ENGINE_RULES && end; k++) {
        const char *leaf = param_leaf(p.name), *ours = engine_rules[k].ours;
        if (strncmp(leaf, ours, strlen(ours)) == 0 && leaf + strlen(ours) == end) { p.rule = k; }
    }
    const int fp4 = type == DT_FP4 || (type == DT_E8M0 && role), scale = type == DT_E8M0;
    if (fp4) { p.grain[2] = scale ? FP4_BLOCK : 2; }
    if (scale && !fp4) { p.grain[1] = p.grain[2] = FP8_BLOCK; }
    if (type == DT_BF16 || type == DT_F16) { p.width = 2; }
    if (type == DT_F32 || type == DT_I64) { p.width = 4; }          // ids are int32 in memory
    r->param = (Param *)realloc(r->param, sizeof p * (size_t)(r->n + 1));
    require(r->param != NULL);
    r->param[r->n++] = p;
}

// Offers all tensors of the model's table: what the checkpoint holds, and so an engine's base.
void refit_offer_base(Refit *r, const Tensor *t, size_t n, int E) {
    for (size_t i = 0; i < n; i++) {
        const Tensor *of = &t[i - (t[i].type == DT_E8M0)];      // scales follow their matrix
        size_t rows = of->ndim > 1 ? of->dim[0] : 1, cols = of->dim[of->ndim - 1];
        refit_offer(r, t[i].name, t[i].type, rows, cols << (of->type == DT_FP4), E, t[i].data);
    }
    r->needed = (1u << ENGINE_RULES) - 1;
}

// Offers the trained matrices alone. A factor is cut only where its matrix can be.
void refit_offer_adapters(Refit *r, const Adapters *s, int E) {
    for (int i = 0; i < s->n; i++) {
        const AdapterTensor *t = &s->tensors[i];
        refit_offer(r, t->name, DT_F32, (size_t)t->rows, (size_t)t->cols, E,
                    s->p ? s->p + t->at : NULL);
    }
    for (int i = 0; i < r->n; i++) {
        const int k = r->param[i].rule;
        r->param[i].width = sizeof(real);
        r->param[i].align = k < 0 ? 0 : engine_rules[k].type == DT_FP8 ? FP8_BLOCK
                          : engine_rules[k].cut == 2 ? FP4_BLOCK : 0;
    }
    for (int k = 0; k < ENGINE_RULES; k++) {
        int target = engine_rules[k].target;
        if (target >= 0 && s->targets >> target & 1) { r->needed |= 1u << k; }
    }
}

// -------------------------------------------------------------------------------------------------
// 6 Resharding: the plan
//
// Made once, by every rank alone, from what all of them know; so nobody has to ask anybody during a
// refit. That is safe only if it is proved: the engine's bytes are each written exactly once, what
// a rank offers is what the others expect of it, and all ranks have the same plan, hashed and
// compared before a byte moves. A plan that is wrong ends here, with the name of the tensor.

// Bulk before misc, then by layer and name.
static inline int param_order(const void *a, const void *b) {
    const Param *x = (const Param *)a, *y = (const Param *)b;
    int misc = (x->misc != NULL) - (y->misc != NULL);
    return misc ? misc : x->layer != y->layer ? x->layer - y->layer : strcmp(x->name, y->name);
}

// Decides how each tensor is cut and which way it goes. Only what has a rule is resharded.
static inline void plan_classify(Refit *r) {
    const char **misc = (const char **)host_calloc(sizeof *misc * (size_t)r->layers * ENGINE_RULES);
    int *offered = (int *)host_calloc(sizeof(int) * (size_t)r->layers * ENGINE_RULES);
    for (int pass = 0; pass < 2; pass++) {      // the second: a tensor goes the way of its partner
        for (int i = 0; i < r->n; i++) {
            Param *p = &r->param[i];
            int experts = param_mesh(r, p, SOURCE) == &r->mesh[SOURCE][1], k = p->rule, cut;
            const char *leaf = strrchr(p->name, '.');
            Region box;
            if (k < 0) { p->misc = "the engine has no rule for it"; }
            for (int a = 0; a < 3; a++) { p->cut[SOURCE][a] = p->cut[ENGINE][a] = REPEAT; }
            if (experts) { p->cut[SOURCE][1] = 0; }         // axes: replicas, owners of experts
            const char *why = slice(&box, r, p, SOURCE, 0);
            if (why || p->layer >= r->layers) { refuse("%s: %s", p->name, why ? why : "no layer"); }
            if (k < 0 || p->misc) { continue; }
            // A product's out is B's and its in is A's: the other factor is the same for all ranks.
            cut = engine_rules[k].cut;
            if (strcmp(leaf, cut == 1 ? ".lora_A" : ".lora_B") == 0) { cut = REPEAT; }
            if (experts) { p->cut[ENGINE][1] = 0; }         // axes: replicas, experts, tensor
            p->cut[ENGINE][2] = cut;
            why = slice(&box, r, p, ENGINE, 0);
            const int place = p->layer * ENGINE_RULES + k;
            misc[place] = why ? why : misc[place];
            offered[place] += pass;
            if (pass && misc[place]) {
                p->misc = misc[place];
                for (int a = 0; a < 3; a++) { p->cut[ENGINE][a] = REPEAT; }
            }
            int typed = strncmp(leaf, ".lora", 5) == 0 || p->type == DT_E8M0;
            if (!typed && p->type != engine_rules[k].type) {
                refuse("%s has another type than the engine's, which cannot be sent", p->name);
            }
        }
    }
    for (int i = 0; i < r->layers * ENGINE_RULES; i++) {        // codes and scales, or A and B
        if ((r->needed >> i % ENGINE_RULES & 1) && offered[i] != 2) {
            refuse("layers.%d.%s: %d of 2 tensors are offered, the engine would keep old values",
                   i / ENGINE_RULES, engine_rules[i % ENGINE_RULES].ours, offered[i]);
        }
    }
    free(misc);
    free(offered);
}

// Places p in the engine's memory: beside its other half, or in a tensor of its own.
static inline void plan_place(Refit *r, Param *p) {
    EngineTensor e = { .at = r->bytes };
    Region box;
    slice(&box, r, p, ENGINE, 0);
    memcpy(e.name, p->name, sizeof e.name);
    memcpy(e.n, box.n, sizeof e.n);
    if (!p->misc) {
        p->half = engine_rules[p->rule].half;
        e.n[1] *= (size_t)engine_rules[p->rule].halves;
        snprintf(e.name, sizeof e.name, "layers.%d.%s%.20s", p->layer,
                 engine_rules[p->rule].engine, strrchr(p->name, '.'));
    }
    for (p->tensor = 0; p->tensor < r->n_tensors; p->tensor++) {
        const EngineTensor *other = &r->tensor[p->tensor];
        if (strcmp(other->name, e.name) != 0) { continue; }
        if (memcmp(other->n, e.n, sizeof e.n)) { refuse("%s: its halves differ in shape", e.name); }
        return;
    }
    r->bytes += (e.n[0] * e.n[1] * e.n[2] + 255) / 256 * 256;
    r->tensor[r->n_tensors++] = e;
}

static inline void hash_add(uint64_t *hash, uint64_t value) { *hash = random_mix(*hash ^ value); }

// Lists who sends which box of param i to whom. Of several ranks with the same box, the receiver
// itself is asked first; else they take turns, so that the first is not the only one who sends.
static inline void plan_transfers(Refit *r, int i) {
    Param *p = &r->param[i];
    const Mesh *from = param_mesh(r, p, SOURCE), *to = param_mesh(r, p, ENGINE);
    const int senders = mesh_ranks(from), receivers = mesh_ranks(to);
    Region have[COMM_RANKS_MAX], want;
    p->hash = random_key((uint64_t)p->type, p->name);
    for (int s = 0; s < senders; s++) { slice(&have[s], r, p, SOURCE, s); }
    for (int s = 0; s < senders; s++) {
        int replicas = 0, before = 0, holders[COMM_RANKS_MAX] = {0};
        for (int o = 0; o < senders; o++) {
            if (memcmp(&have[o], &have[s], sizeof(Region)) != 0) { continue; }
            holders[replicas++] = from->first + o;
            before += o < s;
        }
        for (int d = 0; d < receivers; d++) {
            Transfer t = { .param = i, .from = from->first + s, .to = to->first + d };
            int owner = holders[p->misc ? 0 : d % replicas];
            for (int k = 0; k < replicas && !p->misc; k++) {
                owner = holders[k] == t.to ? t.to : owner;
            }
            slice(&want, r, p, ENGINE, d);
            if (owner != t.from || !region_meet(&t.box, &have[s], &want)) { continue; }
            if ((r->n_transfers & (r->n_transfers - 1)) == 0) {     // room doubles at powers of two
                size_t room = r->n_transfers ? 2 * r->n_transfers : 1;
                r->transfer = (Transfer *)realloc(r->transfer, sizeof t * room);
                require(r->transfer != NULL);
            }
            r->transfer[r->n_transfers++] = t;
            hash_add(&p->hash, (uint64_t)t.from << 32 | (uint64_t)t.to);
            for (int k = 0; k < 3; k++) {
                hash_add(&p->hash, t.box.at[k]);
                hash_add(&p->hash, t.box.n[k]);
            }
        }
    }
}

// Proves that every byte of the engine's tensors is written exactly once, on every rank.
static inline void plan_cover(const Refit *r) {
    const Mesh *all = &r->mesh[ENGINE][0];
    const size_t ranks = (size_t)mesh_ranks(all), places = (size_t)r->n_tensors * ranks;
    size_t *bytes = (size_t *)host_calloc(sizeof *bytes * places), *last, *previous;
    last = (size_t *)host_calloc(sizeof *last * places);        // 1 + a transfer to this place
    previous = (size_t *)host_calloc(sizeof *previous * (r->n_transfers + 1));
    Region *box = (Region *)host_calloc(sizeof *box * (r->n_transfers + 1)), whole, both;
    for (size_t i = 0; i < r->n_transfers; i++) {
        const Transfer *t = &r->transfer[i];
        const Param *p = &r->param[t->param];
        const EngineTensor *e = &r->tensor[p->tensor];
        const size_t place = (size_t)p->tensor * ranks + (size_t)(t->to - all->first);
        slice(&whole, r, p, ENGINE, t->to - all->first);
        box[i] = t->box;
        for (int d = 0; d < 3; d++) {               // counted from the beginning of the tensor
            box[i].at[d] += (d == 1) * (size_t)p->half * whole.n[1] - whole.at[d];
            if (box[i].at[d] + box[i].n[d] > e->n[d]) { refuse("%s: beyond its end", e->name); }
        }
        for (size_t k = last[place]; k > 0; k = previous[k - 1]) {
            if (region_meet(&both, &box[k - 1], &box[i])) {
                refuse("%s: rank %d would get bytes of it twice, of %s and of %s", e->name, t->to,
                       r->param[r->transfer[k - 1].param].name, p->name);
            }
        }
        previous[i] = last[place];
        last[place] = i + 1;
        bytes[place] += region_bytes(&t->box);
    }
    for (size_t i = 0; i < places; i++) {
        const EngineTensor *e = &r->tensor[i / ranks];
        size_t want = e->n[0] * e->n[1] * e->n[2];
        if (bytes[i] != want) {
            refuse("%s: nobody sends %zu of its %zu bytes to rank %zu", e->name, want - bytes[i],
                   want, i % ranks + (size_t)all->first);
        }
    }
    free(bytes);
    free(last);
    free(previous);
    free(box);
}

// What this rank offers must be what the others count on.
static inline void plan_own(const Refit *r) {
    for (int i = 0; i < r->n; i++) {
        const Param *p = &r->param[i];
        const Mesh *m = param_mesh(r, p, SOURCE);
        const int place = this_rank - m->first, mine = place >= 0 && place < mesh_ranks(m);
        Region box = { .n = {0} };
        if (mine) { slice(&box, r, p, SOURCE, place); }
        if (mine != (p->source != NULL) || (mine && p->dim[0] > 1 && (box.at[0] != (size_t)p->first
                                            || box.n[0] != (size_t)p->held))) {
            refuse("%s: rank %d holds %d experts from %d, the plan has %zu from %zu", p->name,
                   this_rank, p->source ? p->held : 0, p->first, box.n[0], box.at[0]);
        }
    }
}

// Collective. All ranks must have made rank 0's plan; the first difference is named.
static inline void plan_agree(const Refit *r) {
    typedef struct { char name[sizeof r->param->name]; uint64_t hash; } Line;
    int n = r->n;
    comm_broadcast(COMM_ALL, &n, sizeof n, 0, "refit: tensors");
    Line *lines = (Line *)host_calloc(sizeof *lines * (size_t)n);
    for (int i = 0; i < n && this_rank == 0; i++) {
        memcpy(lines[i].name, r->param[i].name, sizeof lines[i].name);
        lines[i].hash = r->param[i].hash;
    }
    comm_broadcast(COMM_ALL, lines, sizeof *lines * (size_t)n, 0, "refit: plan");
    for (int i = 0; i < n || i < r->n; i++) {
        const char *own = i < r->n ? r->param[i].name : "~", *name = i < n ? lines[i].name : "~";
        if (strcmp(own, name) == 0 && lines[i].hash == r->param[i].hash) { continue; }
        // Names are sorted: of two that meet, the smaller one is not known to the other rank.
        refuse("%s: ranks 0 and %d do not plan to send it alike, or one does not know it",
               strcmp(own, name) < 0 ? own : name, this_rank);
    }
    free(lines);
    comm_barrier(COMM_ALL, "refit: all ranks agree");
}

// Collective. Makes and proves the plan of all that was offered. Sets r->bytes, an engine rank's.
void refit_plan(Refit *r) {
    size_t total[2] = {0, 0};
    plan_classify(r);
    qsort(r->param, (size_t)r->n, sizeof(Param), param_order);
    r->tensor = (EngineTensor *)host_calloc(sizeof(EngineTensor) * (size_t)(r->n + 1));
    for (int i = 0; i < r->n; i++) {
        Param *p = &r->param[i];
        plan_place(r, p);
        plan_transfers(r, i);
        r->bulk += p->misc == NULL;
        int said = p->misc == NULL || this_rank != 0;
        for (int o = r->bulk; o < i && !said; o++) {        // of another layer
            said = strcmp(param_leaf(r->param[o].name), param_leaf(p->name)) == 0;
        }
        if (!said) { printf("refit  %s is sent whole: %s\n", param_leaf(p->name), p->misc); }
    }
    plan_agree(r);
    plan_own(r);
    plan_cover(r);
    for (size_t i = 0; i < r->n_transfers; i++) {
        total[r->param[r->transfer[i].param].misc != NULL] += region_bytes(&r->transfer[i].box);
    }
    if (this_rank == 0) {
        printf("refit  %d tensors resharded, %.3f MB; %d sent whole, %.3f MB; %zu transfers\n",
               r->bulk, total[0] / 1e6, r->n - r->bulk, total[1] / 1e6, r->n_transfers);
    }
}

// -------------------------------------------------------------------------------------------------
// 7 Resharding: three ways to move
//
// What is resharded goes from its owner to the receiver: a stage of layers at a time, all of it to
// all peers in one exchange, packed, because a column cut of w2 has runs of 128 bytes. Two stages
// are under way: while one travels, a GPU unpacks the one before it and packs the next. What a rank
// needs and has is copied. The golden way broadcasts each tensor whole and lets every rank cut out
// its own: slow, obviously right, and sharing nothing with the plan but slice(). Tensors that are
// sent whole go that way too, after the others, all of an owner's in one broadcast.

enum { REFIT_POINTS, REFIT_GOLDEN };
enum { PACK, UNPACK };
enum { COPIES_MAX = 1024 };             // boxes in a list

// Boxes may be copied in any order, or all at once: none reads what another writes.
void copy_boxes(const BoxCopy *box_h, int n) {
    GPU(copy_boxes_gpu(box_h, n))
    for (const BoxCopy *b = box_h; b < box_h + n; b++) {
        #pragma omp parallel for
        for (size_t e = 0; e < b->n[0]; e++) {
            for (size_t i = 0; i < b->n[1]; i++) {
                memcpy(b->to + e * b->to_step[0] + i * b->to_step[1],
                       b->from + e * b->from_step[0] + i * b->from_step[1], b->n[2]);
            }
        }
    }
}
TWIN(copy_boxes)

typedef struct { int n; BoxCopy box[COPIES_MAX]; } Copies;

static inline void copies_end(Copies *c) {
    copy_boxes(c->box, c->n);
    c->n = 0;
}

static inline void copies_add(Copies *c, BoxCopy b) {
    if (c->n == COPIES_MAX) { copies_end(c); }
    c->box[c->n++] = b;
}

// Where b begins in an array that holds `whole`, and the array's steps.
static inline uint8_t *region_at(const void *array, const Region *whole, const Region *b,
                                 size_t *step) {
    step[0] = whole->n[1] * whole->n[2];
    step[1] = whole->n[2];
    return (uint8_t *)array + (b->at[0] - whole->at[0]) * step[0] +
           (b->at[1] - whole->at[1]) * step[1] + (b->at[2] - whole->at[2]);
}

// Region b of p in this rank's part of the trainer.
static inline uint8_t *source_at(const Refit *r, const Param *p, const Region *b, size_t *step) {
    Region whole;
    slice(&whole, r, p, SOURCE, this_rank - param_mesh(r, p, SOURCE)->first);
    return region_at(p->source, &whole, b, step);
}

// Region b of p in this rank's engine memory: its rows begin behind those of the half before it.
static inline uint8_t *engine_at(const Refit *r, const Param *p, uint8_t *memory, const Region *b,
                                 size_t *step) {
    const EngineTensor *e = &r->tensor[p->tensor];
    Region whole;
    slice(&whole, r, p, ENGINE, this_rank - param_mesh(r, p, ENGINE)->first);
    memory += e->at + (size_t)p->half * whole.n[1] * whole.n[2];
    whole.n[1] = e->n[1];
    return region_at(memory, &whole, b, step);
}

// What a box takes in the staging: it begins at a multiple of 16 bytes, a GPU's longest word.
static inline size_t staged_bytes(const Region *b) { return (region_bytes(b) + 15) / 16 * 16; }

// Room for what travels together. place: of the two. What it held must have been unpacked.
static inline uint8_t *staging_begin(Refit *r, int place, size_t bytes) {
    if (r->staging[place] && bytes <= r->room[place]) { return r->staging[place]; }
    if (r->staging[place]) { arena_unmap(r->staging[place], r->room[place]); }
    r->room[place] = bytes + 16;
    r->staging[place] = (uint8_t *)arena_map(r->room[place]);
    if (r->staging[place] == NULL) { die(EXIT_FIT, "no %zu bytes of refit staging", bytes); }
    return r->staging[place];
}

// Collective. bytes of rank `root`'s staging, to all.
static inline void staging_broadcast(uint8_t *staging, size_t bytes, int root) {
    if (comm_size(COMM_ALL) == 1) { return; }
    comm_note("broadcast", "refit");
    GPU(gpu_broadcast(COMM_ALL, staging, bytes, root))
    comm_broadcast(COMM_ALL, staging, bytes, root, "refit");
}

// The wire's clock, before and after an exchange. A GPU keeps it: the host is far ahead of it.
static inline void wire_clock(Refit *r, int begins) {
    GPU(gpu_mark(r->marks++))
    r->wire += begins ? -clock_seconds() : clock_seconds();
}

// Waits until all that was begun is done, and reads the clock.
static inline void wire_wait(Refit *r) {
#ifdef USE_CUDA
    static double at[GPU_MARKS];
    if (r->marks) { gpu_marks(at, 0, r->marks); }
    for (; r->marks; r->marks -= 2) { r->wire += at[r->marks - 1] - at[r->marks - 2]; }
    if (on_gpu) { gpu_sync(); }
#else
    (void)r;
#endif
}

typedef struct {                // transfers that travel together
    size_t first, end;          // of the plan's
    size_t out[COMM_RANKS_MAX], in[COMM_RANKS_MAX];     // bytes, in the staging:
    uint8_t *send, *recv;       // by peer, and of each in the plan's order
} Wave;

// The transfers of params below `end`, from `first` on. place: in the staging.
static inline void wave_begin(Wave *w, Refit *r, size_t first, int end, int place) {
    size_t out = 0, in = 0;
    *w = (Wave){ .first = first, .end = first };
    for (; w->end < r->n_transfers && r->transfer[w->end].param < end; w->end++) {
        const Transfer *t = &r->transfer[w->end];
        const size_t n = t->from == t->to ? 0 : staged_bytes(&t->box);
        if (t->from == this_rank) { w->out[t->to] += n; out += n; }
        if (t->to == this_rank) { w->in[t->from] += n; in += n; }
    }
    w->send = staging_begin(r, place, out + in);
    w->recv = w->send + out;
}

// PACK: into the staging, or to its place if this rank needs it itself. UNPACK: what has come.
static inline void wave_copy(Refit *r, uint8_t *memory, const Wave *w, int way) {
    static Copies c;
    const int me = this_rank;
    uint8_t *at = way == PACK ? w->send : w->recv;
    for (int peer = 0; peer < comm_size(COMM_ALL); peer++) {
        for (const Transfer *t = r->transfer + w->first; t < r->transfer + w->end; t++) {
            const Param *p = &r->param[t->param];
            const size_t *n = t->box.n, flat = n[1] * n[2];
            BoxCopy b = { at, at, { flat, n[2] }, { flat, n[2] }, { n[0], n[1], n[2] } };
            if (way == PACK ? t->from != me || t->to != peer
                            : t->from != peer || t->to != me || peer == me) { continue; }
            if (way == PACK) { b.from = source_at(r, p, &t->box, b.from_step); }
            if (way == UNPACK || peer == me) { b.to = engine_at(r, p, memory, &t->box, b.to_step); }
            copies_add(&c, b);
            at += peer == me ? 0 : staged_bytes(&t->box);
            *(way == UNPACK ? &r->received : peer == me ? &r->local : &r->sent) += flat * n[0];
        }
    }
    copies_end(&c);
}

// Collective. All that is resharded. A stage's exchange runs aside, while the stage before it is
// unpacked and the one after it packed.
static inline void move_points(Refit *r, uint8_t *memory) {
    Wave wave[2];
    size_t next = 0;
    for (int i = 0, stage = 0, end; i < r->bulk || stage > 0; i = end, stage++) {
        Wave *now = &wave[stage % 2], *before = &wave[(stage + 1) % 2];
        const int some = i < r->bulk, layer = some ? r->param[i].layer / r->stage_layers : 0;
        for (end = i; end < r->bulk && r->param[end].layer / r->stage_layers == layer; ) { end++; }
        if (some) {
            wave_begin(now, r, next, end, stage % 2);
            next = now->end;
            wave_copy(r, memory, now, PACK);
        }
        if (stage > 0) { aside(ASIDE_JOIN); }
        if (some) {
            aside(ASIDE_BEGIN);
            wire_clock(r, 1);
            comm_all_to_all(COMM_ALL, now->recv, now->in, now->send, now->out, "refit");
            wire_clock(r, 0);
            aside(ASIDE_END);
        }
        if (stage > 0) { wave_copy(r, memory, before, UNPACK); }
        if (!some) { break; }
    }
}

// The region of p that rank `root` broadcasts; 0: it has none, or an earlier rank has the same.
static inline int root_region(Region *box, const Refit *r, const Param *p, int root) {
    const Mesh *m = param_mesh(r, p, SOURCE);
    Region other;
    if (root < m->first || root >= m->first + mesh_ranks(m)) { return 0; }
    slice(box, r, p, SOURCE, root - m->first);
    for (int o = 0; o < root - m->first; o++) {
        slice(&other, r, p, SOURCE, o);
        if (memcmp(&other, box, sizeof other) == 0) { return 0; }
    }
    return 1;
}

// Collective. Params first .. end-1: from each owner one broadcast of all it has of them.
static inline void move_broadcast(Refit *r, uint8_t *memory, int first, int end) {
    static Copies c;
    Region box, mine, both;
    for (int root = 0; root < comm_size(COMM_ALL); root++) {
        size_t staged = 0, bytes = 0;
        for (int i = first; i < end; i++) {
            const int its = root_region(&box, r, &r->param[i], root);
            bytes += its ? region_bytes(&box) : 0;
            staged += its ? staged_bytes(&box) : 0;
        }
        if (bytes == 0) { continue; }
        uint8_t *staging = staging_begin(r, 0, staged), *at = staging;
        for (int way = PACK; way <= UNPACK; way++, at = staging) {
            for (int i = first; i < end; i++) {
                const Param *p = &r->param[i];
                const Mesh *m = param_mesh(r, p, ENGINE);
                const int place = this_rank - m->first;
                if (!root_region(&box, r, p, root)) { continue; }
                BoxCopy b = { .to = at, .to_step = { box.n[1] * box.n[2], box.n[2] } };
                if (way == PACK && root == this_rank) {
                    b.from = source_at(r, p, &box, b.from_step);
                    memcpy(b.n, box.n, sizeof b.n);
                    copies_add(&c, b);
                }
                if (way == UNPACK && place >= 0 && place < mesh_ranks(m) &&
                    (slice(&mine, r, p, ENGINE, place), region_meet(&both, &box, &mine))) {
                    b.from = region_at(at, &box, &both, b.from_step);
                    b.to = engine_at(r, p, memory, &both, b.to_step);
                    memcpy(b.n, both.n, sizeof b.n);
                    copies_add(&c, b);
                }
                at += staged_bytes(&box);
            }
            copies_end(&c);
            if (way == UNPACK) { continue; }
            wire_clock(r, 1);
            staging_broadcast(staging, staged, root);
            wire_clock(r, 0);
        }
        *(root == this_rank ? &r->sent : &r->received) += bytes;
    }
}

// Collective. Says what has moved, and how fast: GB/s of the rank that sent or got most. Its wire
// time is the least of those that moved half as much or more: the rest is waiting for the last.
static inline void move_report(Refit *r, double start) {
    const double moved = fmax(r->sent, r->received);
    double most[3] = { (double)r->room[0] + (double)r->room[1], clock_seconds() - start, moved };
    double sum[2] = { r->received, r->local }, wire;
    comm_max_double(COMM_ALL, most, 3, "refit: time");
    wire = moved < most[2] / 2 ? -INFINITY : -r->wire;
    comm_max_double(COMM_ALL, &wire, 1, "refit: wire");
    comm_sum_double(COMM_ALL, sum, 2, "refit: bytes");
    r->seconds = most[1];
    r->wire = -wire;
    if (this_rank == 0) {
        printf("refit  %.3f MB received, %.3f MB copied in place | %.1f ms, on the wire %.1f | "
               "%.2f GB/s per rank | %.3f MB staging\n", sum[0] / 1e6, sum[1] / 1e6,
               r->seconds * 1e3, r->wire * 1e3, most[2] / 1e9 / fmax(r->wire, 1e-9), most[0] / 1e6);
    }
}

// Collective. The move itself. Returns when it began.
static inline double move_all(Refit *r, uint8_t *memory, int how) {
    comm_barrier(COMM_ALL, "refit: begins");
    const double start = clock_seconds();
    r->sent = r->received = r->local = r->wire = 0;
    r->room[0] = r->room[1] = 0;
    for (int i = 0; i < r->bulk && how == REFIT_GOLDEN; i++) {
        move_broadcast(r, memory, i, i + 1);
        if (r->marks > 2048) { wire_wait(r); }
    }
    if (how == REFIT_POINTS) { move_points(r, memory); }
    comm_barrier(COMM_ALL, "refit: resharded");
    move_broadcast(r, memory, r->bulk, r->n);
    wire_wait(r);
    for (int k = 0; k < 2; k++) {
        if (r->staging[k]) { arena_unmap(r->staging[k], r->room[k]); }
        r->staging[k] = NULL;
    }
    return start;
}

// Collective. Brings all that was planned into the engine ranks' memory (r->bytes each; NULL on the
// others). how: REFIT_POINTS, or REFIT_GOLDEN to compare with.
void refit_move(Refit *r, void *memory, int how) {
    move_report(r, move_all(r, (uint8_t *)memory, how));
}

typedef struct {                // an engine's adapters: one set serves while the next one arrives
    uint8_t *memory[2];         // (r->bytes) each; NULL on ranks that are no engine's
    int active, version;        // which one serves, and how often it has changed
} EngineAdapters;

// Collective. Brings new adapters into the buffer that does not serve; all ranks change over
// together, once each has found its part finite, or none does. Returns 1 if they did.
int refit_adapters(Refit *r, EngineAdapters *e) {
    uint8_t *next = e->memory[!e->active];
    const double start = move_all(r, next, REFIT_POINTS);
    // The sum is taken in double, where no square of a finite float overflows.
    int all[COMM_RANKS_MAX], good = 1;
    if (next) { good = isfinite(sum_squares((const real *)next, r->bytes / sizeof(real))) != 0; }
    comm_gather_int(COMM_ALL, all, &good, 1, "refit: acknowledged");
    for (int k = 0; k < comm_size(COMM_ALL); k++) { good &= all[k]; }
    e->active ^= good;
    e->version += good;
    move_report(r, start);
    if (!good && this_rank == 0) { printf("refit  new adapters are not finite: the old stay\n"); }
    return good;
}

void refit_free(Refit *r) { free(r->param); free(r->tensor); free(r->transfer); }
#endif // REFIT_C
