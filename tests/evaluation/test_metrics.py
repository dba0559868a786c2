"""Metrics compared with plain loops over users."""

import math
from dataclasses import dataclass

import numpy as np
import pytest
import scipy.sparse as sp

from cllm4rec_dist.errors import ConfigError, DataError
from cllm4rec_dist.evaluation import metrics
from cllm4rec_dist.evaluation.metrics import (
    Metric,
    MetricResult,
    count_listed,
    hits,
    largest_cutoff,
    mean_metrics,
    metrics_of_scores,
    parse_metric,
    top_items,
    user_metrics,
)

NAMES = ["recall@1", "recall@5", "recall@20", "ndcg@3", "ndcg@20"]


@dataclass(frozen=True)
class Rows:
    offsets: np.ndarray
    values: np.ndarray


def as_ragged(lists: list[list[int]]) -> Rows:
    values = np.array([item for row in lists for item in row], dtype=np.int32)
    return Rows(np.cumsum([0, *map(len, lists)], dtype=np.int64), values)


def as_csr(lists: list[list[int]], num_items: int) -> sp.csr_matrix:
    ragged = as_ragged(lists)
    return sp.csr_matrix((np.ones(len(ragged.values)), ragged.values, ragged.offsets), shape=(len(lists), num_items))


def loop_metric(name: str, ranked: list[int], held: set[int]) -> float:
    kind, cutoff_text = name.split("@")
    cutoff = int(cutoff_text)
    best = min(cutoff, len(held))
    if kind == "recall":
        return sum(item in held for item in ranked[:cutoff]) / best
    gain = sum(1 / math.log2(rank + 2) for rank, item in enumerate(ranked[:cutoff]) if item in held)
    return gain / sum(1 / math.log2(rank + 2) for rank in range(best))


def evaluate_topk(topk, heldout, metrics, **options) -> MetricResult:
    return mean_metrics(user_metrics(topk, heldout, metrics, **options), metrics)


@pytest.fixture
def case() -> tuple[np.ndarray, list[list[int]]]:
    rng = np.random.default_rng(0)
    topk = np.stack([rng.permutation(40)[:25] for _ in range(30)])
    heldout = [rng.permutation(40)[: rng.integers(0, 30)].tolist() for _ in range(30)]
    heldout[3] = []
    return topk, heldout


@pytest.mark.parametrize("form", ["csr", "ragged"])
def test_equals_loops(case, form):
    topk, heldout = case
    result = evaluate_topk(topk, as_csr(heldout, 40) if form == "csr" else as_ragged(heldout), NAMES)
    users = [user for user, held in enumerate(heldout) if held]
    assert (result.num_users, result.num_skipped) == (len(users), len(heldout) - len(users))
    for name in NAMES:
        values = [loop_metric(name, topk[user].tolist(), set(heldout[user])) for user in users]
        assert result.mean[name] == pytest.approx(np.mean(values))
        assert result.stderr[name] == pytest.approx(np.std(values) / math.sqrt(len(values)))


@pytest.mark.parametrize("form", ["csr", "ragged"])
@pytest.mark.parametrize("num_items", [40, 7])
@pytest.mark.parametrize("block_scores", [1, 100, 1 << 20])
def test_held_out_items_are_ranked_by_scores_as_in_whole_rankings(case, form, num_items, block_scores, monkeypatch):
    monkeypatch.setattr(metrics, "_BLOCK_SCORES", block_scores)
    heldout = [[item for item in row if item < num_items] for row in case[1]]
    scores = np.random.default_rng(1).integers(0, 5, (30, num_items)).astype(np.float32)  # with many ties
    scores[:, ::4] = -np.inf
    rows = as_csr(heldout, num_items) if form == "csr" else as_ragged(heldout)
    expected = user_metrics(top_items(scores, min(20, num_items)), rows, NAMES, num_items)
    np.testing.assert_array_equal(metrics_of_scores(scores, rows, NAMES), expected)


def test_perfect_ranking_scores_one():
    topk = np.array([[4, 2, 0, 1, 3], [1, 0, 2, 3, 4]])
    result = evaluate_topk(topk, as_ragged([[2, 4], [1]]), ["recall@1", "recall@5", "ndcg@1", "ndcg@5"])
    assert result.mean == pytest.approx(dict.fromkeys(result.mean, 1.0))
    assert result.stderr == pytest.approx(dict.fromkeys(result.mean, 0.0))


def test_hits_counts_repeated_heldout_items_once():
    hit, num_heldout = hits(np.array([[3, 1], [0, 2]]), as_ragged([[1, 1, 9], []]))
    assert hit.tolist() == [[False, True], [False, False]]
    assert num_heldout.tolist() == [2, 0]


def test_nothing_held_out_is_an_error_only_at_the_end():
    values = user_metrics(np.array([[0, 1]]), as_ragged([[]]), ["recall@2"])
    assert np.isnan(values).all()
    with pytest.raises(DataError, match="at least one user"):
        mean_metrics(values, ["recall@2"])


def test_blocks_of_users_are_counted_apart(case):
    topk, heldout = case
    whole = user_metrics(topk, as_ragged(heldout), NAMES)
    assert whole.shape == (30, len(NAMES))
    bounds = ((0, 4), (4, 4), (4, 5), (5, 30))
    parts = [user_metrics(topk[a:b], as_ragged(heldout[a:b]), NAMES) for a, b in bounds]
    np.testing.assert_allclose(np.concatenate(parts), whole, rtol=1e-12)  # sums of blocks of another shape
    for user, held in enumerate(heldout):
        for value, name in zip(whole[user], NAMES, strict=True):
            assert (
                value == pytest.approx(loop_metric(name, topk[user].tolist(), set(held))) if held else np.isnan(value)
            )


def test_names():
    assert parse_metric("ndcg@100") == Metric("ndcg", 100)
    assert largest_cutoff(["recall@20", "ndcg@100", "recall@40"]) == 100
    for name in ("recall", "recall@0", "recall@-1", "Recall@20", "hit@10", "ndcg@1.5", ""):
        with pytest.raises(ConfigError, match="recall@K or ndcg@K"):
            parse_metric(name)
    with pytest.raises(ConfigError, match="at least one metric"):
        largest_cutoff([])


def test_a_short_ranking_is_allowed_only_when_it_covers_the_catalog():
    topk = np.array([[2, 0, 1]])
    expected = evaluate_topk(topk, as_csr([[0]], 3), ["ndcg@100"]).mean["ndcg@100"]
    assert expected == pytest.approx(1 / math.log2(3))
    assert evaluate_topk(topk, as_ragged([[0]]), ["ndcg@100"], num_items=3).mean["ndcg@100"] == expected
    with pytest.raises(DataError, match="at least 100"):
        evaluate_topk(topk, as_ragged([[0]]), ["ndcg@100"])
    with pytest.raises(DataError, match="at least 4"):
        evaluate_topk(topk, as_csr([[0]], 4), ["ndcg@100"])


@pytest.mark.parametrize(
    ("topk", "heldout", "match"),
    [
        (np.array([[0, 1], [1, 0]]), [[0]], "one row for each of the 1 users"),
        (np.array([[0.0, 1.0]]), [[0]], "integer array"),
        (np.array([0, 1]), [[0]], "integer array"),
        (np.array([[0, -1]]), [[0]], "0 or more"),
        (np.array([[0, 1]]), [[-1]], "0 or more"),
    ],
)
def test_bad_input_is_refused(topk, heldout, match):
    with pytest.raises(DataError, match=match):
        evaluate_topk(topk, as_ragged(heldout), ["recall@2"])


def test_lists_are_counted_without_what_is_not_recommended():
    topk = np.array([[2, 0, 1], [2, 1, 0]])
    scores = np.array([[3.0, 2.0, -np.inf], [1.0, 0.5, 0.1]])
    assert count_listed(topk, scores, 5).tolist() == [2, 1, 2, 0, 0]
    long = np.arange(30)[None]
    assert count_listed(long, np.zeros((1, 30)), 30).tolist() == [1] * 20 + [0] * 10
    assert count_listed(long[:0], np.zeros((0, 30)), 3).tolist() == [0, 0, 0]
