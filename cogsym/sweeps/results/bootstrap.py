"""How certain the metric of a set of documents is: the paired bootstrap."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import numpy as np

# Documents below which intervals mean little: of 2, 3, 5 and 10 draws of a normal distribution the 95 % interval holds
# the mean 51, 74, 84 and 89 times of 100.
FEW = 10
_INTERVAL = (2.5, 97.5)  # percentiles
_PIECE = 64  # configurations resampled at a time, so that their totals take little memory


def paired_bootstrap(
    statistics: np.ndarray,
    present: np.ndarray,
    kept: int | None,
    combine: Callable[[np.ndarray], np.ndarray],
    resamples: int,
    seed: int,
) -> dict[str, np.ndarray]:
    """A metric of D documents under C configurations, with 95 % intervals.

    A resample draws D documents with replacement. It is the same one for every configuration, so a difference between
    two of them is far more certain than either's value. Percentile intervals: Efron and Tibshirani, An Introduction
    to the Bootstrap, chapter 13.

    Args:
        statistics: [D, C, S] float64, 0 where there is no result.
        present: [D, C] bool, whether there is one.
        kept: the configuration that the others are compared with; None compares none.
        combine: sums of statistics [..., S] to values [...].
        resamples: how many.
        seed: of the draws; with as many documents it gives the same draws.

    Returns:
        [C] each: "documents", "value", "low", "high", and "difference", "difference_low", "difference_high" from the
        configuration `kept`, on the documents that both have; NaN where there is nothing to tell.
    """
    number = len(statistics)
    drawn = np.random.default_rng(seed).multinomial(number, np.full(number, 1 / number), size=resamples)
    weights = np.concatenate([np.ones((1, number)), drawn])  # the first row: the documents as they are
    values = _weighted(weights, statistics, combine)
    differences = np.full_like(values, np.nan)
    if kept is not None:
        whole = slice(kept, kept + 1)
        differences = values - values[:, whole]
        for c in np.flatnonzero((present != present[:, whole]).any(axis=0)):
            both = present[:, c] & present[:, kept]
            pair = np.stack([statistics[:, c], statistics[:, kept]], axis=1) * both[:, None, None]
            differences[:, c] = np.subtract(*_weighted(weights, pair, combine).T)
    with warnings.catch_warnings(action="ignore", category=RuntimeWarning):  # a column of NaN stays one
        low, high = np.nanpercentile(values[1:], _INTERVAL, axis=0)
        difference_low, difference_high = np.nanpercentile(differences[1:], _INTERVAL, axis=0)
    return {
        "documents": present.sum(axis=0),
        "value": values[0],
        "low": low,
        "high": high,
        "difference": differences[0],
        "difference_low": difference_low,
        "difference_high": difference_high,
    }


def _weighted(weights: np.ndarray, statistics: np.ndarray, combine: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """[R, D] weights of documents and [D, C, S] statistics to the metric, [R, C]."""
    number, configurations, size = statistics.shape
    pieces = [statistics[:, c : c + _PIECE] for c in range(0, configurations, _PIECE)]
    return np.concatenate(
        [combine((weights @ piece.reshape(number, -1)).reshape(len(weights), -1, size)) for piece in pieces], axis=1
    )
