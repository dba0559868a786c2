"""Samples steps of a run on all of its ranks, in one process.

The stream makes any rank's part of any global batch, so a plan uses the exact lengths, ids and owners of the run.

Legend: W ranks, G ranks that together hold a copy of the tables.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from cllm4rec_dist.config import RunConfig
from cllm4rec_dist.corpus.collate import MicroBatch
from cllm4rec_dist.corpus.loader import BatchLoader
from cllm4rec_dist.corpus.prompts import PromptBuilder
from cllm4rec_dist.corpus.shards import Corpus
from cllm4rec_dist.distributed.topology import RowPartition, World, shard_group_size
from cllm4rec_dist.planning.dry_run import META, Exchange, RankMicroBatch


@dataclass(frozen=True)
class TableLookup:
    """Sizes of a lookup in one table on all ranks.

    Attributes:
        ids: number of ids that each rank looks up, with duplicates.
        distinct: int64 [W, G] number of distinct ids that a rank (row) looks up on each owner in its group (column).
    """

    ids: list[int]
    distinct: np.ndarray

    @classmethod
    def of(cls, ids: Sequence[torch.Tensor], partition: RowPartition) -> TableLookup:
        """Count the ids of each rank."""
        num_shards = partition.world_size
        distinct = [np.bincount(np.unique(x.numpy()) // partition.block, minlength=num_shards) for x in ids]
        return cls([len(x) for x in ids], np.stack(distinct))

    def exchange(self, rank: int) -> Exchange:
        """Sizes of the lookup on one rank."""
        return Exchange(self.ids[rank], int(self.distinct[rank].sum()), int(self._requested_from(rank).sum()))

    def sent_by(self, rank: int) -> int:
        """Number of rows that a rank sends to others."""
        return int(self._requested_from(rank).sum()) - self._requested_from_itself(rank)

    def received_by(self, rank: int) -> int:
        """Number of rows that a rank receives from others; it sends as many ids and row gradients."""
        return int(self.distinct[rank].sum()) - self._requested_from_itself(rank)

    def _requested_from(self, rank: int) -> np.ndarray:
        """Number of distinct ids that each rank of the group looks up on `rank`."""
        num_shards = self.distinct.shape[1]
        return self.distinct[group_of(rank, num_shards), rank % num_shards]

    def _requested_from_itself(self, rank: int) -> int:
        return int(self.distinct[rank, rank % self.distinct.shape[1]])


@dataclass(frozen=True)
class MicroBatchSample:
    """A micro-batch on all ranks; lists are by rank.

    Attributes:
        batches: micro-batches on the meta device.
        lookups: lookups by table.
        owned_targets: number of item targets of a rank's group whose row the rank owns.
        num_shards: G.
    """

    batches: list[MicroBatch]
    lookups: dict[str, TableLookup]
    owned_targets: list[int]
    num_shards: int

    @property
    def num_positions(self) -> list[int]:
        """Number of positions that the backbone computes."""
        return [batch.word_ids.numel() for batch in self.batches]

    @cached_property
    def queries(self) -> list[int]:
        """Number of positions that predict items."""
        return [len(batch.query_positions["items"]) for batch in self.batches]

    def queries_with(self, rank: int) -> list[int]:
        """Number of positions that predict items, of the ranks of a rank's group."""
        return self.queries[group_of(rank, self.num_shards)]

    def targets_with(self, rank: int) -> list[int]:
        """Number of items that are predicted, by the ranks of a rank's group."""
        return [len(batch.targets["items"]) for batch in self.batches[group_of(rank, self.num_shards)]]


@dataclass(frozen=True)
class StepSample:
    """A step on all ranks.

    Attributes:
        num_ranks: W.
        num_shards: G.
        num_rows: by `users` and `items`, number of each rank's rows.
        touched: by `users` and `items`, number of each rank's rows that appear in any document of its group.
        shares: by `users` and `items`, number of rows of each rank's share of those that appear in any document.
        looked_up: by table, number of each rank's rows whose gradient is not zero, if only lookups have one.
    """

    micro_batches: list[MicroBatchSample]
    num_ranks: int
    num_shards: int
    num_rows: dict[str, list[int]]
    touched: dict[str, list[int]]
    shares: dict[str, list[int]]
    looked_up: dict[str, list[int]]

    def replicas_of(self, rank: int) -> slice:
        """The ranks that hold the same rows as a rank."""
        return slice(rank % self.num_shards, None, self.num_shards)

    def of_rank(self, index: int, rank: int) -> RankMicroBatch:
        """A micro-batch of one rank, for a dry run."""
        sample = self.micro_batches[index]
        return RankMicroBatch(
            batch=sample.batches[rank],
            exchanges={name: lookup.exchange(rank) for name, lookup in sample.lookups.items()},
            touched={kind: shares[rank] for kind, shares in self.shares.items()},
            item_queries=tuple(np.roll(sample.queries_with(rank), -(rank % self.num_shards)).tolist()),
            owned_targets=sample.owned_targets[rank],
        )


def sample_step(corpus: Corpus, prompts: PromptBuilder, config: RunConfig, num_ranks: int, step: int) -> StepSample:
    """Make the batches of optimizer step `step` for `num_ranks` ranks, and count."""
    cpu = torch.device("cpu")
    sources = [BatchLoader(corpus, prompts, config, World(rank, num_ranks, 0, cpu)) for rank in range(num_ranks)]
    by_rank = [source.make(step).micro_batches for source in sources]
    num_user_rows = config.method.num_user_rows(corpus.num_users)
    num_shards = shard_group_size(config.embeddings.shard_group, num_ranks)
    return count_step([*zip(*by_rank, strict=True)], num_user_rows, corpus.num_items, num_shards)


def group_of(rank: int, num_shards: int) -> slice:
    """The ranks that together with `rank` hold a copy of the tables."""
    first = rank - rank % num_shards
    return slice(first, first + num_shards)


def count_step(
    micro_batches: Sequence[Sequence[MicroBatch]], num_users: int, num_items: int, num_shards: int
) -> StepSample:
    """Count a step.

    Args:
        micro_batches: by micro-batch and rank.
        num_users: number of user rows, with a shared one.
        num_shards: G.
    """
    num_ranks = len(micro_batches[0])
    partitions = {"users": RowPartition(num_users, num_shards), "items": RowPartition(num_items, num_shards)}
    rows_by_table = {name: _rows_of_ranks(name, micro_batches, partitions) for name in micro_batches[0][0].ids}
    touched, shares, looked_up = {}, {}, {}
    for kind in partitions:
        tables = {name: rows for name, rows in rows_by_table.items() if name.endswith(kind)}
        rows = [_distinct(parts) for parts in zip(*tables.values(), strict=True)]
        shared = _shares(rows, num_shards)
        touched[kind], shares[kind] = [*map(len, rows)], [*map(len, shared)]
        for name, by_rank in tables.items():
            looked_up[name] = [len(np.union1d(*pair)) for pair in zip(by_rank, shared, strict=True)]
    counted = [_count(by_rank, partitions) for by_rank in micro_batches]
    num_rows = {kind: [p.num_local(rank % num_shards) for rank in range(num_ranks)] for kind, p in partitions.items()}
    return StepSample(counted, num_ranks, num_shards, num_rows, touched, shares, looked_up)


def _rows_of_ranks(
    name: str, micro_batches: Sequence[Sequence[MicroBatch]], partitions: Mapping[str, RowPartition]
) -> list[np.ndarray]:
    """Distinct rows of a table that the group of each rank looks up on it in a step."""
    partition, num_ranks = partitions[name.rpartition(".")[2]], len(micro_batches[0])
    by_rank = []
    for first in range(0, num_ranks, partition.world_size):
        group = group_of(first, partition.world_size)
        ids = _distinct([batch.ids[name].numpy() for batches in micro_batches for batch in batches[group]])
        by_rank += np.split(ids, np.searchsorted(ids, [partition.range(p)[1] for p in range(partition.world_size - 1)]))
    return by_rank


def _distinct(parts: Sequence[np.ndarray]) -> np.ndarray:
    return np.unique(np.concatenate(parts))


def _shares(rows: Sequence[np.ndarray], num_shards: int) -> list[np.ndarray]:
    """Each rank's share of the rows that its replicas touch (`table_replicas.share_touched_rows`)."""
    num_replicas = len(rows) // num_shards
    unions = [_distinct(rows[place::num_shards]) for place in range(num_shards)]
    return [
        union[slice(*World(replica, num_replicas, 0, META).local_range(0, len(union)))]
        for replica in range(num_replicas)
        for union in unions
    ]


def _count(batches: Sequence[MicroBatch], partitions: Mapping[str, RowPartition]) -> MicroBatchSample:
    lookups = {
        name: TableLookup.of([batch.ids[name] for batch in batches], partitions[name.rpartition(".")[2]])
        for name in batches[0].ids
    }
    items, owned = partitions["items"], []
    for first in range(0, len(batches), items.world_size):
        group = batches[group_of(first, items.world_size)]
        targets = torch.cat([batch.targets["items"] for batch in group]).numpy()
        owned += np.bincount(targets // items.block, minlength=items.world_size).tolist()
    return MicroBatchSample([batch.to(META) for batch in batches], lookups, owned, items.world_size)
