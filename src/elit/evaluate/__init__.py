"""Measuring samples: a detector turns images into features, statistics sum them up, metrics compare the sums."""


class EvaluationWarning(UserWarning):
    """A reason to doubt a score."""
