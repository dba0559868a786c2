"""From corpus and step number to this rank's micro-batches.

A stage is data: which documents are made of a user's items. Texts come from a stream of their own, which goes on
through its epochs while users go through theirs, so that both LLMs are trained in lockstep.

A global batch is dealt out by tokens: every rank knows how long each of its documents will be, without making it. Its
longest documents are the first micro-batch of all ranks and its shortest ones the last, because attention is paid by
the length of a row, and rows are as long as the longest document in them. Within a micro-batch documents are shared out
over the ranks by the one rule of `packing.balance`: ranks wait for each other in every layer, so the longest part is
what a step costs.

Legend: n examples, A micro-batches of a rank, W ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from cllm4rec_dist.config import RunConfig
from cllm4rec_dist.corpus.packing import balance
from cllm4rec_dist.corpus.prompts import Composer, Document, Documents, MicroBatch, collate
from cllm4rec_dist.corpus.shards import Corpus, ShardSet
from cllm4rec_dist.corpus.stream import EpochOrder, Examples, WindowCache, batch_range, steps_per_epoch
from cllm4rec_dist.topology import World


@dataclass(frozen=True)
class StepBatch:
    """This rank's part of a global batch.

    Attributes:
        micro_batches: `gradient_accumulation_steps` of them, some perhaps without documents.
        epoch: pass over the users.
        users: rows of the users that were read.
        texts: pass, record and index of the texts that were read.
    """

    micro_batches: list[MicroBatch]
    epoch: int
    users: list[int]
    texts: list[tuple[int, int, int]]


class _Users:
    """The stream of users, and the documents that a stage makes of them."""

    def __init__(self, shards: ShardSet, composer: Composer, config: RunConfig) -> None:
        self.order = EpochOrder(shards.record_sizes, config.seed, config.shuffle_window)
        self._data = WindowCache(shards, self.order, ["users"], ("train_offsets", "train_items"))
        self._batch = config.batch.users
        self._make, self._measure = (
            (composer.collaborative, composer.collaborative_lengths) if config.stage == "pretrain"
            else (composer.recommendation, composer.recommendation_lengths)
        )  # fmt: skip

    def read(self, step: int) -> Examples:
        """The global batch of a step; it does not cross the end of an epoch."""
        return self.order.range(*batch_range(step, self.order.num_examples, self._batch))

    def rows(self, examples: Examples) -> np.ndarray:
        return self._data.columns(examples)["users"]

    def lengths(self, examples: Examples) -> np.ndarray:
        columns = self._data.columns(examples)
        return self._measure(columns["users"], columns["length"], examples.epochs)

    def documents(self, examples: Examples) -> Documents:
        return self._make(self.rows(examples), self._data.lists(examples), examples.epochs)


class _Texts:
    """The stream of texts."""

    def __init__(self, shards: ShardSet, composer: Composer, config: RunConfig) -> None:
        self.order = EpochOrder(shards.record_sizes, config.seed, config.shuffle_window)
        self._data = WindowCache(shards, self.order, ["kind", "users", "items"], ("offsets", "tokens"))
        self._batch, self._composer = config.batch.texts, composer

    def read(self, step: int) -> Examples:
        """The global batch of a step; it goes on into the next epoch."""
        return self.order.range(step * self._batch, (step + 1) * self._batch)

    def lengths(self, examples: Examples) -> np.ndarray:
        columns = self._data.columns(examples)
        return self._composer.content_lengths(columns["kind"], columns["length"])

    def documents(self, examples: Examples) -> Documents:
        columns = self._data.columns(examples)
        return self._composer.content(
            columns["kind"], columns["users"], columns["items"], self._data.lists(examples), examples.epochs,
            (examples.records << 20) + examples.indexes,
        )  # fmt: skip


class BatchSource:
    """This rank's part of every global batch.

    Args:
        corpus: interactions and content.
        composer: makes documents.
        config: batch sizes, seed, window, stage.
        world: decides the part.

    Attributes:
        steps_per_epoch: optimizer steps in which every user comes once.
        has_texts: whether the content LLM has anything to read.
        num_users: users of an epoch.
        text_record_sizes: int64 [R] texts of each record; empty where no texts are read.
    """

    def __init__(self, corpus: Corpus, composer: Composer, config: RunConfig, world: World) -> None:
        self._space, self._world, self._batch = composer.space, world, config.batch
        self._users = _Users(corpus.interactions, composer, config)
        self._streams: list[_Users | _Texts] = [self._users]
        self.has_texts = config.batch.texts > 0 and corpus.content.num_examples > 0
        if self.has_texts:
            self._streams.append(_Texts(corpus.content, composer, config))
        self.num_users = self._users.order.num_examples
        self.text_record_sizes = corpus.content.record_sizes if self.has_texts else np.empty(0, np.int64)
        self.steps_per_epoch = steps_per_epoch(self.num_users, config.batch.users)

    def examples(self, step: int) -> list[list[Examples]]:
        """Of the users, and of the texts if there are any, what each micro-batch of this rank reads at a step.

        The one rule of who reads what: parts of about equally many tokens, users and texts together. It is a function
        of the global batch, of A and of W, so each example of the batch is in one part of one rank.
        """
        loads = np.zeros((self._batch.gradient_accumulation_steps, self._world.size), np.int64)
        found = []
        for stream in self._streams:
            whole = stream.read(step)
            lengths = stream.lengths(whole)
            own = []
            for members, load in zip(_by_length(lengths, len(loads)), loads, strict=True):
                rank, _ = balance(lengths[members], self._world.size, load)
                np.add.at(load, rank, lengths[members])
                own.append(whole.take(np.sort(members[rank == self._world.rank])))
            found.append(own)
        return found

    def documents(self, step: int) -> tuple[list[Document], list[Document]]:
        """This rank's documents over items and over words of optimizer step `step`."""
        made = [
            [document for part in parts for document in stream.documents(part)]
            for stream, parts in zip(self._streams, self.examples(step), strict=True)
        ]
        return made[0], made[1] if self.has_texts else []

    def describe(self, step: int) -> str:
        """Which examples a step reads on all ranks, for people."""
        start, stop = batch_range(step, self.num_users, self._batch.users)
        epoch, first = divmod(start, self.num_users)
        return f"epoch {epoch}, users at positions {first} to {first + stop - start - 1} of its order"

    def make(self, step: int) -> StepBatch:
        """What this rank reads at optimizer step `step`, and what it read it from. For one thread at a time."""
        read = self.examples(step)
        texts = Examples.concat(read[1]) if self.has_texts else Examples.concat([])
        return StepBatch(
            [self._micro_batch(parts) for parts in zip(*read, strict=True)],
            step // self.steps_per_epoch,
            self._users.rows(Examples.concat(read[0])).tolist(),
            list(zip(texts.epochs.tolist(), texts.records.tolist(), texts.indexes.tolist(), strict=True)),
        )

    def _micro_batch(self, parts: Sequence[Examples]) -> MicroBatch:
        items, *words = [stream.documents(part) for stream, part in zip(self._streams, parts, strict=True)]
        batch = collate(items, self._space, *words)
        return batch.pinned() if self._world.device.type == "cuda" else batch


def _by_length(lengths: np.ndarray, num_parts: int) -> list[np.ndarray]:
    """Examples in parts of about equally many tokens, from the longest ones to the shortest."""
    order = np.argsort(-lengths, kind="stable")
    middle = np.cumsum(lengths[order]) - lengths[order] / 2
    cuts = np.searchsorted(middle, lengths.sum() * np.arange(1, num_parts) / num_parts)
    return np.split(order, cuts)
