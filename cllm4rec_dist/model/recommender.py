"""The model: user, item and word embeddings, the item head, and one forward over a micro-batch.

    ids --route--> --embed--> tokens [R, L, D] --backbone--> hidden [R, L, D] --queries--> losses

The backbone is an argument of the forward, because ZeRO-3 wraps it; everything else is here.

Legend: R rows, L their length, D hidden size, Q positions that predict, U users, I items.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cllm4rec_dist.config import HeadConfig
from cllm4rec_dist.corpus.collate import MicroBatch
from cllm4rec_dist.distributed.topology import RowPartition, World
from cllm4rec_dist.model.backbone import Words
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

Backbone = Callable[[Tensor, Tensor, int], Tensor]
"""Embeddings [R, L, D], positions [R, L] and where the content LLM's begin -> hidden states [R, L, D]."""


class UserItemEmbeddings(nn.Module):
    """User and item embeddings of one LLM."""

    def __init__(self, num_users: int, num_items: int, width: int, world: World, *, sparse_gradients: bool) -> None:
        super().__init__()
        self.users = RowShardedEmbedding(num_users, width, world, sparse_gradients=sparse_gradients)
        self.items = RowShardedEmbedding(num_items, width, world, sparse_gradients=sparse_gradients)


class Recommender(nn.Module):
    """Both LLMs' user and item embeddings, the item head and the frozen words, around a backbone.

    Pretraining trains the collaborative rows as the paper's z_l, finetuning as its z_rec; the content rows are z_c.

    Args:
        num_users, num_items: U, I; U counts a shared user row too.
        words: frozen word embeddings and head; D is theirs.
        dropout: of user and item embeddings at the input.
        comm_dtype: what rows and their gradients are rounded to between ranks.
        sparse_gradients: of tables that are only looked up.
        content: False leaves the content LLM out.
        max_logits: logits that a head holds at a time; the device's default if None.
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
        comm_dtype: torch.dtype,
        sparse_gradients: bool,
        content: bool,
        max_logits: int | None = None,
    ) -> None:
        super().__init__()
        sizes = num_users, num_items, words.embedding.shape[1]
        self.words, self.world, self.dropout, self.comm_dtype = words, world, dropout, comm_dtype
        self.num_negatives, self.max_logits = head.num_negatives, max_logits
        # The collaborative items are the weight of the item softmax too, which makes their whole gradient dense.
        self.collaborative = UserItemEmbeddings(*sizes, world, sparse_gradients=sparse_gradients)
        self.content = UserItemEmbeddings(*sizes, world, sparse_gradients=sparse_gradients) if content else None
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
        """Who owns which item rows."""
        return self.collaborative.items.partition

    @property
    def tables(self) -> dict[str, RowShardedEmbedding]:
        """User and item tables by name (`corpus/collate.py`)."""
        llms = {"collaborative": self.collaborative, "content": self.content}
        return {
            f"{name}.{kind}": table
            for name, llm in llms.items()
            if llm is not None
            for kind, table in (("users", llm.users), ("items", llm.items))
        }

    def sharded_parameters(self) -> Iterator[tuple[str, nn.Parameter, RowPartition]]:
        """Parameters that are blocks of rows, with the partition that says of which rows."""
        for name, table in self.tables.items():
            yield name, table.local_rows, table.partition
        if self.head.local_bias is not None:
            yield "head.bias", self.head.local_bias, self.item_partition

    def replicated_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Parameters of which every rank holds the whole copy; their gradients must be summed over the ranks."""
        if self.head.log_temperature is not None:
            yield "head.log_temperature", self.head.log_temperature

    def route(self, batches: Sequence[MicroBatch]) -> list[Route]:
        """Send the ids of a step's users and items to the owners of their rows. Two all-to-alls.

        Args:
            batches: on the host; equally many on all ranks, with or without texts alike.
        """
        partitions = {name: self.tables[name].partition for name in batches[0].ids}
        return route_ids([batch.ids for batch in batches], partitions, self.world)

    def touched(self, routes: Sequence[Route]) -> dict[str, Tensor]:
        """Local rows of `users` and `items` that are in any document of a step, on any rank. No collective."""
        return {
            kind: touched_rows(
                [rows for route in routes for name, rows in route.local_index.items() if name.endswith(kind)]
            )
            for kind in ("users", "items")
        }

    def embed(self, batches: Sequence[MicroBatch], routes: Sequence[Route]) -> Iterator[tuple[Tensor, Tensor]]:
        """Tokens and item rows (`place`) of one micro-batch after the other; the next one's rows travel meanwhile.

        Collectives: one all-to-all for each, its reverse in backward. Tables must not change before the iterator's end.
        """
        pending = self._start_lookup(routes[0])
        for index, batch in enumerate(batches):
            lookup = pending
            if index + 1 < len(batches):
                pending = self._start_lookup(routes[index + 1])
            yield self.place(batch, lookup.wait())

    def _start_lookup(self, route: Route) -> PendingLookup:
        return start_lookup({name: self.tables[name] for name in route.num_ids}, route, self.comm_dtype)

    def place(self, batch: MicroBatch, rows: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Word embeddings of the backbone with user and item rows put in, after dropout.

        Args:
            rows: by table, fp32 [its ids, D].

        Returns:
            Tokens [R, L, D] in the words' dtype, and the rows of the items read, fp32 [items, D].
        """
        where = torch.cat([batch.id_positions[name] for name in rows])
        values = torch.cat([*rows.values()])
        if self.training and self.dropout > 0:
            keys, positions = batch.keys.flatten()[where], batch.positions.flatten()[where]
            values = keyed_dropout(values, keys, positions, self.dropout)
        embedded = F.embedding(batch.word_ids, self.words.embedding)
        flat = embedded.flatten(0, 1).index_copy(0, where, values.to(embedded.dtype))
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
        """This rank's sums of the losses of a micro-batch: `items`, and `text` where there is a content LLM.

        Args:
            tokens, item_rows: of `embed`.
            gather: brings queries to the owners of item rows; the planner has its own.

        Collectives: those of `GatheringQueries`, whose all-gathers are hidden by the text loss, and the backbone's.
        """
        hidden = backbone(tokens, batch.positions, batch.content_start)
        gathering = gather(
            self.item_queries(hidden, item_rows, batch),
            batch.target_query["items"],
            batch.targets["items"],
            self.item_partition,
            self.world,
        )
        losses = {}
        if "text" in batch.targets:
            queries = hidden.flatten(0, 1)[batch.query_positions["text"]]
            targets = batch.target_query["text"], batch.targets["text"]
            losses["text"] = text_loss(queries, self.words.head, *targets, self.max_logits)
        # A sampled softmax draws by the keys of the documents, so that a resumed run draws the same items.
        key = batch.keys.sum() if self.num_negatives else None
        losses["items"] = item_loss(gathering, self.output_weight(), self.num_negatives, key, self.max_logits)
        return losses

    def item_queries(self, hidden: Tensor, item_rows: Tensor, batch: MicroBatch) -> Tensor:
        """Hidden states [R, L, D] -> what the item head multiplies with its weight, [Q, D or D+1]."""
        queries = hidden.flatten(0, 1)[batch.query_positions["items"]]
        pooled = torch.zeros_like(queries, dtype=item_rows.dtype)
        if self.head.pool_residual:
            pooled = _sum_of_items_so_far(item_rows, batch)
        return self.head.queries(queries, pooled)

    def output_weight(self) -> Tensor:
        """This rank's rows of the item softmax, [rows, D or D+1]."""
        return self.head.output_weight(self.collaborative.items.local_rows)

    def mutual_loss(self, touched: Mapping[str, Tensor], lambda_l: float, lambda_c: float) -> Tensor:
        """The mutual regularizer over the rows of this rank that a step has touched. No collective."""
        return mutual_regularization(
            _touched_embeddings(self.collaborative, touched),
            None if self.content is None else _touched_embeddings(self.content, touched),
            lambda_l,
            lambda_c,
        )


def _touched_embeddings(llm: UserItemEmbeddings, touched: Mapping[str, Tensor]) -> Tensor:
    return torch.cat([llm.users.local_lookup(touched["users"]), llm.items.local_lookup(touched["items"])])


def _sum_of_items_so_far(item_rows: Tensor, batch: MicroBatch) -> Tensor:
    """For each query the sum of the item rows from its document's start to itself: [items, D] -> [Q, D]."""
    # Item tokens before each position, and so before each document: indexes of item rows, which are in this order.
    item_positions = batch.id_positions["collaborative.items"]
    num_before = item_positions.new_zeros(batch.word_ids.numel() + 1)
    num_before[1:].index_fill_(0, item_positions, 1)
    num_before = num_before.cumsum(0)
    queries = batch.query_positions["items"]
    first, stop = num_before[queries - batch.positions.flatten()[queries]], num_before[queries + 1]
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
