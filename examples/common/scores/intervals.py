"""95% intervals of scores over resamples, for each system and for each later system minus each earlier one.

`values` are {system: {metric: the score of every resample, or None where it is not measured}}. The systems are scored
on the same resamples (Koehn 2004), so differences are taken resample by resample.
"""

import itertools

import numpy as np


def differences(values):
    """{"second - first": {metric: the difference in every resample}} of all pairs in their order."""
    return {
        f"{second} - {first}": {
            metric: None if values[first][metric] is None else values[second][metric] - values[first][metric]
            for metric in values[first]
        }
        for first, second in itertools.combinations(values, 2)
    }


def intervals(values):
    """{system: {metric: [low, high]}}; None where nothing is measured. NaN, an undefined score, is left out."""
    return {
        system: {metric: _interval(scores) for metric, scores in metrics.items()} for system, metrics in values.items()
    }


def _interval(scores):
    if scores is None or np.isnan(scores).all():
        return None
    return np.nanquantile(scores, [0.025, 0.975]).tolist()
