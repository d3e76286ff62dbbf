"""What is left of a full fine-tune in an adapter of rank 1, 2, 4, ...: scores of both on the same test set.

    cd examples/benchmarks
    python extraction.py
    python extraction.py --tasks e2e --ranks 4,64 --reuse
    python extraction.py --record extraction

Trains all parameters of the models that ship here on the data that ships here (run_training.py and run_training_nlu.py
with --adapt full), takes the adapter of each rank that comes nearest to the change (lora.extract_lora), and scores the
base, each adapter and the full fine-tune: E2E on the test meanings, GLUE tasks on the dev set. The first command takes
about ten minutes on 2 CPU cores. Written to --output_dir: extraction.json, the folder of each training, which --reuse
takes the next time, and in it the adapters.
"""

import os
import sys
from dataclasses import dataclass
from pathlib import Path

# Read when torch loads: how long its threads spin while they wait. By default so long that beside another busy process
# a small model's steps take many times longer; with no spinning at all (OMP_WAIT_POLICY=PASSIVE) they are slow alone.
os.environ.setdefault("GOMP_SPINCOUNT", "30000")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # examples/, for the package common
sys.path.insert(1, str(Path(__file__).resolve().parents[1] / "NLG"))  # for run_training
sys.path.insert(2, str(Path(__file__).resolve().parents[1] / "NLU"))  # for run_training_nlu
sys.path.insert(3, str(Path(__file__).resolve().parents[2]))  # this checkout's loralib

import run_training
import run_training_nlu
import torch
from common.cli import UserError, fill_in, knob, make_output_folder, parse_knobs, require_positive, run
from common.data import glue
from common.models import causal_lm
from common.models import sequence_classification as classification
from common.records import results, runs
from common.reports import tables

import loralib as lora

HERE = Path(__file__).resolve().parent
EXAMPLES = HERE.parent
CPU = torch.device("cpu")


@dataclass
class Knobs:
    tasks: str = knob("e2e,cola,mrpc", "e2e and tasks of GLUE, comma separated")
    ranks: str = knob("1,2,4,8,16,32", "of the adapters, comma separated")
    max_steps: int | None = knob(None, "of each training; all epochs if not given")
    max_eval_samples: int | None = knob(None, "score on so many meanings or lines")
    reuse: bool = knob(False, "take the trainings that are in --output_dir already")
    output_dir: str = knob(str(HERE / "output" / "extraction"), "folder for what is written")
    record: str | None = knob(None, "name under which examples/results/ gets the record, too")


class E2E:
    """The base and the full fine-tune for E2E, and how they are scored."""

    script = EXAMPLES / "NLG" / "run_training.py"

    def __init__(self, name, given):
        given |= {"lr": run_training.LEARNING_RATES["fast"]["full"], "skip_base": True}
        self.knobs = fill_in(run_training.Knobs, given, run_training.PRESETS)
        self.files = run_training.find_files(self.knobs)
        self.test = run_training.load_data(self.knobs)[2]

    def load(self, folder=None):
        model, self.tokenizer = causal_lm.load_causal_lm(folder or self.knobs.model, CPU)
        return model

    def score(self, model):
        return run_training.evaluate(model, self.tokenizer, self.test, self.knobs)[0]


class Glue:
    """The same for a task of GLUE."""

    script = EXAMPLES / "NLU" / "run_training_nlu.py"

    def __init__(self, name, given):
        self.task = glue.task_of(name)
        given |= {"task": name, "lr": run_training_nlu.LEARNING_RATES["full"]}
        self.knobs = fill_in(run_training_nlu.Knobs, given, run_training_nlu.presets)
        self.files = glue.find_files(self.knobs.data_dir, self.task)
        self.dev = run_training_nlu.load_data(self.task, self.knobs)["dev"]

    def load(self, folder=None):
        model, self.tokenizer, *_ = classification.load(folder or self.knobs.model, self.task, CPU, self.knobs.seed)
        return model

    def score(self, model):
        samples = run_training_nlu.encode_examples(self.dev, self.tokenizer, self.knobs.seq_len)
        return run_training_nlu.evaluate(model, samples, self.tokenizer, self.task, self.knobs)[0]


def measure(task, ranks, reuse):
    """Scores and sizes of the base, of the adapter of each rank, and of the full fine-tune, which is made first."""
    folder = Path(task.knobs.output_dir)
    full = runs.make_all(task.script, {"full fine-tuning": task.knobs}, task.files, reuse)["full fine-tuning"]
    tuned = task.load(str(folder / "model"))
    found = {"base": {"scores": task.score(task.load())}, "ranks": {}}
    for r in ranks:
        model = task.load()
        extraction = lora.extract_lora(model, tuned, r=r)
        file = folder / f"extracted_{r}.safetensors"
        lora.save_lora(model, file)
        found["ranks"][str(r)] = {
            "scores": task.score(model),
            "energy": extraction.energy,
            "layers": {name: layer._asdict() for name, layer in extraction.layers.items()},
            "bytes": file.stat().st_size,
        }
        print(f"rank {r}: holds {extraction.energy:.1%} of the change")
    found["full"] = {"scores": task.score(tuned), "bytes": full["bytes"]["checkpoint"]}
    return found


def check(knobs):
    """(tasks, ranks); raise a UserError for others than there are."""
    require_positive(knobs, "max_steps", "max_eval_samples")
    tasks = knobs.tasks.split(",")
    for name in tasks:
        if name != "e2e" and name not in glue.TASKS:
            raise UserError(f"--tasks {name}: must be one of e2e, {', '.join(glue.TASKS)}")
    if not all(rank.isdigit() and int(rank) for rank in knobs.ranks.split(",")):
        raise UserError(f"--ranks {knobs.ranks}: must be positive numbers, comma separated")
    return tasks, [int(rank) for rank in knobs.ranks.split(",")]


def measure_all(knobs):
    """Train, extract, score, print, write and return the record."""
    tasks, ranks = check(knobs)
    output_dir = make_output_folder(knobs.output_dir)
    record = {"task": "extraction", "configuration": results.configuration(knobs), "extracted": {}}
    record["environment"] = results.environment(CPU)
    for name in tasks:
        given = {"adapt": "full", "device": "cpu", "output_dir": str(output_dir / name)}
        given |= {"max_steps": knobs.max_steps, "max_eval_samples": knobs.max_eval_samples}
        task = (E2E if name == "e2e" else Glue)(name, given)
        record["extracted"][name] = measure(task, ranks, knobs.reuse)
    results.write_json(output_dir / "extraction.json", record)
    if knobs.record:
        results.write_json(results.RESULTS / f"{knobs.record}.json", record)
    print(tables.aligned(tables.in_lists(tables.extraction_rows(record))))
    print(f"written to {output_dir}: extraction.json")
    return record


def main():
    measure_all(parse_knobs(Knobs, __doc__))


if __name__ == "__main__":
    run(main)
