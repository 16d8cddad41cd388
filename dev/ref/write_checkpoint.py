"""Writes a drawn model as a checkpoint folder in the released layout (config.json, index, shards).

    python dev/ref/write_checkpoint.py OUTDIR [--config tiny|t2_top2|t2_top6] [--seed 1] [--mtp]
                                              [--shards 3]

The trainer loads OUTDIR with -m; `./train -m OUTDIR --random-base --seed S` draws the same bytes.
--mtp adds the mtp.0.* tensors of the released Flash, which the trainer must skip.
"""
import argparse

import model as ref


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("outdir")
    parser.add_argument("--config", choices=sorted(ref.CONFIGS), default="tiny")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--mtp", action="store_true")
    parser.add_argument("--shards", type=int, default=3)
    options = parser.parse_args()
    config = ref.CONFIGS[options.config]
    total, count = ref.write_checkpoint(options.outdir, config, options.seed, options.shards,
                                        options.mtp)
    print(f"{options.outdir}: {options.config}, seed {options.seed}, {count} tensors, "
          f"{total} bytes, {options.shards} shards")


if __name__ == "__main__":
    main()
