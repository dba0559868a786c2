"""Exact top-K over item rows that are sharded over ranks, by the LLM's scores, the linear memory's, or their sum.

Each rank scores its rows in chunks and keeps K candidates for each query, and the candidates of all ranks are merged.
Scores of all queries and items are never stored.

Legend: n queries of this rank, N of all ranks, b queries of a block, C rows of a chunk, K recommendations, D width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from cllm4rec_dist.distributed.collectives import all_gather_rows, all_reduce_sum, all_to_all_rows, gather_counts
from cllm4rec_dist.distributed.topology import RowPartition, World
from cllm4rec_dist.model.linear_cross_entropy import max_logits_for
from cllm4rec_dist.model.linear_memory import LinearMemory
from cllm4rec_dist.model.new_items import NewItems

_BLOCK = 512
"""Queries scored together: enough for a fast matrix product, few enough for long chunks of rows."""
_CHUNK_FACTOR = 2
"""Size of a chunk of scores relative to `max_logits_for`: scores are read once here, so that caches matter less."""
_PEAK_ROWS = 16
"""Neighbouring scores whose maximum is compared first."""
_FIRST_PARTS = 8
"""Parts of the first chunk: only the first keeps all ties with a query's K-th best, as most linear scores are zero."""
LLM_ALONE, LINEAR_ALONE = 0.0, math.inf
"""Weights of the linear memory by which one of both scores counts alone."""


@dataclass(frozen=True)
class Queries:
    """Queries of this rank.

    Attributes:
        vectors: [n, D]; n may differ between ranks and be 0.
        history: int64 [h, 2] pairs (query of this rank, item row), each once, for the linear memory.
    """

    vectors: Tensor
    history: Tensor

    def take(self, index: Sequence[int]) -> Queries:
        """Select queries in the given order, each at most once."""
        chosen = torch.tensor(index, dtype=torch.int64, device=self.vectors.device)
        position = chosen.new_full((len(self.vectors),), -1)
        position[chosen] = torch.arange(len(chosen), device=chosen.device)
        query = position[self.history[:, 0]]
        history = torch.stack([query, self.history[:, 1]], dim=1)[query >= 0]
        return Queries(self.vectors[chosen], history)


def sharded_topk(
    queries: Tensor,
    local_weight: Tensor,
    num_best: int,
    seen: Tensor,
    partition: RowPartition,
    world: World,
    max_logits: int | None = None,
    candidates: Tensor | None = None,
    new_items: NewItems | None = None,
) -> tuple[Tensor, Tensor]:
    """Return scores and rows of the `num_best` highest dot products of each query over all shards.

    Args:
        queries: [n, D].
        others: as for `mixed_topk`.

    Returns:
        scores [n, K] and int64 rows [n, K], highest first.
    """
    memory = LinearMemory(partition, world)
    unmixed = Queries(queries, seen[:0])
    ((scores, rows),) = mixed_topk(
        unmixed, local_weight, memory, (LLM_ALONE,), num_best, seen, world, max_logits, candidates, new_items
    )
    return scores, rows


def mixed_topk(
    queries: Queries,
    local_weight: Tensor,
    memory: LinearMemory,
    weights: Sequence[float],
    num_best: int,
    seen: Tensor,
    world: World,
    max_logits: int | None = None,
    candidates: Tensor | None = None,
    new_items: NewItems | None = None,
) -> list[tuple[Tensor, Tensor]]:
    """Return scores and rows of the `num_best` best items of each query, for each weight of the linear memory.

    Args:
        local_weight: [local rows, D], this rank's rows of the output weight.
        weights: factors of the linear score that is added to the dot product, at least 0: `LLM_ALONE` is 0, and
            `LINEAR_ALONE` ranks by the linear score alone.
        num_best: K, from 1 to the number of items, or of candidates.
        seen: int64 [s, 2] pairs (query of this rank, global row) to exclude (score -inf).
        max_logits: scores held at a time.
        candidates: bool [I], the same on all ranks; rank only these rows. None for all of them.
        new_items: items to rank too, with the rows I, I + 1, ..., also in histories, `seen` and `candidates`.

    Returns:
        for each weight scores [n, K] and int64 rows [n, K], highest first; equal scores in the order of their rows.

    Collectives: all-gathers queries and pairs; two all-to-alls of K candidates for each query and rank, by weight.
    """
    partition = memory.partition
    num_items = partition.num_rows + (0 if new_items is None else len(new_items))
    assert 1 <= num_best <= (num_items if candidates is None else int(candidates.sum()))
    counts = gather_counts(len(queries.vectors), world)
    vectors = all_gather_rows(queries.vectors, counts, world)
    all_seen = all_gather_pairs(seen, counts, world)
    needs_memory = any(weight != LLM_ALONE for weight in weights) and not memory.is_empty
    history = all_gather_pairs(queries.history, counts, world) if needs_memory else seen[:0]
    first, stop = partition.range(world.rank)
    rows = torch.arange(stop - first, device=vectors.device)
    if candidates is not None:
        rows = rows[candidates[first:stop]]
        local_weight = local_weight[rows]
    max_logits = max_logits or _CHUNK_FACTOR * max_logits_for(vectors.device)
    shard = _Shard(local_weight, rows, first, memory, max_logits)
    found = _local_topk(vectors, history, shard, weights, num_best, all_seen)
    best = [_merge(scores, rows, counts, num_best, world) for scores, rows in found]
    if new_items is None:
        return best
    rows = torch.arange(len(new_items), device=vectors.device)
    if candidates is not None:
        rows = rows[candidates[partition.num_rows :]]
    shard = _Shard(new_items.output_weight[rows], rows, partition.num_rows, new_items.linear, max_logits)
    of_new = _local_topk(queries.vectors, queries.history, shard, weights, num_best, seen)
    # New items come last, so that equal scores stay in the order of the rows.
    both = [[torch.cat(pair, dim=1) for pair in zip(*parts, strict=True)] for parts in zip(best, of_new, strict=True)]
    return [_best(scores, rows, num_best) for scores, rows in both]


def score_deviations(queries: Queries, local_weight: Tensor, memory: LinearMemory, world: World) -> Tensor:
    """Return the standard deviations over the catalog of each query's dot products and linear scores: fp64 [N, 2].

    All ranks get those of all queries. Collectives: all-gathers queries and pairs, all-reduces [2, N, 2].
    """
    counts = gather_counts(len(queries.vectors), world)
    vectors = all_gather_rows(queries.vectors, counts, world)
    history = all_gather_pairs(queries.history, counts, world)
    rows = torch.arange(len(local_weight), device=vectors.device)
    shard = _Shard(local_weight, rows, 0, memory, max_logits_for(vectors.device))
    sums = torch.zeros(2, len(vectors), 2, dtype=torch.float64, device=vectors.device)
    for start in range(0, len(vectors), _BLOCK):
        block = Queries(vectors[start : start + _BLOCK], _pairs_of_block(history, start))
        for _, dots, linear, _ in shard.chunks(block, 1):
            for column, scores in enumerate((dots.double(), linear.double())):
                sums[0, start : start + _BLOCK, column] += scores.sum(dim=0)
                sums[1, start : start + _BLOCK, column] += scores.square().sum(dim=0)
    mean, mean_square = all_reduce_sum(sums, world, "moments of scores") / memory.partition.num_rows
    return (mean_square - mean.square()).clamp(min=0).sqrt()


def all_gather_pairs(pairs: Tensor, counts: list[int], world: World) -> Tensor:
    """Gather pairs (query of a rank, row) of all ranks as pairs (query of all ranks, row), int64 [s, 2].

    Args:
        counts: number of queries of each rank.
    """
    pairs = pairs + torch.tensor([sum(counts[: world.rank]), 0], device=pairs.device)
    return all_gather_rows(pairs, gather_counts(len(pairs), world), world)


def _merge(scores: Tensor, rows: Tensor, counts: list[int], num_best: int, world: World) -> tuple[Tensor, Tensor]:
    """Bring the candidates [N, K] of all ranks to the queries' ranks, and return the best of each: [n, K]."""
    received = [counts[world.rank]] * world.size
    scores = all_to_all_rows(scores, counts, received, world).view(world.size, -1, num_best).transpose(0, 1).flatten(1)
    rows = all_to_all_rows(rows, counts, received, world).view(world.size, -1, num_best).transpose(0, 1).flatten(1)
    rows, by_row = rows.sort(dim=1)  # padding rows, which are past the end, come last
    return _best(scores.gather(1, by_row), rows, num_best)


def _best(scores: Tensor, rows: Tensor, num_best: int) -> tuple[Tensor, Tensor]:
    """Return the highest scores, best first, and their rows; equal scores keep their order."""
    scores, order = scores.sort(dim=1, descending=True, stable=True)
    return scores[:, :num_best].contiguous(), rows.gather(1, order[:, :num_best])


@dataclass(frozen=True)
class _Shard:
    """Item rows that this rank scores.

    Attributes:
        weight: [r, D], rows of the output weight.
        rows: int64 [r], their local rows, ascending.
        first: global row of local row 0.
        max_logits: scores held at a time.
    """

    weight: Tensor
    rows: Tensor
    first: int
    memory: LinearMemory
    max_logits: int

    def chunks(self, queries: Queries, num_best: int) -> Iterator[tuple[int, Tensor, Tensor, Tensor]]:
        """Yield the first row, dot products [C, b], linear scores [C, b] and their entries of each chunk of rows.

        The next chunk, of at least `num_best` rows if there are so many, overwrites scores. Linear ones are zero but
        at their entries, int64 [e] positions in the flattened scores, and empty, [0, b], if no query has a history.
        """
        num_queries = len(queries.vectors)
        chunk = max(num_best, self.max_logits // num_queries, 1)
        size = num_queries * min(chunk, len(self.weight))
        # New pages for each chunk would take time, and so would zeros in all of them.
        dots, linear = queries.vectors.new_empty(size), queries.vectors.new_zeros(size * bool(len(queries.history)))
        for start in range(0, len(self.weight), chunk):
            weight, rows = self.weight[start : start + chunk], self.rows[start : start + chunk]
            # [rows, queries]: maxima over neighbouring rows are then computed for many queries at once.
            shape = len(rows), num_queries
            scores = torch.mm(weight, queries.vectors.T, out=dots[: len(rows) * num_queries].view(shape))
            added = linear[: len(rows) * num_queries]
            entries = self.memory.add_scores(added.view(-1, num_queries), rows, queries.history)
            yield start, scores, added.view(-1, num_queries), entries
            added[entries] = 0.0


def mixed_scores(dots: Tensor, linear: Tensor, weight: float) -> Tensor:
    """Return dots + weight x linear [C, b], `dots` itself or `linear` itself if only that counts.

    Args:
        linear: empty if all linear scores are zero.
    """
    if weight == LINEAR_ALONE:
        return linear if len(linear) else torch.zeros_like(dots)
    return dots if weight == LLM_ALONE or not len(linear) else torch.add(dots, linear, alpha=weight)


def _local_topk(
    vectors: Tensor, history: Tensor, shard: _Shard, weights: Sequence[float], num_best: int, seen: Tensor
) -> list[tuple[Tensor, Tensor]]:
    """Return this rank's candidates [N, K] and their global rows for each weight.

    They are padded with score -inf and rows that are past the end if there are fewer rows.

    Args:
        history, seen: int64 [.., 2] pairs (query, global row).
    """
    global_rows = shard.rows + shard.first
    past = shard.memory.partition.num_rows
    seen = _local_pairs(seen, global_rows)
    found: list[list[tuple[Tensor, Tensor]]] = [[] for _ in weights]
    for start in range(0, len(vectors), _BLOCK):
        block = Queries(vectors[start : start + _BLOCK], _pairs_of_block(history, start))
        best = _block_topk(block, shard, weights, min(num_best, len(shard.rows)), _pairs_of_block(seen, start))
        for parts, (scores, rows) in zip(found, best, strict=True):
            missing = num_best - scores.shape[1]
            padding = past + torch.arange(missing, device=rows.device).expand(len(rows), -1)
            parts.append((F.pad(scores, (0, missing), value=-torch.inf), torch.cat([global_rows[rows], padding], 1)))
    no_scores, no_rows = vectors.new_empty(0, num_best), seen.new_empty(0, num_best)
    return [
        (torch.cat([no_scores, *(part[0] for part in parts)]), torch.cat([no_rows, *(part[1] for part in parts)]))
        for parts in found
    ]


def _pairs_of_block(pairs: Tensor, start: int) -> Tensor:
    """Return the pairs of queries start..start+`_BLOCK`-1, with queries counted from `start`, in their order."""
    inside = pairs[(pairs[:, 0] >= start) & (pairs[:, 0] < start + _BLOCK)]
    return torch.stack([inside[:, 0] - start, inside[:, 1]], dim=1)


def _local_pairs(seen: Tensor, weight_rows: Tensor) -> Tensor:
    """Map pairs (query, global row) to (query, row of the weight), without those of other rows, sorted by row."""
    if not len(weight_rows):
        return seen[:0]
    index = torch.searchsorted(weight_rows, seen[:, 1].contiguous()).clamp_(max=len(weight_rows) - 1)
    pairs = torch.stack([seen[:, 0], index], dim=1)[weight_rows[index] == seen[:, 1]]
    return pairs[pairs[:, 1].argsort()]


def _block_topk(
    queries: Queries, shard: _Shard, weights: Sequence[float], num_best: int, seen: Tensor
) -> list[tuple[Tensor, Tensor]]:
    """Return scores and rows of the shard [b, K] of a block of queries, for each weight.

    Args:
        seen: int64 [s, 2] pairs (query, row of the shard) to exclude, sorted by row.
    """
    running = [_RunningTopk(queries.vectors, num_best, len(shard.rows)) for _ in weights]
    seen_rows = seen[:, 1].contiguous()
    for start, dots, linear, entries in shard.chunks(queries, num_best):
        low, high = torch.searchsorted(seen_rows, seen_rows.new_tensor([start, start + len(dots)])).tolist()
        query, row = seen[low:high].T
        llm_entries, linear_entries = dots.view(-1)[entries], linear.view(-1)[entries]
        for best, weight in zip(running, weights, strict=True):
            if weight == LINEAR_ALONE:
                scores = mixed_scores(dots, linear, weight).clone()
            else:  # a sum of all scores would read and write millions to change thousands
                dots.view(-1)[entries] = mixed_scores(llm_entries, linear_entries, weight)
                scores = dots
            scores[row - start, query] = -torch.inf
            best.add(scores, start)
    return [(best.scores, best.rows) for best in running]


class _RunningTopk:
    """The K best rows of a block of queries among the chunks added so far.

    In the first chunk of rows, K groups of neighbouring rows have a maximum of at least the K-th highest maximum, so
    that lower scores cannot be among the K best. In later chunks only scores above a query's K-th best count. These are
    few, and are merged whenever the number of processed rows has grown by half.

    Args:
        like: [b, D], queries, whose dtype and device the scores have.
        num_rows: rows of all chunks.

    Attributes:
        scores, rows: [b, K], best first, once all chunks are added.
    """

    def __init__(self, like: Tensor, num_best: int, num_rows: int) -> None:
        self._num_best, self._num_rows, self._merged = num_best, num_rows, 0
        self.scores = like.new_empty(len(like), 0)
        self.rows = torch.empty(len(like), 0, dtype=torch.int64, device=like.device)
        self._pending: list[tuple[Tensor, Tensor, Tensor]] = []

    def add(self, scores: Tensor, start: int) -> None:
        """Add the scores [C, b] of rows start..start+C-1; the first chunk has at least K rows."""
        first = len(scores) // _FIRST_PARTS
        if start == 0 and first >= self._num_best:
            self._add(scores[:first], 0)
            self._add(scores[first:], first)
        else:
            self._add(scores, start)

    def _add(self, scores: Tensor, start: int) -> None:
        peaks = _row_groups(scores).amax(dim=1)
        if start == 0:
            source = peaks if len(peaks) >= self._num_best else scores
            lowest = source.topk(self._num_best, dim=0)[0][-1]
            query, row, score = _above_threshold(scores, peaks, lowest, torch.ge)
        else:  # an equal score loses, because its row is higher
            query, row, score = _above_threshold(scores, peaks, self.scores[:, -1], torch.gt)
        self._pending.append((query, row + start, score))
        done = start + len(scores)
        if 2 * done >= 3 * self._merged or done == self._num_rows:
            self._merged = done
            self._merge()

    def _merge(self) -> None:
        query, row, score = (torch.cat(parts) for parts in zip(*self._pending, strict=True))
        rows, scores = _padded(query, row, score, len(self.scores))
        all_rows = torch.cat([self.rows, rows], dim=1)
        self.scores, self.rows = _best(torch.cat([self.scores, scores], dim=1), all_rows, self._num_best)
        self._pending = []


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
