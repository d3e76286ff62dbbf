"""Write the synthetic GLUE files that ship in examples/NLU/data: train.tsv and dev.tsv of all eight tasks.

    python examples/embedded/make_glue_data.py

Takes a second and gives the same bytes every time. Folders, columns and quirks are those of the official files:
literal quotes, no header in CoLA, a byte-order mark in MRPC, two dev files of MNLI (whose columns of parses are
empty here). No text of a dev file is in the train file of its task.
"""

import argparse
import os
import random
import sys
from pathlib import Path

from glue_grammar import MISMATCHED, TASKS, mnli

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # examples/, for the package common
from common.cli import run

SEED = 13
SIZES = {"dev": 300, "dev_matched": 300, "dev_mismatched": 300, "train": 1500}  # rows of a file, dev first
FOLDERS = {
    "sst2": "SST-2",
    "mnli": "MNLI",
    "qnli": "QNLI",
    "rte": "RTE",
    "mrpc": "MRPC",
    "cola": "CoLA",
    "qqp": "QQP",
    "stsb": "STS-B",
}
PARSES = ("sentence1_binary_parse", "sentence2_binary_parse", "sentence1_parse", "sentence2_parse")


def table(task, file, rows):
    """The header (None: the file has none) and the fields of every row, in the official order."""
    numbered = list(enumerate(rows))
    if task == "sst2":
        return ("sentence", "label"), [(f"{row.texts[0]} ", row.label) for row in rows]
    if task == "cola":
        return None, [("gg26", row.label, "*" if row.label == "0" else "", row.texts[0]) for row in rows]
    if task == "mnli":
        labels = 1 if file == "train" else 5
        header = ("index", "promptID", "pairID", "genre", *PARSES, "sentence1", "sentence2")
        header = (*header, *(f"label{i + 1}" for i in range(labels)), "gold_label")
        return header, [
            (i, i, f"{i}{row.label[0]}", row.domain, *[""] * len(PARSES), *row.texts, *[row.label] * (labels + 1))
            for i, row in numbered
        ]
    if task == "mrpc":
        header = ("\ufeffQuality", "#1 ID", "#2 ID", "#1 String", "#2 String")
        return header, [(row.label, 2 * i, 2 * i + 1, *row.texts) for i, row in numbered]
    if task == "qqp":
        header = ("id", "qid1", "qid2", "question1", "question2", "is_duplicate")
        return header, [(i, 2 * i, 2 * i + 1, *row.texts, row.label) for i, row in numbered]
    if task == "stsb":
        header = ("index", "genre", "filename", "year", "old_index", "source1", "source2")
        return (*header, "sentence1", "sentence2", "score"), [
            (i, row.domain, "grammar", 2026, f"{i:04}", "none", "none", *row.texts, row.label) for i, row in numbered
        ]
    first, second = ("question", "sentence") if task == "qnli" else ("sentence1", "sentence2")
    return ("index", first, second, "label"), [(i, *row.texts, row.label) for i, row in numbered]


def make_rows(seed=SEED):
    """The rows of every file, by task and name of the file."""
    made = {}
    for task, example in TASKS.items():
        taken = set()
        for file in ("dev_matched", "dev_mismatched", "train") if task == "mnli" else ("dev", "train"):
            rng, rows = random.Random(f"{task} {file} {seed}"), []
            while len(rows) < SIZES[file]:
                split = "train" if file == "train" else "dev"
                row = mnli(rng, split, MISMATCHED) if file == "dev_mismatched" else example(rng, split)
                if row.texts not in taken:
                    taken.add(row.texts)
                    rows.append(row)
            made[task, file] = rows
    return made


def make_data(output_dir, seed=SEED):
    for (task, file), rows in make_rows(seed).items():
        header, fields = table(task, file, rows)
        lines = ["\t".join(map(str, line)) + "\n" for line in ([header] if header else []) + fields]
        folder = Path(output_dir) / FOLDERS[task]
        folder.mkdir(parents=True, exist_ok=True)
        partial = folder / f"{file}.partial"
        partial.write_bytes("".join(lines).encode())
        os.replace(partial, folder / f"{file}.tsv")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output_dir", default=Path(__file__).parents[1] / "NLU" / "data")
    parser.add_argument("--seed", type=int, default=SEED, help="of the texts and labels (default: %(default)s)")
    args = parser.parse_args()
    make_data(args.output_dir, args.seed)


if __name__ == "__main__":
    run(main)
