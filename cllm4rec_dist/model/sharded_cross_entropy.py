"""Cross-entropies over many classes that never store logits of [positions, classes].

A loss over items or words needs only a log-sum-exp over the classes and the scores of the targets:

    nll_p = N_p * logsumexp_c(q_p . w_c) - sum over p's N_p targets t of q_p . w_t

`chunked_logsumexp_and_scores` computes both on one device, in chunks of classes that backward recomputes.
`sharded_cross_entropy` computes them over row shards: queries are all-gathered, each rank scores its local rows, and a
maximum and two sums are reduced. One target per position is language modeling (the paper's pretraining), several are
the multinomial likelihood of its finetuning.

Legend: n positions of this rank, N of all ranks, C classes, D width, M targets of this rank.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from cllm4rec_dist.distributed.collectives import (
    all_gather_rows,
    combine_logsumexp,
    gather_integers,
    reduce_scatter_rows,
    start_all_gather_rows,
)
from cllm4rec_dist.distributed.topology import RowPartition, World

Transform = Callable[[Tensor], Tensor]
"""Elementwise function of logits [n, C] with any C."""
_CPU_LOGITS = 1 << 20
"""4 MiB in fp32, so that a chunk of logits stays in a core's cache between the two products that use it."""
_GPU_MEMORY_DIVISOR = 64


def max_logits_for(device: torch.device) -> int:
    """Number of logits that a head holds at a time: what fits a CPU's cache, or a 64th of a GPU's memory."""
    if device.type != "cuda":
        return _CPU_LOGITS
    return max_logits_within(torch.cuda.get_device_properties(device).total_memory)


def max_logits_within(memory: int) -> int:
    """Number of logits that a head holds at a time on a GPU with `memory` bytes."""
    return memory // _GPU_MEMORY_DIVISOR // 4


def _wide_product(left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    """Multiply half-precision matrices and return the sums in `dtype`, which torch would round to half precision.

    A logit of 20 rounded to bf16 is off by 0.06.
    """
    if left.is_cuda:
        return torch.mm(left, right, out_dtype=dtype)
    return left.to(dtype) @ right.to(dtype)  # torch has no `out_dtype` on CPUs


def _logits(queries: Tensor, rows: Tensor, shift: Tensor | None, buffer: Tensor) -> Tensor:
    """queries @ rows.T (+ shift), in the buffer's dtype and memory, since new pages for each chunk cost time."""
    out = buffer[: len(queries) * len(rows)].view(len(queries), len(rows))
    if queries.dtype != out.dtype:
        out = _wide_product(queries, rows.T, out.dtype)
        return out if shift is None else out.add_(shift)
    return torch.mm(queries, rows.T, out=out) if shift is None else torch.addmm(shift, queries, rows.T, out=out)


class _ChunkedLogSumExpAndScores(torch.autograd.Function):
    """Log-sum-exp over all classes and scores of the targets, in one function so that `weight` has one gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        queries: Tensor,
        weight: Tensor,
        target_query: Tensor,
        target_row: Tensor,
        max_logits: int,
        transform: Transform | None,
    ) -> tuple[Tensor, Tensor]:
        ctx.transform = transform
        ctx.chunk = chunk = max(1, max_logits // max(1, len(queries)))
        wide = torch.promote_types(queries.dtype, torch.float32)
        highest = queries.new_full((len(queries),), -math.inf, dtype=wide)
        total = torch.zeros_like(highest)
        buffer = highest.new_empty(min(chunk, len(weight)) * len(queries))
        for rows in weight.split(chunk) if len(weight) else ():
            logits = _logits(queries, rows.to(queries.dtype), None, buffer)
            if transform is not None:
                logits = transform(logits)
            raised = torch.maximum(highest, logits.amax(dim=1))
            total.mul_((highest - raised).exp_()).add_(logits.sub_(raised[:, None]).exp_().sum(dim=1))
            highest = raised
        lse = highest + total.log_()
        # Round target rows to the dtype of the logits, so that score and log-sum-exp see the same values.
        targets = weight[target_row].to(queries.dtype).to(wide)
        products = (queries[target_query].to(wide) * targets).sum(dim=1)
        if transform is not None:
            products, ctx.target_slope = _with_slope(transform, products[:, None])
            products = products[:, 0]
        scores = torch.zeros_like(lse).index_add_(0, target_query, products)
        ctx.save_for_backward(queries, weight, target_query, target_row, lse)
        return lse, scores

    @staticmethod
    def backward(ctx: Any, grad_lse: Tensor, grad_scores: Tensor) -> tuple[Tensor | None, ...]:
        queries, weight, target_query, target_row, lse = ctx.saved_tensors
        grad_queries = torch.zeros_like(queries, dtype=lse.dtype)
        grad_weight = torch.empty_like(weight) if ctx.needs_input_grad[1] else None
        # Scale the queries instead of the probabilities, which are larger.
        scaled, shift = (queries * grad_lse[:, None]).to(queries.dtype), -lse[:, None]
        buffer = lse.new_empty(min(ctx.chunk, len(weight)) * len(queries))
        for start in range(0, len(weight), ctx.chunk):
            rows = weight[start : start + ctx.chunk].to(queries.dtype)
            if ctx.transform is None:
                probabilities = _logits(queries, rows, shift, buffer).exp_().to(queries.dtype)
            else:
                logits, slope = _with_slope(ctx.transform, _logits(queries, rows, None, buffer))
                probabilities = logits.add_(shift).exp_().mul_(slope).to(queries.dtype)
            if rows.dtype == lse.dtype:
                # Not `addmm_`, which torch's counter of FLOPs does not know.
                torch.addmm(grad_queries, probabilities, rows, out=grad_queries)
            else:
                grad_queries += _wide_product(probabilities, rows, lse.dtype)
            if grad_weight is not None and grad_weight.dtype == rows.dtype == lse.dtype:
                torch.mm(probabilities.T, scaled, out=grad_weight[start : start + ctx.chunk])
            elif grad_weight is not None:
                grad_weight[start : start + ctx.chunk] = _wide_product(probabilities.T, scaled, lse.dtype)
        grad_queries *= grad_lse[:, None]
        grad_targets = grad_scores[target_query, None]
        if ctx.transform is not None:
            grad_targets = grad_targets * ctx.target_slope
        grad_queries.index_add_(0, target_query, grad_targets * weight[target_row].to(queries.dtype))
        if grad_weight is not None:
            grad_weight.index_add_(0, target_row, (grad_targets * queries[target_query]).to(weight.dtype))
        return grad_queries.to(queries.dtype), grad_weight, None, None, None, None


def _with_slope(transform: Transform, logits: Tensor) -> tuple[Tensor, Tensor]:
    """Transformed logits, and the derivative of each by its logit."""
    with torch.enable_grad():
        leaf = logits.detach().requires_grad_()
        transformed = transform(leaf)
        (slope,) = torch.autograd.grad(transformed.sum(), leaf)
    return transformed.detach(), slope


def chunked_logsumexp_and_scores(
    queries: Tensor,
    weight: Tensor,
    target_query: Tensor,
    target_row: Tensor,
    max_logits: int | None = None,
    transform: Transform | None = None,
) -> tuple[Tensor, Tensor]:
    """log sum over c of exp(q . w_c), and the sum of q . w_t over each query's targets, in chunks of classes.

    Backward recomputes each chunk. Nothing of size [n, C] is stored.

    Args:
        queries: [n, D]; products are of this dtype, sums are fp32 or wider and never rounded to it.
        weight: [C, D], C may be 0 (the log-sum-exp is -inf); gets a gradient only if it requires one.
        target_query, target_row: int64 [M] pairs of a query and a row of `weight`.
        max_logits: logits held at a time; `max_logits_for` if None.
        transform: applied to the logits q . w, each by itself; None for the identity.

    Returns:
        Log-sum-exps and summed scores, each [n], fp32 (fp64 for fp64 queries). No collective.
    """
    if max_logits is None:
        max_logits = max_logits_for(queries.device)
    lse, scores = _ChunkedLogSumExpAndScores.apply(queries, weight, target_query, target_row, max_logits, transform)
    return lse, scores


def linear_cross_entropy(
    queries: Tensor,
    weight: Tensor,
    target_query: Tensor,
    target_row: Tensor,
    max_logits: int | None = None,
    transform: Transform | None = None,
) -> Tensor:
    """Negative log-likelihood of each query's targets under a softmax over the local `weight`: [n]. No collective."""
    lse, scores = chunked_logsumexp_and_scores(queries, weight, target_query, target_row, max_logits, transform)
    return count_targets(target_query, len(queries)) * lse - scores


def count_targets(target_query: Tensor, num_queries: int) -> Tensor:
    """Number of targets of each query, int64 [n]. Unlike `bincount`, it works on meta tensors and needs no GPU sync."""
    return target_query.new_zeros(num_queries).index_add_(0, target_query, torch.ones_like(target_query))


class GatheringQueries:
    """A started gather of queries and targets to the ranks that own item rows, and the reduction of their results.

    The all-gathers overlap with what is computed between construction and `wait`. The planner has a subclass that makes
    tensors of the same sizes (`planning/dry_run.py`).

    Args:
        queries: [n, D] of this rank; n may differ between ranks and be 0.
        target_query, target_row: int64 [M]; queries of this rank and global rows.
        partition: assignment of rows to ranks.

    Collectives: all-gathers two integers, and starts to all-gather queries and target pairs.
    """

    def __init__(
        self, queries: Tensor, target_query: Tensor, target_row: Tensor, partition: RowPartition, world: World
    ) -> None:
        self.queries, self.partition, self.world = queries, partition, world
        # Gather both counts at once, because each gather synchronizes with the GPU.
        counts_by_rank = gather_integers([len(queries), len(target_query)], world, what="counts of queries and targets")
        self.counts, target_counts = ([*counts] for counts in zip(*counts_by_rank, strict=True))
        pairs = torch.stack([target_query + sum(self.counts[: world.rank]), target_row], dim=1)
        self._pending_queries = start_all_gather_rows(queries.detach(), self.counts, world, "queries")
        self._pending_pairs = start_all_gather_rows(pairs, target_counts, world, "targets")
        self.num_targets = count_targets(target_query, len(queries))

    def wait(self) -> tuple[Tensor, Tensor, Tensor]:
        """Queries of all ranks [N, D], and query and local row, int64 [m] each, of the targets that this rank owns."""
        queries = all_gather_rows(self.queries, self.counts, self.world, self._pending_queries)
        pairs = self._pending_pairs.wait()
        start, stop = self.partition.range(self.world.rank)
        local = pairs[(pairs[:, 1] >= start) & (pairs[:, 1] < stop)]
        return queries, local[:, 0], local[:, 1] - start

    def sample(self, num_negatives: int, key: Tensor, target_row: Tensor) -> tuple[Tensor, Tensor]:
        """Local rows of a sampled softmax (`sample_rows`)."""
        return sample_rows(self.partition.num_local(self.world.rank), num_negatives, int(key), target_row, self.world)

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
) -> Tensor:
    """`linear_cross_entropy` over rows that are sharded over the ranks.

    Args:
        local_weight: [rows of this rank, D]; its gradient has its dtype.
        num_negatives: rows, over all ranks, of a sampled softmax; 0 for the exact one.
        key: int64 [] seed of the sample; equal keys draw equal rows. May differ between ranks.
        compute_dtype: dtype to which factors of products are rounded, after the gather; the queries' if None.

    Returns:
        [n] of this rank. Its gradients are those of the sum over all ranks.

    Collectives: those of `GatheringQueries`.
    """
    queries, target_query, target_row = gathering.wait()
    if num_negatives:
        assert key is not None
        rows, log_weight = gathering.sample(num_negatives, key, target_row)
        target_row = torch.searchsorted(rows, target_row)
        # An extra column adds the log weights to the logits, like a bias.
        local_weight = torch.cat([local_weight[rows], log_weight[:, None].to(local_weight.dtype)], dim=1)
        queries = F.pad(queries, (0, 1), value=1.0)
    if compute_dtype is not None:
        queries = queries.to(compute_dtype)
    parts = chunked_logsumexp_and_scores(queries, local_weight, target_query, target_row, max_logits)
    lse, scores = gathering.reduce(*parts)
    return gathering.num_targets * lse - scores


def sample_rows(num_local: int, num_negatives: int, key: int, targets: Tensor, world: World) -> tuple[Tensor, Tensor]:
    """Draw the rows of a sampled softmax, and the log of the importance weight of each.

    Targets have weight 1, as in the exact softmax. The others are drawn uniformly and represent all rows that are not
    targets: the estimate of the sum of exponentials is unbiased (its logarithm is not).

    Args:
        num_local: rows of this rank.
        num_negatives: rows to draw over all ranks, evenly; duplicates count once.
        key: seed of the draw.
        targets: int64 [m], local rows of the targets of all ranks that this rank owns.

    Returns:
        Distinct local rows, int64 [c] ascending, and log weights, fp32 [c]. No collective.
    """
    generator = np.random.default_rng([key & 0xFFFFFFFFFFFFFFFF, world.rank])
    count = -(-num_negatives // world.size)
    targets = targets.unique()
    drawn = torch.from_numpy(generator.integers(num_local, size=count)) if num_local else targets.new_empty(0).cpu()
    rows, index = torch.cat([targets, drawn.to(targets.device)]).unique(return_inverse=True)
    others = len(rows) - len(targets)
    log_weight = torch.full(rows.shape, math.log((num_local - len(targets)) / others) if others else 0.0)
    log_weight = log_weight.to(rows.device).index_fill_(0, index[: len(targets)], 0.0)
    return rows, log_weight
