"""Does an adapter folder (Hugging Face names) mean to PEFT what it means to the trainer?

    python dev/ref/check_peft.py CHECKPOINT ADAPTER TEXT.bin [--train build/train_float]
    python dev/ref/check_peft.py --self-test DIR

CHECKPOINT is a released-layout folder, ADAPTER holds adapter_model.safetensors and
adapter_config.json, TEXT.bin holds tokens, written by `build/prep CHECKPOINT TEXT.txt TEXT.bin`.
Prints how many keys match, and the mean loss of TEXT as PEFT and as `./train --cpu --eval` find it,
with the adapter and without; exit 1 if a key is missing or left over, the adapter changes nothing,
or the losses differ by more than 1e-5. PEFT computes in fp32 here: so must the trainer (`make
build/train_float`).

--self-test makes an adapter with PEFT, holds its logits against those of dev/ref/model.py, and
leaves the folders in DIR.
"""
import argparse
import json
import os
import subprocess
import sys
import tempfile

import numpy as np
import peft
import torch

import model as ref

ROOT = os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "..")
TOLERANCE = 1e-4                        # of a logit
LOSS_TOLERANCE = 1e-5
BIN_HEADER, BEGINS, LEARNT = 256, 1 << 30, 1 << 31
TARGET_MODULES = (r".*\.self_attn\.(q_a_proj|q_b_proj|kv_proj|o_b_proj)"
                  r"|.*\.mlp\.shared_experts\.(gate_proj|up_proj|down_proj)")
TARGET_PARAMETERS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


def base_model(checkpoint):
    config, values = ref.read_checkpoint(checkpoint)
    return config, ref.build_model(config, values, torch.float32)


def logits_of(model, tokens):
    with torch.no_grad():
        return model(torch.from_numpy(tokens.astype(np.int64))[None], use_cache=False).logits[0]


# -------------------------------------------------------------------------------------------------
# The loss of a text, by both

def read_rows(path, length):
    """Documents of a token file, cut into rows of at most `length` tokens: [(ids, learnt?)]."""
    raw = np.fromfile(path, np.uint32)
    words = raw[BIN_HEADER:]
    assert raw[0] == 20260424 and len(words) == int(raw[3]) + (int(raw[4]) << 31), "no token file"
    assert raw[5] == 0, "conversations are truncated where text is cut: take text"
    starts = [*np.flatnonzero(words & BEGINS), len(words)]
    rows = [words[at:min(at + length, end)]
            for begin, end in zip(starts, starts[1:]) for at in range(begin, end, length)]
    return [((row & (BEGINS - 1)).astype(np.int64), (row & LEARNT) != 0) for row in rows]


def loss_of(model, rows):
    """Mean of -log p over what is learnt. A row's first token is known, not predicted."""
    total, labels = 0.0, 0
    for ids, learnt in rows:
        logs = torch.log_softmax(logits_of(model, ids)[:-1].double(), -1)
        picked = logs[torch.arange(len(ids) - 1), torch.from_numpy(ids[1:])]
        total -= picked[torch.from_numpy(learnt[1:])].sum().item()
        labels += int(learnt[1:].sum())
    return total / labels


def train_loss(train, checkpoint, text, length, adapter):
    """What the trainer's log says: it has more digits than the line it prints."""
    with tempfile.TemporaryDirectory() as out:
        words = [train, "--cpu", "-m", checkpoint, "--eval", "-j", text, "-o", out]
        words += ["-t", str(length)]
        if adapter:
            with open(os.path.join(adapter, "adapter_config.json")) as file:
                config = json.load(file)
            words += ["--init-adapter", adapter, "--lora-r", str(config["r"]),
                      "--lora-alpha", str(config["lora_alpha"])]
        run = subprocess.run(words, capture_output=True, text=True)
        if run.returncode:
            sys.exit(f"{' '.join(words)}: exit code {run.returncode}\n{run.stderr or run.stdout}")
        with open(os.path.join(out, "validation.jsonl")) as file:
            return json.loads(file.read())["val_loss"]


def keys_match(model, adapter):
    in_file = set(ref.read_safetensors(os.path.join(adapter, "adapter_model.safetensors")))
    in_model = set(peft.get_peft_model_state_dict(model))
    missing, unexpected = sorted(in_model - in_file), sorted(in_file - in_model)
    print(f"keys      {len(in_file & in_model)} matched, {len(missing)} missing, "
          f"{len(unexpected)} unexpected")
    for kind, names in (("missing", missing), ("unexpected", unexpected)):
        for name in names[:5]:
            print(f"          {kind}: {name}")
    return not missing and not unexpected


def check(checkpoint, adapter, text, train, length):
    rows = read_rows(text, length)
    _, model = base_model(checkpoint)
    losses = [loss_of(model, rows)]
    model = peft.PeftModel.from_pretrained(model, adapter)
    good = keys_match(model, adapter)
    losses.append(loss_of(model, rows))
    for name, found, folder in zip(("without", "with"), losses, (None, adapter)):
        expected = train_loss(train, checkpoint, text, length, folder)
        print(f"loss      {name + ' it':<10} PEFT {found:.7f}, the trainer {expected:.7f}, "
              f"difference {abs(found - expected):.1e} (allowed {LOSS_TOLERANCE:.0e})")
        good &= abs(found - expected) <= LOSS_TOLERANCE
    return good and abs(losses[1] - losses[0]) > 100 * LOSS_TOLERANCE


# -------------------------------------------------------------------------------------------------
# The self-test: PEFT saves an adapter, we say what it must compute

def fused_factors(factors, prefix, leaves, experts):
    """Factors of one fused expert tensor in PEFT's layout. leaves is (w1, w3) or (w2,).

    A: all experts' rows, expert slowest; inside an expert w1's rows, then w3's. B: block-diagonal
    (w1's rows use the first ranks, w3's the others), column = rank * E + expert."""
    a, b = [], []
    for e in range(experts):
        names = [f"{prefix}.{e}.{leaf}" for leaf in leaves]
        a.append(np.concatenate([factors[name + ".lora_A"] for name in names]))
        blocks = [torch.from_numpy(factors[name + ".lora_B"]) for name in names]
        b.append(torch.block_diag(*blocks).numpy())             # (out, rank)
    b = np.stack(b, axis=-1)                                    # (out, rank, E)
    return np.concatenate(a), b.reshape(b.shape[0], -1)


def self_test(folder, R=2, alpha=4.0, seed=1):
    config = ref.CONFIGS["tiny"]
    checkpoint, adapter = os.path.join(folder, "checkpoint"), os.path.join(folder, "adapter")
    ref.write_checkpoint(checkpoint, config, seed, mtp=True)
    factors = ref.draw_test_factors(seed, config, R)
    tokens = ref.draw_tokens(seed, config, 200)

    # The answer, without PEFT: the same factors on the model as drawn.
    model = ref.build_model(config, ref.draw_model(seed, config), torch.float32)
    with torch.no_grad():
        trainable = ref.torch_factors(factors, torch.float32)
        expected = ref.forward(model, config, trainable, alpha / R, tokens)

    # The adapter: PEFT makes its own empty one, the factors are copied in, PEFT saves it.
    _, model = base_model(checkpoint)
    lora = peft.LoraConfig(
        task_type="CAUSAL_LM", r=R, lora_alpha=alpha, target_modules=TARGET_MODULES,
        target_parameters=TARGET_PARAMETERS, rank_pattern={"mlp.experts.gate_up_proj": 2 * R},
        alpha_pattern={"mlp.experts.gate_up_proj": 2 * alpha})
    model = peft.get_peft_model(model, lora)
    state = {}
    for module, _, _ in ref.lora_modules(config):
        if ".ffn.experts." not in module:
            path = "base_model.model." + ref.hf_name(module + ".weight").removesuffix(".weight")
            for factor in ("lora_A", "lora_B"):
                state[f"{path}.{factor}.weight"] = factors[f"{module}.{factor}"]
    for layer in range(config["num_hidden_layers"]):
        path = f"base_model.model.model.layers.{layer}.mlp.experts."
        for inner, leaves in (("base_layer.", ("w1", "w3")), ("", ("w2",))):
            a, b = fused_factors(factors, f"layers.{layer}.ffn.experts", leaves,
                                 config["n_routed_experts"])
            state[f"{path}{inner}lora_A.weight"] = a
            state[f"{path}{inner}lora_B.weight"] = b
    state = {name: torch.from_numpy(np.ascontiguousarray(value)) for name, value in state.items()}
    assert set(state) == set(peft.get_peft_model_state_dict(model)), "PEFT has other key names"
    peft.set_peft_model_state_dict(model, state)
    model.save_pretrained(adapter)
    _, model = base_model(checkpoint)
    without = logits_of(model, tokens)
    model = peft.PeftModel.from_pretrained(model, adapter)
    good = keys_match(model, adapter)
    found = logits_of(model, tokens)
    difference = (found - expected).abs().max().item()
    print(f"adapter   moves the logits by at most {(found - without).abs().max().item():.3e}")
    print(f"logits    max abs difference {difference:.3e} (allowed {TOLERANCE:.0e}), "
          f"std {expected.std().item():.3f}")
    return good and difference <= TOLERANCE


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paths", nargs="*", metavar="CHECKPOINT ADAPTER TEXT.bin")
    parser.add_argument("--train", default=os.path.join(ROOT, "build", "train_float"))
    parser.add_argument("--seq", type=int, default=256, help="tokens of a row")
    parser.add_argument("--self-test", metavar="DIR")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.self_test:
        good = self_test(options.self_test)
    elif len(options.paths) == 3:
        good = check(*options.paths, options.train, options.seq)
    else:
        parser.error("three paths, or --self-test DIR")
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    main()
