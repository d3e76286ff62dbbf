"""Serve many GLUE tasks from one base with an adapter each, and from a whole model each, and compare what it takes.

    cd examples/NLU
    python benchmark_multi_task.py
    python benchmark_multi_task.py --tasks sst2,rte --reuse
    python benchmark_multi_task.py --model roberta-base --data_dir ~/glue --tasks sst2,mrpc,cola --precision bf16

The first trains all eight tasks on the model and the data that ship here, first an adapter for each and then all
parameters for each, in processes of their own, one after the other. Then a process loads the base once with the eight
adapters, and another the eight whole models, and both answer the dev sets: in turns of one batch of a task after the
other, the worst case for switching, and task after task. Heads have as many outputs as their task has labels; tasks
that differ in this have a head's worth of model of their own around the one encoder that all share.

Written to --output_dir: a folder for each run (lora/sst2, full/sst2, ...), multi_task.json and multi_task.png.
"""

import itertools
import multiprocessing
import os
import statistics
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path

# Read when torch loads: how long its threads spin while they wait. By default so long that beside another busy process
# a small model's steps take many times longer; with no spinning at all (OMP_WAIT_POLICY=PASSIVE) they are slow alone.
os.environ.setdefault("GOMP_SPINCOUNT", "30000")

import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # examples/, for the package common
sys.path.insert(1, str(Path(__file__).resolve().parents[2]))  # this checkout's loralib
import run_training_nlu
from common.cli import UserError, fill_in, knob, make_output_folder, parse_knobs, require_positive, run
from common.data import glue
from common.models import sequence_classification as classification
from common.records import results, runs
from common.scores import glue_scores
from common.training import compute

import loralib as lora

HERE = Path(__file__).resolve().parent
METHODS = {"lora": "one base, adapters", "full": "a model each"}
SCRIPT = HERE / "run_training_nlu.py"
# Switches that are timed, after a round through all tasks.
SWITCHES = 200


@dataclass
class Knobs(compute.ComputeKnobs):
    tasks: str = knob(",".join(glue.TASKS), "what to serve, comma separated")
    model: str = knob(run_training_nlu.Knobs.model, "folder or hub name of the base")
    data_dir: str = knob(run_training_nlu.Knobs.data_dir, "folder of the GLUE folders")
    num_epochs: int = knob(run_training_nlu.Knobs.num_epochs, "passes over each training file")
    max_steps: int | None = knob(None, "stop each training after so many steps, for a quick look")
    lr_lora: float = knob(run_training_nlu.LEARNING_RATES["lora"], "peak learning rate with adapters")
    lr_full: float = knob(run_training_nlu.LEARNING_RATES["full"], "the same for all parameters")
    seq_len: int = knob(run_training_nlu.Knobs.seq_len, "most tokens of the texts of a line together")
    serve_batch_size: int = knob(8, "texts of one task that are answered before the next task's turn")
    rounds: int = knob(3, "passes through all dev sets, of which the medians count")
    output_dir: str = knob(str(HERE / "output" / "multi_task"), "folder for the benchmark and, in it, for each run")
    record: str | None = knob(None, "NAME under which examples/results/ gets it, and NAME_sst2_lora, ... the runs")
    reuse: bool = knob(False, "take the runs that output_dir has already, if they are those that would be made")


def check(knobs):
    """The tasks; raise a UserError for a knob that is out of range, before anything is trained."""
    require_positive(knobs, "serve_batch_size", "rounds")
    tasks = [glue.task_of(name.strip()) for name in knobs.tasks.split(",")]
    if len(set(tasks)) < len(tasks) or len(tasks) < 2:
        raise UserError(f"--tasks {knobs.tasks}: give at least two different ones of {', '.join(glue.TASKS)}")
    compute.choose_device(knobs.device)
    for task in tasks:
        for method in METHODS:
            run_training_nlu.check(knobs_of_run(knobs, task, method))
        glue.find_files(knobs.data_dir, task)
    return tasks


def knobs_of_run(knobs, task, method):
    """The knobs of run_training_nlu.py for a task and a method."""
    shared = ("model", "data_dir", "num_epochs", "max_steps", "seq_len", "device", "precision", "eval_batch_size")
    return run_training_nlu.Knobs(
        **{name: getattr(knobs, name) for name in shared},
        task=task.name,
        adapt=method,
        lr={"lora": knobs.lr_lora, "full": knobs.lr_full}[method],
        output_dir=str(Path(knobs.output_dir) / method / task.name),
    )


# Serving


def serve(knobs, tasks, method):
    """What it takes to serve all tasks in this process: seconds, bytes and scores."""
    device = compute.choose_device(knobs.device)
    idle = results.peak_memory_bytes(device)["process"]
    started = time.perf_counter()
    build = build_on_one_base if method == "lora" else build_models
    models, tokenizer, switch = build(knobs, tasks, device)
    loading = time.perf_counter() - started
    tensors = {id(tensor): tensor.nbytes for model in models.values() for tensor in held(model)}

    samples = {}
    for task in tasks:
        examples = glue.read_examples(glue.find_files(knobs.data_dir, task)["dev"], task)
        samples[task] = run_training_nlu.encode_examples(examples, tokenizer, knobs.seq_len)
    size = knobs.serve_batch_size
    batches = {task: [rows[i : i + size] for i in range(0, len(rows), size)] for task, rows in samples.items()}
    in_turns = [
        (task, batch)
        for turn in itertools.zip_longest(*batches.values())
        for task, batch in zip(batches, turn, strict=True)
        if batch is not None
    ]
    by_task = [(task, batch) for task in tasks for batch in batches[task]]
    texts = sum(map(len, samples.values()))

    serving = replace(knobs, eval_batch_size=size)
    outputs, seconds = {}, {"in turns": [], "task after task": []} | ({"at once": []} if method == "lora" else {})
    bar = tqdm(total=len(seconds) * knobs.rounds * len(in_turns), desc=f"serving, {METHODS[method]}", unit="batch")
    with bar:
        for _ in range(knobs.rounds):
            if method == "lora":
                started = time.perf_counter()
                for turn in itertools.zip_longest(*batches.values()):
                    answer_at_once(models, dict(zip(tasks, turn, strict=True)), serving, tokenizer)
                    bar.update(sum(batch is not None for batch in turn))
                seconds["at once"].append(time.perf_counter() - started)
            for way, order in (("in turns", in_turns), ("task after task", by_task)):
                answers, started = {task: [] for task in tasks}, time.perf_counter()
                for task, batch in order:
                    switch(task)
                    answers[task].append(classification.predict(models[task], batch, serving, tokenizer))
                    bar.update()
                seconds[way].append(time.perf_counter() - started)
                outputs = {task: torch.cat(parts) for task, parts in answers.items()}
    return {
        "seconds": {"load": loading, "switch": time_switches(tasks, switch), **seconds},
        "texts": texts,
        "texts_per_second": {way: texts / statistics.median(times) for way, times in seconds.items()},
        "tensor_bytes": sum(tensors.values()),
        "peak_memory_bytes": results.peak_memory_bytes(device) | {"before_loading": idle},
        "scores": {
            task.name: glue_scores.score(
                classification.decide(outputs[task]), [sample["label"] for sample in samples[task]], task
            )
            for task in tasks
        },
    }


def answer_at_once(models, turn, knobs, tokenizer):
    """The outputs of a batch of each task, {task: batch or None}, by task: a call for each of the models."""
    outputs = {}
    for model in {id(model): model for model in models.values()}.values():
        texts = [(task, text) for task, batch in turn.items() if models[task] is model for text in batch or ()]
        texts.sort(key=lambda pair: len(pair[1]["input_ids"]))  # in the order that predict would give them
        if texts:
            with lora.adapters_per_row(model, [task.name for task, _ in texts]):
                samples = [{key: value for key, value in text.items() if key != "label"} for _, text in texts]
                rows = classification.predict(model, samples, replace(knobs, eval_batch_size=len(texts)), tokenizer)
            for (task, text), row in zip(texts, rows, strict=True):
                outputs.setdefault(task, {})[id(text)] = row
    return {task: torch.stack([outputs[task][id(text)] for text in batch]) for task, batch in turn.items() if batch}


def build_on_one_base(knobs, tasks, device):
    """({task: model}, tokenizer, switch): one encoder with an adapter for each task, and the heads around it."""
    models, by_outputs, tokenizer = {}, {}, None
    for task in tasks:
        outputs = None if task.labels is None else len(task.labels)
        if not models:
            by_outputs[outputs], tokenizer, _, _ = classification.load(knobs.model, task, device)
        elif outputs not in by_outputs:
            by_outputs[outputs] = classification.around_the_same_encoder(next(iter(models.values())), task)
        models[task] = by_outputs[outputs]
        adapter = Path(knobs_of_run(knobs, task, "lora").output_dir) / "adapter.safetensors"
        # Unmerged: merging at each switch would cost more than the two small products at each layer.
        lora.load_lora(models[task], adapter, adapter_name=task.name)
    return models, tokenizer, lambda task: lora.set_adapter(models[task], task.name)


def build_models(knobs, tasks, device):
    """The same with a whole model for each task, where nothing is switched."""
    models = {}
    for task in tasks:
        folder = Path(knobs_of_run(knobs, task, "full").output_dir) / "model"
        models[task], tokenizer, _, _ = classification.load(str(folder), task, device)
    return models, tokenizer, lambda task: None


def held(model):
    """Every tensor of the model and of all adapters that its layers could be switched to."""
    yield from itertools.chain(model.parameters(), model.buffers())
    for name in lora.list_adapters(model):
        lora.set_adapter(model, name)
        yield from model.parameters()
    with lora.disable_adapters(model):
        yield from model.parameters()


def time_switches(tasks, switch):
    """The median seconds of a switch to the next task."""
    seconds = []
    for index, task in zip(range(SWITCHES + len(tasks)), itertools.cycle(tasks)):  # noqa: B905 (one is endless)
        started = time.perf_counter()
        switch(task)
        if index >= len(tasks):
            seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)


# The benchmark


def benchmark(**overrides):
    """Train, serve, print and write the comparison, and return it."""
    knobs = fill_in(Knobs, overrides)
    tasks = check(knobs)
    output_dir = make_output_folder(knobs.output_dir)
    records = {}
    for task in tqdm(tasks, desc="tasks", unit="task"):
        wanted = {method: knobs_of_run(knobs, task, method) for method in METHODS}
        records[task.name] = runs.make_all(SCRIPT, wanted, glue.find_files(knobs.data_dir, task), knobs.reuse)
    served = {}
    for method in METHODS:  # one process for each: its peak of memory is what it took
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            served[method] = pool.submit(serve, knobs, tasks, method).result()
    comparison = {
        "task": "glue, many tasks on one base",
        "configuration": results.configuration(knobs),
        "tasks": {task.name: summary(task, records[task.name], served) for task in tasks},
        "bytes": {
            method: sum(records[task.name][method]["bytes"]["checkpoint"] for task in tasks) for method in METHODS
        },
        "served": served,
        "environment": results.environment(compute.choose_device(knobs.device)),
    }
    comparison["bytes"]["base"] = records[tasks[0].name]["full"]["bytes"]["model"]
    results.write_json(output_dir / "multi_task.json", comparison)
    if knobs.record:
        for name, methods in records.items():
            for method, record in methods.items():
                results.write_json(results.RESULTS / f"{knobs.record}_{name}_{method}.json", record)
        results.write_json(results.RESULTS / f"{knobs.record}.json", comparison)
    plot(comparison, output_dir / "multi_task.png")
    report(comparison)
    print(f"written to {output_dir}: multi_task.json, multi_task.png")
    return comparison


def summary(task, records, served):
    """A task's score in training and when served, by its first metric, and what it takes to keep."""
    metric = task.metrics[0]
    ceiling = records["lora"]["ceiling"]["dev"]
    found = {"metric": metric, "majority": records["lora"]["majority"]["dev"][metric]}
    found["ceiling"] = ceiling and ceiling["scores"][metric]
    for method, record in records.items():
        found[method] = {
            "score": record["after"]["dev"][metric],
            "served": served[method]["scores"][task.name][metric],
            "bytes": record["bytes"]["checkpoint"],
            "train_seconds": record["seconds"]["train"],
            "lr": record["configuration"]["lr"],
        }
    return found


def percent(value):
    """A score in words: 0 for one that is not defined, such as the correlation of a constant, is said as a dash."""
    return "-" if value is None else f"{100 * value:.1f}"


def report(comparison):
    """Print what the comparison says."""
    titles = f"{'majority':>9} {'LoRA':>7} {'full':>7} {'ceiling':>8} {'LoRA, KiB':>11} {'full, KiB':>11}"
    print(f"\n{'task':<6} {'metric':<12} {titles}")
    for name, task in comparison["tasks"].items():
        sizes = [f"{task[method]['bytes'] / 1024:>11,.1f}" for method in METHODS]
        scores = [f"{percent(task[method]['served']):>7}" for method in METHODS]
        title = glue_scores.METRICS[task["metric"]]
        bounds = f"{percent(task['majority']):>9}", f"{percent(task['ceiling']):>8}"
        print(f"{name:<6} {title:<12} {bounds[0]} {' '.join(scores)} {bounds[1]} {' '.join(sizes)}")
    served, sizes = comparison["served"], comparison["bytes"]
    rows = {
        "files, MiB (LoRA: with the base)": [(sizes["lora"] + sizes["base"]) / 2**20, sizes["full"] / 2**20],
        "tensors held, MiB": [served[method]["tensor_bytes"] / 2**20 for method in METHODS],
        "peak of the process, MiB": [(served[m]["peak_memory_bytes"]["process"] or 0) / 2**20 for m in METHODS],
        "seconds to load": [served[method]["seconds"]["load"] for method in METHODS],
        "switch, ms": [1000 * served[method]["seconds"]["switch"] for method in METHODS],
        "texts/s, tasks in turns": [served[method]["texts_per_second"]["in turns"] for method in METHODS],
        "texts/s, task after task": [served[method]["texts_per_second"]["task after task"] for method in METHODS],
        "texts/s, all tasks at once": [served[method]["texts_per_second"].get("at once") for method in METHODS],
    }
    print(f"\n{'':<34} " + " ".join(f"{title:>20}" for title in METHODS.values()) + f" {'ratio':>8}")
    for title, (one, other) in rows.items():
        ratio = f"{one / other:>8.3f}" if other and other > 1e-3 else ""
        print(f"{title:<34} {one:>20,.2f} {'-' if other is None else f'{other:,.2f}':>20} {ratio}".rstrip())


def plot(comparison, path):
    """A chart of the scores and of the bytes."""
    import matplotlib  # here, for what serves in another process needs none of it

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = list(comparison["tasks"])
    figure, (scores, sizes) = pyplot.subplots(1, 2, figsize=(11, 4), width_ratios=(3, 1), layout="constrained")
    series = {"majority": [task["majority"] for task in comparison["tasks"].values()]}
    for method, title in (("lora", "LoRA"), ("full", "full fine-tuning")):
        series[title] = [task[method]["served"] for task in comparison["tasks"].values()]
    for index, (title, values) in enumerate(series.items()):
        places = [place + 0.27 * (index - 1) for place in range(len(names))]
        scores.bar(places, [100 * (value or 0) for value in values], 0.25, label=title)
    titles = [f"{name}\n{glue_scores.METRICS[task['metric']]}" for name, task in comparison["tasks"].items()]
    scores.set_xticks(range(len(names)), titles, fontsize=8)
    scores.set(ylabel="on the dev set, x 100", title="what each task reaches")
    scores.legend(fontsize=8)
    total = comparison["bytes"]
    sizes.bar(
        ["one base,\nadapters", "a model\neach"], [(total["lora"] + total["base"]) / 2**20, total["full"] / 2**20]
    )
    sizes.set(ylabel="MiB", title=f"files for {len(names)} tasks")
    results.write_atomically(path, lambda file: figure.savefig(file, format="png", dpi=120))
    pyplot.close(figure)


def main():
    benchmark(**asdict(parse_knobs(Knobs, __doc__)))


if __name__ == "__main__":
    run(main)
