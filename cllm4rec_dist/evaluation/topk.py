"""Prediction: one forward over a user's whole history, exact top-K over the whole catalog or a part of it.

No text is generated, so no item is made up; what users have seen may be left out. Scores are
never held for [users, items]: each rank scores its rows in chunks and keeps K candidates a user, and the candidates are
merged.

Legend: n users of this rank in a block, N of all ranks, I items, K recommendations.
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
"""Queries at a time: enough for the speed of a matrix product, few enough for long chunks of rows."""
_WINDOW = 32
"""Blocks of queries that are ordered by length together: the lists of as many are held in memory."""
_MORE = 2
"""Scores at a time, in chunks of the heads: they are looked at once, not kept in a cache."""
_LOOK = 16
"""Neighbouring scores of which the highest is looked at first."""


@dataclass(frozen=True)
class Ranking:
    """Best items of some queries.

    Attributes:
        index: int64 [n] which queries these are: positions in the arguments of `rank_users`, rising.
        items: int64 [n, K] item rows, best first; equal scores in the order of the rows.
        scores: [n, K]; -inf where fewer than K items were left to recommend.
    """

    index: np.ndarray
    items: np.ndarray
    scores: np.ndarray


def sharded_topk(
    queries: Tensor,
    local_operand: Tensor,
    num_best: int,
    seen: Tensor,
    partition: RowPartition,
    world: World,
    max_logits: int | None = None,
    candidates: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Scores and rows of the `num_best` highest products per query over all shards.

    Args:
        queries: [n, D]; n may differ between ranks and be 0.
        local_operand: [rows of this rank, D].
        num_best: K, from 1 to the number of rows, or of candidates.
        seen: int64 [s, 2] pairs (query of this rank, global row) that are left out (score -inf).
        candidates: bool [I], the same on all ranks; rank these rows alone. None for all of them.

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
        max_logits = _MORE * max_logits_for(queries.device)
    first, stop = partition.range(world.rank)
    local_rows = torch.arange(first, stop, device=queries.device)
    if candidates is not None:
        kept = candidates[first:stop]
        local_rows, local_operand = local_rows[kept], local_operand[kept]
    past = partition.num_rows
    scores, rows = _local_topk(all_queries, local_operand, local_rows, num_best, all_seen, past, max_logits)

    mine = [counts[world.rank]] * world.size
    scores = all_to_all_rows(scores, counts, mine, world).view(world.size, -1, num_best).transpose(0, 1).flatten(1)
    rows = all_to_all_rows(rows, counts, mine, world).view(world.size, -1, num_best).transpose(0, 1).flatten(1)
    rows, by_row = rows.sort(dim=1)  # rows past the end, which fill up a short shard, go behind
    return _best(scores.gather(1, by_row), rows, num_best)


def _best(scores: Tensor, rows: Tensor, num_best: int) -> tuple[Tensor, Tensor]:
    """Highest scores first; equal ones stay in the order in which they stand."""
    scores, order = scores.sort(dim=1, descending=True, stable=True)
    return scores[:, :num_best].contiguous(), rows.gather(1, order[:, :num_best])


def _local_topk(
    queries: Tensor,
    operand: Tensor,
    operand_rows: Tensor,
    num_best: int,
    seen: Tensor,
    past: int,
    max_logits: int,
) -> tuple[Tensor, Tensor]:
    """This rank's candidates [N, K]; where it has fewer rows, places are filled with -inf and rows from `past` on.

    Args:
        operand_rows: int64 [rows of the operand], their global rows, rising.
    """
    seen = _local_pairs(seen, operand_rows)
    scores, rows = [], []
    for start in range(0, len(queries), _BLOCK):
        block = queries[start : start + _BLOCK]
        own = seen[(seen[:, 0] >= start) & (seen[:, 0] < start + _BLOCK)]
        own = torch.stack([own[:, 0] - start, own[:, 1]], dim=1)
        found = _block_topk(block, operand, min(num_best, len(operand)), own, max_logits)
        missing = num_best - found[0].shape[1]
        filled = past + torch.arange(missing, device=queries.device).expand(len(block), -1)
        scores.append(F.pad(found[0], (0, missing), value=-torch.inf))
        rows.append(torch.cat([operand_rows[found[1]], filled], dim=1))
    empty = seen.new_empty(0, num_best)
    return torch.cat([queries.new_empty(0, num_best), *scores]), torch.cat([empty, *rows])


def _local_pairs(seen: Tensor, operand_rows: Tensor) -> Tensor:
    """Pairs (query, global row) -> (query, row of the operand) of those that are in it, sorted by row."""
    if not len(operand_rows):
        return seen[:0]
    found = torch.searchsorted(operand_rows, seen[:, 1].contiguous()).clamp_(max=len(operand_rows) - 1)
    pairs = torch.stack([seen[:, 0], found], dim=1)[operand_rows[found] == seen[:, 1]]
    return pairs[pairs[:, 1].argsort()]


def _block_topk(
    queries: Tensor, operand: Tensor, num_best: int, seen: Tensor, max_logits: int
) -> tuple[Tensor, Tensor]:
    """Scores and local rows [b, K] of a block of queries.

    In the first chunk of rows, K blocks of neighbours have a highest score of at least the K-th of these, so nothing
    below it counts. Later only scores above a query's K-th best count: few, which are sorted in when the rows that have
    been looked at have grown by half.

    Args:
        seen: int64 [s, 2] of query and local row to leave out, sorted by row.
    """
    chunk = max(num_best, max_logits // len(queries), 1)
    bounds = torch.searchsorted(
        seen[:, 1].contiguous(), torch.arange(0, len(operand) + chunk, chunk, device=seen.device)
    ).tolist()
    best_scores, best_rows = queries.new_empty(len(queries), 0), seen.new_empty(len(queries), 0)
    buffer = queries.new_empty(len(queries) * min(chunk, len(operand)))  # fresh pages for each chunk cost time
    found: list[tuple[Tensor, Tensor, Tensor]] = []
    merged = 0
    for number, start in enumerate(range(0, len(operand), chunk)):
        rows = operand[start : start + chunk]
        # Queries side by side: maxima over neighbouring rows are then taken for many queries at once.
        scores = torch.mm(rows, queries.T, out=buffer[: len(rows) * len(queries)].view(len(rows), -1))
        query, row = seen[bounds[number] : bounds[number + 1]].T
        scores[row - start, query] = -torch.inf
        peaks = _blocks(scores).amax(dim=1)
        if number == 0:
            source = peaks if len(peaks) >= num_best else scores
            lowest = source.topk(num_best, dim=0)[0][-1]
            query, row, score = _reaching(scores, peaks, lowest, torch.ge)
        else:  # an equal score comes too late: its row is behind
            query, row, score = _reaching(scores, peaks, best_scores[:, -1], torch.gt)
        found.append((query, row + start, score))
        done = start + len(rows)
        if 2 * done >= 3 * merged or done == len(operand):
            merged = done
            query, row, score = (torch.cat(parts) for parts in zip(*found, strict=True))
            more_rows, more_scores = _aligned(query, row, score, len(queries))
            joined = torch.cat([best_rows, more_rows], dim=1)
            best_scores, best_rows = _best(torch.cat([best_scores, more_scores], dim=1), joined, num_best)
            found = []
    return best_scores, best_rows


def _blocks(scores: Tensor) -> Tensor:
    """[C, b] -> [C // _LOOK, _LOOK, b], without the last few rows."""
    num_blocks = len(scores) // _LOOK
    return scores[: num_blocks * _LOOK].unflatten(0, (num_blocks, _LOOK))


def _reaching(
    scores: Tensor, peaks: Tensor, threshold: Tensor, compare: Callable[[Tensor, Tensor], Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """Query, row and value of every score [C, b] that compares with its query's threshold [b], rows in rising order.

    Args:
        peaks: [C // _LOOK, b] highest of each of `_blocks`; one that does not compare is passed over as a whole.
    """
    block, query = compare(peaks, threshold).nonzero(as_tuple=True)
    blocks = _blocks(scores)[block, :, query]
    hit, within = compare(blocks, threshold[query, None]).nonzero(as_tuple=True)
    query, row, score = query[hit], block[hit] * _LOOK + within, blocks[hit, within]
    num_rows = len(peaks) * _LOOK
    if num_rows == len(scores):
        return query, row, score
    last_row, last = compare(scores[num_rows:], threshold).nonzero(as_tuple=True)
    parts = (query, last), (row, last_row + num_rows), (score, scores[last_row + num_rows, last])
    query, row, score = (torch.cat(pair) for pair in parts)
    return query, row, score


def _aligned(query: Tensor, rows: Tensor, scores: Tensor, num_queries: int) -> tuple[Tensor, Tensor]:
    """Candidates of all queries -> rows and scores [b, most of a query], in their order; -inf where one has fewer."""
    order = query.argsort(stable=True)
    query = query[order]
    counts = torch.bincount(query, minlength=num_queries)
    width = int(counts.max())
    place = torch.arange(len(query), device=query.device) - (counts.cumsum(0) - counts)[query]
    aligned_rows = rows.new_full((num_queries, width), torch.iinfo(torch.int64).max)
    aligned_scores = scores.new_full((num_queries, width), -torch.inf)
    aligned_rows[query, place], aligned_scores[query, place] = rows[order], scores[order]
    return aligned_rows, aligned_scores


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

    Every rank is given all queries and yields lists of its part, in the order of the queries; parts are consecutive and
    cover all of them. Collective: all ranks must exhaust the iterator.

    Args:
        users: int64 [n] user rows, the same on all ranks; -1 for somebody without a row of their own.
        histories: n rows of items, oldest first, of which the prompts are made.
        num_best: K; cut to the number of candidates.
        batch_users: queries of this rank in a forward.
        progress: called with the number of queries that each forward finished, over all ranks.
        seen: n rows of items to rank behind all others, with score -inf; None leaves nothing out.
        candidates: bool [I], rank these items alone; None for all of them.
    """
    assert len(users) == len(histories)
    assert seen is None or len(seen) == len(users)
    world, model = system.world, system.recommender
    num_best = min(num_best, system.corpus.num_items if candidates is None else int(candidates.sum()))
    mask = None if candidates is None else torch.from_numpy(candidates).to(world.device)
    system.train(False)
    operand = model.output_weight()
    low, high = world.share(0, len(users))
    widest, window = -(-len(users) // world.size), _WINDOW * batch_users
    for start in range(0, widest, window):
        own = np.arange(low + start, max(low + start, min(low + start + window, high)))
        # Histories of like length beside each other: rows are short, and attention is paid by their length.
        own = own[np.argsort(histories.lengths[own], kind="stable")]
        found: list[Ranking] = []
        for first in range(0, min(window, widest - start), batch_users):
            index = own[first : first + batch_users]
            queries = encode_histories(system, users[index], histories.take(index))
            if num_best:
                left_out = _pairs(seen, index).to(world.device)
                scores, rows = sharded_topk(
                    queries, operand, num_best, left_out, model.item_partition, world, candidates=mask
                )
                found.append(Ranking(index, rows.cpu().numpy(), scores.float().cpu().numpy()))
            progress(_num_finished(len(users), world, start + first, batch_users))
        yield _in_order(found, own)


def _num_finished(total: int, world: World, start: int, batch: int) -> int:
    """Queries of all ranks between `start` and `start + batch` of each rank's part."""
    bounds = [total * rank // world.size for rank in range(world.size + 1)]
    return sum(max(0, min(high - low - start, batch)) for low, high in pairwise(bounds))


def _in_order(parts: Sequence[Ranking], index: np.ndarray) -> Ranking:
    """The lists of a window in the order of its queries; of no part, empty ones."""
    if not parts:
        index = np.sort(index)
        return Ranking(index, np.empty((len(index), 0), np.int64), np.empty((len(index), 0), np.float32))
    index = np.concatenate([part.index for part in parts])
    order = np.argsort(index)
    items, scores = (np.concatenate([getattr(p, name) for p in parts])[order] for name in ("items", "scores"))
    return Ranking(index[order], items, scores)


def encode_histories(system: InferenceSystem, users: np.ndarray, histories: Ragged) -> Tensor:
    """What the rows of the item softmax are multiplied with after each history: [n, D or D+1].

    Args:
        users, histories: of this rank, as in `rank_users`; n may differ between ranks and be 0.

    Collectives: one forward of the engine and the lookup of the rows.
    """
    model, prompts = system.recommender, system.prompts
    batch = collate(prompts.prediction(users, histories), prompts.space)
    routes = model.route([batch])
    batch = batch.to(system.world.device)
    ((tokens, item_rows),) = model.embed([batch], routes)
    hidden = system.backbone(tokens, batch.positions, batch.content_start)
    return model.item_queries(hidden, item_rows, batch)


def _pairs(seen: Ragged | None, index: np.ndarray) -> Tensor:
    """int64 [s, 2] pairs (position in `index`, item row) of everything that these queries have seen."""
    if seen is None:
        return torch.empty(0, 2, dtype=torch.int64)
    taken = seen.take(index)
    return torch.from_numpy(np.stack([taken.rows, taken.values.astype(np.int64)], axis=1))


@dataclass(frozen=True)
class Evaluation:
    """What the rankings of n users are worth.

    Attributes:
        users: who they are.
        metrics: names of the M metrics.
        values: float64 [n, M], the metrics of each user.
        listed: int64 [I], how many of the lists each item is in; empty where that was not asked for.
    """

    users: HeldOutUsers
    metrics: tuple[str, ...]
    values: np.ndarray
    listed: np.ndarray

    def result(self, chosen: np.ndarray | None = None) -> MetricResult:
        """Means and standard errors over all users, each of whom counts once, or over the chosen ones; bool [n].

        Raises:
            DataError: where there are none.
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
    """Rank the catalog for all users of whom `split` holds out items, known and new ones. Collective.

    All-reduces a value for each user and metric, and one for each item where lists are counted.

    Args:
        without_rows: rank known users as if they had no row either.
        list_length: count how many of the lists of so many items each item is in; 0 counts nothing.
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
    everyones = _over_ranks(values.ravel(), system.world, "metrics of users").reshape(values.shape)
    return Evaluation(users, tuple(metrics), everyones, _over_ranks(listed, system.world, "counts of items"))


def _over_ranks(values: np.ndarray, world: World, what: str) -> np.ndarray:
    """Sum over the ranks, each of which has its own users' values and zeros for the others."""
    if not len(values):
        return values
    return all_reduce_sum(torch.from_numpy(values).to(world.device), world, what).cpu().numpy()
