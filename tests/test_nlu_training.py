"""run_training_nlu.py: all eight tasks, what is trained and saved, the model's logits and losses, resumption.

The models are tiny, of each architecture, and read the shipped data, which is read here once more by hand. Oracles are
transformers' own forward of each text alone, scikit-learn and scipy. Scripts run in this process but for two.
Alone: `pytest tests/test_nlu_training.py` (half a minute on an idle core); with `-m slow` torchrun, too.
"""

import collections
import dataclasses
import hashlib
import json
import math
import operator
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import run_training_nlu
import sklearn.metrics
import torch
import transformers
from common import cli
from common.data import glue
from common.models import pretrained
from common.models import sequence_classification as classification
from common.training import loop
from nlg_models import script
from nlu_models import GLUE, NLU, WINDOW, tiny_roberta
from run_training_nlu import Knobs, train_model
from safetensors.torch import load_file, save_file
from scipy import stats

import loralib as lora

CPU = torch.device("cpu")
OFFICIAL = {  # folder, columns of the texts, column of the label, what stands for the labels in the order of their ids
    "sst2": ("SST-2", [0], 1, ["0", "1"]),
    "mnli": ("MNLI", [8, 9], 11, ["entailment", "neutral", "contradiction"]),
    "qnli": ("QNLI", [1, 2], 3, ["entailment", "not_entailment"]),
    "rte": ("RTE", [1, 2], 3, ["entailment", "not_entailment"]),
    "mrpc": ("MRPC", [3, 4], 0, ["0", "1"]),
    "cola": ("CoLA", [3], 1, ["0", "1"]),
    "qqp": ("QQP", [3, 4], 5, ["0", "1"]),
    "stsb": ("STS-B", [7, 8], 9, None),
}
NAMES = {  # of labels that are digits in the files
    "sst2": ["negative", "positive"],
    "mrpc": ["not_equivalent", "equivalent"],
    "cola": ["unacceptable", "acceptable"],
    "qqp": ["not_duplicate", "duplicate"],
}
FIRST = {"mrpc": "accuracy", "cola": "matthews", "stsb": "pearson"}  # the metric that chooses; else accuracy
SHORT = {"max_steps": 4, "eval_every": 2, "batch_size": 8, "max_train_samples": 40, "max_eval_samples": 24}


def train(task, model, folder, **options):
    return train_model(task, **{**SHORT, "model": model, "output_dir": str(folder), **options})


def read_rows(task, split):
    """[(texts, label)] of a shipped file, read by hand."""
    folder, texts, label, codes = OFFICIAL[task]
    lines = (GLUE / folder / f"{split}.tsv").read_text(encoding="utf-8-sig").removesuffix("\n").split("\n")
    rows = [line.split("\t") for line in lines[task != "cola" :]]
    return [([r[c].strip() for c in texts], codes.index(r[label]) if codes else float(r[label])) for r in rows]


def splits_of(task):
    """{name in the record: file} of the splits, without train."""
    return {"dev": "dev_matched", "dev_mismatched": "dev_mismatched"} if task == "mnli" else {"dev": "dev"}


def noise_of(task, file):
    """{row: its label before the noise} of a shipped file, where the noise changed it, read by hand."""
    codes = OFFICIAL[task][3]
    entry = json.loads((GLUE / OFFICIAL[task][0] / "noise.json").read_text(encoding="utf-8"))[f"{file}.tsv"]
    return {int(row): codes.index(label) if codes else float(label) for row, label in entry["labels"].items()}


def outputs_of(task):
    return len(OFFICIAL[task][3] or [0])


def joined(tokenizer, texts):
    """What the tokenizer of a decoder, without a separator, gets of a pair."""
    return texts if tokenizer.sep_token_id is not None or len(texts) == 1 else ["\n".join(texts)]


@torch.inference_mode()
def forward_alone(model, tokenizer, texts):
    """transformers' own logits of a text, or a pair, without padding."""
    encoding = tokenizer(*joined(tokenizer, texts), truncation=True, max_length=WINDOW, return_tensors="pt")
    return model.eval()(**encoding).logits[0].double()


def fresh(folder, outputs):
    """(A base with a head of so many outputs, tokenizer), loaded by transformers."""
    transformers.utils.logging.set_verbosity_error()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder, num_labels=outputs)
    if tokenizer.pad_token_id is None:
        model.config.pad_token_id = tokenizer.eos_token_id
    return model, tokenizer


def head_size(outputs):
    """Parameters of RoBERTa's head with the width of 32."""
    return 32 * 32 + 32 + outputs * 32 + outputs


def predictions(folder, split="dev"):
    lines = (Path(folder) / "dev_predictions.jsonl").read_text(encoding="utf-8").splitlines()
    return [line for line in map(json.loads, lines) if line["split"] == split]


def sha256(path):
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# The eight tasks


@pytest.fixture(scope="module")
def trained(tmp_path_factory, roberta):
    """{task: (folder, record)} of a few steps on all lines of each task."""
    folder = tmp_path_factory.mktemp("trained")
    options = {"max_train_samples": None, "max_eval_samples": None, "eval_every": None, "eval_batch_size": 100}
    return {task: (folder / task, train(task, roberta, folder / task, **options)) for task in OFFICIAL}


@pytest.mark.parametrize("task", OFFICIAL)
def test_the_data_are_counted_and_the_majority_is_that_of_the_training_labels(trained, task):
    _, record = trained[task]
    labels = {split: [label for _, label in read_rows(task, file)] for split, file in splits_of(task).items()}
    labels |= {split: [label for _, label in read_rows(task, split)] for split in ("train", "tune")}
    assert record["counts"] == {f"{split} lines": len(found) for split, found in labels.items()}
    names = NAMES.get(task, OFFICIAL[task][3])
    for split, found in labels.items():
        facts = record["splits"][split]
        if task == "stsb":
            assert facts["classes"] is None and facts["mean_label"] == pytest.approx(sum(found) / len(found))
        else:
            assert list(facts["classes"].items()) == [(name, found.count(i)) for i, name in enumerate(names)]
    for split, found in labels.items():
        noise = noise_of(task, splits_of(task).get(split, split))
        rule = [noise.get(row, label) for row, label in enumerate(found)]
        assert record["ceiling"][split]["labels_changed"] == sum(map(operator.ne, rule, found)) / len(found)
        scores = record["ceiling"][split]["scores"]
        if task == "stsb":
            assert scores["pearson"] == pytest.approx(stats.pearsonr(rule, found).statistic)
        else:
            assert scores["accuracy"] == sklearn.metrics.accuracy_score(found, rule)
            assert scores["matthews"] == pytest.approx(sklearn.metrics.matthews_corrcoef(found, rule))
    for split in splits_of(task):
        majority, found = record["majority"][split], labels[split]
        if task == "stsb":
            assert majority == {"pearson": None, "spearman": None}
            continue
        ((most, _),) = collections.Counter(labels["train"]).most_common(1)
        assert majority["accuracy"] == found.count(most) / len(found)
        assert majority["matthews"] == 0
        if len(names) == 2:
            assert majority["f1"] == sklearn.metrics.f1_score(found, [most] * len(found), zero_division=0)


@pytest.mark.parametrize("task", OFFICIAL)
def test_the_record_counts_parameters_and_bytes_and_names_what_it_comes_from(trained, roberta, task):
    folder, record = trained[task]
    assert record == json.loads((folder / "results.json").read_text(encoding="utf-8"))
    assert sorted(os.listdir(folder)) == ["adapter.safetensors", "dev_predictions.jsonl", "results.json"]
    # Two layers, query and value, A and B of rank 8 on a width of 32; and the head.
    trainable = 2 * 2 * 2 * 8 * 32 + head_size(outputs_of(task))
    encoder = sum(parameter.numel() for parameter in tiny_roberta().roberta.parameters())
    assert record["parameters"] == {"trainable": trainable, "total": encoder + trainable}
    adapter = folder / "adapter.safetensors"
    assert record["bytes"]["checkpoint"] == adapter.stat().st_size < 4 * trainable + 4096
    assert record["bytes"]["model"] == 4 * (encoder + trainable)
    assert record["bytes"]["optimizer"] == 8 * trainable + 4 * 12  # two moments, and a count for each of 12 tensors
    assert record["checkpoint_sha256"] == {adapter.name: sha256(adapter)}
    files = {"train": "train", "tune": "tune", **splits_of(task)}
    assert record["data"] == {
        split: {"file": f"{file}.tsv", "sha256": sha256(GLUE / OFFICIAL[task][0] / f"{file}.tsv")}
        for split, file in files.items()
    }
    assert record["base"] == {"model.safetensors": sha256(Path(roberta) / "model.safetensors")}
    assert record["task"] == f"glue {task}" and record["adapt"] == "lora"
    assert set(record["configuration"]) == {field.name for field in dataclasses.fields(Knobs)}
    assert record["configuration"]["data_dir"] == "examples/NLU/data"
    assert record["configuration"]["lr"] == run_training_nlu.LEARNING_RATES["lora"]
    assert str(folder.parent) not in json.dumps(record)
    assert [entry["step"] for entry in record["history"]] == [4] and len(record["curve"]) == 4
    assert record["seconds"]["total"] > record["seconds"]["train"] > record["seconds"]["step"] > 0


@pytest.mark.parametrize("task", OFFICIAL)
def test_the_saved_adapter_gives_the_written_predictions_and_they_the_scores(trained, roberta, task):
    folder, record = trained[task]
    model, tokenizer = fresh(roberta, outputs_of(task))
    lora.load_lora(model, folder / "adapter.safetensors")
    assert lora.read_metadata(folder / "adapter.safetensors") == {"task": task}
    for split, file in splits_of(task).items():
        written, rows = predictions(folder, split), read_rows(task, file)
        assert [(line["texts"], line["label"]) for line in written] == rows
        for line in written[::40]:
            output = forward_alone(model, tokenizer, line["texts"])
            if task == "stsb":
                assert line["prediction"] == pytest.approx(output.item(), abs=1e-4)
            else:
                assert line["probabilities"] == pytest.approx(output.softmax(-1).tolist(), abs=1e-5)
                assert line["probabilities"][line["prediction"]] == max(line["probabilities"])
        labels, found = zip(*((line["label"], line["prediction"]) for line in written), strict=True)
        scores = record["after"][split]
        if task == "stsb":
            expected = [stats.pearsonr(found, labels).statistic, stats.spearmanr(found, labels).statistic]
            assert [scores["pearson"], scores["spearman"]] == pytest.approx(expected)
        else:
            assert scores["accuracy"] == sklearn.metrics.accuracy_score(labels, found)
            assert scores["matthews"] == pytest.approx(sklearn.metrics.matthews_corrcoef(labels, found))
            if outputs_of(task) == 2:
                assert scores["f1"] == pytest.approx(sklearn.metrics.f1_score(labels, found, zero_division=0))
    first = FIRST.get(task, "accuracy")
    assert list(record["after"]["dev"])[0] == first
    tune = [glue.Example(tuple(texts), label) for texts, label in read_rows(task, "tune")]
    samples = run_training_nlu.encode_examples(tune, tokenizer, WINDOW)
    scores, *_ = run_training_nlu.evaluate(model, samples, tokenizer, glue.task_of(task), Knobs(eval_batch_size=100))
    assert record["chosen_on"] == "tune"
    if task != "stsb":  # whose predictions are all but constant
        assert record["history"][-1][first] == pytest.approx(scores[first], abs=1e-5)


def test_the_script_prints_what_the_record_says_and_trains_to_the_same_bits(roberta, tmp_path):
    options = {"task": "mrpc", "model": roberta, "batch_size": 8, "max_steps": 2, "max_train_samples": 40}
    arguments = [f"--{name}={value}" for name, value in options.items()]
    status, stdout, stderr = script("run_training_nlu.py", *arguments, "--output_dir", tmp_path / "a", folder=NLU)
    assert status == 0, stderr
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as the subprocess: the order of sums depends on it
    try:
        train_model(**options, output_dir=str(tmp_path / "b"))
    finally:
        torch.set_num_threads(threads)
    assert equal(*(load_file(tmp_path / name / "adapter.safetensors") for name in "ab"))
    record = json.loads((tmp_path / "a" / "results.json").read_text(encoding="utf-8"))
    assert stdout.startswith("train: 40 of 1,500 lines\n")
    classes = record["splits"]["train"]["classes"]
    shares = f"not_equivalent {classes['not_equivalent'] / 40:.1%}, equivalent {classes['equivalent'] / 40:.1%}"
    assert re.search(
        rf"^train +40 lines: {re.escape(shares)}; noise in [\d.]+% of the labels; [\d.]+ tokens, at most \d+$",
        *(stdout, re.M),
    )
    trainable, total = record["parameters"]["trainable"], record["parameters"]["total"]
    percent = f"{100 * trainable / total:.2f}"
    assert re.search(rf"^parameters +{total:,} in total, {trainable:,} trainable \({percent} %\)$", stdout, re.M)
    for title, name in (("Accuracy", "accuracy"), ("F1", "f1"), ("Matthews", "matthews")):
        line = re.search(rf"^dev +{title} +([-\d.]+) +([-\d.]+) +([\d.]+)$", stdout, re.M)
        wanted = [record[when]["dev"][name] for when in ("majority", "after")]
        wanted.append(record["ceiling"]["dev"]["scores"][name])
        assert line.groups() == tuple(f"{100 * value:.1f}" for value in wanted)
    assert re.search(r"^best step +[12] of 2$", stdout, re.M)
    files = "adapter.safetensors, dev_predictions.jsonl, results.json"
    assert stdout.endswith(f"written         to {tmp_path / 'a'}: {files}\n")


def test_an_undefined_score_is_said_in_words(trained, capsys):
    _, record = trained["stsb"]
    run_training_nlu.report(record, GLUE)
    printed = capsys.readouterr().out
    pearson, ceiling = (
        100 * scores["pearson"] for scores in (record["after"]["dev"], record["ceiling"]["dev"]["scores"])
    )
    assert re.search(rf"^dev +Pearson +not defined +{pearson:.1f} +{ceiling:.1f}$", printed, re.M)


# Logits and losses

ARCHITECTURES = {  # the layers that get adapters, and what is trained whole
    "roberta": ({"query", "value"}, {"classifier.dense", "classifier.out_proj"}),
    "bert": ({"query", "value"}, {"classifier"}),
    "bert_without_pooler": ({"query", "value"}, {"classifier", "bert.pooler.dense"}),
    "distilbert": ({"q_lin", "v_lin"}, {"pre_classifier", "classifier"}),
    "deberta": ({"query_proj", "value_proj"}, {"pooler.dense", "classifier"}),
    "decoder": ({"q_proj", "v_proj"}, {"score"}),
}
PAIRS = [
    ("The clock is red .", "Ada sold it ."),
    ("A quiet film .", "No ."),
    ("The harbour of Wenddale opens at 7 pm on Sunday , and Kira comes .", "The harbour opens in the evening ."),
]


@pytest.mark.parametrize("task", ["mnli", "stsb"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_logits_and_losses_are_those_of_each_text_alone(request, architecture, task):
    """Cross entropy and squared distance, written out; padding and the size of batches change nothing."""
    model, tokenizer, _, _ = classification.load(request.getfixturevalue(architecture), glue.task_of(task), CPU)
    labels = [2, 0, 1] if task == "mnli" else [4.5, 0.0, 3.2]
    alone = [forward_alone(model, tokenizer, list(texts)) for texts in PAIRS]
    losses = []
    for output, label in zip(alone, labels, strict=True):
        assert output.shape == (outputs_of(task),)
        losses.append(-output.log_softmax(-1)[label] if task == "mnli" else (output[0] - label) ** 2)
    encoded = [classification.encode(tokenizer, texts, WINDOW) for texts in PAIRS]
    assert len({len(sample["input_ids"]) for sample in encoded}) == 3
    samples = [{**sample, "label": label} for sample, label in zip(encoded, labels, strict=True)]
    batch = classification.collate(samples, tokenizer)
    with torch.no_grad():
        assert classification.loss_sum(model, batch, 0.0).item() == pytest.approx(sum(losses).item(), rel=1e-4)
    expected = torch.stack(alone).float()
    for size in (1, 2, 3):
        output = classification.predict(model, samples, Knobs(eval_batch_size=size), tokenizer)
        torch.testing.assert_close(output, expected if task == "mnli" else expected[:, 0], rtol=1e-4, atol=1e-5)
    assert classification.decide(output) == (output.tolist() if task == "stsb" else expected.argmax(-1).tolist())


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_new_regression_begins_at_the_mean_label(request, architecture, tmp_path):
    """Every output moves by the mean; a head that was trained, or has no bias as that of a decoder, is left alone."""
    loaded = classification.load(request.getfixturevalue(architecture), glue.task_of("stsb"), CPU)
    before = forward_alone(*loaded[:2], PAIRS[0])
    classification.begin_at_the_mean(loaded, [1.0, 2.0, 4.5])
    moved = 0.0 if architecture == "decoder" else 2.5
    torch.testing.assert_close(forward_alone(*loaded[:2], PAIRS[0]), before + moved)
    loaded.model.save_pretrained(tmp_path)
    loaded.tokenizer.save_pretrained(tmp_path)
    again = classification.load(tmp_path, glue.task_of("stsb"), CPU)
    classification.begin_at_the_mean(again, [5.0])
    torch.testing.assert_close(forward_alone(*again[:2], PAIRS[0]), before + moved)


def test_label_smoothing_spreads_over_all_labels(roberta):
    model, tokenizer, _, _ = classification.load(roberta, glue.task_of("mnli"), CPU)
    logs = forward_alone(model, tokenizer, PAIRS[0]).log_softmax(-1)
    sample = {**classification.encode(tokenizer, PAIRS[0], WINDOW), "label": 1}
    with torch.no_grad():
        smoothed = classification.loss_sum(model, classification.collate([sample], tokenizer), 0.1).item()
    assert smoothed == pytest.approx((-0.9 * logs[1] - 0.1 * logs.mean()).item(), rel=1e-4)


def test_pairs_have_types_of_tokens_where_the_model_has_them(bert, roberta):
    samples = {}
    for folder in (bert, roberta):
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        samples[folder] = classification.encode(tokenizer, PAIRS[0], WINDOW), tokenizer
    sample, tokenizer = samples[bert]
    first = sample["input_ids"].index(tokenizer.sep_token_id) + 1
    assert sample["token_type_ids"] == [0] * first + [1] * (len(sample["input_ids"]) - first)
    assert "token_type_ids" not in samples[roberta][0]
    padded = classification.collate([sample, {**sample, **{k: sample[k] * 2 for k in list(sample)[:3]}}], tokenizer)
    assert padded["token_type_ids"][0].tolist() == sample["token_type_ids"] + [0] * len(sample["input_ids"])
    model, _, _, _ = classification.load(bert, glue.task_of("rte"), CPU)
    plain = {**sample, "token_type_ids": [0] * len(sample["input_ids"])}
    one, other = classification.predict(model, [sample, plain], Knobs(), tokenizer)
    assert not torch.allclose(one, other, atol=1e-2)


def test_a_decoder_reads_pairs_with_a_line_break_and_pads_with_its_end(decoder):
    _, tokenizer, heads, missing = classification.load(decoder, glue.task_of("rte"), CPU)
    assert (
        tokenizer.decode(classification.encode(tokenizer, ("a film", "a clock"), 50)["input_ids"]) == "a film\na clock"
    )
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == 0
    assert (heads, missing) == (["score"], ["score.weight"])


@pytest.mark.parametrize("seq_len", [12, 40])
@pytest.mark.parametrize(
    "architecture, task", [("roberta", "rte"), ("bert", "rte"), ("bert", "sst2"), ("decoder", "rte")]
)
def test_texts_that_were_cut_are_counted(request, architecture, task, seq_len):
    tokenizer = transformers.AutoTokenizer.from_pretrained(request.getfixturevalue(architecture))
    examples = [glue.Example(tuple(texts), label) for texts, label in read_rows(task, "dev")[:100]]
    samples = run_training_nlu.encode_examples(examples, tokenizer, seq_len)
    facts = run_training_nlu.describe(examples, samples, glue.task_of(task))
    lengths = [len(tokenizer(*joined(tokenizer, list(example.texts)))["input_ids"]) for example in examples]
    assert facts["cut"] == sum(length > seq_len for length in lengths)
    cut = sorted(min(length, seq_len) for length in lengths)
    assert facts["tokens"] == {"median": (cut[49] + cut[50]) / 2, "most": cut[-1]}


def test_texts_that_were_cut_are_said(bert, tmp_path, capsys):
    record = train("rte", bert, tmp_path, seq_len=40, max_steps=1)
    cut = record["splits"]["train"]["cut"]
    assert 0 < cut < 40
    assert re.search(
        rf"^train +40 lines: .* tokens, at most 40, {cut} lines cut to that$", capsys.readouterr().out, re.M
    )


# What trains, what is saved


@pytest.fixture
def finished(monkeypatch):
    """The models of the runs of a test, as they were when they were saved."""
    models, save = [], run_training_nlu.save_model

    def saved(model, *arguments):
        models.append(model)
        return save(model, *arguments)

    monkeypatch.setattr(run_training_nlu, "save_model", saved)
    return models


@pytest.mark.parametrize("adapt", ["lora", "head", "full"])
def test_what_trains_changes_and_the_rest_stays_bit_for_bit(finished, roberta, tmp_path, adapt):
    record = train("mnli", roberta, tmp_path, adapt=adapt)
    (model,) = finished
    base = load_file(Path(roberta) / "model.safetensors")
    encoder = {name for name in base if name.startswith("roberta.")}
    kept, changed, rest = set(), set(), set()
    for name, parameter in model.named_parameters():
        if name in encoder:
            (kept if torch.equal(parameter, base[name]) else changed).add(name)
            assert parameter.requires_grad == (adapt == "full")
        elif parameter.requires_grad:
            rest.add(name)
    if adapt == "full":
        assert kept == set() and changed == encoder
    else:
        assert kept == encoder and changed == set()
    adapters = sum(name.endswith(("lora_A", "lora_B")) for name in rest)
    assert adapters == (8 if adapt == "lora" else 0)
    assert len(rest) == adapters + 4  # weights and biases of the two layers of the head
    trainable = head_size(3) + {"lora": 2048, "head": 0, "full": sum(base[name].numel() for name in encoder)}[adapt]
    assert record["parameters"]["trainable"] == trainable
    assert record["configuration"]["lr"] == {"lora": 4e-3, "head": 4e-3, "full": 4e-4}[adapt]
    again = train("mnli", roberta, tmp_path / "again", adapt=adapt, seed=0)
    other = train("mnli", roberta, tmp_path / "other", adapt=adapt, seed=1)
    assert again["history"] == record["history"] != other["history"]


@pytest.mark.parametrize("adapt", ["head", "full"])
def test_a_whole_model_is_an_ordinary_folder(roberta, tmp_path, adapt):
    record = train("mnli", roberta, tmp_path, adapt=adapt)
    weights = tmp_path / "model" / "model.safetensors"
    assert record["bytes"]["checkpoint"] == weights.stat().st_size > record["bytes"]["model"]
    assert record["checkpoint_sha256"] == {weights.name: sha256(weights)}
    model = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "model")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "model")
    assert model.config.id2label == {0: "entailment", 1: "neutral", 2: "contradiction"}
    for line in predictions(tmp_path)[:6]:
        output = forward_alone(model, tokenizer, line["texts"])
        assert line["probabilities"] == pytest.approx(output.softmax(-1).tolist(), abs=1e-5)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_architecture_trains_and_saves_its_adapters_and_its_head(request, tmp_path, architecture):
    folder, (targets, heads) = request.getfixturevalue(architecture), ARCHITECTURES[architecture]
    record = train("rte", folder, tmp_path, lr=1e-2)
    assert record["history"][-1]["valid_loss"] != record["history"][0]["valid_loss"]
    tensors = load_file(tmp_path / "adapter.safetensors")
    adapters = {name.split(".")[-2] for name in tensors if name.endswith((".lora_A", ".lora_B"))}
    saved = {name.rpartition(".")[0] for name in tensors if not name.endswith((".lora_A", ".lora_B"))}
    assert (adapters, saved) == (targets, heads)
    model, tokenizer = fresh(folder, 2)
    lora.load_lora(model, tmp_path / "adapter.safetensors")
    for line in predictions(tmp_path)[:6]:
        output = forward_alone(model, tokenizer, line["texts"])
        assert line["probabilities"] == pytest.approx(output.softmax(-1).tolist(), abs=1e-5)


def test_a_pooler_that_the_weights_have_stays_frozen(finished, bert, tmp_path):
    train("rte", bert, tmp_path)
    base = load_file(Path(bert) / "model.safetensors")
    pooler = finished[0].bert.pooler.dense
    assert torch.equal(pooler.weight, base["bert.pooler.dense.weight"]) and not pooler.weight.requires_grad


def test_chosen_layers_get_adapters(roberta, tmp_path):
    layers = {}
    for targets in ("key,query", "all-linear"):
        train("sst2", roberta, tmp_path, target_modules=targets, max_steps=1)
        names = [name.split(".") for name in load_file(tmp_path / "adapter.safetensors") if name.endswith("lora_A")]
        layers[targets] = {".".join(name[-3:-1]) for name in names}
    attention = {"self.query", "self.key", "self.value"}
    assert layers["key,query"] == {"self.query", "self.key"}
    assert layers["all-linear"] == attention | {"output.dense", "intermediate.dense"}


def test_an_encoder_with_weights_missing_is_refused(roberta, tmp_path):
    folder = shutil.copytree(roberta, tmp_path / "broken")
    weights = load_file(folder / "model.safetensors")
    del weights["roberta.encoder.layer.1.output.dense.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    message = "broken: its weights lack roberta.encoder.layer.1.output.dense.weight, which would be random"
    with pytest.raises(cli.UserError, match=message):
        train("sst2", str(folder), tmp_path / "output")


@pytest.mark.parametrize("task, outputs", [("qnli", 2), ("sst2", 2), ("stsb", 1)])
def test_a_model_of_another_task_is_refused_by_both_names(roberta, tmp_path, task, outputs):
    """Whether its head has the same shape or another."""
    train("mnli" if task == "sst2" else "rte", roberta, tmp_path, adapt="full", max_steps=1)
    was = "mnli" if task == "sst2" else "rte"
    message = f"model was trained on {was}, and this is {task}; give the base model, or --task {was}"
    with pytest.raises(cli.UserError, match=message):
        train(task, str(tmp_path / "model"), tmp_path / "next")
    record = train(was, str(tmp_path / "model"), tmp_path / "next")  # the same one goes on
    assert record["history"]


# Initial adapters


@pytest.mark.parametrize("form", ["native", "upstream"])
def test_an_initial_adapter_gives_its_layers_and_not_its_head(trained, roberta, tmp_path, form):
    file = trained["mnli"][0] / "adapter.safetensors"
    tensors = load_file(file)
    if form == "upstream":
        file = tmp_path / "mnli.bin"
        torch.save(tensors, file)
    models = {}
    for init in (None, str(file)):
        model, _, heads, _ = classification.load(roberta, glue.task_of("rte"), CPU, 3)
        run_training_nlu.adapt_model(model, heads, Knobs(init_adapter=init, seed=3))
        models[init] = lora.lora_state_dict(model)
    plain, begun = models.values()
    adapters = {name for name in tensors if name.endswith(("lora_A", "lora_B"))}
    assert begun.keys() == plain.keys() == tensors.keys() and len(adapters) == 8
    for name, tensor in begun.items():
        assert torch.equal(tensor, tensors[name] if name in adapters else plain[name]), name
        assert not torch.equal(tensor, plain[name] if name in adapters else tensors[name][:2]), name
    record = train("rte", roberta, tmp_path / "run", init_adapter=str(file))
    assert record["init_adapter"] == {file.name: sha256(file)}
    assert record["parameters"]["trainable"] == 2048 + head_size(2)


BAD_INIT = {
    "no file": ({"init_adapter": "nowhere"}, r"--init_adapter nowhere: no such file; run_training_nlu.py --task mnli"),
    "nothing to begin": ({"adapt": "full"}, "--init_adapter goes with --adapt lora, and this is --adapt full"),
    "rank": ({"lora_dim": 4}, "query: r is 8 in the file, 4 in the model"),
    "alpha": ({"lora_alpha": 8.0}, r"--lora_alpha 8: .*adapter.safetensors was trained with 16; give --lora_alpha 16"),
    "layers": ({"target_modules": "query"}, "value: the file adapts it, the model does not"),
}


@pytest.mark.parametrize("options, message", BAD_INIT.values(), ids=BAD_INIT)
def test_an_initial_adapter_that_does_not_fit_is_refused(trained, roberta, tmp_path, options, message):
    options = {"init_adapter": str(trained["mnli"][0] / "adapter.safetensors"), **options}
    with pytest.raises(cli.UserError, match=message):
        train("rte", roberta, tmp_path, **options)
    assert not any(tmp_path.iterdir())


# Which checkpoint is kept


def write_task(folder, task, labels, dev_labels=None):
    """A data folder with a few lines of these labels, for training and, if not of others, for validation."""
    name, texts, label, codes = OFFICIAL[task]
    header, *_ = (GLUE / name / "train.tsv").read_text(encoding="utf-8-sig").splitlines()
    (folder / name).mkdir(parents=True)
    for split, found in (("train", labels), ("dev", dev_labels or labels)):
        lines = [] if task == "cola" else [header]
        for index, value in enumerate(found):
            row = ["x"] * len(header.split("\t"))
            for column in texts:
                row[column] = f"text {index} of {column}"
            row[label] = codes[value] if codes else str(value)
            lines.append("\t".join(row))
        (folder / name / f"{split}.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(folder)


def test_the_majority_does_not_look_at_the_dev_labels(roberta, tmp_path):
    data = write_task(tmp_path / "data", "mrpc", [1, 0, 1, 1], [0, 0, 1, 0])
    record = train("mrpc", roberta, tmp_path / "output", data_dir=data, max_steps=1)
    majority = record["majority"]["dev"]
    assert (majority["accuracy"], majority["recall"], majority["f1"]) == (0.25, 1, 0.4)  # precision is 1/4


def test_without_a_set_to_choose_on_the_dev_set_is_that_and_without_noise_told_there_is_no_ceiling(
    roberta, tmp_path, capsys
):
    data = write_task(tmp_path / "data", "mrpc", [1, 0, 1, 1], [0, 0, 1, 0])
    record = train("mrpc", roberta, tmp_path / "output", data_dir=data, max_steps=1)
    assert (record["chosen_on"], record["ceiling"]) == ("dev", {"train": None, "dev": None})
    assert record["history"][-1]["accuracy"] == record["after"]["dev"]["accuracy"]
    printed = capsys.readouterr().out
    assert "ceiling" not in printed and "noise" not in printed


def sure(*labels, by=2.0):
    """Logits of these labels."""
    return by * torch.eye(2)[list(labels)]


NUMBERS = [1.0, 2.0, 3.0, 4.0]
VALIDATIONS = {  # task, labels, outputs of successive validations, the best
    # Three of four right by saying one label only: most accuracy, but no correlation.
    "accuracy": ("sst2", [0, 1, 1, 1], [sure(0, 1, 0, 0), sure(1, 1, 1, 1), sure(0, 0, 0, 1)], 2),
    "Matthews": ("cola", [0, 1, 1, 1], [sure(1, 1, 1, 1), sure(0, 1, 0, 0), sure(1, 1, 1, 1)], 2),
    # F1 0.857 and 0.667.
    "accuracy and not F1": ("mrpc", [0, 0, 0, 1], [sure(1, 1, 1, 1), sure(0, 0, 0, 0), sure(1, 1, 1, 1)], 2),
    "loss where the metric is the same": (
        *("sst2", [0, 1, 1, 1]),
        *([sure(1, 1, 1, 1, by=5.0), sure(1, 1, 1, 1), sure(1, 1, 1, 1, by=9.0)], 2),
    ),
    "the first of equals": ("sst2", [0, 1, 1, 1], [sure(0, 1, 1, 1)] * 3, 1),
    "correlation and not distance": (
        *("stsb", NUMBERS),
        *([torch.tensor([2.0, 1.0, 3.0, 4.0]), torch.tensor([11.0, 12.0, 13.0, 14.0]), torch.tensor(NUMBERS[::-1])], 2),
    ),
    "any correlation before none": (
        *("stsb", NUMBERS),
        *([torch.full((4,), 2.5), torch.tensor(NUMBERS[::-1]), torch.full((4,), 2.5)], 2),
    ),
}


@pytest.mark.parametrize("task, labels, outputs, best", VALIDATIONS.values(), ids=VALIDATIONS)
def test_the_best_validation_is_that_of_the_tasks_own_metric(
    roberta, tmp_path, monkeypatch, task, labels, outputs, best
):
    """The validations' outputs are put in; what is saved is what was there at the best."""
    weights, real = [], classification.predict

    def given(model, samples, knobs, tokenizer, progress=False):
        if len(weights) == len(outputs):
            return real(model, samples, knobs, tokenizer)
        weights.append({name: tensor.clone() for name, tensor in lora.lora_state_dict(model).items()})
        return outputs[len(weights) - 1]

    monkeypatch.setattr(classification, "predict", given)
    data = write_task(tmp_path / "data", task, labels)
    options = {"data_dir": data, "max_steps": 3, "eval_every": 1, "batch_size": 4, "num_epochs": 3}
    record = train(task, roberta, tmp_path / "output", **options)
    assert record["best_step"] == best
    assert equal(load_file(tmp_path / "output" / "adapter.safetensors"), weights[best - 1])
    assert not equal(weights[0], weights[1])
    first = FIRST.get(task, "accuracy")
    assert [entry["step"] for entry in record["history"]] == [1, 2, 3]
    if task == "stsb":
        losses = [((output - torch.tensor(labels)) ** 2).mean().item() for output in outputs]
    else:
        losses = [-output.log_softmax(-1)[range(4), labels].mean().item() for output in outputs]
        score = {"matthews": sklearn.metrics.matthews_corrcoef}.get(first, sklearn.metrics.accuracy_score)
        expected = [score(labels, output.argmax(-1)) for output in outputs]
        assert [entry[first] for entry in record["history"]] == pytest.approx(expected)
    assert [entry["valid_loss"] for entry in record["history"]] == pytest.approx(losses, rel=1e-5)


@pytest.mark.parametrize("task", ["sst2", "stsb"])
def test_outputs_that_are_not_finite_end_the_training(roberta, tmp_path, task):
    """The loss before the last step is finite, the weights after it are not."""
    with pytest.raises(cli.UserError, match="the outputs for .* are not all finite; .* try a lower --lr"):
        train(task, roberta, tmp_path, adapt="full", lr=1e30, max_steps=1)
    assert not any(tmp_path.iterdir())


# Resumption


class Killed(Exception):
    pass


@pytest.mark.parametrize("at", [3, 5, 6], ids=["early", "later", "after the last step"])
def test_a_resumed_run_equals_an_uninterrupted_one_to_the_bit(roberta, tmp_path, monkeypatch, at):
    """With dropout in the encoder and in the adapters, and a step lost after the last validation."""
    options = {"lora_dropout": 0.2, "max_steps": 6, "lr": 1e-2}
    whole = train("mrpc", roberta, tmp_path / "whole", **options)
    step, evaluate, calls = loop.optimizer_step, run_training_nlu.evaluate, []

    def killed(*arguments):
        if len(calls) == at:
            raise Killed
        calls.append(1)
        return step(*arguments)

    def killed_after(*arguments):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(loop, "optimizer_step", killed)
        patch.setattr(run_training_nlu, "evaluate", killed_after)
        with pytest.raises(Killed):
            train("mrpc", roberta, tmp_path / "killed", **options)
    assert len(calls) == at and run_training_nlu.evaluate is evaluate
    torch.manual_seed(12345)  # another process begins with other random numbers
    resumed = train("mrpc", roberta, tmp_path / "killed", **options, resume=True)
    assert resumed["first_step"] == at // 2 * 2 and whole["first_step"] == 0
    for key in ("history", "curve", "best_step"):
        assert resumed[key] == whole[key], key
    assert equal(*(load_file(tmp_path / name / "adapter.safetensors") for name in ("whole", "killed")))
    assert sorted(os.listdir(tmp_path / "killed")) == sorted(os.listdir(tmp_path / "whole"))
    with pytest.raises(cli.UserError, match="--resume: there is no .*training_state.pt to go on from"):
        train("mrpc", roberta, tmp_path / "killed", **options, resume=True)


def test_another_run_is_not_resumed(roberta, tmp_path, monkeypatch):
    def killed(*arguments):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(run_training_nlu, "evaluate", killed)
        with pytest.raises(Killed):
            train("mrpc", roberta, tmp_path)
    for task, options, message in (
        ("mrpc", {"lr": 0.5}, "is of another run: lr 0.004, now 0.5; start anew"),
        ("qqp", {}, "is of another run: task 'mrpc', now 'qqp', data "),
        ("mrpc", {"lora_dim": 4}, "is of another run: lora_dim 8, now 4;"),
    ):
        with pytest.raises(cli.UserError, match=message):
            train(task, roberta, tmp_path, **options, resume=True)


# Several processes


@pytest.mark.slow
def test_two_processes_train_as_one(decoder, tmp_path):
    """torchrun: the same losses up to the order of sums, the same scores. The decoder has no dropout."""
    options = {"model": decoder, "max_steps": 3, "batch_size": 5, "eval_every": 2, "max_eval_samples": 21}
    one = train_model("rte", **options, output_dir=str(tmp_path / "one"))
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone"]
    arguments = [f"--{name}={value}" for name, value in {"task": "rte", **options}.items()]
    command = [*torchrun, "run_training_nlu.py", *arguments, f"--output_dir={tmp_path / 'two'}"]
    done = subprocess.run(command, cwd=NLU, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    two = json.loads((tmp_path / "two" / "results.json").read_text(encoding="utf-8"))
    assert (one["processes"], two["processes"]) == (1, 2)
    for a, b in zip(one["history"], two["history"], strict=True):
        assert a == pytest.approx(b, rel=1e-4)
    for a, b in zip(predictions(tmp_path / "one"), predictions(tmp_path / "two"), strict=True):
        assert a["texts"] == b["texts"] and a["probabilities"] == pytest.approx(b["probabilities"], abs=1e-4)
    assert done.stdout.count("parameters ") == 1
    assert sorted(os.listdir(tmp_path / "two")) == sorted(os.listdir(tmp_path / "one"))


# Knobs

RECIPES = {  # FORMATS.md, section 4: batch size, learning rate, epochs
    "mnli": (128, 5e-4, 30),
    "sst2": (128, 5e-4, 60),
    "mrpc": (128, 4e-4, 30),
    "cola": (64, 4e-4, 80),
    "qnli": (256, 4e-4, 25),
    "qqp": (128, 5e-4, 25),
    "rte": (256, 5e-4, 80),
    "stsb": (128, 4e-4, 40),
}


def parsed(*arguments):
    return cli.parse_knobs(Knobs, "", arguments, run_training_nlu.presets)


@pytest.mark.parametrize("task, recipe", RECIPES.items(), ids=RECIPES)
def test_the_paper_preset_is_the_authors_recipe_of_each_task(task, recipe):
    knobs = parsed("--task", task, "--preset", "paper")
    assert (knobs.batch_size, knobs.lr, knobs.num_epochs) == recipe
    same = {"lora_dim": 8, "lora_alpha": 16, "warmup_steps": 0.06, "weight_decay": 0.1, "seq_len": 512, "seed": 0}
    same.update(label_smoothing=0.0, target_modules=None, init_adapter=None)
    assert {name: getattr(knobs, name) for name in same} == same
    assert parsed("--task", task, "--preset", "paper", "--lr", "1", "--batch_size", "3").lr == 1
    assert parsed("--task", task, "--preset", "paper", "--adapt", "full").lr is None  # it has none for that
    assert parsed("--task", task) == Knobs(task=task)


@pytest.mark.parametrize("task, told", [("rte", True), ("mrpc", True), ("stsb", True), ("sst2", False)])
def test_the_papers_beginning_from_mnli_is_told(roberta, tmp_path, capsys, task, told):
    with pytest.raises(cli.UserError, match=f"--seq_len 512: the model reads at most {WINDOW} tokens; use that or les"):
        train(task, roberta, tmp_path, preset="paper")
    line = "the paper begins this task with an adapter of mnli; give --init_adapter for that\n"
    assert (line in capsys.readouterr().out) == told


@pytest.mark.parametrize(
    "share, steps, warm_up", [(0.06, 100, 6), (0.06, 50, 3), (0.06, 4, 0), (0.5, 10, 5), (3, 10, 3)]
)
def test_the_warm_up_is_a_share_of_the_steps_or_a_number_of_them(share, steps, warm_up):
    rates = [loop.learning_rate(step, steps, 1.0, share) for step in range(steps)]
    assert rates[:warm_up] == pytest.approx([(step + 1) / warm_up for step in range(warm_up)])
    falling = [(steps - step) / (steps - warm_up) for step in range(warm_up, steps)]
    assert rates[warm_up:] == pytest.approx(falling)


@pytest.mark.parametrize("architecture", ["roberta", "bert", "distilbert", "deberta", "decoder"])
def test_the_window_is_what_the_model_can_read(request, architecture):
    """RoBERTa has two positions more than it can use."""
    model, tokenizer, _, _ = classification.load(request.getfixturevalue(architecture), glue.task_of("sst2"), CPU)
    assert pretrained.context_window(model) == WINDOW
    sample = classification.encode(tokenizer, ("a film " * 300,), WINDOW)
    assert len(sample["input_ids"]) == WINDOW and sample["cut"]
    assert classification.predict(model, [sample], Knobs(), tokenizer).isfinite().all()


def test_a_window_that_a_configuration_does_not_tell_has_no_end():
    model = transformers.XLNetModel(transformers.XLNetConfig(vocab_size=8, d_model=8, n_layer=1, n_head=2, d_inner=8))
    assert model.config.max_position_embeddings == -1 and pretrained.context_window(model) == math.inf


def test_a_tokenizer_in_python_cuts_as_well():
    """Of characters, here: it knows of no overflow."""
    tokenizer = transformers.CanineTokenizer()
    assert not tokenizer.is_fast
    assert [classification.encode(tokenizer, (text,), 8)["cut"] for text in ("abcdef", "abcdefg")] == [False, True]


def test_a_model_in_fewer_files_leaves_none_of_the_earlier(roberta, tmp_path):
    """transformers would read the single file of the two kinds, whichever is newer."""
    model, tokenizer, _, _ = classification.load(roberta, glue.task_of("sst2"), CPU)
    folder = tmp_path / "model"
    pretrained.save(model, tokenizer, folder)
    assert [path.name for path in folder.glob("model*")] == ["model.safetensors"]

    class InShards:
        def save_pretrained(self, path):
            model.save_pretrained(path, max_shard_size="100KB")

    files = pretrained.save(InShards(), tokenizer, folder)
    assert len(files) > 1 and not (folder / "model.safetensors").exists()
    pretrained.save(model, tokenizer, folder)
    assert [path.name for path in folder.glob("model*")] == ["model.safetensors"]


def test_lines_are_drawn_with_the_seed(capsys):
    examples = list(range(100))
    first, again, other = (run_training_nlu.some(examples, 9, "train", Knobs(seed=seed)) for seed in (1, 1, 2))
    assert first == again != other and len(set(first)) == 9
    assert capsys.readouterr().out == "train: 9 of 100 lines\n" * 3
    for most in (None, 100, 500):
        assert run_training_nlu.some(examples, most, "train", Knobs()) == examples


def test_both_dev_sets_of_mnli_are_scored(trained):
    folder, record = trained["mnli"]
    assert list(record["after"]) == ["dev", "dev_mismatched"]
    assert len(predictions(folder)) == len(predictions(folder, "dev_mismatched")) == 300
    assert record["after"]["dev"] != record["after"]["dev_mismatched"]


BAD = {  # of the command line: what, the message
    "unknown task": ({"task": "sst3"}, r"argument --task: invalid choice: 'sst3' \(choose from '?sst2'?, "),
    "missing file": (
        {"data_dir": "{some}"},
        r"SST-2/train\.tsv, .*SST-2/dev\.tsv: no such file; the official files are",
    ),
    "missing folder": ({"data_dir": "nowhere"}, "nowhere: no such folder of GLUE files; check --data_dir"),
    "columns": ({"data_dir": "{bad}"}, r"SST-2/train\.tsv, line 3: 3 columns where the header has 2"),
    "label": (
        {"data_dir": "{bad}", "task": "stsb"},
        r"STS-B/train\.tsv, line 4: score '5\.5': must be a number from 0 to 5",
    ),
    "unknown model": ({"model": "./nowhere"}, r"--model \./nowhere: no such folder, and no hub name"),
    "window": ({"seq_len": 129}, "--seq_len 129: the model reads at most 128 tokens; use that or less"),
    "no room": ({"seq_len": 1}, "--seq_len 1: the marks around the texts alone are 2 tokens; use more"),
    "no room for pairs": (
        {"seq_len": 3, "task": "rte"},
        "--seq_len 3: the marks around the texts alone are 4 tokens; use more",
    ),
    "smoothing": (
        {"task": "stsb", "label_smoothing": 0.1},
        "--label_smoothing 0.1: stsb is a regression, which has none",
    ),
    "no lines": ({"max_train_samples": 0}, "--max_train_samples 0: must be above 0"),
    "no steps": ({"max_steps": 0}, "--max_steps 0: must be above 0"),
    "rate": ({"lr": -1}, "--lr -1.0: must be above 0"),
    "rank": ({"lora_dim": 0}, "--lora_dim 0: must be above 0"),
    "layers": ({"target_modules": "querry"}, "nothing in the model is called 'querry'; did you"),
    "device": ({"device": "gpu"}, "--device gpu: no such device here"),
    "output is a file": ({"output_dir": "{some}/file"}, r"--output_dir .*file: .*\(File exists\)"),
}


@pytest.mark.parametrize("changes, message", BAD.values(), ids=BAD)
def test_user_errors_are_one_message_and_status_2(call, roberta, tmp_path, changes, message):
    bad = tmp_path / "bad"
    (bad / "SST-2").mkdir(parents=True)
    (bad / "STS-B").mkdir()
    for split in ("train", "dev"):
        (bad / "SST-2" / f"{split}.tsv").write_text("sentence\tlabel\nfine\t1\nnot\tfine\t0\n")
        rows = ["sentence1\tsentence2\tscore", "a\tb\t5", "a\tb\t0.0", "a\tb\t5.5"]
        (bad / "STS-B" / f"{split}.tsv").write_text("\n".join(rows))
    (tmp_path / "file").write_text("")
    values = {"model": roberta, "output_dir": tmp_path / "output", **changes}
    places = {"some": tmp_path, "bad": bad}
    arguments = [f"--{name}={str(value).format(**places)}" for name, value in values.items()]
    status, _, stderr = call(run_training_nlu, *arguments)
    assert status == 2
    assert re.search(f"error: .*{message}", stderr), stderr
    assert not any((tmp_path / "output").glob("*"))


def test_from_python_unknown_names_are_told_with_close_ones(tmp_path):
    with pytest.raises(cli.UserError, match="--task SST2: must be one of sst2, mnli, .*, stsb; sst2\\?"):
        train_model("SST2", output_dir=str(tmp_path))
    with pytest.raises(cli.UserError, match=r"lora_rank=4: no such knob; lora"):
        train_model("sst2", lora_rank=4, output_dir=str(tmp_path))


def test_every_knob_is_an_option_with_a_reason(call):
    status, stdout, _ = call(run_training_nlu, "--help")
    assert status == 0
    text = " ".join(stdout.split())
    for field in dataclasses.fields(Knobs):
        assert f"--{field.name}" in text
        assert " ".join(field.metadata["help"].split()) in text
    assert parsed() == Knobs()


def test_the_record_can_be_named(roberta, tmp_path, monkeypatch):
    monkeypatch.setattr("common.records.results.RESULTS", tmp_path)
    train("sst2", roberta, tmp_path / "output", record="named")
    assert (tmp_path / "named.json").read_bytes() == (tmp_path / "output" / "results.json").read_bytes()
