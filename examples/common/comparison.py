"""What the comparison scripts of examples/ share: the result files, which of their runs are alike, what they reached.

Everything is read from examples/results/*.json; torch and models are not needed. A run is the record of a training
script (it has "adapt"), a trial that of NLU's evaluate_lora_improvement.py (head, LoRA and full, with seeds), an
improvement that of NLG's (two systems with intervals). Two runs are a pair if they differ in the method alone.
"""

import functools
import json
import math
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from common import glue, runs, tables
from common.cli import UserError, knob
from common.files import REPOSITORY, RESULTS, sha256

METHODS = {"none": "base", "head": "head alone", "lora": "LoRA", "full": "full fine-tuning"}
# What two runs of a pair may differ in: each method has its own learning rate.
THE_METHOD = {"adapt", "lr"}
SHIPPED_TASKS = ["e2e", *(f"glue {name}" for name in glue.TASKS)]
EMBEDDED_DATA = ("examples/NLG/data", "examples/NLU/data")
EMBEDDED_MODELS = ("examples/NLG/model", "examples/NLU/model")
# Marks in titles: what a grammar made, and what was pretrained on such text.
SYNTHETIC_DATA, SYNTHETIC_BASE = "SYNTHETIC data that ship here", "SYNTHETIC"


@dataclass
class Knobs:
    results: str = knob(str(RESULTS), "folder of the result files")
    run: bool = knob(False, "first measure what is missing on the models and the data that ship here")


class Score(NamedTuple):
    title: str
    factor: float = 1
    digits: int = 1
    sign: int = 1  # -1 where less is better, 0 where neither is

    def text(self, value):
        return f"{self.factor * value:.{self.digits}f}"

    def interval(self, bounds):
        return "[{}, {}]".format(*map(self.text, sorted(bounds)))


E2E = {
    **{
        key: Score(title, factor, digits, -1 if key == "slot_error_rate" else 1)
        for key, title, factor, digits in tables.SCORES
    },
    "sacrebleu": Score("BLEU, cased"),
    "distinct_1": Score("distinct 1", digits=3, sign=0),
    "distinct_2": Score("distinct 2", digits=3, sign=0),
    "perplexity": Score("perplexity", digits=3, sign=-1),
}
WITH_INTERVALS = [key for key, *_ in tables.SCORES]  # those of metrics.bootstrap
MAIN_E2E = {key: E2E[key] for key in ("bleu", "nist", "meteor", "rouge_l", "cider", "slot_error_rate")}


# The records


def read(knobs):
    """{name: record} of the result files; with --run after the measurements that are missing."""
    records = read_folder(knobs.results)
    if knobs.run:
        if Path(knobs.results).resolve() != RESULTS:
            raise UserError(f"--run writes to {RESULTS}, and --results is {knobs.results}; leave one of them out")
        measure_missing(records)
        records = read_folder(knobs.results)
    return records


def read_folder(folder):
    if not Path(folder).is_dir():
        raise UserError(f"--results {folder}: no such folder")
    records = {}
    for path in sorted(Path(folder).glob("*.json")):
        try:
            records[path.stem] = record = json.loads(path.read_text(encoding="utf-8"))
            if not isinstance(record, dict):
                raise TypeError(f"a {type(record).__name__}, not an object")
            if is_run(record):
                likeness(record)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{path}: not a whole record of the scripts in examples/ ({error!r}); make it again or take it away"
            ) from error
    return records


def is_run(record):
    return "adapt" in record


def select(records, *keys):
    """Those of the records that have all these keys: the marks of a kind."""
    return {name: record for name, record in records.items() if all(key in record for key in keys)}


def runs_of(records):
    return select(records, "adapt")


def trials_of(records):
    return select(records, "systems", "metric")


def improvements_of(records):
    return select(records, "adapted", "intervals")


def benchmarks_of(records):
    return select(records, "served", "tasks")


def dig(record, *keys):
    """An entry within entries; None if there is none."""
    for key in keys:
        record = record.get(key) if isinstance(record, dict) else None
    return record


# What a record is about


def glue_task(record):
    """The GLUE task of a run or a trial; None for E2E."""
    kind, *name = record["task"].split(",")[0].split()
    return glue.TASKS[name[0]] if kind == "glue" else None


def task_title(record):
    task = glue_task(record)
    return "E2E" if task is None else task.folder


@functools.cache
def embedded_fingerprints():
    folders = [REPOSITORY / name for name in EMBEDDED_DATA]
    return {sha256(path) for folder in folders for path in folder.rglob("*.t*") if path.is_file()}


def has_synthetic_data(record):
    """Whether a grammar made the data: by their place, if they were remade since, and by their fingerprints."""
    files = {entry["sha256"] for entry in record.get("data", {}).values()}
    return record["configuration"]["data_dir"] in EMBEDDED_DATA or bool(files & embedded_fingerprints())


def is_synthetic(record):
    return has_synthetic_data(record) or record["configuration"]["model"] in EMBEDDED_MODELS


def group_of(record):
    """The task, the base and the data, in words: only what agrees in these stands in one table."""
    return f"{task_title(record)}, {base_and_data(record)}"


def base_and_data(record):
    settings = record["configuration"]
    mark = f" ({SYNTHETIC_BASE})" if settings["model"] in EMBEDDED_MODELS else ""
    data = SYNTHETIC_DATA if has_synthetic_data(record) else f"data from outside: {settings['data_dir']}"
    return f"base {settings['model']}{mark}, {data}"


def settings_title(settings, adapt):
    """A method with what was chosen for it."""
    title = METHODS[adapt]
    if adapt == "lora":
        targets = {None: "query and value", "all-linear": "all linear layers"}
        named = settings["target_modules"]
        title += f" r={settings['lora_dim']}, alpha={settings['lora_alpha']:g}, {targets.get(named, named)}"
    return title if settings.get("lr") is None else f"{title}, lr {settings['lr']:g}"


def device_title(record):
    environment = record["environment"]
    count = environment["threads"]
    threads = f", {count} thread{'s' * (count > 1)}" if environment["device"] == "cpu" else ""
    return f"{environment['device']}{threads}, {record['configuration']['precision']}"


def scored_on(record):
    counts = record["counts"]
    return f"{counts['test_meanings']:,} meanings" if "test_meanings" in counts else f"{counts['dev lines']:,} lines"


def score_kinds(record, main=False):
    """{key: Score} of what a run is scored by; of the main ones alone, for GLUE those of the task."""
    task = glue_task(record)
    if task is None:
        return MAIN_E2E if main else E2E
    found = {}
    for split in [split for split in record["data"] if split.startswith("dev")]:
        suffix = {"dev": "", "dev_mismatched": ", mismatched"}[split]
        scored = dig(record, "after", split) or dig(record, "systems", "lora", "scores") or task.metrics
        for metric in task.metrics if main else scored:
            found[f"{split} {metric}"] = Score(glue.METRICS[metric] + suffix, 100)
    return found


def scores(record, when="after"):
    """{key of score_kinds: value} of a run; when="majority" for a GLUE task's guess."""
    found = record.get(when, {})
    if glue_task(record) is None:
        return found
    return {f"{split} {name}": value for split, values in found.items() for name, value in values.items()}


def score_of(system, key):
    """The score of a system of a trial, with its mean, under a key of score_kinds; None for other dev sets."""
    split, metric = key.split()
    return system["scores"].get(metric) if split == "dev" else None


# Pairs


def likeness(record):
    """Everything in which the two runs of a pair agree."""
    start = {"adapter to begin with": record.get("init_adapter")}
    return {"task": record["task"], **runs.facts(record, THE_METHOD), **start}


def in_what_they_differ(records, one, other):
    """The differences beside the method, as a text that is empty if there are none."""
    return runs.differences(likeness(records[one]), likeness(records[other]))


def pairs(records):
    """[(name of a run of LoRA, name of one of full fine-tuning)] of all that differ in the method alone."""
    lora, full = (
        [name for name, record in runs_of(records).items() if record["adapt"] == adapt] for adapt in ("lora", "full")
    )
    return [(one, other) for one in lora for other in full if not in_what_they_differ(records, one, other)]


def require_pair(records, names):
    """(LoRA, full) of two result files named in either order; a UserError says why they are no pair."""
    names = [Path(name).name.removesuffix(".json") for name in names]
    found = runs_of(records)
    for name in names:
        if name not in found:
            raise UserError(f"--pair {name}: no run of that name; there are {', '.join(found) or 'none'}")
    by_method = {found[name]["adapt"]: name for name in names}
    if by_method.keys() != {"lora", "full"}:
        kinds = ", ".join(f"{name} is {METHODS[found[name]['adapt']]}" for name in names)
        raise UserError(f"--pair {' '.join(names)}: must be one run of LoRA and one of full fine-tuning; {kinds}")
    pair = by_method["lora"], by_method["full"]
    differing = in_what_they_differ(records, *pair)
    if differing:
        raise UserError(f"--pair {' '.join(names)}: they differ in more than the method: {differing}")
    return pair


def without_pair(records):
    """{run: (the run of the other method that is most like it, in what they differ)} of those that have no pair."""
    paired = {name for pair in pairs(records) for name in pair}
    found = runs_of(records)
    alone = {}
    for name, record in found.items():
        other = {"lora": "full", "full": "lora"}.get(record["adapt"])
        if name in paired or other is None:
            continue
        candidates = [
            (in_what_they_differ(records, name, candidate), candidate)
            for candidate, facts in found.items()
            if facts["adapt"] == other and group_of(facts) == group_of(record)
        ]
        differing, nearest = min(candidates, key=lambda found: len(found[0]), default=(None, None))
        alone[name] = nearest, differing
    return alone


def pair_title(records, pair):
    lora, full = (records[name] for name in pair)
    steps = f"{lora['history'][-1]['step']:,} steps of {lora['configuration']['batch_size']}"
    return f"{group_of(lora)}\n{steps}, scored on {scored_on(lora)}, {device_title(lora)}"


def pair_sources(records, pair):
    lines = []
    for title, name in zip(("LoRA", "full"), pair, strict=True):
        record = records[name]
        commit = (record["environment"]["commit"] or "unknown")[:7]
        what = settings_title(record["configuration"], record["adapt"])
        lines.append(f"{title}: {name}.json ({what}, commit {commit})")
    return lines


# Cells that are empty


class Gaps:
    """The commands that would fill the empty cells of a report, numbered in the order of their cells."""

    def __init__(self):
        self.commands = []

    def cell(self, command):
        if command not in self.commands:
            self.commands.append(command)
        return f"not measured [{self.commands.index(command) + 1}]"

    def block(self):
        """[(title, no table, lines)] for `show`; empty if nothing is missing."""
        if not self.commands:
            return []
        where = "from the folder that holds examples/ (records name a folder elsewhere without its path)"
        numbered = [f"[{number}] {command}" for number, command in enumerate(self.commands, start=1)]
        return [(f"What is not measured, and the command for it, {where}", [], numbered)]


def shipped(task):
    """What a record of a task says of the model and the data that ship here."""
    folder = "NLG" if task == "e2e" else "NLU"
    return {"task": task, "configuration": {"model": f"examples/{folder}/model", "data_dir": f"examples/{folder}/data"}}


def shipped_command(record):
    """The command that measures LoRA and full fine-tuning on the model and the data that ship here."""
    return NLG_COMPARISON if glue_task(record) is None else NLU_BENCHMARK


def is_shipped(record):
    """Whether --run can measure more of its kind: the model and the data are those here."""
    settings = record["configuration"]
    return settings["model"] in EMBEDDED_MODELS and settings["data_dir"] in EMBEDDED_DATA


def command(script, **options):
    """A command line; options that are None or False are left out."""
    words = ["python", f"examples/{script}"]
    for name, value in options.items():
        if value is True:
            words.append(f"--{name}")
        elif value is not None and value is not False:
            words.append(shlex.quote(f"--{name}={value}"))
    return " ".join(words)


NLG_COMPARISON = command("NLG/compare_lora_vs_full.py", record="nlg_compare")
# The texts of its runs, made again if they are not there, while the records that ship stay as they are.
NLG_TEXTS = command("NLG/compare_lora_vs_full.py", reuse=True)
NLU_BENCHMARK = command("NLU/benchmark_multi_task.py", record="nlu_multi_task")


def script_of(record):
    """The script that wrote a run, a trial or an improvement."""
    if not is_run(record):
        return f"{'NLG' if glue_task(record) is None else 'NLU'}/evaluate_lora_improvement.py"
    return "NLG/run_training.py" if glue_task(record) is None else "NLU/run_training_nlu.py"


def remake(name, record, adapt=None):
    """The command that writes a result file again or, with `adapt`, a run like it by another method."""
    settings = {key: value for key, value in record["configuration"].items() if key not in ("output_dir", "resume")}
    if adapt is None:
        known = [line for line, names in measurements().items() if name in names]
        return known[0] if known else command(script_of(record), **{**settings, "record": name})
    left_out = {"lr", "skip_base"} | (runs.LORA_KNOBS if adapt != "lora" else set())
    if adapt == "full":
        left_out.add("base_dtype")
    settings = {key: value for key, value in settings.items() if key not in left_out}
    start = name.removesuffix("_lora").removesuffix("_full").removesuffix("_head")
    record_name = f"{start}_{'base' if adapt == 'none' else adapt}"
    return command(script_of(record), **{**settings, "adapt": adapt, "record": record_name})


def trial_command(record):
    """The command of head, LoRA and full fine-tuning on a GLUE task, with their spread over seeds."""
    settings, task = record["configuration"], glue_task(record).name
    kept = ("model", "data_dir", "num_epochs", "max_steps", "seq_len", "precision")
    options = {} if is_shipped(record) else {key: settings[key] for key in kept}
    name = f"nlu_{Path(settings['model']).name}_{task}" if options else f"nlu_{task}"
    return command("NLU/evaluate_lora_improvement.py", task=task, **options, seeds=3, record=name)


def spread_command(records, pair):
    """The command of the intervals of a pair on E2E, from the texts that the two runs left."""
    name = f"{pair[0]}_against_full"
    for line, names in measurements().items():
        if name in names:
            return line
    lora, full = (records[run]["configuration"] for run in pair)
    kept = {key: lora[key] for key in ("data_dir", "test_file")}
    return intervals_command(full["output_dir"], lora["output_dir"], record=name, **kept)


def intervals_command(base, adapted, **options):
    texts = {"base_texts": f"{base}/test_texts.jsonl", "adapted_texts": f"{adapted}/test_texts.jsonl"}
    return command("NLG/evaluate_lora_improvement.py", **texts, **options)


def measurements():
    """{command: the result files it writes} of all that is measured on the models and the data that ship here."""
    spread, output = "nlg_compare_lora_against_full", "examples/NLG/output/compare"
    intervals = intervals_command(f"{output}/full", f"{output}/lora", data_dir=EMBEDDED_DATA[0], record=spread)
    benchmark = [f"nlu_multi_task_{task}_{method}" for task in glue.TASKS for method in ("lora", "full")]
    return {
        NLG_COMPARISON: ["nlg_compare", *(f"nlg_compare_{run}" for run in ("base", "lora", "full"))],
        f"{NLG_TEXTS} && {intervals}": [spread],
        NLU_BENCHMARK: ["nlu_multi_task", *benchmark],
        **{trial_command(shipped(f"glue {task}")): [f"nlu_{task}"] for task in glue.TASKS},
    }


def measure_missing(records):
    """Run what writes the result files that are missing, after saying how long such runs took before."""
    for line, names in measurements().items():
        missing = [name for name in names if name not in records]
        if not missing:
            print(f"all there: {line}")
            continue
        print(f"missing: {', '.join(f'{name}.json' for name in missing)}\nrunning: {line}")
        print(how_long(records, line), flush=True)
        for words in map(shlex.split, line.split(" && ")):
            status = subprocess.run([sys.executable, *words[1:]], cwd=REPOSITORY).returncode
            if status:
                raise UserError(f"{words[1]} ended with status {status}, for the reason above; no more was measured")


def how_long(records, line):
    """What is known of the time that such runs took."""
    folder = line.split("/")[1]  # NLG or NLU
    known = {
        name: record
        for name, record in runs_of(records).items()
        if record["configuration"]["model"] == f"examples/{folder}/model" and dig(record, "seconds", "total")
    }
    if not known:
        return "how long it takes is not known: no result file has such a run"
    times = [f"{name}.json {known[name]['seconds']['total']:.0f} s ({device_title(known[name])})" for name in known]
    return f"single runs of it took: {', '.join(times)}"


def steps_in_turn(records, pair):
    """(Name of the comparison that these two runs are of, its steps in turn); None twice if there is none."""
    for name, record in select(records, "steps_in_turn").items():
        if pair == (f"{name}_lora", f"{name}_full") and record["steps_in_turn"]:
            return name, record["steps_in_turn"]
    return None, None


def turns_command(records, pair):
    """The command that times the steps of both methods in turn, and makes the two runs anew."""
    lora, full = (records[name]["configuration"] for name in pair)
    left_out = runs.METHOD_KNOBS | runs.PLACE_KNOBS | {"resume", "patience"}
    settings = {key: value for key, value in lora.items() if key not in left_out}
    rates = {"lr_lora": lora["lr"], "lr_full": full["lr"]}
    name = pair[0].removesuffix("_lora")
    return command("NLG/compare_lora_vs_full.py", **settings, **rates, record=name)


# Spread


def interval_sources(records, run):
    """{name of an improvement: its system} of those whose texts scored as this run's, on the same test file."""
    found, test = scores(run), dig(run, "data", "test", "sha256")
    return {
        name: system
        for name, record in improvements_of(records).items()
        if dig(record, "data", "test", "sha256") == test
        for system in ("base", "adapted")
        if all(_equal(record[system].get(key), found.get(key)) for key in WITH_INTERVALS)
    }


def _equal(one, other):
    return one == other if one is None or other is None else math.isclose(one, other, rel_tol=1e-9)


# Reports


def score_text(kind, found, key, gaps, name, record):
    """A cell of a score; one that is not defined, such as the correlation of a constant, needs no measuring."""
    value = found.get(key)
    if value is not None:
        return kind.text(value)
    return "undefined" if key in found and glue_task(record) else gaps.cell(remake(name, record))


def mean_text(kind, score):
    """A cell of a score of a trial: the mean over its seeds and their standard deviation."""
    if score is None:
        return "-"  # a trial scores on the first dev set alone
    if score["mean"] is None:
        return "undefined"
    deviation = "" if score["deviation"] is None else f" +- {kind.text(score['deviation'])}"
    return kind.text(score["mean"]) + deviation


def with_direction(kind):
    return f"{kind.title} (less is better)" if kind.sign < 0 else kind.title


def no_pairs(records, gaps):
    """Blocks of what is not compared: runs that are alone, and what ships here and has not been measured."""
    blocks, lines = [], []
    for name, (nearest, differing) in without_pair(records).items():
        why = f"{nearest}.json differs in {differing}" if nearest else "there is no run of the other method"
        lines.append(f"{name}.json ({METHODS[records[name]['adapt']]}): {why}")
    if lines:
        blocks.append(("Not compared", [], lines))
    measured = {group_of(records[lora]) for lora, _ in pairs(records)}
    rows = [["task", "LoRA", "full"]]
    for task in SHIPPED_TASKS:
        record = shipped(task)
        if group_of(record) not in measured:
            rows.append([task_title(record), *[gaps.cell(shipped_command(record))] * 2])
    title = f"No pair of runs on the models and the data that ship here, which are {SYNTHETIC_BASE}"
    return blocks + ([(title, rows, [])] if len(rows) > 1 else [])


def show(blocks):
    """Print [(title, lists of cells, lines below)], with an empty line between."""
    for title, rows, lines in blocks:
        print(f"\n{title}")
        if rows:
            print(f"\n{tables.aligned(rows)}", end="")
        for line in lines:
            print(line)
