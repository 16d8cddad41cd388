// plot.c: draws a run's loss curves as a PNG, from the logs alone. The trainer includes it and
// draws OUT/loss.png at exit; as a tool of its own it draws any folder that has the two logs, lays
// several runs over each other (./loss.png: run 1 blue, 2 green, ..; its validation darker, with
// marks), or writes the training log of one as a table (val_loss is not in it: it has a log of its
// own, and other steps):
//
//     cc -DPLOT_MAIN -I.deps/usr/include dev/plot.c -o plot -lm
//     ./plot out          ./plot out out/previous-1          ./plot --csv out > training.csv
//
// A log is one JSON object per line, as the trainer writes it, "step" first:
//
//     {"step": 12, "epoch": 0, "timestamp": "...", "loss": 3.21, ..., "num_label_tokens": 900}
//     {"step": 10, "epoch": 0, "timestamp": "...", "val_loss": 3.4}
//
// The lines are searched for what is wanted, so this file needs no JSON reader.
//
// Axes, ticks with numbers, two curves, a 5 x 7 font of the characters that takes: nothing else.
// The PNG itself is written by stb_image_write.h (Debian: libstb-dev); without it nothing is drawn.
#ifndef PLOT_C
#define PLOT_C
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#if defined(__has_include)
#if __has_include(<stb/stb_image_write.h>)
#define HAVE_STB_IMAGE_WRITE
#endif
#endif
#ifdef HAVE_STB_IMAGE_WRITE
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmissing-field-initializers"
#define STB_IMAGE_WRITE_IMPLEMENTATION
#include <stb/stb_image_write.h>        // defines: stbi_write_png
#pragma GCC diagnostic pop
#else
static inline int stbi_write_png(const char *path, int w, int h, int channels, const void *rgb,
                                 int stride) {
    (void)path, (void)w, (void)h, (void)channels, (void)rgb, (void)stride;
    return 0;
}
#endif

// Reads "step" and one other number from a line of a log; 0 if it has not both, or no end. A line
// without its end is being written at the moment, or the run died in it: a number cut short would
// still be a number. The quotes keep "loss" from being found in "val_loss".
static inline int log_parse(const char *line, const char *key, int *step, double *value) {
    char quoted[32];
    snprintf(quoted, sizeof quoted, "\"%s\": ", key);
    const char *at = strstr(line, quoted);
    return sscanf(line, "{\"step\": %d,", step) == 1 && at != NULL && strstr(at, "}\n") != NULL
        && sscanf(at + strlen(quoted), "%lf", value) == 1;
}

// Sizes and places in pixels, from the upper left; colours are 0xRRGGBB. The frame of the curves is
// PLOT_LEFT .. PLOT_RIGHT, PLOT_TOP .. PLOT_BOTTOM; around it stand the numbers and the legend.
enum { PLOT_W = 720, PLOT_H = 450, PLOT_LEFT = 70, PLOT_RIGHT = PLOT_W - 20, PLOT_TOP = 24,
       PLOT_BOTTOM = PLOT_H - 45,
       PLOT_INK = 0x303030, PLOT_GRID = 0xE4E4E4, PLOT_BLUE = 0x1F77B4, PLOT_ORANGE = 0xE06000,
       PLOT_RUNS = 6 };
static const int plot_colors[PLOT_RUNS][2] = {      // of a run's training and validation loss
    { 0x1F77B4, 0x0B3C5D }, { 0x3DA35D, 0x145A32 }, { 0xD65F5F, 0x7B1E1E }, { 0x956CB4, 0x4A235A },
    { 0xC29B00, 0x6B5600 }, { 0x17A2B8, 0x0B525B } };

typedef struct {
    unsigned char *rgb;         // (PLOT_H, PLOT_W, 3)
    double x_max, y_min, y_max; // of the curves; steps begin at 0
} Plot;

// 5 columns of 7 dots, one byte per column, lowest bit on top: '1' is a dot beside the top and one
// beside the foot (0x42), the stem of all seven (0x7F), and the foot's other dot (0x40). Characters
// are digits, what %.6g may put around them, and the letters of step, loss, train and val.
static const struct { char c; unsigned char column[5]; } plot_font[] = {
    {'0', {0x3E, 0x51, 0x49, 0x45, 0x3E}}, {'1', {0x00, 0x42, 0x7F, 0x40, 0x00}},
    {'2', {0x62, 0x51, 0x49, 0x49, 0x46}}, {'3', {0x22, 0x41, 0x49, 0x49, 0x36}},
    {'4', {0x18, 0x14, 0x12, 0x7F, 0x10}}, {'5', {0x27, 0x45, 0x45, 0x45, 0x39}},
    {'6', {0x3E, 0x49, 0x49, 0x49, 0x32}}, {'7', {0x01, 0x71, 0x09, 0x05, 0x03}},
    {'8', {0x36, 0x49, 0x49, 0x49, 0x36}}, {'9', {0x26, 0x49, 0x49, 0x49, 0x3E}},
    {'.', {0x00, 0x60, 0x60, 0x00, 0x00}}, {'-', {0x08, 0x08, 0x08, 0x08, 0x08}},
    {'+', {0x08, 0x08, 0x3E, 0x08, 0x08}}, {'a', {0x20, 0x54, 0x54, 0x54, 0x78}},
    {'e', {0x38, 0x54, 0x54, 0x54, 0x18}}, {'i', {0x00, 0x44, 0x7D, 0x40, 0x00}},
    {'l', {0x00, 0x41, 0x7F, 0x40, 0x00}}, {'n', {0x7C, 0x08, 0x04, 0x04, 0x78}},
    {'o', {0x38, 0x44, 0x44, 0x44, 0x38}}, {'p', {0x7C, 0x14, 0x14, 0x14, 0x08}},
    {'r', {0x7C, 0x08, 0x04, 0x04, 0x08}}, {'s', {0x48, 0x54, 0x54, 0x54, 0x24}},
    {'t', {0x04, 0x3F, 0x44, 0x40, 0x20}}, {'v', {0x1C, 0x20, 0x40, 0x20, 0x1C}},
};

// What lies outside the picture is left out, so nobody else has to look where a line ends.
static inline void plot_dot(Plot *p, int x, int y, int color) {
    if (x < 0 || x >= PLOT_W || y < 0 || y >= PLOT_H) { return; }
    for (int i = 0; i < 3; i++) {
        p->rgb[3 * (y * PLOT_W + x) + i] = (unsigned char)(color >> (16 - 8 * i));
    }
}

// A line from (x0,y0) to (x1,y1): one dot per pixel along its longer side, each of them a square of
// width x width whose upper left corner is on the line. No smoothing.
static inline void plot_line(Plot *p, int x0, int y0, int x1, int y1, int width, int color) {
    int n = abs(x1 - x0) > abs(y1 - y0) ? abs(x1 - x0) : abs(y1 - y0);
    for (int i = 0; i <= n; i++) {
        int x = x0 + (n ? (x1 - x0) * i / n : 0), y = y0 + (n ? (y1 - y0) * i / n : 0);
        for (int j = 0; j < width * width; j++) {
            plot_dot(p, x + j % width, y + j / width, color);
        }
    }
}

// Text whose left end (place 0), middle (1) or right end (2) is at x, and its top at y. A character
// takes 6 pixels, 5 of them its own; one that the font has not stays blank.
static inline void plot_text(Plot *p, const char *text, int x, int y, int place, int color) {
    x -= (int)strlen(text) * 6 * place / 2;
    for (; *text; text++, x += 6) {
        for (size_t k = 0; k < sizeof plot_font / sizeof plot_font[0]; k++) {
            for (int i = 0; plot_font[k].c == *text && i < 35; i++) {
                if (plot_font[k].column[i / 7] >> i % 7 & 1) {
                    plot_dot(p, x + i / 7, y + i % 7, color);
                }
            }
        }
    }
}

// Pixels of a step, and of a loss: y grows downwards in the picture. Neither range may be 0.
static inline int plot_x(const Plot *p, double step) {
    return PLOT_LEFT + (int)lround(step / p->x_max * (PLOT_RIGHT - PLOT_LEFT));
}

static inline int plot_y(const Plot *p, double loss) {
    double part = (loss - p->y_min) / (p->y_max - p->y_min);
    return PLOT_BOTTOM - (int)lround(part * (PLOT_BOTTOM - PLOT_TOP));
}

// The distance of ticks: the first of 1, 2, 5 times a power of ten that is at least a sixth of the
// range. So there are at most six distances in it, and two at least: a range of 3 has ticks at 0.5.
static inline double plot_tick(double range) {
    double power = pow(10, floor(log10(range / 6))), part = range / 6 / power;
    return power * (part <= 1 ? 1 : part <= 2 ? 2 : part <= 5 ? 5 : 10);
}

// The grid, its numbers and the names of the axes. The k-th tick is k * tick, not a sum of ticks,
// whose rounding errors would show in the numbers. Steps are whole, so their ticks are 1 or more.
static inline void plot_axes(Plot *p) {
    char text[32];
    double tick = plot_tick(p->y_max - p->y_min);
    for (double k = ceil(p->y_min / tick); k * tick <= p->y_max; k++) {
        int y = plot_y(p, k * tick);
        plot_line(p, PLOT_LEFT, y, PLOT_RIGHT, y, 1, PLOT_GRID);
        snprintf(text, sizeof text, "%.6g", k * tick);
        plot_text(p, text, PLOT_LEFT - 8, y - 3, 2, PLOT_INK);
    }
    tick = fmax(plot_tick(p->x_max), 1);
    for (double k = 0; k * tick <= p->x_max; k++) {
        int x = plot_x(p, k * tick);
        plot_line(p, x, PLOT_TOP, x, PLOT_BOTTOM, 1, PLOT_GRID);
        snprintf(text, sizeof text, "%.6g", k * tick);
        plot_text(p, text, x, PLOT_BOTTOM + 8, 1, PLOT_INK);
    }
    plot_line(p, PLOT_LEFT, PLOT_TOP, PLOT_LEFT, PLOT_BOTTOM, 1, PLOT_INK);
    plot_line(p, PLOT_LEFT, PLOT_BOTTOM, PLOT_RIGHT, PLOT_BOTTOM, 1, PLOT_INK);
    plot_text(p, "step", (PLOT_LEFT + PLOT_RIGHT) / 2, PLOT_H - 16, 1, PLOT_INK);
    plot_text(p, "loss", PLOT_LEFT, PLOT_TOP - 14, 1, PLOT_INK);
}

// Goes through one log. With draw 0 it widens the ranges, with draw 1 it draws the curve, whose
// points are marked where they are few (validation). Returns their number; a log that is not there
// has none. A line is joined to the last good one before it, over whatever does not parse.
static inline int plot_curve(Plot *p, const char *path, const char *key, int color, int draw) {
    int marks = strcmp(key, "val_loss") == 0;
    FILE *file = fopen(path, "r");
    char line[1024];
    int step, points = 0, x0 = 0, y0 = 0;
    double loss;
    while (file && fgets(line, sizeof line, file)) {
        if (!log_parse(line, key, &step, &loss)) { continue; }
        if (draw) {
            int x = plot_x(p, step), y = plot_y(p, loss);
            plot_line(p, points ? x0 : x, points ? y0 : y, x, y, 2, color);
            if (marks) { plot_line(p, x - 1, y - 1, x + 1, y - 1, 3, color); }
            x0 = x;
            y0 = y;
        }
        p->x_max = fmax(p->x_max, step);
        p->y_min = fmin(p->y_min, loss);
        p->y_max = fmax(p->y_max, loss);
        points++;
    }
    if (file) { fclose(file); }
    return points;
}

// Draws the logs of n runs into png. Returns 1, 0 if that failed, -1 if there is nothing to draw.
// The logs are read twice instead of kept: once for the ranges, which the axes need, once to draw.
// The grid comes first, so that curves lie over it. The legend, one "1 train val" of 80 pixels per
// run, fills up from the right, above the frame; the tool prints which number is which folder.
static inline int plot_runs(const char *png, const char (*train)[1024], const char (*val)[1024],
                            int n) {
    Plot p = { NULL, 1, INFINITY, -INFINITY };
    int points = 0;
    for (int i = 0; i < n; i++) {
        points += plot_curve(&p, train[i], "loss", 0, 0) + plot_curve(&p, val[i], "val_loss", 0, 0);
    }
    if (points == 0) { return -1; }
    // Curves do not touch the frame, and a single point has a range of 0, which the 1e-3 widens.
    double margin = 0.05 * (p.y_max - p.y_min) + 1e-3;
    p.y_min -= margin;
    p.y_max += margin;
    p.rgb = (unsigned char *)malloc(PLOT_W * PLOT_H * 3);
    if (p.rgb == NULL) { return 0; }
    memset(p.rgb, 255, PLOT_W * PLOT_H * 3);
    plot_axes(&p);
    for (int i = 0; i < n; i++) {
        int color = n > 1 ? plot_colors[i % PLOT_RUNS][0] : PLOT_BLUE, x = PLOT_RIGHT - 70 - 80 * i;
        int dark = n > 1 ? plot_colors[i % PLOT_RUNS][1] : PLOT_ORANGE;
        char number[8] = "";
        plot_curve(&p, train[i], "loss", color, 1);
        plot_curve(&p, val[i], "val_loss", dark, 1);
        if (n > 1) { snprintf(number, sizeof number, "%d", i + 1); }
        plot_text(&p, number, x - 10, PLOT_TOP - 14, 0, color);
        plot_text(&p, "train", x, PLOT_TOP - 14, 0, color);
        plot_text(&p, "val", x + 40, PLOT_TOP - 14, 0, dark);
    }
    int written = stbi_write_png(png, PLOT_W, PLOT_H, 3, p.rgb, 3 * PLOT_W);
    free(p.rgb);
    return written != 0;
}

// One run, for the trainer: png, train and val are paths. Returns what plot_runs does.
static inline int plot_loss(const char *png, const char *train, const char *val) {
    char paths[2][1][1024];
    snprintf(paths[0][0], sizeof paths[0][0], "%s", train);
    snprintf(paths[1][0], sizeof paths[1][0], "%s", val);
    return plot_runs(png, paths[0], paths[1], 1);
}

#ifdef PLOT_MAIN
// training.jsonl as a table, one line per step; a null, or a key that is not there, is an empty
// field. A value is copied as it is written: up to the comma or the } behind it, or between its
// quotes. Returns the exit code: 1 if there are no steps.
static int write_csv(const char *log) {
    static const char *const keys[] = { "epoch", "timestamp", "loss", "grad_norm", "lr", "mem",
        "tps", "tps_per_gpu", "mfu", "num_tokens_per_step", "num_label_tokens" };
    enum { KEYS = sizeof keys / sizeof keys[0] };
    FILE *file = fopen(log, "r");
    char line[1024];
    int step, lines = 0;
    double value;
    printf("step");
    for (int k = 0; k < KEYS; k++) { printf(",%s", keys[k]); }
    printf("\n");
    while (file && fgets(line, sizeof line, file)) {
        if (!log_parse(line, "loss", &step, &value)) { continue; }
        printf("%d", step);
        for (int k = 0; k < KEYS; k++) {
            char quoted[32];
            snprintf(quoted, sizeof quoted, "\"%s\": ", keys[k]);
            const char *at = strstr(line, quoted);
            at = at ? at + strlen(quoted) : "";
            if (*at == '"') { at++; }
            printf(",%.*s", strncmp(at, "null", 4) ? (int)strcspn(at, "\",}") : 0, at);
        }
        printf("\n");
        lines++;
    }
    if (file) { fclose(file); }
    if (lines == 0) { fprintf(stderr, "%s has no steps\n", log); }
    return lines == 0;
}

// The folders are out unless others are named. The picture of one run lies in its folder; that of
// several belongs to none of them and is ./loss.png.
int main(int argc, char **argv) {
    static char train[PLOT_RUNS][1024], val[PLOT_RUNS][1024];
    char png[1024] = "loss.png";
    int csv = argc > 1 && strcmp(argv[1], "--csv") == 0, n = argc - 1 - csv;
    const int most = csv ? 1 : PLOT_RUNS;
    if (n > most) { fprintf(stderr, "%d run%s at most\n", most, csv ? "" : "s"); return 1; }
    for (int i = 0; i < n || i == 0; i++) {
        const char *out = n > 0 ? argv[1 + csv + i] : "out";
        snprintf(train[i], sizeof train[i], "%s/training.jsonl", out);
        snprintf(val[i], sizeof val[i], "%s/validation.jsonl", out);
        if (n <= 1) { snprintf(png, sizeof png, "%s/loss.png", out); }
        if (n > 1) { printf("%d %s\n", i + 1, out); }
    }
    if (csv) { return write_csv(train[0]); }
    int drawn = plot_runs(png, train, val, n > 0 ? n : 1);
    if (drawn == 1) { printf("drawn in %s\n", png); }
    else { fprintf(stderr, "%s was not drawn\n", png); }
    return drawn != 1;
}
#endif
#endif // PLOT_C
