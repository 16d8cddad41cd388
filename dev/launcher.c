// launcher.c: ranks that torchrun, srun or mpirun started, on one node or several: who am I, and what
// does rank 0 say?
//
// A launcher tells each process its place in environment variables. The processes share no memory,
// so before their GPUs can be connected, rank 0 must hand the others one short message, NCCL's id.
// It goes over TCP, one port above the launcher's own, because that one may be in use; where no
// address is set, through a file in a folder that all ranks see.
#ifndef LAUNCHER_C
#define LAUNCHER_C
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include "../kernels.cu"        // defines: die, refuse_if, clock_seconds
#include <netdb.h>
#include <poll.h>
#include <sys/socket.h>
#include <unistd.h>

// A rank among so many, and among those of its node.
typedef struct { int rank, ranks, local, locals; } Place;

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
        ssize_t n = p->rank ? recv(s, data, bytes, MSG_WAITALL) : send(s, data, bytes, MSG_NOSIGNAL);
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

// data becomes rank 0's on all ranks. folder: that all of them see; timeout_s: 0: no limit.
static inline void launcher_tell(const Place *p, void *data, size_t bytes, const char *folder,
                                 double timeout_s) {
    const char *host = getenv("MASTER_ADDR"), *port = getenv("MASTER_PORT");
    const char *job = getenv("SLURM_JOB_ID"), *step = getenv("SLURM_STEP_ID");
    double deadline = clock_seconds() + (timeout_s > 0 ? timeout_s : 1e9);
    char where[4096], next[16];
    if (job == NULL) { job = getenv("PMIX_NAMESPACE"); }
    refuse_if(!job && !(host && port), "rank %d of %d: neither MASTER_ADDR and MASTER_PORT nor the "
              "job's id is set, so ranks cannot find each other", p->rank, p->ranks);
    int told;
    if (host && port) {
        snprintf(next, sizeof next, "%d", atoi(port) + 1);
        snprintf(where, sizeof where, "%s port %s", host, next);
        told = launcher_tell_tcp(p, data, bytes, host, next, deadline);
    } else {                    // a name of this job's step: an earlier one's file must not be read
        snprintf(where, sizeof where, "%s/ranks-%s-%s", folder, job, step ? step : "0");
        told = launcher_tell_file(p, data, bytes, where, deadline);
    }
    if (!told) {
        die(EXIT_COMM, "rank %d of %d: %s within %g s at %s HINT: are all ranks running?", p->rank,
            p->ranks, p->rank ? "rank 0 not found" : "not all others came", timeout_s, where);
    }
}
#endif // LAUNCHER_C
