// chat.c: conversations into tokens, with a mark on those that are learnt.
//
// A model knows a conversation as one text with control tokens in it, and it must be the very text
// of its training: DeepSeek-V4 ships an encoder, and no template, to say what that is.
//
//     BOS system <User> question <Assistant> </think> answer EOS <User> ...          chat mode
//     BOS system <User> question <Assistant> <think> reasoning </think> answer EOS   thinking mode
//
// Consecutive messages of the user and of tools are one turn. The reasoning of earlier turns is
// left out (and so are earlier developer messages), because at inference the model does not see it
// either; but where tools are in play it stays. What the model would generate is learnt: what
// follows <think> or </think> of a turn, up to and including EOS. An answer that stands first, or
// behind another one's EOS, has no such beginning; the model is never asked for one, so none is
// learnt.
//
// A row is one line of JSON: {"messages"}, {"conversations"}, {"prompt", "completion"},
// {"instruction", "input", "output"}, {"ctx", "endings", "label"} or {"text"}. With messages there
// may be "tools", "response_format", "thinking_mode" ("chat" or "thinking"; without it, thinking if
// some answer has reasoning), "drop_thinking" and "reasoning_effort"; with messages or an
// instruction a "system" text, which stands in front. A message may have "weight" 0 or "mask" true:
// it is read, not learnt.
//
// Text of a message is text: control tokens spelled out in it are encoded as the characters they
// are, and such rows are counted, because whoever wrote them may have meant something else.
//
// Contents
//   1 reading a row      3 messages and turns     5 rows
//   2 writing tokens     4 one turn
#ifndef CHAT_C
#define CHAT_C
#include "tokenizer.c"      // defines: Tokenizer, Tokens, tokenizer_encode, json_write_out

// One token of a document: bits 0..29 are its id.
#define TOKEN_LABEL 0x80000000u     // the loss counts it, predicted from the one before it
#define TOKEN_FIRST 0x40000000u     // a document begins here
#define TOKEN_ID 0x3FFFFFFFu

enum { BIN_TEXT = 0, BIN_CHAT = 1 };        // kinds of documents: long ones are cut, or truncated
// What the loss counts (--loss-on): every answer; the last one; those after the last question; all
// tokens but BOS, whoever wrote them.
enum { LOSS_ASSISTANT, LOSS_LAST, LOSS_COMPLETION, LOSS_ALL };
enum { ROLE_SYSTEM, ROLE_DEVELOPER, ROLE_USER, ROLE_ASSISTANT, ROLE_TOOL, ROLE_REMINDER, ROLES };

// Bytes inside a row's text, which the row's JSON owns: no 0 ends them, and they may hold one.
typedef struct { char *s; int n; } Bytes;

typedef struct {
    int role, at;               // at: its JSON object; -1: the row's own system text
    int learnt;                 // an answer that the loss counts
} Message;

typedef struct { int first, n; } Turn;      // so many messages, of which all or none are the user's

typedef struct {                // a row on its way into tokens
    Tokenizer *t;
    Json j;
    Tokens out;
    char *text;                 // plain text that is not encoded yet: BPE wants to see all of it
    size_t n, capacity;
    int loss_on, label;         // label: what is written now is learnt
    int thinking, drop, spelled;            // spelled: some text has a control token in it
    int headed;                 // an answer has begun, and no EOS has come since
    const char *effort;
    int tools, format;          // of the whole row: a JSON value, or -1
    Message *message;
    Turn *turn;
    int messages, turns, most;
    char wrong[200];            // why the row cannot be used; "": it can
} Row;

// -------------------------------------------------------------------------------------------------
// 1 Reading a row
//
// A bad row is no reason to end the process (--skip-bad-rows), so nothing here calls die: the first
// complaint is kept, and everybody goes on with something harmless.

__attribute__((format(printf, 2, 3)))
static inline void row_wrong(Row *r, const char *format, ...) {
    if (r->wrong[0]) { return; }
    va_list args;
    va_start(args, format);
    vsnprintf(r->wrong, sizeof r->wrong, format, args);
    va_end(args);
}

// Parses n bytes of JSON with a 0 behind them, which must be an object. Returns 1, and j owns the
// text; or 0 and the reason in why, and the text is freed. json_parse ends the process where a text
// is not JSON, so what it would refuse is looked for first.
static inline int row_parse(Json *j, char *text, size_t n, const char **why) {
    memset(j, 0, sizeof *j);
    *why = json_write_out(text, &n);
    if (*why == NULL && json_skip(text, 0) != text + n) { *why = "not valid JSON"; }
    if (*why == NULL && *json_blanks(text) != '{') { *why = "not an object"; }
    if (*why) { free(text); return 0; }
    json_parse(j, "a row", text, n);
    return 1;
}

// The value of a key, or -1; of a key that is there twice the last one, as Python reads it.
// (json_find would end the process at such a key.)
static inline int member_or_null(const Json *j, int object, const char *key) {
    int found = -1;
    if (object < 0 || j->tok[object].type != JSMN_OBJECT) { return -1; }
    for (int k = 0, i = object + 1; k < j->tok[object].size; k++, i = json_next(j, i + 1)) {
        if (strcmp(json_text(j, i), key) == 0) { found = i + 1; }
    }
    return found;
}

// Null is nothing: {"tools": null} has no tools.
static inline int member(const Json *j, int object, const char *key) {
    int found = member_or_null(j, object, key);
    return found >= 0 && json_kind(j, found) == 'n' ? -1 : found;
}

// A string's bytes, where they lie; none if value i is no string. json_write_out has left some
// characters, such as \u0000, in a form of two bytes, which is undone here, in place. Whoever asks
// again gets the same: the token's end has moved, and there is nothing left to undo.
static inline Bytes string_at(const Json *j, int i) {
    if (i < 0 || json_kind(j, i) != '"') { return (Bytes){ "", 0 }; }
    Bytes b = { j->text + j->tok[i].start, j->tok[i].end - j->tok[i].start };
    b.n = json_bytes(b.s, b.n);
    j->tok[i].end = j->tok[i].start + b.n;
    return b;
}

static inline Bytes string_of(const Json *j, int object, const char *key) {
    return string_at(j, member(j, object, key));
}

// Is a value there and neither false, 0, "", [] nor {}? The encoder asks so, with Python's `if x:`.
static inline int is_set(const Json *j, int i) {
    int kind = i < 0 ? 'n' : json_kind(j, i);
    if (kind == '{' || kind == '[') { return j->tok[i].size > 0; }
    if (kind == '"') { return j->tok[i].end > j->tok[i].start; }
    return kind == 't' ? *json_text(j, i) == 't' : kind == '0' && json_number(j, i) != 0;
}

// -------------------------------------------------------------------------------------------------
// 2 Writing tokens
//
// DeepSeek's encoder builds one string, which the tokenizer then cuts at its control tokens. Here
// the control tokens are written as ids, and the text between two of them is collected, because BPE
// may join across our pieces: the system's text and the "\n\n## Tools" behind it are one text. The
// label is given to all tokens of a text at once, so a change of the label ends one too.

// Plain text, which is kept until a control token or a change of the label ends it.
static inline void put(Row *r, const char *s, size_t n) {
    if (n == 0) { return; }
    if (r->n + n > r->capacity) {
        r->capacity = 2 * (r->n + n);
        r->text = (char *)realloc(r->text, r->capacity);
        if (r->text == NULL) { die(EXIT_FIT, "no memory for a row of %zu bytes", r->capacity); }
    }
    memcpy(r->text + r->n, s, n);
    r->n += n;
}

static inline void put_text(Row *r, const char *s) { put(r, s, strlen(s)); }

// Ends the text that was collected: appends its tokens, all with the label of now.
static inline void encode_pending(Row *r) {
    tokenizer_encode(r->t, &r->out, r->text, r->n, r->label ? TOKEN_LABEL : 0);
    r->n = 0;
}

static inline void put_control(Row *r, int control) {
    encode_pending(r);
    if (r->t->control[control] == CONTROL_NONE) {
        row_wrong(r, "the tokenizer has no %s", control_text[control]);
        return;
    }
    tokens_add(&r->out, r->t->control[control] | (r->label ? TOKEN_LABEL : 0));
}

// Whether what is written from here on is learnt. With LOSS_ALL it always is.
static inline void set_label(Row *r, int label) {
    encode_pending(r);
    r->label = label || r->loss_on == LOSS_ALL;
}

// The control token that begins at s, or -1.
static inline int control_at(const char *s, size_t n) {
    for (int k = 0; k < CONTROLS; k++) {
        size_t length = strlen(control_text[k]);
        if (length <= n && memcmp(s, control_text[k], length) == 0) { return k; }
    }
    return -1;
}

// What a user wrote. As a token a <｜User｜> in it would begin a turn that nobody had, so it stays
// text; once one was found, the row is counted and the search ends.
static inline void put_user(Row *r, Bytes b) {
    for (int i = 0; i < b.n && !r->spelled; i++) {
        if (b.s[i] != '<' && b.s[i] != '\xEF') { continue; }    // < and the bar of ｜DSML｜
        r->spelled = control_at(b.s + i, (size_t)(b.n - i)) >= 0;
    }
    put(r, b.s, (size_t)b.n);
}

// A value that must be a string.
static inline void put_value(Row *r, int i, const char *name) {
    if (i < 0 || json_kind(&r->j, i) != '"') { row_wrong(r, "its %s is not a string", name); }
    put_user(r, string_at(&r->j, i));
}

// Text of the encoder itself, where control tokens are written as they print: "<｜DSML｜invoke" is
// the text "<", the token ｜DSML｜ and the text "invoke".
static inline void put_template(Row *r, const char *s) {
    for (size_t n = strlen(s); n > 0; ) {
        int control = control_at(s, n);
        size_t length = control >= 0 ? strlen(control_text[control]) : 1;
        if (control >= 0) { put_control(r, control); } else { put(r, s, 1); }
        s += length;
        n -= length;
    }
}

// A float as Python prints it: the fewest digits that read back as the same number, of which 17 are
// always enough. 0.1, 1e3 as 1000.0, 1E16 as 1e+16, 1.5e-5 as 1.5e-05, 1e400 as Infinity.
static inline void put_float(Row *r, double x) {
    char text[40], digits[40];
    int decimals = -1;
    if (!isfinite(x)) { put_text(r, x < 0 ? "-Infinity" : "Infinity"); return; }
    do {
        snprintf(text, sizeof text, "%.*e", ++decimals, x);
    } while (strtod(text, NULL) != x && decimals < 16);
    int exponent = atoi(strchr(text, 'e') + 1);
    if (exponent >= 16 || exponent < -4) {              // 1e+16, 1.5e-05
        put_text(r, text);
        return;
    }
    snprintf(digits, sizeof digits, "%.*f", decimals > exponent ? decimals - exponent : 1, x);
    put_text(r, digits);
}

// n bytes as a JSON string. They are unescaped, so they are escaped again, as Python does it: only
// what must be. A control character may still have its form of two bytes.
static inline void put_json_string(Row *r, const char *s, int n) {
    static const char from[] = "\"\\\b\f\n\r\t", to[] = "\"\\bfnrt";
    put_text(r, "\"");
    for (int i = 0; i < n; i++) {
        char c = s[i], text[8] = { '\\' };
        if ((unsigned char)c == 0xC0 && i + 1 < n) { c = s[++i] & 0x1F; }       // json_write_out
        const char *escape = c ? strchr(from, c) : NULL;
        if (escape) { text[1] = to[escape - from]; put(r, text, 2); }
        else if ((unsigned char)c < ' ') { put(r, text, (size_t)sprintf(text, "\\u%04x", c)); }
        else { put(r, &c, 1); }
    }
    put_text(r, "\"");
}

// Value i as Python's json.dumps(value, ensure_ascii=False) writes it: {"a": [1, true], "b": null},
// whatever blanks the row has. Integers keep their digits (-0 is 0), and what has a point or an
// exponent is a float. Returns the token behind the value.
static inline int put_json(Row *r, const Json *j, int i) {
    int kind = json_kind(j, i), object = kind == '{', at = i + 1;
    int length = j->tok[i].end - j->tok[i].start;
    const char *s = json_text(j, i);
    if (object || kind == '[') {
        put(r, object ? "{" : "[", 1);
        for (int k = 0; k < j->tok[i].size; k++) {
            if (k > 0) { put_text(r, ", "); }
            if (object) {
                put_json_string(r, json_text(j, at), j->tok[at].end - j->tok[at].start);
                put_text(r, ": ");
                at++;
            }
            at = put_json(r, j, at);
        }
        put(r, object ? "}" : "]", 1);
        return at;
    }
    if (kind == '"') { put_json_string(r, s, length); }
    else if (kind != '0') { put(r, s, (size_t)length); }
    else if ((int)strcspn(s, ".eE") < length) { put_float(r, strtod(s, NULL)); }
    else if (length == 2 && memcmp(s, "-0", 2) == 0) { put_text(r, "0"); }
    else { put(r, s, (size_t)length); }
    return at;
}

// -------------------------------------------------------------------------------------------------
// 3 Messages and turns
//
// A message is one object of the row; a turn is what the model sees as one. A question, the result
// of a tool and another question are three messages and this turn:
//
//     <User>question\n\n<tool_result>result</tool_result>\n\nanother question
//
// Both hold places only; the text stays in the row's JSON until it is written.

// OpenAI's names of the roles, DeepSeek's reminder, and the names that other formats have for them.
static inline int role_of(const char *name) {
    static const struct { const char *name; int role; } names[] = {
        {"system", ROLE_SYSTEM}, {"developer", ROLE_DEVELOPER}, {"user", ROLE_USER},
        {"assistant", ROLE_ASSISTANT}, {"tool", ROLE_TOOL}, {"latest_reminder", ROLE_REMINDER},
        {"human", ROLE_USER}, {"gpt", ROLE_ASSISTANT}, {"model", ROLE_ASSISTANT},
        {"observation", ROLE_TOOL} };
    for (size_t i = 0; i < sizeof names / sizeof names[0]; i++) {
        if (strcmp(name, names[i].name) == 0) { return names[i].role; }
    }
    return -1;
}

// Room for one more message, and one more turn.
static inline void messages_grow(Row *r) {
    if (r->messages + 1 < r->most) { return; }
    r->most = 2 * r->most + 16;
    r->message = (Message *)realloc(r->message, (size_t)r->most * sizeof *r->message);
    r->turn = (Turn *)realloc(r->turn, (size_t)r->most * sizeof *r->turn);
    if (!r->message || !r->turn) { die(EXIT_FIT, "no memory for %d messages", r->most); }
}

// Adds the messages of a list: {"role", "content"} or, as in ShareGPT's files, {"from", "value"}.
// learnt: whether the loss may count its answers.
static inline void messages_add(Row *r, int list, int learnt) {
    const Json *j = &r->j;
    if (list < 0 || json_kind(j, list) != '[') { row_wrong(r, "no list of messages"); return; }
    for (int k = 0, i = list + 1; k < j->tok[list].size; k++, i = json_next(j, i)) {
        int named = member(j, i, "role") >= 0, weight = member(j, i, "weight");
        Bytes name = string_of(j, i, named ? "role" : "from");
        char text[32];
        snprintf(text, sizeof text, "%.*s", name.n, name.s);
        int role = role_of(text);
        if (role < 0) {
            row_wrong(r, "message %d has the role '%s', expected system, developer, user, "
                      "assistant, tool or latest_reminder", k, text);
            return;
        }
        messages_grow(r);
        int wanted = learnt && role == ROLE_ASSISTANT && (weight < 0 || is_set(j, weight))
                  && !is_set(j, member(j, i, "mask"));
        r->message[r->messages++] = (Message){ role, i, wanted };
    }
}

static inline int is_users(int role) { return role == ROLE_USER || role == ROLE_TOOL; }

// The task that a turn ends with ("title", ...), -1 if none. Of a turn the first message has it:
// when the encoder joins messages it keeps no other one's.
static inline int task_of(const Row *r, const Turn *t) {
    return r->message[t->first].at < 0 ? -1 : member(&r->j, r->message[t->first].at, "task");
}

// Joins messages into turns: those of user and tools until another one speaks, or a task is set,
// behind which the encoder joins results of tools, but no further question.
static inline void turns_make(Row *r) {
    for (int i = 0; i < r->messages; i++) {
        Turn *last = r->turns ? &r->turn[r->turns - 1] : NULL;
        int role = r->message[i].role;
        if (last && is_users(role) && is_users(r->message[last->first].role)
            && (role == ROLE_TOOL || task_of(r, last) < 0)) {
            last->n++;
        } else {
            r->turn[r->turns++] = (Turn){ i, 1 };
        }
    }
}

// The model has no token for tools: a turn that begins with a result is the user's.
static inline int turn_role(const Row *r, int i) {
    int role = r->message[r->turn[i].first].role;
    return role == ROLE_TOOL ? ROLE_USER : role;
}

// The last turn of a user or developer, or -1.
static inline int last_asked(const Row *r) {
    int i = r->turns - 1;
    while (i >= 0 && turn_role(r, i) != ROLE_USER && turn_role(r, i) != ROLE_DEVELOPER) { i--; }
    return i;
}

// Takes out the developer messages before the last question, as the encoder does where it drops
// reasoning. The reasoning itself is not written: put_answer.
static inline void turns_drop(Row *r) {
    int last = last_asked(r), kept = 0;
    for (int i = 0; i < r->turns; i++) {
        if (turn_role(r, i) != ROLE_DEVELOPER || i >= last) { r->turn[kept++] = r->turn[i]; }
    }
    r->turns = kept;
}

// Which answers are learnt: --loss-on, where the row has not said it message by message. A tool's
// result is no question: after the last one, all calls and the final answer are the completion.
static inline void choose_learnt(Row *r) {
    int asked = -1, last = -1;
    for (int i = 0; i < r->messages; i++) {
        int role = r->message[i].role;
        if (role == ROLE_USER || role == ROLE_DEVELOPER) { asked = i; }
        if (role == ROLE_ASSISTANT) { last = i; }
    }
    for (int i = 0; i < r->messages; i++) {
        if (r->loss_on == LOSS_LAST) { r->message[i].learnt &= i == last; }
        if (r->loss_on == LOSS_COMPLETION) { r->message[i].learnt &= i > asked; }
    }
}

// -------------------------------------------------------------------------------------------------
// 4 One turn

// Instructions that the encoder writes; the model has seen exactly these.
static const char effort_high[] =
    "Reasoning Effort: Absolute maximum with no shortcuts permitted.\nYou MUST be very thorough in "
    "your thinking and comprehensively decompose the problem to resolve the root cause, rigorously "
    "stress-testing your logic against all potential paths, edge cases, and adversarial "
    "scenarios.\n"
    "Explicitly write out your entire deliberation process, documenting every intermediate step, "
    "considered alternative, and rejected hypothesis to ensure absolutely no assumption is left "
    "unchecked.\n\n";
static const char effort_max[] =
    "Reasoning Effort: Beyond maximum — exhaustive, relentless, and uncompromising.\nYou MUST "
    "reason with the utmost depth and rigor, leaving absolutely nothing to chance: exhaustively "
    "decompose the problem into its most fundamental components, trace every causal chain to its "
    "root, and resolve the underlying cause rather than any surface symptom.\nDo not stop "
    "reasoning until you have independently verified the solution from multiple angles and are "
    "certain that no assumption remains unchecked and no error remains undiscovered.\n\n";
static const char tools_before[] =
    "\n\n## Tools\n\nYou have access to a set of tools to help answer the user's question. You can "
    "invoke tools by writing a \"<｜DSML｜tool_calls>\" block like the following:\n\n"
    "<｜DSML｜tool_calls>\n<｜DSML｜invoke name=\"$TOOL_NAME\">\n<｜DSML｜parameter name=\""
    "$PARAMETER_NAME\" string=\"true|false\">$PARAMETER_VALUE</｜DSML｜parameter>\n...\n"
    "</｜DSML｜invoke>\n<｜DSML｜invoke name=\"$TOOL_NAME2\">\n...\n</｜DSML｜invoke>\n"
    "</｜DSML｜tool_calls>\n\nString parameters should be specified as is and set "
    "`string=\"true\"`. For all other types (numbers, booleans, arrays, objects), pass the value "
    "in JSON format and set `string=\"false\"`.\n\nIf thinking_mode is enabled (triggered by "
    "<think>), you MUST output your complete reasoning inside <think>...</think> BEFORE any tool "
    "calls or final response.\n\n"
    "Otherwise, output directly after </think> with tool calls or final response.\n\n"
    "### Available Tool Schemas\n\n";
static const char tools_after[] =
    "\n\nYou MUST strictly follow the above defined tool name and parameter schemas to invoke tool "
    "calls.\n";
static const char format_before[] =
    "\n\n## Response Format:\n\nYou MUST strictly adhere to the following schema to reply:\n";

// A message's content: a string, or a list of parts, [{"type": "text", "text": "..."}, ...], which
// become one text with blank lines between. at: the message; -1: the row's system text. Of a part
// that is no text the encoder writes "[Unsupported image]". That is done for results of tools
// (is_tool); elsewhere an answer would be learnt whose question is not there.
static inline void put_content(Row *r, int at, int is_tool) {
    const Json *j = &r->j;
    int content = at < 0 ? member(j, 0, "system") : member(j, at, "content");
    if (content < 0) { content = member(j, at, "value"); }
    int kind = content < 0 ? 'n' : json_kind(j, content);
    if (kind == '"') { put_user(r, string_at(j, content)); }
    else if (kind != '[' && kind != 'n') { row_wrong(r, "a content that is not a string"); }
    // A message may consist of one of these alone: null is a content too, but a misspelt key is
    // none, and other keys that are null say nothing. A tool may answer with nothing.
    static const char *const alone[] = { "content", "value", "tool_calls", "tools",
        "response_format", "reasoning_content", "reasoning" };
    int there = at < 0 || is_tool;
    for (int k = 0; k < 7 && !there; k++) {
        there = (k < 2 ? member_or_null : member)(j, at, alone[k]) >= 0;
    }
    if (!there) { row_wrong(r, "a message has no content"); }
    if (kind != '[') { return; }
    for (int k = 0, i = content + 1; k < j->tok[content].size; k++, i = json_next(j, i)) {
        Bytes type = string_of(j, i, "type");
        if (k > 0) { put_text(r, "\n\n"); }
        int is_text = type.n == 4 && memcmp(type.s, "text", 4) == 0;
        if (is_text) { put_value(r, member(j, i, "text"), "text"); }
        else if (is_tool) { put_text(r, "[Unsupported "); put_user(r, type); put_text(r, "]"); }
        else { row_wrong(r, "a content of type '%.*s': only text can be learnt", type.n, type.s); }
    }
}

// The tools and the response format of a system or developer message: JSON values, or -1. Tools are
// OpenAI's, {"type": "function", "function": {...}}, or the inner objects, which are what is
// written, one per line.
static inline void put_tools(Row *r, int tools, int format) {
    const Json *j = &r->j;
    if (is_set(j, tools)) {
        if (json_kind(j, tools) != '[') { row_wrong(r, "tools are not a list"); return; }
        put_template(r, tools_before);
        for (int k = 0, i = tools + 1; k < j->tok[tools].size; k++, i = json_next(j, i)) {
            int function = member(j, i, "function");
            if (k > 0) { put_text(r, "\n"); }
            put_json(r, j, function < 0 ? i : function);
        }
        put_text(r, tools_after);
    }
    if (is_set(j, format)) {
        put_text(r, format_before);
        put_json(r, j, format);
    }
}

// One argument of a call: text as it is, all else as JSON. Without string="..." the number 3 and
// the text "3" would look the same.
static inline void put_argument(Row *r, const Json *j, Bytes key, int value) {
    int text = json_kind(j, value) == '"';
    put_template(r, "<｜DSML｜parameter name=\"");
    put_user(r, key);
    put_text(r, text ? "\" string=\"true\">" : "\" string=\"false\">");
    if (text) { put_user(r, string_at(j, value)); } else { put_json(r, j, value); }
    put_template(r, "</｜DSML｜parameter>");
}

// All arguments of a call: an object, or a string of JSON that is one. What is no JSON at all is
// the one argument "arguments", which is what the encoder makes of it. The string's JSON is parsed
// from a copy, which row_parse owns or frees.
static inline void put_arguments(Row *r, const Json *outer, int value) {
    Json inner = { .n = 0 };
    const Json *j = outer;
    int object = value, parsed = 0;
    const char *why = NULL;
    if (value >= 0 && json_kind(outer, value) == '"') {
        Bytes b = string_at(outer, value);
        char *copy = (char *)host_alloc((size_t)b.n + 1);
        memcpy(copy, b.s, (size_t)b.n);
        copy[b.n] = 0;
        parsed = row_parse(&inner, copy, (size_t)b.n, &why);
        j = &inner;
        object = 0;
        if (!parsed && strcmp(why, "not an object") != 0) {
            put_argument(r, outer, (Bytes){ "arguments", 9 }, value);
            return;
        }
    }
    if (object < 0 || (object == 0 && !parsed) || json_kind(j, object) != '{') {
        row_wrong(r, "the arguments of a tool call are not an object");
        return;
    }
    for (int k = 0, i = object + 1; k < j->tok[object].size; k++, i = json_next(j, i + 1)) {
        if (k > 0) { put_text(r, "\n"); }
        put_argument(r, j, string_at(j, i), i + 1);
    }
    if (parsed) { json_free(&inner); }
}

// The calls at the end of an answer, which the model learns to write like this:
//
//     <｜DSML｜tool_calls>
//     <｜DSML｜invoke name="weather">
//     <｜DSML｜parameter name="city" string="true">Bonn</｜DSML｜parameter>
//     <｜DSML｜parameter name="days" string="false">3</｜DSML｜parameter>
//     </｜DSML｜invoke>
//     </｜DSML｜tool_calls>
//
// A blank line stands before the block, and EOS follows its last >.
static inline void put_calls(Row *r, int calls) {
    const Json *j = &r->j;
    if (!is_set(j, calls)) { return; }
    if (json_kind(j, calls) != '[') { row_wrong(r, "tool_calls are not a list"); return; }
    put_template(r, "\n\n<｜DSML｜tool_calls>\n");
    for (int k = 0, i = calls + 1; k < j->tok[calls].size; k++, i = json_next(j, i)) {
        int function = member(j, i, "function"), at = function < 0 ? i : function;
        if (k > 0) { put_text(r, "\n"); }
        put_template(r, "<｜DSML｜invoke name=\"");
        put_value(r, member(j, at, "name"), "tool call's name");
        put_text(r, "\">\n");
        put_arguments(r, j, member(j, at, "arguments"));
        put_template(r, "\n</｜DSML｜invoke>");
    }
    put_template(r, "\n</｜DSML｜tool_calls>");
}

// Which of the newest calls a tool's message answers: its place there; 0: none of them (so does the
// encoder, and such a result moves to the front).
static inline int call_order(const Row *r, int calls, int at) {
    Bytes id = string_of(&r->j, at, "tool_call_id");
    int size = calls < 0 || json_kind(&r->j, calls) != '[' ? 0 : r->j.tok[calls].size;
    for (int k = 0, i = calls + 1; k < size; k++, i = json_next(&r->j, i)) {
        Bytes other = string_of(&r->j, i, "id");
        if (other.n == id.n && memcmp(other.s, id.s, (size_t)id.n) == 0) { return k; }
    }
    return 0;
}

// What the user and the tools say in one turn. Results stand in the order of the calls, whatever
// the order in which they came: with calls (1, 2) the messages result 2, "and?", result 1 become
// result 1, "and?", result 2. Texts keep their places, and equal results their order.
static inline void put_user_turn(Row *r, const Turn *t, int calls) {
    struct { int at, order; } *tool = host_alloc((size_t)t->n * sizeof *tool), keep;
    int tools = 0, next = 0;
    for (int i = t->first; i < t->first + t->n; i++) {
        if (r->message[i].role != ROLE_TOOL) { continue; }
        keep.at = r->message[i].at;
        keep.order = call_order(r, calls, keep.at);
        int k = tools++;
        for (; k > 0 && tool[k - 1].order > keep.order; k--) { tool[k] = tool[k - 1]; }
        tool[k] = keep;
    }
    for (int i = t->first; i < t->first + t->n; i++) {
        if (i > t->first) { put_text(r, "\n\n"); }
        if (r->message[i].role != ROLE_TOOL) { put_content(r, r->message[i].at, 0); continue; }
        put_text(r, "<tool_result>");
        put_content(r, tool[next++].at, 1);
        put_text(r, "</tool_result>");
    }
    free(tool);
}

// An answer, with the reasoning that the opening <think> asked for. last: the turn of the last
// question. Where put_transition wrote </think>, thinking is over and none follows:
//
//     <Assistant><think> | reasoning </think> answer calls EOS       thinking, and not dropped
//     <Assistant></think> | answer calls EOS                         chat, or an earlier turn
//     <title> | answer EOS                                           behind a task
//
// What stands behind the bar is written here, and learnt if the answer is. Behind an answer with
// "wo_eos" there is no EOS: the next one goes on with it, under the same beginning.
static inline void put_answer(Row *r, int i, int last) {
    const Message *m = &r->message[r->turn[i].first];
    const Json *j = &r->j;
    int after_task = i > 0 && task_of(r, &r->turn[i - 1]) >= 0;
    set_label(r, m->learnt && r->headed);
    if (r->thinking && !after_task && (!r->drop || i > last)) {
        int reasoning = member(j, m->at, "reasoning_content");
        if (reasoning < 0) { reasoning = member(j, m->at, "reasoning"); }
        if (reasoning >= 0) { put_value(r, reasoning, "reasoning"); }
        put_control(r, CONTROL_END_THINK);
    }
    put_content(r, m->at, 0);
    put_calls(r, member(j, m->at, "tool_calls"));
    if (member(j, m->at, "function_call") >= 0) { row_wrong(r, "function_call is not tool_calls"); }
    if (!is_set(j, member(j, m->at, "wo_eos"))) {
        put_control(r, CONTROL_EOS);
        r->headed = 0;
    }
    set_label(r, 0);
}

// What follows a turn where the next one is an answer, or a reminder, or nothing: the beginning of
// an answer. A row that ends with a question so ends where an answer is due, as a prompt must. A
// task's token takes the place of <Assistant></think>, but that of "action" stands behind both.
static inline void put_transition(Row *r, int i, int last) {
    static const char *const tasks[] = { "action", "query", "authority", "domain", "title",
                                         "read_url" };
    int role = turn_role(r, i), next = i + 1 < r->turns ? turn_role(r, i + 1) : ROLE_ASSISTANT;
    int task = task_of(r, &r->turn[i]), which = 0;
    if (next != ROLE_ASSISTANT && next != ROLE_REMINDER) { return; }
    if (task >= 0) {
        Bytes name = string_at(&r->j, task);
        while (which < 6 && ((int)strlen(tasks[which]) != name.n
                             || memcmp(tasks[which], name.s, (size_t)name.n) != 0)) { which++; }
        if (which == 6) { row_wrong(r, "the task '%.*s' is not known", name.n, name.s); return; }
        if (which == 0) {
            put_control(r, CONTROL_ASSISTANT);
            put_control(r, r->thinking ? CONTROL_THINK : CONTROL_END_THINK);
        }
        put_control(r, CONTROL_TASKS + which);
        r->headed = 1;
    } else if (role == ROLE_USER || role == ROLE_DEVELOPER) {
        r->headed = 1;
        put_control(r, CONTROL_ASSISTANT);
        put_control(r, r->thinking && (!r->drop || i >= last) ? CONTROL_THINK : CONTROL_END_THINK);
    }
}

// -------------------------------------------------------------------------------------------------
// 5 Rows

// The whole conversation, from the messages and options that the row has set. The row's own tools
// and format are written with a system message that stands first and has none of its own; calls are
// those of the newest answer that has some, for the order of the results.
static inline void put_conversation(Row *r) {
    const Json *j = &r->j;
    int calls = -1;
    choose_learnt(r);
    turns_make(r);
    if (r->thinking && r->drop) { turns_drop(r); }
    int last = last_asked(r);
    for (int i = 0; i < r->turns; i++) {
        const Turn *t = &r->turn[i];
        int role = turn_role(r, i), at = r->message[t->first].at;
        if (i == 0 && r->thinking && r->effort) { put_text(r, r->effort); }
        if (role == ROLE_USER || role == ROLE_DEVELOPER) { put_control(r, CONTROL_USER); }
        if (role == ROLE_REMINDER) { put_control(r, CONTROL_REMINDER); }
        if (role == ROLE_USER) { put_user_turn(r, t, calls); }
        else if (role == ROLE_ASSISTANT) { put_answer(r, i, last); }
        else { put_content(r, at, 0); }
        if (role == ROLE_SYSTEM || role == ROLE_DEVELOPER) {
            int tools = member(j, at, "tools"), format = member(j, at, "response_format");
            int first = i == 0 && role == ROLE_SYSTEM;
            put_tools(r, tools < 0 && first ? r->tools : tools,
                      format < 0 && first ? r->format : format);
        }
        if (role == ROLE_ASSISTANT && is_set(j, member(j, at, "tool_calls"))) {
            calls = member(j, at, "tool_calls");
        }
        put_transition(r, i, last);
    }
}

// The options of a row with messages. Tools, in any message, keep all reasoning, whatever
// drop_thinking says. reasoning_effort is a text in front of the system's, in thinking mode only;
// the first release has one text, which the later one has for "high":
//
//     release      low      high            max
//     preview      -        -               effort_high
//     -0731        -        effort_high     effort_max
static inline void read_options(Row *r) {
    const Json *j = &r->j;
    int mode = member(j, 0, "thinking_mode"), drop = member(j, 0, "drop_thinking"), any_tools = 0;
    int effort = member(j, 0, "reasoning_effort"), system = member(j, 0, "system");
    int has_system = r->messages > 0 && r->message[0].role == ROLE_SYSTEM;
    r->tools = member(j, 0, "tools");
    r->format = member(j, 0, "response_format");
    r->thinking = 0;
    for (int i = 0; i < r->messages; i++) {
        int at = r->message[i].at;
        int reasons = is_set(j, member(j, at, "reasoning_content"))
                   || is_set(j, member(j, at, "reasoning"));
        r->thinking |= reasons && r->message[i].role == ROLE_ASSISTANT;
        any_tools |= is_set(j, member(j, at, "tools"));
    }
    if (mode >= 0) {
        const char *text = json_text(j, mode);
        r->thinking = strcmp(text, "thinking") == 0;
        if (json_kind(j, mode) != '"' || (!r->thinking && strcmp(text, "chat") != 0)) {
            row_wrong(r, "thinking_mode is neither \"chat\" nor \"thinking\"");
        }
    }
    r->drop = (drop < 0 || is_set(j, drop)) && !any_tools && !is_set(j, r->tools);
    r->effort = NULL;
    if (effort >= 0) {
        const char *text = json_kind(j, effort) == '"' ? json_text(j, effort) : "?";
        int max = strcmp(text, "max") == 0, high = strcmp(text, "high") == 0;
        if (max) { r->effort = r->t->newer_efforts ? effort_max : effort_high; }
        if (high && r->t->newer_efforts) { r->effort = effort_high; }
        if (!max && !high && strcmp(text, "low") != 0) { row_wrong(r, "reasoning_effort is none of "
                                                                  "low, high, max"); }
    }
    if (has_system && is_set(j, system)) {
        Bytes own = string_of(j, r->message[0].at, "content"), b = string_at(j, system);
        if (own.n == 0) { own = string_of(j, r->message[0].at, "value"); }
        if (own.n != b.n || memcmp(own.s, b.s, (size_t)b.n) != 0) {
            row_wrong(r, "its system text is another one than that of its first message");
        }
    }
    if (!has_system && (is_set(j, r->tools) || is_set(j, r->format) || is_set(j, system))) {
        messages_grow(r);               // one with the row's system text, or an empty one
        memmove(r->message + 1, r->message, (size_t)r->messages++ * sizeof *r->message);
        r->message[0] = (Message){ ROLE_SYSTEM, -1, 0 };
    }
}

// {"instruction", "input", "output"}: a conversation of one turn, in chat mode:
//
//     system <User>instruction\n\ninput<Assistant></think>output
static inline void put_question(Row *r, int question, int more, int answer) {
    put_content(r, -1, 0);              // the row's system text, if it has one
    put_control(r, CONTROL_USER);
    put_value(r, question, "instruction");
    if (is_set(&r->j, more)) { put_text(r, "\n\n"); put_value(r, more, "input"); }
    put_control(r, CONTROL_ASSISTANT);
    put_control(r, CONTROL_END_THINK);
    set_label(r, 1);
    put_value(r, answer, "output");
}

// The right one of the endings of a HellaSwag row. Its label is a number, or digits in a string:
// where the answers are withheld it is "".
static inline int right_ending(Row *r, int endings) {
    const Json *j = &r->j;
    int label = member(j, 0, "label"), i = endings + 1;
    int length = label < 0 ? 0 : j->tok[label].end - j->tok[label].start;
    const char *s = label < 0 ? "" : json_text(j, label);
    int good = length > 0 && length < 10 && (int)strspn(s, "0123456789") >= length;
    int which = good && json_kind(j, endings) == '[' ? atoi(s) : -1;
    if (which < 0 || which >= j->tok[endings].size) {
        row_wrong(r, "its label is not the number of one of its endings, from 0");
        return -1;
    }
    while (which-- > 0) { i = json_next(j, i); }
    return i;
}

// Everything behind BOS. Returns the kind of the document. A prompt and its completion are two
// lists of messages, or two texts that are written without any roles, as are ctx and its ending.
// The blank between those belongs to the ending: in BPE a word's first token begins with the blank.
static inline int put_row(Row *r) {
    const Json *j = &r->j;
    int messages = member(j, 0, "messages"), text = member(j, 0, "text");
    int prompt = member(j, 0, "prompt"), completion = member(j, 0, "completion");
    int instruction = member(j, 0, "instruction"), output = member(j, 0, "output");
    int ctx = member(j, 0, "ctx"), endings = member(j, 0, "endings");
    if (messages < 0) { messages = member(j, 0, "conversations"); }
    int lists = prompt >= 0 && completion >= 0 && json_kind(j, prompt) == '[';
    if (messages >= 0 || lists) {
        messages_add(r, lists ? prompt : messages, !lists);
        if (lists) { messages_add(r, completion, 1); }
        read_options(r);
        put_conversation(r);
    } else if (prompt >= 0 && completion >= 0) {
        if (is_set(j, member(j, 0, "system"))) {
            row_wrong(r, "a system text has no place in front of a prompt that is a plain text");
        }
        put_value(r, prompt, "prompt");
        set_label(r, 1);
        put_value(r, completion, "completion");
    } else if (instruction >= 0 && output >= 0) {
        put_question(r, instruction, member(j, 0, "input"), output);
    } else if (ctx >= 0 && endings >= 0) {
        put_value(r, ctx, "ctx");
        set_label(r, 1);
        put_text(r, " ");
        put_value(r, right_ending(r, endings), "ending");
    } else if (text >= 0) {
        set_label(r, 1);
        put_value(r, text, "text");
        put_control(r, CONTROL_EOS);
        return BIN_TEXT;
    } else {
        row_wrong(r, "no messages, conversations, prompt and completion, instruction and output, "
                  "ctx and endings, or text");
    }
    if (messages < 0 && !lists) { put_control(r, CONTROL_EOS); }
    encode_pending(r);
    return BIN_CHAT;
}

// Encodes one line. r->t and r->loss_on are set; r->out is its document, and r->wrong says why
// there is none. Returns the kind of the document. The line stays as it is: strings are unescaped
// in a copy, which is gone at the end. The other memory of r is used again by the next line; it is
// zero before the first one, and row_free frees it.
static inline int row_encode(Row *r, const char *line, size_t n) {
    const char *why;
    char *copy = (char *)host_alloc(n + 1);
    memcpy(copy, line, n);
    copy[n] = 0;
    r->out.n = r->n = 0;
    r->messages = r->turns = r->spelled = r->label = r->headed = 0;
    r->wrong[0] = 0;
    if (!row_parse(&r->j, copy, n, &why)) { row_wrong(r, "%s", why); return BIN_CHAT; }
    tokens_add(&r->out, r->t->control[CONTROL_BOS] | TOKEN_FIRST);
    set_label(r, 0);
    int kind = put_row(r);
    json_free(&r->j);
    return kind;
}

static inline void row_free(Row *r) {
    free(r->out.token);
    free(r->text);
    free(r->message);
    free(r->turn);
}
#endif // CHAT_C
