"""Row-sharded tables: dense, trainable rows in blocks over all ranks, outside ZeRO-3.

A lookup speaks `input_dist -> lookup -> output_dist`: `route_ids` dedupes the wanted ids and tells their owners,
`ShardedTable.lookup` brings the rows; backward runs the same way in reverse. The same local rows are the operand of
the item softmax (`heads.py`): one table, two uses. ZeRO-3 is not used for them because it has no supported way to
leave a parameter in place, and would gather the whole table on every rank.

A table that is only looked up gets sparse gradients (the rows that came by), for a lazy optimizer; one that is also a
softmax operand gets dense ones. Optimizers, clipping and files are left to `engine.py`, `train.py`, `checkpoint.py`.

Legend: n wanted ids of this rank, u of them distinct, m rows that others want from this rank, R rows, D width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cllm4rec_dist.collectives import all_to_all_rows, exchange_counts
from cllm4rec_dist.topology import RowPartition, World


@dataclass(frozen=True)
class Route:
    """Which rows a rank wants and which it must serve; the same for every table of one partition.

    Attributes:
        inverse: [n] place of each wanted id among the distinct ones.
        send_counts: distinct ids wanted from each rank; sums to u.
        receive_counts: ids that each rank wants from here; sums to m.
        local_index: [m] the local rows wanted, in the order of the asking ranks.
    """

    inverse: Tensor
    send_counts: list[int]
    receive_counts: list[int]
    local_index: Tensor


def route_ids(ids: Tensor, partition: RowPartition, world: World) -> Route:
    """Dedupe `ids` and tell their owners (input_dist).

    Args:
        ids: int64 [n] global rows, any order, repeated or empty.

    Collectives: all-to-all of counts, then of the distinct ids.
    """
    assert ids.numel() == 0 or (int(ids.min()) >= 0 and int(ids.max()) < partition.num_rows), "row id out of range"
    distinct, inverse = torch.unique(ids, return_inverse=True)
    bounds = torch.searchsorted(distinct, partition.starts(ids.device))
    send = bounds.diff()
    receive = exchange_counts(send, world)
    send_counts, receive_counts = send.tolist(), receive.tolist()
    wanted = all_to_all_rows(distinct, send_counts, receive_counts, world, "row ids")
    return Route(inverse, send_counts, receive_counts, wanted - partition.range(world.rank)[0])


class _Lookup(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, local_rows: Tensor, route: Route, sparse: bool, world: World) -> Tensor:
        ctx.route, ctx.sparse, ctx.world, ctx.shape = route, sparse, world, local_rows.shape
        served = local_rows.index_select(0, route.local_index)
        distinct = all_to_all_rows(served, route.receive_counts, route.send_counts, world)
        return distinct.index_select(0, route.inverse)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        route: Route = ctx.route
        distinct = grad.new_zeros(sum(route.send_counts), grad.shape[1]).index_add_(0, route.inverse, grad)
        owned = all_to_all_rows(distinct, route.send_counts, route.receive_counts, ctx.world, "row gradients")
        if ctx.sparse:
            gradient = torch.sparse_coo_tensor(route.local_index[None], owned, ctx.shape, check_invariants=False)
            return gradient, None, None, None
        return grad.new_zeros(ctx.shape).index_add_(0, route.local_index, owned), None, None, None


class ShardedTable(nn.Module):
    """R trainable rows of width D, a block of them on each rank.

    Args:
        num_rows: R over all ranks.
        width: D.
        world: the run.
        sparse_gradients: True for a table that is only looked up.

    Attributes:
        local_rows: fp32 parameter [rows of this rank, D]; starts at zero, filled by `rows.py` or a checkpoint.
    """

    def __init__(self, num_rows: int, width: int, world: World, *, sparse_gradients: bool) -> None:
        super().__init__()
        self.partition = RowPartition(num_rows, world.size)
        self.world = world
        self.sparse_gradients = sparse_gradients
        local = self.partition.num_local(world.rank)
        self.local_rows = nn.Parameter(torch.zeros(local, width, device=world.device))

    def lookup(self, route: Route) -> Tensor:
        """Rows of the routed ids, [n, D] in the order they were asked for. One all-to-all each way."""
        return _Lookup.apply(self.local_rows, route, self.sparse_gradients, self.world)

    def own(self, local_index: Tensor) -> Tensor:
        """Rows this rank holds, by distinct local index: [k] -> [k, D]. No collective."""
        return F.embedding(local_index, self.local_rows, sparse=self.sparse_gradients)


def touched_rows(routes: list[Route]) -> Tensor:
    """Distinct local rows that any rank asked for in `routes`, sorted. No collective."""
    return torch.unique(torch.cat([route.local_index for route in routes]))
