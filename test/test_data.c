// Tests of train.c's parts 9 to 12 and of prep.c: packing and the order of rows, token files,
// options, logs, and the loop end to end on the built-in model, in children that fork. Each was
// seen to fail on broken copies of what it tests, 72 in all:
//   packing     a piece of t + 1 tokens; next-fit with >=; the last piece of an epoch dropped; the
//               same order in every epoch; no shuffling; --pack off ignored; chat not truncated;
//               a cut piece's first token counted as a label
//   batches     row j to rank j / b; micro-batch m from row m; a target that crosses a piece's end;
//               the label bit ignored; micro-batches rounded down
//   sequence    the end of the data not wrapped; data_seek one row late; half an epoch rounded down
//   files       each of ten checks of a token file left out; the count's high word ignored; ids
//               compared with >; text without EOS, or widened from its end
//   options     sources of any strength; the first name instead of the nearest; -nvalue not split;
//               d not checked; a COUNT of 0; a word's beginning for the word; --ep = --ranks; lines
//               of a file counted from 0
//   logs        %g for %.9g; two values swapped; rewind one line short; a line cut short kept; a
//               draw without its temperature
//   steps       gradients not zeroed; a divisor of this rank's, or this micro-batch's labels; dense
//               or expert gradients, or the experts' norm, not added up, or over the wrong ranks;
//               the norm logged after clipping; the last step as long as the others; AdamW's count
//               from 2; --overfit ignored; val_loss not weighted, or of one batch
//   resume      data not sought; moments lost; --reset-optim keeping them; other options, or data,
//               accepted; -l ignored; old lines kept; --init-adapter with another r
//   ends        a stop, or one that is not saved; a NaN ignored; OUT not moved, or all of it
//   nonfinite   the check after the update, or none of the sum; second moments not read, or those
//               of a neighbour among a rank's experts
//   cc -std=gnu11 -O2 -fopenmp -Wall -Wextra test/test_data.c -o test_data -lm && ./test_data
#define TESTING
#include "../train.c"
#include "check.h"
#include <float.h>
#if defined(HAVE_STB_IMAGE_WRITE) && __has_include(<stb/stb_image.h>)
#define HAVE_STB_IMAGE
#define STB_IMAGE_IMPLEMENTATION
#define STBI_ONLY_PNG
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wunused-function"
#include <stb/stb_image.h>              // defines: stbi_load
#pragma GCC diagnostic pop
#endif

static char folder[PATH_SIZE];                  // of this test's files

static char *in_folder(const char *name) {
    static char path[8][PATH_SIZE];
    static int at;
    return path_make(path[at++ % 8], folder, "/", name);
}

static void write_file(const char *path, const void *bytes, size_t n) {
    FILE *f = fopen(path, "wb");
    if (f == NULL || fwrite(bytes, 1, n, f) != n || fclose(f) != 0) { perror(path); exit(2); }
}

// The whole file with a 0 behind it; "" if there is none. Never freed.
static char *read_file(const char *path, size_t *n) {
    FILE *f = fopen(path, "rb");
    char *text = calloc(1, 1 << 22);
    *n = f ? fread(text, 1, (1 << 22) - 1, f) : 0;
    if (f) { fclose(f); }
    return text;
}

// -------------------------------------------------------------------------------------------------
// Packing and order. A token's id is its place in the file, so whatever becomes of it, it can be
// told from all others.

enum { MOST = 4000 };
static uint32_t tokens[MOST];
static int doc_of[MOST], doc_begin[MOST];   // of each token: its document, and where that begins

// Documents of 1 to `longest` tokens, 3 of 4 of them labels.
static size_t make_documents(int documents, int longest, uint64_t seed) {
    size_t n = 0;
    for (int d = 0; d < documents; d++) {
        size_t begin = n, length = 1 + random_bits(seed, 2 * d) % longest;
        for (; n < begin + length; n++) {
            tokens[n] = (uint32_t)n | (n == begin ? TOKEN_FIRST
                                       : random_bits(seed, 1000000 + n) % 4 ? TOKEN_LABEL : 0);
            doc_of[n] = d;
            doc_begin[n] = (int)begin;
        }
    }
    return n;
}

// Is a token in the data? Each t tokens of a text are, but for a last one alone; of a conversation
// the first t, if there is a label in them.
static int is_kept(int t, int kind, size_t n, size_t token) {
    size_t first = (size_t)doc_begin[token], labels = 0;
    size_t begin = first + (token - first) / (size_t)t * (size_t)t, i = begin + 1;
    for (; i < n && i < begin + (size_t)t && doc_begin[i] == (int)first; i++) {
        labels += (tokens[i] & TOKEN_LABEL) != 0;
    }
    return kind == BIN_TEXT ? i > begin + 1 : labels > 0 && begin == first;
}

static Data make_data(int t, int pack, int shuffle, int seed, size_t n, int kind) {
    Data d = { .V = MOST, .t = t, .pack = pack, .shuffle = shuffle, .seed = (uint64_t)seed };
    data_add_tokens(&d, "test", tokens, n, kind);
    return d;
}

static Rows make_rows(int rows, int t) {
    Rows s = { .rows = 0 };
    rows_alloc(&s, rows, t);
    return s;
}

// One epoch: every token exactly once, in pieces that lie in one document, in rows that are full.
static void check_epoch(Data *d, int epoch, size_t n, int kind) {
    Rows s = make_rows(1, d->t);
    int seen[MOST] = { 0 }, used = d->t, wrong = 0;
    size_t labels = 0, kept = 0;
    data_plan(d, epoch);
    for (size_t row = 0; row < d->rows; row++) {
        data_take(d, &s, 1, 0);
        int before = used;
        used = 0;
        for (int i = 0; i < s.first[1]; i++) {
            const Piece *p = &s.piece[i];
            size_t begin = (size_t)(p->token - tokens), into = begin - doc_begin[begin];
            int own = 0;
            for (int k = 0; k < p->length; k++) {
                wrong += doc_of[begin + k] != doc_of[begin];
                seen[begin + k]++;
                own += k > 0 && tokens[begin + k] & TOKEN_LABEL;
            }
            wrong += own != p->labels || into % d->t != 0 || (kind == BIN_CHAT && into != 0);
            if (i == 0) { wrong += row > 0 && d->pack && before + p->length <= d->t; }
            used += p->length;
            labels += p->labels;
        }
        wrong += used > d->t || (size_t)used != s.tokens || (!d->pack && s.first[1] != 1);
    }
    for (size_t i = 0; i < n; i++) {
        int want = is_kept(d->t, kind, n, i);
        wrong += seen[i] != want;
        kept += want;
    }
    check(wrong == 0, "t %d pack %d shuffle %d kind %d epoch %d: %d pieces or tokens are wrong",
          d->t, d->pack, d->shuffle, kind, epoch, wrong);
    check(labels == d->labels && kept == d->tokens, "t %d kind %d: %zu of %zu labels, %zu of %zu "
          "tokens", d->t, kind, labels, d->labels, kept, d->tokens);
    data_take(d, &s, 1, 0);
    check(s.rows == 0 && s.labels == 0, "there is a row behind the last one");
}

static void test_packing(void) {
    size_t n = make_documents(100, 60, 7);
    for (int mode = 0; mode < 8; mode++) {
        int t = (int[]){ 2, 16, 59, 100 }[mode % 4], kind = mode / 4 ? BIN_CHAT : BIN_TEXT;
        for (int pack = 0; pack < 2; pack++) {
            Data d = make_data(t, pack, 1, 42, n, kind), still = make_data(t, pack, 0, 42, n, kind);
            size_t long_ones = 0, kept = 0, alone = 0;
            for (size_t i = 0; i < n; i++) {
                int in = is_kept(t, kind, n, doc_begin[i]), into = (int)i - doc_begin[i];
                kept += in && into == 0;
                long_ones += in && into == t;
                alone += !is_kept(t, kind, n, i);
            }
            check(d.documents == kept && d.unlabelled == 100 - kept && kept < 100 && alone > 0,
                  "%zu documents, %zu without labels", d.documents, d.unlabelled);
            check(d.truncated == (kind == BIN_CHAT ? long_ones : 0), "%zu truncated", d.truncated);
            for (int epoch = 0; epoch < 3; epoch++) { check_epoch(&d, epoch, n, kind); }
            check_epoch(&still, 1, n, kind);
            int sorted = 1;
            for (size_t i = 0; i < still.pieces; i++) { sorted &= still.order[i] == i; }
            check(sorted, "--no-shuffle changes the order");
        }
    }
    Data a = make_data(16, 1, 1, 42, n, BIN_TEXT), b = make_data(16, 1, 1, 42, n, BIN_TEXT),
         c = make_data(16, 1, 1, 43, n, BIN_TEXT);
    size_t bytes = a.pieces * sizeof *a.order;
    data_plan(&a, 0); data_plan(&b, 0); data_plan(&c, 0);
    check(memcmp(a.order, b.order, bytes) == 0, "the same seed gives another order");
    check(memcmp(a.order, c.order, bytes) != 0, "another seed gives the same order");
    data_plan(&b, 1);
    check(memcmp(a.order, b.order, bytes) != 0, "two epochs have the same order");
    int moved = 0;
    for (size_t i = 0; i < a.pieces; i++) { moved += a.order[i] != i; }
    check(moved > (int)a.pieces * 9 / 10, "only %d of %zu pieces moved", moved, a.pieces);
}

// Rows of a step, dealt out to ranks and micro-batches: row j to rank j mod ranks, b at a time.
static void test_batches(void) {
    size_t n = make_documents(60, 25, 11);
    Data d = make_data(16, 1, 1, 1, n, BIN_TEXT);       // shorter than many of the documents
    Rows s = make_rows(13, 16);
    Batch x;
    batch_alloc(&x, 4 * 16);
    for (int mode = 0; mode < 24; mode++) {
        int ranks = (int[]){ 1, 2, 4, 8 }[mode % 4], b = (int[]){ 1, 2, 4 }[mode / 4 % 3];
        int rows = mode < 12 ? 13 : 8, wrong = 0, covered[16] = { 0 };
        size_t labels = 0, T = 0;
        data_seek(&d, 3);
        data_take(&d, &s, rows, 1);
        int micro = micro_batches(rows, b, ranks);
        check(micro == (int)ceil((double)rows / (b * ranks)), "%d micro-batches", micro);
        for (int m = 0; m < micro; m++) {
            for (int rank = 0; rank < ranks; rank++) {
                batch_fill(&x, &s, m, b, rank, ranks);
                int doc = 0;
                for (int k = 0; k < b; k++) {
                    int j = (m * b + k) * ranks + rank;     // the k-th row of this micro-batch
                    if (j >= rows) { continue; }
                    covered[j]++;
                    for (int i = s.first[j]; i < s.first[j + 1]; i++, doc++) {
                        const Piece *p = &s.piece[i];
                        int at = x.doc_start[doc];
                        wrong += x.doc_start[doc + 1] - at != p->length;
                        for (int q = 0; q < p->length; q++) {
                            uint32_t next = q + 1 < p->length ? p->token[q + 1] : 0;
                            int want = next & TOKEN_LABEL ? (int)(next & TOKEN_ID) : -1;
                            wrong += x.token[at + q] != (int)(p->token[q] & TOKEN_ID);
                            wrong += x.target[at + q] != want;
                            labels += x.target[at + q] >= 0;
                        }
                    }
                }
                wrong += doc != x.docs || x.doc_start[x.docs] != x.T;
                T += x.T;
            }
        }
        for (int j = 0; j < rows; j++) { wrong += covered[j] != 1; }
        check(wrong == 0, "ranks %d, b %d, %d rows: %d wrong", ranks, b, rows, wrong);
        check(labels == s.labels && T == s.tokens, "ranks %d, b %d: %zu of %zu labels, %zu of %zu "
              "tokens", ranks, b, labels, s.labels, T, s.tokens);
    }
}

// The sequence of rows runs through the epochs, and data_seek finds any of them again.
static void test_sequence(void) {
    enum { ROWS = 130 };
    size_t n = make_documents(100, 20, 3);
    Data d = make_data(32, 1, 1, 5, n, BIN_TEXT);
    Rows s = make_rows(7, 32);
    const uint32_t *begin[ROWS];
    size_t length[ROWS], rows[3];
    data_seek(&d, 0);
    for (int r = 0; r < ROWS; r += 1) {
        data_take(&d, &s, 1, 1);
        begin[r] = s.piece[0].token;
        length[r] = s.tokens;
        if (d.epoch < 3) { rows[d.epoch] = d.rows; }
    }
    check(d.epoch == 3, "%d rows end in epoch %d", ROWS, d.epoch);
    for (int r = ROWS - 7; r >= 0; r -= 3) {
        data_seek(&d, (size_t)r);
        data_take(&d, &s, 7, 1);                // across the end of an epoch too
        int wrong = s.rows != 7;
        size_t sum = 0;
        for (int k = 0; k < 7; k++) {
            wrong += s.piece[s.first[k]].token != begin[r + k];
            sum += length[r + k];
        }
        check(wrong == 0 && sum == s.tokens, "rows %d .. %d: %d are others", r, r + 6, wrong);
        int epoch = ((size_t)r >= rows[0]) + ((size_t)r >= rows[0] + rows[1])
                  + ((size_t)r >= rows[0] + rows[1] + rows[2]);
        check(s.epoch == epoch, "row %d is in epoch %d, not %d", r, s.epoch, epoch);
    }
    check(data_rows(&d, 1) == rows[0] && data_rows(&d, 2) == rows[0] + rows[1], "rows of 1 and 2 "
          "epochs: %zu, %zu", data_rows(&d, 1), data_rows(&d, 2));
    check(data_rows(&d, 1.5) == rows[0] + (rows[1] + 1) / 2, "1.5 epochs: %zu", data_rows(&d, 1.5));
    check(data_rows(&d, 1e-6) == 1, "a millionth of an epoch: %zu rows", data_rows(&d, 1e-6));
}

// -------------------------------------------------------------------------------------------------
// Files

static Tokenizer bytes_tokenizer;

// Adds the files that a pattern names to a Data of vocabulary 300.
static void child_data(void *pattern) {
    Data d = { .V = 300, .t = 8, .pack = 1, .tokenizer = &bytes_tokenizer };
    data_add(&d, pattern);
    fprintf(stderr, "%zu documents %zu tokens %zu labels", d.documents, d.tokens, d.labels);
}

// The right token file with one word changed, or with another length, and what is said of it.
static void test_bin(void) {
    static const struct { int word; uint32_t value; int length; const char *want; } cases[] = {
        {0, BIN_MAGIC, 0, "2 documents 5 tokens 3 labels"},
        {5, BIN_CHAT, 0, "2 documents 5 tokens 3 labels"},
        {0, 20240520, 0, "magic 20240520, version 1"}, {1, 2, 0, "version 2"},
        {2, 129280, 0, "vocabulary of 129280, the model has 300"},
        {3, 6, 0, "1044 bytes, but its header says 6 tokens, so 1048"},
        {4, 1, 0, "says 2147483653 tokens"}, {3, 0xFFFFFFFB, 0, "header words 3, 4, 5 are -5"},
        {5, 2, 0, "5 are 5, 0, 2"}, {0, BIN_MAGIC, 1040, "1040 bytes, but"},
        {0, BIN_MAGIC, 100, "100 bytes, but a token file begins with a header of 1024"},
        {256, 7, 0, "token 0 does not begin a document"},
        {257, 300 | TOKEN_LABEL, 0, "token 1 has id 300, the vocabulary has 300"},
        {258, 0x3FFFFFFF, 0, "token 2 has id 1073741823"},
        {259, TOKEN_FIRST | TOKEN_LABEL | 5, 0, "token 3 begins a document and is a label"},
    };
    static const uint32_t right[5] = { TOKEN_FIRST | 1, TOKEN_LABEL | 299, TOKEN_LABEL | 0,
                                       TOKEN_FIRST | 4, TOKEN_LABEL | 5 };
    char text[2048], *path = in_folder("a.bin");
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        uint32_t file[256 + 5] = { BIN_MAGIC, BIN_VERSION, 300, 5 };
        memcpy(file + 256, right, sizeof right);
        file[cases[i].word] = cases[i].value;
        write_file(path, file, cases[i].length ? (size_t)cases[i].length : sizeof file);
        int code = run_child(child_data, path, text, sizeof text);
        check(strstr(text, cases[i].want) != NULL && code == (i >= 2), "case %zu: exit %d, '%s', "
              "wanted '%s'", i, code, text, cases[i].want);
        if (i >= 2) { check(strstr(text, "a.bin") != NULL, "'%s' does not name the file", text); }
    }
    uint32_t file[256 + 2] = { BIN_MAGIC, BIN_VERSION, 300, 2, [256] = TOKEN_FIRST, [257] = 9 };
    write_file(path, file, sizeof file);
    check(run_child(child_data, path, text, sizeof text) == 1 && strstr(text, "nothing to learn"),
          "no labels: '%s'", text);
    check(run_child(child_data, in_folder("none*.bin"), text, sizeof text) == 1
          && strstr(text, "no file matches"), "no file: '%s'", text);
}

static void test_text(void) {
    char text[2048];
    size_t n;
    unsigned char bytes[300];
    for (int i = 0; i < 300; i++) { bytes[i] = (unsigned char)(i * 7); }
    for (int size = 0; size < 300; size += 23) {
        write_file(in_folder("t.txt"), bytes, (size_t)size);
        uint32_t *token = text_tokens(in_folder("t.txt"), &bytes_tokenizer, &n);
        int wrong = n != (size_t)size + 2 || token[0] != (256 | TOKEN_FIRST)
                 || token[size + 1] != (257 | TOKEN_LABEL);
        for (int i = 0; i < size; i++) { wrong += token[i + 1] != (bytes[i] | TOKEN_LABEL); }
        check(wrong == 0, "a text of %d bytes: %d wrong", size, wrong);
        free(token);
    }
    // Two files in the order of their names; one document each, cut into rows of 8.
    write_file(in_folder("p2.txt"), "0123456789", 10);
    write_file(in_folder("p1.txt"), "abc", 3);
    Data d = { .V = 264, .t = 8, .pack = 0, .tokenizer = &bytes_tokenizer };
    data_add(&d, in_folder("p?.txt"));
    check(d.documents == 2 && d.pieces == 3, "%zu documents, %zu pieces", d.documents, d.pieces);
    check(d.tokens == 17 && d.labels == 4 + 10, "%zu tokens, %zu labels", d.tokens, d.labels);
    check((d.piece[0].token[1] & TOKEN_ID) == 'a' && (d.piece[2].token[0] & TOKEN_ID) == '7',
          "the files are not in the order of their names");
    // A name with brackets is that file, not the one that it matches as a pattern.
    write_file(in_folder("d1.txt"), "abc", 3);
    write_file(in_folder("d[1].txt"), "01234", 5);
    d = (Data){ .V = 264, .t = 8, .tokenizer = &bytes_tokenizer };
    data_add(&d, in_folder("d[1].txt"));
    check(d.documents == 1 && d.tokens == 7, "d[1].txt: %zu documents, %zu tokens", d.documents,
          d.tokens);
    write_file(in_folder("x.csv"), "1\n", 2);
    check(run_child(child_data, in_folder("x.csv"), text, sizeof text) == 1
          && strstr(text, "no .bin, .jsonl or .txt"), "csv: '%s'", text);
    // A character may be spread over tokens; what is none is an escape.
    const int ids[] = { 'a', 0, 200, 257, '\n', 0xE2, 0x82, 0xAC, 0xE2, 'b', 0xF0, -1 };
    char *all = NULL, held[5] = { 0 };
    FILE *f = open_memstream(&all, &n);
    for (int i = 0; i < 12; i++) { token_print(f, &bytes_tokenizer, ids[i], held); }
    fclose(f);
    check(strcmp(all, "a\\x00\\xc8<｜end▁of▁sentence｜>\n€\\xe2b\\xf0") == 0,
          "tokens as text: '%s'", all);
    Tokenizer none = { .n = 0 };
    f = open_memstream(&all, &n);
    token_print(f, &none, 71, held);
    fclose(f);
    check(strcmp(all, "71 ") == 0, "a token without a tokenizer: '%s'", all);
}

static void child_word(void *word) { exit(loss_on_word(word)); }

// Rows: counted, cut or truncated, left out where they teach nothing, refused with their line.
static void test_jsonl(void) {
    static const char rows[] = "{\"text\": \"0123456789\"}\n"
        "\n{\"prompt\": \"abcdefghi\", \"completion\": \"x\"}\r\n"     // nothing learnt in 8 tokens
        "{\"prompt\": \"ab\", \"completion\": \"<think>\"}\n"
        "{\"prompt\": \"a\", \"completion\": \"\"}\nnot JSON\n{\"text\": \"end\"}";
    char text[2048];
    Data d = { .V = 264, .t = 8, .pack = 1, .tokenizer = &bytes_tokenizer, .skip_bad_rows = 1 };
    write_file(in_folder("x.jsonl"), rows, sizeof rows - 1);
    data_add(&d, in_folder("x.jsonl"));
    check(d.documents == 4 && d.pieces == 5 && d.bad == 1 && d.unlabelled == 1 && d.truncated == 1
          && d.spelled == 1,
          "%zu documents, %zu pieces, %zu bad, %zu without labels, %zu truncated, %zu spelled",
          d.documents, d.pieces, d.bad, d.unlabelled, d.truncated, d.spelled);
    check(d.tokens == 12 + 8 + 3 + 5 && d.labels == 7 + 3 + 5 + 1 + 4, "%zu tokens, %zu labels",
          d.tokens, d.labels);
    // The same rows as tokens, longer than t or not: the same documents, rows and counts.
    Data whole = { .V = 264, .t = INT_MAX, .tokenizer = &bytes_tokenizer }, back = { .V = 264,
                  .t = 8, .pack = 1 };
    static const char chat[] = "\xEF\xBB\xBF{\"prompt\": \"abcdefghi\", \"completion\": \"x\"}\n"
        "{\"prompt\": \"abcdef\", \"completion\": \"xyz\"}\n"
        "{\"prompt\": \"a\", \"completion\": \"\"}\n"
        "{\"messages\": [{\"role\": \"user\", \"content\": \"\"}]}\n"     // headed, not answered
        "{\"messages\": [{\"role\": \"assistant\", \"content\": \"a\"}]}\n";
    write_file(in_folder("y.jsonl"), chat, sizeof chat - 1);
    d = (Data){ .V = 264, .t = 8, .pack = 1, .tokenizer = &bytes_tokenizer };
    data_add(&d, in_folder("y.jsonl"));
    data_add(&whole, in_folder("y.jsonl"));
    uint32_t file[256 + 64] = { BIN_MAGIC, BIN_VERSION, 264, (uint32_t)whole.tokens,
                                [5] = BIN_CHAT };
    size_t n = 256;
    for (size_t i = 0; i < whole.pieces; i++) {
        memcpy(file + n, whole.piece[i].token, 4 * (size_t)whole.piece[i].length);
        n += (size_t)whole.piece[i].length;
    }
    write_file(in_folder("y.bin"), file, 4 * n);
    data_add(&back, in_folder("y.bin"));
    check(whole.documents == 3 && whole.unlabelled == 2 && d.documents == 2, "%zu and %zu "
          "documents", whole.documents, d.documents);
    check(back.documents == d.documents && back.tokens == d.tokens && back.labels == d.labels
          && back.pieces == d.pieces && back.truncated == d.truncated
          && back.unlabelled == d.unlabelled - 2, "as tokens: %zu documents, %zu tokens, %zu "
          "truncated, %zu without labels; as rows: %zu, %zu, %zu, %zu", back.documents, back.tokens,
          back.truncated, back.unlabelled, d.documents, d.tokens, d.truncated, d.unlabelled);
    check(run_child(child_word, "assistent", text, sizeof text) == 1
          && strstr(text, "'assistent'") && strstr(text, "assistant, last, completion, all"),
          "a word that is none: '%s'", text);
    check(run_child(child_word, "completion", text, sizeof text) == LOSS_COMPLETION, "'%s'", text);
    check(run_child(child_data, in_folder("x.jsonl"), text, sizeof text) == 1
          && strstr(text, "x.jsonl:6: not valid JSON") && strstr(text, "--skip-bad-rows"),
          "a bad row: '%s'", text);
}

// -------------------------------------------------------------------------------------------------
// Options

// Splits words at blanks; a word that is '' is empty.
static int split(char **argv, char *words) {
    int argc = 0;
    argv[argc++] = "train";
    for (char *w = strtok(words, " "); w; w = strtok(NULL, " ")) {
        argv[argc++] = strcmp(w, "''") == 0 ? "" : w;
    }
    return argc;
}

// Reads the options in words and writes what all of them are.
static void child_options(void *words) {
    char copy[1024], *argv[64], checkpoint[PATH_SIZE];
    Config c;
    int argc = split(argv, strcpy(copy, words));
    options_read(argc, argv, checkpoint);
    routing_given = opt.routing;
    config_tiny(&c);
    options_derive(&c);
    for EACH_OPTION(o) { fprintf(stderr, "%s=%s;", o->name, o->text); }
    fprintf(stderr, "ep %d B %d lr %g cut %d", opt.ep, opt.batch, opt.lr, opt.no_shuffle);
}

static void test_options(void) {
    static const struct { const char *words; int code; const char *want; } cases[] = {
        {"", 0, "lr=3e-3;"}, {"", 0, "seq=256;"}, {"", 0, "tokens-per-step=1024;"},
        {"-b 3 --lr=0.5", 0, "B 3 lr 0.5 cut 0"}, {"-b3", 0, "B 3"}, {"--lr 1 -l 2", 0, "lr=2;"},
        {"--no-shuffle", 0, "cut 1"}, {"--no-shuffle=false", 0, "cut 0"}, {"-y --eval", 1, "no ch"},
        {"--ranks 6", 0, "ep 2 "}, {"--ranks 8 --ep 4", 0, "ep 4 "}, {"--ranks 3", 0, "ep 1 "},
        {"--ranks 6", 0, "tokens-per-step=1536;"}, {"-t 300", 0, "tokens-per-step=1200;"},
        {"--epochs 2", 0, "steps=0;"}, {"-m x -i y.bin", 0, "lr=1e-4;"},
        {"-m x/y// -i y.bin -t 4096", 0, "model=x/y;"}, {"-m x -i y", 0, "tokens-per-step=4096;"},
        {"--learning-rat 1", 1, "unknown option --learning-rat HINT: --help"},
        {"--warmpu 1", 1, "did you mean --warmup?"}, {"--steps-per-token 1", 1, "unknown option"},
        {"--lora_r 1", 1, "did you mean --lora-r?"}, {"--evaluate", 1, "did you mean --eval?"},
        {"--tokens-per-stp=3", 1, "option --tokens-per-stp HINT: did you mean --tokens-per-step?"},
        {"-w 1", 1, "unknown option -w HINT: did you mean --warmup?"}, {"-Z", 1, "mean --help?"},
        {"file.txt", 1, "'file.txt' is not an option"}, {"-", 1, "not an option"},
        {"--batch", 1, "--batch needs a value"}, {"-b", 1, "--batch needs a value"},
        {"-b 0", 1, "--batch: '0' is not a whole number from 1"}, {"-b 2x", 1, "'2x' is not"},
        {"-x -3", 1, "'-3' is not a whole number from 0"}, {"-x 2.5", 1, "'2.5' is not a whole"},
        {"-x 3000000000", 1, "is not a whole"}, {"-b ''", 1, "'' is not"},
        {"-x 1e2", 0, "steps=1e2;"},
        {"-l nan", 1, "--lr: 'nan'"}, {"-l inf", 1, "not a number"}, {"-l -1", 1, "not a number"},
        {"-k linear", 1, "'linear' is none of cosine|constant"}, {"-k cos", 1, "none of"},
        {"-k constant", 0, "schedule=constant;"}, {"--eval=maybe", 1, "neither true nor false"},
        {"-u 0 -v 0 -n 0 -s 0", 0, "warmup=0;"}, {"--lora-r 0", 1, "--lora-r: '0'"},
        {"--lora-targets attn,foo", 1, "'foo' is not a target"}, {"-t 1", 1, "a row has 2 to"},
        {"--optimizer muon", 0, "beta1=0.95;"}, {"--optimizer sgd", 1, "none of adamw|muon"},
        {"--optimizer muon --beta1 0.8", 0, "beta1=0.8;"}, {"--ns fp16", 1, "gram|standard"},
        {"--optimizer muon", 0, "ns=gram;"}, {"--gpus x", 1, "--gpus: 'x'"},
        {"--precision fp8", 0, "precision=fp8;"}, {"--precision fp4", 1, "bf16|fp8"},
        {"--routing scoring_func=sigmoid,n_group=4,topk_group=2", 0,
         "routing=scoring_func=sigmoid,n"},
        {"--routing scoring=sigmoid", 1, "'scoring=sigmoid' sets nothing"},
        {"--routing n_group", 1, "'n_group' sets nothing"},
        {"--routing n_group=3", 1, "n_group is 3"},
        {"--routing topk_group=2", 1, "topk_group is 2 (--routing)"},
        {"--routing norm_topk_prob=yes", 1, "norm_topk_prob is yes (--routing), expected false or"},
        {"--routing routed_scaling_factor=0", 1, "routed_scaling_factor is 0"},
        {"--skip-bad-rows", 0, "skip-bad-rows=1"}, {"--optimizer adamw", 0, "optimizer=adamw"},
        {"-d 1000", 1, "1000 is not a multiple of batch 1 x seq 256 x ranks 1 = 256"},
        {"-d 512 --ranks 4", 1, "multiple"}, {"--ranks 2 --ep 4", 1, "HINT: --ep 2"},
        {"--ranks 3 --ep 3", 1, "does not divide both"}, {"-m x", 1, "-m needs data"},
        {"-m x --eval -j y.bin", 0, "val=y.bin;"}, {"-m x --dry-run", 0, "dry-run=1;"},
        {"-x 3 --epochs 1", 1, "both say how long"}, {"-x 0 --epochs 1.5", 0, "steps=0;"},
        {"--epochs 0", 1, "more than 0"}, {"--epochs 1e300", 1, "at most 10000"},
        {"-g 2147483647", 1, "positions"}, {"--train=", 1, "no file is named"},
        {"--beta2 1", 1, "below 1"}, {"--reset-optim", 1, "needs --resume"},
        {"-y x --init-adapter y", 1, "begins a run"}, {"-y /nowhere", 1, "no checkpoint in /now"},
        {"--config /nowhere", 1, "cannot read /nowhere"}, {"--version", 0, ""},
    };
    char text[8192], words[PATH_SIZE];
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        int code = run_child(child_options, (void *)cases[i].words, text, sizeof text);
        check(code == cases[i].code && strstr(text, cases[i].want), "'%s': exit %d, '%s', wanted "
              "'%s'", cases[i].words, code, text, cases[i].want);
    }
    static const struct { const char *file, *words; int code; const char *want; } files[] = {
        {"# a comment\n\n lr = 0.25 \nprompt = a = b c\nno-shuffle = yes\n", "", 0, "lr=0.25;"},
        {"prompt = a = b c\n", "", 0, "prompt=a = b c;"}, {"no-shuffle = yes", "", 0, "cut 1"},
        {"lr = 0.25\n", "-l 0.5", 0, "lr=0.5;"}, {"seq = 32\n", "", 0, "seq=32;"},
        {"lr = 1\nlr 2\n", "", 1, ":2: 'lr 2' is not `name = value`"},
        {"\nwarmpu = 1\n", "", 1, ":2: unknown option warmpu HINT: did you mean --warmup?"},
        {"batch = 0\n", "", 1, ":1: --batch: '0'"}, {"l = 3\n", "", 1, "unknown option l"},
    };
    for (size_t i = 0; i < sizeof files / sizeof files[0]; i++) {
        write_file(in_folder("run.conf"), files[i].file, strlen(files[i].file));
        // The file comes last, and still is weaker.
        snprintf(words, sizeof words, "%s --config %.900s", files[i].words, in_folder("run.conf"));
        int code = run_child(child_options, words, text, sizeof text);
        check(code == files[i].code && strstr(text, files[i].want), "file %zu: exit %d, '%s', "
              "wanted '%s'", i, code, text, files[i].want);
    }
    check(edit_distance("kitten", 6, "sitting") == 3 && edit_distance("", 0, "abc") == 3
          && edit_distance("abcd", 4, "abcd") == 0 && edit_distance("ab", 2, "") == 2, "distances");
}

// -------------------------------------------------------------------------------------------------
// Logs

static void child_log(void *unused) {
    (void)unused;
    static Trainer r = { .step = 7, .steps = 9 };
    Report p = { .loss = 1.0 / 3, .norm = 2e-7, .lr = 1e-4, .seconds = 2, .tokens = 100,
                 .labels = 90, .epoch = 1 };
    int no_piece[1] = { 0 };
    r.rows.first = no_piece;
    opt.out = folder;
    log_step(&r, &p);
    log_validation(7, 1, 2.0 / 3);
}

// Against the sums that are made by hand from the released model's sizes: in millions of elements
// per token 4,599 of attention, 260 of compressors, 226 of indexers, 6,493 of experts and 1,082 of
// the shared one, 45 of routers, 34 of mixers, 530 of the head; and 131,072 operations per key.
static void test_operations(void) {
    Model m = { .config = { .V = 129280, .C = 4096, .layers = 43, .H = 64, .D = 512, .Q = 1024,
        .G = 8, .O = 1024, .E = 256, .K = 6, .F = 2048, .n_shared = 1, .hash_layers = 3,
        .window = 128, .index_heads = 64, .index_dim = 128, .index_topk = 512 } };
    for (int i = 2; i < 43; i++) { m.config.ratio[i] = i % 2 ? 128 : 4; }
    const double linear = 2e6 * (2 * (4599 + 260 + 6493 + 1082 + 45 + 34 + 530) + 226);
    const double windows[] = { 126.02, 127.76 }, chosen[] = { 384.0, 496.0 };
    const double pooled[] = { 15.5, 127.5 }, scores[] = { 16384.0 * 512, 16384.0 * 4096 };
    for (int k = 0; k < 2; k++) {
        const int T = k ? 32768 : 4096;
        int one_row[] = { 0, 1 }, two_rows[] = { 0, 1, 2 };
        Piece whole[] = { { NULL, T, 0 } }, parts[] = { { NULL, T / 2, 0 }, { NULL, T / 2, 0 } };
        const Rows b = { .rows = 1, .first = one_row, .piece = whole, .tokens = (size_t)T };
        const Rows two = { .rows = 2, .first = two_rows, .piece = parts, .tokens = (size_t)T };
        const double keys = 43 * windows[k] + 21 * chosen[k] + 20 * pooled[k];
        const double want = linear + 3 * 131072 * keys + 21 * scores[k];
        const double got = step_operations(&m, &b) / T;
        check(fabs(got / want - 1) < 1e-3, "%g operations per token, not %g", got, want);
        check(fabs(got - (k ? 61.3e9 : 58.2e9)) < 0.1e9, "%g operations per token", got);
        check(step_operations(&m, &two) < step_operations(&m, &b), "two documents cost more");
    }
    int first[] = { 0, 1 };
    Piece token[] = { { NULL, 1, 0 } };
    const Rows one = { .rows = 1, .first = first, .piece = token, .tokens = 1 };
    const double base = step_operations(&m, &one);
    m.adapters.n_dense = 1000;
    m.adapters.n_expert = 256 * 50;     // of all experts, of which a token meets six
    check_close("adapters", 0, step_operations(&m, &one) - base, 6 * (1000 + 6 * 50), 1e-3);
}

static void test_logs(void) {
    char text[256];
    size_t n;
    check(run_child(child_log, NULL, text, sizeof text) == 0, "log: '%s'", text);
    char *line = read_file(in_folder("training.jsonl"), &n);
    char *time = strstr(line, "\"timestamp\": \"");
    check(time && strspn(time + 14, "0123456789-:.TZ") == 24, "no timestamp in '%s'", line);
    if (time) { memset(time + 14, 'x', 24); }
    const char *want = "{\"step\": 7, \"epoch\": 1, \"timestamp\": \"xxxxxxxxxxxxxxxxxxxxxxxx\", "
        "\"loss\": 0.333333333, \"grad_norm\": 2e-07, \"lr\": 0.0001, \"mem\": 0, \"tps\": 50, "
        "\"tps_per_gpu\": 50, \"mfu\": null, \"num_tokens_per_step\": 100, "
        "\"num_label_tokens\": 90}\n";
    check(strcmp(line, want) == 0, "training.jsonl has\n%s, wanted\n%s", line, want);
    line = read_file(in_folder("validation.jsonl"), &n);
    time = strstr(line, "Z\", \"val_loss\": 0.666666667}\n");
    check(strstr(line, "{\"step\": 7, \"epoch\": 1, \"timestamp\": \"2") == line
          && time == line + n - 29, "validation.jsonl has %s", line);

    const char *log = "{\"step\": 1, \"loss\": 3}\n{\"step\": 2, \"loss\": 2}\n{\"step\": 3, "
                      "\"loss\": 1}\n{\"step\": 4, \"loss\": 0.";
    opt.out = folder;
    for (int step = 0; step < 6; step++) {
        write_file(in_folder("r.jsonl"), log, strlen(log));
        log_rewind("r.jsonl", "loss", step);
        char *left = read_file(in_folder("r.jsonl"), &n);
        int lines = step < 3 ? step : 3;
        check(n == 23 * (size_t)lines && strncmp(left, log, n) == 0, "rewound to %d: '%s'", step,
              left);
    }
    log_rewind("there-is-none.jsonl", "loss", 3);

    // A picture of what was logged.
    unlink(in_folder("loss.png"));
    int drawn = plot_loss(in_folder("loss.png"), in_folder("training.jsonl"), in_folder("none"));
#ifdef HAVE_STB_IMAGE_WRITE
    char *png = read_file(in_folder("loss.png"), &n);
    check(drawn == 1 && n > 1000 && memcmp(png, "\x89PNG\r\n", 6) == 0, "loss.png: %d, %zu bytes",
          drawn, n);
#else
    check(drawn == 0, "a plot without stb");
    skip("loss.png: built without stb/stb_image_write.h");
#endif
    check(plot_loss(in_folder("no.png"), in_folder("none"), in_folder("none")) == -1, "empty plot");
}

#ifdef HAVE_STB_IMAGE
// Is there a point of that color within two of (x, y)?
static int is_near(const unsigned char *rgb, double x, double y, int color) {
    int found = 0;
    for (int i = 0; i < 25; i++) {
        const int at = ((int)lround(y) + i / 5 - 2) * PLOT_W + (int)lround(x) + i % 5 - 2;
        found |= (rgb[3 * at] << 16 | rgb[3 * at + 1] << 8 | rgb[3 * at + 2]) == color;
    }
    return found;
}

// The curves of what was logged: training falls from 3 at step 1 to 1 at step 10, in blue, and
// validation is 2 at step 8, where no other curve passes, in orange; 1 is 5 % above the lower end.
static void test_plot(void) {
    static const char train[] = "{\"step\": 1, \"loss\": 3}\n{\"step\": 10, \"loss\": 1}\n",
                      val[] = "{\"step\": 8, \"val_loss\": 2}\n";
    int w = 0, h = 0, channels;
    write_file(in_folder("plot.jsonl"), train, sizeof train - 1);
    write_file(in_folder("plotval.jsonl"), val, sizeof val - 1);
    check(plot_loss(in_folder("plot.png"), in_folder("plot.jsonl"), in_folder("plotval.jsonl"))
          == 1, "no plot");
    unsigned char *rgb = stbi_load(in_folder("plot.png"), &w, &h, &channels, 3);
    if (!check(rgb && w == PLOT_W && h == PLOT_H, "the plot has another size")) { return; }
    const double wide = PLOT_RIGHT - PLOT_LEFT, high = (PLOT_BOTTOM - PLOT_TOP) / 2.202;
    const double x[4] = { 1, 10, 5.5, 8 }, y[4] = { 3, 1, 2, 2 };
    for (int k = 0; k < 4; k++) {
        check(is_near(rgb, PLOT_LEFT + x[k] / 10 * wide, PLOT_BOTTOM - (y[k] - 0.899) * high,
                      k < 3 ? 0x1F77B4 : 0xE06000), "the curve is not at step %g, loss %g", x[k],
              y[k]);
    }
    stbi_image_free(rgb);
}
#endif

static void test_draw(void) {
    const float logits[4] = { -INFINITY, 1, 1 + 0.8f * 1.0986123f, -INFINITY };     // 1 : 3 at 0.8
    int count[4] = { 0 };
    for (int i = 0; i < 1000; i++) { count[draw(logits, 4, 0.8, i / 1000.0)]++; }
    check(count[0] == 0 && count[3] == 0 && abs(count[1] - 250) <= 1, "drawn %d %d %d %d times",
          count[0], count[1], count[2], count[3]);
    check(draw(logits, 4, 0.8, 0) == 1 && draw(logits, 4, 0.8, 0.99999994) == 2, "ends");
}

// -------------------------------------------------------------------------------------------------
// The loop, end to end: the built-in model on a small text, each run in a child

static void child_trainer(void *words) {
    char copy[2048], *argv[64];
#ifdef _OPENMP
    omp_set_num_threads(1);     // matrices this small are not worth the waits of a busy machine
#endif
    int argc = split(argv, strcpy(copy, words));
    exit(trainer(argc, argv));
}
static void child_stopped(void *words) { stop_signals = 1; child_trainer(words); }
// Two at once are one, that a scheduler sent and the supervisor passed on; a later one is another.
static void child_signals(void *later) {
    const struct timespec pause = { 1, 100000000 };
    on_stop_signal(2);
    if (later) { nanosleep(&pause, NULL); }
    on_stop_signal(2);
    exit(7);
}

// Runs the trainer in folder/out with the text and further words; the error is in `said`.
static char said[4096];
static int run_trainer(void (*child)(void *), const char *out, const char *more) {
    char words[2048];
    snprintf(words, sizeof words, "-i %s -o %s -t 16 -u 0 -v 0 -s 0 --random-base %s",
             in_folder("e.txt"), in_folder(out), more);
    return run_child(child, words, said, sizeof said);
}

// A number from line k (from 0) of a log in folder/out; NAN if it is not there.
static double logged(const char *out, const char *log, const char *key, int k) {
    char name[256], line[1024];
    double value = NAN;
    int step;
    snprintf(name, sizeof name, "%s/%s", out, log);
    FILE *f = fopen(in_folder(name), "r");
    for (int i = 0; f && fgets(line, sizeof line, f); i++) {
        if (i == k && !log_parse(line, key, &step, &value)) { value = NAN; }
    }
    if (f) { fclose(f); }
    return value;
}

static int same_adapter(const char *a, const char *b) {
    char name[2][256];
    size_t n[2];
    snprintf(name[0], 256, "%s/adapter/adapter_model.safetensors", a);
    snprintf(name[1], 256, "%s/adapter/adapter_model.safetensors", b);
    char *x = read_file(in_folder(name[0]), &n[0]), *y = read_file(in_folder(name[1]), &n[1]);
    int same = n[0] == n[1] && n[0] > 1000 && memcmp(x, y, n[0]) == 0;
    free(x);
    free(y);
    return same;
}

// Loss and norm of a step are those of the mean over its labels, whoever computed which row.
static void test_steps(void) {
    static const char *const how[] = { "-d 64 -x 2", "-d 64 -x 2 -b 2", "-d 64 -x 2 --ranks 2",
        "-d 64 -x 2 --ranks 4 --ep 2", "-d 64 -x 2 --recompute full" };
    for (int i = 0; i < 5; i++) {
        char out[16];
        snprintf(out, sizeof out, "how%d", i);
        check(run_trainer(child_trainer, out, how[i]) == 0, "%s: '%s'", how[i], said);
        // The first step sees the same numbers everywhere; later ones differ by roundings of bf16.
        double loss = logged("how0", "training.jsonl", "loss", 0);
        double norm = logged("how0", "training.jsonl", "grad_norm", 0);
        check_close(how[i], 1, logged(out, "training.jsonl", "loss", 0), loss, 1e-6);
        check_close(how[i], 1, logged(out, "training.jsonl", "grad_norm", 0), norm, 1e-4 * norm);
        check_close(how[i], 2, logged(out, "training.jsonl", "loss", 1),
                    logged("how0", "training.jsonl", "loss", 1), 0.05);
        check_close(how[i], 2, logged(out, "training.jsonl", "num_label_tokens", 1),
                    logged("how0", "training.jsonl", "num_label_tokens", 1), 0);
    }
    // The mean over the same rows: two steps of two rows, and one of four, before any update.
    check(run_trainer(child_trainer, "frozen", "-d 32 -x 2 -l 0 --no-shuffle") == 0, "'%s'", said);
    check(run_trainer(child_trainer, "whole", "-d 64 -x 1 -l 0 --no-shuffle") == 0, "'%s'", said);
    double sum = 0, labels = 0;
    for (int k = 0; k < 2; k++) {
        double n = logged("frozen", "training.jsonl", "num_label_tokens", k);
        sum += n * logged("frozen", "training.jsonl", "loss", k);
        labels += n;
    }
    check_close("mean of the rows", 0, logged("whole", "training.jsonl", "loss", 0), sum / labels,
                1e-6);

    // 40 bytes, BOS and EOS are 3 rows of 16: the second step has one row, and one rank none.
    write_file(in_folder("short.txt"), "0123456789012345678901234567890123456789", 40);
    char words[1024];
    snprintf(words, sizeof words, "-i %s -x 0 --epochs 1 -d 32 -l 0", in_folder("short.txt"));
    for (int ranks = 1; ranks <= 2; ranks++) {
        char more[1100];
        snprintf(more, sizeof more, "%s --ranks %d", words, ranks);
        check(run_trainer(child_trainer, ranks == 1 ? "s1" : "s2", more) == 0, "'%s'", said);
    }
    check(isnan(logged("s1", "training.jsonl", "loss", 2)), "a third step");
    sum = logged("s1", "training.jsonl", "num_label_tokens", 0)
        + logged("s1", "training.jsonl", "num_label_tokens", 1);
    check(sum == 41 - 2, "%g labels in two steps", sum);
    check_close("empty batches", 2, logged("s2", "training.jsonl", "loss", 1),
                logged("s1", "training.jsonl", "loss", 1), 1e-6);

    // Learning: one batch forever is soon known by heart, at every step a little better.
    check(run_trainer(child_trainer, "over", "-d 16 -x 6 --overfit") == 0, "'%s'", said);
    double first = logged("over", "training.jsonl", "loss", 0);
    double last = logged("over", "training.jsonl", "loss", 5);
    check(last < 0.2 * first, "six steps on one row: %g -> %g", first, last);
}

// The numbers of a tensor in a safetensors file that was read, n of them.
static float *tensor_in(char *file, const char *name, size_t *n) {
    unsigned long begin = 0, end = 0, header = 0;
    char quoted[160];
    memcpy(&header, file, 8);
    snprintf(quoted, sizeof quoted, "%s\"", name);
    char *at = strstr(file + 8, quoted);
    at = at ? strstr(at, "\"data_offsets\":[") : NULL;
    check(at && sscanf(at + 16, "%lu,%lu", &begin, &end) == 2, "there is no tensor %s", name);
    *n = (end - begin) / 4;
    return (float *)(file + 8 + header + begin);
}

// Factor B of the last layer's wo_b, from an adapter's folder: n numbers.
static const float *factor_b(const char *adapter, size_t *n) {
    char name[256];
    snprintf(name, sizeof name, "%s/adapter_model.safetensors", adapter);
    return tensor_in(read_file(in_folder(name), n), "layers.4.attn.wo_b.lora_B.weight", n);
}

// Adam's first step is lr times the sign of the gradient, whatever its size: with a wrong count, or
// with gradients or moments from before, parameters would go another distance.
static void test_update(void) {
    check(run_trainer(child_trainer, "u1", "-d 16 -x 1 -l 0.001 --clip 0") == 0, "'%s'", said);
    check(run_trainer(child_trainer, "u2", "-d 16 -x 1 -l 0.001 --clip 0.01") == 0, "'%s'", said);
    size_t n;
    const float *b = factor_b("u1/adapter", &n);
    double worst = 0, moved = 0;
    for (size_t i = 0; i < n; i++) {
        worst = fmax(worst, fabs(b[i]));
        moved += b[i] != 0;
    }
    check(moved > 500 && fabs(worst - 0.001) < 1e-6, "after one step B is %g at most, %g elements "
          "moved", worst, moved);
    check(logged("u1", "training.jsonl", "grad_norm", 0) == logged("u2", "training.jsonl",
          "grad_norm", 0), "grad_norm is logged after clipping");
#ifdef HAVE_JSMN
    check(run_trainer(child_trainer, "u3", "-d 16 -x 3 -n 2") == 0, "'%s'", said);
    check(run_trainer(child_trainer, "u3", "-y --reset-optim") == 0, "'%s'", said);
    const float *before = factor_b("u3/checkpoint-000002", &n), *after = factor_b("u3/adapter", &n);
    worst = 0;
    for (size_t i = 0; i < n; i++) { worst = fmax(worst, fabs(after[i] - before[i])); }
    double lr = logged("u3", "training.jsonl", "lr", 2);
    check_close("a step without moments", 0, worst / lr, 1, 1e-3);
#endif
}

// Factor A or B of the last layer's wo_b, or its moment (kind ".m"), from a file of folder/out.
static const float *wo_b_of(const char *out, const char *file, char factor, const char *kind,
                            size_t *n) {
    char path[256], name[64];
    snprintf(path, sizeof path, "%s/%s", out, file);
    snprintf(name, sizeof name, "layers.4.attn.wo_b.lora_%c.weight%s", factor, kind);
    return tensor_in(read_file(in_folder(path), n), name, n);
}

// One step whose every number follows from its gradient, which another run without clipping tells:
// with beta1 = 0 the first moment is the gradient, B goes from 0 to -lr m / (|m| + eps), and A,
// whose gradient is 0 while B is, decays by lr * c. Twice the alpha is twice the gradient of B.
static void test_update_options(void) {
    static const char *const file = "checkpoint-000001/optimizer.safetensors",
                      *const adapter = "adapter/adapter_model.safetensors";
    static const char *const runs[3][2] = {
        { "free", "-d 16 -x 1 -n 1 --beta1 0 -l 0 --clip 0" },
        { "all", "-d 16 -x 1 -n 1 --beta1 0 -l 0.01 --clip 0.05 --beta2 0.5 --eps 1e-3 -c 0.5" },
        { "alpha", "-d 16 -x 1 -n 1 --beta1 0 -l 0 --clip 0 --lora-alpha 64" } };
    for (int k = 0; k < 3; k++) {
        check(run_trainer(child_trainer, runs[k][0], runs[k][1]) == 0, "%s: '%s'", runs[k][1],
              said);
    }
    size_t n;
    const float *g = wo_b_of("free", file, 'B', ".m", &n), *m = wo_b_of("all", file, 'B', ".m", &n);
    const float *v = wo_b_of("all", file, 'B', ".v", &n), *b = wo_b_of("all", adapter, 'B', "", &n);
    const float *twice = wo_b_of("alpha", file, 'B', ".m", &n);
    const double norm = logged("free", "training.jsonl", "grad_norm", 0);
    check(norm > 0.1, "a norm of %g is not clipped", norm);
    double worst[5] = { 0 };            // of all numbers, in units of what is allowed
    for (size_t i = 0; i < n; i++) {
        const double gi = (double)g[i], mi = (double)m[i];
        const double off[4] = { (mi - gi * 0.05 / (norm + 1e-6)) / (1e-5 * fabs(gi) + 1e-12),
                                ((double)v[i] - 0.5 * mi * mi) / (1e-5 * mi * mi + 1e-30),
                                ((double)b[i] + 0.01 * mi / (fabs(mi) + 1e-3)) / 1e-7,
                                ((double)twice[i] - 2 * gi) / (1e-6 * fabs(gi) + 1e-30) };
        for (int k = 0; k < 4; k++) {               // NaN is the worst
            worst[k] = fabs(off[k]) <= worst[k] ? worst[k] : fabs(off[k]);
        }
    }
    const float *a = wo_b_of("free", adapter, 'A', "", &n);
    const float *less = wo_b_of("all", adapter, 'A', "", &n);
    for (size_t i = 0; i < n; i++) {
        const double off = fabs((double)less[i] - 0.995 * (double)a[i]) / 1e-8;
        worst[4] = off <= worst[4] ? worst[4] : off;
    }
    for (int k = 0; k < 5; k++) {
        static const char *const what[5] = { "clip", "beta2", "eps", "alpha", "decay" };
        check(worst[k] <= 1, "%s is off by %g times what is allowed", what[k], worst[k]);
    }
    // What is drawn, in which order rows come, what is trained, how large steps are.
    static const char *const how[2][2] = { { "seed", "-d 16 -x 1 -l 0 --seed 7" },
                                           { "order", "-d 16 -x 1 -l 0 --shuffle-seed 7" } };
    for (int k = 0; k < 2; k++) {
        check(run_trainer(child_trainer, how[k][0], how[k][1]) == 0, "%s: '%s'", how[k][1], said);
        check(logged(how[k][0], "training.jsonl", "loss", 0)
              != logged("free", "training.jsonl", "loss", 0), "%s does nothing", how[k][1]);
    }
    check(run_trainer(child_trainer, "attn", "-d 16 -x 4 --lora-targets attn -u 2 -q 0.5") == 0,
          "'%s'", said);
    check(strstr(read_file(in_folder("attn/adapter/adapter_model.safetensors"), &n) + 8,
                 "ffn") == NULL, "--lora-targets attn trains experts");
    check_close("lr", 3, logged("attn", "training.jsonl", "lr", 3), 0.75 * 3e-3, 1e-9);
    check(run_trainer(child_trainer, "flat", "-d 16 -x 4 -k constant -q 0.5") == 0, "'%s'", said);
    check_close("lr", 4, logged("flat", "training.jsonl", "lr", 3), 3e-3, 1e-9);
}

// How evenly experts are used: 6, 2, 0 and 0 rows, of three layers, of which two use one expert.
static void test_expert_load(void) {
    static Trainer r;
    static long rows[3 * 4] = { 2, 0, 0, 0, 2, 2, 0, 0, 2, 0, 0, 0 };
    r.config.E = 4;
    r.config.layers = 3;
    r.model.expert_count = rows;
    ExpertLoad load = expert_load(&r);
    check_close("load max/mean", 0, load.worst, 3, 1e-12);
    check_close("entropy", 0, load.entropy, 0.5623351446188083, 1e-12);
    check(load.layer == 0 && load.layer_worst == 4, "layer %d: %g", load.layer, load.layer_worst);
    rows[0] = rows[1] = rows[2] = rows[3] = 5;          // now the last is the worst
    load = expert_load(&r);
    check(load.layer == 2 && load.layer_worst == 4, "layer %d: %g", load.layer, load.layer_worst);
}

static void test_validation(void) {
    static const char *const how[] = { "", "-b 2", "--ranks 2", "--ranks 4" };
    for (int i = 0; i < 4; i++) {
        char more[128], out[16];
        snprintf(more, sizeof more, "--eval %s", how[i]);
        snprintf(out, sizeof out, "eval%d", i);
        check(run_trainer(child_trainer, out, more) == 0, "%s: '%s'", how[i], said);
        check_close(how[i], 0, logged(out, "validation.jsonl", "val_loss", 0),
                    logged("eval0", "validation.jsonl", "val_loss", 0), 1e-6);
    }
    check(run_trainer(child_trainer, "eval0", "--eval") == 0, "'%s'", said);
    check(!isnan(logged("eval0", "validation.jsonl", "val_loss", 1)), "--eval does not append");
    // During training: at both ends and every -v steps; the first is the base model's.
    char more[1024];
    snprintf(more, sizeof more, "-j %s -v 2 --val-steps 1000 -x 3 -d 16 -n 3", in_folder("e.txt"));
    check(run_trainer(child_trainer, "val", more) == 0, "'%s'", said);
    check_close("base", 0, logged("val", "validation.jsonl", "val_loss", 0),
                logged("eval0", "validation.jsonl", "val_loss", 0), 1e-6);
    check(logged("val", "validation.jsonl", "step", 1) == 2
          && logged("val", "validation.jsonl", "step", 2) == 3
          && isnan(logged("val", "validation.jsonl", "step", 3)), "steps of validation");
    // With the adapter of a checkpoint, or another folder's, --eval says what the run itself said.
    const double base = logged("val", "validation.jsonl", "val_loss", 0);
    const double trained = logged("val", "validation.jsonl", "val_loss", 2);
    check(trained < base - 0.01, "val_loss %g -> %g", base, trained);
#ifdef HAVE_JSMN
    snprintf(more, sizeof more, "--eval -j %s --init-adapter %s", in_folder("e.txt"),
             in_folder("val/adapter"));
    check(run_trainer(child_trainer, "again", more) == 0, "'%s'", said);
    check_close("--init-adapter --eval", 0, logged("again", "validation.jsonl", "val_loss", 0),
                trained, 1e-6);
    snprintf(more, sizeof more, "--eval -j %s --resume", in_folder("e.txt"));
    check(run_trainer(child_trainer, "val", more) == 0, "'%s'", said);
    check_close("--resume --eval", 0, logged("val", "validation.jsonl", "val_loss", 3), trained,
                1e-6);
#endif
    // One micro-batch of it is the row that a first step takes.
    snprintf(more, sizeof more, "-j %s -v 1 --val-steps 1 -x 1 -d 16 -l 0 --no-shuffle",
             in_folder("e.txt"));
    check(run_trainer(child_trainer, "one", more) == 0, "'%s'", said);
    check_close("--val-steps 1", 0, logged("one", "validation.jsonl", "val_loss", 1),
                logged("one", "training.jsonl", "loss", 0), 1e-6);
}

static void test_resume(void) {
#ifndef HAVE_JSMN
    skip("--resume: built without jsmn.h");
    return;
#endif
    char more[2048];
    check(run_trainer(child_trainer, "a", "-d 32 -x 5 -n 2") == 0, "'%s'", said);
    check(run_trainer(child_trainer, "b", "-d 32 -x 5 -n 2") == 0, "'%s'", said);
    check(same_adapter("a", "b"), "the same run twice gives two adapters");
    write_file(in_folder("b/latest"), "checkpoint-000002\n", 18);
    folder_remove(in_folder("b/adapter"));
    check(run_trainer(child_trainer, "b", "--resume") == 0, "'%s'", said);
    check(same_adapter("a", "b"), "resumed at step 2, the run ends elsewhere");
    for (int k = 0; k < 6; k++) {
        double x = logged("a", "training.jsonl", "loss", k);
        double y = logged("b", "training.jsonl", "loss", k);
        check(x == y || (k == 5 && isnan(x) && isnan(y)), "line %d: loss %g, resumed %g", k, x, y);
    }
    // What may differ, and what may not.
    write_file(in_folder("b/latest"), "checkpoint-000002\n", 18);
    check(run_trainer(child_trainer, "b", "-y -l 1e-3") == 0, "'%s'", said);
    check_close("new lr", 0, logged("b", "training.jsonl", "lr", 4) /
                logged("a", "training.jsonl", "lr", 4), 1 / 3.0, 1e-6);
    check(run_trainer(child_trainer, "a", "-y --beta2 0.9") == 1 && strstr(said, "--beta2 0.9, but")
          && strstr(said, "has 0.95"), "'%s'", said);
    check(run_trainer(child_trainer, "a", "-y -x 9") == 1 && strstr(said, "--steps"), "'%s'", said);
    snprintf(more, sizeof more, "-y --lora-targets experts,shared,attn");
    check(run_trainer(child_trainer, "a", more) == 0, "'%s'", said);
    snprintf(more, sizeof more, "-y -i %s", in_folder("short.txt"));
    check(run_trainer(child_trainer, "a", more) == 1 && strstr(said, "--train"), "'%s'", said);
    write_file(in_folder("d.txt"), "some text, some text, some text, some text", 42);
    snprintf(more, sizeof more, "-i %s -d 16 -x 2 -n 1", in_folder("d.txt"));
    check(run_trainer(child_trainer, "d", more) == 0, "'%s'", said);
    write_file(in_folder("d.txt"), "some text, some text, some text, some more", 41);
    snprintf(more, sizeof more, "-i %s -y", in_folder("d.txt"));
    check(run_trainer(child_trainer, "d", more) == 1 && strstr(said, "data has changed"), "'%s'",
          said);
    write_file(in_folder("d.txt"), "text some, some text, some text, some text", 42);
    check(run_trainer(child_trainer, "d", more) == 1 && strstr(said, "or in another order"), "'%s'",
          said);
    // Without moments it is another run; on two ranks nearly the same one.
    check(run_trainer(child_trainer, "c", "-d 32 -x 5 -n 2") == 0, "'%s'", said);
    write_file(in_folder("c/latest"), "checkpoint-000002\n", 18);
    check(run_trainer(child_trainer, "c", "-y --reset-optim") == 0, "'%s'", said);
    check(!same_adapter("a", "c"), "--reset-optim changes nothing");
    check(run_trainer(child_trainer, "c", "-d 32 -x 5 -n 2") == 0, "'%s'", said);
    write_file(in_folder("c/latest"), "checkpoint-000002\n", 18);
    check(run_trainer(child_trainer, "c", "-y --ranks 2") == 0, "'%s'", said);
    check_close("two ranks", 3, logged("c", "training.jsonl", "loss", 2),
                logged("a", "training.jsonl", "loss", 2), 1e-6);
    // A checkpoint given by its folder, its logs beside it; an adapter to begin with.
    snprintf(more, sizeof more, "-i %s -t 16 -u 0 -v 0 -s 0 --resume %s", in_folder("e.txt"),
             in_folder("c/checkpoint-000004/"));
    check(run_child(child_trainer, more, said, sizeof said) == 0, "'%s'", said);
    check(!isnan(logged("c", "training.jsonl", "loss", 4)), "the resumed folder's log is not used");
    snprintf(more, sizeof more, "-d 32 -x 1 -l 0 --init-adapter %s", in_folder("a/adapter"));
    check(run_trainer(child_trainer, "init", more) == 0 && same_adapter("a", "init"), "'%s'", said);
    strcat(more, " --lora-r 4");
    check(run_trainer(child_trainer, "init", more) == 1 && strstr(said, "--lora-r 4, but"), "'%s'",
          said);
}

#ifdef HAVE_JSMN
// A token file: n tokens, of this model's vocabulary.
static void write_tokens(const char *name, const uint32_t *token, size_t n) {
    uint32_t header[BIN_HEADER / 4] = { BIN_MAGIC, BIN_VERSION, 264, (uint32_t)n };
    char *file = malloc(sizeof header + 4 * n);
    memcpy(file, header, sizeof header);
    memcpy(file + sizeof header, token, 4 * n);
    write_file(in_folder(name), file, sizeof header + 4 * n);
    free(file);
}

static const char *const optimizers[2] = { "adamw", "muon" };

// folder/out/checkpoint-00000k/file
static char *in_checkpoint(const char *out, int k, const char *file) {
    char name[256];
    snprintf(name, sizeof name, "%s/checkpoint-%06d/%s", out, k, file);
    return in_folder(name);
}

static int same_files(const char *a, const char *b) {
    size_t n[2];
    char *x = read_file(a, &n[0]), *y = read_file(b, &n[1]);
    int same = n[0] == n[1] && n[0] > 100 && memcmp(x, y, n[0]) == 0;
    free(x);
    free(y);
    return same;
}

// What the process holds when it ends, whatever ends it: adapters and moments, in folder/held.
static void write_held(void) {
    FILE *f = fopen(in_folder("held"), "wb");
    if (f == NULL || !mem.closed) { return; }           // training never asks for memory
    fwrite(mem.arena[MEM_ADAPTERS].base, 1, mem.arena[MEM_ADAPTERS].used / 2, f);  // p, and not g
    fwrite(mem.arena[MEM_OPTIMIZER].base, 1, mem.arena[MEM_OPTIMIZER].used, f);
    fclose(f);
}
static void child_held(void *words) { atexit(write_held); child_trainer(words); }

// w1 of one of layer 0's experts: the largest element of the first moment of its A or B.
static double largest_moment(const char *out, int step, int expert, char factor) {
    char name[128];
    double most = 0;
    size_t n;
    char *file = read_file(in_checkpoint(out, step, "optimizer.safetensors"), &n);
    snprintf(name, sizeof name, "layers.0.ffn.experts.%d.w1.lora_%c.weight.m", expert, factor);
    const float *m = tensor_in(file, name, &n);
    for (size_t i = 0; i < n; i++) { most = fmax(most, fabs(m[i])); }
    free(file);
    return most;
}

// Writes the adapter that lies in a folder to another one, but in the same w1 A is zero, and each
// element of B is b: the forward does not notice b, and the gradient of A is proportional to it.
static void write_adapter(const char *to, const char *from, int expert, double b) {
    static const char *const files[2] = { "adapter_config.json", "adapter_model.safetensors" };
    mkdir(in_folder(to), 0777);
    for (int f = 0; f < 2; f++) {
        char name[256];
        size_t n, count;
        snprintf(name, sizeof name, "%s/%s", from, files[f]);
        char *file = read_file(in_folder(name), &n);
        for (int k = 0; f == 1 && k < 2; k++) {
            snprintf(name, sizeof name, "layers.0.ffn.experts.%d.w1.lora_%c.weight", expert,
                     "AB"[k]);
            float *x = tensor_in(file, name, &count);
            for (size_t i = 0; i < count; i++) { x[i] = k ? (float)b : 0; }
        }
        snprintf(name, sizeof name, "%s/%s", to, files[f]);
        write_file(in_folder(name), file, n);
        free(file);
    }
}

// A run that meets the gradient in step 3: it ends with one line that has its name, said by that
// rank (-1: any), what was saved after step 2 is all there is, and a single rank holds in the end
// what it held then (folder/held2).
static void check_stopped(const char *how, const char *more, int expert, int rank) {
    char want[160];
    size_t n;
    int ranks = strstr(how, "rank") ? 2 : 1;
    check(run_trainer(ranks > 1 ? child_trainer : child_held, "broken", more) == 3, "%s: '%s'", how,
          said);
    check(ranks > 1 || same_files(in_folder("held"), in_folder("held2")), "%s: something has moved",
          how);
    snprintf(want, sizeof want, "non-finite gradient in layers.0.ffn.experts.%d.w1.lora_A at step "
             "3 HINT", expert);
    check(strncmp(said, "error  rank ", 12) == 0 && (rank < 0 || said[12] == '0' + rank)
          && strstr(said, want) && strchr(said, '\n') == said + strlen(said) - 1, "%s: wanted one "
          "line of rank %d, '%s', not '%s'", how, rank, want, said);
    check(strcmp(read_file(in_folder("broken/latest"), &n), "checkpoint-000002\n") == 0
          && access(in_folder("broken/checkpoint-000003"), F_OK) != 0
          && access(in_folder("broken/adapter"), F_OK) != 0, "%s: saved all the same", how);
    check(!isnan(logged("broken", "training.jsonl", "loss", 1))
          && isnan(logged("broken", "training.jsonl", "loss", 2)), "%s: the step is logged", how);
}

// G7: a gradient that is not finite stops the run before adapters or moments have moved. In steps 1
// and 2 all tokens are 'a', in 3 and 4 'b': layer 0 is hash-routed, and sends 'b' to an expert that
// was idle until then. Its B is so large that the gradient of A is 1.5 times the largest float, and
// on each of two ranks, before they are added, 0.75 times. With B mended the run goes on from what
// was saved, and ends with the bits of one that had that B from the start.
static void test_nonfinite(void) {
    enum { N = 8 * 16 };
    uint32_t token[N];
    char words[600], more[1024];
    int e = 0;
    for (int i = 0; i < N; i++) {
        token[i] = (i < N / 2 ? 'a' : 'b') | (i % 16 ? TOKEN_LABEL : TOKEN_FIRST);
    }
    write_tokens("b.bin", token + N / 2, 32);
    write_tokens("ab.bin", token, N);
    snprintf(words, sizeof words, "-i %s -d 32 -n 1 --keep 9 --no-shuffle -k constant -l 1e-5",
             in_folder("ab.bin"));
    snprintf(more, sizeof more, "%s -x 4", words);
    check(run_trainer(child_trainer, "plain", more) == 0, "'%s'", said);
    while (e < 8 && (largest_moment("plain", 2, e, 'B') > 0
                     || largest_moment("plain", 4, e, 'B') == 0)) { e++; }
    if (!check(e < 8, "no expert is idle in steps 1 and 2, and has tokens then")) { return; }
    write_adapter("large", "plain/adapter", e, 1e20);
    snprintf(more, sizeof more, "-i %s -d 32 -x 1 -n 1 --clip 0 --beta1 0 --init-adapter %s",
             in_folder("b.bin"), in_folder("large"));
    check(run_trainer(child_trainer, "measure", more) == 0, "'%s'", said);
    double b = 1.5 * (double)FLT_MAX / largest_moment("measure", 1, e, 'A') * 1e20;
    check(b > 1e37 && b < 3e38, "it takes a B of %g", b);
    write_adapter("large", "plain/adapter", e, b);
    write_adapter("mended", "plain/adapter", e, 0);

    for (int muon = 0; muon < 2; muon++) {
        const char *how = optimizers[muon];
        snprintf(more, sizeof more, "%s --optimizer %s -x 4 --init-adapter %s", words, how,
                 in_folder("mended"));
        check(run_trainer(child_trainer, "whole", more) == 0, "%s: '%s'", how, said);
        snprintf(more, sizeof more, "%s --optimizer %s -x 2 --init-adapter %s", words, how,
                 in_folder("large"));
        check(run_trainer(child_held, "two", more) == 0, "%s: '%s'", how, said);
        rename(in_folder("held"), in_folder("held2"));
        snprintf(more, sizeof more, "%s --optimizer %s -x 4 --init-adapter %s", words, how,
                 in_folder("large"));
        check_stopped(how, more, e, 0);
        snprintf(more, sizeof more, "-i %s --resume", in_folder("ab.bin"));
        check_stopped(how, more, e, 0);
        write_adapter("broken/checkpoint-000002", "broken/checkpoint-000002", e, 0);
        check(run_trainer(child_trainer, "broken", more) == 0, "%s, mended: '%s'", how, said);
        check(same_adapter("whole", "broken"), "%s, mended: another adapter", how);
        for (int k = 3; k <= 4; k++) {
            check(same_files(in_checkpoint("whole", k, "optimizer.safetensors"),
                             in_checkpoint("broken", k, "optimizer.safetensors")),
                  "%s, mended: other moments after step %d", how, k);
            check(logged("whole", "training.jsonl", "loss", k - 1)
                  == logged("broken", "training.jsonl", "loss", k - 1), "%s: loss %d", how, k);
        }
    }
    snprintf(more, sizeof more, "%s -x 4 --ranks 2 --init-adapter %s", words, in_folder("large"));
    check_stopped("2 ranks", more, e, e / 4);
    strcat(more, " --ep 1");            // finite on both, but not their sum: either says so
    check_stopped("2 ranks, the sum", more, e, -1);
}

// G16: what 8 ranks with an expert each have saved, 4, 2 and 1 go on with. No token of step 3 is a
// label, so its gradient is exactly zero on any ranks, and what is saved after it has the same
// bits: not one element of an adapter or a moment has gone astray. Step 4 has the loss it had on 8.
static void test_other_ranks(void) {
    enum { STEP = 8 * 16, N = 4 * STEP, FILES_KEPT = 2 };
    static const char *const files[FILES_KEPT] = { "adapter_model.safetensors",
                                                   "optimizer.safetensors" };
    uint32_t token[N];
    for (int i = 0; i < N; i++) {
        token[i] = (uint32_t)(random_bits(16, (uint64_t)i) % 256);
        token[i] |= i % 16 == 0 ? TOKEN_FIRST : i / STEP == 2 ? 0 : TOKEN_LABEL;
    }
    write_tokens("third.bin", token, N);
    for (int muon = 0; muon < 2; muon++) {
        const char *how = optimizers[muon];
        char more[1024], *want[FILES_KEPT], *got;
        size_t n[FILES_KEPT], size;
        snprintf(more, sizeof more, "-i %s -d 128 -x 4 -n 1 --keep 9 --no-shuffle -l 1e-3 "
                 "--optimizer %s --ranks 8 --ep 8", in_folder("third.bin"), how);
        check(run_trainer(child_trainer, "eight", more) == 0, "%s: '%s'", how, said);
        double loss = logged("eight", "training.jsonl", "loss", 3);
        double norm = logged("eight", "training.jsonl", "grad_norm", 3);
        check(logged("eight", "training.jsonl", "grad_norm", 2) == 0 && norm > 0, "%s: step 3 has "
              "a gradient, or step 4 none", how);
        for (int f = 0; f < FILES_KEPT; f++) {
            want[f] = read_file(in_checkpoint("eight", 3, files[f]), &n[f]);
        }
        for (int ranks = 4; ranks >= 1; ranks /= 2) {
            write_file(in_folder("eight/latest"), "checkpoint-000002\n", 18);
            snprintf(more, sizeof more, "-i %s --resume --ranks %d --ep %d", in_folder("third.bin"),
                     ranks, ranks);
            check(run_trainer(child_trainer, "eight", more) == 0, "%s: '%s'", how, said);
            for (int f = 0; f < FILES_KEPT; f++) {
                got = read_file(in_checkpoint("eight", 3, files[f]), &size);
                check(size == n[f] && memcmp(got, want[f], size) == 0, "%s, saved by 8 ranks, "
                      "loaded and saved by %d: another %s", how, ranks, files[f]);
                free(got);
            }
            check_close(how, ranks, logged("eight", "training.jsonl", "loss", 3), loss,
                        1e-6 * loss);
            check_close(how, ranks, logged("eight", "training.jsonl", "grad_norm", 3), norm,
                        1e-4 * norm);
        }
    }
}
#endif // HAVE_JSMN

static void test_ends(void) {
    size_t n;
    // Asked to stop: the step ends, is saved, and the adapter written.
    check(run_trainer(child_stopped, "stop", "-d 16 -x 9") == 130, "stopped: '%s'", said);
    read_file(in_folder("stop/checkpoint-000001/state.json"), &n);
    check(n > 100 && isnan(logged("stop", "training.jsonl", "loss", 1)), "not saved at step 1");
    check(run_child(child_signals, said, said, sizeof said) == 130, "two signals");
    check(run_child(child_signals, NULL, said, sizeof said) == 7, "one signal, twice");
    check(run_trainer(child_stopped, "stop2", "-d 32 -x 9 --ranks 2") == 130, "ranks: '%s'", said);
    // A step that makes weights infinite: the next one has no finite loss, and says where.
    for (int ranks = 1; ranks <= 2; ranks++) {
        char more[128];
        snprintf(more, sizeof more, "-d 32 -x 9 -l 1e39 --clip 0 --ranks %d", ranks);
        check(run_trainer(child_trainer, "nan", more) == 3 && strstr(said, "non-finite loss in")
              && strstr(said, "layers.") && strstr(said, "at step 2"), "numerics: '%s'", said);
        check(strstr(said, "error") && !strstr(strstr(said, "error") + 1, "error"), "'%s'", said);
    }
    check(run_trainer(child_trainer, "last", "-d 16 -x 1 -l 1e39 --clip 0") == 3
          && strstr(said, "non-finite numbers in the adapters at step 1"), "the end: '%s'", said);
    check(!isnan(logged("nan", "training.jsonl", "loss", 0))
          && isnan(logged("nan", "training.jsonl", "loss", 1)), "the broken step is logged");
    // A new run moves what an older one left, and nothing else.
    write_file(in_folder("stop/notes.md"), "mine", 4);
    for (int i = 0; i < 2; i++) {
        check(run_trainer(child_trainer, "stop", "-d 16 -x 1 -n 1") == 0, "'%s'", said);
    }
    check(run_trainer(child_trainer, "gpus", "-x 1 --gpus 99") == 1 && strstr(said, "--gpus 99"),
          "99 GPUs: '%s'", said);
    static const char *const there[] = { "notes.md", "training.jsonl", "adapter", "latest",
        "checkpoint-000001", "previous-1/training.jsonl", "previous-1/checkpoint-000001",
        "previous-2/training.jsonl", "previous-2/adapter", "previous-2/latest" };
    for (size_t i = 0; i < sizeof there / sizeof there[0]; i++) {
        char name[256];
        snprintf(name, sizeof name, "stop/%s", there[i]);
        check(access(in_folder(name), F_OK) == 0, "%s is missing", name);
    }
    check(isnan(logged("stop", "training.jsonl", "loss", 1)), "a new run appends to an old log");
    check(run_trainer(child_trainer, "dry/run", "--dry-run") == 0, "'%s'", said);
    check(access(in_folder("dry"), F_OK) != 0, "--dry-run makes a folder");
    check(run_trainer(child_trainer, "dry", "--bench 1 -d 16") == 0
          && access(in_folder("dry"), F_OK) != 0, "--bench makes a folder: '%s'", said);
    snprintf(said, sizeof said, "-x 1 -d 16 -s 1 -g 3 --prompt abc");
    check(run_trainer(child_trainer, "smp", said) == 0, "samples: '%s'", said);
}

int main(void) {
    char text[1200];
    strcpy(folder, "/tmp/test_data.XXXXXX");
    if (mkdtemp(folder) == NULL) { perror("mkdtemp"); return 2; }
    for (size_t i = 0; i < sizeof text; i++) { text[i] = "int main(void) { 0; }\n"[i * i % 22]; }
    write_file(in_folder("e.txt"), text, sizeof text);
    tokenizer_bytes(&bytes_tokenizer, &tiny_config);
    test_packing();
    test_batches();
    test_sequence();
    test_bin();
    test_text();
    test_jsonl();
    test_options();
    test_operations();
    test_logs();
#ifdef HAVE_STB_IMAGE
    test_plot();
#endif
    test_draw();
    test_expert_load();
    test_steps();
    test_update();
    test_update_options();
    test_validation();
    test_resume();
#ifdef HAVE_JSMN
    test_nonfinite();
    test_other_ranks();
#endif
    test_ends();
    folder_remove(folder);
    return finish("test_data");
}
