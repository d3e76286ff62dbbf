"""Which bases were fine-tuned, on what, and what each method reached.

    cd examples
    python COMPARISON_RESULTS.py
    python COMPARISON_RESULTS.py --all
    python COMPARISON_RESULTS.py --write
    python COMPARISON_RESULTS.py --run

Read from results/*.json, in a second. The first prints the best run of each method and task, with its interval; --all
every run, and what others have published, which stands apart and is marked so. --write makes COMPARISON_RESULTS.md
anew. --run measures what is missing on the models and the data that ship here, which takes as long as it says. Runs
stand in one table only if task, base and data are the same, and only if the whole test set was scored.
"""

import re
from dataclasses import dataclass
from pathlib import Path

from common.cli import knob, parse_knobs, run
from common.files import write_atomically
from common.reports import comparison, missing, reached, reading, tables
from common.reports.missing import Gaps

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


NOTES = f"""A row is one run, or the mean over its seeds (+- the standard deviation), with the files that hold it. A
table has the runs of one task, base and data set. {reading.SYNTHETIC_BASE} marks texts made by a grammar, and models
pretrained on such texts. They show nothing about real text, and share no table with other rows. GLUE scores
are of the dev set, times 100. Rows may differ in settings, steps and device, as they state; QUALITY_COMPARISON.py and
LORA_vs_FULL_COMPARISON.py compare runs that differ in the method alone. A run that was scored on a part of the test
set is shown with its validation loss only."""
BEST_NOTES = """Which run is the best? Runs of several seeds come first, then those with an interval. Of these the score
decides on GLUE (so it is slightly too high), and on E2E the validation loss, on the most texts. +- is the standard
deviation over seeds. In brackets: 95 % of resamples of the test examples; with several seeds, of the first seed. "-":
not measured."""
BEST = {"untrained": reached.UNTRAINED, "head alone": ["head"], "LoRA": ["lora"], "full fine-tuning": ["full"]}
# Which methods a table should have, of GLUE and of E2E.
EXPECTED = {False: ("head", "lora", "full"), True: ("none", "lora", "full")}

HEADING = f"""# What was measured, and what each method reached

Made by `python COMPARISON_RESULTS.py --write` from [results](results); do not edit it.

{NOTES}
"""


@dataclass
class Knobs(comparison.Knobs):
    write: bool = knob(False, f"write {DOCUMENT.name} beside this script, too")


def header(titles):
    return ["method", "scored on", "steps", *titles, "trained", "saved, bytes", "device", "result file"]


def tables_of(records, gaps):
    """[(title, lists of cells)]: a table for each task, base and data, and one of what was scored in part."""
    found, groups = [], reached.groups(records)
    for title, members in sorted(groups.items(), key=lambda group: reading.place(next(iter(group[1].values())))):
        kinds = reading.score_kinds(next(iter(members.values())), main=True)
        rows = reached.rows_of(records, members)
        cells = [(row.method, cells_of(row, kinds, records, gaps)) for row in rows]
        cells += rows_missing(members, [row.method for row in rows], len(kinds), gaps)
        cells.sort(key=lambda pair: list(reached.METHODS).index(pair[0]))
        found.append((title, [header(kind.title for kind in kinds.values()), *(row for _, row in cells)]))
        found += scored_in_part(title, records, members)
    return found + nothing_measured(groups, gaps)


def cells_of(row, kinds, records, gaps):
    """The cells of a row."""
    record = records[row.files[0]]
    scores = []
    for key, kind in kinds.items():
        mean, deviation = row.scores.get(key, (None, None))
        if mean is None and reading.glue_task(record) is None:
            scores.append(gaps.cell(missing.remake(row.files[0], record)))
        else:
            scores.append(comparison.mean_text(kind, mean, deviation) if key in row.scores else "-")
    saved = "-" if row.saved is None else f"{row.saved:,}"
    files = ", ".join(f"{name}.json" for name in row.files)
    return [row.title, row.scored, row.steps, *scores, f"{row.trained:,}", saved, row.device, files]


def scored_in_part(group, records, members):
    """A table of the runs of a group that no result file has whole scores of: they choose settings, and no more."""
    rows = [["method", "steps", "least validation loss", "trained", "saved, bytes", "device", "result file"]]
    for name, record in reading.runs_of(reached.partial(members)).items():
        if "history" in record and reached.whole_scores(records, name)[1] is None:
            title = reading.settings_title(record["configuration"], record["adapt"])
            loss = min(entry["valid_loss"] for entry in record["history"])
            sizes = f"{record['parameters']['trainable']:,}", f"{record['bytes']['checkpoint']:,}"
            steps = f"{record['history'][-1]['step']:,}"
            rows.append([title, steps, f"{loss:.3f}", *sizes, reading.device_title(record), f"{name}.json"])
    return [(f"{group}: runs that were scored on a part of the test set", rows)] if len(rows) > 1 else []


def best(records):
    """Blocks of the best row of each method, a line a task."""
    found = [list(BEST)]
    for record, key, kind, rows in reached.best(records):
        chosen = [next((rows[method] for method in methods if method in rows), None) for methods in BEST.values()]
        files = [name for row in chosen if row for name in row.files]
        found.append((record, kind, [best_cell(kind, row, key) for row in chosen], files))
    return comparison.overview(found)


def best_cell(kind, row, key):
    return "-" if row is None or row.scores[key][0] is None else comparison.reached_text(kind, row, key)


def rows_missing(members, methods, columns, gaps):
    """A row for each method that a table has none of."""
    name, record = next(iter((reading.runs_of(members) or members).items()))
    for method in EXPECTED[reading.glue_task(record) is None]:
        if method not in methods:
            cell = gaps.cell(command_for(method, name, record))
            yield method, [reached.METHODS[method], cell, *["-"] * (columns + 5)]


def command_for(method, name, record):
    if reading.is_shipped(record) and method != "head":
        return missing.shipped_command(record)
    if reading.is_run(record) and not reading.is_shipped(record):
        return missing.remake(name, record, method)
    if reading.glue_task(record) is not None:
        return missing.trial_command(record)
    settings = {key: record["configuration"][key] for key in ("model", "data_dir", "precision")}
    return missing.command("NLG/compare_lora_vs_full.py", **settings, record=f"{name}_compare")


def nothing_measured(groups, gaps):
    """A table of the tasks that ship here and of which there is no result file at all."""
    title = f"No result file of the models and the data that ship here, which are {reading.SYNTHETIC_BASE}"
    rows = [["task", *(reached.METHODS[method] for method in EXPECTED[False])]]
    measured = {reading.group_of(next(iter(members.values()))) for members in groups.values()}
    for task in missing.SHIPPED_TASKS:
        record = missing.shipped(task)
        if reading.group_of(record) not in measured:
            head = "-" if task == "e2e" else gaps.cell(missing.trial_command(record))
            cell = gaps.cell(command_for("lora", None, record))
            rows.append([reading.task_title(record), head, cell, cell])
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


def unexplained(records):
    """A block of the improvements whose systems are no runs here."""
    lines = []
    for name in reached.unexplained(records):
        compared = records[name].get("compared", {})  # not in the first records
        lines.append(": ".join([f"{name}.json", *([" against ".join(compared.values())] if compared else [])]))
    return [("Not shown: a system of these is no run that is here", [], lines)] if lines else []


def document(records):
    """The text of COMPARISON_RESULTS.md."""
    gaps = Gaps()
    parts = [HEADING]
    for title, rows, _ in best(records):
        parts.append(f"## {title}: the best of each method\n\n{in_markdown(rows)}")
    parts.append(BEST_NOTES + "\n")
    for title, rows in [*tables_of(records, gaps), *published()]:
        parts.append(f"## {title}\n\n{in_markdown(rows)}")
    for title, _, lines in [*unexplained(records), *gaps.block()]:
        parts.append(f"## {title}\n\n" + "".join(f"    {line}\n" for line in lines))
    return "\n".join(parts)


def in_markdown(rows):
    titles, *rows = rows
    places = ["---" if place in (0, len(titles) - 1) else "---:" for place in range(len(titles))]
    return tables.markdown([titles, places, *([*cells[:-1], _links(cells[-1])] for cells in rows)])


def _links(cell):
    return re.sub(r"[\w.-]+\.json", lambda name: f"[{name[0]}](results/{name[0]})", cell)


def main():
    knobs = parse_knobs(Knobs, __doc__)
    records, gaps = comparison.read(knobs), Gaps()
    if knobs.all:
        comparison.show([(title, rows, []) for title, rows in [*tables_of(records, gaps), *published()]])
        comparison.show([(NOTES, [], []), *unexplained(records), *gaps.block()])
    else:
        comparison.show([*best(records), (BEST_NOTES, [], []), comparison.MORE])
    if knobs.write:
        write_atomically(DOCUMENT, document(records))
        print(f"\nwritten to {DOCUMENT}")


if __name__ == "__main__":
    run(main)
