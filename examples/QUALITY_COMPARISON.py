"""LoRA against full fine-tuning, metric by metric, for each two runs that differ in the method alone.

    cd examples
    python QUALITY_COMPARISON.py
    python QUALITY_COMPARISON.py --all
    python QUALITY_COMPARISON.py --pair nlg_compare_lora nlg_compare_full
    python QUALITY_COMPARISON.py --run

Read from results/*.json, in a second. The first prints the best pair of each task, --all every pair and every score.
Two runs are a pair if data, base, knobs, steps, device and versions are the same; each method has a learning rate of
its own. Runs that differ in more are not compared, and with --pair it is said in what they differ. --run measures what
is missing on the models and the data that ship here.
"""

from dataclasses import dataclass

from common.cli import knob, parse_knobs, run
from common.reports import comparison, missing, reached, reading
from common.reports.missing import Gaps

NOTES = """In brackets 95 % of resamples of the test examples, one seed; +- is the standard deviation over seeds. A
difference may be chance if its interval holds 0 or if the seeds disagree; without an interval neither method is called
better. One seed says nothing of how far another one would be away."""
# Of E2E, in the report of one screen.
SHOWN = ("bleu", "meteor", "slot_error_rate")


@dataclass
class Knobs(comparison.Knobs):
    pair: tuple[str, str] | None = knob(None, "compare these two result files, and say why if they cannot be")


def difference(kind, lora, full, bounds, gaps=()):
    """[LoRA - full, its interval, which of them is better], as cells; `gaps` are the differences of each seed."""
    if lora is None or full is None:
        return ["-", "-", "-"]
    gap = lora - full
    text = f"{round(kind.factor * gap, kind.digits) + 0.0:+.{kind.digits}f}"
    if not kind.sign:
        return [text, kind.interval(bounds) if bounds else "-", "-"]
    if bounds is None:
        return [text, "-", "no interval"]
    agreed = all(bound * each > 0 for bound in bounds for each in [gap, *gaps])
    better = ("LoRA" if kind.sign * gap > 0 else "full") if agreed else "may be chance"
    return [text, kind.interval(bounds), better]


def of_runs(records, pair, gaps):
    """(title, lists of cells, lines below) of a run of LoRA and one of full fine-tuning."""
    found, lora = comparison.scores_of(records, pair), records[pair[0]]
    between, source, sides = {}, None, [({}, None)] * 2
    if comparison.is_scored(records, pair):
        between, source = reached.difference_intervals(records, *pair)
        sides = [reached.intervals(records, name) for name in pair]
    lines = comparison.pair_sources(records, pair)
    is_e2e = reading.glue_task(lora) is None
    rows = [["", "LoRA", "full", "LoRA - full", "95 %", "better", *(["LoRA, 95 %", "full, 95 %"] if is_e2e else [])]]
    command = missing.spread_command(records, pair) if is_e2e else None
    for key, kind in reading.score_kinds(lora).items():
        texts = [comparison.score_text(kind, found[name], key, gaps, name, records[name]) for name in pair]
        cells = difference(kind, *(found[name].get(key) for name in pair), between.get(key))
        if is_e2e:
            empty = gaps.cell(command) if key in reading.WITH_INTERVALS and not source else "-"
            cells[1] = empty if cells[1] == "-" else cells[1]
            cells += [kind.interval(bounds[key]) if key in bounds else empty for bounds, _ in sides]
        rows.append([comparison.with_direction(kind), *texts, *cells])
    if is_e2e:
        for title, name in (("LoRA", sides[0][1]), ("full", sides[1][1]), ("LoRA - full", source)):
            if name:
                lines.append(f"95 % of {title}: {name}.json, {records[name]['intervals']['resamples']} resamples")
    else:
        trials = reading.trials_of(records).items()
        alike = [f"{name}.json" for name, trial in trials if reading.group_of(trial) == reading.group_of(lora)]
        lines.append(f"spread: {', '.join(alike) or gaps.cell(missing.trial_command(lora))}")
    return comparison.pair_title(records, pair), rows, lines


def of_trial(name, record):
    """The same of a trial: means and deviations over its seeds, and the interval of its first seed."""
    seeds = record["configuration"]["seeds"]
    rows = [["", "LoRA", "full", "LoRA - full", "95 %", "better"]]
    for key, kind in reading.score_kinds(record).items():
        cells = trial_cells(record, key, kind)
        if cells:
            rows.append([comparison.with_direction(kind), *cells])
    lines = [
        f"{title}: {name}.json, lr {system['lr']:g} of {len(system['tried'])} tried, {seeds} seed{'s' * (seeds > 1)}"
        for title, system in (("LoRA", record["systems"]["lora"]), ("full", record["systems"]["full"]))
    ]
    part = "" if reading.is_whole(record) else ", a part of the dev set"
    title = f"{reading.group_of(record)}\nscored on {reading.scored_on(record)}{part}, {reading.device_title(record)}"
    return title, rows, [*lines, f"95 % of LoRA - full: the first seed, {record['intervals']['resamples']} resamples"]


def trial_cells(record, key, kind):
    """[LoRA, full, LoRA - full, its interval, which is better] of a trial; None for another dev set."""
    scores = [reading.score_of(record["systems"][system], key) for system in ("lora", "full")]
    if None in scores:
        return None
    bounds = record["intervals"]["differences"]["full - lora"].get(key.split()[1])
    texts = [comparison.mean_text(kind, score["mean"], score["deviation"]) for score in scores]
    bounds = bounds and [-bounds[1], -bounds[0]]
    seeds = zip(*(score["values"] for score in scores), strict=True)
    gaps = [lora - full for lora, full in seeds if None not in (lora, full)]
    return [*texts, *difference(kind, *(score["mean"] for score in scores), bounds, gaps)]


def best(records):
    """Blocks of one line a task: its trial of the most seeds, or the best pair of runs."""
    found, compared = [["LoRA", "full", "LoRA - full", "95 %", "better"]], set()
    for name in reached.best_trials(records):
        record = records[name]
        if reading.group_of(record) not in compared:
            compared.add(reading.group_of(record))
            key, kind = reading.main_kind(record)
            found.append((record, kind, trial_cells(record, key, kind), [name]))
    for group, pair in comparison.best_pairs(records).items():
        if group not in compared:
            record, scores = records[pair[0]], comparison.scores_of(records, pair)
            between, source = reached.difference_intervals(records, *pair)
            files = [*pair, *([source] if source else [])]
            kinds = reading.score_kinds(record, main=True)
            for key in [next(iter(kinds))] if reading.glue_task(record) else SHOWN:
                values = [scores[name].get(key) for name in pair]
                texts = ["-" if value is None else kinds[key].text(value) for value in values]
                found.append((record, kinds[key], [*texts, *difference(kinds[key], *values, between.get(key))], files))
    return comparison.overview(found)


def report(records, pair=None):
    """[(title, lists of cells, lines below)] of all pairs and trials, or of the one pair that is asked for."""
    gaps = Gaps()
    if pair:
        blocks = [of_runs(records, comparison.require_pair(records, pair), gaps)]
    else:
        found = [pair for pair in comparison.pairs(records) if comparison.is_scored(records, pair)]
        blocks = [of_runs(records, pair, gaps) for pair in found]
        blocks += [of_trial(name, record) for name, record in reading.trials_of(records).items()]
        blocks += comparison.no_pairs(records, gaps)
    return [*blocks, (NOTES, [], []), *gaps.block()]


def main():
    knobs = parse_knobs(Knobs, __doc__)
    records = comparison.read(knobs)
    if knobs.all or knobs.pair:
        comparison.show(report(records, knobs.pair))
    else:
        comparison.show([*best(records), (NOTES, [], []), comparison.MORE])


if __name__ == "__main__":
    run(main)
