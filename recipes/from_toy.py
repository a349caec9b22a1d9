"""Built-in sounds of ten classes, for machines without any data.

3 s each; a fifth is for testing. They are a function of the seed.
"""

import os

import numpy as np

from common import barrier, check, rank
from recipes.packs import write_pack
from recipes.toy import CLASSES, toy_clip


def add_flags(parser):
    parser.set_defaults(source="toy")
    parser.add_argument("--clips", type=int, default=2000, help="[2000]")
    parser.add_argument("--seed", type=int, default=0, help="[0]")


def rows(args):
    check(0 <= args.seed < 2**63, f"--seed {args.seed}: 0 to 2**63")
    check(1 <= args.clips <= 10**6, f"--clips {args.clips}: 1 to a million")
    return [row_of(i, args.seed) for i in range(args.clips)], CLASSES


def row_of(i, seed):
    """Return the row of sound number i: class by class in turn."""
    split = "test" if i % 50 < 10 else "train"
    return dict(
        path=f"toy-{i:05d}",
        labels=[CLASSES[i % 10]],
        split=split,
        group="",
        key=[seed, i]
    )


def read(row):
    """Make the sound of a row: (n,) float32 at 16 kHz."""
    return toy_clip(np.random.default_rng(row["key"]), row["labels"][0])


def make_toy(out, clips=2000, seed=0):
    """Make a pack of the built-in sounds: 100 minutes by default, 80 of them to train on."""
    sounds = [row_of(i, seed) for i in range(clips)]
    return write_pack(out, sounds, read, CLASSES, "toy", workers=os.cpu_count())


def toy_pack(out_dir):
    """Return the path of the toy pack in a folder, made by rank 0 if it is not there."""
    path = f"{out_dir}/toy"
    if rank() == 0 and not os.path.exists(path):
        make_toy(path)
    barrier()
    return path
