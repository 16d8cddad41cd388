// Tests of dev/data: the tokenizer against Hugging Face's, the chat encoding against DeepSeek's,
// rows of all forms. What they must answer lies in test/vectors (made by dev/ref/make_tokens.py and
// make_chat.py), the texts are made here. Run from the repository's root.
//   cc -std=gnu11 -O2 -Wall -Wextra test/test_prep.c -o test_prep -lm && ./test_prep [MEGABYTES]
#define TESTING
#include "../dev/data/prep.c"
#include "check.h"

static Tokenizer small;         // test/vectors/tokenizer.json
static const Config small_config = { .V = 1014, .bos = 1000, .eos = 1001 };

// -------------------------------------------------------------------------------------------------
// Tokens. The same texts as dev/ref/make_tokens.py makes.

// What `tokenizers` makes of a text, as one number.
static uint64_t total(const Tokens *s, uint64_t first) {
    uint64_t sum = 0;
    for (size_t i = 0; i < s->n; i++) {
        sum += ((uint64_t)s->token[i] + 1) * random_bits(0, first + i);
    }
    return sum;
}

static uint64_t scalars_total(int block) {
    uint64_t sum = 0;
    Tokens s = { .n = 0 };
    for (uint32_t c = 4096u * block; c < 4096u * block + 4096; c++) {
        char text[4];
        if (c >= 0xD800 && c < 0xE000) { continue; }
        s.n = 0;
        tokenizer_encode(&small, &s, text, (size_t)utf8_encode(text, c), 0);
        sum += total(&s, 16 * (uint64_t)c);
    }
    free(s.token);
    return sum;
}

static const char *const words[] = {
    " the", " and", " of", " return", "if (", " = 0;\n", "\n    ", " int", "'s", " you", " 的", "。\n",
    " для", "; ", "://", " {\n", "}\n\n", ".5", "#include", " Größe", "ing", " über", "1,000", " été" };
typedef struct { int n; uint32_t range[8][2]; } Kind;
static const Kind kinds[] = {
    {1, {{0x61, 0x7A}}}, {1, {{0x20, 0x7E}}}, {1, {{0x30, 0x39}}}, {1, {{0x4E00, 0x9FFF}}},
    {1, {{0x3000, 0x30FF}}}, {3, {{0x1F300, 0x1FAFF}, {0x200D, 0x200D}, {0xFE0F, 0xFE0F}}},
    {2, {{0x61, 0x7A}, {0x300, 0x36F}}}, {2, {{0x590, 0x6FF}, {0x20, 0x20}}},
    {8, {{0x20, 0x20}, {0x20, 0x20}, {0x9, 0xD}, {0x85, 0x85}, {0xA0, 0xA0}, {0x2000, 0x200B},
         {0x2028, 0x2029}, {0x3000, 0x3000}}},
    {2, {{0, 0xD7FF}, {0xE000, 0x10FFFF}}},
    {5, {{0x21, 0x2F}, {0x3A, 0x40}, {0x2010, 0x2027}, {0x3001, 0x3011}, {0xFF01, 0xFF0F}}},
    {2, {{0x400, 0x44F}, {0x20, 0x20}}},
    {4, {{0x660, 0x669}, {0x966, 0x96F}, {0xB2, 0xB3}, {0x2160, 0x2170}}} };
enum { KINDS = sizeof kinds / sizeof kinds[0], WORD_LIST = sizeof words / sizeof words[0],
       LEAST = 65536, ROOM = LEAST + 64 };       // a run has at most 12 characters

static size_t mixed_text(char *text, int document) {
    uint64_t key = random_key((uint64_t)document, "mixed");
    size_t n = 0;
    for (uint64_t i = 0; n < LEAST; ) {
        uint64_t bits = random_bits(key, i++);
        size_t kind = bits % (KINDS + 6), length = 1 + (bits >> 32) % 12;
        if (kind >= KINDS) {
            const char *word = words[(bits >> 40) % WORD_LIST];
            memcpy(text + n, word, strlen(word));
            n += strlen(word);
            continue;
        }
        for (size_t k = 0; k < length; k++) {
            bits = random_bits(key, i++);
            const uint32_t *range = kinds[kind].range[bits % (uint64_t)kinds[kind].n];
            n += (size_t)utf8_encode(text + n, range[0]
                                     + (uint32_t)((bits >> 32) % (range[1] - range[0] + 1)));
        }
    }
    return n;
}

static const char *const cut_texts[] = {
    "Hello! 毕老师！1 + 1 = 2 ĠÑĤÐ²ÑĬÑĢ", "Hello, 世界", "S", "U1", "A1", "U2", "A2", "You are concise.",
    "Answer with one word: sky color?", "你好", "推理", "答案", "x  \n \t\n  y   z  ", "12345.678",
    "don't I'll <b>it's</b>", "ア・イ゛ーu゙", "\u0301a \u0301 \u200d\u200dB" };

// "7 1 3": the bytes of each piece.
static const char *pieces_text(const char *text) {
    static char line[512];
    Cutter c = { text, text + strlen(text), text, NULL };
    int used = 0;
    line[0] = 0;
    for (int n; (n = next_piece(&c)) > 0; ) {
        used += snprintf(line + used, sizeof line - (size_t)used, "%s%d", used ? " " : "", n);
    }
    return line;
}

// Every line of tokens.txt. megabytes: how much of the mixed text; the rest of the answers is left.
static void test_tokens(double megabytes) {
    FILE *f = fopen("test/vectors/tokens.txt", "r");
    char line[512], what[16], want[400], *text = malloc(ROOM);
    size_t bytes = 0;
    double seconds = 0;
    int number, lines = 0;
    Tokens s = { .n = 0 };
    check(f != NULL, "no test/vectors/tokens.txt: run this from the repository's root");
    while (f && fgets(line, sizeof line, f)) {
        check(sscanf(line, "%15s %d %399[^\n]", what, &number, want) == 3, "tokens.txt: %s", line);
        lines++;
        if (strcmp(what, "pieces") == 0) {
            const char *got = pieces_text(cut_texts[number]);
            check(strcmp(got, want) == 0, "'%s' is cut at %s, expected %s", cut_texts[number], got,
                  want);
            continue;
        }
        uint64_t sum = strtoull(want, NULL, 16), got;
        if (strcmp(what, "scalars") == 0) {
            got = scalars_total(number);
        } else {
            if ((double)bytes >= megabytes * 1e6) { continue; }
            size_t n = mixed_text(text, number);
            double began = comm_clock();
            s.n = 0;
            tokenizer_encode(&small, &s, text, n, 0);
            seconds += comm_clock() - began;
            bytes += n;
            got = total(&s, 0);
        }
        check(got == sum, "%s %d: %016llx, expected %016llx", what, number,
              (unsigned long long)got, (unsigned long long)sum);
    }
    check(lines > 272 + 16, "tokens.txt has %d lines", lines);
    printf("  %.1f MB of mixed text at %.1f MB/s\n", (double)bytes / 1e6,
           (double)bytes / 1e6 / seconds);
    if (f) { fclose(f); }
    free(text);
    free(s.token);
}

// Texts back from tokens, for any bytes at all.
static void check_round_trip(Tokenizer *t, const char *text, size_t n, const char *what) {
    Tokens s = { .n = 0 };
    size_t at = 0;
    int same = 1;
    tokenizer_encode(t, &s, text, n, TOKEN_LABEL);
    for (size_t i = 0; i < s.n; i++) {
        uint32_t id = s.token[i] ^ TOKEN_LABEL;
        same &= id < (uint32_t)t->n && t->text[id] && at + (size_t)t->length[id] <= n
             && memcmp(t->text[id], text + at, (size_t)t->length[id]) == 0;
        at += same ? (size_t)t->length[id] : 0;
    }
    check(same && at == n, "%s: decode(encode(x)) is not x", what);
    free(s.token);
}

static void test_round_trips(void) {
    Tokenizer bytes;
    Config tiny = { .V = 264, .bos = 256, .eos = 257 };
    enum { N = 1 << 16 };
    char *text = malloc(ROOM);
    tokenizer_bytes(&bytes, &tiny);
    for (int pair = 0; pair < 65536; pair++) {
        char two[3] = { (char)pair, (char)(pair >> 8), 'e' };
        check_round_trip(&small, two, 3, "two bytes and a letter");
    }
    for (int round = 0; round < 12; round++) {
        uint64_t key = random_key((uint64_t)round, "bytes");
        size_t n = mixed_text(text, round);
        for (int i = 0; round % 3 == 0 && i < N; i++) { text[i] = (char)random_bits(key, i); }
        for (size_t i = 0; round % 3 == 1 && i < n; i += 1 + random_bits(key, i) % 16) {
            text[i] = (char)random_bits(key, i + N);    // characters that are broken here and there
        }
        if (round % 3 == 2) { memset(text, "a \n-"[round / 3], N); }    // one long piece
        check_round_trip(&small, text, round % 3 == 1 ? n : N, "broken text");
        check_round_trip(&bytes, text, N, "broken text as bytes");
    }
    check_round_trip(&small, "", 0, "nothing");
    free(text);
}

int main(int argc, char **argv) {
    tokenizer_load(&small, "test/vectors/tokenizer.json", &small_config);
    test_tokens(argc > 1 ? atof(argv[1]) : 1);
    test_round_trips();
    return finish("test_prep");
}
