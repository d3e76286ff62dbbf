"""What the comparison scripts of examples/ share: which runs are alike, and the cells of their reports.

Two runs are a pair if they differ in the method alone.
"""

import textwrap
from dataclasses import dataclass
from pathlib import Path

from common.cli import UserError, knob
from common.files import RESULTS
from common.records import runs
from common.reports import missing, reached, reading, tables

# Whether a task is synthetic: under which title a report of one screen has it.
SECTIONS = {True: "SYNTHETIC models or data, which ship here", False: "Models and data from outside"}
# The end of such a report.
MORE = ("--all prints everything: every run, its settings, and the commands for what is not measured", [], [])


@dataclass
class Knobs:
    results: str = knob(str(RESULTS), "folder of the result files")
    run: bool = knob(False, "first measure what is missing on the models and the data that ship here")
    all: bool = knob(False, "print everything, not the one screen of the best run of each method and task")


# The records


def read(knobs):
    """{name: record} of the result files; with --run after the measurements that are missing."""
    records = reading.read_folder(knobs.results)
    if knobs.run:
        if Path(knobs.results).resolve() != RESULTS:
            raise UserError(f"--run writes to {RESULTS}, and --results is {knobs.results}; leave one of them out")
        missing.measure_missing(records)
        records = reading.read_folder(knobs.results)
    return records


# Pairs


def likeness(record):
    """Everything in which the two runs of a pair agree."""
    start = {"adapter to begin with": record.get("init_adapter")}
    return {"task": record["task"], **runs.facts(record, reading.THE_METHOD), **start}


def in_what_they_differ(records, one, other):
    """The differences beside the method, as a text that is empty if there are none."""
    return runs.differences(likeness(records[one]), likeness(records[other]))


def pairs(records):
    """[(name of a run of LoRA, name of one of full fine-tuning)] of all that differ in the method alone."""
    found = reading.runs_of(records).items()
    lora, full = ([name for name, record in found if record["adapt"] == adapt] for adapt in ("lora", "full"))
    return [(one, other) for one in lora for other in full if not in_what_they_differ(records, one, other)]


def require_pair(records, names):
    """(LoRA, full) of two result files named in either order; a UserError says why they are no pair."""
    names = [Path(name).name.removesuffix(".json") for name in names]
    found = reading.runs_of(records)
    for name in names:
        if name not in found:
            raise UserError(f"--pair {name}: no run of that name; there are {', '.join(found) or 'none'}")
    by_method = {found[name]["adapt"]: name for name in names}
    if by_method.keys() != {"lora", "full"}:
        kinds = ", ".join(f"{name} is {reading.METHODS[found[name]['adapt']]}" for name in names)
        raise UserError(f"--pair {' '.join(names)}: must be one run of LoRA and one of full fine-tuning; {kinds}")
    pair = by_method["lora"], by_method["full"]
    differing = in_what_they_differ(records, *pair)
    if differing:
        raise UserError(f"--pair {' '.join(names)}: they differ in more than the method: {differing}")
    return pair


def is_scored(records, pair):
    """Whether both runs were scored on the whole test set."""
    return all(reached.whole_scores(records, name)[1] for name in pair)


def scores_of(records, pair):
    """{name: scores}: of the whole test set, or if a part alone was scored those of that part."""
    if is_scored(records, pair):
        return {name: reached.whole_scores(records, name)[0] for name in pair}
    return {name: reading.scores(records[name]) for name in pair}


def best_pairs(records):
    """{title of a group: its pair of the best run of LoRA and then of full fine-tuning}, of those that are scored."""

    def rank(name):
        record = records[name]
        return reached.rank([record], reading.scores(record).get(reading.main_kind(record)[0]))

    best = {}
    for pair in sorted(pairs(records), key=lambda pair: [rank(name) for name in pair]):
        if is_scored(records, pair):
            best[reading.group_of(records[pair[0]])] = pair
    return best


def without_pair(records):
    """{run: (the run of the other method that is most like it, in what they differ)} of those that have no pair."""
    paired = {name for pair in pairs(records) for name in pair}
    found = reading.runs_of(records)
    alone = {}
    for name, record in found.items():
        other = {"lora": "full", "full": "lora"}.get(record["adapt"])
        if name in paired or other is None:
            continue
        candidates = [
            (in_what_they_differ(records, name, candidate), candidate)
            for candidate, facts in found.items()
            if facts["adapt"] == other and reading.group_of(facts) == reading.group_of(record)
        ]
        differing, nearest = min(candidates, key=lambda found: len(found[0]), default=(None, None))
        alone[name] = nearest, differing
    return alone


def pair_title(records, pair):
    lora = records[pair[0]]
    steps = f"{lora['history'][-1]['step']:,} steps of {lora['configuration']['batch_size']}"
    return f"{reading.group_of(lora)}\n{steps}, {scored_title(records, pair)}, {reading.device_title(lora)}"


def scored_title(records, pair):
    if is_scored(records, pair):
        return f"scored on {reading.scored_on(records[reached.whole_scores(records, pair[0])[1]])}"
    return f"scored on {reading.scored_on(records[pair[0]])}, a part of the test set"


def pair_sources(records, pair):
    lines = []
    for title, name in zip(("LoRA", "full"), pair, strict=True):
        record = records[name]
        commit = (record["environment"]["commit"] or "unknown")[:7]
        what = reading.settings_title(record["configuration"], record["adapt"])
        lines.append(f"{title}: {name}.json ({what}, commit {commit})")
    return lines


def steps_in_turn(records, pair):
    """(Name of the comparison that these two runs are of, its steps in turn); None twice if there is none."""
    for name, record in reading.select(records, "steps_in_turn").items():
        if pair == (f"{name}_lora", f"{name}_full") and record["steps_in_turn"]:
            return name, record["steps_in_turn"]
    return None, None


# Reports


def score_text(kind, found, key, gaps, name, record):
    """A cell of a score; one that is not defined, such as the correlation of a constant, needs no measuring."""
    value = found.get(key)
    if value is not None:
        return kind.text(value)
    return "undefined" if key in found and reading.glue_task(record) else gaps.cell(missing.remake(name, record))


def mean_text(kind, mean, deviation):
    """A cell of the mean over seeds, with their standard deviation if there are several."""
    if mean is None:
        return "undefined"
    return kind.text(mean) + ("" if deviation is None else f" +- {kind.text(deviation)}")


def reached_text(kind, row, key):
    """A cell of a row's score with its interval, if it has one."""
    bounds = row.intervals.get(key)
    return mean_text(kind, *row.scores[key]) + (f" {kind.interval(bounds)}" if bounds else "")


def with_direction(kind):
    return f"{kind.title} (less is better)" if kind.sign < 0 else kind.title


def overview(found):
    """Blocks of one line a task, of the titles of the cells and then (record, kind of score, cells, names of files).

    What is synthetic stands apart from the rest, in the order of the tasks.
    """
    (titles, *found), blocks = found, []
    for synthetic, title in SECTIONS.items():
        rows, names = [["", *titles]], []
        for record, kind, cells, files in sorted(found, key=lambda entry: reading.place(entry[0])):
            if reading.is_synthetic(record) == synthetic:
                rows.append([short_title(record, kind), *cells])
                names += files
        lines = textwrap.wrap(f"result files: {in_braces(names)}", 116, break_on_hyphens=False)
        blocks += [(title, rows, lines)] if len(rows) > 1 else []
    return blocks


def short_title(record, kind=None):
    """The task, the score if one is given, and the base if it does not ship here."""
    what = f" {kind.title}" if kind else ""
    base = "" if reading.is_shipped(record) else f", {record['configuration']['model']}"
    return f"{reading.task_title(record)}{what}{base}"


def in_braces(names):
    """Names with commas between, those that differ in the last word alone as a shell writes them: run_{lora,full}."""
    ends = {}
    for name in dict.fromkeys(names):
        start, _, end = name.rpartition("_")
        ends.setdefault(start, []).append(end)
    words = {start: found[0] if len(found) == 1 else f"{{{','.join(found)}}}" for start, found in ends.items()}
    return ", ".join(f"{start}_{word}".removeprefix("_") for start, word in words.items())


def no_pairs(records, gaps):
    """Blocks of what is not compared: runs that are alone, and what ships here and has not been measured."""
    blocks, lines = [], []
    for name, (nearest, differing) in without_pair(records).items():
        why = f"{nearest}.json differs in {differing}" if nearest else "there is no run of the other method"
        lines.append(f"{name}.json ({reading.METHODS[records[name]['adapt']]}): {why}")
    for name, record in reached.partial({**reading.runs_of(records), **reading.trials_of(records)}).items():
        if not reading.is_run(record) or reached.whole_scores(records, name)[1] is None:
            lines.append(f"{name}.json: scored on {reading.scored_on(record)}, a part of the test set")
    if lines:
        blocks.append(("Not compared", [], lines))
    measured = {reading.group_of(records[lora]) for lora, _ in pairs(records)}
    rows = [["task", "LoRA", "full"]]
    for task in missing.SHIPPED_TASKS:
        record = missing.shipped(task)
        if reading.group_of(record) not in measured:
            rows.append([reading.task_title(record), *[gaps.cell(missing.shipped_command(record))] * 2])
    title = f"No pair of runs on the models and the data that ship here, which are {reading.SYNTHETIC_BASE}"
    return blocks + ([(title, rows, [])] if len(rows) > 1 else [])


def show(blocks):
    """Print [(title, lists of cells, lines below)], with an empty line between."""
    for title, rows, lines in blocks:
        print(f"\n{title}")
        if rows:
            print(f"\n{tables.aligned(rows)}", end="")
        for line in lines:
            print(line)
