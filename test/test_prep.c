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
    " the", " and", " of", " return", "if (", " = 0;\n", "\n    ", " int", "'s", " you", " 的",
    "。\n", " для", "; ", "://", " {\n", "}\n\n", ".5", "#include", " Größe", "ing", " über",
    "1,000", " été" };
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
    "Hello! 毕老师！1 + 1 = 2 ĠÑĤÐ²ÑĬÑĢ", "Hello, 世界", "S", "U1", "A1", "U2", "A2",
    "You are concise.", "Answer with one word: sky color?", "你好", "推理", "答案",
    "x  \n \t\n  y   z  ", "12345.678", "don't I'll <b>it's</b>", "ア・イ゛ーu゙",
    "\u0301a \u0301 \u200d\u200dB",
    "a\u3040b\u303f\u3041\u30ff\u3100c\u9fa5\u9fa6\u4dff\u4e00" };

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
            double began = clock_seconds();
            s.n = 0;
            tokenizer_encode(&small, &s, text, n, 0);
            seconds += clock_seconds() - began;
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

// With ignore_merges a piece that is a token is that token; it need not be reachable by merges.
static void test_whole_words(void) {
    Tokenizer t;
    int pieces = 0;
    tokenizer_load(&t, "test/vectors/tokenizer.json", &small_config);
    t.whole_words = 1;
    for (int id = 0; id < 1000; id++) {
        Cutter c = { t.text[id], t.text[id] + t.length[id], t.text[id], NULL };
        if (next_piece(&c) != t.length[id]) { continue; }
        Tokens s = { .n = 0 };
        tokenizer_encode(&t, &s, t.text[id], (size_t)t.length[id], 0);
        check(s.n == 1 && s.token[0] == (uint32_t)id, "token %d alone has %zu tokens", id, s.n);
        free(s.token);
        pieces++;
    }
    check(pieces > 500, "%d tokens are whole pieces", pieces);
}

// -------------------------------------------------------------------------------------------------
// Conversations. The text of a document is what its tokens print as, its labels what lies between
// U+E000 and U+E001.

// Encodes a row with bytes as tokens and more control tokens than the tiny model has.
static Row encode(const char *row, const char *loss_on, int newer) {
    static Tokenizer t;
    static const Config c = { .V = 256 + CONTROLS, .bos = 256, .eos = 257 };
    static const char *const words_[] = { "assistant", "last", "completion", "all" };
    Row r = { .t = &t };
    if (t.n == 0) { tokenizer_bytes(&t, &c); }
    t.newer_efforts = newer;
    while (strcmp(loss_on, words_[r.loss_on]) != 0) { r.loss_on++; }
    row_encode(&r, row, strlen(row));
    return r;
}

// What the tokens of a row print as, with marks. Never freed.
static Bytes marked(const Row *r, int marks) {
    char *text = malloc(r->out.n * 40 + 8);
    int n = 0, inside = 0;
    for (size_t i = 0; i <= r->out.n; i++) {
        int label = marks && i < r->out.n && r->out.token[i] & TOKEN_LABEL;
        if (label != inside) { n += sprintf(text + n, label ? "\uE000" : "\uE001"); }
        inside = label;
        if (i == r->out.n) { break; }
        uint32_t id = r->out.token[i] & TOKEN_ID;
        memcpy(text + n, r->t->text[id], (size_t)r->t->length[id]);
        n += r->t->length[id];
    }
    return (Bytes){ text, n };
}

// Of a row that is learnt whole, what is learnt with --loss-on assistant: the documented spans, all
// behind <|Assistant|> and <think> or </think>, or behind a task, up to EOS. They are found in the
// tokens, not by walking the messages. Returns 0 if it has a reminder, which a header may precede.
static int check_spans(const char *row, int newer, int number) {
    Row r = encode(row, "assistant", newer);
    const uint32_t *control = r.t->control;
    int open = 0, wrong = 0, reminder = 0;
    for (size_t i = 1; i < r.out.n; i++) {
        uint32_t id = r.out.token[i] & TOKEN_ID, before = r.out.token[i - 1] & TOKEN_ID;
        int label = (r.out.token[i] & TOKEN_LABEL) != 0, action = id == control[CONTROL_TASKS];
        int task = id > control[CONTROL_TASKS] && id < control[CONTROL_TASKS] + 6;
        int header = before == control[CONTROL_ASSISTANT]
                  && (id == control[CONTROL_THINK] || id == control[CONTROL_END_THINK]);
        wrong += label != (open && !action);
        reminder |= id == control[CONTROL_REMINDER];
        open = id == control[CONTROL_EOS] ? 0 : open || header || task;
    }
    check(reminder || !wrong, "case %d: %d labels are others than the spans\n  %.900s", number,
          wrong, row);
    row_free(&r);
    return !reminder;
}

static void test_chat(void) {
    FILE *f = fopen("test/vectors/chat.txt", "r");
    enum { LINE = 1 << 16 };
    char *mode = malloc(LINE), *row = malloc(LINE), *want = malloc(LINE), loss_on[16], release[16];
    int cases = 0, spans = 0;
    check(f != NULL, "no test/vectors/chat.txt");
    while (f && fgets(mode, LINE, f) && fgets(row, LINE, f) && fgets(want + 5, LINE - 5, f)) {
        Json j;
        const char *why = "";
        sscanf(mode, "%15s %15s", loss_on, release);
        memcpy(want, "{\"w\":", 5);             // to read it as JSON it must be an object's
        want[strlen(want) - 1] = '}';
        check(row_parse(&j, strdup(want), strlen(want), &why), "case %d: %s", cases, why);
        Bytes expected = string_of(&j, 0, "w");
        Row r = encode(row, loss_on, strcmp(release, "0731") == 0);
        Bytes got = marked(&r, r.loss_on != LOSS_ALL);
        int same = 0;
        while (same < got.n && same < expected.n && got.s[same] == expected.s[same]) { same++; }
        int from = same > 40 ? same - 40 : 0;
        check(!r.wrong[0] && got.n == expected.n && same == got.n,
              "case %d, %s: at byte %d '%.90s', expected '%.90s' (%s)\n  %.300s", cases, loss_on,
              same, got.s + from, expected.s + from, r.wrong, row);
        for (size_t i = 0; i < r.out.n; i++) {
            int first = (r.out.token[i] & TOKEN_FIRST) != 0,
                label = (r.out.token[i] & TOKEN_LABEL) != 0;
            if (first != (i == 0) || (r.loss_on == LOSS_ALL && label == first)) {
                check(0, "case %d: token %zu has first %d, label %d", cases, i, first, label);
            }
        }
        if (r.loss_on == LOSS_ALL) { spans += check_spans(row, r.t->newer_efforts, cases); }
        cases++;
        row_free(&r);
    }
    check(cases > 150 && spans > 70, "chat.txt has %d cases, %d with spans", cases, spans);
    fclose(f);
}

// Rows of every form; [ and ] stand for the marks in what is expected, | for a control token's bar.
static const struct { const char *row, *loss_on, *want; int spelled; } rows[] = {
    {"{\"text\": \"a b\"}", "assistant",
     "<|begin▁of▁sentence|>[a b<|end▁of▁sentence|>]", 0},
    {"{\"prompt\": \"2+2=\", \"completion\": \"4\"}", "assistant",
     "<|begin▁of▁sentence|>2+2=[4<|end▁of▁sentence|>]", 0},
    {"{\"prompt\": \"p\", \"completion\": \"c\"}", "all",
     "<|begin▁of▁sentence|>[pc<|end▁of▁sentence|>]", 0},
    {"{\"prompt\": [{\"role\": \"user\", \"content\": \"u\"}, "
     "{\"role\": \"assistant\", \"content\": \"v\"}, "
     "{\"role\": \"user\", \"content\": \"w\"}], "
     "\"completion\": [{\"role\": \"assistant\", \"content\": \"x\"}]}", "assistant",
     "<|begin▁of▁sentence|><|User|>u<|Assistant|></think>v"
     "<|end▁of▁sentence|><|User|>w<|Assistant|></think>[x<|end▁of▁sentence|>]", 0},
    {"{\"instruction\": \"i\", \"input\": \"\", \"output\": \"o\"}", "assistant",
     "<|begin▁of▁sentence|><|User|>i<|Assistant|></think>[o<|end▁of▁sentence|>]", 0},
    {"{\"instruction\": \"i\", \"input\": \"n\", \"output\": \"o\"}", "last",
     "<|begin▁of▁sentence|><|User|>i\n\nn<|Assistant|></think>"
     "[o<|end▁of▁sentence|>]", 0},
    {"{\"ctx\": \"A man\", \"endings\": [\"x\", \"runs.\"], \"label\": \"1\"}", "assistant",
     "<|begin▁of▁sentence|>A man[ runs.<|end▁of▁sentence|>]", 0},
    {"{\"ctx\": \"A man\", \"endings\": [\"x\", \"runs.\"], \"label\": 1}", "assistant",
     "<|begin▁of▁sentence|>A man[ runs.<|end▁of▁sentence|>]", 0},
    {"{\"conversations\": [{\"from\": \"human\", \"value\": \"h\"}, "
     "{\"from\": \"gpt\", \"value\": \"g\"}]}", "assistant",
     "<|begin▁of▁sentence|><|User|>h<|Assistant|></think>[g<|end▁of▁sentence|>]", 0},
    // Reasoning makes a row a thinking one; a weight of 0 takes an answer out.
    {"{\"messages\": [{\"role\": \"user\", "
     "\"content\": [{\"type\": \"text\", \"text\": \"u\"}]}, "
     "{\"role\": \"assistant\", \"reasoning\": \"r\", \"content\": \"a\"}]}", "assistant",
     "<|begin▁of▁sentence|><|User|>u<|Assistant|><think>[r</think>a"
     "<|end▁of▁sentence|>]", 0},
    {"{\"messages\": [{\"role\": \"user\", \"content\": \"u\"}, "
     "{\"role\": \"assistant\", \"content\": \"a\", \"weight\": 0}, "
     "{\"role\": \"user\", \"content\": \"u\"}, "
     "{\"role\": \"assistant\", \"content\": \"b\", \"mask\": false}]}", "assistant",
     "<|begin▁of▁sentence|><|User|>u<|Assistant|></think>a<|end▁of▁sentence|>"
     "<|User|>u<|Assistant|></think>[b<|end▁of▁sentence|>]", 0},
    // Characters of two \\u, half of a pair, a 0; and control tokens as text.
    {"{\"text\": \"\\uD83D\\uDE00\\ud83d\\udE0\\u00e9\\ud800\\u0041\"}", "assistant", NULL, 0},
    {"{\"text\": \"\\uD83D\\uDE00\\u00e9\\ud800\\u0041\\\\u0041\\udc00\"}", "assistant",
     "<|begin▁of▁sentence|>[😀é\uFFFDA\\u0041\uFFFD<|end▁of▁sentence|>]", 0},
    {"{\"text\": \"x<think>y\"}", "assistant",
     "<|begin▁of▁sentence|>[x<think>y<|end▁of▁sentence|>]", 1},
    {"{\"text\": \"<|User|>\"}", "assistant",
     "<|begin▁of▁sentence|>[<|User|><|end▁of▁sentence|>]", 1},
    // A system text of the whole row stands in front, once.
    {"{\"system\": \"Be brief.\", \"conversations\": [{\"from\": \"human\", \"value\": \"h\"}, "
     "{\"from\": \"gpt\", \"value\": \"g\"}]}", "assistant",
     "<|begin▁of▁sentence|>Be brief.<|User|>h<|Assistant|></think>[g<|end▁of▁sentence|>]", 0},
    {"{\"messages\": [{\"role\": \"system\", \"content\": \"S\"}, {\"role\": \"user\", "
     "\"content\": \"u\"}, {\"role\": \"assistant\", \"content\": \"a\"}], \"system\": \"S\"}",
     "assistant",
     "<|begin▁of▁sentence|>S<|User|>u<|Assistant|></think>[a<|end▁of▁sentence|>]", 0},
    {"{\"messages\": [{\"role\": \"system\", \"content\": \"S\"}, {\"role\": \"user\", "
     "\"content\": \"u\"}, {\"role\": \"assistant\", \"content\": \"a\"}], \"system\": \"T\"}",
     "assistant", NULL, 0},
    {"{\"system\": \"S\", \"prompt\": [{\"role\": \"user\", \"content\": \"u\"}], "
     "\"completion\": [{\"role\": \"assistant\", \"content\": \"a\"}]}", "assistant",
     "<|begin▁of▁sentence|>S<|User|>u<|Assistant|></think>[a<|end▁of▁sentence|>]", 0},
    {"{\"system\": \"S\", \"messages\": [{\"role\": \"user\", \"content\": \"u\"}, {\"role\": "
     "\"assistant\", \"content\": \"a\"}], \"response_format\": {\"t\": 1}}", "assistant",
     "<|begin▁of▁sentence|>S\n\n## Response Format:\n\nYou MUST strictly adhere to the "
     "following schema to reply:\n{\"t\": 1}"
     "<|User|>u<|Assistant|></think>[a<|end▁of▁sentence|>]", 0},
    {"{\"instruction\": \"i\", \"output\": \"o\", \"system\": \"S\"}", "assistant",
     "<|begin▁of▁sentence|>S<|User|>i<|Assistant|></think>[o<|end▁of▁sentence|>]", 0},
    {"{\"instruction\": \"i\", \"output\": \"o\", \"system\": \"\"}", "assistant",
     "<|begin▁of▁sentence|><|User|>i<|Assistant|></think>[o<|end▁of▁sentence|>]", 0},
    {"{\"instruction\": \"i\", \"output\": \"o\", \"system\": 5}", "assistant", NULL, 0},
    {"{\"prompt\": \"p\", \"completion\": \"c\", \"system\": \"S\"}", "assistant", NULL, 0},
    // An answer without a header of its own is not learnt, but where an answer goes on it has
    // that answer's.
    {"{\"messages\": [{\"role\": \"assistant\", \"content\": \"Hello!\"}, {\"role\": \"user\", "
     "\"content\": \"u\"}, {\"role\": \"assistant\", \"content\": \"a\"}, {\"role\": "
     "\"assistant\", \"content\": \"b\"}]}", "assistant",
     "<|begin▁of▁sentence|>Hello!<|end▁of▁sentence|><|User|>u<|Assistant|></think>"
     "[a<|end▁of▁sentence|>]b<|end▁of▁sentence|>", 0},
    {"{\"messages\": [{\"role\": \"user\", \"content\": \"u\"}, {\"role\": \"assistant\", "
     "\"content\": \"a\", \"weight\": 0, \"wo_eos\": true}, {\"role\": \"assistant\", "
     "\"content\": \"b\"}, {\"role\": \"assistant\", \"content\": \"c\"}]}", "assistant",
     "<|begin▁of▁sentence|><|User|>u<|Assistant|></think>a[b<|end▁of▁sentence|>]"
     "c<|end▁of▁sentence|>", 0},
    {"{\"messages\": [{\"role\": \"system\", \"content\": \"S\"}, {\"role\": \"assistant\", "
     "\"content\": \"a\"}, {\"role\": \"user\", \"content\": \"u\"}, {\"role\": "
     "\"latest_reminder\", \"content\": \"r\"}, {\"role\": \"assistant\", "
     "\"content\": \"b\"}]}",
     "assistant",
     "<|begin▁of▁sentence|>Sa<|end▁of▁sentence|><|User|>u<|Assistant|></think>"
     "<|latest_reminder|>r[b<|end▁of▁sentence|>]", 0},
    // What is no row.
    {"[1]", "all", NULL, 0}, {"{\"messages\": 3}", "all", NULL, 0}, {"{", "all", NULL, 0},
    {"{\"a\": 1}", "all", NULL, 0}, {"{\"text\": \"\xff\"}", "all", NULL, 0},
    {"{\"text\": 5}", "all", NULL, 0}, {"{\"text\": \"a\\x\"}", "all", NULL, 0},
    {"{\"prompt\": 1, \"completion\": \"c\"}", "all", NULL, 0},
    {"{\"text\": +1}", "all", NULL, 0},
    {"{\"ctx\": \"c\", \"endings\": [\"x\", \"y\"], \"label\": \"\"}", "all", NULL, 0},
    {"{\"ctx\": \"c\", \"endings\": [\"x\", \"y\"], \"label\": \"x\"}", "all", NULL, 0},
    {"{\"ctx\": \"c\", \"endings\": [\"x\", \"y\"], \"label\": true}", "all", NULL, 0},
    {"{\"ctx\": \"c\", \"endings\": [\"x\", \"y\"], \"label\": [1]}", "all", NULL, 0},
    {"{\"ctx\": \"c\", \"endings\": [\"x\", \"y\"], \"label\": 1.5}", "all", NULL, 0},
    {"{\"ctx\": \"c\", \"endings\": [\"x\", \"y\"], \"label\": \"-1\"}", "all", NULL, 0},
    {"{\"ctx\": \"c\", \"endings\": [\"x\", \"y\"], \"label\": 2}", "all", NULL, 0},
    {"{\"ctx\": \"c\", \"endings\": [\"x\", \"y\"], \"label\": 4294967296}", "all", NULL, 0},
    {"{\"ctx\": \"c\", \"endings\": [\"x\", \"y\"]}", "all", NULL, 0},
    {"{\"messages\": [{\"role\": \"wizard\", \"content\": \"x\"}]}", "all", NULL, 0},
    {"{\"messages\": [{\"role\": \"user\", \"content\": [{\"type\": \"image\"}]}]}", "all",
     NULL, 0},
    {"{\"messages\": [{\"role\": \"tool\", \"tool_call_id\": \"1\"}, {\"role\": \"assistant\", "
     "\"content\": \"a\"}]}", "assistant", "<|begin▁of▁sentence|><|User|><tool_result>"
     "</tool_result><|Assistant|></think>[a<|end▁of▁sentence|>]", 0},
    // What would teach an empty answer, or nothing of what was said.
    {"{\"messages\": [{\"role\": \"user\", \"content\": \"u\"}, {\"role\": \"assistant\", "
     "\"answer\": \"a\", \"tool_calls\": null, \"reasoning\": null}]}", "all", NULL, 0},
    {"{\"messages\": [{\"role\": \"user\", \"text\": \"u\"}, {\"role\": \"assistant\", "
     "\"content\": \"a\"}]}", "all", NULL, 0},
    {"{\"messages\": [{\"role\": \"user\", \"content\": \"u\"}, {\"role\": \"assistant\", "
     "\"content\": null, \"function_call\": {\"name\": \"f\"}}]}", "all", NULL, 0},
    {"{\"messages\": [{\"role\": \"user\", \"content\": \"u\"}, {\"role\": \"assistant\", "
     "\"content\": \"a\", \"reasoning_content\": [\"r\"]}]}", "all", NULL, 0},
    {"{\"messages\": [{\"role\": \"user\", \"content\": [{\"type\": \"text\"}]}]}", "all",
     NULL, 0},
    {"{\"messages\": [{\"role\": \"user\", \"content\": \"u\"}, {\"role\": \"assistant\", "
     "\"tool_calls\": [{\"function\": {\"arguments\": {}}}]}]}", "all", NULL, 0},
};

static void test_rows(void) {
    for (size_t k = 0; k < sizeof rows / sizeof rows[0]; k++) {
        char row[1024], want[1024] = "";
        for (const char *s = rows[k].want, *from = "[]|"; s && *s; s++) {
            static const char *const to[] = { "\uE000", "\uE001", "｜" };
            const char *mark = strchr(from, *s);
            strncat(want, mark ? to[mark - from] : s, mark ? 3 : 1);
        }
        for (int i = 0, n = 0; n == 0 || rows[k].row[i - 1]; i++) {     // | in the row too
            int bar = rows[k].row[i] == '|';
            n += snprintf(row + n, sizeof row - (size_t)n, bar ? "｜" : "%c", rows[k].row[i]);
        }
        Row r = encode(row, rows[k].loss_on, 0);
        Bytes got = marked(&r, 1);
        check((rows[k].want == NULL) == (r.wrong[0] != 0), "row %s: wrong is '%s'", row, r.wrong);
        int same = got.n == (int)strlen(want) && memcmp(got.s, want, (size_t)got.n) == 0;
        check(!rows[k].want || same, "row %s: '%.*s', expected '%s'", row, got.n, got.s, want);
        check(r.wrong[0] || r.spelled == rows[k].spelled, "row %s: spelled %d", row, r.spelled);
        uint32_t user = 0;
        for (size_t i = 1; i < r.out.n; i++) { user += (r.out.token[i] & TOKEN_ID) == 258; }
        check(!rows[k].spelled || user == 0, "row %s: text became a control token", row);
        row_free(&r);
    }
}

// The released tokenizer's ids (deepseek-v4-flash.md section 8), where the file is at hand:
// `make test TOKENIZER=.../tokenizer.json`.
static void test_released(void) {
    static const struct { const char *text; uint32_t id[32]; } golden[] = {
        {"Hello! 毕老师！1 + 1 = 2 ĠÑĤÐ²ÑĬÑĢ",
         {19923, 3, 223, 5464, 5008, 1175, 19, 940, 223, 19, 438, 223, 20, 6113, 257, 76589, 131,
          100, 76032, 1628, 76589, 131, 108, 76589, 131, 98}},
        {"Hello, 世界", {19923, 14, 223, 3427}}, {"S", {53}}, {"U1", {55, 19}}, {"A1", {35, 19}},
        {"You are concise.", {3476, 477, 47468, 16}}, {"你好", {30594}}, {"推理", {36101}},
        {"Answer with one word: sky color?", {7805, 418, 834, 2004, 28, 12709, 3605, 33}},
        {"答案", {7624}} };
    static const uint32_t controls[] = { 0, 1, 128803, 128804, 128821, 128822, 128825, 128828,
                                         128829, 128830, 128831, 128832, 128836, 128845 };
    const char *path = getenv("TOKENIZER");
    Config c = { .V = 129280, .bos = 0, .eos = 1 };
    Tokenizer t;
    if (path == NULL || *path == 0) {
        skip("golden ids: no released tokenizer.json (make test TOKENIZER=PATH)");
        return;
    }
    tokenizer_load(&t, path, &c);
    for (int k = 0; k < CONTROLS; k++) {
        check(t.control[k] == controls[k], "%s is %u", control_text[k], t.control[k]);
    }
    for (size_t k = 0; k < sizeof golden / sizeof golden[0]; k++) {
        Tokens s = { .n = 0 };
        tokenizer_encode(&t, &s, golden[k].text, strlen(golden[k].text), 0);
        check(memcmp(s.token, golden[k].id, s.n * sizeof *s.token) == 0 && golden[k].id[s.n] == 0,
              "'%s' has other ids", golden[k].text);
    }
}

int main(int argc, char **argv) {
    tokenizer_load(&small, "test/vectors/tokenizer.json", &small_config);
    test_tokens(argc > 1 ? atof(argv[1]) : 20);       // MB of text
    test_round_trips();
    test_whole_words();
    test_chat();
    test_rows();
    test_released();
    return finish("test_prep");
}
