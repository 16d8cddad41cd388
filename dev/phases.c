// phases.c: where the time of a step goes. phase(p) says what the program does from here on, until
// the next call; on a GPU it leaves an event between the kernels, so that nothing waits. A
// collective has two events more, on the stream it runs on: what of its time lies in the phases
// `exchange` and `update`, where nothing is computed beside it, is not hidden. Off unless --bench.
#ifndef PHASES_C
#define PHASES_C
#include "../kernels.cu"        // defines: GPU, ON_GPU, clock_seconds

enum { PHASE_STREAMS, PHASE_PRODUCTS, PHASE_ENTRIES, PHASE_INDEXER, PHASE_ATTENTION, PHASE_ROUTE,
       PHASE_CASTS, PHASE_EXCHANGE, PHASE_EXPERTS, PHASE_SHARED, PHASE_HEAD, PHASE_UPDATE, PHASES };
enum { PASS_FORWARD, PASS_AGAIN, PASS_BACKWARD, PASSES };

static inline const char *phase_name(int p) {
    static const char *const names[PHASES] = {
        "streams", "projections", "compressors", "indexer", "attention core", "routing",
        "fp8 casts", "exchange", "experts", "shared expert", "head and loss", "update" };
    return names[p];
}

enum { PHASE_MARKS = 4096, SENDS = 1024, SEND_MARKS = PHASE_MARKS + 1, COLLECTIVES = 8 };

// All collectives of one name. bytes: what this rank sends to others; seconds: with the wait for
// the last rank to come, and the copy of what stays here; waited: those that were not hidden.
typedef struct { const char *name; double calls, bytes, seconds, waited; } Collective;
typedef struct {                            // of a step
    double seconds[PHASES][PASSES];
    Collective collective[COLLECTIVES];
    long casts;                             // activations to fp8, explicitly: moe.c, payload
} PhaseSums;

static struct {
    int on, pass, n, sends;                 // pass: PASS_* of the calls that follow; n: calls
    int what[PHASE_MARKS];                  // phase and pass that began with each call
    struct { int which, during; } send[SENDS];      // which collective, begun during which call
    size_t sent;                            // bytes of the present one, so far
    double at[SEND_MARKS + 2 * SENDS];      // when: calls, then beginnings and ends of collectives
    PhaseSums sum;
} phases;

static inline void phase_mark(int i) {
    GPU(gpu_mark(i))
    phases.at[i] = clock_seconds();
}

// A collective begins here, or ends; phases.sent grows between the two.
static inline void phase_collective(int begins, const char *name) {
    Collective *all = phases.sum.collective;
    if (!phases.on) { return; }
    require(phases.n > 0 && phases.sends < SENDS);
    phase_mark(SEND_MARKS + 2 * phases.sends + !begins);
    if (begins) {
        int k = 0;
        while (k < COLLECTIVES && all[k].name && strcmp(all[k].name, name) != 0) { k++; }
        require(k < COLLECTIVES);
        all[k].name = name;
        phases.send[phases.sends].which = k;
        phases.send[phases.sends].during = phases.n - 1;
        phases.sent = 0;
        return;
    }
    all[phases.send[phases.sends].which].calls++;
    all[phases.send[phases.sends++].which].bytes += (double)phases.sent;
}

// Adds up a collective's time, and what of it the phases that wait for it have in common with it.
static inline void phases_add_send(int j) {
    const double *at = phases.at, from = at[SEND_MARKS + 2 * j], to = at[SEND_MARKS + 2 * j + 1];
    Collective *c = &phases.sum.collective[phases.send[j].which];
    c->seconds += to - from;
    for (int i = phases.send[j].during; i < phases.n && at[i] < to; i++) {
        const int p = phases.what[i] / PASSES;
        const double begin = fmax(from, at[i]), end = fmin(to, at[i + 1]);
        if ((p == PHASE_EXCHANGE || p == PHASE_UPDATE) && begin < end) { c->waited += end - begin; }
    }
}

// Ends the last phase and adds up all of them. Where that is not at the end of a step, what is left
// of a collective that is under way counts as hidden.
static inline void phases_end(void) {
    const int n = phases.n;
    if (n == 0) { return; }
    phase_mark(n);
    if (ON_GPU) {
#ifdef USE_CUDA
        gpu_marks(phases.at, 0, n + 1);
        gpu_marks(phases.at, SEND_MARKS, 2 * phases.sends);
#endif
    }
    for (int i = 0; i < n; i++) {
        phases.sum.seconds[phases.what[i] / PASSES][phases.what[i] % PASSES] +=
            phases.at[i + 1] - phases.at[i];
    }
    for (int j = 0; j < phases.sends; j++) { phases_add_send(j); }
    phases.n = phases.sends = 0;
}

static inline void phase(int p) {
    if (!phases.on) { return; }
    if (phases.n == PHASE_MARKS || phases.sends > SENDS - 8) { phases_end(); }
    phases.what[phases.n] = p * PASSES + phases.pass;
    phase_mark(phases.n++);
}
static inline void phase_in(int p, int pass) {
    phases.pass = pass;
    phase(p);
}
#endif // PHASES_C
