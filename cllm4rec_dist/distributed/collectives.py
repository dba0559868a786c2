"""Collectives with exact gradients, for a different number of rows on each rank.

All autograd functions here and in `model/` compute the gradient of the *sum* of all ranks' losses; each rank calls
`backward` on its part of that sum. gloo and NCCL both support the operations used here. Numbers of rows may differ
between ranks and be zero. Every function is a collective: all ranks must call it, in the same order. Each reports its
name to the watchdog, which can then say in which one a rank waits.

Legend: n rows of this rank, N rows of all ranks, W ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from cllm4rec_dist.distributed.topology import World
from cllm4rec_dist.errors import FaultError


def gather_integers(
    values: Sequence[int], world: World, group: dist.ProcessGroup | None = None, what: str = "integers"
) -> list[list[int]]:
    """Gather `values` (int64, equally many on all ranks) of every rank, in rank order. One all-gather.

    Args:
        group: a CPU group of all ranks, for a thread that must not disturb the order of collectives in the world's
            group; the world's group if None.
        what: name of the values, for the watchdog's messages.
    """
    if world.size == 1:
        return [list(values)]
    device = world.device if group is None else torch.device("cpu")
    local = torch.tensor([*values], dtype=torch.int64, device=device)
    gathered = local.new_empty(world.size, len(values))
    # The watch follows the main thread only.
    with world.watch.collective(f"all-gather of {what}") if group is None else nullcontext():
        dist.all_gather_into_tensor(gathered.view(-1), local, group=group or world.group)
        return gathered.tolist()


def gather_counts(count: int, world: World) -> list[int]:
    """Gather `count` of every rank, in rank order. All-gathers one integer."""
    return [gathered for (gathered,) in gather_integers([count], world, what="counts")]


def broadcast_text(text: str, world: World, what: str) -> str:
    """Return rank 0's `text`, a short one, on every rank. All-gathers its length and then its bytes.

    Args:
        what: name of the text, for the watchdog's messages.
    """
    content = text.encode() if world.rank == 0 else b""
    length = gather_integers([len(content)], world, what=what)[0][0]
    return bytes(gather_integers([*content.ljust(length, b"\0")], world, what=what)[0]).decode()


def require_agreement(values: Mapping[str, int], world: World) -> None:
    """Require that `values`, int64 with the same names on all ranks, are equal on all ranks. One all-gather.

    Raises:
        FaultError: on every rank, for the first value that differs: names the ranks in the minority (in a tie, those
            that differ from rank 0) and their values.
    """
    by_rank = gather_integers([*values.values()], world, what=f"what must agree ({', '.join(values)})")
    for name, column in zip(values, zip(*by_rank, strict=True), strict=True):
        usual = max(column, key=column.count)  # in a tie the first, which is rank 0's
        others = {rank: value for rank, value in enumerate(column) if value != usual}
        if others:
            raise FaultError(
                f"{name} on rank{'s' if len(others) > 1 else ''} {', '.join(map(str, others))}",
                next(iter(others.values())) if len(set(others.values())) == 1 else [*others.values()],
                f"differs from {usual} on the other ranks",
                "Every rank must run the same code on the same configuration and corpus; if they do, suspect the host.",
            )


def barrier(world: World, what: str) -> None:
    """Wait until all ranks have called this.

    Args:
        what: what the ranks wait for, as in `the corpus to be there`, for the watchdog's messages.
    """
    if world.size > 1:
        with world.watch.collective(f"barrier for {what}"):
            dist.barrier(world.group)


def all_reduce_sum(x: Tensor, world: World, what: str = "sums") -> Tensor:
    """Sum `x` over the ranks, without gradient. `x` is not modified."""
    total = x.detach().clone()
    if world.size > 1:
        with world.watch.collective(f"all-reduce of {what}"):
            dist.all_reduce(total, group=world.group)
    return total


def all_reduce_in_place(x: Tensor, world: World, what: str) -> None:
    """Replace `x` by its sum over the ranks, without gradient and without a copy."""
    if world.size > 1:
        with world.watch.collective(f"all-reduce of {what}"):
            dist.all_reduce(x, group=world.group)


def broadcast_in_place(x: Tensor, world: World, what: str) -> None:
    """Replace `x` by that of rank 0, without gradient."""
    if world.size > 1:
        with world.watch.collective(f"broadcast of {what}"):
            dist.broadcast(x, group=world.group, group_src=0)


def sum_on_host(x: Tensor, world: World, what: str) -> list[Any]:
    """Sum `x` over the ranks and return Python numbers. All-reduces `x`."""
    with world.watch.collective(f"all-reduce of {what}"):
        return all_reduce_sum(x, world, what).tolist()  # inside, because here the host waits for its GPU


class PendingCollective:
    """Result of a started collective; `wait` must be called once, in the same order on all ranks.

    Args:
        what: name of the collective, for the watchdog's messages.
        arrange: maps the received tensor to the result.
    """

    def __init__(
        self,
        received: Tensor,
        work: dist.Work | None,
        world: World,
        what: str,
        arrange: Callable[[Tensor], Tensor] = lambda received: received,
    ) -> None:
        self._received, self._work, self._world, self._what, self._arrange = received, work, world, what, arrange

    def wait(self) -> Tensor:
        """Wait for the collective and return its result (on a GPU: make kernels queued from now on wait for it)."""
        if self._work is not None:
            # Starting a collective waits for nobody, so only this is reported to the watch.
            with self._world.watch.collective(self._what):
                self._work.wait()
        return self._arrange(self._received)


def start_all_gather_rows(x: Tensor, counts: list[int], world: World, what: str = "rows") -> PendingCollective:
    """Start an all-gather: [n, ...] of each rank -> [N, ...] in rank order. No gradient.

    Parts are padded to the longest one, because gloo requires equal sizes.
    """
    what = f"all-gather of {what}"
    if world.size == 1:
        return PendingCollective(x, None, world, what)
    longest = max(counts)
    padded = x.new_zeros((longest, *x.shape[1:]))
    padded[: x.shape[0]] = x
    gathered = x.new_empty((world.size * longest, *x.shape[1:]))
    work = dist.all_gather_into_tensor(gathered, padded, group=world.group, async_op=True)

    def without_padding(gathered: Tensor) -> Tensor:
        if min(counts) == longest:
            return gathered
        return torch.cat([gathered[r * longest : r * longest + count] for r, count in enumerate(counts)])

    return PendingCollective(gathered, work, world, what, without_padding)


def _all_gather(x: Tensor, counts: list[int], world: World, what: str) -> Tensor:
    return start_all_gather_rows(x, counts, world, what).wait()


def _reduce_scatter(x: Tensor, counts: list[int], world: World, what: str) -> Tensor:
    """Reduce-scatter: [N, ...] on every rank -> [n, ...], this rank's part of the sum."""
    if world.size == 1:
        return x
    longest = max(counts)
    padded = x.new_zeros((world.size, longest, *x.shape[1:]))
    for rank, part in enumerate(x.split(counts)):
        padded[rank, : counts[rank]] = part
    local = x.new_empty((longest, *x.shape[1:]))
    with world.watch.collective(f"reduce-scatter of {what}"):
        dist.reduce_scatter_tensor(local, padded.flatten(0, 1), group=world.group)
    return local[: counts[world.rank]]


class _AllGatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, pending: PendingCollective, counts: list[int], world: World) -> Tensor:
        ctx.counts, ctx.world = counts, world
        return pending.wait()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return _reduce_scatter(grad.contiguous(), ctx.counts, ctx.world, "row gradients"), None, None, None


class _ReduceScatterRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, counts: list[int], world: World) -> Tensor:
        ctx.counts, ctx.world = counts, world
        return _reduce_scatter(x, counts, world, "rows")

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return _all_gather(grad.contiguous(), ctx.counts, ctx.world, "row gradients"), None, None


def all_gather_rows(x: Tensor, counts: list[int], world: World, pending: PendingCollective | None = None) -> Tensor:
    """All-gather rows in rank order: [n, ...] -> [N, ...]. Its gradient is a reduce-scatter.

    Args:
        x: this rank's rows; trailing shape and dtype are the same on all ranks.
        counts: number of rows of each rank (`gather_counts`).
        pending: the all-gather of `x`, if it has been started already.
    """
    if world.size == 1:
        return x
    if pending is None:
        pending = start_all_gather_rows(x.detach(), counts, world)
    return _AllGatherRows.apply(x, pending, counts, world)


def reduce_scatter_rows(x: Tensor, counts: list[int], world: World) -> Tensor:
    """Reduce-scatter rows: [N, ...] -> [n, ...], this rank's part of the sum. Its gradient is an all-gather."""
    return x if world.size == 1 else _ReduceScatterRows.apply(x, counts, world)


class _CombineLogSumExp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, partial: Tensor, counts: list[int], world: World) -> Tensor:
        highest = partial.clone()
        with world.watch.collective("all-reduce of maxima"):
            dist.all_reduce(highest, dist.ReduceOp.MAX, group=world.group)
        total = (partial - highest).exp_()
        with world.watch.collective("all-reduce of sums of exponentials"):
            dist.all_reduce(total, group=world.group)
        lse = highest.add_(total.log_())
        ctx.save_for_backward(partial, lse)
        ctx.counts, ctx.world = counts, world
        return lse.split(counts)[world.rank].clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        partial, lse = ctx.saved_tensors
        grad = _all_gather(grad.contiguous(), ctx.counts, ctx.world, "log-sum-exp gradients")
        return grad * (partial - lse).exp(), None, None


def combine_logsumexp(partial: Tensor, counts: list[int], world: World) -> Tensor:
    """Combine the log-sum-exps of all shards.

    Args:
        partial: [N] log-sum-exp over this rank's columns for every gathered row; -inf if it has no columns.
        counts: number of rows of each rank.

    Returns:
        [n], this rank's rows. All-reduces a maximum and a sum of [N]; backward all-gathers [n].
    """
    return partial if world.size == 1 else _CombineLogSumExp.apply(partial, counts, world)


def start_all_to_all_rows(
    x: Tensor, send_counts: list[int], receive_counts: list[int], world: World, what: str = "rows"
) -> PendingCollective:
    """Start to send the first `send_counts[0]` rows to rank 0 and so on; received rows are in rank order. No gradient.

    `x` must not change before `wait`.
    """
    what = f"all-to-all of {what}"
    if world.size == 1:
        return PendingCollective(x, None, world, what)
    received = x.new_empty((sum(receive_counts), *x.shape[1:]))
    work = dist.all_to_all_single(
        received, x.contiguous(), receive_counts, send_counts, group=world.group, async_op=True
    )
    return PendingCollective(received, work, world, what)


def all_to_all_rows(
    x: Tensor, send_counts: list[int], receive_counts: list[int], world: World, what: str = "rows"
) -> Tensor:
    """Send the first `send_counts[0]` rows to rank 0 and so on; received rows are in rank order. No gradient."""
    return start_all_to_all_rows(x, send_counts, receive_counts, world, what).wait()


def exchange_counts(send_counts: Tensor, world: World) -> Tensor:
    """Exchange counts: int64 [W, ...] for each rank -> int64 [W, ...] from each rank, on the host. One all-to-all."""
    if world.size == 1:
        return send_counts
    sent = send_counts.to(world.device).contiguous()
    received = torch.empty_like(sent)
    with world.watch.collective("all-to-all of counts"):
        dist.all_to_all_single(received, sent, group=world.group)
        return received.cpu()  # inside, because here the host waits for its GPU
