"""Prediction: one forward over a user's whole history, exact top-K over the whole catalog or a part of it.

No text is generated, so only items of the catalog are recommended; seen items may be excluded. Scores of all users and
items are never stored: each rank scores its rows in chunks and keeps K candidates for each user, and the candidates of
all ranks are merged.

Legend: n users of this rank in a block, N of all ranks, I items, K recommendations, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from cllm4rec_dist.corpus.collate import collate
from cllm4rec_dist.corpus.heldout import HeldOutUsers
from cllm4rec_dist.corpus.ragged import Ragged
from cllm4rec_dist.distributed.collectives import all_gather_rows, all_reduce_sum, all_to_all_rows, gather_counts
from cllm4rec_dist.distributed.topology import RowPartition, World
from cllm4rec_dist.evaluation.metrics import MetricResult, count_listed, largest_cutoff, mean_metrics, user_metrics
from cllm4rec_dist.model.sharded_cross_entropy import max_logits_for
from cllm4rec_dist.system import InferenceSystem

_BLOCK = 512
"""Queries scored together: enough for a fast matrix product, few enough for long chunks of rows."""
_WINDOW = 32
"""Batches of queries that are sorted by length together; their lists are kept in memory."""
_CHUNK_FACTOR = 2
"""Size of a chunk of scores relative to `max_logits_for`: scores are read once here, so that caches matter less."""
_PEAK_ROWS = 16
"""Neighbouring scores whose maximum is compared first."""


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


def sharded_topk(
    queries: Tensor,
    local_weight: Tensor,
    num_best: int,
    seen: Tensor,
    partition: RowPartition,
    world: World,
    max_logits: int | None = None,
    candidates: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return scores and rows of the `num_best` highest dot products of each query over all shards.

    Args:
        queries: [n, D]; n may differ between ranks and be 0.
        local_weight: [local rows, D], this rank's rows of the output weight.
        num_best: K, from 1 to the number of rows, or of candidates.
        seen: int64 [s, 2] pairs (query of this rank, global row) to exclude (score -inf).
        candidates: bool [I], the same on all ranks; rank only these rows. None for all of them.

    Returns:
        scores [n, K] and int64 rows [n, K], highest first.

    Collectives: all-gathers queries and pairs; one all-to-all of K candidates for each query and rank.
    """
    assert 1 <= num_best <= (partition.num_rows if candidates is None else int(candidates.sum()))
    counts = gather_counts(len(queries), world)
    all_queries = all_gather_rows(queries, counts, world)
    seen = seen + torch.tensor([sum(counts[: world.rank]), 0], device=seen.device)
    all_seen = all_gather_rows(seen, gather_counts(len(seen), world), world)
    if max_logits is None:
        max_logits = _CHUNK_FACTOR * max_logits_for(queries.device)
    first, stop = partition.range(world.rank)
    local_rows = torch.arange(first, stop, device=queries.device)
    if candidates is not None:
        kept = candidates[first:stop]
        local_rows, local_weight = local_rows[kept], local_weight[kept]
    past = partition.num_rows
    scores, rows = _local_topk(all_queries, local_weight, local_rows, num_best, all_seen, past, max_logits)

    received = [counts[world.rank]] * world.size
    scores = all_to_all_rows(scores, counts, received, world).view(world.size, -1, num_best).transpose(0, 1).flatten(1)
    rows = all_to_all_rows(rows, counts, received, world).view(world.size, -1, num_best).transpose(0, 1).flatten(1)
    rows, by_row = rows.sort(dim=1)  # padding rows, which are past the end, come last
    return _best(scores.gather(1, by_row), rows, num_best)


def _best(scores: Tensor, rows: Tensor, num_best: int) -> tuple[Tensor, Tensor]:
    """Return the highest scores, best first, and their rows; equal scores keep their order."""
    scores, order = scores.sort(dim=1, descending=True, stable=True)
    return scores[:, :num_best].contiguous(), rows.gather(1, order[:, :num_best])


def _local_topk(
    queries: Tensor,
    weight: Tensor,
    weight_rows: Tensor,
    num_best: int,
    seen: Tensor,
    past: int,
    max_logits: int,
) -> tuple[Tensor, Tensor]:
    """Return this rank's candidates [N, K], padded with score -inf and rows from `past` on if it has fewer rows.

    Args:
        weight_rows: int64 [rows of `weight`], their global rows, ascending.
    """
    seen = _local_pairs(seen, weight_rows)
    scores, rows = [], []
    for start in range(0, len(queries), _BLOCK):
        block = queries[start : start + _BLOCK]
        block_seen = seen[(seen[:, 0] >= start) & (seen[:, 0] < start + _BLOCK)]
        block_seen = torch.stack([block_seen[:, 0] - start, block_seen[:, 1]], dim=1)
        block_scores, block_rows = _block_topk(block, weight, min(num_best, len(weight)), block_seen, max_logits)
        missing = num_best - block_scores.shape[1]
        padding = past + torch.arange(missing, device=queries.device).expand(len(block), -1)
        scores.append(F.pad(block_scores, (0, missing), value=-torch.inf))
        rows.append(torch.cat([weight_rows[block_rows], padding], dim=1))
    empty = seen.new_empty(0, num_best)
    return torch.cat([queries.new_empty(0, num_best), *scores]), torch.cat([empty, *rows])


def _local_pairs(seen: Tensor, weight_rows: Tensor) -> Tensor:
    """Map pairs (query, global row) to (query, row of the weight), without those of other rows, sorted by row."""
    if not len(weight_rows):
        return seen[:0]
    index = torch.searchsorted(weight_rows, seen[:, 1].contiguous()).clamp_(max=len(weight_rows) - 1)
    pairs = torch.stack([seen[:, 0], index], dim=1)[weight_rows[index] == seen[:, 1]]
    return pairs[pairs[:, 1].argsort()]


def _block_topk(queries: Tensor, weight: Tensor, num_best: int, seen: Tensor, max_logits: int) -> tuple[Tensor, Tensor]:
    """Return scores and local rows [b, K] of a block of queries.

    In the first chunk of rows, K groups of neighbouring rows have a maximum of at least the K-th highest maximum, so
    that lower scores cannot be among the K best. In later chunks only scores above a query's K-th best count. These are
    few, and are merged whenever the number of processed rows has grown by half.

    Args:
        seen: int64 [s, 2] pairs (query, local row) to exclude, sorted by row.
    """
    chunk = max(num_best, max_logits // len(queries), 1)
    bounds = torch.searchsorted(
        seen[:, 1].contiguous(), torch.arange(0, len(weight) + chunk, chunk, device=seen.device)
    ).tolist()
    best_scores, best_rows = queries.new_empty(len(queries), 0), seen.new_empty(len(queries), 0)
    buffer = queries.new_empty(len(queries) * min(chunk, len(weight)))  # new pages for each chunk would take time
    pending: list[tuple[Tensor, Tensor, Tensor]] = []
    merged = 0
    for index, start in enumerate(range(0, len(weight), chunk)):
        rows = weight[start : start + chunk]
        # [rows, queries]: maxima over neighbouring rows are then computed for many queries at once.
        scores = torch.mm(rows, queries.T, out=buffer[: len(rows) * len(queries)].view(len(rows), -1))
        query, row = seen[bounds[index] : bounds[index + 1]].T
        scores[row - start, query] = -torch.inf
        peaks = _row_groups(scores).amax(dim=1)
        if index == 0:
            source = peaks if len(peaks) >= num_best else scores
            lowest = source.topk(num_best, dim=0)[0][-1]
            query, row, score = _above_threshold(scores, peaks, lowest, torch.ge)
        else:  # an equal score loses, because its row is higher
            query, row, score = _above_threshold(scores, peaks, best_scores[:, -1], torch.gt)
        pending.append((query, row + start, score))
        done = start + len(rows)
        if 2 * done >= 3 * merged or done == len(weight):
            merged = done
            query, row, score = (torch.cat(parts) for parts in zip(*pending, strict=True))
            more_rows, more_scores = _padded(query, row, score, len(queries))
            all_rows = torch.cat([best_rows, more_rows], dim=1)
            best_scores, best_rows = _best(torch.cat([best_scores, more_scores], dim=1), all_rows, num_best)
            pending = []
    return best_scores, best_rows


def _row_groups(scores: Tensor) -> Tensor:
    """Reshape [C, b] to [C // _PEAK_ROWS, _PEAK_ROWS, b], without the remaining rows."""
    num_groups = len(scores) // _PEAK_ROWS
    return scores[: num_groups * _PEAK_ROWS].unflatten(0, (num_groups, _PEAK_ROWS))


def _above_threshold(
    scores: Tensor, peaks: Tensor, threshold: Tensor, compare: Callable[[Tensor, Tensor], Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """Return query, row and value of every score [C, b] for which `compare` with its query's threshold [b] is true.

    The rows of a query are ascending.

    Args:
        peaks: [C // _PEAK_ROWS, b] maxima of `_row_groups`; groups whose maximum does not compare are skipped.
    """
    group, query = compare(peaks, threshold).nonzero(as_tuple=True)
    groups = _row_groups(scores)[group, :, query]
    hit, within = compare(groups, threshold[query, None]).nonzero(as_tuple=True)
    query, row, score = query[hit], group[hit] * _PEAK_ROWS + within, groups[hit, within]
    num_rows = len(peaks) * _PEAK_ROWS
    if num_rows == len(scores):
        return query, row, score
    last_row, last = compare(scores[num_rows:], threshold).nonzero(as_tuple=True)
    parts = (query, last), (row, last_row + num_rows), (score, scores[last_row + num_rows, last])
    query, row, score = (torch.cat(pair) for pair in parts)
    return query, row, score


def _padded(query: Tensor, rows: Tensor, scores: Tensor, num_queries: int) -> tuple[Tensor, Tensor]:
    """Arrange candidates by query, in their order: rows and scores [b, most of a query], padded with -inf."""
    order = query.argsort(stable=True)
    query = query[order]
    counts = torch.bincount(query, minlength=num_queries)
    width = int(counts.max())
    column = torch.arange(len(query), device=query.device) - (counts.cumsum(0) - counts)[query]
    padded_rows = rows.new_full((num_queries, width), torch.iinfo(torch.int64).max)
    padded_scores = scores.new_full((num_queries, width), -torch.inf)
    padded_rows[query, column], padded_scores[query, column] = rows[order], scores[order]
    return padded_rows, padded_scores


@torch.no_grad()
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
    """Rank items for n queries, each a user and a history.

    Every rank gets all queries and yields the lists of its part, in the order of the queries; parts are consecutive and
    cover all of them. Collective: all ranks must exhaust the iterator.

    Args:
        users: int64 [n] user rows, the same on all ranks; -1 for a user without a row.
        histories: n lists of items, oldest first, from which the prompts are made.
        num_best: K, at most the number of candidates.
        batch_users: queries of this rank in a forward.
        progress: called with the number of queries that each forward finished, over all ranks.
        seen: n lists of items to rank last, with score -inf; None excludes nothing.
        candidates: bool [I], rank only these items; None for all of them.
    """
    assert len(users) == len(histories)
    assert seen is None or len(seen) == len(users)
    world, model = system.world, system.recommender
    num_best = min(num_best, system.corpus.num_items if candidates is None else int(candidates.sum()))
    mask = None if candidates is None else torch.from_numpy(candidates).to(world.device)
    system.train(False)
    weight = model.output_weight()
    low, high = world.local_range(0, len(users))
    largest_part, window = -(-len(users) // world.size), _WINDOW * batch_users
    for start in range(0, largest_part, window):
        local = np.arange(low + start, max(low + start, min(low + start + window, high)))
        # Batches of similar length have less padding, and attention costs the square of the length.
        local = local[np.argsort(histories.lengths[local], kind="stable")]
        rankings: list[Ranking] = []
        for first in range(0, min(window, largest_part - start), batch_users):
            index = local[first : first + batch_users]
            queries = encode_histories(system, users[index], histories.take(index))
            if num_best:
                excluded = _pairs(seen, index).to(world.device)
                scores, rows = sharded_topk(
                    queries, weight, num_best, excluded, model.item_partition, world, candidates=mask
                )
                rankings.append(Ranking(index, rows.cpu().numpy(), scores.float().cpu().numpy()))
            progress(_num_finished(len(users), world, start + first, batch_users))
        yield _in_order(rankings, local)


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
    routes = model.route([batch])
    batch = batch.to(system.world.device)
    ((tokens, item_rows),) = model.embed([batch], routes)
    hidden = system.backbone(tokens, batch.positions, batch.content_start)
    return model.item_queries(hidden, item_rows, batch)


def _pairs(seen: Ragged | None, index: np.ndarray) -> Tensor:
    """Return int64 [s, 2] pairs (position in `index`, item row) of the items that these queries have seen."""
    if seen is None:
        return torch.empty(0, 2, dtype=torch.int64)
    lists = seen.take(index)
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
    progress: Callable[[int], object] = lambda done: None,
    *,
    without_rows: bool = False,
    list_length: int = 0,
) -> Evaluation:
    """Rank the catalog for all users, known and new, with held-out items in `split`. Collective.

    All-reduces a value for each user and metric, and one for each item if lists are counted.

    Args:
        without_rows: rank known users as if they had no row, too.
        list_length: length of the lists in which items are counted; 0 counts nothing.
    """
    users, num_items = HeldOutUsers.of(system.corpus, split), system.corpus.num_items
    rows = np.full(len(users), -1, np.int64) if without_rows else users.rows
    values = np.zeros((len(users), len(metrics)))
    listed = np.zeros(num_items if list_length else 0, np.int64)
    num_best = max(largest_cutoff(metrics), list_length)
    for ranking in rank_users(system, rows, users.histories, num_best, batch_users, progress, seen=users.histories):
        values[ranking.index] = user_metrics(ranking.items, users.held_out.take(ranking.index), metrics, num_items)
        if list_length:
            listed += count_listed(ranking.items, ranking.scores, num_items, list_length)
    values = _all_reduce(values.ravel(), system.world, "metrics of users").reshape(values.shape)
    return Evaluation(users, tuple(metrics), values, _all_reduce(listed, system.world, "counts of items"))


def _all_reduce(values: np.ndarray, world: World, what: str) -> np.ndarray:
    """Sum over all ranks; each has values for its users and zeros for the others."""
    if not len(values):
        return values
    return all_reduce_sum(torch.from_numpy(values).to(world.device), world, what).cpu().numpy()
