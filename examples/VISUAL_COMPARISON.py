"""LoRA against full fine-tuning as charts: quality, bytes, memory, time of a step, and the losses of both.

    cd examples
    python VISUAL_COMPARISON.py
    python VISUAL_COMPARISON.py --all
    python VISUAL_COMPARISON.py --output_dir charts
    python VISUAL_COMPARISON.py --run

Read from results/*.json, in a few seconds. Drawn, as PNG and SVG, into output/: bars and the curves of the losses, for
each two runs that differ in the method alone, with their result files. Printed are the bars of the best run of each
method and task, or with --all those that are drawn. --run measures what is missing on the models and the data that
ship here.
"""

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from common.cli import as_user_error, knob, parse_knobs, run
from common.files import write_atomically
from common.reports import comparison, missing, reached, reading, tables
from common.reports.missing import Gaps
from common.reports.reading import dig

HERE = Path(__file__).resolve().parent
TITLES = {"majority": "majority guess", "lora": "LoRA", "full": "full fine-tuning"}
COLOURS = {"majority": "#999999", "lora": "#1f77b4", "full": "#e07b00"}
# Those of E2E that are of 100; the others are in QUALITY_COMPARISON.py.
OF_100 = ("bleu", "meteor", "rouge_l", "slot_share")
# File: [(title, where a run has it, unit, form, whether the axis is logarithmic)].
COSTS = {
    "bytes": [
        ("what is saved, bytes", ("bytes", "checkpoint"), 1, ",.0f", True),
        ("state of the optimizer, bytes", ("bytes", "optimizer"), 1, ",.0f", True),
    ],
    "memory": [
        ("peak memory of the process, MiB", ("peak_memory_bytes", "process"), 2**20, ",.0f", False),
        ("peak memory on the GPU, MiB", ("peak_memory_bytes", "cuda"), 2**20, ",.0f", False),
    ],
    "step_time": [("median optimizer step, ms", ("seconds", "step"), 1e-3, ",.1f", False)],
}
WIDTH = 50  # of the longest bar in the terminal
SHORT = {"lora": "LoRA", "full": "full"}


@dataclass
class Knobs(comparison.Knobs):
    output_dir: str = knob(str(HERE / "output"), "folder for the charts")


class Bar(NamedTuple):
    method: str
    value: float | None
    text: str


class Panel(NamedTuple):
    title: str
    bars: dict[str, list[Bar]]  # under the name of what they are of, with the files
    logarithmic: bool = False
    most: float | None = None  # the end of the scale; by default the longest bar of a name


def quality_panels(records, pairs, gaps):
    """A panel for each base and data, and for each pair on E2E."""
    panels = {}
    for pair in pairs:
        if not comparison.is_scored(records, pair):
            continue
        lora, scored = records[pair[0]], comparison.scores_of(records, pair)
        kinds = reading.score_kinds(lora, main=bool(reading.glue_task(lora)))
        glue = reading.glue_task(lora)
        title = reading.base_and_data(lora) if glue else f"{reading.group_of(lora)}\n{files(pair)}"
        bars = panels.setdefault(f"{title}\n{'dev sets, ' if glue else ''}x 100", {})
        for key in [next(iter(kinds))] if glue else OF_100:
            kind, found = kinds[key], {}
            if glue:
                found["majority"] = reading.scores(lora, "majority").get(key), pair[0]
            found |= {
                method: (scored[name].get(key), name) for method, name in zip(("lora", "full"), pair, strict=True)
            }
            label = f"{glue.folder}, {kind.title}\n{files(pair)}" if glue else kind.title
            bars[label] = [
                Bar(
                    method,
                    None if value is None else kind.factor * value,
                    comparison.score_text(kind, {key: value}, key, gaps, name, records[name]),
                )
                for method, (value, name) in found.items()
            ]
    return [Panel(title, bars, most=100) for title, bars in panels.items()]


def files(pair):
    return f"{pair[0]}.json, {pair[1]}.json"


def cost_panels(records, pairs, costs, gaps):
    """A panel for each cost, once for what is synthetic and once for the rest, with the bars of each pair."""
    panels = {}
    for title, keys, unit, form, logarithmic in costs:
        for pair in pairs:
            lora = records[pair[0]]
            if "cuda" in keys and lora["environment"]["device"] == "cpu":
                continue
            bars = []
            for method, name in zip(("lora", "full"), pair, strict=True):
                value = dig(records[name], *keys)
                if value is None:
                    bars.append(Bar(method, None, gaps.cell(missing.remake(name, records[name]))))
                else:
                    bars.append(Bar(method, value / unit, f"{value / unit:{form}}"))
            kind = reading.SYNTHETIC_BASE if reading.is_synthetic(lora) else "from outside"
            panel = panels.setdefault((title, kind), Panel(f"{title}; data: {kind}", {}, logarithmic))
            panel.bars[f"{reading.group_of(lora)}\n{files(pair)}"] = bars
    return list(panels.values())


def print_best(records):
    """The bars of the best run of each method, two lines a task, what is synthetic apart."""
    found = reached.best(records)
    width = max((len(comparison.short_title(record, kind)) for record, _, kind, _ in found), default=0)
    for synthetic, title in comparison.SECTIONS.items():
        lines = []
        for record, key, kind, rows in found:
            if reading.is_synthetic(record) == synthetic:
                label = comparison.short_title(record, kind)
                for method in ("lora", "full"):
                    if method in rows and rows[method].scores[key][0] is not None:
                        text = comparison.reached_text(kind, rows[method], key)
                        bar = "#" * round(WIDTH * max(0, kind.factor * rows[method].scores[key][0]) / 100)
                        lines.append(f"{label:<{width}}  {SHORT[method]} {text:<25} {bar}".rstrip())
                        label = ""
        if lines:
            print(f"\n{title}\n\n" + "\n".join(lines))


def print_panel(panel):
    """The bars in the terminal, all from 0."""
    print(f"\n{panel.title}")
    for label, bars in panel.bars.items():
        print("\n" + "\n".join(f"  {line}" for line in label.splitlines()))
        most = panel.most or max((bar.value for bar in bars if bar.value is not None), default=0)
        for bar in bars:
            share = max(bar.value, 0) / most if bar.value is not None and most > 0 else 0
            print(f"    {TITLES[bar.method]:<17} {bar.text:>12} {'#' * round(WIDTH * share)}".rstrip())


def print_losses(records, pairs):
    """The validation losses that both runs of a pair have."""
    for pair in pairs:
        losses = [{entry["step"]: entry["valid_loss"] for entry in records[name]["history"]} for name in pair]
        rows = [["step", "LoRA", "full"]]
        rows += [[f"{step:,}", *(f"{side[step]:.4f}" for side in losses)] for step in losses[0] if step in losses[1]]
        print(f"\nvalidation loss, {reading.group_of(records[pair[0]])}\n{files(pair)}\n")
        print(tables.aligned(rows), end="")


def draw_panels(panels, pyplot):
    """A figure of horizontal bars, a panel below the other."""
    heights = [sum(map(len, panel.bars.values())) + len(panel.bars) + 2.5 for panel in panels]
    figure, axes = pyplot.subplots(
        len(panels), figsize=(11, 0.32 * sum(heights)), squeeze=False, height_ratios=heights, layout="constrained"
    )
    colours = {}
    for axis, panel in zip(axes[:, 0], panels, strict=True):
        place, ticks, drawn = 0, [], {}
        for bars in panel.bars.values():
            ticks.append(place + (len(bars) - 1) / 2)
            for bar in bars:
                value = bar.value or 0
                drawn[bar.method] = axis.barh(place, value, 0.9, color=COLOURS[bar.method])
                axis.annotate(
                    *(bar.text.split(" [")[0], (max(value, 0), place)),  # the terminal has the list of commands
                    **{"xytext": (4, 0), "textcoords": "offset points", "va": "center", "fontsize": 8},
                )
                place += 1
            place += 1
        axis.set_yticks(ticks, panel.bars, fontsize=7)
        axis.invert_yaxis()
        axis.set_title(panel.title, fontsize=9)
        axis.margins(x=0.15)
        if panel.most:
            axis.set_xlim(right=1.08 * panel.most)
        if panel.logarithmic:
            axis.set_xscale("log")
            axis.set_xlabel("logarithmic", fontsize=8)
        axis.spines[["top", "right"]].set_visible(False)
        colours |= drawn
    add_legend(figure, {TITLES[method]: bar for method, bar in colours.items()})
    return figure


def add_legend(figure, handles):
    figure.legend(handles.values(), handles.keys(), fontsize=8, loc="outside upper right", ncols=len(handles))


def draw_losses(records, pairs, pyplot):
    """A figure of the training losses (lines) and the validation losses (points), a panel for each pair."""
    columns = min(2, len(pairs))
    lines = -(-len(pairs) // columns)
    figure, axes = pyplot.subplots(
        lines, columns, figsize=(6.5 * columns, 4 * lines), squeeze=False, layout="constrained"
    )
    for axis, pair in zip(axes.flat, pairs, strict=False):
        for method, name in zip(("lora", "full"), pair, strict=True):
            record, colour = records[name], COLOURS[method]
            axis.plot(
                *zip(*record["curve"], strict=True), color=colour, linewidth=0.8, label=f"{TITLES[method]}, training"
            )
            steps, losses = zip(*((entry["step"], entry["valid_loss"]) for entry in record["history"]), strict=True)
            axis.plot(steps, losses, "o", color=colour, markeredgecolor="black", label=f"{TITLES[method]}, validation")
        smoothing = records[pair[0]]["configuration"]["label_smoothing"]
        note = f"\ntraining with label smoothing {smoothing:g}, validation without" if smoothing else ""
        axis.set_title(f"{reading.group_of(records[pair[0]])}\n{files(pair)}{note}", fontsize=7)
        axis.set(xlabel="optimizer step", ylabel="loss")
    for axis in axes.flat[len(pairs) :]:
        axis.set_visible(False)
    add_legend(figure, {line.get_label(): line for line in axes.flat[0].lines})
    return figure


def panels_of(records, pairs, gaps):
    """{name of a chart: its panels}, without charts that would be empty."""
    charts = {"quality": quality_panels(records, pairs, gaps)}
    charts |= {name: cost_panels(records, pairs, costs, gaps) for name, costs in COSTS.items()}
    return {name: panels for name, panels in charts.items() if panels}


def report(records, pairs, charts, gaps):
    """Print everything."""
    for panels in charts.values():
        for panel in panels:
            print_panel(panel)
    print_losses(records, pairs)
    comparison.show([*comparison.no_pairs(records, gaps), *gaps.block()])


def draw(records, pairs, charts, folder):
    """Draw everything; return the names of the charts."""
    import matplotlib  # here, since what is printed needs none of it

    matplotlib.use("Agg")
    matplotlib.rcParams["figure.dpi"] = 120  # that of the files, too: the width of text depends on it
    matplotlib.rcParams["svg.fonttype"] = "none"  # text that can be searched, rather than outlines
    from matplotlib import pyplot

    figures = {name: draw_panels(panels, pyplot) for name, panels in charts.items()}
    if pairs:
        figures["loss_curves"] = draw_losses(records, pairs, pyplot)
    for name, figure in figures.items():
        figure.get_layout_engine().execute(figure)
        figure.set_layout_engine(None)  # or each file would be laid out again, twice
        for form in ("png", "svg"):
            save = functools.partial(figure.savefig, format=form)
            write_atomically(folder / f"{name}.{form}", save)
        pyplot.close(figure)
    return list(figures)


def main():
    knobs = parse_knobs(Knobs, __doc__)
    records, folder, gaps = comparison.read(knobs), Path(knobs.output_dir), Gaps()
    with as_user_error(OSError):
        folder.mkdir(parents=True, exist_ok=True)
    pairs = comparison.pairs(records)
    charts = panels_of(records, pairs, gaps)
    if knobs.all:
        report(records, pairs, charts, gaps)
    else:
        print_best(records)
        comparison.show([comparison.MORE])
    written = [f"{name}.png, {name}.svg" for name in draw(records, pairs, charts, folder)]
    print(f"\nwritten to {folder}: {', '.join(written) or 'nothing, since there is no pair of runs'}")


if __name__ == "__main__":
    run(main)
