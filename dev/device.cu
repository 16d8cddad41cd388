// device.cu: what the host asks of the device, and of the other GPUs. No kernels: those are in
// kernels.cu, which includes this file where its helpers are known, and whose contract (1.4)
// declares every function here.
//
//   1 the device: start, memory, copies, times
//   2 other GPUs: NCCL's sends and receives, and sums made of them
//
// Nothing here decides anything. What is kept on the device, which ranks there are and what they
// send each other is in kernels.cu (1.5, memory) and in moe.c.
#ifndef DEVICE_CU
#define DEVICE_CU

// -------------------------------------------------------------------------------------------------
// 1 The device: start, memory, copies, times
//
// One process drives one GPU. Copies are ordered after the kernels before them; a download waits.

int on_gpu;                         // 1: the program's operations jump to their kernels

// The GPUs that there are, and how many of them this program can use: Hoppers, since it is built
// for sm_90a, and without NCCL one. With others among them, none: a rank's number says which it
// takes.
extern "C" void gpu_count(int *n_h, int *there_h) {
    if (cudaGetDeviceCount(there_h) != cudaSuccess) { *there_h = 0; }
    *n_h = *there_h;
    for (int i = 0, major; i < *there_h; i++) {
        cudaCheck(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, i));
        if (major != 9) { *n_h = 0; }
    }
#ifndef USE_NCCL
    if (*n_h > 1) { *n_h = 1; }
#endif
}

static int own_device;

// Takes the device, for this thread, and makes the C text jump. name_h: room for its name.
extern "C" void gpu_start(int device, char *name_h, size_t size) {
    cudaDeviceProp properties;
    own_device = device;
    cudaCheck(cudaSetDevice(device));
    cudaCheck(cudaGetDeviceProperties(&properties, device));
    snprintf(name_h, size, "%s", properties.name);
    int least, most;
    cudaCheck(cudaDeviceGetStreamPriorityRange(&least, &most));
    cudaCheck(cudaStreamCreateWithPriority(&main_stream, cudaStreamNonBlocking, least));
    cudaCheck(cudaStreamCreateWithPriority(&side_stream, cudaStreamNonBlocking, most));
    cudaCheck(cudaEventCreateWithFlags(&side_from, cudaEventDisableTiming));
    cudaCheck(cudaEventCreateWithFlags(&side_done, cudaEventDisableTiming));
    stream = main_stream;
    blasCheck(cublasCreate(&blas));
    blasCheck(cublasSetStream(blas, stream));
    on_gpu = 1;
}

extern "C" void gpu_alloc(void **p, size_t bytes) {
    *p = NULL;
    const cudaError_t error = cudaMalloc(p, bytes);
    if (error == cudaErrorMemoryAllocation) { (void)cudaGetLastError(); return; }   // p says it
    cudaCheck(error);
    cudaCheck(cudaMemsetAsync(*p, 0, bytes, stream));       // before all that will use it
}

extern "C" void gpu_free(void *p) {
    streamWait();
    cudaCheck(cudaFree(p));
}

// What launchers may use inside themselves; base lies in an arena. cuBLAS gets its part of it.
extern "C" void gpu_workspace(void *base, size_t bytes) {
    const size_t own = 32 << 20;
    gpuRequire(bytes > own);
    blasCheck(cublasSetWorkspace(blas, base, own));
    work.base = (unsigned char *)base + own;
    work.size = bytes - own;
    work.used = work.peak = 0;
}

extern "C" void gpu_zero(void *p, size_t bytes) { cudaCheck(cudaMemsetAsync(p, 0, bytes, stream)); }

// Also called by the threads that load a checkpoint: each has to say which device it means, or it
// would begin a context of 1 GiB on device 0.
extern "C" void gpu_upload(void *to, const void *from_h, size_t bytes) {
    cudaCheck(cudaSetDevice(own_device));
    cudaCheck(cudaMemcpyAsync(to, from_h, bytes, cudaMemcpyHostToDevice, stream));
    streamWait();
}

extern "C" void gpu_download(void *to_h, const void *from, size_t bytes) {
    cudaCheck(cudaMemcpyAsync(to_h, from, bytes, cudaMemcpyDeviceToHost, stream));
    streamWait();
}

extern "C" void gpu_sync(void) { streamWait(); }

// Between ASIDE_BEGIN and ASIDE_END kernels go to the side stream, after all that came before on
// the main one, and beside what follows there until ASIDE_JOIN. They must not use the workspace.
// Products leave NCCL its SMs meanwhile: they share their work out in advance, so that the part of
// an SM that is taken would only begin when all others have ended.
extern "C" void gpu_aside(int step) {
    if (step == ASIDE_BEGIN) {
        cudaCheck(cudaEventRecord(side_from, main_stream));
        cudaCheck(cudaStreamWaitEvent(side_stream, side_from, 0));
        stream = side_stream;
    } else if (step == ASIDE_END) {
        cudaCheck(cudaEventRecord(side_done, side_stream));
        stream = main_stream;
        side_sms = net_ranks > 1 ? NET_SMS : 0;
    } else {
        cudaCheck(cudaStreamWaitEvent(main_stream, side_done, 0));
        side_sms = 0;
    }
}

// Copies beside the kernels, on a stream of their own: pinned memory, or they would not be.
static cudaStream_t copy_stream;
static cudaEvent_t copy_from, copied[PLACES];

extern "C" void gpu_pin(void *p, size_t bytes, int begins) {
    if (!begins) { cudaCheck(cudaHostUnregister(p)); return; }
    if (cudaHostRegister(p, bytes, cudaHostRegisterDefault) == cudaSuccess) { return; }
    gpuFail(EXIT_FIT, "host memory cannot be pinned HINT: a smaller --offload");
}

extern "C" void gpu_copy_begin(int place, void *to, const void *from, size_t bytes) {
    if (copy_stream == NULL) {
        cudaCheck(cudaStreamCreateWithFlags(&copy_stream, cudaStreamNonBlocking));
        cudaCheck(cudaEventCreateWithFlags(&copy_from, cudaEventDisableTiming));
    }
    if (copied[place] == NULL) {
        cudaCheck(cudaEventCreateWithFlags(&copied[place], cudaEventDisableTiming));
    }
    cudaCheck(cudaEventRecord(copy_from, main_stream));
    cudaCheck(cudaStreamWaitEvent(copy_stream, copy_from, 0));
    cudaCheck(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDefault, copy_stream));
    cudaCheck(cudaEventRecord(copied[place], copy_stream));
}

extern "C" void gpu_copy_end(int place) {
    if (copied[place]) { cudaCheck(cudaStreamWaitEvent(main_stream, copied[place], 0)); }
}

// Boxes of bytes, in launches of as many as a kernel's arguments hold (C text: copy_boxes).
extern "C" void copy_boxes_gpu(const BoxCopy *box_h, int n) {
    for (int done = 0; done < n; done += BOXES_MAX) {
        Boxes all;
        size_t blocks = 0;
        all.n = 0;
        for (const BoxCopy *b = box_h + done; b < box_h + n && b < box_h + done + BOXES_MAX; b++) {
            const size_t bytes = b->n[0] * b->n[1] * b->n[2];
            const size_t bits = (size_t)b->to | (size_t)b->from | b->n[2] |
                                (b->n[1] > 1 ? b->to_step[1] | b->from_step[1] : 0) |
                                (b->n[0] > 1 ? b->to_step[0] | b->from_step[0] : 0);
            const int word = bits % 16 == 0 ? 16 : bits % 4 == 0 ? 4 : 1;
            if (bytes == 0) { continue; }
            gpuRequire(bytes / word < (size_t)UINT_MAX - BOX_THREADS);
            all.box[all.n] = *b;
            all.word[all.n] = word;
            all.first[all.n++] = (int)blocks;
            blocks += (bytes / word + BOX_THREADS - 1) / BOX_THREADS;
        }
        if (all.n == 0) { continue; }
        gpuRequire(blocks <= INT_MAX);
        copy_boxes_kernel<<<(unsigned)blocks, BOX_THREADS, 0, stream>>>(all);
        cudaCheck(cudaGetLastError());
    }
}

// Bytes of the card in use by everyone, and in all.
extern "C" void gpu_memory(size_t *used_h, size_t *total_h) {
    size_t free_bytes;
    cudaCheck(cudaMemGetInfo(&free_bytes, total_h));
    *used_h = *total_h - free_bytes;
}

// Phases: an event between the kernels, and when n of them from `first` on happened, in seconds
// after event 0. What is aside has its events there.
static cudaEvent_t marks[GPU_MARKS];
extern "C" void gpu_mark(int i) {
    if (marks[i] == NULL) { cudaCheck(cudaEventCreate(&marks[i])); }
    cudaCheck(cudaEventRecord(marks[i], stream));
}

extern "C" void gpu_marks(double *at_h, int first, int n) {
    if (n == 0) { return; }
    cudaCheck(cudaEventSynchronize(marks[first + n - 1]));
    waiting_since = 0;
    for (int i = first; i < first + n; i++) {
        float ms;
        cudaCheck(cudaEventElapsedTime(&ms, marks[0], marks[i]));
        at_h[i] = 1e-3 * ms;
    }
}

// -------------------------------------------------------------------------------------------------
// 2 Other GPUs (moe.c, section 3)
//
// Everything is made of sends and receives on the communicator of all ranks. NCCL's own sums would
// need buffers for every ring and tree they may run on: 2 to 3 GiB per GPU were seen.

#ifdef USE_NCCL
static void nccl_check(ncclResult_t result, int line) {
    char text[512];
    if (result == ncclSuccess) { return; }
    snprintf(text, sizeof text, "NCCL: %s: %s", ncclGetErrorString(result), ncclGetLastError(NULL));
    gpu_failed(__FILE__, line, EXIT_COMM, text);
}
#define ncclCheck(call) nccl_check(call, __LINE__)

static struct {
    ncclComm_t world;
    int rank, first, ranks, ep;     // among all; of its role: the first one, how many, per group
    unsigned char *box;             // of gpu_trade
} net;

static int net_size(int which) {
    return which == COMM_ALL ? net_ranks : which == COMM_WORLD ? net.ranks
         : which == COMM_EP ? net.ep : net.ranks / net.ep;
}
static int net_member(int which, int i) {       // moe.c: comm_member
    const int place = net.rank - net.first;
    return which == COMM_ALL ? i : which == COMM_WORLD ? net.first + i
         : net.first + (which == COMM_EP ? place - place % net.ep + i
                                         : place % net.ep + i * net.ep);
}

extern "C" void gpu_make_id(void *id_h) {
    ncclUniqueId id;
    static_assert(sizeof id == GPU_ID_BYTES, "NCCL's id has another size");
    ncclCheck(ncclGetUniqueId(&id));
    memcpy(id_h, &id, sizeof id);
}

// How long the device has been at collectives whose end the host has not seen, 0: it is not at any.
// error_h: what NCCL says went wrong, or "".
extern "C" void gpu_waiting(double *seconds_h, char *error_h, size_t size) {
    const double since = waiting_since;
    ncclResult_t state = ncclSuccess;
    *seconds_h = since > 0 ? clock_seconds() - since : 0;
    if (net.world && ncclCommGetAsyncError(net.world, &state) != ncclSuccess) { return; }
    if (state == ncclSuccess || state == ncclInProgress) { return; }
    snprintf(error_h, size, "%s", ncclGetErrorString(state));
}

extern "C" void gpu_batch(int begin) {
    if (begin) { ncclCheck(ncclGroupStart()); } else { ncclCheck(ncclGroupEnd()); }
}

extern "C" void gpu_all_to_all(int which, void *recv, const size_t *recv_bytes_h, const void *send,
                               const size_t *send_bytes_h) {
    const unsigned char *from = (const unsigned char *)send;
    unsigned char *to = (unsigned char *)recv;
    waiting_since = clock_seconds();
    ncclCheck(ncclGroupStart());
    for (int i = 0; i < net_size(which); i++) {
        const int peer = net_member(which, i);
        const size_t out = send_bytes_h[i], in = recv_bytes_h[i];
        if (peer == net.rank) {
            cudaCheck(cudaMemcpyAsync(to, from, out, cudaMemcpyDeviceToDevice, stream));
        } else {
            if (out) { ncclCheck(ncclSend(from, out, ncclInt8, peer, net.world, stream)); }
            if (in) { ncclCheck(ncclRecv(to, in, ncclInt8, peer, net.world, stream)); }
        }
        from += out;
        to += in;
    }
    ncclCheck(ncclGroupEnd());
}

// values (n): replaced by the sum over all members, added in their order as moe.c does it, so that
// all have the same bits. Piece by piece: every member gets one slice of it from all the others,
// adds it up, and sends it to them.
//   bytes: 2 (ranks-1)/ranks of the values leave a GPU, as much as in a ring.
extern "C" void gpu_sum_real(int which, real *values, size_t n) {
    const int members = net_size(which);
    const size_t mark = workspace_mark(), slice = SUM_PIECE / members;
    real *others = (real *)workspace(SUM_PIECE * sizeof(real));
    int me = 0;
    while (net_member(which, me) != net.rank) { me++; }
    waiting_since = clock_seconds();
    for (size_t at = 0; at < n; at += slice * members) {
        const size_t piece = n - at < slice * members ? n - at : slice * members;
        const size_t m = (piece + members - 1) / members;
        auto first = [&](int i) { return i * m < piece ? i * m : piece; };
        auto count = [&](int i) { return first(i + 1) - first(i); };
        real *v = values + at, *own = v + first(me);
        for (int home = 0; home < 2; home++) {
            ncclCheck(ncclGroupStart());
            for (int i = 0; i < members; i++) {
                const int peer = net_member(which, i);
                const size_t out = count(home ? me : i), in = count(home ? i : me);
                if (i == me) { continue; }
                if (out) {
                    ncclCheck(ncclSend(home ? own : v + first(i), out, ncclFloat32, peer, net.world,
                                       stream));
                }
                if (in) {
                    ncclCheck(ncclRecv(home ? v + first(i) : others + i * m, in, ncclFloat32, peer,
                                       net.world, stream));
                }
            }
            ncclCheck(ncclGroupEnd());
            if (home || count(me) == 0) { continue; }
            const int blocks = blocks_for(count(me), 256);
            sum_rows_kernel<<<blocks, 256, 0, stream>>>(own, others, members, me, m, count(me));
            cudaCheck(cudaGetLastError());
        }
    }
    workspace_release(mark);
}

// data (bytes) of member root, to all: it sends every other member a slice, which that one hands on
// to all but the root; its own slice it hands on itself.
//   bytes: twice the data leave the root, and little less than once everyone else.
extern "C" void gpu_broadcast(int which, void *data, size_t bytes, int root) {
    const int members = net_size(which);
    const size_t slice = (bytes / members + 16) / 16 * 16;
    auto first = [&](int i) { return i * slice < bytes ? i * slice : bytes; };
    auto at = [&](int i) { return (unsigned char *)data + first(i); };
    auto count = [&](int i) { return first(i + 1) - first(i); };
    int me = 0;
    while (net_member(which, me) != net.rank) { me++; }
    waiting_since = clock_seconds();
    for (int hand_on = 0; hand_on < 2; hand_on++) {
        ncclCheck(ncclGroupStart());
        for (int i = 0; i < members; i++) {
            const int peer = net_member(which, i), own = hand_on ? me : i;
            const int gives = i != me && (hand_on ? i != root : me == root);
            const int gets = i != me && me != root && (hand_on || i == root);
            const int new_ = hand_on ? i : me;
            if (gives && count(own)) {
                ncclCheck(ncclSend(at(own), count(own), ncclInt8, peer, net.world, stream));
            }
            if (gets && count(new_)) {
                ncclCheck(ncclRecv(at(new_), count(new_), ncclInt8, peer, net.world, stream));
            }
        }
        ncclCheck(ncclGroupEnd());
    }
}

// boxes_h (members): the first bytes of this rank's own go to all, and theirs into the others.
extern "C" void gpu_trade(void **boxes_h, int which, size_t bytes) {
    const size_t room = 1 << 19;
    gpuRequire(bytes <= room);
    if (net.box == NULL) { cudaCheck(cudaMalloc(&net.box, net_ranks * room)); }
    waiting_since = clock_seconds();
    unsigned char *own = net.box + net.rank * room;
    for (int i = 0; i < net_size(which); i++) {
        if (net_member(which, i) != net.rank) { continue; }
        cudaCheck(cudaMemcpyAsync(own, boxes_h[i], bytes, cudaMemcpyHostToDevice, stream));
    }
    ncclCheck(ncclGroupStart());
    for (int i = 0; i < net_size(which); i++) {
        const int peer = net_member(which, i);
        if (peer == net.rank) { continue; }
        ncclCheck(ncclSend(own, bytes, ncclInt8, peer, net.world, stream));
        ncclCheck(ncclRecv(net.box + peer * room, bytes, ncclInt8, peer, net.world, stream));
    }
    ncclCheck(ncclGroupEnd());
    for (int i = 0; i < net_size(which); i++) {
        const int peer = net_member(which, i);
        if (peer == net.rank) { continue; }
        cudaCheck(cudaMemcpyAsync(boxes_h[i], net.box + peer * room, bytes, cudaMemcpyDeviceToHost,
                                  stream));
    }
    streamWait();
}

// Makes the communicator, and uses every connection once: what cannot work fails here, and NCCL's
// buffers are there before the memory that is left is counted.
extern "C" void gpu_connect(const void *id_h, int rank, int all, int receivers, int ep) {
    ncclUniqueId id;
    ncclConfig_t config = NCCL_CONFIG_INITIALIZER;
    memcpy(&id, id_h, sizeof id);
    net.rank = rank;
    net_ranks = all;
    net.first = rank < all - receivers ? 0 : all - receivers;
    net.ranks = net.first ? receivers : all - receivers;
    net.ep = ep;
    waiting_since = clock_seconds();
    ncclCheck(ncclCommInitRankConfig(&net.world, all, id, rank, &config));
    size_t each[COMM_RANKS_MAX];
    int *probe, sent[COMM_RANKS_MAX], got[COMM_RANKS_MAX];
    for (int i = 0; i < all; i++) {
        each[i] = sizeof(int);
        sent[i] = rank * all + i;
    }
    cudaCheck(cudaMalloc(&probe, 2 * sizeof sent));
    gpu_upload(probe, sent, sizeof sent);
    gpu_all_to_all(COMM_ALL, probe + COMM_RANKS_MAX, each, probe, each);
    gpu_download(got, probe + COMM_RANKS_MAX, sizeof got);
    cudaCheck(cudaFree(probe));
    for (int i = 0; i < all; i++) { gpuRequire(got[i] == i * all + rank); }
}
#else
static void no_nccl(void) {
    gpuFail(EXIT_USAGE, "built without NCCL: one GPU is the most HINT: install NCCL's headers and "
                        "library, and make");
}
extern "C" void gpu_make_id(void *) { no_nccl(); }
extern "C" void gpu_connect(const void *, int, int, int, int) { no_nccl(); }
extern "C" void gpu_waiting(double *, char *, size_t) { no_nccl(); }
extern "C" void gpu_batch(int) { no_nccl(); }
extern "C" void gpu_sum_real(int, real *, size_t) { no_nccl(); }
extern "C" void gpu_all_to_all(int, void *, const size_t *, const void *, const size_t *) {
    no_nccl();
}
extern "C" void gpu_trade(void **, int, size_t) { no_nccl(); }
extern "C" void gpu_broadcast(int, void *, size_t, int) { no_nccl(); }
#endif
#endif // DEVICE_CU
