"""The oracle's model: DeepSeek-V4 as Hugging Face computes it, on weights that are never stored.

The C trainer and this file draw the same test model from the same counter-based generator
(kernels.cu, section 1.5): element i of a tensor is a function of (seed, tensor name, i). So a test
vector is only the *answer* (loss, logits, gradients), and both sides make the question themselves.

Contents
    1. random numbers       kernels.cu section 1.5, vectorised
    2. number formats       e4m3, e2m1, e8m0 and bf16: exact codecs
    3. configurations       T2 (formats), tiny (the built-in model), config.json as released
    4. the tensor table     name, dtype, shape, mean, std of every checkpoint tensor
    5. drawing              codes and values of one tensor
    6. checkpoint files     safetensors shards and index, in the released layout
    7. Hugging Face model   the released names mapped, in fp32 or fp64
    8. LoRA                 factors on top of the frozen weights, with gradients
"""
import importlib.util
import json
import math
import os
import re
import struct
import sys

import numpy as np
import torch

# -------------------------------------------------------------------------------------------------
# 1. Random numbers
#
# numpy's uint64 arrays wrap around as C's uint64_t does. Everything is an integer until the one
# product with a float32 constant, so both sides get the same bits.

GOLDEN = np.uint64(0x9E3779B97F4A7C15)
RANDOM_STD = 37836.95               # the standard deviation of random_normal's integers


def random_mix(z):
    """SplitMix64's output function, on an array of uint64."""
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def random_key(seed, name):
    """The key of a tensor: its name by FNV-1a, joined with the seed."""
    hash_ = 0xCBF29CE484222325
    for byte in name.encode():
        hash_ = (hash_ ^ byte) * 0x100000001B3 % 2**64
    mixed = random_mix(np.array([(seed + int(GOLDEN)) % 2**64], dtype=np.uint64))[0]
    return np.uint64(hash_) ^ mixed


def random_bits(key, i):
    """64 random bits for each index in i (an integer array)."""
    i = np.asarray(i).astype(np.uint64)
    return random_mix(key + (i + np.uint64(1)) * GOLDEN)


def random_normal(key, i):
    """The sum of four 16-bit uniforms, centred: an int64, nearly normal with std RANDOM_STD."""
    z = random_bits(key, i)
    parts = [z >> np.uint64(shift) & np.uint64(0xFFFF) for shift in (0, 16, 32, 48)]
    return sum(parts).astype(np.int64) - 131070


def random_uniform(key, i):
    """In [0, 1), a multiple of 2^-24: exact in float32."""
    return (random_bits(key, i) >> np.uint64(40)).astype(np.float32) * np.float32(1 / 16777216)


# -------------------------------------------------------------------------------------------------
# 2. Number formats
#
# A small float with m mantissa bits has the step 2^(exponent - m) around a value of that exponent,
# and codes of one sign are consecutive integers in the order of their values. So: divide by the
# step (exact), round half to even, and the code is the position in that order.

def encode_float(x, mantissa_bits, bias, largest):
    """x (float32) -> (sign bit, magnitude code), nearest, ties to the even code, clamped."""
    x = np.asarray(x, dtype=np.float32)
    magnitude = np.minimum(np.abs(x).astype(np.float64), largest)
    _, exponent = np.frexp(magnitude)               # magnitude = f * 2^exponent, f in [0.5, 1)
    exponent = np.where(magnitude > 0, exponent - 1, 1 - bias)
    exponent = np.maximum(exponent, 1 - bias)       # zero and subnormals: the smallest exponent
    steps = np.rint(np.ldexp(magnitude, mantissa_bits - exponent)).astype(np.int64)
    code = (exponent + bias << mantissa_bits) + steps - (1 << mantissa_bits)
    return np.signbit(x), code


def decode_float(code, mantissa_bits, bias):
    """Magnitude code -> float32 value, exact."""
    code = np.asarray(code).astype(np.int64)
    exponent = code >> mantissa_bits
    mantissa = code & (1 << mantissa_bits) - 1
    normal = np.where(exponent > 0, 1 << mantissa_bits, 0)
    return np.ldexp((mantissa + normal).astype(np.float32),
                    np.maximum(exponent, 1) - bias - mantissa_bits)


def e4m3_from_float(x):
    sign, code = encode_float(x, mantissa_bits=3, bias=7, largest=448.0)
    return (code + 128 * sign).astype(np.uint8)


def float_from_e4m3(code):
    value = decode_float(code & 0x7F, mantissa_bits=3, bias=7)
    return np.where(code & 0x80, -value, value)


def e2m1_from_float(x):
    sign, code = encode_float(x, mantissa_bits=1, bias=1, largest=6.0)
    return (code + 8 * sign).astype(np.uint8)


def float_from_e2m1(code):
    value = decode_float(code & 7, mantissa_bits=1, bias=1)
    return np.where(code & 8, -value, value)


def float_from_e8m0(code):
    """2^(code - 127); code 0 is the subnormal 2^-127, code 255 (NaN) never occurs here."""
    return np.ldexp(np.float32(1), code.astype(np.int32) - 127)


def bf16_from_float(x):
    """float32 -> the upper 16 bits, rounded to nearest even (finite values only)."""
    bits = np.asarray(x, dtype=np.float32).view(np.uint32)
    odd = bits >> np.uint32(16) & np.uint32(1)
    return (bits + np.uint32(0x7FFF) + odd >> np.uint32(16)).astype(np.uint16)


def float_from_bf16(bits):
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


# -------------------------------------------------------------------------------------------------
# 3. Configurations
#
# A configuration is the dictionary that config.json holds, in the released spelling
# (deepseek-v4-flash.md section 1), because that is what the trainer's reader must understand.

def make_config(vocab_size, hidden_size, num_attention_heads, experts_per_token, index_n_heads,
                swiglu_limit, bos_token_id, eos_token_id):
    """All small models share the five layer kinds, 8 experts of width 128 and the window of 32."""
    return {
        "architectures": ["DeepseekV4ForCausalLM"],
        "model_type": "deepseek_v4",
        "torch_dtype": "bfloat16",
        "transformers_version": "4.57.1",
        "vocab_size": vocab_size,
        "hidden_size": hidden_size,
        "num_hidden_layers": 5,
        "num_nextn_predict_layers": 1,
        "num_attention_heads": num_attention_heads,
        "num_key_value_heads": 1,
        "head_dim": 128,
        "qk_rope_head_dim": 64,
        "q_lora_rank": 128,
        "o_groups": 2,
        "o_lora_rank": 128,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "n_routed_experts": 8,
        "n_shared_experts": 1,
        "num_experts_per_tok": experts_per_token,
        "moe_intermediate_size": 128,
        "num_hash_layers": 2,
        "scoring_func": "sqrtsoftplus",
        "topk_method": "noaux_tc",
        "norm_topk_prob": True,
        "routed_scaling_factor": 1.5,
        "hidden_act": "silu",
        "swiglu_limit": swiglu_limit,
        "sliding_window": 32,
        "compress_ratios": [0, 4, 128, 4, 0, 0],    # one per layer, and one for the MTP layer
        "rope_theta": 10000,
        "compress_rope_theta": 160000,
        "rope_scaling": {"type": "yarn", "factor": 16, "beta_fast": 32, "beta_slow": 1,
                         "original_max_position_embeddings": 65536},
        "max_position_embeddings": 1048576,
        "index_n_heads": index_n_heads,
        "index_head_dim": 128,
        "index_topk": 16,
        "hc_mult": 4,
        "hc_sinkhorn_iters": 20,
        "hc_eps": 1e-6,
        "rms_norm_eps": 1e-6,
        "initializer_range": 0.02,
        "tie_word_embeddings": False,
        "use_cache": True,
        "bos_token_id": bos_token_id,
        "eos_token_id": eos_token_id,
        "expert_dtype": "fp4",
        "quantization_config": {"quant_method": "fp8", "fmt": "e4m3", "scale_fmt": "ue8m0",
                                "weight_block_size": [128, 128], "activation_scheme": "dynamic"},
    }


# T2: every format and every layer kind at the smallest size that fills its blocks. The clamp is far
# below the real 10, so that 2-5 % of the SwiGLU inputs are clamped. A clamp is a corner of the
# gradient: its exact place was picked so that for seeds 1 and 2 no input lies so near to it that
# float32 noise could move it across (make_vectors.py checks this).
CONFIGS = {
    "t2_top2": make_config(512, 256, 4, 2, 4, 2.796875, 0, 1),
    "t2_top6": make_config(512, 256, 4, 6, 4, 2.8125, 0, 1),
    "tiny": make_config(264, 128, 4, 2, 2, 10.0, 256, 257),
}


# -------------------------------------------------------------------------------------------------
# 4. The tensor table
#
# One row per tensor of the checkpoint: name, dtype in the file, logical shape, and how its
# elements are drawn. "FP4" stands for an I8 tensor of packed pairs; F8_E4M3 and FP4 rows are each
# followed by their F8_E8M0 scale in the file.

def layer_tensors(config, prefix, ratio, hashed):
    """The rows of one layer; prefix is "layers.3." or "mtp.0.". """
    C, D = config["hidden_size"], config["head_dim"]
    H, Q = config["num_attention_heads"], config["q_lora_rank"]
    G, O = config["o_groups"], config["o_lora_rank"]
    E, F, N = config["n_routed_experts"], config["moe_intermediate_size"], config["hc_mult"]
    IH, ID = config["index_n_heads"], config["index_head_dim"]
    rows = []

    def add(name, dtype, shape, mean=0.0, std=0.0):
        rows.append((prefix + name, dtype, shape, mean, std))

    def norm(name, width):
        add(name, "BF16", (width,), 1.0, 0.2)

    def fp8(name, out, in_):
        add(name, "F8_E4M3", (out, in_), 0.0, 1 / math.sqrt(in_))

    def compressor(name, width, columns):
        add(name + "ape", "F32", (ratio, columns), 0.0, 0.7)
        add(name + "wkv.weight", "BF16", (columns, C), 0.0, 1 / math.sqrt(C))
        add(name + "wgate.weight", "BF16", (columns, C), 0.0, 1 / math.sqrt(C))
        norm(name + "norm.weight", width)

    norm("attn_norm.weight", C)
    norm("ffn_norm.weight", C)
    for site in ("attn", "ffn"):
        add(f"hc_{site}_fn", "F32", ((2 + N) * N, N * C), 0.0, 1 / math.sqrt(N * C))
        add(f"hc_{site}_base", "F32", ((2 + N) * N,), 0.0, 0.7)
        add(f"hc_{site}_scale", "F32", (3,), 1.0, 0.3)
    add("attn.attn_sink", "F32", (H,), 0.0, 1.0)
    fp8("attn.wq_a.weight", Q, C)
    norm("attn.q_norm.weight", Q)
    fp8("attn.wq_b.weight", H * D, Q)
    fp8("attn.wkv.weight", D, C)
    norm("attn.kv_norm.weight", D)
    fp8("attn.wo_a.weight", G * O, H * D // G)
    fp8("attn.wo_b.weight", C, G * O)
    if ratio == 4:                  # CSA: two overlapping halves, and an indexer
        compressor("attn.compressor.", D, 2 * D)
        fp8("attn.indexer.wq_b.weight", IH * ID, Q)
        add("attn.indexer.weights_proj.weight", "BF16", (IH, C), 0.0, 1 / math.sqrt(C))
        compressor("attn.indexer.compressor.", ID, 2 * ID)
    elif ratio == 128:              # HCA: one half
        compressor("attn.compressor.", D, D)
    add("ffn.gate.weight", "BF16", (E, C), 0.0, 1 / math.sqrt(C))
    if hashed:
        add("ffn.gate.tid2eid", "I64", (config["vocab_size"], config["num_experts_per_tok"]))
    else:
        add("ffn.gate.bias", "F32", (E,), 0.0, 0.3)
    for e in range(E):
        for leaf, out, in_ in (("w1", F, C), ("w2", C, F), ("w3", F, C)):
            add(f"ffn.experts.{e}.{leaf}.weight", "FP4", (out, in_), 0.0, 1 / math.sqrt(in_))
    for leaf, out, in_ in (("w1", F, C), ("w2", C, F), ("w3", F, C)):
        fp8(f"ffn.shared_experts.{leaf}.weight", out, in_)
    return rows


def tensor_table(config, mtp=False):
    """All rows: (name, dtype, logical shape, mean, std)."""
    C, V, N = config["hidden_size"], config["vocab_size"], config["hc_mult"]
    head_rows = [
        ("norm.weight", "BF16", (C,), 1.0, 0.2),
        ("hc_head_fn", "F32", (N, N * C), 0.0, 1 / math.sqrt(N * C)),
        ("hc_head_base", "F32", (N,), 0.0, 0.7),
        ("hc_head_scale", "F32", (1,), 1.0, 0.3),
    ]
    rows = [
        ("embed.weight", "BF16", (V, C), 0.0, 1.0),
        ("head.weight", "BF16", (V, C), 0.0, 1.5 / math.sqrt(C)),
        *head_rows,
    ]
    for layer in range(config["num_hidden_layers"]):
        rows += layer_tensors(config, f"layers.{layer}.", config["compress_ratios"][layer],
                              hashed=layer < config["num_hash_layers"])
    if mtp:                         # the trainer skips these; they are here to be skipped
        rows += layer_tensors(config, "mtp.0.", 0, hashed=False)
        for leaf in ("e_proj", "h_proj"):
            rows.append((f"mtp.0.{leaf}.weight", "F8_E4M3", (C, C), 0.0, 1 / math.sqrt(C)))
        for leaf in ("enorm", "hnorm"):
            rows.append((f"mtp.0.{leaf}.weight", "BF16", (C,), 1.0, 0.2))
        rows += [("mtp.0." + name, *rest) for name, *rest in head_rows]
    return rows


# -------------------------------------------------------------------------------------------------
# 5. Drawing

def draw_float(seed, name, shape, mean, std):
    """mean + normal * constant: the constant is a float32, the arithmetic double, one rounding."""
    constant = np.float32(np.float64(np.float32(std)) / RANDOM_STD)
    n = random_normal(random_key(seed, name), np.arange(math.prod(shape)))
    return (mean + n.astype(np.float64) * np.float64(constant)).astype(np.float32).reshape(shape)


def draw_codes(seed, name, shape, std, lower):
    """Normal numbers before they are rounded to a small format, and their power of two e.

    The matrix is normal * 2^e; 2^-e brings the standard deviation to [2^lower, 2^(lower + 1))."""
    sigma = np.float32(std)
    _, exponent = np.frexp(sigma)
    e = int(exponent) - 1 - lower                   # floor(log2(sigma)) - lower
    constant = np.float32(np.ldexp(np.float64(sigma), -e) / RANDOM_STD)
    n = random_normal(random_key(seed, name), np.arange(math.prod(shape)))
    return (n.astype(np.float64) * np.float64(constant)).astype(np.float32).reshape(shape), e


def draw_scale(seed, weight_name, shape, e):
    """e8m0 bytes 127 + e, each moved by -1, 0 or 1: a scale that is ignored shows."""
    key = random_key(seed, scale_name(weight_name))
    moved = random_bits(key, np.arange(math.prod(shape))) % np.uint64(3)
    return (127 + e - 1 + moved.astype(np.int64)).astype(np.uint8).reshape(shape)


def scale_name(weight_name):
    return weight_name.removesuffix(".weight") + ".scale"


def draw_hash_table(seed, name, shape, experts):
    """Row v: the first K places of a shuffle of 0 .. experts-1 (partial Fisher-Yates)."""
    key = random_key(seed, name)
    V, K = shape
    table = np.tile(np.arange(experts, dtype=np.int64), (V, 1))
    rows = np.arange(V)
    for k in range(K):
        j = k + (random_bits(key, rows * K + k) % np.uint64(experts - k)).astype(np.int64)
        table[rows, k], table[rows, j] = table[rows, j], table[rows, k].copy()
    return table[:, :K].copy()


def draw_tensor(seed, config, row):
    """One row of the table -> (value, files).

    value is what the model computes with (float32 array, or int64 for the hash table); files lists
    (name, file dtype, array) of what the checkpoint stores for it."""
    name, dtype, shape, mean, std = row
    if dtype == "F32":
        value = draw_float(seed, name, shape, mean, std)
        return value, [(name, "F32", value)]
    if dtype == "BF16":
        bits = bf16_from_float(draw_float(seed, name, shape, mean, std))
        return float_from_bf16(bits), [(name, "BF16", bits)]
    if dtype == "I64":
        table = draw_hash_table(seed, name, shape, config["n_routed_experts"])
        return table, [(name, "I64", table)]
    out, in_ = shape
    if dtype == "F8_E4M3":          # one scale per 128 x 128 block
        normal, e = draw_codes(seed, name, shape, std, lower=6)
        codes = e4m3_from_float(normal)
        scale = draw_scale(seed, name, (-(-out // 128), -(-in_ // 128)), e)
        wide = np.repeat(np.repeat(scale, 128, axis=0), 128, axis=1)[:out, :in_]
        value = float_from_e4m3(codes) * float_from_e8m0(wide)
        return value, [(name, "F8_E4M3", codes), (scale_name(name), "F8_E8M0", scale)]
    assert dtype == "FP4"           # one scale per 32 columns; the low nibble is the even column
    normal, e = draw_codes(seed, name, shape, std, lower=0)
    codes = e2m1_from_float(normal)
    scale = draw_scale(seed, name, (out, in_ // 32), e)
    value = float_from_e2m1(codes) * float_from_e8m0(np.repeat(scale, 32, axis=1))
    packed = codes[:, 0::2] | codes[:, 1::2] << 4
    return value, [(name, "I8", packed), (scale_name(name), "F8_E8M0", scale)]


def draw_model(seed, config):
    """Checkpoint tensor name -> value (scales already applied), for the whole backbone."""
    return {row[0]: draw_tensor(seed, config, row)[0] for row in tensor_table(config)}


def draw_tokens(seed, config, count):
    bits = random_bits(random_key(seed, "tokens"), np.arange(count))
    return (bits % np.uint64(config["vocab_size"])).astype(np.int64)


# -------------------------------------------------------------------------------------------------
# 6. Checkpoint files

ITEM_BYTES = {"I64": 8, "F32": 4, "I32": 4, "BF16": 2, "I8": 1, "F8_E4M3": 1, "F8_E8M0": 1}


def write_safetensors(path, tensors, metadata=None):
    """tensors: list of (name, dtype, array). Order and padding as the reference writer has them:
    wide types first, then by name; the header is padded with blanks to a multiple of 8."""
    tensors = sorted(tensors, key=lambda t: (-ITEM_BYTES[t[1]], t[0]))
    header, at = {}, 0
    if metadata:
        header["__metadata__"] = metadata
    for name, dtype, array in tensors:
        size = math.prod(array.shape) * ITEM_BYTES[dtype]
        assert size == array.nbytes and name not in header, name
        header[name] = {"dtype": dtype, "shape": list(array.shape), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for _, _, array in tensors:
            file.write(np.ascontiguousarray(array).tobytes())
    return at


def read_safetensors(path):
    """name -> (dtype, raw array); codes stay codes (uint8, and uint16 for BF16)."""
    storage = {"I64": "<i8", "F32": "<f4", "I32": "<i4", "BF16": "<u2"}
    with open(path, "rb") as file:
        data = file.read()
    length = struct.unpack("<Q", data[:8])[0]
    tensors = {}
    for name, entry in json.loads(data[8:8 + length]).items():
        if name != "__metadata__":
            begin, end = (8 + length + offset for offset in entry["data_offsets"])
            raw = np.frombuffer(data[begin:end], storage.get(entry["dtype"], "u1"))
            tensors[name] = (entry["dtype"], raw.reshape(entry["shape"]))
    return tensors


def write_config(path, config):
    with open(path, "w") as file:
        file.write(json.dumps(config, indent=2) + "\n")


def write_checkpoint(folder, config, seed, shards=3, mtp=False):
    """The drawn model as a released-layout folder: config.json, index, shards of whole layers."""
    os.makedirs(folder, exist_ok=True)
    files = [f for row in tensor_table(config, mtp) for f in draw_tensor(seed, config, row)[1]]
    total = sum(array.nbytes for _, _, array in files)
    parts, filled = [[] for _ in range(shards)], 0
    for entry in files:             # in table order, cut at equal sizes
        parts[min(filled * shards // total, shards - 1)].append(entry)
        filled += entry[2].nbytes
    weight_map = {}
    for number, part in enumerate(parts):
        shard = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        write_safetensors(os.path.join(folder, shard), part, {"format": "pt"})
        weight_map.update({name: shard for name, _, _ in part})
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    with open(os.path.join(folder, "model.safetensors.index.json"), "w") as file:
        file.write(json.dumps(index, indent=2) + "\n")
    write_config(os.path.join(folder, "config.json"), config)
    return total, len(weight_map)


def read_checkpoint(folder):
    """(config, checkpoint tensor name -> value with scales applied); mtp.* is skipped."""
    with open(os.path.join(folder, "config.json")) as file:
        config = json.load(file)
    with open(os.path.join(folder, "model.safetensors.index.json")) as file:
        weight_map = json.load(file)["weight_map"]
    raw = {}
    for shard in sorted(set(weight_map.values())):
        raw.update(read_safetensors(os.path.join(folder, shard)))
    values = {}
    for name, dtype, shape, _, _ in tensor_table(config):
        found, array = raw[name]
        if dtype == "FP4":
            codes = np.stack([array & 15, array >> 4], axis=-1).reshape(shape)
            scale = np.repeat(raw[scale_name(name)][1], 32, axis=1)
            values[name] = float_from_e2m1(codes) * float_from_e8m0(scale)
        elif dtype == "F8_E4M3":
            scale = raw[scale_name(name)][1]
            wide = np.repeat(np.repeat(scale, 128, axis=0), 128, axis=1)[:shape[0], :shape[1]]
            values[name] = float_from_e4m3(array) * float_from_e8m0(wide)
        else:
            values[name] = float_from_bf16(array) if dtype == "BF16" else array
        assert found == ("I8" if dtype == "FP4" else dtype) and values[name].shape == shape, name
    return config, values


# -------------------------------------------------------------------------------------------------
# 7. The Hugging Face model
#
# transformers' own modeling file, loaded with these edits and no other:
#   - ties: torch.topk leaves the order of equal index scores open, and ties do happen: a score is
#     exactly 0 when the dot products of all index heads are negative. A stable sort takes the
#     smaller entry, which is the trainer's rule.
#   - fp64 only: the file computes norms, RoPE, hyper-connections, pooling softmax and index scores
#     in float32 whatever the model's dtype; every mention of float32 becomes float64.

TIES = (".topk(top_k, dim=-1).indices",                                     # found twice
        ".sort(dim=-1, descending=True, stable=True).indices[..., :top_k]")
WIDER = ((r"torch\.float(32)?\b", "torch.float64", 8),                      # found 8 times or more
         (r"\.float\(\)", ".double()", 15))


def load_modeling(dtype):
    """The module transformers.models.deepseek_v4.modeling_deepseek_v4, edited as said above."""
    import transformers.models.deepseek_v4.modeling_deepseek_v4 as original
    name = f"{original.__name__}_{str(dtype).removeprefix('torch.')}"
    if name in sys.modules:
        return sys.modules[name]
    with open(original.__file__) as file:
        text = file.read()
    assert text.count(TIES[0]) == 2, "transformers changed: look at the indexer again"
    text = text.replace(*TIES)
    if dtype == torch.float64:
        for pattern, replacement, least in WIDER:
            text, count = re.subn(pattern, replacement, text)
            assert count >= least, f"{count} of {pattern}: transformers changed, look again"
    spec = importlib.util.spec_from_loader(name, loader=None, origin=original.__file__)
    module = importlib.util.module_from_spec(spec)
    module.__package__ = original.__package__
    module.__file__ = original.__file__
    sys.modules[name] = module
    exec(compile(text, original.__file__, "exec"), module.__dict__)
    return module


def rope_frequencies(config, compressed):
    """Section 3.5 of deepseek-v4-flash.md, in fp64."""
    half = config["qk_rope_head_dim"] // 2
    base = config["compress_rope_theta"] if compressed else config["rope_theta"]
    i = torch.arange(half, dtype=torch.float64)
    g = float(base) ** (-i / half)
    if not compressed:
        return g
    yarn = config["rope_scaling"]

    original = yarn["original_max_position_embeddings"]

    def corr(turns):
        return half * math.log(original / (2 * math.pi * turns)) / math.log(base)

    low = max(math.floor(corr(yarn["beta_fast"])), 0)
    high = min(math.ceil(corr(yarn["beta_slow"])), 2 * half - 1)
    ramp = ((i - low) / (high - low)).clamp(0, 1)
    return g * (1 - ramp) + g / yarn["factor"] * ramp


# checkpoint leaf -> Hugging Face leaf (deepseek-v4-flash.md section 2.4)
HF_LEAVES = {
    "attn_norm.weight": "input_layernorm.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    **{f"hc_{site}_{leaf}": f"{site}_hc.{leaf}"
       for site in ("attn", "ffn") for leaf in ("fn", "base", "scale")},
    "attn.attn_sink": "self_attn.sinks",
    "attn.wq_a.weight": "self_attn.q_a_proj.weight",
    "attn.q_norm.weight": "self_attn.q_a_norm.weight",
    "attn.wq_b.weight": "self_attn.q_b_proj.weight",
    "attn.wkv.weight": "self_attn.kv_proj.weight",
    "attn.kv_norm.weight": "self_attn.kv_norm.weight",
    "attn.wo_a.weight": "self_attn.o_a_proj.weight",
    "attn.wo_b.weight": "self_attn.o_b_proj.weight",
    **{f"attn.{ours}{a}": f"self_attn.compressor.{theirs}{b}"
       for ours, theirs in (("compressor.", ""), ("indexer.compressor.", "indexer."))
       for a, b in (("ape", "position_bias"), ("wkv.weight", "kv_proj.weight"),
                    ("wgate.weight", "gate_proj.weight"), ("norm.weight", "kv_norm.weight"))},
    "attn.indexer.wq_b.weight": "self_attn.compressor.indexer.q_b_proj.weight",
    "attn.indexer.weights_proj.weight": "self_attn.compressor.indexer.scorer.weights_proj.weight",
    "ffn.gate.weight": "mlp.gate.weight",
    "ffn.gate.bias": "mlp.gate.e_score_correction_bias",
    "ffn.gate.tid2eid": "mlp.gate.tid2eid",
    "ffn.shared_experts.w1.weight": "mlp.shared_experts.gate_proj.weight",
    "ffn.shared_experts.w2.weight": "mlp.shared_experts.down_proj.weight",
    "ffn.shared_experts.w3.weight": "mlp.shared_experts.up_proj.weight",
}
HF_TOP = {
    "embed.weight": "model.embed_tokens.weight", "head.weight": "lm_head.weight",
    "norm.weight": "model.norm.weight", "hc_head_fn": "model.hc_head.hc_fn",
    "hc_head_base": "model.hc_head.hc_base", "hc_head_scale": "model.hc_head.hc_scale",
}


def hf_name(name):
    """Checkpoint name -> Hugging Face parameter name (routed experts are fused: not here)."""
    if name in HF_TOP:
        return HF_TOP[name]
    layer, leaf = re.fullmatch(r"layers\.(\d+)\.(.*)", name).groups()
    return f"model.layers.{layer}.{HF_LEAVES[leaf]}"


def hf_state(config, values):
    """Checkpoint values -> Hugging Face state dict (float32 and int64 tensors)."""
    state = {hf_name(name): torch.from_numpy(np.array(value)) for name, value in values.items()
             if ".ffn.experts." not in name}
    for layer in range(config["num_hidden_layers"]):
        w1, w2, w3 = (np.stack([values[f"layers.{layer}.ffn.experts.{e}.{leaf}.weight"]
                                for e in range(config["n_routed_experts"])])
                      for leaf in ("w1", "w2", "w3"))
        prefix = f"model.layers.{layer}.mlp.experts."
        state[prefix + "gate_up_proj"] = torch.from_numpy(np.concatenate([w1, w3], axis=1))
        state[prefix + "down_proj"] = torch.from_numpy(w2)
    return state


def build_model(config, values, dtype):
    """Hugging Face's DeepseekV4ForCausalLM with these weights, frozen, eager everywhere."""
    modeling = load_modeling(dtype)
    keys = {k: v for k, v in config.items() if k not in ("quantization_config", "torch_dtype")}
    hf_config = modeling.DeepseekV4Config.from_dict(json.loads(json.dumps(keys)))
    hf_config._attn_implementation = "eager"
    hf_config._experts_implementation = "eager"
    model = modeling.DeepseekV4ForCausalLM(hf_config).to(dtype)
    model.load_state_dict(hf_state(config, values), strict=True)
    for module in model.modules():
        if isinstance(module, modeling.DeepseekV4RotaryEmbedding):
            for kind in ("main", "compress"):
                exact = rope_frequencies(config, compressed=kind == "compress")
                buffer = getattr(module, kind + "_inv_freq")
                assert torch.allclose(buffer.double(), exact, rtol=1e-6, atol=0), kind
                if dtype == torch.float64:      # transformers rounds YaRN's to float32
                    buffer.copy_(exact)
    return model.requires_grad_(False).eval()


# -------------------------------------------------------------------------------------------------
# 8. LoRA
#
# y = W x + s B (A x) with s = alpha / R is the product with the matrix W + s B A, so the adapted
# model is the frozen one called with those matrices; autograd then gives dA and dB. Names follow
# the trainer: "layers.0.attn.wq_a.lora_A" (R, in), "layers.0.ffn.experts.3.w1.lora_B" (out, R).

def lora_modules(config):
    """(module, in, out) of every adapted matrix, in the fixed order of the `gradients` rows."""
    C, F, D = config["hidden_size"], config["moe_intermediate_size"], config["head_dim"]
    H, Q = config["num_attention_heads"], config["q_lora_rank"]
    modules = []
    for layer in range(config["num_hidden_layers"]):
        attn, ffn = f"layers.{layer}.attn.", f"layers.{layer}.ffn."
        modules += [(attn + "wq_a", C, Q), (attn + "wq_b", Q, H * D), (attn + "wkv", C, D),
                    (attn + "wo_b", config["o_groups"] * config["o_lora_rank"], C)]
        experts = [f"experts.{e}" for e in range(config["n_routed_experts"])]
        for expert in ["shared_experts"] + experts:
            prefix = ffn + expert
            modules += [(prefix + ".w1", C, F), (prefix + ".w2", F, C), (prefix + ".w3", C, F)]
    return modules


def draw_test_factors(seed, config, R):
    """Factors for gradient tests: A normal with std 1/sqrt(in), B normal with std 0.05."""
    factors = {}
    for module, in_, out in lora_modules(config):
        a, b = module + ".lora_A", module + ".lora_B"
        factors[a] = draw_float(seed, a, (R, in_), 0.0, 1 / math.sqrt(in_))
        factors[b] = draw_float(seed, b, (out, R), 0.0, 0.05)
    return factors


def draw_initial_factors(seed, config, R):
    """Factors as training begins: A uniform in +-1/sqrt(in), in float32; B zero."""
    factors = {}
    for module, in_, out in lora_modules(config):
        u = random_uniform(random_key(seed, module + ".lora_A"), np.arange(R * in_))
        a = (np.float32(2) * u - np.float32(1)) * np.float32(1 / math.sqrt(in_))
        factors[module + ".lora_A"] = a.reshape(R, in_)
        factors[module + ".lora_B"] = np.zeros((out, R), dtype=np.float32)
    return factors


def torch_factors(factors, dtype):
    """Trainable tensors of that dtype."""
    return {name: torch.tensor(value, dtype=dtype, requires_grad=True)
            for name, value in factors.items()}


def adapted_weights(model, config, factors, scale):
    """Hugging Face parameter name -> W + scale * B A, for every adapted matrix."""
    frozen = dict(model.named_parameters())

    def product(module):
        return scale * factors[module + ".lora_B"] @ factors[module + ".lora_A"]

    weights = {}
    for module, _, _ in lora_modules(config):
        if ".ffn.experts." not in module:
            name = hf_name(module + ".weight")
            weights[name] = frozen[name] + product(module)
    for layer in range(config["num_hidden_layers"]):
        ours, theirs = f"layers.{layer}.ffn.experts.", f"model.layers.{layer}.mlp.experts."
        each = range(config["n_routed_experts"])
        w1, w2, w3 = (torch.stack([product(f"{ours}{e}.{leaf}") for e in each])
                      for leaf in ("w1", "w2", "w3"))
        gate_up, down = theirs + "gate_up_proj", theirs + "down_proj"
        weights[gate_up] = frozen[gate_up] + torch.cat([w1, w3], dim=1)
        weights[down] = frozen[down] + w2
    return weights


def forward(model, config, factors, scale, tokens):
    """Logits (T, V) of one document."""
    ids = torch.as_tensor(tokens).reshape(1, -1)
    weights = adapted_weights(model, config, factors, scale) if factors else {}
    return torch.func.functional_call(model, weights, (ids,), {"use_cache": False}).logits[0]
