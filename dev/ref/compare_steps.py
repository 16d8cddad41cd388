"""Are the gradients of two runs the same? Compares two checkpoints written after one step.

    python dev/ref/compare_steps.py OUT_A OUT_B

After the first step AdamW's first moment is 0.1 times the gradient, clipped unless --clip is 0, so
the files hold every adapter's gradient. Where B is zero, as in a fresh adapter, that of A is too:
both runs should begin with --clip 0 and with an --init-adapter whose B is not zero. Prints, for
each kind of matrix, |a - b| / |a| over all of its tensors together and the worst single tensor, or
that both runs have only zeros there, and the losses of the two logs.
"""
import argparse
import json
import os
import re

import numpy as np

import model as ref


def gradients(out):
    folder = os.path.join(out, "checkpoint-000001")
    tensors = ref.read_safetensors(os.path.join(folder, "optimizer.safetensors"))
    return {name: value.astype(np.float64) for name, (_, value) in tensors.items()
            if name.endswith(".m")}


def loss(out):
    with open(os.path.join(out, "training.jsonl")) as file:
        return json.loads(file.readline())["loss"]


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", nargs=2)
    outs = parser.parse_args().out
    a, b = map(gradients, outs)
    assert a.keys() == b.keys(), "not the same adapters"
    kinds = {}
    for name in a:
        kind = re.sub(r".*layers\.\d+\.|experts\.\d+\.|\.weight\.m$", "", name)
        size, off = np.sum(a[name] ** 2), np.sum((a[name] - b[name]) ** 2)
        total = kinds.setdefault(kind, [0, 0, 0, 0])
        total[0] += size
        total[1] += off
        total[2] = max(total[2], (off / size) ** 0.5 if size else float(off > 0))
        total[3] += 1
    for kind, (size, off, worst, count) in sorted(kinds.items()):
        print(f"{kind:32} {count:5} tensors | together {(off / max(size, 1e-300)) ** 0.5:.2e} | "
              f"worst {worst:.2e}" + (" (all zero)" if size == off == 0 else ""))
    size, off = (sum(total[i] for total in kinds.values()) for i in (0, 1))
    print(f"{'all':32} {len(a):5} tensors | together {(off / max(size, 1e-300)) ** 0.5:.2e} | "
          f"loss {loss(outs[0]):.6f} and {loss(outs[1]):.6f}")


if __name__ == "__main__":
    main()
