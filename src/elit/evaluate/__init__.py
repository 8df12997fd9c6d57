"""Measuring samples: a detector turns images into features, statistics sum them up, metrics compare the sums."""


class EvaluationWarning(UserWarning):
    """What to know before believing a score."""
