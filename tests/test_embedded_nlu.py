"""The encoder and the data that ship with the NLU example, and the scripts that made them.

The scripts are called as functions on a temporary folder and compared with what is shipped; the shipped encoder
is loaded as any Hugging Face folder. Alone: `pytest tests/test_embedded_nlu.py` (about 15 seconds on 2 cores).
"""

import collections
import csv
import hashlib
import io
import json
import random
import re
import statistics
import sys
from pathlib import Path

import pytest
import torch
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression
from transformers import AutoModel, AutoModelForMaskedLM, AutoModelForSequenceClassification, AutoTokenizer

EXAMPLES = Path(__file__).parents[1] / "examples"
MODEL, DATA = EXAMPLES / "NLU" / "model", EXAMPLES / "NLU" / "data"
sys.path.insert(0, str(EXAMPLES / "embedded"))

import glue_grammar  # noqa: E402
import make_encoder  # noqa: E402
import make_glue_data  # noqa: E402

MNLI = "index promptID pairID genre sentence1_binary_parse sentence2_binary_parse sentence1_parse sentence2_parse"
MNLI += " sentence1 sentence2 label1"
STSB = "index genre filename year old_index source1 source2"
# Folder, header as in the official file, columns of the texts, column of the label, share of the commonest label.
FORMATS = {
    "sst2": ("SST-2", "sentence label", [0], -1, (0.5, 0.6)),
    "mnli": ("MNLI", f"{MNLI} gold_label", [8, 9], -1, (0.34, 0.45)),
    "qnli": ("QNLI", "index question sentence label", [1, 2], -1, (0.5, 0.6)),
    "rte": ("RTE", "index sentence1 sentence2 label", [1, 2], -1, (0.5, 0.6)),
    "mrpc": ("MRPC", "\ufeffQuality|#1 ID|#2 ID|#1 String|#2 String", [3, 4], 0, (0.55, 0.65)),
    "cola": ("CoLA", None, [3], 1, (0.58, 0.72)),
    "qqp": ("QQP", "id qid1 qid2 question1 question2 is_duplicate", [3, 4], -1, (0.5, 0.65)),
    "stsb": ("STS-B", f"{STSB} sentence1 sentence2 score", [7, 8], -1, None),
}
LABELS = {
    **dict.fromkeys(["sst2", "mrpc", "cola", "qqp"], {"0", "1"}),
    **dict.fromkeys(["qnli", "rte"], {"entailment", "not_entailment"}),
    "mnli": {"entailment", "neutral", "contradiction"},
}
DEV = {task: ["dev"] if task != "mnli" else ["dev_matched", "dev_mismatched"] for task in FORMATS}
HELD_OUT = {task: [*DEV[task], "tune"] for task in FORMATS}
FILES = [(task, file) for task in FORMATS for file in ["train", *HELD_OUT[task]]]


@pytest.fixture(autouse=True)
def torch_settings():
    """make_encoder fixes the threads and the determinism of the whole process; other tests get theirs back."""
    threads, deterministic = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    yield
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(deterministic)


@pytest.fixture(scope="module")
def report():
    return json.loads((MODEL / "pretraining.json").read_text())


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(MODEL)


def path_of(task, file, folder=DATA):
    return folder / FORMATS[task][0] / f"{file}.tsv"


def rows_of(task, file):
    """The fields of every row of a shipped file, behind its header."""
    rows = [line.split("\t") for line in path_of(task, file).read_bytes().decode().split("\n")]
    assert rows.pop() == [""]  # the file ends with a line's end
    return rows if FORMATS[task][1] is None else rows[1:]


def texts_of(task, file):
    return [tuple(row[column] for column in FORMATS[task][2]) for row in rows_of(task, file)]


def labels_of(task, file):
    return [row[FORMATS[task][3]] for row in rows_of(task, file)]


def noise_of(task, file):
    """{row: its label before the noise} of the rows whose label the noise changed."""
    entry = json.loads(path_of(task, "noise").with_suffix(".json").read_text())[f"{file}.tsv"]
    assert entry["sha256"] == sha256(path_of(task, file))
    return {int(row): label for row, label in entry["labels"].items()}


def rule_of(task, file):
    """The labels of a file before the noise."""
    before = noise_of(task, file)
    return [before.get(row, label) for row, label in enumerate(labels_of(task, file))]


def sha256(path):
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def test_remaking_the_data_gives_the_shipped_bytes(tmp_path):
    make_glue_data.make_data(tmp_path)
    made = {file.relative_to(tmp_path): file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    assert made == {file.relative_to(DATA): file.read_bytes() for file in DATA.rglob("*") if file.is_file()}
    assert len(made) == len(FILES) + len(FORMATS)  # of every task a file tells the noise


def test_another_seed_gives_other_data(tmp_path):
    make_glue_data.make_data(tmp_path, seed=make_glue_data.SEED + 1)
    for task, file in FILES:
        assert path_of(task, file, tmp_path).read_bytes() != path_of(task, file).read_bytes(), (task, file)


@pytest.mark.parametrize("task", FORMATS)
def test_no_text_of_a_file_is_in_another(task):
    known = set()
    for file in ["train", *HELD_OUT[task]]:
        rows = texts_of(task, file)
        assert len(set(rows)) == len(rows)
        texts = {text for row in rows for text in row}
        assert known.isdisjoint(texts), file
        known |= texts


@pytest.mark.parametrize(("task", "file"), FILES)
def test_the_noise_is_as_large_as_it_is_said_to_be(task, file):
    before, labels = noise_of(task, file), labels_of(task, file)
    assert all(label != labels[row] for row, label in before.items())
    if task in LABELS:
        assert len(before) == round(glue_grammar.FLIPPED * len(labels))
    else:
        errors = [float(label) - float(rule) for label, rule in zip(labels, rule_of(task, file), strict=True)]
        assert statistics.fmean(errors) == pytest.approx(0, abs=0.06)
        assert statistics.stdev(errors) == pytest.approx(glue_grammar.DEVIATION, rel=0.1)


def test_no_text_of_dev_or_tune_is_in_the_pretraining():
    held_out = make_encoder.dev_texts()
    shipped = {text for task in FORMATS for file in HELD_OUT[task] for texts in texts_of(task, file) for text in texts}
    assert held_out == {text.removesuffix(" ") for text in shipped}
    rng = random.Random(make_encoder.SEED)
    met = {text for _ in range(20_000) for text in glue_grammar.page(rng, held_out)[0]}
    assert held_out.isdisjoint(met)


def test_a_page_that_is_held_out_is_drawn_again():
    texts, _ = glue_grammar.page(random.Random(1))
    assert glue_grammar.page(random.Random(1), frozenset(texts[:1]))[0] != texts


@pytest.mark.parametrize(("task", "file"), FILES)
def test_the_files_have_the_official_format(task, file):
    _, header, texts, label, _ = FORMATS[task]
    columns = 4  # of CoLA
    if header is not None:
        header = header.replace("label1", "label1 label2 label3 label4 label5") if file.startswith("dev_") else header
        names = header.split("|" if "|" in header else " ")
        assert path_of(task, file).read_bytes().decode().split("\n")[0].split("\t") == names
        columns = len(names)
    for row in rows_of(task, file):
        assert len(row) == columns
        assert all(row[column].strip() for column in texts)
        assert "\ufeff" not in "".join(row)
        if task in LABELS:
            assert row[label] in LABELS[task]
        else:
            assert 0 <= float(row[label]) <= 5
        if task == "cola":
            assert row[2] == ("*" if row[label] == "0" else "")
        if task == "sst2":
            assert row[0] == row[0].lower()
            assert row[0].endswith(" . ")
        if task == "mnli":
            assert set(row[10:]) == {row[label]}


def test_a_reader_that_takes_quotes_for_quoting_loses_rows():
    for task in ("mnli", "qnli", "rte", "mrpc", "stsb"):
        text = path_of(task, "train").read_bytes().decode()
        assert len(list(csv.reader(io.StringIO(text), delimiter="\t"))) < 1400, task
        assert len(list(csv.reader(io.StringIO(text), delimiter="\t", quoting=csv.QUOTE_NONE))) == 1501, task


@pytest.mark.parametrize("task", FORMATS)
def test_the_classes_are_roughly_balanced(task):
    share = FORMATS[task][4]
    for file in ["train", *HELD_OUT[task]]:
        counts = collections.Counter(labels_of(task, file))
        if share is None:
            assert len(counts) > 20
            assert max(counts.values()) < 0.2 * sum(counts.values())
        else:
            assert share[0] <= max(counts.values()) / sum(counts.values()) <= share[1], (file, counts)


def test_sizes():
    assert sum(file.stat().st_size for file in MODEL.iterdir()) <= 5_000_000
    assert sum(path_of(task, file).stat().st_size for task, file in FILES) <= 2_200_000
    for task, file in FILES:
        assert len(rows_of(task, file)) == (1500 if file == "train" else 300)


# The labels are checked against the texts, which a second reading of the grammar's table takes apart.

NAME = r"[A-Z]\w+(?: \w+)*"


def patterns(sentences, value):
    """[(regular expression, relation)] of the ways to say or ask a fact."""
    return [
        (
            re.compile(sentence.replace("{x}", NAME).replace("a {v}", "an? {v}").replace("{v}", value(relation)), re.I),
            relation,
        )
        for relation, ways in sentences.items()
        for sentence in ways
    ]


WHOLE = {key: [w for w in ways if "{x}" in w] for key, (_, ways, _) in glue_grammar.RELATIONS.items()}
BEHIND = {key: [w for w in ways if "{x}" not in w] for key, (_, ways, _) in glue_grammar.RELATIONS.items()}
ASKED = {key: asks for key, (_, _, asks) in glue_grammar.RELATIONS.items()}


def one_of(relation):
    return "(" + "|".join(map(re.escape, glue_grammar.RELATIONS[relation][0])) + ")"


WHOLE, BEHIND, ASKED = patterns(WHOLE, one_of), patterns(BEHIND, one_of), patterns(ASKED, one_of)


CLAIMS = {
    **dict.fromkeys(["it is true", "everybody believes", "nobody doubts", "nobody denies"], True),
    **dict.fromkeys(["it is false", "nobody believes", "everybody doubts", "everybody denies"], False),
}


def claim_in(text):
    """(Whether a text says that it is so, what is said to be so)."""
    before, _, rest = text.removeprefix('"').partition(" that ")
    so = CLAIMS.get(before.lower())
    return (True, text) if so is None else (so, rest)


def facts_in(text):
    """The (relation, value) pairs that a text tells."""
    told = set()
    for sentence in text.removeprefix('"').removesuffix(".").split(". "):
        found = [(relation, match[1].lower()) for way, relation in WHOLE if (match := way.fullmatch(sentence))]
        if not found:
            for clause in re.split(" and ", sentence):
                behind = [
                    (match, relation) for way, relation in BEHIND if (match := re.search(f"{way.pattern}$", clause))
                ]
                assert len(behind) == 1, (clause, behind)
                found.append((behind[0][1], behind[0][0][1].lower()))
        told.update(found)
    return told


def asked_in(question):
    (relation,) = [relation for way, relation in ASKED if way.fullmatch(question.removesuffix("?"))]
    return relation


def follows(first, second):
    """What the facts of the first text say of the claim that the second is."""
    so, said = claim_in(second)
    if not facts_in(said) <= facts_in(first):
        return "neutral"
    return "entailment" if so else "contradiction"


@pytest.mark.parametrize(("task", "file"), [(t, f) for t, f in FILES if t in ("mnli", "rte", "mrpc", "stsb")])
def test_the_labels_of_pairs_are_those_of_their_facts(task, file):
    for (first, second), label in zip(texts_of(task, file), rule_of(task, file), strict=True):
        if task == "mnli":
            assert label == follows(first, second)
            continue
        first, second = facts_in(first), facts_in(second)
        if task == "rte":
            assert label == ("entailment" if second <= first else "not_entailment")
        elif task == "mrpc":
            assert label == str(int(first == second))
        else:
            assert float(label) == 1 + 1.5 * len(first & second)


@pytest.mark.parametrize(("task", "file"), [(t, f) for t, f in FILES if t in ("qnli", "qqp")])
def test_the_labels_of_questions_are_those_of_what_they_ask(task, file):
    for (first, second), label in zip(texts_of(task, file), rule_of(task, file), strict=True):
        if task == "qnli":
            assert (label == "entailment") == (asked_in(first) in dict(facts_in(second)))
        else:
            assert (label == "1") == (asked_in(first) == asked_in(second))


def test_the_folder_is_ordinary_hugging_face(tokenizer, report):
    model = AutoModelForMaskedLM.from_pretrained(MODEL, dtype=torch.float32)
    assert (type(model).__name__, model.config.model_type) == ("RobertaForMaskedLM", "roberta")
    assert type(tokenizer).__name__.startswith("RobertaTokenizer")
    assert model.num_parameters() == report["parameters"]
    assert len(tokenizer) == model.config.vocab_size
    assert tokenizer.convert_ids_to_tokens(tokenizer("A pub", "an inn")["input_ids"])[0] == "<s>"
    assert tokenizer.decode(tokenizer("A pub", "an inn")["input_ids"]).replace(" ", "") == "<s>Apub</s></s>aninn</s>"
    assert (tokenizer.pad_token, tokenizer.mask_token) == ("<pad>", "<mask>")
    assert model.config.pad_token_id == tokenizer.pad_token_id
    longest = tokenizer(" ".join(["word"] * 500), truncation=True)["input_ids"]
    assert len(longest) == tokenizer.model_max_length == model.config.max_position_embeddings - 2
    assert torch.isfinite(model(input_ids=torch.tensor([longest])).logits).all()


def test_a_classifier_has_no_random_weights_but_its_head():
    model, loading = AutoModelForSequenceClassification.from_pretrained(MODEL, output_loading_info=True)
    assert type(model).__name__ == "RobertaForSequenceClassification"
    assert {name.split(".")[0] for name in loading["missing_keys"]} == {"classifier"}
    assert all(name.startswith("lm_head.") for name in loading["unexpected_keys"])


@pytest.mark.parametrize("task", sorted(LABELS))
def test_counts_of_words_do_not_tell_the_label(task):
    counts = CountVectorizer(token_pattern=r"\S+")
    train = counts.fit_transform(map(" ".join, texts_of(task, "train")))
    classifier = LogisticRegression(max_iter=500).fit(train, rule_of(task, "train"))
    score = classifier.score(counts.transform(map(" ".join, texts_of(task, "tune"))), rule_of(task, "tune"))
    assert score < (0.55 if task == "mnli" else 0.65), score


@pytest.mark.parametrize("task", sorted(LABELS))
def test_the_tasks_are_known_at_the_last_token_and_not_at_the_first(tokenizer, task):
    """Linear classifiers of either state, from 600 lines without noise: an adapter can bring it to the first token."""
    model = AutoModel.from_pretrained(MODEL, dtype=torch.float32, add_pooling_layer=False).eval()
    states = {}
    for file in ("train", "tune"):
        inputs = tokenizer(*map(list, zip(*texts_of(task, file)[:600], strict=True)), padding=True, return_tensors="pt")
        with torch.no_grad():
            found = model(**inputs).last_hidden_state
        last = inputs["attention_mask"].sum(1) - 1
        states[file] = found[:, 0].numpy(), found[range(len(found)), last].numpy()
    scores = []
    for train, tune in zip(*states.values(), strict=True):
        classifier = LogisticRegression(max_iter=2000).fit(train, rule_of(task, "train")[:600])
        scores.append(classifier.score(tune, rule_of(task, "tune")))
    assert scores[1] > 0.97 and scores[0] < (0.92 if task == "sst2" else 0.75), scores


@pytest.mark.parametrize("text", ['"The Kite" is pure comedy.', "naïve Ωmega 日本 \U0001f600", "the plot is dull . "])
def test_the_tokenizer_keeps_every_character(tokenizer, text):
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids, clean_up_tokenization_spaces=False).removeprefix(" ") == text
    assert tokenizer.unk_token_id not in ids


@pytest.mark.slow
def test_pretraining_repeats_to_the_bit_and_depends_on_the_seed(tmp_path):
    for folder, seed in (("a", 3), ("b", 3), ("c", 4)):
        made = make_encoder.make_encoder(tmp_path / folder, steps=2, seed=seed)
        assert made["weights_sha256"] == sha256(tmp_path / folder / "model.safetensors")
        assert (made["seed"], made["steps"]) == (seed, 2)
    names = sorted(file.name for file in MODEL.iterdir())
    assert sorted(file.name for file in (tmp_path / "a").iterdir()) == names
    assert not list(tmp_path.glob("*.partial"))
    for name in set(names) - {"pretraining.json"}:
        assert sha256(tmp_path / "a" / name) == sha256(tmp_path / "b" / name), name
    assert sha256(tmp_path / "a" / "model.safetensors") != sha256(tmp_path / "c" / "model.safetensors")


def test_the_shipped_tokenizer_is_the_one_the_script_makes(tokenizer):
    assert make_encoder.train_tokenizer(random.Random(make_encoder.SEED)).get_vocab() == tokenizer.get_vocab()


def test_the_shipped_weights_are_those_of_the_report(report):
    assert sha256(MODEL / "model.safetensors") == report["weights_sha256"]
    assert (report["seed"], report["steps"]) == (make_encoder.SEED, make_encoder.STEPS)


def test_the_heldout_perplexity_is_that_of_the_report(tokenizer, report):
    model = AutoModelForMaskedLM.from_pretrained(MODEL, dtype=torch.float32)
    perplexity = make_encoder.heldout_perplexity(model, tokenizer, report["seed"])
    assert perplexity == pytest.approx(report["heldout_perplexity"], rel=1e-3)
