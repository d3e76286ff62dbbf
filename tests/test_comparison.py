"""The four comparison scripts: what they read, what they pair and refuse to, every figure, the charts, the commands.

The records are copies of shipped ones, changed where a case says so, and those of real runs of a tiny encoder.
Alone: `pytest tests/test_comparison.py`.
"""

import copy
import json
import re
import shlex
import shutil
import statistics
import subprocess
import sys
from xml.etree import ElementTree

import benchmark_multi_task
import compare_lora_vs_full
import COMPARISON_RESULTS as measured
import evaluate_lora_improvement
import LORA_vs_FULL_COMPARISON as costs
import pytest
import QUALITY_COMPARISON as quality
import run_training
import run_training_nlu
import VISUAL_COMPARISON as visual
from common import cli, files
from common.records import runs
from common.reports import comparison, missing, reached, reading, tables
from nlg_models import NLG
from nlu_models import load_script
from test_nlu_benchmark import run_here

improving = load_script("evaluate_lora_improvement")
EXAMPLES = NLG.parent
SHIPPED = ["nlg_compare", "nlg_compare_base", "nlg_compare_lora", "nlg_compare_full", "nlg_embedded"]
SHIPPED += ["nlg_improvement", "nlg_smollm2_lora", "nlg_smollm2_full", "metric_check"]
PAIR = "nlg_compare_lora", "nlg_compare_full"
TINY = "nlu_tiny_lora", "nlu_tiny_full"
SCRIPTS = {"COMPARISON_RESULTS": measured, "QUALITY_COMPARISON": quality, "LORA_vs_FULL_COMPARISON": costs}
SCRIPTS["VISUAL_COMPARISON"] = visual

# What benchmark_multi_task.py writes, as far as it is read here.
SERVED = {
    "task": "glue, many tasks on one base",
    "tasks": {"sst2": {}, "rte": {}},
    "bytes": {"lora": 300, "full": 2600, "base": 1000},
    "served": {
        "lora": {
            "seconds": {"load": 0.5, "switch": 4e-5},
            "texts_per_second": {"in turns": 90.0, "task after task": 110.0},
            "tensor_bytes": 2 * 2**20,
            "peak_memory_bytes": {"process": 300 * 2**20},
        },
        "full": {
            "seconds": {"load": 0.25, "switch": 1e-7},
            "texts_per_second": {"in turns": 100.0, "task after task": 125.0},
            "tensor_bytes": 8 * 2**20,
            "peak_memory_bytes": {"process": 400 * 2**20},
        },
    },
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory, roberta):
    """Shipped records and those of a trial on SST-2 with two seeds; the runs of its first seed as records of runs."""
    folder, made = tmp_path_factory.mktemp("results"), tmp_path_factory.mktemp("made")
    for name in SHIPPED:
        shutil.copy(files.RESULTS / f"{name}.json", folder)
    few = {"max_steps": 2, "max_train_samples": 64, "max_eval_samples": 24, "seeds": 2, "resamples": 50}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs, "make_run", run_here)
        patch.setattr("common.records.results.RESULTS", folder)
        improving.measure_improvement(
            "sst2", model=roberta, device="cpu", output_dir=str(made), record="nlu_tiny", **few
        )
    for name, run in zip(TINY, ("lora_0.004_0", "full_0.0004_0"), strict=True):
        shutil.copy(made / run / "results.json", folder / f"{name}.json")
    for path in folder.glob("nlu_*.json"):  # as if its few lines were all there are
        path.write_text(re.sub(r'"max_eval_samples": 24', '"max_eval_samples": null', path.read_text("utf-8")), "utf-8")
    trial = json.loads((folder / "nlu_tiny.json").read_text(encoding="utf-8"))
    benchmark = {**SERVED, "configuration": trial["configuration"], "environment": trial["environment"]}
    (folder / "nlu_tiny_tasks.json").write_text(json.dumps(benchmark), encoding="utf-8")
    return folder


@pytest.fixture
def records(folder):
    return reading.read_folder(folder)


def put(records, name, path, value):
    """Set an entry, "a/b", of a record."""
    *parents, last = path.split("/")
    place = records[name]
    for key in parents:
        place = place[int(key)] if isinstance(place, list) else place[key]
    place[last] = value


def printed(capsys, blocks):
    capsys.readouterr()
    comparison.show(blocks)
    return capsys.readouterr().out


def reports(records, capsys):
    """{script: what it prints} of all four."""
    gaps = missing.Gaps()
    texts = {
        measured: printed(capsys, [(*table, []) for table in measured.tables_of(records, gaps)] + gaps.block()),
        quality: printed(capsys, quality.report(records)),
        costs: printed(capsys, costs.report(records, costs.Knobs())),
    }
    pairs, gaps = comparison.pairs(records), missing.Gaps()
    visual.report(records, pairs, visual.panels_of(records, pairs, gaps), gaps)
    return {**texts, visual: capsys.readouterr().out}


def cells(blocks, *titles):
    """The rows that begin with one of the titles, of all blocks."""
    return [row for _, rows, _ in blocks for row in rows if row[0] in titles]


# The scripts as a whole


def test_each_reads_the_shipped_results_without_torch_in_ten_seconds(tmp_path):
    """Seconds of the processor, which other work on the machine does not lengthen."""
    check = (
        "import runpy, sys, time; name = sys.argv.pop(1); sys.argv[0] = name; sys.path.insert(0, '.')\n"
        "runpy.run_path(name, run_name='__main__')\n"
        "assert not {'torch', 'transformers', 'sklearn', 'scipy'} & set(sys.modules)\n"
        "assert time.process_time() < 10"
    )
    for name, options in {**dict.fromkeys(SCRIPTS, []), "VISUAL_COMPARISON": ["--output_dir", str(tmp_path)]}.items():
        command = [sys.executable, "-W", "error", "-c", check, f"{name}.py", "--all", *options]
        done = subprocess.run(command, cwd=EXAMPLES, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert "nlg_compare_full.json" in done.stdout, name
    charts = ["quality", "bytes", "memory", "step_time", "loss_curves"]
    assert sorted(path.stem for path in tmp_path.iterdir()) == sorted(2 * charts)
    for name in charts:
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert ElementTree.parse(tmp_path / f"{name}.svg").getroot().tag.endswith("svg")
        assert f"{name}.png, {name}.svg" in done.stdout


@pytest.mark.parametrize("script", SCRIPTS.values(), ids=SCRIPTS)
def test_by_default_each_prints_one_screen_of_the_shipped_results(script, call, tmp_path):
    options = ["--output_dir", tmp_path] if script is visual else []
    status, out, err = call(script, *options)
    lines = out.removeprefix("\n").splitlines()
    assert (status, err) == (0, "") and len(lines) <= 40 and max(map(len, lines[:-1])) <= 120
    assert "not measured [" not in out and "E2E" in out and "STS-B" in out
    assert any(line.startswith("--all prints everything") for line in lines)


def test_the_document_is_that_of_the_shipped_results(tmp_path, monkeypatch, call):
    text = measured.DOCUMENT.read_text(encoding="utf-8")
    assert text == measured.document(reading.read_folder(files.RESULTS)), "cd examples; COMPARISON_RESULTS.py --write"
    for link in re.findall(r"\]\(([^)]+)\)", text):
        assert (measured.DOCUMENT.parent / link).exists(), link
    monkeypatch.setattr(measured, "DOCUMENT", tmp_path / "COMPARISON_RESULTS.md")
    status, out, _ = call(measured, "--write")
    assert status == 0 and out.endswith(f"written to {tmp_path / 'COMPARISON_RESULTS.md'}\n")
    assert measured.DOCUMENT.read_text(encoding="utf-8") == text


@pytest.mark.parametrize(
    "name, path, value, text, scripts",
    [
        ("nlg_compare_lora", "after/bleu", 41.26, "41.3", [measured, quality, visual]),
        ("nlg_compare_base", "before/nist", 3.333, "3.33", [measured]),
        ("nlg_smollm2_full", "after/slot_share", 0.4321, "43.2", [quality, visual]),
        ("nlg_compare_full", "bytes/checkpoint", 7654321, "7,654,321", [measured, costs, visual]),
        ("nlg_compare_full", "bytes/optimizer", 1234567, "1,234,567", [costs, visual]),
        ("nlg_compare_lora", "peak_memory_bytes/process", 4321 * 2**20, "4,321", [costs, visual]),
        ("nlg_compare_lora", "seconds/step", 0.1239, "123.9", [costs, visual]),
        ("nlg_compare_lora", "seconds/train", 314.25, "314.2", [costs]),
        ("nlg_compare_lora", "parameters/trainable", 54321, "54,321", [measured, costs]),
        ("nlg_compare", "steps_in_turn/lora", 0.4444, "444.4", [costs]),
        ("nlg_improvement", "intervals/systems/adapted/bleu", [11.1, 12.2], "[11.1, 12.2]", [quality]),
        (
            "nlu_tiny",
            "systems/lora/scores/accuracy",
            {"mean": 0.123, "deviation": 0.0456, "values": [0.1, 0.146]},
            "12.3 +- 4.6",
            [measured, quality],
        ),
        ("nlu_tiny_full", "after/dev/accuracy", 0.0123, "1.2", [measured, quality, visual]),
        ("nlu_tiny_lora", "majority/dev/accuracy", 0.0321, "3.2", [measured, visual]),
        ("nlu_tiny_tasks", "served/lora/texts_per_second/in turns", 777.0, "777", [costs]),
        ("nlg_compare_lora", "history/0/valid_loss", 9.8765, "9.8765", [visual]),
    ],
)
def test_a_number_that_is_changed_changes_the_reports(name, path, value, text, scripts, records, capsys):
    before = reports(copy.deepcopy(records), capsys)
    put(records, name, path, value)
    after = reports(records, capsys)
    changed = [script for script in SCRIPTS.values() if before[script] != after[script]]
    assert changed == [script for script in SCRIPTS.values() if script in scripts]
    word = re.compile(rf"(?<![\d,.]){re.escape(text)}(?![\d,])")
    for script in scripts:
        assert len(word.findall(after[script])) > len(word.findall(before[script])), script.__name__


# Which runs are a pair


def test_pairs_are_those_that_differ_in_the_method_alone(records):
    assert comparison.pairs(records) == [PAIR, ("nlg_smollm2_lora", "nlg_smollm2_full"), TINY]
    assert comparison.without_pair(records) == {"nlg_embedded": ("nlg_compare_full", "--skip_base False against True")}


@pytest.mark.parametrize(
    "path, value, text",
    [
        ("configuration/batch_size", 16, "--batch_size 8 against 16"),
        ("configuration/seed", 7, "--seed 110 against 7"),
        ("configuration/model", "gpt2", "--model 'examples/NLG/model' against 'gpt2'"),
        ("data/train/sha256", "0" * 64, "train file {'file': 'train.txt', 'sha256': 'fec95e"),
        ("counts/train_texts", 2950, "train_texts 2951 against 2950"),
        ("environment/device", "NVIDIA", "device 'cpu' against 'NVIDIA'"),
        ("environment/threads", 64, "threads "),
        ("environment/versions/torch", "2.4", "torch '2.13.0+cpu' against '2.4'"),
        ("history/2/step", 1106, "steps 1107 against 1106"),
        ("processes", 2, "processes 1 against 2"),
        ("base", {"model.safetensors": "0"}, "weights of the base {'model.safetensors': "),
        ("init_adapter", {"a.safetensors": "0"}, "adapter to begin with None against {'a.safetensors': '0'}"),
        ("task", "glue sst2", "task 'e2e' against 'glue sst2'"),
        # What each method has for itself, and where it went.
        ("configuration/lr", 1e-5, None),
        ("configuration/lora_dim", 64, None),
        ("configuration/output_dir", "elsewhere", None),
        ("environment/commit", "0" * 40, None),
    ],
)
def test_runs_that_differ_in_more_are_refused_with_what_they_differ_in(path, value, text, records):
    put(records, PAIR[1], path, value)
    if text is None:
        assert comparison.require_pair(records, PAIR) == PAIR and PAIR in comparison.pairs(records)
        return
    assert PAIR not in comparison.pairs(records)
    with pytest.raises(cli.UserError) as error:
        comparison.require_pair(records, PAIR)
    assert str(error.value).startswith(f"--pair {' '.join(PAIR)}: they differ in more than the method: {text}")


@pytest.mark.parametrize(
    "names, message",
    [
        ("nlg_embedded nlg_nothing", "--pair nlg_nothing: no run of that name; there are nlg_compare_base, "),
        ("nlg_compare nlg_compare_lora", "--pair nlg_compare: no run of that name"),
        (
            "nlg_embedded nlg_compare_lora",
            "must be one run of LoRA and one of full fine-tuning; nlg_embedded is LoRA, ",
        ),
        ("nlg_embedded nlg_compare_full.json", "more than the method: --skip_base False against True\n"),
    ],
)
@pytest.mark.parametrize("script", [quality, costs], ids=lambda script: script.__name__)
def test_what_is_asked_for_and_is_no_pair(script, names, message, call, folder):
    status, out, err = call(script, "--results", folder, "--pair", *names.split())
    assert status == 2 and not out and message in err


@pytest.mark.parametrize("script", [quality, costs], ids=lambda script: script.__name__)
def test_a_pair_that_is_asked_for_stands_alone(script, call, folder, tmp_path):
    status, out, _ = call(script, "--results", folder, "--pair", "nlg_compare_full.json", "nlg_compare_lora")
    assert status == 0 and f"LoRA: {PAIR[0]}.json" in out and f"full: {PAIR[1]}.json" in out
    assert "smollm2" not in out and "nlu" not in out
    for name in PAIR:
        shutil.copy(folder / f"{name}.json", tmp_path / f"{name}_lr_0.1.json")
    assert call(script, "--results", tmp_path, "--pair", *(f"{name}_lr_0.1" for name in PAIR))[0] == 0


# What is synthetic


@pytest.mark.parametrize(
    "change, title",
    [
        ({}, "E2E, base examples/NLG/model (SYNTHETIC), SYNTHETIC data that ship here"),
        (
            {"configuration/data_dir": "copied"},
            "E2E, base examples/NLG/model (SYNTHETIC), SYNTHETIC data that ship here",
        ),
        ({"data": {}}, "E2E, base examples/NLG/model (SYNTHETIC), SYNTHETIC data that ship here"),
        ({"configuration/model": "gpt2"}, "E2E, base gpt2, SYNTHETIC data that ship here"),
        (
            {"configuration/data_dir": "e2e", "data": {}},
            "E2E, base examples/NLG/model (SYNTHETIC), data from outside: e2e",
        ),
    ],
)
def test_what_a_grammar_made_is_known_by_its_place_and_its_fingerprint(change, title, records):
    for path, value in change.items():
        put(records, PAIR[0], path, value)
    assert reading.group_of(records[PAIR[0]]) == title


def test_no_table_and_no_panel_holds_synthetic_figures_with_others(records):
    tables = measured.tables_of(records, missing.Gaps())
    assert len(tables) == 4
    for title, rows in tables:
        for name in {name for cells in rows for name in re.findall(r"([\w.-]+)\.json", cells[-1])}:
            assert reading.group_of(records[name]) == title
    pairs = comparison.pairs(records)
    panels = visual.quality_panels(records, pairs, missing.Gaps())
    for chart in visual.COSTS.values():
        panels += visual.cost_panels(records, pairs, chart, missing.Gaps())
    assert len(panels) == 3 + 2 * 4
    for panel in panels:
        text = panel.title + "".join(panel.bars)
        assert ("smollm2" in text) != ("nlg_compare_lora" in text or "nlu_tiny" in text)
        assert ("SYNTHETIC" in panel.title) != ("outside" in panel.title)


def test_published_figures_are_marked_with_their_source():
    for title, (header, *rows) in measured.published():
        assert title.startswith("Published by others, not measured here")
        for row in rows:
            assert len(row) == len(header) and row[0].startswith("published: ") and "arXiv 2106.09685, table" in row[-1]


# What was reached


def test_a_row_says_what_a_run_was_and_reached(records):
    tables = dict(measured.tables_of(records, missing.Gaps()))
    run = records["nlg_smollm2_lora"]
    rows = {row[-1]: row for row in tables["E2E, base smollm2, data from outside: e2e"]}
    after = run["after"]
    assert rows["nlg_smollm2_lora.json"] == [
        *("LoRA r=8, alpha=32, query and value, lr 0.001", "630 meanings", "400"),
        *(f"{after['bleu']:.1f}", f"{after['nist']:.2f}", f"{after['meteor']:.1f}", f"{after['rouge_l']:.1f}"),
        *(f"{after['cider']:.2f}", f"{100 * after['slot_error_rate']:.1f}"),
        *("460,800", f"{run['bytes']['checkpoint']:,}", "cpu, 2 threads, bf16", "nlg_smollm2_lora.json"),
    ]
    header, *rows = tables[reading.group_of(records[PAIR[0]])]
    assert [row[0].split()[0] for row in rows] == ["base", "LoRA", "full"]
    assert rows[1][-1] == "nlg_compare_lora.json, nlg_embedded.json"  # one and the same run
    task = [title for title in tables if title.startswith("SST-2")]
    systems = records["nlu_tiny"]["systems"]
    rows = {(row[0].split(",")[0].split()[0], row[-1]): row for row in tables[task[0]]}
    for title, system in (("head", "head"), ("LoRA", "lora"), ("full", "full")):
        values = systems[system]["scores"]["accuracy"]["values"]
        row = rows[title, "nlu_tiny.json"]
        assert row[3] == f"{100 * statistics.fmean(values):.1f} +- {100 * statistics.stdev(values):.1f}"
        assert row[0].endswith(", mean of 2 seeds") and row[1] == "24 lines"
        assert row[4:6] == [f"{systems[system]['trained']:,}", f"{systems[system]['checkpoint_bytes']:,}"]
    majority = 100 * records[TINY[0]]["majority"]["dev"]["accuracy"]
    assert [row[3] for row in rows.values() if row[0] == "majority guess"] == [f"{majority:.1f}"]


# Which run a figure is of


def e2e_rows(records):
    (members,) = [members for title, members in reached.groups(records).items() if "smollm2" in title]
    return {row.files[0]: row for row in reached.rows_of(records, members)}


@pytest.fixture
def in_part(records):
    """A run of which the record has the scores of 20 meanings, and an improvement that scored its checkpoint on all."""
    part, whole = copy.deepcopy(records["nlg_smollm2_full"]), copy.deepcopy(records["nlg_improvement"])
    part["configuration"] |= {"max_eval_samples": 20, "lr": 3e-4}
    part["counts"]["test_meanings"], part["after"]["bleu"] = 20, 99.0
    part["checkpoint_sha256"] = {"model.safetensors": "f" * 64}
    whole["configuration"] |= {knob: part["configuration"][knob] for knob in reached.DECODING}
    whole["data"], whole["counts"] = copy.deepcopy(part["data"]), {"test_meanings": 630}
    whole["inputs_sha256"] = {"base_texts": {"a.jsonl": "0"}, "adapted_model": {"model.safetensors": "f" * 64}}
    whole["base"] = copy.deepcopy(records["nlg_smollm2_lora"]["after"])
    whole["adapted"] = {**whole["base"], "bleu": 77.7}
    whole["intervals"]["systems"] = {"base": {"bleu": [60.0, 66.0]}, "adapted": {"bleu": [76.0, 78.0]}}
    whole["intervals"]["differences"] = {"adapted - base": {"bleu": [13.0, 15.0]}}
    records |= {"nlg_part": part, "nlg_part_against_lora": whole}
    return records


def test_what_was_scored_in_part_stands_with_its_scores_on_the_whole(in_part, capsys):
    row = e2e_rows(in_part)["nlg_part"]
    assert (row.scores["bleu"], row.scored, row.method) == ((77.7, None), "630 meanings", "full")
    assert row.files == ("nlg_part", "nlg_part_against_lora") and row.intervals == {"bleu": [76.0, 78.0]}
    assert e2e_rows(in_part)["nlg_smollm2_lora"].intervals == {"bleu": [60.0, 66.0]}
    bounds, source = reached.difference_intervals(in_part, "nlg_smollm2_lora", "nlg_part")
    assert (bounds, source) == ({"bleu": [-15.0, -13.0]}, "nlg_part_against_lora")
    assert reached.unexplained(in_part) == []
    assert all("99.0" not in text for text in reports(in_part, capsys).values())


@pytest.mark.parametrize(
    "path, value",
    [
        ("inputs_sha256/adapted_model", {"model.safetensors": "e" * 64}),  # of another run
        ("configuration/num_beams", 1),  # decoded otherwise
        ("configuration/max_eval_samples", 50),  # a part again
        ("data/test/sha256", "0" * 64),  # of another test set
    ],
)
def test_what_is_of_no_run_that_is_here_stands_in_no_table(path, value, in_part, capsys):
    put(in_part, "nlg_part_against_lora", path, value)
    in_part["nlg_part_against_lora"]["compared"] = {"base": "LoRA so", "adapted": "LoRA otherwise"}
    assert "nlg_part" not in e2e_rows(in_part)
    assert reached.unexplained(in_part) == ["nlg_part_against_lora"]
    assert measured.unexplained(in_part)[0][2] == ["nlg_part_against_lora.json: LoRA so against LoRA otherwise"]
    tables = dict(measured.tables_of(in_part, missing.Gaps()))
    (title,) = [title for title in tables if "smollm2" in title and "part of the test set" in title]
    assert [row[-1] for row in tables[title]] == ["result file", "nlg_part.json"]
    for text in reports(in_part, capsys).values():
        assert "77.7" not in text and "99.0" not in text


def test_every_row_of_the_shipped_results_has_a_run_of_its_method():
    shipped = reading.read_folder(files.RESULTS)
    assert reached.unexplained(shipped) == []
    assert not [title for title in reached.groups(shipped) if "test data" in title]  # one test set for each task
    for members in reached.groups(shipped).values():
        for row in reached.rows_of(shipped, members):
            mark = {"none": "before", "majority": "majority"}.get(row.method)
            behind = [shipped[name] for name in row.files if name in members]
            assert behind and reading.is_whole(shipped[row.files[-1]])
            for record in behind:
                found = [record["adapt"]] if reading.is_run(record) else record["systems"]
                assert mark in record if mark else row.method in found


def test_scores_on_another_test_file_stand_apart(records):
    put(records, "nlu_tiny_full", "data/dev/sha256", "ab" * 32)
    titles = [title for title, members in reached.groups(records).items() if title.startswith("SST-2")]
    assert len(titles) == 2 and titles[0].endswith(", test data abababab")


def seeds_of(records, **values):
    """Runs like TINY's LoRA, {name: its accuracy}, each with a seed and a checkpoint of its own."""
    for seed, (name, accuracy) in enumerate(values.items()):
        records[name] = run = copy.deepcopy(records[TINY[0]])
        run["configuration"] |= {"seed": seed + 5, "lr": 0.1}
        run["after"]["dev"]["accuracy"], run["checkpoint_sha256"] = accuracy, {"a": name}
    return [members for title, members in reached.groups(records).items() if title.startswith("SST-2")][0]


def test_runs_that_differ_in_the_seed_are_one_row(records):
    members = seeds_of(records, one=0.5, two=0.75, three=0.25)
    (row,) = [row for row in reached.rows_of(records, members) if "one" in row.files]
    assert row.files == ("one", "two", "three") and row.seeds == 3 and row.title.endswith("lr 0.1, mean of 3 seeds")
    assert row.scores["dev accuracy"] == (0.5, 0.25)
    assert reached.best_of(reached.rows_of(records, members))["lora"] == row  # three seeds come before two


def test_a_run_that_is_made_again_is_no_other_seed(records):
    members = seeds_of(records, one=0.5, two=0.75)
    records["two"]["configuration"]["seed"] = records["one"]["configuration"]["seed"]
    rows = {row.files: row for row in reached.rows_of(records, members)}
    assert rows["one",].scores["dev accuracy"] == (0.5, None) and rows["two",].scores["dev accuracy"] == (0.75, None)


def test_of_runs_with_one_seed_the_best_is_chosen_by_validation(records):
    better = copy.deepcopy(records["nlg_smollm2_full"])
    better["configuration"]["lr"], better["after"]["bleu"] = 7e-4, 1.0
    for entry in better["history"]:
        entry["valid_loss"] -= 0.5
    records["nlg_better"] = better
    assert reached.best_of(e2e_rows(records).values())["full"].files == ("nlg_better",)
    assert comparison.best_pairs(records)[reading.group_of(better)] == ("nlg_smollm2_lora", "nlg_better")
    # Losses on other texts cannot be compared: those on more texts come first.
    for name in ("nlg_smollm2_lora", "nlg_smollm2_full"):
        more = records[f"{name}_more"] = copy.deepcopy(records[name])
        more["after"]["bleu"] = 2.0
        more["counts"]["valid_texts"] += 1
        for entry in more["history"]:
            entry["valid_loss"] += 1
    assert reached.best_of(e2e_rows(records).values())["full"].files == ("nlg_smollm2_full_more",)
    pair = comparison.best_pairs(records)[reading.group_of(better)]
    assert pair == ("nlg_smollm2_lora_more", "nlg_smollm2_full_more")


def test_a_run_that_was_cut_off_and_resumed_is_a_pair_all_the_same(records):
    records["nlg_smollm2_lora"]["configuration"]["resume"] = True
    assert ("nlg_smollm2_lora", "nlg_smollm2_full") in comparison.pairs(records)


def test_the_seconds_of_a_part_are_no_costs(folder, tmp_path, capsys):
    """The record of a resumed run has those of its last part."""
    shutil.copytree(folder, tmp_path / "results")
    path = tmp_path / "results" / f"{PAIR[0]}.json"
    record = json.loads(path.read_text(encoding="utf-8"))
    record["first_step"] = 3
    path.write_text(json.dumps(record), encoding="utf-8")
    records = reading.read_folder(tmp_path / "results")
    knobs = costs.Knobs(pair=PAIR, gpu_hour_price=1.0, gb_month_price=1.0)
    blocks = costs.report(records, knobs)
    for title in ("training with validations, s", "the whole run, s", "seconds to train a task"):
        (found,) = cells(blocks, title)
        assert found[1].startswith(("-", "not measured")) and float(found[2].replace(",", "")) > 0 and found[3] == "-"
    assert cells(blocks, "together")[0][1] == "-" and cells(blocks, "bytes of a task")[0][1] != "-"
    assert any("- / " in cell for row in costs.best(records, knobs)[0][1] for cell in row)


def test_the_best_trial_is_not_chosen_by_lora_alone(records):
    trial = records["nlu_tiny"]
    for name, values in {"nlu_one": (0.5, 0.9, 0.7), "nlu_other": (0.5, 0.8, 0.9)}.items():
        records[name] = copy.deepcopy(trial)
        for system, mean in zip(("head", "lora", "full"), values, strict=True):
            records[name]["systems"][system]["scores"]["accuracy"]["mean"] = mean
    records["nlu_tiny"]["systems"]["head"]["scores"]["accuracy"]["mean"] = 0.0
    assert reached.best_trials(records)[0] == "nlu_other"


def test_query_and_value_stand_beside_a_trial_of_the_same_knobs(records):
    """The rate with the most seeds, then with the best first run; whatever else differs shuts a run out."""
    trial, run = records["nlu_tiny"], records[TINY[0]]

    def put_run(name, seed, lr, accuracy, **knobs):
        records[name] = copy.deepcopy(run)
        settings = {"seed": seed, "lr": lr, "target_modules": None, **knobs}
        records[name]["configuration"] |= {key: trial["configuration"][key] for key in ("max_eval_samples",)} | settings
        records[name]["after"]["dev"]["accuracy"] = accuracy

    found = tables._seeds_of_query_and_value
    for name in [name for name in TINY if name in records]:
        del records[name]
    assert found(records, trial) == []
    put_run("other_decay", 0, 1e-2, 0.99, weight_decay=0.5)
    put_run("worse", 0, 1e-3, 0.5)
    put_run("better", 0, 2e-3, 0.6)
    assert found(records, trial) == ["better"]
    put_run("worse_1", 1, 1e-3, 0.4)
    assert found(records, trial) == ["worse", "worse_1"]


def test_names_of_files_are_folded():
    names = ["a_lora", "a_full", "b", "a_lora", "c_x", "d_b_1", "d_b_2"]
    assert comparison.in_braces(names) == "a_{lora,full}, b, c_x, d_b_{1,2}"


@pytest.mark.parametrize(
    "targets, title", [("all-linear", "all linear layers"), ("q,v", "q,v"), ("query-value", "query and value")]
)
def test_targets_are_named(targets, title):
    settings = {"lora_dim": 2, "lora_alpha": 4.0, "target_modules": targets, "lr": None}
    assert reading.settings_title(settings, "lora") == f"LoRA r=2, alpha=4, {title}"


# Quality


def test_differences_and_which_is_better(records):
    blocks = quality.report(records, PAIR)
    lora, full = (records[name]["after"] for name in PAIR)
    (bleu,), (errors,) = cells(blocks, "BLEU"), cells(blocks, "slot errors, % (less is better)")
    assert bleu[1:4] == [f"{lora['bleu']:.1f}", f"{full['bleu']:.1f}", f"{lora['bleu'] - full['bleu']:+.1f}"]
    assert errors[3] == f"{100 * (lora['slot_error_rate'] - full['slot_error_rate']):+.1f}"
    assert bleu[5] == errors[5] == "no interval"  # as no improvement here compares the two
    assert cells(blocks, "distinct 1")[0][4:6] == ["-", "-"]  # neither more nor less is better


@pytest.mark.parametrize(
    "sign, gap, bounds, said",
    [
        (1, 0.2, [0.1, 0.3], "LoRA"),
        (1, -0.2, [-0.3, -0.1], "full"),
        (-1, 0.2, [0.1, 0.3], "full"),
        (-1, -0.2, [-0.3, -0.1], "LoRA"),
        (1, 0.2, [-0.1, 0.5], "may be chance"),
        (1, 0.2, [0.0, 0.5], "may be chance"),
        (1, -0.2, [0.1, 0.3], "may be chance"),  # the first seed says otherwise than the mean of all
        (1, 0.0, [0.1, 0.3], "may be chance"),
        (1, 0.2, None, "no interval"),
        (0, 0.2, [0.1, 0.3], "-"),
    ],
)
def test_nothing_is_better_without_an_interval_that_says_so(sign, gap, bounds, said):
    kind = reading.Score("of a test", sign=sign)
    assert quality.difference(kind, 1 + gap, 1, bounds, [gap, 2 * gap])[2] == said
    if said in ("LoRA", "full"):  # unless a seed disagrees
        assert quality.difference(kind, 1 + gap, 1, bounds, [gap, -0.1 * gap])[2] == "may be chance"
    assert quality.difference(kind, None, 1, bounds) == ["-", "-", "-"]


@pytest.mark.parametrize(
    "lora_is, interval, better", [("adapted", "[-4.1, -2.0]", "full"), ("base", "[2.0, 4.1]", "may be chance")]
)
def test_intervals_are_of_the_texts_that_scored_as_the_run(lora_is, interval, better, records):
    """An improvement with the run of full fine-tuning as its base, or the other way round."""
    record = copy.deepcopy(records["nlg_improvement"])
    full_is = {"adapted": "base", "base": "adapted"}[lora_is]
    record[lora_is], record[full_is] = (copy.deepcopy(records[name]["after"]) for name in PAIR)
    record["intervals"]["systems"] |= {lora_is: {"bleu": [90.0, 93.0]}, full_is: {"bleu": [94.0, 97.0]}}
    record["intervals"]["differences"] = {"adapted - base": {"bleu": [-4.1, -2.0]}}
    del records["nlg_improvement"]
    records["nlg_against"] = record
    blocks = quality.report(records, PAIR)
    assert cells(blocks, "BLEU")[0][4:] == [interval, better, "[90.0, 93.0]", "[94.0, 97.0]"]
    assert blocks[0][2][-1] == "95 % of LoRA - full: nlg_against.json, 1000 resamples"
    record["data"]["test"]["sha256"] = "0" * 64  # another test file
    again = cells(quality.report(records, PAIR), "BLEU")[0]
    assert again[5] == "no interval" and all(again[place].startswith("not measured") for place in (4, 6, 7))


def test_a_trial_shows_means_deviations_and_the_interval_of_lora_minus_full(records):
    trial = records["nlu_tiny"]
    trial["intervals"]["differences"]["full - lora"]["accuracy"] = [-0.25, 0.125]
    (_, trial_row) = cells(quality.report(records), "Accuracy")
    lora, full = (trial["systems"][system]["scores"]["accuracy"]["values"] for system in ("lora", "full"))
    difference = 100 * (statistics.fmean(lora) - statistics.fmean(full))
    assert trial_row == [
        "Accuracy",
        *(f"{100 * statistics.fmean(side):.1f} +- {100 * statistics.stdev(side):.1f}" for side in (lora, full)),
        f"{difference:+.1f}",
        "[-12.5, 25.0]",
        "may be chance",
    ]


# Costs


def test_ratios_and_the_steps_in_turn(records):
    blocks = costs.report(records, costs.Knobs(pair=PAIR))
    lora, full = (records[name] for name in PAIR)
    expected = {
        "trained parameters": (196608, 2025600, 0),
        "saved, bytes": (lora["bytes"]["checkpoint"], full["bytes"]["checkpoint"], 0),
        "median step in its own run, ms": (1e3 * lora["seconds"]["step"], 1e3 * full["seconds"]["step"], 1),
    }
    for title, (one, other, digits) in expected.items():
        assert cells(blocks, title) == [[title, f"{one:,.{digits}f}", f"{other:,.{digits}f}", f"{one / other:#.3g}"]]
    ratios = [a / b for a, b in zip(*records["nlg_compare"]["steps_in_turn"]["seconds"].values(), strict=True)]
    assert cells(blocks, "median step, in turn, ms")[0][3] == f"{statistics.median(ratios):#.3g}"
    assert cells(blocks, "peak memory on the GPU, MiB")[0][1:] == ["no GPU", "no GPU", "-"]


def test_the_cost_model_by_hand(records):
    """Ten tasks of 36 and 72 seconds, 1 and 100 GB, a base of 98 GB, at 2 an hour and 0.5 a GB and month, for 3."""
    for name, seconds, size in ((PAIR[0], 36.0, 10**9), (PAIR[1], 72.0, 100 * 10**9)):
        put(records, name, "seconds/train", seconds)
        put(records, name, "bytes/checkpoint", size)
    put(records, PAIR[1], "bytes/model", 98 * 10**9)
    knobs = costs.Knobs(tasks=10, gpu_hour_price=2.0, gb_month_price=0.5, months=3)
    title, rows, lines = costs.cost_model(records, PAIR, knobs)
    assert title.startswith("10 tasks like this one: E2E, base examples/NLG/model (SYNTHETIC)")
    assert rows[1:] == [
        ["seconds to train a task", "36.0", "72.0", "0.500"],
        ["hours to train 10: seconds x 10 / 3600", "0.100", "0.200", "0.500"],
        ["bytes of a task", "1,000,000,000", "100,000,000,000", "0.0100"],
        ["bytes of the base, kept once", "98,000,000,000", "0", "-"],
        ["bytes in all: bytes of the base + 10 x bytes of a task", "108,000,000,000", "1,000,000,000,000", "0.108"],
        ["training: hours x 2", "0.2000", "0.4000", "0.500"],
        ["keeping: bytes / 10^9 x 3 months x 0.5", "162.0000", "1,500.0000", "0.108"],
        ["together", "162.2000", "1,500.4000", "0.108"],
    ]
    assert lines[1:] == [
        "the seconds are of a CPU: the price is taken for an hour of that machine, and no GPU is meant"
    ]
    _, rows, lines = costs.cost_model(records, PAIR, costs.Knobs(tasks=10))
    assert len(rows) == 6 and lines[1:] == ["no prices given: --gpu_hour_price and --gb_month_price add the costs"]


@pytest.mark.parametrize(
    "option, message",
    [
        ("--tasks=0", "--tasks 0: must be above 0"),
        ("--months=nan", "--months nan: must be above 0"),
        ("--gpu_hour_price=-1", "--gpu_hour_price -1.0: must be a price, 0 or more"),
        ("--gb_month_price=inf", "--gb_month_price inf: must be a price, 0 or more"),
    ],
)
def test_knobs_of_the_cost_model(option, message, call, folder):
    assert call(costs, "--results", folder, option) == (2, "", f"error: {message}\n")


def test_serving_many_tasks(records):
    (block,) = [block for block in costs.report(records, costs.Knobs()) if block[0].startswith("Serving")]
    title, rows, lines = block
    assert title.startswith("Serving 2 tasks (sst2, rte), base ") and "SYNTHETIC data that ship here" in title
    assert rows[1:] == [
        ["files, the base with them, bytes", "1,300", "2,600", "0.500"],
        ["tensors in memory, MiB", "2.0", "8.0", "0.250"],
        ["peak memory of the process, MiB", "300.0", "400.0", "0.750"],
        ["loading, s", "0.50", "0.25", "2.00"],
        ["switch to another task, ms", "0.040", "nothing to switch", "-"],
        ["texts a second, tasks in turns", "90", "100", "0.900"],
        ["texts a second, task after task", "110", "125", "0.880"],
        ["texts a second, all tasks at once", "-", "-", "-"],
    ]
    assert lines == ["both: nlu_tiny_tasks.json"]


# Charts


def test_bars_are_as_long_as_the_figures(records, capsys):
    from matplotlib import pyplot

    pairs = comparison.pairs(records)
    panels = visual.quality_panels(records, pairs, missing.Gaps())
    visual.print_panel(panels[0])
    bleu = [records[name]["after"]["bleu"] for name in PAIR]
    lines = capsys.readouterr().out.splitlines()
    start = lines.index("  BLEU")
    titles = ("LoRA", "full fine-tuning")
    for line, title, value in zip(lines[start + 1 : start + 3], titles, bleu, strict=True):
        assert line == f"    {title:<17} {f'{value:.1f}':>12} {'#' * round(value / 2)}"
    figure = visual.draw_panels(panels, pyplot)
    assert [bar.get_width() for bar in figure.axes[0].patches[:2]] == pytest.approx(bleu)
    assert figure.axes[0].get_title() == panels[0].title and panels[0].title.splitlines()[1] == visual.files(PAIR)
    pyplot.close(figure)
    figure = visual.draw_losses(records, pairs, pyplot)
    for place, name in enumerate(PAIR):
        curve, points = figure.axes[0].lines[2 * place : 2 * place + 2]
        assert [list(pair) for pair in zip(*curve.get_data(), strict=True)] == records[name]["curve"]
        assert list(points.get_ydata()) == [entry["valid_loss"] for entry in records[name]["history"]]
    assert "label smoothing 0.1" in figure.axes[1].get_title() and "smoothing" not in figure.axes[0].get_title()
    pyplot.close(figure)


def test_charts_are_ignored_by_git():
    assert subprocess.run(["git", "check-ignore", "-q", "output/quality.png"], cwd=EXAMPLES).returncode == 0


# What is missing


@pytest.mark.parametrize(
    "name, path, value, script, row, command",
    [
        ("nlg_smollm2_lora", "after/meteor", None, quality, "METEOR", "run_training.py --device=auto --precision=bf16"),
        ("nlg_compare_lora", "after/meteor", None, quality, "METEOR", "compare_lora_vs_full.py --record=nlg_compare"),
        (
            *(TINY[0], "peak_memory_bytes/process", None, costs, "peak memory of the process, MiB"),
            "run_training_nlu.py --device=cpu",
        ),
    ],
)
def test_an_empty_cell_has_the_command_that_fills_it(name, path, value, script, row, command, records):
    put(records, name, path, value)
    blocks = script.report(records) if script is quality else script.report(records, costs.Knobs())
    (number,) = {
        re.fullmatch(r"not measured \[(\d+)\]", found[1])[1]
        for found in cells(blocks, row)
        if found[1].startswith("not measured")
    }
    numbered = blocks[-1][2][int(number) - 1]
    assert numbered.startswith(f"[{number}] python examples/") and command in numbered
    assert ("--record=" + name in numbered) or "--record=nlg_compare" in numbered


def test_what_is_undefined_needs_no_measuring(records):
    put(records, TINY[0], "after/dev/accuracy", None)
    full = 100 * records[TINY[1]]["after"]["dev"]["accuracy"]
    blocks = quality.report(records, TINY)
    assert cells(blocks, "Accuracy") == [["Accuracy", "undefined", f"{full:.1f}", "-", "-", "-"]]
    assert not any("run_training_nlu" in line for _, _, lines in blocks for line in lines)


def parsed(line):
    """The knobs of a command line that a report prints."""
    program, script, *arguments = shlex.split(line)
    assert program == "python" and (EXAMPLES.parent / script).is_file()
    modules = {
        "examples/NLG/run_training.py": (run_training, run_training.PRESETS),
        "examples/NLG/compare_lora_vs_full.py": (compare_lora_vs_full, run_training.PRESETS),
        "examples/NLG/evaluate_lora_improvement.py": (evaluate_lora_improvement, evaluate_lora_improvement.PRESETS),
        "examples/NLU/run_training_nlu.py": (run_training_nlu, run_training_nlu.presets),
        "examples/NLU/benchmark_multi_task.py": (benchmark_multi_task, None),
        "examples/NLU/evaluate_lora_improvement.py": (improving, None),
    }
    module, presets = modules.pop(script)
    return cli.parse_knobs(module.Knobs, "", arguments, presets)


def test_every_command_is_one_that_its_script_takes(records, tmp_path, capsys):
    put(records, "nlg_smollm2_full", "after/nist", None)
    put(records, TINY[1], "bytes/optimizer", None)
    del records["nlg_compare_full"], records["nlu_tiny"]
    for name in ("nlg_smollm2_lora", "nlg_smollm2_full"):
        put(records, name, "configuration/seed", 7)
        put(records, name, "configuration/patience", 3)  # which the comparison does not offer
    lines = set()
    for text in reports(records, capsys).values():
        lines |= set(re.findall(r"^\[\d+\] (python examples/.*)$", text, re.MULTILINE))
    scripts = {line.split()[1] for line in lines}
    assert len(scripts) == 6, scripts
    others = 0
    for line in lines:
        knobs = parsed(line)
        assert knobs.record and not knobs.record.startswith("/")
        if "compare_lora_vs_full" in line and knobs.record != "nlg_compare":
            assert (knobs.seed, knobs.lr_lora, knobs.lr_full, knobs.max_steps) == (7, 1e-3, 1e-4, 400)
            others += 1
    assert others == 1
    again = parsed(missing.remake("nlg_smollm2_lora", records["nlg_smollm2_lora"]))
    was = records["nlg_smollm2_lora"]["configuration"]
    newer = {"fsdp": False, "base_dtype": "float32"}  # than the records
    assert {**vars(again), "output_dir": None, "record": None} == {**newer, **was, "output_dir": None, "record": None}


def test_with_no_records_everything_is_missing(capsys):
    for text in reports({}, capsys).values():
        assert text.count("not measured [") >= 18
        assert "python examples/NLG/compare_lora_vs_full.py --record=nlg_compare\n" in text
        assert "python examples/NLU/benchmark_multi_task.py --record=nlu_multi_task\n" in text


# --run

WRITER = """import json, sys
record = json.loads(open({source!r}).read())
open({target!r}, "w").write(json.dumps(record))
open({target!r} + ".calls", "a").write(sys.argv[1] + "\\n")
sys.exit({status})
"""


@pytest.mark.parametrize("status", [0, 3])
def test_run_measures_what_is_missing_and_says_how_long_it_took_others(status, folder, tmp_path, monkeypatch, call):
    """With a script in place of the long ones, which writes what they would."""
    for path in folder.glob("nlg_*.json"):
        shutil.copy(path, tmp_path)
    (tmp_path / "nlg_compare_full.json").unlink()
    (tmp_path / "examples" / "NLG").mkdir(parents=True)
    script = WRITER.format(
        source=str(folder / "nlg_compare_full.json"), target=str(tmp_path / "nlg_compare_full.json"), status=status
    )
    (tmp_path / "examples" / "NLG" / "writer.py").write_text(script)
    names = ["nlg_compare_lora", "nlg_compare_full"]
    first = "python examples/NLG/writer.py --to=elsewhere"
    line = f"{first} && python examples/NLG/writer.py --record=x"
    monkeypatch.setattr(missing, "measurements", lambda: {line: names})
    monkeypatch.setattr(missing, "REPOSITORY", tmp_path)
    monkeypatch.setattr(comparison, "RESULTS", tmp_path)
    ended, out, err = call(quality, "--run", "--all", "--results", tmp_path)
    assert out.startswith(f"missing: nlg_compare_full.json\nrunning: {line}\n")
    calls = (tmp_path / "nlg_compare_full.json.calls").read_text().splitlines()
    assert calls == ["--to=elsewhere"] + ["--record=x"] * (status == 0)
    before = json.loads((folder / "nlg_compare_lora.json").read_text())
    took = f"{before['seconds']['total']:.0f} s ({reading.device_title(before)})"
    assert f"nlg_compare_lora.json {took}" in out.splitlines()[2]
    if status:
        assert (ended, err) == (
            2,
            "error: examples/NLG/writer.py ended with status 3, for the reason above; no more was measured\n",
        )
    else:
        assert ended == 0 and "full: nlg_compare_full.json" in out
        assert call(quality, "--run", "--results", tmp_path)[1].startswith("all there: python examples/NLG/writer.py")


def test_how_long_it_takes_may_be_unknown():
    line = missing.NLU_BENCHMARK
    assert missing.how_long({}, line) == "how long it takes is not known: no result file has such a run"


def test_run_writes_to_the_shipped_results_alone(tmp_path, monkeypatch, call):
    monkeypatch.setattr(missing, "measurements", dict)  # were it not refused, nothing long would begin
    status, out, err = call(quality, "--run", "--results", tmp_path)
    assert (status, out) == (2, "") and err == (
        f"error: --run writes to {files.RESULTS}, and --results is {tmp_path}; leave one of them out\n"
    )


# Files that are none


@pytest.mark.parametrize(
    "text, message",
    [
        ("{", "JSONDecodeError"),
        ('{"task": "e2e", "adapt": "lora"}', "KeyError('environment')"),
        ("[]", "TypeError"),
    ],
)
def test_a_file_that_is_no_record_is_named(text, message, tmp_path, call):
    (tmp_path / "nlg_odd.json").write_text(text)
    status, out, err = call(quality, "--results", tmp_path)
    assert (status, out) == (2, "") and message in err
    assert err.startswith(f"error: {tmp_path / 'nlg_odd.json'}: not a whole record of the scripts in examples/ (")


def test_a_folder_that_is_not_there(call):
    assert call(quality, "--results", "nowhere") == (2, "", "error: --results nowhere: no such folder\n")
