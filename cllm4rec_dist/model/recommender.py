"""The model: user, item and word embeddings, the item head, and one forward over a micro-batch.

    ids --route--> --embed--> tokens [R, L, D] --backbone--> hidden [R, L, D] --queries--> losses

The backbone is an argument of the forward, because ZeRO-3 wraps it.

Legend: R rows, L their length, D hidden size, d width of the tables, Q positions that predict, U users, I items.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cllm4rec_dist.config import HeadConfig
from cllm4rec_dist.corpus.collate import MicroBatch
from cllm4rec_dist.distributed.topology import RowPartition, World
from cllm4rec_dist.model.backbone import FrozenEmbeddings
from cllm4rec_dist.model.dtypes import DTYPES
from cllm4rec_dist.model.item_head import ItemHead
from cllm4rec_dist.model.losses import item_loss, mutual_regularization, text_loss
from cllm4rec_dist.model.sharded_cross_entropy import GatheringQueries
from cllm4rec_dist.model.sharded_embedding import (
    PendingLookup,
    Route,
    RowShardedEmbedding,
    route_ids,
    start_lookup,
    touched_rows,
)
from cllm4rec_dist.model.table_replicas import share_touched_rows

Backbone = Callable[[Tensor, Tensor, int], Tensor]
"""Embeddings [R, L, D], positions [R, L] and the flat index where the content LLM starts -> hidden states [R, L, D]."""


class UserItemEmbeddings(nn.Module):
    """User and item embeddings of one LLM."""

    def __init__(self, num_users: int, num_items: int, width: int, world: World, *, sparse_gradients: bool) -> None:
        super().__init__()
        self.users = RowShardedEmbedding(num_users, width, world, sparse_gradients=sparse_gradients)
        self.items = RowShardedEmbedding(num_items, width, world, sparse_gradients=sparse_gradients)


class Recommender(nn.Module):
    """Both LLMs' user and item embeddings, the item head and the frozen word embeddings.

    The collaborative rows are the paper's z_l in pretraining and its z_rec in finetuning; the content rows are z_c.

    Args:
        num_users, num_items: U and I; U includes a shared user row.
        world: the ranks that together hold the tables.
        replicas: the ranks that hold the same rows as this one; this rank alone if None.
        words: frozen word embeddings and head, which define D.
        width: d, width of the tables, at most D; D if None. Narrower rows enter the backbone through `input_projection`
            and are predicted through the head's projection.
        dropout: probability for user and item embeddings at the input.
        comm_dtype: dtype of rows and their gradients in communication.
        sparse_gradients: use sparse gradients for lookups and sampled rows. The gradient of the collaborative items is
            dense in any case without `head.num_negatives`, since they are the whole weight of the item softmax.
        content: build the content LLM's tables.
        max_logits: logits that a head holds at a time; the device's default if None.

    Attributes:
        cumulative_counts: int64 [local items] on the host, cumulative sums of the numbers to which the probabilities of
            negatives are proportional; None to draw them uniformly.
        input_projection: replicated [d, D], shared by all tables, only if d < D; its gradient must be summed over the
            ranks.
    """

    def __init__(
        self,
        num_users: int,
        num_items: int,
        words: FrozenEmbeddings,
        head: HeadConfig,
        world: World,
        *,
        dropout: float,
        comm_dtype: torch.dtype,
        sparse_gradients: bool,
        content: bool,
        width: int | None = None,
        max_logits: int | None = None,
        replicas: World | None = None,
    ) -> None:
        super().__init__()
        hidden_size = words.embedding.shape[1]
        width = hidden_size if width is None else width
        sizes = num_users, num_items, width
        self.words, self.world, self.dropout, self.comm_dtype = words, world, dropout, comm_dtype
        self.replicas = replace(world, rank=0, size=1) if replicas is None else replicas
        self.num_negatives, self.max_logits = head.num_negatives, max_logits
        self.cumulative_counts: np.ndarray | None = None
        self.compute_dtype = None if head.compute_dtype == "fp32" else DTYPES[head.compute_dtype]
        self.query_comm_dtype = None if head.comm_dtype == "fp32" else DTYPES[head.comm_dtype]
        self.collaborative = UserItemEmbeddings(*sizes, world, sparse_gradients=sparse_gradients)
        if not head.num_negatives:
            # These rows are the weight of the item softmax too, whose gradient is dense. A sparse gradient of lookups
            # is added to it without a second dense one.
            self.collaborative.items.sparse_gradients = True
        self.content = UserItemEmbeddings(*sizes, world, sparse_gradients=sparse_gradients) if content else None
        self.head = ItemHead(
            self.item_partition.num_local(world.rank),
            world,
            similarity=head.similarity,
            temperature=head.temperature,
            item_bias=head.item_bias,
            pool_residual=head.pool_residual,
            projection=(hidden_size, width) if head.projection or width < hidden_size else None,
        )
        self.input_projection: nn.Parameter | None = None
        if width < hidden_size:
            self.input_projection = nn.Parameter(torch.zeros(width, hidden_size, device=world.device))

    @property
    def item_partition(self) -> RowPartition:
        """Assignment of item rows to ranks."""
        return self.collaborative.items.partition

    @property
    def tables(self) -> dict[str, RowShardedEmbedding]:
        """User and item tables by name, as in `MicroBatch.ids`."""
        llms = {"collaborative": self.collaborative, "content": self.content}
        return {
            f"{name}.{kind}": table
            for name, llm in llms.items()
            if llm is not None
            for kind, table in (("users", llm.users), ("items", llm.items))
        }

    def sharded_parameters(self) -> Iterator[tuple[str, nn.Parameter, RowPartition]]:
        """Yield name, parameter and partition of each parameter that holds a block of rows."""
        for name, table in self.tables.items():
            yield name, table.local_rows, table.partition
        if self.head.local_bias is not None:
            yield "head.bias", self.head.local_bias, self.item_partition

    def replicated_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield the parameters that every rank holds whole; their gradients must be summed over the ranks."""
        if self.head.log_temperature is not None:
            yield "head.log_temperature", self.head.log_temperature
        if self.head.projection is not None:
            yield "head.projection", self.head.projection
        if self.input_projection is not None:
            yield "input_projection", self.input_projection

    def route(self, batches: Sequence[MicroBatch]) -> list[Route]:
        """Send the user and item ids of a step to the ranks that own their rows. Two all-to-alls.

        Args:
            batches: on the host; all ranks have equally many, and either all or none have texts.
        """
        partitions = {name: self.tables[name].partition for name in batches[0].ids}
        return route_ids([batch.ids for batch in batches], partitions, self.world)

    def touched(self, routes: Sequence[Route]) -> dict[str, Tensor]:
        """Local rows of `users` and `items` that appear in a step's documents on any rank.

        Each is in the result of one rank, because replicas share what they have in common. Collectives: with replicas,
        all-gathers of counts and rows among them.
        """
        return {
            kind: share_touched_rows(
                touched_rows(
                    [rows for route in routes for name, rows in route.local_index.items() if name.endswith(kind)]
                ),
                self.replicas,
            )
            for kind in ("users", "items")
        }

    def embed(self, batches: Sequence[MicroBatch], routes: Sequence[Route]) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield `input_embeddings` of each micro-batch, while the lookup of the next one is in flight.

        Tables must not change until the iterator is exhausted.

        Collectives: one all-to-all per micro-batch, and one in its backward.
        """
        pending = self._start_lookup(routes[0])
        for index, batch in enumerate(batches):
            lookup = pending
            if index + 1 < len(batches):
                pending = self._start_lookup(routes[index + 1])
            yield self.input_embeddings(batch, lookup.wait())

    def _start_lookup(self, route: Route) -> PendingLookup:
        return start_lookup({name: self.tables[name] for name in route.num_ids}, route, self.comm_dtype)

    def input_embeddings(self, batch: MicroBatch, rows: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Embed a micro-batch: word embeddings, with user and item rows after dropout at their positions.

        Args:
            rows: by table, fp32 [ids of the table, d].

        Returns:
            Token embeddings [R, L, D] in the words' dtype, and the item rows after dropout, fp32 [items, d].
        """
        flat_index = torch.cat([batch.id_positions[name] for name in rows])
        values = torch.cat([*rows.values()])
        if self.training and self.dropout > 0:
            keys, positions = batch.keys.flatten()[flat_index], batch.positions.flatten()[flat_index]
            values = keyed_dropout(values, keys, positions, self.dropout)
        embedded = F.embedding(batch.word_ids, self.words.embedding)
        inputs = values if self.input_projection is None else values @ self.input_projection
        flat = embedded.flatten(0, 1).index_copy(0, flat_index, inputs.to(embedded.dtype))
        if batch.no_user_positions is not None:
            flat = flat.index_fill(0, batch.no_user_positions, 0.0)
        by_table = dict(zip(rows, values.split([len(part) for part in rows.values()]), strict=True))
        return flat.view_as(embedded), by_table["collaborative.items"]

    def forward(
        self,
        batch: MicroBatch,
        tokens: Tensor,
        item_rows: Tensor,
        backbone: Backbone,
        gather: Callable[..., GatheringQueries] = GatheringQueries,
    ) -> dict[str, Tensor]:
        """This rank's loss sums of a micro-batch: `items`, and `text` with a content LLM.

        Args:
            tokens, item_rows: from `embed`.
            gather: brings queries to the owners of item rows; the planner replaces it.

        Collectives: those of the backbone and of `GatheringQueries`, whose all-gathers overlap with the text loss.
        """
        hidden = backbone(tokens, batch.positions, batch.content_start)
        gathering = gather(
            self.item_queries(hidden, item_rows, batch),
            batch.target_query["items"],
            batch.targets["items"],
            self.item_partition,
            self.world,
            self.query_comm_dtype,
        )
        losses = {}
        if "text" in batch.targets:
            queries = hidden.flatten(0, 1)[batch.query_positions["text"]]
            targets = batch.target_query["text"], batch.targets["text"]
            losses["text"] = text_loss(queries, self.words, *targets, self.max_logits)
        # Seed a sampled softmax by the documents' keys, so that a resumed run draws the same items.
        key = batch.keys.sum() if self.num_negatives else None
        losses["items"] = item_loss(
            gathering,
            self.collaborative.items.local_rows,
            self.num_negatives,
            key,
            self.max_logits,
            self.compute_dtype,
            self.head.local_bias,
            normalize=self.head.normalizes_rows,
            accumulate=True,
            sparse=self.collaborative.items.sparse_gradients,
            cumulative_counts=self.cumulative_counts,
        )
        return losses

    def item_queries(self, hidden: Tensor, item_rows: Tensor, batch: MicroBatch) -> Tensor:
        """Hidden states [R, L, D] -> queries of the item head, [Q, d]."""
        queries = hidden.flatten(0, 1)[batch.query_positions["items"]]
        pooled = item_rows.new_zeros(len(queries), item_rows.shape[1])
        if self.head.pool_residual:
            pooled = _sum_of_items_so_far(item_rows, batch)
        return self.head.queries(queries, pooled)

    def output_weight(self) -> Tensor:
        """This rank's rows of the item softmax's weight as one matrix, for predictions: [rows, d or d+1]."""
        return self.head.output_weight(self.collaborative.items.local_rows)

    def mutual_loss(self, touched: Mapping[str, Tensor], lambda_l: float, lambda_c: float) -> Tensor:
        """Mutual regularization of this rank's rows that are touched in a step. No collective."""
        return mutual_regularization(
            _touched_embeddings(self.collaborative, touched),
            None if self.content is None else _touched_embeddings(self.content, touched),
            lambda_l,
            lambda_c,
        )


def _touched_embeddings(llm: UserItemEmbeddings, touched: Mapping[str, Tensor]) -> Tensor:
    return torch.cat([llm.users.local_lookup(touched["users"]), llm.items.local_lookup(touched["items"])])


def _sum_of_items_so_far(item_rows: Tensor, batch: MicroBatch) -> Tensor:
    """Sum of the item rows from a query's document start up to the query: [items, d] -> [Q, d]."""
    # Number of item tokens before each position, which is an index into `item_rows`.
    item_positions = batch.id_positions["collaborative.items"]
    num_before = item_positions.new_zeros(batch.word_ids.numel() + 1)
    num_before[1:].index_fill_(0, item_positions, 1)
    num_before = num_before.cumsum(0)
    queries = batch.query_positions["items"]
    first, stop = num_before[queries - batch.positions.flatten()[queries]], num_before[queries + 1]
    sums = F.pad(item_rows.cumsum(dim=0), (0, 0, 1, 0))
    # Leave out empty sums: normalizing zero has a gradient of 1e12, whose two parts cancel only up to rounding.
    return torch.where((stop > first)[:, None], sums[stop] - sums[first], 0.0)


def keyed_dropout(x: Tensor, keys: Tensor, positions: Tensor, p: float) -> Tensor:
    """Dropout with a mask that depends on (key, position, dimension) only, not on rank or batch size.

    Args:
        x: [n, D].
        keys, positions: int64 [n].
        p: probability of zeroing an entry; the others are scaled by 1 / (1 - p).
    """
    seeds = _mix(keys ^ (positions + 1) * 0x2545F4914F6CDD1D)
    bits = _mix(seeds[:, None] + torch.arange(x.shape[1], device=x.device) * 0x1E3779B97F4A7C15)
    kept = (bits & 0xFFFFFF) >= int(p * (1 << 24))
    return torch.where(kept, x / (1 - p), 0.0)


def _mix(bits: Tensor) -> Tensor:
    """Hash with a 64-bit finalizer (xor-shift and wrapping multiply); every input bit affects every output bit."""
    bits = (bits ^ (bits >> 32 & 0xFFFFFFFF)) * 0x5851F42D4C957F2D
    bits = (bits ^ (bits >> 29 & 0x7FFFFFFFF)) * 0x14057B7EF767814F
    return bits ^ (bits >> 32 & 0xFFFFFFFF)
