"""The tables of figures in the documents, made from examples/results/*.json alone, and tables as text."""

import json
import math
import statistics

from common.data import glue
from common.records import runs
from common.reports import reached, reading

DEFAULT_RUN = "nlg_embedded"
# The trainings by which settings were chosen.
STUDY = [
    "nlg_smollm2_lora",
    "nlg_smollm2_qv_3e-3",
    "nlg_smollm2_all_1e-3",
    "nlg_smollm2_all_2e-3",
    "nlg_smollm2_full",
    "nlg_smollm2_full_3e-4",
]
MULTI_TASK = "nlu_multi_task"
# Head alone, LoRA and full fine-tuning on the GLUE files that ship.
EMBEDDED_GLUE = [f"nlu_{task}" for task in glue.TASKS]

BENCHMARK, BENCHMARK_CUDA, BENCHMARK_BASE = "benchmark", "benchmark_cuda", "benchmark_base"
BENCHMARK_PEFT, BENCHMARK_GROWTH = "benchmark_against_peft", "benchmark_growth"
EXTRACTION = "extraction"
REGRET = "when_lora_equals_full"
INTEGRATIONS = "integrations"
BENCHMARK_ROWS = "benchmark_adapters_per_row"
# The same training on bases stored in different dtypes.
BASES = ["nlg_smollm2_all_2e-3", "nlg_smollm2_all_2e-3_nf4"]
SYSTEMS = {
    "floor": "frozen model",
    "ours": "this library",
    "upstream": "loralib 0.1.2",
    "peft": "PEFT",
    "peft_same_rank": "PEFT at rank r k",
    "full": "full fine-tuning",
}
# The tutorial whose sections the README's table of ratios links.
DETAILED = "examples/MODEL_COMPARISON_DETAILED.md"
BESIDE_PEFT = "4-bit base and experts"


def read(name, folder):
    return json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))


def figures(folder):
    """What the default run reached and cost; a score is of the base and of the adapted model."""
    run = read(DEFAULT_RUN, folder)
    sizes, seconds = run["bytes"], run["seconds"]
    rows = {"": ["the default run"], "---": ["---:"]}
    rows["parameters"] = [f"{run['parameters']['total']:,}"]
    rows["of them trained"] = [_trained(run["parameters"])]
    rows["optimizer steps"] = [f"{run['history'][-1]['step']:,}"]
    rows["texts in a step"] = [str(run["configuration"]["batch_size"])]
    rows["meanings scored"] = [f"{run['counts']['test_meanings']:,}"]
    for key, title, factor, digits in reading.SCORES:
        rows[title] = [" -> ".join(_number(run[when][key], factor, digits) for when in ("before", "after"))]
    rows["what is saved, bytes"] = [f"{sizes['checkpoint']:,}"]
    rows["state of the optimizer, bytes"] = [f"{sizes['optimizer']:,}"]
    rows["the model in float32, bytes"] = [f"{sizes['model']:,}"]
    rows["seconds in all"] = [f"{seconds['total']:.0f}"]
    rows["of them training"] = [f"{seconds['train']:.0f}"]
    rows["device"] = [reading.device_title(run)]
    rows["result file"] = [_link(DEFAULT_RUN)]
    return rows


def e2e(folder):
    """A row for each system that was scored on the real test meanings."""
    records = reading.read_folder(folder)
    rows = {"": [title for _, title, _, _ in reading.SCORES] + ["result file"]}
    rows["---"] = ["---:"] * len(rows[""])
    for members in reached.groups(records).values():
        record = next(iter(members.values()))
        if reading.glue_task(record) is None and not reading.is_synthetic(record):
            base, references = record["configuration"]["model"], {}
            for row in reached.rows_of(records, members):
                cells = [_number(row.scores[key][0], factor, digits) for key, _, factor, digits in reading.SCORES]
                texts = records[row.files[0]]["configuration"]["batch_size"]
                steps = "" if row.steps == "0" else f", {row.steps} steps of {texts} texts"
                rows[f"{base}: {row.title}{steps}", row.files] = [*cells, ", ".join(map(_link, row.files))]
                references = records[row.files[-1]]["references"]  # of the file that has the scores
            cells = [_number(references.get(key), factor, digits) for key, _, factor, digits in reading.SCORES]
            if references:
                rows["the references themselves"] = [*cells, ""]
    return rows


def study(folder):
    """A row for each run: what it adapted, and its validation losses."""
    runs = {name: read(name, folder) for name in STUDY}
    steps = [entry["step"] for entry in next(iter(runs.values()))["history"]]
    rows = {"": ["trained", "learning rate", *(f"loss at {step}" for step in steps), "result file"]}
    rows["---"] = ["---:"] * len(rows[""])
    for name, run in runs.items():
        knobs = run["configuration"]
        targets = {"all-linear": "all linear layers", None: "query and value"}[knobs["target_modules"]]
        title = f"LoRA r={knobs['lora_dim']}, {targets}" if run["adapt"] == "lora" else "full fine-tuning"
        losses = {entry["step"]: entry["valid_loss"] for entry in run["history"]}
        rows[title, name] = [
            f"{run['parameters']['trainable']:,}",
            f"{knobs['lr']:g}",
            *(f"{losses[step]:.3f}" for step in steps),
            _link(name),
        ]
    return rows


def tasks(folder):
    """A row for each GLUE task that ships here: what the methods reach on its dev set, and what can be reached."""
    sizes = ["adapter, bytes", "model, bytes"]
    rows = {"": ["metric", "majority", "head alone", "LoRA", "full fine-tuning", "ceiling", *sizes, "result file"]}
    rows["---"] = ["---"] + ["---:"] * 7 + ["---"]
    for name in EMBEDDED_GLUE:
        record = read(name, folder)
        rows[name.split("_")[1]] = [
            *_trial(record),
            f"{100 * record['ceiling']['dev']['scores'][record['metric']]:.1f}",
            *(f"{record['systems'][method]['checkpoint_bytes']:,}" for method in ("lora", "full")),
            _link(name),
        ]
    return rows


def _trial(record):
    """Metric, majority and the scores of head, LoRA and full: mean and deviation over seeds."""
    metric, majority = record["metric"], record["majority"][record["metric"]]
    return [
        glue.METRICS[metric],
        "-" if majority is None else f"{100 * majority:.1f}",
        *(_mean(record["systems"][method]["scores"][metric]) for method in ("head", "lora", "full")),
    ]


def serving(folder):
    """What serving all tasks took, from one base and from a model each."""
    benchmark = read(MULTI_TASK, folder)
    one, each = (benchmark["served"][method] for method in ("lora", "full"))
    sizes = benchmark["bytes"]
    peaks = [system["peak_memory_bytes"] for system in (one, each)]
    rates = [system["texts_per_second"] for system in (one, each)]
    before = peaks[0]["before_loading"] / 1e6
    pairs = {
        "files, bytes (with the base)": (sizes["lora"] + sizes["base"], sizes["full"], ","),
        "tensors in memory, bytes": (one["tensor_bytes"], each["tensor_bytes"], ","),
        f"peak of the process, bytes ({before:.0f} million before a model is loaded)": (
            *(peak["process"] for peak in peaks),
            ",",
        ),
        "switch to another task, ms": (1e3 * one["seconds"]["switch"], 1e3 * each["seconds"]["switch"], ".3f"),
        "texts a second, one batch of each task in turn": (*(rate["in turns"] for rate in rates), ".0f"),
        "texts a second, task after task": (*(rate["task after task"] for rate in rates), ".0f"),
    }
    rows = {"": [f"one base, {len(benchmark['tasks'])} adapters", "a model each"], "---": ["---:", "---:"]}
    cells = {title: [f"{left:{form}}", f"{right:{form}}"] for title, (left, right, form) in pairs.items()}
    if "at once" in one["texts_per_second"]:  # not in the first records
        mixed = f"{one['texts_per_second']['at once']:.0f}"
        return rows | cells | {"texts a second, all tasks at once": [mixed, "-"]}
    return rows | cells


def official_glue(folder):
    """A row for each task and base: mean and deviation over seeds, at each method's best rate, of as many epochs."""
    titles = [
        "metric",
        "majority",
        "head alone",
        "LoRA, query and value",
        "LoRA, all linear layers",
        "full fine-tuning",
    ]
    rows = {"": [*titles, "learning rates, in this order", "epochs", "result files"]}
    rows["---"] = ["---"] + ["---:"] * 7 + ["---"]
    records = reading.read_folder(folder)
    names = [name for name in reached.best_trials(records) if not reading.is_synthetic(records[name])]
    for name in sorted(names, key=lambda name: reading.place(records[name])):
        record, settings = records[name], records[name]["configuration"]
        title = f"{reading.task_title(record)}, {settings['model']}"
        if title in rows:
            continue  # a better trial of the same is there
        metric, majority, head, lora, full = _trial(record)
        lrs = [f"{record['systems'][method]['lr']:g}" for method in ("head", "lora", "full")]
        runs = _seeds_of_query_and_value(records, record)
        scores = [records[run]["after"]["dev"][record["metric"]] for run in runs]
        rows[title] = [
            *(metric, majority, head, _mean(_of_seeds(scores)) if runs else "-", lora, full),
            ", ".join([lrs[0], *{f"{records[run]['configuration']['lr']:g}" for run in runs}, *lrs[1:]]),
            str(settings["num_epochs"]),
            ", ".join(map(_link, [name, *runs])),
        ]
    return rows


def _seeds_of_query_and_value(records, trial):
    """Names of the runs of LoRA on query and value like those of a trial, one for each seed of the best rate.

    The best rate is chosen as the trial chooses: of those with the most seeds the one whose first run scores highest.
    """
    wanted, metric = trial["configuration"], trial["metric"]
    # How often a run is validated changes none of its steps.
    free = {"target_modules", "device", "eval_batch_size", "eval_every", *runs.PLACE_KNOBS}
    found = {}
    for name, run in reading.runs_of(records).items():
        settings = run["configuration"]
        same = run["task"] == f"glue {reading.glue_task(trial).name}" and run["adapt"] == "lora"
        same = same and settings["target_modules"] is None and run["data"] == trial["data"]
        if same and all(settings[key] == wanted[key] for key in settings.keys() & wanted.keys() - free):
            found.setdefault(settings["lr"], {}).setdefault(settings["seed"], name)

    def seeds_and_score(by_seed):
        return len(by_seed), records[by_seed[min(by_seed)]]["after"]["dev"][metric] or -math.inf

    best = max(found.values(), key=seeds_and_score, default={})
    return [best[seed] for seed in sorted(best)]


def accounting(folder):
    """A row for each size of GPT-2: what training needs beside activations, worked out without any weights."""
    rows = {"": ["parameters", "LoRA trains", "LoRA, GB", "full, GB", "LoRA / full", "adapter, MB", "model, MB"]}
    rows["---"] = ["---:"] * len(rows[""])
    for name, sizes in read("nlg_compare", folder)["accounting"].items():
        one, every = sizes["lora"], sizes["full"]
        rows[name] = [
            f"{every['total']:,}",
            f"{one['trained']:,}",
            *(f"{method['bytes']['together'] / 1e9:.2f}" for method in (one, every)),
            f"{sizes['ratio']['bytes']['together']:.2f}",
            *(f"{method['bytes']['checkpoint'] / 1e6:,.1f}" for method in (one, every)),
        ]
    return rows


def why(folder):
    """A row for each kind of work: this library's time or memory divided by that of PEFT and of loralib 0.1.2."""
    record, cuda, peft, several = (
        read(name, folder) for name in (BENCHMARK, BENCHMARK_CUDA, BENCHMARK_PEFT, BENCHMARK_ROWS)
    )
    cases = {level: list(found.values()) for level, found in record["levels"].items()}
    on_gpu, experts, nf4 = list(cuda["levels"]["steps"].values()), peft["cases"]["experts"], peft["cases"]["nf4"]
    mixed, sizes = several["cells"], sorted({cell["rows"] for cell in several["cells"]})
    convolved = _times(cases["convolutions"])
    old = f"commit {cuda['environment']['commit'][:7]}, PEFT {cuda['rivals']['peft']}"
    depth = peft["configuration"]["num_layers"]
    found = [
        (f"training step, {len(cases['steps'])} cases on a CPU: time", "Steps", _times(cases["steps"])),
        ("the same: memory", "Steps", _peaks(cases["steps"])),
        (f"training step, {len(on_gpu)} cases on a GPU ({old}): time", "On a GPU", _times(on_gpu)),
        ("the same: memory", "On a GPU", _peaks(on_gpu)),
        (f"training step on a 4-bit base, {depth} layers: time", BESIDE_PEFT, {"peft": [nf4["ratio"]["median"]]}),
        ("the same: memory of a step", BESIDE_PEFT, {"peft": [_peak_ratio(nf4)]}),
        (
            f"training step of 8 experts, {depth} layers: time",
            BESIDE_PEFT,
            {"peft": [experts["ratio"]["median"]]},
        ),
        ("the same: memory of a step", BESIDE_PEFT, {"peft": [_peak_ratio(experts)]}),
        ("generation on a CPU, merged or not: time", "Generation", _times(cases["generation"])),
        *(
            (title, "Several adapters in one batch", {"peft": [cell[what]["ratio"]["median"] for cell in mixed]})
            for title, what in (
                (f"{sizes[0]} to {sizes[-1]} rows, each with its adapter: time of a token in `generate`", "tokens"),
                ("the same: time of one forward over whole texts", "text"),
                ("the same: time of one forward over one more token", "token"),
            )
        ),
        (
            "inject, merge, unmerge, merge for good, save, load, switch on a CPU: time",
            "Operations",
            _times(cases["operations"]),
        ),
        (f"the same on a GPU ({old})", "On a GPU", _times(list(cuda["levels"]["operations"].values()))),
        (f"one convolution on a CPU, {len(cases['convolutions'])} cases: time", "Convolutions", convolved),
        (
            "the same, with PEFT at a rank that gives an update of the same rank",
            "Convolutions",
            {"peft": convolved.get("peft_same_rank", [])},
        ),
    ]
    rows = {"": ["this library / PEFT", "this library / loralib 0.1.2", "measured in"], "---": ["---:", "---:", "---"]}
    for number, (title, heading, ratios) in enumerate(found):
        link = f"[{heading}]({DETAILED}#{heading.lower().replace(' ', '-')})"
        if any(ratios.values()):
            rows[title, number] = [*(_range(ratios.get(rival, [])) for rival in ("peft", "upstream")), link]
    return rows


def _times(cases):
    """The medians of the ratios of the cases, by rival."""
    rivals = {rival for case in cases for rival in case["ratios"]}
    return {name: [case["ratios"][name]["median"] for case in cases if name in case["ratios"]] for name in rivals}


def _peaks(cases):
    """The ratios of the peaks of memory of the cases, by rival."""
    systems = [{name: system["peak_bytes"] for name, system in case["systems"].items()} for case in cases]
    rivals = {name for peaks in systems for name in peaks}
    return {name: [peaks["ours"] / peaks[name] for peaks in systems if name in peaks] for name in rivals}


def _range(ratios):
    """Ratios as the smallest and the largest of them."""
    low, high = (f"{pick(ratios, default=0):.2f}" for pick in (min, max))
    return "-" if not ratios else low if low == high else f"{low} to {high}"


def generation(folder):
    """A row for each work: writing 32 tokens, one by one."""
    return _beside(read(BENCHMARK, folder)["levels"]["generation"])


def operations(folder):
    """A row for each thing that is done to a whole model."""
    return _beside(read(BENCHMARK, folder)["levels"]["operations"])


def convolutions(folder):
    """A row for each convolution, forward and backward or in evaluation."""
    return _beside(read(BENCHMARK, folder)["levels"]["convolutions"])


def generation_cuda(folder):
    """The same as `generation`, on a GPU."""
    return _beside(read(BENCHMARK_CUDA, folder)["levels"]["generation"])


def operations_cuda(folder):
    """The same as `operations`, on a GPU."""
    return _beside(read(BENCHMARK_CUDA, folder)["levels"]["operations"])


def _beside(cases):
    """A row for each case: its time, and that divided by the time of each other system."""
    others = [name for name in SYSTEMS if any(name in case["ratios"] for case in cases.values())]
    rows = {"": ["loralib, ms", *(f"loralib / {SYSTEMS[name]}" for name in others)]}
    rows["---"] = ["---:"] * len(rows[""])
    for key, case in cases.items():
        cells = [_spread(case["ratios"][name]) if name in case["ratios"] else "-" for name in others]
        rows[case["title"], key] = [f"{1e3 * case['systems']['ours']['seconds']['median']:,.2f}", *cells]
    return rows


def bars(folder):
    """A row for each aim of the benchmark that is missed: this library divided by a rival."""
    titles = ["divided by", "median of the ratios [quartiles]", "aim, at most"]
    rows = {"": titles, "---": ["---", "---:", "---:"]}
    for bar in read(BENCHMARK, folder)["bars"]:
        if not bar["met"]:
            rows[bar["title"], bar["rival"]] = [SYSTEMS[bar["rival"]], _spread(bar["value"]), f"{bar['most']:g}"]
    return rows


def steps(folder):
    """A row for each work and system: a training step divided by that of the frozen model, in time and all else."""
    rows = {
        "": [
            "time",
            "this library's time / that of the row",
            "time of the products with A and B, share",
            "bytes saved for the backward",
            "peak memory",
            "aten operators",
            "FLOPs",
        ]
    }
    rows["---"] = ["---:"] * len(rows[""])
    for key, case in read(BENCHMARK, folder)["levels"]["steps"].items():
        base = case["systems"]["floor"]
        for name, system in case["systems"].items():
            if name != "floor":
                time, narrow = case["through_floor"][name], system.get("narrow_products")
                others = [system[what] / base[what] for what in ("saved_bytes", "peak_bytes", "operations", "flops")]
                rows[f"{case['title']}: {SYSTEMS[name]}", key] = [
                    f"{time['median']:.2f} [{time['low']:.2f}, {time['high']:.2f}]",
                    f"{case['ratios'][name]['median']:.2f}" if name in case["ratios"] else "",
                    f"{100 * narrow['share']['median']:.1f} %" if narrow else "-",
                    *(f"{value:.2f}" for value in others),
                ]
    return rows


def steps_cuda(folder):
    """A row for each work on a GPU: a training step's time and peak of memory, divided by those of others."""
    through = [("ours", "peft"), ("ours", "floor"), ("peft", "floor"), ("full", "floor")]
    peaks = [("ours", "peft"), ("floor", "peft"), ("full", "floor")]
    times = [through[0], ("ours", "full"), *through[1:]]
    titles = [" / ".join(SYSTEMS[name] for name in pair) for pair in times + peaks]
    rows = {
        "": [f"time: {title}" for title in titles[: len(times)]]
        + [f"memory: {title}" for title in titles[len(times) :]]
    }
    rows["---"] = ["---:"] * len(rows[""])
    for case in read(BENCHMARK_CUDA, folder)["levels"]["steps"].values():
        times = [case["ratios"]["peft"], case["ratios"]["full"], *(case["through_floor"][n] for n, _ in through[1:])]
        sizes = {name: system["peak_bytes"] for name, system in case["systems"].items()}
        rows[case["title"]] = [
            f"{times[0]['median']:.2f} [{times[0]['low']:.2f}, {times[0]['high']:.2f}]",
            *(f"{time['median']:.2f}" for time in times[1:]),
            *(f"{sizes[one] / sizes[other]:.2f}" for one, other in peaks),
        ]
    return rows


def bases(folder):
    """A row for each base that was trained on: what it takes, and its validation losses."""
    runs = {name: read(name, folder) for name in BASES}
    steps = [entry["step"] for entry in next(iter(runs.values()))["history"]]
    columns = [*(f"loss at {step}" for step in steps), "result file"]
    rows = {"": ["model with adapters, bytes", *columns], "---": ["---:"] * (len(columns) + 1)}
    for name, run in runs.items():
        losses = {entry["step"]: entry["valid_loss"] for entry in run["history"]}
        # The first records are from before --base_dtype.
        rows[run["configuration"].get("base_dtype", "float32"), name] = [
            f"{run['bytes']['model']:,}",
            *(f"{losses[step]:.3f}" for step in steps),
            _link(name),
        ]
    return rows


def _if_measured(name, script, rows, folder):
    """What `rows` makes of the record `name`, or the command that makes the record."""
    if not (folder / f"{name}.json").is_file():
        command = f"python examples/benchmarks/{script} --record {name}"
        return {"": ["measured"], "---": ["---"], "all": [f"not yet: `{command}`"]}
    return rows(read(name, folder))


def base_dtypes(folder):
    """A row for each dtype of a base: its bytes, and the time and peak memory of a step."""
    return _if_measured(BENCHMARK_BASE, "base_dtypes.py", base_rows, folder)


def base_rows(record):
    """The rows of what benchmarks/base_dtypes.py measures."""
    found = record["bases"]
    precisions = list(found["float32"]["seconds"])
    titles = [title for p in precisions for title in (f"time, {p} products", f"peak memory, {p} products, MiB")]
    rows = {"": ["base, MiB", *titles], "---": ["---:"] * (len(titles) + 1)}
    for dtype, base in found.items():
        rows[dtype] = [f"{base['base_bytes'] / 2**20:.0f}"]
        for precision in precisions:
            ratio = base["ratio"][precision]
            rows[dtype].append(f"{ratio['median']:.2f} [{ratio['low']:.2f}, {ratio['high']:.2f}]")
            rows[dtype].append(f"{base['peak_bytes'][precision] / 2**20:,.0f}")
    return rows


def against_peft(folder):
    """A row for each case that is measured beside PEFT."""
    return _if_measured(BENCHMARK_PEFT, "against_peft.py", against_peft_rows, folder)


def against_peft_rows(record):
    """The rows of what benchmarks/against_peft.py measures."""
    titles = {"nf4": "NF4 base, all linear layers", "experts": "8 fused experts, and query and value"}
    rows = {
        "": ["trained", "time, ours / PEFT", "peak memory of a step, MiB: ours / PEFT", "ratio"],
        "---": ["---:"] * 4,
    }
    for case, found in record["cases"].items():
        ratio, (ours, theirs) = found["ratio"], found["peak_bytes"].values()
        rows[titles[case]] = [
            f"{found['trained']['loralib']:,}",
            f"{ratio['median']:.2f} [{ratio['low']:.2f}, {ratio['high']:.2f}]",
            f"{ours / 2**20:,.0f} / {theirs / 2**20:,.0f}",
            f"{_peak_ratio(found):.2f}",
        ]
    return rows


def _peak_ratio(case):
    return case["peak_bytes"]["loralib"] / case["peak_bytes"]["peft"]


def growth(folder):
    """A row for each axis along which a model grows."""
    return _if_measured(BENCHMARK_GROWTH, "growth.py", growth_rows, folder)


def growth_rows(record):
    """The rows of what benchmarks/growth.py measures: for each axis its ends, and the exponents."""
    whats = next(iter(record["axes"].values()))["points"][0]
    rows = {"": [f"{what}, MiB" if what == "memory" else f"{what}, ms" for what in whats]}
    rows["---"] = ["---:"] * len(whats)
    for axis, found in record["axes"].items():
        for number, point in zip(found["numbers"], found["points"], strict=True):
            rows[f"{axis}: {number:,}", number] = [
                f"{point[what] / 2**20:,.1f}" if what == "memory" else f"{1e3 * point[what]:,.2f}" for what in whats
            ]
        rows[f"{axis}: exponent", None] = [f"{found['exponents'][what]:.2f}" for what in whats]
    return rows


def extraction(folder):
    """A row for the base, for each rank of an extracted adapter, and for the full fine-tune."""
    return _if_measured(EXTRACTION, "extraction.py", extraction_rows, folder)


def extraction_rows(record):
    """The rows of what benchmarks/extraction.py measures."""
    rows = {"": [], "---": []}
    for task, found in record["extracted"].items():
        metric = "bleu" if task == "e2e" else glue.TASKS[task].metrics[0]
        title, name, factor = (
            ("E2E", "BLEU", 1) if task == "e2e" else (glue.TASKS[task].folder, glue.METRICS[metric], 100)
        )
        rows[""] += [f"{title}: {name}", "of the change, %", "KiB"]
        rows["---"] += ["---:"] * 3
        systems = {"base": found["base"], **{f"rank {r}": each for r, each in found["ranks"].items()}}
        for system, each in {**systems, "full fine-tuning": found["full"]}.items():
            share = {"base": 0.0, "full fine-tuning": 1.0}.get(system, each.get("energy"))
            size = f"{each['bytes'] / 1024:,.0f}" if "bytes" in each else ""
            rows.setdefault(system, []).extend(
                [_number(each["scores"][metric], factor, 1), _number(share, 100, 1), size]
            )
    return rows


def regret(folder):
    """A row for each way to train of benchmarks/when_lora_equals_full.py."""
    return regret_rows(read(REGRET, folder))


def regret_rows(record):
    """The rows of what benchmarks/when_lora_equals_full.py measures: the lowest points, and the long runs."""
    curves = {(curve["targets"], curve["r"], curve["batch_size"]): curve for curve in record["curves"]}
    small, large = sorted({size for _, _, size in curves})
    runs = {(run["targets"], run["r"]): run["losses"] for run in record["long"]}
    seen = [lines for lines, _ in runs[None, None]]
    middle, last = seen[len(seen) // 2 - 1], seen[-1]
    whats = ("best rate", "rate / full's rate", "loss")
    titles = [f"{what} ({size})" for size in (small, large) for what in whats]
    titles += [f"loss ({large}) - loss ({small})", f"long run: loss after {middle:,} / {last:,} lines"]
    rows = {"": ["trained", *titles], "---": ["---:"] * (len(titles) + 1)}
    for targets, r in dict.fromkeys(key[:2] for key in curves):
        one, other = (curves[targets, r, size] for size in (small, large))
        row = rows[f"{targets}, r={r}" if r else "full fine-tuning"] = [f"{one['trained']:,}"]
        for curve in (one, other):
            full = curves[None, None, curve["batch_size"]]
            spread = f" +- {curve['deviation']:.3f}" if curve["deviation"] is not None else ""
            ratio = curve["best_rate"] / full["best_rate"]
            loss = "diverged" if curve["mean"] is None else f"{curve['mean']:.3f}{spread}"
            row += [f"{curve['best_rate']:g}", f"{ratio:.0f}", loss]
        losses, means = dict(runs.get((targets, r), [])), (one["mean"], other["mean"])
        row.append("-" if None in means else f"{means[1] - means[0]:.3f}")
        row.append(" / ".join(f"{losses[n]:.3f}" for n in (middle, last) if losses))
    return rows


def integrations(folder):
    """A row for each tool in which an adapter is trained, saved, reloaded and resumed."""
    return integration_rows(read(INTEGRATIONS, folder))


def integration_rows(record):
    """The rows of what benchmarks/integrations.py finds."""
    titles = ("trains", "checkpoint, bytes", "reload differs by", "resume differs by")
    rows = {"": [f"{title}: ours / PEFT" for title in titles], "---": ["---:"] * len(titles)}
    for tool, systems in record["tools"].items():
        columns = [_outcome_cells(outcome) for outcome in systems.values()]
        rows[tool] = [" / ".join(cells) for cells in zip(*columns, strict=True)]
    return rows


def _outcome_cells(outcome):
    if "error" in outcome:
        return ["error"] * 4
    shown = [outcome["reload_difference"], outcome["resume_difference"]]
    differences = ["-" if value is None else "0" if value == 0 else f"{value:.1e}" for value in shown]
    return ["yes" if outcome["trains"] else "no", f"{outcome['checkpoint_bytes']:,}", *differences]


def adapters_per_row(folder):
    """A row for each batch of mixed adapters that is measured beside PEFT."""
    return _if_measured(BENCHMARK_ROWS, "adapters_per_row.py", adapters_per_row_rows, folder)


def adapters_per_row_rows(record):
    """The rows of what benchmarks/adapters_per_row.py measures."""
    titles = [f"{step}: {what}" for step in ("a text", "a token") for what in ("ours / PEFT", "added, ms: ours / PEFT")]
    rows = {"": [*titles, "a token within generate: ours / PEFT", "error: ours / PEFT"], "---": ["---:"] * 6}
    for cell in record["cells"]:
        columns = []
        for step in ("text", "token"):
            columns.append(_spread(cell[step]["ratio"]))
            columns.append(" / ".join(f"{1000 * seconds:.1f}" for seconds in cell[step]["added"].values()))
        columns.append(_spread(cell["tokens"]["ratio"]))
        columns.append(" / ".join("0" if error == 0 else f"{error:.0e}" for error in cell["error"].values()))
        rows[f"{cell['adapters']} adapters loaded, {cell['rows']} row{'s' * (cell['rows'] > 1)} in the batch"] = columns
    return rows


def _spread(ratio):
    return f"{ratio['median']:.2f} [{ratio['low']:.2f}, {ratio['high']:.2f}]"


TABLES = {
    "extraction": extraction,
    "regret": regret,
    "integrations": integrations,
    "adapters_per_row": adapters_per_row,
    "against_peft": against_peft,
    "growth": growth,
    "bases": bases,
    "base_dtypes": base_dtypes,
    "bars": bars,
    "why": why,
    "generation": generation,
    "operations": operations,
    "convolutions": convolutions,
    "generation_cuda": generation_cuda,
    "operations_cuda": operations_cuda,
    "steps_cuda": steps_cuda,
    "steps": steps,
    "figures": figures,
    "e2e": e2e,
    "study": study,
    "official_glue": official_glue,
    "tasks": tasks,
    "serving": serving,
    "accounting": accounting,
}


def in_lists(rows):
    """Rows that are keyed by their first cell, or by a tuple that begins with it, as lists of cells."""
    return [[name[0] if isinstance(name, tuple) else name, *cells] for name, cells in rows.items()]


def markdown(rows):
    """Lists of cells as lines of a Markdown table."""
    return "".join(f"| {' | '.join(cells)} |\n" for cells in rows)


def aligned(rows):
    """Lists of cells as lines for the terminal: the first column on the left, the others on the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "".join(
        "  ".join(
            [cells[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(cells[1:], widths[1:], strict=True))]
        ).rstrip()
        + "\n"
        for cells in rows
    )


def _link(name):
    return f"[{name}.json](examples/results/{name}.json)"


def _trained(parameters):
    return f"{parameters['trainable']:,} ({parameters['trainable'] / parameters['total']:.2%})"


def _of_seeds(values):
    return {
        "mean": statistics.fmean(values),
        "deviation": statistics.stdev(values) if len(values) > 1 else None,
    }


def _mean(score):
    """A mean over seeds, x 100, with their standard deviation if there are several."""
    if score["mean"] is None:
        return "undefined"
    deviation = "" if score["deviation"] is None else f" +- {100 * score['deviation']:.1f}"
    return f"{100 * score['mean']:.1f}{deviation}"


def _number(value, factor, digits):
    return "" if value is None else f"{factor * value:.{digits}f}"
