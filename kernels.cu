// kernels.cu: every CUDA kernel of the trainer, and the contract between it and the C files.
//
// Part 1 is plain C, read by cc and by nvcc: types, rounding, errors, memory, random numbers, and
// one prototype per kernel launcher. Everything after it is device code, seen by nvcc only. A C
// file may therefore include this file and gets the contract, nothing else:
//
//     kernels.cu (contract) <- fp8.c <- mxfp4.c <- lora.c <- moe.c <- refit.c <- train.c
//
// It is a unity build: each .c includes the one before it, `cc train.c` compiles the whole CPU
// trainer, and `nvcc kernels.cu` the device code. The one header has the launchers' prototypes.
//
// Contents
//   1.1 types, and the places where a      2 helpers; the host's side is dev/device.cu
//       value is rounded                   3 numbers and dense products (fp8.c)
//   1.2 errors: one line that says what,   4 packed experts: the grouped product (mxfp4.c)
//       where, and what to do              5 adapters and optimizers (lora.c)
//   1.3 twins: how a C function finds      6 routing, permutation, combine (moe.c)
//       its kernel                         7 norms, RoPE, hyper-connections (train.c)
//   1.4 launchers: what the device offers  8 compressors, indexer (train.c)
//   1.5 memory: counted, filled, closed    9 attention forward, backward (train.c)
//   1.6 random numbers: the same bytes    10 head and cross-entropy (train.c)
//       on every machine
#ifndef KERNELS_CU
#define KERNELS_CU
#include <math.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>

// -------------------------------------------------------------------------------------------------
// 1.1 Types
//
// Two names carry every activation. `act` is how it is stored, `real` is what it is computed in:
// bf16 and float in the trainer, float and float to compare with PyTorch (make ACT=float), double
// and double to check gradients against central differences. st() is the only place where a value
// loses bits, so a reader can find every rounding of the model by looking for it. With wide types
// ld and st are the identity; what is quantised to codes (fp8.c) stays so.

#ifdef __CUDACC__
#include <cuda_bf16.h>
typedef __nv_bfloat16 bf16;
#else
typedef struct { uint16_t bits; } bf16;     // a struct, so that no one adds two of them by mistake
#endif

#ifndef ACT
#define ACT bf16
#endif
#ifndef REAL
#define REAL float
#endif
typedef ACT act;
typedef REAL real;

// The preprocessor cannot compare type names, but it can paste them: ACT_IS_bf16 is 1, and a name
// that is not defined counts as 0.
#define PASTE_(a, b) a##b
#define PASTE(a, b) PASTE_(a, b)
#define ACT_IS_bf16 1
#define ACT_IS_BF16 PASTE(ACT_IS_, ACT)
#define REAL_IS_double 1
#define REAL_IS_DOUBLE PASTE(REAL_IS_, REAL)

#if defined(__CUDACC__) && !ACT_IS_BF16
#error "the kernels store activations as bf16; other builds (make ACT=float) run on the CPU only"
#endif

#ifndef __CUDACC__
static inline float float_from_bits(uint32_t bits) {
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}
static inline uint32_t bits_from_float(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
}

// bf16 is the upper half of a float: widening is exact.
static inline float float_from_bf16(bf16 x) { return float_from_bits((uint32_t)x.bits << 16); }

// Narrowing rounds to nearest, ties to even: adding 0x7FFF and the lowest kept bit carries exactly
// when the dropped half is above one half, or equal to it and the kept part odd. The carry may run
// into the exponent, which is right (largest mantissa -> next power of two, largest value -> inf).
// A NaN must not be carried into an infinity, so it keeps its upper bits and is made quiet.
static inline bf16 bf16_from_float(float x) {
    uint32_t bits = bits_from_float(x);
    uint32_t rounded = (bits + 0x7FFFu + ((bits >> 16) & 1)) >> 16;
    uint32_t nan = (bits >> 16) | 0x40;
    bf16 out = { (uint16_t)((bits & 0x7FFFFFFFu) > 0x7F800000u ? nan : rounded) };
    return out;
}

#if ACT_IS_BF16
static inline real ld(const act *p) { return (real)float_from_bf16(*p); }
static inline void st(act *p, real x) { *p = bf16_from_float((float)x); }
#else
static inline real ld(const act *p) { return (real)*p; }
static inline void st(act *p, real x) { *p = (act)x; }
#endif
#endif // !__CUDACC__

// How frozen weights are stored, and what a checkpoint file can hold. Frozen weights stay in this
// form from the first byte read to the last step.
enum {
    DT_BF16, DT_F32, DT_FP8, DT_E8M0, DT_FP4, DT_I64,   // DT_FP4: two e2m1 codes per byte
    DT_F16, DT_I32,                                     // DT_F16: adapters only
};

// Numbers that the code is built around; all others come from config.json.
enum {
    HC = 4,                             // residual streams of the hyper-connections
    HC_MIX = 2 * HC + HC * HC,          // mixing numbers per token and site: 4 pre, 4 post, 16 comb
    FP8_BLOCK = 128,                    // one e8m0 scale per 128 x 128 codes of a dense matrix
    FP4_BLOCK = 32,                     // one e8m0 scale per 32 columns of an expert's row
    RECAST_LIFT = 6, RECAST_SPREAD = 14,    // fp4 codes as e4m3: mxfp4.c, section 4
    MUON_R = 64,                        // longest short side of a matrix that Muon's kernel takes
    PLACES = 3,                         // room on the device for layers' inputs kept on the host
};

// How a router chooses (moe.c, section 5); zero is DeepSeek-V4's way.
enum { SCORE_SQRTSOFTPLUS, SCORE_SIGMOID, SCORE_SOFTMAX };
typedef struct {
    int score;                  // SCORE_*: from logits to scores
    int greedy;                 // 1: by the scores alone, 0: by scores plus bias
    int groups, kept;           // experts fall into groups, of which so many are open; 0, 1: one
} Routing;

// Sizes of one layer's attention, and where the documents and entries of the micro-batch lie
// (train.c, part 5). Twins take it by value; its pointers lead to device memory there.
typedef struct {
    int T, P, H, D;             // tokens, entries, heads, dims of a head
    int W;                      // window, in tokens
    int ratio;                  // tokens per entry: 4, 128, or 0: window only
    int topk;                   // row length of the indexer's choice
    const int *position;        // (T) of the token in its document
    const int *end;             // (T) one past the last token of its document
    const int *first_entry;     // (T) first entry of its document
    const int *token;           // (P) first token of the run that the entry is of
} AttentionShape;

// Runs of rows that change places: run i is the count[i] rows from from[i] on, which go to to[i]
// and on (moe.c, section 6). In a kernel's arguments they need no copy to the device.
enum { RUNS_MAX = 512, BY_EXPERT = 0, BY_SOURCE = 1 };
typedef struct { int n, count[RUNS_MAX], from[RUNS_MAX], to[RUNS_MAX]; } Runs;

// A box copied between two arrays: n (planes, rows, bytes), and what lies from each to the next.
typedef struct { uint8_t *to; const uint8_t *from; size_t to_step[2], from_step[2], n[3]; }
BoxCopy;

// The ranks that a collective joins, and how many there may be. GPU_ID_BYTES: of NCCL's unique id.
enum { COMM_WORLD, COMM_EP, COMM_REPLICA, COMM_ALL, COMMS };
enum { COMM_RANKS_MAX = 64, GPU_ID_BYTES = 128 };
// Work beside the main stream: begins, ends, has to be done from here on.
enum { ASIDE_BEGIN, ASIDE_END, ASIDE_JOIN };

// -------------------------------------------------------------------------------------------------
// 1.2 Errors
//
// Nothing here recovers: the first error prints one line and ends the process, the supervisor ends
// the other ranks. A line says what was found, what was expected, where (tensor, file, layer), and
// after `HINT:` what to do. Checkpoints are written under a temporary name, so nothing is lost.

enum {
    EXIT_OK = 0,
    EXIT_USAGE = 1,         // options, data, files
    EXIT_FIT = 2,           // does not fit into memory or onto the disk
    EXIT_NUMERICS = 3,      // a value is not finite
    EXIT_COMM = 4,          // another rank is gone or late
    EXIT_INTERRUPTED = 130,
};

#ifndef __CUDACC__
static int this_rank;               // of this process, for messages
static volatile int *error_printed; // shared by forked ranks: one error is one line in all

#if defined(__GNUC__)
__attribute__((noreturn, format(printf, 4, 5)))
#endif
static inline void die_at(const char *file, int line, int code, const char *format, ...) {
    if (error_printed == NULL || !__sync_lock_test_and_set(error_printed, 1)) {
        char text[2048];
        va_list args;
        va_start(args, format);
        vsnprintf(text, sizeof text, format, args);
        va_end(args);
        const char *name = strrchr(file, '/');
        fflush(stdout);
        fprintf(stderr, "error  rank %d: %s (%s:%d, exit %d)\n", this_rank, text,
                name ? name + 1 : file, line, code);
    }
    exit(code);
}
// die(code, "format", ...): ends the process with that exit code.
#define die(...) die_at(__FILE__, __LINE__, __VA_ARGS__)
// A rule of the program itself, not of its input: breaking it is a bug here.
#define require(condition) do { if (!(condition)) { \
    die(EXIT_USAGE, "internal: %s does not hold", #condition); } } while (0)
// An input that cannot be used: one line, exit code 1.
#define refuse_if(condition, ...) do { if (condition) { die(EXIT_USAGE, __VA_ARGS__); } } while (0)
#endif

// Seconds, from some time in the past.
static inline double clock_seconds(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
}

// Device code reports its errors the same way; the C half of the program has the words.
#ifdef __CUDACC__
extern "C" __attribute__((noreturn)) void gpu_failed(const char *file, int line, int code,
                                                     const char *what);
#define gpuFail(code, what) gpu_failed(__FILE__, __LINE__, code, what)
#elif defined(USE_CUDA)
__attribute__((noreturn)) void gpu_failed(const char *file, int line, int code, const char *what) {
    die_at(file, line, code, "%s", what);
}
#endif

// -------------------------------------------------------------------------------------------------
// 1.3 Twins
//
// An operation is a C function and, once it has one, a CUDA twin of the same type and the suffix
// _gpu. The first line of the C function jumps to its twin when the program runs on a GPU:
//
//     GPU(rmsnorm_forward_gpu(out, rstd, inp, w, T, C))
//
// so the layer loop is written once, and the C text is both the lesson and the kernel's oracle. An
// operation on activations without a twin says CPU_ONLY(), so that it can never read a device
// pointer. TWIN(f) declares f's twin with f's own type: they cannot drift apart.

#ifdef USE_CUDA
extern int on_gpu;                  // decided once, at start, by what the machine has
#define GPU(call) if (on_gpu) { call; return; }
#define TWIN(f) extern __typeof__(f) f##_gpu;
#define CPU_ONLY() do { if (on_gpu) { \
    die(EXIT_USAGE, "%s has no kernel yet", __func__); } } while (0)
#else
#define GPU(call)                   // built without nvcc: the C text is all there is
#define TWIN(f)
#define CPU_ONLY() do { } while (0)
#endif

// -------------------------------------------------------------------------------------------------
// 1.4 Launchers
//
// One prototype per launcher: the twin of the C function without the suffix. cc compares it with
// that function (TWIN), nvcc with the launcher.
#if defined(USE_CUDA) || defined(__CUDACC__)
#include "dev/launchers.h"
#endif

// -------------------------------------------------------------------------------------------------
// 1.5 Memory
//
// One arena per class, each a stack. The code that allocates runs twice: first in counting mode,
// where mem_alloc returns NULL and only the high-water mark moves, then for real. So the plan that
// is printed before anything is loaded is the memory that is used. The arenas are closed before
// the first step; an allocation after that is an error, except inside what a mark released.

enum { MEM_WEIGHTS, MEM_ADAPTERS, MEM_OPTIMIZER, MEM_ACTIVATIONS, MEM_SCRATCH, MEM_CLASSES };

#ifndef __CUDACC__
static const char *const mem_names[MEM_CLASSES] = {
    "weights", "adapters", "optimizer", "activations", "scratch" };

static struct {
    int counting;                   // mem_alloc only counts
    int closed;                     // training has begun
    struct { unsigned char *base; size_t size, used, peak; } arena[MEM_CLASSES];
} mem;

#ifdef USE_CUDA
#define ON_GPU on_gpu
#else
#define ON_GPU 0
#endif

// An arena's bytes, zero; NULL if there is no room. On the host pages cost nothing until touched.
static inline void *arena_map(size_t bytes) {
#ifdef USE_CUDA
    void *device;
    if (on_gpu) { gpu_alloc(&device, bytes); return device; }
#endif
    void *base = mmap(NULL, bytes, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    return base == MAP_FAILED ? NULL : base;
}

static inline void arena_unmap(void *base, size_t bytes) {
    GPU(gpu_free(base))
    munmap(base, bytes);
}

// Between the host and an arena. Without a GPU both are the same memory, and this is a copy.
static inline void upload(void *to, const void *from_h, size_t bytes) {
    GPU(gpu_upload(to, from_h, bytes))
    if (bytes) { memcpy(to, from_h, bytes); }
}
static inline void download(void *to_h, const void *from, size_t bytes) {
    GPU(gpu_download(to_h, from, bytes))
    if (bytes) { memcpy(to_h, from, bytes); }
}
static inline void zero(void *p, size_t bytes) {
    GPU(gpu_zero(p, bytes))
    if (bytes) { memset(p, 0, bytes); }
}

// Host memory, pinned: a GPU copies to and from it beside its kernels. All threads touch it first,
// in large pages where the system has them.
static inline void pin(void *p, size_t bytes, int begins) {
    GPU(gpu_pin(p, bytes, begins))
    (void)p, (void)bytes, (void)begins;
}
static inline void *pinned_alloc(size_t bytes) {
    void *p = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (p == MAP_FAILED) { die(EXIT_FIT, "no %zu bytes HINT: a smaller --offload", bytes); }
    madvise(p, bytes, MADV_HUGEPAGE);
    #pragma omp parallel for
    for (size_t at = 0; at < bytes; at += 4096) { ((volatile char *)p)[at] = 0; }
    pin(p, bytes, 1);
    return p;
}
static inline void pinned_free(void *p, size_t bytes) {
    pin(p, bytes, 0);
    munmap(p, bytes);
}

// Copies are done in order, and what follows copy_end(place) comes after that place's last one.
// place: 0 .. PLACES-1.
static inline void copy_begin(int place, void *to, const void *from, size_t bytes) {
    GPU(gpu_copy_begin(place, to, from, bytes))
    (void)place;
    memcpy(to, from, bytes);
}
static inline void copy_end(int place) {
    GPU(gpu_copy_end(place))
    (void)place;
}

// What lies at p in an arena, for the host to read; host_view_end gives it back. Not for hot paths.
static inline const void *host_view(const void *p, size_t bytes) {
    if (!ON_GPU) { return p; }
    void *view = malloc(bytes ? bytes : 1);
    if (view == NULL) { die(EXIT_FIT, "no memory for %zu bytes on the host", bytes); }
    download(view, p, bytes);
    return view;
}
static inline void host_view_end(const void *view, const void *p) {
    if (view != p) { free((void *)view); }
}

// Starts the counting pass: forgets all sizes. The arenas must be empty.
static inline void mem_count(void) {
    memset(&mem, 0, sizeof mem);
    mem.counting = 1;
}

// Ends the counting pass: each arena gets what was counted.
static inline void mem_open(void) {
    mem.counting = 0;
    for (int c = 0; c < MEM_CLASSES; c++) {
        mem.arena[c].size = mem.arena[c].peak;
        mem.arena[c].used = mem.arena[c].peak = 0;
        if (mem.arena[c].size == 0) { continue; }
        void *base = arena_map(mem.arena[c].size);
        if (base == NULL) {
            die(EXIT_FIT, "cannot reserve %.1f MiB for %s HINT: a smaller -t, -b or --lora-r",
                mem.arena[c].size / 1048576.0, mem_names[c]);
        }
        mem.arena[c].base = (unsigned char *)base;
    }
}

// Returns the arenas to the system (tests build several models, one after the other).
static inline void mem_free(void) {
    for (int c = 0; c < MEM_CLASSES; c++) {
        if (mem.arena[c].base) { arena_unmap(mem.arena[c].base, mem.arena[c].size); }
    }
    memset(&mem, 0, sizeof mem);
}

// bytes from the arena of that class, aligned to 256; NULL while counting. Contents: zero on first
// use, what was there before after a release.
static inline void *mem_alloc(int class_, size_t bytes) {
    size_t at = mem.arena[class_].used;
    mem.arena[class_].used += (bytes + 255) / 256 * 256;
    if (mem.arena[class_].used > mem.arena[class_].peak) {
        mem.arena[class_].peak = mem.arena[class_].used;
    }
    if (mem.counting) { return NULL; }
    if (mem.arena[class_].used > mem.arena[class_].size) {
        die(EXIT_FIT, "%zu bytes of %s were not in the plan of %zu%s", bytes, mem_names[class_],
            mem.arena[class_].size, mem.closed ? " (after step 1)" : "");
    }
    return mem.arena[class_].base + at;
}

static inline size_t mem_mark(int class_) { return mem.arena[class_].used; }
static inline void mem_release(int class_, size_t mark) { mem.arena[class_].used = mark; }

// A typed allocation: MEM(real, MEM_SCRATCH, (size_t)T * C).
#define MEM(type, class_, n) ((type *)mem_alloc(class_, sizeof(type) * (n)))

// Small host buffers, for the inside of a function. After the arenas are closed, 1 MiB is the most.
static inline void *host_alloc(size_t bytes) {
    require(!mem.closed || bytes <= (1 << 20));
    void *p = malloc(bytes ? bytes : 1);
    if (p == NULL) { die(EXIT_FIT, "no memory for %zu bytes on the host", bytes); }
    return p;
}

static inline void *host_calloc(size_t bytes) { return memset(host_alloc(bytes), 0, bytes); }
#endif // !__CUDACC__

// -------------------------------------------------------------------------------------------------
// 1.6 Random numbers
//
// Counter-based: element i of a tensor is a function of (seed, tensor name, i) and of nothing
// else, so any rank, thread or GPU can draw any part of it and gets the same bytes. Only integers
// and one exact product are used, because logf and cosf differ between machines.

#ifdef __CUDACC__
#define HD __host__ __device__
#else
#define HD
#endif

// SplitMix64's output function: every input bit reaches every output bit.
static inline HD uint64_t random_mix(uint64_t z) {
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBull;
    return z ^ (z >> 31);
}

// The key of a tensor: its name by FNV-1a, joined with the seed.
static inline uint64_t random_key(uint64_t seed, const char *name) {
    uint64_t hash = 0xCBF29CE484222325ull;
    for (; *name; name++) { hash = (hash ^ (unsigned char)*name) * 0x100000001B3ull; }
    return hash ^ random_mix(seed + 0x9E3779B97F4A7C15ull);
}

static inline HD uint64_t random_bits(uint64_t key, uint64_t i) {
    return random_mix(key + (i + 1) * 0x9E3779B97F4A7C15ull);
}

// Nearly normal, by adding four 16-bit uniforms: mean 0, std RANDOM_STD, at most 3.47 std. An
// integer, so that the caller's product with a float is the only rounding.
#define RANDOM_STD 37836.95         // 65536 sqrt(4 / 12)
static inline HD int random_normal(uint64_t key, uint64_t i) {
    uint64_t z = random_bits(key, i);
    return (int)(z & 0xFFFF) + (int)(z >> 16 & 0xFFFF) + (int)(z >> 32 & 0xFFFF) + (int)(z >> 48)
           - 131070;
}

// In [0, 1), a multiple of 2^-24: exact in a float.
static inline HD float random_uniform(uint64_t key, uint64_t i) {
    return (float)(random_bits(key, i) >> 40) * (1.0f / 16777216.0f);
}

// -------------------------------------------------------------------------------------------------
// Device code
#ifdef __CUDACC__
#include <cooperative_groups.h>
#include <cublas_v2.h>
#include <cuda.h>
#include <cudaTypedefs.h>       // CUtensorMap; its one function is found through the runtime
#include <cuda_fp8.h>
#include <limits.h>
#include <type_traits>
#ifdef USE_NCCL
#include <nccl.h>
#endif

// -------------------------------------------------------------------------------------------------
// 2 Helpers: loads, stores, reductions
//
// Activations are bf16 in memory and float in registers. A thread reads 16 bytes at a time (8
// activations, 4 reals); rows are multiples of 64 elements, so no tail needs care.

#define cudaCheck(call) do { cudaError_t e_ = (call); if (e_ != cudaSuccess) { \
    gpuFail(EXIT_COMM, cudaGetErrorString(e_)); } } while (0)

// A shape that a kernel was not written for.
#define gpuRequire(condition) do { if (!(condition)) { \
    gpuFail(EXIT_USAGE, "no kernel for this shape: " #condition); } } while (0)

// All kernels run on `stream`, in order: the main one, or in between the one aside.
static cudaStream_t stream, main_stream, side_stream;
static cudaEvent_t side_from, side_done;
static int side_sms;                        // SMs that the work aside takes at present
static volatile double waiting_since;       // a collective was begun, and not seen to end; 0: none

// SMs that products leave to NCCL, numbers that ranks add up at a time, ranks.
enum { NET_SMS = 16, SUM_PIECE = 1 << 23 };
static int net_ranks = 1;

// The host waits until the device has done all that it was given.
#define streamWait() do { cudaCheck(cudaStreamSynchronize(stream)); waiting_since = 0; } while (0)

static int multiprocessors(void) {
    static int n;
    int device;
    if (n == 0) {
        cudaCheck(cudaGetDevice(&device));
        cudaCheck(cudaDeviceGetAttribute(&n, cudaDevAttrMultiProcessorCount, device));
    }
    return n;
}

static inline int blocks_for(size_t n, int each) { return (int)((n + each - 1) / each); }

// Threads for a row of C elements at 8 per thread: whole warps, at most 512.
static inline int row_threads(int C) {
    const int threads = (C / 8 + 31) / 32 * 32;
    return threads < 32 ? 32 : threads > 512 ? 512 : threads;
}

__device__ inline void load8(float *x, const bf16 *p) {
    const uint4 raw = *(const uint4 *)p;
    const __nv_bfloat162 *pair = (const __nv_bfloat162 *)&raw;
    #pragma unroll
    for (int i = 0; i < 4; i++) {
        const float2 v = __bfloat1622float2(pair[i]);
        x[2 * i] = v.x;
        x[2 * i + 1] = v.y;
    }
}

__device__ inline void load4(float *x, const float *p) {
    const float4 v = *(const float4 *)p;
    x[0] = v.x; x[1] = v.y; x[2] = v.z; x[3] = v.w;
}

__device__ inline void load8(float *x, const float *p) { load4(x, p); load4(x + 4, p + 4); }

__device__ inline void load4(float *x, const bf16 *p) {
    const uint2 raw = *(const uint2 *)p;
    const __nv_bfloat162 *pair = (const __nv_bfloat162 *)&raw;
    const float2 a = __bfloat1622float2(pair[0]), b = __bfloat1622float2(pair[1]);
    x[0] = a.x; x[1] = a.y; x[2] = b.x; x[3] = b.y;
}

__device__ inline void store4(bf16 *p, const float *x) {
    uint2 raw;
    __nv_bfloat162 *pair = (__nv_bfloat162 *)&raw;
    pair[0] = __floats2bfloat162_rn(x[0], x[1]);
    pair[1] = __floats2bfloat162_rn(x[2], x[3]);
    *(uint2 *)p = raw;
}

__device__ inline void store4(float *p, const float *x) {
    *(float4 *)p = make_float4(x[0], x[1], x[2], x[3]);
}

__device__ inline void store8(bf16 *p, const float *x) {
    uint4 raw;
    __nv_bfloat162 *pair = (__nv_bfloat162 *)&raw;
    #pragma unroll
    for (int i = 0; i < 4; i++) { pair[i] = __floats2bfloat162_rn(x[2 * i], x[2 * i + 1]); }
    *(uint4 *)p = raw;
}

__device__ inline void store8(float *p, const float *x) { store4(p, x); store4(p + 4, x + 4); }

// N neighbouring elements, N a multiple of 4.
template <int N, typename V> __device__ inline void load_row(float *x, const V *p) {
    #pragma unroll
    for (int i = 0; i < N; i += 4) { load4(x + i, p + i); }
}
template <int N, typename V> __device__ inline void store_row(V *p, const float *x) {
    #pragma unroll
    for (int i = 0; i < N; i += 4) { store4(p + i, x + i); }
}

// The sum over a warp, to all lanes, in a fixed tree.
__device__ inline float warp_sum(float x) {
    #pragma unroll
    for (int k = 16; k > 0; k /= 2) { x += __shfl_xor_sync(~0u, x, k); }
    return x;
}

__device__ inline float warp_max(float x) {
    #pragma unroll
    for (int k = 16; k > 0; k /= 2) { x = fmaxf(x, __shfl_xor_sync(~0u, x, k)); }
    return x;
}

// The sum over a block, to all threads. shared: 32 floats, free again on return.
__device__ inline float block_sum(float x, float *shared) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, warps = blockDim.x / 32;
    x = warp_sum(x);
    if (lane == 0) { shared[warp] = x; }
    __syncthreads();
    x = warp_sum(lane < warps ? shared[lane] : 0);
    __syncthreads();
    return x;
}

__device__ inline float block_max(float x, float *shared) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, warps = blockDim.x / 32;
    x = warp_max(x);
    if (lane == 0) { shared[warp] = x; }
    __syncthreads();
    x = warp_max(lane < warps ? shared[lane] : -INFINITY);
    __syncthreads();
    return x;
}

// Shared memory is addressed by 32-bit numbers where instructions of the copy engine and the tensor
// cores take it.
__device__ __forceinline__ uint32_t shared_address(const void *p) {
    return (uint32_t)__cvta_generic_to_shared(p);
}

// 16 bytes from global to shared memory without passing through registers; zeros if !valid. What
// a thread started since its last commit is a group; wait until at most `left` of its groups run.
__device__ inline void copy16(uint32_t to, const void *from, bool valid = true) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
                 :: "r"(to), "l"(from), "r"(valid ? 16 : 0) : "memory");
}
__device__ inline void copy_commit(void) { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int left> __device__ inline void copy_wait(void) {
    asm volatile("cp.async.wait_group %0;" :: "n"(left) : "memory");
}

// Workspace: scratch inside a launcher, from one region that the plan counts. A stack; kernels run
// in order on one stream, so what is released may be handed out again at once.
static struct { unsigned char *base; size_t size, used, peak; } work;

static inline size_t workspace_mark(void) { return work.used; }
static inline void workspace_release(size_t mark) { work.used = mark; }
static void *workspace(size_t bytes) {
    void *p = work.base + work.used;
    work.used += (bytes + 255) / 256 * 256;
    if (work.used > work.peak) { work.peak = work.used; }
    if (work.used > work.size) {
        char text[128];
        snprintf(text, sizeof text, "internal: a kernel needs %zu bytes of workspace, the plan has "
                 "%zu", work.used, work.size);
        gpuFail(EXIT_FIT, text);
    }
    return p;
}

// Products of bf16 matrices by cuBLAS, accumulated in fp32. All matrices are row by row, which
// cuBLAS, counting columns first, sees as their transposes.
static cublasHandle_t blas;
#define blasCheck(call) do { cublasStatus_t s_ = (call); if (s_ != CUBLAS_STATUS_SUCCESS) { \
    gpuFail(EXIT_COMM, cublasGetStatusString(s_)); } } while (0)

// y (T,O) = beta y + x (T,C) W^T, W (O,C). type: of y.
static void product(void *y, cudaDataType type, const bf16 *x, const bf16 *w, int T, int C, int O,
                    float beta) {
    const float one = 1;
    if (T == 0 || O == 0) { return; }
    blasCheck(cublasGemmEx(blas, CUBLAS_OP_T, CUBLAS_OP_N, O, T, C, &one, w, CUDA_R_16BF, C, x,
                           CUDA_R_16BF, C, &beta, y, type, O, CUBLAS_COMPUTE_32F,
                           CUBLAS_GEMM_DEFAULT));
}

// dx (T,C) = beta dx + dy (T,O) W, W (O,C). type: of dx.
static void product_transposed(void *dx, cudaDataType type, const bf16 *dy, const bf16 *w, int T,
                               int C, int O, float beta) {
    const float one = 1;
    if (T == 0 || C == 0) { return; }
    blasCheck(cublasGemmEx(blas, CUBLAS_OP_N, CUBLAS_OP_N, C, T, O, &one, w, CUDA_R_16BF, C, dy,
                           CUDA_R_16BF, O, &beta, dx, type, C, CUBLAS_COMPUTE_32F,
                           CUBLAS_GEMM_DEFAULT));
}

// -------------------------------------------------------------------------------------------------
// 2.1 Barriers, the copy engine, tensor cores
//
// A barrier of shared memory (mbarrier) counts arrivals and bytes; when both are complete its phase
// flips, and waiters ask for the parity of the phase they wait for. The copy engine (TMA) counts
// bytes on it.

__device__ __forceinline__ void barrier_init(uint32_t barrier, int arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;"
                 :: "r"(barrier), "r"(arrivals) : "memory");
}

__device__ __forceinline__ void barrier_wait(uint32_t barrier, uint32_t parity) {
    uint32_t done;
    do {
        asm volatile("{ .reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
                     "selp.u32 %0, 1, 0, p; }"
                     : "=r"(done) : "r"(barrier), "r"(parity) : "memory");
    } while (!done);
}

// One arrival, and that many bytes to come.
__device__ __forceinline__ void barrier_expect(uint32_t barrier, uint32_t bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;"
                 :: "r"(barrier), "r"(bytes) : "memory");
}

__device__ __forceinline__ void barrier_arrive(uint32_t barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" :: "r"(barrier) : "memory");
}

// An arrival when this thread's copy16s so far have landed.
__device__ __forceinline__ void barrier_arrive_copies(uint32_t barrier) {
    asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" :: "r"(barrier) : "memory");
}

// Box (x, y, z) of the map's tensor -> shared memory, counted on the barrier. Elements outside the
// tensor become zeros, and count as bytes.
__device__ __forceinline__ void tma_load(uint32_t to, const CUtensorMap *map, uint32_t barrier,
                                         int x, int y, int z) {
    asm volatile("cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
                 " [%0], [%1, {%3, %4, %5}], [%2];"
                 :: "r"(to), "l"(map), "r"(barrier), "r"(x), "r"(y), "r"(z) : "memory");
}

// The way back. Elements outside are dropped. What this thread started since its last commit is a
// group.
__device__ __forceinline__ void tma_store(const CUtensorMap *map, uint32_t from, int x, int y,
                                          int z) {
    asm volatile("cp.async.bulk.tensor.3d.global.shared::cta.tile.bulk_group"
                 " [%0, {%2, %3, %4}], [%1];"
                 :: "l"(map), "r"(from), "r"(x), "r"(y), "r"(z) : "memory");
}
__device__ __forceinline__ void tma_commit(void) {
    asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}
// Until shared memory of all but the last `left` groups has been read; until all is written.
template <int left> __device__ __forceinline__ void tma_wait_read(void) {
    asm volatile("cp.async.bulk.wait_group.read %0;" :: "n"(left) : "memory");
}
__device__ __forceinline__ void tma_wait_all(void) {
    asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
}
// Writes to shared memory that this thread made or waited for are seen by the copy engine and the
// tensor cores.
__device__ __forceinline__ void proxy_fence(void) {
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// A tensor core reads its operands through descriptors: where a matrix starts in shared memory, and
// how its groups of 8 rows of 128 swizzled bytes are spaced. Both layouts are what a TMA box 64
// elements wide leaves. Along K: a row is 64 k, groups of 8 rows (1,024 bytes) follow each other,
// and the next 16 k are 32 bytes on; `stride` does not matter. Across K (the right operand): a row
// is 64 n of one k, the next 64 n are `stride` bytes further on (8,192: a box of 64 k), and the
// next 16 k are 16 rows (2,048 bytes) on. The low word holds the address, in units of 16 bytes, so
// it can be moved by adding.
__device__ __forceinline__ uint32_t operand_low(uint32_t at, int stride = 8192) {
    return at / 16 | stride / 16 << 16;
}
__device__ __forceinline__ uint64_t operand(uint32_t low) {
    return (uint64_t)(1024 / 16 | 1 << 30) << 32 | low;         // bit 62: swizzle of 128 bytes
}
__device__ __forceinline__ uint64_t operand_at(uint32_t at, int stride = 8192) {
    return operand(operand_low(at, stride));
}

#define NUMBERS_32 \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, " \
    "%17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define NUMBERS_64 NUMBERS_32 ", " \
    "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, " \
    "%47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, " \
    "%62, %63"
#define NUMBERS_128 NUMBERS_64 ", " \
    "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, " \
    "%79, %80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, " \
    "%94, %95, %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, " \
    "%108, %109, %110, %111, %112, %113, %114, %115, %116, %117, %118, %119, %120, " \
    "%121, %122, %123, %124, %125, %126, %127"
#define SUMS_4(d, i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define SUMS_16(d, i) SUMS_4(d, i), SUMS_4(d, i + 4), SUMS_4(d, i + 8), SUMS_4(d, i + 12)
#define SUMS_32(d, i) SUMS_16(d, i), SUMS_16(d, i + 16)

// d (64,BN) = (add ? d : 0) + x (64,16) w (BN,16)^T, for a warpgroup. Asynchronous: d must not be
// touched between fence and wait.
template <int BN, int W_BY_K>
__device__ __forceinline__ void wgmma_m64k16(float (&d)[BN / 2], uint64_t x, uint64_t w, int add) {
    static_assert(BN == 256 || BN == 128, "two widths are spelled out");
    if constexpr (BN == 256) {
        asm volatile(
            "{ .reg .pred p; setp.ne.b32 p, %130, 0;\n"
            "wgmma.mma_async.sync.aligned.m64n256k16.f32.bf16.bf16 {" NUMBERS_128
            "}, %128, %129, p, 1, 1, 0, %131; }"
            : SUMS_32(d, 0), SUMS_32(d, 32), SUMS_32(d, 64), SUMS_32(d, 96)
            : "l"(x), "l"(w), "r"(add), "n"(W_BY_K));
    } else {
        asm volatile(
            "{ .reg .pred p; setp.ne.b32 p, %66, 0;\n"
            "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {" NUMBERS_64
            "}, %64, %65, p, 1, 1, 0, %67; }"
            : SUMS_32(d, 0), SUMS_32(d, 32)
            : "l"(x), "l"(w), "r"(add), "n"(W_BY_K));
    }
}
// d (64,64) = (add ? d : 0) + a (64,16) b (64,16)^T, both along K.
__device__ __forceinline__ void wgmma_m64n64k16(float (&d)[32], uint64_t a, uint64_t b, int add) {
    asm volatile(
        "{ .reg .pred p; setp.ne.b32 p, %34, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {" NUMBERS_32 "}, %32, %33, p, "
        "1, 1, 0, 0; }"
        : SUMS_32(d, 0) : "l"(a), "l"(b), "r"(add));
}
// Registers written before are seen by the tensor cores.
__device__ __forceinline__ void wgmma_fence(void) {
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
__device__ __forceinline__ void wgmma_commit(void) {
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
// Until at most `left` committed groups are running.
template <int left> __device__ __forceinline__ void wgmma_wait(void) {
    asm volatile("wgmma.wait_group.sync.aligned %0;" :: "n"(left) : "memory");
}
// The compiler does not know that d changes between commit and wait: no use of d moves up over
// this.
template <int n> __device__ __forceinline__ void keep_order(float (&d)[n]) {
    #pragma unroll
    for (int i = 0; i < n; i++) { asm volatile("" : "+f"(d[i]) :: "memory"); }
}

template <int n> __device__ __forceinline__ void keep_order(uint32_t (&d)[n]) {
    #pragma unroll
    for (int i = 0; i < n; i++) { asm volatile("" : "+r"(d[i]) :: "memory"); }
}
template <int m, int n> __device__ __forceinline__ void keep_order(float (&d)[m][n]) {
    #pragma unroll
    for (int i = 0; i < m; i++) { keep_order(d[i]); }
}
// Until all are complete; d: their sums.
template <int n> __device__ __forceinline__ void wgmma_wait(float (&d)[n]) {
    wgmma_wait<0>();
    keep_order(d);
}

// Registers go from copiers to those that hold sums. In all the launch's: 40 + 2 x 232 = 3 x 168.
template <int n> __device__ __forceinline__ void registers_give(void) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" :: "n"(n));
}
template <int n> __device__ __forceinline__ void registers_take(void) {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" :: "n"(n));
}

__device__ __forceinline__ uint32_t pack_bf16(float low, float high) {
    __nv_bfloat162 two = __floats2bfloat162_rn(low, high);
    return *(uint32_t *)&two;
}

// A tensor (depth, height, width) with the last contiguous, and how TMA cuts it: boxes of
// box_height rows of 128 bytes, swizzled. pitch and slice are in elements.
static CUtensorMap tensor_map(const void *base, int is_f32, int width, int height, int depth,
                              size_t pitch, size_t slice, int box_height) {
    static PFN_cuTensorMapEncodeTiled_v12000 encode;
    if (encode == NULL) {
        cudaDriverEntryPointQueryResult found;
        cudaCheck(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", (void **)&encode,
                                                   12000, cudaEnableDefault, &found));
    }
    CUtensorMap map;
    size_t size_of = is_f32 ? 4 : 2;
    cuuint64_t size[3] = { (cuuint64_t)width, (cuuint64_t)height, (cuuint64_t)depth };
    cuuint64_t bytes[2] = { pitch * size_of, slice * size_of };
    cuuint32_t box[3] = { (cuuint32_t)(128 / size_of), (cuuint32_t)box_height, 1 };
    cuuint32_t every[3] = { 1, 1, 1 };
    CUresult r = encode(&map, is_f32 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT32
                                     : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 3, (void *)base, size,
                        bytes, box, every, CU_TENSOR_MAP_INTERLEAVE_NONE,
                        CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                        CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    gpuRequire(r == CUDA_SUCCESS && "a tensor map of this shape");
    return map;
}

// -------------------------------------------------------------------------------------------------
// 2.2 Numbers as they are drawn and scaled

__global__ void scale_reals_kernel(real *x, float scale, size_t n) {
    const size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) { x[i] *= scale; }
}

extern "C" void scale_reals_gpu(real *x, double scale, size_t n) {
    if (n == 0) { return; }
    scale_reals_kernel<<<blocks_for(n, 256), 256, 0, stream>>>(x, (float)scale, n);
    cudaCheck(cudaGetLastError());
}

// A random base, in storage format (C text: draw_elements): the same bytes as on the host.
__device__ inline unsigned e2m1_code(float x) {
    const float m = fabsf(x);           // thresholds half way between neighbours, ties to even
    const unsigned code = (m > 0.25f) + (m >= 0.75f) + (m > 1.25f) + (m >= 1.75f) + (m > 2.5f) +
                          (m >= 3.5f) + (m > 5);
    return code | (__float_as_uint(x) >> 28 & 8);
}

__global__ void draw_elements_kernel(void *data, int type, uint64_t key, float mean, double unit,
                                     size_t n) {
    const size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) { return; }
    #define DRAW(i) (float)((double)mean + (double)random_normal(key, i) * unit)
    switch (type) {
        case DT_BF16: ((bf16 *)data)[i] = __float2bfloat16(DRAW(i)); break;
        case DT_F32: ((float *)data)[i] = DRAW(i); break;
        case DT_FP8:
            ((uint8_t *)data)[i] = __nv_cvt_float_to_fp8(DRAW(i), __NV_SATFINITE, __NV_E4M3);
            break;
        case DT_FP4:
            ((uint8_t *)data)[i] = (uint8_t)(e2m1_code(DRAW(2 * i)) |
                                             e2m1_code(DRAW(2 * i + 1)) << 4);
            break;
        case DT_E8M0:
            ((uint8_t *)data)[i] = (uint8_t)((int)mean + (int)(random_bits(key, i) % 3) - 1);
            break;
    }
    #undef DRAW
}

extern "C" void draw_elements_gpu(void *data, int type, uint64_t key, float mean, double unit,
                                  size_t n) {
    if (n == 0) { return; }
    draw_elements_kernel<<<blocks_for(n, 256), 256, 0, stream>>>(data, type, key, mean, unit, n);
    cudaCheck(cudaGetLastError());
}

// -------------------------------------------------------------------------------------------------
// 3 Numbers and dense products (fp8.c)
//
// Frozen fp8 matrices are widened to bf16, which is exact, into the workspace right before the
// product that needs them: 3 bytes moved per weight, against 2 T operations. At T = 4,096 that is
// a few per cent of the product's time, and no matrix is ever resident in wider form.

// e4m3 bits -> float: exact. In a float's places the bits are 2^120 too small, subnormals as well
// (fp8.c adds to the exponent instead).
__device__ inline float e4m3_value(unsigned code) {
    const float v = __uint_as_float((code & 0x7F) << 20) * 0x1p120f;
    const unsigned nan = (code & 0x7F) == 0x7F ? 0x7FC00000 : 0;
    return __uint_as_float(__float_as_uint(v) | nan | (code & 0x80) << 24);
}

__device__ inline float e8m0_value(unsigned b) { return __uint_as_float(b ? b << 23 : 1u << 22); }

// out (O,C) bf16 from codes (O,C), scale (ceil(O/rows), ceil(C/128)): a scale is for 128 rows of a
// frozen matrix, for one of activations. 16 codes per thread.
__global__ void widen_fp8_kernel(bf16 *out, const uint8_t *codes, const uint8_t *scale, size_t n,
                                 int C, int rows) {
    const size_t at = ((size_t)blockIdx.x * blockDim.x + threadIdx.x) * 16;
    if (at >= n) { return; }
    const size_t o = at / C, c = at % C;
    const float s = e8m0_value(scale[o / rows * ((C + FP8_BLOCK - 1) / FP8_BLOCK) + c / FP8_BLOCK]);
    const uint4 raw = *(const uint4 *)(codes + at);
    const unsigned word[4] = { raw.x, raw.y, raw.z, raw.w };
    #pragma unroll
    for (int half = 0; half < 2; half++) {
        float x[8];
        #pragma unroll
        for (int i = 0; i < 8; i++) {
            x[i] = s * e4m3_value(word[half * 2 + i / 4] >> i % 4 * 8 & 0xFF);
        }
        store8(out + at + half * 8, x);
    }
}

// A wide copy of a frozen fp8 matrix in the workspace.
static bf16 *widened_fp8(const uint8_t *w, const uint8_t *scale, int C, int O) {
    const size_t n = (size_t)O * C;
    gpuRequire(C % 16 == 0);
    bf16 *wide = (bf16 *)workspace(sizeof(bf16) * n);
    widen_fp8_kernel<<<blocks_for(n / 16, 256), 256, 0, stream>>>(wide, w, scale, n, C,
                                                                  FP8_BLOCK);
    cudaCheck(cudaGetLastError());
    return wide;
}

extern "C" void linear_fp8_forward_gpu(act *out, const act *inp, const uint8_t *w,
                                       const uint8_t *scale, int T, int C, int O) {
    const size_t mark = workspace_mark();
    product(out, CUDA_R_16BF, inp, widened_fp8(w, scale, C, O), T, C, O, 0);
    workspace_release(mark);
}

extern "C" void linear_bf16_forward_gpu(real *out, const act *inp, const bf16 *w, int T, int C,
                                        int O) {
    product(out, CUDA_R_32F, inp, w, T, C, O, 0);
}

__global__ void narrow_kernel(bf16 *out, const float *x, size_t n) {
    const size_t at = ((size_t)blockIdx.x * blockDim.x + threadIdx.x) * 4;
    if (at >= n) { return; }
    float v[4];
    load4(v, x + at);
    store4(out + at, v);
}

// n reals, a multiple of 4, rounded to bf16: the tensor cores read no other. Gradients that go
// through here before a product (dout, dv) are rounded once more than in the C text.
static void narrow(bf16 *out, const float *x, size_t n) {
    gpuRequire(n % 4 == 0);
    if (n == 0) { return; }
    narrow_kernel<<<blocks_for(n / 4, 256), 256, 0, stream>>>(out, x, n);
    cudaCheck(cudaGetLastError());
}

extern "C" void linear_bf16_backward_gpu(real *dinp, const real *dout, const bf16 *w, int T, int C,
                                         int O) {
    const size_t mark = workspace_mark();
    bf16 *dy = (bf16 *)workspace(sizeof(bf16) * (size_t)T * O);
    narrow(dy, dout, (size_t)T * O);
    product_transposed(dinp, CUDA_R_32F, dy, w, T, C, O, 1);
    workspace_release(mark);
}

// Rounds n reals to storage: the GPU's store_rows.
extern "C" void narrow_gpu(act *out, const real *inp, size_t n) { narrow(out, inp, n); }

// Numbers into e4m3, 128 to a scale: 16 neighbouring lanes hold a group, 8 numbers each.

// The e8m0 byte of the smallest t >= -126 with a <= 448 * 2^t, for finite a >= 0.
__device__ __forceinline__ unsigned scale_for_e4m3(float a) {
    const unsigned bits = __float_as_uint(a);
    const int t = (int)(bits >> 23) - 135 + ((bits & 0x7FFFFF) > 0x600000);
    return (unsigned)(max(t, -126) + 127);
}

// x / 2^t as two codes; what is not finite becomes NaN.
__device__ __forceinline__ unsigned quantize_two(float a, float b, float inverse) {
    const float2 two = make_float2(fabsf(a) < INFINITY ? a * inverse : NAN,
                                   fabsf(b) < INFINITY ? b * inverse : NAN);
    return __nv_cvt_float2_to_fp8x2(two, __NV_SATFINITE, __NV_E4M3);
}

// A lane's eight codes; returns the group's scale. All lanes of the warp take part.
__device__ __forceinline__ unsigned quantize_eight(uint2 &codes, const float *x, float floor) {
    float amax = floor;
    #pragma unroll
    for (int i = 0; i < 8; i++) { amax = fmaxf(amax, fabsf(x[i]) < INFINITY ? fabsf(x[i]) : 0); }
    #pragma unroll
    for (int k = 8; k > 0; k /= 2) { amax = fmaxf(amax, __shfl_xor_sync(~0u, amax, k)); }
    const unsigned scale = scale_for_e4m3(amax);
    const float inverse = __uint_as_float((254 - scale) << 23);
    codes.x = quantize_two(x[0], x[1], inverse) | quantize_two(x[2], x[3], inverse) << 16;
    codes.y = quantize_two(x[4], x[5], inverse) | quantize_two(x[6], x[7], inverse) << 16;
    return scale;
}

//   bytes: 2 + 1 per number; 24,576 rows of 4,096: 302 MB, 71 us.
__global__ void quantize_rows_kernel(uint8_t *codes, uint8_t *scales, const bf16 *x, float floor,
                                     size_t n) {
    const size_t at = ((size_t)blockIdx.x * blockDim.x + threadIdx.x) * 8;
    float v[8];
    uint2 out;
    load8(v, x + min(at, n - 8));
    const unsigned scale = quantize_eight(out, v, floor);
    if (at >= n) { return; }
    *(uint2 *)(codes + at) = out;
    if (at % FP8_BLOCK == 0) { scales[at / FP8_BLOCK] = (uint8_t)scale; }
}

extern "C" void quantize_rows_fp8_gpu(uint8_t *codes, uint8_t *scales, const act *inp, float floor,
                                      int T, int C) {
    const size_t n = (size_t)T * C;
    gpuRequire(C % FP8_BLOCK == 0);
    if (n == 0) { return; }
    quantize_rows_kernel<<<blocks_for(n / 8, 256), 256, 0, stream>>>(codes, scales, inp, floor, n);
    cudaCheck(cudaGetLastError());
}

extern "C" void widen_rows_fp8_gpu(act *out, const uint8_t *codes, const uint8_t *scales, int T,
                                   int C) {
    const size_t n = (size_t)T * C;
    gpuRequire(C % 16 == 0);
    if (n == 0) { return; }
    widen_fp8_kernel<<<blocks_for(n / 16, 256), 256, 0, stream>>>(out, codes, scales, n, C, 1);
    cudaCheck(cudaGetLastError());
}

// Bytes i of four words become word i: a 4 x 4 transpose.
__device__ __forceinline__ void turn_four(uint32_t &a, uint32_t &b, uint32_t &c, uint32_t &d) {
    const uint32_t ab = __byte_perm(a, b, 0x5140), cd = __byte_perm(c, d, 0x5140);
    const uint32_t ab2 = __byte_perm(a, b, 0x7362), cd2 = __byte_perm(c, d, 0x7362);
    a = __byte_perm(ab, cd, 0x5410), b = __byte_perm(ab, cd, 0x7632);
    c = __byte_perm(ab2, cd2, 0x5410), d = __byte_perm(ab2, cd2, 0x7632);
}

// A tile of 128 x 128 bytes is turned in shared memory: thread (rows 4 i .. 4 i + 3, codes 16 p ..)
// of 256 writes its words (column c, row / 4) at row / 4 ^ c / 16 * 4 of line c, so that no two
// lanes meet in a bank, neither writing nor reading.
__device__ __forceinline__ void tile_turn(uint32_t *tile, uint4 (&row)[4]) {
    const int i = threadIdx.x / 8, part = threadIdx.x % 8;
    #pragma unroll
    for (int k = 0; k < 4; k++) {
        uint32_t word[4] = { (&row[0].x)[k], (&row[1].x)[k], (&row[2].x)[k], (&row[3].x)[k] };
        turn_four(word[0], word[1], word[2], word[3]);
        #pragma unroll
        for (int j = 0; j < 4; j++) {
            tile[(part * 16 + k * 4 + j) * 32 + (i ^ part * 4)] = word[j];
        }
    }
}
// Rows 16 p .. of column c of the turned tile.
__device__ __forceinline__ uint4 tile_line(const uint32_t *tile, int c, int part) {
    return *(const uint4 *)(tile + c * 32 + (part * 4 ^ c / 16 * 4));
}

// The largest of 128 bytes, which threads 0 .. 127 give; most: 4 words, to be read after a barrier.
__device__ __forceinline__ void largest_byte(uint32_t *most, unsigned byte) {
    const unsigned all = __reduce_max_sync(~0u, byte);
    if (threadIdx.x % 32 == 0) { most[threadIdx.x / 32] = all; }
}
__device__ __forceinline__ int largest_of(const uint32_t *most) {
    return (int)max(max(most[0], most[1]), max(most[2], most[3]));
}

// The clamped SwiGLU of g and v, whose rows are ld apart; TO_FP8: straight into codes. A NaN must
// stay one: fminf and fmaxf would hide it.
//   bytes: 6 F per row; into codes 5 F: 24,576 rows of 2,048 in 59 us.
template <int TO_FP8>
__global__ void swiglu_forward_kernel(act *h, uint8_t *codes, uint8_t *scales, const act *g,
                                      const act *v, size_t ld, const real *weight, float limit,
                                      float floor, int F) {
    const size_t row = blockIdx.x;
    const float w = weight ? weight[row] : 1;
    for (int c0 = 0; c0 < F; c0 += blockDim.x * 8) {
        const int c = c0 + threadIdx.x * 8, inside = c < F;
        float a[8], b[8];
        uint2 out;
        load8(a, g + row * ld + (inside ? c : 0));
        load8(b, v + row * ld + (inside ? c : 0));
        #pragma unroll
        for (int k = 0; k < 8; k++) {
            const float gate = a[k] > limit ? limit : a[k];
            const float up = b[k] > limit ? limit : b[k] < -limit ? -limit : b[k];
            a[k] = w * (gate / (1 + expf(-gate))) * up;
        }
        const unsigned scale = TO_FP8 ? quantize_eight(out, a, floor) : 0;
        if (!inside) { continue; }
        const size_t at = row * F + c;
        if (!TO_FP8) { store8(h + at, a); continue; }
        *(uint2 *)(codes + at) = out;
        if (c % FP8_BLOCK == 0) { scales[at / FP8_BLOCK] = (uint8_t)scale; }
    }
}

extern "C" void swiglu_forward_gpu(act *h, const act *g, const act *v, const real *weight,
                                   float limit, int T, int F) {
    if (T == 0) { return; }
    swiglu_forward_kernel<0><<<T, row_threads(F), 0, stream>>>(h, NULL, NULL, g, v, F, weight,
                                                               limit, 0, F);
    cudaCheck(cudaGetLastError());
}

extern "C" void swiglu_quantize_forward_gpu(uint8_t *codes, uint8_t *scales, const act *gv,
                                            const real *weight, float limit, float floor, int T,
                                            int F) {
    gpuRequire(F % FP8_BLOCK == 0);
    if (T == 0) { return; }
    swiglu_forward_kernel<1><<<T, row_threads(F), 0, stream>>>(NULL, codes, scales, gv, gv + F,
                                                               2 * F, weight, limit, floor, F);
    cudaCheck(cudaGetLastError());
}

// One block per row, so that the row's weight gradient has one owner. TO_FP8: dg and dv are halves
// of rows of codes, with scales of their own.
//   bytes: 12 F per row; into codes 8 F: 24,576 rows of 2,048 in 94 us.
template <int TO_FP8, typename D>
__global__ void swiglu_backward_kernel(act *dg, act *dv, uint8_t *codes, uint8_t *scales,
                                       real *dweight, const D *dh, const act *g, const act *v,
                                       size_t ld, const real *weight, float limit, int F) {
    __shared__ float shared[32];
    const size_t row = blockIdx.x;
    const float w = weight ? weight[row] : 1;
    float dw = 0;
    for (int c0 = 0; c0 < F; c0 += blockDim.x * 8) {
        const int c = c0 + threadIdx.x * 8, inside = c < F;
        float a[8], b[8], d[8];
        uint2 left, right;
        load8(a, g + row * ld + (inside ? c : 0));
        load8(b, v + row * ld + (inside ? c : 0));
        load8(d, dh + row * F + (inside ? c : 0));
        #pragma unroll
        for (int k = 0; k < 8; k++) {
            // forward: h = w silu(gate) up, gate = min(g, limit), up = clamp(v, +-limit)
            const int gate_passes = !(a[k] > limit), up_passes = !(fabsf(b[k]) > limit);
            const float gate = gate_passes ? a[k] : limit;
            const float up = up_passes ? b[k] : copysignf(limit, b[k]);
            const float s = 1 / (1 + expf(-gate)), silu = gate * s;
            if (inside) { dw += d[k] * silu * up; }
            a[k] = gate_passes ? w * d[k] * up * (s * (1 + gate * (1 - s))) : 0;
            b[k] = up_passes ? w * d[k] * silu : 0;
        }
        const unsigned scale_a = TO_FP8 ? quantize_eight(left, a, 0) : 0;
        const unsigned scale_b = TO_FP8 ? quantize_eight(right, b, 0) : 0;
        if (!inside) { continue; }
        if (!TO_FP8) {
            store8(dg + row * F + c, a);
            store8(dv + row * F + c, b);
            continue;
        }
        const size_t at = row * 2 * F + c;
        *(uint2 *)(codes + at) = left;
        *(uint2 *)(codes + at + F) = right;
        if (c % FP8_BLOCK == 0) {
            scales[at / FP8_BLOCK] = (uint8_t)scale_a;
            scales[(at + F) / FP8_BLOCK] = (uint8_t)scale_b;
        }
    }
    if (dweight) {
        dw = block_sum(dw, shared);
        if (threadIdx.x == 0) { dweight[row] = dw; }
    }
}

extern "C" void swiglu_backward_gpu(act *dg, act *dv, real *dweight, const real *dh, const act *g,
                                    const act *v, const real *weight, float limit, int T, int F) {
    if (T == 0) { return; }
    swiglu_backward_kernel<0><<<T, row_threads(F), 0, stream>>>(dg, dv, NULL, NULL, dweight, dh, g,
                                                                v, F, weight, limit, F);
    cudaCheck(cudaGetLastError());
}

extern "C" void swiglu_quantize_backward_gpu(uint8_t *dcodes, uint8_t *dscales, real *dweight,
                                             const act *dh, const act *gv, const real *weight,
                                             float limit, int T, int F) {
    gpuRequire(F % FP8_BLOCK == 0);
    if (T == 0) { return; }
    swiglu_backward_kernel<1><<<T, row_threads(F), 0, stream>>>(NULL, NULL, dcodes, dscales,
                                                                dweight, dh, gv, gv + F, 2 * F,
                                                                weight, limit, F);
    cudaCheck(cudaGetLastError());
}

// The grouped output projection: all G groups in one batched product.
extern "C" void group_output_forward_gpu(act *v, const act *o, const uint8_t *w,
                                         const uint8_t *scale, int T, int G, int N, int O) {
    const float one = 1, zero = 0;
    const size_t mark = workspace_mark();
    if (T == 0) { return; }
    const bf16 *wide = widened_fp8(w, scale, N, G * O);
    blasCheck(cublasGemmStridedBatchedEx(
        blas, CUBLAS_OP_T, CUBLAS_OP_N, O, T, N, &one, wide, CUDA_R_16BF, N, (long long)O * N, o,
        CUDA_R_16BF, G * N, N, &zero, v, CUDA_R_16BF, G * O, O, G, CUBLAS_COMPUTE_32F,
        CUBLAS_GEMM_DEFAULT));
    workspace_release(mark);
}

extern "C" void group_output_backward_gpu(act *do_, const real *dv, const uint8_t *w,
                                          const uint8_t *scale, int T, int G, int N, int O) {
    const float one = 1, zero = 0;
    const size_t mark = workspace_mark();
    if (T == 0) { return; }
    const bf16 *wide = widened_fp8(w, scale, N, G * O);
    bf16 *dy = (bf16 *)workspace(sizeof(bf16) * (size_t)T * G * O);
    narrow(dy, dv, (size_t)T * G * O);
    blasCheck(cublasGemmStridedBatchedEx(
        blas, CUBLAS_OP_N, CUBLAS_OP_N, N, T, O, &one, wide, CUDA_R_16BF, N, (long long)O * N, dy,
        CUDA_R_16BF, G * O, O, &zero, do_, CUDA_R_16BF, G * N, N, G, CUBLAS_COMPUTE_32F,
        CUBLAS_GEMM_DEFAULT));
    workspace_release(mark);
}

// -------------------------------------------------------------------------------------------------
// 4 Packed experts (mxfp4.c)
//
// The heart is one product of bf16 matrices in groups of rows, by the tensor cores. Its ladder,
// with the rungs below it, is dev/cuda/mxfp4_matmul.cu.

namespace grouped {        // its helpers' names are common ones

// -------------------------------------------------------------------------------------------------
// 4.1 Helpers of the grouped product

__device__ __forceinline__ void store_two(uint32_t to, float a, float b) {
    asm volatile("st.shared.v2.f32 [%0], {%1, %2};" :: "r"(to), "f"(a), "f"(b) : "memory");
}

// Four 8 x 8 matrices of bf16, as they lie in the sums' registers, to shared memory: lane l gives
// the address of row l % 8 of matrix l / 8.
__device__ __forceinline__ void store_matrices(uint32_t row, uint32_t a, uint32_t b, uint32_t c,
                                               uint32_t d) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};"
                 :: "r"(row), "r"(a), "r"(b), "r"(c), "r"(d) : "memory");
}

// prmt: bytes of the table low, high (bytes 0..3, 4..7) picked by the four nibbles of `by`; a
// nibble with bit 3 gets that byte's sign bit eight times.
__device__ __forceinline__ uint32_t pick_bytes(uint32_t low, uint32_t high, uint32_t by) {
    uint32_t picked;
    asm("prmt.b32 %0, %1, %2, %3;" : "=r"(picked) : "r"(low), "r"(high), "r"(by));
    return picked;
}

// Eight e2m1 codes, times a power of two, as eight bf16: exact. The tables are the high and the low
// bytes of 0, 0.5, 1, 1.5, 2, 3, 4, 6 as bf16.
__device__ __forceinline__ uint4 widen_codes(uint32_t codes, __nv_bfloat162 scale) {
    uint32_t value[4];
    #pragma unroll
    for (int half = 0; half < 2; half++, codes >>= 16) {
        uint32_t low = pick_bytes(0xC0800000, 0xC0804000, codes & 0x7777);
        uint32_t high = pick_bytes(0x3F3F3F00, 0x40404040, codes & 0x7777);
        uint32_t sign = pick_bytes(0x80808080, 0x80808080, codes);      // 0x80, 0xFF if negative
        high |= sign << 1 & 0x80808080;
        value[2 * half] = pick_bytes(low, high, 0x5140);
        value[2 * half + 1] = pick_bytes(low, high, 0x7362);
    }
    #pragma unroll
    for (int i = 0; i < 4; i++) {
        __nv_bfloat162 two = __hmul2(*(__nv_bfloat162 *)&value[i], scale);
        value[i] = *(uint32_t *)&two;
    }
    return make_uint4(value[0], value[1], value[2], value[3]);
}

// 2^(b - 127) twice, as bf16.
__device__ __forceinline__ __nv_bfloat162 scale_pair(uint32_t b) {
    uint32_t bits = b ? b << 7 : 0x40;
    bits |= bits << 16;
    return *(__nv_bfloat162 *)&bits;
}

// 16 bytes of global memory that are read once or twice; the 128 around them come into L2.
__device__ __forceinline__ uint4 load_once(const uint8_t *p) {
    uint4 v;
    asm volatile("ld.global.nc.L2::128B.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p));
    return v;
}
__device__ __forceinline__ void store_chunk(uint32_t to, uint4 v) {
    asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};"
                 :: "r"(to), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w) : "memory");
}

// -------------------------------------------------------------------------------------------------
// 4.2 The grouped product
//
// A tile is 128 MT rows x BN columns of one group, and 64 k at a time of X and W lie in shared
// memory: 4 stages of 48 KB, in a ring. One thread of the producer warpgroup keeps the copy engine
// busy; two consumer warpgroups hold MT blocks of 64 x BN sums in registers, every second block of
// the tile each. A stage's `full` barrier counts its bytes, its `empty` barrier the 8 consumer
// warps. Boxes of X may reach into the next group's rows: what comes of them is never stored.
// Blocks past the group's end are skipped.
//
// Tiles are dealt to the CTAs in a fixed order: CTA i takes tiles i, i + CTAs, .. The order walks
// row tiles first, inside bands of 2,048 rows, then columns, then bands, then groups: at any time
// the CTAs are at work on about 2,048 x 2,048 outputs, whose X and W stay in L2. How many rows a
// group has is known only on the device, so each role finds its tiles itself. A sum's terms and
// their order depend on neither: same inputs, same bits.
//
// W is bf16, or packed fp4 that nobody ever sees wider: the copy engine then brings X only, and the
// producer warpgroup turns 64 x BN codes per stage into bf16 in shared memory; those of the next
// stage are on their way in registers meanwhile. 8 codes take some 20 integer instructions at half
// a warp per cycle, 350 cycles for 64 x 128 codes, where the tensor cores need 1,024 for 256 rows.
// So tiles are 256 x 128 then, not 128 x 256, and two producer warpgroups take turns: one of them
// alone waits more than it works.
//
// An adapter is a border of X and W: K blocks past K come from U and V (section 5). At rank 16 that
// costs its loads (mostly zero fill) and a quarter of a block's arithmetic. Sums are rounded once.

enum {
    PRODUCT_ROWS = 128, PRODUCT_K = 64,     // rows of a box of X; k of a stage: 128 bytes
    PRODUCT_BAND = 2048,                    // rows that share a walk over the columns
    PRODUCT_GROUPS = 384,                   // most groups: their offsets are kept in shared memory
    PRODUCT_WARPS = 8,                      // of the two consumer warpgroups
};

struct ProductShape {
    int E, rows, N, K, KU;
    int by_rows;                    // groups are row ranges (offset); else all rows, other columns
    int out_add;                    // fp32 only: out += instead of =
    size_t ldo, out_group;          // elements from row to row, from group to group
    const uint8_t *codes, *scales;  // W in fp4: (E,N,K/2) or (E,K,N/2), and a byte per 32 weights
};

// Shared memory, in bytes from a multiple of 1,024 (from which the swizzle counts).
template <int BN, int MT> struct ProductMemory {
    enum {
        X_STAGE = MT * PRODUCT_ROWS * PRODUCT_K * 2, W_STAGE = BN * PRODUCT_K * 2,
        STAGES = 192 * 1024 / (X_STAGE + W_STAGE),
        X = 0, W = X + STAGES * X_STAGE,
        OUT = W + STAGES * W_STAGE,             // two boxes of 16 rows x 128 bytes for each warp
        FULL = OUT + PRODUCT_WARPS * 4096, EMPTY = FULL + STAGES * 8,
        OFFSET = EMPTY + STAGES * 8, SIZE = OFFSET + (PRODUCT_GROUPS + 1) * 4,
    };
};

struct ProductTile {
    int group, row, rows, n;        // first row of X and out; rows left in the group; first column
};

// Where a walk over all tiles stands: tiles before `group` count `before`.
struct ProductWalk { int group, before; };

// Tile number `index`; 0 when there is none.
template <int BN, int MT>
__device__ __forceinline__ int product_tile(ProductTile &t, ProductWalk &walk, int index,
                                            const int *offset, const ProductShape &s) {
    const int height_of = MT * PRODUCT_ROWS, band_of = PRODUCT_BAND / height_of;
    int columns = (s.N + BN - 1) / BN, first, rows, tiles;
    for (;; walk.group++) {
        if (walk.group >= s.E) { return 0; }
        first = s.by_rows ? offset[walk.group] : 0;
        rows = s.by_rows ? offset[walk.group + 1] - first : s.rows;
        tiles = (rows + height_of - 1) / height_of;
        if (index - walk.before < tiles * columns) { break; }
        walk.before += tiles * columns;
    }
    int i = index - walk.before, band = i / (band_of * columns);
    int height = min(band_of, tiles - band * band_of);
    i -= band * band_of * columns;
    int m = band * band_of + i % height;
    t.group = walk.group;
    t.row = first + m * height_of;
    t.rows = rows - m * height_of;
    t.n = i / height * BN;
    return 1;
}

// 64 weights of a stage: a line of 128 bytes as bf16. They lie along K, or across it.
template <int BN> struct ProductCodes {
    enum { LINES = BN / 128 };      // of a thread: number threadIdx.x % 128, and 128 further on
    uint4 code[LINES][2];
    uint32_t scale[LINES];          // two bytes
};

template <int BN, int W_BY_K>
__device__ __forceinline__ void product_fetch(ProductCodes<BN> &c, const ProductShape &s,
                                              const ProductTile &t, int k) {
    #pragma unroll
    for (int i = 0; i < c.LINES; i++) {
        // Lines past the last column read other weights instead; nothing is made of their products.
        int line = threadIdx.x % 128 + 128 * i;
        int row = W_BY_K ? k + line % 64 : min(t.n + line, s.N - 1);
        int col = W_BY_K ? min(t.n + line / 64 * 64, s.N - 64) : k;
        size_t at = W_BY_K ? ((size_t)t.group * s.K + row) * s.N + col
                           : ((size_t)t.group * s.N + row) * s.K + col;
        c.code[i][0] = load_once(s.codes + at / 2);
        c.code[i][1] = load_once(s.codes + at / 2 + 16);
        c.scale[i] = *(const uint16_t *)(s.scales + at / FP4_BLOCK);
    }
}

// The lines go where the copy engine would have put them: chunks of 16 bytes, permuted by the row.
template <int BN>
__device__ __forceinline__ void product_widen(uint32_t w, const ProductCodes<BN> &c) {
    #pragma unroll
    for (int i = 0; i < c.LINES; i++) {
        int line = threadIdx.x % 128 + 128 * i;
        #pragma unroll
        for (int j = 0; j < 8; j++) {
            const uint4 &w4 = c.code[i][j / 4];
            uint32_t word = j % 4 == 0 ? w4.x : j % 4 == 1 ? w4.y : j % 4 == 2 ? w4.z : w4.w;
            __nv_bfloat162 scale = scale_pair(c.scale[i] >> j / 4 * 8 & 255);
            store_chunk(w + line * 128 + (j ^ line % 8) * 16, widen_codes(word, scale));
        }
    }
}

// A warp's 16 x BN sums -> out, by the copy engine: boxes of 16 rows x 128 bytes (64 bf16 or 32
// fp32) through two buffers of shared memory, while the next tile's products run. The 16-byte
// chunks of a row are permuted by its number (the swizzle): no bank conflicts.
template <int BN, int OUT_F32>
__device__ __forceinline__ void product_store(const CUtensorMap *map, const float (&sum)[BN / 2],
                                              uint32_t buffers, int n, int row, int slice) {
    int lane = threadIdx.x % 32;
    const int wide = OUT_F32 ? 32 : 64;
    #pragma unroll
    for (int box = 0; box < BN / wide; box++) {
        uint32_t to = buffers + box % 2 * 2048;
        const float *d = sum + box * wide / 2;
        if (lane == 0) { tma_wait_read<1>(); }          // the buffer's last box is on its way
        __syncwarp();
        if (OUT_F32) {          // lane l holds two columns of rows l / 4 and l / 4 + 8
            uint32_t line = to + lane / 4 * 128 + lane % 2 * 8;
            #pragma unroll
            for (int j = 0; j < 4; j++) {
                uint32_t chunk = ((2 * j + lane % 4 / 2) ^ (lane / 4)) * 16;
                store_two(line + chunk, d[4 * j], d[4 * j + 1]);
                store_two(line + chunk + 8 * 128, d[4 * j + 2], d[4 * j + 3]);
            }
        } else {
            #pragma unroll
            for (int j = 0; j < 8; j += 2) {
                store_matrices(to + lane % 16 * 128 + ((j + lane / 16) ^ (lane % 8)) * 16,
                               pack_bf16(d[4 * j], d[4 * j + 1]),
                               pack_bf16(d[4 * j + 2], d[4 * j + 3]),
                               pack_bf16(d[4 * j + 4], d[4 * j + 5]),
                               pack_bf16(d[4 * j + 6], d[4 * j + 7]));
            }
        }
        proxy_fence();
        __syncwarp();
        if (lane == 0) {
            tma_store(map, to, n + box * wide, row, slice);
            tma_commit();
        }
    }
}

// The same for a warp with fewer than 16 rows: straight from the registers. Rare, and slow.
template <int BN, typename Out>
__device__ __forceinline__ void product_store_some(Out *out, size_t ldo, const float (&sum)[BN / 2],
                                                   int rows, int columns) {
    int lane = threadIdx.x % 32;
    #pragma unroll
    for (int i = 0; i < BN / 4; i++) {      // lane l holds two columns of rows l / 4 and l / 4 + 8
        int r = lane / 4 + i % 2 * 8, c = lane % 4 * 2 + i / 2 * 8;
        if (r >= rows || c >= columns) { continue; }
        Out *to = out + r * ldo + c;
        to[0] = (Out)sum[2 * i], to[1] = (Out)sum[2 * i + 1];
    }
}

// out += sums, added in L2, where the numbers lie: no round trip. Each number gets one term per
// launch, so that no order shows in the result. Subnormal results become 0.
template <int BN>
__device__ __forceinline__ void product_add(float *out, size_t ldo, const float (&sum)[BN / 2],
                                            int rows, int columns) {
    int lane = threadIdx.x % 32;
    #pragma unroll
    for (int i = 0; i < BN / 4; i++) {
        int r = lane / 4 + i % 2 * 8, c = lane % 4 * 2 + i / 2 * 8;
        if (r >= rows || c >= columns) { continue; }
        asm volatile("red.global.add.v2.f32 [%0], {%1, %2};"
                     :: "l"(out + r * ldo + c), "f"(sum[2 * i]), "f"(sum[2 * i + 1]) : "memory");
    }
}

template <int BN, int MT, int W_BY_K, int OUT_F32, int W_FP4>
__global__ void __launch_bounds__(W_FP4 ? 512 : 384, 1)
product_kernel(void *out, const __grid_constant__ CUtensorMap map_out,
               const __grid_constant__ CUtensorMap map_x, const __grid_constant__ CUtensorMap map_w,
               const __grid_constant__ CUtensorMap map_u, const __grid_constant__ CUtensorMap map_v,
               const int *offset, const __grid_constant__ ProductShape s) {
    extern __shared__ unsigned char dynamic[];
    typedef ProductMemory<BN, MT> M;
    uint32_t unaligned = shared_address(dynamic), base;
    // volatile: computed once, not again in every turn of a loop
    asm volatile("add.u32 %0, %1, %2;" : "=r"(base) : "r"(unaligned), "r"(-unaligned % 1024));
    int *groups = (int *)(dynamic + (base - unaligned) + M::OFFSET);
    int warpgroup = threadIdx.x / 128, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    if (threadIdx.x == 0) {
        for (int i = 0; i < M::STAGES; i++) {
            barrier_init(base + M::FULL + 8 * i, W_FP4 ? 1 + 4 : 1);    // the engine, and 4 warps
            barrier_init(base + M::EMPTY + 8 * i, PRODUCT_WARPS);
        }
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    if (s.by_rows) {
        for (int i = threadIdx.x; i <= s.E; i += blockDim.x) { groups[i] = offset[i]; }
    }
    __syncthreads();

    ProductTile t;
    ProductWalk walk = { 0, 0 };
    int slot = 0, index = blockIdx.x, more = product_tile<BN, MT>(t, walk, index, groups, s);
    uint32_t phase = 0;
    auto next_stage = [&] { if (++slot == M::STAGES) { slot = 0, phase ^= 1; } };
    if (warpgroup >= 2) {
        const int border = (s.K + PRODUCT_K - 1) / PRODUCT_K * PRODUCT_K;   // first k of U and V
        int k = 0;
        // One stage further, in this tile or the next.
        auto step = [&] {
            next_stage();
            if ((k += PRODUCT_K) < border + s.KU) { return; }
            k = 0;
            more = product_tile<BN, MT>(t, walk, index += gridDim.x, groups, s);
        };
        // A stage on its way: MT * 16 KB of X or U, and of W or V BN * 128 bytes.
        auto load = [&](const ProductTile &t, int k, int slot) {
            const CUtensorMap *of_x = k < border ? &map_x : &map_u;
            const CUtensorMap *of_w = k < border ? &map_w : &map_v;
            int with_w = !W_FP4 || k >= border, wide = W_BY_K ? 64 : BN;
            uint32_t x = base + M::X + slot * M::X_STAGE, w = base + M::W + slot * M::W_STAGE;
            uint32_t full = base + M::FULL + 8 * slot;
            if (k >= border) { k -= border; }
            barrier_expect(full, M::X_STAGE + (with_w ? M::W_STAGE : 0));
            #pragma unroll
            for (int m = 0; m < MT; m++) {
                tma_load(x + m * (M::X_STAGE / MT), of_x, full, k, t.row + m * PRODUCT_ROWS,
                         s.by_rows ? 0 : t.group);
            }
            #pragma unroll
            for (int i = 0; i < BN && with_w; i += wide) {
                int n = t.n + i;
                tma_load(w + i * 128, of_w, full, W_BY_K ? n : k, W_BY_K ? k : n, t.group);
            }
        };
        if constexpr (!W_FP4) {
            registers_give<40>();
            for (; more && threadIdx.x == 256; step()) {
                barrier_wait(base + M::EMPTY + 8 * slot, phase ^ 1);
                load(t, k, slot);
            }
        } else {
            registers_give<72>();
            ProductCodes<BN> next;
            if (warpgroup == 3 && more) { step(); }     // in turns: STAGES is even
            if (more && k < border) { product_fetch<BN, W_BY_K>(next, s, t, k); }
            while (more) {
                const ProductCodes<BN> codes = next;
                const ProductTile of = t;
                const int at = k, in = slot;
                const uint32_t parity = phase ^ 1;
                step();
                if (more) { step(); }
                if (more && k < border) { product_fetch<BN, W_BY_K>(next, s, t, k); }
                barrier_wait(base + M::EMPTY + 8 * in, parity);
                if (threadIdx.x % 128 == 0) { load(of, at, in); }
                if (at < border) {
                    product_widen<BN>(base + M::W + in * M::W_STAGE, codes);
                    proxy_fence();                // before the tensor cores read what was stored
                    __syncwarp();
                }
                if (lane == 0) { barrier_arrive(base + M::FULL + 8 * in); }
            }
        }
    } else {
        registers_take<W_FP4 ? 184 : 232>();
        // Blocks of 64 k, and what is left of the border in steps of 16.
        int blocks = (s.K + PRODUCT_K - 1) / PRODUCT_K + s.KU / PRODUCT_K;
        int steps = (s.KU % PRODUCT_K + 15) / 16;
        const int x_step = 32 / 16, w_step = (W_BY_K ? 2048 : 32) / 16;
        uint32_t x0 = operand_low(base + M::X + warpgroup * 64 * 128, 16);
        uint32_t w0 = operand_low(base + M::W, W_BY_K ? 8192 : 16), empty = base + M::EMPTY;
        const int x_block = PRODUCT_ROWS * PRODUCT_K * 2 / 16;
        float sum[MT][BN / 2];
        uint32_t before = 0, last = 0;          // `empty` of the stages that are still being read
        // All products of a tile, for the first `active` of this warpgroup's blocks.
        auto products = [&](auto active) {
            for (int b = 0; b < blocks; b++) {
                uint32_t x = x0 + slot * (M::X_STAGE / 16), w = w0 + slot * (M::W_STAGE / 16);
                uint32_t current = empty + 8 * slot;
                barrier_wait(base + M::FULL + 8 * slot, phase);
                wgmma_fence();
                #pragma unroll
                for (int k = 0; k < 4; k++) {
                    #pragma unroll
                    for (int m = 0; m < active.value; m++) {
                        wgmma_m64k16<BN, W_BY_K>(sum[m], operand(x + m * x_block + k * x_step),
                                                 operand(w + k * w_step), b | k);
                    }
                }
                wgmma_commit();
                wgmma_wait<1>();
                if (b > 0 && lane == 0) { barrier_arrive(before); }
                before = current;
                next_stage();
            }
            if (steps == 0) { return; }
            uint32_t x = x0 + slot * (M::X_STAGE / 16), w = w0 + slot * (M::W_STAGE / 16);
            last = empty + 8 * slot;
            barrier_wait(base + M::FULL + 8 * slot, phase);
            #pragma unroll
            for (int k = 0; k < 4; k++) {
                if (k >= steps) { break; }
                wgmma_fence();
                #pragma unroll
                for (int m = 0; m < active.value; m++) {
                    wgmma_m64k16<BN, W_BY_K>(sum[m], operand(x + m * x_block + k * x_step),
                                             operand(w + k * w_step), 1);
                }
                wgmma_commit();
            }
            next_stage();
        };
        while (more) {
            if (warpgroup * 64 >= t.rows) {     // no rows here: only keep step
                for (int b = 0; b < blocks + (steps > 0); b++) {
                    barrier_wait(base + M::FULL + 8 * slot, phase);
                    if (lane == 0) { barrier_arrive(empty + 8 * slot); }
                    next_stage();
                }
                more = product_tile<BN, MT>(t, walk, index += gridDim.x, groups, s);
                continue;
            }
            if (MT > 1 && (MT - 1) * PRODUCT_ROWS + warpgroup * 64 < t.rows) {
                products(std::integral_constant<int, MT>());
            } else {
                products(std::integral_constant<int, 1>());
            }
            ProductTile done = t;
            more = product_tile<BN, MT>(t, walk, index += gridDim.x, groups, s);
            wgmma_wait<0>();
            if (lane == 0) {
                barrier_arrive(before);
                if (steps) { barrier_arrive(last); }
            }
            #pragma unroll
            for (int m = 0; m < MT; m++) {
                keep_order(sum[m]);
                int row = m * PRODUCT_ROWS + warp * 16, rows = done.rows - row;
                typedef typename std::conditional<OUT_F32, float, bf16>::type Out;
                row += done.row;
                Out *to = (Out *)out + done.group * s.out_group + row * s.ldo + done.n;
                if (OUT_F32 && s.out_add) {
                    product_add<BN>((float *)to, s.ldo, sum[m], rows, s.N - done.n);
                } else if (rows >= 16) {
                    product_store<BN, OUT_F32>(&map_out, sum[m], base + M::OUT + warp * 4096,
                                               done.n, row, s.by_rows ? 0 : done.group);
                } else if (rows > 0) {
                    product_store_some<BN>(to, s.ldo, sum[m], rows, s.N - done.n);
                }
            }
        }
        if (lane == 0) { tma_wait_all(); }
    }
}

// What a product reads and writes. All zero but what is set. N, K, KU, the strides are multiples of
// 8, pointers of 16 bytes. Rows of out that belong to no group are not touched.
struct Product {
    void *out;              // (rows,N), rows ldo apart: bf16, or float if out_f32
    size_t ldo;
    int out_f32, out_add;   // out_add (fp32 only): out += instead of =
    const bf16 *x;          // (rows,K), rows ldx apart
    size_t ldx;
    const bf16 *w;          // (E,N,K), or (E,K,N) if w_by_k; NULL: fp4, in
    const uint8_t *codes;   // half as many bytes, and a scale for 32 weights; N and K are multiples
    const uint8_t *scales;  // of 64
    int w_by_k;             // also of v
    const bf16 *u;          // border (rows,KU), rows ldu apart, and
    size_t ldu;
    const bf16 *v;          // (E,N,KU), or (E,KU,N); KU = 0: none
    const int *offset;      // device (E+1): rows of each group. NULL: every group has all rows, and
    size_t x_group;         // its columns of x and of out start that many elements after the last's
    size_t out_group;
    int E, rows, N, K, KU;  // rows: of the buffers, at least offset[E]
};

// The narrower tile wins where the wide one leaves SMs idle: it costs about 8 % more per output.
static int product_width(const Product &p, int ctas) {
    double cost[2];
    for (int i = 0; i < 2; i++) {
        int width = i ? 256 : 128;
        size_t tiles = p.offset ? (size_t)p.rows / PRODUCT_ROWS + p.E / 2 + 1
                                : (size_t)p.E * ((p.rows + PRODUCT_ROWS - 1) / PRODUCT_ROWS);
        tiles *= (p.N + width - 1) / width;
        cost[i] = (double)((tiles + ctas - 1) / ctas) * (i ? 2 : 1.08);
    }
    return cost[1] <= cost[0] ? 256 : 128;
}

static void grouped_product(const Product &p) {
    typedef void Kernel(void *, CUtensorMap, CUtensorMap, CUtensorMap, CUtensorMap, CUtensorMap,
                        const int *, ProductShape);
    static Kernel *const kernels[3][2][2] = {       // [width][w_by_k][out_f32]
        { { product_kernel<128, 1, 0, 0, 0>, product_kernel<128, 1, 0, 1, 0> },
          { product_kernel<128, 1, 1, 0, 0>, product_kernel<128, 1, 1, 1, 0> } },
        { { product_kernel<256, 1, 0, 0, 0>, product_kernel<256, 1, 0, 1, 0> },
          { product_kernel<256, 1, 1, 0, 0>, product_kernel<256, 1, 1, 1, 0> } },
        { { product_kernel<128, 2, 0, 0, 1>, product_kernel<128, 2, 0, 1, 1> },     // fp4
          { NULL, product_kernel<128, 2, 1, 1, 1> } } };
    if (p.rows == 0 || p.N == 0 || p.E == 0) { return; }
    const int strides = p.N % 8 || p.KU % 8 || p.ldx % 8 || p.ldu % 8 || p.ldo % 8 ||
                        p.x_group % 8 || p.out_group % 8;
    gpuRequire(p.K > 0 && p.K % 8 == 0 && !strides && p.E <= PRODUCT_GROUPS);
    gpuRequire((!p.out_add || p.out_f32) && (p.offset || p.E == 1 || p.KU == 0));
    gpuRequire(!p.codes || (p.K % 64 == 0 && p.N % 64 == 0 && p.w_by_k <= p.out_f32));
    const int ctas = multiprocessors() - side_sms;
    const int width = p.codes ? 128 : product_width(p, ctas);
    int depth = p.offset ? 1 : p.E, box = p.w_by_k ? PRODUCT_K : width;
    auto weights = [&](const bf16 *w, int K) {
        return p.w_by_k ? tensor_map(w, 0, p.N, K, p.E, p.N, (size_t)p.N * K, box)
                        : tensor_map(w, 0, K, p.N, p.E, K, (size_t)p.N * K, box);
    };
    CUtensorMap out = tensor_map(p.out, p.out_f32, p.N, p.rows, depth, p.ldo,
                                 depth > 1 ? p.out_group : p.ldo, 16);
    CUtensorMap x = tensor_map(p.x, 0, p.K, p.rows, depth, p.ldx, depth > 1 ? p.x_group : p.ldx,
                               PRODUCT_ROWS);
    CUtensorMap w = p.codes ? x : weights(p.w, p.K), u = x, v = w;
    if (p.KU) {
        u = tensor_map(p.u, 0, p.KU, p.rows, 1, p.ldu, p.ldu, PRODUCT_ROWS);
        v = weights(p.v, p.KU);
    }
    ProductShape s = { p.E, p.rows, p.N, p.K, p.KU, p.offset != NULL, p.out_add, p.ldo,
                       p.offset ? 0 : p.out_group, p.codes, p.scales };
    Kernel *kernel = kernels[p.codes ? 2 : width == 256][p.w_by_k][p.out_f32];
    int bytes = 1024 + (p.codes ? (int)ProductMemory<128, 2>::SIZE :
                        width == 256 ? (int)ProductMemory<256, 1>::SIZE
                                     : (int)ProductMemory<128, 1>::SIZE);
    cudaCheck(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
    kernel<<<ctas, p.codes ? 512 : 384, bytes, stream>>>(p.out, out, x, w, u, v, p.offset, s);
    cudaCheck(cudaGetLastError());
}
}   // namespace grouped

// The groups' offsets on the device, in the workspace.
static const int *device_offsets(const int *offset, int E) {
    int *copy = (int *)workspace(sizeof(int) * (size_t)(E + 1));
    cudaCheck(cudaMemcpyAsync(copy, offset, sizeof(int) * (size_t)(E + 1), cudaMemcpyHostToDevice,
                              stream));
    return copy;
}

// -------------------------------------------------------------------------------------------------
// 4.3 Experts in fp8: recast, multiply
//
// One layer's packed matrices become e4m3 codes in scratch, turned for the backward, and the fp8
// tensor cores multiply them. The ladder is dev/cuda/fp8_matmul.cu.

enum { RECAST_TABLES = 20 };    // of d = 0 .. 19; from d = 19 on all codes are 0

// Nibbles 0 .. 3 and 4 .. 7 of w, looked up in a table of eight magnitudes. prmt's fourth selector
// bit repeats a byte's sign: of bytes 0x80 it makes 0xFF where a code is negative.
__device__ __forceinline__ void recast_eight(uint32_t &low, uint32_t &high, uint32_t w, uint2 t) {
    uint32_t s_low, s_high, ones = 0x80808080;
    asm("prmt.b32 %0, %1, %1, %2;" : "=r"(s_low) : "r"(ones), "r"(w));
    asm("prmt.b32 %0, %1, %1, %2;" : "=r"(s_high) : "r"(ones), "r"(w >> 16));
    low = __byte_perm(t.x, t.y, w & 0x7777) | (s_low << 1 & 0x80808080);
    high = __byte_perm(t.x, t.y, w >> 16 & 0x7777) | (s_high << 1 & 0x80808080);
}

// The four scale bytes of row threadIdx.x of a block of 128 x 128, for threads 0 .. 127.
__device__ __forceinline__ uint32_t recast_scales(uint32_t *most, const uint8_t *scale, size_t row0,
                                                  int c0, int C) {
    const size_t at = (row0 + threadIdx.x) * C + c0;
    const uint32_t four = *(const uint32_t *)(scale + at / FP4_BLOCK);
    const uint32_t two = __vmaxu2(four & 0x00FF00FF, four >> 8 & 0x00FF00FF);
    largest_byte(most, max(two & 0xFFFF, two >> 16));
    return four;
}

// 256 threads per block of 128 x 128; a thread takes 4 pieces of 16 codes, TURNED of 4 neighbouring
// rows. A group whose scale lies d below the block's largest has its codes from table d.
//   bytes: 0.53 read + 1 written per weight: one layer's 32 experts, 1.23 GB, 0.29 ms.
template <int TURNED>
__global__ void __launch_bounds__(256) recast_kernel(uint8_t *codes, uint8_t *scales,
                                                     const uint8_t *w, const uint8_t *scale, int at,
                                                     int rows, int C, int O) {
    __shared__ uint2 table[RECAST_TABLES];
    __shared__ uint32_t group[128], most[4];
    __shared__ __align__(16) uint32_t tile[TURNED ? 128 * 32 : 1];
    const int o0 = blockIdx.y * 128, c0 = blockIdx.x * 128, thread = threadIdx.x;
    const int part = thread % 8, first = TURNED ? thread / 8 * 4 : thread / 8;
    const size_t e = blockIdx.z, row0 = e * O + o0;
    uint2 raw[4];
    #pragma unroll
    for (int j = 0; j < 4; j++) {
        const int o = first + (TURNED ? j : j * 32);
        raw[j] = *(const uint2 *)(w + ((row0 + o) * C + c0) / 2 + part * 8);
    }
    if (thread < 128) { group[thread] = recast_scales(most, scale, row0, c0, C); }
    if (thread < RECAST_TABLES * 8) {
        const int code = thread % 8;            // 0, 0.5, 1, 1.5, 2, 3, 4, 6
        const float magnitude = code < 4 ? code * 0.5f : code < 6 ? code - 2 : 2 * code - 8;
        const float value = ldexpf(magnitude, RECAST_LIFT - thread / 8);
        ((uint8_t *)table)[thread] = __nv_cvt_float_to_fp8(value, __NV_SATFINITE, __NV_E4M3);
    }
    __syncthreads();
    const int largest = max((int)RECAST_LIFT, largest_of(most));
    const int down = rows / 128, across = C / 128, row_block = (at + o0) / 128;
    if (thread == 0) {
        const int block = TURNED ? blockIdx.x * down + row_block : row_block * across + blockIdx.x;
        scales[e * down * across + block] = (uint8_t)(largest - RECAST_LIFT);
    }
    uint4 out[4];
    #pragma unroll
    for (int j = 0; j < 4; j++) {
        const int o = first + (TURNED ? j : j * 32);
        const int d = largest - (int)(group[o] >> part / 2 * 8 & 0xFF);
        const uint2 t = table[min(d, RECAST_TABLES - 1)];
        recast_eight(out[j].x, out[j].y, raw[j].x, t);
        recast_eight(out[j].z, out[j].w, raw[j].y, t);
        if (!TURNED) { *(uint4 *)(codes + (e * rows + at + o0 + o) * C + c0 + part * 16) = out[j]; }
    }
    if constexpr (TURNED) {
        tile_turn(tile, out);
        __syncthreads();
        #pragma unroll
        for (int j = 0; j < 4; j++) {
            const int c = j * 32 + thread / 8;
            *(uint4 *)(codes + (e * C + c0 + c) * rows + at + o0 + part * 16) =
                tile_line(tile, c, part);
        }
    }
}

extern "C" void recast_fp4_gpu(uint8_t *codes, uint8_t *scales, const uint8_t *w,
                               const uint8_t *scale, int turned, int at, int rows,
                               const int *offset, int E, int C, int O) {
    int e = 0;                          // the first expert with rows
    while (offset && e < E && offset[e + 1] == 0) { e++; }
    while (offset && E > e && offset[E - 1] == offset[E]) { E--; }
    const size_t from = (size_t)e * O * C, to = (size_t)e * rows * C;
    gpuRequire(C % FP8_BLOCK == 0 && O % FP8_BLOCK == 0);
    gpuRequire(at % FP8_BLOCK == 0 && rows % FP8_BLOCK == 0);
    if (E == e) { return; }
    auto kernel = turned ? recast_kernel<1> : recast_kernel<0>;
    kernel<<<dim3(C / 128, O / 128, E - e), 256, 0, stream>>>(
        codes + to, scales + to / (FP8_BLOCK * FP8_BLOCK), w + from / 2, scale + from / FP4_BLOCK,
        at, rows, C, O);
    cudaCheck(cudaGetLastError());
}

__global__ void recast_spread_kernel(int *blocks, const uint8_t *w, const uint8_t *scale, int C) {
    __shared__ uint32_t most[4], widest[4];
    const size_t row0 = (size_t)blockIdx.y * 128, row = row0 + threadIdx.x;
    const int c0 = blockIdx.x * 128;
    const uint32_t four = recast_scales(most, scale, row0, c0, C);
    __syncthreads();
    const int largest = max((int)RECAST_LIFT, largest_of(most));
    int spread = 0;
    for (int i = 0; i < 16; i++) {              // words of 8 codes, 4 to a scale
        const uint32_t word = ((const uint32_t *)(w + (row * C + c0) / 2))[i];
        const int d = largest - (int)(four >> i / 4 * 8 & 0xFF);
        if (word & 0x77777777) { spread = max(spread, d); }
    }
    largest_byte(widest, (unsigned)spread);
    __syncthreads();
    if (threadIdx.x == 0) { atomicAdd(blocks + min(largest_of(widest), RECAST_SPREAD + 1), 1); }
}

extern "C" void recast_spread_gpu(int *blocks_h, const uint8_t *w, const uint8_t *scale, int E,
                                  int C, int O) {
    int found[RECAST_SPREAD + 2];
    const size_t mark = workspace_mark();
    int *blocks = (int *)workspace(sizeof found);
    gpuRequire(C % FP8_BLOCK == 0 && O % FP8_BLOCK == 0);
    cudaCheck(cudaMemsetAsync(blocks, 0, sizeof found, stream));
    recast_spread_kernel<<<dim3(C / 128, E * (O / 128)), 128, 0, stream>>>(blocks, w, scale, C);
    cudaCheck(cudaGetLastError());
    gpu_download(found, blocks, sizeof found);
    for (int i = 0; i < RECAST_SPREAD + 2; i++) { blocks_h[i] += found[i]; }
    workspace_release(mark);
}

namespace grouped {

// d (64,128) = (add ? d : 0) + x (64,32) w (128,32)^T in e4m3, for a warpgroup. Both along k: fp8
// operands cannot be turned on their way, hence the turned matrix of the backward.
__device__ __forceinline__ void wgmma_m64k32(float (&d)[64], uint64_t x, uint64_t w, int add) {
    asm volatile(
        "{ .reg .pred p; setp.ne.b32 p, %66, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n128k32.f32.e4m3.e4m3 {" NUMBERS_64 "}, %64, %65, p, "
        "1, 1; }"
        : SUMS_32(d, 0), SUMS_32(d, 32)
        : "l"(x), "l"(w), "r"(add));
}

// The grouped product of 4.2 with bytes for operands: tiles of 128 rows x 256 columns, a ring of 4
// stages of 128 k, the same walk, the same stores. New are the scales. The tensor cores keep sums
// to about 14 bits, so every 128 k they are taken out, scaled by row and block, and added in fp32.
// A consumer warpgroup owns 128 x 128 sums, the left or the right half of the tile: one scale of w
// per block. It multiplies 64 rows at a time into 64 registers beside its 128 sums; while it adds
// those up, the other warpgroup multiplies.
//   a block of 128 k: 1,024 tensor clocks, 256 of 1,024 issue slots to add, 144 KB through shared
//   memory (1,152 clocks). Measured: about 1,040 TFLOP/s, against 730 of bf16.
template <int V_BY_K>
__global__ void __launch_bounds__(384, 1)
fp8_kernel(bf16 *out, const __grid_constant__ CUtensorMap map_out,
           const __grid_constant__ CUtensorMap map_x, const __grid_constant__ CUtensorMap map_w,
           const __grid_constant__ CUtensorMap map_u, const __grid_constant__ CUtensorMap map_v,
           const uint8_t *x_scale, const uint8_t *w_scale, const int *offset,
           const __grid_constant__ ProductShape s) {
    extern __shared__ unsigned char dynamic[];
    typedef ProductMemory<256, 1> M;        // 128 k of e4m3 are as many bytes as 64 k of bf16
    uint32_t unaligned = shared_address(dynamic), base;
    asm volatile("add.u32 %0, %1, %2;" : "=r"(base) : "r"(unaligned), "r"(-unaligned % 1024));
    int *groups = (int *)(dynamic + (base - unaligned) + M::OFFSET);
    int warpgroup = threadIdx.x / 128, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    if (threadIdx.x == 0) {
        for (int i = 0; i < M::STAGES; i++) {
            barrier_init(base + M::FULL + 8 * i, 1);
            barrier_init(base + M::EMPTY + 8 * i, PRODUCT_WARPS);
        }
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    for (int i = threadIdx.x; i <= s.E; i += blockDim.x) { groups[i] = offset[i]; }
    __syncthreads();

    ProductTile t;
    ProductWalk walk = { 0, 0 };
    const int blocks = s.K / FP8_BLOCK;
    int slot = 0, index = blockIdx.x, more = product_tile<256, 1>(t, walk, index, groups, s);
    uint32_t phase = 0;
    auto next_stage = [&] { if (++slot == M::STAGES) { slot = 0, phase ^= 1; } };
    if (warpgroup == 2) {
        registers_give<40>();
        if (threadIdx.x != 256) { return; }
        // A stage on its way: 128 rows of x or u, 256 columns of w or v.
        auto load = [&](const CUtensorMap *of_x, const CUtensorMap *of_w, int k, int across_k) {
            uint32_t full = base + M::FULL + 8 * slot, w = base + M::W + slot * M::W_STAGE;
            barrier_wait(base + M::EMPTY + 8 * slot, phase ^ 1);
            barrier_expect(full, M::X_STAGE + M::W_STAGE);
            tma_load(base + M::X + slot * M::X_STAGE, of_x, full, k, t.row, 0);
            for (int n = 0; n < 256; n += across_k ? 64 : 256) {
                tma_load(w + n * 128, of_w, full, across_k ? t.n + n : k, across_k ? k : t.n + n,
                         t.group);
            }
            next_stage();
        };
        while (more) {
            for (int b = 0; b < blocks; b++) { load(&map_x, &map_w, b * PRODUCT_K, 0); }
            for (int k = 0; k < s.KU; k += PRODUCT_K) { load(&map_u, &map_v, k, V_BY_K); }
            more = product_tile<256, 1>(t, walk, index += gridDim.x, groups, s);
        }
        return;
    }
    registers_take<232>();
    const uint32_t w_half = base + M::W + warpgroup * 128 * 128;
    const uint32_t x0 = operand_low(base + M::X, 16), w0 = operand_low(w_half, 16);
    const uint32_t v0 = operand_low(w_half, V_BY_K ? 8192 : 16), half_rows = 64 * 128 / 16;
    while (more) {
        float sum[2][64], part[64];
        // The scales of this thread's rows, l / 4 and l / 4 + 8 of its warp's 16 in both halves,
        // and of its columns; those of the next block are fetched while this one is multiplied.
        int row_scale[4], column = min(t.n / FP8_BLOCK + warpgroup, s.N / FP8_BLOCK - 1);
        int column_scale = (t.group * (s.N / FP8_BLOCK) + column) * blocks;
        unsigned row_next[4], column_next = w_scale[column_scale];
        #pragma unroll
        for (int i = 0; i < 4; i++) {
            int row = t.row + i / 2 * 64 + warp % 4 * 16 + lane / 4 + i % 2 * 8;
            row_scale[i] = min(row, s.rows - 1) * blocks;
            row_next[i] = x_scale[row_scale[i]];
        }
        const int halves = t.rows > 64 ? 2 : 1;
        #pragma unroll
        for (int i = 0; i < 64; i++) { sum[0][i] = sum[1][i] = 0; }
        for (int b = 0; b < blocks; b++) {
            float factor[4], of_column = e8m0_value(column_next);
            int next = min(b + 1, blocks - 1);
            #pragma unroll
            for (int i = 0; i < 4; i++) {
                factor[i] = of_column * e8m0_value(row_next[i]);
                row_next[i] = x_scale[row_scale[i] + next];
            }
            column_next = w_scale[column_scale + next];
            uint32_t x = x0 + slot * (M::X_STAGE / 16), w = w0 + slot * (M::W_STAGE / 16);
            barrier_wait(base + M::FULL + 8 * slot, phase);
            #pragma unroll
            for (int half = 0; half < 2; half++) {
                if (half == halves) { break; }
                wgmma_fence();
                #pragma unroll
                for (int k = 0; k < 4; k++) {
                    wgmma_m64k32(part, operand(x + half * half_rows + 2 * k), operand(w + 2 * k),
                                 k);
                }
                wgmma_commit();
                wgmma_wait<0>();
                if (half == halves - 1 && lane == 0) { barrier_arrive(base + M::EMPTY + 8 * slot); }
                keep_order(part);
                #pragma unroll
                for (int i = 0; i < 64; i++) {
                    sum[half][i] += part[i] * factor[2 * half + i / 2 % 2];
                }
            }
            next_stage();
        }
        for (int left = s.KU; left > 0; left -= PRODUCT_K) {    // the border, in bf16
            uint32_t u = x0 + slot * (M::X_STAGE / 16), v = v0 + slot * (M::W_STAGE / 16);
            barrier_wait(base + M::FULL + 8 * slot, phase);
            #pragma unroll
            for (int half = 0; half < 2; half++) {
                for (int k = 0; k < min(left, (int)PRODUCT_K); k += 16) {     // waits: they are few
                    wgmma_fence();
                    wgmma_m64k16<128, V_BY_K>(sum[half], operand(u + half * half_rows + k / 8),
                                              operand(v + (V_BY_K ? k * 8 : k / 8)), 1);
                    wgmma_commit();
                    wgmma_wait<0>();
                    keep_order(sum[half]);
                }
            }
            if (lane == 0) { barrier_arrive(base + M::EMPTY + 8 * slot); }
            next_stage();
        }
        ProductTile done = t;
        more = product_tile<256, 1>(t, walk, index += gridDim.x, groups, s);
        int n = done.n + warpgroup * 128;
        if (n >= s.N) { continue; }
        #pragma unroll
        for (int half = 0; half < 2; half++) {
            int at = half * 64 + warp % 4 * 16, row = done.row + at, rows = done.rows - at;
            if (rows >= 16) {
                product_store<128, 0>(&map_out, sum[half], base + M::OUT + warp * 4096, n, row, 0);
            } else if (rows > 0) {
                product_store_some<128>(out + row * s.ldo + n, s.ldo, sum[half], rows, 128);
            }
        }
    }
    if (lane == 0) { tma_wait_all(); }
}

// What an fp8 product reads and writes. N, K: multiples of 128; KU of 8.
struct Fp8Product {
    bf16 *out;                      // (rows,N)
    const uint8_t *x, *x_scale;     // (rows,K), (rows,K/128)
    const uint8_t *w, *w_scale;     // (E,N,K), (E,N/128,K/128)
    const bf16 *u, *v;              // border (rows,KU), and (E,N,KU) or, v_by_k, (E,KU,N)
    const int *offset;              // device (E+1): rows of each group
    int E, rows, N, K, KU, v_by_k;  // rows: of the buffers, at least offset[E]
};

static void fp8_product(const Fp8Product &p) {
    if (p.rows == 0 || p.E == 0) { return; }
    gpuRequire(p.K % FP8_BLOCK == 0 && p.N % FP8_BLOCK == 0 && p.K && p.E <= PRODUCT_GROUPS);
    // To the copy engine two codes are one bf16: all it does is move bytes.
    const int pairs = p.K / 2;
    const size_t slice = (size_t)p.N * p.KU;
    CUtensorMap out = tensor_map(p.out, 0, p.N, p.rows, 1, p.N, p.N, 16);
    CUtensorMap x = tensor_map(p.x, 0, pairs, p.rows, 1, pairs, pairs, PRODUCT_ROWS);
    CUtensorMap w = tensor_map(p.w, 0, pairs, p.N, p.E, pairs, (size_t)p.N * pairs, 256);
    CUtensorMap u = x, v = w;
    if (p.KU) {
        u = tensor_map(p.u, 0, p.KU, p.rows, 1, p.KU, p.KU, PRODUCT_ROWS);
        v = p.v_by_k ? tensor_map(p.v, 0, p.N, p.KU, p.E, p.N, slice, PRODUCT_K)
                     : tensor_map(p.v, 0, p.KU, p.N, p.E, p.KU, slice, 256);
    }
    ProductShape s = { p.E, p.rows, p.N, p.K, p.KU, 1, 0, (size_t)p.N, 0, NULL, NULL };
    auto kernel = p.v_by_k ? fp8_kernel<1> : fp8_kernel<0>;
    const int bytes = 1024 + (int)ProductMemory<256, 1>::SIZE;
    cudaCheck(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
    kernel<<<multiprocessors() - side_sms, 384, bytes, stream>>>(p.out, out, x, w, u, v, p.x_scale,
                                                                 p.w_scale, p.offset, s);
    cudaCheck(cudaGetLastError());
}
}   // namespace grouped

// -------------------------------------------------------------------------------------------------
// 5 Adapters and optimizers (lora.c)
//
// Small products with the rank on one side, each for a list of groups of rows: one group is a dense
// adapter, 32 groups are a layer's experts. u = A x goes by the tensor cores; s B u and A^T du ride
// in the product they are added to. Gradients of the factors sum over rows, and are bound by bytes:
// they read the wide side once for R_BLOCK ranks.

enum { R_BLOCK = 8, GROUPS_MAX = 256 };

// Row ranges of the groups: group e has rows at[e] .. at[e+1]-1. Passed by value.
typedef struct { int at[GROUPS_MAX + 1]; } Groups;

static Groups groups_of(const int *offset, int E) {
    Groups g;
    gpuRequire(E <= GROUPS_MAX);
    memcpy(g.at, offset, sizeof(int) * (size_t)(E + 1));
    return g;
}

static Groups one_group(int T) {
    Groups g;
    g.at[0] = 0;
    g.at[1] = T;
    return g;
}

static int longest_group(const Groups &g, int E) {
    int most = 0;
    for (int e = 0; e < E; e++) { most = max(most, g.at[e + 1] - g.at[e]); }
    return most;
}

enum { FACTOR_A, FACTOR_B };    // A is (R,N), B is (N,R)

// sum (split,R,N) = over the split's rows of u[row][r] x[row][n]. A thread owns 8 columns; the
// rows' u wait in shared memory, where all threads of a warp read the same 32 bytes.
//   bytes: 2 N per row, x once (per 8 ranks): 201 MB for w1's 24,576 rows, 48 us. The 0.8 G FMA of
//   rank 8 would take 28 us alone.
enum { WGRAD_ROWS = 64, WGRAD_COLUMNS = 1024 };
__global__ void __launch_bounds__(WGRAD_COLUMNS / 8)
lora_wgrad_kernel(float *sum, const float *u, const bf16 *x, const __grid_constant__ Groups groups,
                  int N, int R, int splits) {
    __shared__ float4 waiting[WGRAD_ROWS][R_BLOCK / 4];
    const int e = blockIdx.z, split = blockIdx.y, n = (blockIdx.x * blockDim.x + threadIdx.x) * 8;
    const int rows = groups.at[e + 1] - groups.at[e], part = (rows + splits - 1) / splits;
    const int begin = groups.at[e] + split * part, end = min(groups.at[e + 1], begin + part);
    sum += ((size_t)e * splits + split) * R * N;
    x += n < N ? n : 0;
    for (int r0 = 0; r0 < R; r0 += R_BLOCK) {
        float g[R_BLOCK][8] = {0};
        for (int row0 = begin; row0 < end; row0 += WGRAD_ROWS) {
            const int here = min((int)WGRAD_ROWS, end - row0);
            __syncthreads();
            for (int i = threadIdx.x; i < WGRAD_ROWS * R_BLOCK; i += blockDim.x) {
                const int row = i / R_BLOCK, r = r0 + i % R_BLOCK;
                ((float *)waiting)[i] = row < here && r < R ? u[(size_t)(row0 + row) * R + r] : 0;
            }
            __syncthreads();
            #pragma unroll 4
            for (int i = 0; i < here; i++) {
                float v[8];
                load8(v, x + (size_t)(row0 + i) * N);
                #pragma unroll
                for (int q = 0; q < R_BLOCK / 4; q++) {
                    const float4 c = waiting[i][q];
                    #pragma unroll
                    for (int k = 0; k < 8; k++) {
                        g[4 * q][k] += c.x * v[k], g[4 * q + 1][k] += c.y * v[k];
                        g[4 * q + 2][k] += c.z * v[k], g[4 * q + 3][k] += c.w * v[k];
                    }
                }
            }
        }
        #pragma unroll
        for (int r = 0; r < R_BLOCK; r++) {
            if (r0 + r >= R || n >= N) { break; }
            store4(sum + (size_t)(r0 + r) * N + n, g[r]);
            store4(sum + (size_t)(r0 + r) * N + n + 4, g[r] + 4);
        }
    }
}

// grad += s times the splits' sums, in their order. grad: (R,N) or (N,R) by KIND, per group.
template <int KIND>
__global__ void lora_wgrad_add_kernel(float *grad, const float *sum, float s, int N, int R,
                                      int splits, size_t n) {
    const size_t at = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (at >= n) { return; }
    const size_t each = (size_t)R * N, e = at / each, r = at % each / N, c = at % N;
    float all = 0;
    for (int i = 0; i < splits; i++) { all += sum[(e * splits + i) * each + r * N + c]; }
    grad[e * each + (KIND == FACTOR_A ? r * N + c : c * R + r)] += s * all;
}

// out (n / RP / inner, RP, inner) = s x (.., R, inner), zeros past R.
__global__ void narrow_factor_kernel(bf16 *out, const float *x, float s, int R, int RP,
                                     size_t inner, size_t n) {
    const size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x, r = i / inner % RP;
    if (i >= n) { return; }
    out[i] = __float2bfloat16(r < R ? s * x[(i / inner / RP * R + r) * inner + i % inner] : 0);
}

static int whole_ranks(int R) { return (R + 7) / 8 * 8; }

// s times a factor as the tensor cores read it, in the workspace: its ranks, the middle of (outer,
// R, inner), are filled up with zeros to whole_ranks(R).
static const bf16 *narrow_factor(const float *x, float s, size_t outer, int R, size_t inner) {
    const size_t n = outer * whole_ranks(R) * inner;
    bf16 *out = (bf16 *)workspace(sizeof(bf16) * n);
    narrow_factor_kernel<<<blocks_for(n, 256), 256, 0, stream>>>(out, x, s, R, whole_ranks(R),
                                                                 inner, n);
    cudaCheck(cudaGetLastError());
    return out;
}

// Rows of x (rows,K) by groups: offset on the device, NULL for one dense group.
static grouped::Product product_of(const bf16 *x, int K, const int *offset, int E, int rows,
                                   int N) {
    grouped::Product p = {};
    p.x = x, p.ldx = K;
    p.offset = offset;
    p.E = E, p.rows = rows, p.N = N, p.K = K;
    return p;
}

// u (rows,R) = s x (rows,N) w^T.
template <int KIND>
static void lora_down(float *u, const bf16 *x, const float *w, float s, const int *offset, int E,
                      int rows, int N, int R) {
    const size_t mark = workspace_mark();
    const int whole = whole_ranks(R);
    if (rows == 0) { return; }
    grouped::Product p = product_of(x, N, offset, E, rows, (int)whole);
    float *to = whole > R ? (float *)workspace(sizeof(float) * rows * whole) : u;
    p.out = to, p.ldo = whole, p.out_f32 = 1, p.w_by_k = KIND == FACTOR_B;
    p.w = narrow_factor(w, s, KIND == FACTOR_A ? E : (size_t)E * N, R, KIND == FACTOR_A ? N : 1);
    grouped::grouped_product(p);
    if (to != u) {
        cudaCheck(cudaMemcpy2DAsync(u, sizeof(float) * R, to, sizeof(float) * whole,
                                    sizeof(float) * R, rows, cudaMemcpyDeviceToDevice, stream));
    }
    workspace_release(mark);
}

template <int KIND>
static void lora_wgrad(float *grad, const float *u, const bf16 *x, float s, const Groups &all,
                       int E, int N, int R) {
    const int most = longest_group(all, E), columns = blocks_for(N, WGRAD_COLUMNS);
    int first = 0;
    if (most == 0) { return; }
    // A round brings the rows of a few neighbouring experts: they share the card among themselves.
    while (all.at[first + 1] == all.at[0]) { first++; }
    while (all.at[E - 1] == all.at[E]) { E--; }
    Groups g = {};
    for (int e = first; e <= E; e++) { g.at[e - first] = all.at[e]; }
    E -= first, grad += (size_t)first * R * N;
    // Enough blocks for the card, but not fewer than 64 rows each.
    int splits = min(blocks_for(most, WGRAD_ROWS), max(1, blocks_for(1056, columns * E)));
    const size_t mark = workspace_mark(), n = (size_t)E * R * N;
    float *sum = (float *)workspace(sizeof(float) * n * splits);
    lora_wgrad_kernel<<<dim3(columns, splits, E), WGRAD_COLUMNS / 8, 0, stream>>>(sum, u, x, g, N,
                                                                                  R, splits);
    lora_wgrad_add_kernel<KIND><<<blocks_for(n, 256), 256, 0, stream>>>(grad, sum, s, N, R, splits,
                                                                        n);
    cudaCheck(cudaGetLastError());
    workspace_release(mark);
}

// The frozen matrices of a product, one for each group: a bf16 copy, or packed fp4.
typedef struct { const bf16 *wide; const uint8_t *codes, *scales; } Matrices;

// out = W x + s B (A x), group by group: B joins the product as R more columns of W, u as R more
// columns of x, so that the sum is rounded once. u and s B themselves are rounded to bf16 before,
// for the tensor cores; what is kept for the backward is not.
template <typename Y>
static void lora_forward(Y *out, real *u, const act *inp, Matrices w, const real *a, const real *b,
                         float s, const Groups &g, const int *offset, int E, int C, int O, int R) {
    const size_t mark = workspace_mark(), rows = (size_t)g.at[E];
    grouped::Product p = product_of(inp, C, offset, E, g.at[E], O);
    p.out = out, p.ldo = O, p.out_f32 = sizeof *out == sizeof(float);
    p.w = w.wide, p.codes = w.codes, p.scales = w.scales;
    const int adapted = a != NULL && R > 0;
    if (adapted && rows) {
        lora_down<FACTOR_A>(u, inp, a, 1, offset, E, (int)rows, C, R);
        p.u = narrow_factor(u, 1, rows, R, 1), p.ldu = p.KU = whole_ranks(R);
        p.v = narrow_factor(b, s, (size_t)E * O, R, 1);
    }
    grouped::grouped_product(p);
    workspace_release(mark);
}

// du = s B^T dy; dx += W^T dy + A^T du; dB += s dy u^T; dA += du x^T.
static void lora_backward(real *dinp, real *da, real *db, const act *dout, const act *inp,
                          const real *u, Matrices w, const real *a, const real *b, float s,
                          const Groups &g, const int *offset, int E, int C, int O, int R) {
    const size_t mark = workspace_mark(), rows = (size_t)g.at[E];
    const int adapted = a != NULL && R > 0;
    float *du = (float *)workspace(sizeof(float) * rows * R);
    grouped::Product p = product_of(dout, O, offset, E, g.at[E], C);
    p.out = dinp, p.ldo = C, p.out_f32 = 1, p.out_add = 1;
    p.w = w.wide, p.codes = w.codes, p.scales = w.scales, p.w_by_k = 1;
    if (adapted && rows) {
        lora_down<FACTOR_B>(du, dout, b, s, offset, E, (int)rows, O, R);
        p.u = narrow_factor(du, 1, rows, R, 1), p.ldu = p.KU = whole_ranks(R);
        p.v = narrow_factor(a, 1, E, R, C);
    }
    grouped::grouped_product(p);
    if (adapted) {
        lora_wgrad<FACTOR_B>(db, u, dout, s, g, E, O, R);
        lora_wgrad<FACTOR_A>(da, du, inp, 1, g, E, C, R);
    }
    workspace_release(mark);
}

extern "C" void lora_linear_forward_gpu(act *out, real *u, const act *inp, const uint8_t *w,
                                        const uint8_t *scale, const real *a, const real *b, float s,
                                        int T, int C, int O, int R) {
    const size_t mark = workspace_mark();
    if (T == 0) { return; }
    lora_forward(out, u, inp, { widened_fp8(w, scale, C, O), NULL, NULL }, a, b, s,
                 one_group(T), NULL, 1, C, O, R);
    workspace_release(mark);
}

extern "C" void lora_linear_backward_gpu(real *dinp, real *da, real *db, const act *dout,
                                         const act *inp, const real *u, const uint8_t *w,
                                         const uint8_t *scale, const real *a, const real *b,
                                         float s, int T, int C, int O, int R) {
    const size_t mark = workspace_mark();
    if (T == 0) { return; }
    lora_backward(dinp, da, db, dout, inp, u, { widened_fp8(w, scale, C, O), NULL, NULL }, a, b, s,
                  one_group(T), NULL, 1, C, O, R);
    workspace_release(mark);
}

// The experts that have rows, from *first on: in a round of many, only a few do. Returns how many
// lie between the first and the last of them; g: their rows.
static int experts_with_rows(Groups *g, int *first, const int *offset, int E) {
    gpuRequire(E <= GROUPS_MAX);
    for (*first = 0; *first < E && offset[*first + 1] == offset[0]; ) { ++*first; }
    while (E > *first && offset[E - 1] == offset[E]) { E--; }
    for (int i = *first; i <= E; i++) { g->at[i - *first] = offset[i]; }
    return E - *first;
}

extern "C" void lora_experts_forward_gpu(act *out, real *u, const act *inp, const int *offset,
                                         const uint8_t *w, const uint8_t *scale, const real *a,
                                         const real *b, float s, int E, int C, int O, int R) {
    Groups g;
    int e, n = experts_with_rows(&g, &e, offset, E);
    const size_t mark = workspace_mark(), at = (size_t)e * O * C;
    if (n == 0) { return; }
    lora_forward(out, u, inp, { NULL, w + at / 2, scale + at / FP4_BLOCK },
                 a ? a + (size_t)e * R * C : NULL, b ? b + (size_t)e * O * R : NULL, s, g,
                 device_offsets(g.at, n), n, C, O, R);
    workspace_release(mark);
}

extern "C" void lora_experts_backward_gpu(real *dinp, real *da, real *db, const act *dout,
                                          const act *inp, const real *u, const int *offset,
                                          const uint8_t *w, const uint8_t *scale, const real *a,
                                          const real *b, float s, int E, int C, int O, int R) {
    Groups g;
    int e, n = experts_with_rows(&g, &e, offset, E);
    const size_t mark = workspace_mark(), at = (size_t)e * O * C;
    const size_t at_a = (size_t)e * R * C, at_b = (size_t)e * O * R;
    if (n == 0) { return; }
    lora_backward(dinp, da + at_a, db + at_b, dout, inp, u,
                  { NULL, w + at / 2, scale + at / FP4_BLOCK }, a ? a + at_a : NULL,
                  b ? b + at_b : NULL, s, g, device_offsets(g.at, n), n, C, O, R);
    workspace_release(mark);
}

// A receiver's terms, not rounded (dev/engine.c). type: DT_FP4, or DT_FP8: E is 1 then.
extern "C" void partial_forward_gpu(real *out, real *u, const act *inp, const int *offset,
                                    const uint8_t *w, const uint8_t *scale, int type,
                                    const real *a, const real *b, float s, int E, int C, int O,
                                    int R) {
    const size_t mark = workspace_mark();
    if (offset[E] == 0) { return; }
    Matrices m = { NULL, w, scale };
    if (type == DT_FP8) { m = { widened_fp8(w, scale, C, O), NULL, NULL }; }
    lora_forward(out, u, inp, m, a, b, s, groups_of(offset, E), device_offsets(offset, E), E, C, O,
                 R);
    workspace_release(mark);
}

// The adapter's share of a forward and of a backward.
extern "C" void lora_experts_down_gpu(real *u, const act *inp, const int *offset, const real *a,
                                      int E, int C, int R) {
    const size_t mark = workspace_mark();
    if (a == NULL || R == 0 || offset[E] == 0) { return; }
    lora_down<FACTOR_A>(u, inp, a, 1, device_offsets(offset, E), E, offset[E], C, R);
    workspace_release(mark);
}

extern "C" void lora_experts_gradients_gpu(real *du, real *da, real *db, const act *dout,
                                           const act *inp, const real *u, const int *offset,
                                           const real *b, float s, int E, int C, int O, int R) {
    const size_t mark = workspace_mark();
    if (b == NULL || R == 0 || offset[E] == 0) { return; }
    const Groups g = groups_of(offset, E);
    lora_down<FACTOR_B>(du, dout, b, s, device_offsets(offset, E), E, offset[E], O, R);
    lora_wgrad<FACTOR_B>(db, u, dout, s, g, E, O, R);
    lora_wgrad<FACTOR_A>(da, du, inp, 1, g, E, C, R);
    workspace_release(mark);
}

// Number i of (E,2R,C) and (E,2F,2R) in the adapters of w1 and w3 (C text: lora_stacked).
__global__ void lora_stack_kernel(real *stack, real *a1, real *b1, real *a3, real *b3, int add,
                                  size_t n_a, size_t n, int C, int F, int R) {
    const size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    real *p = NULL;
    if (i >= n) { return; }
    if (i < n_a) {
        const size_t r = i / C % (2 * R), e = i / C / (2 * R);
        if (real *a = r < R ? a1 : a3) { p = a + (e * R + r % R) * C + i % C; }
    } else {
        const size_t row = (i - n_a) / (2 * R), r = (i - n_a) % (2 * R), f = row % (2 * F);
        real *b = f < F ? b1 : b3;
        if (b && (r < R) == (f < F)) { p = b + (row / (2 * F) * F + f % F) * R + r % R; }
    }
    if (!add) { stack[i] = p ? *p : 0; } else if (p) { *p += stack[i]; }
}

extern "C" void lora_stack_gpu(real *stack, real *a1, real *b1, real *a3, real *b3, int add, int E,
                               int C, int F, int R) {
    const size_t n_a = (size_t)E * 2 * R * C, n = n_a + (size_t)E * 4 * F * R;
    if (n == 0) { return; }
    lora_stack_kernel<<<blocks_for(n, 256), 256, 0, stream>>>(stack, a1, b1, a3, b3, add, n_a, n, C,
                                                              F, R);
    cudaCheck(cudaGetLastError());
}

extern "C" void experts_fp8_product_gpu(act *out, const uint8_t *inp, const uint8_t *inp_scale,
                                        const int *offset, const uint8_t *w, const uint8_t *scale,
                                        const real *u, const real *v, int v_by_k, float s, int E,
                                        int C, int O, int R) {
    const size_t mark = workspace_mark();
    grouped::Fp8Product p = {};
    if (E == 0 || offset[E] == 0) { return; }
    p.out = out, p.x = inp, p.x_scale = inp_scale, p.w = w, p.w_scale = scale;
    p.offset = device_offsets(offset, E), p.E = E, p.rows = offset[E], p.N = O, p.K = C;
    if (u != NULL && R > 0) {
        p.KU = whole_ranks(R), p.v_by_k = v_by_k;
        p.u = narrow_factor(u, 1, offset[E], R, 1);
        p.v = narrow_factor(v, s, v_by_k ? E : (size_t)E * O, R, v_by_k ? O : 1);
    }
    grouped::fp8_product(p);
    workspace_release(mark);
}

// Sum of squares in double: fixed blocks, each a fixed tree, added in order on the host.
enum { SUM_BLOCKS = 1024 };
__global__ void sum_squares_kernel(double *out, const float *x, size_t n) {
    __shared__ double shared[256];
    double sum = 0;
    for (size_t i = (size_t)blockIdx.x * 256 + threadIdx.x; i < n; i += (size_t)SUM_BLOCKS * 256) {
        sum += (double)x[i] * x[i];
    }
    shared[threadIdx.x] = sum;
    __syncthreads();
    for (int k = 128; k > 0; k /= 2) {
        if ((int)threadIdx.x < k) { shared[threadIdx.x] += shared[threadIdx.x + k]; }
        __syncthreads();
    }
    if (threadIdx.x == 0) { out[blockIdx.x] = shared[0]; }
}

extern "C" void sum_squares_gpu(double *sum_h, const real *x, size_t n) {
    double part[SUM_BLOCKS];
    const size_t mark = workspace_mark();
    double *out = (double *)workspace(sizeof part);
    sum_squares_kernel<<<SUM_BLOCKS, 256, 0, stream>>>(out, x, n);
    cudaCheck(cudaGetLastError());
    cudaCheck(cudaMemcpyAsync(part, out, sizeof part, cudaMemcpyDeviceToHost, stream));
    streamWait();
    workspace_release(mark);
    *sum_h = 0;
    for (int i = 0; i < SUM_BLOCKS; i++) { *sum_h += part[i]; }
}

// AdamW over all adapters in one launch; constants are made in double and rounded once, as in the C
// text.
//   bytes: 28 per element; 228 M elements per rank at r 8: 6.4 GB, 1.49 ms; measured 1.72.
__global__ void adamw_kernel(float *p, float *m, float *v, const float *g, size_t n, float scale,
                             float keep, float new1, float old2, float new2, float rate, float root,
                             float eps) {
    const size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) { return; }
    const float grad = g[i] * scale;
    const float mean = m[i] + new1 * (grad - m[i]), square = old2 * v[i] + new2 * grad * grad;
    m[i] = mean;
    v[i] = square;
    p[i] = keep * p[i] - rate * mean / (sqrtf(square) / root + eps);
}

extern "C" void adamw_update_gpu(real *p, real *m, real *v, const real *g, size_t n,
                                 double grad_scale, double lr, double beta1, double beta2,
                                 double eps, double weight_decay, int step) {
    if (n == 0) { return; }
    adamw_kernel<<<blocks_for(n, 256), 256, 0, stream>>>(
        p, m, v, g, n, (float)grad_scale, (float)(1 - lr * weight_decay), (float)(1 - beta1),
        (float)beta2, (float)(1 - beta2), (float)(lr / (1 - pow(beta1, step))),
        (float)sqrt(1 - pow(beta2, step)), (float)eps);
    cudaCheck(cudaGetLastError());
}

// Muon (C text: section 7 of lora.c): a step of all slices, in one launch per size of slice.
//
// A slice is a cluster of 1 to 16 blocks, each with at most 64 KB of its columns, as X, in shared
// memory, where R, Q and Z are too. Blocks add up their parts of R by reading each other's shared
// memory, in their order, and every one of them does the small work on R alone. So a cluster holds
// what one block could not; up to rank 8 an SM has two, of which one computes while the other waits
// for memory. What 16 blocks cannot hold (32,768 columns at ranks above 8) is worked on where the
// gradient was, in global memory, by one block; so is a slice that is not aligned to 16 bytes.
// Ranks above 64 are refused. fp32 throughout; |U|^2 is summed in double: a tiny gradient has a
// norm too.
//   bytes: 20 per element; full model at r 8 on 8 ranks, 228 M elements: 4.6 GB, 1.07 ms at 4,277
//   GB/s (AdamW, 28 bytes: 1.49). Shared memory is passed 9 times, 0.25 ms; Gram matrices and
//   products with Q are 25 multiply-adds per element, 0.2 ms. Predicted, half of that hidden: 1.3
//   ms. Measured 2.26 ms, 1.31 times AdamW's 1.72: a block's phases wait for each other more than
//   that. dev/cuda/muon.cu is the ladder.

namespace muon {
enum { THREADS = 256, WARPS = THREADS / 32, TILE = 8, ROUNDS = 5, BLOCKS_MAX = 16 };

struct Slice { size_t at, rows, cols; };     // as in slices_h

struct Step {
    float *p, *m, *g;
    const Slice *slices;        // of this launch
    float scale, old, fresh, keep;
    double lr;
    int restarts;               // bit t: before round t
    int n, count;               // the short side, and how many of the other's columns a block has
};

// What a block has in shared memory besides its part of X.
template <int N> struct Room {
    float r[N * N], q[N * N], z[N * N], next[N * N], p[N * N];
    float part[2][N * N];       // this block's part of R, of two Gram matrices in turn
    float warp[WARPS][TILE * TILE];
    double sum[WARPS], norm;    // this block's part of |U|^2
    int state;                  // bit 0: some gradient is not zero, bit 1: one is not finite
};

template <int V> __device__ inline void load(float *x, const float *p) {
    if (V == 4) { *(float4 *)x = *(const float4 *)p; } else { *x = *p; }
}
template <int V> __device__ inline void store(float *p, const float *x) {
    if (V == 4) { *(float4 *)p = *(const float4 *)x; } else { *p = *x; }
}

// Where X is: n rows, the block's columns first .. first + count - 1 of all m.
struct Columns {
    float *x;                   // element (i,j) of the block at x[i * down + j * right]
    int down, right;
    int n, m, first, count;
    bool wide;                  // stored row by row, n rows; else m rows of n
};

// A thread's way through the block's elements in the order of memory, V at a time: (i,j) and its
// V - 1 neighbours in memory, then those THREADS V further on.
template <int V, bool WIDE, bool SHARED> struct Walk {
    int i, j;
    __device__ Walk(const Columns &c) {
        const int e = threadIdx.x * V, length = WIDE ? c.count : c.n;
        i = WIDE ? e / length : e % length, j = WIDE ? e % length : e / length;
    }
    __device__ void next(const Columns &c) {
        if (WIDE) {
            for (j += THREADS * V; j >= c.count; j -= c.count) { i++; }
        } else {
            i += THREADS * V % c.n, j += THREADS * V / c.n;
            if (i >= c.n) { i -= c.n, j++; }
        }
    }
    __device__ bool inside(const Columns &c) const { return WIDE ? i < c.n : j < c.count; }
    // Its place in the slice.
    __device__ int at(const Columns &c) const {
        return WIDE ? i * c.m + c.first + j : (c.first + j) * c.n + i;
    }
    // From X, or to it.
    template <bool STORE> __device__ void move(float *x, const Columns &c) const {
        if constexpr (WIDE || !SHARED) {
            float *p = c.x + (SHARED ? i * c.down + j : at(c));
            if (STORE) { store<V>(p, x); } else { load<V>(x, p); }
        } else {
            #pragma unroll
            for (int v = 0, row = i, column = j; v < V; v++) {
                float *p = c.x + row * c.down + column;
                if (STORE) { *p = x[v]; } else { x[v] = *p; }
                if (++row == c.n) { row = 0, column++; }
            }
        }
    }
};

enum { BATCH = 4 };             // loads that a thread has under way

// Reads the gradient, into X if that is in shared memory; what it is like, as in Room.
template <int V, bool WIDE, bool SHARED>
__device__ int read_gradient(const Columns &c, const float *g) {
    int state = 0;
    for (Walk<V, WIDE, SHARED> w(c); w.inside(c); ) {
        float x[BATCH][V];
        Walk<V, WIDE, SHARED> here = w;
        #pragma unroll
        for (int u = 0; u < BATCH; u++, w.next(c)) {
            if (w.inside(c)) { load<V>(x[u], g + w.at(c)); }
        }
        #pragma unroll
        for (int u = 0; u < BATCH; u++, here.next(c)) {
            if (!here.inside(c)) { break; }
            #pragma unroll
            for (int v = 0; v < V; v++) { state |= (x[u][v] != 0) | !isfinite(x[u][v]) << 1; }
            if (SHARED) { here.template move<true>(x[u], c); }
        }
    }
    return state;
}

// Moments, and U in place of the gradient. Returns this thread's part of |U|^2.
template <int V, bool WIDE, bool SHARED>
__device__ double update_moments(const Columns &c, float *m, const Step &s) {
    double sum = 0;
    for (Walk<V, WIDE, SHARED> w(c); w.inside(c); ) {
        float x[V], old[BATCH][V];
        Walk<V, WIDE, SHARED> here = w;
        #pragma unroll
        for (int u = 0; u < BATCH; u++, w.next(c)) {
            if (w.inside(c)) { load<V>(old[u], m + w.at(c)); }
        }
        #pragma unroll
        for (int u = 0; u < BATCH; u++, here.next(c)) {
            if (!here.inside(c)) { break; }
            here.template move<false>(x, c);
            #pragma unroll
            for (int v = 0; v < V; v++) {
                const float g = x[v] * s.scale;
                old[u][v] = s.old * old[u][v] + s.fresh * g;
                x[v] = s.fresh * g + s.old * old[u][v];
                sum += (double)x[v] * x[v];
            }
            store<V>(m + here.at(c), old[u]);
            here.template move<true>(x, c);
        }
    }
    return sum;
}

template <int V, bool WIDE, bool SHARED>
__device__ void update_masters(const Columns &c, float *p, float keep, float rate) {
    for (Walk<V, WIDE, SHARED> w(c); w.inside(c); ) {
        float y[BATCH][V], x[V];
        Walk<V, WIDE, SHARED> here = w;
        #pragma unroll
        for (int u = 0; u < BATCH; u++, w.next(c)) {
            if (w.inside(c)) { load<V>(y[u], p + w.at(c)); }
        }
        #pragma unroll
        for (int u = 0; u < BATCH; u++, here.next(c)) {
            if (!here.inside(c)) { break; }
            here.template move<false>(x, c);
            #pragma unroll
            for (int v = 0; v < V; v++) { y[u][v] = keep * y[u][v] - rate * x[v]; }
            store<V>(p + here.at(c), y[u]);
        }
    }
}

// Rows i0 .. i0+7 of column j, times scale; rows past n are zero.
template <bool SHARED> __device__ inline void load_tile(float *y, const Columns &c, float scale,
                                                        int i0, int j) {
    #pragma unroll
    for (int i = 0; i < TILE; i++) {
        const int at = (i0 + i) * c.down + (SHARED ? j : j * c.right);
        y[i] = i0 + i < c.n ? c.x[at] * scale : 0;
    }
}

// 32 sums over the lanes of a warp at once: lanes exchange halves, then quarters, ..; lane l is
// left with sum l in x[0], after 31 exchanges where 32 trees would take 160.
template <int HALF> __device__ inline void warp_sums(float *x) {
    const bool upper = threadIdx.x & HALF;
    #pragma unroll
    for (int i = 0; i < HALF; i++) {
        const float give = upper ? x[i] : x[i + HALF], keep = upper ? x[i + HALF] : x[i];
        x[i] = keep + __shfl_xor_sync(~0u, give, HALF);
    }
    if constexpr (HALF > 1) { warp_sums<HALF / 2>(x); }
}

// Place of (i,k), i <= k < 8, in a triangle of 36.
__host__ __device__ constexpr int triangle(int i, int k) {
    return i * TILE - i * (i - 1) / 2 + k - i;
}

// part (N,N) = the block's part of X X^T, X times scale: tiles of 8 x 8, those of the diagonal as
// triangles. Each thread has sums over its columns; then over the warp, and over warps.
template <int N, bool SHARED>
__device__ void gram(float *part, Room<N> &room, const Columns &c, float scale) {
    enum { ALL = TILE * TILE, HALF_ALL = TILE * (TILE + 1) / 2 };
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    float *mine = room.warp[warp];
    for (int i0 = 0; i0 < c.n; i0 += TILE) {
        for (int k0 = i0; k0 < c.n; k0 += TILE) {
            float a[TILE], b[TILE];
            if (i0 == k0) {
                float sum[HALF_ALL] = {0};
                for (int j = threadIdx.x; j < c.count; j += THREADS) {
                    load_tile<SHARED>(a, c, scale, i0, j);
                    #pragma unroll
                    for (int i = 0; i < TILE; i++) {
                        #pragma unroll
                        for (int k = i; k < TILE; k++) { sum[triangle(i, k)] += a[i] * a[k]; }
                    }
                }
                warp_sums<16>(sum);
                mine[lane] = sum[0];
                #pragma unroll
                for (int e = 32; e < HALF_ALL; e++) { mine[e] = warp_sum(sum[e]); }
            } else {
                float sum[ALL] = {0};
                for (int j = threadIdx.x; j < c.count; j += THREADS) {
                    load_tile<SHARED>(a, c, scale, i0, j);
                    load_tile<SHARED>(b, c, scale, k0, j);
                    #pragma unroll
                    for (int e = 0; e < ALL; e++) { sum[e] += a[e / TILE] * b[e % TILE]; }
                }
                warp_sums<16>(sum);
                warp_sums<16>(sum + 32);
                mine[lane] = sum[0];
                mine[lane + 32] = sum[32];
            }
            __syncthreads();
            if (threadIdx.x < ALL) {
                const int i = threadIdx.x / TILE, k = threadIdx.x % TILE;
                const int e = i0 < k0 ? (int)threadIdx.x : triangle(min(i, k), max(i, k));
                float all = 0;
                for (int w = 0; w < WARPS; w++) { all += room.warp[w][e]; }
                part[(i0 + i) * N + k0 + k] = part[(k0 + k) * N + i0 + i] = all;
            }
            __syncthreads();
        }
    }
}

// A barrier of the slice's blocks.
__device__ inline void slice_sync(int blocks) {
    if (blocks > 1) { cooperative_groups::this_cluster().sync(); } else { __syncthreads(); }
}

// out (N,N) = s x + t y x, by `workers` threads.
template <int N> __device__ inline void polynomial(float *out, float s, const float *x, float t,
                                                   const float *y, int workers) {
    for (int e = threadIdx.x; e < N * N; e += workers) {
        const int i = e / N, k = e % N;
        float sum = 0;
        #pragma unroll
        for (int j = 0; j < N; j++) { sum += y[i * N + j] * x[j * N + k]; }
        out[e] = s * x[e] + t * sum;
    }
}

// Rounds of the iteration on R: room.q from room.r, as in newton_schulz. With 8 rows it is one
// warp's work.
template <int N> __device__ void rounds(Room<N> &room, int count) {
    const float a = 3.4445f, b = -4.7750f, c = 2.0315f;
    const int workers = N == TILE ? 32 : THREADS, worker = threadIdx.x < workers;
    #define SYNC() do { if (N == TILE) { __syncwarp(); } else { __syncthreads(); } } while (0)
    if (worker) {
        for (int e = threadIdx.x; e < N * N; e += workers) { room.q[e] = e % (N + 1) == 0; }
        SYNC();
        for (int t = 0; t < count; t++) {
            polynomial<N>(room.z, b, room.r, c, room.r, workers);
            SYNC();
            polynomial<N>(room.next, a, room.q, 1, room.z, workers);
            if (t + 1 < count) { polynomial<N>(room.p, a, room.r, 1, room.z, workers); }
            SYNC();
            if (t + 1 < count) { polynomial<N>(room.r, a, room.p, 1, room.z, workers); }
            for (int e = threadIdx.x; e < N * N; e += workers) { room.q[e] = room.next[e]; }
            SYNC();
        }
    }
    #undef SYNC
    __syncthreads();
}

// X <- Q X, X times scale, a thread per column.
template <int N, bool SHARED>
__device__ void apply(const Columns &c, const float *q, float scale) {
    for (int j = threadIdx.x; j < c.count; j += THREADS) {
        float x[N];
        #pragma unroll
        for (int i = 0; i < N; i += TILE) { load_tile<SHARED>(x + i, c, scale, i, j); }
        #pragma unroll 8
        for (int i = 0; i < N; i++) {
            if (i >= c.n) { break; }
            float sum = 0;
            #pragma unroll
            for (int k = 0; k < N; k += 4) {
                const float4 q4 = *(const float4 *)(q + i * N + k);
                sum += q4.x * x[k] + q4.y * x[k + 1] + q4.z * x[k + 2] + q4.w * x[k + 3];
            }
            c.x[i * c.down + (SHARED ? j : j * c.right)] = sum;
        }
    }
    __syncthreads();
}

// One slice: `blocks` blocks of a cluster, each with count of its columns.
template <int N, bool SHARED> __global__ __launch_bounds__(THREADS, N == TILE ? 2 : 1)
void muon_kernel(Step s, int blocks) {
    enum { V = SHARED ? 4 : 1 };
    extern __shared__ __align__(16) unsigned char shared[];
    Room<N> &room = *(Room<N> *)shared;
    const Slice slice = s.slices[blockIdx.x / blocks];
    const int rank = blockIdx.x % blocks, m = (int)(slice.rows * slice.cols / s.n);
    Columns c = { SHARED ? (float *)(shared + sizeof room) : s.g + slice.at, s.count, 1, s.n, m,
                  rank * s.count, min(s.count, m - rank * s.count), slice.rows <= slice.cols };
    if (!SHARED) { c.down = c.wide ? m : 1, c.right = c.wide ? 1 : s.n; }
    auto cluster = cooperative_groups::this_cluster();

    int state = c.wide ? read_gradient<V, true, SHARED>(c, s.g + slice.at)
                       : read_gradient<V, false, SHARED>(c, s.g + slice.at);
    state = __syncthreads_or(state & 1) | __syncthreads_or(state & 2) << 1;
    if (blocks > 1) {
        if (threadIdx.x == 0) { room.state = state; }
        cluster.sync();
        for (int b = 0; b < blocks; b++) { state |= *cluster.map_shared_rank(&room.state, b); }
    }
    if (state != 1) {           // nothing to follow: the slice keeps its bits
        slice_sync(blocks);
        return;
    }

    double sum = c.wide ? update_moments<V, true, SHARED>(c, s.m + slice.at, s)
                        : update_moments<V, false, SHARED>(c, s.m + slice.at, s);
    for (int k = 16; k > 0; k /= 2) { sum += __shfl_xor_sync(~0u, sum, k); }
    if (threadIdx.x % 32 == 0) { room.sum[threadIdx.x / 32] = sum; }
    __syncthreads();
    if (threadIdx.x == 0) {
        room.norm = 0;
        for (int w = 0; w < WARPS; w++) { room.norm += room.sum[w]; }
    }
    slice_sync(blocks);
    sum = 0;
    for (int b = 0; b < blocks; b++) { sum += *cluster.map_shared_rank(&room.norm, b); }
    // X = U / |U|: multiplied when it is read, until the first product has stored it.
    float scale = sum > 0 ? fminf((float)(1 / sqrt(sum)), 3e38f) : 0;
    for (int t = 0, turn = 0, end; t < ROUNDS; t = end, turn ^= 1) {
        for (end = t + 1; end < ROUNDS && !(s.restarts >> end & 1); end++) { }
        gram<N, SHARED>(room.part[turn], room, c, scale);
        slice_sync(blocks);
        for (int e = threadIdx.x; e < N * N; e += THREADS) {
            float all = 0;
            for (int b = 0; b < blocks; b++) {
                all += cluster.map_shared_rank(room.part[turn], b)[e];
            }
            room.r[e] = e / N < c.n && e % N < c.n ? all : 0;
        }
        __syncthreads();
        rounds<N>(room, end - t);
        apply<N, SHARED>(c, room.q, scale);
        scale = 1;
    }
    const double side = (double)max(slice.rows, slice.cols);
    const float rate = (float)(s.lr * 0.2 * sqrt(side));
    if (c.wide) { update_masters<V, true, SHARED>(c, s.p + slice.at, s.keep, rate); }
    else { update_masters<V, false, SHARED>(c, s.p + slice.at, s.keep, rate); }
    slice_sync(blocks);         // nobody may leave while its part of R is read
}

template <int N, bool SHARED> static void launch(const Step &s, int slices, int blocks) {
    const size_t bytes = sizeof(Room<N>) + (SHARED ? sizeof(float) * s.n * s.count : 0);
    auto kernel = muon_kernel<N, SHARED>;
    cudaLaunchConfig_t config = {};
    cudaLaunchAttribute cluster = {};
    cluster.id = cudaLaunchAttributeClusterDimension;
    cluster.val.clusterDim.x = blocks, cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
    config.gridDim = dim3(slices * blocks), config.blockDim = dim3(THREADS);
    config.dynamicSmemBytes = bytes, config.stream = stream;
    config.attrs = &cluster, config.numAttrs = 1;
    cudaCheck(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                   (int)bytes));
    cudaCheck(cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1));
    cudaCheck(cudaLaunchKernelEx(&config, kernel, s, blocks));
}

// Slices of one size, with m columns. most: bytes of X that a block may have, 0: none.
template <int N>
static void launch_size(Step s, size_t m, int slices, bool vector, size_t most) {
    const size_t column = sizeof(float) * s.n;
    size_t count = m;
    int blocks = 1;
    while (blocks < BLOCKS_MAX && count * column > most) {
        blocks *= 2;
        count = ((m + blocks - 1) / blocks + 3) / 4 * 4;
    }
    const bool shared = vector && count * column <= most;
    s.count = (int)(shared ? count : m);
    if (shared) { launch<N, true>(s, slices, blocks); } else { launch<N, false>(s, slices, 1); }
}

} // namespace muon

extern "C" void muon_update_gpu(real *p, real *m, real *g, const size_t *slices_h, int n,
                                double grad_scale, double lr, double beta, double weight_decay,
                                int restarts) {
    if (n == 0) { return; }
    const size_t mark = workspace_mark(), bytes = sizeof(muon::Slice) * n;
    const muon::Slice *list = (const muon::Slice *)slices_h;
    muon::Slice *slices = (muon::Slice *)workspace(bytes);
    cudaCheck(cudaMemcpyAsync(slices, slices_h, bytes, cudaMemcpyHostToDevice, stream));
    muon::Step s = { p, m, g, slices, (float)grad_scale, (float)beta, (float)(1 - beta),
                     (float)(1 - lr * weight_decay), lr, restarts, 0, 0 };
    for (int first = 0, last; first < n; first = last) {        // a run of one size
        const size_t low = min(list[first].rows, list[first].cols);
        const size_t high = max(list[first].rows, list[first].cols);
        bool vector = high % 4 == 0;
        for (last = first; last < n; last++) {
            const muon::Slice &l = list[last];
            if (min(l.rows, l.cols) != low || max(l.rows, l.cols) != high) { break; }
            vector = vector && l.at % 4 == 0;
        }
        gpuRequire(low <= MUON_R);
        auto launch = low <= 8 ? muon::launch_size<8> : low <= 16 ? muon::launch_size<16>
                    : low <= 32 ? muon::launch_size<32> : muon::launch_size<64>;
        s.slices = slices + first, s.n = (int)low;
        launch(s, high, last - first, vector, 64 << 10);
    }
    workspace_release(mark);
}

// -------------------------------------------------------------------------------------------------
// 6 Routing, permutation, combine; NCCL (moe.c)

// A score and its derivative, as in moe.c: sqrt(softplus(v)) is its limit exp(v/2) below -20.
__device__ inline float route_score(int score, float v) {
    if (score == SCORE_SIGMOID) { return 1 / (1 + expf(-v)); }
    if (score == SCORE_SOFTMAX) { return expf(v); }
    return v < -20 ? expf(v / 2) : sqrtf(fmaxf(v, 0) + log1pf(expf(-fabsf(v))));
}

__device__ inline float route_slope(int score, float v, float s) {
    if (score == SCORE_SIGMOID) { return s * (1 - s); }
    return score == SCORE_SOFTMAX ? s : v < -20 ? s / 2 : 1 / ((1 + expf(-v)) * 2 * s);
}

// What softmax takes off the logits: the log of the sum of their exponentials, by one warp.
__device__ inline float route_shift(int score, const float *all, int E) {
    float most = -INFINITY, sum = 0;
    if (score != SCORE_SOFTMAX) { return 0; }
    for (int e = threadIdx.x % 32; e < E; e += 32) { most = fmaxf(most, all[e]); }
    most = warp_max(most);
    for (int e = threadIdx.x % 32; e < E; e += 32) { sum += expf(all[e] - most); }
    return most + logf(warp_sum(sum));
}

// The best of all lanes' candidates, to all lanes; equal ones: the smaller id.
__device__ inline int warp_best(float best, int id) {
    #pragma unroll
    for (int step = 16; step > 0; step /= 2) {
        const float other = __shfl_xor_sync(~0u, best, step);
        const int other_id = __shfl_xor_sync(~0u, id, step);
        if (other > best || (other == best && other_id < id)) { best = other; id = other_id; }
    }
    return id;
}

// The open groups, as bits: lane g rates group g by its two best choices together, or by its best.
__device__ inline unsigned route_groups(const float *all, const float *bias, float shift,
                                        Routing how, int E) {
    const int lane = threadIdx.x % 32, size = E / how.groups;
    float first = -INFINITY, second = -INFINITY;
    unsigned open = 0;
    for (int e = lane * size; lane < how.groups && e < (lane + 1) * size; e++) {
        const float choice = route_score(how.score, all[e] - shift) + (bias ? bias[e] : 0);
        second = fmaxf(second, fminf(first, choice));
        first = fmaxf(first, choice);
    }
    for (int k = 0; k < how.kept; k++) {
        const bool out = lane >= how.groups || (open >> lane & 1);
        open |= 1u << warp_best(out ? -INFINITY : how.greedy ? first : first + second,
                                out ? INT_MAX : lane);
    }
    return open;
}

// One warp per token. Selection takes the best K times; a lane looks after every 32nd expert, and
// equal choices go to the smaller id.
__global__ void route_kernel(int *ids, real *weights, real *logits, const real *all,
                             const float *bias, const int *tid2eid, const int *tokens, Routing how,
                             float scale, int norm, int T, int E, int K) {
    const int t = blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32, lane = threadIdx.x % 32;
    if (t >= T) { return; }
    all += (size_t)t * E;
    ids += (size_t)t * K;
    const float shift = route_shift(how.score, all, E);
    if (tid2eid) {
        for (int k = lane; k < K; k += 32) { ids[k] = tid2eid[(size_t)tokens[t] * K + k]; }
    } else {
        unsigned long long taken = 0;           // of this lane's experts lane, lane + 32, ..
        const bool grouped = how.groups > 1;
        const unsigned open = grouped ? route_groups(all, bias, shift, how, E) : ~0u;
        for (int k = 0; k < K; k++) {
            float best = -INFINITY;
            int id = INT_MAX;
            for (int e = lane, i = 0; e < E; e += 32, i++) {
                const float choice = route_score(how.score, all[e] - shift) + (bias ? bias[e] : 0);
                const bool in = !grouped || open >> e / (E / how.groups) & 1;
                if (!in || taken >> i & 1) { continue; }        // a NaN: chosen if nothing else is
                if (choice > best || id == INT_MAX) { best = fmaxf(choice, -INFINITY); id = e; }
            }
            id = warp_best(best, id);
            if (id % 32 == lane) { taken |= 1ull << (id / 32); }
            if (lane == 0) { ids[k] = id; }
        }
    }
    __syncwarp();
    if (lane != 0) { return; }
    float sum = 1e-20f;
    for (int k = 0; k < K; k++) {
        const float v = all[ids[k]] - shift;
        logits[(size_t)t * K + k] = v;
        sum += weights[(size_t)t * K + k] = route_score(how.score, v);
    }
    for (int k = 0; k < K; k++) {
        weights[(size_t)t * K + k] = scale * weights[(size_t)t * K + k] / (norm ? sum : 1);
    }
}

extern "C" void route_forward_gpu(int *ids, real *weights, real *logits, const real *all,
                                  const float *bias, const int *tid2eid, const int *tokens,
                                  Routing how, float scale, int norm, int T, int E, int K) {
    if (T == 0) { return; }
    gpuRequire(E <= 32 * 64 && how.groups <= 32);
    route_kernel<<<blocks_for(T, 4), 128, 0, stream>>>(ids, weights, logits, all, bias, tid2eid,
                                                       tokens, how, scale, norm, T, E, K);
    cudaCheck(cudaGetLastError());
}

// dinp += sum_k dv_k gate[id_k]. One block per token. all: only a softmax without norm needs it.
enum { ROUTE_K_MAX = 16 };
__global__ void route_backward_kernel(real *dinp, const real *dweights, const int *slot_row,
                                      const int *ids, const real *weights, const real *logits,
                                      const real *all, const bf16 *gate, Routing how, float scale,
                                      int norm, int C, int E, int K) {
    __shared__ float dv[ROUTE_K_MAX], shift;
    __shared__ int id[ROUTE_K_MAX];
    const size_t t = blockIdx.x, first = t * K;
    float sum = 1e-20f, dot = 0;
    for (int k = 0; k < K; k++) {
        sum += route_score(how.score, logits[first + k]);
        dot += dweights[slot_row[first + k]] * weights[first + k];
    }
    if ((int)threadIdx.x < K) {
        // forward: w_k = scale s_k / sum s, s = score(v), v = gate[id_k] . x
        const size_t slot = first + threadIdx.x;
        const float v = logits[slot], s = route_score(how.score, v);
        float ds = scale * dweights[slot_row[slot]];
        if (norm) { ds = (ds - dot) / sum; }
        dv[threadIdx.x] = ds * route_slope(how.score, v, s);
        id[threadIdx.x] = ids[slot];
    }
    if (all && threadIdx.x < 32) {
        const float log_sum = route_shift(how.score, all + t * E, E);
        if (threadIdx.x == 0) { shift = log_sum; }
    }
    __syncthreads();
    for (int c = threadIdx.x * 4; c < C; c += blockDim.x * 4) {
        float d[4], g[4];
        load4(d, dinp + t * C + c);
        for (int k = 0; k < K + (all ? E : 0); k++) {
            load4(g, gate + (size_t)(k < K ? id[k] : k - K) * C + c);
            const float v = k < K ? dv[k] : -dot * expf(all[t * E + k - K] - shift);
            #pragma unroll
            for (int j = 0; j < 4; j++) { d[j] += v * g[j]; }
        }
        store4(dinp + t * C + c, d);
    }
}

extern "C" void route_backward_gpu(real *dinp, const real *dweights, const int *slot_row,
                                   const int *ids, const real *weights, const real *logits,
                                   const real *all, const bf16 *gate, Routing how, float scale,
                                   int norm, int T, int C, int E, int K) {
    if (T == 0) { return; }
    gpuRequire(K <= ROUTE_K_MAX);
    route_backward_kernel<<<T, 256, 0, stream>>>(dinp, dweights, slot_row, ids, weights, logits,
                                                 all, gate, how, scale, norm, C, E, K);
    cudaCheck(cudaGetLastError());
}

// ---- the trip of the rows, and NCCL
//
// A kernel that numbered rows as they come, with atomics, would number them differently every time.

// One block per expert. Each thread looks at a run of slots: first it counts its expert's, then,
// knowing how many the threads before it have, numbers them.
//   bytes: E blocks read all ids twice, from L2: 256 x 197 KB at 4,096 tokens of 6 experts.
enum { COUNT_THREADS = 512 };
__global__ void trip_count_kernel(int *counts, int *index, const int *ids, int slots) {
    __shared__ int shared[COUNT_THREADS / 32];
    const int e = blockIdx.x, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int run = (slots + COUNT_THREADS - 1) / COUNT_THREADS;
    const int first = threadIdx.x * run, last = min(first + run, slots);
    int mine = 0;
    for (int i = first; i < last; i++) { mine += ids[i] == e; }
    int sum = mine;                         // of the lanes up to this one
    #pragma unroll
    for (int step = 1; step < 32; step *= 2) {
        const int other = __shfl_up_sync(~0u, sum, step);
        if (lane >= step) { sum += other; }
    }
    if (lane == 31) { shared[warp] = sum; }
    __syncthreads();
    int next = sum - mine;
    for (int w = 0; w < warp; w++) { next += shared[w]; }
    for (int i = first; i < last; i++) {
        if (ids[i] == e) { index[i] = next++; }
    }
    if (threadIdx.x == COUNT_THREADS - 1) { counts[e] = next; }
}

extern "C" void trip_count_gpu(int *counts, int *index, const int *ids, int slots, int E) {
    trip_count_kernel<<<E, COUNT_THREADS, 0, stream>>>(counts, index, ids, slots);
    cudaCheck(cudaGetLastError());
}

__global__ void trip_sort_kernel(int *row_slot, int *slot_row, const int *ids, const int *index,
                                 const __grid_constant__ Runs runs, int slots) {
    const int slot = blockIdx.x * blockDim.x + threadIdx.x;
    if (slot >= slots) { return; }
    const int e = ids[slot], i = index[slot] - runs.from[e];
    if (i < 0 || i >= runs.count[e]) { return; }
    row_slot[runs.to[e] + i] = slot;
    slot_row[slot] = runs.to[e] + i;
}

extern "C" void trip_sort_gpu(int *row_slot, int *slot_row, const int *ids, const int *index,
                              Runs runs, int slots) {
    if (slots == 0) { return; }
    trip_sort_kernel<<<blocks_for(slots, 256), 256, 0, stream>>>(row_slot, slot_row, ids, index,
                                                                 runs, slots);
    cudaCheck(cudaGetLastError());
}

// One warp per row, in the order of arrival, which is that of the runs. Word: what a lane copies.
//   bytes: 4 C per row; 24,576 rows of 4,096: 403 MB, 94 us.
template <typename Word>
__global__ void regroup_kernel(Word *out, const Word *inp, const __grid_constant__ Runs runs,
                               int by_source, int rows, int words) {
    const int row = blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32, lane = threadIdx.x % 32;
    if (row >= rows) { return; }
    int low = 0, high = runs.n;             // the last run that begins at or before the row: an
    while (high - low > 1) {                // empty one begins where the next does
        const int middle = (low + high) / 2;
        if (runs.from[middle] <= row) { low = middle; } else { high = middle; }
    }
    const int place = runs.to[low] + row - runs.from[low];
    out += (size_t)(by_source ? row : place) * words;
    inp += (size_t)(by_source ? place : row) * words;
    for (int i = lane; i < words; i += 32) { out[i] = inp[i]; }
}

// Calls f with a word as wide as rows of so many bytes allow.
template <typename F> static void with_words(size_t row_bytes, F f) {
    if (row_bytes % 16 == 0) { f(uint4()); }
    else if (row_bytes % 4 == 0) { f(uint32_t()); }
    else { f(uint8_t()); }
    cudaCheck(cudaGetLastError());
}

extern "C" void regroup_rows_gpu(void *out, const void *inp, Runs runs, int order,
                                 size_t row_bytes) {
    const int rows = runs.n ? runs.from[runs.n - 1] + runs.count[runs.n - 1] : 0;
    if (rows == 0) { return; }
    with_words(row_bytes, [&](auto word) {
        regroup_kernel<<<blocks_for(rows, 8), 256, 0, stream>>>(
            (decltype(word) *)out, (const decltype(word) *)inp, runs, order == BY_SOURCE, rows,
            (int)(row_bytes / sizeof word));
    });
}

// own (n) = the sum of what all members have there, in their order. Member i's is row i of others
// (members,m), but this rank's own.
__global__ void sum_rows_kernel(real *own, const real *others, int members, int me, size_t m,
                                size_t n) {
    const size_t j = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (j >= n) { return; }
    float sum = 0;
    for (int i = 0; i < members; i++) { sum += i == me ? own[j] : others[i * m + j]; }
    own[j] = sum;
}

// Boxes of a refit (refit.c), many in a launch: blocks first[i] and on are box i's. A thread copies
// a word, of as many bytes as all addresses allow. bytes: each once in, once out.
enum { BOXES_MAX = 128, BOX_THREADS = 512 };
struct Boxes { int n, first[BOXES_MAX], word[BOXES_MAX]; BoxCopy box[BOXES_MAX]; };

template <typename Word> __device__ inline void copy_word(const BoxCopy &b, unsigned i) {
    const unsigned width = b.n[2] / sizeof(Word), rows = b.n[1], line = i / width;
    const size_t e = line / rows, row = line % rows, at = (i - line * width) * sizeof(Word);
    if (e >= b.n[0]) { return; }
    *(Word *)(b.to + e * b.to_step[0] + row * b.to_step[1] + at) =
        *(const Word *)(b.from + e * b.from_step[0] + row * b.from_step[1] + at);
}

__global__ void copy_boxes_kernel(const __grid_constant__ Boxes all) {
    int i = 0;
    for (int n = BOXES_MAX / 2; n > 0; n /= 2) {
        if (i + n < all.n && all.first[i + n] <= (int)blockIdx.x) { i += n; }
    }
    const unsigned word = (blockIdx.x - all.first[i]) * BOX_THREADS + threadIdx.x;
    if (all.word[i] == 16) { copy_word<uint4>(all.box[i], word); }
    else if (all.word[i] == 4) { copy_word<uint32_t>(all.box[i], word); }
    else { copy_word<uint8_t>(all.box[i], word); }
}

#include "dev/device.cu"        // the host's side: start, memory, copies, NCCL

// home[row] = inp[row_slot[row] / K]: one warp per travelling row.
//   bytes: 4 C per row; 24,576 rows of 4,096: 403 MB, 94 us.
template <typename Word>
__global__ void pack_rows_kernel(Word *home, const Word *inp, const int *row_slot, int n, int K,
                                 int words) {
    const size_t row = blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32;
    if (row >= n) { return; }
    const Word *from = inp + (size_t)(row_slot[row] / K) * words;
    for (int i = threadIdx.x % 32; i < words; i += 32) { home[row * words + i] = from[i]; }
}

extern "C" void pack_rows_gpu(void *home, const void *inp, const int *row_slot, int n, int K,
                              size_t row_bytes) {
    if (n == 0) { return; }
    with_words(row_bytes, [&](auto word) {
        pack_rows_kernel<<<blocks_for(n, 8), 256, 0, stream>>>(
            (decltype(word) *)home, (const decltype(word) *)inp, row_slot, n, K,
            (int)(row_bytes / sizeof word));
    });
}

__global__ void pack_weights_kernel(real *home, const real *weights, const int *row_slot, int n) {
    const int row = blockIdx.x * blockDim.x + threadIdx.x;
    if (row < n) { home[row] = weights[row_slot[row]]; }
}

extern "C" void pack_weights_gpu(real *home, const real *weights, const int *row_slot, int n) {
    if (n == 0) { return; }
    pack_weights_kernel<<<blocks_for(n, 256), 256, 0, stream>>>(home, weights, row_slot, n);
    cudaCheck(cudaGetLastError());
}

// y (T,C) += its K rows of home, in slot order; Y is act (forward) or real (backward).
template <typename Y>
__global__ void combine_kernel(Y *y, const act *home, const int *slot_row, int K, int C) {
    const size_t t = blockIdx.x;
    for (int c = threadIdx.x * 8; c < C; c += blockDim.x * 8) {
        float sum[8] = {0}, v[8];
        for (int k = 0; k < K; k++) {
            load8(v, home + (size_t)slot_row[t * K + k] * C + c);
            #pragma unroll
            for (int j = 0; j < 8; j++) { sum[j] += v[j]; }
        }
        load8(v, y + t * C + c);
        #pragma unroll
        for (int j = 0; j < 8; j++) { v[j] += sum[j]; }
        store8(y + t * C + c, v);
    }
}

extern "C" void combine_forward_gpu(act *out, const act *home_y, const int *slot_row, int T, int K,
                                    int C) {
    if (T == 0) { return; }
    combine_kernel<<<T, row_threads(C), 0, stream>>>(out, home_y, slot_row, K, C);
    cudaCheck(cudaGetLastError());
}

extern "C" void dispatch_backward_gpu(real *dinp, const act *home_dx, const int *slot_row, int T,
                                      int K, int C) {
    if (T == 0) { return; }
    combine_kernel<<<T, row_threads(C), 0, stream>>>(dinp, home_dx, slot_row, K, C);
    cudaCheck(cudaGetLastError());
}

// -------------------------------------------------------------------------------------------------
// 7 Norms, RoPE, hyper-connections (train.c parts 3 and 4)
//
// All of these move bytes and compute little: the bound is 4.28 TB/s. Rows are read 16 bytes per
// thread; sums over a row are taken in a fixed tree, so the same input gives the same bits.

// RMSNorm, one block per row of C.
//   bytes: 2 C read + 2 C written per row; C = 4,096, T = 4,096: 67 MB, 16 us.
__global__ void rmsnorm_forward_kernel(act *out, real *rstd, const act *inp, const bf16 *w,
                                       float eps, int C) {
    __shared__ float shared[32];
    const size_t row = blockIdx.x;
    const int n = C / 8;
    float sum = 0;
    for (int i = threadIdx.x; i < n; i += blockDim.x) {
        float x[8];
        load8(x, inp + row * C + i * 8);
        #pragma unroll
        for (int k = 0; k < 8; k++) { sum += x[k] * x[k]; }
    }
    sum = block_sum(sum, shared);
    const float r = 1 / sqrtf(sum / C + eps);
    if (threadIdx.x == 0) { rstd[row] = r; }
    for (int i = threadIdx.x; i < n; i += blockDim.x) {
        float x[8], g[8];
        load8(x, inp + row * C + i * 8);
        if (w) { load8(g, w + i * 8); }
        #pragma unroll
        for (int k = 0; k < 8; k++) { x[k] = (w ? g[k] : 1) * (x[k] * r); }
        store8(out + row * C + i * 8, x);
    }
}

extern "C" void rmsnorm_forward_gpu(act *out, real *rstd, const act *inp, const bf16 *w, float eps,
                                    int T, int C) {
    if (T == 0) { return; }
    rmsnorm_forward_kernel<<<T, row_threads(C), 0, stream>>>(out, rstd, inp, w, eps, C);
    cudaCheck(cudaGetLastError());
}

// dinp = rstd (a - x mean(a x)), a = w dout, x = inp rstd.
//   bytes: 4 C + 2 C read, 2 C written per row: 134 MB at 4,096 x 4,096, 31 us.
__global__ void rmsnorm_backward_kernel(act *dinp, const real *dout, const act *inp,
                                        const real *rstd, const bf16 *w, int C) {
    __shared__ float shared[32];
    const size_t row = blockIdx.x;
    const int n = C / 8;
    const float r = rstd[row];
    float sum = 0;
    for (int i = threadIdx.x; i < n; i += blockDim.x) {
        float x[8], d[8], g[8];
        load8(x, inp + row * C + i * 8);
        load8(d, dout + row * C + i * 8);
        if (w) { load8(g, w + i * 8); }
        #pragma unroll
        for (int k = 0; k < 8; k++) { sum += d[k] * (w ? g[k] : 1) * (x[k] * r); }
    }
    const float mean = block_sum(sum, shared) / C;
    for (int i = threadIdx.x; i < n; i += blockDim.x) {
        float x[8], d[8], g[8];
        load8(x, inp + row * C + i * 8);
        load8(d, dout + row * C + i * 8);
        if (w) { load8(g, w + i * 8); }
        #pragma unroll
        for (int k = 0; k < 8; k++) { d[k] = r * (d[k] * (w ? g[k] : 1) - x[k] * r * mean); }
        store8(dinp + row * C + i * 8, d);
    }
}

extern "C" void rmsnorm_backward_gpu(act *dinp, const real *dout, const act *inp, const real *rstd,
                                     const bf16 *w, int T, int C) {
    if (T == 0) { return; }
    rmsnorm_backward_kernel<<<T, row_threads(C), 0, stream>>>(dinp, dout, inp, rstd, w, C);
    cudaCheck(cudaGetLastError());
}

// Every stream of X starts as the token's embedding. One block per token.
__global__ void embed_forward_kernel(act *X, const bf16 *embed, const int *token, int C) {
    const size_t t = blockIdx.x;
    const uint4 *row = (const uint4 *)(embed + (size_t)token[t] * C);
    for (int i = threadIdx.x; i < C / 8; i += blockDim.x) {
        const uint4 v = row[i];
        for (int s = 0; s < HC; s++) { ((uint4 *)(X + (t * HC + s) * C))[i] = v; }
    }
}

extern "C" void embed_forward_gpu(act *X, const bf16 *embed, const int *token, int T, int C) {
    if (T == 0) { return; }
    embed_forward_kernel<<<T, row_threads(C), 0, stream>>>(X, embed, token, C);
    cudaCheck(cudaGetLastError());
}

// One rotated pair: sign times the angle whose cos and sin are turn[0], turn[1].
__device__ inline void rotate_pair(float &a, float &b, const float *turn, int sign) {
    const float cosine = turn[0], sine = sign * turn[1], x = a;
    a = x * cosine - b * sine;
    b = x * sine + b * cosine;
}

// One thread per pair.
__global__ void rope_apply_kernel(act *x, const real *table, const int *position, int sign,
                                  size_t pairs, int H, int D, int rope) {
    const size_t at = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (at >= pairs) { return; }
    const int pair = (int)(at % (rope / 2));
    const size_t row = at / (rope / 2);
    __nv_bfloat162 *v = (__nv_bfloat162 *)(x + row * D + D - rope) + pair;
    float2 ab = __bfloat1622float2(*v);
    rotate_pair(ab.x, ab.y, table + (size_t)position[row / H] * rope + 2 * pair, sign);
    *v = __float22bfloat162_rn(ab);
}

extern "C" void rope_apply_gpu(act *x, const real *table, const int *position, int sign, int T,
                               int H, int D, int rope) {
    const size_t pairs = (size_t)T * H * (rope / 2);
    if (pairs == 0) { return; }
    rope_apply_kernel<<<blocks_for(pairs, 256), 256, 0, stream>>>(x, table, position, sign, pairs,
                                                                  H, D, rope);
    cudaCheck(cudaGetLastError());
}

// Norm and RoPE of a head: one warp per head, D/32 neighbouring elements per lane, so that pairs
// stay in one lane. NV = D / 32.
//   bytes: 2 D read + 2 D written; queries at T = 4,096: 537 MB, 125 us.
template <int NV>
__global__ void norm_rope_forward_kernel(act *out, real *rstd, const act *inp, const bf16 *w,
                                         const real *table, const int *position, float eps,
                                         size_t rows, int H, int rope) {
    const int D = NV * 32, lane = threadIdx.x % 32, first = lane * NV;
    const size_t row = (size_t)blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32;
    if (row >= rows) { return; }
    float x[NV], sum = 0;
    load_row<NV>(x, inp + row * D + first);
    #pragma unroll
    for (int i = 0; i < NV; i++) { sum += x[i] * x[i]; }
    const float r = 1 / sqrtf(warp_sum(sum) / D + eps);
    if (lane == 0) { rstd[row] = r; }
    #pragma unroll
    for (int i = 0; i < NV; i++) { x[i] = (w ? __bfloat162float(w[first + i]) : 1) * (x[i] * r); }
    const float *turn = table + (size_t)position[row / H] * rope - (D - rope);
    #pragma unroll
    for (int i = 0; i < NV; i += 2) {
        if (first + i >= D - rope) { rotate_pair(x[i], x[i + 1], turn + first + i, 1); }
    }
    store_row<NV>(out + row * D + first, x);
}

extern "C" void norm_rope_forward_gpu(act *out, real *rstd, const act *inp, const bf16 *w,
                                      const real *table, const int *position, float eps, int T,
                                      int H, int D, int rope) {
    const size_t rows = (size_t)T * H;
    if (rows == 0) { return; }
    const int grid = blocks_for(rows, 8);
    if (D == 512) {
        norm_rope_forward_kernel<16><<<grid, 256, 0, stream>>>(out, rstd, inp, w, table, position,
                                                               eps, rows, H, rope);
    } else {
        gpuRequire(D == 128);
        norm_rope_forward_kernel<4><<<grid, 256, 0, stream>>>(out, rstd, inp, w, table, position,
                                                              eps, rows, H, rope);
    }
    cudaCheck(cudaGetLastError());
}

// Its backward from out, with no weight: dinp = rstd * turned back (dout - out * mean(dout * out)).
// dinp may be dout. bytes: 4 D read + 2 D written; queries at T = 4,096: 805 MB, 187 us.
template <int NV>
__global__ void norm_rope_backward_kernel(act *dinp, const act *dout, const act *out,
                                          const real *rstd, const real *table, const int *position,
                                          size_t rows, int H, int rope) {
    const int D = NV * 32, lane = threadIdx.x % 32, first = lane * NV;
    const size_t row = (size_t)blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32;
    if (row >= rows) { return; }
    float y[NV], d[NV], sum = 0;
    load_row<NV>(y, out + row * D + first);
    load_row<NV>(d, dout + row * D + first);
    #pragma unroll
    for (int i = 0; i < NV; i++) { sum += d[i] * y[i]; }
    const float r = rstd[row], mean = warp_sum(sum) / D;
    #pragma unroll
    for (int i = 0; i < NV; i++) { d[i] = r * (d[i] - y[i] * mean); }
    const float *turn = table + (size_t)position[row / H] * rope - (D - rope);
    #pragma unroll
    for (int i = 0; i < NV; i += 2) {
        if (first + i >= D - rope) { rotate_pair(d[i], d[i + 1], turn + first + i, -1); }
    }
    store_row<NV>(dinp + row * D + first, d);
}

extern "C" void norm_rope_backward_gpu(act *dinp, const act *dout, const act *out, const real *rstd,
                                       const real *table, const int *position, int T, int H, int D,
                                       int rope) {
    const size_t rows = (size_t)T * H;
    if (rows == 0) { return; }
    gpuRequire(D == 512 || D == 128);
    auto kernel = D == 512 ? norm_rope_backward_kernel<16> : norm_rope_backward_kernel<4>;
    kernel<<<blocks_for(rows, 8), 256, 0, stream>>>(dinp, dout, out, rstd, table, position, rows, H,
                                                    rope);
    cudaCheck(cudaGetLastError());
}

// The same for keys and entries: a weight, so from inp, and a gradient in float.
template <int NV>
__global__ void key_norm_rope_backward_kernel(act *dinp, const float *dout, const act *inp,
                                              const real *rstd, const bf16 *w, const real *table,
                                              const int *position, int rows, int rope) {
    const int D = NV * 32, lane = threadIdx.x % 32, first = lane * NV;
    const size_t row = (size_t)blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32;
    if (row >= rows) { return; }
    float x[NV], d[NV], sum = 0;
    load_row<NV>(x, inp + row * D + first);
    load_row<NV>(d, dout + row * D + first);
    const float r = rstd[row];
    const float *turn = table + (size_t)position[row] * rope - (D - rope);
    #pragma unroll
    for (int i = 0; i < NV; i += 2) {
        if (first + i >= D - rope) { rotate_pair(d[i], d[i + 1], turn + first + i, -1); }
    }
    #pragma unroll
    for (int i = 0; i < NV; i++) {
        d[i] *= __bfloat162float(w[first + i]);
        sum += d[i] * (x[i] * r);
    }
    const float mean = warp_sum(sum) / D;
    #pragma unroll
    for (int i = 0; i < NV; i++) { d[i] = r * (d[i] - x[i] * r * mean); }
    store_row<NV>(dinp + row * D + first, d);
}

extern "C" void key_norm_rope_backward_gpu(act *dinp, const real *dout, const act *inp,
                                           const real *rstd, const bf16 *w, const real *table,
                                           const int *position, int n, int D, int rope) {
    if (n == 0) { return; }
    gpuRequire(D == 512 || D == 128);
    auto kernel = D == 512 ? key_norm_rope_backward_kernel<16> : key_norm_rope_backward_kernel<4>;
    const int blocks = blocks_for(n, 8);
    kernel<<<blocks, 256, 0, stream>>>(dinp, dout, inp, rstd, w, table, position, n, rope);
    cudaCheck(cudaGetLastError());
}

// ---- hyper-connections
//
// A token's streams are HC * C numbers, and its projection fn is a matrix (M,HC*C) that all tokens
// share. What multiplies with fn keeps a slice of it, 128 or 256 channels of all four streams, in
// shared memory and lets the tokens pass by; so a token is worked on by several blocks, which leave
// partial sums. A warp takes 16 tokens and 32 channels at a time, held as the operands of the
// tensor cores lie: lane 4 g + q has the channels 8 q .. 8 q + 7 of tokens g and g + 8. They are
// asked for some rounds ahead, by each lane what it will use itself, so no lane waits for another.

enum { HC_TILE = 16, HC_GROUP = 32, HC_THREADS = 256, HC_WARPS = HC_THREADS / 32 };

// Blocks along C, and as many along T as fit onto the device, one per multiprocessor.
static dim3 hc_grid(int T, int C, int slice) {
    const int slices = blocks_for(C, slice), most = blocks_for(T, HC_TILE * HC_WARPS);
    const int fit = multiprocessors() / slices > 1 ? multiprocessors() / slices : 1;
    return dim3(slices, most < fit ? most : fit);
}

// 16 bytes to shared memory; L2 is told to bring the 128 around them, which the next round wants.
__device__ inline void copy16_ahead(uint4 *to, const void *from) {
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16;"
                 :: "r"(shared_address(to)), "l"(from) : "memory");
}

// Asks for a line that the next tile will want.
__device__ inline void touch(const float *p) { asm volatile("prefetch.global.L1 [%0];" :: "l"(p)); }

// The rounds of a warp: 16 tokens with one group of 32 channels after the other, then the next 16.
typedef struct { int tile, group, groups, stride; } HcRound;
__device__ inline void next_round(HcRound &r) {
    if (++r.group == r.groups) { r.group = 0; r.tile += r.stride; }
}

// 8 bf16 in 4 registers, as floats.
__device__ inline void unpack8(float *x, const uint4 &raw) {
    const uint32_t word[4] = { raw.x, raw.y, raw.z, raw.w };
    #pragma unroll
    for (int i = 0; i < 4; i++) {
        x[2 * i] = __uint_as_float(word[i] << 16);
        x[2 * i + 1] = __uint_as_float(word[i] & 0xFFFF0000u);
    }
}

// d (16,8) += a (16,16) b (16,8) in bf16.
__device__ inline void mma_bf16(float *d, const uint32_t *a, uint32_t b0, uint32_t b1) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, "
                 "{%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// d (16,8) += a (16,8) b (8,8) in tf32: fp32 rounded to 11 bits.
__device__ inline void mma_tf32(float *d, const uint32_t *a, uint32_t b0, uint32_t b1) {
    asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, "
                 "{%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
__device__ inline uint32_t round_tf32(float x) {
    uint32_t y;
    asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(y) : "f"(x));
    return y;
}

// Y[j] = post[j] o + sum_i comb[i][j] X[i] (DEAL; else Y is X), and this slice's share of fn Y and
// of the sum of Y's squares: partial (slices,T,M+1). fn is split into two bf16, which keep 16 of
// its 24 bits; Y is bf16 as it stands, so the tensor cores' products lose nothing else.
//   bytes: 8 C for X, 2 C for o, 8 C for Y per token: 72 KiB, 302 MB at T = 4,096: 71 us.
//   operations: 2 x 2 x 24 x 16,384 per token on tensor cores, 6.4 GFLOP: 13 us, and about 500
//   instructions per warp and 9 KB moved, a quarter of what the bytes take.
enum { HC_DEAL_SLICE = 256, HC_DEAL_STAGES = 3, HC_DEAL_LOADS = 2 * (HC + 1) };
template <int M> constexpr int hc_deal_parts = HC_DEAL_SLICE / HC_GROUP * HC * ((M + 7) / 8) * 64;
template <int M, bool DEAL>
__global__ void __launch_bounds__(HC_THREADS, 1)
hc_deal_forward_kernel(act *Y, float *partial, const act *o, const act *X, const real *post,
                       const real *comb, const float *fn, int T, int C) {
    constexpr int NT = (M + 7) / 8;             // blocks of 8 rows of fn
    extern __shared__ uint4 parts[];            // (groups,HC,NT,2,32): high and low halves of fn
    uint4 *mine = parts + hc_deal_parts<M> + threadIdx.x;       // (stages,loads,threads)
    const int first = blockIdx.x * HC_DEAL_SLICE, groups = min(HC_DEAL_SLICE, C - first) / HC_GROUP;
    const int lane = threadIdx.x % 32, g = lane / 4, q = lane % 4;
    HcRound now = { (int)blockIdx.y * HC_WARPS + (int)threadIdx.x / 32, 0, groups,
                    (int)gridDim.y * HC_WARPS }, ahead = now;
    auto fetch = [&](int stage) {
        uint4 *to = mine + stage * HC_DEAL_LOADS * HC_THREADS;
        #pragma unroll
        for (int h = 0; h < 2 && ahead.tile * HC_TILE < T; h++) {
            const size_t t = min(ahead.tile * HC_TILE + g + 8 * h, T - 1);
            const int c = first + ahead.group * HC_GROUP + q * 8;
            #pragma unroll
            for (int i = 0; i < HC; i++) {
                copy16_ahead(to + (h * HC + i) * HC_THREADS, X + (t * HC + i) * C + c);
            }
            if (DEAL) { copy16_ahead(to + (2 * HC + h) * HC_THREADS, o + t * C + c); }
            if (DEAL && ahead.group == 0) {
                touch(q < 2 ? comb + t * HC * HC + q * 8 : post + t * HC);
            }
        }
        copy_commit();
        next_round(ahead);
    };
    #pragma unroll
    for (int stage = 0; stage < HC_DEAL_STAGES - 1; stage++) { fetch(stage); }
    #pragma unroll 4
    for (int at = threadIdx.x; at < groups * HC * NT * 32; at += HC_THREADS) {
        const int l = at % 32, n = at / 32 % NT * 8 + l / 4, j = at / (32 * NT) % HC;
        const int c = first + at / (32 * NT * HC) * HC_GROUP + l % 4 * 8;
        float x[8] = {0}, low[8];
        if (n < M) { load8(x, fn + ((size_t)n * HC + j) * C + c); }
        #pragma unroll
        for (int k = 0; k < 8; k++) { low[k] = x[k] - __bfloat162float(__float2bfloat16_rn(x[k])); }
        store8((bf16 *)&parts[at / 32 * 64 + l], x);
        store8((bf16 *)&parts[at / 32 * 64 + 32 + l], low);
    }
    __syncthreads();
    float p[2][HC], mix[2][HC][HC], sum[NT][4], square[2];
    for (int stage = 0; now.tile * HC_TILE < T; stage = (stage + 1) % HC_DEAL_STAGES) {
        const int t0 = now.tile * HC_TILE + g, c = first + now.group * HC_GROUP + q * 8;
        if (now.group == 0) {
            #pragma unroll
            for (int h = 0; DEAL && h < 2; h++) {
                const size_t t = min(t0 + 8 * h, T - 1);
                load4(p[h], post + t * HC);
                #pragma unroll
                for (int i = 0; i < HC; i++) { load4(mix[h][i], comb + (t * HC + i) * HC); }
            }
            #pragma unroll
            for (int n = 0; n < NT; n++) { sum[n][0] = sum[n][1] = sum[n][2] = sum[n][3] = 0; }
            square[0] = square[1] = 0;
        }
        copy_wait<HC_DEAL_STAGES - 2>();
        const uint4 *from = mine + stage * HC_DEAL_LOADS * HC_THREADS;
        fetch((stage + HC_DEAL_STAGES - 1) % HC_DEAL_STAGES);
        uint4 y4[2][HC];                        // Y, rounded
        #pragma unroll
        for (int h = 0; h < 2; h++) {
            float y[HC][8], z[8];
            if (DEAL) {
                unpack8(z, from[(2 * HC + h) * HC_THREADS]);
                #pragma unroll
                for (int je = 0; je < HC * 8; je++) {
                    y[je / 8][je % 8] = p[h][je / 8] * z[je % 8];
                }
                #pragma unroll
                for (int i = 0; i < HC; i++) {
                    unpack8(z, from[(h * HC + i) * HC_THREADS]);
                    #pragma unroll
                    for (int je = 0; je < HC * 8; je++) {
                        y[je / 8][je % 8] += mix[h][i][je / 8] * z[je % 8];
                    }
                }
            }
            #pragma unroll
            for (int j = 0; j < HC; j++) {
                if (DEAL) { store8((bf16 *)&y4[h][j], y[j]); }
                else { y4[h][j] = from[(h * HC + j) * HC_THREADS]; }
                if (DEAL && t0 + 8 * h < T) {
                    *(uint4 *)(Y + ((size_t)(t0 + 8 * h) * HC + j) * C + c) = y4[h][j];
                }
                unpack8(z, y4[h][j]);
                #pragma unroll
                for (int e = 0; e < 8; e++) { square[h] += z[e] * z[e]; }
            }
        }
        #pragma unroll
        for (int j = 0; j < HC; j++) {
            const uint32_t a[2][4] = { { y4[0][j].x, y4[1][j].x, y4[0][j].y, y4[1][j].y },
                                       { y4[0][j].z, y4[1][j].z, y4[0][j].w, y4[1][j].w } };
            #pragma unroll
            for (int n = 0; n < 2 * NT; n++) {          // high half, low half, next block of rows
                const uint4 b = parts[((now.group * HC + j) * 2 * NT + n) * 32 + lane];
                mma_bf16(sum[n / 2], a[0], b.x, b.y);
                mma_bf16(sum[n / 2], a[1], b.z, b.w);
            }
        }
        if (now.group == groups - 1) {
            #pragma unroll
            for (int h = 0; h < 2; h++) {       // the four lanes of a token; then its M + 1 sums
                square[h] += __shfl_xor_sync(~0u, square[h], 1);
                square[h] += __shfl_xor_sync(~0u, square[h], 2);
                float *out = partial + ((size_t)blockIdx.x * T + t0 + 8 * h) * (M + 1);
                #pragma unroll
                for (int ne = 0; ne < 2 * NT; ne++) {
                    const int n = ne / 2 * 8 + 2 * q + ne % 2;
                    if (n < M && t0 + 8 * h < T) { out[n] = sum[ne / 2][2 * h + ne % 2]; }
                }
                if (q == 0 && t0 + 8 * h < T) { out[M] = square[h]; }
            }
        }
        next_round(now);
    }
}

// The slices' shares added up, in their order: a warp per token, a lane per sum.
__global__ void hc_logits_sum_kernel(real *m, real *r, const float *partial, float eps, int slices,
                                     int T, int N, int M) {
    const int t = blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32, lane = threadIdx.x % 32;
    if (t >= T) { return; }
    float sum = 0;
    for (int s = 0; s < slices && lane <= M; s++) {
        sum += partial[((size_t)s * T + t) * (M + 1) + lane];
    }
    const float rms = 1 / sqrtf(__shfl_sync(~0u, sum, M) / N + eps);
    if (lane < M) { m[(size_t)t * M + lane] = sum * rms; }
    if (lane == M) { r[t] = rms; }
}

template <int M, bool DEAL>
static void hc_deal(act *Y, real *m, real *r, const act *o, const act *X, const real *post,
                    const real *comb, const float *fn, float eps, int T, int C) {
    if (T == 0) { return; }
    const dim3 grid = hc_grid(T, C, HC_DEAL_SLICE);
    const size_t mark = workspace_mark();
    const int bytes = 16 * (hc_deal_parts<M> + HC_DEAL_STAGES * HC_DEAL_LOADS * HC_THREADS);
    float *partial = (float *)workspace(sizeof(float) * grid.x * T * (M + 1));
    auto kernel = hc_deal_forward_kernel<M, DEAL>;
    cudaCheck(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
    kernel<<<grid, HC_THREADS, bytes, stream>>>(Y, partial, o, X, post, comb, fn, T, C);
    cudaCheck(cudaGetLastError());
    hc_logits_sum_kernel<<<blocks_for(T, 8), 256, 0, stream>>>(m, r, partial, eps, grid.x, T,
                                                               HC * C, M);
    cudaCheck(cudaGetLastError());
    workspace_release(mark);
}

extern "C" void hc_deal_forward_gpu(act *Y, real *m, real *r, const act *o, const act *X,
                                    const real *post, const real *comb, const float *fn, float eps,
                                    int T, int C, int M) {
    gpuRequire(C % HC_GROUP == 0 && (M == HC_MIX || M == HC));
    auto deal = M == HC ? hc_deal<HC, true> : hc_deal<HC_MIX, true>;
    deal(Y, m, r, o, X, post, comb, fn, eps, T, C);
}

extern "C" void hc_logits_forward_gpu(real *m, real *r, const act *X, const float *fn, float eps,
                                      int T, int C, int M) {
    gpuRequire(C % HC_GROUP == 0 && (M == HC_MIX || M == HC));
    auto deal = M == HC ? hc_deal<HC, false> : hc_deal<HC_MIX, false>;
    deal(NULL, m, r, NULL, X, NULL, NULL, fn, eps, T, C);
}

__device__ inline float sigmoid_gpu(float x) { return 1 / (1 + expf(-x)); }

// Sinkhorn with one element of the 4 x 4 matrix per lane, row by row: 16 lanes are a token. Sums
// over a line's four lanes, to all of them; columns at step 0, 2, ..
__device__ inline float line_sum(float x, int step) {
    const int stride = step % 2 ? 1 : 4;
    x += __shfl_xor_sync(~0u, x, stride);
    return x + __shfl_xor_sync(~0u, x, 2 * stride);
}

// Element c of the mixing matrix, from its logit. sums, unless NULL, gets the divisor of every
// half-step, `stride` apart.
__device__ inline float sinkhorn(float c, float *sums, int stride, int iters, float eps) {
    float max = fmaxf(c, __shfl_xor_sync(~0u, c, 1));
    max = fmaxf(max, __shfl_xor_sync(~0u, max, 2));
    c = expf(c - max);
    c = c / line_sum(c, 1) + eps;
    for (int step = 0; step < 2 * iters - 1; step++) {
        const float sum = line_sum(c, step) + eps;
        if (sums) { sums[step * stride] = sum; }
        c = __fdividef(c, sum);
    }
    return c;
}

// 16 lanes per token. bytes: 192 per token; what it costs is 39 dependent half-steps.
__global__ void hc_weights_forward_kernel(real *pre, real *post, real *comb, const real *m,
                                          const float *base, const float *scale, float eps, int T,
                                          int M, int iters) {
    const int at = blockIdx.x * blockDim.x + threadIdx.x, e = at % 16;
    const size_t t = min(at / 16, T - 1);       // lanes past the end repeat the last token
    m += t * M;
    if (e < HC) { pre[t * HC + e] = sigmoid_gpu(m[e] * scale[0] + base[e]) + eps; }
    if (M == HC) { return; }
    if (e < HC) { post[t * HC + e] = 2 * sigmoid_gpu(m[HC + e] * scale[1] + base[HC + e]); }
    const float c = m[2 * HC + e] * scale[2] + base[2 * HC + e];
    comb[t * HC * HC + e] = sinkhorn(c, NULL, 0, iters, eps);
}

extern "C" void hc_weights_forward_gpu(real *pre, real *post, real *comb, const real *m,
                                       const float *base, const float *scale, float eps, int T,
                                       int M, int iters) {
    if (T == 0) { return; }
    hc_weights_forward_kernel<<<blocks_for((size_t)T * 16, 128), 128, 0, stream>>>(
        pre, post, comb, m, base, scale, eps, T, M, iters);
    cudaCheck(cudaGetLastError());
}

// 8 channels from c on of u = sum_i pre[i] X[i] of one token.
__device__ inline void collapse8(float *u, const act *X, const float *p, int c, int C) {
    float x[8];
    #pragma unroll
    for (int k = 0; k < 8; k++) { u[k] = 0; }
    #pragma unroll
    for (int i = 0; i < HC; i++) {
        load8(x, X + (size_t)i * C + c);
        #pragma unroll
        for (int k = 0; k < 8; k++) { u[k] += p[i] * x[k]; }
    }
}

// x = w u rstd, u = sum_i pre[i] X[i]. One block per token, which keeps u in registers (up to
// C = 4,096; the rest it reads again).
//   bytes: 8 C read + 2 C written per token: 40 KiB, 168 MB at T = 4,096: 39 us.
__global__ void hc_enter_forward_kernel(act *out, real *rstd, const act *X, const real *pre,
                                        const bf16 *w, float eps, int C) {
    __shared__ float shared[32];
    const size_t t = blockIdx.x;
    const int first = threadIdx.x * 8, stride = blockDim.x * 8;
    float p[HC], u[8], g[8], sum = 0;
    load4(p, pre + t * HC);
    X += t * HC * C;
    for (int c = first; c < C; c += stride) {
        collapse8(u, X, p, c, C);
        #pragma unroll
        for (int k = 0; k < 8; k++) { sum += u[k] * u[k]; }
    }
    sum = block_sum(sum, shared);
    const float r = 1 / sqrtf(sum / C + eps);
    if (threadIdx.x == 0) { rstd[t] = r; }
    for (int c = first; c < C; c += stride) {
        if (C > stride) { collapse8(u, X, p, c, C); }
        load8(g, w + c);
        #pragma unroll
        for (int k = 0; k < 8; k++) { g[k] *= u[k] * r; }
        store8(out + t * C + c, g);
    }
}

extern "C" void hc_enter_forward_gpu(act *x, real *rstd, const act *X, const real *pre,
                                     const bf16 *w, float eps, int T, int C) {
    if (T == 0) { return; }
    hc_enter_forward_kernel<<<T, row_threads(C), 0, stream>>>(x, rstd, X, pre, w, eps, C);
    cudaCheck(cudaGetLastError());
}

// N sums over a block; thread i gets the i-th.
enum { HC_SUM_THREADS = 128 };
template <int N> __device__ inline float hc_block_sums(const float (&sums)[N]) {
    __shared__ float shared[HC_SUM_THREADS / 32][N];
    float all = 0;
    #pragma unroll
    for (int i = 0; i < N; i++) {
        const float of_warp = warp_sum(sums[i]);
        if (threadIdx.x % 32 == 0) { shared[threadIdx.x / 32][i] = of_warp; }
    }
    __syncthreads();
    for (int k = 0; k < HC_SUM_THREADS / 32 && threadIdx.x < N; k++) {
        all += shared[k][threadIdx.x];
    }
    return all;
}

// do = sum_j post[j] dY[j], dpost[j] = <dY[j], o>, dcomb[i][j] = <X[i], dY[j]>. One block per
// token; 20 sums over its threads.
//   bytes: 16 C for dY and X, 4 C for o and do: 80 KiB, 336 MB at T = 4,096: 78 us.
__global__ void __launch_bounds__(HC_SUM_THREADS)
hc_deal_backward_kernel(act *do_, real *dpost, real *dcomb, const act *dY, const act *o,
                        const act *X, const real *post, int C) {
    const size_t t = blockIdx.x;
    float p[HC], sums[HC + HC * HC] = {0};
    load4(p, post + t * HC);
    for (int c = threadIdx.x * 8; c < C; c += HC_SUM_THREADS * 8) {
        float d[HC][8], x[8], out[8] = {0};
        load8(x, o + t * C + c);
        #pragma unroll
        for (int j = 0; j < HC; j++) {
            load8(d[j], dY + (t * HC + j) * C + c);
            #pragma unroll
            for (int k = 0; k < 8; k++) { sums[j] += d[j][k] * x[k]; out[k] += p[j] * d[j][k]; }
        }
        store8(do_ + t * C + c, out);
        #pragma unroll
        for (int i = 0; i < HC; i++) {
            load8(x, X + (t * HC + i) * C + c);
            #pragma unroll
            for (int j = 0; j < HC; j++) {
                #pragma unroll
                for (int k = 0; k < 8; k++) { sums[HC + i * HC + j] += x[k] * d[j][k]; }
            }
        }
    }
    const float all = hc_block_sums(sums);
    if (threadIdx.x >= HC + HC * HC) { return; }
    if (threadIdx.x < HC) { dpost[t * HC + threadIdx.x] = all; }
    else { dcomb[t * HC * HC + threadIdx.x - HC] = all; }
}

extern "C" void hc_deal_backward_gpu(act *do_, real *dpost, real *dcomb, const act *dY,
                                     const act *o, const act *X, const real *post, int T, int C) {
    if (T == 0) { return; }
    hc_deal_backward_kernel<<<T, HC_SUM_THREADS, 0, stream>>>(do_, dpost, dcomb, dY, o, X, post, C);
    cudaCheck(cudaGetLastError());
}

// The backward of entering, in three kernels. With a = w dx and u = sum_i pre[i] X[i], the norm
// says
//     du = rstd a - kappa u,  kappa = rstd^3 <a, u> / C
// so all that dm needs of a token's streams are eight sums, <a, X[i]> and <u, X[i]>. One block per
// token.
//   bytes: 8 C for X, 4 C for dx per token: 48 KiB, 201 MB at T = 4,096: 47 us.
__global__ void __launch_bounds__(HC_SUM_THREADS)
hc_enter_sums_kernel(float *out, const real *dx, const act *X, const real *pre, const bf16 *w,
                     int C) {
    const size_t t = blockIdx.x;
    float p[HC], sums[2 * HC] = {0};
    load4(p, pre + t * HC);
    for (int c = threadIdx.x * 8; c < C; c += HC_SUM_THREADS * 8) {
        float a[8], g[8], u[8] = {0}, x[HC][8];
        load8(a, dx + t * C + c);
        load8(g, w + c);
        #pragma unroll
        for (int i = 0; i < HC; i++) {
            load8(x[i], X + (t * HC + i) * C + c);
            #pragma unroll
            for (int k = 0; k < 8; k++) { u[k] += p[i] * x[i][k]; }
        }
        #pragma unroll
        for (int i = 0; i < HC; i++) {
            #pragma unroll
            for (int k = 0; k < 8; k++) {
                sums[i] += a[k] * g[k] * x[i][k];
                sums[HC + i] += u[k] * x[i][k];
            }
        }
    }
    const float all = hc_block_sums(sums);
    if (threadIdx.x < 2 * HC) { out[t * 2 * HC + threadIdx.x] = all; }
}

// What dX needs of a token: r dm, 24 numbers, then kappa and `along`, the factors of u and X.
enum { HC_KAPPA = HC_MIX, HC_ALONG, HC_TOKEN = 32, HC_WEIGHTS_THREADS = 64 };

// dm by 16 lanes per token: the forward again with its divisors kept, then backwards through the
// steps.
__global__ void hc_weights_backward_kernel(float *token, const float *sums, const real *dpost,
                                           const real *dcomb, const real *m, const real *r,
                                           const real *pre, const real *rstd, const float *base,
                                           const float *scale, float eps, int T, int C, int M,
                                           int iters) {
    extern __shared__ float divisors[];         // (2*iters-1, threads)
    const int at = blockIdx.x * HC_WEIGHTS_THREADS + threadIdx.x, e = at % 16;
    const size_t t = min(at / 16, T - 1);
    const float norm = rstd[t], rms = r[t];
    float p[HC], a[HC], mean = 0, along = 0, dm = 0;
    load4(p, pre + t * HC);
    load4(a, sums + t * 2 * HC);
    #pragma unroll
    for (int i = 0; i < HC; i++) { mean += norm / C * p[i] * a[i]; }
    const float kappa = norm * norm * mean;
    m += t * M;
    token += t * HC_TOKEN;
    if (e < HC || (M > HC && e < 2 * HC)) {     // pre = s(..) + eps, post = 2 s(..)
        const float s = sigmoid_gpu(m[e] * scale[e / HC] + base[e]);
        const float dy = e < HC ? norm * sums[t * 2 * HC + e] - kappa * sums[t * 2 * HC + HC + e]
                                : 2 * dpost[t * HC + e - HC];
        dm = dy * s * (1 - s) * scale[e / HC];
        along = m[e] * dm;
        token[e] = rms * dm;
    }
    if (M > HC) {
        float *mine = divisors + threadIdx.x;
        float d = dcomb[t * HC * HC + e];
        float c = m[2 * HC + e] * scale[2] + base[2 * HC + e];
        c = sinkhorn(c, mine, HC_WEIGHTS_THREADS, iters, eps);
        for (int step = 2 * iters - 2; step >= 0; step--) {
            // forward: y_b = x_b / S, so dx_b = (dy_b - sum_k dy_k y_k) / S
            const float sum = mine[step * HC_WEIGHTS_THREADS];
            d = __fdividef(d - line_sum(d * c, step), sum);
            c *= sum;
        }
        c -= eps;                               // p + eps with p a softmax: p (da - <da, p>)
        dm = c * (d - line_sum(d * c, 1)) * scale[2];
        along += m[2 * HC + e] * dm;
        token[2 * HC + e] = rms * dm;
    }
    #pragma unroll
    for (int k = 1; k < 16; k *= 2) { along += __shfl_xor_sync(~0u, along, k); }
    if (e == 0) {
        token[HC_KAPPA] = kappa;
        token[HC_ALONG] = rms * rms / (HC * C) * along;
    }
}

// dX[i] = sum_j comb[i][j] dY[j] + pre[i] du + (fn^T r dm)[i] - along X[i]; dX holds dY on entry
// (NEXT; at the head there is none); each lane copies ahead only what it writes itself. fn and r dm
// are rounded to tf32: 2^-12, where dX rounds to 2^-9. Tokens come last to first: L2 has some.
//   bytes: 8 C for dY, 8 C for X, 4 C for dx, 8 C for dX: 112 KiB, 470 MB at T = 4,096: 110 us.
//   operations: 2 x 24 x 16,384 per token on tensor cores, 3.2 GFLOP in tf32: 13 us.
enum { HC_ENTER_SLICE = 128, HC_ENTER_STAGES = 2, HC_ENTER_LOADS = 2 * (2 * HC + 2) };
template <int M> constexpr int hc_enter_parts = HC_ENTER_SLICE / HC_GROUP * HC * ((M + 7) / 8) * 64;
template <int M, bool NEXT>
__global__ void __launch_bounds__(HC_THREADS, 1)
hc_enter_backward_kernel(act *dX, const real *dx, const act *X, const real *pre, const real *comb,
                         const real *rstd, const float *token, const float *fn, const bf16 *w,
                         int T, int C) {
    constexpr int KT = (M + 7) / 8;             // blocks of 8 rows of fn
    extern __shared__ uint4 parts[];            // (groups,HC,2*KT,32)
    uint4 *mine = parts + hc_enter_parts<M> + threadIdx.x;      // (stages,loads,threads)
    const int first = blockIdx.x * HC_ENTER_SLICE, tiles = (T + HC_TILE - 1) / HC_TILE;
    const int groups = min(HC_ENTER_SLICE, C - first) / HC_GROUP;
    const int lane = threadIdx.x % 32, g = lane / 4, q = lane % 4;
    HcRound now = { (int)blockIdx.y * HC_WARPS + (int)threadIdx.x / 32, 0, groups,
                    (int)gridDim.y * HC_WARPS }, ahead = now;
    auto fetch = [&](int stage) {
        uint4 *to = mine + stage * HC_ENTER_LOADS * HC_THREADS;
        #pragma unroll
        for (int h = 0; h < 2 && ahead.tile < tiles; h++) {
            const size_t t = min((tiles - 1 - ahead.tile) * HC_TILE + g + 8 * h, T - 1);
            const int c = first + ahead.group * HC_GROUP + q * 8, at = h * HC_ENTER_LOADS / 2;
            #pragma unroll
            for (int i = 0; i < HC; i++) {
                const size_t stream_i = (t * HC + i) * C + c;
                copy16_ahead(to + (at + i) * HC_THREADS, X + stream_i);
                if (NEXT) { copy16_ahead(to + (at + HC + i) * HC_THREADS, dX + stream_i); }
            }
            copy16_ahead(to + (at + 2 * HC) * HC_THREADS, dx + t * C + c);
            copy16_ahead(to + (at + 2 * HC + 1) * HC_THREADS, dx + t * C + c + 4);
            if (ahead.group == 0) {
                touch(token + t * HC_TOKEN + q * 8);
                touch(NEXT && q < 2 ? comb + t * HC * HC + q * 8 : pre + t * HC);
                touch(rstd + t);
            }
        }
        copy_commit();
        next_round(ahead);
    };
    #pragma unroll
    for (int stage = 0; stage < HC_ENTER_STAGES - 1; stage++) { fetch(stage); }
    #pragma unroll 4
    for (int at = threadIdx.x; at < groups * HC * KT * 64; at += HC_THREADS) {
        const int c = at % 8 * 4, k = at / 8 % (8 * KT), j = at / (64 * KT) % HC;
        const int group = at / (64 * KT * HC);
        float x[4] = {0};
        if (k < M) { load4(x, fn + ((size_t)k * HC + j) * C + first + group * HC_GROUP + c); }
        #pragma unroll
        for (int e = 0; e < 4; e++) {
            // Block v of 8 columns has the channels 8 q + 2 v, 8 q + 2 v + 1 of every q.
            const int v = (c + e) % 8 / 2, column = (c + e) / 8 * 2 + e % 2;
            const int word = (v * KT + k / 8) * 2 + k % 8 / 4, of_lane = column * 4 + k % 4;
            const int at_word = ((group * HC + j) * 2 * KT + word / 4) * 32 + of_lane;
            ((uint32_t *)&parts[at_word])[word % 4] = round_tf32(x[e]);
        }
    }
    __syncthreads();
    uint32_t a[KT][4];
    float p[2][HC], norm[2], kappa[2], along[2];
    for (int stage = 0; now.tile < tiles; stage = (stage + 1) % HC_ENTER_STAGES) {
        const int t0 = (tiles - 1 - now.tile) * HC_TILE + g;
        const int c = first + now.group * HC_GROUP + q * 8;
        const size_t t[2] = { (size_t)min(t0, T - 1), (size_t)min(t0 + 8, T - 1) };
        #pragma unroll
        for (int h = 0; h < 2 && now.group == 0; h++) {
            const float *of = token + t[h] * HC_TOKEN;
            load4(p[h], pre + t[h] * HC);
            norm[h] = rstd[t[h]];
            kappa[h] = of[HC_KAPPA];
            along[h] = of[HC_ALONG];
            #pragma unroll
            for (int k = 0; k < KT; k++) {
                a[k][h] = 8 * k + q < M ? round_tf32(of[8 * k + q]) : 0;
                a[k][2 + h] = 8 * k + q + 4 < M ? round_tf32(of[8 * k + q + 4]) : 0;
            }
        }
        copy_wait<HC_ENTER_STAGES - 2>();
        const uint4 *from = mine + stage * HC_ENTER_LOADS * HC_THREADS;
        fetch((stage + HC_ENTER_STAGES - 1) % HC_ENTER_STAGES);
        float du[2][8], weight[8], z[8];
        load8(weight, w + c);
        #pragma unroll
        for (int h = 0; h < 2; h++) {
            const uint4 *half = from + h * HC_ENTER_LOADS / 2 * HC_THREADS;
            load4(du[h], (const float *)(half + 2 * HC * HC_THREADS));
            load4(du[h] + 4, (const float *)(half + (2 * HC + 1) * HC_THREADS));
            #pragma unroll
            for (int e = 0; e < 8; e++) { du[h][e] *= norm[h] * weight[e]; }
            #pragma unroll
            for (int i = 0; i < HC; i++) {
                unpack8(z, half[i * HC_THREADS]);
                #pragma unroll
                for (int e = 0; e < 8; e++) { du[h][e] -= kappa[h] * p[h][i] * z[e]; }
            }
        }
        #pragma unroll
        for (int i = 0; i < HC; i++) {
            float sum[4][4];
            uint4 b[2 * KT];
            #pragma unroll
            for (int k = 0; k < 2 * KT; k++) {
                b[k] = parts[((now.group * HC + i) * 2 * KT + k) * 32 + lane];
            }
            const uint32_t *word = (const uint32_t *)b;
            #pragma unroll
            for (int v = 0; v < 4; v++) {
                sum[v][0] = sum[v][1] = sum[v][2] = sum[v][3] = 0;
                #pragma unroll
                for (int k = 0; k < KT; k++) {
                    mma_tf32(sum[v], a[k], word[(v * KT + k) * 2], word[(v * KT + k) * 2 + 1]);
                }
            }
            #pragma unroll
            for (int h = 0; h < 2; h++) {
                const uint4 *half = from + h * HC_ENTER_LOADS / 2 * HC_THREADS;
                float out[8], mix[HC];
                unpack8(z, half[i * HC_THREADS]);
                #pragma unroll
                for (int e = 0; e < 8; e++) {
                    out[e] = sum[e / 2][2 * h + e % 2] + p[h][i] * du[h][e] - along[h] * z[e];
                }
                if (NEXT) {
                    load4(mix, comb + (t[h] * HC + i) * HC);
                    #pragma unroll
                    for (int j = 0; j < HC; j++) {
                        unpack8(z, half[(HC + j) * HC_THREADS]);
                        #pragma unroll
                        for (int e = 0; e < 8; e++) { out[e] += mix[j] * z[e]; }
                    }
                }
                if (t0 + 8 * h < T) { store8(dX + (t[h] * HC + i) * C + c, out); }
            }
        }
        next_round(now);
    }
}

extern "C" void hc_enter_backward_gpu(act *dX, const real *dx, const real *dpost, const real *dcomb,
                                      const act *X, const real *m, const real *r, const real *pre,
                                      const real *comb, const real *rstd, const float *fn,
                                      const float *base, const float *scale, const bf16 *w,
                                      float eps, int T, int C, int M, int iters) {
    if (T == 0) { return; }
    gpuRequire(C % HC_GROUP == 0 && iters <= 64 && (M == HC_MIX || M == HC));
    const size_t mark = workspace_mark();
    float *sums = (float *)workspace(sizeof(float) * T * 2 * HC);
    float *token = (float *)workspace(sizeof(float) * T * HC_TOKEN);
    hc_enter_sums_kernel<<<T, HC_SUM_THREADS, 0, stream>>>(sums, dx, X, pre, w, C);
    cudaCheck(cudaGetLastError());
    hc_weights_backward_kernel<<<blocks_for((size_t)T * 16, HC_WEIGHTS_THREADS), HC_WEIGHTS_THREADS,
                                 sizeof(float) * 2 * iters * HC_WEIGHTS_THREADS, stream>>>(
        token, sums, dpost, dcomb, m, r, pre, rstd, base, scale, eps, T, C, M, iters);
    cudaCheck(cudaGetLastError());
    const int bytes = 16 * ((M == HC ? hc_enter_parts<HC> : hc_enter_parts<HC_MIX>) +
                            HC_ENTER_STAGES * HC_ENTER_LOADS * HC_THREADS);
    auto kernel = M == HC ? hc_enter_backward_kernel<HC, false>
                          : hc_enter_backward_kernel<HC_MIX, true>;
    cudaCheck(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
    kernel<<<hc_grid(T, C, HC_ENTER_SLICE), HC_THREADS, bytes, stream>>>(
        dX, dx, X, pre, comb, rstd, token, fn, w, T, C);
    cudaCheck(cudaGetLastError());
    workspace_release(mark);
}

// -------------------------------------------------------------------------------------------------
// 8 Compressors and indexer (train.c 5.2 and 5.3)

// The row and first channel behind slot s of entry p; -1: empty (C text: pool_slot).
__device__ inline int pool_slot_gpu(const AttentionShape &a, int position, int p, int s, int D,
                                    int *channel) {
    if (a.ratio != 4) {
        *channel = 0;
        return a.token[p] + s;
    }
    *channel = s < a.ratio ? 0 : D;
    return s < a.ratio && position == 0 ? -1 : a.token[p] + s - a.ratio;
}

// One block per entry, one thread per channel. The softmax over the slots is taken in one pass: a
// new maximum rescales what was summed so far.
//   bytes: K and Z once, 8 halves D per token: 34 MB at T = 4,096 in CSA layers, 8 us.
__device__ inline void pool_channel(float *max_out, float *sum_out, float *y_out, const real *K,
                                    const real *Z, const float *ape, const AttentionShape &a,
                                    int position, int p, int d, int D) {
    const int n = a.ratio == 4 ? 2 : 1, slots = n * a.ratio;
    float max = -INFINITY, sum = 0, y = 0;
    #pragma unroll 8
    for (int s = 0; s < slots; s++) {
        int channel;
        const int row = pool_slot_gpu(a, position, p, s, D, &channel);
        if (row < 0) { continue; }
        const size_t at = (size_t)row * n * D + channel + d;
        const float z = Z[at] + ape[(size_t)(s % a.ratio) * n * D + channel + d];
        const float higher = fmaxf(max, z), keep = expf(max - higher), e = expf(z - higher);
        sum = sum * keep + e;
        y = y * keep + e * K[at];
        max = higher;
    }
    *max_out = max;
    *sum_out = sum;
    *y_out = y / sum;
}

__global__ void pool_forward_kernel(act *out, const real *K, const real *Z, const float *ape,
                                    AttentionShape a, const int *entry_position, int D) {
    const int p = blockIdx.x, d = threadIdx.x;
    float max, sum, y;
    pool_channel(&max, &sum, &y, K, Z, ape, a, entry_position[p], p, d, D);
    out[(size_t)p * D + d] = __float2bfloat16(y);
}

extern "C" void pool_forward_gpu(act *out, const real *K, const real *Z, const float *ape,
                                 AttentionShape a, const int *entry_position, int D) {
    if (a.P == 0) { return; }
    pool_forward_kernel<<<a.P, D, 0, stream>>>(out, K, Z, ape, a, entry_position, D);
    cudaCheck(cudaGetLastError());
}

// forward: y = sum_s w_s K_s, w = softmax_s(Z_s + ape_s); so dK_s = w_s dy, dZ_s = dK_s (K_s - y).
__global__ void pool_backward_kernel(real *dK, real *dZ, const act *dout, const real *K,
                                     const real *Z, const float *ape, AttentionShape a,
                                     const int *entry_position, int D) {
    const int p = blockIdx.x, d = threadIdx.x, n = a.ratio == 4 ? 2 : 1;
    const float dy = __bfloat162float(dout[(size_t)p * D + d]);
    float max, sum, y;
    pool_channel(&max, &sum, &y, K, Z, ape, a, entry_position[p], p, d, D);
    for (int s = 0; s < n * a.ratio; s++) {
        int channel;
        const int row = pool_slot_gpu(a, entry_position[p], p, s, D, &channel);
        if (row < 0) { continue; }
        const size_t at = (size_t)row * n * D + channel + d;
        const float z = Z[at] + ape[(size_t)(s % a.ratio) * n * D + channel + d];
        const float dk = expf(z - max) / sum * dy;
        dK[at] = dk;
        dZ[at] = dk * (K[at] - y);
    }
}

extern "C" void pool_backward_gpu(real *dK, real *dZ, const act *dout, const real *K, const real *Z,
                                  const float *ape, AttentionShape a, const int *entry_position,
                                  int D) {
    const size_t bytes = sizeof(real) * (size_t)a.T * (a.ratio == 4 ? 2 : 1) * D;
    cudaCheck(cudaMemsetAsync(dK, 0, bytes, stream));
    cudaCheck(cudaMemsetAsync(dZ, 0, bytes, stream));
    if (a.P == 0) { return; }
    pool_backward_kernel<<<a.P, D, 0, stream>>>(dK, dZ, dout, K, Z, ape, a, entry_position, D);
    cudaCheck(cudaGetLastError());
}

// score (n,P) = sum_h w[h] relu(S[h][p]), S (n,heads,P) the products q k for n tokens from t0 on.
__global__ void indexer_score_kernel(float *score, const float *S, const real *w, int t0, int P,
                                     int heads) {
    const int p = blockIdx.x * blockDim.x + threadIdx.x, i = blockIdx.y;
    if (p >= P) { return; }
    float sum = 0;
    for (int h = 0; h < heads; h++) {
        const float s = S[((size_t)i * heads + h) * P + p];
        if (s > 0) { sum += w[(size_t)(t0 + i) * heads + h] * s; }
    }
    score[(size_t)i * P + p] = sum;
}

// A float's bits, arranged so that unsigned integers compare as the floats do.
__device__ inline unsigned sortable(float x) {
    const unsigned bits = __float_as_uint(x);
    return bits >> 31 ? ~bits : bits | 0x80000000u;
}

// The topk highest of a token's visible scores, in ascending order of entry. One block per token.
// The topk-th largest key is found 8 bits at a time, by counting; then entries above it are taken,
// and of those equal to it the first ones.
enum { SELECT_THREADS = 256 };
__global__ void __launch_bounds__(SELECT_THREADS)
indexer_select_kernel(int *selected, const float *score, AttentionShape a, int t0) {
    __shared__ int count[256], warp_total[SELECT_THREADS / 32], base_out, base_equal;
    __shared__ unsigned prefix;
    __shared__ int wanted;
    const int t = t0 + blockIdx.x, tid = threadIdx.x, first = a.first_entry[t];
    const int visible = (a.position[t] + 1) / a.ratio;
    int *chosen = selected + (size_t)t * a.topk;
    if (visible <= a.topk) {
        for (int i = tid; i < a.topk; i += SELECT_THREADS) {
            chosen[i] = i < visible ? first + i : -1;
        }
        return;
    }
    score += (size_t)blockIdx.x * a.P + first;
    if (tid == 0) { prefix = 0; wanted = a.topk; }
    for (int shift = 24; shift >= 0; shift -= 8) {
        count[tid] = 0;
        __syncthreads();
        const unsigned high = shift == 24 ? 0 : prefix >> (shift + 8);
        for (int p = tid; p < visible; p += SELECT_THREADS) {
            const unsigned key = sortable(score[p]);
            if (shift == 24 || key >> (shift + 8) == high) {
                atomicAdd(&count[key >> shift & 255], 1);       // integers: any order, one result
            }
        }
        __syncthreads();
        if (tid == 0) {
            int digit = 255;
            while (count[digit] < wanted) { wanted -= count[digit--]; }
            prefix |= (unsigned)digit << shift;
        }
        __syncthreads();
    }
    if (tid == 0) { base_out = base_equal = 0; }
    __syncthreads();
    const int lane = tid % 32, warp = tid / 32;
    for (int p0 = 0; p0 < visible; p0 += SELECT_THREADS) {
        const int p = p0 + tid;
        const unsigned key = p < visible ? sortable(score[p]) : 0;
        const int equal = p < visible && key == prefix;
        // Which of the equal ones this is: only the first `wanted` are taken.
        unsigned mask = __ballot_sync(~0u, equal);
        if (lane == 0) { warp_total[warp] = __popc(mask); }
        __syncthreads();
        int rank = base_equal + __popc(mask & ((1u << lane) - 1));
        for (int i = 0; i < warp; i++) { rank += warp_total[i]; }
        int total = 0;
        for (int i = 0; i < SELECT_THREADS / 32; i++) { total += warp_total[i]; }
        __syncthreads();
        if (tid == 0) { base_equal += total; }
        const int take = p < visible && (key > prefix || (equal && rank < wanted));
        mask = __ballot_sync(~0u, take);
        if (lane == 0) { warp_total[warp] = __popc(mask); }
        __syncthreads();
        int at = base_out + __popc(mask & ((1u << lane) - 1));
        for (int i = 0; i < warp; i++) { at += warp_total[i]; }
        total = 0;
        for (int i = 0; i < SELECT_THREADS / 32; i++) { total += warp_total[i]; }
        __syncthreads();
        if (tid == 0) { base_out += total; }
        if (take) { chosen[at] = first + p; }
        __syncthreads();
    }
}

// All products q k of a chunk of tokens by cuBLAS in fp32, then the weighted sum over heads, then
// the selection. Chunks keep the products (heads P floats per token) within the workspace.
//   operations at 4,096 tokens: 2 x 64 x 128 x 1,024 each, 69 GFLOP: 0.1 ms; the products move
//   2 x 1.07 GB: 0.5 ms. Fusing the two would leave a tenth of that.
extern "C" void indexer_select_gpu(int *selected, const act *q, const act *k, const real *w,
                                   AttentionShape a, int heads, int dim) {
    if (a.T == 0) { return; }
    const int chunk = 256;
    const size_t mark = workspace_mark();
    float *S = NULL, *score = NULL;
    if (a.P > 0) {
        S = (float *)workspace(sizeof(float) * (size_t)chunk * heads * a.P);
        score = (float *)workspace(sizeof(float) * (size_t)chunk * a.P);
    }
    for (int t0 = 0; t0 < a.T; t0 += chunk) {
        const int n = a.T - t0 < chunk ? a.T - t0 : chunk;
        if (a.P > 0) {
            product(S, CUDA_R_32F, q + (size_t)t0 * heads * dim, k, n * heads, dim, a.P, 0);
            indexer_score_kernel<<<dim3(blocks_for(a.P, 256), n), 256, 0, stream>>>(
                score, S, w, t0, a.P, heads);
        }
        indexer_select_kernel<<<n, SELECT_THREADS, 0, stream>>>(selected, score, a, t0);
        cudaCheck(cudaGetLastError());
    }
    workspace_release(mark);
}

// -------------------------------------------------------------------------------------------------
// 9 Attention (train.c 5.4)
//
// First kernels for heads of 128 and 512 dims: a warp per query and head, 16 per key, their lanes
// sharing the dims; every dot product is a shuffle tree. They serve the tiny model. The real one's
// 64 heads of 512 dims have kernels on the tensor cores, whose ladders are in dev/cuda: 9.1, 9.2.

// How many keys token t attends to: so many rows of its window, then entries.
__device__ inline int attended_count(const AttentionShape &a, const int *selected, int t,
                                     int *window) {
    *window = min(a.position[t] + 1, a.W);
    const int visible = a.ratio ? (a.position[t] + 1) / a.ratio : 0;
    return *window + (selected ? min(visible, a.topk) : visible);
}

// The i-th of them.
__device__ inline const act *attended_key(const AttentionShape &a, const act *kv,
                                          const act *entries, const int *selected, int t,
                                          int window, int i) {
    if (i < window) { return kv + (size_t)(t - window + 1 + i) * a.D; }
    const int e = selected ? selected[(size_t)t * a.topk + i - window]
                           : a.first_entry[t] + i - window;
    return entries + (size_t)e * a.D;
}

template <int NV>
__global__ void attention_forward_kernel(act *out, real *lse, const act *q, const act *kv,
                                         const act *entries, const float *sink, const int *selected,
                                         AttentionShape a) {
    const int lane = threadIdx.x % 32, first = lane * NV;
    const size_t row = (size_t)blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32;
    if (row >= (size_t)a.T * a.H) { return; }
    const int t = (int)(row / a.H), h = (int)(row % a.H);
    const float scale = rsqrtf((float)a.D);
    int window;
    const int n = attended_count(a, selected, t, &window);
    float x[NV], o[NV] = {0}, k[NV], max = sink[h], sum = 1;
    load_row<NV>(x, q + row * a.D + first);
    for (int i = 0; i < n; i++) {
        load_row<NV>(k, attended_key(a, kv, entries, selected, t, window, i) + first);
        float l = 0;
        #pragma unroll
        for (int d = 0; d < NV; d++) { l += x[d] * k[d]; }
        l = scale * warp_sum(l);
        const float higher = fmaxf(max, l), keep = expf(max - higher), e = expf(l - higher);
        sum = sum * keep + e;
        max = higher;
        #pragma unroll
        for (int d = 0; d < NV; d++) { o[d] = o[d] * keep + e * k[d]; }
    }
    #pragma unroll
    for (int d = 0; d < NV; d++) { o[d] /= sum; }
    store_row<NV>(out + row * a.D + first, o);
    if (lane == 0) { lse[row] = max + logf(sum); }
}

static void attention_forward_plain(act *out, real *lse, const act *q, const act *kv,
                                    const act *entries, const float *sink, const int *selected,
                                    AttentionShape a) {
    if (a.T == 0) { return; }
    const int grid = blocks_for((size_t)a.T * a.H, 8);
    if (a.D == 512) {
        attention_forward_kernel<16><<<grid, 256, 0, stream>>>(out, lse, q, kv, entries, sink,
                                                               selected, a);
    } else {
        gpuRequire(a.D == 128);
        attention_forward_kernel<4><<<grid, 256, 0, stream>>>(out, lse, q, kv, entries, sink,
                                                              selected, a);
    }
    cudaCheck(cudaGetLastError());
}

// Word k of lane i of a quad becomes word i of lane k.
__device__ inline void transpose_quad(uint32_t (&v)[4], int lane) {
    const bool odd = lane & 1, high = lane & 2;
    #pragma unroll
    for (int k = 0; k < 4; k += 2) {
        const uint32_t in = __shfl_xor_sync(~0u, odd ? v[k] : v[k + 1], 1);
        v[k] = odd ? in : v[k];
        v[k + 1] = odd ? v[k + 1] : in;
    }
    #pragma unroll
    for (int k = 0; k < 2; k++) {
        const uint32_t in = __shfl_xor_sync(~0u, high ? v[k] : v[k + 2], 2);
        v[k] = high ? in : v[k];
        v[k + 2] = high ? v[k + 2] : in;
    }
}

// A tensor (rows,512) of bf16, in boxes of box_rows x 64 for the copy engine.
static CUtensorMap rows_map(const act *p, int rows, int box_rows) {
    return tensor_map(p, 0, 512, rows, 1, 512, (size_t)rows * 512, box_rows);
}

// -------------------------------------------------------------------------------------------------
// 9.1 Attention forward on tensor cores: 64 heads of 512 dims (dev/cuda/attention_forward.cu)
//
// A block takes one token at a time: its 64 heads are the rows of a product with 64 keys after the
// other, which all heads share, so a key is read once per token. A receiver has fewer heads: the
// other rows are zeros (version 3) or the next tokens' heads (4), and are not stored.

namespace forward {        // its helpers' names are common ones
// -------------------------------------------------------------------------------------------------
// What versions 3 and 4 share (1 is the plain kernel above, 2 was left behind in the ladder). 3
// takes tokens whose entries the indexer chose, 4 those that attend to all they see.
//
// A tile is 64 rows of 512 dims: the heads of one token, or 64 consecutive keys of its list. In
// shared memory it is 8 blocks of 64 columns; a block's row is 128 bytes, its 16-byte chunk c lies
// at c ^ row % 8. That is the tensor cores' 128-byte swizzle, and keeps ldmatrix free of conflicts.
//
// The softmax works in powers of two: x = <q,k> * scale * log2(e). Its reference (what is
// subtracted before exp2) starts at the sink and follows the maximum only when that is more than
// RISE above it: p stays below 2^RISE, and the outputs are almost never rescaled.

enum { TILE = 64, ATT_H = 64, ATT_D = 512, BLOCK_BYTES = TILE * 128, TILE_BYTES = 8 * BLOCK_BYTES };
#define RISE 8.0f
#define LOG2E 1.4426950408889634f
#define LN2 0.6931471805599453f

__device__ inline uint32_t chunk_offset(int row, int chunk) {
    return chunk / 8 * BLOCK_BYTES + row * 128 + ((chunk ^ row) & 7) * 16;
}

// The keys that a token attends to.
typedef struct {
    int t, window, count, first_entry;
} Keys;

__device__ inline Keys token_keys(const AttentionShape &a, const int *selected, int t) {
    Keys k;
    k.t = t;
    k.count = attended_count(a, selected, t, &k.window);
    k.first_entry = a.ratio ? a.first_entry[t] : 0;
    return k;
}

// Row i of the list, or NULL past its end.
__device__ inline const act *key_row(const Keys &k, const AttentionShape &a, const act *kv,
                                     const act *entries, const int *selected, int i) {
    if (i >= k.count) { return NULL; }
    if (i < k.window) { return kv + (size_t)(k.t - k.window + 1 + i) * ATT_D; }
    i -= k.window;
    const int e = selected ? selected[(size_t)k.t * a.topk + i] : k.first_entry + i;
    return entries + (size_t)e * ATT_D;
}

__device__ inline const act *from_lane(const act *p, int lane) {
    return (const act *)__shfl_sync(~0u, (unsigned long long)p, lane);
}

// exp2, and 0 for -inf; the hardware's approximation has an error of 2^-22.
__device__ inline float power2(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

__device__ inline float quad_max(float x) {
    x = fmaxf(x, __shfl_xor_sync(~0u, x, 1));
    return fmaxf(x, __shfl_xor_sync(~0u, x, 2));
}
__device__ inline float quad_sum(float x) {
    x += __shfl_xor_sync(~0u, x, 1);
    return x + __shfl_xor_sync(~0u, x, 2);
}

// Of four blocks of 8 columns a lane of a quad holds the columns 2 lane, 2 lane + 1 of each. It
// gets block `lane` whole, and stores its 16 bytes: a quad writes 64 bytes of one row.
__device__ inline void store_blocks(act *row, uint32_t x0, uint32_t x1, uint32_t x2, uint32_t x3) {
    const int lane = threadIdx.x % 4;
    uint32_t x[4] = { x0, x1, x2, x3 };
    transpose_quad(x, lane);
    *(uint4 *)(row + lane * 8) = make_uint4(x[0], x[1], x[2], x[3]);
}

// Four blocks of 8 columns of rows r and r + 8, from 16 accumulators of an m16n8 fragment; of those
// the first `rows`, which are none, 8 or 16 for the whole warp, or more.
__device__ inline void store_fragments(act *at, const float *o, float k0, float k1, int rows) {
    if (rows <= 0) { return; }
    store_blocks(at,
                 pack_bf16(o[0] * k0, o[1] * k0), pack_bf16(o[4] * k0, o[5] * k0),
                 pack_bf16(o[8] * k0, o[9] * k0), pack_bf16(o[12] * k0, o[13] * k0));
    if (rows <= 8) { return; }
    store_blocks(at + 8 * ATT_D,
                 pack_bf16(o[2] * k1, o[3] * k1), pack_bf16(o[6] * k1, o[7] * k1),
                 pack_bf16(o[10] * k1, o[11] * k1), pack_bf16(o[14] * k1, o[15] * k1));
}

// -------------------------------------------------------------------------------------------------
// Version 3: wgmma, two consumer warpgroups and one producer
//
// A block keeps its multiprocessor and takes every 132nd token. Tiles go in pairs: even ones into
// buffer 0, odd ones into buffer 1. Consumer 0 scores the even tile of a pair, consumer 1 the odd
// one (64 x 64 over 512 dims), each takes its tile's softmax, and hands P to the other through
// shared memory. Of the outputs consumer 0 owns the dims 0 .. 255, consumer 1 the dims 256 .. 511,
// over all keys. So one consumer's softmax hides under the other's products:
//
//     consumer 0:  S0 = Q K0   softmax 0           O += P0 V0 left    O += P1 V1 left
//     consumer 1:      S1 = Q K1   O += P0 V0 right   softmax 1       O += P1 V1 right
//
// The softmax reference of a row goes from one to the other with P, each rescales its outputs and
// its share of the sum when it moved. A buffer's left half is free when consumer 0 has used it, the
// right half when consumer 1 has, and is refilled at once, which lets the next scores begin on it.
//
// Full and free are mbarriers; the producer's cp.async arrive on full by themselves. P is handed
// over by named barriers. Nobody waits in a cycle: see the order of the steps in consume().

// d (64 x 256) += a (64 x 16) b (16 x 256), a from registers.
__device__ inline void wgmma_outputs(float (&d)[128], const uint32_t *a, uint64_t b) {
    asm volatile("wgmma.mma_async.sync.aligned.m64n256k16.f32.bf16.bf16 {" NUMBERS_128
                 "}, {%128, %129, %130, %131}, %132, 1, 1, 1, 1;"
                 : SUMS_32(d, 0), SUMS_32(d, 32), SUMS_32(d, 64), SUMS_32(d, 96)
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}

// The same, a from shared memory.
__device__ inline void wgmma_outputs(float (&d)[128], uint64_t a, uint64_t b) {
    wgmma_m64k16<256, 1>(d, a, b, 1);
}

// Barriers between the two consumers' 256 threads.
enum { P0_READY = 1, P1_READY = 2, TOKEN_DONE = 3 };
template <int ID> __device__ inline void pair_arrive(void) {
    asm volatile("bar.arrive %0, 256;" :: "n"(ID) : "memory");
}
template <int ID> __device__ inline void pair_sync(void) {
    asm volatile("bar.sync %0, 256;" :: "n"(ID) : "memory");
}

// What lies where in version 3's shared memory. Full and free: buffer 0 left, right, buffer 1 left,
// right.
enum {
    V3_Q = 0, V3_KV = TILE_BYTES, V3_P = 3 * TILE_BYTES, V3_REFERENCE = V3_P + 2 * BLOCK_BYTES,
    V3_SUM = V3_REFERENCE + 2 * 64 * 4, V3_FULL = V3_SUM + 2 * 2 * 64 * 4,
    V3_FREE = V3_FULL + 4 * 8, V3_Q_FULL = V3_FREE + 4 * 8, V3_Q_FREE = V3_Q_FULL + 8,
    V3_BYTES = V3_Q_FREE + 8, V3_HALF = TILE_BYTES / 2,
};

typedef struct {
    act *out;
    real *lse;
    const act *q, *kv, *entries;
    const float *sink;
    const int *selected;
    AttentionShape a;
} ForwardArguments;

// Tokens of this block, the last first: they have the most keys, and the next blocks' neighbours
// share them in L2.
__device__ inline int block_token(const AttentionShape &a, int i) {
    return a.T - 1 - (i * (int)gridDim.x + (int)blockIdx.x);
}

// The producer: 4 warps, each 16 rows of a tile; a warp copies half a row of 512 bytes at a time.
__device__ inline void copy_half(uint32_t to, const act *mine, int half) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4;
    #pragma unroll
    for (int i = 0; i < 16; i++) {
        const act *row = from_lane(mine, i);
        copy16(to + half * V3_HALF + chunk_offset(16 * warp + i, lane),
               row + half * 256 + lane * 8, row != NULL);
    }
}

__device__ inline void produce(const ForwardArguments &f, uint32_t base) {
    const int lane = threadIdx.x % 32, mine = threadIdx.x / 32 % 4 * 16 + lane % 16;
    int use[2] = {0, 0};                                // fills of each buffer so far
    for (int i = 0, t; (t = block_token(f.a, i)) >= 0; i++) {
        const Keys keys = token_keys(f.a, f.selected, t);
        const act *row = mine < f.a.H ? f.q + ((size_t)t * f.a.H + mine) * ATT_D : NULL;
        barrier_wait(base + V3_Q_FREE, ~i & 1);
        copy_half(base + V3_Q, row, 0);
        copy_half(base + V3_Q, row, 1);
        barrier_arrive_copies(base + V3_Q_FULL);
        if (block_token(f.a, i + 1) >= 0 && threadIdx.x % 128 == 0) {
            asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;"
                         :: "l"(f.q + (size_t)block_token(f.a, i + 1) * f.a.H * ATT_D),
                            "r"(f.a.H * ATT_D * 2) : "memory");
        }
        for (int tile = 0; tile * TILE < keys.count; tile++) {
            const int b = tile % 2;
            row = key_row(keys, f.a, f.kv, f.entries, f.selected, tile * TILE + mine);
            #pragma unroll
            for (int half = 0; half < 2; half++) {
                barrier_wait(base + V3_FREE + (2 * b + half) * 8, ~(b ? use[1] : use[0]) & 1);
                copy_half(base + V3_KV + b * TILE_BYTES, row, half);
                barrier_arrive_copies(base + V3_FULL + (2 * b + half) * 8);
            }
            if (b) { use[1]++; } else { use[0]++; }
        }
    }
}

// A consumer thread's part of a row pair: r = 16 warp + lane / 4, and r + 8.
typedef struct {
    float reference[2], sum[2];
} Softmax;

// s = Q K^T of the tile in that buffer, whose halves are filled for the use-th time.
__device__ inline void scores(float (&s)[32], uint32_t base, int buffer, int use) {
    const uint64_t q = operand_at(base + V3_Q);
    const uint64_t k = operand_at(base + V3_KV + buffer * TILE_BYTES);
    #pragma unroll
    for (int half = 0; half < 2; half++) {
        barrier_wait(base + V3_FULL + (2 * buffer + half) * 8, use & 1);
        proxy_fence();
        wgmma_fence();
        #pragma unroll
        for (int i = 16 * half; i < 16 * half + 16; i++) {
            const int step = (i / 4 * BLOCK_BYTES + i % 4 * 32) >> 4;
            wgmma_m64n64k16(s, q + step, k + step, i > 0);
        }
    }
    wgmma_commit();
}

// P from the scores: into p (bf16, as the operand of wgmma) and into shared memory for the other.
__device__ inline void softmax(uint32_t (&p)[16], float (&s)[32], Softmax &x, unsigned char *to,
                               int row, int left) {
    const float scale = rsqrtf((float)ATT_D) * LOG2E;
    const int lane = threadIdx.x % 32;
    float high[2] = {-INFINITY, -INFINITY};
    #pragma unroll
    for (int i = 0; i < 32; i++) {
        if (left < TILE && i / 4 * 8 + lane % 4 * 2 + i % 2 >= left) { s[i] = -INFINITY; }
        high[i / 2 % 2] = fmaxf(high[i / 2 % 2], s[i]);
    }
    #pragma unroll
    for (int i = 0; i < 2; i++) {
        const float top = quad_max(high[i]) * scale;
        const float now = top > x.reference[i] + RISE ? top : x.reference[i];
        x.sum[i] *= power2(x.reference[i] - now);
        x.reference[i] = now;
    }
    #pragma unroll
    for (int i = 0; i < 32; i += 2) {
        const int high = i / 2 % 2;
        const float p0 = power2(s[i] * scale - x.reference[high]);
        const float p1 = power2(s[i + 1] * scale - x.reference[high]);
        x.sum[high] += p0 + p1;
        p[i / 2] = pack_bf16(p0, p1);
        *(uint32_t *)(to + chunk_offset(row + 8 * high, i / 4) + lane % 4 * 4) = p[i / 2];
    }
}

// The reference of a row moved from `before` to `now`: the outputs follow (the sum is scaled where
// it moved). Products with o may still be on their way: they are waited for only if o must change.
__device__ inline void move_reference(float (&o)[128], const float *before, const float *now) {
    if (__any_sync(~0u, before[0] != now[0] || before[1] != now[1])) {
        const float k0 = power2(before[0] - now[0]), k1 = power2(before[1] - now[1]);
        wgmma_wait(o);
        #pragma unroll
        for (int i = 0; i < 128; i++) { o[i] *= i & 2 ? k1 : k0; }
    }
}
__device__ inline void take_reference(float (&o)[128], Softmax &x, const float *reference,
                                      int row) {
    const float now[2] = {reference[row], reference[row + 8]};
    move_reference(o, x.reference, now);
    #pragma unroll
    for (int i = 0; i < 2; i++) {
        x.sum[i] *= power2(x.reference[i] - now[i]);
        x.reference[i] = now[i];
    }
}

// o += P V, half of the dims; P of the own tile from registers, of the other's from shared memory.
template <typename P>
__device__ inline void outputs(float (&o)[128], P p, int step, uint32_t values) {
    const uint64_t v = operand_at(values);
    wgmma_fence();
    #pragma unroll
    for (int i = 0; i < 4; i++) { wgmma_outputs(o, p + i * step, v + i * (16 * 128 >> 4)); }
    wgmma_commit();
}

// The end of a token: the two shares of the sum meet; the outputs are divided and stored.
template <int SIDE>
__device__ inline void finish(const ForwardArguments &f, unsigned char *shared, float (&o)[128],
                              Softmax &x, int t, int parity, int row) {
    float (*sums)[64] = (float (*)[64])(shared + V3_SUM) + 2 * parity;
    const int lane = threadIdx.x % 32;
    float inverse[2];
    #pragma unroll
    for (int i = 0; i < 2; i++) {
        x.sum[i] = quad_sum(x.sum[i]);
        if (lane % 4 == 0) { sums[SIDE][row + 8 * i] = x.sum[i]; }
    }
    pair_sync<TOKEN_DONE>();
    #pragma unroll
    for (int i = 0; i < 2; i++) {
        const float total = sums[0][row + 8 * i] + sums[1][row + 8 * i];
        inverse[i] = 1 / total;
        if (SIDE == 0 && lane % 4 == 0 && row + 8 * i < f.a.H) {
            f.lse[(size_t)t * f.a.H + row + 8 * i] = (x.reference[i] + log2f(total)) * LN2;
        }
    }
    act *at = f.out + ((size_t)t * f.a.H + row) * ATT_D + 256 * SIDE;
    #pragma unroll
    for (int j = 0; j < 8; j++) {
        store_fragments(at + 32 * j, o + 16 * j, inverse[0], inverse[1], f.a.H - row);
    }
}

__device__ inline float head_sink(const ForwardArguments &f, int row) {
    return row < f.a.H ? f.sink[row] * LOG2E : 0;
}

// The steps of one consumer. use[b]: the tiles that buffer b has held before.
template <int SIDE>
__device__ inline void consume(const ForwardArguments &f, unsigned char *shared) {
    const uint32_t base = shared_address(shared);
    const int lane = threadIdx.x % 32, row = threadIdx.x / 32 % 4 * 16 + lane / 4;
    float *reference = (float *)(shared + V3_REFERENCE), *mine = reference + 64 * SIDE;
    const float sink[2] = {head_sink(f, row), head_sink(f, row + 8)};
    const uint32_t values = base + V3_KV + SIDE * V3_HALF;
    const uint64_t others = operand_at(base + V3_P + (1 - SIDE) * BLOCK_BYTES);
    unsigned char *own = shared + V3_P + SIDE * BLOCK_BYTES;
    int use[2] = {0, 0}, window, next = block_token(f.a, 0);
    int count = next >= 0 ? attended_count(f.a, f.selected, next, &window) : 0;
    for (int i = 0, t; (t = block_token(f.a, i)) >= 0; i++) {
        const int tiles = (count + TILE - 1) / TILE, last = (tiles - 1 - SIDE) / 2 * 2 + SIDE;
        const int keys = count;
        float o[128], s[32];
        uint32_t p[16];
        Softmax x;
        #pragma unroll
        for (int j = 0; j < 128; j++) { o[j] = 0; }
        #pragma unroll
        for (int j = 0; j < 2; j++) {
            x.reference[j] = sink[j];
            x.sum[j] = SIDE == 0 && lane % 4 == 0 ? 1 : 0;
        }
        next = block_token(f.a, i + 1);                 // its count arrives during this token
        count = next >= 0 ? attended_count(f.a, f.selected, next, &window) : 0;
        if (tiles > SIDE) {
            barrier_wait(base + V3_Q_FULL, i & 1);
        } else if (lane == 0) {
            barrier_arrive(base + V3_Q_FREE);           // one tile: consumer 1 needs no Q
        }
        for (int tile = 0; tile < tiles; tile += 2) {
            const bool both = tile + 1 < tiles;
            if (SIDE == 0 || both) {
                scores(s, base, SIDE, use[SIDE]);
                wgmma_wait(s);
                if (tile + SIDE == last && lane == 0) { barrier_arrive(base + V3_Q_FREE); }
            }
            if (SIDE == 0) {
                const float before[2] = {x.reference[0], x.reference[1]};
                softmax(p, s, x, own, row, keys - tile * TILE);
                if (lane % 4 == 0) {
                    mine[row] = x.reference[0];
                    mine[row + 8] = x.reference[1];
                }
                proxy_fence();
                pair_arrive<P0_READY>();
                move_reference(o, before, x.reference);
                outputs(o, (const uint32_t *)p, 4, values);
            } else {
                pair_sync<P0_READY>();
                take_reference(o, x, reference, row);
                barrier_wait(base + V3_FULL + 8, use[0] & 1);
                proxy_fence();
                outputs(o, others, 2, values);
            }
            const float before[2] = {x.reference[0], x.reference[1]};
            if (SIDE == 1 && both) {
                softmax(p, s, x, own, row, keys - (tile + 1) * TILE);
                if (lane % 4 == 0) {
                    mine[row] = x.reference[0];
                    mine[row + 8] = x.reference[1];
                }
                proxy_fence();
            }
            wgmma_wait(o);
            if (lane == 0) { barrier_arrive(base + V3_FREE + SIDE * 8); }
            use[0]++;
            if (!both) { break; }
            if (SIDE == 0) {
                pair_sync<P1_READY>();
                take_reference(o, x, reference + 64, row);
                barrier_wait(base + V3_FULL + 16, use[1] & 1);
                proxy_fence();
                outputs(o, others, 2, values + TILE_BYTES);
            } else {
                pair_arrive<P1_READY>();
                move_reference(o, before, x.reference);
                outputs(o, (const uint32_t *)p, 4, values + TILE_BYTES);
            }
            wgmma_wait(o);
            if (lane == 0) { barrier_arrive(base + V3_FREE + (2 + SIDE) * 8); }
            use[1]++;
        }
        finish<SIDE>(f, shared, o, x, t, i & 1, row);
    }
}

__global__ __launch_bounds__(384, 1)
void attention_forward_wgmma_kernel(const __grid_constant__ ForwardArguments f) {
    extern __shared__ __align__(1024) unsigned char shared[];
    const uint32_t base = shared_address(shared);
    if (threadIdx.x == 0) {
        for (int i = 0; i < 4; i++) {
            barrier_init(base + V3_FULL + i * 8, 128);
            barrier_init(base + V3_FREE + i * 8, 4);
        }
        barrier_init(base + V3_Q_FULL, 128);
        barrier_init(base + V3_Q_FREE, 8);
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    __syncthreads();
    const int group = threadIdx.x / 128;
    if (group == 2) {
        registers_give<72>();
        produce(f, base);
    } else {
        registers_take<216>();
        if (group == 0) { consume<0>(f, shared); } else { consume<1>(f, shared); }
    }
}

static void attention_forward_v3(act *out, real *lse, const act *q, const act *kv,
                                 const act *entries, const float *sink, const int *selected,
                                 AttentionShape a) {
    gpuRequire(a.D == ATT_D && a.H <= ATT_H && a.H % 8 == 0);
    const int processors = multiprocessors();
    cudaCheck(cudaFuncSetAttribute(attention_forward_wgmma_kernel,
                                   cudaFuncAttributeMaxDynamicSharedMemorySize, V3_BYTES));
    const ForwardArguments f = { out, lse, q, kv, entries, sink, selected, a };
    const int blocks = a.T < processors ? a.T : processors;
    attention_forward_wgmma_kernel<<<blocks, 384, V3_BYTES, stream>>>(f);
    cudaCheck(cudaGetLastError());
}

// -------------------------------------------------------------------------------------------------
// Version 4: the copy engine, and less waiting
//
// What lies together (the queries, whole window tiles, entries) comes through the copy engine, in
// boxes of 32 rows x 64 columns; a tile of up to 32 keys takes half of them. Only tiles on the
// border between window and entries are gathered by cp.async. Q comes and goes in halves, its next
// rows between the halves of the first keys. P1 is handed over before the products with P0 are
// complete, and the products of both tiles follow each other without a wait, unless outputs must be
// rescaled in between.

// Version 4's shared memory is version 3's, with two barriers, for the halves of Q, where that has
// one.
enum { V4_Q_FULL = V3_Q_FULL, V4_Q_FREE = V4_Q_FULL + 2 * 8, V4_BYTES = V4_Q_FREE + 2 * 8 };

typedef struct {
    ForwardArguments f;
    CUtensorMap q, kv, entries;     // (T*H,D), (T,D), (P,D) in boxes of 32 rows x 64 columns
} TiledArguments;

// A producer warp's 32 arrivals, by one lane; one of them announces so many bytes of the copy
// engine.
__device__ inline void warp_expect(uint32_t at, int bytes) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0], 31;\n"
                 "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" :: "r"(at), "r"(bytes)
                 : "memory");
}

// Half a tile of up to 64 consecutive rows of a tensor; each producer warp has one of its blocks
// fetched. Rows 32 .. 63 keep what they hold if they are not needed.
__device__ inline void load_half(uint32_t tile, const CUtensorMap *map, uint32_t barrier, int half,
                                 int row, int rows) {
    if (threadIdx.x % 32 == 0) {
        const int block = half * 4 + threadIdx.x / 32 % 4;
        const uint32_t to = tile + block * BLOCK_BYTES;
        warp_expect(barrier, rows > 32 ? BLOCK_BYTES : BLOCK_BYTES / 2);
        tma_load(to, map, barrier, block * 64, row, 0);
        if (rows > 32) { tma_load(to + BLOCK_BYTES / 2, map, barrier, block * 64, row + 32, 0); }
    }
}

__device__ inline void produce_tiled(const TiledArguments &g, uint32_t base) {
    const ForwardArguments &f = g.f;
    const int lane = threadIdx.x % 32, mine = threadIdx.x / 32 % 4 * 16 + lane % 16;
    int use[2] = {0, 0};                                // fills of each buffer so far
    for (int i = 0, t; (t = block_token(f.a, i)) >= 0; i++) {
        const Keys keys = token_keys(f.a, f.selected, t);
        const int next = block_token(f.a, i + 1);
        const int tiles = (keys.count + TILE - 1) / TILE;
        for (int tile = 0; tile < tiles; tile++) {
            const int b = tile % 2, first = tile * TILE, end = min(first + TILE, keys.count);
            const bool in_window = end <= keys.window, together = in_window || first >= keys.window;
            const int start = in_window ? t - keys.window + 1 + first
                                        : keys.first_entry + first - keys.window;
            const act *row = together ? NULL : key_row(keys, f.a, f.kv, f.entries, f.selected,
                                                       first + mine);
            #pragma unroll
            for (int half = 0; half < 2; half++) {
                const uint32_t full = base + V3_FULL + (2 * b + half) * 8;
                if (tile == 0) {
                    barrier_wait(base + V4_Q_FREE + half * 8, ~i & 1);
                    load_half(base + V3_Q, &g.q, base + V4_Q_FULL + half * 8, half,
                              t * f.a.H, TILE);
                }
                barrier_wait(base + V3_FREE + (2 * b + half) * 8, ~(b ? use[1] : use[0]) & 1);
                if (together) {
                    load_half(base + V3_KV + b * TILE_BYTES, in_window ? &g.kv : &g.entries, full,
                              half, start, end - first);
                } else {
                    copy_half(base + V3_KV + b * TILE_BYTES, row, half);
                    barrier_arrive_copies(full);
                }
            }
            if (b) { use[1]++; } else { use[0]++; }
            if (tile == 0 && next >= 0 && threadIdx.x % 128 == 0) {
                asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;"
                             :: "l"(f.q + (size_t)next * f.a.H * ATT_D), "r"(f.a.H * ATT_D * 2)
                             : "memory");
            }
        }
    }
}

// s = Q K^T of the tile in that buffer. last: of this consumer with this Q, which is then free.
__device__ inline void scores_tiled(float (&s)[32], uint32_t base, int buffer, int use, int token,
                                    bool last) {
    const uint64_t q = operand_at(base + V3_Q);
    const uint64_t k = operand_at(base + V3_KV + buffer * TILE_BYTES);
    #pragma unroll
    for (int half = 0; half < 2; half++) {
        barrier_wait(base + V4_Q_FULL + half * 8, token & 1);
        barrier_wait(base + V3_FULL + (2 * buffer + half) * 8, use & 1);
        proxy_fence();
        wgmma_fence();
        #pragma unroll
        for (int i = 16 * half; i < 16 * half + 16; i++) {
            const int step = (i / 4 * BLOCK_BYTES + i % 4 * 32) >> 4;
            wgmma_m64n64k16(s, q + step, k + step, i > 0);
        }
        wgmma_commit();
    }
    wgmma_wait<1>();
    if (last && threadIdx.x % 32 == 0) { barrier_arrive(base + V4_Q_FREE); }
    wgmma_wait(s);
    if (last && threadIdx.x % 32 == 0) { barrier_arrive(base + V4_Q_FREE + 8); }
}

// The softmax of the own tile, and all of it that the other consumer needs.
template <int SIDE>
__device__ inline void write_softmax(uint32_t (&p)[16], float (&s)[32], Softmax &x,
                                     unsigned char *shared, int row, int left) {
    float *reference = (float *)(shared + V3_REFERENCE) + 64 * SIDE;
    softmax(p, s, x, shared + V3_P + SIDE * BLOCK_BYTES, row, left);
    if (threadIdx.x % 4 == 0) {
        reference[row] = x.reference[0];
        reference[row + 8] = x.reference[1];
    }
    proxy_fence();
}

// Consumer SIDE needs its half of the other's tile, filled for the use-th time.
template <int SIDE> __device__ inline void await_other(uint32_t base, int use) {
    barrier_wait(base + V3_FULL + (2 * (1 - SIDE) + SIDE) * 8, use & 1);
    proxy_fence();
}

// Consumer SIDE is done with its half of a buffer.
template <int SIDE> __device__ inline void free_half(uint32_t base, int buffer) {
    if (threadIdx.x % 32 == 0) { barrier_arrive(base + V3_FREE + (2 * buffer + SIDE) * 8); }
}

// One pair of tiles, or (both = false) the last one alone. left: keys in the even tile and after
// it. P1's products start before P0's end; P0 lasts, as the next scores need keys freed after it.
template <int SIDE>
__device__ inline void consume_pair(unsigned char *shared, float (&o)[128], Softmax &x,
                                    int (&use)[2], int token, int left, bool both, bool last,
                                    int row) {
    const uint32_t base = shared_address(shared), values = base + V3_KV + SIDE * V3_HALF;
    const float *reference = (const float *)(shared + V3_REFERENCE);
    const uint64_t others = operand_at(base + V3_P + (1 - SIDE) * BLOCK_BYTES);
    float s[32], before[2] = {x.reference[0], x.reference[1]};
    uint32_t p[16];
    if (SIDE == 0 || both) { scores_tiled(s, base, SIDE, use[SIDE], token, last); }
    if (SIDE == 0) {
        write_softmax<SIDE>(p, s, x, shared, row, left);
        pair_arrive<P0_READY>();
        move_reference(o, before, x.reference);
        outputs(o, (const uint32_t *)p, 4, values);
        if (both) {
            pair_sync<P1_READY>();
            take_reference(o, x, reference + 64, row);
            await_other<SIDE>(base, use[1]);
            outputs(o, others, 2, values + TILE_BYTES);
        }
    } else {
        pair_sync<P0_READY>();
        take_reference(o, x, reference, row);
        await_other<SIDE>(base, use[0]);
        outputs(o, others, 2, values);
        if (both) {
            before[0] = x.reference[0];
            before[1] = x.reference[1];
            write_softmax<SIDE>(p, s, x, shared, row, left - TILE);
            pair_arrive<P1_READY>();
            move_reference(o, before, x.reference);
            outputs(o, (const uint32_t *)p, 4, values + TILE_BYTES);
        }
    }
    if (both) {
        wgmma_wait<1>();
        free_half<SIDE>(base, 0);
    }
    wgmma_wait(o);
    free_half<SIDE>(base, both);
    use[0]++;
    use[1] += both;
}

template <int SIDE>
__device__ inline void consume_tiled(const ForwardArguments &f, unsigned char *shared) {
    const uint32_t base = shared_address(shared);
    const int lane = threadIdx.x % 32, row = threadIdx.x / 32 % 4 * 16 + lane / 4;
    const float sink[2] = {head_sink(f, row), head_sink(f, row + 8)};
    int use[2] = {0, 0}, window, next = block_token(f.a, 0);
    int count = next >= 0 ? attended_count(f.a, f.selected, next, &window) : 0;
    for (int i = 0, t; (t = block_token(f.a, i)) >= 0; i++) {
        const int keys = count, tiles = (count + TILE - 1) / TILE;
        float o[128];
        Softmax x;
        #pragma unroll
        for (int j = 0; j < 128; j++) { o[j] = 0; }
        #pragma unroll
        for (int j = 0; j < 2; j++) {
            x.reference[j] = sink[j];
            x.sum[j] = SIDE == 0 && lane % 4 == 0 ? 1 : 0;
        }
        next = block_token(f.a, i + 1);                 // its count arrives during this token
        count = next >= 0 ? attended_count(f.a, f.selected, next, &window) : 0;
        if (tiles <= SIDE && lane == 0) {               // one tile: consumer 1 needs no Q
            barrier_arrive(base + V4_Q_FREE);
            barrier_arrive(base + V4_Q_FREE + 8);
        }
        for (int tile = 0; tile < tiles; tile += 2) {
            consume_pair<SIDE>(shared, o, x, use, i, keys - tile * TILE, tile + 1 < tiles,
                               tile + 2 + SIDE >= tiles, row);
        }
        finish<SIDE>(f, shared, o, x, t, i & 1, row);
    }
}

__global__ __launch_bounds__(384, 1)
void attention_forward_tiled_kernel(const __grid_constant__ TiledArguments g) {
    extern __shared__ __align__(1024) unsigned char shared[];
    const uint32_t base = shared_address(shared);
    // P = 0 multiplies rows that no copy has written yet: they must be numbers.
    for (int i = threadIdx.x; i < 2 * TILE_BYTES / 16; i += blockDim.x) {
        ((uint4 *)(shared + V3_KV))[i] = make_uint4(0, 0, 0, 0);
    }
    proxy_fence();
    if (threadIdx.x == 0) {
        for (int i = 0; i < 4; i++) {
            barrier_init(base + V3_FULL + i * 8, 128);
            barrier_init(base + V3_FREE + i * 8, 4);
        }
        for (int i = 0; i < 2; i++) {
            barrier_init(base + V4_Q_FULL + i * 8, 128);
            barrier_init(base + V4_Q_FREE + i * 8, 8);
        }
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    __syncthreads();
    const int group = threadIdx.x / 128;
    if (group == 2) {
        registers_give<72>();
        produce_tiled(g, base);
    } else {
        registers_take<216>();
        if (group == 0) { consume_tiled<0>(g.f, shared); } else { consume_tiled<1>(g.f, shared); }
    }
}

static void attention_forward_tiled(act *out, real *lse, const act *q, const act *kv,
                                    const act *entries, const float *sink, const int *selected,
                                    AttentionShape a) {
    gpuRequire(a.D == ATT_D && a.H <= ATT_H && a.H % 8 == 0);
    const int processors = multiprocessors();
    cudaCheck(cudaFuncSetAttribute(attention_forward_tiled_kernel,
                                   cudaFuncAttributeMaxDynamicSharedMemorySize, V4_BYTES));
    const bool some = a.P > 0;                          // entries; else any valid map will do
    const TiledArguments g = {
        { out, lse, q, kv, entries, sink, selected, a },
        rows_map(q, a.T * a.H, 32), rows_map(kv, a.T, 32),
        rows_map(some ? entries : kv, some ? a.P : a.T, 32),
    };
    const int blocks = a.T < processors ? a.T : processors;
    attention_forward_tiled_kernel<<<blocks, 384, V4_BYTES, stream>>>(g);
    cudaCheck(cudaGetLastError());
}
} // namespace forward

extern "C" void attention_forward_gpu(act *out, real *lse, const act *q, const act *kv,
                                      const act *entries, const float *sink, const int *selected,
                                      AttentionShape a) {
    if (a.T == 0) { return; }
    if (a.D != forward::ATT_D || a.H > forward::ATT_H || a.H % 8) {
        attention_forward_plain(out, lse, q, kv, entries, sink, selected, a);
    } else if (selected) {
        forward::attention_forward_v3(out, lse, q, kv, entries, sink, selected, a);
    } else {
        forward::attention_forward_tiled(out, lse, q, kv, entries, sink, selected, a);
    }
}

// delta = <dout, out> per query and head.
template <int NV>
__global__ void attention_delta_kernel(real *delta, const act *dout, const act *out, size_t rows) {
    const int lane = threadIdx.x % 32;
    const size_t row = (size_t)blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32;
    if (row >= rows) { return; }
    float a[NV], b[NV], dot = 0;
    load_row<NV>(a, dout + row * NV * 32 + lane * NV);
    load_row<NV>(b, out + row * NV * 32 + lane * NV);
    #pragma unroll
    for (int d = 0; d < NV; d++) { dot += a[d] * b[d]; }
    dot = warp_sum(dot);
    if (lane == 0) { delta[row] = dot; }
}

extern "C" void attention_delta_gpu(real *delta, const act *dout, const act *out, int T, int H,
                                    int D) {
    const size_t rows = (size_t)T * H;
    if (rows == 0) { return; }
    if (D == 512) {
        attention_delta_kernel<16><<<blocks_for(rows, 8), 256, 0, stream>>>(delta, dout, out, rows);
    } else {
        gpuRequire(D == 128);
        attention_delta_kernel<4><<<blocks_for(rows, 8), 256, 0, stream>>>(delta, dout, out, rows);
    }
    cudaCheck(cudaGetLastError());
}

template <int NV>
__global__ void attention_backward_query_kernel(act *dq, const act *dout, const real *delta,
                                                const real *lse, const act *q, const act *kv,
                                                const act *entries, const int *selected,
                                                AttentionShape a) {
    const int lane = threadIdx.x % 32, first = lane * NV;
    const size_t row = (size_t)blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32;
    if (row >= (size_t)a.T * a.H) { return; }
    const int t = (int)(row / a.H);
    const float scale = rsqrtf((float)a.D);
    int window;
    const int n = attended_count(a, selected, t, &window);
    float x[NV], d[NV], sum[NV] = {0}, k[NV];
    load_row<NV>(x, q + row * a.D + first);
    load_row<NV>(d, dout + row * a.D + first);
    for (int i = 0; i < n; i++) {
        load_row<NV>(k, attended_key(a, kv, entries, selected, t, window, i) + first);
        float l = 0, dp = 0;
        #pragma unroll
        for (int j = 0; j < NV; j++) { l += x[j] * k[j]; dp += d[j] * k[j]; }
        const float p = expf(scale * warp_sum(l) - lse[row]);
        const float dl = scale * p * (warp_sum(dp) - delta[row]);
        #pragma unroll
        for (int j = 0; j < NV; j++) { sum[j] += dl * k[j]; }
    }
    store_row<NV>(dq + row * a.D + first, sum);
}

static void attention_backward_query_plain(act *dq, const act *dout, const real *delta,
                                           const real *lse, const act *q, const act *kv,
                                           const act *entries, const int *selected,
                                           AttentionShape a) {
    if (a.T == 0) { return; }
    const int grid = blocks_for((size_t)a.T * a.H, 8);
    if (a.D == 512) {
        attention_backward_query_kernel<16><<<grid, 256, 0, stream>>>(dq, dout, delta, lse, q, kv,
                                                                      entries, selected, a);
    } else {
        gpuRequire(a.D == 128);
        attention_backward_query_kernel<4><<<grid, 256, 0, stream>>>(dq, dout, delta, lse, q, kv,
                                                                     entries, selected, a);
    }
    cudaCheck(cudaGetLastError());
}

// One block of 16 warps per key: warp w takes every 16th (query, head), and the block adds the
// warps' sums in order.
enum { KEY_WARPS = 16 };
template <int NV>
__global__ void attention_backward_key_kernel(real *dkv, real *dentries, const act *dout,
                                              const real *delta, const real *lse, const act *q,
                                              const act *kv, const act *entries,
                                              const int *selected, AttentionShape a) {
    __shared__ float shared[NV * 32];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, first = lane * NV;
    const int e = (int)blockIdx.x - a.T;
    const float scale = rsqrtf((float)a.D);
    float key[NV], x[NV], d[NV], sum[NV] = {0};
    load_row<NV>(key, (e < 0 ? kv + (size_t)blockIdx.x * a.D : entries + (size_t)e * a.D) + first);
    const int from = e < 0 ? (int)blockIdx.x : a.token[e] + a.ratio - 1;
    const int end = e < 0 ? min(a.end[from], from + a.W) : a.end[from];
    for (int t = from; t < end; t++) {
        if (e >= 0 && selected) {
            const int *list = selected + (size_t)t * a.topk;
            int low = 0, high = a.topk;
            while (low < high) {
                const int middle = (low + high) / 2;
                const int before = list[middle] >= 0 && list[middle] < e;
                if (before) { low = middle + 1; } else { high = middle; }
            }
            if (low >= a.topk || list[low] != e) { continue; }
        }
        for (int h = warp; h < a.H; h += KEY_WARPS) {
            const size_t row = (size_t)t * a.H + h;
            load_row<NV>(x, q + row * a.D + first);
            load_row<NV>(d, dout + row * a.D + first);
            float l = 0, dp = 0;
            #pragma unroll
            for (int j = 0; j < NV; j++) { l += x[j] * key[j]; dp += d[j] * key[j]; }
            const float p = expf(scale * warp_sum(l) - lse[row]);
            const float dl = scale * p * (warp_sum(dp) - delta[row]);
            #pragma unroll
            for (int j = 0; j < NV; j++) { sum[j] += dl * x[j] + p * d[j]; }
        }
    }
    for (int w = 0; w < KEY_WARPS; w++) {
        if (w == warp) {
            #pragma unroll
            for (int j = 0; j < NV; j++) {
                shared[first + j] = (w ? shared[first + j] : 0) + sum[j];
            }
        }
        __syncthreads();
    }
    float *dkey = e < 0 ? dkv + (size_t)blockIdx.x * a.D : dentries + (size_t)e * a.D;
    for (int i = threadIdx.x; i < a.D; i += blockDim.x) { dkey[i] = shared[i]; }
}

static void attention_backward_key_plain(real *dkv, real *dentries, const act *dout,
                                         const real *delta, const real *lse, const act *q,
                                         const act *kv, const act *entries, const int *selected,
                                         AttentionShape a) {
    if (a.T == 0) { return; }
    if (a.D == 512) {
        attention_backward_key_kernel<16><<<a.T + a.P, KEY_WARPS * 32, 0, stream>>>(
            dkv, dentries, dout, delta, lse, q, kv, entries, selected, a);
    } else {
        gpuRequire(a.D == 128);
        attention_backward_key_kernel<4><<<a.T + a.P, KEY_WARPS * 32, 0, stream>>>(
            dkv, dentries, dout, delta, lse, q, kv, entries, selected, a);
    }
    cudaCheck(cudaGetLastError());
}

// -------------------------------------------------------------------------------------------------
// 9.2 Attention backward on tensor cores: 64 heads of 512 dims (dev/cuda/attention_backward.cu)
//
// A tile is 64 rows of 512 dims in shared memory, as 8 chunks of 64 dims. A chunk is 64 rows of 128
// bytes, 8 KB, whose 16-byte pieces are permuted within each row (piece ^ row % 8, the hardware's
// 128-byte swizzle), so that both ways to read it are free of bank conflicts: rows as M or N and
// dims as the product's inner index (K-major), or dims as N and rows as the inner index (MN-major).
// One layout therefore serves S = Q K^T, dP = dO K^T and dQ = dS K, dK = dS^T Q, dV = P^T dO.

namespace attention_backward {

enum {
    AB_HEADS = 64, AB_DIM = 512,        // what these kernels are written for
    AB_KEYS = 64,                       // keys of a tile
    AB_CHUNKS = 8, AB_CHUNK = 8192,     // of a tile, in bytes
    AB_TILE = AB_CHUNKS * AB_CHUNK,
    AB_EXCHANGE = 32768,                // two buffers in turn: warpgroups swap halves
};

// The named barrier of the two consumer warpgroups.
__device__ inline void pair_barrier(void) { asm volatile("bar.sync 1, 256;" ::: "memory"); }

// The layout of an accumulator: thread 32 w + 4 g + i has, of each block j of 8 columns, row
// 16 w + g in x[4 j], x[4 j + 1] and row 16 w + g + 8 in x[4 j + 2], x[4 j + 3], columns 8 j + 2 i
// and the next.
// An accumulator's half, rounded to bf16, is the left operand of the next product as it stands: two
// blocks of 8 columns are 16 of its inner index.
__device__ inline void pack_half(uint32_t (&out)[8], const float (&x)[16]) {
    #pragma unroll
    for (int i = 0; i < 8; i++) { out[i] = pack_bf16(x[2 * i], x[2 * i + 1]); }
}

// Hands registers to the same thread of the other warpgroup: send, a barrier, then receive.
template <int N> __device__ inline void send(const uint32_t (&x)[N], float4 *exchange, int at) {
    #pragma unroll
    for (int i = 0; i < N / 4; i++) {
        ((uint4 *)exchange)[at + i * 128] = make_uint4(x[4 * i], x[4 * i + 1], x[4 * i + 2],
                                                       x[4 * i + 3]);
    }
}
template <int N> __device__ inline void receive(uint32_t (&x)[N], const float4 *exchange, int at) {
    #pragma unroll
    for (int i = 0; i < N / 4; i++) {
        const uint4 y = ((const uint4 *)exchange)[at + i * 128];
        x[4 * i] = y.x; x[4 * i + 1] = y.y; x[4 * i + 2] = y.z; x[4 * i + 3] = y.w;
    }
}

// The work of the key kernel, cut so that every part fills the machine evenly. A tile of 64 entries
// is cut into segments of the token axis, a tile of 64 window keys into pieces of its own tokens.
// Each part has a slot of 64 x 512 fp32 sums; a last kernel adds the slots of a tile in order.
typedef struct {
    int entry_tiles, segments, segment;     // tiles, parts of each, tokens of a part
    int window_tiles, pieces, piece;
} KeyPlan;

static inline KeyPlan key_plan(const AttentionShape &a) {
    KeyPlan p;
    p.window_tiles = blocks_for(a.T, AB_KEYS);
    p.pieces = 768 / p.window_tiles;
    p.pieces = p.pieces > 6 ? 6 : p.pieces < 1 ? 1 : p.pieces;
    p.piece = blocks_for(AB_KEYS + a.W - 1, p.pieces);
    p.entry_tiles = a.ratio ? blocks_for(a.P, AB_KEYS) : 0;
    p.segment = blocks_for((size_t)a.T * p.entry_tiles, 2048);
    p.segment = p.segment < 64 ? 64 : p.segment;
    p.segments = p.entry_tiles ? blocks_for(a.T, p.segment) : 0;
    return p;
}

typedef struct {
    int entry;                  // 1: entries, 0: window keys
    int tile, first, end;       // keys first .. end-1
    int from, to;               // tokens from .. to-1 that may see them
} KeyItem;

// A whole tile.
__device__ inline KeyItem key_tile(const AttentionShape &a, int entry, int tile) {
    KeyItem k;
    k.entry = entry;
    k.tile = tile;
    k.first = tile * AB_KEYS;
    k.end = min(k.first + AB_KEYS, entry ? a.P : a.T);
    k.from = entry ? a.token[k.first] + a.ratio - 1 : k.first;
    k.to = entry ? a.end[a.token[k.end - 1]] : min(a.T, k.end - 1 + a.W);
    return k;
}

// The part of a tile that has this slot: entries first, one segment of all tiles after the other,
// then the window's tiles, piece by piece. It may be empty (from >= to).
__device__ inline KeyItem key_item(const KeyPlan &p, const AttentionShape &a, int slot) {
    const int window = slot - p.entry_tiles * p.segments;
    KeyItem k;
    if (window < 0) {
        const int segment = slot / p.entry_tiles;
        k = key_tile(a, 1, slot % p.entry_tiles);
        k.from = max(k.from, segment * p.segment);
        k.to = min(k.to, (segment + 1) * p.segment);
    } else {
        k = key_tile(a, 0, window / p.pieces);
        k.from += window % p.pieces * p.piece;
        k.to = min(k.to, k.from + p.piece);
    }
    return k;
}

// Bit r: token t attends to key first + r. masks: those of selected, (T,entry_tiles), or NULL.
__device__ inline uint64_t key_mask(const KeyItem &k, const KeyPlan &p, const AttentionShape &a,
                                    const uint64_t *masks, int t) {
    int low, high;
    if (k.entry) {
        low = a.first_entry[t];
        high = low + (a.position[t] + 1) / a.ratio;
    } else {
        low = t - min(a.position[t], a.W - 1);
        high = t + 1;
    }
    low = max(low, k.first) - k.first;
    high = min(high, k.end) - k.first;
    if (low >= high) { return 0; }
    uint64_t mask = ~0ull >> (64 - (high - low)) << low;
    if (k.entry && masks) { mask &= masks[(size_t)t * p.entry_tiles + k.tile]; }
    return mask;
}

// The next token from t on that sees a key of the tile, and its mask; k.to if there is none.
__device__ inline int next_token(uint64_t *mask, const KeyItem &k, const KeyPlan &p,
                                 const AttentionShape &a, const uint64_t *masks, int t) {
    for (; t < k.to; t++) {
        *mask = key_mask(k, p, a, masks, t);
        if (*mask) { return t; }
    }
    return k.to;
}

// masks (T,tiles) of selected (T,topk): bit e % 64 of word e / 64. One block per token.
__global__ void attention_masks_kernel(uint64_t *masks, const int *selected, int tiles, int topk) {
    extern __shared__ unsigned int words[];
    for (int i = threadIdx.x; i < 2 * tiles; i += blockDim.x) { words[i] = 0; }
    __syncthreads();
    const int *list = selected + (size_t)blockIdx.x * topk;
    for (int i = threadIdx.x; i < topk; i += blockDim.x) {
        if (list[i] >= 0) { atomicOr(words + list[i] / 32, 1u << list[i] % 32); }
    }
    __syncthreads();
    unsigned int *out = (unsigned int *)(masks + (size_t)blockIdx.x * tiles);
    for (int i = threadIdx.x; i < 2 * tiles; i += blockDim.x) { out[i] = words[i]; }
}

// dkv (T,D) and dentries (P,D) = the sums of their tiles' parts, in order. One block per row.
__global__ void attention_key_sum_kernel(real *dkv, real *dentries, const float *part, KeyPlan p,
                                         AttentionShape a) {
    const int e = (int)blockIdx.x - a.T, key = e < 0 ? (int)blockIdx.x : e;
    const KeyItem k = key_tile(a, e >= 0, key / AB_KEYS);
    const int first = e < 0 ? 0 : k.from / p.segment;
    const int end = e < 0 ? (k.to - k.from + p.piece - 1) / p.piece : (k.to - 1) / p.segment + 1;
    const int slot = e < 0 ? p.entry_tiles * p.segments + k.tile * p.pieces : k.tile;
    const int stride = e < 0 ? 1 : p.entry_tiles;
    float4 sum = make_float4(0, 0, 0, 0);
    #pragma unroll 4
    for (int i = first; i < end; i++) {
        const size_t row = (size_t)(slot + i * stride) * AB_KEYS + key % AB_KEYS;
        const float4 x = ((const float4 *)(part + row * AB_DIM))[threadIdx.x];
        sum.x += x.x; sum.y += x.y; sum.z += x.z; sum.w += x.w;
    }
    real *out = e < 0 ? dkv + (size_t)key * AB_DIM : dentries + (size_t)key * AB_DIM;
    ((float4 *)out)[threadIdx.x] = sum;
}

// p = exp(scale s - lse) and dl = scale p (dp - delta) of one element, 0 and 0 if it is masked. The
// caller has turned lse into -log2(e) lse, delta into -scale delta.
__device__ inline void softmax_backward(float *p, float *dl, float s, float dp, float lse,
                                        float delta, bool valid) {
    const float scale = 0.04419417382f;         // 1 / sqrt(AB_DIM)
    const float x = valid ? fmaf(s, scale * (float)M_LOG2E, lse) : -INFINITY;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(*p) : "f"(x));
    *dl = *p * fmaf(dp, scale, delta);
}

// The kernels: a third warpgroup copies, chunk by chunk, what the other two will read next; each
// of these has scores and their gradients of the same heads
//
// A slot of shared memory holds one chunk (64 dims) of Q and dO. Two barriers go with it: `full`
// says that the copies have arrived, `empty` that the last product on it is done: its warpgroup's 4
// warps arrive, after both met. Accumulating products finish one half of their chunks first, so
// that these are filled for the next step while the tensor cores still work on the others.
//   key kernel: 128 KB of Q and dO per (token, tile of 64 keys), 4 products = 16.8 MFLOP
//   query kernel: 64 KB of keys per (token, 64 keys), 3 products = 12.6 MFLOP; a block stays for
//   many tokens, so that the next token's Q and dO come while the last product runs.
// Q and dO are interleaved in a slot such that ONE product of 64 rows gives 32 heads of S and the
// same 32 heads of dP.

enum {
    AB_SLOT = 2 * AB_CHUNK,
    AB_THREADS = 384,                                       // two warpgroups compute, one copies
    AB_BARRIERS = 3 * AB_TILE + AB_EXCHANGE,                // where they lie
    AB_SHARED = AB_BARRIERS + 512 + 1024,                 // the tiles want multiples of 1,024
};

// d (64,128 of 256, h: which half) += a b over 16 rows of b: a in registers, b MN-major, two chunks
// wide.
__device__ inline void wgmma_quarter(float (&d)[4][32], int h, const uint32_t *a, uint64_t b) {
    float (&d0)[32] = d[2 * h], (&d1)[32] = d[2 * h + 1];
    asm volatile("wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 "
        "{" NUMBERS_64 "}, {%64,%65,%66,%67}, %68, 1, 1, 1, 1;"
        : SUMS_32(d0, 0), SUMS_32(d1, 0)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}
// Both halves of d += P^T dO + dS^T Q over 32 heads, two chunks of a key kernel's slots.
__device__ inline void add_heads(float (&d)[4][32], int h, const uint32_t (&p)[8],
                                 const uint32_t (&dl)[8], uint32_t at) {
    #pragma unroll
    for (int k = 0; k < 2; k++) {
        wgmma_quarter(d, h, p + 4 * k, operand_at(at + 4096 + k * 2048, AB_SLOT));
        wgmma_quarter(d, h, dl + 4 * k, operand_at(at + k * 2048, AB_SLOT));
    }
}

// Waits for the two groups of products on own chunks, and says for each that its chunks are free.
__device__ inline void free_chunks(uint32_t empty, int lane) {
    wgmma_wait<1>();
    if (lane == 0) { barrier_arrive(empty); barrier_arrive(empty + 8); }
    wgmma_wait<0>();
    if (lane == 0) { barrier_arrive(empty + 16); barrier_arrive(empty + 24); }
}

// The order in which chunks are freed, filled and first used: both warpgroups' first, and so on.
__device__ inline int chunk_at(int i) { return i % 2 * 4 + i / 2; }

// The key kernel's slot, 16 KB: Q of heads 0..31, dO of heads 0..31, Q of 32..63, dO of 32..63. As
// rows of the right operand, 64 of them are S^T and dP^T of a warpgroup's 32 heads.
__global__ void __launch_bounds__(AB_THREADS, 1)
attention_backward_key_wgmma_kernel(float *part, const __grid_constant__ CUtensorMap q_map,
                                const __grid_constant__ CUtensorMap dout_map,
                                const __grid_constant__ CUtensorMap key_map,
                                const __grid_constant__ CUtensorMap entry_map,
                                const real *delta, const real *lse, const uint64_t *masks,
                                KeyPlan plan, AttentionShape a) {
    extern __shared__ unsigned char raw[];
    unsigned char *base = (unsigned char *)(((uintptr_t)raw + 1023) / 1024 * 1024);
    const uint32_t K = shared_address(base), slots = K + AB_TILE;
    const uint32_t full = K + AB_BARRIERS, empty = full + 8 * AB_CHUNKS;
    const uint32_t key_full = empty + 8 * AB_CHUNKS;
    float4 *exchange = (float4 *)(base + 3 * AB_TILE);
    const KeyItem item = key_item(plan, a, blockIdx.x);
    if (item.from >= item.to) { return; }
    if (threadIdx.x == 0) {
        for (int c = 0; c < AB_CHUNKS; c++) {
            barrier_init(full + 8 * c, 1);
            barrier_init(empty + 8 * c, 4);
        }
        barrier_init(key_full, 1);
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    __syncthreads();
    const int group = threadIdx.x / 128, thread = threadIdx.x % 128;
    uint64_t mask = 0;

    if (group == 2) {
        registers_give<40>();
        if (thread != 0) { return; }
        barrier_expect(key_full, AB_TILE);
        for (int c = 0; c < AB_CHUNKS; c++) {
            tma_load(K + c * AB_CHUNK, item.entry ? &entry_map : &key_map, key_full, c * 64,
                     item.first, 0);
        }
        int phase = 0;
        for (int t = next_token(&mask, item, plan, a, masks, item.from); t < item.to;
             t = next_token(&mask, item, plan, a, masks, t + 1), phase ^= 1) {
            for (int i = 0; i < AB_CHUNKS; i++) {
                const int c = chunk_at(i);
                const uint32_t slot = slots + c * AB_SLOT, arrived = full + 8 * c;
                barrier_wait(empty + 8 * c, phase ^ 1);
                barrier_expect(arrived, AB_SLOT);
                for (int half = 0; half < 2; half++) {
                    const int head = t * AB_HEADS + 32 * half;
                    tma_load(slot + 8192 * half, &q_map, arrived, c * 64, head, 0);
                    tma_load(slot + 8192 * half + 4096, &dout_map, arrived, c * 64, head, 0);
                }
            }
        }
        return;
    }

    registers_take<232>();
    const int warp = thread / 32, lane = thread % 32, row = 16 * warp + lane / 4;
    const float scale = rsqrtf((float)AB_DIM);
    float sum[4][32] = {{0}};
    barrier_wait(key_full, 0);
    int phase = 0;
    for (int t = next_token(&mask, item, plan, a, masks, item.from); t < item.to; phase ^= 1) {
        // x = K [Q ; dO]^T: S^T (keys,heads) in x[0..15], dP^T in x[16..31], of own 32 heads.
        float x[32], s[16], dp[16];
        float2 l[4], d[4];
        uint32_t p[2][8], dl[2][8];
        keep_order(x);
        #pragma unroll
        for (int i = 0; i < AB_CHUNKS; i++) {
            const int c = chunk_at(i);
            barrier_wait(full + 8 * c, phase);
            wgmma_fence();
            #pragma unroll
            for (int k = 0; k < 4; k++) {
                wgmma_m64n64k16(x, operand_at(K + c * AB_CHUNK + k * 32),
                           operand_at(slots + c * AB_SLOT + group * 8192 + k * 32), i + k > 0);
            }
        }
        wgmma_commit();
        // Meanwhile: this token's numbers, and which token is next.
        const size_t head = (size_t)t * AB_HEADS + 32 * group + 2 * (lane % 4);
        #pragma unroll
        for (int j = 0; j < 4; j++) {
            l[j] = *(const float2 *)(lse + head + 8 * j);
            d[j] = *(const float2 *)(delta + head + 8 * j);
        }
        const bool valid0 = mask >> row & 1, valid1 = mask >> (row + 8) & 1;
        t = next_token(&mask, item, plan, a, masks, t + 1);
        wgmma_wait<0>();
        keep_order(x);
        #pragma unroll
        for (int j = 0; j < 16; j++) {
            const float lse_j = -(float)M_LOG2E * (j % 2 ? l[j / 4].y : l[j / 4].x);
            const float delta_j = -scale * (j % 2 ? d[j / 4].y : d[j / 4].x);
            softmax_backward(&s[j], &dp[j], x[j], x[j + 16], lse_j, delta_j,
                             j & 2 ? valid1 : valid0);
        }
        // Each warpgroup reads what the other wrote. The buffers take turns: who writes one again
        // has passed the barrier in between, and so has who read it.
        float4 *swap = exchange + phase * 1024;
        pack_half(p[0], s);
        pack_half(dl[0], dp);
        send(p[0], swap, group * 512 + thread);
        send(dl[0], swap, group * 512 + 256 + thread);

        // dK (keys,dims) += P^T dO + dS^T Q, for own 4 chunks, two by two; own heads first.
        const uint32_t chunks = slots + group * 4 * AB_SLOT;
        const uint32_t own = chunks + group * 8192, other = chunks + (1 - group) * 8192;
        keep_order(sum); keep_order(p[0]); keep_order(dl[0]);
        wgmma_fence();
        add_heads(sum, 0, p[0], dl[0], own);
        pair_barrier();
        receive(p[1], swap, (1 - group) * 512 + thread);
        receive(dl[1], swap, (1 - group) * 512 + 256 + thread);
        keep_order(p[1]); keep_order(dl[1]);
        wgmma_fence();
        add_heads(sum, 0, p[1], dl[1], other);
        wgmma_commit();
        add_heads(sum, 1, p[0], dl[0], own + 2 * AB_SLOT);
        add_heads(sum, 1, p[1], dl[1], other + 2 * AB_SLOT);
        wgmma_commit();
        free_chunks(empty + 32 * group, lane);
        keep_order(sum);
    }
    float *out = part + ((size_t)blockIdx.x * AB_KEYS + row) * AB_DIM + group * 256
               + 2 * (lane % 4);
    #pragma unroll
    for (int j = 0; j < 32; j++) {
        const float *y = sum[j / 8] + j % 8 * 4;
        *(float2 *)(out + 8 * j) = make_float2(y[0], y[1]);
        *(float2 *)(out + 8 * AB_DIM + 8 * j) = make_float2(y[2], y[3]);
    }
}

// Copies for the query kernel. Q and dO of each token by the bulk engine, in groups of 8 heads; key
// rows, which may lie anywhere, 16 bytes at a time: this thread has piece thread % 8 of every 16th
// row of each chunk.
__device__ inline void query_copies(uint32_t slots, uint32_t K, uint32_t full, uint32_t empty,
                                    uint32_t q_full, uint32_t q_empty, const CUtensorMap *q_map,
                                    const CUtensorMap *dout_map, const act *kv, const act *entries,
                                    const int *selected, const AttentionShape &a, int thread) {
    const int piece = thread % 8, first_row = thread / 8;
    const uint32_t place = K + first_row * 128 + ((piece ^ first_row) % 8) * 16;
    int step = 0, phase = 0;
    for (int t = a.T - 1 - (int)blockIdx.x; t >= 0; t -= gridDim.x, step ^= 1) {
        int window;
        const int n = attended_count(a, selected, t, &window);
        if (thread < 32) {
            barrier_wait(q_empty, step ^ 1);
            if (thread < AB_CHUNKS) { barrier_expect(q_full + 8 * thread, AB_SLOT); }
            __syncwarp();
            for (int i = thread; i < 16 * AB_CHUNKS; i += 32) {     // groups of 8 heads of Q or dO
                const int c = chunk_at(i / 16), part = i % 16;
                tma_load(slots + c * AB_SLOT + part * 1024, part % 2 ? dout_map : q_map,
                         q_full + 8 * c, c * 64, t * AB_HEADS + part / 2 * 8, 0);
            }
        }
        for (int first = 0; first < n; first += AB_KEYS, phase ^= 1) {
            const act *key[4];
            bool valid[4];
            #pragma unroll
            for (int r = 0; r < 4; r++) {
                const int i = first + first_row + 16 * r;
                valid[r] = i < n;
                key[r] = attended_key(a, kv, entries, selected, t, window, valid[r] ? i : 0)
                       + piece * 8;
            }
            for (int i = 0; i < AB_CHUNKS; i++) {
                const int c = chunk_at(i);
                barrier_wait(empty + 8 * c, phase ^ 1);
                #pragma unroll
                for (int r = 0; r < 4; r++) {
                    copy16(place + c * AB_CHUNK + r * 2048, key[r] + c * 64, valid[r]);
                }
                barrier_arrive_copies(full + 8 * c);
            }
        }
    }
}

// The query kernel's slot, 16 KB: 8 heads of Q, the same 8 of dO, the next 8 of Q, and so on. As
// rows of the left operand, a thread's row g is a head's S and its row g + 8 that head's dP.
__global__ void __launch_bounds__(AB_THREADS, 1)
attention_backward_query_wgmma_kernel(act *dq, const __grid_constant__ CUtensorMap q_map,
                                  const __grid_constant__ CUtensorMap dout_map, const real *delta,
                                  const real *lse, const act *kv, const act *entries,
                                  const int *selected, AttentionShape a) {
    extern __shared__ unsigned char raw[];
    unsigned char *base = (unsigned char *)(((uintptr_t)raw + 1023) / 1024 * 1024);
    const uint32_t K = shared_address(base), slots = K + AB_TILE;
    const uint32_t full = K + AB_BARRIERS, empty = full + 8 * AB_CHUNKS;
    const uint32_t q_full = empty + 8 * AB_CHUNKS, q_empty = q_full + 8 * AB_CHUNKS;
    float4 *exchange = (float4 *)(base + 3 * AB_TILE);
    if (threadIdx.x == 0) {
        for (int c = 0; c < AB_CHUNKS; c++) {
            barrier_init(full + 8 * c, 128);
            barrier_init(empty + 8 * c, 4);
            barrier_init(q_full + 8 * c, 1);
        }
        barrier_init(q_empty, 8);
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    __syncthreads();
    const int group = threadIdx.x / 128, thread = threadIdx.x % 128;
    if (group == 2) {
        registers_give<56>();
        query_copies(slots, K, full, empty, q_full, q_empty, &q_map, &dout_map, kv, entries,
                     selected, a, thread);
        return;
    }

    registers_take<224>();
    const int warp = thread / 32, lane = thread % 32, row = 8 * warp + lane / 4;
    const float scale = rsqrtf((float)AB_DIM);
    int step = 0, phase = 0;
    for (int t = a.T - 1 - (int)blockIdx.x; t >= 0; t -= gridDim.x, step ^= 1) {
        const size_t head = (size_t)t * AB_HEADS + row;     // and head + 32
        int window;
        const int n = attended_count(a, selected, t, &window);
        const float lse_h = -(float)M_LOG2E * lse[head + 32 * group];
        const float delta_h = -scale * delta[head + 32 * group];
        float sum[4][32] = {{0}};
        for (int first = 0; first < n; first += AB_KEYS, phase ^= 1) {
            // x = [Q ; dO] K^T (heads,keys): of block j, x[4 j], x[4 j + 1] are S of head `row` of
            // own 32, the next two its dP.
            float x[32];
            uint32_t own[8], other[8], dl[16];
            keep_order(x);
            #pragma unroll
            for (int i = 0; i < AB_CHUNKS; i++) {
                const int c = chunk_at(i);
                if (first == 0) { barrier_wait(q_full + 8 * c, step); }
                barrier_wait(full + 8 * c, phase);
                proxy_fence();                      // copy16's writes -> the tensor cores' reads
                wgmma_fence();
                #pragma unroll
                for (int k = 0; k < 4; k++) {
                    wgmma_m64n64k16(x, operand_at(slots + c * AB_SLOT + group * 8192 + k * 32),
                               operand_at(K + c * AB_CHUNK + k * 32), i + k > 0);
                }
            }
            wgmma_commit();
            wgmma_wait<0>();
            keep_order(x);
            if (first + AB_KEYS >= n && lane == 0) { barrier_arrive(q_empty); }
            const int left = n - first - 2 * (lane % 4);
            #pragma unroll
            for (int j = 0; j < 8; j++) {
                float p, dl0, dl1;
                softmax_backward(&p, &dl0, x[4 * j], x[4 * j + 2], lse_h, delta_h, 8 * j < left);
                softmax_backward(&p, &dl1, x[4 * j + 1], x[4 * j + 3], lse_h, delta_h,
                                 8 * j + 1 < left);
                own[j] = pack_bf16(dl0, dl1);
            }
            // As left operand of the next product, rows g are of the first 32 heads, rows g + 8 of
            // the others: half of each fragment comes from the other warpgroup.
            send(own, exchange + phase * 512, group * 256 + thread);
            pair_barrier();
            receive(other, exchange + phase * 512, (1 - group) * 256 + thread);
            #pragma unroll
            for (int j = 0; j < 8; j++) {
                dl[2 * j] = group ? other[j] : own[j];
                dl[2 * j + 1] = group ? own[j] : other[j];
            }
            // dQ (heads,dims) += dS K, for own 4 chunks, two by two.
            const uint32_t chunks = K + group * 4 * AB_CHUNK;
            keep_order(sum); keep_order(dl);
            wgmma_fence();
            #pragma unroll
            for (int h = 0; h < 2; h++) {
                #pragma unroll
                for (int k = 0; k < 4; k++) {
                    wgmma_quarter(sum, h, dl + 4 * k,
                                  operand_at(chunks + 2 * h * AB_CHUNK + k * 2048));
                }
                wgmma_commit();
            }
            free_chunks(empty + 32 * group, lane);
            keep_order(sum);
        }
        #pragma unroll
        for (int half = 0; half < 2; half++) {      // rows g, g + 8; 16 bytes per lane
            act *out = dq + (head + 32 * half) * AB_DIM + group * 256 + 8 * (lane % 4);
            #pragma unroll
            for (int m = 0; m < 8; m++) {
                uint32_t v[4];
                #pragma unroll
                for (int j = 0; j < 4; j++) {
                    const int at = (4 * m + j) % 8 * 4 + 2 * half;
                    v[j] = pack_bf16(sum[m / 2][at], sum[m / 2][at + 1]);
                }
                transpose_quad(v, lane);
                *(uint4 *)(out + 32 * m) = make_uint4(v[0], v[1], v[2], v[3]);
            }
        }
    }
}

} // namespace attention_backward

extern "C" void attention_backward_query_gpu(act *dq, const act *dout, const real *delta,
                                             const real *lse, const act *q, const act *kv,
                                             const act *entries, const int *selected,
                                             AttentionShape a) {
    if (a.T == 0) { return; }
    using namespace attention_backward;
    if (a.D != AB_DIM || a.H != AB_HEADS) {
        attention_backward_query_plain(dq, dout, delta, lse, q, kv, entries, selected, a);
        return;
    }
    const int processors = multiprocessors();
    cudaCheck(cudaFuncSetAttribute(attention_backward_query_wgmma_kernel,
                                   cudaFuncAttributeMaxDynamicSharedMemorySize, AB_SHARED));
    const size_t rows = (size_t)a.T * AB_HEADS;
    attention_backward_query_wgmma_kernel<<<a.T < processors ? a.T : processors, AB_THREADS,
                                        AB_SHARED, stream>>>(
        dq, rows_map(q, rows, 8), rows_map(dout, rows, 8), delta, lse, kv, entries, selected,
        a);
    cudaCheck(cudaGetLastError());
}

extern "C" void attention_backward_key_gpu(real *dkv, real *dentries, const act *dout,
                                           const real *delta, const real *lse, const act *q,
                                           const act *kv, const act *entries, const int *selected,
                                           AttentionShape a) {
    if (a.T == 0) { return; }
    using namespace attention_backward;
    if (a.D != AB_DIM || a.H != AB_HEADS) {
        attention_backward_key_plain(dkv, dentries, dout, delta, lse, q, kv, entries, selected, a);
        return;
    }
    const KeyPlan plan = key_plan(a);
    const size_t mark = workspace_mark(), rows = (size_t)a.T * AB_HEADS;
    const int slots = plan.entry_tiles * plan.segments + plan.window_tiles * plan.pieces;
    float *part = (float *)workspace(sizeof(float) * (size_t)slots * AB_KEYS * AB_DIM);
    uint64_t *masks = NULL;
    if (selected && plan.entry_tiles) {
        masks = (uint64_t *)workspace(sizeof(uint64_t) * (size_t)a.T * plan.entry_tiles);
        attention_masks_kernel<<<a.T, 128, sizeof(uint64_t) * plan.entry_tiles, stream>>>(
            masks, selected, plan.entry_tiles, a.topk);
        cudaCheck(cudaGetLastError());
    }
    cudaCheck(cudaFuncSetAttribute(attention_backward_key_wgmma_kernel,
                                   cudaFuncAttributeMaxDynamicSharedMemorySize, AB_SHARED));
    const CUtensorMap kv_map = rows_map(kv, a.T, AB_KEYS);
    attention_backward_key_wgmma_kernel<<<slots, AB_THREADS, AB_SHARED, stream>>>(
        part, rows_map(q, rows, 32), rows_map(dout, rows, 32), kv_map,
        plan.entry_tiles ? rows_map(entries, a.P, AB_KEYS) : kv_map, delta, lse, masks, plan, a);
    cudaCheck(cudaGetLastError());
    attention_key_sum_kernel<<<a.T + (plan.entry_tiles ? a.P : 0), AB_DIM / 4, 0, stream>>>(
        dkv, dentries, part, plan, a);
    cudaCheck(cudaGetLastError());
    workspace_release(mark);
}

// -------------------------------------------------------------------------------------------------
// 10 Head and cross-entropy (train.c part 7)

// One block per token: loss = log sum exp(l) - l[target]; l becomes softmax - onehot, rounded to
// bf16 for the next product, or zero where there is no target.
//   bytes: 2 x 4 V read, 2 V written: 1.3 MB per token, 5.3 GB at T = 4,096: 1.2 ms.
__global__ void cross_entropy_kernel(real *loss, bf16 *dlogit, const float *logit,
                                     const int *target, int V) {
    __shared__ float shared[32];
    const size_t row = blockIdx.x;
    const int wanted = target[row];
    const float *l = logit + row * V;
    bf16 *d = dlogit ? dlogit + row * V : NULL;
    if (wanted < 0) {
        if (threadIdx.x == 0) { loss[row] = 0; }
        for (int v = threadIdx.x; d && v < V; v += blockDim.x) { d[v] = __float2bfloat16(0); }
        return;
    }
    // Each thread keeps a maximum and a sum that is relative to it; then they are joined.
    float max = -INFINITY, sum = 0;
    for (int v = threadIdx.x * 4; v < V; v += blockDim.x * 4) {
        float x[4];
        load4(x, l + v);
        const float higher = fmaxf(fmaxf(fmaxf(x[0], x[1]), fmaxf(x[2], x[3])), max);
        sum = sum * expf(max - higher) + expf(x[0] - higher) + expf(x[1] - higher) +
              expf(x[2] - higher) + expf(x[3] - higher);
        max = higher;
    }
    const float all = block_max(max, shared);
    sum = block_sum(sum * expf(max - all), shared);     // no logits: 0 times 0; a NaN stays one
    if (threadIdx.x == 0) { loss[row] = logf(sum) - (l[wanted] - all); }
    for (int v = threadIdx.x * 4; d && v < V; v += blockDim.x * 4) {
        float x[4];
        load4(x, l + v);
        #pragma unroll
        for (int k = 0; k < 4; k++) { x[k] = expf(x[k] - all) / sum - (v + k == wanted); }
        store4(d + v, x);
    }
}

// loss and dinp as in the C text, for a chunk of tokens at a time: logits in fp32, their gradient
// in bf16, both in the workspace.
//   operations: 2 x 2 V C per token, 8.7 TFLOP at T = 4,096: 12 ms at 720 TFLOP/s.
enum { HEAD_CHUNK = 512 };
extern "C" void head_loss_gpu(real *loss, real *dinp, const act *inp, const bf16 *head,
                              const int *target, int T, int C, int V) {
    gpuRequire(V % 4 == 0);
    const size_t mark = workspace_mark();
    const int chunk = T < HEAD_CHUNK ? T : HEAD_CHUNK;
    float *logit = (float *)workspace(sizeof(float) * (size_t)chunk * V);
    bf16 *dlogit = dinp ? (bf16 *)workspace(sizeof(bf16) * (size_t)chunk * V) : NULL;
    for (int t = 0; t < T; t += chunk) {
        const int n = T - t < chunk ? T - t : chunk;
        product(logit, CUDA_R_32F, inp + (size_t)t * C, head, n, C, V, 0);
        cross_entropy_kernel<<<n, 512, 0, stream>>>(loss + t, dlogit, logit, target + t, V);
        cudaCheck(cudaGetLastError());
        if (dinp) {
            product_transposed(dinp + (size_t)t * C, CUDA_R_32F, dlogit, head, n, C, V, 0);
        }
    }
    workspace_release(mark);
}
#endif // __CUDACC__
#endif // KERNELS_CU
