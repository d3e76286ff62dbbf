"""LoRA against full fine-tuning, metric by metric, for each two runs that differ in the method alone.

    cd examples
    python QUALITY_COMPARISON.py
    python QUALITY_COMPARISON.py --pair nlg_compare_lora nlg_compare_full
    python QUALITY_COMPARISON.py --run

Read from results/*.json, in a second. Two runs are a pair if data, base, knobs, steps, device and versions are the
same; each method has a learning rate of its own. Runs that differ in more are not compared, and with --pair it is said
in what they differ. --run measures what is missing on the models and the data that ship here.
"""

from dataclasses import dataclass

from common.cli import knob, parse_knobs, run
from common.reports import comparison
from common.reports.comparison import Gaps

NOTES = """In brackets 95 % of resamples of the test examples, one seed; +- is the standard deviation over seeds. A
difference whose interval holds 0 may be chance. One seed says nothing of how far another one would be away."""


@dataclass
class Knobs(comparison.Knobs):
    pair: tuple[str, str] | None = knob(None, "compare these two result files, and say why if they cannot be")


def difference(kind, lora, full):
    """[LoRA - full, which of them is better], as cells."""
    if lora is None or full is None:
        return ["-", "-"]
    gain = kind.sign * (lora - full)
    better = "LoRA" if gain > 0 else "full" if gain < 0 else "equal" if kind.sign else "-"
    return [f"{kind.factor * (lora - full):+.{kind.digits}f}", better]


def of_runs(records, pair, gaps):
    """(title, lists of cells, lines below) of a run of LoRA and one of full fine-tuning."""
    found = {name: comparison.scores(records[name]) for name in pair}
    lora = records[pair[0]]
    kinds = comparison.score_kinds(lora)
    rows = [["", "LoRA", "full", "LoRA - full", "better"]]
    for key, kind in kinds.items():
        texts = [comparison.score_text(kind, found[name], key, gaps, name, records[name]) for name in pair]
        rows.append([comparison.with_direction(kind), *texts, *difference(kind, *(found[n].get(key) for n in pair))])
    lines = comparison.pair_sources(records, pair)
    if comparison.glue_task(lora) is None:
        columns, sources = intervals(records, pair, kinds, gaps)
        rows = [[*row, *cells] for row, cells in zip(rows, columns, strict=True)]
        lines += sources
    else:
        trials = comparison.trials_of(records).items()
        alike = [f"{name}.json" for name, trial in trials if comparison.group_of(trial) == comparison.group_of(lora)]
        spread = ", ".join(alike) or gaps.cell(comparison.trial_command(lora))
        lines.append(f"spread: {spread}")
    return comparison.pair_title(records, pair), rows, lines


def intervals(records, pair, kinds, gaps):
    """(Columns of intervals for a pair on E2E, with their titles; where they are from)."""
    sources = [comparison.interval_sources(records, records[name]) for name in pair]
    both = [(name, system) for name, system in sources[0].items() if name in sources[1]]
    command, lines = comparison.spread_command(records, pair), []
    sides = []
    for title, found in zip(("LoRA", "full", "LoRA - full"), (*sources, dict(both)), strict=True):
        bounds = {}
        for name, system in list(found.items())[:1]:
            ways = records[name]["intervals"]
            if title == "LoRA - full":
                sign = 1 if system == "adapted" else -1  # what LoRA is there
                between = ways["differences"]["adapted - base"]
                bounds = {key: pair and [sign * bound for bound in pair] for key, pair in between.items()}
            else:
                bounds = ways["systems"][system]
            lines.append(f"95 % of {title}: {name}.json, {ways['resamples']} resamples")
        sides.append((title, bounds))
    rows = [[f"{title}, 95 %" for title, _ in sides]]
    for key, kind in kinds.items():
        empty = gaps.cell(command) if key in comparison.WITH_INTERVALS else "-"
        rows.append([kind.interval(bounds[key]) if bounds.get(key) else empty for _, bounds in sides])
    return rows, lines


def of_trial(name, record):
    """The same of a trial: means and deviations over its seeds, and the interval of its first seed."""
    seeds = record["configuration"]["seeds"]
    lora, full = (record["systems"][system] for system in ("lora", "full"))
    rows = [["", "LoRA", "full", "LoRA - full", "better", "LoRA - full, 95 %"]]
    for key, kind in comparison.score_kinds(record).items():
        scores = [comparison.score_of(system, key) for system in (lora, full)]
        if None in scores:
            continue  # of another dev set
        bounds = record["intervals"]["differences"]["full - lora"].get(key.split()[1])
        rows.append(
            [
                comparison.with_direction(kind),
                *(comparison.mean_text(kind, score) for score in scores),
                *difference(kind, *(score["mean"] for score in scores)),
                kind.interval([-bound for bound in bounds]) if bounds else "undefined",
            ]
        )
    lines = [
        f"{title}: {name}.json, lr {system['lr']:g} of {len(system['tried'])} tried, {seeds} seed{'s' * (seeds > 1)}"
        for title, system in (("LoRA", lora), ("full", full))
    ]
    title = (
        f"{comparison.group_of(record)}\nscored on {comparison.scored_on(record)}, {comparison.device_title(record)}"
    )
    return title, rows, [*lines, f"95 % of LoRA - full: the first seed, {record['intervals']['resamples']} resamples"]


def report(records, pair=None):
    """[(title, lists of cells, lines below)] of all pairs and trials, or of the one pair that is asked for."""
    gaps = Gaps()
    if pair:
        blocks = [of_runs(records, comparison.require_pair(records, pair), gaps)]
    else:
        blocks = [of_runs(records, pair, gaps) for pair in comparison.pairs(records)]
        blocks += [of_trial(name, record) for name, record in comparison.trials_of(records).items()]
        blocks += comparison.no_pairs(records, gaps)
    return [*blocks, (NOTES, [], []), *gaps.block()]


def main():
    knobs = parse_knobs(Knobs, __doc__)
    comparison.show(report(comparison.read(knobs), knobs.pair))


if __name__ == "__main__":
    run(main)
