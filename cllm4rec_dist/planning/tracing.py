"""What a computation would allocate and multiply, found by running it on meta tensors: shapes without values.

The plan of a run needs to know what the real backbone keeps for its backward, whatever its family, adapters and
checkpointing. Formulas for that grow old with every version of a library; here the very modules run, forward and
backward, on a device that computes nothing. `Trace` watches every operator: it adds up the storages that are alive and
the matrix products, by part.

Two operators are replaced while it watches, because their meta forms are not what runs: attention (a fused kernel keeps
its inputs, its output and a log-sum-exp a row) and linear layers (ZeRO-3 replaces torch's own by one that keeps its
input also where the weight is frozen).
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
    """Inside, storages are counted from birth to death and matrix products by their FLOPs.

    Attributes:
        part: that what happens now is counted for.
        live: bytes alive, by the part that made them.
        peak: `live` when most bytes were alive since `mark`.
        flops: of matrix products and attention, by part; a multiplication and an addition are two.
        operators: run so far, each at least one kernel; views left out.
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
        """Start a new peak; the last one."""
        last, self.peak, self._highest = self.peak, self.live.copy(), self.live.total()
        return last

    def at_gradient_of(self, x: Tensor, part: str) -> None:
        """From the moment when backward has the gradient of `x`, what happens is counted for `part`."""
        x.register_hook(lambda _: setattr(self, "part", part))

    def count_flops(self, flops: int, part: str) -> None:
        """Add what an operator that is replaced here would compute."""
        self.flops[part] += flops

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        self.operators[self.part] += not func.is_view
        counted = flop_registry.get(func._overloadpacket)
        if counted is not None:
            self.flops[self.part] += counted(*args, **(kwargs or {}), out_val=out)
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

    def hand_over(self, x: Tensor, part: str) -> None:
        """Count a tensor that is alive for another part."""
        storage = x.untyped_storage()
        counted_for: list[str] = storage._counted_for  # type: ignore[attr-defined]
        self.live[counted_for[0]] -= storage.nbytes()
        self.live[part] += storage.nbytes()
        counted_for[0] = part


def leave_out(tensors: Iterable[Tensor]) -> None:
    """Never count these: they are there before anything happens."""
    for tensor in tensors:
        tensor.untyped_storage()._counted_for = ["nothing"]  # type: ignore[attr-defined]


@contextmanager
def as_run(trace: Trace) -> Iterator[None]:
    """Inside, attention and linear layers keep what they keep in a run, and attention's FLOPs go to `trace`.

    By name, as ZeRO-3 does it too: a torch function mode is off inside of backward, where checkpoints recompute.
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
    """A fused kernel: two products forward, five backward, none of which is stored."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, trace: Trace) -> Tensor:
        out = query.new_empty(*query.shape[:-1], value.shape[-1])
        kept = [query, key, value, out, query.new_empty(query.shape[:-1], dtype=torch.float32)]
        if mask is not None:  # torch makes numbers of it, anew in each layer
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
    """ZeRO-3's: keeps its input, and no second copy of the weight."""

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
