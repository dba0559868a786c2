"""Softmax heads that never store [positions, classes].

Everything an item or word loss needs is a log-sum-exp over the classes and the scores of the few targets:

    nll_p = N_p * logsumexp_c(q_p . w_c) - sum over p's N_p targets t of q_p . w_t

`likelihood_parts` does both on one device, in chunks of classes, and recomputes in backward. `sharded_nll` does them
over row shards: queries are all-gathered, each rank scores its own rows, a maximum and two sums come back. One target a
position is language modeling (the paper's pretraining), many its multinomial likelihood.

`ItemHead` makes queries and operand from hidden states and table rows; the plain dot product is the paper's.

Legend: n positions of this rank, N of all ranks, C classes, D width, M targets of this rank.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cllm4rec_dist.collectives import (
    Arriving,
    all_gather_rows,
    combine_logsumexp,
    gather_integers,
    reduce_scatter_rows,
    start_all_gather_rows,
)
from cllm4rec_dist.topology import RowPartition, World

_CPU_LOGITS = 1 << 20
"""4 MiB in fp32: a chunk stays in a core's cache between the product that makes it and the one that uses it."""
_GPU_SHARE = 64


def logits_at_a_time(device: torch.device) -> int:
    """How many logits a head holds at once: a cacheful on a CPU, a 64th of the memory of a GPU."""
    if device.type != "cuda":
        return _CPU_LOGITS
    return logits_within(torch.cuda.get_device_properties(device).total_memory)


def logits_within(memory: int) -> int:
    """The same for a GPU with `memory` bytes."""
    return memory // _GPU_SHARE // 4


def _wide_product(left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    """left @ right of half-precision matrices with the sums as they come, in `dtype`: torch's own are rounded again.

    A logit of 20 rounded to bf16 is off by 0.06.
    """
    if left.is_cuda:
        return torch.mm(left, right, out_dtype=dtype)
    return left.to(dtype) @ right.to(dtype)  # a CPU has no such product


def _logits(queries: Tensor, rows: Tensor, shift: Tensor | None, buffer: Tensor) -> Tensor:
    """queries @ rows.T (+ shift), as wide as the buffer and in its memory: fresh pages for each chunk cost time."""
    out = buffer[: len(queries) * len(rows)].view(len(queries), len(rows))
    if queries.dtype != out.dtype:
        out = _wide_product(queries, rows.T, out.dtype)
        return out if shift is None else out.add_(shift)
    return torch.mm(queries, rows.T, out=out) if shift is None else torch.addmm(shift, queries, rows.T, out=out)


class _Likelihood(torch.autograd.Function):
    """Log-sum-exp over all classes and scores of the targets; one gradient of the classes for both."""

    @staticmethod
    def forward(
        ctx: Any, queries: Tensor, weight: Tensor, target_query: Tensor, target_row: Tensor, max_logits: int
    ) -> tuple[Tensor, Tensor]:
        ctx.chunk = chunk = max(1, max_logits // max(1, len(queries)))
        wide = torch.promote_types(queries.dtype, torch.float32)
        highest = queries.new_full((len(queries),), -math.inf, dtype=wide)
        total = torch.zeros_like(highest)
        buffer = highest.new_empty(min(chunk, len(weight)) * len(queries))
        for rows in weight.split(chunk) if len(weight) else ():
            logits = _logits(queries, rows.to(queries.dtype), None, buffer)
            raised = torch.maximum(highest, logits.amax(dim=1))
            total.mul_((highest - raised).exp_()).add_(logits.sub_(raised[:, None]).exp_().sum(dim=1))
            highest = raised
        lse = highest + total.log_()
        # As rounded as in the logits, or a target would be scored with another row than it is compared by.
        targets = weight[target_row].to(queries.dtype).to(wide)
        products = (queries[target_query].to(wide) * targets).sum(dim=1)
        scores = torch.zeros_like(lse).index_add_(0, target_query, products)
        ctx.save_for_backward(queries, weight, target_query, target_row, lse)
        return lse, scores

    @staticmethod
    def backward(ctx: Any, grad_lse: Tensor, grad_scores: Tensor) -> tuple[Tensor | None, ...]:
        queries, weight, target_query, target_row, lse = ctx.saved_tensors
        grad_queries = torch.zeros_like(queries, dtype=lse.dtype)
        grad_weight = torch.empty_like(weight) if ctx.needs_input_grad[1] else None
        # Rows of the probabilities are scaled by scaling what they are multiplied with, which is smaller.
        scaled, shift = (queries * grad_lse[:, None]).to(queries.dtype), -lse[:, None]
        buffer = lse.new_empty(min(ctx.chunk, len(weight)) * len(queries))
        for start in range(0, len(weight), ctx.chunk):
            rows = weight[start : start + ctx.chunk].to(queries.dtype)
            logits = _logits(queries, rows, shift, buffer)
            probabilities = logits.exp_().to(queries.dtype)
            if rows.dtype == lse.dtype:
                grad_queries.addmm_(probabilities, rows)
            else:
                grad_queries += _wide_product(probabilities, rows, lse.dtype)
            if grad_weight is not None and grad_weight.dtype == rows.dtype == lse.dtype:
                torch.mm(probabilities.T, scaled, out=grad_weight[start : start + ctx.chunk])
            elif grad_weight is not None:
                grad_weight[start : start + ctx.chunk] = _wide_product(probabilities.T, scaled, lse.dtype)
        grad_queries *= grad_lse[:, None]
        share = grad_scores[target_query, None]
        grad_queries.index_add_(0, target_query, share * weight[target_row].to(queries.dtype))
        if grad_weight is not None:
            grad_weight.index_add_(0, target_row, (share * queries[target_query]).to(weight.dtype))
        return grad_queries.to(queries.dtype), grad_weight, None, None, None


def likelihood_parts(
    queries: Tensor, weight: Tensor, target_query: Tensor, target_row: Tensor, max_logits: int | None = None
) -> tuple[Tensor, Tensor]:
    """log sum over c of exp(q . w_c), and the sum of q . w_t over each query's targets; in chunks of classes.

    Backward recomputes each chunk. Nothing of size [n, C] is stored.

    Args:
        queries: [n, D]; its dtype is that of what is multiplied, sums are fp32 or wider and never rounded to it.
        weight: [C, D], C may be 0 (the log-sum-exp is -inf); gets a gradient only where it asks for one.
        target_query, target_row: int64 [M] pairs of a query and a row of `weight`.
        max_logits: logits held at a time; `logits_at_a_time` if left out.

    Returns:
        Twice [n], fp32 (fp64 for fp64 queries). No collective.
    """
    if max_logits is None:
        max_logits = logits_at_a_time(queries.device)
    lse, scores = _Likelihood.apply(queries, weight, target_query, target_row, max_logits)
    return lse, scores


def dense_nll(queries: Tensor, weight: Tensor, target_query: Tensor, target_row: Tensor) -> Tensor:
    """Negative log-likelihood of each query's targets under a softmax over the local `weight`: [n]. No collective."""
    lse, scores = likelihood_parts(queries, weight, target_query, target_row)
    return torch.bincount(target_query, minlength=len(queries)) * lse - scores


@dataclass(frozen=True)
class Sampling:
    """Classes that stand for the others in a sampled softmax.

    Attributes:
        num_rows: drawn over all ranks, evenly; a row that is drawn again counts once.
        key: of the draw; the same key draws the same rows. May differ between ranks.
    """

    num_rows: int
    key: int

    def rows(self, num_local: int, targets: Tensor, world: World) -> tuple[Tensor, Tensor]:
        """The local rows that are computed, and the logarithm of how many each stands for.

        Targets stand for themselves, so they are scored as in the exact softmax. The others are drawn from alike, and
        stand for all that are no target: the estimate of the sum of exponentials has no bias (its logarithm has one).

        Args:
            num_local: rows of this rank.
            targets: int64 [m], local rows of all ranks' targets that live here.

        Returns:
            int64 [c] distinct local rows, rising, and fp32 [c]. No collective.
        """
        targets = targets.unique()
        random = np.random.default_rng([self.key & 0xFFFFFFFFFFFFFFFF, world.rank])
        count = -(-self.num_rows // world.size) if num_local else 0
        drawn = torch.from_numpy(random.integers(num_local, size=count)) if count else targets.new_empty(0).cpu()
        rows, place = torch.cat([targets, drawn.to(targets.device)]).unique(return_inverse=True)
        others = len(rows) - len(targets)
        log_weight = torch.full(rows.shape, math.log((num_local - len(targets)) / others) if others else 0.0)
        log_weight = log_weight.to(rows.device).index_fill_(0, place[: len(targets)], 0.0)
        return rows, log_weight


@dataclass(frozen=True)
class Asked:
    """Queries and targets of all ranks on their way to every rank.

    Attributes:
        queries: [n, D] of this rank.
        target_query: int64 [M] query of each target of this rank.
        counts: queries of every rank.
    """

    queries: Tensor
    target_query: Tensor
    counts: list[int]
    arriving_queries: Arriving
    arriving_pairs: Arriving


def ask(queries: Tensor, target_query: Tensor, target_row: Tensor, world: World) -> Asked:
    """Begin to bring queries and targets to the ranks that hold rows; what is computed until `sharded_nll` hides it.

    Args:
        queries: [n, D] of this rank; n may differ between ranks and be 0.
        target_query, target_row: int64 [M]; queries of this rank and global rows.

    Collectives: all-gathers two integers, and starts to all-gather queries and target pairs.
    """
    # Both numbers at once, because a GPU is waited for at each.
    everyones = gather_integers([len(queries), len(target_query)], world, what="counts of queries and targets")
    counts, target_counts = (list(found) for found in zip(*everyones, strict=True))
    pairs = torch.stack([target_query + sum(counts[: world.rank]), target_row], dim=1)
    return Asked(
        queries, target_query, counts, start_all_gather_rows(queries.detach(), counts, world, "queries"),
        start_all_gather_rows(pairs, target_counts, world, "targets"),
    )  # fmt: skip


def sharded_nll(
    asked: Asked,
    local_weight: Tensor,
    partition: RowPartition,
    world: World,
    max_logits: int | None = None,
    sampling: Sampling | None = None,
) -> Tensor:
    """`dense_nll` over rows that are split between the ranks.

    Args:
        asked: queries and targets of this rank.
        local_weight: [rows of this rank, D].
        sampling: classes of a sampled softmax; all of them if left out.

    Returns:
        [n] of this rank. Its gradients are those of the sum over all ranks.

    Collectives: waits for those of `ask`; all-reduces a maximum and a sum of [N]; reduce-scatters [N].
    """
    counts, target_query = asked.counts, asked.target_query
    all_queries = all_gather_rows(asked.queries, counts, world, asked.arriving_queries)
    all_pairs = asked.arriving_pairs.wait()
    start, stop = partition.range(world.rank)
    owned = all_pairs[(all_pairs[:, 1] >= start) & (all_pairs[:, 1] < stop)]
    owned_query, owned_row = owned[:, 0], owned[:, 1] - start
    if sampling is not None:
        rows, log_weight = sampling.rows(len(local_weight), owned_row, world)
        owned_row = torch.searchsorted(rows, owned_row)
        # One more column adds the logarithms to the logits, as a bias would be.
        local_weight = torch.cat([local_weight[rows], log_weight[:, None].to(local_weight.dtype)], dim=1)
        all_queries = F.pad(all_queries, (0, 1), value=1.0)
    partial, scores = likelihood_parts(all_queries, local_weight, owned_query, owned_row, max_logits)
    lse = combine_logsumexp(partial, counts, world)
    return torch.bincount(target_query, minlength=len(asked.queries)) * lse - reduce_scatter_rows(scores, counts, world)


class ItemHead(nn.Module):
    """Queries from hidden states and the softmax operand from the tied item rows.

    Forms, as options of the method (`HeadConfig`): `dot` is the paper's tied head. `cosine` compares directions with a
    learned temperature. `item_bias` adds a popularity term per item. `pool_residual` adds the direction of the sum of
    the item rows read so far to the hidden state.

    Args:
        local_items: rows of this rank, for the bias.
        similarity, temperature, item_bias, pool_residual: see `HeadConfig`.

    Attributes:
        log_temperature: replicated scalar (cosine only): its gradient must be summed over the ranks.
        local_bias: [local_items, 1], sharded as the item rows.
    """

    def __init__(
        self,
        local_items: int,
        world: World,
        *,
        similarity: str,
        temperature: float,
        item_bias: bool,
        pool_residual: bool,
    ) -> None:
        super().__init__()
        self.similarity, self.pool_residual = similarity, pool_residual
        self.log_temperature: nn.Parameter | None = None
        if similarity == "cosine":
            self.log_temperature = nn.Parameter(torch.tensor(math.log(temperature), device=world.device))
        self.local_bias: nn.Parameter | None = None
        if item_bias:
            self.local_bias = nn.Parameter(torch.zeros(local_items, 1, device=world.device))

    def operand(self, local_rows: Tensor) -> Tensor:
        """[rows, D] of the table -> [rows, D or D+1] that queries are multiplied with."""
        weight = F.normalize(local_rows, dim=1) if self.similarity == "cosine" else local_rows
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
