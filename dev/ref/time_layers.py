"""How long does one layer of the full width take, here and in Hugging Face transformers?

    python dev/ref/time_layers.py WORKDIR [--tokens 4096] [--targets attn] [--steps 5]

For each kind of layer (window, CSA, HCA), with all 256 experts on one GPU: a step of ./train on a
model of that one layer, and forward, recompute and backward of transformers' own layer in bf16 with
PEFT's LoRA of rank 8 under gradient checkpointing. Both in this one run, on the same card. Of
./train's step everything counts but the head, the update and the host. WORKDIR gets three
config.json files. PEFT adapts the four attention matrices only (its wrapper for fused experts
holds every expert's adapted weight); --targets is what ./train adapts.
"""
import argparse
import json
import os
import re
import statistics
import subprocess

import peft
import torch
from torch.utils.checkpoint import checkpoint
from transformers.models.deepseek_v4 import modeling_deepseek_v4 as modeling

KINDS = {"window": 0, "CSA": 4, "HCA": 128}
CONFIG = {
    "model_type": "deepseek_v4", "vocab_size": 129280, "hidden_size": 4096,
    "num_hidden_layers": 1, "num_nextn_predict_layers": 0, "num_attention_heads": 64,
    "num_key_value_heads": 1, "head_dim": 512, "qk_rope_head_dim": 64, "q_lora_rank": 1024,
    "o_groups": 8, "o_lora_rank": 1024, "n_routed_experts": 256, "n_shared_experts": 1,
    "num_experts_per_tok": 6, "moe_intermediate_size": 2048, "num_hash_layers": 0,
    "scoring_func": "sqrtsoftplus", "topk_method": "noaux_tc", "norm_topk_prob": True,
    "routed_scaling_factor": 1.5, "hidden_act": "silu", "swiglu_limit": 10.0,
    "sliding_window": 128, "rope_theta": 10000, "compress_rope_theta": 160000,
    "rope_scaling": {"type": "yarn", "factor": 16, "beta_fast": 32, "beta_slow": 1,
                     "original_max_position_embeddings": 65536},
    "max_position_embeddings": 1048576, "index_n_heads": 64, "index_head_dim": 128,
    "index_topk": 512, "hc_mult": 4, "hc_sinkhorn_iters": 20, "hc_eps": 1e-6,
    "rms_norm_eps": 1e-6, "initializer_range": 0.02, "tie_word_embeddings": False,
    "bos_token_id": 0, "eos_token_id": 1, "expert_dtype": "fp4",
    "quantization_config": {"quant_method": "fp8", "fmt": "e4m3", "scale_fmt": "ue8m0",
                            "weight_block_size": [128, 128], "activation_scheme": "dynamic"},
}
ADAPTED = ["q_a_proj", "q_b_proj", "kv_proj", "o_b_proj"]


def ours(folder, options):
    """Milliseconds that ./train spends in its layer, from --bench's table."""
    out = subprocess.run(
        ["./train", "-m", folder, "--random-base", "--bench", str(options.steps), "-t",
         str(options.tokens), "--recompute", "full", "--lora-targets", options.targets, "-o",
         os.path.join(folder, "out")], capture_output=True, text=True, check=True).stdout
    sums = {name: float(ms) for name, ms in
            re.findall(r"^bench  (.{15}).* ([\d.]+) ms +[\d.]+ %$", out, re.M)}
    sums = {name.strip(): ms for name, ms in sums.items()}
    return sums["step"] - sums["head and loss"] - sums["update"] - sums["host"]


def theirs(config, options):
    """Milliseconds of transformers' layer: forward without graph, recompute, backward."""
    torch.manual_seed(1)
    keys = {k: v for k, v in config.items() if k != "quantization_config"}
    hf_config = modeling.DeepseekV4Config.from_dict(json.loads(json.dumps(keys)))
    hf_config._attn_implementation = "eager"
    hf_config._experts_implementation = "grouped_mm"
    hf_config.vocab_size = 1024                 # the layer does not see it
    with torch.device("cuda"):
        model = modeling.DeepseekV4Model(hf_config).to(torch.bfloat16)
    model.requires_grad_(False)
    model = peft.get_peft_model(model, peft.LoraConfig(r=8, lora_alpha=32, target_modules=ADAPTED))
    base = model.base_model.model
    layer, T = base.layers[0].train(), options.tokens
    ids = torch.randint(0, 1024, (1, T), device="cuda")
    position = torch.arange(T, device="cuda").unsqueeze(0)
    embedded = base.embed_tokens(ids)
    mask = modeling.create_sliding_window_causal_mask(
        config=hf_config, inputs_embeds=embedded, attention_mask=None, past_key_values=None,
        position_ids=position)
    rope = {kind: base.rotary_emb(embedded, position_ids=position, layer_type=kind)
            for kind in ("main", "compress")}
    x = embedded.unsqueeze(2).repeat(1, 1, 4, 1).detach().requires_grad_()
    dy = torch.randn_like(x)

    def step():
        y = checkpoint(lambda x: layer(x, position_embeddings=rope, position_ids=position,
                                       attention_mask=mask, input_ids=ids, past_key_values=None),
                       x, use_reentrant=False)
        y.backward(dy)

    step()
    times = []
    for _ in range(options.steps):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        step()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end))
    return statistics.median(times)


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workdir")
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--targets", default="attn,shared,experts")
    options = parser.parse_args()
    print(f"{torch.cuda.get_device_name()}, {options.tokens} tokens, ./train adapts "
          f"{options.targets}, transformers adapts attention")
    for kind, ratio in KINDS.items():
        config = CONFIG | {"compress_ratios": [ratio]}
        folder = os.path.join(options.workdir, kind)
        os.makedirs(folder, exist_ok=True)
        with open(os.path.join(folder, "config.json"), "w") as file:
            json.dump(config, file)
        a, b = ours(folder, options), theirs(config, options)
        torch.cuda.empty_cache()
        print(f"{kind:8} ./train {a:7.2f} ms | transformers {b:7.2f} ms | {b / a:.2f} times")


if __name__ == "__main__":
    main()
