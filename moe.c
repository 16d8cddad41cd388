// moe.c: a mixture of experts, and the ranks it is spread over.
//
// The feed-forward layer of DeepSeek-V4 is not one network but E small ones, the experts. A router
// gives each token K of them, so that a token pays for K experts while the model owns E:
//
//     s   = sqrt(softplus(gate x))              one score per expert, in fp32
//     I   = the K experts of largest s + bias   (the first layers: I = tid2eid[token], a table)
//     w_k = route_scale s_k / sum_I s           from the scores WITHOUT the bias
//     y_k = w2_k ( w_k silu(min(w1_k x, L)) clamp(w3_k x, -L, L) )
//     f   = sum_k y_k + shared(x)               shared: an expert that sees every token, w_k = 1
//
// The routing weight multiplies before w2, so it travels with its token, and its gradient comes
// back with the token's. A slot is one (token, k) pair: the unit that travels. Experts are dealt to
// ranks; slots visit the rank that owns their expert in rounds of a fixed number of rows, so that
// crooked routing costs time, never memory and never a token. The sums are written so that 1, 2 and
// 4 ranks give the same output, bit for bit. Formulas: deepseek-v4-flash.md 3.6, 6.10 and 6.11.
//
// What it refuses to do: drop tokens, train the router, add an auxiliary loss.
//
// Contents
//   1 ranks (launch: dev/launcher.c)      5 routers
//   2 ranks: meeting in shared memory     6 the trip: which row goes where, in which round
//   3 collectives                         7 the experts of this rank, the shared expert, combine
//   4 sizes and buffers of a layer        8 the layer: forward and backward
#ifndef MOE_C
#define MOE_C
#include "lora.c"           // lora_linear_*, lora_experts_*, Lora; linear_bf16_forward, swiglu_*
#include "dev/launcher.c"   // Comm comm, Page: comm_launch, comm_join, launcher_tell
#include "dev/phases.c"     // phase, phase_in
#include <limits.h>
#include <pthread.h>
#include <sched.h>
#include <tgmath.h>

// -------------------------------------------------------------------------------------------------
// 1 Ranks
//
// A rank is a process, with a GPU of its own where there are any. The first process forks one child
// per rank and from then on only watches: if a child dies it ends the others, who would otherwise
// wait for it, and its exit code tells the first cause. It forks before anyone has used OpenMP or
// CUDA, which do not survive a fork. Under torchrun, srun or mpirun, on one node or several, the
// ranks are there already, and share nothing but the network. Ranks [g*ep, (g+1)*ep) form expert
// group g: together they own one set of experts. A rank's replicas are the ranks at the same place
// of the other groups, who own the same experts.
//
// The last ranks may be reserved for receivers: they train nothing, but get the weights (refit.c).
// Trainers and receivers each are a world of their own, in which they count from 0; they meet in
// COMM_ALL, where the receivers come after the trainers.

int comm_rank(void) { return comm.rank; }
int comm_ranks(void) { return comm.ranks; }
int comm_ep(void) { return comm.ep; }
int comm_ep_rank(void) { return comm.rank % comm.ep; }
int comm_receivers(void) { return comm.receivers; }
int comm_is_receiver(void) { return comm.first > 0; }

// Before comm_launch: the last so many ranks will be receivers.
void comm_reserve(int receivers) { comm.receivers = receivers; }

// -------------------------------------------------------------------------------------------------
// 2 Ranks: meeting in shared memory
//
// Everything ranks tell each other goes through one kind of meeting. In step n of a communicator
// each member fills its box, says "n", and waits until all others have said "n"; then it reads
// their boxes. One meeting per step is enough because there are two boxes: a member that fills the
// box of step n has met everyone in step n - 1, and they came there after reading step n - 2. Ranks
// that share no page send each other what is in the boxes.

static inline int comm_size(int which) {
    return which == COMM_ALL ? comm.all : which == COMM_WORLD ? comm.ranks
         : which == COMM_EP ? comm.ep : comm.ranks / comm.ep;
}

// The place of this rank in the communicator.
static inline int comm_index(int which) {
    return which == COMM_ALL ? comm.first + comm.rank : which == COMM_WORLD ? comm.rank
         : which == COMM_EP ? comm.rank % comm.ep : comm.rank / comm.ep;
}

// The rank of its i-th member, counted over all.
static inline int comm_member(int which, int i) {
    return which == COMM_ALL ? i : which == COMM_WORLD ? comm.first + i
         : comm.first + (which == COMM_EP ? comm.rank - comm.rank % comm.ep + i
                                          : comm.rank % comm.ep + i * comm.ep);
}

// What member i shows in the present step.
static inline Box *comm_box(int which, int i) {
    return &comm.page->desk[comm_member(which, i)].box[which][comm.step[which] & 1];
}

// Opens the next step and returns this rank's box of it, to be filled.
static inline Box *comm_open(int which) {
    comm.step[which]++;
    return comm_box(which, comm_index(which));
}

// Leaves word of the collective that this rank comes to, for whoever has to report on it.
static inline void comm_note(const char *collective, const char *phase) {
    Desk *mine = &comm.page->desk[this_rank];
    snprintf(mine->doing, sizeof mine->doing, "%s (%s)", collective, phase);
    mine->noted = clock_seconds();
    atomic_fetch_add_explicit(&mine->begun, 1, memory_order_relaxed);
}

// Waits for member i to arrive. There may be more ranks than cores: the one we wait for may need
// ours, so after a short spin the processor is handed on, and later we sleep.
static inline void comm_wait(int which, int i, const char *collective, const char *phase) {
    _Atomic uint64_t *step = &comm.page->desk[comm_member(which, i)].arrived[which].step;
    double start = 0;
    for (long tries = 0; atomic_load_explicit(step, memory_order_acquire) < comm.step[which];
         tries++) {
        const struct timespec nap = { 0, tries < 2000 ? 20000 : 500000 };
        if (tries < 100) { continue; }
        if (tries < 1000) { sched_yield(); continue; }
        nanosleep(&nap, NULL);
        double now = clock_seconds();
        if (start == 0) { start = now; }
        if (launcher_overdue(comm.page->desk[this_rank].doing, now - start)) {
            die(EXIT_COMM, "%s (%s): waited %g s for rank %d HINT: see what that rank was doing, "
                "or raise --timeout", collective, phase, comm.timeout_s, comm_member(which, i));
        }
    }
}

// Fills the boxes of all members (of `which`) but this rank's own with the first bytes of theirs.
static inline void comm_trade(void **boxes, int which, size_t bytes) {
    GPU(gpu_trade(boxes, which, bytes))
    (void)boxes, (void)which, (void)bytes;
    die(EXIT_USAGE, "ranks that a launcher started meet through their GPUs HINT: ./train --cpu "
        "--ranks N starts ranks of its own");
}

// Shows this rank's box, with so many bytes of data, and waits for the boxes of all members.
// Members that meet in different collectives would read nonsense, so that is an error.
static inline void comm_meet(int which, size_t bytes, const char *collective, const char *phase) {
    Box *mine = comm_box(which, comm_index(which)), *boxes[COMM_RANKS_MAX];
    comm_note(collective, phase);
    strcpy(mine->what, comm.page->desk[this_rank].doing);
    for (int i = 0; i < comm_size(which); i++) { boxes[i] = comm_box(which, i); }
    if (comm.forked) {
        atomic_store_explicit(&comm.page->desk[this_rank].arrived[which].step, comm.step[which],
                              memory_order_release);
        for (int i = 0; i < comm_size(which); i++) { comm_wait(which, i, collective, phase); }
    } else {
        comm_trade((void **)boxes, which, offsetof(Box, data) + bytes);
    }
    for (int i = 0; i < comm_size(which); i++) {
        const char *theirs = boxes[i]->what;
        if (strcmp(mine->what, theirs) != 0) {
            die(EXIT_COMM, "%s met rank %d in %s HINT: the ranks took different paths through the "
                "program", mine->what, comm_member(which, i), theirs);
        }
    }
}

// -------------------------------------------------------------------------------------------------
// 3 Collectives
//
// All members of a communicator call the same ones in the same order; `phase` says what for, in
// messages. Sums are added in rank order by everyone, so all ranks get the same bits. With one
// member there is nothing to do.

void comm_barrier(int which, const char *phase) {
    if (comm_size(which) == 1) { return; }
    comm_open(which);
    comm_meet(which, 0, "barrier", phase);
}

// Collectives on rows between comm_batch(1) and comm_batch(0) are one launch, and done after it.
static inline void comm_batch(int begin, const char *phase) {
    GPU(gpu_batch(begin); phase_collective(begin, phase))
    phase_collective(begin, phase);
}

// What comes between aside(ASIDE_BEGIN) and aside(ASIDE_END) may run beside what follows, up to
// aside(ASIDE_JOIN), on a GPU. Neither may touch what the other writes.
static inline void aside(int step) {
    GPU(gpu_aside(step))
    (void)step;
}

// values_h (n): replaced by the sum over all members, or by the largest. A NaN anywhere stays one.
static inline void comm_reduce(int which, double *values_h, int n, int largest, const char *name,
                               const char *phase) {
    const int most = COMM_BOX / sizeof(double);
    if (comm_size(which) == 1) { return; }
    for (int at = 0; at < n; at += most) {
        int part = n - at < most ? n - at : most;
        memcpy(comm_open(which)->data, values_h + at, part * sizeof(double));
        comm_meet(which, part * sizeof(double), name, phase);
        for (int j = 0; j < part; j++) {
            double all = largest ? -INFINITY : 0;
            for (int i = 0; i < comm_size(which); i++) {
                double value = ((const double *)comm_box(which, i)->data)[j];
                all = !largest ? all + value : value > all || isnan(value) ? value : all;
            }
            values_h[at + j] = all;
        }
    }
}
void comm_sum_double(int which, double *values_h, int n, const char *phase) {
    comm_reduce(which, values_h, n, 0, "sum_double", phase);
}
void comm_max_double(int which, double *values_h, int n, const char *phase) {
    comm_reduce(which, values_h, n, 1, "max_double", phase);
}

// values (n): gradients, replaced by their sum over all members.
void comm_sum_real(int which, real *values, size_t n, const char *phase) {
    const size_t most = COMM_BOX / sizeof(real);
    if (comm_size(which) == 1) { return; }
    comm_note("sum_real", phase);
    GPU(gpu_sum_real(which, values, n))
    for (size_t at = 0; at < n; at += most) {
        size_t part = n - at < most ? n - at : most;
        memcpy(comm_open(which)->data, values + at, part * sizeof(real));
        comm_meet(which, part * sizeof(real), "sum_real", phase);
        memset(values + at, 0, part * sizeof(real));
        for (int i = 0; i < comm_size(which); i++) {
            const real *theirs = (const real *)comm_box(which, i)->data;
            for (size_t j = 0; j < part; j++) { values[at + j] += theirs[j]; }
        }
    }
}

// all_h (members, n) = everyone's mine_h (n), in member order. mine_h may be its part of all_h.
void comm_gather_int(int which, int *all_h, const int *mine_h, int n, const char *phase) {
    const int most = COMM_BOX / sizeof(int);
    if (comm_size(which) == 1) { memmove(all_h, mine_h, n * sizeof(int)); return; }
    for (int at = 0; at < n; at += most) {
        int part = n - at < most ? n - at : most;
        memcpy(comm_open(which)->data, mine_h + at, part * sizeof(int));
        comm_meet(which, part * sizeof(int), "gather_int", phase);
        for (int i = 0; i < comm_size(which); i++) {
            memcpy(all_h + (size_t)i * n + at, comm_box(which, i)->data, part * sizeof(int));
        }
    }
}

// Member i gets send_bytes_h[i] bytes; from it come recv_bytes_h[i]. Both buffers are contiguous in
// member order. A box shows a window of the sender's whole buffer, from which each reader takes the
// part that is its own; there are as many steps as the longest buffer of all members needs.
void comm_all_to_all(int which, void *recv, const size_t *recv_bytes_h, const void *send,
                     const size_t *send_bytes_h, const char *phase) {
    const int members = comm_size(which), me = comm_index(which);
    if (members == 1) { CPU_ONLY(); memmove(recv, send, send_bytes_h[0]); return; }
    comm_note("all_to_all", phase);
    GPU(gpu_all_to_all(which, recv, recv_bytes_h, send, send_bytes_h))
    size_t longest = 1, total = 0;
    for (int i = 0; i < members; i++) { total += send_bytes_h[i]; }
    for (size_t at = 0; at < longest; at += COMM_BOX) {
        Box *mine = comm_open(which);
        memcpy(mine->bytes, send_bytes_h, members * sizeof(size_t));
        if (at < total) {
            memcpy(mine->data, (const unsigned char *)send + at,
                   total - at < COMM_BOX ? total - at : COMM_BOX);
        }
        comm_meet(which, COMM_BOX, "all_to_all", phase);
        unsigned char *out = (unsigned char *)recv;
        for (int i = 0; i < members; i++) {
            const Box *theirs = comm_box(which, i);
            size_t begin = 0, end = 0;      // of my part in the sender's buffer
            for (int j = 0; j < me; j++) { begin += theirs->bytes[j]; }
            for (int j = 0; j < members; j++) { end += theirs->bytes[j]; }
            longest = end > longest ? end : longest;
            end = begin + theirs->bytes[me];
            if (theirs->bytes[me] != recv_bytes_h[i]) {
                die(EXIT_COMM, "all_to_all (%s): rank %d sends %zu bytes, %zu are expected", phase,
                    comm_member(which, i), theirs->bytes[me], recv_bytes_h[i]);
            }
            size_t low = begin > at ? begin : at, high = end < at + COMM_BOX ? end : at + COMM_BOX;
            if (low < high) { memcpy(out + (low - begin), theirs->data + (low - at), high - low); }
            out += recv_bytes_h[i];
        }
    }
}

// data_h (bytes) of member `root`, to all members: the same number of bytes everywhere.
void comm_broadcast(int which, void *data_h, size_t bytes, int root, const char *phase) {
    if (comm_size(which) == 1) { return; }
    const int mine = comm_index(which) == root;
    for (size_t at = 0; at < bytes; at += COMM_BOX) {
        size_t part = bytes - at < COMM_BOX ? bytes - at : COMM_BOX;
        Box *box = comm_open(which), *theirs = comm_box(which, root);
        box->bytes[0] = bytes;
        if (mine) { memcpy(box->data, (unsigned char *)data_h + at, part); }
        comm_meet(which, part, "broadcast", phase);
        if (theirs->bytes[0] != bytes) {
            die(EXIT_COMM, "broadcast (%s): rank %d sends %zu bytes, %zu are expected", phase,
                comm_member(which, root), theirs->bytes[0], bytes);
        }
        if (!mine) { memcpy((unsigned char *)data_h + at, theirs->data, part); }
    }
}

#ifdef USE_CUDA
// Connects the GPUs of all ranks; each has taken its own. NCCL's ranks need rank 0's unique id:
// forked ones get it through the page, others as dev/launcher.c says (folder: one that all see).
void comm_connect(const char *folder) {
    enum { INTS = GPU_ID_BYTES / sizeof(int) };
    int id[INTS] = {0}, all[COMM_RANKS_MAX * INTS];
    pthread_t watch;
    if (comm.all == 1) { return; }
    on_exit(comm_leave, NULL);
    if (this_rank == 0) { gpu_make_id(id); }
    if (comm.forked) { comm_gather_int(COMM_ALL, all, id, INTS, "first word"); }
    memcpy(id, all, comm.forked ? sizeof id : 0);
    if (!comm.forked) { launcher_tell(&comm.place, id, sizeof id, folder, comm.timeout_s); }
    comm_note("connecting", "start");
    if (pthread_create(&watch, NULL, comm_watch, NULL) != 0) { die(EXIT_COMM, "no thread"); }
    gpu_connect(id, this_rank, comm.all, comm.receivers, comm.ep);
    if (!comm.forked && this_rank == 0) { launcher_told(folder); }
}
#endif

// -------------------------------------------------------------------------------------------------
// 4 Sizes and buffers of a layer
//
// From forward to backward the routing is kept, and the hidden rows if there is room for them.
// Everything else is scratch that all layers share: the rows' two homes (before and after their
// trip), and room at the experts for the rows of one round.

typedef struct {                // sizes of one MoE layer
    int C, E, K, F, R;          // channels, experts (all), experts per token, width, LoRA rank
    int first, local;           // this rank owns experts first .. first+local-1
    float limit, route_scale;   // SwiGLU clamp L; routed_scaling_factor
    int norm_topk;              // divide by the sum of the selected scores
    Routing how;                // the scores, and what is chosen by
    float lora_scale;
    int fp8;                    // --precision fp8: the experts' products, and rows on their way
} MoeDims;

typedef struct {                // frozen weights and adapters of one MoE layer
    const bf16 *gate;           // (E,C)
    const float *bias;          // (E) selection bias, or NULL: hash-routed
    const int *tid2eid;         // (V,K) experts of each token id, or NULL: score-routed
    const uint8_t *w1, *w2, *w3, *s1, *s2, *s3;     // routed experts of this rank, fp4 codes:
                                // (local,F,C/2), (local,C,F/2), (local,F,C/2), and e8m0 scales
    const uint8_t *sh_w1, *sh_w2, *sh_w3, *sh_s1, *sh_s2, *sh_s3;   // shared expert, fp8
    Lora e1, e2, e3, l1, l2, l3;                    // adapters: routed w1 w2 w3, shared w1 w2 w3
    int wide;                   // blocks of them that e4m3 cannot hold, on any rank: bf16 then
} MoeWeights;

typedef struct {                // the first products of n rows
    act *g, *v;                 // (n,F) w1 x, w3 x; NULL: not kept. In fp8 g is (n,2F), [g | v]
    real *u1, *u3;              // (n,R) A x of their adapters. In fp8 u1 is (n,2R)
} MoeHidden;

typedef struct {                // kept from forward to backward, per layer
    int *ids;                   // (T,K) the experts of each token
    real *weights, *logits;     // (T,K) their routing weights and router logits
    int *row_slot, *slot_row;   // (T*K) travelling row -> slot t*K + k, and back
    int *counts_h;              // (ep,E) rows of each source for each expert
    MoeHidden experts, shared;  // of moe_capacity and T rows
    uint8_t *x8;                // fp8: inp (T,C) in codes and scales; NULL: not kept
} MoeSaved;

typedef struct {
    int T, capacity;            // most tokens of a call; rows this rank works off per round
    size_t rows[2];             // what capacity is in layers that work in bf16, and in fp8
    real *logits;               // (T,E) router logits of all experts
    // The trip (section 6). It is planned on the host, which needs to know the counts only.
    int *mine, *index;          // (E) rows of this rank, (T*K) a slot's place among its expert's
    const int *counts_h;        // (ep,E) see MoeSaved
    int *starts_h;              // (ep,E) their places in the owner's queue
    Runs runs;                  // of this round, between `by source` and `by expert`
    int rounds, home_at, home_rows;     // of the call; first row and rows sent in this round
    int to[COMM_RANKS_MAX], from[COMM_RANKS_MAX];   // rows sent to, received from each rank
    double fullest, mean;       // rows of the fullest rank, and per rank, of all calls so far
    int *offset;                // (local+1), host: expert e has rows offset[e] .. offset[e+1]-1
    // Rows at home, in travelling order: a round's are sent from here, all come back to here.
    act *home_x, *home_y;       // (capacity,C), one rank only: else x leaves from y's; (T*K,C)
    real *home_w, *home_dw;     // (T*K)
    // The same rows at their experts, grouped by expert. With one rank they stay at home: NULL.
    act *rows_x, *rows_y;       // (capacity,C)
    real *rows_w, *rows_dw;     // (capacity)
    void *staging;              // (capacity) rows and numbers, by the rank they come from
    // What an expert computes: n = max(capacity, T) rows, used by the shared expert too.
    MoeHidden hidden;
    act *h, *dv;                // (n,F); codes of h, then of d[g | v] (n,2F), in fp8
    real *u2;                   // (n,R) A h
    real *dh, *dx;              // (n,F), (capacity,C)
    // In fp8: tokens' x and dy, quantised; a layer's matrices as e4m3; rows widened for the
    // adapters; the adapters of w1 above w3, and their gradients; du.
    uint8_t *x8, *dy8, *codes;
    act *wide[2];               // (capacity, max(C,2F))
    real *stack, *dstack, *du;  // (stacked), (stacked), (capacity,2R)
    size_t stacked;
} MoeScratch;

static inline MoeHidden hidden_alloc(int class_, const MoeDims *d, size_t n) {
    MoeHidden h;
    h.g = MEM(act, class_, n * 2 * d->F);
    h.v = h.g ? h.g + n * d->F : NULL;
    h.u1 = MEM(real, class_, n * 2 * d->R);
    h.u3 = h.u1 ? h.u1 + n * d->R : NULL;
    return h;
}

// Rows that a rank works off in a round, in calls of at most T tokens per rank. With several ranks
// half again as many as even routing brings, so that most calls need one round. One rank knows how
// many rows there are; its rounds only bound the scratch, and are long enough to cost nothing.
enum { MOE_ROUND = 24576 };
static inline int moe_capacity(const MoeDims *d, int T) {
    const long slots = (long)T * d->K, even = slots + (slots + 1) / 2;
    const long capacity = comm_ep() > 1 ? even : slots < MOE_ROUND ? slots : MOE_ROUND;
    require(capacity < INT_MAX);
    return capacity > 0 ? (int)capacity : 1;
}

// keep: 2: the hidden rows too, so that the backward need not compute them again; 1, 2: x in fp8.
void moe_alloc_saved(MoeSaved *s, const MoeDims *d, int T, int keep) {
    memset(s, 0, sizeof *s);
    s->ids = MEM(int, MEM_ACTIVATIONS, (size_t)T * d->K);
    s->weights = MEM(real, MEM_ACTIVATIONS, (size_t)T * d->K);
    s->logits = MEM(real, MEM_ACTIVATIONS, (size_t)T * d->K);
    s->row_slot = MEM(int, MEM_ACTIVATIONS, (size_t)T * d->K);
    s->slot_row = MEM(int, MEM_ACTIVATIONS, (size_t)T * d->K);
    s->counts_h = mem.counting ? NULL : (int *)host_alloc(sizeof(int) * comm_ep() * d->E);
    if (keep && d->fp8) { s->x8 = MEM(uint8_t, MEM_ACTIVATIONS, fp8_bytes((size_t)T, d->C)); }
    if (keep < 2) { return; }
    s->experts = hidden_alloc(MEM_ACTIVATIONS, d, (size_t)moe_capacity(d, T));
    s->shared = hidden_alloc(MEM_ACTIVATIONS, d, (size_t)T);
}

static inline size_t larger(size_t a, size_t b) { return a > b ? a : b; }

// What is used in turn: the rows under way, and behind them dh, where the shared expert computes
// meanwhile; a layer's matrices in e4m3, of which w2 leaves dh alone; rows widened for adapters,
// and behind them the stacked gradients that they give; dx.
static inline void moe_alloc_turns(MoeScratch *x, const MoeDims *d, size_t staging, size_t dh,
                                   size_t dx) {
    const size_t C = d->C, F = d->F, codes = d->fp8 ? fp8_bytes(d->local * 2 * F, d->C) : 0;
    const size_t wide = d->fp8 ? x->rows[1] * larger(C, 2 * F) * sizeof(act) : 0;
    const size_t behind = (larger(staging, codes / 2) + 255) / 256 * 256;
    const size_t widened = 2 * wide + x->stacked * sizeof(real);
    uint8_t *at = mem_alloc(MEM_SCRATCH, larger(larger(behind + dh, dx), larger(codes, widened)));
    if (at == NULL) { return; }
    x->staging = x->codes = at;
    x->dh = (real *)(at + behind);
    x->dx = (real *)at;
    x->wide[0] = (act *)at;
    x->wide[1] = (act *)(at + wide);
    x->dstack = (real *)(at + 2 * wide);
}

// As moe_alloc_scratch, with any number of rows per round, the same on all ranks of the group. A
// layer that stays in bf16 where others work in fp8 has rounds of half as many rows, which are as
// many bytes: it takes more time, and no memory.
static inline void moe_alloc_rounds(MoeScratch *x, const MoeDims *d, int T, int training,
                                    int capacity) {
    const size_t slots = (size_t)T * d->K, group = (size_t)comm_ep() * d->E, C = d->C, F = d->F;
    require(capacity > 0 && comm_ep() * slots + capacity < INT_MAX);
    memset(x, 0, sizeof *x);
    x->T = T;
    x->rows[1] = capacity;
    x->rows[0] = d->fp8 ? (capacity + 1) / 2 : capacity;
    x->stacked = d->fp8 ? d->local * 2 * d->R * (C + 2 * F) : 0;
    x->capacity = (int)x->rows[d->fp8];
    const size_t n = larger(x->rows[0], T), most = larger(capacity, T), row = C * sizeof(act);
    const size_t away = comm_ep() > 1 ? capacity : 0, gates = training ? 2 * F : F;
    const size_t x_bytes = larger(x->rows[0] * row, d->fp8 ? fp8_bytes(capacity, d->C) : 0);
    x->logits = MEM(real, MEM_SCRATCH, (size_t)T * d->E);
    if (!mem.counting) {        // host memory, for as long as the process lives
        x->starts_h = (int *)host_alloc(sizeof(int) * (group + d->local + 1));
        x->offset = x->starts_h + group;
    }
    x->mine = MEM(int, MEM_SCRATCH, d->E);
    x->index = MEM(int, MEM_SCRATCH, slots);
    x->home_x = mem_alloc(MEM_SCRATCH, away ? 0 : x_bytes);
    x->home_y = MEM(act, MEM_SCRATCH, slots * C);
    x->home_w = MEM(real, MEM_SCRATCH, slots);
    x->rows_x = mem_alloc(MEM_SCRATCH, away ? x_bytes : 0);
    x->rows_y = MEM(act, MEM_SCRATCH, away * C);
    x->rows_w = MEM(real, MEM_SCRATCH, away);
    x->hidden = hidden_alloc(MEM_SCRATCH, d, most);
    x->h = mem_alloc(MEM_SCRATCH, larger(n * gates * sizeof(act),
                                         d->fp8 ? fp8_bytes(capacity, (int)gates) : 0));
    x->u2 = MEM(real, MEM_SCRATCH, most * d->R);
    x->stack = MEM(real, MEM_SCRATCH, x->stacked);
    x->x8 = MEM(uint8_t, MEM_SCRATCH, d->fp8 ? fp8_bytes(T, d->C) : 0);
    if (training) {
        x->home_dw = MEM(real, MEM_SCRATCH, slots);
        x->rows_dw = MEM(real, MEM_SCRATCH, away);
        x->dv = x->h ? x->h + n * F : NULL;
        x->dy8 = MEM(uint8_t, MEM_SCRATCH, d->fp8 ? fp8_bytes(T, d->C) : 0);
        x->du = MEM(real, MEM_SCRATCH, d->fp8 ? (size_t)capacity * 2 * d->R : 0);
    }
    const size_t dh = n * F * sizeof(real), dx = x->rows[0] * C * sizeof(real);
    moe_alloc_turns(x, d, away * (row + sizeof(real)), training ? dh : 0, training ? dx : 0);
}

// Scratch for calls of at most T tokens per rank, T equal on all ranks.
void moe_alloc_scratch(MoeScratch *s, const MoeDims *d, int T, int training) {
    moe_alloc_rounds(s, d, T, training, moe_capacity(d, T));
}

// -------------------------------------------------------------------------------------------------
// 5 Routers
//
// A router is a choice (ids) and a weighting. Two choices exist: a table by token id in the first
// layers, and the K best by score. Which score, and best of what, config.json says:
//
//     scoring_func   sqrtsoftplus  s = sqrt(log(1 + e^v))       DeepSeek-V4
//                    sigmoid       s = 1 / (1 + e^-v)           V3
//                    softmax       s = e^(v - log sum e^v)      V2
//     topk_method    noaux_tc      the largest s + bias; a group is as good as its two best
//                    greedy        the largest s
//                    group_limited_greedy      the same; a group is as good as its best
//
// With n_group > 1 only the experts of the topk_group best groups can be chosen: the others' choice
// is -inf, not 0, which would beat a negative one. The bias was tuned in pre-training to spread the
// load, in fp32; it must never reach the weights, and nothing trains or decays it.

// From a logit to its score. log1p keeps what exp(v) would lose next to 1; below -20 the root of
// softplus is exp(v/2) to 1e-9, and stays above zero long after softplus has underflowed in fp32.
// Of softmax, v is the logit after route_shift.
static inline real route_score_of(int score, real v) {
    if (score == SCORE_SIGMOID) { return 1 / (1 + exp(-v)); }
    if (score == SCORE_SOFTMAX) { return exp(v); }
    return v < -20 ? exp(v / 2) : sqrt((v > 0 ? v : 0) + log1p(exp(-fabs(v))));
}

// ds/dv: sigmoid' = s (1 - s); of the root sigmoid(v) / (2 s), whose limit below -20, where the
// quotient becomes 0/0, is s/2; of e^v itself, the rest of softmax is in route_backward.
static inline real route_slope(int score, real v, real s) {
    if (score == SCORE_SIGMOID) { return s * (1 - s); }
    if (score == SCORE_SOFTMAX) { return s; }
    return v < -20 ? s / 2 : 1 / ((1 + exp(-v)) * 2 * s);
}

// What is taken off the logits first: log sum e^v for softmax, nothing for the others.
static inline real route_shift(int score, const real *all, int E) {
    real most = all[0], sum = 0;
    if (score != SCORE_SOFTMAX) { return 0; }
    for (int e = 1; e < E; e++) { most = all[e] > most ? all[e] : most; }
    for (int e = 0; e < E; e++) { sum += exp(all[e] - most); }
    return most + log(sum);
}

// ids (K) = the experts with the largest choice (E), best first; equal ones: the smaller id first.
static inline void route_topk(int *ids, const real *choice, int E, int K) {
    for (int k = 0; k < K; k++) {
        ids[k] = -1;
        for (int e = 0; e < E; e++) {
            int taken = 0;
            for (int j = 0; j < k; j++) { taken |= ids[j] == e; }
            if (!taken && (ids[k] < 0 || choice[e] > choice[ids[k]])) { ids[k] = e; }
        }
    }
}

// Closes all but the best groups: their experts' choice (E) becomes -inf.
static inline void route_groups(real *choice, Routing how, int E) {
    int size = E / how.groups, open[how.kept];
    real rating[how.groups];
    for (int g = 0; g < how.groups; g++) {
        real first = -INFINITY, second = -INFINITY;
        for (int e = g * size; e < (g + 1) * size; e++) {
            if (choice[e] > first) { second = first; first = choice[e]; }
            else if (choice[e] > second) { second = choice[e]; }
        }
        rating[g] = how.greedy ? first : first + second;
    }
    route_topk(open, rating, how.groups, how.kept);
    for (int g = 0; g < how.groups; g++) {
        int is_open = 0;
        for (int k = 0; k < how.kept; k++) { is_open |= open[k] == g; }
        for (int e = g * size; e < (g + 1) * size && !is_open; e++) { choice[e] = -INFINITY; }
    }
}

// ids, weights, logits (T,K) from all (T,E), the router's logits; the kept ones are shifted.
// tid2eid (V,K) and tokens (T): hash-routed; else NULL, and bias (E), if there is one, is added for
// the choice. norm: weights are divided by their sum.
void route_forward(int *ids, real *weights, real *logits, const real *all, const float *bias,
                   const int *tid2eid, const int *tokens, Routing how, float scale, int norm,
                   int T, int E, int K) {
    GPU(route_forward_gpu(ids, weights, logits, all, bias, tid2eid, tokens, how, scale, norm, T, E,
                          K))
    #pragma omp parallel for schedule(static)
    for (int t = 0; t < T; t++) {
        const real *all_t = all + (size_t)t * E, shift = route_shift(how.score, all_t, E);
        real *logits_t = logits + (size_t)t * K, *weights_t = weights + (size_t)t * K;
        int *ids_t = ids + (size_t)t * K;
        if (tid2eid) {
            memcpy(ids_t, tid2eid + (size_t)tokens[t] * K, K * sizeof(int));
        } else {
            real choice[E];
            for (int e = 0; e < E; e++) {
                choice[e] = route_score_of(how.score, all_t[e] - shift) + (bias ? bias[e] : 0);
            }
            if (how.groups > 1) { route_groups(choice, how, E); }
            route_topk(ids_t, choice, E, K);
        }
        real sum = (real)1e-20;
        for (int k = 0; k < K; k++) {
            logits_t[k] = all_t[ids_t[k]] - shift;
            sum += weights_t[k] = route_score_of(how.score, logits_t[k]);
        }
        for (int k = 0; k < K; k++) { weights_t[k] = scale * weights_t[k] / (norm ? sum : 1); }
    }
}
TWIN(route_forward)

// Whether the backward needs the logits of all experts: a softmax passes gradients to those that
// were not chosen too, unless the weights are divided by their sum, which does not change when all
// scores change by one factor.
static inline int route_needs_all(Routing how, int norm) {
    return how.score == SCORE_SOFTMAX && !norm;
}

// dinp (T,C) += what the routing weights pass back to the router's input. dweights: gradient of
// each travelling row's weight; slot_row (T*K) says which row is whose; all (T,E): see above, or
// NULL. Otherwise only selected experts get a gradient: computing it for all of them is what makes
// NaN in implementations by autograd.
void route_backward(real *dinp, const real *dweights, const int *slot_row, const int *ids,
                    const real *weights, const real *logits, const real *all, const bf16 *gate,
                    Routing how, float scale, int norm, int T, int C, int E, int K) {
    GPU(route_backward_gpu(dinp, dweights, slot_row, ids, weights, logits, all, gate, how, scale,
                           norm, T, C, E, K))
    #pragma omp parallel for schedule(static)
    for (int t = 0; t < T; t++) {
        const int *row_t = slot_row + (size_t)t * K;
        const real *w_t = weights + (size_t)t * K, *logits_t = logits + (size_t)t * K;
        const real *all_t = all ? all + (size_t)t * E : NULL;
        const real shift = all ? route_shift(how.score, all_t, E) : 0;
        real sum = (real)1e-20, dot = 0;
        for (int k = 0; k < K; k++) {
            sum += route_score_of(how.score, logits_t[k]);
            dot += dweights[row_t[k]] * w_t[k];
        }
        for (int i = 0; i < K + (all ? E : 0); i++) {
            int e = i - K;
            // forward, softmax: s_e = e^(v_e - log sum e^v); so dv_e = s_e ds_e - s_e sum_k s_k
            // ds_k, and sum_k s_k ds_k = sum_k w_k dw_k: here the second term, of all experts
            real dv = i < K ? 0 : -dot * exp(all_t[e] - shift);
            if (i < K) {
                // forward: w_k = scale s_k / S with S = sum_j s_j, so
                // ds_k = (scale dw_k - sum_j dw_j w_j) / S; without the division scale dw_k
                real ds = scale * dweights[row_t[i]];
                if (norm) { ds = (ds - dot) / sum; }
                // forward: s = score(v), v = gate[e] . x
                dv = ds * route_slope(how.score, logits_t[i],
                                      route_score_of(how.score, logits_t[i]));
                e = ids[(size_t)t * K + i];
            }
            const bf16 *gate_e = gate + (size_t)e * C;
            real *dinp_t = dinp + (size_t)t * C;
            #pragma omp simd
            for (int c = 0; c < C; c++) { dinp_t[c] += dv * (real)float_from_bf16(gate_e[c]); }
        }
    }
}
TWIN(route_backward)

// -------------------------------------------------------------------------------------------------
// 6 The trip: which row goes where, in which round
//
// Imagine all rows that any rank of the group sends to one owner, in one queue: by expert, then by
// source, then by token. Round r is places [r*capacity, (r+1)*capacity) of that queue. Every rank
// knows how many rows each source has for each expert (one gather), so every rank can work out all
// queues, and the number of rounds, without asking again. Rows are put into travelling order once,
// by round, then expert: what a round sends is then contiguous, and contiguous by owner. With one
// rank that order is the queue itself: experts read the rows where they lie, and nothing is copied
// again. On a GPU all this costs the host one wait for E counts per layer, in the forward only.

// Rank r of a group owns experts moe_first(r) .. moe_first(r+1)-1.
static inline int moe_first(const MoeDims *d, int r) {
    return (int)((long)r * d->E / comm_ep());
}

// How many rows of source s for expert e travel in that round; *place: that of their first within
// the round's share of the owner's queue.
static inline int trip_rows(const MoeScratch *x, const MoeDims *d, int s, int e, int round,
                            int *place) {
    const size_t at = (size_t)s * d->E + e;
    int low = round * x->capacity, high = low + x->capacity;
    int begin = x->starts_h[at], end = begin + x->counts_h[at];
    begin = begin > low ? begin : low;
    end = end < high ? end : high;
    *place = begin - low;
    return begin < end ? end - begin : 0;
}

// counts (E): how many of ids (slots) are e. index (slots): how many equal ones stand before each.
void trip_count(int *counts, int *index, const int *ids, int slots, int E) {
    GPU(trip_count_gpu(counts, index, ids, slots, E))
    memset(counts, 0, E * sizeof(int));
    for (int i = 0; i < slots; i++) { index[i] = counts[ids[i]]++; }
}
TWIN(trip_count)

// Fills row_slot and slot_row for the slots of one round: those of expert e whose index is from[e]
// to from[e] + count[e] - 1 become the rows to[e] and on. With all rounds, a stable counting sort.
void trip_sort(int *row_slot, int *slot_row, const int *ids, const int *index, Runs runs,
               int slots) {
    GPU(trip_sort_gpu(row_slot, slot_row, ids, index, runs, slots))
    for (int slot = 0; slot < slots; slot++) {
        int e = ids[slot], i = index[slot] - runs.from[e];
        if (i < 0 || i >= runs.count[e]) { continue; }
        row_slot[runs.to[e] + i] = slot;
        slot_row[slot] = runs.to[e] + i;
    }
}
TWIN(trip_sort)

// Plans the trip of T tokens: queues, rounds and, from s->ids, this rank's counts and travelling
// order, which the backward (again) finds in s. Joined by ranks without tokens too.
static inline void trip_begin(MoeScratch *x, const MoeDims *d, MoeSaved *s, int T, int again) {
    const int ep = comm_ep(), me = comm_ep_rank(), E = d->E, slots = T * d->K;
    int *mine = s->counts_h + (size_t)me * E;
    require(T <= x->T && E <= RUNS_MAX && d->first == moe_first(d, me)
            && d->first + d->local == moe_first(d, me + 1));
    if (!again) {
        trip_count(x->mine, x->index, s->ids, slots, E);
        download(mine, x->mine, sizeof(int) * (size_t)E);
        comm_gather_int(COMM_EP, s->counts_h, mine, E, "moe counts");
    }
    x->counts_h = s->counts_h;
    int most = x->rounds = 0;
    for (int owner = 0; owner < ep; owner++) {
        int queue = 0;
        for (int e = moe_first(d, owner); e < moe_first(d, owner + 1); e++) {
            for (int i = 0; i < ep; i++) {
                x->starts_h[(size_t)i * E + e] = queue;
                queue += x->counts_h[(size_t)i * E + e];
            }
        }
        int rounds = (queue + x->capacity - 1) / x->capacity;
        x->rounds = rounds > x->rounds ? rounds : x->rounds;
        most = queue > most ? queue : most;
        x->mean += (double)queue / ep;
    }
    x->fullest += most;
    for (int round = 0, row = 0; !again && round < x->rounds; round++) {
        Runs runs = { .n = E };
        for (int e = 0; e < E; e++) {
            runs.to[e] = row;
            row += runs.count[e] = trip_rows(x, d, me, e, round, &runs.from[e]);
            runs.from[e] += round * x->capacity - x->starts_h[(size_t)me * E + e];
        }
        trip_sort(s->row_slot, s->slot_row, s->ids, x->index, runs, slots);
    }
}

// Turns to that round (in order, from 0): whom this rank sends how much, what it will hold, and the
// runs (s, e) of what arrives: those of source s for expert e.
static inline void trip_round(MoeScratch *x, const MoeDims *d, int round) {
    const int ep = comm_ep(), me = comm_ep_rank();
    int place, arrived = 0;
    x->home_at = round == 0 ? 0 : x->home_at + x->home_rows;
    x->home_rows = x->runs.n = 0;
    memset(x->offset, 0, (d->local + 1) * sizeof(int));
    for (int r = 0; r < ep; r++) {
        x->to[r] = x->from[r] = 0;
        for (int e = moe_first(d, r); e < moe_first(d, r + 1); e++) {
            x->to[r] += trip_rows(x, d, me, e, round, &place);
        }
        for (int i = 0; i < d->local; i++) {
            int n = trip_rows(x, d, r, d->first + i, round, &place), run = x->runs.n++;
            x->runs.from[run] = arrived;
            x->runs.to[run] = place;
            arrived += x->runs.count[run] = n;
            x->from[r] += n;
            x->offset[i + 1] += n;
        }
        x->home_rows += x->to[r];
    }
    for (int i = 0; i < d->local; i++) { x->offset[i + 1] += x->offset[i]; }
}

// home[row] = inp of the token that row belongs to, n rows: the only copy a row needs on one rank.
void pack_rows(void *home, const void *inp, const int *row_slot, int n, int K, size_t row_bytes) {
    GPU(pack_rows_gpu(home, inp, row_slot, n, K, row_bytes))
    #pragma omp parallel for schedule(static)
    for (int row = 0; row < n; row++) {
        memcpy((uint8_t *)home + row * row_bytes,
               (const uint8_t *)inp + (row_slot[row] / K) * row_bytes, row_bytes);
    }
}
TWIN(pack_rows)

// home[row] = weights[its slot], n rows.
void pack_weights(real *home, const real *weights, const int *row_slot, int n) {
    GPU(pack_weights_gpu(home, weights, row_slot, n))
    for (int row = 0; row < n; row++) { home[row] = weights[row_slot[row]]; }
}
TWIN(pack_weights)

// Reorders a round's rows: BY_EXPERT from the order in which they arrive, BY_SOURCE back to it.
void regroup_rows(void *out, const void *inp, Runs runs, int order, size_t row_bytes) {
    GPU(regroup_rows_gpu(out, inp, runs, order, row_bytes))
    for (int i = 0; i < runs.n; i++) {
        size_t from = order == BY_EXPERT ? runs.from[i] : runs.to[i];
        size_t to = order == BY_EXPERT ? runs.to[i] : runs.from[i];
        memcpy((unsigned char *)out + to * row_bytes, (const unsigned char *)inp + from * row_bytes,
               runs.count[i] * row_bytes);
    }
}
TWIN(regroup_rows)

// Where rows lie at their experts: at home with one rank, else in `rows`.
static inline void *trip_place(void *home, void *rows) { return comm_ep() == 1 ? home : rows; }

// One leg of a trip: so many rows from and to each rank.
static inline void trip_leg(void *recv, const int *from, const void *send, const int *to,
                            size_t row_bytes, const char *phase) {
    size_t send_bytes[COMM_RANKS_MAX] = {0}, recv_bytes[COMM_RANKS_MAX] = {0};
    for (int r = 0; r < comm_ep(); r++) {
        send_bytes[r] = to[r] * row_bytes;
        recv_bytes[r] = from[r] * row_bytes;
        phases.sent += r == comm_ep_rank() ? 0 : send_bytes[r];
    }
    comm_all_to_all(COMM_EP, recv, recv_bytes, send, send_bytes, phase);
}

// Sends this round's rows, which begin at home, to their experts, and one number of each, if home_w
// is given. Returns the rows that arrive, by expert; their numbers are then at trip_place.
static inline void *trip_there(void *rows, void *home, size_t row_bytes, real *rows_w,
                               const real *home_w, MoeScratch *x, const char *phase) {
    if (comm_ep() == 1) { return home; }
    real *numbers = (real *)((unsigned char *)x->staging + x->capacity * row_bytes);
    comm_batch(1, phase);
    trip_leg(x->staging, x->from, home, x->to, row_bytes, phase);
    if (home_w) { trip_leg(numbers, x->from, home_w, x->to, sizeof(real), phase); }
    comm_batch(0, phase);
    regroup_rows(rows, x->staging, x->runs, BY_EXPERT, row_bytes);
    if (home_w) { regroup_rows(rows_w, numbers, x->runs, BY_EXPERT, sizeof(real)); }
    return rows;
}

// Brings results, by expert, back to home: the same trip with the splits swapped.
static inline void trip_back(void *home, const void *rows, size_t row_bytes, real *home_w,
                             const real *rows_w, MoeScratch *x, const char *phase) {
    if (comm_ep() == 1) { return; }
    real *numbers = (real *)((unsigned char *)x->staging + x->capacity * row_bytes);
    regroup_rows(x->staging, rows, x->runs, BY_SOURCE, row_bytes);
    if (home_w) { regroup_rows(numbers, rows_w, x->runs, BY_SOURCE, sizeof(real)); }
    comm_batch(1, phase);
    trip_leg(home, x->to, x->staging, x->from, row_bytes, phase);
    if (home_w) { trip_leg(home_w, x->to, numbers, x->from, sizeof(real), phase); }
    comm_batch(0, phase);
}

// What travels of a token: its row, or codes and, behind those of all rows, scales. It is quantised
// once, before it is copied for its experts.
typedef struct { const void *rows, *scales; size_t row, scale; } Payload;   // sizes in bytes

static inline Payload payload(const act *inp, uint8_t *room, int kept, float floor, int T, int C) {
    const Fp8Rows q = fp8_rows(room, (size_t)T, C);
    if (room == NULL) { return (Payload){ inp, NULL, C * sizeof(act), 0 }; }
    phase(PHASE_CASTS);
    if (!kept) { phases.sum.casts++; quantize_rows_fp8(q.codes, q.scales, inp, floor, T, C); }
    return (Payload){ q.codes, q.scales, (size_t)C, (size_t)(C / FP8_BLOCK) };
}

// pack_rows and trip_there of all of a payload: n rows to send, those of the tokens of row_slot.
static inline void *payload_there(void *rows, void *home, Payload p, const int *row_slot, int n,
                                  int K, real *rows_w, const real *home_w, MoeScratch *x,
                                  const MoeDims *d, const char *phase) {
    uint8_t *scales = (uint8_t *)home + n * p.row;
    pack_rows(home, p.rows, row_slot, n, K, p.row);
    if (p.scale) { pack_rows(scales, p.scales, row_slot, n, K, p.scale); }
    uint8_t *there = trip_there(rows, home, p.row, rows_w, home_w, x, phase);
    uint8_t *there_scales = there + x->offset[d->local] * p.row;
    if (p.scale) { trip_there(there_scales, scales, p.scale, NULL, NULL, x, phase); }
    return there;
}

// -------------------------------------------------------------------------------------------------
// 7 The experts of this rank, the shared expert, combine
//
// An expert is two products into a wide space, a gate, and one product back. g and v are kept for
// the backward if there is room; else it computes them again from the rows, which is two thirds of
// the forward's work and saves more memory than anything else in the layer would. h always is.

// Where this round's g and v go. They are kept only if there is one round of as many rows as fit.
static inline MoeHidden *experts_place(MoeSaved *s, MoeScratch *x, const MoeDims *d) {
    const int fits = x->rounds == 1 && x->offset[d->local] <= moe_capacity(d, x->T);
    return s->experts.g && fits ? &s->experts : &x->hidden;
}

// y (n,C) = the experts' outputs for the rows (n,C) that arrived; n = offset[local]. NULL: only
// what the backward (again) needs: h (n,F) = weight silu(w1 x) (w3 x), clamped, and u2.
// again: the backward's call, for which g and v may have been kept.
static inline void experts_forward(act *y, MoeHidden *k, MoeScratch *x, const void *rows,
                                   const real *weight, const MoeWeights *w, const MoeDims *d,
                                   int again) {
    if (!again || k == &x->hidden) {
        lora_experts_forward(k->g, k->u1, rows, x->offset, w->w1, w->s1, w->e1.a, w->e1.b,
                             d->lora_scale, d->local, d->C, d->F, d->R);
        lora_experts_forward(k->v, k->u3, rows, x->offset, w->w3, w->s3, w->e3.a, w->e3.b,
                             d->lora_scale, d->local, d->C, d->F, d->R);
    }
    swiglu_forward(x->h, k->g, k->v, weight, d->limit, x->offset[d->local], d->F);
    if (y) {
        lora_experts_forward(y, x->u2, x->h, x->offset, w->w2, w->s2, w->e2.a, w->e2.b,
                             d->lora_scale, d->local, d->F, d->C, d->R);
    } else {
        lora_experts_down(x->u2, x->h, x->offset, w->e2.a, d->local, d->F, d->R);
    }
}

static inline MoeHidden *shared_place(MoeSaved *s, MoeScratch *x) {
    return s->shared.g ? &s->shared : &x->hidden;
}
// x->h of the shared expert: every token of inp (T,C), no weight. Its w2 is the caller's.
static inline void shared_hidden(MoeHidden *k, MoeScratch *x, const act *inp, const MoeWeights *w,
                                 const MoeDims *d, int T, int again) {
    if (!again || k == &x->hidden) {
        lora_linear_forward(k->g, k->u1, inp, w->sh_w1, w->sh_s1, w->l1.a, w->l1.b, d->lora_scale,
                            T, d->C, d->F, d->R);
        lora_linear_forward(k->v, k->u3, inp, w->sh_w3, w->sh_s3, w->l3.a, w->l3.b, d->lora_scale,
                            T, d->C, d->F, d->R);
    }
    swiglu_forward(x->h, k->g, k->v, NULL, d->limit, T, d->F);
}

// Gradients of the rows (n,C) that arrived, from dy (n,C): dx (n,C) as act, overwriting dy, and
// dweight (n). Adapter gradients +=.
static inline void experts_backward(void *dy, real *dweight, const void *rows, const real *weight,
                                    MoeHidden *k, const MoeWeights *w, const MoeDims *d,
                                    MoeScratch *x) {
    const int n = x->offset[d->local], E = d->local, C = d->C, F = d->F, R = d->R;
    const float s = d->lora_scale;
    phase_in(PHASE_EXPERTS, PASS_AGAIN);
    experts_forward(NULL, k, x, rows, weight, w, d, 1);
    phase_in(PHASE_EXPERTS, PASS_BACKWARD);
    // forward: y = w2 h
    zero(x->dh, (size_t)n * F * sizeof(real));
    lora_experts_backward(x->dh, w->e2.da, w->e2.db, dy, x->h, x->u2, x->offset, w->w2, w->s2,
                          w->e2.a, w->e2.b, s, E, F, C, R);
    // forward: h = weight silu(min(g, L)) clamp(v, -L, L)
    act *dg = x->h, *dv = x->dv;            // h has done its work
    swiglu_backward(dg, dv, dweight, x->dh, k->g, k->v, weight, d->limit, n, F);
    // forward: g = w1 x, v = w3 x
    zero(x->dx, (size_t)n * C * sizeof(real));
    lora_experts_backward(x->dx, w->e1.da, w->e1.db, dg, rows, k->u1, x->offset, w->w1, w->s1,
                          w->e1.a, w->e1.b, s, E, C, F, R);
    lora_experts_backward(x->dx, w->e3.da, w->e3.db, dv, rows, k->u3, x->offset, w->w3, w->s3,
                          w->e3.a, w->e3.b, s, E, C, F, R);
    // A gradient travels in the same width as an activation. It is rounded at home too, so that
    // bits do not depend on the number of ranks.
    narrow(dy, x->dx, (size_t)n * C);
}

// ---- 7.1 The same in fp8
//
// Rows arrive as codes and stay codes: each product reads codes and scales, and the SwiGLU writes
// them. The layer's matrices are recast to e4m3 where they are used, w1 above w3; for a gradient,
// turned. Adapters read the numbers that the codes stand for, in the backward as in the forward:
// theirs is the gradient of the function that was computed.

// Whether the experts of this layer work in fp8; all ranks say the same.
static inline int moe_fp8(const MoeWeights *w, const MoeDims *d) { return d->fp8 && !w->wide; }

// x->codes = w1 above w3 (E,2F,C) or, if second, w2 (E,C,F); if turned, their transposes. Returns
// codes and scales.
static inline Fp8Rows recast_layer(MoeScratch *x, const MoeWeights *w, const MoeDims *d, int second,
                                   int turned) {
    const int E = d->local, C = d->C, F = d->F;
    const size_t n = (size_t)E * (second ? 1 : 2) * F * C;
    const Fp8Rows m = { x->codes, x->codes + n };
    if (second) { recast_fp4(m.codes, m.scales, w->w2, w->s2, turned, 0, C, x->offset, E, F, C); }
    for (int i = 0; !second && i < 2; i++) {
        recast_fp4(m.codes, m.scales, i ? w->w3 : w->w1, i ? w->s3 : w->s1, turned, i * F, 2 * F,
                   x->offset, E, C, F);
    }
    return m;
}

// As experts_forward, of rows of codes. Without y, x->wide[0] is left with h.
static inline void experts_forward_fp8(act *y, MoeHidden *k, MoeScratch *x, const void *rows,
                                       const real *weight, const MoeWeights *w, const MoeDims *d,
                                       int again) {
    const int n = x->offset[d->local], E = d->local, C = d->C, F = d->F, R = d->R;
    const Fp8Rows x8 = fp8_rows(rows, (size_t)n, C), h8 = fp8_rows(x->h, (size_t)n, F);
    const real *a = x->stack, *b = a + (size_t)E * 2 * R * C;
    lora_stack(x->stack, w->e1.a, w->e1.b, w->e3.a, w->e3.b, 0, E, C, F, R);
    if (!again || k == &x->hidden) {
        widen_rows_fp8(x->wide[0], x8.codes, x8.scales, n, C);
        lora_experts_down(k->u1, x->wide[0], x->offset, a, E, C, 2 * R);
        const Fp8Rows m = recast_layer(x, w, d, 0, 0);
        experts_fp8_product(k->g, x8.codes, x8.scales, x->offset, m.codes, m.scales, k->u1, b, 0,
                            d->lora_scale, E, C, 2 * F, 2 * R);
    }
    swiglu_quantize_forward(h8.codes, h8.scales, k->g, weight, d->limit, FP8_FLOOR, n, F);
    widen_rows_fp8(x->wide[0], h8.codes, h8.scales, n, F);
    lora_experts_down(x->u2, x->wide[0], x->offset, w->e2.a, E, F, R);
    if (y) {
        const Fp8Rows m = recast_layer(x, w, d, 1, 0);
        experts_fp8_product(y, h8.codes, h8.scales, x->offset, m.codes, m.scales,
                            w->e2.b ? x->u2 : NULL, w->e2.b, 0, d->lora_scale, E, F, C, R);
    }
}

// As experts_backward: dy (n,C) comes as codes, and is overwritten with dx as act.
static inline void experts_backward_fp8(void *dy, real *dweight, const void *rows,
                                        const real *weight, MoeHidden *k, const MoeWeights *w,
                                        const MoeDims *d, MoeScratch *x) {
    const int n = x->offset[d->local], E = d->local, C = d->C, F = d->F, R = d->R;
    const size_t at_b = (size_t)E * 2 * R * C;
    const Fp8Rows x8 = fp8_rows(rows, (size_t)n, C), dy8 = fp8_rows(dy, (size_t)n, C);
    const Fp8Rows dgv8 = fp8_rows(x->h, (size_t)n, 2 * F);      // h has done its work
    const float s = d->lora_scale;
    act *dh = (act *)x->dh;
    phase_in(PHASE_EXPERTS, PASS_AGAIN);
    experts_forward_fp8(NULL, k, x, rows, weight, w, d, 1);
    phase_in(PHASE_EXPERTS, PASS_BACKWARD);
    // forward: y = w2 h + s B (A h)
    widen_rows_fp8(x->wide[1], dy8.codes, dy8.scales, n, C);
    lora_experts_gradients(x->du, w->e2.da, w->e2.db, x->wide[1], x->wide[0], x->u2, x->offset,
                           w->e2.b, s, E, F, C, R);
    const Fp8Rows w2 = recast_layer(x, w, d, 1, 1);
    experts_fp8_product(dh, dy8.codes, dy8.scales, x->offset, w2.codes, w2.scales,
                        w->e2.a ? x->du : NULL, w->e2.a, 1, 1, E, C, F, R);
    // forward: h = weight silu(min(g, L)) clamp(v, -L, L)
    swiglu_quantize_backward(dgv8.codes, dgv8.scales, dweight, dh, k->g, weight, d->limit, n, F);
    // forward: [g | v] = [w1; w3] x, with adapters of rank 2R
    widen_rows_fp8(x->wide[1], dgv8.codes, dgv8.scales, n, 2 * F);
    widen_rows_fp8(x->wide[0], x8.codes, x8.scales, n, C);
    zero(x->dstack, x->stacked * sizeof(real));
    lora_experts_gradients(x->du, x->dstack, x->dstack + at_b, x->wide[1], x->wide[0], k->u1,
                           x->offset, x->stack + at_b, s, E, C, 2 * F, 2 * R);
    lora_stack(x->dstack, w->e1.da, w->e1.db, w->e3.da, w->e3.db, 1, E, C, F, R);
    const Fp8Rows w13 = recast_layer(x, w, d, 0, 1);
    experts_fp8_product((act *)dy, dgv8.codes, dgv8.scales, x->offset, w13.codes, w13.scales,
                        x->du, x->stack, 1, 1, E, 2 * F, C, 2 * R);
}

// dinp (T,C) += gradient through the shared expert. Adapter gradients +=.
static inline void shared_backward(real *dinp, const act *dout, const act *inp, MoeHidden *k,
                                   const MoeWeights *w, const MoeDims *d, MoeScratch *x, int T) {
    const int C = d->C, F = d->F, R = d->R, all[2] = { 0, T };
    const float s = d->lora_scale;
    phase_in(PHASE_SHARED, PASS_AGAIN);
    shared_hidden(k, x, inp, w, d, T, 1);
    lora_experts_down(x->u2, x->h, all, w->l2.a, 1, F, R);
    phase_in(PHASE_SHARED, PASS_BACKWARD);
    // forward: y = w2 h
    zero(x->dh, (size_t)T * F * sizeof(real));
    lora_linear_backward(x->dh, w->l2.da, w->l2.db, dout, x->h, x->u2, w->sh_w2, w->sh_s2,
                         w->l2.a, w->l2.b, s, T, F, C, R);
    // forward: h = silu(min(g, L)) clamp(v, -L, L)
    act *dg = x->h, *dv = x->dv;
    swiglu_backward(dg, dv, NULL, x->dh, k->g, k->v, NULL, d->limit, T, F);
    // forward: g = w1 x, v = w3 x
    lora_linear_backward(dinp, w->l1.da, w->l1.db, dg, inp, k->u1, w->sh_w1, w->sh_s1, w->l1.a,
                         w->l1.b, s, T, C, F, R);
    lora_linear_backward(dinp, w->l3.da, w->l3.db, dv, inp, k->u3, w->sh_w3, w->sh_s3, w->l3.a,
                         w->l3.b, s, T, C, F, R);
}

enum { COMBINE_TILE = 256 };            // channels summed at a time, in registers and first cache

// sum (n) = rows slot_row[0..K-1] of home (T*K,C), columns c .. c+n-1, added in slot order: the
// order has nothing to do with where, or in which round, a row was worked on.
static inline void combine_rows(real *sum, const act *home, const int *slot_row, int K, int C,
                                int c, int n) {
    memset(sum, 0, n * sizeof(real));
    for (int k = 0; k < K; k++) {
        const act *row = home + (size_t)slot_row[k] * C + c;
        #pragma omp simd
        for (int j = 0; j < n; j++) { sum[j] += ld(&row[j]); }
    }
}

// out (T,C) = sum_k y_k + out, where out holds the shared expert's output. Rounded once.
void combine_forward(act *out, const act *home_y, const int *slot_row, int T, int K, int C) {
    GPU(combine_forward_gpu(out, home_y, slot_row, T, K, C))
    #pragma omp parallel for schedule(static)
    for (int t = 0; t < T; t++) {
        real sum[COMBINE_TILE];
        for (int c = 0; c < C; c += COMBINE_TILE) {
            int n = C - c < COMBINE_TILE ? C - c : COMBINE_TILE;
            act *out_t = out + (size_t)t * C + c;
            combine_rows(sum, home_y, slot_row + (size_t)t * K, K, C, c, n);
            for (int j = 0; j < n; j++) { st(&out_t[j], sum[j] + ld(&out_t[j])); }
        }
    }
}
TWIN(combine_forward)

// dinp (T,C) += sum_k dx_k: the token was copied to its K rows, so their gradients add up.
void dispatch_backward(real *dinp, const act *home_dx, const int *slot_row, int T, int K, int C) {
    GPU(dispatch_backward_gpu(dinp, home_dx, slot_row, T, K, C))
    #pragma omp parallel for schedule(static)
    for (int t = 0; t < T; t++) {
        real sum[COMBINE_TILE];
        for (int c = 0; c < C; c += COMBINE_TILE) {
            int n = C - c < COMBINE_TILE ? C - c : COMBINE_TILE;
            real *dinp_t = dinp + (size_t)t * C + c;
            combine_rows(sum, home_dx, slot_row + (size_t)t * K, K, C, c, n);
            for (int j = 0; j < n; j++) { dinp_t[j] += sum[j]; }
        }
    }
}
TWIN(dispatch_backward)

// -------------------------------------------------------------------------------------------------
// 8 The layer
//
// Forward: route, send x, compute, bring y back, add. Backward: send x and dy the same way, bring
// dx and dw back. While rows travel, GPUs work on the shared expert, which needs none. All ranks of
// an expert group call both together, those without tokens too: visitors may come to their experts.

// out (T,C) = sum_k y_k + shared expert, of inp (T,C). tokens (T): vocabulary ids, for hash-routed
// layers. Fills s. count_h (E), if given, += this rank's rows for each expert.
void moe_forward(act *out, MoeSaved *s, const act *inp, const int *tokens, const MoeWeights *w,
                 const MoeDims *d, MoeScratch *x, long *count_h, int T) {
    const int C = d->C, F = d->F, R = d->R, slots = T * d->K, fp8 = moe_fp8(w, d);
    const size_t row = C * sizeof(act);
    const Payload tokens_x = payload(inp, fp8 ? s->x8 ? s->x8 : x->x8 : NULL, 0, FP8_FLOOR, T, C);
    x->capacity = (int)x->rows[fp8];
    phase(PHASE_ROUTE);
    linear_bf16_forward(x->logits, inp, w->gate, T, C, d->E);
    route_forward(s->ids, s->weights, s->logits, x->logits, w->bias, w->tid2eid, tokens,
                  d->how, d->route_scale, d->norm_topk, T, d->E, d->K);
    phase(PHASE_EXCHANGE);
    trip_begin(x, d, s, T, 0);
    const int *mine = s->counts_h + (size_t)comm_ep_rank() * d->E;
    for (int e = 0; count_h && e < d->E; e++) { count_h[e] += mine[e]; }

    phase(PHASE_ROUTE);
    pack_weights(x->home_w, s->weights, s->row_slot, slots);
    for (int round = 0; round < x->rounds; round++) {
        trip_round(x, d, round);
        act *home_y = x->home_y + (size_t)x->home_at * C, *y = trip_place(home_y, x->rows_y);
        real *home_w = x->home_w + x->home_at, *weight = trip_place(home_w, x->rows_w);
        act *home_x = trip_place(x->home_x, home_y);
        phase(PHASE_EXCHANGE);
        const void *rows = payload_there(x->rows_x, home_x, tokens_x, s->row_slot + x->home_at,
                                         x->home_rows, d->K, weight, home_w, x, d, "moe x");
        phase(PHASE_EXPERTS);
        (fp8 ? experts_forward_fp8 : experts_forward)(y, experts_place(s, x, d), x, rows, weight,
                                                      w, d, 0);
        phase(PHASE_EXCHANGE);
        aside(ASIDE_BEGIN);
        trip_back(home_y, y, row, NULL, NULL, x, "moe y");
        aside(ASIDE_END);
        if (round + 1 < x->rounds) { aside(ASIDE_JOIN); }
    }
    phase(PHASE_SHARED);
    shared_hidden(shared_place(s, x), x, inp, w, d, T, 0);
    lora_linear_forward(out, x->u2, x->h, w->sh_w2, w->sh_s2, w->l2.a, w->l2.b, d->lora_scale, T,
                        F, C, R);
    phase(PHASE_EXCHANGE);
    aside(ASIDE_JOIN);
    phase(PHASE_ROUTE);
    combine_forward(out, x->home_y, s->slot_row, T, d->K, C);
}

// dinp (T,C) += gradient of inp, through the routing weights, the routed and the shared experts;
// adapter gradients +=. dout (T,C); s and inp (T,C) as in the forward.
void moe_backward(real *dinp, const act *dout, MoeSaved *s, const act *inp, const MoeWeights *w,
                  const MoeDims *d, MoeScratch *x, int T) {
    const int C = d->C, slots = T * d->K, fp8 = moe_fp8(w, d);
    const size_t row = C * sizeof(act);
    require(x->home_dw != NULL || x->T == 0);       // scratch of a training run
    x->capacity = (int)x->rows[fp8];
    uint8_t *x8 = fp8 ? s->x8 ? s->x8 : x->x8 : NULL;
    const Payload tokens_x = payload(inp, x8, s->x8 != NULL, FP8_FLOOR, T, C);
    const Payload tokens_dy = payload(dout, fp8 ? x->dy8 : NULL, 0, 0, T, C);
    phase(PHASE_EXCHANGE);
    trip_begin(x, d, s, T, 1);
    phase(PHASE_ROUTE);
    pack_weights(x->home_w, s->weights, s->row_slot, slots);
    for (int round = 0; round < x->rounds; round++) {
        trip_round(x, d, round);
        const int *row_slot = s->row_slot + x->home_at;
        act *home_y = x->home_y + (size_t)x->home_at * C;
        real *home_w = x->home_w + x->home_at, *weight = trip_place(home_w, x->rows_w);
        real *home_dw = x->home_dw + x->home_at, *dweight = trip_place(home_dw, x->rows_dw);
        act *home_x = trip_place(x->home_x, home_y);
        phase(PHASE_EXCHANGE);
        aside(ASIDE_BEGIN);
        const void *rows = payload_there(x->rows_x, home_x, tokens_x, row_slot, x->home_rows, d->K,
                                         weight, home_w, x, d, "moe x again");
        // forward: out = sum_k y_k + shared, so every row's dy is its token's dout
        void *dy = payload_there(x->rows_y, home_y, tokens_dy, row_slot, x->home_rows, d->K, NULL,
                                 NULL, x, d, "moe dy");
        aside(ASIDE_END);
        if (round == 0) { shared_backward(dinp, dout, inp, shared_place(s, x), w, d, x, T); }
        phase(PHASE_EXCHANGE);
        aside(ASIDE_JOIN);
        (fp8 ? experts_backward_fp8 : experts_backward)(dy, dweight, rows, weight,
                                                        experts_place(s, x, d), w, d, x);
        phase(PHASE_EXCHANGE);
        trip_back(home_y, dy, row, home_dw, dweight, x, "moe dx");      // in place of dy it sent
    }
    phase(PHASE_ROUTE);
    const real *all = route_needs_all(d->how, d->norm_topk) ? x->logits : NULL;
    if (all) { linear_bf16_forward(x->logits, inp, w->gate, T, C, d->E); }
    route_backward(dinp, x->home_dw, s->slot_row, s->ids, s->weights, s->logits, all, w->gate,
                   d->how, d->route_scale, d->norm_topk, T, C, d->E, d->K);
    dispatch_backward(dinp, x->home_y, s->slot_row, T, d->K, C);
}
#endif // MOE_C
