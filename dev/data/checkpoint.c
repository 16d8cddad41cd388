// checkpoint.c: the released model comes in. Files, JSON, headers, config.json, and the weights.
//
//     safetensors file:   u64 n | n bytes of JSON {name: {dtype, shape, data_offsets}} | the data
//     checkpoint folder:  config.json, model.safetensors.index.json (name -> file), the files
//
// One rule: nothing that is read is trusted. Files arrive truncated, renamed, half downloaded or
// made for another model, and each such defect ends with one line that names the tensor, the key or
// the file. Weights are read once, straight to where a caller's table wants them, and stay packed.
//
// Contents
//   1 files and folders          4 config.json
//   2 JSON                       5 reading a checkpoint
//   3 safetensors headers        6 do the scales fit?
#ifndef CHECKPOINT_C
#define CHECKPOINT_C
#include "../../moe.c"          // defines: comm_*; below it widen_fp8, widen_fp4, min_int, die
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <unistd.h>

// -------------------------------------------------------------------------------------------------
// 1 Files and folders
//
// What the C library leaves out: whole reads, removing and syncing folders. A file's bytes are safe
// once the file is synced, its name only once its folder is.

enum { PATH_SIZE = 1024, TEXT_MOST = 100000000, JSON_DEPTH = 64 };  // more is not one of our files
#define NOWHERE SIZE_MAX
// What to do, for more than one message; not_a_folder is for those that say HINT themselves.
static const char mixed[] = "HINT: config.json, index and shards are not of one checkpoint";
static const char not_a_folder[] = "is this the right folder, and complete?";
static const char damaged[] = "HINT: the file is damaged, fetch it again";

// Bad input: this file ends the process a lot.
#define refuse(...) die(EXIT_USAGE, __VA_ARGS__)

// out (PATH_SIZE) = the three parts, one after the other. Returns out.
static inline char *path_make(char *out, const char *a, const char *b, const char *c) {
    if (snprintf(out, PATH_SIZE, "%s%s%s", a, b, c) >= PATH_SIZE) {
        refuse("the path %.60s... is longer than %d bytes", a, PATH_SIZE - 1);
    }
    return out;
}

// Reads n bytes from position `at`. Returns 0 or an errno; ENODATA: the file ends too early.
static inline int file_pread(int fd, void *out, size_t n, size_t at) {
    for (size_t done = 0; done < n;) {
        ssize_t got = pread(fd, (char *)out + done, n - done, (off_t)(at + done));
        if (got < 0 && errno == EINTR) { continue; }
        if (got <= 0) { return got < 0 ? errno : ENODATA; }
        done += (size_t)got;
    }
    return 0;
}

// Opens a regular file for reading. The hint says what to do when there is none.
static inline int file_open(const char *path, size_t *size, const char *hint) {
    struct stat info;
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0 || fstat(fd, &info) != 0 || !S_ISREG(info.st_mode)) {
        refuse("cannot open %s: %s HINT: %s", path, fd < 0 ? strerror(errno) : "not a file", hint);
    }
    *size = (size_t)info.st_size;
    return fd;
}

// Bytes of the mark that some editors put in front of UTF-8. It is no part of the text.
static inline size_t mark_size(const char *text, size_t n) {
    return n >= 3 && memcmp(text, "\xEF\xBB\xBF", 3) == 0 ? 3 : 0;
}

// The whole text of a file, with a 0 behind it. The caller frees it.
static inline char *file_read(const char *path, size_t *size, const char *hint) {
    int fd = file_open(path, size, hint), error = *size > TEXT_MOST ? EFBIG : 0;
    char *text = (char *)host_alloc(error ? 0 : *size + 1);
    error = error ? error : file_pread(fd, text, *size, 0);
    if (error) { refuse("cannot read %s: %s", path, strerror(error)); }
    close(fd);
    size_t mark = mark_size(text, *size);
    *size -= mark;
    memmove(text, text + mark, *size);
    text[*size] = 0;
    return text;
}

// The folder's entries reach the disk; some file systems cannot do that, and need not.
static inline int folder_sync(const char *path) {
    int fd = open(path, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    int error = fd < 0 || (fsync(fd) != 0 && errno != EINVAL) ? errno : 0;
    if (fd >= 0) { close(fd); }
    return error;
}

// Removes a folder of files, if it is there.
static inline void folder_remove(const char *path) {
    DIR *dir = opendir(path);
    char file[PATH_SIZE];
    for (struct dirent *e; dir && (e = readdir(dir)) != NULL;) {
        if (e->d_name[0] != '.') { unlink(path_make(file, path, "/", e->d_name)); }
    }
    if (dir) { closedir(dir); }
    rmdir(path);
}

// Bytes that can still be written to the file system of an existing path; 0 if it cannot be told.
size_t disk_free(const char *path) {
    struct statvfs info;
    return statvfs(path, &info) == 0 ? (size_t)info.f_bavail * info.f_frsize : 0;
}

// A size with its unit, in one of a few buffers: "3.4 MiB", "19.10 GiB".
static inline const char *bytes_text(double bytes) {
    static char text[4][32];
    static int at;
    char *out = text[at++ % 4];
    int giga = bytes >= 1e3 * 1048576;
    snprintf(out, sizeof text[0], giga ? "%.2f GiB" : "%.1f MiB",
             bytes / (giga ? 1073741824.0 : 1048576.0));
    return out;
}

// -------------------------------------------------------------------------------------------------
// 2 JSON
//
// jsmn cuts a text into tokens: where each value begins and ends, and how many children it has. It
// forgives much ({"a" "b"}, {,}, 1.2.3, text behind the end), so json_skip holds the text against
// the grammar first. Strings are then unescaped in place and ended with a 0: a token's text is a C
// string. A key that is there twice is refused, because two readers may pick different ones.

#if defined(__has_include)
#if __has_include(<jsmn.h>)
#define HAVE_JSMN
#endif
#endif
#ifdef HAVE_JSMN
#define JSMN_STATIC
#define JSMN_STRICT
#define JSMN_PARENT_LINKS       // without them a header of 70,000 tensors takes seconds
#include <jsmn.h>               // Debian: libjsmn-dev
#else                           // enough for everything to compile
typedef struct { int type, start, end, size; } jsmntok_t;
enum { JSMN_OBJECT = 1, JSMN_ARRAY, JSMN_STRING, JSMN_PRIMITIVE };
#endif

typedef struct {
    const char *file;           // for messages; the caller's
    char *text;
    int n;
    jsmntok_t *tok;             // (n) in the order of the text; token 0 is the whole value
} Json;

static inline const char *json_blanks(const char *s) { return s + strspn(s, " \t\r\n"); }

// Behind the value that begins at s, blanks included; NULL if there is none.
static inline const char *json_skip(const char *s, int depth) {
    s = json_blanks(s);
    const char *end = s + strcspn(s, ",:]} \t\r\n"), close = (char)(*s + 2);
    const size_t length = (size_t)(end - s);
    if (*s == '"') {
        for (s++; *s != '"'; s++) {
            s += *s == '\\';
            if ((unsigned char)*s < ' ') { return NULL; }
        }
        return json_blanks(s + 1);
    }
    if (*s != '{' && *s != '[') {
        char *number;
        strtod(s, &number);         // it also knows inf, nan, 0x10, +1 and .5
        int good = number == end && strspn(s, "0123456789+-.eE") >= length;
        good &= length > 0 && (*s == '-' || (*s >= '0' && *s <= '9'));
        good |= length == 4 && (memcmp(s, "true", 4) == 0 || memcmp(s, "null", 4) == 0);
        return good || (length == 5 && memcmp(s, "false", 5) == 0) ? json_blanks(end) : NULL;
    }
    s = json_blanks(s + 1);
    for (int more = 0; s && *s != close; more = 1) {        // '{' + 2 is '}', '[' + 2 is ']'
        if (depth == JSON_DEPTH || (more && *s++ != ',')) { return NULL; }
        if (close == '}') {
            s = *json_blanks(s) == '"' ? json_skip(s, depth) : NULL;
            if (s == NULL || *s++ != ':') { return NULL; }
        }
        s = json_skip(s, depth + 1);
    }
    return s ? json_blanks(s + 1) : NULL;
}

// Replaces one-letter escapes, in place, and ends the string with a 0. \u escapes stay as they are:
// no name or value that we look for has any.
static inline void json_unescape(char *s, jsmntok_t *t) {
    static const char from[] = "\"\\/bfnrt", to[] = "\"\\/\b\f\n\r\t";
    int out = t->start;
    for (int i = t->start; i < t->end; i++) {
        const char *escape = s[i] == '\\' ? strchr(from, s[i + 1]) : NULL;
        if (escape) { i++; }
        s[out++] = escape ? to[escape - from] : s[i];
    }
    t->end = out;
    s[out] = 0;
}

// Parses text (length bytes and a 0), which j owns from here on.
static inline void json_parse(Json *j, const char *file, char *text, size_t length) {
    *j = (Json){ .file = file, .text = text };
#ifdef HAVE_JSMN
    jsmn_parser parser;
    int good = json_skip(text, 0) == text + length;
    for (int pass = 0; pass < 2 && good && j->n >= pass; pass++) {      // the first only counts
        if (pass) { j->tok = (jsmntok_t *)host_alloc(sizeof(jsmntok_t) * (size_t)j->n); }
        jsmn_init(&parser);
        j->n = jsmn_parse(&parser, text, length, j->tok, (unsigned)j->n);
    }
#else
    refuse("cannot read %s (%zu bytes): built without jsmn.h HINT: make deps, or install the "
           "package libjsmn-dev; then make again", file, length);
#endif
    if (j->n <= 0) { refuse("%s is not valid JSON %s", file, damaged); }
    for (int i = 0; i < j->n; i++) {
        if (j->tok[i].type == JSMN_STRING) { json_unescape(text, &j->tok[i]); }
    }
}

static inline void json_load(Json *j, const char *path, const char *hint) {
    size_t size;
    char *text = file_read(path, &size, hint);
    json_parse(j, path, text, size);
}

static inline void json_free(Json *j) { free(j->text); free(j->tok); }
static inline const char *json_text(const Json *j, int i) { return j->text + j->tok[i].start; }

// The token behind value i. The members of an object are key, value, key, value, so
//     for (int k = 0, i = object + 1; k < j->tok[object].size; k++, i = json_next(j, i + 1))
// visits its keys i, with their values i + 1.
static inline int json_next(const Json *j, int i) {
    int end = j->tok[i].end;
    do { i++; } while (i < j->n && j->tok[i].start < end);
    return i;
}

// One character per kind of value: { [ " 0 (number) t (true, false) n (null).
static inline int json_kind(const Json *j, int i) {
    int c = j->tok[i].type == JSMN_STRING ? '"' : *json_text(j, i);
    return c == 'f' ? 't' : strchr("{[\"tn", c) ? c : '0';
}

// The value of a key, or -1; object may be -1 too.
static inline int json_find(const Json *j, int object, const char *key) {
    int found = -1;
    if (object < 0 || j->tok[object].type != JSMN_OBJECT) { return -1; }
    for (int k = 0, i = object + 1; k < j->tok[object].size; k++, i = json_next(j, i + 1)) {
        if (strcmp(json_text(j, i), key) != 0) { continue; }
        if (found >= 0) { refuse("%s: the key %s is there twice", j->file, key); }
        found = i + 1;
    }
    return found;
}

// As json_find, but the key must be there, and its value of that kind.
static inline int json_get(const Json *j, int object, const char *key, int kind) {
    int i = json_find(j, object, key);
    if (i < 0) { refuse("%s: the key %s is missing", j->file, key); }
    if (json_kind(j, i) != kind) {
        refuse("%s: %s is %.*s, expected %s", j->file, key, (int)strcspn(json_text(j, i), ",]}\n"),
               json_text(j, i), kind == '"' ? "a string" : kind == '{' ? "an object" : kind == '['
               ? "a list" : kind == 't' ? "true or false" : "a number");
    }
    return i;
}

static inline double json_number(const Json *j, int i) { return strtod(json_text(j, i), NULL); }

// A count, a size or an offset; NOWHERE if value i is none.
static inline size_t json_size(const Json *j, int i) {
    int length = j->tok[i].end - j->tok[i].start;
    const char *s = json_text(j, i);
    int good = json_kind(j, i) == '0' && length <= 18 && (int)strspn(s, "0123456789") == length;
    return good ? (size_t)strtoull(s, NULL, 10) : NOWHERE;
}

// Writes a string with its quotes.
static inline void json_quote(FILE *f, const char *s) {
    static const char from[] = "\"\\\b\f\n\r\t", to[] = "\"\\bfnrt";
    fputc('"', f);
    for (; *s; s++) {
        const char *escape = strchr(from, *s);
        if (escape) { fprintf(f, "\\%c", to[escape - from]); }
        else if ((unsigned char)*s >= ' ') { fputc(*s, f); }
    }
    fputc('"', f);
}

// -------------------------------------------------------------------------------------------------
// 3 Safetensors headers
//
// A header is believed only as a whole: every range as long as its type and shape say, and all of
// them together covering the data exactly once, without overlaps or holes. The format's own library
// demands the same (tensor.rs), and it turns a truncated download, a file cut together by hand and
// random bytes into one thing: an error line.

// The types of the format, in the order of its library. DT_FP4 is two codes per byte, I8 or U8.
static const struct { const char *name; int bits, type; } dtypes[] = {
    {"BOOL", 8, -1}, {"F4", 4, -1}, {"F6_E2M3", 6, -1}, {"F6_E3M2", 6, -1}, {"U8", 8, DT_FP4},
    {"I8", 8, DT_FP4}, {"F8_E5M2", 8, -1}, {"F8_E4M3", 8, DT_FP8}, {"F8_E8M0", 8, DT_E8M0},
    {"F8_E4M3FNUZ", 8, -1}, {"F8_E5M2FNUZ", 8, -1}, {"I16", 16, -1}, {"U16", 16, -1},
    {"F16", 16, DT_F16}, {"BF16", 16, DT_BF16}, {"I32", 32, DT_I32}, {"U32", 32, -1},
    {"F32", 32, DT_F32}, {"C64", 64, -1}, {"F64", 64, -1}, {"I64", 64, DT_I64}, {"U64", 64, -1},
    {"an unknown type", 0, -1},
};
enum { DTYPES = sizeof dtypes / sizeof *dtypes - 1, DIMS_MAX = 4 };

typedef struct {                // one tensor of a file
    const char *name;
    int dtype, type, ndim;      // dtype: place in dtypes; type: its DT_*
    size_t dim[DIMS_MAX];       // the first of them
    size_t begin, end;          // bytes, counted from the start of the data
} Entry;

typedef struct {
    char path[PATH_SIZE];
    int fd;
    Json header;                // owns the names
    size_t n, data;             // tensors; where the data begins
    Entry *entry;               // (n) sorted by name
} Safetensors;

// What a tensor of that DT_* is in a file: its place in dtypes. I8 for DT_FP4.
static inline int dtype_of(int type) {
    int dtype = DTYPES - 1;
    while (dtypes[dtype].type != type) { dtype--; }
    return dtype;
}

// "F32 [2048,4096]" in text (120).
static inline const char *shape_text(char *text, int dtype, int ndim, const size_t *dim) {
    char *end = text + sprintf(text, "%s [", dtypes[dtype].name);
    for (int d = 0; d < ndim && d < DIMS_MAX; d++) {
        end += sprintf(end, "%s%zu", d ? "," : "", dim[d]);
    }
    sprintf(end, ndim > DIMS_MAX ? ",...]" : "]");
    return text;
}

static inline int entry_by_begin(const void *a, const void *b) {
    const Entry *x = (const Entry *)a, *y = (const Entry *)b;
    if (x->begin != y->begin) { return x->begin < y->begin ? -1 : 1; }
    return (x->end > y->end) - (x->end < y->end);
}

// Of anything that begins with its name.
static inline int by_name(const void *a, const void *b) {
    return strcmp(*(const char *const *)a, *(const char *const *)b);
}

// Reads the header's part of the tensor with key token `key`.
static inline void safetensors_entry(const Safetensors *s, Entry *e, int key) {
    const Json *j = &s->header;
    char text[120];
    e->name = json_text(j, key);
    if (json_kind(j, key + 1) != '{') { refuse("%s: %s is no object", s->path, e->name); }
    const char *dtype = json_text(j, json_get(j, key + 1, "dtype", '"'));
    int shape = json_get(j, key + 1, "shape", '[');
    int range = json_get(j, key + 1, "data_offsets", '['), pair = j->tok[range].size == 2;
    for (e->dtype = 0; e->dtype < DTYPES && strcmp(dtypes[e->dtype].name, dtype); e->dtype++) { }
    size_t bits = (size_t)dtypes[e->dtype].bits;
    int sound = bits > 0;
    e->type = dtypes[e->dtype].type;
    e->ndim = j->tok[shape].size;
    for (int d = 0; d < e->ndim; d++) {
        size_t size = json_size(j, shape + 1 + d);
        sound &= size != NOWHERE && !__builtin_mul_overflow(bits, size, &bits);
        if (d < DIMS_MAX) { e->dim[d] = size; }
    }
    e->begin = pair ? json_size(j, range + 1) : NOWHERE;
    e->end = pair ? json_size(j, range + 2) : NOWHERE;
    if (!sound || e->begin > e->end || e->end == NOWHERE || bits != (e->end - e->begin) * 8) {
        refuse("%s: %s is %s, and its data_offsets are [%zd,%zd] %s", s->path, e->name,
               shape_text(text, e->dtype, e->ndim, e->dim), (ssize_t)e->begin, (ssize_t)e->end,
               damaged);
    }
}

// All ranges together must be the data: n bytes, each once. Leaves the entries sorted by name.
static inline void safetensors_tile(Safetensors *s, size_t n) {
    size_t at = 0;
    qsort(s->entry, s->n, sizeof(Entry), entry_by_begin);
    for (const Entry *e = s->entry; e < s->entry + s->n; at = e++->end) {
        if (e->begin != at) {
            refuse("%s: %s at %s, which begins at byte %zu, expected %zu %s", s->path,
                   e->begin < at ? "an overlap" : "a hole", e->name, e->begin, at, damaged);
        }
    }
    if (at != n) {
        refuse("%s is %s: it has %zu bytes of data, its header describes %zu %s", s->path,
               n < at ? "truncated" : "too long", n, at, damaged);
    }
    qsort(s->entry, s->n, sizeof(Entry), by_name);
    for (size_t i = 1; i < s->n; i++) {
        if (strcmp(s->entry[i - 1].name, s->entry[i].name) == 0) {
            refuse("%s: %s is there twice %s", s->path, s->entry[i].name, damaged);
        }
    }
}

// Opens a file and checks its header. The data is not read.
static inline void safetensors_open(Safetensors *s, const char *path, const char *hint) {
    size_t size, n = 0;                 // a little-endian u64, as on every machine we run on
    s->fd = file_open(path, &size, hint);
    path_make(s->path, path, "", "");
    file_pread(s->fd, &n, size < 8 ? 0 : 8, 0);
    if (size < 8 || n > TEXT_MOST || n > size - 8) {
        refuse("%s: a header of %zu bytes in a file of %zu; the format allows %d HINT: truncated, "
               "or no safetensors file", path, n, size, TEXT_MOST);
    }
    char *text = (char *)host_calloc(n + 1);
    file_pread(s->fd, text, n, 8);
    json_parse(&s->header, s->path, text, n);
    const jsmntok_t *root = s->header.tok;
    if (text[0] != '{') { refuse("%s: its header does not begin with { %s", path, damaged); }
    s->n = 0;
    s->data = 8 + n;
    s->entry = (Entry *)host_alloc(sizeof(Entry) * (size_t)root->size);
    for (int k = 0, i = 1; k < root->size; k++, i = json_next(&s->header, i + 1)) {
        if (strcmp(json_text(&s->header, i), "__metadata__") == 0) { continue; }
        safetensors_entry(s, &s->entry[s->n++], i);
    }
    safetensors_tile(s, size - s->data);
}

static inline void safetensors_close(Safetensors *s) {
    close(s->fd);
    json_free(&s->header);
    free(s->entry);
}

// The tensor of that name, or NULL.
static inline const Entry *safetensors_find(const Safetensors *s, const char *name) {
    Entry key = { .name = name };
    return (const Entry *)bsearch(&key, s->entry, s->n, sizeof key, by_name);
}

// -------------------------------------------------------------------------------------------------
// 4 config.json
//
// Every number the model is built from must be there and make sense: a default for a missing key
// would train another model than the one on the disk, and nothing would tell. Keys of choices that
// the code does not offer (tied embeddings, biases) must have the one value it implements.

typedef struct {                // config.json, or the built-in tiny model's
    char model_type[32];
    int V, C, layers, H, D, rope_dim, Q, G, O;      // Q: q_lora_rank, G: o_groups, O: o_lora_rank
    int E, K, F, n_shared, hash_layers, window, index_heads, index_dim, index_topk, hc_iters;
    int max_positions, bos, eos, norm_topk;
    Routing how;
    float route_scale, swiglu_limit, norm_eps, hc_eps;
    double rope_theta, compress_theta, yarn_factor, beta_fast, beta_slow, original_positions;
    int ratio[128];             // per layer: 0 window only, 4 CSA, 128 HCA
} Config;

// How the router chooses (moe.c, section 5) is not guessed either. A key's value is what --routing
// says, else config.json, else a default if it has one; all else ends the process with its name.

enum { ROUTE_SCORE, ROUTE_METHOD, ROUTE_NORM, ROUTE_SCALE, ROUTE_LIMIT, ROUTE_GROUPS, ROUTE_KEPT,
       ROUTE_KEYS };
static const struct { const char *key, *normal, *tiny, *expected; } route_keys[ROUTE_KEYS] = {
    {"scoring_func", NULL, "sqrtsoftplus", "sqrtsoftplus, sigmoid or softmax"},
    {"topk_method", NULL, "noaux_tc", "noaux_tc, greedy or group_limited_greedy"},
    {"norm_topk_prob", NULL, "true", "false or true"},
    {"routed_scaling_factor", NULL, "1.5", "a number above 0"},
    {"swiglu_limit", NULL, "10", "a number above 0"},
    {"n_group", "1", NULL, "a divisor of n_routed_experts, groups of 2 or more; 1 if greedy"},
    {"topk_group", "1", NULL, "at most n_group, with num_experts_per_tok experts or more"},
};
static const char *routing_given = "";      // --routing: "key=value,key=value"
static struct { char text[40]; const char *from; } routing[ROUTE_KEYS];

// The key that a word of --routing sets; ROUTE_KEYS if there is none.
static inline int routing_key(const char *word) {
    int k = 0;
    for (; k < ROUTE_KEYS; k++) {
        size_t n = strlen(route_keys[k].key);
        if (strncmp(word, route_keys[k].key, n) == 0 && word[n] == '=') { break; }
    }
    return k;
}

// Settles key k. found: where its value begins in `from`, NULL if it is not there.
static inline void routing_set(int k, const char *found, const char *from) {
    if (found == NULL || strncmp(found, "null", 4) == 0) {
        found = route_keys[k].normal;
        from = "default";
    }
    for (const char *word = routing_given, *end; *word; word = end + (*end == ',')) {
        end = word + strcspn(word, ",");
        int key = routing_key(word);
        if (key == ROUTE_KEYS) {
            die(EXIT_USAGE, "--routing: '%s' sets nothing HINT: key=value,.. with config.json's "
                "keys: scoring_func, topk_method, norm_topk_prob, routed_scaling_factor, "
                "swiglu_limit, n_group, topk_group", word);
        }
        if (key != k) { continue; }
        found = strchr(word, '=') + 1;
        from = "--routing";
    }
    if (found == NULL) { die(EXIT_USAGE, "config.json: %s is missing", route_keys[k].key); }
    snprintf(routing[k].text, sizeof routing[k].text, "%.*s", (int)strcspn(found, ",}\" \t\r\n"),
             found);
    routing[k].from = from;
}

__attribute__((noreturn)) static inline void routing_refuse(int k) {
    die(EXIT_USAGE, "%s is %s (%s), expected %s", route_keys[k].key, routing[k].text,
        routing[k].from, route_keys[k].expected);
}

static inline double routing_number(int k, double low) {
    char *end;
    double value = strtod(routing[k].text, &end);
    if (*end || end == routing[k].text || !(value >= low && value <= 1e9)) { routing_refuse(k); }
    return value;
}

// The place of key k's value among three words.
static inline int routing_word(int k, const char *first, const char *second, const char *third) {
    const char *words[3] = { first, second, third };
    for (int i = 0; i < 3; i++) { if (strcmp(routing[k].text, words[i]) == 0) { return i; } }
    routing_refuse(k);
}

// What the settled keys mean together, for E experts of which K are chosen.
Routing routing_resolve(int *norm, float *scale, float *limit, int E, int K) {
    int method = routing_word(ROUTE_METHOD, "noaux_tc", "greedy", "group_limited_greedy");
    double groups = routing_number(ROUTE_GROUPS, 1), kept = routing_number(ROUTE_KEPT, 1);
    *norm = routing_word(ROUTE_NORM, "false", "true", "true");
    *scale = (float)routing_number(ROUTE_SCALE, 1e-30);
    *limit = (float)routing_number(ROUTE_LIMIT, 1e-30);
    int crooked = fmod(E, groups) != 0 || groups != floor(groups);
    if (crooked || (groups > 1 && (method == 1 || E / groups < 2))) {
        routing_refuse(ROUTE_GROUPS);
    }
    if (kept != floor(kept) || kept > groups || kept * (E / groups) < K) {
        routing_refuse(ROUTE_KEPT);
    }
    return (Routing){ .score = routing_word(ROUTE_SCORE, "sqrtsoftplus", "sigmoid", "softmax"),
                      .greedy = method > 0, .groups = (int)groups, .kept = (int)kept };
}

// Prints every setting and whose it is.
static inline void routing_print(void) {
    for (int k = 0; k < ROUTE_KEYS; k++) {
        printf("plan   routing     %-21s %-20s %s\n", route_keys[k].key, routing[k].text,
               routing[k].from);
    }
}

// A number from low to high; a multiple of `multiple`, if not 0 (fp8 matrices have blocks of 128).
static inline double config_number(const Json *j, int object, const char *key, double low,
                                   double high, int multiple) {
    double value = json_number(j, json_get(j, object, key, '0'));
    if (value >= low && value <= high && (multiple == 0 || fmod(value, (double)multiple) == 0)) {
        return value;
    }
    refuse("%s: %s is %.12g, expected %.12g to %.12g, a multiple of %d", j->file, key, value, low,
           high, multiple);
}

// A key with one legal value. object: -1 if the key may be missing.
static inline void config_fixed(const Json *j, int object, const char *key, const char *want) {
    int i = json_find(j, object < 0 ? 0 : object, key);
    if (i < 0 && object < 0) { return; }
    const char *have = i < 0 ? "missing" : json_text(j, i);
    int length = i < 0 ? 7 : min_int(j->tok[i].end - j->tok[i].start, 40);
    if ((int)strlen(want) != length || memcmp(have, want, (size_t)length) != 0) {
        refuse("%s: %s is %.*s, expected %s HINT: DeepSeek-V4-Flash can be trained, not its Base "
               "or another model", j->file, key, length, have, want);
    }
}

// Reads dir/config.json. Ends the process on anything but the model this trainer knows.
void config_load(Config *c, const char *dir) {
    const int many = 1 << 20;
    char path[PATH_SIZE];
    Json j;
    json_load(&j, path_make(path, dir, "/", "config.json"), not_a_folder);
    config_fixed(&j, 0, "model_type", "deepseek_v4");
    config_fixed(&j, 0, "expert_dtype", "fp4");         // its Base has them in fp8
    *c = (Config){ .model_type = "deepseek_v4" };
    // A table in two columns: the file's key, our field, and for whole numbers range and multiple.
    #define INT(key, field, low, high, multiple) \
        c->field = (int)config_number(&j, 0, #key, low, high, multiple);
    #define NUMBER(key, field) \
        c->field = (__typeof__(c->field))config_number(&j, 0, #key, 1e-30, 1e9, 0);
    INT(vocab_size, V, 2, 1 << 30, 1)               INT(hidden_size, C, 128, many, 128)
    INT(num_hidden_layers, layers, 1, 128, 1)       INT(o_groups, G, 1, many, 1)
    INT(num_attention_heads, H, 1, many, c->G)      INT(head_dim, D, 128, many, 128)
    INT(q_lora_rank, Q, 128, many, 128)             INT(o_lora_rank, O, 128, many, 128)
    INT(n_routed_experts, E, 1, RUNS_MAX, 1)        INT(num_experts_per_tok, K, 1, c->E, 1)
    INT(moe_intermediate_size, F, 128, many, 128)   INT(n_shared_experts, n_shared, 1, 1, 1)
    INT(num_hash_layers, hash_layers, 0, c->layers, 1)
    INT(sliding_window, window, 1, many, 1)         INT(index_n_heads, index_heads, 1, many, 1)
    INT(index_head_dim, index_dim, 128, many, 128)  INT(index_topk, index_topk, 1, many, 1)
    INT(qk_rope_head_dim, rope_dim, 2, min_int(c->D - 2, c->index_dim), 2)
    INT(hc_sinkhorn_iters, hc_iters, 1, 64, 1)
    INT(max_position_embeddings, max_positions, 1, 1 << 30, 1)
    INT(bos_token_id, bos, 0, c->V - 1, 1)          INT(eos_token_id, eos, 0, c->V - 1, 1)
    NUMBER(rms_norm_eps, norm_eps)                   NUMBER(hc_eps, hc_eps)
    NUMBER(rope_theta, rope_theta)                   NUMBER(compress_rope_theta, compress_theta)
    for (int k = 0, i; k < ROUTE_KEYS; k++) {
        i = json_find(&j, 0, route_keys[k].key);
        routing_set(k, i < 0 ? NULL : json_text(&j, i), "config.json");
    }
    c->how = routing_resolve(&c->norm_topk, &c->route_scale, &c->swiglu_limit, c->E, c->K);
    int yarn = json_get(&j, 0, "rope_scaling", '{');
    c->yarn_factor = config_number(&j, yarn, "factor", 1, 1e9, 0);
    c->beta_slow = config_number(&j, yarn, "beta_slow", 1e-30, 1e9, 0);
    c->beta_fast = config_number(&j, yarn, "beta_fast", 1.01 * c->beta_slow, 1e9, 0);
    c->original_positions = config_number(&j, yarn, "original_max_position_embeddings", 1, 1e9, 1);
    config_fixed(&j, yarn, "type", "yarn");         config_fixed(&j, 0, "hc_mult", "4");
    config_fixed(&j, 0, "num_key_value_heads", "1");
    config_fixed(&j, -1, "hidden_act", "silu");
    config_fixed(&j, -1, "tie_word_embeddings", "false");
    config_fixed(&j, -1, "attention_bias", "false");
    int quantization = json_get(&j, 0, "quantization_config", '{');
    config_fixed(&j, quantization, "quant_method", "fp8");
    config_fixed(&j, quantization, "fmt", "e4m3");
    config_fixed(&j, quantization, "scale_fmt", "ue8m0");
    int block = json_get(&j, quantization, "weight_block_size", '[');
    if (j.tok[block].size != 2 || json_size(&j, block + 1) != FP8_BLOCK ||
        json_size(&j, block + 2) != FP8_BLOCK) {
        refuse("%s: weight_block_size is not [%d, %d]", path, FP8_BLOCK, FP8_BLOCK);
    }
    int ratios = json_get(&j, 0, "compress_ratios", '['), n = j.tok[ratios].size;
    if (n < c->layers) { refuse("%s: %d compress_ratios for %d layers", path, n, c->layers); }
    for (int l = 0; l < c->layers; l++) {       // more are fine: they belong to the drafter
        size_t ratio = json_size(&j, ratios + 1 + l);
        if (ratio != 0 && ratio != 4 && ratio != 128) {
            refuse("%s: entry %d of compress_ratios is not 0, 4 or 128", path, l);
        }
        c->ratio[l] = (int)ratio;
    }
    json_free(&j);
}

// -------------------------------------------------------------------------------------------------
// 5 Reading a checkpoint
//
// The caller's table says what the model needs, the index which file has it, the file's header what
// it has: all three must agree, name by name, before the first weight is read. A rank reads only
// the tensors that have a pointer, each straight to its place, by all threads. --inspect and
// --dry-run do the same up to the first weight, so they refuse what loading would refuse.

typedef struct {                // a tensor of the model: what the checkpoint must hold, and where
    char name[96];              // it goes. In a table, a matrix is followed by its scales
    int type, ndim;             // DT_*; DT_FP4: dims as in the file, (out, in/2)
    size_t dim[3];
    void *data;                 // NULL: must be there, is not read. DT_I64 is int32 in memory
    float mean, std;            // random base: how its elements are drawn
} Tensor;

typedef struct {                // what all three say about one tensor
    const char *name;
    const Tensor *t;
    const char *file;           // NULL: not in the index
    const Safetensors *shard;
    const Entry *entry;
} Want;

typedef struct {                // a checkpoint whose index and headers fit the caller's table
    Want *want;                 // (n) sorted by name
    Safetensors *shard;         // (shards) the files they lie in
    int shards;
    size_t n, drafter;          // tensors of the model; of its drafter, which the index has as well
    Json index;                 // owns the names of the files
    char path[PATH_SIZE];       // of the index
} Checkpoint;

// The drafter helps inference. It is not trained, and its tensors are not looked at.
static inline int of_drafter(const char *name) { return strncmp(name, "mtp.", 4) == 0; }

static inline Want *wants_find(Want *want, size_t n, const char *name) {
    Want key = { .name = name };
    return (Want *)bsearch(&key, want, n, sizeof key, by_name);
}

// Takes the file of every tensor from the index.
static inline void wants_place(Checkpoint *c) {
    Json *j = &c->index;
    json_load(j, c->path, not_a_folder);
    int map = json_get(j, 0, "weight_map", '{');
    for (int k = 0, i = map + 1; k < j->tok[map].size; k++, i = json_next(j, i + 1)) {
        const char *name = json_text(j, i), *file = json_text(j, i + 1);
        Want *w = wants_find(c->want, c->n, name);
        if (of_drafter(name)) { c->drafter++; continue; }
        if (w == NULL || w->file || json_kind(j, i + 1) != '"') {
            refuse("%s: %s is %s %s", c->path, name, w == NULL ? "not in the model" : w->file
                   ? "there twice" : "in no file", mixed);
        }
        w->file = file;
    }
    for (const Want *w = c->want; w < c->want + c->n; w++) {
        if (w->file == NULL) { refuse("%s: %s is missing %s", c->path, w->name, mixed); }
    }
}

// Opens the files and finds every tensor in its own, and no other tensor in any.
static inline void wants_open(Checkpoint *c, const char *dir) {
    char path[PATH_SIZE], have[120], need[120];
    c->shard = (Safetensors *)host_alloc(c->n * sizeof *c->shard);      // at most one each
    for (Want *w = c->want; w < c->want + c->n; w++) {
        int s = 0;
        path_make(path, dir, "/", w->file);
        while (s < c->shards && strcmp(c->shard[s].path, path) != 0) { s++; }
        if (s == c->shards) { safetensors_open(&c->shard[c->shards++], path, not_a_folder); }
        const Tensor *t = w->t;
        const Entry *e = safetensors_find(&c->shard[s], t->name);
        w->shard = &c->shard[s];
        w->entry = e;
        if (e == NULL) { refuse("%s: the index places %s in it %s", path, t->name, mixed); }
        int same = e->ndim == t->ndim;
        for (int d = 0; same && d < t->ndim; d++) { same = e->dim[d] == t->dim[d]; }
        same &= e->type == t->type || (t->type == DT_I64 && e->type == DT_I32);
        if (!same) {
            refuse("%s: %s is %s, expected %s %s", path, t->name,
                   shape_text(have, e->dtype, e->ndim, e->dim),
                   shape_text(need, dtype_of(t->type), t->ndim, t->dim), mixed);
        }
    }
    for (const Safetensors *s = c->shard; s < c->shard + c->shards; s++) {
        for (const Entry *e = s->entry; e < s->entry + s->n; e++) {
            const Want *w = wants_find(c->want, c->n, e->name);
            if ((w == NULL && !of_drafter(e->name)) || (w && w->shard != s)) {
                refuse("%s: %s is in this file, the index %s %s", s->path, e->name,
                       w ? "names another for it" : "does not know it", mixed);
            }
        }
    }
}

// Has dir an index or any file of weights, whole or not? config.json alone is enough for a plan.
static inline int checkpoint_begun(const char *dir) {
    DIR *d = opendir(dir);
    int begun = d == NULL;              // opening it then says why
    for (struct dirent *e; d && (e = readdir(d)) != NULL;) {
        begun |= strstr(e->d_name, ".safetensors") != NULL;
    }
    if (d) { closedir(d); }
    return begun;
}

// Reads the index and the headers of the checkpoint in dir, which must hold exactly the n tensors
// of the table (mtp.* aside). Anything else ends the process with one line. No weight is read.
static inline void checkpoint_open(Checkpoint *c, const char *dir, const Tensor *t, size_t n) {
    *c = (Checkpoint){ .want = (Want *)host_calloc(n * sizeof(Want)), .n = n };
    for (size_t i = 0; i < n; i++) { c->want[i] = (Want){ .name = t[i].name, .t = &t[i] }; }
    qsort(c->want, n, sizeof(Want), by_name);
    path_make(c->path, dir, "/", "model.safetensors.index.json");
    wants_place(c);
    wants_open(c, dir);
}

static inline void checkpoint_close(Checkpoint *c) {
    for (int s = 0; s < c->shards; s++) { safetensors_close(&c->shard[s]); }
    free(c->shard);
    free(c->want);
    json_free(&c->index);
}

static inline size_t want_bytes(const Want *w) {
    return w->t->data ? w->entry->end - w->entry->begin : 0;
}

// Reads one tensor, where it is wanted. Returns NULL, or what is wrong.
static inline const char *want_read(const Want *w) {
    const size_t at = w->shard->data + w->entry->begin, n = want_bytes(w);
    const int narrow = w->entry->type == DT_I64;        // int64 in the file, int32 in memory
    if (n == 0) { return NULL; }
    const int aside = narrow || ON_GPU;         // not read where it is wanted
    int64_t *wide = (int64_t *)(aside ? host_alloc(n) : w->t->data);
    int error = file_pread(w->shard->fd, wide, n, at);
    if (error) { return strerror(error); }
    if (w->t->type == DT_E8M0 && memchr(wide, 255, n)) { return "holds the e8m0 byte 255, a NaN"; }
    for (size_t k = 0; k < n / 8 && narrow; k++) {      // in place, front to back
        int32_t value = (int32_t)(wide[k] < 0 || wide[k] > INT32_MAX ? -1 : wide[k]);
        memcpy((char *)wide + 4 * k, &value, 4);
    }
    if (aside) {
        upload(w->t->data, wide, narrow ? n / 2 : n);
        free(wide);
    }
    return NULL;
}

// A line every two seconds on rank 0, so that long work can be told from a hang.
static inline void progress(const char *what, size_t done, size_t total, double start,
                            double *last) {
    double now = clock_seconds();
    if (comm_rank() != 0 || now - *last < 2) { return; }
    *last = now;
    printf("%-6s %.2f of %.2f GB | %.1f s | %.2f GB/s\n", what, done / 1e9, total / 1e9,
           now - start, done / 1e9 / fmax(now - start, 1e-9));
    fflush(stdout);
}

// Reads all tensors that have a pointer. Of several that fail, the first one is reported.
static inline void wants_read(Want *want, size_t n) {
    double start = clock_seconds(), last = start;
    size_t total = 0, done = 0, bad = n;
    const char *error = NULL;
    for (size_t i = 0; i < n; i++) { total += want_bytes(&want[i]); }
    #pragma omp parallel for schedule(dynamic)
    for (size_t i = 0; i < n; i++) {
        const char *failed = want_read(&want[i]);
        #pragma omp critical
        {
            if (failed && i < bad) { bad = i; error = failed; }
            done += want_bytes(&want[i]);
            progress("load", done, total, start, &last);
        }
    }
    if (error) { refuse("%s: %s %s %s", want[bad].shard->path, want[bad].name, error, damaged); }
    last = 0;
    if (total > 0) { progress("load", total, total, start, &last); }
}

// The experts of each token in a hash table (V,K): all of them below E, no two the same.
static inline void experts_check(const Tensor *t, const Want *gate, const char *dir) {
    const int32_t *table = (const int32_t *)host_view(t->data, 4 * t->dim[0] * t->dim[1]);
    size_t E = gate ? gate->t->dim[0] : INT32_MAX, K = t->dim[1];
    for (size_t i = 0; i < t->dim[0] * K; i++) {
        size_t k = i - i % K;
        while (k < i && table[k] != table[i]) { k++; }
        if (k < i || table[i] < 0 || (size_t)table[i] >= E) {
            refuse("%s: %s names expert %d for token %zu, %s %s", dir, t->name, table[i], i / K,
                   k < i ? "twice" : "which does not exist", damaged);
        }
    }
    host_view_end(table, t->data);
}

// Reads the checkpoint in dir into the n tensors of the table, and prints how fast.
void checkpoint_load(const char *dir, Tensor *t, size_t n) {
    char gate[104];
    Checkpoint c;
    checkpoint_open(&c, dir, t, n);
    wants_read(c.want, n);
    for (size_t i = 0; i < n; i++) {
        const char *leaf = strstr(t[i].name, "tid2eid");        // gate.tid2eid, beside gate.weight
        if (leaf == NULL || t[i].data == NULL || t[i].ndim != 2) { continue; }
        snprintf(gate, sizeof gate, "%.*sweight", (int)(leaf - t[i].name), t[i].name);
        experts_check(&t[i], wants_find(c.want, n, gate), dir);
    }
    checkpoint_close(&c);
}

// -------------------------------------------------------------------------------------------------
// 6 Do the scales fit?
//
// A weight matrix of a trained network has elements of the order of 1/sqrt(in), whatever it is. If
// its scales were lost, or read as another type, they are off by powers of two: mean |w| sqrt(in)
// is then in the hundreds, where 0.8 is usual. Several loaders have done that without a word.

enum { SCALE_ROWS = 16 };       // looked at per matrix, spread evenly

// mean |w| of a quantised matrix with C columns. Row and scales alone leave the GPU: all matrices
// of a rank are tens of GB, the rows looked at some 1 %.
static inline double mean_magnitude(const Tensor *w, const void *scale, int C) {
    const int fp4 = w->type == DT_FP4;
    const size_t O = w->dim[0], rows = O < SCALE_ROWS ? O : SCALE_ROWS, bytes = w->dim[1];
    const size_t steps = (size_t)(fp4 ? C / FP4_BLOCK : ceil_div(C, FP8_BLOCK));
    real *row = (real *)host_alloc((size_t)C * sizeof(real));
    uint8_t *codes = (uint8_t *)host_alloc(bytes + steps), *scales = codes + bytes;
    double sum = 0;
    for (size_t i = 0; i < rows; i++) {
        const size_t o = O * i / rows;
        download(codes, (const uint8_t *)w->data + o * bytes, bytes);
        download(scales, (const uint8_t *)scale + (fp4 ? o : o / FP8_BLOCK) * steps, steps);
        (fp4 ? widen_fp4 : widen_fp8)(row, codes, scales, 0, C);
        for (int c = 0; c < C; c++) { sum += fabs((double)row[c]); }
    }
    free(codes);
    free(row);
    return sum / ((double)rows * C);
}

// A tensor's name without the numbers of its layer and expert, in kind (96).
static inline const char *kind_text(char *kind, const char *name) {
    char *out = kind;
    for (; *name; name++) {
        const size_t digits = *name == '.' ? strspn(name + 1, "0123456789") : 0;
        if (digits > 0) { name += digits; } else { *out++ = *name; }
    }
    *out = 0;
    return kind;
}

// Looks at every quantised matrix that was loaded, and stops at one whose magnitude cannot be. Rank
// 0 prints the first of each kind; in the table, all of a kind follow each other.
void check_scales(const Tensor *t, size_t n) {
    char kind[96], printed[96] = "";
    for (size_t i = 0; i < n; i++) {
        int fp4 = t[i].type == DT_FP4, C = (int)t[i].dim[1] << fp4;
        if (t[i].data == NULL || (t[i].type != DT_FP8 && !fp4)) { continue; }
        require(i + 1 < n && t[i + 1].type == DT_E8M0 && t[i + 1].data && t[i].ndim == 2);
        double mean = mean_magnitude(&t[i], t[i + 1].data, C), relative = mean * sqrt((double)C);
        if (!(relative >= 0.05 && relative <= 20)) {
            refuse("%s: mean |w| is %.3g, times sqrt(in) %.3g, expected 0.05 to 20 HINT: its "
                   "scales are not those it was quantised with", t[i].name, mean, relative);
        }
        if (comm_rank() != 0 || strcmp(kind_text(kind, t[i].name), printed) == 0) { continue; }
        strcpy(printed, kind);
        printf("scales %-37s mean |w| %.4f, times sqrt(in) %.2f\n", t[i].name, mean, relative);
    }
}
#endif // CHECKPOINT_C
