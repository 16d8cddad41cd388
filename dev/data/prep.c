// prep.c: text into tokens, and tokens into text.
//
// The trainer learns from token files (.bin) and, through this file, from plain text. It includes
// this file so that `./train -i book.txt` needs no step in between. So far the only tokenizer is
// that of the built-in tiny model, whose tokens are the 256 bytes, BOS and EOS; the tokenizer and
// the chat encoding of the real model will stand here too.
//
// One token of a file, and of a text once it is read, is 32 bits:
//
//     bits 0..29  id
//     bit 30      a document begins here
//     bit 31      the loss counts this token when it is predicted from the one before it; never
//                 set where a document begins
#ifndef PREP_C
#define PREP_C
#include "../../refit.c"    // defines: Config, file_open, file_pread

#define TOKEN_LABEL 0x80000000u
#define TOKEN_FIRST 0x40000000u
#define TOKEN_ID 0x3FFFFFFFu

// A token file is a header of 256 int32 (magic, version, vocabulary, count mod 2^31, count / 2^31,
// kind, zeros) and one token after the other, little-endian. Of a conversation (kind chat) only
// the answers are labels.
enum { BIN_MAGIC = 20260424, BIN_VERSION = 1, BIN_HEADER = 1024, BIN_TEXT = 0, BIN_CHAT = 1 };

// Is this a model whose tokens are bytes? Its configuration says so by where it puts BOS.
static inline int bytes_are_tokens(const Config *c) { return c->bos == 256 && c->V > c->eos; }

// Reads a file as one document: BOS, its bytes, EOS. Returns n tokens; the caller frees them.
static inline uint32_t *text_tokens(const char *path, const Config *c, size_t *n) {
    size_t size;
    int file = file_open(path, &size, "-i and -j name data files");
    uint32_t *token = (uint32_t *)host_alloc((size + 2) * sizeof *token);
    // The bytes go to the end of the array and are widened from there, front to back: token i + 1
    // is written before byte i + 1 is read, but ends in front of it.
    unsigned char *bytes = (unsigned char *)(token + size + 2) - size;
    int error = file_pread(file, bytes, size, 0);
    if (error) { die(EXIT_USAGE, "cannot read %s: %s", path, strerror(error)); }
    close(file);
    for (size_t i = 0; i < size; i++) { token[i + 1] = bytes[i] | TOKEN_LABEL; }
    token[0] = (uint32_t)c->bos | TOKEN_FIRST;
    token[size + 1] = (uint32_t)c->eos | TOKEN_LABEL;
    *n = size + 2;
    return token;
}

// Writes a prompt's tokens; without text, or a tokenizer, that is BOS. Returns how many.
static inline int prompt_tokens(int *token, const char *prompt, const Config *c) {
    int n = 0;
    for (; bytes_are_tokens(c) && prompt[n]; n++) { token[n] = (unsigned char)prompt[n]; }
    if (n == 0) { token[n++] = c->bos; }
    return n;
}

// One token as text: a byte as it is if it prints, else as an escape; of other models the id.
// Returns the number of characters, less than TOKEN_TEXT.
enum { TOKEN_TEXT = 16 };
static inline int token_text(char *text, int id, const Config *c) {
    int prints = id == '\n' || (id >= ' ' && id < 127);
    return snprintf(text, TOKEN_TEXT, !bytes_are_tokens(c) ? "%d " : prints ? "%c"
                    : id > 255 ? "<%d>" : "\\x%02x", id);
}
#endif // PREP_C
