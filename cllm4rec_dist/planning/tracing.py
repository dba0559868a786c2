"""Traces memory and FLOPs of a computation on meta tensors.

A plan needs the memory that a backbone keeps for backward, for any family, adapters and checkpointing. Formulas would
depend on the versions of libraries, so the modules themselves run, forward and backward, on the meta device. `Trace`
counts the storages that are alive and the FLOPs of every operator, by part.

`emulate_kernels` replaces two operators whose meta versions save other tensors than the real ones: attention (a fused
kernel saves its inputs, its output and one log-sum-exp per query) and linear layers (ZeRO-3's saves its input even if
the weight is frozen).
"""

from __future__ import annotations

import math
import weakref
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry


class Trace(TorchDispatchMode):
    """Context manager that counts live storages and FLOPs.

    Attributes:
        part: part to which operators are attributed now.
        live: bytes alive, by the part that allocated them.
        peak: `live` at its maximum since `mark`.
        flops: FLOPs of matrix products and attention, by part; a multiply-add counts as two.
        operators: number of operators except views, by part; each launches at least one kernel.
    """

    def __init__(self, part: str = "other") -> None:
        super().__init__()
        self.part = part
        self.live: Counter[str] = Counter()
        self.flops: Counter[str] = Counter()
        self.operators: Counter[str] = Counter()
        self.peak: Counter[str] = Counter()
        self._highest = 0

    def mark(self) -> Counter[str]:
        """Start a new peak, and return the last one."""
        last, self.peak, self._highest = self.peak, self.live.copy(), self.live.total()
        return last

    def at_gradient_of(self, x: Tensor, part: str) -> None:
        """Attribute operators to `part` once backward has computed the gradient of `x`."""
        x.register_hook(lambda _: setattr(self, "part", part))

    def count_flops(self, flops: int, part: str) -> None:
        """Add the FLOPs of a replaced operator."""
        self.flops[part] += flops

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        self.operators[self.part] += not func.is_view
        formula = flop_registry.get(func._overloadpacket)
        if formula is not None:
            self.flops[self.part] += formula(*args, **(kwargs or {}), out_val=out)
        for value in tree_leaves(out):
            if isinstance(value, Tensor) and value.layout is torch.strided:
                self._watch(value.untyped_storage())
        return out

    def _watch(self, storage: torch.UntypedStorage) -> None:
        if hasattr(storage, "_counted_for"):
            return
        counted_for, size = [self.part], storage.nbytes()
        storage._counted_for = counted_for  # type: ignore[attr-defined]
        self.live[self.part] += size
        weakref.finalize(storage, self._forget, counted_for, size)
        if self.live.total() > self._highest:
            self._highest, self.peak = self.live.total(), self.live.copy()

    def _forget(self, counted_for: list[str], size: int) -> None:
        self.live[counted_for[0]] -= size

    def reassign(self, x: Tensor, part: str) -> None:
        """Attribute a live tensor to another part."""
        storage = x.untyped_storage()
        counted_for: list[str] = storage._counted_for  # type: ignore[attr-defined]
        self.live[counted_for[0]] -= storage.nbytes()
        self.live[part] += storage.nbytes()
        counted_for[0] = part


def exclude(tensors: Iterable[Tensor]) -> None:
    """Exclude tensors that exist before the trace from its counts."""
    for tensor in tensors:
        tensor.untyped_storage()._counted_for = ["nothing"]  # type: ignore[attr-defined]


@contextmanager
def emulate_kernels(trace: Trace) -> Iterator[None]:
    """Make attention and linear layers save the tensors of the real kernels, and count attention's FLOPs in `trace`.

    The functions are replaced in `torch.nn.functional`, as ZeRO-3 does: a torch function mode would be off in backward,
    where checkpoints are recomputed.
    """

    def attend(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, **_: Any) -> Tensor:
        return _Attention.apply(query, key, value, attn_mask, trace)

    def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return _Linear.apply(x, weight, bias)

    before = F.linear, F.scaled_dot_product_attention
    F.linear, F.scaled_dot_product_attention = linear, attend  # type: ignore[assignment]
    try:
        yield
    finally:
        F.linear, F.scaled_dot_product_attention = before


class _Attention(torch.autograd.Function):
    """Fused attention: two matrix products in forward and five in backward, whose results are not stored."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, trace: Trace) -> Tensor:
        out = query.new_empty(*query.shape[:-1], value.shape[-1])
        kept = [query, key, value, out, query.new_empty(query.shape[:-1], dtype=torch.float32)]
        if mask is not None:  # torch converts it to floats in each layer
            kept.append(query.new_empty(mask.shape))
        ctx.save_for_backward(*kept)
        ctx.trace, ctx.product = trace, 2 * math.prod(query.shape) * key.shape[-2]
        trace.count_flops(2 * ctx.product, "attention")
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, *_ = ctx.saved_tensors
        ctx.trace.count_flops(5 * ctx.product, "attention")
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value), None, None


class _Linear(torch.autograd.Function):
    """ZeRO-3's linear layer, which saves its input and no second copy of the weight."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        out = x.matmul(weight.t())
        return out if bias is None else out.add_(bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        flat = grad.reshape(-1, grad.shape[-1])
        grad_weight = flat.t().matmul(x.reshape(-1, x.shape[-1])) if ctx.needs_input_grad[1] else None
        grad_bias = flat.sum(0) if ctx.needs_input_grad[2] else None
        return grad.matmul(weight) if ctx.needs_input_grad[0] else None, grad_weight, grad_bias
