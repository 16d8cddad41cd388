// options.c: a program's options as one table, and everything that reads it: the command line, a
// file of `name = value` lines, --help, and the guess at what a misspelt name was meant to be. The
// value of an option comes from the strongest of its sources. The program fills the table:
//
//     static Option table[] = {{"steps", 'x', WHOLE, &steps, "100", "N", .help = "how many"}};
//     options.first = table, options.n = sizeof table / sizeof table[0];
//     for EACH_OPTION(o) { option_set(o, o->normal, FROM_DEFAULT, ""); }
//     options_from_argv(argc, argv);
#ifndef OPTIONS_C
#define OPTIONS_C
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include "../kernels.cu"        // defines: die, refuse_if
#include <errno.h>
#include <limits.h>

enum { FLAG, WHOLE, COUNT, NUMBER, TEXT, WORD, MAYBE }; // WHOLE >= 0, COUNT >= 1, MAYBE: [text]
enum { FROM_DEFAULT, FROM_STATE, FROM_FILE, FROM_ARGV };

typedef struct {
    const char *name;
    char letter;                // 0: none
    int kind;                   // FLAG ...
    void *at;                   // the int, double or const char * that it sets
    const char *normal;         // its default
    const char *arg;            // its name in --help; WORD: the words
    int kept;                   // the program's own
    const char *help, *tiny;    // tiny: default of a built-in model, where it is another one
    const char *text;           // what it is set to, and by whom: FROM_*
    int from;
} Option;

static struct { Option *first; int n; } options;
#define EACH_OPTION(o) (Option *o = options.first; o < options.first + options.n; o++)

// Is word one of the words in "a|b|c"?
static inline int is_word(const char *words, const char *word) {
    size_t length = strlen(word);
    for (const char *w = words; w; w = strchr(w, '|') ? strchr(w, '|') + 1 : NULL) {
        if (strncmp(w, word, length) == 0 && (w[length] == '|' || w[length] == 0)) { return 1; }
    }
    return 0;
}

// Sets an option, unless a stronger source has. where: of the value, for messages ("FILE:3: ").
static inline void option_set(Option *o, const char *text, int from, const char *where) {
    char *end;
    double number = strtod(text, &end);
    int is_number = *text && !*end && isfinite(number) && number >= (o->kind == COUNT);
    int is_whole = is_number && number <= INT_MAX && number == floor(number);
    if (from < o->from) { return; }
    refuse_if(o->kind == NUMBER && !is_number, "%s--%s: '%s' is not a number from 0 on", where,
              o->name, text);
    refuse_if((o->kind == WHOLE || o->kind == COUNT) && !is_whole, "%s--%s: '%s' is not a whole "
              "number from %d on", where, o->name, text, o->kind == COUNT);
    refuse_if(o->kind == WORD && !is_word(o->arg, text), "%s--%s: '%s' is none of %s", where,
              o->name, text, o->arg);
    refuse_if(o->kind == FLAG && !is_word("0|1|no|yes|off|on|false|true", text),
              "%s--%s: '%s' is neither true nor false", where, o->name, text);
    const int is_folder = strstr(o->arg, "DIR") != NULL, is_file = strcmp(o->arg, "F") == 0;
    refuse_if(from >= FROM_FILE && *text == 0 && (is_folder || is_file) && o->kind != NUMBER,
              "%s--%s: no %s is named", where, o->name, is_folder ? "folder" : "file");
    char *copy = strdup(text);
    for (size_t n = strlen(copy); is_folder && n > 1 && copy[n - 1] == '/'; ) {
        copy[--n] = 0;          // so that the last part of a path is a name
    }
    o->text = copy;
    o->from = from;
    if (o->kind == FLAG) {
        *(int *)o->at = is_word("1|yes|on|true", text);
        o->text = *(int *)o->at ? "1" : "0";
    } else if (o->kind == WHOLE || o->kind == COUNT) {
        *(int *)o->at = (int)number;
    } else if (o->kind == NUMBER) {
        *(double *)o->at = number;
    } else {
        *(const char **)o->at = o->text;
    }
}

// By its name, or by its letter where that is not 0; NULL if there is none.
static inline Option *option_find(const char *name, size_t length, char letter) {
    for EACH_OPTION(o) {
        int same = strlen(o->name) == length && memcmp(o->name, name, length) == 0;
        if (letter ? o->letter == letter : same) { return o; }
    }
    return NULL;
}

// The option that sets this field of opt.
static inline Option *option_of(const void *field) {
    Option *o = options.first;
    while (o->at != field) { o++; }
    return o;
}

// Did the user say it, on the command line or in a file?
static inline int is_given(const void *field) { return option_of(field)->from >= FROM_FILE; }

// Writes a derived number back into the table, so that it is printed and kept like a given one.
static inline void option_derive(int *field, double value) {
    char text[32];
    snprintf(text, sizeof text, "%.0f", value);
    option_set(option_of(field), text, option_of(field)->from, "derived ");
}

// How many letters must be changed, added or dropped to turn a (n) into b (Levenshtein).
static inline int edit_distance(const char *a, size_t n, const char *b) {
    int row[64], m = (int)strlen(b);
    for (int j = 0; j <= m; j++) { row[j] = j; }
    for (size_t i = 0; i < n; i++) {
        int diagonal = row[0]++;
        for (int j = 1; j <= m; j++) {
            int change = diagonal + (a[i] != b[j - 1]);
            int shift = 1 + (row[j] < row[j - 1] ? row[j] : row[j - 1]);
            diagonal = row[j];
            row[j] = change < shift ? change : shift;
        }
    }
    return row[m];
}

// Ends the process, with the name that is nearest to what was typed, if one is near. One letter is
// a misremembered short option: nearest is a name that begins with it.
static inline void option_unknown(const char *where, const char *name, size_t length) {
    const Option *nearest = option_find("help", 4, 0);
    int best = length == 1 ? 1 : INT_MAX;
    for EACH_OPTION(o) {
        int distance = length == 1 ? (o->name[0] | 32) != (*name | 32)
                                   : edit_distance(name, length, o->name);
        if (distance < best) { best = distance; nearest = o; }
    }
    const int near = length == 1 || 2 * best <= (int)length;
    die(EXIT_USAGE, "%sunknown option %s%.*s HINT: %s%s%s--help lists all", where, *where ? "" :
        length == 1 ? "-" : "--", (int)length, name, near ? "did you mean --" : "",
        near ? nearest->name : "", near ? "? " : "");
}

// --name value, --name=value, -n value, -nvalue.
static inline void options_from_argv(int argc, char **argv) {
    for (int i = 1; i < argc; i++) {
        int letter = argv[i][0] == '-' && argv[i][1] != '-';
        const char *name = argv[i] + 2 - letter, *value = NULL;
        refuse_if(argv[i][0] != '-' || *name == 0, "'%s' is not an option HINT: ./train --help; a "
                  "pattern for several files is quoted", argv[i]);
        size_t length = letter ? 1 : strcspn(name, "=");
        Option *o = option_find(name, length, letter ? *name : 0);
        if (o == NULL) { option_unknown("", name, length); }
        if (name[length]) {
            value = name + length + !letter;
        } else if (o->kind == FLAG) {
            value = "1";
        } else if (o->kind == MAYBE && (i + 1 == argc || argv[i + 1][0] == '-')) {
            value = "latest";
        } else {
            refuse_if(++i == argc, "--%s needs a value: %s", o->name, o->arg);
            value = argv[i];
        }
        option_set(o, value, FROM_ARGV, "");
    }
}

// Removes the blanks around a text, in place.
static inline char *trim(char *text) {
    text += strspn(text, " \t\r\n");
    size_t length = strlen(text);
    while (length > 0 && strchr(" \t\r\n", text[length - 1])) { text[--length] = 0; }
    return text;
}

// --config: lines `name = value`. A line that begins with # is a comment.
static inline void options_from_file(const char *path) {
    FILE *file = fopen(path, "r");
    char text[4096], where[1024 + 32];
    refuse_if(file == NULL, "--config: cannot read %s: %s", path, strerror(errno));
    for (int line = 1; fgets(text, sizeof text, file); line++) {
        const int mark = line == 1 && strncmp(text, "\xEF\xBB\xBF", 3) == 0 ? 3 : 0;     // UTF-8's
        snprintf(where, sizeof where, "%.1000s:%d: ", path, line);
        refuse_if(strlen(text) + 1 == sizeof text && text[sizeof text - 2] != '\n', "%sa line has "
                  "at most %zu bytes", where, sizeof text - 2);
        char *name = trim(text + mark), *equals = strchr(text, '=');
        if (*name == 0 || *name == '#') { continue; }
        refuse_if(equals == NULL, "%s'%s' is not `name = value`", where, name);
        *equals = 0;
        name = trim(name);
        Option *o = option_find(name, strlen(name), 0);
        if (o == NULL) { option_unknown(where, name, strlen(name)); }
        option_set(o, trim(equals + 1), FROM_FILE, where);
    }
    refuse_if(ferror(file), "--config: cannot read %s: %s", path, strerror(errno));
    fclose(file);
}

// --help. about: what comes before the list.
static inline void options_help(const char *about) {
    fputs(about, stdout);
    for EACH_OPTION(o) {
        char left[128];
        int is_list = o->kind == WORD, used = snprintf(left, sizeof left, "%c%c%c --%s",
            o->letter ? '-' : ' ', o->letter ? o->letter : ' ', o->letter ? ',' : ' ', o->name);
        snprintf(left + used, sizeof left - used, " %s", is_list ? "WORD" : o->arg);
        printf("  %-26s %s%s%s", left, is_list ? o->arg : "", is_list && *o->help ? ": " : "",
               o->help);
        if (o->kind != FLAG && *o->normal) { printf(" [%s]", o->normal); }
        if (o->tiny) { printf(" [tiny: %s]", o->tiny); }
        printf("\n");
    }
}
#endif // OPTIONS_C
