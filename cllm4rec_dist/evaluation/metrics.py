"""Recall@K and NDCG@K of ranked items, as defined in the paper, for the trained model and the baselines.

The definitions are those of Mult-VAE (Liang et al., "Variational Autoencoders for Collaborative Filtering", WWW 2018),
which the CLLM4Rec paper uses: Recall@K divides by min(K, number of held-out items), so that a perfect ranking scores 1
at every K, and NDCG@K has binary gains with a log2 discount and the ideal DCG of min(K, number of held-out items) hits.

Metrics are computed by user, so that blocks of users (or ranks) can be evaluated separately and concatenated, groups of
users have separate means, and two models can be compared over the same users. It takes 8 bytes for each user and
metric. A user without held-out items has no metric and is excluded from the mean, but counted.

`topk.py` and `baselines.py` make the rankings and exclude seen items.

Shapes: U users, K ranked items, I items, M metrics, N held-out interactions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray

from cllm4rec_dist.config import METRIC_NAME
from cllm4rec_dist.errors import ConfigError, DataError

LIST_LENGTH = 20
"""Length of the lists by which coverage of the catalog is counted."""

_ROUNDING = 1e-6
"""Largest difference, relative to the scores, that rounding in float32 may make of equal ones."""

_BLOCK_SCORES = 1 << 20
"""Scores that are compared at a time."""

IntArray = NDArray[np.integer]
FloatArray = NDArray[np.float64]


class RaggedLike(Protocol):
    """Rows of unequal length: row u is `values[offsets[u]:offsets[u + 1]]`."""

    @property
    def offsets(self) -> IntArray: ...

    @property
    def values(self) -> IntArray: ...


HeldOut: TypeAlias = sp.csr_matrix | sp.csr_array | RaggedLike


@dataclass(frozen=True)
class Metric:
    """Parsed metric name: `recall@20` is Metric("recall", 20)."""

    kind: str
    cutoff: int

    @property
    def name(self) -> str:
        return f"{self.kind}@{self.cutoff}"


@dataclass(frozen=True)
class MetricResult:
    """Means over users: `mean[name]` and `stderr[name]` (standard deviation / sqrt(users), as Mult-VAE reports it).

    `num_users` were evaluated; `num_skipped` had no held-out items.
    """

    mean: dict[str, float]
    stderr: dict[str, float]
    num_users: int
    num_skipped: int


def parse_metric(name: str) -> Metric:
    """Parse `recall@K` or `ndcg@K`, any K from 1.

    Raises:
        ConfigError: for any other text.
    """
    match = METRIC_NAME.fullmatch(name)
    if match is None:
        raise ConfigError("metric", name, "must be recall@K or ndcg@K with K >= 1", "Write for example ndcg@100.")
    return Metric(match[1], int(match[2]))


def largest_cutoff(metrics: Sequence[str]) -> int:
    """Return the number of ranked items that `metrics` need.

    Raises:
        ConfigError: for an empty list or a name that is not a metric.
    """
    if not metrics:
        raise ConfigError("metrics", list(metrics), "must name at least one metric", "Write for example recall@20.")
    return max(parse_metric(name).cutoff for name in metrics)


def _offsets_and_items(heldout: HeldOut) -> tuple[IntArray, IntArray]:
    if isinstance(heldout, sp.csr_matrix | sp.csr_array):
        return heldout.indptr, heldout.indices
    return heldout.offsets, heldout.values


def _check(topk: IntArray, num_rows: int, items: IntArray) -> None:
    if topk.ndim != 2 or not np.issubdtype(topk.dtype, np.integer):
        raise DataError(
            "topk", f"{topk.dtype} {topk.shape}", "must be an integer array [users, K]", "Pass item rows, best first."
        )
    if len(topk) != num_rows:
        raise DataError(
            "topk", f"{len(topk)} rows", f"must have one row for each of the {num_rows} users", "Pass the same users."
        )
    for field, values in (("topk", topk), ("held-out items", items)):
        if values.size and values.min() < 0:
            raise DataError(field, int(values.min()), "must be an item row, 0 or more", "Do not pad with negatives.")


def hits(topk: IntArray, heldout: HeldOut) -> tuple[NDArray[np.bool_], IntArray]:
    """Mark the ranked items that are held out.

    Args:
        topk: item rows [U, K], best first, no item twice in a row.
        heldout: CSR [U, I] or ragged rows of item rows; a repeated item counts once.

    Returns:
        hit [U, K] and the number of distinct held-out items [U].

    Raises:
        DataError: if the shapes do not agree or an item row is negative.
    """
    offsets, items = _offsets_and_items(heldout)
    num_rows = len(offsets) - 1
    _check(topk, num_rows, items)
    # With one sorted key for each (user, item), membership is a single binary search for all users.
    stride = 1 + max((int(values.max()) for values in (topk, items) if values.size), default=0)
    item_users = np.repeat(np.arange(num_rows, dtype=np.int64), np.diff(offsets))
    held_keys = np.unique(item_users * stride + items)
    num_heldout = np.bincount(held_keys // stride, minlength=num_rows)
    keys = np.arange(num_rows, dtype=np.int64)[:, None] * stride + topk
    if held_keys.size == 0:
        return np.zeros(topk.shape, dtype=np.bool_), num_heldout
    positions = np.minimum(np.searchsorted(held_keys, keys), held_keys.size - 1)
    return held_keys[positions] == keys, num_heldout


def _recall(hit: NDArray[np.bool_], num_heldout: IntArray, cutoff: int) -> FloatArray:
    return hit[:, :cutoff].sum(axis=1) / np.minimum(cutoff, num_heldout)


def _ndcg(hit: NDArray[np.bool_], num_heldout: IntArray, cutoff: int) -> FloatArray:
    discount = 1.0 / np.log2(np.arange(2, cutoff + 2))
    ideal = np.cumsum(discount)[np.minimum(cutoff, num_heldout) - 1]
    ranked = hit[:, :cutoff]
    return ranked @ discount[: ranked.shape[1]] / ideal


_METRICS: dict[str, Callable[[NDArray[np.bool_], IntArray, int], FloatArray]] = {"recall": _recall, "ndcg": _ndcg}


def top_items(scores: NDArray[np.float32], num_ranked: int) -> NDArray[np.int64]:
    """Return the best columns of each row, best first; equal scores rank the lower column first.

    Args:
        scores: [b, I] without NaN; -inf ranks last.
        num_ranked: K, 1..I.

    Returns:
        columns [b, K].
    """
    num_rows, num_items = scores.shape
    assert 1 <= num_ranked <= num_items
    threshold = np.partition(scores, num_items - num_ranked, axis=1)[:, num_items - num_ranked]
    assert not np.isnan(threshold).any(), "a score is NaN"
    # All scores from the K-th best on, ties included; the sort below keeps the first K of each row.
    rows, columns = np.nonzero(scores >= threshold[:, None])
    order = np.lexsort((columns, -scores[rows, columns], rows))
    starts = np.searchsorted(rows, np.arange(num_rows))
    return columns[order][starts[:, None] + np.arange(num_ranked)]


def are_tied(scores: NDArray[np.float32], scale: NDArray[np.float32] | None = None) -> NDArray[np.bool_]:
    """Return True for each row whose scores are all equal, bool [b]: the order of its items is that of the columns.

    Args:
        scores: [b, I] without NaN; items with -inf are no candidates. A row with a single candidate is not tied.
        scale: [b], absolute score against which a difference may be rounding; by default the row's largest one.
    """
    is_candidate = np.isfinite(scores)
    highest = np.where(is_candidate, scores, -np.inf).max(axis=1)
    lowest = np.where(is_candidate, scores, np.inf).min(axis=1)
    if scale is None:
        scale = np.maximum(np.abs(highest), np.abs(lowest))
    has_choice = is_candidate.sum(axis=1) > 1
    tied: NDArray[np.bool_] = np.zeros(len(scores), bool)
    tied[has_choice] = (highest - lowest)[has_choice] <= _ROUNDING * scale[has_choice]
    return tied


def user_metrics(topk: IntArray, heldout: HeldOut, metrics: Sequence[str], num_items: int | None = None) -> FloatArray:
    """Return the metrics of each user: float64 [U, M], NaN for a user without held-out items.

    Args:
        topk: item rows [U, K], best first, no item twice in a row; K is at least the largest cutoff, or the ranking
            covers the whole catalog (K = I).
        heldout: CSR [U, I] or ragged rows of held-out item rows.
        metrics: names such as `recall@20`, `ndcg@100`.
        num_items: I; needed only for ragged `heldout` when the catalog has fewer items than the largest cutoff.

    Raises:
        ConfigError: for a name that is not a metric.
        DataError: if the shapes do not agree, an item row is negative or K is too small.
    """
    parsed = [parse_metric(name) for name in metrics]
    needed = largest_cutoff(metrics)
    if num_items is None and isinstance(heldout, sp.csr_matrix | sp.csr_array):
        num_items = heldout.shape[1]
    if num_items is not None:
        needed = min(needed, num_items)
    hit, num_heldout = hits(topk, heldout)
    if topk.shape[1] < needed:
        raise DataError(
            "topk",
            f"{topk.shape[1]} columns",
            f"must have at least {needed} for {', '.join(metrics)}",
            "Rank more items.",
        )
    return _metrics_of_hits(hit, num_heldout, parsed)


def metrics_of_scores(scores: NDArray[np.float32], heldout: HeldOut, metrics: Sequence[str]) -> FloatArray:
    """Return `user_metrics` of the ranking by scores; faster than `top_items`, because it ranks held-out items alone.

    Args:
        scores: [U, I] without NaN; equal scores rank the lower column first.
        heldout: as for `user_metrics`, each item once.
        metrics: as for `user_metrics`.
    """
    parsed = [parse_metric(name) for name in metrics]
    num_users, num_items = scores.shape
    offsets, item = _offsets_and_items(heldout)
    user = np.repeat(np.arange(num_users), np.diff(offsets))
    rank = np.empty(len(item), np.int64)
    step = max(1, _BLOCK_SCORES // num_items)
    for first in range(0, len(item), step):
        part = slice(first, first + step)
        others, score = scores[user[part]], scores[user[part], item[part], None]
        precedes = (others > score) | ((others == score) & (np.arange(num_items) < item[part, None]))
        rank[part] = precedes.sum(axis=1)
    hit = np.zeros((num_users, min(largest_cutoff(metrics), num_items)), np.bool_)
    is_listed = rank < hit.shape[1]
    hit[user[is_listed], rank[is_listed]] = True
    return _metrics_of_hits(hit, np.diff(offsets), parsed)


def _metrics_of_hits(hit: NDArray[np.bool_], num_heldout: IntArray, metrics: Sequence[Metric]) -> FloatArray:
    has_heldout = num_heldout > 0
    hit, num_heldout = hit[has_heldout], num_heldout[has_heldout]
    values = np.full((len(has_heldout), len(metrics)), np.nan)
    values[has_heldout] = np.stack(
        [_METRICS[metric.kind](hit, num_heldout, metric.cutoff) for metric in metrics], axis=1
    )
    return values


def mean_metrics(values: FloatArray, metrics: Sequence[str]) -> MetricResult:
    """Return means and standard errors over users.

    Args:
        values: float64 [U, M] of `user_metrics`; users whose values are NaN are skipped and counted.
        metrics: names of the M columns.

    Raises:
        DataError: if no user has a held-out item.
    """
    kept = values[~np.isnan(values).any(axis=1)]
    if not len(kept):
        raise DataError(
            "held-out items",
            f"0 of {len(values)} users",
            "must exist for at least one user",
            "Check the split: keep users with enough interactions, or raise the held-out fraction.",
        )
    names = [parse_metric(name).name for name in metrics]
    stderr = kept.std(axis=0) / np.sqrt(len(kept))
    return MetricResult(
        dict(zip(names, kept.mean(axis=0).tolist(), strict=True)),
        dict(zip(names, stderr.tolist(), strict=True)),
        len(kept),
        len(values) - len(kept),
    )


def count_listed(
    topk: IntArray, scores: NDArray[np.floating], num_items: int, list_length: int = LIST_LENGTH
) -> NDArray[np.int64]:
    """Count the lists that contain each item: int64 [I].

    Args:
        topk: item rows [U, K], best first; a list is the first `list_length` of them.
        scores: [U, K]; an item with score -inf is not recommended.
    """
    shown = np.isfinite(scores[:, :list_length])
    return np.bincount(topk[:, :list_length][shown], minlength=num_items).astype(np.int64)
