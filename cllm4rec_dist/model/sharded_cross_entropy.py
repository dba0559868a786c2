"""The cross-entropy of `linear_cross_entropy.py` over classes that are sharded over the ranks.

Queries are all-gathered, each rank scores its local rows, and a maximum and two sums are reduced. One target per
position is language modeling (the paper's pretraining), several are the multinomial likelihood of its finetuning.

Legend: n positions of this rank, N of all ranks, D width, M targets of this rank.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from cllm4rec_dist.distributed.collectives import (
    PendingCollective,
    all_gather_rows,
    all_to_all_rows,
    combine_logsumexp,
    gather_integers,
    reduce_scatter_rows,
    start_all_gather_rows,
)
from cllm4rec_dist.distributed.topology import RowPartition, World
from cllm4rec_dist.model.linear_cross_entropy import chunked_logsumexp_and_scores, count_targets


class _GatherRoundedQueries(torch.autograd.Function):
    """Rounded queries of all ranks [N, D] as a function of this rank's, whose gradients are rounded on their way, too.

    Gradients are exchanged by an all-to-all and summed here in fp32: a reduce-scatter would round each partial sum.
    """

    @staticmethod
    def forward(ctx: Any, queries: Tensor, pending: PendingCollective, counts: list[int], world: World) -> Tensor:
        ctx.counts, ctx.world = counts, world
        return pending.wait()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        num_local, world = ctx.counts[ctx.world.rank], ctx.world
        parts = all_to_all_rows(grad.contiguous(), ctx.counts, [num_local] * world.size, world, "query gradients")
        return parts.view(world.size, num_local, grad.shape[1]).sum(0, dtype=torch.float32), None, None, None


class GatheringQueries:
    """A started gather of queries and targets to the ranks that own item rows, and the reduction of their results.

    The all-gathers overlap with what is computed between construction and `wait`. The planner has a subclass that makes
    tensors of the same sizes (`planning/dry_run.py`).

    Args:
        queries: [n, D] of this rank; n may differ between ranks and be 0.
        target_query, target_row: int64 [M]; queries of this rank and global rows.
        partition: assignment of rows to ranks.
        comm_dtype: dtype of queries and their gradients in communication; that of the queries if None. A rank's own
            queries are rounded too, so that results do not depend on the partition. Gradients are summed in fp32.

    Collectives: all-gathers two integers, and starts to all-gather queries and target pairs.
    """

    def __init__(
        self,
        queries: Tensor,
        target_query: Tensor,
        target_row: Tensor,
        partition: RowPartition,
        world: World,
        comm_dtype: torch.dtype | None = None,
    ) -> None:
        self.queries, self.partition, self.world, self.comm_dtype = queries, partition, world, comm_dtype
        # Gather both counts at once, because each gather synchronizes with the GPU.
        counts_by_rank = gather_integers([len(queries), len(target_query)], world, what="counts of queries and targets")
        self.counts, target_counts = ([*counts] for counts in zip(*counts_by_rank, strict=True))
        pairs = torch.stack([target_query + sum(self.counts[: world.rank]), target_row], dim=1)
        sent = queries.detach() if comm_dtype is None else queries.detach().to(comm_dtype)
        self._pending_queries = start_all_gather_rows(sent, self.counts, world, "queries")
        self._pending_pairs = start_all_gather_rows(pairs, target_counts, world, "targets")
        self.num_targets = count_targets(target_query, len(queries))

    def wait(self) -> tuple[Tensor, Tensor, Tensor]:
        """Queries of all ranks [N, D], and query and local row, int64 [m] each, of the targets that this rank owns.

        Backward reduce-scatters the gradient of the queries, or with a `comm_dtype` exchanges it in an all-to-all.
        """
        if self.comm_dtype is None:
            queries = all_gather_rows(self.queries, self.counts, self.world, self._pending_queries)
        else:
            queries = _GatherRoundedQueries.apply(self.queries, self._pending_queries, self.counts, self.world)
        pairs = self._pending_pairs.wait()
        start, stop = self.partition.range(self.world.rank)
        local = pairs[(pairs[:, 1] >= start) & (pairs[:, 1] < stop)]
        return queries, local[:, 0], local[:, 1] - start

    def sample(
        self, num_negatives: int, key: Tensor, target_row: Tensor, cumulative_counts: np.ndarray | None
    ) -> tuple[Tensor, Tensor]:
        """Local rows of a sampled softmax (`sample_rows`)."""
        num_local = self.partition.num_local(self.world.rank)
        return sample_rows(num_local, num_negatives, int(key), target_row, self.world, cumulative_counts)

    def reduce(self, lse: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
        """Combine log-sum-exps and target scores of local rows, [N], into those of all rows, [n] of this rank.

        Collectives: all-reduces a maximum and a sum of [N]; reduce-scatters [N].
        """
        lse = combine_logsumexp(lse, self.counts, self.world)
        return lse, reduce_scatter_rows(scores, self.counts, self.world)


def sharded_cross_entropy(
    gathering: GatheringQueries,
    local_weight: Tensor,
    num_negatives: int = 0,
    key: Tensor | None = None,
    max_logits: int | None = None,
    compute_dtype: torch.dtype | None = None,
    bias: Tensor | None = None,
    *,
    normalize: bool = False,
    accumulate: bool = False,
    sparse: bool = False,
    cumulative_counts: np.ndarray | None = None,
) -> Tensor:
    """`linear_cross_entropy` over rows that are sharded over the ranks.

    Args:
        local_weight: [rows of this rank, D]; its gradient has its dtype.
        num_negatives: rows, over all ranks, of a sampled softmax; 0 for the exact one.
        key: int64 [] seed of the sample; equal keys draw equal rows. May differ between ranks.
        compute_dtype: dtype to which factors of products are rounded, after the gather; that of the queries before it
            if None.
        bias: [rows of this rank, 1], added to the scores of the rows; never rounded.
        normalize: score the directions of the rows (`chunked_logsumexp_and_scores`).
        accumulate: let backward add the gradient of `local_weight`, a leaf, to its `grad` itself
            (`chunked_logsumexp_and_scores`); not used for a sampled softmax.
        sparse: give `local_weight` and `bias` sparse gradients in a sampled softmax.
        cumulative_counts: see `sample_rows`.

    Returns:
        [n] of this rank. Its gradients are those of the sum over all ranks.

    Collectives: those of `GatheringQueries`.
    """
    queries, target_query, target_row = gathering.wait()
    if num_negatives:
        assert key is not None
        rows, log_weight = gathering.sample(num_negatives, key, target_row, cumulative_counts)
        target_row = torch.searchsorted(rows, target_row)
        local_weight, log_weight = F.embedding(rows, local_weight, sparse=sparse), log_weight[:, None]
        bias = log_weight if bias is None else F.embedding(rows, bias, sparse=sparse) + log_weight
        accumulate = False
    queries = queries.to(gathering.queries.dtype if compute_dtype is None else compute_dtype)
    parts = chunked_logsumexp_and_scores(
        queries,
        local_weight,
        target_query,
        target_row,
        max_logits,
        bias=None if bias is None else bias.squeeze(1),
        normalize=normalize,
        accumulate=accumulate,
    )
    lse, scores = gathering.reduce(*parts)
    return gathering.num_targets * lse - scores


def sample_rows(
    num_local: int,
    num_negatives: int,
    key: int,
    targets: Tensor,
    world: World,
    cumulative_counts: np.ndarray | None = None,
) -> tuple[Tensor, Tensor]:
    """Draw the rows of a sampled softmax, and the log of the importance weight of each.

    Targets have weight 1, as in the exact softmax. The others represent all rows that are not targets: the estimate of
    the sum of exponentials is unbiased (its logarithm is not).

    Args:
        num_local: rows of this rank.
        num_negatives: rows to draw over all ranks, evenly; duplicates count once, with a larger weight if rows differ
            in probability.
        key: seed of the draw.
        targets: int64 [m], local rows of the targets of all ranks that this rank owns.
        cumulative_counts: int64 [num_local], cumulative sums of the numbers to which probabilities are proportional;
            uniform if None.

    Returns:
        Distinct local rows, int64 [c] ascending, and log weights, fp32 [c]. No collective.
    """
    generator = np.random.default_rng([key & 0xFFFFFFFFFFFFFFFF, world.rank])
    count, targets = -(-num_negatives // world.size), targets.unique()
    if num_local == 0:
        return targets, torch.empty(0, device=targets.device)
    if cumulative_counts is None:
        drawn = generator.integers(num_local, size=count)
    else:
        drawn = np.searchsorted(cumulative_counts, generator.integers(cumulative_counts[-1], size=count), side="right")
    rows, index = torch.cat([targets, torch.from_numpy(drawn).to(targets.device)]).unique(return_inverse=True)
    if cumulative_counts is None:
        others = len(rows) - len(targets)
        log_weight = torch.full(rows.shape, math.log((num_local - len(targets)) / others) if others else 0.0)
        log_weight = log_weight.to(rows.device)
    else:
        log_weight = _log_importance(drawn, index[len(targets) :], len(rows), cumulative_counts)
    return rows, log_weight.index_fill_(0, index[: len(targets)], 0.0)


def _log_importance(drawn: np.ndarray, index: Tensor, num_rows: int, cumulative_counts: np.ndarray) -> Tensor:
    """Log of how often each of `num_rows` distinct rows was drawn over how often that is expected, fp32.

    Args:
        drawn: rows in the order of the draws.
        index: int64, position of each among the distinct rows.
    """
    counts = cumulative_counts[drawn] - np.where(drawn > 0, cumulative_counts[drawn - 1], 0)
    expected = torch.from_numpy(counts * (len(drawn) / cumulative_counts[-1])).float().to(index.device)
    times = expected.new_zeros(num_rows).index_add_(0, index, torch.ones_like(expected))
    return times.div_(torch.ones_like(times).index_copy_(0, index, expected)).log_()
