"""Write the synthetic GLUE files that ship in examples/NLU/data: train, tune and dev of all eight tasks.

    python examples/embedded/make_glue_data.py

Takes a second and gives the same bytes every time. Folders, columns and quirks are those of the official files:
literal quotes, no header in CoLA, a byte-order mark in MRPC, two dev files of MNLI (whose columns of parses are
empty here). tune.tsv, which the official archives lack, is there to choose on, so that dev is scored once. No text
of one file is in another of its task. Labels have noise: noise.json says what a label was before it.
"""

import argparse
import hashlib
import json
import os
import random
import sys
from pathlib import Path

from glue_grammar import MISMATCHED, TASKS, mnli, with_noise

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # examples/, for the package common
from common.cli import run

SEED = 13
SIZES = {"dev": 300, "dev_matched": 300, "dev_mismatched": 300, "tune": 300, "train": 1500}  # rows of a file
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
        labels = 5 if file.startswith("dev") else 1
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


def files_of(task):
    return [*(["dev_matched", "dev_mismatched"] if task == "mnli" else ["dev"]), "tune", "train"]


def make_rows(seed=SEED):
    """The rows of every file, by task and name of the file, with the labels of the rule."""
    made = {}
    for task, example in TASKS.items():
        taken = set()
        for file in files_of(task):
            rng, rows, new = random.Random(f"{task} {file} {seed}"), {}, set()
            while len(rows) < SIZES[file]:
                split = file.split("_")[0]
                row = mnli(rng, split, MISMATCHED) if file == "dev_mismatched" else example(rng, split)
                if row.texts not in rows and taken.isdisjoint(row.texts):
                    rows[row.texts] = row
                    new.update(row.texts)
            taken |= new
            made[task, file] = list(rows.values())
    return made


def make_data(output_dir, seed=SEED):
    noise = {}
    for (task, file), rows in make_rows(seed).items():
        labels = with_noise(random.Random(f"noise {task} {file} {seed}"), task, [row.label for row in rows])
        header, fields = table(task, file, [row._replace(label=label) for row, label in zip(rows, labels, strict=True)])
        lines = ["\t".join(map(str, line)) + "\n" for line in ([header] if header else []) + fields]
        content = "".join(lines).encode()
        write(Path(output_dir) / FOLDERS[task] / f"{file}.tsv", content)
        noise.setdefault(task, {})[f"{file}.tsv"] = {
            "sha256": hashlib.sha256(content).hexdigest(),
            "labels": {i: row.label for i, row in enumerate(rows) if row.label != labels[i]},
        }
    for task, files in noise.items():
        write(Path(output_dir) / FOLDERS[task] / "noise.json", (json.dumps(files, indent=0) + "\n").encode())


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_bytes(content)
    os.replace(partial, path)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output_dir", default=Path(__file__).parents[1] / "NLU" / "data")
    parser.add_argument("--seed", type=int, default=SEED, help="of the texts and labels (default: %(default)s)")
    args = parser.parse_args()
    make_data(args.output_dir, args.seed)


if __name__ == "__main__":
    run(main)
