"""What is not measured: the command for each empty cell of a report, and measuring what ships here.

Nothing else is ever started.
"""

import shlex
import sys
from pathlib import Path

from common.cli import UserError, call
from common.data import glue
from common.files import REPOSITORY
from common.records import runs
from common.reports import reading

SHIPPED_TASKS = ["e2e", *(f"glue {name}" for name in glue.TASKS)]


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
    return NLG_COMPARISON if reading.glue_task(record) is None else NLU_BENCHMARK


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
    if not reading.is_run(record):
        return f"{'NLG' if reading.glue_task(record) is None else 'NLU'}/evaluate_lora_improvement.py"
    return "NLG/run_training.py" if reading.glue_task(record) is None else "NLU/run_training_nlu.py"


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
    settings, task = record["configuration"], reading.glue_task(record).name
    kept = ("model", "data_dir", "num_epochs", "max_steps", "seq_len", "precision")
    options = {} if reading.is_shipped(record) else {key: settings[key] for key in kept}
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
    intervals = intervals_command(f"{output}/full", f"{output}/lora", data_dir=reading.EMBEDDED_DATA[0], record=spread)
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
            status = call([sys.executable, *words[1:]], cwd=REPOSITORY)
            if status:
                raise UserError(f"{words[1]} ended with status {status}, for the reason above; no more was measured")


def how_long(records, line):
    """What is known of the time that such runs took."""
    folder = line.split("/")[1]  # NLG or NLU
    known = {
        name: record
        for name, record in reading.runs_of(records).items()
        if record["configuration"]["model"] == f"examples/{folder}/model" and reading.dig(record, "seconds", "total")
    }
    if not known:
        return "how long it takes is not known: no result file has such a run"
    times = [
        f"{name}.json {run['seconds']['total']:.0f} s ({reading.device_title(run)})" for name, run in known.items()
    ]
    return f"single runs of it took: {', '.join(times)}"


def turns_command(records, pair):
    """The command that times the steps of both methods in turn, and makes the two runs anew."""
    lora, full = (records[name]["configuration"] for name in pair)
    left_out = runs.METHOD_KNOBS | runs.PLACE_KNOBS | runs.NOT_COMPARED
    settings = {key: value for key, value in lora.items() if key not in left_out}
    rates = {"lr_lora": lora["lr"], "lr_full": full["lr"]}
    name = pair[0].removesuffix("_lora")
    return command("NLG/compare_lora_vs_full.py", **settings, **rates, record=name)
