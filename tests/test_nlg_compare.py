"""compare_lora_vs_full.py: the accounts of GPT-2, a comparison of real runs of a tiny model, which runs it takes.

The accounts are checked against published counts and formulas worked out by hand, the comparison against what its runs
have written. The script runs once, as a subprocess from its own folder; everything else takes those runs with --reuse.
Java is hidden from it, which saves half the time and shows what becomes of scores that were not measured.
Alone: `pytest tests/test_nlg_compare.py` (40 seconds on an idle core).
"""

import dataclasses
import json
import re
import shutil
import statistics
import sys
from pathlib import Path

import compare_lora_vs_full as comparing
import pytest
import run_training
import torch
from common import cli
from common.models import causal_lm
from common.records import results, runs
from common.training import compute, loop
from nlg_models import DATA, own_lines, script

GPT2_COUNTS = {  # total; trained with rank 4 on query and value
    "gpt2": (124_439_808, 147_456),
    "gpt2-medium": (354_823_168, 393_216),
    "gpt2-large": (774_030_080, 737_280),
    "gpt2-xl": (1_557_611_200, 1_228_800),
}
OPTIONS = {
    **{"max_steps": 3, "max_train_samples": 30, "max_eval_samples": 3, "batch_size": 4, "num_epochs": 1, "pairs": 4},
    **{
        "device": "cpu",
        "num_beams": 1,
        "max_new_tokens": 12,
        "lr_full": 1e-3,
        "lora_alpha": 8.0,
        "label_smoothing": 0.1,
    },
}


# Accounts


@pytest.fixture(scope="module")
def accounts():
    return comparing.account_gpt2()


def count_by_hand(n_embd, n_layer, **_):
    """Parameters of GPT-2: embeddings, then two norms, attention and feed-forward in each layer, then the last norm."""
    vocabulary, positions, norm = 50257, 1024, 2 * n_embd
    attention = n_embd * 3 * n_embd + 3 * n_embd + n_embd * n_embd + n_embd
    feed_forward = 2 * n_embd * 4 * n_embd + 4 * n_embd + n_embd
    return (vocabulary + positions) * n_embd + n_layer * (2 * norm + attention + feed_forward) + norm


@pytest.mark.parametrize("name", GPT2_COUNTS)
def test_gpt2_has_the_known_counts(accounts, name):
    shape = comparing.GPT2_SIZES[name]
    full, adapted = accounts[name]["full"], accounts[name]["lora"]
    assert (full["total"], adapted["trained"]) == GPT2_COUNTS[name]
    assert full["trained"] == full["total"] == count_by_hand(**shape)
    # Two matrices of rank 4 for each of two projections of the width onto itself, in every layer.
    assert adapted["trained"] == shape["n_layer"] * 2 * 2 * 4 * shape["n_embd"]
    assert adapted["total"] == full["total"] + adapted["trained"]


@pytest.mark.parametrize("name", GPT2_COUNTS)
def test_bytes_of_gpt2_follow_from_its_counts(accounts, name):
    total, trained = GPT2_COUNTS[name]
    assert accounts[name]["full"]["bytes"] == {
        **{"weights": 4 * total, "gradients": 4 * total, "optimizer": 8 * total, "together": 16 * total},
        "checkpoint": 4 * total,
    }
    assert accounts[name]["lora"]["bytes"] == {
        **{"weights": 4 * (total + trained), "gradients": 4 * trained, "optimizer": 8 * trained},
        **{"together": 4 * total + 16 * trained, "checkpoint": 4 * trained},
    }
    ratios = accounts[name]["ratio"]
    assert ratios["trained"] == ratios["bytes"]["checkpoint"] == ratios["bytes"]["optimizer"] == trained / total
    assert ratios["bytes"]["weights"] == pytest.approx(1 + trained / total)
    assert ratios["bytes"]["together"] == pytest.approx(1 / 4 + trained / total)


def test_counts_of_the_paper_are_its_own(accounts):
    """Its table 3 says 0.35M and 0.77M of GPT-2 medium and large, which its rank 4 does not give."""
    said = {name: size.get("trained_by_the_paper") for name, size in accounts.items()}
    assert said == {"gpt2": None, "gpt2-medium": 350_000, "gpt2-large": 770_000, "gpt2-xl": None}
    text = comparing.accounting_table(accounts)
    assert "the paper says 0.35M trained for gpt2-medium\n" in text
    assert re.search(r"^gpt2-medium +LoRA +355,216,384 +393,216 +1\.5 +1,355\.0 +1\.5 +3\.0 +1,359\.5$", text, re.M)


def test_the_docstring_shows_the_table(accounts):
    shown = comparing.accounting_table(accounts).splitlines()[:4]
    assert "\n".join(f"    {line}" for line in shown) in comparing.__doc__


def test_accounting_only_needs_nothing_else(tmp_path, monkeypatch, capsys, accounts):
    monkeypatch.setattr(results, "RESULTS", tmp_path)
    comparing.compare(accounting_only=True, model="no-such-model", output_dir=str(tmp_path / "none"), record="counts")
    assert [path.name for path in tmp_path.iterdir()] == ["counts.json"]
    record = json.loads((tmp_path / "counts.json").read_text(encoding="utf-8"))
    assert record["accounting"] == accounts
    assert record.keys() == {"task", "accounting", "environment"}
    assert capsys.readouterr().out == f"\n{comparing.accounting_table(accounts)}\n"


# A comparison


def command_line(options):
    return [f"--{name}={value}" for name, value in options.items()]


@pytest.fixture(scope="module")
def compared(tmp_path_factory, gpt2):
    """(output folder, options, printed text) of a run of the script."""
    folder = tmp_path_factory.mktemp("compared")
    options = {**OPTIONS, "model": gpt2, "output_dir": str(folder / "new")}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", str(folder))
        status, stdout, stderr = script("compare_lora_vs_full.py", *command_line(options))
    assert status == 0, own_lines(stderr)
    return folder / "new", options, stdout


@pytest.fixture
def copied(compared, tmp_path):
    """(a copy of the runs, options)."""
    folder, options, _ = compared
    shutil.copytree(folder, tmp_path / "runs")
    return tmp_path / "runs", {**options, "output_dir": str(tmp_path / "runs"), "reuse": True, "pairs": 0}


def read(folder, *names):
    return json.loads(Path(folder, *names).read_text(encoding="utf-8"))


def test_runs_differ_in_the_method_alone(compared):
    folder, _, _ = compared
    runs = {method: read(folder, method, "results.json") for method in ("base", "lora", "full")}
    configurations = [run["configuration"] for run in runs.values()]
    differing = {name for name in configurations[0] if len({c[name] for c in configurations}) > 1}
    assert differing == {"adapt", "lr", "skip_base", "output_dir"}
    assert [c["adapt"] for c in configurations] == ["none", "lora", "full"]
    assert [c["lr"] for c in configurations] == [None, run_training.LEARNING_RATES["fast"]["lora"], 1e-3]
    given = OPTIONS.keys() - {"pairs", "lr_full"}
    assert all(c[name] == OPTIONS[name] for c in configurations for name in given)
    # The same base and the same first batch: the update of LoRA is still zero then.
    assert runs["lora"]["curve"][0][1] == pytest.approx(runs["full"]["curve"][0][1], rel=1e-6)
    assert runs["lora"]["curve"][-1] != runs["full"]["curve"][-1]


def test_costs_are_those_of_the_runs_and_their_ratios(compared):
    folder, _, _ = compared
    costs = read(folder, "comparison.json")["costs"]
    layers, width, vocabulary = 2, 32, 600
    trained = {"lora": layers * 16 * 16 * width}  # rank, and ins and outs of four matrices in widths
    trained["full"] = read(folder, "base", "results.json")["parameters"]["total"]
    assert trained["full"] == 2 * vocabulary * width + 256 * width + layers * (12 * width**2 + 13 * width) + 2 * width
    tensors = {"lora": layers * 8, "full": 3 + layers * 12 + 2}  # the embeddings, the head, the norms
    files = {"lora": "adapter.safetensors", "full": "model/model.safetensors"}
    for method in ("lora", "full"):
        run = read(folder, method, "results.json")
        side = {name: cost[method] for name, cost in costs.items()}
        assert side["trained_parameters"] == trained[method]
        assert side["checkpoint_bytes"] == (folder / method / files[method]).stat().st_size
        # AdamW counts its steps as well, in a float32 for each tensor.
        assert side["optimizer_bytes"] == 8 * trained[method] + 4 * tensors[method]
        assert side["held_optimizer_bytes"] == 8 * trained[method]
        assert side["held_gradients_bytes"] == 4 * trained[method]
        assert side["held_weights_bytes"] == run["bytes"]["model"]
        held = ("weights", "gradients", "optimizer")
        assert side["held_together_bytes"] == sum(side[f"held_{what}_bytes"] for what in held)
        assert side["peak_process_bytes"] == run["peak_memory_bytes"]["process"] > 1e8
        for what in ("step", "train", "total"):
            assert side[f"{what}_seconds"] == run["seconds"][what] > 0
    assert {name: cost["ratio"] for name, cost in costs.items()} == {
        name: cost["lora"] / cost["full"] for name, cost in costs.items()
    }


def test_quality_is_that_of_the_runs(compared):
    folder, _, _ = compared
    comparison = read(folder, "comparison.json")
    sides = {"base": ("before", "base"), "lora": ("after", "lora"), "full": ("after", "full")}
    scores = {side: read(folder, method, "results.json")[when] for side, (when, method) in sides.items()}
    assert {"bleu", "nist", "meteor", "rouge_l", "cider", "slot_error_rate", "perplexity"} < comparison[
        "quality"
    ].keys()
    for metric, quality in comparison["quality"].items():
        assert {side: quality[side] for side in sides} == {side: scores[side][metric] for side in sides}
        one, other = quality["lora"], quality["full"]
        assert quality["ratio"] == (one / other if other else None)
        assert quality["difference"] == (None if one is None else one - other)
    assert [m for m, q in comparison["quality"].items() if q["lora"] is None] == ["meteor", "rouge_l", "cider"]
    assert comparison["quality"]["perplexity"]["ratio"] != 1
    assert comparison["quality"]["slot_share"]["references"] == 1
    assert comparison["not_measured"] == scores["lora"]["not_measured"] != {}


def test_steps_in_turn_are_summed_up_from_their_seconds(compared):
    folder, _, _ = compared
    steps = read(folder, "comparison.json")["steps_in_turn"]
    lora, full = steps["seconds"]["lora"], steps["seconds"]["full"]
    assert len(lora) == len(full) == OPTIONS["pairs"]
    assert (steps["lora"], steps["full"]) == (statistics.median(lora), statistics.median(full))
    ratios = sorted(one / other for one, other in zip(lora, full, strict=True))
    assert steps["ratio"] == pytest.approx((ratios[1] + ratios[2]) / 2)
    assert steps["range"] == [ratios[0], ratios[3]]
    # Of four values they lie a quarter of the way from the first to the second, and from the fourth to the third.
    low, high = (3 * ratios[0] + ratios[1]) / 4, (ratios[2] + 3 * ratios[3]) / 4
    assert steps["quartiles"] == pytest.approx([low, high])


def test_script_prints_the_tables_and_writes_the_folders(compared):
    folder, options, stdout = compared
    assert sorted(path.name for path in folder.iterdir()) == ["base", "comparison.json", "full", "lora"]
    comparison = read(folder, "comparison.json")
    assert str(folder) not in json.dumps(comparison)
    assert comparison["configuration"]["lr_full"] == options["lr_full"]
    assert comparison["environment"]["threads"] == 1
    assert [run["lr"] for run in comparison["runs"].values()] == [None, 0.005, 0.001]
    for method in ("lora", "full"):
        assert comparison["runs"][method]["steps"] == 3
    perplexity = comparison["quality"]["perplexity"]
    numbers = [f"{perplexity[c]:.3f}" for c in ("base", "lora", "full", "ratio", "difference")]
    assert re.search(r"^perplexity +" + " +".join(map(re.escape, numbers)) + "$", stdout, re.M)
    assert re.search(r"^METEOR$", stdout, re.M)
    assert comparison["not_measured"]["meteor"] in stdout
    cost = comparison["costs"]["optimizer_bytes"]
    assert re.search(rf"^optimizer bytes +{cost['lora']:,} +{cost['full']:,} +{cost['ratio']:.5g}$", stdout, re.M)
    assert re.search(r"^step seconds, in turn( +[\d.e-]+){3}$", stdout, re.M)
    assert re.search(r"^in turn: medians of 4 pairs of steps, whose ratios have quartiles of [\d.]+ and ", stdout, re.M)
    assert "learning rates: LoRA 0.005, full 0.001; steps: 3 each\n" in stdout


def test_both_methods_step_on_the_same_batches_by_turns(gpt2, monkeypatch):
    """What the training loop calls is called; only who came with which batch is written down."""
    taken, step = [], loop.optimizer_step

    def noted(model, task, batch, optimizer, scaler, knobs):
        taken.append((knobs.adapt, batch, sum(p.numel() for group in optimizer.param_groups for p in group["params"])))
        return step(model, task, batch, optimizer, scaler, knobs)

    monkeypatch.setattr(loop, "optimizer_step", noted)
    knobs = comparing.Knobs(model=gpt2, batch_size=4, max_train_samples=14, max_eval_samples=1, pairs=3)
    seconds = comparing.time_in_turn(knobs)
    assert {method: len(steps) for method, steps in seconds.items()} == {"lora": 3, "full": 3}
    pairs = list(zip(taken[::2], taken[1::2], strict=True))
    assert len(pairs) == comparing.WARM_UP + 3
    assert [(one[0], other[0]) for one, other in pairs] == [("full", "lora"), ("lora", "full")] * 3
    assert all(one[1] == other[1] for one, other in pairs)
    assert {(method, trained) for method, _, trained in taken} == {("lora", 16_384), ("full", 72_064)}
    # Those of the runs' first epoch, and then again.
    _, tokenizer = causal_lm.load_causal_lm(gpt2, compute.choose_device("cpu"))
    samples = run_training.encode_pairs(run_training.load_data(knobs)[0], tokenizer, 256, "training")
    order = loop.make_batches([len(sample["input_ids"]) for sample in samples], 4, "110 1")
    expected = [[samples[index] for index in batch] for batch in order]
    assert [one[1] for one, _ in pairs] == (expected + expected)[:6]


# Which runs are taken


def test_reuse_trains_nothing_and_writes_the_records(copied, compared, tmp_path, monkeypatch, capsys):
    folder, options = copied
    before = {path: path.stat().st_mtime_ns for path in folder.glob("*/*")}
    written = tmp_path / "results"
    written.mkdir()
    monkeypatch.setattr(results, "RESULTS", written)
    comparison = comparing.compare(**options, record="embedded")
    assert {path: path.stat().st_mtime_ns for path in folder.glob("*/*")} == before
    names = ["embedded.json", "embedded_base.json", "embedded_full.json", "embedded_lora.json"]
    assert sorted(path.name for path in written.iterdir()) == names
    assert read(written, "embedded.json") == json.loads(json.dumps(comparison)) == read(folder, "comparison.json")
    for method in ("base", "lora", "full"):
        assert read(written, f"embedded_{method}.json") == read(folder, method, "results.json")
    first = read(compared[0], "comparison.json")
    assert {key: comparison[key] for key in ("quality", "costs")} == {key: first[key] for key in ("quality", "costs")}
    assert comparison["steps_in_turn"] is None
    assert f"lora: taken from {folder / 'lora' / 'results.json'}\n" in capsys.readouterr().out


def change(record, path, value):
    *parents, last = path.split("/")
    for name in parents:
        record = record[int(name)] if isinstance(record, list) else record[name]
    record[last] = value


NOT_ALIKE = {  # in the record of full fine-tuning: what, its new value, the message
    "threads": ("environment/threads", 7, r"threads 1 against 7"),
    "device": ("environment/device", "NVIDIA H100", r"device 'cpu' against 'NVIDIA H100'"),
    "version": ("environment/versions/torch", "2.4.0", r"torch '[^']+' against '2\.4\.0'"),
    "python": ("environment/python", "3.1", r"python '[^']+' against '3\.1'"),
    "processes": ("processes", 2, r"processes 1 against 2"),
    "texts": ("counts/train_texts", 29, r"train_texts 30 against 29"),
    "model": ("base", {"a": "0f"}, r"weights of the base {'model.safetensors': '\w{64}'} against {'a': '0f'}"),
}


@pytest.mark.parametrize("path, value, message", NOT_ALIKE.values(), ids=NOT_ALIKE)
def test_runs_that_differ_in_more_than_the_method_are_refused(copied, path, value, message):
    folder, options = copied
    record = read(folder, "full", "results.json")
    change(record, path, value)
    results.write_json(folder / "full" / "results.json", record)
    whole = rf"the runs base and full differ in more than the method: {message}; run without --reuse, which makes them "
    (folder / "lora" / "results.json").unlink()  # refused before it is made
    with pytest.raises(cli.UserError, match=whole):
        comparing.compare(**options)
    assert not (folder / "lora" / "results.json").exists()


def test_runs_of_different_lengths_are_refused(copied):
    folder, options = copied
    record = read(folder, "full", "results.json")
    change(record, "history/0/step", 2)
    results.write_json(folder / "full" / "results.json", record)
    with pytest.raises(
        cli.UserError, match="the runs lora and full differ in more than the method: steps 3 against 2;"
    ):
        comparing.compare(**options)


OTHER_RUNS = {  # what is asked for now, the message
    "seed": (
        {"seed": 1},
        r"base.results\.json holds another run than the one asked for: --seed 110 against 1; run with",
    ),
    "steps": ({"max_steps": 2}, r"--max_steps 3 against 2"),
    "decoding": ({"num_beams": 2, "max_new_tokens": 9}, r"--max_new_tokens 12 against 9, --num_beams 1 against 2"),
    "learning rate": ({"lr_lora": 0.5}, r"lora.results\.json holds another run .*: --lr 0\.005 against 0\.5"),
    "rank": ({"lora_dim": 2}, r"--lora_dim 16 against 2"),
    "model": ({"model": "gpt2"}, r"--model '.*' against 'gpt2'"),
    "preset": ({"preset": "paper"}, r"--preset 'fast' against 'paper'"),
    "data": ({"data_dir": "{other}"}, r"train file {{'file': 'train\.txt', .*}} against {{.*}}"),
}


@pytest.mark.parametrize("asked, message", OTHER_RUNS.values(), ids=OTHER_RUNS)
def test_runs_other_than_those_asked_for_are_not_taken(copied, tmp_path, asked, message):
    _, options = copied
    if "data_dir" in asked:
        shutil.copytree(DATA, tmp_path / "data")
        with (tmp_path / "data" / "train.txt").open("a", encoding="utf-8") as file:
            file.write("name : Quince||Quince is a pub .\n")
        asked = {"data_dir": str(tmp_path / "data")}
    with pytest.raises(cli.UserError, match=message.replace("{{", r"\{").replace("}}", r"\}")):
        comparing.compare(**{**options, **asked})


@pytest.mark.parametrize("text", ["", "[]", '{"configuration": {}, "data": {}}'])
def test_a_file_that_is_no_record_is_not_taken(copied, text):
    folder, options = copied
    (folder / "base" / "results.json").write_text(text, encoding="utf-8")
    with pytest.raises(
        cli.UserError, match=r"base.results\.json: no record of run_training\.py \(.*; run without --reuse"
    ):
        comparing.compare(**options)


def test_commits_may_differ_and_are_told(copied, capsys):
    folder, options = copied
    for method, commit in (("lora", "c1"), ("full", "c2"), ("base", "c1")):
        record = read(folder, method, "results.json")
        change(record, "environment/commit", commit)
        results.write_json(folder / method / "results.json", record)
    comparing.compare(**options)
    assert capsys.readouterr().out.endswith("\nthe runs were made at different commits: c1, c2\n")


def test_a_run_that_fails_ends_the_comparison(copied, capfd, monkeypatch):
    """The run's own message, then that of the comparison; what is missing alone is made."""
    folder, options = copied
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)  # as in the runs that are taken
    shutil.rmtree(folder / "full")
    (folder / "full").write_text("in the way", encoding="utf-8")
    with pytest.raises(cli.UserError, match=r"run_training\.py --adapt full ended with status 2, for the reason above"):
        comparing.compare(**options)
    out, err = capfd.readouterr()
    assert "lora: taken from" in out
    assert re.search(r"error: .*File exists", err)


# Knobs


@pytest.mark.parametrize("preset", ["fast", "paper"])
@pytest.mark.parametrize("method", ["base", "lora", "full"])
def test_command_lines_give_the_knobs_of_the_runs(preset, method):
    given = {"preset": preset, "label_smoothing": 0.0, "gradient_checkpointing": True, "target_modules": "c_attn"}
    knobs = cli.fill_in(comparing.Knobs, given, run_training.PRESETS)
    wanted = comparing.knobs_of_run(knobs, method)
    command = runs.command(Path(run_training.__file__), wanted)
    assert command[:2] == [sys.executable, str(Path(run_training.__file__))]
    parsed = cli.parse_knobs(run_training.Knobs, "", command[2:], run_training.PRESETS)
    assert parsed == wanted
    filled = cli.fill_in(run_training.Knobs, given, run_training.PRESETS)
    own = {"adapt": run_training.Knobs.adapt, "lr": None, "skip_base": False, "output_dir": filled.output_dir}
    assert dataclasses.replace(wanted, **own) == filled
    rates = {**run_training.LEARNING_RATES[preset], "base": None}
    assert (wanted.lr, wanted.skip_base) == (rates[method], method != "base")


BAD = {
    "one pair": ({"pairs": 1}, "--pairs 1: must be 0, or at least 2 for a spread"),
    "pairs": ({"pairs": -1}, "--pairs -1: must be 0, or at least 2"),
    "rate of LoRA": ({"lr_lora": 0.0}, "--lr_lora 0.0: must be above 0"),
    "rate of full": ({"lr_full": float("nan")}, "--lr_full nan: must be above 0"),
    "knob of a run": ({"batch_size": 0}, "--batch_size 0: must be above 0"),
    "device": ({"device": "gpu"}, "--device gpu: no such device here"),
    "patience": ({"patience": 2}, "patience=2: no such knob"),
    "method": ({"adapt": "full"}, "adapt='full': no such knob"),
    "rate": ({"lr": 0.1}, r"lr=0\.1: no such knob"),
}


@pytest.mark.parametrize("given, message", BAD.values(), ids=BAD)
def test_bad_knobs_are_refused_before_anything_is_done(tmp_path, given, message):
    with pytest.raises(cli.UserError, match=message):
        comparing.compare(**given, output_dir=str(tmp_path / "new"))
    assert not (tmp_path / "new").exists()


def test_several_processes_are_refused(tmp_path, monkeypatch, call):
    """By each script but the two that train."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    status, _, stderr = call(comparing, "--output_dir", tmp_path / "new")
    name = comparing.__name__
    assert (status, stderr) == (2, f"error: {name} is one process; start it with python, not with torchrun\n")
    assert not (tmp_path / "new").exists()


def test_reuse_is_of_files_that_are_still_those_of_the_run(copied):
    folder, options = copied
    (folder / "lora" / "adapter.safetensors").write_bytes(b"of another run")
    message = r"lora.results\.json: beside it there is no adapter\.safetensors of that run; run without --reuse"
    with pytest.raises(cli.UserError, match=message):
        comparing.compare(**options)


def test_a_run_of_another_place_is_refused_before_the_others_are_made(copied):
    """They would differ from it in the end."""
    folder, options = copied
    for method in ("base", "full"):
        record = read(folder, method, "results.json")
        change(record, "environment/versions/torch", "2.4.0")
        results.write_json(folder / method / "results.json", record)
    (folder / "lora" / "results.json").unlink()
    message = r"base.results\.json cannot stand beside a run made now: .*torch '2\.4\.0' against '[^']+'.*; run without"
    with pytest.raises(cli.UserError, match=message):
        comparing.compare(**options)
    assert not (folder / "lora" / "results.json").exists()


def test_every_knob_is_an_option_with_a_reason(capsys):
    with pytest.raises(SystemExit) as end:
        cli.parse_knobs(comparing.Knobs, comparing.__doc__, ["--help"])
    assert end.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for field in dataclasses.fields(comparing.Knobs):
        assert f"--{field.name}" in text
        assert " ".join(field.metadata["help"].split()) in text
    assert cli.parse_knobs(comparing.Knobs, "", []) == comparing.Knobs()
