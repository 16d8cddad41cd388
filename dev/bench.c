// bench.c: --bench, where the time of a step goes. Steps are run as in training, with a clock that
// is read where phases begin (phases.c), and the median one is shown: a table of phases by forward,
// again (what the backward computes a second time) and backward.
#ifndef TRAIN_C
#include "../train.c"       // compiled alone, this is train.c, which includes it where it is used
#elif !defined(BENCH_C)
#define BENCH_C

// One of --bench's steps: its seconds, and how many of them each phase took.
typedef struct { double seconds, phase[PHASES][PASSES]; } TimedStep;
static int by_seconds(const void *a, const void *b) {
    double x = ((const TimedStep *)a)->seconds, y = ((const TimedStep *)b)->seconds;
    return (x > y) - (x < y);
}

// Forward, recomputed, backward, their sum and its share of the step, in a line.
static inline void phase_say(const char *name, const double *seconds, double step) {
    double sum = 0;
    say("bench  %-15s", name);
    for (int k = 0; k < PASSES; k++) { sum += seconds[k]; say(" %9.2f", 1e3 * seconds[k]); }
    say(" %9.2f ms %6.1f %%\n", 1e3 * sum, 100 * sum / step);
}

// --bench: a first step that does not count, then N. The phases are those of the median step, and
// add up to it: `host` is what it did before its first kernel and after the last.
static inline void bench(Trainer *r) {
    Report report;
    int n = 0;
    TimedStep *timed = host_alloc(sizeof *timed * (size_t)opt.bench);
    while (r->step < r->steps) {
        memset(phases.seconds, 0, sizeof phases.seconds);
        phases.on = r->step > 0;
        train_step(r, &report);
        log_step(r, &report);
        if (!phases.on) { continue; }
        timed[n].seconds = report.seconds;
        memcpy(timed[n++].phase, phases.seconds, sizeof phases.seconds);
    }
    qsort(timed, (size_t)n, sizeof *timed, by_seconds);
    const TimedStep *median = &timed[(n - 1) / 2];
    double sum[PASSES] = { 0 }, rest[PASSES] = { median->seconds };
    say("bench  %-15s %9s %9s %9s %9s\n", "phase", "forward", "again", "backward", "sum");
    for (int p = 0; p < PHASES; p++) {
        phase_say(phase_name(p), median->phase[p], median->seconds);
        for (int k = 0; k < PASSES; k++) {
            sum[k] += median->phase[p][k];
            rest[0] -= median->phase[p][k];
        }
    }
    phase_say("host", rest, median->seconds);
    sum[0] += rest[0];
    phase_say("step", sum, median->seconds);
    const MoeScratch *x = &r->model.moe_scratch;
    say("bench  rows of the fullest rank of a layer / mean %.3f\n", x->fullest / x->mean);
    say("done   %d steps without the first | median %.2f ms | %.0f tok/s | mem %s\n", n,
        1e3 * median->seconds, (double)report.tokens / median->seconds,
        bytes_text(memory_used()));
    free(timed);
}
#endif
