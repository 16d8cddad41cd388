// inspect.c: what lies in files, in words: the tensors of a checkpoint (--inspect), whether an
// adapter does anything (--check-adapter), and whether experts can be had in fp8. The trainer
// includes it.
//
// An adapter adds scale * B A to a matrix. Programs that serve adapters skip what they do not know,
// and training that never reached a module leaves its B at zero, so an adapter can load everywhere
// and change nothing. That its names and shapes fit is checked by adapter_load, which names the
// first that does not; here its numbers are looked at.
#ifndef INSPECT_C
#define INSPECT_C
#include "../refit.c"       // defines: Tensor, Adapters, target_names

// The tensors that a checkpoint of this model has, as they are stored.
static inline void inspect_tensors(const Tensor *tensors, size_t n) {
    static const char *const types[] = { [DT_BF16] = "BF16", [DT_F32] = "F32", [DT_FP8] = "F8_E4M3",
        [DT_E8M0] = "F8_E8M0", [DT_FP4] = "I8 (fp4)", [DT_I64] = "I64" };
    if (this_rank != 0) { return; }
    for (const Tensor *t = tensors; t < tensors + n; t++) {
        printf("%-56s %-9s (", t->name, types[t->type]);
        for (int k = 0; k < t->ndim; k++) { printf("%s%zu", k ? "," : "", t->dim[k]); }
        printf(")\n");
    }
    printf("done   %zu tensors\n", n);
}

// One line per kind of matrix: how many modules there are, the Frobenius norms of their B, from the
// smallest to the largest, and how many are zero. Only this rank's experts; a is in host memory.
static inline void inspect_adapter(const Adapters *a, const char *dir) {
    struct { int modules, zero; double least, most; } sum[TARGETS] = { { 0, 0, 0, 0 } };
    int modules = 0, zeros = 0;
    for (int k = 0; k < a->n; k++) {
        const AdapterTensor *t = &a->tensors[k];
        char leaf[96];
        size_t length = strlen(t->name);
        if (length < 7 || strcmp(t->name + length - 7, ".lora_B") != 0) { continue; }
        snprintf(leaf, sizeof leaf, "%.*s", (int)length - 7, t->name);
        int experts = strstr(leaf, ".experts.") != NULL, shared = strstr(leaf, "shared") != NULL;
        int target = 0;             // "attn.wq_a", "shared.w1", "experts.w1": by its last part
        for (; target < TARGETS - 1; target++) {
            const char *name = target_names[target].name, *dot = strrchr(name, '.');
            int same = strcmp(strrchr(leaf, '.') + 1, dot ? dot + 1 : name) == 0;
            int group = strncmp(name, "experts", 7) == 0 ? 2 : strncmp(name, "shared", 6) == 0;
            if (same && group == (experts ? 2 : shared)) { break; }
        }
        double norm = sqrt(sum_squares(a->p + t->at, (size_t)t->rows * (size_t)t->cols));
        sum[target].least = sum[target].modules++ ? fmin(sum[target].least, norm) : norm;
        sum[target].most = fmax(sum[target].most, norm);
        sum[target].zero += norm == 0;
        modules++;
        zeros += norm == 0;
    }
    for (int i = 0; i < TARGETS && this_rank == 0; i++) {
        if (sum[i].modules == 0) { continue; }
        printf("check  %-10s %6d modules | norm of B %.3g .. %.3g | %d zero\n",
               target_names[i].name, sum[i].modules, sum[i].least, sum[i].most, sum[i].zero);
    }
    if (this_rank == 0) {
        printf("done   %s fits: %d modules, r=%d alpha=%g%s\n", dir, modules, a->R, a->alpha,
               zeros < modules ? "" : " | it does nothing: every B is zero");
    }
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
