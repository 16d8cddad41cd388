"""Does an adapter folder (Hugging Face names) mean to PEFT what it means to the trainer?

    python dev/ref/check_peft.py CHECKPOINT ADAPTER LOGITS.safetensors
    python dev/ref/check_peft.py --self-test DIR

CHECKPOINT is a released-layout folder, ADAPTER holds adapter_model.safetensors and
adapter_config.json, LOGITS holds `tokens` (T) int32 and `logits` (T, V) float32 as the trainer
computed them with this adapter. Prints how many keys match and the largest difference; exit 1 if a
key is missing or left over, or the difference is above 1e-4.

--self-test writes such a triple to DIR, made by PEFT (adapter) and dev/ref/model.py (logits), and
checks it; the folders stay, as an adapter that the trainer's reader can be tried on.
"""
import argparse
import os
import sys

import numpy as np
import peft
import torch

import model as ref

TOLERANCE = 1e-4
TARGET_MODULES = (r".*\.self_attn\.(q_a_proj|q_b_proj|kv_proj|o_b_proj)"
                  r"|.*\.mlp\.shared_experts\.(gate_proj|up_proj|down_proj)")
TARGET_PARAMETERS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


def base_model(checkpoint):
    config, values = ref.read_checkpoint(checkpoint)
    return config, ref.build_model(config, values, torch.float32)


def logits_of(model, tokens):
    with torch.no_grad():
        return model(torch.from_numpy(tokens.astype(np.int64))[None], use_cache=False).logits[0]


def check(checkpoint, adapter, logits_file):
    stored = ref.read_safetensors(logits_file)
    tokens, expected = stored["tokens"][1], torch.from_numpy(stored["logits"][1].copy())
    _, model = base_model(checkpoint)
    without = logits_of(model, tokens)
    model = peft.PeftModel.from_pretrained(model, adapter)

    in_file = set(ref.read_safetensors(os.path.join(adapter, "adapter_model.safetensors")))
    in_model = set(peft.get_peft_model_state_dict(model))
    missing, unexpected = sorted(in_model - in_file), sorted(in_file - in_model)
    print(f"keys      {len(in_file & in_model)} matched, {len(missing)} missing, "
          f"{len(unexpected)} unexpected")
    for kind, names in (("missing", missing), ("unexpected", unexpected)):
        for name in names[:5]:
            print(f"          {kind}: {name}")

    found = logits_of(model, tokens)
    difference = (found - expected).abs().max().item()
    print(f"adapter   moves the logits by at most {(found - without).abs().max().item():.3e}")
    print(f"logits    max abs difference {difference:.3e} (allowed {TOLERANCE:.0e}), "
          f"std {expected.std().item():.3f}")
    return not missing and not unexpected and difference <= TOLERANCE


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
        logits = ref.forward(model, config, trainable, alpha / R, tokens)
    logits_file = os.path.join(folder, "logits.safetensors")
    ref.write_safetensors(logits_file, [("tokens", "I32", tokens.astype(np.int32)),
                                        ("logits", "F32", logits.numpy())])

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
    return check(checkpoint, adapter, logits_file)


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paths", nargs="*", metavar="CHECKPOINT ADAPTER LOGITS")
    parser.add_argument("--self-test", metavar="DIR")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.self_test:
        good = self_test(options.self_test)
    elif len(options.paths) == 3:
        good = check(*options.paths)
    else:
        parser.error("three paths, or --self-test DIR")
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    main()
