"""Row-sharded tables: dense, trainable rows in blocks over all ranks, outside ZeRO-3.

A lookup speaks `input_dist -> lookup -> output_dist`, for several tables at once: `route_ids` dedupes the wanted ids
and tells their owners, `fetch` sends for the rows, `lookup` waits for them; backward runs the same way in reverse. The
same local rows are the operand of the item softmax (`heads.py`): one table, two uses. ZeRO-3 is not used for them
because it has no supported way to leave a parameter in place, and would gather the whole table on every rank.

Routes do not depend on weights: one exchange serves all micro-batches of a step. Rows do not change within a step
either, so those of the next micro-batch may be on their way while this one computes, but never those of the next step.

Lookups give sparse gradients (of the rows that came by), for a lazy optimizer, or dense ones. That of a table that is a
softmax operand too is dense in any case, when autograd has added the two. Optimizers, clipping and files are left to
`table_optimizer.py`, `step.py`, `checkpoint.py`.

Legend: T tables, W ranks, M micro-batches, n wanted ids of this rank, u of them distinct, m rows that ranks want from
this one, R rows, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cllm4rec_dist.collectives import Arriving, all_to_all_rows, exchange_counts, start_all_to_all_rows
from cllm4rec_dist.topology import RowPartition, World


@dataclass(frozen=True)
class Route:
    """Which rows of T tables a rank wants for a micro-batch, and which it must serve.

    On the wire rows stand by (rank, table, row), each of them once.

    Attributes:
        inverse: [n] place of each wanted id among the u rows that come; one table behind the other.
        lengths: ids wanted of each table; sums to n.
        send_counts: distinct rows wanted from each rank; sums to u.
        receive_counts: rows that each rank wants from here; sums to m.
        local_index: for each table the local rows wanted from here, in the order of the asking ranks.
        places: for each table where these stand among the m rows that go.
    """

    inverse: Tensor
    lengths: list[int]
    send_counts: list[int]
    receive_counts: list[int]
    local_index: list[Tensor]
    places: list[Tensor]


def route_ids(wanted: Sequence[Sequence[Tensor]], partitions: Sequence[RowPartition], world: World) -> list[Route]:
    """Dedupe ids and tell their owners, for all micro-batches of a step (input_dist).

    Ids are worked on where they were made, on the host, so that a GPU is waited for once, for the counts.

    Args:
        wanted: for each of M micro-batches and each of T tables int64 [n] global rows on the host, in any order,
            repeated or none; M is the same on all ranks.
        partitions: of the T tables.

    Returns a route for each micro-batch, on the world's device.

    Collectives: all-to-all of counts, then of the distinct ids, as int32 local rows.
    """
    num_batches, num_tables, stride = len(wanted), len(partitions), max(p.block for p in partitions)
    assert num_batches * world.size * num_tables * stride < 1 << 63
    keys = [
        _keys(ids, partition, number * world.size, num_tables, table, stride)
        for number, batch in enumerate(wanted)
        for table, (ids, partition) in enumerate(zip(batch, partitions, strict=True))
    ]
    distinct, inverse = torch.unique(torch.cat(keys), return_inverse=True)  # by (micro-batch, owner, table, row)
    send = torch.bincount(distinct // stride, minlength=num_batches * world.size * num_tables)
    send = send.view(num_batches, world.size, num_tables)
    receive = exchange_counts(send.transpose(0, 1), world)  # [asking rank, M, T]
    sent = _transposed((distinct % stride).to(torch.int32), send.sum(2)).to(world.device)
    asked = all_to_all_rows(sent, send.sum((0, 2)).tolist(), receive.sum((1, 2)).tolist(), world, "row ids")
    asked = _transposed(asked, receive.sum(2)).long().split(receive.sum((0, 2)).tolist())

    routes, num_before = [], 0
    lengths = [[len(ids) for ids in batch] for batch in wanted]
    for number, own in enumerate(inverse.split([sum(part) for part in lengths])):
        table = torch.arange(num_tables).repeat(world.size).repeat_interleave(receive[:, number].flatten())
        places = [(table == t).nonzero().flatten().to(world.device) for t in range(num_tables)]
        routes.append(Route(
            inverse=(own - num_before).to(world.device), lengths=lengths[number],
            send_counts=send[number].sum(1).tolist(), receive_counts=receive[:, number].sum(1).tolist(),
            local_index=[asked[number].index_select(0, place) for place in places], places=places,
        ))  # fmt: skip
        num_before += int(send[number].sum())
    return routes


def _keys(ids: Tensor, partition: RowPartition, first: int, num_tables: int, table: int, stride: int) -> Tensor:
    """Numbers that sort by (owner, table, local row); `first` is what owner 0 counts as."""
    assert ids.numel() == 0 or (int(ids.min()) >= 0 and int(ids.max()) < partition.num_rows), "row id out of range"
    return ((first + ids // partition.block) * num_tables + table) * stride + ids % partition.block


def _transposed(x: Tensor, counts: Tensor) -> Tensor:
    """Parts of [A, B] lengths, one behind the other: from the order (a, b) to (b, a)."""
    if min(counts.shape) == 1:
        return x
    parts = x.split(counts.flatten().tolist())
    return torch.cat([part for start in range(counts.shape[1]) for part in parts[start :: counts.shape[1]]])


@dataclass(frozen=True)
class Fetch:
    """Rows on their way to this rank.

    Attributes:
        versions: of the tables' rows when they were read.
    """

    tables: Sequence[ShardedTable]
    route: Route
    wire: torch.dtype
    arriving: Arriving
    versions: list[int]


def fetch(tables: Sequence[ShardedTable], route: Route, wire: torch.dtype = torch.float32) -> Fetch:
    """Send for the routed rows of `tables`. Starts an all-to-all; nothing of these tables may change until `lookup`.

    Args:
        wire: what rows are rounded to on their way here, and their gradients on the way back. Rows that a rank asks of
            itself are rounded too, so that numbers do not depend on who holds a row. Sums are in fp32.
    """
    first = tables[0]
    sent = torch.empty(sum(route.receive_counts), first.width, dtype=wire, device=first.world.device)
    for table, index, place in zip(tables, route.local_index, route.places, strict=True):
        sent.index_copy_(0, place, table.local_rows.detach().index_select(0, index).to(wire))
    arriving = start_all_to_all_rows(sent, route.receive_counts, route.send_counts, first.world)
    return Fetch(tables, route, wire, arriving, _versions(tables))


def _versions(tables: Sequence[ShardedTable]) -> list[int]:
    return [table.local_rows._version for table in tables]


def lookup(fetched: Fetch) -> list[Tensor]:
    """For each table the fetched rows, fp32 [its ids, D] in the order they were asked for; waits for them.

    Backward brings the gradients of distinct rows to their owners in one all-to-all.
    """
    assert fetched.versions == _versions(fetched.tables), "a table has changed since its rows were fetched"
    distinct = _Arrival.apply(fetched, *(table.local_rows for table in fetched.tables))
    return list(distinct.index_select(0, fetched.route.inverse).split(fetched.route.lengths))


class _Arrival(torch.autograd.Function):
    """Rows that have come, [u, D], as a function of the T tables' local rows."""

    @staticmethod
    def forward(ctx: Any, fetched: Fetch, *local_rows: Tensor) -> Tensor:
        ctx.tables, ctx.route, ctx.wire = fetched.tables, fetched.route, fetched.wire  # not the rows themselves
        return fetched.arriving.wait().float()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        route, world = ctx.route, ctx.tables[0].world
        owned = all_to_all_rows(grad.to(ctx.wire), route.send_counts, route.receive_counts, world, "row gradients")
        gradients = []
        for table, index, place in zip(ctx.tables, route.local_index, route.places, strict=True):
            values = owned.index_select(0, place).float()
            gradients.append(_gradient(table.local_rows.shape, index, values, sparse=table.sparse_gradients))
        return None, *gradients


def _gradient(shape: torch.Size, index: Tensor, values: Tensor, *, sparse: bool) -> Tensor:
    if sparse:
        return torch.sparse_coo_tensor(index[None], values, shape, check_invariants=False)
    return values.new_zeros(shape).index_add_(0, index, values)


class ShardedTable(nn.Module):
    """R trainable rows of width D, a block of them on each rank.

    Args:
        num_rows: R over all ranks.
        width: D.
        world: the run.
        sparse_gradients: of lookups.

    Attributes:
        width: D.
        local_rows: fp32 parameter [rows of this rank, D]; starts at zero, filled by `rows.py` or a checkpoint.
    """

    def __init__(self, num_rows: int, width: int, world: World, *, sparse_gradients: bool) -> None:
        super().__init__()
        self.partition = RowPartition(num_rows, world.size)
        self.world, self.width = world, width
        self.sparse_gradients = sparse_gradients
        local = self.partition.num_local(world.rank)
        self.local_rows = nn.Parameter(torch.zeros(local, width, device=world.device))

    def own(self, local_index: Tensor) -> Tensor:
        """Rows this rank holds, by distinct local index: [k] -> [k, D]. No collective."""
        return F.embedding(local_index, self.local_rows, sparse=self.sparse_gradients)


def touched_rows(local_index: Sequence[Tensor]) -> Tensor:
    """Distinct local rows in several lists of them, sorted. No collective."""
    return torch.unique(torch.cat([*local_index]))
