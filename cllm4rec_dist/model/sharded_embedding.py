"""Row-sharded embedding tables: trainable rows in blocks over all ranks, outside ZeRO-3.

A lookup in several tables has torchrec's three stages: `route_ids` dedupes the ids and sends them to the ranks that own
the rows (input_dist), `start_lookup` reads the rows and starts to send them back (lookup), `PendingLookup.wait`
receives them (output_dist). Backward takes the reverse way. The local rows are also the weight of the item softmax
(`item_head.py`). ZeRO-3 cannot leave a parameter sharded in a forward: it would gather the whole table on every rank.

Routes do not depend on weights, so one exchange serves all micro-batches of a step. Rows do not change within a step,
so the lookup of the next micro-batch may overlap with the compute of this one, but never across steps.

Lookups have sparse gradients for sparse optimizer updates, or dense ones. The gradient of a table that is a softmax
weight too is always dense, since autograd adds both. `embedding_optimizer.py` steps the tables, `step.py` clips their
gradients, and `checkpointing/` saves them.

Legend: T tables, W ranks, M micro-batches, n ids looked up by this rank, u of them distinct, m rows of this rank that
all ranks look up, R rows, D width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cllm4rec_dist.distributed.collectives import (
    PendingCollective,
    all_to_all_rows,
    exchange_counts,
    start_all_to_all_rows,
)
from cllm4rec_dist.distributed.topology import RowPartition, World


@dataclass(frozen=True)
class Route:
    """Rows of T tables that this rank receives and sends for a micro-batch.

    Each distinct row is sent once, ordered by (rank, table, row).

    Attributes:
        inverse: [n] index of each id's row among the u rows received; one table after the other.
        num_ids: by table, ids looked up; sums to n.
        send_counts: distinct ids sent to each rank; sums to u.
        receive_counts: ids received from each rank; sums to m.
        local_index: by table, local rows to send, ordered by destination rank.
        positions: by table, index of these among the m rows sent.
    """

    inverse: Tensor
    num_ids: dict[str, int]
    send_counts: list[int]
    receive_counts: list[int]
    local_index: dict[str, Tensor]
    positions: dict[str, Tensor]


def route_ids(ids: Sequence[Mapping[str, Tensor]], partitions: Mapping[str, RowPartition], world: World) -> list[Route]:
    """Dedupe ids and send them to the ranks that own their rows, for all micro-batches of a step (input_dist).

    Runs on the host, where ids are made, so that only the counts need a synchronization with the GPU.

    Args:
        ids: for each of M micro-batches, by table, int64 [..] global rows on the host, in any order, with duplicates or
            empty; M and the tables are the same on all ranks.
        partitions: by table.

    Returns:
        One route per micro-batch, on the world's device.

    Collectives: all-to-all of counts, then of the distinct ids, as int32 local rows.
    """
    num_batches, num_tables, stride = len(ids), len(partitions), max(p.block for p in partitions.values())
    assert num_batches * world.size * num_tables * stride < 1 << 63
    keys = [
        _sort_keys(batch[name], partition, index * world.size, num_tables, table, stride)
        for index, batch in enumerate(ids)
        for table, (name, partition) in enumerate(partitions.items())
    ]
    distinct, inverse = torch.unique(torch.cat(keys), return_inverse=True)  # by (micro-batch, owner, table, row)
    send = torch.bincount(distinct // stride, minlength=num_batches * world.size * num_tables)
    send = send.view(num_batches, world.size, num_tables)
    receive = exchange_counts(send.transpose(0, 1), world)  # [requesting rank, M, T]
    sent = _transpose_segments((distinct % stride).to(torch.int32), send.sum(2)).to(world.device)
    received = all_to_all_rows(sent, send.sum((0, 2)).tolist(), receive.sum((1, 2)).tolist(), world, "row ids")
    requested = _transpose_segments(received, receive.sum(2)).long().split(receive.sum((0, 2)).tolist())

    routes, num_before = [], 0
    num_ids = [{name: len(batch[name]) for name in partitions} for batch in ids]
    for index, part in enumerate(inverse.split([sum(counts.values()) for counts in num_ids])):
        table = torch.arange(num_tables).repeat(world.size).repeat_interleave(receive[:, index].flatten())
        positions = {name: (table == t).nonzero().flatten().to(world.device) for t, name in enumerate(partitions)}
        routes.append(
            Route(
                inverse=(part - num_before).to(world.device),
                num_ids=num_ids[index],
                send_counts=send[index].sum(1).tolist(),
                receive_counts=receive[:, index].sum(1).tolist(),
                local_index={name: requested[index].index_select(0, at) for name, at in positions.items()},
                positions=positions,
            )
        )
        num_before += int(send[index].sum())
    return routes


def _sort_keys(ids: Tensor, partition: RowPartition, first: int, num_tables: int, table: int, stride: int) -> Tensor:
    """Encode (owner, table, local row) as integers that sort in this order; owner 0 is encoded as `first`."""
    assert ids.numel() == 0 or (int(ids.min()) >= 0 and int(ids.max()) < partition.num_rows), "row id out of range"
    return ((first + ids // partition.block) * num_tables + table) * stride + ids % partition.block


def _transpose_segments(x: Tensor, counts: Tensor) -> Tensor:
    """Reorder consecutive segments, of lengths [A, B], from (a, b) to (b, a) order."""
    if min(counts.shape) == 1:
        return x
    parts = x.split(counts.flatten().tolist())
    return torch.cat([part for start in range(counts.shape[1]) for part in parts[start :: counts.shape[1]]])


def start_lookup(
    tables: Mapping[str, RowShardedEmbedding], route: Route, comm_dtype: torch.dtype = torch.float32
) -> PendingLookup:
    """Start to send the routed rows of `tables` to the ranks that look them up. Starts an all-to-all.

    The tables must not change before `PendingLookup.wait`.

    Args:
        tables: the route's tables, by name.
        comm_dtype: dtype of rows and their gradients in communication. Rows that a rank looks up in its own shard are
            rounded too, so that results do not depend on the partition. Gradients are summed in fp32.
    """
    first = next(iter(tables.values()))
    sent = torch.empty(sum(route.receive_counts), first.width, dtype=comm_dtype, device=first.world.device)
    for name, table in tables.items():
        rows = table.local_rows.detach().index_select(0, route.local_index[name])
        sent.index_copy_(0, route.positions[name], rows.to(comm_dtype))
    pending = start_all_to_all_rows(sent, route.receive_counts, route.send_counts, first.world)
    return PendingLookup(tables, route, comm_dtype, pending, _versions(tables))


def _versions(tables: Mapping[str, RowShardedEmbedding]) -> list[int]:
    return [table.local_rows._version for table in tables.values()]


@dataclass(frozen=True)
class PendingLookup:
    """A started lookup.

    Attributes:
        versions: autograd versions of the tables' parameters when they were read.
    """

    tables: Mapping[str, RowShardedEmbedding]
    route: Route
    comm_dtype: torch.dtype
    pending: PendingCollective
    versions: list[int]

    def wait(self) -> dict[str, Tensor]:
        """Rows by table, fp32 [ids of the table, D] in the order of the ids.

        Backward sends the gradients of distinct rows to their owners in one all-to-all.
        """
        assert self.versions == _versions(self.tables), "a table has changed since its lookup was started"
        distinct = _LookupRows.apply(self, *(table.local_rows for table in self.tables.values()))
        rows = distinct.index_select(0, self.route.inverse).split([*self.route.num_ids.values()])
        return dict(zip(self.route.num_ids, rows, strict=True))


class _LookupRows(torch.autograd.Function):
    """Received rows [u, D] as a function of the T tables' local rows."""

    @staticmethod
    def forward(ctx: Any, lookup: PendingLookup, *local_rows: Tensor) -> Tensor:
        ctx.tables, ctx.route, ctx.comm_dtype = lookup.tables, lookup.route, lookup.comm_dtype  # not the rows
        return lookup.pending.wait().float()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        route, world = ctx.route, next(iter(ctx.tables.values())).world
        counts = route.send_counts, route.receive_counts
        received = all_to_all_rows(grad.to(ctx.comm_dtype), *counts, world, "row gradients")
        gradients = []
        for name, table in ctx.tables.items():
            values = received.index_select(0, route.positions[name]).float()
            index, sparse = route.local_index[name], table.sparse_gradients
            gradients.append(_gradient(table.local_rows.shape, index, values, sparse=sparse))
        return None, *gradients


def _gradient(shape: torch.Size, index: Tensor, values: Tensor, *, sparse: bool) -> Tensor:
    if sparse:
        return torch.sparse_coo_tensor(index[None], values, shape, check_invariants=False)
    return values.new_zeros(shape).index_add_(0, index, values)


class RowShardedEmbedding(nn.Module):
    """Embedding of R trainable rows of width D, in one block of rows per rank.

    Args:
        num_rows: R over all ranks.
        width: D.
        world: the ranks that share the rows.
        sparse_gradients: use sparse gradients for lookups.

    Attributes:
        width: D.
        local_rows: fp32 parameter [rows of this rank, D]; zero until `embedding_init.py` or a checkpoint fills it.
    """

    def __init__(self, num_rows: int, width: int, world: World, *, sparse_gradients: bool) -> None:
        super().__init__()
        self.partition = RowPartition(num_rows, world.size)
        self.world, self.width = world, width
        self.sparse_gradients = sparse_gradients
        local = self.partition.num_local(world.rank)
        self.local_rows = nn.Parameter(torch.zeros(local, width, device=world.device))

    def local_lookup(self, local_index: Tensor) -> Tensor:
        """Rows of this rank by distinct local index: [k] -> [k, D]. No collective."""
        return F.embedding(local_index, self.local_rows, sparse=self.sparse_gradients)


def touched_rows(local_index: Sequence[Tensor]) -> Tensor:
    """Sorted distinct local rows of several lists. No collective."""
    return torch.unique(torch.cat([*local_index]))
