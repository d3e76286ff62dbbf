"""Which bases were fine-tuned, on what, and what each method reached: one row a run.

    cd examples
    python COMPARISON_RESULTS.py
    python COMPARISON_RESULTS.py --write
    python COMPARISON_RESULTS.py --run

Read from results/*.json, in a second. --write makes COMPARISON_RESULTS.md anew. --run measures what is missing on the
models and the data that ship here, which takes as long as it says. Runs stand in one table only if task, base and data
are the same; what others have published stands apart and is marked so.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from common.cli import knob, parse_knobs, run
from common.data import glue
from common.files import write_atomically
from common.reports import comparison, tables
from common.reports.comparison import Gaps

HERE = Path(__file__).resolve().parent
DOCUMENT = HERE / "COMPARISON_RESULTS.md"
PAPER = "arXiv 2106.09685"
# Of tables 2 and 3 of the LoRA paper, as published: +- is the authors' confidence interval over seeds. Their figures
# of full fine-tuning are, as they say, from prior works: on GLUE Liu et al. 2019, on E2E Li and Liang 2021.
PUBLISHED = {
    "E2E, base GPT-2 medium, official test set": (
        ["BLEU", "NIST", "METEOR", "ROUGE-L", "CIDEr"],
        {
            "published: LoRA r=4, query and value": (
                ["70.4 +- .1", "8.85 +- .02", "46.8 +- .2", "71.8 +- .1", "2.53 +- .02", "0.35M"],
                f"{PAPER}, table 3",
            ),
            "published: full fine-tuning": (
                ["68.2", "8.62", "46.2", "71.0", "2.47", "354.92M"],
                f"{PAPER}, table 3, from arXiv 2101.00190",
            ),
        },
    ),
    "GLUE, base RoBERTa-base, official dev sets": (
        ["MNLI", "SST-2", "MRPC", "CoLA, Matthews", "QNLI", "QQP", "RTE", "STS-B, Pearson"],
        {
            "published: LoRA r=8, query and value": (
                [
                    *("87.5 +- .3", "95.1 +- .2", "89.7 +- .7", "63.4 +- 1.2"),
                    *("93.3 +- .3", "90.8 +- .1", "86.6 +- .7", "91.5 +- .2", "0.3M"),
                ],
                f"{PAPER}, table 2",
            ),
            "published: full fine-tuning": (
                ["87.6", "94.8", "90.2", "63.6", "92.8", "91.9", "78.7", "91.2", "125M"],
                f"{PAPER}, table 2, from arXiv 1907.11692",
            ),
        },
    ),
}


NOTES = f"""A row is a run, or the mean of the seeds of one (+- the standard deviation), with the file that holds it; a
table holds what shares task, base and data. {comparison.SYNTHETIC_BASE} marks texts made by a grammar, and models
pretrained on such texts: they show nothing about real text, and no table holds them together with others. Scores of
GLUE are of the dev set, x 100. Rows differ in settings, steps and device as they say; which runs differ in the method
alone, and by how much, is what QUALITY_COMPARISON.py and LORA_vs_FULL_COMPARISON.py say."""
# The order of the rows of a table, first what needs no training; and which a table should have, of GLUE and of E2E.
METHODS = {"none": comparison.METHODS["none"], "majority": "majority guess", **comparison.METHODS}
ORDER, UNTRAINED = list(METHODS), ("none", "majority")
EXPECTED = {False: ("head", "lora", "full"), True: ("none", "lora", "full")}

HEADING = f"""# What was measured, and what each method reached

Made by `python COMPARISON_RESULTS.py --write` from [results](results); do not edit it.

{NOTES}
"""


@dataclass
class Knobs(comparison.Knobs):
    write: bool = knob(False, f"write {DOCUMENT.name} beside this script, too")


class Row(NamedTuple):
    method: str
    title: str
    scored: str
    steps: str
    scores: tuple[str, ...]
    trained: str
    saved: str
    device: str
    file: str

    def cells(self):
        return [self.title, self.scored, self.steps, *self.scores, self.trained, self.saved, self.device, self.file]


def header(titles):
    return ["method", "scored on", "steps", *titles, "trained", "saved, bytes", "device", "result file"]


def tables_of(records, gaps):
    """[(title, lists of cells)]: a table for each task, base and data."""
    groups = {}
    for kind in (comparison.runs_of, comparison.trials_of, comparison.improvements_of):
        for name, record in kind(records).items():
            groups.setdefault(comparison.group_of(record), {})[name] = record
    found = []
    for title, members in sorted(groups.items(), key=_order):
        kinds = comparison.score_kinds(next(iter(members.values())), main=True)
        rows = []
        for name, record in members.items():
            for row in rows_of(name, record, kinds, gaps):
                # What needs no training is the same in all runs, and an improvement scores the texts of a run.
                may_be_known = row.method in UNTRAINED or "adapted" in record
                if not may_be_known or row.scores not in [other.scores for other in rows]:
                    rows.append(row)
        rows += rows_missing(members, [row.method for row in rows], len(kinds), gaps)
        rows.sort(key=lambda row: ORDER.index(row.method))
        found.append((title, [header(kind.title for kind in kinds.values()), *(row.cells() for row in rows)]))
    return found + nothing_measured(groups, gaps)


def _order(group):
    """What ships here first, in the order of the tasks."""
    record = next(iter(group[1].values()))
    task = comparison.glue_task(record)
    place = -1 if task is None else list(glue.TASKS).index(task.name)
    return not comparison.has_synthetic_data(record), place, group[0]


def rows_of(name, record, kinds, gaps):
    """The rows of a result file."""
    rest = comparison.device_title(record), f"{name}.json"
    scored, settings = comparison.scored_on(record), record["configuration"]

    def texts(found):
        return tuple(comparison.score_text(kind, found, key, gaps, name, record) for key, kind in kinds.items())

    if "systems" in record:
        seeds = f", mean of {settings['seeds']} seeds" if settings["seeds"] > 1 else ""
        for method, system in record["systems"].items():
            title = comparison.settings_title({**settings, "lr": system["lr"]}, method) + seeds
            means = tuple(comparison.mean_text(kind, comparison.score_of(system, key)) for key, kind in kinds.items())
            steps = f"best {', '.join(map(str, system['best_steps']))}"
            sizes = f"{system['trained']:,}", f"{system['checkpoint_bytes']:,}"
            yield Row(method, title, scored, steps, means, *sizes, *rest)
        return
    if "adapted" in record:
        method = "lora" if settings["adapted_model"] is None else "full"
        yield Row("none", METHODS["none"], scored, "0", texts(record["base"]), "0", "-", *rest)
        yield Row(method, "of a run that is not here", scored, "-", texts(record["adapted"]), "-", "-", *rest)
        return
    for key, method in (("before", "none"), ("majority", "majority")):
        if key in record:
            yield Row(method, METHODS[method], scored, "0", texts(comparison.scores(record, key)), "0", "-", *rest)
    if "after" in record:
        title = comparison.settings_title(settings, record["adapt"])
        sizes = f"{record['parameters']['trainable']:,}", f"{record['bytes']['checkpoint']:,}"
        steps = f"{record['history'][-1]['step']:,}"
        yield Row(record["adapt"], title, scored, steps, texts(comparison.scores(record)), *sizes, *rest)


def rows_missing(members, methods, columns, gaps):
    """A row for each method that a table has none of."""
    name, record = next(iter((comparison.runs_of(members) or members).items()))
    for method in EXPECTED[comparison.glue_task(record) is None]:
        if method not in methods:
            cell = gaps.cell(command_for(method, name, record))
            yield Row(method, METHODS[method], cell, *("-", ("-",) * columns), *("-",) * 4)


def command_for(method, name, record):
    if comparison.is_shipped(record) and method != "head":
        return comparison.shipped_command(record)
    if comparison.is_run(record) and not comparison.is_shipped(record):
        return comparison.remake(name, record, method)
    if comparison.glue_task(record) is not None:
        return comparison.trial_command(record)
    settings = {key: record["configuration"][key] for key in ("model", "data_dir", "precision")}
    return comparison.command("NLG/compare_lora_vs_full.py", **settings, record=f"{name}_compare")


def nothing_measured(groups, gaps):
    """A table of the tasks that ship here and of which there is no result file at all."""
    title = f"No result file of the models and the data that ship here, which are {comparison.SYNTHETIC_BASE}"
    rows = [["task", *(METHODS[method] for method in EXPECTED[False])]]
    for task in comparison.SHIPPED_TASKS:
        record = comparison.shipped(task)
        if comparison.group_of(record) not in groups:
            head = "-" if task == "e2e" else gaps.cell(comparison.trial_command(record))
            cell = gaps.cell(command_for("lora", None, record))
            rows.append([comparison.task_title(record), head, cell, cell])
    return [(title, rows)] if len(rows) > 1 else []


def published():
    """The tables of what others measured."""
    return [
        (
            f"Published by others, not measured here (+- is their confidence interval): {title}",
            [
                ["method", *metrics, "trained", "source"],
                *([method, *cells, source] for method, (cells, source) in rows.items()),
            ],
        )
        for title, (metrics, rows) in PUBLISHED.items()
    ]


def document(records):
    """The text of COMPARISON_RESULTS.md."""
    gaps = Gaps()
    parts = [HEADING]
    for title, (titles, *rows) in [*tables_of(records, gaps), *published()]:
        places = ["---" if place in (0, len(titles) - 1) else "---:" for place in range(len(titles))]
        rows = [[*cells[:-1], _link(cells[-1])] for cells in rows]
        parts.append(f"## {title}\n\n{tables.markdown([titles, places, *rows])}")
    for title, _, lines in gaps.block():
        parts.append(f"## {title}\n\n" + "".join(f"    {line}\n" for line in lines))
    return "\n".join(parts)


def _link(cell):
    return f"[{cell}](results/{cell})" if cell.endswith(".json") else cell


def main():
    knobs = parse_knobs(Knobs, __doc__)
    records, gaps = comparison.read(knobs), Gaps()
    comparison.show([(title, rows, []) for title, rows in [*tables_of(records, gaps), *published()]])
    comparison.show([(NOTES, [], []), *gaps.block()])
    if knobs.write:
        write_atomically(DOCUMENT, document(records))
        print(f"\nwritten to {DOCUMENT}")


if __name__ == "__main__":
    run(main)
