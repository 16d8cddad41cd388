// Tests of refit.c's resharding: whatever the meshes, an engine's bytes end as the formula says,
// point to point and golden alike, a second time too; and every wrong offer or plan ends in under
// a second with the name of the tensor.
//
// Oracles: the engine's layout written out by hand, rank by rank and half by half, from a pattern
// that is a function of (tensor, version, global place); memory is poisoned before. The same code
// does not compute both sides: nothing here calls slice(), but for its own closed-form test.
#include "../refit.c"
#include "check.h"

// Sizes at which eight tensor-parallel ranks still cut whole blocks: 256/8 = 32 columns of w2,
// 1024/8 = 128 rows and columns of the dense ones.
enum { L = 2, E = 8, F = 256, C = 64, O = 1024, Q = 40 };

static struct {                 // one configuration, set before ranks are forked
    int edp, ep, train;         // trainer: ranks 0 .. train-1 as (replicas, owners)
    int first, dp, gep, tp;     // engine: ranks first .. as (replicas, experts, tensor)
    int stage;                  // layers sent together
    int fault;                  // what goes wrong: see the enum
    int quiet;
} k;
enum { RIGHT, DROPPED, DROPPED_BY_ONE, SWAPPED, OWNER_OFF, WRONG_TYPE, NO_SCALE, TWICE, GAP,
       OTHER_PLAN, OTHER_MESH };

// The tensors of a layer: name, type, elements; scales after what they scale.
static const struct { const char *name; int type, rows, cols; } dense[] = {
    {"attn.wq_b.weight", DT_FP8, O, Q}, {"attn.wq_b.scale", DT_E8M0, O, Q},
    {"attn.wo_a.weight", DT_FP8, O, Q}, {"attn.wo_a.scale", DT_E8M0, O, Q},
    {"attn.wo_b.weight", DT_FP8, Q, O}, {"attn.wo_b.scale", DT_E8M0, Q, O},
    {"ffn.shared_experts.w1.weight", DT_FP8, O, Q}, {"ffn.shared_experts.w1.scale", DT_E8M0, O, Q},
    {"ffn.shared_experts.w3.weight", DT_FP8, O, Q}, {"ffn.shared_experts.w3.scale", DT_E8M0, O, Q},
    {"ffn.shared_experts.w2.weight", DT_FP8, Q, O}, {"ffn.shared_experts.w2.scale", DT_E8M0, Q, O},
    {"attn.wq_a.weight", DT_FP8, Q, C}, {"attn.wq_a.scale", DT_E8M0, Q, C},
    {"attn_norm.weight", DT_BF16, 1, C}, {"ffn.gate.tid2eid", DT_I64, 5, 3},
    {"attn.attn_sink", DT_F32, 1, 7},
};
enum { DENSE = sizeof dense / sizeof *dense };

static int scale_rows(int i) { return dense[i].type == DT_E8M0 ? (dense[i].rows + 127) / 128 : dense[i].rows; }
static int stored_cols(int i) {
    return dense[i].type == DT_E8M0 ? (dense[i].cols + 127) / 128
         : dense[i].cols * (dense[i].type == DT_BF16 ? 2 : dense[i].type >= DT_I64 || dense[i].type
                            == DT_F32 ? 4 : 1);
}

// Of a tensor's pattern: byte `at`, counted over the whole of it, is random_bits(key, at).
// version: the weights of a later step.
static uint64_t pattern(const char *name, int layer, int version) {
    char key[64];
    snprintf(key, sizeof key, "%d.%.50s", layer, name);
    return random_key((uint64_t)version, key);
}

static uint64_t expert_pattern(int layer, int w, int scale, int version) {
    return pattern((const char *[]){ "w1", "s1", "w2", "s2", "w3", "s3" }[w * 2 - 2 + scale], layer,
                   version);
}

// Byte (row, column) of expert e's matrix.
static uint8_t expert_byte(uint64_t key, int e, int row, int col) {
    return (uint8_t)random_bits(key, (uint64_t)((e * 1000 + row) * 1000 + col));
}

static int expert_cols(int w, int scale) { return (w == 2 ? F : C) / (scale ? 32 : 2); }
static int expert_rows(int w) { return w == 2 ? C : F; }

// What this rank, a trainer, has: dense tensors whole, experts rE/ep ...
static uint8_t *dense_data[L][DENSE], *expert_data[L][4][2];

static void make_source(int version) {
    int local = E / k.ep, first = comm_rank() % k.ep * local;
    for (int l = 0; l < L && comm_rank() < k.train; l++) {
        for (int i = 0; i < DENSE; i++) {
            size_t n = (size_t)scale_rows(i) * (size_t)stored_cols(i);
            if (!dense_data[l][i]) { dense_data[l][i] = (uint8_t *)malloc(n); }
            uint64_t key = pattern(dense[i].name, l, version);
            for (size_t b = 0; b < n; b++) { dense_data[l][i][b] = (uint8_t)random_bits(key, b); }
        }
        for (int w = 1; w <= 3; w++) {
            for (int scale = 0; scale < 2; scale++) {
                int rows = expert_rows(w), cols = expert_cols(w, scale);
                uint8_t **data = &expert_data[l][w][scale];
                if (!*data) { *data = (uint8_t *)malloc((size_t)(local * rows * cols)); }
                uint64_t key = expert_pattern(l, w, scale, version);
                for (int b = 0; b < local * rows * cols; b++) {
                    (*data)[b] = expert_byte(key, first + b / (rows * cols), b / cols % rows, b % cols);
                }
            }
        }
    }
}

static void offer(Refit *r) {
    char name[96];
    int local = E / k.ep, first = comm_rank() % k.ep * local, mine = comm_rank() < k.train;
    if (k.fault == OWNER_OFF && comm_rank() == 1) { first = (first + E - 1) % E; }
    for (int l = 0; l < L; l++) {
        for (int i = 0; i < DENSE; i++) {
            int type = dense[i].type, named = l == 1 && !strncmp(dense[i].name, "attn.wo_b", 9);
            if (k.fault == DROPPED && named) { continue; }
            if (k.fault == DROPPED_BY_ONE && named && comm_rank() == 1) { continue; }
            if (k.fault == NO_SCALE && named && type == DT_E8M0) { continue; }
            if (k.fault == WRONG_TYPE && named && type == DT_FP8) { type = DT_BF16; }
            snprintf(name, sizeof name, "layers.%d.%s", l, dense[i].name);
            refit_offer(r, name, type, (size_t)dense[i].rows, (size_t)dense[i].cols, E,
                        mine ? dense_data[l][i] : NULL);
        }
        for (int w = 1; w <= 3; w++) {
            for (int e = 0; e < E; e++) {
                for (int scale = 0; scale < 2; scale++) {
                    int have = mine && e >= first && e < first + local;
                    int rows = expert_rows(w), cols = expert_cols(w, scale);
                    snprintf(name, sizeof name, "layers.%d.ffn.experts.%d.w%d.%s", l, e,
                             k.fault == SWAPPED && l == 1 && w != 2 ? 4 - w : w,
                             scale ? "scale" : "weight");
                    refit_offer(r, name, scale ? DT_E8M0 : DT_FP4, (size_t)rows,
                                (size_t)(w == 2 ? F : C), E,
                                have ? expert_data[l][w][scale] + (e - first) * rows * cols : NULL);
                }
            }
        }
    }
    r->needed = (1u << ENGINE_RULES) - 1;
}

static void make_refit(Refit *r) {
    int ranks = k.dp * k.gep * k.tp;
    *r = (Refit){ .layers = L, .stage_layers = k.stage };
    r->mesh[SOURCE][0] = (Mesh){ 0, { k.train, 1, 1 } };
    r->mesh[SOURCE][1] = (Mesh){ 0, { k.edp, k.ep, 1 } };
    r->mesh[ENGINE][0] = (Mesh){ k.first, { k.dp, 1, k.gep * k.tp } };
    r->mesh[ENGINE][1] = (Mesh){ k.first, { k.dp, k.gep, k.tp } };
    if (k.fault == OTHER_MESH && comm_rank() == 1) {
        r->mesh[ENGINE][1] = (Mesh){ k.first, { 1, ranks, 1 } };
    }
    offer(r);
    refit_plan(r);
}

// The tensor of that name in this rank's engine memory; counts a failure if it is not there.
static const uint8_t *engine_tensor(const Refit *r, const uint8_t *memory, const char *name, int layer,
                                    size_t bytes) {
    char full[112];
    snprintf(full, sizeof full, "layers.%d.%s", layer, name);
    for (int i = 0; i < r->n_tensors; i++) {
        const EngineTensor *e = &r->tensor[i];
        if (strcmp(e->name, full) == 0 && e->n[0] * e->n[1] * e->n[2] == bytes) { return memory + e->at; }
    }
    fprintf(stderr, "%s with %zu bytes is not in the engine\n", full, bytes);
    exit(5);
}

static long wrong;
static void expect(uint8_t got, uint8_t want, const char *name, int layer) {
    if (got != want && wrong++ == 0) { fprintf(stderr, "layers.%d.%s is wrong ", layer, name); }
}

// Compares this engine rank's memory with the layout, written out.
static void verify(const Refit *r, const uint8_t *m, int version) {
    int place = comm_rank() - k.first, t = place % k.tp, ge = place / k.tp % k.gep, n = E / k.gep;
    int tp = k.gep * k.tp, dt = place % tp;         // dense tensors are cut over both
    wrong = 0;
    for (int l = 0; l < L; l++) {
        for (int scale = 0; scale < 2; scale++) {
            const char *end = scale ? "scale" : "weight";
            char name[48];
            int cols = expert_cols(1, scale), rows = F / k.tp;
            snprintf(name, sizeof name, "ffn.experts.w13.%s", end);
            const uint8_t *w13 = engine_tensor(r, m, name, l, (size_t)(n * 2 * rows * cols));
            const uint64_t keys[] = { expert_pattern(l, 1, scale, version),
                expert_pattern(l, 3, scale, version), expert_pattern(l, 2, scale, version) };
            for (int b = 0; b < n * 2 * rows * cols; b++) {
                int e = b / (2 * rows * cols), row = b / cols % (2 * rows), up = row >= rows;
                expect(w13[b], expert_byte(keys[up], ge * n + e, t * rows + row - up * rows, b % cols),
                       name, l);
            }
            cols = expert_cols(2, scale) / k.tp;
            snprintf(name, sizeof name, "ffn.experts.w2.%s", end);
            const uint8_t *w2 = engine_tensor(r, m, name, l, (size_t)(n * C * cols));
            for (int b = 0; b < n * C * cols; b++) {
                expect(w2[b], expert_byte(keys[2], ge * n + b / (C * cols), b / cols % C,
                                          t * cols + b % cols), name, l);
            }
        }
        for (int i = 0; i < DENSE; i++) {
            const char *name = dense[i].name, *engine = name;
            int rows = scale_rows(i), cols = stored_cols(i), half = 0, halves = 1;
            int by_row = !strncmp(name, "attn.wq_b", 9) || !strncmp(name, "attn.wo_a", 9);
            int by_col = !strncmp(name, "attn.wo_b", 9) || strstr(name, "experts.w2.");
            int scaled = strstr(name, ".scale") != NULL;
            if (strstr(name, "experts.w1.") || strstr(name, "experts.w3.")) {
                by_row = halves = 2;
                half = name[20] == '3';
                engine = scaled ? "ffn.shared_experts.gate_up_proj.scale"
                                : "ffn.shared_experts.gate_up_proj.weight";
            }
            if (strstr(name, "experts.w2.")) {
                engine = scaled ? "ffn.shared_experts.down_proj.scale"
                                : "ffn.shared_experts.down_proj.weight";
            }
            int own_rows = by_row ? rows / tp : rows, own_cols = by_col ? cols / tp : cols;
            const uint8_t *x = engine_tensor(r, m, engine, l, (size_t)(halves * own_rows * own_cols));
            const uint64_t key = pattern(name, l, version);
            for (int b = 0; b < own_rows * own_cols; b++) {
                int row = b / own_cols + (by_row ? dt * own_rows : 0);
                int col = b % own_cols + (by_col ? dt * own_cols : 0);
                expect(x[half * own_rows * own_cols + b],
                       (uint8_t)random_bits(key, (uint64_t)(row * cols + col)), name, l);
            }
        }
    }
    if (wrong) { fprintf(stderr, "rank %d: %ld bytes are wrong\n", comm_rank(), wrong); exit(3); }
}

static void run_ranks(void *unused) {
    int engine_ranks = k.dp * k.gep * k.tp, end = k.first + engine_ranks;
    int ranks = end > k.train ? end : k.train;
    Refit r;
    (void)unused;
    comm_launch(ranks, 1, 5);
    make_source(1);
    make_refit(&r);
    int mine = comm_rank() >= k.first && comm_rank() < end;
    uint8_t *points = (uint8_t *)malloc(r.bytes), *golden = (uint8_t *)malloc(r.bytes);
    for (int version = 1; version <= 2; version++) {        // later steps bring other bytes
        make_source(version);
        memset(points, 0xA5, r.bytes);
        memset(golden, 0xA5, r.bytes);
        refit_move(&r, mine ? points : NULL, REFIT_POINTS);
        double sum[3] = { r.sent, r.received, r.local }, plan = 0;
        comm_sum_double(COMM_WORLD, sum, 3, "test");
        for (size_t i = 0; i < r.n_transfers; i++) {
            int misc = r.param[r.transfer[i].param].misc != NULL;
            plan += misc ? 0 : (double)region_bytes(&r.transfer[i].box);
        }
        double whole = 0;       // what went by broadcast was sent once and received by all others
        for (int i = r.bulk; i < r.n; i++) {
            whole += (double)(r.tensor[r.param[i].tensor].n[0] * r.tensor[r.param[i].tensor].n[1] *
                              r.tensor[r.param[i].tensor].n[2]);
        }
        if (sum[0] - whole + sum[2] != plan || sum[1] - whole * (ranks - 1) + sum[2] != plan) {
            fprintf(stderr, "sent %g, received %g, local %g, plan %g\n", sum[0], sum[1], sum[2], plan);
            exit(4);
        }
        if (k.first == 0 && k.train == ranks && k.ep == k.gep && k.tp == 1 && k.edp == k.dp
            && sum[0] != whole) { exit(6); }        // the same owners: nothing travels
        refit_move(&r, mine ? golden : NULL, REFIT_GOLDEN);
        if (!mine) { continue; }
        verify(&r, points, version);
        verify(&r, golden, version);
        if (memcmp(points, golden, r.bytes)) { fprintf(stderr, "golden differs\n"); exit(3); }
    }
}

static void test_meshes(void) {
    char text[2048];
    static const struct { int edp, ep, first, dp, gep, tp; } rows[] = {
        {1, 1, 0, 1, 1, 1}, {1, 2, 0, 1, 1, 2}, {1, 4, 0, 1, 1, 4}, {1, 8, 0, 1, 1, 8},
        {1, 8, 0, 1, 8, 1}, {1, 8, 0, 2, 1, 4}, {1, 8, 0, 1, 2, 4}, {1, 8, 0, 1, 4, 2},
        {2, 2, 0, 1, 1, 4}, {2, 2, 0, 2, 2, 1}, {4, 1, 0, 1, 1, 4}, {2, 4, 0, 4, 1, 2},
        {1, 4, 4, 1, 1, 4}, {1, 4, 4, 2, 2, 1}, {2, 2, 4, 1, 1, 4}, {1, 1, 1, 1, 1, 4},
        {1, 4, 4, 1, 1, 1}, {1, 2, 2, 3, 1, 1}, {1, 2, 1, 1, 1, 4}, {2, 2, 2, 1, 2, 2},
        {1, 8, 3, 1, 1, 2},
    };
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++) {
        k = (__typeof__(k)){ .edp = rows[i].edp, .ep = rows[i].ep, .train = rows[i].edp * rows[i].ep,
                             .first = rows[i].first, .dp = rows[i].dp, .gep = rows[i].gep,
                             .tp = rows[i].tp, .stage = 1 + (int)(i % 2) };
        int code = run_child(run_ranks, NULL, text, sizeof text);
        check(code == 0, "trainer %d x ep %d -> from rank %d, dp %d x ep %d x tp %d: exit code %d %s",
              k.edp, k.ep, k.first, k.dp, k.gep, k.tp, code, text);
    }
}

int main(void) {
    test_meshes();
    return finish("test_reshard");
}
