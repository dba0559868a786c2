"""Everything of the model that lives outside the engine: rows, head, words, and how documents become embeddings.

The engine runs the backbone between `embed` and the queries:

    token ids --route--> rows --embedded--> [engine] --> hidden --> queries --> objectives

Legend: R rows, L their length, D hidden, Q query positions, V words, U users, I items.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cllm4rec_dist.config import HeadConfig
from cllm4rec_dist.corpus.prompts import MicroBatch
from cllm4rec_dist.model.backbone import Words
from cllm4rec_dist.model.heads import ItemHead, Sampling
from cllm4rec_dist.model.tables import Fetch, Route, ShardedTable, fetch, lookup, route_ids, touched_rows
from cllm4rec_dist.topology import RowPartition, World


@dataclass(frozen=True)
class RoutedBatch:
    """A micro-batch on the device that computes, and the route of its user and item tokens: one for both LLMs."""

    batch: MicroBatch
    route: Route


@dataclass(frozen=True)
class Embedded:
    """What the backbone reads of a micro-batch.

    Attributes:
        tokens: [R, L, D] in the words' dtype.
        item_rows: [item tokens of the documents over items, D] in fp32, as they were put in.
    """

    tokens: Tensor
    item_rows: Tensor


class TokenRows(nn.Module):
    """User and item rows of one LLM."""

    def __init__(self, num_users: int, num_items: int, width: int, world: World, *, lazy: bool) -> None:
        super().__init__()
        self.users = ShardedTable(num_users, width, world, sparse_gradients=lazy)
        self.items = ShardedTable(num_items, width, world, sparse_gradients=lazy)


class Recommender(nn.Module):
    """Collaborative rows (which finetuning turns into z_rec), content rows, item head and frozen words.

    Args:
        num_users, num_items: U, I; U counts a shared user row too.
        words: frozen word embeddings and head; D is theirs.
        dropout: of user and item embeddings at the input.
        wire: what rows and their gradients are rounded to between ranks.
        lazy: sparse gradients for tables that are only looked up.
        content: False leaves the content LLM out.
    """

    def __init__(
        self,
        num_users: int,
        num_items: int,
        words: Words,
        head: HeadConfig,
        world: World,
        *,
        dropout: float,
        wire: torch.dtype,
        lazy: bool,
        content: bool,
    ) -> None:
        super().__init__()
        width = words.embedding.shape[1]
        self.words, self.world, self.dropout, self.wire = words, world, dropout, wire
        self.num_negatives = head.num_negatives
        # The collaborative items are the operand of the item softmax too, which makes their whole gradient dense.
        self.collaborative = TokenRows(num_users, num_items, width, world, lazy=lazy)
        self.content = TokenRows(num_users, num_items, width, world, lazy=lazy) if content else None
        self.head = ItemHead(
            self.item_partition.num_local(world.rank),
            world,
            similarity=head.similarity,
            temperature=head.temperature,
            item_bias=head.item_bias,
            pool_residual=head.pool_residual,
        )

    @property
    def item_partition(self) -> RowPartition:
        """Who holds which item rows."""
        return self.collaborative.items.partition

    @property
    def tables(self) -> list[ShardedTable]:
        """Users and items of the collaborative LLM, then those of the content LLM."""
        return [table for rows in (self.collaborative, self.content) if rows for table in (rows.users, rows.items)]

    def sharded_parameters(self) -> Iterator[tuple[str, nn.Parameter, RowPartition]]:
        """Parameters that are blocks of rows, with the partition that says of which rows."""
        for prefix, rows in (("collaborative", self.collaborative), ("content", self.content)):
            if rows is not None:
                yield f"{prefix}.users", rows.users.local_rows, rows.users.partition
                yield f"{prefix}.items", rows.items.local_rows, rows.items.partition
        if self.head.local_bias is not None:
            yield "head.bias", self.head.local_bias, self.item_partition

    def replicated_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Parameters of which every rank holds the same whole copy; their gradients must be summed over the ranks."""
        if self.head.log_temperature is not None:
            yield "head.log_temperature", self.head.log_temperature

    def route(self, batches: Sequence[MicroBatch]) -> list[RoutedBatch]:
        """Tell the owners of the users and items of a step's micro-batches which rows are wanted. Two all-to-alls.

        Args:
            batches: on the host; equally many on all ranks, with or without texts alike.
        """
        wanted = [[ids for d in batch.documents for ids in (d.user_ids, d.item_ids)] for batch in batches]
        partitions = [table.partition for table in self.tables[: len(wanted[0])]]
        routes = route_ids(wanted, partitions, self.world)
        return [RoutedBatch(b.to(self.world.device), route) for b, route in zip(batches, routes, strict=True)]

    def touched(self, routed: Sequence[RoutedBatch]) -> tuple[Tensor, Tensor]:
        """Local users and items that stand in any document of `routed` on any rank. No collective."""
        index = [batch.route.local_index for batch in routed]
        users, items = (touched_rows([rows for tables in index for rows in tables[kind::2]]) for kind in (0, 1))
        return users, items

    def embedded(self, routed: Sequence[RoutedBatch]) -> Iterator[Embedded]:
        """Embeddings of one micro-batch after the other; the rows of the next are on their way meanwhile.

        Collectives: one all-to-all for each, its reverse in backward. Rows must not change before the iterator's end.
        """
        coming = self._fetch(routed[0])
        for number, batch in enumerate(routed):
            fetched = coming
            if number + 1 < len(routed):
                coming = self._fetch(routed[number + 1])
            yield self.embed(batch.batch, lookup(fetched))

    def _fetch(self, routed: RoutedBatch) -> Fetch:
        return fetch(self.tables[: len(routed.route.lengths)], routed.route, self.wire)

    def embed(self, batch: MicroBatch, rows: list[Tensor]) -> Embedded:
        """Words from the backbone, users and items from their `rows`, with dropout."""
        places = torch.cat([p for d in batch.documents for p in (d.user_places, d.item_places)])
        values = torch.cat(rows)
        if self.training and self.dropout > 0:
            keys, positions = batch.keys.flatten()[places], batch.positions.flatten()[places]
            values = keyed_dropout(values, keys, positions, self.dropout)
        embedded = F.embedding(batch.word_ids, self.words.embedding)
        flat = embedded.flatten(0, 1).index_copy(0, places, values.to(embedded.dtype))
        if batch.no_user_places is not None:
            flat = flat.index_fill(0, batch.no_user_places, 0.0)
        tokens = flat.view_as(embedded)
        item_rows = values[len(rows[0]) : len(rows[0]) + len(rows[1])]
        return Embedded(tokens, item_rows)

    def item_queries(self, hidden: Tensor, item_rows: Tensor, batch: MicroBatch) -> Tensor:
        """Hidden states [R, L, D] -> what the item head multiplies with its operand, [Q, D or D+1]."""
        queries = hidden.flatten(0, 1)[batch.items.query_places]
        pooled = torch.zeros_like(queries, dtype=item_rows.dtype)
        if self.head.pool_residual:
            pooled = _sums_of_document(item_rows, batch)
        return self.head.queries(queries, pooled)

    def item_operand(self) -> Tensor:
        """This rank's rows of the item softmax, [rows, D or D+1]."""
        return self.head.operand(self.collaborative.items.local_rows)

    def item_sampling(self, batch: MicroBatch) -> Sampling | None:
        """Items of a sampled softmax, drawn by the keys of the documents, so that a resumed run draws the same ones."""
        return Sampling(self.num_negatives, int(batch.keys.sum())) if self.num_negatives else None


def _sums_of_document(item_rows: Tensor, batch: MicroBatch) -> Tensor:
    """For each query the sum of the item rows from its document's start up to itself: [item tokens, D] -> [Q, D]."""
    # Item tokens before each place, and so before each document, as numbers of the item rows, which stand in order.
    num_before = batch.items.item_places.new_zeros(batch.word_ids.numel() + 1)
    num_before[1:].index_fill_(0, batch.items.item_places, 1)
    num_before = num_before.cumsum(0)
    places = batch.items.query_places
    first, stop = num_before[places - batch.positions.flatten()[places]], num_before[places + 1]
    sums = F.pad(item_rows.cumsum(dim=0), (0, 0, 1, 0))
    # The direction of an empty sum has a gradient of 1e12, which would cancel only on paper.
    return torch.where((stop > first)[:, None], sums[stop] - sums[first], 0.0)


def keyed_dropout(x: Tensor, keys: Tensor, positions: Tensor, share: float) -> Tensor:
    """Dropout whose mask is a function of (key, position, dimension): the same on any rank and at any batch size.

    Args:
        x: [n, D]. keys, positions: int64 [n]. share: of the entries set to zero; the rest are scaled up.
    """
    rows = _mix(keys ^ (positions + 1) * 0x2545F4914F6CDD1D)
    bits = _mix(rows[:, None] + torch.arange(x.shape[1], device=x.device) * 0x1E3779B97F4A7C15)
    kept = (bits & 0xFFFFFF) >= int(share * (1 << 24))
    return torch.where(kept, x / (1 - share), 0.0)


def _mix(bits: Tensor) -> Tensor:
    """A 64-bit finaliser (xor-shift and multiply, wrapping): every input bit reaches every output bit."""
    bits = (bits ^ (bits >> 32 & 0xFFFFFFFF)) * 0x5851F42D4C957F2D
    bits = (bits ^ (bits >> 29 & 0x7FFFFFFFF)) * 0x14057B7EF767814F
    return bits ^ (bits >> 32 & 0xFFFFFFFF)
