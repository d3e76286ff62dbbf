"""benchmark_multi_task.py and NLU's evaluate_lora_improvement.py: real runs of a tiny encoder, what is made of them.

The runs take place in this process, from the command lines that the scripts would start; what serves has processes of
its own. Figures are worked out anew from what the runs wrote, with scikit-learn where it has them.
Alone: `pytest tests/test_nlu_benchmark.py`.
"""

import contextlib
import dataclasses
import io
import json
import re
import shutil
import statistics
import sys
from pathlib import Path

import benchmark_multi_task as serving
import pytest
import run_training_nlu
import safetensors
import sklearn.metrics
import torch
import transformers
from common import cli
from common.data import glue
from common.records import results, runs
from nlu_models import GLUE, NLU, load_script, tiny_roberta
from safetensors.torch import load_file, save_file
from scipy import stats

import loralib as lora

improving = load_script("evaluate_lora_improvement")
CPU = torch.device("cpu")
PNG = b"\x89PNG\r\n\x1a\n"


def run_here(script, name, knobs, files):
    """In place of `runs.make_run`, which starts a process: the same command line, here."""
    command = runs.command(script, knobs)
    assert command[:2] == [sys.executable, str(NLU / "run_training_nlu.py")]
    parsed = cli.parse_knobs(run_training_nlu.Knobs, "", command[2:], run_training_nlu.presets)
    assert parsed == knobs
    run_training_nlu.train_model(**dataclasses.asdict(parsed))
    return runs.read_run(script, knobs, files)


@pytest.fixture(scope="module", autouse=True)
def in_this_process():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs, "make_run", run_here)
        yield


@pytest.fixture
def no_training(monkeypatch):
    def refuse(*arguments):
        raise AssertionError("a run is made")

    monkeypatch.setattr(runs, "make_run", refuse)


def read(folder, *names):
    return json.loads(Path(folder, *names).read_text(encoding="utf-8"))


def change(path, key, value):
    """Change an entry, "a/b", of a JSON file."""
    record = read(path)
    *parents, last = key.split("/")
    place = record
    for name in parents:
        place = place[name]
    place[last] = value
    results.write_json(path, record)


# benchmark_multi_task.py

TASKS = {"sst2": 2, "mnli": 3, "stsb": 1}  # and how many outputs they have
SERVED = {"tasks": "sst2, mnli,stsb", "max_steps": 2, "rounds": 1, "serve_batch_size": 40, "device": "cpu"}


@pytest.fixture(scope="module")
def benchmarked(tmp_path_factory, roberta, in_this_process):
    """(folder, options, comparison) of the benchmark."""
    folder = tmp_path_factory.mktemp("benchmark") / "new"
    options = {**SERVED, "model": roberta, "output_dir": str(folder)}
    return folder, options, serving.benchmark(**options)


def test_served_scores_are_those_of_the_training(benchmarked):
    folder, _, comparison = benchmarked
    assert list(comparison["tasks"]) == list(TASKS)
    for task, found in comparison["tasks"].items():
        metric = {"stsb": "pearson"}.get(task, "accuracy")
        assert found["metric"] == metric
        for method in ("lora", "full"):
            record = read(folder, method, task, "results.json")
            assert record["adapt"] == method
            assert found[method]["score"] == record["after"]["dev"][metric]
            assert found[method]["served"] == comparison["served"][method]["scores"][task][metric]
            scores = record["after"]["dev"]
            assert comparison["served"][method]["scores"][task] == {
                name: pytest.approx(value, abs=1e-5) for name, value in scores.items()
            }
            assert found[method]["bytes"] == record["bytes"]["checkpoint"]
            assert found[method]["train_seconds"] == record["seconds"]["train"]
            assert found[method]["lr"] == {"lora": 4e-3, "full": 4e-4}[method]
        assert found["majority"] == record["majority"]["dev"][metric]
        assert found["ceiling"] == record["ceiling"]["dev"]["scores"][metric]
    assert comparison["tasks"]["stsb"]["lora"]["served"] != comparison["tasks"]["stsb"]["full"]["served"]


def encoder_bytes():
    """Of RoBERTa's parameters, and of its two buffers of whole numbers for each position."""
    encoder = tiny_roberta().roberta
    return 4 * sum(p.numel() for p in encoder.parameters()) + sum(b.nbytes for b in encoder.buffers())


def head_bytes(outputs):
    return 4 * (32 * 32 + 32 + outputs * 32 + outputs)


def test_bytes_are_those_of_one_encoder_or_of_three(benchmarked):
    """Adapters of rank 8 on query and value of two layers, and heads of each task, around one encoder."""
    folder, _, comparison = benchmarked
    heads = sum(map(head_bytes, TASKS.values()))
    adapters = 3 * 4 * 2 * 2 * 2 * 8 * 32
    # Each number of outputs has the head of its own model, too, which the tasks' heads take the place of.
    assert comparison["served"]["lora"]["tensor_bytes"] == encoder_bytes() + adapters + heads + heads
    assert comparison["served"]["full"]["tensor_bytes"] == 3 * encoder_bytes() + heads
    for method, pattern in (("lora", "adapter.safetensors"), ("full", "model/model.safetensors")):
        files = [folder / method / task / pattern for task in TASKS]
        assert comparison["bytes"][method] == sum(file.stat().st_size for file in files)
    assert comparison["bytes"]["base"] == read(folder, "full", "sst2", "results.json")["bytes"]["model"]


def test_all_tasks_share_one_encoder_and_switching_gives_each_its_adapter(benchmarked, tmp_path):
    """Another task of two labels shares the whole model with the first."""
    folder, options, _ = benchmarked
    shutil.copytree(folder / "lora", tmp_path / "lora")
    shutil.copytree(folder / "lora" / "sst2", tmp_path / "lora" / "qnli")
    file = tmp_path / "lora" / "qnli" / "adapter.safetensors"
    save_file({name: tensor + 1 for name, tensor in load_file(file).items()}, file, metadata_of(file))
    tasks = [glue.task_of(name) for name in ("sst2", "mnli", "qnli", "stsb")]
    knobs = serving.Knobs(**{**options, "output_dir": str(tmp_path)})
    models, _, switch = serving.build_on_one_base(knobs, tasks, CPU)
    assert len({id(model.roberta) for model in models.values()}) == 1
    sst2, mnli, qnli, stsb = models.values()
    assert sst2 is qnli and len({id(model) for model in models.values()}) == 3
    assert [model.config.num_labels for model in (sst2, mnli, stsb)] == [2, 3, 1]
    for task in [*tasks, *tasks[::-1]]:
        switch(task)
        active = lora.lora_state_dict(models[task])
        saved = load_file(tmp_path / "lora" / task.name / "adapter.safetensors")
        assert active.keys() == saved.keys()
        assert all(torch.equal(active[name], saved[name]) for name in saved), task.name


def test_texts_of_all_tasks_at_once_are_answered_as_in_turns(benchmarked):
    _, options, comparison = benchmarked
    assert list(comparison["served"]["lora"]["texts_per_second"]) == ["in turns", "task after task", "at once"]
    assert list(comparison["served"]["full"]["texts_per_second"]) == ["in turns", "task after task"]
    tasks, knobs = [glue.task_of(name) for name in TASKS], serving.Knobs(**options)
    models, tokenizer, switch = serving.build_on_one_base(knobs, tasks, CPU)
    turn = {}
    for task in tasks:
        examples = glue.read_examples(glue.find_files(knobs.data_dir, task)["dev"], task)[:5]
        turn[task] = serving.run_training_nlu.encode_examples(examples, tokenizer, knobs.seq_len)
    answers = serving.answer_at_once(models, turn | {tasks[0]: None}, knobs, tokenizer)
    assert answers.keys() == set(tasks[1:])
    answers = serving.answer_at_once(models, turn, knobs, tokenizer)
    for task in tasks:
        switch(task)
        wanted = serving.classification.predict(models[task], turn[task], knobs, tokenizer)
        torch.testing.assert_close(answers[task], wanted, rtol=1e-4, atol=1e-5)


def metadata_of(file):
    with safetensors.safe_open(file, "pt") as opened:
        return opened.metadata()


def test_the_benchmark_is_written_and_printed(benchmarked, capsys):
    folder, _, comparison = benchmarked
    assert sorted(path.name for path in folder.iterdir()) == ["full", "lora", "multi_task.json", "multi_task.png"]
    assert read(folder, "multi_task.json") == comparison
    assert str(folder) not in json.dumps(comparison)
    assert (folder / "multi_task.png").read_bytes().startswith(PNG)
    for served in comparison["served"].values():
        assert served["texts"] == 900
        for way in served["texts_per_second"]:
            assert served["texts_per_second"][way] == 900 / statistics.median(served["seconds"][way])
            assert len(served["seconds"][way]) == 1
        assert served["seconds"]["load"] > served["seconds"]["switch"] > 0
        assert served["peak_memory_bytes"]["process"] >= served["peak_memory_bytes"]["before_loading"] > 1e8
    serving.report(comparison)
    printed = capsys.readouterr().out
    for task, found in comparison["tasks"].items():
        numbers = [
            "-" if found["majority"] is None else f"{100 * found['majority']:.1f}",
            *(f"{100 * found[method]['served']:.1f}" for method in ("lora", "full")),
            f"{100 * found['ceiling']:.1f}",
            *(f"{found[method]['bytes'] / 1024:,.1f}" for method in ("lora", "full")),
        ]
        assert re.search(rf"^{task} +(Accuracy|Pearson) +" + " +".join(map(re.escape, numbers)) + "$", printed, re.M)
    held = [comparison["served"][method]["tensor_bytes"] for method in ("lora", "full")]
    ratio = f"{held[0] / held[1]:.3f}"
    assert re.search(rf"^tensors held, MiB +{held[0] / 2**20:.2f} +{held[1] / 2**20:.2f} +{ratio}$", printed, re.M)


class Here:
    """In place of a pool of processes: the work is done when it comes."""

    def __init__(self, *arguments, **options):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

    def submit(self, work, *arguments):
        self.outcome = work(*arguments)
        return self

    def result(self):
        return self.outcome


def test_reuse_trains_nothing_and_writes_the_records(benchmarked, no_training, tmp_path, monkeypatch, capsys):
    folder, options, first = benchmarked
    shutil.copytree(folder, tmp_path / "copy")
    (tmp_path / "results").mkdir()
    monkeypatch.setattr(results, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(serving, "ProcessPoolExecutor", Here)
    options = {**options, "output_dir": str(tmp_path / "copy"), "tasks": "sst2,stsb", "rounds": 2, "reuse": True}
    comparison = serving.benchmark(**options, record="many")
    assert f"lora: taken from {tmp_path / 'copy' / 'lora' / 'sst2' / 'results.json'}\n" in capsys.readouterr().out
    for task in ("sst2", "stsb"):
        for method in ("lora", "full"):
            one, other = comparison["tasks"][task][method], first["tasks"][task][method]
            assert one == {**other, "served": pytest.approx(other["served"], abs=1e-5)}
    assert len(comparison["served"]["lora"]["seconds"]["in turns"]) == 2
    runs_written = [f"many_{task}_{method}.json" for task in ("sst2", "stsb") for method in ("full", "lora")]
    assert sorted(path.name for path in (tmp_path / "results").iterdir()) == ["many.json", *runs_written]
    assert read(tmp_path, "results", "many_stsb_full.json") == read(folder, "full", "stsb", "results.json")


CHANGED = {  # the run, an entry of its record, its new value, the message
    "threads": (
        "full/mnli",
        "environment/threads",
        99,
        "the runs lora and full differ in more .*: threads 1?.* against 99",
    ),
    "steps asked for": ("lora/sst2", "configuration/max_steps", 3, "holds another run .*: --max_steps 3 against 2"),
    "data": ("lora/sst2", "data/dev/sha256", "0f", "holds another run .*: dev file {.*'0f'} against {"),
}


@pytest.mark.parametrize("run, key, value, message", CHANGED.values(), ids=CHANGED)
def test_runs_that_are_not_alike_are_not_served(benchmarked, no_training, tmp_path, run, key, value, message):
    folder, options, _ = benchmarked
    shutil.copytree(folder, tmp_path / "copy")
    change(tmp_path / "copy" / run / "results.json", key, value)
    with pytest.raises(cli.UserError, match=message):
        serving.benchmark(**{**options, "output_dir": str(tmp_path / "copy"), "reuse": True})


def test_runs_of_a_base_with_other_weights_are_not_taken(benchmarked, no_training, tmp_path):
    """They would be served on weights that they were not trained on."""
    folder, options, _ = benchmarked
    shutil.copytree(folder, tmp_path / "copy")
    base = shutil.copytree(options["model"], tmp_path / Path(options["model"]).name)
    weights = load_file(base / "model.safetensors")
    weights["roberta.embeddings.word_embeddings.weight"] += 1
    save_file(weights, base / "model.safetensors", {"format": "pt"})
    message = (
        r"lora.sst2.results\.json holds a run of a base with other weights: {.*} against {.*}; run without --reuse"
    )
    with pytest.raises(cli.UserError, match=message):
        serving.benchmark(**{**options, "model": str(base), "output_dir": str(tmp_path / "copy"), "reuse": True})


BAD_SERVING = {
    "one task": ({"tasks": "sst2"}, "--tasks sst2: give at least two different ones of sst2, mnli, "),
    "twice": ({"tasks": "sst2,sst2"}, "--tasks sst2,sst2: give at least two different ones of"),
    "unknown": ({"tasks": "sst2,mnl"}, r"--task mnl: must be one of .*; mnli\?"),
    "batch": ({"serve_batch_size": 0}, "--serve_batch_size 0: must be above 0"),
    "rounds": ({"rounds": 0}, "--rounds 0: must be above 0"),
    "rate": ({"lr_full": -1.0}, "--lr -1.0: must be above 0"),
    "data": ({"data_dir": "nowhere"}, "nowhere: no such folder of GLUE files"),
    "device": ({"device": "gpu"}, "--device gpu: no such device here"),
    "other knob": ({"adapt": "full"}, "adapt='full': no such knob"),
}


@pytest.mark.parametrize("changes, message", BAD_SERVING.values(), ids=BAD_SERVING)
def test_bad_knobs_of_the_benchmark_are_refused_before_anything_is_done(no_training, tmp_path, changes, message):
    with pytest.raises(cli.UserError, match=message):
        serving.benchmark(**{"output_dir": str(tmp_path / "new"), **changes})
    assert not (tmp_path / "new").exists()


# evaluate_lora_improvement.py

# The shipped encoder learns this task within a few steps, but not with its head alone. Two rates of each system; the
# second is the better one for LoRA, and the first for the others.
RATES = {"head": [1e-5, 1e-1], "lora": [3e-5, 1e-2], "full": [2e-3, 1e-1]}
IMPROVED = {
    **{"task": "sst2", "max_steps": 40, "eval_every": 20, "batch_size": 16},
    **{"max_eval_samples": 60, "seeds": 2, "resamples": 50, "device": "cpu", "lora_dim": 4},
    **{f"lr_{system}": ",".join(map(str, rates)) for system, rates in RATES.items()},
}


def improve(folder, **options):
    """(The comparison, what was printed)."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        comparison = improving.measure_improvement(**options, output_dir=str(folder))
    return comparison, printed.getvalue()


@pytest.fixture(scope="module")
def improved(tmp_path_factory, in_this_process):
    """(folder, options, comparison, printed text)."""
    folder, options = tmp_path_factory.mktemp("improved") / "new", {**IMPROVED, "model": str(NLU / "model")}
    return folder, options, *improve(folder, **options)


@pytest.fixture(scope="module")
def regression(tmp_path_factory, roberta, in_this_process):
    folder = tmp_path_factory.mktemp("regression") / "new"
    options = {**IMPROVED, "model": roberta, "task": "stsb", "seeds": 1}
    options.update({f"lr_{system}": str(rates[1]) for system, rates in RATES.items()})
    return folder, options, *improve(folder, **options)


def records(folder, system, rate, seeds=2):
    return [read(folder, f"{system}_{rate:g}_{seed}", "results.json") for seed in range(seeds)]


def chosen_by(record):
    """The accuracy of a run's checkpoint on the set that chooses."""
    return {entry["step"]: entry["accuracy"] for entry in record["history"]}[record["best_step"]]


def lines(folder, system, rate):
    """What the run of the first seed said of the dev lines."""
    content = (folder / f"{system}_{rate:g}_0" / "dev_predictions.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in content.splitlines()]


def test_the_rate_that_is_best_with_the_first_seed_runs_with_all(improved):
    folder, _, comparison, _ = improved
    chosen = set()
    for system, rates in RATES.items():
        found = comparison["systems"][system]
        first = [chosen_by(records(folder, system, rate, seeds=1)[0]) for rate in rates]
        best = rates[first.index(max(first))]
        chosen.add(rates.index(best))
        assert found["lr"] == best
        for rate, one, tried in zip(rates, first, found["tried"], strict=True):
            if rate == best:
                other = chosen_by(records(folder, system, rate)[1])
                mean, deviation = (one + other) / 2, abs(one - other) / 2**0.5
                expected = {"values": [one, other], "mean": mean, "deviation": pytest.approx(deviation)}
            else:
                assert not (folder / f"{system}_{rate:g}_1").exists()
                expected = {"values": [one], "mean": one, "deviation": None}
            assert tried == {"lr": rate, **expected}
        runs_of_best = records(folder, system, best)
        for metric in ("accuracy", "f1", "precision", "recall", "matthews"):
            values = [record["after"]["dev"][metric] for record in runs_of_best]
            assert found["scores"][metric]["values"] == values
            assert found["scores"][metric]["mean"] == pytest.approx(sum(values) / 2)
        assert found["best_steps"] == [record["best_step"] for record in runs_of_best]
        assert found["trained"] == runs_of_best[0]["parameters"]["trainable"]
        assert found["checkpoint_bytes"] == runs_of_best[0]["bytes"]["checkpoint"]
        assert found["step_seconds"] == statistics.median(record["seconds"]["step"] for record in runs_of_best)
    assert chosen == {0, 1}  # or the choice was not seen
    model = transformers.AutoModelForSequenceClassification.from_pretrained(NLU / "model")
    head, encoder = (sum(p.numel() for p in part.parameters()) for part in (model.classifier, model.roberta))
    layers, width, rank = model.config.num_hidden_layers, model.config.hidden_size, 4
    trained = {system: found["trained"] for system, found in comparison["systems"].items()}
    assert trained == {"head": head, "lora": head + layers * 2 * 2 * rank * width, "full": head + encoder}


def test_runs_differ_in_method_rate_and_seed_alone(improved):
    folder, options, comparison, _ = improved
    free = {"adapt", "lr", "seed", "output_dir"}
    best = {system: found["lr"] for system, found in comparison["systems"].items()}
    keys = [(s, rate, seed) for s in RATES for rate in RATES[s] for seed in ((0, 1) if rate == best[s] else (0,))]
    assert [(run["system"], run["lr"], run["seed"]) for run in comparison["runs"]] == keys
    configurations = [read(folder, f"{s}_{r:g}_{seed}", "results.json")["configuration"] for s, r, seed in keys]
    assert [(c["adapt"], c["lr"], c["seed"]) for c in configurations] == keys
    assert all(c[name] == configurations[0][name] for c in configurations for name in c.keys() - free)
    asked = set(options) & set(configurations[0]) - {"model"}
    assert {name: configurations[0][name] for name in asked} == {name: options[name] for name in asked}


def test_confusion_and_calibration_are_those_of_the_first_seed(improved):
    folder, _, comparison, _ = improved
    for found in comparison["systems"].values():
        system = next(name for name, other in comparison["systems"].items() if other is found)
        said = lines(folder, system, found["lr"])
        labels, predictions = ([line[key] for line in said] for key in ("label", "prediction"))
        probabilities = [line["probabilities"] for line in said]
        assert found["confusion"] == sklearn.metrics.confusion_matrix(labels, predictions, labels=[0, 1]).tolist()
        # For two labels twice the score that counts one of them alone.
        brier = 2 * sklearn.metrics.brier_score_loss(labels, [row[1] for row in probabilities])
        assert found["calibration"]["brier"] == pytest.approx(brier)
        error = 0.0
        for tenth in range(10):
            inside = [i for i, row in enumerate(probabilities) if tenth / 10 < max(row) <= (tenth + 1) / 10]
            if inside:
                confidence = sum(max(probabilities[i]) for i in inside) / len(inside)
                right = sum(labels[i] == predictions[i] for i in inside) / len(inside)
                error += len(inside) / len(said) * abs(confidence - right)
        assert found["calibration"]["expected_calibration_error"] == pytest.approx(error)
        low, high = comparison["intervals"]["systems"][system]["accuracy"]
        assert low <= sum(a == b for a, b in zip(labels, predictions, strict=True)) / len(said) <= high


def test_changed_examples_are_right_on_one_side_only(improved):
    folder, _, comparison, _ = improved
    systems, names = comparison["systems"], ["negative", "positive"]
    counted = 0
    for before in ("head", "full"):
        pairs = list(zip(*(lines(folder, s, systems[s]["lr"]) for s in (before, "lora")), strict=True))
        found = comparison["changed"][f"{before} to LoRA"]
        for kind, right in (("gained", (False, True)), ("lost", (True, False))):
            wanted = [pair for pair in pairs if tuple(line["prediction"] == line["label"] for line in pair) == right]
            counted += len(wanted)
            assert found[kind]["count"] == len(wanted)
            assert found[kind]["examples"] == [
                {
                    "texts": was["texts"],
                    "label": names[was["label"]],
                    "before": names[was["prediction"]],
                    "after": names[now["prediction"]],
                }
                for was, now in wanted[:5]
            ]
    assert counted


def test_a_regression_has_correlations_and_distances(regression):
    folder, _, comparison, printed = regression
    said = {system: lines(folder, system, rates[1]) for system, rates in RATES.items()}
    for system, found in comparison["systems"].items():
        labels, predictions = zip(*((line["label"], line["prediction"]) for line in said[system]), strict=True)
        assert found["scores"]["pearson"]["mean"] == pytest.approx(stats.pearsonr(predictions, labels).statistic)
        assert found["scores"]["spearman"]["mean"] == pytest.approx(stats.spearmanr(predictions, labels).statistic)
        assert found["scores"]["pearson"]["deviation"] is None
        assert not {"confusion", "calibration"} & found.keys()
    assert comparison["majority"] == {"pearson": None, "spearman": None}
    gains = []
    for was, now in zip(said["head"], said["lora"], strict=True):
        gains.append(abs(was["prediction"] - was["label"]) - abs(now["prediction"] - now["label"]))
    changed = comparison["changed"]["head to LoRA"]
    assert changed["gained"]["count"] == sum(gain > 0 for gain in gains)
    assert changed["lost"]["count"] == sum(gain < 0 for gain in gains)
    order = sorted(range(len(gains)), key=gains.__getitem__)
    for kind, indices in (("lost", order[:5]), ("gained", order[::-1][:5])):
        found = [example["texts"] for example in changed[kind]["examples"]]
        assert found == [said["head"][i]["texts"] for i in indices if (gains[i] > 0) == (kind == "gained")]
    assert re.search(r"^Pearson +- +-?[\d.]+ +-?[\d.]+ +-?[\d.]+ +[\d.]+ +\[.*\] +\[.*\]$", printed, re.M)
    assert "ECE" not in printed


def test_the_comparison_is_written_and_printed(improved):
    folder, _, comparison, printed = improved
    assert read(folder, "improvement.json") == json.loads(json.dumps(comparison))
    assert (folder / "improvement.png").read_bytes().startswith(PNG)
    assert str(folder) not in json.dumps(comparison)
    assert comparison["data"]["dev"]["sha256"] == results.sha256(GLUE / "SST-2" / "dev.tsv")
    systems, between = comparison["systems"], comparison["intervals"]["differences"]
    for title, metric in {"Accuracy": "accuracy", "F1": "f1", "Matthews": "matthews"}.items():
        cells = [f"{100 * comparison['majority'][metric]:.1f}"]
        for found in systems.values():
            score = found["scores"][metric]
            cells.append(f"{100 * score['mean']:.1f} +- {100 * score['deviation']:.1f}")
        cells.append(f"{100 * comparison['ceiling']['dev']['scores'][metric]:.1f}")
        low, high = between["lora - head"][metric]
        cells.append(f"[{100 * low:.1f}, {100 * high:.1f}]")
        low, high = between["full - lora"][metric]
        cells.append(f"[{-100 * high:.1f}, {-100 * low:.1f}]")
        line = re.search(rf"^{title} .*$", printed, re.M).group()
        assert line.replace("-0.0", "0.0").split() == " ".join([title, *cells]).replace("-0.0", "0.0").split()
    cells = []
    for found in systems.values():
        (tried,) = [tried for tried in found["tried"] if tried["lr"] == found["lr"]]
        cells.append(f"{100 * tried['mean']:.1f} +- {100 * tried['deviation']:.1f}")
    cells.append(f"{100 * comparison['ceiling']['tune']['scores']['accuracy']:.1f}")
    assert re.search(r"^Accuracy, tune (.*)$", printed, re.M)[1].split() == " ".join(cells).split()
    assert "\nx 100; mean and deviation of 2 seeds\n" in printed
    rates = [f"{found['lr']:g}" for found in systems.values()]
    assert re.search("^learning rate +" + " +".join(rates) + "$", printed, re.M)
    assert printed.endswith(f"written to {folder}: improvement.json, improvement.png\n")


@pytest.fixture
def copied(improved, tmp_path):
    folder, options, _, _ = improved
    shutil.copytree(folder, tmp_path / "copy")
    return tmp_path / "copy", {**options, "reuse": True}


def test_reuse_trains_nothing_and_compares_the_same(copied, improved, no_training, tmp_path, monkeypatch):
    folder, options = copied
    monkeypatch.setattr(results, "RESULTS", tmp_path)
    comparison, printed = improve(folder, **options, record="named")
    for key in ("systems", "intervals", "changed", "runs"):
        assert comparison[key] == improved[2][key], key
    assert (tmp_path / "named.json").read_bytes() == (folder / "improvement.json").read_bytes()
    assert printed.count(": taken from ") == 9


def test_what_is_missing_alone_is_made(copied, improved):
    folder, options = copied
    shutil.rmtree(folder / "lora_0.01_1")
    comparison, printed = improve(folder, **options)
    assert printed.count(": taken from ") == 8
    assert (folder / "lora_0.01_1" / "adapter.safetensors").is_file()
    assert comparison["systems"]["lora"]["scores"] == improved[2]["systems"]["lora"]["scores"]


OTHER = {  # the run, an entry of its record, its new value, the message
    "threads": ("full_0.1_0", "environment/threads", 99, "differ in more than the method: threads .* against 99"),
    "seeds on other machines": (
        *("lora_0.01_1", "environment/device", "NVIDIA H100"),
        "the runs head, lr 1e-05, seed 1 and lora, lr 0.01, seed 1 differ in .*: device 'cpu' against 'NVIDIA H100'",
    ),
    "seeds on other weights": (
        *("lora_0.01_1", "base", {"a": "0f"}),
        "lora, lr 0.01, seed 1 differ in more than the method: weights of the base {.*} against {'a': '0f'}",
    ),
    "counts": ("full_0.1_0", "counts/dev lines", 59, "dev lines 60 against 59"),
    "steps": ("full_0.1_0", "configuration/max_steps", 7, "holds another run than .*: --max_steps 7 against 40"),
    "seed": ("head_1e-05_1", "configuration/seed", 0, "holds another run than the one asked for: --seed 0 against 1"),
    "rate": (
        "head_1e-05_1",
        "configuration/lr",
        0.2,
        "holds another run than the one asked for: --lr 0.2 against 1e-05",
    ),
}


@pytest.mark.parametrize("run, key, value, message", OTHER.values(), ids=OTHER)
def test_runs_that_differ_in_more_than_the_method_are_refused(copied, no_training, run, key, value, message):
    folder, options = copied
    change(folder / run / "results.json", key, value)
    with pytest.raises(cli.UserError, match=message):
        improve(folder, **options)


BAD_IMPROVING = {
    "task": ({"task": "sst"}, r"--task sst: must be one of .*; sst2\?"),
    "rates": ({"lr_lora": "1e-3;4e-3"}, "--lr_lora 1e-3;4e-3: must be numbers with commas between, such as"),
    "rate": ({"lr_full": "1e-3,0"}, "--lr 0.0: must be above 0"),
    "seeds": ({"seeds": 0}, "--seeds 0: must be above 0"),
    "resamples": ({"resamples": 0}, "--resamples 0: must be above 0"),
    "batch": ({"batch_size": 0}, "--batch_size 0: must be above 0"),
    "device": ({"device": "gpu"}, "--device gpu: no such device here"),
    "data": ({"data_dir": "nowhere"}, "nowhere: no such folder of GLUE files"),
    "other knob": ({"lr": 0.1}, r"lr=0\.1: no such knob; device, precision, "),
}


@pytest.mark.parametrize("changes, message", BAD_IMPROVING.values(), ids=BAD_IMPROVING)
def test_bad_knobs_of_the_comparison_are_refused_before_anything_is_done(no_training, tmp_path, changes, message):
    with pytest.raises(cli.UserError, match=message):
        improve(tmp_path / "new", **changes)
    assert not (tmp_path / "new").exists()


def test_an_undefined_score_has_no_mean_and_is_never_the_best():
    """Three runs, the first of which predicts a constant."""

    def record(pearson):
        return {
            **{"after": {"dev": {"pearson": pearson}}, "best_step": 1, "seconds": {"step": 1.0, "train": 2.0}},
            "history": [{"step": 1, "pearson": pearson}],
            **{"parameters": {"trainable": 1}, "bytes": {"checkpoint": 1, "optimizer": 1}},
        }

    found = {0.1: [record(None), record(0.9)], 0.2: [record(-0.5), record(-0.3)]}
    best, judged = improving.judge(found, glue.task_of("stsb"))
    assert best == 0.2 and judged["scores"]["pearson"]["mean"] == pytest.approx(-0.4)
    assert judged["tried"][0] == {"lr": 0.1, "mean": None, "deviation": None, "values": [None, 0.9]}


# Both


@pytest.mark.parametrize("module", [serving, improving], ids=lambda module: module.__name__)
def test_every_knob_is_an_option_with_a_reason(module, call):
    status, stdout, _ = call(module, "--help")
    assert status == 0
    text = " ".join(stdout.split())
    for field in dataclasses.fields(module.Knobs):
        assert f"--{field.name}" in text
        assert " ".join(field.metadata["help"].split()) in text
    assert cli.parse_knobs(module.Knobs, "", []) == module.Knobs()
