"""GLUE files: the official forms of eight tasks, texts for inference, and what is refused with which message.

The rows of the official files, where they are there, are counted and read by csv.reader for comparison.
Alone: `pytest tests/test_glue_data.py` (about five seconds, most of it the fuzz and the official files).
"""

import csv
import hashlib
import os
import re
import sys
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

ROOT = Path(__file__).resolve().parents[1]
REAL_DATA = ROOT.parent / "shared" / "data" / "glue"
sys.path.insert(0, str(ROOT / "examples"))

from common import cli  # noqa: E402
from common.data import glue  # noqa: E402

needs_real_data = pytest.mark.skipif(not REAL_DATA.is_dir(), reason=f"the official GLUE files are not in {REAL_DATA}")


def write(folder, content):
    path = folder / "data.tsv"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def table(*rows):
    return "".join("\t".join(row) + "\n" for row in rows)


# A file of each task in the official columns, and what they say.
FILES = {
    "sst2": (
        table(("sentence", "label"), ("a dull film . ", "0"), ('" wow " ', "1")),
        [(("a dull film .",), 0), (('" wow "',), 1)],
    ),
    "mnli": (
        table(
            ("index", "promptID", "genre", "sentence1", "sentence2", "label1", "gold_label"),
            ("0", "7", "fiction", "A dog runs.", "An animal moves.", "neutral", "entailment"),
            ("1", "8", "fiction", "A dog runs.", "It is brown.", "contradiction", "neutral"),
            ("2", "9", "fiction", "A dog runs.", "All sleep.", "neutral", "contradiction"),
        ),
        [
            (("A dog runs.", "An animal moves."), 0),
            (("A dog runs.", "It is brown."), 1),
            (("A dog runs.", "All sleep."), 2),
        ],
    ),
    "qnli": (
        table(
            ("index", "question", "sentence", "label"),
            ("0", "Who?", "Ann did.", "entailment"),
            ("1", "When?", "Ann did.", "not_entailment"),
        ),
        [(("Who?", "Ann did."), 0), (("When?", "Ann did."), 1)],
    ),
    "rte": (
        table(
            ("index", "sentence1", "sentence2", "label"),
            ("0", "Ann ran.", "Ann moved.", "entailment"),
            ("1", "Ann ran.", "Ann slept.", "not_entailment"),
        ),
        [(("Ann ran.", "Ann moved."), 0), (("Ann ran.", "Ann slept."), 1)],
    ),
    "mrpc": (
        "\ufeff"
        + table(
            ("Quality", "#1 ID", "#2 ID", "#1 String", "#2 String"),
            ("1", "12", "13", '"No, he said.', 'He said "no".'),
            ("0", "14", "15", "Shares fell.", "Shares rose."),
        ),
        [(('"No, he said.', 'He said "no".'), 1), (("Shares fell.", "Shares rose."), 0)],
    ),
    "cola": (
        table(("gj04", "1", "", "They drank the pub dry."), ("gj04", "0", "*", "They drank the pub.")),
        [(("They drank the pub dry.",), 1), (("They drank the pub.",), 0)],
    ),
    "qqp": (
        table(
            ("id", "qid1", "qid2", "question1", "question2", "is_duplicate"),
            ("5", "1", "2", "What is LoRA?", "What does LoRA mean?", "1"),
            ("6", "3", "4", "What is LoRA?", "Who is Laura?", "0"),
        ),
        [(("What is LoRA?", "What does LoRA mean?"), 1), (("What is LoRA?", "Who is Laura?"), 0)],
    ),
    "stsb": (
        table(
            ("index", "genre", "sentence1", "sentence2", "score"),
            ("0", "news", "A plane lands.", "A plane is landing.", "5.000"),
            ("1", "news", "A plane lands.", "A man sings.", "0.25"),
        ),
        [(("A plane lands.", "A plane is landing."), 5.0), (("A plane lands.", "A man sings."), 0.25)],
    ),
}


def test_tasks_and_their_labels():
    assert (
        list(glue.TASKS)
        == ["sst2", "mnli", "qnli", "rte", "mrpc", "cola", "qqp", "stsb"]
        == sorted(FILES, key=list(glue.TASKS).index)
    )
    for name, task in glue.TASKS.items():
        assert glue.task_of(name) is task and task.name == name
        assert (task.labels is None) == (task.codes is None) == (name == "stsb")
        assert task.labels is None or len(task.labels) == len(task.codes) == (3 if name == "mnli" else 2)
    assert glue.TASKS["mnli"].labels == ("entailment", "neutral", "contradiction")
    assert glue.TASKS["cola"].labels == ("unacceptable", "acceptable")
    assert glue.TASKS["mrpc"].metrics == ("accuracy", "f1") and glue.TASKS["cola"].metrics == ("matthews",)


@pytest.mark.parametrize("name, hint", [("sts-b", "; stsb?"), ("SST-2", "; sst2?"), ("squad-v2.0", "")])
def test_unknown_tasks(name, hint):
    with pytest.raises(cli.UserError) as error:
        glue.task_of(name)
    expected = f"--task {name}: must be one of sst2, mnli, qnli, rte, mrpc, cola, qqp, stsb{hint}"
    assert str(error.value) == expected


@pytest.mark.parametrize("name", FILES)
def test_official_forms(tmp_path, name):
    content, expected = FILES[name]
    task = glue.TASKS[name]
    for form in (
        content,
        content.removesuffix("\n"),
        content.replace("\n", "\r\n"),
        "\ufeff" + content.removeprefix("\ufeff"),
    ):
        path = write(tmp_path, form)
        examples = glue.read_examples(path, task)
        assert [example[:2] for example in examples] == expected
        assert all(type(example.label) is (float if name == "stsb" else int) for example in examples)
        assert glue.read_texts(path, task) == [texts for texts, _ in expected]


def test_columns_are_found_by_their_names(tmp_path):
    path = write(tmp_path, table(("score", "sentence2", "note", "sentence1"), ("4", "B.", "x", "A.")))
    assert glue.read_examples(path, glue.TASKS["stsb"]) == [(("A.", "B."), 4.0, None)]


def test_characters_inside_a_text_do_not_end_it(tmp_path):
    odd = "\ufeffa\u2028b\x85c\x0b d\x1c 'e\" \\t ,"
    path = write(tmp_path, table(("sentence", "label"), ("x", "0"), (odd, "1")))
    assert glue.read_examples(path, glue.TASKS["sst2"])[1] == ((odd,), 1, None)


def test_pairs_without_a_gold_label_are_left_out_and_counted(tmp_path, capsys):
    task = glue.TASKS["mnli"]
    rows = [("gold_label", "sentence1", "sentence2"), ("-", "a", "b"), ("neutral", "c", "d"), ("-", "e", "f")]
    path = write(tmp_path, table(*rows))
    assert glue.read_examples(path, task) == [(("c", "d"), 1, None)]
    assert capsys.readouterr().err == f"{path}: left out 2 pairs without a gold label ('-')\n"
    assert len(glue.read_texts(path, task)) == 3
    with pytest.raises(cli.UserError, match=r"data\.tsv: no labelled row; the official files are in .*/MNLI\.zip"):
        glue.read_examples(write(tmp_path, table(*rows[:2])), task)
    rte = table(("label", "sentence1", "sentence2"), ("-", "a", "b"))
    with pytest.raises(cli.UserError, match="line 2: label '-': must be one of entailment, not_entailment"):
        glue.read_examples(write(tmp_path, rte), glue.TASKS["rte"])


# FILES[task] stands above each of these, and its second line below.
BAD_ROWS = {
    "too few columns": (
        "rte",
        "1\tA.\tentailment",
        "3 columns where the header has 4; columns are separated by one tab",
    ),
    "one column": ("sst2", "a film", "1 column where the header has 2"),
    "too many columns": (
        "sst2",
        "a\tfilm\t1",
        "3 columns where the header has 2; .*no text holds a tab or a line break",
    ),
    "cut by a line break": ("qqp", '"\tWho?\t0', r"3 columns where the header has 6; .*/QQP-clean\.zip"),
    "blank line": ("stsb", "", "1 column where the header has 5"),
    "without a header": ("cola", "gj04\t1\tA text.", "3 columns where CoLA has 4"),
    "label of another task": (
        "mnli",
        "0\t1\t2\tA.\tB.\tx\tnot_entailment",
        "gold_label 'not_entailment': must be one of",
    ),
    "unknown label": ("sst2", "film\t2", "label '2': must be one of 0, 1"),
    "no label": ("cola", "gj04\t\t*\tA text.", "label '': must be one of 0, 1"),
    "name for a digit": ("mrpc", "equivalent\t1\t2\tA.\tB.", "Quality 'equivalent': must be one of 0, 1"),
    "too high": ("stsb", "0\tn\tA.\tB.\t5.01", r"score '5\.01': must be a number from 0 to 5"),
    "below zero": ("stsb", "0\tn\tA.\tB.\t-0.1", r"score '-0\.1': must be a number from 0 to 5"),
    "no number": ("stsb", "0\tn\tA.\tB.\tfive", "score 'five': must be a number from 0 to 5"),
    "not a number": ("stsb", "0\tn\tA.\tB.\tnan", "score 'nan': must be a number from 0 to 5"),
    "empty text": ("sst2", " \t1", "column 1 is empty, expected is a text"),
    "empty second text": ("qqp", "6\t3\t4\tWhat?\t\t0", "column 5 is empty, expected is a text"),
    "not UTF-8": ("sst2", b"caf\xe9\t1", "not UTF-8 .*; save the file as UTF-8"),
    "NUL": ("sst2", b"f\0ilm\t1", "a NUL byte, so this is not UTF-8 text"),
}


@pytest.mark.parametrize("name, row, message", BAD_ROWS.values(), ids=BAD_ROWS)
def test_malformed_rows_are_named_with_file_and_line(tmp_path, name, row, message):
    good = FILES[name][0].encode()
    row = row if isinstance(row, bytes) else row.encode()
    lines = good.splitlines(keepends=True)
    path = write(tmp_path, good + row + b"\n" + lines[1])
    with pytest.raises(cli.UserError, match=message) as error:
        glue.read_examples(path, glue.TASKS[name])
    assert str(error.value).startswith(f"{path}, line {len(lines) + 1}: ")


@pytest.mark.parametrize(
    "name, header, message",
    [
        ("rte", "index\tsentence1\tlabel", "no column `sentence2`; the header has 'index', 'sentence1', 'label'"),
        ("qqp", "id\tsentence1\tsentence2\tlabel", "no column `question1` and `question2` and `is_duplicate`; "),
        ("mnli", "sentence1\tsentence2\tlabel1", "no column `gold_label`; the header has 'sentence1', "),
        ("sst2", "a film without a header\t1", "no column `sentence` and `label`; the header has 'a film without"),
    ],
)
def test_missing_columns_are_named_with_those_there_are(tmp_path, name, header, message):
    path = write(tmp_path, f"{header}\nx\n")
    with pytest.raises(cli.UserError) as error:
        glue.read_examples(path, glue.TASKS[name])
    assert str(error.value).startswith(f"{path}, line 1: {message}")


@pytest.mark.parametrize("read", [glue.read_examples, glue.read_texts])
def test_files_without_rows(tmp_path, read):
    task = glue.TASKS["rte"]
    for content in ("", "\n", "\ufeff"):
        with pytest.raises(cli.UserError, match=r"data\.tsv: the file is empty; expected are lines of text"):
            read(write(tmp_path, content), task)
    with pytest.raises(cli.UserError, match=r"data\.tsv: no (labelled row|row below the header); "):
        read(write(tmp_path, "index\tsentence1\tsentence2\tlabel\n"), task)
    for path in (tmp_path / "nowhere.tsv", tmp_path):
        with pytest.raises(cli.UserError, match="no such file; check --data_dir and the name"):
            read(path, task)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read every file")
def test_a_file_that_may_not_be_read(tmp_path):
    path = write(tmp_path, FILES["sst2"][0])
    path.chmod(0)
    with pytest.raises(cli.UserError, match="Permission denied"):
        glue.read_examples(path, glue.TASKS["sst2"])


# Texts for inference

TEXT_FILES = {
    "test.tsv without labels": ("sst2", "index\tsentence\n0\tone . \n1\ttwo\n", [("one .",), ("two",)]),
    "pairs of test.tsv": ("qqp", "id\tquestion1\tquestion2\n0\tA?\tB?\n", [("A?", "B?")]),
    "labels are not looked at": ("rte", "sentence2\tsentence1\tlabel\nB.\tA.\tmaybe\n", [("A.", "B.")]),
    "lines": ("sst2", "one\n two \n", [("one",), ("two",)]),
    "pairs": ("stsb", "A.\tB.\r\nC.\tD.", [("A.", "B."), ("C.", "D.")]),
    "lines of CoLA": ("cola", "gj04 1 They ran.\n0\n", [("gj04 1 They ran.",), ("0",)]),
    "CoLA's own form": ("cola", "gj04\t1\t\tThey ran.\nx\t?\t*\tRan they.\n", [("They ran.",), ("Ran they.",)]),
    "CoLA's test.tsv": ("cola", "index\tsentence\n0\tThey ran.\n", [("They ran.",)]),
}


@pytest.mark.parametrize("name, content, texts", TEXT_FILES.values(), ids=TEXT_FILES)
def test_texts_for_inference(tmp_path, name, content, texts):
    assert glue.read_texts(write(tmp_path, content), glue.TASKS[name]) == texts


BAD_TEXT_FILES = {
    "one text of two": (
        "rte",
        "A.\tB.\nA.\n",
        "line 2: 1 column where .* names `sentence1` and `sentence2`, .* have 2",
    ),
    "two texts for one": (
        "sst2",
        "A.\tB.\n",
        "line 1: 2 columns where without a header that names `sentence`, .* have 1",
    ),
    "empty line": ("sst2", "A.\n\nB.\n", "line 2: column 1 is empty"),
    "empty text": ("rte", "A.\t \n", "line 1: column 2 is empty"),
    "header of another task": ("qqp", "sentence1\tsentence2\nA\tB\n", "line 1: no column `question1` and `question2`"),
    "half a header": ("rte", "index\tsentence1\n0\tA\n", "line 1: no column `sentence2`; the header has 'index', "),
    "row and header": ("rte", "index\tsentence1\tsentence2\n0\tA.\n", "line 2: 2 columns where the header has 3"),
    "lines after CoLA's own form": ("cola", "gj04\t1\t\tA.\nB.\n", "line 2: 1 column where the first line has 4"),
    "not UTF-8": ("sst2", b"A.\ncaf\xe9\n", "line 2: not UTF-8"),
}


@pytest.mark.parametrize("name, content, message", BAD_TEXT_FILES.values(), ids=BAD_TEXT_FILES)
def test_texts_that_cannot_be_read(tmp_path, name, content, message):
    path = write(tmp_path, content)
    with pytest.raises(cli.UserError, match=message) as error:
        glue.read_texts(path, glue.TASKS[name])
    assert str(error.value).startswith(f"{path}, line ")


# Random bytes, and rows of pieces that may look like a file

PIECES = st.sampled_from(
    [b"sentence1", b"sentence2", b"sentence", b"label", b"score", b"entailment", b"0", b"1", b"nan", b"1e999", b"-"]
    + [b"\t", b"\t", b"\t", b"\n", b"\n", b"\r\n", b" ", b"\xef\xbb\xbf", b"\xff", b"\0", "\u2028é".encode(), b'"']
)


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    content=st.one_of(st.binary(max_size=60), st.lists(PIECES, max_size=30).map(b"".join)),
    under_header=st.booleans(),
    name=st.sampled_from(list(FILES)),
)
def test_any_bytes_are_read_or_a_user_error(tmp_path, content, under_header, name):
    task = glue.TASKS[name]
    header = FILES[name][0].split("\n")[0].encode() + b"\n" if under_header else b""
    path = write(tmp_path, header + content)
    try:
        for example in glue.read_examples(path, task):
            assert len(example.texts) == len(task.texts) and all(text == text.strip() != "" for text in example.texts)
            assert 0 <= example.label <= 5 if task.labels is None else example.label in range(len(task.labels))
    except cli.UserError as error:
        assert str(error).startswith(str(path))
    try:
        assert all(len(texts) == len(task.texts) and all(texts) for texts in glue.read_texts(path, task))
    except cli.UserError as error:
        assert str(error).startswith(str(path))


# Finding the files


def make_files(folder, *names):
    folder.mkdir(exist_ok=True)
    for name in names:
        (folder / name).touch()


@pytest.mark.parametrize("task", glue.TASKS.values(), ids=glue.TASKS)
def test_files_are_found_in_the_official_layout(tmp_path, task):
    dev = "dev_matched.tsv" if task.name == "mnli" else "dev.tsv"
    folder = tmp_path / task.folder
    make_files(folder, "train.tsv", dev)
    assert glue.find_files(str(tmp_path), task) == {"train": folder / "train.tsv", "dev": folder / dev}
    make_files(folder, "dev_mismatched.tsv")
    found = glue.find_files(tmp_path, task)
    assert found.get("dev_mismatched") == (folder / "dev_mismatched.tsv" if task.name == "mnli" else None)
    make_files(folder, "tune.tsv")
    assert glue.find_files(tmp_path, task) == {**found, "tune": folder / "tune.tsv"}


NOISE = {  # what noise.json holds ({sha} is that of the file), the labels before noise or the message
    "none": (None, [None, None]),
    "a label": ('{"dev.tsv": {"sha256": "{sha}", "labels": {"1": "1"}}}', [1, 1]),
    "nothing": ('{"dev.tsv": {"sha256": "{sha}", "labels": {}}}', [1, 0]),
    "another file": ('{"dev.tsv": {"sha256": "0f", "labels": {}}}', "tells the noise of another dev.tsv; remove or"),
    "no such file": ('{"train.tsv": {}}', r"does not tell the noise of dev.tsv \(KeyError\('dev.tsv'\)\); remove or"),
    "no JSON": ("{", "does not tell the noise of dev.tsv .*; remove or remake it"),
    "no label": (
        '{"dev.tsv": {"sha256": "{sha}", "labels": {"1": "2"}}}',
        "noise.json, dev.tsv, row 1: label '2': must be one of 0, 1",
    ),
}


@pytest.mark.parametrize("content, expected", NOISE.values(), ids=NOISE)
def test_a_file_beside_the_data_tells_the_labels_before_noise(tmp_path, content, expected):
    path = tmp_path / "dev.tsv"
    path.write_text("sentence\tlabel\nfine\t1\nwell\t0\n")
    if content is not None:
        sha = hashlib.sha256(path.read_bytes()).hexdigest()
        (tmp_path / "noise.json").write_text(content.replace("{sha}", sha))
    if isinstance(expected, str):
        with pytest.raises(cli.UserError, match=expected):
            glue.read_examples(path, glue.TASKS["sst2"])
    else:
        examples = glue.read_examples(path, glue.TASKS["sst2"])
        assert [(example.label, example.rule) for example in examples] == list(zip([1, 0], expected, strict=True))


@pytest.mark.parametrize(
    "name, origin",
    [
        (
            "sst2",
            "the official files are in https://dl.fbaipublicfiles.com/glue/data/SST-2.zip, to be unpacked in --data",
        ),
        ("qnli", "the official files are in https://dl.fbaipublicfiles.com/glue/data/QNLIv2.zip, "),
        ("qqp", "the official files are in https://dl.fbaipublicfiles.com/glue/data/QQP-clean.zip, "),
        (
            "mrpc",
            "no official archive has it: the rows of https://dl.fbaipublicfiles.com/senteval/senteval_data/"
            "msr_paraphrase_train.txt whose ids are in https://dl.fbaipublicfiles.com/glue/data/mrpc_dev_ids.tsv make",
        ),
    ],
)
def test_missing_files_are_named_with_where_they_are(tmp_path, name, origin):
    task = glue.TASKS[name]
    folder = tmp_path / task.folder
    with pytest.raises(cli.UserError) as error:
        glue.find_files(tmp_path, task)
    assert str(error.value).startswith(f"{folder / 'train.tsv'}, {folder / 'dev.tsv'}: no such file; {origin}")
    make_files(folder, "train.tsv")
    with pytest.raises(cli.UserError, match=f"^{re.escape(str(folder / 'dev.tsv'))}: no such file; "):
        glue.find_files(tmp_path, task)


def test_a_missing_folder_of_all_files(tmp_path):
    with pytest.raises(cli.UserError, match="nowhere: no such folder of GLUE files; check --data_dir"):
        glue.find_files(tmp_path / "nowhere", glue.TASKS["sst2"])


# The official files


REAL_ROWS = {
    "SST-2/train.tsv": (29780, 37569),
    "SST-2/dev.tsv": (428, 444),
    "CoLA/train.tsv": (2528, 6023),
    "CoLA/dev.tsv": (322, 721),
    "MRPC/train.tsv": (1194, 2474),
    "MRPC/dev.tsv": (129, 279),
    "STS-B/train.tsv": 5749,
    "STS-B/dev.tsv": 1500,
    "RTE/train.tsv": (1249, 1241),
    "RTE/dev.tsv": (146, 131),
    "QNLI/dev.tsv": (2702, 2761),
    "QQP/train.tsv": 20000,
    "QQP/dev.tsv": 3497,
    "MNLI/train.tsv": 5870,
    "MNLI/dev_matched.tsv": 1000,
}
# Columns of texts and label, counted by hand from the first lines of the official files.
REAL_POSITIONS = {
    "SST-2": [0, 1],
    "CoLA": [3, 1],
    "MRPC": [3, 4, 0],
    "STS-B": [7, 8, 9],
    "RTE": [1, 2, 3],
    "QNLI": [1, 2, 3],
    "QQP": [3, 4, 5],
    "MNLI": [2, 3, 4],
}


@needs_real_data
@pytest.mark.parametrize("name", REAL_ROWS)
def test_official_files_read_whole(name, capsys):
    folder = name.split("/")[0]
    task = next(task for task in glue.TASKS.values() if task.folder == folder)
    examples = glue.read_examples(REAL_DATA / name, task)
    counts = Counter(example.label for example in examples)
    expected = REAL_ROWS[name]
    assert (len(examples) if isinstance(expected, int) else (counts[0], counts[1])) == expected
    assert len(examples) == (expected if isinstance(expected, int) else sum(expected))
    assert capsys.readouterr().err == ""

    with open(REAL_DATA / name, encoding="utf-8-sig", newline="") as file:
        rows = list(csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE))[folder != "CoLA" :]
    *texts, label = REAL_POSITIONS[folder]
    assert [example.texts for example in examples] == [tuple(row[i].strip() for i in texts) for row in rows]
    in_file = {float(row[label]) if task.labels is None else row[label] for row in rows}
    assert len(in_file) == len(counts)
    if task.labels is not None:
        assert [task.codes[example.label] for example in examples] == [row[label] for row in rows]
    assert glue.read_texts(REAL_DATA / name, task) == [example.texts for example in examples]


@needs_real_data
def test_official_files_are_found():
    for name, task in glue.TASKS.items():
        if name == "qnli":  # its training file is not there
            with pytest.raises(cli.UserError, match=r"train\.tsv: no such file; .*QNLIv2\.zip"):
                glue.find_files(REAL_DATA, task)
        else:
            assert set(glue.find_files(REAL_DATA, task)) == {"train", "dev"}
