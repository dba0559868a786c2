"""Baselines over groups of items, on the same candidates as the model.

The baselines of the whole table are fitted again with the settings that validation selected. Text neighbours are added
for new items: the cosine of the summed TF-IDF vectors of a history with that of a candidate.

Legend: P users, I items, b users of a block.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray
from sklearn.feature_extraction.text import TfidfVectorizer

from cllm4rec_dist.evaluation.baseline_config import BaselineConfig
from cllm4rec_dist.evaluation.baseline_models import has_words, make_grids
from cllm4rec_dist.evaluation.baselines import BaselineResult
from cllm4rec_dist.evaluation.ease import Float32Array
from cllm4rec_dist.evaluation.item_groups import GroupResult, ItemGroup, cannot_rank
from cllm4rec_dist.evaluation.metrics import are_tied, largest_cutoff, mean_metrics, top_items, user_metrics
from cllm4rec_dist.evaluation.results import ResultRow
from cllm4rec_dist.evaluation.split_data import Candidate, Scorer, SplitData

TEXT_NEIGHBORS = "Text neighbours"
_BLOCK_USERS = 512


def group_rows(
    data: SplitData,
    groups: Sequence[ItemGroup],
    baselines: Sequence[BaselineResult],
    metrics: Sequence[str],
    config: BaselineConfig,
) -> list[list[ResultRow]]:
    """Return for each group a row of each baseline and one of text neighbours, if items have texts with words.

    A row of a baseline that cannot rank the group, see `cannot_rank`, has no metrics.

    Args:
        baselines: results over all items, whose settings are used.
        config: the grids of `baselines`.
    """
    grids = make_grids(data, config.model_copy(update={"names": tuple(result.name for result in baselines)}))
    rows: list[list[ResultRow]] = [[] for _ in groups]
    for baseline in baselines:
        (candidate,) = (point for point in grids[baseline.name].candidates if point.settings == baseline.chosen)
        _add_rows(rows, baseline.label, candidate, candidate.fit(_no_progress), data, groups, metrics)
    fitted = [(candidate, candidate.fit(_no_progress)) for candidate in _text_neighbors(data)]
    if fitted:
        of_validation = groups[-1]  # cold among cold: the question that text neighbours are for
        best = max(fitted, key=lambda pair: _value(pair[1], data, of_validation, config.select_by))
        _add_rows(rows, TEXT_NEIGHBORS, *best, data, groups, metrics)
    return rows


def _no_progress() -> None:
    """Show nothing of a fit."""


def _add_rows(
    rows: list[list[ResultRow]],
    label: str,
    candidate: Candidate,
    scorer: Scorer,
    data: SplitData,
    groups: Sequence[ItemGroup],
    metrics: Sequence[str],
) -> None:
    for of_group, group in zip(rows, groups, strict=True):
        result = _evaluate(scorer, data.histories, data.test, group, metrics)
        row = ResultRow(name=label, metrics=result.mean, stderr=result.stderr, chosen=candidate.settings, baseline=True)  # type: ignore[arg-type]
        of_group.append(row.without_metrics() if cannot_rank(result.num_tied, result.num_users) else row)


def _value(scorer: Scorer, data: SplitData, group: ItemGroup, metric: str) -> float:
    """Return a metric on validation; 0 if validation has no item of the group."""
    if not data.valid[:, group.held_out].nnz:
        return 0.0
    return _evaluate(scorer, data.histories, data.valid, group, [metric]).mean[metric]


def _evaluate(
    scorer: Scorer, histories: sp.csr_matrix, held_out: sp.csr_matrix, group: ItemGroup, metrics: Sequence[str]
) -> GroupResult:
    """Rank the candidates of a group for the users with held-out items of it, and return means over them."""
    counted = held_out @ sp.diags(group.held_out.astype(np.float32), format="csr")
    counted.eliminate_zeros()
    num_ranked = min(int(group.candidates.sum()), largest_cutoff(metrics))
    every_user, values, num_tied = np.flatnonzero(np.diff(counted.indptr)), [], 0
    for start in range(0, len(every_user), _BLOCK_USERS):
        users = every_user[start : start + _BLOCK_USERS]
        scores = scorer(users)
        scale = np.abs(scores).max(axis=1)
        seen = histories[users].tocoo()
        scores[seen.row, seen.col] = -np.inf
        scores[:, ~group.candidates] = -np.inf
        num_tied += int(are_tied(scores, scale).sum())
        ranked = top_items(scores, num_ranked)
        values.append(user_metrics(ranked, counted[users], metrics, int(group.candidates.sum())))
    return GroupResult(**vars(mean_metrics(np.concatenate(values), metrics)), num_tied=num_tied)


def _text_neighbors(data: SplitData) -> list[Candidate]:
    """Return text neighbours over words and over words with pairs of words; none if no item has words."""

    def fit(longest: int) -> Scorer:
        features = TfidfVectorizer(sublinear_tf=True, dtype=np.float32, ngram_range=(1, longest)).fit_transform(
            data.item_texts
        )
        profiles, transposed = data.histories @ features, features.T.tocsr()

        def score(users: NDArray[np.int64]) -> Float32Array:
            return np.asarray((profiles[users] @ transposed).todense(), dtype=np.float32)

        return score

    def candidate(longest: int) -> Candidate:
        return Candidate({"words": float(longest)}, lambda swept: fit(longest))

    if not has_words(data.item_texts):
        return []
    return [candidate(longest) for longest in (1, 2)]
