"""What LoRA and full fine-tuning cost: parameters, bytes, memory, time, and the price of many tasks.

    cd examples
    python LORA_vs_FULL_COMPARISON.py
    python LORA_vs_FULL_COMPARISON.py --all
    python LORA_vs_FULL_COMPARISON.py --tasks 100 --gpu_hour_price 2.5 --gb_month_price 0.1 --months 12
    python LORA_vs_FULL_COMPARISON.py --pair nlg_smollm2_lora nlg_smollm2_full --tasks 50
    python LORA_vs_FULL_COMPARISON.py --run

Read from results/*.json, in a second. The first prints the ratios of the best pair of each task; --all and --pair every
cost, for each two runs that differ in the method alone. The prices are yours: without them no cost is shown. The
currency is that of the prices. --run measures what is missing on the models and the data that ship here.
"""

from dataclasses import dataclass

from common.cli import UserError, knob, parse_knobs, require_positive, run
from common.reports import comparison, missing, reading
from common.reports.missing import Gaps
from common.reports.reading import dig

MIB, GB = 2**20, 1e9
# Title: where a run has it, the form of a cell, and its unit.
COSTS = {
    "trained parameters": (("parameters", "trainable"), ",.0f", 1),
    "saved, bytes": (("bytes", "checkpoint"), ",.0f", 1),
    "state of the optimizer, bytes": (("bytes", "optimizer"), ",.0f", 1),
    "peak memory of the process, MiB": (("peak_memory_bytes", "process"), ",.1f", MIB),
    "peak memory on the GPU, MiB": (("peak_memory_bytes", "cuda"), ",.1f", MIB),
    "median step in its own run, ms": (("seconds", "step"), ",.1f", 1e-3),
    "training with validations, s": (("seconds", "train"), ",.1f", 1),
    "the whole run, s": (("seconds", "total"), ",.1f", 1),
}
# Of a pair, in the report of one screen: ratios LoRA / full.
RATIOS = {
    "trained": ("parameters", "trainable"),
    "saved": ("bytes", "checkpoint"),
    "optimizer": ("bytes", "optimizer"),
    "peak memory": ("peak_memory_bytes", "process"),
    "step": ("seconds", "step"),
}
SERVING = {
    "tensors in memory, MiB": (("tensor_bytes",), ",.1f", MIB),
    "peak memory of the process, MiB": (("peak_memory_bytes", "process"), ",.1f", MIB),
    "loading, s": (("seconds", "load"), ",.2f", 1),
    "switch to another task, ms": (("seconds", "switch"), ",.3f", 1e-3),
    "texts a second, tasks in turns": (("texts_per_second", "in turns"), ",.0f", 1),
    "texts a second, task after task": (("texts_per_second", "task after task"), ",.0f", 1),
    "texts a second, all tasks at once": (("texts_per_second", "at once"), ",.0f", 1),
}
NOTES = """Ratios are LoRA / full. The peak of a process holds Python, the libraries and the activations, too:
nearly all of it for a small model. Seconds of two runs are of different times: where other work shared the machine they
are no fair measure of a step. The steps in turn are, since both methods took them on the same batches."""

BEST_NOTES = """Ratios and pairs are LoRA / full; GB with the base once. A step is one taken in turn, if any were. The
peak of a process holds Python, the libraries and the activations, too."""
# Of serving, in the report of one screen.
SERVING_SHOWN = ("files", "tensors", "switch", "texts a second, tasks in turns", "texts a second, all")


@dataclass
class Knobs(comparison.Knobs):
    pair: tuple[str, str] | None = knob(None, "only these two result files, and say why if they cannot be compared")
    tasks: int = knob(10, "how many tasks the cost model trains and keeps, each like the one that was measured")
    gpu_hour_price: float | None = knob(None, "price of an hour of the device, for the cost of training")
    gb_month_price: float | None = knob(None, "price of keeping 10^9 bytes for a month, for the cost of storage")
    months: float = knob(12, "how long the tasks are kept")


def check(knobs):
    require_positive(knobs, "tasks", "months")
    for name in ("gpu_hour_price", "gb_month_price"):
        price = getattr(knobs, name)
        if price is not None and not 0 <= price < float("inf"):
            raise UserError(f"--{name} {price}: must be a price, 0 or more")


def row(title, values, form, unit=1):
    """A line of both methods and their ratio; what is not there stays open."""
    texts = ["-" if value is None else f"{value / unit:{form}}" for value in values]
    lora, full = values
    return [title, *texts, f"{lora / full:#.3g}" if lora is not None and full else "-"]


def costs(records, pair, gaps):
    """(title, lists of cells, lines below) of a pair."""
    lora, full = (records[name] for name in pair)
    rows = [["", "LoRA", "full", "LoRA / full"]]
    for title, (keys, form, unit) in COSTS.items():
        values = [dig(record, *keys) for record in (lora, full)]
        if "cuda" in keys and lora["environment"]["device"] == "cpu":
            rows.append([title, *["no GPU"] * 2, "-"])
        else:
            rows.append(
                filled(row(title, values, form, unit), [missing.remake(name, records[name]) for name in pair], gaps)
            )
    lines = comparison.pair_sources(records, pair)
    name, steps = comparison.steps_in_turn(records, pair)
    title = "median step, in turn, ms"
    if steps:
        rows.append(row(title, [steps["lora"], steps["full"]], ",.1f", 1e-3)[:-1] + [f"{steps['ratio']:#.3g}"])
        low, high = steps["quartiles"]
        lines.append(
            f"in turn: {name}.json, {len(steps['seconds']['lora'])} pairs of steps; the ratio is their median, with "
            f"quartiles {low:.3f} and {high:.3f}"
        )
    elif reading.glue_task(lora) is None:
        rows.append([title, *[gaps.cell(missing.turns_command(records, pair))] * 2, "-"])
    return comparison.pair_title(records, pair), rows, lines


def filled(cells, commands, gaps):
    """The cells with the commands of those that are empty."""
    texts = [gaps.cell(command) if text == "-" else text for text, command in zip(cells[1:3], commands, strict=True)]
    return [cells[0], *texts, cells[3]]


def serving(name, record):
    """The same of a benchmark with many tasks."""
    served, sizes = record["served"], record["bytes"]
    rows = [["", "one base, adapters", "a model each", "adapters / models"]]
    rows.append(row("files, the base with them, bytes", [sizes["lora"] + sizes["base"], sizes["full"]], ",.0f"))
    for title, (keys, form, unit) in SERVING.items():
        cells = row(title, [dig(served[method], *keys) for method in ("lora", "full")], form, unit)
        rows.append([*cells[:2], "nothing to switch", "-"] if "switch" in keys else cells)
    tasks = ", ".join(record["tasks"])
    title = f"Serving {len(record['tasks'])} tasks ({tasks}), {reading.base_and_data(record)}"
    return f"{title}\n{reading.device_title(record)}", rows, [f"both: {name}.json"]


def hours_and_bytes(records, pair, count):
    """([hours to train so many tasks], [bytes to keep of them]) by LoRA, with the base, and by full fine-tuning.

    The hours are None where a run was stopped and resumed: its record has the seconds of the last part.
    """
    lora, full = (records[name] for name in pair)
    seconds = [record["seconds"]["train"] for record in (lora, full)]
    hours = [None if taken is None else count * taken / 3600 for taken in seconds]
    kept = [count * record["bytes"]["checkpoint"] for record in (lora, full)]
    return hours, [full["bytes"]["model"] + kept[0], kept[1]]


def cost_model(records, pair, knobs):
    """The same of the costs of many tasks, term by term."""
    lora, full = (records[name] for name in pair)
    count, base = knobs.tasks, full["bytes"]["model"]
    seconds = [record["seconds"]["train"] for record in (lora, full)]
    sizes = [record["bytes"]["checkpoint"] for record in (lora, full)]
    hours, kept = hours_and_bytes(records, pair, count)
    rows = [
        ["", "LoRA", "full", "LoRA / full"],
        row("seconds to train a task", seconds, ",.1f"),
        row(f"hours to train {count:,}: seconds x {count:,} / 3600", hours, ",.3f"),
        row("bytes of a task", sizes, ",.0f"),
        row("bytes of the base, kept once", [base, 0], ",.0f"),
        row(f"bytes in all: bytes of the base + {count:,} x bytes of a task", kept, ",.0f"),
    ]
    prices = []
    if knobs.gpu_hour_price is not None:
        prices.append([None if hour is None else knobs.gpu_hour_price * hour for hour in hours])
        rows.append(row(f"training: hours x {knobs.gpu_hour_price:g}", prices[-1], ",.4f"))
    if knobs.gb_month_price is not None:
        prices.append([knobs.gb_month_price * knobs.months * size / GB for size in kept])
        title = f"keeping: bytes / 10^9 x {knobs.months:g} months x {knobs.gb_month_price:g}"
        rows.append(row(title, prices[-1], ",.4f"))
    if len(prices) == 2:
        together = [None if None in both else sum(both) for both in zip(*prices, strict=True)]
        rows.append(row("together", together, ",.4f"))
    lines = [f"seconds and bytes: {pair[0]}.json, {pair[1]}.json; the base: {pair[1]}.json"]
    if not prices:
        lines.append("no prices given: --gpu_hour_price and --gb_month_price add the costs")
    if lora["environment"]["device"] == "cpu" and knobs.gpu_hour_price is not None:
        lines.append("the seconds are of a CPU: the price is taken for an hour of that machine, and no GPU is meant")
    return f"{count:,} tasks like this one: {comparison.pair_title(records, pair)}", rows, lines


def best(records, knobs):
    """Blocks of one line a task: the ratios of its best pair of runs, and what many tasks like it take."""
    count = knobs.tasks
    found = [[*RATIOS, f"{count:,} tasks: hours", "GB", *(["cost"] if prices(knobs) else [])]]
    for pair in comparison.best_pairs(records).values():
        ratios = {}
        for title, keys in RATIOS.items():
            if title == "peak memory" and dig(records[pair[0]], "peak_memory_bytes", "cuda"):
                keys = ("peak_memory_bytes", "cuda")
            lora, full = (dig(records[name], *keys) for name in pair)
            ratios[title] = f"{lora / full:#.3g}" if lora is not None and full else "-"
        name, steps = comparison.steps_in_turn(records, pair)
        if steps:
            ratios["step"] = f"{steps['ratio']:#.3g}"
        hours, kept = hours_and_bytes(records, pair, count)
        cells = [_both(hours), _both([size / GB for size in kept])]
        if prices(knobs):
            keeping = (knobs.gb_month_price or 0) * knobs.months
            costs = [
                None if hour is None else (knobs.gpu_hour_price or 0) * hour + keeping * size / GB
                for hour, size in zip(hours, kept, strict=True)
            ]
            cells.append(_both(costs))
        found.append((records[pair[0]], None, [*ratios.values(), *cells], [*pair, *([name] if steps else [])]))
    return comparison.overview(found)


def _both(values):
    return " / ".join("-" if value is None else f"{value:.2f}" for value in values)


def served(records):
    """The block of one benchmark with many tasks, in short."""
    for name, record in list(reading.benchmarks_of(records).items())[:1]:
        _, (titles, *rows), lines = serving(name, record)
        title = f"Serving {len(record['tasks'])} tasks on {record['configuration']['model']}"
        yield title, [titles, *(cells for cells in rows if cells[0].startswith(SERVING_SHOWN))], lines


def prices(knobs):
    return [price for price in (knobs.gpu_hour_price, knobs.gb_month_price) if price is not None]


def report(records, knobs):
    """[(title, lists of cells, lines below)]."""
    gaps = Gaps()
    pairs = [comparison.require_pair(records, knobs.pair)] if knobs.pair else comparison.pairs(records)
    blocks = [costs(records, pair, gaps) for pair in pairs]
    if not knobs.pair:
        blocks += [serving(name, record) for name, record in reading.benchmarks_of(records).items()]
    blocks += [cost_model(records, pair, knobs) for pair in pairs]
    if not knobs.pair:
        blocks += comparison.no_pairs(records, gaps)
    return [*blocks, (NOTES, [], []), *gaps.block()]


def main():
    knobs = parse_knobs(Knobs, __doc__)
    check(knobs)
    records = comparison.read(knobs)
    if knobs.all or knobs.pair:
        comparison.show(report(records, knobs))
    else:
        comparison.show([*best(records, knobs), *served(records), (BEST_NOTES, [], []), comparison.MORE])


if __name__ == "__main__":
    run(main)
