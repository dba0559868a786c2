"""Cross-entropy over the classes of one device that never stores logits of [positions, classes].

A loss over items or words needs only a log-sum-exp over the classes and the scores of the targets:

    nll_p = N_p * logsumexp_c(q_p . w_c) - sum over p's N_p targets t of q_p . w_t

`chunked_logsumexp_and_scores` computes both in chunks of classes that backward recomputes.

Legend: n queries, C classes, D width, M targets.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

Transform = Callable[[Tensor], Tensor]
"""Elementwise function of logits [n, C] with any C."""
_CPU_LOGITS = 1 << 20
"""4 MiB in fp32, so that a chunk of logits stays in a core's cache between the two products that use it."""
_GPU_MEMORY_DIVISOR = 64
_COPIED_DIVISOR, _MIN_COPIED_ROWS = 16, 2048
"""Rows that are copied to be normalized or rounded are at most a 16th of the weight, or this many."""
_SHORTEST = 1e-12
"""Length below which a row is not normalized, as in `F.normalize`."""


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


def _logits(queries: Tensor, rows: Tensor, added: Tensor | None, buffer: Tensor) -> Tensor:
    """queries @ rows.T (+ added), in the buffer's dtype and memory, since new pages for each chunk cost time."""
    out = buffer[: len(queries) * len(rows)].view(len(queries), len(rows))
    if queries.dtype != out.dtype:
        out = _wide_product(queries, rows.T, out.dtype)
        return out if added is None else out.add_(added)
    return torch.mm(queries, rows.T, out=out) if added is None else torch.addmm(added, queries, rows.T, out=out)


def _chunk_rows(num_queries: int, weight: Tensor, max_logits: int, *, copied: bool) -> int:
    """Rows of a chunk.

    Args:
        copied: rows are multiplied in another form than `weight` has; the copies are limited, too.
    """
    if not copied:
        return max(1, max_logits // max(1, num_queries))
    limit = max(_MIN_COPIED_ROWS, len(weight) // _COPIED_DIVISOR)
    return max(1, min(limit, max_logits // max(1, num_queries, weight.shape[1])))


class _Rows:
    """Rows of a weight in the form in which they are multiplied, and the way of their gradient back to the weight.

    Args:
        norms: lengths [C] by which rows are divided; None for rows as they are.
        chunk: most rows at a time.
    """

    def __init__(self, weight: Tensor, norms: Tensor | None, chunk: int) -> None:
        self._weight, self._norms, self._shape = weight, norms, (min(chunk, len(weight)), weight.shape[1])
        self._unit = None if norms is None else weight.new_empty(self._shape)
        self._product: Tensor | None = None

    @property
    def normalized(self) -> bool:
        """True if rows are not those of the weight."""
        return self._norms is not None

    def chunk(self, part: slice) -> Tensor:
        """Consecutive rows; the next call overwrites them if they are normalized."""
        rows = self._weight[part]
        if self._norms is None or self._unit is None:
            return rows
        return torch.div(rows, self._norms[part, None], out=self._unit[: len(rows)])

    def at(self, index: Tensor) -> Tensor:
        """Rows [M, D] by index."""
        rows = self._weight[index]
        return rows if self._norms is None else rows / self._norms[index, None]

    def backward_(self, gradient: Tensor, rows: Tensor, index: slice | Tensor) -> Tensor:
        """Turn a gradient of rows that `chunk` or `at` returned into that of the weight, in place."""
        if self._norms is None:
            return gradient
        if self._product is None or len(gradient) > len(self._product):
            self._product = torch.empty_like(gradient)
        norms = self._norms[index, None]
        along = torch.mul(gradient, rows, out=self._product[: len(gradient)]).sum(dim=1, keepdim=True)
        # The length of a shorter row is a constant, as in `F.normalize`.
        along = torch.where(norms > _SHORTEST, along, 0.0)
        return gradient.addcmul_(rows, along, value=-1).div_(norms)


class _GradientBuffer:
    """Gradient of a weight, in the weight's dtype.

    Args:
        accumulate: add to `weight.grad`, which is made if there is none.

    Attributes:
        total: the gradient; undefined before `add_product` was called for all rows.
        returned: what backward returns to autograd; None if it is in `weight.grad` already.
    """

    def __init__(self, weight: Tensor, *, accumulate: bool) -> None:
        before = weight.grad if accumulate else None
        self.total = torch.empty_like(weight) if before is None else before.to_dense()
        self._beta = int(before is not None)
        self.returned = None if accumulate else self.total
        if accumulate:
            weight.grad = self.total

    def add_product(self, part: slice, slopes: Tensor, queries: Tensor, weight_rows: _Rows, rows: Tensor) -> None:
        """Add the gradient of a chunk of `rows`, slopes.T @ queries."""
        out, wide = self.total[part], torch.promote_types(slopes.dtype, torch.float32)
        if out.dtype == slopes.dtype == wide and not (self._beta and weight_rows.normalized):
            torch.addmm(out, slopes.T, queries, beta=self._beta, out=out)
            weight_rows.backward_(out, rows, part)
            return
        product = slopes.T @ queries if slopes.dtype == wide else _wide_product(slopes.T, queries, wide)
        gradient = weight_rows.backward_(product, rows, part)
        out.add_(gradient) if self._beta else out.copy_(gradient)


def _slices(length: int, size: int) -> Iterator[slice]:
    yield from (slice(start, min(start + size, length)) for start in range(0, length, size))


class _ChunkedLogSumExpAndScores(torch.autograd.Function):
    """Log-sum-exp over all classes and scores of the targets, in one function so that `weight` has one gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        queries: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        target_query: Tensor,
        target_row: Tensor,
        max_logits: int,
        transform: Transform | None,
        normalize: bool,
        accumulate: bool,
    ) -> tuple[Tensor, Tensor]:
        ctx.transform, ctx.accumulate = transform, accumulate
        copied = normalize or weight.dtype != queries.dtype
        ctx.chunk = chunk = _chunk_rows(len(queries), weight, max_logits, copied=copied)
        norms = torch.linalg.vector_norm(weight, dim=1).clamp_min_(_SHORTEST) if normalize else None
        weight_rows = _Rows(weight, norms, chunk)
        wide = torch.promote_types(queries.dtype, torch.float32)
        highest = queries.new_full((len(queries),), -math.inf, dtype=wide)
        total = torch.zeros_like(highest)
        buffer = highest.new_empty(min(chunk, len(weight)) * len(queries))
        for part in _slices(len(weight), chunk):
            rows = weight_rows.chunk(part).to(queries.dtype)
            logits = _logits(queries, rows, None if bias is None else bias[part], buffer)
            if transform is not None:
                logits = transform(logits)
            raised = torch.maximum(highest, logits.amax(dim=1))
            total.mul_((highest - raised).exp_()).add_(logits.sub_(raised[:, None]).exp_().sum(dim=1))
            highest = raised
        lse = highest + total.log_()
        # Round target rows to the dtype of the logits, so that score and log-sum-exp see the same values.
        targets = weight_rows.at(target_row).to(queries.dtype).to(wide)
        products = (queries[target_query].to(wide) * targets).sum(dim=1)
        if bias is not None:
            products += bias[target_row]
        ctx.target_slope = None
        if transform is not None:
            products, ctx.target_slope = _with_slope(transform, products[:, None])
            products = products[:, 0]
        scores = torch.zeros_like(lse).index_add_(0, target_query, products)
        ctx.save_for_backward(queries, weight, bias, norms, target_query, target_row, lse)
        return lse, scores

    @staticmethod
    def backward(ctx: Any, grad_lse: Tensor, grad_scores: Tensor) -> tuple[Tensor | None, ...]:
        queries, weight, bias, norms, target_query, target_row, lse = ctx.saved_tensors
        weight_rows = _Rows(weight, norms, ctx.chunk)
        grad_queries = torch.zeros_like(queries, dtype=lse.dtype)
        grad_weight = _GradientBuffer(weight, accumulate=ctx.accumulate) if ctx.needs_input_grad[1] else None
        grad_bias = torch.empty_like(bias) if bias is not None and ctx.needs_input_grad[2] else None
        # Scale the queries instead of the probabilities, which are larger.
        scaled, shift = (queries * grad_lse[:, None]).to(queries.dtype), -lse[:, None]
        buffer = lse.new_empty(min(ctx.chunk, len(weight)) * len(queries))
        for part in _slices(len(weight), ctx.chunk):
            rows = weight_rows.chunk(part)
            factors = rows.to(queries.dtype)
            probabilities = _slopes(
                queries, factors, None if bias is None else bias[part], shift, ctx.transform, buffer
            )
            if grad_bias is not None:
                torch.mv(probabilities.T, grad_lse, out=grad_bias[part])
            probabilities = probabilities.to(queries.dtype)
            if factors.dtype == lse.dtype:
                # Not `addmm_`, which torch's counter of FLOPs does not know.
                torch.addmm(grad_queries, probabilities, factors, out=grad_queries)
            else:
                grad_queries += _wide_product(probabilities, factors, lse.dtype)
            if grad_weight is not None:
                grad_weight.add_product(part, probabilities, scaled, weight_rows, rows)
        grad_queries *= grad_lse[:, None]
        grad_targets = grad_scores[target_query, None]
        if ctx.target_slope is not None:
            grad_targets = grad_targets * ctx.target_slope
        rows = weight_rows.at(target_row)
        grad_queries.index_add_(0, target_query, grad_targets * rows.to(queries.dtype))
        if grad_weight is not None:
            gradient = weight_rows.backward_(grad_targets * queries[target_query], rows, target_row)
            grad_weight.total.index_add_(0, target_row, gradient.to(weight.dtype))
        if grad_bias is not None:
            grad_bias.index_add_(0, target_row, grad_targets[:, 0].to(grad_bias.dtype))
        returned = None if grad_weight is None else grad_weight.returned
        return grad_queries.to(queries.dtype), returned, grad_bias, *[None] * 6


def _slopes(
    queries: Tensor, rows: Tensor, bias: Tensor | None, shift: Tensor, transform: Transform | None, buffer: Tensor
) -> Tensor:
    """Derivatives of each query's log-sum-exp, -`shift`, by its logits before the transform."""
    if bias is None and transform is None:
        return _logits(queries, rows, shift, buffer).exp_()
    logits = _logits(queries, rows, bias, buffer)
    if transform is None:
        return logits.add_(shift).exp_()
    logits, slope = _with_slope(transform, logits)
    return logits.add_(shift).exp_().mul_(slope)


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
    bias: Tensor | None = None,
    *,
    normalize: bool = False,
    accumulate: bool = False,
) -> tuple[Tensor, Tensor]:
    """Log sum over c of exp(q . w_c + b_c), and the sum of q . w_t + b_t over a query's targets, in chunks of classes.

    Backward recomputes each chunk. Nothing of size [n, C] is stored, and no copy of the weight.

    Args:
        queries: [n, D]; products are of this dtype, sums are fp32 or wider and never rounded to it.
        weight: [C, D], C may be 0 (the log-sum-exp is -inf); gets a gradient only if it requires one.
        target_query, target_row: int64 [M] pairs of a query and a row of `weight`.
        max_logits: logits held at a time; `max_logits_for` if None.
        transform: applied to the logits, each by itself; None for the identity.
        bias: b, [C], never rounded; 0 if None.
        normalize: divide the rows of `weight` by their lengths, as `F.normalize`; then w are these directions.
        accumulate: let backward add the gradient of `weight`, a leaf, to `weight.grad` itself. Autograd, to which it is
            returned otherwise, would need another tensor of that size where the weight has a gradient already, from
            other micro-batches or other uses. `torch.autograd.grad` does not see it then.

    Returns:
        Log-sum-exps and summed scores, each [n], fp32 (fp64 for fp64 queries). No collective.
    """
    if max_logits is None:
        max_logits = max_logits_for(queries.device)
    if bias is not None:
        bias = bias.to(torch.promote_types(queries.dtype, torch.float32))
    options = max_logits, transform, normalize, accumulate
    lse, scores = _ChunkedLogSumExpAndScores.apply(queries, weight, bias, target_query, target_row, *options)
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
