"""Prints the numbers that test/test_lora.c compares Muon with: `python dev/ref/make_muon.py`.

torch.optim.Muon makes the momentum, the decay and the step; its Newton-Schulz rounds to bf16, so
the singular value decomposition in float64 takes its place here: O = U f(f(f(f(f(S))))) V^T.
Printed are the parameters after every step, and the moments after the last.
"""
import argparse

import torch
import torch.optim._muon as muon

A, B, C = muon.DEFAULT_A, muon.DEFAULT_B, muon.DEFAULT_C


def by_svd(update, coefficients, steps, eps):
    u, s, vt = torch.linalg.svd(update / update.norm(), full_matrices=False)
    for _ in range(steps):
        s = A * s + B * s**3 + C * s**5
    return u @ torch.diag(s) @ vt


def gradient(rows, cols, step):
    """A matrix that a C program can write down as well, of full rank."""
    i = torch.arange(rows * cols, dtype=torch.float64).reshape(rows, cols)
    return torch.sin(1 + 3 * step + 0.7 * i + 0.13 * i * i)


def trajectory(rows, cols):
    p = torch.nn.Parameter(
        torch.cos(torch.arange(rows * cols, dtype=torch.float64)).reshape(rows, cols))
    o = torch.optim.Muon([p], lr=0.01, weight_decay=0.1, momentum=0.95, nesterov=True,
                         adjust_lr_fn="match_rms_adamw")
    print(f"({rows},{cols})")
    for step in range(3):
        p.grad = gradient(rows, cols, step)
        o.step()
        print("p", ", ".join(f"{x:.15g}" for x in p.flatten().tolist()))
    print("m", ", ".join(f"{x:.15g}" for x in o.state[p]["momentum_buffer"].flatten().tolist()))


argparse.ArgumentParser(description=__doc__).parse_args()       # -h only
muon._zeropower_via_newtonschulz = by_svd
print("torch", torch.__version__)
trajectory(2, 5)
trajectory(4, 3)
