// bench.c: --bench, where the time of a step goes. Steps are run as in training, with a clock that
// is read where phases begin (phases.c), and the median one is shown: a table of phases by forward,
// again (what the backward computes a second time) and backward; and the collectives of rank 0.
#ifndef TRAIN_C
#include "../train.c"       // compiled alone, this is train.c, which includes it where it is used
#elif !defined(BENCH_C)
#define BENCH_C

// One of --bench's steps: its seconds, where they went, and casts per MoE layer and micro-batch.
typedef struct { double seconds, casts; PhaseSums sum; } TimedStep;
static int by_seconds(const void *a, const void *b) {
    double x = ((const TimedStep *)a)->seconds, y = ((const TimedStep *)b)->seconds;
    return (x > y) - (x < y);
}

// Forward, recomputed, backward, their sum and its share of the step, in a line; casts: 0: no word.
static inline void phase_say(const char *name, const double *seconds, double step, double casts) {
    double sum = 0;
    say("bench  %-15s", name);
    for (int k = 0; k < PASSES; k++) { sum += seconds[k]; say(" %9.2f", 1e3 * seconds[k]); }
    say(" %9.2f ms %6.1f %%", 1e3 * sum, 100 * sum / step);
    say(casts > 0 ? " | %.1f per layer and micro-batch\n" : "\n", casts);
}

// Each kind of collective, in a line. hidden: the share of its time that no phase waited for.
static inline void collectives_say(const Collective *c) {
    for (int k = 0; k < COLLECTIVES; k++, c++) {
        if (c->bytes == 0) { continue; }
        say("bench  %-16s %4.0f calls %10.3f MB %9.2f ms %7.2f GB/s %6.1f %% hidden\n", c->name,
            c->calls, 1e-6 * c->bytes, 1e3 * c->seconds, 1e-9 * c->bytes / c->seconds,
            100 * (1 - c->waited / c->seconds));
    }
}

// --bench: a first step that does not count, then N. The phases are those of the median step, and
// add up to it: `host` is what it did before its first kernel and after the last.
static inline void bench(Trainer *r) {
    Report report;
    int n = 0;
    TimedStep *timed = host_alloc(sizeof *timed * (size_t)opt.bench);
    while (r->step < r->steps) {
        memset(&phases.sum, 0, sizeof phases.sum);
        phases.on = r->step > 0;
        train_step(r, &report);
        log_step(r, &report);
        if (!phases.on) { continue; }
        double calls = micro_batches(r->rows.rows, opt.batch, comm_ranks()) * r->config.layers;
        timed[n++] = (TimedStep){ report.seconds, (double)phases.sum.casts / calls, phases.sum };
    }
    qsort(timed, (size_t)n, sizeof *timed, by_seconds);
    const TimedStep *median = &timed[(n - 1) / 2];
    double sum[PASSES] = { 0 }, rest[PASSES] = { median->seconds };
    say("bench  %-15s %9s %9s %9s %9s\n", "phase", "forward", "again", "backward", "sum");
    for (int p = 0; p < PHASES; p++) {
        phase_say(phase_name(p), median->sum.seconds[p], median->seconds,
                  p == PHASE_CASTS ? median->casts : 0);
        for (int k = 0; k < PASSES; k++) {
            sum[k] += median->sum.seconds[p][k];
            rest[0] -= median->sum.seconds[p][k];
        }
    }
    phase_say("host", rest, median->seconds, 0);
    sum[0] += rest[0];
    phase_say("step", sum, median->seconds, 0);
    collectives_say(median->sum.collective);
    const MoeScratch *x = &r->model.moe_scratch;
    say("bench  rows of the fullest rank of a layer / mean %.3f\n", x->fullest / x->mean);
    say("done   %d steps without the first | median %.2f ms | %.0f tok/s | mem %s\n", n,
        1e3 * median->seconds, (double)report.tokens / median->seconds,
        bytes_text(memory_used()));
    free(timed);
}
#endif
