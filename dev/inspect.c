// inspect.c: what lies in files, in words: the tensors of a checkpoint (--inspect), whether an
// adapter does anything (--check-adapter), and whether experts can be had in fp8. The trainer
// includes it.
//
// An adapter adds scale * B A to a matrix. Programs that serve adapters skip what they do not know,
// and training that never reached a module leaves its B at zero, so an adapter can load everywhere
// and change nothing. So its names and shapes are held against the model's, all of them (to load an
// adapter, the first that does not fit is enough), and then its numbers are looked at.
#ifndef INSPECT_C
#define INSPECT_C
#include "../refit.c"       // defines: Tensor, Adapters, Roster, adapter_*; below it comm_*

// --inspect (list) and --dry-run: is the checkpoint in dir what loading will want? Its index and
// headers are read, no weights, and by every rank: their folders may be on different machines.
// Rank 0 lists the tensors that the model has, each with its file, and says what there is in all.
// A folder of config.json alone is enough, and so is none (a random base). Returns the exit code.
static inline int inspect_base(const char *dir, const Tensor *tensors, size_t n, int list) {
    Checkpoint c = { .want = NULL };
    const int begun = dir && checkpoint_begun(dir);
    char text[128];
    double bytes = 0;
    if (begun) { checkpoint_open(&c, dir, tensors, n); }
    for (const Tensor *t = tensors; t < tensors + n; t++) {
        const Want *w = begun ? wants_find(c.want, n, t->name) : NULL;
        if (w) { bytes += (double)(w->entry->end - w->entry->begin); }
        if (!list || this_rank != 0) { continue; }
        shape_text(text, w ? w->entry->dtype : dtype_of(t->type), t->ndim, t->dim);
        strcat(text, t->type == DT_FP4 ? " fp4" : "");
        printf("%-48s %-*s%s\n", t->name, w ? 24 : 0, text, w ? w->file : "");
    }
    if (this_rank == 0 && (dir || list)) {
        printf("done   %zu tensors", n);
        if (begun) {
            printf(" of %s in %d shard%s of %s", bytes_text(bytes), c.shards,
                   c.shards == 1 ? "" : "s", dir);
        } else if (dir) {
            printf(", from config.json alone: %s has no index and no .safetensors file", dir);
        }
        if (c.drafter > 0) { printf(" | not used: %zu of mtp.*", c.drafter); }
        printf("\n");
    }
    if (begun) { checkpoint_close(&c); }
    return EXIT_OK;
}

// Holds the tensors of the adapter's file against those that a has. Names the first ones that do
// not fit, counts all, and ends the process if there are any. Only a's list is looked at.
static inline void inspect_keys(const Adapters *a, const Config *c, const char *dir, int names) {
    enum { SHOWN = 5 };
    char path[PATH_SIZE], have[120];
    size_t matched = 0, missing = 0, reshaped = 0, unknown = 0;
    Safetensors st;
    safetensors_open(&st, path_make(path, dir, "/", file_names[FILE_ADAPTER]), not_a_folder);
    Roster f = roster_make(a, c, names);
    char *seen = (char *)host_calloc(st.n);
    for (size_t i = 0; i < f.n; i++) {
        Item it = roster_item(&f, i);
        const Entry *e = safetensors_find(&st, it.name);
        if (e) { seen[e - st.entry] = 1; }
        if (e && e->ndim == 2 && e->dim[0] == it.dim[0] && e->dim[1] == it.dim[1]) {
            matched++;
            continue;
        }
        size_t before = e ? reshaped++ : missing++;
        if (before >= SHOWN || this_rank != 0) { continue; }
        printf("check  %s is %s, expected [%zu,%zu]\n", it.name, e ? shape_text(have, e->dtype,
               e->ndim, e->dim) : "missing", it.dim[0], it.dim[1]);
    }
    for (size_t i = 0; i < st.n; i++) {
        if (seen[i] || unknown++ >= SHOWN || this_rank != 0) { continue; }
        printf("check  %s is of no matrix of this model\n", st.entry[i].name);
    }
    if (this_rank == 0) {
        printf("check  %zu tensors match, %zu are missing, %zu have another shape, %zu are of no "
               "matrix\n", matched, missing, reshaped, unknown);
    }
    if (matched < f.n || unknown > 0) {
        refuse("%s does not fit this model: of its %zu tensors %zu do, the model has %zu %s",
               path, st.n, matched, f.n, other_adapter);
    }
    free(f.code);
    free(seen);
    safetensors_close(&st);
}

// Collective. Prints for every kind of matrix that the adapter in dir is for: how many there are,
// the Frobenius norms of their B, and how many it leaves as they are, because B is zero, or A.
// Experts are counted on their ranks, other matrices once. model: its adapters, only counted so
// far, for the weights of the model are not needed here, and need not fit.
static inline void inspect_adapter(const Adapters *model, const Config *c, const char *dir) {
    enum { MATRICES, IDLE, SUM, SUMS };
    Adapters adapters = *model, *const a = &adapters;
    double sum[TARGETS][SUMS] = { { 0 } }, most[TARGETS][2], matrices = 0, idle = 0;
    float alpha;
    unsigned targets;
    int r, names, layer;
    const char *rest;
    adapter_read_config(dir, &r, &alpha, &targets, &names);
    inspect_keys(a, c, dir, names);
    a->p = (real *)host_alloc(sizeof(real) * (a->n_dense + a->n_expert));
    adapter_load(dir, a, c);
    for (int t = 0; t < TARGETS; t++) { most[t][0] = most[t][1] = -INFINITY; }
    for (int k = 1; k < a->n; k += 2) {             // A, B of one matrix after the other
        const AdapterTensor *B = &a->tensors[k], *A = B - 1;
        const int t = adapter_parse(B->name, NAMES_VLLM, &layer, &rest);
        require(strcmp(rest, ".lora_B") == 0);
        if (B->expert < 0 && comm_ep_rank() != 0) { continue; }
        double norm = sqrt(sum_squares_host(a->p + B->at, (size_t)B->rows * (size_t)B->cols));
        double other = sum_squares_host(a->p + A->at, (size_t)A->rows * (size_t)A->cols);
        sum[t][MATRICES]++;
        sum[t][IDLE] += norm == 0 || other == 0;
        sum[t][SUM] += norm;
        for (int s = 0; s < 2; s++) {               // the largest, and minus the smallest
            double value = s ? -norm : norm;
            if (value > most[t][s] || isnan(norm)) { most[t][s] = value; }
        }
    }
    comm_sum_double(COMM_EP, sum[0], TARGETS * SUMS, "check: norms");
    comm_max_double(COMM_EP, most[0], TARGETS * 2, "check: norms");
    for (int t = 0; t < TARGETS && this_rank == 0; t++) {
        char name[64] = "";
        for (const char *from = adapter_modules[t].ours; *from; from++) {       // without ".#"
            if (strncmp(from, ".#", 2) == 0) { from += 2; }
            strncat(name, from, 1);
        }
        if (sum[t][MATRICES] == 0) { continue; }
        printf("check  %-21s %6.0f matrices | norm of B %.3g .. %.3g, mean %.3g | %.0f unchanged\n",
               name, sum[t][MATRICES], -most[t][1], most[t][0], sum[t][SUM] / sum[t][MATRICES],
               sum[t][IDLE]);
        matrices += sum[t][MATRICES];
        idle += sum[t][IDLE];
    }
    if (this_rank == 0) {
        printf("done   %s fits: %.0f matrices, r=%d alpha=%g%s\n", dir, matrices, a->R, a->alpha,
               idle < matrices ? "" : " | it does nothing: every B, or its A, is zero");
    }
    free(a->p);
}

// --precision fp8: whether e4m3 holds the packed experts of a layer exactly (mxfp4.c, section 4);
// with a block that it does not hold, on any rank, the layer stays in bf16. Called for all layers
// in order; the last call says what was found.
static inline void inspect_spread(MoeWeights *w, const MoeDims *d, int layer, int layers) {
    static int blocks[RECAST_SPREAD + 2], stay;
    const int before = blocks[RECAST_SPREAD + 1];
    recast_spread(blocks, w->w1, w->s1, d->local, d->C, d->F);
    recast_spread(blocks, w->w3, w->s3, d->local, d->C, d->F);
    recast_spread(blocks, w->w2, w->s2, d->local, d->F, d->C);
    double wide = blocks[RECAST_SPREAD + 1] - before;
    comm_max_double(COMM_WORLD, &wide, 1, "spread of scales");
    w->wide = (int)wide;
    stay += wide > 0;
    if (layer < layers - 1) { return; }
    double all[RECAST_SPREAD + 2];      // of all experts
    for (int i = 0; i < RECAST_SPREAD + 2; i++) { all[i] = blocks[i]; }
    comm_sum_double(COMM_EP, all, RECAST_SPREAD + 2, "spread of scales");
    if (this_rank != 0) { return; }
    printf("fp8    blocks of 128 x 128 weights, by the octaves that their scales are apart:");
    for (int i = 0; i <= RECAST_SPREAD; i++) {
        if (all[i] > 0) { printf(" %d: %.0f,", i, all[i]); }
    }
    printf(" more: %.0f | %d of %d layers stay in bf16\n", all[RECAST_SPREAD + 1], stay, layers);
}
#endif // INSPECT_C
