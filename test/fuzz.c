// fuzz.c: whatever a file holds, the readers answer with a result or with one line of error.
//
//     test/fuzz.sh [SECONDS [TARGET...]]      (clang: libFuzzer; else the small mutator below)
//
// One program for all targets; its name says which: fuzz_json, fuzz_safetensors, fuzz_tokenizer,
// fuzz_jsonl, fuzz_bin, fuzz_adapter (adapter_config.json, a 0, adapter_model.safetensors),
// fuzz_names (the same, read without a model, as dev/merge.c does). The sanitizers look for what
// goes wrong silently. An error of the reader ends in die(), and so in exit(), which here leads
// back to the next input; in fuzz_jsonl, which reads with --skip-bad-rows, there must be none. The
// memory and the files that a reader had then would be gone with the process; here they are taken
// from it, or they were two gigabytes within two minutes.
#define TESTING
#include <setjmp.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
static jmp_buf next_input;
static void *mapped;                    // by the reader, which keeps it
static size_t mapped_bytes;
static uintptr_t held[1 << 14];         // what readers have allocated; beyond that, it is lost
static int n_held;
static FILE *opened;                    // they have one at a time
__attribute__((noreturn)) static void fuzz_exit(int code) { longjmp(next_input, code + 1); }
static void *fuzz_mmap(void *at, size_t n, int prot, int flags, int fd, off_t offset) {
    mapped = mmap(at, n, prot, flags, fd, offset);
    mapped_bytes = mapped == MAP_FAILED ? 0 : n;
    return mapped;
}
// Block `from` (0: none) has become `to` (0: none). A block that is not in the list stays out.
static void *fuzz_hold(uintptr_t from, void *to) {
    int i = n_held;
    if (from == 0) {
        if (to && n_held < (int)(sizeof held / sizeof *held)) { held[n_held++] = (uintptr_t)to; }
        return to;
    }
    while (i > 0 && held[i - 1] != from) { i--; }
    if (i > 0) { held[i - 1] = to ? (uintptr_t)to : held[--n_held]; }
    return to;
}
static void *fuzz_realloc(void *p, size_t n) {
    uintptr_t from = (uintptr_t)p;
    return fuzz_hold(from, realloc(p, n));
}
static void fuzz_free(void *p) {
    if (p) { fuzz_hold((uintptr_t)p, NULL); }
    free(p);
}
static FILE *fuzz_fopen(const char *path, const char *mode) { return opened = fopen(path, mode); }
static int fuzz_fclose(FILE *f) {
    opened = NULL;
    return fclose(f);
}
#define malloc(n) fuzz_hold(0, malloc(n))
#define realloc(p, n) fuzz_realloc(p, n)
#define free(p) fuzz_free(p)
#define fopen(path, mode) fuzz_fopen(path, mode)
#define fclose(f) fuzz_fclose(f)
#define exit(code) fuzz_exit(code)
#define mmap(...) fuzz_mmap(__VA_ARGS__)
#include "../dev/merge.c"        // and with it refit.c
#include "../dev/data/prep.c"
#undef malloc
#undef realloc
#undef free
#undef fopen
#undef fclose
#undef exit
#undef mmap

static char folder[] = "/dev/shm/fuzz.XXXXXX", path[3][PATH_SIZE];
static const char *target;
static Tokenizer bytes;
static Config config = { .V = 270, .bos = 256, .eos = 257, .E = 2, .layers = 1 };
static Adapters adapters[2];            // of wq_a and the experts' w1; of w1, w2, w3, fused in hf
static int first_fd;
static long accepted;                   // inputs that were read to their end

static void write_whole(const char *name, const uint8_t *data, size_t n) {
    FILE *f = fopen(name, "wb");
    if (f == NULL || fwrite(data, 1, n, f) != n || fclose(f) != 0) { perror(name); abort(); }
}

// What a reader returns is not freed here: everything is, behind it.
static void read_input(void) {
    if (strcmp(target, "json") == 0) {
        Json j;
        json_load(&j, path[0], "");
        json_free(&j);
    } else if (strcmp(target, "safetensors") == 0) {
        Safetensors s;
        safetensors_open(&s, path[0], "");
        safetensors_close(&s);
    } else if (strcmp(target, "tokenizer") == 0) {
        Tokenizer t;
        Tokens out = { .n = 0 };
        static const char text[] = "Hello, wörld 123 \n\n  if (x) { 你好。\xff }";
        tokenizer_load(&t, path[0], &config);
        tokenizer_encode(&t, &out, text, sizeof text - 1, 0);
    } else if (strcmp(target, "jsonl") == 0) {
        Tokenizer t = bytes;                // its room for a word may grow, and is taken again
        Data d = { .V = 264, .t = 64, .tokenizer = &t, .skip_bad_rows = 1 };
        data_add_jsonl(&d, path[0]);
    } else if (strcmp(target, "bin") == 0) {
        Data d = { .V = 270, .t = 4 };
        data_add_bin(&d, path[0]);
    } else if (strcmp(target, "names") == 0) {
        Adapters s;
        Config c;
        adapter_open(&s, &c, folder);
    } else {
        int r, names;
        float alpha;
        unsigned targets;
        adapter_read_config(folder, &r, &alpha, &targets, &names);
        adapter_load(folder, &adapters[targets == adapters[1].targets], &config);
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n);
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n) {
    const uint8_t *zero = memchr(data, 0, n);
    if (first_fd == 0) {                // libFuzzer has opened its own by now
        first_fd = dup(0);
        close(first_fd);
    }
    if (strcmp(target, "adapter") == 0 || strcmp(target, "names") == 0) {
        size_t config_bytes = zero ? (size_t)(zero - data) : n;
        write_whole(path[1], data, config_bytes);
        write_whole(path[2], zero ? zero + 1 : data, zero ? n - config_bytes - 1 : 0);
    }
    write_whole(path[0], data, n);      // here it is found if the reader fails
    int code = setjmp(next_input);
    if (code == 0) { read_input(); accepted++; }
    if (code > 1 && strcmp(target, "jsonl") == 0) { abort(); }
    if (strcmp(target, "names") == 0) { mem_free(); mapped_bytes = 0; }
    if (opened) { fclose(opened); opened = NULL; }
    while (n_held > 0) { free((void *)held[--n_held]); }
    for (int fd = first_fd; fd < first_fd + 4; fd++) { close(fd); }
    if (mapped_bytes) { munmap(mapped, mapped_bytes); }
    mapped_bytes = 0;
    return 0;
}

// What the targets need once.
static void fuzz_setup(const char *program) {
    const char *name = strrchr(program, '_');
    target = name ? name + 1 : "json";
    if (mkdtemp(folder) == NULL) { abort(); }
    path_make(path[0], folder, "/", "input");
    path_make(path[1], folder, "/", "adapter_config.json");
    path_make(path[2], folder, "/", "adapter_model.safetensors");
    tokenizer_bytes(&bytes, &config);
    for (int pass = 0; pass < 2; pass++) {
        if (pass == 0) { mem_count(); } else { mem_open(); }
        for (Adapters *a = adapters; a < adapters + 2; a++) {
            a->R = 2;
            a->alpha = 4;
            a->targets = 1u << TARGET_WQ_A | 1u << TARGET_EXPERTS_W1;
            if (a > adapters) { a->targets = GATE_UP | DOWN; }
            if (pass == 1) { adapters_alloc(a, 1); }
            adapters_begin(a);
            adapter_add(a, TARGET_WQ_A, "layers.0.attn.wq_a", 3, 5);
            adapter_add_experts(a, TARGET_EXPERTS_W1, "layers.0.ffn.experts", "w1", 0, 2, 3, 4);
            adapter_add_experts(a, TARGET_EXPERTS_W2, "layers.0.ffn.experts", "w2", 0, 2, 4, 3);
            adapter_add_experts(a, TARGET_EXPERTS_W3, "layers.0.ffn.experts", "w3", 0, 2, 3, 4);
            if (pass == 0) { adapters_alloc(a, 1); }
        }
    }
    n_held = 0;                         // these stay
}

#ifdef LIBFUZZER
int LLVMFuzzerInitialize(int *argc, char ***argv);
int LLVMFuzzerInitialize(int *argc, char ***argv) {
    (void)argc;
    fuzz_setup((*argv)[0]);
    return 0;
}
#else
// Without libFuzzer: seeds, changed at a few places, for so many seconds.
int main(int argc, char **argv) {
    static uint8_t seed[1 << 20], input[1 << 20];
    double end = clock_seconds() + (argc > 1 ? atof(argv[1]) : 1);
    fuzz_setup(argv[0]);
    if ((stderr = fopen("/dev/null", "w")) == NULL) { abort(); }    // what readers say; the
                                        // sanitizers write to descriptor 2
    long runs = 0;
    for (uint64_t i = 0; argc > 2 && clock_seconds() < end; i++, runs++) {
        uint64_t key = random_key(i, "fuzz");
        FILE *f = fopen(argv[2 + random_bits(key, 0) % (uint64_t)(argc - 2)], "rb");
        size_t n = f ? fread(seed, 1, sizeof seed / 2, f) : 0;
        if (f) { fclose(f); }
        memcpy(input, seed, n);
        for (uint64_t k = 0; k < random_bits(key, 1) % 8 && n > 0; k++) {
            uint64_t bits = random_bits(key, 10 + k), at = bits % n, length = 1 + (bits >> 32) % 16;
            static const char interesting[] = "\"\\{}[],:-0e.u\xff\x00\x7f\xc0 ";
            switch ((bits >> 40) % 4) {
            case 0: input[at] ^= (uint8_t)(1 << (bits >> 48) % 8); break;
            case 1: input[at] = (uint8_t)interesting[(bits >> 48) % (sizeof interesting - 1)];
                break;
            case 2: n = n > at + length ? n - length : n; memmove(input + at, input + at + length,
                                                                  n - at); break;
            default: memmove(input + at + length, input + at, n - at); n += length; break;
            }
        }
        alarm(10);                      // for one input, as fuzz.sh tells libFuzzer
        LLVMFuzzerTestOneInput(input, n);
    }
    printf("fuzz_%s: %ld inputs, %ld of them accepted\n", target, runs, accepted);
    return 0;
}
#endif
