// Collectives between GPUs: the same checks as test_moe.c makes of them on the CPU, and how fast
// they are. Every shape of ranks and expert groups that this machine has GPUs for; each in
// processes of its own. Without two GPUs this says skipped. Build: make test-gpu.
#include "../moe.c"
#include "check.h"
#ifndef USE_CUDA
int main(void) {
    skip("built without nvcc");
    return finish("test_gpus");
}
#else

static int rank_errors;
static void expect(int ok, const char *what) {
    if (ok) { return; }
    fprintf(stderr, "rank %d: %s\n", comm_rank(), what);
    rank_errors++;
}

enum { MOST = 1 << 28 };                // bytes of the largest exchange
static unsigned char *device[2], *host;

// How many bytes rank `from` sends to rank `to`: nothing at all, a few, or a lot.
static size_t bytes_between(int from, int to, int round) {
    uint64_t z = random_bits(round, (uint64_t)from * 64 + to);
    if (z % 3 == 0 || (round == 1 && to == 1)) { return 0; }
    return z % 5 == 0 ? 999999 + z % 999999 : z % 1000;
}

// Byte j from rank a to rank b is a mixture of the three.
static void all_to_all_once(int which, int round) {
    int n = comm_size(which);
    size_t send[8], recv[8], sent = 0, received = 0, wrong = 0;
    for (int i = 0; i < n; i++) {
        int other = comm_member(which, i);
        send[i] = bytes_between(comm_rank(), other, round);
        recv[i] = bytes_between(other, comm_rank(), round);
        for (size_t j = 0; j < send[i]; j++) {
            host[sent++] = (unsigned char)(j * 7 + comm_rank() * 31 + other * 101);
        }
    }
    gpu_upload(device[0], host, sent);
    gpu_zero(device[1], 8 * 2000000);
    comm_batch(1, "test");              // two exchanges in one launch: the second sends nothing
    size_t none[8] = {0};
    comm_all_to_all(which, device[1], recv, device[0], send, "test");
    comm_all_to_all(which, device[1], none, device[0], none, "empty");
    comm_batch(0, "test");
    for (int i = 0; i < n; i++) { received += recv[i]; }
    gpu_download(host, device[1], received + 1);
    const unsigned char *p = host;
    for (int i = 0; i < n; i++) {
        for (size_t j = 0; j < recv[i]; j++) {
            wrong += *p++ !=
                (unsigned char)(j * 7 + comm_member(which, i) * 31 + comm_rank() * 101);
        }
    }
    expect(wrong == 0 && *p == 0, "all_to_all brought wrong bytes");
}

// Sums of numbers whose rounding shows the order they were added in, in one piece, in several with
// a rest, and fewer than there are members.
static void sums(int which) {
    const size_t counts[3] = { 1, 1000003, (1 << 23) + 100001 };
    int n = comm_size(which);
    double members = 0;
    for (int i = 0; i < n; i++) { members += comm_member(which, i); }
    for (int k = 0; k < 3; k++) {
        real *values = (real *)host;
        size_t wrong = 0;
        for (size_t j = 0; j < counts[k]; j++) { values[j] = random_uniform(comm_rank(), j) / 3; }
        gpu_upload(device[0], values, counts[k] * sizeof(real));
        comm_sum_real(which, (real *)device[0], counts[k], "test");
        gpu_download(values, device[0], counts[k] * sizeof(real));
        for (size_t j = 0; j < counts[k]; j++) {
            real want = 0;
            for (int i = 0; i < n; i++) { want += random_uniform(comm_member(which, i), j) / 3; }
            wrong += values[j] != want;
        }
        expect(wrong == 0, "sum_real is not the sum in rank order");
    }
    double two[2] = { comm_rank() + 0.5, 1 };           // of the host
    int mine[2] = { comm_rank(), 7 }, all[2 * COMM_RANKS_MAX];
    comm_sum_double(which, two, 2, "values");
    comm_gather_int(which, all, mine, 2, "ints");
    expect(two[0] == members + 0.5 * n && two[1] == n, "sum_double");
    for (int i = 0; i < n; i++) {
        expect(all[2 * i] == comm_member(which, i) && all[2 * i + 1] == 7, "gather_int");
    }
}

// GB/s: bytes that leave a GPU; for a sum the bus's, 2 (n-1)/n of the bytes summed.
static void speeds(void) {
    int n = comm_ranks();
    for (size_t bytes = 1 << 13; bytes <= MOST; bytes *= 8) {
        double seconds[2];
        size_t each[8];
        for (int i = 0; i < n; i++) { each[i] = bytes / n; }
        for (int what = 0; what < 2; what++) {
            double start = 0;
            for (int run = 0; run < 12; run++) {
                if (run == 2) { gpu_sync(); start = clock_seconds(); }
                if (what) { comm_sum_real(COMM_WORLD, (real *)device[0], bytes / 4, "speed"); }
                else { comm_all_to_all(COMM_WORLD, device[1], each, device[0], each, "speed"); }
            }
            gpu_sync();
            seconds[what] = (clock_seconds() - start) / 10;
        }
        double off = (double)bytes * (n - 1) / n;
        if (comm_rank() == 0) {
            fprintf(stderr,
                    "| %d GPUs | %9zu bytes | all-to-all %8.1f us %6.1f GB/s | "
                    "sum %8.1f us %6.1f GB/s |\n", n, bytes, 1e6 * seconds[0],
                    1e-9 * off / seconds[0], 1e6 * seconds[1], 2e-9 * off / seconds[1]);
        }
    }
}

// On as many GPUs as ranks. launched: as separate processes that find each other over TCP, which is
// what two nodes are.
typedef struct { int ranks, ep, launched; } Shape;
static void run_collectives(void *arg) {
    const Shape *s = arg;
    char name[64];
    Place place = { .ranks = s->ranks, .locals = s->ranks };
    if (s->launched) {
        setenv("MASTER_ADDR", "127.0.0.1", 1);
        setenv("MASTER_PORT", "29533", 1);
        while (place.rank < s->ranks - 1 && fork() == 0) { place.rank++; }
        place.local = place.rank;
        comm_join(place, s->ep, 60);
    } else {
        place.local = comm_launch(s->ranks, s->ep, 60);
    }
    size_t used, total;
    gpu_start(place.local, name, sizeof name);
    gpu_memory(&used, &total);
    comm_connect("build");
    size_t before = used;
    gpu_memory(&used, &total);
    for (int i = 0; i < 2; i++) { gpu_alloc((void **)&device[i], MOST); }
    host = malloc(1 << 26);
    void *space;
    gpu_alloc(&space, 128 << 20);
    gpu_workspace(space, 128 << 20);
    for (int which = 0; which < COMMS; which++) { sums(which); }
    for (int round = 0; round < 12; round++) {
        all_to_all_once(round % 2 && s->ep > 1 ? COMM_EP : COMM_WORLD, round);
    }
    if (comm_rank() == 0) {
        fprintf(stderr, "| %d GPUs, groups of %d%s: NCCL takes %.0f MiB of %s |\n", s->ranks, s->ep,
                s->launched ? ", launched" : "", (double)(used - before) / 1048576, name);
    }
    if (s->ep == s->ranks && !s->launched) { speeds(); }
    comm_barrier(COMM_WORLD, "end");
    fflush(NULL);
    if (rank_errors) { _exit(9); }
    if (s->launched && place.rank < s->ranks - 1) {     // its child's code counts, too
        int status = 0;
        wait(&status);
        if (status) { _exit(9); }
    }
}

// An argument: only shapes of so many GPUs, for instance to try NCCL's settings.
int main(int argc, char **argv) {
    int status = 0, gpus = 0, there, only = argc > 1 ? atoi(argv[1]) : 0;
    pid_t child = fork();
    if (child == 0) {
        gpu_count(&gpus, &there);
        _exit(gpus);
    }
    waitpid(child, &status, 0);
    gpus = WIFEXITED(status) ? WEXITSTATUS(status) : 0;
    const Shape shapes[] = { { 2, 2, 0 }, { 2, 1, 0 }, { 2, 2, 1 }, { 4, 4, 0 }, { 4, 2, 0 },
                             { 4, 2, 1 }, { 8, 8, 0 }, { 8, 4, 0 } };
    for (int i = 0; i < 8; i++) {
        const Shape *s = &shapes[i];
        char text[4096], what[64];
        snprintf(what, sizeof what, "%d GPUs in groups of %d%s", s->ranks, s->ep,
                 s->launched ? ", launched" : "");
        if (only && s->ranks != only) { continue; }
        if (s->ranks > gpus) { skip("%s: this machine has %d", what, gpus); continue; }
        int code = run_child(run_collectives, (void *)s, text, sizeof text);
        check(code == 0, "%s: exit code %d: %s", what, code, text);
        printf("%s", text);             // the table
    }
    return finish("test_gpus");
}
#endif // USE_CUDA
