// tokenizer.c: text into the tokens of a model, and back.
//
// Byte-level BPE. A token is a string of bytes. A text is first cut into pieces (words, numbers,
// runs of punctuation, blanks); tokens never cross a cut. A piece begins as its single bytes, and
// then the two neighbours that stand highest in a ranked list of merges become one token, again and
// again, until no two neighbours are in the list. The result depends on the list alone, so it must
// be exactly that of Hugging Face's `tokenizers`, with which the model was trained: a text that is
// cut differently is a text that the model has never seen.
//
// This file reads tokenizer.json of the DeepSeek family and refuses any other scheme: the cuts are
// three regular expressions, and they are written out here as code. The built-in tiny model has no
// file: its tokens are the 256 bytes and 8 control tokens, and its list of merges is empty.
//
// Control tokens (BOS, <think>, ...) never come out of text. Whoever wants one asks for it by name,
// so a user who writes "<think>" has written seven characters.
//
// Contents
//   1 the table      3 cutting text into pieces     5 text from tokens
//   2 tokenizer.json 4 merging
#ifndef TOKENIZER_C
#define TOKENIZER_C
#include "checkpoint.c"     // defines: Config, Json, json_*, file_read, refuse_if
#include "unicode.c"        // defines: char_class

// -------------------------------------------------------------------------------------------------
// 1 The table

// Tokens by their function. What a released model calls them; the ids are looked up.
enum { CONTROL_BOS, CONTROL_EOS, CONTROL_USER, CONTROL_ASSISTANT, CONTROL_THINK, CONTROL_END_THINK,
       CONTROL_DSML, CONTROL_REMINDER, CONTROL_TASKS, CONTROLS = CONTROL_TASKS + 6 };
static const char *const control_text[CONTROLS] = {
    "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>",
    "<｜Assistant｜>", "<think>", "</think>", "｜DSML｜", "<｜latest_reminder｜>",
    "<｜action｜>", "<｜query｜>", "<｜authority｜>", "<｜domain｜>", "<｜title｜>",
    "<｜read_url｜>" };
enum { CONTROL_NONE = UINT32_MAX };

typedef struct { uint32_t left, right, rank, id; } MergeRule;   // rank from 1; 0: an empty slot
typedef struct { uint32_t rank, id; int at; } Merge;            // one that a piece could make
typedef struct { uint32_t id; int previous, next, dead; } Symbol;       // -1: there is none

// Words repeat: the tokens of a short piece are kept where the hash of its bytes says.
enum { WORD_BYTES = 26, WORD_TOKENS = 9, WORDS = 1 << 15 };
typedef struct {
    uint8_t length, n;
    char bytes[WORD_BYTES];
    uint32_t id[WORD_TOKENS];
} Word;

typedef struct {
    int n;                      // ids are below it; 0: there is no tokenizer
    const char **text;          // (n) the bytes of each token; NULL: no such id
    int *length;                // (n) their number
    uint32_t byte_id[256], control[CONTROLS];
    MergeRule *rules;           // (rule_mask + 1) hash table of left and right; NULL: no merges
    uint32_t *by_text;          // (text_mask + 1) hash table of the bytes: id + 1; 0: empty slot
    uint32_t rule_mask, text_mask;
    int whole_words;            // a piece that is a token is not merged (ignore_merges)
    int newer_efforts;          // of the -0731 release: see chat.c
    Word *words;                // (WORDS)
    // Of the piece that is being merged:
    Symbol *symbol;             // (capacity)
    Merge *heap;                // (3 * capacity): one per pair of bytes, two more for every merge
    int capacity, heaped;
} Tokenizer;

typedef struct { uint32_t *token; size_t n, capacity; } Tokens;

static inline void tokens_add(Tokens *s, uint32_t token) {
    if (s->n == s->capacity) {
        s->capacity = s->capacity ? 2 * s->capacity : 256;
        s->token = (uint32_t *)realloc(s->token, s->capacity * sizeof *s->token);
        if (s->token == NULL) { die(EXIT_FIT, "no memory for %zu tokens", s->capacity); }
    }
    s->token[s->n++] = token;
}

// One UTF-8 character of s, which ends at end. Returns its bytes; a byte that begins none is a
// character of its own, with number -1. Shortest forms only, no surrogates: as the standard has it.
static inline int utf8_decode(const char *s, const char *end, uint32_t *c) {
    static const uint32_t least[] = { 0, 0, 0x80, 0x800, 0x10000 };
    unsigned char b = (unsigned char)*s;
    int n = b < 0x80 ? 1 : b < 0xC2 ? 0 : b < 0xE0 ? 2 : b < 0xF0 ? 3 : b < 0xF5 ? 4 : 0;
    *c = n < 2 ? b : b & (0x7F >> n);
    if (n > end - s) { n = 0; }
    for (int i = 1; i < n; i++) {
        if ((s[i] & 0xC0) != 0x80) { n = 0; }
        *c = *c << 6 | (s[i] & 0x3F);
    }
    if (n && *c >= least[n] && *c < 0x110000 && (*c < 0xD800 || *c > 0xDFFF)) { return n; }
    *c = UINT32_MAX;
    return 1;
}

// Writes a character as UTF-8 (at most 4 bytes) and returns its length.
static inline int utf8_encode(char *out, uint32_t c) {
    int n = c < 0x80 ? 1 : c < 0x800 ? 2 : c < 0x10000 ? 3 : 4;
    for (int i = n - 1; i > 0; i--, c >>= 6) { out[i] = (char)(0x80 | (c & 0x3F)); }
    out[0] = (char)(n == 1 ? c : (0xF00 >> n & 0xFF) | c);
    return n;
}

static inline uint64_t bytes_hash(const char *s, size_t n) {     // FNV-1a
    uint64_t hash = 0xcbf29ce484222325;
    for (size_t i = 0; i < n; i++) { hash = (hash ^ (unsigned char)s[i]) * 0x100000001b3; }
    return hash ^ hash >> 29;
}

// -------------------------------------------------------------------------------------------------
// 2 tokenizer.json
//
//     {"added_tokens": [{"id", "content"}],  "normalizer", "pre_tokenizer",
//      "model": {"type": "BPE", "vocab": {token: id}, "merges": ["a b"] or [["a", "b"]]}}
//
// Bytes are written as characters there: those that print stand for themselves, the 68 others for
// U+0100 and up (a blank is U+0120), so that a token has no blank and "a b" can be cut at it.

// The number in four hexadecimal digits, or -1.
static inline int json_hex(const char *s, const char *end) {
    int c = 0;
    for (int i = 0; i < 4; i++) {
        int lower = s + i < end ? s[i] | 32 : 0;
        int digit = lower >= 'a' && lower <= 'f' ? lower - 'a' + 10
                  : s + i < end && s[i] >= '0' && s[i] <= '9' ? s[i] - '0' : -1;
        if (digit < 0) { return -1; }
        c = 16 * c + digit;
    }
    return c;
}

// JSON text with its \uXXXX written out, in place and before it is parsed: what our reader leaves
// as it is. A quote, a backslash or a line break that was written so stays escaped. Other control
// characters would end a JSON string or a C string, so they become two bytes that UTF-8 never has,
// 0xC0 and 0x80 + the character; json_bytes undoes that. Also checks what our reader does not:
// UTF-8, and the letter behind a backslash. Returns what is wrong, or NULL.
static inline const char *json_write_out(char *text, size_t *n) {
    static const char from[] = "\"\\\b\f\n\r\t", to[] = "\"\\bfnrt";
    char *out = text, *end = text + *n;
    for (char *s = text; s < end; ) {
        uint32_t c;
        int length = utf8_decode(s, end, &c), escaped = c == '\\' && end - s > 1;
        if (c == UINT32_MAX) { return "not UTF-8"; }
        if (escaped && (s[1] == 0 || !strchr("\"\\/bfnrtu", s[1]))) { return "a wrong escape"; }
        if (!escaped || s[1] != 'u') {
            memmove(out, s, (size_t)(length += escaped));
            out += length;
            s += length;
            continue;
        }
        int unit = json_hex(s + 2, end);
        if (unit < 0) { return "a wrong escape"; }
        s += 6;
        if (unit >> 10 == 0xD800 >> 10 && end - s >= 6 && s[0] == '\\' && s[1] == 'u') {
            int low = json_hex(s + 2, end);         // two halves are one character
            if (low >> 10 == 0xDC00 >> 10) {
                unit = 0x10000 + ((unit - 0xD800) << 10) + low - 0xDC00;
                s += 6;
            }
        }
        if (unit >> 11 == 0xD800 >> 11) { unit = 0xFFFD; }      // one half is none
        const char *escape = unit && unit < 128 ? strchr(from, unit) : NULL;
        if (escape) { *out++ = '\\'; *out++ = to[escape - from]; }
        else if (unit < ' ') { *out++ = (char)0xC0; *out++ = (char)(0x80 | unit); }
        else { out += utf8_encode(out, (uint32_t)unit); }
    }
    *out = 0;
    *n = (size_t)(out - text);
    return NULL;
}

// The bytes of a parsed string, in place: they may hold a 0. Returns their number.
static inline int json_bytes(char *s, int length) {
    int n = 0;
    for (int i = 0; i < length; i++) {
        int control = (unsigned char)s[i] == 0xC0;
        s[n++] = control ? s[i + 1] & 0x1F : s[i];
        i += control;
    }
    return n;
}

// Reads a file of one JSON value whose strings may hold any character.
static inline void json_load_text(Json *j, const char *path, const char *hint) {
    size_t n;
    char *text = file_read(path, &n, hint);
    const char *wrong = json_write_out(text, &n);
    refuse_if(wrong, "%s is not valid JSON: %s %s", path, wrong, damaged);
    json_parse(j, path, text, n);
}

// A token's bytes from its characters, in place. Returns their number; -1: some character is none
// of those that bytes are written as, so it is a control token, which no text becomes.
static inline int bytes_of_token(char *s, int length) {
    static short byte_of[324];      // + 1; 0: not in use
    char *end = s + length;
    int n = 0;
    for (int b = 0, other = 256; b < 256 && !byte_of[255]; b++) {
        int prints = (b > 32 && b < 127) || (b > 160 && b != 173);
        byte_of[prints ? b : other++] = (short)(b + 1);
    }
    for (const char *p = s; p < end; ) {
        uint32_t c;
        p += utf8_decode(p, end, &c);
        if (c >= 324 || !byte_of[c]) { return -1; }
    }
    for (const char *p = s; p < end; ) {
        uint32_t c;
        p += utf8_decode(p, end, &c);
        s[n++] = (char)(byte_of[c] - 1);
    }
    return n;
}

// A table of at least twice n slots, all 0; *mask: slots - 1, which is all ones.
static inline void *slots_alloc(size_t n, size_t bytes, uint32_t *mask) {
    for (*mask = 1; *mask < 2 * n; *mask = 2 * *mask + 1) { }
    return host_calloc(((size_t)*mask + 1) * bytes);
}

// The token that has these bytes, or CONTROL_NONE. Where it is, or would be, goes to *slot.
static inline uint32_t token_find(const Tokenizer *t, const char *s, int n, uint32_t *slot) {
    uint32_t i = (uint32_t)bytes_hash(s, (size_t)n) & t->text_mask;
    for (; t->by_text[i]; i = (i + 1) & t->text_mask) {
        uint32_t id = t->by_text[i] - 1;
        if (t->length[id] == n && memcmp(t->text[id], s, (size_t)n) == 0) { *slot = i; return id; }
    }
    *slot = i;
    return CONTROL_NONE;
}

// The rule of two neighbours, or the empty slot where it would be.
static inline MergeRule *rule_slot(const Tokenizer *t, uint32_t left, uint32_t right) {
    uint64_t hash = ((uint64_t)left << 32 | right) * 0x9E3779B97F4A7C15;
    uint32_t i = (uint32_t)(hash >> 32) & t->rule_mask;
    for (MergeRule *r; (r = &t->rules[i])->rank; i = (i + 1) & t->rule_mask) {
        if (r->left == left && r->right == right) { break; }
    }
    return &t->rules[i];
}

// Is value i null, false, an empty string, or not there at all?
static inline int json_is_off(const Json *j, int i) {
    return i < 0 || json_kind(j, i) == 'n' || strcmp(json_text(j, i), "") == 0
        || (json_kind(j, i) == 't' && *json_text(j, i) == 'f');
}

// The cuts are code here, so a file with other ones must be refused. A CR or LF in an expression
// may be the character or its escape.
static inline void check_cuts(const Json *j) {
    static const char *const expected[] = {
        "\\p{N}{1,3}", "[一-龥぀-ゟ゠-ヿ]+",
        "[!\"#$%&'()*+,\\-./:;<=>?@\\[\\\\\\]^_`{|}~][A-Za-z]+|[^\\r\\n\\p{L}\\p{P}\\p{S}]?"
        "[\\p{L}\\p{M}]+| ?[\\p{P}\\p{S}]+[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+" };
    int normal = json_find(j, 0, "normalizer");
    int parts = json_find(j, normal, "normalizers");
    refuse_if(!json_is_off(j, normal) && (parts < 0 || j->tok[parts].size), "%s: it changes text "
              "before encoding it (normalizer), DeepSeek-V4's does not", j->file);
    int cuts = json_find(j, json_get(j, 0, "pre_tokenizer", '{'), "pretokenizers");
    refuse_if(cuts < 0 || json_kind(j, cuts) != '[' || j->tok[cuts].size != 4, "%s: its "
              "pre_tokenizer is not the sequence of DeepSeek-V4: three Splits, ByteLevel", j->file);
    int i = cuts + 1;
    for (int k = 0; k < 3; k++, i = json_next(j, i)) {
        char spelled[512];
        int n = 0, pattern = json_find(j, json_find(j, i, "pattern"), "Regex");
        int behaviour = json_find(j, i, "behavior");
        const char *s = pattern < 0 ? "" : json_text(j, pattern);
        for (; *s && n < 500; s++) {
            if (*s == '\r' || *s == '\n') { spelled[n++] = '\\'; }
            spelled[n++] = *s == '\r' ? 'r' : *s == '\n' ? 'n' : *s;
        }
        spelled[n] = 0;
        refuse_if(strcmp(spelled, expected[k]) != 0 || !json_is_off(j, json_find(j, i, "invert"))
                  || behaviour < 0 || strcmp(json_text(j, behaviour), "Isolated") != 0, "%s: its "
                  "pre_tokenizer cuts at '%s', DeepSeek-V4's step %d at '%s', isolated", j->file,
                  spelled, k + 1, expected[k]);
    }
    int type = json_find(j, i, "type");
    refuse_if(type < 0 || strcmp(json_text(j, type), "ByteLevel") != 0
              || !json_is_off(j, json_find(j, i, "add_prefix_space"))
              || !json_is_off(j, json_find(j, i, "use_regex")), "%s: its pre_tokenizer does not "
              "end with ByteLevel without prefix and regex", j->file);
}

// The id that value i gives to a token, below the vocabulary of the model.
static inline int token_id(const Json *j, int i, int V) {
    size_t id = json_size(j, i);
    refuse_if(id >= (size_t)V, "%s: a token has the id %.20s, but the model has %d HINT: tokenizer "
              "and model are not of one checkpoint", j->file, json_text(j, i), V);
    return (int)id;
}

// Vocabulary and added tokens. An added token's content is what it prints as.
static inline void read_vocabulary(Tokenizer *t, Json *j, int vocab) {
    uint32_t slot;
    int added = json_find(j, 0, "added_tokens"), size = j->tok[vocab].size;
    t->by_text = (uint32_t *)slots_alloc((size_t)size, sizeof *t->by_text, &t->text_mask);
    for (int k = 0, i = vocab + 1; k < size; k++, i = json_next(j, i + 1)) {
        int id = token_id(j, i + 1, t->n), length = j->tok[i].end - j->tok[i].start;
        char *s = j->text + j->tok[i].start;
        refuse_if(t->text[id], "%s: two tokens have the id %d", j->file, id);
        int n = bytes_of_token(s, length);
        t->text[id] = s;
        t->length[id] = n >= 0 ? n : json_bytes(s, length);
        if (n >= 0 && token_find(t, s, n, &slot) == CONTROL_NONE) {
            t->by_text[slot] = (uint32_t)id + 1;
        }
    }
    for (int b = 0; b < 256; b++) {
        char byte = (char)b;
        t->byte_id[b] = token_find(t, &byte, 1, &slot);
        refuse_if(t->byte_id[b] == CONTROL_NONE, "%s: no token is the single byte %d", j->file, b);
    }
    refuse_if(added >= 0 && json_kind(j, added) != '[', "%s: added_tokens is no list", j->file);
    for (int k = 0, i = added + 1; added >= 0 && k < j->tok[added].size; k++, i = json_next(j, i)) {
        int content = json_get(j, i, "content", '"');
        int id = token_id(j, json_get(j, i, "id", '0'), t->n);
        char *s = j->text + j->tok[content].start;
        t->text[id] = s;
        t->length[id] = json_bytes(s, j->tok[content].end - j->tok[content].start);
        for (int c = 0; c < CONTROLS; c++) {
            if (strcmp(s, control_text[c]) == 0) { t->control[c] = (uint32_t)id; }
        }
    }
}

// The merges in the order of their rank. Of two that are equal the later one counts, as there.
static inline void read_merges(Tokenizer *t, const Json *j, int merges) {
    int size = j->tok[merges].size;
    uint32_t slot;
    t->rules = (MergeRule *)slots_alloc((size_t)size, sizeof *t->rules, &t->rule_mask);
    for (int k = 0, i = merges + 1; k < size; k++, i = json_next(j, i)) {
        int pair = json_kind(j, i) == '[' && j->tok[i].size == 2;
        int left = pair ? i + 1 : i, right = pair ? i + 2 : i;
        char *a = j->text + j->tok[left].start, *b = j->text + j->tok[right].start;
        int an = j->tok[left].end - j->tok[left].start;
        int bn = j->tok[right].end - j->tok[right].start;
        if (!pair && json_kind(j, i) == '"') {
            b = strchr(a, ' ');
            an = b ? (int)(b++ - a) : 0;
            bn = b ? bn - an - 1 : 0;
        }
        int bytes_a = bytes_of_token(a, an), bytes_b = bytes_of_token(b ? b : a, bn);
        uint32_t x = CONTROL_NONE, y = CONTROL_NONE, both = CONTROL_NONE;
        if (bytes_a > 0 && bytes_b > 0) {
            x = token_find(t, a, bytes_a, &slot);
            y = token_find(t, b, bytes_b, &slot);
            memmove(a + bytes_a, b, (size_t)bytes_b);       // the text is not used again
            both = token_find(t, a, bytes_a + bytes_b, &slot);
        }
        refuse_if(x == CONTROL_NONE || y == CONTROL_NONE || both == CONTROL_NONE, "%s: merge %d is "
                  "not two tokens that together are a third", j->file, k);
        *rule_slot(t, x, y) = (MergeRule){ x, y, (uint32_t)k + 1, both };
    }
}

// Reads DIR/tokenizer.json for a model of that configuration.
static inline void tokenizer_load(Tokenizer *t, const char *path, const Config *c) {
    static const char *const off[] = { "dropout", "unk_token", "continuing_subword_prefix",
                                       "end_of_word_suffix", "byte_fallback" };
    Json j;
    json_load_text(&j, path, "tokenizer.json lies beside config.json");
    int model = json_get(&j, 0, "model", '{'), type = json_find(&j, model, "type");
    refuse_if(type >= 0 && strcmp(json_text(&j, type), "BPE") != 0, "%s: it is of type %s, "
              "expected BPE", path, json_text(&j, type));
    for (size_t i = 0; i < sizeof off / sizeof off[0]; i++) {
        refuse_if(!json_is_off(&j, json_find(&j, model, off[i])), "%s: it uses %s, which "
                  "DeepSeek-V4's does not", path, off[i]);
    }
    check_cuts(&j);
    *t = (Tokenizer){ .n = c->V };
    t->whole_words = !json_is_off(&j, json_find(&j, model, "ignore_merges"));
    t->text = (const char **)host_calloc((size_t)t->n * sizeof *t->text);
    t->length = (int *)host_calloc((size_t)t->n * sizeof *t->length);
    memset(t->control, 0xFF, sizeof t->control);            // CONTROL_NONE
    read_vocabulary(t, &j, json_get(&j, model, "vocab", '{'));
    read_merges(t, &j, json_get(&j, model, "merges", '['));
    t->words = (Word *)host_calloc(WORDS * sizeof *t->words);
    const int wanted[] = { c->bos, c->eos };
    for (int k = CONTROL_BOS; k <= CONTROL_EOS; k++) {
        refuse_if(t->control[k] != (uint32_t)wanted[k], "%s: %s is token %d, but config.json says "
                  "%d", path, control_text[k], (int)t->control[k], wanted[k]);
    }
    free(j.tok);                // the texts stay
}

// Bytes, then the first control tokens as far as the vocabulary goes: the built-in tiny model.
static inline void tokenizer_bytes(Tokenizer *t, const Config *c) {
    static char bytes[256];
    *t = (Tokenizer){ .n = c->V };
    t->text = (const char **)host_calloc((size_t)t->n * sizeof *t->text);
    t->length = (int *)host_calloc((size_t)t->n * sizeof *t->length);
    for (int b = 0; b < 256; b++) {
        bytes[b] = (char)b;
        t->byte_id[b] = (uint32_t)b;
        t->text[b] = bytes + b;
        t->length[b] = 1;
    }
    for (int k = 0; k < CONTROLS; k++) {
        int id = k == CONTROL_EOS ? c->eos : c->bos + k;
        t->control[k] = id < c->V ? (uint32_t)id : CONTROL_NONE;
        if (id < c->V) { t->text[id] = control_text[k]; t->length[id] = (int)strlen(t->text[id]); }
    }
}

// Is this a model whose tokens are bytes? Its configuration says so by where it puts BOS.
static inline int bytes_are_tokens(const Config *c) { return c->bos == 256 && c->V > c->eos; }

// The tokenizer of a model: bytes, or the file in its folder. t->n stays 0 if it has none.
static inline void tokenizer_open(Tokenizer *t, const Config *c, const char *dir) {
    char path[PATH_SIZE];
    memset(t, 0, sizeof *t);
    if (bytes_are_tokens(c)) { tokenizer_bytes(t, c); return; }
    if (access(path_make(path, dir, "/tokenizer.json", ""), F_OK) != 0) { return; }
    tokenizer_load(t, path, c);
    size_t n;                   // releases are told apart by keys that only the later ones have
    char *config = file_read(path_make(path, dir, "/config.json", ""), &n, not_a_folder);
    t->newer_efforts = strstr(config, "\"dspark_") != NULL;
    free(config);
}

// -------------------------------------------------------------------------------------------------
// 3 Cutting text into pieces
//
// Three expressions, each applied to the pieces that the one before it left; what matches and what
// lies between matches are both pieces:
//
//     1  \p{N}{1,3}                            numbers, three digits at most
//     2  [一-龥぀-ゟ゠-ヿ]+                        Chinese characters and kana
//     3  the first of these that matches at a place:
//        [!-/:-@[-`{-~][A-Za-z]+               one ASCII sign and letters
//        [^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+   letters and marks, behind one other character
//         ?[\p{P}\p{S}]+[\r\n]*               signs, behind a blank, before line breaks
//        \s*[\r\n]+                           blanks up to the last line break
//        \s+(?!\S)                            blanks but the last one, if more follows
//        \s+                                  blanks

// Bytes and class of the character at s.
static inline int class_at(const char *s, const char *end, int *class_) {
    uint32_t c;
    int n = utf8_decode(s, end, &c);
    *class_ = char_class(c);
    return n;
}

static inline int is_letter(char c) { return (c | 32) >= 'a' && (c | 32) <= 'z'; }
static inline int is_break(char c) { return c == '\r' || c == '\n'; }

// Behind the characters from s on that are of class a or b.
static inline const char *skip_classes(const char *s, const char *end, int a, int b) {
    for (int n, k; s < end; s += n) {
        n = class_at(s, end, &k);
        if (k != a && k != b) { break; }
    }
    return s;
}

// Where the match of expression 3 at s ends; s itself: none begins here.
static inline const char *match_word(const char *s, const char *end) {
    const char *at;
    int k, k2 = CLASS_OTHER, n = class_at(s, end, &k);
    int n2 = s + n < end ? class_at(s + n, end, &k2) : 0;
    int sign = k == CLASS_PUNCTUATION || k == CLASS_SYMBOL;
    if (sign && n == 1 && n2 && is_letter(s[1])) {
        for (at = s + 2; at < end && is_letter(*at); at++) { }
        return at;
    }
    int letters_next = n2 && (k2 == CLASS_LETTER || k2 == CLASS_MARK);
    if (k == CLASS_LETTER || k == CLASS_MARK || (letters_next && !sign && !is_break(*s))) {
        return skip_classes(s + n, end, CLASS_LETTER, CLASS_MARK);
    }
    if (sign || (*s == ' ' && n2 && (k2 == CLASS_PUNCTUATION || k2 == CLASS_SYMBOL))) {
        at = skip_classes(s + n, end, CLASS_PUNCTUATION, CLASS_SYMBOL);
        while (at < end && is_break(*at)) { at++; }
        return at;
    }
    if (k != CLASS_SPACE) { return s; }
    const char *last = s, *behind_break = NULL;
    for (at = s; at < end; at += n) {
        n = class_at(at, end, &k);
        if (k != CLASS_SPACE) { break; }
        if (is_break(*at)) { behind_break = at + 1; }
        last = at;
    }
    return behind_break ? behind_break : at == end || last == s ? at : last;
}

// A text on its way into pieces.
typedef struct {
    const char *at, *end;       // what is left of it
    const char *run;            // where the run ends that expressions 1 and 2 leave, from at on
    const char *match;          // where the next piece ends, if that is known
} Cutter;

// Where the run that begins at s ends: a number, a match of expression 2, or what lies between.
static inline const char *run_end(const char *s, const char *end) {
    for (int first = -1, digits = 0; s < end && digits < 3; ) {
        uint32_t c;
        int length = utf8_decode(s, end, &c);
        int kind = char_class(c) == CLASS_NUMBER ? 0
                 : (c >= 0x4E00 && c <= 0x9FA5) || (c >= 0x3040 && c <= 0x30FF) ? 1 : 2;
        first = first < 0 ? kind : first;
        if (kind != first) { break; }
        digits += kind == 0;
        s += length;
    }
    return s;
}

// The bytes of the next piece, which begins at c->at before the call; 0: the text is at its end.
static inline int next_piece(Cutter *c) {
    const char *begin = c->at, *s = c->at, *match = c->match;
    if (s == c->end) { return 0; }
    if (s >= c->run) { c->run = run_end(s, c->end); }
    c->match = NULL;
    if (match == NULL) {                // of a number nothing matches: it stays whole
        for (int k; s < c->run && (match = match_word(s, c->run)) == s; ) {
            s += class_at(s, c->run, &k);
        }
        if (s > begin) {                // a gap, and behind it perhaps a match
            c->match = s < c->run ? match : NULL;
            match = s;
        }
    }
    c->at = match;
    return (int)(match - begin);
}

// -------------------------------------------------------------------------------------------------
// 4 Merging
//
// All pairs of neighbours that have a rule wait in a heap, best rank on top, the left one first
// where ranks are equal. A merge makes two new pairs; pairs that it took apart are found out when
// they come up, because their place then makes another token, or none.

static inline int merge_before(Merge a, Merge b) {
    return a.rank != b.rank ? a.rank < b.rank : a.at < b.at;
}

// Puts the pair that begins at symbol i into the heap, if it has a rule.
static inline void merge_push(Tokenizer *t, int i) {
    if (i < 0 || t->symbol[i].next < 0) { return; }
    const MergeRule *rule = rule_slot(t, t->symbol[i].id, t->symbol[t->symbol[i].next].id);
    if (rule->rank == 0) { return; }
    Merge m = { rule->rank, rule->id, i };
    int k = t->heaped++;
    for (; k > 0 && merge_before(m, t->heap[(k - 1) / 2]); k = (k - 1) / 2) {
        t->heap[k] = t->heap[(k - 1) / 2];
    }
    t->heap[k] = m;
}

static inline Merge merge_pop(Tokenizer *t) {
    Merge top = t->heap[0], m = t->heap[--t->heaped];
    int k = 0;
    for (int child; (child = 2 * k + 1) < t->heaped; k = child) {
        if (child + 1 < t->heaped && merge_before(t->heap[child + 1], t->heap[child])) { child++; }
        if (!merge_before(t->heap[child], m)) { break; }
        t->heap[k] = t->heap[child];
    }
    t->heap[k] = m;
    return top;
}

// Leaves the tokens of a piece of n bytes in t->symbol, linked by next from symbol 0 on.
static inline void merge_piece(Tokenizer *t, const char *s, int n) {
    if (n > t->capacity) {
        t->capacity = n > 64 ? n : 64;
        t->symbol = (Symbol *)realloc(t->symbol, (size_t)t->capacity * sizeof(Symbol));
        t->heap = (Merge *)realloc(t->heap, 3 * (size_t)t->capacity * sizeof(Merge));
        if (!t->symbol || !t->heap) { die(EXIT_FIT, "no memory for a word of %d bytes", n); }
    }
    for (int i = 0; i < n; i++) {
        uint32_t id = t->byte_id[(unsigned char)s[i]];
        t->symbol[i] = (Symbol){ id, i - 1, i + 1 < n ? i + 1 : -1, 0 };
    }
    t->heaped = 0;
    for (int i = 0; i + 1 < n; i++) { merge_push(t, i); }
    while (t->heaped > 0) {
        Merge m = merge_pop(t);
        Symbol *left = &t->symbol[m.at];
        if (left->dead || left->next < 0) { continue; }
        Symbol *right = &t->symbol[left->next];
        const MergeRule *rule = rule_slot(t, left->id, right->id);
        if (rule->rank == 0 || rule->id != m.id) { continue; }
        left->id = m.id;
        left->next = right->next;
        right->dead = 1;
        if (left->next >= 0) { t->symbol[left->next].previous = m.at; }
        merge_push(t, left->previous);
        merge_push(t, m.at);
    }
}

// Appends the tokens of one piece.
static inline void encode_piece(Tokenizer *t, Tokens *out, const char *s, int n, uint32_t flags) {
    Word none, *w = n <= WORD_BYTES ? &t->words[bytes_hash(s, (size_t)n) & (WORDS - 1)] : &none;
    if (w == &none || w->length != n || memcmp(w->bytes, s, (size_t)n) != 0) {
        uint32_t slot, whole = t->whole_words ? token_find(t, s, n, &slot) : CONTROL_NONE;
        size_t begin = out->n;
        if (whole == CONTROL_NONE) { merge_piece(t, s, n); }
        if (whole != CONTROL_NONE) { tokens_add(out, whole | flags); }
        else for (int i = 0; i >= 0; i = t->symbol[i].next) {
            tokens_add(out, t->symbol[i].id | flags);
        }
        if (w == &none || out->n - begin > WORD_TOKENS) { return; }
        memcpy(w->bytes, s, (size_t)n);
        w->length = (uint8_t)n;
        w->n = (uint8_t)(out->n - begin);
        for (int i = 0; i < w->n; i++) { w->id[i] = out->token[begin + (size_t)i] & ~flags; }
        return;
    }
    for (int i = 0; i < w->n; i++) { tokens_add(out, w->id[i] | flags); }
}

// Appends the tokens of a text, each with these flags. Text is text: no control token comes of it.
static inline void tokenizer_encode(Tokenizer *t, Tokens *out, const char *text, size_t n,
                                    uint32_t flags) {
    if (t->rules == NULL) {             // bytes
        const unsigned char *s = (const unsigned char *)text;
        for (size_t i = 0; i < n; i++) { tokens_add(out, t->byte_id[s[i]] | flags); }
        return;
    }
    Cutter c = { text, text + n, text, NULL };
    for (int length; (length = next_piece(&c)) > 0; text = c.at) {
        encode_piece(t, out, text, length, flags);
    }
}

// -------------------------------------------------------------------------------------------------
// 5 Text from tokens

// Prints a token as a reader wants to see it: characters as they are, and what is none (bytes that
// are not UTF-8, control characters) as \xNN. A character may be spread over tokens: its first
// bytes wait in held (4 bytes and their number) for the rest. id -1: print what still waits.
static inline void token_print(FILE *f, const Tokenizer *t, int id, char held[5]) {
    int known = t->n > 0 && id >= 0 && id < t->n && t->text[id];
    const char *s = known ? t->text[id] : "";
    for (int i = 0, n = known ? t->length[id] : 0; i <= n; i++) {
        int flush = i == n && (id < 0 || !known);
        if (i < n) { held[(int)held[4]++] = s[i]; }
        while (held[4] > 0) {
            uint32_t c;
            unsigned char b = (unsigned char)held[0];
            int length = utf8_decode(held, held + held[4], &c);
            int whole = b < 0xC0 ? 1 : b < 0xE0 ? 2 : b < 0xF0 ? 3 : 4;
            if (c == UINT32_MAX && held[4] < whole && !flush) { break; }    // wait for the rest
            if (c == UINT32_MAX || (c < ' ' && c != '\n' && c != '\t') || c == 127) {
                fprintf(f, "\\x%02x", b);
            } else {
                fwrite(held, 1, (size_t)length, f);
            }
            held[4] = (char)(held[4] - length);
            memmove(held, held + length, (size_t)held[4]);
        }
    }
    if (!known && id >= 0) { fprintf(f, "%d ", id); }
}
#endif // TOKENIZER_C
