"""What LoRA gains on a GLUE task over a frozen encoder, and how near it comes to full fine-tuning.

    cd examples/NLU
    python evaluate_lora_improvement.py --task sst2
    python evaluate_lora_improvement.py --task rte --seeds 3 --lr_lora 1e-3,4e-3 --lr_full 1e-4,4e-4 --lr_head 1e-3,4e-3
    python evaluate_lora_improvement.py --task mrpc --model roberta-base --data_dir ~/glue --precision bf16 --reuse

Three systems are trained from the same base on the same lines in the same order: the head alone on the frozen encoder,
adapters and head (LoRA), and everything (full). Several learning rates are tried with the first seed; the one that is
best by the task's own metric on tune.tsv (where the data have none, as the official ones, on the dev set) is then run
with the other seeds, and the table shows mean and standard deviation on the dev set. The
intervals hold 95 % of the scores over resamples of the dev lines, those of the difference drawn for both systems at
once; they, calibration, confusion and the examples that changed are of the first seed.

Written to --output_dir: a folder for each run, improvement.json and improvement.png. --reuse takes the runs that are
there, if they are those that would be made.
"""

import json
import os
import statistics
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

# Read when torch loads: how long its threads spin while they wait. By default so long that beside another busy process
# a small model's steps take many times longer; with no spinning at all (OMP_WAIT_POLICY=PASSIVE) they are slow alone.
os.environ.setdefault("GOMP_SPINCOUNT", "30000")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # examples/, for the package common
sys.path.insert(1, str(Path(__file__).resolve().parents[2]))  # this checkout's loralib
import run_training_nlu
from common.cli import UserError, fill_in, knob, make_output_folder, parse_knobs, require_positive, run
from common.data import glue
from common.records import results, runs
from common.scores import glue_scores
from common.training import compute

HERE = Path(__file__).resolve().parent
SCRIPT = HERE / "run_training_nlu.py"
SYSTEMS = {"head": "head alone", "lora": "LoRA", "full": "full"}
# Examples shown of each kind of change.
SHOWN = 5


@dataclass
class Knobs(compute.ComputeKnobs):
    task: str = knob("sst2", "what to learn", glue.TASKS)
    model: str = knob(run_training_nlu.Knobs.model, "folder or hub name of the base")
    data_dir: str = knob(run_training_nlu.Knobs.data_dir, "folder of the GLUE folders")
    num_epochs: int = knob(run_training_nlu.Knobs.num_epochs, "passes over the training file, for every system")
    max_steps: int | None = knob(None, "stop after so many steps, for every system")
    batch_size: int = knob(run_training_nlu.Knobs.batch_size, "lines in an optimizer step")
    eval_every: int | None = knob(None, "steps between validations; by default one after each epoch")
    weight_decay: float = knob(run_training_nlu.Knobs.weight_decay, "of AdamW")
    seq_len: int = knob(run_training_nlu.Knobs.seq_len, "most tokens of the texts of a line together")
    max_train_samples: int | None = knob(None, "train on so many lines, drawn with the seed")
    max_eval_samples: int | None = knob(None, "validate on so many lines, drawn with the seed")
    lora_dim: int = knob(run_training_nlu.Knobs.lora_dim, "rank")
    lora_alpha: float = knob(run_training_nlu.Knobs.lora_alpha, "the update is scaled by lora_alpha / lora_dim")
    target_modules: str | None = knob(
        None, "layers to adapt, comma separated, or all-linear; by default query and value"
    )
    lr_head: str = knob(str(run_training_nlu.LEARNING_RATES["head"]), "peak learning rates to try, comma separated")
    lr_lora: str = knob(str(run_training_nlu.LEARNING_RATES["lora"]), "the same for LoRA")
    lr_full: str = knob(str(run_training_nlu.LEARNING_RATES["full"]), "the same for full fine-tuning")
    seeds: int = knob(1, "runs of each system at its best learning rate, with the seeds 0, 1, ...")
    resamples: int = knob(1000, "of the dev lines, for the intervals")
    output_dir: str | None = knob(
        None, "folder for what is written; by default output/improvement/ and the task's name"
    )
    record: str | None = knob(None, "name under which examples/results/ gets the record, too")
    reuse: bool = knob(False, "take the runs that output_dir has already, if they are those that would be made")


def check(knobs):
    """{system: learning rates}; raise a UserError for a knob that is out of range, before anything is trained."""
    require_positive(knobs, "seeds", "resamples")
    rates = {}
    for system in SYSTEMS:
        text = getattr(knobs, f"lr_{system}")
        try:
            rates[system] = sorted({float(rate) for rate in text.split(",")})
        except ValueError:
            raise UserError(f"--lr_{system} {text}: must be numbers with commas between, such as 1e-3,4e-3") from None
        for rate in rates[system]:
            run_training_nlu.check(knobs_of_run(knobs, system, rate, seed=0))
    compute.choose_device(knobs.device)
    return rates


def knobs_of_run(knobs, system, rate, seed):
    """The knobs of run_training_nlu.py for one run: in all but method, learning rate and seed the same."""
    names = set(run_training_nlu.Knobs.__dataclass_fields__) & set(Knobs.__dataclass_fields__)
    passed_on = {name: getattr(knobs, name) for name in names - {"output_dir", "record"}}
    folder = Path(knobs.output_dir) / f"{system}_{rate:g}_{seed}"
    return run_training_nlu.Knobs(**passed_on, adapt=system, lr=rate, seed=seed, output_dir=str(folder))


def make_runs(knobs, rates, files, metric):
    """{system: {learning rate: [record of each seed]}}: every rate with the first seed, the best with all of them."""

    def make(keys):
        names = {key: "{}, lr {:g}, seed {}".format(*key) for key in keys}
        made = runs.make_all(SCRIPT, {names[key]: knobs_of_run(knobs, *key) for key in keys}, files, knobs.reuse)
        return [made[names[key]] for key in keys]

    keys = [(system, rate, 0) for system in SYSTEMS for rate in rates[system]]
    records = {system: {} for system in SYSTEMS}
    for (system, rate, _), record in zip(keys, make(keys), strict=True):
        records[system][rate] = [record]
    keys = [(system, best_rate(records[system], metric), seed) for seed in range(1, knobs.seeds) for system in SYSTEMS]
    for (system, rate, _), record in zip(keys, make(keys), strict=True):
        records[system][rate].append(record)
    return records


def best_rate(records, metric):
    """The learning rate whose first run is best, the lowest of equals; an undefined score is worse than any other."""
    first = {rate: chosen_by(found[0], metric) for rate, found in records.items()}
    return max(first, key=lambda rate: -2.0 if first[rate] is None else first[rate])


def chosen_by(record, metric):
    """The score of a run's checkpoint on what it was chosen on, tune or dev."""
    return next(entry[metric] for entry in record["history"] if entry["step"] == record["best_step"])


def spread(values):
    """Mean and standard deviation over the seeds; None where a value is not defined, or there is one seed only."""
    if None in values:
        return {"mean": None, "deviation": None, "values": values}
    deviation = statistics.stdev(values) if len(values) > 1 else None
    return {"mean": statistics.fmean(values), "deviation": deviation, "values": values}


def judge(records, task):
    """What the runs of a system reached and cost, with its best learning rate."""
    metric = task.metrics[0]
    tried = {rate: spread([chosen_by(record, metric) for record in records[rate]]) for rate in records}
    best = best_rate(records, metric)
    chosen = records[best]
    scores = {name: spread([record["after"]["dev"][name] for record in chosen]) for name in chosen[0]["after"]["dev"]}
    return best, {
        "lr": best,
        "tried": [{"lr": rate, **values} for rate, values in tried.items()],
        "scores": scores,
        "best_steps": [record["best_step"] for record in chosen],
        "trained": chosen[0]["parameters"]["trainable"],
        "checkpoint_bytes": chosen[0]["bytes"]["checkpoint"],
        "optimizer_bytes": chosen[0]["bytes"]["optimizer"],
        "step_seconds": statistics.median(record["seconds"]["step"] for record in chosen),
        "train_seconds": statistics.fmean(record["seconds"]["train"] for record in chosen),
    }


def read_predictions(folder):
    """The lines of the dev split that a run wrote."""
    path = Path(folder) / "dev_predictions.jsonl"
    try:
        with path.open(encoding="utf-8") as file:
            return [line for line in map(json.loads, file) if line["split"] == "dev"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: no predictions of {SCRIPT.name} ({error!r}); run without --reuse") from error


def changed(before, after, task):
    """The lines that one system gets right and the other wrong, or whose error changes most: how many, and some."""
    pairs = list(zip(before, after, strict=True))
    if task.labels is None:
        gains = sorted(pairs, key=lambda pair: _error(pair[1]) - _error(pair[0]))
        nearer = [pair for pair in gains if _error(pair[1]) < _error(pair[0])]
        farther = [pair for pair in reversed(gains) if _error(pair[1]) > _error(pair[0])]
    else:
        right = [tuple(line["prediction"] == line["label"] for line in pair) for pair in pairs]
        nearer = [pair for pair, (was, now) in zip(pairs, right, strict=True) if now and not was]
        farther = [pair for pair, (was, now) in zip(pairs, right, strict=True) if was and not now]
    return {
        kind: {"count": len(found), "examples": [_shown(*pair, task) for pair in found[:SHOWN]]}
        for kind, found in (("gained", nearer), ("lost", farther))
    }


def _error(line):
    return abs(line["prediction"] - line["label"])


def _shown(before, after, task):
    name = (lambda label: label) if task.labels is None else task.labels.__getitem__
    return {
        "texts": before["texts"],
        "label": name(before["label"]),
        "before": name(before["prediction"]),
        "after": name(after["prediction"]),
    }


def measure_improvement(task="sst2", **overrides):
    """Train what is missing, compare, print and write the results, and return them."""
    knobs = fill_in(Knobs, {"task": glue.task_of(task).name, **overrides})
    if knobs.output_dir is None:
        knobs.output_dir = str(HERE / "output" / "improvement" / knobs.task)
    rates = check(knobs)
    task = glue.task_of(knobs.task)
    files = glue.find_files(knobs.data_dir, task)
    output_dir = make_output_folder(knobs.output_dir)
    records = make_runs(knobs, rates, files, task.metrics[0])
    systems, lines = {}, {}
    for system in SYSTEMS:
        best, systems[system] = judge(records[system], task)
        lines[system] = read_predictions(knobs_of_run(knobs, system, best, seed=0).output_dir)
        if task.labels is not None:
            probabilities, labels = ([line[key] for line in lines[system]] for key in ("probabilities", "label"))
            systems[system]["calibration"] = glue_scores.calibration(probabilities, labels)
            predictions = [line["prediction"] for line in lines[system]]
            systems[system]["confusion"] = glue_scores.confusion(predictions, labels, task)
    labels = [line["label"] for line in lines["head"]]
    predictions = {system: [line["prediction"] for line in lines[system]] for system in SYSTEMS}
    first = records["head"][rates["head"][0]][0]
    comparison = {
        "task": f"glue {task.name}, head against LoRA against full",
        "configuration": results.configuration(knobs),
        "data": first["data"],
        "base": first["base"],
        "counts": first["counts"],
        "splits": first["splits"],
        "labels": task.labels,
        "metric": task.metrics[0],
        "majority": first["majority"]["dev"],
        "chosen_on": first["chosen_on"],
        "ceiling": first["ceiling"],
        "systems": systems,
        "intervals": glue_scores.bootstrap(predictions, labels, task, knobs.resamples),
        "changed": {
            "head to LoRA": changed(lines["head"], lines["lora"], task),
            "full to LoRA": changed(lines["full"], lines["lora"], task),
        },
        "runs": [
            {"system": system, "lr": rate, "seed": seed, "commit": record["environment"]["commit"]}
            for system in SYSTEMS
            for rate in rates[system]
            for seed, record in enumerate(records[system][rate])
        ],
        "environment": results.environment(compute.choose_device(knobs.device)),
    }
    results.write_json(output_dir / "improvement.json", comparison)
    if knobs.record:
        results.write_json(results.RESULTS / f"{knobs.record}.json", comparison)
    plot(comparison, output_dir / "improvement.png")
    report(comparison)
    print(f"\nwritten to {output_dir}: improvement.json, improvement.png")
    return comparison


def report(comparison):
    """Print what the comparison says."""
    for change, kinds in comparison["changed"].items():
        for kind, found in kinds.items():
            print(f"\n{change}, {kind}: {found['count']} lines")
            for example in found["examples"]:
                texts = " | ".join(example["texts"])
                print(f"  {example['label']} (before {example['before']}, after {example['after']}): {texts}")
    systems = comparison["systems"]
    for system, found in systems.items():
        if "confusion" in found:
            print(f"\n{SYSTEMS[system]}: rows are true labels, columns predicted ones")
            width = max(map(len, comparison["labels"]))
            print(" " * width + "".join(f" {label:>{width}}" for label in comparison["labels"]))
            for label, row in zip(comparison["labels"], found["confusion"], strict=True):
                print(f"{label:>{width}}" + "".join(f" {count:>{width}}" for count in row))
    between, seeds = comparison["intervals"]["differences"], comparison["configuration"]["seeds"]
    print(f"\nx 100; mean{' and deviation' if seeds > 1 else ''} of {seeds} seed{'s' if seeds > 1 else ''}")
    ceilings = comparison["ceiling"]
    known = ["ceiling"] * (ceilings["dev"] is not None)
    titles = "".join(f"{title:>16}" for title in ["majority", *SYSTEMS.values(), *known])
    print(f"{'':<16}" + titles + "".join(f"{title:>18}" for title in ("LoRA - head", "LoRA - full")))
    for metric in systems["lora"]["scores"]:
        cells = [f"{_times_100(comparison['majority'][metric]):>16}"]
        cells += [f"{_mean_and_deviation(found['scores'][metric]):>16}" for found in systems.values()]
        cells += [f"{_times_100(ceilings['dev']['scores'][metric]):>16}" for _ in known]
        for name, sign in (("lora - head", 1), ("full - lora", -1)):
            interval = between[name][metric]
            bounds = interval and sorted(sign * 100 * bound for bound in interval)
            cells.append(f"{'[{:.1f}, {:.1f}]'.format(*bounds) if bounds else '-':>18}")
        print(f"{glue_scores.METRICS[metric]:<16}" + "".join(cells))
    if comparison["chosen_on"] == "tune":
        chosen = [next(rate for rate in found["tried"] if rate["lr"] == found["lr"]) for found in systems.values()]
        cells = ["", *map(_mean_and_deviation, chosen)]
        cells += [_times_100(ceilings["tune"]["scores"][comparison["metric"]]) for _ in known if ceilings["tune"]]
        title = f"{glue_scores.METRICS[comparison['metric']]}, tune"
        print(f"{title:<16}" + "".join(f"{cell:>16}" for cell in cells))
    rows = {
        "learning rate": [f"{found['lr']:g}" for found in systems.values()],
        "trained": [f"{found['trained']:,}" for found in systems.values()],
        "saved, KiB": [f"{found['checkpoint_bytes'] / 1024:,.1f}" for found in systems.values()],
        "step, ms": [f"{1000 * found['step_seconds']:,.0f}" for found in systems.values()],
    }
    if comparison["labels"] is not None:
        rows["ECE"] = [f"{100 * found['calibration']['expected_calibration_error']:.1f}" for found in systems.values()]
        rows["Brier"] = [f"{found['calibration']['brier']:.3f}" for found in systems.values()]
    for title, cells in rows.items():
        print(f"{title:<32}" + "".join(f"{cell:>16}" for cell in cells))


def _mean_and_deviation(score):
    return _times_100(score["mean"]) + ("" if score["deviation"] is None else f" +- {100 * score['deviation']:.1f}")


def _times_100(value):
    return "-" if value is None else f"{100 * value:.1f}"


def _ceiling(comparison):
    """What the labels before noise score on the dev set; None if not known."""
    known = comparison["ceiling"]["dev"]
    return known and known["scores"][comparison["metric"]]


def plot(comparison, path):
    """A chart of the scores by learning rate, and of the calibration."""
    import matplotlib  # here: the runs need none of it

    matplotlib.use("Agg")
    from matplotlib import pyplot

    classes = comparison["labels"] is not None
    figure, axes = pyplot.subplots(1, 1 + classes, figsize=(5 + 5 * classes, 4), squeeze=False, layout="constrained")
    scores = axes[0][0]
    for system, found in comparison["systems"].items():
        points = [
            (tried["lr"], 100 * value) for tried in found["tried"] for value in tried["values"] if value is not None
        ]
        rates, values = ([point[axis] for point in points] for axis in (0, 1))
        scores.plot(rates, values, "o", label=SYSTEMS[system], alpha=0.7)
    chosen_on, metric = comparison["chosen_on"], comparison["metric"]
    for label, line in (("majority", comparison["majority"][metric]), ("ceiling", _ceiling(comparison))):
        if line is not None:
            scores.axhline(100 * line, color="gray", linestyle=":" if label == "majority" else "--", label=label)
    scores.set(xscale="log", xlabel="peak learning rate", ylabel=f"{glue_scores.METRICS[metric]} x 100")
    scores.set_title(f"each run on the {chosen_on} set")
    scores.legend(fontsize=8)
    if classes:
        for system, found in comparison["systems"].items():
            bins = [place for place in found["calibration"]["bins"] if place["count"]]
            axes[0][1].plot(
                [place["confidence"] for place in bins],
                [place["accuracy"] for place in bins],
                "o-",
                label=SYSTEMS[system],
            )
        axes[0][1].plot([0, 1], [0, 1], color="gray", linestyle=":")
        axes[0][1].set(xlabel="probability of the predicted label", ylabel="share that is right", title="calibration")
        axes[0][1].legend(fontsize=8)
    results.write_atomically(path, lambda file: figure.savefig(file, format="png", dpi=120))
    pyplot.close(figure)


def main():
    knobs = asdict(parse_knobs(Knobs, __doc__))
    measure_improvement(knobs.pop("task"), **knobs)


if __name__ == "__main__":
    run(main)
