"""Where LoRA equals full fine-tuning: loss against learning rate, by targets, rank and batch size.

    cd examples/benchmarks
    python when_lora_equals_full.py
    python when_lora_equals_full.py --model minilm-l6 --data_dir ~/glue --precision bf16 --record when_lora_equals_full

Puts four claims of "LoRA Without Regret" (Schulman et al. 2025) to the test: adapt all layers; the best rate is about
ten times that of full fine-tuning, whatever the rank; larger batches cost LoRA more; the curves part when the adapter
is full. The first command trains the encoder that ships here on a small file, in about five minutes on 2 CPU cores;
the second is the record in examples/results, about half an hour on one core. The loss is that of lines held out from
the training file; the dev file is not read. Every point of a curve passes once over the same lines. A curve begins with
three rates and goes on to lower or higher ones until the best has a neighbour on both sides; other seeds then repeat
the best. The long runs pass once over --long_lines, at the best rate of the smaller batch.

Written to --output_dir: points.json, from which the same command goes on after a stop, and when_lora_equals_full.json.
"""

import json
import math
import os
import random
import statistics
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

# Read when torch loads: how long its threads spin while they wait (see run_benchmarks.py).
os.environ.setdefault("GOMP_SPINCOUNT", "30000")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # examples/, for the package common
sys.path.append(str(Path(__file__).resolve().parents[1] / "NLU"))  # last: NLG has scripts of the same names
sys.path.insert(2, str(Path(__file__).resolve().parents[2]))  # this checkout's loralib

import run_training_nlu
import torch
from common import stopping
from common.cli import UserError, knob, make_output_folder, parse_knobs, require_positive, run
from common.data import glue
from common.models import sequence_classification as classification
from common.records import results
from common.reports import tables
from common.training import compute, loop
from tqdm import tqdm

import loralib as lora

HERE = Path(__file__).resolve().parent
CPU = torch.device("cpu")
NAME = "when_lora_equals_full"
# The rates that a curve may have, and those that it begins with.
LADDER = [float(f"{digit}e{power}") for power in range(-6, 0) for digit in (1, 3)]
START = {"lora": (3e-4, 1e-3, 3e-3), "full": (3e-5, 1e-4, 3e-4)}
VALIDATIONS = 8  # of a long run
# What may differ between runs that share their points.
FREE_TO_CHANGE = {"ranks", "batch_sizes", "lines", "long_lines", "seeds", "output_dir", "record"}


@dataclass
class Knobs:
    task: str = knob("sst2", "of GLUE", glue.TASKS)
    model: str = knob(run_training_nlu.Knobs.model, "folder or hub name of an encoder")
    data_dir: str = knob(run_training_nlu.Knobs.data_dir, "folder of the GLUE folders")
    ranks: str = knob("1,8,64", "of the adapters, comma separated")
    lora_alpha: float = knob(32.0, "the update is scaled by lora_alpha / r; the paper's")
    batch_sizes: str = knob("16,64", "the smaller and the larger")
    lines: int = knob(3072, "to train on for a point, or as many as are left if the file has fewer")
    long_lines: int = knob(12288, "to train on in a long run, likewise")
    held_out: int = knob(1024, "lines of the training file that the loss is of; at most a quarter of the file")
    seeds: int = knob(3, "runs at the best rate of each curve")
    seq_len: int = knob(32, "most tokens of a line; longer ones are cut")
    precision: str = knob("fp32", "of the matrix products (autocast)", compute.PRECISIONS)
    threads: int = knob(1, "of the CPU")
    output_dir: str = knob(str(HERE / "output" / NAME), "folder for what is written")
    record: str | None = knob(None, "name under which examples/results/ gets the record, too")


class Method(NamedTuple):
    """What trains: adapters of a rank, or all parameters if it has none."""

    targets: str | None
    r: int | None

    @property
    def adapt(self):
        return "lora" if self.r else "full"

    @property
    def title(self):
        return f"{self.targets}, r={self.r}" if self.r else "full fine-tuning"


class Curve(NamedTuple):
    method: Method
    batch_size: int
    losses: dict[float, float]  # of the first seed, by rate


FULL = Method(None, None)
TARGETS = {"query and value": None, "all linear layers": "all-linear"}


class Bench:
    """The data, and the points that have been measured so far; each is written at once."""

    def __init__(self, knobs, output_dir):
        self.knobs, self.task = knobs, glue.task_of(knobs.task)
        self.file = glue.find_files(knobs.data_dir, self.task)["train"]
        examples = glue.read_examples(self.file, self.task)
        random.Random(0).shuffle(examples)
        held_out = min(knobs.held_out, len(examples) // 4)
        tokenizer = classification.load(knobs.model, self.task, CPU).tokenizer
        wanted = examples[: held_out + max(knobs.lines, knobs.long_lines)]
        samples = run_training_nlu.encode_examples(wanted, tokenizer, knobs.seq_len)
        self.held_out, self.samples = samples[:held_out], samples[held_out:]
        self.path = output_dir / "points.json"
        self.identity = {
            "configuration": {k: v for k, v in results.configuration(knobs).items() if k not in FREE_TO_CHANGE},
            "data": results.fingerprints({"train": self.file}),
            "base": results.weights_fingerprint(knobs.model),
            "environment": results.environment(CPU),
        }
        self.points = self._read() if self.path.is_file() else {}
        self.bar = tqdm(desc="points", unit="point")

    def _read(self):
        try:
            state = json.loads(self.path.read_text(encoding="utf-8"))
            differing = [name for name, value in self.identity.items() if state["identity"][name] != value]
            points = state["points"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{self.path}: cannot be read ({error!r}); give another --output_dir") from error
        if differing:
            raise UserError(f"{self.path} has points of another {', '.join(differing)}; give another --output_dir")
        print(f"{len(points)} points are taken from {self.path}")
        return points

    def point(self, method, batch_size, rate, seed=0, lines=None, validations=1):
        """{"trained": parameters, "losses": [[lines seen, held-out loss]]}, no losses if the training diverged."""
        samples = self.samples[: lines or self.knobs.lines]
        key = f"{method.title}, batch {batch_size}, rate {rate:g}, seed {seed}, {len(samples)} lines"
        key += f", {validations} validations" * (validations > 1)
        if key not in self.points:
            self.points[key] = self._measure(method, batch_size, rate, seed, samples, validations)
            results.write_json(self.path, {"identity": self.identity, "points": self.points})
            last = self.points[key]["losses"][-1:]
            tqdm.write(f"{key}: " + (f"{last[0][1]:.4f}" if last else "diverged"))
        self.bar.update()
        return self.points[key]

    def _measure(self, method, batch_size, rate, seed, samples, validations):
        steps = math.ceil(len(samples) / batch_size)
        knobs = run_training_nlu.Knobs(
            **{"task": self.task.name, "adapt": method.adapt, "lora_dim": method.r},
            **{"target_modules": TARGETS.get(method.targets), "seed": seed, "lr": rate, "num_epochs": 1},
            **{"batch_size": batch_size, "eval_batch_size": 256, "eval_every": math.ceil(steps / validations)},
            **{"precision": self.knobs.precision, "lora_alpha": self.knobs.lora_alpha},
        )
        model, tokenizer, heads, _ = classification.load(self.knobs.model, self.task, CPU, seed)
        run_training_nlu.adapt_model(model, heads, knobs)
        found = {"trained": lora.count_parameters(model).trainable, "losses": []}
        task = classification.training_task(self.task, tokenizer)
        with tempfile.TemporaryDirectory() as folder:
            try:
                outcome = loop.train(model, task, samples, self.held_out, knobs, Path(folder) / "state.pt", {})
            except stopping.Stopped as stop:
                again = f"stopped; the same command goes on from the points in {self.path}"
                raise stopping.Stopped(stop.signum, again) from stop
            except loop.NotFinite as error:  # of a rate that is too high
                tqdm.write(str(error))
                return found
        seen = [[min(entry["step"] * batch_size, len(samples)), entry["valid_loss"]] for entry in outcome.history]
        return {**found, "losses": seen}


def measure_losses(bench, method, batch_size):
    """{rate: loss}, with a higher loss on both sides of the lowest as far as the ladder goes."""
    losses = {}
    rates = list(START[method.adapt])
    while rates:
        for rate in rates:
            found = bench.point(method, batch_size, rate)["losses"]
            losses[rate] = found[-1][1] if found else math.inf
        best, tried = min(losses, key=losses.get), [LADDER.index(rate) for rate in losses]
        place = LADDER.index(best)
        rates = [LADDER[end] for end in (place - 1, place + 1) if 0 <= end < len(LADDER) and end not in tried]
        bench.bar.total += len(rates)
    return dict(sorted(losses.items()))


def measure_all(knobs):
    """Measure what is not there yet, print, write and return the record."""
    methods, batch_sizes = check(knobs)
    output_dir = make_output_folder(knobs.output_dir)
    torch.set_num_threads(knobs.threads)
    bench = Bench(knobs, output_dir)
    # Of query and value the smallest adapter alone runs long: it is the first to be full.
    narrow = [method for method in methods[1:] if method.targets == methods[0].targets]
    bench.bar.total = len(methods) * 2 * (len(START["lora"]) + knobs.seeds) + len(methods) - len(narrow)
    curves = [
        Curve(method, batch_size, measure_losses(bench, method, batch_size))
        for batch_size in batch_sizes
        for method in methods
    ]
    long_runs = [
        measure_long(bench, curve)
        for curve in curves
        if curve.batch_size == batch_sizes[0] and curve.method not in narrow
    ]
    record = {
        "task": NAME,
        "configuration": results.configuration(knobs),
        "data": bench.identity["data"],
        "base": bench.identity["base"],
        "counts": {
            "train": len(bench.samples[: knobs.lines]),
            "long": len(bench.samples[: knobs.long_lines]),
            "held_out": len(bench.held_out),
        },
        "curves": [repeat_best(bench, curve, knobs.seeds) for curve in curves],
        "long": long_runs,
        "environment": bench.identity["environment"],
    }
    bench.bar.close()
    results.write_json(output_dir / f"{NAME}.json", record)
    if knobs.record:
        results.write_json(results.RESULTS / f"{knobs.record}.json", record)
    print("\n" + tables.aligned(tables.in_lists(tables.regret_rows(record))))
    print(f"written to {output_dir}: {NAME}.json")
    return record


def measure_long(bench, curve):
    rate = min(curve.losses, key=curve.losses.get)
    lines = bench.knobs.long_lines
    found = bench.point(curve.method, curve.batch_size, rate, lines=lines, validations=VALIDATIONS)
    if not found["losses"]:
        raise UserError(f"{curve.method.title} diverged in the long run at rate {rate:g}; give fewer --long_lines")
    return {**curve.method._asdict(), "batch_size": curve.batch_size, "rate": rate, **found}


def repeat_best(bench, curve, seeds):
    """The curve as the record has it, its best rate with other seeds."""
    best = min(curve.losses, key=curve.losses.get)
    found = [bench.point(curve.method, curve.batch_size, best, seed) for seed in range(seeds)]
    ends = [each["losses"][-1][1] for each in found if each["losses"]]
    whole = len(ends) == seeds  # of the others a mean would leave out the worst
    return {
        **curve.method._asdict(),
        "batch_size": curve.batch_size,
        "trained": found[0]["trained"],
        "points": [[rate, loss if math.isfinite(loss) else None] for rate, loss in curve.losses.items()],
        "best_rate": best,
        "at_best": ends,
        "mean": statistics.fmean(ends) if whole else None,
        "deviation": statistics.stdev(ends) if whole and seeds > 1 else None,
    }


def check(knobs):
    """(methods, batch sizes); raise a UserError for what cannot be measured, before anything is."""
    require_positive(knobs, "lora_alpha", "lines", "long_lines", "held_out", "seeds", "seq_len", "threads")
    for name in ("ranks", "batch_sizes"):
        value = getattr(knobs, name)
        if not all(number.isdigit() and int(number) for number in value.split(",")):
            raise UserError(f"--{name} {value}: must be positive numbers, comma separated")
    ranks, batch_sizes = (sorted(map(int, text.split(","))) for text in (knobs.ranks, knobs.batch_sizes))
    if len(batch_sizes) != 2:
        raise UserError(f"--batch_sizes {knobs.batch_sizes}: must be two, the smaller and the larger")
    return [*(Method(targets, r) for targets in TARGETS for r in ranks), FULL], batch_sizes


def main():
    measure_all(parse_knobs(Knobs, __doc__))


if __name__ == "__main__":
    run(main)
