"""Collectives with exact gradients, over ragged rows.

Convention for every autograd function here and in `model/`: the gradient is that of the *sum* of all ranks' losses.
What each rank hands to `backward` is its own part of that sum. gloo and NCCL both have the tensor forms used here;
lengths may differ between ranks and be zero. Every function is a collective: all ranks must call it, in one order.
Each names itself to the watchdog, which tells in which one a rank waits.

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
    """Every rank's `values` (equally many, int64), in rank order. One all-gather.

    Args:
        group: of all ranks, on CPUs, for a thread that must not meddle with the main group's order; that one if None.
        what: is gathered, for whoever reads where a rank is.
    """
    if world.size == 1:
        return [list(values)]
    device = world.device if group is None else torch.device("cpu")
    own = torch.tensor([*values], dtype=torch.int64, device=device)
    gathered = own.new_empty(world.size, len(values))
    # The watch knows where the main thread is, and nothing of other threads.
    with world.watch.collective(f"all-gather of {what}") if group is None else nullcontext():
        dist.all_gather_into_tensor(gathered.view(-1), own, group=group)
        return gathered.tolist()


def gather_counts(count: int, world: World) -> list[int]:
    """Every rank's `count`, in rank order. All-gathers one integer."""
    return [found for (found,) in gather_integers([count], world, what="counts")]


def broadcast_text(text: str, world: World, what: str) -> str:
    """Rank 0's `text`, a short one, on every rank. All-gathers its length and then its bytes.

    Args:
        what: the text is about, for whoever reads where a rank is.
    """
    content = text.encode() if world.is_main else b""
    length = gather_integers([len(content)], world, what=what)[0][0]
    return bytes(gather_integers([*content.ljust(length, b"\0")], world, what=what)[0]).decode()


def require_agreement(values: Mapping[str, int], world: World) -> None:
    """Make sure that `values`, int64 and named alike on all ranks, are equal on all of them. One all-gather.

    Raises:
        FaultError: on every rank: the first value that differs, the ranks that have another one than most (than rank 0
            has, where there are no most), and what they have.
    """
    everyones = gather_integers([*values.values()], world, what=f"what must agree ({', '.join(values)})")
    for name, found in zip(values, zip(*everyones, strict=True), strict=True):
        usual = max(found, key=found.count)  # of equally many the first, rank 0's
        others = {rank: value for rank, value in enumerate(found) if value != usual}
        if others:
            raise FaultError(
                f"{name} on rank{'s' if len(others) > 1 else ''} {', '.join(map(str, others))}",
                next(iter(others.values())) if len(set(others.values())) == 1 else [*others.values()],
                f"differs from {usual} on the other ranks",
                "Every rank must run the same code on the same configuration and corpus; if they do, suspect the host.",
            )


def barrier(world: World, what: str) -> None:
    """Wait until all ranks are here.

    Args:
        what: is waited for, as a person would say it (`the corpus to be there`).
    """
    if world.size > 1:
        with world.watch.collective(f"barrier for {what}"):
            dist.barrier()


def all_reduce_sum(x: Tensor, world: World, what: str = "sums") -> Tensor:
    """Sum of `x` over the ranks, without gradient. `x` itself is left as it is."""
    total = x.detach().clone()
    if world.size > 1:
        with world.watch.collective(f"all-reduce of {what}"):
            dist.all_reduce(total)
    return total


def sum_on_host(x: Tensor, world: World, what: str) -> list[Any]:
    """Sum of `x` over the ranks as Python numbers. All-reduces `x`."""
    with world.watch.collective(f"all-reduce of {what}"):
        return all_reduce_sum(x, world, what).tolist()  # inside, because it is here that a host waits for its GPU


class PendingCollective:
    """What a collective that has been started brings; `wait` must be called once, in the same order on all ranks.

    Args:
        what: has been started, for whoever reads where a rank is.
        arrange: the received tensor -> what was asked for.
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
        """The rows, when they are here (on a GPU: for what is queued from now on)."""
        if self._work is not None:
            # Nobody is waited for before, so the watch is told of this alone.
            with self._world.watch.collective(self._what):
                self._work.wait()
        return self._arrange(self._received)


def start_all_gather_rows(x: Tensor, counts: list[int], world: World, what: str = "rows") -> PendingCollective:
    """Begin to bring [n, ...] of every rank to every rank, [N, ...] in rank order. No gradient.

    Parts are padded to the longest, since ragged all-gathers do not exist on gloo.
    """
    what = f"all-gather of {what}"
    if world.size == 1:
        return PendingCollective(x, None, world, what)
    longest = max(counts)
    padded = x.new_zeros((longest, *x.shape[1:]))
    padded[: x.shape[0]] = x
    gathered = x.new_empty((world.size * longest, *x.shape[1:]))
    work = dist.all_gather_into_tensor(gathered, padded, async_op=True)

    def without_padding(gathered: Tensor) -> Tensor:
        if min(counts) == longest:
            return gathered
        return torch.cat([gathered[r * longest : r * longest + count] for r, count in enumerate(counts)])

    return PendingCollective(gathered, work, world, what, without_padding)


def _all_gather(x: Tensor, counts: list[int], world: World, what: str) -> Tensor:
    return start_all_gather_rows(x, counts, world, what).wait()


def _reduce_scatter(x: Tensor, counts: list[int], world: World, what: str) -> Tensor:
    """[N, ...] on every rank -> sum over the ranks of this rank's part [n, ...]."""
    if world.size == 1:
        return x
    longest = max(counts)
    padded = x.new_zeros((world.size, longest, *x.shape[1:]))
    for rank, part in enumerate(x.split(counts)):
        padded[rank, : counts[rank]] = part
    own = x.new_empty((longest, *x.shape[1:]))
    with world.watch.collective(f"reduce-scatter of {what}"):
        dist.reduce_scatter_tensor(own, padded.flatten(0, 1))
    return own[: counts[world.rank]]


class _AllGatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, arriving: PendingCollective, counts: list[int], world: World) -> Tensor:
        ctx.counts, ctx.world = counts, world
        return arriving.wait()

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


def all_gather_rows(x: Tensor, counts: list[int], world: World, arriving: PendingCollective | None = None) -> Tensor:
    """Rows of all ranks, in rank order: [n, ...] -> [N, ...]. Its gradient is a reduce-scatter.

    Args:
        x: this rank's rows; trailing shape and dtype are the same on all ranks.
        counts: rows of every rank (`gather_counts`).
        arriving: where the all-gather of `x` has been started before.
    """
    if world.size == 1:
        return x
    if arriving is None:
        arriving = start_all_gather_rows(x.detach(), counts, world)
    return _AllGatherRows.apply(x, arriving, counts, world)


def reduce_scatter_rows(x: Tensor, counts: list[int], world: World) -> Tensor:
    """Sum over ranks of this rank's part: [N, ...] -> [n, ...]. Its gradient is an all-gather."""
    return x if world.size == 1 else _ReduceScatterRows.apply(x, counts, world)


class _CombineLogSumExp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, partial: Tensor, counts: list[int], world: World) -> Tensor:
        highest = partial.clone()
        with world.watch.collective("all-reduce of maxima"):
            dist.all_reduce(highest, dist.ReduceOp.MAX)
        total = (partial - highest).exp_()
        with world.watch.collective("all-reduce of sums of exponentials"):
            dist.all_reduce(total)
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
    """Log-sum-exp over all shards from each shard's own.

    Args:
        partial: [N] log-sum-exp over this rank's columns for every gathered row; -inf where it has no column.
        counts: rows of every rank.

    Returns:
        [n], this rank's rows. All-reduces a maximum and a sum of [N]; backward all-gathers [n].
    """
    return partial if world.size == 1 else _CombineLogSumExp.apply(partial, counts, world)


def start_all_to_all_rows(
    x: Tensor, send_counts: list[int], receive_counts: list[int], world: World, what: str = "rows"
) -> PendingCollective:
    """Begin to send the first `send_counts[0]` rows to rank 0 and so on; rows come in rank order. No gradient.

    `x` must be left as it is until the rows are there.
    """
    what = f"all-to-all of {what}"
    if world.size == 1:
        return PendingCollective(x, None, world, what)
    received = x.new_empty((sum(receive_counts), *x.shape[1:]))
    work = dist.all_to_all_single(received, x.contiguous(), receive_counts, send_counts, async_op=True)
    return PendingCollective(received, work, world, what)


def all_to_all_rows(
    x: Tensor, send_counts: list[int], receive_counts: list[int], world: World, what: str = "rows"
) -> Tensor:
    """Send the first `send_counts[0]` rows to rank 0 and so on; rows come back in rank order. No gradient."""
    return start_all_to_all_rows(x, send_counts, receive_counts, world, what).wait()


def exchange_counts(send_counts: Tensor, world: World) -> Tensor:
    """int64 [W, ...] for each rank -> int64 [W, ...] from each rank; both on the host. One all-to-all."""
    if world.size == 1:
        return send_counts
    sent = send_counts.to(world.device).contiguous()
    received = torch.empty_like(sent)
    with world.watch.collective("all-to-all of counts"):
        dist.all_to_all_single(received, sent)
        return received.cpu()  # inside, because it is here that a host waits for its GPU


def scatter_rows(rows: Tensor | None, partition_sizes: list[int], width: int, world: World) -> Tensor:
    """Rank 0's fp32 [sum of sizes, width] -> this rank's block [sizes[rank], width], on the CPU side of the world."""
    if world.size == 1:
        assert rows is not None
        return rows.to(world.device)
    longest = max(partition_sizes)
    own = torch.empty(longest, width, device=world.device)
    parts = None
    if world.rank == 0:
        assert rows is not None
        parts = [torch.zeros(longest, width, device=world.device) for _ in partition_sizes]
        for part, block in zip(parts, rows.split(partition_sizes), strict=True):
            part[: len(block)] = block.to(world.device)
    with world.watch.collective("scatter of rows"):
        dist.scatter(own, parts, src=0)
    return own[: partition_sizes[world.rank]].clone()
