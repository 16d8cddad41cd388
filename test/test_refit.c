// Tests of refit.c: what is read is what was written, every defect of a file ends with one line and
// exit code 1, ranks write the same bytes as one process, and no moment is bad for being killed.
//
// Oracles: files written here byte by byte, independent of refit.c; fused tensors computed from
// their definition, element by element; all fp16 codes from the compiler's _Float16; the format's
// own library, where python3 has it. The adapter files as such were loaded into peft 0.21 on
// transformers 5.17, with equal logits.
#include "../refit.c"
#include "check.h"
#include <signal.h>
#include <sys/mount.h>
#include <sys/resource.h>

#if defined(__SANITIZE_ADDRESS__)
// Children end with exit(1) in the middle of things: what they leave is no leak. And there are many
// of them, so that little memory should have to be copied.
const char *__asan_default_options(void);
const char *__asan_default_options(void) { return "detect_leaks=0:quarantine_size_mb=1"; }
#endif

static char root[64];               // temporary folder of this run

static char *in_root(char *out, const char *name) { return path_make(out, root, "/", name); }

static void write_bytes(const char *path, const void *bytes, size_t n) {
    // rewriting a file in place makes some file systems wait for the disk
    unlink(path);
    FILE *f = fopen(path, "wb");
    if (f == NULL || fwrite(bytes, 1, n, f) != n || fclose(f) != 0) { perror(path); exit(99); }
}

static char *read_bytes(const char *path, size_t *n) {
    FILE *f = fopen(path, "rb");
    char *bytes = NULL;
    *n = 0;
    if (f == NULL) { return NULL; }
    fseek(f, 0, SEEK_END);
    *n = (size_t)ftell(f);
    rewind(f);
    bytes = (char *)malloc(*n + 1);
    if (fread(bytes, 1, *n, f) != *n) { perror(path); exit(99); }
    bytes[*n] = 0;
    fclose(f);
    return bytes;
}

static int same_file(const char *a, const char *b) {
    size_t n, m;
    char *x = read_bytes(a, &n), *y = read_bytes(b, &m);
    int same = x && y && n == m && memcmp(x, y, n) == 0;
    free(x);
    free(y);
    return same;
}

// Removes a tree, whatever is in it.
static void wipe(const char *path) {
    char command[PATH_SIZE + 16];
    snprintf(command, sizeof command, "rm -rf '%s'", path);
    if (system(command) != 0) { exit(99); }
}

// text with the first `from` replaced by `to`; malloc'ed. Must be there.
static char *replaced(const char *text, const char *from, const char *to) {
    const char *at = strstr(text, from);
    if (at == NULL) { printf("no '%s' in the test's own text\n", from); exit(99); }
    char *out = (char *)malloc(strlen(text) + strlen(to) + 1);
    sprintf(out, "%.*s%s%s", (int)(at - text), text, to, at + strlen(from));
    return out;
}

// f(arg) must end with this exit code and one line that holds `expect`.
static void check_exits(int wanted, const char *what, void (*f)(void *), void *arg,
                        const char *expect) {
    char text[4096];
    int code = run_child(f, arg, text, sizeof text);
    int lines = 0;
    for (const char *c = text; *c; c++) { lines += *c == '\n'; }
    check(code == wanted && lines == 1 && strstr(text, expect) && strncmp(text, "error", 5) == 0,
          "%s: exit code %d, wanted one line with '%s', got: %s", what, code, expect, text);
}
static void check_dies(const char *what, void (*f)(void *), void *arg, const char *expect) {
    check_exits(EXIT_USAGE, what, f, arg, expect);
}

// -------------------------------------------------------------------------------------------------
// JSON

static void parse_text(void *arg) {
    Json j;
    char *copy = strdup((const char *)arg);
    json_parse(&j, "text", copy, strlen(copy));
    json_free(&j);
}

static void find_a(void *arg) {
    Json j;
    json_parse(&j, "text", strdup((const char *)arg), strlen((const char *)arg));
    json_find(&j, 0, "a");
}

static void test_json(void) {
    static const char *const good[] = {
        "{}", " [ ] ", "[1,2.5,-3e+5,1E-2,0]", "{\"a\":{\"b\":[{}, [], \"\"]},\"c\":null}", "\"x\"",
        "[true,false,null]", "{\"a\":1}   \n", "[\"\\u0041\\n\\\\\\\"\"]", "-0.5 ",
    };
    static const char *const bad[] = {
        "", " ", "{", "[1", "{\"a\" \"b\"}", "{\"a\":1,}", "{,}", "[,]", "[1 2]", "[1,,2]",
        "{\"a\":}",
        "{\"a\"}", "{1:2}", "{\"a\":1 \"b\":2}", "[1.2.3]", "[tru]", "[nulll]", "[1}", "{\"a\":1]",
        "{} {}", "{}x", "[\"a\nb\"]", "[\"\\x\"]", "[\"\\u12\"]", "\"abc", "[0x10]", "[1-]",
        "[nan]",
        "{\"a\":1,\"b\"}", "[\"a\":1]", ":", ",", "]", "{\"a\"::1}", "[-]", "{\"a\":{\"b\":1}",
        "[--1]",
        "{[]:1}", "[+1]", "{\"a\":\"b\":\"c\"}", "[[[[1]]]",
    };
    for (size_t i = 0; i < sizeof good / sizeof *good; i++) {
        char text[1024];
        int code = run_child(parse_text, (void *)good[i], text, sizeof text);
        check(code == 0, "good JSON %s: exit code %d, %s", good[i], code, text);
    }
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        check_dies(bad[i], parse_text, (void *)bad[i], "not valid JSON");
    }
    char deep[400];
    memset(deep, '[', 100);
    memset(deep + 100, ']', 100);
    deep[200] = 0;
    check_dies("100 levels", parse_text, deep, "not valid JSON");
    check_dies("key twice", find_a, "{\"a\":1,\"b\":2,\"a\":3}", "the key a is there twice");

    Json j;
    const char *text = "{\"s\":\"q\\\"b\\\\s\\/n\\nt\\tu\\u00e9\", \"n\": -12.5e1, \"big\": "
                       "4503599627370496,"
                       " \"neg\": -1, \"o\": {\"in\": [1, [2], {\"x\": 3}]}, \"t\": true, \"z\": "
                       "null,"
                       " \"real\": 1.0, \"huge\": 18446744073709551617, \"end\": \"e\"}";
    json_parse(&j, "text", strdup(text), strlen(text));
    check(strcmp(json_text(&j, json_get(&j, 0, "s", '"')), "q\"b\\s/n\nt\tu\\u00e9") == 0,
          "escapes");
    check_close("number", 0, json_number(&j, json_get(&j, 0, "n", '0')), -125, 0);
    check(json_size(&j, json_find(&j, 0, "big")) == 4503599627370496u, "a size");
    check(json_size(&j, json_find(&j, 0, "neg")) == NOWHERE, "a negative size");
    check(json_size(&j, json_find(&j, 0, "huge")) == NOWHERE, "a size past 2^64");
    check(json_size(&j, json_find(&j, 0, "real")) == NOWHERE, "a size with a point");
    check(json_size(&j, json_find(&j, 0, "s")) == NOWHERE, "a size that is a string");
    check(json_find(&j, 0, "x") == -1 && json_find(&j, 0, "in") == -1, "keys of inner objects");
    check(json_kind(&j, json_find(&j, 0, "t")) == 't' &&
          json_kind(&j, json_find(&j, 0, "z")) == 'n' &&
          json_kind(&j, json_find(&j, 0, "o")) == '{', "kinds");
    check(strcmp(json_text(&j, json_find(&j, 0, "end")), "e") == 0, "the last key");
    json_free(&j);

    char path[PATH_SIZE];       // what is quoted reads back
    const char *nasty = "tab\t quote\" back\\slash\nline / \xc3\xa9";
    FILE *f = fopen(in_root(path, "quoted"), "wb");
    json_quote(f, nasty);
    fclose(f);
    json_load(&j, path, "");
    check(strcmp(json_text(&j, 0), nasty) == 0, "a quoted string reads back");
    json_free(&j);
}

// -------------------------------------------------------------------------------------------------
// config.json

static const char config_text[] =
    "{\"model_type\": \"deepseek_v4\", \"architectures\": [\"DeepseekV4ForCausalLM\"],\n"
    " \"vocab_size\": 264, \"hidden_size\": 128, \"num_hidden_layers\": 5, "
    "\"num_attention_heads\": 4,\n"
    " \"num_key_value_heads\": 1, \"head_dim\": 256, \"qk_rope_head_dim\": 64, \"q_lora_rank\": "
    "384,\n"
    " \"o_groups\": 2, \"o_lora_rank\": 512, \"n_routed_experts\": 8, \"n_shared_experts\": 1,\n"
    " \"num_experts_per_tok\": 3, \"moe_intermediate_size\": 640, \"num_hash_layers\": 2,\n"
    " \"scoring_func\": \"sqrtsoftplus\", \"topk_method\": \"noaux_tc\", \"norm_topk_prob\": true,"
    "\n"
    " \"routed_scaling_factor\": 1.5, \"swiglu_limit\": 10.0, \"sliding_window\": 32,\n"
    " \"rms_norm_eps\": 1e-06, \"rope_theta\": 10000, \"compress_rope_theta\": 160000,\n"
    " \"rope_scaling\": {\"type\": \"yarn\", \"factor\": 16, \"beta_fast\": 32, \"beta_slow\": 1,\n"
    "   \"original_max_position_embeddings\": 65536},\n"
    " \"compress_ratios\": [0, 4, 128, 4, 0, 0, 0], \"index_n_heads\": 6, \"index_head_dim\": 128,"
    "\n"
    " \"index_topk\": 16, \"hc_mult\": 4, \"hc_sinkhorn_iters\": 20, \"hc_eps\": 2e-06,\n"
    " \"max_position_embeddings\": 1048576, \"bos_token_id\": 256, \"eos_token_id\": 257,\n"
    " \"tie_word_embeddings\": false, \"attention_bias\": false, \"hidden_act\": \"silu\",\n"
    " \"expert_dtype\": \"fp4\", \"num_nextn_predict_layers\": 1,\n"
    " \"quantization_config\": {\"quant_method\": \"fp8\", \"fmt\": \"e4m3\", \"scale_fmt\": "
    "\"ue8m0\",\n"
    "   \"weight_block_size\": [128, 128], \"activation_scheme\": \"dynamic\"}}\n";

static void load_config(void *text) {
    Config c;
    char dir[PATH_SIZE], path[PATH_SIZE];
    mkdir(in_root(dir, "config"), 0777);
    write_bytes(path_make(path, dir, "/", "config.json"), text, strlen((char *)text));
    config_load(&c, dir);
}

static void test_config(void) {
    // from -> to, and what the message must name. to NULL: the key is taken away.
    static const struct { const char *from, *to, *expect; } rows[] = {
        {"\"deepseek_v4\"", "\"deepseek_v41\"", "model_type is deepseek_v41"},
        {"\"fp4\"", "\"fp8\"", "expert_dtype is fp8"},
        {"\"expert_dtype\"", "\"x\"", "expert_dtype is missing"},
        {"\"yarn\"", "\"linear\"", "type is linear"},
        {"\"hc_mult\": 4", "\"hc_mult\": 2", "hc_mult is 2"},
        {"\"num_key_value_heads\": 1", "\"num_key_value_heads\": 2", "num_key_value_heads"},
        {"embeddings\": false", "embeddings\": true", "tie_word_embeddings is true"},
        {"bias\": false", "bias\": true", "attention_bias"},
        {"\"silu\"", "\"gelu\"", "hidden_act is gelu"},
        {"\"fp8\"", "\"awq\"", "quant_method is awq"}, {"e4m3", "e5m2", "fmt is e5m2"},
        {"ue8m0", "fp32", "scale_fmt is fp32"}, {"[128, 128]", "[128, 64]", "weight_block_size"},
        {"[128, 128]", "[128]", "weight_block_size"},
        {"[128, 128]", "128", "weight_block_size is 128"},
        {"[0, 4, 128, 4, 0, 0, 0]", "[0, 4, 128, 4]", "4 compress_ratios for 5 layers"},
        {"[0, 4, 128, 4, 0, 0, 0]", "[0, 4, 128, 8, 0, 0, 0]", "entry 3 of compress_ratios"},
        {"[0, 4, 128, 4, 0, 0, 0]", "[0, 4, 128, -4, 0, 0, 0]", "entry 3 of compress_ratios"},
        {"[0, 4, 128, 4, 0, 0, 0]", "[0, 4, 128, 4294967300, 0]", "entry 3 of compress_ratios"},
        {"\"hidden_size\": 128", "\"hidden_size\": 192", "hidden_size is 192"},
        {"\"hidden_size\": 128", "\"hidden_size\": 128.5", "hidden_size is 128.5"},
        {"\"hidden_size\": 128", "\"hidden_size\": \"128\"",
         "hidden_size is 128, expected a number"},
        {"\"hidden_size\": 128", "\"hidden_size\": null", "hidden_size is null"},
        {"\"hidden_size\": 128", "\"hidden_size\": 1e300", "hidden_size is 1e+300"},
        {"\"head_dim\": 256", "\"head_dim\": 64", "head_dim is 64"},
        {"\"q_lora_rank\": 384", "\"q_lora_rank\": 100", "q_lora_rank"},
        {"\"o_lora_rank\": 512", "\"o_lora_rank\": 0", "o_lora_rank"},
        {"\"moe_intermediate_size\": 640", "\"moe_intermediate_size\": -128",
         "moe_intermediate_size"},
        {"\"index_head_dim\": 128", "\"index_head_dim\": 32", "index_head_dim"},
        {"\"num_hidden_layers\": 5", "\"num_hidden_layers\": 129", "num_hidden_layers"},
        {"\"num_experts_per_tok\": 3", "\"num_experts_per_tok\": 9",
         "num_experts_per_tok is 9, expected 1 to 8"},
        {"\"o_groups\": 2", "\"o_groups\": 3",
         "num_attention_heads is 4, expected 1 to 1048576, a multiple of 3"},
        {"\"qk_rope_head_dim\": 64", "\"qk_rope_head_dim\": 256",
         "qk_rope_head_dim is 256, expected 2 to 128"},
        {"\"qk_rope_head_dim\": 64", "\"qk_rope_head_dim\": 130", "qk_rope_head_dim is 130"},
        {"\"qk_rope_head_dim\": 64", "\"qk_rope_head_dim\": 63", "qk_rope_head_dim is 63"},
        {"\"num_hash_layers\": 2", "\"num_hash_layers\": 6",
         "num_hash_layers is 6, expected 0 to 5"},
        {"\"bos_token_id\": 256", "\"bos_token_id\": 264", "bos_token_id"},
        {"\"eos_token_id\": 257", "\"eos_token_id\": 264", "eos_token_id"},
        {"\"n_shared_experts\": 1", "\"n_shared_experts\": 2", "n_shared_experts"},
        {"\"hc_sinkhorn_iters\": 20", "\"hc_sinkhorn_iters\": 65", "hc_sinkhorn_iters"},
        {"\"routed_scaling_factor\": 1.5", "\"routed_scaling_factor\": -1.5",
         "routed_scaling_factor"},
        {"1e-06", "0", "rms_norm_eps"}, {"\"factor\": 16", "\"factor\": 0.5", "factor is 0.5"},
        {"\"beta_fast\": 32", "\"beta_fast\": 1", "beta_fast is 1"},
        {"\"norm_topk_prob\": true", "\"norm_topk_prob\": 1", "norm_topk_prob is 1"},
        {"\"hidden_size\": 128", "\"hidden_size\": 128, \"hidden_size\": 256",
         "hidden_size is there twice"},
        {"\"dynamic\"}}", "\"dynamic\"}", "not valid JSON"},
        {"5, \"num", "5 \"num", "not valid JSON"},
    };
    static const char *const needed[] = {
        "model_type", "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads",
        "num_key_value_heads", "head_dim", "qk_rope_head_dim", "q_lora_rank", "o_groups",
        "o_lora_rank",
        "n_routed_experts", "n_shared_experts", "num_experts_per_tok", "moe_intermediate_size",
        "num_hash_layers", "scoring_func", "topk_method", "norm_topk_prob", "routed_scaling_factor",
        "swiglu_limit", "sliding_window", "rms_norm_eps", "rope_theta", "compress_rope_theta",
        "rope_scaling", "type", "factor", "beta_fast", "beta_slow",
        "original_max_position_embeddings",
        "compress_ratios", "index_n_heads", "index_head_dim", "index_topk", "hc_mult",
        "hc_sinkhorn_iters", "hc_eps", "max_position_embeddings", "bos_token_id", "eos_token_id",
        "quantization_config", "quant_method", "fmt", "scale_fmt", "weight_block_size",
    };
    Config c;
    char dir[PATH_SIZE];
    load_config((void *)config_text);
    config_load(&c, in_root(dir, "config"));
    const int got[] = { c.V, c.C, c.layers, c.H, c.D, c.rope_dim, c.Q, c.G, c.O, c.E, c.K, c.F,
                        c.n_shared,
                        c.hash_layers, c.window, c.index_heads, c.index_dim, c.index_topk,
                            c.hc_iters,
                        c.max_positions, c.bos, c.eos, c.norm_topk, c.ratio[0], c.ratio[1],
                            c.ratio[2],
                        c.ratio[3], c.ratio[4], c.ratio[5] };
    const int want[] = { 264, 128, 5, 4, 256, 64, 384, 2, 512, 8, 3, 640, 1, 2, 32, 6, 128, 16, 20,
                         1048576,
                         256, 257, 1, 0, 4, 128, 4, 0, 0 };
    for (size_t i = 0; i < sizeof want / sizeof *want; i++) {
        check_close("config", (long)i, got[i], want[i], 0);
    }
    const double reals[] = { c.route_scale, c.swiglu_limit, c.norm_eps, c.hc_eps, c.rope_theta,
                             c.compress_theta, c.yarn_factor, c.beta_fast, c.beta_slow,
                                 c.original_positions };
    const double want_reals[] = { 1.5, 10, 1e-6f, 2e-6f, 10000, 160000, 16, 32, 1, 65536 };
    for (int i = 0; i < 10; i++) { check_close("config real", i, reals[i], want_reals[i], 0); }

    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++) {
        char *text = replaced(config_text, rows[i].from, rows[i].to);
        check_dies(rows[i].to, load_config, text, rows[i].expect);
        free(text);
    }
    for (size_t i = 0; i < sizeof needed / sizeof *needed; i++) {
        char from[80], to[80], expect[80];
        snprintf(from, sizeof from, "\"%s\":", needed[i]);
        snprintf(to, sizeof to, "\"no_%s\":", needed[i]);
        snprintf(expect, sizeof expect, "%s", needed[i]);
        char *text = replaced(config_text, from, to);
        check_dies(needed[i], load_config, text, expect);
        check_dies(needed[i], load_config, text, "missing");
        free(text);
    }
    char *text = replaced(config_text,
                          "\"tie_word_embeddings\": false, \"attention_bias\": false, ", "");
    load_config(text);          // these may be missing: false is what everybody assumes
    free(text);
}

// How the router chooses: what it may be, what does not fit together, and who has the last word.
static void test_routing(void) {
    static const struct { const char *from, *to, *expect; } rows[] = {
        {"\"sqrtsoftplus\"", "\"tanh\"", "scoring_func is tanh (config.json), expected sqrtsoft"},
        {"\"noaux_tc\"", "\"greed\"", "topk_method is greed (config.json)"},
        {"\"noaux_tc\"", "\"noaux_tc\", \"n_group\": 3", "n_group is 3"},
        {"\"noaux_tc\"", "\"noaux_tc\", \"n_group\": 8", "n_group is 8"},
        {"\"noaux_tc\"", "\"greedy\", \"n_group\": 4", "n_group is 4"},
        {"\"noaux_tc\"", "\"noaux_tc\", \"n_group\": 0", "n_group is 0"},
        {"\"noaux_tc\"", "\"noaux_tc\", \"topk_group\": 2", "topk_group is 2 (config.json)"},
        {"\"noaux_tc\"", "\"noaux_tc\", \"n_group\": 4", "topk_group is 1 (default)"},
        {"\"noaux_tc\"", "\"noaux_tc\", \"n_group\": 2.5", "n_group is 2.5"},
        {"\"swiglu_limit\": 10.0", "\"swiglu_limit\": \"x\"", "swiglu_limit is x"},
    };
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++) {
        char *text = replaced(config_text, rows[i].from, rows[i].to);
        check_dies(rows[i].to, load_config, text, rows[i].expect);
        free(text);
    }
    Config c;
    char dir[PATH_SIZE];
    char *text = replaced(config_text, "\"noaux_tc\"", "\"greedy\", \"n_group\": null");
    load_config(text);
    free(text);
    config_load(&c, in_root(dir, "config"));
    check(c.how.score == SCORE_SQRTSOFTPLUS && c.how.greedy && c.how.groups == 1 &&
          c.how.kept == 1 && c.norm_topk == 1 && c.route_scale == 1.5f, "routing as written");
    check(strcmp(routing[ROUTE_METHOD].from, "config.json") == 0 &&
          strcmp(routing[ROUTE_GROUPS].from, "default") == 0, "origins");
    routing_given = "topk_method=group_limited_greedy,n_group=4,topk_group=2,scoring_func=sigmoid";
    config_load(&c, in_root(dir, "config"));
    check(c.how.score == SCORE_SIGMOID && c.how.greedy && c.how.groups == 4 && c.how.kept == 2 &&
          strcmp(routing[ROUTE_METHOD].from, "--routing") == 0, "--routing has the last word");
    routing_given = "";
}

// -------------------------------------------------------------------------------------------------
// Checkpoints: a tiny one is written by hand, and then everything that can be wrong with it

static const char index_text[] =
    "{\"metadata\": {\"total_size\": 4096}, \"weight_map\": {\n"
    " \"embed.weight\": \"model-1.safetensors\", \"layers.0.ffn.gate.weight\": "
    "\"model-1.safetensors\",\n"
    " \"layers.0.ffn.gate.tid2eid\": \"model-1.safetensors\", \"mtp.0.x\": "
    "\"model-1.safetensors\",\n"
    " \"layers.0.attn.wq_a.weight\": \"model-2.safetensors\", \"layers.0.attn.wq_a.scale\": "
    "\"model-2.safetensors\",\n"
    " \"layers.0.ffn.experts.0.w1.weight\": \"model-2.safetensors\",\n"
    " \"layers.0.ffn.experts.0.w1.scale\": \"model-2.safetensors\", \"norm\": "
    "\"model-2.safetensors\",\n"
    " \"mtp.0.gone\": \"model-3.safetensors\"}}\n";
static const char shard1_text[] =           // not in the order of the names, nor padded
    "{\"layers.0.ffn.gate.tid2eid\":{\"dtype\":\"I64\",\"shape\":[6,2],\"data_offsets\":[0,96]},"
    "\"__metadata__\":{\"format\":\"pt\"},"
    "\"embed.weight\":{\"dtype\":\"BF16\",\"shape\":[6,4],\"data_offsets\":[104,152]},"
    "\"layers.0.ffn.gate.weight\":{\"dtype\":\"BF16\",\"shape\":[5,8],\"data_offsets\":[152,232]},"
    "\"mtp.0.x\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[96,104]}}";
static const char shard2_text[] =
    "{\"norm\":{\"dtype\":\"F32\",\"shape\":[5],\"data_offsets\":[0,20]},"
    "\"layers.0.attn.wq_a.weight\":{\"dtype\":\"F8_E4M3\",\"shape\":[4,8],\"data_offsets\":[20,"
    "52]},"
    "\"layers.0.attn.wq_a.scale\":{\"dtype\":\"F8_E8M0\",\"shape\":[1,1],\"data_offsets\":[52,53]},"
    "\"layers.0.ffn.experts.0.w1.weight\":{\"dtype\":\"I8\",\"shape\":[4,16],\"data_offsets\":[53,"
    "117]},"
    "\"layers.0.ffn.experts.0.w1.scale\":{\"dtype\":\"F8_E8M0\",\"shape\":[4,1],"
    "\"data_offsets\":[117,121]}}   ";
enum { SHARD1_BYTES = 232, SHARD2_BYTES = 121 };

static unsigned char shard1_data[SHARD1_BYTES], shard2_data[SHARD2_BYTES];

static void put_shard(const char *path, const char *header, const void *data, size_t n) {
    size_t length = strlen(header);
    unsigned char *bytes = (unsigned char *)malloc(8 + length + n);
    for (int i = 0; i < 8; i++) { bytes[i] = (unsigned char)(length >> 8 * i); }
    memcpy(bytes + 8, header, length);
    if (n) { memcpy(bytes + 8 + length, data, n); }
    write_bytes(path, bytes, 8 + length + n);
    free(bytes);
}

// Writes the checkpoint into root/name, with one text replaced in one file.
static void put_checkpoint(const char *name, int file, const char *from, const char *to) {
    const char *const files[] = { "model.safetensors.index.json", "model-1.safetensors",
                                  "model-2.safetensors" };
    const char *const texts[] = { index_text, shard1_text, shard2_text };
    char dir[PATH_SIZE], path[PATH_SIZE];
    mkdir(in_root(dir, name), 0777);
    for (int f = 0; f < 3; f++) {
        char *text = f == file && from ? replaced(texts[f], from, to) : strdup(texts[f]);
        path_make(path, dir, "/", files[f]);
        if (f == 0) { write_bytes(path, text, strlen(text)); }
        else { put_shard(path, text, f == 1 ? shard1_data : shard2_data, f == 1 ? SHARD1_BYTES
                         : SHARD2_BYTES); }
        free(text);
    }
}

static struct {
    bf16 embed[24], gate[40];
    int32_t tid2eid[12];
    uint8_t wq_a[32], wq_a_scale[1], w1[64], w1_scale[4];
    float norm[5];
} loaded;

static Tensor table[8] = {
    { "norm", DT_F32, 1, {5}, loaded.norm, 0, 0 },
    { "embed.weight", DT_BF16, 2, {6, 4}, loaded.embed, 0, 0 },
    { "layers.0.attn.wq_a.weight", DT_FP8, 2, {4, 8}, loaded.wq_a, 0, 0 },
    { "layers.0.attn.wq_a.scale", DT_E8M0, 2, {1, 1}, loaded.wq_a_scale, 0, 0 },
    { "layers.0.ffn.gate.weight", DT_BF16, 2, {5, 8}, loaded.gate, 0, 0 },
    { "layers.0.ffn.gate.tid2eid", DT_I64, 2, {6, 2}, loaded.tid2eid, 0, 0 },
    { "layers.0.ffn.experts.0.w1.weight", DT_FP4, 2, {4, 16}, loaded.w1, 0, 0 },
    { "layers.0.ffn.experts.0.w1.scale", DT_E8M0, 2, {4, 1}, loaded.w1_scale, 0, 0 },
};

static int loaded_right(void) {
    int64_t wide[12];
    int good = 1;
    memcpy(wide, shard1_data, sizeof wide);
    for (int i = 0; i < 12; i++) { good &= loaded.tid2eid[i] == wide[i]; }
    return good && memcmp(loaded.embed, shard1_data + 104, 48) == 0 &&
           memcmp(loaded.gate, shard1_data + 152, 80) == 0 &&
               memcmp(loaded.norm, shard2_data, 20) == 0 &&
           memcmp(loaded.wq_a, shard2_data + 20, 32) == 0 &&
               loaded.wq_a_scale[0] == shard2_data[52] &&
           memcmp(loaded.w1, shard2_data + 53, 64) == 0 &&
               memcmp(loaded.w1_scale, shard2_data + 117, 4) == 0;
}

// Exit code 0: read, and right; 3: read, and wrong.
static void load_checkpoint(void *dir) {
    memset(&loaded, 0xEE, sizeof loaded);
    checkpoint_load((const char *)dir, table, 8);
    if (!loaded_right()) { exit(3); }
}

// What --inspect and --dry-run do. Exit code 0: opened, and not one byte of any tensor was read.
static void open_checkpoint(void *dir) {
    const unsigned char *bytes = (const unsigned char *)&loaded;
    Checkpoint c;
    memset(&loaded, 0xEE, sizeof loaded);
    checkpoint_open(&c, (const char *)dir, table, 8);
    for (size_t i = 0; i < sizeof loaded; i++) { if (bytes[i] != 0xEE) { exit(3); } }
    if (c.n != 8 || c.shards != 2 || c.drafter != 2) { exit(4); }
    for (size_t i = 0; i < 8; i++) {
        const char *name = table[i].name, *file = wants_find(c.want, 8, name)->file;
        int first = strstr(name, "embed") || strstr(name, "gate");
        if (strcmp(file, first ? "model-1.safetensors" : "model-2.safetensors")) { exit(5); }
    }
    checkpoint_close(&c);
}

static void load_threads(void *dir) {
#ifdef _OPENMP
    omp_set_num_threads(4);
#endif
    load_checkpoint(dir);
}

static void make_data(void) {
    uint64_t key = random_key(7, "shards");
    for (int i = 0; i < SHARD1_BYTES; i++) {
        shard1_data[i] = (unsigned char)random_bits(key, (uint64_t)i);
    }
    for (int i = 0; i < SHARD2_BYTES; i++) {
        shard2_data[i] = (unsigned char)random_bits(key, (uint64_t)i + 999);
    }
    for (int i = 0; i < 12; i++) {                  // two different experts of five for each token
        int64_t expert = (i / 2 + (i % 2) * (1 + i % 3)) % 5;
        memcpy(shard1_data + 8 * i, &expert, 8);
    }
    shard2_data[52] = 120;
    for (int i = 117; i < 121; i++) { shard2_data[i] = (unsigned char)(118 + i % 4); }
}

static void test_checkpoint(void) {
    static const struct { int file; const char *from, *to, *expect; } rows[] = {
        {0, "\"norm\": \"model-2.safetensors\",", "", "norm is missing"},
        {0, "\"layers.0.attn.wq_a.scale\": \"model-2.safetensors\",", "",
         "layers.0.attn.wq_a.scale is missing"},
        {0, "\"norm\"", "\"more.weight\": \"model-2.safetensors\", \"norm\"",
         "more.weight is not in the model"},
        {0, "\"norm\"", "\"embed.weight\": \"model-1.safetensors\", \"norm\"",
         "embed.weight is there twice"},
        {0, "\"norm\": \"model-2", "\"norm\": \"model-1",
         "model-1.safetensors: the index places norm in it"},
        {0, "\"norm\": \"model-2.safetensors\"", "\"norm\": 2", "norm is in no file"},
        {0, "\"norm\": \"model-2.safetensors\"", "\"norm\": \"model-4.safetensors\"",
         "model-4.safetensors: No such file"},
        {0, "weight_map", "weights", "weight_map is missing"},
        {0, "}}", "}", "index.json is not valid JSON"},
        {1, "\"BF16\",\"shape\":[6,4]", "\"F16\",\"shape\":[6,4]",
         "embed.weight is F16 [6,4], expected BF16 [6,4]"},
        {1, "[6,4]", "[4,6]", "embed.weight is BF16 [4,6], expected BF16 [6,4]"},
        {1, "[6,4]", "[6,2,2]", "embed.weight is BF16 [6,2,2]"},
        {1, "[6,4]", "[24]", "embed.weight is BF16 [24]"},
        {1, "[6,4]", "[6,5]", "embed.weight is BF16 [6,5], and its data_offsets"},
        {1, "[6,4]", "[6,-4]", "embed.weight is BF16"},
        {1, "[6,4]", "[6,4.0]", "embed.weight is BF16"},
        {1, "[6,4]", "[6,1152921504606846980]", "embed.weight"},
        {1, "[6,4]", "[4294967296,4294967296,4294967296]", "embed.weight"},
        {1, "[6,4]", "[24,3,768614336404564651]", "and its data_offsets are [104,152]"},  // 24 2^61
        {1, ",\"mtp.0.x\"", ",\"mtp.0.y\":{\"dtype\":\"F32\",\"shape\":[0,-1],"
         "\"data_offsets\":[96,96]},\"mtp.0.x\"", "mtp.0.y is F32"},
        {1, "[6,4]", "24", "shape is 24"}, {1, "\"shape\":[6,4],", "", "shape is missing"},
        {1, "\"dtype\":\"I64\",", "", "dtype is missing"},
        {1, "\"I64\"", "\"X9\"", "tid2eid is an unknown type"},
        {1, ",\"data_offsets\":[0,96]", "", "data_offsets is missing"},
        {1, "[0,96]", "[0,96,97]", "tid2eid"},
        {1, "[0,96]", "[96,0]", "tid2eid"}, {1, "[0,96]", "[-1,95]", "tid2eid"},
        {1, "[0,96]", "[\"0\",96]", "tid2eid"},
        {1, "[104,152]", "[103,151]", "an overlap at embed.weight"},
        {1, "[104,152]", "[96,144]", "overlap"},
        {1, "[104,152]", "[105,153]", "a hole at embed.weight"},
        {1, "[152,232]", "[151,231]", "an overlap at layers.0.ffn.gate.weight"},
        {1, "\"mtp.0.x\":{", "\"embed.weight\":{", "embed.weight is there twice"},
        {1, "\"mtp.0.x\":{", "\"head.weight\":{",
         "head.weight is in this file, the index does not know it"},
        {1, "\"mtp.0.x\":{\"dtype\":\"F32\",\"shape\":[2]",
         "\"norm\":{\"dtype\":\"F32\",\"shape\":[2]",
         "norm is in this file, the index names another"},
        {1, "\"embed.weight\":{\"dtype\":\"BF16\",\"shape\":[6,4],\"data_offsets\":[104,152]}",
         "\"embed.weight\":7", "embed.weight is no object"},
        {1, ",\"mtp.0.x\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[96,104]}", "",
         "a hole at embed.weight"},
        {1, "{\"layers", "[\"layers", "not valid JSON"},
        {1, "104]}}", "104]}", "model-1.safetensors is not valid JSON"},
        {1, "[6,4]", "[6,4", "not valid JSON"}, {1, "\"I64\"", "\"I64\x01\"", "not valid JSON"},
        {2, "F8_E4M3", "I8", "layers.0.attn.wq_a.weight is I8 [4,8], expected F8_E4M3 [4,8]"},
        {2, "F8_E8M0", "U8", "layers.0.attn.wq_a.scale is U8"},
        {2, "\"I8\"", "\"F8_E4M3\"", "w1.weight is F8_E4M3 [4,16], expected"},
        {2, "\"F32\"", "\"I32\"", "norm is I32 [5], expected F32 [5]"},
        {2, "[117,121]", "[117,122]", "w1.scale is F8_E8M0 [4,1]"},
    };
    char dir[PATH_SIZE], path[PATH_SIZE], text[2048];
    make_data();
    put_checkpoint("good", -1, NULL, NULL);
    in_root(dir, "good");
    check(run_child(load_checkpoint, dir, text, sizeof text) == 0, "the checkpoint loads: %s",
          text);
    check(run_child(load_threads, dir, text, sizeof text) == 0, "it loads with four threads: %s",
          text);
    in_root(dir, "bad");
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++) {
        put_checkpoint("bad", rows[i].file, rows[i].from, rows[i].to);
        check_dies(rows[i].to, load_checkpoint, dir, rows[i].expect);
        check_dies(rows[i].to, open_checkpoint, dir, rows[i].expect);
        wipe(dir);
    }
    // The aliases: U8 for packed codes, I32 for the table (with half the bytes).
    put_checkpoint("bad", 2, "\"I8\"", "\"U8\"");
    check(run_child(load_checkpoint, dir, text, sizeof text) == 0, "U8 for I8: %s", text);
    unsigned char narrow[SHARD1_BYTES];
    for (int i = 0; i < 12; i++) { memcpy(narrow + 4 * i, shard1_data + 8 * i, 4); }
    memcpy(narrow + 48, shard1_data + 96, SHARD1_BYTES - 96);
    put_shard(path_make(path, dir, "/", "model-1.safetensors"),
        "{\"layers.0.ffn.gate.tid2eid\":{\"dtype\":\"I32\",\"shape\":[6,2],\"data_offsets\":[0,"
        "48]},"
        "\"embed.weight\":{\"dtype\":\"BF16\",\"shape\":[6,4],\"data_offsets\":[56,104]},"
        "\"layers.0.ffn.gate.weight\":{\"dtype\":\"BF16\",\"shape\":[5,8],\"data_offsets\":[104,"
        "184]},"
        "\"mtp.0.x\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[48,56]}}", narrow,
        SHARD1_BYTES - 48);
    check(run_child(load_checkpoint, dir, text, sizeof text) == 0, "I32 for I64: %s", text);
    wipe(dir);

    put_checkpoint("bad", -1, NULL, NULL);          // whole files
    unlink(path_make(path, dir, "/", "model-2.safetensors"));
    check_dies("missing shard", load_checkpoint, dir, "model-2.safetensors: No such file");
    check_dies("missing shard", open_checkpoint, dir, "model-2.safetensors: No such file");
    mkdir(path, 0777);
    check_dies("a folder as shard", load_checkpoint, dir, "model-2.safetensors: not a file");
    rmdir(path);
    unlink(path_make(path, dir, "/", "model.safetensors.index.json"));
    check_dies("missing index", load_checkpoint, dir, "index.json: No such file");
    check_dies("missing index", open_checkpoint, dir, "index.json: No such file");
    wipe(dir);
}

// Headers are enough to open a checkpoint, and config.json to have none.
static void test_checkpoint_open(void) {
    static const char *const begun[] = { "model.safetensors.index.json", "model-9.safetensors",
                                         "model-9.safetensors.part" };
    char dir[PATH_SIZE], path[PATH_SIZE], text[1024];
    memset(shard2_data, 255, SHARD2_BYTES);
    put_checkpoint("bad", -1, NULL, NULL);
    in_root(dir, "bad");
    check(run_child(open_checkpoint, dir, text, sizeof text) == 0, "opened: %s", text);
    check_dies("255 everywhere", load_checkpoint, dir, "holds the e8m0 byte 255");
    make_data();
    wipe(dir);
    mkdir(dir, 0777);
    write_bytes(path_make(path, dir, "/", "config.json"), "{}", 2);
    write_bytes(path_make(path, dir, "/", "tokenizer.json"), "{}", 2);
    check(!checkpoint_begun(dir), "config.json alone");
    for (int i = 0; i < 3; i++) {
        write_bytes(path_make(path, dir, "/", begun[i]), "", 0);
        check(checkpoint_begun(dir), "%s is there", begun[i]);
        unlink(path);
    }
    wipe(dir);
    check(checkpoint_begun(dir), "a folder that is not there is not taken for an empty one");
}

// A file of the checkpoint is changed after it was written.
static void test_checkpoint_bytes(void) {
    char dir[PATH_SIZE], path[PATH_SIZE];
    size_t n;
    put_checkpoint("bad", -1, NULL, NULL);
    in_root(dir, "bad");
    path_make(path, dir, "/", "model-2.safetensors");
    char *bytes = read_bytes(path, &n);
    for (size_t cut = 0; cut < n; cut += 1 + (cut > 20 && cut < n - 140) * 13) {
        write_bytes(path, bytes, cut);
        check_dies("truncated", load_checkpoint, dir, "model-2.safetensors");
    }
    write_bytes(path, bytes, n - 1);
    check_dies("one byte short", load_checkpoint, dir, "model-2.safetensors is truncated");
    bytes[n] = 7;
    write_bytes(path, bytes, n + 1);
    check_dies("one byte more", load_checkpoint, dir, "model-2.safetensors is too long");
    const struct { uint64_t length; const char *expect; } lengths[] = {
        {n - 7, "model-2"}, {100000000, "a header of 100000000"},
        {100000001, "the format allows 100000000"},
        {UINT64_MAX, "model-2"}, {UINT64_MAX - 7, "model-2"}, {(uint64_t)1 << 63, "model-2"},
        {0, "model-2"}, {2, "model-2"} };
    for (size_t i = 0; i < sizeof lengths / sizeof *lengths; i++) {
        memcpy(bytes, &lengths[i].length, 8);
        write_bytes(path, bytes, n);
        check_dies("header length", load_checkpoint, dir, lengths[i].expect);
    }
    write_bytes(path, bytes, 7);
    check_dies("7 bytes", load_checkpoint, dir, "a header of 0 bytes in a file of 7");
    free(bytes);
    put_shard(path, "[1,{\"dtype\":\"F32\"}]", shard2_data, 20);
    check_dies("a list as header", load_checkpoint, dir, "does not begin with {");
    put_shard(path, " {}", NULL, 0);
    check_dies("a blank first", load_checkpoint, dir, "does not begin with {");
    const uint64_t too_much = 100000001;            // in a file that has as much, all zeros
    write_bytes(path, &too_much, 8);
    if (truncate(path, 110000000) != 0) { exit(99); }
    check_dies("a header of more than 100 MB", load_checkpoint, dir, "a header of 100000001");

    size_t large = 100000000;                       // 100 MB of garbage
    bytes = (char *)malloc(large);
    for (size_t i = 0; i < large / 8; i++) {
        uint64_t x = random_bits(1, i);
        memcpy(bytes + 8 * i, &x, 8);
    }
    write_bytes(path, bytes, large);
    check_dies("100 MB of garbage", load_checkpoint, dir, "model-2.safetensors");
    static const char *const fill[] = { "[", "{\"\":", "[1," };
    for (size_t k = 0; k < sizeof fill / sizeof *fill; k++) {
        uint64_t length = large - 8;
        for (size_t i = 8; i < large; i++) { bytes[i] = fill[k][(i - 8) % strlen(fill[k])]; }
        memcpy(bytes, &length, 8);
        write_bytes(path, bytes, large);
        check_dies("100 MB of one thing", load_checkpoint, dir, "model-2.safetensors");
    }
    write_bytes(path_make(path, dir, "/", "model.safetensors.index.json"), bytes, large);
    check_dies("100 MB of index", load_checkpoint, dir, "index.json");
    free(bytes);
    wipe(dir);

    const struct { int at; int value; const char *expect; } values[] = {      // in the data
        {52, 255, "layers.0.attn.wq_a.scale holds the e8m0 byte 255"},
        {119, 255, "layers.0.ffn.experts.0.w1.scale holds the e8m0 byte 255"} };
    for (int i = 0; i < 2; i++) {
        int keep = shard2_data[values[i].at];
        shard2_data[values[i].at] = (unsigned char)values[i].value;
        put_checkpoint("bad", -1, NULL, NULL);
        check_dies("byte 255", load_checkpoint, dir, values[i].expect);
        shard2_data[values[i].at] = (unsigned char)keep;
    }
    const struct { int slot; int64_t value; const char *expect; } experts[] = {
        {5, 5, "tid2eid names expert 5 for token 2, which does not exist"},
        {0, -1, "tid2eid names expert -1"},
        {3, 1ll << 32, "tid2eid names expert -1"}, {11, -1, "tid2eid"},
        {7, 100, "tid2eid names expert 100 for token 3"} };
    for (size_t i = 0; i < sizeof experts / sizeof *experts; i++) {
        int64_t keep;
        memcpy(&keep, shard1_data + 8 * experts[i].slot, 8);
        memcpy(shard1_data + 8 * experts[i].slot, &experts[i].value, 8);
        put_checkpoint("bad", -1, NULL, NULL);
        check_dies("tid2eid", load_checkpoint, dir, experts[i].expect);
        memcpy(shard1_data + 8 * experts[i].slot, &keep, 8);
    }
    unsigned char keep[8];
    memcpy(keep, shard1_data + 8 * 9, 8);
    memcpy(shard1_data + 8 * 9, shard1_data + 8 * 8, 8);
    put_checkpoint("bad", -1, NULL, NULL);
    check_dies("repeated expert", load_checkpoint, dir, "for token 4, twice");
    memcpy(shard1_data + 8 * 9, keep, 8);

    // Another rank's tensors: checked, not read; so a 255 in them is not seen, a wrong shape is.
    shard2_data[119] = 255;
    table[6].data = table[7].data = NULL;
    put_checkpoint("bad", -1, NULL, NULL);
    char text[1024];
    check(run_child(load_checkpoint, dir, text, sizeof text) == 3, "w1 was not read: %s", text);
    table[7].dim[0] = 5;
    check_dies("shape of what is not read", load_checkpoint, dir,
               "w1.scale is F8_E8M0 [4,1], expected F8_E8M0 [5,1]");
    table[7].dim[0] = 4;
    table[6].data = loaded.w1;
    table[7].data = loaded.w1_scale;
    shard2_data[119] = 120;
    wipe(dir);
}

// Thousands of damaged headers: no crash, and what is accepted is right.
static void test_fuzz(int rounds) {
    char dir[PATH_SIZE], path[PATH_SIZE], text[1024];
    size_t n;
    uint64_t state = 0;
    int refused = 0, accepted = 0;
    make_data();
    put_checkpoint("fuzz", -1, NULL, NULL);
    in_root(dir, "fuzz");
    for (int round = 0; round < rounds; round++) {
        const char *const files[] = { "model.safetensors.index.json", "model-1.safetensors",
                                      "model-2.safetensors" };
        const char *file = files[random_bits(11, state++) % 3];
        char *bytes = read_bytes(path_make(path, dir, "/", file), &n),
            *whole = read_bytes(path, &n);
        size_t header = *bytes == '{' ? n : strlen(file[6] == '1' ? shard1_text : shard2_text) + 8,
            size = n;
        int changes = 1 + (int)(random_bits(11, state++) % 3);
        for (int k = 0; k < changes; k++) {
            static const char nasty[] = "\"{}[]:,0189-.eE\\ntfu \x00\x80\xff\x01";
            size_t at = random_bits(11, state++) % header, kind = random_bits(11, state++) % 6;
            if (kind < 2) { bytes[at] = nasty[random_bits(11, state++) % (sizeof nasty - 1)]; }
            if (kind == 2) { bytes[at] ^= (char)(1 << random_bits(11, state++) % 8); }
            if (kind == 3) { memmove(bytes + at, bytes + at + 1, size - at - 1); size--; }
            if (kind == 4 && round % 4 == 0) { size = at; break; }
            if (kind == 5) { bytes[at] = bytes[random_bits(11, state++) % header]; }
            if (header > size) { header = size; }
            if (size == 0) { break; }
        }
        write_bytes(path, bytes, size);
        int code = run_child(load_checkpoint, dir, text, sizeof text);
        check(code == 0 || (code == 1 && strncmp(text, "error", 5) == 0),
              "fuzz %d, %s: exit code %d %s",
              round, file, code, text);
        refused += code == 1;
        accepted += code == 0;
        write_bytes(path, whole, n);
        free(bytes);
        free(whole);
    }
    printf("  fuzz: %d refused, %d accepted\n", refused, accepted);
    check(refused > rounds / 2 && accepted > 0, "the fuzz finds both kinds");
    wipe(dir);
}

// -------------------------------------------------------------------------------------------------
// Scales

static uint8_t dense[256 * 256], dense_scale[4], packed[64 * 256], packed_scale[64 * 16];
static Tensor scaled[4] = {
    { "layers.3.attn.wo_b.weight", DT_FP8, 2, {256, 256}, dense, 0, 0 },
    { "layers.3.attn.wo_b.scale", DT_E8M0, 2, {2, 2}, dense_scale, 0, 0 },
    { "layers.3.ffn.experts.5.w2.weight", DT_FP4, 2, {64, 256}, packed, 0, 0 },
    { "layers.3.ffn.experts.5.w2.scale", DT_E8M0, 2, {64, 16}, packed_scale, 0, 0 },
};
static void run_scales(void *unused) { (void)unused; check_scales(scaled, 4); }

static void test_scales(void) {
    static float w[256 * 256];
    char text[1024];
    for (int i = 0; i < 256 * 256; i++) {
        w[i] = (float)(random_normal(5, (uint64_t)i) / RANDOM_STD / 16);
    }
    quantize_blocks_fp8(dense, dense_scale, w, 256, 256);
    for (int i = 0; i < 64 * 512; i++) { w[i] *= 16 / sqrtf(512); }
    quantize_fp4(packed, packed_scale, w, 64, 512);
    check_close("mean of fp8", 0, mean_magnitude(&scaled[0], dense_scale, 256) * 16, 0.798, 0.03);
    check_close("mean of fp4", 0, mean_magnitude(&scaled[2], packed_scale, 512) * sqrt(512), 0.798,
                0.05);
    check(run_child(run_scales, NULL, text, sizeof text) == 0, "right scales pass: %s", text);
    real row[512];                          // rows and blocks of columns of other magnitudes
    double sum[2] = { 0, 0 };
    for (int i = 0; i < 4; i++) { dense_scale[i] = (uint8_t)(dense_scale[i] + i); }
    for (int i = 0; i < 64 * 16; i++) { packed_scale[i] = (uint8_t)(packed_scale[i] + i % 7); }
    for (int i = 0; i < SCALE_ROWS; i++) {
        widen_fp8(row, dense, dense_scale, (size_t)(i * 256 / SCALE_ROWS), 256);
        for (int c = 0; c < 256; c++) { sum[0] += fabs((double)row[c]); }
        widen_fp4(row, packed, packed_scale, (size_t)(i * 64 / SCALE_ROWS), 512);
        for (int c = 0; c < 512; c++) { sum[1] += fabs((double)row[c]); }
    }
    check(mean_magnitude(&scaled[0], dense_scale, 256) == sum[0] / (SCALE_ROWS * 256), "fp8 rows");
    check(mean_magnitude(&scaled[2], packed_scale, 512) == sum[1] / (SCALE_ROWS * 512), "fp4 rows");
    for (int i = 0; i < 4; i++) { dense_scale[i] = (uint8_t)(dense_scale[i] - i); }
    for (int i = 0; i < 64 * 16; i++) { packed_scale[i] = (uint8_t)(packed_scale[i] - i % 7); }
    check(strcmp(kind_text(text, scaled[2].name), "layers.ffn.experts.w2.weight") == 0 &&
          strcmp(kind_text(text, "hc_attn_fn"), "hc_attn_fn") == 0, "kinds: %s", text);
    for (int which = 1; which < 4; which += 2) {
        uint8_t keep[1024], *scale = (uint8_t *)scaled[which].data;
        size_t n = scaled[which].dim[0] * scaled[which].dim[1];
        memcpy(keep, scale, n);
        memset(scale, 127, n);
        check_dies("scales of 127", run_scales, NULL, scaled[which - 1].name);
        memset(scale, 100, n);
        check_dies("scales too small", run_scales, NULL, scaled[which - 1].name);
        memcpy(scale, keep, n);
        scaled[which - 1].data = NULL;              // another rank's: not looked at
        memset(scale, 127, n);
        check(run_child(run_scales, NULL, text, sizeof text) == 0, "not loaded, not checked: %s",
              text);
        scaled[which - 1].data = which == 1 ? (void *)dense : (void *)packed;
        memcpy(scale, keep, n);
    }
}

// -------------------------------------------------------------------------------------------------
// Adapters: small odd sizes, so that no two dimensions are the same

enum { A_C = 6, A_Q = 5, A_F = 7, A_E = 12, A_R = 2, A_LAYERS = 2 };
static const Config small = { .E = A_E, .layers = A_LAYERS };
static const unsigned all_targets = (1u << TARGETS) - 1;

static void add_all(Adapters *s) {
    char name[96];
    int local = A_E / comm_ep(), first = comm_ep_rank() * local;
    adapters_begin(s);
    for (int l = 0; l < A_LAYERS; l++) {
        static const struct { int target, in, out; } dense_modules[] = {
            {TARGET_WQ_A, A_C, A_Q}, {TARGET_WQ_B, A_Q, A_C}, {TARGET_WKV, A_C, A_F},
            {TARGET_WO_B, A_F, A_C},
            {TARGET_SHARED_W1, A_C, A_F}, {TARGET_SHARED_W2, A_F, A_C},
            {TARGET_SHARED_W3, A_C, A_F} };
        static const char *const leaf[] = { "attn.wq_a", "attn.wq_b", "attn.wkv", "attn.wo_b",
            "ffn.shared_experts.w1", "ffn.shared_experts.w2", "ffn.shared_experts.w3" };
        for (int k = 0; k < 7; k++) {
            snprintf(name, sizeof name, "layers.%d.%s", l, leaf[k]);
            adapter_add(s, dense_modules[k].target, name, dense_modules[k].in,
                        dense_modules[k].out);
        }
        snprintf(name, sizeof name, "layers.%d.ffn.experts", l);
        adapter_add_experts(s, TARGET_EXPERTS_W1, name, "w1", first, local, A_C, A_F);
        adapter_add_experts(s, TARGET_EXPERTS_W2, name, "w2", first, local, A_F, A_C);
        adapter_add_experts(s, TARGET_EXPERTS_W3, name, "w3", first, local, A_C, A_F);
    }
}

// Element i of a trained matrix or of one of its moments (".m", ".v"): a function of its name.
static real element(const char *name, const char *kind, size_t i) {
    char key[128];
    snprintf(key, sizeof key, "%s%s", name, kind);
    return (real)(random_uniform(random_key(3, key), i) - 0.5f);
}

static void make_adapters(Adapters *s, unsigned targets) {
    memset(s, 0, sizeof *s);
    s->R = A_R;
    s->alpha = 3;
    s->targets = targets;
    mem_free();
    mem_count();
    add_all(s);
    adapters_alloc(s, 1);
    mem_open();
    adapters_alloc(s, 1);
    add_all(s);
}

static void fill_adapters(Adapters *s) {
    for (int k = 0; k < s->n; k++) {
        const AdapterTensor *t = &s->tensors[k];
        for (size_t i = 0; i < (size_t)t->rows * (size_t)t->cols; i++) {
            s->p[t->at + i] = element(t->name, "", i);
            s->m[t->at + i] = element(t->name, ".m", i);
            s->v[t->at + i] = element(t->name, ".v", i);
        }
    }
}

// Number of elements that are not what fill_adapters gives them.
static long wrong_elements(const Adapters *s, int with_moments) {
    long wrong = 0;
    for (int k = 0; k < s->n; k++) {
        const AdapterTensor *t = &s->tensors[k];
        for (size_t i = 0; i < (size_t)t->rows * (size_t)t->cols; i++) {
            wrong += s->p[t->at + i] != element(t->name, "", i);
            if (with_moments) {
                wrong += s->m[t->at + i] != element(t->name, ".m", i);
                wrong += s->v[t->at + i] != element(t->name, ".v", i);
            }
        }
    }
    return wrong;
}

// A factor's element by its definition: layer l, leaf, expert (-1: dense), 'A' or 'B', row, column.
static float factor(int l, const char *leaf, int expert, char ab, int row, int col, int cols) {
    char name[96];
    if (expert < 0) { snprintf(name, sizeof name, "layers.%d.%s.lora_%c", l, leaf, ab); }
    else { snprintf(name, sizeof name, "layers.%d.ffn.experts.%d.%s.lora_%c", l, expert, leaf,
                    ab); }
    return (float)element(name, "", (size_t)row * (size_t)cols + (size_t)col);
}

static float *read_matrix(const Safetensors *st, const char *name, size_t rows, size_t cols) {
    const Entry *e = safetensors_find(st, name);
    int good = e && e->type == DT_F32 && e->ndim == 2 && e->dim[0] == rows && e->dim[1] == cols;
    if (!check(good, "%s is not there as F32 [%zu,%zu]", name, rows, cols)) { return NULL; }
    float *x = (float *)malloc(rows * cols * 4);
    if (file_pread(st->fd, x, rows * cols * 4, st->data + e->begin)) { exit(99); }
    return x;
}

// vllm: one 2-D tensor per factor and expert, under the checkpoint's names.
static void test_names_vllm(void) {
    static const struct { const char *module; int in, out; } modules[] = {
        {"attn.wq_a", A_C, A_Q}, {"attn.wq_b", A_Q, A_C}, {"attn.wkv", A_C, A_F},
        {"attn.wo_b", A_F, A_C},
        {"ffn.shared_experts.w1", A_C, A_F}, {"ffn.shared_experts.w2", A_F, A_C},
        {"ffn.shared_experts.w3", A_C, A_F},
        {"w1", A_C, A_F}, {"w2", A_F, A_C}, {"w3", A_C, A_F} };
    Adapters s;
    Safetensors st;
    char dir[PATH_SIZE], path[PATH_SIZE], name[160];
    make_adapters(&s, all_targets);
    fill_adapters(&s);
    adapter_save(in_root(dir, "vllm"), &s, &small, NAMES_VLLM, "/some/where/DeepSeek-V4-Flash");
    safetensors_open(&st, path_make(path, dir, "/", "adapter_model.safetensors"), "");
    check_close("tensors", 0, (double)st.n, A_LAYERS * (7 + 3 * A_E) * 2, 0);
    check(st.data % 8 == 0, "the data is aligned");
    for (int l = 0; l < A_LAYERS; l++) {
        for (int k = 0; k < 10; k++) {
            for (int e = k < 7 ? -1 : 0; e < (k < 7 ? 0 : A_E); e++) {
                for (char ab = 'A'; ab <= 'B'; ab++) {
                    int rows = ab == 'A' ? A_R : modules[k].out, cols = ab == 'A' ? modules[k].in
                        : A_R, wrong = 0;
                    if (e < 0) {
                        snprintf(name, sizeof name, "base_model.model.layers.%d.%s.lora_%c.weight",
                                 l, modules[k].module, ab);
                    }
                    else { snprintf(name, sizeof name,
                                    "base_model.model.layers.%d.ffn.experts.%d.%s.lora_%c.weight",
                                    l, e, modules[k].module, ab); }
                    float *x = read_matrix(&st, name, (size_t)rows, (size_t)cols);
                    for (int i = 0; x && i < rows; i++) {
                        for (int j = 0; j < cols; j++) {
                            wrong += x[i * cols + j] != factor(l, modules[k].module, e, ab, i, j,
                                                               cols);
                        }
                    }
                    check(x && wrong == 0, "%s: %d elements are wrong", name, wrong);
                    free(x);
                }
            }
        }
    }
    safetensors_close(&st);
    Json j;
    json_load(&j, path_make(path, dir, "/", "adapter_config.json"), "");
    check(strcmp(json_text(&j, json_get(&j, 0, "base_model_name_or_path", '"')),
                 "DeepSeek-V4-Flash") == 0, "base name");
    check(strcmp(json_text(&j, json_get(&j, 0, "target_modules", '"')),
          "^layers\\.\\d+\\.(attn\\.wq_a|attn\\.wq_b|attn\\.wkv|attn\\.wo_b|"
          "ffn\\.shared_experts\\.w1|"
          "ffn\\.shared_experts\\.w2|ffn\\.shared_experts\\.w3|ffn\\.experts\\.\\d+\\.w1|"
          "ffn\\.experts\\.\\d+\\.w2|"
          "ffn\\.experts\\.\\d+\\.w3)$") == 0, "target_modules: %s",
          json_text(&j, json_find(&j, 0, "target_modules")));
    check(json_number(&j, json_get(&j, 0, "r", '0')) == A_R &&
          json_number(&j, json_get(&j, 0, "lora_alpha", '0')) == 3, "r, alpha");
    check(json_kind(&j, json_find(&j, 0, "target_parameters")) == 'n', "no target_parameters");
    check(j.tok[json_get(&j, 0, "rank_pattern", '{')].size == 0 &&
          j.tok[json_get(&j, 0, "alpha_pattern", '{')].size == 0, "no patterns");
    check(strcmp(json_text(&j, json_get(&j, 0, "peft_type", '"')), "LORA") == 0, "peft_type");
    json_free(&j);
}

// hf: the fused tensors, from the definition: the delta of expert e is the sum over ranks of
// B[:, rank*E + e] A[e*r + rank, :].
static void test_names_hf(unsigned targets) {
    static const struct { const char *ours, *hf; int in, out; } modules[] = {
        {"attn.wq_a", "self_attn.q_a_proj", A_C, A_Q},
        {"attn.wq_b", "self_attn.q_b_proj", A_Q, A_C},
        {"attn.wkv", "self_attn.kv_proj", A_C, A_F}, {"attn.wo_b", "self_attn.o_b_proj", A_F, A_C},
        {"ffn.shared_experts.w1", "mlp.shared_experts.gate_proj", A_C, A_F},
        {"ffn.shared_experts.w2", "mlp.shared_experts.down_proj", A_F, A_C},
        {"ffn.shared_experts.w3", "mlp.shared_experts.up_proj", A_C, A_F} };
    int down = (targets & DOWN) != 0, gate_up = (targets & GATE_UP) != 0, dense_count = 0;
    Adapters s;
    Safetensors st;
    char dir[PATH_SIZE], path[PATH_SIZE], name[160];
    make_adapters(&s, targets);
    fill_adapters(&s);
    adapter_save(in_root(dir, "hf"), &s, &small, NAMES_HF, "DeepSeek-V4-Flash");
    safetensors_open(&st, path_make(path, dir, "/", "adapter_model.safetensors"), "");
    for (int l = 0; l < A_LAYERS; l++) {
        for (int k = 0; k < 7; k++) {
            if (!(targets >> k & 1)) { continue; }
            dense_count++;
            for (char ab = 'A'; ab <= 'B'; ab++) {
                int rows = ab == 'A' ? A_R : modules[k].out, cols = ab == 'A' ? modules[k].in
                    : A_R, wrong = 0;
                snprintf(name, sizeof name, "base_model.model.model.layers.%d.%s.lora_%c.weight",
                         l, modules[k].hf, ab);
                float *x = read_matrix(&st, name, (size_t)rows, (size_t)cols);
                for (int i = 0; x && i < rows * cols; i++) {
                    wrong += x[i] != factor(l, modules[k].ours, -1, ab, i / cols, i % cols, cols);
                }
                check(x && wrong == 0, "%s: %d elements are wrong", name, wrong);
                free(x);
            }
        }
        if (down) {
            int wrong = 0;
            snprintf(name, sizeof name,
                     "base_model.model.model.layers.%d.mlp.experts.lora_A.weight", l);
            float *a = read_matrix(&st, name, A_E * A_R, A_F);
            name[strlen(name) - 8] = 'B';
            float *b = read_matrix(&st, name, A_C, A_R * A_E);
            for (int e = 0; a && b && e < A_E; e++) {
                for (int r = 0; r < A_R; r++) {
                    for (int i = 0; i < A_F; i++) {
                        wrong += a[(e * A_R + r) * A_F + i] != factor(l, "w2", e, 'A', r, i, A_F);
                    }
                    for (int o = 0; o < A_C; o++) {
                        wrong += b[o * A_R * A_E + r * A_E + e] != factor(l, "w2", e, 'B', o, r,
                                                                          A_R);
                    }
                }
            }
            check(a && b && wrong == 0, "down_proj: %d elements are wrong", wrong);
            free(a);
            free(b);
        }
        if (gate_up) {
            int wrong = 0;
            snprintf(name, sizeof name,
                     "base_model.model.model.layers.%d.mlp.experts%s.lora_A.weight", l, down
                     ? ".base_layer" : "");
            float *a = read_matrix(&st, name, A_E * 2 * A_R, A_C);
            name[strlen(name) - 8] = 'B';
            float *b = read_matrix(&st, name, 2 * A_F, 2 * A_R * A_E);
            for (int e = 0; a && b && e < A_E; e++) {
                for (int r = 0; r < 2 * A_R; r++) {     // the fused rank: w1's, then w3's
                    const char *leaf = r < A_R ? "w1" : "w3";
                    for (int i = 0; i < A_C; i++) {
                        wrong += a[(e * 2 * A_R + r) * A_C + i] != factor(l, leaf, e, 'A', r % A_R,
                                                                          i, A_C);
                    }
                    for (int o = 0; o < 2 * A_F; o++) {
                        float want = (o < A_F) == (r < A_R)
                            ? factor(l, leaf, e, 'B', o % A_F, r % A_R, A_R) : 0;
                        wrong += b[o * 2 * A_R * A_E + r * A_E + e] != want;
                    }
                }
            }
            check(a && b && wrong == 0, "gate_up_proj: %d elements are wrong", wrong);
            free(a);
            free(b);
        }
    }
    check_close("tensors", 0, (double)st.n, 2 * (dense_count + A_LAYERS * (down + gate_up)), 0);
    safetensors_close(&st);

    int r, names;
    float alpha;
    unsigned back;
    adapter_read_config(dir, &r, &alpha, &back, &names);
    check(r == A_R && alpha == 3 && back == targets && names == NAMES_HF,
          "hf config: r %d alpha %g targets %x names %d", r, alpha, back, names);
    memset(s.p, 0, (s.n_dense + s.n_expert) * sizeof(real));
    adapter_load(dir, &s, &small);
    check(wrong_elements(&s, 0) == 0, "hf, targets %x: reads back", targets);
    Json j;
    json_load(&j, path_make(path, dir, "/", "adapter_config.json"), "");
    const char *pattern = json_text(&j, json_find(&j, 0, "target_modules"));
    if (targets == all_targets) {
        check(strcmp(pattern, "^model\\.layers\\.\\d+\\.(self_attn\\.q_a_proj|"
                              "self_attn\\.q_b_proj|self_attn\\.kv_proj|"
              "self_attn\\.o_b_proj|mlp\\.shared_experts\\.gate_proj|"
              "mlp\\.shared_experts\\.down_proj|"
              "mlp\\.shared_experts\\.up_proj)$") == 0, "target_modules: %s", pattern);
    }
    if (!dense_count) { check(pattern[0] == '[', "no target_modules"); }
    int parameters = json_find(&j, 0, "target_parameters"),
        ranks = json_find(&j, 0, "rank_pattern"), alphas = json_find(&j, 0, "alpha_pattern");
    check(j.tok[parameters].size == down + gate_up, "target_parameters");
    check(j.tok[ranks].size == gate_up && j.tok[alphas].size == gate_up, "patterns");
    if (gate_up) {
        check(json_number(&j, json_find(&j, ranks, "mlp.experts.gate_up_proj")) == 2 * A_R,
              "rank_pattern");
        check(json_number(&j, json_find(&j, alphas, "mlp.experts.gate_up_proj")) == 6,
              "alpha_pattern");
    }
    json_free(&j);
}

static void save_hf(void *targets) {
    Adapters s;
    char dir[PATH_SIZE];
    make_adapters(&s, *(unsigned *)targets);
    adapter_save(in_root(dir, "half"), &s, &small, NAMES_HF, "base");
}

// What load_into reads, and with which settings.
static struct { const char *dir; int R; float alpha; unsigned targets; } load_case;

static void load_into(void *unused) {
    Adapters s;
    (void)unused;
    make_adapters(&s, load_case.targets);
    s.R = load_case.R;
    s.alpha = load_case.alpha;
    adapter_load(load_case.dir, &s, &small);
    if (wrong_elements(&s, 0)) { exit(3); }
}

// Reads tensor bytes and header of an adapter file, and writes them with a changed header.
static void change_header(const char *path, const char *from, const char *to) {
    size_t n;
    char *bytes = read_bytes(path, &n);
    uint64_t length;
    memcpy(&length, bytes, 8);
    char *header = (char *)calloc(1, length + 1);
    memcpy(header, bytes + 8, length);
    char *changed = replaced(header, from, to);
    put_shard(path, changed, bytes + 8 + length, n - 8 - length);
    free(bytes);
    free(header);
    free(changed);
}

static void change_text(const char *path, const char *from, const char *to) {
    size_t n;
    char *text = read_bytes(path, &n), *changed = replaced(text, from, to);
    write_bytes(path, changed, strlen(changed));
    free(text);
    free(changed);
}

static void test_adapter_load(void) {
    char text[2048], dir[PATH_SIZE], path[PATH_SIZE], config[PATH_SIZE], command[3 * PATH_SIZE];
    Adapters s;
    make_adapters(&s, all_targets);
    fill_adapters(&s);
    for (int names = NAMES_VLLM; names <= NAMES_HF; names++) {
        const char *folder = names == NAMES_VLLM ? "as_vllm" : "as_hf";
        adapter_save(in_root(dir, folder), &s, &small, names, "base");
        load_case = (__typeof__(load_case)){ dir, A_R, 3, all_targets };
        check(run_child(load_into, NULL, text, sizeof text) == 0, "%s reads back: %s", folder,
              text);
        load_case.R = 3;
        check_dies("other r", load_into, NULL, "has r 2");
        load_case.R = A_R;
        load_case.alpha = 4;
        check_dies("other alpha", load_into, NULL, "r 2 and alpha 3, this run 2 and 4");
        load_case.alpha = 3;
        load_case.targets = all_targets & ~2u;
        check_dies("other targets", load_into, NULL, "this run 2 and 3, and other targets");
        load_case.targets = all_targets;
    }
    const struct { const char *folder; int config; const char *from, *to, *expect; } rows[] = {
        {"as_vllm", 0, "layers.1.attn.wkv.lora_B", "layers.7.attn.wkv.lora_B",
         "base_model.model.layers.1.attn.wkv.lora_B.weight is missing"},
        {"as_vllm", 0, "layers.1.attn.wkv.lora_B", "layers.1.attn.wo_a.lora_B",
         "wo_a.lora_B.weight is of no matrix"},
        {"as_vllm", 0, "layers.1.attn.wkv.lora_B", "layers.1.attn.indexer.wkv.lora_B",
         "indexer.wkv.lora_B.weight is of no matrix"},
        {"as_vllm", 0, "layers.1.attn.wkv.lora_B.weight", "layers.1.attn.wkv.lora_B.bias",
         "layers.1.attn.wkv.lora_B.weight is missing"},
        {"as_vllm", 0, "layers.1.ffn.experts.11.w2.lora_A", "layers.1.ffn.experts.12.w2.lora_A",
         "experts.11.w2.lora_A.weight is missing"},
        {"as_vllm", 0, "base_model.model.layers.1.attn.wkv",
         "base_model.model.model.layers.1.self_attn.kv_proj",
         "kv_proj.lora_A.weight is of no matrix"},
        {"as_vllm", 0, "\"shape\":[2,6]", "\"shape\":[6,2]",
         "is F32 [6,2], expected F32, F16 or BF16 [2,6]"},
        {"as_vllm", 0, "\"dtype\":\"F32\",\"shape\":[2,6]", "\"dtype\":\"I32\",\"shape\":[2,6]",
         "is I32 [2,6], expected F32"},
        {"as_hf", 0, "layers.0.mlp.experts.lora_A", "layers.9.mlp.experts.lora_A",
         "layers.0.mlp.experts.lora_A.weight is missing"},
        {"as_hf", 0, "mlp.experts.base_layer.lora_B", "mlp.experts.other_layer.lora_B",
         "is missing"},
        {"as_hf", 0, "q_b_proj", "qq_b_proj", "qq_b_proj.lora_A.weight is of no matrix"},
        {"as_hf", 1, "\"r\": 2", "\"r\": 0", "expected r and lora_alpha above 0"},
        {"as_hf", 1, "\"r\": 2", "\"r\": 2.5", "expected r"},
        {"as_hf", 1, "\"r\": 2,", "", "r is missing"},
        {"as_hf", 1, "\"lora_alpha\": 3", "\"lora_alpha\": -3", "lora_alpha above 0"},
        {"as_hf", 1, "\"use_rslora\": false", "\"use_rslora\": true", "use_rslora false"},
        {"as_hf", 1, "gate_up_proj\": 6", "gate_up_proj\": 3", "alpha_pattern"},
        {"as_hf", 1, "\"alpha_pattern\": {\"mlp.experts.gate_up_proj\": 6}",
         "\"alpha_pattern\": {}", "alpha_pattern"},
        {"as_vllm", 1, "\"alpha_pattern\": {}", "\"alpha_pattern\": {\"attn.wkv\": 5}",
         "alpha_pattern"},
        {"as_hf", 1, "\"mlp.experts.gate_up_proj\", \"mlp.experts.down_proj\"",
         "\"mlp.experts.down_proj\"", "alpha_pattern"},
        {"as_hf", 1, "{", "", "adapter_config.json is not valid JSON"},
    };
    load_case = (__typeof__(load_case)){ in_root(dir, "changed"), A_R, 3, all_targets };
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++) {
        snprintf(command, sizeof command, "cp -r '%s/%s' '%s'", root, rows[i].folder, dir);
        if (system(command) != 0) { exit(99); }
        path_make(path, dir, "/", rows[i].config ? "adapter_config.json"
                  : "adapter_model.safetensors");
        (rows[i].config ? change_text : change_header)(path, rows[i].from, rows[i].to);
        check_dies(rows[i].to, load_into, NULL, rows[i].expect);
        wipe(dir);
    }
    // An extra tensor; an element off the diagonal; a missing file.
    snprintf(command, sizeof command, "cp -r '%s/as_vllm' '%s'", root, dir);
    if (system(command) != 0) { exit(99); }
    path_make(path, dir, "/", "adapter_model.safetensors");
    change_header(path, "\"__metadata__\":{\"format\":\"pt\"}",
                  "\"base_model.model.layers.2.attn.wkv.lora_A.weight\":{\"dtype\":\"F32\","
                  "\"shape\":[0,6],\"data_offsets\":[0,0]}");
    check_dies("left over", load_into, NULL,
               "layers.2.attn.wkv.lora_A.weight is of no trained matrix");
    unlink(path);
    check_dies("no tensors", load_into, NULL, "adapter_model.safetensors: No such file");
    unlink(path_make(config, dir, "/", "adapter_config.json"));
    check_dies("no config", load_into, NULL, "adapter_config.json: No such file");
    wipe(dir);
    for (int corner = 0; corner < 4; corner++) {
        Safetensors st;
        float one = 1e-30f;
        snprintf(command, sizeof command, "cp -r '%s/as_hf' '%s'", root, dir);
        if (system(command) != 0) { exit(99); }
        safetensors_open(&st, path_make(path, dir, "/", "adapter_model.safetensors"), "");
        const Entry *e = safetensors_find(&st, "base_model.model.model.layers.1.mlp.experts."
                                               "base_layer.lora_B.weight");
        size_t cols = 2 * A_R * A_E;        // first and last element of both zero blocks
        size_t at = corner == 0 ? A_R * A_E : corner == 1 ? (A_F - 1) * cols + cols - 1
                  : corner == 2 ? A_F * cols : (2 * A_F - 1) * cols + A_R * A_E - 1;
        int fd = open(path, O_WRONLY);
        if (pwrite(fd, &one, 4, (off_t)(st.data + e->begin + at * 4)) != 4) { exit(99); }
        close(fd);
        safetensors_close(&st);
        check_dies("off the diagonal", load_into, NULL,
                   "experts.base_layer.lora_B.weight is not zero off its diagonal");
        wipe(dir);
    }
    static const float wild[] = { NAN, INFINITY, -INFINITY };       // of a matrix that is trained
    for (int i = 0; i < 3; i++) {
        Safetensors st;
        snprintf(command, sizeof command, "cp -r '%s/as_vllm' '%s'", root, dir);
        if (system(command) != 0) { exit(99); }
        safetensors_open(&st, path_make(path, dir, "/", "adapter_model.safetensors"), "");
        const Entry *e = safetensors_find(&st, "base_model.model.layers.1.attn.wkv.lora_A.weight");
        int fd = open(path, O_WRONLY);
        if (pwrite(fd, &wild[i], 4, (off_t)(st.data + e->begin + 8)) != 4) { exit(99); }
        close(fd);
        safetensors_close(&st);
        check_dies("not finite", load_into, NULL, "layers.1.attn.wkv.lora_A.weight is not finite");
        wipe(dir);
    }
    unsigned half = 1u << TARGET_EXPERTS_W1 | 1u << TARGET_EXPERTS_W2,
        other = 1u << TARGET_EXPERTS_W3;
    check_dies("w1 without w3", save_hf, &half, "--adapter-names hf");
    check_dies("w3 without w1", save_hf, &other, "--adapter-names hf");
}

// F16 and BF16 files: written here, read as the values they hold.
static void test_half_types(void) {
    Adapters s;
    char dir[PATH_SIZE], path[PATH_SIZE], *header = (char *)malloc(1 << 20);
#ifdef __FLT16_MAX__
    for (int i = 0; i < 65536; i++) {
        uint16_t bits = (uint16_t)i;
        _Float16 h;
        memcpy(&h, &bits, 2);
        float got = float_from_f16(bits), want = (float)h;
        check(isnan(want) ? isnan(got) : memcmp(&got, &want, 4) == 0,
              "fp16 code %04x: %g, want %g", i, got, want);
    }
#else
    skip("all fp16 codes: the compiler has no _Float16");
#endif
    make_adapters(&s, 1u << TARGET_WQ_A);
    fill_adapters(&s);
    adapter_save(in_root(dir, "halves"), &s, &small, NAMES_VLLM, "base");
    for (int half = 0; half < 2; half++) {      // layer 0's A as F16, its B as BF16; layer 1 F32
        uint16_t a[A_R * A_C], b[A_Q * A_R];
        unsigned char data[2048];
        size_t na = sizeof a, nb = sizeof b, n = na + nb;
        for (int i = 0; i < A_R * A_C; i++) { a[i] = (uint16_t)(0x3C00 + 37 * i); }
        for (int i = 0; i < A_Q * A_R; i++) { b[i] = (uint16_t)(0xBF80 + 3 * i); }
        memcpy(data, a, na);
        memcpy(data + na, b, nb);
        for (int i = 0; i < A_R * A_C + A_Q * A_R; i++, n += 4) {
            float x = (float)i / 8;
            memcpy(data + n, &x, 4);
        }
        sprintf(header, "{\"base_model.model.layers.0.attn.wq_a.lora_A.weight\":{\"dtype\":\"F16\","
                "\"shape\":[2,6],\"data_offsets\":[0,%zu]},"
                "\"base_model.model.layers.0.attn.wq_a.lora_B.weight\":{\"dtype\":\"BF16\","
                "\"shape\":[5,2],\"data_offsets\":[%zu,%zu]},"
                "\"base_model.model.layers.1.attn.wq_a.lora_A.weight\":{\"dtype\":\"F32\","
                "\"shape\":[2,6],\"data_offsets\":[%zu,%zu]},"
                "\"base_model.model.layers.1.attn.wq_a.lora_B.weight\":{\"dtype\":\"F32\","
                "\"shape\":[5,2],\"data_offsets\":[%zu,%zu]}}",
                na, na, na + nb, na + nb, na + nb + 48, na + nb + 48, n);
        put_shard(path_make(path, dir, "/", "adapter_model.safetensors"), header, data, n);
        adapter_load(dir, &s, &small);
        for (int i = 0; i < A_R * A_C; i++) {
            check_close("F16", i, (double)s.p[s.tensors[0].at + (size_t)i], 1 + 37 * i / 1024.0, 0);
        }
        for (int i = 0; i < A_Q * A_R; i++) {
            check_close("BF16", i, (double)s.p[s.tensors[1].at + (size_t)i], -1 - 3 * i / 128.0, 0);
        }
        check_close("F32", 0, (double)s.p[s.tensors[3].at + 9], 21 / 8.0, 0);
    }
    free(header);
}

// The format's own library writes the same bytes.
static void test_reference(void) {
    char command[4 * PATH_SIZE];
    if (system("python3 -c 'import safetensors.numpy' >/dev/null 2>&1") != 0) {
        skip("bytes of the reference writer: python3 has no safetensors");
        return;
    }
    for (int hf = 0; hf < 2; hf++) {
        snprintf(command, sizeof command,
                 "python3 -c \"from safetensors.numpy import *; "
                 "p='%s/as_%s/adapter_model.safetensors'; "
                 "save_file(load_file(p), p+'.again', metadata={'format':'pt'}); assert open(p,"
                 "'rb').read()==open(p+'.again','rb').read()\"",
                 root, hf ? "hf" : "vllm");
        check(system(command) == 0, "the reference writer gives the same bytes");
    }
}

// -------------------------------------------------------------------------------------------------
// Ranks: the same bytes, whoever writes; the same values, whoever reads

static struct { int ranks, ep, names; const char *out; } crew;

static void save_crew(void *unused) {
    Adapters s;
    (void)unused;
    comm_launch(crew.ranks, crew.ep, 60);
    make_adapters(&s, all_targets);
    fill_adapters(&s);
    // a replica never writes
    if (comm_rank() >= comm_ep()) { s.p[s.n_dense] = s.m[s.n_dense] = 99; }
    // nor dense ones but rank 0
    if (comm_rank() > 0) { s.p[0] = s.v[0] = 99; }
    training_save(crew.out, 3, 0, &s, &small, crew.names, "base", "{\"step\": 3}");
}

static void load_crew(void *path) {
    Adapters s;
    comm_launch(crew.ranks, crew.ep, 60);
    make_adapters(&s, all_targets);
    training_load((const char *)path, &s, &small);
    if (wrong_elements(&s, 1)) { exit(3); }
}

static void test_ranks(void) {
    static const struct { int ranks, ep; } crews[] = { {1, 1}, {2, 2}, {4, 4}, {4, 2}, {2, 1},
                                                       {6, 3} };
    char text[2048], first[PATH_SIZE], out[PATH_SIZE], a[PATH_SIZE], b[PATH_SIZE];
    for (int names = NAMES_VLLM; names <= NAMES_HF; names++) {
        for (int k = 0; k < 6; k++) {
            crew.ranks = crews[k].ranks;
            crew.ep = crews[k].ep;
            crew.names = names;
            crew.out = in_root(out, k == 0 ? "one_rank" : "many_ranks");
            mkdir(out, 0777);
            check(run_child(save_crew, NULL, text, sizeof text) == 0, "%d ranks save: %s",
                  crew.ranks, text);
            path_make(a, out, "/", "checkpoint-000003");
            if (k == 0) { strcpy(first, a); }
            for (int f = 0; f < FILES && k > 0; f++) {
                char x[PATH_SIZE];
                check(same_file(path_make(x, a, "/", file_names[f]),
                                path_make(b, first, "/", file_names[f])),
                      "%d ranks of %d: %s is another file", crew.ranks, crew.ep, file_names[f]);
            }
            check(run_child(load_crew, first, text, sizeof text) == 0,
                  "%d ranks load one rank's file: %s", crew.ranks, text);
            if (k > 0) { wipe(out); }
        }
        wipe(in_root(out, "one_rank"));
    }
}

// -------------------------------------------------------------------------------------------------
// Training state

static void load_found(void *out) {
    Adapters s;
    char path[PATH_SIZE];
    make_adapters(&s, all_targets);
    if (!training_find((const char *)out, path, sizeof path)) { exit(4); }
    training_load(path, &s, &small);
    if (wrong_elements(&s, 1)) { exit(3); }
}

static int exists(const char *a, const char *b) {
    char path[PATH_SIZE];
    return access(path_make(path, a, "/", b), F_OK) == 0;
}

static void test_training(void) {
    char text[2048], out[PATH_SIZE], path[PATH_SIZE], inner[PATH_SIZE];
    Adapters s;
    make_adapters(&s, all_targets);
    fill_adapters(&s);
    mkdir(in_root(out, "out"), 0777);
    check(training_find(out, path, sizeof path) == 0, "nothing to find yet");
    mkdir(path_make(inner, out, "/", "checkpoint-000001.tmp"), 0777);      // of a killed run
    mkdir(path_make(inner, out, "/", "checkpoint-000001.old"), 0777);
    write_bytes(path_make(inner, inner, "/", "x"), "x", 1);
    training_save(out, 2, 2, &s, &small, NAMES_VLLM, "base", "{ \"step\": 2, \"x\": [1, {}] }");
    check(!exists(out, "checkpoint-000001.tmp") && !exists(out, "checkpoint-000001.old"),
          "leftovers are removed");
    check(training_find(out, path, sizeof path) == 1 &&
          strcmp(path + strlen(out), "/checkpoint-000002") == 0, "found %s", path);
    Json j;
    char *state = training_state(path);
    json_parse(&j, "state", state, strlen(state));
    check(json_number(&j, json_get(&j, 0, "step", '0')) == 2 && json_find(&j, 0, "x") > 0 &&
          json_find(&j, 0, "files") > 0, "state.json");
    json_free(&j);
    memset(s.p, 0, (s.n_dense + s.n_expert) * sizeof(real));
    memset(s.m, 0, (s.n_dense + s.n_expert) * sizeof(real));
    memset(s.v, 0, (s.n_dense + s.n_expert) * sizeof(real));
    training_load(path, &s, &small);
    check(wrong_elements(&s, 1) == 0, "masters and moments, bit for bit");
    for (int moment = 0; moment < 2; moment++) {        // the names say which is which
        const char *kind = moment ? ".v" : ".m";
        char name[160];
        Safetensors st;
        snprintf(name, sizeof name, "base_model.model.layers.1.attn.wo_b.lora_B.weight%s", kind);
        safetensors_open(&st, path_make(inner, path, "/", "optimizer.safetensors"), "");
        float *x = read_matrix(&st, name, A_C, A_R);
        int wrong = x == NULL;
        for (int i = 0; x && i < A_C * A_R; i++) {
            wrong += x[i] != (float)element("layers.1.attn.wo_b.lora_B", kind, (size_t)i);
        }
        check(wrong == 0, "%s: %d elements are wrong", name, wrong);
        free(x);
        safetensors_close(&st);
    }

    training_save(out, 10, 2, &s, &small, NAMES_HF, "base", "{}");
    check(exists(out, "checkpoint-000002"), "keep 2 keeps two");
    training_save(out, 11, 2, &s, &small, NAMES_VLLM, "base", "{}");
    check(!exists(out, "checkpoint-000002") && exists(out, "checkpoint-000010") &&
          exists(out, "checkpoint-000011"), "keep 2");
    training_save(out, 11, 2, &s, &small, NAMES_HF, "base", "{\"again\":1}");       // the same step
    check(exists(out, "checkpoint-000010") && !exists(out, "checkpoint-000011.old"), "saved over");
    training_find(out, path, sizeof path);
    state = training_state(path);
    check(strstr(state, "again") != NULL, "the new one is there");
    free(state);
    // after a step back
    training_save(out, 5, 1, &s, &small, NAMES_VLLM, "base", "{}");
    check(exists(out, "checkpoint-000005") && !exists(out, "checkpoint-000010"),
          "the newest stays, whatever its number");
    check(run_child(load_found, out, text, sizeof text) == 0, "and is the latest: %s", text);
    training_save(out, 6, 0, &s, &small, NAMES_VLLM, "base", "{}");
    training_save(out, 7, 0, &s, &small, NAMES_VLLM, "base", "{}");
    check(exists(out, "checkpoint-000005") && exists(out, "checkpoint-000006"), "keep 0 keeps all");

    const char *const files[] = { "adapter_config.json", "adapter_model.safetensors",
                                  "optimizer.safetensors", "state.json" };
    for (int k = 0; k < 4; k++) {               // what is missing or cut is named
        size_t n;
        training_find(out, path, sizeof path);
        path_make(inner, path, "/", files[k]);
        char *bytes = read_bytes(inner, &n);
        write_bytes(inner, bytes, n - 1);
        check_dies("cut", load_found, out, files[k]);
        unlink(inner);
        check_dies("missing", load_found, out, files[k]);
        write_bytes(inner, bytes, n);
        free(bytes);
    }
    // killed between the renames of a save over it
    path_make(inner, out, "/", "checkpoint-000007");
    path_make(path, inner, ".old", "");
    rename(inner, path);
    check(run_child(load_found, out, text, sizeof text) == 0, "the .old one is found: %s", text);
    folder_remove(path);
    check_dies("latest names nothing", load_found, out, "checkpoint-000007");
    write_bytes(path_make(inner, out, "/", "latest"), "../other\n", 9);
    check_dies("latest is nonsense", load_found, out, "latest does not name a checkpoint");
    check(disk_free(out) > 0, "free space");
    check(training_bytes(&s) > 3 * 4 * (s.n_dense + s.n_expert), "space needed");
    wipe(out);
}

// Full disks: a limit on the size of files, a tiny file system (needs root), a folder read-only.
static struct { const char *out; int limit, step; } full;

static void save_limited(void *unused) {
    Adapters s;
    (void)unused;
    if (crew.ranks > 1) { comm_launch(crew.ranks, crew.ep, 60); }
    make_adapters(&s, all_targets);
    fill_adapters(&s);
    struct rlimit limit = { (rlim_t)full.limit, (rlim_t)full.limit };
    signal(SIGXFSZ, SIG_IGN);
    if (full.limit && comm_rank() == comm_ranks() - 1) { setrlimit(RLIMIT_FSIZE, &limit); }
    training_save(full.out, full.step, 1, &s, &small, NAMES_VLLM, "base", "{}");
}

// A child saves in a loop and is killed at a random moment; what latest names must be whole.
static void test_kill(int rounds) {
    char out[PATH_SIZE], text[2048];
    mkdir(in_root(out, "killed"), 0777);
    full = (__typeof__(full)){ out, 0, 1 };
    check(run_child(save_limited, NULL, text, sizeof text) == 0, "the first save: %s", text);
    for (int round = 0; round < rounds; round++) {
        pid_t child = fork();
        if (child == 0) {
            Adapters s;
            make_adapters(&s, all_targets);
            fill_adapters(&s);
            for (int step = 1;; step++) {       // steps come again, so that folders are saved over
                training_save(out, step % 3, 2, &s, &small, step % 2, "base", "{}");
            }
        }
        usleep((useconds_t)(random_bits(17, (uint64_t)round) % 60000));
        kill(child, SIGKILL);
        waitpid(child, NULL, 0);
        int code = run_child(load_found, out, text, sizeof text);
        check(code == 0, "killed in round %d: exit code %d, %s", round, code, text);
    }
    wipe(out);
}

static void test_full_disk(void) {
    char out[PATH_SIZE], text[2048];
    mkdir(in_root(out, "limited"), 0777);
    crew.ranks = 1;
    full = (__typeof__(full)){ out, 0, 1 };
    check(run_child(save_limited, NULL, text, sizeof text) == 0, "without a limit: %s", text);
    full.step = 2;
    for (crew.ranks = 1; crew.ranks <= 2; crew.ranks++) {
        crew.ep = crew.ranks;
        // in each of the files
        const int limits[] = { 1, 300, 700, 2000, 20000, 26000, 30000, 36000, 40000 };
        for (size_t k = 0; k < sizeof limits / sizeof *limits; k++) {
            full.limit = limits[k];
            check_exits(EXIT_FIT, "a file size limit", save_limited, NULL, "cannot save");
            check(!exists(out, "checkpoint-000002.tmp") && !exists(out, "checkpoint-000002") &&
                  !exists(out, "latest.tmp"),
                  "limit %d: nothing is left over", full.limit);
            check(run_child(load_found, out, text, sizeof text) == 0, "the old one is whole: %s",
                  text);
        }
    }
    wipe(out);

    mkdir(in_root(out, "tiny"), 0777);
    crew.ranks = 1;
    full.limit = 0;
    if (mount("tmpfs", out, "tmpfs", 0, "size=400k") != 0) {
        skip("a full file system: mounting one needs root");
    } else {
        int saved = 0, refused = 0;
        for (full.step = 1; full.step < 12; full.step++) {      // something else fills the disk
            char path[PATH_SIZE], name[32];
            snprintf(name, sizeof name, "fill%d", full.step);
            int code = run_child(save_limited, NULL, text, sizeof text);
            saved += code == 0;
            int said = code == EXIT_FIT && strstr(text, "cannot save") != NULL;
            refused += said && strstr(text, strerror(ENOSPC));
            check(code == 0 || said,
                  "full: exit code %d, %s", code, text);
            check(run_child(load_found, out, text, sizeof text) == 0,
                  "step %d: what latest names is whole: %s", full.step, text);
            snprintf(name, sizeof name, "checkpoint-%06d.tmp", full.step);
            check(!exists(out, name), "the temporary folder is removed");
            snprintf(name, sizeof name, "fill%d", full.step);
            FILE *f = fopen(path_make(path, out, "/", name), "wb");
            for (int i = 0; f && i < 40000; i++) { fputc(1, f); }
            if (f) { fclose(f); }
        }
        check(saved > 0 && refused > 0, "both were seen: %d saved, %d refused", saved, refused);
        umount(out);
    }
    rmdir(out);
    full = (__typeof__(full)){ in_root(out, "not/there"), 0, 1 };
    check_dies("no such folder", save_limited, NULL, "No such file or directory");
    full.out = "/dev/null";
    check_dies("a file as folder", save_limited, NULL, "Not a directory");
}

int main(void) {
#ifdef _OPENMP
    omp_set_num_threads(1);             // so that children may have threads of their own
#endif
    const char *tmp = getenv("TMPDIR");
    snprintf(root, sizeof root, "%s/test_refit.XXXXXX", tmp && strlen(tmp) < 40 ? tmp : "/tmp");
    if (mkdtemp(root) == NULL) { perror(root); return 99; }
#ifndef HAVE_JSMN
    check_dies("without jsmn.h", parse_text, "{}", "libjsmn-dev");
    skip("everything that reads JSON: built without jsmn.h (make deps)");
    wipe(root);
    return finish("test_refit");
#endif
    test_json();
    test_config();
    test_routing();
    test_checkpoint();
    test_checkpoint_open();
    test_checkpoint_bytes();
    test_fuzz(3000);
    test_scales();
    test_names_vllm();
    test_names_hf(all_targets);
    test_names_hf(GATE_UP | 1u << TARGET_WKV);
    test_names_hf(DOWN);
    test_names_hf(GATE_UP);
    test_names_hf(127);
    test_adapter_load();
    test_half_types();
    test_reference();
    test_ranks();
    test_training();
    test_kill(60);
    test_full_disk();
    wipe(root);
    return finish("test_refit");
}
