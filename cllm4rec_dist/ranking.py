"""Prediction: one forward over a user's whole history, exact top-K over the whole catalog.

No text is generated, so no item is made up; items of the training history are left out. Scores are never held for
[users, items]: each rank scores its rows in chunks and keeps K candidates a user, and the candidates are merged.

Legend: n users of this rank in a block, N of all ranks, I items, K recommendations.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from cllm4rec_dist.collectives import all_gather_rows, all_reduce_sum, all_to_all_rows, gather_counts
from cllm4rec_dist.corpus.prompts import collate
from cllm4rec_dist.corpus.ragged import Ragged
from cllm4rec_dist.metrics import MetricResult, MetricSums, largest_cutoff, sum_topk
from cllm4rec_dist.model.heads import MAX_LOGITS
from cllm4rec_dist.system import System
from cllm4rec_dist.topology import RowPartition, World


@dataclass(frozen=True)
class Ranking:
    """Best items of a block of users.

    Attributes:
        users: int64 [n] user rows.
        items: int64 [n, K] item rows, best first; equal scores in the order of the rows.
        scores: [n, K]; -inf where fewer than K items were left to recommend.
    """

    users: np.ndarray
    items: np.ndarray
    scores: np.ndarray


def sharded_topk(
    queries: Tensor,
    local_operand: Tensor,
    num_best: int,
    seen: Tensor,
    partition: RowPartition,
    world: World,
    max_logits: int = MAX_LOGITS,
) -> tuple[Tensor, Tensor]:
    """Scores and rows of the `num_best` highest products per query over all shards.

    Args:
        queries: [n, D]; n may differ between ranks and be 0.
        local_operand: [rows of this rank, D].
        num_best: K, at most the number of rows.
        seen: int64 [s, 2] pairs (query of this rank, global row) that are left out (score -inf).

    Returns:
        scores [n, K] and int64 rows [n, K], highest first.

    Collectives: all-gathers queries and pairs; one all-to-all of K candidates for each query and rank.
    """
    assert num_best <= partition.num_rows
    counts = gather_counts(len(queries), world)
    all_queries = all_gather_rows(queries, counts, world)
    seen = seen + torch.tensor([sum(counts[: world.rank]), 0], device=seen.device)
    all_seen = all_gather_rows(seen, gather_counts(len(seen), world), world)
    scores, rows = _local_topk(all_queries, local_operand, num_best, all_seen, partition, world, max_logits)

    mine = [counts[world.rank]] * world.size
    scores = all_to_all_rows(scores, counts, mine, world).view(world.size, -1, num_best).transpose(0, 1).flatten(1)
    rows = all_to_all_rows(rows, counts, mine, world).view(world.size, -1, num_best).transpose(0, 1).flatten(1)
    return _best(scores, rows, num_best)


def _best(scores: Tensor, rows: Tensor, num_best: int) -> tuple[Tensor, Tensor]:
    """Highest scores first, equal ones by row."""
    by_row = rows.argsort(dim=1)
    scores, rows = scores.gather(1, by_row), rows.gather(1, by_row)
    best = scores.argsort(dim=1, descending=True, stable=True)[:, :num_best]
    return scores.gather(1, best), rows.gather(1, best)


def _topk(scores: Tensor, num_best: int) -> tuple[Tensor, Tensor]:
    """`torch.topk`, but of equal scores at the end the first columns, where torch takes any."""
    top, place = scores.topk(num_best, dim=1)
    tied = (scores >= top[:, -1:]).sum(dim=1) > num_best
    if tied.any():
        by_score = scores[tied].argsort(dim=1, descending=True, stable=True)[:, :num_best]
        place[tied], top[tied] = by_score, scores[tied].gather(1, by_score)
    return top, place


def _local_topk(
    queries: Tensor,
    operand: Tensor,
    num_best: int,
    seen: Tensor,
    partition: RowPartition,
    world: World,
    max_logits: int,
) -> tuple[Tensor, Tensor]:
    """This rank's candidates [N, K]; where it has fewer rows, places are filled with -inf and rows past the end."""
    chunk = max(num_best, max_logits // max(1, len(queries)))
    first = partition.range(world.rank)[0]
    best_scores = queries.new_full((len(queries), num_best), -torch.inf)
    best_rows = partition.num_rows + torch.arange(num_best, device=queries.device).expand(len(queries), -1)
    for start in range(0, len(operand), chunk):
        scores = queries @ operand[start : start + chunk].T
        rows = seen[:, 1] - (first + start)
        inside = (rows >= 0) & (rows < scores.shape[1])
        scores[seen[inside, 0], rows[inside]] = -torch.inf
        top, place = _topk(scores, min(num_best, scores.shape[1]))
        joined = torch.cat([best_scores, top], dim=1)
        best_scores, best_rows = _best(joined, torch.cat([best_rows, place + (first + start)], dim=1), num_best)
    return best_scores, best_rows


@torch.no_grad()
def rank_users(
    system: System,
    users: np.ndarray,
    num_best: int,
    batch_users: int,
    progress: Callable[[int], object] = lambda done: None,
) -> Iterator[Ranking]:
    """Rank the catalog for `users`, block by block.

    Every rank is given all of `users` and yields its part; parts are disjoint and cover everyone. Collective: all
    ranks must exhaust the iterator, which has equally many blocks on each.

    Args:
        users: int64 user rows, the same on all ranks.
        num_best: K; cut to the size of the catalog.
        batch_users: users of this rank in a block.
        progress: told how many users each block finished, over all ranks.
    """
    world, model, composer = system.world, system.recommender, system.composer
    history = system.corpus.split("train")
    num_best = min(num_best, system.corpus.num_items)
    block = batch_users * world.size
    # Histories of like length beside each other: rows are short, and attention is paid by their length.
    users = users[np.argsort(history.lengths[users], kind="stable")]
    system.train(False)
    operand = model.item_operand()
    for start in range(0, len(users), block):
        low, high = world.share(start, min(start + block, len(users)))
        block_users = users[low:high]
        documents = collate([composer.prediction(int(u), history[int(u)]) for u in block_users], composer.space)
        documents = documents.to(world.device)
        embedded, item_rows = model.embed(model.collaborative, model.route(documents))
        with world.watch.collective("ZeRO-3 forward"):
            hidden, _ = system.engine(embedded, None, documents.positions)
        assert hidden is not None
        queries = model.item_queries(hidden, item_rows, documents)
        seen = _pairs(history, block_users).to(world.device)
        scores, rows = sharded_topk(queries, operand, num_best, seen, model.item_partition, world)
        yield Ranking(block_users, rows.cpu().numpy(), scores.float().cpu().numpy())
        progress(min(start + block, len(users)) - start)


def _pairs(history: Ragged, users: np.ndarray) -> Tensor:
    """int64 [s, 2] pairs (place in `users`, item row) of everything they have seen."""
    taken = history.take(users)
    place = np.repeat(np.arange(len(users)), np.diff(taken.offsets))
    return torch.from_numpy(np.stack([place, taken.values.astype(np.int64)], axis=1))


def evaluate(
    system: System,
    split: str,
    metrics: Sequence[str],
    batch_users: int,
    progress: Callable[[int], object] = lambda done: None,
) -> MetricResult:
    """Metrics of the ranking against the held-out items of `split`, over all users who have any. Collective."""
    heldout = system.corpus.split(split)
    users = np.flatnonzero(np.diff(heldout.offsets))
    width = len(metrics)
    sums = MetricSums(tuple(metrics), np.zeros(width), np.zeros(width), 0, 0)
    for ranking in rank_users(system, users, largest_cutoff(metrics), batch_users, progress):
        if len(ranking.users):
            sums += sum_topk(ranking.items, heldout.take(ranking.users), metrics, system.corpus.num_items)
    return _total(sums, system.world, system.corpus.num_users - len(users)).result()


def _total(sums: MetricSums, world: World, num_skipped: int) -> MetricSums:
    packed = torch.tensor([*sums.total, *sums.total_squares, sums.num_users], dtype=torch.float64, device=world.device)
    packed = all_reduce_sum(packed, world, "metrics")
    total, squares = packed[:-1].cpu().numpy().reshape(2, -1)
    return MetricSums(sums.names, total, squares, int(packed[-1]), num_skipped)
