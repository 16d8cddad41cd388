"""Makes test/vectors/: what Hugging Face computes on the drawn T2 model, in fp64.

    python dev/ref/make_vectors.py                      all files and their README (about a minute)
    python dev/ref/make_vectors.py --only t2_top2_seed1 one file, README untouched
    python dev/ref/make_vectors.py --trace DIR          intermediates of t2_top2_seed1, to bisect

The files hold answers only. The questions (weights, LoRA factors, tokens) are drawn by the reader
with the generator of kernels.cu section 1.5; dev/ref/model.py states the rules.
"""
import argparse
import math
import os
import platform
import time

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import model as ref

VECTORS = os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "..", "test", "vectors")
TOKENS = 300
R, ALPHA = 2, 4.0                   # of the test factors; scale = ALPHA / R
PROJECTIONS = 16
# Rows of logits that are kept: document start, first entries (3, 7), window edge (31, 32), the
# first query with more visible entries than index_topk (67), HCA's entries (127, 255), the end.
POSITIONS = [0, 1, 2, 3, 4, 5, 7, 8, 31, 32, 33, 63,
             64, 67, 68, 100, 126, 127, 128, 129, 200, 255, 256, 299]
CASES = [(config, seed) for config in ("t2_top2", "t2_top6") for seed in (1, 2)]

# The training trace.
STEPS, WARMUP, LR, FINAL_FRACTION = 10, 3, 3e-3, 0.1
BETAS, EPS, WEIGHT_DECAY = (0.9, 0.95), 1e-8, 0.1
CLIP = 1.36                         # lies between the norms, so that it acts on some steps only
TRACE_SEED, TRACE_R, TRACE_ALPHA, DOCUMENTS = 3, 4, 8.0, (96, 61)


class NoFloat32(TorchDispatchMode):
    """Fails when an operation of the fp64 run makes a float32 tensor: nothing may be rounded."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                assert leaf.dtype not in (torch.float32, torch.bfloat16), func
        return out


# -------------------------------------------------------------------------------------------------
# What the model selected, and how close the decisions were

class Selections:
    """Hooks that keep, per layer: chosen experts, router scores; chosen entries, index scores;
    and the inputs of every clamp."""

    def __init__(self, model):
        self.experts, self.router, self.entries, self.index, self.products = {}, {}, {}, {}, {}
        self.gates, self.ups = [], []
        for layer, block in enumerate(model.model.layers):
            block.mlp.gate.register_forward_hook(self.keep_experts(layer))
            block.mlp.experts._apply_gate = self.keep_clamped(block.mlp.experts._apply_gate)
            shared = block.mlp.shared_experts
            for linear, kept in ((shared.gate_proj, self.gates), (shared.up_proj, self.ups)):
                linear.register_forward_hook(self.keep_shared(kept))
            if hasattr(block.self_attn.compressor, "indexer"):
                indexer = block.self_attn.compressor.indexer
                indexer.register_forward_hook(self.keep_entries(layer))
                indexer.scorer.register_forward_hook(self.keep_index(layer))

    def keep_experts(self, layer):
        def hook(gate, _, output):
            logits, _, chosen = output
            self.experts[layer] = chosen.sort(dim=-1).values.detach()
            if hasattr(gate, "e_score_correction_bias"):
                self.router[layer] = (gate.score_fn(logits) + gate.e_score_correction_bias).detach()
        return hook

    def keep_clamped(self, apply_gate):
        def wrapped(gate_up):
            gate, up = gate_up.detach().chunk(2, dim=-1)
            self.gates.append(gate)
            self.ups.append(up)
            return apply_gate(gate_up)
        return wrapped

    def keep_shared(self, kept):
        def hook(_, __, output):
            kept.append(output[0].detach())
        return hook

    def keep_entries(self, layer):
        def hook(_, __, chosen):        # -1 marks a pick that is not visible: it is sorted last
            last = torch.iinfo(torch.long).max
            chosen = torch.where(chosen[0] < 0, last, chosen[0]).sort(dim=-1).values
            self.entries[layer] = torch.where(chosen == last, -1, chosen)
        return hook

    def keep_index(self, layer):
        def hook(_, inputs, scores):
            q, keys, _ = inputs
            self.index[layer] = scores[0].detach()
            self.products[layer] = torch.einsum("thd,pd->thp", q[0], keys[0]).detach()
        return hook


def expert_margins(exact, rough):
    """The closest call of the score-routed layers: (gap, fp32 error), where gap is the distance of
    the last chosen from the first rejected score of one token, and error the largest difference
    of that token's scores between fp32 and fp64. A flip needs gap <= 2 * error."""
    calls = []
    for layer, scores in exact.router.items():
        K = exact.experts[layer].shape[1]
        ordered = scores.sort(dim=-1, descending=True).values
        errors = (scores - rough.router[layer].double()).abs().amax(dim=-1)
        calls += zip((ordered[:, K - 1] - ordered[:, K]).tolist(), errors.tolist())
    return closest(calls, 4)


def entry_margins(exact, rough, ratio=4):
    """The same for entries, over the queries that had to choose, and the number of ties.

    A boundary may run through scores that are all exactly zero (every head's product negative).
    The smaller entry then wins; what matters is how far those products are from turning positive:
    their distance from zero is the gap, and their own fp32 error the error."""
    calls, ties = [], 0
    for layer, scores in exact.index.items():
        topk = exact.entries[layer].shape[1]
        for t in range(scores.shape[0]):
            visible = (t + 1) // ratio
            if visible <= topk:
                continue                            # everything visible is chosen
            here, there = scores[t, :visible], rough.index[layer][t, :visible].double()
            ordered = here.sort(descending=True).values
            if ordered[topk - 1] == 0 and ordered[topk] == 0:
                ties += 1
                here = exact.products[layer][t, :, :visible][:, here == 0]
                there = rough.products[layer][t, :, :visible][:, there == 0].double()
                gap = -here.max().item()
            else:
                gap = (ordered[topk - 1] - ordered[topk]).item()
            calls.append((gap, (here - there).abs().max().item()))
    return *closest(calls, 4), ties


def clamp_margins(exact, rough, limit):
    """The same for the SwiGLU clamps: distance of an input from the limit, and the largest fp32
    error in its row. Also returns the share of gate and of up inputs that are clamped."""
    calls, clamped, total = [], [0, 0], 0
    for which, (here, there) in enumerate(((exact.gates, rough.gates), (exact.ups, rough.ups))):
        for x, y in zip(here, there):
            size = x if which == 0 else x.abs()     # the gate has no lower limit
            distances = (size - limit).abs().amin(dim=-1)
            errors = (x - y.double()).abs().amax(dim=-1)
            calls += zip(distances.tolist(), errors.tolist())
            clamped[which] += (size > limit).sum().item()
            total += x.numel()
    return *closest(calls, 2), 2 * clamped[0] / total, 2 * clamped[1] / total


def closest(calls, room):
    """Of (gap, error) pairs the one with the smallest quotient, which must be larger than room."""
    gap, error = min(calls, key=lambda call: call[0] / max(call[1], 1e-30))
    assert gap > room * error, f"too close: gap {gap}, fp32 error {error}; change seed or limit"
    return gap, error


# -------------------------------------------------------------------------------------------------
# One vector file

def project(gradient):
    """[norm, 16 sums with random signs]: a tensor of any size in 17 numbers."""
    g = gradient.detach().double().numpy().reshape(-1)
    row = [math.sqrt((g * g).sum())]
    for j in range(PROJECTIONS):
        odd = ref.random_bits(ref.random_key(j, "projection"), np.arange(g.size)) & np.uint64(1)
        row.append(np.where(odd == 1, g, -g).sum())
    return row


def run(config, values, seed, dtype):
    """Loss, logits, selections and gradients of one document of 300 tokens."""
    model = ref.build_model(config, values, dtype)
    selections = Selections(model)
    tokens = torch.from_numpy(ref.draw_tokens(seed, config, TOKENS))
    factors = ref.torch_factors(ref.draw_test_factors(seed, config, R), dtype)
    if dtype == torch.float64:
        with NoFloat32():
            logits = ref.forward(model, config, factors, ALPHA / R, tokens)
    else:
        logits = ref.forward(model, config, factors, ALPHA / R, tokens)
    loss = F.cross_entropy(logits[:-1], tokens[1:])
    gradients = torch.autograd.grad(loss, list(factors.values()))
    rows = np.array([project(g) for g in gradients])
    return loss.item(), logits.detach().double(), selections, rows


def make_case(name, seed):
    """Writes one file; returns what the README says about it."""
    config = ref.CONFIGS[name]
    values = ref.draw_model(seed, config)
    loss, logits, exact, gradients = run(config, values, seed, torch.float64)
    loss32, logits32, rough, gradients32 = run(config, values, seed, torch.float32)

    # Both precisions must have made the same choices, and no choice may have been a close call.
    for layer in exact.experts:
        assert torch.equal(exact.experts[layer], rough.experts[layer]), f"experts of layer {layer}"
    for layer in exact.entries:
        assert torch.equal(exact.entries[layer], rough.entries[layer]), f"entries of layer {layer}"
    expert_gap, expert_error = expert_margins(exact, rough)
    entry_gap, entry_error, ties = entry_margins(exact, rough)
    clamp_gap, clamp_error, gates, ups = clamp_margins(exact, rough, config["swiglu_limit"])

    norms = gradients[:, :1]
    gradient_error = np.abs(gradients32 - gradients).max(axis=1) / norms[:, 0]
    difference = logits[POSITIONS] - logits32[POSITIONS]
    logits_error = [difference.abs().max().item(), difference.square().mean().sqrt().item()]

    def per_layer(chosen):
        return torch.stack([chosen[layer] for layer in sorted(chosen)]).numpy().astype(np.int32)

    tensors = {
        "loss": np.float32([loss]),
        "positions": np.int32(POSITIONS),
        "logits": logits[POSITIONS].numpy().astype(np.float32),
        "logits_error": np.float32(logits_error),
        "experts": per_layer(exact.experts),
        "entries": per_layer(exact.entries),
        "gradients": gradients.astype(np.float32),
        "gradients_error": gradient_error.astype(np.float32),
    }
    size = write(f"{name}_seed{seed}", tensors)
    return {"file": f"{name}_seed{seed}", "size": size,
            "loss": loss, "loss error": abs(loss32 - loss),
            "logits max": logits_error[0], "logits rms": logits_error[1],
            "gradients": float(gradient_error.max()),
            "gradients median": float(np.median(gradient_error)),
            "expert gap": expert_gap, "expert error": expert_error,
            "entry gap": entry_gap, "entry error": entry_error, "ties": ties,
            "clamp gap": clamp_gap, "clamp error": clamp_error, "gates": gates, "ups": ups}


def write(name, tensors):
    kinds = {np.dtype(np.float32): "F32", np.dtype(np.int32): "I32"}
    path = os.path.join(VECTORS, name + ".safetensors")
    ref.write_safetensors(path, [(key, kinds[a.dtype], a) for key, a in tensors.items()])
    size = os.path.getsize(path)
    assert size < 150_000, f"{path}: {size} bytes"
    return size


def checksum(array):
    """Sum over all bytes of (byte + 1) * random_bits(0, position), modulo 2^64."""
    data = np.frombuffer(np.ascontiguousarray(array).tobytes(), dtype=np.uint8).astype(np.uint64)
    return ((data + np.uint64(1)) * ref.random_bits(np.uint64(0), np.arange(data.size))).sum()


def make_draws():
    """A checksum of every tensor as the checkpoint stores it: are both sides drawing the same?"""
    config, seed = ref.CONFIGS["t2_top2"], 1
    files = [f for row in ref.tensor_table(config) for f in ref.draw_tensor(seed, config, row)[1]]
    sums = np.array([checksum(array) for _, _, array in sorted(files, key=lambda f: f[0])])
    words = sums.astype("<u8").view("<i4").reshape(-1, 2)       # low word, high word
    return write("t2_draws", {"checksums": words.astype(np.int32)})


# -------------------------------------------------------------------------------------------------
# The training trace: ten optimizer steps

def learning_rate(step):
    """design.md section 7: linear warm-up, then a cosine down to a fraction. step counts from 0."""
    if step < WARMUP:
        return LR * (step + 1) / WARMUP
    turn = math.cos(math.pi * (step - WARMUP) / (STEPS - WARMUP))
    return LR * (FINAL_FRACTION + (1 - FINAL_FRACTION) / 2 * (1 + turn))


def trace_document(config, step, document):
    """(tokens, labels) of one document: labels[t] is the id after t, or -100 where it is masked."""
    i = step * 1000 + document * 500 + np.arange(DOCUMENTS[document])
    bits = ref.random_bits(ref.random_key(TRACE_SEED, "trace"), i)
    tokens = torch.from_numpy((bits % np.uint64(config["vocab_size"])).astype(np.int64))
    masked = ref.random_bits(ref.random_key(TRACE_SEED, "mask"), i) % np.uint64(4) == 0
    labels = torch.where(torch.from_numpy(masked), -100, tokens)[1:]
    return tokens, labels


def train(config, values, dtype):
    """Losses (before each update) and gradient norms (before clipping) of the ten steps."""
    model = ref.build_model(config, values, dtype)
    factors = ref.torch_factors(ref.draw_initial_factors(TRACE_SEED, config, TRACE_R), dtype)
    optimizer = torch.optim.AdamW(factors.values(), lr=LR, betas=BETAS, eps=EPS,
                                  weight_decay=WEIGHT_DECAY)
    losses, norms = [], []
    for step in range(STEPS):
        documents = [trace_document(config, step, d) for d in range(len(DOCUMENTS))]
        count = sum((labels >= 0).sum().item() for _, labels in documents)
        optimizer.zero_grad(set_to_none=False)
        total = 0.0
        for tokens, labels in documents:            # one document per call, gradients add up
            logits = ref.forward(model, config, factors, TRACE_ALPHA / TRACE_R, tokens)
            loss = F.cross_entropy(logits[:-1], labels, ignore_index=-100, reduction="sum") / count
            loss.backward()
            total += loss.item()
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step)
        norms.append(torch.nn.utils.clip_grad_norm_(factors.values(), CLIP).item())
        optimizer.step()
        losses.append(total)
    return losses, norms


def make_trace():
    config = ref.CONFIGS["t2_top2"]
    values = ref.draw_model(TRACE_SEED, config)
    losses, norms = train(config, values, torch.float64)
    losses32, norms32 = train(config, values, torch.float32)
    clipped = sum(norm > CLIP for norm in norms)
    assert 3 <= clipped <= STEPS - 3, f"clip {CLIP} acts on {clipped} of {STEPS} steps: {norms}"
    size = write("t2_trace", {
        "losses": np.float32(losses), "norms": np.float32(norms),
        "losses_fp32": np.float32(losses32), "norms_fp32": np.float32(norms32),
        "lr": np.float32([LR]), "clip": np.float32([CLIP]),
        "lr_schedule": np.float32([learning_rate(s) for s in range(STEPS)]),
    })
    return {"size": size, "losses": losses, "norms": norms, "clipped": clipped,
            "loss error": max(abs(a - b) for a, b in zip(losses, losses32)),
            "norm error": max(abs(a - b) for a, b in zip(norms, norms32))}


# -------------------------------------------------------------------------------------------------
# Intermediates, to bisect (deepseek-v4-flash.md section 3.11). Not stored in the tree.

def dump_intermediates(folder):
    """DIR/t2_top2_seed1_intermediates.safetensors: every step of the forward, computed in fp64 and
    stored in float32, and "d." + name: the gradient of the mean loss with respect to it."""
    config, seed = ref.CONFIGS["t2_top2"], 1
    model = ref.build_model(config, ref.draw_model(seed, config), torch.float64)
    modeling = ref.load_modeling(torch.float64)
    kept = {}

    def keep(name, value):
        kept[name] = value

    def on_output(module, name, pick=lambda output: output):
        module.register_forward_hook(lambda _, __, output: keep(name, pick(output)))

    def on_input(module, name):
        module.register_forward_pre_hook(lambda _, args: keep(name, args[0]))

    def on_mixing(module, prefix):
        def hook(hc, args, output):
            keep(prefix + "X", args[0])
            m = hc.input_norm(args[0].flatten(2)) @ hc.fn.T
            keep(prefix + "m", m.detach())
            pre = torch.sigmoid(m[..., :4] * hc.scale[0] + hc.base[:4]) + hc.hc_eps
            keep(prefix + "pre", pre.detach())
            for name, value in zip(("post", "C", "u"), output):
                keep(prefix + name, value)
        module.register_forward_hook(hook)

    for layer, block in enumerate(model.model.layers):
        site, attn = f"layers.{layer}.attn.", block.self_attn
        on_mixing(block.attn_hc, site)
        on_output(block.input_layernorm, site + "x")
        on_output(attn.q_a_norm, site + "cq")
        on_output(attn.q_b_norm, site + "q_normed")         # (1, H, T, D), before RoPE
        on_output(attn.kv_norm, site + "kv_normed")
        if attn.compressor is not None:
            on_input(attn.compressor.kv_norm, site + "pooled")
            on_output(attn.compressor, site + "entries", lambda output: output[0])
            if hasattr(attn.compressor, "indexer"):
                on_output(attn.compressor.indexer, site + "selected")
                on_output(attn.compressor.indexer.scorer, site + "index_scores")    # unmasked
        on_input(attn.o_a_proj, site + "o")                 # after the inverse rotation
        on_output(attn.o_a_proj, site + "v")
        on_output(attn.o_b_proj, site + "a")
        site = f"layers.{layer}.ffn."
        on_mixing(block.ffn_hc, site)
        on_output(block.post_attention_layernorm, site + "x")
        for i, name in enumerate(("gate_logits", "weights", "experts")):
            on_output(block.mlp.gate, site + name, lambda output, i=i: output[i])
        on_output(block.mlp.shared_experts, site + "shared")
        on_output(block.mlp, site + "f")
        on_output(block, f"layers.{layer}.X_out")
    on_output(model.model.embed_tokens, "embedding")
    on_output(model.model.hc_head, "z")
    on_output(model.model.norm, "h")
    on_output(model.lm_head, "logits")
    attention = modeling.eager_attention_forward

    def recording_attention(module, query, key, *args, **kwargs):
        output, weights = attention(module, query, key, *args, **kwargs)
        site = f"layers.{module.layer_idx}.attn."
        keep(site + "q", query)                             # (1, H, T, D), after RoPE
        keep(site + "kv", key)                              # (1, 1, T + entries, D), after RoPE
        keep(site + "o_rotated", output)                    # (1, T, H, D), before derotation
        return output, weights

    modeling.eager_attention_forward = recording_attention
    tokens = torch.from_numpy(ref.draw_tokens(seed, config, TOKENS))
    factors = ref.torch_factors(ref.draw_test_factors(seed, config, R), torch.float64)
    logits = ref.forward(model, config, factors, ALPHA / R, tokens)
    modeling.eager_attention_forward = attention
    inner = [name for name, value in kept.items() if value.requires_grad]
    wanted = [kept[name] for name in inner] + list(factors.values())
    loss = F.cross_entropy(logits[:-1], tokens[1:])
    gradients = torch.autograd.grad(loss, wanted, allow_unused=True)
    for name, gradient in zip(inner + list(factors), gradients):
        if gradient is not None:
            kept["d." + name] = gradient
    kept["tokens"] = tokens
    tensors = []
    for name, value in sorted(kept.items()):
        value = value.detach()
        if value.dim() > 2 and value.shape[0] == 1:             # the batch of one
            value = value[0]
        whole = not value.is_floating_point()
        array = value.contiguous().numpy().astype(np.int32 if whole else np.float32)
        tensors.append((name, "I32" if whole else "F32", array))
    os.makedirs(folder, exist_ok=True)
    path = os.path.join(folder, "t2_top2_seed1_intermediates.safetensors")
    ref.write_safetensors(path, tensors)
    print(f"{path}: {len(tensors)} tensors, {os.path.getsize(path) / 1e6:.1f} MB")


# -------------------------------------------------------------------------------------------------
# README and main

def versions():
    import peft
    import transformers
    return (f"python {platform.python_version()}, torch {torch.__version__}, "
            f"transformers {transformers.__version__}, peft {peft.__version__}, "
            f"numpy {np.__version__}")


# Columns of the README's table: title, and what stands there for one case.
COLUMNS = (
    ("file", "{file}"),
    ("bytes", "{size}"),
    ("loss", "{loss:.6f}"),
    ("logits: max, rms", "{logits max:.1e}, {logits rms:.1e}"),
    ("gradients: worst, median", "{gradients:.1e}, {gradients median:.1e}"),
    ("router: gap / error", "{expert gap:.1e} / {expert error:.1e}"),
    ("indexer: gap / error", "{entry gap:.1e} / {entry error:.1e}"),
    ("ties", "{ties}"),
    ("clamps: gap / error", "{clamp gap:.1e} / {clamp error:.1e}"),
    ("clamped g, v", "{gates:.1%}, {ups:.1%}"),
)


def write_readme(cases, trace):
    """test/vectors/README.md: the text of vectors_readme.md with this run's numbers."""
    here = os.path.dirname(os.path.abspath(__file__))
    with open(os.path.join(here, "vectors_readme.md")) as file:
        text = file.read()
    rows = [[title for title, _ in COLUMNS], ["---"] * len(COLUMNS)]
    rows += [[form.format(**case) for _, form in COLUMNS] for case in cases]
    table = "\n".join("| " + " | ".join(row) + " |" for row in rows)
    summary = (f"{trace['size']} bytes; clipped on {trace['clipped']} of {STEPS} steps. "
               f"The fp32 run differs from the fp64 run by at most {trace['loss error']:.1e} "
               f"(losses) and {trace['norm error']:.1e} (norms)")
    for mark, value in (("@VERSIONS@", versions()), ("@TABLE@", table), ("@TRACE@", summary)):
        assert mark in text
        text = text.replace(mark, value)
    with open(os.path.join(VECTORS, "README.md"), "w") as file:
        file.write(text)


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", metavar="NAME",
                        help="one file (t2_top2_seed1, ..., t2_trace, t2_draws), README untouched")
    parser.add_argument("--trace", metavar="DIR",
                        help="write the intermediates of t2_top2_seed1 there, nothing else")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    names = [f"{name}_seed{seed}" for name, seed in CASES] + ["t2_trace", "t2_draws"]
    if options.only not in [None] + names:
        parser.error(f"--only takes one of {', '.join(names)}")
    torch.set_num_threads(options.threads)
    if options.trace:
        dump_intermediates(options.trace)
        return
    begin = time.time()
    os.makedirs(VECTORS, exist_ok=True)
    cases, trace = [], None
    for name, seed in CASES:
        if options.only in (None, f"{name}_seed{seed}"):
            ref.write_config(os.path.join(VECTORS, name + ".json"), ref.CONFIGS[name])
            cases.append(make_case(name, seed))
            print(f"{time.time() - begin:5.1f} s", cases[-1], flush=True)
    if options.only in (None, "t2_draws"):
        make_draws()
    if options.only in (None, "t2_trace"):
        trace = make_trace()
        print(f"{time.time() - begin:5.1f} s", trace, flush=True)
    if options.only is None:
        write_readme(cases, trace)


if __name__ == "__main__":
    main()
