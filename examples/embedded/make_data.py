"""Write the synthetic E2E files that ship in examples/NLG/data: train.txt, valid.txt and test.txt.

    python examples/embedded/make_data.py

Takes a second and gives the same bytes every time. Each line is `slot : value | slot : value||text `, the
lines of one meaning are adjacent, and no meaning is in two of the files.
"""

import argparse
import os
import random
import sys
from pathlib import Path

from grammar import restaurant_split

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # examples/, for the package common
from common.cli import run

SEED = 11
SPLITS = {  # meanings, and the fewest and most references of one
    "test": (80, (5, 8)),
    "valid": (60, (4, 8)),
    "train": (1000, (1, 5)),
}


def make_data(output_dir, seed=SEED):
    output_dir, taken = Path(output_dir), set()
    output_dir.mkdir(parents=True, exist_ok=True)
    for split, (meanings, references) in SPLITS.items():
        lines = restaurant_split(random.Random(f"{split} {seed}"), meanings, references, taken)
        partial = output_dir / f"{split}.partial"
        partial.write_bytes("".join(lines).encode())
        os.replace(partial, output_dir / f"{split}.txt")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output_dir", default=Path(__file__).parents[1] / "NLG" / "data")
    parser.add_argument("--seed", type=int, default=SEED, help="of the meanings and texts (default: %(default)s)")
    args = parser.parse_args()
    make_data(args.output_dir, args.seed)


if __name__ == "__main__":
    run(main)
