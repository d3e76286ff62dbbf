"""Train LoRA and full fine-tuning from the same base, in the same order of texts, and compare what they reach and cost.

    cd examples/NLG
    python compare_lora_vs_full.py
    python compare_lora_vs_full.py --model gpt2-medium --preset paper --data_dir output/e2e --precision bf16
    python compare_lora_vs_full.py --reuse
    python compare_lora_vs_full.py --accounting_only

The first scores the base and trains twice, so it takes a little more than twice the time of run_training.py, whose
knobs are passed on. The runs are processes of their own, one after the other, since the peak of memory is that of a
process. Then both methods take optimizer steps in turn on the same batches: the only fair measure of a step, for
whatever else the machine does meets both. The third takes what trainings have left in --output_dir, after a look at
whether they differ in the method alone. Every comparison is given as LoRA / full. Written: comparison.json in
--output_dir and the runs' own folders base/, lora/ and full/.

The last needs no weights and takes seconds. It counts what GPT-2 costs in its four sizes with the paper's rank 4 on
query and value, the first of which is

    MiB                    parameters        trained  checkpoint  weights  gradients  optimizer  together
    gpt2          LoRA    124,587,264        147,456         0.6    475.3        0.6        1.1     477.0
                  full    124,439,808    124,439,808       474.7    474.7      474.7      949.4   1,898.8
                 ratio                       0.00118     0.00118  1.00118    0.00118    0.00118   0.25118
"""

import dataclasses
import itertools
import os
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path

# Read when torch loads: how long its threads spin while they wait. By default so long that beside another busy process
# a small model's steps take many times longer; with no spinning at all (OMP_WAIT_POLICY=PASSIVE) they are slow alone.
os.environ.setdefault("GOMP_SPINCOUNT", "30000")

import torch
import transformers
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # examples/, for the package common
sys.path.insert(1, str(Path(__file__).resolve().parents[2]))  # this checkout's loralib
import run_training
from common.cli import UserError, fill_in, knob, make_output_folder, parse_knobs, require_positive, run
from common.models import causal_lm
from common.records import results, runs
from common.reports import tables
from common.training import compute, loop, memory

import loralib as lora

HERE = Path(__file__).resolve().parent
# What each run is called here and what it trains.
METHODS = {"base": "none", "lora": "lora", "full": "full"}
TRAINED = ("lora", "full")
TITLES = {"base": "base", "lora": "LoRA", "full": "full"}
DECIDED_HERE = runs.METHOD_KNOBS | runs.PLACE_KNOBS | runs.NOT_COMPARED
# Pairs of steps before those that count: the first ones allocate memory.
WARM_UP = 3
QUALITY = {**run_training.SCORES, "sacrebleu": ("BLEU, cased", 1)}
GPT2_SIZES = {
    "gpt2": {"n_embd": 768, "n_layer": 12, "n_head": 12},
    "gpt2-medium": {"n_embd": 1024, "n_layer": 24, "n_head": 16},
    "gpt2-large": {"n_embd": 1280, "n_layer": 36, "n_head": 20},
    "gpt2-xl": {"n_embd": 1600, "n_layer": 48, "n_head": 25},
}
# Table 3 of the paper (arXiv 2106.09685). Its rank 4 on query and value gives 0.39M and 0.74M; how the authors counted
# is not known (github.com/microsoft/LoRA/issues/172).
PAPER_RANK, PAPER_TRAINED = 4, {"gpt2-medium": 350_000, "gpt2-large": 770_000}

PassedOn = dataclasses.make_dataclass(
    "PassedOn",
    [
        (field.name, field.type, knob(field.default, field.metadata["help"], field.metadata["choices"]))
        for field in dataclasses.fields(run_training.Knobs)
        if field.name not in DECIDED_HERE
    ],
)


@dataclass
class Knobs(PassedOn):
    lr_lora: float | None = knob(None, "peak learning rate of LoRA; by default the preset's")
    lr_full: float | None = knob(None, "the same for full fine-tuning, which wants about a tenth of it")
    output_dir: str = knob(str(HERE / "output" / "compare"), "folder for the comparison and, in it, one for each run")
    record: str | None = knob(None, "NAME under which examples/results/ gets it, and NAME_base, _lora, _full the runs")
    reuse: bool = knob(False, "take the runs that output_dir has already, if they are those that would be made")
    pairs: int = knob(30, "steps of each method that are timed in turn; 0 for none, if both do not fit into memory")
    accounting_only: bool = knob(False, "count what the sizes of GPT-2 cost with the paper's rank 4, and no more")


def check(knobs):
    """Raise a UserError for a knob that is out of range, before anything is trained."""
    require_positive(knobs, "lr_lora", "lr_full")
    if knobs.pairs < 0 or knobs.pairs == 1:
        raise UserError(f"--pairs {knobs.pairs}: must be 0, or at least 2 for a spread")
    compute.choose_device(knobs.device)
    for method in METHODS:
        run_training.check(knobs_of_run(knobs, method))


def knobs_of_run(knobs, method):
    """The knobs of run_training.py for one of the methods: in all but runs.METHOD_KNOBS the same for each."""
    passed_on = {field.name: getattr(knobs, field.name) for field in dataclasses.fields(PassedOn)}
    rates = {"lora": knobs.lr_lora, "full": knobs.lr_full}
    return run_training.Knobs(
        **passed_on,
        adapt=METHODS[method],
        lr=(rates[method] or run_training.LEARNING_RATES[knobs.preset][method]) if method in TRAINED else None,
        skip_base=method != "base",
        output_dir=str(Path(knobs.output_dir) / method),
    )


# The runs


def make_runs(knobs):
    """{method: record} of the three runs, made now or, with --reuse, before."""
    wanted = {method: knobs_of_run(knobs, method) for method in METHODS}
    files = run_training.find_files(wanted["base"])
    return runs.make_all(HERE / "run_training.py", wanted, files, knobs.reuse)


# What they reach and cost


def load_data(run_knobs, tokenizer):
    """The samples to train on, and the batches of the first epoch of every run."""
    train, _, _ = run_training.load_data(run_knobs)
    samples = run_training.encode_pairs(train, tokenizer, run_knobs.seq_len, "training")
    lengths = [len(sample["input_ids"]) for sample in samples]
    batches = loop.make_batches(lengths, run_knobs.batch_size, f"{run_knobs.seed} 1")
    return [[samples[index] for index in batch] for batch in batches]


def build_model(run_knobs, device):
    """(model, tokenizer) as run_training.py has them when the training begins."""
    model, tokenizer = causal_lm.load_causal_lm(run_knobs.model, device)
    run_training.adapt_model(model, run_knobs)
    if run_knobs.gradient_checkpointing:
        loop.set_checkpointing(model, True)
    return model, tokenizer


def time_in_turn(knobs):
    """{method: seconds of its optimizer steps}, taken in turn on the same batches; None without --pairs."""
    if not knobs.pairs:
        return None
    device, steppers = compute.choose_device(knobs.device), {}
    for method in TRAINED:
        run_knobs = knobs_of_run(knobs, method)
        model, tokenizer = build_model(run_knobs, device)
        scaler = loop.make_scaler(device, run_knobs)
        steppers[method] = model, loop.make_optimizer(model, run_knobs), scaler, run_knobs
    batches = itertools.cycle(load_data(run_knobs, tokenizer))
    seconds = {method: [] for method in TRAINED}
    for pair in tqdm(range(WARM_UP + knobs.pairs), desc="timing in turn", unit="pair"):
        batch = next(batches)
        for method in TRAINED if pair % 2 else TRAINED[::-1]:  # who is second may find the batch in the cache
            model, optimizer, scaler, run_knobs = steppers[method]
            started = time.perf_counter()
            loop.optimizer_step(model, run_training.TASK, batch, optimizer, scaler, run_knobs)
            if pair >= WARM_UP:
                seconds[method].append(time.perf_counter() - started)
    return seconds


def compare_steps(seconds):
    """The median step of each method, and the median and the spread of the ratios within the pairs."""
    ratios = [lora_step / full_step for lora_step, full_step in zip(seconds["lora"], seconds["full"], strict=True)]
    return {
        **{method: statistics.median(steps) for method, steps in seconds.items()},
        "ratio": statistics.median(ratios),
        "quartiles": statistics.quantiles(ratios, n=4)[::2],
        "range": [min(ratios), max(ratios)],
        "seconds": seconds,
    }


def account_gpt2():
    """The accounts of GPT-2 in its four sizes, adapted as in the paper."""
    sizes = {}
    for name, shape in GPT2_SIZES.items():
        with torch.device("meta"):  # shapes without numbers
            model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**shape))
            base = lora.count_parameters(model).total
            lora.inject_lora(model, r=PAPER_RANK)
        trained = lora.count_parameters(model).trainable
        sides = {
            "lora": {"total": base + trained, "trained": trained, "bytes": memory.account(base + trained, trained)},
            "full": {"total": base, "trained": base, "bytes": memory.account(base, base)},
        }
        ratios = {key: sides["lora"]["bytes"][key] / size for key, size in sides["full"]["bytes"].items()}
        sizes[name] = {**sides, "ratio": {"trained": trained / base, "bytes": ratios}}
        if name in PAPER_TRAINED:
            sizes[name]["trained_by_the_paper"] = PAPER_TRAINED[name]
    return sizes


def ratio(one, other):
    """one / other, None where it does not exist or one of them was not measured."""
    return one / other if one is not None and other else None


def compare_quality(runs):
    """{metric: its scores and their ratio and difference}; None for what was not measured."""
    quality = {}
    for metric in QUALITY:
        scores = {"base": runs["base"]["before"][metric]} | {m: runs[m]["after"][metric] for m in TRAINED}
        quality[metric] = {
            **scores,
            "references": runs["base"]["references"].get(metric),
            "ratio": ratio(scores["lora"], scores["full"]),
            "difference": None if None in (scores["lora"], scores["full"]) else scores["lora"] - scores["full"],
        }
    return quality


def compare_costs(runs):
    """{cost: that of LoRA, of full fine-tuning, and their ratio}; the held bytes are computed, the rest is measured."""

    def costs(record):
        held = memory.account(record["parameters"]["total"], record["parameters"]["trainable"])
        return {
            "trained_parameters": record["parameters"]["trainable"],
            "checkpoint_bytes": record["bytes"]["checkpoint"],
            "optimizer_bytes": record["bytes"]["optimizer"],
            **{f"peak_{who}_bytes": peak for who, peak in record["peak_memory_bytes"].items()},
            **{f"held_{what}_bytes": held[what] for what in ("weights", "gradients", "optimizer", "together")},
            **{f"{what}_seconds": record["seconds"][what] for what in ("step", "train", "total")},
        }

    sides = {method: costs(runs[method]) for method in TRAINED}
    return {
        name: {"lora": value, "full": sides["full"][name], "ratio": ratio(value, sides["full"][name])}
        for name, value in sides["lora"].items()
    }


def summary(record):
    """What the comparison says of a run beside its scores and costs."""
    steps = {"steps": record["history"][-1]["step"], "best_step": record["best_step"]} if "history" in record else {}
    return {"lr": record["configuration"]["lr"], **steps, "commit": record["environment"]["commit"]}


def compare(**overrides):
    """Compare with the preset but for `overrides`, print and write the comparison, and return it."""
    knobs = fill_in(Knobs, overrides, run_training.PRESETS)
    check(knobs)
    comparison, records = {"task": "e2e, lora against full"}, {}
    if not knobs.accounting_only:
        make_output_folder(knobs.output_dir)
        comparison["configuration"] = results.configuration(knobs)
        records = make_runs(knobs)
        seconds = time_in_turn(knobs)
        comparison["quality"] = compare_quality(records)
        comparison["not_measured"] = records["lora"]["after"]["not_measured"]
        comparison["costs"] = compare_costs(records)
        comparison["steps_in_turn"] = seconds and compare_steps(seconds)
        comparison["runs"] = {method: summary(record) for method, record in records.items()}
    comparison["accounting"] = account_gpt2()
    comparison["environment"] = results.environment(compute.choose_device(knobs.device))
    if records:
        results.write_json(Path(knobs.output_dir) / "comparison.json", comparison)
    if knobs.record:
        for method, record in records.items():
            results.write_json(results.RESULTS / f"{knobs.record}_{method}.json", record)
        results.write_json(results.RESULTS / f"{knobs.record}.json", comparison)
    report(comparison)
    return comparison


def report(comparison):
    """Print what the comparison says."""
    print(f"\n{accounting_table(comparison['accounting'])}")
    if "quality" not in comparison:
        return
    columns = ("base", "lora", "full", "ratio", "difference", "references")
    rows = [["", "base", "LoRA", "full", "LoRA / full", "LoRA - full", "references"]]
    for metric, (title, factor) in QUALITY.items():
        scores = comparison["quality"][metric]
        cells = [scores[c] if c == "ratio" or scores[c] is None else factor * scores[c] for c in columns]
        rows.append([title, *("" if cell is None else f"{cell:.3f}" for cell in cells)])
    print(f"\n{tables.aligned(rows)}", end="")
    for reason in comparison["not_measured"].values():
        print(reason)

    steps, costs = comparison["steps_in_turn"], comparison["costs"]
    if steps:
        costs = {**costs, "step_seconds, in turn": steps}
    rows = [["", "LoRA", "full", "LoRA / full"]]
    for name, cost in costs.items():
        rows.append([name.replace("_", " "), *(number(cost[column]) for column in ("lora", "full", "ratio"))])
    print(f"\n{tables.aligned(rows)}", end="")
    if steps:
        low, high, least, most = *steps["quartiles"], *steps["range"]
        print(
            f"in turn: medians of {len(steps['seconds']['lora'])} pairs of steps, whose ratios have quartiles of "
            f"{low:.3f} and {high:.3f} and go from {least:.3f} to {most:.3f}"
        )
    print("held: computed for float32 and AdamW, without activations")
    print("peak process: with Python, the libraries and the copy of the best weights; train seconds: with validations")
    runs = comparison["runs"]
    print("learning rates: LoRA {lora[lr]:g}, full {full[lr]:g}; steps: {full[steps]:,} each".format(**runs))
    commits = {str(run["commit"]) for run in runs.values()}
    if len(commits) > 1:
        print(f"the runs were made at different commits: {', '.join(sorted(commits))}")


def accounting_table(accounting):
    keys = ("checkpoint", "weights", "gradients", "optimizer", "together")
    rows = [["MiB", "", "parameters", "trained", *keys]]
    for name, size in accounting.items():
        for method in TRAINED:
            side = size[method]
            cells = [f"{side['total']:,}", f"{side['trained']:,}", *(f"{side['bytes'][k] / 2**20:,.1f}" for k in keys)]
            rows.append([name if method == TRAINED[0] else "", TITLES[method], *cells])
        ratios = size["ratio"]
        rows.append(["", "ratio", "", f"{ratios['trained']:.5f}", *(f"{ratios['bytes'][k]:.5f}" for k in keys)])
    lines = [
        tables.aligned(rows).removesuffix("\n"),
        f"LoRA: rank {PAPER_RANK} on query and value; float32, AdamW, without activations",
    ]
    for name, size in accounting.items():
        if "trained_by_the_paper" in size:
            lines.append(f"the paper says {size['trained_by_the_paper'] / 1e6:.2f}M trained for {name}")
    return "\n".join(lines)


def number(value):
    if value is None:
        return ""
    return f"{value:,}" if isinstance(value, int) else f"{value:.5g}"


def main():
    compare(**vars(parse_knobs(Knobs, __doc__, presets=run_training.PRESETS)))


if __name__ == "__main__":
    run(main)
