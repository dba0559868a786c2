"""What real steps of a run would hold on each of its ranks, counted without starting one.

The stream gives any rank its part of any global batch, so the lengths, the ids and their owners that a plan counts with
are those that the run will meet.

Legend: W ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from cllm4rec_dist.config import RunConfig
from cllm4rec_dist.corpus.batches import BatchSource
from cllm4rec_dist.corpus.prompts import Composer, MicroBatch
from cllm4rec_dist.corpus.shards import Corpus
from cllm4rec_dist.planning.rehearsal import META, Exchange, Share
from cllm4rec_dist.topology import RowPartition, World


@dataclass(frozen=True)
class Wants:
    """A lookup in one table on all ranks.

    Attributes:
        ids: wanted ids of each rank, repeated ones included.
        distinct: int64 [W, W] distinct ids that a rank (row) wants from each owner (column).
    """

    ids: list[int]
    distinct: np.ndarray

    @classmethod
    def of(cls, ids: Sequence[torch.Tensor], partition: RowPartition) -> Wants:
        """Count the ids of each rank."""
        distinct = [np.bincount(np.unique(x.numpy()) // partition.block, minlength=len(ids)) for x in ids]
        return cls([len(x) for x in ids], np.stack(distinct))

    def sent_by(self, rank: int) -> int:
        """Rows that a rank sends to others."""
        return int(self.distinct[:, rank].sum() - self.distinct[rank, rank])

    def fetched_by(self, rank: int) -> int:
        """Rows that a rank gets from others; as many ids and row gradients go the other way."""
        return int(self.distinct[rank].sum() - self.distinct[rank, rank])


@dataclass(frozen=True)
class MicroBatchSample:
    """One micro-batch on all ranks; lists by rank.

    Attributes:
        batches: themselves, on the meta device.
        wants: lookups of users and items of the collaborative, then of the content LLM.
        owned_targets: item targets, of whatever rank, whose row a rank holds.
    """

    batches: list[MicroBatch]
    wants: list[Wants]
    owned_targets: list[int]

    @property
    def places(self) -> list[int]:
        """Positions that the backbone computes."""
        return [batch.word_ids.numel() for batch in self.batches]

    @property
    def queries(self) -> list[int]:
        """Places that predict items."""
        return [len(batch.items.query_places) for batch in self.batches]

    @property
    def targets(self) -> list[int]:
        """Items that are predicted."""
        return [len(batch.items.targets) for batch in self.batches]


@dataclass(frozen=True)
class StepSample:
    """One step on all ranks.

    Attributes:
        touched_users, touched_items: rows of each rank that stand in any document of the step.
    """

    micro_batches: list[MicroBatchSample]
    touched_users: list[int]
    touched_items: list[int]

    @property
    def num_ranks(self) -> int:
        """W."""
        return len(self.touched_users)

    def share(self, index: int, rank: int) -> Share:
        """A micro-batch of one rank, for a rehearsal."""
        sample = self.micro_batches[index]
        exchanges = [
            Exchange(wants.ids[rank], int(wants.distinct[rank].sum()), int(wants.distinct[:, rank].sum()))
            for wants in sample.wants
        ]
        counts = tuple(np.roll(sample.queries, -rank).tolist())
        return Share(
            sample.batches[rank], exchanges, self.touched_users[rank], self.touched_items[rank], counts,
            sample.owned_targets[rank],
        )  # fmt: skip


def sample_step(corpus: Corpus, composer: Composer, config: RunConfig, num_ranks: int, step: int) -> StepSample:
    """Compose optimizer step `step` as `num_ranks` ranks would, and count."""
    cpu = torch.device("cpu")
    sources = [BatchSource(corpus, composer, config, World(rank, num_ranks, 0, cpu)) for rank in range(num_ranks)]
    by_rank = [source.make(step).micro_batches for source in sources]
    num_user_rows = config.method.num_user_rows(corpus.num_users)
    return count_step([*zip(*by_rank, strict=True)], num_user_rows, corpus.num_items)


def count_step(micro_batches: Sequence[Sequence[MicroBatch]], num_users: int, num_items: int) -> StepSample:
    """Count a step.

    Args:
        num_users: user rows, a shared one included.
        micro_batches: for each micro-batch, that of every rank.
    """
    num_ranks = len(micro_batches[0])
    users, items = RowPartition(num_users, num_ranks), RowPartition(num_items, num_ranks)
    documents = [d for batches in micro_batches for b in batches for d in b.documents]
    return StepSample(
        [_count(batches, users, items) for batches in micro_batches],
        _owned([d.user_ids for d in documents], users), _owned([d.item_ids for d in documents], items),
    )  # fmt: skip


def _count(batches: Sequence[MicroBatch], users: RowPartition, items: RowPartition) -> MicroBatchSample:
    wants = []
    for documents in zip(*(batch.documents for batch in batches), strict=True):
        wants.append(Wants.of([d.user_ids for d in documents], users))
        wants.append(Wants.of([d.item_ids for d in documents], items))
    targets = torch.cat([batch.items.targets for batch in batches]).numpy()
    owned = np.bincount(targets // items.block, minlength=len(batches)).tolist()
    return MicroBatchSample([batch.to(META) for batch in batches], wants, owned)


def _owned(ids: Sequence[torch.Tensor], partition: RowPartition) -> list[int]:
    distinct = np.unique(torch.cat([*ids]).numpy())
    return np.bincount(distinct // partition.block, minlength=partition.world_size).tolist()
