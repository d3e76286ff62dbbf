"""Compare a base model with its adapted self on a test set: every score with its interval, and who wins how often.

    cd examples/NLG
    python evaluate_lora_improvement.py
    python evaluate_lora_improvement.py --adapted_model output/model
    python evaluate_lora_improvement.py --base_texts base.jsonl --adapted_texts adapted.jsonl --data_dir output/e2e

The first takes the adapter of the default run of run_training.py and writes two texts for each of 80 meanings; the
second a model that run_training.py --adapt full trained; the third texts that are there already, one for each meaning.
One of the two systems may be given as texts, too, and the other as a model. Written to --output_dir: base_texts.jsonl
and adapted_texts.jsonl, unless they were given, and improvement.json, the record.

The intervals hold 95 % of the scores over resamples of the test meanings. That of the difference is of resamples drawn
for both models at once; where it leaves out 0, another test set of the same kind would hardly turn the order. The wins
are shares of the meanings, each scored alone.
"""

import json
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path

# Read when torch loads: how long its threads spin while they wait. By default so long that beside another busy process
# a small model's steps take many times longer; with no spinning at all (OMP_WAIT_POLICY=PASSIVE) they are slow alone.
os.environ.setdefault("GOMP_SPINCOUNT", "30000")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # examples/, for the package common
sys.path.insert(1, str(Path(__file__).resolve().parents[2]))  # this checkout's loralib
from common.cli import UserError, as_user_error, fill_in, knob, make_output_folder, parse_knobs, require_positive, run
from common.data import e2e
from common.files import portable
from common.models import causal_lm
from common.records import results
from common.reports import reached, reading, tables
from common.scores import text_scores
from common.training import compute
from run_training import SCORES, evaluate, score_references, some_meanings

import loralib as lora

HERE = Path(__file__).resolve().parent
PRESETS = {"fast": {}, "paper": causal_lm.PAPER_DECODING}
SYSTEMS = ("base", "adapted")


@dataclass
class Knobs(causal_lm.DecodingKnobs):
    preset: str = knob("fast", "decoding for all knobs that are not given", PRESETS)
    model: str = knob(str(HERE / "model"), "folder or hub name of the base model")
    adapter: str = knob(
        str(HERE / "output" / "adapter.safetensors"),
        "file of run_training.py, folder of PEFT, or upstream's .bin or .pt file, trained on that model",
    )
    lora_alpha: float | None = knob(None, "as the adapter was trained with; for upstream's files, which do not say it")
    adapted_model: str | None = knob(None, "folder of the whole model after full fine-tuning, in place of an adapter")
    base_texts: str | None = knob(None, "file of texts of the base, which is not asked for any then")
    adapted_texts: str | None = knob(None, "the same of the adapted model")
    data_dir: str = knob(str(HERE / "data"), "folder of the E2E test file, lines or CSV")
    test_file: str | None = knob(None, "file in data_dir to score on, if not called as the official one")
    max_eval_samples: int | None = knob(None, "score on so many meanings, drawn with the seed")
    resamples: int = knob(1000, "of the test meanings, for the intervals")
    seed: int = knob(110, "of the resamples and of the chosen meanings")
    output_dir: str = knob(str(HERE / "output"), "folder for what the run writes")
    record: str | None = knob(None, "name under which examples/results/ gets the record, too")


def check(knobs):
    """Raise a UserError for knobs that are out of range or do not agree."""
    causal_lm.check_decoding(knobs)
    require_positive(knobs, "max_eval_samples", "resamples")
    if knobs.adapted_model is not None and knobs.lora_alpha is not None:
        raise UserError("--lora_alpha does not go with --adapted_model, which has no adapter; leave one of them out")
    adapter_needed = knobs.adapted_texts is None and knobs.adapted_model is None
    if adapter_needed and not Path(knobs.adapter).exists():
        raise UserError(
            f"--adapter {knobs.adapter}: no such file or folder; run_training.py writes adapter.safetensors to its "
            "--output_dir; or give --adapted_model or --adapted_texts"
        )


def load_data(knobs):
    """({meaning: references} to score on, the file they are from)."""
    path = e2e.find_files(knobs.data_dir, {"test": knobs.test_file})["test"]
    groups = e2e.group_references(e2e.read_pairs(path))
    return some_meanings(groups, knobs.max_eval_samples, "testing", knobs.seed), path


def build_models(knobs, device):
    """(Base, adapted, tokenizer): with an adapter one and the same model, whose adapters the base does without."""
    base, tokenizer = causal_lm.load_causal_lm(knobs.model, device)
    if knobs.adapted_texts is not None:
        return base, None, tokenizer
    if knobs.adapted_model is None:
        with as_user_error(OSError, ValueError):
            lora.load_lora(base, knobs.adapter, lora_alpha=knobs.lora_alpha)
        return base, base, tokenizer
    adapted, other = causal_lm.load_causal_lm(knobs.adapted_model, device)
    if other.get_vocab() != tokenizer.get_vocab():  # nor would the perplexities, which are per token, compare
        raise UserError(
            f"--adapted_model {knobs.adapted_model}: its tokens are not those of {knobs.model}, from which it cannot "
            "have been trained; check both names"
        )
    return base, adapted, tokenizer


def evaluate_models(knobs, test, wanted):
    """{system: (scores, texts)} of those wanted of the base and the adapted model."""
    base, adapted, tokenizer = build_models(knobs, compute.choose_device(knobs.device))
    found = {}
    if "base" in wanted:
        with lora.disable_adapters(base):  # merged or not, the base alone
            found["base"] = evaluate(base, tokenizer, test, knobs)
    if "adapted" in wanted:
        found["adapted"] = evaluate(adapted, tokenizer, test, knobs)
    return found


def read_texts(path, test):
    """The same of a file of texts, which leaves the perplexity open."""
    texts = text_scores.read_predictions(path, list(test))
    scores = text_scores.score(texts, list(test.values()), list(test))
    scores["perplexity"] = None
    scores["not_measured"]["perplexity"] = "not measured: perplexity needs the model, not texts alone"
    return scores, texts


def name_of(path, fingerprint, scores):
    """What a system is: the settings of the run that made its checkpoint or its texts, else the name of the file."""
    try:
        run = json.loads((Path(path).parent / "results.json").read_text(encoding="utf-8"))
        made_it = bool(fingerprint) and set(fingerprint.values()) == set(run.get("checkpoint_sha256", {}).values())
        if made_it or ("after" in run and reached.same(run["after"], scores)):
            return reading.settings_title(run["configuration"], run["adapt"])
        if "before" in run and reached.same(run["before"], scores):
            return reading.METHODS["none"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        pass  # no run beside it
    return portable(path)


def choose_samples(texts, test, values):
    """The meanings on which the adaptation gains most, the median and least, by the BLEU of each text alone."""
    meanings = list(test)
    gains = [adapted - base for base, adapted in zip(values["base"]["bleu"], values["adapted"]["bleu"], strict=True)]
    order = sorted(range(len(gains)), key=lambda index: gains[index])
    chosen = {"best gain": order[-1], "median gain": order[len(order) // 2], "worst gain": order[0]}
    return [
        {
            "which": which,
            "bleu_gain": gains[index],
            "meaning": meanings[index],
            **{system: texts[system][index] for system in SYSTEMS},
            "references": test[meanings[index]],
        }
        for which, index in chosen.items()
    ]


def measure_improvement(**overrides):
    """Score both with the preset but for `overrides`, print and write the results, and return them."""
    knobs = fill_in(Knobs, overrides, PRESETS)
    started = time.perf_counter()
    check(knobs)
    output_dir = make_output_folder(knobs.output_dir)
    test, test_path = load_data(knobs)
    files = {"base": knobs.base_texts, "adapted": knobs.adapted_texts}
    found = {system: read_texts(path, test) for system, path in files.items() if path is not None}
    written = [system for system in SYSTEMS if system not in found]
    if written:
        found |= evaluate_models(knobs, test, written)
    scores, texts = ({system: found[system][part] for system in SYSTEMS} for part in (0, 1))
    inputs = [f"{system}_texts" if path is not None else "model" for system, path in files.items()]
    if "adapted" in written:
        inputs[1] = "adapter" if knobs.adapted_model is None else "adapted_model"
    inputs_sha256 = {name: results.weights_fingerprint(getattr(knobs, name)) for name in inputs}
    names = {"base": "base"} if inputs[0] == "model" else {}
    for system, name in zip(SYSTEMS, inputs, strict=True):
        names.setdefault(system, name_of(getattr(knobs, name), inputs_sha256[name] or {}, scores[system]))
    references, meanings = list(test.values()), list(test)
    values = {system: text_scores.per_sentence(texts[system], references, meanings) for system in SYSTEMS}
    wins = text_scores.wins(values["base"], values["adapted"])
    record = {
        "task": "e2e improvement",
        "configuration": results.configuration(knobs),
        "data": results.fingerprints({"test": test_path}),
        "inputs_sha256": inputs_sha256,
        "compared": names,
        "counts": {"test_meanings": len(test), "test_references": sum(map(len, references))},
        "references": score_references(test),
        **scores,
        "intervals": text_scores.bootstrap(texts, references, meanings, knobs.resamples, knobs.seed),
        "wins": {
            name: share and {"base": share["first"], "adapted": share["second"], "tie": share["tie"]}
            for name, share in wins.items()
        },
        "samples": choose_samples(texts, test, values),
    }
    record["seconds"] = {"total": time.perf_counter() - started}
    record["environment"] = results.environment(compute.choose_device(knobs.device))
    for system in written:
        results.write_texts(output_dir / f"{system}_texts.jsonl", meanings, texts[system])
    results.write_json(output_dir / "improvement.json", record)
    if knobs.record:
        results.write_json(results.RESULTS / f"{knobs.record}.json", record)
    report(record)
    print(f"\nwritten to {output_dir / 'improvement.json'}")
    return record


def report(record):
    """Print what the record says."""
    for sample in record["samples"]:
        print(f"\n{sample['which']}: {sample['bleu_gain']:+.1f} BLEU")
        for name in ("meaning", *SYSTEMS):
            print(f"  {name:<10} {sample[name]}")
        print(f"  {'reference':<10} {sample['references'][0]}")
    intervals = record["intervals"]
    print()
    for system in SYSTEMS:
        print(f"{system}: {record['compared'][system]}")
    print(f"{record['counts']['test_meanings']} meanings; in brackets 95 % of {intervals['resamples']} resamples")
    rows = [["", "base", "adapted", "adapted - base", "wins: base", "adapted", "tie"]]
    for key, (name, factor) in SCORES.items():
        base, adapted = (record[system][key] for system in SYSTEMS)
        if base is None or adapted is None:
            rows.append([name, "not measured"])
            continue
        bounds = [intervals["systems"][system].get(key) for system in SYSTEMS]
        bounds.append(intervals["differences"]["adapted - base"].get(key))
        numbers = zip((base, adapted, adapted - base), bounds, strict=True)
        cells = [_with_interval(value, interval, factor) for value, interval in numbers]
        rows.append([name, *cells, *(f"{share:.1%}" for share in record["wins"].get(key, {}).values())])
    print(tables.aligned([row + [""] * (len(rows[0]) - len(row)) for row in rows]), end="")
    reasons = [*record["base"]["not_measured"].values(), *record["adapted"]["not_measured"].values()]
    for reason in dict.fromkeys(reasons):
        print(reason)


def _with_interval(value, interval, factor):
    text = f"{factor * value:.2f}"
    return text if interval is None else text + " [{:.2f}, {:.2f}]".format(*(factor * bound for bound in interval))


def main():
    measure_improvement(**vars(parse_knobs(Knobs, __doc__, presets=PRESETS)))


if __name__ == "__main__":
    run(main)
