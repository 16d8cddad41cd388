// Tests of refit.c's resharding: whatever the meshes, an engine's bytes end as the formula says,
// point to point and golden alike, a second time too; and every wrong offer or plan ends in under
// a second with the name of the tensor.
//
// Oracles: the engine's layout written out by hand, rank by rank and half by half, from a pattern
// that is a function of (tensor, version, global place); memory is poisoned before. The same code
// does not compute both sides: nothing here calls slice(), but for its own closed-form test.
//
// Seen to fail on broken copies of refit.c: the second half written over the first; a replica asked
// where the receiver has it itself; a mesh walked from the inside out; columns from the beginning;
// scales cut as codes are; scales and codes on different ways; adapters that are not finite served;
// the golden way with every replica's broadcast; A cut where B is.
#include "model.h"
#include "../dev/merge.c"

// Sizes at which eight tensor-parallel ranks still cut whole blocks: 256/8 = 32 columns of w2,
// 1024/8 = 128 rows and columns of the dense ones.
enum { L = 2, E = 8, C = 64, O = 1024, Q = 40 };
static int F = 256;             // 128: eight ranks would cut inside a group of w2's scales

static struct {                 // one configuration, set before ranks are forked
    int edp, ep, train;         // trainer: ranks 0 .. train-1 as (replicas, owners)
    int first, dp, gep, tp;     // engine: ranks first .. as (replicas, experts, tensor)
    int stage;                  // layers sent together
    int fault;                  // what goes wrong: see the enum
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

static int scale_rows(int i) {
    return dense[i].type == DT_E8M0 ? (dense[i].rows + 127) / 128 : dense[i].rows;
}

static int stored_cols(int i) {
    static const int bytes[] = { [DT_BF16] = 2, [DT_F32] = 4, [DT_FP8] = 1, [DT_I64] = 4 };
    int type = dense[i].type, cols = dense[i].cols;
    return type == DT_E8M0 ? (cols + 127) / 128 : cols * bytes[type];
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
                    (*data)[b] = expert_byte(key, first + b / (rows * cols), b / cols % rows,
                                             b % cols);
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
static const uint8_t *engine_tensor(const Refit *r, const uint8_t *memory, const char *name,
                                    int layer, size_t bytes) {
    char full[112];
    snprintf(full, sizeof full, "layers.%d.%s", layer, name);
    for (int i = 0; i < r->n_tensors; i++) {
        const EngineTensor *e = &r->tensor[i];
        size_t n = e->n[0] * e->n[1] * e->n[2];
        if (strcmp(e->name, full) == 0 && n == bytes) { return memory + e->at; }
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
                expect(w13[b], expert_byte(keys[up], ge * n + e, t * rows + row - up * rows,
                                           b % cols), name, l);
            }
            int whole = F / k.tp % 32 != 0, own = whole ? E : n;        // then all ranks have all
            cols = expert_cols(2, scale) / (whole ? 1 : k.tp);
            snprintf(name, sizeof name, "ffn.experts.%s.%s", whole ? "down" : "w2", end);
            const uint8_t *w2 = engine_tensor(r, m, name, l, (size_t)(own * C * cols));
            for (int b = 0; b < own * C * cols; b++) {
                expect(w2[b], expert_byte(keys[2], (whole ? 0 : ge * n) + b / (C * cols),
                                          b / cols % C, (whole ? 0 : t * cols) + b % cols),
                       name, l);
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
            const uint8_t *x = engine_tensor(r, m, engine, l,
                                             (size_t)(halves * own_rows * own_cols));
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
            fprintf(stderr, "sent %g, received %g, local %g, plan %g\n", sum[0], sum[1], sum[2],
                    plan);
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
        {1, 8, 3, 1, 1, 2}, {1, 4, 0, 1, 1, 8},
    };
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++) {
        k = (__typeof__(k)){ .edp = rows[i].edp, .ep = rows[i].ep,
                             .train = rows[i].edp * rows[i].ep,
                             .first = rows[i].first, .dp = rows[i].dp, .gep = rows[i].gep,
                             .tp = rows[i].tp, .stage = 1 + (int)(i % 2) };
        F = rows[i].tp == 8 && i > 4 ? 128 : 256;
        int code = run_child(run_ranks, NULL, text, sizeof text);
        F = 256;
        check(code == 0,
              "trainer %d x ep %d -> from rank %d, dp %d x ep %d x tp %d: exit code %d %s",
              k.edp, k.ep, k.first, k.dp, k.gep, k.tp, code, text);
    }
}

// -------------------------------------------------------------------------------------------------
// What must be refused, by name, on all ranks at once

static void plan_ranks(void *unused) {
    Refit r;
    (void)unused;
    comm_launch(k.train, 1, 5);
    make_source(1);
    make_refit(&r);
    // The plan itself is damaged.
    if (k.fault == TWICE || k.fault == GAP || k.fault == OTHER_PLAN) {
        for (size_t i = 0; i < r.n_transfers; i++) {
            Transfer *t = &r.transfer[i];
            if (strcmp(r.param[t->param].name, "layers.1.ffn.experts.up.weight") || t->to != 2) {
                continue;
            }
            if (k.fault == TWICE) { r.param[t->param].half = 0; }
            if (k.fault == GAP) { t->box.n[2]--; }
            if (k.fault == OTHER_PLAN) { r.param[t->param].hash += comm_rank() == 1; }
        }
        if (k.fault == OTHER_PLAN) { plan_agree(&r); }
        plan_cover(&r);
    }
    if (k.fault == SWAPPED) {                   // no plan can see this; bytes can
        uint8_t *memory = (uint8_t *)malloc(r.bytes);
        refit_move(&r, memory, REFIT_POINTS);
        verify(&r, memory, 1);
    }
}

static void test_refusals(void) {
    static const struct { int fault, code; const char *expect; } rows[] = {
        {RIGHT, 0, ""},
        {DROPPED, 1, "layers.1.attn.wo_b: 0 of 2 tensors are offered"},
        {DROPPED_BY_ONE, 1, "layers.1.attn.wo_b"},
        {NO_SCALE, 1, "layers.1.attn.wo_b: 1 of 2 tensors"},
        {WRONG_TYPE, 1, "layers.1.attn.wo_b.weight has another type"},
        {OWNER_OFF, 1, "layers.0.ffn.experts.down.scale: rank 1 holds"},
        {SWAPPED, 3, "layers.1.ffn.experts.w13.weight is wrong"},
        {TWICE, 1, "layers.1.ffn.experts.w13.weight: rank 0 would get bytes of it twice, "
         "of layers.1.ffn.experts.gate.weight and of layers.1.ffn.experts.up.weight"},
        {GAP, 1, "layers.1.ffn.experts.w13.weight: nobody sends 512 of its 32768 bytes to rank 2"},
        {OTHER_PLAN, 1, "layers.1.ffn.experts.up.weight: ranks 0 and 1 do not plan"},
        {OTHER_MESH, 1, "layers.0.ffn.experts.down.scale: ranks 0 and 1 do not plan"},
    };
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++) {
        char text[4096];
        int code = 0;
        double seconds = INFINITY, limit = 1;
#ifdef __SANITIZE_ADDRESS__
        limit = 3;
#endif
        k = (__typeof__(k)){ .edp = 1, .ep = 4, .train = 4, .dp = 1, .gep = 1, .tp = 4, .stage = 1,
                             .fault = rows[i].fault };
        for (int tries = 0; tries < 3 && seconds > limit; tries++) {    // other work may delay
            double start = clock_seconds();
            code = run_child(plan_ranks, NULL, text, sizeof text);
            seconds = clock_seconds() - start;
        }
        check(code == rows[i].code && strstr(text, rows[i].expect),
              "fault %d: exit code %d, wanted '%s', got: %s", rows[i].fault, code, rows[i].expect,
              text);
        check(seconds < limit, "fault %d took %.1f s", rows[i].fault, seconds);
    }
}

// -------------------------------------------------------------------------------------------------
// slice(): every element has as many holders as the repeating axes have ranks, and two axes on one
// dimension cut from the outside in

static void test_slice(void) {
    static const int sizes[4][3] = { {1, 1, 4}, {2, 3, 1}, {2, 2, 2}, {3, 1, 5} };
    enum { N = 12 };
    long possible = 0, refused = 0, bad = 0;
    for (int code = 0; code < 64 * 4; code++) {    // what the three axes cut; which sizes they have
        Refit r = { .layers = 1 };
        Param p = { .name = "x", .dim = { N, N, 2 * N }, .grain = { 1, 1, 2 }, .width = 1 };
        int holders[N][N][N] = {0}, repeats = 1, product[3] = { 1, 1, 1 }, whole = 1;
        const int *size = sizes[code / 64];
        memcpy(r.mesh[SOURCE][0].size, size, sizeof sizes[0]);
        for (int a = 0; a < 3; a++) {
            int d = p.cut[SOURCE][a] = (code >> 2 * a & 3) - 1;
            *(d < 0 ? &repeats : &product[d]) *= size[a];
        }
        for (int d = 0; d < 3; d++) { whole &= N % product[d] == 0; }
        for (int i = 0; i < size[0] * size[1] * size[2]; i++) {
            Region b;
            const char *why = slice(&b, &r, &p, SOURCE, i);
            bad += whole != (why == NULL);
            *(why ? &refused : &possible) += 1;
            for (size_t e = 0; !why && e < region_bytes(&b); e++) {
                holders[b.at[0] + e / (b.n[1] * b.n[2])][b.at[1] + e / b.n[2] % b.n[1]]
                       [b.at[2] + e % b.n[2]]++;
            }
        }
        for (int e = 0; whole && e < N * N * N; e++) { bad += (&holders[0][0][0])[e] != repeats; }
    }
    check(bad == 0 && possible > 200 && refused > 200, "slice: %ld wrong of %ld boxes, %ld refused",
          bad, possible, refused);
    Refit r = { .mesh[SOURCE][0].size = { 2, 3, 1 } };
    Param p = { .name = "x", .dim = { 12, 4, 64 }, .grain = { 1, 1, 32 }, .width = 1,
                .cut[SOURCE] = { 0, 0, REPEAT } };
    for (int i = 0; i < 6; i++) {       // the outer axis cuts 12 in 6, the inner one 6 in 2
        Region b;
        check(!slice(&b, &r, &p, SOURCE, i) && b.at[0] == (size_t)(i / 3 * 6 + i % 3 * 2) &&
              b.n[0] == 2 && b.n[2] == 2, "two axes on one dimension, rank %d", i);
    }
    p.cut[SOURCE][0] = 2;       // halves of 64 are whole groups of scales, halves of 96 are not
    Region half;
    check(slice(&half, &r, &p, SOURCE, 3) == NULL, "cut at a group of scales");
    p.dim[2] = 96;
    const char *why = slice(&half, &r, &p, SOURCE, 3);
    check(why && strstr(why, "block of scales"), "cut inside a group of scales");
}

// -------------------------------------------------------------------------------------------------
// Adapters: to the inactive buffer, and served only when all have them

enum { R = 2 };
static Adapters adapters;

static void add_adapters(Adapters *s) {
    char name[96];
    int local = E / k.ep, first = comm_rank() % k.ep * local;
    if (comm_rank() >= k.train) { local = E; first = 0; }       // an engine rank knows names alone
    adapters_begin(s);
    for (int l = 0; l < L; l++) {
        snprintf(name, sizeof name, "layers.%d.attn.wkv", l);
        adapter_add(s, TARGET_WKV, name, C, Q);
        snprintf(name, sizeof name, "layers.%d.attn.wo_b", l);
        adapter_add(s, TARGET_WO_B, name, O, Q);
        snprintf(name, sizeof name, "layers.%d.ffn.experts", l);
        adapter_add_experts(s, TARGET_EXPERTS_W1, name, "w1", first, local, C, F);
        adapter_add_experts(s, TARGET_EXPERTS_W2, name, "w2", first, local, F, C);
        adapter_add_experts(s, TARGET_EXPERTS_W3, name, "w3", first, local, C, F);
    }
}

static float adapter_value(int version, const char *name, size_t i) {
    return random_uniform(random_key((uint64_t)version, name), i);
}

static const float *adapter_at(const Refit *r, const uint8_t *m, int l, const char *name,
                               size_t n) {
    return (const float *)(const void *)engine_tensor(r, m, name, l, n * sizeof(real));
}

// A module's factor on this engine rank: rows from row0 and columns from col0 of the whole.
static void verify_factor(const float *x, int version, const char *name, int rows, int cols,
                          int row0, int col0, int all_cols) {
    for (int i = 0; i < rows * cols; i++) {
        size_t at = (size_t)(row0 + i / cols) * (size_t)all_cols + (size_t)(col0 + i % cols);
        if (x[i] != adapter_value(version, name, at) && wrong++ == 0) {
            fprintf(stderr, "%s is wrong, element %d: %g\n", name, i, (double)x[i]);
        }
    }
}

static void verify_adapters(const Refit *r, const uint8_t *m, int version) {
    int t = (comm_rank() - k.first) % k.tp;
    char name[96];
    wrong = 0;
    for (int l = 0; l < L; l++) {
        snprintf(name, sizeof name, "layers.%d.attn.wkv.lora_B", l);            // sent whole
        verify_factor(adapter_at(r, m, l, "attn.wkv.lora_B", Q * R), version, name, Q, R, 0, 0, R);
        snprintf(name, sizeof name, "layers.%d.attn.wo_b.lora_A", l);           // cut by its input
        verify_factor(adapter_at(r, m, l, "attn.wo_b.lora_A", (size_t)(R * O / k.tp)), version,
                      name, R, O / k.tp, 0, t * O / k.tp, O);
        const float *a13 = adapter_at(r, m, l, "ffn.experts.w13.lora_A", E * 2 * R * C);
        const float *b13 = adapter_at(r, m, l, "ffn.experts.w13.lora_B",
                                      (size_t)(E * 2 * F / k.tp * R));
        const float *a2 = adapter_at(r, m, l, "ffn.experts.w2.lora_A", (size_t)(E * R * F / k.tp));
        const float *b2 = adapter_at(r, m, l, "ffn.experts.w2.lora_B", E * C * R);
        for (int e = 0; e < E; e++) {
            for (int up = 0; up < 2; up++) {
                snprintf(name, sizeof name, "layers.%d.ffn.experts.%d.w%d.lora_A", l, e,
                         up ? 3 : 1);
                verify_factor(a13 + (e * 2 + up) * R * C, version, name, R, C, 0, 0, C);
                name[strlen(name) - 1] = 'B';
                verify_factor(b13 + (e * 2 + up) * F / k.tp * R, version, name, F / k.tp, R,
                              t * F / k.tp, 0, R);
            }
            snprintf(name, sizeof name, "layers.%d.ffn.experts.%d.w2.lora_A", l, e);
            verify_factor(a2 + e * R * F / k.tp, version, name, R, F / k.tp, 0, t * F / k.tp, F);
            name[strlen(name) - 1] = 'B';
            verify_factor(b2 + e * C * R, version, name, C, R, 0, 0, R);
        }
    }
    if (wrong) { exit(3); }
}

static void adapter_ranks(void *unused) {
    Refit r = { .layers = L, .stage_layers = 1 };
    Adapters *s = &adapters;
    (void)unused;
    comm_launch(k.first + k.tp > k.train ? k.first + k.tp : k.train, 1, 5);
    *s = (Adapters){ .R = R, .alpha = 4, .targets = 1u << TARGET_WKV | 1u << TARGET_WO_B |
                     1u << TARGET_EXPERTS_W1 | 1u << TARGET_EXPERTS_W2 | 1u << TARGET_EXPERTS_W3 };
    mem_count();
    add_adapters(s);
    adapters_alloc(s, 0);
    mem_open();
    if (comm_rank() < k.train) { adapters_alloc(s, 0); }
    add_adapters(s);
    r.mesh[SOURCE][0] = (Mesh){ 0, { k.train, 1, 1 } };
    r.mesh[SOURCE][1] = (Mesh){ 0, { k.edp, k.ep, 1 } };
    r.mesh[ENGINE][0] = r.mesh[ENGINE][1] = (Mesh){ k.first, { 1, 1, k.tp } };
    refit_offer_adapters(&r, s, E);
    refit_plan(&r);
    EngineAdapters engine = { .active = 1 };
    int mine = comm_rank() >= k.first && comm_rank() < k.first + k.tp;
    for (int b = 0; mine && b < 2; b++) {
        engine.memory[b] = (uint8_t *)memset(malloc(r.bytes), 0xA5, r.bytes);
    }
    for (int version = 1; version <= 3; version++) {
        for (int i = 0; comm_rank() < k.train && i < s->n; i++) {
            const AdapterTensor *t = &s->tensors[i];
            for (size_t j = 0; j < (size_t)t->rows * (size_t)t->cols; j++) {
                s->p[t->at + j] = adapter_value(version, t->name, j);
            }
        }
        if (version == 3 && comm_rank() == k.train - 1) {
            s->p[s->n_dense + s->n_expert - 1] = NAN;
        }
        int changed = refit_adapters(&r, &engine);
        if (changed != (version < 3) || engine.version != (version < 3 ? version : 2)) { exit(4); }
        if (mine) { verify_adapters(&r, engine.memory[engine.active], version < 3 ? version : 2); }
    }
}

static void test_adapters(void) {
    static const struct { int edp, ep, first, tp; } rows[] = {
        {1, 4, 0, 4}, {2, 2, 0, 4}, {1, 2, 2, 4}, {1, 8, 0, 8}, {1, 4, 4, 2} };
    char text[2048];
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++) {
        k = (__typeof__(k)){ .edp = rows[i].edp, .ep = rows[i].ep,
                             .train = rows[i].edp * rows[i].ep,
                             .first = rows[i].first, .tp = rows[i].tp };
        int code = run_child(adapter_ranks, NULL, text, sizeof text);
        check(code == 0, "adapters, trainer %d x %d, engine of %d from %d: exit code %d %s", k.edp,
              k.ep, k.tp, k.first, code, text);
    }
}

// -------------------------------------------------------------------------------------------------
// The plan at the size of the real model: 43 layers, 256 experts, eight GPUs

static void test_full_size(void) {
    static const struct { const char *name; int type, out, in; } matrices[] = {
        {"attn.wq_a", DT_FP8, 1024, 4096}, {"attn.wq_b", DT_FP8, 32768, 1024},
        {"attn.wkv", DT_FP8, 512, 4096}, {"attn.wo_a", DT_FP8, 8192, 4096},
        {"attn.wo_b", DT_FP8, 4096, 8192}, {"ffn.shared_experts.w1", DT_FP8, 2048, 4096},
        {"ffn.shared_experts.w2", DT_FP8, 4096, 2048},
        {"ffn.shared_experts.w3", DT_FP8, 2048, 4096},
        {"w1", DT_FP4, 2048, 4096}, {"w2", DT_FP4, 4096, 2048}, {"w3", DT_FP4, 2048, 4096} };
    double start = clock_seconds();
    Refit r = { .layers = 43, .stage_layers = 1, .needed = (1u << ENGINE_RULES) - 1 };
    r.mesh[SOURCE][0] = (Mesh){ 0, { 8, 1, 1 } };
    r.mesh[SOURCE][1] = (Mesh){ 0, { 1, 8, 1 } };
    r.mesh[ENGINE][0] = r.mesh[ENGINE][1] = (Mesh){ 0, { 1, 1, 8 } };
    for (int i = 0; i < 43 * 11 * 2; i++) {
        int l = i / 22, k_ = i / 2 % 11, scale = i % 2, type = matrices[k_].type;
        for (int e = 0; e < (type == DT_FP4 ? 256 : 1); e++) {
            char name[96];
            const char *end = scale ? "scale" : "weight";
            if (type == DT_FP8) {
                snprintf(name, sizeof name, "layers.%d.%s.%s", l, matrices[k_].name, end);
            } else {
                snprintf(name, sizeof name, "layers.%d.ffn.experts.%d.%s.%s", l, e,
                         matrices[k_].name, end);
            }
            refit_offer(&r, name, scale ? DT_E8M0 : type, (size_t)matrices[k_].out,
                        (size_t)matrices[k_].in, 256, e < 32 ? &r : NULL);
        }
    }
    refit_plan(&r);
    double in[8] = {0}, out[8] = {0}, local = 0;
    for (size_t i = 0; i < r.n_transfers; i++) {
        const Transfer *t = &r.transfer[i];
        double n = (double)region_bytes(&t->box);
        if (r.param[t->param].misc) { continue; }
        if (t->from == t->to) { local += n; } else { out[t->from] += n; in[t->to] += n; }
    }
    // experts: 4 bits and a 32nd of a byte per element, 7 of 8 eighths of an eighth; dense: at home
    double experts = 43.0 * 256 * 3 * 2048 * 4096 * (1.0 / 2 + 1.0 / 32);
    for (int g = 0; g < 8; g++) {
        check_close("bytes in", g, in[g], experts * 7 / 64, 0);
        check_close("bytes out", g, out[g], experts * 7 / 64, 0);
    }
    check(local > experts / 8 && clock_seconds() - start < 2, "planned in %.2f s",
          clock_seconds() - start);
    refit_free(&r);
}

// -------------------------------------------------------------------------------------------------
// The model's own table of tensors: two ranks with half of the experts each, two engine ranks

// y (E*T,C) of every expert for every row of x, as an engine computes it: each rank its F/2 columns
// of the hidden layer, from w13 and w2 as they arrived, and the sum over ranks. swapped: as if up
// came before gate.
static void engine_experts(real *y, const act *x, const uint8_t *const w[4], const Config *c, int T,
                           int swapped) {
    int n = c->E * T, F_ = c->F / 2, offset[17];
    act *rows = NEW(act, n * c->C), *both = NEW(act, n * 2 * F_), *out = NEW(act, n * c->C);
    act *g = NEW(act, n * F_), *v = NEW(act, n * F_), *h = NEW(act, n * F_);
    for (int e = 0; e <= c->E; e++) { offset[e] = e * T; }
    for (int i = 0; i < n * c->C; i++) { rows[i] = x[i % (T * c->C)]; }
    experts_fp4_forward(both, rows, offset, w[0], w[1], c->E, c->C, 2 * F_);
    for (int i = 0; i < n * F_; i++) {
        const act *row = both + i / F_ * 2 * F_ + i % F_;
        g[i] = row[swapped ? F_ : 0];
        v[i] = row[swapped ? 0 : F_];
    }
    swiglu_forward(h, g, v, NULL, c->swiglu_limit, n, F_);
    experts_fp4_forward(out, h, offset, w[2], w[3], c->E, F_, c->C);
    for (int i = 0; i < n * c->C; i++) { y[i] = ld(out + i); }
    comm_sum_real(COMM_WORLD, y, (size_t)(n * c->C), "engine");
    act *all[] = { rows, both, out, g, v, h };
    for (int i = 0; i < 6; i++) { free(all[i]); }
}

// The same of this rank's own experts, in the trainer's layout. Returns |y - that| / |that|.
static double engine_error(const real *y, const act *x, const Model *m, int layer, int T) {
    const Config *c = &m->config;
    const MoeWeights *w = &m->layer[layer].moe;
    int E_ = m->moe.local, n = E_ * T, offset[17];
    act *rows = NEW(act, n * c->C), *g = NEW(act, n * c->F), *v = NEW(act, n * c->F);
    act *h = NEW(act, n * c->F), *out = NEW(act, n * c->C);
    double diff = 0, size = 0;
    for (int e = 0; e <= E_; e++) { offset[e] = e * T; }
    for (int i = 0; i < n * c->C; i++) { rows[i] = x[i % (T * c->C)]; }
    experts_fp4_forward(g, rows, offset, w->w1, w->s1, E_, c->C, c->F);
    experts_fp4_forward(v, rows, offset, w->w3, w->s3, E_, c->C, c->F);
    swiglu_forward(h, g, v, NULL, c->swiglu_limit, n, c->F);
    experts_fp4_forward(out, h, offset, w->w2, w->s2, E_, c->F, c->C);
    for (int i = 0; i < n * c->C; i++) {
        double want = (double)ld(out + i), got = (double)y[(size_t)(m->moe.first * T * c->C + i)];
        diff += (got - want) * (got - want);
        size += want * want;
    }
    act *all[] = { rows, g, v, h, out };
    for (int i = 0; i < 5; i++) { free(all[i]); }
    return sqrt(diff / size);
}

static void model_ranks(void *unused) {
    static const int length[] = { 40 };
    Model m;
    Config c = t2_config(2);
    (void)unused;
    comm_launch(2, 2, 20);
    build(&m, &c, 2, 64, 1, 3);
    Refit r = { .layers = c.layers, .stage_layers = 2 };
    r.mesh[SOURCE][0] = (Mesh){ 0, { 2, 1, 1 } };
    r.mesh[SOURCE][1] = (Mesh){ 0, { 1, 2, 1 } };
    r.mesh[ENGINE][0] = r.mesh[ENGINE][1] = (Mesh){ 0, { 1, 1, 2 } };
    refit_offer_base(&r, m.tensors, m.n_tensors, c.E);
    refit_plan(&r);
    uint8_t *points = (uint8_t *)memset(malloc(r.bytes), 0xA5, r.bytes);
    uint8_t *golden = (uint8_t *)memset(malloc(r.bytes), 0x5A, r.bytes);
    refit_move(&r, points, REFIT_POINTS);
    refit_move(&r, golden, REFIT_GOLDEN);
    for (int i = 0; i < r.n_tensors; i++) {
        const EngineTensor *e = &r.tensor[i];
        if (memcmp(points + e->at, golden + e->at, e->n[0] * e->n[1] * e->n[2])) { exit(3); }
    }
    // This rank's own experts, in what it got: gate's rows over up's.
    int rows = c.F / 2, cols = c.C / 2, me = comm_rank(), e = m.moe.first;
    const uint8_t *w13 = engine_tensor(&r, points, "ffn.experts.w13.weight", 3,
                                       (size_t)(c.E * 2 * rows * cols));
    w13 += (size_t)(e * 2 * rows * cols);
    if (memcmp(w13, m.layer[3].moe.w1 + me * rows * cols, (size_t)(rows * cols)) ||
        memcmp(w13 + rows * cols, m.layer[3].moe.w3 + me * rows * cols,
               (size_t)(rows * cols))) {
        exit(4);
    }
    // Sent whole: int32 ids, bf16, fp32.
    if (memcmp(engine_tensor(&r, points, "ffn.gate.tid2eid", 0, (size_t)(4 * c.V * c.K)),
               m.layer[0].moe.tid2eid, (size_t)(4 * c.V * c.K)) ||
        memcmp(engine_tensor(&r, points, "hc_attn_base", 4, 4 * HC_MIX), m.layer[4].hc_attn.base,
               4 * HC_MIX)) { exit(5); }
    // What was sent computes what the trainer computes, and does not with its halves swapped.
    enum { T = 3 };
    act *x = NEW(act, T * c.C);
    real *y = NEW(real, c.E * T * c.C);
    fill_act(x, (size_t)(T * c.C), 1);
    size_t n13 = (size_t)(c.E * c.F * c.C), n2 = (size_t)(c.E * c.C * c.F / 2);
    const uint8_t *const parts[] = {
        engine_tensor(&r, points, "ffn.experts.w13.weight", 3, n13 / 2),
        engine_tensor(&r, points, "ffn.experts.w13.scale", 3, n13 / 32),
        engine_tensor(&r, points, "ffn.experts.w2.weight", 3, n2 / 2),
        engine_tensor(&r, points, "ffn.experts.w2.scale", 3, n2 / 32) };
    engine_experts(y, x, parts, &c, T, 0);
    double right = engine_error(y, x, &m, 3, T);
    engine_experts(y, x, parts, &c, T, 1);
    double swapped = engine_error(y, x, &m, 3, T);
    fprintf(stderr, "engine's experts off by %.4f, with halves swapped %.2f\n", right, swapped);
    if (!(right < 0.01) || !(swapped > 0.5)) { exit(7); }
    Batch b = make_batch(length, 1, c.V);       // and training goes on as before
    double loss = model_forward(&m, &b, 0);
    if (!isfinite(loss)) { exit(6); }
}

// Merged: what the engine gets stands for W + s B A to half a step of fp4, and not for W.
static void merged_ranks(void *size) {
    Model m;
    Config c = t2_config(2);
    comm_launch(2, 2, 20);
    build(&m, &c, 2, 64, 1, 3);
    Adapters *s = &m.adapters;
    for (size_t i = 0; i < s->n_dense + s->n_expert; i++) { s->p[i] *= *(float *)size; }
    Tensor *merged = (Tensor *)malloc(sizeof(Tensor) * m.n_tensors);
    uint8_t *mirror = (uint8_t *)malloc(mem.arena[MEM_WEIGHTS].used);
    merge_base(merged, m.tensors, m.n_tensors, s, mirror);
    Refit r = { .layers = c.layers, .stage_layers = 5 };
    r.mesh[SOURCE][0] = (Mesh){ 0, { 2, 1, 1 } };
    r.mesh[SOURCE][1] = (Mesh){ 0, { 1, 2, 1 } };
    r.mesh[ENGINE][0] = r.mesh[ENGINE][1] = (Mesh){ 0, { 1, 1, 2 } };
    refit_offer_base(&r, merged, m.n_tensors, c.E);
    refit_plan(&r);
    uint8_t *engine = (uint8_t *)malloc(r.bytes);
    refit_move(&r, engine, REFIT_POINTS);
    int rows = c.F / 2, me = comm_rank(), e = m.moe.first;
    const uint8_t *codes = engine_tensor(&r, engine, "ffn.experts.w13.weight", 2,
                                         (size_t)(c.E * c.F * c.C / 2));
    const uint8_t *scales = engine_tensor(&r, engine, "ffn.experts.w13.scale", 2,
                                          (size_t)(c.E * c.F * c.C / 32));
    double off = 0, moved = 0;
    const MoeWeights *w = &m.layer[2].moe;
    for (int row = 0; row < rows; row++) {    // of the first own expert's w3, this rank's half
        real got[c.C], was[c.C];
        widen_fp4(got, codes, scales, (size_t)((e * 2 + 1) * rows + row), c.C);
        widen_fp4(was, w->w3, w->s3, (size_t)(me * rows + row), c.C);
        for (int k_ = 0; k_ < c.C; k_++) {
            double d = 0;
            for (int q = 0; q < 2; q++) {
                d += 2 * (double)w->e3.b[(me * rows + row) * 2 + q] * (double)w->e3.a[q * c.C + k_];
            }
            off += pow((double)got[k_] - (double)was[k_] - d, 2);
            moved += d * d;
        }
    }
    if (!(off < 0.5 * moved)) { fprintf(stderr, "off %g of %g\n", off, moved); exit(3); }
}

static void test_model(void) {
    char text[2048];
    int code = run_child(model_ranks, NULL, text, sizeof text);
    check(code == 0, "the model's table: exit code %d %s", code, text);
    printf("  %.60s\n", text);
    float size = 4;
    code = run_child(merged_ranks, &size, text, sizeof text);
    check(code == 0, "a merged base: exit code %d %s", code, text);
    size = 1e-4f;
    code = run_child(merged_ranks, &size, text, sizeof text);
    check(code == 1 && strstr(text, "would change almost nothing"), "merged away: %d %s", code,
          text);
}

int main(void) {
    test_slice();
    test_full_size();
    test_model();
    test_meshes();
    test_refusals();
    test_adapters();
    return finish("test_reshard");
}
