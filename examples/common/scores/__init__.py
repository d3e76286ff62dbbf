"""Scores of generated texts and of predicted labels, with intervals over resamples."""
