"""How sure a mean is, and a difference of two methods on the same samples."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

_Z = 1.959963984540054
"""95 % of a normal distribution lie within as many standard deviations of its mean."""
_RESAMPLES = 4000
_DRAWS = 1 << 22
"""In memory at once."""


class Estimate(NamedTuple):
    """A mean over so many samples, and its 95 % interval."""

    samples: int
    mean: float
    low: float
    high: float


class Difference(NamedTuple):
    """A method minus the baseline, sample by sample.

    Attributes:
        wins, losses: samples with a higher and with a lower value than the baseline's.
        p: how often chance alone would split wins and losses so unevenly (two-sided sign test).
    """

    samples: int
    mean: float
    low: float
    high: float
    wins: int
    losses: int
    p: float


def wilson(scores: Sequence[float]) -> Estimate:
    """The mean of scores from 0 to 1 with its Wilson interval.

    It is made for scores of 0 and 1; for those between it is too wide rather than too narrow, as no
    variable from 0 to 1 varies more than one of the same mean that is only ever 0 or 1.
    """
    count, mean = len(scores), sum(scores) / len(scores)
    centre = (mean + _Z**2 / (2 * count)) / (1 + _Z**2 / count)
    spread = mean * (1 - mean) / count + _Z**2 / (4 * count**2)
    half = _Z * math.sqrt(spread) / (1 + _Z**2 / count)
    low, high = max(0.0, centre - half), min(1.0, centre + half)
    return Estimate(count, mean, min(mean, low), max(mean, high))  # rounding can part them


def bootstrap(values: Sequence[float]) -> Estimate:
    """The mean with a percentile bootstrap interval, which is the same whenever it is computed."""
    array = np.asarray(values, dtype=np.float64)
    source, at_once = np.random.default_rng(0), max(1, _DRAWS // len(array))
    means = [
        array[source.integers(len(array), size=(count, len(array)))].mean(axis=1)
        for first in range(0, _RESAMPLES, at_once)
        if (count := min(at_once, _RESAMPLES - first))
    ]
    low, high = np.percentile(np.concatenate(means), [2.5, 97.5])
    return Estimate(len(array), float(array.mean()), float(low), float(high))


def matched(differences: Sequence[float]) -> Estimate:
    """The mean difference of scores from 0 to 1, with the interval of Agresti and Min (2005).

    Half a pair that differs by 1 is added to either side: where few pairs differ or none, a
    bootstrap would be sure of what so few pairs cannot tell. Scores between 0 and 1 make it wider
    rather than narrower, as in `wilson`.
    """
    count, total = len(differences), sum(differences)
    centre = total / (count + 2)
    spread = (sum(value**2 for value in differences) + 1) / (count + 2) - centre**2
    half = _Z * math.sqrt(spread / (count + 2))
    mean = total / count
    low, high = max(-1.0, centre - half), min(1.0, centre + half)
    return Estimate(count, mean, min(mean, low), max(mean, high))


def paired(
    values: Sequence[float],
    baseline: Sequence[float],
    *,
    interval: Callable[[Sequence[float]], Estimate],
) -> Difference:
    """Two methods on the same samples in the same order, with an interval of their differences."""
    pairs = list(zip(values, baseline, strict=True))
    estimate = interval([value - other for value, other in pairs])
    wins = sum(value > other for value, other in pairs)
    losses = sum(value < other for value, other in pairs)
    return Difference(*estimate, wins=wins, losses=losses, p=sign_test(wins, losses))


def sign_test(wins: int, losses: int) -> float:
    """Of a fair coin thrown so often, the chance of a split at least as uneven."""
    throws = wins + losses
    uneven = 2 * sum(math.comb(throws, k) for k in range(min(wins, losses) + 1))
    return min(1.0, uneven / (1 << throws))
