// phases.c: where the time of a step goes. phase(p) says what the program does from here on, until
// the next call; on a GPU it leaves an event between the kernels, so that nothing waits. Off unless
// --bench.
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

enum { PHASE_MARKS = 4096 };
static struct {
    int on, pass, n;                        // pass: PASS_* of the calls that follow; n: calls
    int what[PHASE_MARKS];                  // phase and pass that began with each call
    double at[PHASE_MARKS + 1];             // when
    double seconds[PHASES][PASSES];
} phases;

static inline void phase_mark(int i) {
    GPU(gpu_mark(i))
    phases.at[i] = clock_seconds();
}

// Ends the last phase and adds up all of them.
static inline void phases_end(void) {
    const int n = phases.n;
    if (n == 0) { return; }
    phase_mark(n);
    if (ON_GPU) {
#ifdef USE_CUDA
        gpu_marks(phases.at, n + 1);
#endif
    }
    for (int i = 0; i < n; i++) {
        phases.seconds[phases.what[i] / PASSES][phases.what[i] % PASSES] +=
            phases.at[i + 1] - phases.at[i];
    }
    phases.n = 0;
}

static inline void phase(int p) {
    if (!phases.on) { return; }
    if (phases.n == PHASE_MARKS) { phases_end(); }
    phases.what[phases.n] = p * PASSES + phases.pass;
    phase_mark(phases.n++);
}
static inline void phase_in(int p, int pass) {
    phases.pass = pass;
    phase(p);
}
#endif // PHASES_C
