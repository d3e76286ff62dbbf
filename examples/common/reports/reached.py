"""What each method reached on a task: a row for each run, or for the seeds of one, with the result files that say so.

A row is always that of a run that is here. A run that was scored on a part of the test set has none, unless an
improvement scored its checkpoint on the whole. Checkpoints are known by their fingerprints, texts by all their scores.
"""

import math
import statistics
from collections import Counter
from typing import NamedTuple

from common.records import runs
from common.reports import reading

# In the order of tables: first what needs no training.
METHODS = {"none": reading.METHODS["none"], "majority": "majority guess", **reading.METHODS}
UNTRAINED = ("none", "majority")
DECODING = ("num_beams", "length_penalty", "no_repeat_ngram_size", "max_new_tokens", "precision")


class Row(NamedTuple):
    method: str
    title: str
    scored: str
    scores: dict  # {key of reading.score_kinds: (mean, standard deviation over seeds or None)}
    intervals: dict  # {key: 95 % of resamples of the test set}; with several seeds those of the first
    device: str
    files: tuple  # names of result files, without .json
    seeds: int = 1
    steps: str = "0"
    trained: int = 0
    saved: int | None = None  # bytes
    rank: tuple = (0, 0.0)  # what the best of a method has most of


def groups(records):
    """{title: {name: record}} of the runs and trials that share task, base and data, the test files to the byte."""
    found = {}
    for name, record in [*reading.runs_of(records).items(), *reading.trials_of(records).items()]:
        key = reading.group_of(record), reading.test_fingerprint(record)
        found.setdefault(key, {})[name] = record
    titles = Counter(title for title, _ in found)
    return {
        title if titles[title] == 1 else f"{title}, test data {fingerprint}": members
        for (title, fingerprint), members in found.items()
    }


def rows_of(records, members):
    """The rows of a group, in the order of the methods; those that are equal but for their files are one."""
    found = [row for name in reading.runs_of(members) for row in _untrained(records, name)]
    found += [row for names in _but_for_the_seed(members) for row in _trained(records, names)]
    found += [row for name, trial in reading.trials_of(members).items() for row in _of_trial(name, trial)]
    merged = {}
    for row in sorted(found, key=lambda row: list(METHODS).index(row.method)):
        if row.method in UNTRAINED:  # the same in all runs, of which one is enough
            key = row.method, row.scored, next(iter(row.scores.values()))
        else:
            key = row.method, row.title, row.scored, row.seeds, row.trained, tuple(row.scores.items())
        same = merged.get(key, row)
        files = same.files if row.method in UNTRAINED else tuple(dict.fromkeys(same.files + row.files))
        merged[key] = same._replace(files=files, intervals=same.intervals or row.intervals)
    return list(merged.values())


def best_of(rows):
    """{method: its best row}: of the most seeds, then with an interval, then by `rank`.

    What has an interval on GLUE is of a trial, in which all methods have the same number of steps.
    """
    best = {}
    for row in sorted(rows, key=lambda row: (row.seeds, bool(row.intervals), row.rank)):
        best[row.method] = row
    return best


def rank(runs_alike, score):
    """What the best of a method has most of: for runs that differ in the seed alone, or a trial. On GLUE `score`.

    On E2E it is the least validation loss. Losses on other texts cannot be compared; those on more texts come first.
    """
    if reading.glue_task(runs_alike[0]) is not None:
        return 0, -math.inf if score is None else score
    losses = [min(entry["valid_loss"] for entry in record["history"]) for record in runs_alike]
    return runs_alike[0]["counts"]["valid_texts"], -statistics.fmean(losses)


def best(records):
    """[(a record of the group, key and `Score` of its main score, {method: best row})], in the order of the tasks."""
    found = []
    for members in sorted(groups(records).values(), key=lambda members: reading.place(next(iter(members.values())))):
        record = next(iter(members.values()))
        rows = best_of(rows_of(records, members))
        found += [(record, *reading.main_kind(record), rows)] if rows else []
    return found


def best_trials(records):
    """Names of trials on whole dev sets, the best first: of the most seeds, then of what all methods reach together."""
    trials = {name: record for name, record in reading.trials_of(records).items() if reading.is_whole(record)}

    def seeds_and_score(name):
        key, systems = reading.main_kind(trials[name])[0], trials[name]["systems"].values()
        means = [reading.score_of(system, key)["mean"] for system in systems]
        return trials[name]["configuration"]["seeds"], -math.inf if None in means else sum(means)

    return sorted(trials, key=seeds_and_score, reverse=True)


def partial(members):
    """The runs and trials of a group that were scored on a part of the test set."""
    return {name: record for name, record in members.items() if not reading.is_whole(record)}


# Whose scores they are


def sources(records, name, when="after"):
    """{improvement on the whole test set: which of its two systems is the run of that name}.

    A run that was scored on a part of the test set itself is known by its checkpoint, decoded with the same settings.
    """
    run = records[name]
    candidates = {
        other: record
        for other, record in reading.improvements_of(records).items()
        if reading.is_whole(record) and reading.test_fingerprint(record) == reading.test_fingerprint(run)
    }
    found, known = {}, []
    if reading.is_whole(run) and when in run:
        known = [reading.scores(run, when)]
    elif when == "after":
        found = {other: "adapted" for other, record in candidates.items() if _is_checkpoint_of(record, run)}
        known = [candidates[other]["adapted"] for other in found]
    for other, record in candidates.items():
        for system in ("base", "adapted"):
            if any(same(record[system], scores) for scores in known):
                found.setdefault(other, system)
    return found


def _is_checkpoint_of(improvement, run):
    scored = improvement["inputs_sha256"].get("adapter") or improvement["inputs_sha256"].get("adapted_model") or {}
    settings = [record["configuration"] for record in (improvement, run)]
    return (
        bool(scored)
        and set(scored.values()) == set(run.get("checkpoint_sha256", {}).values())
        and all(settings[0][knob] == settings[1][knob] for knob in DECODING)
    )


def same(one, other):
    """Whether all scores that have intervals are the same: of one system, then."""

    def equal(first, second):
        return first == second if None in (first, second) else math.isclose(first, second, rel_tol=1e-9)

    return all(equal(one.get(key), other.get(key)) for key in reading.WITH_INTERVALS)


def whole_scores(records, name):
    """(A run's scores on the whole test set, the result file that has them); None twice if none has."""
    if reading.is_whole(records[name]):
        return reading.scores(records[name]), name
    for other, system in sources(records, name).items():
        return records[other][system], other
    return None, None


def intervals(records, name, when="after"):
    """({key: 95 % of the score of a run}, the improvement that has them); empty and None if none has."""
    for other, system in sources(records, name, when).items():
        found = records[other]["intervals"]["systems"][system]
        return {key: bounds for key, bounds in found.items() if bounds}, other
    return {}, None


def difference_intervals(records, one, other):
    """The same of the score of one run minus that of another."""
    mine, others = sources(records, one), sources(records, other)
    for name in mine:
        if name in others and mine[name] != others[name]:
            found = records[name]["intervals"]["differences"]["adapted - base"]
            sign = 1 if mine[name] == "adapted" else -1
            return {key: sorted(sign * bound for bound in bounds) for key, bounds in found.items() if bounds}, name
    return {}, None


def unexplained(records):
    """The improvements of which a system is no run here, and which therefore say nothing in any table."""
    explained = {}
    for name, run in reading.runs_of(records).items():
        for when in ("before", "after"):
            if when in run:
                for other, system in sources(records, name, when).items():
                    explained.setdefault(other, set()).add(system)
    return [name for name in reading.improvements_of(records) if explained.get(name) != {"base", "adapted"}]


# Rows


def _untrained(records, name):
    record = records[name]
    if reading.is_whole(record):
        for key, method in (("before", "none"), ("majority", "majority")):
            if key in record:
                scores = {key: (value, None) for key, value in _numbers(record, reading.scores(record, key)).items()}
                bounds = intervals(records, name, key)[0] if method == "none" else {}
                scored, device = reading.scored_on(record), reading.device_title(record)
                yield Row(method, METHODS[method], scored, scores, bounds, device, (name,))


def _numbers(record, scores):
    return {key: scores.get(key) for key in reading.score_kinds(record)}


def _but_for_the_seed(members):
    """Lists of runs that differ in the seed alone."""
    alike = {}
    for name, record in reading.runs_of(members).items():
        if "after" in record:
            facts = repr(sorted(runs.facts(record, {"seed", "skip_base"}).items()))
            alike.setdefault(facts, {}).setdefault(record["configuration"]["seed"], []).append(name)
    for by_seed in alike.values():
        yield [names[0] for names in by_seed.values()]
        yield from ([name] for names in by_seed.values() for name in names[1:])  # made again


def _trained(records, names):
    found = {name: whole_scores(records, name) for name in names}
    found = {name: pair for name, pair in found.items() if pair[1] is not None}
    if not found:
        return
    name = next(iter(found))
    record, settings = records[name], records[name]["configuration"]
    values = [_numbers(record, scores) for scores, _ in found.values()]
    scores = {key: _mean([each[key] for each in values]) for key in values[0]}
    main, _ = scores[reading.main_kind(record)[0]]
    yield Row(
        method=record["adapt"],
        title=reading.settings_title(settings, record["adapt"]) + _seeds(len(found)),
        scored=reading.scored_on(records[found[name][1]]),
        scores=scores,
        intervals=intervals(records, name)[0],
        device=reading.device_title(record),
        files=tuple(dict.fromkeys([*found, *(source for _, source in found.values())])),
        seeds=len(found),
        steps=f"{record['history'][-1]['step']:,}",
        trained=record["parameters"]["trainable"],
        saved=record["bytes"]["checkpoint"],
        rank=rank([records[each] for each in found], main),
    )


def _mean(values):
    """(Mean, standard deviation), None for what is not there."""
    if None in values:
        return None, None
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None


def _seeds(count):
    return f", mean of {count} seeds" if count > 1 else ""


def _of_trial(name, record):
    if not reading.is_whole(record):
        return
    settings, kinds = record["configuration"], reading.score_kinds(record)
    scored, device = reading.scored_on(record), reading.device_title(record)
    kinds = [key for key in kinds if key.startswith("dev ")]  # a trial scores on the first dev set alone
    guessed = {key: (record["majority"].get(key.split()[1]), None) for key in kinds}
    yield Row("majority", METHODS["majority"], scored, guessed, {}, device, (name,))
    for method, system in record["systems"].items():
        found = {key: reading.score_of(system, key) for key in kinds}
        bounds = record["intervals"]["systems"][method]
        yield Row(
            method=method,
            title=reading.settings_title({**settings, "lr": system["lr"]}, method) + _seeds(settings["seeds"]),
            scored=scored,
            scores={key: (score["mean"], score["deviation"]) for key, score in found.items()},
            intervals={f"dev {metric}": pair for metric, pair in bounds.items() if pair},
            device=device,
            files=(name,),
            seeds=settings["seeds"],
            steps=f"best {', '.join(map(str, system['best_steps']))}",
            trained=system["trained"],
            saved=system["checkpoint_bytes"],
            rank=rank([record], found[reading.main_kind(record)[0]]["mean"]),
        )
