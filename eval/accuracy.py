"""Accuracy of multiple choice: acc and acc_norm with their standard errors, from the scores of the choices."""

from collections.abc import Sequence

import numpy as np


def choose(scores: Sequence[float], lengths: Sequence[float]) -> tuple[int, int]:
    """The choice with the highest score, and the one with the highest score per length; the first of equals.

    A choice without tokens has the score NaN and is not chosen.
    """
    likely = np.nan_to_num(scores, nan=-np.inf, neginf=-np.inf)
    return int(np.argmax(likely)), int(np.argmax(likely / np.maximum(lengths, 1)))


def accuracy(
    predictions: Sequence[Sequence[float]], references: Sequence[int], lengths: Sequence[Sequence[float]]
) -> dict:
    """acc and acc_norm as fractions, with their standard errors (None for a single item), and n.

    `predictions` are the summed log-probabilities of every item's choices, `references` the right choices, `lengths`
    what acc_norm divides by.
    """
    chosen = [choose(scores, own) for scores, own in zip(predictions, lengths, strict=True)]
    right = np.array(chosen) == np.array(references)[:, None]  # (n, 2)
    return {**_mean("acc", right[:, 0]), **_mean("acc_norm", right[:, 1]), "n": len(right)}


def mean_and_error(right: Sequence[bool] | np.ndarray) -> tuple[float, float | None]:
    """A fraction and its standard error: the sample's standard deviation over sqrt(n); None for a single item."""
    stderr = float(np.std(right, ddof=1) / len(right) ** 0.5) if len(right) > 1 else None
    return float(np.mean(right)), stderr


def _mean(name: str, right: np.ndarray) -> dict[str, float | None]:
    return dict(zip((name, f"{name}_stderr"), mean_and_error(right), strict=True))


def summarise(results: Sequence[dict]) -> dict:
    """The figures of a task from its items' results: `accuracy`, or for last words acc and perplexity; `truncated`."""
    scores = [result["scores"] for result in results]
    labels = [result["label"] for result in results]
    if len(scores[0]) == 1:
        right = np.array([result["prediction"] for result in results]) == np.array(labels)
        figures = {**_mean("acc", right), "perplexity": float(np.exp(-np.mean(scores))), "n": len(results)}
    else:
        figures = accuracy(scores, labels, [result["lengths"] for result in results])
    return {**figures, "truncated": sum(result["truncated"] for result in results)}
