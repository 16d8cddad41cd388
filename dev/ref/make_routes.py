"""Writes test/vectors/routes.bin: what the routers of transformers 5.17 choose, with gradients.

The router's matrix is the identity, so its input is its logits. A case is int32 score (0
sqrtsoftplus, 1 sigmoid, 2 softmax), greedy, groups, kept, norm, T, E, K, then float32 scale, bias
(E), logits (T,E), upstream gradient of each expert's weight (T,E), weights (T,E; 0: not chosen) and
the gradient of the logits (T,E). Tokens whose choice hangs on less than 1e-3 are drawn again.
"""
import argparse
import pathlib
import struct
import torch
from transformers import DeepseekV2Config, DeepseekV3Config, DeepseekV4Config
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2TopkRouter
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter
from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4TopKRouter

SCORES = ["sqrtsoftplus", "sigmoid", "softmax"]
T = 24


def router(model, score, method, E, K, groups, kept, norm, scale, bias):
    shared = dict(hidden_size=E, num_attention_heads=1, num_key_value_heads=1, n_routed_experts=E,
                  num_experts_per_tok=K, routed_scaling_factor=scale)
    if model == 4:
        r = DeepseekV4TopKRouter(DeepseekV4Config(scoring_func=score, **shared))
    elif model == 3:
        r = DeepseekV3TopkRouter(DeepseekV3Config(n_group=groups, topk_group=kept,
                                                  norm_topk_prob=norm, **shared))
    else:
        r = DeepseekV2TopkRouter(DeepseekV2Config(n_group=groups, topk_group=kept,
                                                  topk_method=method, norm_topk_prob=False,
                                                  **shared))
    r.weight.data = torch.eye(E)
    if model > 2:
        r.e_score_correction_bias.copy_(bias)
    return r


def case(file, model, score, method, E, K, groups, kept, norm, scale):
    bias = torch.randn(E) * 0.3 - 0.8 if method == "noaux_tc" else torch.zeros(E)
    r = router(model, score, method, E, K, groups, kept, norm, scale, bias)
    with torch.no_grad():
        logits = torch.randn(4 * T, E) * 2
        # A choice is safe if noise on the logits leaves it.
        chosen = [r(logits + 1e-3 * torch.randn_like(logits))[2].sort().values for _ in range(20)]
        safe = torch.stack([(c == chosen[0]).all(-1) for c in chosen]).all(0)
        logits = logits[safe][:T]
    assert len(logits) == T
    x = logits.clone().requires_grad_()
    upstream = torch.randn(T, E)
    _, weights, ids = r(x)
    (weights * upstream.gather(1, ids)).sum().backward()
    dense = torch.zeros(T, E).scatter(1, ids, weights.detach())
    file.write(struct.pack("8if", SCORES.index(score), method != "noaux_tc", groups, kept, norm, T,
                           E, K, scale))
    for tensor in (bias, logits, upstream, dense, x.grad):
        file.write(tensor.float().contiguous().numpy().astype("<f4").tobytes())


argparse.ArgumentParser(description=__doc__).parse_args()       # -h only
torch.manual_seed(11)
path = pathlib.Path(__file__).parents[2] / "test" / "vectors" / "routes.bin"
with open(path, "wb") as file:
    case(file, 3, "sigmoid", "noaux_tc", 16, 4, 4, 2, True, 2.5)
    case(file, 3, "sigmoid", "noaux_tc", 16, 6, 1, 1, True, 2.446)
    case(file, 3, "sigmoid", "noaux_tc", 24, 3, 3, 2, False, 1.0)
    case(file, 4, "sqrtsoftplus", "noaux_tc", 16, 6, 1, 1, True, 1.5)
    case(file, 4, "sigmoid", "noaux_tc", 8, 2, 1, 1, True, 1.5)
    case(file, 2, "softmax", "greedy", 16, 4, 1, 1, False, 16.0)
    case(file, 2, "softmax", "group_limited_greedy", 16, 3, 4, 2, False, 16.0)
print(path, path.stat().st_size, "bytes; torch", torch.__version__)
