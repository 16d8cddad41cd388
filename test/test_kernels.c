// Every kernel against the C text it is the twin of: the same inputs, run by both, on shapes that
// are no multiples of tiles, with empty experts, documents of one token and documents longer than
// 2,051. Outputs are poisoned first, so that an element a kernel forgets shows; a second run must
// give the same bits. Without a GPU this says skipped. Build: make test-gpu.
#include "model.h"
#ifndef USE_CUDA
int main(void) {
    skip("built without nvcc");
    return finish("test_kernels");
}
#else

// -------------------------------------------------------------------------------------------------
// One arena twice: H on the host, D on the device with the same layout. X(p) is p's place in the
// one that the present run uses.

static char *H, *D, *back;
static size_t arena_used;
enum { ARENA = 1 << 30 };
#define X(p) ((__typeof__(p))(on_gpu && (p) ? (void *)(D + ((const char *)(p) - H)) : (void *)(p)))

static void *room(size_t bytes) {
    void *p = H + arena_used;
    arena_used += (bytes + 255) / 256 * 256;
    require(arena_used <= (size_t)ARENA);
    return p;
}

static real *reals(size_t n, double size) {
    real *p = room(sizeof(real) * n);
    fill(p, n, size);
    return p;
}
static act *acts(size_t n, double size) {
    act *p = room(sizeof(act) * n);
    fill_act(p, n, size);
    return p;
}
static int *ints(size_t n) { return room(sizeof(int) * n); }
// Outputs: NaN until written.
static real *blank(size_t n) { return memset(room(sizeof(real) * n), 0xFF, sizeof(real) * n); }
static act *blank_act(size_t n) { return memset(room(sizeof(act) * n), 0xFF, sizeof(act) * n); }
static uint8_t *fp8_matrix(size_t n) {
    uint8_t *p = room(n);
    for (size_t i = 0; i < n; i++) { p[i] = e4m3_from_float((float)uniform()); }
    return p;
}
static uint8_t *bytes_between(size_t n, int low, int high) {
    uint8_t *p = room(n);
    for (size_t i = 0; i < n; i++) {
        p[i] = (uint8_t)(low + (int)((uniform() + 1) / 2 * (high - low + 1)));
    }
    return p;
}

// Runs `call` on the host, then twice on the device, from the same start.
#define BOTH(call) do { \
    char *start_ = malloc(arena_used); \
    memcpy(start_, H, arena_used); \
    on_gpu = 0; \
    call; \
    on_gpu = 1; \
    for (int run_ = 0; run_ < 2; run_++) { \
        gpu_upload(D, start_, arena_used); \
        call; \
        gpu_download(run_ ? start_ : back, D, arena_used); \
    } \
    on_gpu = 0; \
    check(memcmp(back, start_, arena_used) == 0, "%s: two runs, other bits", #call); \
    free(start_); } while (0)

static void compare_real(const char *what, const real *p, size_t n, double tol) {
    check_tensor(what, (const real *)(back + ((const char *)p - H)), p, n, tol);
}
static void compare_act(const char *what, const act *p, size_t n, double tol) {
    const act *got = (const act *)(back + ((const char *)p - H));
    double diff = 0, want = 0;
    for (size_t i = 0; i < n; i++) {
        diff += pow((double)ld(got + i) - (double)ld(p + i), 2);
        want += pow((double)ld(p + i), 2);
    }
    check_relative(what, diff, want, tol);
}
static void compare_int(const char *what, const int *p, size_t n) {
    const int *got = (const int *)(back + ((const char *)p - H));
    size_t wrong = 0;
    for (size_t i = 0; i < n; i++) { wrong += got[i] != p[i]; }
    check(wrong == 0, "%s: %zu of %zu differ", what, wrong, n);
}

// Tolerances: one rounding to bf16 is 2^-9; sums of products of rounded numbers stay near that.
#define BF16 4e-3
#define FP32 2e-5

// -------------------------------------------------------------------------------------------------
// Operations

static void test_norms(int T, int C) {
    arena_used = 0;
    act *inp = acts((size_t)T * C, 1), *out = blank_act((size_t)T * C),
        *dinp = blank_act((size_t)T * C);
    real *rstd = blank(T), *dout = reals((size_t)T * C, 1);
    bf16 *w = (bf16 *)acts(C, 1);
    BOTH({ rmsnorm_forward(X(out), X(rstd), X(inp), X(w), 1e-6f, T, C);
           rmsnorm_backward(X(dinp), X(dout), X(inp), X(rstd), X(w), T, C); });
    compare_act("rmsnorm out", out, (size_t)T * C, BF16);
    compare_real("rmsnorm rstd", rstd, T, FP32);
    compare_act("rmsnorm dinp", dinp, (size_t)T * C, BF16);
}

static void test_heads(int T, int Hn, int Dn) {
    arena_used = 0;
    size_t n = (size_t)T * Hn * Dn;
    act *inp = acts(n, 1), *out = blank_act(n), *dout = acts(n, 1), *dinp = blank_act(n);
    act *turned = acts(n, 1), *kinp = acts((size_t)T * Dn, 1), *kd = blank_act((size_t)T * Dn);
    real *rstd = blank((size_t)T * Hn), *table = reals(64 * 100, 1),
         *kdout = reals((size_t)T * Dn, 1);
    real *krstd = blank(T);
    act *kout = blank_act((size_t)T * Dn);
    bf16 *w = (bf16 *)acts(Dn, 1);
    int *position = ints(T);
    for (int t = 0; t < T; t++) { position[t] = t * 7 % 100; }
    BOTH({ norm_rope_forward(X(out), X(rstd), X(inp), NULL, X(table), X(position), 1e-6f, T, Hn, Dn,
                             64);
           norm_rope_backward(X(dinp), X(dout), X(out), X(rstd), X(table), X(position), T, Hn, Dn,
                              64);
           norm_rope_forward(X(kout), X(krstd), X(kinp), X(w), X(table), X(position), 1e-6f, T, 1,
                             Dn, 64);
           key_norm_rope_backward(X(kd), X(kdout), X(kinp), X(krstd), X(w), X(table), X(position),
                                  T, Dn, 64);
           rope_apply(X(turned), X(table), X(position), -1, T, Hn, Dn, 64); });
    compare_act("norm + rope out", out, n, BF16);
    compare_act("norm + rope dinp", dinp, n, BF16);
    compare_act("key norm + rope out", kout, (size_t)T * Dn, BF16);
    compare_act("key norm + rope dinp", kd, (size_t)T * Dn, BF16);
    compare_act("rope", turned, n, BF16);
}

static void test_streams(int T, int C) {
    arena_used = 0;
    size_t N = (size_t)T * HC * C, n = (size_t)T * C, M = (size_t)HC_MIX * HC * C;
    act *Xs = acts(N, 1), *o = acts(n, 1), *x = blank_act(n), *Y = blank_act(N), *dX = acts(N, 1);
    act *place = acts(N, 1), *do_ = blank_act(n), *hx = blank_act(n), *hdX = blank_act(N);
    real *fn = reals(M, 0.02), *base = reals(HC_MIX, 1), *scale = reals(3, 1), *dx = reals(n, 1);
    real *next = reals(M, 0.02), *m = blank((size_t)T * HC_MIX), *r = blank(T), *rstd = blank(T);
    real *pre = blank(T * HC), *post = blank(T * HC), *comb = blank(T * HC * HC);
    real *dpost = blank(T * HC), *dcomb = blank(T * HC * HC), *nm = blank((size_t)T * HC_MIX);
    real *nr = blank(T), *hm = blank(T * HC), *hr = blank(T), *hpre = blank(T * HC);
    real *hrstd = blank(T);
    int *token = ints(T);
    bf16 *embed = (bf16 *)acts((size_t)50 * C, 1), *w = (bf16 *)acts(C, 1);
    act *E = blank_act(N);
    for (int t = 0; t < T; t++) { token[t] = t * 13 % 50; }
    BOTH({ hc_logits_forward(X(m), X(r), X(Xs), X(fn), 1e-6f, T, C, HC_MIX);
           hc_weights_forward(X(pre), X(post), X(comb), X(m), X(base), X(scale), 1e-6f, T, HC_MIX,
                              20);
           hc_enter_forward(X(x), X(rstd), X(Xs), X(pre), X(w), 1e-6f, T, C);
           hc_deal_forward(X(Y), X(nm), X(nr), X(o), X(Xs), X(post), X(comb), X(next), 1e-6f, T, C,
                           HC_MIX);
           hc_deal_forward(X(place), X(hm), X(hr), X(o), X(place), X(post), X(comb), X(next), 1e-6f,
                           T, C, HC);
           hc_deal_backward(X(do_), X(dpost), X(dcomb), X(dX), X(o), X(Xs), X(post), T, C);
           hc_enter_backward(X(dX), X(dx), X(dpost), X(dcomb), X(Xs), X(m), X(r), X(pre), X(comb),
                             X(rstd), X(fn), X(base), X(scale), X(w), 1e-6f, T, C, HC_MIX, 20);
           hc_weights_forward(X(hpre), NULL, NULL, X(hm), X(base), X(scale), 1e-6f, T, HC, 0);
           hc_enter_forward(X(hx), X(hrstd), X(place), X(hpre), X(w), 1e-6f, T, C);
           hc_enter_backward(X(hdX), X(dx), NULL, NULL, X(place), X(hm), X(hr), X(hpre), NULL,
                             X(hrstd), X(next), X(base), X(scale), X(w), 1e-6f, T, C, HC, 0);
           embed_forward(X(E), X(embed), X(token), T, C); });
    compare_real("hc m", m, (size_t)T * HC_MIX, FP32);
    compare_real("hc r", r, T, FP32);
    compare_real("hc pre", pre, T * HC, FP32);
    compare_real("hc post", post, T * HC, FP32);
    compare_real("hc comb", comb, (size_t)T * HC * HC, 1e-4);
    compare_act("hc x", x, n, BF16);
    compare_act("hc Y", Y, N, BF16);
    compare_real("hc m of Y", nm, (size_t)T * HC_MIX, 1e-3);    // of Y as each side rounded it
    compare_real("hc r of Y", nr, T, 1e-4);
    compare_act("hc Y in X's place", place, N, BF16);
    compare_act("hc do", do_, n, BF16);
    compare_real("hc dpost", dpost, (size_t)T * HC, 1e-4);
    compare_real("hc dcomb", dcomb, (size_t)T * HC * HC, 1e-4);
    compare_act("hc dX", dX, N, BF16);
    compare_real("hc head m", hm, T * HC, 1e-3);
    compare_real("hc head pre", hpre, (size_t)T * HC, 1e-4);
    compare_act("hc head x", hx, n, BF16);
    compare_act("hc head dX", hdX, N, BF16);
    compare_act("embed", E, N, 0);
}

static void test_linears(int T, int C, int O, int R) {
    arena_used = 0;
    act *inp = acts((size_t)T * C, 1), *out = blank_act((size_t)T * O),
        *dout = acts((size_t)T * O, 1);
    act *plain = blank_act((size_t)T * O);
    uint8_t *w = fp8_matrix((size_t)O * C);
    uint8_t *scale = bytes_between((size_t)((O + 127) / 128) * ((C + 127) / 128), 119, 123);
    bf16 *wb = (bf16 *)acts((size_t)O * C, 0.1);
    real *a = reals((size_t)R * C, 0.1), *b = reals((size_t)O * R, 0.1), *u = blank((size_t)T * R);
    real *dinp = reals((size_t)T * C, 1), *da = reals((size_t)R * C, 1),
         *db = reals((size_t)O * R, 1);
    real *outb = blank((size_t)T * O), *dinb = reals((size_t)T * C, 1),
         *doutb = reals((size_t)T * O, 1);
    real *terms = blank((size_t)T * O), *plain_terms = blank((size_t)T * O),
         *u2 = blank((size_t)T * R);
    const int all[2] = { 0, T };
    BOTH({ partial_forward(X(terms), X(u2), X(inp), all, X(w), X(scale), DT_FP8, X(a), X(b), 2, 1,
                           C, O, R);
           partial_forward(X(plain_terms), X(u2), X(inp), all, X(w), X(scale), DT_FP8, NULL, NULL,
                           2, 1, C, O, R); });
    compare_real("linear terms", terms, (size_t)T * O, BF16);    // A, B, u are rounded to bf16
    compare_real("linear terms without an adapter", plain_terms, (size_t)T * O, FP32);
    BOTH({ linear_fp8_forward(X(plain), X(inp), X(w), X(scale), T, C, O);
           lora_linear_forward(X(out), X(u), X(inp), X(w), X(scale), X(a), X(b), 2, T, C, O, R);
           lora_linear_backward(X(dinp), X(da), X(db), X(dout), X(inp), X(u), X(w), X(scale), X(a),
                                X(b), 2, T, C, O, R);
           linear_bf16_forward(X(outb), X(inp), X(wb), T, C, O);
           linear_bf16_backward(X(dinb), X(doutb), X(wb), T, C, O); });
    compare_act("linear fp8", plain, (size_t)T * O, BF16);
    compare_act("lora linear out", out, (size_t)T * O, BF16);
    compare_real("lora linear u", u, (size_t)T * R, BF16);      // A is rounded to bf16
    compare_real("lora linear dinp", dinp, (size_t)T * C, BF16);
    compare_real("lora linear da", da, (size_t)R * C, BF16);
    compare_real("lora linear db", db, (size_t)O * R, BF16);
    compare_real("linear bf16", outb, (size_t)T * O, FP32);
    compare_real("linear bf16 dinp", dinb, (size_t)T * C, BF16);     // its dout is rounded to bf16
}

// Experts with 0, 1, 63, .. rows.
static void test_experts(int C, int O, int R) {
    enum { E = 6 };
    const int offset[E + 1] = {0, 0, 1, 64, 64, 129, 300};
    int T = offset[E];
    arena_used = 0;
    act *inp = acts((size_t)T * C, 1), *out = blank_act((size_t)T * O),
        *dout = acts((size_t)T * O, 1);
    uint8_t *w = bytes_between((size_t)E * O * C / 2, 0, 255);
    uint8_t *scale = bytes_between((size_t)E * O * C / 32, 119, 123);
    real *a = reals((size_t)E * R * C, 0.1), *b = reals((size_t)E * O * R, 0.1);
    real *u = blank((size_t)T * R), *u2 = blank((size_t)T * R), *dinp = reals((size_t)T * C, 1);
    real *da = reals((size_t)E * R * C, 1), *db = reals((size_t)E * O * R, 1);
    real *terms = blank((size_t)T * O), *plain_terms = blank((size_t)T * O);
    BOTH({ partial_forward(X(terms), X(u2), X(inp), offset, X(w), X(scale), DT_FP4, X(a), X(b), 2,
                           E, C, O, R);
           partial_forward(X(plain_terms), X(u2), X(inp), offset, X(w), X(scale), DT_FP4, NULL,
                           NULL, 2, E, C, O, R); });
    compare_real("experts' terms", terms, (size_t)T * O, BF16);
    compare_real("experts' terms without adapters", plain_terms, (size_t)T * O, FP32);
    BOTH({ lora_experts_forward(X(out), X(u), X(inp), offset, X(w), X(scale), X(a), X(b), 2, E, C,
                                O, R);
           lora_experts_backward(X(dinp), X(da), X(db), X(dout), X(inp), X(u), offset, X(w),
                                 X(scale), X(a), X(b), 2, E, C, O, R);
           lora_experts_down(X(u2), X(inp), offset, X(a), E, C, R); });
    compare_act("experts out", out, (size_t)T * O, BF16);
    compare_real("experts u", u, (size_t)T * R, BF16);
    compare_real("experts u again", u2, (size_t)T * R, BF16);
    compare_real("experts dinp", dinp, (size_t)T * C, BF16);
    compare_real("experts da", da, (size_t)E * R * C, BF16);
    compare_real("experts db", db, (size_t)E * O * R, BF16);
}

static void test_routing(int T, int C, int E, int K, Routing how, int norm) {
    arena_used = 0;
    size_t slots = (size_t)T * K;
    real *all = reals((size_t)T * E, 3), *bias = reals(E, 0.3), *weights = blank(slots);
    real *logits = blank(slots), *dw = reals(slots, 1), *dinp = reals((size_t)T * C, 1);
    real *dinp2 = reals((size_t)T * C, 1), *home_w = blank(slots), *hash_w = blank(slots);
    real *hash_l = blank(slots);
    int *ids = ints(slots), *slot_row = ints(slots), *row_slot = ints(slots), *tokens = ints(T);
    int *table = ints((size_t)90 * K), *hash_ids = ints(slots);
    bf16 *gate = (bf16 *)acts((size_t)E * C, 0.1);
    act *inp = acts((size_t)T * C, 1), *home = blank_act(slots * C), *out = acts((size_t)T * C, 1);
    act *rows = acts(slots * C, 1);
    for (int t = 0; t < T; t++) { tokens[t] = t * 31 % 90; }
    for (int v = 0; v < 90; v++) {
        for (int k = 0; k < K; k++) { table[v * K + k] = (v + k * 5) % E; }
    }
    for (size_t i = 0; i < slots; i++) {    // a permutation: 7 and the number of slots are coprime
        slot_row[i] = (int)(i * 7919 % slots);
        row_slot[slot_row[i]] = (int)i;
    }
    if (T > 2) { all[E + 1] = all[E + 2] = all[E]; all[2 * E] = -120; }
    const real *needed = route_needs_all(how, norm) ? all : NULL;
    BOTH({ route_forward(X(ids), X(weights), X(logits), X(all), how.greedy ? NULL : X(bias), NULL,
                         NULL, how, 1.5f, norm, T, E, K);
           route_forward(X(hash_ids), X(hash_w), X(hash_l), X(all), NULL, X(table), X(tokens), how,
                         1.5f, norm, T, E, K);
           route_backward(X(dinp), X(dw), X(slot_row), X(ids), X(weights), X(logits), X(needed),
                          X(gate), how, 1.5f, norm, T, C, E, K);
           pack_rows(X(home), X(inp), X(row_slot), T * K, K, C * sizeof(act));
           pack_weights(X(home_w), X(weights), X(row_slot), (int)slots);
           combine_forward(X(out), X(rows), X(slot_row), T, K, C);
           dispatch_backward(X(dinp2), X(rows), X(slot_row), T, K, C); });
    compare_int("route ids", ids, slots);
    compare_int("route hash ids", hash_ids, slots);
    compare_real("route weights", weights, slots, FP32);
    compare_real("route hash weights", hash_w, slots, FP32);
    compare_real("route dinp", dinp, (size_t)T * C, FP32);
    compare_act("pack rows", home, slots * C, 0);
    compare_real("pack weights", home_w, slots, FP32);
    compare_act("combine", out, (size_t)T * C, BF16);
    compare_real("dispatch backward", dinp2, (size_t)T * C, FP32);
}

// Logits that are not numbers: the loss will say so, but the rows need an expert until then.
static void test_routing_nan(int E, int K, Routing how) {
    arena_used = 0;
    enum { T = 3 };
    real *all = reals((size_t)T * E, 1), *weights = blank(T * K), *logits = blank(T * K);
    float *bias = reals(E, 1);
    int *ids = memset(room(sizeof(int) * T * K), 0xFF, sizeof(int) * T * K);
    for (int e = 0; e < E; e++) { all[E + e] = NAN; }
    BOTH({ route_forward(X(ids), X(weights), X(logits), X(all), X(bias), NULL, NULL, how, 1, 1, T,
                         E, K); });
    compare_int("experts of NaN logits", ids, T * K);
}

static void test_swiglu(int T, int F) {
    arena_used = 0;
    size_t n = (size_t)T * F;
    act *g = acts(n, 15), *v = acts(n, 15), *h = blank_act(n), *dg = blank_act(n),
        *dv = blank_act(n);
    real *w = reals(T, 1), *dh = reals(n, 1), *dw = blank(T), *x = reals(n, 1);
    act *narrowed = blank_act(n);
    st(g, 10); st(v + 1, -10);
    BOTH({ swiglu_forward(X(h), X(g), X(v), X(w), 10, T, F);
           swiglu_backward(X(dg), X(dv), X(dw), X(dh), X(g), X(v), X(w), 10, T, F);
           narrow(X(narrowed), X(x), n); });
    compare_act("swiglu h", h, n, BF16);
    compare_act("swiglu dg", dg, n, BF16);
    compare_act("swiglu dv", dv, n, BF16);
    compare_real("swiglu dweight", dw, T, 1e-4);
    compare_act("narrow", narrowed, n, 0);
}

// A receiver has some of the 64 heads (all_q, all_out: (T,64,D)): the same bits as beside the
// others. a: on the device.
static void test_some_heads(const act *all_q, const act *all_out, const act *kv, const act *entries,
                            const real *sink, const int *selected, AttentionShape a) {
    for (int H = 8; H < 64; H *= 2) {
        const size_t row = (size_t)H * a.D, whole = (size_t)a.H * a.D,
                     bytes = a.T * row * sizeof(act);
        char *host = malloc(bytes), *got = malloc(bytes);
        act *q, *out;
        real *lse;
        AttentionShape some = a;
        some.H = H;
        gpu_alloc((void **)&q, bytes);
        gpu_alloc((void **)&out, bytes + 1024);
        gpu_alloc((void **)&lse, (size_t)a.T * H * sizeof *lse);
        for (int t = 0; t < a.T; t++) {
            memcpy(host + t * row * sizeof(act), all_q + t * whole + row, row * sizeof(act));
        }
        gpu_upload(q, host, bytes);
        attention_forward_gpu(out, lse, q, kv, entries, sink + H, selected, some);
        gpu_download(got, out, bytes);
        for (int t = 0; t < a.T; t++) {
            memcpy(host + t * row * sizeof(act), all_out + t * whole + row, row * sizeof(act));
        }
        check(memcmp(host, got, bytes) == 0, "%d heads of 64: other bits", H);
        gpu_download(host, out + bytes / sizeof(act), 1024);
        for (int i = 0; i < 1024; i++) { got[0] = i ? got[0] | host[i] : host[i]; }
        check(got[0] == 0, "%d heads of 64: something behind the last one's output", H);
        gpu_free(q); gpu_free(out); gpu_free(lse);
        free(host); free(got);
    }
}

static void compare_bytes(const char *what, const uint8_t *p, size_t n) {
    const uint8_t *got = (const uint8_t *)(back + ((const char *)p - H));
    size_t wrong = 0;
    for (size_t i = 0; i < n; i++) { wrong += got[i] != p[i]; }
    check(wrong == 0, "%s: %zu of %zu bytes wrong", what, wrong, n);
}

// Codes (T,C) and scales of arithmetic that may round differently in its last place: the numbers
// they stand for agree, and all but one code in a thousand.
static void compare_codes(const char *what, const uint8_t *codes, const uint8_t *scales, size_t n) {
    const uint8_t *got = (const uint8_t *)(back + ((const char *)codes - H));
    const uint8_t *got_scales = (const uint8_t *)(back + ((const char *)scales - H));
    double diff = 0, all = 0;
    size_t unlike = 0;
    for (size_t i = 0; i < n; i++) {
        double a = (double)float_from_e4m3(got[i]) * (double)float_from_e8m0(got_scales[i / 128]);
        double b = (double)float_from_e4m3(codes[i]) * (double)float_from_e8m0(scales[i / 128]);
        diff += (a - b) * (a - b);
        all += b * b;
        unlike += got[i] != codes[i];
    }
    check(unlike <= n / 1000 + 1, "%s: %zu of %zu codes differ", what, unlike, n);
    check_relative(what, diff, all, 2e-3);
}

static uint8_t *blank_bytes(size_t n) { return memset(room(n), 0xFF, n); }

// Rows in fp8: everything but the SwiGLU is exact on both sides, byte by byte.
static void test_rows_fp8(int T, int C) {
    arena_used = 0;
    size_t n = (size_t)T * C, groups = (size_t)T * (C / 128);
    act *x = acts(n, 3), *wide = blank_act(n), *gv = acts(2 * n, 15), *dh = acts(n, 1);
    uint8_t *codes = blank_bytes(n), *scales = blank_bytes(groups), *h = blank_bytes(n);
    uint8_t *h_scales = blank_bytes(groups), *d = blank_bytes(2 * n);
    uint8_t *d_scales = blank_bytes(2 * groups);
    real *w = reals(T, 1), *dw = blank(T);
    for (int c = 0; c < C; c++) { st(x + c, 0); st(x + n - 1 - c, (real)(1e-8 * (c + 1))); }
    st(gv, 10); st(gv + C, -10);
    BOTH({ quantize_rows_fp8(X(codes), X(scales), X(x), FP8_FLOOR, T, C);
           widen_rows_fp8(X(wide), X(codes), X(scales), T, C);
           swiglu_quantize_forward(X(h), X(h_scales), X(gv), X(w), 10, FP8_FLOOR, T, C);
           swiglu_quantize_backward(X(d), X(d_scales), X(dw), X(dh), X(gv), X(w), 10, T, C); });
    compare_bytes("quantise rows", codes, n);
    compare_bytes("quantise rows, scales", scales, groups);
    compare_act("widen rows", wide, n, 0);
    compare_codes("swiglu in fp8, h", h, h_scales, n);
    compare_codes("swiglu in fp8, dg and dv", d, d_scales, 2 * n);
    compare_real("swiglu in fp8, dweight", dw, T, 1e-4);
}

// Recast and product, forward and turned. Integers few enough for the tensor cores' 14 bits: exact.
static void test_experts_fp8(int C, int O, int R) {
    arena_used = 0;
    const int offset[8] = { 0, 5, 5, 134, 198, 199, 600, 600 };
    enum { E = 7, ROWS = 600 };
    size_t n = (size_t)E * O * C;
    uint8_t *w = bytes_between(n / 2, 0, 255), *scale = bytes_between(n / 32, 120, 127);
    uint8_t *plain = bytes_between(n / 32, 127, 127), *codes = blank_bytes(4 * n);
    uint8_t *grid = blank_bytes(4 * n / 16384), *exact = blank_bytes(2 * n);
    uint8_t *exact_grid = blank_bytes(2 * n / 16384);
    uint8_t *x = room((size_t)ROWS * C), *dy = room((size_t)ROWS * O);
    uint8_t *x_scale = bytes_between((size_t)ROWS * C / 128, 124, 128);
    uint8_t *dy_scale = bytes_between((size_t)ROWS * O / 128, 124, 128);
    act *y = blank_act((size_t)ROWS * O), *dx = blank_act((size_t)ROWS * C);
    act *plain_y = blank_act((size_t)ROWS * O);
    real *u = room(sizeof(real) * ROWS * R), *a = room(sizeof(real) * E * R * C);
    real *b = room(sizeof(real) * E * O * R);
    int blocks[2][RECAST_SPREAD + 2] = {{0}};
    for (int i = 0; i < ROWS * R; i++) { u[i] = (real)(i * 7 % 5 - 2); }
    for (int i = 0; i < E * R * C; i++) { a[i] = (real)(i * 11 % 7 - 3); }
    for (int i = 0; i < E * O * R; i++) { b[i] = (real)(i * 13 % 7 - 3); }
    for (int i = 0; i < ROWS * C; i++) { x[i] = e4m3_from_float((float)(i * 7 % 11 % 3 - 1)); }
    for (int i = 0; i < ROWS * O; i++) { dy[i] = e4m3_from_float((float)(i * 5 % 11 % 3 - 1)); }
    for (size_t o = 0; o < (size_t)E * O; o++) {        // a scale for each block of 128 x 128
        for (int g = 0; g < C / 32; g++) {
            plain[o * (C / 32) + g] = (uint8_t)(126 + (o / 128 * 2 + g / 4) % 4);
        }
    }
    scale[5] = 115; scale[n / 32 - 1] = 90;             // a wide block, and one too wide
    BOTH({ recast_fp4(X(codes), X(grid), X(w), X(scale), 0, 0, 2 * O, NULL, E, C, O);
           recast_fp4(X(codes), X(grid), X(w), X(plain), 0, O, 2 * O, offset, E, C, O);
           recast_fp4(X(codes) + 2 * n, X(grid) + 2 * n / 16384, X(w), X(scale), 1, O, 2 * O, NULL,
                      E, C, O);
           recast_fp4(X(exact), X(exact_grid), X(w), X(plain), 0, 0, O, NULL, E, C, O);
           recast_fp4(X(exact) + n, X(exact_grid) + n / 16384, X(w), X(plain), 1, 0, O, NULL, E, C,
                      O);
           recast_spread(blocks[on_gpu], X(w), X(scale), E, C, O);
           experts_fp8_product(X(plain_y), X(x), X(x_scale), offset, X(exact), X(exact_grid), NULL,
                               NULL, 0, 1, E, C, O, 0);
           experts_fp8_product(X(y), X(x), X(x_scale), offset, X(exact), X(exact_grid), X(u), X(b),
                               0, 0.5f, E, C, O, R);
           experts_fp8_product(X(dx), X(dy), X(dy_scale), offset, X(exact) + n,
                               X(exact_grid) + n / 16384, X(u), X(a), 1, 1, E, O, C, R); });
    compare_bytes("recast", codes, 4 * n);
    compare_bytes("recast, scales", grid, 4 * n / 16384);
    for (int i = 0; i < RECAST_SPREAD + 2; i++) {
        check(blocks[1][i] == 2 * blocks[0][i], "recast spread %d: %d, want %d", i,
              blocks[1][i] / 2, blocks[0][i]);
    }
    check(blocks[0][RECAST_SPREAD + 1] == 1, "no block is too wide");
    compare_act("fp8 product", plain_y, (size_t)ROWS * O, 0);
    compare_act("fp8 product with an adapter", y, (size_t)ROWS * O, 0);
    compare_act("fp8 product, turned", dx, (size_t)ROWS * C, 0);
}

// The adapters' share alone, and those of w1 and w3 as one.
static void test_adapter_share(int C, int F, int R) {
    arena_used = 0;
    const int offset[8] = { 0, 5, 5, 134, 198, 199, 300, 300 };
    enum { E = 7, ROWS = 300 };
    const size_t n_a = (size_t)E * R * C, n_b = (size_t)E * F * R, n = 2 * n_a + 4 * n_b;
    act *x = acts((size_t)ROWS * C, 1), *dy = acts((size_t)ROWS * F, 1);
    real *a1 = reals(n_a, 1), *a3 = reals(n_a, 1), *b1 = reals(n_b, 1), *b3 = reals(n_b, 1);
    real *u = blank((size_t)ROWS * R), *du = blank((size_t)ROWS * R), *stack = blank(n);
    real *half = blank(n), *da = reals(n_a, 1), *db = reals(n_b, 1), *a = reals(n_a, 1);
    real *b = reals(n_b, 1), *added = reals(n, 1);
    BOTH({ lora_experts_down(X(u), X(x), offset, X(a1), E, C, R);
           lora_experts_gradients(X(du), X(da), X(db), X(dy), X(x), X(u), offset, X(b1), 0.5f, E, C,
                                  F, R);
           lora_stack(X(stack), X(a1), X(b1), X(a3), X(b3), 0, E, C, F, R);
           lora_stack(X(half), NULL, NULL, X(a3), X(b3), 0, E, C, F, R);
           lora_stack(X(added), X(a), X(b), NULL, NULL, 1, E, C, F, R); });
    compare_real("adapter's u", u, (size_t)ROWS * R, 1e-2);
    compare_real("adapter's du", du, (size_t)ROWS * R, 1e-2);
    compare_real("adapter's da", da, n_a, 1e-2);
    compare_real("adapter's db", db, n_b, 1e-2);
    compare_real("two adapters stacked", stack, n, 0);
    compare_real("one of two stacked", half, n, 0);
    compare_real("gradients from the stack, a", a, n_a, 1e-6);
    compare_real("gradients from the stack, b", b, n_b, 1e-6);
}

// Attention with its compressors and indexer over documents of those lengths.
static void test_attention(const int *length, int docs, int Hn, int Dn, int W, int ratio,
                           int topk) {
    arena_used = 0;
    int start[16] = {0}, T, dim = 128, heads = 4;
    for (int i = 0; i < docs; i++) { start[i + 1] = start[i] + length[i]; }
    T = start[docs];
    Documents d;
    documents_alloc(&d, T, 1);
    documents_set(&d, start, docs);
    Entries *e = &d.of[entries_of(ratio)];
    int P = ratio ? e->P : 0, n = ratio == 4 ? 2 : 1;
    int *position = ints(T), *end = ints(T), *first = ints(T), *token = ints(P),
        *entry_position = ints(P);
    memcpy(position, d.position, sizeof(int) * T);
    memcpy(end, d.end, sizeof(int) * T);
    memcpy(first, e->first_entry, sizeof(int) * T);
    memcpy(token, e->token, sizeof(int) * P);
    memcpy(entry_position, e->position, sizeof(int) * P);
    size_t N = (size_t)T * Hn * Dn;
    act *q = acts(N, 1), *kv = acts((size_t)T * Dn, 1), *out = blank_act(N), *dout = acts(N, 1);
    act *dq = blank_act(N), *entries = blank_act((size_t)P * Dn), *dpool = acts((size_t)P * Dn, 1);
    real *K = reals((size_t)T * n * Dn, 1), *Z = reals((size_t)T * n * Dn, 1),
         *ape = reals((size_t)(ratio + 1) * n * Dn, 1);
    real *lse = blank((size_t)T * Hn), *sink = reals(Hn, 1), *delta = blank((size_t)T * Hn);
    real *dkv = blank((size_t)T * Dn), *dentries = blank((size_t)P * Dn);
    real *dK = blank((size_t)T * n * Dn), *dZ = blank((size_t)T * n * Dn),
         *iw = reals((size_t)T * heads, 1);
    act *iq = acts((size_t)T * heads * dim, 1), *ik = acts((size_t)P * dim, 1);
    int *selected = topk ? ints((size_t)T * topk) : NULL;
    if (topk) { memset(selected, 0xFF, sizeof(int) * (size_t)T * topk); }
    #define SHAPE ((AttentionShape){ .T = T, .P = P, .H = Hn, .D = Dn, .W = W, \
        .ratio = ratio, .topk = topk, .position = X(position), .end = X(end), \
        .first_entry = X(first), .token = X(token) })
    BOTH({ if (ratio) {
               pool_forward(X(entries), X(K), X(Z), X(ape), SHAPE, X(entry_position), Dn);
               pool_backward(X(dK), X(dZ), X(dpool), X(K), X(Z), X(ape), SHAPE, X(entry_position),
                             Dn);
           }
           if (topk) { indexer_select(X(selected), X(iq), X(ik), X(iw), SHAPE, heads, dim); }
           attention_forward(X(out), X(lse), X(q), X(kv), X(entries), X(sink), X(selected), SHAPE);
           attention_delta(X(delta), X(dout), X(out), T, Hn, Dn);
           attention_backward_key(X(dkv), X(dentries), X(dout), X(delta), X(lse), X(q), X(kv),
                                  X(entries), X(selected), SHAPE);
           attention_backward_query(X(dq), X(dout), X(delta), X(lse), X(q), X(kv), X(entries),
                                    X(selected), SHAPE); });
    if (Hn == 64 && Dn == 512) {
        on_gpu = 1;
        test_some_heads(q, (const act *)(back + ((char *)out - H)), X(kv), X(entries), X(sink),
                        X(selected), SHAPE);
        on_gpu = 0;
    }
    printf(" attention: %d tokens, %d documents, %d heads of %d, ratio %d, topk %d\n", T, docs, Hn,
           Dn, ratio, topk);
    if (ratio) {
        compare_act("entries", entries, (size_t)P * Dn, BF16);
        compare_real("pool dK", dK, (size_t)T * n * Dn, 1e-4);
        compare_real("pool dZ", dZ, (size_t)T * n * Dn, 1e-4);
        compare_real("dentries", dentries, (size_t)P * Dn, 1e-2);
    }
    if (topk) { compare_int("selected", selected, (size_t)T * topk); }
    compare_act("attention out", out, N, 1e-2);
    compare_real("attention lse", lse, (size_t)T * Hn, 1e-3);
    compare_real("attention delta", delta, (size_t)T * Hn, 1e-2);
    compare_act("attention dq", dq, N, 1e-2);
    compare_real("attention dkv", dkv, (size_t)T * Dn, 1e-2);
    documents_free_host(&d);
}

static void test_groups_and_head(int T) {
    enum { G = 2, N = 256, O = 128, C = 128, V = 264 };
    arena_used = 0;
    act *o = acts((size_t)T * G * N, 1), *v = blank_act((size_t)T * G * O),
        *do_ = blank_act((size_t)T * G * N);
    real *dv = reals((size_t)T * G * O, 1), *loss = blank(T), *dinp = blank((size_t)T * C);
    uint8_t *w = fp8_matrix((size_t)G * O * N),
            *scale = bytes_between(G * O / 128 * N / 128, 119, 123);
    act *inp = acts((size_t)T * C, 1);
    bf16 *head = (bf16 *)acts((size_t)V * C, 0.3);
    int *target = ints(T);
    for (int t = 0; t < T; t++) { target[t] = t % 3 == 1 ? -1 : t * 17 % V; }
    real *p = reals(5000, 1), *m = reals(5000, 0.1), *s = reals(5000, 0), *g = reals(5000, 1);
    bf16 *spoilt = (bf16 *)acts((size_t)V * C, 0.3);
    real *lost = blank(T);
    for (int i = 4 * C; i < 8 * C; i++) { spoilt[i] = (bf16){ 0x7FC0 }; }  // one thread's logits
    double sum_h = 0, sum_d = 0;
    BOTH({ group_output_forward(X(v), X(o), X(w), X(scale), T, G, N, O);
           group_output_backward(X(do_), X(dv), X(w), X(scale), T, G, N, O);
           head_loss(X(loss), X(dinp), X(inp), X(head), X(target), T, C, V);
           head_loss(X(lost), NULL, X(inp), X(spoilt), X(target), T, C, V);
           adamw_update(X(p), X(m), X(s), X(g), 5000, 0.7, 1e-2, 0.9, 0.95, 1e-8, 0.1, 3);
           *(on_gpu ? &sum_d : &sum_h) = sum_squares(X(g), 5000);
           scale_reals(X(dinp), 0.25, (size_t)T * C); });
    compare_act("group output", v, (size_t)T * G * O, BF16);
    compare_act("group output do", do_, (size_t)T * G * N, BF16);
    compare_real("head loss", loss, T, FP32);
    compare_real("head dinp", dinp, (size_t)T * C, BF16);
    const real *lost_d = (const real *)(back + ((const char *)lost - H));
    for (int t = 0; t < T; t++) {
        check(target[t] < 0 || (isnan(lost[t]) && isnan(lost_d[t])), "loss %g, %g of NaN logits",
              (double)lost[t], (double)lost_d[t]);
    }
    compare_real("adamw p", p, 5000, 1e-6);
    compare_real("adamw m", m, 5000, 1e-6);
    compare_real("adamw v", s, 5000, 1e-6);
    check_close("sum of squares, relative", 0, sum_d / sum_h, 1, 1e-12);
}

// Muon on slices of all sizes: of one block, of a cluster, too large or too crooked for shared
// memory, of every padded rank; nearly of rank one, as an adapter's gradients are; zero, and not
// finite, which must keep their bits. Slices one by one, backwards, give the bits of one call.
static void test_muon(int restarts) {
    static const size_t shapes[][2] = {
        {8, 4096}, {4096, 8}, {32768, 8}, {8, 8192}, {2048, 8}, {16, 4096}, {4096, 16}, {64, 2048},
        {32, 32768}, {24, 1024}, {3, 1000}, {8, 510}, {33, 129}, {5, 5}, {1, 64}, {8, 2048},
        {8, 2048}};
    enum { N = sizeof shapes / sizeof *shapes };
    size_t slices[3 * N], size = 0;
    arena_used = 0;
    for (int k = 0; k < N; k++) {
        size_t slice[3] = { size, shapes[k][0], shapes[k][1] };
        memcpy(slices + 3 * k, slice, sizeof slice);
        size += (slice[1] * slice[2] + 7) / 4 * 4;
    }
    real *p = reals(size, 0.1), *m = reals(size, 0.01), *g = reals(size, 0.1),
         *u = reals(1 << 16, 1);
    for (int k = 1; k < N; k += 2) {            // every second one nearly of rank one
        size_t at = slices[3 * k], cols = slices[3 * k + 2], n = slices[3 * k + 1] * cols;
        for (size_t i = 0; i < n; i++) {
            m[at + i] *= (real)1e-3;
            g[at + i] = (real)1e-3 * g[at + i] + u[i / cols] * u[40000 + i % cols % 20000];
        }
    }
    size_t zero_at = slices[3 * (N - 2)], bad_at = slices[3 * (N - 1)], n = 8 * 2048;
    memset(g + zero_at, 0, n * sizeof *g);
    g[bad_at + n - 1] = NAN;
    char *start = malloc(arena_used), *one = malloc(arena_used);
    memcpy(start, H, arena_used);
    BOTH(muon_update(X(p), X(m), X(g), slices, N, 0.7, 0.5, 0.95, 0.1, restarts));
    for (int k = 0; k < N; k++) {
        size_t at = slices[3 * k], count = slices[3 * k + 1] * slices[3 * k + 2];
        char what[64];
        snprintf(what, sizeof what, "muon p %zu x %zu", shapes[k][0], shapes[k][1]);
        compare_real(what, p + at, count, k % 2 ? 5e-4 : 2e-5);
        compare_real("muon m", m + at, count, 1e-6);
    }
    real *p_gpu = (real *)(back + ((char *)p - H)), *m_gpu = (real *)(back + ((char *)m - H));
    real *p0 = (real *)(start + ((char *)p - H)), *m0 = (real *)(start + ((char *)m - H));
    check(memcmp(p_gpu + zero_at, p0 + zero_at, n * sizeof *p) == 0 &&
          memcmp(m_gpu + zero_at, m0 + zero_at, n * sizeof *p) == 0, "a zero gradient moves");
    check(memcmp(p_gpu + bad_at, p0 + bad_at, n * sizeof *p) == 0 &&
          memcmp(m_gpu + bad_at, m0 + bad_at, n * sizeof *p) == 0, "a NaN moves");
    gpu_upload(D, start, arena_used);
    on_gpu = 1;
    for (int k = N - 1; k >= 0; k--) {
        muon_update(X(p), X(m), X(g), slices + 3 * k, 1, 0.7, 0.5, 0.95, 0.1, restarts);
    }
    gpu_download(one, D, arena_used);
    on_gpu = 0;
    check(memcmp(one, back, arena_used) == 0, "muon: one slice at a time, other bits");
    free(start);
    free(one);
}

// The time of a step of all adapters of the full model at r 8, of one rank of 8, against AdamW's.
static void time_muon(void) {
    enum { LAYERS = 43, EXPERTS = 32, R = 8, TIMES = 8 };
    static const size_t dense[][2] = { {4096, 1024}, {1024, 32768}, {4096, 512}, {8192, 4096},
                                       {4096, 2048}, {2048, 4096}, {4096, 2048} };
    Adapters s = { .muon = NS_GRAM };
    size_t at = 0, most = LAYERS * (14 + 6 * EXPERTS);
    s.tensors = NEW(AdapterTensor, most);
    #define ADD(rows_, cols_) (s.tensors[s.n++] = (AdapterTensor){ .rows = (int)(rows_), \
        .cols = (int)(cols_), .at = at }, at += (size_t)(rows_) * (cols_))
    for (int l = 0; l < LAYERS; l++) {
        for (int k = 0; k < 7; k++) { ADD(R, dense[k][0]); ADD(dense[k][1], R); }
        for (int k = 0; k < 3; k++) {
            size_t in = k == 1 ? 2048 : 4096, out = 6144 - in;
            for (int e = 0; e < EXPERTS; e++) { ADD(R, in); }
            for (int e = 0; e < EXPERTS; e++) { ADD(out, R); }
        }
    }
    #undef ADD
    adapters_slices(&s);
    s.n_expert = at;
    real **const arrays[4] = { &s.p, &s.m, &s.v, &s.g };
    for (int k = 0; k < 4; k++) { gpu_alloc((void **)arrays[k], at * sizeof(real)); }
    double ms[2];
    on_gpu = 1;
    draw_elements_gpu(s.g, DT_F32, 1, 0, 1e-5, at);
    for (int way = 0; way < 2; way++) {
        double began = 0;
        s.muon = way ? NS_GRAM : 0;
        for (int i = -2; i < TIMES; i++) {
            if (i == 0) { gpu_sync(); began = clock_seconds(); }
            adapters_update(&s, 1, 1e-6, 0.95, 0.95, 1e-8, 0, 3);
        }
        gpu_sync();
        ms[way] = 1e3 * (clock_seconds() - began) / TIMES;
    }
    on_gpu = 0;
    printf(" %d slices, %.1f M elements: AdamW %.3f ms, Muon %.3f ms, %.2f times\n", s.n, at * 1e-6,
           ms[0], ms[1], ms[1] / ms[0]);
    check(ms[1] < 2 * ms[0], "Muon takes %.3f ms, AdamW %.3f", ms[1], ms[0]);
    for (int k = 0; k < 4; k++) { gpu_free(*arrays[k]); }
    free(s.tensors);
    free(s.slices_h);
}

// -------------------------------------------------------------------------------------------------
// The model

// Loss and gradients of one micro-batch into out (n + 1), with the arenas on the host or the card.
static size_t run_model(double *out, const Config *c, const int *length, int docs, int device,
                        int recompute) {
    Model m;
    int T = 0;
    for (int i = 0; i < docs; i++) { T += length[i]; }
    on_gpu = device;
    // build() fills adapters through the host, so it cannot be used here.
    ModelOptions o = { .R = 8, .alpha = 16, .targets = targets_parse("attn,shared,experts"),
                       .max_tokens = T, .recompute = recompute, .training = 1, .seed = 4 };
    memset(&m, 0, sizeof m);
    mem_count();
    model_alloc(&m, c, &o);
    mem_open();
    model_alloc(&m, c, &o);
    model_load(&m, NULL);
    size_t n = adapter_elements(&m);
    real *p = NEW(real, n);
    for (size_t i = 0; i < n; i++) { p[i] = (real)(0.03 * random_normal(99, i) / RANDOM_STD); }
    upload(m.adapters.p, p, sizeof(real) * n);
    Batch b = make_batch(length, docs, c->V);
    out[0] = model_forward(&m, &b, 1);
    model_backward(&m, &b, 1.0 / T);
    download(p, m.adapters.g, sizeof(real) * n);
    for (size_t i = 0; i < n; i++) { out[i + 1] = (double)p[i]; }
    free(p);
    free_batch(&b);
    destroy(&m);
    on_gpu = 0;
    return n + 1;
}

// bf16 rounds every activation, so two orders of summation part ways by about 2^-9 per layer, and a
// choice of experts or entries that was nearly a tie may then fall the other way. So gradients are
// compared where everything is chosen; where there is a choice, the loss alone. Gradients in bf16
// are 4.2e-2 from those in fp32 here (the C text against itself, ACT=float); two that round
// differently are then about 1.4 times that apart.
static void test_model(const char *what, const Config *c, const int *length, int docs) {
    int chooses = c->K < c->E || c->index_topk < 100;
    size_t room_for = 1 << 25;
    double *cpu = NEW(double, room_for), *gpu = NEW(double, room_for);
    size_t n = run_model(cpu, c, length, docs, 0, RECOMPUTE_FULL);
    require(n <= room_for);
    run_model(gpu, c, length, docs, 1, RECOMPUTE_FULL);
    printf(" %s: loss %.6f on the CPU, %.6f on the GPU\n", what, cpu[0], gpu[0]);
    check_close("loss, relative", 0, gpu[0] / cpu[0], 1, chooses ? 1e-2 : 1e-3);
    if (!chooses) { check_tensor(what, gpu + 1, cpu + 1, n - 1, 6e-2); }
    double *again = NEW(double, room_for);
    for (int recompute = RECOMPUTE_NONE; recompute < RECOMPUTE_FULL; recompute++) {
        run_model(again, c, length, docs, 1, recompute);
        check(memcmp(again, gpu, sizeof(double) * n) == 0, "%s: recompute %d, other bits", what,
              recompute);
    }
    free(cpu); free(gpu); free(again);
}

// The trip of the rows: whole numbers, so all must be equal. A round in the middle of the queue
// leaves rows out at both ends; expert 1 has none.
static void test_trip(int slots, int E, int C) {
    arena_used = 0;
    int *ids = ints((size_t)slots + 1), *index = ints((size_t)slots + 1), *counts = ints((size_t)E);
    int *row_slot = ints((size_t)slots + 1), *slot_row = ints((size_t)slots + 1), sent = 0, n = 0;
    Runs sort = { .n = E }, runs = { .n = E };
    for (int i = 0; i < slots; i++) {
        ids[i] = (int)((uniform() + 1) / 2 * E) % E;
        if (ids[i] == 1) { ids[i] = 0; }
    }
    BOTH(trip_count(X(counts), X(index), X(ids), slots, E));
    compare_int("trip counts", counts, (size_t)E);
    compare_int("trip index", index, (size_t)slots);
    for (int e = 0; e < E; e++) {
        sort.from[e] = counts[e] / 4;
        sort.to[e] = sent;
        sent += sort.count[e] = (counts[e] + 1) / 2;
    }
    for (int e = E - 1; e >= 0; e--) {                  // the last expert's rows first
        runs.from[e] = sort.to[e];
        runs.to[e] = n;
        n += runs.count[e] = sort.count[e];
    }
    act *rows = acts((size_t)(sent + 1) * C, 1), *there = blank_act((size_t)(sent + 1) * C);
    act *back_again = blank_act((size_t)(sent + 1) * C);
    real *w = reals((size_t)sent + 1, 1), *w_there = blank((size_t)sent + 1);
    real *w_back = blank((size_t)sent + 1);
    BOTH({ trip_sort(X(row_slot), X(slot_row), X(ids), X(index), sort, slots);
           regroup_rows(X(there), X(rows), runs, BY_EXPERT, C * sizeof(act));
           regroup_rows(X(back_again), X(there), runs, BY_SOURCE, C * sizeof(act));
           regroup_rows(X(w_there), X(w), runs, BY_EXPERT, sizeof(real));
           regroup_rows(X(w_back), X(w_there), runs, BY_SOURCE, sizeof(real)); });
    compare_int("trip row_slot", row_slot, (size_t)slots);
    compare_int("trip slot_row", slot_row, (size_t)slots);
    compare_act("regroup by expert", there, (size_t)sent * C, 1e-30);
    compare_act("regroup by source", back_again, (size_t)sent * C, 1e-30);
    compare_real("regroup numbers by expert", w_there, (size_t)sent, 1e-30);
    compare_real("regroup numbers by source", w_back, (size_t)sent, 1e-30);
    check(memcmp(back_again, rows, (size_t)sent * C * sizeof(act)) == 0, "regroup: there and back");
}

// Boxes of all kinds of alignment, cut from matrices and packed, and from matrix to matrix; more
// than fit in a launch, with empty ones between. What no box covers must stay as it was.
static void test_boxes(int boxes) {
    enum { PLANES = 3, ROWS = 40, BYTES = 288, WHOLE = PLANES * ROWS * BYTES };
    static BoxCopy host[1000], list[1000];
    arena_used = 0;
    uint8_t *from = bytes_between(WHOLE, 0, 255);
    uint8_t *to[1000];
    for (int i = 0; i < boxes; i++) {
        const size_t unit = i % 3 == 0 ? 16 : i % 3 == 1 ? 4 : 1, odd = i % 7 ? 0 : unit;
        const size_t bytes = i % 11 == 5 ? 0 : unit * (1 + (size_t)(i * 37) % (BYTES / unit / 2));
        const size_t n[3] = { 1 + (size_t)i % PLANES, 1 + (size_t)(i * 13) % (ROWS / 2), bytes };
        const size_t step = i % 2 ? bytes : BYTES;      // packed, or again in a matrix
        to[i] = memset(room(n[0] * n[1] * step + 32), 0xA5, n[0] * n[1] * step + 32);
        host[i] = (BoxCopy){ to[i] + odd,
                             from + (size_t)(i * 5 % 20) * BYTES + unit * (size_t)(i % 4),
                             { n[1] * step, step }, { ROWS * BYTES, BYTES }, { n[0], n[1], n[2] } };
    }
    BOTH({ for (int i = 0; i < boxes; i++) {
               list[i] = host[i];
               list[i].to = X(host[i].to);
               list[i].from = X(host[i].from);
           }
           copy_boxes(list, boxes); });
    check(memcmp(back, H, arena_used) == 0, "%d boxes: other bytes", boxes);
}

int main(void) {
    int gpus = 0, there;
    char name[128];
    gpu_count(&gpus, &there);
    if (gpus == 0) {
        skip("no GPU on this machine");
        return finish("test_kernels");
    }
    gpu_start(0, name, sizeof name);
    on_gpu = 0;
    void *work_space;
    H = malloc(ARENA);
    back = malloc(ARENA);
    gpu_alloc((void **)&D, ARENA);
    gpu_alloc(&work_space, (size_t)1 << 30);       // run_model brings its own
    gpu_workspace(work_space, (size_t)1 << 30);
    printf("on %s\n", name);
    test_norms(37, 4096); test_norms(1, 128); test_norms(3, 1024);
    test_heads(37, 64, 512); test_heads(5, 4, 128);
    test_streams(37, 4096); test_streams(300, 192); test_streams(5, 128); test_streams(1, 256);
    test_linears(37, 256, 384, 8); test_linears(130, 1024, 128, 3); test_linears(1, 128, 128, 16);
    test_experts(256, 128, 8); test_experts(128, 256, 3); test_experts(320, 576, 8);
    test_routing(37, 256, 256, 6, (Routing){ 0 }, 1); test_routing(5, 128, 8, 2, (Routing){ 0 }, 1);
    test_routing(37, 256, 256, 8, (Routing){ SCORE_SIGMOID, 0, 8, 4 }, 1);
    test_routing(37, 128, 64, 6, (Routing){ SCORE_SOFTMAX, 1, 8, 3 }, 0);
    test_routing(37, 128, 66, 3, (Routing){ SCORE_SOFTMAX, 0, 3, 2 }, 1);
    test_routing(5, 128, 8, 2, (Routing){ SCORE_SIGMOID, 1, 1, 1 }, 0);
    test_trip(0, 8, 128); test_trip(1, 2, 128); test_trip(700, 256, 4096);
    test_trip(24576, 256, 64);
    test_routing_nan(256, 6, (Routing){ 0, 0, 0, 0 });
    test_swiglu(37, 2048); test_swiglu(3, 128);
    test_boxes(0); test_boxes(1); test_boxes(700);
    test_rows_fp8(37, 2048); test_rows_fp8(256, 128); test_rows_fp8(200, 384);
    test_experts_fp8(256, 128, 8); test_experts_fp8(384, 512, 3); test_experts_fp8(128, 128, 72);
    test_adapter_share(256, 128, 8); test_adapter_share(128, 384, 16);
    test_adapter_share(128, 128, 3);
    const int odd[] = {1, 130, 4, 300, 3}, longer[] = {2300, 1}, one[] = {1};
    test_attention(odd, 5, 4, 128, 32, 0, 0);
    test_attention(odd, 5, 4, 128, 32, 4, 0);
    test_attention(odd, 5, 4, 128, 32, 4, 16);
    test_attention(odd, 5, 4, 128, 32, 128, 0);
    test_attention(odd, 5, 64, 512, 128, 0, 0);
    test_attention(odd, 5, 64, 512, 128, 4, 0);
    test_attention(odd, 5, 64, 512, 128, 128, 0);
    test_attention(longer, 2, 4, 512, 128, 4, 512);
    test_attention(one, 1, 64, 512, 128, 4, 0);
    test_attention(odd, 5, 32, 512, 128, 4, 0);
    test_attention(longer, 2, 8, 512, 128, 4, 512);
    test_attention(longer, 2, 64, 512, 128, 4, 512);
    test_groups_and_head(37); test_groups_and_head(600);
    test_muon(NS_GRAM); test_muon(NS_STANDARD);
    time_muon();
    free(H); free(back);
    gpu_free(D);
    gpu_free(work_space);

    const int docs[] = {70, 1, 150, 33};
    Config c = t2_config(8);
    c.index_topk = 128;
    test_model("T2, all experts and entries", &c, docs, 4);
    c = t2_config(2);
    test_model("T2, top 2", &c, docs, 4);
    c = t2_config(6);
    test_model("T2, top 6", &c, docs, 4);
    return finish("test_kernels");
}
#endif // USE_CUDA
