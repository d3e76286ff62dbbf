"""What an adapter costs over a frozen model: this library, loralib 0.1.2, PEFT and full fine-tuning, measured in turn.

    cd examples/benchmarks
    pip install --no-deps --target output/upstream loralib==0.1.2
    python run_benchmarks.py
    python run_benchmarks.py --levels layers,operations --rounds 3
    python run_benchmarks.py --levels operations --record benchmark --keep
    python run_benchmarks.py --device cuda --precisions bf16 --step_precision bf16 --record benchmark_cuda

The whole takes about half an hour on two cores, and needs them for itself; on CUDA the models are larger. They have
real shapes and random weights; no figure depends on what they compute. In each round every system does the same work
once, in an order drawn anew, and a ratio is the median of the rounds' ratios, with quartiles. Written to --output_dir:
benchmark.json, benchmark.png.

    layers      one layer, forward and backward: shapes, ranks, numbers of tokens, dropout, precisions
    convolutions  one convolution, forward and backward: kernels of 1, 3 and 7, 32 to 512 channels
    steps       a training step: forward, backward and fused AdamW of GPT-2 and RoBERTa, on CUDA GPT-2 and Llama
    generation  32 tokens, one by one, with the adapter beside the weights and merged into them
    compiled    a training step under torch.compile, and how often 20 steps of two adapters in turn compile anew
    operations  putting an adapter into GPT-2, merging, saving, loading and switching it
    import      what `import` costs after `import torch`
"""

import copy
import functools
import gc
import itertools
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import NamedTuple

# Read when torch loads: how long its threads spin while they wait. By default so long that beside another busy process
# a small model's steps take many times longer; with no spinning at all (OMP_WAIT_POLICY=PASSIVE) they are slow alone.
os.environ.setdefault("GOMP_SPINCOUNT", "30000")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # examples/, for the package common
sys.path.insert(1, str(Path(__file__).resolve().parents[2]))  # this checkout's loralib

import measure
import systems
import torch
from common.cli import UserError, knob, parse_knobs, require_positive, run
from common.records import results
from common.reports import tables
from common.training import compute
from systems import Step, Work

import loralib as lora

HERE = Path(__file__).resolve().parent
# Generation of so many tokens after so many.
PROMPT, NEW = 16, 32
PROFILES = 3


class Suite(NamedTuple):
    """What is measured of whole models."""

    steps: dict[str, Work]
    generations: dict[str, Work]
    compiled: dict[str, Work]
    adapted: Work  # what the operations are of


SMALL = Suite(
    {
        "gpt2_qv": Work(),
        "gpt2_all": Work(layers=4, batch=4, length=256, targets="all-linear", r=16),
        "gpt2_all_dropout": Work(layers=4, batch=4, length=256, targets="all-linear", r=16, dropout=0.05),
        "roberta_qv": Work("roberta"),
        "roberta_all": Work("roberta", layers=4, batch=4, length=256, targets="all-linear", r=16),
    },
    {
        "generation_qv": Work(batch=1, length=PROMPT),
        "generation_all": Work(batch=1, length=PROMPT, targets="all-linear", r=16),
    },
    {"compiled_all": Work(layers=2, targets="all-linear", r=16)},
    Work(),
)
# On a GPU, which the small ones would leave waiting for the CPU.
_MEDIUM = Work("gpt2-medium", layers=24, length=1024)
_LLAMA = Work("llama-1b", layers=16, batch=4, length=2048, targets="all-linear", r=16)
LARGE = Suite(
    {
        "gpt2_medium_qv": _MEDIUM,
        "gpt2_medium_all": replace(_MEDIUM, targets="all-linear", r=16),
        "gpt2_medium_all_dropout": replace(_MEDIUM, targets="all-linear", r=16, dropout=0.05),
        "llama_qv": replace(_LLAMA, targets="query, value", r=4),
        "llama_all": _LLAMA,
        "llama_all_dropout": replace(_LLAMA, dropout=0.05),
        "llama_bf16_all": replace(_LLAMA, dtype="bfloat16"),
        "llama_bf16_all_dropout": replace(_LLAMA, dtype="bfloat16", dropout=0.05),
    },
    {
        "generation_medium_all": replace(_MEDIUM, batch=1, length=PROMPT, targets="all-linear", r=16),
        "generation_llama_all": replace(_LLAMA, batch=1, length=PROMPT, dtype="bfloat16"),
    },
    {"compiled_llama_all": replace(_LLAMA, layers=4, dtype="bfloat16")},
    _MEDIUM,
)
# (in, out, whether it is a fused q, k, v of which q and v are adapted)
SHAPES = {"square": (768, 768, False), "q, k, v": (768, 2304, True), "MLP": (768, 3072, False)}
RANKS, TOKENS, DROPOUTS = (4, 16, 64), (32, 1024), (0.0, 0.1)
TINY = (64, 64, False)
# Of convolutions: kernels, and by channels the side of the image.
KERNELS, SIDES = (1, 3, 7), {32: 32, 128: 16, 512: 8}


class Bar(NamedTuple):
    """The most that a ratio should be, of this library through a rival in a case, or without a rival its seconds."""

    title: str
    case: str
    rival: str | None
    most: float
    what: str = "seconds"


BARS = [
    Bar("GPT-2 small, query and value, r=4: step", "gpt2_qv", "floor", 1.03),
    Bar("GPT-2 small, query and value, r=4: step", "gpt2_qv", "upstream", 0.88),
    Bar("4 layers, all linear, r=16: step", "gpt2_all", "floor", 1.03),
    Bar("4 layers, all linear, r=16, dropout 0.05: step", "gpt2_all_dropout", "peft", 0.95),
    Bar("4 layers, all linear, r=16, dropout 0.05: saved", "gpt2_all_dropout", "peft", 0.85, "saved_bytes"),
    Bar("one MergedLinear, forward and backward", "q, k, v, r=4, 1024 tokens, fp32", "upstream", 0.50),
    Bar("a tiny layer, forward", "tiny", "peft", 0.60),
    Bar("a tiny layer, forward", "tiny", "floor", 2.2),
    Bar("merged generation", "generation_all merged", "floor", 1.0),
    Bar("unmerged generation", "generation_all", "peft", 0.93),
    Bar("2 layers, compiled: step", "compiled_all", "peft", 0.9),
    *(Bar(what, what, "peft", 0.6) for what in ("inject", "load", "save", "switch", "merge", "unmerge")),
    *(
        Bar(f"one Conv2d, {channels} channels, k={k}: {what}", f"Conv2d, k={k}, {channels} channels{mode}", rival, most)
        for k in KERNELS
        for channels in SIDES
        for mode, what in (("", "forward and backward"), (", eval", "forward in eval"))
        for rival, most in (("upstream", 1.05), ("peft", 0.9), *([("peft_same_rank", 0.9)] if k > 1 else []))
    ),
    Bar("import beyond torch", "import", None, 0.05),
    *(
        Bar(f"{work.title}: {title}", case, "peft", most, what)
        for case, work in LARGE.steps.items()
        for title, most, what in (("step", 0.90, "seconds"), ("peak memory", 0.90, "peak_bytes"))
    ),
    Bar("all linear on a 1B Llama in bf16: step", "llama_bf16_all", "floor", 1.10),
    Bar("all linear on a 1B Llama in bf16, dropout: step", "llama_bf16_all_dropout", "floor", 1.15),
    Bar("all linear on 4 layers of that, compiled: step", "compiled_llama_all", "peft", 0.9),
    Bar("unmerged generation", "generation_llama_all", "floor", 1.3),
]
PRECISIONS = ("fp32", "bf16")
LEVELS = ("layers", "convolutions", "steps", "generation", "compiled", "operations", "import")


@dataclass
class Knobs:
    levels: str = knob(",".join(LEVELS), "what to measure, comma separated")
    precisions: str = knob("fp32,bf16", "of layers, comma separated")
    step_precision: str = knob("fp32", "of steps and of generation", PRECISIONS)
    systems: str = knob(",".join(systems.SYSTEMS), "whom to measure, comma separated; ours always")
    rounds: int = knob(9, "how often each system does each piece of work")
    threads: int = knob(2, "of a CPU")
    device: str = knob("auto", "auto, cpu, cuda or mps")
    allow_busy: bool = knob(False, "measure though the machine does something else, too")
    output_dir: str = knob(str(HERE / "output"), "folder for what is written")
    record: str | None = knob(None, "name under which examples/results/ gets the record, too")
    keep: bool = knob(False, "keep the levels of --record that are not measured now, each with its commit")


def chosen(text, known, option):
    names = text.split(",")
    for name in names:
        if name not in known:
            raise UserError(f"--{option} {name}: must be one of {', '.join(known)}")
    return names


def check(knobs):
    """(levels, precisions, systems); raise a UserError for what cannot be measured, before anything is."""
    require_positive(knobs, "rounds", "threads")
    levels = chosen(knobs.levels, LEVELS, "levels")
    precisions = chosen(knobs.precisions, PRECISIONS, "precisions")
    rivals = chosen(knobs.systems, systems.SYSTEMS, "systems")
    if "upstream" in rivals and not (systems.UPSTREAM / "loralib").is_dir():
        raise UserError(
            "upstream's package is not there; leave upstream out of --systems, or get it by "
            f"pip install --no-deps --target {systems.UPSTREAM} loralib==0.1.2"
        )
    return levels, precisions, [name for name in systems.SYSTEMS if name in (*rivals, "ours")]


def read_kept(knobs, environment, rivals):
    """The record whose levels --keep keeps; a UserError if its times are of another machine or of other packages."""
    path = results.RESULTS / f"{knobs.record}.json"
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        was = {**record["environment"], **record["rivals"]}
        if not record["commits"].keys() == record["configurations"].keys() == record["levels"].keys():
            raise KeyError("a commit and a configuration of each level")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"--keep: {path} is no record to keep levels of ({error!r}); measure all of them") from error
    now = {**environment, **rivals, "commit": was.get("commit")}
    differing = [name for name in was.keys() | now.keys() if was.get(name) != now.get(name)]
    if differing:
        pairs = ", ".join(f"{name} {was.get(name)!r}, now {now.get(name)!r}" for name in sorted(differing))
        raise UserError(f"--keep: the times of {path} cannot stand beside those of now: {pairs}; measure all levels")
    return record


def compare(title, calls, knobs, device, **facts):
    return record_case(title, measure.in_turn(calls, knobs.rounds, device, title), **facts)


def record_case(title, times, **facts):
    """What a case is recorded as: each system's times, and this library's through those of the others."""
    case = {
        "title": title,
        **facts,
        "systems": {name: {"seconds": measure.spread(values)} for name, values in times.items()},
        "ratios": {name: measure.ratio(times, "ours", name) for name in times if name != "ours"},
    }
    if "floor" in times:
        case["through_floor"] = {name: measure.ratio(times, name, "floor") for name in times if name != "floor"}
    ratios = ", ".join(f"{tables.SYSTEMS[name]} {value['median']:.3f}" for name, value in case["ratios"].items())
    print(f"{title}: {1e3 * case['systems']['ours']['seconds']['median']:,.3f} ms; through {ratios}", flush=True)
    return case


# Levels: {case: record}


def layers(knobs, device, names, precisions):
    """One layer: forward, and backward to the input and the adapter."""
    cases = {}
    grid = itertools.product(SHAPES, RANKS, TOKENS, DROPOUTS, precisions)
    for shape, r, tokens, dropout, precision in grid:
        i, o, groups = SHAPES[shape]
        x = torch.randn(tokens, i, device=device, requires_grad=True)
        calls = {}
        for name in names:
            layer = systems.layer_of(name, i, o, groups, r, dropout)
            layer.to(device)
            calls[name] = functools.partial(forward_and_backward, layer, x, precision)
        title = f"{shape}, r={r}, {tokens} tokens{f', dropout {dropout:g}' if dropout else ''}, {precision}"
        cases[title] = compare(title, calls, knobs, device)
    i, o, groups = TINY
    x = torch.randn(1, i, device=device)
    calls = {name: systems.layer_of(name, i, o, groups, 4, 0.0).to(device) for name in names}
    calls = {name: functools.partial(without_gradient, layer, x) for name, layer in calls.items()}
    cases["tiny"] = compare(f"{i} to {o}, r=4, 1 token, forward without gradient", calls, knobs, device)
    return cases


def convolutions(knobs, device, names):
    """One convolution of as many channels as it reads, r=8: forward, and backward to the input and the adapter, and a
    forward in evaluation mode, not merged.

    The update of 0.1.2, and ours, has rank r k as a matrix (out, in k k), PEFT's has rank r: PEFT is measured at both.
    """
    cases, names = {}, [*names, *(["peft_same_rank"] if "peft" in names else [])]
    for k, (channels, side) in itertools.product(KERNELS, SIDES.items()):
        x = torch.randn(4, channels, side, side, device=device, requires_grad=True)
        made = {name: systems.convolution_of(name, channels, k, 8).to(device) for name in names}
        title, facts = f"Conv2d, k={k}, {channels} channels", {"batch": 4, "side": side, "r": 8}
        calls = {name: functools.partial(forward_and_backward, layer, x, "fp32") for name, layer in made.items()}
        cases[title] = compare(title, calls, knobs, device, **facts)
        for name in calls.keys() & {"ours", "peft", "peft_same_rank"}:
            cases[title]["systems"][name]["profile"] = measure.largest_operations(calls[name], PROFILES)
        for layer in made.values():
            keep_apart(layer)
            layer.eval()
        calls = {name: functools.partial(without_gradient, layer, x) for name, layer in made.items()}
        cases[f"{title}, eval"] = compare(f"{title}, eval", calls, knobs, device, **facts)
    return cases


def forward_and_backward(layer, x, precision):
    with torch.autocast(x.device.type, torch.bfloat16, enabled=precision == "bf16"):
        y = layer(x)
    y.backward(y.detach())
    x.grad = None
    layer.zero_grad()


@torch.no_grad()
def without_gradient(layer, x):
    layer(x)


def steps(knobs, device, names, works):
    """A training step of each work, and what it costs beside time."""
    cases, autocast = {}, knobs.step_precision == "bf16"
    for key, work in works.items():
        made = {name: Step(name, work, device, autocast) for name in names}
        systems.share_frozen([step.model for step in made.values()])
        case = compare(work.title, made, knobs, device, work=asdict(work))
        for name, step in made.items():
            counts = {
                "saved_bytes": measure.saved_bytes(step.forward, step.model),
                "operations": measure.operations(step),
            }
            # Not on CUDA, whose attention with fewer heads of keys than of queries torch 2.11 cannot count.
            if device.type == "cpu":
                counts["flops"] = measure.flops(lambda step=step: step.forward().backward())
            if name == "ours":  # those of the others are the same
                counts["narrow_products"] = measure.narrow_products(step, 2 * work.r, PROFILES)
            case["systems"][name].update(counts)
        del made, step
        gc.collect()  # hooks and wrappers make circles of references, and each model is half a gigabyte
        for name in names:
            peak = measure.peak_bytes(some_steps, name, work, device.type, autocast, device=device)
            case["systems"][name]["peak_bytes"] = peak
        cases[key] = case
    return cases


def some_steps(name, work, device, autocast):
    step = Step(name, work, torch.device(device), autocast)
    for _ in range(3):
        step()


def generation(knobs, device, names, works):
    """Greedy generation, with the adapter beside the weights and merged into them."""
    cases = {}
    for key, work in works.items():
        ids, apart = systems.batch_of(work, device)["input_ids"], []
        sides = {"": {}, " merged": {}}
        for name in names:
            if name == "full":
                continue
            for side, calls in sides.items():
                model = systems.build(name, work, device)
                if name == "floor":
                    model.disable_input_require_grads()
                elif side:
                    model = merged(name, model)
                elif name != "peft":
                    keep_apart(model)
                model.eval()
                calls[name] = functools.partial(generate, model, ids, knobs.step_precision)
                if not side:
                    apart.append(model)
        systems.share_frozen(apart)
        for side, calls in sides.items():
            title = f"{work.title}, {NEW} new tokens{', merged' if side else ''}"
            cases[key + side] = compare(title, calls, knobs, device, work=asdict(work))
    return cases


def generate(model, ids, precision):
    options = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, "pad_token_id": 0}
    with torch.autocast(ids.device.type, torch.bfloat16, enabled=precision == "bf16"):
        model.generate(ids, **options)


def compiled(knobs, device, names, works):
    """A training step under torch.compile, and how many graphs are made when adapters of unlike alpha take turns."""
    cases, autocast = {}, knobs.step_precision == "bf16"
    for key, work in works.items():
        made = {name: Step(name, work, device, autocast) for name in names if name in ("floor", "ours", "peft")}
        systems.share_frozen([step.model for step in made.values()])
        for step in made.values():
            step.compile()
        case = compare(f"{work.title}, compiled", made, knobs, device, work=asdict(work))
        for name in made.keys() - {"floor"}:
            case["systems"][name]["recompilations"] = recompilations(name, made[name], work)
        cases[key] = case
        del made, step
        gc.collect()
        torch.compiler.reset()
    return cases


def recompilations(name, step, work):
    """How many graphs 20 steps make, in which two adapters take turns, after the first of each."""
    if name == "ours":
        systems.ours(step.model, work, lora_alpha=2 * systems.ALPHA, adapter_name="second")
        switch = functools.partial(lora.set_adapter, step.model)
    else:
        config = copy.copy(step.model.peft_config["default"])
        config.lora_alpha *= 2
        step.model.add_adapter("second", config)
        switch = step.model.set_adapter
    graphs = []
    for turn in range(22):
        switch(("second", "default")[turn % 2])
        step.forward().backward()
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    return graphs[-1] - graphs[1]


def merged(name, model):
    if name == "ours":
        return lora.merge_and_unload(model)
    if name == "peft":
        return model.merge_and_unload()
    return model  # upstream's layers merge in eval


def keep_apart(model):
    for layer in model.modules():
        if hasattr(layer, "merge_weights"):
            layer.merge_weights = False


def operations(knobs, device, names, work):
    """What is done to a whole model, in this library and in PEFT: {what: (how to prepare a model, what is timed)}."""
    import peft

    with torch.device(device):
        plain = systems.base_model(work)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "adapter.safetensors"

        def copied():
            return copy.deepcopy(plain)

        def adapted():
            return systems.ours(copied(), work)

        def two():
            model = adapted()
            lora.inject_lora(model, r=work.r, adapter_name="second")
            return model

        def adapted_by_peft():
            return systems.peft(copied(), work)

        def two_by_peft():
            model = adapted_by_peft()
            model.add_adapter("second", model.peft_config["default"])
            return model

        rivals = {
            "ours": {
                "inject": (copied, lambda model: systems.ours(model, work)),
                "merge": (adapted, merge),
                "unmerge": (lambda: merge(adapted()), lora.unmerge_lora_weights),
                "merge for good": (adapted, lora.merge_and_unload),
                "save": (adapted, lambda model: lora.save_lora(model, file)),
                "load": (copied, lambda model: lora.load_lora(model, file)),
                "switch": (two, lambda model: lora.set_adapter(model, "default")),
            },
            "peft": {
                "inject": (copied, lambda model: systems.peft(model, work)),
                "merge": (adapted_by_peft, lambda model: model.merge_adapter()),
                "unmerge": (lambda: merge_by_peft(adapted_by_peft()), lambda model: model.unmerge_adapter()),
                "merge for good": (adapted_by_peft, lambda model: model.merge_and_unload()),
                "save": (adapted_by_peft, lambda model: model.save_pretrained(folder)),
                "load": (copied, lambda model: peft.PeftModel.from_pretrained(model, folder)),
                "switch": (two_by_peft, lambda model: model.set_adapter("second")),
            },
        }
        cases = {}
        for what in rivals["ours"]:
            calls = {name: rivals[name][what] for name in ("ours", "peft") if name in names}
            times = measure.prepared(calls, knobs.rounds, device, what)
            cases[what] = record_case(f"{what}: {work.title}", times)
    return cases


def merge(model):
    return lora.merge_lora_weights(model.eval())


def merge_by_peft(model):
    model.merge_adapter()
    return model


def imports(knobs, names):
    """A fresh interpreter each time; the files are compiled, and in the cache of the system, from the first on."""
    modules = {"ours": "loralib", "peft": "peft"}
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    times = {system: [] for system in modules if system in names}
    for _ in range(knobs.rounds + 1):
        for system, values in times.items():
            code = f"import time, torch; start = time.perf_counter(); import {modules[system]}"
            command = [sys.executable, "-W", "ignore", "-c", f"{code}; print(time.perf_counter() - start)"]
            done = subprocess.run(
                command, capture_output=True, text=True, check=True, cwd=results.REPOSITORY, env=environment
            )
            values.append(float(done.stdout.split()[-1]))
    return {"import": record_case("import beyond torch", {system: values[1:] for system, values in times.items()})}


def judge(levels):
    """The bars with what was measured; those of cases that were not are left out."""
    cases = {key: case for level in levels.values() for key, case in level.items()}
    judged = []
    for bar in BARS:
        case = cases.get(bar.case)
        if case is None or (bar.rival and bar.rival not in case["systems"]):
            continue
        ours = case["systems"]["ours"]
        if bar.what == "seconds":
            value = case["ratios"][bar.rival] if bar.rival else ours["seconds"]
        else:
            value = measure.spread([ours[bar.what] / case["systems"][bar.rival][bar.what]])
        judged.append({**bar._asdict(), "value": value, "met": value["median"] <= bar.most})
    return judged


def report(record):
    """Print the bars."""
    rows = [["ours through", "rival", "median", "quartiles", "bar", "met"]]
    for bar in record["bars"]:
        value = bar["value"]
        rival = tables.SYSTEMS[bar["rival"]] if bar["rival"] else "seconds"
        quartiles = f"[{value['low']:.3f}, {value['high']:.3f}]"
        met = "yes" if bar["met"] else "no"
        rows.append([bar["title"], rival, f"{value['median']:.3f}", quartiles, f"{bar['most']:g}", met])
    print(f"\n{tables.aligned(rows)}")


def plot(record, path):
    """A chart: training steps through the frozen model's, and the work of this library through PEFT's."""
    import matplotlib  # here: measuring needs none of it

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(14, 6), layout="constrained")
    stepped = [case for case in record["levels"].get("steps", {}).values() if "through_floor" in case]
    for row, case in enumerate(stepped):
        for place, (name, value) in enumerate(case["through_floor"].items()):
            axes[0].barh(row + 0.2 * place, value["median"], 0.18, color=f"C{place}", label=tables.SYSTEMS[name])
            axes[0].plot([value["low"], value["high"]], [row + 0.2 * place] * 2, color="black", linewidth=0.8)
    axes[0].set(xlabel="a training step, through one of the frozen model without an adapter")
    axes[0].set_yticks([row + 0.3 for row in range(len(stepped))], [case["title"] for case in stepped])
    handles = dict(zip(*reversed(axes[0].get_legend_handles_labels()), strict=True))
    if handles:
        above = {"loc": "lower left", "bbox_to_anchor": (0, 1), "ncols": len(handles)}
        axes[0].legend(handles.values(), handles.keys(), fontsize=8, **above)
    others = [
        case for level in ("generation", "operations", "import") for case in record["levels"].get(level, {}).values()
    ]
    others = [case for case in others if "peft" in case["ratios"]]
    for row, case in enumerate(others):
        value = case["ratios"]["peft"]
        axes[1].plot([value["low"], value["high"]], [row, row], color="C0")
        axes[1].plot(value["median"], row, "o", color="C0")
    axes[1].axvline(1, color="gray", linestyle=":")
    axes[1].set(xlabel="loralib through PEFT, median and quartiles", xscale="log")
    axes[1].set_yticks(range(len(others)), [case["title"] for case in others])
    for axis in axes:
        axis.invert_yaxis()
        axis.tick_params(axis="y", labelsize=7)
    results.write_atomically(path, lambda file: figure.savefig(file, format="png", dpi=120))
    pyplot.close(figure)


def measure_all(knobs):
    """Measure the levels, print, write and return the record."""
    levels, precisions, names = check(knobs)
    device = compute.choose_device(knobs.device)
    rivals = measure.versions(*(["peft"] if "peft" in names else []))
    rivals |= {"loralib": "0.1.2"} if "upstream" in names else {}
    record = measure.begin("benchmark", knobs, device)
    kept = read_kept(knobs, record["environment"], rivals) if knobs.keep else {}
    suite = LARGE if device.type == "cuda" else SMALL
    calls = {
        "layers": lambda: layers(knobs, device, names, precisions),
        "convolutions": lambda: convolutions(knobs, device, names),
        "steps": lambda: steps(knobs, device, names, suite.steps),
        "generation": lambda: generation(knobs, device, names, suite.generations),
        "compiled": lambda: compiled(knobs, device, names, suite.compiled),
        "operations": lambda: operations(knobs, device, names, suite.adapted),
        "import": lambda: imports(knobs, names),
    }
    made = {
        "levels": {level: calls[level]() for level in levels},
        "commits": dict.fromkeys(levels, record["environment"]["commit"]),
        "configurations": dict.fromkeys(levels, record.pop("configuration")),
    }
    record |= {name: kept.get(name, {}) | each for name, each in made.items()}
    record.update(bars=judge(record["levels"]), rivals=rivals)
    report(record)
    plot(record, measure.write(record, knobs, "benchmark") / "benchmark.png")
    return record


def main():
    measure_all(parse_knobs(Knobs, __doc__))


if __name__ == "__main__":
    run(main)
