"""Paired tests over users, and means by groups of users."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy import stats

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.integer]
Verdict = Literal["ahead", "level", "behind", "too few users"]

CONFIDENCE = 0.95
MIN_USERS = 20
"""Fewer users give no verdict, because a t interval of a few skewed differences is unreliable."""


@dataclass(frozen=True)
class PairedTest:
    """Paired t-test of two models over the same users.

    Attributes:
        num_users: n pairs.
        difference: mean of the differences, first model minus second; None for n = 0.
        low, high: confidence interval of the mean difference at `CONFIDENCE`; None for n < 2.
        p_value: two-sided; None for n < 2.
        verdict: ahead or behind if the interval excludes zero, level if it does not.
    """

    num_users: int
    difference: float | None
    low: float | None
    high: float | None
    p_value: float | None
    verdict: Verdict


def paired_test(first: FloatArray, second: FloatArray) -> PairedTest:
    """Test two models by their values [n] for the same users, in the same order.

    A pair with a value that is not finite is excluded.
    """
    assert first.shape == second.shape, "both models need one value for each user"
    both = np.isfinite(first) & np.isfinite(second)
    first, second = first[both], second[both]
    num_users = len(first)
    if num_users == 0:
        return PairedTest(0, None, None, None, None, "too few users")
    difference = float(np.mean(first - second))
    if num_users == 1:
        return PairedTest(1, difference, None, None, None, "too few users")
    if np.ptp(first - second) == 0:  # no spread: scipy would divide by zero
        low = high = difference
        p_value = 1.0 if difference == 0 else 0.0
    else:
        result = stats.ttest_rel(first, second)
        low, high = map(float, result.confidence_interval(CONFIDENCE))
        p_value = float(result.pvalue)
    return PairedTest(num_users, difference, low, high, p_value, _verdict(num_users, low, high))


def _verdict(num_users: int, low: float, high: float) -> Verdict:
    if num_users < MIN_USERS:
        return "too few users"
    if low > 0:
        return "ahead"
    return "behind" if high < 0 else "level"


@dataclass(frozen=True)
class Mean:
    """Mean of `num_users` values and its standard error (standard deviation / sqrt(n), as in `metrics.py`)."""

    num_users: int
    value: float
    stderr: float


def mean_of(values: FloatArray) -> Mean | None:
    """Return the mean of the finite values of `values` [n]; None if there are none."""
    values = values[np.isfinite(values)]
    if len(values) == 0:
        return None
    return Mean(len(values), float(values.mean()), float(values.std() / np.sqrt(len(values))))


def length_bins(lengths: IntArray, num_bins: int = 5) -> list[tuple[int, int]]:
    """Split history lengths into ranges (first, last), both inclusive, with about the same number of users.

    Args:
        lengths: [n] history lengths.
        num_bins: maximum number of ranges; there are fewer if many users have the same length.

    Returns:
        ascending ranges that cover every length once; empty for n = 0.
    """
    if len(lengths) == 0:
        return []
    ends = -(-np.arange(1, num_bins + 1) * len(lengths) // num_bins) - 1  # the last user of each bin, by length
    bins: list[tuple[int, int]] = []
    first = int(lengths.min())
    for last in np.unique(np.sort(lengths)[ends]).tolist():
        bins.append((first, last))
        first = int(lengths[lengths > last].min(initial=np.iinfo(np.int64).max))
    return bins
