"""Scores of predictions on GLUE tasks, their intervals, calibration, confusion matrices, the majority baseline.

Oracles: scikit-learn and scipy, also on each resample drawn anew in a plain loop, and small tables by hand.
Alone: `pytest tests/test_glue_scores.py` (about ten seconds, most of it scikit-learn in the loop).
"""

import json
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
from scipy import stats
from sklearn import metrics

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "examples"))

from common.data import glue  # noqa: E402
from common.scores import glue_scores, intervals  # noqa: E402

SST2, MNLI, COLA, MRPC, STSB = (glue.TASKS[name] for name in ("sst2", "mnli", "cola", "mrpc", "stsb"))
CLASSIFICATION = ["accuracy", "f1", "precision", "recall", "matthews"]


def oracle(predictions, labels, task):
    """What scikit-learn and scipy say, None where that is NaN; their warnings of undefined values are no matter."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if task.labels is None:
            values = {
                "pearson": stats.pearsonr(predictions, labels).statistic,
                "spearman": stats.spearmanr(predictions, labels).statistic,
            }
        else:
            average = {"labels": [0, 1, 2], "average": "macro"} if len(task.labels) == 3 else {"average": "binary"}
            values = {
                "accuracy": metrics.accuracy_score(labels, predictions),
                "f1": metrics.f1_score(labels, predictions, **average),
                "precision": metrics.precision_score(labels, predictions, **average),
                "recall": metrics.recall_score(labels, predictions, **average),
                "matthews": metrics.matthews_corrcoef(labels, predictions),
            }
    return {name: None if np.isnan(value) else value for name, value in values.items()}


def drawn_example(task, count, seed=0):
    """(two systems' predictions, the second better; labels), with ties where they are numbers."""
    generator = np.random.default_rng(seed)
    if task.labels is None:
        labels = generator.integers(0, 11, size=count) / 2
        return {spread: np.round(labels + generator.normal(0, spread, count), 1) for spread in (2, 1)}, labels
    ids = len(task.labels)
    labels = generator.integers(ids, size=count)
    wrong = generator.integers(ids, size=count)
    return {share: np.where(generator.random(count) < share, wrong, labels) for share in (0.7, 0.3)}, labels


# Scores


def test_every_task_has_its_own_metrics_first():
    assert [glue_scores.metrics_of(task)[0] for task in glue.TASKS.values()] == [
        *("accuracy", "accuracy", "accuracy", "accuracy", "accuracy", "matthews", "accuracy", "pearson")
    ]
    assert glue_scores.metrics_of(MRPC) == ("accuracy", "f1", "precision", "recall", "matthews")
    assert glue_scores.metrics_of(COLA) == ("matthews", "accuracy", "f1", "precision", "recall")
    assert glue_scores.metrics_of(STSB) == ("pearson", "spearman")
    assert list(glue_scores.METRICS) == [*CLASSIFICATION, "pearson", "spearman"]


def test_two_labels_by_hand():
    # true 1: 3 of 4 found, one 0 taken for 1 besides: precision 3/4, recall 3/4; 2 of 3 zeros
    labels, predictions = [1, 1, 1, 1, 0, 0, 0], [1, 1, 1, 0, 1, 0, 0]
    assert glue_scores.score(predictions, labels, SST2) == pytest.approx(
        {"accuracy": 5 / 7, "f1": 3 / 4, "precision": 3 / 4, "recall": 3 / 4, "matthews": (3 * 2 - 1) / 12}
    )
    assert glue_scores.confusion(predictions, labels, SST2) == [[2, 1], [1, 3]]


def test_label_1_is_the_positive_one():
    # One of two ones found, nothing else taken for one; by the zeros it would be precision 3/4, recall 1
    found = glue_scores.score([1, 0, 0, 0, 0], [1, 1, 0, 0, 0], MRPC)
    assert (found["precision"], found["recall"], found["f1"]) == (1.0, 0.5, pytest.approx(2 / 3))


def test_three_labels_by_hand():
    labels, predictions = [0, 0, 1, 1, 2, 2], [0, 1, 1, 1, 2, 0]
    found = glue_scores.score(predictions, labels, MNLI)
    assert glue_scores.confusion(predictions, labels, MNLI) == [[1, 1, 0], [0, 2, 0], [1, 0, 1]]
    assert found == pytest.approx(
        {
            "accuracy": 4 / 6,
            "precision": (1 / 2 + 2 / 3 + 1) / 3,
            "recall": (1 / 2 + 1 + 1 / 2) / 3,
            "f1": (1 / 2 + 4 / 5 + 2 / 3) / 3,
            # Gorodkin 2004: each label is there twice, predicted they are twice, three times and once
            "matthews": (6 * 4 - 12) / np.sqrt((36 - 12) * (36 - 14)),
        }
    )


CASES = {
    "all right": ([0, 1, 1], [0, 1, 1], SST2),
    "all wrong": ([1, 0, 0], [0, 1, 1], SST2),
    "constant predictions": ([0, 0, 0, 0], [0, 1, 1, 0], COLA),
    "all predicted positive": ([1, 1, 1], [0, 1, 1], MRPC),
    "a single label": ([0, 0], [0, 0], SST2),
    "a single positive": ([1], [1], SST2),
    "three, one never predicted": ([0, 0, 1, 1], [0, 1, 2, 1], MNLI),
    "three, one nowhere": ([0, 1, 1, 1], [0, 0, 1, 1], MNLI),
    "ties": ([1.0, 1.0, 2.5, 3.0, 0.0], [0.0, 1.0, 1.0, 5.0, 0.0], STSB),
    "opposite": ([3.0, 2.0, 1.0], [0.0, 1.0, 5.0], STSB),
    "constant numbers": ([2.5, 2.5, 2.5], [0.0, 1.0, 5.0], STSB),
    "constant labels": ([1.0, 2.0, 3.0], [5.0, 5.0, 5.0], STSB),
    "nearly constant": ([1e8, 1e8 + 1e-7, 1e8], [0.0, 1.0, 5.0], STSB),
}


@pytest.mark.parametrize("predictions, labels, task", CASES.values(), ids=CASES)
def test_scores_are_those_of_scikit_learn_and_scipy(predictions, labels, task):
    found = glue_scores.score(predictions, labels, task)
    assert found == pytest.approx(oracle(predictions, labels, task), abs=1e-12)
    assert tuple(found) == glue_scores.metrics_of(task)
    json.dumps(found, allow_nan=False)


def test_what_is_undefined_and_what_is_zero():
    assert glue_scores.score([2.5] * 3, [0.0, 1.0, 5.0], STSB) == {"pearson": None, "spearman": None}
    assert glue_scores.score([2.5], [1.0], STSB) == {"pearson": None, "spearman": None}
    assert glue_scores.score([0, 0], [0, 1], COLA)["matthews"] == 0
    assert glue_scores.score([0, 0], [0, 0], COLA) == dict.fromkeys(CLASSIFICATION, 0.0) | {"accuracy": 1.0}


@pytest.mark.parametrize("task", [SST2, MNLI, STSB], ids=lambda task: task.name)
def test_scores_of_many_examples(task):
    systems, labels = drawn_example(task, 500)
    for predictions in systems.values():
        expected = pytest.approx(oracle(predictions, labels, task), abs=1e-12)
        assert glue_scores.score(predictions, labels, task) == expected
        assert glue_scores.score(predictions.tolist(), labels.tolist(), task) == expected


@pytest.mark.parametrize(
    "predictions, labels, task, message",
    [
        ([], [], SST2, "0 predictions for 0 labels"),
        ([0, 1], [0], SST2, "2 predictions for 1 labels"),
        ([0, 2], [0, 1], SST2, "predictions of sst2 must be ids from 0 to 1"),
        ([0.4, 0.6], [0, 1], SST2, "predictions of sst2 must be ids from 0 to 1"),
        ([0, 1], [0, -1], MNLI, "labels of mnli must be ids from 0 to 2"),
        ([float("nan"), 1.0], [1.0, 2.0], STSB, "predictions of stsb must be finite numbers"),
        ([float("inf"), 1.0], [1.0, 2.0], STSB, "predictions of stsb must be finite numbers"),
    ],
)
def test_what_cannot_be_scored(predictions, labels, task, message):
    with pytest.raises(ValueError, match=message):
        glue_scores.score(predictions, labels, task)
    with pytest.raises(ValueError, match=message):
        glue_scores.bootstrap({"a": predictions}, labels, task)
    if task.labels is not None:
        with pytest.raises(ValueError, match=message):
            glue_scores.confusion(predictions, labels, task)


# Intervals


@pytest.mark.parametrize("task, count", [(SST2, 40), (MNLI, 30), (COLA, 4), (STSB, 25), (STSB, 3)])
def test_intervals_are_those_of_resamples_drawn_in_a_loop(task, count):
    """Few examples too, so that resamples of one label alone, or of one number, are among them."""
    resamples, seed = 100, 7
    systems, labels = drawn_example(task, count)
    systems = {f"spread {key}": predictions for key, predictions in systems.items()}
    first, second = systems
    generator = np.random.default_rng(seed)
    scores = []
    for _ in range(resamples):
        rows = generator.integers(count, size=count)
        scores.append({name: oracle(values[rows], labels[rows], task) for name, values in systems.items()})

    def expected(values):
        defined = [value for value in values if value is not None]
        return pytest.approx([np.quantile(defined, 0.025), np.quantile(defined, 0.975)], abs=1e-9)

    found = glue_scores.bootstrap(systems, labels, task, resamples=resamples, seed=seed)
    assert (found["resamples"], found["seed"]) == (resamples, seed)
    assert list(found["systems"]) == [first, second] and list(found["differences"]) == [f"{second} - {first}"]
    undefined = {name: {} for name in (first, second, f"{second} - {first}")}
    for metric in glue_scores.metrics_of(task):
        of = {name: [score[name][metric] for score in scores] for name in systems}
        pairs = zip(of[first], of[second], strict=True)
        of[f"{second} - {first}"] = [None if None in pair else pair[1] - pair[0] for pair in pairs]
        for name, values in of.items():
            part = found["systems"].get(name) or found["differences"][name]
            assert part[metric] == expected(values), (name, metric)
            if None in values:
                undefined[name][metric] = values.count(None)
    assert found["undefined"] == {name: counts for name, counts in undefined.items() if counts}
    assert bool(found["undefined"]) == (task is STSB and count == 3)


def test_intervals_are_paired_fixed_by_the_seed_and_hold_the_score():
    systems, labels = drawn_example(MNLI, 300)
    systems = {"first": systems[0.7], "second": systems[0.3], "third": systems[0.7]}
    found = glue_scores.bootstrap(systems, labels, MNLI, seed=3)
    assert found == glue_scores.bootstrap(systems, labels, MNLI, seed=3)
    assert found["systems"] != glue_scores.bootstrap(systems, labels, MNLI, seed=4)["systems"]
    assert list(found["differences"]) == ["second - first", "third - first", "third - second"]
    for name, predictions in systems.items():
        for metric, value in glue_scores.score(predictions, labels, MNLI).items():
            low, high = found["systems"][name][metric]
            assert low < value < high
            assert found["differences"]["third - first"][metric] == [0, 0]
            assert found["differences"]["second - first"][metric][0] > 0
    json.dumps(found, allow_nan=False)


def test_nothing_defined_is_none_and_counted():
    systems = {"mean": [2.5] * 5, "model": [1.0, 2.0, 3.0, 4.0, 5.0]}
    found = glue_scores.bootstrap(systems, [1.0, 2.0, 2.0, 4.0, 5.0], STSB, resamples=50)
    nothing = {"pearson": None, "spearman": None}
    assert found["systems"]["mean"] == found["differences"]["model - mean"] == nothing
    assert found["undefined"]["mean"] == found["undefined"]["model - mean"] == {"pearson": 50, "spearman": 50}
    assert found["systems"]["model"]["pearson"] is not None


def test_intervals_of_what_is_not_measured_or_not_always_defined():
    values = {"a": {"x": np.array([1.0, np.nan, 3.0]), "y": None}, "b": {"x": np.array([2.0, 2.0, np.nan]), "y": None}}
    between = intervals.differences(values)
    assert list(between) == ["b - a"]
    np.testing.assert_equal(between["b - a"], {"x": np.array([1.0, np.nan, np.nan]), "y": None})
    assert intervals.intervals(values)["a"] == {"x": pytest.approx([1.05, 2.95]), "y": None}
    assert intervals.intervals(between) == {"b - a": {"x": [1.0, 1.0], "y": None}}


# Calibration


def test_calibration_by_hand():
    # Confidences 0.9 (right), 0.85 (wrong), 0.6 (right): the first two share a bin, whose upper end is 0.9
    found = glue_scores.calibration([[0.1, 0.9], [0.85, 0.15], [0.6, 0.4]], [1, 1, 0])
    assert [row["count"] for row in found["bins"]] == [0, 0, 0, 0, 0, 1, 0, 0, 2, 0]
    edges = np.arange(11) / 10
    assert [row["from"] for row in found["bins"]] == pytest.approx(edges[:-1])
    assert [row["to"] for row in found["bins"]] == pytest.approx(edges[1:])
    full = {key: found["bins"][8][key] for key in ("count", "confidence", "accuracy")}
    assert full == {"count": 2, "confidence": pytest.approx(0.875), "accuracy": 0.5}
    assert (found["bins"][0]["confidence"], found["bins"][0]["accuracy"]) == (None, None)
    assert found["expected_calibration_error"] == pytest.approx((2 * 0.375 + 0.4) / 3)
    assert found["brier"] == pytest.approx(2 * (0.1**2 + 0.85**2 + 0.4**2) / 3)
    json.dumps(found, allow_nan=False)


def test_calibration_of_many():
    generator = np.random.default_rng(0)
    probabilities = generator.dirichlet([1, 1, 1], size=400)
    labels = np.array([generator.choice(3, p=row) for row in probabilities])
    found = glue_scores.calibration(probabilities, labels, bins=7)
    assert sum(row["count"] for row in found["bins"]) == 400 and len(found["bins"]) == 7
    error = 0.0
    for low in range(7):
        inside = [
            (row.max(), row.argmax() == label)
            for row, label in zip(probabilities, labels, strict=True)
            if low / 7 < row.max() <= (low + 1) / 7
        ]
        error += abs(sum(right for _, right in inside) - sum(confidence for confidence, _ in inside)) / 400
    assert found["expected_calibration_error"] == pytest.approx(error)
    assert found["brier"] == pytest.approx(
        sum(metrics.brier_score_loss(labels == label, probabilities[:, label]) for label in range(3))
    )


def test_sure_and_right_is_calibrated_and_sure_and_wrong_is_not():
    certain = [[1.0, 0.0], [0.0, 1.0]]
    right, wrong = glue_scores.calibration(certain, [0, 1]), glue_scores.calibration(certain, [1, 0])
    assert (right["expected_calibration_error"], right["brier"]) == (0, 0)
    assert (wrong["expected_calibration_error"], wrong["brier"]) == (1, 2)
    assert right["bins"][-1]["count"] == 2


@pytest.mark.parametrize(
    "probabilities, labels, message",
    [
        ([[0.5, 0.5]], [0, 1], r"probabilities of shape \(1, 2\) for 2 labels"),
        ([0.5, 0.5], [0, 1], r"probabilities of shape \(2,\) for 2 labels"),
        ([], [], r"probabilities of shape \(0,\) for 0 labels"),
        ([[2.0, -1.0]], [0], "at least 0 and sum to 1"),
        ([[1.3, 0.2]], [0], "at least 0 and sum to 1"),
        ([[float("nan"), 0.2]], [0], "at least 0 and sum to 1"),
    ],
)
def test_what_are_no_probabilities(probabilities, labels, message):
    with pytest.raises(ValueError, match=message):
        glue_scores.calibration(probabilities, labels)


# Confusion and majority


def test_rows_of_a_confusion_matrix_are_true_labels_even_of_those_that_do_not_occur():
    assert glue_scores.confusion([2, 2, 0], [0, 2, 0], MNLI) == [[1, 0, 1], [0, 0, 0], [0, 0, 1]]
    with pytest.raises(ValueError, match="stsb has no labels to confuse; it is regression"):
        glue_scores.confusion([1.0], [1.0], STSB)


def test_majority():
    assert glue_scores.majority([0, 1, 1, 0, 1], 3, SST2) == [1, 1, 1]
    assert glue_scores.majority([2, 1, 1, 2], 2, MNLI) == [1, 1]
    assert glue_scores.majority([1.0, 2.0, 4.5], 2, STSB) == [2.5, 2.5]
    assert glue_scores.score(glue_scores.majority([1.0, 2.0], 3, STSB), [1.0, 2.0, 3.0], STSB)["pearson"] is None
    with pytest.raises(ValueError, match="no labels to take the most common of"):
        glue_scores.majority([], 2, SST2)
