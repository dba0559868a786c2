"""Prediction: one forward over a user's whole history, exact top-K over the whole catalog or a part of it.

No text is generated, so only items of the catalog are recommended; seen items may be excluded. `sharded_topk.py` scores
and ranks.

Legend: n queries, I items, K recommendations, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from cllm4rec_dist.corpus.collate import MicroBatch, collate
from cllm4rec_dist.corpus.heldout import HeldOutUsers
from cllm4rec_dist.corpus.ragged import Ragged
from cllm4rec_dist.distributed.collectives import all_reduce_sum
from cllm4rec_dist.distributed.host_memory import return_freed_memory
from cllm4rec_dist.distributed.topology import World
from cllm4rec_dist.evaluation.metrics import MetricResult, count_listed, largest_cutoff, mean_metrics, user_metrics
from cllm4rec_dist.evaluation.sharded_topk import Queries, mixed_topk
from cllm4rec_dist.model.sharded_embedding import start_lookup
from cllm4rec_dist.system import InferenceSystem

_ITEMS = "collaborative.items"
_WINDOW = 32
"""Batches of queries that are sorted by length together; their lists are kept in memory."""


@dataclass(frozen=True)
class Ranking:
    """Best items of some queries.

    Attributes:
        index: int64 [n], positions of the queries in the arguments of `rank_users`, ascending.
        items: int64 [n, K] item rows, best first; equal scores in the order of the rows.
        scores: [n, K]; -inf if fewer than K items are left to recommend.
    """

    index: np.ndarray
    items: np.ndarray
    scores: np.ndarray


def rank_users(
    system: InferenceSystem,
    users: np.ndarray,
    histories: Ragged,
    num_best: int,
    batch_users: int,
    progress: Callable[[int], object] = lambda done: None,
    *,
    seen: Ragged | None = None,
    candidates: np.ndarray | None = None,
) -> Iterator[Ranking]:
    """Rank items for n queries, each a user and a history, by the run's weight of the linear memory.

    Like `rank_by_weights` with that weight alone.
    """
    weights = [system.linear.weight]
    for (ranking,) in rank_by_weights(
        system, users, histories, num_best, batch_users, weights, progress, seen=seen, candidates=candidates
    ):
        yield ranking


@torch.no_grad()
def rank_by_weights(
    system: InferenceSystem,
    users: np.ndarray,
    histories: Ragged,
    num_best: int,
    batch_users: int,
    weights: Sequence[float],
    progress: Callable[[int], object] = lambda done: None,
    *,
    seen: Ragged | None = None,
    candidates: np.ndarray | None = None,
) -> Iterator[tuple[Ranking, ...]]:
    """Rank items for n queries, each a user and a history, once for each weight of the linear memory.

    A query is encoded once, and its scores are computed once.

    Every rank gets all queries and yields the lists of its part, in the order of the queries; parts are consecutive and
    cover all of them. Collective: all ranks must exhaust the iterator.

    Args:
        users: int64 [n] user rows, the same on all ranks; -1 for a user without a row.
        histories: n lists of items, oldest first, from which the prompts are made, and which the linear memory reads.
            The I items are those of the system, with its new ones.
        num_best: K, at most the number of candidates.
        batch_users: queries of this rank in a forward.
        weights: see `mixed_topk`.
        progress: called with the number of queries that each forward finished, over all ranks.
        seen: n lists of items to rank last, with score -inf; None excludes nothing.
        candidates: bool [I], rank only these items; None for all of them.
    """
    assert len(users) == len(histories)
    assert seen is None or len(seen) == len(users)
    world, model = system.world, system.recommender
    num_best = min(num_best, system.num_items if candidates is None else int(candidates.sum()))
    mask = None if candidates is None else torch.from_numpy(candidates).to(world.device)
    system.train(False)
    return_freed_memory()  # before the largest matrix is allocated
    weight = model.output_weight()
    low, high = world.local_range(0, len(users))
    largest_part, window = -(-len(users) // world.size), _WINDOW * batch_users
    for start in range(0, largest_part, window):
        local = np.arange(low + start, max(low + start, min(low + start + window, high)))
        # Batches of similar length have less padding, and attention costs the square of the length.
        local = local[np.argsort(histories.lengths[local], kind="stable")]
        rankings: list[list[Ranking]] = [[] for _ in weights]
        for first in range(0, min(window, largest_part - start), batch_users):
            index = local[first : first + batch_users]
            queries = encode_queries(system, users[index], histories.take(index))
            if num_best:
                excluded = history_pairs(None if seen is None else seen.take(index)).to(world.device)
                best = mixed_topk(
                    queries,
                    weight,
                    system.linear,
                    weights,
                    num_best,
                    excluded,
                    model.world,
                    candidates=mask,
                    new_items=system.new_items,
                )
                for parts, (scores, rows) in zip(rankings, best, strict=True):
                    parts.append(Ranking(index, rows.cpu().numpy(), scores.float().cpu().numpy()))
            progress(_num_finished(len(users), world, start + first, batch_users))
        yield tuple(_in_order(parts, local) for parts in rankings)


def _num_finished(total: int, world: World, start: int, batch: int) -> int:
    """Count the queries of all ranks between `start` and `start + batch` of each rank's part."""
    bounds = [total * rank // world.size for rank in range(world.size + 1)]
    return sum(max(0, min(high - low - start, batch)) for low, high in pairwise(bounds))


def _in_order(parts: Sequence[Ranking], index: np.ndarray) -> Ranking:
    """Join the lists of a window in the order of its queries; lists are empty if there are no parts."""
    if not parts:
        index = np.sort(index)
        return Ranking(index, np.empty((len(index), 0), np.int64), np.empty((len(index), 0), np.float32))
    index = np.concatenate([part.index for part in parts])
    order = np.argsort(index)
    items, scores = (np.concatenate([getattr(p, name) for p in parts])[order] for name in ("items", "scores"))
    return Ranking(index[order], items, scores)


def encode_histories(system: InferenceSystem, users: np.ndarray, histories: Ragged) -> Tensor:
    """Return the query of each history, to be multiplied with the output weight: [n, D or D+1].

    Args:
        users, histories: those of this rank, as in `rank_users`; n may differ between ranks and be 0.

    Collectives: one forward of the engine and the lookup of the embeddings.
    """
    model, prompts = system.recommender, system.prompts
    batch = collate(prompts.prediction(users, histories), prompts.space)
    rows = _lookup(system, batch)
    batch = batch.to(system.world.device)
    tokens, item_rows = model.input_embeddings(batch, rows)
    hidden = system.backbone(tokens, batch.positions, batch.content_start)
    return model.head.with_bias_column(model.item_queries(hidden, item_rows, batch))


def _lookup(system: InferenceSystem, batch: MicroBatch) -> dict[str, Tensor]:
    """Return the rows of a batch's users and items, new ones included, by table: fp32 [ids of the table, d].

    Collectives: those of `Recommender.route` and `start_lookup`.
    """
    model, new_items = system.recommender, system.new_items
    items = batch.ids[_ITEMS]
    is_new = items >= model.item_partition.num_rows
    (route,) = model.route([replace(batch, ids={**batch.ids, _ITEMS: items.masked_fill(is_new, 0)})])
    rows = start_lookup({name: model.tables[name] for name in route.num_ids}, route, model.comm_dtype).wait()
    if new_items is not None:
        index = (items[is_new] - model.item_partition.num_rows).to(system.world.device)
        values = new_items.rows[index].to(model.comm_dtype).float()
        rows[_ITEMS] = rows[_ITEMS].index_copy(0, is_new.nonzero().flatten().to(index.device), values)
    return rows


def encode_queries(system: InferenceSystem, users: np.ndarray, histories: Ragged) -> Queries:
    """Return the queries of histories without repeated items, see `encode_histories`."""
    vectors = encode_histories(system, users, histories)
    return Queries(vectors, history_pairs(histories).to(system.world.device))


def history_pairs(lists: Ragged | None) -> Tensor:
    """Return int64 [s, 2] pairs (position, item row) of lists of items."""
    if lists is None:
        return torch.empty(0, 2, dtype=torch.int64)
    return torch.from_numpy(np.stack([lists.rows, lists.values.astype(np.int64)], axis=1))


@dataclass(frozen=True)
class Evaluation:
    """Metrics of the rankings of n users.

    Attributes:
        users: the evaluated users.
        metrics: names of the M metrics.
        values: float64 [n, M], the metrics of each user.
        listed: int64 [I], number of lists that contain each item; empty if lists were not counted.
    """

    users: HeldOutUsers
    metrics: tuple[str, ...]
    values: np.ndarray
    listed: np.ndarray

    def result(self, chosen: np.ndarray | None = None) -> MetricResult:
        """Return means and standard errors over all users, or over the chosen ones; bool [n].

        Raises:
            DataError: if there are none.
        """
        return mean_metrics(self.values if chosen is None else self.values[chosen], self.metrics)


def evaluate(
    system: InferenceSystem,
    split: str,
    metrics: Sequence[str],
    batch_users: int,
    weights: Sequence[float],
    *,
    num_users: int | None = None,
) -> list[Evaluation]:
    """Read the users with held-out items in `split` from the corpus, and evaluate them. Collective.

    Args:
        weights: weights of the linear memory, see `mixed_topk`.
        num_users: size of a sample, see `HeldOutUsers.of`; None for all of them.
    """
    return evaluate_users(system, HeldOutUsers.of(system.corpus, split, num_users), metrics, batch_users, weights)


def evaluate_users(
    system: InferenceSystem,
    users: HeldOutUsers,
    metrics: Sequence[str],
    batch_users: int,
    weights: Sequence[float],
    progress: Callable[[int], object] = lambda done: None,
    *,
    without_rows: bool = False,
    list_length: int = 0,
) -> list[Evaluation]:
    """Rank the catalog for users, known and new, by each weight. Collective.

    All-reduces a value for each weight, user and metric, and one for each item if lists are counted.

    Args:
        weights: weights of the linear memory, see `mixed_topk`.
        without_rows: rank known users as if they had no row, too.
        list_length: length of the lists in which items are counted; 0 counts nothing.
    """
    num_items = system.corpus.num_items
    rows = np.full(len(users), -1, np.int64) if without_rows else users.rows
    values = np.zeros((len(weights), len(users), len(metrics)))
    listed = np.zeros((len(weights), num_items if list_length else 0), np.int64)
    num_best = max(largest_cutoff(metrics), list_length)
    for rankings in rank_by_weights(
        system, rows, users.histories, num_best, batch_users, weights, progress, seen=users.histories
    ):
        for index, ranking in enumerate(rankings):
            held_out = users.held_out.take(ranking.index)
            values[index, ranking.index] = user_metrics(ranking.items, held_out, metrics, num_items)
            if list_length:
                listed[index] += count_listed(ranking.items, ranking.scores, num_items, list_length)
    values = _all_reduce(values, system.world, "metrics of users")
    listed = _all_reduce(listed, system.world, "counts of items")
    return [Evaluation(users, tuple(metrics), *parts) for parts in zip(values, listed, strict=True)]


def _all_reduce(values: np.ndarray, world: World, what: str) -> np.ndarray:
    """Sum over all ranks; each has values for its users and zeros for the others."""
    if not values.size:
        return values
    return all_reduce_sum(torch.from_numpy(values).to(world.device), world, what).cpu().numpy()
