"""Cross-entropy over the classes of one device that never stores logits of [positions, classes].

A loss over items or words needs only a log-sum-exp over the classes and the scores of the targets:

    nll_p = N_p * logsumexp_c(q_p . w_c) - sum over p's N_p targets t of q_p . w_t

`chunked_logsumexp_and_scores` computes both in chunks of classes that backward recomputes.

Legend: n queries, C classes, D width, M targets.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

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
