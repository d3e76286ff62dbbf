"""The result files: which kinds there are, what each is about, and its scores.

A run is the record of a training script (it has "adapt"). A trial is that of NLU's evaluate_lora_improvement.py: head,
LoRA and full, with seeds. An improvement is that of NLG's: intervals of the scores of two systems.
"""

import functools
import json
from pathlib import Path
from typing import NamedTuple

from common.cli import UserError
from common.data import glue
from common.files import REPOSITORY, sha256
from common.records import runs

METHODS = {"none": "base", "head": "head alone", "lora": "LoRA", "full": "full fine-tuning"}
# What two runs of a pair may differ in: each method has its own learning rate.
THE_METHOD = {"adapt", "lr"}
EMBEDDED_DATA = ("examples/NLG/data", "examples/NLU/data")
EMBEDDED_MODELS = ("examples/NLG/model", "examples/NLU/model")
# Marks in titles: what a grammar made, and what was pretrained on such text.
SYNTHETIC_DATA, SYNTHETIC_BASE = "SYNTHETIC data that ship here", "SYNTHETIC"


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
        for key, title, factor, digits in SCORES
    },
    "sacrebleu": Score("BLEU, cased"),
    "distinct_1": Score("distinct 1", digits=3, sign=0),
    "distinct_2": Score("distinct 2", digits=3, sign=0),
    "perplexity": Score("perplexity", digits=3, sign=-1),
}
WITH_INTERVALS = [key for key, *_ in SCORES]  # those of text_scores.bootstrap
MAIN_E2E = {key: E2E[key] for key in ("bleu", "nist", "meteor", "rouge_l", "cider", "slot_error_rate")}


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
                runs.facts(record)
                if record.get("first_step"):  # it was stopped and resumed: they are of the last part
                    record["seconds"].update(train=None, total=None)
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


def is_shipped(record):
    """Whether --run can measure more of its kind: the model and the data are those here."""
    settings = record["configuration"]
    return settings["model"] in EMBEDDED_MODELS and settings["data_dir"] in EMBEDDED_DATA


def place(record):
    """The place of a record among others: what ships here first, in the order of the tasks, then of the bases."""
    task = glue_task(record)
    number = -1 if task is None else list(glue.TASKS).index(task.name)
    return not has_synthetic_data(record), number, group_of(record)


def group_of(record):
    """The task, the base and the data, in words: only what agrees in these stands in one table."""
    return f"{task_title(record)}, {base_and_data(record)}"


def base_and_data(record):
    settings = record["configuration"]
    mark = f" ({SYNTHETIC_BASE})" if settings["model"] in EMBEDDED_MODELS else ""
    data = SYNTHETIC_DATA if has_synthetic_data(record) else f"data from outside: {settings['data_dir']}"
    return f"base {settings['model']}{mark}, {data}"


def targets_title(settings):
    names = {None: "query and value", "query-value": "query and value", "all-linear": "all linear layers"}
    return names.get(settings["target_modules"], settings["target_modules"])


def settings_title(settings, adapt):
    """A method with what was chosen for it."""
    title = METHODS[adapt]
    if adapt == "lora":
        title += f" r={settings['lora_dim']}, alpha={settings['lora_alpha']:g}, {targets_title(settings)}"
        if settings.get("base_dtype", "float32") != "float32":  # the first records are from before --base_dtype
            title += f", base in {settings['base_dtype']}"
    return title if settings.get("lr") is None else f"{title}, lr {settings['lr']:g}"


def device_title(record):
    environment = record["environment"]
    count = environment["threads"]
    threads = f", {count} thread{'s' * (count > 1)}" if environment["device"] == "cpu" else ""
    return f"{environment['device']}{threads}, {record['configuration']['precision']}"


def scored_on(record):
    counts = record["counts"]
    return f"{counts['test_meanings']:,} meanings" if "test_meanings" in counts else f"{counts['dev lines']:,} lines"


def test_fingerprint(record):
    """The beginnings of the fingerprints of what was scored on."""
    files = [entry["sha256"] for split, entry in record["data"].items() if split not in ("train", "valid", "tune")]
    return ", ".join(digest[:8] for digest in files)


def is_whole(record):
    """Whether the whole test set was scored, or the whole dev sets of a GLUE task."""
    return record["configuration"].get("max_eval_samples") is None


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


def main_kind(record):
    """(Key, `Score`) of the one score by which a task is known: BLEU, or the first metric of a GLUE task."""
    return next(iter(score_kinds(record, main=True).items()))


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
