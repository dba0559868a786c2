"""Everything of the model that lives outside the engine: rows, head, words, and how documents become embeddings.

The engine runs the backbone between `embed` and the queries:

    token ids --route--> rows --embed--> [engine] --> hidden --> item_queries / word_queries --> objectives

Legend: B batch, T tokens, D hidden, Q query positions, V words, U users, I items.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cllm4rec_dist.config import HeadConfig
from cllm4rec_dist.corpus.prompts import DocumentBatch
from cllm4rec_dist.model.backbone import Words
from cllm4rec_dist.model.heads import ItemHead
from cllm4rec_dist.model.tables import Route, ShardedTable, route_ids
from cllm4rec_dist.topology import RowPartition, World


@dataclass(frozen=True)
class RoutedBatch:
    """A batch and the routes of its user and item tokens."""

    documents: DocumentBatch
    users: Route
    items: Route


class TokenRows(nn.Module):
    """User and item rows of one LLM."""

    def __init__(
        self, num_users: int, num_items: int, width: int, world: World, *, sparse_users: bool, sparse_items: bool
    ) -> None:
        super().__init__()
        self.users = ShardedTable(num_users, width, world, sparse_gradients=sparse_users)
        self.items = ShardedTable(num_items, width, world, sparse_gradients=sparse_items)


class Recommender(nn.Module):
    """Collaborative rows (which finetuning turns into z_rec), content rows, item head and frozen words.

    Args:
        num_users, num_items: U, I.
        words: frozen word embeddings and head; D is theirs.
        dropout: of user and item embeddings at the input.
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
        lazy: bool,
        content: bool,
    ) -> None:
        super().__init__()
        width = words.embedding.shape[1]
        self.words, self.world, self.dropout = words, world, dropout
        # The collaborative items are the operand of the item softmax: their gradient is dense anyway.
        self.collaborative = TokenRows(num_users, num_items, width, world, sparse_users=lazy, sparse_items=False)
        self.content: TokenRows | None = None
        if content:
            self.content = TokenRows(num_users, num_items, width, world, sparse_users=lazy, sparse_items=lazy)
        self.head = ItemHead(
            self.item_partition.num_local(world.rank),
            world,
            form=head.form,
            temperature=head.temperature,
            item_bias=head.item_bias,
            pool_residual=head.pool_residual,
        )

    @property
    def item_partition(self) -> RowPartition:
        """Who holds which item rows."""
        return self.collaborative.items.partition

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

    def route(self, documents: DocumentBatch) -> RoutedBatch:
        """Tell the owners of the batch's users and items which rows are wanted. Two all-to-alls for each."""
        users, items = self.collaborative.users.partition, self.item_partition
        return RoutedBatch(
            documents,
            route_ids(documents.user_ids, users, self.world),
            route_ids(documents.item_ids, items, self.world),
        )

    def embed(self, rows: TokenRows, batch: RoutedBatch) -> tuple[Tensor, Tensor]:
        """Embeddings [B, T, D] in the words' dtype, and the item rows among them [item tokens, D] in fp32.

        Collectives: one all-to-all for users and one for items; their reverse in backward.
        """
        documents = batch.documents
        user_rows, item_rows = rows.users.lookup(batch.users), rows.items.lookup(batch.items)
        if self.training and self.dropout > 0:
            width = documents.word_ids.shape[1]
            user_rows = keyed_dropout(user_rows, *_place(documents.user_positions, documents.keys, width), self.dropout)
            item_rows = keyed_dropout(item_rows, *_place(documents.item_positions, documents.keys, width), self.dropout)
        embedded = F.embedding(documents.word_ids, self.words.embedding)
        flat = embedded.flatten(0, 1)
        flat = flat.index_copy(0, documents.user_positions, user_rows.to(flat.dtype))
        flat = flat.index_copy(0, documents.item_positions, item_rows.to(flat.dtype))
        return flat.view_as(embedded), item_rows

    def item_queries(self, hidden: Tensor, item_rows: Tensor, documents: DocumentBatch) -> Tensor:
        """Hidden states [B, T, D] -> what the item head multiplies with its operand, [Q, D or D+1]."""
        queries = hidden.flatten(0, 1)[documents.query_positions]
        pooled = torch.zeros_like(queries, dtype=item_rows.dtype)
        if self.head.pool_residual:
            batch, length = documents.word_ids.shape
            placed = item_rows.new_zeros(batch * length, item_rows.shape[1])
            placed = placed.index_copy(0, documents.item_positions, item_rows).view(batch, length, -1)
            pooled = placed.cumsum(dim=1).flatten(0, 1)[documents.query_positions]
        return self.head.queries(queries, pooled)

    def item_operand(self) -> Tensor:
        """This rank's rows of the item softmax, [rows, D or D+1]."""
        return self.head.operand(self.collaborative.items.local_rows)

    def word_queries(self, hidden: Tensor, documents: DocumentBatch) -> Tensor:
        """Hidden states [B, T, D] -> those that predict a word, [Q, D]."""
        return hidden.flatten(0, 1)[documents.query_positions]


def _place(positions: Tensor, keys: Tensor, width: int) -> tuple[Tensor, Tensor]:
    return keys[positions // width], positions % width


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
