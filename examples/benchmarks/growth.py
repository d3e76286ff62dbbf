"""How time and memory grow with the layers of a model, with the adapters in it and with their rank.

    cd examples/benchmarks
    python growth.py
    python growth.py --axes adapters --record benchmark_growth

Some ten minutes on two cores, which it needs for itself. The model is a GPT-2 of width 256 with random weights, query
and value adapted, r=8 and 12 layers where another number is not what grows. Each time is the median of the rounds. An
exponent is the slope between the last two points, both axes logarithmic: 1 means that twice as many cost twice as much,
less that a part of the cost does not grow yet. Written to --output_dir: growth.json, growth.png.

    step    forward, backward and AdamW for 4 x 32 tokens
    inject  one more adapter
    save, load  the active adapter
    switch  to another adapter (there are two at least)
    memory  bytes that the adapters hold and that a forward keeps for its backward
"""

import itertools
import math
import os
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

# Read when torch loads: how long its threads spin while they wait (see run_benchmarks.py).
os.environ.setdefault("GOMP_SPINCOUNT", "30000")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # examples/, for the package common
sys.path.insert(1, str(Path(__file__).resolve().parents[2]))  # this checkout's loralib

import measure
import torch
import transformers
from common.cli import UserError, knob, parse_knobs, require_positive, run
from common.records import results
from common.reports import tables
from tqdm import tqdm

import loralib as lora

HERE = Path(__file__).resolve().parent
CPU = torch.device("cpu")
AXES = {"layers": [12, 25, 50, 100, 200], "adapters": [1, 10, 100, 1000], "rank": [1, 4, 16, 64, 256]}
FIXED = {"layers": 12, "adapters": 1, "rank": 8}
WIDTH = 256


@dataclass
class Knobs:
    axes: str = knob(",".join(AXES), "what grows, comma separated")
    largest: int = knob(1000, "leave out numbers beyond this")
    rounds: int = knob(15, "how often each piece of work is done")
    threads: int = knob(2, "of the CPU")
    allow_busy: bool = knob(False, "measure though the machine does something else, too")
    output_dir: str = knob(str(HERE / "output"), "folder for what is written")
    record: str | None = knob(None, "name under which examples/results/ gets the record, too")


def model_of(layers):
    torch.manual_seed(0)
    ends = {"bos_token_id": 0, "eos_token_id": 0}
    config = transformers.GPT2Config(n_layer=layers, n_embd=WIDTH, n_head=4, vocab_size=512, n_positions=64, **ends)
    return transformers.GPT2LMHeadModel(config)


def measure_point(layers, adapters, rank, rounds, folder):
    """{what: seconds, or bytes of "memory"} of a model with so many layers, and adapters of a rank."""
    model = model_of(layers)
    names = [f"adapter{number}" for number in range(max(adapters, 2))]
    for name in names:
        lora.inject_lora(model, r=rank, adapter_name=name)
    if adapters == 1:
        lora.delete_adapter(model, names[0])
    ids = torch.randint(0, 512, (4, 32))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)

    def forward():
        return model(input_ids=ids, labels=ids).loss

    def step():
        forward().backward()
        optimizer.step()
        optimizer.zero_grad()

    held = sum(parameter.nbytes for parameter in trained) * adapters
    found = {"memory": held + measure.saved_bytes(forward, model)}
    file = Path(folder) / "adapter.safetensors"
    lora.save_lora(model, file)

    def drop(active):
        lora.set_adapter(model, active)
        lora.delete_adapter(model, "one more")

    calls = {
        "step": (step, None),
        "save": (lambda: lora.save_lora(model, file), None),
        "load": (lambda: lora.load_lora(model, file), None),
        "inject": (lambda: lora.inject_lora(model, r=rank, adapter_name="one more"), lambda: drop(names[-1])),
    }
    for what, (call, undo) in calls.items():
        found[what] = timed(call, undo, rounds)
    if adapters == 1:
        lora.inject_lora(model, r=rank, adapter_name="one more")
        names[0] = "one more"
    turn = itertools.cycle([names[0], names[-1]])
    found["switch"] = timed(lambda: lora.set_adapter(model, next(turn)), None, rounds)
    return found


def timed(call, undo, rounds):
    times = []
    for _ in range(rounds + 1):
        times.append(measure.seconds(call, 1, CPU))
        if undo:
            undo()
    return measure.spread(times[1:])["median"]  # the first loads what is loaded once


def exponents(numbers, points):
    """{what: slope between the last two points}, both axes logarithmic."""
    wide = math.log(numbers[-1] / numbers[-2])
    return {what: math.log(points[-1][what] / points[-2][what]) / wide for what in points[-1]}


def check(knobs):
    """The axes; raise a UserError for what cannot be measured, before anything is."""
    require_positive(knobs, "largest", "rounds", "threads")
    axes = knobs.axes.split(",")
    for axis in axes:
        if axis not in AXES:
            raise UserError(f"--axes {axis}: must be one of {', '.join(AXES)}")
        if knobs.largest < AXES[axis][1]:
            raise UserError(f"--largest {knobs.largest}: {axis} are measured at {AXES[axis]}, two of them at least")
    return axes


def plot(record, path):
    import matplotlib  # here: measuring needs none of it

    matplotlib.use("Agg")
    from matplotlib import pyplot

    axes = record["axes"]
    figure, parts = pyplot.subplots(1, len(axes), figsize=(5 * len(axes), 4), layout="constrained", squeeze=False)
    for part, (axis, found) in zip(parts[0], axes.items(), strict=True):
        for what in found["points"][0]:
            values = [point[what] / found["points"][0][what] for point in found["points"]]
            part.plot(found["numbers"], values, "o-", label=what)
        first = found["numbers"][0]
        part.plot(found["numbers"], [number / first for number in found["numbers"]], ":", color="gray", label="linear")
        part.set(xscale="log", yscale="log", xlabel=axis, ylabel="times what the first point takes")
    parts[0][-1].legend(fontsize=8)
    results.write_atomically(path, lambda file: figure.savefig(file, format="png", dpi=120))
    pyplot.close(figure)


def measure_all(knobs):
    """Measure, print, write and return the record."""
    axes = check(knobs)
    record = measure.begin("growth", knobs, CPU)
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for axis in axes:
            numbers = [number for number in AXES[axis] if number <= knobs.largest]
            points = [
                measure_point(**{**FIXED, axis: number}, rounds=knobs.rounds, folder=folder)
                for number in tqdm(numbers, axis, unit="point", leave=False)
            ]
            found[axis] = {"numbers": numbers, "points": points, "exponents": exponents(numbers, points)}
    record["axes"] = found
    plot(record, measure.write(record, knobs, "growth") / "growth.png")
    print(tables.aligned(tables.in_lists(tables.growth_rows(record))))
    return record


def main():
    measure_all(parse_knobs(Knobs, __doc__))


if __name__ == "__main__":
    run(main)
