// prep.c: text and conversations into tokens, and tokens into rows.
//
// The trainer includes this file, so that `./train -i chat.jsonl` needs no step in between. For
// data that is used more than once, or too large to be encoded at every start, it is a tool too,
// which writes the same documents to a token file:
//
//     cc -O2 -DPREP_MAIN -I.deps/usr/include dev/data/prep.c -o prep -lm
//     ./prep DIR chat.jsonl chat.bin [assistant|last|completion|all] [skip]
//
// DIR is the model's folder; skip leaves bad rows out, as --skip-bad-rows does.
//
// Contents
//   1 files into documents      2 packing      3 the order of rows      4 the tool
#ifndef PREP_C
#define PREP_C
#include "chat.c"           // defines: Row, row_encode, TOKEN_*; below it Tokenizer, file_open
#include <glob.h>

// -------------------------------------------------------------------------------------------------
// 1 Files into documents
//
//     files -> documents -> pieces of at most t tokens -> rows -> steps -> micro-batches
//
// A row is a list of whole pieces that together have at most t tokens. It is never padded: a Batch
// is documents, one after the other, and nothing else, so a row that is 95 % full costs 95 %. The
// rows form one global sequence that is fixed by the data, t and the shuffle seed.

typedef struct {                // a document, or one row's length of a long one
    const uint32_t *token;      // into the mapped file
    int length, labels;         // labels: tokens 1 .. length-1 that have the bit
} Piece;

typedef struct {
    int V, t, pack, shuffle;    // vocabulary, row length, --pack exact, not --no-shuffle
    uint64_t seed;              // --shuffle-seed
    Tokenizer *tokenizer;       // of .txt and .jsonl
    int loss_on, skip_bad_rows; // --loss-on, --skip-bad-rows
    size_t documents, tokens, labels, truncated, pieces, capacity;
    uint64_t hash;              // of all tokens, in file order
    size_t bad, unlabelled, spelled;        // rows skipped, without labels, with control tokens
    size_t texts;               // documents that are cut where they are long, not truncated
    Piece *piece;               // (pieces) in file order
    // The plan of one epoch: row i is the pieces order[row[i]] .. order[row[i + 1] - 1].
    int epoch;
    size_t rows, next;          // next: the row that data_take takes next
    uint32_t *order, *row;      // (pieces), (pieces + 1)
} Data;

typedef struct {                // rows of one step in global order: the same on every rank
    int rows, epoch;            // epoch: of the first of them
    int *first;                 // (rows + 1) row j is piece[first[j]] .. piece[first[j + 1] - 1]
    Piece *piece;
    size_t tokens, labels;      // of all rows
} Rows;

// Cuts one document into pieces. Text goes on in the next piece, whose first token is then known
// but not predicted. Of a conversation that is too long the rest is dropped, and counted: without
// its beginning it would teach nonsense. One that has no label within t is left out, and counted. A
// single token predicts nothing, and could yet be a step of its own: it is left out as well.
// Returns whether the document is in.
static inline int data_add_document(Data *d, const uint32_t *token, size_t length, int kind) {
    size_t t = (size_t)d->t, labels = 0;
    for (size_t i = 1; i < length && i < t; i++) { labels += (token[i] & TOKEN_LABEL) != 0; }
    if (labels == 0 && (kind == BIN_CHAT || length < 2)) { d->unlabelled++; return 0; }
    d->documents++;
    d->texts += kind == BIN_TEXT;
    if (kind == BIN_CHAT && length > t) {
        d->truncated++;
        length = t;
    }
    for (size_t at = 0; at < length; at += t) {
        Piece p = { token + at, (int)(length - at < t ? length - at : t), 0 };
        for (int i = 0; i < p.length; i++) {
            p.labels += i > 0 && p.token[i] & TOKEN_LABEL;
            d->hash = (d->hash ^ p.token[i]) * 0x100000001B3;       // FNV-1a
        }
        if (p.length < 2) { continue; }
        d->tokens += (size_t)p.length;
        d->labels += (size_t)p.labels;
        if (d->pieces == d->capacity) {
            d->capacity = d->capacity ? 2 * d->capacity : 1024;
            d->piece = (Piece *)realloc(d->piece, d->capacity * sizeof(Piece));
            if (d->piece == NULL || d->capacity > UINT32_MAX) {
                die(EXIT_FIT, "no memory for the index of %zu documents", d->documents);
            }
        }
        d->piece[d->pieces++] = p;
    }
    return 1;
}

// Adds the documents of one file's tokens, which stay where they are. Every id is checked here,
// once: after this the embedding is read without looking.
static inline void data_add_tokens(Data *d, const char *path, const uint32_t *token, size_t n,
                                   int kind) {
    size_t start = 0;
    refuse_if(n > 0 && !(token[0] & TOKEN_FIRST), "%s: token 0 does not begin a document (bit 30 "
              "is not set)", path);
    for (size_t i = 0; i < n; i++) {
        refuse_if((token[i] & TOKEN_ID) >= (uint32_t)d->V, "%s: token %zu has id %u, the "
                  "vocabulary has %d", path, i, token[i] & TOKEN_ID, d->V);
        if (!(token[i] & TOKEN_FIRST)) { continue; }
        refuse_if(token[i] & TOKEN_LABEL, "%s: token %zu begins a document and is a label, but "
                  "nothing of its document comes before it", path, i);
        if (i > start) { data_add_document(d, token + start, i - start, kind); }
        start = i;
    }
    if (n > start) { data_add_document(d, token + start, n - start, kind); }
}

// A token file is a header of 256 int32 (magic, version, vocabulary, count mod 2^31, count / 2^31,
// kind, zeros) and one token after the other, little-endian, as this machine is.
enum { BIN_MAGIC = 20260424, BIN_VERSION = 1, BIN_HEADER = 1024 };

static inline void data_add_bin(Data *d, const char *path) {
    size_t size;
    int file = file_open(path, &size, "-i and -j name data files");
    refuse_if(size < BIN_HEADER, "%s: %zu bytes, but a token file begins with a header of %d", path,
              size, BIN_HEADER);
    const int32_t *h = (const int32_t *)mmap(NULL, size, PROT_READ, MAP_PRIVATE, file, 0);
    refuse_if(h == MAP_FAILED, "cannot map %s: %s", path, strerror(errno));
    close(file);                // the mapping stays
    refuse_if(h[0] != BIN_MAGIC || h[1] != BIN_VERSION, "%s: magic %d, version %d, expected %d, "
              "%d: not a token file", path, h[0], h[1], BIN_MAGIC, BIN_VERSION);
    refuse_if(h[2] != d->V, "%s: made for a vocabulary of %d, the model has %d HINT: encode the "
              "text with this model's tokenizer", path, h[2], d->V);
    refuse_if(h[3] < 0 || h[4] < 0 || (h[5] != BIN_TEXT && h[5] != BIN_CHAT), "%s: header words 3, "
              "4, 5 are %d, %d, %d: not a count and a kind", path, h[3], h[4], h[5]);
    size_t n = (size_t)h[4] << 31 | (size_t)h[3];
    refuse_if(size != BIN_HEADER + 4 * n, "%s: %zu bytes, but its header says %zu tokens, so %zu "
              "bytes HINT: it was cut short or is still being written", path, size, n,
              BIN_HEADER + 4 * n);
    data_add_tokens(d, path, (const uint32_t *)h + BIN_HEADER / 4, n, h[5]);
}

// The whole of a data file, with a 0 behind it. The caller frees it.
static inline char *data_read(const char *path, size_t *size) {
    int file = file_open(path, size, "-i and -j name data files");
    char *text = (char *)host_alloc(*size + 1);
    int error = file_pread(file, text, *size, 0);
    if (error) { die(EXIT_USAGE, "cannot read %s: %s", path, strerror(error)); }
    close(file);
    text[*size] = 0;
    return text;
}

// Reads a file as one document: BOS, its text, EOS. Returns n tokens; the caller frees them.
static inline uint32_t *text_tokens(const char *path, Tokenizer *t, size_t *n) {
    size_t size;
    char *text = data_read(path, &size);
    Tokens out = { .n = 0 };
    double start = clock_seconds(), told = start;
    tokens_add(&out, t->control[CONTROL_BOS] | TOKEN_FIRST);
    for (size_t at = 0, next; at < size; at = next) {
        // In chunks, so that there is progress to tell. No piece goes over a line break behind
        // which something other than a blank stands, so that is where a text can be cut.
        for (next = at + (1 << 20); next < size; next++) {
            unsigned char c = (unsigned char)text[next];
            if (text[next - 1] == '\n' && c > ' ' && c < 127) { break; }
        }
        next = next < size ? next : size;
        tokenizer_encode(t, &out, text + at, next - at, TOKEN_LABEL);
        progress("data", next, size, start, &told);
    }
    tokens_add(&out, t->control[CONTROL_EOS] | TOKEN_LABEL);
    free(text);
    *n = out.n;
    return out.token;
}

// Adds the documents of a file of JSON, one per line. A row that cannot be used ends the process,
// or is left out and counted, the first few by name.
enum { BAD_SHOWN = 10 };
static inline void data_add_jsonl(Data *d, const char *path) {
    size_t size, number = 1;
    char *text = data_read(path, &size);
    Row r = { .t = d->tokenizer, .loss_on = d->loss_on };
    double start = clock_seconds(), told = start;
    for (size_t at = mark_size(text, size), next; at < size; at = next + 1, number++) {
        char *end = (char *)memchr(text + at, '\n', size - at);
        next = end ? (size_t)(end - text) : size;
        if (strspn(text + at, " \t\r") >= next - at) { continue; }
        int kind = row_encode(&r, text + at, next - at);
        refuse_if(r.wrong[0] && !d->skip_bad_rows, "%s:%zu: %s HINT: --skip-bad-rows leaves such "
                  "rows out (of prep: skip, as the last word)", path, number, r.wrong);
        if (r.wrong[0]) {
            if (d->bad++ < BAD_SHOWN && this_rank == 0) {
                printf("data   %s:%zu is left out: %s\n", path, number, r.wrong);
            }
            continue;
        }
        if (r.spelled && d->spelled++ == 0 && this_rank == 0) {
            printf("data   %s:%zu has a control token in its text: such text is taken as it is "
                   "written\n", path, number);
        }
        uint32_t *token = (uint32_t *)host_alloc(r.out.n * sizeof *token);
        memcpy(token, r.out.token, r.out.n * sizeof *token);
        if (!data_add_document(d, token, r.out.n, kind)) { free(token); }
        progress("data", next, size, start, &told);
    }
    row_free(&r);
    free(text);
}

// --loss-on as a number.
static inline int loss_on_word(const char *word) {
    static const char *const words[] = { "assistant", "last", "completion", "all" };
    for (int i = 0; i <= LOSS_ALL; i++) {
        if (strcmp(word, words[i]) == 0) { return i; }
    }
    die(EXIT_USAGE, "'%s' is none of assistant, last, completion, all", word);
}

// Writes a prompt's tokens, unless token is NULL, and returns how many: BOS and the text. A prompt
// that begins with { is a row as data has them, whose conversation ends where an answer is due.
static inline int prompt_tokens(int *token, const char *prompt, Tokenizer *t, const Config *c) {
    Row r = { .t = t };
    if (*prompt == '{') {
        row_encode(&r, prompt, strlen(prompt));
        refuse_if(r.wrong[0], "--prompt: %s HINT: before a text that begins with { put a blank",
                  r.wrong);
        refuse_if((r.out.token[r.out.n - 1] & TOKEN_ID) == (uint32_t)c->eos, "--prompt: this row "
                  "is complete HINT: one with messages that ends with a question");
    } else {
        tokens_add(&r.out, (uint32_t)c->bos);
        if (t->n) { tokenizer_encode(t, &r.out, prompt, strlen(prompt), 0); }
    }
    for (size_t i = 0; token && i < r.out.n; i++) { token[i] = (int)(r.out.token[i] & TOKEN_ID); }
    const int n = (int)r.out.n;
    row_free(&r);
    return n;
}

// Adds every file that the pattern names, in the order of their names.
static inline void data_add(Data *d, const char *pattern) {
    char *own = (char *)pattern;
    glob_t found = { .gl_pathc = 1, .gl_pathv = &own };
    int literal = access(pattern, F_OK) == 0;   // a name may have brackets, and mean itself
    refuse_if(!literal && glob(pattern, 0, NULL, &found) != 0, "no file matches %s", pattern);
    for (size_t i = 0; i < found.gl_pathc; i++) {
        const char *path = found.gl_pathv[i], *dot = strrchr(path, '.') ? strrchr(path, '.') : "";
        int is_text = strcmp(dot, ".txt") == 0, is_rows = strcmp(dot, ".jsonl") == 0;
        refuse_if((is_text || is_rows) && d->tokenizer->n == 0, "%s: this model has no "
                  "tokenizer.json beside its config.json HINT: it is part of the release; or a "
                  "token file, .bin", path);
        if (strcmp(dot, ".bin") == 0) {
            data_add_bin(d, path);
        } else if (is_text) {
            size_t n;
            const uint32_t *token = text_tokens(path, d->tokenizer, &n);
            data_add_tokens(d, path, token, n, BIN_TEXT);
        } else if (is_rows) {
            data_add_jsonl(d, path);
        } else {
            die(EXIT_USAGE, "%s is no .bin, .jsonl or .txt file", path);
        }
    }
    if (!literal) { globfree(&found); }
    refuse_if(d->labels == 0, "%s: nothing to learn from: %zu bad rows, %zu without labels in "
              "their first %d tokens%s", pattern, d->bad, d->unlabelled, d->t,
              d->unlabelled ? " HINT: a larger -t, if these rows have answers" : "");
}

// The path of a file that lies in the folder of the program.
static inline char *beside_program(char *path, const char *name) {
    char folder[PATH_SIZE];
    ssize_t length = readlink("/proc/self/exe", folder, sizeof folder - 1);
    folder[length > 0 ? length : 0] = 0;
    char *slash = strrchr(folder, '/');
    if (slash) { *slash = 0; }
    return path_make(path, slash ? folder : ".", "/", name);
}

// The built-in model, a checkpoint that has read English (dev/ref/make_tiny.py). Without jsmn.h it
// cannot be read: NULL, and the weights are random ones.
static inline const char *tiny_folder(char *path) {
#ifdef HAVE_JSMN
    refuse_if(access(beside_program(path, "dev/data/tiny"), R_OK) != 0, "%s is missing: the "
              "built-in model lies beside the program HINT: --random-base begins with random "
              "weights", path);
    return path;
#else
    if (this_rank == 0) {
        printf("load   the built-in model begins with random weights: built without jsmn.h HINT: "
               "make deps && make\n");
    }
    return path[0] = 0, NULL;
#endif
}

// Without -i the tiny model learns this project's own source, which lies beside the program. The
// last 5 % of each file are held out for validation.
static inline void data_add_own_text(Data *train, Data *val) {
    static const char *const files[] = {
        "kernels.cu", "fp8.c", "mxfp4.c", "lora.c", "moe.c", "refit.c", "train.c" };
    char path[PATH_SIZE];
    for (size_t i = 0; i < sizeof files / sizeof files[0]; i++) {
        beside_program(path, files[i]);
        refuse_if(access(path, R_OK) != 0, "%s is missing: without -i the tiny model learns the "
                  "source that lies beside the program HINT: -i FILE.txt", path);
        size_t n;
        uint32_t *token = text_tokens(path, train->tokenizer, &n), *tail = token + n - n / 20 - 1;
        *tail = (*tail & TOKEN_ID) | TOKEN_FIRST;
        data_add_tokens(train, path, token, (size_t)(tail - token), BIN_TEXT);
        data_add_tokens(val, path, tail, n / 20 + 1, BIN_TEXT);
    }
}

// For --bench without -i: documents of one row each, of random ids.
static inline void data_add_random(Data *d, size_t rows, uint64_t seed) {
    uint32_t *token = (uint32_t *)host_alloc(rows * d->t * sizeof *token);
    uint64_t key = random_key(seed, "random data");
    for (size_t i = 0; i < rows * d->t; i++) {
        token[i] = (uint32_t)(random_bits(key, i) % (uint64_t)d->V)
                 | (i % d->t ? TOKEN_LABEL : TOKEN_FIRST);
    }
    data_add_tokens(d, "random data", token, rows * d->t, BIN_TEXT);
}

// -------------------------------------------------------------------------------------------------
// 2 Packing

// Fills rows for one epoch. Next-fit: a piece that does not fit closes the row. It looks at each
// piece once, keeps their order, and leaves little empty when documents are short.
static inline void data_plan(Data *d, int epoch) {
    if (d->order == NULL) {
        d->order = (uint32_t *)host_alloc(d->pieces * sizeof *d->order);
        d->row = (uint32_t *)host_alloc((d->pieces + 1) * sizeof *d->row);
    }
    for (size_t i = 0; i < d->pieces; i++) { d->order[i] = (uint32_t)i; }
    uint64_t key = random_key(d->seed + (uint64_t)epoch, "order of documents");
    for (size_t i = d->pieces; d->shuffle && i > 1; i--) {      // Fisher and Yates
        size_t j = random_bits(key, i) % i;
        uint32_t keep = d->order[i - 1];
        d->order[i - 1] = d->order[j];
        d->order[j] = keep;
    }
    int used = 0;
    d->rows = 0;
    for (size_t i = 0; i < d->pieces; i++) {
        int length = d->piece[d->order[i]].length;
        if (i == 0 || !d->pack || used + length > d->t) {
            d->row[d->rows++] = (uint32_t)i;
            used = 0;
        }
        used += length;
    }
    d->row[d->rows] = (uint32_t)d->pieces;
    d->epoch = epoch;
    d->next = 0;
}

// -------------------------------------------------------------------------------------------------
// 3 The order of rows

// Goes to that row of the whole sequence, which runs through all epochs.
static inline void data_seek(Data *d, size_t row) {
    if (d->epoch != 0 || d->order == NULL) { data_plan(d, 0); }
    while (row > d->rows) {             // not >=: data_take goes over the end of an epoch itself
        row -= d->rows;
        data_plan(d, d->epoch + 1);
    }
    d->next = row;
}

// Rows in that many epochs; a fraction counts the rows of its epoch.
static inline size_t data_rows(Data *d, double epochs) {
    size_t rows = 0;
    for (int e = 0; e < epochs; e++) {
        data_plan(d, e);
        rows += epochs - e >= 1 ? d->rows : (size_t)ceil((epochs - e) * (double)d->rows);
    }
    return rows;
}

static inline void rows_alloc(Rows *s, int rows, int t) {
    s->first = (int *)host_alloc(((size_t)rows + 1) * sizeof *s->first);
    s->piece = (Piece *)host_alloc((size_t)rows * t * sizeof *s->piece);    // all of one token
}

// Takes the next rows. At the end of the data the next epoch begins, or there are fewer of them.
static inline void data_take(Data *d, Rows *s, int rows, int wrap) {
    int pieces = 0;
    s->tokens = s->labels = 0;
    for (s->rows = 0; s->rows < rows; s->rows++) {
        if (d->next == d->rows && !wrap) { break; }
        if (d->next == d->rows) { data_plan(d, d->epoch + 1); }
        if (s->rows == 0) { s->epoch = d->epoch; }
        s->first[s->rows] = pieces;
        for (uint32_t i = d->row[d->next]; i < d->row[d->next + 1]; i++) {
            s->piece[pieces] = d->piece[d->order[i]];
            s->tokens += (size_t)s->piece[pieces].length;
            s->labels += (size_t)s->piece[pieces++].labels;
        }
        d->next++;
    }
    s->first[s->rows] = pieces;
}

// -------------------------------------------------------------------------------------------------
// 4 The tool

#ifdef PREP_MAIN
// Writes every document of d as one token file, which says how those that are too long are treated.
static void write_bin(const Data *d, const char *path, int kind) {
    int32_t h[256] = { BIN_MAGIC, BIN_VERSION, d->V, (int32_t)(d->tokens & 0x7FFFFFFF),
                       (int32_t)(d->tokens >> 31), kind };
    char temporary[PATH_SIZE];      // what is there stays until this is whole; not of a device
    struct stat there;
    const int plain = stat(path, &there) != 0 || S_ISREG(there.st_mode);
    FILE *f = fopen(path_make(temporary, path, plain ? ".tmp" : "", ""), "wb");
    int good = f && fwrite(h, sizeof h, 1, f) == 1;
    for (size_t i = 0; good && i < d->pieces; i++) {
        size_t n = (size_t)d->piece[i].length;
        good = fwrite(d->piece[i].token, 4, n, f) == n;
    }
    if (f == NULL || fclose(f) != 0 || !good || (plain && rename(temporary, path) != 0)) {
        const int error = errno;
        if (plain) { unlink(temporary); }
        die(EXIT_FIT, "cannot write %s: %s", path, strerror(error));
    }
}

int main(int argc, char **argv) {
    static Config c;
    Tokenizer t;
    Data d = { .tokenizer = &t, .t = INT_MAX };
    if (argc > 4 && strcmp(argv[argc - 1], "skip") == 0) { d.skip_bad_rows = 1; argc--; }
    refuse_if(argc < 4 || argc > 5, "usage: prep DIR INPUT OUTPUT.bin "
              "[assistant|last|completion|all] [skip]");
    glob_t in;
    struct stat out, one;
    if (stat(argv[3], &out) == 0 && glob(argv[2], GLOB_NOCHECK, NULL, &in) == 0) {
        for (size_t i = 0; i < in.gl_pathc; i++) {
            refuse_if(stat(in.gl_pathv[i], &one) == 0 && one.st_dev == out.st_dev &&
                      one.st_ino == out.st_ino, "%s would be its own input HINT: another name",
                      argv[3]);
        }
        globfree(&in);
    }
    d.loss_on = argc > 4 ? loss_on_word(argv[4]) : LOSS_ASSISTANT;
    config_load(&c, argv[1]);
    tokenizer_open(&t, &c, argv[1]);
    d.V = c.V;
    data_add(&d, argv[2]);
    refuse_if(d.texts > 0 && d.texts < d.documents,
              "%s: %zu documents are text, %zu are not, but a token file holds one kind "
              "HINT: two files", argv[2], d.texts, d.documents - d.texts);
    write_bin(&d, argv[3], d.texts ? BIN_TEXT : BIN_CHAT);
    printf("data   %s: %zu documents, %zu tokens, %zu labels; left out: %zu bad rows, %zu without "
           "labels\n", argv[3], d.documents, d.tokens, d.labels, d.bad, d.unlabelled);
    return 0;
}
#endif
#endif // PREP_C
