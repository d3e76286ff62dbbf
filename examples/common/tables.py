"""The tables of the documents, made from examples/results/*.json alone.

    cd examples && python -m common.tables

rewrites what stands between the marks `<!-- figures -->` and `<!-- end of figures -->` in README.md.
"""

import json

from common.results import REPOSITORY, RESULTS, write_atomically

# Result file without .json, and the title of its column.
RUNS = {
    "nlg_embedded": "the default run",
    "nlg_smollm2_lora": "SmolLM2-135M on E2E, LoRA",
    "nlg_smollm2_full": "the same, all parameters",
}
# Rows of scores: key, title, factor, digits.
SCORES = [
    ("bleu", "BLEU", 1, 1),
    ("nist", "NIST", 1, 2),
    ("meteor", "METEOR", 1, 1),
    ("rouge_l", "ROUGE-L", 1, 1),
    ("cider", "CIDEr", 1, 2),
    ("slot_share", "slot values mentioned, %", 100, 1),
    ("slot_error_rate", "slot errors, %", 100, 1),
]
BEGIN, END = "<!-- figures -->\n", "<!-- end of figures -->\n"


def figures(folder=RESULTS):
    """A Markdown table with a column for each run; a score is `before -> after` where the base was scored, too."""
    runs = [json.loads((folder / f"{name}.json").read_text(encoding="utf-8")) for name in RUNS]
    rows = {
        "": RUNS.values(),
        "---": ["---:"] * len(runs),
        "parameters": [f"{run['parameters']['total']:,}" for run in runs],
        "trained": [_trained(run["parameters"]) for run in runs],
        "optimizer steps, of texts": [
            f"{run['history'][-1]['step']:,} of {run['configuration']['batch_size']}" for run in runs
        ],
        "meanings scored": [f"{run['counts']['test_meanings']:,}" for run in runs],
        **{title: [_score(run, key, factor, digits) for run in runs] for key, title, factor, digits in SCORES},
        "slot errors of the references, %": [f"{100 * run['references']['slot_error_rate']:.1f}" for run in runs],
        "what is saved, bytes": [f"{run['bytes']['checkpoint']:,}" for run in runs],
        "state of the optimizer, bytes": [f"{run['bytes']['optimizer']:,}" for run in runs],
        "the model in float32, bytes": [f"{run['bytes']['model']:,}" for run in runs],
        "seconds in all, of them training": [
            f"{run['seconds']['total']:.0f}, {run['seconds']['train']:.0f}" for run in runs
        ],
        "device, threads": [f"{run['environment']['device']}, {run['environment']['threads']}" for run in runs],
        "result file": [f"[{name}.json](examples/results/{name}.json)" for name in RUNS],
    }
    return "".join(f"| {' | '.join([name, *cells])} |\n" for name, cells in rows.items())


def with_figures(text):
    """The text of README.md with the table in its place."""
    before, rest = text.split(BEGIN)
    return before + BEGIN + figures() + END + rest.split(END)[1]


def _trained(parameters):
    return f"{parameters['trainable']:,} ({parameters['trainable'] / parameters['total']:.2%})"


def _score(run, key, factor, digits):
    scores = [run[when][key] for when in ("before", "after") if when in run]
    if scores[-1] is None:
        return "not measured"
    return " -> ".join(f"{factor * score:.{digits}f}" for score in scores)


if __name__ == "__main__":
    readme = REPOSITORY / "README.md"
    write_atomically(readme, with_figures(readme.read_text(encoding="utf-8")))
