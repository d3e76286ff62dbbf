"""Scores of predictions on GLUE tasks, their intervals, calibration, confusion matrices and the majority baseline.

Predictions are ids of labels, or numbers for regression. Of two labels the one with id 1 is the positive one of F1,
precision and recall, as GLUE counts; of more labels these three are the mean over all labels of the task. As in
scikit-learn they are 0 where nothing is divided by nothing (the precision of a label that is never predicted), and so
is Matthews' correlation of constant predictions. Pearson's and Spearman's is then undefined: None.
"""

import warnings

import numpy as np
from scipy import stats
from sklearn.metrics import confusion_matrix

from common.data.glue import METRICS
from common.scores.intervals import differences, intervals

CORRELATIONS = ("pearson", "spearman")


def metrics_of(task):
    """The names of all metrics that make sense for a task, its own first."""
    kind = [metric for metric in METRICS if (metric in CORRELATIONS) == (task.labels is None)]
    return tuple(dict.fromkeys([*task.metrics, *kind]))


def score(predictions, labels, task):
    """{metric: its value, None if undefined} of all metrics of `metrics_of`, from 0 or -1 to 1."""
    predictions, labels = _checked(predictions, labels, task)
    if task.labels is None:
        values = _correlations(predictions[None], labels[None])
    else:
        values = _of_counts(confusion_matrix(labels, predictions, labels=_ids(task))[None])
    found = {metric: float(values[metric][0]) for metric in metrics_of(task)}
    return {metric: None if np.isnan(value) else value for metric, value in found.items()}


def bootstrap(systems, labels, task, resamples=1000, seed=110):
    """95% intervals over resamples of the examples: of each system's predictions, and of each later minus each earlier.

    Every resample is drawn once for all systems. Where a score is undefined in some, such as a correlation when all
    drawn predictions are equal, the interval is that of the others, and "undefined" counts them:
    {system or difference: {metric: resamples}}, only where there are any. Without any defined one it is None.
    """
    pairs = {system: _checked(predictions, labels, task) for system, predictions in systems.items()}
    generator = np.random.default_rng(seed)
    drawn = [generator.integers(len(labels), size=len(labels)) for _ in range(resamples)]
    values = {}
    for system, (predictions, truth) in pairs.items():
        if task.labels is None:
            scores = _correlations(predictions[drawn], truth[drawn])
        else:
            size = len(task.labels)
            cells = truth * size + predictions
            counts = [np.bincount(cells[rows], minlength=size * size) for rows in drawn]
            scores = _of_counts(np.reshape(counts, (resamples, size, size)))
        values[system] = {metric: scores[metric] for metric in metrics_of(task)}
    between = differences(values)
    undefined = {
        name: {metric: int(np.isnan(scores).sum()) for metric, scores in found.items() if np.isnan(scores).any()}
        for name, found in {**values, **between}.items()
    }
    return {
        "resamples": resamples,
        "seed": seed,
        "systems": intervals(values),
        "differences": intervals(between),
        "undefined": {name: counts for name, counts in undefined.items() if counts},
    }


def calibration(probabilities, labels, bins=10):
    """How far the probabilities of the labels, a row for each example, are from the shares they promise.

    "expected_calibration_error" is that of Guo et al. 2017: the mean distance between accuracy and confidence, the
    probability of the predicted label, over "bins" of equal width that hold their upper end, weighted by their counts.
    "brier" is Brier's of 1950: the squared distance to the label's own row (1 for it, 0 for others), summed over the
    labels and averaged over the examples; from 0 to 2, for two labels twice the score that counts one of them alone.
    """
    probabilities, labels = np.asarray(probabilities, dtype=float), np.asarray(labels)
    if probabilities.ndim != 2 or len(probabilities) != len(labels) or not len(labels):
        raise ValueError(f"probabilities of shape {probabilities.shape} for {len(labels)} labels")
    if not (probabilities >= 0).all() or not np.allclose(probabilities.sum(axis=1), 1, atol=1e-3):
        raise ValueError("probabilities must be at least 0 and sum to 1 in each row")
    predictions, confidence = probabilities.argmax(axis=1), probabilities.max(axis=1)
    edges = np.linspace(0, 1, bins + 1)
    places = np.digitize(confidence, edges[1:-1], right=True)
    found = []
    for place in range(bins):
        inside = places == place
        found.append(
            {
                "from": float(edges[place]),
                "to": float(edges[place + 1]),
                "count": int(inside.sum()),
                "confidence": float(confidence[inside].mean()) if inside.any() else None,
                "accuracy": float((predictions == labels)[inside].mean()) if inside.any() else None,
            }
        )
    distances = [row["count"] * abs(row["accuracy"] - row["confidence"]) for row in found if row["count"]]
    squares = (probabilities - np.eye(probabilities.shape[1])[labels]) ** 2
    return {
        "expected_calibration_error": sum(distances) / len(labels),
        "brier": float(squares.sum(axis=1).mean()),
        "bins": found,
    }


def confusion(predictions, labels, task):
    """The counts of examples: a row for each true label, in it a column for each predicted one."""
    if task.labels is None:
        raise ValueError(f"{task.name} has no labels to confuse; it is regression")
    predictions, labels = _checked(predictions, labels, task)
    return confusion_matrix(labels, predictions, labels=_ids(task)).tolist()


def majority(train_labels, count, task):
    """The predictions for `count` examples that know no text: the most common label, or the mean for regression."""
    if not len(train_labels):
        raise ValueError("no labels to take the most common of")
    if task.labels is None:
        return [float(np.mean(train_labels))] * count
    return [int(np.bincount(train_labels).argmax())] * count  # of equally common ones the first


def _ids(task):
    return range(len(task.labels))


def _checked(predictions, labels, task):
    """Both as arrays."""
    if not len(predictions) == len(labels) > 0:
        raise ValueError(f"{len(predictions)} predictions for {len(labels)} labels")
    if task.labels is None:
        predictions, labels = np.asarray(predictions, dtype=float), np.asarray(labels, dtype=float)
        if not np.isfinite(predictions).all():
            raise ValueError(f"predictions of {task.name} must be finite numbers")
        return predictions, labels
    for name, ids in (("predictions", predictions), ("labels", labels)):
        if not np.isin(ids, _ids(task)).all():
            raise ValueError(f"{name} of {task.name} must be ids from 0 to {len(task.labels) - 1}")
    return np.asarray(predictions, dtype=int), np.asarray(labels, dtype=int)


def _correlations(predictions, labels):
    """{metric: its value for each row}, NaN where it is undefined."""
    if labels.shape[1] < 2:
        return dict.fromkeys(CORRELATIONS, np.full(len(labels), np.nan))
    with warnings.catch_warnings():
        # What they warn of is NaN then, or (nearly constant) as exact as the predictions are.
        warnings.simplefilter("ignore", stats.ConstantInputWarning)
        warnings.simplefilter("ignore", stats.NearConstantInputWarning)
        pearson = stats.pearsonr(predictions, labels, axis=1).statistic
        ranks = [stats.rankdata(values, axis=1) for values in (predictions, labels)]
        spearman = stats.pearsonr(*ranks, axis=1).statistic
    return {"pearson": pearson, "spearman": spearman}


def _of_counts(counts):
    """{metric: its value for each confusion matrix}, as scikit-learn has it, but for many resamples at once."""
    counts = counts.astype(float)
    total, true, predicted = counts.sum(axis=(1, 2)), counts.sum(axis=2), counts.sum(axis=1)
    hits = np.diagonal(counts, axis1=1, axis2=2)
    covariance = total * hits.sum(axis=1) - (true * predicted).sum(axis=1)
    variances = (total**2 - (true**2).sum(axis=1)) * (total**2 - (predicted**2).sum(axis=1))
    by_label = {
        "f1": _ratio(2 * hits, true + predicted),
        "precision": _ratio(hits, predicted),
        "recall": _ratio(hits, true),
    }
    averaged = {name: rows[:, 1] if counts.shape[1] == 2 else rows.mean(axis=1) for name, rows in by_label.items()}
    return {
        "accuracy": hits.sum(axis=1) / total,
        **averaged,
        "matthews": _ratio(covariance, np.sqrt(variances)),
    }


def _ratio(above, below):
    return np.divide(above, below, out=np.zeros_like(above), where=below > 0)
