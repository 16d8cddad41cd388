"""Trains the built-in model: dev/data/tiny/, a DeepSeek-V4 of 5 layers that has read English.

    python dev/ref/make_tiny.py dev/data/tiny [--steps 1400] [--threads 1]

The model is transformers' own class in fp32, its tokens are bytes. It learns from prose that
packages leave on a Debian system: documentation, docstrings, licences. Only prose is kept, so that
source code, which ./train then adapts it to, is far from anything it has seen.

What a checkpoint of this family cannot represent is not learnt: in the second half of the training
every matrix is rounded to its format in the forward pass (fp4 experts, fp8 matrices, bf16 norms),
and the gradient goes to the number that was rounded. So the files hold what was trained, exactly.

The router's bias follows the load of the experts, as in the pre-training of the real model: an
expert with fewer tokens than the mean becomes easier to pick. The indexer and the hash tables have
no gradient and stay as they were drawn.
"""
import argparse
import glob
import gzip
import hashlib
import html
import json
import os
import re
import time

import numpy as np
import torch
import torch.nn.functional as F

import model as ref

CONFIG = ref.CONFIGS["tiny"]
BOS, EOS, SEED = 256, 257, 1
BATCH, T = 4, 256
LR, WARMUP, BIAS_SPEED = 6e-3, 50, 0.01


# -------------------------------------------------------------------------------------------------
# The text

def read(path):
    opener = gzip.open if path.endswith(".gz") else open
    with opener(path, "rb") as file:
        return file.read().decode("utf-8", errors="replace")


def from_html(text):
    """The paragraphs of a page, without its code."""
    for paragraph in re.findall(r"<p>(.*?)</p>", text, re.DOTALL):
        yield html.unescape(re.sub(r"<[^>]*>", "", paragraph))


def from_pod(text):
    """The paragraphs of Perl's documentation; indented ones are code."""
    for pod in re.findall(r"^=(?:pod|head\d|over|item|begin)\b.*?(?:^=cut|\Z)", text, re.M | re.S):
        for paragraph in re.split(r"\n\s*\n", pod):
            if not paragraph.startswith(("=", " ", "\t")):
                for _ in range(3):              # codes nest: B<C<x>>
                    paragraph = re.sub(r"[A-Z]<+\s*([^<>|]*)(?:\|[^<>]*)?\s*>+", r"\1", paragraph)
                yield paragraph


def from_text(text):
    yield from re.split(r"\n\s*\n", text)


def from_python(text):
    for string in re.findall(r'"""(.*?)"""', text, re.DOTALL):
        yield from from_text(string)


SOURCES = (                     # package, files, how to read them
    ("nodejs-doc", "/usr/share/doc/nodejs/api/*.html", from_html),
    ("perl-modules", "/usr/share/perl/5*/**/*.pm", from_pod),
    ("perl-modules", "/usr/share/perl/5*/**/*.pod", from_pod),
    ("libpython3-stdlib", "/usr/lib/python3.*/**/*.py", from_python),
    ("base-files", "/usr/share/common-licenses/*", from_text),
)


def is_prose(text):
    plain = sum(c.isalpha() or c in " .,'" for c in text)
    return (len(text) >= 120 and text.isascii() and plain >= 0.97 * len(text)
            and text[0].isupper() and text[-1] == "." and text.count(" ") * 9 > len(text))


def collect():
    """All paragraphs, each once, in the order of the file names; and the bytes per package."""
    paragraphs, sizes = {}, {}
    for package, pattern, paragraphs_of in SOURCES:
        for path in sorted(glob.glob(pattern, recursive=True)):
            if not os.path.isfile(path) or path.endswith("/all.html"):
                continue
            for text in paragraphs_of(read(path)):
                text = " ".join(text.split())
                if text and is_prose(text) and text not in paragraphs:
                    paragraphs[text] = package
                    sizes[package] = sizes.get(package, 0) + len(text)
    return list(paragraphs), sizes


class Text:
    """Paragraphs one after the other in random order: BOS, text, EOS, and so on."""

    def __init__(self, paragraphs):
        stream, self.starts, at = [], [], 0
        for text in paragraphs:
            piece = [BOS, *text.encode(), EOS]
            self.starts.append(at)
            at += len(piece)
            stream += piece
        self.stream = np.array(stream)
        self.starts = [s for s in self.starts if s + T < at]

    def rows(self, random, count):
        """Half of the rows begin with a paragraph, half anywhere: (count, T + 1)."""
        some = random.choice(self.starts, count)
        some[::2] = random.integers(0, len(self.stream) - T - 1, len(some[::2]))
        return torch.from_numpy(np.stack([self.stream[s:s + T + 1] for s in some]))


# -------------------------------------------------------------------------------------------------
# Number formats

def power_of_two(largest, format_largest):
    """The exponent of the smallest scale with which nothing is clamped, as an e8m0 byte."""
    exponent = np.ceil(np.log2(np.maximum(largest, 1e-30) / format_largest))
    return np.clip(exponent + 127, 1, 254).astype(np.uint8)


def quantise(dtype, value):
    """float32 array -> [(suffix, file dtype, array)] as the checkpoint stores it."""
    if dtype == "BF16":
        return [(".weight", "BF16", ref.bf16_from_float(value))]
    if dtype == "F8_E4M3":
        out, in_ = value.shape
        blocks = np.abs(value).reshape(out // 128, 128, in_ // 128, 128).max(axis=(1, 3))
        scale = power_of_two(blocks, 448)
        wide = np.repeat(np.repeat(scale, 128, axis=0), 128, axis=1)
        codes = ref.e4m3_from_float(value / ref.float_from_e8m0(wide))
        return [(".weight", "F8_E4M3", codes), (".scale", "F8_E8M0", scale)]
    assert dtype == "FP4"
    out, in_ = value.shape
    scale = power_of_two(np.abs(value).reshape(out, in_ // 32, 32).max(axis=2), 6)
    codes = ref.e2m1_from_float(value / ref.float_from_e8m0(np.repeat(scale, 32, axis=1)))
    return [(".weight", "I8", codes[:, 0::2] | codes[:, 1::2] << 4), (".scale", "F8_E8M0", scale)]


# The same roundings on tensors of any leading shape, for the forward pass.
def scaled(largest, format_largest):
    return torch.exp2(torch.ceil(torch.log2(largest.clamp(min=1e-30) / format_largest)))


def round_fp4(w):
    x = w.reshape(*w.shape[:-1], -1, 32)
    scale = scaled(x.abs().amax(-1, keepdim=True), 6)
    size = (x / scale).abs()
    step = torch.where(size < 2, 0.5, torch.where(size < 4, 1.0, 2.0))
    return (torch.round(size / step) * step * x.sign() * scale).reshape(w.shape)


def round_fp8(w):
    out, in_ = w.shape
    x = w.reshape(out // 128, 128, in_ // 128, 128)
    scale = scaled(x.abs().amax((1, 3), keepdim=True), 448)
    return ((x / scale).to(torch.float8_e4m3fn).float() * scale).reshape(w.shape)


def round_bf16(w):
    return w.bfloat16().float()


ROUND = {"FP4": round_fp4, "F8_E4M3": round_fp8, "BF16": round_bf16}


def formats():
    """Hugging Face parameter name -> format."""
    kinds = {}
    for name, dtype, *_ in ref.tensor_table(CONFIG):
        if ".ffn.experts." in name:
            prefix = f"model.layers.{name.split('.')[1]}.mlp.experts."
            kinds[prefix + "gate_up_proj"] = kinds[prefix + "down_proj"] = "FP4"
        elif dtype in ROUND:
            kinds[ref.hf_name(name)] = dtype
    return kinds


# -------------------------------------------------------------------------------------------------
# Training

def first_values():
    """Drawn like the test model, but calm: norms and streams begin at their neutral values."""
    values = ref.draw_model(SEED, CONFIG)
    for name, value in values.items():
        if "norm" in name:
            value[:] = 1
        elif name.endswith(("_base", "attn_sink", "gate.bias", ".ape")):
            value[:] = 0
        elif name.endswith("_scale"):
            value[:] = 0.3
        elif name.endswith(("wo_b.weight", "w2.weight")):
            value *= 0.5
        elif name == "embed.weight":
            value *= 0.5
        elif name == "head.weight":
            value *= 0.3
    return values


class Trainer:
    def __init__(self, values):
        self.model = ref.build_model(CONFIG, values, torch.float32)
        self.kinds = formats()
        self.weights = {}
        for name, parameter in self.model.named_parameters():
            if ".indexer." not in name:
                parameter.requires_grad_(True)
                self.weights[name] = parameter
        self.gates = [(layer.mlp.gate) for layer in self.model.model.layers
                      if hasattr(layer.mlp.gate, "e_score_correction_bias")]
        self.loads = {}
        for gate in self.gates:
            gate.register_forward_hook(self.count)
        matrices = [p for n, p in self.weights.items() if p.dim() >= 2]
        rest = [p for n, p in self.weights.items() if p.dim() < 2]
        self.optimizer = torch.optim.AdamW([{"params": matrices, "weight_decay": 0.02},
                                            {"params": rest, "weight_decay": 0.0}],
                                           lr=LR, betas=(0.9, 0.98))

    def count(self, gate, _, output):
        self.loads[gate] = torch.bincount(output[2].reshape(-1),
                                          minlength=CONFIG["n_routed_experts"]).float()

    def balance(self, speed):
        with torch.no_grad():
            for gate, load in self.loads.items():
                gate.e_score_correction_bias += speed * torch.sign(load.mean() - load)

    def rounded(self):
        """Every parameter as the checkpoint will hold it; gradients pass straight through."""
        return {name: w + (ROUND[self.kinds[name]](w.detach()) - w.detach())
                for name, w in self.model.named_parameters() if name in self.kinds}

    def loss(self, rows, rounded):
        weights = self.rounded() if rounded else {}
        logits = torch.func.functional_call(self.model, weights, (rows[:, :-1],),
                                            {"use_cache": False}).logits
        return F.cross_entropy(logits.reshape(-1, logits.shape[-1]), rows[:, 1:].reshape(-1))

    def validate(self, text, rounded, rows=32):
        random = np.random.default_rng(7)
        with torch.no_grad():
            losses = [self.loss(text.rows(random, 16), rounded).item() for _ in range(rows // 16)]
        return sum(losses) / len(losses)

    def train(self, text, held_out, steps):
        random, began, told = np.random.default_rng(SEED), time.time(), 0
        for step in range(steps):
            rounded = step > steps // 2
            rate = LR * min(1, (step + 1) / WARMUP) * (1 - 0.98 * step / steps)
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            loss = self.loss(text.rows(random, BATCH), rounded)
            self.optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.weights.values(), 1.0)
            self.optimizer.step()
            self.balance(BIAS_SPEED * (1 - step / steps))
            if time.time() - told > 30:
                told = time.time()
                load = torch.stack(list(self.loads.values())).amax(1) / (BATCH * T * 2 / 8)
                print(f"{told - began:6.0f} s  step {step:5d}  loss {loss.item():.4f}  held out "
                      f"{self.validate(held_out, rounded):.4f}  fullest expert "
                      f"{load.max():.2f}", flush=True)


# -------------------------------------------------------------------------------------------------
# Files

def write(folder, state):
    """The released layout, in one shard. Returns the bytes."""
    files = []
    for name, dtype, shape, _, _ in ref.tensor_table(CONFIG):
        stem = name.removesuffix(".weight")
        if ".ffn.experts." in name:
            layer, expert, leaf = re.search(r"layers\.(\d+).*experts\.(\d+)\.(w\d)", name).groups()
            prefix = f"model.layers.{layer}.mlp.experts."
            fused = state[prefix + ("down_proj" if leaf == "w2" else "gate_up_proj")][int(expert)]
            half = fused.shape[0] // 2
            value = fused if leaf == "w2" else fused[:half] if leaf == "w1" else fused[half:]
        else:
            value = state[ref.hf_name(name)]
        value = np.ascontiguousarray(value.detach().numpy())
        assert value.shape == shape, name
        if dtype in ROUND:
            files += [(stem + suffix if name != stem else name, kind, array)
                      for suffix, kind, array in quantise(dtype, value)]
        else:
            files.append((name, dtype, value))
    os.makedirs(folder, exist_ok=True)
    shard = "model-00001-of-00001.safetensors"
    total = ref.write_safetensors(os.path.join(folder, shard), files, {"format": "pt"})
    index = {"metadata": {"total_size": total},
             "weight_map": {name: shard for name in sorted(name for name, _, _ in files)}}
    with open(os.path.join(folder, "model.safetensors.index.json"), "w") as file:
        file.write(json.dumps(index, indent=0) + "\n")
    ref.write_config(os.path.join(folder, "config.json"), CONFIG)
    return total


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("outdir")
    parser.add_argument("--steps", type=int, default=1400)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(SEED)
    paragraphs, sizes = collect()
    order = np.random.default_rng(SEED).permutation(len(paragraphs))
    paragraphs = [paragraphs[i] for i in order]
    print(len(paragraphs), "paragraphs,", sizes, flush=True)
    cut = len(paragraphs) * 49 // 50
    text, held_out = Text(paragraphs[:cut]), Text(paragraphs[cut:])
    trainer = Trainer(first_values())
    trainer.train(text, held_out, options.steps)
    plain, rounded = (trainer.validate(held_out, r, rows=256) for r in (False, True))
    total = write(options.outdir, trainer.model.state_dict())
    print(f"steps {options.steps}, held out {rounded:.4f} (not rounded {plain:.4f}), {total} bytes")


if __name__ == "__main__":
    main()
