// check.h: what every test program shares. A test counts checks, prints one line per failure and
// per compared tensor, and ends with `return finish("name");`: exit code 1 if anything failed.
//
// Tolerances stand at the call, beside the tensor they belong to. A tensor's line says how much of
// its tolerance was used, so that a tolerance that is far too wide shows.
#ifndef CHECK_H
#define CHECK_H
#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/types.h>
#include <sys/wait.h>
#include <unistd.h>

static int checks_passed, checks_failed, checks_skipped;

// Counts one check; prints the message only if it failed.
__attribute__((format(printf, 2, 3)))
static inline int check(int ok, const char *format, ...) {
    if (ok) { checks_passed++; return 1; }
    va_list args;
    va_start(args, format);
    printf("FAIL ");
    vprintf(format, args);
    printf("\n");
    va_end(args);
    checks_failed++;
    return 0;
}

// |got - want| <= tol; a NaN does not pass.
static inline int check_close(const char *what, long i, double got, double want, double tol) {
    return check(fabs(got - want) <= tol, "%s[%ld]: got %.9g, want %.9g within %g",
                 what, i, got, want, tol);
}

// Counts one thing that could not be tested here, and says why.
__attribute__((format(printf, 1, 2)))
static inline void skip(const char *format, ...) {
    va_list args;
    va_start(args, format);
    printf("skip ");
    vprintf(format, args);
    printf("\n");
    va_end(args);
    checks_skipped++;
}

// Relative Frobenius distance |got - want| / |want| of two tensors, any mix of float and double
// given as accessors: use check_tensor below.
static inline int check_relative(const char *what, double diff2, double want2, double tol) {
    double error = sqrt(diff2) / (want2 > 0 ? sqrt(want2) : 1);
    printf("  %-44s |diff|/|want| %.2e, %3.0f %% of %.0e\n", what, error, 100 * error / tol, tol);
    return check(error <= tol, "%s: relative error %.3e, allowed %.0e", what, error, tol);
}

// Compares two arrays of the same length; the types may differ (float, double).
#define check_tensor(what, got, want, n, tol) do { \
    double diff2_ = 0, want2_ = 0; \
    for (size_t i_ = 0; i_ < (size_t)(n); i_++) { \
        double d_ = (double)(got)[i_] - (double)(want)[i_]; \
        diff2_ += d_ * d_; \
        want2_ += (double)(want)[i_] * (double)(want)[i_]; \
    } \
    check_relative(what, diff2_, want2_, tol); } while (0)

// Runs f(arg) in a child process with stderr captured into text; returns its exit code, or
// 128 + signal. For everything that is meant to end with die().
static inline int run_child(void (*f)(void *), void *arg, char *text, size_t size) {
    int pipe_[2];
    if (pipe(pipe_) != 0) { return -1; }
    fflush(stdout);
    fflush(stderr);
    pid_t child = fork();
    if (child == 0) {
        dup2(pipe_[1], 2);
        close(pipe_[0]);
        close(pipe_[1]);
        if (freopen("/dev/null", "w", stdout) == NULL) { _exit(99); }
        f(arg);
        fflush(NULL);
        _exit(0);
    }
    close(pipe_[1]);
    size_t used = 0;
    ssize_t got;
    char scrap[256];
    while ((got = used + 1 < size ? read(pipe_[0], text + used, size - 1 - used)
                                  : read(pipe_[0], scrap, sizeof scrap)) > 0) {
        if (used + 1 < size) { used += (size_t)got; }
    }
    if (size) { text[used] = 0; }
    close(pipe_[0]);
    int status = 0;
    waitpid(child, &status, 0);
    return WIFSIGNALED(status) ? 128 + WTERMSIG(status) : WEXITSTATUS(status);
}

// Prints the closing line; the return value is main's.
static inline int finish(const char *name) {
    printf("%s: %d passed, %d failed, %d skipped\n", name, checks_passed, checks_failed,
           checks_skipped);
    return checks_failed != 0;
}
#endif // CHECK_H
