"""GLUE files of eight tasks in their official form: UTF-8, a row to a line, columns between tabs, quotes literal.

SST-2:  sentence<TAB>label
        it 's a charming and often affecting journey .<TAB>1

The first line names the columns, which are found by these names wherever they stand among others; CoLA's train.tsv and
dev.tsv alone have no such line but always the same four columns. A mark of UTF-8 at the start (MRPC) and Windows line
ends are no part of the texts, nor are spaces around a text (SST-2). QQP.zip, which went before QQP-clean.zip, has
questions with tabs and line breaks; such rows are refused here.
"""

import difflib
import json
import sys
from pathlib import Path
from typing import NamedTuple

from common.cli import UserError, as_user_error
from common.data.lines import decoded
from common.files import sha256

ARCHIVES = "https://dl.fbaipublicfiles.com/glue/data"
STANDARD_INPUT = "-"
# Pairs on whose label the annotators of MNLI did not agree.
NO_GOLD_LABEL = "-"
# Beside files whose labels have noise: {file name: {"sha256": of that file, "labels": {row: label before the noise}}}.
NOISE = "noise.json"

# The titles of glue_scores' metrics.
METRICS = {
    "accuracy": "Accuracy",
    "f1": "F1",
    "precision": "Precision",
    "recall": "Recall",
    "matthews": "Matthews",
    "pearson": "Pearson",
    "spearman": "Spearman",
}


class GlueTask(NamedTuple):
    name: str
    folder: str
    texts: tuple[str, ...]  # the columns of the one or two texts
    label: str  # the column of the label
    labels: tuple[str, ...] | None  # names in the order of their ids; None for regression
    codes: tuple[str, ...] | None  # what stands for each label in the files
    metrics: tuple[str, ...]  # of glue_scores; the first chooses the best checkpoint
    low: float | None = None  # the range of a label of regression
    high: float | None = None
    columns: tuple[str, ...] | None = None  # of official files that do not name them in their first line


class Example(NamedTuple):
    texts: tuple[str, ...]
    label: int | float
    rule: int | float | None = None  # the label before noise, where that is known


DIGITS = ("0", "1")
PAIR = ("sentence1", "sentence2")
NLI = ("entailment", "neutral", "contradiction")
ENTAILMENT = ("entailment", "not_entailment")
ACCEPTABLE = ("unacceptable", "acceptable")
EQUIVALENT = ("not_equivalent", "equivalent")
DUPLICATE = ("not_duplicate", "duplicate")

TASKS = {
    task.name: task
    for task in (
        GlueTask("sst2", "SST-2", ("sentence",), "label", ("negative", "positive"), DIGITS, ("accuracy",)),
        GlueTask("mnli", "MNLI", PAIR, "gold_label", NLI, NLI, ("accuracy",)),
        GlueTask("qnli", "QNLI", ("question", "sentence"), "label", ENTAILMENT, ENTAILMENT, ("accuracy",)),
        GlueTask("rte", "RTE", PAIR, "label", ENTAILMENT, ENTAILMENT, ("accuracy",)),
        GlueTask("mrpc", "MRPC", ("#1 String", "#2 String"), "Quality", EQUIVALENT, DIGITS, ("accuracy", "f1")),
        GlueTask(
            *("cola", "CoLA", ("sentence",), "label", ACCEPTABLE, DIGITS, ("matthews",)),
            columns=("source", "label", "original notation", "sentence"),
        ),
        GlueTask("qqp", "QQP", ("question1", "question2"), "is_duplicate", DUPLICATE, DIGITS, ("accuracy", "f1")),
        GlueTask("stsb", "STS-B", PAIR, "score", None, None, ("pearson", "spearman"), low=0.0, high=5.0),
    )
}
TEXT_COLUMNS = {column for task in TASKS.values() for column in task.texts}


def task_of(name):
    """The task of a name such as "sst2"."""
    if name not in TASKS:
        close = difflib.get_close_matches(name.lower(), TASKS, n=1)
        hint = f"; {close[0]}?" if close else ""
        raise UserError(f"--task {name}: must be one of {', '.join(TASKS)}{hint}")
    return TASKS[name]


def find_files(data_dir, task):
    """{"train": path, "dev": path} of a task in a folder that has a folder for each, as the official archives unpack.

    MNLI's "dev" is dev_matched.tsv; it has "dev_mismatched" too if that file is there. A tune.tsv, which no official
    archive has, is "tune": what is chosen is then chosen on that, and dev is left to be scored.
    """
    if not Path(data_dir).is_dir():
        raise UserError(f"{data_dir}: no such folder of GLUE files; check --data_dir")
    folder = Path(data_dir) / task.folder
    files = {"train": folder / "train.tsv", "dev": folder / "dev.tsv"}
    if task.name == "mnli":
        files["dev"] = folder / "dev_matched.tsv"
        mismatched = folder / "dev_mismatched.tsv"
        if mismatched.is_file():
            files["dev_mismatched"] = mismatched
    if (folder / "tune.tsv").is_file():
        files["tune"] = folder / "tune.tsv"
    missing = [str(path) for path in files.values() if not path.is_file()]
    if missing:
        raise UserError(f"{', '.join(missing)}: no such file; {_origin(task)}")
    return files


def read_examples(path, task):
    """The labelled examples of a file in its order; pairs of MNLI without a gold label are left out and counted."""
    lines = _lines(path)
    if task.columns is None:
        header, where = next(lines)
        columns, form = header.split("\t"), "the header has"
    else:
        columns, form = task.columns, f"{task.folder} has"
        where = path
    *positions, label_position = _positions(columns, [*task.texts, task.label], where)
    noise, examples, left_out = _noise(Path(path), task), [], 0
    for number, (line, where) in enumerate(lines):
        row = _row(line, where, len(columns), form, task)
        if task.name == "mnli" and row[label_position] == NO_GOLD_LABEL:
            left_out += 1
            continue
        texts, label = _texts(row, positions, where), _label(row[label_position], where, task)
        examples.append(Example(texts, label, None if noise is None else noise.get(number, label)))
    if left_out:
        print(f"{path}: left out {left_out:,} pairs without a gold label ({NO_GOLD_LABEL!r})", file=sys.stderr)
    if not examples:
        raise UserError(f"{path}: no labelled row; {_origin(task)}")
    return examples


def _noise(path, task):
    """{row: its label before noise} of the rows whose label noise changed; None if no file tells them."""
    noise = path.with_name(NOISE)
    try:
        entry = json.loads(noise.read_text(encoding="utf-8"))[path.name]
        of, labels = entry["sha256"], {int(row): label for row, label in entry["labels"].items()}
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{noise}: does not tell the noise of {path.name} ({error!r}); remove or remake it") from error
    if of != sha256(path):
        raise UserError(f"{noise}: tells the noise of another {path.name}; remove or remake it")
    return {row: _label(label, f"{noise}, {path.name}, row {row}", task) for row, label in labels.items()}


def read_texts(path, task):
    """The texts of each row of a file, or of the standard input ("-"), in its order, labels or not.

    The first line tells which of three forms the file has. If a text column of any GLUE task stands in it, it names
    the columns, and those of the task must be there, as in the official test.tsv. Otherwise, if it has as many columns
    as the official files without such a line, which only CoLA has, the file is like them: a text holds no tab, so four
    columns are no text. Otherwise each line is a text, or two separated by a tab.
    """
    lines = list(_lines(path))
    first, where = lines[0]
    columns = first.split("\t")
    if TEXT_COLUMNS.intersection(columns):
        positions, form = _positions(columns, task.texts, where), "the header has"
        lines = lines[1:]
    elif task.columns is not None and len(columns) == len(task.columns):
        positions, form = _positions(task.columns, task.texts, where), "the first line has"
    else:
        columns, positions = task.texts, range(len(task.texts))
        form = f"without a header that names {_listed(task.texts)}, a line must have"
    if not lines:
        raise UserError(f"{path}: no row below the header; expected are texts of {_listed(task.texts)}")
    return [_texts(_row(line, where, len(columns), form, task), positions, where) for line, where in lines]


def _origin(task):
    """Where the official files of a task are."""
    if task.name == "mrpc":
        return (
            "no official archive has it: the rows of https://dl.fbaipublicfiles.com/senteval/senteval_data/"
            f"msr_paraphrase_train.txt whose ids are in {ARCHIVES}/mrpc_dev_ids.tsv make MRPC/dev.tsv, the others "
            "MRPC/train.tsv, each below the header"
        )
    archive = {"qnli": "QNLIv2", "qqp": "QQP-clean"}.get(task.name, task.folder)
    return f"the official files are in {ARCHIVES}/{archive}.zip, to be unpacked in --data_dir"


def _listed(columns):
    return " and ".join(f"`{column}`" for column in columns)


def _positions(columns, wanted, where):
    missing = [column for column in wanted if column not in columns]
    if missing:
        raise UserError(f"{where}: no column {_listed(missing)}; the header has {', '.join(map(repr, columns))}")
    return [columns.index(column) for column in wanted]


def _row(line, where, width, form, task):
    row = line.split("\t")
    if len(row) != width:
        raise UserError(
            f"{where}: {len(row)} {'column' if len(row) == 1 else 'columns'} where {form} {width}; columns are "
            f"separated by one tab, and no text holds a tab or a line break; {_origin(task)}"
        )
    return row


def _texts(row, positions, where):
    texts = tuple(row[position].strip() for position in positions)
    if not all(texts):
        raise UserError(f"{where}: column {positions[texts.index('')] + 1} is empty, expected is a text")
    return texts


def _label(text, where, task):
    if task.labels is not None:
        if text not in task.codes:
            raise UserError(f"{where}: {task.label} {text!r}: must be one of {', '.join(task.codes)}")
        return task.codes.index(text)
    try:
        value = float(text)
    except ValueError:
        value = None
    if value is None or not task.low <= value <= task.high:  # NaN is not
        raise UserError(f"{where}: {task.label} {text!r}: must be a number from {task.low:g} to {task.high:g}")
    return value


def _lines(path):
    """Each line of a file, or of the standard input ("-"), and its place ("file, line 3")."""
    if str(path) == STANDARD_INPUT:
        path, content = "standard input", sys.stdin.buffer.read()
    else:
        if not Path(path).is_file():
            raise UserError(f"{path}: no such file; check --data_dir and the name")
        with as_user_error(OSError):
            content = Path(path).read_bytes()
    return decoded(content, path, "are lines of text, columns separated by tabs")
