"""The tables of the documents, made from examples/results/*.json alone.

    cd examples && python -m common.tables

rewrites what stands between the marks `<!-- figures -->` and `<!-- end of figures -->` in README.md.
"""

import json
from pathlib import Path

from common.results import REPOSITORY, write_atomically

RUNS = {"nlg_embedded.json": "the default run", "nlg_smollm2_e2e.json": "SmolLM2-135M on the real E2E set"}
BEGIN, END = "<!-- figures -->\n", "<!-- end of figures -->\n"


def figures(folder=REPOSITORY / "examples" / "results"):
    """A Markdown table with a column for each run."""
    runs = [json.loads((Path(folder) / name).read_text(encoding="utf-8")) for name in RUNS]
    rows = {
        "": list(RUNS.values()),
        "---": ["---:"] * len(runs),
        "parameters": [f"{run['parameters']['total']:,}" for run in runs],
        "trained with LoRA": [_trained(run["parameters"]) for run in runs],
        "optimizer steps, of texts": [
            f"{run['history'][-1]['step']:,} of {run['configuration']['batch_size']}" for run in runs
        ],
        "meanings scored": [f"{run['counts']['test_meanings']:,}" for run in runs],
        "BLEU before, after": [f"{run['before']['bleu']:.1f}, **{run['after']['bleu']:.1f}**" for run in runs],
        "slot values mentioned before, after": [
            f"{run['before']['slot_share']:.1%}, **{run['after']['slot_share']:.1%}**" for run in runs
        ],
        "the same in the references": [f"{run['references']['slot_share']:.1%}" for run in runs],
        "adapter file, bytes": [f"{run['bytes']['adapter']:,}" for run in runs],
        "the model in float32, bytes": [f"{run['bytes']['model']:,}" for run in runs],
        "seconds in all, of them training": [
            f"{run['seconds']['total']:.0f}, {run['seconds']['train']:.0f}" for run in runs
        ],
        "device, threads": [f"{run['environment']['device']}, {run['environment']['threads']}" for run in runs],
        "result file": [f"[{name}](examples/results/{name})" for name in RUNS],
    }
    return "".join(f"| {' | '.join([name, *cells])} |\n" for name, cells in rows.items())


def with_figures(text):
    """The text of README.md with the table in its place."""
    before, rest = text.split(BEGIN)
    return before + BEGIN + figures() + END + rest.split(END)[1]


def _trained(parameters):
    return f"{parameters['trainable']:,} ({parameters['trainable'] / parameters['total']:.2%})"


if __name__ == "__main__":
    readme = REPOSITORY / "README.md"
    write_atomically(readme, with_figures(readme.read_text(encoding="utf-8")))
