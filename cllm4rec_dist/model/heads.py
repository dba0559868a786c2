"""Softmax heads that never store [positions, classes].

Everything an item or word loss needs is a log-sum-exp over the classes and the scores of the few targets:

    nll_p = N_p * logsumexp_c(q_p . w_c) - sum over p's N_p targets t of q_p . w_t

`chunked_logsumexp` does the first on one device, in chunks of classes, and recomputes in backward. `sharded_nll` does
both over row shards: queries are all-gathered, each rank scores its own rows, a maximum and two sums come back. One
target a position is language modeling (the paper's pretraining), many its multinomial likelihood.

`ItemHead` makes queries and operand from hidden states and table rows; the plain dot product is the paper's.

Legend: n positions of this rank, N of all ranks, C classes, D width, M targets of this rank.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cllm4rec_dist.collectives import all_gather_rows, combine_logsumexp, gather_counts, reduce_scatter_rows
from cllm4rec_dist.topology import RowPartition, World

MAX_LOGITS = 1 << 23
"""Logits held at a time by a head, 32 MiB in fp32: large enough for full matrix-product speed."""


class _ChunkedLogSumExp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, queries: Tensor, weight: Tensor, max_logits: int) -> Tensor:
        chunk = max(1, max_logits // max(1, queries.shape[0]))
        highest = queries.new_full(
            (queries.shape[0],), -math.inf, dtype=torch.promote_types(queries.dtype, torch.float32)
        )
        total = torch.zeros_like(highest)
        for rows in weight.split(chunk) if weight.shape[0] else ():
            logits = (queries @ rows.to(queries.dtype).T).to(highest.dtype)
            raised = torch.maximum(highest, logits.amax(dim=1))
            total.mul_((highest - raised).exp_()).add_(logits.sub_(raised[:, None]).exp_().sum(dim=1))
            highest = raised
        lse = highest + total.log_()
        ctx.save_for_backward(queries, weight, lse)
        ctx.chunk = chunk
        return lse

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None]:
        queries, weight, lse = ctx.saved_tensors
        grad_queries = torch.zeros_like(queries, dtype=lse.dtype)
        grad_weight = torch.empty_like(weight) if ctx.needs_input_grad[1] else None
        for start in range(0, weight.shape[0], ctx.chunk):
            rows = weight[start : start + ctx.chunk].to(queries.dtype)
            logits = (queries @ rows.T).to(lse.dtype)
            scores = logits.sub_(lse[:, None]).exp_().mul_(grad[:, None]).to(queries.dtype)
            grad_queries += scores @ rows
            if grad_weight is not None:
                grad_weight[start : start + ctx.chunk] = scores.T @ queries
        return grad_queries.to(queries.dtype), grad_weight, None


def chunked_logsumexp(queries: Tensor, weight: Tensor, max_logits: int = MAX_LOGITS) -> Tensor:
    """log sum over c of exp(q . w_c), in chunks of classes; backward recomputes each chunk.

    Args:
        queries: [n, D]; its dtype is that of the matrix products, sums are fp32 or wider.
        weight: [C, D], C may be 0 (the result is -inf); gets a gradient only where it asks for one.
        max_logits: logits held at a time.

    Returns:
        [n], fp32 (fp64 for fp64 queries). No collective.
    """
    return _ChunkedLogSumExp.apply(queries, weight, max_logits)


def target_scores(queries: Tensor, weight: Tensor, target_query: Tensor, target_row: Tensor) -> Tensor:
    """Sum of q . w_t over each query's targets: [n] fp32 or wider. No collective.

    Args:
        target_query, target_row: int64 [M] pairs of a query and a row of `weight`.
    """
    wide = torch.promote_types(queries.dtype, torch.float32)
    scores = (queries[target_query].to(wide) * weight[target_row].to(wide)).sum(dim=1)
    return scores.new_zeros(queries.shape[0]).index_add(0, target_query, scores)


def dense_nll(queries: Tensor, weight: Tensor, target_query: Tensor, target_row: Tensor) -> Tensor:
    """Negative log-likelihood of each query's targets under a softmax over the local `weight`: [n]. No collective."""
    num_targets = torch.bincount(target_query, minlength=queries.shape[0])
    return num_targets * chunked_logsumexp(queries, weight) - target_scores(queries, weight, target_query, target_row)


def sharded_nll(
    queries: Tensor,
    local_weight: Tensor,
    target_query: Tensor,
    target_row: Tensor,
    partition: RowPartition,
    world: World,
    max_logits: int = MAX_LOGITS,
) -> Tensor:
    """`dense_nll` over rows that are split between the ranks.

    Args:
        queries: [n, D] of this rank; n may differ between ranks and be 0.
        local_weight: [rows of this rank, D].
        target_query, target_row: int64 [M]; queries of this rank and global rows.

    Returns:
        [n] of this rank. Its gradients are those of the sum over all ranks.

    Collectives: all-gathers queries and target pairs; all-reduces a maximum and a sum of [N]; reduce-scatters [N].
    """
    counts = gather_counts(queries.shape[0], world)
    all_queries = all_gather_rows(queries, counts, world)
    lse = combine_logsumexp(chunked_logsumexp(all_queries, local_weight, max_logits), counts, world)

    pairs = torch.stack([target_query + sum(counts[: world.rank]), target_row], dim=1)
    all_pairs = all_gather_rows(pairs, gather_counts(len(pairs), world), world)
    start, stop = partition.range(world.rank)
    owned = all_pairs[(all_pairs[:, 1] >= start) & (all_pairs[:, 1] < stop)]
    partial = target_scores(all_queries, local_weight, owned[:, 0], owned[:, 1] - start)
    scores = reduce_scatter_rows(partial, counts, world)

    num_targets = torch.bincount(target_query, minlength=queries.shape[0])
    return num_targets * lse - scores


class ItemHead(nn.Module):
    """Queries from hidden states and the softmax operand from the tied item rows.

    Forms, as options of the method (`HeadConfig`): `dot` is the paper's tied head. `cosine` compares directions with a
    learned temperature. `item_bias` adds a popularity term per item. `pool_residual` adds the direction of the sum of
    the item rows read so far to the hidden state.

    Args:
        local_items: rows of this rank, for the bias.
        form, temperature, item_bias, pool_residual: see `HeadConfig`.

    Attributes:
        log_temperature: replicated scalar (cosine only): its gradient must be summed over the ranks.
        local_bias: [local_items, 1], sharded as the item rows.
    """

    def __init__(
        self, local_items: int, world: World, *, form: str, temperature: float, item_bias: bool, pool_residual: bool
    ) -> None:
        super().__init__()
        self.form, self.pool_residual = form, pool_residual
        self.log_temperature: nn.Parameter | None = None
        if form == "cosine":
            self.log_temperature = nn.Parameter(torch.tensor(math.log(temperature), device=world.device))
        self.local_bias: nn.Parameter | None = None
        if item_bias:
            self.local_bias = nn.Parameter(torch.zeros(local_items, 1, device=world.device))

    def operand(self, local_rows: Tensor) -> Tensor:
        """[rows, D] of the table -> [rows, D or D+1] that queries are multiplied with."""
        weight = F.normalize(local_rows, dim=1) if self.form == "cosine" else local_rows
        return weight if self.local_bias is None else torch.cat([weight, self.local_bias], dim=1)

    def queries(self, hidden: Tensor, pooled: Tensor) -> Tensor:
        """Hidden states [n, D] and sums of the item rows read so far [n, D] -> [n, D or D+1], in fp32 or wider."""
        wide = torch.promote_types(hidden.dtype, torch.float32)
        query = hidden.to(wide)
        if self.pool_residual:
            query = query + F.normalize(pooled.to(wide), dim=1) * math.sqrt(hidden.shape[1])
        if self.log_temperature is not None:
            query = F.normalize(query, dim=1) / self.log_temperature.exp()
        return query if self.local_bias is None else torch.cat([query, torch.ones_like(query[:, :1])], dim=1)
