"""Samples steps of a run on all of its ranks, in one process.

The stream makes any rank's part of any global batch, so a plan uses the exact lengths, ids and owners of the run.

Legend: W ranks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from cllm4rec_dist.config import RunConfig
from cllm4rec_dist.corpus.collate import MicroBatch
from cllm4rec_dist.corpus.loader import BatchLoader
from cllm4rec_dist.corpus.prompts import PromptBuilder
from cllm4rec_dist.corpus.shards import Corpus
from cllm4rec_dist.distributed.topology import RowPartition, World
from cllm4rec_dist.planning.dry_run import META, Exchange, RankMicroBatch


@dataclass(frozen=True)
class TableLookup:
    """Sizes of a lookup in one table on all ranks.

    Attributes:
        ids: number of ids that each rank looks up, with duplicates.
        distinct: int64 [W, W] number of distinct ids that a rank (row) looks up on each owner (column).
    """

    ids: list[int]
    distinct: np.ndarray

    @classmethod
    def of(cls, ids: Sequence[torch.Tensor], partition: RowPartition) -> TableLookup:
        """Count the ids of each rank."""
        distinct = [np.bincount(np.unique(x.numpy()) // partition.block, minlength=len(ids)) for x in ids]
        return cls([len(x) for x in ids], np.stack(distinct))

    def exchange(self, rank: int) -> Exchange:
        """Sizes of the lookup on one rank."""
        return Exchange(self.ids[rank], int(self.distinct[rank].sum()), int(self.distinct[:, rank].sum()))

    def sent_by(self, rank: int) -> int:
        """Number of rows that a rank sends to others."""
        return int(self.distinct[:, rank].sum() - self.distinct[rank, rank])

    def received_by(self, rank: int) -> int:
        """Number of rows that a rank receives from others; it sends as many ids and row gradients."""
        return int(self.distinct[rank].sum() - self.distinct[rank, rank])


@dataclass(frozen=True)
class MicroBatchSample:
    """A micro-batch on all ranks; lists are by rank.

    Attributes:
        batches: micro-batches on the meta device.
        lookups: lookups by table.
        owned_targets: number of item targets of all ranks whose row a rank owns.
    """

    batches: list[MicroBatch]
    lookups: dict[str, TableLookup]
    owned_targets: list[int]

    @property
    def num_positions(self) -> list[int]:
        """Number of positions that the backbone computes."""
        return [batch.word_ids.numel() for batch in self.batches]

    @property
    def queries(self) -> list[int]:
        """Number of positions that predict items."""
        return [len(batch.query_positions["items"]) for batch in self.batches]

    @property
    def targets(self) -> list[int]:
        """Number of items that are predicted."""
        return [len(batch.targets["items"]) for batch in self.batches]


@dataclass(frozen=True)
class StepSample:
    """A step on all ranks.

    Attributes:
        touched_users, touched_items: number of each rank's rows that appear in any document of the step.
    """

    micro_batches: list[MicroBatchSample]
    touched_users: list[int]
    touched_items: list[int]

    @property
    def num_ranks(self) -> int:
        """W."""
        return len(self.touched_users)

    def of_rank(self, index: int, rank: int) -> RankMicroBatch:
        """A micro-batch of one rank, for a dry run."""
        sample = self.micro_batches[index]
        return RankMicroBatch(
            batch=sample.batches[rank],
            exchanges={name: lookup.exchange(rank) for name, lookup in sample.lookups.items()},
            touched={"users": self.touched_users[rank], "items": self.touched_items[rank]},
            item_queries=tuple(np.roll(sample.queries, -rank).tolist()),
            owned_targets=sample.owned_targets[rank],
        )


def sample_step(corpus: Corpus, prompts: PromptBuilder, config: RunConfig, num_ranks: int, step: int) -> StepSample:
    """Make the batches of optimizer step `step` for `num_ranks` ranks, and count."""
    cpu = torch.device("cpu")
    sources = [BatchLoader(corpus, prompts, config, World(rank, num_ranks, 0, cpu)) for rank in range(num_ranks)]
    by_rank = [source.make(step).micro_batches for source in sources]
    num_user_rows = config.method.num_user_rows(corpus.num_users)
    return count_step([*zip(*by_rank, strict=True)], num_user_rows, corpus.num_items)


def count_step(micro_batches: Sequence[Sequence[MicroBatch]], num_users: int, num_items: int) -> StepSample:
    """Count a step.

    Args:
        micro_batches: by micro-batch and rank.
        num_users: number of user rows, with a shared one.
    """
    num_ranks = len(micro_batches[0])
    partitions = {"users": RowPartition(num_users, num_ranks), "items": RowPartition(num_items, num_ranks)}
    batches = [batch for by_rank in micro_batches for batch in by_rank]
    touched = {
        kind: _count_owned(
            [ids for batch in batches for name, ids in batch.ids.items() if name.endswith(kind)], partition
        )
        for kind, partition in partitions.items()
    }
    return StepSample([_count(by_rank, partitions) for by_rank in micro_batches], touched["users"], touched["items"])


def _count(batches: Sequence[MicroBatch], partitions: Mapping[str, RowPartition]) -> MicroBatchSample:
    lookups = {
        name: TableLookup.of([batch.ids[name] for batch in batches], partitions[name.rpartition(".")[2]])
        for name in batches[0].ids
    }
    targets = torch.cat([batch.targets["items"] for batch in batches]).numpy()
    owned = np.bincount(targets // partitions["items"].block, minlength=len(batches)).tolist()
    return MicroBatchSample([batch.to(META) for batch in batches], lookups, owned)


def _count_owned(ids: Sequence[torch.Tensor], partition: RowPartition) -> list[int]:
    distinct = np.unique(torch.cat([*ids]).numpy())
    return np.bincount(distinct // partition.block, minlength=partition.world_size).tolist()
