// launcher.c: how ranks start. Alone, the program forks them and watches over them; under torchrun,
// srun or mpirun, on one node or several, they are there already: who am I, and what does rank 0
// say?
//
// A launcher tells each process its place in environment variables. The processes share no memory,
// so before their GPUs can be connected, rank 0 must hand the others one short message, NCCL's id.
// It goes over TCP, one port above the launcher's own, because that one may be in use; where no
// address is set, through a file in a folder that all ranks see. What ranks do together is in
// moe.c.
#ifndef LAUNCHER_C
#define LAUNCHER_C
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include "../kernels.cu"        // defines: die, refuse_if, clock_seconds
#include <netdb.h>
#include <poll.h>
#include <signal.h>
#include <stdatomic.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>
#ifdef __linux__
#include <sys/prctl.h>
#endif
#ifdef _OPENMP
#include <omp.h>
#endif

// A rank among so many, and among those of its node.
typedef struct { int rank, ranks, local, locals; } Place;

enum { COMM_BOX = 1 << 18 };        // bytes a rank can show the others in one step

typedef struct {                    // what a rank shows the others in one step
    char what[96];                  // "collective (phase)": equal on all ranks, or someone is lost
    size_t bytes[COMM_RANKS_MAX];   // all-to-all: for whom how much
    _Alignas(64) unsigned char data[COMM_BOX];
} Box;

typedef struct {                    // one rank's part of the page; untouched memory costs nothing
    struct { _Alignas(64) _Atomic uint64_t step; } arrived[COMMS];
    _Atomic uint64_t begun;         // collectives that this rank has come to
    char doing[96];                 // the last of them: "collective (phase)"
    _Atomic double noted;           // and when that was
    Box box[COMMS][2];              // for odd and even steps
} Desk;

typedef struct {
    int error_printed;              // see die_at: one error is one line
    _Alignas(64) Desk desk[];       // (ranks)
} Page;

typedef struct {
    int rank, ranks, ep;            // in the world of this rank's role
    int first, all, receivers;      // where that begins in COMM_ALL; all ranks; the last of them
    double timeout_s;               // a wait longer than this is an error; 0: no limit
    uint64_t step[COMMS];           // how often this rank has met the others
    int forked;                     // the page is shared; else it is this rank's own, and boxes
                                    // travel over the network
    Place place;                    // of a rank that a launcher started
    Page *page;                     // NULL with one rank
} Comm;

static Comm comm = { .ranks = 1, .ep = 1, .all = 1 };

// Has a rank waited too long? doing: "collective (phase)". Where files are read or written it may
// take any time: they lie nearer to some ranks than to others. And as long as some rank gets on, as
// receivers do while trainers wait for them, nobody hangs.
static inline int launcher_overdue(const char *doing, double waited) {
    const double now = clock_seconds();
    if (comm.timeout_s <= 0 || waited <= comm.timeout_s || strstr(doing, "(load") ||
        strstr(doing, "(save")) { return 0; }
    for (int r = 0; comm.forked && r < comm.all; r++) {
        if (now - comm.page->desk[r].noted <= comm.timeout_s) { return 0; }
    }
    return 1;
}

// -------------------------------------------------------------------------------------------------
// Ranks of our own: launch and supervisor

// Sends sig to every child that still runs.
static inline void comm_kill(const pid_t *pid, int ranks, int sig) {
    for (int r = 0; r < ranks; r++) {
        if (pid[r] > 0) { kill(pid[r], sig); }
    }
}

// One line about a rank that ended without a word of its own.
static inline void comm_report(int rank, int status) {
    const char *doing = comm.page->desk[rank].doing;
    if (__sync_lock_test_and_set(&comm.page->error_printed, 1)) { return; }
    fprintf(stderr, "error  rank %d: ", rank);
    if (WIFSIGNALED(status)) {
        fprintf(stderr, "killed by signal %d (%s)", WTERMSIG(status), strsignal(WTERMSIG(status)));
    } else {
        fprintf(stderr, "ended with exit code %d", WEXITSTATUS(status));
    }
    fprintf(stderr, ", last seen in %s\n", *doing ? doing : "its start");
}

// Waits until all children are gone, then exits with the first failure's code. After a failure the
// others get half a second, because one of them may be printing the error line, and are killed.
// SIGINT and SIGTERM are passed on, and the ranks left to finish: they agree on the step to stop
// at, save, and exit with EXIT_INTERRUPTED, one soon after the other. As one of these counts also a
// rank that the signal killed while the model was loaded, before it could be caught.
__attribute__((noreturn))
static inline void comm_supervise(pid_t *pid, int ranks, const sigset_t *signals) {
    int code = EXIT_OK, running = ranks, passed = 0;
    double deadline = 0;            // of the ranks that outlive one that did not end well
    while (running > 0) {
        const struct timespec pause = { 0, deadline > 0 ? 20000000 : 500000000 };
        int sig = sigtimedwait(signals, NULL, &pause);
        if (sig == SIGINT || sig == SIGTERM) { comm_kill(pid, ranks, passed = sig); }
        for (int r = 0; r < ranks; r++) {
            int status;
            if (pid[r] == 0 || waitpid(pid[r], &status, WNOHANG) != pid[r]) { continue; }
            int ended = WIFSIGNALED(status) ? 128 + WTERMSIG(status) : WEXITSTATUS(status);
            if (WIFSIGNALED(status) && WTERMSIG(status) == passed) { ended = EXIT_INTERRUPTED; }
            pid[r] = 0;
            running--;
            const int late = deadline > 0 && clock_seconds() > deadline;    // killed below
            const int another = deadline > 0 && code != EXIT_INTERRUPTED;   // the first is known
            if (ended == EXIT_OK || late || another) { continue; }
            if (code == EXIT_OK || ended != EXIT_INTERRUPTED) { code = ended; }
            if (ended != EXIT_INTERRUPTED) { comm_report(r, status); }
            deadline = clock_seconds() + (ended == EXIT_INTERRUPTED ? 10 : 0.5);
        }
        if (deadline > 0 && clock_seconds() > deadline) { comm_kill(pid, ranks, SIGKILL); }
    }
    exit(code);
}

static inline void comm_share_cores(int ranks) {
    (void)ranks;
#ifdef _OPENMP
    omp_set_num_threads(omp_get_max_threads() > ranks ? omp_get_max_threads() / ranks : 1);
#endif
}

// Rank `rank` of all is a trainer or, if it is one of the last, a receiver.
static inline void comm_take_role(int rank) {
    comm.rank = this_rank = rank;
    comm.ranks = comm.all - comm.receivers;
    if (rank < comm.ranks) { return; }
    comm.first = comm.ranks;
    comm.rank -= comm.first;
    comm.ranks = comm.receivers;
    comm.ep = 1;
}

// The first things a new rank does.
static inline void comm_become(int rank, pid_t parent, const sigset_t *mask) {
    comm_take_role(rank);
#ifdef __linux__
    prctl(PR_SET_PDEATHSIG, SIGKILL);       // a killed supervisor takes its ranks with it,
#endif
    if (getppid() != parent) { _exit(EXIT_COMM); }      // also if it was quicker than prctl
    // Ctrl-C reaches every process of the terminal's foreground group. In a group of its own a rank
    // gets it from the supervisor only, so one Ctrl-C is one signal.
    setpgid(0, 0);
    sigprocmask(SIG_SETMASK, mask, NULL);
    comm_share_cores(comm.all);
}

// What all ranks have in common, and the page where they meet: of this process, or for its
// children.
static inline void comm_open_page(int ranks, int ep, double timeout_s, int forked) {
    const int trainers = ranks - comm.receivers;
    if (trainers < 1 || ranks > COMM_RANKS_MAX || ep < 1 || trainers % ep != 0) {
        die(EXIT_USAGE, "%d ranks in expert groups of %d HINT: --ranks 1 to %d, a multiple of --ep",
            trainers, ep, COMM_RANKS_MAX);
    }
    require(comm.page == NULL);
    comm.ranks = comm.all = ranks;
    comm.ep = ep;
    comm.timeout_s = timeout_s;
    comm.forked = forked;
    if (ranks == 1) { return; }
    size_t bytes = sizeof(Page) + ranks * sizeof(Desk);
    void *page = mmap(NULL, bytes, PROT_READ | PROT_WRITE,
                      MAP_SHARED | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (page == MAP_FAILED) { die(EXIT_FIT, "cannot share %zu bytes between ranks", bytes); }
    comm.page = (Page *)page;
    error_printed = &comm.page->error_printed;
}

// Starts `ranks` processes, receivers included, the others in expert groups of ep. Returns the rank
// in each of them, counted over all; the caller's own process becomes the supervisor and never
// returns. One rank: returns 0 and forks nothing.
int comm_launch(int ranks, int ep, double timeout_s) {
    comm_open_page(ranks, ep, timeout_s, 1);
    if (ranks == 1) { return 0; }
    sigset_t signals, mask;         // the supervisor takes these one by one, with sigtimedwait
    sigemptyset(&signals);
    sigaddset(&signals, SIGINT);
    sigaddset(&signals, SIGTERM);
    sigaddset(&signals, SIGCHLD);
    signal(SIGCHLD, SIG_DFL);       // an inherited SIG_IGN would throw exit codes away
    sigprocmask(SIG_BLOCK, &signals, &mask);
    fflush(NULL);                   // else each child would print what is still in the buffers
    pid_t pid[COMM_RANKS_MAX] = {0}, parent = getpid();
    for (int r = 0; r < ranks; r++) {
        pid[r] = fork();
        if (pid[r] == 0) { comm_become(r, parent, &mask); return r; }
        if (pid[r] < 0) {
            comm_kill(pid, r, SIGKILL);
            die(EXIT_COMM, "cannot start rank %d of %d HINT: fewer --ranks", r, ranks);
        }
    }
    comm_supervise(pid, ranks, &signals);
}

// Becomes the rank that a launcher made of this process.
void comm_join(Place p, int ep, double timeout_s) {
    comm_open_page(p.ranks, ep, timeout_s, 0);
    comm.place = p;
    comm_take_role(p.rank);
    comm_share_cores(p.locals);
}

// -------------------------------------------------------------------------------------------------
// Ranks of a launcher

// Fills p with what a launcher says of this process. Returns 0 if there is none. Each launcher has
// names of its own; srun's are those of a step, because a job's are also set where nothing was
// launched.
static inline int launcher_place(Place *p) {
    static const char *const names[][4] = {
        { "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE" },
        { "SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "SLURM_STEP_TASKS_PER_NODE" },
        { "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK",
          "OMPI_COMM_WORLD_LOCAL_SIZE" } };
    for (int i = 0; i < 3; i++) {
        const char *const *name = names[i], *value[4];
        for (int k = 0; k < 4; k++) { value[k] = getenv(name[k]); }
        if (!value[0] || !value[1] || !value[2]) { continue; }
        if (!value[3]) { value[3] = value[1]; }         // one node
        *p = (Place){ atoi(value[0]), atoi(value[1]), atoi(value[2]), atoi(value[3]) };
        int fits = p->rank >= 0 && p->rank < p->ranks && p->local >= 0 && p->local < p->locals
                   && p->ranks % p->locals == 0;
        refuse_if(!fits, "%s=%s, %s=%s, %s=%s and %s=%s do not fit together HINT: as many ranks on "
                  "every node", name[0], value[0], name[1], value[1], name[2], value[2], name[3],
                  value[3]);
        return 1;
    }
    return 0;
}

// Rank 0: a socket that listens. The others: one that is connected to it. -1: not now.
static inline int launcher_socket(int listens, const char *host, const char *port) {
    struct addrinfo want = { .ai_socktype = SOCK_STREAM, .ai_flags = listens ? AI_PASSIVE : 0 };
    struct addrinfo *list = NULL;
    int made = -1, yes = 1;
    if (getaddrinfo(listens ? NULL : host, port, &want, &list) != 0) { return -1; }
    for (struct addrinfo *a = list; a && made < 0; a = a->ai_next) {
        made = socket(a->ai_family, a->ai_socktype, a->ai_protocol);
        if (made < 0) { continue; }
        setsockopt(made, SOL_SOCKET, SO_REUSEADDR, &yes, sizeof yes);
        int failed = listens ? bind(made, a->ai_addr, a->ai_addrlen) || listen(made, 256)
                             : connect(made, a->ai_addr, a->ai_addrlen);
        if (failed) { close(made); made = -1; }
    }
    freeaddrinfo(list);
    return made;
}

static inline void launcher_nap(void) {
    const struct timespec nap = { 0, 50000000 };
    nanosleep(&nap, NULL);
}

// Rank 0 sends to whoever calls until all others have it; they call until they get it.
static inline int launcher_tell_tcp(const Place *p, void *data, size_t bytes, const char *host,
                                    const char *port, double deadline) {
    int told = 0, want = p->rank ? 1 : p->ranks - 1, ear = -1;
    while (told < want && clock_seconds() < deadline) {
        if (p->rank == 0 && ear < 0 && (ear = launcher_socket(1, host, port)) < 0) {
            launcher_nap();
            continue;
        }
        struct pollfd ready = { .fd = ear, .events = POLLIN };
        if (p->rank == 0 && poll(&ready, 1, 50) != 1) { continue; }
        int s = p->rank ? launcher_socket(0, host, port) : accept(ear, NULL, NULL);
        if (s < 0) { launcher_nap(); continue; }
        ssize_t n = p->rank ? recv(s, data, bytes, MSG_WAITALL)
                            : send(s, data, bytes, MSG_NOSIGNAL);
        told += n == (ssize_t)bytes;
        close(s);
    }
    if (ear >= 0) { close(ear); }
    return told == want;
}

// Rank 0 writes under another name first: the file is whole, or it is not there.
static inline int launcher_tell_file(const Place *p, void *data, size_t bytes, const char *path,
                                     double deadline) {
    char part[4096 + 8];
    snprintf(part, sizeof part, "%s.part", path);
    for (; clock_seconds() < deadline; launcher_nap()) {
        FILE *file = fopen(p->rank ? path : part, p->rank ? "rb" : "wb");
        if (file == NULL) { continue; }
        int whole = (p->rank ? fread(data, 1, bytes, file) : fwrite(data, 1, bytes, file)) == bytes;
        if (fclose(file) == 0 && whole && (p->rank || rename(part, path) == 0)) { return 1; }
    }
    return 0;
}

// The file in folder through which ranks meet: of this job's step and start, since what an earlier
// one left must not be read. Returns 0 if no launcher says which job this is.
static inline int launcher_file(char *path, size_t size, const char *folder) {
    static const char *const names[] = { "SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_RESTART_COUNT",
                                         "PMIX_NAMESPACE" };
    size_t used = (size_t)snprintf(path, size, "%s/ranks", folder), begun = used;
    for (int i = 0; i < 4; i++) {
        const char *value = getenv(names[i]);
        if (value == NULL || used >= size) { continue; }
        used += (size_t)snprintf(path + used, size - used, "-%.256s", value);
    }
    return used > begun;
}

// Rank 0, when all have met.
static inline void launcher_told(const char *folder) {
    char path[4096];
    if (getenv("MASTER_ADDR") && getenv("MASTER_PORT")) { return; }
    if (launcher_file(path, sizeof path, folder)) { unlink(path); }
}

// data becomes rank 0's on all ranks. folder: that all of them see; timeout_s: 0: no limit.
static inline void launcher_tell(const Place *p, void *data, size_t bytes, const char *folder,
                                 double timeout_s) {
    const char *host = getenv("MASTER_ADDR"), *port = getenv("MASTER_PORT");
    double deadline = clock_seconds() + (timeout_s > 0 ? timeout_s : 1e9);
    char where[4096], next[16];
    int told, file = launcher_file(where, sizeof where, folder);
    refuse_if(!file && !(host && port), "rank %d of %d: neither MASTER_ADDR and MASTER_PORT nor "
              "the job's id is set, so ranks cannot find each other", p->rank, p->ranks);
    if (host && port) {
        snprintf(next, sizeof next, "%d", atoi(port) + 1);
        snprintf(where, sizeof where, "%s port %s", host, next);
        told = launcher_tell_tcp(p, data, bytes, host, next, deadline);
    } else {
        told = launcher_tell_file(p, data, bytes, where, deadline);
    }
    if (!told) {
        die(EXIT_COMM, "rank %d of %d: %s within %g s at %s HINT: are all ranks running?", p->rank,
            p->ranks, p->rank ? "rank 0 not found" : "not all others came", timeout_s, where);
    }
}

#ifdef USE_CUDA
// A rank that waits inside CUDA or NCCL cannot look at the clock: this thread does it. What has
// been begun and not seen to end for longer than the limit waits for the rank that has come least
// far.
static void *comm_watch(void *unused) {
    const struct timespec nap = { 0, 100000000 };
    const Desk *desk = comm.page->desk;
    for (;; nanosleep(&nap, NULL)) {
        double waited;
        char text[256] = "", other[160] = "the other ranks";
        gpu_waiting(&waited, text, sizeof text);
        if (*text) { die(EXIT_COMM, "NCCL in %s: %s", desk[this_rank].doing, text); }
        if (!launcher_overdue(desk[this_rank].doing, waited)) { continue; }
        for (int r = 0, least = this_rank; comm.forked && r < comm.all; r++) {
            if (desk[r].begun >= desk[least].begun) { continue; }
            least = r;
            snprintf(other, sizeof other, "rank %d, last seen in %s", r, desk[r].doing);
        }
        die(EXIT_COMM, "%s: waited %g s for %s HINT: see what it was doing, or raise --timeout",
            desk[this_rank].doing, comm.timeout_s, other);
    }
    return unused;
}

// A rank ends without taking CUDA and NCCL down, which might wait for ranks that are gone.
static void comm_leave(int code, void *unused) {
    (void)unused;
    fflush(NULL);
    _exit(code);
}
#endif
#endif // LAUNCHER_C
